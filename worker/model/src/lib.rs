//! Model files and the config-driven decoder over the op seam: from a model's name or directory to the logits of a
//! ragged batch over paged KV blocks.
//!
//! Does not schedule, sample or tokenise: `baton-engine` and `baton-gateway` do. The arithmetic is in `baton-kernels`.
#![deny(unsafe_code)]

mod affinity;
mod batch;
mod communicator;
mod config;
mod cpu_ops;
mod decoder;
mod error;
mod files;
mod geometry;
pub mod gguf;
mod hub;
mod json;
mod kv_cache;
mod mapped;
mod memory;
mod ops;
mod options;
mod progress;
mod reshard;
mod rope;
mod shard;
mod shared_memory;
mod tensor_parallel;
mod weights;

pub use batch::{ForwardBatch, Logits, SeqSpan};
pub use baton_kernels::PoolConfig;
pub use communicator::Communicator;
pub use config::{Architecture, ModelConfig};
pub use cpu_ops::{CpuOps, CpuRows};
pub use decoder::Decoder;
pub use error::ModelError;
pub use files::ModelFiles;
pub use geometry::{KvDtype, KvGeometry, KvHalf};
pub use hub::{Hub, resolve};
pub use kv_cache::KvCache;
pub use mapped::Tensor;
pub use memory::{MemoryNeed, available_memory};
pub use ops::{OpResult, Ops, StackedPart, Step, StepSpan};
pub use options::{LoadOptions, Quantization};
pub use progress::{Progress, Stage};
pub use reshard::{RankBlock, RankRun, reshard};
pub use rope::{RopeConfig, RopeScaling};
pub use shard::{Shard, ShardSlices, UNIT};
pub use shared_memory::SharedMemory;
pub use tensor_parallel::TensorParallel;
