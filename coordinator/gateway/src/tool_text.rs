//! Tools for models whose chat template knows none: they are described in the system message, and calls and results are
//! written as text, in the format of Nous Research's Hermes, which more models have seen than any other. Plain rewriting of
//! messages; what the model answers is read like any other family's.

use serde_json::{Value as Json, json};

use crate::template::Conversation;

/// Rewrites a conversation so that a template without tools can show it. Without tools and calls it stays as it is.
pub(crate) fn describe(conversation: &mut Conversation) {
    for message in &mut conversation.messages {
        rewrite(message);
    }
    let tools = std::mem::take(&mut conversation.tools);
    if tools.is_empty() {
        return;
    }
    let mut text = String::from("You can call functions. These are their JSON descriptions, one a line:\n<tools>\n");
    for tool in &tools {
        text.push_str(&tool.to_string());
        text.push('\n');
    }
    text.push_str(
        "</tools>\nTo call one, answer with a JSON object of its name and arguments between these marks, and nothing else:\n\
         <tool_call>\n{\"name\": \"...\", \"arguments\": {...}}\n</tool_call>",
    );
    match conversation.messages.first_mut() {
        Some(first) if first["role"] == "system" => {
            let before = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{before}\n\n{text}").into();
        }
        _ => conversation
            .messages
            .insert(0, json!({"role": "system", "content": text})),
    }
}

fn rewrite(message: &mut Json) {
    if let Some(calls) = message.as_object_mut().and_then(|fields| fields.remove("tool_calls")) {
        let mut text = message["content"].as_str().unwrap_or_default().to_owned();
        for call in calls.as_array().into_iter().flatten() {
            let function = &call["function"];
            let call = json!({"name": function["name"], "arguments": function["arguments"]});
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&format!("<tool_call>\n{call}\n</tool_call>"));
        }
        message["content"] = text.into();
    }
    if message["role"] == "tool" {
        let result = message["content"].as_str().unwrap_or_default();
        *message = json!({"role": "user", "content": format!("<tool_response>\n{result}\n</tool_response>")});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_results_become_text() {
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
        let mut conversation = Conversation {
            messages: vec![
                json!({"role": "user", "content": "hi"}),
                json!({"role": "assistant", "content": null, "tool_calls": [call]}),
                json!({"role": "tool", "content": "7", "tool_call_id": "1"}),
            ],
            tools: vec![json!({"type": "function", "function": {"name": "f"}})],
            ..Conversation::default()
        };
        describe(&mut conversation);
        let text = |at: usize| conversation.messages[at]["content"].as_str().unwrap();
        assert_eq!(conversation.messages[0]["role"], "system");
        assert!(text(0).contains("{\"type\":\"function\",\"function\":{\"name\":\"f\"}}"));
        assert_eq!(
            text(2),
            "<tool_call>\n{\"name\":\"f\",\"arguments\":{\"x\":1}}\n</tool_call>"
        );
        assert_eq!(
            (&conversation.messages[3]["role"], text(3)),
            (&json!("user"), "<tool_response>\n7\n</tool_response>")
        );
        assert!(conversation.tools.is_empty() && conversation.messages[2].get("tool_calls").is_none());

        let plain = vec![json!({"role": "user", "content": "hi"})];
        let mut same = Conversation {
            messages: plain.clone(),
            ..Conversation::default()
        };
        describe(&mut same);
        assert_eq!(same.messages, plain);
    }
}
