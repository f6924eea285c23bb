//! What is learnt from what happened: how fast the queue drains, how long a tenant's answers are, how far predictions of
//! the first token were off. Exponentially weighted, so that old news fades. Decides nothing.

use std::time::Duration;

/// News of this age counts about a third.
const FADE: Duration = Duration::from_secs(10);
/// Observed time before a rate is told.
const RATE_TIME_MIN: f64 = 0.05;
/// Share of a new observation in a running mean.
const NEW_SHARE: f64 = 0.1;
/// Bounds of one observation and of the whole correction: a machine that was away for a moment must not spoil it.
const RATIO_MAX: f64 = 4.0;

/// Something per second, over the time in which there was something to do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rate {
    amount: f64,
    seconds: f64,
    last: Option<Duration>,
}

impl Rate {
    /// Time passed until `now`; it counts if `busy`.
    pub fn advance(&mut self, now: Duration, busy: bool) {
        let elapsed = now.saturating_sub(self.last.unwrap_or(now)).as_secs_f64();
        self.last = Some(self.last.map_or(now, |last| last.max(now)));
        if busy {
            self.pass(elapsed);
        }
    }

    /// Time passed with something to do.
    pub fn advance_by(&mut self, elapsed: Duration) {
        self.pass(elapsed.as_secs_f64());
    }

    fn pass(&mut self, elapsed: f64) {
        let keep = (-elapsed / FADE.as_secs_f64()).exp();
        self.amount *= keep;
        self.seconds = self.seconds * keep + elapsed;
    }

    pub fn count(&mut self, amount: u64) {
        self.amount += amount as f64;
    }

    /// Per second; `None` while too little was seen.
    pub fn per_s(&self) -> Option<f64> {
        (self.seconds >= RATE_TIME_MIN && self.amount > 0.0).then(|| self.amount / self.seconds)
    }
}

/// What a tenant's requests turn out to be.
#[derive(Debug, Clone)]
pub(crate) struct Habits {
    output_tokens: f64,
    uncached_share: f64,
}

impl Habits {
    pub fn new(output_tokens_expected: u32) -> Self {
        Self {
            output_tokens: output_tokens_expected.into(),
            uncached_share: 1.0,
        }
    }

    pub fn learn(&mut self, prompt_tokens: u32, cached_tokens: u32, completion_tokens: u32) {
        let blend = |old: f64, new: f64| old + NEW_SHARE * (new - old);
        self.output_tokens = blend(self.output_tokens, completion_tokens.into());
        if prompt_tokens > 0 {
            let uncached = f64::from(prompt_tokens.saturating_sub(cached_tokens)) / f64::from(prompt_tokens);
            self.uncached_share = blend(self.uncached_share, uncached);
        }
    }

    /// Tokens of an answer, at least 1.
    pub fn output_tokens(&self, max_tokens: u32) -> u32 {
        (self.output_tokens.ceil() as u32).clamp(1, max_tokens.max(1))
    }

    /// Tokens of a prompt that will have to be computed, at least 1.
    pub fn uncached_tokens(&self, prompt_tokens: u32) -> u32 {
        ((self.uncached_share * f64::from(prompt_tokens)).ceil() as u32).clamp(1, prompt_tokens.max(1))
    }
}

/// What predictions of the time to the first token must be multiplied with.
#[derive(Debug, Clone)]
pub(crate) struct Correction {
    log_ratio: f64,
}

impl Correction {
    pub fn new() -> Self {
        Self { log_ratio: 0.0 }
    }

    /// `predicted` is as it was before correction.
    pub fn learn(&mut self, predicted: Duration, measured: Duration) {
        if predicted.is_zero() {
            return;
        }
        let ratio = measured.as_secs_f64() / predicted.as_secs_f64();
        let bounded = ratio.clamp(1.0 / RATIO_MAX, RATIO_MAX);
        self.log_ratio += NEW_SHARE * (bounded.ln() - self.log_ratio);
    }

    pub fn apply(&self, predicted: Duration) -> Duration {
        Duration::try_from_secs_f64(predicted.as_secs_f64() * self.log_ratio.exp()).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn a_rate_counts_busy_time_only_and_follows_a_change() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_s(), None);
        let mut now = 0.0;
        let mut step = |rate: &mut Rate, busy, amount| {
            now += 0.1;
            rate.advance(seconds(now), busy);
            rate.count(amount);
        };
        (0..100).for_each(|_| step(&mut rate, true, 10));
        let before = rate.per_s().unwrap();
        assert!((95.0..110.0).contains(&before), "{before}");
        (0..1000).for_each(|_| step(&mut rate, false, 0));
        assert_eq!(rate.per_s(), Some(before));
        (0..600).for_each(|_| step(&mut rate, true, 1));
        let after = rate.per_s().unwrap();
        assert!((9.0..12.0).contains(&after), "{after}");
    }

    #[test]
    fn habits_are_learnt_within_bounds() {
        let mut habits = Habits::new(256);
        assert_eq!((habits.output_tokens(1000), habits.output_tokens(10)), (256, 10));
        assert_eq!(habits.uncached_tokens(100), 100);
        (0..100).for_each(|_| habits.learn(100, 75, 20));
        assert!((20..=21).contains(&habits.output_tokens(1000)));
        assert!((25..=26).contains(&habits.uncached_tokens(100)));
        habits.learn(0, 5, 0);
        assert_eq!(habits.uncached_tokens(0), 1);
    }

    #[test]
    fn a_constant_error_is_corrected_and_an_outlier_passes() {
        let mut correction = Correction::new();
        (0..60).for_each(|_| correction.learn(seconds(1.0), seconds(2.0)));
        let corrected = correction.apply(seconds(1.0)).as_secs_f64();
        assert!((1.95..=2.0).contains(&corrected), "{corrected}");
        correction.learn(seconds(1.0), seconds(1e6));
        assert!(correction.apply(seconds(1.0)) < seconds(2.3));
        correction.learn(Duration::ZERO, seconds(5.0));
        assert_eq!(correction.apply(Duration::ZERO), Duration::ZERO);
    }
}
