//! RDMA and whatever else NVIDIA's NIXL reaches, through its library found at run time.
//!
//! A receiver *reads* from the sender's registered memory. So the receiver decides what lands and when, and the fences
//! of a window hold as with any other transport: once a window is over, no read into it is under way. One-sided
//! writes by the sender could not be fenced without taking the memory's registration back.
//!
//! Not here: device memory, until there is a CUDA backend, and the control messages, which travel with the session.

mod agent;
mod library;

pub(crate) use agent::{NixlAgent, NixlPiece};

/// Why NIXL could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NixlError {
    /// There is no library, or not one that fits.
    #[error("NIXL's library cannot be used: {0}")]
    Library(String),
    /// A call failed.
    #[error("NIXL's {call} failed with status {status}; NIXL_LOG_LEVEL=DEBUG shows why")]
    Call {
        /// Which.
        call: &'static str,
        /// What it answered.
        status: i32,
    },
    /// A name that cannot be handed over.
    #[error("the name {0:?} contains a zero byte")]
    Name(String),
}
