//! The gRPC service `Worker.Attach`: greets, checks every message, and turns it into a command for the engine.
//!
//! One task per stream. It owns the stream's open ids; when the stream ends, for whatever reason, everything still
//! open on it is cancelled. A message that breaks the contract ends the stream with a status that says how; a request
//! that merely cannot be served is answered with a `Finish` of reason ERROR. While requests are open a pulse leaves four
//! times a second, from here and not from the engine's thread, so that callers can tell a busy engine from a dead process.

use crate::caller::{OUTBOUND_MESSAGES_MAX, OutboundSender};
use crate::compression::Rows;
use crate::engine_thread::{Command, EngineHandle, PrefillCommand, Ticket};
use crate::grammars::Grammars;
use crate::push::{CallersBlocks, Compressed, LayerPush, hand_over};
use crate::server::Advertised;
use baton_identity::{Role, require_role};
use baton_kvtransfer::{Agent, Region};
use baton_model::KvGeometry;
use baton_proto::worker::worker_server::Worker;
use baton_proto::worker::{
    FromWorker, Generate, Grammar, HelloReply, KvCompression, Prefill, ReadAhead, Sampling, ToWorker, from_worker,
    to_worker,
};
use baton_proto::{PROTOCOL_VERSION, limits};
use baton_watchdog::PULSE_INTERVAL_MS;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

/// Time a caller has to greet after opening a stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// What tonic serves: a handle to the shared state of all streams.
pub(crate) struct AttachService(pub(crate) Arc<Service>);

pub(crate) struct Service {
    pub(crate) engine: EngineHandle,
    pub(crate) agent: Agent,
    pub(crate) region: Arc<Region>,
    pub(crate) advertised: Arc<Advertised>,
    pub(crate) grammars: Arc<Grammars>,
}

/// What is open on one stream.
#[derive(Default)]
struct Open {
    /// The tickets of ids submitted here; pruned by asking which still live.
    tickets: Mutex<HashMap<u64, Ticket>>,
    /// The largest id.
    taken: AtomicU64,
}

impl Open {
    fn tickets(&self) -> MutexGuard<'_, HashMap<u64, Ticket>> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Worker for AttachService {
    type AttachStream = ReceiverStream<Result<FromWorker, Status>>;

    async fn attach(&self, request: Request<Streaming<ToWorker>>) -> Result<Response<Self::AttachStream>, Status> {
        let role = require_role(&request, &[Role::Coordinator, Role::Worker])?;
        let inbound = request.into_inner();
        let (outbound, replies) = mpsc::channel(OUTBOUND_MESSAGES_MAX);
        let service = self.0.clone();
        tokio::spawn(async move {
            if let Err(status) = service.serve(inbound, &outbound, role).await {
                tracing::warn!(status = %status.message(), "a caller broke the contract");
                let _ = outbound.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

impl Service {
    // tonic's Status is large, and it is what a stream ends with.
    #[allow(clippy::result_large_err)]
    async fn serve(
        &self,
        mut inbound: Streaming<ToWorker>,
        outbound: &OutboundSender,
        role: Role,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello within 5 s"))??;
        let Some(ToWorker {
            kind: Some(to_worker::Kind::Hello(hello)),
        }) = first
        else {
            return Err(Status::invalid_argument("the first message must be a Hello"));
        };
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "the caller speaks protocol version {}, this worker {PROTOCOL_VERSION}; run the same baton release",
                hello.protocol_version
            )));
        }
        if role == Role::Worker && hello.kv_digest != self.advertised.kv_digest[..] {
            return Err(Status::failed_precondition(
                "the caller runs another model or KV geometry; both workers must load the same model and settings",
            ));
        }
        let reply = HelloReply {
            protocol_version: PROTOCOL_VERSION,
            worker_id: self.advertised.worker_id.clone(),
            epoch: self.advertised.epoch(),
            kv_digest: self.advertised.kv_digest.to_vec().into(),
            transfer_addr: self.advertised.transfer_addr.to_string(),
            pulse_interval_ms: PULSE_INTERVAL_MS,
        };
        let _ = outbound
            .send(Ok(FromWorker {
                kind: Some(from_worker::Kind::Hello(reply)),
            }))
            .await;
        let caller = self.engine.attach(outbound.clone()).await;
        tracing::debug!(caller, name = %hello.caller, "attached");
        let open = Open::default();
        let result = tokio::select! {
            result = self.requests(inbound, outbound, caller, role, &open) => result,
            never = self.pulses(outbound, &open) => never,
        };
        self.engine.send(Command::CallerGone { caller }).await;
        tracing::debug!(caller, name = %hello.caller, "detached");
        result
    }

    /// Signs of life while something is open. Beside the requests, which may have to wait for room in the engine's queue.
    #[allow(clippy::result_large_err)]
    async fn pulses(&self, outbound: &OutboundSender, open: &Open) -> Result<(), Status> {
        let mut due = tokio::time::interval(Duration::from_millis(PULSE_INTERVAL_MS.into()));
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            due.tick().await;
            let waited_for = {
                let mut tickets = open.tickets();
                self.engine.retain_live(&mut tickets);
                !tickets.is_empty()
            };
            if waited_for {
                let pulse = self.engine.pulse(open.taken.load(Ordering::Relaxed));
                // Without room there are messages on their way, which are as good.
                let _ = outbound.try_send(Ok(FromWorker {
                    kind: Some(from_worker::Kind::Pulse(pulse)),
                }));
            }
        }
    }

    #[allow(clippy::result_large_err)]
    async fn requests(
        &self,
        mut inbound: Streaming<ToWorker>,
        outbound: &OutboundSender,
        caller: u64,
        role: Role,
        open: &Open,
    ) -> Result<(), Status> {
        loop {
            let message = tokio::select! {
                // A caller that died without a word, seen on the way out.
                () = outbound.closed() => return Ok(()),
                message = inbound.message() => message,
            };
            // A reset stream is how a killed caller ends: not a breach.
            let Ok(Some(message)) = message else { return Ok(()) };
            match message.kind {
                Some(to_worker::Kind::Cancel(cancel)) => {
                    let ticket = open.tickets().remove(&cancel.id);
                    if let Some(ticket) = ticket {
                        self.engine.send(Command::Cancel { ticket }).await;
                    }
                }
                Some(to_worker::Kind::Generate(request)) => {
                    let ticket = self.admit_id(open, request.id)?;
                    self.generate(request, ticket, caller, role).await?;
                }
                Some(to_worker::Kind::Prefill(request)) => {
                    let ticket = self.admit_id(open, request.id)?;
                    self.prefill(request, ticket, caller).await?;
                }
                Some(to_worker::Kind::ReadAhead(hint)) => self.read_ahead(hint, role)?,
                Some(to_worker::Kind::Hello(_)) => return Err(Status::invalid_argument("a second Hello")),
                None => tracing::debug!("a message of a kind this version does not know"),
            }
        }
    }

    #[allow(clippy::result_large_err)]
    fn admit_id(&self, open: &Open, id: u64) -> Result<Ticket, Status> {
        let mut tickets = open.tickets();
        if tickets.len() >= limits::REQUESTS_PER_STREAM_MAX {
            self.engine.retain_live(&mut tickets);
            if tickets.len() >= limits::REQUESTS_PER_STREAM_MAX {
                return Err(Status::resource_exhausted(format!(
                    "more than {} requests open on one stream",
                    limits::REQUESTS_PER_STREAM_MAX
                )));
            }
        }
        if tickets.get(&id).is_some_and(|ticket| self.engine.is_live(*ticket)) {
            return Err(Status::already_exists(format!(
                "request id {id} is still open on this stream"
            )));
        }
        let ticket = self.engine.next_ticket();
        tickets.insert(id, ticket);
        open.taken.fetch_max(id, Ordering::Relaxed);
        Ok(ticket)
    }

    #[allow(clippy::result_large_err)]
    async fn generate(&self, request: Generate, ticket: Ticket, caller: u64, role: Role) -> Result<(), Status> {
        if role != Role::Coordinator {
            return Err(Status::permission_denied("only a coordinator submits Generate"));
        }
        check_prompt(&request.prompt)?;
        if request.stop_token_ids.len() > limits::STOP_TOKEN_IDS_MAX {
            return Err(Status::invalid_argument("too many stop token ids"));
        }
        let send = move |request, grammar| Command::Generate {
            ticket,
            caller,
            request: Box::new(request),
            grammar,
        };
        let Some(grammar) = grammar(&request.sampling) else {
            self.engine.send(send(request, None)).await;
            return Ok(());
        };
        let emitted = emitted(&request.prompt, request.emitted_tokens);
        let (engine, grammars) = (self.engine.clone(), self.grammars.clone());
        tokio::spawn(async move {
            let command = match grammars.matcher(grammar, emitted).await {
                Ok(matcher) => send(request, Some(matcher)),
                Err(refusal) => Command::Refuse {
                    ticket,
                    caller,
                    id: request.id,
                    refusal,
                },
            };
            engine.send(command).await;
        });
        Ok(())
    }

    /// A hint: dropped where the engine has better to do.
    #[allow(clippy::result_large_err)]
    fn read_ahead(&self, hint: ReadAhead, role: Role) -> Result<(), Status> {
        if role != Role::Coordinator {
            return Err(Status::permission_denied("only a coordinator sends hints"));
        }
        let (names, rest) = hint.names.as_chunks();
        if !rest.is_empty() || names.len() > limits::READ_AHEAD_BLOCKS_MAX {
            return Err(Status::invalid_argument(format!(
                "a hint of {} bytes; up to {} names of 16 bytes are taken",
                hint.names.len(),
                limits::READ_AHEAD_BLOCKS_MAX
            )));
        }
        self.engine.hint(Command::ReadAhead {
            parent: hint.parent,
            names: names.to_vec(),
        });
        Ok(())
    }

    #[allow(clippy::result_large_err)]
    async fn prefill(&self, request: Prefill, ticket: Ticket, caller: u64) -> Result<(), Status> {
        check_prompt(&request.prompt)?;
        let geometry = self.advertised.geometry;
        let (skip, block_size) = (request.cached_tokens as usize, request.block_size as usize);
        if !(1..=KvGeometry::DIM_MAX).contains(&block_size) {
            return Err(Status::invalid_argument(format!(
                "block_size is {block_size}: 1 to {} are taken",
                KvGeometry::DIM_MAX
            )));
        }
        if !skip.is_multiple_of(block_size) || skip >= request.prompt.len() {
            return Err(Status::invalid_argument(format!(
                "cached_tokens is {skip}: it must be a multiple of {block_size} below the prompt's length"
            )));
        }
        if request.blocks.len() != (request.prompt.len() - skip).div_ceil(block_size) {
            return Err(Status::invalid_argument(
                "the block list does not match the prompt's length",
            ));
        }
        let Ok(peer) = request.transfer_addr.parse::<SocketAddr>() else {
            return Err(Status::invalid_argument("transfer_addr is not an ip:port"));
        };
        let compressed = match request.kv_compression() {
            KvCompression::None => None,
            KvCompression::Int8 => {
                let rows = Rows::new(geometry, skip..request.prompt.len());
                let staging = rows.bytes().map(Region::new).and_then(Result::ok);
                let staging = staging.ok_or_else(|| Status::resource_exhausted("no memory to compress KV in"))?;
                Some(Compressed {
                    arena: self.region.clone(),
                    staging,
                    rows,
                })
            }
        };
        let source = compressed
            .as_ref()
            .map_or(&self.region, |compressed| &compressed.staging);
        // A push that cannot start fails on its own, and with it the request.
        let push = self.agent.push(peer, request.window, source.clone());
        let layers = LayerPush::new(
            push.writer(),
            geometry,
            CallersBlocks {
                blocks: request.blocks.clone(),
                block_size,
                skip_tokens: skip,
            },
            compressed,
        );
        let (sender, prefilled) = oneshot::channel();
        let cancelled = CancellationToken::new();
        let span = tracing::info_span!(
            "transfer",
            request_id = %request.request_id,
            traceparent = %request.traceparent,
            to = %peer
        );
        let pushing = hand_over(push, prefilled, cancelled.clone(), ticket, self.engine.clone());
        tokio::spawn(pushing.instrument(span));
        let mut command = PrefillCommand {
            ticket,
            caller,
            request,
            grammar: None,
            layers,
            prefilled: sender,
            cancelled,
        };
        let Some(grammar) = grammar(&command.request.sampling) else {
            self.engine.send(Command::Prefill(Box::new(command))).await;
            return Ok(());
        };
        let emitted = emitted(&command.request.prompt, command.request.emitted_tokens);
        let (engine, grammars) = (self.engine.clone(), self.grammars.clone());
        tokio::spawn(async move {
            let command = match grammars.matcher(grammar, emitted).await {
                Ok(matcher) => {
                    command.grammar = Some(matcher);
                    Command::Prefill(Box::new(command))
                }
                // Dropping the command ends the push.
                Err(refusal) => Command::Refuse {
                    ticket,
                    caller,
                    id: command.request.id,
                    refusal,
                },
            };
            engine.send(command).await;
        });
        Ok(())
    }
}

fn grammar(sampling: &Option<Sampling>) -> Option<Grammar> {
    sampling.as_ref()?.grammar.clone()
}

/// The last so many tokens of a prompt.
fn emitted(prompt: &[u32], count: u32) -> Vec<u32> {
    prompt[prompt.len().saturating_sub(count as usize)..].to_vec()
}

#[allow(clippy::result_large_err)]
fn check_prompt(prompt: &[u32]) -> Result<(), Status> {
    if prompt.is_empty() || prompt.len() > limits::PROMPT_TOKENS_MAX {
        return Err(Status::invalid_argument(format!(
            "a prompt of {} tokens; 1 to {} are taken",
            prompt.len(),
            limits::PROMPT_TOKENS_MAX
        )));
    }
    Ok(())
}
