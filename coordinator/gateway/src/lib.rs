//! The OpenAI-compatible HTTP front end of a coordinator: parsing, chat templates, tokens to text, streams, errors and
//! metrics. It sees the cluster through one trait, [`Backend`], and holds no cluster state of its own.
#![forbid(unsafe_code)]

mod accounts;
mod activity;
mod anthropic;
mod api_error;
mod attended;
mod auth;
pub mod backend;
mod batches;
mod body;
mod chat;
mod clients;
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
mod files;
mod gateway;
mod generation;
mod grammar;
mod json;
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
mod responses;
mod resume;
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
mod tls;
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
    ModelInfo, Placement, Share, Track, WorkerRole, WorkerState, WorkerStatus,
};
pub use batches::BatchesConfig;
pub use clients::ClientRange;
pub use config::{API_KEY_CHARS_MIN, GatewayConfig, TenantConfig};
pub use coordinators::{CoordinatorGroup, CoordinatorRole, CoordinatorStatus, GroupChange, NewCoordinator};
pub use error::GatewayError;
pub use family::ParserChoice;
pub use fields::{FIELDS, Field, FieldSupport};
pub use files::{ChunkError, ChunkHash, ChunkStore, Chunked, FilesConfig};
pub use model::ServedModel;
pub use responses::ResponsesConfig;
pub use resume::{STREAM_ID_HEADER, STREAM_RESUME_HEADER};
pub use server::serve;
pub use targets::{ITL_TARGET_HEADER, TTFT_TARGET_HEADER};
pub use tier_metrics::{KvTierStatus, KvTiersStatus};
pub use tls::TlsConfig;
