//! Chat completions beyond one plain answer: several choices, probabilities, tools, formats, stream options.

mod support;

use baton_gateway::GatewayConfig;
use baton_proto::state::UsageStatus;
use baton_proto::worker::{FinishReason, grammar::Kind};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use support::{Answer, Script, TestGateway, hi, ids, turn};

/// Tokens of the prompt that `hi` renders to.
const HI_TOKENS: u32 = "user\nhi\nassistant\n".len() as u32 + 3;

fn chunks(answer: &Answer) -> Vec<Value> {
    let events = answer.events();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let parsed = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event));
    parsed.collect::<Result<_, _>>().unwrap()
}

/// With room for descriptions of tools.
async fn roomy() -> TestGateway {
    let gateway = TestGateway::start().await;
    gateway.backend.context_length.store(4096, Ordering::SeqCst);
    gateway
}

/// The deltas of one choice.
fn deltas(chunks: &[Value], index: u64) -> Vec<Value> {
    let choices = chunks.iter().filter_map(|chunk| chunk["choices"].get(0));
    choices
        .filter(|choice| choice["index"] == index)
        .map(|choice| choice["delta"].clone())
        .collect()
}

fn weather() -> Value {
    json!({"type": "function", "function": {"name": "weather", "description": "d", "parameters":
        {"type": "object", "properties": {"zone": {"type": "string"}, "city": {"type": "string"}}}}})
}

const CALL: &str = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>";

#[tokio::test]
async fn n_choices_are_one_request_and_one_record() {
    for stream in [false, true] {
        let gateway = TestGateway::start().await;
        for text in ["one", "second", "3"] {
            gateway.backend.script(turn(text));
        }
        let body = hi(json!({"n": 3, "seed": 7, "stream": stream, "stream_options": null, "max_tokens": 20}));
        let answer = gateway.chat(&body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let texts: Vec<String> = if stream {
            let chunks = chunks(&answer);
            let first: Vec<&Value> = chunks[..3]
                .iter()
                .map(|chunk| &chunk["choices"][0]["delta"]["role"])
                .collect();
            assert_eq!(first, [&json!("assistant"); 3]);
            let finishes = |index: u64| {
                let choices = chunks.iter().map(|chunk| &chunk["choices"][0]);
                choices
                    .filter(|choice| choice["index"] == index && choice["finish_reason"] == "stop")
                    .count()
            };
            assert_eq!([finishes(0), finishes(1), finishes(2)], [1, 1, 1]);
            let text = |index| {
                deltas(&chunks, index)
                    .iter()
                    .filter_map(|delta| delta["content"].as_str().map(str::to_owned))
                    .collect()
            };
            (0..3).map(text).collect()
        } else {
            let json = answer.json();
            assert_eq!(json["usage"]["prompt_tokens"], HI_TOKENS);
            assert_eq!(json["usage"]["completion_tokens"], 4 + 7 + 2);
            let choices = json["choices"].as_array().unwrap();
            let indices: Vec<u64> = choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
            assert_eq!(indices, [0, 1, 2]);
            choices
                .iter()
                .map(|choice| choice["message"]["content"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(texts, ["one", "second", "3"]);
        let jobs = gateway.backend.jobs.lock().unwrap().clone();
        let seeds: Vec<u64> = jobs.iter().map(|job| job.sampling.seed).collect();
        assert_eq!(seeds, [7, 8, 9]);
        assert!(jobs[0].request_id != jobs[1].request_id && jobs[1].request_id != jobs[2].request_id);
        let records = gateway.backend.records();
        assert_eq!(records.len(), 1);
        let record = &records[0];
        assert_eq!(
            (
                record.prompt_tokens,
                record.cached_tokens,
                record.completion_tokens,
                record.sampled_tokens
            ),
            (HI_TOKENS, 16, 13, 13)
        );
        assert_eq!((record.attempts, record.attempt_list.len()), (3, 3));
        assert_eq!(record.request_id, jobs[0].request_id);
    }
}

#[tokio::test]
async fn choices_fail_and_are_cancelled_together() {
    // One breaks: the other is cancelled, and what was shown of both is recorded as failed.
    let gateway = TestGateway::start().await;
    gateway.backend.script(Script::SayThenHang(ids("abc")));
    gateway.backend.script(Script::SayThenVanish(ids("de")));
    let events = gateway.chat(&hi(json!({"n": 2, "stream": true}))).await.events();
    assert!(events.last().unwrap().starts_with("{\"error\":{"), "{events:?}");
    gateway
        .backend
        .until("a record", |backend| backend.records().len() == 1)
        .await;
    assert_eq!(gateway.backend.records()[0].status(), UsageStatus::Failed);
    assert_eq!(gateway.backend.cancelled.load(Ordering::SeqCst), 2);

    // One is refused: so is the request; the one that was placed is settled.
    gateway.backend.script(Script::SayThenHang(ids("abc")));
    gateway
        .backend
        .script(Script::Refuse(baton_gateway::BackendError::NoWorker {
            model: "m".into(),
        }));
    assert_eq!(gateway.chat(&hi(json!({"n": 2}))).await.status, 503);
    gateway
        .backend
        .until("a record", |backend| backend.records().len() == 2)
        .await;
    assert_eq!(gateway.backend.records()[1].completion_tokens, 0);
    assert_eq!(gateway.backend.cancelled.load(Ordering::SeqCst), 3);

    // More choices than may be in work.
    let config = GatewayConfig {
        in_flight_max: 3,
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::with(config).await;
    assert_eq!(gateway.chat(&hi(json!({"n": 4}))).await.status, 429);
    assert_eq!(gateway.chat(&hi(json!({"n": 3}))).await.status, 200);
    assert_eq!(
        gateway.chat(&hi(json!({"n": 3}))).await.status,
        200,
        "places are given back"
    );
}

#[tokio::test]
async fn probabilities_come_with_their_bytes() {
    for stream in [false, true] {
        let gateway = TestGateway::start().await;
        gateway
            .backend
            .script(Script::SayLikely([ids("é!"), vec![257]].concat(), 2));
        let answer = gateway
            .chat(&hi(json!({"logprobs": true, "top_logprobs": 2, "stream": stream})))
            .await;
        let content: Vec<Value> = if stream {
            let chunks = chunks(&answer);
            let told = chunks
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned());
            told.flatten().collect()
        } else {
            answer.json()["choices"][0]["logprobs"]["content"]
                .as_array()
                .unwrap()
                .clone()
        };
        assert_eq!(gateway.backend.last_job().sampling.top_logprobs, Some(2));
        let bytes: Vec<u8> = content
            .iter()
            .flat_map(|one| one["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "é!",
            "the token that ends the turn has no text"
        );
        assert_eq!(content[2]["token"], "!");
        assert_eq!(
            content[2]["top_logprobs"],
            json!([{"token": "!", "logprob": -0.5, "bytes": [33]},
            {"token": "\"", "logprob": -1.5, "bytes": [34]}])
        );
    }
}

#[tokio::test]
async fn a_tool_call_round_trip() {
    for stream in [false, true] {
        let gateway = roomy().await;
        gateway.backend.script(turn(CALL));
        let body = hi(json!({"tools": [weather()], "stream": stream, "max_tokens": 100}));
        let mut body = body;
        body["messages"][0]["content"] = "w?".into();
        let answer = gateway.chat(&body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        // The template knows no tools: they are told of in a system message, with the schema as it was sent.
        let prompt: Vec<u8> = gateway
            .backend
            .last_job()
            .prompt
            .iter()
            .filter_map(|&id| u8::try_from(id).ok())
            .collect();
        let prompt = String::from_utf8_lossy(&prompt).into_owned();
        assert!(
            prompt.starts_with("system\n") && prompt.contains("{\"zone\":{\"type\":\"string\"},\"city\""),
            "{prompt}"
        );
        assert!(
            gateway.backend.last_job().sampling.grammar.is_none(),
            "auto leaves the text free"
        );
        let (call, reason) = if stream {
            let chunks = chunks(&answer);
            let deltas = deltas(&chunks, 0);
            assert!(
                deltas[1..].iter().all(|delta| delta.get("content").is_none()),
                "{deltas:?}"
            );
            let calls: Vec<&Value> = deltas.iter().filter_map(|delta| delta["tool_calls"].get(0)).collect();
            assert!(
                calls.len() > 3
                    && calls[1..]
                        .iter()
                        .all(|call| call.get("id").is_none() && call["index"] == 0)
            );
            let arguments: String = calls
                .iter()
                .filter_map(|call| call["function"]["arguments"].as_str())
                .collect();
            let mut call = calls[0].clone();
            call["function"]["arguments"] = arguments.into();
            call.as_object_mut().unwrap().remove("index");
            (call, chunks.last().unwrap()["choices"][0]["finish_reason"].clone())
        } else {
            let choice = &answer.json()["choices"][0];
            assert_eq!(choice["message"]["content"], Value::Null);
            (
                choice["message"]["tool_calls"][0].clone(),
                choice["finish_reason"].clone(),
            )
        };
        assert_eq!(
            (&call["type"], &call["function"]["name"], reason),
            (&json!("function"), &json!("weather"), json!("tool_calls"))
        );
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({"city": "Köln"}));

        // The result goes back, and the model sees both.
        let back = json!({"model": "m", "messages": [{"role": "user", "content": "w?"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "warm"}]});
        assert_eq!(gateway.chat(&back).await.status, 200);
        let prompt: Vec<u8> = gateway
            .backend
            .last_job()
            .prompt
            .iter()
            .filter_map(|&id| u8::try_from(id).ok())
            .collect();
        let prompt = String::from_utf8_lossy(&prompt).into_owned();
        assert!(
            prompt.contains("\"arguments\":{\"city\":\"Köln\"}") && prompt.contains("<tool_response>\nwarm\n"),
            "{prompt}"
        );
    }
}

#[tokio::test]
async fn forced_calls_and_formats_are_grammars() {
    let gateway = roomy().await;
    let small = json!({"type": "function", "function": {"name": "f"}});
    let kind = async |extra: Value| {
        let answer = gateway.chat(&hi(extra.clone())).await;
        assert_eq!(answer.status, 200, "{extra}: {}", answer.text());
        gateway
            .backend
            .last_job()
            .sampling
            .grammar
            .map(|grammar| grammar.kind.unwrap())
    };
    for choice in [
        json!("required"),
        json!({"type": "function", "function": {"name": "f"}}),
    ] {
        let Some(Kind::Lark(lark)) = kind(json!({"tools": [small], "tool_choice": choice})).await else {
            panic!("a forced call is a grammar");
        };
        assert!(
            lark.contains("\"<tool_call>\"") && lark.contains("{\"const\":\"f\"}"),
            "{lark}"
        );
    }
    assert_eq!(kind(json!({"tools": [small], "tool_choice": "none"})).await, None);
    let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
    assert_eq!(
        kind(json!({"response_format": format})).await,
        Some(Kind::JsonSchema(schema.to_string()))
    );
    assert_eq!(
        kind(json!({"guided_regex": "a+"})).await,
        Some(Kind::Regex("a+".into()))
    );
    assert_eq!(kind(json!({"response_format": {"type": "text"}})).await, None);

    // What no worker can serve is the client's fault, in its own words.
    gateway
        .backend
        .script(Script::Invalid("grammar", "The schema has a loop."));
    let error = gateway.chat(&hi(json!({"response_format": format}))).await;
    assert_eq!(error.status, 400);
    let error = error.error();
    assert_eq!(
        (&error["param"], &error["message"]),
        (&json!("response_format"), &json!("The schema has a loop."))
    );
    for (extra, param) in [
        (
            json!({"tools": [small], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"logit_bias": {"100000": 1}}), "logit_bias"),
        (json!({"stop_token_ids": [100_000]}), "stop_token_ids"),
        (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens"),
        (json!({"reasoning_effort": "low"}), "reasoning_effort"),
        (json!({"documents": [{"text": "x"}]}), "documents"),
    ] {
        let answer = gateway.chat(&hi(extra.clone())).await;
        assert_eq!(answer.status, 400, "{extra}");
        assert_eq!(answer.error()["param"], param);
    }
}

#[tokio::test]
async fn stops_of_the_clients_choosing() {
    let gateway = TestGateway::start().await;
    let choice = async |script: Script, extra: Value| {
        gateway.backend.script(script);
        gateway.chat(&hi(extra)).await.json()["choices"][0].clone()
    };
    let said = || Script::Say(ids("ab!"), FinishReason::Stop);
    let told = choice(said(), json!({"stop_token_ids": [33]})).await;
    assert_eq!(
        (&told["message"]["content"], &told["stop_reason"]),
        (&json!("ab"), &json!(33))
    );
    assert_eq!(gateway.backend.last_job().stop_token_ids, [33, 257]);
    let told = choice(
        said(),
        json!({"stop_token_ids": [33], "include_stop_str_in_output": true}),
    )
    .await;
    assert_eq!(told["message"]["content"], "ab!");
    let told = choice(
        Script::SayThenHang(ids("abEND")),
        json!({"stop": "END", "include_stop_str_in_output": true}),
    )
    .await;
    assert_eq!(
        (&told["message"]["content"], &told["stop_reason"]),
        (&json!("abEND"), &json!("END"))
    );
    let told = choice(turn("ab"), json!({"skip_special_tokens": false})).await;
    assert_eq!(
        (&told["message"]["content"], told.get("stop_reason")),
        (&json!("ab"), None)
    );
    // A cache of its own within the tenant's.
    gateway.chat(&hi(json!({"cache_salt": "s"}))).await;
    assert_eq!(gateway.backend.last_job().cache_salt, b"\0s");
}

#[tokio::test]
async fn stream_options_do_what_they_say() {
    let gateway = roomy().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true, "include_obfuscation": true});
    let answer = gateway
        .chat(&hi(json!({"stream": true, "stream_options": options})))
        .await;
    let lengths: Vec<usize> = answer
        .events()
        .iter()
        .filter(|event| *event != "[DONE]")
        .map(String::len)
        .collect();
    assert!(
        lengths.windows(2).all(|two| two[0].abs_diff(two[1]) % 64 == 0),
        "{lengths:?}"
    );
    let chunks = chunks(&answer);
    let counts: Vec<u64> = chunks
        .iter()
        .filter_map(|chunk| chunk["usage"]["completion_tokens"].as_u64())
        .collect();
    assert!(
        counts.is_sorted() && counts.first() < counts.last() && counts.len() >= chunks.len() - 1,
        "{counts:?}"
    );

    // The older words, in and out.
    gateway.backend.script(turn(CALL));
    let older = json!({"functions": [weather()["function"]], "max_tokens": 100});
    let choice = gateway.chat(&hi(older)).await.json()["choices"][0].clone();
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["function_call"]["name"]),
        (&json!("function_call"), &json!("weather"))
    );
}
