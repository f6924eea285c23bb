//! A chat completion request: from bytes to the neutral request, and to what is the chat endpoint's own. The fields' table is
//! in `fields.rs`, messages are in `messages.rs`.

use serde_json::Value as Json;

use super::{format, tools};
use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::fields::{Field, FieldSupport};
use crate::generation::request::{Chat, GenerationRequest, Prompt};
use crate::messages;
use crate::params::Params;
use crate::template::RESERVED;

/// Documents of one request.
const DOCUMENTS_MAX: usize = 256;
/// Bytes of `prompt_cache_key`'s like: labels.
const LABEL_BYTES_MAX: usize = 1024;
/// Efforts that OpenAI and the open models know.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// What of a request is the chat endpoint's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ChatOptions {
    pub stream: bool,
    pub include_usage: bool,
    /// With every chunk.
    pub continuous_usage: bool,
    /// Chunks are padded.
    pub obfuscation: bool,
    /// Log-probabilities are wanted.
    pub logprobs: bool,
    /// The client speaks of functions, as before there were tools.
    pub functions: bool,
    /// Thoughts are left out of the answer.
    pub hide_reasoning: bool,
}

/// Parses and checks a body.
pub(crate) fn parse(body: &[u8], config: &GatewayConfig) -> Result<(GenerationRequest, ChatOptions), ApiError> {
    let mut params = Params::parse(body)?;
    refuse_unsupported(&params)?;
    let model = params.model()?;
    let messages = messages::parse(params.take("messages"), config.messages_max)?;
    let stream = params.boolean("stream")?;
    let streamed = params.stream_options(stream)?;
    let logprobs = logprobs(&params, config)?;
    let (wishes, functions) = tools::parse(&params, config)?;
    let (format, format_param) = format::parse(&params, config)?;
    check_labels(&params)?;
    let request = GenerationRequest {
        model,
        prompts: vec![Prompt::Chat(Chat {
            messages,
            template_kwargs: template_kwargs(&params)?,
            documents: documents(&params)?,
            reasoning_effort: reasoning_effort(&params)?,
            closed: false,
        })],
        n: params.n(config)?,
        max_tokens: params.max_tokens(&["max_completion_tokens", "max_tokens"], "max_completion_tokens")?,
        max_tokens_default: None,
        sampling: params.sampling()?,
        stop: params.stop(config)?,
        tools: wishes,
        format,
        format_param,
        logprobs,
        show_special_tokens: !params.boolean_or("skip_special_tokens", true)?,
        priority: params.priority()?,
        user: params.user()?,
        cache_salt: params.cache_salt()?,
    };
    let options = ChatOptions {
        stream,
        include_usage: streamed.include_usage,
        continuous_usage: streamed.continuous_usage,
        obfuscation: streamed.obfuscation,
        logprobs: logprobs.is_some(),
        functions,
        hide_reasoning: !params.boolean_or("include_reasoning", true)?,
    };
    Ok((request, options))
}

fn refuse_unsupported(params: &Params) -> Result<(), ApiError> {
    for (name, value) in &params.0 {
        match Field::find(name) {
            Some(field) if field.support != FieldSupport::Refused || field.asks_for_nothing(value) => {}
            Some(field) => {
                let message = format!(
                    "`{name}` is not supported by this server; leave it out or set it to {}.",
                    field.neutral
                );
                return Err(ApiError::unsupported(name, message));
            }
            None => {
                let shown: String = name.chars().take(64).collect();
                return Err(ApiError::unsupported(&shown, format!("Unknown field `{shown}`.")));
            }
        }
    }
    Ok(())
}

/// `logprobs` says whether, `top_logprobs` how many beside the sampled one.
fn logprobs(params: &Params, config: &GatewayConfig) -> Result<Option<u32>, ApiError> {
    let wanted = params.boolean("logprobs")?;
    let top = params.count("top_logprobs", 0, config.top_logprobs_max as u64)?;
    match top {
        Some(1..) if !wanted => Err(ApiError::field(
            "top_logprobs",
            "`top_logprobs` needs `logprobs: true`.",
        )),
        top => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

fn template_kwargs(params: &Params) -> Result<serde_json::Map<String, Json>, ApiError> {
    let name = "chat_template_kwargs";
    let kwargs = match params.get(name) {
        None => return Ok(serde_json::Map::new()),
        Some(Json::Object(kwargs)) => kwargs,
        Some(_) => return Err(ApiError::field(name, format!("`{name}` must be an object."))),
    };
    match RESERVED.iter().find(|reserved| kwargs.contains_key(**reserved)) {
        Some(reserved) => Err(ApiError::field(name, format!("`{name}` must not set `{reserved}`."))),
        None => Ok(kwargs.clone()),
    }
}

fn documents(params: &Params) -> Result<Vec<Json>, ApiError> {
    match params.get("documents") {
        None => Ok(Vec::new()),
        Some(Json::Array(all)) if all.len() <= DOCUMENTS_MAX && all.iter().all(Json::is_object) => Ok(all.clone()),
        Some(_) => {
            let message = format!("`documents` must be an array of at most {DOCUMENTS_MAX} objects.");
            Err(ApiError::field("documents", message))
        }
    }
}

fn reasoning_effort(params: &Params) -> Result<Option<String>, ApiError> {
    match params.get("reasoning_effort") {
        None => Ok(None),
        Some(Json::String(effort)) if EFFORTS.contains(&effort.as_str()) => Ok(Some(effort.clone())),
        Some(_) => {
            let message = format!("`reasoning_effort` must be one of {}.", EFFORTS.join(", "));
            Err(ApiError::field("reasoning_effort", message))
        }
    }
}

/// Fields without an effect are checked all the same: what is taken today must not be refused tomorrow.
fn check_labels(params: &Params) -> Result<(), ApiError> {
    params.check_metadata()?;
    params.boolean("store")?;
    params.text("prompt_cache_key", LABEL_BYTES_MAX)?;
    params.text("prompt_cache_retention", LABEL_BYTES_MAX)?;
    if params
        .get("prompt_cache_options")
        .is_some_and(|options| !options.is_object())
    {
        let message = "`prompt_cache_options` must be an object.";
        return Err(ApiError::field("prompt_cache_options", message));
    }
    let prediction = params.get("prediction");
    let content = |prediction: &Json| match &prediction["content"] {
        Json::String(_) => true,
        Json::Array(parts) => parts
            .iter()
            .all(|part| part["type"] == "text" && part["text"].is_string()),
        _ => false,
    };
    match prediction {
        Some(prediction) if prediction["type"] != "content" || !content(prediction) => Err(ApiError::field(
            "prediction",
            "`prediction` must be an object with `type`: \"content\" and `content`: a string or text parts.",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields::FIELDS;
    use crate::generation::request::{OutputFormat, ToolChoice};
    use serde_json::json;

    fn parse(extra: Json) -> Result<(GenerationRequest, ChatOptions), ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        super::parse(body.to_string().as_bytes(), &GatewayConfig::default())
    }

    /// The request is refused with a 400 naming the field.
    fn refused(extra: Json, param: &str) {
        let error = parse(extra.clone()).expect_err(&extra.to_string());
        assert_eq!(
            (error.status.as_u16(), error.param.as_deref()),
            (400, Some(param)),
            "{extra}: {}",
            error.message
        );
    }

    #[test]
    fn takes_every_field_that_works() {
        let (request, options) = parse(
            json!({"max_tokens": 7, "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5,
            "top_k": -1, "seed": -1, "stop": "x", "ignore_eos": true, "stream": true, "user": "u",
            "stream_options": {"include_usage": true, "continuous_usage_stats": true, "include_obfuscation": true},
            "metadata": {"a": "b"}, "store": false, "n": 3, "tools": [], "logit_bias": {"7": -100, "8": 0.5},
            "logprobs": true, "top_logprobs": 2, "response_format": {"type": "text"}, "presence_penalty": -2.0,
            "frequency_penalty": 2, "repetition_penalty": 1.1, "min_p": 0.25, "min_tokens": 3, "stop_token_ids": [5],
            "include_stop_str_in_output": true, "skip_special_tokens": false, "tool_choice": null, "priority": -7,
            "cache_salt": "s", "reasoning_effort": "low", "chat_template_kwargs": {"a": 1}, "include_reasoning": false,
            "documents": [{"text": "d"}], "prediction": {"type": "content", "content": "guess"}}),
        )
        .unwrap();
        assert_eq!((request.priority, request.user.as_str(), request.n), (-7, "u", 3));
        let both = parse(json!({"user": "u", "safety_identifier": "s"})).unwrap();
        assert_eq!(both.0.user, "s");
        assert_eq!(request.max_tokens, Some(("max_completion_tokens", 7)));
        let sampling = &request.sampling;
        assert_eq!(
            (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed),
            (Some(0.0), Some(0.5), Some(0), Some(u64::MAX))
        );
        assert_eq!(
            (
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.repetition_penalty,
                sampling.min_p
            ),
            (Some(-2.0), Some(2.0), Some(1.1), Some(0.25))
        );
        assert_eq!(sampling.logit_bias, [(7, -100.0), (8, 0.5)]);
        let stop = &request.stop;
        assert!(stop.ignore_eos && stop.include && stop.min_tokens == 3 && stop.token_ids == [5]);
        assert_eq!(stop.strings, ["x"]);
        assert!(options.stream && options.include_usage && options.continuous_usage && options.obfuscation);
        assert!(options.logprobs && options.hide_reasoning && request.show_special_tokens);
        assert_eq!((request.logprobs, request.cache_salt.as_str()), (Some(2), "s"));
        let Prompt::Chat(chat) = &request.prompts[0] else {
            panic!()
        };
        assert_eq!(
            (chat.reasoning_effort.as_deref(), chat.documents.len()),
            (Some("low"), 1)
        );
    }

    #[test]
    fn refuses_bad_values_by_name() {
        for bad in [
            json!(0),
            json!(-1),
            json!(1e12),
            json!(1_000_000_000_000u64),
            json!(1.5),
            json!("7"),
            json!(true),
        ] {
            refused(json!({"max_tokens": bad}), "max_tokens");
            refused(json!({"max_completion_tokens": bad}), "max_completion_tokens");
            refused(json!({"n": bad}), "n");
        }
        refused(json!({"n": 129}), "n");
        refused(json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens");
        for bad in [json!(-0.1), json!(2.1), json!(1e300), json!("1"), json!([])] {
            refused(json!({"temperature": bad}), "temperature");
        }
        for name in ["presence_penalty", "frequency_penalty"] {
            for bad in [json!(-2.1), json!(2.1), json!("1")] {
                refused(json!({name: bad}), name);
            }
        }
        for bad in [json!(0), json!(-1), json!(2.1)] {
            refused(json!({"repetition_penalty": bad}), "repetition_penalty");
        }
        for bad in [json!(-0.1), json!(1.1)] {
            refused(json!({"min_p": bad}), "min_p");
        }
        for bad in [json!(0), json!(1.1), json!(-1), json!("x")] {
            refused(json!({"top_p": bad}), "top_p");
        }
        for bad in [json!(-2), json!(1.5), json!(1u64 << 40)] {
            refused(json!({"top_k": bad}), "top_k");
        }
        for bad in [json!(1.5), json!("1"), json!(1e30)] {
            refused(json!({"seed": bad}), "seed");
        }
        for bad in [
            json!([]),
            json!({"x": 1}),
            json!({"7": 101}),
            json!({"07": 1}),
            json!({"-1": 1}),
            json!({"7": "1"}),
        ] {
            refused(json!({"logit_bias": bad}), "logit_bias");
        }
        for bad in [
            json!(1),
            json!(""),
            json!(["a", 1]),
            json!(["a", "b", "c", "d", "e"]),
            json!("x".repeat(1025)),
        ] {
            refused(json!({"stop": bad}), "stop");
        }
        refused(json!({"stop_token_ids": [-1]}), "stop_token_ids");
        refused(json!({"stop_token_ids": vec![1; 65]}), "stop_token_ids");
        for bad in [json!(1.5), json!("1"), json!(true), json!(1e30)] {
            refused(json!({"priority": bad}), "priority");
        }
        for (far, taken) in [(json!(i64::MIN), -i32::MAX), (json!(u64::MAX), i32::MAX)] {
            assert_eq!(parse(json!({"priority": far})).unwrap().0.priority, taken);
        }
        refused(json!({"stream": "yes"}), "stream");
        refused(json!({"user": 7}), "user");
        refused(json!({"safety_identifier": "x".repeat(513)}), "safety_identifier");
        refused(json!({"stream_options": {"include_usage": true}}), "stream_options");
        refused(
            json!({"stream": true, "stream_options": {"odd": 1}}),
            "stream_options.odd",
        );
        refused(json!({"top_logprobs": 2}), "top_logprobs");
        refused(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs");
        refused(json!({"metadata": {"a": 1}}), "metadata");
        refused(json!({"prediction": {"type": "other"}}), "prediction");
        refused(json!({"reasoning_effort": "huge"}), "reasoning_effort");
        refused(
            json!({"chat_template_kwargs": {"messages": []}}),
            "chat_template_kwargs",
        );
        refused(json!({"cache_salt": ""}), "cache_salt");
        refused(json!({"model": 7}), "model");
        refused(json!({"model": null}), "model");
    }

    #[test]
    fn tools_and_formats_become_wishes() {
        let tool =
            json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": true}});
        let (request, _) =
            parse(json!({"tools": [tool], "tool_choice": "required", "parallel_tool_calls": false})).unwrap();
        assert!(request.tools.single && request.tools.tools[0].strict && request.tools.choice == ToolChoice::Required);
        let choice = json!({"type": "function", "function": {"name": "f"}});
        let (request, _) = parse(json!({"tools": [tool], "tool_choice": choice})).unwrap();
        assert_eq!(request.tools.choice, ToolChoice::Named("f".into()));
        let choice = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [choice]}});
        let (request, _) = parse(json!({"tools": [tool], "tool_choice": choice})).unwrap();
        let allowed = ToolChoice::Allowed {
            names: vec!["f".into()],
            required: true,
        };
        assert_eq!(request.tools.choice, allowed);
        let (request, options) = parse(json!({"functions": [{"name": "f"}], "function_call": {"name": "f"}})).unwrap();
        assert!(options.functions && request.tools.choice == ToolChoice::Named("f".into()) && request.tools.single);

        refused(json!({"tools": [{"type": "custom", "custom": {}}]}), "tools[0].type");
        refused(
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0].function.name",
        );
        refused(json!({"tools": [tool, tool]}), "tools[1].function.name");
        refused(
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}),
            "tools[0].function.parameters",
        );
        refused(json!({"tools": vec![tool.clone(); 129]}), "tools");
        refused(json!({"tool_choice": "sometimes"}), "tool_choice");
        refused(json!({"tools": [tool], "functions": [{"name": "f"}]}), "functions");

        let schema =
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}, "strict": true}});
        let (request, _) = parse(json!({"response_format": schema})).unwrap();
        let expected = OutputFormat::JsonSchema {
            schema: json!({"type": "null"}),
            strict: true,
        };
        assert_eq!((request.format, request.format_param), (expected, "response_format"));
        let format = |extra: Json| parse(extra).unwrap().0.format;
        assert_eq!(
            format(json!({"response_format": {"type": "json_object"}})),
            OutputFormat::JsonObject
        );
        assert_eq!(format(json!({"guided_regex": "a+"})), OutputFormat::Regex("a+".into()));
        assert_eq!(
            format(json!({"structured_outputs": {"choice": ["a"]}})),
            OutputFormat::Choice(vec!["a".into()])
        );
        assert_eq!(
            format(json!({"structured_outputs": {"grammar": "start: x"}})),
            OutputFormat::Lark("start: x".into())
        );
        refused(json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice");
        refused(json!({"structured_outputs": {"odd": 1}}), "structured_outputs.odd");
        refused(json!({"response_format": {"type": "xml"}}), "response_format.type");
        let large =
            json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "x".repeat(200_000)}}});
        refused(json!({"response_format": large}), "response_format");
        refused(json!({"guided_grammar": "x".repeat(70_000)}), "guided_grammar");
    }

    #[test]
    fn every_field_works_or_is_refused_by_name() {
        refused(json!({"bogus": 1}), "bogus");
        for field in FIELDS.iter().filter(|field| field.support == FieldSupport::Refused) {
            refused(json!({field.name: {"type": "odd"}}), field.name);
            parse(json!({field.name: null})).unwrap();
        }
    }

    #[test]
    fn refuses_what_is_no_json() {
        let deep = "[".repeat(100_000);
        let bodies: [&[u8]; 8] = [
            b"",
            b"{",
            b"[]",
            b"nul",
            b"{\"model\": NaN}",
            b"{\"temperature\": 1e999}",
            b"{\"a\": \"\xff\"}",
            deep.as_bytes(),
        ];
        let config = GatewayConfig::default();
        for body in bodies {
            assert_eq!(super::parse(body, &config).unwrap_err().status.as_u16(), 400);
        }
        assert!(super::parse(br#"{"model":"\ud800"}"#, &config).is_err());
    }
}
