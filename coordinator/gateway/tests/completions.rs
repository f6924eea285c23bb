//! `/v1/completions` over a real loopback listener.

mod support;

use baton_proto::state::UsageStatus;
use baton_proto::worker::FinishReason;
use serde_json::{Value, json};
use support::{Script, TestGateway, ids, turn};

const PATH: &str = "/v1/completions";

fn chunks(events: &[String]) -> Vec<Value> {
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let json = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event));
    json.collect::<Result<_, _>>().unwrap()
}

#[tokio::test]
async fn a_whole_answer_has_openais_shape_and_is_settled() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(turn("héllo"));
    let answer = gateway.post(PATH, &json!({"model": "m", "prompt": "say"})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    assert!(json["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(
        (&json["object"], &json["model"]),
        (&json!("text_completion"), &json!("m"))
    );
    assert_eq!(
        json["choices"],
        json!([{"index": 0, "text": "héllo", "logprobs": null, "finish_reason": "stop"}])
    );
    assert_eq!(
        (&json["usage"]["prompt_tokens"], &json["usage"]["completion_tokens"]),
        (&json!(3), &json!(7))
    );
    let job = gateway.backend.last_job();
    assert_eq!(
        (job.prompt.to_vec(), job.max_tokens),
        (ids("say"), 16),
        "no template, OpenAI's default"
    );
    let records = gateway.backend.records();
    assert_eq!(
        (records.len(), records[0].endpoint.as_str(), records[0].status()),
        (1, PATH, UsageStatus::Completed)
    );
    assert_eq!(records[0].request_id, json["id"].as_str().unwrap());
}

#[tokio::test]
async fn several_prompts_and_choices_are_one_record() {
    let gateway = TestGateway::start().await;
    for text in ["a", "bb", "ccc", "dddd"] {
        gateway.backend.script(turn(text));
    }
    let body = json!({"model": "m", "prompt": [[104, 105], "where"], "n": 2, "echo": true, "seed": 5, "max_tokens": 9});
    let answer = gateway.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json = answer.json();
    let texts: Vec<&str> = json["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["hia", "hibb", "whereccc", "wheredddd"]);
    assert_eq!(json["usage"]["prompt_tokens"], 2 + 5);
    assert_eq!(json["usage"]["completion_tokens"], 2 + 3 + 4 + 5);
    let records = gateway.backend.records();
    assert_eq!(records.len(), 1);
    assert_eq!((records[0].prompt_tokens, records[0].completion_tokens), (7, 14));
    let jobs = gateway.backend.jobs.lock().unwrap();
    let seeds: Vec<u64> = jobs.iter().map(|job| job.sampling.seed).collect();
    assert_eq!(seeds, [5, 6, 5, 6]);
}

#[tokio::test]
async fn logprobs_have_the_older_shape_whole_and_streamed() {
    let gateway = TestGateway::start().await;
    let mut merged = Vec::new();
    for stream in [false, true] {
        gateway
            .backend
            .script(Script::SayLikely([ids("aé"), vec![257]].concat(), 2));
        let body = json!({"model": "m", "prompt": "x", "logprobs": 2, "stream": stream});
        let answer = gateway.post(PATH, &body).await;
        let chunks = if stream {
            chunks(&answer.events())
        } else {
            vec![answer.json()]
        };
        let mut all = json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
        for chunk in &chunks {
            for (name, list) in all.as_object_mut().unwrap() {
                let more = chunk["choices"][0]["logprobs"][name].as_array().cloned();
                list.as_array_mut().unwrap().extend(more.unwrap_or_default());
            }
        }
        merged.push(all);
    }
    assert_eq!(merged[0], merged[1]);
    let all = &merged[0];
    // The two bytes of é are no characters by themselves.
    assert_eq!(all["tokens"], json!(["a", "bytes:\\xc3", "bytes:\\xa9"]));
    assert_eq!(all["token_logprobs"], json!([-0.5, -0.5, -0.5]));
    assert_eq!(all["top_logprobs"][0], json!({"a": -0.5, "b": -1.5}));
    assert_eq!(all["text_offset"], json!([0, 1, 2]));
    assert_eq!(gateway.backend.last_job().sampling.top_logprobs, Some(2));
}

#[tokio::test]
async fn a_stream_is_echo_text_finish_usage_done() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::Say(ids("one"), FinishReason::Length));
    let body = json!({"model": "m", "prompt": "> ", "echo": true, "max_tokens": 3, "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let answer = gateway.post(PATH, &body).await;
    let chunks = chunks(&answer.events());
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(text, "> one");
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["completion_tokens"]),
        (&json!([]), &json!(3))
    );
    assert_eq!(rest.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(rest[1]["usage"]["completion_tokens"], 1);
    assert_eq!(gateway.backend.records()[0].status(), UsageStatus::Length);
}

#[tokio::test]
async fn a_stop_string_ends_it() {
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::SayThenHang(ids("1, 2; 3")));
    let json = gateway
        .post(PATH, &json!({"model": "m", "prompt": "x", "stop": ";"}))
        .await
        .json();
    assert_eq!(json["choices"][0]["text"], "1, 2");
    assert_eq!(
        (&json["choices"][0]["finish_reason"], &json["choices"][0]["stop_reason"]),
        (&json!("stop"), &json!(";"))
    );
}

#[tokio::test]
async fn what_is_wrong_is_named_and_nothing_is_placed() {
    let gateway = TestGateway::start().await;
    for (extra, param) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"prompt": [300]}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"max_tokens": 300}), "max_tokens"),
        (json!({"logit_bias": {"9999": 1}}), "logit_bias"),
        (json!({"tools": []}), "tools"),
    ] {
        let mut body = json!({"model": "m", "prompt": "x"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = gateway.post(PATH, &body).await;
        assert_eq!(
            (answer.status, &answer.error()["param"]),
            (400, &json!(param)),
            "{extra}"
        );
    }
    assert!(gateway.backend.jobs.lock().unwrap().is_empty());
}
