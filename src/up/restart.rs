//! When to start a dead process again: a pure policy, time passed in.
//!
//! A process that dies soon after its start is likely to die again, so the pause doubles with every such death in a
//! row, and after [`FAST_DEATHS_MAX`] of them it is left dead. One that had lived a while is restarted at once.

use std::time::Duration;

/// A life shorter than this counts as fast. Longer than loading the models people try first.
const FAST: Duration = Duration::from_secs(60);
/// Fast deaths in a row before giving up: with doubling pauses about eight seconds of trying.
pub const FAST_DEATHS_MAX: u32 = 6;
/// Pause after the first death. Short: a killed worker should be back before anybody asks for it.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// What to do about a death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start again after a pause.
    RestartAfter(Duration),
    /// Leave it dead.
    GiveUp,
}

/// The deaths of one process so far.
#[derive(Debug, Clone, Default)]
pub struct Restarts {
    fast_deaths: u32,
}

impl Restarts {
    /// The process died after living for `lived`.
    pub fn died(&mut self, lived: Duration) -> Verdict {
        self.fast_deaths = if lived < FAST { self.fast_deaths + 1 } else { 1 };
        if self.fast_deaths > FAST_DEATHS_MAX {
            return Verdict::GiveUp;
        }
        Verdict::RestartAfter((PAUSE_MIN * 2u32.pow(self.fast_deaths - 1)).min(PAUSE_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_up_on_a_crash_loop_only() {
        let mut restarts = Restarts::default();
        let mut pauses = Vec::new();
        while let Verdict::RestartAfter(pause) = restarts.died(Duration::from_millis(10)) {
            pauses.push(pause);
        }
        assert_eq!(pauses.len(), FAST_DEATHS_MAX as usize);
        assert!(pauses.windows(2).all(|w| w[0] < w[1]) && pauses.iter().all(|p| *p <= PAUSE_MAX));

        let mut restarts = Restarts::default();
        for _ in 0..1000 {
            assert_eq!(restarts.died(FAST), Verdict::RestartAfter(PAUSE_MIN));
        }
    }
}
