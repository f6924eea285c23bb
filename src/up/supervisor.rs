//! Keeps the cluster's processes alive, and ends them in order. The state machine of one process:
//!
//! ```text
//!             spawn                 ready report
//! (new) ───────────────▶ Starting ───────────────▶ Up
//!                           │ ▲                     │
//!                    exited │ │ pause over          │ exited
//!                           ▼ │                     │
//!                         Paused ◀──────────────────┘      (restart policy: `restart.rs`)
//!                           │
//!                           └── too many fast deaths ──▶ GivenUp
//! Up ── exited without a complaint: it was drained, or told to stop ──▶ Left, and not started again
//! any ── stop() ──▶ told to stop, then killed ──▶ Stopped
//! ```
//!
//! Each life of a process has a number, so that the last words of a dead one are not taken for its successor's.

use super::child::{Child, ChildEvent, ChildSpec, Tagged};
use super::restart::{Restarts, Verdict};
use crate::process::Report;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

/// Events under way from children; a child that reports faster waits for the supervisor.
const EVENTS_MAX: usize = 256;
/// Time a coordinator has to answer or cut its requests and commit what they used: its own
/// limits allow ten seconds, and two more for the last spans.
const COORDINATOR_STOP: Duration = Duration::from_secs(15);
/// Time a worker has to say goodbye.
const WORKER_STOP: Duration = Duration::from_secs(4);
/// Time the kernel has to end a killed process.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// Index of a process.
pub type Slot = usize;

/// What the supervisor tells its owner.
#[derive(Debug)]
pub enum Event {
    /// A process reported.
    Report(Slot, Report),
    /// A process died; unless given up, it will be started again.
    Died {
        /// Which.
        slot: Slot,
        /// Why, one sentence.
        why: String,
        /// What happens now.
        verdict: Verdict,
    },
    /// A process was started again, under a new process id.
    Restarted,
    /// A process ended because somebody told it to (`baton drain`, a signal); it stays out.
    Left(Slot),
}

#[derive(Debug)]
enum State {
    Starting(Child),
    Up(Child),
    Paused { until: Instant },
    GivenUp,
    Left,
    Stopped,
}

#[derive(Debug)]
struct Process {
    spec: ChildSpec,
    state: State,
    life: u64,
    started: Instant,
    restarts: Restarts,
    /// What the current life gave as the reason of its end.
    reason: Option<String>,
}

impl Process {
    fn child(&self) -> Option<&Child> {
        match &self.state {
            State::Starting(child) | State::Up(child) => Some(child),
            State::Paused { .. } | State::GivenUp | State::Left | State::Stopped => None,
        }
    }
}

/// Which processes are told to stop together, and the time they have. A coordinator hands leadership over and ends its
/// requests before it goes; as long as a majority is left, it goes alone and the last goes first, so that clients of the
/// others, those of the first above all, notice nothing. The majority itself stops together: without it none could settle.
fn waves(coordinators: Vec<Slot>, workers: Vec<Slot>) -> Vec<(Vec<Slot>, Duration)> {
    let spare = coordinators.len().saturating_sub(1) / 2;
    let (majority, spare) = coordinators.split_at(coordinators.len() - spare);
    let alone = spare.iter().rev().map(|slot| (vec![*slot], COORDINATOR_STOP));
    alone
        .chain([(majority.to_vec(), COORDINATOR_STOP), (workers, WORKER_STOP)])
        .collect()
}

/// The processes of a cluster.
pub struct Supervisor {
    processes: Vec<Process>,
    events: mpsc::Receiver<Tagged>,
    sender: mpsc::Sender<Tagged>,
}

impl Supervisor {
    /// Nothing runs yet.
    pub fn new() -> Self {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        Self {
            processes: Vec::new(),
            events,
            sender,
        }
    }

    /// Starts a process that is to stay.
    pub fn start(&mut self, spec: ChildSpec) -> anyhow::Result<Slot> {
        let slot = self.processes.len();
        let child = Child::spawn(&spec, slot, 0, self.sender.clone())?;
        self.processes.push(Process {
            spec,
            state: State::Starting(child),
            life: 0,
            started: Instant::now(),
            restarts: Restarts::default(),
            reason: None,
        });
        Ok(slot)
    }

    /// Name and process id (0 while it does not run) of a process.
    pub fn describe(&self, slot: Slot) -> (&str, u32) {
        let process = &self.processes[slot];
        (&process.spec.name, process.child().map_or(0, |child| child.pid))
    }

    /// Whether the process has made its last report of a start: it serves, or is registered.
    pub fn is_up(&self, slot: Slot) -> bool {
        matches!(self.processes[slot].state, State::Up(_))
    }

    /// Whether the process will not run again: it was given up, or has left.
    pub fn is_out(&self, slot: Slot) -> bool {
        matches!(self.processes[slot].state, State::GivenUp | State::Left)
    }

    /// Waits for the next thing to happen, restarting what is due. Cancel-safe.
    pub async fn next(&mut self) -> Event {
        loop {
            let due = self.next_restart();
            let pause_over = async {
                match due {
                    Some((slot, at)) => {
                        sleep_until(at).await;
                        slot
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                slot = pause_over => return self.restart(slot),
                Some((slot, life, event)) = self.events.recv() => {
                    if let Some(event) = self.handle(slot, life, event) {
                        return event;
                    }
                }
            }
        }
    }

    fn next_restart(&self) -> Option<(Slot, Instant)> {
        let paused = self
            .processes
            .iter()
            .enumerate()
            .filter_map(|(slot, process)| match process.state {
                State::Paused { until } => Some((slot, until)),
                _ => None,
            });
        paused.min_by_key(|(_, until)| *until)
    }

    fn restart(&mut self, slot: Slot) -> Event {
        let process = &mut self.processes[slot];
        process.life += 1;
        process.started = Instant::now();
        process.reason = None;
        match Child::spawn(&process.spec, slot, process.life, self.sender.clone()) {
            Ok(child) => {
                process.state = State::Starting(child);
                Event::Restarted
            }
            Err(error) => self.died(slot, crate::sentence(&error)),
        }
    }

    fn handle(&mut self, slot: Slot, life: u64, event: ChildEvent) -> Option<Event> {
        let process = self.processes.get_mut(slot).filter(|process| process.life == life)?;
        match event {
            ChildEvent::Report(Report::Failed { message }) => {
                process.reason = Some(message);
                None
            }
            ChildEvent::Report(report) => {
                if matches!(report, Report::Serving { .. } | Report::Registered) {
                    process.state = match std::mem::replace(&mut process.state, State::Stopped) {
                        State::Starting(child) => State::Up(child),
                        other => other,
                    };
                }
                Some(Event::Report(slot, report))
            }
            ChildEvent::Exited { clean: true, .. } if matches!(process.state, State::Up(_)) => {
                process.state = State::Left;
                Some(Event::Left(slot))
            }
            ChildEvent::Exited { how, last_line, .. } => {
                let log = process.spec.log.display();
                let why = match (process.reason.take(), last_line.is_empty()) {
                    (Some(reason), _) => reason,
                    (None, true) => format!("it {how}; see {log}"),
                    (None, false) => format!("it {how}; its last words: {last_line}; see {log}"),
                };
                Some(self.died(slot, why))
            }
        }
    }

    fn died(&mut self, slot: Slot, why: String) -> Event {
        let process = &mut self.processes[slot];
        let verdict = process.restarts.died(process.started.elapsed());
        process.state = match verdict {
            Verdict::RestartAfter(pause) => State::Paused {
                until: Instant::now() + pause,
            },
            Verdict::GiveUp => State::GivenUp,
        };
        Event::Died { slot, why, verdict }
    }

    /// Stops everything, in [`waves`]: coordinators first, so that no client is promised what no worker will do, then workers.
    /// Each wave has its time, then it is killed; if `force` resolves, all are killed at once.
    pub async fn stop(mut self, force: impl Future<Output = ()>) {
        tokio::pin!(force);
        let mut forced = false;
        let of = |command: &str| {
            let slots = 0..self.processes.len();
            slots
                .filter(|slot| self.processes[*slot].spec.command == command)
                .collect()
        };
        for (slots, grace) in waves(of("coordinator"), of("worker")) {
            for &slot in &slots {
                match self.processes[slot].child() {
                    Some(child) if !forced => child.terminate(),
                    Some(_) => {}
                    None => self.processes[slot].state = State::Stopped,
                }
            }
            if !forced {
                tokio::select! {
                    () = self.all_stopped(&slots, Instant::now() + grace) => {}
                    () = &mut force => forced = true,
                }
            }
            for &slot in &slots {
                if let Some(child) = self.processes[slot].child() {
                    child.kill();
                }
            }
            self.all_stopped(&slots, Instant::now() + KILL_WAIT).await;
        }
    }

    async fn all_stopped(&mut self, slots: &[Slot], deadline: Instant) {
        while slots.iter().any(|slot| self.processes[*slot].child().is_some()) {
            match timeout_at(deadline, self.events.recv()).await {
                Ok(Some((slot, life, ChildEvent::Exited { .. }))) => {
                    if let Some(process) = self.processes.get_mut(slot).filter(|process| process.life == life) {
                        process.state = State::Stopped;
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_of_the_coordinators_is_left_until_all_the_others_have_stopped() {
        let of = |coordinators: usize| -> Vec<Vec<Slot>> {
            let waves = waves((0..coordinators).collect(), vec![8, 9]);
            waves.into_iter().map(|(slots, _)| slots).collect()
        };
        assert_eq!(of(1), [vec![0], vec![8, 9]]);
        assert_eq!(of(3), [vec![2], vec![0, 1], vec![8, 9]]);
        assert_eq!(of(5), [vec![4], vec![3], vec![0, 1, 2], vec![8, 9]]);
    }
}
