//! A child's log: truncated when the cluster starts, kept across restarts of the child, bounded by one rotation.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A log that reaches this many bytes moves to `<name>.log.1`. Two of these per process is what a data directory may
/// grow by.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// Bytes kept in memory to quote the last line of a process that died without a word.
const TAIL_BYTES: usize = 4 << 10;

/// An open log.
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    limit: u64,
    tail: Vec<u8>,
}

impl LogFile {
    /// Empties `path`, to be done once per start of the cluster.
    pub fn truncate(path: &Path) -> std::io::Result<()> {
        File::create(path).map(drop)
    }

    /// Opens `path` to append.
    pub fn open(path: &Path) -> Self {
        Self::with_limit(path, LOG_BYTES_MAX)
    }

    fn with_limit(path: &Path, limit: u64) -> Self {
        let file = File::options().append(true).create(true).open(path).ok();
        let written = file.as_ref().and_then(|f| f.metadata().ok()).map_or(0, |m| m.len());
        Self {
            path: path.into(),
            file,
            written,
            limit,
            tail: Vec::new(),
        }
    }

    /// Appends what a child wrote. A full disk costs log lines, never the cluster.
    pub fn append(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL_BYTES));
        if self.written + bytes.len() as u64 > self.limit && self.written > 0 {
            let old = self.path.with_extension("log.1");
            if std::fs::rename(&self.path, old).is_ok() {
                self.file = File::create(&self.path).ok();
                self.written = 0;
            }
        }
        if let Some(file) = &mut self.file
            && file.write_all(bytes).is_ok()
        {
            self.written += bytes.len() as u64;
        }
    }

    /// The last line written since this was opened that says something (a panic ends with a hint about backtraces).
    pub fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(&self.tail);
        let line = text
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty() && !line.starts_with("note: "))
            .unwrap_or_default();
        line.trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_by_one_rotation() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("decode-0.log");
        let mut log = LogFile::with_limit(&path, 100);
        for i in 0..50 {
            log.append(format!("line {i:02}\n").as_bytes());
        }
        let size = |path: &Path| std::fs::metadata(path).map(|m| m.len()).unwrap_or(0);
        assert!(size(&path) <= 100 && size(&path.with_extension("log.1")) <= 100);
        assert_eq!(log.last_line(), "line 49");
        let mut reopened = LogFile::with_limit(&path, 100);
        assert_eq!(reopened.last_line(), "", "an earlier life's words are not quoted");
        reopened.append(b"again\n\n");
        assert_eq!(reopened.last_line(), "again");
        LogFile::truncate(&path).expect("writable");
        assert_eq!(size(&path), 0);
    }
}
