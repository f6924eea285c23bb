//! One batch at work under a claim: its input is checked, then its lines are run, and what they bring is told in steps.
//!
//! A step is: keep the new results as chunks, durable on a majority; then tell the group of the lines and the chunks, in one
//! command. So whatever dies between any two instants, a line is done exactly if its result is there. A member that takes over
//! reads which lines are done and goes on with the others.
//!
//! It ends when the batch is over, when its claim is another's or cannot be prolonged, or with the process. It keeps the time
//! of its lease by its own clock, counted from before it asked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::state::{
    AdvanceBatch, Batch, BatchError, BatchOutput, BatchStatus, FailBatch, FinishBatch, StartBatch, command::Kind,
};
use baton_state::view;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::input::{self, Check, LINE_EXTRA_BYTES_MAX};
use super::keeper::{Batches, LEASE};
use super::line::{self, Done, Job, Outcome, Tokens};
use super::output::{self, Tail};
use super::throttle::Throttle;
use crate::accounts::store::StoreError;
use crate::auth;
use crate::backend::Backend;
use crate::clock::unix_ms;
use crate::files::{ChunkError, Line, Lines};

/// A step at least this often while there are results.
const STEP_EVERY: Duration = Duration::from_secs(1);
/// A step as soon as there are so many results: a command of a few KiB, and what is lost with a member at most.
const STEP_LINES: usize = 256;
/// Or so many bytes of them: with one more answer, below a chunk.
const STEP_BYTES: usize = 1 << 20;
/// How often the batch and the workers are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A step, or a read, is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Lines that are checked at once on a thread that may block.
const CHECK_LINES: usize = 512;
/// Or so many bytes.
const CHECK_BYTES: usize = 1 << 20;

/// Why a batch is left before it is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("its claim is over: {0}")]
    Lost(StoreError),
    #[error("its lease could not be prolonged")]
    LeaseOver,
    #[error("a file cannot be read or written: {0}")]
    Chunk(#[from] ChunkError),
    #[error("its input is gone")]
    NoInput,
    #[error("the state cannot be read: {0}")]
    State(StoreError),
}

/// See the module.
pub(super) struct Runner<'b, B: Backend> {
    batches: &'b Arc<Batches<B>>,
    batch_id: String,
    claim_id: String,
    /// End of the lease, by this member's clock.
    until: Instant,
    started: Instant,
}

/// What is under way.
struct Work {
    batch: Batch,
    /// A bit for each line that is done, or whose result waits to be told.
    taken: Vec<u8>,
    /// Line numbers, and whether they completed, since the last step.
    fresh: Vec<(u32, bool)>,
    tokens: Tokens,
    output: Tail,
    errors: Tail,
    last_step: Instant,
}

impl<'b, B: Backend> Runner<'b, B> {
    pub fn new(batches: &'b Arc<Batches<B>>, batch_id: String, claim_id: String, until: Instant) -> Self {
        Self {
            batches,
            batch_id,
            claim_id,
            until,
            started: Instant::now(),
        }
    }

    /// Goes on until the batch is over, or `stop`.
    pub async fn run(mut self, stop: &CancellationToken) -> Result<(), RunError> {
        loop {
            if stop.is_cancelled() {
                return Ok(());
            }
            let batch = self.batch()?;
            let late = batch.expires_unix_ms <= unix_ms();
            match batch.status() {
                BatchStatus::Validating if !late => self.validate(&batch).await?,
                BatchStatus::InProgress => self.lines(batch, stop).await?,
                BatchStatus::Validating | BatchStatus::Finalizing | BatchStatus::Cancelling => self.finish().await?,
                _ => return Ok(()),
            }
        }
    }

    fn batch(&self) -> Result<Batch, RunError> {
        let tables = self.batches.files.accounts.store.tables().map_err(RunError::State)?;
        let batch = view::batch(&*tables, &self.batch_id).map_err(|error| RunError::State(error.into()))?;
        batch.ok_or(RunError::NoInput)
    }

    /// Changes the batch. Tried again as long as the lease lasts; commands of batches may be repeated.
    async fn tell(&mut self, kind: Kind) -> Result<(), RunError> {
        loop {
            match self.batches.files.change("", kind.clone()).await {
                Ok(_) => return Ok(()),
                Err(error @ StoreError::Refused(_)) => return Err(RunError::Lost(error)),
                Err(error) => tracing::debug!(batch = %self.batch_id, %error, "a step is tried again"),
            }
            self.wait().await?;
        }
    }

    async fn wait(&self) -> Result<(), RunError> {
        if Instant::now() + RETRY_PAUSE >= self.until {
            return Err(RunError::LeaseOver);
        }
        tokio::time::sleep(RETRY_PAUSE).await;
        Ok(())
    }

    /// Prolongs the lease when a third of it is over.
    async fn prolong(&mut self) -> Result<(), RunError> {
        let asked = Instant::now();
        if self.until.saturating_duration_since(asked) > LEASE * 2 / 3 {
            return Ok(());
        }
        loop {
            let asked = Instant::now();
            match self.batches.claim(&self.batch_id, &self.claim_id, LEASE).await {
                Ok(()) => {
                    self.until = asked + LEASE;
                    return Ok(());
                }
                Err(error @ StoreError::Refused(_)) => return Err(RunError::Lost(error)),
                Err(_) => self.wait().await?,
            }
        }
    }

    async fn finish(&mut self) -> Result<(), RunError> {
        let kind = Kind::FinishBatch(FinishBatch {
            batch_id: self.batch_id.clone(),
            claim_id: self.claim_id.clone(),
        });
        self.tell(kind).await
    }

    async fn input(&self, batch: &Batch) -> Result<Option<Lines>, RunError> {
        let tables = self.batches.files.accounts.store.tables().map_err(RunError::State)?;
        let file = view::file(&*tables, &batch.input_file_id).map_err(|error| RunError::State(error.into()))?;
        drop(tables);
        let Some(file) = file else { return Ok(None) };
        let line_max = self.batches.gateway.config.body_bytes_max + LINE_EXTRA_BYTES_MAX;
        let lines = Lines::of(self.batches.files.clone(), &file, line_max).await;
        lines.map(Some).map_err(|_| RunError::NoInput)
    }

    /// Reads the whole input and says whether it can be run.
    async fn validate(&mut self, batch: &Batch) -> Result<(), RunError> {
        let mut check = Check::new(batch.endpoint.clone());
        if let Some(mut lines) = self.input(batch).await? {
            let mut more = true;
            while more {
                let (mut some, mut bytes) = (Vec::new(), 0);
                while some.len() < CHECK_LINES && bytes < CHECK_BYTES {
                    let Some(line) = lines.next().await? else {
                        more = false;
                        break;
                    };
                    bytes += line.text.as_ref().map_or(0, bytes::Bytes::len);
                    some.push(line);
                }
                let checked = tokio::task::spawn_blocking(move || {
                    let go_on = some.iter().all(|line: &Line| check.line(line));
                    (check, go_on)
                });
                let (back, go_on) = checked.await.map_err(|_| RunError::NoInput)?;
                check = back;
                more &= go_on;
                self.prolong().await?;
                if self.batches.stopping() {
                    return Ok(());
                }
            }
        }
        let (batch_id, claim_id) = (self.batch_id.clone(), self.claim_id.clone());
        let kind = match check.end() {
            Ok((total, model)) => Kind::StartBatch(StartBatch {
                batch_id,
                claim_id,
                total,
                model,
            }),
            Err(errors) => Kind::FailBatch(FailBatch {
                batch_id,
                claim_id,
                errors: errors.into_iter().map(bounded).collect(),
            }),
        };
        match self.tell(kind).await {
            // It was cancelled meanwhile.
            Err(RunError::Lost(StoreError::Refused(baton_state::Refused::BatchStatus { .. }))) => Ok(()),
            told => told,
        }
    }

    /// Runs what is not done, until nothing is left, the batch is cancelled or late, or `stop`.
    async fn lines(&mut self, batch: Batch, stop: &CancellationToken) -> Result<(), RunError> {
        let mut work = self.work(batch).await?;
        let Some(mut input) = self.input(&work.batch).await? else {
            return Err(RunError::NoInput);
        };
        let mut throttle = Throttle::new(self.batches.gateway.config.batches.concurrency_max);
        let mut running: JoinSet<Outcome> = JoinSet::new();
        let mut again: VecDeque<Job> = VecDeque::new();
        let (mut index, mut read_all) = (0, false);
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let stopping = stop.is_cancelled();
            while !stopping && running.len() < throttle.limit(self.started.elapsed()) {
                let job = match again.pop_front() {
                    Some(job) => Some(job),
                    None if read_all => None,
                    None => next_job(&mut input, &mut index, &work).await?,
                };
                let Some(job) = job else {
                    read_all = true;
                    break;
                };
                self.start(&mut running, &work.batch, job);
            }
            let idle = running.is_empty() && again.is_empty() && read_all;
            if idle || (stopping && running.is_empty()) {
                self.step(&mut work).await?;
                return Ok(());
            }
            tokio::select! {
                Some(ended) = running.join_next(), if !running.is_empty() => match ended {
                    Ok(Outcome::Done(done)) => {
                        throttle.answered();
                        work.take(done);
                    }
                    Ok(Outcome::Again(job, after)) => {
                        throttle.refused(after, self.started.elapsed());
                        again.push_back(job);
                    }
                    // Its line is not done; whoever claims the batch next has it again.
                    Err(_) => return Err(RunError::NoInput),
                },
                _ = looks.tick() => {
                    self.prolong().await?;
                    match self.batch()? {
                        batch if batch.status() != BatchStatus::InProgress => {
                            running.shutdown().await;
                            self.step(&mut work).await?;
                            return Ok(());
                        }
                        batch if batch.expires_unix_ms <= unix_ms() => {
                            running.shutdown().await;
                            return self.expire(work).await;
                        }
                        _ => {}
                    }
                    if self.crowded() {
                        throttle.crowded(self.started.elapsed());
                    }
                }
                () = stop.cancelled(), if !stopping => {}
            }
            if work.is_due() {
                self.step(&mut work).await?;
            }
        }
    }

    /// Where the batch stands.
    async fn work(&self, batch: Batch) -> Result<Work, RunError> {
        let (taken, last) = {
            let tables = self.batches.files.accounts.store.tables().map_err(RunError::State)?;
            let failed = |error: baton_state::TablesError| RunError::State(error.into());
            let taken = view::batch_done(&*tables, &batch.id).map_err(failed)?;
            let last = |output: Option<&BatchOutput>| {
                let Some(output) = output.filter(|output| output.chunks > 0) else {
                    return Ok(None);
                };
                let number = u64::from(output.chunks) - 1;
                view::chunks_after(&*tables, &output.file_id, number, 1).map(|mut chunks| chunks.pop())
            };
            let last = [batch.output.as_ref(), batch.errors_output.as_ref()].map(last);
            let [output, errors] = last;
            (taken, [output.map_err(failed)?, errors.map_err(failed)?])
        };
        let [output, errors] = last;
        let chunks = &*self.batches.files.chunks;
        Ok(Work {
            output: Tail::of(batch.output.as_ref(), output, chunks).await?,
            errors: Tail::of(batch.errors_output.as_ref(), errors, chunks).await?,
            batch,
            taken,
            fresh: Vec::new(),
            tokens: Tokens::default(),
            last_step: Instant::now(),
        })
    }

    fn start(&self, running: &mut JoinSet<Outcome>, batch: &Batch, job: Job) {
        let gateway = &self.batches.gateway;
        let caller = auth::caller_of_batch(gateway.keys.as_ref(), gateway.accounts.as_ref(), &batch.key_id);
        let router = self.batches.router.clone();
        running.spawn(line::run(router, caller, batch.id.clone(), batch.endpoint.clone(), job));
    }

    /// Whether workers have more than they can run.
    fn crowded(&self) -> bool {
        let workers = self.batches.gateway.ledger.backend.snapshot().workers;
        workers.iter().any(|worker| worker.waiting > 0)
    }

    /// Tells what is new.
    async fn step(&mut self, work: &mut Work) -> Result<(), RunError> {
        work.last_step = Instant::now();
        if work.fresh.is_empty() {
            return Ok(());
        }
        let chunks = self.batches.files.chunks.clone();
        let (output, errors) = loop {
            let kept = async { Ok((work.output.keep(&*chunks).await?, work.errors.keep(&*chunks).await?)) };
            match kept.await {
                Ok(kept) => break kept,
                Err(error @ ChunkError::Unavailable(_)) => {
                    tracing::debug!(batch = %self.batch_id, %error, "results are kept again");
                    self.wait().await?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        work.fresh.sort_unstable();
        let completed = work.fresh.iter().filter(|(_, completed)| *completed).count() as u32;
        let sequence = work.batch.advances + 1;
        let asked = Instant::now();
        let kind = Kind::AdvanceBatch(AdvanceBatch {
            batch_id: self.batch_id.clone(),
            claim_id: self.claim_id.clone(),
            sequence,
            lines: work.fresh.iter().map(|(index, _)| *index).collect(),
            completed,
            failed: work.fresh.len() as u32 - completed,
            input_tokens: work.tokens.input,
            cached_tokens: work.tokens.cached,
            output_tokens: work.tokens.output,
            reasoning_tokens: work.tokens.reasoning,
            output: output.as_ref().map(|appended| appended.append.clone()),
            errors_output: errors.as_ref().map(|appended| appended.append.clone()),
            lease_ms: u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX),
        });
        self.tell(kind).await?;
        self.until = self.until.max(asked + LEASE);
        work.output.told(output);
        work.errors.told(errors);
        work.batch.advances = sequence;
        work.fresh.clear();
        work.tokens = Tokens::default();
        Ok(())
    }

    /// The window is over: what was not run is told so, line by line.
    async fn expire(&mut self, mut work: Work) -> Result<(), RunError> {
        if let Some(mut input) = self.input(&work.batch).await? {
            let mut index = 0;
            while let Some(job) = next_job(&mut input, &mut index, &work).await? {
                let id = line::result_id(&work.batch.id, job.index);
                let custom_id = input::request(&job.text).and_then(|request| request.custom_id);
                let message = "This request could not be executed before the completion window expired.";
                work.take(Done {
                    index: job.index,
                    completed: false,
                    line: output::unanswered(&id, &custom_id.unwrap_or_default(), "batch_expired", message),
                    tokens: Tokens::default(),
                });
                if work.is_due() {
                    self.step(&mut work).await?;
                    self.prolong().await?;
                }
            }
        }
        self.step(&mut work).await?;
        self.finish().await
    }
}

impl Work {
    fn is_taken(&self, index: u32) -> bool {
        let byte = self.taken.get((index / 8) as usize);
        byte.is_some_and(|byte| byte & (1 << (index % 8)) != 0)
    }

    fn take(&mut self, done: Done) {
        let byte = (done.index / 8) as usize;
        if self.taken.len() <= byte {
            self.taken.resize(byte + 1, 0);
        }
        self.taken[byte] |= 1 << (done.index % 8);
        self.fresh.push((done.index, done.completed));
        let tail = if done.completed {
            &mut self.output
        } else {
            &mut self.errors
        };
        tail.push(&done.line);
        self.tokens.input += done.tokens.input;
        self.tokens.cached += done.tokens.cached;
        self.tokens.output += done.tokens.output;
        self.tokens.reasoning += done.tokens.reasoning;
    }

    fn is_due(&self) -> bool {
        !self.fresh.is_empty()
            && (self.fresh.len() >= STEP_LINES
                || self.output.fresh_bytes().max(self.errors.fresh_bytes()) >= STEP_BYTES
                || self.last_step.elapsed() >= STEP_EVERY)
    }
}

/// The next line that is not done. Lines are numbered without the empty ones.
async fn next_job(input: &mut Lines, index: &mut u32, work: &Work) -> Result<Option<Job>, RunError> {
    while let Some(line) = input.next().await? {
        let this = *index;
        *index += 1;
        if this >= work.batch.total {
            return Ok(None);
        }
        if !work.is_taken(this) {
            let text = line.text.unwrap_or_default();
            return Ok(Some(Job {
                index: this,
                text,
                failures: 0,
            }));
        }
    }
    Ok(None)
}

/// As the state takes it.
fn bounded(mut error: BatchError) -> BatchError {
    let max = error.message.floor_char_boundary(baton_state::bounds::TEXT_BYTES_MAX);
    error.message.truncate(max);
    error
}
