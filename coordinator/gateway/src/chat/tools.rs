//! `tools`, `tool_choice` and `parallel_tool_calls`, and their older names `functions` and `function_call`, as wishes.

use serde_json::Value as Json;

use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::generation::request::{Tool, ToolChoice, ToolWishes};
use crate::params::Params;

/// OpenAI's limit of a function's name.
const NAME_BYTES_MAX: usize = 64;

/// The wishes, and whether they were spoken in the older words.
pub(super) fn parse(params: &Params, config: &GatewayConfig) -> Result<(ToolWishes, bool), ApiError> {
    let functions = params
        .get("functions")
        .is_some_and(|functions| functions != &Json::Array(Vec::new()));
    if functions
        && params
            .get("tools")
            .is_some_and(|tools| tools != &Json::Array(Vec::new()))
    {
        return Err(ApiError::field(
            "functions",
            "`functions` is the older name of `tools`; send only `tools`.",
        ));
    }
    if functions && params.get("tool_choice").is_some() {
        return Err(ApiError::field(
            "tool_choice",
            "`tool_choice` needs `tools`; with `functions` it is `function_call`.",
        ));
    }
    let name = if functions { "functions" } else { "tools" };
    let tools = list(params.get(name), name, config)?;
    let choice = if functions {
        function_call(params.get("function_call"))?
    } else {
        tool_choice(params.get("tool_choice"))?
    };
    // Without tools these ask for nothing.
    let parallel = params.boolean_or("parallel_tool_calls", true)?;
    if !functions {
        function_call(params.get("function_call")).and_then(|choice| match choice {
            ToolChoice::Auto | ToolChoice::None => Ok(()),
            _ => Err(ApiError::field("function_call", "`function_call` needs `functions`.")),
        })?;
    }
    let single = functions || !parallel || matches!(choice, ToolChoice::Named(_));
    Ok((ToolWishes { tools, choice, single }, functions))
}

fn list(value: Option<&Json>, name: &str, config: &GatewayConfig) -> Result<Vec<Tool>, ApiError> {
    let most = config.tools_max;
    let items = match value {
        None => return Ok(Vec::new()),
        Some(Json::Array(items)) if items.len() <= most => items,
        Some(_) => {
            let message = format!("`{name}` must be an array of at most {most} functions.");
            return Err(ApiError::field(name, message));
        }
    };
    let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
    for (at, item) in items.iter().enumerate() {
        let mut place = format!("{name}[{at}]");
        let function = if name == "functions" {
            item
        } else {
            if item["type"] != "function" {
                let param = format!("{place}.type");
                let message = format!("`{param}` must be \"function\"; other tools are not supported.");
                return Err(ApiError::unsupported(&param, message));
            }
            place.push_str(".function");
            &item["function"]
        };
        let tool = one(function, &place, config)?;
        if tools.iter().any(|other| other.name == tool.name) {
            let param = format!("{place}.name");
            return Err(ApiError::field(
                param.clone(),
                format!("`{param}`: `{}` is there twice.", tool.name),
            ));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn one(function: &Json, place: &str, config: &GatewayConfig) -> Result<Tool, ApiError> {
    let wrong = |field: &str, what: &str| {
        let param = format!("{place}.{field}");
        ApiError::field(param.clone(), format!("`{param}` must be {what}."))
    };
    let Some(fields) = function.as_object() else {
        return Err(ApiError::field(place, format!("`{place}` must be an object.")));
    };
    let name = function["name"].as_str().filter(|name| is_name(name));
    let name = name.ok_or_else(|| wrong("name", "1 to 64 letters, digits, underscores and dashes"))?;
    let mut tool = Tool {
        name: name.to_owned(),
        description: None,
        parameters: None,
        strict: false,
    };
    for (field, value) in fields {
        match (field.as_str(), value) {
            ("name", _) | (_, Json::Null) => {}
            ("description", Json::String(text)) => tool.description = Some(text.clone()),
            ("description", _) => return Err(wrong(field, "a string")),
            ("parameters", Json::Object(_)) if value.to_string().len() <= config.schema_bytes_max => {
                tool.parameters = Some(value.clone());
            }
            ("parameters", _) => {
                let what = format!("a JSON schema, an object of at most {} bytes", config.schema_bytes_max);
                return Err(wrong(field, &what));
            }
            ("strict", Json::Bool(strict)) => tool.strict = *strict,
            ("strict", _) => return Err(wrong(field, "true or false")),
            _ => {
                let param: String = format!("{place}.{field}").chars().take(96).collect();
                return Err(ApiError::unsupported(&param, format!("Unknown field `{param}`.")));
            }
        }
    }
    Ok(tool)
}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

fn tool_choice(value: Option<&Json>) -> Result<ToolChoice, ApiError> {
    let wrong = || {
        ApiError::field(
            "tool_choice",
            "`tool_choice` must be \"none\", \"auto\", \"required\", one function ({\"type\": \"function\", \"function\": \
             {\"name\": ...}}) or some of them ({\"type\": \"allowed_tools\", ...}).",
        )
    };
    let named = |choice: &Json| {
        let name = choice["function"]["name"]
            .as_str()
            .filter(|_| choice["type"] == "function");
        name.map(str::to_owned)
    };
    let Some(value) = value else {
        return Ok(ToolChoice::Auto);
    };
    match value.as_str() {
        Some("auto") => return Ok(ToolChoice::Auto),
        Some("none") => return Ok(ToolChoice::None),
        Some("required") => return Ok(ToolChoice::Required),
        _ => {}
    }
    if value["type"] != "allowed_tools" {
        return named(value).map(ToolChoice::Named).ok_or_else(wrong);
    }
    let allowed = &value["allowed_tools"];
    let tools = allowed["tools"]
        .as_array()
        .filter(|tools| !tools.is_empty())
        .ok_or_else(wrong)?;
    let required = match allowed["mode"].as_str() {
        Some("auto") => false,
        Some("required") => true,
        _ => return Err(wrong()),
    };
    let names = tools
        .iter()
        .map(|tool| named(tool).ok_or_else(wrong))
        .collect::<Result<_, _>>()?;
    Ok(ToolChoice::Allowed { names, required })
}

fn function_call(value: Option<&Json>) -> Result<ToolChoice, ApiError> {
    let name = value.and_then(|value| value["name"].as_str());
    match (value.and_then(Json::as_str), name) {
        _ if value.is_none() => Ok(ToolChoice::Auto),
        (Some("auto"), _) => Ok(ToolChoice::Auto),
        (Some("none"), _) => Ok(ToolChoice::None),
        (None, Some(name)) => Ok(ToolChoice::Named(name.to_owned())),
        _ => Err(ApiError::field(
            "function_call",
            "`function_call` must be \"none\", \"auto\" or {\"name\": ...}.",
        )),
    }
}
