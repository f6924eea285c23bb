//! Where a request goes: a pure function of the workers as they are known. No IO, no clock, no randomness; equal
//! inputs give equal choices, so a simulation routes exactly as production does.
//!
//! Decode first: the least loaded worker of role decode or combined streams; a prefill worker is named only if the
//! prompt is long enough. Roles are policy: if only prefill workers are left, they serve everything.

use baton_gateway::WorkerRole;
use std::cmp::Reverse;

/// A worker that could take work now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Its id, the last tie-break.
    pub id: &'a str,
    /// What it is for.
    pub role: WorkerRole,
    /// Its KV compatibility digest.
    pub kv_digest: &'a [u8],
    /// Sequences it has, running and waiting.
    pub load: u32,
    /// Prompts it computes for others, of those in `load` or still on their way.
    pub prefilling: u32,
    /// Free KV blocks.
    pub free_blocks: u32,
    /// It takes no more requests.
    pub full: bool,
    /// Better not: it is suspect, or has failed this very request before.
    pub doubtful: bool,
}

/// What is asked of the router.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Prompts longer than this go to a prefill worker, if there is one.
    pub prefill_threshold_tokens: usize,
}

/// The router's answer; numbers are indices of the candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The worker that streams, and the one that computes the prompt, if another.
    Place {
        /// Streams.
        decode: usize,
        /// Computes the prompt.
        prefill: Option<usize>,
    },
    /// There are workers, and all are full.
    Full,
    /// There is no worker.
    Nobody,
}

/// Chooses.
pub fn choose(candidates: &[Candidate<'_>], ask: Ask) -> Choice {
    if candidates.is_empty() {
        return Choice::Nobody;
    }
    let open = || candidates.iter().enumerate().filter(|(_, candidate)| !candidate.full);
    let decode = open()
        .min_by_key(|(_, candidate)| {
            let wrong_role = candidate.role == WorkerRole::Prefill;
            (
                candidate.doubtful,
                wrong_role,
                candidate.load,
                Reverse(candidate.free_blocks),
                candidate.id,
            )
        })
        .map(|(index, _)| index);
    let Some(decode) = decode else {
        return Choice::Full;
    };
    let prefill = (ask.prompt_tokens > ask.prefill_threshold_tokens)
        .then(|| prefill_for(candidates, decode))
        .flatten();
    Choice::Place { decode, prefill }
}

/// The least loaded worker that may compute a prompt for `decode`. A worker that also prefills is not helped by its
/// equals: that would only move the work and pay for the transfer.
fn prefill_for(candidates: &[Candidate<'_>], decode: usize) -> Option<usize> {
    let streams = &candidates[decode];
    candidates
        .iter()
        .enumerate()
        .filter(|(index, candidate)| {
            *index != decode
                && !candidate.doubtful
                && !candidate.full
                && candidate.kv_digest == streams.kv_digest
                && match candidate.role {
                    WorkerRole::Prefill => streams.role != WorkerRole::Prefill,
                    WorkerRole::Combined => streams.role == WorkerRole::Decode,
                    WorkerRole::Decode => false,
                }
        })
        .min_by_key(|(_, candidate)| {
            (
                candidate.load.max(candidate.prefilling),
                Reverse(candidate.free_blocks),
                candidate.id,
            )
        })
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(id: &str, role: WorkerRole, load: u32) -> Candidate<'_> {
        Candidate {
            id,
            role,
            kv_digest: b"d",
            load,
            prefilling: 0,
            free_blocks: 10,
            full: false,
            doubtful: false,
        }
    }

    fn ask(prompt_tokens: usize) -> Ask {
        Ask {
            prompt_tokens,
            prefill_threshold_tokens: 100,
        }
    }

    fn place(decode: usize, prefill: Option<usize>) -> Choice {
        Choice::Place { decode, prefill }
    }

    #[test]
    fn long_prompts_are_prefilled_elsewhere() {
        let workers = [
            candidate("d0", WorkerRole::Decode, 3),
            candidate("d1", WorkerRole::Decode, 2),
            candidate("p0", WorkerRole::Prefill, 1),
            candidate("p1", WorkerRole::Prefill, 0),
        ];
        assert_eq!(choose(&workers, ask(100)), place(1, None));
        assert_eq!(choose(&workers, ask(101)), place(1, Some(3)));
    }

    #[test]
    fn one_kind_of_worker_serves_everything() {
        for role in [WorkerRole::Prefill, WorkerRole::Decode, WorkerRole::Combined] {
            let workers = [candidate("a", role, 1), candidate("b", role, 0)];
            assert_eq!(choose(&workers, ask(1000)), place(1, None), "{role:?}");
        }
        assert_eq!(choose(&[], ask(1)), Choice::Nobody);
    }

    #[test]
    fn another_model_or_geometry_does_not_help() {
        let mut other = candidate("p", WorkerRole::Prefill, 0);
        other.kv_digest = b"other";
        assert_eq!(
            choose(&[candidate("d", WorkerRole::Decode, 0), other], ask(1000)),
            place(0, None)
        );
    }

    #[test]
    fn ties_go_to_free_blocks_and_then_the_id() {
        let mut workers = [
            candidate("b", WorkerRole::Decode, 1),
            candidate("a", WorkerRole::Decode, 1),
        ];
        assert_eq!(choose(&workers, ask(1)), place(1, None));
        workers[0].free_blocks = 11;
        assert_eq!(choose(&workers, ask(1)), place(0, None));
        workers[0].doubtful = true;
        assert_eq!(choose(&workers, ask(1)), place(1, None));
        workers[1].full = true;
        assert_eq!(choose(&workers, ask(1)), place(0, None));
        workers[0].full = true;
        assert_eq!(choose(&workers, ask(1)), Choice::Full);
    }

    fn any_candidate() -> impl Strategy<Value = (u8, u8, u32, u32, u32, bool, bool)> {
        (
            0u8..3,
            0u8..2,
            0u32..5,
            0u32..3,
            0u32..20,
            prop::bool::weighted(0.2),
            prop::bool::weighted(0.2),
        )
    }

    proptest! {
        #[test]
        fn choices_are_sound_and_do_not_depend_on_order(
            seeds in prop::collection::vec(any_candidate(), 0..12), tokens in 0usize..200, rotate in 0usize..12,
        ) {
            let ids: Vec<String> = (0..seeds.len()).map(|i| format!("w{i}")).collect();
            let digests: [&[u8]; 2] = [b"x", b"y"];
            let workers: Vec<Candidate<'_>> = seeds.iter().zip(&ids).map(|(seed, id)| Candidate {
                id,
                role: [WorkerRole::Prefill, WorkerRole::Decode, WorkerRole::Combined][usize::from(seed.0)],
                kv_digest: digests[usize::from(seed.1)],
                load: seed.2,
                prefilling: seed.3,
                free_blocks: seed.4,
                full: seed.5,
                doubtful: seed.6,
            }).collect();
            let choice = choose(&workers, ask(tokens));
            match choice {
                Choice::Nobody => prop_assert!(workers.is_empty()),
                Choice::Full => prop_assert!(workers.iter().all(|worker| worker.full)),
                Choice::Place { decode, prefill } => {
                    let chosen = &workers[decode];
                    prop_assert!(!chosen.full);
                    for other in workers.iter().filter(|other| !other.full && !other.doubtful) {
                        prop_assert!(!chosen.doubtful);
                        if other.role != WorkerRole::Prefill {
                            prop_assert!(chosen.role != WorkerRole::Prefill && chosen.load <= other.load);
                        }
                    }
                    if let Some(prefill) = prefill {
                        prop_assert!(tokens > 100 && prefill != decode);
                        prop_assert!(workers[prefill].kv_digest == chosen.kv_digest && !workers[prefill].full);
                        prop_assert!(workers[prefill].role != WorkerRole::Decode);
                    }
                }
            }
            let mut turned = workers.clone();
            if !turned.is_empty() {
                turned.rotate_left(rotate % seeds.len());
            }
            let named = |workers: &[Candidate<'_>], choice| match choice {
                Choice::Place { decode, prefill } => {
                    (Some(workers[decode].id.to_owned()), prefill.map(|p: usize| workers[p].id.to_owned()))
                }
                _ => (None, None),
            };
            let again = choose(&turned, ask(tokens));
            prop_assert_eq!(named(&workers, choice), named(&turned, again));
        }
    }
}
