//! A deterministic engine without a model, for tests, load tests and simulation of whole clusters.
//!
//! It is honest about KV, which is what the code around an engine gets wrong: it keeps a real region, writes every
//! slot of every layer as a hash of the token and of the slot before it, read back through the block table, and
//! samples from logits that are a hash of all KV bytes of the sequence. A wrong, missing, stale or foreign byte gives
//! other tokens. The sampler is the real one.
//!
//! It says nothing about language, and its only notion of speed is a [timing](MockTiming), from a
//! [profile](crate::profile) of a machine. [`MockAnswer::Cheap`] trades some of the honesty for speed in load tests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_kvtransfer::Region;
use baton_model::{KvDtype, KvGeometry, KvHalf};
use baton_proto::worker::TokenLogprobs;

use crate::error::EngineError;
use crate::profile::MockTiming;
use crate::sampling::Sampler;
use crate::step::{Engine, StepBatch, StepSeq};

/// How a mock chooses tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MockAnswer {
    /// The real sampler over logits that are a hash of all KV bytes of the sequence. Costs a look at every byte of its KV
    /// and at every id of the vocabulary.
    #[default]
    Honest,
    /// A hash of the last position's KV, itself a chain over all tokens before, picks one of `count` ids from `first` on.
    /// For load tests: a token costs nothing, whatever the context and the vocabulary. Of the sampling parameters it
    /// heeds the seed, unless greedy; grammars are not for it. A wrong byte of KV before the last position shows only in what is computed from it.
    Cheap {
        /// The first id.
        first: u32,
        /// How many ids, at least 1.
        count: u32,
    },
}

/// What a mock engine is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MockConfig {
    /// Layers, at least 1.
    pub layers: usize,
    /// Tokens per block, at least 1.
    pub block_size: usize,
    /// Blocks of the pool.
    pub total_blocks: u32,
    /// Longest sequence in tokens.
    pub context_length: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Its "weights": engines with different seeds speak differently.
    pub model_seed: u64,
    /// How tokens are chosen.
    pub answer: MockAnswer,
    /// How long a step takes; spent in equal parts before each layer is reported done.
    pub timing: MockTiming,
    /// How many times faster than that; 0 or infinity: no time at all.
    pub speed: f64,
}

impl Default for MockConfig {
    fn default() -> Self {
        MockConfig {
            layers: 2,
            block_size: 16,
            total_blocks: 256,
            context_length: 2048,
            vocab_size: 512,
            model_seed: 0,
            answer: MockAnswer::Honest,
            timing: MockTiming::default(),
            speed: 1.0,
        }
    }
}

/// See the module.
pub struct MockEngine {
    config: MockConfig,
    geometry: KvGeometry,
    region: Arc<Region>,
    sampler: Sampler,
    logits: Vec<f32>,
}

/// Longest step, whatever the figures: a worker must end some time.
const STEP_MAX: Duration = Duration::from_secs(3600);
/// Bytes of a mock's K or V slot: two words.
const SLOT_BYTES: usize = 16;

impl MockEngine {
    /// A mock with an empty region.
    pub fn new(config: MockConfig) -> Result<Self, EngineError> {
        let geometry = KvGeometry {
            layers: config.layers,
            kv_heads: 1,
            head_dim: SLOT_BYTES / KvDtype::F32.bytes(),
            block_size: config.block_size,
            dtype: KvDtype::F32,
        };
        if let MockAnswer::Cheap { first, count } = config.answer
            && (count == 0 || first as usize + count as usize > config.vocab_size)
        {
            let vocab = config.vocab_size;
            return Err(EngineError::Model(format!(
                "the mock's {count} answer ids from {first} on are not within its vocabulary of {vocab}"
            )));
        }
        let bytes = geometry.arena_bytes(config.total_blocks).filter(|_| geometry.is_sane());
        let bytes = bytes.ok_or_else(|| EngineError::Model("the mock's dimensions are out of range".to_owned()))?;
        let region = Region::new(bytes).map_err(|e| EngineError::Model(e.to_string()))?;
        Ok(MockEngine {
            config,
            geometry,
            region,
            sampler: Sampler::new(),
            logits: Vec::new(),
        })
    }

    fn time(&self, batch: &StepBatch) -> Duration {
        if self.config.speed.is_normal() && self.config.speed > 0.0 {
            let seconds = self.config.timing.step_time(batch).as_secs_f64() / self.config.speed;
            Duration::try_from_secs_f64(seconds).unwrap_or(STEP_MAX).min(STEP_MAX)
        } else {
            Duration::ZERO
        }
    }

    fn validate(&self, span: &StepSeq) -> Result<(), EngineError> {
        let invalid = |what: String| Err(EngineError::InvalidBatch(format!("{}: {what}", span.seq)));
        if span.tokens.is_empty() {
            return invalid("an empty span".to_owned());
        }
        if span.end_pos() > self.config.context_length {
            return invalid(format!("{} tokens exceed the context", span.end_pos()));
        }
        if span.blocks.len() < self.geometry.blocks_for(span.end_pos()) {
            return invalid(format!(
                "{} blocks are too few for {} tokens",
                span.blocks.len(),
                span.end_pos()
            ));
        }
        if let Some(block) = span.blocks.iter().find(|b| **b >= self.config.total_blocks) {
            return invalid(format!("block {block} does not exist"));
        }
        match span.tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
            Some(token) => invalid(format!("token {token} is outside the vocabulary")),
            None => Ok(()),
        }
    }

    /// Writes the slots of one layer. Like attention, each depends on what lies before it in the same layer.
    fn write_layer(&self, span: &StepSeq, layer: usize) -> Result<(), EngineError> {
        let salt = mix(self.config.model_seed, layer as u64);
        let mut before = match span.start_pos.checked_sub(1) {
            Some(position) => self.key(span, layer, position)?,
            None => salt,
        };
        for (position, token) in (span.start_pos..).zip(&span.tokens) {
            before = mix(before ^ salt, u64::from(*token) | (position as u64) << 32);
            let (key, value) = (words(before), words(mix(before, salt)));
            for (half, bytes) in [(KvHalf::K, key), (KvHalf::V, value)] {
                let at = self.slot(span, layer, half, position);
                if !self.region.copy_in(at, &bytes) {
                    return Err(outside(at));
                }
            }
        }
        Ok(())
    }

    fn key(&self, span: &StepSeq, layer: usize, position: usize) -> Result<u64, EngineError> {
        let mut bytes = [0; 8];
        let at = self.slot(span, layer, KvHalf::K, position);
        if !self.region.copy_out(at, &mut bytes) {
            return Err(outside(at));
        }
        Ok(u64::from_le_bytes(bytes))
    }

    fn slot(&self, span: &StepSeq, layer: usize, half: KvHalf, position: usize) -> usize {
        let (block, slot) = (position / self.config.block_size, position % self.config.block_size);
        self.geometry
            .range(span.blocks[block], layer, 0, half, slot..slot + 1)
            .start
    }

    /// A hash of every KV byte of positions `0..end_pos`, whatever the size of the blocks they are in.
    fn digest(&self, span: &StepSeq) -> Result<u64, EngineError> {
        let size = self.config.block_size;
        let mut buffer = vec![0; size * SLOT_BYTES];
        let mut digest = mix(self.config.model_seed, span.end_pos() as u64);
        for layer in 0..self.geometry.layers {
            for half in [KvHalf::K, KvHalf::V] {
                for (block, start) in span.blocks.iter().zip((0..span.end_pos()).step_by(size)) {
                    let slots = size.min(span.end_pos() - start);
                    let range = self.geometry.range(*block, layer, 0, half, 0..slots);
                    let bytes = &mut buffer[..range.len()];
                    if !self.region.copy_out(range.start, bytes) {
                        return Err(outside(range.start));
                    }
                    let (words, _) = bytes.as_chunks::<8>();
                    digest = words.iter().fold(digest, |d, w| mix(d, u64::from_le_bytes(*w)));
                }
            }
        }
        Ok(digest)
    }

    fn sample(&mut self, span: &StepSeq) -> Result<Option<u32>, EngineError> {
        let Some(params) = &span.sample else {
            return Ok(None);
        };
        if let MockAnswer::Cheap { first, count } = self.config.answer {
            let key = self.key(span, self.geometry.layers - 1, span.end_pos() - 1)?;
            let seed = if params.temperature() > 0.0 { params.seed() } else { 0 };
            let token = first + (mix(key, seed) % u64::from(count)) as u32;
            if let Some((shaping, top)) = span.shaping.as_ref().and_then(|s| Some((s, s.top_logprobs()?))) {
                // It was certain.
                let top = top.min(1) as usize;
                shaping.tell_logprobs(Some(TokenLogprobs {
                    logprob: 0.0,
                    top_ids: vec![token; top],
                    top_logprobs: vec![0.0; top],
                }));
            }
            return Ok(Some(token));
        }
        let digest = self.digest(span)?;
        self.logits.clear();
        // Logits in [0, 8): peaked enough that temperature and filters matter.
        self.logits
            .extend((0..self.config.vocab_size as u64).map(|id| (mix(digest, id) >> 40) as f32 / (1u64 << 21) as f32));
        let (position, shaping) = (span.end_pos() as u64, span.shaping.as_deref());
        Ok(self.sampler.sample_shaped(&self.logits, params, position, shaping))
    }
}

impl Engine for MockEngine {
    fn geometry(&self) -> KvGeometry {
        self.geometry
    }

    fn region(&self) -> Arc<Region> {
        self.region.clone()
    }

    fn total_blocks(&self) -> u32 {
        self.config.total_blocks
    }

    fn context_length(&self) -> usize {
        self.config.context_length
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn step(&mut self, batch: &StepBatch, layer_done: &mut dyn FnMut(usize)) -> Result<Vec<Option<u32>>, EngineError> {
        batch.seqs.iter().try_for_each(|span| self.validate(span))?;
        let started = Instant::now();
        let time = self.time(batch);
        for layer in 0..self.geometry.layers {
            batch.seqs.iter().try_for_each(|span| self.write_layer(span, layer))?;
            // Until, not for: what writing took, and what sleep took too long, is part of the step.
            let due = time.mul_f64((layer + 1) as f64 / self.geometry.layers as f64);
            if let Some(rest) = due.checked_sub(started.elapsed()).filter(|rest| !rest.is_zero()) {
                std::thread::sleep(rest);
            }
            layer_done(layer);
        }
        batch.seqs.iter().map(|span| self.sample(span)).collect()
    }
}

fn outside(at: usize) -> EngineError {
    EngineError::InvalidBatch(format!("byte {at} lies outside the KV region"))
}

fn words(value: u64) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    bytes[8..].copy_from_slice(&value.rotate_left(32).to_le_bytes());
    bytes
}

/// SplitMix64's finaliser over a combination of both.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::SamplingParams;
    use crate::step::SeqId;

    fn span(tokens: &[u32], start_pos: usize, blocks: &[u32]) -> StepSeq {
        StepSeq {
            seq: SeqId(0),
            tokens: tokens.to_vec(),
            start_pos,
            blocks: blocks.to_vec(),
            sample: Some(SamplingParams::GREEDY),
            shaping: None,
        }
    }

    fn engine() -> MockEngine {
        MockEngine::new(MockConfig {
            block_size: 4,
            total_blocks: 8,
            ..MockConfig::default()
        })
        .expect("valid")
    }

    fn token(engine: &mut MockEngine, spans: Vec<StepSeq>) -> Vec<Option<u32>> {
        engine
            .step(&StepBatch { seqs: spans }, &mut |_| {})
            .expect("valid batch")
    }

    #[test]
    fn chunks_blocks_and_mates_do_not_matter() {
        let whole = token(&mut engine(), vec![span(&[1, 2, 3, 4, 5, 6], 0, &[0, 1])]);
        let mut chunked = engine();
        token(&mut chunked, vec![span(&[1, 2, 3], 0, &[7]), span(&[9], 0, &[2])]);
        token(&mut chunked, vec![span(&[4], 3, &[7]), span(&[9], 1, &[2])]);
        assert_eq!(token(&mut chunked, vec![span(&[5, 6], 4, &[7, 3])]), whole);
    }

    #[test]
    fn one_wrong_byte_anywhere_changes_the_answer() {
        let geometry = engine().geometry();
        let right = token(
            &mut engine(),
            vec![span(&[1, 2, 3, 4, 5], 0, &[0, 1]), span(&[6], 5, &[0, 1])],
        );
        let mut changed = 0;
        for layer in 0..geometry.layers {
            for half in [KvHalf::K, KvHalf::V] {
                for slot in 0..4 {
                    let mut engine = engine();
                    token(&mut engine, vec![span(&[1, 2, 3, 4, 5], 0, &[0, 1])]);
                    assert!(
                        engine
                            .region()
                            .copy_in(geometry.range(0, layer, 0, half, slot..slot + 1).start + 3, &[0xA5])
                    );
                    changed += usize::from(token(&mut engine, vec![span(&[6], 5, &[0, 1])])[0] != right[1]);
                }
            }
        }
        assert_eq!(changed, 16);
    }

    /// Cheap answers keep what P1 promises: chunks, blocks and mates do not matter, the tokens before and the seed do.
    #[test]
    fn cheap_answers_follow_tokens_and_seed_only() {
        let cheap = || {
            let answer = MockAnswer::Cheap { first: 100, count: 50 };
            MockEngine::new(MockConfig {
                block_size: 4,
                total_blocks: 8,
                layers: 1,
                answer,
                ..MockConfig::default()
            })
            .expect("valid")
        };
        let whole = token(&mut cheap(), vec![span(&[1, 2, 3, 4, 5, 6], 0, &[0, 1])]);
        assert!((100..150).contains(&whole[0].expect("sampled")));
        let mut chunked = cheap();
        token(&mut chunked, vec![span(&[1, 2, 3], 0, &[7]), span(&[9], 0, &[2])]);
        assert_eq!(token(&mut chunked, vec![span(&[4, 5, 6], 3, &[7, 3])]), whole);
        let seeded = |seed| {
            let mut one = span(&[1, 2, 3, 4, 5, 6], 0, &[0, 1]);
            one.sample = Some(SamplingParams::new(1.0, 0, 1.0, seed).expect("valid"));
            token(&mut cheap(), vec![one])
        };
        let distinct =
            |tokens: Vec<Vec<Option<u32>>>| tokens.into_iter().collect::<std::collections::HashSet<_>>().len();
        assert!(distinct((0..20).map(seeded).collect()) > 10);
        let first = |id| token(&mut cheap(), vec![span(&[id, 2, 3, 4, 5, 6], 0, &[0, 1])]);
        assert!(distinct((0..20).map(first).collect()) > 10);
        let outside = MockConfig {
            answer: MockAnswer::Cheap { first: 500, count: 13 },
            ..MockConfig::default()
        };
        assert!(MockEngine::new(outside).is_err());
    }

    #[test]
    fn a_step_takes_the_time_of_its_profile() {
        let step = |speed| {
            let timing = MockTiming {
                step: Duration::from_millis(40),
                ..MockTiming::default()
            };
            let config = MockConfig {
                timing,
                speed,
                ..MockConfig::default()
            };
            let mut engine = MockEngine::new(config).expect("valid");
            let started = Instant::now();
            token(&mut engine, vec![span(&[1], 0, &[0])]);
            started.elapsed()
        };
        assert!(step(1.0) >= Duration::from_millis(40));
        assert!(step(4.0) >= Duration::from_millis(10));
        let config = |speed| MockConfig {
            timing: MockTiming {
                step: Duration::MAX,
                ..MockTiming::default()
            },
            speed,
            ..MockConfig::default()
        };
        let time = |speed| {
            let batch = StepBatch {
                seqs: vec![span(&[1], 0, &[0])],
            };
            MockEngine::new(config(speed)).expect("valid").time(&batch)
        };
        for none in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(time(none), Duration::ZERO);
        }
        assert_eq!(time(1.0), STEP_MAX);
    }

    #[test]
    fn impossible_batches_are_refused() {
        for bad in [
            span(&[], 0, &[0]),
            span(&[1; 5], 0, &[0]),
            span(&[1], 0, &[8]),
            span(&[512], 0, &[0]),
            span(&[1], 2048, &[0; 513]),
        ] {
            let result = engine().step(&StepBatch { seqs: vec![bad] }, &mut |_| {});
            assert!(matches!(result, Err(EngineError::InvalidBatch(_))));
        }
    }
}
