//! How wrong predictions were: what measured times to the first token had on top of the predicted ones, as running means,
//! apart for prompts computed where they stream and for those handed over.
//!
//! The difference of the two is what a hand-over costs beyond compute and transfer; the mean itself is added to what is
//! predicted. A mean that is not fed drifts towards the other one, so that a kind of placement that is no longer chosen
//! because it once was slow is tried again.

/// What a hand-over costs before any was measured, in seconds: two messages and the opening of a window.
pub const HAND_OVER_S_PRIOR: f64 = 0.003;
/// No hand-over is free: below this a measured difference is noise.
const HAND_OVER_S_MIN: f64 = 0.001;
/// Weight of a new sample.
const BLEND: f64 = 0.1;
/// Drift of the mean that was not fed towards the other, per sample of that one.
const DRIFT: f64 = 0.01;
/// A sample counts as at most this far off, in seconds: one stalled request must not steer the next thousand.
const ERROR_S_MAX: f64 = 10.0;

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Overheads {
    local_s: Option<f64>,
    remote_s: Option<f64>,
}

impl Overheads {
    /// A first token came after `measured_s`, where the model, without correction and hand-over, had said `modelled_s`.
    pub fn observe(&mut self, remote: bool, modelled_s: f64, measured_s: f64) {
        let error_s = measured_s - modelled_s;
        if !error_s.is_finite() {
            return;
        }
        let error_s = error_s.clamp(-ERROR_S_MAX, ERROR_S_MAX);
        let (fed, other) = match remote {
            true => (&mut self.remote_s, &mut self.local_s),
            false => (&mut self.local_s, &mut self.remote_s),
        };
        let mean = fed.map_or(error_s, |mean| mean + BLEND * (error_s - mean));
        *fed = Some(mean);
        if let Some(other) = other {
            *other += DRIFT * (mean - *other);
        }
    }

    /// What a hand-over costs, in seconds.
    pub fn hand_over_s(&self) -> f64 {
        match (self.local_s, self.remote_s) {
            (local, Some(remote)) => (remote - local.unwrap_or(0.0)).max(HAND_OVER_S_MIN),
            (_, None) => HAND_OVER_S_PRIOR,
        }
    }

    /// What to add to a modelled time, in seconds; for a hand-over this includes what it costs.
    pub fn correction_s(&self, remote: bool) -> f64 {
        match remote {
            true => self.remote_s.unwrap_or(HAND_OVER_S_PRIOR),
            false => self.local_s.unwrap_or(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_hand_over_is_learned_and_in_time_forgotten() {
        let mut overheads = Overheads::default();
        assert_eq!(overheads.hand_over_s(), HAND_OVER_S_PRIOR);
        (0..50).for_each(|_| overheads.observe(true, 0.1, 0.3));
        assert!((overheads.hand_over_s() - 0.2).abs() < 1e-6);
        (0..500).for_each(|_| overheads.observe(false, 0.1, 0.1));
        assert!(overheads.hand_over_s() < 0.01);
        overheads.observe(true, 0.1, f64::INFINITY);
        overheads.observe(false, 0.1, 1e9);
        assert!(overheads.correction_s(false) <= 1.0 + 1e-6);
    }
}
