//! `GET /v1/files`: newest first, with `after`, `limit`, `order` and `purpose`.

use axum::extract::Query;
use axum::{Extension, Json};
use baton_state::view::{self, IdOrder};
use serde_json::Value;

use super::{Calls, Shared, is_over, shown};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::organization::{Params, page};

/// OpenAI's.
const LIMIT_MAX: usize = 10_000;

pub(super) async fn list(
    Extension(files): Shared,
    Extension(caller): Calls,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(LIMIT_MAX, LIMIT_MAX)?;
    let mut after = params.one::<String>("after", "a file's id")?.unwrap_or_default();
    let purpose = params.one::<String>("purpose", "a text")?;
    let order = match params.one::<String>("order", "asc or desc")?.as_deref() {
        None | Some("desc") => IdOrder::Descending,
        Some("asc") => IdOrder::Ascending,
        Some(_) => return Err(ApiError::field("order", "`order` must be asc or desc.")),
    };
    params.end()?;
    let owner = caller.owner();
    let found =
        files.state(move |tables| {
            let mut found = Vec::new();
            loop {
                let ids = view::file_ids_of(&*tables, &owner, &after, order, view::PAGE_RECORDS_MAX);
                let ids = ids.map_err(StoreError::from)?;
                let Some(last) = ids.last() else { return Ok(found) };
                after.clone_from(last);
                for id in &ids {
                    let file = view::file(&*tables, id).map_err(StoreError::from)?;
                    let wanted = |purpose: &str, file: &baton_proto::state::File| file.purpose == purpose;
                    found.extend(file.filter(|file| {
                        !is_over(file) && purpose.as_deref().is_none_or(|purpose| wanted(purpose, file))
                    }));
                    if found.len() > limit {
                        return Ok(found);
                    }
                }
            }
        });
    let found: Vec<Value> = found.await?.iter().map(shown).collect();
    Ok(Json(page(found, limit, |file| {
        file["id"].as_str().unwrap_or_default().to_owned()
    })))
}
