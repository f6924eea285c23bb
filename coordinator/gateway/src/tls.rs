//! TLS for the API: certificate and key from files, read again when they change. Connections that are open go on with what
//! they shook hands with. TLS 1.2 at least, because rustls knows nothing older; HTTP/2 and 1.1 by ALPN. No client
//! certificates: clients have keys. Between baton's own processes other certificates are used, not these.
//!
//! A pair that cannot be used (half written, key of another certificate) keeps the one before, and says so in the log:
//! renewal must not take a server down. Whoever mounts secrets swaps both files by one rename; where they are written one
//! after the other, the moment between is such a pair, and the next look finds the new one.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::Deserialize;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::error::GatewayError;

/// Bytes of a PEM file: a chain has a few KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Certificates in a chain.
const CHAIN_MAX: usize = 16;

/// Where the API's certificate lies.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// PEM file with the certificate and those between it and its root.
    pub cert_file: PathBuf,
    /// PEM file with its private key.
    pub key_file: PathBuf,
    /// How often the files are looked at, in milliseconds; a changed pair serves the connections that come after.
    #[serde(default = "default_reload_ms")]
    pub reload_ms: u64,
}

fn default_reload_ms() -> u64 {
    10_000
}

/// What the listener needs to shake hands.
pub(crate) struct Tls {
    pub acceptor: TlsAcceptor,
    current: Arc<Current>,
    config: TlsConfig,
}

impl Tls {
    /// Reads the pair.
    ///
    /// # Errors
    /// If it cannot be used: a server that was told to use TLS must not start without.
    pub fn load(config: &TlsConfig) -> Result<Self, GatewayError> {
        let wrong = |problem: String| GatewayError::Setting { name: "tls", problem };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (digest, pair) = read(config, &provider, None).map_err(wrong)?;
        let pair = pair.ok_or_else(|| wrong("could not be read".into()))?;
        let current = Arc::new(Current {
            pair: RwLock::new(Arc::new(pair)),
            digest: RwLock::new(digest),
            provider: provider.clone(),
        });
        let mut server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(error.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            current,
            config: config.clone(),
        })
    }

    /// Looks at the files until `over`.
    pub async fn follow(self: Arc<Self>, over: CancellationToken) {
        let mut ticks = tokio::time::interval(Duration::from_millis(self.config.reload_ms));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The same bad pair is told once.
        let mut told = String::new();
        loop {
            tokio::select! {
                biased;
                () = over.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let this = self.clone();
            let looked = tokio::task::spawn_blocking(move || this.current.look(&this.config)).await;
            match looked {
                Ok(Ok(true)) => {
                    told.clear();
                    tracing::info!("the API's certificate was read again");
                }
                Ok(Ok(false)) => told.clear(),
                Ok(Err(problem)) if problem != told => {
                    tracing::warn!(
                        problem,
                        "the API's new certificate cannot be used; the one before goes on"
                    );
                    told = problem;
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }
}

/// The pair in use.
struct Current {
    pair: RwLock<Arc<CertifiedKey>>,
    /// Of the files' contents: times of change lie on some file systems.
    digest: RwLock<[u8; 32]>,
    provider: Arc<CryptoProvider>,
}

impl Current {
    /// Takes what is in the files now. True if it is another pair.
    fn look(&self, config: &TlsConfig) -> Result<bool, String> {
        let known = *self.digest.read().unwrap_or_else(PoisonError::into_inner);
        let (digest, pair) = read(config, &self.provider, Some(known))?;
        let Some(pair) = pair else { return Ok(false) };
        *self.pair.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pair);
        *self.digest.write().unwrap_or_else(PoisonError::into_inner) = digest;
        Ok(true)
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.pair.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

impl fmt::Debug for Current {
    /// Nothing of the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Current")
    }
}

/// The pair in the files and the digest of their bytes; no pair if the digest is `known`.
fn read(
    config: &TlsConfig,
    provider: &CryptoProvider,
    known: Option<[u8; 32]>,
) -> Result<([u8; 32], Option<CertifiedKey>), String> {
    let (cert_pem, key_pem) = (bytes(&config.cert_file)?, bytes(&config.key_file)?);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(cert_pem.len() as u64).to_le_bytes());
    hasher.update(&cert_pem);
    hasher.update(&key_pem);
    let digest = *hasher.finalize().as_bytes();
    if known == Some(digest) {
        return Ok((digest, None));
    }
    let cert_path = config.cert_file.display();
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&cert_pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("names {cert_path}, which is not PEM: {error}"))?;
    if chain.is_empty() || chain.len() > CHAIN_MAX {
        return Err(format!(
            "names {cert_path}, which has {} certificates; 1 to {CHAIN_MAX} are taken",
            chain.len()
        ));
    }
    let key = PrivateKeyDer::from_pem_slice(&key_pem)
        .map_err(|error| format!("names {}, which is no private key: {error}", config.key_file.display()))?;
    let pair = CertifiedKey::from_der(chain, key, provider)
        .map_err(|error| format!("names {cert_path} and a key that do not go together: {error}"))?;
    Ok((digest, Some(pair)))
}

fn bytes(path: &Path) -> Result<Vec<u8>, String> {
    let wrong = |error: std::io::Error| format!("names {}, which cannot be read ({error})", path.display());
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(wrong)?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(wrong)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("names {}, which is too large to be PEM", path.display()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str) -> TlsConfig {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let config = TlsConfig {
            cert_file: dir.join("cert.pem"),
            key_file: dir.join("key.pem"),
            reload_ms: 10,
        };
        std::fs::write(&config.cert_file, made.cert.pem()).unwrap();
        std::fs::write(&config.key_file, made.signing_key.serialize_pem()).unwrap();
        config
    }

    #[test]
    fn a_changed_pair_is_taken_and_a_bad_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let config = write(dir.path(), "a.test");
        let tls = Tls::load(&config).unwrap();
        let shown = || tls.current.pair.read().unwrap().cert[0].clone();
        let first = shown();
        assert_eq!(tls.current.look(&config), Ok(false), "nothing changed");

        let old_key = std::fs::read(&config.key_file).unwrap();
        write(dir.path(), "b.test");
        let new_key = std::fs::read(&config.key_file).unwrap();
        for bad in [old_key.as_slice(), b"", b"nonsense"] {
            std::fs::write(&config.key_file, bad).unwrap();
            assert!(tls.current.look(&config).is_err());
            assert_eq!(shown(), first, "the one before goes on");
        }
        std::fs::write(&config.key_file, new_key).unwrap();
        assert_eq!(tls.current.look(&config), Ok(true));
        assert_ne!(shown(), first);
        std::fs::remove_file(&config.cert_file).unwrap();
        assert!(tls.current.look(&config).is_err());
    }

    #[test]
    fn it_does_not_start_without_a_usable_pair() {
        let dir = tempfile::tempdir().unwrap();
        let config = write(dir.path(), "a.test");
        std::fs::write(&config.cert_file, "x").unwrap();
        let Err(error) = Tls::load(&config) else {
            panic!("it started")
        };
        assert!(error.to_string().contains("cert.pem"), "{error}");
        assert!(
            Tls::load(&TlsConfig {
                cert_file: dir.path().join("none"),
                ..config
            })
            .is_err()
        );
    }
}
