//! The JSON of answers: completion, chunk, model list. Own structs rather than `async-openai`'s or `openai-protocol`'s
//! types: those model all that a client may meet (hundreds of optional fields, large dependency trees), while here the
//! exact set and order of keys is the contract, borrowed strings keep the per-token path free of copies, and a test
//! checks the shapes.

use serde::Serialize;

use crate::metrics::Counts;

/// Tokens of a request, exact.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
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
        }
    }
}

/// What all parts of one answer share.
#[derive(Clone, Debug)]
pub(crate) struct Heading {
    pub id: String,
    pub created: u64,
    pub model: String,
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: [Choice<'a>; 1],
    usage: Usage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: (),
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: (),
}

/// A whole `chat.completion`.
pub(crate) fn completion(heading: &Heading, content: &str, finish_reason: &'static str, counts: Counts) -> Vec<u8> {
    let message = Message {
        role: "assistant",
        content,
        refusal: (),
    };
    to_json(&Completion {
        id: &heading.id,
        object: "chat.completion",
        created: heading.created,
        model: &heading.model,
        choices: [Choice {
            index: 0,
            message,
            logprobs: (),
            finish_reason,
        }],
        usage: counts.into(),
    })
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// Left out unless asked for; then null in every chunk but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: (),
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

/// Writes the chunks of one stream.
pub(crate) struct ChunkWriter {
    pub heading: Heading,
    pub include_usage: bool,
}

impl ChunkWriter {
    /// The first chunk.
    pub fn role(&self) -> Vec<u8> {
        self.choice(
            Delta {
                role: Some("assistant"),
                content: Some(""),
            },
            None,
        )
    }

    /// More text.
    pub fn text(&self, text: &str) -> Vec<u8> {
        self.choice(
            Delta {
                role: None,
                content: Some(text),
            },
            None,
        )
    }

    /// The one chunk with a finish reason.
    pub fn finish(&self, reason: &'static str) -> Vec<u8> {
        self.choice(Delta::default(), Some(reason))
    }

    /// The last chunk, without choices, if the client asked for it.
    pub fn usage(&self, counts: Counts) -> Option<Vec<u8>> {
        self.include_usage.then(|| self.chunk(&[], Some(counts.into())))
    }

    fn choice(&self, delta: Delta<'_>, finish_reason: Option<&'static str>) -> Vec<u8> {
        self.chunk(
            &[ChunkChoice {
                index: 0,
                delta,
                logprobs: (),
                finish_reason,
            }],
            None,
        )
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>) -> Vec<u8> {
        let heading = &self.heading;
        to_json(&Chunk {
            id: &heading.id,
            object: "chat.completion.chunk",
            created: heading.created,
            model: &heading.model,
            choices,
            usage: self.include_usage.then_some(usage),
        })
    }
}

/// One entry of `GET /v1/models`.
#[derive(Serialize)]
pub(crate) struct ModelCard {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// vLLM's addition: tokens that prompt and completion may have together.
    pub max_model_len: u32,
}

#[derive(Serialize)]
pub(crate) struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}

/// Strings and numbers always serialise.
fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}
