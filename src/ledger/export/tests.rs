//! The export against a server of pages: whole files that verify, a feed that lies, a cluster that is away.

use super::*;
use baton_ledger::checkpoint::SigningKey;
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, charge, prices, row};
use baton_proto::state::{Checkpoint, LedgerRow, Price, UsageRecord, UsageStatus, ledger_row::Body};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Rows of the ledger served.
const ROWS: u64 = 25;

struct Ledger {
    rows: Vec<LedgerRow>,
    price: Price,
    checkpoint: Checkpoint,
}

fn ledger() -> Ledger {
    let price = Price {
        model: "demo".into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        output_nano_per_mtok: 7_000_000,
        ..Price::default()
    };
    let price = prices::finish(price).expect("valid");
    let (mut rows, mut frontier, mut previous) = (Vec::new(), Frontier::new(), GENESIS);
    for n in 1..=ROWS {
        let record = UsageRecord {
            request_id: format!("chatcmpl-{n}"),
            model: "demo".into(),
            status: UsageStatus::Completed.into(),
            completion_tokens: u32::try_from(n).expect("small"),
            price_id: price.id.clone(),
            ..UsageRecord::default()
        };
        let charge = charge::of_record(&record, Some(&price)).expect("in range");
        let row = row::seal(&previous, n, n, n, Body::Usage(record), charge);
        previous = row.hash.as_ref().try_into().expect("32 bytes");
        frontier.push(&previous);
        rows.push(row);
    }
    let mut checkpoint = Checkpoint {
        first_sequence: 1,
        last_sequence: ROWS,
        merkle_root: frontier.root().to_vec().into(),
        last_hash: previous.to_vec().into(),
        at_unix_ms: ROWS,
        previous_hash: GENESIS.to_vec().into(),
        ..Checkpoint::default()
    };
    SigningKey::from_seed(&[7; 32]).sign(&mut checkpoint);
    Ledger {
        rows,
        price,
        checkpoint,
    }
}

/// Serves pages of ten rows on a free port, after refusing `busy` times; counts requests.
async fn serve(ledger: Ledger, busy: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => break,
                }
            }
            let text = String::from_utf8_lossy(&request).into_owned();
            let number = |name: &str| -> u64 {
                let rest = text.split(&format!("{name}=")).nth(1).expect("in the query");
                rest.split(|c: char| !c.is_ascii_digit())
                    .next()
                    .and_then(|digits| digits.parse().ok())
                    .expect("a number")
            };
            let (status, body) = if counter.fetch_add(1, Ordering::Relaxed) < busy {
                ("503 Service Unavailable", "{}".to_owned())
            } else {
                let query = feed::Query {
                    after: number("after"),
                    checkpoints_after: Some(number("checkpoints_after")),
                    limit: Some(10),
                };
                let rows = ledger.rows.iter().filter(|row| row.sequence > query.after).cloned();
                let page = feed::page(
                    &query,
                    rows,
                    |_| Some(ledger.price.clone()),
                    [ledger.checkpoint.clone()],
                    ROWS,
                );
                ("200 OK", serde_json::to_string(&page).expect("plain data"))
            };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    (url, asked)
}

fn args(url: &str, output: &std::path::Path) -> ExportArgs {
    ExportArgs {
        remote: Remote {
            url: url.to_owned(),
            api_key: None,
        },
        format: Format::Jsonl,
        output: Some(output.to_owned()),
        from: 1,
        follow: false,
        postgres: None,
        postgres_ca: None,
    }
}

#[tokio::test]
async fn a_file_is_written_that_verifies_and_proves() {
    let directory = tempfile::tempdir().expect("a directory");
    let (url, asked) = serve(ledger(), 0).await;
    let path = directory.path().join("ledger.jsonl");
    let args = args(&url, &path);
    to_file(&args, &Feed::new(&args.remote).expect("an address"))
        .await
        .expect("exported");
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    let key = SigningKey::from_seed(&[7; 32]).public_key();
    let open = || File::open(&path).map(std::io::BufReader::new);
    let report = baton_ledger::verify::verify(open().expect("there"), vec![key]).expect("honest");
    assert_eq!(
        (report.last, report.signed_through, report.complete),
        (ROWS, ROWS, true)
    );
    let proof = baton_ledger::proof::prove(open, "chatcmpl-17").expect("sealed");
    assert_eq!(baton_ledger::proof::check(&proof, &[key]).expect("honest").sequence, 17);
    // From the middle, in another format: the header line and five rows.
    let args = ExportArgs {
        from: 21,
        format: Format::Csv,
        ..args
    };
    to_file(&args, &Feed::new(&args.remote).expect("an address"))
        .await
        .expect("exported");
    assert_eq!(std::fs::read_to_string(&path).expect("there").lines().count(), 1 + 5);
}

#[tokio::test]
async fn a_feed_that_lies_ends_the_export() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut ledger = ledger();
    ledger.rows[13].at_unix_ms += 1;
    let (url, _) = serve(ledger, 0).await;
    let args = args(&url, &directory.path().join("ledger.jsonl"));
    let error = to_file(&args, &Feed::new(&args.remote).expect("an address"))
        .await
        .expect_err("a lie");
    assert!(error.to_string().contains("row 14"), "{error}");
}

#[tokio::test]
async fn only_follow_is_patient() {
    let directory = tempfile::tempdir().expect("a directory");
    let (url, _) = serve(ledger(), 1).await;
    let args = args(&url, &directory.path().join("ledger.jsonl"));
    let feed = Feed::new(&args.remote).expect("an address");
    let error = to_file(&args, &feed).await.expect_err("busy once");
    assert!(error.to_string().contains("no rows from"), "{error}");
    let mut patience = Patience::new(true);
    assert!(patience.wait(Trouble::Lasting(anyhow!("wrong"))).await.is_err());
}
