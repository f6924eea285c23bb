//! The part of the scheduler that deals with tiers below the pool; see [`crate::tiers`] for the rules.

use baton_proto::block_hash::BlockHash;

use super::Scheduler;
use crate::request::{Plan, Reuse};
use crate::sequence::State;
use crate::step::SeqId;
use crate::tiers::{KvTiers, LoadRequest};

impl Scheduler {
    /// There are lower tiers: from now on every plan is made with
    /// [`plan_with`](Self::plan_with), which tells them what happens to named blocks.
    pub fn enable_tiers(&mut self) {
        self.has_tiers = true;
        self.blocks.enable_tier_events();
    }

    /// Whether a block of that name is in the pool now.
    pub fn has_block(&self, name: &BlockHash) -> bool {
        self.blocks.lookup(name).is_some()
    }

    /// A load has ended: `loaded` more leading blocks of its request are in place, beyond those that were at once. Nobody
    /// writes the sequence's blocks any more. The next plan lets it go on. False if there is no such load.
    pub fn load_ended(&mut self, id: SeqId, loaded: usize) -> bool {
        let Some(seq) = self.seqs.get_mut(&id).filter(|s| s.state == State::Loading) else {
            return false;
        };
        seq.state = State::Loaded;
        seq.loaded_from = seq.computed;
        self.take_loaded(id, loaded);
        true
    }

    /// Hands on what happened to named blocks. Called before any block of a plan is written to.
    pub(super) fn tell(&mut self, tiers: &mut dyn KvTiers) {
        if self.has_tiers {
            self.blocks
                .take_tier_events()
                .events
                .iter()
                .for_each(|e| tiers.observe(e));
        }
    }

    /// Asks for the continuation of the cached prefix of a sequence that owns its blocks. Answers whether it waits.
    pub(super) fn begin_load(&mut self, id: SeqId, plan: &mut Plan, tiers: &mut dyn KvTiers) -> bool {
        if !self.has_tiers || !self.config.prefix_cache {
            return false;
        }
        let size = self.config.block_size;
        let Some(seq) = self.seqs.get_mut(&id) else {
            return false;
        };
        let (first, end) = (seq.registered, seq.reusable_blocks());
        if first >= end {
            return false;
        }
        let request = LoadRequest {
            seq: id,
            parent: seq.parent(first),
            names: (first..end).map(|index| seq.hash(index)).collect(),
            blocks: seq.blocks[first..end].to_vec(),
            compute: self.pace.prefill_time((end - first) * size),
        };
        // The blocks just allocated may hold what was evicted for them.
        self.tell(tiers);
        let start = tiers.load(&request);
        self.take_loaded(id, start.now);
        self.reuse_loaded(id, first * size, plan);
        if start.pending
            && let Some(seq) = self.seqs.get_mut(&id)
        {
            seq.state = State::Loading;
            self.transport.insert(id);
        }
        start.pending
    }

    /// Lets sequences go on whose loads have ended.
    pub(super) fn resume_loaded(&mut self, plan: &mut Plan) {
        let loaded = |id: &SeqId| self.seqs[id].state == State::Loaded;
        let ids: Vec<SeqId> = self.transport.iter().copied().filter(loaded).collect();
        for id in ids {
            let from = self.seqs[&id].loaded_from;
            self.reuse_loaded(id, from, plan);
            self.transport.remove(&id);
            self.start(id, plan);
        }
    }

    /// The next `count` blocks of the sequence hold what their names say.
    fn take_loaded(&mut self, id: SeqId, count: usize) {
        let size = self.config.block_size;
        let Some(seq) = self.seqs.get_mut(&id) else { return };
        let count = count.min(seq.reusable_blocks().saturating_sub(seq.registered));
        seq.computed += count * size;
        self.totals.loaded_tokens += (count * size) as u64;
        if !seq.resumed {
            seq.cached_tokens += count * size;
            self.totals.cached_tokens += (count * size) as u64;
        }
        self.register_computed(id);
    }

    fn reuse_loaded(&mut self, id: SeqId, from: usize, plan: &mut Plan) {
        let Some(seq) = self.seqs.get(&id).filter(|s| s.computed > from) else {
            return;
        };
        plan.reused.push(Reuse {
            seq: id,
            positions: from..seq.computed,
            blocks: seq.blocks[from / self.config.block_size..seq.registered].to_vec(),
            prefill_only: seq.is_prefill_only(),
        });
    }
}
