//! KV blocks below the pool: host memory, a local disk, an object store. So a prefix survives its eviction from the
//! pool, and on disk or in a store also the worker.
//!
//! ```text
//!        stored / evicted / read_ahead           load, take
//!  the worker ────────────────▶  Tiers (core) ◀────────── the worker
//!                                 │ poll  ▲ done
//!                                 ▼       │
//!                     shells: DiskTier (slots in segment files), ObjectTier (one object per block)
//! ```
//!
//! - [`core`]: which block is in which tier, what is read and written next; a state machine without IO, threads or clocks.
//! - [`shelf`]: one bounded tier's directory, and whom it forgets.
//! - `changes`: what came and went in a tier, for routers.
//! - [`rates`]: whether loading is quicker than computing.
//! - [`memory`]: buffers of one block, bounded in number.
//! - [`record`]: a block as bytes that can be trusted later: header and checksum.
//! - [`disk`], [`object`]: the two IO shells; [`io`] runs the core's actions on them.
//!
//! What it promises: a block that comes back is, byte for byte, the one that was given under that name, or it does not come
//! back. Torn, flipped, truncated, foreign and lost all mean "not here", and what is found broken is removed. Every tier, queue
//! and buffer is bounded; what does not fit is dropped and counted, because the block can always be computed again.
//!
//! Names are the chained hashes of `baton_proto::block_hash`; they contain model and tenant salt, so a tenant can find only
//! what a request of the same tenant stored. Not here: the pool and its blocks (`baton-engine`), and copying between
//! it and these buffers (the worker).
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod changes;
pub mod core;
pub mod disk;
mod error;
pub mod io;
pub mod memory;
pub mod object;
pub mod rates;
pub mod record;
pub mod shelf;
mod stats;

pub use changes::Change;
pub use core::{Action, Done, Limits, Read, Tier, Tiers};
pub use disk::DiskTier;
pub use error::TierError;
pub use io::TierIo;
pub use memory::{Block, Pool};
pub use object::ObjectTier;
pub use shelf::Found;
pub use stats::{AheadStats, TierStats, TierUsage};
