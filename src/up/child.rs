//! One child process: spawned in its own process group with pipes to all three ends, watched by one task that turns
//! its words and its death into events.

use super::log_file::LogFile;
use crate::process::Report;
use anyhow::Context;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdout, Command};
use tokio::sync::mpsc;

/// Time to read what a dead child left in its pipes. They are at their end by then, unless somebody inherited them.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Orders under way to a child's task: terminate and kill is all there is.
const ORDERS_MAX: usize = 4;
/// Longest report line that is read. A child is this same program, and its longest line is a sentence.
const REPORT_BYTES_MAX: u64 = 64 << 10;

/// How to start a child.
#[derive(Debug, Clone)]
pub struct ChildSpec {
    /// Name of the process: of its certificate, its configuration and its log.
    pub name: String,
    /// The subcommand: `coordinator` or `worker`.
    pub command: &'static str,
    /// Its configuration.
    pub config: PathBuf,
    /// Its log.
    pub log: PathBuf,
}

/// What a child said or did.
#[derive(Debug)]
pub enum ChildEvent {
    /// A report from its stdout.
    Report(Report),
    /// It is dead, and this is how.
    Exited {
        /// For people: exit code or signal.
        how: String,
        /// It ended by itself and without a complaint, as a worker does that was drained.
        clean: bool,
        /// Last line of its log.
        last_line: String,
    },
}

/// An event with its origin: the slot, and which life of it.
pub type Tagged = (usize, u64, ChildEvent);

/// A running child. Dropping it kills the process.
#[derive(Debug)]
pub struct Child {
    /// Process id.
    pub pid: u32,
    orders: mpsc::Sender<Order>,
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Terminate,
    Kill,
}

impl Child {
    /// Starts the process and the task that watches it.
    pub fn spawn(spec: &ChildSpec, slot: usize, life: u64, events: mpsc::Sender<Tagged>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file to start its processes")?;
        let mut child = Command::new(&program)
            .arg(spec.command)
            .arg("--config")
            .arg(&spec.config)
            .arg("--supervisor")
            .arg(std::process::id().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C in the terminal is for the supervisor, which stops its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", spec.name))?;
        let (orders, mut ordered) = mpsc::channel(ORDERS_MAX);
        let pid = child.id().context("the process ended while it was started")?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let log = LogFile::open(&spec.log);
        tokio::spawn(async move {
            // Closes with this task; the child takes that as the end of its supervisor.
            let _stdin = stdin;
            let reports = tokio::spawn(read_reports(stdout, slot, life, events.clone()));
            let log = tokio::spawn(copy_log(stderr, log));
            let status = loop {
                tokio::select! {
                    status = child.wait() => break status,
                    order = ordered.recv() => match order {
                        Some(Order::Terminate) => terminate(child.id()),
                        // Already dead is as good.
                        Some(Order::Kill) => drop(child.start_kill()),
                        None => {
                            drop(child.start_kill());
                            break child.wait().await;
                        }
                    },
                }
            };
            let _ = tokio::time::timeout(LAST_WORDS, reports).await;
            // A process that was killed had no time for words about it.
            let killed = status.as_ref().is_ok_and(|status| status.code().is_none());
            let last_line = match tokio::time::timeout(LAST_WORDS, log).await {
                Ok(Ok(line)) if !killed => line,
                _ => String::new(),
            };
            let clean = status.as_ref().is_ok_and(ExitStatus::success);
            let how = status.map_or_else(|error| format!("is gone ({error})"), describe);
            // Nobody listens once the supervisor is gone.
            let _ = events
                .send((slot, life, ChildEvent::Exited { how, clean, last_line }))
                .await;
        });
        Ok(Self { pid, orders })
    }

    /// Asks the process to stop.
    pub fn terminate(&self) {
        // Full or closed: it has been told, or is dead.
        let _ = self.orders.try_send(Order::Terminate);
    }

    /// Ends the process.
    pub fn kill(&self) {
        let _ = self.orders.try_send(Order::Kill);
    }
}

/// `pid` is `None` once the process has been waited for, so the number cannot have passed to another.
fn terminate(pid: Option<u32>) {
    let pid = pid
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

async fn read_reports(stdout: Option<ChildStdout>, slot: usize, life: u64, events: mpsc::Sender<Tagged>) {
    let Some(stdout) = stdout else { return };
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(REPORT_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(1..) => {}
            _ => return,
        }
        // What is no report was printed by a library, and is nobody's concern.
        if let Ok(report) = serde_json::from_slice(&line)
            && events.send((slot, life, ChildEvent::Report(report))).await.is_err()
        {
            return;
        }
    }
}

async fn copy_log(stderr: Option<ChildStderr>, mut log: LogFile) -> String {
    let Some(mut stderr) = stderr else {
        return String::new();
    };
    let mut buffer = vec![0; 8 << 10];
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        log.append(&buffer[..count]);
    }
    log.last_line()
}
