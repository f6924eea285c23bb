//! What can go wrong, seen from the three places it is handled: setting up, receiving into a window, pushing.
//! Each message says what happened and what to do next. [`Refusal`] is the part that travels.

use crate::Refusal;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

/// Making a region, an agent or a window failed.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A region of no bytes, or of more than the address space.
    #[error("a region of {bytes} bytes is impossible; check the KV cache size")]
    RegionSize {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The system did not give the memory.
    #[error("cannot map {bytes} bytes for the KV cache: {source}; lower the KV cache size or free memory")]
    RegionMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// Device memory, which no transport of this build reaches.
    #[error("memory of device {ordinal} cannot be registered: this build has no transport for device memory")]
    DeviceMemory {
        /// The device.
        ordinal: u32,
    },
    /// A file that cannot be opened or sized.
    #[error("cannot use {path:?} as memory: {source}; check the path and the free space")]
    FileMemory {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An agent name that is empty or too long.
    #[error("{name:?} is not an agent name: use 1 to {max} bytes")]
    AgentName {
        /// The name.
        name: String,
        /// The limit in bytes.
        max: usize,
    },
    /// The address cannot be bound.
    #[error("cannot listen for KV transfers on {addr}: {source}; choose another transfer address")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The identity cannot be used for TLS.
    #[error("the identity cannot be used for KV transfers: {0}")]
    Identity(String),
    /// A limit that the transport cannot hold to.
    #[error("the transfer limits cannot be used: {0}")]
    Limits(String),
    /// The system gave no random bytes.
    #[error("the system gave no random bytes for a window id")]
    Random,
    /// An agent needs a tokio runtime.
    #[error("an agent must be bound inside a tokio runtime")]
    NoRuntime,
    /// The agent is closed.
    #[error("the transfer agent is closed")]
    AgentClosed,
    /// Too many open windows.
    #[error("{max} windows are open, the most this agent takes; close some or raise windows_max")]
    Windows {
        /// The limit.
        max: usize,
    },
    /// Too many exports.
    #[error("{max} exports are held, the most this agent takes; end some or raise exports_max")]
    Exports {
        /// The limit.
        max: usize,
    },
    /// Metadata of an agent that this one cannot work with.
    #[error("{peer} is incompatible: {mismatch}")]
    Incompatible {
        /// The peer's name.
        peer: String,
        /// What differs, with both sides' values.
        mismatch: String,
    },
    /// Metadata that names no address.
    #[error("the metadata of {peer} has no address to reach it at; see Agent::advertise")]
    NoAddress {
        /// The peer's name.
        peer: String,
    },
    /// Bytes that are no metadata.
    #[error("these bytes are no agent metadata: {0}")]
    Metadata(String),
    /// A window over nothing.
    #[error("a window needs at least one range")]
    WindowEmpty,
    /// Too many ranges.
    #[error("a window of {count} ranges; the most is {max}")]
    WindowRanges {
        /// Ranges given.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// An empty range, or one that reaches beyond the region.
    #[error("range {range:?} is empty or not inside the region of {region_len} bytes")]
    WindowRange {
        /// The range.
        range: Range<usize>,
        /// Length of the region.
        region_len: usize,
    },
    /// An end that is not a multiple of [`ALIGN`](crate::ALIGN).
    #[error("range {range:?} must start and end at multiples of 8 bytes")]
    WindowAlignment {
        /// The range.
        range: Range<usize>,
    },
    /// Bytes claimed twice, by one window or by two.
    #[error("range {range:?} is covered twice by open windows; the block manager gave a block to two owners")]
    WindowOverlap {
        /// The range, or the part of it that overlaps.
        range: Range<usize>,
    },
}

/// Why a sender gave a push up on its own. Travels as the reset code of its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AbortReason {
    /// The push was dropped before it was finished.
    #[error("the sender dropped the push")]
    Dropped,
    /// The request was cancelled.
    #[error("the request was cancelled")]
    Cancelled,
    /// Computing the blocks failed.
    #[error("the sender failed to compute the blocks")]
    ComputeFailed,
    /// The sender is shutting down.
    #[error("the sender is shutting down")]
    ShuttingDown,
    /// The sender's transport gave up: it waited too long, or the receiver answered against the protocol.
    #[error("the sender's transport gave up")]
    Transport,
    /// Only this lane is given up; the push goes on over another.
    #[error("the sender replaced the lane")]
    LaneReplaced,
    /// The push's deadline passed.
    #[error("the sender's deadline passed")]
    DeadlineExceeded,
    /// The lease on the bytes being read ended.
    #[error("the lease on the bytes ended")]
    LeaseEnded,
    /// A code this version does not know.
    #[error("the sender aborted with unknown code {0}")]
    Unknown(u64),
}

impl AbortReason {
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Dropped => 1,
            Self::Cancelled => 2,
            Self::ComputeFailed => 3,
            Self::ShuttingDown => 4,
            Self::Transport => 5,
            Self::LaneReplaced => 6,
            Self::DeadlineExceeded => 7,
            Self::LeaseEnded => 8,
            // Only ever made from a received code; sent on, it says no more than "aborted".
            Self::Unknown(_) => 0,
        }
    }

    pub(crate) fn from_code(code: u64) -> Self {
        match code {
            1 => Self::Dropped,
            2 => Self::Cancelled,
            3 => Self::ComputeFailed,
            4 => Self::ShuttingDown,
            5 => Self::Transport,
            6 => Self::LaneReplaced,
            7 => Self::DeadlineExceeded,
            8 => Self::LeaseEnded,
            other => Self::Unknown(other),
        }
    }
}

/// Why a window was not filled. In every case its bytes are fenced and may be partly written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// The pushing process died or became unreachable.
    #[error("lost {peer} in the middle of its push ({detail}); compute the rest locally")]
    PeerLost {
        /// Name of the pushing agent.
        peer: String,
        /// What the transport saw.
        detail: String,
    },
    /// The pushing side gave up.
    #[error("the push was aborted: {0}; compute the rest locally")]
    Aborted(AbortReason),
    /// The push broke a rule and was refused.
    #[error("the push was refused: {0}")]
    Refused(Refusal),
    /// Nothing finished the window within its lifetime.
    #[error("the window was not filled within {lifetime:?}; compute the rest locally")]
    Expired {
        /// The lifetime.
        lifetime: Duration,
    },
    /// The window was closed by its owner.
    #[error("the window is closed")]
    Closed,
    /// The agent was closed.
    #[error("the transfer agent is closed")]
    AgentClosed,
}

/// Why a push failed, or a call on it was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// No connection to the peer came about.
    #[error("cannot reach the transfer agent at {peer}: {detail}")]
    Unreachable {
        /// The peer's address.
        peer: SocketAddr,
        /// What the transport saw.
        detail: String,
    },
    /// TLS failed: another cluster's certificate, or one of another role.
    #[error(
        "{peer} and this agent do not accept each other's certificates ({detail}); both need worker certificates of \
         the same cluster"
    )]
    Identity {
        /// The peer's address.
        peer: SocketAddr,
        /// What TLS said.
        detail: String,
    },
    /// The two agents cannot work together.
    #[error("{peer} is incompatible: {mismatch}")]
    Incompatible {
        /// The peer's address.
        peer: SocketAddr,
        /// What differs, with both sides' values.
        mismatch: String,
    },
    /// The peer died or became unreachable after the connection stood.
    #[error("lost the transfer agent at {peer}: {detail}")]
    PeerLost {
        /// The peer's address.
        peer: SocketAddr,
        /// What the transport saw.
        detail: String,
    },
    /// The peer's agent was closed.
    #[error("the transfer agent at {peer} was closed")]
    PeerClosed {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The receiver refused the push or closed its window.
    #[error("the receiver refused the push: {0}")]
    Refused(Refusal),
    /// The peer takes no bytes or does not acknowledge.
    #[error("the receiver made no progress within {limit:?}")]
    Stalled {
        /// The limit.
        limit: Duration,
    },
    /// The peer answered against the protocol.
    #[error("the receiver broke the protocol: {0}")]
    Protocol(&'static str),
    /// The push was aborted on this side.
    #[error("the push was aborted: {0}")]
    Aborted(AbortReason),
    /// The agent or its runtime is gone.
    #[error("the transfer agent is closed")]
    AgentClosed,
    /// Too many pushes in flight.
    #[error("{max} pushes are in flight, the most this agent takes; try again later")]
    TooManyPushes {
        /// The limit.
        max: usize,
    },
    /// The descriptor queue is full: the network is far behind compute.
    #[error("{max} writes are queued, the most one push takes; the network is far behind, fail this push")]
    QueueFull {
        /// The limit.
        max: usize,
    },
    /// A write of zero bytes.
    #[error("a write of no bytes at local offset {local}")]
    EmptyWrite {
        /// Local byte offset.
        local: usize,
    },
    /// A write from outside of the region, or one whose remote end overflows.
    #[error("bytes {range:?} (to remote offset {remote}) are not inside the region of {region_len} bytes")]
    OutOfRange {
        /// The local range.
        range: Range<usize>,
        /// The remote offset.
        remote: usize,
        /// Length of the local region.
        region_len: usize,
    },
    /// Offsets or lengths that are not multiples of [`ALIGN`](crate::ALIGN).
    #[error("bytes {range:?} to remote offset {remote}: offsets and lengths must be multiples of 8")]
    Misaligned {
        /// The local range.
        range: Range<usize>,
        /// The remote offset.
        remote: usize,
    },
    /// A finishing payload that is too long.
    #[error("a finishing payload of {len} bytes; the most is {max}")]
    PayloadTooLong {
        /// Bytes.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// What was written falls into too many pieces at the receiver.
    #[error("the writes fall into more than {max} pieces at the receiver; write larger or adjacent ranges")]
    TooScattered {
        /// The limit.
        max: usize,
    },
    /// The push's deadline passed.
    #[error("the push was not acknowledged within its deadline of {limit:?}")]
    DeadlineExceeded {
        /// The deadline, from the start of the push.
        limit: Duration,
    },
    /// A reply arrived damaged; the lane ends and the push goes on over another.
    #[error("a reply of the receiver arrived damaged")]
    Corrupt,
    /// The local memory could not be read: an I/O error of a file.
    #[error("{len} bytes at local offset {local} cannot be read from their file; compute or fetch them again")]
    MemoryFailed {
        /// Local byte offset.
        local: usize,
        /// Bytes.
        len: usize,
    },
    /// A write after `finish`.
    #[error("the push is already finished; nothing can be written any more")]
    Finished,
}

/// Why a transfer did not succeed. In every case nothing of it is read or written any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The push of a write failed, or the request of a read.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The window of a read failed.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// A read could not begin: the reason is a [`SetupError`]'s.
    #[error("the read could not begin: {0}")]
    Setup(String),
    /// The owner of the bytes does not serve the read any more.
    #[error("the owner ended the read: {0}; compute the bytes or fetch them elsewhere")]
    Ended(Refusal),
    /// The owner was not heard of for a whole term of the lease.
    #[error("the owner was not heard of for {term:?}; compute the bytes or fetch them elsewhere")]
    OwnerLost {
        /// The term of the lease.
        term: Duration,
    },
    /// Cancelled on this side.
    #[error("the transfer was cancelled")]
    Cancelled,
}

impl PushError {
    /// Whether the push may go on over another lane after one of its lanes ended with this.
    pub(crate) fn lane_only(&self) -> bool {
        match self {
            Self::PeerLost { .. } | Self::Stalled { .. } | Self::Corrupt => true,
            Self::Refused(refusal) => refusal.lane_only(),
            _ => false,
        }
    }

    /// What the receiver is told about it.
    pub(crate) fn abort_reason(&self) -> AbortReason {
        match self {
            Self::Aborted(reason) => *reason,
            Self::DeadlineExceeded { .. } => AbortReason::DeadlineExceeded,
            Self::MemoryFailed { .. } => AbortReason::ComputeFailed,
            _ => AbortReason::Transport,
        }
    }
}
