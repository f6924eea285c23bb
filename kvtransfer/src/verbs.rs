//! The verbs of an agent beyond windows and pushes: register, introduce, write, read, export, notify.
//!
//! A write is a push with its whole list at once. A read is the same push asked for by the other side: the reader opens
//! a window, names it and an [`Export`] in a control message, and the owner's agent pushes into it. So bytes have one way
//! through the code, with one set of fences.

use crate::agent::{Agent, Inner};
use crate::control::{Control, ReadRequest};
use crate::lease::{LeaseEnd, ReadEnd};
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::push::Outgoing;
use crate::ranges::RangeSet;
use crate::transfer::Outcome;
use crate::window_state::Phase;
use crate::{
    AgentMetadata, DescriptorList, Export, ExportGrant, Hold, LeaseOptions, Memory, MemoryDescription, Notification,
    Peer, PushError, PushOptions, Refusal, SetupError, Transfer, TransferError, TransferOptions, TransferReport,
    Window, WindowOptions,
};
use bytes::Bytes;
use futures_util::Stream;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// Memory that the agent's metadata lists. Dropping it takes it off the list; transfers under way are not touched.
#[derive(Debug)]
pub struct Registered {
    id: u64,
    memory: Memory,
    inner: Arc<Inner>,
}

impl Registered {
    /// Its id in [`AgentMetadata::memories`].
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl From<&Registered> for Memory {
    fn from(registered: &Registered) -> Self {
        registered.memory.clone()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.inner
            .with_card(|card| card.memories.retain(|memory| memory.id != self.id));
    }
}

impl Agent {
    /// Registers memory, so that [`Agent::metadata`] lists it. Windows, pushes and exports take memory whether it is
    /// registered or not; being listed permits nothing.
    pub fn register(&self, memory: impl Into<Memory>) -> Registered {
        let memory = memory.into();
        let inner = self.inner();
        let id = inner.with_card(|card| {
            card.registrations += 1;
            card.memories.push(MemoryDescription {
                id: card.registrations,
                kind: memory.kind(),
                bytes: memory.len() as u64,
            });
            card.registrations
        });
        Registered {
            id,
            memory,
            inner: inner.clone(),
        }
    }

    /// Sets the addresses that [`Agent::metadata`] gives and reads are answered to, the best first. Needed where the
    /// agent is bound to an unspecified address, which tells peers nothing.
    pub fn advertise(&self, addresses: Vec<SocketAddr>) {
        self.inner().with_card(|card| card.addresses = addresses);
    }

    /// What to tell peers about this agent.
    pub fn metadata(&self) -> AgentMetadata {
        let hello = self.inner().hello();
        let (addresses, memories) = self
            .inner()
            .with_card(|card| (card.addresses.clone(), card.memories.clone()));
        AgentMetadata {
            name: hello.name.clone(),
            version: hello.version,
            digest: hello.digest,
            addresses,
            memories,
        }
    }

    /// Checks a peer's metadata, and gives the handle that transfers take. No connection is made.
    ///
    /// # Errors
    /// [`SetupError::Incompatible`], [`SetupError::NoAddress`].
    pub fn add_peer(&self, metadata: AgentMetadata) -> Result<Peer, SetupError> {
        Peer::new(self.inner().hello(), metadata)
    }

    /// Writes the pieces of `list` (`local` in `memory`, `remote` in the window's memory) into the window with id
    /// `window` at `peer`, and completes it. Returns at once, from any thread; what goes wrong shows in the handle.
    pub fn write(
        &self,
        peer: &Peer,
        window: u64,
        memory: impl Into<Memory>,
        list: &DescriptorList,
        options: TransferOptions,
    ) -> Transfer {
        let push = PushOptions {
            deadline: options.deadline,
        };
        let push = self
            .inner()
            .start(peer.addr(), window, memory.into(), push.deadline, PAYLOAD_BYTES_MAX);
        let now = Instant::now();
        let notify = options.notification.is_some();
        let queued = queue(
            &push,
            list.pieces().iter().map(|piece| (piece.local, piece.remote, piece.len)),
        )
        .and_then(|()| push.finish(options.notification.unwrap_or_default(), notify, now));
        if let Err(error) = queued {
            push.fail(error);
        }
        Transfer::write(push)
    }

    /// Reads the pieces of `list` (`remote` in the exported memory, `local` in `memory`) from the export of `grant` at
    /// `peer`. Returns at once, from any thread; what goes wrong shows in the handle. While it runs, heartbeats keep the
    /// lease.
    pub fn read(
        &self,
        peer: &Peer,
        grant: ExportGrant,
        memory: impl Into<Memory>,
        list: &DescriptorList,
        options: TransferOptions,
    ) -> Transfer {
        let window = WindowOptions {
            bytes_max: None,
            lifetime: options.deadline,
        };
        let inner = self.inner();
        if let Some(notification) = options.notification.as_ref().filter(|it| it.len() > PAYLOAD_BYTES_MAX) {
            let (len, max) = (notification.len(), PAYLOAD_BYTES_MAX);
            return Transfer::failed(PushError::PayloadTooLong { len, max }.into());
        }
        let window = match self.open_window_with(memory, list.local_ranges(), window) {
            Ok(window) => window,
            Err(error) => return Transfer::failed(TransferError::Setup(error.to_string())),
        };
        let Some(reader) = inner.with_card(|card| card.addresses.first().copied()) else {
            let peer = inner.hello().name.clone();
            return Transfer::failed(TransferError::Setup(SetupError::NoAddress { peer }.to_string()));
        };
        let request = ReadRequest {
            export: grant.id,
            window: window.id(),
            reader,
            notification: options.notification,
            pieces: list.reversed(),
        };
        let (cell, table) = window.parts();
        let (outcome, _) = watch::channel(None);
        let job = serve_read(
            inner.clone(),
            peer.addr(),
            grant,
            window,
            request,
            list.bytes(),
            outcome.clone(),
        );
        let task = inner.runtime().spawn(job).abort_handle();
        Transfer::read(cell, table, task, outcome)
    }

    /// Lends `ranges` of `memory` for reading. See [`Export`] for what the owner may do meanwhile.
    ///
    /// # Errors
    /// [`SetupError`]: misuse of ranges, too many exports, a closed agent.
    pub fn export(
        &self,
        memory: impl Into<Memory>,
        ranges: Vec<Range<usize>>,
        options: LeaseOptions,
    ) -> Result<Export, SetupError> {
        let (inner, memory) = (self.inner(), memory.into());
        let limits = inner.limits();
        let ranges = RangeSet::new(ranges, memory.len(), limits.window_ranges_max)?;
        let exports = inner.exports();
        exports.grant(memory, ranges, options, limits.exports_max, || inner.random_id())
    }

    /// Keeps the lease of a grant alive until the handle is dropped, which releases it. A read does so by itself while
    /// it runs; this is for the time before and between.
    pub fn hold(&self, peer: &Peer, grant: ExportGrant) -> Hold {
        Hold::new(self.inner(), peer.addr(), grant)
    }

    /// Delivers `payload` to the peer's [`Agent::notifications`], once.
    ///
    /// # Errors
    /// Any [`PushError`]; [`Refusal::Busy`] in it if nobody takes them there.
    pub async fn notify(&self, peer: &Peer, payload: Bytes) -> Result<(), PushError> {
        let (len, max) = (payload.len(), PAYLOAD_BYTES_MAX);
        if len > max {
            return Err(PushError::PayloadTooLong { len, max });
        }
        self.inner().call(peer.addr(), &Control::Notify(payload), None).await
    }

    /// Notifications of peers, in the order of their arrival; ends when the agent is closed. Each is given to one of
    /// the streams that ask.
    pub fn notifications(&self) -> impl Stream<Item = Notification> + Send + 'static + use<> {
        let inbox = self.inner().inbox().clone();
        futures_util::stream::unfold(inbox, |inbox| async move {
            let notification = inbox.next().await?;
            Some((notification, inbox))
        })
    }
}

/// Queues pieces of (local, remote, length).
fn queue(push: &Outgoing, pieces: impl Iterator<Item = (usize, usize, usize)>) -> Result<(), PushError> {
    let now = Instant::now();
    for (local, remote, len) in pieces {
        // An end beyond the address space is outside of any memory.
        push.write(local..local.saturating_add(len), remote, now)?;
    }
    Ok(())
}

/// The task of a read.
async fn serve_read(
    inner: Arc<Inner>,
    owner: SocketAddr,
    grant: ExportGrant,
    window: Window,
    request: ReadRequest,
    bytes: u64,
    outcome: watch::Sender<Outcome>,
) {
    let started = Instant::now();
    let (cell, _) = window.parts();
    let filled = async { window.wait().await.map_err(TransferError::from) };
    let result = tokio::select! {
        biased;
        filled = filled => filled.map(drop),
        error = ask(&inner, owner, grant, request) => {
            // What ended the lease may be that the read was done.
            match cell.phase() {
                Phase::Completed(_) => Ok(()),
                _ => Err(error),
            }
        }
    };
    // Fences before anybody hears of it.
    window.close();
    let result = result.map(|()| TransferReport {
        bytes,
        elapsed: started.elapsed(),
    });
    outcome.send_if_modified(|outcome| {
        let open = outcome.is_none();
        if open {
            *outcome = Some(result);
        }
        open
    });
}

/// Asks for the read and shows that the reader lives; resolves when the owner does not serve it any more.
async fn ask(inner: &Arc<Inner>, owner: SocketAddr, grant: ExportGrant, request: ReadRequest) -> TransferError {
    let beat = Control::Beat {
        export: grant.id,
        window: Some(request.window),
    };
    match inner.call(owner, &Control::Read(request), None).await {
        Ok(()) => {}
        Err(PushError::Refused(refusal)) => return TransferError::Ended(refusal),
        Err(error) => return error.into(),
    }
    let mut heard = Instant::now();
    loop {
        tokio::time::sleep(grant.heartbeat()).await;
        match inner.call(owner, &beat, Some(grant.term())).await {
            Ok(()) => heard = Instant::now(),
            Err(PushError::Refused(refusal)) => return TransferError::Ended(refusal),
            Err(PushError::PeerClosed { peer }) => return PushError::PeerClosed { peer }.into(),
            Err(_) if heard.elapsed() >= grant.term() => return TransferError::OwnerLost { term: grant.term() },
            Err(_) => {}
        }
    }
}

impl Inner {
    /// Serves a control message.
    pub(crate) fn control(self: &Arc<Self>, peer: &str, message: Bytes) -> Result<(), Refusal> {
        match Control::decode(message, self.limits().descriptors_max)? {
            Control::Notify(payload) => {
                self.inbox().room()?;
                self.inbox().notify(peer, payload);
                Ok(())
            }
            Control::Beat { export, window } => self.exports().beat(export, window),
            Control::Release { export } => {
                self.exports().end(export, LeaseEnd::Released);
                Ok(())
            }
            Control::Read(request) => self.begin_read(peer, request),
        }
    }

    fn begin_read(self: &Arc<Self>, peer: &str, request: ReadRequest) -> Result<(), Refusal> {
        let push = self.exports().begin(&request, |memory| {
            let push = self.start(request.reader, request.window, memory, None, PAYLOAD_BYTES_MAX);
            let pieces = request
                .pieces
                .iter()
                .map(|piece| (piece.local, piece.remote, piece.len));
            let queued = queue(&push, pieces).and_then(|()| push.finish(Bytes::new(), false, Instant::now()));
            if let Err(error) = queued {
                push.fail(error);
            }
            push
        })?;
        let (agent, peer) = (Arc::downgrade(self), peer.to_owned());
        self.runtime().spawn(async move {
            let result = push.settled().await;
            let Some(agent) = agent.upgrade() else { return };
            let how = match &result {
                Ok(_) => ReadEnd::Done,
                Err(
                    PushError::PeerLost { .. }
                    | PushError::PeerClosed { .. }
                    | PushError::Unreachable { .. }
                    | PushError::Stalled { .. }
                    | PushError::Refused(Refusal::AgentClosed),
                ) => ReadEnd::ReaderLost,
                Err(_) => ReadEnd::Failed,
            };
            agent.exports().end_read(request.export, request.window, how);
            if let (Ok(_), Some(payload)) = (&result, request.notification) {
                agent.inbox().notify(&peer, payload);
            }
        });
        Ok(())
    }
}
