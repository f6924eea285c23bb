//! Whether a connection is worth keeping: a state machine that is told of its requests and of time, and knows no sockets.
//!
//! Three kinds of peer are to go. One that asks nothing: it has `idle_max` from the accept, or from the end of its last
//! request, whatever frames it sends meanwhile (pings and settings are no requests). One that asks and takes back, over and
//! over: each reset of an HTTP/2 stream costs it nothing and the server a request, and does not count against the limit on
//! streams ("rapid reset", CVE-2023-44487). And one that was told to go and stays.
//!
//! Invariants: `running` is the number of guards alive; `idle_since` is set exactly while it is 0.

use std::time::{Duration, Instant};

/// Requests that a connection may take back beyond those it let finish. A person who closes answers half-way, or a client
/// that sends everything twice and keeps the first, stays below; a flood is over in a millisecond.
const ABANDONED_SURPLUS_MAX: u64 = 128;
/// How long a connection without requests may take to close once it was told to.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// What to do with the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Keep,
    /// Take no more requests; let those finish that run.
    Close,
    /// End it now.
    Drop,
}

/// One connection's requests.
#[derive(Debug)]
pub(crate) struct Activity {
    idle_max: Duration,
    running: u64,
    finished: u64,
    abandoned: u64,
    idle_since: Option<Instant>,
    closing_since: Option<Instant>,
}

impl Activity {
    pub fn new(idle_max: Duration, now: Instant) -> Self {
        Self {
            idle_max,
            running: 0,
            finished: 0,
            abandoned: 0,
            idle_since: Some(now),
            closing_since: None,
        }
    }

    /// A request has come.
    pub fn began(&mut self) {
        self.running += 1;
        self.idle_since = None;
    }

    /// A request is over; `finished` if its answer was taken whole.
    pub fn ended(&mut self, finished: bool, now: Instant) {
        if finished {
            self.finished = self.finished.saturating_add(1);
        } else {
            self.abandoned = self.abandoned.saturating_add(1);
        }
        self.running = self.running.saturating_sub(1);
        if self.running == 0 {
            self.idle_since = Some(now);
        }
    }

    /// The connection was told to go.
    pub fn closing(&mut self, now: Instant) {
        self.closing_since.get_or_insert(now);
    }

    /// Looks at it.
    pub fn verdict(&self, now: Instant) -> Verdict {
        let idle = self.idle_since.map(|since| now.saturating_duration_since(since));
        if let Some(closing) = self.closing_since {
            let told = now.saturating_duration_since(closing);
            return match idle {
                Some(idle) if idle >= CLOSE_MAX && told >= CLOSE_MAX => Verdict::Drop,
                _ => Verdict::Keep,
            };
        }
        if self.abandoned > self.finished.saturating_add(ABANDONED_SURPLUS_MAX) {
            return Verdict::Close;
        }
        match idle {
            // Nothing was ever asked: there is nobody to be polite to.
            Some(idle) if idle >= self.idle_max && self.finished + self.abandoned == 0 => Verdict::Drop,
            Some(idle) if idle >= self.idle_max => Verdict::Close,
            _ => Verdict::Keep,
        }
    }

    /// Requests whose answers were taken whole.
    #[cfg(test)]
    pub fn finished(&self) -> u64 {
        self.finished
    }

    /// How often to look: often enough to be late by a quarter at most.
    pub fn look_every(&self, stall_max: Duration) -> Duration {
        (self.idle_max.min(stall_max).min(CLOSE_MAX * 4) / 4).max(Duration::from_millis(5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(30);

    #[test]
    fn silence_ends_it_and_work_keeps_it() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let mut activity = Activity::new(IDLE, start);
        assert_eq!(activity.verdict(at(29)), Verdict::Keep);
        assert_eq!(activity.verdict(at(30)), Verdict::Drop);
        activity.began();
        assert_eq!(activity.verdict(at(3000)), Verdict::Keep);
        activity.began();
        activity.ended(true, at(3000));
        assert_eq!(activity.verdict(at(6000)), Verdict::Keep, "one still runs");
        activity.ended(false, at(6000));
        assert_eq!(activity.verdict(at(6029)), Verdict::Keep);
        assert_eq!(activity.verdict(at(6030)), Verdict::Close);
    }

    #[test]
    fn who_only_takes_back_is_told_to_go() {
        let now = Instant::now();
        let mut activity = Activity::new(IDLE, now);
        for _ in 0..ABANDONED_SURPLUS_MAX {
            activity.began();
            activity.ended(false, now);
            assert_eq!(activity.verdict(now), Verdict::Keep);
        }
        activity.began();
        activity.ended(true, now);
        activity.began();
        activity.ended(false, now);
        assert_eq!(
            activity.verdict(now),
            Verdict::Keep,
            "one that finished makes up for one"
        );
        activity.began();
        activity.ended(false, now);
        assert_eq!(activity.verdict(now), Verdict::Close);
    }

    #[test]
    fn who_was_told_to_go_and_stays_is_dropped_after_its_last_request() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut activity = Activity::new(IDLE, start);
        activity.began();
        activity.closing(at(0));
        assert_eq!(activity.verdict(at(60_000)), Verdict::Keep);
        activity.ended(true, at(60_000));
        assert_eq!(activity.verdict(at(60_900)), Verdict::Keep);
        assert_eq!(activity.verdict(at(61_000)), Verdict::Drop);
    }
}
