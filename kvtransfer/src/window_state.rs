//! A window's life as a state machine: no locks, no tasks, no clock.
//!
//! ```text
//!             claim            finish
//!   Open ───────────► Receiving ─────► Completed(payload)
//!    │ fail / close       │ fail / close
//!    ▼                    ▼
//!  Failed(error) or Closed
//! ```
//!
//! Invariants: bytes land only in Receiving and only inside the ranges; Receiving is entered once; the three states on
//! the right and bottom are final. [`crate::window_table`] keeps each machine under one lock, and that lock is the
//! fence: once `close` or `fail` has returned, `land` can only refuse.

use crate::ranges::{RangeSet, aligned};
use crate::{Refusal, Region, WindowError};
use bytes::Bytes;
use std::sync::Arc;

/// What state a window is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waiting for its push.
    Open,
    /// Being written.
    Receiving,
    /// Every byte has landed; the finishing payload.
    Completed(Bytes),
    /// Given up for a reason other than the owner's.
    Failed(WindowError),
    /// Given up by its owner.
    Closed,
}

/// One window.
#[derive(Debug)]
pub(crate) struct WindowState {
    phase: Phase,
    region: Arc<Region>,
    ranges: RangeSet,
    bytes_max: u64,
    landed: u64,
    /// Bytes of writes begun, including those still on their way. Bounds the total before they arrive.
    promised: u64,
}

impl WindowState {
    pub(crate) fn new(region: Arc<Region>, ranges: RangeSet, bytes_max: u64) -> Self {
        Self {
            phase: Phase::Open,
            region,
            ranges,
            bytes_max,
            landed: 0,
            promised: 0,
        }
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    pub(crate) fn landed(&self) -> u64 {
        self.landed
    }

    /// Whether the window may still be written.
    pub(crate) fn live(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Receiving)
    }

    /// Bytes that this live window and another one over `ranges` of `region` would both own.
    pub(crate) fn conflict(&self, region: &Arc<Region>, ranges: &RangeSet) -> Option<std::ops::Range<usize>> {
        (self.live() && Arc::ptr_eq(&self.region, region))
            .then(|| self.ranges.intersection(ranges))
            .flatten()
    }

    /// A push names this window.
    pub(crate) fn claim(&mut self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Open => {
                self.phase = Phase::Receiving;
                Ok(())
            }
            Phase::Closed => Err(Refusal::WindowClosed),
            Phase::Receiving | Phase::Completed(_) | Phase::Failed(_) => Err(Refusal::WindowTaken),
        }
    }

    /// The push announces a write. Its start in the region, if all of it is allowed.
    pub(crate) fn admit(&mut self, offset: u64, len: u64) -> Result<usize, Refusal> {
        self.receiving()?;
        if len == 0 {
            return Err(Refusal::EmptyWrite { offset });
        }
        let out_of_range = Refusal::OutOfRange { offset, len };
        let start = usize::try_from(offset).map_err(|_| out_of_range)?;
        let length = usize::try_from(len).map_err(|_| out_of_range)?;
        let end = start.checked_add(length).ok_or(out_of_range)?;
        if !aligned(start) || !aligned(end) {
            return Err(Refusal::Misaligned { offset, len });
        }
        if !self.ranges.covers(&(start..end)) {
            return Err(out_of_range);
        }
        let promised = self.promised.saturating_add(len);
        if promised > self.bytes_max {
            return Err(Refusal::TooManyBytes { max: self.bytes_max });
        }
        self.promised = promised;
        Ok(start)
    }

    /// Bytes of an admitted write arrive. Checked again: the fence stands or falls here.
    pub(crate) fn land(&mut self, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        self.land_with(offset, bytes.len(), |region| region.copy_in(offset, bytes))
    }

    /// As [`WindowState::land`], for a transport that has the bytes elsewhere: `copy` puts `len` of them at `offset` of
    /// the region, and says whether it could.
    pub(crate) fn land_with(
        &mut self,
        offset: usize,
        len: usize,
        copy: impl FnOnce(&Region) -> bool,
    ) -> Result<(), Refusal> {
        self.receiving()?;
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| self.ranges.covers(&(offset..end)));
        if !inside || !copy(&self.region) {
            return Err(Refusal::OutOfRange {
                offset: offset as u64,
                len: len as u64,
            });
        }
        self.landed += len as u64;
        Ok(())
    }

    /// The push says it is complete. The bytes landed, to acknowledge.
    pub(crate) fn finish(&mut self, total: u64, payload: Bytes) -> Result<u64, Refusal> {
        self.receiving()?;
        if total != self.landed {
            return Err(Refusal::WrongTotal {
                claimed: total,
                landed: self.landed,
            });
        }
        self.phase = Phase::Completed(payload);
        Ok(self.landed)
    }

    /// Gives the window up for `error`. False if it was over already.
    pub(crate) fn fail(&mut self, error: WindowError) -> bool {
        let live = self.live();
        if live {
            self.phase = Phase::Failed(error);
        }
        live
    }

    /// The owner gives the window up. False if it was over already.
    pub(crate) fn close(&mut self) -> bool {
        let live = self.live();
        if live {
            self.phase = Phase::Closed;
        }
        live
    }

    fn receiving(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Receiving => Ok(()),
            _ => Err(Refusal::WindowClosed),
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant
mod tests {
    use super::*;
    use crate::AbortReason;
    use proptest::prelude::*;

    const LEN: usize = 256;

    fn window(bytes_max: u64) -> (Arc<Region>, WindowState) {
        let region = Region::new(LEN).unwrap();
        let ranges = RangeSet::new(vec![16..64, 128..160], LEN, 8).unwrap();
        (region.clone(), WindowState::new(region, ranges, bytes_max))
    }

    #[derive(Debug, Clone)]
    enum Op {
        Claim,
        Write { offset: u64, len: u64 },
        LandAt { offset: usize, len: usize },
        Finish { total: u64 },
        Fail,
        Close,
    }

    fn op() -> impl Strategy<Value = Op> {
        let offset = prop_oneof![
            0u64..260,
            Just(u64::MAX),
            Just(u64::MAX - 7),
            (0u64..33).prop_map(|at| at * 8)
        ];
        let len = prop_oneof![0u64..80, Just(u64::MAX), (0u64..8).prop_map(|words| words * 8)];
        prop_oneof![
            1 => Just(Op::Claim),
            8 => (offset, len).prop_map(|(offset, len)| Op::Write { offset, len }),
            2 => (0usize..300, 0usize..40).prop_map(|(offset, len)| Op::LandAt { offset, len }),
            1 => (0u64..100).prop_map(|total| Op::Finish { total }),
            1 => Just(Op::Fail),
            1 => Just(Op::Close),
        ]
    }

    proptest! {
        /// Whatever a peer does: no byte outside of the ranges changes, none at all outside of Receiving, the total
        /// bound holds for announced writes, and final states stay.
        #[test]
        fn no_byte_lands_where_it_must_not(ops in prop::collection::vec(op(), 0..60), bytes_max in 0u64..200) {
            let (region, mut window) = window(bytes_max);
            prop_assert!(window.claim().is_ok());
            let mut model = vec![0u8; LEN];
            let mut promised = 0u64;
            for (step, op) in ops.into_iter().enumerate() {
                let fill = step as u8 + 1;
                let before = window.phase().clone();
                let receiving = before == Phase::Receiving;
                match op {
                    Op::Claim => prop_assert!(window.claim().is_err()),
                    Op::Write { offset, len } => match window.admit(offset, len) {
                        Ok(start) => {
                            prop_assert!(receiving && len > 0);
                            promised += len;
                            prop_assert!(promised <= bytes_max);
                            let bytes = vec![fill; len as usize];
                            window.land(start, &bytes).unwrap();
                            model[start..start + bytes.len()].copy_from_slice(&bytes);
                        }
                        Err(refusal) => prop_assert!(receiving || refusal == Refusal::WindowClosed),
                    },
                    Op::LandAt { offset, len } => {
                        let bytes = vec![fill; len];
                        if window.land(offset, &bytes).is_ok() {
                            prop_assert!(receiving);
                            model[offset..offset + len].copy_from_slice(&bytes);
                        }
                    }
                    Op::Finish { total } => {
                        let landed = window.landed();
                        prop_assert_eq!(window.finish(total, Bytes::new()).is_ok(), receiving && total == landed);
                    }
                    Op::Fail => prop_assert_eq!(window.fail(WindowError::Aborted(AbortReason::Dropped)), receiving),
                    Op::Close => prop_assert_eq!(window.close(), receiving),
                }
                if !receiving {
                    prop_assert_eq!(window.phase(), &before);
                }
                let mut now = vec![0u8; LEN];
                prop_assert!(region.copy_out(0, &mut now));
                prop_assert_eq!(&now, &model);
                prop_assert!(now[..16].iter().chain(&now[64..128]).chain(&now[160..]).all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn each_misuse_has_its_refusal() {
        let (_, mut window) = window(48);
        assert_eq!(
            window.admit(16, 8),
            Err(Refusal::WindowClosed),
            "nothing lands before a push names it"
        );
        window.claim().unwrap();
        assert_eq!(window.claim(), Err(Refusal::WindowTaken));
        assert_eq!(window.admit(16, 0), Err(Refusal::EmptyWrite { offset: 16 }));
        assert!(matches!(window.admit(12, 8), Err(Refusal::Misaligned { .. })));
        assert!(matches!(window.admit(16, 12), Err(Refusal::Misaligned { .. })));
        assert!(matches!(window.admit(56, 16), Err(Refusal::OutOfRange { .. })));
        assert!(matches!(
            window.admit(u64::MAX - 7, 16),
            Err(Refusal::OutOfRange { .. })
        ));
        assert_eq!(window.admit(16, 48), Ok(16));
        assert_eq!(window.admit(16, 8), Err(Refusal::TooManyBytes { max: 48 }));
        assert_eq!(
            window.finish(48, Bytes::new()),
            Err(Refusal::WrongTotal { claimed: 48, landed: 0 })
        );
        assert!(window.close());
        assert_eq!(window.claim(), Err(Refusal::WindowClosed));
        assert_eq!(window.land(16, &[1]), Err(Refusal::WindowClosed));
    }

    #[test]
    fn only_live_windows_of_the_same_region_conflict() {
        let (region, mut one) = window(48);
        let overlapping = RangeSet::new(vec![56..72], LEN, 8).unwrap();
        let beside = RangeSet::new(vec![64..72], LEN, 8).unwrap();
        assert_eq!(one.conflict(&region, &overlapping), Some(56..64));
        assert_eq!(one.conflict(&region, &beside), None);
        assert_eq!(one.conflict(&Region::new(LEN).unwrap(), &overlapping), None);
        one.close();
        assert_eq!(one.conflict(&region, &overlapping), None);
    }
}
