//! Usage and costs by time: what `GET /v1/organization/usage/completions` and `/v1/organization/costs` show.
//!
//! Buckets are aligned to UTC; one that the asked-for time touches is told whole. A page ends early, at the start of a
//! bucket, where it would have to read or to tell too much; the next one goes on there.

use super::{rows_after, settled, usage_row};
use crate::aggregates::{self, minutes_kept_from};
use crate::calendar::{DAY_MS, HOUR_MS, MINUTE_MS};
use crate::keys;
use crate::sums::{Dimensions, KeyDimensions, Sums};
use crate::tables::{Tables, TablesError};
use std::collections::HashMap;
use std::ops::ControlFlow;

/// Most entries (or rows) that one page reads: a few hundred milliseconds.
const ENTRIES_MAX: usize = 1_000_000;
/// Most groups in one page, over all of its buckets.
const GROUPS_MAX: usize = 20_000;
/// Most buckets in one page: a day of minutes.
const BUCKETS_MAX: usize = 1440;
/// The tier that the API calls a batch.
const BATCH: &str = "batch";

/// Width of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// `1m`
    Minute,
    /// `1h`
    Hour,
    /// `1d`
    Day,
}

impl Width {
    /// In milliseconds.
    pub const fn ms(self) -> u64 {
        match self {
            Self::Minute => MINUTE_MS,
            Self::Hour => HOUR_MS,
            Self::Day => DAY_MS,
        }
    }
}

/// What groups are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dimension {
    /// By project.
    Project,
    /// By API key.
    Key,
    /// By the client's user.
    User,
    /// By model.
    Model,
    /// By service tier.
    ServiceTier,
    /// Batches from all others: the groups' tier is then "batch" or empty.
    Batch,
    /// By currency. Amounts of different ones must not be added, so every report of costs wants it.
    Currency,
}

/// What is asked for. An empty list of a filter lets everything through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageQuery {
    /// From here on, inclusive, in milliseconds of Unix time. On a next page, its start.
    pub start_unix_ms: u64,
    /// Up to here, exclusive.
    pub end_unix_ms: u64,
    /// Of the buckets.
    pub width: Width,
    /// Nothing: one group for each bucket.
    pub group_by: Vec<Dimension>,
    /// Only these projects.
    pub project_ids: Vec<String>,
    /// Only these keys.
    pub key_ids: Vec<String>,
    /// Only these users.
    pub users: Vec<String>,
    /// Only these models.
    pub models: Vec<String>,
    /// Only batches, or everything else.
    pub batch: Option<bool>,
    /// Most buckets to tell; at most 1440 are.
    pub buckets_max: usize,
}

/// One bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Its start.
    pub start_unix_ms: u64,
    /// Its end, exclusive.
    pub end_unix_ms: u64,
    /// Groups in order. What was not asked to be told apart is empty.
    pub groups: Vec<(Dimensions, Sums)>,
}

/// One page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageReport {
    /// All buckets of the page, those without usage too.
    pub buckets: Vec<Bucket>,
    /// Where the next page starts, if there is more.
    pub next_start_unix_ms: Option<u64>,
}

/// Why there is no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// The state cannot be read.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// One bucket alone is too much.
    #[error(
        "one bucket has more than {GROUPS_MAX} groups or {ENTRIES_MAX} entries; take a narrower bucket or fewer groups"
    )]
    TooLarge,
}

/// Adds up usage.
///
/// # Errors
/// [`ReportError`].
pub fn usage_report(tables: &(impl Tables + ?Sized), query: &UsageQuery) -> Result<UsageReport, ReportError> {
    let width = query.width.ms();
    let start = query.start_unix_ms - query.start_unix_ms % width;
    let wanted = query.end_unix_ms.saturating_sub(start).div_ceil(width);
    let told = wanted.min(query.buckets_max.clamp(1, BUCKETS_MAX) as u64);
    let end = start.saturating_add(told * width);
    let mut collector = Collector::new(query, start);
    let with_user = !query.users.is_empty() || query.group_by.contains(&Dimension::User);
    let table = match (query.width, with_user) {
        (Width::Day, true) => Some(keys::USAGE_USER_DAYS),
        (Width::Hour, true) => Some(keys::USAGE_USER_HOURS),
        (Width::Day, false) => Some(keys::USAGE_DAYS),
        (Width::Hour, false) => Some(keys::USAGE_HOURS),
        (Width::Minute, false) if start >= minutes_kept_from(super::time(tables)?) => Some(keys::USAGE_MINUTES),
        (Width::Minute, _) => None,
    };
    match table {
        Some(table) => {
            let (from, to) = (keys::numbered(table, start), keys::numbered(table, end));
            tables.scan(&from, &to, &mut |key, value| {
                let (at, dimensions) = KeyDimensions::of_key(key)?;
                collector.take(at, dimensions, || Sums::decode(value))
            })?;
        }
        None => read_rows(tables, start, end, &mut collector)?,
    }
    collector.report(end, wanted > told)
}

fn read_rows(
    tables: &(impl Tables + ?Sized),
    start: u64,
    end: u64,
    collector: &mut Collector<'_>,
) -> Result<(), TablesError> {
    let (mut first, mut beyond) = (1, settled(tables)? + 1);
    // Times of rows never go back.
    while first < beyond {
        let middle = first + (beyond - first) / 2;
        let row = rows_after(tables, middle - 1, 1)?.pop();
        if row.is_some_and(|row| row.at_unix_ms < start) {
            first = middle + 1;
        } else {
            beyond = middle;
        }
    }
    let (from, to) = (keys::numbered(keys::ROWS, first), keys::whole(keys::ROWS).1);
    tables.scan(&from, &to, &mut |_, value| {
        let row: baton_proto::state::LedgerRow = super::decode(value, "a row")?;
        if row.at_unix_ms >= end {
            return Ok(ControlFlow::Break(()));
        }
        let at = row.at_unix_ms;
        let (dimensions, sums) = aggregates::of_row(row, |id| usage_row(tables, id))?;
        collector.take(at, (&dimensions).into(), || Ok(sums))
    })
}

/// Adds up one bucket after the other; entries come in the order of time.
struct Collector<'q> {
    query: &'q UsageQuery,
    start: u64,
    wanted: Wanted,
    entries: usize,
    groups_total: usize,
    /// Those that are full, if they have groups.
    full: Vec<(u64, Vec<(Dimensions, Sums)>)>,
    /// The start of the one that is being added up.
    bucket: u64,
    /// Its groups' names, which sort as the groups do, and their places in `sums`. In no order: `close` sorts them.
    groups: HashMap<Vec<u8>, usize>,
    sums: Vec<(Dimensions, Sums)>,
    /// The group of the last entry, which often is that of the next one too.
    last: Option<usize>,
    last_name: Vec<u8>,
    name: Vec<u8>,
    /// Start of the bucket that was too much.
    cut: Option<u64>,
}

/// What a query tells apart.
#[derive(Default)]
struct Wanted {
    project: bool,
    key: bool,
    user: bool,
    model: bool,
    service_tier: bool,
    batch: bool,
    currency: bool,
}

impl<'q> Collector<'q> {
    fn new(query: &'q UsageQuery, start: u64) -> Self {
        let mut wanted = Wanted::default();
        for dimension in &query.group_by {
            match dimension {
                Dimension::Project => wanted.project = true,
                Dimension::Key => wanted.key = true,
                Dimension::User => wanted.user = true,
                Dimension::Model => wanted.model = true,
                Dimension::ServiceTier => wanted.service_tier = true,
                Dimension::Batch => wanted.batch = true,
                Dimension::Currency => wanted.currency = true,
            }
        }
        Self {
            query,
            start,
            wanted,
            entries: 0,
            groups_total: 0,
            full: Vec::new(),
            bucket: start,
            groups: HashMap::new(),
            sums: Vec::new(),
            last: None,
            last_name: Vec::new(),
            name: Vec::new(),
            cut: None,
        }
    }

    /// Takes an entry.
    fn take(
        &mut self,
        at: u64,
        dimensions: KeyDimensions<'_>,
        sums: impl FnOnce() -> Result<Sums, TablesError>,
    ) -> Result<ControlFlow<()>, TablesError> {
        let bucket = at - at % self.query.width.ms();
        self.entries += 1;
        if self.entries > ENTRIES_MAX || self.groups_total > GROUPS_MAX {
            self.cut = Some(bucket);
            return Ok(ControlFlow::Break(()));
        }
        if bucket != self.bucket {
            self.close();
            self.bucket = bucket;
        }
        if self.passes(dimensions) {
            let group = self.group(dimensions);
            self.sums[group].1.add(&sums()?);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn passes(&self, dimensions: KeyDimensions<'_>) -> bool {
        let query = self.query;
        let within = |filter: &[String], value: &[u8]| {
            filter.is_empty() || filter.iter().any(|wanted| wanted.as_bytes() == value)
        };
        within(&query.project_ids, dimensions.project_id)
            && within(&query.key_ids, dimensions.key_id)
            && within(&query.users, dimensions.user)
            && within(&query.models, dimensions.model)
            && query
                .batch
                .is_none_or(|batch| batch == (dimensions.service_tier == BATCH.as_bytes()))
    }

    /// The place of an entry's group.
    fn group(&mut self, dimensions: KeyDimensions<'_>) -> usize {
        let wanted = &self.wanted;
        let only = |wanted: bool, value| if wanted { value } else { &[][..] };
        let is_batch = dimensions.service_tier == BATCH.as_bytes();
        let told = KeyDimensions {
            project_id: only(wanted.project, dimensions.project_id),
            key_id: only(wanted.key, dimensions.key_id),
            model: only(wanted.model, dimensions.model),
            service_tier: only(
                wanted.service_tier || (wanted.batch && is_batch),
                dimensions.service_tier,
            ),
            currency: only(wanted.currency, dimensions.currency),
            user: only(wanted.user, dimensions.user),
        };
        self.name.clear();
        for part in [
            told.project_id,
            told.key_id,
            told.model,
            told.service_tier,
            told.currency,
            told.user,
        ] {
            push_in_order(&mut self.name, part);
        }
        if let Some(last) = self.last
            && self.last_name == self.name
        {
            return last;
        }
        let group = match self.groups.get(&self.name) {
            Some(group) => *group,
            None => {
                self.groups_total += 1;
                self.sums.push((told.to_owned(), Sums::default()));
                self.groups.insert(self.name.clone(), self.sums.len() - 1);
                self.sums.len() - 1
            }
        };
        self.last = Some(group);
        std::mem::swap(&mut self.last_name, &mut self.name);
        group
    }

    /// Ends a bucket.
    fn close(&mut self) {
        self.last = None;
        let mut names: Vec<_> = self.groups.drain().collect();
        names.sort_unstable();
        let mut sums = std::mem::take(&mut self.sums);
        let groups = names.iter().map(|(_, place)| std::mem::take(&mut sums[*place]));
        let groups: Vec<_> = groups.collect();
        if !groups.is_empty() {
            self.full.push((self.bucket, groups));
        }
    }

    fn report(mut self, end: u64, more: bool) -> Result<UsageReport, ReportError> {
        self.close();
        let (end, more) = match self.cut {
            Some(cut) if cut == self.start => return Err(ReportError::TooLarge),
            Some(cut) => (cut, true),
            None => (end, more),
        };
        let width = self.query.width.ms();
        let mut full = self.full.into_iter().peekable();
        let mut buckets = Vec::new();
        for start in (self.start..end).step_by(usize::try_from(width).unwrap_or(usize::MAX)) {
            let groups = full.next_if(|(bucket, _)| *bucket == start);
            buckets.push(Bucket {
                start_unix_ms: start,
                end_unix_ms: start.saturating_add(width),
                groups: groups.map(|(_, groups)| groups).unwrap_or_default(),
            });
        }
        Ok(UsageReport {
            buckets,
            next_start_unix_ms: more.then_some(end),
        })
    }
}

/// Appends a part of a name, so that names sort as their parts do: a zero byte ends it, and one within it is doubled with
/// the highest byte.
fn push_in_order(name: &mut Vec<u8>, part: &[u8]) {
    for (at, piece) in part.split(|byte| *byte == 0).enumerate() {
        if at > 0 {
            name.extend_from_slice(&[0, 0xff]);
        }
        name.extend_from_slice(piece);
    }
    name.extend_from_slice(&[0, 0]);
}
