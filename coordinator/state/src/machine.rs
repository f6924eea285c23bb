//! One command at work on the tables: what every handler is given. Whatever it writes goes into the hash, so that members
//! whose tables differ find out, whatever the reason.

use crate::outcome::{Applied, Refused};
use crate::tables::{Pair, Tables, TablesError, TablesMut, Visit};

/// About what a settlement writes.
const WRITES_BYTES: usize = 3072;

pub(crate) struct Machine<'a> {
    tables: &'a mut dyn TablesMut,
    /// Everything written so far, to be hashed at once: there are dozens of short pieces.
    writes: Vec<u8>,
    /// Log index of the command.
    pub(crate) index: u64,
    /// Replicated time.
    pub(crate) now_ms: u64,
    /// The command as it stands in the log, and who asked.
    pub(crate) command: &'a [u8],
    pub(crate) actor: &'a str,
}

/// Why a handler ends early: the command is refused, having written nothing, or the medium failed.
#[derive(Debug)]
pub(crate) enum Stop {
    Refused(Refused),
    Tables(TablesError),
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl From<TablesError> for Stop {
    fn from(error: TablesError) -> Self {
        Self::Tables(error)
    }
}

/// What a handler returns. It checks everything before it writes anything.
pub(crate) type Handled = Result<Applied, Stop>;

impl<'a> Machine<'a> {
    pub(crate) fn new(
        tables: &'a mut dyn TablesMut,
        index: u64,
        now_ms: u64,
        command: &'a [u8],
        actor: &'a str,
    ) -> Self {
        Self {
            tables,
            writes: Vec::with_capacity(WRITES_BYTES),
            index,
            now_ms,
            command,
            actor,
        }
    }

    /// The hash of all writes so far, in order.
    pub(crate) fn written(&self) -> [u8; 32] {
        *blake3::hash(&self.writes).as_bytes()
    }

    pub(crate) fn put_message(&mut self, key: &[u8], message: &impl prost::Message) -> Result<(), TablesError> {
        self.put(key, &message.encode_to_vec())
    }

    fn record(&mut self, tag: u8, bytes: &[u8]) {
        self.writes.push(tag);
        self.writes.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.writes.extend_from_slice(bytes);
    }
}

impl Tables for Machine<'_> {
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

impl TablesMut for Machine<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        self.record(1, key);
        self.record(2, value);
        self.tables.put(key, value)
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        self.record(3, key);
        self.tables.delete(key)
    }
}
