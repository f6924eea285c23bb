//! Prices, budgets, their periods and slices.

use super::{message, page, page_after, under};
use crate::keys::{self, Key};
use crate::tables::{Tables, TablesError};
use crate::window::Window;
use baton_proto::state::{Budget, Price, Slice};
use std::ops::ControlFlow;

/// A price by its id.
pub fn price(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<Price>, TablesError> {
    message(tables, &keys::named(keys::PRICES, id), "a price")
}

/// A page of the price book, by id.
pub fn prices_after(tables: &(impl Tables + ?Sized), after: &str, limit: usize) -> Result<Vec<Price>, TablesError> {
    page_after(tables, keys::PRICES, after, limit, "a price")
}

/// The price that holds for a model and service tier at a time: what a record pins when its request starts.
pub fn price_at(
    tables: &(impl Tables + ?Sized),
    model: &str,
    service_tier: &str,
    at_unix_ms: u64,
) -> Result<Option<Price>, TablesError> {
    crate::prices::at(tables, model, service_tier, at_unix_ms)
}

/// A budget.
pub fn budget(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<Budget>, TablesError> {
    message(tables, &keys::named(keys::BUDGETS, id), "a budget")
}

/// A page of the budgets, by id.
pub fn budgets_after(tables: &(impl Tables + ?Sized), after: &str, limit: usize) -> Result<Vec<Budget>, TablesError> {
    page_after(tables, keys::BUDGETS, after, limit, "a budget")
}

/// The budgets of a project as a whole (`key_id` empty) or of one of its keys. A request is under both kinds.
pub fn budgets_of(tables: &(impl Tables + ?Sized), project_id: &str, key_id: &str) -> Result<Vec<Budget>, TablesError> {
    let prefix = Key::of(keys::BUDGETS_BY_KEY).text(project_id).text(key_id);
    let skip = prefix.clone().done().len();
    let (from, to) = under(prefix);
    let mut ids = Vec::new();
    tables.scan(&from, &to, &mut |key, _| {
        ids.push(String::from_utf8_lossy(&key[skip..]).into_owned());
        Ok(ControlFlow::Continue(()))
    })?;
    let missing = |id: &str| TablesError::Corrupt(format!("budget {id} is missing"));
    ids.iter()
        .map(|id| budget(tables, id)?.ok_or_else(|| missing(id)))
        .collect()
}

/// What became of a budget in the period that starts at `start_unix_ms` (see
/// [`period_start`](crate::period_start)); nothing if nothing happened in it.
pub fn window(
    tables: &(impl Tables + ?Sized),
    budget_id: &str,
    start_unix_ms: u64,
) -> Result<Option<Window>, TablesError> {
    let bytes = tables.get(&window_key(budget_id, start_unix_ms))?;
    bytes.map(|bytes| Window::decode(&bytes)).transpose()
}

pub(crate) fn window_key(budget_id: &str, start_unix_ms: u64) -> Vec<u8> {
    Key::of(keys::WINDOWS).text(budget_id).number(start_unix_ms).done()
}

/// An open slice.
pub fn slice(tables: &(impl Tables + ?Sized), budget_id: &str, slice_id: &str) -> Result<Option<Slice>, TablesError> {
    message(tables, &slice_key(budget_id, slice_id), "a slice")
}

/// A page of a budget's open slices, by id, those of past periods included.
pub fn slices_after(
    tables: &(impl Tables + ?Sized),
    budget_id: &str,
    after: &str,
    limit: usize,
) -> Result<Vec<Slice>, TablesError> {
    let (from, to) = under(Key::of(keys::SLICES).text(budget_id));
    let from = if after.is_empty() {
        from
    } else {
        [slice_key(budget_id, after), vec![0]].concat()
    };
    page(tables, &from, &to, limit, "a slice")
}

pub(crate) fn slice_key(budget_id: &str, slice_id: &str) -> Vec<u8> {
    Key::of(keys::SLICES).text(budget_id).rest(slice_id.as_bytes()).done()
}
