//! Two agents on loopback, for the integration tests. Most files of tests are run over QUIC by themselves, over
//! TCP as a part of `tcp.rs` and over shared memory as a part of `shared_memory.rs`.

#![allow(dead_code)] // each test file uses its part

use baton_identity::{Authority, Identity, Role};
use baton_kvtransfer::{Agent, AgentConfig, Region, TransferLimits, TransportKind, TransportOptions};
use std::sync::Arc;
use std::time::Duration;

/// Nothing in these tests takes this long unless it hangs.
pub const HANG: Duration = Duration::from_secs(60);

/// What the agents of this test binary carry pushes with, unless [`TRANSPORT_VARIABLE`] says otherwise.
pub const TRANSPORT: TransportKind = match env!("CARGO_CRATE_NAME").as_bytes() {
    b"shared_memory" => TransportKind::SharedMemory,
    b"tcp" | b"tcp_connections" => TransportKind::Tcp,
    _ => TransportKind::Quic,
};

/// Set to `nixl`, the tests run over NIXL, whose library must then be there.
const TRANSPORT_VARIABLE: &str = "BATON_KV_TEST_TRANSPORT";

/// What the agents of this run carry pushes with.
pub fn transport() -> TransportKind {
    match std::env::var(TRANSPORT_VARIABLE).as_deref() {
        Ok("nixl") => TransportKind::Nixl,
        _ => TRANSPORT,
    }
}

/// Allows for [`transport`] and nothing better.
pub fn transports() -> TransportOptions {
    TransportOptions {
        shared_memory: transport() == TransportKind::SharedMemory,
        tcp: transport() == TransportKind::Tcp,
        nixl: transport() == TransportKind::Nixl,
    }
}

/// Shorter waits than in production, for the tests in which a peer dies.
pub fn limits() -> TransferLimits {
    TransferLimits {
        idle_timeout: Duration::from_millis(1500),
        ..TransferLimits::default()
    }
}

/// A cluster's CA; the directory goes with it.
pub struct Cluster {
    _dir: tempfile::TempDir,
    authority: Authority,
}

impl Cluster {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(dir.path()).unwrap();
        Self { _dir: dir, authority }
    }

    pub fn identity(&self, role: Role) -> Identity {
        self.authority.issue(role, "test").unwrap()
    }

    pub fn agent(&self, name: &str) -> Agent {
        self.agent_with(name, Role::Worker, [7; 32], limits())
    }

    pub fn agent_with(&self, name: &str, role: Role, digest: [u8; 32], limits: TransferLimits) -> Agent {
        self.bind(name, role, digest, limits, transports())
    }

    pub fn agent_over(&self, name: &str, transports: TransportOptions) -> Agent {
        self.bind(name, Role::Worker, [7; 32], limits(), transports)
    }

    fn bind(
        &self,
        name: &str,
        role: Role,
        digest: [u8; 32],
        limits: TransferLimits,
        transports: TransportOptions,
    ) -> Agent {
        Agent::bind(AgentConfig {
            name: name.into(),
            bind: "127.0.0.1:0".parse().unwrap(),
            identity: &self.identity(role),
            digest,
            limits,
            transports,
        })
        .unwrap()
    }
}

/// Fails the test instead of hanging it.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, future).await.expect("the test hangs")
}

/// A region filled from a seed.
pub fn filled(bytes: usize, seed: u64) -> Arc<Region> {
    let region = Region::new(bytes).unwrap();
    let mut state = seed;
    let image: Vec<u8> = (0..bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect();
    assert!(region.copy_in(0, &image));
    region
}

/// Everything in a region.
pub fn image(region: &Region) -> Vec<u8> {
    let mut all = vec![0; region.len()];
    assert!(region.copy_out(0, &mut all));
    all
}

/// Waits until `condition` holds, asking now and then.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(HANG, poll)
        .await
        .unwrap_or_else(|_| panic!("never happened: {what}"));
}
