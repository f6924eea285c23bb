//! Usage by time, against sums over rows.

use super::{Bench, START, record, settle};
use crate::calendar::{DAY_MS, HOUR_MS, MINUTE_MS};
use crate::view::{Dimension, UsageQuery, UsageReport, Width, usage_report};
use baton_proto::state::UsageRecord;

fn query(width: Width, group_by: &[Dimension]) -> UsageQuery {
    UsageQuery {
        start_unix_ms: START,
        end_unix_ms: START + 5 * DAY_MS,
        width,
        group_by: group_by.to_vec(),
        project_ids: vec![],
        key_ids: vec![],
        users: vec![],
        models: vec![],
        batch: None,
        buckets_max: 1440,
    }
}

/// Requests every few minutes over four days; the number of each is in its prompt.
fn busy() -> Bench {
    let mut bench = Bench::new();
    for i in 0..200u32 {
        bench.tick(1_700_000 + u64::from(i % 7) * 1000);
        let record = UsageRecord {
            prompt_tokens: i,
            project_id: format!("p{}", i % 2),
            key_id: format!("k{}", i % 3),
            model: ["m", "n"][i as usize % 2].into(),
            user: format!("u{}", i % 5),
            service_tier: ["", "batch", "default"][i as usize % 3].into(),
            ..record(&format!("r{i}"), 1)
        };
        bench.run(settle(record)).unwrap();
    }
    bench
}

fn totals(report: &UsageReport) -> Vec<(u64, String, i128, i128)> {
    let buckets = report.buckets.iter();
    let groups = buckets.flat_map(|bucket| bucket.groups.iter().map(move |group| (bucket.start_unix_ms, group)));
    groups
        .map(|(start, (whose, sums))| (start, format!("{whose:?}"), sums.requests, sums.prompt_tokens))
        .collect()
}

/// All widths, groups and sources tell the same.
#[test]
fn every_way_of_adding_up_agrees() {
    let bench = busy();
    let rows = crate::view::rows_after(&bench.tables, 0, 1000).unwrap();
    for (width, width_ms) in [(Width::Day, DAY_MS), (Width::Hour, HOUR_MS), (Width::Minute, MINUTE_MS)] {
        for user in [None, Some("u1")] {
            let mut expected = std::collections::BTreeMap::new();
            for row in &rows {
                let Some(baton_proto::state::ledger_row::Body::Usage(record)) = &row.body else {
                    panic!()
                };
                if record.project_id == "p1" && user.is_none_or(|user| record.user == user) {
                    let start = row.at_unix_ms - row.at_unix_ms % width_ms;
                    let sum: &mut (i128, i128) = expected.entry((start, record.key_id.clone())).or_default();
                    sum.0 += 1;
                    sum.1 += i128::from(record.prompt_tokens);
                }
            }
            let mut query = query(width, &[Dimension::Key]);
            query.project_ids = vec!["p1".into()];
            query.users = user.iter().map(|user| (*user).to_owned()).collect();
            let mut found = std::collections::BTreeMap::new();
            let mut buckets = 0;
            loop {
                let report = usage_report(&bench.tables, &query).unwrap();
                buckets += report.buckets.len();
                for bucket in report.buckets {
                    assert_eq!(bucket.end_unix_ms, bucket.start_unix_ms + width_ms);
                    for (whose, sums) in bucket.groups {
                        assert!(whose.project_id.is_empty() && whose.user.is_empty());
                        let before = found.insert(
                            (bucket.start_unix_ms, whose.key_id),
                            (sums.requests, sums.prompt_tokens),
                        );
                        assert_eq!(before, None);
                    }
                }
                match report.next_start_unix_ms {
                    Some(next) => query.start_unix_ms = next,
                    None => break,
                }
            }
            assert_eq!(buckets as u64, 5 * DAY_MS / width_ms);
            assert_eq!(found, expected, "{width:?} {user:?}");
        }
    }
}

#[test]
fn minutes_come_from_sums_and_from_rows_alike() {
    let bench = busy();
    // The last two days have sums by minute; asked for by user, the same minutes are added up from rows.
    let mut recent = query(Width::Minute, &[]);
    recent.start_unix_ms = bench.now_ms - DAY_MS;
    recent.end_unix_ms = bench.now_ms + 1;
    let sums = usage_report(&bench.tables, &recent).unwrap();
    recent.users = (0..5).map(|i| format!("u{i}")).collect();
    let rows = usage_report(&bench.tables, &recent).unwrap();
    assert_eq!(sums, rows);
    assert!(totals(&sums).len() > 40);
    // Older minutes are not kept as sums.
    let kept = bench
        .tables
        .0
        .range(vec![crate::keys::USAGE_MINUTES]..vec![crate::keys::USAGE_MINUTES + 1])
        .count();
    assert!(kept < 120, "{kept}");
}

#[test]
fn pages_go_on_where_they_end() {
    let bench = busy();
    let mut whole = query(Width::Hour, &[Dimension::Project, Dimension::Batch]);
    let all = usage_report(&bench.tables, &whole).unwrap();
    assert_eq!((all.buckets.len(), all.next_start_unix_ms), (120, None));
    assert!(all.buckets.iter().any(|bucket| bucket.groups.is_empty()));
    whole.buckets_max = 7;
    // A start within a bucket is that bucket's.
    whole.start_unix_ms += 1;
    let mut pages = Vec::new();
    loop {
        let page = usage_report(&bench.tables, &whole).unwrap();
        assert!(page.buckets.len() <= 7);
        pages.extend(page.buckets);
        match page.next_start_unix_ms {
            Some(next) => whole.start_unix_ms = next,
            None => break,
        }
    }
    assert_eq!(pages, all.buckets);
    let batches = totals(&all)
        .iter()
        .filter(|group| group.1.contains("batch"))
        .map(|group| group.2)
        .sum::<i128>();
    let mut only = query(Width::Day, &[]);
    only.batch = Some(true);
    let told = usage_report(&bench.tables, &only).unwrap();
    assert_eq!(totals(&told).iter().map(|group| group.2).sum::<i128>(), batches);
    assert!(batches > 0);
}

/// Groups are told in the order of their parts, whatever bytes those hold.
#[test]
fn groups_are_in_order() {
    let mut bench = Bench::new();
    let texts = ["", "\0", "\0\0", "\0a", "a", "a\0", "a\0b", "aa", "\u{ff}", "ab"];
    for (i, user) in texts.iter().enumerate() {
        for (j, model) in texts.iter().rev().enumerate() {
            let record = UsageRecord {
                model: (*model).into(),
                user: (*user).into(),
                ..record(&format!("r{i}-{j}"), 1)
            };
            bench.run(settle(record)).unwrap();
        }
    }
    let mut query = query(Width::Day, &[Dimension::User, Dimension::Model]);
    query.start_unix_ms = bench.now_ms - bench.now_ms % DAY_MS;
    query.end_unix_ms = query.start_unix_ms + DAY_MS;
    let report = usage_report(&bench.tables, &query).unwrap();
    let groups = &report.buckets[0].groups;
    assert_eq!(groups.len(), texts.len() * texts.len());
    assert!(groups.is_sorted_by(|(a, _), (b, _)| a < b));
}

#[test]
fn an_empty_or_backward_question_has_an_answer() {
    let bench = busy();
    for (start, end) in [
        (START, START),
        (START + DAY_MS, START),
        (u64::MAX - 5, u64::MAX),
        (0, 0),
    ] {
        let mut query = query(Width::Day, &[]);
        (query.start_unix_ms, query.end_unix_ms) = (start, end);
        let report = usage_report(&bench.tables, &query).unwrap();
        assert!(totals(&report).is_empty() && report.next_start_unix_ms.is_none());
    }
    let mut query = query(Width::Minute, &[]);
    (query.start_unix_ms, query.end_unix_ms) = (0, u64::MAX);
    let report = usage_report(&bench.tables, &query).unwrap();
    assert_eq!((report.buckets.len(), report.next_start_unix_ms), (1440, Some(DAY_MS)));
}
