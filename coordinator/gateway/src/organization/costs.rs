//! `GET /v1/organization/costs`: as OpenAI's. Amounts of different currencies are never added, so each currency is a result
//! of its own. `amount.value` is a JSON number, which many readers turn into a double; `amount.nano` is ours and exact:
//! nano-units as text. A line item is a model and a class of tokens: `MODEL, input`, `MODEL, cached input`,
//! `MODEL, output`.

use axum::extract::Query;
use axum::{Extension, Json};
use baton_state::view::{Dimension, Width};
use baton_state::{Dimensions, Sums};
use serde_json::{Value, json};

use super::params::Params;
use super::usage::{answer, field, query, report};
use super::{Answer, Shared};
use crate::api_error::ApiError;

/// What results are told apart by.
#[derive(Clone, Copy, Default)]
struct Grouping {
    project: bool,
    key: bool,
    line_item: bool,
}

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
];

/// The handler.
pub(super) async fn costs(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    if params
        .one::<String>("bucket_width", "1d")?
        .is_some_and(|width| width != "1d")
    {
        return Err(ApiError::field("bucket_width", "`bucket_width` must be 1d."));
    }
    let mut grouping = Grouping::default();
    let mut query = {
        let group_by = params.list("group_by");
        let mut query = query(&mut params, Width::Day, 7, 180)?;
        query.group_by.push(Dimension::Currency);
        for name in group_by {
            let (flag, dimension) = match name.as_str() {
                "project_id" => (&mut grouping.project, Dimension::Project),
                "api_key_id" => (&mut grouping.key, Dimension::Key),
                "line_item" => (&mut grouping.line_item, Dimension::Model),
                _ => {
                    let message = "`group_by` takes project_id, line_item and api_key_id.";
                    return Err(ApiError::field("group_by", message));
                }
            };
            *flag = true;
            query.group_by.push(dimension);
        }
        query
    };
    query.group_by.dedup();
    params.end()?;
    let report = accounts.read(move |tables| report(&*tables, &query)).await?;
    Ok(Json(answer(report, |bucket| {
        // Without a currency no price held, and nothing was charged.
        let charged = bucket.groups.iter().filter(|(group, _)| !group.currency.is_empty());
        charged
            .flat_map(|(group, sums)| results(group, sums, grouping))
            .collect()
    })))
}

fn results(group: &Dimensions, sums: &Sums, grouping: Grouping) -> Vec<Value> {
    if !grouping.line_item {
        let nano = sums.input_nano + sums.cached_input_nano + sums.output_nano;
        return vec![result(group, nano, None, grouping)];
    }
    let classes = [
        ("input", sums.input_nano, sums.prompt_tokens - sums.cached_tokens),
        ("cached input", sums.cached_input_nano, sums.cached_tokens),
        ("output", sums.output_nano, sums.completion_tokens),
    ];
    let used = classes
        .into_iter()
        .filter(|(_, nano, tokens)| (*nano, *tokens) != (0, 0));
    used.map(|(class, nano, tokens)| {
        let item = format!("{}, {class}", group.model);
        result(group, nano, Some((item, tokens)), grouping)
    })
    .collect()
}

fn result(group: &Dimensions, nano: i128, item: Option<(String, i128)>, grouping: Grouping) -> Value {
    let (line_item, quantity) = item.map_or((None, None), |(item, tokens)| (Some(item), i64::try_from(tokens).ok()));
    json!({
        "object": "organization.costs.result",
        "amount": {
            "value": units(nano),
            "currency": group.currency.to_ascii_lowercase(),
            "nano": nano.to_string(),
        },
        "line_item": line_item,
        "project_id": field(&group.project_id, grouping.project),
        "api_key_id": field(&group.key_id, grouping.key),
        "quantity": quantity,
        "quantity_unit": quantity.map(|_| "tokens"),
    })
}

/// The nearest double of an amount: read from its decimal digits, so that 0.3 is 0.3.
fn units(nano: i128) -> f64 {
    super::money(nano).parse().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_the_nearest_doubles() {
        assert_eq!(units(300_000_000), 0.3);
        assert_eq!(units(-1), -1e-9);
        assert_eq!(units(0), 0.0);
    }
}
