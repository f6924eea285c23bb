//! A request for a response: from bytes to checked values. The table of fields is in [`fields`](super::fields), items are in
//! [`input`], tools in [`tools`].

use serde_json::{Map, Value as Json, json};

use super::fields::Field;
use super::{input, tools};
use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::fields::FieldSupport;
use crate::generation::request::{Chat, GenerationRequest, OutputFormat, Prompt};
use crate::params::Params;

/// Bytes of an id or of another short text.
const TEXT_BYTES_MAX: usize = baton_state::bounds::TEXT_BYTES_MAX;
/// Bytes of a schema's name.
const SCHEMA_NAME_CHARS_MAX: usize = 64;
/// What `include` may name. All but the first speak of tools that are refused, or of thoughts that are given anyway.
pub(crate) const INCLUDES: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];
const LOGPROBS: &str = "message.output_text.logprobs";
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// What of a request is the endpoint's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Wish {
    pub stream: bool,
    pub background: bool,
    pub store: bool,
    /// Deltas are padded.
    pub obfuscation: bool,
    /// What of the request every response object repeats.
    pub echo: Map<String, Json>,
    /// What goes before, of the responses before.
    pub earlier: Vec<Json>,
    /// The items of `input`.
    pub input: Vec<Json>,
}

/// What has to be known of a body before it is parsed.
#[derive(Default, serde::Deserialize)]
pub(crate) struct Peek {
    /// The response it follows.
    pub previous_response_id: Option<String>,
    background: Option<bool>,
}

impl Peek {
    /// What is wrong with the body is told by [`parse`].
    pub fn of(body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_default()
    }

    pub fn is_background(&self) -> bool {
        self.background == Some(true)
    }
}

/// Parses and checks a body. `earlier` are the items of the response that it follows and of those before.
pub(crate) fn parse(
    body: &[u8],
    config: &GatewayConfig,
    response_id: &str,
    earlier: Vec<Json>,
) -> Result<(GenerationRequest, Wish), ApiError> {
    let mut params = Params::parse(body)?;
    refuse_unsupported(&params.0)?;
    let model = params.model()?;
    let input = input::parse(params.take("input"), response_id, &earlier, config.messages_max)?;
    let previous = params.text("previous_response_id", TEXT_BYTES_MAX)?;
    if previous.is_some() && earlier.is_empty() {
        // A body that says it twice is read in two ways.
        let message = "`previous_response_id` must be given once.";
        return Err(ApiError::field("previous_response_id", message));
    }
    let instructions = params.text("instructions", usize::MAX)?;
    let stream = params.boolean("stream")?;
    let store = params.boolean_or("store", true)?;
    let background = params.boolean("background")?;
    if background && !store {
        let message = "`background` needs `store`: the answer would be lost.";
        return Err(ApiError::field("background", message));
    }
    let top_logprobs = params
        .count("top_logprobs", 0, config.top_logprobs_max as u64)?
        .unwrap_or(0);
    let logprobs = includes_logprobs(&params.0)? || top_logprobs > 0;
    let max_tokens = params.max_tokens(&["max_output_tokens"], "")?;
    let (format, shown_format) = text_format(params.get("text"), config)?;
    let effort = reasoning(params.get("reasoning"))?;
    let wishes = tools::parse(&params.0, config)?;
    params.check_metadata()?;
    params.count("max_tool_calls", 1, u64::from(u32::MAX))?;
    let mut echo = json!({
        "model": model,
        "instructions": instructions,
        "max_output_tokens": max_tokens.map(|(_, count)| count),
        "max_tool_calls": params.get("max_tool_calls"),
        "metadata": params.get("metadata").cloned().unwrap_or_else(|| json!({})),
        "parallel_tool_calls": !wishes.single,
        "previous_response_id": previous,
        "reasoning": {"effort": effort, "summary": null},
        "service_tier": "default",
        "store": store,
        "background": background,
        // As the client wrote them, not as 32 bits have them.
        "temperature": params.get("temperature"),
        "top_p": params.get("top_p"),
        "top_logprobs": top_logprobs,
        "text": {"format": shown_format, "verbosity": "medium"},
        "tool_choice": params.get("tool_choice").cloned().unwrap_or_else(|| "auto".into()),
        "tools": tools::shown(&wishes.tools),
        "truncation": "disabled",
    });
    for name in ["user", "safety_identifier", "prompt_cache_key"] {
        if let Some(value) = params.text(name, TEXT_BYTES_MAX)? {
            echo[name] = value.into();
        }
    }
    let Json::Object(echo) = echo else {
        return Err(ApiError::internal());
    };
    let messages = input::messages(instructions.as_deref(), earlier.iter().chain(&input));
    let request = GenerationRequest {
        model,
        prompts: vec![Prompt::Chat(Chat {
            messages,
            reasoning_effort: effort,
            ..Chat::default()
        })],
        n: 1,
        max_tokens,
        sampling: params.sampling()?,
        stop: params.stop(config)?,
        tools: wishes,
        format,
        format_param: "text.format",
        logprobs: logprobs.then_some(top_logprobs),
        priority: params.priority()?,
        user: params.user()?,
        cache_salt: params.cache_salt()?,
        ..GenerationRequest::default()
    };
    let wish = Wish {
        stream,
        background,
        store,
        obfuscation: obfuscation(&params.0, stream)?,
        echo,
        earlier,
        input,
    };
    Ok((request, wish))
}

fn refuse_unsupported(fields: &Map<String, Json>) -> Result<(), ApiError> {
    for (name, value) in fields {
        let asks_for_nothing = match name.as_str() {
            "truncation" => value == "disabled",
            "service_tier" => value == "auto" || value == "default",
            "prompt_cache_retention" => value == "in_memory" || value == "24h",
            _ => true,
        };
        match Field::find(name) {
            Some(field) if field.support != FieldSupport::Refused && asks_for_nothing => {}
            Some(field) => {
                let message = format!("`{name}` is not supported by this server: {}.", field.note);
                return Err(ApiError::unsupported(name, message.replace(": .", ".")));
            }
            None => {
                let shown: String = name.chars().take(64).collect();
                return Err(ApiError::unsupported(&shown, format!("Unknown field `{shown}`.")));
            }
        }
    }
    Ok(())
}

fn includes_logprobs(fields: &Map<String, Json>) -> Result<bool, ApiError> {
    let wrong = || {
        ApiError::field(
            "include",
            format!("`include` must be an array of {}.", INCLUDES.join(", ")),
        )
    };
    let names = match fields.get("include") {
        None => return Ok(false),
        Some(Json::Array(names)) => names,
        Some(_) => return Err(wrong()),
    };
    let known = |name: &Json| name.as_str().is_some_and(|name| INCLUDES.contains(&name));
    if !names.iter().all(known) {
        return Err(wrong());
    }
    Ok(names.iter().any(|name| name == LOGPROBS))
}

fn obfuscation(fields: &Map<String, Json>, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = fields.get("stream_options") else {
        return Ok(false);
    };
    let options = value
        .as_object()
        .ok_or_else(|| ApiError::field("stream_options", "`stream_options` must be an object."))?;
    if !stream {
        let message = "`stream_options` is only allowed with `stream: true`.";
        return Err(ApiError::field("stream_options", message));
    }
    let mut wanted = false;
    for (name, value) in options {
        match (name.as_str(), value) {
            ("include_obfuscation", Json::Bool(flag)) => wanted = *flag,
            ("include_obfuscation", Json::Null) => {}
            (other, _) => return Err(unknown("stream_options", other)),
        }
    }
    Ok(wanted)
}

fn unknown(place: &str, name: &str) -> ApiError {
    let param: String = format!("{place}.{name}").chars().take(96).collect();
    let message = format!("`{param}` is not supported by this server, or not with this value.");
    ApiError::unsupported(&param, message)
}

/// What the answer must be, and how the response says so.
fn text_format(value: Option<&Json>, config: &GatewayConfig) -> Result<(OutputFormat, Json), ApiError> {
    let plain = || json!({"type": "text"});
    let Some(value) = value else {
        return Ok((OutputFormat::Text, plain()));
    };
    let text = value
        .as_object()
        .ok_or_else(|| ApiError::field("text", "`text` must be an object."))?;
    let mut found = (OutputFormat::Text, plain());
    for (name, value) in text {
        match (name.as_str(), value) {
            (_, Json::Null) => {}
            ("verbosity", value) if value == "medium" => {}
            ("format", value) => found = format(value, config)?,
            (other, _) => return Err(unknown("text", other)),
        }
    }
    Ok(found)
}

fn format(value: &Json, config: &GatewayConfig) -> Result<(OutputFormat, Json), ApiError> {
    match value["type"].as_str() {
        Some("text") => Ok((OutputFormat::Text, json!({"type": "text"}))),
        Some("json_object") => Ok((OutputFormat::JsonObject, json!({"type": "json_object"}))),
        Some("json_schema") => {
            let name = value["name"].as_str().unwrap_or_default();
            if name.is_empty() || name.chars().count() > SCHEMA_NAME_CHARS_MAX {
                let message = format!("`text.format.name` must be text of 1 to {SCHEMA_NAME_CHARS_MAX} characters.");
                return Err(ApiError::field("text.format.name", message));
            }
            let schema = &value["schema"];
            if !schema.is_object() {
                let message = "`text.format.schema` must be a JSON schema, an object.";
                return Err(ApiError::field("text.format.schema", message));
            }
            if schema.to_string().len() > config.schema_bytes_max {
                let message = format!("`text.format.schema` is larger than {} bytes.", config.schema_bytes_max);
                return Err(ApiError::field("text.format.schema", message));
            }
            let strict = match &value["strict"] {
                Json::Null => false,
                Json::Bool(strict) => *strict,
                _ => {
                    let message = "`text.format.strict` must be true or false.";
                    return Err(ApiError::field("text.format.strict", message));
                }
            };
            let mut shown = json!({"type": "json_schema", "name": name, "schema": schema, "strict": strict});
            if let Some(description) = value["description"].as_str() {
                shown["description"] = description.into();
            }
            let format = OutputFormat::JsonSchema {
                schema: schema.clone(),
                strict,
            };
            Ok((format, shown))
        }
        _ => {
            let message = "`text.format.type` must be one of text, json_object, json_schema.";
            Err(ApiError::field("text.format.type", message))
        }
    }
}

/// How long to think.
fn reasoning(value: Option<&Json>) -> Result<Option<String>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let reasoning = value
        .as_object()
        .ok_or_else(|| ApiError::field("reasoning", "`reasoning` must be an object."))?;
    let mut effort = None;
    for (name, value) in reasoning {
        match (name.as_str(), value) {
            (_, Json::Null) => {}
            ("effort", Json::String(word)) if EFFORTS.contains(&word.as_str()) => effort = Some(word.clone()),
            ("effort", _) => {
                let message = format!("`reasoning.effort` must be one of {}.", EFFORTS.join(", "));
                return Err(ApiError::field("reasoning.effort", message));
            }
            ("summary" | "generate_summary" | "context", value) if value == "auto" => {}
            (other, _) => return Err(unknown("reasoning", other)),
        }
    }
    Ok(effort)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::responses::fields::FIELDS;

    const ID: &str = "resp_0123456789abcdef0123456789abcdef";

    fn parse(extra: Json) -> Result<(GenerationRequest, Wish), ApiError> {
        let mut body = json!({"model": "m", "input": "hi"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        super::parse(body.to_string().as_bytes(), &GatewayConfig::default(), ID, Vec::new())
    }

    #[test]
    fn takes_what_works() {
        let (request, wish) = parse(json!({"instructions": "be kind", "max_output_tokens": 7, "temperature": 0, "top_p": 0.5,
            "top_logprobs": 3, "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "stream": true,
            "stream_options": {"include_obfuscation": true}, "store": false, "metadata": {"a": "b"}, "user": "u",
            "reasoning": {"effort": "low", "summary": "auto"}, "truncation": "disabled", "service_tier": "auto",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": true}},
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": false}],
            "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": false, "seed": -1, "top_k": -1,
            "max_tool_calls": 3, "prompt_cache_key": "k", "background": false, "conversation": null}))
        .unwrap();
        assert!(wish.stream && wish.obfuscation && !wish.store && !wish.background);
        assert_eq!(
            (request.max_tokens, request.logprobs),
            (Some(("max_output_tokens", 7)), Some(3))
        );
        assert_eq!((request.user.as_str(), request.sampling.seed), ("u", Some(u64::MAX)));
        assert!(request.tools.single && request.tools.tools.len() == 1);
        assert!(matches!(request.format, OutputFormat::JsonSchema { .. }));
        assert_eq!(wish.echo["text"]["format"]["name"], "n");
        assert_eq!(wish.echo["metadata"], json!({"a": "b"}));
        assert_eq!(wish.echo["reasoning"]["effort"], "low");
        let plain = parse(json!({})).unwrap().1;
        assert!(plain.store && !plain.stream && plain.echo["parallel_tool_calls"] == true);
    }

    #[test]
    fn refuses_by_name() {
        for (extra, param) in [
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"max_output_tokens": 0}), "max_output_tokens"),
            (json!({"max_output_tokens": 1.5}), "max_output_tokens"),
            (json!({"top_logprobs": 21}), "top_logprobs"),
            (json!({"include": ["odd"]}), "include"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stream_options": {}}), "stream_options"),
            (
                json!({"stream": true, "stream_options": {"odd": 1}}),
                "stream_options.odd",
            ),
            (json!({"background": true, "store": false}), "background"),
            (json!({"truncation": "auto"}), "truncation"),
            (json!({"service_tier": "flex"}), "service_tier"),
            (json!({"metadata": {"a": 1}}), "metadata"),
            (json!({"metadata": {"a": "x".repeat(513)}}), "metadata"),
            (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
            (json!({"text": {"format": {"type": "odd"}}}), "text.format.type"),
            (
                json!({"text": {"format": {"type": "json_schema", "schema": {}}}}),
                "text.format.name",
            ),
            (
                json!({"text": {"format": {"type": "json_schema", "name": "n"}}}),
                "text.format.schema",
            ),
            (json!({"reasoning": {"effort": "odd"}}), "reasoning.effort"),
            (json!({"reasoning": {"summary": "detailed"}}), "reasoning.summary"),
            (json!({"reasoning": {"mode": "pro"}}), "reasoning.mode"),
            (json!({"user": 7}), "user"),
            (json!({"instructions": 7}), "instructions"),
            (json!({"odd": 7}), "odd"),
            (json!({"messages": []}), "messages"),
            (json!({"model": 7}), "model"),
            (json!({"input": 7}), "input"),
        ] {
            let error = parse(extra.clone()).expect_err(&extra.to_string());
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{extra}"
            );
        }
    }

    #[test]
    fn every_refused_field_is_refused_whatever_it_says() {
        for field in FIELDS.iter().filter(|field| field.support == FieldSupport::Refused) {
            for value in [json!(1), json!("x"), json!([]), json!({}), json!(false)] {
                let error = parse(json!({field.name: value})).expect_err(field.name);
                assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(field.name)));
            }
            parse(json!({field.name: null})).unwrap();
        }
    }
}
