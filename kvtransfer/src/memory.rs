//! Registered memory: one page-aligned, zeroed, anonymous mapping that compute and transports share.
//!
//! This is the only file of the crate with `unsafe`. The rule that makes the rest safe:
//!
//! * [`Region::copy_in`] and [`Region::copy_out`] (what transports use) touch memory only through relaxed atomic words
//!   of [`ALIGN`] bytes. Two of them racing can tear data, never break the program, so both are safe functions.
//! * [`Region::slice`] and [`Region::slice_mut`] (what compute uses) hand out plain references, so their caller
//!   promises, by `unsafe`, that it owns the bytes meanwhile: no open window covers them, no push has yet to read
//!   them. Which block belongs to whom is the block manager's knowledge, not this crate's.
//! * Windows and pushes take only ranges whose ends are multiples of [`ALIGN`], so that the read-modify-write of a word
//!   at the ragged edge of a network chunk never reaches into bytes that somebody else owns.
//!
//! Ordering between threads comes from outside: a push's queue lock and a window's fence lock order every copy before
//! the notification that makes others look at the bytes. Deliberately not here: allocation of blocks, NUMA placement,
//! device memory.

use crate::SetupError;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Granularity of transfers in bytes: ends of ranges and offsets are multiples of it. Every K or V slot of an even
/// number of f32 values, or of four half-precision ones, is such a multiple.
pub const ALIGN: usize = 8;

/// Zeroed memory that KV blocks live in. Freed when the last [`Arc`] goes; windows and pushes hold one each.
pub struct Region {
    base: NonNull<u8>,
    /// Usable bytes.
    len: usize,
    /// Mapped bytes: `len` rounded up to whole pages.
    mapped: usize,
}

// SAFETY: the mapping belongs to this value alone, is freed only in Drop, and is reached either through atomic words
// or through the unsafe methods, whose callers promise exclusive (or shared read-only) ownership of their range.
unsafe impl Send for Region {}
// SAFETY: as above; no method relies on being called from one thread only.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes` zeroed bytes. Physical memory is taken page by page on first touch.
    ///
    /// # Errors
    /// [`SetupError::RegionSize`] for zero or more than the address space, [`SetupError::RegionMemory`] if the system
    /// refuses.
    pub fn new(bytes: usize) -> Result<Arc<Self>, SetupError> {
        let page = rustix::param::page_size();
        let mapped = bytes
            .checked_next_multiple_of(page)
            .filter(|&mapped| isize::try_from(mapped).is_ok());
        let Some(mapped) = mapped.filter(|&mapped| mapped > 0) else {
            return Err(SetupError::RegionSize { bytes });
        };
        let refused = |source: rustix::io::Errno| SetupError::RegionMemory {
            bytes,
            source: source.into(),
        };
        // SAFETY: a fresh private mapping at an address of the kernel's choosing overlaps nothing in this program.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(refused)?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| refused(rustix::io::Errno::NOMEM))?;
        // Huge pages spare compute most of its TLB misses; a kernel without them still works.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping just made, and the advice does not change its contents.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), mapped, rustix::mm::Advice::LinuxHugepage) };
        Ok(Arc::new(Self {
            base,
            len: bytes,
            mapped,
        }))
    }

    /// Usable bytes.
    #[allow(clippy::len_without_is_empty)] // a region is never empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it is mapped in this process, for libraries that are told addresses.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// The bytes of `range`, for compute.
    ///
    /// # Safety
    /// While the slice lives nobody writes the range: no [`Region::slice_mut`] overlaps it, no open window covers any
    /// of it, and no [`Region::copy_in`] goes there.
    ///
    /// # Panics
    /// If the range is not inside the region, like slicing does.
    #[inline]
    pub unsafe fn slice(&self, range: Range<usize>) -> &[u8] {
        self.assert_inside(&range);
        // SAFETY: inside the mapping, initialised (zeroed by the kernel); no writers meanwhile by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(range.start), range.len()) }
    }

    /// The bytes of `range`, mutable, for compute.
    ///
    /// # Safety
    /// While the slice lives nobody else reads or writes the range: no other slice overlaps it, no open window covers
    /// any of it, and no push has been given any of it that it has not yet been acknowledged or dropped for.
    ///
    /// # Panics
    /// If the range is not inside the region, like slicing does.
    #[inline]
    #[allow(clippy::mut_from_ref)] // the point of the type: disjoint ranges are handed out by their owner
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [u8] {
        self.assert_inside(&range);
        // SAFETY: inside the mapping, initialised; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(range.start), range.len()) }
    }

    /// Whether `range` is a proper range inside the region.
    pub fn contains(&self, range: &Range<usize>) -> bool {
        range.start <= range.end && range.end <= self.len
    }

    /// Copies `source` to `offset`. False, and nothing copied, if it does not fit the region.
    #[must_use]
    pub fn copy_in(&self, offset: usize, source: &[u8]) -> bool {
        let Some(end) = offset.checked_add(source.len()).filter(|&end| end <= self.len) else {
            return false;
        };
        // Up to the first word boundary, whole words, and the rest.
        let head = (offset.next_multiple_of(ALIGN) - offset).min(source.len());
        let (edge, body) = source.split_at(head);
        self.merge(offset, edge);
        let (whole, rest) = body.as_chunks::<ALIGN>();
        for (word, bytes) in self.words((offset + head) / ALIGN, whole.len()).iter().zip(whole) {
            word.store(u64::from_ne_bytes(*bytes), Relaxed);
        }
        self.merge(end - rest.len(), rest);
        true
    }

    /// Copies from `offset` into `target`. False, and nothing copied, if the range is not inside the region.
    #[must_use]
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) -> bool {
        let Some(end) = offset.checked_add(target.len()).filter(|&end| end <= self.len) else {
            return false;
        };
        let head = (offset.next_multiple_of(ALIGN) - offset).min(target.len());
        let (edge, body) = target.split_at_mut(head);
        self.extract(offset, edge);
        let (whole, rest) = body.as_chunks_mut::<ALIGN>();
        for (word, bytes) in self.words((offset + head) / ALIGN, whole.len()).iter().zip(whole) {
            *bytes = word.load(Relaxed).to_ne_bytes();
        }
        self.extract(end - rest.len(), rest);
        true
    }

    fn assert_inside(&self, range: &Range<usize>) {
        assert!(
            self.contains(range),
            "range {range:?} is not inside a region of {} bytes",
            self.len
        );
    }

    /// `count` words from word `first`. The mapping is a whole number of pages, so the last, partial word of a region
    /// with an odd length is mapped too.
    fn words(&self, first: usize, count: usize) -> &[AtomicU64] {
        assert!(first + count <= self.mapped / ALIGN);
        // SAFETY: inside the mapping (asserted), aligned (the base is page-aligned), initialised; plain references to
        // the same bytes are excluded by the contracts of slice and slice_mut.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast::<AtomicU64>().add(first), count) }
    }

    /// Writes fewer than [`ALIGN`] bytes that lie within one word, leaving the word's other bytes alone.
    fn merge(&self, offset: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let start = offset % ALIGN;
        let mut update = |word: u64| {
            let mut image = word.to_ne_bytes();
            image[start..start + bytes.len()].copy_from_slice(bytes);
            Some(u64::from_ne_bytes(image))
        };
        for word in self.words(offset / ALIGN, 1) {
            // The closure always returns Some, so this cannot fail.
            let _ = word.fetch_update(Relaxed, Relaxed, &mut update);
        }
    }

    /// Reads fewer than [`ALIGN`] bytes that lie within one word.
    fn extract(&self, offset: usize, target: &mut [u8]) {
        if target.is_empty() {
            return;
        }
        let start = offset % ALIGN;
        for word in self.words(offset / ALIGN, 1) {
            target.copy_from_slice(&word.load(Relaxed).to_ne_bytes()[start..start + target.len()]);
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once; every reference into it borrows this value.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.mapped) };
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn starts_zeroed_and_page_aligned() {
        let region = Region::new(10_001).unwrap();
        assert_eq!(region.len(), 10_001);
        // SAFETY: nobody else knows the region.
        let all = unsafe { region.slice(0..10_001) };
        assert!(all.iter().all(|&byte| byte == 0));
        assert_eq!(all.as_ptr() as usize % rustix::param::page_size(), 0);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(matches!(Region::new(0), Err(SetupError::RegionSize { .. })));
        assert!(matches!(Region::new(usize::MAX), Err(SetupError::RegionSize { .. })));
        assert!(matches!(
            Region::new(isize::MAX as usize - 8191),
            Err(SetupError::RegionMemory { .. })
        ));
    }

    proptest! {
        #[test]
        fn copies_are_exact_and_bounded(
            len in 1usize..300,
            writes in prop::collection::vec((0usize..320, prop::collection::vec(any::<u8>(), 0..64)), 0..20),
        ) {
            let region = Region::new(len).unwrap();
            let mut model = vec![0u8; len];
            for (offset, bytes) in writes {
                let fits = offset + bytes.len() <= len;
                prop_assert_eq!(region.copy_in(offset, &bytes), fits);
                if fits {
                    model[offset..offset + bytes.len()].copy_from_slice(&bytes);
                }
                let mut back = vec![0u8; bytes.len()];
                prop_assert_eq!(region.copy_out(offset, &mut back), fits);
                if fits {
                    prop_assert_eq!(back, bytes);
                }
            }
            let mut all = vec![0u8; len];
            prop_assert!(region.copy_out(0, &mut all));
            prop_assert_eq!(all, model);
        }
    }

    #[test]
    fn overflowing_offsets_do_not_fit() {
        let region = Region::new(64).unwrap();
        assert!(!region.copy_in(usize::MAX, &[1, 2]));
        assert!(!region.copy_out(usize::MAX - 1, &mut [0; 8]));
    }
}
