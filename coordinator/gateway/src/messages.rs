//! The `messages` of a chat request, checked and brought into the one shape that templates read: `content` a string or
//! null, text parts joined by newlines (as vLLM does). Images, audio and files are refused; nothing is ever fetched.

use serde_json::{Map, Value as Json};

use crate::api_error::ApiError;

/// Tool calls in one assistant message: more than a model makes in one turn.
const TOOL_CALLS_MAX: usize = 128;
/// Text parts of one message.
const PARTS_MAX: usize = 1024;

/// Parses and checks the messages.
pub(crate) fn parse(value: Option<Json>, messages_max: usize) -> Result<Vec<Json>, ApiError> {
    let messages = match value {
        Some(Json::Array(messages)) => messages,
        Some(_) => return Err(ApiError::field("messages", "`messages` must be an array.")),
        None => return Err(ApiError::field("messages", "`messages` is missing.")),
    };
    if messages.is_empty() {
        return Err(ApiError::field(
            "messages",
            "`messages` is empty; send at least one message.",
        ));
    }
    if messages.len() > messages_max {
        let message = format!(
            "`messages` has {} messages; at most {messages_max} are taken.",
            messages.len()
        );
        return Err(ApiError::field("messages", message));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(at, message)| one(message, &format!("messages[{at}]")))
        .collect()
}

fn one(message: Json, place: &str) -> Result<Json, ApiError> {
    let Json::Object(mut fields) = message else {
        return Err(ApiError::field(place, format!("`{place}` must be an object.")));
    };
    fields.retain(|_, value| !value.is_null());
    let role = match fields.remove("role") {
        Some(Json::String(role)) => role,
        _ => {
            return Err(ApiError::field(
                format!("{place}.role"),
                format!("`{place}.role` must be a string."),
            ));
        }
    };
    let role = match role.as_str() {
        // Newer name of the same role; templates know the older one.
        "developer" => "system",
        // The older name of a tool's.
        "function" => "tool",
        "system" | "user" | "assistant" | "tool" => role.as_str(),
        _ => {
            let message = format!("`{place}.role` must be one of system, developer, user, assistant, tool, function.");
            return Err(ApiError::field(format!("{place}.role"), message));
        }
    };
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    if let Some(call) = fields.remove("function_call") {
        // The older spelling of one call.
        let call = serde_json::json!([{"id": call["name"], "type": "function", "function": call}]);
        if role != "assistant" || fields.contains_key("tool_calls") {
            return Err(unsupported(place, "function_call"));
        }
        fields.insert("tool_calls".into(), call);
    }
    let tool_calls = match fields.remove("tool_calls") {
        Some(Json::Array(calls)) if calls.is_empty() => None,
        Some(calls) if role == "assistant" => Some(parse_tool_calls(calls, place)?),
        Some(_) => return Err(unsupported(place, "tool_calls")),
        None => None,
    };
    let content = fields.remove("content");
    // A refusal is what the assistant said.
    let content = match fields.remove("refusal") {
        Some(Json::String(refusal)) if role == "assistant" && content.is_none() => Some(Json::String(refusal)),
        Some(_) => return Err(unsupported(place, "refusal")),
        None => content,
    };
    let content = match content {
        Some(content) => Json::String(text(content, &format!("{place}.content"))?),
        None if tool_calls.is_some() => Json::Null,
        None => {
            let message = format!("`{place}.content` is missing.");
            return Err(ApiError::field(format!("{place}.content"), message));
        }
    };
    out.insert("content".into(), content);
    out.extend(tool_calls.map(|calls| ("tool_calls".to_owned(), calls)));
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("name", Json::String(value)) => out.insert(name, value.into()),
            ("tool_call_id", Json::String(value)) if role == "tool" => out.insert(name, value.into()),
            // Templates of models that think look for the first name; both are ours.
            ("reasoning_content", Json::String(value)) if role == "assistant" => out.insert(name, value.into()),
            ("reasoning", Json::String(value)) if role == "assistant" => {
                out.insert("reasoning_content".into(), value.into())
            }
            // Clients send an answer back as they got it.
            ("annotations", Json::Array(list)) if list.is_empty() => None,
            (other, _) => return Err(unsupported(place, other)),
        };
    }
    Ok(Json::Object(out))
}

fn unsupported(place: &str, name: &str) -> ApiError {
    let param: String = format!("{place}.{name}").chars().take(96).collect();
    let message = format!("`{param}` is not supported by this server.");
    ApiError::unsupported(&param, message)
}

/// A string, or an array of text parts.
fn text(content: Json, place: &str) -> Result<String, ApiError> {
    let parts = match content {
        Json::String(text) => return Ok(text),
        Json::Array(parts) if parts.len() <= PARTS_MAX => parts,
        Json::Array(_) => {
            return Err(ApiError::field(
                place,
                format!("`{place}` has more than {PARTS_MAX} parts."),
            ));
        }
        _ => {
            return Err(ApiError::field(
                place,
                format!("`{place}` must be a string or an array of text parts."),
            ));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for part in &parts {
        match (
            part.get("type").and_then(Json::as_str),
            part.get("text").and_then(Json::as_str),
        ) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("refusal"), None) if part["refusal"].is_string() => texts.extend(part["refusal"].as_str()),
            _ => {
                let message =
                    format!("`{place}` may hold only parts of type `text`; images, audio and files are not supported.");
                return Err(ApiError::field(place, message));
            }
        }
    }
    if texts.is_empty() {
        return Err(ApiError::field(place, format!("`{place}` has no parts.")));
    }
    Ok(texts.join("\n"))
}

/// Calls an assistant made earlier; arguments become an object where they are one, as Hugging Face's templates want.
fn parse_tool_calls(calls: Json, place: &str) -> Result<Json, ApiError> {
    let place = format!("{place}.tool_calls");
    let message = format!(
        "`{place}` must be an array of at most {TOOL_CALLS_MAX} function calls with `id`, `type` and `function` {{`name`, `arguments`}}."
    );
    let wrong = || ApiError::field(place.clone(), message.clone());
    let Json::Array(calls) = calls else { return Err(wrong()) };
    if calls.len() > TOOL_CALLS_MAX {
        return Err(wrong());
    }
    let parsed = calls.iter().map(|call| {
        let text = |value: Option<&Json>| value.and_then(Json::as_str).map(str::to_owned).ok_or_else(wrong);
        let function = call.get("function").ok_or_else(wrong)?;
        let arguments = text(function.get("arguments"))?;
        let arguments =
            serde_json::from_str::<Map<String, Json>>(&arguments).map_or(Json::String(arguments), Json::Object);
        if call.get("type").and_then(Json::as_str) != Some("function") {
            return Err(wrong());
        }
        Ok(serde_json::json!({"id": text(call.get("id"))?, "type": "function",
            "function": {"name": text(function.get("name"))?, "arguments": arguments}}))
    });
    parsed.collect::<Result<Vec<_>, _>>().map(Json::Array)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn brings_messages_into_one_shape() {
        let messages = parse(
            Some(json!([
                {"role": "developer", "content": "be kind", "name": "ops"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
                {"role": "tool", "content": "7", "tool_call_id": "1"},
            ])),
            8,
        )
        .unwrap();
        assert_eq!(
            messages[0],
            json!({"role": "system", "content": "be kind", "name": "ops"})
        );
        assert_eq!(messages[1], json!({"role": "user", "content": "a\nb"}));
        assert_eq!(messages[2]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(
            messages[3],
            json!({"role": "tool", "content": "7", "tool_call_id": "1"})
        );
    }

    #[test]
    fn takes_older_words_and_its_own_answers_back() {
        let messages = parse(
            Some(json!([
                {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "7"},
                {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "r", "refusal": null},
                {"role": "assistant", "refusal": "no"},
            ])),
            8,
        )
        .unwrap();
        assert_eq!(
            messages[0]["tool_calls"][0]["function"],
            json!({"name": "f", "arguments": {}})
        );
        assert_eq!(messages[1], json!({"role": "tool", "content": "7", "name": "f"}));
        assert_eq!(
            messages[2],
            json!({"role": "assistant", "content": "a", "reasoning_content": "r"})
        );
        assert_eq!(messages[3]["content"], "no");
    }

    #[test]
    fn refuses_what_it_cannot_use() {
        let user = |content: Json| json!([{"role": "user", "content": content}]);
        for bad in [
            json!(null),
            json!([]),
            json!("hi"),
            json!([1]),
            json!([{"content": "x"}]),
            json!([{"role": "robot", "content": "x"}]),
            json!([{"role": "user"}]),
            json!([{"role": "user", "content": "x", "odd": 1}]),
            json!([{"role": "user", "content": "x", "tool_calls": [1]}]),
            json!([{"role": "assistant", "tool_calls": [1]}]),
            user(json!(7)),
            user(json!([])),
            user(json!([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}])),
            json!(vec![json!({"role": "user", "content": "x"}); 9]),
        ] {
            let error = parse(Some(bad.clone()), 8).expect_err(&bad.to_string());
            assert_eq!(error.status.as_u16(), 400);
            assert!(error.param.is_some_and(|param| param.starts_with("messages")), "{bad}");
        }
    }
}
