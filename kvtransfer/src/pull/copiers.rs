//! The threads that copy: few, because copying is bound by memory, and borrowed from the runtime's blocking pool while
//! there is something to copy.
//!
//! One push is copied by one thread at a time, in order; so a second thread joins only when two pushes have work, and
//! pushes take turns batch by batch.

use super::landing::Landing;
use crate::window_table::lock;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;

/// Most threads. Two nearly double what one reaches between cold buffers; more belong to whoever computes.
const THREADS_MAX: usize = 2;

/// The copying threads of one agent.
pub(crate) struct Copiers {
    work: Mutex<Work>,
    threads_max: usize,
    runtime: Handle,
}

#[derive(Default)]
struct Work {
    /// Pushes with something to copy; their number is limited by the links.
    ready: VecDeque<Arc<Landing>>,
    threads: usize,
}

impl Copiers {
    pub(crate) fn new(runtime: Handle) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            work: Mutex::default(),
            threads_max: cores.clamp(1, THREADS_MAX),
            runtime,
        }
    }

    /// Has the batches of `landing` copied, starting a thread if there may be another. The caller has seen to it that
    /// `landing` is submitted once at a time.
    pub(crate) fn submit(self: &Arc<Self>, landing: Arc<Landing>) {
        let mut work = lock(&self.work);
        work.ready.push_back(landing);
        if work.threads < self.threads_max {
            work.threads += 1;
            let copiers = self.clone();
            // On a runtime that stops this is dropped, and with it everything that waits.
            drop(self.runtime.spawn_blocking(move || copiers.run()));
        }
    }

    fn run(&self) {
        loop {
            let landing = {
                let mut work = lock(&self.work);
                let Some(landing) = work.ready.pop_front() else {
                    work.threads -= 1;
                    return;
                };
                landing
            };
            if landing.copy_next() {
                lock(&self.work).ready.push_back(landing);
            }
        }
    }
}
