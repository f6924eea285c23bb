//! A whole message as JSON, and what it has in common with a streamed one.

use serde_json::{Value as Json, json};

use crate::generation::output::{Collected, End, EndReason, StopHit};
use crate::generation::start::Heading;
use crate::metrics::Counts;

/// Anthropic counts what came from a cache apart from the rest of the prompt.
pub(super) fn usage(counts: Counts) -> Json {
    json!({"input_tokens": counts.prompt.saturating_sub(counts.cached), "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached, "output_tokens": counts.completion})
}

/// Why it ended, and at which of the client's stop sequences.
pub(super) fn stop(end: &End) -> (&'static str, Option<&str>) {
    match (end.reason, &end.stop) {
        (EndReason::Length, _) => ("max_tokens", None),
        (EndReason::ToolCalls, _) => ("tool_use", None),
        (EndReason::Stop, Some(StopHit::Text(text))) => ("stop_sequence", Some(text)),
        (EndReason::Stop, _) => ("end_turn", None),
    }
}

/// A whole answer.
pub(super) fn message(heading: &Heading, collected: &Collected) -> Vec<u8> {
    let mut content = Vec::new();
    if let Some(answer) = collected.choices.first() {
        if !answer.reasoning.is_empty() {
            content.push(json!({"type": "thinking", "thinking": answer.reasoning, "signature": ""}));
        }
        if !answer.text.is_empty() {
            content.push(json!({"type": "text", "text": answer.text, "citations": null}));
        }
        for call in &answer.tool_calls {
            // An object, unless the model was cut off within it.
            let input: Json = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
            content.push(json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input}));
        }
    }
    let (reason, sequence) = collected.outcome.ends.first().map_or(("end_turn", None), stop);
    let message = json!({"id": heading.id, "type": "message", "role": "assistant", "model": heading.model,
        "content": content, "stop_reason": reason, "stop_sequence": sequence, "usage": usage(collected.outcome.counts)});
    message.to_string().into_bytes()
}
