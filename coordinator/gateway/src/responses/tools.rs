//! The tools of a response: functions. Those that run at OpenAI are refused by name.

use serde_json::{Map, Value as Json, json};

use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::generation::request::{Tool, ToolChoice, ToolWishes};

/// Characters of a function's name, OpenAI's limit.
const NAME_CHARS_MAX: usize = 64;

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
pub(crate) fn parse(fields: &Map<String, Json>, config: &GatewayConfig) -> Result<ToolWishes, ApiError> {
    let tools_max = config.tools_max;
    let tools = match fields.get("tools") {
        None => Vec::new(),
        Some(Json::Array(tools)) if tools.len() <= tools_max => {
            let tools = tools.iter().enumerate();
            tools
                .map(|(at, tool)| one(tool, &format!("tools[{at}]"), config))
                .collect::<Result<Vec<_>, _>>()?
        }
        Some(_) => {
            let message = format!("`tools` must be an array of at most {tools_max} functions.");
            return Err(ApiError::field("tools", message));
        }
    };
    for (at, tool) in tools.iter().enumerate() {
        if tools[..at].iter().any(|other| other.name == tool.name) {
            let param = format!("tools[{at}].name");
            let message = format!("`{param}` is the name of another function too.");
            return Err(ApiError::field(param, message));
        }
    }
    let single = match fields.get("parallel_tool_calls") {
        None => false,
        Some(Json::Bool(parallel)) => !parallel,
        Some(_) => {
            let message = "`parallel_tool_calls` must be true or false.";
            return Err(ApiError::field("parallel_tool_calls", message));
        }
    };
    Ok(ToolWishes {
        choice: choice(fields.get("tool_choice"), &tools, tools_max)?,
        tools,
        single,
    })
}

fn one(tool: &Json, place: &str, config: &GatewayConfig) -> Result<Tool, ApiError> {
    let wrong = |name: &str, what: &str| {
        let param = format!("{place}.{name}");
        let message = format!("`{param}` {what}.");
        ApiError::field(param, message)
    };
    let Some(fields) = tool.as_object() else {
        return Err(ApiError::field(place, format!("`{place}` must be an object.")));
    };
    match fields.get("type") {
        Some(kind) if kind == "function" => {}
        Some(Json::String(kind)) => {
            let shown: String = kind.chars().take(64).collect();
            let param = format!("{place}.type");
            let message = format!("`{param}`: `{shown}` is not supported by this server; it takes functions only.");
            return Err(ApiError::unsupported(&param, message));
        }
        _ => return Err(wrong("type", "must be `function`")),
    }
    let mut found = Tool {
        name: String::new(),
        description: None,
        parameters: None,
        // As OpenAI has it for responses.
        strict: true,
    };
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("type", _) | (_, Json::Null) => {}
            ("name", Json::String(text)) => found.name.clone_from(text),
            ("description", Json::String(text)) => found.description = Some(text.clone()),
            ("parameters", Json::Object(_)) if value.to_string().len() > config.schema_bytes_max => {
                return Err(wrong(
                    name,
                    &format!("is larger than {} bytes", config.schema_bytes_max),
                ));
            }
            ("parameters", Json::Object(_)) => found.parameters = Some(value.clone()),
            ("strict", Json::Bool(strict)) => found.strict = *strict,
            ("defer_loading", Json::Bool(false)) => {}
            ("name" | "description", _) => return Err(wrong(name, "must be text")),
            ("parameters", _) => return Err(wrong(name, "must be a JSON schema, an object")),
            ("strict", _) => return Err(wrong(name, "must be true or false")),
            (other, _) => {
                let param: String = format!("{place}.{other}").chars().take(96).collect();
                let message = format!("`{param}` is not supported by this server.");
                return Err(ApiError::unsupported(&param, message));
            }
        }
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if found.name.is_empty() || found.name.len() > NAME_CHARS_MAX || !found.name.chars().all(plain) {
        let what = format!("must be 1 to {NAME_CHARS_MAX} letters, digits, underscores and dashes");
        return Err(wrong("name", &what));
    }
    Ok(found)
}

fn choice(value: Option<&Json>, tools: &[Tool], tools_max: usize) -> Result<ToolChoice, ApiError> {
    let known = |name: &Json, param: &str| -> Result<String, ApiError> {
        let found = name.as_str().filter(|name| tools.iter().any(|tool| tool.name == *name));
        found.map(str::to_owned).ok_or_else(|| {
            let message = format!("`{param}` must be the name of one of `tools`.");
            ApiError::field(param, message)
        })
    };
    let needs_tools = |choice| {
        if tools.is_empty() {
            let message = "`tool_choice` needs `tools`.";
            return Err(ApiError::field("tool_choice", message));
        }
        Ok(choice)
    };
    let Some(value) = value else {
        return Ok(ToolChoice::Auto);
    };
    match (value.as_str(), value["type"].as_str()) {
        (Some("auto"), _) => Ok(ToolChoice::Auto),
        (Some("none"), _) => Ok(ToolChoice::None),
        (Some("required"), _) => needs_tools(ToolChoice::Required),
        (_, Some("function")) => known(&value["name"], "tool_choice.name").map(ToolChoice::Named),
        (_, Some("allowed_tools")) => {
            let required = match value["mode"].as_str() {
                Some("auto") => false,
                Some("required") => true,
                _ => {
                    let message = "`tool_choice.mode` must be auto or required.";
                    return Err(ApiError::field("tool_choice.mode", message));
                }
            };
            let list = value["tools"]
                .as_array()
                .filter(|list| (1..=tools_max).contains(&list.len()));
            let list = list.ok_or_else(|| {
                let message = format!("`tool_choice.tools` must be an array of 1 to {tools_max} functions.");
                ApiError::field("tool_choice.tools", message)
            })?;
            let names = list.iter().enumerate().map(|(at, tool)| {
                let param = format!("tool_choice.tools[{at}]");
                if tool["type"] != "function" {
                    let message = format!("`{param}.type` must be `function`.");
                    return Err(ApiError::unsupported(&format!("{param}.type"), message));
                }
                known(&tool["name"], &format!("{param}.name"))
            });
            let names = names.collect::<Result<Vec<_>, _>>()?;
            Ok(ToolChoice::Allowed { names, required })
        }
        _ => {
            let message = "`tool_choice` must be none, auto, required, a function or allowed_tools.";
            Err(ApiError::unsupported("tool_choice", message))
        }
    }
}

/// The functions as a response shows them.
pub(crate) fn shown(tools: &[Tool]) -> Vec<Json> {
    let shown = tools.iter().map(|tool| {
        let mut shown =
            json!({"type": "function", "name": tool.name, "parameters": tool.parameters, "strict": tool.strict});
        if let Some(description) = &tool.description {
            shown["description"] = description.as_str().into();
        }
        shown
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fields: Json) -> Result<ToolWishes, ApiError> {
        parse(fields.as_object().unwrap(), &GatewayConfig::default())
    }

    fn f() -> Json {
        json!([{"type": "function", "name": "f"}, {"type": "function", "name": "g", "description": "d", "strict": false}])
    }

    #[test]
    fn reads_functions_and_choices() {
        let wishes = read(json!({"tools": f()})).unwrap();
        assert!(wishes.tools[0].strict && !wishes.tools[1].strict && !wishes.single);
        assert_eq!(shown(&wishes.tools)[1]["description"], "d");
        for (choice, expected) in [
            (json!("auto"), ToolChoice::Auto),
            (json!("none"), ToolChoice::None),
            (json!("required"), ToolChoice::Required),
            (json!({"type": "function", "name": "g"}), ToolChoice::Named("g".into())),
            (
                json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}),
                ToolChoice::Allowed {
                    names: vec!["f".into()],
                    required: true,
                },
            ),
        ] {
            assert_eq!(
                read(json!({"tools": f(), "tool_choice": choice})).unwrap().choice,
                expected
            );
        }
    }

    #[test]
    fn refuses_by_name() {
        for (fields, param) in [
            (json!({"tools": 7}), "tools"),
            (json!({"tools": [7]}), "tools[0]"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
            (json!({"tools": [{"type": "function", "name": "a b"}]}), "tools[0].name"),
            (
                json!({"tools": [{"type": "function", "name": "f"}, {"type": "function", "name": "f"}]}),
                "tools[1].name",
            ),
            (
                json!({"tools": [{"type": "function", "name": "f", "parameters": 7}]}),
                "tools[0].parameters",
            ),
            (
                json!({"tools": [{"type": "function", "name": "f", "odd": 7}]}),
                "tools[0].odd",
            ),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (
                json!({"tools": f(), "tool_choice": {"type": "function", "name": "h"}}),
                "tool_choice.name",
            ),
            (
                json!({"tools": f(), "tool_choice": {"type": "file_search"}}),
                "tool_choice",
            ),
            (
                json!({"tools": f(), "tool_choice": {"type": "allowed_tools", "tools": []}}),
                "tool_choice.mode",
            ),
            (json!({"parallel_tool_calls": 7}), "parallel_tool_calls"),
        ] {
            let error = read(fields.clone()).expect_err(&fields.to_string());
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{fields}"
            );
        }
    }
}
