//! A request against its model: template, tokens, room in the context, sampling parameters, grammar. No I/O; time in
//! proportion to the prompts.

use std::sync::Arc;

use baton_proto::limits::{GRAMMAR_BYTES_MAX, PROMPT_TOKENS_MAX, STOP_TOKEN_IDS_MAX};
use baton_proto::worker::grammar::Kind;
use baton_proto::worker::{Grammar, LogitBias, Sampling};

use super::intake::Origin;
use super::request::{Chat, GenerationRequest, OutputFormat, Prompt, SamplingWishes, Tool, ToolChoice, ToolWishes};
use super::sequence::ChoiceReader;
use crate::api_error::ApiError;
use crate::backend::{Backend, Job};
use crate::detokenizer::Special;
use crate::family::ToolFormat;
use crate::gateway::Gateway;
use crate::grammar::{self, CallRules, Thought};
use crate::model::{ConversationError, ServedModel};
use crate::prompt::PromptError;
use crate::reader::TokenReader;
use crate::stop::StopMatcher;
use crate::template::{Conversation, RenderError};
use crate::tool_text;
use crate::trace::{RequestNames, random_seed};
use crate::turn::{Calls, Thinking, Turn};

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
    /// One per prompt.
    readings: Vec<Reading>,
}

/// A prompt, and how what follows it is to be read.
struct Reading {
    /// The prompt ends inside a thought; `None` where no thoughts are looked for.
    thought_open: Option<bool>,
    /// Calls are looked for, by this parser.
    calls: Option<ToolFormat>,
    special: Special,
}

impl Prepared {
    /// The job of choice `index`, and how it is to be read.
    pub fn choice(&self, index: u32) -> Option<(Job, ChoiceReader)> {
        let at = (index / self.n) as usize;
        let mut job = self.jobs.get(at)?.clone();
        job.sampling.seed = job.sampling.seed.wrapping_add(u64::from(index % self.n));
        if index > 0 {
            job.request_id = format!("{}-{index}", job.request_id);
        }
        let reading = self.readings.get(at)?;
        let stop = &self.request.stop;
        let stops = StopMatcher::new(stop.strings.clone(), stop.include);
        let detokenizer = self.model.detokenizer(reading.special.clone());
        let thoughts = self.model.family().thoughts.as_ref();
        let thinking = reading.thought_open.zip(thoughts);
        let thinking = thinking.and_then(|(open, format)| Thinking::new(format, open));
        let calls = reading.calls.as_ref();
        let calls = calls.and_then(|format| Calls::new(format, &self.request.tools.tools, self.request.tools.single));
        let reader = ChoiceReader {
            tokens: TokenReader::new(detokenizer, stops, stop.min_tokens),
            turn: Turn::new(thinking, calls),
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
    let sampling = sampling(&request, &model)?;
    let stop_token_ids = stop_token_ids(&request, &model)?;
    let mut cache_salt = origin.caller.cache_salt();
    if !request.cache_salt.is_empty() {
        // No tenant's salt has a zero byte.
        cache_salt.push(0);
        cache_salt.extend_from_slice(request.cache_salt.as_bytes());
    }
    check_choice(&request.tools)?;
    // All of them, whatever is forced, so that the prompt's beginning stays the same from turn to turn.
    let shown = match request.tools.choice {
        ToolChoice::None => Vec::new(),
        _ => request.tools.tools.clone(),
    };
    let prompts = std::mem::take(&mut request.prompts);
    let mut jobs = Vec::with_capacity(prompts.len());
    let mut readings = Vec::with_capacity(prompts.len());
    let mut grammar_param = "";
    for prompt in prompts {
        let param = if matches!(prompt, Prompt::Chat(_)) {
            "messages"
        } else {
            "prompt"
        };
        let (tokens, tail) = tokens(&model, prompt, &shown, &cache_salt, &origin.names)?;
        let mut max_tokens = room(context, tokens.len(), request.max_tokens, param)?;
        if let (None, Some(default)) = (request.max_tokens, request.max_tokens_default) {
            max_tokens = max_tokens.min(default.max(request.stop.min_tokens));
        }
        if request.stop.min_tokens > max_tokens {
            let message = format!("`min_tokens` must be at most the {max_tokens} tokens that may be generated.");
            return Err(ApiError::field("min_tokens", message));
        }
        let (grammar, reading) = rules(&model, &request, tail.as_deref())?;
        if grammar.is_some() {
            grammar_param = if request.format == OutputFormat::Text {
                "tools"
            } else {
                request.format_param
            };
        }
        readings.push(reading);
        jobs.push(Job {
            request_id: origin.names.request_id.clone(),
            traceparent: origin.names.traceparent.clone(),
            model: request.model.clone(),
            prompt: tokens.into(),
            max_tokens,
            sampling: Sampling {
                grammar,
                ..sampling.clone()
            },
            stop_token_ids: stop_token_ids.clone(),
            cache_salt: cache_salt.clone(),
            tenant: Arc::clone(&origin.caller.tenant),
            share: origin.caller.share.clone(),
            priority: origin.caller.priority(-request.priority),
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
        readings,
    })
}

/// A choice must be one of the tools there are.
fn check_choice(wishes: &ToolWishes) -> Result<(), ApiError> {
    let ToolWishes { tools, choice, .. } = wishes;
    let known = |name: &String| tools.iter().any(|tool| tool.name == *name);
    let named: &[String] = match choice {
        ToolChoice::Named(name) => std::slice::from_ref(name),
        ToolChoice::Allowed { names, .. } => names,
        _ => &[],
    };
    if let Some(name) = named.iter().find(|name| !known(name)) {
        return Err(ApiError::field(
            "tool_choice",
            format!("`tool_choice` names `{name}`, which is not in `tools`."),
        ));
    }
    let forced = !matches!(choice, ToolChoice::Auto | ToolChoice::None);
    if forced && tools.is_empty() {
        return Err(ApiError::field("tool_choice", "`tool_choice` needs `tools`."));
    }
    Ok(())
}

/// The tools that a choice leaves, and whether one must be called.
fn callable(wishes: &ToolWishes) -> (Vec<Tool>, bool) {
    let (names, forced): (&[String], bool) = match &wishes.choice {
        ToolChoice::None => return (Vec::new(), false),
        ToolChoice::Auto => return (wishes.tools.clone(), false),
        ToolChoice::Required => return (wishes.tools.clone(), true),
        ToolChoice::Named(name) => (std::slice::from_ref(name), true),
        ToolChoice::Allowed { names, required } => (names, *required),
    };
    let allowed = wishes.tools.iter().filter(|tool| names.contains(&tool.name));
    (allowed.cloned().collect(), forced)
}

/// What is to be enforced of a turn, and how it is to be read. `tail` is the end of a rendered chat; other prompts have none,
/// and what follows them is text.
fn rules(
    model: &ServedModel,
    request: &GenerationRequest,
    tail: Option<&str>,
) -> Result<(Option<Grammar>, Reading), ApiError> {
    let family = model.family();
    let thoughts = family.thoughts.as_ref().zip(tail);
    let thought = match thoughts {
        None => Thought::None,
        Some((format, tail)) if tail.trim_end().ends_with(format.open) => Thought::Open(format.clone()),
        Some((format, tail)) if tail.trim_end().ends_with(format.close) => Thought::None,
        Some((format, _)) => Thought::Possible(format.clone()),
    };
    let (tools, forced) = callable(&request.tools);
    let mut format = family.tool_format();
    let calls = (tail.is_some() && !tools.is_empty()).then(|| CallRules {
        tools: &tools,
        parser: &format.parser,
        forced,
        single: request.tools.single,
    });
    let grammar = grammar::compose(&request.format, calls.as_ref(), &thought, model);
    let grammar = grammar.map_err(|message| {
        ApiError::field(
            "tool_choice",
            format!("{}{}.", message[..1].to_uppercase(), &message[1..]),
        )
    })?;
    check_size(grammar.as_ref(), request)?;
    let parser = calls.as_ref().map(|calls| calls.parser().to_owned());
    if let Some(parser) = &parser {
        format.parser.clone_from(parser);
    }
    let mut marks: Vec<&str> = thoughts.map_or(Vec::new(), |(format, _)| vec![format.open, format.close]);
    if parser.is_some() {
        marks.extend(format.marks);
    }
    let reading = Reading {
        thought_open: thoughts.map(|_| matches!(thought, Thought::Open(_))),
        calls: parser.map(|_| format),
        special: match marks[..] {
            _ if request.show_special_tokens => Special::Shown,
            [] => Special::Hidden,
            _ => Special::Only(model.special_in(&marks)),
        },
    };
    Ok((grammar, reading))
}

fn check_size(grammar: Option<&Grammar>, request: &GenerationRequest) -> Result<(), ApiError> {
    let Some(kind) = grammar.and_then(|grammar| grammar.kind.as_ref()) else {
        return Ok(());
    };
    let (Kind::JsonSchema(text) | Kind::Regex(text) | Kind::Lark(text)) = kind;
    if text.len() <= GRAMMAR_BYTES_MAX {
        return Ok(());
    }
    let param = if request.format == OutputFormat::Text {
        "tools"
    } else {
        request.format_param
    };
    let message = format!("What `{param}` asks to enforce is larger than {GRAMMAR_BYTES_MAX} bytes.");
    Err(ApiError::field(param, message))
}

fn saturated(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The prompt's tokens and, of a chat, the end of its text.
pub(crate) fn tokens(
    model: &ServedModel,
    prompt: Prompt,
    tools: &[Tool],
    salt: &[u8],
    names: &RequestNames,
) -> Result<(Vec<u32>, Option<String>), ApiError> {
    match prompt {
        Prompt::Chat(chat) => {
            let prompt = model
                .prompt(conversation(model, chat, tools)?, salt)
                .map_err(|error| conversation_error(error, names))?;
            if prompt.tokens.is_empty() {
                return Err(ApiError::field("messages", "The messages render to nothing."));
            }
            Ok((prompt.tokens, Some(prompt.tail)))
        }
        Prompt::Text(text) => {
            let tokens = model.encode(&text).map_err(|error| {
                tracing::warn!(request_id = %names.request_id, error, "a tokenizer failed");
                ApiError::field("prompt", "The prompt cannot be tokenised.")
            })?;
            if tokens.is_empty() {
                return Err(ApiError::field("prompt", "`prompt` is empty."));
            }
            Ok((tokens, None))
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
                None => Ok((tokens, None)),
            }
        }
    }
}

/// What the template is to show.
fn conversation(model: &ServedModel, chat: Chat, tools: &[Tool]) -> Result<Conversation, ApiError> {
    let template = model.template();
    let Chat {
        messages,
        template_kwargs,
        documents,
        reasoning_effort,
        closed,
    } = chat;
    if !documents.is_empty() && !template.mentions("documents") {
        let message = "`documents`: this model's chat template does not show any; put them into a message.";
        return Err(ApiError::unsupported("documents", message));
    }
    let mut kwargs = template_kwargs;
    if let Some(effort) = reasoning_effort {
        let switches = ["enable_thinking", "thinking"]
            .into_iter()
            .filter(|name| template.mentions(name));
        let switches: Vec<&str> = switches.collect();
        if switches.is_empty() && !template.mentions("reasoning_effort") {
            let message = "`reasoning_effort`: this model's chat template has no such setting.";
            return Err(ApiError::unsupported("reasoning_effort", message));
        }
        for name in switches {
            kwargs.entry(name).or_insert((effort != "none").into());
        }
        kwargs.entry("reasoning_effort").or_insert(effort.into());
    }
    let mut conversation = Conversation {
        messages,
        tools: tools.iter().map(Tool::shown).collect(),
        documents,
        kwargs,
        closed,
    };
    if !template.mentions("tools") {
        tool_text::describe(&mut conversation);
    }
    Ok(conversation)
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

/// All but the grammar.
fn sampling(request: &GenerationRequest, model: &ServedModel) -> Result<Sampling, ApiError> {
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
        grammar: None,
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
