//! How much KV memory each worker gets, and whether the whole cluster fits this machine: decided before anything is
//! loaded, so that the answer is a sentence and not the kernel's killer. What one model needs, and what the machine has,
//! is measured by `baton-model`.

use crate::cli::size;
use anyhow::bail;

/// Share of the available memory that KV blocks of all workers take by default: a quarter leaves the weights, the
/// other programs of a laptop, and the page cache their part.
const KV_SHARE: u64 = 4;
/// Full contexts that KV blocks have room for by default, memory permitting: above what a CPU serves at once.
const KV_CONTEXTS: u64 = 64;
/// Tokens of KV a worker must have room for, or serving makes no sense.
const KV_TOKENS_MIN: u64 = 1024;

/// What a model needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelNeeds {
    /// Bytes of the weights once packed; each worker has its own.
    pub weight_bytes: u64,
    /// Activations, logits and scratch of each worker, and its copies of weights that it cannot compute on as stored.
    pub scratch_bytes: u64,
    /// KV bytes of one token.
    pub kv_token_bytes: u64,
    /// Longest context in tokens.
    pub context_tokens: u64,
    /// Memory of each worker for KV blocks that left its pool.
    pub host_tier_bytes: u64,
}

/// Chooses the KV memory per worker, or says why the model does not fit. `available` is `None` where the system does
/// not tell.
pub fn kv_bytes(
    model: &str,
    needs: ModelNeeds,
    workers: u64,
    asked: Option<u64>,
    available: Option<u64>,
) -> anyhow::Result<u64> {
    let tokens_min = KV_TOKENS_MIN.min(needs.context_tokens);
    let smallest = tokens_min.saturating_mul(needs.kv_token_bytes);
    let wanted = KV_CONTEXTS
        .saturating_mul(needs.context_tokens)
        .saturating_mul(needs.kv_token_bytes);
    let kv = match (asked, available) {
        (Some(asked), _) if asked < smallest => bail!(
            "--kv-mem {} is too little for {model}: {tokens_min} tokens of KV take {}; give at least that",
            size::format(asked),
            size::format(smallest),
        ),
        (Some(asked), _) => asked,
        (None, Some(available)) => wanted.min(available / KV_SHARE / workers).max(smallest),
        (None, None) => wanted.min(1 << 30).max(smallest),
    };
    let each = kv
        .saturating_add(needs.host_tier_bytes)
        .saturating_add(needs.scratch_bytes)
        .saturating_add(needs.weight_bytes);
    let needed = workers.saturating_mul(each);
    match available {
        Some(available) if needed > available => bail!(
            "{model} does not fit the memory of this machine: it needs about {} ({} of weights, {} of KV blocks (--kv-mem and --kv-host-mem) and {} of \
             working memory for each of {workers} workers) and {} are available; take a smaller model, fewer workers \
             (--prefill, --decode), smaller weights (--quantize) or a smaller --kv-mem",
            size::format(needed),
            size::format(needs.weight_bytes),
            size::format(kv.saturating_add(needs.host_tier_bytes)),
            size::format(needs.scratch_bytes),
            size::format(available),
        ),
        _ => Ok(kv),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: ModelNeeds = ModelNeeds {
        weight_bytes: 1 << 30,
        scratch_bytes: 1 << 20,
        kv_token_bytes: 1 << 10,
        context_tokens: 4096,
        host_tier_bytes: 0,
    };
    const GIB: u64 = 1 << 30;

    #[test]
    fn defaults_are_sane() {
        let kv = |available| kv_bytes("m", MODEL, 2, None, Some(available)).ok();
        assert_eq!(kv(100 * GIB), Some(64 * 4096 * 1024), "64 contexts where there is room");
        assert_eq!(kv(4 * GIB), Some(64 * 4096 * 1024));
        let small = ModelNeeds {
            kv_token_bytes: 1 << 20,
            ..MODEL
        };
        assert_eq!(
            kv_bytes("m", small, 2, None, Some(16 * GIB)).ok(),
            Some(2 * GIB),
            "a quarter over two workers"
        );
        assert_eq!(kv_bytes("m", MODEL, 2, None, None).ok(), Some(64 * 4096 * 1024));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let message = |asked, available| match kv_bytes("m", MODEL, 2, asked, Some(available)) {
            Err(error) => error.to_string(),
            Ok(kv) => panic!("{kv} bytes were granted"),
        };
        assert!(message(None, GIB).contains("does not fit"));
        let with_host_tier = ModelNeeds {
            host_tier_bytes: 4 * GIB,
            ..MODEL
        };
        assert!(kv_bytes("m", with_host_tier, 2, None, Some(8 * GIB)).is_err());
        assert!(message(Some(60 * GIB), 100 * GIB).contains("--kv-mem"));
        assert!(message(Some(1024), 100 * GIB).contains("too little"));
        assert!(
            message(Some(u64::MAX), 100 * GIB).contains("does not fit"),
            "sums do not overflow"
        );
    }
}
