//! What to run: target, way of arriving, when to stop, shape of the requests. Plain data; the command line that fills
//! it lives in the binary.

use crate::BenchError;
use crate::trace::Trace;
use std::time::Duration;

/// Most clients of a closed loop, and most requests in flight of an open one. One socket each: a common limit of
/// open files is far above, a laptop's ports are not.
pub const IN_FLIGHT_MAX: usize = 8192;
/// Longest synthetic prompt in words: 4 Mi words are past every context length in use.
pub const WORDS_MAX: usize = 4 << 20;

/// One benchmark run.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Base URL, with or without a trailing `/v1`.
    pub url: String,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Model id; `None` asks the server and takes its first.
    pub model: Option<String>,
    /// How requests arrive.
    pub load: Load,
    /// When to stop sending.
    pub stop: Stop,
    /// Shape of synthetic requests; a trace brings its own lengths.
    pub lengths: Lengths,
    /// Ask the server to go on past end-of-sequence, so that every answer has the length asked for.
    pub ignore_eos: bool,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f64,
    /// Seed of prompts, arrivals and (offset by the request's number) sampling.
    pub seed: u64,
    /// A request is good if its first token comes within this; `None` sets no such limit.
    pub ttft_target: Option<Duration>,
    /// ... and the mean time between its tokens is at most this.
    pub tpot_target: Option<Duration>,
    /// Tokens per KV block of the server, for what an infinite cache would hit.
    pub block_size: usize,
    /// Requests sent one after the other before the clock starts; not counted.
    pub warmup: usize,
    /// A request that takes longer has failed.
    pub request_timeout: Duration,
    /// How progress is shown on stderr.
    pub progress: ProgressStyle,
}

/// How requests arrive.
#[derive(Debug, Clone)]
pub enum Load {
    /// `concurrency` clients, each sends its next request when its last is answered.
    Closed {
        /// Number of clients.
        concurrency: usize,
    },
    /// Independent arrivals at `rate` per second on average.
    Poisson {
        /// Requests per second.
        rate: f64,
        /// Requests in flight at most. Past it sending waits, and the wait counts as latency.
        in_flight_max: usize,
    },
    /// The arrivals and lengths of a recorded trace.
    Replay {
        /// The trace.
        trace: Trace,
        /// How much faster than recorded; 1 is as recorded.
        speed: f64,
        /// Factor on the recorded lengths, for models with a shorter context.
        length_scale: f64,
        /// Requests in flight at most, as for Poisson.
        in_flight_max: usize,
    },
}

/// When to stop sending: whichever comes first. Requests in flight are then awaited.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stop {
    /// After this many requests.
    pub requests: Option<u64>,
    /// After this time.
    pub duration: Option<Duration>,
}

/// Shape of synthetic requests.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Prompt length in words, shared prefix included. A common word is about one token in most vocabularies.
    pub input_words: usize,
    /// Leading words that all prompts share.
    pub shared_prefix_words: usize,
    /// They are a system message of their own, as an agent's instructions are, not the beginning of the user's.
    pub shared_system: bool,
    /// `max_tokens` of a request.
    pub output_tokens: u32,
    /// Lengths vary uniformly by this share in both directions; 0 keeps them fixed, below 1.
    pub jitter: f64,
    /// Words sent per token asked for, in traces (whose lengths are tokens).
    pub words_per_token: f64,
    /// Cap on words of one prompt, so that a trace fits a model's context.
    pub input_words_max: usize,
    /// Cap on `max_tokens`, for the same reason.
    pub output_tokens_max: u32,
}

/// How progress is shown on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgressStyle {
    /// A live bar, for terminals.
    Bar,
    /// A line every few seconds, for logs.
    Lines,
    /// Nothing.
    Silent,
}

impl Default for Lengths {
    fn default() -> Self {
        Self {
            input_words: 128,
            shared_prefix_words: 0,
            shared_system: false,
            output_tokens: 64,
            jitter: 0.0,
            words_per_token: 1.0,
            input_words_max: WORDS_MAX,
            output_tokens_max: u32::MAX,
        }
    }
}

impl BenchOptions {
    /// Options for `url` with one client and one request; everything else at its default.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            api_key: None,
            model: None,
            load: Load::Closed { concurrency: 1 },
            stop: Stop {
                requests: Some(1),
                duration: None,
            },
            lengths: Lengths::default(),
            ignore_eos: false,
            temperature: 0.0,
            seed: 0,
            ttft_target: None,
            tpot_target: None,
            block_size: 16,
            warmup: 0,
            request_timeout: Duration::from_secs(600),
            progress: ProgressStyle::Silent,
        }
    }

    /// Refuses what cannot run, naming the flag.
    pub(crate) fn check(&self) -> Result<(), BenchError> {
        let in_flight = |option, value: usize| match value {
            1..=IN_FLIGHT_MAX => Ok(()),
            _ => refuse(option, value, "give a number from 1 to 8192"),
        };
        let positive = |option, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => refuse(option, value, "give a positive number"),
        };
        match &self.load {
            Load::Closed { concurrency } => in_flight("--concurrency", *concurrency)?,
            Load::Poisson { rate, in_flight_max } => {
                positive("--rate", *rate)?;
                in_flight("--in-flight-max", *in_flight_max)?;
            }
            Load::Replay {
                speed,
                length_scale,
                in_flight_max,
                ..
            } => {
                positive("--speed", *speed)?;
                positive("--length-scale", *length_scale)?;
                in_flight("--in-flight-max", *in_flight_max)?;
            }
        }
        let endless = self.stop.requests.is_none() && self.stop.duration.is_none();
        if endless && !matches!(self.load, Load::Replay { .. }) {
            return refuse(
                "--requests",
                "not given",
                "give --requests or --duration, so that the run ends",
            );
        }
        let lengths = &self.lengths;
        if lengths.input_words == 0 || lengths.input_words > WORDS_MAX {
            return refuse("--input-words", lengths.input_words, "give a number from 1 to 4194304");
        }
        if lengths.shared_prefix_words > lengths.input_words {
            let expected = "the shared prefix is part of the prompt, so it is at most --input-words";
            return refuse("--shared-prefix-words", lengths.shared_prefix_words, expected);
        }
        if lengths.output_tokens == 0 {
            return refuse("--output-tokens", 0, "give at least 1");
        }
        if !(0.0..1.0).contains(&lengths.jitter) {
            return refuse("--length-jitter", lengths.jitter, "give a number from 0 to below 1");
        }
        positive("--words-per-token", lengths.words_per_token)?;
        if !(1..=8192).contains(&self.block_size) {
            return refuse("--block-size", self.block_size, "16 is usual, 1 to 8192 are taken");
        }
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return refuse("--temperature", self.temperature, "give 0 or a positive number");
        }
        Ok(())
    }
}

fn refuse<T>(option: &'static str, value: impl ToString, expected: &'static str) -> Result<T, BenchError> {
    Err(BenchError::Option {
        option,
        value: value.to_string(),
        expected,
    })
}
