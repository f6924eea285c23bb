//! JSON from strangers: text to a [`Value`] in bounded time and memory, and nothing that two readers could read differently.
//!
//! Time is in proportion to the text. Memory too, which needs a rule: `0,` is two bytes of text and an element of 32, an
//! object's entry far more, so the value's size is counted while it grows and the parse given up when it passes a multiple
//! of the text's. Nesting is bounded by serde_json (128 levels). Refused, besides what is no JSON (NaN, infinities, numbers
//! beyond a double, lone surrogates, text that is not UTF-8): a key that stands twice in one object. Parsers differ in which
//! of the two counts, and whatever checks requests before they come here must not see another one than the model does.

use std::cell::Cell;
use std::fmt;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::api_error::ApiError;

/// Bytes of memory per byte of text: twice what an array of one-digit numbers takes, or objects of a few short fields.
const GROWTH_MAX: usize = 32;
/// Every value may take this much, however short its text.
const BYTES_FREE: usize = 4 << 20;
/// About what an element of an array takes.
const ELEMENT_BYTES: usize = 32;
/// About what an object takes that is not empty: a node of a B-tree, with room for eleven entries.
const OBJECT_BYTES: usize = 640;
/// About what an entry of an object takes, beside the key's bytes.
const ENTRY_BYTES: usize = 64;
/// Of a key, characters that a message shows.
const SHOWN_CHARS_MAX: usize = 64;

/// Parses a body.
///
/// # Errors
/// 400 if it is not JSON that everybody reads alike, 413 if the value would be too large for its text.
pub(crate) fn parse(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| {
        ApiError::bad_request(format!("The body is not UTF-8: byte {} is wrong.", error.valid_up_to()))
    })?;
    let left = Cell::new(Some(text.len().saturating_mul(GROWTH_MAX).max(BYTES_FREE)));
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = Strict(&left).deserialize(&mut deserializer);
    match parsed.and_then(|value| deserializer.end().map(|()| value)) {
        Ok(value) => Ok(value),
        Err(_) if left.get().is_none() => Err(ApiError {
            message: "The body's JSON has too many values for its size; send fewer.".into(),
            ..ApiError::body_too_large(0)
        }),
        Err(error) => Err(ApiError::bad_request(format!("The body is not valid JSON: {error}."))),
    }
}

/// Reads one value. The cell holds what is left to take; `None` once that was too little.
#[derive(Clone, Copy)]
struct Strict<'a>(&'a Cell<Option<usize>>);

impl Strict<'_> {
    fn take<E: de::Error>(self, bytes: usize) -> Result<(), E> {
        self.0.set(self.0.get().and_then(|left| left.checked_sub(bytes)));
        match self.0.get() {
            Some(_) => Ok(()),
            None => Err(E::custom("too many values")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        let number = serde_json::Number::from_f64(value).ok_or_else(|| E::custom("number out of range"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.take(value.len())?;
        Ok(value.into())
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        self.take(value.len())?;
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(element) = elements.next_element_seed(self)? {
            self.take(ELEMENT_BYTES)?;
            array.push(element);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let first = if object.is_empty() { OBJECT_BYTES } else { 0 };
            self.take(first + ENTRY_BYTES + key.len())?;
            if object.contains_key(&key) {
                let shown: String = key.chars().take(SHOWN_CHARS_MAX).collect();
                return Err(de::Error::custom(format!("the key {shown:?} is there twice")));
            }
            let value = entries.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_readers_could_read_differently_is_refused() {
        let digits = "9".repeat(1_000_000);
        for bad in [
            b"".as_slice(),
            b"{} {}",
            br#"{"a":1,"a":1}"#,
            br#"[{"x":{"a":1,"b":2,"a":3}}]"#,
            br#"{"a":1,"\u0061":2}"#,
            b"NaN",
            b"[Infinity]",
            b"-Infinity",
            b"1e999",
            b"[-1e999]",
            br#""\ud800""#,
            br#""\udc00x""#,
            br#"{"\ud800":1}"#,
            b"\"\xff\"",
            b"\"\xed\xa0\x80\"",
            b"\"a\nb\"",
            b"01",
            b"[1,]",
            b"// x\n1",
            digits.as_bytes(),
        ] {
            let error = parse(bad).expect_err(&String::from_utf8_lossy(&bad[..bad.len().min(40)]));
            assert_eq!(error.status.as_u16(), 400);
            assert!(error.message.len() < 300, "{}", error.message);
        }
    }

    #[test]
    fn nesting_and_size_are_bounded() {
        for deep in [
            "[".repeat(1_000_000),
            r#"{"a":"#.repeat(100_000),
            "[".repeat(500) + &"]".repeat(500),
        ] {
            assert_eq!(parse(deep.as_bytes()).unwrap_err().status.as_u16(), 400);
        }
        parse(("[".repeat(100) + &"]".repeat(100)).as_bytes()).unwrap();

        let list = |one: &str, count: usize| format!("[{}]", vec![one; count].join(","));
        parse(list("0", 1_000_000).as_bytes()).unwrap();
        parse(list("15043", 500_000).as_bytes()).unwrap();
        for bomb in [list(r#"{"":0}"#, 500_000), list(r#"[{"":[]}]"#, 400_000)] {
            let error = parse(bomb.as_bytes()).map(|_| ()).expect_err("too large for its text");
            assert_eq!((error.status.as_u16(), error.code), (413, Some("request_too_large")));
        }
        // A few thousand of anything are no bomb.
        parse(list(r#"{"":0}"#, 4_000).as_bytes()).unwrap();
        parse(list(r#"{"role":"user","content":"a question"}"#, 100_000).as_bytes()).unwrap();
    }

    proptest! {
        /// On text without twice the same key, it reads what serde_json reads.
        #[test]
        fn it_agrees_with_serde_json(text in r#"[\[\]{}",:0-9eE+.\-tfnulrasi\\ ]{0,40}"#) {
            if let Ok(strict) = parse(text.as_bytes()) {
                prop_assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), strict);
            } else if let Ok(value) = serde_json::from_str::<Value>(&text) {
                prop_assert!(value.is_object() || value.is_array(), "{text}");
            }
        }

        #[test]
        fn it_reads_back_what_was_written(keys in proptest::collection::btree_map(".*", (".*", any::<i64>(), any::<bool>()), 0..8)) {
            let value = serde_json::json!({"k": keys});
            prop_assert_eq!(parse(value.to_string().as_bytes()).unwrap(), value);
        }
    }
}
