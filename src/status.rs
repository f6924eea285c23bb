//! `baton status`: the coordinators, where there are several, and the workers of a running cluster, as tables, live, or the
//! workers as JSON.

use crate::cli::{Remote, StatusArgs};
use anyhow::{Context, anyhow};
use baton_loadtest::{Client, FailureKind, Target};
use serde::Deserialize;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Longest wait for an answer; a coordinator answers from memory.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two views with `--watch`.
const REFRESH: Duration = Duration::from_secs(1);

/// One worker, as far as the table shows it. The server sends more, which `--json` passes on.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Row {
    id: String,
    role: String,
    state: String,
    pid: u32,
    model: String,
    running: u64,
    waiting: u64,
    transferring: u64,
    total_blocks: u64,
    free_blocks: u64,
    held_blocks: u64,
    cached_blocks: u64,
    generation_tokens_total: u64,
    heartbeat_age_ms: u64,
}

/// Shows the workers.
pub fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let client = Client::new(Target::parse(&args.remote.url)?, args.remote.api_key.clone(), TIMEOUT);
        if !args.watch {
            let workers = fetch(&client, &args.remote).await?;
            print(&if args.json {
                pretty(&workers)?
            } else {
                group(&client).await + &table(&workers)?
            });
            return Ok(ExitCode::SUCCESS);
        }
        // Nothing there at the start is an error; a cluster that goes away while watched may come back.
        let mut view = fetch(&client, &args.remote).await.map(Some)?;
        loop {
            match (&view, args.json) {
                (Some(workers), true) => print(&format!("{workers}\n")),
                (Some(workers), false) => redraw(&(group(&client).await + &table(workers)?)),
                (None, true) => {}
                (None, false) => redraw(&format!("nothing answers at {} at the moment\n", args.remote.url)),
            }
            tokio::select! {
                _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
                () = tokio::time::sleep(REFRESH) => {}
            }
            view = fetch(&client, &args.remote).await.ok();
        }
    })
}

/// The coordinators, where there are several: a table, and an empty line.
async fn group(client: &Client) -> String {
    let group = client.get("/cluster/coordinators").await.ok();
    let group = group.and_then(|body| serde_json::from_slice::<serde_json::Value>(&body).ok());
    match group {
        Some(group) if group["coordinators"].as_array().is_some_and(|list| list.len() > 1) => {
            crate::coordinators::table(&group).map_or_else(|_| String::new(), |table| table + "\n")
        }
        _ => String::new(),
    }
}

async fn fetch(client: &Client, remote: &Remote) -> anyhow::Result<serde_json::Value> {
    let url = &remote.url;
    let body = client.get("/cluster/workers").await.map_err(|failure| match failure.kind {
        FailureKind::Connect | FailureKind::Timeout => {
            anyhow!("nothing answers at {url}; start a cluster with `baton up`, or name its address with --url or BATON_URL")
        }
        FailureKind::Status(401 | 403) => {
            anyhow!("{url} wants a key: {}; give it with --api-key or BATON_API_KEY", failure.message)
        }
        FailureKind::Status(404) => anyhow!("{url} answers, but is no baton coordinator; name its address with --url"),
        _ => anyhow!("{url} did not tell its workers: {}", failure.message),
    })?;
    let value: serde_json::Value = serde_json::from_slice(&body)
        .map_err(|_| anyhow!("{url} answers, but not as a baton coordinator does; name its address with --url"))?;
    // The array, whether bare or under a key.
    match value {
        serde_json::Value::Object(mut fields) if fields.contains_key("workers") => {
            Ok(fields.remove("workers").unwrap_or_default())
        }
        other => Ok(other),
    }
}

fn pretty(workers: &serde_json::Value) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(workers)? + "\n")
}

fn table(workers: &serde_json::Value) -> anyhow::Result<String> {
    let rows: Vec<Row> = serde_json::from_value(workers.clone())
        .context("the server describes its workers in a way this baton does not know; use the same version")?;
    if rows.is_empty() {
        return Ok("no workers are registered\n".into());
    }
    let header = [
        "WORKER",
        "ROLE",
        "PID",
        "STATE",
        "MODEL",
        "RUNNING",
        "WAITING",
        "MOVING",
        "BLOCKS USED",
        "CACHED",
        "TOKENS",
        "HEARTBEAT",
    ];
    let mut lines = vec![header.map(str::to_owned)];
    for row in &rows {
        let share = 100.0 * row.held_blocks as f64 / row.total_blocks.max(1) as f64;
        lines.push([
            row.id.clone(),
            row.role.clone(),
            row.pid.to_string(),
            row.state.clone(),
            row.model.clone(),
            row.running.to_string(),
            row.waiting.to_string(),
            row.transferring.to_string(),
            format!("{}/{} ({share:.0} %)", row.held_blocks, row.total_blocks),
            row.cached_blocks.to_string(),
            row.generation_tokens_total.to_string(),
            format!("{:.1} s ago", row.heartbeat_age_ms as f64 / 1000.0),
        ]);
    }
    Ok(align(&lines))
}

/// Lines of cells as columns.
pub fn align<const N: usize>(lines: &[[String; N]]) -> String {
    let widths: Vec<usize> = (0..N)
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// On a terminal the old view is overwritten; elsewhere views follow each other.
fn redraw(text: &str) {
    match std::io::stdout().is_terminal() {
        // Clear, go home.
        true => print(&format!("\x1b[2J\x1b[H{text}")),
        false => print(&format!("{text}\n")),
    }
}

fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    // A reader that has gone (`| head`) ends the program's use.
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_has_a_line_per_worker() {
        let text = table(&json!([{
            "id": "decode-0", "role": "decode", "state": "ready", "pid": 42, "model": "m", "total_blocks": 200,
            "held_blocks": 50, "heartbeat_age_ms": 250, "unknown_to_us": true
        }]))
        .expect("known fields");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].starts_with("decode-0  decode  42"));
        assert!(
            lines[1].contains("50/200 (25 %)") && lines[1].ends_with("0.2 s ago"),
            "{}",
            lines[1]
        );
        assert_eq!(table(&json!([])).expect("empty"), "no workers are registered\n");
        assert!(table(&json!({"x": 1})).is_err());
    }
}
