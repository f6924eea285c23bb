//! A peer's region, mapped to be read. Whether it is safe to map is decided here, and nothing is taken on trust.
//!
//! Reading a mapping of a file beyond the file's end kills the reader (SIGBUS). So only memory files are mapped that
//! are sealed against shrinking and at least as long as claimed, and none of huge pages from a reserved pool, which can
//! be missing pages in the middle. The bytes themselves may change at any time; [`crate::copy`] allows for that.

use crate::copy;
use crate::memory::Region;
use crate::storage::Memory;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ptr::NonNull;

/// File system of ordinary memory files (`TMPFS_MAGIC` of statfs(2)); those of reserved huge pages have another.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// The memory of a peer's region.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    /// Bytes that may be read.
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, is only read, through copies that allow for races, and is unmapped
// only in Drop.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`. The descriptor is not needed afterwards.
    ///
    /// # Errors
    /// A sentence for the peer.
    pub(crate) fn new(file: &OwnedFd, len: u64) -> Result<Self, String> {
        let system = |what: &str| {
            let what = what.to_owned();
            move |error: rustix::io::Errno| format!("cannot {what} the region: {error}")
        };
        let seals = fcntl_get_seals(file).map_err(|_| "the region is not a memory file")?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err("the region is not sealed against shrinking".into());
        }
        if fstatfs(file).map_err(system("examine"))?.f_type as i64 != TMPFS_MAGIC {
            return Err("the region is not made of ordinary pages".into());
        }
        // After the seals: from here on the file cannot become shorter.
        let stat = fstat(file).map_err(system("examine"))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || len == 0 || len > size {
            return Err(format!("the region has {size} bytes, not {len}"));
        }
        let len = usize::try_from(len).map_err(|_| "the region is larger than the address space")?;
        // SAFETY: a fresh mapping at an address of the kernel's choosing overlaps nothing in this program. Its bytes are
        // never referred to, only copied out.
        let base = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0) };
        let base = base.map_err(system("map"))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or("the region was mapped nowhere")?;
        Ok(Self { base, len })
    }

    /// Whether `len` bytes at `local` are inside the region.
    pub(crate) fn contains(&self, local: u64, len: u64) -> bool {
        local.checked_add(len).is_some_and(|end| end <= self.len as u64)
    }

    /// Copies `len` bytes at `local` to `offset` of `region`. False, and nothing copied, if either is out of bounds.
    pub(crate) fn copy_to(&self, local: u64, region: &Region, offset: usize, len: usize) -> bool {
        let Some(target) = region.place(offset, len).filter(|_| self.contains(local, len as u64)) else {
            return false;
        };
        // SAFETY: both ranges are inside their mappings (checked), which live as long as the two borrows. The source's
        // pages are there: the file is at least `self.len` bytes long and cannot shrink. The target is reached by nobody
        // through plain references, by the contracts of Region::slice and slice_mut.
        unsafe { copy::streaming(target, self.base.as_ptr().add(local as usize), len) };
        true
    }
}

/// Ways that are not straight.
impl Mapping {
    /// [`Mapping::copy_to`] for memory that is not in this process, by way of a buffer.
    pub(crate) fn copy_through(&self, local: u64, memory: &Memory, offset: usize, len: usize) -> bool {
        let Ok(buffer) = Region::new(len) else { return false };
        let mut bytes = vec![0; len];
        self.copy_to(local, &buffer, 0, len) && buffer.copy_out(0, &mut bytes) && memory.copy_in(offset, &bytes)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once; copies out of it borrow this value.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn file(bytes: u64, seals: SealFlags) -> OwnedFd {
        let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    #[test]
    fn only_what_cannot_fault_is_mapped() {
        let sealed = file(8192, SealFlags::SHRINK);
        assert!(Mapping::new(&sealed, 8192).is_ok() && Mapping::new(&sealed, 5000).is_ok());
        let refused = |file: &OwnedFd, len: u64| Mapping::new(file, len).err().unwrap();
        assert!(refused(&sealed, 8193).contains("8192"));
        assert!(refused(&sealed, 0).contains("8192"));
        assert!(refused(&sealed, u64::MAX).contains("8192"));
        assert!(refused(&file(8192, SealFlags::empty()), 8192).contains("sealed"));
        assert!(refused(&file(8192, SealFlags::GROW), 8192).contains("sealed"));
        assert!(refused(&file(0, SealFlags::SHRINK), 4096).contains("0 bytes"));
        let on_disk = OwnedFd::from(tempfile::tempfile().unwrap());
        Mapping::new(&on_disk, 1)
            .err()
            .expect("a file that can be truncated is not mapped");
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        assert!(refused(&pipe, 1).contains("memory file"));
    }

    #[test]
    fn copies_stay_inside_both_ends() {
        let source = Region::new(8192).unwrap();
        assert!(source.copy_in(4096, &[7; 64]));
        let mapping = Mapping::new(&source.file().unwrap().try_clone_to_owned().unwrap(), 8192).unwrap();
        let target = Region::new(128).unwrap();
        assert!(mapping.copy_to(4096, &target, 64, 64));
        let mut landed = [0; 64];
        assert!(target.copy_out(64, &mut landed) && landed == [7; 64]);
        for (local, offset, len) in [(8192 - 32, 0, 64), (0, 72, 64), (u64::MAX, 0, 8), (0, usize::MAX, 8)] {
            assert!(!mapping.copy_to(local, &target, offset, len));
        }
    }
}
