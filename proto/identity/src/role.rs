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

    /// The DNS name that stands for the holder itself, beside its role's; `None` if `name` is no DNS label sequence, which
    /// a process that others must tell from its like has to have.
    pub fn named(self, name: &str) -> Option<String> {
        let named = format!("{name}.{}", self.dns_name());
        ServerName::try_from(named.as_str()).ok()?;
        Some(named)
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

/// Whether a certificate states that its holder is the process `name` in `role`. As [`role_of`], only for a certificate that
/// a handshake has verified.
pub fn is_named(certificate: &CertificateDer<'_>, role: Role, name: &str) -> bool {
    let Some(named) = role.named(name).and_then(|named| ServerName::try_from(named).ok()) else {
        return false;
    };
    ParsedCertificate::try_from(certificate).is_ok_and(|parsed| verify_server_name(&parsed, &named).is_ok())
}
