//! What can be registered: memory of this host, or a file. Windows, pushes and exports reach bytes only through
//! [`Memory`], so a transport does not know which it is.
//!
//! Device memory has its place in [`MemoryKind`] and is refused with a typed error until there is a transport that can
//! reach it. Deliberately not here: `unsafe` (that is [`crate::memory`]) and caching (that is the kernel's page cache).

use crate::ranges::aligned;
use crate::{Region, SetupError};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Where registered bytes live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// A [`Region`] of this host's memory.
    Host,
    /// A [`FileMemory`].
    File,
    /// Memory of an accelerator. Reserved: [`Memory::device`] refuses it.
    Device,
}

/// Bytes that transfers can read and write. Cheap to clone; all clones are the same memory.
#[derive(Debug, Clone)]
pub enum Memory {
    /// This host's memory.
    Host(Arc<Region>),
    /// A file.
    File(Arc<FileMemory>),
}

impl Memory {
    /// Memory of an accelerator.
    ///
    /// # Errors
    /// Always [`SetupError::DeviceMemory`]: no transport of this build reaches device memory.
    pub fn device(ordinal: u32) -> Result<Self, SetupError> {
        Err(SetupError::DeviceMemory { ordinal })
    }

    /// Where the bytes live.
    pub fn kind(&self) -> MemoryKind {
        match self {
            Self::Host(_) => MemoryKind::Host,
            Self::File(_) => MemoryKind::File,
        }
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // memory is never empty
    pub fn len(&self) -> usize {
        match self {
            Self::Host(region) => region.len(),
            Self::File(file) => file.len(),
        }
    }

    /// The region, if it is one: transports that map memory can go past the copies.
    pub fn host(&self) -> Option<&Arc<Region>> {
        match self {
            Self::Host(region) => Some(region),
            Self::File(_) => None,
        }
    }

    /// Copies `source` to `offset`. False if it does not fit, or if the file cannot be written.
    #[must_use]
    pub fn copy_in(&self, offset: usize, source: &[u8]) -> bool {
        match self {
            Self::Host(region) => region.copy_in(offset, source),
            Self::File(file) => file.copy_in(offset, source),
        }
    }

    /// Copies from `offset` into `target`. False if the range is not inside, or if the file cannot be read; then
    /// `target` may be partly filled.
    #[must_use]
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) -> bool {
        match self {
            Self::Host(region) => region.copy_out(offset, target),
            Self::File(file) => file.copy_out(offset, target),
        }
    }

    /// Whether both are the same bytes.
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Host(one), Self::Host(two)) => Arc::ptr_eq(one, two),
            (Self::File(one), Self::File(two)) => Arc::ptr_eq(one, two),
            _ => false,
        }
    }
}

impl From<Arc<Region>> for Memory {
    fn from(region: Arc<Region>) -> Self {
        Self::Host(region)
    }
}

impl From<&Arc<Region>> for Memory {
    fn from(region: &Arc<Region>) -> Self {
        Self::Host(region.clone())
    }
}

impl From<Arc<FileMemory>> for Memory {
    fn from(file: Arc<FileMemory>) -> Self {
        Self::File(file)
    }
}

/// A file as memory, through `pread` and `pwrite`. Not mapped: a mapped file that somebody else truncates kills the
/// process, and every byte of a transfer is copied once anyway. Reads and writes usually meet the page cache; where
/// they meet a slow disk they hold up the transfers of their thread, so keep files on local disks.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    len: usize,
}

impl FileMemory {
    /// Opens or makes the file at `path` and gives it `bytes` bytes, a multiple of [`ALIGN`](crate::ALIGN). What it
    /// held stays.
    ///
    /// # Errors
    /// [`SetupError::RegionSize`] for zero or unaligned sizes, [`SetupError::FileMemory`] for what the system refuses.
    pub fn open(path: &Path, bytes: usize) -> Result<Arc<Self>, SetupError> {
        if bytes == 0 || !aligned(bytes) {
            return Err(SetupError::RegionSize { bytes });
        }
        let refused = |source| SetupError::FileMemory {
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(refused)?;
        file.set_len(bytes as u64).map_err(refused)?;
        Ok(Arc::new(Self { file, len: bytes }))
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // a file here is never empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }

    fn copy_in(&self, offset: usize, source: &[u8]) -> bool {
        self.inside(offset, source.len()) && logged("written", self.file.write_all_at(source, offset as u64))
    }

    fn copy_out(&self, offset: usize, target: &mut [u8]) -> bool {
        self.inside(offset, target.len()) && logged("read", self.file.read_exact_at(target, offset as u64))
    }

    fn inside(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }
}

fn logged(what: &str, result: std::io::Result<()>) -> bool {
    result
        .inspect_err(|error| tracing::error!(%error, "a file registered for transfers cannot be {what}"))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_bytes_and_its_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blocks");
        let file: Memory = FileMemory::open(&path, 4096).unwrap().into();
        assert_eq!((file.kind(), file.len()), (MemoryKind::File, 4096));
        assert!(file.copy_in(4000, &[7; 96]));
        assert!(!file.copy_in(4001, &[7; 96]));
        assert!(!file.copy_in(usize::MAX, &[7; 2]));
        let again: Memory = FileMemory::open(&path, 4096).unwrap().into();
        assert!(!again.same(&file));
        let mut back = [0; 96];
        assert!(again.copy_out(4000, &mut back));
        assert_eq!(back, [7; 96]);
        assert!(!again.copy_out(4001, &mut back));
    }

    #[test]
    fn a_truncated_file_is_an_error_not_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blocks");
        let file: Memory = FileMemory::open(&path, 4096).unwrap().into();
        File::options().write(true).open(&path).unwrap().set_len(8).unwrap();
        assert!(!file.copy_out(0, &mut [0; 64]));
    }

    #[test]
    fn what_cannot_be_registered_says_so() {
        assert!(matches!(
            Memory::device(0),
            Err(SetupError::DeviceMemory { ordinal: 0 })
        ));
        let missing = Path::new("/nonexistent-directory/file");
        assert!(matches!(
            FileMemory::open(missing, 64),
            Err(SetupError::FileMemory { .. })
        ));
        assert!(matches!(
            FileMemory::open(missing, 0),
            Err(SetupError::RegionSize { bytes: 0 })
        ));
    }
}
