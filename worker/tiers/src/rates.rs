//! Whether loading is quicker than computing: running averages of what a block of each tier took to come, against the time
//! the scheduler says that computing takes. No clock; times are passed in.

use std::time::Duration;

use crate::core::Tier;

/// Weight of a new sample in an average.
const BLEND: f64 = 0.25;
/// A sample counts at most this many times the average, so that one stall does not close a tier.
const OUTLIER: f64 = 8.0;
/// One in this many refused loads is let through, so that an average that is no longer true is seen to be so.
const RETRY_EVERY: u32 = 32;
/// A look into the store that may find nothing must promise to save this many times what it takes.
const PROBE_FACTOR: f64 = 4.0;

/// See the module.
#[derive(Debug, Default)]
pub struct Rates {
    block_s: [Option<f64>; 3],
    /// What a look into the store for nothing took: one round trip, where the blocks of a load share theirs.
    look_s: Option<f64>,
    refused: u32,
}

impl Rates {
    /// A load whose slowest tier was `tier` took `took` for `blocks` blocks.
    pub fn observe(&mut self, tier: Tier, blocks: usize, took: Duration) {
        if blocks == 0 {
            return;
        }
        blend(&mut self.block_s[tier as usize], took.as_secs_f64() / blocks as f64);
    }

    /// A look into the store found nothing.
    pub fn observe_look(&mut self, took: Duration) {
        blend(&mut self.look_s, took.as_secs_f64());
    }

    /// What a block of a tier takes to come; `None` while nothing was seen.
    pub fn block_time(&self, tier: Tier) -> Option<Duration> {
        Duration::try_from_secs_f64(self.block_s[tier as usize]?).ok()
    }

    /// Whether blocks of `tier` come sooner than they are computed, at `compute` per block. What is not known is worth a
    /// try.
    pub fn pays(&mut self, tier: Tier, compute: Option<Duration>) -> bool {
        let (Some(load), Some(compute)) = (self.block_s[tier as usize], compute) else {
            return true;
        };
        if load <= compute.as_secs_f64() {
            return true;
        }
        self.refused += 1;
        self.refused.is_multiple_of(RETRY_EVERY)
    }

    /// Whether it is worth asking the store for `blocks` blocks that may not be there.
    pub fn probe_pays(&mut self, blocks: usize, compute: Option<Duration>) -> bool {
        let (Some(look), Some(compute)) = (self.look_s, compute) else {
            return true;
        };
        if look * PROBE_FACTOR <= compute.as_secs_f64() * blocks as f64 {
            return true;
        }
        self.refused += 1;
        self.refused.is_multiple_of(RETRY_EVERY)
    }
}

fn blend(average: &mut Option<f64>, sample: f64) {
    *average = Some(match *average {
        None => sample,
        Some(old) => old + BLEND * (sample.min(old * OUTLIER + 1e-6) - old),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn loads_that_do_not_pay_are_refused_but_not_for_ever() {
        let mut rates = Rates::default();
        assert!(rates.pays(Tier::Disk, Some(MS)), "unknown: tried");
        rates.observe(Tier::Disk, 10, 100 * MS);
        assert!(rates.pays(Tier::Disk, Some(11 * MS)) && rates.pays(Tier::Disk, None));
        let tried = (0..320).filter(|_| rates.pays(Tier::Disk, Some(9 * MS))).count();
        assert_eq!(tried, 10);
        assert!(rates.pays(Tier::Host, Some(MS)), "each tier for itself");
        // The disk has become quick; the tries show it.
        (0..20).for_each(|_| rates.observe(Tier::Disk, 10, MS));
        assert!(rates.pays(Tier::Disk, Some(MS)));
    }

    #[test]
    fn a_stall_does_not_close_a_tier_for_long() {
        let mut rates = Rates::default();
        (0..10).for_each(|_| rates.observe(Tier::Disk, 1, MS));
        rates.observe(Tier::Disk, 1, 10_000 * MS);
        assert!(rates.block_time(Tier::Disk) < Some(4 * MS));
    }

    #[test]
    fn a_probe_must_promise_much() {
        let mut rates = Rates::default();
        rates.observe_look(20 * MS);
        assert!(rates.probe_pays(8, Some(10 * MS)) && !rates.probe_pays(7, Some(10 * MS)));
        assert!(
            rates.pays(Tier::Object, Some(MS)),
            "it says nothing of blocks that are there"
        );
    }
}
