//! Keys, projects, budgets, and the log of changes.

use super::remote::{Api, cell, escape, run, table};
use crate::cli::accounts::{
    At, AuditArgs, BudgetsCommand, DeploymentsCommand, KeyCreateArgs, KeyListArgs, KeyRevokeArgs, KeyUpdateArgs,
    KeysCommand, KeysOf, LimitArgs, ProjectsCommand, ShareArgs,
};
use crate::up::{print, say};
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::process::ExitCode;

const PROJECTS: &str = "/v1/organization/projects";
const BUDGETS: &str = "/v1/organization/budgets";
const DEPLOYMENTS: &str = "/v1/organization/deployments";

/// `baton keys`.
pub fn keys(command: &KeysCommand) -> anyhow::Result<ExitCode> {
    match command {
        KeysCommand::Create(args) => run(&args.at.remote, async |api: &Api| create_key(api, args).await),
        KeysCommand::List(args) => run(&args.at.remote, async |api: &Api| list_keys(api, args).await),
        KeysCommand::Update(args) => run(&args.at.remote, async |api: &Api| update_key(api, args).await),
        KeysCommand::Revoke(args) => run(&args.at.remote, async |api: &Api| revoke_key(api, args).await),
    }
}

/// Where a project's keys are, or those for administration.
fn keys_path(of: &KeysOf) -> String {
    match of.project.as_deref() {
        Some(project) => format!("{PROJECTS}/{}/api_keys", escape(project)),
        None => "/v1/organization/admin_api_keys".into(),
    }
}

async fn create_key(api: &Api, args: &KeyCreateArgs) -> anyhow::Result<()> {
    let mut body = Map::new();
    body.insert("name".into(), args.name.clone().into());
    if !args.of.admin {
        let scopes: Vec<&str> = args.scopes.iter().map(|scope| scope.name()).collect();
        body.insert("scopes".into(), scopes.into());
        body.insert("models".into(), args.models.clone().into());
    }
    if let Some(seconds) = args.expires_in {
        body.insert("expires_in_seconds".into(), seconds.into());
    }
    limits(&mut body, args.limits);
    share(&mut body, args.share);
    let key = api.post(&keys_path(&args.of), &body.into()).await?;
    show(&args.at, &key, || {
        say(&format!("key {}; this secret is not shown again:", cell(&key["id"])));
        cell(&key["value"]) + "\n"
    })
}

async fn list_keys(api: &Api, args: &KeyListArgs) -> anyhow::Result<()> {
    let path = format!("{}?limit=100&include_revoked={}", keys_path(&args.of), args.all);
    let keys = api.list(&path).await?;
    let header = [
        "KEY", "NAME", "SECRET", "SCOPES", "MODELS", "WEIGHT", "EXPIRES", "REVOKED",
    ];
    show_list(&args.at, &keys, header, |key| {
        [
            "id",
            "name",
            "redacted_value",
            "scopes",
            "models",
            "weight",
            "expires_at",
            "revoked",
        ]
        .map(|name| cell(&key[name]))
    })
}

async fn update_key(api: &Api, args: &KeyUpdateArgs) -> anyhow::Result<()> {
    let path = format!("{PROJECTS}/{}/api_keys/{}", escape(&args.project), escape(&args.key));
    let mut body = Map::new();
    if let Some(name) = &args.name {
        body.insert("name".into(), name.clone().into());
    }
    if !args.scopes.is_empty() {
        let scopes: Vec<&str> = args.scopes.iter().map(|scope| scope.name()).collect();
        body.insert("scopes".into(), scopes.into());
    }
    if !args.models.is_empty() {
        body.insert("models".into(), args.models.clone().into());
    }
    if let Some(seconds) = args.expires_in {
        body.insert("expires_in_seconds".into(), seconds.into());
    }
    limits(&mut body, both_limits(api, &path, args.limits).await?);
    share(&mut body, args.share);
    let key = api.post(&path, &body.into()).await?;
    show(&args.at, &key, || format!("{} is changed\n", args.key))
}

async fn revoke_key(api: &Api, args: &KeyRevokeArgs) -> anyhow::Result<()> {
    let path = format!("{}/{}", keys_path(&args.of), escape(&args.key));
    let revoked = api.delete(&path).await?;
    show(&args.at, &revoked, || format!("{} is revoked\n", args.key))
}

/// `baton projects`.
pub fn projects(command: &ProjectsCommand) -> anyhow::Result<ExitCode> {
    match command {
        ProjectsCommand::Create(args) => run(&args.at.remote, async |api: &Api| {
            let mut body = Map::new();
            body.insert("name".into(), args.name.clone().into());
            limits(&mut body, args.limits);
            let project = api.post(PROJECTS, &body.into()).await?;
            show(&args.at, &project, || cell(&project["id"]) + "\n")
        }),
        ProjectsCommand::List(args) => run(&args.at.remote, async |api: &Api| {
            let path = format!("{PROJECTS}?limit=100&include_archived={}", args.all);
            let projects = api.list(&path).await?;
            show_list(
                &args.at,
                &projects,
                ["PROJECT", "NAME", "STATUS", "RPM", "TPM"],
                |project| {
                    let limit = |name: &str| cell(&project["limits"][name]);
                    let [id, name, status] = ["id", "name", "status"].map(|name| cell(&project[name]));
                    [id, name, status, limit("requests_per_min"), limit("tokens_per_min")]
                },
            )
        }),
        ProjectsCommand::Set(args) => run(&args.at.remote, async |api: &Api| {
            let path = format!("{PROJECTS}/{}", escape(&args.project));
            let mut body = Map::new();
            if let Some(name) = &args.name {
                body.insert("name".into(), name.clone().into());
            }
            limits(&mut body, both_limits(api, &path, args.limits).await?);
            let project = api.post(&path, &body.into()).await?;
            show(&args.at, &project, || format!("{} is changed\n", args.project))
        }),
        ProjectsCommand::Archive(args) => run(&args.at.remote, async |api: &Api| {
            let path = format!("{PROJECTS}/{}/archive", escape(&args.project));
            let project = api.post(&path, &json!({})).await?;
            show(&args.at, &project, || format!("{} is archived\n", args.project))
        }),
    }
}

/// `baton budgets`.
pub fn budgets(command: &BudgetsCommand) -> anyhow::Result<ExitCode> {
    match command {
        BudgetsCommand::Set(args) => run(&args.at.remote, async |api: &Api| {
            let body = json!({
                "id": args.id,
                "project_id": args.project,
                "key_id": args.key,
                "currency": args.currency,
                "limit": args.limit,
                "period": args.period.name(),
                "hard": !args.soft,
            });
            let budget = api.post(BUDGETS, &body).await?;
            show(&args.at, &budget, || cell(&budget["id"]) + "\n")
        }),
        BudgetsCommand::List(args) => run(&args.at.remote, async |api: &Api| {
            let mut path = format!("{BUDGETS}?limit=100");
            if let Some(project) = &args.project {
                path += &format!("&project_ids={}", escape(project));
            }
            let budgets = api.list(&path).await?;
            let fields = [
                "id",
                "project_id",
                "key_id",
                "period",
                "limit",
                "currency",
                "spent",
                "set_aside",
                "free",
                "hard",
            ];
            let header = fields.map(|name| if name == "id" { "BUDGET" } else { name });
            show_list(&args.at, &budgets, header, |budget| {
                fields.map(|name| cell(&budget[name]))
            })
        }),
    }
}

/// `baton deployments`.
pub fn deployments(command: &DeploymentsCommand) -> anyhow::Result<ExitCode> {
    match command {
        DeploymentsCommand::List(args) => run(&args.at.remote, async |api: &Api| {
            let deployments = api.list(&format!("{DEPLOYMENTS}?limit=100")).await?;
            show_list(&args.at, &deployments, ["MODEL", "REVISION"], |deployment| {
                ["model", "revision"].map(|name| cell(&deployment[name]))
            })
        }),
        DeploymentsCommand::Set(args) => run(&args.at.remote, async |api: &Api| {
            let mut body = Map::new();
            body.insert("model".into(), args.model.clone().into());
            if let Some(revision) = &args.revision {
                body.insert("revision".into(), revision.clone().into());
            }
            if let Some(path) = &args.settings {
                let settings = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the settings in {}", path.display()))?;
                let read: Result<toml::Table, _> = settings.parse();
                read.with_context(|| format!("{} is not TOML", path.display()))?;
                body.insert("settings".into(), settings.into());
            }
            let deployment = api.post(DEPLOYMENTS, &body.into()).await?;
            show(&args.at, &deployment, || format!("{} is deployed\n", args.model))
        }),
        DeploymentsCommand::Remove(args) => run(&args.at.remote, async |api: &Api| {
            let removed = api.delete(&format!("{DEPLOYMENTS}/{}", escape(&args.model))).await?;
            show(&args.at, &removed, || format!("{} is removed\n", args.model))
        }),
    }
}

/// `baton audit`.
pub fn audit(args: &AuditArgs) -> anyhow::Result<ExitCode> {
    run(&args.at.remote, async |api: &Api| {
        let mut path = format!("/v1/organization/audit_logs?limit={}", args.limit);
        if let Some(after) = &args.after {
            path += &format!("&after={}", escape(after));
        }
        let page = api.get(&path).await?;
        let rows = page["data"].as_array().cloned().unwrap_or_default();
        show_list(
            &args.at,
            &rows,
            ["CHANGE", "UNIX TIME", "WHAT", "SUBJECT", "ACTOR"],
            |row| {
                let [id, at, kind, subject] = ["id", "effective_at", "type", "subject"].map(|name| cell(&row[name]));
                [id, at, kind, subject, cell(&row["actor"]["api_key"]["id"])]
            },
        )
    })
}

/// Both limits are set together: the one not given stays as it is.
async fn both_limits(api: &Api, path: &str, mut wanted: LimitArgs) -> anyhow::Result<LimitArgs> {
    if wanted.rpm.is_some() != wanted.tpm.is_some() {
        let known = api.get(path).await?;
        wanted.rpm = wanted.rpm.or(known["limits"]["requests_per_min"].as_u64());
        wanted.tpm = wanted.tpm.or(known["limits"]["tokens_per_min"].as_u64());
    }
    Ok(wanted)
}

fn share(body: &mut Map<String, Value>, share: ShareArgs) {
    if let Some(weight) = share.weight {
        body.insert("weight".into(), weight.into());
    }
    if let Some(priority_min) = share.priority_min {
        body.insert("priority_min".into(), priority_min.into());
    }
}

fn limits(body: &mut Map<String, Value>, limits: LimitArgs) {
    if limits.rpm.is_some() || limits.tpm.is_some() {
        let limits = json!({
            "requests_per_min": limits.rpm.unwrap_or(0),
            "tokens_per_min": limits.tpm.unwrap_or(0),
        });
        body.insert("limits".into(), limits);
    }
}

fn show(at: &At, value: &Value, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    print(&if at.json {
        serde_json::to_string_pretty(value)? + "\n"
    } else {
        text()
    });
    Ok(())
}

fn show_list<const N: usize>(
    at: &At,
    values: &[Value],
    header: [&str; N],
    row: impl Fn(&Value) -> [String; N],
) -> anyhow::Result<()> {
    show(at, &Value::from(values.to_vec()), || {
        table(header, values.iter().map(row).collect())
    })
}
