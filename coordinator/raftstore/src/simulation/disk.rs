//! A disk that loses what was not synced, tears what was being written, fills up, lies and forgets bits.

use super::power::{Point, Power, Random};
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

#[derive(Debug, Default)]
struct Inner {
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Since the last sync, in order.
    pending: Vec<Change>,
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

impl Disk {
    pub(super) fn with(image: Vec<u8>, power: Power) -> Self {
        let inner = Inner {
            durable: image.clone(),
            current: image,
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
    pub(super) fn image_after(&self, loss: Loss, random: &mut Random) -> Vec<u8> {
        let inner = self.inner();
        match loss {
            Loss::Nothing => return inner.current.clone(),
            Loss::All => return inner.durable.clone(),
            Loss::Some => {}
        }
        let mut image = inner.durable.clone();
        let torn_percent = random.range(0, 60);
        for change in &inner.pending {
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

    fn change(&self, point: Point, change: Change) -> Result<(), Error> {
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
                inner.pending.push(change);
            }
            return Err(Error::other("the power is off"));
        }
        match &change {
            Change::Resize(length) => inner.current.resize(*length, 0),
            Change::Write(at, bytes) => write(&mut inner.current, *at, bytes),
        }
        inner.pending.push(change);
        Ok(())
    }
}

fn write(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[at..end].copy_from_slice(bytes);
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, Error> {
        Ok(self.inner().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let inner = self.inner();
        let from = inner.current.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(from.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.change(Point::Resize, Change::Resize(len as usize))
    }

    fn sync_data(&self) -> Result<(), Error> {
        if !self.power.point(Point::Sync) {
            return Err(Error::other("the power is off"));
        }
        let mut inner = self.inner();
        if inner.full {
            inner.refused = true;
            return Err(ErrorKind::StorageFull.into());
        }
        if inner.lies {
            return Ok(());
        }
        for change in std::mem::take(&mut inner.pending) {
            match change {
                Change::Resize(length) => inner.durable.resize(length, 0),
                Change::Write(at, bytes) => write(&mut inner.durable, at, &bytes),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.change(Point::Write, Change::Write(offset as usize, data.to_vec()))
    }
}
