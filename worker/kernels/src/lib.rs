//! All compute of the CPU engine, and all of its `unsafe`: coarse, batched kernels over plain slices, run on a small
//! persistent thread pool, chosen at run time for the CPU at hand.
//!
//! **Batch invariance (promise P1).** Every output element is computed by a fixed sequence of operations that depends
//! only on its own inputs: an output of a matrix product is one lane that runs through `k` in order, an attention row runs
//! through its own positions in order, and tiles only ever group *independent* outputs. So a row's result is bit-identical
//! whatever the other rows of the batch, the chunk boundaries of a prompt, or the number of threads. Different instruction
//! sets may round differently; one kind of machine always agrees.
//!
//! Knows nothing of models, files or block ownership: `baton-model` does.

mod activation;
mod amx;
mod attention;
mod ggml;
pub mod isa;
mod kernels;
pub mod kv;
mod lanes;
pub mod limits;
mod linear;
mod norm;
pub mod packed;
pub mod pool;
mod rope;
mod rows;
pub mod vocab;
mod weights;

pub use attention::AttentionSpan;
pub use ggml::dequantize;
pub use isa::Isa;
pub use kernels::Kernels;
pub use kv::{KvArena, KvDtype, KvLayout};
pub use limits::Limits;
pub use packed::{OutOfMemory, PackedMatrix, WeightFormat};
pub use pool::{Pool, PoolConfig};
pub use weights::StoredType;
