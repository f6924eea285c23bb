//! The wire contract of baton: generated protobuf types and services, the protocol version, the limits both sides
//! hold to, and the chained block hash. No behaviour lives here.
//!
//! Versioning: field numbers are never reused; a receiver ignores fields it does not know; a change that an older
//! peer would misread raises [`PROTOCOL_VERSION`], and a handshake between different versions is refused.
#![forbid(unsafe_code)]

pub mod block_hash;
pub mod limits;

/// Version of everything on the wire between baton processes.
pub const PROTOCOL_VERSION: u32 = 4;

/// Generated code, nested as its packages are so that they can refer to each other.
#[allow(missing_docs, unused_qualifications, clippy::all)]
mod generated {
    pub mod worker {
        pub mod v1 {
            tonic::include_proto!("baton.worker.v1");
        }
    }
    pub mod cluster {
        pub mod v1 {
            tonic::include_proto!("baton.cluster.v1");
        }
    }
    pub mod raft {
        pub mod v1 {
            tonic::include_proto!("baton.raft.v1");
        }
    }
    pub mod files {
        pub mod v1 {
            tonic::include_proto!("baton.files.v1");
        }
    }
    pub mod state {
        pub mod v1 {
            tonic::include_proto!("baton.state.v1");
        }
    }
}

/// Coordinator to coordinator, uploaded files: see `proto/files.proto`.
pub use generated::files::v1 as files;
/// Worker to coordinator: see `proto/cluster.proto`.
pub use generated::cluster::v1 as cluster;
/// Coordinator to coordinator: see `proto/raft.proto`.
pub use generated::raft::v1 as raft;
/// Replicated commands and records: see `proto/state.proto`.
pub use generated::state::v1 as state;
/// Gateway or peer worker to worker: see `proto/worker.proto`.
pub use generated::worker::v1 as worker;
