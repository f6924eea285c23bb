//! A JSON object, and those within it, read field by field: what is taken is checked, and what is left over in the end is
//! refused by name. So a field works or is an error, and none can be ignored by oversight. Knows no endpoint. (Fields of
//! sampling, which several endpoints share, are read by [`Params`](crate::params::Params).)

use serde_json::{Map, Value as Json};

use crate::api_error::ApiError;
use crate::json;

/// Characters of a client's field name that are shown back.
const NAME_CHARS_MAX: usize = 96;

/// An object in the making of a request.
#[derive(Debug)]
pub(crate) struct Body {
    fields: Map<String, Json>,
    /// Where it stands in the request, with the dot that follows; empty for the request itself.
    place: String,
}

impl Body {
    /// Parses a whole body.
    ///
    /// # Errors
    /// 400: not UTF-8, not JSON, or no object.
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        match json::parse(bytes)? {
            Json::Object(fields) => Ok(Self::new(fields, String::new())),
            _ => Err(ApiError::bad_request("The body must be a JSON object.")),
        }
    }

    /// An object within a request; `place` names it as messages to the client do (`tools[0]`).
    pub fn nested(value: Json, place: &str) -> Result<Self, ApiError> {
        match value {
            Json::Object(fields) => Ok(Self::new(fields, format!("{place}."))),
            _ => Err(ApiError::field(place, format!("`{place}` must be an object."))),
        }
    }

    /// `null` is "not given" throughout.
    fn new(mut fields: Map<String, Json>, place: String) -> Self {
        fields.retain(|_, value| !value.is_null());
        Self { fields, place }
    }

    /// A field's name with its place, for messages.
    pub fn name(&self, name: &str) -> String {
        format!("{}{name}", self.place)
    }

    /// 400 about a field: `is` completes the sentence that begins with its name.
    pub fn wrong(&self, name: &str, is: impl std::fmt::Display) -> ApiError {
        let name = self.name(name);
        let message = format!("`{name}` {is}.");
        ApiError::field(name, message)
    }

    /// 400: a field that is needed is not there.
    pub fn missing(&self, name: &str) -> ApiError {
        self.wrong(name, "is missing")
    }

    /// Takes a field as it is.
    pub fn take(&mut self, name: &str) -> Option<Json> {
        self.fields.remove(name)
    }

    /// Takes a text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "must be a string")),
        }
    }

    /// Takes a text that must be there.
    pub fn needed_text(&mut self, name: &str) -> Result<String, ApiError> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    /// Takes a truth value; `default` where there is none.
    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(default),
            Some(Json::Bool(flag)) => Ok(flag),
            Some(_) => Err(self.wrong(name, "must be true or false")),
        }
    }

    /// Takes a whole number.
    pub fn count(&mut self, name: &str, from: u32, to: u32) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| u32::try_from(count).ok());
        match count.filter(|count| (from..=to).contains(count)) {
            Some(count) => Ok(Some(count)),
            None => Err(self.wrong(name, format_args!("must be an integer from {from} to {to}"))),
        }
    }

    /// Takes a number; `range` completes "must be a number …".
    pub fn number(&mut self, name: &str, range: &str, allowed: fn(f64) -> bool) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // The smallest values must not become 0 by rounding where 0 means something else.
        let checked = value.as_f64().filter(|value| allowed(*value)).map(|value| {
            let rounded = value as f32;
            if rounded == 0.0 && value != 0.0 {
                f32::MIN_POSITIVE.copysign(value as f32)
            } else {
                rounded
            }
        });
        match checked {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, format_args!("must be a number {range}"))),
        }
    }

    /// Takes an array of at most `max` elements.
    pub fn list(&mut self, name: &str, max: usize) -> Result<Option<Vec<Json>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Json::Array(list)) if list.len() <= max => Ok(Some(list)),
            Some(_) => Err(self.wrong(name, format_args!("must be an array of at most {max} elements"))),
        }
    }

    /// Takes token ids; whether a model has them is not known here.
    pub fn token_ids(&mut self, name: &str, max: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(list) = self.list(name, max)? else {
            return Ok(None);
        };
        let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        let ids: Option<Vec<u32>> = ids.collect();
        ids.map(Some)
            .ok_or_else(|| self.wrong(name, "must be an array of token ids"))
    }

    /// Takes an object, to be read and finished by itself.
    pub fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => Self::nested(value, &self.name(name)).map(Some),
        }
    }

    /// Takes what says nothing about the answer: labels, and hints to other services.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.take(name);
        }
    }

    /// Refuses a field of the API that is not implemented, unless its value asks for nothing.
    pub fn refuse(&mut self, name: &str, why: &str, asks_for_nothing: fn(&Json) -> bool) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !asks_for_nothing(&value) => {
                let name = self.name(name);
                let message = format!("`{name}` is not supported: {why}.");
                Err(ApiError::unsupported(&name, message))
            }
            _ => Ok(()),
        }
    }

    /// To be called last: refuses what nobody took.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(name) => {
                let shown: String = self.name(name).chars().take(NAME_CHARS_MAX).collect();
                Err(ApiError::unsupported(&shown, format!("Unknown field `{shown}`.")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn body(json: Json) -> Body {
        Body::parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_is_not_taken_is_refused_by_name() {
        let mut request = body(json!({"a": 1, "b": {"c": 2, "d": 3}, "e": null}));
        assert_eq!(request.count("a", 0, 9).unwrap(), Some(1));
        let mut inner = request.object("b").unwrap().unwrap();
        assert_eq!(inner.count("c", 0, 9).unwrap(), Some(2));
        assert_eq!(inner.finish().unwrap_err().param.as_deref(), Some("b.d"));
        request.finish().unwrap();
    }

    #[test]
    fn wrong_types_are_told_with_their_place() {
        let wrong = |error: ApiError, param: &str| {
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)))
        };
        let all = || body(json!({"x": [1, 2, 3]}));
        wrong(all().text("x").unwrap_err(), "x");
        wrong(all().flag("x", false).unwrap_err(), "x");
        wrong(all().count("x", 0, 1).unwrap_err(), "x");
        wrong(all().number("x", "of any kind", |_| true).unwrap_err(), "x");
        wrong(all().list("x", 2).unwrap_err(), "x");
        wrong(all().object("x").unwrap_err(), "x");
        wrong(all().needed_text("y").unwrap_err(), "y");
        wrong(all().refuse("x", "no", Json::is_null).unwrap_err(), "x");
        assert!(Body::parse(b"[]").is_err() && Body::parse(b"{").is_err() && Body::parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn a_tiny_number_is_not_zero() {
        let tiny = body(json!({"x": 1e-300})).number("x", "", |_| true).unwrap();
        assert_eq!(tiny, Some(f32::MIN_POSITIVE));
    }
}
