//! An assistant's turn, from raw text to what it means: thoughts, text, tool calls. Sans-IO; one per choice.

use crate::generation::output::Delta;

/// Reads one turn.
#[derive(Default)]
pub(crate) struct Turn {
    reasoning_open: bool,
}

impl Turn {
    /// Takes the text of one token. Empty text is taken for nothing.
    pub fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        add_text(text, out);
    }

    /// The turn is over.
    pub fn finish(&mut self, out: &mut Vec<Delta>) {
        let _ = out;
    }

    /// The model is thinking.
    pub fn is_reasoning(&self) -> bool {
        self.reasoning_open
    }

    /// A tool was called.
    pub fn called(&self) -> bool {
        false
    }
}

/// Adds text, to the delta before where that is text too.
fn add_text(text: &str, out: &mut Vec<Delta>) {
    if text.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(Delta::Text(last)) => last.push_str(text),
        _ => out.push(Delta::Text(text.to_owned())),
    }
}
