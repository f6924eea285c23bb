//! Real clients: the official Python package, and curl with the very line that `baton up` prints.

use super::support::cluster::{Cluster, baton};
use super::support::programs::{have, run_openai_script};
use std::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn openai_python_package_and_curl() {
    let curl = have("curl", &["--version"]);
    let cluster = Cluster::start(&["--prefill-threshold", "0"]).await;
    run_openai_script("tests/python/openai_client.py", &cluster.url);
    if curl {
        let printed = cluster.output("stdout");
        let start = printed.find("  curl ").expect("a curl line is printed");
        let end = start + printed[start..].find("\n\n").expect("an empty line ends it");
        let line = printed[start..end].trim().replacen("curl", "curl -sS --max-time 60", 1);
        let output = Command::new("sh").arg("-c").arg(&line).output().expect("sh runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{line}: {output:?}");
        assert!(
            text.starts_with("data: ") && text.trim_end().ends_with("data: [DONE]"),
            "{line}: {text}"
        );
    } else {
        eprintln!("skipped: curl is not installed");
    }
    bench_measures(&cluster);
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}

/// Our own instrument, against our own server.
fn bench_measures(cluster: &Cluster) {
    let output = baton()
        .args([
            "bench",
            "--url",
            &cluster.url,
            "--json",
            "--fail-on-error",
            "-n",
            "12",
            "-c",
            "4",
        ])
        .args(["--input-words", "24", "--output-tokens", "6", "--ignore-eos"])
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["requests_completed"], 12, "{report}");
    assert_eq!(report["output_tokens"], 72, "{report}");
    assert_eq!(report["ttft_ms"]["count"], 12, "{report}");
}
