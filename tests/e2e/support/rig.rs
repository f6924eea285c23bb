//! Coordinator and workers as processes of their own, without `baton up`, so that a test can stop, kill and cut off each of
//! them and decide when it comes back.
//!
//! Where the process runs in a network namespace in which it may do as it likes (see [`in_own_network`]), every worker gets
//! a namespace of its own, joined by a bridge. Taking its end of the bridge down drops all its packets, both ways, without
//! a word to anybody: what an unplugged cable does. Elsewhere all use loopback, and nothing can be cut.

use super::cluster::baton;
use super::eventually;
use super::http::get;
use baton_identity::{Authority, Role};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// Set in a process that has a network of its own.
const OWN_NETWORK: &str = "BATON_TEST_OWN_NETWORK";
/// Time for anything to start. Debug builds, busy machine.
const START_MAX: Duration = Duration::from_secs(60);
/// Time for a worker to be back after it was healed: registrations and connections are tried again every second or two.
const BACK_MAX: Duration = Duration::from_secs(30);
const COORDINATOR: &str = "coordinator-0";

/// Whether this process runs in a network of its own.
pub fn has_own_network() -> bool {
    std::env::var_os(OWN_NETWORK).is_some()
}

/// Runs the test `name` of this program again in a network of its own. False if the system does not allow that.
pub fn in_own_network(name: &str) -> bool {
    let probe =
        "ip link set lo up && ip link add br0 type bridge && ip link add v0 type veth peer name e0 && nsenter --help";
    let may = Command::new("unshare")
        .args(["-rn", "--", "sh", "-c", probe])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !may.is_ok_and(|status| status.success()) {
        return false;
    }
    let status = Command::new("unshare")
        .args(["-rn", "--"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture"])
        .env(OWN_NETWORK, "1")
        .status()
        .expect("it ran a moment ago");
    assert!(status.success(), "the test failed in its own network");
    true
}

fn ip(line: &str) {
    sh(&format!("ip {line}"));
}

fn sh(line: &str) {
    let status = Command::new("sh").args(["-c", line]).status().expect("sh runs");
    assert!(status.success(), "{line}");
}

/// A process, killed on drop.
struct Process {
    child: Child,
    /// Its end tells the process that its supervisor has gone.
    _stdin: Option<ChildStdin>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Rig {
    directory: tempfile::TempDir,
    authority: Authority,
    pub url: String,
    cluster_addr: String,
    _coordinator: Process,
    workers: Vec<(String, &'static str, Option<Process>)>,
}

impl Rig {
    /// Starts a coordinator and so many workers of each role, and waits until all are ready.
    pub async fn start(prefill: usize, decode: usize) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::load_or_create(&directory.path().join("identity")).expect("writable");
        let host = if has_own_network() {
            // A second rig in one process finds the bridge there.
            sh(
                "ip link set lo up; ip link show br0 >/dev/null 2>&1 || { ip link add br0 type bridge && \
                ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up; }",
            );
            "10.77.0.1"
        } else {
            "127.0.0.1"
        };
        issue(&authority, directory.path(), COORDINATOR, Role::Coordinator);
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
        let config = json!({
            "name": COORDINATOR,
            "data_dir": directory.path().join("state"),
            "http_addr": "127.0.0.1:0",
            "cluster_addr": format!("{host}:0"),
            "identity_dir": directory.path().join("identity"),
            "models": [{"name": "baton-demo", "path": model}],
            "prefill_threshold_tokens": 16,
            "worker_wait_ms": 20_000,
        });
        let mut coordinator = spawn(directory.path(), COORDINATOR, "coordinator", &config, false, true);
        let stdout = coordinator.child.stdout.take().expect("piped");
        let (sender, serving) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let report: Value = serde_json::from_str(&line).unwrap_or_default();
                if report["report"] == "serving" {
                    let _ = sender.send(report);
                }
            }
        });
        let serving = serving.recv_timeout(START_MAX).expect("the coordinator serves");
        let text = |key: &str| serving[key].as_str().expect("an address").to_owned();
        let names = (0..prefill)
            .map(|i| (format!("prefill-{i}"), "prefill", None))
            .chain((0..decode).map(|i| (format!("decode-{i}"), "decode", None)));
        let mut this = Self {
            url: format!("http://{}", text("http_addr")),
            cluster_addr: text("cluster_addr"),
            directory,
            authority,
            _coordinator: coordinator,
            workers: names.collect(),
        };
        for index in 0..this.workers.len() {
            this.start_worker(index);
        }
        this.all_ready().await;
        this
    }

    /// Starts worker `index`, which does not run.
    fn start_worker(&mut self, index: usize) {
        let (name, role) = (self.workers[index].0.clone(), self.workers[index].1);
        issue(&self.authority, self.directory.path(), &name, Role::Worker);
        let own = has_own_network();
        let host = if own {
            format!("10.77.0.{}", 10 + index)
        } else {
            "127.0.0.1".into()
        };
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model");
        let config = json!({
            "worker_id": name,
            "role": role,
            "model_path": model,
            "model_name": "baton-demo",
            "coordinator_addrs": [self.cluster_addr],
            "listen_addr": format!("{host}:0"),
            "transfer_addr": format!("{host}:0"),
            "identity_dir": self.directory.path().join("identity"),
            "threads": 1,
            "cores_shared": true,
            "kv_bytes": 64 << 20,
        });
        let mut process = spawn(self.directory.path(), &name, "worker", &config, own, false);
        if own {
            join_bridge(&mut process, index);
        }
        self.workers[index].2 = Some(process);
    }

    /// Every worker has registered and reports, and every block of each is accounted for.
    pub async fn all_ready(&self) {
        let called = Instant::now();
        eventually("all workers are ready and idle", BACK_MAX, || async {
            let asked_after = called.elapsed().as_millis() as u64;
            let listed = get(&self.url, "/cluster/workers").await.json();
            let listed = listed.as_array().cloned().unwrap_or_default();
            let well = |name: &str| {
                listed.iter().any(|worker| {
                    let count = |field: &str| worker[field].as_u64().expect("a count");
                    let blocks = count("free_blocks") + count("held_blocks") + count("cached_blocks");
                    assert_eq!(blocks, count("total_blocks"), "{worker}");
                    let idle = ["running", "waiting", "transferring", "held_blocks"]
                        .iter()
                        .all(|f| count(f) == 0);
                    worker["id"] == name
                        && worker["state"] == "ready"
                        && idle
                        && count("heartbeat_age_ms") + 100 < asked_after
                })
            };
            self.workers.iter().all(|(name, _, _)| well(name)).then_some(())
        })
        .await;
    }

    /// Indices of the workers of a role.
    pub fn of_role(&self, role: &str) -> Vec<usize> {
        (0..self.workers.len()).filter(|i| self.workers[*i].1 == role).collect()
    }

    pub fn pid(&self, index: usize) -> u32 {
        self.workers[index].2.as_ref().expect("it runs").child.id()
    }

    /// Ends the worker's process at once, and starts another under its name.
    pub fn kill(&mut self, index: usize) {
        self.workers[index].2 = None;
    }

    pub fn restart(&mut self, index: usize) {
        self.start_worker(index);
    }

    /// Drops every packet from and to a worker, or no longer.
    pub fn cut(&self, index: usize, cut: bool) {
        ip(&format!("link set v{index} {}", if cut { "down" } else { "up" }));
    }

    /// The ends of the logs, for messages.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for name in self
            .workers
            .iter()
            .map(|(name, _, _)| name.as_str())
            .chain([COORDINATOR])
        {
            let log = std::fs::read_to_string(self.directory.path().join(format!("{name}.log"))).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(12).collect();
            text += &format!("--- {name}\n");
            tail.iter().rev().for_each(|line| text += &format!("{line}\n"));
        }
        text
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        if let Some(keep) = std::env::var_os("BATON_SURVIVAL_LOGS") {
            for (name, _, _) in &self.workers {
                let name = format!("{name}.log");
                let _ = std::fs::copy(self.directory.path().join(&name), Path::new(&keep).join(&name));
            }
        }
    }
}

fn issue(authority: &Authority, directory: &Path, name: &str, role: Role) {
    let identity = authority.issue(role, name).expect("a certificate");
    identity.save(&directory.join("identity"), name).expect("writable");
}

fn spawn(directory: &Path, name: &str, command: &str, config: &Value, own_network: bool, reports: bool) -> Process {
    let path: PathBuf = directory.join(format!("{name}.toml"));
    std::fs::write(&path, toml::to_string(config).expect("TOML")).expect("writable");
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join(format!("{name}.log")))
        .expect("writable");
    let program = baton().get_program().to_owned();
    // Each stage becomes the next, so that the process id stays and the supervisor is its parent.
    let mut wrapped = if own_network {
        let mut unshare = Command::new("unshare");
        unshare
            .args(["-n", "--", "sh", "-c", "read go && exec \"$@\"", "sh"])
            .arg(program);
        unshare
    } else {
        Command::new(program)
    };
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BATON_")) {
        wrapped.env_remove(name);
    }
    let mut child = wrapped
        .arg(command)
        .arg("--config")
        .arg(&path)
        .arg("--supervisor")
        .arg(std::process::id().to_string())
        .stdin(Stdio::piped())
        .stdout(if reports { Stdio::piped() } else { Stdio::null() })
        .stderr(log)
        .spawn()
        .expect("the binary runs");
    let stdin = child.stdin.take();
    Process { child, _stdin: stdin }
}

/// Gives the waiting process an address on the bridge, and lets it go on.
fn join_bridge(process: &mut Process, index: usize) {
    let pid = process.child.id();
    let ours = std::fs::read_link("/proc/self/ns/net").expect("Linux");
    let deadline = Instant::now() + START_MAX;
    while std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|theirs| theirs == ours) {
        assert!(Instant::now() < deadline, "it gets no network of its own");
        std::thread::sleep(Duration::from_millis(5));
    }
    // What an earlier life left goes with its namespace, a moment later. The hardware address stays with the name, as it
    // does with a host, so that nobody's neighbour table is wrong after a restart.
    sh(&format!(
        "for i in 1 2 3 4 5 6 7 8 9 10; do ip link del v{index} 2>/dev/null; ip link add v{index} address 02:00:00:00:01:{index:02} type veth peer name \
         e{index} address 02:00:00:00:00:{index:02} 2>/dev/null && exit 0; sleep 0.05; done; exit 1"
    ));
    ip(&format!("link set e{index} netns {pid}"));
    ip(&format!("link set v{index} master br0 up"));
    sh(&format!(
        "nsenter -t {pid} -n sh -c 'ip link set lo up && ip addr add 10.77.0.{}/24 dev e{index} && ip link set e{index} up'",
        10 + index
    ));
    let stdin = process._stdin.as_mut().expect("piped");
    stdin.write_all(b"go\n").expect("it reads");
}
