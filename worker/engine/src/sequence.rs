//! One request as the scheduler sees it: its tokens, its blocks, how far its KV is computed, and its state.
//!
//! Invariants while it holds blocks:
//! - `computed < len()`: the last token's KV is not needed before the next step, which needs its logits;
//! - KV of positions `0..computed` is valid through `blocks`;
//! - `blocks` covers at least `computed` positions, and every token once a span is planned;
//! - the first `registered` blocks are full, computed, and known to the prefix cache.
//!
//! Decides nothing; see the scheduler.

use std::ops::Range;
use std::sync::Arc;

use baton_proto::block_hash::{self, BlockHash};

use crate::rank::Rank;
use crate::sampling::{SamplingParams, Shaping};
use crate::step::SeqId;

/// Where a sequence is in its life. A finished sequence is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// In the queue; holds no block.
    Waiting,
    /// Blocks of its prefix are being read from a lower tier; only this thread writes them.
    Loading,
    /// They are in place; the next plan lets it go on.
    Loaded,
    /// A transport writes its prompt's blocks.
    Filling,
    /// Computes here.
    Running,
    /// Prefill-only and computed; a transport reads its blocks.
    Pushing,
    /// Over for the caller, but a transport may still touch its blocks.
    Draining,
}

/// What the sequence is for.
#[derive(Debug)]
pub(crate) enum Task {
    /// Stream tokens.
    Generate {
        max_tokens: usize,
        stop_token_ids: Vec<u32>,
        remote_prefill: bool,
    },
    /// Compute a prompt for somebody else.
    Prefill,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub id: SeqId,
    pub rank: Rank,
    pub task: Task,
    pub state: State,
    pub prompt: Arc<[u32]>,
    pub generated: Vec<u32>,
    pub sampling: SamplingParams,
    pub shaping: Option<Arc<Shaping>>,
    pub blocks: Vec<u32>,
    pub computed: usize,
    pub registered: usize,
    pub cached_tokens: usize,
    /// Where the last load from a lower tier began, in tokens; meaningful while `Loaded`.
    pub loaded_from: usize,
    /// Was admitted before: what it does now repeats work, and counts for no statistic.
    pub resumed: bool,
    /// Has a span in the step that is being computed.
    pub in_step: bool,
    /// Blocks given to younger sequences while this one, the head of the queue, did not fit.
    pub passed_blocks: usize,
    /// Prompt tokens that were in the cache when it was submitted: a guess for those who ask how much there is to do.
    pub expected_cached: usize,
    block_size: usize,
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl Sequence {
    #[allow(clippy::too_many_arguments)] // a constructor of plain data
    pub fn new(
        rank: Rank,
        task: Task,
        prompt: Arc<[u32]>,
        sampling: SamplingParams,
        shaping: Option<Arc<Shaping>>,
        root: BlockHash,
        block_size: usize,
    ) -> Self {
        Sequence {
            id: rank.id,
            rank,
            task,
            state: State::Waiting,
            prompt,
            generated: Vec::new(),
            sampling,
            shaping,
            blocks: Vec::new(),
            computed: 0,
            registered: 0,
            cached_tokens: 0,
            loaded_from: 0,
            resumed: false,
            in_step: false,
            passed_blocks: 0,
            expected_cached: 0,
            block_size,
            root,
            hashes: Vec::new(),
        }
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Prompt tokens that are yet to be computed here, as far as it is known.
    pub fn pending_tokens(&self) -> usize {
        match (self.state, &self.task) {
            // A prefill worker computes it, most likely.
            (
                State::Waiting,
                Task::Generate {
                    remote_prefill: true, ..
                },
            ) if !self.resumed => 0,
            (State::Waiting, _) => self.remaining() - self.expected_cached.min(self.remaining() - 1),
            (State::Running, _) if self.remaining() > 1 => self.remaining(),
            _ => 0,
        }
    }

    /// Tokens so far, prompt and generated.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    /// Tokens whose KV is yet to be computed; at least 1.
    pub fn remaining(&self) -> usize {
        self.len() - self.computed
    }

    /// Whether the blocks at hand take the KV of every token.
    pub fn has_room(&self) -> bool {
        self.blocks.len() * self.block_size >= self.len()
    }

    /// Blocks that all tokens need.
    pub fn blocks_needed(&self) -> usize {
        self.len().div_ceil(self.block_size)
    }

    /// Full leading blocks that may come from the cache: all but what holds the last token, so that at least one token
    /// is always computed and logits exist.
    pub fn reusable_blocks(&self) -> usize {
        (self.len() - 1) / self.block_size
    }

    pub fn is_prefill_only(&self) -> bool {
        matches!(self.task, Task::Prefill)
    }

    /// Only a sequence that computes here and whose blocks no transport sees can give them up.
    pub fn is_preemptable(&self) -> bool {
        self.state == State::Running && !self.is_prefill_only()
    }

    pub fn tokens(&self, range: Range<usize>) -> Vec<u32> {
        let split = self.prompt.len();
        let mut tokens = Vec::with_capacity(range.len());
        tokens.extend_from_slice(&self.prompt[range.start.min(split)..range.end.min(split)]);
        tokens.extend_from_slice(&self.generated[range.start.saturating_sub(split)..range.end.saturating_sub(split)]);
        tokens
    }

    /// Name of what comes before full block `index`: the block before it, or the root.
    pub fn parent(&mut self, index: usize) -> BlockHash {
        index.checked_sub(1).map_or(self.root, |before| self.hash(before))
    }

    /// The name of full block `index`. Computed once, when first asked for.
    pub fn hash(&mut self, index: usize) -> BlockHash {
        debug_assert!(
            (index + 1) * self.block_size <= self.len(),
            "only full blocks have names"
        );
        while self.hashes.len() <= index {
            let at = self.hashes.len();
            let tokens = self.tokens(at * self.block_size..(at + 1) * self.block_size);
            let parent = self.hashes.last().unwrap_or(&self.root);
            self.hashes.push(block_hash::next(parent, &tokens));
        }
        self.hashes[index]
    }

    /// The block that the next computed token goes to, if it is one that the cache could serve. A prefill-only sequence
    /// keeps a block it has begun: a transport may be reading what is there.
    pub fn next_reusable(&mut self) -> Option<(usize, BlockHash)> {
        let index = self.computed / self.block_size;
        let pinned = self.is_prefill_only() && !self.computed.is_multiple_of(self.block_size);
        (index < self.reusable_blocks() && !pinned).then(|| (index, self.hash(index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(prompt: Vec<u32>) -> Sequence {
        let root = block_hash::root(b"r");
        Sequence::new(
            Rank::new(SeqId(1), 0),
            Task::Prefill,
            prompt.into(),
            SamplingParams::GREEDY,
            None,
            root,
            4,
        )
    }

    #[test]
    fn tokens_and_hashes_cross_the_border_of_prompt_and_generated() {
        let mut seq = sequence((0..6).collect());
        seq.generated = (6..13).collect();
        let all: Vec<u32> = (0..13).collect();
        for start in 0..13 {
            for end in start..=13 {
                assert_eq!(seq.tokens(start..end), all[start..end]);
            }
        }
        let expected = block_hash::chain(b"r", &all, 4);
        assert_eq!(seq.hash(2), expected[2]);
        assert_eq!(seq.hash(0), expected[0]);
    }

    #[test]
    fn the_last_token_is_never_reusable() {
        for (len, blocks) in [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)] {
            assert_eq!(sequence(vec![0; len]).reusable_blocks(), blocks, "{len} tokens");
        }
    }

    /// A transport may be reading what a prefill-only sequence has written of a block, so that block stays.
    #[test]
    fn a_prefill_only_sequence_keeps_the_block_it_has_begun() {
        let mut seq = sequence((0..20).collect());
        seq.computed = 6;
        assert_eq!(seq.next_reusable(), None);
        seq.computed = 8;
        assert_eq!(seq.next_reusable().map(|(index, _)| index), Some(2));
        seq.task = Task::Generate {
            max_tokens: 1,
            stop_token_ids: Vec::new(),
            remote_prefill: false,
        };
        seq.computed = 6;
        assert_eq!(seq.next_reusable().map(|(index, _)| index), Some(1));
    }
}
