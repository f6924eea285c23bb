//! The price book. A price is never changed: its id is derived from all that it says, and another price is another id.
//! Which of several holds: the one of the model before that of all models ("*"), the record's tier before "default"; among
//! those that hold at the time the later start, and of equal starts the later in the log.
//!
//! Batches cost half: with a default price comes a price of the batch tier, of the same time, with each amount halved and
//! rounded down to a nano-unit. A batch price that an operator has set stands instead, until the operator sets another.

use crate::audit;
use crate::bounds::{self, PRICE_NANO_MAX, PRICES_PER_MODEL_MAX};
use crate::keys::{self, Key};
use crate::machine::{Handled, Machine, Stop};
use crate::outcome::{Applied, Refused};
use crate::tables::{Tables, TablesError, TablesMut as _};
use crate::view;
use baton_ledger::row::price_id;
use baton_proto::state::{Price, PutPrice};
use std::ops::ControlFlow;

/// Stands for every model that has no price of its own.
pub(crate) const ALL_MODELS: &str = "*";
const DEFAULT_TIER: &str = "default";
const BATCH_TIER: &str = "batch";

pub(crate) fn put(machine: &mut Machine<'_>, command: PutPrice) -> Handled {
    let Some(mut price) = command.price else {
        return Err(Refused::invalid("a price is missing").into());
    };
    check(&price)?;
    let id = price_id(&price);
    if !price.id.is_empty() && price.id != id {
        return Err(Refused::invalid(format!("the price's id is {id}; leave it empty to have it made")).into());
    }
    if view::price(machine, &id)?.is_some() {
        return Ok(Applied::Priced { id });
    }
    price.id.clone_from(&id);
    let mut batch = None;
    if price.service_tier == DEFAULT_TIER && !has_own_batch_price(machine, &price)? {
        let half = half(&price);
        // It may be there: of another default price, or because an operator set the same.
        batch = view::price(machine, &half.id)?.is_none().then_some(half);
    }
    for price in [Some(&price), batch.as_ref()].into_iter().flatten() {
        check_room(machine, price)?;
    }
    for price in [Some(&price), batch.as_ref()].into_iter().flatten() {
        let start = versions(price)
            .number(price.effective_from_unix_ms)
            .number(machine.index);
        machine.put_message(&keys::named(keys::PRICES, &price.id), price)?;
        machine.put(&start.done(), price.id.as_bytes())?;
    }
    audit::write(machine, "put_price", &id)?;
    Ok(Applied::Priced { id })
}

/// Whether the batch price that would hold is another than the half of the default one before this.
fn has_own_batch_price(machine: &Machine<'_>, price: &Price) -> Result<bool, TablesError> {
    let at = price.effective_from_unix_ms;
    let Some(batch) = latest(machine, &price.model, BATCH_TIER, at)? else {
        return Ok(false);
    };
    let before = latest(machine, &price.model, DEFAULT_TIER, batch.effective_from_unix_ms)?;
    Ok(before.is_none_or(|before| half(&before).id != batch.id))
}

/// What a batch pays where nothing else is said.
fn half(price: &Price) -> Price {
    let mut batch = Price {
        id: String::new(),
        service_tier: BATCH_TIER.to_owned(),
        input_nano_per_mtok: price.input_nano_per_mtok / 2,
        cached_input_nano_per_mtok: price.cached_input_nano_per_mtok / 2,
        output_nano_per_mtok: price.output_nano_per_mtok / 2,
        ..price.clone()
    };
    batch.id = price_id(&batch);
    batch
}

fn versions(price: &Price) -> Key {
    Key::of(keys::PRICES_BY_START)
        .text(&price.model)
        .text(&price.service_tier)
}

fn check_room(machine: &Machine<'_>, price: &Price) -> Result<(), Stop> {
    let versions = versions(price);
    let mut count = 0;
    machine.scan(&versions.clone().done(), &versions.beyond(), &mut |_, _| {
        count += 1;
        Ok(ControlFlow::Continue(()))
    })?;
    if count >= PRICES_PER_MODEL_MAX {
        let max = PRICES_PER_MODEL_MAX as u64;
        let what = "prices of this model and tier";
        return Err(Refused::TooMany { what, max }.into());
    }
    Ok(())
}

fn check(price: &Price) -> Result<(), Refused> {
    bounds::name("the price's model", &price.model)?;
    bounds::currency(&price.currency)?;
    if ![DEFAULT_TIER, BATCH_TIER].contains(&price.service_tier.as_str()) {
        return Err(Refused::invalid("a price's tier is \"default\" or \"batch\""));
    }
    let amounts = [
        price.input_nano_per_mtok,
        price.cached_input_nano_per_mtok,
        price.output_nano_per_mtok,
    ];
    if amounts.iter().any(|amount| *amount > PRICE_NANO_MAX) {
        return Err(Refused::invalid(
            "a price is at most one unit of the currency per token",
        ));
    }
    if price.effective_to_unix_ms != 0 && price.effective_to_unix_ms <= price.effective_from_unix_ms {
        return Err(Refused::invalid("a price that ends does so after its start"));
    }
    Ok(())
}

/// Whether a price is in force at a time.
pub(crate) fn holds(price: &Price, at_unix_ms: u64) -> bool {
    price.effective_from_unix_ms <= at_unix_ms
        && (price.effective_to_unix_ms == 0 || at_unix_ms < price.effective_to_unix_ms)
}

/// The price that holds for a model, tier and time.
pub(crate) fn at(
    tables: &(impl Tables + ?Sized),
    model: &str,
    tier: &str,
    at_unix_ms: u64,
) -> Result<Option<Price>, TablesError> {
    let tiers: &[&str] = if tier == BATCH_TIER {
        &[BATCH_TIER, DEFAULT_TIER]
    } else {
        &[DEFAULT_TIER]
    };
    for model in [model, ALL_MODELS] {
        for tier in tiers {
            let found = latest(tables, model, tier, at_unix_ms)?;
            if found.is_some() {
                return Ok(found);
            }
        }
    }
    Ok(None)
}

fn latest(
    tables: &(impl Tables + ?Sized),
    model: &str,
    tier: &str,
    at_unix_ms: u64,
) -> Result<Option<Price>, TablesError> {
    let versions = Key::of(keys::PRICES_BY_START).text(model).text(tier);
    let mut to = versions.clone().number(at_unix_ms.saturating_add(1)).done();
    while let Some((key, id)) = tables.last(&versions.clone().done(), &to)? {
        let id = String::from_utf8_lossy(&id);
        let missing = || TablesError::Corrupt(format!("price {id} is missing"));
        let price = view::price(tables, &id)?.ok_or_else(missing)?;
        if holds(&price, at_unix_ms) {
            return Ok(Some(price));
        }
        to = key;
    }
    Ok(None)
}
