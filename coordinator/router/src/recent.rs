//! Prompts that were placed a moment ago: their blocks will be cached where they were sent, but no event has said so yet.
//! Without this, a burst of requests with one prefix would scatter over every cold worker.
//!
//! A placement is remembered under the names of a few of its blocks, the 1st, 2nd, 4th, 8th and then every 16th: names are
//! chained, so one equal name means an equal prefix up to there. A prompt that shares more is underrated by less than 16
//! blocks until the events come. Entries expire, because a request can fail and a worker can lose events; memory is
//! bounded by forgetting the oldest.
//!
//! Not here: truth. These are guesses; the index is what workers have said.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// Entries remembered, about 60 bytes each with their overhead. At 8k-token prompts that is 3,500 placements.
const ENTRIES_MAX: usize = 1 << 17;
/// Workers remembered for one name: those placed last. A burst that was spread over more has warmed them by then.
const PLACES_MAX: usize = 4;
/// Spacing of remembered blocks beyond the first few.
const STRIDE: usize = 16;

/// Names are hashes already.
#[derive(Default)]
struct NameHasher(u64);

impl Hasher for NameHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, name: u64) {
        self.0 = name;
    }
}

#[derive(Clone, Copy, Default)]
struct Place<K> {
    worker: K,
    expires_ms: u64,
}

/// See the module. `K` names a worker's registration.
pub(crate) struct Recent<K> {
    by_name: HashMap<u64, [Place<K>; PLACES_MAX], BuildHasherDefault<NameHasher>>,
    /// Oldest first.
    order: VecDeque<(u64, u64)>,
}

/// Numbers of blocks, from 1, of which a prompt of `blocks` is remembered.
fn marks(blocks: usize) -> impl DoubleEndedIterator<Item = usize> {
    let early = [1, 2, 4, 8].into_iter().filter(move |mark| *mark <= blocks);
    early.chain((1..=blocks / STRIDE).map(|i| i * STRIDE))
}

impl<K: Copy + Default + PartialEq> Recent<K> {
    pub(crate) fn new() -> Self {
        Self {
            by_name: HashMap::default(),
            order: VecDeque::new(),
        }
    }

    /// A prompt with these blocks was sent to `worker`.
    pub(crate) fn placed(&mut self, worker: K, names: &[u64], now_ms: u64, expires_ms: u64) {
        self.expire(now_ms);
        for mark in marks(names.len()) {
            let name = names[mark - 1];
            let place = Place { worker, expires_ms };
            let places = self.by_name.entry(name).or_default();
            // Its own place, else an expired one, else that which expires first.
            let at = places
                .iter()
                .position(|place| place.worker == worker && place.expires_ms > 0);
            let at = at.or_else(|| (0..PLACES_MAX).min_by_key(|at| places[*at].expires_ms));
            if let Some(at) = at {
                places[at] = place;
            }
            self.order.push_back((expires_ms, name));
        }
        while self.order.len() > ENTRIES_MAX {
            self.forget_oldest();
        }
    }

    /// Leading blocks of `names` that will be cached where they were placed: the deepest mark of each worker, deepest
    /// first.
    pub(crate) fn look_up(&self, names: &[u64], now_ms: u64, mut found: impl FnMut(K, u32)) {
        if self.by_name.is_empty() {
            return;
        }
        // The first marks are those that most prompts with anything in common share.
        let shared = names.first().is_some_and(|first| self.by_name.contains_key(first));
        if !shared {
            return;
        }
        for mark in marks(names.len()).rev() {
            let Some(places) = self.by_name.get(&names[mark - 1]) else {
                continue;
            };
            for place in places.iter().filter(|place| place.expires_ms > now_ms) {
                found(place.worker, mark as u32);
            }
        }
    }

    /// Entries.
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    fn expire(&mut self, now_ms: u64) {
        while self.order.front().is_some_and(|(expires_ms, _)| *expires_ms <= now_ms) {
            self.forget_oldest();
        }
    }

    /// Forgets the oldest entry, and the name with it unless a later entry still needs it.
    fn forget_oldest(&mut self) {
        let Some((expires_ms, name)) = self.order.pop_front() else {
            return;
        };
        if let Some(places) = self.by_name.get(&name)
            && places.iter().all(|place| place.expires_ms <= expires_ms)
        {
            self.by_name.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(recent: &Recent<u32>, names: &[u64], now_ms: u64) -> Vec<(u32, u32)> {
        let mut all: Vec<(u32, u32)> = Vec::new();
        recent.look_up(names, now_ms, |worker, depth| {
            if !all.iter().any(|(w, _)| *w == worker) {
                all.push((worker, depth));
            }
        });
        all
    }

    #[test]
    fn the_deepest_shared_mark_of_each_worker_until_it_expires() {
        let mut recent = Recent::new();
        let prompt: Vec<u64> = (1..=100).collect();
        let mut fork = prompt.clone();
        fork[40..].iter_mut().for_each(|name| *name += 1000);
        recent.placed(1, &prompt, 0, 1000);
        recent.placed(2, &fork, 0, 500);
        assert_eq!(look_up(&recent, &prompt, 10), [(1, 96), (2, 32)]);
        assert_eq!(look_up(&recent, &prompt[..7], 10), [(1, 4), (2, 4)]);
        assert_eq!(look_up(&recent, &fork, 500), [(1, 32)]);
        assert_eq!(look_up(&recent, &[7, 8, 9], 10), []);
        recent.placed(3, &[500], 1000, 1001);
        assert_eq!(look_up(&recent, &prompt, 1000), []);
        assert_eq!((recent.len(), recent.by_name.len()), (1, 1));
    }

    #[test]
    fn a_name_lives_as_long_as_its_last_entry_and_memory_is_bounded() {
        let mut recent = Recent::new();
        recent.placed(1, &[1], 0, 100);
        recent.placed(1, &[1], 0, 900);
        recent.placed(9, &[2], 200, 300);
        assert_eq!(look_up(&recent, &[1], 200), [(1, 1)]);
        for i in 0..2 * ENTRIES_MAX as u64 {
            recent.placed(1, &[i + 10], 200, 10_000);
        }
        assert!(recent.len() <= ENTRIES_MAX && recent.by_name.len() <= ENTRIES_MAX);
    }
}
