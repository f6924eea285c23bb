//! redb against fjall under the few operations of a Raft member: append a batch of log entries with one fsync, apply it
//! (two keys per command, a hash, an index) without one, and now and then delete the log's oldest entries.
//!
//! ```console
//! $ cargo run --release --manifest-path scripts/bench/store_engines/Cargo.toml -- DIR
//! ```
//!
//! Prints a line per engine and batch size. docs/group.md says what came of it.

use std::path::Path;
use std::time::{Duration, Instant};

const ENTRY_BYTES: usize = 300;
const RECORD_BYTES: usize = 260;
const KEEP: u64 = 4096;
const SECONDS: u64 = 4;

type Failure = Box<dyn std::error::Error>;

trait Engine {
    fn append(&mut self, first: u64, count: u64) -> Result<(), Failure>;
    fn apply(&mut self, first: u64, count: u64) -> Result<(), Failure>;
    fn compact(&mut self, from: u64, to: u64) -> Result<(), Failure>;
}

/// A name that is not in the order of its number, as request ids are not.
fn name(number: u64) -> [u8; 17] {
    let mut name = [4; 17];
    name[1..9].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    name
}

fn numbered(number: u64) -> [u8; 9] {
    let mut key = [3; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

const LOG: redb::TableDefinition<u64, &[u8]> = redb::TableDefinition::new("log");
const META: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("meta");
const STATE: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("state");

struct Redb(redb::Database);

impl Engine for Redb {
    fn append(&mut self, first: u64, count: u64) -> Result<(), Failure> {
        let txn = self.0.begin_write()?;
        {
            let mut log = txn.open_table(LOG)?;
            for index in first..first + count {
                log.insert(index, [7u8; ENTRY_BYTES].as_slice())?;
            }
        }
        Ok(txn.commit()?)
    }

    fn apply(&mut self, first: u64, count: u64) -> Result<(), Failure> {
        let mut txn = self.0.begin_write()?;
        txn.set_durability(redb::Durability::None)?;
        {
            let mut state = txn.open_table(STATE)?;
            for index in first..first + count {
                state.insert(numbered(index).as_slice(), [7u8; RECORD_BYTES].as_slice())?;
                state.insert(name(index).as_slice(), index.to_le_bytes().as_slice())?;
                state.insert([1u8].as_slice(), [7u8; 32].as_slice())?;
            }
            let mut meta = txn.open_table(META)?;
            meta.insert("applied", first.to_le_bytes().as_slice())?;
            meta.insert("hard_state", [7u8; 12].as_slice())?;
        }
        Ok(txn.commit()?)
    }

    fn compact(&mut self, from: u64, to: u64) -> Result<(), Failure> {
        let mut txn = self.0.begin_write()?;
        txn.set_durability(redb::Durability::None)?;
        txn.open_table(LOG)?.retain_in(from..to, |_, _| false)?;
        Ok(txn.commit()?)
    }
}

struct Fjall {
    keyspace: fjall::Keyspace,
    log: fjall::PartitionHandle,
    meta: fjall::PartitionHandle,
    state: fjall::PartitionHandle,
}

impl Engine for Fjall {
    fn append(&mut self, first: u64, count: u64) -> Result<(), Failure> {
        let mut batch = self.keyspace.batch().durability(Some(fjall::PersistMode::SyncData));
        for index in first..first + count {
            batch.insert(&self.log, index.to_be_bytes(), [7u8; ENTRY_BYTES]);
        }
        Ok(batch.commit()?)
    }

    fn apply(&mut self, first: u64, count: u64) -> Result<(), Failure> {
        let mut batch = self.keyspace.batch();
        for index in first..first + count {
            batch.insert(&self.state, numbered(index), [7u8; RECORD_BYTES]);
            batch.insert(&self.state, name(index), index.to_le_bytes());
        }
        batch.insert(&self.state, [1u8], [7u8; 32]);
        batch.insert(&self.meta, "applied", first.to_le_bytes());
        batch.insert(&self.meta, "hard_state", [7u8; 12]);
        Ok(batch.commit()?)
    }

    fn compact(&mut self, from: u64, to: u64) -> Result<(), Failure> {
        let mut batch = self.keyspace.batch();
        for index in from..to {
            batch.remove(&self.log, index.to_be_bytes());
        }
        Ok(batch.commit()?)
    }
}

fn measure(what: &str, engine: &mut dyn Engine, count: u64) -> Result<(), Failure> {
    let (mut next, mut kept, mut batches) = (1, 1, 0u64);
    let (mut append, mut apply) = (Duration::ZERO, Duration::ZERO);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(SECONDS) {
        let at = Instant::now();
        engine.append(next, count)?;
        append += at.elapsed();
        let at = Instant::now();
        engine.apply(next, count)?;
        apply += at.elapsed();
        next += count;
        batches += 1;
        if next - kept > KEEP + KEEP / 4 {
            engine.compact(kept, next - KEEP)?;
            kept = next - KEEP;
        }
    }
    let millis = |time: Duration| time.as_secs_f64() * 1e3 / batches as f64;
    println!(
        "{what:6} batch {count:5}: {:8.0} commits/s, append {:.3} ms, apply {:.3} ms",
        (next - 1) as f64 / began.elapsed().as_secs_f64(),
        millis(append),
        millis(apply)
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    let dir = std::env::args().nth(1).ok_or("name a folder on the disk to be measured")?;
    let dir = Path::new(&dir).join(format!("store-engines-{}", std::process::id()));
    for count in [1, 64, 1024] {
        std::fs::create_dir_all(&dir)?;
        let database = redb::Builder::new().set_cache_size(32 << 20).create(dir.join("redb"))?;
        measure("redb", &mut Redb(database), count)?;
        let keyspace = fjall::Config::new(dir.join("fjall")).cache_size(32 << 20).open()?;
        let partition = |name| keyspace.open_partition(name, fjall::PartitionCreateOptions::default());
        let (log, meta, state) = (partition("log")?, partition("meta")?, partition("state")?);
        let mut fjall = Fjall { log, meta, state, keyspace };
        measure("fjall", &mut fjall, count)?;
        drop(fjall);
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(())
}
