//! Schemas of bodies, put together from the lists of fields by which the endpoints check them. A field is described once
//! here, by its name, for all endpoints that share it.

use serde_json::{Map, Value as Json, json};

use crate::fields::{FIELDS, FieldSupport};
use crate::{anthropic, completions, kserve};

/// OpenAI's error. (Routes under `/v1/messages` and `/v2` have those of their own APIs.)
pub(super) fn error() -> Json {
    json!({"type": "object", "required": ["error"], "properties": {"error": {}}})
}

/// Of a chat completion.
pub(crate) fn chat() -> Json {
    let mut properties = Map::new();
    for known in FIELDS.iter().filter(|field| field.support != FieldSupport::Refused) {
        let mut schema = match known.name {
            "logprobs" => flag(""),
            name => field(name),
        };
        if !known.note.is_empty() {
            schema["description"] = known.note.into();
        }
        properties.insert(known.name.to_owned(), schema);
    }
    object(properties, &["model", "messages"])
}

/// Of a completion.
pub(crate) fn completion() -> Json {
    object(fields(completions::FIELDS), &["model", "prompt"])
}

/// Of a message.
pub(crate) fn message() -> Json {
    object(
        message_fields(anthropic::request::FIELDS),
        &["model", "messages", "max_tokens"],
    )
}

/// Of a message whose tokens are to be counted.
pub(crate) fn message_count() -> Json {
    object(message_fields(anthropic::request::COUNT_FIELDS), &["model", "messages"])
}

/// Of a chat completion or a completion.
pub(crate) fn invocation() -> Json {
    json!({"oneOf": [chat(), completion()]})
}

/// Of KServe's `generate`.
pub(crate) fn generate() -> Json {
    let mut parameters = object(fields(kserve::generate::PARAMETERS), &[]);
    parameters["type"] = json!(["object", "null"]);
    let properties = [
        (
            "text_input",
            json!({"type": "string", "description": "The text to continue."}),
        ),
        (
            "id",
            json!({"type": ["string", "null"], "description": "Told again in the answer."}),
        ),
        ("parameters", parameters),
    ];
    object(named(properties), &["text_input"])
}

/// Of `/tokenize`.
pub(crate) fn tokenize() -> Json {
    let flag = |about: &str| json!({"type": ["boolean", "null"], "description": about});
    let properties = [
        (
            "model",
            json!({"type": ["string", "null"], "description": "May be left out where only one is served."}),
        ),
        (
            "prompt",
            json!({"type": ["string", "null"], "description": "The text; or `messages`."}),
        ),
        ("messages", nullable(field("messages"))),
        (
            "add_special_tokens",
            flag("Of a text: with what the tokenizer puts before it (the default)."),
        ),
        (
            "add_generation_prompt",
            flag("Of messages: ready for an answer (the default)."),
        ),
        ("continue_final_message", flag("Only `false`.")),
        ("return_token_strs", flag("Tokens as the vocabulary spells them, too.")),
    ];
    object(named(properties), &[])
}

/// Of `/detokenize`.
pub(crate) fn detokenize() -> Json {
    let properties = [
        (
            "model",
            json!({"type": ["string", "null"], "description": "May be left out where only one is served."}),
        ),
        ("tokens", ids("Token ids.")),
    ];
    object(named(properties), &["tokens"])
}

fn named<const N: usize>(properties: [(&str, Json); N]) -> Map<String, Json> {
    properties
        .into_iter()
        .map(|(name, schema)| (name.to_owned(), schema))
        .collect()
}

fn object(properties: Map<String, Json>, required: &[&str]) -> Json {
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn fields(names: &[&str]) -> Map<String, Json> {
    names.iter().map(|name| ((*name).to_owned(), field(name))).collect()
}

/// Anthropic's have some names of their own, and other meanings for some of OpenAI's.
fn message_fields(names: &[&str]) -> Map<String, Json> {
    let of = |name: &str| match name {
        "temperature" => number("0 to 1; 0 is greedy.", 0.0, 1.0),
        "top_k" => integer("0 keeps all.", 0, i64::from(i32::MAX)),
        "max_tokens" => integer("Most tokens of the answer.", 1, 1 << 30),
        "messages" => json!({"type": "array", "minItems": 1, "items": {"type": "object"},
            "description": "Blocks of text, tool_use, tool_result and thinking; images and documents are refused."}),
        "system" => json!({"type": ["string", "array", "null"], "description": "A text, or blocks of text."}),
        "stop_sequences" => json!({"type": ["array", "null"], "items": {"type": "string", "minLength": 1},
            "description": "Any of these ends the answer."}),
        "tools" => {
            json!({"type": ["array", "null"], "items": {"type": "object"}, "description": "Tools of the client's own."})
        }
        "tool_choice" => {
            json!({"type": ["object", "null"], "description": "`auto`, `any`, `none`, or `tool` with a name."})
        }
        "thinking" => {
            json!({"type": ["object", "null"], "description": "Whether the model is to think, where its template knows. `budget_tokens` is a wish."})
        }
        "output_config" => {
            json!({"type": ["object", "null"], "description": "`format`: a JSON schema that the answer keeps to; `effort`."})
        }
        "metadata" => json!({"type": ["object", "null"], "description": "`user_id` goes into the usage record."}),
        "service_tier" => {
            json!({"type": ["string", "null"], "enum": ["auto", "standard_only", null], "description": "Without effect."})
        }
        other => field(other),
    };
    names.iter().map(|name| ((*name).to_owned(), of(name))).collect()
}

fn nullable(mut schema: Json) -> Json {
    if let Json::String(kind) = &schema["type"] {
        schema["type"] = json!([kind, "null"]);
    }
    schema
}

fn number(about: &str, from: f64, to: f64) -> Json {
    json!({"type": ["number", "null"], "minimum": from, "maximum": to, "description": about})
}

fn integer(about: &str, from: i64, to: i64) -> Json {
    json!({"type": ["integer", "null"], "minimum": from, "maximum": to, "description": about})
}

fn flag(about: &str) -> Json {
    json!({"type": ["boolean", "null"], "description": about})
}

fn text(about: &str) -> Json {
    json!({"type": ["string", "null"], "description": about})
}

fn ids(about: &str) -> Json {
    json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}, "description": about})
}

/// A field that several endpoints share, or one of chat completions. What is not known here may be anything.
fn field(name: &str) -> Json {
    match name {
        "model" => json!({"type": "string", "description": "One of `GET /v1/models`."}),
        "messages" => json!({"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"],
            "properties": {"role": {"type": "string"}}}, "description": "The conversation."}),
        "prompt" => json!({"type": ["string", "array"], "minItems": 1, "minLength": 1,
            "description": "A text, texts, token ids, or arrays of token ids."}),
        "max_tokens" | "max_completion_tokens" => integer("Most tokens of a choice.", 1, 1 << 30),
        "n" => integer("Choices of each prompt.", 1, 128),
        "best_of" => integer("Only `n` itself: all that is generated is returned.", 1, 128),
        "echo" => flag("The prompt comes before the answer. Not together with `logprobs`."),
        "suffix" => json!({"type": ["string", "null"], "maxLength": 0, "description": "Refused, unless empty."}),
        "logprobs" => integer("So many of the most likely tokens beside each.", 0, 20),
        "stream" => flag("Server-sent events."),
        "stream_options" => {
            json!({"type": ["object", "null"], "description": "`include_usage`, `continuous_usage_stats`."})
        }
        "temperature" => number("0 is greedy; the model's own where it is left out.", 0.0, 2.0),
        "top_p" => json!({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "description": "Nucleus."}),
        "top_k" => integer("vLLM's. 0 and -1 keep all.", -1, i64::from(i32::MAX)),
        "min_p" => number("vLLM's.", 0.0, 1.0),
        "seed" => integer(
            "The same seed, prompt and parameters give the same tokens.",
            i64::MIN,
            i64::MAX,
        ),
        "frequency_penalty" | "presence_penalty" => number("Takes from what was said.", -2.0, 2.0),
        "repetition_penalty" => {
            json!({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 2, "description": "vLLM's."})
        }
        "logit_bias" => json!({"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100,
            "maximum": 100}, "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}, "description": "By token id."}),
        "stop" => {
            json!({"type": ["string", "array", "null"], "items": {"type": "string", "minLength": 1}, "maxItems": 4,
            "minLength": 1, "description": "Any of these ends a choice."})
        }
        "stop_token_ids" => nullable(ids("vLLM's.")),
        "include_stop_str_in_output" => flag("vLLM's."),
        "ignore_eos" => flag("vLLM's: goes on after the model's end of turn."),
        "min_tokens" => integer("vLLM's: no stop before so many tokens.", 0, 1 << 30),
        "skip_special_tokens" => flag("vLLM's."),
        "details" => flag("Tells how it ended."),
        "response_format" => {
            json!({"type": ["object", "null"], "description": "`text`, `json_object` or `json_schema`."})
        }
        "structured_outputs" => {
            json!({"type": ["object", "null"], "description": "vLLM's: one of `json`, `json_object`, `regex`, `choice`, `grammar`."})
        }
        "guided_regex" | "guided_grammar" => text("Older name of a structured output."),
        "guided_choice" => {
            json!({"type": ["array", "null"], "items": {"type": "string", "minLength": 1}, "minItems": 1,
            "description": "Older name of a structured output."})
        }
        "guided_json" => json!({"description": "Older name of a structured output."}),
        "priority" => integer("vLLM's: lower goes first.", i64::MIN, i64::MAX),
        "user" | "safety_identifier" => text("Goes into the usage record."),
        "cache_salt" => {
            json!({"type": ["string", "null"], "minLength": 1, "maxLength": 256, "description": "A prefix cache of its own."})
        }
        _ => json!({}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_the_other_endpoints_is_described() {
        for schema in [
            completion(),
            message(),
            message_count(),
            generate(),
            tokenize(),
            detokenize(),
        ] {
            let properties = schema["properties"].as_object().unwrap();
            for (name, field) in properties.iter().filter(|(name, _)| *name != "parameters") {
                assert!(
                    field["description"].as_str().is_some_and(|about| !about.is_empty()),
                    "{name}"
                );
            }
            for name in schema["required"].as_array().unwrap() {
                assert!(properties.contains_key(name.as_str().unwrap()));
            }
        }
        let parameters = generate()["properties"]["parameters"]["properties"].clone();
        assert!(
            parameters
                .as_object()
                .unwrap()
                .values()
                .all(|field| field["description"].is_string())
        );
    }

    #[test]
    fn a_chat_may_have_what_works_and_nothing_else() {
        let schema = chat();
        assert_eq!(schema["additionalProperties"], false);
        let properties = schema["properties"].as_object().unwrap();
        for field in FIELDS {
            assert_eq!(
                properties.contains_key(field.name),
                field.support != FieldSupport::Refused,
                "{}",
                field.name
            );
        }
    }
}
