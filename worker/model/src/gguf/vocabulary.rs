//! The vocabulary of a GGUF file: tokens with their types and scores, and which of them begin and end a text.

use super::header::shown;
use super::metadata::Metadata;
use crate::error::ModelError;

/// Tokens that end a turn by their spelling, for files that name only one end token although the model has several
/// (an instruct model ends a turn with one and a document with another). Control tokens only.
const END_SPELLINGS: [&str; 8] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
];
/// As in a model's configuration.
const END_TOKENS_MAX: usize = 64;

/// ggml's `llama_token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    /// Added to the vocabulary, but ordinary text.
    UserDefined,
    /// Fills a row of the embedding; no text has it.
    Unused,
    /// One byte, spelled `<0x00>`.
    Byte,
}

/// All tokens; the index is the id.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    pub tokens: Vec<(&'a str, TokenType)>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the token list; `rows` is the number of rows of the embedding.
    pub fn read(metadata: &Metadata<'a>, rows: usize) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::gguf(metadata.path, reason);
        let tokens = metadata.need_array("tokenizer.ggml.tokens")?;
        let types = metadata.need_array("tokenizer.ggml.token_type")?;
        if tokens.len() > rows || types.len() != tokens.len() {
            return Err(bad(format!(
                "it lists {} tokens and {} token types for an embedding of {rows}",
                tokens.len(),
                types.len()
            )));
        }
        let read = tokens.iter().zip(types.iter()).enumerate().map(|(id, (token, kind))| {
            let token = token
                .text()
                .ok_or_else(|| bad(format!("its token {id} is not UTF-8")))?;
            let kind = match kind.unsigned() {
                // Undefined is what early converters wrote for normal.
                Some(0 | 1) => TokenType::Normal,
                Some(2) => TokenType::Unknown,
                Some(3) => TokenType::Control,
                Some(4) => TokenType::UserDefined,
                Some(5) => TokenType::Unused,
                Some(6) => TokenType::Byte,
                _ => return Err(bad(format!("its token {id} is of an unknown type"))),
            };
            Ok((token, kind))
        });
        let mut tokens = read.collect::<Result<Vec<_>, _>>()?;
        // Whatever their type says: text must not be able to spell them.
        for id in end_tokens(metadata)?.into_iter().chain(special(metadata, "bos")?) {
            match tokens.get_mut(id as usize) {
                Some((_, kind)) if *kind == TokenType::Unknown => {}
                Some((_, kind)) => *kind = TokenType::Control,
                None => return Err(bad(format!("it names {id} as a token and has only {}", tokens.len()))),
            }
        }
        Ok(Vocabulary { tokens })
    }

    /// The spelling of the special token `name` (`bos`, `eos`, …), if the file names one.
    pub fn special(&self, metadata: &Metadata<'_>, name: &str) -> Result<Option<&'a str>, ModelError> {
        let id = special(metadata, name)?;
        Ok(id.and_then(|id| Some(self.tokens.get(id as usize)?.0)))
    }
}

/// The id of the special token `name`.
fn special(metadata: &Metadata<'_>, name: &str) -> Result<Option<u32>, ModelError> {
    let key = match name {
        // The format's own short names.
        "unk" => "tokenizer.ggml.unknown_token_id".to_owned(),
        "pad" => "tokenizer.ggml.padding_token_id".to_owned(),
        name => format!("tokenizer.ggml.{name}_token_id"),
    };
    let id = metadata.unsigned(&key)?;
    let id =
        id.map(|id| u32::try_from(id).map_err(|_| ModelError::gguf(metadata.path, format!("its `{key}` is {id}"))));
    id.transpose()
}

/// Ids of all tokens that end a turn: those the file names, and control tokens spelled like one.
pub(super) fn end_tokens(metadata: &Metadata<'_>) -> Result<Vec<u32>, ModelError> {
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ids.extend(special(metadata, name)?);
    }
    let tokens = metadata.array("tokenizer.ggml.tokens")?;
    let types = metadata.array("tokenizer.ggml.token_type")?;
    if let (Some(tokens), Some(types)) = (tokens, types) {
        let ends = |(id, (token, kind)): (u32, (super::metadata::Value<'_>, super::metadata::Value<'_>))| {
            let control = kind.unsigned() == Some(3);
            let spelled = control && token.text().is_some_and(|text| END_SPELLINGS.contains(&text));
            spelled.then_some(id)
        };
        ids.extend((0..).zip(tokens.iter().zip(types.iter())).filter_map(ends));
    }
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > END_TOKENS_MAX {
        let reason = format!(
            "it has {} tokens that end a turn, such as {}",
            ids.len(),
            shown(END_SPELLINGS[0])
        );
        return Err(ModelError::gguf(metadata.path, reason));
    }
    Ok(ids)
}
