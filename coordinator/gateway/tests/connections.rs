//! What a connection may do to the server: nothing. Slow, silent, flooding and stalling peers over HTTP/1.1, HTTP/2 and TLS,
//! each against a gateway whose limits are short, and somebody else served all the while.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_gateway::{GatewayConfig, TlsConfig};
use serde_json::json;
use support::h2::{self, H2};
use support::{CHAT, LONG, Script, TestGateway, hi, ids};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn short() -> GatewayConfig {
    GatewayConfig {
        header_timeout_ms: 200,
        body_timeout_ms: 200,
        write_stall_ms_max: 200,
        ..GatewayConfig::default()
    }
}

#[tokio::test]
async fn pings_and_settings_keep_no_connection_open() {
    let gateway = TestGateway::with(short()).await;
    for flood in [
        h2::frame(h2::PING, 0, 0, b"abcdefgh"),
        h2::frame(h2::SETTINGS, 0, 0, &[]),
        h2::frame(h2::WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes()),
    ] {
        let mut peer = H2::connect(gateway.addr, &[]).await;
        let sending = async {
            // Ends when the server closes.
            while peer.send(&flood.repeat(16)).await {
                peer.discard(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(LONG, sending).await.expect("it is closed");
        gateway.is_well().await;
    }
}

#[tokio::test]
async fn rapid_resets_end_the_connection_and_leave_nothing() {
    let gateway = TestGateway::with(GatewayConfig::default()).await;
    let mut peer = H2::connect(gateway.addr, &[]).await;
    let body = hi(json!({})).to_string();
    let headers = h2::request("POST", CHAT, &[("content-type", "application/json")]);
    let mut sent = 0u32;
    let flood = async {
        loop {
            let mut burst = Vec::new();
            for _ in 0..16 {
                let stream = 2 * sent + 1;
                burst.extend(h2::frame(h2::HEADERS, h2::END_HEADERS, stream, &headers));
                burst.extend(h2::frame(h2::DATA, h2::END_STREAM, stream, body.as_bytes()));
                burst.extend(h2::frame(h2::RST_STREAM, 0, stream, &8u32.to_be_bytes()));
                sent += 1;
            }
            if !peer.send(&burst).await {
                return;
            }
            peer.discard(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONG, flood).await.expect("it is closed");
    let placed = gateway.backend.jobs.lock().unwrap().len();
    assert!(placed < 1000, "{placed} of {sent} were placed");
    let backend = &gateway.backend;
    backend
        .until("every one is settled", |backend| backend.records().len() == placed)
        .await;
    gateway.is_well().await;
}

#[tokio::test]
async fn a_client_that_answers_its_own_requests_may_go_on() {
    let gateway = TestGateway::start().await;
    let mut peer = H2::connect(gateway.addr, &[]).await;
    let headers = h2::request("GET", "/v1/models", &[]);
    for at in 0..600u32 {
        let stream = 2 * at + 1;
        assert!(
            peer.send(&h2::frame(
                h2::HEADERS,
                h2::END_HEADERS | h2::END_STREAM,
                stream,
                &headers
            ))
            .await
        );
        loop {
            let frame = peer.next().await.expect("it stays open");
            assert_ne!(frame.kind, h2::GOAWAY, "after {at}");
            if frame.stream == stream && frame.flags & h2::END_STREAM != 0 {
                break;
            }
        }
        if at % 3 == 0 {
            let update = h2::frame(h2::WINDOW_UPDATE, 0, 0, &4096u32.to_be_bytes());
            assert!(peer.send(&update).await);
        }
    }
}

/// The window of one stream stays shut while the connection is lively: the request is cancelled, the others go on.
#[tokio::test]
async fn a_stream_that_is_not_read_is_cancelled_alone() {
    let gateway = TestGateway::with(GatewayConfig {
        write_stall_ms_max: 300,
        ..GatewayConfig::default()
    })
    .await;
    gateway.backend.script(Script::SayThenHang(ids(&"x".repeat(100))));
    // SETTINGS_INITIAL_WINDOW_SIZE = 0.
    let mut peer = H2::connect(gateway.addr, &[(4, 0)]).await;
    let headers = h2::request("POST", CHAT, &[("content-type", "application/json")]);
    let body = hi(json!({"stream": true})).to_string();
    peer.send(&h2::frame(h2::HEADERS, h2::END_HEADERS, 1, &headers)).await;
    peer.send(&h2::frame(h2::DATA, h2::END_STREAM, 1, body.as_bytes()))
        .await;
    let backend = gateway.backend.clone();
    let cancelled = backend.until("cancelled", |backend| backend.cancelled.load(Ordering::SeqCst) == 1);
    let chatter = async {
        loop {
            peer.send(&h2::frame(h2::PING, 0, 0, b"abcdefgh")).await;
            peer.discard(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = cancelled => {}
        () = chatter => {}
    }
    backend.until("settled", |backend| backend.records().len() == 1).await;
    // The connection is as good as before.
    let window = h2::frame(h2::SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255]);
    peer.send(&window).await;
    let headers = h2::request("GET", "/v1/models", &[]);
    peer.send(&h2::frame(h2::HEADERS, h2::END_HEADERS | h2::END_STREAM, 3, &headers))
        .await;
    loop {
        let frame = peer.next().await.expect("it stays open");
        if frame.stream == 3 && frame.flags & h2::END_STREAM != 0 {
            break;
        }
    }
}

#[tokio::test]
async fn header_bombs_and_broken_frames_end_only_their_connection() {
    let gateway = TestGateway::with(short()).await;
    let get = h2::request("GET", "/v1/models", &[]);
    let long = "x".repeat(120);
    let big = h2::block(&vec![("x-big", long.as_str()); 1000]);
    let attacks: [Vec<u8>; 9] = [
        // A head that never ends.
        [
            h2::frame(h2::HEADERS, 0, 1, &get),
            h2::frame(h2::CONTINUATION, 0, 1, &h2::block(&[("x", "y")])).repeat(20_000),
        ]
        .concat(),
        // More headers than fit.
        [
            h2::frame(h2::HEADERS, 0, 1, &get),
            big.chunks(16_000)
                .flat_map(|chunk| h2::frame(h2::CONTINUATION, 0, 1, chunk))
                .collect(),
            h2::frame(h2::CONTINUATION, h2::END_HEADERS, 1, &[]),
        ]
        .concat(),
        // Nothing, a lot of it.
        [
            h2::frame(h2::HEADERS, h2::END_HEADERS, 1, &h2::request("POST", CHAT, &[])),
            h2::frame(h2::DATA, 0, 1, &[]).repeat(50_000),
        ]
        .concat(),
        // Windows beyond 2^31.
        h2::frame(h2::WINDOW_UPDATE, 0, 0, &0x7fff_ffffu32.to_be_bytes()).repeat(3),
        h2::frame(h2::WINDOW_UPDATE, 0, 0, &0u32.to_be_bytes()),
        // Frames of a wrong size, on wrong streams, of unknown kinds.
        h2::frame(h2::PING, 0, 0, b"short"),
        h2::frame(h2::DATA, 0, 77, b"x"),
        h2::frame(h2::HEADERS, h2::END_HEADERS, 2, &get),
        vec![0xff; 4096],
    ];
    for attack in attacks {
        let mut peer = H2::connect(gateway.addr, &[]).await;
        peer.send(&attack).await;
        // Closed at once, or when it is found to be silent.
        peer.rest().await;
        gateway.is_well().await;
    }
}

#[tokio::test]
async fn bodies_that_come_a_byte_at_a_time_are_given_up() {
    let config = GatewayConfig {
        api_key: Some(support::OPERATOR.into()),
        ..short()
    };
    let backend = Arc::new(support::MockBackend::default());
    assert!(backend.store.set(Arc::default()).is_ok());
    let gateway = TestGateway::over(config, backend).await;
    // Read by the chat handler, and by an extractor of the framework.
    for (path, expected) in [(CHAT, "408"), ("/v1/organization/projects", "400")] {
        let mut wire = gateway.connect().await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
             content-length: 100000\r\n\r\n",
            support::OPERATOR
        );
        wire.stream.write_all(head.as_bytes()).await.unwrap();
        let (mut read, mut write) = wire.stream.into_split();
        let dripping = tokio::spawn(async move {
            while write.write_all(b" ").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let mut answer = String::new();
        let reading = read.read_to_string(&mut answer);
        let _ = tokio::time::timeout(LONG, reading).await.expect("it is given up");
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{path}: {answer}");
        dripping.abort();
    }
}

#[tokio::test]
async fn chunked_encoding_is_read_to_the_letter() {
    let gateway = TestGateway::with(short()).await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n");
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n");
    let long_extension = format!("{chunked}1;{}\r\n \r\n0\r\n\r\n", "x".repeat(100_000));
    let many_trailers = format!("{chunked}0\r\n{}\r\n", "x-t: 1\r\n".repeat(20_000));
    for attack in [
        // A size that wraps, is negative, is none, is followed by something else than a line's end.
        format!("{chunked}ffffffffffffffff\r\n"),
        format!("{chunked}fffffffffffffffff1\r\n"),
        format!("{chunked}-1\r\n"),
        format!("{chunked}0x5\r\nhello\r\n"),
        format!("{chunked}5\r\nhelloXX"),
        format!("{chunked}\r\n\r\n"),
        long_extension,
        many_trailers,
        // Two opinions on where the body ends.
        format!("{head}content-length: 5\r\ncontent-length: 6\r\n\r\nhello"),
        format!("{head}content-length: -5\r\n\r\nhello"),
        format!("{head}transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        format!("{head}transfer-encoding: identity\r\n\r\nhello"),
        // Heads that hide others.
        format!("{head} folded: 1\r\n\r\n"),
        format!("{head}x: a\rb\r\n\r\n"),
        format!("{head}x\0y: 1\r\n\r\n"),
        "GET /health HTTP/1.1\r\n\r\n".replace("HTTP/1.1", "HTTP/9.9"),
    ] {
        let mut wire = gateway.connect().await;
        let _ = wire.stream.write_all(attack.as_bytes()).await;
        let mut answer = Vec::new();
        let reading = wire.stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(LONG, reading).await.expect("it is closed");
        let answer = String::from_utf8_lossy(&answer);
        let shown: String = attack.chars().take(200).collect();
        let ok = answer.is_empty() || answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.0 4");
        assert!(ok, "{shown:?}: {answer}");
        assert_eq!(
            answer.matches("HTTP/1.1 ").count(),
            usize::from(!answer.is_empty()),
            "{shown:?}: {answer}"
        );
    }
    // Both a length and chunks: the chunks count, and what follows is not another request.
    let body = hi(json!({})).to_string();
    let smuggled = format!(
        "{head}content-length: 4\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    );
    let mut wire = gateway.connect().await;
    wire.stream.write_all(smuggled.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let _ = tokio::time::timeout(LONG, wire.stream.read_to_string(&mut answer))
        .await
        .unwrap();
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    assert!(gateway.backend.jobs.lock().unwrap().len() <= 1);
    gateway.is_well().await;
}

#[tokio::test]
async fn one_address_cannot_take_all_places() {
    let config = GatewayConfig {
        trusted_clients: Vec::new(),
        connections_per_client_max: 3,
        requests_per_client_max: 1,
        ..GatewayConfig::default()
    };
    let gateway = TestGateway::with(config).await;
    gateway.backend.script(Script::SayThenHang(ids("x")));
    let mut busy = gateway.connect().await;
    busy.post(&hi(json!({"stream": true}))).await;
    busy.read_until("data:").await;
    let refused = gateway.get("/v1/models").await;
    assert_eq!(
        (refused.status, refused.error()["code"].as_str()),
        (429, Some("rate_limit_exceeded"))
    );
    assert!(refused.header("x-request-id").is_some() && refused.header("retry-after").is_some());
    assert_eq!(gateway.get("/health").await.status, 200, "probes are answered");

    let mut open = Vec::new();
    let status = loop {
        let mut wire = gateway.connect().await;
        wire.send("GET", "/health", &[], b"").await;
        let status = wire.answer().await.status;
        open.push(wire);
        if status != 200 {
            break status;
        }
        assert!(open.len() < 5);
    };
    assert_eq!(status, 503);
    drop((busy, open));
    gateway
        .backend
        .until("cancelled", |backend| backend.cancelled.load(Ordering::SeqCst) == 1)
        .await;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut wire = gateway.connect().await;
        wire.send("GET", "/v1/models", &[("connection", "close")], b"").await;
        if wire.answer().await.status == 200 {
            return;
        }
    }
    panic!("places do not come back");
}

#[tokio::test]
async fn all_requests_have_a_limit_together() {
    let gateway = TestGateway::with(GatewayConfig {
        requests_max: 1,
        ..GatewayConfig::default()
    })
    .await;
    gateway.backend.script(Script::Queue);
    let mut busy = gateway.connect().await;
    busy.post(&hi(json!({}))).await;
    gateway
        .backend
        .until("a job", |backend| !backend.jobs.lock().unwrap().is_empty())
        .await;
    assert_eq!(gateway.get("/metrics").await.status, 429);
    assert_eq!(gateway.get("/ready").await.status, 200);
    drop(busy);
    gateway
        .backend
        .until("left", |backend| backend.left.load(Ordering::SeqCst) == 1)
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    gateway.is_well().await;
}

/// A certificate of its own root for `localhost`, as files.
fn certificate(dir: &std::path::Path) -> (TlsConfig, String) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let config = TlsConfig {
        cert_file: dir.join("cert.pem"),
        key_file: dir.join("key.pem"),
        reload_ms: 20,
    };
    std::fs::write(&config.cert_file, made.cert.pem()).unwrap();
    std::fs::write(&config.key_file, made.signing_key.serialize_pem()).unwrap();
    (config, made.cert.pem())
}

type Secured = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

async fn shake(gateway: &TestGateway, root_pem: &str, alpn: &[u8], versions: Versions) -> std::io::Result<Secured> {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(root_pem.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = tokio::net::TcpStream::connect(gateway.addr).await?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector
        .connect(ServerName::try_from("localhost").unwrap(), stream)
        .await
}

const TLS12: Versions = &[&rustls::version::TLS12];

type Versions = &'static [&'static rustls::SupportedProtocolVersion];

async fn asks_health(stream: &mut Secured) -> String {
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(LONG, stream.read(&mut answer))
        .await
        .unwrap()
        .unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test]
async fn tls_with_a_certificate_that_changes_under_open_connections() {
    let dir = tempfile::tempdir().unwrap();
    let (tls, first) = certificate(dir.path());
    let gateway = TestGateway::with(GatewayConfig {
        tls: Some(tls),
        header_timeout_ms: 2_000,
        ..GatewayConfig::default()
    })
    .await;
    let mut open = shake(&gateway, &first, b"http/1.1", rustls::ALL_VERSIONS)
        .await
        .unwrap();
    assert_eq!(open.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert!(asks_health(&mut open).await.starts_with("HTTP/1.1 200"));
    let two = shake(&gateway, &first, b"h2", TLS12).await.unwrap();
    assert_eq!(two.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));

    let (_, second) = certificate(dir.path());
    let changed = async {
        while shake(&gateway, &second, b"http/1.1", rustls::ALL_VERSIONS)
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, changed)
        .await
        .expect("the new certificate is served");
    assert!(
        shake(&gateway, &first, b"http/1.1", rustls::ALL_VERSIONS)
            .await
            .is_err()
    );
    assert!(
        asks_health(&mut open).await.starts_with("HTTP/1.1 200"),
        "open connections go on"
    );

    // Plain HTTP is no TLS, and gets no answer in the clear.
    let mut plain = gateway.connect().await;
    plain
        .stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LONG, plain.stream.read_to_end(&mut answer))
        .await
        .unwrap();
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

#[tokio::test]
async fn a_handshake_that_does_not_come_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (tls, root) = certificate(dir.path());
    let gateway = TestGateway::with(GatewayConfig {
        tls: Some(tls),
        ..short()
    })
    .await;
    // Nothing; the start of a record; a record that is none.
    for bytes in [&b""[..], &[22, 3, 1, 2, 0, 1, 0, 1][..], &[22, 3, 1, 0xff, 0xff, 0][..]] {
        let mut wire = gateway.connect().await;
        wire.stream.write_all(bytes).await.unwrap();
        while wire.fill().await > 0 {}
    }
    let mut well = shake(&gateway, &root, b"http/1.1", rustls::ALL_VERSIONS).await.unwrap();
    assert!(asks_health(&mut well).await.starts_with("HTTP/1.1 200"));
}
