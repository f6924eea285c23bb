//! P2 by experiment: the same requests undisturbed, and then while workers are killed, stopped and cut off at all moments.
//! Text, finish and usage must be the same to the byte, and every block accounted for afterwards.
//!
//! The normal run is a small one. A large one, with a report of how long streams stood still:
//!
//! ```console
//! $ BATON_SURVIVAL_STREAMS=1000 BATON_SURVIVAL_REPORT=report.txt cargo test --release -p baton --test e2e proof -- --nocapture
//! ```
//!
//! `BATON_SURVIVAL_SEED` gives other requests and moments. Cutting needs a network namespace (`unshare -rn`, `ip`,
//! `nsenter`); where the system allows none, workers are killed and stopped only, and the run says so.

use super::support::http::{Chat, ChatStream, chat_body};
use super::support::rig::{Rig, has_own_network, in_own_network};
use super::support::signal;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Streams of the normal run: five faults.
const STREAMS: usize = 40;
/// Streams at a time, all on the cluster when the fault comes.
const TOGETHER: usize = 8;
/// The same in a large run.
const TOGETHER_LARGE: usize = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
    Cut,
}

/// When the fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// As soon as the requests are sent.
    BeforeFirst,
    /// While prompts are computed and handed over.
    Transfer,
    /// In the middle of answers.
    Token,
    /// When an answer has all but its last tokens.
    Last,
}

const FAULTS: [Fault; 3] = [Fault::Kill, Fault::Stop, Fault::Cut];
const MOMENTS: [Moment; 4] = [Moment::Token, Moment::BeforeFirst, Moment::Transfer, Moment::Last];
/// What the normal run does.
const SMALL: [(Fault, &str, Moment); 5] = [
    (Fault::Cut, "decode", Moment::Token),
    (Fault::Stop, "decode", Moment::BeforeFirst),
    (Fault::Kill, "decode", Moment::Token),
    (Fault::Stop, "prefill", Moment::Transfer),
    (Fault::Cut, "prefill", Moment::Transfer),
];

fn mix(seed: u64, stream: u64) -> u64 {
    let mut z = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn request(seed: u64, i: usize) -> Value {
    let r = |stream: u64| mix(seed * 1_000_003 + i as u64, stream);
    // No two begin alike, so that no prefix cache decides what `usage` says.
    let mut prompt = format!("{} {} {}", r(1) % 1_000_000, i, r(2) % 1_000_000);
    for w in 0..10 + r(3) % 300 {
        let word = ["code", "list", "baton", "what", "is", "7", "and"][(mix(r(4), w) % 7) as usize];
        let _ = write!(prompt, " {word}");
    }
    let mut extra = json!({"max_tokens": 30 + r(5) % 90, "ignore_eos": !r(6).is_multiple_of(4)});
    if !r(7).is_multiple_of(2) {
        extra["temperature"] = json!(0.5 + (r(8) % 8) as f64 / 10.0);
        extra["seed"] = json!(r(9) % 1_000_000);
        extra["top_p"] = json!([1.0, 0.9][(r(10) % 2) as usize]);
    }
    // Some end on a stop string, which may span tokens.
    if r(11).is_multiple_of(5) {
        let stop = ["the end", ". T", "qu"][(r(12) % 3) as usize];
        extra["stop"] = json!([stop]);
    }
    chat_body(&prompt, extra)
}

/// An answer, and the longest time between two of its chunks.
struct Streamed {
    chat: Chat,
    stall: Duration,
}

async fn stream(url: &str, body: &Value, chunks: &AtomicUsize) -> Streamed {
    let mut last = Instant::now();
    let mut stall = Duration::ZERO;
    let mut stream = ChatStream::start(url, body).await;
    let mut chat = Chat {
        text: String::new(),
        finish_reason: String::new(),
        usage: Value::Null,
    };
    while let Some(chunk) = stream.next().await {
        assert!(chunk.get("error").is_none(), "{chunk}");
        stall = stall.max(last.elapsed());
        last = Instant::now();
        chunks.fetch_add(1, Ordering::Relaxed);
        chat.take(&chunk);
    }
    Streamed { chat, stall }
}

/// Sends requests `from..to` at once.
fn start(url: &str, bodies: &[Value]) -> Vec<(tokio::task::JoinHandle<Streamed>, Arc<AtomicUsize>)> {
    let run = |body: &Value| {
        let (url, body, chunks) = (url.to_owned(), body.clone(), Arc::new(AtomicUsize::new(0)));
        let counted = chunks.clone();
        let task = tokio::spawn(async move { stream(&url, &body, &counted).await });
        (task, chunks)
    };
    bodies.iter().map(run).collect()
}

/// What one kind of fault did to streams.
#[derive(Default)]
struct Tally {
    faults: usize,
    streams: usize,
    /// Longest pauses, of the streams that paused longer than any did undisturbed.
    stalls_ms: Vec<u128>,
}

fn line(out: &mut String, name: &str, tally: &mut Tally) {
    tally.stalls_ms.sort_unstable();
    let at = |share: f64| {
        let last = tally.stalls_ms.len().saturating_sub(1);
        tally
            .stalls_ms
            .get((share * last as f64).round() as usize)
            .copied()
            .unwrap_or(0)
    };
    let _ = writeln!(
        out,
        "{name:24} {:6} {:8} {:10} {:8} {:8} {:8}",
        tally.faults,
        tally.streams,
        tally.stalls_ms.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn survives() {
    let setting = |name: &str| std::env::var(name).ok();
    let number = |name: &str| setting(name).map(|text| text.parse::<usize>().expect("a number"));
    let streams = number("BATON_SURVIVAL_STREAMS");
    if !has_own_network()
        && tokio::task::spawn_blocking(|| in_own_network("proof::survives"))
            .await
            .expect("it ran")
    {
        return;
    }
    let seed = number("BATON_SURVIVAL_SEED").unwrap_or(0) as u64;
    let together = if streams.is_some() { TOGETHER_LARGE } else { TOGETHER };
    let bodies: Vec<Value> = (0..streams.unwrap_or(STREAMS)).map(|i| request(seed, i)).collect();

    // Undisturbed, on caches as cold as they will be.
    let rig = Rig::start(2, 2).await;
    let (mut expected, mut usual) = (Vec::new(), Duration::ZERO);
    for bodies in bodies.chunks(together) {
        for (task, _) in start(&rig.url, bodies) {
            let Streamed { chat, stall } = task.await.expect("no request fails");
            expected.push(chat);
            usual = usual.max(stall);
        }
    }
    rig.all_ready().await;
    drop(rig);

    let mut rig = Rig::start(2, 2).await;
    let mut tallies: Vec<(String, Tally)> = Vec::new();
    let cuts = has_own_network();
    for (round, bodies) in bodies.chunks(together).enumerate() {
        let (fault, role, moment) = match streams {
            None => SMALL[round % SMALL.len()],
            Some(_) => {
                // Every combination once in 24 rounds; other seeds begin elsewhere.
                let round = round + seed as usize * 5;
                let role = ["decode", "prefill"][round / 3 % 2];
                (FAULTS[round % 3], role, MOMENTS[round / 6 % 4])
            }
        };
        let fault = if fault == Fault::Cut && !cuts {
            Fault::Stop
        } else {
            fault
        };
        let r = |stream: u64| mix(seed + round as u64 * 7919, 100 + stream);
        let victim = rig.of_role(role)[(r(1) % 2) as usize];
        let mut running = start(&rig.url, bodies);
        let at = (r(2) % running.len() as u64) as usize;
        let watched = &running[at];
        let max = bodies[at]["max_tokens"].as_u64().expect("a count") as usize;
        let chunks = match moment {
            Moment::BeforeFirst | Moment::Transfer => 0,
            Moment::Token => 2 + (r(3) % 20) as usize,
            Moment::Last => max.saturating_sub(2),
        };
        while watched.1.load(Ordering::Relaxed) < chunks && !watched.0.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if moment == Moment::Transfer {
            tokio::time::sleep(Duration::from_millis(5 + r(4) % 150)).await;
        }
        match fault {
            Fault::Kill => rig.kill(victim),
            Fault::Stop => signal(rig.pid(victim), Signal::STOP),
            Fault::Cut => rig.cut(victim, true),
        }
        let mut stalls_ms = Vec::new();
        for (i, (task, _)) in running.drain(..).enumerate() {
            let Streamed { chat, stall } = task.await.expect("no request fails");
            let index = round * together + i;
            assert_eq!(
                chat, expected[index],
                "{fault:?} of {role} at {moment:?}, request {index}: {}",
                bodies[i]
            );
            if stall > usual {
                stalls_ms.push(stall.as_millis());
            }
        }
        match fault {
            Fault::Kill => rig.restart(victim),
            Fault::Stop => signal(rig.pid(victim), Signal::CONT),
            Fault::Cut => rig.cut(victim, false),
        }
        // The victim too is used again, and nothing has leaked on anybody.
        rig.all_ready().await;
        for name in [
            format!("{fault:?} {role}").to_lowercase(),
            format!("{fault:?} {role}, {moment:?}").to_lowercase(),
        ] {
            if !tallies.iter().any(|(known, _)| *known == name) {
                tallies.push((name.clone(), Tally::default()));
            }
            if let Some((_, tally)) = tallies.iter_mut().find(|(known, _)| *known == name) {
                tally.faults += 1;
                tally.streams += bodies.len();
                tally.stalls_ms.extend(&stalls_ms);
            }
        }
    }
    let mut report = format!(
        "{} streams, {together} at a time, seed {seed}; 2 prefill and 2 decode workers{}\n\
         text, finish_reason and usage of every stream are those of the undisturbed run; longest pause there: {} ms\n\
         stall: longest pause of a stream, in ms, over the streams that paused longer than that\n\n\
         {:24} faults  streams    stalled      p50      p99      max\n",
        bodies.len(),
        if cuts {
            ""
        } else {
            "; no network of its own, so nothing was cut"
        },
        usual.as_millis(),
        "fault",
    );
    tallies.sort_by(|a, b| (a.0.contains(','), &a.0).cmp(&(b.0.contains(','), &b.0)));
    for (name, tally) in &mut tallies {
        line(&mut report, name, tally);
    }
    println!("{report}");
    if let Some(path) = setting("BATON_SURVIVAL_REPORT") {
        std::fs::write(path, report).expect("writable");
    }
}
