//! How fast rows are sealed, exported and verified, and how large an export is, on one core:
//!
//! ```console
//! $ cargo run --release -p baton-ledger --example speed -- 1000000
//! ```

use baton_ledger::checkpoint::SigningKey;
use baton_ledger::export::Format;
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, charge, checkpoint, prices, row, verify};
use baton_proto::state::{Checkpoint, LedgerRow, Price, UsageRecord, UsageStatus, ledger_row::Body};
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::time::Instant;

/// Rows of a period.
const PERIOD: u64 = 10_000;

fn record(n: u64, price: &Price) -> UsageRecord {
    UsageRecord {
        request_id: format!("chatcmpl-{n:032x}"),
        model: "meta-llama/Llama-3.1-70B-Instruct".into(),
        status: UsageStatus::Completed.into(),
        prompt_tokens: 1_000 + (n % 977) as u32,
        cached_tokens: (n % 513) as u32,
        completion_tokens: 1 + (n % 301) as u32,
        sampled_tokens: 1 + (n % 301) as u32,
        attempts: 1,
        prefill_worker_id: "prefill-3".into(),
        decode_worker_id: "decode-7".into(),
        started_unix_ms: 1_764_000_000_000 + n,
        settled_unix_ms: 1_764_000_002_000 + n,
        organization_id: "org-1".into(),
        project_id: format!("proj-{}", n % 50),
        key_id: format!("key-{}", n % 500),
        endpoint: "/v1/chat/completions".into(),
        service_tier: "default".into(),
        price_id: price.id.clone(),
        ..UsageRecord::default()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let count: u64 = std::env::args().nth(1).map_or(Ok(1_000_000), |text| text.parse())?;
    let price = prices::finish(Price {
        model: "*".into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        input_nano_per_mtok: 20_000_000_000,
        cached_input_nano_per_mtok: 5_000_000_000,
        output_nano_per_mtok: 80_000_000_000,
        ..Price::default()
    })?;
    let key = SigningKey::from_seed(&[1; 32]);
    let started = Instant::now();
    let (mut rows, mut checkpoints): (Vec<LedgerRow>, Vec<Checkpoint>) = (Vec::new(), Vec::new());
    let (mut previous, mut frontier) = (GENESIS, Frontier::new());
    for n in 1..=count {
        let record = record(n, &price);
        let charge = charge::of_record(&record, Some(&price))?;
        let row = row::seal(&previous, n, n, 1_764_000_000_000 + n, Body::Usage(record), charge);
        previous = row.hash.as_ref().try_into()?;
        frontier.push(&previous);
        rows.push(row);
        if n % PERIOD == 0 {
            let mut next = Checkpoint {
                first_sequence: n + 1 - PERIOD,
                last_sequence: n,
                merkle_root: std::mem::take(&mut frontier).root().to_vec().into(),
                last_hash: previous.to_vec().into(),
                at_unix_ms: n,
                previous_hash: checkpoints.last().map_or(GENESIS, checkpoint::hash).to_vec().into(),
                ..Checkpoint::default()
            };
            key.sign(&mut next);
            checkpoints.push(next);
        }
    }
    report("make records, charge, seal", count, started);
    for (name, format) in Format::ALL {
        let path = std::env::temp_dir().join(format!("baton-ledger-speed-{}.{name}", std::process::id()));
        let started = Instant::now();
        let mut export = format.writer(BufWriter::with_capacity(1 << 20, File::create(&path)?))?;
        export.price(&price)?;
        let mut sealed = checkpoints.iter().peekable();
        for row in &rows {
            export.row(row)?;
            while let Some(checkpoint) = sealed.next_if(|checkpoint| checkpoint.last_sequence == row.sequence) {
                export.checkpoint(checkpoint)?;
            }
        }
        export.finish()?;
        report(&format!("export {name}"), count, started);
        println!("    {} bytes per row", std::fs::metadata(&path)?.len() / count.max(1));
        if format == Format::Jsonl {
            let started = Instant::now();
            let verified = verify::verify(
                BufReader::with_capacity(1 << 20, File::open(&path)?),
                vec![key.public_key()],
            )?;
            report("verify", verified.last, started);
        }
        std::fs::remove_file(&path)?;
    }
    Ok(())
}

fn report(what: &str, count: u64, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{what}: {count} rows in {seconds:.2} s, {:.0} rows/s",
        count as f64 / seconds
    );
}
