//! Requests and tokens per minute, as token buckets: a party may use a minute's worth at once, and gets it back evenly.
//!
//! A request is charged before it runs with what it may use at most, and corrected when it has ended. A request belongs to
//! several parties (its key, its project) and is let in only if all have room; then all are charged, else none.
//!
//! Invariants (`tests` below): a bucket never holds more than a minute's worth; within any window of `t` minutes a party is
//! let in for at most `(1 + t)` times its rate; a refused request changes nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Parties remembered. A full bucket says nothing, so those go first when there are more.
const PARTIES_MAX: usize = 65_536;
/// A bucket's unit: one request or token is so many, so that a rate per minute fills whole units every millisecond.
const UNITS: i128 = 60_000;

/// What may be used per minute; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rate {
    /// Requests.
    pub requests_per_min: u64,
    /// Tokens, of prompts and answers.
    pub tokens_per_min: u64,
}

/// Somebody with a rate of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// Unique among keys and projects.
    pub id: Arc<str>,
    /// What it may use.
    pub rate: Rate,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Requests per minute.
    Requests,
    /// Tokens per minute.
    Tokens,
}

/// Why a request was not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Limited {
    /// It will fit later.
    #[error("the limit of {limit} {} per minute of `{party}` is used up; retry after {} ms", unit.name(), retry_after.as_millis())]
    Wait {
        /// Whose limit.
        party: Arc<str>,
        /// Of what.
        unit: Unit,
        /// Per minute.
        limit: u64,
        /// When it would fit, if nothing else came.
        retry_after: Duration,
    },
    /// It may use more than a whole minute's worth, and never fits.
    #[error(
        "the request may use {asked} tokens, and `{party}` has {limit} per minute; ask for fewer, or shorten the prompt"
    )]
    TooLarge {
        /// Whose limit.
        party: Arc<str>,
        /// Per minute.
        limit: u64,
        /// What it may use at most.
        asked: u64,
    },
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

/// What a request was charged. Give it back to [`Rates::settle`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "tokens charged and not used go back only through `settle`"]
pub struct Charge {
    parties: Vec<Party>,
    tokens: u64,
}

/// What is left of a limit: the three numbers of the `x-ratelimit-*` headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Per minute.
    pub limit: u64,
    /// Could be used now.
    pub remaining: u64,
    /// Until all of it could be.
    pub reset: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// In [`UNITS`]; below zero when more was used than charged.
    level: i128,
    at: Duration,
}

impl Bucket {
    fn level(&self, per_min: u64, now: Duration) -> i128 {
        let passed = now.saturating_sub(self.at).as_millis();
        let passed = i128::try_from(passed).unwrap_or(i128::MAX / 2);
        let gained = passed.saturating_mul(per_min.into());
        self.level.saturating_add(gained).min(capacity(per_min))
    }
}

fn capacity(per_min: u64) -> i128 {
    i128::from(per_min) * UNITS
}

/// Time until `units` have come.
fn time_for(units: i128, per_min: u64) -> Duration {
    let ms = u128::try_from(units.max(0))
        .unwrap_or(0)
        .div_ceil(u128::from(per_min.max(1)));
    Duration::from_millis(u64::try_from(ms).unwrap_or(u64::MAX))
}

/// The buckets of every party. Times are on any one clock.
#[derive(Debug, Default)]
pub struct Rates {
    requests: HashMap<Arc<str>, Bucket>,
    tokens: HashMap<Arc<str>, Bucket>,
}

impl Rates {
    /// Lets a request in that uses at most `tokens`, and charges all of its parties.
    ///
    /// # Errors
    ///
    /// [`Limited`], and nothing is charged.
    pub fn admit(&mut self, parties: &[Party], tokens: u64, now: Duration) -> Result<Charge, Limited> {
        for party in parties {
            let limit = party.rate.tokens_per_min;
            if limit > 0 && tokens > limit {
                let party = party.id.clone();
                return Err(Limited::TooLarge {
                    party,
                    limit,
                    asked: tokens,
                });
            }
        }
        // Of several that are short the one that takes longest is told: after that the request fits.
        let mut longest: Option<(Duration, Limited)> = None;
        for (unit, amount) in [(Unit::Requests, 1), (Unit::Tokens, tokens)] {
            for party in parties {
                let limit = party.rate.of(unit);
                let missing = i128::from(amount) * UNITS - self.level(unit, party, now);
                if limit == 0 || missing <= 0 {
                    continue;
                }
                let retry_after = time_for(missing, limit);
                if longest.as_ref().is_none_or(|(longest, _)| *longest < retry_after) {
                    let party = party.id.clone();
                    longest = Some((
                        retry_after,
                        Limited::Wait {
                            party,
                            unit,
                            limit,
                            retry_after,
                        },
                    ));
                }
            }
        }
        if let Some((_, limited)) = longest {
            return Err(limited);
        }
        self.elsewhere(parties, 1, tokens, now);
        let parties = parties.to_vec();
        Ok(Charge { parties, tokens })
    }

    /// A request has ended and used so many tokens.
    pub fn settle(&mut self, charge: Charge, tokens: u64, now: Duration) {
        for party in &charge.parties {
            let over = i128::from(tokens) - i128::from(charge.tokens);
            self.take(Unit::Tokens, party, over, now);
        }
    }

    /// Another coordinator served requests of these parties.
    pub fn elsewhere(&mut self, parties: &[Party], requests: u64, tokens: u64, now: Duration) {
        for party in parties {
            self.take(Unit::Requests, party, requests.into(), now);
            self.take(Unit::Tokens, party, tokens.into(), now);
        }
    }

    /// What is left, for the tightest of the parties; `None` where none has such a limit.
    pub fn allowance(&self, unit: Unit, parties: &[Party], now: Duration) -> Option<Allowance> {
        let limited = parties.iter().filter(|party| party.rate.of(unit) > 0);
        let each = limited.map(|party| {
            let limit = party.rate.of(unit);
            let level = self.level(unit, party, now);
            Allowance {
                limit,
                remaining: u64::try_from(level.max(0) / UNITS).unwrap_or(u64::MAX),
                reset: time_for(capacity(limit) - level, limit),
            }
        });
        each.min_by_key(|allowance| allowance.remaining)
    }

    fn level(&self, unit: Unit, party: &Party, now: Duration) -> i128 {
        let limit = party.rate.of(unit);
        let bucket = self.buckets(unit).get(&party.id);
        bucket.map_or(capacity(limit), |bucket| bucket.level(limit, now))
    }

    fn take(&mut self, unit: Unit, party: &Party, amount: i128, now: Duration) {
        let limit = party.rate.of(unit);
        if limit == 0 || amount == 0 {
            return;
        }
        let level = self.level(unit, party, now) - amount * UNITS;
        let bucket = Bucket {
            level: level.min(capacity(limit)),
            at: now,
        };
        let buckets = match unit {
            Unit::Requests => &mut self.requests,
            Unit::Tokens => &mut self.tokens,
        };
        if buckets.len() >= PARTIES_MAX && !buckets.contains_key(&party.id) {
            // What nobody touched for a minute is full again, unless it was overdrawn.
            buckets.retain(|_, bucket| bucket.level < 0 || now.saturating_sub(bucket.at) < Duration::from_secs(60));
            if buckets.len() >= PARTIES_MAX {
                // More parties in one minute than are kept: forget whoever was charged longest ago.
                let oldest = buckets.iter().min_by_key(|(id, bucket)| (bucket.at, (*id).clone()));
                if let Some(id) = oldest.map(|(id, _)| id.clone()) {
                    buckets.remove(&id);
                }
            }
        }
        buckets.insert(party.id.clone(), bucket);
    }

    fn buckets(&self, unit: Unit) -> &HashMap<Arc<str>, Bucket> {
        match unit {
            Unit::Requests => &self.requests,
            Unit::Tokens => &self.tokens,
        }
    }
}

impl Rate {
    fn of(self, unit: Unit) -> u64 {
        match unit {
            Unit::Requests => self.requests_per_min,
            Unit::Tokens => self.tokens_per_min,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn party(id: &str, requests_per_min: u64, tokens_per_min: u64) -> Party {
        Party {
            id: id.into(),
            rate: Rate {
                requests_per_min,
                tokens_per_min,
            },
        }
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_minute_s_worth_at_once_and_then_evenly() {
        let mut rates = Rates::default();
        let key = [party("k", 3, 0)];
        for _ in 0..3 {
            let _ = rates.admit(&key, 1_000_000, s(0)).unwrap();
        }
        let refused = rates.admit(&key, 1, s(0)).unwrap_err();
        assert!(
            matches!(refused, Limited::Wait { unit: Unit::Requests, limit: 3, retry_after, .. } if retry_after == s(20))
        );
        assert!(rates.admit(&key, 1, s(19)).is_err());
        let _ = rates.admit(&key, 1, s(20)).unwrap();
        let left = rates.allowance(Unit::Requests, &key, s(20)).unwrap();
        assert_eq!((left.limit, left.remaining, left.reset), (3, 0, s(60)));
        assert_eq!(rates.allowance(Unit::Tokens, &key, s(20)), None);
    }

    #[test]
    fn tokens_not_used_go_back_and_more_than_a_minute_s_worth_never_fits() {
        let mut rates = Rates::default();
        let both = [party("k", 0, 1000), party("p", 0, 600)];
        assert!(matches!(
            rates.admit(&both, 601, s(0)),
            Err(Limited::TooLarge { limit: 600, .. })
        ));
        let charge = rates.admit(&both, 600, s(0)).unwrap();
        let refused = rates.admit(&both, 1, s(0)).unwrap_err();
        assert!(
            matches!(&refused, Limited::Wait { party, .. } if &**party == "p"),
            "{refused}"
        );
        rates.settle(charge, 100, s(0));
        assert_eq!(rates.allowance(Unit::Tokens, &both, s(0)).unwrap().remaining, 500);
        assert_eq!(rates.allowance(Unit::Tokens, &both[..1], s(0)).unwrap().remaining, 900);
        // What others served counts here, below zero too.
        rates.elsewhere(&both, 1, 800, s(0));
        assert!(matches!(rates.admit(&both, 1, s(0)), Err(Limited::Wait { retry_after, .. }) if retry_after > s(30)));
    }

    #[test]
    fn no_window_lets_in_more_than_its_rate_and_one_minute() {
        for seed in 0..50 {
            let mut random = StdRng::seed_from_u64(seed);
            let (requests, tokens) = (random.random_range(1..100), random.random_range(100..10_000));
            let parties = [party("k", requests, tokens), party("p", requests * 2, tokens * 2)];
            let mut rates = Rates::default();
            let mut now = Duration::ZERO;
            let mut let_in: Vec<(Duration, u64)> = Vec::new();
            for _ in 0..400 {
                now += Duration::from_millis(random.random_range(0..2000));
                let asked = random.random_range(1..=tokens / 4 + 1);
                let before = rates.allowance(Unit::Tokens, &parties, now);
                match rates.admit(&parties, asked, now) {
                    Ok(charge) => {
                        let used = random.random_range(0..=asked);
                        rates.settle(charge, used, now);
                        let_in.push((now, used));
                    }
                    Err(Limited::Wait { retry_after, .. }) => {
                        assert_eq!(before, rates.allowance(Unit::Tokens, &parties, now));
                        assert!(
                            rates
                                .admit(&parties, asked, now + retry_after - Duration::from_millis(1))
                                .is_err()
                        );
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            for (i, (from, _)) in let_in.iter().enumerate() {
                let (mut count, mut sum) = (0, 0);
                for (at, used) in &let_in[i..] {
                    count += 1;
                    sum += used;
                    let minutes = 1.0 + (*at - *from).as_secs_f64() / 60.0;
                    assert!(f64::from(count) <= requests as f64 * minutes + 1e-6, "seed {seed}");
                    assert!(sum as f64 <= tokens as f64 * minutes + 1e-6, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn parties_are_bounded() {
        let mut rates = Rates::default();
        for i in 0..PARTIES_MAX + 10 {
            let _ = rates.admit(&[party(&format!("k{i}"), 10, 0)], 1, s(0)).unwrap();
        }
        assert!(rates.requests.len() <= PARTIES_MAX);
    }
}
