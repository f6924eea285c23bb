//! The engine thread seen from outside: commands in, a shared summary out.
//!
//! The thread itself is [`crate::engine_loop`]. Everything here is cheap and never waits for a step, except for room
//! in the command queue, which is the back-pressure on callers that submit faster than the engine takes.

use crate::WorkerError;
use crate::block_feed::BlockFeed;
use crate::caller::{CallerId, OutboundSender};
use crate::engine_loop::EngineLoop;
use crate::fill::{FillContext, FillEnd};
use crate::grammars::Refusal;
use crate::push::LayerPush;
use crate::rates::TransferRate;
use crate::tiers::{OpenTiers, WorkerTiers};
use baton_engine::{Engine, Scheduler, SchedulerConfig};
use baton_grammar::TokenMatcher;
use baton_kvtransfer::PushReport;
use baton_proto::block_hash::BlockHash;
use baton_proto::cluster::Heartbeat;
use baton_proto::worker::{Finish, Generate, Prefill, PrefillDone, Pulse};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Commands waiting for the engine. It takes them all between two steps; this many arrive in one step only under
/// overload, and then the streams wait.
const COMMANDS_MAX: usize = 1024;

/// How often a draining worker looks whether anything is left.
const AT_REST_LOOK: Duration = Duration::from_millis(20);

/// Names a request within this process, whatever stream it came on.
pub(crate) type Ticket = u64;

/// What the async side asks of the engine thread.
pub(crate) enum Command {
    Attach {
        caller: CallerId,
        sender: OutboundSender,
    },
    CallerGone {
        caller: CallerId,
    },
    Generate {
        ticket: Ticket,
        caller: CallerId,
        request: Box<Generate>,
        /// Of the request's grammar, after the tokens emitted so far.
        grammar: Option<Box<TokenMatcher>>,
    },
    /// A request that never becomes a sequence.
    Refuse {
        ticket: Ticket,
        caller: CallerId,
        id: u64,
        refusal: Refusal,
    },
    Prefill(Box<PrefillCommand>),
    Cancel {
        ticket: Ticket,
    },
    /// The prefill worker found so many prompt tokens in its prefix cache.
    FillCached {
        ticket: Ticket,
        cached_tokens: u32,
    },
    /// The fill's window is closed.
    FillEnded {
        ticket: Ticket,
        end: FillEnd,
    },
    /// A tier has read or written something.
    Tier(Box<baton_tiers::Done<baton_tiers::Block>>),
    /// A router's hint: these blocks, in order, after a block of that short name, will be asked for.
    ReadAhead {
        parent: u64,
        names: Vec<BlockHash>,
    },
    /// A load may have to end.
    TierDeadline,
    /// The push is gone; nothing reads the sequence's blocks any more.
    PushEnded {
        ticket: Ticket,
        finish: Finish,
    },
    /// Tell the content of the prefix cache anew.
    TellBlocks,
    Stop,
}

pub(crate) struct PrefillCommand {
    pub(crate) ticket: Ticket,
    pub(crate) caller: CallerId,
    pub(crate) request: Prefill,
    /// As of [`Command::Generate`].
    pub(crate) grammar: Option<Box<TokenMatcher>>,
    pub(crate) layers: LayerPush,
    /// Takes the first token; dropped when there will be none.
    pub(crate) prefilled: oneshot::Sender<PrefillDone>,
    /// Ends the push early.
    pub(crate) cancelled: CancellationToken,
}

/// What both sides may look at.
#[derive(Default)]
pub(crate) struct Shared {
    next: AtomicU64,
    /// Tickets whose caller has not been told the end.
    live: Mutex<HashSet<Ticket>>,
    heartbeat: Mutex<Heartbeat>,
    pushes: Mutex<Pushes>,
    steps: Mutex<Steps>,
    /// Nothing new is taken any more.
    draining: watch::Sender<bool>,
    /// What happens to the prefix cache, for the coordinator.
    pub(crate) blocks: BlockFeed,
}

#[derive(Clone, Copy, Default)]
struct Steps {
    total: u64,
    /// The longest recent one.
    max: Duration,
}

#[derive(Default)]
struct Pushes {
    count: u64,
    bytes: u64,
    overlap_sum: f64,
    rate: TransferRate,
}

impl Shared {
    pub(crate) fn ended(&self, ticket: Ticket) {
        lock(&self.live).remove(&ticket);
    }

    /// A step ended. A long one is forgotten by and by: after 22 shorter ones half of it is left.
    pub(crate) fn stepped(&self, took: Duration) {
        let mut steps = lock(&self.steps);
        steps.total += 1;
        steps.max = took.max(steps.max * 31 / 32);
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    pub(crate) fn publish(&self, heartbeat: Heartbeat) {
        *lock(&self.heartbeat) = heartbeat;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A handle to the engine thread; clones are cheap.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Queues a command. If the thread is gone the process is about to end, and nobody waits for an answer.
    pub(crate) async fn send(&self, command: Command) {
        let _ = self.commands.send(command).await;
    }

    /// Queues a command that may as well be lost: only while there is plenty of room.
    pub(crate) fn hint(&self, command: Command) {
        if self.commands.capacity() > COMMANDS_MAX / 2 {
            let _ = self.commands.try_send(command);
        }
    }

    /// Announces a stream.
    pub(crate) async fn attach(&self, sender: OutboundSender) -> CallerId {
        let caller = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.send(Command::Attach { caller, sender }).await;
        caller
    }

    /// A new live ticket.
    pub(crate) fn next_ticket(&self) -> Ticket {
        let ticket = self.shared.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.live).insert(ticket);
        ticket
    }

    pub(crate) fn is_live(&self, ticket: Ticket) -> bool {
        lock(&self.shared.live).contains(&ticket)
    }

    /// Forgets tickets that have ended.
    pub(crate) fn retain_live(&self, tickets: &mut HashMap<u64, Ticket>) {
        let live = lock(&self.shared.live);
        tickets.retain(|_, ticket| live.contains(ticket));
    }

    /// Counts a finished push.
    pub(crate) fn pushed(&self, report: &PushReport) {
        let mut pushes = lock(&self.shared.pushes);
        pushes.count += 1;
        pushes.bytes += report.bytes;
        pushes.overlap_sum += report.overlap;
        pushes.rate.observe(report);
    }

    /// What happens to the prefix cache.
    pub(crate) fn blocks(&self) -> &BlockFeed {
        &self.shared.blocks
    }

    /// Load as of the last step.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let pushes = lock(&self.shared.pushes);
        Heartbeat {
            transferred_bytes_total: pushes.bytes,
            transfer_bytes_per_s: pushes.rate.bytes_per_s(Instant::now()),
            push_overlap: if pushes.count == 0 {
                0.0
            } else {
                (pushes.overlap_sum / pushes.count as f64) as f32
            },
            draining: self.shared.is_draining(),
            ..*lock(&self.shared.heartbeat)
        }
    }

    /// A sign of life for a caller with open requests, of which `taken` is the largest id.
    pub(crate) fn pulse(&self, taken: u64) -> Pulse {
        let steps = *lock(&self.shared.steps);
        let load = *lock(&self.shared.heartbeat);
        Pulse {
            steps_total: steps.total,
            step_us_max: u32::try_from(steps.max.as_micros()).unwrap_or(u32::MAX),
            taken,
            transferring: load.transferring,
            pending_prompt_tokens: load.pending_prompt_tokens,
            prefill_tokens_per_s: load.prefill_tokens_per_s,
        }
    }

    /// Takes nothing new from now on: every further request is refused as one that may go elsewhere.
    pub(crate) fn drain(&self) {
        self.shared.draining.send_replace(true);
    }

    /// Resolves once the worker drains.
    pub(crate) async fn drains(&self) {
        // The sender lives as long as this handle.
        let _ = self.shared.draining.subscribe().wait_for(|draining| *draining).await;
    }

    /// Resolves once no caller waits for anything and no transfer is under way.
    pub(crate) async fn at_rest(&self) {
        loop {
            let live = lock(&self.shared.live).len();
            let load = *lock(&self.shared.heartbeat);
            if live == 0 && load.running + load.waiting + load.transferring == 0 {
                return;
            }
            tokio::time::sleep(AT_REST_LOOK).await;
        }
    }

    /// Asks the thread to end after the step it is in.
    pub(crate) async fn stop(&self) {
        self.send(Command::Stop).await;
    }
}

/// Tells when the engine thread has ended by itself.
pub(crate) struct EngineThread {
    ended: oneshot::Receiver<String>,
}

impl EngineThread {
    /// Resolves when the thread can go on no longer, with the reason. Pending as long as it runs.
    pub(crate) async fn failed(self) -> String {
        self.ended
            .await
            .unwrap_or_else(|_| "the engine thread panicked; see the log".into())
    }
}

/// Starts the engine thread. Must be called within a tokio runtime, on which fills run.
pub(crate) fn spawn(
    engine: Box<dyn Engine>,
    config: SchedulerConfig,
    fills: FillContext,
    tiers: Option<OpenTiers>,
) -> Result<(EngineHandle, EngineThread), WorkerError> {
    let mut scheduler = Scheduler::new(config).map_err(|error| WorkerError::Engine(error.to_string()))?;
    let (commands, queued) = mpsc::channel(COMMANDS_MAX);
    let shared = Arc::new(Shared {
        next: AtomicU64::new(1),
        blocks: BlockFeed::new(
            scheduler.config().total_blocks as usize + tiers.as_ref().map_or(0, OpenTiers::blocks_told_max),
        ),
        ..Shared::default()
    });
    let handle = EngineHandle {
        commands,
        shared: shared.clone(),
    };
    let (ended_sender, ended) = oneshot::channel();
    let tiers = tiers.map(|open| {
        scheduler.enable_tiers();
        WorkerTiers::new(open, fills.region.clone(), fills.geometry, handle.clone())
    });
    let engine_loop = EngineLoop::new(
        engine,
        scheduler,
        queued,
        handle.clone(),
        shared,
        Arc::new(fills),
        tiers,
    );
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            if let Err(reason) = engine_loop.run() {
                let _ = ended_sender.send(reason);
            } else {
                // Ordered to stop: whoever ordered it is not waiting for a failure.
                std::mem::forget(ended_sender);
            }
        })
        .map_err(|error| WorkerError::Engine(format!("cannot start the engine thread: {error}")))?;
    Ok((handle, EngineThread { ended }))
}
