//! What this worker has measured of itself, for the router: prefill and decode from engine steps, transfers from pushes.
//! Running means that follow within a few dozen samples; 0 until there is one. Time is passed in.
//!
//! Not here: what the router makes of it, and the scheduler's own pacing, which asks another question (how much prefill
//! fits beside the streams).

use baton_engine::StepBatch;
use baton_kvtransfer::PushReport;
use std::time::{Duration, Instant};

/// Weight of a new sample.
const BLEND: f64 = 0.1;
/// Prefill tokens at which a step's sample has half its weight: small chunks pay for a whole pass over the weights.
const SOLID_TOKENS: f64 = 64.0;
/// Smallest push that says something about the wire; below, the closing round trip is most of it.
const PUSH_BYTES_MIN: u64 = 256 << 10;
/// A transfer rate older than this is not told any more, so that the router tries again: the wire may have changed.
const TRANSFER_RATE_AGE_MAX: Duration = Duration::from_secs(300);

fn blend(mean: &mut f64, sample: f64, weight: f64) {
    if sample.is_finite() && sample > 0.0 {
        *mean = if *mean > 0.0 {
            *mean + weight * (sample - *mean)
        } else {
            sample
        };
    }
}

/// Prefill and decode.
#[derive(Debug, Default)]
pub(crate) struct StepRates {
    /// Seconds per prompt token.
    token_s: f64,
    /// Seconds per step without prefill.
    step_s: f64,
}

impl StepRates {
    /// The engine took so long for a step.
    pub(crate) fn observe(&mut self, batch: &StepBatch, took: Duration) {
        let took_s = took.as_secs_f64();
        let prefill: usize = batch
            .seqs
            .iter()
            .map(|span| span.tokens.len())
            .filter(|len| *len > 1)
            .sum();
        let decodes = batch.seqs.iter().filter(|span| span.tokens.len() == 1).count();
        if prefill == 0 {
            if decodes > 0 {
                blend(&mut self.step_s, took_s, BLEND);
            }
            return;
        }
        // Streams in the same step would have taken a step of their own; at least half of a mixed step is prefill's.
        let own_s = if decodes > 0 {
            (took_s - self.step_s).max(took_s / 2.0)
        } else {
            took_s
        };
        let tokens = prefill as f64;
        blend(
            &mut self.token_s,
            own_s / tokens,
            BLEND * tokens / (tokens + SOLID_TOKENS),
        );
    }

    /// Prompt tokens per second of prefill.
    pub(crate) fn prefill_tokens_per_s(&self) -> f32 {
        if self.token_s > 0.0 {
            (1.0 / self.token_s) as f32
        } else {
            0.0
        }
    }

    /// Time of a decode step, in microseconds.
    pub(crate) fn decode_step_us(&self) -> u32 {
        // A float beyond the range saturates.
        (self.step_s * 1e6) as u32
    }
}

/// Pushes to peers.
#[derive(Debug, Default)]
pub(crate) struct TransferRate {
    bytes_per_s: f64,
    seen: Option<Instant>,
}

impl TransferRate {
    /// A push is complete.
    pub(crate) fn observe(&mut self, report: &PushReport) {
        if report.bytes < PUSH_BYTES_MIN {
            return;
        }
        // What was not hidden took from `finished` to `last_ack`; overlap says which share of the sending that is.
        let open_s = report.last_ack.saturating_duration_since(report.finished).as_secs_f64();
        let span_s = report
            .last_ack
            .saturating_duration_since(report.first_write)
            .as_secs_f64();
        let sending_s = (open_s / (1.0 - report.overlap).max(1e-6)).min(span_s);
        blend(&mut self.bytes_per_s, report.bytes as f64 / sending_s, BLEND);
        self.seen = Some(report.last_ack);
    }

    /// Bytes per second of a push.
    pub(crate) fn bytes_per_s(&self, now: Instant) -> f32 {
        let fresh = self
            .seen
            .is_some_and(|seen| now.saturating_duration_since(seen) < TRANSFER_RATE_AGE_MAX);
        if fresh { self.bytes_per_s as f32 } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_engine::{SeqId, StepSeq};

    fn batch(lens: &[usize]) -> StepBatch {
        let span = |(id, len): (usize, &usize)| StepSeq {
            seq: SeqId(id as u64),
            tokens: vec![0; *len],
            start_pos: 0,
            blocks: Vec::new(),
            sample: None,
            shaping: None,
        };
        StepBatch {
            seqs: lens.iter().enumerate().map(span).collect(),
        }
    }

    #[test]
    fn prefill_and_decode_are_told_apart() {
        let mut rates = StepRates::default();
        assert_eq!((rates.prefill_tokens_per_s(), rates.decode_step_us()), (0.0, 0));
        (0..200).for_each(|_| rates.observe(&batch(&[1, 1]), Duration::from_millis(10)));
        (0..200).for_each(|_| rates.observe(&batch(&[1, 1, 500]), Duration::from_millis(510)));
        assert!((rates.prefill_tokens_per_s() - 1000.0).abs() < 1.0, "{rates:?}");
        assert!((9_990..=10_010).contains(&rates.decode_step_us()), "{rates:?}");
        rates.observe(&batch(&[]), Duration::from_secs(9));
        assert!(rates.decode_step_us() <= 10_010);
    }

    #[test]
    fn the_wire_is_measured_by_sending_time_and_forgotten_after_a_while() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rate = TransferRate::default();
        let mut report = PushReport {
            bytes: 1 << 20,
            frames: 1,
            first_write: start,
            finished: at(90),
            last_ack: at(100),
            overlap: 0.5,
            transport: baton_kvtransfer::TransportKind::Quic,
        };
        rate.observe(&report);
        // 20 ms of the 100 were spent sending.
        assert!(
            (rate.bytes_per_s(at(100)) / (50.0 * 1048576.0) - 1.0).abs() < 1e-3,
            "{rate:?}"
        );
        report.bytes = 1000;
        rate.observe(&report);
        assert!(
            (rate.bytes_per_s(at(100)) / (50.0 * 1048576.0) - 1.0).abs() < 1e-3,
            "too small to count"
        );
        assert_eq!(rate.bytes_per_s(at(400_000)), 0.0);
    }
}
