//! The whole process: it starts, says where it serves, restarts on its data, and says why it cannot.

use super::fake_worker::FakeWorker;
use super::{config, until};
use crate::{CoordinatorConfig, CoordinatorError, Ready, run};
use baton_identity::{Authority, Role};
use baton_proto::cluster;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

fn whole(dir: &Path) -> CoordinatorConfig {
    let mut config = config(dir);
    config.http_addr = SocketAddr::from(([127, 0, 0, 1], 0));
    config.cluster_addr = SocketAddr::from(([127, 0, 0, 1], 0));
    config.models[0].path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../demo/model");
    config
}

async fn get(addr: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_starts_serves_stops_and_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::load_or_create(&dir.path().join("identity")).unwrap();
    let config = whole(dir.path());
    authority
        .issue(Role::Coordinator, &config.name)
        .unwrap()
        .save(&config.identity_dir, &config.name)
        .unwrap();
    let mut epochs = Vec::new();
    for _ in 0..2 {
        let (ready, is_ready) = oneshot::channel();
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run(config.clone(), ready, shutdown.clone()));
        let Ok(Ready {
            http_addr,
            cluster_addr,
        }) = is_ready.await
        else {
            panic!("{:?}", running.await);
        };
        assert!(get(http_addr, "/health").await.starts_with("HTTP/1.1 200"));
        assert!(get(http_addr, "/ready").await.starts_with("HTTP/1.1 503"));
        let identity = authority.issue(Role::Worker, "w").unwrap();
        let worker = FakeWorker::start("w", cluster::Role::Combined, cluster_addr, identity);
        let mut tries = 0;
        while !get(http_addr, "/ready").await.starts_with("HTTP/1.1 200") {
            tries += 1;
            assert!(tries < 2000, "never ready");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        epochs.push(worker.controls.epoch.load(std::sync::atomic::Ordering::SeqCst));

        assert!(get(http_addr, "/metrics").await.contains("\nbaton:raft_leader 1"));
        let listed = get(http_addr, "/cluster/workers").await;
        assert!(listed.contains("\"id\":\"w\""), "{listed}");

        // A second one on the same data says why not.
        let (second, _) = oneshot::channel();
        let error = run(config.clone(), second, CancellationToken::new()).await.unwrap_err();
        assert!(error.to_string().contains("in use by another process"), "{error}");
        let (second, _) = oneshot::channel();
        let taken = CoordinatorConfig {
            http_addr,
            ..config.clone()
        };
        let error = run(taken, second, CancellationToken::new()).await.unwrap_err();
        assert!(
            matches!(error, CoordinatorError::Bind { purpose: "API", .. }),
            "{error}"
        );

        shutdown.cancel();
        running.await.unwrap().unwrap();
        until("the port free", || std::net::TcpListener::bind(http_addr).is_ok()).await;
    }
    assert!(epochs[0] < epochs[1], "{epochs:?}");
}

#[tokio::test]
async fn settings_are_checked_before_anything_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let adjust: [fn(&mut CoordinatorConfig); 5] = [
        |config| config.models.clear(),
        |config| config.models.push(config.models[0].clone()),
        |config| config.lost_after_ms = config.heartbeat_interval_ms,
        |config| config.requests_per_worker_max = 0,
        |config| config.heartbeat_interval_ms = 1,
    ];
    for adjust in adjust {
        let mut config = whole(dir.path());
        adjust(&mut config);
        let (ready, _) = oneshot::channel();
        let error = run(config, ready, CancellationToken::new()).await.unwrap_err();
        assert!(matches!(error, CoordinatorError::Config(_)), "{error}");
    }
    assert!(!dir.path().join("data").exists());
    let unknown = serde_json::json!({"data_dir": "d", "identity_dir": "i", "models": [], "typo": 1});
    assert!(serde_json::from_value::<CoordinatorConfig>(unknown).is_err());
    let minimal = serde_json::json!({"data_dir": "d", "identity_dir": "i", "models": [{"name": "m", "path": "p"}]});
    assert_eq!(
        serde_json::from_value::<CoordinatorConfig>(minimal)
            .unwrap()
            .cluster_addr
            .port(),
        7070
    );
}
