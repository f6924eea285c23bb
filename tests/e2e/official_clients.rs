//! The official packages of other APIs and runtimes, against one cluster: Anthropic's and OpenAI's for Python, OpenAI's for
//! Node. Each is skipped with a message where it is not installed.

use super::support::cluster::Cluster;
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
async fn anthropic_and_openai_packages() {
    let clients = [
        (
            "python3",
            ["-c", "import anthropic"],
            "tests/python/anthropic_client.py",
            "python3 -m pip install anthropic",
        ),
        (
            "python3",
            ["-c", "import openai"],
            "tests/python/openai_completions.py",
            "python3 -m pip install openai",
        ),
        (
            "node",
            ["-e", "require('openai')"],
            "tests/node/openai_client.js",
            "npm install openai; set NODE_PATH",
        ),
    ];
    let (there, missing): (Vec<_>, Vec<_>) = clients.iter().partition(|(program, probe, ..)| have(program, probe));
    for (program, _, script, install) in missing {
        eprintln!("skipped: {script}: {program} lacks the package ({install})");
    }
    if there.is_empty() {
        return;
    }
    let cluster = Cluster::start(&[]).await;
    for (program, _, script, _) in there {
        let output = Command::new(program)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script))
            .arg(&cluster.url)
            .output()
            .expect("it runs");
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}
