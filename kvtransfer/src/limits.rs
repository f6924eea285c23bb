//! Every bound of this crate, with the reason for its value (promise P5). Fields of [`TransferLimits`] may differ
//! between the two ends; the constants are part of the wire contract.

use std::time::Duration;

/// Most bytes of one WRITE frame. The sender cuts at [`SEND_CHUNK_BYTES`]; four times that leaves room for other
/// implementations while a frame still cannot claim an absurd length.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Bytes gathered for one hand-over to the transport: large enough that locking, copying and task switches vanish
/// beside encryption, small enough that dropping a push never waits for more than one such copy (tens of µs).
pub const SEND_CHUNK_BYTES: usize = 256 << 10;

/// Longest finishing payload in bytes. It carries a first token and counters, not data.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;

/// Longest control message in bytes (see `control`): a read of [`TransferLimits::descriptors_max`] descriptors at 24
/// bytes each fits.
pub const CONTROL_BYTES_MAX: usize = 2 << 20;

/// Most lanes of one push. Parallel streams stop paying long before; it bounds what a window keeps per push.
pub const LANES_MAX: u16 = 16;

/// How often the lanes of one window may be opened, retries included. Far above what
/// [`TransferLimits::lane_retries_max`] leads to; it bounds what a hostile peer can make a window take.
pub const LANE_OPENINGS_MAX: u32 = 256;

/// Pieces that what has landed of a window, or what a push has written, may fall into: blocks × layers × 2 of a prompt
/// of 64k tokens whose pieces never touch. About ten megabytes at worst.
pub const COVERAGE_FRAGMENTS_MAX: usize = 1 << 18;

/// After so many bytes on a lane the receiver is asked how much has landed, so that little is sent again when a lane
/// breaks.
pub const MARK_BYTES: u64 = 2 << 20;

/// Descriptors sent on a lane and not yet known to have landed; the lane waits at this many. They are kept to be sent
/// again, at 24 bytes each.
pub const LANE_DESCRIPTORS_MAX: usize = 16_384;

/// A push opens another lane once this many bytes wait per lane that it has. Below, one lane is quicker than the
/// opening of a second.
pub const LANE_BACKLOG_BYTES: u64 = 1 << 20;

/// Completed pushes that are remembered after their windows are gone, so that a repeated FINISH is answered with DONE
/// rather than denied. A retry comes within a second or two; this covers 1,000 pushes a second.
pub const REMEMBERED_MAX: usize = 4096;

/// Notifications that nobody has taken yet; further ones are refused. A consumer that is this far behind is stuck.
pub const NOTIFICATIONS_MAX: usize = 4096;

/// Longest encoded agent metadata in bytes: ten thousand registered memories fit.
pub const METADATA_BYTES_MAX: usize = 1 << 20;

/// Longest agent name in bytes: a host name and an ordinal fit.
pub const NAME_BYTES_MAX: usize = 64;

/// Limits of one agent.
#[derive(Debug, Clone)]
pub struct TransferLimits {
    /// Windows open at once. One per request that waits for a prefill; far above any batch.
    pub windows_max: usize,
    /// Ranges of one window before merging: one per block of a million-token prompt at 16 tokens a block.
    pub window_ranges_max: usize,
    /// How long [`Window::wait`](crate::Window::wait) waits, from the opening. Longer than any prefill worth waiting
    /// for; then the caller computes locally.
    pub window_lifetime: Duration,
    /// Exports held at once. One per request whose blocks wait to be read.
    pub exports_max: usize,
    /// Pushes in flight from this agent at once, control messages included; more fail at once.
    pub pushes_max: usize,
    /// Pushes in flight on one connection; the receiver enforces it, further ones wait at the sender.
    pub pushes_per_connection_max: u32,
    /// Descriptors queued in one push that the transport has not taken yet: blocks × layers × 2 of a long prompt fall
    /// well below, and one costs 24 bytes.
    pub descriptors_max: usize,
    /// Lanes that one push may use at once, 1 to [`LANES_MAX`].
    pub lanes_per_push: u16,
    /// How often one lane of a push is opened again after it broke.
    pub lane_retries_max: u32,
    /// Wait before a broken lane is opened again; doubled with every retry.
    pub lane_backoff: Duration,
    /// How long a window whose last lane broke waits for another one. All retries of a sender that lives fall within.
    pub lane_grace: Duration,
    /// Connections that peers hold to this agent, plus those being established, and connections that this agent has
    /// dialled; of QUIC and of TCP so many each.
    pub connections_max: usize,
    /// From the first packet to the end of the handshake, and until a push names its window. A cluster's network
    /// needs milliseconds; the rest is for a starved CPU.
    pub handshake_timeout: Duration,
    /// A push that the peer takes no bytes from, or that it does not acknowledge, fails after this.
    pub stall_timeout: Duration,
    /// How often an idle connection shows that it lives.
    pub keep_alive: Duration,
    /// Silence after which a peer is dead. Several keep-alives, so that one lost packet is no death.
    pub idle_timeout: Duration,
    /// Unread bytes a peer may have on the way to this agent on one connection, and unacknowledged bytes this agent
    /// keeps per connection. 16 MiB is 10 Gbit/s at 13 ms.
    pub flow_window_bytes: u32,
}

impl Default for TransferLimits {
    fn default() -> Self {
        Self {
            windows_max: 4096,
            window_ranges_max: 65_536,
            window_lifetime: Duration::from_secs(600),
            exports_max: 4096,
            pushes_max: 4096,
            pushes_per_connection_max: 256,
            descriptors_max: 65_536,
            lanes_per_push: 1,
            lane_retries_max: 3,
            lane_backoff: Duration::from_millis(50),
            lane_grace: Duration::from_secs(1),
            connections_max: 1024,
            handshake_timeout: Duration::from_secs(2),
            stall_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_millis(300),
            idle_timeout: Duration::from_secs(2),
            flow_window_bytes: 16 << 20,
        }
    }
}
