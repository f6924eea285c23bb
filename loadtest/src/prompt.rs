//! Synthetic prompts: seeded common English words, so that two runs with one seed send the same bytes and the number
//! of words is close to the number of tokens in most vocabularies. Nothing here is meant to make sense.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Short, common words: one token each, with their space, in most vocabularies.
pub(crate) const WORDS: [&str; 64] = [
    "the", "time", "year", "people", "way", "day", "man", "thing", "world", "life", "hand", "part", "child", "eye",
    "place", "work", "week", "case", "point", "company", "number", "group", "problem", "fact", "good", "new", "first",
    "last", "long", "great", "little", "own", "other", "old", "right", "big", "high", "small", "large", "next",
    "early", "young", "few", "public", "bad", "same", "able", "to", "of", "in", "for", "on", "with", "at", "by",
    "from", "up", "about", "into", "over", "after", "and", "but", "or",
];

/// Appends `count` words drawn from stream `stream` of `seed`.
pub fn append_words(text: &mut String, seed: u64, stream: u64, count: usize) {
    // The streams of one seed must not overlap, so both go through a mixer (splitmix64's finaliser).
    let mut rng = SmallRng::seed_from_u64(mix(seed ^ mix(stream)));
    text.reserve(count * 6);
    for _ in 0..count {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(WORDS[rng.random_range(0..WORDS.len())]);
    }
}

fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(seed: u64, stream: u64, count: usize) -> String {
        let mut text = String::new();
        append_words(&mut text, seed, stream, count);
        text
    }

    #[test]
    fn seeded_and_counted() {
        assert_eq!(words(1, 2, 50), words(1, 2, 50));
        assert_ne!(words(1, 2, 50), words(1, 3, 50));
        assert_ne!(words(1, 2, 50), words(2, 2, 50));
        assert_eq!(words(1, 2, 50).split(' ').count(), 50);
        assert!(
            words(1, 2, 50).starts_with(&words(1, 2, 20)),
            "a shorter prompt is a prefix of a longer one"
        );
    }
}
