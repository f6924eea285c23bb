//! Files: what names the chunks that lie on the members' disks. A chunk is needed as long as an entry here names it; who
//! keeps the bytes, and how many copies there are, is the coordinators' business.
//!
//! Totals of files and bytes are kept by owner and for all. The limits come with the command: they are settings, and the
//! state machine knows none.

use crate::bounds::{self, CHUNK_BYTES_MAX, FILE_CHUNKS_MAX};
use crate::keys::{self, Key};
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::{TablesError, TablesMut as _};
use crate::view;
use baton_proto::state::{DeleteFile, File, FileChunk, FileTotals, PutFile};

pub(crate) fn put(machine: &mut Machine<'_>, command: PutFile) -> Handled {
    let Some(file) = command.file else {
        return Err(Refused::invalid("a file is missing").into());
    };
    bounds::name("the file's id", &file.id)?;
    bounds::name("the file's owner", &file.owner)?;
    bounds::text("the file's name", &file.filename)?;
    bounds::text("the file's purpose", &file.purpose)?;
    if command.chunks.len() > FILE_CHUNKS_MAX || file.chunks as usize != command.chunks.len() {
        return Err(Refused::invalid(format!(
            "a file has at most {FILE_CHUNKS_MAX} chunks, all of which are named"
        ))
        .into());
    }
    for chunk in &command.chunks {
        check_chunk(chunk)?;
    }
    if command.chunks.iter().map(|chunk| chunk.bytes).sum::<u64>() != file.bytes {
        return Err(Refused::invalid("a file has the bytes of its chunks").into());
    }
    if let Some(known) = view::file(machine, &file.id)? {
        // Its time may have been prolonged meanwhile.
        return if known.owner == file.owner && known.bytes == file.bytes {
            Ok(Applied::Stands { changed: false })
        } else {
            Err(Refused::fixed("file", &file.id, "the content").into())
        };
    }
    let too_many = |what, max| Refused::TooMany { what, max };
    let owned = view::owner_totals(machine, &file.owner)?;
    if owned.files >= command.owner_files_max {
        return Err(too_many("files of this project", command.owner_files_max).into());
    }
    if owned.bytes.saturating_add(file.bytes) > command.owner_bytes_max {
        return Err(too_many("bytes in files of this project, or nearly", command.owner_bytes_max).into());
    }
    if view::file_totals(machine)?.bytes.saturating_add(file.bytes) > command.bytes_max {
        return Err(too_many("bytes in files of this cluster, or nearly", command.bytes_max).into());
    }
    for (number, chunk) in command.chunks.iter().enumerate() {
        machine.put_message(&view::chunk_key(&file.id, number as u64), chunk)?;
    }
    insert(machine, &file)?;
    Ok(Applied::Stands { changed: true })
}

pub(crate) fn check_chunk(chunk: &FileChunk) -> Result<(), Refused> {
    bounds::exactly("a chunk's hash", &chunk.hash, 32)?;
    if chunk.bytes == 0 || chunk.bytes > CHUNK_BYTES_MAX {
        return Err(Refused::invalid(format!("a chunk has 1 to {CHUNK_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// Makes a file whose chunks are there.
pub(crate) fn insert(machine: &mut Machine<'_>, file: &File) -> Result<(), TablesError> {
    machine.put_message(&keys::named(keys::FILES, &file.id), file)?;
    machine.put(&owner_key(file), &[])?;
    if file.expires_unix_ms != 0 {
        machine.put(&due_key(file.expires_unix_ms, &file.id), &[])?;
    }
    add(machine, &file.owner, |totals| {
        totals.files += 1;
        totals.bytes = totals.bytes.saturating_add(file.bytes);
    })
}

pub(crate) fn delete(machine: &mut Machine<'_>, command: &DeleteFile) -> Handled {
    let file = view::file(machine, &command.id)?.filter(|file| file.owner == command.owner);
    let Some(file) = file else {
        return Ok(Applied::Removed { removed: false });
    };
    if let Some((batch_id, _)) = view::open_batches(machine)?
        .into_iter()
        .find(|(_, input)| *input == file.id)
    {
        return Err(Refused::FileInUse { id: file.id, batch_id }.into());
    }
    remove(machine, &file)?;
    Ok(Applied::Removed { removed: true })
}

pub(crate) fn expire(machine: &mut Machine<'_>, id: &str) -> Result<(), TablesError> {
    let file = view::file(machine, id)?;
    let file = file.ok_or_else(|| TablesError::Corrupt(format!("file {id} is due and missing")))?;
    remove(machine, &file)
}

fn remove(machine: &mut Machine<'_>, file: &File) -> Result<(), TablesError> {
    if file.expires_unix_ms != 0 {
        machine.delete(&due_key(file.expires_unix_ms, &file.id))?;
    }
    machine.delete(&owner_key(file))?;
    machine.delete(&keys::named(keys::FILES, &file.id))?;
    for number in 0..u64::from(file.chunks) {
        machine.delete(&view::chunk_key(&file.id, number))?;
    }
    add(machine, &file.owner, |totals| {
        totals.files -= 1;
        totals.bytes = totals.bytes.saturating_sub(file.bytes);
    })
}

/// Keeps a file at least until then.
pub(crate) fn keep_until(machine: &mut Machine<'_>, mut file: File, unix_ms: u64) -> Result<(), TablesError> {
    if file.expires_unix_ms == 0 || file.expires_unix_ms >= unix_ms {
        return Ok(());
    }
    machine.delete(&due_key(file.expires_unix_ms, &file.id))?;
    file.expires_unix_ms = unix_ms;
    machine.put(&due_key(unix_ms, &file.id), &[])?;
    machine.put_message(&keys::named(keys::FILES, &file.id), &file)
}

/// Changes the totals of an owner and those of all.
pub(crate) fn add(machine: &mut Machine<'_>, owner: &str, change: impl Fn(&mut FileTotals)) -> Result<(), TablesError> {
    let mut owned = view::owner_totals(machine, owner)?;
    let mut all = view::file_totals(machine)?;
    change(&mut owned);
    change(&mut all);
    machine.put_message(keys::FILE_TOTALS, &all)?;
    let key = keys::named(keys::OWNER_TOTALS, owner);
    if owned == FileTotals::default() {
        machine.delete(&key)
    } else {
        machine.put_message(&key, &owned)
    }
}

fn owner_key(file: &File) -> Vec<u8> {
    Key::of(keys::FILES_BY_OWNER)
        .text(&file.owner)
        .rest(file.id.as_bytes())
        .done()
}

/// Of a file or a batch.
pub(crate) fn due_key(unix_ms: u64, id: &str) -> Vec<u8> {
    Key::of(keys::FILES_DUE).number(unix_ms).rest(id.as_bytes()).done()
}
