//! The group of coordinators as seen from one member: who the others are and where, Raft's messages to and from them, and
//! what an operator asks of the group.
//!
//! ```text
//!  Raft thread ──Outbox──▶ lane per member (bounded) ──Raft.Messages, mTLS──▶ RaftService ──▶ RaftStore::receive
//!                             ▲ name, address
//!                          AddressBook ◀── configuration, greetings of members, the replicated state
//! ```
//!
//! Who is a member is Raft's configuration; the book only says where a member is reached. Deliberately not here: consensus
//! (`baton-raftstore`), and what the members agree on (`baton-state`).

mod address_book;
mod inbound;
mod lane;
mod outbox;
mod report;

pub(crate) use address_book::AddressBook;
pub(crate) use inbound::RaftService;
pub(crate) use lane::BATCH_BYTES_MAX;
pub(crate) use outbox::{Outbox, Peering};

use crate::cluster::Cluster;
use baton_proto::cluster::{CoordinatorOrder, Coordinators, coordinator_order};
use baton_proto::state::Member;
use baton_raftstore::RaftStore;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) struct Group {
    me: Member,
    store: RaftStore,
    book: Arc<AddressBook>,
    peering: Arc<Peering>,
    /// What workers were last told of the members.
    told: Mutex<Coordinators>,
}

impl Group {
    pub(crate) fn new(store: RaftStore, peering: Arc<Peering>) -> Arc<Self> {
        let book = peering.book().clone();
        Arc::new(Self {
            me: book.me().clone(),
            store,
            book,
            peering,
            told: Mutex::default(),
        })
    }

    /// This member's id.
    pub(crate) fn id(&self) -> u64 {
        self.me.id
    }

    /// The members that vote, as far as is known here.
    pub(crate) fn voters(&self) -> Vec<u64> {
        self.book.members().into_iter().map(|member| member.id).collect()
    }

    /// The members that do not vote yet.
    pub(crate) fn learners(&self) -> Vec<u64> {
        Vec::new()
    }

    /// Whether nobody else votes.
    pub(crate) fn is_alone(&self) -> bool {
        self.voters() == [self.me.id]
    }

    /// Whether this member knows a leader: one that lost its quorum steps down, and its followers then know none.
    pub(crate) fn has_leader(&self) -> bool {
        self.store.status().leader_id != 0
    }

    /// Where workers find the members.
    pub(crate) fn coordinators(&self) -> Coordinators {
        let members = self.book.members();
        let addrs = members.into_iter().map(|member| member.cluster_addr);
        Coordinators {
            cluster_addrs: if self.is_alone() { Vec::new() } else { addrs.collect() },
            applied_index: self.store.status().applied_index,
        }
    }

    /// Takes in what was applied since, and tells the workers where it changes the members.
    pub(crate) fn follow(&self, cluster: &Cluster) {
        let now = self.coordinators();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.cluster_addrs == now.cluster_addrs {
            return;
        }
        *told = now.clone();
        drop(told);
        cluster.order_all(&CoordinatorOrder {
            kind: Some(coordinator_order::Kind::Coordinators(now)),
        });
    }
}
