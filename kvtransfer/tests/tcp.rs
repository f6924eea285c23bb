//! Every test of this directory again, over TCP: a crate with this name makes `common::limits` choose it.

#[path = "failure.rs"]
mod failure;
#[path = "killed.rs"]
mod killed;
#[path = "transfer.rs"]
mod transfer;
