//! From a GGUF vocabulary to a `tokenizer.json` of the Hugging Face `tokenizers` library, the one form in which baton
//! reads tokenizers. Tokenises nothing itself.
//!
//! Two kinds are in use among the supported models: byte-level BPE with merges (`gpt2`; how text is cut before merging
//! is not in the file, only its name), and SentencePiece BPE (`llama`), whose merges follow from the scores.

use super::header::shown;
use super::metadata::Metadata;
use super::vocabulary::{TokenType, Vocabulary};
use crate::error::ModelError;
use serde_json::{Map, Value as Json, json};
use std::cmp::Ordering;
use std::collections::HashMap;

/// Longest SentencePiece piece taken apart; the longest in published vocabularies are below 100 bytes.
const PIECE_BYTES_MAX: usize = 256;
/// SentencePiece's mark for a space.
const SPACE: &str = "▁";

/// How each family cuts text into words before merging. The expressions are those of the models' own `tokenizer.json`.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The `tokenizer.json` of the vocabulary.
pub(super) fn tokenizer_json(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Json, ModelError> {
    let added: Vec<Json> = (0u32..)
        .zip(&vocabulary.tokens)
        .filter(|(_, (text, kind))| !text.is_empty() && is_added(*kind))
        .map(|(id, (text, kind))| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": *kind != TokenType::UserDefined,
            })
        })
        .collect();
    let mut vocab = Map::new();
    for (id, (text, kind)) in vocabulary.tokens.iter().enumerate() {
        if *kind != TokenType::Unused {
            // Of tokens with one spelling the first is the one that text gets.
            vocab.entry(*text).or_insert_with(|| json!(id));
        }
    }
    let kind = match metadata.need_text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(metadata)?,
        "llama" => sentencepiece(metadata, vocabulary, &vocab)?,
        other => {
            let reason = format!(
                "its tokenizer is of the kind `{}`; in GGUF files `gpt2` (byte-level BPE) and `llama` (SentencePiece) are \
                 supported",
                shown(other)
            );
            return Err(ModelError::unsupported(reason));
        }
    };
    let mut model = kind.model;
    model["vocab"] = Json::Object(vocab);
    model["merges"] = json!(kind.merges);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": kind.normalizer,
        "pre_tokenizer": kind.pre_tokenizer, "post_processor": null, "decoder": kind.decoder, "model": model,
    }))
}

/// Whether a token is looked for in text as a whole, before anything else.
fn is_added(kind: TokenType) -> bool {
    matches!(kind, TokenType::Control | TokenType::UserDefined | TokenType::Unknown)
}

/// What differs between the kinds of tokenizers.
struct Kind<'a> {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    /// The BPE model, without `vocab` and `merges`.
    model: Json,
    merges: Vec<(&'a str, &'a str)>,
}

fn byte_level<'a>(metadata: &Metadata<'a>) -> Result<Kind<'a>, ModelError> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let then_bytes =
        |first: Json, use_regex: bool| json!({"type": "Sequence", "pretokenizers": [first, bytes(use_regex)]});
    let words = |regex: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        then_bytes(split, false)
    };
    // (cutting, NFC first, a whole word that is a token needs no merges)
    let (pre_tokenizer, composed, whole_words) = match metadata.need_text("tokenizer.ggml.pre")? {
        "llama-bpe" | "llama3" | "llama-v3" => (words(LLAMA3_WORDS), false, true),
        "qwen2" | "deepseek-r1-qwen" | "megrez" => (words(QWEN2_WORDS), true, false),
        "tekken" => (words(TEKKEN_WORDS), false, true),
        "smollm" => (
            then_bytes(json!({"type": "Digits", "individual_digits": true}), true),
            false,
            false,
        ),
        "gpt-2" => (bytes(true), false, false),
        other => {
            let reason = format!(
                "its pre-tokenizer is `{}`; in GGUF files llama-bpe, qwen2, tekken, smollm and gpt-2 are supported; use the \
                 model's safetensors version",
                shown(other)
            );
            return Err(ModelError::unsupported(reason));
        }
    };
    Ok(Kind {
        normalizer: if composed { json!({"type": "NFC"}) } else { Json::Null },
        pre_tokenizer,
        decoder: bytes(true),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole_words,
        }),
        merges: listed_merges(metadata)?.ok_or_else(|| {
            ModelError::gguf(
                metadata.path,
                "its `tokenizer.ggml.merges` is missing; convert the model again",
            )
        })?,
    })
}

/// The merges of the file, best first.
fn listed_merges<'a>(metadata: &Metadata<'a>) -> Result<Option<Vec<(&'a str, &'a str)>>, ModelError> {
    let Some(list) = metadata.array("tokenizer.ggml.merges")? else {
        return Ok(None);
    };
    let merges = list.iter().enumerate().map(|(index, merge)| {
        let text = merge.text();
        // The first half is never empty; a space in it is spelled as another character.
        let halves = text
            .and_then(|text| text.split_once(' '))
            .filter(|(a, b)| !a.is_empty() && !b.is_empty());
        halves.ok_or_else(|| ModelError::gguf(metadata.path, format!("its merge {index} is not two tokens")))
    });
    merges.collect::<Result<Vec<_>, _>>().map(Some)
}

fn sentencepiece<'a>(
    metadata: &Metadata<'a>,
    vocabulary: &Vocabulary<'a>,
    vocab: &Map<String, Json>,
) -> Result<Kind<'a>, ModelError> {
    let merges = match listed_merges(metadata)? {
        Some(merges) => merges,
        None => scored_merges(metadata, vocabulary, vocab)?,
    };
    let prefixed = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![
        replace(SPACE, " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefixed {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary.tokens.iter().find(|(_, kind)| *kind == TokenType::Unknown);
    let bytes = vocabulary
        .tokens
        .iter()
        .filter(|(_, kind)| *kind == TokenType::Byte)
        .count();
    Ok(Kind {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown.map(|(text, _)| text), "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": bytes == 256, "ignore_merges": false,
        }),
        merges,
    })
}

/// SentencePiece joins the neighbours whose union has the best score, so every way to cut a piece into two pieces is a
/// merge with that piece's score. Among cuts of one score, as Hugging Face's converter orders them: the longer first
/// half first.
fn scored_merges<'a>(
    metadata: &Metadata<'a>,
    vocabulary: &Vocabulary<'a>,
    vocab: &Map<String, Json>,
) -> Result<Vec<(&'a str, &'a str)>, ModelError> {
    let bad = |reason: String| ModelError::gguf(metadata.path, reason);
    let scores = metadata.need_array("tokenizer.ggml.scores")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(bad(format!(
            "it has {} scores for {} tokens",
            scores.len(),
            vocabulary.tokens.len()
        )));
    }
    let pieces: HashMap<&str, ()> = vocabulary
        .tokens
        .iter()
        .filter(|(text, kind)| *kind == TokenType::Normal && vocab.contains_key(*text))
        .map(|(text, _)| (*text, ()))
        .collect();
    let mut merges: Vec<(f64, &str, &str)> = Vec::new();
    for ((piece, kind), score) in vocabulary.tokens.iter().zip(scores.iter()) {
        if *kind != TokenType::Normal {
            continue;
        }
        let score = score.number().filter(|score| !score.is_nan());
        let score = score.ok_or_else(|| bad(format!("the score of its token `{}` is not a number", shown(piece))))?;
        if piece.len() > PIECE_BYTES_MAX {
            return Err(bad(format!("its token `{}…` has {} bytes", shown(piece), piece.len())));
        }
        let cuts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let known = cuts.filter(|(a, b)| pieces.contains_key(a) && pieces.contains_key(b));
        merges.extend(known.map(|(a, b)| (score, a, b)));
    }
    let chars = |text: &str| text.chars().count();
    merges.sort_by(|a, b| {
        let by_score = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
        by_score.then_with(|| (chars(b.1), chars(b.2)).cmp(&(chars(a.1), chars(a.2))))
    });
    Ok(merges.into_iter().map(|(_, a, b)| (a, b)).collect())
}
