//! TLS configurations from an identity: rustls for QUIC, tonic's own for gRPC. TLS 1.3 only.

use crate::{Identity, IdentityError, Role, is_named, role_of};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use std::sync::Arc;
use tonic::transport::{Certificate, ClientTlsConfig, ServerTlsConfig};

impl Identity {
    /// A rustls server configuration that admits only clients in one of `roles`.
    pub fn quic_server(&self, roles: &[Role], alpn: &[u8]) -> Result<rustls::ServerConfig, IdentityError> {
        let provider = Arc::new(provider());
        let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider.clone())
            .build()
            .map_err(|error| IdentityError::Tls(error.to_string()))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .with_client_cert_verifier(Arc::new(RoleVerifier {
                inner,
                roles: roles.to_vec(),
            }))
            .with_single_cert(self.chain()?, self.key()?)
            .map_err(tls_error)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// A rustls client configuration; connect under `server_role.dns_name()`, which is what makes the role binding.
    pub fn quic_client(&self, alpn: &[u8]) -> Result<rustls::ClientConfig, IdentityError> {
        let provider = Arc::new(provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls_error)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain()?, self.key()?)
            .map_err(tls_error)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// tonic's server side: a client certificate of this cluster is required. Its role is checked per service with
    /// [`require_role`].
    pub fn tonic_server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(self.tonic_identity())
            .client_ca_root(Certificate::from_pem(&self.ca_pem))
    }

    /// tonic's client side, for a server in `server_role`.
    pub fn tonic_client(&self, server_role: Role) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(self.tonic_identity())
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .domain_name(server_role.dns_name())
    }

    /// tonic's client side, for the very process `name` in `server_role`; `None` if the name cannot be in a certificate.
    pub fn tonic_client_of(&self, server_role: Role, name: &str) -> Option<ClientTlsConfig> {
        Some(self.tonic_client(server_role).domain_name(server_role.named(name)?))
    }

    fn tonic_identity(&self) -> tonic::transport::Identity {
        tonic::transport::Identity::from_pem(&self.certificate_pem, &self.key_pem)
    }

    fn roots(&self) -> Result<RootCertStore, IdentityError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca_pem, "ca.pem")? {
            roots.add(certificate).map_err(tls_error)?;
        }
        Ok(roots)
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        certificates(&self.certificate_pem, "the process certificate")
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, IdentityError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|_| IdentityError::Malformed {
            path: "the process key".into(),
            what: "private key",
        })
    }
}

/// rustls's cryptography by ring, with AES-128-GCM preferred: in bulk it costs a quarter less than AES-256-GCM, and a
/// private CA's P-256 certificates are no stronger than it.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    // Stable: the order of the others stays.
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// Refuses a gRPC request whose client certificate states none of `roles`.
// tonic's Status is large, and it is what a service returns.
#[allow(clippy::result_large_err)]
pub fn require_role<T>(request: &tonic::Request<T>, roles: &[Role]) -> Result<Role, tonic::Status> {
    let certificates = request.peer_certs();
    let role = certificates.as_ref().and_then(|chain| chain.first()).and_then(role_of);
    match role {
        Some(role) if roles.contains(&role) => Ok(role),
        _ => Err(tonic::Status::permission_denied(format!(
            "this service takes certificates of {roles:?} only; the caller's states {role:?}"
        ))),
    }
}

/// Refuses a gRPC request whose client certificate is not that of the process `name` in `role`.
#[allow(clippy::result_large_err)]
pub fn require_name<T>(request: &tonic::Request<T>, role: Role, name: &str) -> Result<(), tonic::Status> {
    let certificates = request.peer_certs();
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    match certificate {
        Some(certificate) if is_named(certificate, role, name) => Ok(()),
        _ => Err(tonic::Status::permission_denied(format!(
            "the caller's certificate is not that of {name:?} in the role {role:?}"
        ))),
    }
}

fn certificates(pem: &str, path: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let malformed = || IdentityError::Malformed {
        path: path.into(),
        what: "certificate",
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| malformed())?;
    if chain.is_empty() { Err(malformed()) } else { Ok(chain) }
}

fn tls_error(error: rustls::Error) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

/// WebPKI verification against the cluster's CA, then the role.
#[derive(Debug)]
struct RoleVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    roles: Vec<Role>,
}

impl ClientCertVerifier for RoleVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        match role_of(end_entity) {
            Some(role) if self.roles.contains(&role) => Ok(verified),
            _ => Err(rustls::Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
