//! Public keys as people give them: hexadecimal digits, or a file with these or with PEM (`openssl pkey -pubout`).

use anyhow::{Context, anyhow, bail};
use baton_ledger::hash_from_hex;
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;

/// What stands before the 32 bytes of an Ed25519 key in a `SubjectPublicKeyInfo` (RFC 8410).
const ED25519_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Longest file read: a key is a hundred bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Reads all keys.
pub fn read(given: &[String]) -> anyhow::Result<Vec<[u8; 32]>> {
    given.iter().map(|key| one(key)).collect()
}

fn one(given: &str) -> anyhow::Result<[u8; 32]> {
    if let Some(key) = hash_from_hex(given) {
        return Ok(key);
    }
    let size = std::fs::metadata(given).map(|file| file.len());
    let size = size.with_context(|| format!("--key {given}: neither 64 hexadecimal digits nor a file"))?;
    if size > FILE_BYTES_MAX {
        bail!("--key {given}: the file is too large for a key");
    }
    let text = std::fs::read_to_string(given).with_context(|| format!("cannot read {given}"))?;
    if let Some(key) = hash_from_hex(text.trim()) {
        return Ok(key);
    }
    let wrong =
        || anyhow!("--key {given}: the file holds neither 64 hexadecimal digits nor an Ed25519 public key as PEM");
    let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes()).map_err(|_| wrong())?;
    let key = der
        .as_ref()
        .strip_prefix(&ED25519_PREFIX)
        .and_then(|key| key.try_into().ok());
    key.ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_in_every_form() {
        let directory = tempfile::tempdir().expect("a directory");
        let hex = "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c";
        let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA6kpsY+KcUgq+9VB7Ey7F+ZVHdq6+vnuSQh7qaRRG0iw=\n-----END PUBLIC KEY-----\n";
        let mut given = vec![hex.to_owned()];
        for (name, content) in [("hex", format!("{hex}\n")), ("pem", pem.to_owned())] {
            let path = directory.path().join(name);
            std::fs::write(&path, content).expect("writable");
            given.push(path.to_str().expect("text").to_owned());
        }
        let keys = read(&given).expect("keys");
        assert_eq!(keys.len(), 3);
        assert!(keys.iter().all(|key| baton_ledger::hex(key) == hex));
        let path = directory.path().join("none");
        std::fs::write(&path, "no key").expect("writable");
        assert!(read(&[path.to_str().expect("text").to_owned()]).is_err());
        assert!(read(&["abc".to_owned()]).is_err());
    }
}
