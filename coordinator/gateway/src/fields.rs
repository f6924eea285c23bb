//! The fields of a chat completion request: which of them work, which are taken without effect, and which are refused.
//! This table is the contract: a field that is not in it is refused by name, none is silently ignored.

use serde_json::Value as Json;

/// What happens to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldSupport {
    /// Does what OpenAI's (or, for the fields marked so, vLLM's) description says.
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
    /// For people: limits, and where it comes from.
    pub note: &'static str,
    /// For refused ones, the value that asks for nothing; written for people.
    pub neutral: &'static str,
    is_neutral: fn(&Json) -> bool,
}

const fn works(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        note,
        support: FieldSupport::Works,
        neutral: "",
        is_neutral: |_| false,
    }
}

const fn harmless(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        note,
        support: FieldSupport::Harmless,
        neutral: "",
        is_neutral: |_| true,
    }
}

const fn refused(name: &'static str, neutral: &'static str, is_neutral: fn(&Json) -> bool) -> Field {
    Field {
        name,
        note: "",
        support: FieldSupport::Refused,
        neutral,
        is_neutral,
    }
}

/// All known fields. `null` always means "not given".
pub const FIELDS: &[Field] = &[
    works("model", "What serves it: one of `GET /v1/models`."),
    works(
        "messages",
        "Roles `system`, `developer`, `user`, `assistant`, `tool`, `function`; text parts only, nothing is fetched.",
    ),
    works(
        "max_completion_tokens",
        "Per choice. Together with the prompt within the context.",
    ),
    works("max_tokens", "Older name of `max_completion_tokens`."),
    works("n", "Choice `i` has the seed `seed + i`. The prompt is counted once."),
    works(
        "temperature",
        "0 to 2; 0 is greedy. Where it is left out: the model's own recommendation, else 1.",
    ),
    works("top_p", "As `temperature`."),
    works("top_k", "vLLM's. 0 and -1 keep all."),
    works("min_p", "vLLM's."),
    works("seed", "The same seed, prompt and parameters give the same tokens."),
    works("frequency_penalty", "-2 to 2."),
    works("presence_penalty", "-2 to 2."),
    works("repetition_penalty", "vLLM's; above 0, at most 2."),
    works("logit_bias", "-100 to 100 by token id."),
    works(
        "logprobs",
        "Of the model's distribution before temperature and truncation.",
    ),
    works("top_logprobs", "At most `top_logprobs_max`."),
    works("stop", "At most `stops_max` strings; across token boundaries too."),
    works("stop_token_ids", "vLLM's."),
    works("include_stop_str_in_output", "vLLM's."),
    works(
        "min_tokens",
        "vLLM's. Neither stop tokens nor stop strings end a choice before.",
    ),
    works("ignore_eos", "vLLM's."),
    works("skip_special_tokens", "vLLM's; `true` where it is left out."),
    works("stream", "Server-sent events."),
    works(
        "stream_options",
        "`include_usage`, vLLM's `continuous_usage_stats`, `include_obfuscation` (off where it is left out).",
    ),
    works(
        "response_format",
        "`text`, `json_object`, `json_schema`: enforced while sampling, `strict` or not.",
    ),
    works(
        "structured_outputs",
        "vLLM's: one of `json`, `json_object`, `regex`, `choice`, `grammar` (Lark, in llguidance's dialect).",
    ),
    works("guided_json", "Older name of `structured_outputs.json`."),
    works("guided_regex", "Older name of `structured_outputs.regex`."),
    works("guided_choice", "Older name of `structured_outputs.choice`."),
    works("guided_grammar", "Older name of `structured_outputs.grammar`."),
    works(
        "tools",
        "Functions, at most `tools_max`. `strict` arguments are enforced, see below.",
    ),
    works(
        "tool_choice",
        "`none`, `auto`, `required`, one function, `allowed_tools`. Forced calls are always valid.",
    ),
    works("parallel_tool_calls", "`false`: at most one call a turn."),
    works("functions", "Older name of `tools`; answered with `function_call`."),
    works("function_call", "Older name of `tool_choice`."),
    works(
        "reasoning_effort",
        "Where the chat template has such a setting; else refused. `none` turns thinking off.",
    ),
    works(
        "include_reasoning",
        "vLLM's. `false` leaves `reasoning` and `reasoning_content` out.",
    ),
    works("chat_template_kwargs", "vLLM's: more variables for the chat template."),
    works("documents", "vLLM's, where the chat template shows them; else refused."),
    works("priority", "vLLM's: lower goes first."),
    works("cache_salt", "vLLM's: a prefix cache of its own, within the tenant's."),
    works("user", "Goes into the usage record."),
    works("safety_identifier", "Newer name of `user`."),
    harmless("metadata", "Checked, and not kept: completions are not stored."),
    harmless("store", "Completions are not stored."),
    harmless(
        "prompt_cache_key",
        "Requests go where their prefix is cached by themselves.",
    ),
    harmless("prompt_cache_retention", "The prefix cache keeps what it has room for."),
    harmless("prompt_cache_options", "As `prompt_cache_retention`."),
    harmless(
        "prediction",
        "A hint that is not taken: nothing of it is accepted, and nothing billed.",
    ),
    refused("modalities", "[\"text\"]", |value| {
        value.as_array().is_some_and(|all| all.iter().all(|one| one == "text"))
    }),
    refused("audio", "null", |_| false),
    refused("verbosity", "\"medium\"", |value| is(value, &["medium"])),
    refused("service_tier", "\"auto\" or \"default\"", |value| {
        is(value, &["auto", "default"])
    }),
    refused("web_search_options", "null", |_| false),
    refused("moderation", "null", |_| false),
    refused("best_of", "1", |value| value.as_u64() == Some(1)),
    refused("chat_template", "null", |_| false),
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
