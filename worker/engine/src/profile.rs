//! Timing profiles of machines that are not here: how long a step of a [`MockEngine`](crate::MockEngine) takes.
//!
//! The model is a roofline. A step reads all weights once and computes its tokens; whichever takes longer counts. On
//! top come attention, which grows with the context of every span, and a fixed price for launching the step:
//!
//! ```text
//! step + max(weights, token * tokens) + pair * (query, key pairs of prefill chunks) + context * (context read)
//! ```
//!
//! where a decode reads the KV of its whole context and a chunk that of what lies before it. Presets are derived from
//! published figures, each shown in its comment; they are no measurements.
//!
//! Not here: sleeping (the mock's), and what a transfer costs.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use crate::step::StepBatch;

/// How long steps take. All zero by default: no time at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MockTiming {
    /// Per step, whatever is in it.
    pub step: Duration,
    /// Per token of the batch.
    pub token: Duration,
    /// Reading all weights: what the tokens of a step cost at least.
    pub weights: Duration,
    /// Per pair of a query and a key of a prefill chunk, in picoseconds.
    pub pair_ps: u64,
    /// Per token of KV read, in picoseconds.
    pub context_ps: u64,
}

impl MockTiming {
    /// How long `batch` takes.
    pub fn step_time(&self, batch: &StepBatch) -> Duration {
        let (mut pairs, mut context) = (0u128, 0u128);
        for span in &batch.seqs {
            let (before, len) = (span.start_pos as u128, span.tokens.len() as u128);
            if len == 1 {
                context += before + 1;
            } else {
                context += before;
                pairs += len * before + len * (len + 1) / 2;
            }
        }
        let tokens = u32::try_from(batch.tokens()).unwrap_or(u32::MAX);
        let linear = self.token.saturating_mul(tokens).max(self.weights);
        let attention_ps = pairs * u128::from(self.pair_ps) + context * u128::from(self.context_ps);
        let attention = Duration::from_nanos(u64::try_from(attention_ps / 1000).unwrap_or(u64::MAX));
        self.step.saturating_add(linear).saturating_add(attention)
    }
}

/// A machine with a model, as a mock pretends to be it: a preset's name or, in a configuration file, these figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MockProfile {
    /// Per step, in microseconds.
    pub step_us: u64,
    /// Reading all weights, in microseconds.
    pub weights_us: u64,
    /// Computing one token without attention, in nanoseconds.
    pub token_ns: u64,
    /// One (query, key) pair of prefill attention over all layers, in picoseconds.
    pub pair_ps: u64,
    /// Reading the KV of one token of context, in picoseconds.
    pub context_ps: u64,
    /// KV bytes of one token, by which the configured KV memory becomes a number of blocks. The mock itself keeps 32.
    pub kv_bytes_per_token: u64,
    /// What such a machine has left for KV, in bytes.
    pub kv_bytes: u64,
}

impl MockProfile {
    /// Names for [`named`](Self::named), the first being the default.
    pub const NAMES: [&str; 3] = ["instant", "h100-llama3-8b", "8xh100-llama3-70b"];

    /// Takes no time; the KV of Llama 3 8B.
    pub const INSTANT: MockProfile = MockProfile {
        step_us: 0,
        weights_us: 0,
        token_ns: 0,
        pair_ps: 0,
        context_ps: 0,
        kv_bytes_per_token: 131_072,
        kv_bytes: 54 << 30,
    };

    /// Llama 3.1 8B (8.03e9 parameters, 32 layers, hidden size 4096, 8 KV heads of 128) in bf16 on one H100 SXM (data
    /// sheet: 989 TFLOP/s dense bf16, 3.35 TB/s, 80 GB), at 55 % of the arithmetic and 75 % of the bandwidth:
    ///
    /// - weights: 16.06 GB / 2.51 TB/s = 6.4 ms; token: 2 * 8.03e9 / 544 TFLOP/s = 29.5 us
    /// - pair: 4 * 4096 * 32 flop / 495 TFLOP/s (half of the peak) = 1.06 ns
    /// - KV: 2 * 32 * 8 * 128 * 2 bytes = 131072 per token, read in 52 ns; 80 GB * 0.9 - 16 GB left, less 2 GB of scratch
    pub const H100_LLAMA3_8B: MockProfile = MockProfile {
        step_us: 500,
        weights_us: 6_400,
        token_ns: 29_500,
        pair_ps: 1_060,
        context_ps: 52_000,
        kv_bytes_per_token: 131_072,
        kv_bytes: 54_000_000_000,
    };

    /// Llama 3.1 70B (70.6e9 parameters, 80 layers, hidden size 8192) in bf16, tensor parallel over eight H100 SXM; the
    /// same data sheet, 45 % of the arithmetic and 65 % of the bandwidth, since ranks wait for each other:
    ///
    /// - weights: 141 GB / 17.4 TB/s = 8.1 ms; token: 2 * 70.6e9 / 3560 TFLOP/s = 39.7 us
    /// - pair: 4 * 8192 * 80 flop / 3560 TFLOP/s = 736 ps
    /// - KV: 2 * 80 * 8 * 128 * 2 = 327680 bytes per token, read in 18.8 ns; 640 GB * 0.9 - 141 GB left
    /// - step: two all-reduces per layer of some 10 us
    pub const H100X8_LLAMA3_70B: MockProfile = MockProfile {
        step_us: 2_100,
        weights_us: 8_100,
        token_ns: 39_700,
        pair_ps: 736,
        context_ps: 18_800,
        kv_bytes_per_token: 327_680,
        kv_bytes: 430_000_000_000,
    };

    /// The preset of that name.
    pub fn named(name: &str) -> Option<Self> {
        let presets = [Self::INSTANT, Self::H100_LLAMA3_8B, Self::H100X8_LLAMA3_70B];
        Self::NAMES.iter().position(|n| *n == name).map(|index| presets[index])
    }

    /// As the mock uses it.
    pub fn timing(&self) -> MockTiming {
        MockTiming {
            step: Duration::from_micros(self.step_us),
            token: Duration::from_nanos(self.token_ns),
            weights: Duration::from_micros(self.weights_us),
            pair_ps: self.pair_ps,
            context_ps: self.context_ps,
        }
    }

    /// Blocks of `block_size` tokens that `kv_bytes` of such a machine hold, at least 1.
    pub fn blocks(&self, kv_bytes: u64, block_size: usize) -> u32 {
        let block_bytes = self.kv_bytes_per_token.max(1).saturating_mul(block_size as u64).max(1);
        u32::try_from(kv_bytes / block_bytes).unwrap_or(u32::MAX).max(1)
    }
}

impl<'de> Deserialize<'de> for MockProfile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Figures {
            #[serde(default)]
            step_us: u64,
            #[serde(default)]
            weights_us: u64,
            #[serde(default)]
            token_ns: u64,
            #[serde(default)]
            pair_ps: u64,
            #[serde(default)]
            context_ps: u64,
            kv_bytes_per_token: u64,
            kv_bytes: u64,
        }
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "a mock profile is a preset's name or a table with kv_bytes_per_token, kv_bytes and the times \
                         step_us, weights_us, token_ns, pair_ps, context_ps"
        )]
        enum Form {
            Name(String),
            Figures(Figures),
        }
        match Form::deserialize(deserializer)? {
            Form::Name(name) => name.parse().map_err(serde::de::Error::custom),
            Form::Figures(f) => Ok(MockProfile {
                step_us: f.step_us,
                weights_us: f.weights_us,
                token_ns: f.token_ns,
                pair_ps: f.pair_ps,
                context_ps: f.context_ps,
                kv_bytes_per_token: f.kv_bytes_per_token,
                kv_bytes: f.kv_bytes,
            }),
        }
    }
}

impl std::str::FromStr for MockProfile {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "no mock profile is called {name:?}; there are {}",
                Self::NAMES.join(", ")
            )
        };
        Self::named(name).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{SeqId, StepSeq};

    fn batch(spans: &[(usize, usize)]) -> StepBatch {
        let span = |&(start_pos, len): &(usize, usize)| StepSeq {
            seq: SeqId(0),
            tokens: vec![1; len],
            start_pos,
            blocks: Vec::new(),
            sample: None,
            shaping: None,
        };
        StepBatch {
            seqs: spans.iter().map(span).collect(),
        }
    }

    fn millis(profile: MockProfile, spans: &[(usize, usize)]) -> f64 {
        profile.timing().step_time(&batch(spans)).as_secs_f64() * 1e3
    }

    #[test]
    fn a_decode_reads_weights_and_context_and_a_prefill_computes() {
        let h100 = MockProfile::H100_LLAMA3_8B;
        let one = h100.timing().step_time(&batch(&[(0, 1)]));
        assert_eq!(one.as_nanos(), 6_900_052, "launch, weights, one token of KV");
        // Batched decodes share the weights: 64 streams of 1000 tokens.
        assert!((millis(h100, &[(999, 1); 64]) - (0.5 + 6.4 + 64.0 * 1000.0 * 52e-6)).abs() < 1e-3);
        let prompt = millis(h100, &[(0, 8192)]);
        assert!((prompt - (0.5 + 8192.0 * 0.0295 + 8192.0 * 8193.0 / 2.0 * 1.06e-6)).abs() < 1e-2);
        // Chunks of a prompt have the same pairs, and read again what lies before.
        let chunks: f64 = (0..16).map(|i| millis(h100, &[(i * 512, 512)])).sum();
        assert!(chunks > prompt && chunks < prompt * 1.2, "{chunks} against {prompt}");
    }

    #[test]
    fn absurd_figures_and_batches_saturate() {
        let timing = MockTiming {
            step: Duration::MAX,
            token: Duration::MAX,
            weights: Duration::MAX,
            pair_ps: u64::MAX,
            context_ps: u64::MAX,
        };
        assert_eq!(timing.step_time(&batch(&[(1 << 20, 100), (1 << 40, 1)])), Duration::MAX);
        assert_eq!(MockProfile::INSTANT.blocks(0, 16), 1);
        assert_eq!(MockProfile::default().blocks(u64::MAX, 16), u32::MAX);
    }

    #[test]
    fn profiles_are_read_by_name_or_by_figures() {
        let read = |json: &str| serde_json::from_str::<MockProfile>(json).map_err(|e| e.to_string());
        assert_eq!(read("\"h100-llama3-8b\""), Ok(MockProfile::H100_LLAMA3_8B));
        let own = read(r#"{"step_us": 7, "kv_bytes_per_token": 100, "kv_bytes": 3200}"#).expect("complete");
        assert_eq!((own.step_us, own.blocks(own.kv_bytes, 16)), (7, 2));
        assert!(read("\"h200\"").expect_err("unknown").contains("8xh100-llama3-70b"));
        assert!(
            read(r#"{"step_ms": 7}"#)
                .expect_err("unknown field")
                .contains("step_us")
        );
        for name in MockProfile::NAMES {
            let profile = MockProfile::named(name).expect("listed");
            let json = serde_json::to_string(&profile).expect("serialisable");
            assert_eq!(read(&json), Ok(profile), "what is written can be read");
        }
    }
}
