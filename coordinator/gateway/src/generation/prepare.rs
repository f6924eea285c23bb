//! A request against its model: template, tokens, room in the context, sampling parameters, grammar. No I/O; time in
//! proportion to the prompts.

use std::sync::Arc;

use baton_proto::limits::{GRAMMAR_BYTES_MAX, PROMPT_TOKENS_MAX, STOP_TOKEN_IDS_MAX};
use baton_proto::worker::{Grammar, LogitBias, Sampling, grammar};

use super::intake::Origin;
use super::request::{GenerationRequest, OutputFormat, Prompt, SamplingWishes};
use super::sequence::ChoiceReader;
use crate::api_error::ApiError;
use crate::backend::{Backend, Job};
use crate::gateway::Gateway;
use crate::model::{ConversationError, ServedModel};
use crate::prompt::PromptError;
use crate::reader::TokenReader;
use crate::stop::StopMatcher;
use crate::template::RenderError;
use crate::trace::{RequestNames, random_seed};
use crate::turn::Turn;

/// A request that fits its model.
pub(crate) struct Prepared {
    /// One per prompt; a choice's own is made of it by [`choice`](Self::choice).
    pub jobs: Vec<Job>,
    /// Choices of each prompt.
    pub n: u32,
    /// The client said how many tokens it wants.
    pub max_tokens_asked: bool,
    /// The client gave a seed.
    pub seeded: bool,
    /// The client's user.
    pub user: String,
    /// Where in the request the grammar comes from, for messages; empty without one.
    pub grammar_param: &'static str,
    model: ServedModel,
    request: GenerationRequest,
}

impl Prepared {
    /// The job of choice `index`, and how it is to be read.
    pub fn choice(&self, index: u32) -> Option<(Job, ChoiceReader)> {
        let mut job = self.jobs.get((index / self.n) as usize)?.clone();
        job.sampling.seed = job.sampling.seed.wrapping_add(u64::from(index % self.n));
        if index > 0 {
            job.request_id = format!("{}-{index}", job.request_id);
        }
        let stop = &self.request.stop;
        let stops = StopMatcher::new(stop.strings.clone(), stop.include);
        let detokenizer = self.model.detokenizer(self.request.show_special_tokens);
        let reader = ChoiceReader {
            tokens: TokenReader::new(detokenizer, stops, stop.min_tokens),
            turn: Turn::default(),
            stop_token_ids: stop.token_ids.clone(),
            include_stop: stop.include,
            logprobs: self.request.logprobs.is_some(),
        };
        Some((job, reader))
    }

    pub fn model_name(&self) -> &str {
        self.model.name()
    }

    /// Tokens of each prompt.
    pub fn prompt_tokens(&self) -> Vec<u32> {
        self.jobs.iter().map(|job| saturated(job.prompt.len())).collect()
    }

    /// Most tokens that may be generated in all.
    pub fn max_tokens_total(&self) -> u32 {
        let all = self
            .jobs
            .iter()
            .fold(0u32, |sum, job| sum.saturating_add(job.max_tokens));
        all.saturating_mul(self.n)
    }

    /// How many choices there are in all.
    pub fn choices(&self) -> u32 {
        self.n.saturating_mul(saturated(self.jobs.len()))
    }
}

/// Checks, renders and tokenises.
pub(crate) fn prepare<B: Backend>(
    gateway: &Gateway<B>,
    mut request: GenerationRequest,
    origin: &Origin,
) -> Result<Prepared, ApiError> {
    let model = gateway.served(&request.model, &origin.caller)?.clone();
    let context = gateway.context_length(&model);
    let (grammar, grammar_param) = grammar(&request.format)?;
    let sampling = sampling(&request, &model, grammar)?;
    let stop_token_ids = stop_token_ids(&request, &model)?;
    let mut cache_salt = origin.caller.cache_salt();
    if !request.cache_salt.is_empty() {
        // No tenant's salt has a zero byte.
        cache_salt.push(0);
        cache_salt.extend_from_slice(request.cache_salt.as_bytes());
    }
    let mut jobs = Vec::with_capacity(request.prompts.len());
    for prompt in std::mem::take(&mut request.prompts) {
        let param = if matches!(prompt, Prompt::Chat(_)) {
            "messages"
        } else {
            "prompt"
        };
        let tokens = tokens(&model, prompt, &cache_salt, &origin.names)?;
        let mut max_tokens = room(context, tokens.len(), request.max_tokens, param)?;
        if let (None, Some(default)) = (request.max_tokens, request.max_tokens_default) {
            max_tokens = max_tokens.min(default.max(request.stop.min_tokens));
        }
        if request.stop.min_tokens > max_tokens {
            let message = format!("`min_tokens` must be at most the {max_tokens} tokens that may be generated.");
            return Err(ApiError::field("min_tokens", message));
        }
        jobs.push(Job {
            request_id: origin.names.request_id.clone(),
            traceparent: origin.names.traceparent.clone(),
            model: request.model.clone(),
            prompt: tokens.into(),
            max_tokens,
            sampling: sampling.clone(),
            stop_token_ids: stop_token_ids.clone(),
            cache_salt: cache_salt.clone(),
            tenant: Arc::clone(&origin.caller.tenant),
            priority: -request.priority,
            targets: origin.targets,
        });
    }
    Ok(Prepared {
        jobs,
        n: request.n.max(1),
        max_tokens_asked: request.max_tokens.is_some(),
        seeded: request.sampling.seed.is_some(),
        user: std::mem::take(&mut request.user),
        grammar_param,
        model,
        request,
    })
}

fn saturated(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn tokens(model: &ServedModel, prompt: Prompt, salt: &[u8], names: &RequestNames) -> Result<Vec<u32>, ApiError> {
    match prompt {
        Prompt::Chat(chat) => {
            let tools = chat
                .messages
                .iter()
                .position(|message| message.get("tool_calls").is_some());
            if let Some(at) = tools.filter(|_| !model.template().mentions("tool_calls")) {
                // A template that cannot show them would drop them in silence.
                let param = format!("messages[{at}].tool_calls");
                let message = format!("`{param}`: this model's chat template has no tool calls.");
                return Err(ApiError::unsupported(&param, message));
            }
            let tokens = model
                .prompt(chat.messages, salt)
                .map_err(|error| conversation_error(error, names))?;
            if tokens.is_empty() {
                return Err(ApiError::field("messages", "The messages render to nothing."));
            }
            Ok(tokens)
        }
        Prompt::Text(text) => {
            let tokens = model.encode(&text).map_err(|error| {
                tracing::warn!(request_id = %names.request_id, error, "a tokenizer failed");
                ApiError::field("prompt", "The prompt cannot be tokenised.")
            })?;
            if tokens.is_empty() {
                return Err(ApiError::field("prompt", "`prompt` is empty."));
            }
            Ok(tokens)
        }
        Prompt::Tokens(tokens) => {
            let vocabulary = model.vocabulary_size();
            match tokens.iter().find(|id| **id >= vocabulary) {
                Some(id) => Err(ApiError::field(
                    "prompt",
                    format!(
                        "`prompt` holds the token {id}; this model's tokens are 0 to {}.",
                        vocabulary - 1
                    ),
                )),
                None if tokens.is_empty() => Err(ApiError::field("prompt", "`prompt` is empty.")),
                None => Ok(tokens),
            }
        }
    }
}

/// Tokens that may be generated.
fn room(context: u32, prompt_tokens: usize, wanted: Option<(&'static str, u32)>, param: &str) -> Result<u32, ApiError> {
    let room = u32::try_from(prompt_tokens)
        .ok()
        .and_then(|tokens| context.checked_sub(tokens));
    let room = room.unwrap_or(0);
    if room == 0 || prompt_tokens > PROMPT_TOKENS_MAX {
        return Err(ApiError {
            param: Some(param.into()),
            ..ApiError::context_length(format!(
                "The model's context is {context} tokens and the {param} are {prompt_tokens} tokens, which leaves no room \
                 for an answer. Shorten the {param}."
            ))
        });
    }
    // An explicit wish that cannot be met is refused, as OpenAI and vLLM do, rather than cut short in silence.
    match wanted {
        None => Ok(room),
        Some((_, wanted)) if wanted <= room => Ok(wanted),
        Some((name, wanted)) => {
            let total = prompt_tokens as u64 + u64::from(wanted);
            let message = format!(
                "The model's context is {context} tokens, but {total} were asked for: {prompt_tokens} in the {param} \
                 and {wanted} in `{name}`. Shorten one of them."
            );
            Err(ApiError {
                param: Some(name.into()),
                ..ApiError::context_length(message)
            })
        }
    }
}

fn sampling(request: &GenerationRequest, model: &ServedModel, grammar: Option<Grammar>) -> Result<Sampling, ApiError> {
    let SamplingWishes {
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        seed,
    } = &request.sampling;
    let defaults = model.defaults();
    let vocabulary = model.vocabulary_size();
    if let Some((id, _)) = logit_bias.iter().find(|(id, _)| *id >= vocabulary) {
        let message = format!(
            "`logit_bias` names the token {id}; this model's tokens are 0 to {}.",
            vocabulary - 1
        );
        return Err(ApiError::field("logit_bias", message));
    }
    Ok(Sampling {
        temperature: temperature.unwrap_or(defaults.temperature),
        top_p: top_p.unwrap_or(defaults.top_p),
        top_k: top_k.unwrap_or(defaults.top_k),
        seed: seed.unwrap_or_else(random_seed),
        min_p: min_p.unwrap_or(0.0),
        presence_penalty: presence_penalty.unwrap_or(0.0),
        frequency_penalty: frequency_penalty.unwrap_or(0.0),
        repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        logit_bias: logit_bias
            .iter()
            .map(|&(token_id, bias)| LogitBias { token_id, bias })
            .collect(),
        min_tokens: request.stop.min_tokens,
        top_logprobs: request.logprobs,
        grammar,
    })
}

fn stop_token_ids(request: &GenerationRequest, model: &ServedModel) -> Result<Vec<u32>, ApiError> {
    let vocabulary = model.vocabulary_size();
    let asked = &request.stop.token_ids;
    if let Some(id) = asked.iter().find(|id| **id >= vocabulary) {
        let message = format!(
            "`stop_token_ids` names the token {id}; this model's tokens are 0 to {}.",
            vocabulary - 1
        );
        return Err(ApiError::field("stop_token_ids", message));
    }
    let own: &[u32] = if request.stop.ignore_eos { &[] } else { model.eos_ids() };
    let mut ids = [own, asked].concat();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > STOP_TOKEN_IDS_MAX {
        let message = format!(
            "`stop_token_ids` may have at most {} tokens.",
            STOP_TOKEN_IDS_MAX.saturating_sub(own.len())
        );
        return Err(ApiError::field("stop_token_ids", message));
    }
    Ok(ids)
}

/// What the workers are to enforce, and where the request says so.
fn grammar(format: &OutputFormat) -> Result<(Option<Grammar>, &'static str), ApiError> {
    let (kind, param) = match format {
        OutputFormat::Text => return Ok((None, "")),
        OutputFormat::JsonObject => (
            grammar::Kind::JsonSchema("{\"type\":\"object\"}".into()),
            "response_format",
        ),
        OutputFormat::JsonSchema { schema, param } => (grammar::Kind::JsonSchema(schema.to_string()), *param),
        OutputFormat::Regex(regex) => (grammar::Kind::Regex(regex.clone()), "structured_outputs.regex"),
        OutputFormat::Lark(lark) => (grammar::Kind::Lark(lark.clone()), "structured_outputs.grammar"),
        OutputFormat::Choice(choices) => {
            let alternatives: Vec<String> = choices
                .iter()
                .map(|choice| serde_json::json!(choice).to_string())
                .collect();
            let lark = format!("start: {}", alternatives.join(" | "));
            (grammar::Kind::Lark(lark), "structured_outputs.choice")
        }
    };
    let bytes = match &kind {
        grammar::Kind::JsonSchema(text) | grammar::Kind::Regex(text) | grammar::Kind::Lark(text) => text.len(),
    };
    if bytes > GRAMMAR_BYTES_MAX {
        let message = format!("`{param}` is larger than {GRAMMAR_BYTES_MAX} bytes.");
        return Err(ApiError::field(param, message));
    }
    Ok((Some(Grammar { kind: Some(kind) }), param))
}

fn conversation_error(error: ConversationError, names: &RequestNames) -> ApiError {
    let message = match error {
        ConversationError::Render(RenderError::Refused(reason)) => {
            let reason: String = reason.chars().take(512).collect();
            format!("The model's chat template refuses these messages: {reason}")
        }
        ConversationError::Render(RenderError::Failed(cause)) => {
            tracing::warn!(request_id = %names.request_id, cause, "a chat template failed");
            "The model's chat template cannot render these messages.".into()
        }
        ConversationError::Prompt(PromptError::Ambiguous) => {
            "The messages hold text that this model can only read as a control token. Leave it out.".into()
        }
        ConversationError::Prompt(PromptError::Tokenizer(cause)) => {
            tracing::warn!(request_id = %names.request_id, cause, "a tokenizer failed");
            "The messages cannot be tokenised.".into()
        }
    };
    ApiError::field("messages", message)
}
