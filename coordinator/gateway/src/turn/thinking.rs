//! Thoughts told from the answer, by a published parser. Marks reach it whole, each as a piece of its own, which is what it
//! is sure to understand.

use std::sync::LazyLock;

use reasoning_parser::{ParserFactory, ReasoningParser};

use crate::family::ThoughtFormat;

static PARSERS: LazyLock<ParserFactory> = LazyLock::new(ParserFactory::new);

/// See the module.
pub(crate) struct Thinking {
    parser: Box<dyn ReasoningParser>,
    marks: [&'static str; 2],
    /// Text that may begin a mark.
    held: String,
    /// The parser gave up: all is answer.
    broken: bool,
}

impl Thinking {
    /// `opened`: the prompt ends inside a thought. `None` if the parser does not exist.
    pub fn new(format: &ThoughtFormat, opened: bool) -> Option<Self> {
        let mut parser = PARSERS.registry().create_parser(&format.parser)?;
        if opened {
            parser.mark_reasoning_started();
            parser.mark_think_start_stripped();
        }
        Some(Self {
            parser,
            marks: [format.open, format.close],
            held: String::new(),
            broken: false,
        })
    }

    /// The model is thinking.
    pub fn is_open(&self) -> bool {
        !self.broken && self.parser.is_in_reasoning()
    }

    /// Takes text; gives thought and answer.
    pub fn push(&mut self, text: &str) -> (String, String) {
        let mut out = (String::new(), String::new());
        self.held.push_str(text);
        while let Some((at, mark)) = self.first_mark() {
            let before: String = self.held.drain(..at).collect();
            self.read(&before, &mut out);
            self.held.drain(..mark.len());
            self.read(mark, &mut out);
        }
        let keep = self.marks.iter().map(|mark| begun(&self.held, mark)).max().unwrap_or(0);
        let ready: String = self.held.drain(..self.held.len() - keep).collect();
        self.read(&ready, &mut out);
        out
    }

    /// The turn is over.
    pub fn finish(&mut self) -> (String, String) {
        let mut out = (String::new(), String::new());
        let rest = std::mem::take(&mut self.held);
        self.read(&rest, &mut out);
        if let Ok(last) = self.parser.flush() {
            out.0.push_str(&last.reasoning_text);
            out.1.push_str(&last.normal_text);
        }
        out
    }

    fn first_mark(&self) -> Option<(usize, &'static str)> {
        let found = self
            .marks
            .iter()
            .filter_map(|&mark| Some((self.held.find(mark)?, mark)));
        found.min_by_key(|(at, _)| *at)
    }

    fn read(&mut self, text: &str, out: &mut (String, String)) {
        if text.is_empty() {
            return;
        }
        if !self.broken {
            match self.parser.parse_reasoning_streaming_incremental(text) {
                Ok(parsed) => {
                    out.0.push_str(&parsed.reasoning_text);
                    out.1.push_str(&parsed.normal_text);
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "a reasoning parser failed");
                    self.broken = true;
                }
            }
        }
        out.1.push_str(text);
    }
}

/// Bytes of the longest end of `text` that begins `mark` without completing it.
fn begun(text: &str, mark: &str) -> usize {
    (1..mark.len().min(text.len() + 1))
        .rev()
        .find(|&len| mark.is_char_boundary(len) && text.as_bytes().ends_with(&mark.as_bytes()[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;
    use proptest::prelude::*;

    fn read(opened: bool, pieces: &[&str]) -> (String, String) {
        let format = Family::of("</think>").thoughts.unwrap();
        let mut thinking = Thinking::new(&format, opened).unwrap();
        let mut all = (String::new(), String::new());
        let parts: Vec<(String, String)> = pieces.iter().map(|piece| thinking.push(piece)).collect();
        for (thought, answer) in parts.into_iter().chain([thinking.finish()]) {
            all.0 += &thought;
            all.1 += &answer;
        }
        all
    }

    #[test]
    fn thoughts_are_told_from_the_answer() {
        let expected = ("so\n".to_owned(), "\nyes".to_owned());
        assert_eq!(read(false, &["<think>so\n</think>\nyes"]), expected);
        assert_eq!(read(true, &["so\n</think>\nyes"]), expected);
        assert_eq!(read(false, &["yes <b>"]), (String::new(), "yes <b>".into()));
        assert_eq!(read(true, &["cut sho"]), ("cut sho".into(), String::new()));
    }

    proptest! {
        #[test]
        fn it_reads_the_same_however_it_is_cut(cuts in prop::collection::vec(1usize..6, 0..30), opened: bool) {
            let text = if opened { "so é <b</think>\n<thin yes" } else { "<think>so é <b</think>\n<thin yes" };
            let mut pieces = Vec::new();
            let mut rest = text;
            for cut in cuts {
                let at = (cut..=rest.len()).find(|&at| rest.is_char_boundary(at)).unwrap_or(rest.len());
                let (piece, more) = rest.split_at(at);
                pieces.push(piece);
                rest = more;
            }
            pieces.push(rest);
            prop_assert_eq!(read(opened, &pieces), ("so é <b".to_owned(), "\n<thin yes".to_owned()));
        }
    }
}
