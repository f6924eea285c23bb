//! The cluster's private CA: made once per data directory, issues a certificate for each process.

use crate::identity::{check_name, read, write_private, write_public};
use crate::{Identity, IdentityError, Role};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::path::Path;
use time::{Duration, OffsetDateTime};

/// Lifetime of the CA. Ten years: longer than a cluster keeps its data directory.
const CA_LIFETIME: Duration = Duration::days(3650);
/// Lifetime of a process certificate. `baton up` issues anew at each start; a year covers a long-running one.
const LEAF_LIFETIME: Duration = Duration::days(365);
/// Certificates are valid from an hour ago, so that a host whose clock lags still accepts them.
const BACKDATE: Duration = Duration::hours(1);

/// A private certificate authority.
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Loads the CA from `dir`, or makes one and stores it there (key readable by its owner only).
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        let (certificate_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        if certificate_path.exists() && key_path.exists() {
            let key = KeyPair::from_pem(&read(&key_path)?).map_err(|_| IdentityError::Malformed {
                path: key_path.display().to_string(),
                what: "private key",
            })?;
            // The issuer needs only the CA's name and key, and the name is a constant.
            return Ok(Self {
                certificate_pem: read(&certificate_path)?,
                issuer: Issuer::new(ca_params(), key),
            });
        }
        std::fs::create_dir_all(dir).map_err(|source| IdentityError::File {
            action: "write",
            path: dir.into(),
            source,
        })?;
        let issue_error = |error: rcgen::Error| IdentityError::Issue {
            name: "the CA".into(),
            reason: error.to_string(),
        };
        let key = KeyPair::generate().map_err(issue_error)?;
        let certificate_pem = ca_params().self_signed(&key).map_err(issue_error)?.pem();
        write_private(&key_path, &key.serialize_pem())?;
        write_public(&certificate_path, &certificate_pem)?;
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(ca_params(), key),
        })
    }

    /// Issues a certificate for the process `name` in `role`: it states the role, and, where `name` can be part of a DNS name,
    /// whose it is. The subject is for people to read and never believed.
    pub fn issue(&self, role: Role, name: &str) -> Result<Identity, IdentityError> {
        check_name(name)?;
        let issue_error = |error: rcgen::Error| IdentityError::Issue {
            name: name.into(),
            reason: error.to_string(),
        };
        let key = KeyPair::generate().map_err(issue_error)?;
        let names: Vec<String> = [role.dns_name().to_owned()]
            .into_iter()
            .chain(role.named(name))
            .collect();
        let mut params = CertificateParams::new(names).map_err(issue_error)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = validity(LEAF_LIFETIME);
        let certificate = params.signed_by(&key, &self.issuer).map_err(issue_error)?;
        Ok(Identity::from_pem(
            self.certificate_pem.clone(),
            certificate.pem(),
            key.serialize_pem(),
        ))
    }
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "baton cluster CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity(CA_LIFETIME);
    params
}

fn validity(lifetime: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - BACKDATE, now + lifetime)
}
