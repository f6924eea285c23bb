//! `baton snapshot`: a backup of the coordinators' state over HTTP into a file, and a data directory from such a file.

use crate::cli::{SnapshotAction, SnapshotRestore, SnapshotSave};
use crate::up::print;
use anyhow::{Context, anyhow, bail};
use baton_loadtest::{Client, FailureKind, Target};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Longest wait for the next piece.
const PIECE_MAX: Duration = Duration::from_secs(60);
/// Length of the hash that ends a backup.
const HASH_BYTES: u64 = 32;

/// Saves or restores.
pub fn run(action: &SnapshotAction) -> anyhow::Result<ExitCode> {
    match action {
        SnapshotAction::Save(args) => save(args),
        SnapshotAction::Restore(args) => restore(args),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn save(args: &SnapshotSave) -> anyhow::Result<()> {
    let name = args.file.display();
    let mut partial = args.file.clone().into_os_string();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let url = &args.remote.url;
    let client = Client::new(Target::parse(url)?, args.remote.api_key.clone(), PIECE_MAX);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let saved = File::create(partial)
        .with_context(|| format!("cannot write {}", partial.display()))
        .and_then(|file| {
            let mut out = BufWriter::new(file);
            let downloaded = runtime.block_on(client.download("/cluster/snapshot", &mut out));
            let bytes = downloaded.map_err(|failure| match failure.kind {
                FailureKind::Connect => anyhow!("nothing answers at {url}; name a coordinator with --url or BATON_URL"),
                _ => anyhow!("no backup was taken: {}", failure.message),
            })?;
            out.flush()?;
            let file = out
                .into_inner()
                .map_err(|error| anyhow!("cannot write {name}: {error}"))?;
            file.sync_all()?;
            drop(file);
            check(partial)?;
            std::fs::rename(partial, &args.file).with_context(|| format!("cannot write {name}"))?;
            Ok(bytes)
        });
    match saved {
        Ok(bytes) => print(&format!("saved {bytes} bytes to {name}\n")),
        Err(error) => {
            let _ = std::fs::remove_file(partial);
            return Err(error);
        }
    }
    Ok(())
}

/// A backup ends with a hash of all before it.
fn check(path: &Path) -> anyhow::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let cut = || anyhow!("the backup came incomplete; try again");
    let contents = length.checked_sub(HASH_BYTES).ok_or_else(cut)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader((&mut file).take(contents))?;
    let mut told = Vec::new();
    file.seek(SeekFrom::Start(contents))?;
    file.read_to_end(&mut told)?;
    if told != hasher.finalize().as_bytes() {
        return Err(cut());
    }
    Ok(())
}

fn restore(args: &SnapshotRestore) -> anyhow::Result<()> {
    let file = File::open(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    if args.id == 0 {
        bail!("--id must not be 0");
    }
    let info = baton_coordinator::restore(&mut BufReader::new(file), &args.directory, args.id)?;
    print(&format!(
        "restored {} entries, up to log index {}, into {}, as the new group {}: members of the old one are refused\nstart \
         coordinator {} on it alone, with members = [] or only \
         itself; others join it with `baton coordinators add`\n",
        info.pairs,
        info.applied_index,
        args.directory.display(),
        baton_ledger::hex(&info.group),
        args.id
    ));
    Ok(())
}
