//! A running `baton up` in a directory of its own.

use super::http::get;
use super::{eventually, is_alive, signal};
use rustix::process::Signal;
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Clusters at once: each is three processes that compute, and test machines may have two cores.
const CLUSTERS_MAX: usize = 2;
/// Time to start: debug builds, busy machine.
const START_MAX: Duration = Duration::from_secs(120);
/// Time to stop: more than `up` itself allows before it kills.
const STOP_MAX: Duration = Duration::from_secs(60);

/// Time a heartbeat may take from the worker's counters to the coordinator, on a busy machine.
const HEARTBEAT_TRAVEL_MAX: Duration = Duration::from_millis(100);

/// The binary under test, without what the caller's environment may say to it.
pub fn baton() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("BATON_") || text.starts_with("OTEL_") || text == "RUST_LOG" {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// A running cluster. Dropped, it is killed, and its children die with it.
pub struct Cluster {
    /// Taken when a cluster is stopped but its state kept.
    directory: Option<tempfile::TempDir>,
    path: std::path::PathBuf,
    pub url: String,
    pub up: Child,
    _permit: SemaphorePermit<'static>,
}

impl Cluster {
    /// Starts `baton up` in a directory of its own and waits until it serves.
    pub async fn start(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self::start_in(directory, args).await
    }

    /// Starts it in a directory that an earlier cluster left (see [`stop_and_keep`](Self::stop_and_keep)).
    pub async fn start_in(directory: tempfile::TempDir, args: &[&str]) -> Self {
        Self::start_command("up", directory, args).await
    }

    /// Starts `baton mock` likewise.
    pub async fn start_mock(args: &[&str]) -> Self {
        Self::start_command("mock", tempfile::tempdir().expect("a temporary directory"), args).await
    }

    async fn start_command(command: &str, directory: tempfile::TempDir, args: &[&str]) -> Self {
        static CLUSTERS: OnceLock<Semaphore> = OnceLock::new();
        let clusters = CLUSTERS.get_or_init(|| Semaphore::new(CLUSTERS_MAX));
        let permit = clusters.acquire().await.expect("it is never closed");
        let file = |name: &str| std::fs::File::create(directory.path().join(name)).expect("writable");
        let up = baton()
            .args([command, "--port", "0", "--data-dir"])
            .arg(directory.path().join("data"))
            .args(args)
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .expect("the binary runs");
        let mut this = Self {
            path: directory.path().to_owned(),
            directory: Some(directory),
            url: String::new(),
            up,
            _permit: permit,
        };
        let ready = eventually("the cluster serves", START_MAX, || {
            let ended = this.up.try_wait().expect("it is our child");
            assert!(
                ended.is_none(),
                "{command} ended with {ended:?}: {}\n{}",
                this.output("stderr"),
                this.logs()
            );
            let ready = this.ready();
            async move { ready }
        })
        .await;
        this.url = ready["url"].as_str().expect("ready.json has a URL").to_owned();
        this
    }

    /// `ready.json`, if it is there.
    pub fn ready(&self) -> Option<Value> {
        let text = std::fs::read_to_string(self.data().join("ready.json")).ok()?;
        Some(serde_json::from_str(&text).expect("ready.json appears whole"))
    }

    pub fn data(&self) -> std::path::PathBuf {
        self.path.join("data")
    }

    /// What `up` printed so far on `stdout` or `stderr`.
    pub fn output(&self, stream: &str) -> String {
        std::fs::read_to_string(self.path.join(stream)).unwrap_or_default()
    }

    /// The ends of all logs, for messages.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(self.data().join("logs"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let log = read_lossy(&entry.path());
            let tail: Vec<&str> = log.lines().rev().take(15).collect();
            text += &format!("--- {}\n", entry.file_name().display());
            tail.iter().rev().for_each(|line| text += &format!("{line}\n"));
        }
        text
    }

    /// Process id of the process `name`, as `ready.json` has it.
    pub fn pid(&self, name: &str) -> u32 {
        let ready = self.ready().expect("the cluster serves");
        let processes = ["coordinators", "workers"]
            .map(|key| ready[key].as_array().cloned().unwrap_or_default())
            .concat();
        let process = processes
            .iter()
            .find(|p| p["name"] == name)
            .unwrap_or_else(|| panic!("no {name} in {ready}"));
        u32::try_from(process["pid"].as_u64().expect("a pid")).expect("a pid")
    }

    /// Process ids of everything, `up` first.
    pub fn pids(&self) -> Vec<u32> {
        let ready = self.ready().expect("the cluster serves");
        let mut pids = vec![self.up.id()];
        for key in ["coordinators", "workers"] {
            pids.extend(
                ready[key]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|p| p["pid"].as_u64())
                    .map(|pid| pid as u32),
            );
        }
        pids
    }

    /// The workers, as the coordinator sees them.
    pub async fn workers(&self) -> Vec<Value> {
        let json = get(&self.url, "/cluster/workers").await.json();
        json.as_array().cloned().unwrap_or_else(|| panic!("an array: {json}"))
    }

    /// Waits until every worker takes work: the API is ready as soon as one that streams does.
    pub async fn all_workers_ready(&self) {
        eventually("all workers are ready", Duration::from_secs(30), || async {
            let workers = self.workers().await;
            workers.iter().all(|worker| worker["state"] == "ready").then_some(())
        })
        .await;
    }

    /// Waits until no worker holds anything, and checks that every block is accounted for all the way there. Only
    /// heartbeats sent after the call count: an older one tells of an older state.
    pub async fn assert_nothing_leaked(&self) {
        let called = Instant::now();
        eventually("all workers are idle", Duration::from_secs(30), || async {
            let asked_after = called.elapsed();
            let workers = self.workers().await;
            let count = |worker: &Value, field: &str| worker[field].as_u64().expect("a count");
            let fresh =
                |w: &Value| Duration::from_millis(count(w, "heartbeat_age_ms")) + HEARTBEAT_TRAVEL_MAX < asked_after;
            for worker in workers.iter().filter(|w| fresh(w)) {
                let known = ["free_blocks", "held_blocks", "cached_blocks"].map(|field| count(worker, field));
                assert_eq!(known.iter().sum::<u64>(), count(worker, "total_blocks"), "{worker}");
            }
            let idle = |w: &Value| {
                ["running", "waiting", "transferring", "held_blocks"]
                    .iter()
                    .all(|f| w[*f] == 0)
            };
            workers.iter().all(|w| fresh(w) && idle(w)).then_some(())
        })
        .await;
    }

    /// Stops it and hands over its directory, for another start.
    pub async fn stop_and_keep(mut self) -> tempfile::TempDir {
        let directory = self.directory.take().expect("taken only here");
        assert!(self.stop().await.success());
        directory
    }

    /// Stops it as a user would, and checks that nothing is left.
    pub async fn stop(mut self) -> ExitStatus {
        let pids = self.pids();
        signal(self.up.id(), Signal::TERM);
        let status = eventually("up ends", STOP_MAX, || {
            let status = self.up.try_wait().expect("it is our child");
            async move { status }
        })
        .await;
        assert_all_gone(&pids).await;
        assert!(self.ready().is_none(), "ready.json is gone with the cluster");
        status
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}\n{}", self.output("stderr"), self.logs());
        }
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

/// Waits until none of the processes is alive.
pub async fn assert_all_gone(pids: &[u32]) {
    eventually("no process is left", Duration::from_secs(10), || async {
        pids.iter().all(|pid| !is_alive(*pid)).then_some(())
    })
    .await;
}
