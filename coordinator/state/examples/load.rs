//! What settling costs and how fast usage is told, on tables in memory: the state machine alone, without Raft and disk.
//!
//! ```console
//! $ cargo run --release -p baton-state --example load -- 1000000
//! ```
//! The records are spread over 30 days, 20 projects with 5 keys each, 4 models and 1,000 users.

use baton_proto::state::{
    Budget, Command, LeaseSlice, Period, Posting, Price, Project, PutBudget, PutPrice, PutProject, SettleUsage,
    UsageRecord, UsageStatus, command::Kind,
};
use baton_state::view::{Dimension, UsageQuery, Width, usage_report};
use baton_state::{MemoryTables, Tables as _, apply, view};
use prost::Message as _;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// 2026-11-01 00:00 UTC.
const START_MS: u64 = 1_793_491_200_000;
const DAY_MS: u64 = 86_400_000;
const DAYS: u64 = 30;

struct Machine {
    tables: MemoryTables,
    index: u64,
    busy: Duration,
}

impl Machine {
    fn run(&mut self, at_unix_ms: u64, kind: Kind) {
        let command = Command {
            at_unix_ms,
            actor: "operator".into(),
            kind: Some(kind),
        };
        let command = command.encode_to_vec();
        self.index += 1;
        let start = Instant::now();
        let outcome = apply(&mut self.tables, self.index, &command).expect("memory does not fail");
        self.busy += start.elapsed();
        outcome.expect("the commands are good");
    }
}

fn main() {
    let records: u64 = std::env::args()
        .nth(1)
        .map_or(300_000, |text| text.parse().expect("a number of records"));
    let mut machine = Machine {
        tables: MemoryTables::default(),
        index: 0,
        busy: Duration::ZERO,
    };
    prepare(&mut machine);
    machine.busy = Duration::ZERO;
    for i in 0..records {
        let at = START_MS + i * DAYS * DAY_MS / records;
        if i % 1000 == 0 {
            machine.run(at, lease(at));
        }
        machine.run(at, settle(i, at));
    }
    let each = machine.busy.as_secs_f64() * 1e6 / records as f64;
    println!(
        "{records} records settled, {each:.2} us each, {:.0} per second",
        1e6 / each
    );
    sizes(&machine.tables, records);
    let end = START_MS + DAYS * DAY_MS;
    for (what, width, days, group_by) in [
        ("30 days by day", Width::Day, 30, vec![]),
        (
            "30 days by day, project, key and model",
            Width::Day,
            30,
            vec![Dimension::Project, Dimension::Key, Dimension::Model],
        ),
        ("7 days by hour and model", Width::Hour, 7, vec![Dimension::Model]),
        (
            "a day by minute and project",
            Width::Minute,
            1,
            vec![Dimension::Project],
        ),
        ("7 days by day and user", Width::Day, 7, vec![Dimension::User]),
        (
            "an hour by minute and user, from rows",
            Width::Minute,
            0,
            vec![Dimension::User],
        ),
    ] {
        let mut query = UsageQuery {
            start_unix_ms: end - if days == 0 { DAY_MS / 24 } else { days * DAY_MS },
            end_unix_ms: end,
            width,
            group_by,
            project_ids: vec![],
            key_ids: vec![],
            users: vec![],
            models: vec![],
            batch: None,
            buckets_max: 1440,
        };
        let mut times: Vec<f64> = (0..20)
            .map(|_| {
                let first = query.start_unix_ms;
                let start = Instant::now();
                // Page after page, as a client asks.
                loop {
                    let report = usage_report(&machine.tables, &query).expect("a bucket is small enough");
                    match report.next_start_unix_ms {
                        Some(next) => query.start_unix_ms = next,
                        None => break,
                    }
                }
                query.start_unix_ms = first;
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{what}: p50 {:.2} ms, worst {:.2} ms", times[10], times[19]);
    }
}

fn prepare(machine: &mut Machine) {
    for i in 0..20 {
        let project = Project {
            id: format!("project-{i}"),
            ..Project::default()
        };
        machine.run(START_MS, Kind::PutProject(PutProject { project: Some(project) }));
    }
    let price = Price {
        model: "*".into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        input_nano_per_mtok: 20_000_000_000,
        cached_input_nano_per_mtok: 2_000_000_000,
        output_nano_per_mtok: 80_000_000_000,
        ..Price::default()
    };
    machine.run(START_MS, Kind::PutPrice(PutPrice { price: Some(price) }));
    let budget = Budget {
        id: "budget".into(),
        project_id: "project-0".into(),
        currency: "USD".into(),
        limit_nano: u64::MAX,
        period: Period::Month.into(),
        hard: true,
        ..Budget::default()
    };
    machine.run(START_MS, Kind::PutBudget(PutBudget { budget: Some(budget) }));
}

fn lease(at: u64) -> Kind {
    Kind::LeaseSlice(LeaseSlice {
        budget_id: "budget".into(),
        slice_id: format!("slice-{}", at / DAY_MS),
        member_id: 1,
        want_nano: 1_000_000_000_000_000,
        expires_unix_ms: at + 3_600_000,
    })
}

fn settle(i: u64, at: u64) -> Kind {
    // Spread without a pattern: multiplication by the golden ratio.
    let spread = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let project = spread % 20;
    let record = UsageRecord {
        request_id: format!("chatcmpl-{:032x}", u128::from(spread) << 64 | u128::from(i)),
        model: format!("model-{}", spread / 20 % 4),
        status: UsageStatus::Completed.into(),
        prompt_tokens: 1000,
        cached_tokens: 512,
        completion_tokens: 250,
        sampled_tokens: 250,
        attempts: 1,
        prefill_worker_id: "prefill-0".into(),
        decode_worker_id: "decode-0".into(),
        started_unix_ms: at - 3000,
        settled_unix_ms: at,
        organization_id: "organization".into(),
        project_id: format!("project-{project}"),
        key_id: format!("key-{project}-{}", spread / 80 % 5),
        user: format!("user-{}", spread / 400 % 1000),
        revision: "main".into(),
        endpoint: "/v1/chat/completions".into(),
        postings: if project == 0 {
            let slice_id = format!("slice-{}", at / DAY_MS);
            let reserved_nano = 1_000_000_000;
            vec![Posting {
                budget_id: "budget".into(),
                slice_id,
                reserved_nano,
            }]
        } else {
            vec![]
        },
        ..UsageRecord::default()
    };
    Kind::SettleUsage(SettleUsage { record: Some(record) })
}

fn sizes(tables: &MemoryTables, records: u64) {
    let mut total = 0;
    for table in 1..0x20u8 {
        let (mut entries, mut bytes) = (0u64, 0);
        tables
            .scan(&[table], &[table + 1], &mut |key, value| {
                entries += 1;
                bytes += key.len() + value.len();
                Ok(ControlFlow::Continue(()))
            })
            .expect("memory does not fail");
        total += bytes;
        if bytes as u64 > records {
            println!("table {table:#04x}: {entries} entries, {} bytes", bytes);
        }
    }
    let rows = view::settled(tables).expect("memory does not fail");
    println!("{:.0} bytes per row in all", total as f64 / rows as f64);
}
