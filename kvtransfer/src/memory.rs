//! Registered memory: one page-aligned, zeroed mapping that compute and transports share.
//!
//! On Linux it is a memory file (memfd), so that another process of the same host can be given a descriptor and read
//! the bytes where they are. The file is sealed against changing its size: a peer that maps it can rely on every page
//! being there. The descriptor that is given away can only be read from. Where the system gives no such file the
//! region is plain anonymous memory, and only shared memory is not to be had.
//!
//! With [`crate::copy`] and the mapping of a peer's region this is where `unsafe` lives. The rule that makes the rest
//! safe:
//!
//! * [`Region::copy_in`] and [`Region::copy_out`] (what transports use) touch memory only through [`crate::copy`], which
//!   is as good as relaxed atomic bytes. Two of them racing can tear data, never break the program, so both are safe
//!   functions.
//! * [`Region::slice`] and [`Region::slice_mut`] (what compute uses) hand out plain references, so their caller
//!   promises, by `unsafe`, that it owns the bytes meanwhile: no open window covers them, no push has yet to read
//!   them. Which block belongs to whom is the block manager's knowledge, not this crate's.
//!
//! Ordering between threads comes from outside: a push's queue lock and a window's fence lock order every copy before
//! the notification that makes others look at the bytes; between processes the socket that carries the descriptors
//! does. Deliberately not here: allocation of blocks, NUMA placement, device memory.

use crate::{SetupError, copy};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::watch;

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
    /// Tells this region from all others of the process, past ones included.
    id: u64,
    /// The memory file, to be read from only; `None` if the mapping is anonymous.
    file: Option<OwnedFd>,
    /// Closed by dropping it with the region.
    life: watch::Sender<()>,
}

// SAFETY: the mapping belongs to this value alone, is freed only in Drop, and is reached either by racing copies
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
        let (base, file) = match shared(mapped) {
            Some((base, file)) => (base, Some(file)),
            None => {
                // SAFETY: a fresh private mapping at an address of the kernel's choosing overlaps nothing in this program.
                let base = unsafe {
                    mmap_anonymous(
                        std::ptr::null_mut(),
                        mapped,
                        ProtFlags::READ | ProtFlags::WRITE,
                        MapFlags::PRIVATE,
                    )
                };
                (base.map_err(refused)?, None)
            }
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| refused(rustix::io::Errno::NOMEM))?;
        // Huge pages spare compute most of its TLB misses; a kernel without them still works.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping just made, and the advice does not change its contents.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), mapped, rustix::mm::Advice::LinuxHugepage) };
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Ok(Arc::new(Self {
            base,
            len: bytes,
            mapped,
            id: NEXT_ID.fetch_add(1, Relaxed),
            file,
            life: watch::Sender::new(()),
        }))
    }

    /// Tells this region from all others of the process, past ones included.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The memory file to hand to a peer, which can read it and no more; `None` if this region has none.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Resolves once the region is freed. Does not keep it.
    pub(crate) fn freed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut life = self.life.subscribe();
        async move { while life.changed().await.is_ok() {} }
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

    /// Where `len` bytes at `offset` are, for a racing copy; `None` if they are not inside the region.
    pub(crate) fn place(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: inside the mapping, or one past its end.
        (end <= self.len).then(|| unsafe { self.base.as_ptr().add(offset) })
    }

    /// Copies `source` to `offset`. False, and nothing copied, if it does not fit the region.
    #[must_use]
    pub fn copy_in(&self, offset: usize, source: &[u8]) -> bool {
        let Some(target) = self.place(offset, source.len()) else {
            return false;
        };
        // SAFETY: the target is inside the mapping, which is writable and lives as long as `self`; plain references to
        // the same bytes are excluded by the contracts of slice and slice_mut.
        unsafe { copy::streaming(target, source.as_ptr(), source.len()) };
        true
    }

    /// Copies from `offset` into `target`. False, and nothing copied, if the range is not inside the region.
    #[must_use]
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) -> bool {
        let Some(source) = self.place(offset, target.len()) else {
            return false;
        };
        // SAFETY: as in copy_in, the other way round; `target` is borrowed exclusively.
        unsafe { copy::cached(target.as_mut_ptr(), source, target.len()) };
        true
    }

    fn assert_inside(&self, range: &Range<usize>) {
        assert!(
            self.contains(range),
            "range {range:?} is not inside a region of {} bytes",
            self.len
        );
    }
}

/// A sealed memory file of `mapped` bytes, mapped, and a descriptor of it that can only be read from. No memory is
/// taken before it is touched.
#[cfg(target_os = "linux")]
fn shared(mapped: usize) -> Option<(*mut std::ffi::c_void, OwnedFd)> {
    use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open};
    use rustix::io::Errno;
    use std::os::fd::AsRawFd;

    // Closed on exec, so that children do not inherit it.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match memfd_create("baton-kv", flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the flag.
        Err(Errno::INVAL) => memfd_create("baton-kv", flags),
        other => other,
    }
    .ok()?;
    ftruncate(&file, mapped as u64).ok()?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).ok()?;
    // Another open file of the same memory, with lesser rights.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let readable = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    // SAFETY: a fresh mapping at an address of the kernel's choosing overlaps nothing in this program; the file is new,
    // and only this process can write it.
    let base = unsafe {
        mmap(
            std::ptr::null_mut(),
            mapped,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &file,
            0,
        )
    }
    .ok()?;
    Some((base, readable))
}

#[cfg(not(target_os = "linux"))]
fn shared(_mapped: usize) -> Option<(*mut std::ffi::c_void, OwnedFd)> {
    None
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

    /// What a peer is given can neither write nor be shrunk, and nothing is allocated before it is touched.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_file_is_sealed_readable_only_and_sparse() {
        use rustix::fs::{SealFlags, fcntl_get_seals, fstat, ftruncate};
        let region = Region::new(64 << 20).unwrap();
        let file = region.file().expect("linux has memory files");
        let seals = fcntl_get_seals(file).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
        assert!(rustix::io::write(file, b"x").is_err() && ftruncate(file, 0).is_err());
        assert_eq!(
            fstat(file).unwrap().st_blocks,
            0,
            "memory was taken before it was touched"
        );
        assert!(region.copy_in(0, &[1; 8]));
        let blocks = fstat(file).unwrap().st_blocks;
        assert!(blocks > 0 && blocks < (64 << 20) / 512, "{blocks} blocks of 512 bytes");
        let flags = rustix::io::fcntl_getfd(file).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[tokio::test]
    async fn its_end_is_noticed() {
        let region = Region::new(64).unwrap();
        let freed = region.freed();
        drop(region);
        freed.await;
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
