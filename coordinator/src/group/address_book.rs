//! Where each member of the group is reached, and under which name its certificate must be.
//!
//! The latest word counts: of the configuration at the start; of a member about itself when it calls; of the replicated state
//! when its entry changes, which is what a member does once it runs. A member that came up at another address than the state
//! knows calls the others, and so is found again before the state has it.

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
    /// The applied state's, as of the last look.
    recorded: Mutex<BTreeMap<u64, Member>>,
    changes: watch::Sender<u64>,
}

impl AddressBook {
    /// A book with this member and the `others` of its configuration.
    pub(crate) fn new(me: Member, others: impl IntoIterator<Item = Member>) -> Self {
        let entries = others.into_iter().chain([me.clone()]);
        Self {
            entries: Mutex::new(entries.map(|member| (member.id, member)).collect()),
            recorded: Mutex::default(),
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

    /// What the applied state says. It counts where it is new: an entry that was there at the last look is older than what the
    /// member has said of itself since, and than the configuration of this start.
    pub(crate) fn applied(&self, members: Vec<Member>) {
        let mut recorded = self.recorded();
        let mut entries = self.entries();
        let before = entries.clone();
        for member in &members {
            let news = recorded.get(&member.id) != Some(member);
            if member.id != self.me.id
                && news
                && (recorded.contains_key(&member.id) || !entries.contains_key(&member.id))
            {
                entries.insert(member.id, member.clone());
            }
        }
        for gone in recorded.keys().filter(|id| **id != self.me.id) {
            if !members.iter().any(|member| member.id == *gone) {
                entries.remove(gone);
            }
        }
        let changed = *entries != before;
        drop(entries);
        *recorded = members.into_iter().map(|member| (member.id, member)).collect();
        drop(recorded);
        if changed {
            self.changed();
        }
    }

    fn recorded(&self) -> MutexGuard<'_, BTreeMap<u64, Member>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, addr: &str) -> Member {
        Member {
            id,
            name: format!("c{id}"),
            cluster_addr: addr.into(),
            ..Member::default()
        }
    }

    fn addr(book: &AddressBook, id: u64) -> Option<String> {
        book.get(id).map(|member| member.cluster_addr)
    }

    #[test]
    fn the_latest_word_about_an_address_counts() {
        let book = AddressBook::new(member(1, "a:1"), [member(2, "b:1")]);
        // What an earlier run left in the state is older than this start's configuration.
        book.applied(vec![member(1, "a:0"), member(2, "b:0"), member(3, "c:0")]);
        assert_eq!(
            addr(&book, 1).as_deref(),
            Some("a:1"),
            "nobody tells this member where it is"
        );
        assert_eq!(addr(&book, 2).as_deref(), Some("b:1"));
        assert_eq!(addr(&book, 3).as_deref(), Some("c:0"), "nothing better is known");
        let changes = book.changes();
        book.greeted(&member(2, "b:2")).expect("itself");
        assert!(changes.has_changed().expect("the book is there"));
        assert_eq!(addr(&book, 2).as_deref(), Some("b:2"));
        book.applied(vec![member(1, "a:0"), member(2, "b:0"), member(3, "c:0")]);
        assert_eq!(addr(&book, 2).as_deref(), Some("b:2"), "not new");
        book.applied(vec![member(1, "a:1"), member(2, "b:3"), member(3, "c:0")]);
        assert_eq!(addr(&book, 2).as_deref(), Some("b:3"));
        book.applied(vec![member(1, "a:1"), member(2, "b:3")]);
        assert_eq!(addr(&book, 3), None, "removed");
    }

    #[test]
    fn nobody_takes_anothers_place() {
        let book = AddressBook::new(member(1, "a:1"), [member(2, "b:1")]);
        let named = Member {
            name: "x".into(),
            ..member(2, "b:1")
        };
        assert!(matches!(book.greeted(&named), Err(Stranger::OtherName { id: 2, .. })));
        assert_eq!(
            book.greeted(&member(1, "a:2")),
            Err(Stranger::Nonsense),
            "this member's own id"
        );
        assert_eq!(book.greeted(&member(3, "")), Err(Stranger::Nonsense));
        assert_eq!(book.greeted(&member(3, &"x".repeat(300))), Err(Stranger::Nonsense));
        for id in 3..100 {
            let _ = book.greeted(&member(id, "x:1"));
        }
        assert_eq!(book.members().len(), MEMBERS_MAX);
        assert_eq!(book.greeted(&member(200, "x:1")), Err(Stranger::TooMany));
    }
}
