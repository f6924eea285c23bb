//! The reference: one machine in memory that applies every committed entry once, in order, and against which members,
//! answers and reads are held. And what clients know to be true.

use super::invariants;
use crate::membership::Members;
use crate::planted::{self, Witnessed};
use baton_proto::state::{Command, UsageStatus, command::Kind, ledger_row::Body};
use baton_state::{Applied, MemoryTables, Outcome, SLICE_GRACE_MS, Tables, view};
use prost::Message as _;
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Violation(pub(super) String);

pub(super) type Checked<T = ()> = Result<T, Violation>;

pub(super) fn violation<T>(what: impl Into<String>) -> Checked<T> {
    Err(Violation(what.into()))
}

/// What was delivered for a request, which is what its row must say.
#[derive(Debug, Clone)]
pub(super) struct Delivered {
    pub(super) tokens: u32,
    pub(super) nano: u64,
    pub(super) budgets: Vec<String>,
}

struct Entry {
    term: u64,
    data: Vec<u8>,
    outcome: Option<Outcome>,
}

/// The state after an entry.
pub(super) struct At {
    pub(super) hash: [u8; 32],
    pub(super) digest: [u8; 32],
}

pub(super) struct Oracle {
    pub(super) tables: MemoryTables,
    pub(super) last: u64,
    entries: BTreeMap<u64, Entry>,
    at: BTreeMap<u64, At>,
    /// The membership after each entry that changed it.
    members: BTreeMap<u64, Option<Members>>,
    /// Indices of each command, by its bytes: a forwarded one that the network doubles is in the log twice.
    indices: HashMap<Vec<u8>, Vec<u64>>,
    /// Greatest time that a command told.
    now_ms: u64,
    /// When slices end, by id.
    slice_ends: BTreeMap<String, u64>,
    epochs: BTreeMap<String, u64>,
    last_epoch: u64,
    pub(super) delivered: BTreeMap<String, Delivered>,
    /// Limits of hard budgets.
    pub(super) limits: BTreeMap<String, u64>,
    rows_checked: u64,
}

/// The index at which a new group's log starts.
const FIRST: u64 = 1;

impl Oracle {
    pub(super) fn new(founders: Members) -> Self {
        let tables = MemoryTables::default();
        let start = At {
            hash: [0; 32],
            digest: digest(&tables),
        };
        Self {
            tables,
            last: FIRST,
            entries: BTreeMap::new(),
            at: BTreeMap::from([(FIRST, start)]),
            members: BTreeMap::from([(FIRST, Some(founders))]),
            indices: HashMap::new(),
            now_ms: 0,
            slice_ends: BTreeMap::new(),
            epochs: BTreeMap::new(),
            last_epoch: 0,
            delivered: BTreeMap::new(),
            limits: BTreeMap::new(),
            rows_checked: 0,
        }
    }

    pub(super) fn at(&self, index: u64) -> Option<&At> {
        self.at.get(&index)
    }

    /// A member applied an entry.
    pub(super) fn witness(&mut self, seen: Witnessed) -> Checked {
        let Witnessed {
            member,
            index,
            term,
            command,
            change,
            data,
            outcome,
        } = seen;
        if let Some(known) = self.entries.get(&index) {
            if known.term != term || known.data != data {
                return violation(format!(
                    "member {member} applied another entry at {index} than others did"
                ));
            }
            if outcome.is_some() && known.outcome != outcome {
                return violation(format!(
                    "member {member} had {outcome:?} at {index}, others {:?}",
                    known.outcome
                ));
            }
            return Ok(());
        }
        if command && outcome.is_none() {
            // Its power went while it applied this: it did not.
            return Ok(());
        }
        if index != self.last + 1 {
            return violation(format!(
                "member {member} applied {index}, and {} is the last entry anybody applied",
                self.last
            ));
        }
        self.last = index;
        if command {
            // The reference is nobody's: it witnesses itself, and that is thrown away.
            let applied = planted::apply(&mut self.tables, index, &data);
            let applied = applied.map_err(|error| Violation(format!("the machine failed at {index}: {error}")))?;
            if outcome.as_ref() != Some(&applied) {
                return violation(format!(
                    "member {member} had {outcome:?} at {index}, the reference {applied:?}"
                ));
            }
            self.indices.entry(data.clone()).or_default().push(index);
            self.judge(index, &data, &applied)?;
        } else if change {
            self.members.insert(index, None);
        }
        let hash = view::hash(&self.tables).map_err(|error| Violation(error.to_string()))?;
        let digest = digest(&self.tables);
        self.at.insert(index, At { hash, digest });
        self.entries.insert(index, Entry { term, data, outcome });
        if index.is_multiple_of(16) {
            self.check_state()?;
        }
        Ok(())
    }

    /// Everything that one version of the tables shows.
    pub(super) fn check_state(&mut self) -> Checked {
        invariants::check(&self.tables, &self.delivered, &self.limits)
    }

    /// What a command may and may not have done.
    fn judge(&mut self, index: u64, data: &[u8], outcome: &Outcome) -> Checked {
        let Ok(command) = Command::decode(data) else {
            return violation(format!("entry {index} is no command"));
        };
        self.now_ms = self.now_ms.max(command.at_unix_ms);
        let time = view::time(&self.tables).map_err(|error| Violation(error.to_string()))?;
        if time != self.now_ms {
            return violation(format!("replicated time is {time}, commands told {}", self.now_ms));
        }
        match (command.kind, outcome) {
            (Some(Kind::RegisterWorker(register)), Ok(Applied::Registered { epoch })) => {
                if *epoch <= self.last_epoch {
                    return violation(format!("epoch {epoch} was given after {}", self.last_epoch));
                }
                self.last_epoch = *epoch;
                self.epochs
                    .insert(register.worker.unwrap_or_default().worker_id, *epoch);
            }
            (Some(Kind::RemoveWorker(remove)), Ok(Applied::Removed { removed })) => {
                let current = self.epochs.get(&remove.worker_id) == Some(&remove.epoch);
                if *removed != current {
                    return violation(format!(
                        "removing {} under epoch {} was answered {removed}",
                        remove.worker_id, remove.epoch
                    ));
                }
                if current {
                    self.epochs.remove(&remove.worker_id);
                }
            }
            (Some(Kind::LeaseSlice(lease)), Ok(Applied::Leased { expires_unix_ms, .. })) => {
                let end = self.slice_ends.entry(lease.slice_id).or_default();
                *end = (*end).max(*expires_unix_ms);
            }
            _ => {}
        }
        self.judge_rows()?;
        for (worker, epoch) in &self.epochs {
            let found = view::worker(&self.tables, worker)
                .ok()
                .flatten()
                .map(|found| found.epoch);
            if found != Some(*epoch) {
                return violation(format!("worker {worker} is there under epoch {found:?}, not {epoch}"));
            }
        }
        Ok(())
    }

    /// New rows say what was delivered, and charge it unless it came too late.
    fn judge_rows(&mut self) -> Checked {
        while let Ok(Some(row)) = view::row(&self.tables, self.rows_checked + 1) {
            self.rows_checked += 1;
            let Some(Body::Usage(record)) = row.body else { continue };
            let Some(delivered) = self.delivered.get(&record.request_id) else {
                return violation(format!("a row of request {}, which nobody sent", record.request_id));
            };
            if delivered.tokens != record.completion_tokens {
                return violation(format!(
                    "request {} is billed {} tokens, {} were delivered",
                    record.request_id, record.completion_tokens, delivered.tokens
                ));
            }
            if record.status() == UsageStatus::Expired {
                let end = |slice: &String| self.slice_ends.get(slice).map_or(0, |end| end + SLICE_GRACE_MS);
                if record
                    .postings
                    .iter()
                    .all(|posting| self.now_ms < end(&posting.slice_id))
                {
                    return violation(format!(
                        "request {} is not charged although its slices were in their grace",
                        record.request_id
                    ));
                }
            } else {
                let charge = baton_ledger::charge::total(&row.charge.unwrap_or_default());
                if charge != u128::from(delivered.nano) {
                    return violation(format!("request {} is charged {charge}", record.request_id));
                }
            }
        }
        Ok(())
    }

    /// A client was answered: returns the index of its command.
    pub(super) fn answered(&self, command: &[u8], outcome: &Outcome) -> Checked<u64> {
        let Some(indices) = self.indices.get(command) else {
            return violation(format!(
                "a command was answered {outcome:?} and was never applied anywhere"
            ));
        };
        let outcome_at = |index: &u64| self.entries.get(index).and_then(|entry| entry.outcome.as_ref());
        if let Some(index) = indices.iter().find(|index| outcome_at(index) == Some(outcome)) {
            return Ok(*index);
        }
        violation(format!(
            "command {} was answered {outcome:?} and came to {:?}",
            indices[0],
            outcome_at(&indices[0])
        ))
    }

    /// The membership has changed since the entry at `index`.
    pub(super) fn members_changed_since(&self, index: u64) -> bool {
        self.members.range(index..).next().is_some()
    }

    /// A member with this applied index has this membership.
    pub(super) fn check_members(&mut self, id: u64, applied: u64, members: &Members) -> Checked {
        let Some((index, known)) = self.members.range_mut(..=applied).next_back() else {
            return Ok(());
        };
        match known {
            Some(known) if known != members => violation(format!(
                "member {id} at {applied} has members {members:?}, others since {index} {known:?}"
            )),
            Some(_) => Ok(()),
            None => {
                *known = Some(members.clone());
                Ok(())
            }
        }
    }
}

/// Hash of all pairs.
pub(super) fn digest(tables: &impl Tables) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let walked = tables.scan(&[0], &[0xff], &mut |key, value| {
        hasher.update(&(key.len() as u64).to_le_bytes());
        hasher.update(key);
        hasher.update(&(value.len() as u64).to_le_bytes());
        hasher.update(value);
        Ok(ControlFlow::Continue(()))
    });
    match walked {
        Ok(()) => *hasher.finalize().as_bytes(),
        Err(_) => [0xff; 32],
    }
}
