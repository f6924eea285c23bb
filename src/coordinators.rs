//! `baton coordinators`: the group of coordinators as a table or as JSON, and changes to it. Any member can be asked; it finds
//! the leader by itself.

use crate::cli::{CoordinatorsAction, CoordinatorsAdd, CoordinatorsList, Remote};
use crate::up::print;
use anyhow::{Context, anyhow};
use baton_loadtest::{Client, Failure, FailureKind, Target};
use serde::Deserialize;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;

/// Longest wait for an answer: a change waits for a member that catches up.
const ANSWER_MAX: Duration = Duration::from_secs(90);

/// A coordinator, as far as the table shows it. The server sends more, which `--json` passes on.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Row {
    id: u64,
    name: String,
    role: String,
    reachable: bool,
    cluster_addr: String,
    api_url: String,
    term: u64,
    applied_index: u64,
    lag: u64,
}

/// Does what is asked, and shows the group as it is then.
pub fn run(action: &CoordinatorsAction) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let list = match action {
        CoordinatorsAction::List(list) => list,
        CoordinatorsAction::Add(add) => &add.list,
        CoordinatorsAction::Remove(remove) => &remove.list,
        CoordinatorsAction::Transfer(transfer) => &transfer.list,
    };
    let CoordinatorsList { remote, json } = list;
    let client = Client::new(Target::parse(&remote.url)?, remote.api_key.clone(), ANSWER_MAX);
    let body = runtime.block_on(async {
        match action {
            CoordinatorsAction::List(_) => client.get("/cluster/coordinators").await,
            CoordinatorsAction::Add(add) => client.post("/cluster/coordinators", new_member(add)).await,
            CoordinatorsAction::Remove(remove) => {
                let path = format!("/cluster/coordinators/{}/remove", remove.id);
                client.post(&path, "{}").await
            }
            CoordinatorsAction::Transfer(transfer) => {
                let body = transfer.id.map_or_else(|| json!({}), |id| json!({"to": id}));
                client.post("/cluster/coordinators/transfer", body.to_string()).await
            }
        }
    });
    let body = body.map_err(|failure| explain(remote, &failure))?;
    let group: Value = serde_json::from_slice(&body).map_err(|_| {
        let url = &remote.url;
        anyhow!("{url} answers, but not as a baton coordinator does; name its address with --url")
    })?;
    print(&match json {
        true => serde_json::to_string_pretty(&group)? + "\n",
        false => table(&group)?,
    });
    Ok(ExitCode::SUCCESS)
}

fn new_member(add: &CoordinatorsAdd) -> String {
    json!({"id": add.id, "name": add.name, "cluster_addr": add.cluster_addr, "api_url": add.api_url}).to_string()
}

/// The group as lines of a table.
pub fn table(group: &Value) -> anyhow::Result<String> {
    let rows: Vec<Row> = serde_json::from_value(group["coordinators"].clone())
        .context("the server describes its coordinators in a way this baton does not know; use the same version")?;
    let header = ["ID", "COORDINATOR", "ROLE", "TERM", "APPLIED", "LAG", "API", "CLUSTER"];
    let mut lines = vec![header.map(str::to_owned)];
    for row in rows {
        let known = |number: u64| match row.reachable {
            true => number.to_string(),
            false => "?".into(),
        };
        lines.push([
            row.id.to_string(),
            row.name.clone(),
            match row.reachable {
                true => row.role.clone(),
                false => format!("{}, unreachable", row.role),
            },
            known(row.term),
            known(row.applied_index),
            known(row.lag),
            row.api_url.clone(),
            row.cluster_addr.clone(),
        ]);
    }
    Ok(crate::status::align(&lines))
}

fn explain(remote: &Remote, failure: &Failure) -> anyhow::Error {
    let url = &remote.url;
    match failure.kind {
        FailureKind::Connect | FailureKind::Timeout => {
            anyhow!("nothing answers at {url}; name a coordinator's address with --url or BATON_URL")
        }
        FailureKind::Status(401 | 403) => {
            anyhow!(
                "{url} wants a key: {}; give it with --api-key or BATON_API_KEY",
                failure.message
            )
        }
        _ => anyhow!("{}", failure.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_does_not_answer_has_no_numbers() {
        let text = table(&json!({"leader_id": 1, "coordinators": [
            {"id": 1, "name": "a", "role": "leader", "reachable": true, "term": 3, "applied_index": 70, "lag": 0,
             "api_url": "http://x", "cluster_addr": "x:1", "new": true},
            {"id": 2, "name": "b", "role": "follower", "reachable": false}
        ]}));
        let text = text.expect("known fields");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(
            lines[1].split_whitespace().collect::<Vec<_>>(),
            ["1", "a", "leader", "3", "70", "0", "http://x", "x:1"]
        );
        assert!(
            lines[2].contains("follower, unreachable") && lines[2].ends_with('?'),
            "{text}"
        );
    }
}
