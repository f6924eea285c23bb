//! One sequence's tokens as its client sees them: counted, turned into text, cut at stop strings. No I/O, and no
//! knowledge of what the text means (that is [`turn`](crate::turn)).
//!
//! `completion_tokens` counts every token sampled up to the end, the token that ended the turn or completed a stop string
//! included (as vLLM counts); tokens that arrive after a stop string are neither shown nor counted.

use crate::detokenizer::Detokenizer;
use crate::stop::{Shown, StopMatcher};

/// Reads one sequence.
pub(crate) struct TokenReader {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// No stop string counts that is complete before so many tokens.
    min_tokens: u32,
    tokens: u32,
    over: bool,
    stopped_by: Option<String>,
}

impl TokenReader {
    pub fn new(detokenizer: Detokenizer, stops: StopMatcher, min_tokens: u32) -> Self {
        Self {
            detokenizer,
            stops,
            min_tokens,
            tokens: 0,
            over: false,
            stopped_by: None,
        }
    }

    /// Takes the next token and gives the text it adds; may be empty.
    pub fn push(&mut self, token: u32) -> String {
        let mut text = String::new();
        if !self.over {
            self.tokens = self.tokens.saturating_add(1);
            let piece = self.detokenizer.push(token);
            self.take(piece, &mut text);
        }
        text
    }

    /// Takes the token that ends the turn: it counts and has no text.
    pub fn end(&mut self) {
        if !self.over {
            self.tokens = self.tokens.saturating_add(1);
        }
    }

    /// No more tokens come: the text still held back.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        if !self.over {
            let piece = self.detokenizer.finish();
            self.take(piece, &mut text);
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

    /// The stop string that is complete.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stopped_by.as_deref()
    }

    /// Tokens counted so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    pub fn detokenizer(&self) -> &Detokenizer {
        &self.detokenizer
    }

    fn take(&mut self, piece: String, text: &mut String) {
        if self.tokens < self.min_tokens {
            text.push_str(&piece);
            return;
        }
        match self.stops.push(&piece) {
            Shown::Text(shown) => text.push_str(&shown),
            Shown::Stopped(shown, stop) => {
                text.push_str(&shown);
                self.over = true;
                self.stopped_by = Some(stop);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detokenizer::{Special, TokenTexts};
    use crate::test_support::byte_level_tokenizer;
    use std::sync::Arc;

    fn reader(stops: &[&str], min_tokens: u32) -> TokenReader {
        let detokenizer = Detokenizer::new(Arc::new(TokenTexts::new(byte_level_tokenizer())), Special::Hidden);
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        TokenReader::new(detokenizer, StopMatcher::new(stops, false), min_tokens)
    }

    fn push(reader: &mut TokenReader, text: &str) -> String {
        text.bytes().map(|byte| reader.push(byte.into())).collect()
    }

    #[test]
    fn the_ending_token_counts_and_has_no_text() {
        let mut reader = reader(&[], 0);
        assert_eq!(push(&mut reader, "hi"), "hi");
        reader.end();
        assert_eq!((reader.finish().as_str(), reader.tokens()), ("", 3));
    }

    #[test]
    fn a_stop_string_ends_the_count_at_the_token_that_completes_it() {
        let mut reader = reader(&["END"], 0);
        assert_eq!(push(&mut reader, "one E"), "one ");
        assert_eq!(push(&mut reader, "ND two"), "");
        assert!(reader.stopped());
        assert_eq!(reader.stopped_by(), Some("END"));
        assert_eq!((reader.finish().as_str(), reader.tokens()), ("", 7));
    }

    #[test]
    fn held_text_is_shown_at_the_end() {
        let mut reader = reader(&["END"], 0);
        assert_eq!(push(&mut reader, "EN"), "");
        assert_eq!(reader.finish(), "EN");
        assert_eq!(reader.tokens(), 2);
    }

    #[test]
    fn a_stop_string_does_not_count_too_early() {
        let mut reader = reader(&["a"], 3);
        assert_eq!(push(&mut reader, "aabca"), "aabc");
        assert_eq!((reader.stopped(), reader.tokens()), (true, 5));
    }
}
