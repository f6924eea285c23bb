//! Compiled kernels on disk, by the hash of everything they depend on. A file that is damaged, or cannot be written, only
//! costs a compilation (some seconds).

use crate::driver::DeviceError;
use crate::nvrtc::Nvrtc;
use crate::source::{Program, target};
use std::path::{Path, PathBuf};

/// Names the folder.
pub const VARIABLE: &str = "BATON_KERNEL_CACHE";
/// Bytes of the hash before the kernels in a file.
const HASH_BYTES: usize = 32;
/// No file of ours is nearly as large.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Where compiled kernels are kept: `BATON_KERNEL_CACHE`, or `baton/kernels` in the user's cache folder.
pub fn folder() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    of(VARIABLE).or_else(|| {
        let cache = of("XDG_CACHE_HOME").or_else(|| Some(of("HOME")?.join(".cache")))?;
        Some(cache.join("baton/kernels"))
    })
}

/// The program for a device: from `folder`, or compiled and kept there.
///
/// # Errors
/// What NVRTC says.
pub fn compiled(program: &Program, capability: (u32, u32), folder: Option<&Path>) -> Result<Vec<u8>, DeviceError> {
    let nvrtc = Nvrtc::find()?;
    let options = program.options(capability);
    let source = program.source();
    let version = nvrtc.version()?;
    let mut hasher = blake3::Hasher::new_derive_key("baton 2026 compiled kernels");
    for part in options
        .iter()
        .map(String::as_str)
        .chain([source.as_str(), &format!("{version:?}")])
    {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let name = format!("{}-{}.cubin", target(capability), &hasher.finalize().to_hex()[..32]);
    let path = folder.map(|folder| folder.join(name));
    if let Some(found) = path.as_deref().and_then(read) {
        return Ok(found);
    }
    let image = nvrtc.compile(&source, &options, &target(capability))?;
    if let Some(path) = path
        && let Err(error) = write(&path, &image)
    {
        tracing::debug!(path = %path.display(), %error, "compiled kernels were not kept");
    }
    Ok(image)
}

/// A file's kernels, if it is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    if std::fs::metadata(path).ok()?.len() > FILE_BYTES_MAX {
        return None;
    }
    let mut bytes = std::fs::read(path).ok()?;
    let (hash, image) = bytes.split_at_checked(HASH_BYTES)?;
    if blake3::hash(image).as_bytes() != hash {
        return None;
    }
    Some(bytes.split_off(HASH_BYTES))
}

/// Under another name first: several workers may start at once.
fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let bytes: Vec<u8> = blake3::hash(image).as_bytes().iter().chain(image).copied().collect();
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/k.cubin");
        write(&path, b"kernels").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"kernels"[..]));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), None);
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(read(&path), None);
    }
}
