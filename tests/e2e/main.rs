//! End-to-end tests of the binary: real processes, real sockets, the bundled demo model. One test target, so that it
//! links once. Every wait is bounded; ports and data directories are the system's choice.
#![cfg(target_os = "linux")]

mod accounts;
mod admission;
mod bad_input;
mod clients;
mod disaggregated;
mod drain;
mod failures;
mod gguf;
mod gpu;
mod group;
mod mock;
mod proof;
mod serving;
mod support;
mod survival;
mod tiers;
