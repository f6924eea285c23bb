//! A chat completion request: from bytes to checked values. What a field means for a model (its context length, its
//! template) is checked by the caller. The fields' table is in `fields.rs`, messages are in `messages.rs`.

use serde_json::{Map, Value as Json};

use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::fields::{Field, FieldSupport};
use crate::generation::request::{Chat, GenerationRequest, Prompt, SamplingWishes, StopWishes};
use crate::messages;

/// Stop strings in one request, as OpenAI's limit.
pub(crate) const STOPS_MAX: usize = 4;
/// Bytes of one stop string. Its whole length may be held back from the client.
pub(crate) const STOP_BYTES_MAX: usize = 1024;
/// Bytes of a user's name, as records take them.
const USER_BYTES_MAX: usize = baton_state::bounds::TEXT_BYTES_MAX;
/// Most tokens that can be asked for: far above every context, and no arithmetic with it overflows.
const MAX_TOKENS_MAX: u64 = 1 << 30;

/// What of a request is the chat endpoint's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ChatOptions {
    pub stream: bool,
    pub include_usage: bool,
    /// With every chunk.
    pub continuous_usage: bool,
    /// Chunks are padded.
    pub obfuscation: bool,
    /// Log-probabilities are wanted.
    pub logprobs: bool,
    /// The client speaks of functions, as before there were tools.
    pub functions: bool,
}

/// Parses and checks a body.
pub(crate) fn parse(body: &[u8], config: &GatewayConfig) -> Result<(GenerationRequest, ChatOptions), ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::bad_request(format!("The body is not UTF-8: byte {} is wrong.", error.valid_up_to()))
    })?;
    // serde_json bounds the nesting itself.
    let parsed: Json = serde_json::from_str(text)
        .map_err(|error| ApiError::bad_request(format!("The body is not valid JSON: {error}.")))?;
    let Json::Object(mut fields) = parsed else {
        return Err(ApiError::bad_request("The body must be a JSON object."));
    };
    fields.retain(|_, value| !value.is_null());
    refuse_unsupported(&fields)?;

    let model = match fields.remove("model") {
        Some(Json::String(model)) => model,
        Some(_) => return Err(ApiError::field("model", "`model` must be a string.")),
        None => {
            return Err(ApiError::field(
                "model",
                "`model` is missing. GET /v1/models lists what is served.",
            ));
        }
    };
    let messages = messages::parse(fields.remove("messages"), config.messages_max)?;
    let stream = boolean(&fields, "stream")?;
    let request = GenerationRequest {
        model,
        prompts: vec![Prompt::Chat(Chat {
            messages,
            ..Chat::default()
        })],
        n: 1,
        max_tokens: max_tokens(&fields)?,
        sampling: SamplingWishes {
            temperature: number(&fields, "temperature", "from 0 to 2", |value| {
                (0.0..=2.0).contains(&value)
            })?,
            top_p: number(&fields, "top_p", "above 0 and at most 1", |value| {
                value > 0.0 && value <= 1.0
            })?,
            top_k: top_k(&fields)?,
            seed: seed(&fields)?,
            ..SamplingWishes::default()
        },
        stop: StopWishes {
            strings: stop(fields.remove("stop"))?,
            ignore_eos: boolean(&fields, "ignore_eos")?,
            ..StopWishes::default()
        },
        priority: priority(&fields)?,
        user: user(&fields)?,
        ..GenerationRequest::default()
    };
    let options = ChatOptions {
        stream,
        include_usage: include_usage(&fields, stream)?,
        ..ChatOptions::default()
    };
    Ok((request, options))
}

fn refuse_unsupported(fields: &Map<String, Json>) -> Result<(), ApiError> {
    for (name, value) in fields {
        match Field::find(name) {
            Some(field) if field.support != FieldSupport::Refused || field.asks_for_nothing(value) => {}
            Some(field) => {
                let message = format!(
                    "`{name}` is not supported by this server; leave it out or set it to {}.",
                    field.neutral
                );
                return Err(ApiError::unsupported(name, message));
            }
            None => {
                let shown: String = name.chars().take(64).collect();
                return Err(ApiError::unsupported(&shown, format!("Unknown field `{shown}`.")));
            }
        }
    }
    Ok(())
}

/// `max_completion_tokens`, or its older name. Both may be given if they agree.
fn max_tokens(fields: &Map<String, Json>) -> Result<Option<(&'static str, u32)>, ApiError> {
    let mut chosen: Option<(&'static str, u32)> = None;
    for name in ["max_completion_tokens", "max_tokens"] {
        let Some(value) = fields.get(name) else { continue };
        let count = value
            .as_u64()
            .filter(|count| (1..=MAX_TOKENS_MAX).contains(count))
            .and_then(|count| u32::try_from(count).ok());
        let Some(count) = count else {
            return Err(ApiError::field(
                name,
                format!("`{name}` must be an integer from 1 to {MAX_TOKENS_MAX}."),
            ));
        };
        match chosen {
            Some((_, other)) if other != count => {
                let message = "`max_tokens` and `max_completion_tokens` differ; send only `max_completion_tokens`.";
                return Err(ApiError::field(name, message));
            }
            Some(_) => {}
            None => chosen = Some((name, count)),
        }
    }
    Ok(chosen)
}

fn number(
    fields: &Map<String, Json>,
    name: &'static str,
    range: &str,
    allowed: impl Fn(f64) -> bool,
) -> Result<Option<f32>, ApiError> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    // The smallest values must not become 0 by rounding where 0 means something else.
    let checked = value.as_f64().filter(|value| allowed(*value)).map(|value| {
        if value > 0.0 {
            (value as f32).max(f32::MIN_POSITIVE)
        } else {
            0.0
        }
    });
    match checked {
        Some(number) => Ok(Some(number)),
        None => Err(ApiError::field(name, format!("`{name}` must be a number {range}."))),
    }
}

/// vLLM's: 0 and -1 both keep all.
fn top_k(fields: &Map<String, Json>) -> Result<Option<u32>, ApiError> {
    let Some(value) = fields.get("top_k") else {
        return Ok(None);
    };
    match value.as_i64() {
        Some(-1) => Ok(Some(0)),
        Some(count) if (0..=i64::from(i32::MAX)).contains(&count) => Ok(u32::try_from(count).ok()),
        _ => Err(ApiError::field(
            "top_k",
            "`top_k` must be an integer of at least 0; 0 and -1 keep all tokens.",
        )),
    }
}

/// Any 64-bit integer, signed or not; a negative one stands for its two's complement.
fn seed(fields: &Map<String, Json>) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.get("seed") else {
        return Ok(None);
    };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some)
        .ok_or_else(|| ApiError::field("seed", "`seed` must be a 64-bit integer."))
}

/// vLLM's: any integer, lower goes first. Far ones are taken as the end of the 32-bit range.
fn priority(fields: &Map<String, Json>) -> Result<i32, ApiError> {
    let Some(value) = fields.get("priority") else {
        return Ok(0);
    };
    let end = |number: i64| number.clamp(-i64::from(i32::MAX), i64::from(i32::MAX)) as i32;
    let priority = value.as_i64().map(end).or_else(|| value.as_u64().map(|_| i32::MAX));
    priority.ok_or_else(|| ApiError::field("priority", "`priority` must be an integer; lower goes first."))
}

/// Goes into the usage record. Both may be given; `safety_identifier` counts then.
fn user(fields: &Map<String, Json>) -> Result<String, ApiError> {
    for name in ["safety_identifier", "user"] {
        match fields.get(name) {
            None => {}
            Some(Json::String(user)) if user.len() <= USER_BYTES_MAX => return Ok(user.clone()),
            Some(_) => {
                let message = format!("`{name}` must be a string of at most {USER_BYTES_MAX} bytes.");
                return Err(ApiError::field(name, message));
            }
        }
    }
    Ok(String::new())
}

fn stop(value: Option<Json>) -> Result<Vec<String>, ApiError> {
    let message = format!(
        "`stop` must be a string or an array of at most {STOPS_MAX} strings, each of 1 to {STOP_BYTES_MAX} bytes."
    );
    let wrong = || ApiError::field("stop", message.clone());
    let stops = match value {
        None => return Ok(Vec::new()),
        Some(Json::String(one)) => vec![one],
        Some(Json::Array(several)) if several.len() <= STOPS_MAX => several
            .into_iter()
            .map(|stop| match stop {
                Json::String(stop) => Ok(stop),
                _ => Err(wrong()),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
        return Err(wrong());
    }
    Ok(stops)
}

fn boolean(fields: &Map<String, Json>, name: &'static str) -> Result<bool, ApiError> {
    match fields.get(name) {
        None => Ok(false),
        Some(Json::Bool(flag)) => Ok(*flag),
        Some(_) => Err(ApiError::field(name, format!("`{name}` must be true or false."))),
    }
}

fn include_usage(fields: &Map<String, Json>, stream: bool) -> Result<bool, ApiError> {
    let options = match fields.get("stream_options") {
        None => return Ok(false),
        Some(Json::Object(options)) => options,
        Some(_) => return Err(ApiError::field("stream_options", "`stream_options` must be an object.")),
    };
    if !stream {
        return Err(ApiError::field(
            "stream_options",
            "`stream_options` is only allowed with `stream: true`.",
        ));
    }
    let mut include = false;
    for (name, value) in options {
        match (name.as_str(), value) {
            (_, Json::Null) => {}
            ("include_usage", Json::Bool(flag)) => include = *flag,
            ("include_usage", _) => {
                return Err(ApiError::field(
                    "stream_options.include_usage",
                    "`include_usage` must be true or false.",
                ));
            }
            // Padding against traffic analysis, which is not done here: asking for none is fine.
            ("include_obfuscation" | "continuous_usage_stats", Json::Bool(false)) => {}
            (other, _) => {
                let shown: String = format!("stream_options.{other}").chars().take(64).collect();
                return Err(ApiError::unsupported(
                    &shown,
                    format!("`{shown}` is not supported by this server."),
                ));
            }
        }
    }
    Ok(include)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields::FIELDS;
    use serde_json::json;

    fn parse(extra: Json) -> Result<(GenerationRequest, ChatOptions), ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        super::parse(body.to_string().as_bytes(), &GatewayConfig::default())
    }

    /// The request is refused with a 400 naming the field.
    fn refused(extra: Json, param: &str) {
        let error = parse(extra.clone()).expect_err(&extra.to_string());
        assert_eq!(
            (error.status.as_u16(), error.param.as_deref()),
            (400, Some(param)),
            "{extra}: {}",
            error.message
        );
    }

    #[test]
    fn takes_every_field_that_works() {
        let (request, options) = parse(json!({"max_tokens": 7, "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5, "top_k": -1,
            "seed": -1, "stop": "x", "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
            "user": "u", "metadata": {"a": "b"}, "store": false, "n": 1, "tools": [], "logit_bias": {}, "logprobs": false,
            "response_format": {"type": "text"}, "presence_penalty": 0.0, "tool_choice": null, "priority": -7}))
        .unwrap();
        assert_eq!((request.priority, request.user.as_str()), (-7, "u"));
        let both = parse(json!({"user": "u", "safety_identifier": "s"})).unwrap();
        assert_eq!(both.0.user, "s");
        assert_eq!(request.max_tokens, Some(("max_completion_tokens", 7)));
        let sampling = &request.sampling;
        assert_eq!(
            (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed),
            (Some(0.0), Some(0.5), Some(0), Some(u64::MAX))
        );
        assert!(request.stop.ignore_eos && options.stream && options.include_usage);
        assert_eq!(request.stop.strings, ["x"]);
    }

    #[test]
    fn refuses_bad_values_by_name() {
        for bad in [
            json!(0),
            json!(-1),
            json!(1e12),
            json!(1_000_000_000_000u64),
            json!(1.5),
            json!("7"),
            json!(true),
        ] {
            refused(json!({"max_tokens": bad}), "max_tokens");
            refused(json!({"max_completion_tokens": bad}), "max_completion_tokens");
        }
        refused(json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens");
        for bad in [json!(-0.1), json!(2.1), json!(1e300), json!("1"), json!([])] {
            refused(json!({"temperature": bad}), "temperature");
        }
        for bad in [json!(0), json!(1.1), json!(-1), json!("x")] {
            refused(json!({"top_p": bad}), "top_p");
        }
        for bad in [json!(-2), json!(1.5), json!(1u64 << 40)] {
            refused(json!({"top_k": bad}), "top_k");
        }
        for bad in [json!(1.5), json!("1"), json!(1e30)] {
            refused(json!({"seed": bad}), "seed");
        }
        for bad in [
            json!(1),
            json!(""),
            json!(["a", 1]),
            json!(["a", "b", "c", "d", "e"]),
            json!("x".repeat(1025)),
        ] {
            refused(json!({"stop": bad}), "stop");
        }
        for bad in [json!(1.5), json!("1"), json!(true), json!(1e30)] {
            refused(json!({"priority": bad}), "priority");
        }
        for (far, taken) in [(json!(i64::MIN), -i32::MAX), (json!(u64::MAX), i32::MAX)] {
            assert_eq!(parse(json!({"priority": far})).unwrap().0.priority, taken);
        }
        refused(json!({"stream": "yes"}), "stream");
        refused(json!({"user": 7}), "user");
        refused(json!({"safety_identifier": "x".repeat(513)}), "safety_identifier");
        refused(json!({"stream_options": {"include_usage": true}}), "stream_options");
        refused(
            json!({"stream": true, "stream_options": {"odd": 1}}),
            "stream_options.odd",
        );
        refused(json!({"model": 7}), "model");
        refused(json!({"model": null}), "model");
    }

    #[test]
    fn every_field_works_or_is_refused_by_name() {
        refused(json!({"bogus": 1}), "bogus");
        for field in FIELDS.iter().filter(|field| field.support == FieldSupport::Refused) {
            refused(json!({field.name: {"type": "json_object"}}), field.name);
            parse(json!({field.name: null})).unwrap();
        }
        for (name, value) in [
            ("n", json!(2)),
            ("logprobs", json!(true)),
            ("presence_penalty", json!(0.5)),
            ("logit_bias", json!({"1": 2})),
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("required")),
        ] {
            refused(json!({name: value}), name);
        }
    }

    #[test]
    fn refuses_what_is_no_json() {
        let deep = "[".repeat(100_000);
        let bodies: [&[u8]; 8] = [
            b"",
            b"{",
            b"[]",
            b"nul",
            b"{\"model\": NaN}",
            b"{\"temperature\": 1e999}",
            b"{\"a\": \"\xff\"}",
            deep.as_bytes(),
        ];
        for body in bodies {
            assert_eq!(
                super::parse(body, &GatewayConfig::default())
                    .unwrap_err()
                    .status
                    .as_u16(),
                400
            );
        }
        assert!(super::parse(br#"{"model":"\ud800"}"#, &GatewayConfig::default()).is_err());
    }
}
