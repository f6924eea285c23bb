//! `GET /v1/organization/audit_logs`: as OpenAI's, newest first. `action`, `subject`, `sequence` and `raft_index` are ours and
//! say what the log itself says. OpenAI's `type` exists for projects and keys; the others are named alike
//! (`price.created`).

use axum::extract::Query;
use axum::{Extension, Json};
use baton_proto::state::{AuditRow, Command, PutProject, command::Kind};
use baton_state::view;
use prost::Message;
use serde_json::{Value, json};

use super::params::Params;
use super::{Answer, Shared, page};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;

/// Rows read for one answer. One that filters much ends early, and its cursor goes on behind what was read.
const ROWS_MAX: u64 = 10_000;
const ID_PREFIX: &str = "audit_log-";

/// What is asked for.
struct Filter {
    types: Vec<String>,
    actors: Vec<String>,
    subjects: Vec<String>,
    /// Seconds of Unix time, both inclusive.
    from_s: u64,
    to_s: u64,
}

/// Its parameters; lists may be given as `name[]` too.
pub(super) const QUERY: &[&str] = &[
    "effective_at[gt]",
    "effective_at[gte]",
    "effective_at[lt]",
    "effective_at[lte]",
    "event_types",
    "actor_ids",
    "resource_ids",
    "after",
    "limit",
];

/// The handler.
pub(super) async fn list(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(20, 100)?;
    let seconds = "seconds of Unix time";
    let mut bound = |name: &str| params.one::<u64>(&format!("effective_at[{name}]"), seconds);
    let (gt, gte, lt, lte) = (bound("gt")?, bound("gte")?, bound("lt")?, bound("lte")?);
    let filter = Filter {
        from_s: gte.unwrap_or(0).max(gt.map_or(0, |gt| gt.saturating_add(1))),
        to_s: lte
            .unwrap_or(u64::MAX)
            .min(lt.map_or(u64::MAX, |lt| lt.saturating_sub(1))),
        types: params.list("event_types"),
        actors: params.list("actor_ids"),
        subjects: params.list("resource_ids"),
    };
    let after = params.one::<String>("after", "an id of this log")?;
    params.end()?;
    let before = match &after {
        None => u64::MAX,
        Some(id) => {
            let number = id.strip_prefix(ID_PREFIX).and_then(|number| number.parse().ok());
            number.ok_or_else(|| ApiError::field("after", "`after` must be an id of this log."))?
        }
    };
    let found = accounts.read(move |tables| {
        let mut last = view::audited(&*tables)
            .map_err(StoreError::from)?
            .min(before.saturating_sub(1));
        let oldest = last.saturating_sub(ROWS_MAX);
        let mut found = Vec::new();
        while last > oldest && found.len() <= limit {
            let first = last.saturating_sub(view::PAGE_RECORDS_MAX as u64);
            let rows = view::audit_after(&*tables, first, view::PAGE_RECORDS_MAX).map_err(StoreError::from)?;
            let these = rows.iter().filter(|row| row.sequence <= last).rev();
            found.extend(these.filter(|row| filter.passes(row)).map(shown));
            last = first;
        }
        Ok((found, last))
    });
    let (found, read_down_to) = found.await?;
    let cut = found.len() <= limit && read_down_to > 0;
    let mut answer = page(found, limit, super::keys::id_of);
    if cut {
        // More may pass further down: the cursor goes on there.
        answer["has_more"] = true.into();
        answer["last_id"] = format!("{ID_PREFIX}{}", read_down_to + 1).into();
    }
    Ok(Json(answer))
}

impl Filter {
    fn passes(&self, row: &AuditRow) -> bool {
        let within = |list: &[String], value: &str| list.is_empty() || list.iter().any(|one| one == value);
        let at_s = row.at_unix_ms / 1000;
        (self.from_s..=self.to_s).contains(&at_s)
            && within(&self.types, kind(row))
            && within(&self.actors, &row.actor)
            && within(&self.subjects, &row.subject)
    }
}

fn kind(row: &AuditRow) -> &'static str {
    match row.action.as_str() {
        "put_project" => {
            let command = Command::decode(row.command.as_ref())
                .ok()
                .and_then(|command| command.kind);
            match command {
                Some(Kind::PutProject(PutProject { project: Some(project) })) if project.archived => "project.archived",
                _ => "project.updated",
            }
        }
        "create_project" => "project.created",
        "create_key" => "api_key.created",
        "put_key" => "api_key.updated",
        "revoke_key" => "api_key.deleted",
        "put_price" => "price.created",
        "create_budget" => "budget.created",
        "put_budget" => "budget.updated",
        "create_deployment" => "deployment.created",
        "put_deployment" => "deployment.updated",
        "remove_deployment" => "deployment.deleted",
        "put_member" => "coordinator.updated",
        "remove_member" => "coordinator.deleted",
        "correct_usage" => "usage.corrected",
        _ => "other",
    }
}

fn shown(row: &AuditRow) -> Value {
    let actor = json!({
        "type": "api_key",
        "api_key": {"id": row.actor, "type": "service_account", "service_account": {"id": row.actor}},
    });
    json!({
        "id": format!("{ID_PREFIX}{}", row.sequence),
        "type": kind(row),
        "effective_at": row.at_unix_ms / 1000,
        "actor": if row.actor.is_empty() { Value::Null } else { actor },
        "action": row.action,
        "subject": row.subject,
        "sequence": row.sequence,
        "raft_index": row.raft_index,
    })
}
