//! What a generation says, in no endpoint's words: pieces while it runs, an outcome when it is settled. Plain data.

use crate::metrics::Counts;

/// What a step brought for one choice. May hold nothing to show (bytes of an unfinished character, a possible stop string).
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Piece {
    /// Which choice: 0 to `prompts × n - 1`.
    pub choice: u32,
    /// In order.
    pub deltas: Vec<Delta>,
    /// Of the tokens that these deltas are made of, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Tokens of this choice so far.
    pub completion_tokens: u32,
}

impl Piece {
    /// True if there is anything to show.
    pub fn shows(&self) -> bool {
        !self.deltas.is_empty() || !self.logprobs.is_empty()
    }
}

/// More of a choice's answer. Never empty, and never a part of a character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delta {
    /// Of the answer's text.
    Text(String),
    /// Of what the model thought before.
    Reasoning(String),
    /// A tool call begins. Calls of a choice are numbered from 0 in order.
    ToolCall {
        /// Its number.
        index: u32,
        /// Unique, made here.
        id: String,
        /// The function.
        name: String,
    },
    /// More of the arguments of a call that has begun: joined, they are one JSON object.
    ToolArguments {
        /// The call.
        index: u32,
        /// A part of the JSON text.
        json: String,
    },
}

/// Probabilities at one position. Natural logarithms.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenLogprob {
    /// The sampled token.
    pub token: TokenText,
    pub logprob: f32,
    /// The most likely ones, best first, as many as asked for.
    pub top: Vec<(TokenText, f32)>,
}

/// A token as text. A token may be a part of a character: its bytes are exact, its text then is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TokenText {
    pub id: u32,
    pub text: String,
    pub bytes: Vec<u8>,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// The model ended its turn, or a stop string or token came.
    Stop,
    /// `max_tokens`, or the context, is used up.
    Length,
    /// It ended its turn by calling tools.
    ToolCalls,
}

impl EndReason {
    /// OpenAI's word in chat completions.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What of the client's stopped a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopHit {
    /// One of its stop strings.
    Text(String),
    /// One of its stop tokens.
    Token(u32),
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub reason: EndReason,
    /// `None` where the model ended by itself.
    pub stop: Option<StopHit>,
}

/// A request that ended well and is settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// One per choice, in order.
    pub ends: Vec<End>,
    /// Of the whole request.
    pub counts: Counts,
}

/// Everything of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub text: String,
    pub reasoning: String,
    pub tool_calls: Vec<ToolCall>,
    pub logprobs: Vec<TokenLogprob>,
}

/// A whole tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub id: String,
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// A whole answer: choices and, with the same indices, their ends.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Collected {
    pub choices: Vec<Choice>,
    pub outcome: Outcome,
}

impl Choice {
    /// Adds a piece.
    pub fn take(&mut self, piece: Piece) {
        for delta in piece.deltas {
            match delta {
                Delta::Text(text) => self.text.push_str(&text),
                Delta::Reasoning(text) => self.reasoning.push_str(&text),
                Delta::ToolCall { id, name, .. } => self.tool_calls.push(ToolCall {
                    id,
                    name,
                    arguments: String::new(),
                }),
                Delta::ToolArguments { index, json } => {
                    if let Some(call) = self.tool_calls.get_mut(index as usize) {
                        call.arguments.push_str(&json);
                    }
                }
            }
        }
        self.logprobs.extend(piece.logprobs);
    }
}
