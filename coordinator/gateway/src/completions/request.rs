//! A completion request: from bytes to checked values.

use baton_proto::limits::PROMPT_TOKENS_MAX;
use serde_json::Value as Json;

use crate::api_error::ApiError;
use crate::chat::format;
use crate::config::GatewayConfig;
use crate::generation::request::{GenerationRequest, Prompt};
use crate::params::Params;

/// Tokens of an answer where the request says nothing: OpenAI's and vLLM's 16.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// All fields; others are refused. The API's description lists them too.
pub(crate) const FIELDS: &[&str] = &[
    "model",
    "prompt",
    "max_tokens",
    "n",
    "best_of",
    "echo",
    "suffix",
    "logprobs",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "priority",
    "user",
    "safety_identifier",
    "cache_salt",
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
    let mut params = Params::parse(bytes)?;
    params.only(FIELDS)?;
    let model = params.model()?;
    let prompts = prompts(params.take("prompt"), config.prompts_max)?;
    let n = params.n(config)?;
    let choices = prompts.len().saturating_mul(n as usize);
    if choices > config.choices_max {
        let most = config.choices_max;
        let message = format!("`n` times the number of prompts is {choices} choices; at most {most} are made.");
        return Err(ApiError::field("n", message));
    }
    if params
        .count("best_of", 1, u64::from(u32::MAX))?
        .is_some_and(|best| best != n)
    {
        let message = "`best_of` must equal `n`: all that is generated is returned and billed.";
        return Err(ApiError::unsupported("best_of", message));
    }
    if params.get("suffix").is_some_and(|suffix| suffix != "") {
        let message = "`suffix` is not supported: text is continued, not filled in. Leave it out.";
        return Err(ApiError::unsupported("suffix", message));
    }
    let logprobs = params.count("logprobs", 0, config.top_logprobs_max as u64)?;
    let echo = params.boolean("echo")?;
    if echo && logprobs.is_some() {
        let message =
            "`echo` with `logprobs` is not supported: the probabilities of a prompt's tokens are not computed.";
        return Err(ApiError::unsupported("echo", message));
    }
    let stream = params.boolean("stream")?;
    let streamed = params.stream_options(stream)?;
    if streamed.obfuscation {
        let place = "stream_options.include_obfuscation";
        return Err(ApiError::unsupported(
            place,
            "`include_obfuscation` works for chat completions only.",
        ));
    }
    let (format, format_param) = format::parse(&params, config)?;
    let options = CompletionOptions {
        stream,
        include_usage: streamed.include_usage,
        continuous_usage: streamed.continuous_usage,
        logprobs: logprobs.is_some(),
        n,
        echo: if echo { prompts.clone() } else { Vec::new() },
    };
    let request = GenerationRequest {
        model,
        prompts,
        n,
        max_tokens: params.max_tokens(&["max_tokens"], "max_tokens")?,
        max_tokens_default: Some(MAX_TOKENS_DEFAULT),
        sampling: params.sampling()?,
        stop: params.stop(config)?,
        format,
        format_param,
        logprobs,
        show_special_tokens: !params.boolean_or("skip_special_tokens", true)?,
        priority: params.priority()?,
        user: params.user()?,
        cache_salt: params.cache_salt()?,
        ..GenerationRequest::default()
    };
    Ok((request, options))
}

/// A text, texts, token ids, or arrays of those.
fn prompts(given: Option<Json>, prompts_max: usize) -> Result<Vec<Prompt>, ApiError> {
    let wrong = |is: &str| Err(ApiError::field("prompt", format!("`prompt` {is}.")));
    let shapes = "must be a string, an array of strings, an array of token ids, or an array of such arrays";
    let list = match given {
        None => return wrong("is missing"),
        Some(Json::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Json::Array(list)) => list,
        Some(_) => return wrong(shapes),
    };
    let ids = |list: &[Json]| {
        let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        ids.collect::<Option<Vec<u32>>>().map(Prompt::Tokens)
    };
    match list.first() {
        None => wrong("is empty"),
        Some(Json::Number(_)) if list.len() > PROMPT_TOKENS_MAX => {
            wrong(&format!("has more than {PROMPT_TOKENS_MAX} tokens"))
        }
        Some(Json::Number(_)) => ids(&list).map_or_else(|| wrong(shapes), |prompt| Ok(vec![prompt])),
        Some(_) if list.len() > prompts_max => {
            let is = format!("has {} prompts; at most {prompts_max} are taken", list.len());
            wrong(&is)
        }
        Some(_) => {
            let one = |prompt| match prompt {
                Json::String(text) => Some(Prompt::Text(text)),
                Json::Array(list) => ids(&list),
                _ => None,
            };
            let all: Option<Vec<Prompt>> = list.into_iter().map(one).collect();
            all.map_or_else(|| wrong(shapes), Ok)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Json) -> Result<(GenerationRequest, CompletionOptions), ApiError> {
        let mut body = json!({"model": "m", "prompt": "hi"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        super::parse(body.to_string().as_bytes(), &GatewayConfig::default())
    }

    /// A field that nobody looks at would be ignored in silence.
    #[test]
    fn every_field_is_looked_at() {
        // Any object is a schema.
        for name in FIELDS.iter().filter(|name| **name != "guided_json") {
            let error = parse(json!({*name: {"odd": [[]]}})).expect_err(name);
            let param = error.param.unwrap();
            assert!(error.status == 400 && param.starts_with(name), "{name}: {param}");
        }
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
