//! The machine on tables in memory: what each command does, and random commands against a model. What it does on a disk
//! that fails is tested in `baton-raftstore`.

mod access;
mod batches;
mod invariants;
mod ledger;
mod model;
mod money;
mod report;
mod workers;

use crate::{Applied, MemoryTables, Outcome, apply, keys};
use baton_proto::state::{
    ApiKey, Budget, Command, LeaseSlice, Period, Posting, Price, Project, PutBudget, PutKey, PutPrice, PutProject,
    Scope, SettleUsage, Tick, UsageRecord, UsageStatus, command::Kind,
};
use prost::Message as _;

/// 2026-11-24 00:00 UTC.
pub(crate) const START: u64 = 1_795_478_400_000;

/// A machine that is told the time and gets one command after the other.
#[derive(Clone, Default)]
pub(crate) struct Bench {
    pub(crate) tables: MemoryTables,
    pub(crate) index: u64,
    pub(crate) now_ms: u64,
}

impl Bench {
    /// With project "p" and 20 USD for each million tokens in, 2 for cached ones, 80 out.
    pub(crate) fn new() -> Self {
        let mut bench = Self {
            now_ms: START,
            ..Self::default()
        };
        bench.run(project("p")).unwrap();
        bench.run(price("m", "default", 20, 0)).unwrap();
        bench
    }

    pub(crate) fn encode(&self, kind: Kind) -> Vec<u8> {
        Command {
            at_unix_ms: self.now_ms,
            actor: "operator".into(),
            kind: Some(kind),
        }
        .encode_to_vec()
    }

    pub(crate) fn run(&mut self, kind: Kind) -> Outcome {
        let command = self.encode(kind);
        self.run_bytes(&command)
    }

    pub(crate) fn run_bytes(&mut self, command: &[u8]) -> Outcome {
        self.index += 1;
        apply(&mut self.tables, self.index, command).unwrap()
    }

    pub(crate) fn tick(&mut self, ms: u64) {
        self.now_ms += ms;
        let now_unix_ms = self.now_ms;
        assert_eq!(self.run(Kind::Tick(Tick {})), Ok(Applied::Ticked { now_unix_ms }));
    }

    /// Everything but the hash.
    pub(crate) fn contents(&self) -> MemoryTables {
        let mut tables = self.tables.clone();
        tables.0.remove(keys::HASH);
        tables
    }

    /// A command that must be refused and leave everything as the time alone would.
    pub(crate) fn refuses(&mut self, kind: Kind) -> crate::Refused {
        let mut other = self.clone();
        other.run(Kind::Tick(Tick {})).unwrap();
        let refused = self.run(kind).unwrap_err();
        assert_eq!(self.contents(), other.contents(), "{refused}");
        refused
    }
}

pub(crate) fn project(id: &str) -> Kind {
    let project = Project {
        id: id.into(),
        organization_id: "o".into(),
        ..Project::default()
    };
    Kind::PutProject(PutProject { project: Some(project) })
}

pub(crate) fn api_key(id: &str, secret: u8) -> ApiKey {
    ApiKey {
        id: id.into(),
        sha256: vec![secret; 32].into(),
        project_id: "p".into(),
        scopes: vec![Scope::Inference.into()],
        ..ApiKey::default()
    }
}

pub(crate) fn put_key(key: ApiKey) -> Kind {
    Kind::PutKey(PutKey { key: Some(key) })
}

/// Dollars per million tokens in; cached a tenth, out four times as much.
pub(crate) fn price(model: &str, tier: &str, dollars: u64, from: u64) -> Kind {
    let price = Price {
        model: model.into(),
        service_tier: tier.into(),
        currency: "USD".into(),
        input_nano_per_mtok: dollars * 1_000_000_000,
        cached_input_nano_per_mtok: dollars * 100_000_000,
        output_nano_per_mtok: dollars * 4_000_000_000,
        effective_from_unix_ms: from,
        ..Price::default()
    };
    Kind::PutPrice(PutPrice { price: Some(price) })
}

pub(crate) fn budget(id: &str, limit_nano: u64, hard: bool, period: Period) -> Kind {
    let budget = Budget {
        id: id.into(),
        project_id: "p".into(),
        currency: "USD".into(),
        limit_nano,
        period: period.into(),
        hard,
        ..Budget::default()
    };
    Kind::PutBudget(PutBudget { budget: Some(budget) })
}

pub(crate) fn lease(budget_id: &str, slice_id: &str, want_nano: u64, expires_unix_ms: u64) -> Kind {
    Kind::LeaseSlice(LeaseSlice {
        budget_id: budget_id.into(),
        slice_id: slice_id.into(),
        member_id: 1,
        want_nano,
        expires_unix_ms,
    })
}

/// Ten prompt tokens and so many delivered: at the bench's price 200,000 nano-dollars and 80,000 a token.
pub(crate) fn record(request_id: &str, completion_tokens: u32) -> UsageRecord {
    UsageRecord {
        request_id: request_id.into(),
        model: "m".into(),
        status: UsageStatus::Completed.into(),
        prompt_tokens: 10,
        completion_tokens,
        sampled_tokens: completion_tokens,
        started_unix_ms: START,
        project_id: "p".into(),
        key_id: "k".into(),
        ..UsageRecord::default()
    }
}

pub(crate) fn settle(record: UsageRecord) -> Kind {
    Kind::SettleUsage(SettleUsage { record: Some(record) })
}

pub(crate) fn posting(budget_id: &str, slice_id: &str, reserved_nano: u64) -> Posting {
    Posting {
        budget_id: budget_id.into(),
        slice_id: slice_id.into(),
        reserved_nano,
    }
}

/// What [`record`] costs at the bench's price.
pub(crate) const fn cost(completion_tokens: u64) -> u64 {
    200_000 + 80_000 * completion_tokens
}
