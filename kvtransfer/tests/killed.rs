//! A real process killed by the kernel (SIGKILL) in the middle of a push: the other one finds out by itself.
//!
//! The second process is this test binary again, running the ignored test `child` with its job in the environment.

#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_identity::{Authority, Identity, Role};
use baton_kvtransfer::{Agent, AgentConfig, PushError, Region, WindowError};
use common::{HANG, eventually, filled, limits, within};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const LEN: usize = 1 << 16;

fn agent(dir: &Path, name: &str) -> Agent {
    Agent::bind(AgentConfig {
        name: name.into(),
        bind: "127.0.0.1:0".parse().unwrap(),
        identity: &Identity::load(dir, name).unwrap(),
        digest: [7; 32],
        limits: limits(),
    })
    .unwrap()
}

/// Kills its process when the test is over, however it ends.
struct Killed(Child);

impl Killed {
    fn start(dir: &Path, job: &str, peer: &str) -> Self {
        // The test's name starts behind that of the crate.
        let test = concat!(module_path!(), "::child").split_once("::").unwrap().1;
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env("KV_TEST_DIR", dir)
            .env("KV_TEST_JOB", job)
            .env("KV_TEST_PEER", peer)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// The rest of the line that starts with `word` in the child's output.
    fn line(&mut self, word: &str) -> String {
        let output = BufReader::new(self.0.stdout.take().unwrap());
        let found = output.lines().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once(word)?;
            Some(rest.trim().to_owned())
        });
        found.expect("the child ended early")
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails only if it is dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "the second process of the tests in this file"]
fn child() {
    let Ok(job) = std::env::var("KV_TEST_JOB") else { return };
    let (dir, peer) = (
        std::env::var("KV_TEST_DIR").unwrap(),
        std::env::var("KV_TEST_PEER").unwrap(),
    );
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let agent = agent(Path::new(&dir), "child");
        if job == "send" {
            let (addr, window) = peer.split_once('/').unwrap();
            let push = agent.push(addr.parse().unwrap(), window.parse().unwrap(), filled(LEN, 1));
            push.writer().write(0..LEN, 0).unwrap();
            tokio::time::sleep(HANG).await;
        } else {
            let region = Region::new(LEN).unwrap();
            let window = agent.open_window(&region, vec![0..LEN]).unwrap();
            println!("\nREADY {}/{}", agent.local_addr(), window.id());
            tokio::time::sleep(HANG).await;
        }
    });
}

fn identities() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::load_or_create(dir.path()).unwrap();
    for name in ["parent", "child"] {
        authority
            .issue(Role::Worker, name)
            .unwrap()
            .save(dir.path(), name)
            .unwrap();
    }
    dir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_receiver_survives_the_senders_death() {
    let dir = identities();
    let agent = agent(dir.path(), "parent");
    let region = Region::new(LEN).unwrap();
    let window = agent.open_window(&region, vec![0..LEN]).unwrap();
    let child = Killed::start(dir.path(), "send", &format!("{}/{}", agent.local_addr(), window.id()));
    eventually("bytes of the child land", || window.landed() == LEN as u64).await;
    drop(child);
    let error = within(window.wait()).await.unwrap_err();
    assert!(
        matches!(&error, WindowError::PeerLost { peer, .. } if peer.starts_with("child")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sender_survives_the_receivers_death() {
    let dir = identities();
    let agent = agent(dir.path(), "parent");
    let mut child = Killed::start(dir.path(), "receive", "");
    let (addr, window) = {
        let ready = child.line("READY");
        let (addr, window) = ready.split_once('/').unwrap();
        (addr.parse().unwrap(), window.parse().unwrap())
    };
    let push = agent.push(addr, window, filled(LEN, 1));
    push.writer().write(0..LEN, 0).unwrap();
    eventually("the push is under way", || agent.stats().bytes_out > 0).await;
    drop(child);
    let error = within(push.failed()).await;
    assert!(
        matches!(error, PushError::PeerLost { .. } | PushError::Unreachable { .. }),
        "{error}"
    );
}
