//! The disk tier's files: a directory of segment files, each an array of slots, one record per slot.
//!
//! ```text
//! <dir>/lock          held by the worker that uses the directory
//! <dir>/seg-00000.kv  slots 0..n       slot = header (record.rs) + block, rounded up to SECTOR
//! <dir>/seg-00001.kv  slots n..2n      ...
//! ```
//!
//! A segment is allocated whole when its first slot is written: the budget is never exceeded, a slot never moves, and a
//! disk that is full says so before anything is torn. Which block is in which slot stands only in the headers: opening reads
//! them all, and there is no index that could disagree. A write replaces block, then header, without fsync:
//! a killed process loses nothing, since the system has the pages; a power cut may tear, and a torn record is found out by its
//! checksum when it is read, and wiped. Reads and writes of one slot never overlap, because the core fences them.
//!
//! Blocking; not here: which slot to use (the core), and whose threads do it ([`crate::io`]).

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baton_proto::block_hash::BlockHash;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::core::Read;
use crate::error::TierError;
use crate::memory::{Block, Pool};
use crate::record::{Entry, HEADER_BYTES, Shape};
use crate::shelf::Found;

/// How long a predecessor that is about to end is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// Slots begin at multiples of this, so that two never share what a disk writes at once.
const SECTOR: u64 = 512;
/// Size of a segment file, at least: large enough that there are few, small enough that a little use takes a little disk.
const SEGMENT_BYTES_MIN: u64 = 64 << 20;
/// Segments of a budget, at most: each is an open file.
const SEGMENTS_MAX: u64 = 64;

/// See the module.
#[derive(Debug)]
pub struct DiskTier {
    dir: PathBuf,
    shape: Shape,
    slot_bytes: u64,
    slots: u64,
    segment_slots: u64,
    segments: Vec<OnceLock<File>>,
    /// Taken to create a segment.
    creating: Mutex<()>,
    stamp: AtomicU64,
    /// Locked as long as it is open.
    _lock: File,
}

impl DiskTier {
    /// Opens or creates the directory, and finds what an earlier worker left there, oldest first. `budget` is in bytes. Blocks of other models or shapes count as free space.
    ///
    /// # Errors
    /// If the directory is not usable, in use, or the budget holds no block.
    pub fn open(dir: &Path, budget: u64, shape: Shape) -> Result<(Self, Vec<Found>), TierError> {
        let slot_bytes = (HEADER_BYTES as u64 + shape.block_bytes as u64).next_multiple_of(SECTOR);
        let slots = (budget / slot_bytes).min(u64::from(u32::MAX - 1));
        if slots == 0 {
            return Err(TierError::TooSmall {
                budget,
                block: slot_bytes,
            });
        }
        let segment_bytes = SEGMENT_BYTES_MIN.max(budget / SEGMENTS_MAX);
        let segment_slots = (segment_bytes / slot_bytes).clamp(1, slots);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TierError::Directory { path, source }
        };
        // What is in the blocks was in prompts: nobody else's business.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(failed(dir))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path);
        let lock = lock.map_err(failed(&lock_path))?;
        let begun = Instant::now();
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            if begun.elapsed() >= LOCK_WAIT {
                return Err(TierError::InUse { path: dir.to_owned() });
            }
            std::thread::sleep(LOCK_WAIT / 40);
        }
        let mut this = DiskTier {
            dir: dir.to_owned(),
            shape,
            slot_bytes,
            slots,
            segment_slots,
            segments: (0..slots.div_ceil(segment_slots)).map(|_| OnceLock::new()).collect(),
            creating: Mutex::new(()),
            stamp: AtomicU64::new(1),
            _lock: lock,
        };
        let found = this.scan().map_err(failed(dir))?;
        Ok((this, found))
    }

    /// Blocks that fit.
    pub fn slots(&self) -> usize {
        self.slots as usize
    }

    /// Reads the header of every slot there is; files beyond the budget go.
    fn scan(&mut self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let file_name = entry.file_name();
            let number = file_name
                .to_str()
                .and_then(|n| n.strip_prefix("seg-")?.strip_suffix(".kv")?.parse().ok());
            let Some(number) = number.filter(|_| entry.file_type().is_ok_and(|t| t.is_file())) else {
                continue;
            };
            let number: usize = number;
            let Some(segment) = self.segments.get(number) else {
                std::fs::remove_file(entry.path())?;
                continue;
            };
            let file = OpenOptions::new().read(true).write(true).open(entry.path())?;
            let len = self.segment_len(number);
            if file.metadata()?.len() != len {
                file.set_len(len)?;
            }
            let first = number as u64 * self.segment_slots;
            let mut header = [0; HEADER_BYTES];
            for slot in first..(first + self.segment_slots).min(self.slots) {
                file.read_exact_at(&mut header, (slot - first) * self.slot_bytes)?;
                if let Some(Entry { name, parent, stamp }) = self.shape.peek(&header) {
                    found.push((stamp, slot as u32, name, parent));
                }
            }
            let _ = segment.set(file);
        }
        found.sort_unstable();
        let last = found.last().map_or(0, |(stamp, ..)| *stamp);
        self.stamp = AtomicU64::new(last.saturating_add(1));
        let found = found.into_iter();
        Ok(found
            .map(|(_, slot, name, parent)| Found { slot, name, parent })
            .collect())
    }

    fn segment_len(&self, number: usize) -> u64 {
        let first = number as u64 * self.segment_slots;
        self.segment_slots.min(self.slots - first) * self.slot_bytes
    }

    /// The file of a slot and the offset in it; creates the file for a writer.
    fn place(&self, slot: u32, create: bool) -> io::Result<(&File, u64)> {
        let number = (u64::from(slot) / self.segment_slots) as usize;
        let offset = u64::from(slot) % self.segment_slots * self.slot_bytes;
        let segment = self.segments.get(number).filter(|_| u64::from(slot) < self.slots);
        let segment = segment.ok_or_else(|| io::Error::other("no such slot"))?;
        if create && segment.get().is_none() {
            let _creating = self.creating.lock().unwrap_or_else(PoisonError::into_inner);
            if segment.get().is_none() {
                let _ = segment.set(self.create(number)?);
            }
        }
        let file = segment.get().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok((file, offset))
    }

    fn create(&self, number: usize) -> io::Result<File> {
        let path = self.dir.join(format!("seg-{number:05}.kv"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&path)?;
        let len = self.segment_len(number);
        match fallocate(&file, FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(file),
            // A file system that cannot promise space: it is taken as it is written.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(len).map(|()| file),
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                Err(error.into())
            }
        }
    }

    /// Writes a block to a slot, with the short name of its parent; false if it is not there whole.
    pub fn write(&self, slot: u32, name: BlockHash, parent: u64, block: &[u8]) -> bool {
        let stamp = self.stamp.fetch_add(1, Ordering::Relaxed);
        let header = self.shape.header(Entry { name, parent, stamp }, block);
        let written = self.place(slot, true).and_then(|(file, offset)| {
            file.write_all_at(block, offset + HEADER_BYTES as u64)?;
            file.write_all_at(&header, offset)
        });
        if let Err(error) = &written {
            tracing::warn!(%error, dir = %self.dir.display(), "a KV block could not be written to disk");
        }
        written.is_ok() && block.len() == self.shape.block_bytes
    }

    /// Reads the block that must be in a slot. What is not it is wiped.
    pub fn read(&self, slot: u32, name: &BlockHash, pool: &Pool) -> Read<Block> {
        let mut header = [0; HEADER_BYTES];
        let mut outcome = Ok(());
        let mut sound = false;
        let block = pool.fill(|bytes| {
            outcome = self.place(slot, false).and_then(|(file, offset)| {
                file.read_exact_at(&mut header, offset)?;
                file.read_exact_at(bytes, offset + HEADER_BYTES as u64)
            });
            sound = outcome.is_ok() && self.shape.verify(name, &header, bytes);
            sound
        });
        match (block, outcome) {
            (Some(block), _) => Read::Found(block),
            (None, Err(error))
                if error.kind() != io::ErrorKind::UnexpectedEof && error.kind() != io::ErrorKind::NotFound =>
            {
                tracing::warn!(%error, dir = %self.dir.display(), "a KV block could not be read from disk");
                Read::Failed
            }
            // No buffer was to be had: nothing was read.
            (None, Ok(())) if header == [0; HEADER_BYTES] && pool.available() == 0 => Read::Failed,
            (None, _) => {
                tracing::warn!(slot, dir = %self.dir.display(), "a KV block on disk is not what it should be; removed");
                self.wipe(slot);
                Read::Broken
            }
        }
    }

    /// So that no later life takes the slot for a block.
    fn wipe(&self, slot: u32) {
        if let Ok((file, offset)) = self.place(slot, false) {
            let _ = file.write_all_at(&[0; HEADER_BYTES], offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        kv_digest: [4; 32],
        block_bytes: 1000,
    };
    /// Ten slots.
    const BUDGET: u64 = 10 * 1536;

    fn name(n: u8) -> BlockHash {
        [n; 16]
    }

    /// Every test block has this parent.
    const PARENT: u64 = 77;

    fn open(dir: &Path) -> (DiskTier, Vec<(u32, BlockHash)>) {
        let (disk, found) = DiskTier::open(dir, BUDGET, SHAPE).expect("opens");
        assert!(found.iter().all(|found| found.parent == PARENT));
        (disk, found.iter().map(|found| (found.slot, found.name)).collect())
    }

    fn bytes(read: Read<Block>) -> Option<Vec<u8>> {
        match read {
            Read::Found(block) => Some(block.as_ref().to_vec()),
            _ => None,
        }
    }

    #[test]
    fn survives_a_restart_in_order_of_age() {
        let dir = tempfile::tempdir().expect("a directory");
        let (disk, found) = open(dir.path());
        assert_eq!((disk.slots(), found), (10, Vec::new()));
        for (slot, n) in [(3, 1), (0, 2), (9, 3), (3, 4)] {
            assert!(disk.write(slot, name(n), PARENT, &[n; 1000]));
        }
        assert!(!disk.write(10, name(5), PARENT, &[5; 1000]), "beyond the budget");
        assert!(matches!(
            DiskTier::open(dir.path(), BUDGET, SHAPE),
            Err(TierError::InUse { .. })
        ));
        drop(disk);
        let (disk, found) = open(dir.path());
        assert_eq!(found, [(0, name(2)), (9, name(3)), (3, name(4))]);
        let pool = Pool::new(1000, 1);
        for (slot, named) in found {
            assert_eq!(bytes(disk.read(slot, &named, &pool)), Some(vec![named[0]; 1000]));
        }
        let used: u64 = std::fs::read_dir(dir.path())
            .expect("readable")
            .map(|e| e.expect("readable").metadata().expect("readable").len())
            .sum();
        assert!(used <= BUDGET, "{used}");
    }

    #[test]
    fn what_is_torn_flipped_cut_or_foreign_is_a_miss_and_is_removed() {
        type Damage = fn(&File);
        let damages: [(&str, Damage); 5] = [
            ("a flipped bit", |f| f.write_all_at(&[77], 1536 + 600).expect("writes")),
            ("a block that never came", |f| {
                f.write_all_at(&[0; 500], 1536 + 628).expect("writes")
            }),
            ("a header that never came", |f| {
                f.write_all_at(&[0; 128], 1536).expect("writes")
            }),
            ("another name", |f| f.write_all_at(&[3; 16], 1536 + 16).expect("writes")),
            ("a file cut short", |f| f.set_len(2000).expect("cuts")),
        ];
        for (what, damage) in damages {
            let dir = tempfile::tempdir().expect("a directory");
            let pool = Pool::new(1000, 2);
            let (disk, _) = open(dir.path());
            assert!(disk.write(0, name(1), PARENT, &[1; 1000]) && disk.write(1, name(2), PARENT, &[2; 1000]));
            let file = OpenOptions::new()
                .write(true)
                .open(dir.path().join("seg-00000.kv"))
                .expect("opens");
            damage(&file);
            assert!(matches!(disk.read(1, &name(2), &pool), Read::Broken), "{what}");
            assert_eq!(
                bytes(disk.read(0, &name(1), &pool)),
                Some(vec![1; 1000]),
                "{what}: the neighbour is well"
            );
            drop(disk);
            assert_eq!(open(dir.path()).1, [(0, name(1))], "{what}: it does not come back");
        }
    }

    #[test]
    fn another_model_or_budget_begins_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(open(dir.path()).0.write(4, name(1), PARENT, &[1; 1000]));
        let foreign = Shape {
            kv_digest: [5; 32],
            ..SHAPE
        };
        let (disk, found) = DiskTier::open(dir.path(), BUDGET, foreign).expect("opens");
        assert!(found.is_empty());
        let pool = Pool::new(1000, 1);
        assert!(matches!(disk.read(4, &name(1), &pool), Read::Broken));
        drop(disk);
        std::fs::write(dir.path().join("seg-00007.kv"), "left over").expect("writes");
        std::fs::write(dir.path().join("mine.txt"), "not ours").expect("writes");
        drop(DiskTier::open(dir.path(), 1536, SHAPE).expect("opens"));
        assert!(!dir.path().join("seg-00007.kv").exists() && dir.path().join("mine.txt").exists());
        assert!(matches!(
            DiskTier::open(dir.path(), 1535, SHAPE),
            Err(TierError::TooSmall { .. })
        ));
    }

    #[test]
    fn without_a_buffer_nothing_is_blamed_on_the_disk() {
        let dir = tempfile::tempdir().expect("a directory");
        let (disk, _) = open(dir.path());
        assert!(disk.write(2, name(1), PARENT, &[1; 1000]));
        assert!(matches!(disk.read(2, &name(1), &Pool::new(1000, 0)), Read::Failed));
        assert!(bytes(disk.read(2, &name(1), &Pool::new(1000, 1))).is_some());
    }
}
