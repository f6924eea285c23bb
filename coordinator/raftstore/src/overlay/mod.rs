//! What was applied and is not in the state's file yet: layers in memory over it.
//!
//! ```text
//!                    one batch after the other
//!   newest   ┌─ layer ─┐◀── changed in place; a new one is begun if it is read or being flushed
//!            ├─ layer ─┤
//!            ├─ layer ─┤◀── being flushed: unchanged, and dropped once the file has it
//!   oldest   └─ layer ─┘
//!            state.redb       as of an earlier index
//! ```
//!
//! Applying writes a page of the file once for many batches instead of once for each, and the disk takes no part in it.
//!
//! Invariants:
//!
//! 1. A batch becomes visible at once, with its index: a reader sees all of it or nothing. Layers that a reader holds are not changed,
//!    so it sees one moment for as long as it likes, and nobody waits for it. Whoever begins to read waits for the batch that is being
//!    applied, some milliseconds at most ([`BATCH_ENTRIES_MAX`]). After a batch that failed there is nothing to read.
//! 2. Layers over the file are the state at the applied index, before, during and after a flush: the layers that are flushed
//!    are dropped only when the file has them, and seeing them over a file that has them already changes nothing.
//! 3. Bounded: [`FLUSH_BYTES`] and as much again while a flush is under way; then applying waits for it. There are at most [`LAYERS_MAX`]
//!    layers above those being flushed.
//!
//! Not here: what is written when ([`flush`]), and how layers and file are read as one (`tables`).

pub(crate) mod flush;
mod layer;
mod map;

pub(crate) use layer::{Layer, Merged};

use crate::RaftStoreError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of layers from which they are flushed. What a flush costs besides its keys (two fsyncs, the upper pages, and the map of free
/// pages) should be small against it; what it takes in memory, twice, should be small against a coordinator's.
pub(crate) const FLUSH_BYTES: usize = 32 << 20;
/// Layers above those that are being flushed. Each long reader costs one; reading looks into each.
const LAYERS_MAX: usize = 12;
/// Entries that are applied as one batch: 64 take less than a millisecond.
pub(crate) const BATCH_ENTRIES_MAX: usize = 64;
/// Keys of a layer that are taken into the one below at once; larger ones are left until there are too many.
const ABSORBED_KEYS_MAX: usize = 4096;

/// The layers of one member.
#[derive(Default)]
pub(crate) struct Overlay(Mutex<Stack>);

#[derive(Default)]
struct Stack {
    /// The oldest first.
    layers: Vec<Arc<Layer>>,
    /// How many of them are being flushed.
    flushing: usize,
    /// Index and term of the last entry in them, or in the file.
    applied: (u64, u64),
    /// Index of the last entry that is durably in the file.
    flushed: u64,
    /// A batch was begun and not ended.
    torn: bool,
    /// Raised whenever layers are dropped because the file has them, so that a writer reads the file anew.
    generation: u64,
}

/// Layers to read, and what they are of.
#[derive(Clone)]
pub(crate) struct Layers {
    pub(crate) layers: Vec<Arc<Layer>>,
    /// Index and term of the last entry in them.
    pub(crate) applied: (u64, u64),
}

/// A batch at work. Dropped before its [`end`](Self::end), the member has failed.
pub(crate) struct Batch<'o>(MutexGuard<'o, Stack>);

/// Layers that are to be written into the file.
pub(crate) struct Frozen {
    layers: Vec<Arc<Layer>>,
    applied: (u64, u64),
}

impl Overlay {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file is as of `applied`, and there is nothing above it.
    pub(crate) fn start(&self, applied: (u64, u64)) {
        let mut stack = self.stack();
        stack.generation += 1;
        let generation = stack.generation;
        *stack = Stack {
            applied,
            flushed: applied.0,
            generation,
            ..Stack::default()
        };
    }

    /// Replaces the file's contents by those of another moment, by `commit`, and drops all layers: readers see both or neither.
    pub(crate) fn replace(
        &self,
        applied: (u64, u64),
        commit: impl FnOnce() -> Result<(), RaftStoreError>,
    ) -> Result<(), RaftStoreError> {
        let mut stack = self.stack();
        commit()?;
        if !planted!(LayersOutliveSnapshot) {
            stack.layers.clear();
        }
        stack.flushing = 0;
        stack.applied = applied;
        stack.flushed = applied.0;
        stack.generation += 1;
        Ok(())
    }

    /// The layers, and what `open` finds in the file, of one moment.
    pub(crate) fn read<T>(
        &self,
        open: impl FnOnce() -> Result<T, RaftStoreError>,
    ) -> Result<(T, Layers), RaftStoreError> {
        let stack = self.stack();
        if stack.torn {
            return Err(RaftStoreError::Stopped("a command was applied in part".into()));
        }
        let file = open()?;
        let layers = Layers {
            layers: stack.layers.clone(),
            applied: stack.applied,
        };
        Ok((file, layers))
    }

    /// Begins a batch. Readers wait until it ends.
    pub(crate) fn batch(&self) -> Batch<'_> {
        let mut stack = self.stack();
        stack.torn = true;
        let flushing = stack.flushing;
        if stack.layers[flushing..].last_mut().and_then(Arc::get_mut).is_none() {
            // The first one above what is being flushed becomes as large as that; one above a reader's is soon taken into it.
            let first = stack.layers.len() == flushing;
            let below = stack.layers.last().filter(|_| first);
            let layer = below.map_or_else(Layer::default, |below| below.emptied());
            stack.layers.push(Arc::new(layer));
        }
        Batch(stack)
    }

    /// Another one with the same contents, whose changes nobody sees.
    #[cfg(test)]
    pub(crate) fn scratch(&self) -> Self {
        let stack = self.stack();
        Self(Mutex::new(Stack {
            layers: stack.layers.clone(),
            flushing: stack.layers.len(),
            applied: stack.applied,
            generation: stack.generation,
            ..Stack::default()
        }))
    }

    /// Bytes of layers that no flush is under way for.
    pub(crate) fn unflushed_bytes(&self) -> usize {
        let stack = self.stack();
        let own = &stack.layers[stack.flushing..];
        own.iter().map(|layer| layer.bytes()).sum()
    }

    /// Index of the last entry that is durably in the file.
    pub(crate) fn flushed(&self) -> u64 {
        self.stack().flushed
    }

    /// Takes all layers for a flush. At most one is under way.
    pub(crate) fn freeze(&self) -> Frozen {
        let mut stack = self.stack();
        stack.flushing = stack.layers.len();
        Frozen {
            layers: stack.layers.clone(),
            applied: stack.applied,
        }
    }

    /// The file has what was frozen.
    fn drop_flushed(&self, applied: (u64, u64)) {
        let dropped: Vec<_> = {
            let mut stack = self.stack();
            let flushing = std::mem::take(&mut stack.flushing);
            stack.flushed = applied.0;
            stack.generation += 1;
            stack.layers.drain(..flushing).collect()
        };
        // Outside of the lock: it takes a while.
        drop(dropped);
    }
}

impl Batch<'_> {
    /// The layers, the newest first.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = &Layer> {
        self.0.layers.iter().rev().map(Arc::as_ref)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.0.generation
    }

    /// What the newest layer that knows the key says of it.
    pub(crate) fn get(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        for layer in self.0.layers.iter().rev() {
            let known = layer.get(key);
            if known.is_some() {
                return known;
            }
        }
        None
    }

    pub(crate) fn set(&mut self, key: &[u8], value: Option<&[u8]>) {
        if let Some(top) = self.0.layers.last_mut() {
            // Nobody else has it: see `batch`.
            Arc::make_mut(top).set(key, value);
        }
    }

    /// The batch is whole, up to an entry.
    pub(crate) fn end(mut self, applied: (u64, u64)) {
        self.0.applied = applied;
        self.0.torn = false;
        self.0.fold();
    }
}

impl Stack {
    /// Takes layers that nobody reads any more into those below them, and bounds their number.
    fn fold(&mut self) {
        let flushing = self.flushing;
        for at in (flushing + 1..self.layers.len()).rev() {
            if self.layers[at].keys() > ABSORBED_KEYS_MAX || Arc::get_mut(&mut self.layers[at]).is_none() {
                continue;
            }
            let upper = self.layers.remove(at);
            match Arc::get_mut(&mut self.layers[at - 1]) {
                Some(lower) => lower.absorb(&upper),
                None => self.layers.insert(at, upper),
            }
        }
        if self.layers.len() - flushing > LAYERS_MAX {
            let size = |at: &usize| self.layers[*at].keys() + self.layers[at - 1].keys();
            if let Some(at) = (flushing + 1..self.layers.len()).min_by_key(size) {
                let mut both = Layer::clone(&self.layers[at - 1]);
                both.absorb(&self.layers[at]);
                self.layers[at - 1] = Arc::new(both);
                self.layers.remove(at);
            }
        }
    }
}
