//! What the engine thread tells of its load, for the heartbeat.
//!
//! Transfers are counted elsewhere; whoever sends the heartbeat adds them.

use super::{EngineLoop, saturate};
use crate::tiers::WorkerTiers;
use baton_proto::cluster::Heartbeat;

impl EngineLoop {
    pub(super) fn load(&self) -> Heartbeat {
        let stats = self.scheduler.stats();
        Heartbeat {
            running: saturate(stats.running),
            waiting: saturate(stats.waiting),
            free_blocks: saturate(stats.free_blocks),
            held_blocks: saturate(stats.held_blocks),
            cached_blocks: saturate(stats.cached_blocks),
            transferring: saturate(stats.transferring()),
            prompt_tokens_total: stats.prompt_tokens,
            cached_tokens_total: stats.cached_tokens,
            generation_tokens_total: stats.generation_tokens,
            preemptions_total: stats.preemptions,
            transferred_bytes_total: 0,
            push_overlap: 0.0,
            pending_prompt_tokens: self.scheduler.pending_prompt_tokens(),
            prefill_tokens_per_s: self.rates.prefill_tokens_per_s(),
            decode_step_us: self.rates.decode_step_us(),
            kv_tiers: self.tiers.as_ref().map(WorkerTiers::stats),
            ..Default::default()
        }
    }
}
