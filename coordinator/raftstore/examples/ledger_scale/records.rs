//! The records: who asked, for what, when. Everything follows from a record's number and how many there are.
//!
//! 20 projects with 5 keys each, 8 models with prices of their own, 20,000 users of whom few ask much; ids as gateways make
//! them (UUIDv7). One in twenty is a batch, one in thirty cancelled, one in ten has an idempotency key, and a fifth posts
//! to the budget of its project.

use super::Failure;
use baton_proto::state::{
    Attempt, Budget, Command, LeaseSlice, Member, Period, Posting, Price, Project, PutBudget, PutMember, PutPrice,
    PutProject, SettleUsage, UsageRecord, UsageStatus, command::Kind,
};

/// 2026-10-01 00:00 UTC.
pub const START_MS: u64 = 1_790_812_800_000;
pub const DAY_MS: u64 = 86_400_000;
pub const HOUR_MS: u64 = 3_600_000;
const DAYS: u64 = 30;
pub const HOURS: u64 = DAYS * 24;
/// End of the records, and the time of the reports.
pub const END_MS: u64 = START_MS + DAYS * DAY_MS;
const PROJECTS: u64 = 20;
const BUDGETED_PROJECTS: u64 = 4;
const KEYS: u64 = 5;
const USERS: u64 = 20_000;
const MODELS: u64 = 8;

/// How many there are; those beyond follow at the same pace, on the day after.
#[derive(Debug, Clone, Copy)]
pub struct Records(pub u64);

impl Records {
    pub fn of(text: &str) -> Result<Self, Failure> {
        match text.parse()? {
            0 => Err("how many records?".into()),
            count => Ok(Self(count)),
        }
    }

    pub fn at(self, number: u64) -> u64 {
        START_MS + (u128::from(number) * u128::from(DAYS * DAY_MS) / u128::from(self.0)) as u64
    }

    /// Projects, prices, budgets, and the member that signs.
    pub fn first_commands(public_key: &[u8]) -> Vec<Command> {
        let mut kinds = vec![Kind::PutMember(PutMember {
            member: Some(Member {
                id: 1,
                ledger_public_key: public_key.to_vec().into(),
                ..Member::default()
            }),
        })];
        for i in 0..PROJECTS {
            let project = Project {
                id: project(i),
                organization_id: "org-1".into(),
                ..Project::default()
            };
            kinds.push(Kind::PutProject(PutProject { project: Some(project) }));
        }
        for i in 0..MODELS {
            let price = Price {
                model: model(i),
                service_tier: "default".into(),
                currency: "USD".into(),
                input_nano_per_mtok: (i + 1) * 2_500_000_000,
                cached_input_nano_per_mtok: (i + 1) * 250_000_000,
                output_nano_per_mtok: (i + 1) * 10_000_000_000,
                ..Price::default()
            };
            kinds.push(Kind::PutPrice(PutPrice { price: Some(price) }));
        }
        for i in 0..BUDGETED_PROJECTS {
            let budget = Budget {
                id: format!("budget-{i}"),
                project_id: project(i),
                currency: "USD".into(),
                limit_nano: u64::MAX,
                period: Period::Total.into(),
                hard: true,
                ..Budget::default()
            };
            kinds.push(Kind::PutBudget(PutBudget { budget: Some(budget) }));
        }
        kinds.into_iter().map(|kind| command(START_MS, kind)).collect()
    }

    /// What comes before a record: now and then, a slice is prolonged.
    pub fn lease(self, number: u64) -> Option<Command> {
        // Every ten minutes: far less than a lease lasts.
        let every = (self.0 / (HOURS * 6)).max(BUDGETED_PROJECTS);
        let budget = usize::try_from(number % every)
            .ok()
            .filter(|at| *at < BUDGETED_PROJECTS as usize)?;
        self.leases(number).into_iter().nth(budget)
    }

    /// The leases of all budgets at the time of a record.
    pub fn leases(self, number: u64) -> Vec<Command> {
        let at = self.at(number);
        let lease = |i| {
            let lease = LeaseSlice {
                budget_id: format!("budget-{i}"),
                slice_id: "slice-1".into(),
                member_id: 1,
                want_nano: 1 << 60,
                expires_unix_ms: at + HOUR_MS,
            };
            command(at, Kind::LeaseSlice(lease))
        };
        (0..BUDGETED_PROJECTS).map(lease).collect()
    }

    pub fn settle(self, number: u64) -> Command {
        let at = self.at(number);
        let mut random = Random(number);
        let user = random.skewed(USERS);
        // A user is one key's.
        let (key, project_number) = (user % (PROJECTS * KEYS), user % PROJECTS);
        let model = model(random.skewed(MODELS));
        let prompt_tokens = 200 + random.below(4000) as u32;
        let sampled_tokens = 20 + random.below(700) as u32;
        let cancelled = random.below(30) == 0;
        let worker = format!("decode-{}", random.below(64));
        let [high, low] = [random.next(), random.next()];
        let mut record = UsageRecord {
            request_id: format!("chatcmpl-{at:012x}7{:03x}{:016x}", high & 0xfff, low >> 2 | 1 << 63),
            model,
            status: if cancelled {
                UsageStatus::Cancelled
            } else {
                UsageStatus::Completed
            }
            .into(),
            prompt_tokens,
            cached_tokens: random.below(2) as u32 * (prompt_tokens / 2),
            completion_tokens: if cancelled { sampled_tokens / 2 } else { sampled_tokens },
            sampled_tokens,
            attempts: 1,
            prefill_worker_id: format!("prefill-{}", random.below(16)),
            decode_worker_id: worker.clone(),
            started_unix_ms: at - 1500 - random.below(8000),
            settled_unix_ms: at,
            organization_id: "org-1".into(),
            project_id: project(project_number),
            key_id: format!("key-{key:08x}"),
            user: format!("user-{user:08x}"),
            revision: "4f1c2d9".into(),
            endpoint: "/v1/chat/completions".into(),
            service_tier: if random.below(20) == 0 { "batch" } else { "default" }.into(),
            attempt_list: vec![Attempt {
                prefill_worker_id: String::new(),
                decode_worker_id: worker,
                decode_epoch: 7,
                tokens: sampled_tokens,
            }],
            ..UsageRecord::default()
        };
        if project_number < BUDGETED_PROJECTS {
            record.postings.push(Posting {
                budget_id: format!("budget-{project_number}"),
                slice_id: "slice-1".into(),
                reserved_nano: 1 << 40,
            });
        }
        if random.below(10) == 0 {
            let hash: Vec<u8> = (0..4).flat_map(|_| random.next().to_le_bytes()).collect();
            record.idempotency_key_sha256 = hash.clone().into();
            record.request_sha256 = hash.into();
        }
        command(at, Kind::SettleUsage(SettleUsage { record: Some(record) }))
    }
}

pub fn command(at_unix_ms: u64, kind: Kind) -> Command {
    Command {
        at_unix_ms,
        actor: String::new(),
        kind: Some(kind),
    }
}

fn project(number: u64) -> String {
    format!("proj-{number:08x}")
}

fn model(number: u64) -> String {
    format!("open-model-{number}-instruct")
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Small numbers more often: the square of a fraction.
    fn skewed(&mut self, bound: u64) -> u64 {
        let fraction = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        ((fraction * fraction * bound as f64) as u64).min(bound - 1)
    }
}
