//! The engine: what a worker does between "here is a prompt" and "here is a token".
//!
//! - [`step`]: the seam to whatever computes tokens, and its batch.
//! - [`scheduler`]: which sequence computes what, when, in which blocks; a state machine without IO, clocks or threads.
//! - [`blocks`]: who owns which KV block, and the prefix cache.
//! - [`sampling`] over [`rng`]: from logits to a token, a pure function.
//! - [`model_engine`]: the engine with a real model.
//! - [`mock`]: an engine without a model, honest about KV bytes.
//! - [`tiers`]: the seam to KV blocks outside the pool.
//! - [`profile`]: how long the steps of such an engine take.
//! - [`spans`]: which bytes a transfer moves for a run of positions.
//! - [`mod@bench`]: how fast an engine is.
//! - [`request`], [`config`], [`stats`], [`error`]: the plain data at the edges.
//!
//! Not here: the network, KV transfers (the worker server drives them), model arithmetic (`baton-model`).
#![forbid(unsafe_code)]

pub mod bench;
mod block_events;
pub mod blocks;
mod chunks;
pub mod config;
pub mod error;
pub mod mock;
pub mod model_engine;
pub mod profile;
mod rank;
pub mod request;
pub mod rng;
pub mod sampling;
pub mod scheduler;
mod sequence;
pub mod spans;
pub mod stats;
pub mod step;
pub mod tiers;

pub use block_events::{BlockEvent, BlockEvents};
pub use config::{STEP_TARGET_DEFAULT, SchedulerConfig, blocks_for_bytes};
pub use error::{AdmitError, ConfigError, EngineError, SamplingError};
pub use mock::{MockAnswer, MockConfig, MockEngine};
pub use model_engine::ModelEngine;
pub use profile::{MockProfile, MockTiming};
pub use rank::{PASSES_PER_PRIORITY, PRIORITY_MAX};
pub use request::{Cancelled, FillRequest, Finish, FinishReason, Output, Plan, PrefillRequest, Request, Reuse};
pub use sampling::{Asked, Sampler, SamplingParams, Shaping};
pub use scheduler::Scheduler;
pub use stats::Stats;
pub use step::{Engine, SeqId, StepBatch, StepSeq};
pub use tiers::{KvTiers, LoadRequest, LoadStart, NoTiers};
