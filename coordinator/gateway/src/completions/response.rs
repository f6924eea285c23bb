//! The JSON of answers. A chunk has the same shape as the whole (`text_completion`), with a part of the text.

use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::request::CompletionOptions;
use crate::chat::response::Usage;
use crate::generation::output::{
    Choice as Answer, Collected, Delta, End, EndReason, Outcome, Piece, StopHit, TokenLogprob, TokenText,
};
use crate::generation::start::Heading;
use crate::generation::stream::{Frames, Render};
use crate::metrics::Counts;

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    /// Left out of chunks unless asked for; then null where there is nothing to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    /// vLLM's: the stop string or token.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Json>,
}

/// The older shape: parallel arrays.
#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Json>>,
    /// Characters of the choice's text before the token.
    text_offset: Vec<usize>,
}

impl Logprobs {
    /// `offset` is that of the first token; it is moved past the last.
    fn of(positions: &[TokenLogprob], offset: &mut usize) -> Self {
        let mut all = Self {
            tokens: Vec::with_capacity(positions.len()),
            token_logprobs: Vec::with_capacity(positions.len()),
            top_logprobs: Vec::with_capacity(positions.len()),
            text_offset: Vec::with_capacity(positions.len()),
        };
        for position in positions {
            let name = name(&position.token);
            let mut top = Map::new();
            for (token, logprob) in &position.top {
                // Two tokens may be spelled alike: the better one came first.
                top.entry(self::name(token)).or_insert_with(|| json!(finite(*logprob)));
            }
            // As OpenAI and vLLM do: the sampled one is always there.
            top.entry(name.clone())
                .or_insert_with(|| json!(finite(position.logprob)));
            all.tokens.push(name);
            all.token_logprobs.push(finite(position.logprob));
            all.top_logprobs.push(top);
            all.text_offset.push(*offset);
            *offset += position.token.text.chars().count();
        }
        all
    }
}

/// A token's text; one that is no text by itself as OpenAI spells it, by its bytes.
fn name(token: &TokenText) -> String {
    if std::str::from_utf8(&token.bytes).is_ok() {
        return token.text.clone();
    }
    let bytes: String = token.bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    format!("bytes:{bytes}")
}

/// OpenAI's spelling of "as good as impossible"; JSON has no infinity.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(-9999.0)
    } else {
        -9999.0
    }
}

/// What stands before each choice's answer.
#[derive(Default)]
pub(super) struct Echo {
    prompts: Vec<String>,
    n: u32,
}

impl Echo {
    /// One text per prompt; choices of one prompt share it.
    pub fn new(prompts: Vec<String>, n: u32) -> Self {
        Self { prompts, n }
    }

    fn of(&self, choice: u32) -> &str {
        let prompt = choice.checked_div(self.n).and_then(|at| self.prompts.get(at as usize));
        prompt.map_or("", String::as_str)
    }
}

fn finish_reason(end: &End) -> &'static str {
    match end.reason {
        EndReason::Length => "length",
        // Text has no tool calls.
        EndReason::Stop | EndReason::ToolCalls => "stop",
    }
}

fn stop_reason(end: &End) -> Option<Json> {
    end.stop.as_ref().map(|stop| match stop {
        StopHit::Text(text) => json!(text),
        StopHit::Token(id) => json!(id),
    })
}

/// A whole `text_completion`.
pub(super) fn completion(
    heading: &Heading,
    options: &CompletionOptions,
    echo: &Echo,
    collected: &Collected,
) -> Vec<u8> {
    let texts: Vec<String> = collected
        .choices
        .iter()
        .zip(0..)
        .map(|(answer, index)| [echo.of(index), &raw(answer)].concat())
        .collect();
    let parts = collected.choices.iter().zip(&collected.outcome.ends).zip(&texts);
    let choices: Vec<Choice<'_>> = parts
        .zip(0..)
        .map(|(((answer, end), text), index)| Choice {
            index,
            text,
            logprobs: options.logprobs.then(|| Logprobs::of(&answer.logprobs, &mut 0)),
            finish_reason: Some(finish_reason(end)),
            stop_reason: stop_reason(end),
        })
        .collect();
    to_json(&Completion {
        id: &heading.id,
        object: "text_completion",
        created: heading.created,
        model: &heading.model,
        choices: &choices,
        usage: Some(Some(collected.outcome.counts.into())),
    })
}

/// All that was written, thought or not: this endpoint does not tell them apart.
fn raw(answer: &Answer) -> String {
    [answer.reasoning.as_str(), &answer.text].concat()
}

/// Writes the chunks of one stream.
pub(super) struct Writer {
    heading: Heading,
    options: CompletionOptions,
    echo: Echo,
    /// Of each choice, characters of text that the next token's offset counts.
    offsets: Vec<usize>,
}

impl Writer {
    pub fn new(heading: Heading, options: &CompletionOptions, echo: Echo, choices: u32) -> Self {
        Self {
            heading,
            options: options.clone(),
            echo,
            offsets: vec![0; choices as usize],
        }
    }

    fn chunk(&self, choices: &[Choice<'_>], usage: Option<Counts>) -> Vec<u8> {
        to_json(&Completion {
            id: &self.heading.id,
            object: "text_completion",
            created: self.heading.created,
            model: &self.heading.model,
            choices,
            usage: self.options.include_usage.then_some(usage.map(Usage::from)),
        })
    }
}

impl Render for Writer {
    /// The prompts, where they are to be repeated.
    fn begin(&mut self, frames: &mut Frames) {
        for index in 0..self.offsets.len() as u32 {
            let text = self.echo.of(index);
            if !text.is_empty() {
                let choice = Choice {
                    index,
                    text,
                    logprobs: None,
                    finish_reason: None,
                    stop_reason: None,
                };
                frames.data(&self.chunk(&[choice], None));
            }
        }
    }

    fn piece(&mut self, piece: Piece, counts: &dyn Fn() -> Counts, frames: &mut Frames) {
        let text: String = piece
            .deltas
            .iter()
            .filter_map(|delta| match delta {
                Delta::Text(text) | Delta::Reasoning(text) => Some(text.as_str()),
                Delta::ToolCall { .. } | Delta::ToolArguments { .. } => None,
            })
            .collect();
        let logprobs = match self.offsets.get_mut(piece.choice as usize) {
            Some(offset) if self.options.logprobs => Some(Logprobs::of(&piece.logprobs, offset)),
            _ => None,
        };
        let choice = Choice {
            index: piece.choice,
            text: &text,
            logprobs,
            finish_reason: None,
            stop_reason: None,
        };
        let counts = self.options.continuous_usage.then(counts);
        frames.data(&self.chunk(&[choice], counts));
    }

    fn end(&mut self, outcome: &Outcome, frames: &mut Frames) {
        let counts = self.options.continuous_usage.then_some(outcome.counts);
        for (end, index) in outcome.ends.iter().zip(0..) {
            let choice = Choice {
                index,
                text: "",
                logprobs: None,
                finish_reason: Some(finish_reason(end)),
                stop_reason: stop_reason(end),
            };
            frames.data(&self.chunk(&[choice], counts));
        }
        if self.options.include_usage {
            frames.data(&self.chunk(&[], Some(outcome.counts)));
        }
        frames.data(b"[DONE]");
    }
}

/// Strings and numbers always serialise.
fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
