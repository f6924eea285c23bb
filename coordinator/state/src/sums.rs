//! What usage is added up by, and what is added up.

use crate::codec::{put_signed, take_signed};
use crate::keys::{Key, Parts};
use crate::tables::TablesError;

/// Sums over rows. Signed, because a correction counts in the bucket of its own time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// Requests settled.
    pub requests: i128,
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: i128,
    /// Of those, cached.
    pub cached_tokens: i128,
    /// Tokens delivered.
    pub completion_tokens: i128,
    /// Nano-units for uncached prompt tokens.
    pub input_nano: i128,
    /// Nano-units for cached prompt tokens.
    pub cached_input_nano: i128,
    /// Nano-units for delivered tokens.
    pub output_nano: i128,
}

impl Sums {
    fn array(&self) -> [i128; 7] {
        [
            self.requests,
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.input_nano,
            self.cached_input_nano,
            self.output_nano,
        ]
    }

    fn of_array(values: [i128; 7]) -> Self {
        let [
            requests,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            input_nano,
            cached_input_nano,
            output_nano,
        ] = values;
        Self {
            requests,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            input_nano,
            cached_input_nano,
            output_nano,
        }
    }

    /// Adds. 2^63 records of the greatest amounts stay within 128 bits.
    pub fn add(&mut self, other: &Self) {
        let (mut sum, other) = (self.array(), other.array());
        for (sum, other) in sum.iter_mut().zip(other) {
            *sum = sum.wrapping_add(other);
        }
        *self = Self::of_array(sum);
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        for value in self.array() {
            put_signed(&mut out, value);
        }
        out
    }

    pub(crate) fn decode(mut bytes: &[u8]) -> Result<Self, TablesError> {
        let mut values = [0; 7];
        for value in &mut values {
            *value = take_signed(&mut bytes)?;
        }
        Ok(Self::of_array(values))
    }
}

/// Whose usage, of what.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dimensions {
    /// Project id.
    pub project_id: String,
    /// API key id.
    pub key_id: String,
    /// Model as the client named it.
    pub model: String,
    /// Service tier of the record. "batch" is what the API calls a batch.
    pub service_tier: String,
    /// Currency of the charge; empty where no price held.
    pub currency: String,
    /// What the client calls its user; empty where the sums do not tell users apart.
    pub user: String,
}

impl Dimensions {
    /// The keys of a bucket, without and with the user: table and start are to be filled in by [`set_bucket`].
    pub(crate) fn keys(&self) -> [Vec<u8>; 2] {
        let key = Key::of(0)
            .number(0)
            .text(&self.project_id)
            .text(&self.key_id)
            .text(&self.model)
            .text(&self.service_tier)
            .text(&self.currency);
        let with_user = key.clone().rest(self.user.as_bytes());
        [key.done(), with_user.done()]
    }
}

/// Makes a key of [`Dimensions::keys`] that of a table's bucket.
pub(crate) fn set_bucket(key: &mut [u8], table: u8, start_unix_ms: u64) {
    key[0] = table;
    key[1..9].copy_from_slice(&start_unix_ms.to_be_bytes());
}

/// [`Dimensions`] as they stand in a key, as bytes: reports look at a million of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct KeyDimensions<'k> {
    pub(crate) project_id: &'k [u8],
    pub(crate) key_id: &'k [u8],
    pub(crate) model: &'k [u8],
    pub(crate) service_tier: &'k [u8],
    pub(crate) currency: &'k [u8],
    pub(crate) user: &'k [u8],
}

impl<'k> KeyDimensions<'k> {
    /// The start of the bucket and what a key is of.
    pub(crate) fn of_key(key: &'k [u8]) -> Result<(u64, Self), TablesError> {
        let mut parts = Parts::of(key);
        let start = parts.number()?;
        let dimensions = Self {
            project_id: parts.bytes()?,
            key_id: parts.bytes()?,
            model: parts.bytes()?,
            service_tier: parts.bytes()?,
            currency: parts.bytes()?,
            user: parts.rest(),
        };
        Ok((start, dimensions))
    }

    pub(crate) fn to_owned(self) -> Dimensions {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Dimensions {
            project_id: text(self.project_id),
            key_id: text(self.key_id),
            model: text(self.model),
            service_tier: text(self.service_tier),
            currency: text(self.currency),
            user: text(self.user),
        }
    }
}

impl<'k> From<&'k Dimensions> for KeyDimensions<'k> {
    fn from(dimensions: &'k Dimensions) -> Self {
        Self {
            project_id: dimensions.project_id.as_bytes(),
            key_id: dimensions.key_id.as_bytes(),
            model: dimensions.model.as_bytes(),
            service_tier: dimensions.service_tier.as_bytes(),
            currency: dimensions.currency.as_bytes(),
            user: dimensions.user.as_bytes(),
        }
    }
}
