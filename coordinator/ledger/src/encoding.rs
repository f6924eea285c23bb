//! Canonical bytes: one record has exactly one encoding, and no two have the same. Protobuf promises neither (fields may
//! come in any order, defaults may be left out), so what is hashed and signed is written here field by field.
//!
//! Integers are little-endian and of fixed width; a string or byte string is its length in 4 bytes and then its bytes; a
//! list is its length in 4 bytes and then its elements. What is encoded starts with a domain, so that bytes of one kind
//! never pass for another.

use crate::Hash;

/// Bytes in the making.
#[derive(Debug, Default)]
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    /// Starts with `domain` and a line feed.
    pub fn new(domain: &str) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(domain.as_bytes());
        bytes.push(b'\n');
        Self(bytes)
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Eight bytes, two's complement.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// The length of something, in four bytes. What is longer than 4 GiB does not occur: messages are far smaller.
    pub fn length(&mut self, length: usize) -> &mut Self {
        self.u32(u32::try_from(length).unwrap_or(u32::MAX))
    }

    /// A byte string with its length.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.length(value.len());
        self.raw(value)
    }

    /// A string with its length in bytes.
    pub fn string(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }

    /// Bytes whose length everybody knows.
    pub fn raw(&mut self, value: &[u8]) -> &mut Self {
        self.0.extend_from_slice(value);
        self
    }

    /// All of it.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }

    /// BLAKE3 of all of it.
    pub fn hash(&mut self) -> Hash {
        *blake3::hash(&self.0).as_bytes()
    }
}
