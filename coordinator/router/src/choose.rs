//! The choice: decode first, then whether and where the prompt is computed for it.
//!
//! 1. Workers that are full are out. Doubtful ones come last, then those that the prompt can never fit, then prefill
//!    workers, which serve whole requests only if no other can or all others are busy ([`Policy::busy_s`]).
//! 2. Of the rest the cheapest streams ([`crate::cost`]). A worker that may have its prompt computed elsewhere is charged
//!    for the better of the two ways.
//! 3. The prompt goes to a prefill worker if that pays: *remote ≤ local × (1 + margin) + harm to running streams*, all by
//!    measured rates, where only a decode worker has the margin. Before prefill and transfer were measured the threshold
//!    decides, which also brings the first measurements about. A worker that also prefills is not helped by its equals.
//!
//! Ties go to fewer streams, more available blocks and the smaller id, so the order of candidates does not matter.

use crate::calibration::Overheads;
use crate::cost::{Ask, Candidate, Estimate, Means, Policy, Role, Work};
use crate::index::Tier;
use std::cmp::Reverse;

/// The router's answer; numbers are indices of the candidates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The worker that streams, and the one that computes the prompt, if another.
    Place {
        /// Streams.
        decode: usize,
        /// Computes the prompt.
        prefill: Option<usize>,
        /// What is predicted of it.
        estimate: Estimate,
    },
    /// There are workers, and all are full.
    Full,
    /// There is no worker.
    Nobody,
}

/// A prefill worker and its work for one prompt.
#[derive(Clone, Copy)]
struct Peer {
    index: usize,
    work: Work,
}

/// Chooses.
pub fn choose(candidates: &[Candidate<'_>], ask: &Ask, policy: &Policy, overheads: &Overheads) -> Choice {
    if candidates.is_empty() {
        return Choice::Nobody;
    }
    let means = Means::of(candidates);
    let peers = Peers::find(candidates, ask, &means, overheads);
    let (mut best, mut best_any_role) = (None, None);
    for (index, streams) in candidates.iter().enumerate().filter(|(_, candidate)| !candidate.full) {
        let local = streams.local(ask, &means);
        let remote = peers.of(streams).map(|peer| peer.work);
        let remote = remote.filter(|remote| pays(streams, local, *remote, ask, &means, policy));
        let work = remote.unwrap_or(local);
        let wrong_role = streams.role == Role::Prefill;
        let room_s = streams.room_s(ask);
        let key = (
            streams.doubtful,
            !streams.fits(ask),
            wrong_role,
            streams.cost_us(work, room_s, &means, policy),
            streams.streams,
            Reverse(streams.available_blocks),
            streams.id,
        );
        let late = work.total_s() + room_s > policy.busy_s;
        let any_role = (key.0, key.1, late, key.3, key.4, key.5, key.6);
        if best.as_ref().is_none_or(|(least, _, _)| key < *least) {
            best = Some((key, index, late));
        }
        if best_any_role.as_ref().is_none_or(|(least, _)| any_role < *least) {
            best_any_role = Some((any_role, index));
        }
    }
    let decode = match (best, best_any_role) {
        // The right role is busy: whoever is not, helps.
        (Some((_, _, true)), Some((_, index))) => index,
        (Some((_, index, _)), _) => index,
        (None, _) => return Choice::Full,
    };
    place(candidates, decode, ask, &means, policy, overheads)
}

/// The rest of the choice, for a worker that is to stream: whether and where the prompt is computed for it.
pub(crate) fn place_at(
    candidates: &[Candidate<'_>],
    decode: usize,
    ask: &Ask,
    policy: &Policy,
    overheads: &Overheads,
) -> Choice {
    place(candidates, decode, ask, &Means::of(candidates), policy, overheads)
}

fn place(
    candidates: &[Candidate<'_>],
    decode: usize,
    ask: &Ask,
    means: &Means,
    policy: &Policy,
    overheads: &Overheads,
) -> Choice {
    let streams = &candidates[decode];
    let local = streams.local(ask, means);
    let cached_here = streams.cached_tokens(ask);
    // Exactly for this decode worker, where the first look took the transfer of the whole prompt.
    let peer = candidates
        .iter()
        .enumerate()
        .filter(|(index, peer)| *index != decode && helps(peer, streams))
        .map(|(index, peer)| Peer {
            index,
            work: peer.remote(ask, cached_here, means, overheads),
        })
        .min_by_key(|peer| peer_key(candidates, *peer, ask))
        .filter(|peer| pays(streams, local, peer.work, ask, means, policy));
    let (computes, work) = match peer {
        Some(peer) => (&candidates[peer.index], peer.work),
        None => (streams, local),
    };
    // What a hand-over costs is part of the correction.
    let counted_s = if peer.is_some() { overheads.hand_over_s() } else { 0.0 };
    let modelled_s = work.total_s() - counted_s + streams.room_s(ask) + streams.step_s(means);
    let correction_s = overheads.correction_s(peer.is_some());
    Choice::Place {
        decode,
        prefill: peer.map(|peer| peer.index),
        estimate: Estimate {
            ttft_s: (modelled_s + correction_s).max(0.0),
            modelled_s,
            cached_tokens: computes.cached_tokens(ask),
            uncached_tokens: computes.uncached_tokens(ask),
            decode_cached_tokens: cached_here,
            read_blocks: streams.prefix.lower[Tier::Disk as usize - 1]
                + streams.prefix.lower[Tier::Object as usize - 1],
            waits: streams.is_busy(ask),
        },
    }
}

/// Whether `peer` may compute prompts for `streams`.
fn helps(peer: &Candidate<'_>, streams: &Candidate<'_>) -> bool {
    !peer.doubtful
        && !peer.full
        && peer.kv_digest == streams.kv_digest
        && match peer.role {
            Role::Prefill => streams.role != Role::Prefill,
            Role::Combined => streams.role == Role::Decode,
            Role::Decode => false,
        }
}

/// Whether a hand-over is worth it; see the module.
fn pays(streams: &Candidate<'_>, local: Work, remote: Work, ask: &Ask, means: &Means, policy: &Policy) -> bool {
    let measured = means.prefill_measured && means.transfer.is_some();
    if !measured || policy.prefill_threshold_tokens == 0 {
        return streams.uncached_tokens(ask) > policy.prefill_threshold_tokens;
    }
    let margin = match streams.role {
        Role::Decode => policy.remote_margin,
        Role::Combined | Role::Prefill => 0.0,
    };
    let harm_s = local.own_s * f64::from(streams.streams) * policy.harm_per_stream;
    remote.total_s() <= local.total_s() * (1.0 + margin) + harm_s
}

type PeerKey<'a> = (bool, u64, u32, Reverse<u32>, &'a str);

fn peer_key<'a>(candidates: &[Candidate<'a>], peer: Peer, ask: &Ask) -> PeerKey<'a> {
    let candidate = &candidates[peer.index];
    let us = ((peer.work.total_s() + candidate.room_s(ask)) * 1e6) as u64;
    let load = candidate.streams.max(candidate.prefilling);
    (
        !candidate.fits(ask),
        us,
        load,
        Reverse(candidate.available_blocks),
        candidate.id,
    )
}

/// The best prefill worker of each kind of decode worker, found once for all of them: with the transfer of the whole
/// prompt, which mostly hides behind the compute.
struct Peers<'a> {
    by_digest: Vec<(&'a [u8], Bests)>,
}

#[derive(Clone, Copy, Default)]
struct Bests {
    prefill: Option<Peer>,
    combined: Option<Peer>,
}

impl<'a> Peers<'a> {
    fn find(candidates: &[Candidate<'a>], ask: &Ask, means: &Means, overheads: &Overheads) -> Self {
        let mut by_digest: Vec<(&'a [u8], Bests)> = Vec::new();
        let helpers = candidates
            .iter()
            .enumerate()
            .filter(|(_, peer)| !peer.doubtful && !peer.full && peer.role != Role::Decode);
        for (index, helper) in helpers {
            let at = match by_digest.iter().position(|(digest, _)| *digest == helper.kv_digest) {
                Some(at) => at,
                None => {
                    by_digest.push((helper.kv_digest, Bests::default()));
                    by_digest.len() - 1
                }
            };
            let bests = &mut by_digest[at].1;
            let best = match helper.role {
                Role::Prefill => &mut bests.prefill,
                Role::Combined | Role::Decode => &mut bests.combined,
            };
            let peer = Peer {
                index,
                work: helper.remote(ask, 0, means, overheads),
            };
            if best.is_none_or(|best| peer_key(candidates, peer, ask) < peer_key(candidates, best, ask)) {
                *best = Some(peer);
            }
        }
        // Workers of one model have few digests (precisions, block sizes): the list stays short.
        Self { by_digest }
    }

    fn of(&self, streams: &Candidate<'_>) -> Option<Peer> {
        let (_, bests) = self.by_digest.iter().find(|(digest, _)| *digest == streams.kv_digest)?;
        let by_time = |peer: &Peer| (peer.work.total_s() * 1e6) as u64;
        match streams.role {
            Role::Prefill => None,
            Role::Combined => bests.prefill,
            Role::Decode => bests.prefill.into_iter().chain(bests.combined).min_by_key(by_time),
        }
    }
}

#[cfg(test)]
#[path = "choose_tests.rs"]
mod tests;
