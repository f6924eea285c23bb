//! The official packages of other APIs and runtimes, against one cluster: Anthropic's and OpenAI's for Python, OpenAI's for
//! Node. Each is skipped with a message where it is not installed.

use super::support::cluster::Cluster;
use super::support::programs::{have, run_script};

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
        run_script(program, script, &cluster.url);
    }
    cluster.assert_nothing_leaked().await;
    assert!(cluster.stop().await.success());
}
