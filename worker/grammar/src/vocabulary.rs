//! The text of every token of a model, in the form that grammars are matched against.
//!
//! Two families of tokenizers are known: byte-level ones (GPT-2's scheme: every character of a token stands for a byte) and
//! SentencePiece's with byte fallback (`▁` is a space, `<0x0A>` a byte). Control tokens have no text: a grammar can
//! end a turn, but text can never spell a control token.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use crate::error::{VocabularyError, detail};

/// Largest tokenizer file read. The largest in use (260k-word vocabularies) are about 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Most tokens: beyond every vocabulary in use, and what the trie's node numbers hold.
const TOKENS_MAX: usize = 1 << 20;

/// Tokens and the trie over their bytes. Cheap to clone.
#[derive(Clone)]
pub struct Vocabulary {
    env: TokEnv,
}

/// How a token's text is written in the vocabulary.
enum Spelling {
    ByteLevel,
    ByteFallback,
}

impl Vocabulary {
    /// Reads `tokenizer.json` of a model directory. `eos_ids` end a text. Takes up to seconds for a large vocabulary.
    ///
    /// # Errors
    /// The file is unreadable, or its decoder is none that is known here.
    pub fn load(dir: &Path, eos_ids: &[u32]) -> Result<Self, VocabularyError> {
        let path = dir.join("tokenizer.json");
        let read = |error: std::io::Error| VocabularyError::Read(error.to_string());
        let bytes = std::fs::metadata(&path).map_err(read)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(VocabularyError::Read(format!(
                "it has {bytes} bytes; at most {FILE_BYTES_MAX} are read"
            )));
        }
        let json = std::fs::read(&path).map_err(read)?;
        Self::from_tokenizer(&json, eos_ids)
    }

    /// The same from the file's bytes.
    ///
    /// # Errors
    /// As of [`load`](Self::load).
    pub fn from_tokenizer(json: &[u8], eos_ids: &[u32]) -> Result<Self, VocabularyError> {
        let unusable = |error: &dyn std::fmt::Display| VocabularyError::Unusable(detail(error));
        let tokenizer = Tokenizer::from_bytes(json).map_err(|error| unusable(&error))?;
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|error| unusable(&error))?;
        let spelling = spelling(&decoder)
            .ok_or_else(|| unusable(&"its decoder is neither byte-level nor one with byte fallback"))?;
        let added = tokenizer.get_added_tokens_decoder();
        let model = tokenizer.get_vocab_size(true);
        let len = added.keys().max().map_or(model, |last| model.max(*last as usize + 1));
        if len > TOKENS_MAX {
            return Err(unusable(&format!("{len} tokens; at most {TOKENS_MAX} are taken")));
        }
        let text = |id: u32| {
            let token = tokenizer.id_to_token(id)?;
            Some(match added.get(&id) {
                Some(added) => added_bytes(added),
                None => match spelling {
                    Spelling::ByteLevel => byte_level(&token)?,
                    Spelling::ByteFallback => byte_fallback(&token),
                },
            })
        };
        let words: Vec<Vec<u8>> = (0..len as u32).map(|id| text(id).unwrap_or_default()).collect();
        Self::from_words(words, eos_ids)
    }

    /// A vocabulary of these texts; an empty one is a token that no text has.
    ///
    /// # Errors
    /// There is no token, or none that ends a text.
    pub fn from_words(mut words: Vec<Vec<u8>>, eos_ids: &[u32]) -> Result<Self, VocabularyError> {
        let eos_ids: Vec<u32> = eos_ids
            .iter()
            .copied()
            .filter(|id| (*id as usize) < words.len())
            .collect();
        let Some(&first_eos) = eos_ids.first() else {
            return Err(VocabularyError::Unusable("no token of it ends a text".to_owned()));
        };
        for (id, word) in words.iter_mut().enumerate() {
            let ends = eos_ids.contains(&(id as u32));
            // No text in UTF-8 has that byte, so it marks what is no text.
            if !ends && word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) && !word.starts_with(&marked("<")) {
                word.clear();
            } else if ends && !word.starts_with(&[TokTrie::SPECIAL_TOKEN_MARKER]) {
                *word = marked(&format!("<eos{id}>"));
            }
        }
        let build = || {
            let info = TokRxInfo::new(words.len() as u32, first_eos);
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos_ids);
            // Not canonical: what a grammar forces is not split into tokens here, see the crate's page.
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            Self { env }
        };
        // Absurd vocabularies meet assertions.
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(build))
            .map_err(|_| VocabularyError::Unusable("its tokens do not fit a trie".to_owned()))
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.env.tok_trie().vocab_size()
    }

    /// Whether there is no token. Never true.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that end a text.
    pub fn eos_ids(&self) -> &[u32] {
        self.env.tok_trie().eos_tokens()
    }

    /// The text of tokens, without control tokens.
    pub fn text(&self, tokens: &[u32]) -> Vec<u8> {
        let trie = self.env.tok_trie();
        let known = tokens.iter().filter(|id| (**id as usize) < trie.vocab_size());
        let words = known.map(|id| trie.token(*id));
        words
            .filter(|word| word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER))
            .flatten()
            .copied()
            .collect()
    }

    pub(crate) fn env(&self) -> &TokEnv {
        &self.env
    }
}

/// Ids of the tokens that end a turn, as the model's `generation_config.json` and `config.json` say.
pub fn eos_ids(dir: &Path) -> Vec<u32> {
    let mut ids = Vec::new();
    for file in ["generation_config.json", "config.json"] {
        let path = dir.join(file);
        let small = std::fs::metadata(&path).is_ok_and(|file| file.len() <= FILE_BYTES_MAX);
        let json = small.then(|| std::fs::read(&path).ok()).flatten();
        let json: Option<Json> = json.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match json.as_ref().and_then(|json| json.get("eos_token_id")) {
            Some(Json::Array(several)) => ids.extend(several.iter().filter_map(Json::as_u64)),
            Some(one) => ids.extend(one.as_u64()),
            None => {}
        }
    }
    let mut ids: Vec<u32> = ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn spelling(decoder: &Json) -> Option<Spelling> {
    match decoder.get("type")?.as_str()? {
        "ByteLevel" => Some(Spelling::ByteLevel),
        "ByteFallback" => Some(Spelling::ByteFallback),
        "Sequence" => decoder.get("decoders")?.as_array()?.iter().find_map(spelling),
        _ => None,
    }
}

fn marked(name: &str) -> Vec<u8> {
    let mut bytes = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    bytes.extend_from_slice(name.as_bytes());
    bytes
}

fn added_bytes(added: &AddedToken) -> Vec<u8> {
    // Makers forget to say so of some control tokens, such as <think> or <|eom|>.
    let control = added.special || (added.content.starts_with('<') && added.content.ends_with('>'));
    match control {
        true => marked(&added.content),
        false => added.content.as_bytes().to_vec(),
    }
}

/// GPT-2's scheme: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on.
fn byte_level(token: &str) -> Option<Vec<u8>> {
    let own = |c: u32| matches!(c, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let byte = |c: char| match c as u32 {
        c if own(c) => u8::try_from(c).ok(),
        c @ 0x100..=0x143 => (0..=255u8).filter(|b| !own(u32::from(*b))).nth(c as usize - 0x100),
        _ => None,
    };
    token.chars().map(byte).collect()
}

fn byte_fallback(token: &str) -> Vec<u8> {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_give_the_bytes() {
        assert_eq!(byte_level("ĠhiĊ").as_deref(), Some(&b" hi\n"[..]));
        assert_eq!(byte_level("Ã©").as_deref(), Some("é".as_bytes()));
        assert_eq!(byte_level("語"), None);
        assert_eq!(byte_fallback("<0x0A>"), b"\n");
        assert_eq!(byte_fallback("▁a"), b" a");
        assert_eq!(byte_fallback("<0xZZ>"), b"<0xZZ>");
        let sequence = r#"{"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}"#;
        let decoder = serde_json::from_str(sequence).expect("json");
        assert!(matches!(spelling(&decoder), Some(Spelling::ByteFallback)));
        assert!(spelling(&Json::Null).is_none());
    }

    #[test]
    fn what_has_no_end_or_no_decoder_is_refused() {
        assert!(Vocabulary::from_words(vec![b"a".to_vec()], &[7]).is_err());
        assert!(Vocabulary::from_words(Vec::new(), &[]).is_err());
        assert!(Vocabulary::from_tokenizer(b"{}", &[0]).is_err());
    }
}
