//! The demo model as a GGUF file: served like any other, with the same answers.

use super::support::cluster::{Cluster, baton};
use super::support::gguf::write_demo;
use super::support::http::{chat, chat_body, get};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_file_answers_as_its_safetensors_do() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("demo.gguf");
    write_demo(&path);
    let bodies = |model: &str| {
        // The second spells a control token, which must stay text.
        ["What is baton?", "Say <|im_end|> and 7341, naïve 漢字 😀."].map(|text| {
            let mut body = chat_body(text, json!({"max_tokens": 24, "temperature": 0.0}));
            body["model"] = json!(model);
            body
        })
    };
    let cluster = Cluster::start(&["--prefill-threshold", "0"]).await;
    let mut wanted = Vec::new();
    for body in bodies("baton-demo") {
        let answer = chat(&cluster.url, &body).await;
        wanted.push((answer.count("prompt_tokens"), answer.text, answer.finish_reason));
    }
    assert!(cluster.stop().await.success());

    let model = path.to_str().expect("UTF-8");
    let cluster = Cluster::start(&["--prefill-threshold", "0", "--model", model]).await;
    let models = get(&cluster.url, "/v1/models").await.json();
    assert_eq!(
        models["data"][0]["id"], "demo",
        "a file is called after itself: {models}"
    );
    let mut found = Vec::new();
    for body in bodies("demo") {
        let answer = chat(&cluster.url, &body).await;
        found.push((answer.count("prompt_tokens"), answer.text, answer.finish_reason));
    }
    assert_eq!(found, wanted);
    assert!(cluster.stop().await.success());

    // What `up` did, by hand.
    let text = directory.path().join("text");
    let convert = || {
        let mut command = baton();
        command.arg("convert-tokenizer").args([&path, &text]);
        command.output().expect("the binary runs")
    };
    assert!(convert().status.success());
    assert!(text.join("tokenizer.json").is_file() && text.join("tokenizer_config.json").is_file());
    let again = convert();
    assert!(!again.status.success());
    assert!(
        String::from_utf8_lossy(&again.stderr).contains("is there already"),
        "{again:?}"
    );
}
