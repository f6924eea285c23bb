//! The keys of the tables: one byte that names the table, then the key in it. Numbers are big-endian, so that their order
//! is the keys' order; a text that something follows has its length before it. A byte, once used, never gets another
//! meaning.

use crate::tables::TablesError;

/// One value: the hash chained over all commands, their outcomes and what they wrote (32 bytes).
pub const HASH: &[u8] = &[0x01, 0x01];
/// One value: the last epoch given (8 bytes, little-endian).
pub const LAST_EPOCH: &[u8] = &[0x01, 0x02];
/// One value: replicated time, milliseconds of Unix time (8 bytes, little-endian).
pub const TIME: &[u8] = &[0x01, 0x03];
/// One value: number and hash of the last row, and the Merkle frontier of the rows since the last closed period.
pub const HEAD: &[u8] = &[0x01, 0x04];
/// One value: the closed period that nobody has signed yet, a `Checkpoint`.
pub const CLOSED: &[u8] = &[0x01, 0x05];
/// One value: what all owners of files and batches have together, a `FileTotals`.
pub const FILE_TOTALS: &[u8] = &[0x01, 0x10];
/// Worker id to `WorkerRecord`.
pub const WORKERS: u8 = 0x02;
/// Number of a row of the ledger, from 1 without gaps, to `LedgerRow`.
pub const ROWS: u8 = 0x03;
/// Request id to the number of its usage row (8 bytes, little-endian) and the id of the record as it was handed in.
pub const REQUESTS: u8 = 0x04;
/// Member id to `Member`.
pub const MEMBERS: u8 = 0x05;
/// Model name to `Deployment`.
pub const DEPLOYMENTS: u8 = 0x06;
/// Project id to `Project`.
pub const PROJECTS: u8 = 0x07;
/// Key id to `ApiKey`.
pub const API_KEYS: u8 = 0x08;
/// SHA-256 of a key to its id.
pub const API_KEY_HASHES: u8 = 0x09;
/// Number of an admin change, from 1 without gaps, to `AuditRow`.
pub const AUDIT: u8 = 0x0a;
/// Price id to `Price`.
pub const PRICES: u8 = 0x0b;
/// Model, tier, start and log index to the price's id.
pub const PRICES_BY_START: u8 = 0x0c;
/// Budget id to `Budget`.
pub const BUDGETS: u8 = 0x0d;
/// Project, key ("" for the whole project) and budget id, to nothing.
pub const BUDGETS_BY_KEY: u8 = 0x0e;
/// Budget id and start of a period to its [`Window`](crate::Window).
pub const WINDOWS: u8 = 0x0f;
/// Budget id and slice id to `Slice`.
pub const SLICES: u8 = 0x10;
/// Time at which a slice's grace is over, budget id and slice id, to nothing.
pub const SLICES_DUE: u8 = 0x11;
/// Key id and SHA-256 of an idempotency key to `IdempotencyRecord`.
pub const IDEMPOTENCY: u8 = 0x12;
/// Time at which an idempotency record is forgotten, and its key, to nothing.
pub const IDEMPOTENCY_DUE: u8 = 0x13;
/// Correction id to the number of its row (8 bytes, little-endian) and the row's id.
pub const CORRECTIONS: u8 = 0x14;
/// Request id to `Corrected`.
pub const CORRECTED: u8 = 0x15;
/// Last row of a sealed period to its `Checkpoint`.
pub const CHECKPOINTS: u8 = 0x16;
/// Minute and [`Dimensions`](crate::Dimensions) without the user, to [`Sums`](crate::Sums); the last two days.
pub const USAGE_MINUTES: u8 = 0x17;
/// The same by hour.
pub const USAGE_HOURS: u8 = 0x18;
/// The same by day.
pub const USAGE_DAYS: u8 = 0x19;
/// The same by hour, with the user.
pub const USAGE_USER_HOURS: u8 = 0x1a;
/// The same by day, with the user.
pub const USAGE_USER_DAYS: u8 = 0x1b;
/// File id to `File`.
pub const FILES: u8 = 0x30;
/// Owner and file id to nothing. Ids begin with the time.
pub const FILES_BY_OWNER: u8 = 0x31;
/// File id and number from 0 to `FileChunk`; also of files that a batch is still writing.
pub const FILE_CHUNKS: u8 = 0x32;
/// Time at which a file or a batch is forgotten, and its id, to nothing.
pub const FILES_DUE: u8 = 0x33;
/// Owner to `FileTotals`.
pub const OWNER_TOTALS: u8 = 0x34;
/// Batch id to `Batch`.
pub const BATCHES: u8 = 0x35;
/// Owner and batch id to nothing.
pub const BATCHES_BY_OWNER: u8 = 0x36;
/// Id of a batch that is not over, to the id of its input file.
pub const BATCHES_OPEN: u8 = 0x37;
/// Batch id to a bit for each line that is done, the first in the lowest bit of the first byte.
pub const BATCH_DONE: u8 = 0x38;

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

/// The number in a key of a numbered table, or the one a key begins with.
pub fn number_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(1..9)?.try_into().ok()?))
}

/// A key of several parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(Vec<u8>);

impl Key {
    pub(crate) fn of(table: u8) -> Self {
        Self(vec![table])
    }

    /// A text, with its length before it. Texts of commands are far shorter than 64 KiB.
    pub(crate) fn text(mut self, text: &str) -> Self {
        let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_be_bytes());
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    pub(crate) fn number(mut self, number: u64) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    /// The rest of the key.
    pub(crate) fn rest(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }

    /// The first key beyond all that begin with this one. Tables are below 0xff, so there is one.
    pub(crate) fn beyond(self) -> Vec<u8> {
        let mut bytes = self.0;
        while bytes.pop_if(|last| *last == 0xff).is_some() {}
        if let Some(last) = bytes.last_mut() {
            *last += 1;
        }
        bytes
    }
}

/// Takes a key of several parts apart.
pub(crate) struct Parts<'k>(&'k [u8]);

impl<'k> Parts<'k> {
    pub(crate) fn of(key: &'k [u8]) -> Self {
        Self(key.get(1..).unwrap_or_default())
    }

    pub(crate) fn number(&mut self) -> Result<u64, TablesError> {
        let (number, rest) = self.0.split_first_chunk::<8>().ok_or_else(damaged)?;
        self.0 = rest;
        Ok(u64::from_be_bytes(*number))
    }

    pub(crate) fn text(&mut self) -> Result<&'k str, TablesError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| damaged())
    }

    /// The bytes of a text, where nobody needs to know that they are one.
    pub(crate) fn bytes(&mut self) -> Result<&'k [u8], TablesError> {
        let (length, rest) = self.0.split_first_chunk::<2>().ok_or_else(damaged)?;
        let (text, rest) = rest
            .split_at_checked(usize::from(u16::from_be_bytes(*length)))
            .ok_or_else(damaged)?;
        self.0 = rest;
        Ok(text)
    }

    pub(crate) fn rest(self) -> &'k [u8] {
        self.0
    }
}

fn damaged() -> TablesError {
    TablesError::Corrupt("a key has not the parts that its table's keys have".into())
}
