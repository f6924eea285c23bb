//! One sequence's tokens as its client sees them: counted, turned into text, cut at stop strings. No I/O.
//!
//! `completion_tokens` counts every token sampled up to the end, the token that ended the turn or completed a stop string
//! included (as vLLM counts); tokens that arrive after a stop string are neither shown nor counted.

use crate::detokenizer::Detokenizer;
use crate::stop::{Shown, StopMatcher};

/// Reads one sequence.
pub(crate) struct TokenReader {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    tokens: u32,
    over: bool,
}

impl TokenReader {
    pub fn new(detokenizer: Detokenizer, stops: Vec<String>) -> Self {
        Self {
            detokenizer,
            stops: StopMatcher::new(stops),
            tokens: 0,
            over: false,
        }
    }

    /// Takes the next tokens and gives the text they add. With `ends_turn`, the last of them is the token that ends the
    /// turn: it counts and has no text.
    pub fn push(&mut self, tokens: &[u32], ends_turn: bool) -> String {
        let mut text = String::new();
        for (at, &token) in tokens.iter().enumerate() {
            if self.over {
                break;
            }
            self.tokens = self.tokens.saturating_add(1);
            if ends_turn && at + 1 == tokens.len() {
                break;
            }
            let piece = self.detokenizer.push(token);
            self.take(&piece, &mut text);
        }
        text
    }

    /// No more tokens come: the text still held back.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        if !self.over {
            let piece = self.detokenizer.finish();
            self.take(&piece, &mut text);
        }
        if !self.over {
            text.push_str(&self.stops.finish());
        }
        text
    }

    /// A stop string is complete: nothing more will be shown.
    pub fn stopped(&self) -> bool {
        self.over
    }

    /// Tokens counted so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    fn take(&mut self, piece: &str, text: &mut String) {
        match self.stops.push(piece) {
            Shown::Text(shown) => text.push_str(&shown),
            Shown::Stopped(shown) => {
                text.push_str(&shown);
                self.over = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detokenizer::TokenTexts;
    use crate::test_support::byte_level_tokenizer;
    use std::sync::Arc;

    fn reader(stops: &[&str]) -> TokenReader {
        let detokenizer = Detokenizer::new(Arc::new(TokenTexts::new(byte_level_tokenizer())));
        TokenReader::new(detokenizer, stops.iter().map(|&stop| stop.to_owned()).collect())
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn the_ending_token_counts_and_has_no_text() {
        let mut reader = reader(&[]);
        assert_eq!(reader.push(&ids("hi!"), true), "hi");
        assert_eq!((reader.finish().as_str(), reader.tokens()), ("", 3));
    }

    #[test]
    fn a_stop_string_ends_the_count_at_the_token_that_completes_it() {
        let mut reader = reader(&["END"]);
        assert_eq!(reader.push(&ids("one E"), false), "one ");
        assert_eq!(reader.push(&ids("ND two"), false), "");
        assert!(reader.stopped());
        assert_eq!((reader.finish().as_str(), reader.tokens()), ("", 7));
    }

    #[test]
    fn held_text_is_shown_at_the_end() {
        let mut reader = reader(&["END"]);
        assert_eq!(reader.push(&ids("EN"), false), "");
        assert_eq!(reader.finish(), "EN");
        assert_eq!(reader.tokens(), 2);
    }
}
