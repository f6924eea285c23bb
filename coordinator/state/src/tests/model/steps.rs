//! The random commands: few names and amounts, so that they meet.

use super::super::ledger::seal;
use super::super::workers::{register, register_once, witness};
use super::super::{Bench, api_key, budget, lease, posting, price, put_key, record, settle};
use super::rules::Model;
use crate::SLICE_GRACE_MS;
use crate::calendar::DAY_MS;
use baton_ledger::checkpoint::SigningKey;
use baton_proto::state::{
    ClaimIdempotency, ClosePeriod, CorrectUsage, Correction, Period, ReleaseIdempotency, ReturnSlice, RevokeKey, Tick,
    UsageRecord, UsageStatus, command::Kind,
};
use proptest::prelude::*;

#[derive(Debug, Clone)]
pub(super) enum Step {
    Tick(usize),
    Budget {
        budget: usize,
        limit: u64,
        hard: bool,
    },
    Lease {
        budget: usize,
        slice: u8,
        member: u64,
        want: u64,
        ms: u64,
    },
    Return {
        budget: usize,
        slice: u8,
    },
    Settle {
        request: u8,
        tokens: u32,
        cached: u32,
        fails: bool,
        slices: [Option<(u8, u64)>; 2],
        key: Option<(u8, u8)>,
    },
    Claim {
        request: u8,
        key: u8,
        body: u8,
        ms: u64,
    },
    Release {
        request: u8,
        key: u8,
    },
    Correct {
        id: u8,
        request: u8,
        tokens: i64,
        nano: i64,
    },
    Price {
        any: bool,
        dollars: u64,
        ago_ms: u64,
    },
    Key {
        key: u8,
        secret: u8,
    },
    Revoke(u8),
    Close {
        behind: u64,
    },
    Seal {
        signer: u8,
    },
    /// With a nonce, unless it is 0.
    Register(u8),
    Witness {
        member: u64,
        lost: bool,
        behind: u64,
    },
    Again,
}

const TICKS_MS: [u64; 6] = [0, 1, 30_000, SLICE_GRACE_MS, 600_000, 3_600_000];
pub(super) const BUDGETS: [(&str, Period); 2] = [("b0", Period::Total), ("b1", Period::Day)];
/// About what one request costs, so that limits are met often.
pub(super) const COST: u64 = 400_000;

pub(super) fn step() -> impl Strategy<Value = Step> {
    let slice = || prop::option::weighted(0.6, (0u8..3, prop_oneof![Just(4 * COST), 0..2 * COST]));
    prop_oneof![
        6 => (0..=TICKS_MS.len()).prop_map(Step::Tick),
        4 => (0usize..2, 1u64..12, prop::bool::weighted(0.8))
            .prop_map(|(budget, limit, hard)| Step::Budget { budget, limit: limit * COST, hard }),
        8 => (0usize..2, 0u8..3, 1u64..3, 0u64..8, 0u64..8).prop_map(|(budget, slice, member, want, ms)| Step::Lease {
            budget, slice, member: member.min(1 + u64::from(slice % 2)), want: want * COST, ms: ms * ms * 60_000,
        }),
        3 => (0usize..2, 0u8..3).prop_map(|(budget, slice)| Step::Return { budget, slice }),
        16 => (0u8..40, 0u32..6, 0u32..12, any::<bool>(), [slice(), slice()], prop::option::weighted(0.3, (0u8..3, 0u8..2)))
            .prop_map(|(request, tokens, cached, fails, slices, key)| Step::Settle { request, tokens, cached, fails, slices, key }),
        5 => (0u8..4, 0u8..16, -4i64..3, -300_000i64..100_000)
            .prop_map(|(id, request, tokens, nano)| Step::Correct { id, request, tokens, nano }),
        2 => (any::<bool>(), 0u64..30, 0u64..3).prop_map(|(any, dollars, ago)| Step::Price { any, dollars, ago_ms: ago * 1000 }),
        2 => (0u8..4, 0u8..4).prop_map(|(key, secret)| Step::Key { key, secret }),
        1 => (0u8..4).prop_map(Step::Revoke),
        3 => prop_oneof![4 => Just(0u64), 1 => 1u64..3].prop_map(|behind| Step::Close { behind }),
        3 => (1u8..4).prop_map(|signer| Step::Seal { signer: signer.min(2) }),
        5 => (0u8..3, 0u8..3, 0u8..2, prop_oneof![1 => Just(0u64), 9 => 1u64..100_000]).prop_map(|(request, key, body, ms)| Step::Claim { request, key, body, ms }),
        2 => (0u8..3, 0u8..3).prop_map(|(request, key)| Step::Release { request, key }),
        3 => (0u8..3).prop_map(Step::Register),
        4 => (1u64..4, prop::bool::weighted(0.7), 0u64..2)
            .prop_map(|(member, lost, behind)| Step::Witness { member, lost, behind }),
        6 => Just(Step::Again),
    ]
}

/// Where a tick leads: past the list, to ten minutes before a midnight, where periods end.
pub(super) fn later(now: u64, at: usize) -> u64 {
    let midnight = (now + 600_001).next_multiple_of(DAY_MS);
    TICKS_MS.get(at).map_or(midnight - 600_000, |ms| now + ms)
}

pub(super) fn command(bench: &Bench, model: &Model, step: &Step) -> Kind {
    match step {
        Step::Tick(_) | Step::Again => Kind::Tick(Tick {}),
        Step::Budget {
            budget: at,
            limit,
            hard,
        } => budget(BUDGETS[*at].0, *limit, *hard, BUDGETS[*at].1),
        Step::Lease {
            budget,
            slice,
            member,
            want,
            ms,
        } => {
            let Kind::LeaseSlice(mut asked) = lease(BUDGETS[*budget].0, &format!("s{slice}"), *want, model.now + ms)
            else {
                unreachable!()
            };
            asked.member_id = *member;
            Kind::LeaseSlice(asked)
        }
        Step::Return { budget, slice } => Kind::ReturnSlice(ReturnSlice {
            budget_id: BUDGETS[*budget].0.into(),
            slice_id: format!("s{slice}"),
        }),
        Step::Settle {
            request,
            tokens,
            cached,
            fails,
            slices,
            key,
        } => {
            let posts = slices.iter().enumerate();
            let posts =
                posts.filter_map(|(at, slice)| slice.map(|(id, nano)| posting(BUDGETS[at].0, &format!("s{id}"), nano)));
            settle(UsageRecord {
                cached_tokens: *cached,
                status: if *fails {
                    UsageStatus::Failed
                } else {
                    UsageStatus::Completed
                }
                .into(),
                // One token in six was counted twice by the gateway.
                sampled_tokens: if *cached == 5 {
                    tokens.saturating_sub(1)
                } else {
                    *tokens
                },
                started_unix_ms: model.now,
                user: format!("u{}", request % 3),
                idempotency_key_sha256: key.map_or(vec![], |(key, _)| vec![key; 32]).into(),
                request_sha256: key.map_or(vec![], |(_, body)| vec![body; 32]).into(),
                postings: posts.collect(),
                ..record(&format!("r{request}"), *tokens)
            })
        }
        Step::Claim { request, key, body, ms } => Kind::ClaimIdempotency(ClaimIdempotency {
            // As of `record`.
            key_id: record("r", 0).key_id,
            idempotency_key_sha256: vec![*key; 32].into(),
            request_sha256: vec![*body; 32].into(),
            request_id: format!("r{request}"),
            lease_ms: *ms,
        }),
        Step::Release { request, key } => Kind::ReleaseIdempotency(ReleaseIdempotency {
            key_id: record("r", 0).key_id,
            idempotency_key_sha256: vec![*key; 32].into(),
            request_id: format!("r{request}"),
        }),
        Step::Correct {
            id,
            request,
            tokens,
            nano,
        } => {
            let request_id = format!("r{request}");
            Kind::CorrectUsage(CorrectUsage {
                correction: Some(Correction {
                    sequence: model.requests.get(&request_id).map_or(1, |known| known.sequence),
                    request_id,
                    completion_tokens: *tokens,
                    output_nano: *nano,
                    reason: "test".into(),
                    correction_id: format!("c{id}"),
                    ..Correction::default()
                }),
            })
        }
        Step::Price { any, dollars, ago_ms } => {
            price(if *any { "*" } else { "m" }, "default", *dollars, model.now - ago_ms)
        }
        Step::Key { key, secret } => put_key(api_key(&format!("k{key}"), *secret)),
        Step::Revoke(key) => Kind::RevokeKey(RevokeKey { id: format!("k{key}") }),
        Step::Close { behind } => Kind::ClosePeriod(ClosePeriod {
            after_sequence: model.periods.1.saturating_sub(*behind),
        }),
        Step::Seal { signer } => seal(bench, &SigningKey::from_seed(&[*signer; 32])),
        Step::Register(0) => register("w"),
        Step::Register(nonce) => register_once("w", &[*nonce; 16]),
        Step::Witness { member, lost, behind } => {
            witness(model.epoch.saturating_sub(*behind), *member, *lost, &[1, 2, 3])
        }
    }
}
