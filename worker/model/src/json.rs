//! Typed, bounded reading of fields of a JSON object, with errors that name the field. Reads files no larger than
//! told; knows nothing of what the fields mean.

use crate::error::ModelError;
use serde_json::{Map, Value};
use std::io::Read;
use std::path::Path;

/// Reads a file of at most `bytes_max` bytes. `Ok(None)` if it does not exist.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, ModelError> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ModelError::io(path, e)),
    };
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file at the limit from one beyond it, and bounds pipes and devices too.
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| ModelError::io(path, e))?;
    if bytes.len() as u64 > bytes_max {
        return Err(config_error(path, format!("it is larger than {bytes_max} bytes")));
    }
    Ok(Some(bytes))
}

pub(crate) fn config_error(path: &Path, reason: impl Into<String>) -> ModelError {
    ModelError::Config {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// A JSON object and the file it came from. A `null` field counts as absent, as in the files of the field.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a> {
    pub path: &'a Path,
    pub map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub fn error(&self, reason: impl Into<String>) -> ModelError {
        config_error(self.path, reason)
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> ModelError {
        let mut shown = value.to_string();
        if shown.len() > 60 {
            shown = shown.chars().take(60).collect::<String>() + "…";
        }
        self.error(format!("`{key}` must be {wanted}, not {shown}"))
    }

    /// A whole number in `1..=max`.
    pub fn count(&self, key: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, value, &format!("a whole number from 1 to {max}"))),
        }
    }

    pub fn need_count(&self, key: &str, max: usize) -> Result<usize, ModelError> {
        self.count(key, max)?
            .ok_or_else(|| self.error(format!("`{key}` is missing")))
    }

    /// A finite number in `min..=max`.
    pub fn number(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if n >= min && n <= max => Ok(Some(n)),
            _ => Err(self.wrong(key, value, &format!("a number from {min} to {max}"))),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "a string"))
    }

    pub fn object(&self, key: &str) -> Result<Option<Object<'a>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, value, "an object"))?;
        Ok(Some(Object { path: self.path, map }))
    }

    /// One token id or a list of at most `max`, each below `vocab_size`.
    pub fn token_ids(&self, key: &str, max: usize, vocab_size: usize) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = match value {
            Value::Array(list) if list.len() <= max => list.as_slice(),
            Value::Array(_) => return Err(self.wrong(key, value, &format!("a list of at most {max} token ids"))),
            one => std::slice::from_ref(one),
        };
        let id = |v: &Value| {
            v.as_u64()
                .filter(|n| *n < vocab_size as u64)
                .and_then(|n| u32::try_from(n).ok())
        };
        let wrong = || self.wrong(key, value, &format!("a token id below {vocab_size} or a list of them"));
        list.iter()
            .map(|v| id(v).ok_or_else(wrong))
            .collect::<Result<Vec<_>, _>>()
            .map(Some)
    }
}
