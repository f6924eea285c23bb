//! Replays sequences of launches that come again. A decode step of a bucket has the same launches as the one before, to
//! the byte (inputs are in device memory, at the same addresses), so what is captured is found by comparing; nothing has
//! to be declared, and what does not come again is never captured.

use crate::driver::{DeviceError, Driver, GraphId, Launch};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Graphs kept; the one not used for longest goes. More than there are buckets.
const GRAPHS_MAX: usize = 48;
/// Sequences seen once that are remembered.
const SEEN_MAX: usize = 64;

struct Captured {
    hash: u64,
    launches: Vec<Launch>,
    graph: GraphId,
    used: u64,
}

/// See the module.
#[derive(Default)]
pub struct Graphs {
    captured: Vec<Captured>,
    /// Hashes of sequences seen once, oldest first.
    seen: Vec<u64>,
    clock: u64,
    replayed: u64,
}

impl Graphs {
    /// Runs the launches: as a graph if they were seen before, one by one otherwise.
    ///
    /// # Errors
    /// The driver's.
    pub fn run<D: Driver>(&mut self, driver: &mut D, launches: &[Launch]) -> Result<(), DeviceError> {
        let mut hasher = DefaultHasher::new();
        launches.hash(&mut hasher);
        let hash = hasher.finish();
        self.clock += 1;
        let clock = self.clock;
        if let Some(found) = self
            .captured
            .iter_mut()
            .find(|c| c.hash == hash && c.launches == launches)
        {
            found.used = clock;
            self.replayed += 1;
            return driver.replay(found.graph);
        }
        let Some(at) = self.seen.iter().position(|seen| *seen == hash) else {
            if self.seen.len() == SEEN_MAX {
                self.seen.remove(0);
            }
            self.seen.push(hash);
            return launches.iter().try_for_each(|launch| driver.launch(launch));
        };
        self.seen.remove(at);
        if self.captured.len() == GRAPHS_MAX
            && let Some(oldest) = (0..GRAPHS_MAX).min_by_key(|i| self.captured[*i].used)
        {
            driver.forget(self.captured.swap_remove(oldest).graph);
        }
        let graph = driver.capture(launches)?;
        self.captured.push(Captured {
            hash,
            launches: launches.to_vec(),
            graph,
            used: clock,
        });
        self.replayed += 1;
        driver.replay(graph)
    }

    /// Forgets all, as where the memory that they use moves.
    pub fn clear<D: Driver>(&mut self, driver: &mut D) {
        for captured in self.captured.drain(..) {
            driver.forget(captured.graph);
        }
        self.seen.clear();
    }

    /// Steps that ran as a graph.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }
}
