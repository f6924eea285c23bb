//! A request for a message: from bytes to the neutral request.

use serde_json::{Map, Value as Json};

use super::messages;
use crate::api_error::ApiError;
use crate::body::Body;
use crate::config::GatewayConfig;
use crate::generation::request::{
    Chat, GenerationRequest, OutputFormat, Prompt, SamplingWishes, StopWishes, Tool, ToolChoice, ToolWishes,
};
use crate::params::{MAX_TOKENS_MAX, STOP_BYTES_MAX, USER_BYTES_MAX};

/// Bytes of a tool's name, as Anthropic has it.
const NAME_BYTES_MAX: usize = 64;
/// The least that may be set aside for thinking, as Anthropic has it.
const BUDGET_TOKENS_MIN: u32 = 1024;

/// The fields, as the API's description lists them. A test holds them against [`parse`].
pub(crate) const FIELDS: &[&str] = &[
    "model",
    "messages",
    "max_tokens",
    "system",
    "temperature",
    "top_p",
    "top_k",
    "stop_sequences",
    "stream",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "metadata",
    "service_tier",
];

/// The fields that count toward a prompt.
pub(crate) const COUNT_FIELDS: &[&str] = &[
    "model",
    "messages",
    "system",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
];

/// What of a request is this endpoint's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MessageOptions {
    pub stream: bool,
}

/// Parses and checks a body.
pub(crate) fn parse(bytes: &[u8], config: &GatewayConfig) -> Result<(GenerationRequest, MessageOptions), ApiError> {
    let mut body = Body::parse(bytes)?;
    let max_tokens = body.count("max_tokens", 1, MAX_TOKENS_MAX as u32)?;
    let max_tokens = max_tokens.ok_or_else(|| body.missing("max_tokens"))?;
    let mut request = prompt(&mut body, config, Some(max_tokens))?;
    request.max_tokens = Some(("max_tokens", max_tokens));
    request.sampling = SamplingWishes {
        temperature: body.number("temperature", "from 0 to 1", |value| (0.0..=1.0).contains(&value))?,
        top_p: body.number("top_p", "above 0 and at most 1", |value| value > 0.0 && value <= 1.0)?,
        top_k: body.count("top_k", 0, i32::MAX as u32)?,
        ..SamplingWishes::default()
    };
    request.stop = StopWishes {
        strings: stop_sequences(&mut body, config.stops_max)?,
        ..StopWishes::default()
    };
    if let Some(mut metadata) = body.object("metadata")? {
        request.user = metadata.text("user_id")?.unwrap_or_default();
        if request.user.len() > USER_BYTES_MAX {
            return Err(metadata.wrong(
                "user_id",
                format_args!("must be a string of at most {USER_BYTES_MAX} bytes"),
            ));
        }
        metadata.finish()?;
    }
    match body.text("service_tier")?.as_deref() {
        None | Some("auto" | "standard_only") => {}
        Some(_) => return Err(body.wrong("service_tier", "must be \"auto\" or \"standard_only\"")),
    }
    let stream = body.flag("stream", false)?;
    body.finish()?;
    Ok((request, MessageOptions { stream }))
}

/// The same without what says how to answer.
pub(crate) fn parse_count(bytes: &[u8], config: &GatewayConfig) -> Result<GenerationRequest, ApiError> {
    let mut body = Body::parse(bytes)?;
    let request = prompt(&mut body, config, None)?;
    body.finish()?;
    Ok(request)
}

/// Everything that makes the prompt.
fn prompt(body: &mut Body, config: &GatewayConfig, max_tokens: Option<u32>) -> Result<GenerationRequest, ApiError> {
    let model = body.needed_text("model")?;
    let messages = messages::parse(body, config.messages_max)?;
    let mut template_kwargs = Map::new();
    if let Some(thinks) = thinking(body, max_tokens)? {
        template_kwargs.insert("enable_thinking".into(), thinks.into());
    }
    let (format, reasoning_effort) = output_config(body, config)?;
    Ok(GenerationRequest {
        model,
        prompts: vec![Prompt::Chat(Chat {
            messages,
            template_kwargs,
            reasoning_effort,
            ..Chat::default()
        })],
        n: 1,
        tools: tools(body, config)?,
        format,
        format_param: "output_config.format",
        ..GenerationRequest::default()
    })
}

fn stop_sequences(body: &mut Body, most: usize) -> Result<Vec<String>, ApiError> {
    let list = body.list("stop_sequences", most)?.unwrap_or_default();
    let fits = |text: &Json| {
        let text = text.as_str().filter(|text| (1..=STOP_BYTES_MAX).contains(&text.len()));
        text.map(str::to_owned)
    };
    let texts: Option<Vec<String>> = list.iter().map(fits).collect();
    texts.ok_or_else(|| {
        body.wrong(
            "stop_sequences",
            format_args!("must be strings of 1 to {STOP_BYTES_MAX} bytes"),
        )
    })
}

/// Whether the model is to think; `None` leaves it to the template. How long is a target of Anthropic's models, which open
/// models do not know: the number is checked and no more.
fn thinking(body: &mut Body, max_tokens: Option<u32>) -> Result<Option<bool>, ApiError> {
    let Some(mut thinking) = body.object("thinking")? else {
        return Ok(None);
    };
    let thinks = match thinking.needed_text("type")?.as_str() {
        "enabled" => {
            let budget = thinking.count("budget_tokens", BUDGET_TOKENS_MIN, MAX_TOKENS_MAX as u32)?;
            let budget = budget.ok_or_else(|| thinking.missing("budget_tokens"))?;
            if max_tokens.is_some_and(|most| budget >= most) {
                return Err(thinking.wrong("budget_tokens", "must be less than `max_tokens`"));
            }
            true
        }
        "adaptive" => true,
        "disabled" => false,
        _ => return Err(thinking.wrong("type", "must be \"enabled\", \"adaptive\" or \"disabled\"")),
    };
    thinking.finish()?;
    Ok(Some(thinks))
}

/// A schema for the answer, and how hard to think.
fn output_config(body: &mut Body, config: &GatewayConfig) -> Result<(OutputFormat, Option<String>), ApiError> {
    let Some(mut output) = body.object("output_config")? else {
        return Ok((OutputFormat::Text, None));
    };
    let effort = output.text("effort")?;
    if effort
        .as_ref()
        .is_some_and(|effort| !["low", "medium", "high", "xhigh", "max"].contains(&effort.as_str()))
    {
        return Err(output.wrong("effort", "must be low, medium, high, xhigh or max"));
    }
    let format = match output.object("format")? {
        None => OutputFormat::Text,
        Some(mut format) => {
            if format.needed_text("type")? != "json_schema" {
                return Err(format.wrong("type", "must be \"json_schema\""));
            }
            let schema = format.take("schema").ok_or_else(|| format.missing("schema"))?;
            check_schema(&format, "schema", &schema, config)?;
            format.finish()?;
            OutputFormat::JsonSchema { schema, strict: true }
        }
    };
    output.finish()?;
    Ok((format, effort))
}

fn check_schema(body: &Body, name: &str, schema: &Json, config: &GatewayConfig) -> Result<(), ApiError> {
    let most = config.schema_bytes_max;
    if schema.is_object() && schema.to_string().len() <= most {
        Ok(())
    } else {
        Err(body.wrong(
            name,
            format_args!("must be a JSON schema, an object of at most {most} bytes"),
        ))
    }
}

fn tools(body: &mut Body, config: &GatewayConfig) -> Result<ToolWishes, ApiError> {
    let list = body.list("tools", config.tools_max)?.unwrap_or_default();
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (at, tool) in list.into_iter().enumerate() {
        let tool = self::tool(tool, &format!("tools[{at}]"), config)?;
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(body.wrong("tools", format_args!("has `{}` twice", tool.name)));
        }
        tools.push(tool);
    }
    let Some(mut choice) = body.object("tool_choice")? else {
        return Ok(ToolWishes {
            tools,
            ..ToolWishes::default()
        });
    };
    let kind = choice.needed_text("type")?;
    let wished = match kind.as_str() {
        "auto" => ToolChoice::Auto,
        "any" => ToolChoice::Required,
        "none" => ToolChoice::None,
        "tool" => ToolChoice::Named(choice.needed_text("name")?),
        _ => return Err(choice.wrong("type", "must be \"auto\", \"any\", \"tool\" or \"none\"")),
    };
    let single = choice.flag("disable_parallel_tool_use", false)? || matches!(wished, ToolChoice::Named(_));
    choice.finish()?;
    Ok(ToolWishes {
        tools,
        choice: wished,
        single,
    })
}

fn tool(value: Json, place: &str, config: &GatewayConfig) -> Result<Tool, ApiError> {
    let mut tool = Body::nested(value, place)?;
    match tool.text("type")?.as_deref() {
        None | Some("custom") => {}
        Some(_) => {
            let place = tool.name("type");
            let message = format!("`{place}`: only tools of the client's own are supported (`custom`).");
            return Err(ApiError::unsupported(&place, message));
        }
    }
    let name = tool.needed_text("name")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(plain) {
        return Err(tool.wrong("name", "must be 1 to 64 letters, digits, underscores and dashes"));
    }
    let description = tool.text("description")?;
    let schema = tool.take("input_schema").ok_or_else(|| tool.missing("input_schema"))?;
    check_schema(&tool, "input_schema", &schema, config)?;
    let strict = tool.flag("strict", false)?;
    // Prefixes are cached without being marked.
    tool.ignore(&["cache_control"]);
    tool.finish()?;
    Ok(Tool {
        name,
        description,
        parameters: Some(schema),
        strict,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Json) -> Result<(GenerationRequest, MessageOptions), ApiError> {
        let mut body = json!({"model": "m", "max_tokens": 2048, "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        super::parse(body.to_string().as_bytes(), &GatewayConfig::default())
    }

    /// A field that nobody looks at would be ignored in silence; one that is not listed is refused.
    #[test]
    fn every_field_is_looked_at_and_listed() {
        for name in FIELDS {
            let error = parse(json!({*name: {"odd": [[]]}})).expect_err(name);
            let param = error.param.unwrap();
            assert!(error.status == 400 && param.starts_with(name), "{name}: {param}");
        }
        for name in COUNT_FIELDS {
            let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
            body[*name] = json!({"odd": [[]]});
            let error = parse_count(body.to_string().as_bytes(), &GatewayConfig::default()).expect_err(name);
            assert!(error.param.unwrap().starts_with(name));
        }
    }

    #[test]
    fn fields_become_wishes() {
        let (request, options) = parse(json!({"temperature": 0.5, "top_k": 7, "stop_sequences": ["x"], "stream": true,
            "metadata": {"user_id": "u"}, "service_tier": "auto", "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}],
            "tool_choice": {"type": "tool", "name": "f"}}))
        .unwrap();
        assert!(options.stream);
        assert_eq!(
            (request.user.as_str(), request.max_tokens),
            ("u", Some(("max_tokens", 2048)))
        );
        assert_eq!((request.sampling.top_k, request.stop.strings.len()), (Some(7), 1));
        assert_eq!(request.tools.choice, ToolChoice::Named("f".into()));
        assert!(request.tools.single && request.tools.tools[0].name == "f");
        let Prompt::Chat(chat) = &request.prompts[0] else {
            panic!("no chat")
        };
        assert_eq!(chat.template_kwargs["enable_thinking"], json!(true));
        assert_eq!(chat.reasoning_effort.as_deref(), Some("low"));
        assert!(matches!(request.format, OutputFormat::JsonSchema { strict: true, .. }));
    }

    #[test]
    fn what_does_not_work_is_refused_by_name() {
        for (bad, param) in [
            (json!({"max_tokens": null}), "max_tokens"),
            (json!({"temperature": 1.5}), "temperature"),
            (json!({"stop_sequences": ["a", "b", "c", "d", "e"]}), "stop_sequences"),
            (json!({"stop_sequences": [""]}), "stop_sequences"),
            (json!({"thinking": {"type": "enabled"}}), "thinking.budget_tokens"),
            (
                json!({"thinking": {"type": "enabled", "budget_tokens": 4096}}),
                "thinking.budget_tokens",
            ),
            (
                json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}),
                "tools[0].type",
            ),
            (json!({"tools": [{"name": "a b", "input_schema": {}}]}), "tools[0].name"),
            (json!({"tools": [{"name": "a"}]}), "tools[0].input_schema"),
            (json!({"tool_choice": {"type": "tool"}}), "tool_choice.name"),
            (json!({"mcp_servers": []}), "mcp_servers"),
            (json!({"metadata": {"odd": 1}}), "metadata.odd"),
        ] {
            let error = parse(bad.clone()).expect_err(&bad.to_string());
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{}",
                error.message
            );
        }
    }
}
