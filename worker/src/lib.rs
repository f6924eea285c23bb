//! The worker process: one engine on its own thread, and the tokio shell that connects it to gateways, to peer workers
//! and to the coordinators.
//!
//! ```text
//!  gateway ──Attach──▶ service ──Command──▶ engine thread (scheduler + Engine::step) ──Delta──▶ outbox ──▶ gateway
//!                                     │ fill wanted                      ▲ fill done / failed
//!                                     ▼                                  │
//!                                   fill ──Attach (peers)──▶ the prefill worker's service
//!                                                              its engine pushes layer by layer (push, kvtransfer)
//! ```
//!
//! Any worker does both jobs; its role is what it tells the coordinator. The state machine of a sequence is the
//! scheduler's (crate `baton-engine`); the rules this crate adds:
//!
//! - A block that a transfer may touch stays held until that transfer has ended: the scheduler is told `release` only
//!   after the window is closed (decode side) or the push is gone (prefill side).
//! - A failed fill is not an error: the scheduler prefills the rest itself.
//! - A caller that hangs up cancels everything it had submitted.
//! - The engine thread never waits for a caller or a socket; what a slow caller has not taken is merged per sequence,
//!   and so is bounded by the tokens it asked for.
//!
//! What this crate deliberately does not do: choose where requests go (the coordinator's router), text of any kind
//! (the gateway's), restart itself (the supervisor's).
#![forbid(unsafe_code)]

mod block_feed;
mod block_teller;
mod caller;
mod compression;
mod config;
mod device;
mod drain;
mod engine_loop;
mod engine_thread;
mod error;
mod fill;
mod grammars;
mod load;
mod masks;
mod membership;
mod mock;
mod peers;
mod push;
mod rates;
mod server;
mod service;
mod session;
mod tiers;

pub use compression::KvCompression;
pub use config::{TierConfig, WorkerConfig, WorkerRole};
pub use device::{Device, GpuKv};
pub use error::WorkerError;
pub use load::run;
pub use mock::{EngineKind, MockAnswers, MockSettings};
pub use server::{Startup, serve};
