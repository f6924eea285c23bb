//! How many prefill tokens a step takes, so that streams that run beside it keep their pace. A pure function of the step
//! times it was told ([`Scheduler::observe_step`](super::Scheduler::observe_step)); it reads no clock. Told
//! nothing, it limits nothing.
//!
//! A step costs a base, mostly one pass over the weights, whatever is in it, and a price per prefill token. Both are running
//! averages: the base of the steps without prefill, the price of what a step with prefill took beyond the base. The
//! price drifts with the depth of the prompts (attention) and follows within a few steps. Where prompts fill every step
//! the base would never be seen, and a base taken for price makes chunks shrink and shrink: so now and then a step with
//! streams goes without prefill.
//!
//! Chunk boundaries never change a token (P1), so timing may move them; which tokens come out stays reproducible, which
//! step they come out of does not.

use std::time::Duration;

/// Weight of a new sample in the average price: the last handful of steps decides.
const BLEND: f64 = 0.3;
/// The same for the base, which is seen less often and varies less.
const BLEND_BASE: f64 = 0.5;
/// A sample counts at most this many times the average: one step that lost its cores does not shrink the next ones.
const OUTLIER: f64 = 4.0;
/// Prefill tokens at which a step's sample has half its weight; below, the price drowns in the noise of the base.
const SOLID_TOKENS: f64 = 32.0;
/// Steps without a running stream may take this many times the target: nobody's next token waits for them, but a new
/// request and a cancel do.
const NO_STREAM_FACTOR: f64 = 4.0;
/// Where the base alone comes near the target (a large model), prefill may still add this many times the base: the passes
/// over the weights then cost prompts at most two fifths of their speed, and prompts cost streams three fifths of theirs.
const LEAST_SHARE: f64 = 1.5;
/// Steps with prefill in a row after which one goes without, to see the base. It costs prompts one base in this many steps.
const BASE_SEEN_EVERY: u32 = 32;
/// Budgets are multiples of this, because matrix kernels work on groups of rows, and never below it.
const GROUP_TOKENS: usize = 8;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    target_s: f64,
    base_s: Option<f64>,
    token_s: Option<f64>,
    /// Steps with prefill since the base was seen, or asked for.
    unseen: u32,
}

impl Pace {
    /// Steps that carry running streams shall take `target`; zero sets no limit.
    pub(super) fn new(target: Duration) -> Self {
        Pace {
            target_s: target.as_secs_f64(),
            base_s: None,
            token_s: None,
            // The first step that can show the base does.
            unseen: BASE_SEEN_EVERY,
        }
    }

    /// A step of so many prefill tokens took so long.
    pub(super) fn observe(&mut self, prefill_tokens: usize, took: Duration) {
        let took_s = took.as_secs_f64();
        if prefill_tokens == 0 {
            blend(&mut self.base_s, took_s, BLEND_BASE);
            self.unseen = 0;
            return;
        }
        self.unseen = self.unseen.saturating_add(1);
        let tokens = prefill_tokens as f64;
        // The base may be that of other days: at least a part of the step was prefill's.
        let prefill_s = (took_s - self.base_s.unwrap_or(0.0)).max(took_s / 8.0);
        blend(
            &mut self.token_s,
            prefill_s / tokens,
            BLEND * tokens / (tokens + SOLID_TOKENS),
        );
    }

    /// Most prefill tokens of the next step, in which `streams` sequences decode: at least [`GROUP_TOKENS`], or none for
    /// one step to see the base.
    pub(super) fn prefill_tokens_max(&mut self, streams: usize) -> usize {
        let Some(token_s) = self.token_s.filter(|s| *s > 0.0 && self.target_s > 0.0) else {
            return usize::MAX;
        };
        if streams > 0 && self.unseen >= BASE_SEEN_EVERY {
            // Once, also if nobody tells what that step took.
            self.unseen = 0;
            return 0;
        }
        let base_s = self.base_s.unwrap_or(0.0);
        let target_s = match streams {
            0 => self.target_s * NO_STREAM_FACTOR,
            _ => self.target_s,
        };
        let allowed_s = (target_s - base_s).max(base_s * LEAST_SHARE);
        // A float too large for usize saturates.
        let tokens = (allowed_s / token_s) as usize;
        (tokens / GROUP_TOKENS * GROUP_TOKENS).max(GROUP_TOKENS)
    }

    /// How long so many prefill tokens take, roughly; `None` while nothing was seen.
    pub(super) fn prefill_time(&self, tokens: usize) -> Option<Duration> {
        let seconds = self.token_s? * tokens as f64 + self.base_s.unwrap_or(0.0);
        Duration::try_from_secs_f64(seconds).ok()
    }
}

fn blend(average: &mut Option<f64>, sample: f64, weight: f64) {
    *average = Some(match average.filter(|old| *old > 0.0) {
        None => sample,
        Some(old) => old + weight * (sample.min(old * OUTLIER) - old),
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn says_nothing_until_told_something_and_when_turned_off() {
        let mut pace = Pace::new(seconds(0.1));
        assert_eq!(pace.prefill_tokens_max(3), usize::MAX);
        pace.observe(0, seconds(0.02));
        assert_eq!(pace.prefill_tokens_max(3), usize::MAX);
        pace.observe(100, seconds(0.12));
        assert_eq!(pace.prefill_tokens_max(3), 80);
        let mut off = Pace::new(Duration::ZERO);
        off.observe(100, seconds(10.0));
        assert_eq!(off.prefill_tokens_max(3), usize::MAX);
    }

    #[test]
    fn a_large_model_prefills_in_proportion_to_its_base() {
        let mut pace = Pace::new(seconds(0.1));
        pace.observe(0, seconds(0.4));
        pace.observe(64, seconds(0.4 + 0.64));
        for streams in [0, 1] {
            assert_eq!(
                pace.prefill_tokens_max(streams),
                56,
                "0.6 s of 10 ms each, in whole groups"
            );
        }
    }

    #[test]
    fn the_base_is_looked_for_when_prompts_fill_every_step() {
        let mut pace = Pace::new(seconds(0.15));
        let mut without = 0;
        for step in 0..1000 {
            let tokens = pace.prefill_tokens_max(4).min(512);
            without += usize::from(tokens == 0);
            pace.observe(tokens, seconds(0.1 + 0.004 * tokens as f64));
            assert!(
                step < 60 || tokens == 0 || (32..=40).contains(&tokens),
                "{tokens} in step {step}"
            );
        }
        assert!((25..=35).contains(&without), "{without}");
        // Not told, it goes on.
        let mut pace = Pace::new(seconds(0.15));
        pace.observe(100, seconds(0.5));
        assert_eq!(pace.prefill_tokens_max(1), 0);
        assert!((0..1000).all(|_| pace.prefill_tokens_max(1) > 0));
    }

    /// One step in which the machine was away must not starve prompts for long.
    #[test]
    fn an_outlier_passes() {
        let mut pace = Pace::new(seconds(0.1));
        pace.observe(0, seconds(0.01));
        pace.observe(256, seconds(0.01 + 0.256));
        let before = pace.prefill_tokens_max(1);
        pace.observe(64, seconds(30.0));
        assert!(pace.prefill_tokens_max(1) >= before / 3);
        (0..12).for_each(|_| pace.observe(64, seconds(0.01 + 0.064)));
        assert!(pace.prefill_tokens_max(1) >= before * 3 / 4);
    }

    proptest! {
        /// On any machine of the assumed kind, whatever it was told before, steps end up near the target.
        #[test]
        fn steps_converge_to_the_target(
            base in 0.001f64..0.06, token in 0.0001f64..0.002, past in prop::collection::vec((0usize..600, 0.0f64..1.0), 0..20),
        ) {
            let target = 0.15;
            let mut pace = Pace::new(seconds(target));
            past.iter().for_each(|&(tokens, took)| pace.observe(tokens, seconds(took)));
            let mut took = 0.0;
            for _ in 0..600 {
                let tokens = pace.prefill_tokens_max(4).min(4096);
                let step = base + token * tokens as f64;
                pace.observe(tokens, seconds(step));
                took = if tokens > 0 { step } else { took };
            }
            let group = token * GROUP_TOKENS as f64;
            prop_assert!(took <= target * 1.05 + group, "{took}");
            prop_assert!(took >= target * 0.9 - 2.0 * group, "{took}");
        }
    }
}
