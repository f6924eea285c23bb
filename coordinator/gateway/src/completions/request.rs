//! A completion request: from bytes to checked values.

use baton_proto::limits::{PROMPT_TOKENS_MAX, TOP_LOGPROBS_MAX};
use serde_json::Value as Json;

use crate::api_error::ApiError;
use crate::body::Body;
use crate::config::GatewayConfig;
use crate::generation::request::{GenerationRequest, Prompt};
use crate::wishes::{self, MAX_TOKENS_MAX};

/// Tokens of an answer where the request says nothing: OpenAI's and vLLM's 16.
const MAX_TOKENS_DEFAULT: u32 = 16;
/// Choices of one prompt: OpenAI's limit.
const N_MAX: u32 = 128;

/// The fields, as the API's description lists them; a test holds it against what [`parse`] asks for.
pub(crate) const FIELDS: &[&str] = &[
    "best_of",
    "cache_salt",
    "echo",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "min_tokens",
    "model",
    "n",
    "presence_penalty",
    "priority",
    "prompt",
    "repetition_penalty",
    "safety_identifier",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_k",
    "top_p",
    "user",
];

/// What of a request is this endpoint's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct CompletionOptions {
    pub stream: bool,
    pub include_usage: bool,
    /// With every chunk.
    pub continuous_usage: bool,
    pub logprobs: bool,
    /// Choices of each prompt.
    pub n: u32,
    /// The prompts to repeat before the answers; empty where that is not asked for.
    pub echo: Vec<Prompt>,
}

/// Parses and checks a body.
pub(crate) fn parse(bytes: &[u8], config: &GatewayConfig) -> Result<(GenerationRequest, CompletionOptions), ApiError> {
    let mut body = Body::parse(bytes)?;
    let model = body.needed_text("model")?;
    let prompts = prompts(&mut body, config.prompts_max)?;
    let n = body.count("n", 1, N_MAX)?.unwrap_or(1);
    let choices = prompts.len() * n as usize;
    if choices > config.choices_max {
        let is = format!(
            "times the number of prompts is {choices} choices; at most {} are made",
            config.choices_max
        );
        return Err(body.wrong("n", is));
    }
    if body.count("best_of", 1, u32::MAX)?.is_some_and(|best| best != n) {
        let message = "`best_of` must equal `n`: all that is generated is returned and billed.";
        return Err(ApiError::unsupported("best_of", message));
    }
    body.refuse("suffix", "text is not inserted; leave it out", |value| value == "")?;
    let logprobs = logprobs(&mut body)?;
    let echo = body.flag("echo", false)?;
    if echo && logprobs.is_some() {
        let message =
            "`echo` with `logprobs` is not supported: the probabilities of a prompt's tokens are not computed.";
        return Err(ApiError::unsupported("echo", message));
    }
    let stream = body.flag("stream", false)?;
    let usage = stream_options(&mut body, stream)?;
    let max_tokens = body.count("max_tokens", 1, MAX_TOKENS_MAX)?;
    let request = GenerationRequest {
        model,
        n,
        max_tokens: max_tokens.map(|count| ("max_tokens", count)),
        max_tokens_default: Some(MAX_TOKENS_DEFAULT),
        sampling: wishes::sampling(&mut body)?,
        stop: wishes::stop(&mut body)?,
        logprobs,
        show_special_tokens: !body.flag("skip_special_tokens", true)?,
        priority: wishes::priority(&mut body)?,
        user: wishes::user(&mut body)?,
        cache_salt: wishes::cache_salt(&mut body)?,
        ..GenerationRequest::default()
    };
    body.finish()?;
    let options = CompletionOptions {
        stream,
        include_usage: usage.0,
        continuous_usage: usage.1,
        logprobs: logprobs.is_some(),
        n,
        echo: if echo { prompts.clone() } else { Vec::new() },
    };
    Ok((GenerationRequest { prompts, ..request }, options))
}

/// A text, texts, token ids, or arrays of those.
fn prompts(body: &mut Body, prompts_max: usize) -> Result<Vec<Prompt>, ApiError> {
    let wrong = |body: &Body| {
        let is = "must be a string, an array of strings, an array of token ids, or an array of such arrays";
        body.wrong("prompt", is)
    };
    let tokens = |list: &[Json]| wishes::token_ids(list).map(Prompt::Tokens);
    let prompts = match body.take("prompt") {
        None => return Err(body.missing("prompt")),
        Some(Json::String(text)) => vec![Prompt::Text(text)],
        Some(Json::Array(list)) => match list.first() {
            None => return Err(body.wrong("prompt", "is empty")),
            Some(Json::Number(_)) if list.len() > PROMPT_TOKENS_MAX => {
                return Err(body.wrong("prompt", format_args!("has more than {PROMPT_TOKENS_MAX} tokens")));
            }
            Some(Json::Number(_)) => vec![tokens(&list).ok_or_else(|| wrong(body))?],
            Some(_) if list.len() > prompts_max => {
                let is = format!("has {} prompts; at most {prompts_max} are taken", list.len());
                return Err(body.wrong("prompt", is));
            }
            Some(_) => {
                let one = |prompt| match prompt {
                    Json::String(text) => Some(Prompt::Text(text)),
                    Json::Array(ids) => tokens(&ids),
                    _ => None,
                };
                let all: Option<Vec<Prompt>> = list.into_iter().map(one).collect();
                all.ok_or_else(|| wrong(body))?
            }
        },
        Some(_) => return Err(wrong(body)),
    };
    Ok(prompts)
}

/// How many of the most likely tokens are told beside the sampled one. (Clients of chat completions send truth values.)
fn logprobs(body: &mut Body) -> Result<Option<u32>, ApiError> {
    body.count("logprobs", 0, TOP_LOGPROBS_MAX)
}

/// Whether usage is told at the end of a stream, and with every chunk.
fn stream_options(body: &mut Body, stream: bool) -> Result<(bool, bool), ApiError> {
    let Some(mut options) = body.object("stream_options")? else {
        return Ok((false, false));
    };
    if !stream {
        return Err(body.wrong("stream_options", "is only allowed with `stream: true`"));
    }
    let include = options.flag("include_usage", false)?;
    let continuous = options.flag("continuous_usage_stats", false)?;
    options.refuse("include_obfuscation", "completions are not padded", |value| {
        value == &Json::Bool(false)
    })?;
    options.finish()?;
    // vLLM's: the second says nothing without the first.
    Ok((include, include && continuous))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::asked_by;
    use serde_json::json;

    fn parse(extra: Json) -> Result<(GenerationRequest, CompletionOptions), ApiError> {
        let mut body = json!({"model": "m", "prompt": "hi"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        super::parse(body.to_string().as_bytes(), &GatewayConfig::default())
    }

    #[test]
    fn the_list_of_fields_is_what_is_asked_for() {
        let asked = asked_by(|| drop(parse(json!({}))));
        assert_eq!(asked, FIELDS);
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let prompts = |prompt: Json| parse(json!({"prompt": prompt})).unwrap().0.prompts;
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts(json!("a")), [text("a")]);
        assert_eq!(prompts(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(prompts(json!([1, 2])), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(
            prompts(json!([[1], [2, 3]])),
            [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]
        );
    }

    #[test]
    fn what_does_not_work_is_refused_by_name() {
        let many: Vec<&str> = vec!["x"; GatewayConfig::default().prompts_max + 1];
        for (bad, param) in [
            (json!({"prompt": null}), "prompt"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": 7}), "prompt"),
            (json!({"prompt": [1, "a"]}), "prompt"),
            (json!({"prompt": ["a", 1]}), "prompt"),
            (json!({"prompt": [-1]}), "prompt"),
            (json!({"prompt": many}), "prompt"),
            (json!({"n": 0}), "n"),
            (json!({"n": 1_000_000}), "n"),
            (json!({"n": 128, "prompt": ["a", "b", "c"]}), "n"),
            (json!({"n": 2, "best_of": 3}), "best_of"),
            (json!({"suffix": "x"}), "suffix"),
            (json!({"logprobs": 21}), "logprobs"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"echo": true, "logprobs": 0}), "echo"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"stream_options": {}}), "stream_options"),
            (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
            (json!({"messages": []}), "messages"),
        ] {
            let error = parse(bad.clone()).expect_err(&bad.to_string());
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{}",
                error.message
            );
        }
        assert!(parse(json!({"n": 2, "best_of": 2, "suffix": "", "echo": true})).is_ok());
    }
}
