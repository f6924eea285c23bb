//! The fields of a chat completion request: which of them work, which are taken without effect, and which are refused.
//! This table is the contract: a field that is not in it is refused by name, none is silently ignored.

use serde_json::Value as Json;

/// What happens to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldSupport {
    /// Does what OpenAI's (or, for `top_k`, `ignore_eos` and `priority`, vLLM's) description says.
    Works,
    /// Taken and without effect on the result: labels and hints to OpenAI's own service.
    Harmless,
    /// Refused with a 400 that names it, unless its value asks for nothing (`null`, or the neutral value).
    Refused,
}

/// One field of the request.
pub struct Field {
    /// Its name in the JSON.
    pub name: &'static str,
    /// What happens to it.
    pub support: FieldSupport,
    /// For refused ones, the value that asks for nothing; written for people.
    pub neutral: &'static str,
    is_neutral: fn(&Json) -> bool,
}

const fn works(name: &'static str) -> Field {
    Field {
        name,
        support: FieldSupport::Works,
        neutral: "",
        is_neutral: |_| false,
    }
}

const fn harmless(name: &'static str) -> Field {
    Field {
        name,
        support: FieldSupport::Harmless,
        neutral: "",
        is_neutral: |_| true,
    }
}

const fn refused(name: &'static str, neutral: &'static str, is_neutral: fn(&Json) -> bool) -> Field {
    Field {
        name,
        support: FieldSupport::Refused,
        neutral,
        is_neutral,
    }
}

/// All known fields. `null` always means "not given".
pub const FIELDS: &[Field] = &[
    works("model"),
    works("messages"),
    works("max_completion_tokens"),
    works("max_tokens"),
    works("temperature"),
    works("top_p"),
    works("top_k"),
    works("seed"),
    works("stop"),
    works("ignore_eos"),
    works("stream"),
    works("stream_options"),
    works("priority"),
    works("user"),
    works("safety_identifier"),
    harmless("metadata"),
    harmless("store"),
    harmless("prompt_cache_key"),
    harmless("prompt_cache_retention"),
    refused("n", "1", |value| value.as_u64() == Some(1)),
    refused("tools", "[]", is_empty),
    refused("tool_choice", "\"none\" or \"auto\"", |value| {
        is(value, &["none", "auto"])
    }),
    refused("parallel_tool_calls", "a boolean, without tools", Json::is_boolean),
    refused("functions", "[]", is_empty),
    refused("function_call", "\"none\" or \"auto\"", |value| {
        is(value, &["none", "auto"])
    }),
    refused("response_format", "{\"type\": \"text\"}", is_text_format),
    refused("logprobs", "false", is_false),
    refused("top_logprobs", "0", is_zero),
    refused("frequency_penalty", "0", is_zero),
    refused("presence_penalty", "0", is_zero),
    refused("repetition_penalty", "1", |value| value.as_f64() == Some(1.0)),
    refused("min_p", "0", is_zero),
    refused("min_tokens", "0", is_zero),
    refused("logit_bias", "{}", is_empty),
    refused("modalities", "[\"text\"]", |value| {
        value.as_array().is_some_and(|all| all.iter().all(|one| one == "text"))
    }),
    refused("audio", "null", |_| false),
    refused("prediction", "null", |_| false),
    refused("reasoning_effort", "null", |_| false),
    refused("verbosity", "\"medium\"", |value| is(value, &["medium"])),
    refused("service_tier", "\"auto\" or \"default\"", |value| {
        is(value, &["auto", "default"])
    }),
    refused("web_search_options", "null", |_| false),
    refused("moderation", "null", |_| false),
    refused("best_of", "1", |value| value.as_u64() == Some(1)),
    refused("stop_token_ids", "[]", is_empty),
    refused("include_stop_str_in_output", "false", is_false),
    refused("skip_special_tokens", "true", |value| value == &Json::Bool(true)),
    refused("chat_template", "null", |_| false),
    refused("chat_template_kwargs", "{}", is_empty),
    refused("cache_salt", "null", |_| false),
];

impl Field {
    /// The field of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        FIELDS.iter().find(|field| field.name == name)
    }

    /// True if the value may stand in a request although the field is not implemented.
    pub(crate) fn asks_for_nothing(&self, value: &Json) -> bool {
        value.is_null() || (self.is_neutral)(value)
    }
}

fn is(value: &Json, words: &[&str]) -> bool {
    value.as_str().is_some_and(|word| words.contains(&word))
}

fn is_false(value: &Json) -> bool {
    value == &Json::Bool(false)
}

fn is_zero(value: &Json) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_empty(value: &Json) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
}

fn is_text_format(value: &Json) -> bool {
    value.get("type").and_then(Json::as_str) == Some("text")
}
