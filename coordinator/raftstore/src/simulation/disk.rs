//! A disk that loses what was not synced, tears what was being written, fills up, lies and forgets bits.

use super::power::{Point, Power, Random};
use crate::database::Medium;
use redb::StorageBackend;
use std::io::{Error, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a disk writes as a whole.
const SECTOR_BYTES: usize = 512;

#[derive(Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
}

/// What a loss of power does to what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// Only the process died: the kernel has it all.
    Nothing,
    All,
    /// Any of the writes, in whole or torn.
    Some,
}

/// What the files of a member hold.
pub(super) type Image = [Vec<u8>; 2];

#[derive(Debug, Default)]
struct Contents {
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Since the last sync, in order.
    pending: Vec<Change>,
}

#[derive(Debug, Default)]
struct Inner {
    files: [Contents; 2],
    full: bool,
    /// Something was refused because it was full.
    refused: bool,
    lies: bool,
    /// The write under which the power went off is noted.
    ended: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    inner: Arc<Mutex<Inner>>,
    power: Power,
}

/// One of its files.
#[derive(Debug)]
pub(super) struct File {
    disk: Disk,
    which: usize,
}

impl Medium for Disk {
    type File = File;

    fn file(&self, which: usize) -> File {
        let disk = self.clone();
        File { disk, which }
    }
}

impl Disk {
    pub(super) fn with(image: Image, power: Power) -> Self {
        let files = image.map(|bytes| Contents {
            durable: bytes.clone(),
            current: bytes,
            pending: Vec::new(),
        });
        let inner = Inner {
            files,
            ..Inner::default()
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            power,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub(super) fn set_full(&self, full: bool) {
        self.inner().full = full;
    }

    pub(super) fn full(&self) -> bool {
        self.inner().full
    }

    /// Whether it refused something because it was full. The store fails from then on, also once there is room.
    pub(super) fn refused(&self) -> bool {
        self.inner().refused
    }

    /// From now on a sync is answered and not done.
    pub(super) fn set_lies(&self) {
        self.inner().lies = true;
    }

    /// What is on the disk after the power was off.
    pub(super) fn image_after(&self, loss: Loss, random: &mut Random) -> Image {
        let inner = self.inner();
        let [log, state] = &inner.files;
        [log, state].map(|file| file.image_after(loss, random))
    }

    fn change(&self, which: usize, point: Point, change: Change) -> Result<(), Error> {
        let alive = self.power.point(point);
        let mut inner = self.inner();
        if inner.full {
            inner.refused = true;
            return Err(ErrorKind::StorageFull.into());
        }
        if !alive {
            // What was on its way when the power went may be there in part.
            if self.power.went_off_at() == Some(point) && !inner.ended {
                inner.ended = true;
                inner.files[which].pending.push(change);
            }
            return Err(Error::other("the power is off"));
        }
        let file = &mut inner.files[which];
        match &change {
            Change::Resize(length) => file.current.resize(*length, 0),
            Change::Write(at, bytes) => write(&mut file.current, *at, bytes),
        }
        file.pending.push(change);
        Ok(())
    }
}

impl Contents {
    fn image_after(&self, loss: Loss, random: &mut Random) -> Vec<u8> {
        match loss {
            Loss::Nothing => return self.current.clone(),
            Loss::All => return self.durable.clone(),
            Loss::Some => {}
        }
        let mut image = self.durable.clone();
        let torn_percent = random.range(0, 60);
        for change in &self.pending {
            match change {
                // A file's length is metadata, which journals keep in order.
                Change::Resize(length) => image.resize(*length, 0),
                Change::Write(at, bytes) => {
                    let torn = random.chance(torn_percent);
                    let whole = random.chance(50);
                    for (sector, part) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        if if torn { random.chance(50) } else { whole } {
                            write(&mut image, at + sector * SECTOR_BYTES, part);
                        }
                    }
                }
            }
        }
        image
    }
}

fn write(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[at..end].copy_from_slice(bytes);
}

impl StorageBackend for File {
    fn len(&self) -> Result<u64, Error> {
        Ok(self.disk.inner().files[self.which].current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let inner = self.disk.inner();
        let from = inner.files[self.which]
            .current
            .get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(from.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.disk
            .change(self.which, Point::Resize, Change::Resize(len as usize))
    }

    fn sync_data(&self) -> Result<(), Error> {
        if !self.disk.power.point(Point::Sync) {
            return Err(Error::other("the power is off"));
        }
        let mut inner = self.disk.inner();
        if inner.full {
            inner.refused = true;
            return Err(ErrorKind::StorageFull.into());
        }
        if inner.lies {
            return Ok(());
        }
        let file = &mut inner.files[self.which];
        for change in std::mem::take(&mut file.pending) {
            match change {
                Change::Resize(length) => file.durable.resize(length, 0),
                Change::Write(at, bytes) => write(&mut file.durable, at, &bytes),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.disk
            .change(self.which, Point::Write, Change::Write(offset as usize, data.to_vec()))
    }
}
