//! Token ids to text, one token at a time. A delta never splits a character, and the deltas joined are what decoding
//! the whole sequence gives. Special tokens have no text. Stop strings are not looked for here.
//!
//! Byte-level vocabularies (GPT-2's scheme: Llama 3, Qwen, the demo model) map each token to bytes, which are exact and
//! take constant time. Every other decoder is asked for the text of a short window of tokens, twice: what the window
//! gains by the new token is the delta (as vLLM and text-generation-inference do).

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use tokenizers::{DecoderWrapper, Model, Tokenizer};

use crate::generation::output::TokenText;

/// Tokens of a window that may wait for a character to become complete. A character has at most four bytes, so a window
/// that still ends in a replacement character after this many holds bytes that are no UTF-8, and is shown as it is.
const WINDOW_PENDING_MAX: usize = 8;

/// What all sequences of a model share. Made once, in time proportional to the vocabulary.
pub(crate) struct TokenTexts {
    tokenizer: Tokenizer,
    /// One more than the largest id.
    ids_end: u32,
    /// The spellings of special tokens.
    special: HashMap<u32, String>,
    /// With a byte-level decoder: the bytes of every token, one after another, and where each begins.
    bytes: Option<(Vec<u8>, Vec<u32>)>,
}

impl TokenTexts {
    pub fn new(tokenizer: Tokenizer) -> Self {
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let ids = ids_end(&tokenizer);
        let special = tokenizer.get_added_tokens_decoder().into_iter();
        let special = special
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content));
        let special: HashMap<u32, String> = special.collect();
        let bytes = byte_level.then(|| {
            let (mut bytes, mut starts) = (Vec::new(), Vec::with_capacity(ids as usize + 1));
            for id in 0..ids {
                starts.push(bytes.len() as u32);
                append_bytes(&tokenizer, id, &mut bytes);
            }
            starts.push(bytes.len() as u32);
            bytes.shrink_to_fit();
            (bytes, starts)
        });
        Self {
            tokenizer,
            ids_end: ids,
            special,
            bytes,
        }
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// One more than the largest id.
    pub fn vocabulary_size(&self) -> u32 {
        self.ids_end
    }

    /// The special token of that spelling.
    pub fn special(&self, spelling: &str) -> Option<u32> {
        let found = self.special.iter().find(|(_, text)| *text == spelling);
        found.map(|(id, _)| *id)
    }

    /// The special tokens that any of these texts holds.
    pub fn special_in(&self, texts: &[&str]) -> Vec<u32> {
        let named =
            |(id, spelling): (&u32, &String)| texts.iter().any(|text| text.contains(spelling.as_str())).then_some(*id);
        self.special.iter().filter_map(named).collect()
    }

    /// A token by itself, special ones too.
    pub fn token(&self, id: u32) -> TokenText {
        let bytes = match (self.special.get(&id), &self.bytes) {
            (Some(spelling), _) => spelling.clone().into_bytes(),
            (None, Some((bytes, starts))) => bytes_of(bytes, starts, id).to_vec(),
            (None, None) => spelled_bytes(&self.tokenizer.id_to_token(id).unwrap_or_default()),
        };
        TokenText {
            id,
            text: String::from_utf8_lossy(&bytes).into_owned(),
            bytes,
        }
    }
}

fn bytes_of<'a>(bytes: &'a [u8], starts: &[u32], id: u32) -> &'a [u8] {
    match starts.get(id as usize..).and_then(|rest| rest.first_chunk::<2>()) {
        Some(&[from, to]) => &bytes[from as usize..to as usize],
        None => &[],
    }
}

/// SentencePiece's spelling: a lower block for a space, `<0xE2>` for a byte.
fn spelled_bytes(token: &str) -> Vec<u8> {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte
        .filter(|hex| hex.len() == 2)
        .and_then(|hex| u8::from_str_radix(hex, 16).ok())
    {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}

/// What of special tokens is text.
#[derive(Clone, Debug)]
pub(crate) enum Special {
    /// Nothing.
    Hidden,
    /// All of them.
    Shown,
    /// These: parsers of tool calls and thoughts look for them.
    Only(Arc<[u32]>),
}

/// Turns one sequence's tokens into text.
pub(crate) struct Detokenizer {
    texts: Arc<TokenTexts>,
    special: Special,
    mode: Mode,
}

enum Mode {
    /// Bytes at the end of the text that begin a character.
    Bytes(Vec<u8>),
    /// `ids[..read]` have been shown; they stay as the context that decoders (spaces!) depend on.
    Window { ids: Vec<u32>, read: usize },
}

impl Detokenizer {
    pub fn new(texts: Arc<TokenTexts>, special: Special) -> Self {
        let mode = match texts.bytes {
            Some(_) => Mode::Bytes(Vec::new()),
            None => Mode::Window {
                ids: Vec::new(),
                read: 0,
            },
        };
        Self { texts, special, mode }
    }

    /// The text that `id` adds; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        let shown = match &self.special {
            Special::Hidden => false,
            Special::Shown => true,
            Special::Only(ids) => ids.contains(&id),
        };
        if shown && self.texts.special.contains_key(&id) {
            let mut text = self.finish();
            text.push_str(&self.texts.special[&id]);
            return text;
        }
        match &mut self.mode {
            Mode::Bytes(pending) => {
                if let Some((bytes, starts)) = &self.texts.bytes {
                    pending.extend_from_slice(bytes_of(bytes, starts, id));
                }
                take_characters(pending, false)
            }
            Mode::Window { ids, read } => {
                ids.push(id);
                let force = ids.len() - *read > WINDOW_PENDING_MAX;
                window_delta(&self.texts.tokenizer, ids, read, force)
            }
        }
    }

    /// A token by itself.
    pub fn token(&self, id: u32) -> TokenText {
        self.texts.token(id)
    }

    /// The sequence is over: the text of what is still pending.
    pub fn finish(&mut self) -> String {
        match &mut self.mode {
            Mode::Bytes(pending) => take_characters(pending, true),
            Mode::Window { ids, read } => window_delta(&self.texts.tokenizer, ids, read, true),
        }
    }
}

/// One more than the largest id. Where the model's ids have no holes they are counted, because asking for the vocabulary makes
/// a copy of tens of megabytes, most of which the allocator keeps from then on.
fn ids_end(tokenizer: &Tokenizer) -> u32 {
    let model = tokenizer.get_vocab_size(false) as u32;
    if !(0..model).all(|id| tokenizer.get_model().id_to_token(id).is_some()) {
        return tokenizer.get_vocab(true).into_values().max().map_or(0, |last| last + 1);
    }
    let added = tokenizer.get_added_tokens_decoder().into_keys().max();
    model.max(added.map_or(0, |last| last + 1))
}

fn append_bytes(tokenizer: &Tokenizer, id: u32, out: &mut Vec<u8>) {
    let added = tokenizer.get_added_vocabulary();
    let token = match added.simple_id_to_token(id) {
        Some(token) if added.is_special_token(&token) => return,
        Some(token) => token,
        None => match tokenizer.id_to_token(id) {
            Some(token) => token,
            // A model may have more rows than its tokenizer has tokens; such an id has no text.
            None => return,
        },
    };
    let start = out.len();
    for character in token.chars() {
        match BYTE_OF_CHAR.get(&character) {
            Some(&byte) => out.push(byte),
            None => {
                // Not a byte-level spelling (an added token): the text stands for itself.
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// Takes all complete characters off `pending`, with U+FFFD for bytes that can be none, as a lossy decode of the whole.
fn take_characters(pending: &mut Vec<u8>, last: bool) -> String {
    let mut text = String::new();
    let mut taken = 0;
    loop {
        match std::str::from_utf8(&pending[taken..]) {
            Ok(valid) => {
                text.push_str(valid);
                taken = pending.len();
                break;
            }
            Err(error) => {
                let valid_end = taken + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&pending[taken..valid_end]));
                taken = valid_end;
                match error.error_len() {
                    Some(len) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        taken += len;
                    }
                    None if last => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        taken = pending.len();
                        break;
                    }
                    None => break,
                }
            }
        }
    }
    pending.drain(..taken);
    text
}

fn window_delta(tokenizer: &Tokenizer, ids: &mut Vec<u32>, read: &mut usize, force: bool) -> String {
    // Decoders fail on nothing that a vocabulary holds; if one does, its tokens have no text.
    let before = tokenizer.decode(&ids[..*read], true).unwrap_or_default();
    let after = tokenizer.decode(ids, true).unwrap_or_default();
    if after.ends_with(char::REPLACEMENT_CHARACTER) && !force {
        return String::new();
    }
    let delta = match after.strip_prefix(&before) {
        Some("") if !force => return String::new(),
        Some(delta) => delta.to_owned(),
        // The new token changed how the shown ones read (bytes that turn out to be no UTF-8), and they cannot be taken
        // back: the pending tokens stand alone.
        None => tokenizer.decode(&ids[*read..], true).unwrap_or_default(),
    };
    ids.drain(..*read);
    *read = ids.len();
    delta
}

/// GPT-2's byte alphabet: each byte as a visible character.
static BYTE_OF_CHAR: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..=u8::MAX)
        .filter_map(|byte| {
            let code = if visible(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).map(|character| (character, byte))
        })
        .collect()
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{byte_level_json, byte_level_tokenizer, sentencepiece_tokenizer};
    use proptest::prelude::*;

    fn streamed(tokenizer: &Arc<TokenTexts>, ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), Special::Hidden);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text += &detokenizer.finish();
        text
    }

    #[test]
    fn the_end_of_the_ids_is_found_with_holes_and_without() {
        let largest = |tokenizer: &Tokenizer| tokenizer.get_vocab(true).into_values().max().unwrap();
        for mut tokenizer in [byte_level_tokenizer(), sentencepiece_tokenizer()] {
            assert_eq!(ids_end(&tokenizer), largest(&tokenizer) + 1);
            let more = tokenizers::AddedToken::from("<more>", true);
            tokenizer.add_special_tokens([more]).unwrap();
            assert_eq!(ids_end(&tokenizer), largest(&tokenizer) + 1);
        }
        let mut json = byte_level_json();
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        *vocab.values_mut().next_back().unwrap() = 1000.into();
        let holes = Tokenizer::from_bytes(json.to_string()).unwrap();
        assert_eq!((ids_end(&holes), largest(&holes)), (1001, 1000));
    }

    static BYTE_LEVEL: LazyLock<Arc<TokenTexts>> = LazyLock::new(|| Arc::new(TokenTexts::new(byte_level_tokenizer())));
    static SENTENCEPIECE: LazyLock<Arc<TokenTexts>> =
        LazyLock::new(|| Arc::new(TokenTexts::new(sentencepiece_tokenizer())));

    proptest! {
        #[test]
        fn any_byte_level_tokens_stream_as_they_decode_whole(ids in prop::collection::vec(0u32..270, 0..60)) {
            prop_assert_eq!(streamed(&BYTE_LEVEL, &ids), BYTE_LEVEL.tokenizer().decode(&ids, true).unwrap());
        }

        #[test]
        fn any_text_survives_byte_fallback(text in "[a-e][ a-eé😀漢]{0,30}") {
            let ids = SENTENCEPIECE.tokenizer().encode(text.as_str(), false).unwrap().get_ids().to_vec();
            prop_assert_eq!(streamed(&SENTENCEPIECE, &ids), SENTENCEPIECE.tokenizer().decode(&ids, true).unwrap());
            prop_assert_eq!(streamed(&SENTENCEPIECE, &ids), text);
        }
    }

    #[test]
    fn a_character_is_shown_whole_and_bad_bytes_do_not_block() {
        for tokenizer in [&*BYTE_LEVEL, &*SENTENCEPIECE] {
            let ids = tokenizer.tokenizer().encode("😀", false).unwrap().get_ids().to_vec();
            assert!(ids.len() >= 4, "the emoji is to be spelled in bytes");
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), Special::Hidden);
            let deltas: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
            assert_eq!(deltas.last().map(String::as_str), Some("😀"));
            assert!(deltas[..deltas.len() - 1].iter().all(String::is_empty), "{deltas:?}");

            // A lone lead byte, over and over: shown as replacement characters, not held for ever.
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), Special::Hidden);
            let lead = ids[ids.len() - 4];
            let shown: String = (0..64).map(|_| detokenizer.push(lead)).collect();
            assert!(shown.chars().count() > 32, "{shown:?}");
        }
    }

    #[test]
    fn special_tokens_have_no_text() {
        let eos = BYTE_LEVEL.tokenizer().token_to_id("<|im_end|>").unwrap();
        assert_eq!(streamed(&BYTE_LEVEL, &[eos, eos]), "");
        let of = |special: Special| {
            let mut detokenizer = Detokenizer::new(BYTE_LEVEL.clone(), special);
            ["a", "b"]
                .map(|text| detokenizer.push(u32::from(text.as_bytes()[0])) + &detokenizer.push(eos))
                .concat()
        };
        assert_eq!(of(Special::Shown), "a<|im_end|>b<|im_end|>");
        assert_eq!(of(Special::Only([eos].into())), "a<|im_end|>b<|im_end|>");
        assert_eq!(of(Special::Only([eos - 1].into())), "ab");
        assert_eq!(BYTE_LEVEL.special_in(&["x<|im_end|>", "<|im_start|"]), [eos]);
    }

    #[test]
    fn a_token_alone_has_its_bytes() {
        let emoji = SENTENCEPIECE
            .tokenizer()
            .encode("😀", false)
            .unwrap()
            .get_ids()
            .to_vec();
        let bytes: Vec<u8> = emoji.iter().flat_map(|&id| SENTENCEPIECE.token(id).bytes).collect();
        assert!(String::from_utf8(bytes).unwrap().ends_with('😀'));
        let token = BYTE_LEVEL.token(0xf0);
        assert_eq!((token.text.as_str(), token.bytes.as_slice()), ("\u{fffd}", &[0xf0][..]));
        assert_eq!(BYTE_LEVEL.token(u32::MAX).bytes, b"");
    }
}
