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

/// Longest agent name in bytes: a host name and an ordinal fit.
pub const NAME_BYTES_MAX: usize = 64;

/// Which network transport carries the pushes that an agent starts. An agent takes both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// QUIC over UDP.
    #[default]
    Quic,
    /// TLS over TCP, one connection for each push in flight.
    Tcp,
}

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
    /// Pushes in flight from this agent at once; more fail at once.
    pub pushes_max: usize,
    /// Pushes in flight on one connection; the receiver enforces it, further ones wait at the sender.
    pub pushes_per_connection_max: u32,
    /// Descriptors queued in one push that the transport has not taken yet: blocks × layers × 2 of a long prompt fall
    /// well below, and one costs 24 bytes.
    pub descriptors_max: usize,
    /// Connections that peers hold to this agent, plus those being established.
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
    /// What pushes travel over.
    pub network: Network,
}

impl Default for TransferLimits {
    fn default() -> Self {
        Self {
            windows_max: 4096,
            window_ranges_max: 65_536,
            window_lifetime: Duration::from_secs(600),
            pushes_max: 4096,
            pushes_per_connection_max: 256,
            descriptors_max: 65_536,
            connections_max: 1024,
            handshake_timeout: Duration::from_secs(2),
            stall_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_millis(300),
            idle_timeout: Duration::from_secs(2),
            flow_window_bytes: 16 << 20,
            network: Network::default(),
        }
    }
}
