//! `/v1/responses` over real connections: answers, events, tools, what is stored and whose it is, the background; every answer
//! and event against OpenAI's own description, where that is at hand (see `openai_schema`).

mod support;

use baton_gateway::{BackendError, GatewayConfig, ResponsesConfig};
use baton_proto::state::UsageStatus;
use baton_proto::worker::FinishReason;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use support::memory_store::MemoryStore;
use support::{Answer, LONG, MockBackend, OPERATOR, Script, TestGateway, ids, turn};

const PATH: &str = "/v1/responses";

static DESCRIPTION: LazyLock<Option<Value>> = LazyLock::new(|| {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/openai-openapi.yaml");
    let path = std::env::var_os("OPENAI_OPENAPI").map_or(beside, PathBuf::from);
    let Ok(text) = std::fs::read_to_string(&path) else {
        eprintln!("not checked: OpenAI's description is not at {}", path.display());
        return None;
    };
    let text = text.replace("9223372036854776000", "9223372036854775807");
    let mut value: Value = serde_norway::from_str(&text).expect("it is YAML");
    without_formats(&mut value);
    Some(value)
});

/// Formats such as `unixtime` say nothing of shape.
fn without_formats(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(without_formats),
        Value::Object(fields) => {
            if fields.get("format").is_some_and(Value::is_string) {
                fields.remove("format");
            }
            fields.values_mut().for_each(without_formats);
        }
        _ => {}
    }
}

fn validator(name: &str) -> Option<jsonschema::Validator> {
    let description = DESCRIPTION.as_ref()?;
    let schema = json!({"$ref": format!("#/components/schemas/{name}"), "components": description["components"]});
    Some(jsonschema::draft202012::options().build(&schema).expect("it compiles"))
}

static RESPONSE: LazyLock<Option<jsonschema::Validator>> = LazyLock::new(|| validator("Response"));
static EVENT: LazyLock<Option<jsonschema::Validator>> = LazyLock::new(|| validator("ResponseStreamEvent"));
static ITEMS: LazyLock<Option<jsonschema::Validator>> = LazyLock::new(|| validator("ResponseItemList"));

fn check(validator: &Option<jsonschema::Validator>, value: &Value) {
    let Some(validator) = validator else { return };
    let errors: Vec<String> = validator
        .iter_errors(value)
        .map(|error| format!("{error} at {}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:?}: {value}");
}

/// A gateway with a state, and the key of a project.
struct Rig {
    gateway: TestGateway,
    key: String,
}

impl Rig {
    async fn start() -> Self {
        Self::with(GatewayConfig::default(), Arc::default()).await.0
    }

    async fn with(config: GatewayConfig, store: Arc<MemoryStore>) -> (Self, Arc<MockBackend>) {
        let backend = Arc::new(MockBackend::default());
        backend.context_length.store(4096, Ordering::SeqCst);
        assert!(backend.store.set(store).is_ok());
        let config = GatewayConfig {
            api_key: Some(OPERATOR.into()),
            ..config
        };
        let gateway = TestGateway::over(config, backend.clone()).await;
        let (_, _, key) = gateway.project_key(json!({}), json!({})).await;
        (Self { gateway, key }, backend)
    }

    async fn ask(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.gateway.ask(&self.key, method, path, &[], body).await
    }

    async fn post(&self, extra: Value) -> Answer {
        let mut body = json!({"model": "m", "input": "hi"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        self.ask("POST", PATH, &body).await
    }

    /// A response that is as it should be.
    async fn create(&self, script: Script, extra: Value) -> Value {
        self.gateway.backend.script(script);
        let answer = self.post(extra).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        check(&RESPONSE, &answer.json());
        answer.json()
    }

    async fn get(&self, id: &Value) -> Value {
        let answer = self.ask("GET", &path(id, ""), &Value::Null).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        check(&RESPONSE, &answer.json());
        answer.json()
    }

    async fn ended(&self, id: &Value) -> Value {
        let wait = async {
            loop {
                let response = self.get(id).await;
                if response["status"] != "in_progress" {
                    return response;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LONG, wait).await.expect("it ends")
    }
}

use std::sync::Arc;

fn path(id: &Value, more: &str) -> String {
    format!("{PATH}/{}{more}", id.as_str().expect("an id"))
}

/// The events of a stream, each checked; names and data agree.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let text = answer.text();
    let frames = text
        .split("\n\n")
        .filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
    let events = frames.map(|frame| {
        let (name, data) = frame
            .strip_prefix("event: ")
            .expect(frame)
            .split_once("\ndata: ")
            .expect(frame);
        let event: Value = serde_json::from_str(data).expect(data);
        assert_eq!(event["type"], name);
        check(&EVENT, &event);
        event
    });
    events.collect()
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_default()
}

fn tool() -> Value {
    json!({"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": false})
}

const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";

#[tokio::test]
async fn whole_and_streamed_answers_are_as_openai_describes_them() {
    let rig = Rig::start().await;
    let cases = [
        (turn("héllo"), json!({}), "completed"),
        (
            turn("hi"),
            json!({"instructions": "be kind", "metadata": {"a": "b"}, "user": "u", "temperature": 0.7}),
            "completed",
        ),
        (
            Script::Say(ids("abc"), FinishReason::Length),
            json!({"max_output_tokens": 3}),
            "incomplete",
        ),
        (
            Script::SayLikely([ids("é!"), vec![257]].concat(), 2),
            json!({"top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
            "completed",
        ),
        (
            turn(CALL),
            json!({"tools": [tool()], "tool_choice": "auto"}),
            "completed",
        ),
        (
            turn(&format!("I look.\n{CALL}\n{CALL}")),
            json!({"tools": [tool()]}),
            "completed",
        ),
        (
            turn("{}"),
            json!({"text": {"format": {"type": "json_object"}}}),
            "completed",
        ),
        (turn("x"), json!({"store": false}), "completed"),
    ];
    for (script, extra, status) in cases {
        let whole = rig.create(script.clone(), extra.clone()).await;
        assert_eq!(whole["status"], status, "{whole}");
        rig.gateway.backend.script(script);
        let mut streamed = extra.clone();
        streamed["stream"] = true.into();
        streamed["stream_options"] = json!({"include_obfuscation": true});
        let answer = rig.post(streamed).await;
        let events = events(&answer);
        for (at, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], at);
        }
        let names: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        assert_eq!(names[..2], ["response.created", "response.in_progress"]);
        assert_eq!(*names.last().unwrap(), format!("response.{status}"));
        // But for names and times the two are the same.
        let plain = |response: &Value| {
            let kinds = response["output"].as_array().unwrap().iter().map(|item| {
                (
                    item["type"].clone(),
                    item["content"].clone(),
                    item["arguments"].clone(),
                    item["status"].clone(),
                )
            });
            (kinds.collect::<Vec<_>>(), response["usage"].clone())
        };
        let last = &events.last().unwrap()["response"];
        assert_eq!(plain(last), plain(&whole), "{extra}");
        assert_eq!(whole["store"], extra.get("store").cloned().unwrap_or(json!(true)));
    }
}

#[tokio::test]
async fn one_record_of_its_own_endpoint() {
    let rig = Rig::start().await;
    let response = rig.create(turn("hello"), json!({"user": "u"})).await;
    let records = rig.gateway.backend.records();
    let record = &records[0];
    assert_eq!((records.len(), record.status()), (1, UsageStatus::Completed));
    assert_eq!(record.request_id, response["id"].as_str().unwrap());
    assert_eq!((record.endpoint.as_str(), record.user.as_str()), (PATH, "u"));
    let usage = &response["usage"];
    assert_eq!(usage["input_tokens"], record.prompt_tokens);
    assert_eq!(usage["output_tokens"], record.completion_tokens);
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], record.cached_tokens);
}

#[tokio::test]
async fn a_failure_midway_is_an_event_and_is_not_stored() {
    let rig = Rig::start().await;
    rig.gateway.backend.script(Script::SayThenVanish(ids("hel")));
    let answer = rig.post(json!({"stream": true})).await;
    let events = events(&answer);
    let failed = events.last().unwrap();
    assert_eq!(
        (&failed["type"], &failed["response"]["status"]),
        (&json!("response.failed"), &json!("failed"))
    );
    assert_eq!(events[events.len() - 2]["type"], "error");
    let gone = rig.ask("GET", &path(&failed["response"]["id"], ""), &Value::Null).await;
    assert_eq!(gone.status, 404);
}

#[tokio::test]
async fn a_tool_round_trip_by_previous_response_id() {
    let rig = Rig::start().await;
    let first = rig
        .create(turn(CALL), json!({"tools": [tool()], "instructions": "only once"}))
        .await;
    let call = &first["output"][0];
    assert_eq!(
        (&call["type"], &call["arguments"]),
        (&json!("function_call"), &json!("{\"x\":1}")),
        "{first}"
    );
    let output = json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "7"}]);
    let second = rig
        .create(
            turn("seven"),
            json!({"tools": [tool()], "input": output, "previous_response_id": first["id"]}),
        )
        .await;
    assert_eq!(
        (text(&second), &second["previous_response_id"]),
        ("seven", &first["id"])
    );
    let third = rig
        .create(
            turn("so"),
            json!({"input": "and?", "previous_response_id": second["id"]}),
        )
        .await;
    let items = rig
        .ask("GET", &path(&third["id"], "/input_items?order=asc"), &Value::Null)
        .await
        .json();
    check(&ITEMS, &items);
    let kinds: Vec<_> = items["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        ["message", "function_call", "function_call_output", "message", "message"]
    );
    // Page by page, newest first, without a gap.
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let query = format!("/input_items?limit=2{after}");
        let page = rig.ask("GET", &path(&third["id"], &query), &Value::Null).await.json();
        check(&ITEMS, &page);
        seen.extend(page["data"].as_array().unwrap().clone());
        if page["has_more"] == false {
            break;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
    seen.reverse();
    assert_eq!(json!(seen), items["data"]);
    // What the model read: instructions are not handed on.
    let prompt = rig.gateway.backend.last_job().prompt;
    let bytes: Vec<u8> = prompt.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
    let read = String::from_utf8_lossy(&bytes).into_owned();
    assert!(
        read.contains("and?") && read.contains("seven") && !read.contains("only once"),
        "{read}"
    );
    // A response deleted in between breaks nothing.
    for id in [&first["id"], &second["id"]] {
        let deleted = rig.ask("DELETE", &path(id, ""), &Value::Null).await;
        assert_eq!(deleted.json()["deleted"], true);
        assert_eq!(rig.ask("GET", &path(id, ""), &Value::Null).await.status, 404);
        assert_eq!(rig.ask("DELETE", &path(id, ""), &Value::Null).await.status, 404);
    }
    rig.create(turn("x"), json!({"previous_response_id": third["id"]}))
        .await;
}

#[tokio::test]
async fn responses_are_a_projects_own() {
    let rig = Rig::start().await;
    let (_, _, other) = rig.gateway.project_key(json!({}), json!({})).await;
    let id = rig.create(turn("mine"), json!({})).await["id"].clone();
    assert_eq!(text(&rig.get(&id).await), "mine");
    for key in [other.as_str(), OPERATOR] {
        for (method, more) in [
            ("GET", ""),
            ("GET", "/input_items"),
            ("DELETE", ""),
            ("POST", "/cancel"),
        ] {
            let answer = rig.gateway.ask(key, method, &path(&id, more), &[], &Value::Null).await;
            assert_eq!(answer.status, 404, "{method} {more}: {}", answer.text());
        }
        let body = json!({"model": "m", "input": "x", "previous_response_id": id});
        let answer = rig.gateway.ask(key, "POST", PATH, &[], &body).await;
        assert_eq!(
            (answer.status, &answer.error()["param"]),
            (400, &json!("previous_response_id"))
        );
        let files = rig.gateway.ask(key, "GET", "/v1/files", &[], &Value::Null).await.json();
        assert_eq!(files["data"], json!([]));
    }
    // Nor is it a file of its own project.
    let file = rig
        .ask("GET", &format!("/v1/files/{}", id.as_str().unwrap()), &Value::Null)
        .await;
    assert_eq!(file.status, 404);
    let kept = rig.create(turn("x"), json!({"store": false})).await["id"].clone();
    assert_eq!(rig.ask("GET", &path(&kept, ""), &Value::Null).await.status, 404);
    let foreground = rig.ask("POST", &path(&id, "/cancel"), &Value::Null).await;
    assert_eq!(foreground.status, 400);
}

#[tokio::test]
async fn bounds() {
    let config = GatewayConfig {
        responses: ResponsesConfig {
            response_bytes_max: 4096,
            project_responses_max: 2,
            ..ResponsesConfig::default()
        },
        ..GatewayConfig::default()
    };
    let (rig, backend) = Rig::with(config, Arc::default()).await;
    let mut made = Vec::new();
    for _ in 0..3 {
        made.push(rig.create(turn("x"), json!({})).await["id"].clone());
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    // Many go at once; the newest is always there.
    assert_eq!(rig.ask("GET", &path(&made[0], ""), &Value::Null).await.status, 404);
    rig.get(&made[2]).await;
    // Too large, or no disk: answered, and honest.
    let large = rig
        .create(
            turn("x"),
            json!({"metadata": {"a": "x".repeat(500)}, "input": "y".repeat(3500)}),
        )
        .await;
    assert_eq!((text(&large), &large["store"]), ("x", &json!(false)));
    let refused = rig.post(json!({"background": true, "input": "y".repeat(4000)})).await;
    assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("input")));
    backend.chunks.full.store(true, Ordering::SeqCst);
    let unkept = rig.create(turn("x"), json!({})).await;
    assert_eq!(unkept["store"], false);
    assert_eq!(rig.post(json!({"background": true})).await.status, 503);
}

#[tokio::test]
async fn the_background_goes_on_without_its_client() {
    let rig = Rig::start().await;
    let begun = rig.create(turn("hello"), json!({"background": true})).await;
    assert!(
        ["queued", "in_progress"].iter().any(|word| begun["status"] == *word),
        "{begun}"
    );
    let ended = rig.ended(&begun["id"]).await;
    assert_eq!((&ended["status"], text(&ended)), (&json!("completed"), "hello"));
    assert_eq!(ended["usage"]["output_tokens"], 6);
    let follows = rig
        .create(turn("x"), json!({"previous_response_id": begun["id"]}))
        .await;
    assert_eq!(follows["status"], "completed");
    // Cancelled when it is over: left as it is.
    let late = rig.ask("POST", &path(&begun["id"], "/cancel"), &Value::Null).await;
    assert_eq!((late.status, late.json()), (200, ended));
    let streamed = rig.ask("GET", &path(&begun["id"], "?stream=true"), &Value::Null).await;
    assert_eq!((streamed.status, &streamed.error()["param"]), (400, &json!("stream")));
    assert_eq!(rig.gateway.backend.records().len(), 2);
}

#[tokio::test]
async fn a_background_response_is_cancelled_with_what_it_has() {
    let rig = Rig::start().await;
    let begun = rig
        .create(Script::SayThenHang(ids("hel")), json!({"background": true}))
        .await;
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let too_early = rig.post(json!({"previous_response_id": begun["id"]})).await;
    assert_eq!(
        (too_early.status, &too_early.error()["param"]),
        (400, &json!("previous_response_id"))
    );
    let cancelled = rig.ask("POST", &path(&begun["id"], "/cancel"), &Value::Null).await;
    assert_eq!(cancelled.status, 200, "{}", cancelled.text());
    let response = cancelled.json();
    check(&RESPONSE, &response);
    assert_eq!((&response["status"], text(&response)), (&json!("cancelled"), "hel"));
    assert_eq!(rig.get(&begun["id"]).await, response);
    rig.gateway
        .backend
        .until("it is settled", |backend| !backend.records().is_empty())
        .await;
    let record = &rig.gateway.backend.records()[0];
    // Charged is what is stored.
    assert_eq!((record.status(), record.completion_tokens), (UsageStatus::Cancelled, 3));
    // In the queue, too.
    let queued = rig.create(Script::Queue, json!({"background": true})).await;
    assert_eq!(queued["status"], "queued");
    let deleted = rig.ask("DELETE", &path(&queued["id"], ""), &Value::Null).await;
    assert_eq!(deleted.status, 200, "{}", deleted.text());
    assert_eq!(rig.ask("GET", &path(&queued["id"], ""), &Value::Null).await.status, 404);
    assert_eq!(rig.gateway.backend.left.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn the_events_of_a_background_response_can_be_had_again() {
    let rig = Rig::start().await;
    rig.gateway.backend.script(turn("hello"));
    let answer = rig.post(json!({"background": true, "stream": true})).await;
    let all = events(&answer);
    assert_eq!(all[1]["type"], "response.queued");
    assert_eq!(all.last().unwrap()["type"], "response.completed");
    let id = &all[0]["response"]["id"];
    rig.ended(id).await;
    let again = events(&rig.ask("GET", &path(id, "?stream=true"), &Value::Null).await);
    assert_eq!(again, all);
    let rest = events(
        &rig.ask("GET", &path(id, "?stream=true&starting_after=4"), &Value::Null)
            .await,
    );
    assert_eq!(rest, all[5..]);
    let wrong = rig.ask("GET", &path(id, "?starting_after=4"), &Value::Null).await;
    assert_eq!((wrong.status, &wrong.error()["param"]), (400, &json!("starting_after")));
}

#[tokio::test]
async fn background_failures() {
    let rig = Rig::start().await;
    // At once: an error, and nothing is left.
    rig.gateway
        .backend
        .script(Script::Refuse(BackendError::NoWorker { model: "m".into() }));
    assert_eq!(rig.post(json!({"background": true})).await.status, 503);
    assert_eq!(rig.post(json!({"background": true, "model": "odd"})).await.status, 404);
    // Later: a response that says so.
    let begun = rig
        .create(Script::SayThenVanish(ids("hel")), json!({"background": true}))
        .await;
    let failed = rig.ended(&begun["id"]).await;
    assert_eq!(
        (&failed["status"], &failed["error"]["code"]),
        (&json!("failed"), &json!("server_error"))
    );
}

#[tokio::test]
async fn another_coordinator_finds_cancels_and_buries() {
    // Two gateways over one state: the disk is shared by handing the chunks over.
    let store = Arc::new(MemoryStore::default());
    let (here, backend) = Rig::with(GatewayConfig::default(), store.clone()).await;
    let other = {
        let second = MockBackend {
            chunks: backend.chunks.clone(),
            ..MockBackend::default()
        };
        second.context_length.store(4096, Ordering::SeqCst);
        assert!(second.store.set(Arc::new(store.next_member())).is_ok());
        let config = GatewayConfig {
            api_key: Some(OPERATOR.into()),
            ..GatewayConfig::default()
        };
        Rig {
            gateway: TestGateway::over(config, Arc::new(second)).await,
            key: here.key.clone(),
        }
    };
    let begun = here
        .create(
            Script::SayThenHang(ids("hel")),
            json!({"background": true, "stream": false}),
        )
        .await;
    assert_eq!(other.get(&begun["id"]).await["status"], "in_progress");
    let cancelled = other.ask("POST", &path(&begun["id"], "/cancel"), &Value::Null).await;
    assert_eq!(cancelled.json()["status"], "cancelled", "{}", cancelled.text());
    // The run finds out and stops; what stands is what was written first.
    backend
        .until("the run stops", |backend| backend.cancelled.load(Ordering::SeqCst) == 1)
        .await;
    assert_eq!(here.ended(&begun["id"]).await["status"], "cancelled");
    let done = here.create(turn("x"), json!({})).await;
    assert_eq!(text(&other.get(&done["id"]).await), "x");
    // A member that was started again runs nothing of what it ran before.
    let lost = here
        .create(Script::SayThenHang(ids("hel")), json!({"background": true}))
        .await;
    assert_eq!(other.get(&lost["id"]).await["status"], "in_progress");
    let again = {
        let again = MockBackend {
            chunks: backend.chunks.clone(),
            ..MockBackend::default()
        };
        assert!(again.store.set(store.clone()).is_ok());
        let config = GatewayConfig {
            api_key: Some(OPERATOR.into()),
            ..GatewayConfig::default()
        };
        Rig {
            gateway: TestGateway::over(config, Arc::new(again)).await,
            key: here.key.clone(),
        }
    };
    let failed = again.get(&lost["id"]).await;
    assert_eq!(
        (&failed["status"], &failed["error"]["code"]),
        (&json!("failed"), &json!("server_error"))
    );
    assert_eq!(other.get(&lost["id"]).await, failed);
    let streamed = {
        backend.script(turn("hello"));
        events(&here.post(json!({"background": true, "stream": true})).await)
    };
    let id = &streamed[0]["response"]["id"];
    here.ended(id).await;
    assert_eq!(
        events(&other.ask("GET", &path(id, "?stream=true"), &Value::Null).await),
        streamed
    );
}

#[tokio::test]
async fn bad_requests_are_named_and_unknown_ids_are_404() {
    let rig = Rig::start().await;
    for (extra, param) in [
        (json!({"input": []}), "input"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"input": "x".repeat(5000)}), "input"),
        (json!({"max_output_tokens": 5000}), "max_output_tokens"),
        (json!({"reasoning": {"effort": "low"}}), "reasoning.effort"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
    ] {
        let answer = rig.post(extra.clone()).await;
        assert_eq!(
            (answer.status, &answer.error()["param"]),
            (400, &json!(param)),
            "{extra}"
        );
    }
    for id in ["resp_0123456789abcdef0123456789abcdef", "x", "resp_%2e%2e"] {
        assert_eq!(rig.ask("GET", &format!("{PATH}/{id}"), &Value::Null).await.status, 404);
    }
    let tokens = rig
        .ask(
            "POST",
            "/v1/responses/input_tokens",
            &json!({"model": "m", "input": "hi"}),
        )
        .await;
    assert_eq!(tokens.status, 200, "{}", tokens.text());
    rig.create(turn("x"), json!({})).await;
    let prompt = rig.gateway.backend.last_job().prompt.len();
    assert_eq!(
        tokens.json(),
        json!({"object": "response.input_tokens", "input_tokens": prompt})
    );
}

#[test]
fn every_field_of_openais_is_in_the_table() {
    let Some(description) = DESCRIPTION.as_ref() else {
        return;
    };
    let schemas = &description["components"]["schemas"];
    let mut names = BTreeSet::new();
    properties(&schemas["CreateResponse"], schemas, &mut names);
    assert!(names.len() > 20, "{names:?}");
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/responses.md");
    let docs = std::fs::read_to_string(docs).expect("docs/responses.md");
    let missing: Vec<_> = names
        .iter()
        .filter(|name| !docs.contains(&format!("| `{name}` |")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn properties(schema: &Value, all: &Value, names: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        properties(&all[reference.rsplit('/').next().unwrap()], all, names);
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        properties(part, all, names);
    }
    let fields = schema["properties"].as_object();
    names.extend(fields.into_iter().flat_map(|fields| fields.keys().cloned()));
}
