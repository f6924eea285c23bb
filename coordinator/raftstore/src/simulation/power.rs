//! A member's power: goes off at any of the points at which it touches the world. And the random numbers of a seed.

use std::sync::{Arc, Mutex};

/// Where a member can lose its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Point {
    Write,
    Resize,
    Sync,
    Send,
    Reply,
    Chunk,
}

impl Point {
    pub(super) const ALL: [Self; 6] = [
        Self::Write,
        Self::Resize,
        Self::Sync,
        Self::Send,
        Self::Reply,
        Self::Chunk,
    ];
}

#[derive(Debug, Default)]
struct Inner {
    off: bool,
    at: Option<Point>,
    left: Option<u64>,
}

/// The switch. Clones are of one member's life.
#[derive(Debug, Clone, Default)]
pub(super) struct Power(Arc<Mutex<Inner>>);

impl Power {
    /// Goes off at the point after so many others.
    pub(super) fn fail_after(&self, points: u64) {
        self.0.lock().unwrap().left = Some(points);
    }

    pub(super) fn cut(&self) {
        self.0.lock().unwrap().off = true;
    }

    pub(super) fn off(&self) -> bool {
        self.0.lock().unwrap().off
    }

    /// Where it went off by itself.
    pub(super) fn went_off_at(&self) -> Option<Point> {
        self.0.lock().unwrap().at
    }

    /// The member is about to do something: true if it can.
    pub(super) fn point(&self, point: Point) -> bool {
        let mut inner = self.0.lock().unwrap();
        if !inner.off
            && let Some(left) = &mut inner.left
        {
            if *left == 0 {
                inner.off = true;
                inner.at = Some(point);
            } else {
                *left -= 1;
            }
        }
        !inner.off
    }
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From `from` up to, and without, `to`.
    pub(super) fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from).max(1)
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let at = self.range(0, of.len() as u64) as usize;
        of.get(at).copied()
    }
}
