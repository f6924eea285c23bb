//! What clients want, as commands.

use super::clients::What;
use baton_ledger::checkpoint::SigningKey;
use baton_limits::Reservation;
use baton_proto::cluster::Register;
use baton_proto::state::{
    Budget, ClosePeriod, CorrectUsage, Correction, LeaseSlice, Member, Period, Posting, Price, Project, PutBudget,
    PutMember, PutPrice, PutProject, RegisterWorker, RemoveWorker, SealPeriod, SettleUsage, Tick, UsageRecord,
    UsageStatus, command::Kind,
};
use baton_state::{Tables, view};

/// 2026-11-24 00:00 UTC.
pub(super) const START: u64 = 1_795_478_400_000;
/// Commands that a run begins with.
pub(super) const FOUNDING: usize = 6;
/// Of the hard budgets `b0` and `b1`.
pub(super) const LIMITS: [u64; 2] = [12_000_000, 5_000_000];

/// Of ten prompt tokens and so many delivered, in nano-units.
pub(super) const fn cost(tokens: u32) -> u64 {
    200_000 + 80_000 * tokens as u64
}

fn signer(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

fn founding(at: usize) -> Kind {
    let budget = |at: usize| {
        Kind::PutBudget(PutBudget {
            budget: Some(Budget {
                id: format!("b{at}"),
                project_id: "p".into(),
                currency: "USD".into(),
                limit_nano: LIMITS[at],
                period: Period::Total.into(),
                hard: true,
                ..Budget::default()
            }),
        })
    };
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
        0 => Kind::PutProject(PutProject {
            project: Some(Project {
                id: "p".into(),
                organization_id: "o".into(),
                ..Project::default()
            }),
        }),
        1 => Kind::PutPrice(PutPrice {
            price: Some(Price {
                model: "m".into(),
                service_tier: "default".into(),
                currency: "USD".into(),
                input_nano_per_mtok: 20_000_000_000,
                cached_input_nano_per_mtok: 2_000_000_000,
                output_nano_per_mtok: 80_000_000_000,
                ..Price::default()
            }),
        }),
        2 => budget(0),
        3 => budget(1),
        4 => member(1),
        _ => member(2),
    }
}

/// The command for it, as of a member's state; none if it has become pointless.
pub(super) fn kind(what: &What, state: &impl Tables, member_id: u64, unix_ms: u64) -> Option<Kind> {
    Some(match what {
        What::Found(at) => {
            // A budget needs its project: whoever is too early tries again.
            let early = matches!(at, 2 | 3) && view::project(state, "p").ok()?.is_none();
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
        What::Tick => Kind::Tick(Tick {}),
        What::Read(_) => return None,
    })
}

/// A request that begins. What is delivered comes later.
pub(super) fn record(number: u64, reservation: &Reservation, unix_ms: u64, keyed: bool) -> UsageRecord {
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
        prompt_tokens: 10,
        started_unix_ms: unix_ms,
        project_id: "p".into(),
        key_id: "k".into(),
        postings: postings.collect(),
        idempotency_key_sha256: keyed(number as u8).into(),
        request_sha256: keyed(1).into(),
        ..UsageRecord::default()
    }
}

/// One token less.
pub(super) fn correction(number: u64, record: &UsageRecord, sequence: u64) -> Correction {
    Correction {
        request_id: record.request_id.clone(),
        sequence,
        completion_tokens: -1,
        output_nano: -80_000,
        reason: "counted twice".into(),
        correction_id: format!("c{number}"),
        ..Correction::default()
    }
}
