//! Every test of this directory again, over TCP: a crate with this name makes `common::transports` choose it.

#![allow(clippy::duplicate_mod)] // each of them brings `common` along

#[path = "failure.rs"]
mod failure;
#[path = "killed.rs"]
mod killed;
#[path = "transfer.rs"]
mod transfer;
