//! Numbers for heartbeats and metrics.

/// Gauges of this instant and totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences computing here: prefilling or decoding.
    pub running: usize,
    /// Sequences in the queue, preempted ones included.
    pub waiting: usize,
    /// Sequences whose prompt a prefill worker is filling.
    pub filling: usize,
    /// Sequences whose blocks are being loaded from a lower tier.
    pub loading: usize,
    /// Prefill-only sequences that are computed and held until the push is acknowledged.
    pub pushing: usize,
    /// Cancelled sequences whose blocks a transport may still touch.
    pub draining: usize,
    /// Blocks that hold nothing.
    pub free_blocks: usize,
    /// Blocks that sequences hold.
    pub held_blocks: usize,
    /// Blocks that nobody holds and the prefix cache remembers; they are given out when `free_blocks` runs out.
    pub cached_blocks: usize,
    /// All blocks: the sum of the three above.
    pub total_blocks: usize,
    /// Times a sequence was sent back to the queue because blocks ran out.
    pub preemptions: u64,
    /// Prompt tokens of admitted sequences, each counted once.
    pub prompt_tokens: u64,
    /// Of these, tokens taken from the prefix cache, lower tiers included.
    pub cached_tokens: u64,
    /// Of these, tokens whose KV came from a lower tier.
    pub loaded_tokens: u64,
    /// Tokens emitted to callers.
    pub generation_tokens: u64,
    /// Tokens computed in steps, recomputation included.
    pub computed_tokens: u64,
    /// Steps committed.
    pub steps: u64,
}

impl Stats {
    /// Sequences whose blocks a transport may touch, or that wait for blocks from a lower tier.
    pub fn transferring(&self) -> usize {
        self.filling + self.loading + self.pushing + self.draining
    }

    /// Share of the pool that sequences hold, from 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        self.held_blocks as f64 / self.total_blocks.max(1) as f64
    }
}
