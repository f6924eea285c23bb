//! The agent: one per process, the front door of the crate. It opens windows, starts pushes and owns the transport.

use crate::control::Control;
use crate::export::Exports;
use crate::hello::Hello;
use crate::inbox::Inbox;
use crate::limits::{CONTROL_BYTES_MAX, NAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use crate::network::Network;
use crate::nixl::Nixl;
use crate::push::{Outgoing, Push};
use crate::push_state::PushLimits;
use crate::ranges::RangeSet;
use crate::shared_memory::SharedMemory;
use crate::stats::Counters;
use crate::storage::Memory;
use crate::transport::{Best, Transport, TransportOptions};
use crate::window_table::{WindowTable, lock};
use crate::wire::CONTROL_WINDOW;
use crate::{
    ALIGN, MemoryDescription, PushError, Refusal, Region, SetupError, TransferLimits, TransferStats, Window,
    WindowOptions,
};
use baton_identity::Identity;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

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
    /// What to carry pushes with; by default whatever is best between this agent and the peer.
    pub transports: TransportOptions,
}

/// Moves blocks to and from other agents. Cloning gives another handle on the same agent; it is closed when the last
/// is dropped.
#[derive(Clone)]
pub struct Agent {
    inner: Arc<Inner>,
}

/// What the agent tells about itself, as far as it changes.
pub(crate) struct Card {
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) memories: Vec<MemoryDescription>,
    /// Registrations ever made: the last one's id.
    pub(crate) registrations: u64,
}

pub(crate) struct Inner {
    transport: Box<dyn Transport>,
    table: Arc<WindowTable>,
    counters: Arc<Counters>,
    limits: Arc<TransferLimits>,
    random: &'static dyn rustls::crypto::SecureRandom,
    runtime: Handle,
    hello: Hello,
    card: Mutex<Card>,
    exports: Arc<Exports>,
    /// What control messages are pushed from: none of it is read.
    empty: Memory,
}

/// What one push may take.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// From its start until the receiver's acknowledgement; `None`: as long as it makes progress.
    pub deadline: Option<Duration>,
}

/// Fails the push when its time is over.
async fn expire(push: Arc<Outgoing>, limit: Duration) {
    if tokio::time::timeout(limit, push.settled()).await.is_err() {
        push.fail(PushError::DeadlineExceeded { limit });
    }
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
        let runtime = Handle::try_current().map_err(|_| SetupError::NoRuntime)?;
        let limits = Arc::new(config.limits);
        let counters = Arc::new(Counters::default());
        let table = Arc::new(WindowTable::new(&limits, counters.clone()));
        let shared_memory = config
            .transports
            .shared_memory
            .then(|| SharedMemory::bind(table.clone(), limits.clone(), runtime.clone()))
            .flatten();
        let nixl = config
            .transports
            .nixl
            .then(|| Nixl::open(&config.name, table.clone(), limits.clone(), runtime.clone()))
            .flatten();
        let hello = Hello {
            version: baton_proto::PROTOCOL_VERSION,
            digest: config.digest,
            name: config.name,
            host: shared_memory.as_ref().map(|shared| shared.host()),
            offer: None,
            tcp: config.transports.tcp,
            nixl: nixl.as_ref().map(|_| limits.pushes_per_connection_max),
        };
        let empty = Region::new(ALIGN)?.into();
        let network = Network::bind(
            config.bind,
            config.identity,
            &hello,
            &table,
            &limits,
            shared_memory.as_ref(),
            nixl.as_ref(),
        )?;
        let transport = Best::new(network, shared_memory, nixl, runtime.clone());
        let exports = Arc::<Exports>::default();
        runtime.spawn(exports.clone().run());
        let inner = Arc::new(Inner {
            card: Mutex::new(Card {
                addresses: vec![transport.local_addr()],
                memories: Vec::new(),
                registrations: 0,
            }),
            transport: Box::new(transport),
            table,
            counters,
            limits,
            random: rustls::crypto::ring::default_provider().secure_random,
            runtime,
            hello,
            exports,
            empty,
        });
        let served = Arc::downgrade(&inner);
        inner.table.inbox().serve(Box::new(move |peer, message| {
            let agent = served.upgrade().ok_or(Refusal::UnknownExport)?;
            agent.control(peer, message)
        }));
        Ok(Self { inner })
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// The address, UDP and TCP, that peers push to.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.transport.local_addr()
    }

    /// Opens a window over `ranges` of `memory` for one push.
    ///
    /// # Errors
    /// [`SetupError`]: misuse of ranges, overlap with another open window, too many windows, a closed agent.
    pub fn open_window(&self, memory: impl Into<Memory>, ranges: Vec<Range<usize>>) -> Result<Window, SetupError> {
        self.open_window_with(memory, ranges, WindowOptions::default())
    }

    /// [`Agent::open_window`] with a bound on the bytes, or a lifetime.
    ///
    /// # Errors
    /// As [`Agent::open_window`].
    pub fn open_window_with(
        &self,
        memory: impl Into<Memory>,
        ranges: Vec<Range<usize>>,
        options: WindowOptions,
    ) -> Result<Window, SetupError> {
        let inner = &self.inner;
        let memory = memory.into();
        let ranges = RangeSet::new(ranges, memory.len(), inner.limits.window_ranges_max)?;
        // Twice: a sender may rewrite what it wrote, but not for ever.
        let bytes_max = options.bytes_max.unwrap_or_else(|| ranges.bytes().saturating_mul(2));
        let cell = inner.table.open(&memory, ranges, bytes_max, || inner.random_id())?;
        let lifetime = options.lifetime.unwrap_or(inner.limits.window_lifetime);
        Ok(Window::new(cell, inner.table.clone(), lifetime))
    }

    /// Starts a push of bytes of `memory` into the window with id `window` at `peer`. Returns at once, from any
    /// thread; the connection is made in the background, and if it fails so does the push.
    pub fn push(&self, peer: SocketAddr, window: u64, memory: impl Into<Memory>) -> Push {
        self.push_with(peer, window, memory, PushOptions::default())
    }

    /// [`Agent::push`] with a deadline.
    pub fn push_with(&self, peer: SocketAddr, window: u64, memory: impl Into<Memory>, options: PushOptions) -> Push {
        let push = self
            .inner
            .start(peer, window, memory.into(), options.deadline, PAYLOAD_BYTES_MAX);
        Push::new(push)
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
    /// Starts a push, or a failed one.
    pub(crate) fn start(
        &self,
        peer: SocketAddr,
        window: u64,
        memory: Memory,
        deadline: Option<Duration>,
        payload_max: usize,
    ) -> Arc<Outgoing> {
        let max = self.limits.pushes_max;
        let full = self.counters.pushes_open.get() >= max as u64;
        let limits = PushLimits {
            descriptors_max: self.limits.descriptors_max,
            payload_max,
            retries_max: self.limits.lane_retries_max,
            backoff: self.limits.lane_backoff,
            grace: self.limits.lane_grace,
        };
        // Without random bytes the push is refused below; nobody sees the id.
        let id = self.random_id();
        let push = Arc::new(Outgoing::new(
            window,
            id.as_ref().map_or(0, |id| *id),
            memory,
            limits,
            self.counters.clone(),
        ));
        match id {
            Err(_) => push.fail(PushError::AgentClosed),
            Ok(_) if full => push.fail(PushError::TooManyPushes { max }),
            Ok(_) => {
                self.transport.carry(peer, push.clone());
                if let Some(limit) = deadline {
                    self.runtime.spawn(expire(push.clone(), limit));
                }
            }
        }
        push
    }

    /// Sends a control message and waits until it is taken.
    pub(crate) async fn call(
        &self,
        peer: SocketAddr,
        message: &Control,
        deadline: Option<Duration>,
    ) -> Result<(), PushError> {
        let push = self.start(peer, CONTROL_WINDOW, self.empty.clone(), deadline, CONTROL_BYTES_MAX);
        // A caller that goes away takes the message with it.
        let push = Push::new(push);
        push.outgoing().finish(message.encode(), false, Instant::now())?;
        push.outgoing().settled().await.map(drop)
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(crate) fn limits(&self) -> &TransferLimits {
        &self.limits
    }

    pub(crate) fn hello(&self) -> &Hello {
        &self.hello
    }

    pub(crate) fn inbox(&self) -> &Arc<Inbox> {
        self.table.inbox()
    }

    pub(crate) fn exports(&self) -> &Arc<Exports> {
        &self.exports
    }

    pub(crate) fn with_card<T>(&self, change: impl FnOnce(&mut Card) -> T) -> T {
        change(&mut lock(&self.card))
    }

    pub(crate) fn random_id(&self) -> Result<u64, SetupError> {
        let mut id = [0; 8];
        self.random.fill(&mut id).map_err(|_| SetupError::Random)?;
        Ok(u64::from_le_bytes(id))
    }

    fn shut(&self) -> impl Future<Output = ()> + use<> {
        self.exports.shut();
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

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("name", &self.hello.name)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("local_addr", &self.local_addr())
            .finish_non_exhaustive()
    }
}
