//! One attached `Worker.Attach` stream to one life of one worker, multiplexing all requests that this coordinator has
//! there. When it breaks, every request on it ends as broken, so that it can go on elsewhere; the worker cancels them
//! on its side for the same reason. Connecting again is the cluster's business.
//!
//! A stream that stands while the worker hangs is what `baton_watchdog` is for: each request has a watch, the reader
//! looks at all of them ten times a second, and one that is given up ends as broken too. It is cancelled on the stream, so
//! that a worker which wakes up frees its blocks; its id stays in the table, without effect, until the worker has ended
//! it or the stream has. Ids are never used twice, so what comes late for an abandoned attempt finds an ended mailbox.

use crate::mailbox::{Delivery, End, Mailbox};
use baton_identity::{Identity, Role};
use baton_proto::worker::worker_client::WorkerClient;
use baton_proto::worker::{
    Cancel, FinishReason, FromWorker, Generate, Hello, Pulse, ReadAhead, SequenceDelta, ToWorker, from_worker,
    to_worker,
};
use baton_proto::{PROTOCOL_VERSION, limits};
use baton_watchdog::{LOOK_EVERY_MS, Vitals, Watch};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Endpoint;

/// Time to connect and to be greeted. On one network both take milliseconds; a worker that needs longer is not one to
/// send work to.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection is probed this often, and given up after as long again without an answer: a host that vanished
/// without a word is noticed by its missing heartbeats at about the same time.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Messages on their way to the worker. Every open request has at most two there (its start and its cancellation), and hints
/// take no more than half of it, so this cannot fill before the limit on open requests is reached.
const OUTBOUND_MAX: usize = 2 * (2 * limits::REQUESTS_PER_STREAM_MAX + 1);

/// Why a link could not be made or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("it was greeted by {found}, not by {expected}")]
    OtherWorker { found: String, expected: String },
    #[error("the worker is registered under epoch {found}, not {expected}")]
    OtherEpoch { found: u64, expected: u64 },
    #[error("the worker speaks protocol version {0}, this coordinator {PROTOCOL_VERSION}; run the same baton release")]
    Version(u32),
    #[error("the link is down")]
    Down,
    #[error("nothing is heard from the worker")]
    Silent,
    #[error("{} requests are open on the link", limits::REQUESTS_PER_STREAM_MAX)]
    Full,
}

/// Whom to connect to.
pub(crate) struct Target<'a> {
    pub(crate) worker_id: &'a str,
    pub(crate) epoch: u64,
    pub(crate) addr: &'a str,
}

/// The sending half; cheap to clone.
#[derive(Clone)]
pub(crate) struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    outbound: mpsc::Sender<ToWorker>,
    next_id: AtomicU64,
    open: Mutex<Open>,
    /// Where the watchdog's milliseconds begin.
    since: Instant,
    /// Cancelled once the worker drains: requests that can go on elsewhere shall.
    leaving: CancellationToken,
}

struct Open {
    down: bool,
    requests: HashMap<u64, Request>,
    vitals: Vitals,
}

struct Request {
    mailbox: Arc<Mailbox>,
    /// None once the attempt was given up.
    watch: Option<Watch>,
}

/// The receiving half: drive it until the link breaks.
pub(crate) struct LinkReader {
    shared: Arc<Shared>,
    inbound: Streaming<FromWorker>,
}

impl Link {
    /// Connects, greets, and checks that the answer is from this very life of this worker.
    pub(crate) async fn connect(
        target: &Target<'_>,
        identity: &Identity,
        caller: &str,
    ) -> Result<(Self, LinkReader), LinkError> {
        tokio::time::timeout(CONNECT_TIMEOUT, Self::attach(target, identity, caller))
            .await
            .unwrap_or_else(|_| Err(LinkError::Connect(format!("no greeting within {CONNECT_TIMEOUT:?}"))))
    }

    async fn attach(target: &Target<'_>, identity: &Identity, caller: &str) -> Result<(Self, LinkReader), LinkError> {
        let connect = |error: &dyn std::fmt::Display| LinkError::Connect(error.to_string());
        let channel = Endpoint::from_shared(format!("https://{}", target.addr))
            .and_then(|endpoint| endpoint.tls_config(identity.tonic_client(Role::Worker)))
            .map_err(|error| connect(&error))?
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(|error| connect(&error))?;
        let (outbound, queued) = mpsc::channel(OUTBOUND_MAX);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            caller: caller.to_owned(),
            kv_digest: Default::default(),
        };
        let hello = ToWorker {
            kind: Some(to_worker::Kind::Hello(hello)),
        };
        outbound.try_send(hello).map_err(|_| LinkError::Down)?;
        let mut client = WorkerClient::new(channel)
            .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
        let response = client.attach(ReceiverStream::new(queued)).await;
        let mut inbound = response.map_err(|status| connect(&status.message()))?.into_inner();
        let first = inbound.message().await.map_err(|status| connect(&status.message()))?;
        let Some(FromWorker {
            kind: Some(from_worker::Kind::Hello(reply)),
        }) = first
        else {
            return Err(LinkError::Connect("the first message was not a greeting".into()));
        };
        if reply.protocol_version != PROTOCOL_VERSION {
            return Err(LinkError::Version(reply.protocol_version));
        }
        if reply.worker_id != target.worker_id {
            return Err(LinkError::OtherWorker {
                found: reply.worker_id,
                expected: target.worker_id.to_owned(),
            });
        }
        if reply.epoch != target.epoch {
            return Err(LinkError::OtherEpoch {
                found: reply.epoch,
                expected: target.epoch,
            });
        }
        let shared = Arc::new(Shared {
            outbound,
            next_id: AtomicU64::new(1),
            open: Mutex::new(Open {
                down: false,
                requests: HashMap::new(),
                vitals: Vitals::new(reply.pulse_interval_ms, 0),
            }),
            since: Instant::now(),
            leaving: CancellationToken::new(),
        });
        let reader = LinkReader {
            shared: shared.clone(),
            inbound,
        };
        Ok((Self { shared }, reader))
    }

    /// Sends a request; its `id` is set here. Does not wait. Refuses where others on the link are waiting for a worker that
    /// is silent.
    pub(crate) fn submit(&self, mut generate: Generate) -> Result<Submission, LinkError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mailbox = Arc::new(Mailbox::new(
            generate.max_tokens,
            generate.sampling.as_ref().and_then(|sampling| sampling.top_logprobs),
        ));
        generate.id = id;
        {
            let mut open = self.shared.open();
            if open.down {
                return Err(LinkError::Down);
            }
            if open.requests.len() >= limits::REQUESTS_PER_STREAM_MAX {
                return Err(LinkError::Full);
            }
            let now_ms = self.shared.now_ms();
            if open.requests.is_empty() {
                // No pulse was due until now.
                open.vitals.heard(now_ms);
            } else if open.vitals.is_silent(now_ms) {
                return Err(LinkError::Silent);
            }
            let request = Request {
                mailbox: mailbox.clone(),
                watch: Some(Watch::new(&open.vitals, id, generate.prompt.len(), now_ms)),
            };
            open.requests.insert(id, request);
        }
        // From here on the guard takes the request back.
        let submission = Submission {
            shared: self.shared.clone(),
            id,
            mailbox,
            over: false,
        };
        let message = ToWorker {
            kind: Some(to_worker::Kind::Generate(generate)),
        };
        match self.shared.outbound.try_send(message) {
            Ok(()) => Ok(submission),
            Err(mpsc::error::TrySendError::Full(_)) => Err(LinkError::Full),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(LinkError::Down),
        }
    }

    /// Sends a hint, unless messages that matter may need the room. Answers whether it was sent.
    pub(crate) fn hint(&self, hint: ReadAhead) -> bool {
        let message = ToWorker {
            kind: Some(to_worker::Kind::ReadAhead(hint)),
        };
        self.shared.outbound.capacity() > OUTBOUND_MAX / 2 && self.shared.outbound.try_send(message).is_ok()
    }

    /// Ends every request as broken and takes no more.
    pub(crate) fn break_off(&self, reason: &str) {
        self.shared.break_off(reason);
    }

    /// Asks every request on the link to go on elsewhere if it can.
    pub(crate) fn leave(&self) {
        self.shared.leaving.cancel();
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn break_off(&self, reason: &str) {
        let requests = {
            let mut open = self.open();
            open.down = true;
            std::mem::take(&mut open.requests)
        };
        for request in requests.values() {
            request
                .mailbox
                .put(&[], Vec::new(), Some(End::Broken(reason.to_owned())));
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Gives up what the watchdog says hangs.
    fn look(&self) {
        let mut hanging = Vec::new();
        {
            let mut open = self.open();
            let (now_ms, open) = (self.now_ms(), &mut *open);
            open.vitals.look(now_ms);
            for (id, request) in &mut open.requests {
                let hang = request
                    .watch
                    .as_ref()
                    .and_then(|watch| watch.check(&open.vitals, now_ms));
                if let Some(hang) = hang {
                    request.watch = None;
                    hanging.push((*id, request.mailbox.clone(), hang));
                }
            }
        }
        for (id, mailbox, hang) in hanging {
            mailbox.put(&[], Vec::new(), Some(End::Broken(hang.to_string())));
            self.cancel(id);
        }
    }

    /// Asks the worker to stop a request.
    fn cancel(&self, id: u64) {
        let message = ToWorker {
            kind: Some(to_worker::Kind::Cancel(Cancel { id })),
        };
        // A queue without room is one that nothing leaves: the link is as good as broken, and breaking it cancels.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.outbound.try_send(message) {
            self.break_off("the worker takes no messages");
        }
    }

    fn pulse(&self, pulse: Pulse) {
        let now_ms = self.now_ms();
        self.open().vitals.pulse(pulse, now_ms);
    }

    fn deliver(&self, delta: SequenceDelta) {
        let mut guard = self.open();
        let (now_ms, open) = (self.now_ms(), &mut *guard);
        open.vitals.heard(now_ms);
        let mailbox = if delta.finish.is_some() {
            open.requests.remove(&delta.id).map(|request| request.mailbox)
        } else {
            open.requests.get_mut(&delta.id).map(|request| {
                if let Some(watch) = request.watch.as_mut().filter(|_| !delta.token_ids.is_empty()) {
                    watch.got(&open.vitals, now_ms);
                }
                request.mailbox.clone()
            })
        };
        drop(guard);
        if let Some(mailbox) = mailbox {
            if let Some(cached_tokens) = delta.cached_tokens {
                mailbox.tell_cached(cached_tokens);
            }
            let end = delta.finish.map(|finish| match finish.reason() {
                FinishReason::Unspecified | FinishReason::Prefilled => {
                    End::Broken(format!("the worker ended a request as {:?}", finish.reason()))
                }
                _ => End::Finished(finish),
            });
            mailbox.put(&delta.token_ids, delta.logprobs, end);
        }
    }
}

impl LinkReader {
    /// Hands out what the worker sends, until the stream ends. Returns why. Dropping the future ends the link too.
    pub(crate) async fn run(mut self) -> String {
        let mut looks = tokio::time::interval(Duration::from_millis(LOOK_EVERY_MS));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                biased;
                message = self.inbound.message() => message,
                _ = looks.tick() => {
                    self.shared.look();
                    continue;
                }
            };
            match message {
                Ok(Some(message)) => match message.kind {
                    Some(from_worker::Kind::Step(step)) => {
                        for delta in step.deltas {
                            self.shared.deliver(delta);
                        }
                    }
                    Some(from_worker::Kind::Pulse(pulse)) => self.shared.pulse(pulse),
                    Some(from_worker::Kind::Hello(_)) => return "the worker greeted twice".into(),
                    None => tracing::debug!("a message of a kind this version does not know"),
                },
                Ok(None) => return "the worker closed the stream".into(),
                Err(status) => return status.message().to_owned(),
            }
        }
    }
}

impl Drop for LinkReader {
    fn drop(&mut self) {
        self.shared.break_off("the link to the worker broke");
    }
}

/// A request on a link. Dropping it before its end cancels it on the worker at once.
pub(crate) struct Submission {
    shared: Arc<Shared>,
    id: u64,
    mailbox: Arc<Mailbox>,
    over: bool,
}

impl Submission {
    /// What has come since the last call; waits if nothing has. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Delivery {
        let delivery = self.mailbox.take().await;
        self.over |= delivery.end.is_some();
        delivery
    }

    /// Asks the worker to stop. The end still comes through [`next`](Self::next).
    pub(crate) fn cancel(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            self.shared.cancel(self.id);
        }
    }

    /// Cancelled once the worker drains.
    pub(crate) fn leaving(&self) -> CancellationToken {
        self.shared.leaving.clone()
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        // The id stays in the table until the worker has ended it too: that is what the limit on open requests counts.
        self.cancel();
    }
}
