//! The JSON of answers: completion and chunk. Own structs rather than `async-openai`'s or `openai-protocol`'s
//! types: those model all that a client may meet (hundreds of optional fields, large dependency trees), while here the
//! exact set and order of keys is the contract, borrowed strings keep the per-token path free of copies, and a test
//! checks the shapes against OpenAI's description.

use serde::Serialize;
use uuid::Uuid;

use super::request::ChatOptions;
use crate::generation::output::{
    Choice as Answer, Collected, Delta as Part, End, Outcome, Piece, StopHit, TokenLogprob, TokenText, ToolCall as Call,
};
use crate::generation::start::Heading;
use crate::generation::stream::{Frames, Render};
use crate::metrics::Counts;

/// Obfuscated chunks are a multiple of so many bytes: a token of up to some forty bytes does not show in the length.
const OBFUSCATION_BYTES: usize = 64;

/// Tokens of a request, exact.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
    completion_tokens_details: CompletionTokensDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

/// Predictions are a hint that is not taken: nothing of them is accepted, and nothing of them is billed.
#[derive(Clone, Copy, Debug, Serialize)]
struct CompletionTokensDetails {
    reasoning_tokens: u32,
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

impl From<Counts> for Usage {
    fn from(counts: Counts) -> Self {
        Self {
            prompt_tokens: counts.prompt,
            completion_tokens: counts.completion,
            total_tokens: counts.prompt.saturating_add(counts.completion),
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: counts.cached,
            },
            completion_tokens_details: CompletionTokensDetails {
                reasoning_tokens: counts.reasoning,
                accepted_prediction_tokens: 0,
                rejected_prediction_tokens: 0,
            },
        }
    }
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: &'static str,
    /// vLLM's: the stop string or token.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum StopReason<'a> {
    Text(&'a str),
    Token(u32),
}

impl<'a> StopReason<'a> {
    fn of(end: &'a End) -> Option<Self> {
        end.stop.as_ref().map(|stop| match stop {
            StopHit::Text(text) => Self::Text(text),
            StopHit::Token(id) => Self::Token(*id),
        })
    }
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: (),
    /// The thoughts, under both names that clients look for.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function<'a>>,
}

#[derive(Serialize)]
struct ToolCall<'a> {
    id: &'a str,
    r#type: &'static str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    name: &'a str,
    arguments: &'a str,
}

impl<'a> From<&'a Call> for Function<'a> {
    fn from(call: &'a Call) -> Self {
        Self {
            name: &call.name,
            arguments: &call.arguments,
        }
    }
}

#[derive(Serialize)]
struct Logprobs<'a> {
    content: Vec<Position<'a>>,
    refusal: (),
}

#[derive(Serialize)]
struct Position<'a> {
    #[serde(flatten)]
    token: Candidate<'a>,
    top_logprobs: Vec<Candidate<'a>>,
}

#[derive(Serialize)]
struct Candidate<'a> {
    token: &'a str,
    logprob: f32,
    bytes: &'a [u8],
}

impl<'a> Candidate<'a> {
    fn of(token: &'a TokenText, logprob: f32) -> Self {
        Self {
            token: &token.text,
            logprob: finite(logprob),
            bytes: &token.bytes,
        }
    }
}

/// OpenAI's spelling of "as good as impossible"; JSON has no infinity.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(-9999.0)
    } else {
        -9999.0
    }
}

impl<'a> Logprobs<'a> {
    fn of(positions: &'a [TokenLogprob]) -> Self {
        let content = positions.iter().map(|position| Position {
            token: Candidate::of(&position.token, position.logprob),
            top_logprobs: position
                .top
                .iter()
                .map(|(token, logprob)| Candidate::of(token, *logprob))
                .collect(),
        });
        Self {
            content: content.collect(),
            refusal: (),
        }
    }
}

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// OpenAI's word, with the older one for clients that speak of functions.
fn finish_reason(options: &ChatOptions, end: &End) -> &'static str {
    match end.reason.word() {
        "tool_calls" if options.functions => "function_call",
        word => word,
    }
}

/// A whole `chat.completion`.
pub(crate) fn completion(heading: &Heading, options: &ChatOptions, collected: &Collected) -> Vec<u8> {
    let answers = collected.choices.iter().zip(&collected.outcome.ends);
    let choices = answers.zip(0..).map(|((answer, end), index)| Choice {
        index,
        message: message(options, answer),
        logprobs: options.logprobs.then(|| Logprobs::of(&answer.logprobs)),
        finish_reason: finish_reason(options, end),
        stop_reason: StopReason::of(end),
    });
    to_json(&Completion {
        id: &heading.id,
        object: "chat.completion",
        created: heading.created,
        model: &heading.model,
        choices: choices.collect(),
        usage: collected.outcome.counts.into(),
    })
}

fn message<'a>(options: &ChatOptions, answer: &'a Answer) -> Message<'a> {
    let calls = answer.tool_calls.iter();
    let text = given(&answer.text);
    Message {
        role: "assistant",
        content: if answer.tool_calls.is_empty() {
            Some(&answer.text)
        } else {
            text
        },
        refusal: (),
        reasoning: given(&answer.reasoning).filter(|_| !options.hide_reasoning),
        reasoning_content: given(&answer.reasoning).filter(|_| !options.hide_reasoning),
        function_call: if options.functions {
            answer.tool_calls.first().map(Function::from)
        } else {
            None
        },
        tool_calls: calls
            .filter(|_| !options.functions)
            .map(|call| ToolCall {
                id: &call.id,
                r#type: "function",
                function: call.into(),
            })
            .collect(),
    }
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// Left out unless asked for; then null where there is nothing to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    obfuscation: Option<String>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason<'a>>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCallDelta<'a>; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<FunctionDelta<'a>>,
}

#[derive(Serialize)]
struct ToolCallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

/// Writes the chunks of one stream.
pub(crate) struct ChunkWriter {
    heading: Heading,
    choices: u32,
    options: ChatOptions,
}

impl ChunkWriter {
    pub fn new(heading: Heading, options: &ChatOptions, choices: u32) -> Self {
        Self {
            heading,
            choices,
            options: options.clone(),
        }
    }

    fn delta<'a>(&self, part: &'a Part) -> Delta<'a> {
        let mut delta = Delta::default();
        let (index, id, function) = match part {
            Part::Text(text) => {
                delta.content = Some(text);
                return delta;
            }
            Part::Reasoning(text) => {
                delta.reasoning = Some(text);
                delta.reasoning_content = Some(text);
                return delta;
            }
            Part::ToolCall { index, id, name } => {
                let name = Some(name.as_str());
                (*index, Some(id.as_str()), FunctionDelta { name, arguments: "" })
            }
            Part::ToolArguments { index, json } => (
                *index,
                None,
                FunctionDelta {
                    name: None,
                    arguments: json,
                },
            ),
        };
        if self.options.functions {
            delta.function_call = Some(function);
        } else {
            delta.tool_calls = Some([ToolCallDelta {
                index,
                id,
                r#type: id.map(|_| "function"),
                function,
            }]);
        }
        delta
    }

    fn choice(&self, choice: ChunkChoice<'_>, counts: Option<Counts>) -> Vec<u8> {
        let usage = counts.filter(|_| self.options.continuous_usage);
        self.chunk(&[choice], usage.map(Usage::from))
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>) -> Vec<u8> {
        let heading = &self.heading;
        let mut chunk = Chunk {
            id: &heading.id,
            object: "chat.completion.chunk",
            created: heading.created,
            model: &heading.model,
            choices,
            usage: self.options.include_usage.then_some(usage),
            obfuscation: self.options.obfuscation.then(String::new),
        };
        let json = to_json(&chunk);
        if chunk.obfuscation.is_none() {
            return json;
        }
        chunk.obfuscation = Some(noise(OBFUSCATION_BYTES - json.len() % OBFUSCATION_BYTES));
        to_json(&chunk)
    }
}

/// Random characters, which do not compress away.
fn noise(characters: usize) -> String {
    let mut text = String::new();
    while text.len() < characters {
        text.push_str(&Uuid::new_v4().simple().to_string());
    }
    text.truncate(characters);
    text
}

impl Render for ChunkWriter {
    fn begin(&mut self, frames: &mut Frames) {
        for index in 0..self.choices {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(""),
                ..Delta::default()
            };
            let choice = ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
            };
            frames.data(&self.choice(choice, None));
        }
    }

    fn piece(&mut self, piece: Piece, counts: &dyn Fn() -> Counts, frames: &mut Frames) {
        let counts = self.options.continuous_usage.then(counts);
        // Probabilities go with the first delta; those of tokens without a text of their own, with an empty one.
        let mut logprobs = (!piece.logprobs.is_empty()).then(|| Logprobs::of(&piece.logprobs));
        let hidden = |part: &&Part| self.options.hide_reasoning && matches!(part, Part::Reasoning(_));
        let shown = piece.deltas.iter().filter(|part| !hidden(part));
        let mut deltas: Vec<Delta<'_>> = shown.map(|part| self.delta(part)).collect();
        if deltas.is_empty() && logprobs.is_none() {
            return;
        }
        if deltas.is_empty() {
            deltas.push(Delta {
                content: Some(""),
                ..Delta::default()
            });
        }
        for delta in deltas {
            let choice = ChunkChoice {
                index: piece.choice,
                delta,
                logprobs: logprobs.take(),
                finish_reason: None,
                stop_reason: None,
            };
            frames.data(&self.choice(choice, counts));
        }
    }

    fn end(&mut self, outcome: &Outcome, frames: &mut Frames) {
        for (end, index) in outcome.ends.iter().zip(0..) {
            let choice = ChunkChoice {
                index,
                delta: Delta::default(),
                logprobs: None,
                finish_reason: Some(finish_reason(&self.options, end)),
                stop_reason: StopReason::of(end),
            };
            frames.data(&self.choice(choice, Some(outcome.counts)));
        }
        if self.options.include_usage {
            frames.data(&self.chunk(&[], Some(outcome.counts.into())));
        }
        frames.data(b"[DONE]");
    }
}

/// Strings and numbers always serialise.
fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
