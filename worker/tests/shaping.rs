//! Penalties, log probabilities and grammars over real sockets: the same from one worker, from a prefill worker with a decode
//! worker, and from a worker that goes on where another stopped; and a grammar that is none is the client's to hear of.

mod support;

use baton_engine::{MockConfig, MockEngine, MockTiming};
use baton_grammar::Vocabulary;
use baton_grammar::vocabulary::eos_ids;
use baton_proto::worker::grammar::Kind;
use baton_proto::worker::{FinishReason, Generate, Grammar, LogitBias, Sampling};
use baton_worker::{WorkerConfig, WorkerRole};
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Answer, Cell, Node, request, within};

const SCHEMA: &str = r#"{"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0,
    "maximum": 99}, "of": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}, "required": ["ok", "n", "of"],
    "additionalProperties": false}"#;

/// Where the vocabulary of the model in the repository is.
fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model")
}

/// A mock that speaks with that vocabulary.
fn engine() -> MockEngine {
    MockEngine::new(MockConfig {
        total_blocks: 512,
        vocab_size: 1024,
        timing: MockTiming::default(),
        ..MockConfig::default()
    })
    .expect("a valid mock")
}

async fn worker(cell: &Cell, id: &str, role: WorkerRole) -> Node {
    let config = WorkerConfig {
        model_path: demo(),
        ..cell.config(id, role)
    };
    cell.worker_with(config, engine(), [7; 32]).await
}

fn grammar(n: u64) -> Option<Grammar> {
    let kind = match n % 4 {
        0 => Kind::JsonSchema(SCHEMA.to_owned()),
        1 => Kind::Regex("([a-z]{1,9} ){2,30}end".to_owned()),
        2 => Kind::Lark("start: \"[\" (start (\",\" start)*)? \"]\"".to_owned()),
        _ => return None,
    };
    Some(Grammar { kind: Some(kind) })
}

/// The `n`th request of the usual mixture, with everything that changes logits.
fn shaped(n: u64) -> Generate {
    let mut request = request(n);
    request.max_tokens = 120;
    request.stop_token_ids = eos_ids(&demo());
    request.sampling = Some(Sampling {
        temperature: (n % 3) as f32 * 0.5,
        top_p: 0.97,
        min_p: 0.001,
        seed: n,
        presence_penalty: 0.5,
        frequency_penalty: (n % 5) as f32 * 0.25,
        repetition_penalty: 1.0 + (n % 2) as f32 * 0.3,
        logit_bias: vec![LogitBias {
            token_id: 40 + n as u32,
            bias: -50.0,
        }],
        min_tokens: n as u32 % 9,
        top_logprobs: (n % 3 > 0).then_some(n as u32 % 5),
        grammar: grammar(n),
        ..Sampling::default()
    });
    request
}

fn same(got: &Answer, expected: &Answer, what: &str) {
    assert_eq!(got.tokens, expected.tokens, "{what}: {}", got.finish.error);
    assert_eq!(got.logprobs, expected.logprobs, "{what}");
    assert_eq!(got.finish.reason, expected.finish.reason, "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handed_over_or_gone_on_with_the_answer_is_the_same() {
    let cell = Cell::new().await;
    let lone = worker(&cell, "lone", WorkerRole::Combined).await;
    let decode = worker(&cell, "decode", WorkerRole::Decode).await;
    let prefill = worker(&cell, "prefill", WorkerRole::Prefill).await;
    let (alone, pair) = (cell.gateway(&lone).await, cell.gateway(&decode).await);
    let vocabulary = Vocabulary::load(&demo(), &eos_ids(&demo())).unwrap();
    let (mut handed_over, mut objects) = (0, 0);
    for n in 0..40 {
        let request = shaped(n);
        let expected = alone.generate(request.clone()).await;
        assert_ne!(
            expected.finish.reason(),
            FinishReason::Error,
            "{}",
            expected.finish.error
        );
        let asks = request.sampling.as_ref().unwrap().top_logprobs.is_some();
        assert_eq!(expected.logprobs.len(), if asks { expected.tokens.len() } else { 0 });
        let with_peer = Generate {
            prefill_peer: Some(prefill.peer()),
            ..request.clone()
        };
        let got = pair.generate(with_peer.clone()).await;
        same(&got, &expected, &format!("request {n}, handed over"));
        handed_over += usize::from(got.finish.prefill_worker_id == "prefill");
        // Another worker goes on after some tokens, with and without a peer.
        let cut = 1 + n as usize * 3 % expected.tokens.len();
        if cut == expected.tokens.len() {
            continue;
        }
        for request in [request, with_peer] {
            let mut rest = Generate {
                emitted_tokens: cut as u32,
                max_tokens: request.max_tokens - cut as u32,
                ..request
            };
            rest.prompt.extend(&expected.tokens[..cut]);
            let mut got = pair.generate(rest).await;
            got.tokens.splice(..0, expected.tokens[..cut].iter().copied());
            let told = if asks { cut } else { 0 };
            got.logprobs.splice(..0, expected.logprobs[..told].iter().cloned());
            same(&got, &expected, &format!("request {n}, gone on with after {cut}"));
        }
        if n % 4 == 0 && expected.finish.reason() == FinishReason::Stop {
            let text = vocabulary.text(&expected.tokens);
            let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
            assert!(value["ok"].is_boolean() && value["n"].as_u64().is_some_and(|n| n < 100));
            objects += 1;
        }
    }
    assert!(
        handed_over > 20 && objects > 0,
        "{handed_over} hand-overs, {objects} objects"
    );
    for node in [&lone, &decode, &prefill] {
        let load = cell.at_rest(&node.id).await;
        assert_eq!(load.free_blocks + load.cached_blocks, 512, "{}", node.id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_worker_can_follow_is_refused_by_name() {
    let cell = Cell::new().await;
    let node = worker(&cell, "lone", WorkerRole::Combined).await;
    let blind = cell.worker("blind", WorkerRole::Combined, engine()).await;
    let gateway = cell.gateway(&node).await;
    let with = |change: &dyn Fn(&mut Sampling)| {
        let mut request = shaped(3);
        change(request.sampling.as_mut().unwrap());
        request
    };
    let kinds = [
        Kind::Regex("(".to_owned()),
        Kind::JsonSchema("{\"type\": 7}".to_owned()),
        Kind::JsonSchema("{".repeat(100_000)),
        Kind::Lark("start: \"a\" %%".to_owned()),
    ];
    let mut refused: Vec<(Generate, &str)> = kinds
        .into_iter()
        .map(|kind| {
            let request = with(&|sampling| {
                sampling.grammar = Some(Grammar {
                    kind: Some(kind.clone()),
                })
            });
            (request, "grammar")
        })
        .collect();
    refused.push((
        with(&|sampling| sampling.frequency_penalty = f32::NAN),
        "frequency_penalty",
    ));
    refused.push((with(&|sampling| sampling.logit_bias[0].token_id = 5000), "logit_bias"));
    for (request, field) in refused {
        let answer = gateway.generate(request).await;
        assert_eq!(answer.finish.reason(), FinishReason::Error);
        assert_eq!(
            (&answer.finish.invalid_field[..], answer.finish.retryable),
            (field, false)
        );
        assert!(!answer.finish.error.is_empty() && answer.finish.error.len() < 600);
    }
    // A worker that has no vocabulary says that.
    let answer = cell.gateway(&blind).await.generate(shaped(0)).await;
    assert_eq!(answer.finish.invalid_field, "grammar");
    assert!(
        answer.finish.error.contains("tokenizer.json"),
        "{}",
        answer.finish.error
    );
    // And goes on serving.
    assert_eq!(gateway.generate(shaped(0)).await.finish.error, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_cancelled_while_its_grammar_compiles_is_gone() {
    let cell = Cell::new().await;
    let node = worker(&cell, "lone", WorkerRole::Combined).await;
    let gateway = cell.gateway(&node).await;
    let mut ends = Vec::new();
    for n in 0..40u64 {
        let mut request = shaped(0);
        request.max_tokens = 400;
        // Each its own grammar, so that each compiles.
        let regex = format!("(x{{1,3}} ){{{},400}}", 100 + n);
        request.sampling.as_mut().unwrap().grammar = Some(Grammar {
            kind: Some(Kind::Regex(regex)),
        });
        let (id, answer) = gateway.submit(request).await;
        if n % 3 == 0 {
            tokio::time::sleep(Duration::from_millis(n % 7)).await;
        }
        gateway.cancel(id).await;
        ends.push(answer);
    }
    for end in ends {
        let answer = within("the end", end).await.expect("the stream stays up");
        assert_eq!(
            answer.finish.reason(),
            FinishReason::Cancelled,
            "{}",
            answer.finish.error
        );
    }
    // A caller that hangs up meanwhile leaves nothing behind either.
    let hasty = cell.gateway(&node).await;
    for _ in 0..10 {
        hasty.submit(shaped(0)).await;
    }
    drop(hasty);
    let load = cell.at_rest(&node.id).await;
    assert_eq!(load.free_blocks + load.cached_blocks, 512);
}
