//! The data directory of `baton up`: where everything lies, and the lock that keeps a second `up` out.
//!
//! ```text
//! <data-dir>/lock            held while `up` runs; holds its pid
//! <data-dir>/ready.json      there while the cluster serves (see `announce.rs`)
//! <data-dir>/identity/       the cluster's CA and the processes' certificates
//! <data-dir>/config/         the TOML each process was started with
//! <data-dir>/logs/           one log per process
//! <data-dir>/models/         the demo model, and tokenizers of GGUF files
//! <data-dir>/coordinator-0/  the coordinator's Raft log and ledger
//! ```

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// An existing data directory that this process holds the lock of.
pub struct DataDir {
    root: PathBuf,
    /// Released by the kernel when this closes, however the process ends.
    _lock: File,
}

impl DataDir {
    /// Makes `given`, or the user's own place, and locks it.
    pub fn open(given: Option<PathBuf>) -> anyhow::Result<Self> {
        let root = match given {
            Some(root) => root,
            None => Self::default_place()?,
        };
        let cannot = || {
            format!(
                "cannot use the data directory {}; choose another with --data-dir",
                root.display()
            )
        };
        std::fs::create_dir_all(&root).with_context(cannot)?;
        let root = root.canonicalize().with_context(cannot)?;
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(root.join("lock"))
            .with_context(cannot)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            let _ = (&mut lock).take(20).read_to_string(&mut pid);
            bail!(
                "another `baton up` (pid {}) runs on {}; stop it, or choose another directory with --data-dir and another \
                 port with --port",
                pid.trim(),
                root.display()
            );
        }
        let write_pid = |lock: &mut File| {
            lock.set_len(0)?;
            lock.rewind()?;
            write!(lock, "{}", std::process::id())
        };
        write_pid(&mut lock).with_context(cannot)?;
        let this = Self { root, _lock: lock };
        for directory in [this.identity(), this.config(), this.logs(), this.models()] {
            std::fs::create_dir_all(&directory).with_context(cannot)?;
        }
        // From an earlier run that was killed.
        let _ = std::fs::remove_file(this.ready_file());
        Ok(this)
    }

    /// The user's own place.
    pub fn default_place() -> anyhow::Result<PathBuf> {
        default_root(|name| std::env::var_os(name).map(PathBuf::from))
    }

    pub fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    pub fn ready_file(&self) -> PathBuf {
        self.root.join("ready.json")
    }

    /// State of the process `name`.
    pub fn state(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// The per-user place: `$XDG_DATA_HOME/baton`, else `~/.local/share/baton`.
fn default_root(variable: impl Fn(&str) -> Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let absolute = |name| variable(name).filter(|path| path.is_absolute());
    match (absolute("XDG_DATA_HOME"), absolute("HOME")) {
        (Some(data), _) => Ok(data.join("baton")),
        (None, Some(home)) => Ok(home.join(".local/share/baton")),
        (None, None) => bail!("neither XDG_DATA_HOME nor HOME is set; say where to keep state with --data-dir"),
    }
}

/// Writes a file that appears whole or not at all, readable by its owner only: configurations hold keys.
pub fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let staged = path.with_extension("tmp");
    let write = || {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&staged)?;
        file.write_all(text.as_bytes())?;
        std::fs::rename(&staged, path)
    };
    write().with_context(|| format!("cannot write {}; is the disk full?", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_place() {
        let with = |pairs: &'static [(&str, &str)]| {
            default_root(move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v)))
        };
        assert_eq!(
            with(&[("XDG_DATA_HOME", "/x"), ("HOME", "/h")]).expect("set"),
            Path::new("/x/baton")
        );
        assert_eq!(
            with(&[("XDG_DATA_HOME", ""), ("HOME", "/h")]).expect("set"),
            Path::new("/h/.local/share/baton")
        );
        assert!(with(&[]).is_err());
    }

    #[test]
    fn a_second_one_is_kept_out() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let open = || DataDir::open(Some(directory.path().join("new/place")));
        let first = open().expect("nobody has it");
        let refused = open().err().expect("it is locked").to_string();
        assert!(
            refused.contains(&format!("pid {}", std::process::id())) && refused.contains("--data-dir"),
            "{refused}"
        );
        drop(first);
        open().expect("nobody has it any more");
    }
}
