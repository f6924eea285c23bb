//! The state machine: what a command does to the tables. Deterministic: no clock, no randomness, no iteration order;
//! times come inside commands. Every member that applies the same commands has the same tables and the same hash.

use crate::RaftStoreError;
use crate::database::{META, Store, USAGE, USAGE_IDS, WORKERS, meta, number};
use baton_proto::state::{Command, RegisterWorker, RemoveWorker, SettleUsage, WorkerRecord, command};
use prost::Message as _;
use redb::{ReadableTable, Table, WriteTransaction};

/// The answer to a command that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The worker is registered under this epoch. Epochs come from one counter of the group, so they grow for each
    /// worker id, and a later registration of anything has a higher one.
    Registered {
        /// The new epoch.
        epoch: u64,
    },
    /// The worker is gone, or was not there under that epoch.
    Removed {
        /// False if the epoch was not the current one: nothing changed.
        removed: bool,
    },
    /// The record is settled, now or before with the same contents.
    Settled {
        /// Its number: 1, 2, 3, ... without gaps.
        sequence: u64,
    },
}

pub(crate) type Outcome = Result<Applied, RaftStoreError>;

/// The tables, open for writing in one transaction.
pub(crate) struct Machine<'txn> {
    store: Store,
    meta: Table<'txn, &'static str, &'static [u8]>,
    workers: Table<'txn, &'static str, &'static [u8]>,
    usage: Table<'txn, u64, &'static [u8]>,
    usage_ids: Table<'txn, &'static str, u64>,
    hash: [u8; 32],
}

impl<'txn> Machine<'txn> {
    pub(crate) fn open(store: &Store, txn: &'txn WriteTransaction) -> Result<Self, RaftStoreError> {
        let meta = txn.open_table(META)?;
        let hash = match meta.get(meta::HASH)? {
            None => [0; 32],
            Some(hash) => hash
                .value()
                .try_into()
                .map_err(|_| store.corrupt("the hash is not 32 bytes"))?,
        };
        Ok(Self {
            store: store.clone(),
            meta,
            workers: txn.open_table(WORKERS)?,
            usage: txn.open_table(USAGE)?,
            usage_ids: txn.open_table(USAGE_IDS)?,
            hash,
        })
    }

    /// Applies one log entry's command and chains it, with its outcome, into the hash. The outer error is the disk's;
    /// a refused command is an outcome like any other.
    pub(crate) fn apply(&mut self, command: &[u8]) -> Result<Outcome, RaftStoreError> {
        let outcome = match Command::decode(command).map(|command| command.kind) {
            Ok(Some(command::Kind::RegisterWorker(command))) => self.register(command)?,
            Ok(Some(command::Kind::RemoveWorker(command))) => self.remove(&command)?,
            Ok(Some(command::Kind::SettleUsage(command))) => self.settle(command)?,
            Ok(None) => invalid("its kind is unknown to this release"),
            Err(error) => invalid(&error.to_string()),
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.hash);
        hasher.update(&(command.len() as u64).to_le_bytes());
        hasher.update(command);
        hasher.update(&outcome_code(&outcome));
        self.hash = *hasher.finalize().as_bytes();
        Ok(outcome)
    }

    /// Writes hash and applied index; the last thing in a transaction.
    pub(crate) fn finish(mut self, applied: u64) -> Result<(), RaftStoreError> {
        self.meta.insert(meta::HASH, self.hash.as_slice())?;
        self.meta.insert(meta::APPLIED, applied.to_le_bytes().as_slice())?;
        Ok(())
    }

    fn register(&mut self, command: RegisterWorker) -> Result<Outcome, RaftStoreError> {
        let Some(worker) = command.worker else {
            return Ok(invalid("a registration without a worker"));
        };
        if worker.worker_id.is_empty() {
            return Ok(invalid("a registration without a worker id"));
        }
        let last = match self.meta.get(meta::LAST_EPOCH)? {
            None => 0,
            Some(epoch) => number(epoch.value()).ok_or_else(|| self.store.corrupt("the last epoch is not a number"))?,
        };
        let epoch = last + 1;
        self.meta.insert(meta::LAST_EPOCH, epoch.to_le_bytes().as_slice())?;
        let id = worker.worker_id.clone();
        let record = WorkerRecord {
            worker: Some(worker),
            epoch,
            registered_unix_ms: command.at_unix_ms,
        };
        self.workers.insert(id.as_str(), record.encode_to_vec().as_slice())?;
        Ok(Ok(Applied::Registered { epoch }))
    }

    fn remove(&mut self, command: &RemoveWorker) -> Result<Outcome, RaftStoreError> {
        let current = match self.workers.get(command.worker_id.as_str())? {
            None => None,
            Some(record) => {
                let record = WorkerRecord::decode(record.value());
                Some(
                    record
                        .map_err(|error| self.store.corrupt(format!("a worker record: {error}")))?
                        .epoch,
                )
            }
        };
        let removed = current == Some(command.epoch);
        if removed {
            self.workers.remove(command.worker_id.as_str())?;
        }
        Ok(Ok(Applied::Removed { removed }))
    }

    fn settle(&mut self, command: SettleUsage) -> Result<Outcome, RaftStoreError> {
        let Some(record) = command.record else {
            return Ok(invalid("a settlement without a record"));
        };
        if record.request_id.is_empty() {
            return Ok(invalid("a usage record without a request id"));
        }
        let encoded = record.encode_to_vec();
        let known = self
            .usage_ids
            .get(record.request_id.as_str())?
            .map(|sequence| sequence.value());
        if let Some(sequence) = known {
            let same = match self.usage.get(sequence)? {
                None => return Err(self.store.corrupt(format!("usage record {sequence} is missing"))),
                Some(settled) => settled.value() == encoded.as_slice(),
            };
            return Ok(if same {
                Ok(Applied::Settled { sequence })
            } else {
                Err(RaftStoreError::UsageConflict {
                    request_id: record.request_id,
                    sequence,
                })
            });
        }
        let sequence = self.usage.last()?.map_or(0, |(sequence, _)| sequence.value()) + 1;
        self.usage.insert(sequence, encoded.as_slice())?;
        self.usage_ids.insert(record.request_id.as_str(), sequence)?;
        Ok(Ok(Applied::Settled { sequence }))
    }
}

fn invalid(reason: &str) -> Outcome {
    Err(RaftStoreError::Invalid(reason.to_owned()))
}

/// The outcome as it enters the hash, so that members that judged a command differently find out.
fn outcome_code(outcome: &Outcome) -> [u8; 9] {
    let (tag, value) = match outcome {
        Ok(Applied::Registered { epoch }) => (1, *epoch),
        Ok(Applied::Removed { removed }) => (2, u64::from(*removed)),
        Ok(Applied::Settled { sequence }) => (3, *sequence),
        Err(RaftStoreError::UsageConflict { sequence, .. }) => (4, *sequence),
        Err(_) => (5, 0),
    };
    let mut code = [0; 9];
    code[0] = tag;
    code[1..].copy_from_slice(&value.to_le_bytes());
    code
}
