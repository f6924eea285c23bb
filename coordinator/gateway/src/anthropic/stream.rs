//! A message as Anthropic streams it: events with names, and blocks that begin and end one after the other.
//!
//! State: at most one block is open. A delta of its kind goes into it; any other closes it and opens the next.

use serde_json::{Value as Json, json};

use super::response::{stop, usage};
use crate::api_error::ApiError;
use crate::dialect;
use crate::generation::output::{Delta, Outcome, Piece};
use crate::generation::start::Heading;
use crate::generation::stream::{Frames, Render};
use crate::metrics::Counts;

/// What an open block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    /// A call, by its number in the answer.
    Tool(u32),
}

/// Writes the events of one stream.
pub(super) struct EventWriter {
    heading: Heading,
    /// As far as they are known before the first token.
    counts: Counts,
    open: Option<Kind>,
    /// Number of the open block, or else of the next.
    index: u32,
}

impl EventWriter {
    pub fn new(heading: Heading, counts: Counts) -> Self {
        Self {
            heading,
            counts,
            open: None,
            index: 0,
        }
    }

    fn close(&mut self, frames: &mut Frames) {
        if self.open.take().is_some() {
            send(frames, "content_block_stop", json!({"index": self.index}));
            self.index += 1;
        }
    }

    fn open(&mut self, kind: Kind, block: Json, frames: &mut Frames) {
        self.close(frames);
        self.open = Some(kind);
        send(
            frames,
            "content_block_start",
            json!({"index": self.index, "content_block": block}),
        );
    }

    fn delta(&mut self, delta: Delta, frames: &mut Frames) {
        let delta = match delta {
            Delta::Text(text) => {
                if self.open != Some(Kind::Text) {
                    self.open(Kind::Text, json!({"type": "text", "text": ""}), frames);
                }
                json!({"type": "text_delta", "text": text})
            }
            Delta::Reasoning(text) => {
                if self.open != Some(Kind::Thinking) {
                    let block = json!({"type": "thinking", "thinking": "", "signature": ""});
                    self.open(Kind::Thinking, block, frames);
                }
                json!({"type": "thinking_delta", "thinking": text})
            }
            Delta::ToolCall { index, id, name } => {
                let block = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                return self.open(Kind::Tool(index), block, frames);
            }
            // A call's arguments come before the next call begins.
            Delta::ToolArguments { index, .. } if self.open != Some(Kind::Tool(index)) => return,
            Delta::ToolArguments { json, .. } => json!({"type": "input_json_delta", "partial_json": json}),
        };
        send(
            frames,
            "content_block_delta",
            json!({"index": self.index, "delta": delta}),
        );
    }
}

/// An event's data names its type again.
fn send(frames: &mut Frames, name: &str, mut data: Json) {
    data["type"] = name.into();
    frames.event(name, data.to_string().as_bytes());
}

impl Render for EventWriter {
    fn begin(&mut self, frames: &mut Frames) {
        let message = json!({"id": self.heading.id, "type": "message", "role": "assistant", "model": self.heading.model,
            "content": [], "stop_reason": null, "stop_sequence": null, "usage": usage(self.counts)});
        send(frames, "message_start", json!({"message": message}));
        send(frames, "ping", json!({}));
    }

    fn piece(&mut self, piece: Piece, _: &dyn Fn() -> Counts, frames: &mut Frames) {
        for delta in piece.deltas {
            self.delta(delta, frames);
        }
    }

    fn end(&mut self, outcome: &Outcome, frames: &mut Frames) {
        self.close(frames);
        let (reason, sequence) = outcome.ends.first().map_or(("end_turn", None), stop);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        send(
            frames,
            "message_delta",
            json!({"delta": delta, "usage": usage(outcome.counts)}),
        );
        send(frames, "message_stop", json!({}));
    }

    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        let body = dialect::anthropic(error, &self.heading.id);
        frames.event("error", body.to_string().as_bytes());
    }
}
