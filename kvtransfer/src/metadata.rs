//! What an agent tells others about itself, once, by any means they share: a registry, a request, a file. Plain data.
//!
//! Metadata permits nothing: writing needs a window's id, reading an export's grant, and either needs a certificate of
//! the cluster.

use crate::hello::Hello;
use crate::limits::METADATA_BYTES_MAX;
use crate::{MemoryKind, SetupError};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;

/// An agent's introduction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentMetadata {
    /// Its name, for logs.
    pub name: String,
    /// Version of the wire contract; both sides' must be equal.
    pub version: u32,
    /// Compatibility digest; both sides' must be equal.
    pub digest: [u8; 32],
    /// Where peers reach it, the best first.
    pub addresses: Vec<SocketAddr>,
    /// What it has registered.
    pub memories: Vec<MemoryDescription>,
}

/// One registered memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDescription {
    /// Distinguishes the memories of one agent.
    pub id: u64,
    /// Where it lives.
    pub kind: MemoryKind,
    /// Bytes.
    pub bytes: u64,
}

impl AgentMetadata {
    /// As bytes, to be sent around: JSON.
    pub fn encode(&self) -> Vec<u8> {
        // Strings, numbers and addresses: nothing in it can fail to be written.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what [`AgentMetadata::encode`] wrote.
    ///
    /// # Errors
    /// [`SetupError::Metadata`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SetupError> {
        if bytes.len() > METADATA_BYTES_MAX {
            let len = bytes.len();
            return Err(SetupError::Metadata(format!(
                "{len} bytes; the most is {METADATA_BYTES_MAX}"
            )));
        }
        serde_json::from_slice(bytes).map_err(|error| SetupError::Metadata(error.to_string()))
    }
}

/// An agent this one can work with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peer {
    metadata: Arc<AgentMetadata>,
    addr: SocketAddr,
}

impl Peer {
    /// Checks that `metadata` is of an agent that `ours` can work with.
    pub(crate) fn new(ours: &Hello, metadata: AgentMetadata) -> Result<Self, SetupError> {
        let theirs = Hello {
            version: metadata.version,
            digest: metadata.digest,
            name: metadata.name.clone(),
            host: None,
            offer: None,
            tcp: false,
            nixl: None,
        };
        if let Some(mismatch) = ours.mismatch(&theirs) {
            return Err(SetupError::Incompatible {
                peer: metadata.name,
                mismatch,
            });
        }
        let reachable = |addr: &&SocketAddr| addr.port() != 0 && !addr.ip().is_unspecified();
        match metadata.addresses.iter().find(reachable) {
            Some(&addr) => Ok(Self {
                metadata: Arc::new(metadata),
                addr,
            }),
            None => Err(SetupError::NoAddress { peer: metadata.name }),
        }
    }

    /// What it said about itself.
    pub fn metadata(&self) -> &AgentMetadata {
        &self.metadata
    }

    /// Where it is reached.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata() -> AgentMetadata {
        AgentMetadata {
            name: "decode-0".into(),
            version: 2,
            digest: [7; 32],
            addresses: vec!["0.0.0.0:7071".parse().unwrap(), "127.0.0.1:7071".parse().unwrap()],
            memories: vec![MemoryDescription {
                id: 1,
                kind: MemoryKind::File,
                bytes: 4096,
            }],
        }
    }

    fn ours(version: u32, digest: u8) -> Hello {
        Hello {
            version,
            digest: [digest; 32],
            name: "prefill-0".into(),
            host: None,
            offer: None,
            tcp: false,
            nixl: None,
        }
    }

    #[test]
    fn it_travels_as_bytes() {
        assert_eq!(AgentMetadata::decode(&metadata().encode()).unwrap(), metadata());
        for bad in [&b""[..], b"{}", b"[[[[", &vec![b'['; METADATA_BYTES_MAX + 1]] {
            assert!(matches!(AgentMetadata::decode(bad), Err(SetupError::Metadata(_))));
        }
    }

    #[test]
    fn a_peer_is_compatible_and_reachable() {
        let peer = Peer::new(&ours(2, 7), metadata()).unwrap();
        assert_eq!(
            peer.addr(),
            metadata().addresses[1],
            "an unspecified address reaches nobody"
        );
        for other in [ours(3, 7), ours(2, 8)] {
            assert!(matches!(
                Peer::new(&other, metadata()),
                Err(SetupError::Incompatible { .. })
            ));
        }
        let nowhere = AgentMetadata {
            addresses: vec![],
            ..metadata()
        };
        assert!(matches!(
            Peer::new(&ours(2, 7), nowhere),
            Err(SetupError::NoAddress { .. })
        ));
    }
}
