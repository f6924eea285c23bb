//! The keys of the tables: one byte that names the table, then the key in it. Numbers are big-endian, so that their order
//! is the keys' order. A byte, once used, never gets another meaning.

/// One value: the hash chained over all commands and their outcomes (32 bytes).
pub const HASH: &[u8] = &[0x01, 0x01];
/// One value: the last epoch given (8 bytes, little-endian).
pub const LAST_EPOCH: &[u8] = &[0x01, 0x02];
/// Worker id to `WorkerRecord`.
pub const WORKERS: u8 = 0x02;
/// Number of a usage record, from 1 without gaps, to `UsageRecord`.
pub const USAGE: u8 = 0x03;
/// Request id to the number of its usage record (8 bytes, little-endian).
pub const USAGE_IDS: u8 = 0x04;
/// Member id to `Member`.
pub const MEMBERS: u8 = 0x05;

/// A key with a name in it.
pub fn named(table: u8, name: &str) -> Vec<u8> {
    [&[table], name.as_bytes()].concat()
}

/// A key with a number in it.
pub fn numbered(table: u8, number: u64) -> Vec<u8> {
    [&[table], number.to_be_bytes().as_slice()].concat()
}

/// The bounds of a whole table, from and (exclusive) to.
pub fn whole(table: u8) -> ([u8; 1], [u8; 1]) {
    ([table], [table + 1])
}

/// The number in a key of a numbered table.
pub fn number_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(1..)?.try_into().ok()?))
}
