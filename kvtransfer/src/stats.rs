//! Counters for metrics: what one agent has moved and what is open now. No histograms, no exporting: the owner of the
//! agent reads a snapshot.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What an agent has done since it was bound, and what is open now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransferStats {
    /// Bytes that landed in windows.
    pub bytes_in: u64,
    /// Bytes handed to the transport by pushes.
    pub bytes_out: u64,
    /// The part of `bytes_in` that was copied out of a peer's shared memory.
    pub shared_memory_bytes_in: u64,
    /// The part of `bytes_out` that a peer was told to copy out of shared memory.
    pub shared_memory_bytes_out: u64,
    /// The part of `bytes_in` that was read out of a peer's memory through NIXL.
    pub nixl_bytes_in: u64,
    /// The part of `bytes_out` that a peer was told to read through NIXL.
    pub nixl_bytes_out: u64,
    /// Windows whose owner still holds them.
    pub windows_open: u64,
    /// Windows that were filled.
    pub windows_completed: u64,
    /// Windows that ended in an error other than their owner's close.
    pub windows_failed: u64,
    /// Pushes in flight.
    pub pushes_open: u64,
    /// Pushes that the receiver acknowledged.
    pub pushes_completed: u64,
    /// Pushes that failed or were aborted.
    pub pushes_failed: u64,
    /// Lanes of pushes that broke while their push went on.
    pub lanes_broken: u64,
    /// Pushes, or lanes of them, from peers that were refused.
    pub refusals: u64,
    /// Connections from peers, established.
    pub connections_in: u64,
}

/// The live counters behind [`TransferStats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    pub(crate) shared_memory_bytes_in: Counter,
    pub(crate) shared_memory_bytes_out: Counter,
    pub(crate) nixl_bytes_in: Counter,
    pub(crate) nixl_bytes_out: Counter,
    pub(crate) windows_open: Counter,
    pub(crate) windows_completed: Counter,
    pub(crate) windows_failed: Counter,
    pub(crate) pushes_open: Counter,
    pub(crate) pushes_completed: Counter,
    pub(crate) pushes_failed: Counter,
    pub(crate) lanes_broken: Counter,
    pub(crate) refusals: Counter,
    pub(crate) connections_in: Counter,
}

/// A number that any thread may change; nothing is ordered by it.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    pub(crate) fn sub(&self, amount: u64) {
        self.0.fetch_sub(amount, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Counters {
    pub(crate) fn snapshot(&self) -> TransferStats {
        TransferStats {
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            shared_memory_bytes_in: self.shared_memory_bytes_in.get(),
            shared_memory_bytes_out: self.shared_memory_bytes_out.get(),
            nixl_bytes_in: self.nixl_bytes_in.get(),
            nixl_bytes_out: self.nixl_bytes_out.get(),
            windows_open: self.windows_open.get(),
            windows_completed: self.windows_completed.get(),
            windows_failed: self.windows_failed.get(),
            pushes_open: self.pushes_open.get(),
            pushes_completed: self.pushes_completed.get(),
            pushes_failed: self.pushes_failed.get(),
            lanes_broken: self.lanes_broken.get(),
            refusals: self.refusals.get(),
            connections_in: self.connections_in.get(),
        }
    }
}
