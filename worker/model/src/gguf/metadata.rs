//! The key-value section of a GGUF header: values of all types, read without copying strings or arrays, and typed
//! access to them. Does not know what the keys mean.

use super::cursor::{Cursor, Truncated};
use crate::error::ModelError;
use std::collections::BTreeMap;
use std::path::Path;

/// Arrays of arrays: the format allows them, no known key uses them; this many levels are passed over.
const ARRAY_DEPTH_MAX: usize = 4;

/// One metadata value.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a [u8]),
    Array(Array<'a>),
}

/// An array, as its bytes: walked through once when it was read, so they are known to be whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Array<'a> {
    element: u32,
    len: usize,
    bytes: &'a [u8],
}

/// What is wrong with a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadValue {
    Truncated,
    /// A type the format does not have.
    UnknownType(u32),
    /// A boolean that is neither 0 nor 1.
    NotBool(u8),
    TooDeep,
}

impl From<Truncated> for BadValue {
    fn from(_: Truncated) -> Self {
        BadValue::Truncated
    }
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a value of a fixed size, or the fewest bytes of one without.
fn bytes_min(kind: u32) -> Result<usize, BadValue> {
    match kind {
        0 | 1 | BOOL => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 | STRING => Ok(8),
        ARRAY => Ok(12),
        other => Err(BadValue::UnknownType(other)),
    }
}

impl<'a> Value<'a> {
    /// Reads a value of type `kind` (the numbers of the format's `gguf_metadata_value_type`).
    pub fn read(cursor: &mut Cursor<'a>, kind: u32) -> Result<Self, BadValue> {
        Self::read_nested(cursor, kind, 0)
    }

    fn read_nested(cursor: &mut Cursor<'a>, kind: u32, depth: usize) -> Result<Self, BadValue> {
        Ok(match kind {
            0 => Value::Unsigned(cursor.u8()?.into()),
            1 => Value::Signed((cursor.u8()? as i8).into()),
            2 => Value::Unsigned(cursor.u16()?.into()),
            3 => Value::Signed((cursor.u16()? as i16).into()),
            4 => Value::Unsigned(cursor.u32()?.into()),
            5 => Value::Signed((cursor.u32()? as i32).into()),
            6 => Value::Float(cursor.f32()?.into()),
            BOOL => match cursor.u8()? {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(BadValue::NotBool(other)),
            },
            STRING => Value::Text(cursor.string()?),
            ARRAY => {
                if depth >= ARRAY_DEPTH_MAX {
                    return Err(BadValue::TooDeep);
                }
                let element = cursor.u32()?;
                let len = cursor.count(bytes_min(element)?)?;
                let mut walked = cursor.clone();
                match element {
                    BOOL | STRING | ARRAY => {
                        for _ in 0..len {
                            Self::read_nested(&mut walked, element, depth + 1)?;
                        }
                    }
                    // `count` has checked that they fit.
                    fixed => drop(walked.take(len * bytes_min(fixed)?)?),
                }
                let bytes = cursor.take(walked.position() - cursor.position())?;
                Value::Array(Array { element, len, bytes })
            }
            10 => Value::Unsigned(cursor.u64()?),
            11 => Value::Signed(cursor.u64()? as i64),
            12 => Value::Float(cursor.f64()?),
            other => return Err(BadValue::UnknownType(other)),
        })
    }

    /// A whole number that is not negative, of whichever integer type.
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(n) => Some(n),
            Value::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn number(&self) -> Option<f64> {
        match *self {
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            Value::Float(n) => Some(n),
            _ => None,
        }
    }

    pub fn flag(&self) -> Option<bool> {
        match *self {
            Value::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    /// Text, if it is UTF-8.
    pub fn text(&self) -> Option<&'a str> {
        match *self {
            Value::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut cursor = Cursor::new(self.bytes);
        let element = self.element;
        (0..self.len).map_while(move |_| Value::read(&mut cursor, element).ok())
    }
}

/// All metadata of a file.
#[derive(Debug)]
pub(crate) struct Metadata<'a> {
    pub path: &'a Path,
    pub values: BTreeMap<&'a str, Value<'a>>,
}

impl<'a> Metadata<'a> {
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.values.get(key).copied()
    }

    /// Applies `read` to the value of `key`, which must succeed if the key is there.
    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = read(value).ok_or_else(|| ModelError::gguf(self.path, format!("its `{key}` is not {wanted}")));
        found.map(Some)
    }

    fn missing(&self, key: &str) -> ModelError {
        ModelError::gguf(self.path, format!("its `{key}` is missing"))
    }

    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, ModelError> {
        self.typed(key, "a whole number", |v| v.unsigned())
    }

    /// A number that is the same for all layers, written once or once per layer.
    pub fn per_layer(&self, key: &str) -> Result<Option<u64>, ModelError> {
        let read = |value| match value {
            Value::Array(array) => {
                let mut numbers = array.iter().map(|v| v.unsigned());
                let first = numbers.next()??;
                numbers.all(|n| n == Some(first)).then_some(first)
            }
            one => one.unsigned(),
        };
        self.typed(key, "one whole number for all layers", read)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(key, "a finite number", |v| v.number().filter(|n| n.is_finite()))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "true or false", |v| v.flag())
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(key, "text in UTF-8", |v| v.text())
    }

    pub fn array(&self, key: &str) -> Result<Option<Array<'a>>, ModelError> {
        let read = |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        };
        self.typed(key, "a list", read)
    }

    pub fn need_text(&self, key: &str) -> Result<&'a str, ModelError> {
        self.text(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn need_per_layer(&self, key: &str) -> Result<u64, ModelError> {
        self.per_layer(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn need_array(&self, key: &str) -> Result<Array<'a>, ModelError> {
        self.array(key)?.ok_or_else(|| self.missing(key))
    }
}
