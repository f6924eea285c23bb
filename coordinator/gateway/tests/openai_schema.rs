//! What OpenAI's own description says: every answer and chunk against its schema, and its list of fields against ours. The
//! description is too large to keep here: `OPENAI_OPENAPI` names the file, else it is looked for beside the repository;
//! where it is not, what needs it is skipped with a message.

mod support;

use baton_gateway::{FIELDS, FieldSupport};
use baton_proto::worker::FinishReason;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use support::{Script, TestGateway, hi, ids, turn};

/// Set to write the table into the file instead of comparing it.
const UPDATE_VARIABLE: &str = "BATON_UPDATE_DOCS";

static DESCRIPTION: LazyLock<Option<Value>> = LazyLock::new(|| {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/openai-openapi.yaml");
    let path = std::env::var_os("OPENAI_OPENAPI").map_or(beside, PathBuf::from);
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!(
            "skipped: OpenAI's description is not at {}; set OPENAI_OPENAPI",
            path.display()
        );
        return None;
    };
    // The ends of 64 bits as a program that knows only doubles wrote them.
    let text = text.replace("9223372036854776000", "9223372036854775807");
    let mut value: Value = serde_norway::from_str(&text).expect("it is YAML");
    modern(&mut value);
    Some(value)
});

/// OpenAPI's older `nullable` in JSON Schema's words.
fn modern(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(modern),
        Value::Object(fields) => {
            fields.values_mut().for_each(modern);
            // Its own formats, which say nothing of shape.
            fields.remove("format");
            if fields.remove("nullable") == Some(json!(true)) {
                let inner = Value::Object(std::mem::take(fields));
                fields.insert("anyOf".into(), json!([inner, {"type": "null"}]));
            }
        }
        _ => {}
    }
}

fn validator(name: &str) -> Option<jsonschema::Validator> {
    let description = DESCRIPTION.as_ref()?;
    let schema = json!({"$ref": format!("#/components/schemas/{name}"), "components": description["components"]});
    Some(jsonschema::draft202012::options().build(&schema).expect("it compiles"))
}

fn check(validator: &jsonschema::Validator, value: &Value) {
    let errors: Vec<String> = validator
        .iter_errors(value)
        .map(|error| format!("{error} at {}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:?}: {value}");
}

#[tokio::test]
async fn answers_and_chunks_are_as_openai_describes_them() {
    let (Some(whole), Some(chunk), Some(error)) = (
        validator("CreateChatCompletionResponse"),
        validator("CreateChatCompletionStreamResponse"),
        validator("ErrorResponse"),
    ) else {
        return;
    };
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let cases = [
        (turn("héllo"), json!({})),
        (Script::Say(ids("abc"), FinishReason::Length), json!({"max_tokens": 3})),
        (Script::SayThenHang(ids("abEND")), json!({"stop": "END"})),
        (
            Script::SayLikely([ids("é!"), vec![257]].concat(), 2),
            json!({"logprobs": true, "top_logprobs": 2}),
        ),
        (turn(call), json!({"tools": [tool]})),
        (turn(call), json!({"functions": [tool["function"]]})),
        (turn("a"), json!({"n": 3})),
    ];
    let gateway = TestGateway::start().await;
    gateway
        .backend
        .context_length
        .store(4096, std::sync::atomic::Ordering::SeqCst);
    for (script, extra) in cases {
        gateway.backend.script(script.clone());
        let answer = gateway.chat(&hi(extra.clone())).await;
        assert_eq!(answer.status, 200, "{extra}: {}", answer.text());
        check(&whole, &answer.json());

        gateway.backend.script(script);
        let mut streamed = extra.clone();
        streamed["stream"] = true.into();
        streamed["stream_options"] = json!({"include_usage": true, "include_obfuscation": true});
        let events = gateway.chat(&hi(streamed)).await.events();
        for event in events.iter().filter(|event| *event != "[DONE]") {
            check(&chunk, &serde_json::from_str(event).unwrap());
        }
    }
    for bad in [json!({"n": 0}), json!({"bogus": 1}), json!({"messages": []})] {
        check(&error, &gateway.chat(&hi(bad)).await.json());
    }
    // The judge can say no.
    assert!(!whole.is_valid(&json!({"object": "chat.completion"})));
    assert!(!chunk.is_valid(&json!({"object": "chat.completion.chunk", "choices": [{}]})));
}

/// Names of a schema's properties, with those of what it is made of.
fn properties(schema: &Value, all: &Value, names: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        properties(&all[reference.rsplit('/').next().unwrap()], all, names);
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        properties(part, all, names);
    }
    names.extend(
        schema["properties"]
            .as_object()
            .into_iter()
            .flat_map(|fields| fields.keys().cloned()),
    );
}

#[test]
fn every_field_of_openais_is_in_the_table() {
    let Some(description) = DESCRIPTION.as_ref() else {
        return;
    };
    let schemas = &description["components"]["schemas"];
    let mut names = BTreeSet::new();
    properties(&schemas["CreateChatCompletionRequest"], schemas, &mut names);
    assert!(names.len() > 30 && names.contains("messages"), "{names:?}");
    let missing: Vec<&String> = names
        .iter()
        .filter(|name| !FIELDS.iter().any(|field| field.name == **name))
        .collect();
    assert!(
        missing.is_empty(),
        "OpenAI has fields that the table does not know: {missing:?}"
    );
}

#[test]
fn the_table_in_the_book_is_the_code() {
    let mut table = String::from("| field | | |\n|---|---|---|\n");
    for field in FIELDS {
        let (word, note) = match field.support {
            FieldSupport::Works => ("works", field.note.to_owned()),
            FieldSupport::Harmless => ("taken, no effect", field.note.to_owned()),
            FieldSupport::Refused => ("refused", format!("Unless it asks for nothing: {}.", field.neutral)),
        };
        table.push_str(&format!("| `{}` | {word} | {note} |\n", field.name));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/chat-completions.md");
    let text = std::fs::read_to_string(&path).expect("the book has the page");
    let (start, end) = ("<!-- fields: generated -->\n", "<!-- end -->\n");
    let from = text.find(start).expect("the mark") + start.len();
    let to = text.find(end).expect("the mark");
    if std::env::var_os(UPDATE_VARIABLE).is_some() {
        std::fs::write(&path, format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
        return;
    }
    assert!(
        text[from..to] == table,
        "docs/chat-completions.md is not what the code says; run: {UPDATE_VARIABLE}=1 cargo test -p baton-gateway --test openai_schema"
    );
}
