//! `baton mock`: a cluster of mock workers in one process, over the real wire.

use super::support::cluster::Cluster;
use super::support::http::{chat, chat_body};
use serde_json::json;
use std::collections::HashSet;

#[tokio::test]
async fn forty_workers_answer_with_hand_overs_and_stop() {
    // A slow machine at a hundred times its speed: steps take some time, the test little.
    let args = [
        "--prefill",
        "8",
        "--decode",
        "32",
        "--profile",
        "h100-llama3-8b",
        "--speed",
        "100",
        "--prefill-threshold",
        "0",
    ];
    let cluster = Cluster::start_mock(&args).await;
    let ready = cluster.ready().expect("it serves");
    assert_eq!(ready["workers"].as_array().map(Vec::len), Some(40));

    // The same question, answered by many workers: the same answer, of the asked length, with the usage of a model.
    let url = cluster.url.clone();
    let body = chat_body(
        "what is the capital of france, and of all its neighbours?",
        json!({"max_tokens": 20}),
    );
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..80 {
        let (url, body) = (url.clone(), body.clone());
        asking.spawn(async move { chat(&url, &body).await });
    }
    let answers = asking.join_all().await;
    assert!(
        answers
            .iter()
            .all(|a| a.finish_reason == "length" && a.count("completion_tokens") == 20)
    );
    let texts: HashSet<&str> = answers.iter().map(|a| a.text.as_str()).collect();
    assert_eq!(texts.len(), 1, "{texts:?}");

    cluster.assert_nothing_leaked().await;
    let workers = cluster.workers().await;
    assert_eq!(workers.len(), 40);
    let busy = |role: &str, field: &str| {
        let of_role = workers.iter().filter(|w| w["role"] == role);
        of_role.filter(|w| w[field].as_u64().expect("a count") > 0).count()
    };
    let decoded = busy("decode", "generation_tokens_total");
    assert!(decoded > 16, "only {decoded} decode workers streamed");
    let prefilled = busy("prefill", "generation_tokens_total");
    assert!(prefilled > 4, "only {prefilled} prefill workers computed prompts");
    assert!(cluster.stop().await.success());
}
