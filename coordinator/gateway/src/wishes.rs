//! The fields about sampling and stopping that generating endpoints share, read from a [`Body`]. Names and ranges are
//! OpenAI's, and vLLM's where OpenAI has none; endpoints with names of their own read those themselves.

use baton_proto::limits::{LOGIT_BIAS_MAX, STOP_TOKEN_IDS_MAX};
use serde_json::Value as Json;

use crate::api_error::ApiError;
use crate::body::Body;
use crate::chat::request::{STOP_BYTES_MAX, STOPS_MAX};
use crate::generation::request::{SamplingWishes, StopWishes};

/// Most tokens that can be asked for: far above every context, and no arithmetic with it overflows.
pub(crate) const MAX_TOKENS_MAX: u32 = 1 << 30;
/// Bytes of a user's name, as records take them.
pub(crate) const USER_BYTES_MAX: usize = baton_state::bounds::TEXT_BYTES_MAX;
/// Bytes of a cache salt: a key's worth.
const CACHE_SALT_BYTES_MAX: usize = 256;

/// `temperature`, `top_p`, `top_k`, `min_p`, the penalties, `logit_bias`, `seed`.
pub(crate) fn sampling(body: &mut Body) -> Result<SamplingWishes, ApiError> {
    let penalty = |value: f64| (-2.0..=2.0).contains(&value);
    Ok(SamplingWishes {
        temperature: body.number("temperature", "from 0 to 2", |value| (0.0..=2.0).contains(&value))?,
        top_p: body.number("top_p", "above 0 and at most 1", |value| value > 0.0 && value <= 1.0)?,
        top_k: top_k(body)?,
        min_p: body.number("min_p", "from 0 to 1", |value| (0.0..=1.0).contains(&value))?,
        presence_penalty: body.number("presence_penalty", "from -2 to 2", penalty)?,
        frequency_penalty: body.number("frequency_penalty", "from -2 to 2", penalty)?,
        repetition_penalty: body.number("repetition_penalty", "above 0 and at most 2", |value| {
            value > 0.0 && value <= 2.0
        })?,
        logit_bias: logit_bias(body)?,
        seed: seed(body)?,
    })
}

/// `stop` and vLLM's `stop_token_ids`, `include_stop_str_in_output`, `ignore_eos`, `min_tokens`.
pub(crate) fn stop(body: &mut Body) -> Result<StopWishes, ApiError> {
    Ok(StopWishes {
        strings: stop_strings(body, "stop", STOPS_MAX)?,
        token_ids: match body.list("stop_token_ids", STOP_TOKEN_IDS_MAX)? {
            None => Vec::new(),
            Some(ids) => {
                token_ids(&ids).ok_or_else(|| body.wrong("stop_token_ids", "must be an array of token ids"))?
            }
        },
        include: body.flag("include_stop_str_in_output", false)?,
        ignore_eos: body.flag("ignore_eos", false)?,
        min_tokens: body.count("min_tokens", 0, MAX_TOKENS_MAX)?.unwrap_or(0),
    })
}

/// A string or an array of them.
pub(crate) fn stop_strings(body: &mut Body, name: &str, max: usize) -> Result<Vec<String>, ApiError> {
    let given = match body.take(name) {
        None => return Ok(Vec::new()),
        Some(Json::Array(several)) => several,
        Some(one) => vec![one],
    };
    let fits = |text: &Json| {
        let text = text.as_str().filter(|text| (1..=STOP_BYTES_MAX).contains(&text.len()));
        text.map(str::to_owned)
    };
    let strings: Option<Vec<String>> = given.iter().map(fits).collect();
    strings.filter(|strings| strings.len() <= max).ok_or_else(|| {
        body.wrong(
            name,
            format_args!("must be a string or an array of at most {max} strings, each of 1 to {STOP_BYTES_MAX} bytes"),
        )
    })
}

/// vLLM's `priority`: any integer, lower goes first. Far ones are taken as the end of the 32-bit range.
pub(crate) fn priority(body: &mut Body) -> Result<i32, ApiError> {
    let Some(value) = body.take("priority") else {
        return Ok(0);
    };
    let end = |number: i64| number.clamp(-i64::from(i32::MAX), i64::from(i32::MAX)) as i32;
    let priority = value.as_i64().map(end).or_else(|| value.as_u64().map(|_| i32::MAX));
    priority.ok_or_else(|| body.wrong("priority", "must be an integer; lower goes first"))
}

/// The client's user, for the record: `safety_identifier`, or its older name.
pub(crate) fn user(body: &mut Body) -> Result<String, ApiError> {
    let newer = body.short_text("safety_identifier", USER_BYTES_MAX)?;
    let older = body.short_text("user", USER_BYTES_MAX)?;
    Ok(newer.or(older).unwrap_or_default())
}

/// vLLM's `cache_salt`.
pub(crate) fn cache_salt(body: &mut Body) -> Result<String, ApiError> {
    Ok(body.short_text("cache_salt", CACHE_SALT_BYTES_MAX)?.unwrap_or_default())
}

/// vLLM's: 0 and -1 both keep all.
fn top_k(body: &mut Body) -> Result<Option<u32>, ApiError> {
    let Some(value) = body.take("top_k") else {
        return Ok(None);
    };
    match value.as_i64() {
        Some(-1) => Ok(Some(0)),
        Some(count) if (0..=i64::from(i32::MAX)).contains(&count) => Ok(u32::try_from(count).ok()),
        _ => Err(body.wrong("top_k", "must be an integer of at least 0; 0 and -1 keep all tokens")),
    }
}

/// Any 64-bit integer, signed or not; a negative one stands for its two's complement.
fn seed(body: &mut Body) -> Result<Option<u64>, ApiError> {
    let Some(value) = body.take("seed") else {
        return Ok(None);
    };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some)
        .ok_or_else(|| body.wrong("seed", "must be a 64-bit integer"))
}

/// Token ids as text, as keys of an object, each with its bias.
fn logit_bias(body: &mut Body) -> Result<Vec<(u32, f32)>, ApiError> {
    let is = format!("must be an object of at most {LOGIT_BIAS_MAX} token ids, each with a number from -100 to 100");
    let mut biases: Vec<(u32, f32)> = match body.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Json::Object(map)) if map.len() <= LOGIT_BIAS_MAX => map
            .iter()
            .map(|(id, bias)| {
                let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
                Some((id.parse().ok()?, bias as f32))
            })
            .collect::<Option<_>>()
            .ok_or_else(|| body.wrong("logit_bias", &is))?,
        Some(_) => return Err(body.wrong("logit_bias", &is)),
    };
    // "7" and "07" are one token.
    biases.sort_by_key(|(id, _)| *id);
    if biases.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(body.wrong("logit_bias", "names a token twice"));
    }
    Ok(biases)
}

/// `None` if any of them is no 32-bit id.
pub(crate) fn token_ids(values: &[Json]) -> Option<Vec<u32>> {
    let ids = values
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
    ids.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn body(json: Json) -> Body {
        Body::parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn every_field_is_read() {
        let mut fields = body(
            json!({"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": -2,
            "frequency_penalty": 2, "repetition_penalty": 1.5, "logit_bias": {"7": -100, "3": 5}, "seed": -1,
            "stop": "x", "stop_token_ids": [4], "include_stop_str_in_output": true, "ignore_eos": true, "min_tokens": 2}),
        );
        let wishes = SamplingWishes {
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(0),
            min_p: Some(0.1),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(2.0),
            repetition_penalty: Some(1.5),
            logit_bias: vec![(3, 5.0), (7, -100.0)],
            seed: Some(u64::MAX),
        };
        assert_eq!(sampling(&mut fields).unwrap(), wishes);
        let stops = StopWishes {
            strings: vec!["x".into()],
            token_ids: vec![4],
            include: true,
            ignore_eos: true,
            min_tokens: 2,
        };
        assert_eq!(stop(&mut fields).unwrap(), stops);
        fields.finish().unwrap();
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for bad in [
            json!({"temperature": 2.1}),
            json!({"temperature": "1"}),
            json!({"top_p": 0}),
            json!({"top_k": -2}),
            json!({"min_p": -0.1}),
            json!({"presence_penalty": 3}),
            json!({"frequency_penalty": -3}),
            json!({"repetition_penalty": 0}),
            json!({"logit_bias": {"x": 1}}),
            json!({"logit_bias": {"1": 101}}),
            json!({"logit_bias": {"1": 1, "01": 2}}),
            json!({"seed": 1.5}),
            json!({"stop": ["a", "b", "c", "d", "e"]}),
            json!({"stop": [""]}),
            json!({"stop": "x".repeat(STOP_BYTES_MAX + 1)}),
            json!({"stop_token_ids": ["x"]}),
            json!({"stop_token_ids": [-1]}),
            json!({"min_tokens": -1}),
            json!({"ignore_eos": 1}),
        ] {
            let name = bad.as_object().unwrap().keys().next().unwrap().clone();
            let mut fields = body(bad.clone());
            let error = sampling(&mut fields)
                .and(stop(&mut fields))
                .expect_err(&bad.to_string());
            assert_eq!((error.status.as_u16(), error.param), (400, Some(name)), "{bad}");
        }
    }
}
