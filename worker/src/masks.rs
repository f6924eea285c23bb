//! Computes grammar masks beside the forward pass: a mask depends on the tokens before, so it can be there when the logits
//! are.
//!
//! One thread, started with the first grammar. What it has not reached when the logits are there, the sampler computes itself,
//! on all its threads; the state's lock sees to it that nobody does so twice. No mask depends on who computed it.

use baton_engine::{Shaping, StepBatch};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// See the module.
#[derive(Default)]
pub(crate) struct MaskThread {
    queue: Option<Sender<Arc<Shaping>>>,
}

impl MaskThread {
    /// Begins with the masks that this step will sample with. Never waits. At most a batch is queued: what is left of the
    /// step before is found done, or gone.
    pub(crate) fn prepare(&mut self, batch: &StepBatch) {
        for shaping in batch.seqs.iter().filter_map(|span| span.shaping.as_ref()) {
            if shaping.has_grammar() {
                let queue = self.queue.get_or_insert_with(start);
                // Without the thread the sampler computes them.
                let _ = queue.send(shaping.clone());
            }
        }
    }
}

fn start() -> Sender<Arc<Shaping>> {
    let (sender, receiver): (_, Receiver<Arc<Shaping>>) = channel();
    let run = move || receiver.iter().for_each(|shaping| shaping.prepare());
    if let Err(error) = std::thread::Builder::new().name("masks".into()).spawn(run) {
        tracing::warn!(%error, "no thread for grammar masks; they are computed when they are needed");
    }
    sender
}
