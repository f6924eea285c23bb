//! `baton drain` on a running cluster: answers go on elsewhere, the process leaves and is not started again.

use super::support::cluster::{Cluster, baton};
use super::support::http::{ChatStream, chat, chat_body};
use super::support::{eventually, is_alive};
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_hands_its_streams_over_and_leaves() {
    let cluster = Cluster::start(&["--decode", "2"]).await;
    let extra = |seed: u64| json!({"max_tokens": 400, "ignore_eos": true, "temperature": 0.9, "seed": seed});
    let bodies: Vec<Value> = (0..6)
        .map(|seed| chat_body(&format!("{seed} hello"), extra(seed)))
        .collect();
    let pid = cluster.pid("decode-0");
    let mut running = Vec::new();
    for body in &bodies {
        let mut stream = ChatStream::start(&cluster.url, body).await;
        // Under way.
        let mut beginning = Vec::new();
        for _ in 0..3 {
            beginning.push(stream.next().await.expect("the answer goes on"));
        }
        running.push((beginning, stream));
    }
    let output = tokio::process::Command::from(baton())
        .args(["drain", "decode-0", "--json", "--url", &cluster.url])
        .output();
    let streams = async {
        let mut chats = Vec::new();
        for (beginning, stream) in running {
            chats.push(stream.finish_from(&beginning).await);
        }
        chats
    };
    let (output, chats) = tokio::join!(output, streams);
    let output = output.expect("the binary runs");
    assert!(output.status.success(), "{output:?}");
    let outcome: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&outcome["worker"], &outcome["left"]),
        (&json!("decode-0"), &json!(true)),
        "{outcome}"
    );
    for (body, first) in bodies.iter().zip(&chats) {
        let again = chat(&cluster.url, body).await;
        assert_eq!((&again.text, &again.finish_reason), (&first.text, &first.finish_reason));
        assert_eq!(again.count("completion_tokens"), first.count("completion_tokens"));
    }
    eventually("it has left", Duration::from_secs(10), || async {
        (!is_alive(pid)).then_some(())
    })
    .await;
    // Longer than a crashed one is left dead.
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(cluster.pid("decode-0"), 0, "it is not started again");
    assert!(
        cluster.output("stderr").contains("decode-0 has left"),
        "{}",
        cluster.output("stderr")
    );

    let unknown = baton()
        .args(["drain", "decode-7", "--url", &cluster.url])
        .output()
        .expect("it runs");
    let stderr = String::from_utf8_lossy(&unknown.stderr);
    assert!(
        unknown.status.code() == Some(1) && stderr.contains("decode-7"),
        "{stderr}"
    );
    assert!(cluster.stop().await.success());
}
