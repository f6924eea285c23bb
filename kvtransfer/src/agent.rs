//! The agent: one per process, the front door of the crate. It opens windows, starts pushes and owns the transport.

use crate::hello::Hello;
use crate::limits::NAME_BYTES_MAX;
use crate::network::NetworkTransport;
use crate::push::{Outgoing, Push};
use crate::ranges::RangeSet;
use crate::stats::Counters;
use crate::transport::Transport;
use crate::window_table::WindowTable;
use crate::{PushError, Region, SetupError, TransferLimits, TransferStats, Window, WindowOptions};
use baton_identity::Identity;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

/// What an agent is bound with.
pub struct AgentConfig<'a> {
    /// Name for logs and refusals, 1 to [`NAME_BYTES_MAX`] bytes; usually the worker id.
    pub name: String,
    /// UDP and TCP address to listen on; port 0 takes a free one, see [`Agent::local_addr`].
    pub bind: SocketAddr,
    /// A worker identity of the cluster.
    pub identity: &'a Identity,
    /// What both ends must agree on: model, KV geometry and dtype, hashed.
    pub digest: [u8; 32],
    /// Limits; the defaults suit a cluster.
    pub limits: TransferLimits,
}

/// Moves blocks to and from other agents. Cloning gives another handle on the same agent; it is closed when the last
/// is dropped.
#[derive(Clone)]
pub struct Agent {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Box<dyn Transport>,
    table: Arc<WindowTable>,
    counters: Arc<Counters>,
    limits: Arc<TransferLimits>,
    random: &'static dyn rustls::crypto::SecureRandom,
}

impl Agent {
    /// Binds the address and begins to take pushes. Must be called inside a tokio runtime, which then carries the
    /// agent's work.
    ///
    /// # Errors
    /// [`SetupError`]: the name, the address, the identity or the runtime.
    pub fn bind(config: AgentConfig<'_>) -> Result<Self, SetupError> {
        if config.name.is_empty() || config.name.len() > NAME_BYTES_MAX {
            return Err(SetupError::AgentName {
                name: config.name,
                max: NAME_BYTES_MAX,
            });
        }
        let limits = Arc::new(config.limits);
        let counters = Arc::new(Counters::default());
        let table = Arc::new(WindowTable::new(limits.windows_max, counters.clone()));
        let hello = Hello {
            version: baton_proto::PROTOCOL_VERSION,
            digest: config.digest,
            name: config.name,
        };
        let transport = NetworkTransport::bind(config.bind, config.identity, &hello, &table, &limits)?;
        Ok(Self {
            inner: Arc::new(Inner {
                transport: Box::new(transport),
                table,
                counters,
                limits,
                random: rustls::crypto::ring::default_provider().secure_random,
            }),
        })
    }

    /// The address, UDP and TCP, that peers push to.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.transport.local_addr()
    }

    /// Opens a window over `ranges` of `region` for one push.
    ///
    /// # Errors
    /// [`SetupError`]: misuse of ranges, overlap with another open window, too many windows, a closed agent.
    pub fn open_window(&self, region: &Arc<Region>, ranges: Vec<Range<usize>>) -> Result<Window, SetupError> {
        self.open_window_with(region, ranges, WindowOptions::default())
    }

    /// [`Agent::open_window`] with a bound on the bytes, or a lifetime.
    ///
    /// # Errors
    /// As [`Agent::open_window`].
    pub fn open_window_with(
        &self,
        region: &Arc<Region>,
        ranges: Vec<Range<usize>>,
        options: WindowOptions,
    ) -> Result<Window, SetupError> {
        let inner = &self.inner;
        let ranges = RangeSet::new(ranges, region.len(), inner.limits.window_ranges_max)?;
        // Twice: a sender may rewrite what it wrote, but not for ever.
        let bytes_max = options.bytes_max.unwrap_or_else(|| ranges.bytes().saturating_mul(2));
        let cell = inner.table.open(region, ranges, bytes_max, || {
            let mut id = [0; 8];
            let filled = inner.random.fill(&mut id);
            filled.map_err(|_| SetupError::Random)?;
            Ok(u64::from_le_bytes(id))
        })?;
        let lifetime = options.lifetime.unwrap_or(inner.limits.window_lifetime);
        Ok(Window::new(cell, inner.table.clone(), lifetime))
    }

    /// Starts a push of bytes of `region` into the window with id `window` at `peer`. Returns at once, from any
    /// thread; the connection is made in the background, and if it fails so does the push.
    pub fn push(&self, peer: SocketAddr, window: u64, region: Arc<Region>) -> Push {
        let inner = &self.inner;
        let max = inner.limits.pushes_max;
        let full = inner.counters.pushes_open.get() >= max as u64;
        let out = Arc::new(Outgoing::new(
            window,
            region,
            inner.limits.descriptors_max,
            inner.counters.clone(),
        ));
        if full {
            out.fail(PushError::TooManyPushes { max });
        } else {
            inner.transport.carry(peer, out.clone());
        }
        Push::new(out)
    }

    /// What the agent has done and what is open, for metrics.
    pub fn stats(&self) -> TransferStats {
        self.inner.counters.snapshot()
    }

    /// Closes the agent at once: windows and pushes fail and peers are told. Resolves when they have been, within
    /// half a second.
    pub async fn close(&self) {
        self.inner.shut().await;
    }
}

impl Inner {
    fn shut(&self) -> impl Future<Output = ()> + use<> {
        self.table.shut();
        self.transport.close()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody can wait here; the closing itself happens at once.
        drop(self.shut());
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("local_addr", &self.local_addr())
            .finish_non_exhaustive()
    }
}
