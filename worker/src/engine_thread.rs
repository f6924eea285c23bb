//! The engine thread seen from outside: commands in, a shared summary out.
//!
//! The thread itself is [`crate::engine_loop`]. Everything here is cheap and never waits for a step, except for room
//! in the command queue, which is the back-pressure on callers that submit faster than the engine takes.

use crate::WorkerError;
use crate::caller::{CallerId, OutboundSender};
use crate::engine_loop::EngineLoop;
use crate::fill::{FillContext, FillEnd};
use crate::push::LayerPush;
use crate::tiers::{OpenTiers, WorkerTiers};
use baton_engine::{Engine, Scheduler, SchedulerConfig};
use baton_proto::cluster::Heartbeat;
use baton_proto::worker::{Finish, Generate, Prefill, PrefillDone};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Commands waiting for the engine. It takes them all between two steps; this many arrive in one step only under
/// overload, and then the streams wait.
const COMMANDS_MAX: usize = 1024;

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
    },
    Prefill(Box<PrefillCommand>),
    Cancel {
        ticket: Ticket,
    },
    /// The fill's window is closed.
    FillEnded {
        ticket: Ticket,
        end: FillEnd,
    },
    /// A tier has read or written something.
    Tier(Box<baton_tiers::Done<baton_tiers::Block>>),
    /// A load may have to end.
    TierDeadline,
    /// The push is gone; nothing reads the sequence's blocks any more.
    PushEnded {
        ticket: Ticket,
        finish: Finish,
    },
    Stop,
}

pub(crate) struct PrefillCommand {
    pub(crate) ticket: Ticket,
    pub(crate) caller: CallerId,
    pub(crate) request: Prefill,
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
}

#[derive(Default)]
struct Pushes {
    count: u64,
    bytes: u64,
    overlap_sum: f64,
}

impl Shared {
    pub(crate) fn ended(&self, ticket: Ticket) {
        lock(&self.live).remove(&ticket);
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

    /// Counts a finished push; `overlap` is the share of its time that lay behind compute.
    pub(crate) fn pushed(&self, bytes: u64, overlap: f64) {
        let mut pushes = lock(&self.shared.pushes);
        pushes.count += 1;
        pushes.bytes += bytes;
        pushes.overlap_sum += overlap;
    }

    /// Load as of the last step.
    pub(crate) fn heartbeat(&self) -> Heartbeat {
        let pushes = lock(&self.shared.pushes);
        Heartbeat {
            transferred_bytes_total: pushes.bytes,
            push_overlap: if pushes.count == 0 {
                0.0
            } else {
                (pushes.overlap_sum / pushes.count as f64) as f32
            },
            ..*lock(&self.shared.heartbeat)
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
