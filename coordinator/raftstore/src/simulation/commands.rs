//! What clients want, as commands.

use super::clients::What;
use super::power::Random;
use baton_ledger::checkpoint::SigningKey;
use baton_limits::Reservation;
use baton_proto::cluster::Register;
use baton_proto::state::{
    ApiKey, Budget, ClosePeriod, CorrectUsage, Correction, Deployment, LeaseSlice, Limits, Member, Period, Posting,
    Price, Project, PutBudget, PutDeployment, PutKey, PutMember, PutPrice, PutProject, RegisterWorker,
    RemoveDeployment, RemoveWorker, ReturnSlice, RevokeKey, Scope, SealPeriod, SettleUsage, Tick, UsageRecord,
    UsageStatus, WitnessWorker, command::Kind,
};
use baton_state::{Tables, view};

/// Commands that a run begins with.
pub(super) const FOUNDING: usize = 9;
/// Budgets `b0` and so on: limit, period, whether it is hard.
pub(super) const BUDGETS: [(u64, Period, bool); 4] = [
    (12_000_000, Period::Total, true),
    (5_000_000, Period::Total, true),
    (4_000_000, Period::Day, true),
    (3_000_000, Period::Month, false),
];
/// Of a request's prompt.
const PROMPT_TOKENS: u32 = 10;
const MTOK: u64 = 1_000_000;

/// What so many delivered tokens cost under a price whose amounts are whole nano-units per token.
pub(super) fn cost(price: &Price, cached: u32, tokens: u32) -> u64 {
    let of = |nano_per_mtok: u64, tokens: u32| nano_per_mtok / MTOK * u64::from(tokens);
    of(price.input_nano_per_mtok, PROMPT_TOKENS - cached)
        + of(price.cached_input_nano_per_mtok, cached)
        + of(price.output_nano_per_mtok, tokens)
}

/// A version of the price, from a time on.
pub(super) fn price(output_nano: u64, from_unix_ms: u64) -> Price {
    Price {
        model: "m".into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        input_nano_per_mtok: 20_000_000_000,
        cached_input_nano_per_mtok: 2_000_000_000,
        output_nano_per_mtok: output_nano * MTOK,
        effective_from_unix_ms: from_unix_ms,
        ..Price::default()
    }
}

pub(super) fn budget(at: usize, limit_nano: u64) -> Kind {
    let (_, period, hard) = BUDGETS[at];
    Kind::PutBudget(PutBudget {
        budget: Some(Budget {
            id: format!("b{at}"),
            project_id: "p".into(),
            currency: "USD".into(),
            limit_nano,
            period: period.into(),
            hard,
            ..Budget::default()
        }),
    })
}

/// A key with a limit of requests per minute.
pub(super) fn key(number: u8, requests_per_min: u64) -> Kind {
    Kind::PutKey(PutKey {
        key: Some(ApiKey {
            id: format!("k{number}"),
            sha256: vec![number; 32].into(),
            project_id: "p".into(),
            scopes: vec![Scope::Inference.into()],
            limits: Some(Limits {
                requests_per_min,
                tokens_per_min: 100 * requests_per_min,
            }),
            ..ApiKey::default()
        }),
    })
}

pub(super) fn project(requests_per_min: u64) -> Kind {
    Kind::PutProject(PutProject {
        project: Some(Project {
            id: "p".into(),
            organization_id: "o".into(),
            limits: Some(Limits {
                requests_per_min,
                ..Limits::default()
            }),
            ..Project::default()
        }),
    })
}

/// What an operator changes, drawn.
pub(super) fn change(random: &mut Random, unix_ms: u64) -> Kind {
    let number = random.range(1, 100);
    match random.range(0, 8) {
        0 | 1 => {
            let from = unix_ms + random.range(0, 40_000) - 20_000;
            let mut price = price([40_000, 80_000, 120_000][random.range(0, 3) as usize], from);
            if random.chance(40) {
                price.effective_to_unix_ms = from + random.range(5_000, 60_000);
            }
            Kind::PutPrice(PutPrice { price: Some(price) })
        }
        2 | 3 => {
            let at = random.range(0, BUDGETS.len() as u64) as usize;
            budget(at, BUDGETS[at].0 * random.range(50, 200) / 100)
        }
        4 => key((number % 3) as u8, number),
        5 => Kind::RevokeKey(RevokeKey {
            id: format!("k{}", number % 3),
        }),
        6 => project(number),
        _ if number < 50 => Kind::RemoveDeployment(RemoveDeployment { model: "m".into() }),
        _ => Kind::PutDeployment(PutDeployment {
            deployment: Some(Deployment {
                model: "m".into(),
                revision: format!("v{number}"),
                ..Deployment::default()
            }),
        }),
    }
}

fn signer(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

fn founding(at: usize) -> Kind {
    let member = |seed: u8| {
        Kind::PutMember(PutMember {
            member: Some(Member {
                id: u64::from(seed),
                ledger_public_key: signer(seed).public_key().to_vec().into(),
                ..Member::default()
            }),
        })
    };
    match at {
        0 => project(0),
        1 => Kind::PutPrice(PutPrice {
            price: Some(price(80_000, 0)),
        }),
        2..=5 => budget(at - 2, BUDGETS[at - 2].0),
        6 => key(0, 60),
        7 => member(1),
        _ => member(2),
    }
}

/// The command for it, as of a member's state; none if it has become pointless.
pub(super) fn kind(what: &What, state: &impl Tables, member_id: u64, voters: &[u64], unix_ms: u64) -> Option<Kind> {
    Some(match what {
        What::Found(at) => {
            // Budgets and keys need their project: whoever is too early tries again.
            let early = matches!(at, 2..=6) && view::project(state, "p").ok()?.is_none();
            if early { Kind::Tick(Tick {}) } else { founding(*at) }
        }
        What::Settle(record, _) => Kind::SettleUsage(SettleUsage {
            record: Some((**record).clone()),
        }),
        What::Lease { gateway, ask, .. } => Kind::LeaseSlice(LeaseSlice {
            budget_id: ask.budget_id.clone(),
            slice_id: ask.slice_id.clone(),
            member_id: *gateway as u64 + 1,
            want_nano: ask.want_nano,
            expires_unix_ms: ask.expires_unix_ms,
        }),
        What::Register(worker) => Kind::RegisterWorker(RegisterWorker {
            worker: Some(Register {
                worker_id: worker.clone(),
                ..Register::default()
            }),
            at_unix_ms: unix_ms,
            nonce: Default::default(),
        }),
        What::Remove(worker, epoch) => Kind::RemoveWorker(RemoveWorker {
            worker_id: worker.clone(),
            epoch: *epoch,
            reason: format!("member {member_id} lost it"),
            at_unix_ms: unix_ms,
        }),
        What::Correct(correction) => Kind::CorrectUsage(CorrectUsage {
            correction: Some((**correction).clone()),
        }),
        What::Close => Kind::ClosePeriod(ClosePeriod {
            after_sequence: view::last_checkpoint(state).ok()?.map_or(0, |last| last.last_sequence),
        }),
        What::Seal(seed) => {
            let mut period = view::closed_period(state).ok()??;
            period.at_unix_ms = unix_ms;
            signer(*seed).sign(&mut period);
            Kind::SealPeriod(SealPeriod {
                last_sequence: period.last_sequence,
                public_key: period.public_key,
                signature: period.signature,
            })
        }
        What::Return(budget_id, slice_id) => Kind::ReturnSlice(ReturnSlice {
            budget_id: budget_id.clone(),
            slice_id: slice_id.clone(),
        }),
        What::Change(kind) => (**kind).clone(),
        What::Witness(worker, epoch, lost) => {
            // Only voters are asked for their votes.
            voters.contains(&member_id).then_some(())?;
            Kind::WitnessWorker(WitnessWorker {
                worker_id: worker.clone(),
                epoch: *epoch,
                member_id,
                lost: *lost,
                voters: voters.to_vec(),
            })
        }
        What::Tick => Kind::Tick(Tick {}),
        What::Read(_) => return None,
    })
}

/// A request that begins. What is delivered comes later.
pub(super) fn record(number: u64, reservation: &Reservation, price: &Price, unix_ms: u64, keyed: bool) -> UsageRecord {
    let postings = reservation.slices.iter().map(|(budget_id, slice_id)| Posting {
        budget_id: budget_id.clone(),
        slice_id: slice_id.clone(),
        reserved_nano: reservation.nano,
    });
    let keyed = |byte: u8| if keyed { vec![byte; 32] } else { Vec::new() };
    UsageRecord {
        request_id: format!("r{number}"),
        model: "m".into(),
        service_tier: "default".into(),
        status: UsageStatus::Completed.into(),
        prompt_tokens: PROMPT_TOKENS,
        cached_tokens: (number % 11) as u32,
        started_unix_ms: unix_ms,
        project_id: "p".into(),
        key_id: "k".into(),
        price_id: price.id.clone(),
        postings: postings.collect(),
        idempotency_key_sha256: keyed(number as u8).into(),
        request_sha256: keyed(1).into(),
        ..UsageRecord::default()
    }
}

/// One token less.
pub(super) fn correction(number: u64, record: &UsageRecord, sequence: u64, price: &Price) -> Correction {
    Correction {
        request_id: record.request_id.clone(),
        sequence,
        completion_tokens: -1,
        output_nano: -((price.output_nano_per_mtok / MTOK) as i64),
        reason: "counted twice".into(),
        correction_id: format!("c{number}"),
        ..Correction::default()
    }
}
