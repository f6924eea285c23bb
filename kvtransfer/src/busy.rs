//! How much of a push was hidden behind compute: the time during which bytes were under way, split at `finish()`.
//! Pure arithmetic over instants passed in.

use std::time::{Duration, Instant};

/// Accumulates the time during which something was under way.
#[derive(Debug, Default)]
pub(crate) struct BusyClock {
    since: Option<Instant>,
    total: Duration,
    before_finish: Option<Duration>,
}

impl BusyClock {
    /// Something is under way from `now` on.
    pub(crate) fn start(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Nothing is under way any more.
    pub(crate) fn stop(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.total += now.saturating_duration_since(since);
        }
    }

    /// Everything from `now` on is waited for.
    pub(crate) fn finish(&mut self, now: Instant) {
        let running = self
            .since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.before_finish.get_or_insert(self.total + running);
        // The finishing frame and its acknowledgement are work too, even if every byte has landed.
        self.start(now);
    }

    /// The share of the busy time that lay before [`BusyClock::finish`], from 0 to 1; 1 if there was none at all.
    pub(crate) fn hidden_share(&self) -> f64 {
        let before = self.before_finish.unwrap_or(self.total);
        if self.total.is_zero() {
            return 1.0;
        }
        (before.as_secs_f64() / self.total.as_secs_f64()).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_counts_busy_time_only() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut clock = BusyClock::default();
        clock.start(at(0));
        clock.start(at(5));
        clock.stop(at(30)); // 30 ms hidden
        clock.stop(at(40));
        clock.start(at(100));
        clock.finish(at(130)); // 30 more
        clock.stop(at(150)); // 20 waited for
        assert!((clock.hidden_share() - 0.75).abs() < 1e-9);
    }

    #[test]
    fn nothing_under_way_hides_nothing() {
        let now = Instant::now();
        let mut clock = BusyClock::default();
        clock.finish(now);
        clock.stop(now + Duration::from_millis(1));
        assert_eq!(clock.hidden_share(), 0.0);
        assert_eq!(BusyClock::default().hidden_share(), 1.0);
    }
}
