//! Reports and the feed, each asked for as a client does: page after page, in a fresh view of the state.

use super::Failure;
use super::records::{DAY_MS, END_MS, HOUR_MS, Random, Records};
use baton_raftstore::RaftStore;
use baton_state::view::{self, Dimension, UsageQuery, Width, usage_report};
use std::time::{Duration, Instant};

/// Most times that one thing is asked for, and longest time for that.
const TIMES_MAX: usize = 200;
const TIME_MAX: Duration = Duration::from_secs(8);

pub fn run(store: &RaftStore, records: Records) -> Result<(), Failure> {
    use Dimension::{Currency, Key, Model, Project, User};
    let days = |days| days * DAY_MS;
    let reports: [(&str, Width, u64, &[Dimension]); 8] = [
        ("usage, 30 days by day", Width::Day, days(30), &[]),
        (
            "usage, 30 days by day, project, key, model",
            Width::Day,
            days(30),
            &[Project, Key, Model],
        ),
        ("usage, a day by minute and project", Width::Minute, days(1), &[Project]),
        ("usage, 7 days by hour and model", Width::Hour, days(7), &[Model]),
        ("usage, 7 days by day and user", Width::Day, days(7), &[User]),
        ("usage, a day by hour and user", Width::Hour, days(1), &[User]),
        (
            "usage, an hour by minute and user, from rows",
            Width::Minute,
            HOUR_MS,
            &[User],
        ),
        (
            "costs, 30 days by day and project",
            Width::Day,
            days(30),
            &[Currency, Project],
        ),
    ];
    for (what, width, span_ms, group_by) in reports {
        let mut groups = 0;
        let mut pages = 0;
        let times = time(|| {
            let mut query = UsageQuery {
                start_unix_ms: END_MS - span_ms,
                end_unix_ms: END_MS,
                width,
                group_by: group_by.to_vec(),
                project_ids: vec![],
                key_ids: vec![],
                users: vec![],
                models: vec![],
                batch: None,
                buckets_max: 1440,
            };
            (groups, pages) = (0, 0);
            loop {
                let report = usage_report(&store.state()?, &query)?;
                pages += 1;
                groups += report.buckets.iter().map(|bucket| bucket.groups.len()).sum::<usize>();
                match report.next_start_unix_ms {
                    Some(next) => query.start_unix_ms = next,
                    None => return Ok(()),
                }
            }
        })?;
        report(&format!("{what} ({groups} groups, {pages} pages)"), times);
    }
    let mut random = Random(1);
    let times = time(|| {
        let after = random.below(records.0.saturating_sub(1000).max(1));
        let page = view::rows_after(&store.state()?, after, 1000)?;
        if page.len() as u64 != 1000.min(records.0 - after) {
            return Err("the feed has a gap".into());
        }
        Ok(())
    })?;
    report("feed, a page of 1000 rows anywhere", times);
    let times = time(|| {
        let after = random.below(records.0);
        let row = view::row(&store.state()?, after + 1)?.ok_or("a row is missing")?;
        match row.body {
            Some(baton_proto::state::ledger_row::Body::Usage(record)) => {
                view::usage_row(&store.state()?, &record.request_id)?.ok_or("a request is missing")?;
                Ok(())
            }
            _ => Err("not a usage row".into()),
        }
    })?;
    report("a row by its number and by its request", times);
    Ok(())
}

fn time(mut ask: impl FnMut() -> Result<(), Failure>) -> Result<Vec<f64>, Failure> {
    let began = Instant::now();
    let mut times = Vec::new();
    while times.len() < TIMES_MAX && (times.len() < 3 || began.elapsed() < TIME_MAX) {
        let start = Instant::now();
        ask()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn report(what: &str, times: Vec<f64>) {
    let at = |quantile: f64| times[((times.len() - 1) as f64 * quantile).round() as usize];
    println!(
        "{what}: p50 {:.2} ms, p99 {:.2} ms ({} times)",
        at(0.5),
        at(0.99),
        times.len()
    );
}
