//! How much memory a model needs, and whether this machine has it, answered before anything is loaded.

use crate::config::ModelConfig;
use crate::error::ModelError;
use std::path::Path;

/// Bytes a worker needs for one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights, as stored.
    pub weights: u64,
    /// KV arena.
    pub kv: u64,
    /// Activations of the largest batch, logits, and kernel scratch. Copies of weights that cannot be computed on as
    /// stored (`ModelFiles::copied_bytes`) are for the caller to add.
    pub scratch: u64,
}

impl MemoryNeed {
    /// Need of a model with `weight_bytes` of weights, `kv_bytes` of KV arena, batches of at most `batch_tokens` tokens
    /// and `logit_rows` sampled rows.
    pub fn estimate(
        config: &ModelConfig,
        weight_bytes: u64,
        kv_bytes: u64,
        batch_tokens: usize,
        logit_rows: usize,
    ) -> Self {
        let per_token = 3 * config.hidden_size
            + config.qkv_width()
            + config.heads * config.head_dim
            + 3 * config.intermediate_size
            + config.head_dim;
        let floats = (per_token as u64).saturating_mul(batch_tokens as u64)
            + ((config.vocab_size + config.hidden_size) as u64).saturating_mul(logit_rows as u64);
        MemoryNeed {
            weights: weight_bytes,
            kv: kv_bytes,
            scratch: floats.saturating_mul(4),
        }
    }

    /// The same on `ranks` tensor-parallel ranks: what each of them has whole, and the buffers they meet in.
    pub fn on_ranks(mut self, config: &ModelConfig, ranks: usize, batch_tokens: usize, logit_rows: usize) -> Self {
        if ranks > 1 {
            let per_token = (5usize.saturating_mul(ranks) - 3).saturating_mul(config.hidden_size) as u64;
            let floats = per_token
                .saturating_mul(batch_tokens as u64)
                .saturating_add((2 * config.vocab_size as u64).saturating_mul(logit_rows as u64));
            self.scratch = self.scratch.saturating_add(floats.saturating_mul(4));
        }
        self
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.scratch)
    }

    /// # Errors
    /// [`ModelError::DoesNotFit`], saying how much is needed for what, how much there is, and the way out.
    pub fn check(&self, available: u64) -> Result<(), ModelError> {
        if self.total() <= available {
            return Ok(());
        }
        Err(ModelError::DoesNotFit(format!(
            "the model does not fit memory: it needs {} (weights {}, KV cache {}, working memory {}) and {} are \
             available; choose a smaller model, a smaller KV cache, or a larger machine",
            show(self.total()),
            show(self.weights),
            show(self.kv),
            show(self.scratch),
            show(available)
        )))
    }
}

/// Bytes, for people.
fn show(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes.div_ceil(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

/// Memory this process may still take: what the system says is available, or what its control group leaves if that is
/// less. `None` where neither can be read (not Linux).
pub fn available_memory() -> Option<u64> {
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    });
    let number = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = Path::new("/sys/fs/cgroup");
    let limit = number(&group.join("memory.max")).map(|max| {
        let used = number(&group.join("memory.current")).unwrap_or(0);
        // The group's page cache counts as used but gives way.
        let cache = std::fs::read_to_string(group.join("memory.stat"))
            .ok()
            .and_then(|text| {
                text.lines()
                    .find_map(|l| l.strip_prefix("file "))?
                    .trim()
                    .parse::<u64>()
                    .ok()
            });
        max.saturating_sub(used.saturating_sub(cache.unwrap_or(0)))
    });
    match (system, limit) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_the_parts_and_the_way_out() {
        let need = MemoryNeed {
            weights: 3 << 30,
            kv: 512 << 20,
            scratch: 10 << 20,
        };
        assert!(need.check(4 << 30).is_ok());
        let message = need.check(2 << 30).unwrap_err().to_string();
        for part in [
            "does not fit memory",
            "3.5 GiB",
            "weights 3.0 GiB",
            "512 MiB",
            "2.0 GiB",
            "smaller model",
        ] {
            assert!(message.contains(part), "{message}");
        }
    }
}
