//! The OpenAI-compatible HTTP front end of a coordinator: parsing, chat templates, tokens to text, streams, errors and
//! metrics. It sees the cluster through one trait, [`Backend`], and holds no cluster state of its own.
#![forbid(unsafe_code)]

mod accounts;
mod anthropic;
mod api_error;
mod auth;
pub mod backend;
mod body;
mod chat;
mod clock;
mod completions;
mod config;
mod coordinators;
mod detokenizer;
mod dialect;
mod drain;
mod error;
mod family;
mod fields;
mod gateway;
mod generation;
mod grammar;
mod kserve;
mod messages;
mod metrics;
mod model;
mod model_card;
mod openapi;
mod organization;
mod params;
mod prompt;
mod reader;
mod routes;
mod sagemaker;
mod segment_cache;
mod server;
mod snapshot;
mod stall;
mod stop;
mod targets;
mod template;
#[cfg(test)]
mod test_support;
mod tier_metrics;
mod tokenize;
mod tool_text;
mod trace;
mod turn;

pub use accounts::idempotency::{IDEMPOTENCY_KEY_HEADER, REPLAYED_HEADER};
pub use accounts::store::{AccountStore, Proposed, StoreError, TablesBox, command};
pub use api_error::REJECT_REASON_HEADER;
pub use auth::DEFAULT_TENANT;
pub use backend::{
    Backend, BackendError, ClusterSnapshot, Generation, GenerationEvent, GenerationSender, Job, LatencyTargets,
    ModelInfo, Placement, Track, WorkerRole, WorkerState, WorkerStatus,
};
pub use config::{API_KEY_CHARS_MIN, GatewayConfig, TenantConfig};
pub use coordinators::{CoordinatorGroup, CoordinatorRole, CoordinatorStatus, GroupChange, NewCoordinator};
pub use error::GatewayError;
pub use family::ParserChoice;
pub use fields::{FIELDS, Field, FieldSupport};
pub use model::ServedModel;
pub use server::serve;
pub use targets::{ITL_TARGET_HEADER, TTFT_TARGET_HEADER};
pub use tier_metrics::{KvTierStatus, KvTiersStatus};
