//! Real clients: the official Python package, and curl with the very line that `baton up` prints.

use super::support::cluster::{Cluster, baton};
use std::path::Path;
use std::process::{Command, Stdio};

fn have(program: &str, args: &[&str]) -> bool {
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_python_package_and_curl() {
    let python = have("python3", &["-c", "import openai"]);
    let curl = have("curl", &["--version"]);
    let cluster = Cluster::start(&["--prefill-threshold", "0"]).await;
    if python {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/openai_client.py");
        let output = Command::new("python3")
            .arg(script)
            .arg(&cluster.url)
            .output()
            .expect("python3 runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    } else {
        eprintln!("skipped: python3 with the openai package is not installed (python3 -m pip install openai)");
    }
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
