//! Streams from this worker to the prefill workers it uses: one Attach stream per peer, opened on first use, shared by
//! all fills, dropped when it breaks.
//!
//! A broken stream is the quickest sign of a dead peer (the kernel resets the TCP connection when the process dies),
//! so every fill waits on it beside its window.

use baton_identity::{Identity, Role};
use baton_proto::worker::worker_client::WorkerClient;
use baton_proto::worker::{Cancel, Finish, FinishReason, FromWorker, Hello, Prefill, ToWorker, from_worker, to_worker};
use baton_proto::{PROTOCOL_VERSION, limits};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Time to connect and greet. Peers share a network; longer means the peer is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Silence after which a peer is asked whether it lives, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Messages queued to one peer: a prefill and a cancel for each of the sequences a worker runs at once.
const QUEUE_MAX: usize = 256;

/// Why a peer could not be used. Never reaches a client: the prompt is computed here instead.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("cannot reach prefill worker at {addr}: {reason}")]
    Unreachable { addr: String, reason: String },
    #[error("prefill worker at {addr} runs another model or KV geometry; both must load the same model and settings")]
    Incompatible { addr: String },
    #[error("prefill worker at {addr} now runs under epoch {found}, not {expected}")]
    Epoch { addr: String, expected: u64, found: u64 },
    #[error("the prefill worker is gone")]
    Gone,
    #[error("too many requests are queued to the prefill worker")]
    Busy,
}

/// All peers of this worker.
pub(crate) struct Peers {
    identity: Identity,
    name: String,
    kv_digest: [u8; 32],
    links: tokio::sync::Mutex<HashMap<(String, u64), Arc<Link>>>,
}

impl Peers {
    pub(crate) fn new(identity: Identity, name: String, kv_digest: [u8; 32]) -> Self {
        Self {
            identity,
            name,
            kv_digest,
            links: tokio::sync::Mutex::new(HashMap::new()),
        }
    }

    /// The live link to a peer, opened if need be. Two callers for one peer share the attempt.
    pub(crate) async fn link(&self, addr: &str, epoch: u64) -> Result<Arc<Link>, PeerError> {
        let mut links = self.links.lock().await;
        links.retain(|_, link| link.is_open());
        if let Some(link) = links.get(&(addr.to_owned(), epoch)) {
            return Ok(link.clone());
        }
        let unreachable = |reason: String| PeerError::Unreachable {
            addr: addr.to_owned(),
            reason,
        };
        let link = tokio::time::timeout(CONNECT_TIMEOUT, self.open(addr, epoch))
            .await
            .map_err(|_| unreachable(format!("no answer within {CONNECT_TIMEOUT:?}")))??;
        links.insert((addr.to_owned(), epoch), link.clone());
        Ok(link)
    }

    async fn open(&self, addr: &str, epoch: u64) -> Result<Arc<Link>, PeerError> {
        let unreachable = |reason: String| PeerError::Unreachable {
            addr: addr.to_owned(),
            reason,
        };
        let channel: Channel = Endpoint::from_shared(format!("https://{addr}"))
            .and_then(|endpoint| endpoint.tls_config(self.identity.tonic_client(Role::Worker)))
            .map_err(|error| unreachable(error.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let mut client = WorkerClient::new(channel)
            .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
        let (outbound, queued) = mpsc::channel(QUEUE_MAX);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            caller: self.name.clone(),
            kv_digest: self.kv_digest.to_vec().into(),
        };
        outbound
            .try_send(ToWorker {
                kind: Some(to_worker::Kind::Hello(hello)),
            })
            .map_err(|_| PeerError::Gone)?;
        let mut inbound = client
            .attach(ReceiverStream::new(queued))
            .await
            .map_err(|status| unreachable(status.message().to_owned()))?
            .into_inner();
        let reply = match inbound
            .message()
            .await
            .map_err(|status| unreachable(status.message().to_owned()))?
        {
            Some(FromWorker {
                kind: Some(from_worker::Kind::Hello(reply)),
            }) => reply,
            _ => return Err(unreachable("it did not greet".into())),
        };
        if reply.kv_digest[..] != self.kv_digest {
            return Err(PeerError::Incompatible { addr: addr.to_owned() });
        }
        if reply.epoch != epoch {
            return Err(PeerError::Epoch {
                addr: addr.to_owned(),
                expected: epoch,
                found: reply.epoch,
            });
        }
        let link = Arc::new(Link {
            outbound,
            open: Mutex::new(Some(Open {
                next_id: 1,
                waiting: HashMap::new(),
            })),
        });
        tokio::spawn(receive(link.clone(), inbound));
        Ok(link)
    }
}

/// One stream to one peer.
pub(crate) struct Link {
    outbound: mpsc::Sender<ToWorker>,
    /// None once the stream has broken.
    open: Mutex<Option<Open>>,
}

struct Open {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Finish>>,
}

impl Link {
    fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Sends a prefill request (its id is set here). Dropping the answer cancels it on the peer.
    pub(crate) fn prefill(self: &Arc<Self>, mut request: Prefill) -> Result<Pending, PeerError> {
        let (sender, finished) = oneshot::channel();
        let id = {
            let mut open = self.lock();
            let open = open.as_mut().ok_or(PeerError::Gone)?;
            let id = open.next_id;
            open.next_id += 1;
            open.waiting.insert(id, sender);
            id
        };
        request.id = id;
        let pending = Pending {
            link: self.clone(),
            id,
            finished,
        };
        match self.outbound.try_send(ToWorker {
            kind: Some(to_worker::Kind::Prefill(request)),
        }) {
            Ok(()) => Ok(pending),
            Err(mpsc::error::TrySendError::Full(_)) => Err(PeerError::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(PeerError::Gone),
        }
    }
}

/// A prefill request under way on a peer.
pub(crate) struct Pending {
    link: Arc<Link>,
    id: u64,
    finished: oneshot::Receiver<Finish>,
}

impl Pending {
    /// The peer's last word on the request, or [`PeerError::Gone`] when the stream breaks first.
    pub(crate) async fn finished(&mut self) -> Result<Finish, PeerError> {
        (&mut self.finished).await.map_err(|_| PeerError::Gone)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let unfinished = match self.link.lock().as_mut() {
            Some(open) => open.waiting.remove(&self.id).is_some(),
            None => false,
        };
        if unfinished {
            // A full queue means the peer reads nothing; closing the window already stops its writes.
            let cancel = ToWorker {
                kind: Some(to_worker::Kind::Cancel(Cancel { id: self.id })),
            };
            let _ = self.link.outbound.try_send(cancel);
        }
    }
}

async fn receive(link: Arc<Link>, mut inbound: Streaming<FromWorker>) {
    while let Ok(Some(message)) = inbound.message().await {
        let Some(from_worker::Kind::Step(step)) = message.kind else {
            break;
        };
        let mut open = link.lock();
        let Some(open) = open.as_mut() else { break };
        for delta in step.deltas {
            let Some(finish) = delta.finish else { continue };
            if let Some(waiting) = open.waiting.remove(&delta.id) {
                let _ = waiting.send(finish);
            }
        }
    }
    // Dropping the senders tells every waiting fill.
    link.lock().take();
}

/// Whether a peer's last word means that the blocks and the first token are in the window.
pub(crate) fn is_prefilled(finish: &Finish) -> bool {
    finish.reason() == FinishReason::Prefilled
}
