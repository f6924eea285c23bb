//! Batches: what each of their steps may do, and who may take it.
//!
//! ```text
//!             start              the last line is done        finish
//!  validating ────▶ in_progress ─────────────▶ finalizing ─────────▶ completed
//!      │ │               │ └── finish, after 24 h ──▶ expired           (and from validating)
//!      │ └─ fail ▶ failed
//!      └─ cancel ─▶ cancelling ── finish ──▶ cancelled
//! ```
//!
//! A *claim* is the right to take steps: one member's, under an id chosen for it, with a lease in replicated time. It is over
//! when the lease is, when it is given up, or when the same member claims anew, because that member has then started again.
//! Steps of another claim are refused, so two members that both believe to run a batch do no harm.
//!
//! Invariants: a line is told done once; completed + failed = lines that are done ≤ total; the chunks of the files that a
//! batch writes are those told with its steps; what is over never changes; an open batch's input stays.

use crate::bounds::{
    self, BATCH_ERRORS_MAX, BATCH_LABEL_BYTES_MAX, BATCH_LABELS_MAX, BATCH_LINES_MAX, BATCH_STEP_LINES_MAX,
    BATCHES_OPEN_MAX, BATCHES_PER_OWNER_MAX, CHUNK_BYTES_MAX, OUTPUT_CHUNKS_MAX,
};
use crate::files;
use crate::keys::{self, Key};
use crate::machine::{Handled, Machine, Stop};
use crate::outcome::{Applied, Refused};
use crate::tables::{Tables as _, TablesError, TablesMut as _};
use crate::view;
use baton_proto::state::{
    AdvanceBatch, Batch, BatchAppend, BatchOutput, BatchRunner, BatchStatus, CancelBatch, ClaimBatch, FailBatch, File,
    FinishBatch, PutBatch, StartBatch,
};
use std::ops::ControlFlow;

/// Ids of batches begin so, which tells them from those of files.
pub(crate) const ID_PREFIX: &str = "batch_";
/// Time that a batch has, in milliseconds: OpenAI's only choice.
pub const BATCH_WINDOW_MS: u64 = 86_400_000;
/// How long a batch that is over is remembered, in milliseconds of replicated time.
pub const BATCH_KEPT_MS: u64 = 90 * 86_400_000;
/// Longest lease of a claim: a member that dies keeps a batch from the others no longer.
const LEASE_MS_MAX: u64 = 120_000;
/// An input file is kept this long beyond its batch's window, so that lines which ran out of time can still be named.
const INPUT_KEPT_MS: u64 = 86_400_000;
/// The purpose of an input file, and of what a batch writes.
const INPUT_PURPOSE: &str = "batch";
const OUTPUT_PURPOSE: &str = "batch_output";

/// A status as the API says it.
pub fn status_name(status: BatchStatus) -> &'static str {
    match status {
        BatchStatus::Unspecified => "unknown",
        BatchStatus::Validating => "validating",
        BatchStatus::InProgress => "in_progress",
        BatchStatus::Finalizing => "finalizing",
        BatchStatus::Completed => "completed",
        BatchStatus::Failed => "failed",
        BatchStatus::Expired => "expired",
        BatchStatus::Cancelling => "cancelling",
        BatchStatus::Cancelled => "cancelled",
    }
}

pub(crate) fn put(machine: &mut Machine<'_>, command: PutBatch) -> Handled {
    let Some(asked) = command.batch else {
        return Err(Refused::invalid("a batch is missing").into());
    };
    let batch = fresh(machine, asked)?;
    if let Some(known) = view::batch(machine, &batch.id)? {
        return if (&known.owner, &known.input_file_id) == (&batch.owner, &batch.input_file_id) {
            Ok(Applied::Stands { changed: false })
        } else {
            Err(Refused::fixed("batch", &batch.id, "what it runs").into())
        };
    }
    let input = view::file(machine, &batch.input_file_id)?;
    let input = input.filter(|file| {
        file.owner == batch.owner && (file.expires_unix_ms == 0 || file.expires_unix_ms > machine.now_ms)
    });
    let Some(input) = input else {
        return Err(Refused::unknown("file", &batch.input_file_id).into());
    };
    if input.purpose != INPUT_PURPOSE {
        return Err(Refused::invalid("the input file was not uploaded with the purpose \"batch\"").into());
    }
    let owned = view::owner_totals(machine, &batch.owner)?;
    let too_many = |what, max| Refused::TooMany { what, max };
    if owned.open_batches >= command.owner_open_max {
        return Err(too_many("batches of this project that are not over", command.owner_open_max).into());
    }
    if view::file_totals(machine)?.open_batches >= BATCHES_OPEN_MAX {
        return Err(too_many("batches of this cluster that are not over", BATCHES_OPEN_MAX).into());
    }
    if owned.batches >= BATCHES_PER_OWNER_MAX {
        forget_oldest(machine, &batch.owner)?;
    }
    files::keep_until(machine, input, batch.expires_unix_ms.saturating_add(INPUT_KEPT_MS))?;
    machine.put(&owner_key(&batch), &[])?;
    machine.put(
        &keys::named(keys::BATCHES_OPEN, &batch.id),
        batch.input_file_id.as_bytes(),
    )?;
    save(machine, &batch)?;
    files::add(machine, &batch.owner, |totals| {
        totals.batches += 1;
        totals.open_batches += 1;
    })?;
    Ok(Applied::Stands { changed: true })
}

/// The batch as it begins, checked.
fn fresh(machine: &Machine<'_>, asked: Batch) -> Result<Batch, Refused> {
    let files = [asked.output, asked.errors_output].map(|output| output.unwrap_or_default().file_id);
    let [output, errors] = files;
    for (what, text) in [
        ("the batch's id", &asked.id),
        ("the batch's owner", &asked.owner),
        ("the endpoint", &asked.endpoint),
        ("the input file's id", &asked.input_file_id),
        ("the output file's id", &output),
        ("the error file's id", &errors),
    ] {
        bounds::name(what, text)?;
    }
    bounds::text("the key's id", &asked.key_id)?;
    if !asked.id.starts_with(ID_PREFIX)
        || output == errors
        || [&output, &errors].iter().any(|id| id.starts_with(ID_PREFIX))
    {
        return Err(Refused::invalid("the ids of a batch and its files are not such"));
    }
    if asked.metadata.len() > BATCH_LABELS_MAX
        || asked
            .metadata
            .iter()
            .any(|label| label.key.len().max(label.value.len()) > BATCH_LABEL_BYTES_MAX)
    {
        return Err(Refused::invalid(format!(
            "a batch has at most {BATCH_LABELS_MAX} labels, of at most {BATCH_LABEL_BYTES_MAX} bytes"
        )));
    }
    let to = |file_id| {
        Some(BatchOutput {
            file_id,
            ..BatchOutput::default()
        })
    };
    Ok(Batch {
        id: asked.id,
        owner: asked.owner,
        key_id: asked.key_id,
        endpoint: asked.endpoint,
        input_file_id: asked.input_file_id,
        metadata: asked.metadata,
        output_expires_after_s: asked.output_expires_after_s,
        status: BatchStatus::Validating.into(),
        created_unix_ms: machine.now_ms,
        expires_unix_ms: machine.now_ms.saturating_add(BATCH_WINDOW_MS),
        output: to(output),
        errors_output: to(errors),
        ..Batch::default()
    })
}

pub(crate) fn claim(machine: &mut Machine<'_>, command: ClaimBatch) -> Handled {
    bounds::name("the claim's id", &command.claim_id)?;
    let mut batch = open(machine, &command.batch_id)?;
    let other = batch.runner.as_ref().is_some_and(|runner| {
        runner.claim_id != command.claim_id
            && runner.member_id != command.member_id
            && machine.now_ms < runner.lease_until_unix_ms
    });
    if other {
        let batch_id = batch.id;
        return Err(Refused::ClaimedByOther { batch_id }.into());
    }
    batch.runner = (command.lease_ms > 0).then(|| BatchRunner {
        member_id: command.member_id,
        claim_id: command.claim_id,
        lease_until_unix_ms: lease_until(machine, command.lease_ms),
    });
    save(machine, &batch)?;
    Ok(Applied::Stands { changed: true })
}

pub(crate) fn start(machine: &mut Machine<'_>, command: StartBatch) -> Handled {
    bounds::text("the model", &command.model)?;
    let mut batch = claimed(machine, &command.batch_id, &command.claim_id)?;
    if command.total == 0 || command.total > BATCH_LINES_MAX {
        return Err(Refused::invalid(format!("a batch has 1 to {BATCH_LINES_MAX} lines")).into());
    }
    match batch.status() {
        BatchStatus::InProgress if batch.total == command.total => return Ok(Applied::Stands { changed: false }),
        BatchStatus::Validating => {}
        _ => return Err(wrong_status(&batch)),
    }
    batch.set_status(BatchStatus::InProgress);
    batch.in_progress_unix_ms = machine.now_ms;
    batch.total = command.total;
    batch.model = command.model;
    save(machine, &batch)?;
    Ok(Applied::Stands { changed: true })
}

pub(crate) fn fail(machine: &mut Machine<'_>, command: FailBatch) -> Handled {
    if command.errors.len() > BATCH_ERRORS_MAX {
        return Err(Refused::invalid(format!("at most {BATCH_ERRORS_MAX} errors are kept")).into());
    }
    for error in &command.errors {
        for text in [&error.code, &error.message, &error.param] {
            bounds::text("an error of a batch", text)?;
        }
    }
    let mut batch = claimed(machine, &command.batch_id, &command.claim_id)?;
    if batch.status() != BatchStatus::Validating {
        return Err(wrong_status(&batch));
    }
    batch.errors = command.errors;
    end(machine, batch, BatchStatus::Failed)
}

pub(crate) fn advance(machine: &mut Machine<'_>, command: AdvanceBatch) -> Handled {
    let mut batch = claimed(machine, &command.batch_id, &command.claim_id)?;
    if command.sequence == batch.advances && command.sequence > 0 {
        return Ok(Applied::Stands { changed: false });
    }
    if !matches!(batch.status(), BatchStatus::InProgress | BatchStatus::Cancelling) {
        return Err(wrong_status(&batch));
    }
    if command.sequence != batch.advances + 1 {
        return Err(Refused::invalid("steps of a batch follow one another").into());
    }
    let done = mark(view::batch_done(machine, &batch.id)?, &batch, &command)?;
    let mut outputs = [batch.output.take(), batch.errors_output.take()].map(Option::unwrap_or_default);
    let appends = [&command.output, &command.errors_output];
    for (output, append) in outputs.iter().zip(appends) {
        check_append(output, append.as_ref())?;
    }
    for (output, append) in outputs.iter_mut().zip(appends) {
        if let Some(BatchAppend {
            chunk: Some(chunk),
            replaces_last,
        }) = append
        {
            let replaced = if *replaces_last { output.last_bytes } else { 0 };
            output.chunks += u32::from(!replaces_last);
            output.bytes = output.bytes + chunk.bytes - replaced;
            output.last_bytes = chunk.bytes;
            machine.put_message(&view::chunk_key(&output.file_id, u64::from(output.chunks) - 1), chunk)?;
        }
    }
    let [output, errors_output] = outputs;
    batch.output = Some(output);
    batch.errors_output = Some(errors_output);
    batch.advances = command.sequence;
    batch.completed += command.completed;
    batch.failed += command.failed;
    batch.input_tokens = batch.input_tokens.saturating_add(command.input_tokens);
    batch.cached_tokens = batch.cached_tokens.saturating_add(command.cached_tokens);
    batch.output_tokens = batch.output_tokens.saturating_add(command.output_tokens);
    batch.reasoning_tokens = batch.reasoning_tokens.saturating_add(command.reasoning_tokens);
    if batch.status() == BatchStatus::InProgress && batch.completed + batch.failed == batch.total {
        batch.set_status(BatchStatus::Finalizing);
        batch.finalizing_unix_ms = machine.now_ms;
    }
    if let Some(runner) = &mut batch.runner {
        let until = machine.now_ms.saturating_add(command.lease_ms.min(LEASE_MS_MAX));
        runner.lease_until_unix_ms = runner.lease_until_unix_ms.max(until);
    }
    machine.put(&keys::named(keys::BATCH_DONE, &batch.id), &done)?;
    save(machine, &batch)?;
    Ok(Applied::Stands { changed: true })
}

/// The lines that are done with this step, none of them twice.
fn mark(mut done: Vec<u8>, batch: &Batch, command: &AdvanceBatch) -> Result<Vec<u8>, Refused> {
    let lines = &command.lines;
    if lines.len() > BATCH_STEP_LINES_MAX || !lines.is_sorted_by(|a, b| a < b) {
        return Err(Refused::invalid(format!(
            "a step has at most {BATCH_STEP_LINES_MAX} lines, in order"
        )));
    }
    if lines.len() as u64 != u64::from(command.completed) + u64::from(command.failed) {
        return Err(Refused::invalid("each line of a step is completed or failed"));
    }
    if lines.last().is_some_and(|line| *line >= batch.total) {
        return Err(Refused::invalid("a step has a line that the batch has not"));
    }
    done.resize(batch.total.div_ceil(8) as usize, 0);
    for line in lines {
        let (byte, bit) = ((line / 8) as usize, 1 << (line % 8));
        if done[byte] & bit != 0 {
            return Err(Refused::invalid(format!("line {line} was done before")));
        }
        done[byte] |= bit;
    }
    Ok(done)
}

fn check_append(output: &BatchOutput, append: Option<&BatchAppend>) -> Result<(), Refused> {
    let Some(append) = append else { return Ok(()) };
    let Some(chunk) = &append.chunk else {
        return Err(Refused::invalid("what is appended is missing"));
    };
    files::check_chunk(chunk)?;
    if append.replaces_last && (output.chunks == 0 || chunk.bytes < output.last_bytes) {
        return Err(Refused::invalid("the last chunk is replaced by a longer one"));
    }
    // Otherwise many short chunks could be made.
    if !append.replaces_last && output.chunks > 0 && output.last_bytes + chunk.bytes <= CHUNK_BYTES_MAX / 4 {
        return Err(Refused::invalid("a short chunk is made longer before another is begun"));
    }
    if !append.replaces_last && output.chunks >= OUTPUT_CHUNKS_MAX {
        let max = OUTPUT_CHUNKS_MAX.into();
        let what = "chunks of output";
        return Err(Refused::TooMany { what, max });
    }
    Ok(())
}

pub(crate) fn cancel(machine: &mut Machine<'_>, command: &CancelBatch) -> Handled {
    let batch = view::batch(machine, &command.batch_id)?.filter(|batch| batch.owner == command.owner);
    let Some(mut batch) = batch else {
        return Err(Refused::unknown("batch", &command.batch_id).into());
    };
    match batch.status() {
        BatchStatus::Cancelling | BatchStatus::Cancelled => return Ok(Applied::Stands { changed: false }),
        BatchStatus::Validating | BatchStatus::InProgress => {}
        _ => return Err(wrong_status(&batch)),
    }
    batch.set_status(BatchStatus::Cancelling);
    batch.cancelling_unix_ms = machine.now_ms;
    save(machine, &batch)?;
    Ok(Applied::Stands { changed: true })
}

pub(crate) fn finish(machine: &mut Machine<'_>, command: &FinishBatch) -> Handled {
    let batch = claimed(machine, &command.batch_id, &command.claim_id)?;
    let late = machine.now_ms >= batch.expires_unix_ms;
    let status = match batch.status() {
        BatchStatus::Finalizing => BatchStatus::Completed,
        BatchStatus::Cancelling => BatchStatus::Cancelled,
        BatchStatus::Validating | BatchStatus::InProgress if late => BatchStatus::Expired,
        _ => return Err(wrong_status(&batch)),
    };
    end(machine, batch, status)
}

/// The batch is over: what it wrote becomes files.
fn end(machine: &mut Machine<'_>, mut batch: Batch, status: BatchStatus) -> Handled {
    batch.set_status(status);
    batch.ended_unix_ms = machine.now_ms;
    batch.runner = None;
    let outputs = [("output", &batch.output), ("error", &batch.errors_output)];
    for (name, output) in outputs {
        let Some(output) = output.as_ref().filter(|output| output.chunks > 0) else {
            continue;
        };
        let lifetime_ms = batch.output_expires_after_s.saturating_mul(1000);
        let file = File {
            id: output.file_id.clone(),
            owner: batch.owner.clone(),
            filename: format!("{}_{name}.jsonl", batch.id),
            purpose: OUTPUT_PURPOSE.to_owned(),
            bytes: output.bytes,
            created_unix_ms: machine.now_ms,
            expires_unix_ms: match lifetime_ms {
                0 => 0,
                lifetime_ms => machine.now_ms.saturating_add(lifetime_ms),
            },
            chunks: output.chunks,
        };
        files::insert(machine, &file)?;
    }
    machine.delete(&keys::named(keys::BATCHES_OPEN, &batch.id))?;
    machine.delete(&keys::named(keys::BATCH_DONE, &batch.id))?;
    machine.put(&due_key(&batch), &[])?;
    files::add(machine, &batch.owner, |totals| totals.open_batches -= 1)?;
    save(machine, &batch)?;
    Ok(Applied::Stands { changed: true })
}

/// Forgets a batch that is over. Its files have lives of their own.
pub(crate) fn forget(machine: &mut Machine<'_>, id: &str) -> Result<(), TablesError> {
    let batch = view::batch(machine, id)?;
    let batch = batch.ok_or_else(|| TablesError::Corrupt(format!("batch {id} is due and missing")))?;
    machine.delete(&due_key(&batch))?;
    machine.delete(&owner_key(&batch))?;
    machine.delete(&keys::named(keys::BATCHES, id))?;
    files::add(machine, &batch.owner, |totals| totals.batches -= 1)
}

fn forget_oldest(machine: &mut Machine<'_>, owner: &str) -> Result<(), TablesError> {
    let prefix = Key::of(keys::BATCHES_BY_OWNER).text(owner);
    let skip = prefix.clone().done().len();
    let mut over = None;
    let mut ids = Vec::new();
    // Those that are not over are so few that one is found.
    machine.scan(&prefix.clone().done(), &prefix.beyond(), &mut |key, _| {
        ids.push(String::from_utf8_lossy(&key[skip..]).into_owned());
        Ok(if ids.len() as u64 > BATCHES_OPEN_MAX {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    })?;
    for id in ids {
        if machine.get(&keys::named(keys::BATCHES_OPEN, &id))?.is_none() {
            over = Some(id);
            break;
        }
    }
    over.map_or(Ok(()), |id| forget(machine, &id))
}

/// A batch that is not over.
fn open(machine: &Machine<'_>, id: &str) -> Result<Batch, Stop> {
    let Some(batch) = view::batch(machine, id)? else {
        return Err(Refused::unknown("batch", id).into());
    };
    if batch.ended_unix_ms != 0 {
        return Err(wrong_status(&batch));
    }
    Ok(batch)
}

/// A batch that is not over and is run under this claim. A lease that is over counts as long as nobody else has claimed.
fn claimed(machine: &Machine<'_>, id: &str, claim_id: &str) -> Result<Batch, Stop> {
    let batch = open(machine, id)?;
    if batch.runner.as_ref().is_some_and(|runner| runner.claim_id == claim_id) {
        return Ok(batch);
    }
    let batch_id = batch.id;
    Err(Refused::ClaimedByOther { batch_id }.into())
}

fn wrong_status(batch: &Batch) -> Stop {
    let status = status_name(batch.status());
    let batch_id = batch.id.clone();
    Refused::BatchStatus { batch_id, status }.into()
}

fn lease_until(machine: &Machine<'_>, lease_ms: u64) -> u64 {
    machine.now_ms.saturating_add(lease_ms.min(LEASE_MS_MAX))
}

fn save(machine: &mut Machine<'_>, batch: &Batch) -> Result<(), TablesError> {
    machine.put_message(&keys::named(keys::BATCHES, &batch.id), batch)
}

fn owner_key(batch: &Batch) -> Vec<u8> {
    Key::of(keys::BATCHES_BY_OWNER)
        .text(&batch.owner)
        .rest(batch.id.as_bytes())
        .done()
}

fn due_key(batch: &Batch) -> Vec<u8> {
    files::due_key(batch.ended_unix_ms.saturating_add(BATCH_KEPT_MS), &batch.id)
}
