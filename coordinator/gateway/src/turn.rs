//! An assistant's turn, from raw text to what it means: thoughts, text, tool calls. Sans-IO; one per choice.
//!
//! ```text
//!  text of one token ─▶ Thinking ─┬─▶ Reasoning
//!                                 └─▶ Calls ─┬─▶ Text
//!                                            └─▶ ToolCall, ToolArguments
//! ```
//!
//! The parsing itself is that of published crates. What they leave open is settled here: text comes token by token, so
//! that a turn reads the same however the cluster cut it into steps; a mark is never handed over in halves; what a parser
//! fails on is shown as text; and the work is bounded (see [`calls`]).
//!
//! Knows nothing of tokens, stop strings or endpoints.

pub(crate) mod calls;
mod thinking;

pub(crate) use self::calls::Calls;
pub(crate) use self::thinking::Thinking;

use crate::generation::output::Delta;

/// Reads one turn.
#[derive(Default)]
pub(crate) struct Turn {
    thinking: Option<Thinking>,
    calls: Option<Calls>,
}

impl Turn {
    /// `None` for what is not to be looked for.
    pub fn new(thinking: Option<Thinking>, calls: Option<Calls>) -> Self {
        Self { thinking, calls }
    }

    /// Takes the text of one token. Empty text is nothing.
    pub fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        if text.is_empty() {
            return;
        }
        match &mut self.thinking {
            None => self.answer(text, out),
            Some(thinking) => {
                let (thought, rest) = thinking.push(text);
                add_reasoning(&thought, out);
                self.answer(&rest, out);
            }
        }
    }

    /// The turn is over: what was held back. `cut_short`: the model had more to say.
    pub fn finish(&mut self, cut_short: bool, out: &mut Vec<Delta>) {
        if let Some(thinking) = &mut self.thinking {
            let (thought, rest) = thinking.finish();
            add_reasoning(&thought, out);
            self.answer(&rest, out);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(cut_short, out);
        }
    }

    /// The model is thinking.
    pub fn is_reasoning(&self) -> bool {
        self.thinking.as_ref().is_some_and(Thinking::is_open)
    }

    /// A tool was called.
    pub fn called(&self) -> bool {
        self.calls.as_ref().is_some_and(Calls::called)
    }

    fn answer(&mut self, text: &str, out: &mut Vec<Delta>) {
        match &mut self.calls {
            Some(calls) if !text.is_empty() => calls.push(text, out),
            _ => add_text(text, out),
        }
    }
}

/// Adds text, to the delta before where that is text too.
fn add_text(text: &str, out: &mut Vec<Delta>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(Delta::Text(last)) => last.push_str(text),
        _ => out.push(Delta::Text(text.to_owned())),
    }
}

fn add_reasoning(text: &str, out: &mut Vec<Delta>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(Delta::Reasoning(last)) => last.push_str(text),
        _ => out.push(Delta::Reasoning(text.to_owned())),
    }
}
