//! The replicated state machine of the coordinators: what each command of the log does to the tables, and what can be
//! read from them. Plain functions over [`Tables`], an ordered map of bytes: no disk, no network, no clock, no
//! randomness, no iteration order. Times and ids come inside commands. `docs/ledger.md` has the rules in full.
//!
//! Invariants, whatever the commands:
//!
//! 1. The same commands in the same order give the same tables, byte for byte, and the same [`hash`](view::hash), into
//!    which everything goes that is written.
//! 2. A command that is repeated changes nothing and has the same answer, except a registration, which gives a newer epoch,
//!    and a lease after its slice was returned.
//! 3. A refused command changes nothing but the hash, and the time with what is over by then.
//! 4. Everything is in the tables: a copy of them is a snapshot.
//! 5. One row per request id; rows and admin changes are numbered without gaps; every row names the hash before it.
//! 6. Each line of a batch is done once, and what stands in its files is what was told with those lines.
//! 7. Of every budget and period: reserved = posted + voided + expired + open, and a hard limit ≥ posted + open.
//!
//! Deliberately not here: Raft and the file (`baton-raftstore`), what a row is to the byte and what it costs
//! (`baton-ledger`), and what is only soft state, such as load.
#![forbid(unsafe_code)]

mod aggregates;
mod api_keys;
mod apply;
mod audit;
mod batches;
pub mod bounds;
mod budgets;
mod calendar;
mod codec;
mod corrections;
mod deployments;
mod expiry;
mod fault;
mod files;
mod idempotency;
pub mod keys;
mod machine;
mod members;
mod outcome;
mod periods;
mod postings;
mod prices;
mod projects;
mod rows;
mod slices;
mod sums;
mod tables;
mod usage;
pub mod view;
mod window;
mod workers;

pub use aggregates::MINUTES_KEPT_MS;
pub use apply::apply;
pub use batches::{BATCH_KEPT_MS, BATCH_WINDOW_MS, status_name as batch_status_name};
pub use calendar::{TIME_MAX_UNIX_MS, period_start};
pub use fault::Fault;
pub use idempotency::IDEMPOTENCY_MS;
pub use outcome::{Applied, Outcome, Refused};
pub use slices::{SLICE_GRACE_MS, SLICE_LEASE_MS_MAX};
pub use sums::{Dimensions, Sums};
pub use tables::{MemoryTables, Pair, Tables, TablesError, TablesMut, Visit};
pub use window::Window;

#[cfg(test)]
mod tests;
