//! A disk in memory that loses what was not synced and can fail at any operation.

use crate::database::Medium;
use redb::StorageBackend;
use std::io::{Error, ErrorKind};
use std::sync::{Arc, Mutex};

/// What the files of a member hold.
pub(crate) type Image = [Vec<u8>; 2];

#[derive(Debug, Default)]
struct Contents {
    /// As the running process sees it.
    current: Vec<u8>,
    /// As of the last sync.
    durable: Vec<u8>,
    /// Changes since the last sync.
    pending: Vec<Change>,
}

#[derive(Debug, Default)]
struct Inner {
    files: [Contents; 2],
    operations: u64,
    syncs: u64,
    fail_at: Option<(u64, ErrorKind)>,
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    SetLen(u64),
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Disk(Arc<Mutex<Inner>>);

/// One of its files.
#[derive(Debug)]
pub(crate) struct File {
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
    pub(crate) fn with(image: Image) -> Self {
        let files = image.map(|bytes| Contents {
            current: bytes.clone(),
            durable: bytes,
            pending: Vec::new(),
        });
        Self(Arc::new(Mutex::new(Inner {
            files,
            ..Inner::default()
        })))
    }

    /// Every write and sync from operation `at` on fails.
    pub(crate) fn fail_at(&self, at: u64, kind: ErrorKind) {
        self.0.lock().unwrap().fail_at = Some((at, kind));
    }

    /// Syncs that went through.
    pub(crate) fn syncs(&self) -> u64 {
        self.0.lock().unwrap().syncs
    }

    pub(crate) fn operations(&self) -> u64 {
        self.0.lock().unwrap().operations
    }

    /// What a power loss now leaves: all that was synced, and any of what was not, in whole writes.
    pub(crate) fn crash_image(&self, mut choice: u64) -> Image {
        let inner = self.0.lock().unwrap();
        let [log, state] = &inner.files;
        [log, state].map(|file| file.crash_image(&mut choice))
    }
}

impl Contents {
    fn crash_image(&self, choice: &mut u64) -> Vec<u8> {
        let mut image = self.durable.clone();
        for change in &self.pending {
            *choice = choice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // A file's length is metadata that journals keep in order; contents are not.
            match change {
                Change::SetLen(_) => change.apply(&mut image),
                Change::Write(..) if *choice >> 63 == 0 => change.apply(&mut image),
                Change::Write(..) => {}
            }
        }
        image
    }
}

impl Change {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::SetLen(len) => image.resize(*len as usize, 0),
            Self::Write(offset, data) => {
                let end = *offset as usize + data.len();
                if image.len() < end {
                    image.resize(end, 0);
                }
                image[*offset as usize..end].copy_from_slice(data);
            }
        }
    }
}

impl Inner {
    fn operate(&mut self) -> Result<(), Error> {
        self.operations += 1;
        match self.fail_at {
            Some((at, kind)) if self.operations > at => Err(Error::from(kind)),
            _ => Ok(()),
        }
    }

    fn change(&mut self, which: usize, change: Change) -> Result<(), Error> {
        self.operate()?;
        let file = &mut self.files[which];
        change.apply(&mut file.current);
        file.pending.push(change);
        Ok(())
    }
}

impl StorageBackend for File {
    fn len(&self) -> Result<u64, Error> {
        Ok(self.disk.0.lock().unwrap().files[self.which].current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let inner = self.disk.0.lock().unwrap();
        let from = inner.files[self.which]
            .current
            .get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(from.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.disk.0.lock().unwrap().change(self.which, Change::SetLen(len))
    }

    fn sync_data(&self) -> Result<(), Error> {
        let mut inner = self.disk.0.lock().unwrap();
        inner.operate()?;
        inner.syncs += 1;
        let file = &mut inner.files[self.which];
        for change in std::mem::take(&mut file.pending) {
            change.apply(&mut file.durable);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.disk
            .0
            .lock()
            .unwrap()
            .change(self.which, Change::Write(offset, data.to_vec()))
    }
}
