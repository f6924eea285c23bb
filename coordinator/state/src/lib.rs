//! The replicated state machine of the coordinators: what each command of the log does to the tables, and what can be
//! read from them. Plain functions over [`Tables`], an ordered map of bytes: no disk, no network, no clock, no
//! randomness, no iteration order. Times and ids come inside commands.
//!
//! Invariants, whatever the commands:
//!
//! 1. The same commands in the same order give the same tables, byte for byte, and the same [`hash`](view::hash).
//! 2. A command that is repeated changes nothing and has the same answer, except a registration, which gives a newer epoch.
//! 3. A refused command changes nothing but the hash.
//! 4. Everything is in the tables: a copy of them is a snapshot.
//!
//! Deliberately not here: Raft and the file (`baton-raftstore`), and what is only soft state, such as load.
#![forbid(unsafe_code)]

mod apply;
pub mod keys;
mod members;
mod outcome;
mod tables;
mod usage;
pub mod view;
mod workers;

pub use apply::apply;
pub use outcome::{Applied, Outcome, Refused};
pub use tables::{MemoryTables, Pair, Tables, TablesError, TablesMut, Visit};

#[cfg(test)]
mod tests;
