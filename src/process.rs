//! What a serving process does besides serving: obey signals, end with its supervisor, and tell it how far it is.
//!
//! Under `baton up` a child ends with its parent however that dies: the kernel kills it (parent-death signal), and
//! where there is no such thing, the end of its stdin stops it. Its stdout is the supervisor's: [`Report`]s as JSON
//! lines. Its stderr is the log.

use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Time a child has for a clean stop after its supervisor has gone.
const ORPHAN_GRACE: Duration = Duration::from_secs(5);

/// What a child tells its supervisor, one JSON line each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// A worker makes its weights ready.
    Loading {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A worker takes requests.
    Listening,
    /// A coordinator has taken the worker in.
    Registered,
    /// A coordinator serves.
    Serving {
        /// Where the API is.
        http_addr: SocketAddr,
        /// Where workers register.
        cluster_addr: SocketAddr,
    },
    /// The process ends, and this is why.
    Failed {
        /// One sentence.
        message: String,
    },
}

/// Where reports go: to the supervisor, or to the log of a process that has none.
pub struct Reporter {
    supervised: bool,
    last_percent: Mutex<Option<u64>>,
}

impl Reporter {
    /// A reporter for this process.
    pub fn new(supervised: bool) -> Self {
        Self {
            supervised,
            last_percent: Mutex::new(None),
        }
    }

    /// Tells `report`. Loading is told once per percent.
    pub fn send(&self, report: &Report) {
        if let Report::Loading { done, total } = report {
            let percent = Some(done * 100 / (*total).max(1));
            let mut last = self
                .last_percent
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            if std::mem::replace(&mut *last, percent) == percent {
                return;
            }
        }
        if !self.supervised {
            if !matches!(report, Report::Loading { .. } | Report::Failed { .. }) {
                tracing::info!(?report, "started");
            }
            return;
        }
        if let Ok(mut line) = serde_json::to_vec(report) {
            line.push(b'\n');
            // A supervisor that has gone is noticed elsewhere.
            let mut stdout = std::io::stdout().lock();
            let _ = stdout.write_all(&line).and_then(|()| stdout.flush());
        }
    }
}

/// Binds this process to its supervisor's life. To be called first thing, from the main thread.
pub fn follow_supervisor(supervisor: u32) {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, getppid, set_parent_process_death_signal};
        // Refused only by a sandbox; then the end of stdin remains.
        let _ = set_parent_process_death_signal(Some(Signal::KILL));
        // It may have died before the line above.
        if getppid().is_none_or(|parent| parent.as_raw_nonzero().get().unsigned_abs() != supervisor) {
            std::process::exit(1);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = supervisor;
}

/// A token that is cancelled when the process should stop: SIGINT, SIGTERM, or (supervised) the end of stdin. A
/// second signal ends the process at once.
pub fn shutdown_token(supervised: bool) -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut stop = StopSignals::new()?;
    let cancel = token.clone();
    tokio::spawn(async move {
        stop.recv().await;
        cancel.cancel();
        stop.recv().await;
        std::process::exit(130);
    });
    if supervised {
        let cancel = token.clone();
        // A thread of its own: a read of stdin cannot be cancelled, and must not keep the runtime from ending.
        std::thread::Builder::new()
            .name("supervisor-watch".into())
            .spawn(move || {
                let mut sink = [0; 64];
                while matches!(std::io::stdin().lock().read(&mut sink), Ok(1..)) {}
                cancel.cancel();
                std::thread::sleep(ORPHAN_GRACE);
                std::process::exit(1);
            })?;
    }
    Ok(token)
}

/// The signals by which people, terminals and service managers end a process.
pub struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl StopSignals {
    /// Starts listening; from here on the signals do not end the process by themselves.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal. Cancel-safe.
    pub async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_one_json_line_each() {
        let report = Report::Serving {
            http_addr: SocketAddr::from(([127, 0, 0, 1], 8080)),
            cluster_addr: SocketAddr::from(([127, 0, 0, 1], 7070)),
        };
        let line = serde_json::to_string(&report).expect("serialisable");
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Report>(&line).expect("round trip"), report);
    }
}
