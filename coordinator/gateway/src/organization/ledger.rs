//! `/v1/ledger`: ours. The rows themselves, in pages whose cursor is the number of the last row (`baton_ledger::feed` makes
//! and checks them), the signed checkpoints, and sealing on demand.

use axum::extract::Query;
use axum::{Extension, Json};
use baton_ledger::feed;
use baton_ledger::json::CheckpointJson;
use baton_state::view;
use serde_json::json;

use super::params::Params;
use super::{Answer, Calls, Shared};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;

/// `GET /v1/ledger/rows?after&checkpoints_after&limit`.
pub(super) async fn rows(
    Extension(accounts): Shared,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Result<Json<feed::Page>, ApiError> {
    let mut params = Params::new(pairs)?;
    let query = feed::Query {
        after: params.one("after", "a row's number")?.unwrap_or(0),
        checkpoints_after: params.one("checkpoints_after", "a row's number")?,
        limit: params.one("limit", "a whole number")?,
    };
    params.end()?;
    let page = accounts.read(move |tables| {
        let tables = &*tables;
        let read = || {
            let limit = usize::try_from(query.limit()).unwrap_or(usize::MAX);
            let rows = view::rows_after(tables, query.after, limit)?;
            let checkpoints = view::checkpoints_after(tables, query.checkpoints_after(), view::PAGE_RECORDS_MAX)?;
            Ok::<_, baton_state::TablesError>((rows, checkpoints, view::settled(tables)?))
        };
        let (rows, checkpoints, last) = read().map_err(StoreError::from)?;
        // One that cannot be read is missing, and the reader finds that out.
        let price = |id: &str| view::price(tables, id).ok().flatten();
        Ok(feed::page(&query, rows, price, checkpoints, last))
    });
    Ok(Json(page.await?))
}

/// `GET /v1/ledger/checkpoints?after&limit`, where `after` is the last row of the last one read.
pub(super) async fn checkpoints(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let after = params.one::<u64>("after", "a row's number")?.unwrap_or(0);
    let limit = params.limit(100, view::PAGE_RECORDS_MAX - 1)?;
    params.end()?;
    let found = accounts.read(move |tables| {
        let found = view::checkpoints_after(&*tables, after, limit + 1);
        Ok(found.map_err(StoreError::from)?)
    });
    let mut found = found.await?;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let found: Vec<CheckpointJson> = found.into_iter().map(CheckpointJson).collect();
    Ok(Json(
        json!({"object": "ledger.checkpoints", "data": found, "has_more": has_more}),
    ))
}

/// `POST /v1/ledger/seal`: signs all rows so far.
pub(super) async fn seal(Extension(accounts): Shared, Extension(caller): Calls) -> Answer {
    let sealed = accounts.store.seal(caller.actor()).await?;
    Ok(Json(
        json!({"object": "ledger.seal", "checkpoint": sealed.map(CheckpointJson)}),
    ))
}
