//! Descriptor lists: which pieces of one memory go to, or come from, which places of another.

use crate::ranges::Descriptor;
use std::ops::Range;

/// Pieces to move, in order; adjacent ones are merged. `local` is always this agent's memory, `remote` the peer's, in a
/// write as in a read. A list is plain data: it is checked against memory and windows when it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DescriptorList {
    pieces: Vec<Descriptor>,
}

impl DescriptorList {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// A list of one piece: `local` to or from the same number of bytes at `remote`.
    pub fn of(local: Range<usize>, remote: usize) -> Self {
        let mut list = Self::new();
        list.add(local, remote);
        list
    }

    /// Appends a piece. An empty range adds nothing.
    pub fn add(&mut self, local: Range<usize>, remote: usize) -> &mut Self {
        let piece = Descriptor {
            local: local.start,
            remote,
            len: local.len(),
        };
        if piece.len > 0 && !self.pieces.last_mut().is_some_and(|last| last.absorb(&piece)) {
            self.pieces.push(piece);
        }
        self
    }

    /// The pieces.
    pub fn pieces(&self) -> &[Descriptor] {
        &self.pieces
    }

    /// Number of pieces after merging.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes to move.
    pub fn bytes(&self) -> u64 {
        self.pieces
            .iter()
            .fold(0, |sum, piece| sum.saturating_add(piece.len as u64))
    }

    /// The local ranges, as a window takes them.
    pub fn local_ranges(&self) -> Vec<Range<usize>> {
        self.pieces
            .iter()
            .map(|piece| piece.local..piece.local.saturating_add(piece.len))
            .collect()
    }

    /// The same pieces as the peer sees them.
    pub(crate) fn reversed(&self) -> Vec<Descriptor> {
        let reverse = |piece: &Descriptor| Descriptor {
            local: piece.remote,
            remote: piece.local,
            len: piece.len,
        };
        self.pieces.iter().map(reverse).collect()
    }
}

impl Extend<(Range<usize>, usize)> for DescriptorList {
    fn extend<I: IntoIterator<Item = (Range<usize>, usize)>>(&mut self, pieces: I) {
        for (local, remote) in pieces {
            self.add(local, remote);
        }
    }
}

impl FromIterator<(Range<usize>, usize)> for DescriptorList {
    fn from_iter<I: IntoIterator<Item = (Range<usize>, usize)>>(pieces: I) -> Self {
        let mut list = Self::new();
        list.extend(pieces);
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_pieces_merge_and_empty_ones_vanish() {
        let list: DescriptorList = [(0..8, 64), (8..16, 72), (16..16, 80), (16..24, 96), (24..32, 88)]
            .into_iter()
            .collect();
        assert_eq!((list.len(), list.bytes()), (3, 32));
        assert_eq!(list.local_ranges(), [0..16, 16..24, 24..32]);
        assert_eq!(
            list.reversed()[1],
            Descriptor {
                local: 96,
                remote: 16,
                len: 8
            }
        );
        assert!(DescriptorList::of(5..5, 0).is_empty());
    }
}
