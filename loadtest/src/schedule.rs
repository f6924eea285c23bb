//! Which request comes when: a pure function from options and request number to body and intended send time. No clock,
//! no sockets; the runner adds those.

use crate::options::{BenchOptions, Lengths, Load};
use crate::prompt::append_words;
use crate::trace::TraceRequest;
use crate::trace_prompts;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

/// Stream of the words that all prompts share; far from request numbers and hash ids.
const SHARED_STREAM: u64 = u64::MAX;
/// Stream of the words that pad a prompt before its own begin.
const WARMUP_STREAM: u64 = 1 << 61;

/// One request to send.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The system message, if there is one.
    pub system: Option<String>,
    /// The user message.
    pub prompt: String,
    /// `max_tokens`.
    pub output_tokens: u32,
    /// Seed for sampling.
    pub seed: u64,
}

/// Makes requests by number.
#[derive(Debug, Clone)]
pub struct Workload {
    seed: u64,
    lengths: Lengths,
    trace: Option<(std::sync::Arc<[TraceRequest]>, f64)>,
    shared: String,
}

impl Workload {
    /// The workload of a run.
    pub fn new(options: &BenchOptions) -> Self {
        let mut shared = String::new();
        append_words(
            &mut shared,
            options.seed,
            SHARED_STREAM,
            options.lengths.shared_prefix_words,
        );
        Self {
            seed: options.seed,
            lengths: options.lengths,
            trace: match &options.load {
                Load::Replay {
                    trace, length_scale, ..
                } => Some((trace.requests.clone(), *length_scale)),
                _ => None,
            },
            shared,
        }
    }

    /// Number of requests the workload can make; `None` is without end.
    pub fn len(&self) -> Option<u64> {
        self.trace.as_ref().map(|(requests, _)| requests.len() as u64)
    }

    /// Request `number`.
    pub fn request(&self, number: u64) -> Planned {
        match &self.trace {
            Some((requests, scale)) => match requests.get(number as usize) {
                Some(recorded) => self.replayed(number, recorded, *scale),
                None => self.synthetic(number),
            },
            None => self.synthetic(number),
        }
    }

    /// Warm-up request `number`: like a synthetic one, with words that no counted request has.
    pub fn warmup(&self, number: u64) -> Planned {
        self.synthetic(WARMUP_STREAM + number)
    }

    fn synthetic(&self, number: u64) -> Planned {
        let lengths = &self.lengths;
        let mut rng = StdRng::seed_from_u64(self.seed ^ number.rotate_left(32));
        let factor = 1.0 + lengths.jitter * rng.random_range(-1.0..=1.0);
        let words = ((lengths.input_words as f64 * factor).round() as usize)
            .max(lengths.shared_prefix_words)
            .clamp(1, lengths.input_words_max.max(1));
        let factor = 1.0 + lengths.jitter * rng.random_range(-1.0..=1.0);
        let output_tokens = (f64::from(lengths.output_tokens) * factor).round() as u32;
        let (system, mut prompt) = if lengths.shared_system && !self.shared.is_empty() {
            (Some(self.shared.clone()), String::new())
        } else {
            (None, self.shared.clone())
        };
        // A message of its own says something.
        let own = words
            .saturating_sub(lengths.shared_prefix_words)
            .max(usize::from(system.is_some()));
        append_words(&mut prompt, self.seed, number, own);
        Planned {
            system,
            ..self.planned(number, prompt, output_tokens)
        }
    }

    fn replayed(&self, number: u64, recorded: &TraceRequest, scale: f64) -> Planned {
        let words_per_token = scale * self.lengths.words_per_token;
        let words_max = self.lengths.input_words_max;
        let prompt = trace_prompts::words(recorded, number, self.seed, words_per_token, words_max);
        let output_tokens = (f64::from(recorded.output_tokens) * scale).round() as u32;
        self.planned(number, prompt, output_tokens)
    }

    fn planned(&self, number: u64, prompt: String, output_tokens: u32) -> Planned {
        Planned {
            system: None,
            prompt,
            output_tokens: output_tokens.clamp(1, self.lengths.output_tokens_max.max(1)),
            seed: self.seed.wrapping_add(number),
        }
    }
}

/// Intended send times of an open loop, from the start of the run.
pub enum Arrivals {
    /// Exponential gaps.
    Poisson {
        /// Source of the gaps.
        rng: Box<StdRng>,
        /// Per second.
        rate: f64,
        /// Time of the last arrival in seconds.
        at_s: f64,
    },
    /// As recorded.
    Trace {
        /// The recorded requests.
        requests: std::sync::Arc<[TraceRequest]>,
        /// How much faster.
        speed: f64,
        /// Number of the next one.
        next: usize,
    },
}

impl Arrivals {
    /// The arrivals of a run; `None` for a closed loop, which has no times of its own.
    pub fn new(options: &BenchOptions) -> Option<Self> {
        match &options.load {
            Load::Closed { .. } => None,
            Load::Poisson { rate, .. } => Some(Self::Poisson {
                rng: Box::new(StdRng::seed_from_u64(options.seed)),
                rate: *rate,
                at_s: 0.0,
            }),
            Load::Replay { trace, speed, .. } => Some(Self::Trace {
                requests: trace.requests.clone(),
                speed: *speed,
                next: 0,
            }),
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        match self {
            Self::Poisson { rng, rate, at_s } => {
                // 1 - [0, 1) is never 0, so the logarithm is finite.
                *at_s += -(1.0 - rng.random::<f64>()).ln() / *rate;
                Duration::try_from_secs_f64(*at_s).ok()
            }
            Self::Trace { requests, speed, next } => {
                let request = requests.get(*next)?;
                *next += 1;
                Duration::try_from_secs_f64(request.at.as_secs_f64() / *speed).ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::parse_trace;

    fn words(planned: &Planned) -> usize {
        planned.prompt.split_whitespace().count()
    }

    #[test]
    fn synthetic_requests_share_what_they_should() {
        let mut options = BenchOptions::new("http://x");
        options.lengths.input_words = 40;
        options.lengths.shared_prefix_words = 30;
        let workload = Workload::new(&options);
        let (a, b) = (workload.request(0), workload.request(1));
        assert_eq!((words(&a), words(&b)), (40, 40));
        let first = |p: &Planned| p.prompt.split(' ').take(30).collect::<Vec<_>>().join(" ");
        assert_eq!(first(&a), first(&b));
        assert_ne!(a.prompt, b.prompt);
        assert_eq!(a, workload.request(0), "a request depends on its number only");
        options.lengths.shared_system = true;
        let workload = Workload::new(&options);
        let (c, d) = (workload.request(0), workload.request(1));
        assert_eq!(c.system, d.system);
        assert_eq!(c.system.map(|text| text.split(' ').count()), Some(30));
        assert!(c.prompt != d.prompt && a.prompt.ends_with(&c.prompt));
    }

    #[test]
    fn jitter_stays_in_its_bounds() {
        let mut options = BenchOptions::new("http://x");
        options.lengths.jitter = 0.5;
        options.lengths.input_words = 100;
        options.lengths.output_tokens = 100;
        let workload = Workload::new(&options);
        let lengths: Vec<_> = (0..200).map(|i| workload.request(i)).collect();
        assert!(
            lengths
                .iter()
                .all(|p| (50..=150).contains(&words(p)) && (50..=150).contains(&p.output_tokens))
        );
        assert!(lengths.iter().any(|p| words(p) < 80) && lengths.iter().any(|p| words(p) > 120));
    }

    #[test]
    fn poisson_has_its_rate() {
        let mut options = BenchOptions::new("http://x");
        options.load = Load::Poisson {
            rate: 50.0,
            in_flight_max: 1,
        };
        let last = Arrivals::new(&options)
            .expect("open loop")
            .nth(9_999)
            .expect("without end");
        assert!(
            (last.as_secs_f64() - 200.0).abs() < 10.0,
            "10000 arrivals at 50/s took {last:?}"
        );
    }

    #[test]
    fn replay_keeps_shared_blocks_and_times() {
        let trace = parse_trace(concat!(
            "{\"timestamp\":0,\"input_length\":1000,\"output_length\":8,\"hash_ids\":[4,5]}\n",
            "{\"timestamp\":4000,\"input_length\":700,\"output_length\":2,\"hash_ids\":[4,9]}\n",
        ))
        .expect("well formed");
        let mut options = BenchOptions::new("http://x");
        options.load = Load::Replay {
            trace,
            speed: 2.0,
            length_scale: 0.25,
            in_flight_max: 1,
        };
        let workload = Workload::new(&options);
        let (a, b) = (workload.request(0), workload.request(1));
        assert_eq!(
            (words(&a), words(&b), a.output_tokens, b.output_tokens),
            (250, 175, 2, 1)
        );
        let common = a
            .prompt
            .split(' ')
            .zip(b.prompt.split(' '))
            .take_while(|(x, y)| x == y)
            .count();
        assert!(
            (128..140).contains(&common),
            "one scaled block is shared, not {common} words"
        );
        let times: Vec<_> = Arrivals::new(&options)
            .expect("open loop")
            .map(|t| t.as_secs())
            .collect();
        assert_eq!(times, [0, 2]);
    }
}
