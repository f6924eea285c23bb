//! What `/openapi.json` says, tried by schemathesis: no answer with a status that is not described, and none of 5xx.

use super::support::cluster::Cluster;
use std::path::Path;
use std::process::Command;

/// Cases per operation: enough to touch every field, and short. `scripts/fuzz-api URL 1000` looks longer.
const CASES: &str = "2";

#[tokio::test(flavor = "multi_thread")]
async fn schemathesis_finds_nothing() {
    if Command::new("schemathesis").arg("--version").output().is_err() {
        eprintln!("skipped: schemathesis is not installed (python3 -m pip install schemathesis)");
        return;
    }
    let cluster = Cluster::start_mock(&["--prefill", "1", "--decode", "1"]).await;
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fuzz-api"))
        .args([&cluster.url, CASES])
        .output()
        .expect("the script runs");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(cluster.stop().await.success());
}
