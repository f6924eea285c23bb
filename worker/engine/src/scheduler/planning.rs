//! The planning half of the scheduler: decodes, then admission, then prefill chunks. Costs O(batch) per plan, plus one
//! match of the prefix cache for the head of the queue when the pool changed since it last did not fit, and a look at
//! those next behind it.

use std::collections::HashMap;

use baton_proto::block_hash::BlockHash;

use super::Scheduler;
use crate::chunks::{self, Want};
use crate::rank::Rank;
use crate::request::{FillRequest, Plan, Reuse};
use crate::sequence::{State, Task};
use crate::step::{SeqId, StepSeq};
use crate::tiers::{KvTiers, NoTiers};

/// How far behind a head that does not fit one is looked for that does: keeps a plan cheap under a long queue.
const PASSERS_LOOKED_AT: usize = 64;

impl Scheduler {
    /// What to do next. While a step is open (planned, neither committed nor failed) there is nothing to do.
    pub fn plan(&mut self) -> Plan {
        self.plan_with(&mut NoTiers)
    }

    /// The same with lower tiers, which are told what happened to named blocks and asked for those that an admitted
    /// sequence lacks. Everything in the plan comes after that: nothing of it may be started earlier.
    pub fn plan_with(&mut self, tiers: &mut dyn KvTiers) -> Plan {
        let mut plan = Plan::default();
        if self.step_open {
            return plan;
        }
        self.resume_loaded(&mut plan);
        self.plan_decodes(&mut plan);
        // Who was just sent back shall not come in again by the same door.
        if plan.preempted.is_empty() {
            self.admit(&mut plan, tiers);
        }
        self.plan_prefills(&mut plan);
        self.tell(tiers);
        self.step_open = !plan.batch.is_empty();
        plan
    }

    /// One token for every sequence that lacks only the KV of its last one, oldest first.
    fn plan_decodes(&mut self, plan: &mut Plan) {
        let ids: Vec<SeqId> = self.running.iter().map(|rank| rank.id).collect();
        for id in ids {
            // A younger one may have been preempted by an older one meanwhile.
            let Some(seq) = self
                .seqs
                .get(&id)
                .filter(|s| s.state == State::Running && s.remaining() == 1)
            else {
                continue;
            };
            if seq.has_room() || self.make_room(id, plan) {
                self.push_span(id, 1, plan);
            }
        }
    }

    /// One more block, if need be from younger sequences. Without success the sequence stays as it is and waits.
    fn make_room(&mut self, id: SeqId, plan: &mut Plan) -> bool {
        loop {
            if let Some(block) = self.blocks.allocate() {
                if let Some(seq) = self.seqs.get_mut(&id) {
                    seq.blocks.push(block);
                }
                return true;
            }
            let Some(rank) = self.seqs.get(&id).map(|seq| seq.rank) else {
                return false;
            };
            let mut youngest_first = self.running.iter().rev().take_while(|other| **other > rank);
            let younger = youngest_first.find(|other| self.seqs[&other.id].is_preemptable());
            let Some(&Rank { id: victim, .. }) = younger else {
                return false;
            };
            self.preempt(victim);
            plan.preempted.push(victim);
        }
    }

    fn preempt(&mut self, id: SeqId) {
        if let Some(mut seq) = self.seqs.remove(&id) {
            self.running.remove(&seq.rank);
            self.release_blocks(&mut seq);
            seq.state = State::Waiting;
            seq.resumed = true;
            self.waiting.insert(seq.rank);
            self.seqs.insert(id, seq);
            self.totals.preemptions += 1;
        }
    }

    /// Lets sequences in, in their order, while a place and all their blocks are to be had; see the rule of passing.
    fn admit(&mut self, plan: &mut Plan, tiers: &mut dyn KvTiers) {
        while let Some(head) = self.waiting.first().map(|rank| rank.id) {
            if self.running.len() + self.transport.len() >= self.config.seqs_max {
                return;
            }
            let situation = (head, self.blocks.version(), self.running.len());
            let admitted = if self.blocked != Some(situation) && self.take_blocks(head, plan) {
                head
            } else {
                self.blocked = Some(situation);
                match self.passer(head) {
                    Some(id) if self.take_blocks(id, plan) => id,
                    _ => return,
                }
            };
            if let Some(seq) = self.seqs.get(&admitted) {
                self.waiting.remove(&seq.rank);
            }
            self.count_admission(admitted, plan);
            if !self.begin_load(admitted, plan, tiers) {
                self.start(admitted, plan);
            }
        }
    }

    /// The oldest that may pass the head of the queue, which does not fit, and does fit itself even without a cached
    /// block. It is charged to the head.
    fn passer(&mut self, head: SeqId) -> Option<SeqId> {
        let waiting = self.seqs.get(&head).filter(|seq| !seq.resumed)?;
        let allowed = waiting.blocks_needed().saturating_sub(waiting.passed_blocks);
        let room = self.blocks.available().saturating_sub(self.running.len()).min(allowed);
        let needs = |id: &SeqId| self.seqs[id].blocks_needed();
        let behind = self.waiting.iter().skip(1).take(PASSERS_LOOKED_AT);
        let passer = behind.map(|rank| rank.id).find(|id| needs(id) <= room)?;
        let blocks = needs(&passer);
        self.seqs.get_mut(&head)?.passed_blocks += blocks;
        Some(passer)
    }

    /// Gives the sequence the blocks of all its tokens, as many as possible from the cache; all or nothing.
    fn take_blocks(&mut self, id: SeqId, plan: &mut Plan) -> bool {
        let Some(seq) = self.seqs.get_mut(&id) else {
            return false;
        };
        let mut hits = Vec::new();
        if self.config.prefix_cache {
            while hits.len() < seq.reusable_blocks()
                && let Some(block) = self.blocks.lookup(&seq.hash(hits.len()))
            {
                hits.push(block);
            }
        }
        let fresh = seq.blocks_needed() - hits.len();
        let idle_hits = hits.iter().filter(|b| self.blocks.is_idle(**b)).count();
        if self.blocks.available() < fresh + idle_hits + self.running.len() {
            return false;
        }
        // Hits first: an allocation might forget them.
        for &block in &hits {
            self.blocks.share(block);
        }
        seq.computed = hits.len() * self.config.block_size;
        seq.registered = hits.len();
        seq.blocks = hits;
        seq.blocks.extend((0..fresh).map_while(|_| self.blocks.allocate()));
        if seq.computed > 0 {
            if !seq.resumed {
                seq.cached_tokens = seq.computed;
                self.totals.cached_tokens += seq.computed as u64;
            }
            plan.reused.push(Reuse {
                seq: id,
                positions: 0..seq.computed,
                blocks: seq.blocks[..seq.registered].to_vec(),
                prefill_only: seq.is_prefill_only(),
            });
        }
        true
    }

    fn count_admission(&mut self, id: SeqId, plan: &mut Plan) {
        if let Some(seq) = self.seqs.get(&id).filter(|seq| !seq.resumed) {
            plan.admitted.push(id);
            self.totals.prompt_tokens += seq.prompt.len() as u64;
        }
    }

    /// Running, or Filling if a remote prefill is allowed and worth it.
    pub(super) fn start(&mut self, id: SeqId, plan: &mut Plan) {
        let Some(seq) = self.seqs.get_mut(&id) else {
            return;
        };
        let remote = matches!(
            seq.task,
            Task::Generate {
                remote_prefill: true,
                ..
            }
        ) && !seq.resumed
            && seq.prompt.len() - seq.computed >= self.config.remote_prefill_min_tokens;
        if remote {
            seq.state = State::Filling;
            self.transport.insert(id);
            plan.fills.push(FillRequest {
                seq: id,
                prompt: seq.prompt.clone(),
                sampling: seq.sampling,
                cached_tokens: seq.computed,
                blocks: seq.blocks[seq.registered..].to_vec(),
            });
        } else {
            seq.state = State::Running;
            self.running.insert(seq.rank);
        }
    }

    /// Shares what decodes left of the token budget between prompts.
    fn plan_prefills(&mut self, plan: &mut Plan) {
        let decodes = plan.batch.seqs.len();
        let budget = self.config.batch_tokens_max.saturating_sub(decodes);
        let budget = budget.min(self.pace.prefill_tokens_max(decodes));
        let ids: Vec<SeqId> = self
            .running
            .iter()
            .map(|rank| rank.id)
            // A decode that found no block waits for one, not for a chunk.
            .filter(|id| self.seqs.get(id).is_some_and(|s| !s.in_step && s.has_room()))
            .collect();
        if self.config.prefix_cache {
            ids.iter().for_each(|id| self.reuse_late(*id, plan));
        }
        let leaders = self.one_per_block(&ids);
        let wants: Vec<Want> = leaders
            .iter()
            .enumerate()
            .map(|(at, id)| Want {
                age: at as u64,
                remaining: self.seqs[id].remaining(),
            })
            .collect();
        let grants = chunks::share_out(&wants, budget, self.config.prefill_chunk_tokens_max);
        for (id, grant) in leaders.into_iter().zip(grants) {
            if grant > 0 {
                self.push_span(id, grant, plan);
            }
        }
    }

    /// Swaps blocks that the sequence was about to compute for equal ones that became known since it was admitted.
    fn reuse_late(&mut self, id: SeqId, plan: &mut Plan) {
        let Some(seq) = self.seqs.get_mut(&id) else {
            return;
        };
        let (start, first) = (seq.computed, seq.computed / self.config.block_size);
        while let Some((index, hash)) = seq.next_reusable()
            && let Some(block) = self.blocks.lookup(&hash)
        {
            self.blocks.share(block);
            let own = std::mem::replace(&mut seq.blocks[index], block);
            self.blocks.release(own);
            seq.computed = (index + 1) * self.config.block_size;
            seq.registered = index + 1;
        }
        if seq.computed > start {
            if !seq.resumed {
                seq.cached_tokens += seq.computed - start;
                self.totals.cached_tokens += (seq.computed - start) as u64;
            }
            plan.reused.push(Reuse {
                seq: id,
                positions: start..seq.computed,
                blocks: seq.blocks[first..seq.registered].to_vec(),
                prefill_only: seq.is_prefill_only(),
            });
        }
    }

    /// Of sequences (given by age) whose next block has the same content, the one with least left to do: it computes the
    /// block, and the others find it in the cache at their next turn. The first answered is the one that the oldest
    /// sequence depends on, itself as a rule.
    fn one_per_block(&mut self, ids: &[SeqId]) -> Vec<SeqId> {
        let mut leaders: Vec<SeqId> = Vec::with_capacity(ids.len());
        let mut by_block: HashMap<BlockHash, usize> = HashMap::new();
        for &id in ids {
            let Some(seq) = self.seqs.get_mut(&id) else {
                continue;
            };
            let remaining = seq.remaining();
            let next = if self.config.prefix_cache {
                seq.next_reusable()
            } else {
                None
            };
            let leader = next.and_then(|(_, hash)| {
                let at = *by_block.entry(hash).or_insert(leaders.len());
                (at < leaders.len()).then_some(at)
            });
            match leader {
                Some(at) if self.seqs[&leaders[at]].remaining() > remaining => leaders[at] = id,
                Some(_) => {}
                None => leaders.push(id),
            }
        }
        leaders
    }

    fn push_span(&mut self, id: SeqId, len: usize, plan: &mut Plan) {
        let Some(seq) = self.seqs.get_mut(&id) else {
            return;
        };
        let end = seq.computed + len;
        seq.in_step = true;
        plan.batch.seqs.push(StepSeq {
            seq: id,
            tokens: seq.tokens(seq.computed..end),
            start_pos: seq.computed,
            blocks: seq.blocks[..end.div_ceil(self.config.block_size)].to_vec(),
            sample: (end == seq.len()).then_some(seq.sampling),
            shaping: seq.shaping.clone().filter(|_| end == seq.len()),
        });
    }
}
