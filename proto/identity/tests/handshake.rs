//! Who may talk to whom, tried with real TLS handshakes in memory.

use baton_identity::{Authority, Identity, IdentityError, Role, is_named, role_of};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConnection, ServerConnection};
use std::sync::Arc;

/// Runs a handshake in memory; the first error of either side, if any.
fn handshake(client: &Identity, server: &Identity, meant: Role, admitted: &[Role]) -> Result<(), rustls::Error> {
    let server_config = server.quic_server(admitted, b"test").unwrap();
    let client_config = client.quic_client(b"test").unwrap();
    let name = ServerName::try_from(meant.dns_name()).unwrap();
    let mut client = ClientConnection::new(Arc::new(client_config), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server_config)).unwrap();
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(())
}

#[test]
fn roles_decide_who_talks_to_whom() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::load_or_create(dir.path()).unwrap();
    let worker = authority.issue(Role::Worker, "decode-0").unwrap();
    let coordinator = authority.issue(Role::Coordinator, "coordinator-0").unwrap();
    handshake(&worker, &coordinator, Role::Coordinator, &[Role::Worker]).unwrap();
    handshake(&worker, &coordinator, Role::Coordinator, &[Role::Admin]).expect_err("a worker is no admin");
    handshake(&coordinator, &worker, Role::Coordinator, &[Role::Coordinator])
        .expect_err("a worker poses as coordinator");
}

#[test]
fn one_coordinator_is_not_another() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::load_or_create(dir.path()).unwrap();
    let identity = authority.issue(Role::Coordinator, "coordinator-1").unwrap();
    identity.save(dir.path(), "c").unwrap();
    let pem = std::fs::read(dir.path().join("c.pem")).unwrap();
    let certificate = CertificateDer::from_pem_slice(&pem).unwrap();
    assert_eq!(role_of(&certificate), Some(Role::Coordinator));
    assert!(is_named(&certificate, Role::Coordinator, "coordinator-1"));
    assert!(!is_named(&certificate, Role::Coordinator, "coordinator-2"));
    assert!(!is_named(&certificate, Role::Worker, "coordinator-1"));
    assert!(!is_named(&certificate, Role::Coordinator, ""));
    assert!(!is_named(&certificate, Role::Coordinator, "no label"));
    // A name cannot make a role of itself.
    let posing = authority.issue(Role::Worker, "coordinator.baton.internal").unwrap();
    posing.save(dir.path(), "p").unwrap();
    let pem = std::fs::read(dir.path().join("p.pem")).unwrap();
    assert_eq!(
        role_of(&CertificateDer::from_pem_slice(&pem).unwrap()),
        Some(Role::Worker)
    );
}

#[test]
fn another_clusters_certificate_is_refused_both_ways() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ours = Authority::load_or_create(one.path())
        .unwrap()
        .issue(Role::Worker, "a")
        .unwrap();
    let theirs = Authority::load_or_create(two.path())
        .unwrap()
        .issue(Role::Worker, "a")
        .unwrap();
    handshake(&ours, &theirs, Role::Worker, &[Role::Worker]).unwrap_err();
    handshake(&theirs, &ours, Role::Worker, &[Role::Worker]).unwrap_err();
}

#[test]
fn a_reloaded_authority_issues_for_the_same_cluster() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let before = Authority::load_or_create(dir.path())
        .unwrap()
        .issue(Role::Worker, "a")
        .unwrap();
    let after = Authority::load_or_create(dir.path())
        .unwrap()
        .issue(Role::Worker, "b")
        .unwrap();
    handshake(&before, &after, Role::Worker, &[Role::Worker]).unwrap();
    after.save(dir.path(), "b").unwrap();
    let loaded = Identity::load(dir.path(), "b").unwrap();
    handshake(&before, &loaded, Role::Worker, &[Role::Worker]).unwrap();
    for key in ["b.key", "ca.key"] {
        assert_eq!(
            std::fs::metadata(dir.path().join(key)).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
    let pem = std::fs::read(dir.path().join("b.pem")).unwrap();
    assert_eq!(
        role_of(&CertificateDer::from_pem_slice(&pem).unwrap()),
        Some(Role::Worker)
    );
}

#[test]
fn bad_files_and_names_are_sentences() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::load_or_create(dir.path()).unwrap();
    assert!(matches!(
        authority.issue(Role::Worker, "../evil"),
        Err(IdentityError::Name(_))
    ));
    assert!(matches!(
        Identity::load(dir.path(), "nobody"),
        Err(IdentityError::File { .. })
    ));
    std::fs::write(dir.path().join("ca.key"), "rubbish").unwrap();
    assert!(matches!(
        Authority::load_or_create(dir.path()),
        Err(IdentityError::Malformed { .. })
    ));
    let broken = Identity::from_pem("x".into(), "y".into(), "z".into());
    assert!(matches!(broken.quic_client(b"t"), Err(IdentityError::Malformed { .. })));
}
