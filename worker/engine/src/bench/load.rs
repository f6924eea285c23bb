//! From a path to a model that can be measured. The one place that knows how a model is opened for a benchmark; how its
//! weights are to be held would be said here too, and costs in [`Costs`].

use std::path::{Path, PathBuf};
use std::time::Instant;

use baton_model::{LoadOptions, MemoryNeed, ModelConfig, ModelFiles, Progress, available_memory};

use super::{BenchError, BenchPlan, Costs};
use crate::model_engine::ModelEngine;

/// Which model, and how to load it.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The model.
    pub path: PathBuf,
    /// Threads and weights.
    pub load: LoadOptions,
    /// Tokens per KV block.
    pub block_size: usize,
}

/// A model ready to be measured.
pub struct Opened {
    /// The engine, with a KV arena for the plan.
    pub engine: ModelEngine,
    /// What a step of it costs.
    pub costs: Costs,
    /// Seconds from the files to a loaded engine.
    pub load_s: f64,
}

/// Opens a model with room for the plan.
///
/// # Errors
/// [`BenchError::Plan`] if the model cannot run it, [`BenchError::Model`] if it cannot be loaded.
pub fn open(options: &OpenOptions, plan: &BenchPlan, progress: &dyn Progress) -> Result<Opened, BenchError> {
    let start = Instant::now();
    let (config, files) = files(&options.path)?;
    let geometry = config.kv_geometry(options.block_size);
    if !geometry.is_sane() {
        let message = format!(
            "the block size is {}; 16 is usual, 1 to 8192 are taken",
            options.block_size
        );
        return Err(BenchError::Plan(message));
    }
    plan.check(config.context_length)?;
    let too_much =
        || BenchError::Plan("the plan needs more KV blocks than can be counted; choose smaller numbers".into());
    let blocks = u32::try_from(plan.blocks_needed(options.block_size)).map_err(|_| too_much())?;
    let kv_bytes = geometry.arena_bytes(blocks).ok_or_else(too_much)? as u64;
    if let Some(available) = available_memory() {
        let rows = plan.batch_max();
        MemoryNeed::estimate(
            &config,
            files.packed_bytes(&config, options.load.quantization),
            kv_bytes,
            plan.chunk_tokens.max(rows),
            rows,
        )
        .check(available)?;
    }
    let costs = Costs::of(&config, &files, &geometry, options.load.quantization);
    let engine = ModelEngine::load(&files, config, options.block_size, blocks, &options.load, progress)?;
    Ok(Opened {
        engine,
        costs,
        load_s: start.elapsed().as_secs_f64(),
    })
}

fn files(path: &Path) -> Result<(ModelConfig, ModelFiles), BenchError> {
    Ok((ModelConfig::from_dir(path)?, ModelFiles::open(path)?))
}
