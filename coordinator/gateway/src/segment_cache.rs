//! Token ids of text segments that were tokenised before: the system prompt that every request of an application begins
//! with, and the earlier turns of a conversation.
//!
//! A segment is the text between two control tokens, which a tokenizer reads by itself; so its ids depend on its text
//! and on whether it opens the prompt (some tokenizers put a space there), and on nothing else. Keys are salted by tenant: how
//! quickly a prompt is answered tells nobody what another tenant has sent. Keys are BLAKE3 hashes, so nobody can
//! make two texts meet.
//!
//! Not here: where a text is cut (`prompt`), and KV blocks.

use std::ops::Range;
use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokenizers::Tokenizer;
use tokenizers::tokenizer::pre_tokenizer::PreTokenizedString;
use tokenizers::tokenizer::{Model, NormalizedString, Normalizer, OffsetReferential, PreTokenizer, normalizer};

/// Shorter segments are tokenised in less time than it takes to look them up and to keep them.
const SEGMENT_BYTES_MIN: usize = 64;
/// Longer ones would push out too much of the rest.
const SEGMENT_TOKENS_MAX: usize = 256 << 10;
/// Memory for ids: 8 million tokens, some hundred agents' system prompts and a few thousand conversations.
const CACHE_BYTES_MAX: u64 = 32 << 20;
/// What an entry costs beside its ids.
const ENTRY_BYTES: u64 = 96;
/// Entries expected, for the size of the table; not a limit.
const ENTRIES: usize = 4096;

type Key = [u8; 32];

#[derive(Clone)]
struct Weight;

impl Weighter<Key, Arc<[u32]>> for Weight {
    fn weight(&self, _: &Key, ids: &Arc<[u32]>) -> u64 {
        ENTRY_BYTES + 4 * ids.len() as u64
    }
}

/// See the module.
pub(crate) struct SegmentCache {
    cache: Cache<Key, Arc<[u32]>, Weight>,
}

impl SegmentCache {
    pub fn new() -> Self {
        Self {
            cache: Cache::with_weighter(ENTRIES, CACHE_BYTES_MAX, Weight),
        }
    }

    /// Appends the ids of `text[range]`, in which nothing is read as an added token.
    pub fn extend(
        &self,
        ids: &mut Vec<u32>,
        tokenizer: &Tokenizer,
        salt: &[u8],
        text: &str,
        range: Range<usize>,
    ) -> tokenizers::Result<()> {
        let (first, segment) = (range.start == 0, &text[range]);
        if segment.is_empty() {
            return Ok(());
        }
        if segment.len() < SEGMENT_BYTES_MIN {
            ids.extend(tokenise(tokenizer, segment, first)?);
            return Ok(());
        }
        let key = key(salt, first, segment);
        if let Some(known) = self.cache.get(&key) {
            ids.extend_from_slice(&known);
            return Ok(());
        }
        let new: Arc<[u32]> = tokenise(tokenizer, segment, first)?.into();
        ids.extend_from_slice(&new);
        if new.len() <= SEGMENT_TOKENS_MAX {
            self.cache.insert(key, new);
        }
        Ok(())
    }
}

fn key(salt: &[u8], first: bool, segment: &str) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(salt.len() as u64).to_le_bytes());
    hasher.update(salt);
    hasher.update(&[u8::from(first)]);
    hasher.update(segment.as_bytes());
    *hasher.finalize().as_bytes()
}

/// The tokenizer's own pipeline (normalise, pre-tokenise, model), without a search for added tokens.
fn tokenise(tokenizer: &Tokenizer, segment: &str, first: bool) -> tokenizers::Result<Vec<u32>> {
    // Pre-tokenizers tell the first segment by its offset. One that is not gets a character before it, as a piece of its
    // own that has its tokens already: none.
    const BEFORE: &str = "x";
    let start = if first { 0 } else { BEFORE.len() };
    let mut pieces = PreTokenizedString::from(if first {
        segment.to_owned()
    } else {
        [BEFORE, segment].concat()
    });
    if !first {
        pieces.split(|_, whole| {
            let slice = |range: Range<usize>| -> tokenizers::Result<NormalizedString> {
                let slice = whole.slice(normalizer::Range::Original(range));
                slice.ok_or_else(|| "a cut is not at a character boundary".into())
            };
            let end = whole.get().len();
            Ok([(slice(0..start)?, Some(Vec::new())), (slice(start..end)?, None)])
        })?;
    }
    if let Some(normalizer) = tokenizer.get_normalizer() {
        pieces.normalize(|piece| normalizer.normalize(piece))?;
    }
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut pieces)?;
    }
    let model = tokenizer.get_model();
    pieces.tokenize(|piece| model.tokenize(piece.get()))?;
    let splits = pieces.get_splits(OffsetReferential::Original, tokenizers::OffsetType::Byte);
    Ok(splits
        .into_iter()
        .flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::byte_level_tokenizer;

    #[test]
    fn tenants_and_places_do_not_share() {
        let text = "the same words again ".repeat(10);
        let keys = [key(b"a", true, &text), key(b"b", true, &text), key(b"a", false, &text)];
        assert!(keys[0] != keys[1] && keys[0] != keys[2]);
        // The length keeps salt and text apart.
        assert_ne!(key(b"ab", true, "c"), key(b"a", true, "bc"));
    }

    #[test]
    fn the_cache_is_bounded_and_right_when_full() {
        let (cache, tokenizer) = (SegmentCache::new(), byte_level_tokenizer());
        let text = "abcdefgh".repeat(40 << 10);
        let expected = tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
        for salt in 0u32..40 {
            let mut ids = Vec::new();
            cache
                .extend(&mut ids, &tokenizer, &salt.to_le_bytes(), &text, 0..text.len())
                .unwrap();
            assert!(ids == expected);
            assert!(cache.cache.weight() <= CACHE_BYTES_MAX);
        }
    }
}
