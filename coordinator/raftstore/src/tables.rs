//! The state machine's tables: the state's file and the layers over it as one, to read one moment of them, or to apply a batch.
//!
//! A batch becomes visible at its end. What it reads of the file and every command asks for (prices, budgets, what is due) is kept by the
//! [`Writer`] from batch to batch. Whoever looks at the tables through [`StateTxn`] cannot tell.

use crate::RaftStoreError;
use crate::database::{STATE, Store};
use crate::overlay::{Batch, Layer, Layers, Merged, Overlay};
use baton_state::{Pair, Tables, TablesError, TablesMut, Visit, keys};
use redb::{AccessGuard, ReadOnlyTable, ReadTransaction, ReadableTableMetadata, StorageError};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::iter::Peekable;
use std::ops::ControlFlow;
use std::sync::Arc;

type Bytes = &'static [u8];

/// Which of [`STATE`] a key is in.
pub(crate) fn segment(key: &[u8]) -> usize {
    match key.first() {
        Some(&keys::ROWS) => 1,
        Some(&keys::REQUESTS) => 2,
        _ => 0,
    }
}

/// The order of keys over the segments: segment, from, and (exclusive) to; an empty end is none.
const PIECES: [(usize, &[u8], &[u8]); 4] = [
    (0, &[], &[keys::ROWS]),
    (1, &[keys::ROWS], &[keys::REQUESTS]),
    (2, &[keys::REQUESTS], &[keys::REQUESTS + 1]),
    (0, &[keys::REQUESTS + 1], &[]),
];

/// The parts of a range that lie in one segment each.
fn pieces<'k>(from: &'k [u8], to: &'k [u8]) -> impl DoubleEndedIterator<Item = (usize, &'k [u8], &'k [u8])> {
    PIECES.into_iter().filter_map(move |(segment, first, end)| {
        let from = from.max(first);
        let to = if end.is_empty() { to } else { to.min(end) };
        (from < to).then_some((segment, from, to))
    })
}

/// The tables of a version of the state's file.
pub(crate) struct FileTables([ReadOnlyTable<Bytes, Bytes>; 3]);

impl FileTables {
    fn open(store: &Store) -> Result<Self, RaftStoreError> {
        Self::of(&store.read_state()?)
    }

    fn of(txn: &ReadTransaction) -> Result<Self, RaftStoreError> {
        let [state, rows, requests] = STATE;
        Ok(Self([
            txn.open_table(state)?,
            txn.open_table(rows)?,
            txn.open_table(requests)?,
        ]))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let value = self.0[segment(key)].get(key).map_err(medium)?;
        Ok(value.map(|value| value.value().to_vec()))
    }

    fn holds(&self, key: &[u8]) -> Result<bool, TablesError> {
        Ok(self.0[segment(key)].get(key).map_err(medium)?.is_some())
    }

    /// Visits the pairs of the file with `from <= key < to` where `layers`, the newest first, know nothing newer.
    fn scan<'l>(
        &self,
        layers: impl Iterator<Item = &'l Layer>,
        from: &'l [u8],
        to: &'l [u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), TablesError> {
        let mut above = Merged::of(layers.map(|layer| layer.range(from, to)), false).peekable();
        for (segment, from, to) in pieces(from, to) {
            let range = self.0[segment].range(from..to).map_err(medium)?;
            if walk(range, &mut above, false, visit)?.is_break() {
                return Ok(());
            }
        }
        for (key, value) in above {
            if let Some(value) = value
                && visit(key, value)?.is_break()
            {
                return Ok(());
            }
        }
        Ok(())
    }

    fn last<'l>(
        &self,
        layers: impl Iterator<Item = &'l Layer>,
        from: &'l [u8],
        to: &'l [u8],
    ) -> Result<Option<Pair>, TablesError> {
        let mut found = None;
        let visit: &mut Visit<'_> = &mut |key, value| {
            found = Some((key.to_vec(), value.to_vec()));
            Ok(ControlFlow::Break(()))
        };
        let mut above = Merged::of(layers.map(|layer| layer.range(from, to).rev()), true).peekable();
        let mut ended = false;
        for (segment, from, to) in pieces(from, to).rev() {
            let range = self.0[segment].range(from..to).map_err(medium)?;
            if walk(range.rev(), &mut above, true, visit)?.is_break() {
                ended = true;
                break;
            }
        }
        if !ended && let Some((key, Some(value))) = above.find(|(_, value)| value.is_some()) {
            let _ = visit(key, value)?;
        }
        Ok(found)
    }
}

type Item<'t> = Result<(AccessGuard<'t, Bytes>, AccessGuard<'t, Bytes>), StorageError>;

/// Visits a range of the file and what lies before its end in the layers, of which the layers win.
fn walk<'t, 'l>(
    range: impl Iterator<Item = Item<'t>>,
    above: &mut Peekable<impl Iterator<Item = (&'l [u8], Option<&'l [u8]>)>>,
    backwards: bool,
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, TablesError> {
    for item in range {
        let (key, value) = item.map_err(medium)?;
        let (key, mut hidden) = (key.value(), false);
        let before = |above: &[u8]| if backwards { above >= key } else { above <= key };
        while let Some((above_key, above_value)) = above.next_if(|(above_key, _)| before(above_key)) {
            hidden |= above_key == key;
            if let Some(value) = above_value
                && visit(above_key, value)?.is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        if !hidden && visit(key, value.value())?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// The state at one moment. While it lives, memory and file keep what it sees.
pub(crate) struct StateView {
    file: FileTables,
    layers: Layers,
}

impl StateView {
    /// As of the last batch.
    pub(crate) fn open(store: &Store) -> Result<Self, RaftStoreError> {
        let (file, layers) = store.overlay().read(|| FileTables::open(store))?;
        Ok(Self { file, layers })
    }

    /// Index and term of the last entry in it.
    pub(crate) fn applied(&self) -> (u64, u64) {
        self.layers.applied
    }

    fn newest_first(&self) -> impl Iterator<Item = &Layer> {
        self.layers.layers.iter().rev().map(Arc::as_ref)
    }

    /// Keys in it. Looks up in the file whatever the layers know.
    pub(crate) fn len(&self) -> Result<u64, RaftStoreError> {
        let mut total = 0;
        for table in &self.file.0 {
            total += table.len()?;
        }
        for (key, value) in Merged::of(self.newest_first().map(Layer::all), false) {
            match (value.is_some(), self.file.holds(key)?) {
                (true, false) => total += 1,
                (false, true) => total -= 1,
                _ => {}
            }
        }
        Ok(total)
    }
}

impl Tables for StateView {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        match self.newest_first().find_map(|layer| layer.get(key)) {
            Some(known) => Ok(known.map(<[u8]>::to_vec)),
            None => self.file.get(key),
        }
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        self.file.scan(self.newest_first(), from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        self.file.last(self.newest_first(), from, to)
    }
}

/// Entries of the file that a [`Writer`] keeps in memory.
const KEPT_MAX: usize = 8192;

/// What applies batches, one after the other, and remembers what it read. At most one of a store.
#[derive(Default)]
pub(crate) struct Writer {
    /// The file, as of a generation of the layers.
    file: Option<(FileTables, u64)>,
    /// The last request id in it: most new ones are beyond, and need not be looked for.
    last_request: Vec<u8>,
    /// What that file says of keys of which few are asked for by many commands.
    kept: RefCell<HashMap<Vec<u8>, Option<Vec<u8>>>>,
    /// Of tables that were asked for what is due in them: every command asks, and hardly ever is anything.
    starts: RefCell<BTreeMap<u8, Start>>,
    /// The table that every settlement walks, if it was read.
    prices: RefCell<Option<Kept>>,
}

/// A table of the file in memory.
enum Kept {
    Whole(Box<Layer>),
    /// It has more than [`KEPT_MAX`] entries.
    TooLarge,
}

/// Where a table starts.
struct Start {
    /// There is nothing below.
    from: Vec<u8>,
    /// The first key, if it was looked for since it changed.
    first: Option<Option<Vec<u8>>>,
}

impl Writer {
    /// Begins a batch.
    pub(crate) fn begin<'w>(&'w mut self, store: &Store, overlay: &'w Overlay) -> Result<StateTxn<'w>, RaftStoreError> {
        let batch = overlay.batch();
        let generation = batch.generation();
        if self.file.as_ref().is_none_or(|(_, of)| *of != generation) {
            let file = FileTables::open(store)?;
            let (from, to) = keys::whole(keys::REQUESTS);
            let last = file.last(std::iter::empty(), &from, &to)?;
            self.last_request = last.map_or(from.to_vec(), |(key, _)| key);
            self.file = Some((file, generation));
            self.kept.get_mut().clear();
            *self.prices.get_mut() = None;
        }
        let closed = || RaftStoreError::Stopped("the state's file is not open".into());
        let (file, _) = self.file.as_ref().ok_or_else(closed)?;
        Ok(StateTxn {
            file,
            last_request: &self.last_request,
            batch,
            kept: &self.kept,
            prices: &self.prices,
            starts: &self.starts,
        })
    }
}

/// A batch at work on the state.
pub(crate) struct StateTxn<'w> {
    file: &'w FileTables,
    last_request: &'w [u8],
    batch: Batch<'w>,
    kept: &'w RefCell<HashMap<Vec<u8>, Option<Vec<u8>>>>,
    prices: &'w RefCell<Option<Kept>>,
    starts: &'w RefCell<BTreeMap<u8, Start>>,
}

/// The table of single values.
const SINGLE: u8 = keys::HASH[0];

/// Whether a key is one of few that many commands ask for and seldom change.
fn asked_often(key: &[u8]) -> bool {
    matches!(
        key.first(),
        Some(&(keys::PRICES | keys::BUDGETS | keys::WINDOWS | SINGLE))
    )
}

impl StateTxn<'_> {
    /// Makes the batch visible, which ends with an entry.
    pub(crate) fn finish(self, applied: (u64, u64)) {
        self.batch.end(applied);
    }

    /// Reads the table of prices by their start, unless it is large.
    fn read_prices(&self) -> Result<Kept, TablesError> {
        let (from, to) = keys::whole(keys::PRICES_BY_START);
        let mut read = Layer::default();
        self.file.scan(std::iter::empty(), &from, &to, &mut |key, value| {
            read.set(key, Some(value));
            let more = read.keys() <= KEPT_MAX;
            Ok(if more {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            })
        })?;
        Ok(if read.keys() <= KEPT_MAX {
            Kept::Whole(Box::new(read))
        } else {
            Kept::TooLarge
        })
    }

    /// From where on a table is to be read if it is read from its start up to `to`; `None` if nothing is there.
    fn start_below(&self, table: u8, to: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let known = self.starts.borrow().get(&table).map(|start| {
            let first = start.first.clone();
            (start.from.clone(), first)
        });
        let (from, first) = match known {
            Some((from, Some(first))) => (from, first),
            known => {
                let (from, end) = keys::whole(table);
                let from = known.map_or(from.to_vec(), |(from, _)| from);
                let mut first = None;
                self.file.scan(self.batch.newest_first(), &from, &end, &mut |key, _| {
                    first = Some(key.to_vec());
                    Ok(ControlFlow::Break(()))
                })?;
                let from = first.clone().unwrap_or(from);
                let start = Start {
                    from: from.clone(),
                    first: Some(first.clone()),
                };
                self.starts.borrow_mut().insert(table, start);
                (from, first)
            }
        };
        Ok(first.is_some_and(|first| first.as_slice() < to).then_some(from))
    }

    fn set(&mut self, key: &[u8], value: Option<&[u8]>) {
        if let Some(start) = self
            .starts
            .borrow_mut()
            .get_mut(&key.first().copied().unwrap_or_default())
        {
            match &start.first {
                // What was first is gone: what is first now lies beyond it.
                Some(Some(first)) if value.is_none() && first == key => start.first = None,
                Some(first) if value.is_some() && first.as_ref().is_none_or(|first| key < first.as_slice()) => {
                    start.from = key.to_vec();
                    start.first = Some(Some(key.to_vec()));
                }
                None if value.is_some() && key < start.from.as_slice() => start.from = key.to_vec(),
                _ => {}
            }
        }
        self.batch.set(key, value);
    }
}

impl Tables for StateTxn<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        if let Some(known) = self.batch.get(key) {
            return Ok(known.map(<[u8]>::to_vec));
        }
        if key.first() == Some(&keys::REQUESTS) && key > self.last_request {
            return Ok(None);
        }
        if !asked_often(key) {
            return self.file.get(key);
        }
        if let Some(value) = self.kept.borrow().get(key) {
            return Ok(value.clone());
        }
        let value = self.file.get(key)?;
        let mut kept = self.kept.borrow_mut();
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(key.to_vec(), value.clone());
        Ok(value)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        if let &[table] = from
            && to <= keys::whole(table).1.as_slice()
        {
            return match self.start_below(table, to)? {
                Some(from) => self.file.scan(self.batch.newest_first(), &from, to, visit),
                None => Ok(()),
            };
        }
        self.file.scan(self.batch.newest_first(), from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        if from.first() == Some(&keys::PRICES_BY_START) && to.first() == from.first() {
            let mut prices = self.prices.borrow_mut();
            if prices.is_none() {
                *prices = Some(self.read_prices()?);
            }
            if let Some(Kept::Whole(file)) = &*prices {
                let layers = self.batch.newest_first().chain(std::iter::once(file.as_ref()));
                let mut known = Merged::of(layers.map(|layer| layer.range(from, to).rev()), true);
                let found = known.find_map(|(key, value)| Some((key.to_vec(), value?.to_vec())));
                return Ok(found);
            }
        }
        self.file.last(self.batch.newest_first(), from, to)
    }
}

impl TablesMut for StateTxn<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        self.set(key, Some(value));
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        self.set(key, None);
        Ok(())
    }
}

fn medium(error: StorageError) -> TablesError {
    // The kind must survive: a full disk has its own sentence.
    match RaftStoreError::from(error) {
        RaftStoreError::DiskFull => TablesError::Full,
        other => TablesError::Medium(other.to_string()),
    }
}
