//! Whether two versions of the tables are the same to the byte: a sum over all pairs, so that the reference keeps its own as it
//! goes, and only members' tables have to be walked. Nobody here tries to make two versions collide.

use baton_state::{MemoryTables, Pair, Tables, TablesError, TablesMut, Visit};
use std::ops::ControlFlow;

/// Number of pairs, and the sum of their hashes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Digest {
    pairs: u64,
    sum: u128,
}

impl Digest {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        self.pairs += 1;
        self.sum = self.sum.wrapping_add(hash(key, value));
    }

    fn take(&mut self, key: &[u8], value: &[u8]) {
        self.pairs -= 1;
        self.sum = self.sum.wrapping_sub(hash(key, value));
    }
}

/// Multiplies and folds, eight bytes at a time, in two lanes.
fn hash(key: &[u8], value: &[u8]) -> u128 {
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        (product as u64) ^ (product >> 64) as u64
    };
    let (mut one, mut two) = (key.len() as u64 + 1, value.len() as u64 + 1);
    for part in [key, value] {
        for bytes in part.chunks(8) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            let word = u64::from_le_bytes(word);
            one = fold(one ^ word, 0x9e37_79b9_7f4a_7c15) ^ one.rotate_left(23);
            two = fold(two ^ word, 0xd6e8_feb8_6659_fd93) ^ two.rotate_left(41);
        }
        one = one.wrapping_add(0xa076_1d64_78bd_642f);
    }
    u128::from(one) << 64 | u128::from(two)
}

/// Of all pairs; nothing if they cannot be read.
pub(super) fn digest(tables: &impl Tables) -> Option<Digest> {
    let mut digest = Digest::default();
    let walked = tables.scan(&[0], &[0xff], &mut |key, value| {
        digest.add(key, value);
        Ok(ControlFlow::Continue(()))
    });
    walked.ok().map(|()| digest)
}

/// Tables in memory that know their digest.
#[derive(Default)]
pub(super) struct Digested {
    pub(super) tables: MemoryTables,
    pub(super) digest: Digest,
}

impl Tables for Digested {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        self.tables.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        self.tables.scan(from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        self.tables.last(from, to)
    }
}

impl TablesMut for Digested {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        self.digest.add(key, value);
        if let Some(before) = self.tables.0.insert(key.to_vec(), value.to_vec()) {
            self.digest.take(key, &before);
        }
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        if let Some(before) = self.tables.0.remove(key) {
            self.digest.take(key, &before);
        }
        Ok(())
    }
}
