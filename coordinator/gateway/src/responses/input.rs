//! The items of a conversation: checked and brought into the one shape that is stored and listed, and from that shape into
//! the messages that templates read. Images, audio and files are refused by name; nothing is ever fetched.
//!
//! ```text
//!  input ─▶ items ─▶ stored, listed, and next time the beginning of the conversation
//!             └────▶ messages: a thought, its text and its calls become one message of the assistant
//! ```

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::ids;
use crate::api_error::ApiError;

/// Text parts of one message.
const PARTS_MAX: usize = 1024;
/// Bytes of a call's id or a function's name.
const NAME_BYTES_MAX: usize = 256;

/// Checks `input` and names its items. `earlier` is what goes before.
pub(crate) fn parse(
    value: Option<Json>,
    response_id: &str,
    earlier: &[Json],
    items_max: usize,
) -> Result<Vec<Json>, ApiError> {
    let items = match value {
        Some(Json::String(text)) => vec![json!({"role": "user", "content": text})],
        Some(Json::Array(items)) => items,
        Some(_) => return Err(ApiError::field("input", "`input` must be text or an array of items.")),
        None => return Err(ApiError::field("input", "`input` is missing.")),
    };
    if items.is_empty() {
        return Err(ApiError::field("input", "`input` is empty; send at least one item."));
    }
    if items.len().saturating_add(earlier.len()) > items_max {
        let message = format!(
            "`input` has {} items after {} of the responses before; at most {items_max} are taken together.",
            items.len(),
            earlier.len()
        );
        return Err(ApiError::field("input", message));
    }
    let mut calls: HashSet<String> = earlier.iter().filter_map(call_id).collect();
    let mut parsed = Vec::with_capacity(items.len());
    for (at, item) in items.into_iter().enumerate() {
        let place = format!("input[{at}]");
        let item = one(item, &place, response_id, at)?;
        if item["type"] == "function_call_output" {
            let id = item["call_id"].as_str().unwrap_or_default();
            if !calls.contains(id) {
                let message = format!("`{place}.call_id`: no function call before it has this id.");
                return Err(ApiError::field(format!("{place}.call_id"), message));
            }
        }
        calls.extend(call_id(&item));
        parsed.push(item);
    }
    Ok(parsed)
}

/// Of a function call.
fn call_id(item: &Json) -> Option<String> {
    (item["type"] == "function_call").then(|| item["call_id"].as_str().unwrap_or_default().to_owned())
}

fn one(item: Json, place: &str, response_id: &str, at: usize) -> Result<Json, ApiError> {
    let Json::Object(fields) = item else {
        return Err(ApiError::field(place, format!("`{place}` must be an object.")));
    };
    let mut fields = Fields::new(fields, place);
    let kind = match fields.take("type") {
        None if fields.0.contains_key("role") => "message".to_owned(),
        Some(Json::String(kind)) => kind,
        _ => return Err(fields.wrong("type", "must be text")),
    };
    let named = |kind: &str| ids::item(kind, response_id, 'i', at);
    // Ours go in place of the client's, so that two items never have one name; the client's means nothing here.
    fields.take("id");
    // Clients send an item back as they got it, whatever its state.
    fields.take("status");
    let item = match kind.as_str() {
        "message" => message(&mut fields, named("msg"))?,
        "function_call" => {
            fields.nothing(&["namespace", "caller"])?;
            json!({"id": named("fc"), "type": "function_call", "status": "completed", "call_id": fields.name("call_id")?,
                "name": fields.name("name")?, "arguments": fields.text("arguments")?})
        }
        "function_call_output" => {
            fields.nothing(&["namespace", "caller"])?;
            fields.take("name");
            let call_id = fields.name("call_id")?;
            let output = fields.required("output")?;
            let texts = texts(output, &format!("{place}.output"), &["input_text"])?;
            json!({"id": named("fco"), "type": "function_call_output", "status": "completed", "call_id": call_id,
                "output": texts.join("\n")})
        }
        "reasoning" => reasoning(&mut fields, named("rs"))?,
        _ => {
            let param: String = format!("{place}.type");
            let shown: String = kind.chars().take(64).collect();
            let message = format!(
                "`{param}`: items of type `{shown}` are not supported by this server; it takes `message`, `function_call`, \
                 `function_call_output` and `reasoning`."
            );
            return Err(ApiError::unsupported(&param, message));
        }
    };
    fields.end()?;
    Ok(item)
}

fn message(fields: &mut Fields<'_>, id: String) -> Result<Json, ApiError> {
    let place = format!("{}.content", fields.1);
    let role = fields.text("role")?;
    let content = fields.required("content")?;
    // Where in a turn a message stands: said by some of OpenAI's models, and shown back to none here.
    fields.take("phase");
    if role == "assistant" {
        let texts = texts(content, &place, &["output_text", "input_text", "refusal"])?;
        let parts = texts
            .into_iter()
            .map(|text| json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}));
        let parts: Vec<Json> = parts.collect();
        return Ok(json!({"id": id, "type": "message", "role": role, "status": "completed", "content": parts}));
    }
    if !["user", "system", "developer"].contains(&role.as_str()) {
        return Err(fields.wrong("role", "must be one of user, assistant, system, developer"));
    }
    let texts = texts(content, &place, &["input_text"])?;
    let parts: Vec<Json> = texts
        .into_iter()
        .map(|text| json!({"type": "input_text", "text": text}))
        .collect();
    Ok(json!({"id": id, "type": "message", "role": role, "status": "completed", "content": parts}))
}

/// Thoughts of an earlier turn: their text, or else their summary.
fn reasoning(fields: &mut Fields<'_>, id: String) -> Result<Json, ApiError> {
    let place = fields.1;
    let part = |value: Option<Json>, name: &str, kind: &str| match value {
        None => Ok(Vec::new()),
        Some(Json::Array(parts)) if parts.is_empty() => Ok(Vec::new()),
        Some(parts) => texts(parts, &format!("{place}.{name}"), &[kind]),
    };
    let summary = part(fields.take("summary"), "summary", "summary_text")?;
    let content = part(fields.take("content"), "content", "reasoning_text")?;
    let encrypted = fields.take("encrypted_content");
    if encrypted.is_some() && content.is_empty() && summary.is_empty() {
        let param = format!("{place}.encrypted_content");
        let message = format!("`{param}` cannot be read here. Send the thought's `content`.");
        return Err(ApiError::unsupported(&param, message));
    }
    let typed = |kind: &str, texts: Vec<String>| -> Vec<Json> {
        texts
            .into_iter()
            .map(|text| json!({"type": kind, "text": text}))
            .collect()
    };
    Ok(
        json!({"id": id, "type": "reasoning", "status": "completed", "summary": typed("summary_text", summary),
        "content": typed("reasoning_text", content)}),
    )
}

/// A text, or parts of these types.
fn texts(content: Json, place: &str, kinds: &[&str]) -> Result<Vec<String>, ApiError> {
    let parts = match content {
        Json::String(text) => return Ok(vec![text]),
        Json::Array(parts) if (1..=PARTS_MAX).contains(&parts.len()) => parts,
        _ => {
            let message = format!("`{place}` must be text or an array of 1 to {PARTS_MAX} parts.");
            return Err(ApiError::field(place, message));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (at, part) in parts.into_iter().enumerate() {
        let kind = part["type"].as_str().unwrap_or_default();
        if !kinds.contains(&kind) {
            let param = format!("{place}[{at}].type");
            let message = format!(
                "`{param}` must be `{}`; images, audio and files are not supported by this server.",
                kinds.join("` or `")
            );
            return Err(ApiError::unsupported(&param, message));
        }
        let name = if kind == "refusal" { "refusal" } else { "text" };
        match part[name].as_str() {
            Some(text) => texts.push(text.to_owned()),
            None => {
                let param = format!("{place}[{at}].{name}");
                let message = format!("`{param}` must be text.");
                return Err(ApiError::field(param, message));
            }
        }
    }
    Ok(texts)
}

/// An object's fields, taken one by one, so that what is left over can be refused by name.
struct Fields<'a>(Map<String, Json>, &'a str);

impl<'a> Fields<'a> {
    fn new(mut fields: Map<String, Json>, place: &'a str) -> Self {
        fields.retain(|_, value| !value.is_null());
        Self(fields, place)
    }

    fn take(&mut self, name: &str) -> Option<Json> {
        self.0.remove(name)
    }

    fn required(&mut self, name: &str) -> Result<Json, ApiError> {
        self.take(name).ok_or_else(|| self.wrong(name, "is missing"))
    }

    fn text(&mut self, name: &str) -> Result<String, ApiError> {
        match self.required(name)? {
            Json::String(text) => Ok(text),
            _ => Err(self.wrong(name, "must be text")),
        }
    }

    fn name(&mut self, name: &str) -> Result<String, ApiError> {
        let text = self.text(name)?;
        if text.is_empty() || text.len() > NAME_BYTES_MAX {
            return Err(self.wrong(name, &format!("must be of 1 to {NAME_BYTES_MAX} bytes")));
        }
        Ok(text)
    }

    /// These may not be given.
    fn nothing(&self, names: &[&str]) -> Result<(), ApiError> {
        match names.iter().find(|name| self.0.contains_key(**name)) {
            None => Ok(()),
            Some(name) => Err(self.unsupported(name)),
        }
    }

    fn end(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(self.unsupported(name)),
        }
    }

    fn unsupported(&self, name: &str) -> ApiError {
        let param: String = format!("{}.{name}", self.1).chars().take(96).collect();
        let message = format!("`{param}` is not supported by this server.");
        ApiError::unsupported(&param, message)
    }

    fn wrong(&self, name: &str, what: &str) -> ApiError {
        let param = format!("{}.{name}", self.1);
        let message = format!("`{param}` {what}.");
        ApiError::field(param, message)
    }
}

/// The conversation as templates read it.
pub(crate) fn messages<'a>(instructions: Option<&str>, items: impl Iterator<Item = &'a Json>) -> Vec<Json> {
    let mut messages = Vec::new();
    messages.extend(instructions.map(|text| json!({"role": "system", "content": text})));
    // The turn of the assistant that is being put together.
    let mut turn: Option<Map<String, Json>> = None;
    for item in items {
        match item["type"].as_str() {
            Some("reasoning") => {
                messages.extend(turn.take().map(closed));
                let text = [&item["content"], &item["summary"]]
                    .into_iter()
                    .map(joined)
                    .find(|text| !text.is_empty());
                let mut thought = assistant();
                thought.extend(text.map(|text| ("reasoning_content".to_owned(), text.into())));
                turn = Some(thought);
            }
            Some("function_call") => {
                let open = turn.get_or_insert_with(assistant);
                let arguments = item["arguments"].as_str().unwrap_or_default();
                // An object where it is one, as Hugging Face's templates want.
                let arguments = serde_json::from_str::<Map<String, Json>>(arguments)
                    .map_or_else(|_| arguments.into(), Json::Object);
                let call = json!({"id": item["call_id"], "type": "function",
                    "function": {"name": item["name"], "arguments": arguments}});
                if let Json::Array(calls) = open.entry("tool_calls").or_insert_with(|| json!([])) {
                    calls.push(call);
                }
            }
            Some("function_call_output") => {
                messages.extend(turn.take().map(closed));
                messages.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}));
            }
            _ if item["role"] == "assistant" => {
                let fresh =
                    |turn: &Map<String, Json>| !turn.contains_key("content") && !turn.contains_key("tool_calls");
                if !turn.as_ref().is_some_and(fresh) {
                    messages.extend(turn.take().map(closed));
                }
                turn.get_or_insert_with(assistant)
                    .insert("content".into(), joined(&item["content"]).into());
            }
            _ => {
                messages.extend(turn.take().map(closed));
                // The newer name of the same role; templates know the older one.
                let role = match item["role"].as_str() {
                    Some("developer") => "system",
                    Some("system") => "system",
                    _ => "user",
                };
                messages.push(json!({"role": role, "content": joined(&item["content"])}));
            }
        }
    }
    messages.extend(turn.take().map(closed));
    messages
}

fn assistant() -> Map<String, Json> {
    Map::from_iter([("role".to_owned(), "assistant".into())])
}

fn closed(mut turn: Map<String, Json>) -> Json {
    let empty = if turn.contains_key("tool_calls") {
        Json::Null
    } else {
        "".into()
    };
    turn.entry("content").or_insert(empty);
    Json::Object(turn)
}

/// The texts of parts.
fn joined(parts: &Json) -> String {
    let texts = parts.as_array().into_iter().flatten();
    let texts: Vec<&str> = texts.filter_map(|part| part["text"].as_str()).collect();
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "resp_0123456789abcdef0123456789abcdef";

    fn items(input: Json) -> Result<Vec<Json>, ApiError> {
        parse(Some(input), ID, &[], 8)
    }

    #[test]
    fn a_turn_of_the_assistant_becomes_one_message() {
        let items = items(json!([
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "wait", "annotations": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{\"x\": 1}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "not json"},
            {"type": "function_call_output", "call_id": "1", "output": "7"},
            {"role": "assistant", "content": "done"},
        ]))
        .unwrap();
        let messages = messages(Some("sys"), items.iter());
        assert_eq!(
            messages,
            [
                json!({"role": "system", "content": "sys"}),
                json!({"role": "system", "content": "be kind"}),
                json!({"role": "user", "content": "a\nb"}),
                json!({"role": "assistant", "content": "wait", "reasoning_content": "hm", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                    {"id": "2", "type": "function", "function": {"name": "g", "arguments": "not json"}}]}),
                json!({"role": "tool", "tool_call_id": "1", "content": "7"}),
                json!({"role": "assistant", "content": "done"}),
            ]
        );
        let names: HashSet<&str> = items.iter().filter_map(|item| item["id"].as_str()).collect();
        assert_eq!(names.len(), items.len(), "every item has a name of its own");
    }

    #[test]
    fn what_comes_back_is_taken_again() {
        let first = items(json!("hi")).unwrap();
        let again = parse(Some(Json::Array(first.clone())), ID, &first, 8).unwrap();
        assert_eq!(first, again);
    }

    #[test]
    fn refuses_by_name() {
        let part = |part: Json| json!([{"role": "user", "content": [part]}]);
        for (bad, param) in [
            (json!(null), "input"),
            (json!(7), "input"),
            (json!([]), "input"),
            (json!(vec![json!({"role": "user", "content": "x"}); 9]), "input"),
            (json!(["x"]), "input[0]"),
            (json!([{"role": "robot", "content": "x"}]), "input[0].role"),
            (json!([{"role": "user"}]), "input[0].content"),
            (json!([{"role": "user", "content": []}]), "input[0].content"),
            (json!([{"role": "user", "content": "x", "odd": 1}]), "input[0].odd"),
            (
                part(json!({"type": "input_image", "image_url": "http://127.0.0.1/"})),
                "input[0].content[0].type",
            ),
            (
                part(json!({"type": "input_file", "file_id": "x"})),
                "input[0].content[0].type",
            ),
            (part(json!({"type": "input_text"})), "input[0].content[0].text"),
            (json!([{"type": "item_reference", "id": "x"}]), "input[0].type"),
            (json!([{"type": "web_search_call", "id": "x"}]), "input[0].type"),
            (
                json!([{"type": "function_call_output", "call_id": "1", "output": "7"}]),
                "input[0].call_id",
            ),
            (
                json!([{"type": "function_call", "call_id": "", "name": "f", "arguments": "{}"}]),
                "input[0].call_id",
            ),
            (
                json!([{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}]),
                "input[0].encrypted_content",
            ),
        ] {
            let error = items(bad.clone()).expect_err(&bad.to_string());
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{bad}"
            );
        }
    }
}
