//! A worker without a model, to load-test everything around one: real scheduler, real prefix cache, real server, real
//! transfers of a few real bytes; only the arithmetic is replaced by hashes and sleep.
//!
//! Of the model directory only `config.json` is read, for the vocabulary and the context length, so that the tokenizer of
//! that directory fits. Not for serving: the answers mean nothing.

use crate::{WorkerConfig, WorkerError};
use baton_engine::{MockAnswer, MockConfig, MockEngine, MockProfile};
use baton_model::ModelConfig;
use baton_proto::block_hash;
use serde::{Deserialize, Serialize};

/// What computes tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// The model.
    #[default]
    Model,
    /// A mock, for load tests of everything else.
    Mock,
}

/// How a mock worker chooses tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MockAnswers {
    /// At no cost; see [`MockAnswer::Cheap`].
    #[default]
    Cheap,
    /// By the real sampler, from all KV bytes; see [`MockAnswer::Honest`].
    Honest,
}

/// The table `mock` of a worker's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MockSettings {
    /// The machine it pretends to be: `instant`, `h100-llama3-8b`, `8xh100-llama3-70b`, or a table of figures (see
    /// `docs/load-testing.md`). `kv_bytes` counts in the KV bytes of that machine.
    pub profile: MockProfile,
    /// How many times faster than the profile; 0 takes no time at all.
    pub speed: f64,
    /// `cheap`, or `honest` to depend on every byte of KV.
    pub answers: MockAnswers,
}

impl Default for MockSettings {
    fn default() -> Self {
        Self {
            profile: MockProfile::INSTANT,
            speed: 1.0,
            answers: MockAnswers::default(),
        }
    }
}

/// The engine and what stands for the digest of its weights.
pub(crate) fn load(config: &WorkerConfig) -> Result<(MockEngine, [u8; 32]), WorkerError> {
    let model = ModelConfig::from_dir(&config.model_path)?;
    let settings = &config.mock;
    if !settings.speed.is_finite() || settings.speed < 0.0 {
        return Err(WorkerError::Config(format!(
            "mock.speed is {}; give a factor such as 1, or 0 for no time at all",
            settings.speed
        )));
    }
    // From the middle of the vocabulary: whole words in all tokenizers in use, and no special tokens.
    let answer = match settings.answers {
        MockAnswers::Honest => MockAnswer::Honest,
        MockAnswers::Cheap => MockAnswer::Cheap {
            first: u32::try_from(model.vocab_size / 2).unwrap_or(0),
            count: u32::try_from(model.vocab_size / 4).unwrap_or(1).max(1),
        },
    };
    let engine = MockEngine::new(MockConfig {
        layers: 1,
        block_size: config.block_size,
        total_blocks: settings.profile.blocks(config.kv_bytes, config.block_size),
        context_length: model.context_length,
        vocab_size: model.vocab_size,
        model_seed: 0,
        answer,
        timing: settings.profile.timing(),
        speed: settings.speed,
    })
    .map_err(|error| WorkerError::Engine(error.to_string()))?;
    // Mock workers exchange blocks with their like only, and with no worker that has weights.
    let mut digest = [0; 32];
    let identity = format!("mock {} {}", model.vocab_size, model.context_length);
    digest[..16].copy_from_slice(&block_hash::root(identity.as_bytes()));
    Ok((engine, digest))
}
