//! One process's certificate and key, and the CA it trusts: in memory and on disk.

use crate::IdentityError;
use std::io::Write;
use std::path::Path;

/// A process's identity in PEM.
#[derive(Clone)]
pub struct Identity {
    pub(crate) ca_pem: String,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity(private)")
    }
}

impl Identity {
    /// From PEM texts; they are checked when a TLS configuration is built.
    pub fn from_pem(ca_pem: String, certificate_pem: String, key_pem: String) -> Self {
        Self {
            ca_pem,
            certificate_pem,
            key_pem,
        }
    }

    /// Reads `ca.pem`, `<name>.pem` and `<name>.key` from `dir`.
    pub fn load(dir: &Path, name: &str) -> Result<Self, IdentityError> {
        check_name(name)?;
        Ok(Self {
            ca_pem: read(&dir.join("ca.pem"))?,
            certificate_pem: read(&dir.join(format!("{name}.pem")))?,
            key_pem: read(&dir.join(format!("{name}.key")))?,
        })
    }

    /// Writes the three files that [`Identity::load`] reads; the key is readable by its owner only.
    pub fn save(&self, dir: &Path, name: &str) -> Result<(), IdentityError> {
        check_name(name)?;
        std::fs::create_dir_all(dir).map_err(|source| IdentityError::File {
            action: "write",
            path: dir.into(),
            source,
        })?;
        write_public(&dir.join("ca.pem"), &self.ca_pem)?;
        write_public(&dir.join(format!("{name}.pem")), &self.certificate_pem)?;
        write_private(&dir.join(format!("{name}.key")), &self.key_pem)
    }
}

/// A name becomes a file name, so it must not leave the directory.
pub(crate) fn check_name(name: &str) -> Result<(), IdentityError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(IdentityError::Name(name.into()));
    }
    Ok(())
}

pub(crate) fn read(path: &Path) -> Result<String, IdentityError> {
    std::fs::read_to_string(path).map_err(|source| IdentityError::File {
        action: "read",
        path: path.into(),
        source,
    })
}

pub(crate) fn write_public(path: &Path, text: &str) -> Result<(), IdentityError> {
    write(path, text, 0o644)
}

pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), IdentityError> {
    write(path, text, 0o600)
}

/// Writes beside the target and renames, so that a crash leaves the old file or the new one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), IdentityError> {
    use std::os::unix::fs::OpenOptionsExt;
    let attempt = || {
        let staged = path.with_extension(format!("tmp{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&staged)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&staged, path)
    };
    attempt().map_err(|source| IdentityError::File {
        action: "write",
        path: path.into(),
        source,
    })
}
