//! Anthropic's `system` and `messages` in the one shape that templates read (see [`messages`](crate::messages)): a result of a
//! call becomes a message of its own, thoughts become `reasoning_content`, neighbours of one role are joined, as Anthropic
//! joins them. Images, documents and results of Anthropic's own tools are refused by name.

use serde_json::{Value as Json, json};

use crate::api_error::ApiError;
use crate::body::Body;

/// Blocks of one message.
const BLOCKS_MAX: usize = 1024;

/// Takes `system` and `messages`.
pub(crate) fn parse(body: &mut Body, messages_max: usize) -> Result<Vec<Json>, ApiError> {
    let mut out = Vec::new();
    if let Some(system) = body.take("system") {
        let text = texts(system, "system")?;
        if !text.is_empty() {
            out.push(json!({"role": "system", "content": text}));
        }
    }
    let messages = body.list("messages", messages_max)?;
    let messages = messages.ok_or_else(|| body.missing("messages"))?;
    if messages.is_empty() {
        return Err(body.wrong("messages", "is empty; send at least one message"));
    }
    let mut last = String::new();
    for (at, message) in messages.into_iter().enumerate() {
        let place = format!("messages[{at}]");
        let mut message = Body::nested(message, &place)?;
        let role = message.needed_text("role")?;
        let content = message.take("content").ok_or_else(|| message.missing("content"))?;
        let place = message.name("content");
        match role.as_str() {
            "user" => user(content, &place, last == "user", &mut out)?,
            "assistant" => assistant(content, &place, last == "assistant", &mut out)?,
            _ => return Err(message.wrong("role", "must be \"user\" or \"assistant\"")),
        }
        message.finish()?;
        last = role;
    }
    if last == "assistant" {
        let message =
            "`messages` ends with an answer: one that was begun cannot be continued. End with a message of the user.";
        return Err(ApiError::unsupported("messages", message));
    }
    Ok(out)
}

/// The blocks of a content; a string is one block of text.
fn blocks(content: Json, place: &str) -> Result<Vec<Body>, ApiError> {
    match content {
        Json::String(text) => Ok(vec![Body::nested(json!({"type": "text", "text": text}), place)?]),
        Json::Array(blocks) if blocks.len() <= BLOCKS_MAX => {
            let blocks = blocks.into_iter().enumerate();
            blocks
                .map(|(at, block)| Body::nested(block, &format!("{place}[{at}]")))
                .collect()
        }
        _ => {
            let message = format!("`{place}` must be a string or an array of at most {BLOCKS_MAX} blocks.");
            Err(ApiError::field(place, message))
        }
    }
}

/// 400 for a kind of block that does not work here.
fn unsupported(block: &Body, kind: &str) -> ApiError {
    let place = block.name("type");
    let kind: String = kind.chars().take(64).collect();
    let message = format!("`{place}`: blocks of type `{kind}` are not supported here; images and files are not read.");
    ApiError::unsupported(&place, message)
}

/// A text's block, whose type was taken.
fn text(mut block: Body) -> Result<String, ApiError> {
    let text = block.needed_text("text")?;
    // Prefixes are cached without being marked; citations point into documents, of which there are none.
    block.ignore(&["cache_control"]);
    block.refuse("citations", "there are no documents to cite", |value| {
        value == &json!([])
    })?;
    block.finish()?;
    Ok(text)
}

/// Nothing but text, joined by newlines.
fn texts(content: Json, place: &str) -> Result<String, ApiError> {
    let mut all = Vec::new();
    for mut block in blocks(content, place)? {
        match block.needed_text("type")?.as_str() {
            "text" => all.push(text(block)?),
            other => return Err(unsupported(&block, other)),
        }
    }
    Ok(all.join("\n"))
}

fn user(content: Json, place: &str, follows: bool, out: &mut Vec<Json>) -> Result<(), ApiError> {
    let (mut said, mut results) = (Vec::new(), Vec::new());
    for mut block in blocks(content, place)? {
        match block.needed_text("type")?.as_str() {
            "text" => said.push(text(block)?),
            "tool_result" => results.push(tool_result(block)?),
            other => return Err(unsupported(&block, other)),
        }
    }
    let none = results.is_empty();
    out.extend(results);
    if !said.is_empty() || none {
        let said = said.join("\n");
        match out.last_mut().filter(|last| follows && last["role"] == "user") {
            Some(last) => join(last, &said),
            None => out.push(json!({"role": "user", "content": said})),
        }
    }
    Ok(())
}

fn join(message: &mut Json, more: &str) {
    let before = message["content"].as_str().unwrap_or_default();
    message["content"] = Json::String([before, more].join("\n"));
}

fn tool_result(mut block: Body) -> Result<Json, ApiError> {
    let id = block.needed_text("tool_use_id")?;
    let content = match block.take("content") {
        None => String::new(),
        Some(content) => texts(content, &block.name("content"))?,
    };
    // Templates know no failed results: it is said in words.
    let content = if block.flag("is_error", false)? {
        format!("Error: {content}")
    } else {
        content
    };
    block.ignore(&["cache_control"]);
    block.finish()?;
    Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
}

fn assistant(content: Json, place: &str, follows: bool, out: &mut Vec<Json>) -> Result<(), ApiError> {
    let (mut said, mut thought, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for mut block in blocks(content, place)? {
        match block.needed_text("type")?.as_str() {
            "text" => said.push(text(block)?),
            "thinking" => {
                thought.push(block.needed_text("thinking")?);
                // Ours are empty: there is nothing to prove.
                block.text("signature")?;
                block.finish()?;
            }
            "tool_use" => {
                let (id, name) = (block.needed_text("id")?, block.needed_text("name")?);
                let input = block.take("input").ok_or_else(|| block.missing("input"))?;
                if !input.is_object() {
                    return Err(block.wrong("input", "must be an object"));
                }
                block.ignore(&["cache_control"]);
                block.refuse("caller", "tools are called by the model alone", |value| {
                    value.get("type").is_some_and(|kind| kind == "direct")
                })?;
                block.finish()?;
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}));
            }
            other => return Err(unsupported(&block, other)),
        }
    }
    let plain = thought.is_empty() && calls.is_empty();
    if let Some(last) = out
        .last_mut()
        .filter(|last| follows && plain && last["role"] == "assistant" && last.get("tool_calls").is_none())
    {
        join(last, &said.join("\n"));
        return Ok(());
    }
    let content = if said.is_empty() && !calls.is_empty() {
        Json::Null
    } else {
        Json::String(said.join("\n"))
    };
    let mut message = json!({"role": "assistant", "content": content});
    if !thought.is_empty() {
        message["reasoning_content"] = thought.join("\n").into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    out.push(message);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(body: Json) -> Result<Vec<Json>, ApiError> {
        parse(&mut Body::parse(body.to_string().as_bytes()).unwrap(), 8)
    }

    #[test]
    fn blocks_become_messages() {
        let messages = parsed(
            json!({"system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]},
                {"role": "user", "content": [
                    {"type": "text", "text": "go on"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": true, "content": "bad"}]}]}),
        )
        .unwrap();
        assert_eq!(messages[0], json!({"role": "system", "content": "be kind"}));
        assert_eq!(messages[1], json!({"role": "user", "content": "a\nb\nc"}));
        let call = json!({"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
        assert_eq!(
            messages[2],
            json!({"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [call]})
        );
        assert_eq!(
            messages[3],
            json!({"role": "tool", "tool_call_id": "t1", "content": "7"})
        );
        assert_eq!(
            messages[4],
            json!({"role": "tool", "tool_call_id": "t2", "content": "Error: bad"})
        );
        assert_eq!(messages[5], json!({"role": "user", "content": "go on"}));
        assert_eq!(messages.len(), 6);
    }

    #[test]
    fn what_is_not_read_is_refused_by_place() {
        let user = |block: Json| json!({"messages": [{"role": "user", "content": [block]}]});
        let image = json!({"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}});
        for (bad, param) in [
            (json!({}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (
                json!({"messages": [{"role": "system", "content": "x"}]}),
                "messages[0].role",
            ),
            (
                json!({"messages": [{"role": "user", "content": "x", "odd": 1}]}),
                "messages[0].odd",
            ),
            (
                json!({"messages": [{"role": "user", "content": 7}]}),
                "messages[0].content",
            ),
            (json!({"messages": [{"role": "assistant", "content": "x"}]}), "messages"),
            (user(image.clone()), "messages[0].content[0].type"),
            (
                user(json!({"type": "tool_result", "tool_use_id": "t", "content": [image]})),
                "messages[0].content[0].content[0].type",
            ),
            (user(json!({"type": "text"})), "messages[0].content[0].text"),
            (
                user(json!({"type": "text", "text": "x", "odd": 1})),
                "messages[0].content[0].odd",
            ),
            (
                json!({"system": 7, "messages": [{"role": "user", "content": "x"}]}),
                "system",
            ),
        ] {
            let error = parsed(bad.clone()).expect_err(&bad.to_string());
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(param)),
                "{bad}"
            );
        }
    }
}
