//! `baton ledger verify`: what an export shows, in words or as JSON.

use super::{keys, open};
use crate::cli::ledger::VerifyArgs;
use crate::up::{print, say};
use anyhow::bail;
use baton_ledger::verify::{Report, verify};
use serde_json::json;
use std::process::ExitCode;

/// Verifies an export.
pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let keys = keys::read(&args.keys.keys)?;
    if keys.is_empty() && !args.allow_unsigned {
        bail!("give the public keys of the coordinators with --key, or --allow-unsigned to check consistency only");
    }
    let report = verify(open(&args.file)?, keys)?;
    let proven = report.signed_through > 0 || args.allow_unsigned || report.last == 0;
    print(&if args.json {
        as_json(&report)?
    } else {
        in_words(&report)
    });
    if !proven {
        say(
            "baton: no checkpoint in the export: nothing shows who made it. Export again once a period is sealed, or give --allow-unsigned",
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(report: &Report) -> String {
    let Report {
        first,
        last,
        checkpoints,
        signed_through,
        totals,
        ..
    } = report;
    let mut lines = vec![if *last == 0 {
        "no rows".to_owned()
    } else {
        format!("rows {first}..={last} hold: numbering, ids, hash chain, charges, sums")
    }];
    if *signed_through > 0 {
        lines.push(format!(
            "signed: {checkpoints} checkpoints, through row {signed_through}"
        ));
    }
    if last > signed_through {
        lines.push(format!(
            "not signed yet: rows {}..={last}",
            (signed_through + 1).max(*first)
        ));
    }
    if report.starts_inside_period {
        lines.push(
            "the first period begins before the export: its last hash was compared, its Merkle root could not be"
                .to_owned(),
        );
    }
    if !report.complete {
        lines.push("no end line: the export was cut off, or is still being written".to_owned());
    }
    lines.push(format!(
        "{} requests, {} corrections; {} prompt tokens ({} cached), {} completion tokens",
        totals.requests, totals.corrections, totals.prompt_tokens, totals.cached_tokens, totals.completion_tokens
    ));
    for (currency, amounts) in &totals.currencies {
        lines.push(format!("charged: {} {currency}", amounts.total()));
    }
    lines.push(format!("last hash: {}", baton_ledger::hex(&report.last_hash)));
    lines.join("\n") + "\n"
}

fn as_json(report: &Report) -> anyhow::Result<String> {
    let value = json!({
        "first_sequence": report.first,
        "last_sequence": report.last,
        "last_hash": baton_ledger::hex(&report.last_hash),
        "checkpoints": report.checkpoints,
        "signed_through": report.signed_through,
        "starts_inside_period": report.starts_inside_period,
        "complete": report.complete,
        "totals": report.totals,
    });
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}
