//! Where each member of the group is reached, and under which name its certificate must be.
//!
//! What the replicated state says counts most, since the member itself put it there; then what a member said of itself when
//! it called, then the configuration. A member that came up at another address than the state knows calls the others, and so
//! is found again before the state has it.

use baton_proto::state::Member;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// Members that are remembered. Groups have up to five; while members are exchanged there are a few more.
const MEMBERS_MAX: usize = 32;
/// Longest name or address, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// Why a member's word of itself was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stranger {
    #[error("it says nothing usable of itself")]
    Nonsense,
    #[error("member {id} is {known:?} here, not {name:?}; give every member its own id")]
    OtherName { id: u64, known: String, name: String },
    #[error("{MEMBERS_MAX} members are known already")]
    TooMany,
}

pub(crate) struct AddressBook {
    me: Member,
    entries: Mutex<BTreeMap<u64, Member>>,
    changes: watch::Sender<u64>,
}

impl AddressBook {
    /// A book with this member and the `others` of its configuration.
    pub(crate) fn new(me: Member, others: impl IntoIterator<Item = Member>) -> Self {
        let entries = others.into_iter().chain([me.clone()]);
        Self {
            entries: Mutex::new(entries.map(|member| (member.id, member)).collect()),
            me,
            changes: watch::Sender::new(0),
        }
    }

    /// This member.
    pub(crate) fn me(&self) -> &Member {
        &self.me
    }

    /// All members that are known, by id.
    pub(crate) fn members(&self) -> Vec<Member> {
        self.entries().values().cloned().collect()
    }

    pub(crate) fn get(&self, id: u64) -> Option<Member> {
        self.entries().get(&id).cloned()
    }

    /// A member said this of itself. The caller has seen a certificate under that name; an id that is known keeps its name.
    pub(crate) fn greeted(&self, member: &Member) -> Result<(), Stranger> {
        let usable = |text: &str| !text.is_empty() && text.len() <= TEXT_BYTES_MAX;
        if member.id == 0 || member.id == self.me.id || !usable(&member.name) || !usable(&member.cluster_addr) {
            return Err(Stranger::Nonsense);
        }
        if member.api_url.len() > TEXT_BYTES_MAX {
            return Err(Stranger::Nonsense);
        }
        let mut entries = self.entries();
        match entries.get(&member.id) {
            Some(known) if known.name != member.name => {
                return Err(Stranger::OtherName {
                    id: member.id,
                    known: known.name.clone(),
                    name: member.name.clone(),
                });
            }
            None if entries.len() >= MEMBERS_MAX => return Err(Stranger::TooMany),
            Some(known) if known == member => return Ok(()),
            _ => {}
        }
        entries.insert(member.id, member.clone());
        drop(entries);
        self.changed();
        Ok(())
    }

    /// Wakes when an entry changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<u64, Member>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
