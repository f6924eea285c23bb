//! The worker's side of cluster membership: register through any one coordinator, then join all of them under the epoch
//! that gave; report load and block names to each; register anew when a coordinator says that the epoch is over.
//!
//! ```text
//!                 a session registers: epoch e             fenced by any, or nothing heard of any for long
//! Registering ────────────────────────────▶ Member(e) ────────────────────────────────────────────▶ Registering
//!     │  (one coordinator after the other)     │  one session per coordinator (`session.rs`), each on its own:
//!     │                                        │  connect ─▶ "I am e" ─▶ report … broken: again, under e
//!     └──Refused──▶ the process ends           └──Shutdown, or drained (`drain.rs`)──▶ goodbye to all, the process ends
//! ```
//!
//! Each registration gets a new epoch, which fences everything done under an older one. Requests keep running while streams
//! are down: membership says where new work goes, not whether old work lives. One reachable coordinator is enough.
//!
//! Whom to join is configured, until a coordinator of a group tells all members; the latest list counts, by how much of the
//! log its teller had applied. The configured addresses are where a worker begins again.

use crate::block_teller::BlockTeller;
use crate::drain::DrainOrders;
use crate::engine_thread::EngineHandle;
use crate::server::{Advertised, Startup};
use crate::session::{self, End, Heard, HeardSender};
use crate::{WorkerConfig, WorkerError};
use baton_identity::Identity;
use baton_proto::cluster::Coordinators;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// First pause between attempts; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between attempts: a returning coordinator sees its workers within this.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Coordinators that are joined at once, whatever a list says.
const COORDINATORS_MAX: usize = 16;
/// What sessions have said and nobody has looked at: a list, or how one ended, each.
const HEARD_MAX: usize = 32;
/// Time for all sessions to say goodbye.
const GOODBYE_MAX: Duration = Duration::from_secs(3);

/// What a member is and knows.
#[derive(Clone)]
pub(crate) struct Member {
    pub(crate) config: Arc<WorkerConfig>,
    pub(crate) identity: Identity,
    pub(crate) advertised: Arc<Advertised>,
    pub(crate) engine: EngineHandle,
    /// Takes orders to drain, each with its deadline.
    pub(crate) drain_orders: DrainOrders,
    /// Tells block names to every session.
    pub(crate) blocks: Arc<BlockTeller>,
}

/// How being a member under one epoch ended.
enum Over {
    /// This worker is to stop, and has said so.
    Stopped,
    /// The epoch is over.
    Fenced(String),
}

/// The coordinators as last told.
struct Known {
    addrs: Vec<String>,
    applied_index: u64,
}

impl Known {
    /// Takes a list in; whether it changed anything. A lone coordinator tells an empty one.
    fn learn(&mut self, told: &Coordinators) -> bool {
        if told.cluster_addrs.is_empty() || told.applied_index < self.applied_index {
            return false;
        }
        self.applied_index = told.applied_index;
        let mut addrs: Vec<String> = told.cluster_addrs.iter().take(COORDINATORS_MAX).cloned().collect();
        addrs.sort();
        addrs.dedup();
        let changed = addrs != self.addrs;
        self.addrs = addrs;
        changed
    }
}

/// Keeps this worker registered until `leave`, or until a coordinator refuses it or orders it to stop.
pub(crate) async fn run(
    member: &Member,
    startup: &(dyn Fn(Startup) + Send + Sync),
    leave: &CancellationToken,
) -> Result<(), WorkerError> {
    let seeds: Vec<String> = member
        .config
        .coordinator_addrs
        .iter()
        .map(ToString::to_string)
        .collect();
    if seeds.is_empty() {
        return Err(WorkerError::Config(
            "coordinator_addrs is empty; name at least one coordinator".into(),
        ));
    }
    let telling = CancellationToken::new();
    let _stop_telling = telling.clone().drop_guard();
    tokio::spawn({
        let blocks = member.blocks.clone();
        async move {
            tokio::select! {
                () = blocks.run() => {}
                () = telling.cancelled() => {}
            }
        }
    });
    let mut known = Known {
        addrs: seeds.clone(),
        applied_index: 0,
    };
    loop {
        // Seeds after what was told: after a move of the whole group only one of the two is right.
        let mut addrs = known.addrs.clone();
        addrs.extend(seeds.iter().filter(|seed| !known.addrs.contains(seed)).cloned());
        let Some((first, epoch)) = register(member, addrs, leave).await? else {
            return Ok(());
        };
        startup(Startup::Registered { epoch });
        match be_member(member, epoch, first, &mut known, leave).await? {
            Over::Stopped => return Ok(()),
            Over::Fenced(reason) => tracing::warn!(epoch, %reason, "registering anew"),
        }
    }
}

/// A session that runs, and what it says.
struct Sessions {
    heard_sender: HeardSender,
    heard: mpsc::Receiver<(String, Heard)>,
    /// By address; cancelling ends one without a goodbye.
    running: HashMap<String, CancellationToken>,
    tasks: JoinSet<()>,
}

impl Sessions {
    fn new() -> Self {
        let (heard_sender, heard) = mpsc::channel(HEARD_MAX);
        Self {
            heard_sender,
            heard,
            running: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Keeps a session with `addr` up under `epoch`; with 0 it registers, once.
    fn start(&mut self, member: &Member, addr: &str, epoch: u64, leave: &CancellationToken) {
        let stop = CancellationToken::new();
        self.running.insert(addr.to_owned(), stop.clone());
        let (member, addr, leave) = (member.clone(), addr.to_owned(), leave.clone());
        let heard = self.heard_sender.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = keep(&member, &addr, epoch, &leave, &heard) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Waits for all sessions, which are saying goodbye.
    async fn goodbye(mut self) {
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GOODBYE_MAX, all).await;
    }
}

/// Registers through one coordinator after the other. Returns the sessions, of which one runs, and the epoch; `None` if it is
/// to leave instead.
async fn register(
    member: &Member,
    addrs: Vec<String>,
    leave: &CancellationToken,
) -> Result<Option<(Sessions, u64)>, WorkerError> {
    let mut pause = PAUSE_MIN;
    loop {
        for addr in &addrs {
            let mut sessions = Sessions::new();
            sessions.start(member, addr, 0, leave);
            let reason = loop {
                let heard = tokio::select! {
                    () = leave.cancelled() => return Ok(None),
                    heard = sessions.heard.recv() => heard,
                };
                match heard {
                    Some((_, Heard::Registered { epoch, coordinators })) => {
                        let _ = sessions
                            .heard_sender
                            .try_send((addr.clone(), Heard::Coordinators(coordinators)));
                        return Ok(Some((sessions, epoch)));
                    }
                    Some((_, Heard::Ended(End::Refused(reason)))) => return Err(WorkerError::Refused(reason)),
                    Some((_, Heard::Ended(End::Stopped))) => return Ok(None),
                    Some((_, Heard::Ended(End::Fenced(reason) | End::Broken(reason)))) => break reason,
                    Some((_, Heard::Coordinators(_))) => {}
                    None => break "the session ended".to_owned(),
                }
            };
            tracing::warn!(coordinator = %addr, %reason, "not registered with the coordinator; trying again");
            tokio::select! {
                () = leave.cancelled() => return Ok(None),
                () = tokio::time::sleep(pause) => {}
            }
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Runs the sessions of one epoch until it is over.
async fn be_member(
    member: &Member,
    epoch: u64,
    mut sessions: Sessions,
    known: &mut Known,
    leave: &CancellationToken,
) -> Result<Over, WorkerError> {
    let mut changed = true;
    loop {
        if std::mem::take(&mut changed) {
            for addr in &known.addrs {
                if !sessions.running.contains_key(addr) {
                    sessions.start(member, addr, epoch, leave);
                }
            }
            // A seed may be an address that nobody listens at any more, or another name of a member.
            sessions.running.retain(|addr, stop| {
                let stays = known.addrs.contains(addr);
                if !stays {
                    stop.cancel();
                }
                stays
            });
        }
        let heard = tokio::select! {
            () = leave.cancelled() => {
                sessions.goodbye().await;
                return Ok(Over::Stopped);
            }
            heard = sessions.heard.recv() => heard,
        };
        match heard {
            Some((_, Heard::Coordinators(told))) => changed = known.learn(&told),
            Some((_, Heard::Registered { coordinators, .. })) => changed = known.learn(&coordinators),
            Some((_, Heard::Ended(End::Fenced(reason)))) => return Ok(Over::Fenced(reason)),
            Some((_, Heard::Ended(End::Refused(reason)))) => return Err(WorkerError::Refused(reason)),
            Some((_, Heard::Ended(End::Stopped))) => return Ok(Over::Stopped),
            // The one that registered does not come back by itself: under its epoch it does.
            Some((addr, Heard::Ended(End::Broken(_)))) => {
                if known.addrs.contains(&addr) {
                    sessions.start(member, &addr, epoch, leave);
                } else {
                    sessions.running.remove(&addr);
                }
            }
            // This end holds a sender.
            None => return Ok(Over::Stopped),
        }
    }
}

/// Keeps one session up: again and again under a known epoch, once if it is to register. What is heard goes to `heard`, the
/// end too, except that a session under a known epoch that breaks is only tried again.
async fn keep(member: &Member, addr: &str, epoch: u64, leave: &CancellationToken, heard: &HeardSender) {
    let mut pause = PAUSE_MIN;
    // Said once, until it has worked again.
    let mut quiet = false;
    loop {
        let mut joined = false;
        let end = session::run(member, addr, epoch, leave, heard, &mut joined).await;
        match end {
            End::Broken(reason) if epoch != 0 => {
                if joined || !quiet {
                    tracing::warn!(coordinator = %addr, epoch, %reason, "the coordinator does not hear this worker; trying again");
                }
                quiet = true;
                pause = if joined { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = leave.cancelled() => return,
                }
            }
            end => {
                let _ = heard.send((addr.to_owned(), Heard::Ended(end))).await;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(addrs: &[&str], applied_index: u64) -> Coordinators {
        Coordinators {
            cluster_addrs: addrs.iter().map(ToString::to_string).collect(),
            applied_index,
        }
    }

    #[test]
    fn the_list_of_whoever_has_applied_more_counts() {
        let mut known = Known {
            addrs: vec!["seed:1".into()],
            applied_index: 0,
        };
        assert!(!known.learn(&list(&[], 7)), "a lone coordinator knows of nobody");
        assert_eq!(known.addrs, ["seed:1"]);
        assert!(known.learn(&list(&["b:1", "a:1", "b:1"], 5)));
        assert_eq!(known.addrs, ["a:1", "b:1"]);
        assert!(!known.learn(&list(&["a:1"], 4)), "of a member that is behind");
        assert!(!known.learn(&list(&["a:1", "b:1"], 6)));
        assert!(known.learn(&list(&["a:1", "c:1"], 6)));
        let many: Vec<String> = (0..100).map(|i| format!("h{i}:1")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        known.learn(&list(&many, 7));
        assert_eq!(known.addrs.len(), COORDINATORS_MAX);
    }
}
