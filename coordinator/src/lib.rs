//! The coordinator process: who is in the cluster (registry), where a request goes (router), the streams to the
//! workers (links), requests that outlive them, and the gateway and the Raft store wired together.
//!
//! ```text
//! HTTP ─▶ gateway ─▶ backend ─▶ router ─▶ link ═══ Worker.Attach ═══▶ worker
//!                       │          ▲                                     │
//!                       ▼          │                                     │
//!                   raft store  registry ◀─ cluster service ◀═ Join ═════╯
//! ```
//!
//! Registry and router (`baton-router`) are plain state machines without IO; `cluster.rs` drives them. What must not be lost (members
//! and usage records) goes through the Raft store; load and liveness deliberately do not.
#![forbid(unsafe_code)]

mod accounts;
mod admission;
mod backend;
mod cluster;
mod cluster_service;
mod config;
mod error;
mod files;
mod group;
mod link;
mod mailbox;
mod metrics;
mod placement;
mod read_ahead;
pub mod registry;
mod request;
mod router;
mod server;

pub use config::{CoordinatorConfig, MemberConfig, ModelConfig, RoutingMode};
pub use error::CoordinatorError;
pub use server::{Ready, run};

/// What brings a backup back: see `baton snapshot restore`.
pub use baton_raftstore::{BackupInfo, RaftStoreError, restore};

#[cfg(test)]
mod tests;
