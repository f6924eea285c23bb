//! That the events of a response come in OpenAI's order and agree with the whole response, whatever pieces they are made of.

use super::*;
use crate::generation::output::{End, TokenText};
use proptest::prelude::*;

const ID: &str = "resp_0123456789abcdef0123456789abcdef";

fn face() -> Face {
    Face {
        id: ID.into(),
        created_at: 7,
        echo: serde_json::Map::from_iter([("model".to_owned(), json!("m"))]),
    }
}

fn read(frames: &mut Frames) -> Vec<Json> {
    let mut events = Vec::new();
    while let Some(frame) = frames.pop() {
        let text = String::from_utf8(frame.to_vec()).unwrap();
        let (name, data) = text.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let event: Json = serde_json::from_str(data.trim_end()).unwrap();
        assert_eq!(event["type"], name);
        events.push(event);
    }
    events
}

fn piece(deltas: Vec<Delta>) -> Piece {
    Piece {
        deltas,
        ..Piece::default()
    }
}

fn text(text: &str) -> Delta {
    Delta::Text(text.into())
}

fn call(index: u32) -> Delta {
    Delta::ToolCall {
        index,
        id: format!("call_{index}"),
        name: "f".into(),
    }
}

fn arguments(index: u32, json: &str) -> Delta {
    Delta::ToolArguments {
        index,
        json: json.into(),
    }
}

fn outcome(reason: EndReason) -> Outcome {
    Outcome {
        ends: vec![End { reason, stop: None }],
        counts: Counts {
            prompt: 5,
            cached: 2,
            completion: 3,
            reasoning: 1,
        },
    }
}

/// All events of an answer that comes in these pieces.
fn run(style: Style, pieces: Vec<Vec<Delta>>, reason: EndReason) -> Vec<Json> {
    let (mut events, mut frames) = (Events::new(face(), style), Frames::default());
    events.begin(&mut frames);
    events.started(&mut frames);
    for deltas in pieces {
        events.piece(piece(deltas), &mut frames);
    }
    let outcome = outcome(reason);
    let response = events.shown(&status_of(&outcome), Some(outcome.counts), 9);
    events.end(&outcome, &response, &mut frames);
    read(&mut frames)
}

fn names(events: &[Json]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

/// The invariants of the module, whatever the answer.
fn check(events: &[Json]) {
    let mut open: Option<(usize, String)> = None;
    let mut done = Vec::new();
    for (at, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], at, "{event}");
        let name = event["type"].as_str().unwrap();
        match name {
            "response.output_item.added" => {
                assert!(open.is_none(), "two items are open: {event}");
                assert_eq!(event["output_index"], done.len());
                assert_eq!(event["item"]["status"], "in_progress");
                open = Some((done.len(), String::new()));
            }
            "response.output_item.done" => {
                let (index, joined) = open.take().expect("an item is open");
                assert_eq!(event["output_index"], index);
                let item = &event["item"];
                let whole = item["arguments"].as_str().or(item["content"][0]["text"].as_str());
                assert_eq!(whole, Some(joined.as_str()), "the deltas are the whole");
                done.push(item.clone());
            }
            _ if name.ends_with(".delta") => {
                let (index, joined) = open.as_mut().expect("an item is open");
                assert_eq!(event["output_index"], *index);
                joined.push_str(event["delta"].as_str().unwrap());
            }
            _ if name.ends_with(".done") && name != "response.content_part.done" => {
                let joined = &open.as_ref().expect("an item is open").1;
                let whole = event["text"].as_str().or(event["arguments"].as_str());
                assert_eq!(whole, Some(joined.as_str()));
            }
            _ => {}
        }
    }
    let last = events.last().unwrap();
    assert!(open.is_none());
    assert_eq!(last["response"]["output"], json!(done));
}

#[test]
fn a_text_has_openais_sequence() {
    let events = run(
        Style::default(),
        vec![vec![text("he")], vec![text("llo")]],
        EndReason::Stop,
    );
    check(&events);
    assert_eq!(
        names(&events),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let response = &events.last().unwrap()["response"];
    assert_eq!(response["status"], "completed");
    assert_eq!(response["completed_at"], 9);
    assert_eq!(response["output"][0]["content"][0]["text"], "hello");
    assert_eq!(response["output"][0]["id"], events[4]["item_id"]);
    assert_eq!(response["usage"]["total_tokens"], 8);
    assert!(events[0]["response"].get("usage").is_none());
}

#[test]
fn thoughts_text_and_calls_are_items_of_their_own() {
    let deltas = vec![
        vec![Delta::Reasoning("hm".into())],
        vec![text("\n")],
        vec![text("I look")],
        vec![text("."), call(0), arguments(0, "{\"a\"")],
        vec![arguments(0, ":1}"), text("\n"), call(1), arguments(1, "{}")],
    ];
    let events = run(Style::default(), deltas, EndReason::ToolCalls);
    check(&events);
    let output = &events.last().unwrap()["response"]["output"];
    let kinds: Vec<_> = output
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["type"].clone())
        .collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
    assert_eq!(output[1]["content"][0]["text"], "\nI look.");
    assert_eq!(
        (&output[2]["call_id"], &output[2]["arguments"]),
        (&json!("call_0"), &json!("{\"a\":1}"))
    );
    assert_eq!(events.last().unwrap()["response"]["status"], "completed");
}

#[test]
fn what_is_cut_short_says_so() {
    let events = run(Style::default(), vec![vec![text("hel")]], EndReason::Length);
    check(&events);
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(
        last["response"]["incomplete_details"],
        json!({"reason": "max_output_tokens"})
    );
    assert_eq!(last["response"]["output"][0]["status"], "incomplete");
}

#[test]
fn blank_answers() {
    let nothing = run(Style::default(), vec![], EndReason::Stop);
    check(&nothing);
    assert_eq!(nothing.last().unwrap()["response"]["output"], json!([]));
    let blank = run(
        Style::default(),
        vec![vec![text(" ")], vec![text("\n")]],
        EndReason::Stop,
    );
    check(&blank);
    assert_eq!(
        blank.last().unwrap()["response"]["output"][0]["content"][0]["text"],
        " \n"
    );
}

#[test]
fn a_failure_is_told_twice_and_is_the_end() {
    let (mut events, mut frames) = (Events::new(face(), Style::default()), Frames::default());
    events.begin(&mut frames);
    events.started(&mut frames);
    events.piece(piece(vec![text("hel")]), &mut frames);
    events.fail(&ApiError::unavailable("lost"), &mut frames);
    let events = read(&mut frames);
    let (error, failed) = (&events[events.len() - 2], &events[events.len() - 1]);
    assert_eq!((&error["type"], &error["message"]), (&json!("error"), &json!("lost")));
    assert_eq!(failed["type"], "response.failed");
    assert_eq!(
        failed["response"]["error"],
        json!({"code": "server_error", "message": "lost"})
    );
    assert_eq!(failed["response"]["output"][0]["content"][0]["text"], "hel");
    assert_eq!(failed["sequence_number"], events.len() - 1);
}

#[test]
fn log_probabilities_go_with_the_text_they_are_of() {
    let (mut events, mut frames) = (Events::new(face(), Style::default()), Frames::default());
    let token = |text: &str| TokenLogprob {
        token: TokenText {
            id: 1,
            text: text.into(),
            bytes: text.as_bytes().to_vec(),
        },
        logprob: f32::NEG_INFINITY,
        top: Vec::new(),
    };
    let with = |deltas, logprobs| Piece {
        deltas,
        logprobs,
        ..Piece::default()
    };
    events.piece(
        with(vec![Delta::Reasoning("hm".into())], vec![token("hm")]),
        &mut frames,
    );
    // A part of a character shows no text yet.
    events.piece(with(vec![], vec![token("h")]), &mut frames);
    events.piece(with(vec![text("hi")], vec![token("i")]), &mut frames);
    let shown = events.shown(&Status::Completed, None, 0);
    let logprobs = shown["output"][1]["content"][0]["logprobs"].as_array().unwrap();
    let tokens: Vec<_> = logprobs.iter().map(|one| one["token"].as_str().unwrap()).collect();
    assert_eq!(tokens, ["h", "i"]);
    assert_eq!(logprobs[0]["logprob"], -9999.0);
}

#[test]
fn padding_hides_lengths() {
    let style = Style {
        obfuscation: true,
        ..Style::default()
    };
    let events = run(style, vec![vec![text("a")], vec![text("abcdefgh")]], EndReason::Stop);
    check(&events);
    let lengths: Vec<usize> = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event.to_string().len() % OBFUSCATION_BYTES)
        .collect();
    assert_eq!(lengths, [0, 0]);
}

fn deltas() -> impl Strategy<Value = Vec<Vec<Delta>>> {
    let delta = prop_oneof![
        "[a \n]{1,3}".prop_map(Delta::Text),
        "[a \n]{1,3}".prop_map(Delta::Reasoning),
        ("[a-f]{1,3}", "[0-9]{1,3}").prop_map(|(name, id)| Delta::ToolCall { index: 0, id, name }),
        "[{}:1]{1,3}".prop_map(|json| Delta::ToolArguments { index: 0, json }),
    ];
    proptest::collection::vec(proptest::collection::vec(delta, 0..4), 0..8)
}

proptest! {
    #[test]
    fn every_answer_keeps_the_invariants(pieces in deltas(), length: bool, background: bool) {
        let style = Style { background, ..Style::default() };
        let reason = if length { EndReason::Length } else { EndReason::Stop };
        let events = run(style, pieces.clone(), reason);
        check(&events);
        // The same, however it is cut into pieces, and whether it is written or not.
        let single = pieces.into_iter().flatten().map(|delta| vec![delta]).collect();
        let again = run(style, single, reason);
        prop_assert_eq!(&events.last().unwrap()["response"], &again.last().unwrap()["response"]);
    }
}
