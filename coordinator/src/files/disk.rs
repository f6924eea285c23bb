//! Chunks in a directory: `ab/abcd…` by the hash in hexadecimal. A chunk appears whole and durable, by writing it under another
//! name, fsync, rename, and fsync of its folder; one whose bytes do not have its name is as if it were not there.
//!
//! Names come from hashes alone, never from a client. Everything here blocks.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use baton_gateway::ChunkHash;
use bytes::Bytes;

use super::CHUNK_BYTES_MAX;

/// Folder of chunks that are being written. Emptied at the start.
const INCOMING: &str = "incoming";

/// See the module.
pub(crate) struct Disk {
    dir: PathBuf,
    /// What is here. Held while a file appears or goes, so that a chunk is not swept while it is kept anew.
    present: Mutex<HashSet<ChunkHash>>,
    next: AtomicU64,
}

impl Disk {
    /// Opens or makes the directory, and looks through it.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let incoming = dir.join(INCOMING);
        match fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&incoming)?;
        let mut present = HashSet::new();
        for folder in fs::read_dir(dir)? {
            let folder = folder?;
            if folder.file_name() == INCOMING || !folder.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(folder.path())? {
                present.extend(file?.file_name().to_str().and_then(hash_of));
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            present: Mutex::new(present),
            next: AtomicU64::new(0),
        })
    }

    /// Keeps a chunk; durable on `Ok`. One that is here is new again, so that it is not swept.
    pub(crate) fn put(&self, data: &[u8]) -> io::Result<ChunkHash> {
        if data.len() > CHUNK_BYTES_MAX {
            return Err(io::Error::other("a chunk is at most 4 MiB"));
        }
        let hash = *blake3::hash(data).as_bytes();
        let path = self.path(&hash);
        {
            let present = self.present();
            if present.contains(&hash) && self.is_whole(&path, data)? {
                let file = File::options().append(true).open(&path)?;
                file.set_modified(SystemTime::now())?;
                return Ok(hash);
            }
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let incoming = self.dir.join(INCOMING).join(number.to_string());
        let mut file = File::create_new(&incoming)?;
        let written = file.write_all(data).and_then(|()| file.sync_all());
        drop(file);
        let mut present = self.present();
        let placed = written.and_then(|()| self.place(&incoming, &path));
        if placed.is_err() {
            let _ = fs::remove_file(&incoming);
        }
        placed?;
        present.insert(hash);
        Ok(hash)
    }

    fn place(&self, incoming: &Path, path: &Path) -> io::Result<()> {
        let folder = path.parent().unwrap_or(&self.dir);
        if !folder.exists() {
            fs::create_dir(folder)?;
            File::open(&self.dir)?.sync_all()?;
        }
        fs::rename(incoming, path)?;
        File::open(folder)?.sync_all()
    }

    fn is_whole(&self, path: &Path, data: &[u8]) -> io::Result<bool> {
        match fs::read(path) {
            Ok(found) => Ok(found == data),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A chunk, if it is here and whole.
    pub(crate) fn get(&self, hash: &ChunkHash) -> io::Result<Option<Bytes>> {
        let path = self.path(hash);
        let data = match fs::read(&path) {
            Ok(data) => data,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.present().remove(hash);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if blake3::hash(&data).as_bytes() == hash {
            return Ok(Some(data.into()));
        }
        tracing::error!(path = %path.display(), "a part of a file is damaged; it is had from another coordinator, if there is one");
        self.present().remove(hash);
        Ok(None)
    }

    /// Those of `wanted` that are not here.
    pub(crate) fn missing(&self, wanted: &HashSet<ChunkHash>) -> Vec<ChunkHash> {
        let present = self.present();
        wanted.iter().filter(|hash| !present.contains(*hash)).copied().collect()
    }

    /// Removes what is not wanted and was kept longer ago than `age`. Says how many went.
    pub(crate) fn sweep(&self, wanted: &HashSet<ChunkHash>, age: Duration) -> io::Result<usize> {
        let unwanted: Vec<ChunkHash> = self.present().difference(wanted).copied().collect();
        let mut swept = 0;
        for hash in unwanted {
            let path = self.path(&hash);
            let mut present = self.present();
            let old = match fs::metadata(&path) {
                Ok(metadata) => metadata.modified()?.elapsed().unwrap_or_default() >= age,
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                Err(error) => return Err(error),
            };
            if old {
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                present.remove(&hash);
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn path(&self, hash: &ChunkHash) -> PathBuf {
        let name = blake3::Hash::from_bytes(*hash).to_hex();
        self.dir.join(&name[..2]).join(name.as_str())
    }

    fn present(&self) -> MutexGuard<'_, HashSet<ChunkHash>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hash_of(name: &str) -> Option<ChunkHash> {
    blake3::Hash::from_hex(name).ok().map(|hash| *hash.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_stay_whole_or_go() {
        let dir = tempfile::tempdir().expect("a folder");
        let disk = Disk::open(dir.path()).expect("opens");
        let a = disk.put(b"a").expect("kept");
        assert_eq!(disk.put(b"a").expect("again"), a);
        assert_eq!(disk.get(&a).expect("reads").as_deref(), Some(&b"a"[..]));
        assert_eq!(disk.get(&[0; 32]).expect("reads"), None);
        assert!(disk.put(&vec![0; CHUNK_BYTES_MAX + 1]).is_err());
        // A crash leaves what was being written, and a bad disk what was not.
        fs::write(dir.path().join(INCOMING).join("7"), b"torn").expect("written");
        let b = disk.put(b"b").expect("kept");
        fs::write(disk.path(&b), b"x").expect("written");
        drop(disk);
        let disk = Disk::open(dir.path()).expect("opens");
        assert_eq!(disk.missing(&HashSet::from([a, b, [0; 32]])), [[0; 32]]);
        assert_eq!(disk.get(&b).expect("reads"), None, "damaged");
        assert_eq!(disk.missing(&HashSet::from([a, b])), [b], "to be had from another");
        assert_eq!(disk.put(b"b").expect("mended"), b);
        assert_eq!(disk.get(&b).expect("reads").as_deref(), Some(&b"b"[..]));
        assert_eq!(fs::read_dir(dir.path().join(INCOMING)).expect("is there").count(), 0);
        // What is wanted, or young, stays.
        let hour = Duration::from_secs(3600);
        assert_eq!(disk.sweep(&HashSet::from([a]), hour).expect("sweeps"), 0);
        let file = File::options().append(true).open(disk.path(&a)).expect("opens");
        file.set_modified(SystemTime::now() - 2 * hour).expect("is set");
        let file = File::options().append(true).open(disk.path(&b)).expect("opens");
        file.set_modified(SystemTime::now() - 2 * hour).expect("is set");
        assert_eq!(disk.sweep(&HashSet::from([a]), hour).expect("sweeps"), 1);
        assert_eq!(disk.get(&b).expect("reads"), None);
        disk.put(b"a").expect("new again");
        assert_eq!(disk.sweep(&HashSet::new(), hour).expect("sweeps"), 0);
        assert!(disk.get(&a).expect("reads").is_some());
    }
}
