//! Disaggregated equals monolithic: the same requests through prefill and decode processes, and through one worker that
//! does everything, give the same text, finish and counts, with every block accounted for on both sides.

use super::support::cluster::Cluster;
use super::support::http::{Chat, ChatStream, chat_body};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Requests compared. A tenth of them is also cancelled half-way by twins that are not compared.
const REQUESTS: usize = 300;
/// Requests in flight at once.
const CONCURRENCY: usize = 24;

/// A small, fixed pseudo-random sequence, so that both runs see the same requests.
fn mix(i: usize, stream: u64) -> u64 {
    let mut z = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z ^ (z >> 31)
}

fn request(i: usize) -> Value {
    // Mostly short, some long; a third shares a beginning, so that prefix caches take part.
    let words = match mix(i, 1) % 10 {
        0..6 => 1 + mix(i, 2) % 40,
        6..9 => 40 + mix(i, 2) % 160,
        _ => 200 + mix(i, 2) % 250,
    };
    let salt = if mix(i, 3).is_multiple_of(3) { 7 } else { i as u64 };
    let prompt: Vec<String> = (0..words)
        .map(|w| {
            ["code", "list", "baton", "what", "is", "7", "and"][((w * w + salt * (w + 3)) % 7) as usize].to_owned()
        })
        .collect();
    let mut extra = json!({"max_tokens": 1 + mix(i, 4) % 20, "ignore_eos": mix(i, 5).is_multiple_of(2)});
    if !mix(i, 6).is_multiple_of(3) {
        extra["temperature"] = json!(0.3 + (mix(i, 7) % 10) as f64 / 10.0);
        extra["seed"] = json!(mix(i, 8) % 1_000_000);
        extra["top_p"] = json!([1.0, 0.9, 0.5][(mix(i, 9) % 3) as usize]);
        extra["top_k"] = json!([0, 5, 50][(mix(i, 10) % 3) as usize]);
    }
    chat_body(&prompt.join(" "), extra)
}

async fn run_all(cluster: &Cluster) -> Vec<Chat> {
    let slots = Arc::new(Semaphore::new(CONCURRENCY));
    let mut tasks = Vec::new();
    for i in 0..REQUESTS {
        let slot = slots.clone().acquire_owned().await.expect("it is never closed");
        let url = cluster.url.clone();
        tasks.push(tokio::spawn(async move {
            if i % 10 == 0 {
                // Hang up at various moments: before the first chunk, or after some.
                let mut body = request(i);
                body["max_tokens"] = json!(200);
                body["ignore_eos"] = json!(true);
                let mut stream = ChatStream::start(&url, &body).await;
                for _ in 0..(i / 10) % 4 {
                    stream.next().await;
                }
            }
            let chat = ChatStream::start(&url, &request(i)).await.finish().await;
            drop(slot);
            chat
        }));
    }
    let mut chats = Vec::new();
    for task in tasks {
        chats.push(task.await.expect("no request fails"));
    }
    chats
}

#[tokio::test(flavor = "multi_thread")]
async fn disaggregated_equals_monolithic() {
    let disaggregated = Cluster::start(&["--prefill-threshold", "0"]).await;
    let through_two = run_all(&disaggregated).await;
    disaggregated.assert_nothing_leaked().await;
    let workers = disaggregated.workers().await;
    let sent = workers
        .iter()
        .find(|w| w["role"] == "prefill")
        .and_then(|w| w["transferred_bytes_total"].as_u64());
    assert!(sent > Some(1 << 20), "KV blocks really travelled: {workers:?}");
    assert!(disaggregated.stop().await.success());

    let alone = Cluster::start(&["--prefill", "0", "--decode", "1"]).await;
    let through_one = run_all(&alone).await;
    alone.assert_nothing_leaked().await;
    assert!(alone.stop().await.success());

    for (i, (two, one)) in through_two.iter().zip(&through_one).enumerate() {
        assert_eq!(
            (&two.text, &two.finish_reason),
            (&one.text, &one.finish_reason),
            "request {i}: {}",
            request(i)
        );
        for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(two.count(count), one.count(count), "request {i}, {count}");
        }
    }
}

/// Bytes that the prefill worker has sent, once its reports tell nothing new.
async fn transferred_bytes(cluster: &Cluster) -> u64 {
    let mut last = None;
    loop {
        let workers = cluster.workers().await;
        let prefill = workers.iter().find(|worker| worker["role"] == "prefill");
        let bytes = prefill.and_then(|worker| worker["transferred_bytes_total"].as_u64());
        let bytes = bytes.expect("a count");
        if last.replace(bytes) == Some(bytes) {
            return bytes;
        }
        // More than two reports.
        tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    }
}

/// Compressed on the way, KV is smaller and nearly the same: most answers of a trained model do not change.
#[tokio::test(flavor = "multi_thread")]
async fn kv_may_travel_compressed() {
    let mut sent = Vec::new();
    let mut answers = Vec::new();
    for compression in ["none", "int8"] {
        let cluster = Cluster::start(&["--prefill-threshold", "0", "--kv-compression", compression]).await;
        cluster.all_workers_ready().await;
        let mut texts = Vec::new();
        for i in 0..20 {
            let prompt = format!(
                "My code is {}{}{}{}. What is my code?",
                i % 10,
                (i + 3) % 10,
                i % 7,
                (i * 3) % 10
            );
            let body = chat_body(&prompt, json!({"max_tokens": 12, "temperature": 0}));
            texts.push(ChatStream::start(&cluster.url, &body).await.finish().await.text);
        }
        cluster.assert_nothing_leaked().await;
        sent.push(transferred_bytes(&cluster).await);
        answers.push(texts);
        assert!(cluster.stop().await.success());
    }
    assert!(
        sent[1] > 0 && sent[1] * 3 < sent[0] * 2,
        "bytes sent as they are and compressed: {sent:?}"
    );
    let same = answers[0]
        .iter()
        .zip(&answers[1])
        .filter(|(plain, compressed)| plain == compressed)
        .count();
    assert!(same >= 18, "only {same} of 20 answers are the same: {answers:?}");
}
