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
mod control;
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
use baton_proto::state::{Member, PutMember, command};
use baton_raftstore::{RaftStore, RaftStoreError};
use baton_state::view;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) struct Group {
    me: Member,
    store: RaftStore,
    book: Arc<AddressBook>,
    peering: Arc<Peering>,
    /// What workers were last told of the members.
    told: Mutex<Coordinators>,
    /// This member's own entry is on its way through Raft.
    putting: AtomicBool,
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
            putting: AtomicBool::new(false),
        })
    }

    /// This member's id.
    pub(crate) fn id(&self) -> u64 {
        self.me.id
    }

    /// The members that vote, as far as is known here.
    pub(crate) fn voters(&self) -> Vec<u64> {
        self.store.members().voters
    }

    /// The members that do not vote yet.
    pub(crate) fn learners(&self) -> Vec<u64> {
        self.store.members().learners
    }

    /// Whether nobody else votes.
    pub(crate) fn is_alone(&self) -> bool {
        self.voters() == [self.me.id]
    }

    /// Whether this member knows a leader: one that lost its quorum steps down, and its followers then know none.
    pub(crate) fn has_leader(&self) -> bool {
        self.store.status().leader_id != 0
    }

    /// Where a member is, as far as is known.
    pub(crate) fn member(&self, id: u64) -> Option<Member> {
        self.book.get(id)
    }

    /// A new connection to this very member.
    pub(crate) async fn connect(&self, member: &Member) -> Result<tonic::transport::Channel, String> {
        lane::connect(&self.peering, member).await
    }

    /// Where workers find the members.
    pub(crate) fn coordinators(&self) -> Coordinators {
        let (members, known) = (self.store.members(), self.book.members());
        let addrs = known.into_iter().filter(|member| members.contains(member.id));
        let addrs = addrs.map(|member| member.cluster_addr);
        Coordinators {
            cluster_addrs: if self.is_alone() { Vec::new() } else { addrs.collect() },
            applied_index: self.store.status().applied_index,
        }
    }

    /// Takes in what was applied since, and tells the workers where it changes the members. This member's own entry in the
    /// state is put right, if there is somebody to read it.
    pub(crate) fn follow(self: &Arc<Self>, cluster: &Cluster) -> Result<(), RaftStoreError> {
        let recorded = view::members(&self.store.state()?)?;
        let own = recorded.iter().find(|member| member.id == self.me.id);
        let right = own.is_some_and(|own| {
            let me = &self.me;
            (&own.name, &own.cluster_addr, &own.api_url) == (&me.name, &me.cluster_addr, &me.api_url)
        });
        if !right && self.has_leader() && self.store.members().contains(self.me.id) {
            let me = Member {
                ledger_public_key: own.map(|own| own.ledger_public_key.clone()).unwrap_or_default(),
                ..self.me.clone()
            };
            self.put_own(cluster, me);
        }
        self.book.applied(recorded);
        self.tell_workers(cluster);
        Ok(())
    }

    fn put_own(self: &Arc<Self>, cluster: &Cluster, me: Member) {
        if self.putting.swap(true, Ordering::AcqRel) {
            return;
        }
        let group = self.clone();
        cluster.tasks.spawn(async move {
            let put = command::Kind::PutMember(PutMember { member: Some(me) });
            if let Err(error) = group.store.propose(crate::cluster::command(put)).await {
                tracing::debug!(%error, "this member's address was not committed; it is tried again");
            }
            group.putting.store(false, Ordering::Release);
        });
    }

    fn tell_workers(&self, cluster: &Cluster) {
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
