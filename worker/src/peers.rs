//! Streams from this worker to the prefill workers it uses: one Attach stream per peer, opened on first use, shared by
//! all fills, dropped when it breaks.
//!
//! A broken stream is the quickest sign of a dead peer (the kernel resets the TCP connection when the process dies),
//! so every fill waits on it beside its window. A peer that hangs keeps its stream: that is for `baton_watchdog`, which
//! looks at each request ten times a second.

use baton_identity::{Identity, Role};
use baton_proto::worker::worker_client::WorkerClient;
use baton_proto::worker::{Cancel, Finish, FinishReason, FromWorker, Hello, Prefill, ToWorker, from_worker, to_worker};
use baton_proto::{PROTOCOL_VERSION, limits};
use baton_watchdog::{Hang, LOOK_EVERY_MS, Vitals, Watch};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Time to connect and greet. Peers share a network, where it takes milliseconds: longer means that the peer is not there,
/// and the prompt waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A peer that could not be reached is not tried again for so long: prompts would wait for it in vain.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
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
    #[error("nothing is heard from the prefill worker")]
    Silent,
}

/// A peer's link. Locked while it is being opened.
type Slot = Arc<tokio::sync::Mutex<State>>;

#[derive(Default)]
enum State {
    #[default]
    New,
    Opened(Arc<Link>),
    /// Opening failed, then and for this reason: whoever waited for that attempt shares it.
    Failed(Instant, PeerError),
}

impl State {
    fn link(&self) -> Option<&Arc<Link>> {
        match self {
            Self::Opened(link) => Some(link).filter(|link| link.is_open()),
            Self::New | Self::Failed(..) => None,
        }
    }
}

/// All peers of this worker.
pub(crate) struct Peers {
    identity: Identity,
    name: String,
    kv_digest: [u8; 32],
    /// By address and epoch. At most one per peer that fills use at this moment, or used last.
    slots: Mutex<HashMap<(String, u64), Slot>>,
}

impl Peers {
    pub(crate) fn new(identity: Identity, name: String, kv_digest: [u8; 32]) -> Self {
        Self {
            identity,
            name,
            kv_digest,
            slots: Mutex::default(),
        }
    }

    /// The live link to a peer, opened if need be. Callers for one peer share the attempt and its failure; callers for
    /// others do not wait for it.
    pub(crate) async fn link(&self, addr: &str, epoch: u64) -> Result<Arc<Link>, PeerError> {
        let asked = Instant::now();
        let slot = self.slot(addr, epoch);
        let mut slot = slot.lock().await;
        match &*slot {
            State::Failed(at, error) if *at >= asked || at.elapsed() < AGAIN_AFTER => return Err(error.clone()),
            state => {
                if let Some(link) = state.link() {
                    return Ok(link.clone());
                }
            }
        }
        let unreachable = |reason: String| PeerError::Unreachable {
            addr: addr.to_owned(),
            reason,
        };
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, self.open(addr, epoch))
            .await
            .unwrap_or_else(|_| Err(unreachable(format!("no answer within {CONNECT_TIMEOUT:?}"))));
        *slot = match &opened {
            Ok(link) => State::Opened(link.clone()),
            Err(error) => State::Failed(Instant::now(), error.clone()),
        };
        opened
    }

    fn slot(&self, addr: &str, epoch: u64) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // One that nobody else holds is in use by no caller; without an open link it is of no use.
        slots.retain(|_, slot| {
            let of_use = |slot: &Slot| slot.try_lock().is_ok_and(|state| state.link().is_some());
            Arc::strong_count(slot) > 1 || of_use(slot)
        });
        slots.entry((addr.to_owned(), epoch)).or_default().clone()
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
                vitals: Vitals::new(reply.pulse_interval_ms, 0),
            })),
            since: Instant::now(),
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
    /// Where the watchdog's milliseconds begin.
    since: Instant,
}

struct Open {
    next_id: u64,
    waiting: HashMap<u64, Waiting>,
    vitals: Vitals,
}

/// The way back to a request.
struct Waiting {
    finished: oneshot::Sender<Finish>,
    cached: watch::Sender<Option<u32>>,
}

impl Link {
    fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Sends a prefill request (its id is set here). Dropping the answer cancels it on the peer.
    pub(crate) fn prefill(self: &Arc<Self>, mut request: Prefill) -> Result<Pending, PeerError> {
        let (finished_sender, finished) = oneshot::channel();
        let (cached_sender, cached) = watch::channel(None);
        let now_ms = self.now_ms();
        let (id, watch) = {
            let mut open = self.lock();
            let open = open.as_mut().ok_or(PeerError::Gone)?;
            if open.waiting.is_empty() {
                // No pulse was due until now.
                open.vitals.heard(now_ms);
            } else if open.vitals.is_silent(now_ms) {
                return Err(PeerError::Silent);
            }
            let id = open.next_id;
            open.next_id += 1;
            let waiting = Waiting {
                finished: finished_sender,
                cached: cached_sender,
            };
            open.waiting.insert(id, waiting);
            (id, Watch::new(&open.vitals, id, request.prompt.len(), now_ms))
        };
        request.id = id;
        let mut looks = tokio::time::interval(Duration::from_millis(LOOK_EVERY_MS));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let pending = Pending {
            link: self.clone(),
            id,
            finished,
            cached,
            watch,
            landed: 0,
            looks,
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
    cached: watch::Receiver<Option<u32>>,
    watch: Watch,
    /// Bytes landed at the last look.
    landed: u64,
    looks: tokio::time::Interval,
}

/// What a peer does about a request.
pub(crate) enum PendingEvent {
    /// It found so many prompt tokens in its prefix cache.
    Cached(u32),
    /// Its last word, or [`PeerError::Gone`] when the stream breaks first.
    Finished(Result<Finish, PeerError>),
    /// It is to be given up.
    Hangs(Hang),
}

impl Pending {
    /// The next event; `landed` tells how many bytes have come so far. Cancel-safe.
    pub(crate) async fn next(&mut self, landed: impl Fn() -> u64) -> PendingEvent {
        loop {
            tokio::select! {
                biased;
                finish = &mut self.finished => return PendingEvent::Finished(finish.map_err(|_| PeerError::Gone)),
                // An error only says that the stream has broken, which `finished` tells too.
                Ok(()) = self.cached.changed() => {
                    let cached = *self.cached.borrow_and_update();
                    if let Some(tokens) = cached {
                        return PendingEvent::Cached(tokens);
                    }
                }
                _ = self.looks.tick() => {
                    if let Some(hang) = self.look(landed()) {
                        return PendingEvent::Hangs(hang);
                    }
                }
            }
        }
    }

    /// All of it is here. The peer is not told to stop: its word that it is done may still be on its way, and a cancel that
    /// overtakes it would make a hand-over that succeeded end as cancelled there, uncounted.
    pub(crate) fn served(self) {
        if let Some(open) = self.link.lock().as_mut() {
            open.waiting.remove(&self.id);
        }
    }

    fn look(&mut self, landed: u64) -> Option<Hang> {
        let now_ms = self.link.now_ms();
        let mut open = self.link.lock();
        let vitals = &mut open.as_mut()?.vitals;
        vitals.look(now_ms);
        if std::mem::replace(&mut self.landed, landed) != landed {
            self.watch.got(vitals, now_ms);
        }
        self.watch.check(vitals, now_ms)
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
        let now_ms = link.now_ms();
        let mut open = link.lock();
        let Some(open) = open.as_mut() else { break };
        match message.kind {
            Some(from_worker::Kind::Pulse(pulse)) => open.vitals.pulse(pulse, now_ms),
            Some(from_worker::Kind::Step(step)) => {
                open.vitals.heard(now_ms);
                for delta in step.deltas {
                    if let Some(waiting) = open.waiting.get(&delta.id)
                        && delta.cached_tokens.is_some()
                    {
                        waiting.cached.send_replace(delta.cached_tokens);
                    }
                    let Some(finish) = delta.finish else { continue };
                    if let Some(waiting) = open.waiting.remove(&delta.id) {
                        let _ = waiting.finished.send(finish);
                    }
                }
            }
            Some(from_worker::Kind::Hello(_)) | None => break,
        }
    }
    // Dropping the senders tells every waiting fill.
    link.lock().take();
}

/// Whether a peer's last word means that the blocks and the first token are in the window.
pub(crate) fn is_prefilled(finish: &Finish) -> bool {
    finish.reason() == FinishReason::Prefilled
}
