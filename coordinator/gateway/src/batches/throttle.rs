//! How many lines of a batch may be in work: as many as the cluster takes beside everything else, found by trying. One more
//! with each round that goes well, half as many when a line is refused for load or workers have more than they can run; the
//! additive increase and multiplicative decrease of Chiu and Jain (1989). No clock: times are passed in.

use std::time::Duration;

/// Lines in work at the start.
const START: f64 = 4.0;
/// A cut is not followed by another within this: what it does has to show first.
const CUT_PAUSE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Throttle {
    limit: f64,
    max: f64,
    last_cut: Option<Duration>,
    /// Nothing new before then.
    closed_until: Duration,
}

impl Throttle {
    pub fn new(max: usize) -> Self {
        let max = max as f64;
        Self {
            limit: START.min(max),
            max,
            last_cut: None,
            closed_until: Duration::ZERO,
        }
    }

    /// Lines that may be in work now.
    pub fn limit(&self, now: Duration) -> usize {
        if now < self.closed_until {
            return 0;
        }
        (self.limit as usize).max(1)
    }

    /// A line was answered.
    pub fn answered(&mut self) {
        self.limit = (self.limit + 1.0 / self.limit).min(self.max);
    }

    /// A line was refused for load, or for want of workers, and may come again after this time.
    pub fn refused(&mut self, retry_after: Duration, now: Duration) {
        self.closed_until = self.closed_until.max(now + retry_after);
        self.cut(now);
    }

    /// Workers have sequences that wait.
    pub fn crowded(&mut self, now: Duration) {
        self.cut(now);
    }

    fn cut(&mut self, now: Duration) {
        if self.last_cut.is_none_or(|last| now >= last + CUT_PAUSE) {
            self.last_cut = Some(now);
            self.limit = (self.limit / 2.0).max(1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_finds_what_is_free_and_gives_way() {
        let s = Duration::from_secs;
        let mut throttle = Throttle::new(64);
        assert_eq!(throttle.limit(s(0)), 4);
        for _ in 0..10_000 {
            throttle.answered();
        }
        assert_eq!(throttle.limit(s(0)), 64, "never more than it may");
        // Many refusals of one moment are one.
        for _ in 0..64 {
            throttle.refused(s(2), s(10));
        }
        assert_eq!(throttle.limit(s(11)), 0);
        assert_eq!(throttle.limit(s(12)), 32);
        for second in 12..40 {
            throttle.crowded(s(second));
        }
        assert_eq!(throttle.limit(s(40)), 1, "one is always tried");
        // One more with each round.
        for _ in 0..3 {
            throttle.answered();
        }
        assert!((2..=3).contains(&throttle.limit(s(41))));
        assert_eq!(Throttle::new(1).limit(s(0)), 1);
    }
}
