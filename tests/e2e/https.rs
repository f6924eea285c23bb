//! `baton up` with TLS: curl with the root's certificate, our own commands, and a certificate renewed under way.

use super::support::cluster::{Cluster, baton};
use super::support::eventually;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// A certificate for `localhost` and its root, made by openssl so that curl and rustls meet one of neither's making.
fn certificate(dir: &Path) -> bool {
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=root \
        -keyout ca.key -out ca.pem && \
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout new.key -out new.csr && \
        printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > ext && \
        openssl x509 -req -in new.csr -CA ca.pem -CAkey ca.key -days 2 -extfile ext -out new.pem && \
        mv new.pem cert.pem && mv new.key key.pem";
    let made = Command::new("sh").current_dir(dir).args(["-c", script]).output();
    made.is_ok_and(|made| made.status.success())
}

fn curl(url: &str, root: &Path, more: &[&str]) -> Output {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "20", "--cacert"])
        .arg(root)
        .args(more)
        .arg(url);
    curl.output().expect("curl runs")
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_and_our_commands_over_tls_with_a_renewed_certificate() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let have_curl = Command::new("curl").arg("--version").output().is_ok();
    if !have_curl || !certificate(dir.path()) {
        eprintln!("skipped: curl or openssl is not installed");
        return;
    }
    let path = |name: &str| dir.path().join(name);
    let text = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
    let (cert, key) = (text(path("cert.pem")), text(path("key.pem")));
    let cluster = Cluster::start(&["--prefill", "0", "--tls-cert", &cert, "--tls-key", &key]).await;
    assert!(cluster.url.starts_with("https://127.0.0.1:"), "{}", cluster.url);
    let models = format!("{}/v1/models", cluster.url);
    for version in ["--http1.1", "--http2"] {
        let answer = curl(&models, &path("ca.pem"), &[version]);
        let shown = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(
            answer.status.success() && shown.contains("baton-demo"),
            "{version}: {answer:?}"
        );
    }
    let old = curl(&models, &path("ca.pem"), &["--tls-max", "1.1"]);
    assert!(!old.status.success(), "TLS 1.1 is refused: {old:?}");
    // Ours, by the file that OpenSSL's programs read too.
    let ours = |root: &Path| {
        let mut status = baton();
        status
            .args(["status", "--url", &cluster.url])
            .env("SSL_CERT_FILE", root);
        status.output().expect("it runs")
    };
    let status = ours(&path("ca.pem"));
    assert!(status.status.success(), "{status:?}");

    // Another root altogether: whoever believes only the first must be refused from some moment on.
    std::fs::copy(path("ca.pem"), path("first.pem")).expect("writable");
    assert!(certificate(dir.path()));
    eventually("the new certificate is served", Duration::from_secs(40), || async {
        curl(&models, &path("ca.pem"), &[]).status.success().then_some(())
    })
    .await;
    assert!(!curl(&models, &path("first.pem"), &[]).status.success());
    assert!(!ours(&path("first.pem")).status.success());
    assert!(ours(&path("ca.pem")).status.success());
    assert!(cluster.stop().await.success());
}
