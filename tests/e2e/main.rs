//! End-to-end tests of the binary: real processes, real sockets, the bundled demo model. One test target, so that it
//! links once. Every wait is bounded; ports and data directories are the system's choice.
#![cfg(target_os = "linux")]

mod accounts;
mod admission;
mod api_document;
mod attacks;
mod bad_input;
mod batches;
mod clients;
mod disaggregated;
mod drain;
mod failures;
mod gguf;
mod gpu;
mod group;
mod https;
mod mock;
mod official_clients;
mod proof;
mod responses;
mod serving;
mod support;
mod survival;
mod tiers;
