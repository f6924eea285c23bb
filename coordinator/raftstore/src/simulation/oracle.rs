//! The reference: one machine in memory that applies every committed entry once, in order, and against which members,
//! answers and reads are held. And what clients know to be true.

use super::admin::Admin;
use super::books::Books;
use super::digest::{Digest, Digested};
use super::invariants;
use crate::membership::Members;
use crate::planted::{self, Witnessed};
use baton_proto::state::{Command, command::Kind, ledger_row::Body};
use baton_state::{Applied, MemoryTables, Outcome, view};
use prost::Message as _;
use std::collections::{BTreeMap, HashMap};

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
    /// What that costs.
    pub(super) nano: u64,
}

struct Entry {
    term: u64,
    data: Vec<u8>,
    outcome: Option<Outcome>,
}

/// The state after an entry.
pub(super) struct At {
    pub(super) hash: [u8; 32],
    pub(super) digest: Digest,
}

pub(super) struct Oracle {
    state: Digested,
    /// The last checkpoint whose signature was checked ends with this row.
    verified: u64,
    pub(super) last: u64,
    entries: BTreeMap<u64, Entry>,
    at: BTreeMap<u64, At>,
    /// By entries that somebody was the first to know committed: what that member, who counted, had applied before.
    counted_at: BTreeMap<u64, u64>,
    /// The membership after each entry that changed it; nothing while nobody was seen with it.
    members: BTreeMap<u64, Option<Members>>,
    /// Indices of each command, by its bytes: a forwarded one that the network doubles is in the log twice.
    indices: HashMap<Vec<u8>, Vec<u64>>,
    /// Greatest time that a command told.
    now_ms: u64,
    books: Books,
    admin: Admin,
    epochs: BTreeMap<String, u64>,
    last_epoch: u64,
    pub(super) delivered: BTreeMap<String, Delivered>,
    rows_checked: u64,
}

/// The index at which a new group's log starts.
const FIRST: u64 = 1;

impl Oracle {
    pub(super) fn new(founders: Members) -> Self {
        let start = At {
            hash: [0; 32],
            digest: Digest::default(),
        };
        Self {
            state: Digested::default(),
            verified: 0,
            last: FIRST,
            entries: BTreeMap::new(),
            at: BTreeMap::from([(FIRST, start)]),
            counted_at: BTreeMap::from([(FIRST, FIRST)]),
            members: BTreeMap::from([(FIRST, Some(founders))]),
            indices: HashMap::new(),
            now_ms: 0,
            books: Books::default(),
            admin: Admin::default(),
            epochs: BTreeMap::new(),
            last_epoch: 0,
            delivered: BTreeMap::new(),
            rows_checked: 0,
        }
    }

    /// The tables of the reference.
    pub(super) fn tables(&self) -> &MemoryTables {
        &self.state.tables
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
            members,
        } = seen;
        if let Some(members) = members {
            self.members.entry(index).or_insert(None);
            self.check_members(member, index, &members)?;
        }
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
            let applied = planted::apply(&mut self.state, index, &data);
            let applied = applied.map_err(|error| Violation(format!("the machine failed at {index}: {error}")))?;
            if outcome.as_ref() != Some(&applied) {
                return violation(format!(
                    "member {member} had {outcome:?} at {index}, the reference {applied:?}"
                ));
            }
            self.indices.entry(data.clone()).or_default().push(index);
            self.judge(index, &data, &applied)?;
        } else if change {
            self.members.entry(index).or_insert(None);
        }
        let hash = view::hash(self.tables()).map_err(|error| Violation(error.to_string()))?;
        let digest = self.state.digest;
        self.at.insert(index, At { hash, digest });
        self.entries.insert(index, Entry { term, data, outcome });
        if index.is_multiple_of(24) {
            self.check_state()?;
        }
        Ok(())
    }

    /// Everything that one version of the tables shows.
    pub(super) fn check_state(&mut self) -> Checked {
        invariants::check(
            &self.state.tables,
            &self.delivered,
            &self.books,
            &self.admin,
            &mut self.verified,
        )
    }

    /// What a command may and may not have done.
    fn judge(&mut self, index: u64, data: &[u8], outcome: &Outcome) -> Checked {
        let Ok(command) = Command::decode(data) else {
            return violation(format!("entry {index} is no command"));
        };
        self.now_ms = self.now_ms.max(command.at_unix_ms);
        let time = view::time(self.tables()).map_err(|error| Violation(error.to_string()))?;
        if time != self.now_ms {
            return violation(format!("replicated time is {time}, commands told {}", self.now_ms));
        }
        let Some(kind) = command.kind else {
            return violation(format!("entry {index} is no command"));
        };
        self.books.note(self.now_ms, &kind, outcome)?;
        self.admin.note(&kind, outcome)?;
        match (kind, outcome) {
            (Kind::RegisterWorker(register), Ok(Applied::Registered { epoch })) => {
                if *epoch <= self.last_epoch {
                    return violation(format!("epoch {epoch} was given after {}", self.last_epoch));
                }
                self.last_epoch = *epoch;
                self.epochs
                    .insert(register.worker.unwrap_or_default().worker_id, *epoch);
            }
            (Kind::RemoveWorker(remove), Ok(Applied::Removed { removed })) => {
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
            (Kind::WitnessWorker(witness), Ok(Applied::Removed { removed })) => {
                let present = self.epochs.get(&witness.worker_id) == Some(&witness.epoch);
                let over = self.admin.vote(&witness, present);
                if *removed != over {
                    return violation(format!("{witness:?} was answered {removed}"));
                }
                if over {
                    self.epochs.remove(&witness.worker_id);
                }
            }
            _ => {}
        }
        self.judge_rows()?;
        self.books.compare(self.tables())?;
        for (worker, epoch) in &self.epochs {
            let found = view::worker(self.tables(), worker)?.unwrap_or_default();
            if found.epoch != *epoch {
                let found = found.epoch;
                return violation(format!("worker {worker} is there under epoch {found}, not {epoch}"));
            }
            if found.lost_by != self.admin.lost_by(worker) {
                let (found, known) = (found.lost_by, self.admin.lost_by(worker));
                return violation(format!("worker {worker} is lost by {found:?}, votes say {known:?}"));
            }
        }
        Ok(())
    }

    /// New rows say what was delivered, and charge it unless it came too late.
    fn judge_rows(&mut self) -> Checked {
        while let Ok(Some(row)) = view::row(self.tables(), self.rows_checked + 1) {
            self.rows_checked += 1;
            let Some(Body::Usage(record)) = &row.body else { continue };
            let Some(delivered) = self.delivered.get(&record.request_id) else {
                return violation(format!("a row of request {}, which nobody sent", record.request_id));
            };
            if delivered.tokens != record.completion_tokens {
                return violation(format!(
                    "request {} is billed {} tokens, {} were delivered",
                    record.request_id, record.completion_tokens, delivered.tokens
                ));
            }
            self.books.settled(self.now_ms, record, &row, delivered.nano)?;
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

    /// A member that had applied so much before knows now that all up to `committed` is.
    pub(super) fn counted(&mut self, committed: u64, applied: u64) {
        if self
            .counted_at
            .last_key_value()
            .is_none_or(|(last, _)| *last < committed)
        {
            self.counted_at.insert(committed, applied);
        }
    }

    /// What whoever counted the entry at `index` had applied by then.
    pub(super) fn counted_at(&self, index: u64) -> u64 {
        self.counted_at.range(index..).next().map_or(0, |(_, applied)| *applied)
    }

    /// The memberships in force at an index and later; nothing if one of them is not known yet.
    pub(super) fn members_since(&self, index: u64) -> Option<Vec<&Members>> {
        let first = self.members.range(..=index).next_back().map_or(0, |(first, _)| *first);
        self.members
            .range(first..)
            .map(|(_, members)| members.as_ref())
            .collect()
    }

    /// The last entry up to `index` that changed the membership; 0 if none did.
    pub(super) fn last_change(&self, index: u64) -> u64 {
        let changes = self.members.range(FIRST + 1..=index.max(FIRST + 1));
        let last = changes.map(|(at, _)| *at).next_back().unwrap_or(0);
        if last <= index { last } else { 0 }
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
