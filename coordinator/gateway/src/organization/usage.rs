//! `GET /v1/organization/usage/completions`: as OpenAI's. Buckets are aligned to UTC and count rows by the time at which
//! they were settled. `user_id` is what the client sent as its user, and `service_tier` and `batch` those of the record.

use axum::extract::Query;
use axum::{Extension, Json};
use baton_state::view::{self, Bucket, Dimension, ReportError, UsageQuery, UsageReport, Width};
use baton_state::{Dimensions, Sums};
use serde_json::{Value, json};

use super::params::Params;
use super::{Answer, Shared};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::clock::unix_ms;

/// Its parameters; lists may be given as `name[]` too.
pub(super) const QUERY: &[&str] = &[
    "start_time",
    "end_time",
    "bucket_width",
    "group_by",
    "limit",
    "page",
    "project_ids",
    "api_key_ids",
    "user_ids",
    "models",
    "batch",
];

/// The handler.
pub(super) async fn completions(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let (width, default, max) = match params.one::<String>("bucket_width", "a text")?.as_deref() {
        None | Some("1d") => (Width::Day, 7, 31),
        Some("1h") => (Width::Hour, 24, 168),
        Some("1m") => (Width::Minute, 60, 1440),
        Some(_) => return Err(ApiError::field("bucket_width", "`bucket_width` must be 1m, 1h or 1d.")),
    };
    let group_by = params
        .list("group_by")
        .iter()
        .map(|name| dimension(name))
        .collect::<Result<Vec<_>, _>>()?;
    let mut query = query(&mut params, width, default, max)?;
    query.users = params.list("user_ids");
    query.models = params.list("models");
    query.batch = params.one("batch", "true or false")?;
    query.group_by.clone_from(&group_by);
    params.end()?;
    let report = accounts.read(move |tables| report(&*tables, &query)).await?;
    Ok(Json(answer(report, |bucket| {
        let groups = bucket.groups.iter();
        groups.map(|(group, sums)| result(group, sums, &group_by)).collect()
    })))
}

/// What usage and costs have in common.
pub(super) fn query(params: &mut Params, width: Width, default: usize, max: usize) -> Result<UsageQuery, ApiError> {
    let seconds = "a time in seconds of Unix time";
    let start = params.one::<u64>("start_time", seconds)?;
    let start = start.ok_or_else(|| ApiError::field("start_time", "`start_time` is missing: seconds of Unix time."))?;
    let now_s = unix_ms() / 1000 + 1;
    let end = params.one::<u64>("end_time", seconds)?.unwrap_or(now_s.max(start));
    if end < start {
        return Err(ApiError::field("end_time", "`end_time` is before `start_time`."));
    }
    let buckets_max = params.limit(default, max)?;
    let page = params.one::<String>("page", "the `next_page` of the answer before")?;
    let start_unix_ms = match &page {
        None => start.saturating_mul(1000),
        Some(page) => {
            let at = page.strip_prefix("page_").and_then(|at| at.parse::<u64>().ok());
            let at = at.filter(|at| (start..=end).contains(at));
            let wrong = || ApiError::field("page", "`page` must be the `next_page` of an answer to the same query.");
            at.ok_or_else(wrong)?.saturating_mul(1000)
        }
    };
    Ok(UsageQuery {
        start_unix_ms,
        end_unix_ms: end.saturating_mul(1000),
        width,
        group_by: Vec::new(),
        project_ids: params.list("project_ids"),
        key_ids: params.list("api_key_ids"),
        users: Vec::new(),
        models: Vec::new(),
        batch: None,
        buckets_max,
    })
}

/// Adds up.
pub(super) fn report(tables: &dyn baton_state::Tables, query: &UsageQuery) -> Result<UsageReport, ApiError> {
    view::usage_report(tables, query).map_err(|error| match error {
        ReportError::Tables(error) => StoreError::from(error).into(),
        ReportError::TooLarge => ApiError::bad_request(format!("Too much to tell at once: {error}.")),
    })
}

/// A page of buckets.
pub(super) fn answer(report: UsageReport, results: impl Fn(&Bucket) -> Vec<Value>) -> Value {
    let next = report.next_start_unix_ms.map(|at| format!("page_{}", at / 1000));
    let buckets: Vec<Value> = report
        .buckets
        .iter()
        .map(|bucket| {
            json!({
                "object": "bucket",
                "start_time": bucket.start_unix_ms / 1000,
                "end_time": bucket.end_unix_ms / 1000,
                "results": results(bucket),
            })
        })
        .collect();
    json!({"object": "page", "data": buckets, "has_more": next.is_some(), "next_page": next})
}

fn dimension(name: &str) -> Result<Dimension, ApiError> {
    Ok(match name {
        "project_id" => Dimension::Project,
        "user_id" => Dimension::User,
        "api_key_id" => Dimension::Key,
        "model" => Dimension::Model,
        "batch" => Dimension::Batch,
        "service_tier" => Dimension::ServiceTier,
        _ => {
            let names = "project_id, user_id, api_key_id, model, batch and service_tier";
            return Err(ApiError::field("group_by", format!("`group_by` takes {names}.")));
        }
    })
}

/// The value of a group's field: null where it was not asked for, or where its rows have none.
pub(super) fn field(name: &str, asked: bool) -> Value {
    if asked && !name.is_empty() {
        name.into()
    } else {
        Value::Null
    }
}

fn result(group: &Dimensions, sums: &Sums, group_by: &[Dimension]) -> Value {
    let asked = |dimension| group_by.contains(&dimension);
    let count = |count: i128| i64::try_from(count).unwrap_or(i64::MAX);
    let uncached = count(sums.prompt_tokens - sums.cached_tokens);
    let batch = group.service_tier == "batch";
    // With `batch` and no tier, the group's tier only says whether it is a batch.
    json!({
        "object": "organization.usage.completions.result",
        "input_tokens": count(sums.prompt_tokens),
        "input_cached_tokens": count(sums.cached_tokens),
        "input_uncached_tokens": uncached,
        "output_tokens": count(sums.completion_tokens),
        "input_text_tokens": uncached,
        "output_text_tokens": count(sums.completion_tokens),
        "input_cached_text_tokens": count(sums.cached_tokens),
        "input_audio_tokens": 0,
        "input_cached_audio_tokens": 0,
        "output_audio_tokens": 0,
        "input_image_tokens": 0,
        "input_cached_image_tokens": 0,
        "output_image_tokens": 0,
        "num_model_requests": count(sums.requests),
        "project_id": field(&group.project_id, asked(Dimension::Project)),
        "user_id": field(&group.user, asked(Dimension::User)),
        "api_key_id": field(&group.key_id, asked(Dimension::Key)),
        "model": field(&group.model, asked(Dimension::Model)),
        "batch": if asked(Dimension::Batch) { batch.into() } else { Value::Null },
        "service_tier": field(&group.service_tier, asked(Dimension::ServiceTier)),
    })
}
