//! What an answer must be: OpenAI's `response_format`, and vLLM's `structured_outputs` with its older `guided_*` names. At
//! most one of them.

use serde_json::Value as Json;

use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::generation::request::OutputFormat;
use crate::params::Params;

/// Alternatives of a choice.
const CHOICES_MAX: usize = 1024;
/// OpenAI's limit of a schema's name.
const NAME_BYTES_MAX: usize = 64;

/// The names of one constraint: in `structured_outputs`, its place, and the older name.
const CONSTRAINTS: [(&str, &str, &str); 4] = [
    ("json", "structured_outputs.json", "guided_json"),
    ("regex", "structured_outputs.regex", "guided_regex"),
    ("choice", "structured_outputs.choice", "guided_choice"),
    ("grammar", "structured_outputs.grammar", "guided_grammar"),
];

/// The format, and the field that asks for it.
pub(crate) fn parse(params: &Params, config: &GatewayConfig) -> Result<(OutputFormat, &'static str), ApiError> {
    let mut found = (OutputFormat::Text, "");
    if let Some(format) = params.get("response_format") {
        let format = response_format(format, config)?;
        if format != OutputFormat::Text {
            found = (format, "response_format");
        }
    }
    let outputs = match params.get("structured_outputs") {
        None => None,
        Some(Json::Object(outputs)) => Some(outputs),
        Some(_) => {
            let message = "`structured_outputs` must be an object.";
            return Err(ApiError::field("structured_outputs", message));
        }
    };
    for (name, value) in outputs.into_iter().flatten() {
        let known = CONSTRAINTS.iter().any(|(constraint, ..)| constraint == name);
        if !known && name != "json_object" && !value.is_null() {
            let place: String = format!("structured_outputs.{name}").chars().take(64).collect();
            return Err(ApiError::unsupported(
                &place,
                format!("`{place}` is not supported by this server."),
            ));
        }
    }
    let mut take = |format: OutputFormat, place: &'static str| {
        if found.0 != OutputFormat::Text {
            let message = format!("`{place}` and `{}` cannot be had together.", found.1);
            return Err(ApiError::field(place, message));
        }
        found = (format, place);
        Ok(())
    };
    for (name, place, older) in CONSTRAINTS {
        let value = outputs
            .and_then(|outputs| outputs.get(name))
            .filter(|value| !value.is_null());
        for (value, place) in [(value, place), (params.get(older), older)] {
            if let Some(value) = value {
                take(constraint(name, value, place, config)?, place)?;
            }
        }
    }
    match outputs.and_then(|outputs| outputs.get("json_object")) {
        None | Some(Json::Null | Json::Bool(false)) => {}
        Some(Json::Bool(true)) => take(OutputFormat::JsonObject, "structured_outputs.json_object")?,
        Some(_) => {
            let place = "structured_outputs.json_object";
            return Err(ApiError::field(place, format!("`{place}` must be true or false.")));
        }
    }
    Ok(found)
}

fn response_format(format: &Json, config: &GatewayConfig) -> Result<OutputFormat, ApiError> {
    let kind = format.get("type").and_then(Json::as_str);
    match kind {
        Some("text") => Ok(OutputFormat::Text),
        Some("json_object") => Ok(OutputFormat::JsonObject),
        Some("json_schema") => {
            let wrong = |place: &str, what: &str| {
                let place = format!("response_format.json_schema{place}");
                ApiError::field(place.clone(), format!("`{place}` must be {what}."))
            };
            let Some(wanted) = format.get("json_schema").and_then(Json::as_object) else {
                return Err(wrong("", "an object with `name` and `schema`"));
            };
            let name = wanted.get("name").and_then(Json::as_str).filter(|name| is_name(name));
            if name.is_none() {
                return Err(wrong(".name", "1 to 64 letters, digits, underscores and dashes"));
            }
            let strict = match wanted.get("strict") {
                None | Some(Json::Null) => false,
                Some(Json::Bool(strict)) => *strict,
                Some(_) => return Err(wrong(".strict", "true or false")),
            };
            let schema = match wanted.get("schema") {
                // OpenAI's: none admits any object.
                None | Some(Json::Null) => return Ok(OutputFormat::JsonObject),
                Some(schema) => schema,
            };
            json_schema(schema, strict, "response_format", config)
        }
        _ => Err(ApiError::field(
            "response_format.type",
            "`response_format.type` must be \"text\", \"json_object\" or \"json_schema\".",
        )),
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

fn json_schema(schema: &Json, strict: bool, place: &str, config: &GatewayConfig) -> Result<OutputFormat, ApiError> {
    let most = config.schema_bytes_max;
    if !schema.is_object() && !schema.is_boolean() {
        return Err(ApiError::field(
            place,
            format!("The schema of `{place}` must be an object."),
        ));
    }
    if schema.to_string().len() > most {
        return Err(ApiError::field(
            place,
            format!("The schema of `{place}` is larger than {most} bytes."),
        ));
    }
    let schema = schema.clone();
    Ok(OutputFormat::JsonSchema { schema, strict })
}

fn constraint(name: &str, value: &Json, place: &'static str, config: &GatewayConfig) -> Result<OutputFormat, ApiError> {
    let text = |what: &str| {
        let most = config.grammar_bytes_max;
        let text = value.as_str().filter(|text| !text.is_empty() && text.len() <= most);
        let wrong = || ApiError::field(place, format!("`{place}` must be {what} of 1 to {most} bytes."));
        text.map(str::to_owned).ok_or_else(wrong)
    };
    match name {
        "json" => {
            // vLLM takes the schema's text too.
            let parsed: Option<Json> = value.as_str().and_then(|text| serde_json::from_str(text).ok());
            json_schema(parsed.as_ref().unwrap_or(value), true, place, config)
        }
        "regex" => Ok(OutputFormat::Regex(text("a regular expression")?)),
        "grammar" => Ok(OutputFormat::Lark(text("a grammar in Lark's syntax")?)),
        _ => {
            let wrong = || {
                let most = config.grammar_bytes_max;
                let message = format!(
                    "`{place}` must be an array of 1 to {CHOICES_MAX} strings, of at most {most} bytes together."
                );
                ApiError::field(place, message)
            };
            let choices = value
                .as_array()
                .filter(|choices| (1..=CHOICES_MAX).contains(&choices.len()));
            let texts = choices.ok_or_else(wrong)?.iter().map(|choice| {
                let text = choice.as_str().filter(|text| !text.is_empty());
                text.map(str::to_owned).ok_or_else(wrong)
            });
            let texts = texts.collect::<Result<Vec<_>, _>>()?;
            if texts.iter().map(String::len).sum::<usize>() > config.grammar_bytes_max {
                return Err(wrong());
            }
            Ok(OutputFormat::Choice(texts))
        }
    }
}
