//! Model files and the config-driven decoder over the op seam.
//!
//! Does not schedule, sample or tokenise: `baton-engine` and `baton-gateway` do.

pub mod geometry;

pub use geometry::{KvDtype, KvGeometry, KvHalf};
