//! What the ranks of one model say to each other, whatever carries it: shared memory on the CPU
//! ([`SharedMemory`](crate::SharedMemory)), NCCL between GPUs.
//!
//! # Contract
//!
//! - All ranks make the same calls in the same order, with buffers of the same sizes (a gather's may differ).
//! - A sum is taken in rank order, element by element: the same bits on all ranks, in every run, and whatever the other
//!   elements are (promise P1).
//! - No call waits for ever. When a rank aborts, or one does not come, the others' calls fail with
//!   [`ModelError::Rank`](crate::ModelError::Rank), now and from then on.

use crate::ops::OpResult;
use crate::shard::Shard;

/// One rank's end. `B` is where values lie: host memory, or a device's.
pub trait Communicator<B: ?Sized = [f32]>: Send {
    /// Which rank this is, of how many.
    fn shard(&self) -> Shard;
    /// Replaces `values` by their sum over all ranks.
    ///
    /// # Errors
    /// [`ModelError::Rank`](crate::ModelError::Rank), as every call here.
    fn all_reduce(&mut self, values: &mut B) -> OpResult;
    /// Shows rank 0 the `values` of every rank, in rank order. On other ranks `visit` is not called.
    ///
    /// # Errors
    /// See [`Communicator::all_reduce`].
    fn gather(&mut self, values: &B, visit: &mut dyn FnMut(usize, &B)) -> OpResult;
    /// Returns when all ranks have come here; what they wrote before is then visible to this one.
    ///
    /// # Errors
    /// See [`Communicator::all_reduce`].
    fn barrier(&mut self) -> OpResult;
    /// Makes every call of every rank fail, those already waiting included. The first reason given is kept.
    fn abort(&self, reason: &str);
}
