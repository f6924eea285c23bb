//! The Raft group of coordinators and its durable state: who is in the cluster, and what every request cost.
//!
//! raft-rs' `RawNode` is driven by one thread over two redb files: the log with Raft's hard state, and the tables the commands
//! build (`baton-state` says how), which are flushed from memory now and then. A command is answered after it is logged durably, committed
//! and applied; commands that arrive while one fsync runs share the next.
//!
//! ```text
//! RaftStore::propose ──queue──▶ thread ──▶ Node (RawNode, no clock, no channel) ──▶ log · hard state      one fsync
//!        ▲                        │                                       └──────────▶ layers in memory ──▶ state tables
//!        └────────answer──────────┘                                                              flush
//! ```
//!
//! A group of one needs no network; a larger one sends through [`Peers`] and receives through [`RaftStore::receive`].
//! This crate deliberately knows neither gRPC nor what a worker's load is: soft state never goes through Raft.
#![forbid(unsafe_code)]

#[macro_use]
mod planted;

mod config;
mod database;
mod error;
mod founding;
mod log;
mod membership;
mod node;
mod overlay;
mod peers;
mod queries;
mod raft_log_drain;
mod reads;
mod runner;
mod snapshot;
mod store;
mod tables;

pub use baton_state::Applied;
pub use baton_state::view::Settled;
pub use config::{LOG_ENTRIES_HELD_MAX, RaftStoreConfig};
pub use error::RaftStoreError;
pub use membership::{MEMBERS_MAX, MemberProgress, Members, MembershipChange, MembershipRefused, VOTERS_MAX};
pub use peers::Peers;
pub use queries::Position;
pub use raft::eraftpb::Message;
pub use snapshot::{
    BackupInfo, CHUNK_MESSAGE_BYTES_MAX, OutgoingSnapshot, SnapshotChunk, SnapshotError, SnapshotPair, SnapshotSink,
    restore,
};
pub use store::{Consistency, Followed, RaftStore, Status};

#[cfg(test)]
mod tests;

#[cfg(test)]
mod simulation;
