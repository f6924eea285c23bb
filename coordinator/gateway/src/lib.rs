//! The OpenAI-compatible HTTP front end of a coordinator: parsing, chat templates, tokens to text, streams, errors and
//! metrics. It sees the cluster through one trait, [`Backend`], and holds no cluster state of its own.
#![forbid(unsafe_code)]

pub mod backend;

pub use backend::{
    Backend, BackendError, ClusterSnapshot, Generation, GenerationEvent, GenerationSender, Job, ModelInfo, Placement,
    WorkerRole, WorkerState, WorkerStatus,
};
