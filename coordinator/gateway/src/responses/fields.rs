//! The fields of a response's request: which of them work, which are taken without effect, and which are refused. A field that
//! is not in this table is refused by name; none is silently ignored. `docs/responses.md` has the table as text, and a
//! test keeps the two the same.

use crate::fields::FieldSupport;

/// One field of the request.
pub(crate) struct Field {
    pub name: &'static str,
    pub support: FieldSupport,
    /// What exactly is taken, for people.
    pub note: &'static str,
}

const fn works(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        support: FieldSupport::Works,
        note,
    }
}

const fn harmless(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        support: FieldSupport::Harmless,
        note,
    }
}

const fn refused(name: &'static str, note: &'static str) -> Field {
    Field {
        name,
        support: FieldSupport::Refused,
        note,
    }
}

/// All known fields of `POST /v1/responses`. `null` always means "not given".
pub(crate) const FIELDS: &[Field] = &[
    works("model", "a name of `GET /v1/models`"),
    works(
        "input",
        "text, or items: `message`, `function_call`, `function_call_output`, `reasoning`; text parts only, others are refused by name",
    ),
    works(
        "instructions",
        "text; the first message, not handed on by `previous_response_id`",
    ),
    works(
        "previous_response_id",
        "a stored response that has ended, of the same project",
    ),
    works("tools", "`function`; the tools that run at OpenAI are refused by name"),
    works(
        "tool_choice",
        "`none`, `auto`, `required`, a function, `allowed_tools` of functions",
    ),
    works("parallel_tool_calls", ""),
    works(
        "text",
        "`format`: `text`, `json_object`, `json_schema`; `verbosity` other than `medium` is refused",
    ),
    works(
        "reasoning",
        "`effort`; of `summary` only `auto` is taken, and the thoughts themselves are given as `reasoning_text`; `mode` is refused",
    ),
    works("max_output_tokens", "from 1, thoughts included"),
    works("temperature", "0 to 2"),
    works("top_p", "above 0, at most 1"),
    works(
        "top_logprobs",
        "0 to 20; more than 0 gives the log-probabilities as `include` does",
    ),
    works(
        "include",
        "`message.output_text.logprobs`; the others speak of what never occurs here, or of thoughts that are given anyway, and are taken",
    ),
    works("stream", ""),
    works("stream_options", "`include_obfuscation`, off unless asked for"),
    works("store", "true unless given"),
    works("background", "needs `store`"),
    works(
        "metadata",
        "16 pairs, keys of 64 and values of 512 characters; stored and shown",
    ),
    works("user", "goes into the usage record"),
    works("safety_identifier", "the same, and goes before `user`"),
    works(
        "seed",
        "as in chat completions, and so are the following, which OpenAI's responses do not have",
    ),
    works("top_k", ""),
    works("min_p", ""),
    works("presence_penalty", ""),
    works("frequency_penalty", ""),
    works("repetition_penalty", ""),
    works("logit_bias", ""),
    works("stop", ""),
    works("stop_token_ids", ""),
    works("include_stop_str_in_output", ""),
    works("ignore_eos", ""),
    works("min_tokens", ""),
    works("priority", ""),
    works("cache_salt", ""),
    harmless(
        "truncation",
        "`disabled`; `auto` is refused: an input that is too long is a 400",
    ),
    harmless("max_tool_calls", "counts only the tools that run at OpenAI"),
    harmless("service_tier", "`auto` and `default`; others are refused"),
    harmless("prompt_cache_key", "the cache finds what it knows without"),
    harmless("prompt_cache_retention", ""),
    refused("prompt_cache_options", ""),
    refused("prompt", "prompts are not kept here; send `input`"),
    refused("conversation", "use `previous_response_id`"),
    refused("context_management", ""),
    refused("moderation", ""),
];

impl Field {
    pub fn find(name: &str) -> Option<&'static Self> {
        FIELDS.iter().find(|field| field.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `BATON_WRITE_DOCS=1 cargo test -p baton-gateway fields` writes it.
    #[test]
    fn the_table_in_the_docs_is_this_one() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/responses.md");
        let text = std::fs::read_to_string(&path).expect("docs/responses.md");
        let (begin, end) = ("<!-- fields: generated -->\n", "<!-- end of fields -->");
        let (head, rest) = text.split_once(begin).expect("the begin mark");
        let (table, tail) = rest.split_once(end).expect("the end mark");
        let mut wanted = String::from("| field | | |\n|---|---|---|\n");
        for field in FIELDS {
            let word = match field.support {
                FieldSupport::Works => "works",
                FieldSupport::Harmless => "taken, without effect",
                FieldSupport::Refused => "refused",
            };
            wanted.push_str(&format!("| `{}` | {word} | {} |\n", field.name, field.note));
        }
        if std::env::var_os("BATON_WRITE_DOCS").is_some() {
            std::fs::write(&path, [head, begin, &wanted, end, tail].concat()).expect("it can be written");
        } else {
            assert_eq!(table, wanted, "run this test with BATON_WRITE_DOCS=1");
        }
    }

    #[test]
    fn no_field_is_there_twice() {
        for (at, field) in FIELDS.iter().enumerate() {
            assert!(
                FIELDS[..at].iter().all(|other| other.name != field.name),
                "{}",
                field.name
            );
        }
    }
}
