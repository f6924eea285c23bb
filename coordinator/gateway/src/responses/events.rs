//! The events of a response, in OpenAI's order, and the output they add up to. Sans-IO: what is streamed, what is answered
//! whole and what is stored comes out of this one machine, so that they cannot differ.
//!
//! ```text
//!  created ─▶ [queued] ─▶ in_progress ─▶ item* ─▶ completed | incomplete | failed
//!
//!  item:  output_item.added ─▶ content_part.added ─▶ output_text.delta* ─▶ output_text.done ─▶ content_part.done ─▶ output_item.done
//!         (a thought: reasoning_text.*; a call: function_call_arguments.*, without a part)
//! ```
//!
//! # Invariants
//!
//! - `sequence_number` counts from 0 without gaps. At most one item is open; `output_index` counts items from 0.
//! - The deltas of an item, joined, are its `done` text; the `done` items are the `output` of the last event.
//! - Blank text around calls (the line break a model writes between two) is no message, unless there is nothing else.
//! - Nothing follows the last event.
//!
//! Deliberately not here: when a response ends, where it is stored.

use serde_json::{Value as Json, json};

use super::ids;
use super::object::{Face, Status, logprobs};
use crate::api_error::ApiError;
use crate::generation::output::{Delta, EndReason, Outcome, Piece, TokenLogprob};
use crate::generation::stream::Frames;
use crate::metrics::Counts;

/// Obfuscated deltas are a multiple of so many bytes: a token of up to some forty bytes does not show in the length.
const OBFUSCATION_BYTES: usize = 64;

/// The item that is being written.
enum Open {
    Message {
        text: String,
        logprobs: Vec<Json>,
    },
    Reasoning {
        text: String,
    },
    Call {
        call_id: String,
        name: String,
        arguments: String,
    },
}

/// What the events are to be like.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Style {
    /// Nothing is written: only the output matters.
    pub quiet: bool,
    /// Deltas are padded.
    pub obfuscation: bool,
    /// It may have waited.
    pub background: bool,
}

/// See the module.
pub(crate) struct Events {
    face: Face,
    style: Style,
    sequence_number: u64,
    output: Vec<Json>,
    open: Option<Open>,
    /// Blank text, of which it is not known yet whether it belongs to a message.
    blank: String,
    /// Of text that is held back.
    pending: Vec<TokenLogprob>,
}

impl Events {
    pub fn new(face: Face, style: Style) -> Self {
        Self {
            face,
            style,
            sequence_number: 0,
            output: Vec::new(),
            open: None,
            blank: String::new(),
            pending: Vec::new(),
        }
    }

    /// Its place, and the time it began.
    pub fn face(&self) -> &Face {
        &self.face
    }

    /// Whether it will be stored; said before all else.
    pub fn set_stored(&mut self, stored: bool) {
        self.face.echo.insert("store".into(), stored.into());
    }

    /// The first events, before it has a place.
    pub fn begin(&mut self, frames: &mut Frames) {
        if self.style.background {
            self.whole("response.created", &Status::Queued, frames);
            self.whole("response.queued", &Status::Queued, frames);
        } else {
            self.whole("response.created", &Status::InProgress, frames);
        }
    }

    /// It has a place.
    pub fn started(&mut self, frames: &mut Frames) {
        self.whole("response.in_progress", &Status::InProgress, frames);
    }

    /// More of the answer.
    pub fn piece(&mut self, piece: Piece, frames: &mut Frames) {
        let has_text = piece.deltas.iter().any(|delta| matches!(delta, Delta::Text(_)));
        let belongs_elsewhere = !has_text && !piece.deltas.is_empty();
        if !belongs_elsewhere {
            self.pending.extend(piece.logprobs);
        }
        for delta in piece.deltas {
            match delta {
                Delta::Text(text) => self.text(text, frames),
                Delta::Reasoning(text) => self.reasoning(&text, frames),
                Delta::ToolCall { id, name, .. } => self.call(id, name, frames),
                Delta::ToolArguments { json, .. } => self.arguments(&json, frames),
            }
        }
    }

    /// What the response would be if it ended now.
    pub fn shown(&self, status: &Status, counts: Option<Counts>, ended_at: u64) -> Json {
        let mut output = self.output.clone();
        output.extend(self.unfinished(item_status(status)));
        self.face.shown(status, output, counts, ended_at)
    }

    /// The last events of a response that ended well; `response` is what it is in the end.
    pub fn end(&mut self, outcome: &Outcome, response: &Json, frames: &mut Frames) {
        let status = status_of(outcome);
        if self.open.is_none() && self.output.is_empty() && !self.blank.is_empty() {
            self.open_message(frames);
        }
        self.close(item_status(&status), frames);
        let name = match status {
            Status::Incomplete => "response.incomplete",
            _ => "response.completed",
        };
        self.emit(name, json!({"response": response}), frames);
    }

    /// The last events of one that did not.
    pub fn fail(&mut self, error: &ApiError, frames: &mut Frames) {
        let event = json!({"code": error.code, "message": error.message, "param": error.param});
        self.emit("error", event, frames);
        let response = self.shown(&Status::failed(error), None, 0);
        self.emit("response.failed", json!({"response": response}), frames);
    }

    fn text(&mut self, text: String, frames: &mut Frames) {
        if matches!(self.open, Some(Open::Message { .. })) {
            return self.text_delta(text, frames);
        }
        self.blank.push_str(&text);
        if !self.blank.trim().is_empty() {
            self.close("completed", frames);
            self.open_message(frames);
        }
    }

    /// Opens a message with the text that was held back.
    fn open_message(&mut self, frames: &mut Frames) {
        let text = std::mem::take(&mut self.blank);
        self.open = Some(Open::Message {
            text: String::new(),
            logprobs: Vec::new(),
        });
        self.added(frames);
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        self.part("response.content_part.added", part, frames);
        self.text_delta(text, frames);
    }

    fn text_delta(&mut self, delta: String, frames: &mut Frames) {
        let told = logprobs(&std::mem::take(&mut self.pending));
        if let Some(Open::Message { text, logprobs }) = &mut self.open {
            text.push_str(&delta);
            logprobs.extend(told.iter().cloned());
        }
        let event = json!({"content_index": 0, "delta": delta, "logprobs": told});
        self.of_item("response.output_text.delta", event, frames);
    }

    /// What was held back is followed by something that is no text.
    fn drop_blank(&mut self) {
        self.blank.clear();
        self.pending.clear();
    }

    fn reasoning(&mut self, delta: &str, frames: &mut Frames) {
        self.drop_blank();
        if !matches!(self.open, Some(Open::Reasoning { .. })) {
            self.close("completed", frames);
            self.open = Some(Open::Reasoning { text: String::new() });
            self.added(frames);
            let part = json!({"type": "reasoning_text", "text": ""});
            self.part("response.content_part.added", part, frames);
        }
        if let Some(Open::Reasoning { text }) = &mut self.open {
            text.push_str(delta);
        }
        let event = json!({"content_index": 0, "delta": delta});
        self.of_item("response.reasoning_text.delta", event, frames);
    }

    fn call(&mut self, call_id: String, name: String, frames: &mut Frames) {
        self.drop_blank();
        self.close("completed", frames);
        self.open = Some(Open::Call {
            call_id,
            name,
            arguments: String::new(),
        });
        self.added(frames);
    }

    fn arguments(&mut self, delta: &str, frames: &mut Frames) {
        // Arguments follow the call they are of; there is no other way in which the parsers tell them.
        if let Some(Open::Call { arguments, .. }) = &mut self.open {
            arguments.push_str(delta);
            let event = json!({"delta": delta});
            self.of_item("response.function_call_arguments.delta", event, frames);
        }
    }

    /// The open item is done.
    fn close(&mut self, status: &str, frames: &mut Frames) {
        let Some(item) = self.unfinished(status).filter(|_| self.open.is_some()) else {
            return;
        };
        let part = &item["content"][0];
        match &self.open {
            Some(Open::Message { .. }) => {
                let done = json!({"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]});
                self.of_item("response.output_text.done", done, frames);
                self.part("response.content_part.done", part.clone(), frames);
            }
            Some(Open::Reasoning { .. }) => {
                let done = json!({"content_index": 0, "text": part["text"]});
                self.of_item("response.reasoning_text.done", done, frames);
                self.part("response.content_part.done", part.clone(), frames);
            }
            Some(Open::Call { .. }) => {
                let done = json!({"name": item["name"], "arguments": item["arguments"]});
                self.of_item("response.function_call_arguments.done", done, frames);
            }
            None => {}
        }
        let event = json!({"output_index": self.output.len(), "item": item});
        self.emit("response.output_item.done", event, frames);
        self.open = None;
        self.output.push(item);
    }

    /// The open item as it is now, with that status; or the blank message that it would be.
    fn unfinished(&self, status: &str) -> Option<Json> {
        let id = self.item_id();
        let message = |text: &str, logprobs: &[Json]| {
            let part = json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs});
            json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": [part]})
        };
        match &self.open {
            Some(Open::Message { text, logprobs }) => Some(message(text, logprobs)),
            Some(Open::Reasoning { text }) => {
                let part = json!({"type": "reasoning_text", "text": text});
                Some(json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": [part]}))
            }
            Some(Open::Call {
                call_id,
                name,
                arguments,
            }) => Some(
                json!({"id": id, "type": "function_call", "status": status, "call_id": call_id,
                "name": name, "arguments": arguments}),
            ),
            None if self.output.is_empty() && !self.blank.is_empty() => {
                Some(message(&self.blank, &logprobs(&self.pending)))
            }
            None => None,
        }
    }

    fn item_id(&self) -> String {
        let kind = match &self.open {
            Some(Open::Reasoning { .. }) => "rs",
            Some(Open::Call { .. }) => "fc",
            _ => "msg",
        };
        ids::item(kind, &self.face.id, 'o', self.output.len())
    }

    /// The open item was just opened.
    fn added(&mut self, frames: &mut Frames) {
        let mut item = self.unfinished("in_progress").unwrap_or_default();
        if item.get("content").is_some() {
            item["content"] = json!([]);
        }
        let event = json!({"output_index": self.output.len(), "item": item});
        self.emit("response.output_item.added", event, frames);
    }

    fn part(&mut self, name: &'static str, part: Json, frames: &mut Frames) {
        self.of_item(name, json!({"content_index": 0, "part": part}), frames);
    }

    /// An event about the open item.
    fn of_item(&mut self, name: &'static str, mut event: Json, frames: &mut Frames) {
        if self.style.quiet {
            return;
        }
        event["item_id"] = self.item_id().into();
        event["output_index"] = self.output.len().into();
        self.emit(name, event, frames);
    }

    fn whole(&mut self, name: &'static str, status: &Status, frames: &mut Frames) {
        if self.style.quiet {
            return;
        }
        let response = self.shown(status, None, 0);
        self.emit(name, json!({"response": response}), frames);
    }

    fn emit(&mut self, name: &'static str, mut event: Json, frames: &mut Frames) {
        if self.style.quiet {
            return;
        }
        event["type"] = name.into();
        event["sequence_number"] = self.sequence_number.into();
        self.sequence_number += 1;
        let mut text = event.to_string();
        if self.style.obfuscation && name.ends_with(".delta") {
            event["obfuscation"] = "".into();
            let padding = OBFUSCATION_BYTES - event.to_string().len() % OBFUSCATION_BYTES;
            event["obfuscation"] = "x".repeat(padding).into();
            text = event.to_string();
        }
        frames.event(name, text.as_bytes());
    }
}

/// How a response ends that ends well.
pub(crate) fn status_of(outcome: &Outcome) -> Status {
    let cut_short = outcome.ends.iter().any(|end| end.reason == EndReason::Length);
    if cut_short {
        Status::Incomplete
    } else {
        Status::Completed
    }
}

/// Of the last item.
fn item_status(status: &Status) -> &'static str {
    match status {
        Status::Completed => "completed",
        Status::Queued | Status::InProgress => "in_progress",
        Status::Incomplete | Status::Cancelled | Status::Failed { .. } => "incomplete",
    }
}

#[cfg(test)]
mod tests;
