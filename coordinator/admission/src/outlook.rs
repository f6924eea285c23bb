//! What the workers could do for one more request: the cost model of admission, behind a trait, so that a router that knows
//! more (what is cached where, what a transfer costs) can put its own estimate in its place.
//!
//! A first token comes when the prompt tokens before it and its own are computed, and then after one more step:
//! `(backlog + uncached) / prefill rate + decode step`, on the worker where that is soonest. A worker shares a step between
//! prompts and lets short ones pass, so for a short prompt this is an upper bound. Tokens come once a decode step. What is
//! not measured is not predicted, and never a reason to refuse.

use std::time::Duration;

use crate::own_load::OwnLoad;

/// What can be expected for one more request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prospect {
    /// A worker takes it now without a queue of its own growing beyond its limits.
    pub room: bool,
    /// Time to its first token if it went now.
    pub ttft: Option<Duration>,
    /// Time between two of its tokens.
    pub itl: Option<Duration>,
    /// Streams on the worker that `itl` is of.
    pub streams: u32,
}

/// Tells prospects.
pub trait Outlook {
    /// Of a request with this many tokens to compute. `None` if no worker serves the model. Requests in `own` that are
    /// granted and not placed yet count as if they were on the workers.
    fn prospect(&self, uncached_tokens: u32, own: &OwnLoad) -> Option<Prospect>;
}

/// What a worker is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerRole {
    /// Computes prompts for others; streams only where nobody else can.
    Prefill,
    /// Streams.
    Decode,
    /// Both.
    Combined,
}

/// A live worker, as its heartbeat and the registry have it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkerLoad<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its role.
    pub role: WorkerRole,
    /// Streams in its batch.
    pub streams: u32,
    /// It has as many requests as it may.
    pub full: bool,
    /// Prompt tokens per second of prefill; 0 is unknown.
    pub prefill_tokens_per_s: f32,
    /// Time of a decode step at the present batch; zero is unknown.
    pub decode_step: Duration,
}

/// [`Outlook`] by heartbeats and by what this coordinator has sent.
#[derive(Debug)]
pub struct Fleet<'a> {
    /// The live workers of the model.
    pub workers: Vec<WorkerLoad<'a>>,
    /// Requests on a worker before their first token.
    pub unstarted_max: u32,
    /// Prompt tokens on a worker, as time at its speed.
    pub prefill_max: Duration,
}

impl Fleet<'_> {
    /// Time of so many tokens on a worker.
    fn time(&self, worker: &WorkerLoad<'_>, tokens: u64, own: &OwnLoad) -> Option<Duration> {
        let told = f64::from(worker.prefill_tokens_per_s);
        let rate = if told > 0.0 && told.is_finite() {
            told
        } else {
            own.tokens_per_s()?
        };
        Some(Duration::try_from_secs_f64(tokens as f64 / rate).unwrap_or(Duration::MAX))
    }
}

impl Outlook for Fleet<'_> {
    fn prospect(&self, uncached_tokens: u32, own: &OwnLoad) -> Option<Prospect> {
        if self.workers.is_empty() {
            return None;
        }
        let only_prefill = self.workers.iter().all(|worker| worker.role == WorkerRole::Prefill);
        let may_stream = |worker: &&WorkerLoad<'_>| only_prefill || worker.role != WorkerRole::Prefill;
        // Whoever was granted a place and is on no worker yet goes to the emptiest ones first, so is spread over all.
        let (unplaced, unplaced_tokens) = own.unplaced();
        let unplaced_tokens = unplaced_tokens / self.workers.len() as u64;
        let backlog = |worker: &WorkerLoad<'_>| own.prefill_tokens(worker.id).saturating_add(unplaced_tokens);

        let places = self.workers.iter().filter(may_stream).filter(|worker| !worker.full);
        let places: u64 = places
            .map(|worker| u64::from(self.unstarted_max.saturating_sub(own.unstarted(worker.id))))
            .sum();
        let idle_or_quick = |worker: &WorkerLoad<'_>| {
            let tokens = backlog(worker);
            tokens == 0
                || self
                    .time(worker, tokens, own)
                    .is_none_or(|time| time <= self.prefill_max)
        };
        let room = places > u64::from(unplaced) && self.workers.iter().any(idle_or_quick);

        let ttft = self.workers.iter().filter_map(|worker| {
            let tokens = backlog(worker).saturating_add(uncached_tokens.into());
            Some(self.time(worker, tokens, own)?.saturating_add(worker.decode_step))
        });
        let calmest = self
            .workers
            .iter()
            .filter(may_stream)
            .min_by_key(|worker| worker.decode_step);
        let measured = calmest.filter(|worker| !worker.decode_step.is_zero());
        Some(Prospect {
            room,
            ttft: ttft.min(),
            itl: measured.map(|worker| worker.decode_step),
            streams: measured.map_or(0, |worker| worker.streams),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(id: &str, role: WorkerRole, tokens_per_s: f32, step_ms: u64) -> WorkerLoad<'_> {
        WorkerLoad {
            id,
            role,
            streams: 4,
            full: false,
            prefill_tokens_per_s: tokens_per_s,
            decode_step: Duration::from_millis(step_ms),
        }
    }

    fn fleet(workers: Vec<WorkerLoad<'_>>) -> Fleet<'_> {
        Fleet {
            workers,
            unstarted_max: 2,
            prefill_max: Duration::from_secs(1),
        }
    }

    #[test]
    fn nobody_is_no_prospect_and_the_unmeasured_is_not_predicted() {
        let own = OwnLoad::default();
        assert_eq!(fleet(vec![]).prospect(10, &own), None);
        let prospect = fleet(vec![worker("a", WorkerRole::Combined, 0.0, 0)]).prospect(10, &own);
        let unknown = Prospect {
            room: true,
            ..Prospect::default()
        };
        assert_eq!(prospect, Some(unknown));
        for odd in [f32::NAN, f32::INFINITY, -1.0] {
            let prospect = fleet(vec![worker("a", WorkerRole::Combined, odd, 0)]).prospect(10, &own);
            assert_eq!(prospect, Some(unknown), "{odd}");
        }
    }

    #[test]
    fn the_first_token_is_told_of_the_soonest_worker() {
        let mut own = OwnLoad::default();
        let stage = own.granted(500);
        own.placed(&stage, 500, "d", "p", Duration::ZERO);
        let workers = vec![
            worker("d", WorkerRole::Decode, 100.0, 10),
            worker("p", WorkerRole::Prefill, 1000.0, 20),
        ];
        let prospect = fleet(workers.clone()).prospect(100, &own).unwrap();
        // 600 tokens at 1000 per second beat 100 at 100.
        assert_eq!(prospect.ttft, Some(Duration::from_millis(620)));
        assert_eq!((prospect.itl, prospect.streams), (Some(Duration::from_millis(10)), 4));
        own.heartbeat("p", 0, 1500);
        let prospect = fleet(workers).prospect(100, &own).unwrap();
        assert_eq!(
            prospect.ttft,
            Some(Duration::from_millis(1010)),
            "another coordinator keeps p busy"
        );
    }

    #[test]
    fn room_ends_at_either_limit_and_prefill_workers_lend_no_places() {
        let mut own = OwnLoad::default();
        let workers = vec![
            worker("d", WorkerRole::Decode, 1000.0, 10),
            worker("p", WorkerRole::Prefill, 1000.0, 10),
        ];
        let room = |own: &OwnLoad| fleet(workers.clone()).prospect(1, own).unwrap().room;
        let first = own.granted(1);
        assert!(room(&own));
        let second = own.granted(1);
        assert!(!room(&own), "two places, both promised");
        let first = own.placed(&first, 1, "d", "d", Duration::ZERO);
        let second = own.placed(&second, 1, "d", "p", Duration::ZERO);
        assert!(!room(&own));
        own.started(&first, 1, None);
        assert!(room(&own));
        own.started(&second, 1, None);
        let long = own.granted(5000);
        own.placed(&long, 5000, "d", "d", Duration::ZERO);
        assert!(room(&own), "p can compute");
        own.heartbeat("p", 0, 1001);
        assert!(!room(&own), "both have more than a second of prompts");
    }

    #[test]
    fn speed_is_measured_here_where_workers_tell_none() {
        let mut own = OwnLoad::default();
        let stage = own.granted(200);
        let stage = own.placed(&stage, 200, "a", "a", Duration::from_secs(1));
        own.started(&stage, 200, Some(Duration::from_secs(2)));
        let prospect = fleet(vec![worker("a", WorkerRole::Combined, 0.0, 0)])
            .prospect(100, &own)
            .unwrap();
        let ttft = prospect.ttft.unwrap().as_secs_f64();
        assert!((0.49..0.51).contains(&ttft), "{ttft}");
    }
}
