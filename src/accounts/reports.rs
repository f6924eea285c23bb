//! Usage and costs: all pages of a report.

use super::remote::{Api, cell, escape, run, table};
use crate::cli::accounts::{ReportArgs, UsageArgs};
use crate::up::print;
use anyhow::{Context, bail};
use baton_ledger::money::Nano;
use serde_json::Value;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Pages of one report: years of days, or a fortnight of minutes.
const PAGES_MAX: usize = 128;

/// `baton usage`.
pub fn usage(args: &UsageArgs) -> anyhow::Result<ExitCode> {
    let limit = match args.bucket.as_str() {
        "1m" => 1440,
        "1h" => 168,
        "1d" => 31,
        _ => bail!("--bucket takes 1m, 1h or 1d"),
    };
    let report = &args.report;
    run(&report.at.remote, async |api: &Api| {
        let path = format!(
            "/v1/organization/usage/completions?bucket_width={}&limit={limit}{}",
            args.bucket,
            query(report)
        );
        let buckets = pages(api, &path).await?;
        let header = ["FROM", "GROUP", "REQUESTS", "INPUT", "CACHED", "OUTPUT"];
        show(report, buckets, header, |from, result| {
            let [requests, input, cached, output] = [
                "num_model_requests",
                "input_tokens",
                "input_cached_tokens",
                "output_tokens",
            ]
            .map(|name| cell(&result[name]));
            [from, group(report, result), requests, input, cached, output]
        })
    })
}

/// `baton costs`.
pub fn costs(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    run(&args.at.remote, async |api: &Api| {
        let path = format!("/v1/organization/costs?limit=180{}", query(args));
        let buckets = pages(api, &path).await?;
        show(
            args,
            buckets,
            ["FROM", "GROUP", "AMOUNT", "CURRENCY"],
            |from, result| {
                let nano = result["amount"]["nano"].as_str().and_then(|nano| nano.parse().ok());
                let amount = nano.map_or_else(|| cell(&result["amount"]["value"]), |nano| Nano(nano).to_string());
                let currency = cell(&result["amount"]["currency"]).to_uppercase();
                [from, group(args, result), amount, currency]
            },
        )
    })
}

fn query(args: &ReportArgs) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let start = args.start.unwrap_or_else(|| now.saturating_sub(args.days * 86_400));
    let mut query = format!("&start_time={start}");
    if let Some(end) = args.end {
        query += &format!("&end_time={end}");
    }
    for (name, values) in [
        ("group_by", &args.group_by),
        ("project_ids", &args.project),
        ("api_key_ids", &args.key),
    ] {
        for value in values {
            query += &format!("&{name}={}", escape(value));
        }
    }
    query
}

async fn pages(api: &Api, path: &str) -> anyhow::Result<Vec<Value>> {
    let mut buckets = Vec::new();
    let mut next = path.to_owned();
    for _ in 0..PAGES_MAX {
        let page = api.get(&next).await?;
        buckets.extend(page["data"].as_array().cloned().unwrap_or_default());
        let Some(cursor) = page["next_page"].as_str() else {
            return Ok(buckets);
        };
        next = format!("{path}&page={}", escape(cursor));
    }
    bail!("the report has more than {PAGES_MAX} pages; ask for less time or wider buckets")
}

/// What a result is of, in the order that was asked for.
fn group(args: &ReportArgs, result: &Value) -> String {
    let parts: Vec<String> = args.group_by.iter().map(|name| cell(&result[name])).collect();
    if parts.is_empty() {
        "all".into()
    } else {
        parts.join(" / ")
    }
}

fn show<const N: usize>(
    args: &ReportArgs,
    buckets: Vec<Value>,
    header: [&str; N],
    row: impl Fn(String, &Value) -> [String; N],
) -> anyhow::Result<()> {
    if args.at.json {
        print(&(serde_json::to_string_pretty(&Value::from(buckets))? + "\n"));
        return Ok(());
    }
    let mut rows = Vec::new();
    for bucket in &buckets {
        let from = bucket["start_time"].as_u64().context("a bucket without a start")?;
        let results = bucket["results"].as_array().map(Vec::as_slice).unwrap_or_default();
        rows.extend(results.iter().map(|result| row(time(from), result)));
    }
    print(&table(header, rows));
    Ok(())
}

/// A time in UTC.
fn time(unix_s: u64) -> String {
    baton_ledger::export::rfc3339(unix_s * 1000)
}
