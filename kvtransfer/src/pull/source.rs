//! Where the bytes of a push are: mapped into this process, or in the peer's memory, to be read through NIXL.

use crate::Refusal;
use crate::memory::Region;
use crate::nixl::{NixlPeer, NixlPiece};
use crate::shared_memory::Mapping;
use crate::storage::Memory;
use crate::transport::TransportKind;
use std::sync::Arc;

/// Bytes copied out of a mapping under one hold of the window's lock: closing a window waits for no more, some tens of µs.
const MAPPED_CHUNK_BYTES: usize = 256 << 10;
/// Bytes of a read through NIXL, several of which are under way at once. Measured best over sockets (docs/kv-transfer.md).
const REMOTE_CHUNK_BYTES: usize = 512 << 10;
/// Most bytes read through NIXL under one hold of the window's lock. Whoever wants it waits for the reads that are under way
/// and no more.
const REMOTE_HOLD_BYTES: usize = 32 << 20;

/// A region of the peer.
pub(crate) enum Source {
    /// Mapped here.
    Mapping(Mapping),
    /// In the peer's process.
    Remote {
        /// The process.
        peer: Arc<NixlPeer>,
        /// Address of the region's first byte there.
        base: usize,
        /// Bytes.
        len: u64,
    },
}

/// A run of bytes to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// Offset in the source.
    pub(crate) local: u64,
    /// Offset in the window's memory.
    pub(crate) target: usize,
    /// Bytes.
    pub(crate) len: usize,
}

impl Source {
    /// A region of `len` bytes at `base` in the peer's process. The library refuses to read what the peer has not
    /// registered.
    ///
    /// # Errors
    /// A sentence for the peer.
    pub(crate) fn remote(peer: Arc<NixlPeer>, base: u64, len: u64) -> Result<Self, String> {
        let end = base.checked_add(len).filter(|&end| usize::try_from(end).is_ok());
        end.ok_or("the region does not fit the address space")?;
        Ok(Self::Remote {
            peer,
            base: base as usize,
            len,
        })
    }

    /// What moves the bytes.
    pub(crate) fn transport(&self) -> TransportKind {
        match self {
            Self::Mapping(_) => TransportKind::SharedMemory,
            Self::Remote { .. } => TransportKind::Nixl,
        }
    }

    /// Most bytes to copy under one hold of the window's lock.
    pub(crate) fn hold_bytes(&self) -> usize {
        match self {
            Self::Mapping(_) => MAPPED_CHUNK_BYTES,
            Self::Remote { .. } => REMOTE_HOLD_BYTES,
        }
    }

    /// Most bytes of a [`Part`].
    pub(crate) fn chunk_bytes(&self) -> usize {
        match self {
            Self::Mapping(_) => MAPPED_CHUNK_BYTES,
            Self::Remote { .. } => REMOTE_CHUNK_BYTES,
        }
    }

    /// Whether `len` bytes at `local` are inside the region.
    pub(crate) fn contains(&self, local: u64, len: u64) -> bool {
        match self {
            Self::Mapping(mapping) => mapping.contains(local, len),
            Self::Remote { len: all, .. } => local.checked_add(len).is_some_and(|end| end <= *all),
        }
    }

    /// What takes time and is done before the window's lock is taken: `memory` is made known to the network device.
    pub(crate) fn prepare(&self, memory: &Memory) -> Result<(), Refusal> {
        match (self, memory) {
            (Self::Remote { peer, .. }, Memory::Host(region)) => peer.prepare(region),
            _ => Ok(()),
        }
    }

    /// Copies `parts`, which are inside the source and no longer than [`Source::chunk_bytes`]. How many of them, from the
    /// first, are copied: all, or at least one if `wanted` says that the memory's lock is.
    ///
    /// # Errors
    /// [`Refusal::MemoryFailed`] if `memory` does not take them, [`Refusal::Unreadable`] if the source does not give them.
    /// Some may have been copied then.
    pub(crate) fn copy_to(&self, parts: &[Part], memory: &Memory, wanted: &dyn Fn() -> bool) -> Result<usize, Refusal> {
        match (self, memory) {
            (Self::Mapping(mapping), Memory::Host(region)) => {
                let all = parts.iter().all(|p| mapping.copy_to(p.local, region, p.target, p.len));
                all.then_some(parts.len()).ok_or(Refusal::MemoryFailed)
            }
            (Self::Mapping(mapping), memory) => {
                let all = parts
                    .iter()
                    .all(|p| mapping.copy_through(p.local, memory, p.target, p.len));
                all.then_some(parts.len()).ok_or(Refusal::MemoryFailed)
            }
            (Self::Remote { peer, base, .. }, Memory::Host(region)) => {
                let pieces: Vec<_> = parts.iter().map(|part| piece(part, *base, part.target)).collect();
                peer.read(region, &pieces, REMOTE_CHUNK_BYTES, wanted)
            }
            (Self::Remote { peer, base, .. }, memory) => {
                let Some(part) = parts.first() else { return Ok(0) };
                let buffer = Region::new(part.len).map_err(|_| Refusal::MemoryFailed)?;
                peer.prepare(&buffer)?;
                peer.read(&buffer, &[piece(part, *base, 0)], part.len, wanted)?;
                let mut bytes = vec![0; part.len];
                let taken = buffer.copy_out(0, &mut bytes) && memory.copy_in(part.target, &bytes);
                taken.then_some(1).ok_or(Refusal::MemoryFailed)
            }
        }
    }
}

/// `part` of a region at `base`, to be read to `local`.
fn piece(part: &Part, base: usize, local: usize) -> NixlPiece {
    NixlPiece {
        local,
        // Inside the region, whose end is an address.
        remote: base + part.local as usize,
        len: part.len,
    }
}
