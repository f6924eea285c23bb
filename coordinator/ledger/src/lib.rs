//! The ledger that billing reads: what a request costs, what a row is to the byte, and how anybody can check both without
//! trusting who wrote them. Pure functions and small state machines over the records of `baton-proto`: no clock, no
//! network, no floats, no iteration order.
//!
//! Invariants:
//!
//! 1. Money is integers: nano-units of a currency. A price is nano-units per million tokens. A charge is rounded once per
//!    class and record ([`charge`]), and can be computed again from the record and the price alone.
//! 2. A row's id is a hash of its body, its hash covers everything in it and the hash before ([`row`]). So the hash of the
//!    last row stands for all rows.
//! 3. A checkpoint signs the Merkle root of a period, the last hash and the checkpoint before ([`checkpoint`]). So one row
//!    can be proved without the others ([`merkle`]).
//!
//! Deliberately not here: when a record is made and what stands in it (the gateway), who orders the rows and keeps them
//! (`baton-state`, `baton-raftstore`), and sockets.
#![forbid(unsafe_code)]

pub mod charge;
pub mod checkpoint;
mod encoding;
pub mod export;
pub mod feed;
pub mod json;
pub mod merkle;
pub mod money;
pub mod prices;
pub mod proof;
pub mod row;
pub mod totals;
pub mod verify;

#[cfg(test)]
mod tests;

/// A BLAKE3 hash. All hashes of the ledger are.
pub type Hash = [u8; 32];

/// What stands before the first row and before the first checkpoint.
pub const GENESIS: Hash = [0; 32];

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

/// The bytes that `text` writes in hexadecimal digits of either case, or nothing if it does not.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?))
        .collect()
}

/// A hash as `text` writes it in 64 hexadecimal digits, or nothing.
pub fn hash_from_hex(text: &str) -> Option<Hash> {
    from_hex(text)?.try_into().ok()
}
