//! All compute of the CPU engine, and all of its `unsafe`: coarse, batched kernels over plain slices, run on a small
//! persistent thread pool, chosen at run time for the CPU at hand.
//!
//! **Batch invariance (promise P1).** Every output element is computed by a fixed sequence of operations that depends
//! only on its own inputs: the reduction over `k` (or over positions in attention) always runs in the same order into
//! the same eight lanes, and tiles only ever group *independent* outputs. So a row's result is bit-identical whatever
//! the other rows of the batch, the chunk boundaries of a prompt, or the number of threads. Different instruction
//! sets may round differently (the portable path may have no fused multiply-add); one kind of machine always agrees.
//!
//! Knows nothing of models, files or block ownership: `baton-model` does.

mod activation;
#[allow(dead_code, unused_imports)] // its caller, the linear layer for AMX, is written beside it
mod amx;
mod attention;
pub mod isa;
mod kernels;
pub mod kv;
mod linear;
mod norm;
pub mod pool;
mod rope;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
mod simd_portable;
pub mod weights;

pub use attention::AttentionSpan;
pub use isa::Isa;
pub use kernels::Kernels;
pub use kv::{KvArena, KvLayout};
pub use linear::{MatrixPart, TILE_ROWS};
pub use pool::Pool;
pub use weights::{Elements, MisalignedBytes, StoredType};
