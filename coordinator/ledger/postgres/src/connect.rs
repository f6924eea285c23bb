//! A connection, with TLS where the server has it. What the address says of `sslmode` holds: `disable`, `prefer` (the default)
//! or `require`. A certificate is always checked, also under `prefer`: one that cannot be is an error, not a reason to go on
//! without TLS.

use crate::SinkError;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::{Client, Config, config::SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Longest wait for a connection, if the address does not say.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Connects to `address` (`postgres://user:password@host/database?sslmode=require`, or `host=… dbname=…`). Certificates are
/// checked against those in the file `ca` (PEM), or the system's. The connection runs in a task of its own, until the client is
/// dropped.
///
/// # Errors
/// [`SinkError`].
pub async fn connect(address: &str, ca: Option<&Path>) -> Result<Client, SinkError> {
    let mut config: Config = address.parse().map_err(SinkError::Address)?;
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_MAX);
    }
    if config.get_application_name().is_none() {
        config.application_name("baton ledger export");
    }
    // Not even roots are read where no TLS is wanted.
    let roots = if config.get_ssl_mode() == SslMode::Disable {
        RootCertStore::empty()
    } else {
        roots(ca)?
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| SinkError::Certificates(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (client, connection) = config.connect(MakeRustlsConnect::new(tls)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            // Whoever waits for an answer is told too.
            tracing::debug!(%error, "the connection to PostgreSQL broke");
        }
    });
    Ok(client)
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore, SinkError> {
    let mut roots = RootCertStore::empty();
    let Some(path) = ca else {
        // A system without certificates still reaches a server without TLS.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return Ok(roots);
    };
    let wrong = |error: &dyn std::fmt::Display| SinkError::Certificates(format!("{}: {error}", path.display()));
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(&error))? {
        let certificate = certificate.map_err(|error| wrong(&error))?;
        roots.add(certificate).map_err(|error| wrong(&error))?;
    }
    if roots.is_empty() {
        return Err(wrong(&"no certificate in it"));
    }
    Ok(roots)
}
