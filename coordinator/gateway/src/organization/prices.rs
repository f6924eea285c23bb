//! `/v1/organization/prices`: ours. A price is never changed; another one that starts later takes its place. It cannot start
//! in the past, because requests that were reserved without it would then cost something.

use axum::extract::Query;
use axum::extract::rejection::JsonRejection;
use axum::{Extension, Json};
use baton_ledger::money;
use baton_proto::state::{Price, PutPrice, command::Kind};
use baton_state::{Applied, Tables, view};
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::Params;
use super::{Answer, Calls, Decimal, Shared, body, collect, page};
use crate::api_error::ApiError;
use crate::clock::unix_ms;

/// How far in the past a start may lie: the time that a client's clock and its request take.
const PAST_MS_MAX: u64 = 60_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PriceBody {
    model: String,
    service_tier: Option<String>,
    currency: Option<String>,
    /// Per million tokens.
    input: Decimal,
    cached_input: Option<Decimal>,
    output: Decimal,
    effective_from_unix_ms: Option<u64>,
    effective_to_unix_ms: Option<u64>,
}

pub(super) const EXAMPLE: &str =
    r#"{"model": "llama", "input": "20", "cached_input": "2", "output": "80", "currency": "USD"}"#;

/// `GET`.
pub(super) async fn list(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(100, 1000)?;
    let after = params.one::<String>("after", "a price's id")?.unwrap_or_default();
    let model = params.one::<String>("model", "a model's name")?;
    params.end()?;
    let found = accounts.read(move |tables| {
        let next = |tables: &dyn Tables, after: &str| view::prices_after(tables, after, view::PAGE_RECORDS_MAX);
        let keep = |price: Price| {
            Ok(model
                .as_ref()
                .is_none_or(|model| *model == price.model)
                .then(|| shown(&price)))
        };
        collect(&*tables, after, limit, next, |price| &price.id, keep)
    });
    Ok(Json(page(found.await?, limit, super::keys::id_of)))
}

/// `POST`.
pub(super) async fn create(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    json: Result<Json<PriceBody>, JsonRejection>,
) -> Answer {
    let new: PriceBody = body(json, EXAMPLE)?;
    let now_ms = unix_ms();
    let from_ms = new.effective_from_unix_ms.unwrap_or(now_ms);
    if from_ms.saturating_add(PAST_MS_MAX) < now_ms {
        let message = "`effective_from_unix_ms` is in the past; what was used then has its price already.";
        return Err(ApiError::field("effective_from_unix_ms", message));
    }
    let amount = |name: &'static str, decimal: &Decimal| {
        let parsed = money::parse_price_per_mtok(&decimal.text());
        parsed.map_err(|error| ApiError::field(name, format!("`{name}`: {error}.")))
    };
    let input = amount("input", &new.input)?;
    let mut price = Price {
        model: new.model,
        service_tier: new.service_tier.unwrap_or_else(|| "default".into()),
        currency: new.currency.unwrap_or_else(|| "USD".into()),
        input_nano_per_mtok: input,
        cached_input_nano_per_mtok: new
            .cached_input
            .as_ref()
            .map_or(Ok(input), |it| amount("cached_input", it))?,
        output_nano_per_mtok: amount("output", &new.output)?,
        effective_from_unix_ms: from_ms,
        effective_to_unix_ms: new.effective_to_unix_ms.unwrap_or(0),
        ..Price::default()
    };
    let kind = Kind::PutPrice(PutPrice {
        price: Some(price.clone()),
    });
    if let Applied::Priced { id } = accounts.change(&caller, kind).await? {
        price.id = id;
    }
    Ok(Json(shown(&price)))
}

fn shown(price: &Price) -> Value {
    let ends = (price.effective_to_unix_ms > 0).then_some(price.effective_to_unix_ms);
    json!({
        "id": price.id,
        "object": "organization.price",
        "model": price.model,
        "service_tier": price.service_tier,
        "currency": price.currency,
        "input": super::money(price.input_nano_per_mtok),
        "cached_input": super::money(price.cached_input_nano_per_mtok),
        "output": super::money(price.output_nano_per_mtok),
        "effective_from_unix_ms": price.effective_from_unix_ms,
        "effective_to_unix_ms": ends,
    })
}
