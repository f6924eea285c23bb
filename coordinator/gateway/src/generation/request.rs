//! A request to generate, in no endpoint's words. Its fields were checked by themselves when it was parsed (types, ranges,
//! sizes); what they mean for a model (context, template, vocabulary) is checked by [`prepare`](super::prepare).
//! `None` and empty are "not given" throughout.

use serde_json::{Map, Value as Json};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GenerationRequest {
    /// The name clients know the model by.
    pub model: String,
    /// At least one; all but chats may have several.
    pub prompts: Vec<Prompt>,
    /// Choices per prompt, at least 1.
    pub n: u32,
    /// Tokens per choice, and the name of the field that says so, for messages to the client.
    pub max_tokens: Option<(&'static str, u32)>,
    /// Where the client does not say: at most so many, as far as there is room. `None` is all the room there is.
    pub max_tokens_default: Option<u32>,
    pub sampling: SamplingWishes,
    pub stop: StopWishes,
    pub tools: ToolWishes,
    pub format: OutputFormat,
    /// Where in the request the format stands, for messages.
    pub format_param: &'static str,
    /// Log-probabilities are wanted, of the sampled token and of so many of the most likely.
    pub logprobs: Option<u32>,
    /// Special tokens are shown as text.
    pub show_special_tokens: bool,
    /// vLLM's: lower goes first.
    pub priority: i32,
    /// The client's own user, for the record.
    pub user: String,
    /// The client's wish for a prefix cache of its own within its tenant's.
    pub cache_salt: String,
}

/// What the model continues.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// A conversation for the model's chat template.
    Chat(Chat),
    /// Text, tokenised as the tokenizer does: spelled control tokens are control tokens, since there is no template that could
    /// write them. What comes after is text: no calls or thoughts are looked for.
    Text(String),
    /// Token ids, of the model's vocabulary; as `Text`.
    Tokens(Vec<u32>),
}

/// A conversation in the shape that Hugging Face's templates read (see [`messages`](crate::messages)).
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Chat {
    pub messages: Vec<Json>,
    /// More variables for the template.
    pub template_kwargs: Map<String, Json>,
    /// For retrieval templates.
    pub documents: Vec<Json>,
    /// How long to think, for templates that know the variable.
    pub reasoning_effort: Option<String>,
    /// No answer follows: the template is not to open one.
    pub closed: bool,
}

/// Sampling parameters; what is not given is the model's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SamplingWishes {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// Each token at most once.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: Option<u64>,
}

/// What ends a choice, and what does not yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct StopWishes {
    pub strings: Vec<String>,
    pub token_ids: Vec<u32>,
    /// The stop string, or stop token, is part of the text.
    pub include: bool,
    pub ignore_eos: bool,
    /// No stop token before so many tokens.
    pub min_tokens: u32,
}

/// What the answer must be.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum OutputFormat {
    /// Anything.
    #[default]
    Text,
    /// Any JSON object.
    JsonObject,
    /// A JSON value that the schema admits. `strict` is what the client said; it is enforced either way.
    JsonSchema { schema: Json, strict: bool },
    /// The whole text matches.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
    /// One of these.
    Choice(Vec<String>),
}

/// Functions the model may call.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ToolWishes {
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
    /// At most one call in a turn.
    pub single: bool,
}

/// A function.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// JSON schema of its arguments; an object.
    pub parameters: Option<Json>,
    /// The arguments must be valid.
    pub strict: bool,
}

/// Which functions are to be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// None: the model is not told of them.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
    /// Of these only; at least one if `required`.
    Allowed { names: Vec<String>, required: bool },
}

impl Tool {
    /// As templates read it: OpenAI's shape.
    pub fn shown(&self) -> Json {
        let mut function = Map::new();
        function.insert("name".into(), self.name.as_str().into());
        if let Some(description) = &self.description {
            function.insert("description".into(), description.as_str().into());
        }
        if let Some(parameters) = &self.parameters {
            function.insert("parameters".into(), parameters.clone());
        }
        serde_json::json!({"type": "function", "function": function})
    }
}
