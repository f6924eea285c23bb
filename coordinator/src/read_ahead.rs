//! Hints to workers: which blocks on their disk, or in the object store, a request will ask for, told while it still waits, so
//! that reading is done when its turn comes. A request waits in this coordinator's queue, or on a worker that computes other
//! prompts or steps streams; on an idle worker it would begin to read by itself as soon as the hint could.
//!
//! Where a request that is queued will go is a guess: the worker that would get it now. That is mostly the one that gets it, since
//! its blocks are there; else the hint was for nothing, and costs that worker a bounded number of reads. It may do nothing,
//! too. So hints are never waited for, repeated or answered.
//!
//! Not here: the choice ([`crate::router`]), and what a worker makes of a hint (`baton-tiers`).

use crate::cluster::{Cluster, Route};
use baton_gateway::Job;
use baton_proto::block_hash::{self, short};
use baton_proto::limits::READ_AHEAD_BLOCKS_MAX;
use baton_proto::worker::ReadAhead;
use baton_router::{Ask, Estimate};
use std::time::Instant;

/// Requests of a model's queue, this one included, beyond which another one that comes is not told of: those before it fill what
/// workers read ahead, and by the time of its turn their reads would be forgotten. It is told of when it is placed.
const QUEUED_MAX: usize = 8;

impl Cluster {
    /// The request has to wait for its turn.
    pub(crate) fn hint_queued(&self, job: &Job, queued: usize) {
        if queued > QUEUED_MAX || !self.reads_ahead(&job.model) {
            return;
        }
        let names = self.names(&job.model, &job.cache_salt, &job.prompt);
        let ask = Ask {
            prompt_tokens: job.prompt.len(),
            max_tokens: job.max_tokens as usize,
        };
        if let Ok(route) = self.route(&job.model, &ask, &names, Instant::now(), &[], &[]) {
            self.hint(&route, &job.cache_salt, &job.prompt);
        }
    }

    /// Whether some worker of the model has blocks that could be read ahead.
    fn reads_ahead(&self, model: &str) -> bool {
        let now_ms = self.now_ms();
        self.config.read_ahead
            && self.registry().serving(model, now_ms).any(|(worker, _)| {
                let tiers = worker.heartbeat.kv_tiers;
                tiers.is_some_and(|tiers| [tiers.disk, tiers.object].iter().flatten().any(|tier| tier.blocks > 0))
            })
    }

    /// Tells the worker that is to stream what it will have to read, if anything.
    pub(crate) fn hint(&self, route: &Route, salt: &[u8], prompt: &[u32]) {
        let Route {
            decode,
            kinds: (kind, _),
            estimate,
            ..
        } = route;
        if !self.config.read_ahead || estimate.read_blocks == 0 {
            return;
        }
        let hint = read_ahead(&kind.0, kind.1 as usize, salt, prompt, estimate);
        if let (Some(hint), Some(link)) = (hint, self.link(decode))
            && link.hint(hint)
        {
            self.routing_metrics().hinted(estimate.read_blocks);
        }
    }
}

/// The hint for a worker that names blocks by this model digest and block size: those that the estimate counts on. Of more than a
/// hint takes, the first that are not in the worker's pool, if what is there are the first ones, as a rule.
fn read_ahead(digest: &[u8], size: usize, salt: &[u8], prompt: &[u32], estimate: &Estimate) -> Option<ReadAhead> {
    let digest = digest.try_into().ok().filter(|_| size > 0)?;
    let root = block_hash::cache_root(digest, salt);
    let cached = estimate.decode_cached_tokens.min(prompt.len()) / size * size;
    let chain = block_hash::chain(&root, &prompt[..cached], size);
    let above = chain.len().saturating_sub(estimate.read_blocks as usize);
    let skip = above.min(chain.len().saturating_sub(READ_AHEAD_BLOCKS_MAX));
    let names = &chain[skip..chain.len().min(skip + READ_AHEAD_BLOCKS_MAX)];
    let parent = match skip.checked_sub(1) {
        Some(before) => chain[before],
        None => block_hash::root(&root),
    };
    Some(ReadAhead {
        parent: short(&parent),
        names: names.concat().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_names_what_is_counted_on_and_no_more_than_it_may() {
        let prompt: Vec<u32> = (0..16 * 1500 + 1).collect();
        let root = block_hash::cache_root(&[7; 32], b"salt");
        let chain = block_hash::chain(&root, &prompt, 16);
        let hint = |cached_blocks: usize, read_blocks| {
            let estimate = Estimate {
                decode_cached_tokens: cached_blocks * 16,
                read_blocks,
                ..Estimate::default()
            };
            let hint = read_ahead(&[7; 32], 16, b"salt", &prompt, &estimate).expect("a digest");
            (hint.parent, hint.names.to_vec())
        };
        assert_eq!(hint(10, 4), (short(&block_hash::root(&root)), chain[..10].concat()));
        assert_eq!(hint(1500, 100), (short(&chain[475]), chain[476..].concat()));
        assert_eq!(hint(1500, 1400), (short(&chain[99]), chain[100..1124].concat()));
        assert!(
            read_ahead(&[], 16, b"salt", &prompt, &Estimate::default()).is_none(),
            "a worker that names nothing"
        );
    }
}
