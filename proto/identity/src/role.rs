//! The roles a certificate can state, and reading one back from a certificate.

use rustls::client::verify_server_name;
use rustls::server::ParsedCertificate;
use rustls_pki_types::{CertificateDer, ServerName};

/// What the holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Serves the API and the Raft group; may submit work to workers.
    Coordinator,
    /// Computes; may register with coordinators and hand KV blocks to other workers.
    Worker,
    /// A person or script operating the cluster.
    Admin,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Coordinator, Self::Worker, Self::Admin];

    /// The DNS name that stands for the role in a certificate.
    pub fn dns_name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator.baton.internal",
            Self::Worker => "worker.baton.internal",
            Self::Admin => "admin.baton.internal",
        }
    }

    pub(crate) fn server_name(self) -> ServerName<'static> {
        ServerName::try_from(self.dns_name()).expect("the three names above are DNS names")
    }
}

/// The role stated by a certificate, if it states one. Says nothing about who signed it: call this only on a
/// certificate that a TLS handshake has already verified against the cluster's CA.
pub fn role_of(certificate: &CertificateDer<'_>) -> Option<Role> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    Role::ALL
        .into_iter()
        .find(|role| verify_server_name(&parsed, &role.server_name()).is_ok())
}
