//! Rows for whole models against the CPU engine, promise P1, and leaks.

use super::{CheckError, Context, Outcome, RowResult, options, relative_error};
use crate::driver::Driver;
use crate::ops::{CudaOps, KvMemory, OpsOptions};
use baton_model::{
    CpuOps, Decoder, ForwardBatch, KvCache, LoadOptions, ModelConfig, ModelFiles, Ops, Quantization, SeqSpan,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCK: usize = 16;
const BLOCKS: u32 = 256;
/// Steps are no larger.
const ROWS_MAX: usize = 512;

/// A model, its cache, and sequences.
struct Runner<O: Ops> {
    decoder: Decoder<O>,
    kv: KvCache,
    tables: Vec<Vec<u32>>,
    lengths: Vec<usize>,
    next_block: u32,
}

fn on_gpu<D: Driver>(
    context: &Context<'_, D>,
    options: OpsOptions,
    memory: KvMemory,
) -> Result<Runner<CudaOps<D>>, CheckError> {
    let config = ModelConfig::from_dir(&context.model)?;
    let files = ModelFiles::open(&context.model)?;
    let kv = KvCache::allocate(config.kv_geometry(BLOCK), BLOCKS)?;
    let ops = CudaOps::new((context.open)()?, &config, options)?;
    let mut decoder = Decoder::with_ops(ops, &files, config, &())?;
    decoder
        .ops_mut()
        .allocate_arena(kv.geometry(), BLOCKS, memory, kv.region())?;
    Ok(Runner::new(decoder, kv))
}

fn on_cpu<D: Driver>(context: &Context<'_, D>, quantization: Quantization) -> Result<Runner<CpuOps>, CheckError> {
    let config = ModelConfig::from_dir(&context.model)?;
    let files = ModelFiles::open(&context.model)?;
    let kv = KvCache::allocate(config.kv_geometry(BLOCK), BLOCKS)?;
    let load = LoadOptions {
        quantization,
        ..LoadOptions::threads(options(ROWS_MAX).threads)
    };
    Ok(Runner::new(Decoder::load(&files, config, &load, &())?, kv))
}

impl<O: Ops> Runner<O> {
    fn new(decoder: Decoder<O>, kv: KvCache) -> Self {
        Runner {
            decoder,
            kv,
            tables: Vec::new(),
            lengths: Vec::new(),
            next_block: 0,
        }
    }

    fn start(&mut self) -> usize {
        self.tables.push(Vec::new());
        self.lengths.push(0);
        self.tables.len() - 1
    }

    /// Appends tokens to sequences in one batch; the logits after each one's last.
    fn step(&mut self, parts: &[(usize, &[u32])]) -> Result<Vec<Vec<f32>>, CheckError> {
        let mut batch = ForwardBatch::default();
        for (seq, tokens) in parts {
            let start_pos = self.lengths[*seq];
            self.lengths[*seq] += tokens.len();
            while self.tables[*seq].len() * BLOCK < self.lengths[*seq] {
                // Backwards and interleaved, so that nothing works only because blocks happen to be adjacent.
                self.next_block += 1;
                self.tables[*seq].push(self.kv.blocks() - self.next_block);
            }
            batch.tokens.extend_from_slice(tokens);
            batch.seqs.push(SeqSpan {
                start_pos,
                len: tokens.len(),
                blocks: self.tables[*seq].clone(),
                logits: true,
            });
        }
        let logits = self.decoder.forward(&batch, &self.kv, &mut |_| {})?;
        Ok((0..logits.rows()).map(|row| logits.row(row).to_vec()).collect())
    }

    fn vocab(&self) -> u32 {
        u32::try_from(self.decoder.config().vocab_size).unwrap_or(u32::MAX)
    }
}

fn prompt(rng: &mut SmallRng, len: usize, vocab: u32) -> Vec<u32> {
    (0..len).map(|_| rng.random_range(0..vocab)).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// The largest, the first of equals, and by how much it leads.
fn best(logits: &[f32]) -> (u32, f32) {
    let mut best = 0;
    for (index, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = index;
        }
    }
    let others = logits.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, v)| *v);
    let lead = logits[best] - others.fold(f32::NEG_INFINITY, f32::max);
    (u32::try_from(best).unwrap_or(0), lead)
}

/// Ragged steps of four sequences, on both.
fn compare<D: Driver>(context: &Context<'_, D>, quantization: Quantization, tolerance: f64) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let options = OpsOptions {
        quantization,
        ..options(ROWS_MAX)
    };
    let mut found = on_gpu(context, options, KvMemory::Device)?;
    let mut wanted = on_cpu(context, quantization)?;
    let vocab = found.vocab();
    let prompts: Vec<Vec<u32>> = [90, 1, 33, 280]
        .iter()
        .map(|len| prompt(&mut rng, *len, vocab))
        .collect();
    for _ in &prompts {
        found.start();
        wanted.start();
    }
    let mut steps: Vec<Vec<(usize, &[u32])>> = vec![
        vec![(0, &prompts[0]), (3, &prompts[3][..200])],
        vec![(1, &prompts[1]), (3, &prompts[3][200..]), (2, &prompts[2])],
    ];
    for index in 0..6 {
        steps.push((0..4).map(|seq| (seq, &prompts[0][index + seq..][..1])).collect());
    }
    let (mut worst, mut rows) = (0.0f64, 0);
    for step in &steps {
        for (found, wanted) in found.step(step)?.iter().zip(wanted.step(step)?) {
            let error = relative_error(found, &wide(&wanted));
            worst = if error.is_nan() || error > worst { error } else { worst };
            rows += 1;
        }
    }
    let detail = format!("{rows} rows of logits in 8 ragged steps; error {worst:.1e} of {tolerance:.0e}");
    Ok(Outcome::verdict(worst <= tolerance, detail))
}

pub fn logits<D: Driver>(context: &Context<'_, D>) -> RowResult {
    compare(context, Quantization::None, 3e-2)
}

pub fn logits_int8<D: Driver>(context: &Context<'_, D>) -> RowResult {
    compare(context, Quantization::Int8, 6e-2)
}

pub fn logits_int4<D: Driver>(context: &Context<'_, D>) -> RowResult {
    compare(context, Quantization::Int4, 6e-2)
}

/// Greedy tokens. Rounding differs, so they may part where two tokens are nearly even; nowhere else.
pub fn greedy<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut found = on_gpu(context, options(ROWS_MAX), KvMemory::Device)?;
    let mut wanted = on_cpu(context, Quantization::None)?;
    let tokens = prompt(&mut rng, 40, found.vocab());
    let (one, other) = (found.start(), wanted.start());
    let (mut ours, mut theirs) = (found.step(&[(one, &tokens)])?, wanted.step(&[(other, &tokens)])?);
    let (mut parted, mut least_lead) = (0, f32::INFINITY);
    for _ in 0..context.greedy_tokens {
        let ((here, _), (there, lead)) = (best(&ours[0]), best(&theirs[0]));
        if here != there {
            parted += 1;
            let spread = theirs[0].iter().map(|v| v.abs()).fold(0.0, f32::max);
            if lead > 0.05 * spread {
                let detail = format!("token {there} leads by {lead} and the GPU chose {here}");
                return Ok(Outcome::verdict(false, detail));
            }
            least_lead = least_lead.min(lead);
        }
        // Both go on with the CPU's token, so that one tie does not hide what comes after.
        ours = found.step(&[(one, &[there])])?;
        theirs = wanted.step(&[(other, &[there])])?;
    }
    let detail = format!("{} tokens; {parted} ties broken otherwise", context.greedy_tokens);
    Ok(Outcome::verdict(parted * 20 <= context.greedy_tokens, detail))
}

/// Bits of the logits after a prompt in chunks, and after some tokens, with mates in the batch.
fn bits<D: Driver>(
    runner: &mut Runner<CudaOps<D>>,
    tokens: &[u32],
    chunk: usize,
    mates: &[Vec<u32>],
) -> Result<Vec<Vec<u32>>, CheckError> {
    let seq = runner.start();
    let ids: Vec<usize> = mates.iter().map(|_| runner.start()).collect();
    let (first, rest) = tokens.split_at(tokens.len() - 4);
    let mut rows = Vec::new();
    let parts = first.chunks(chunk).chain(rest.chunks(1)).enumerate();
    for (index, part) in parts {
        let mut batch: Vec<(usize, &[u32])> = vec![(seq, part)];
        batch.extend(
            ids.iter()
                .zip(mates)
                .map(|(id, m)| (*id, if index == 0 { &m[..] } else { &m[..1] })),
        );
        let turn = index % batch.len();
        batch.rotate_left(turn);
        let at = (batch.len() - turn) % batch.len();
        let logits = runner.step(&batch)?.swap_remove(at);
        rows.push(logits.iter().map(|v| v.to_bits()).collect());
    }
    // The prompt's last row and the four after it.
    Ok(rows.split_off(rows.len() - 5))
}

pub fn same_bits<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut different = Vec::new();
    let mut compared = 0;
    for quantization in [Quantization::None, Quantization::Int4] {
        let options = || OpsOptions {
            quantization,
            ..options(ROWS_MAX)
        };
        let mut alone = on_gpu(context, options(), KvMemory::Device)?;
        let tokens = prompt(&mut rng, 300, alone.vocab());
        let all_mates: Vec<Vec<u32>> = (0..9).map(|i| prompt(&mut rng, 1 + 5 * i, alone.vocab())).collect();
        let wanted = bits(&mut alone, &tokens, 512, &[])?;
        for (chunk, mates) in [(1, 0), (7, 0), (64, 0), (100, 0), (64, 9), (296, 9), (17, 3)] {
            // A new device memory each time, so that nothing is right only because of what was there before.
            let mut runner = on_gpu(context, options(), KvMemory::Device)?;
            compared += 1;
            if bits(&mut runner, &tokens, chunk, &all_mates[..mates])? != wanted {
                different.push(format!("{quantization}, chunks of {chunk}, {mates} mates"));
            }
        }
    }
    let detail = match different.is_empty() {
        true => format!("{compared} ways to cut and batch a prompt, with the same bits"),
        false => format!("other bits with {}", different.join("; ")),
    };
    Ok(Outcome::verdict(different.is_empty(), detail))
}

pub fn same_bits_as_graph<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut runs = Vec::new();
    let mut replayed = 0;
    for graphs in [false, true] {
        let options = OpsOptions {
            graphs,
            ..options(ROWS_MAX)
        };
        let mut runner = on_gpu(context, options, KvMemory::Device)?;
        let mut rng = SmallRng::seed_from_u64(context.seed);
        let vocab = runner.vocab();
        let prompts: Vec<Vec<u32>> = [5, 270, 40].iter().map(|len| prompt(&mut rng, *len, vocab)).collect();
        let seqs: Vec<usize> = prompts.iter().map(|_| runner.start()).collect();
        let batch: Vec<(usize, &[u32])> = seqs.iter().zip(&prompts).map(|(s, p)| (*s, &p[..])).collect();
        runner.step(&batch)?;
        let mut rows: Vec<Vec<u32>> = Vec::new();
        for token in 0..12 {
            let next = [token];
            let batch: Vec<(usize, &[u32])> = seqs.iter().map(|s| (*s, &next[..])).collect();
            rows.extend(
                runner
                    .step(&batch)?
                    .iter()
                    .map(|row| row.iter().map(|v| v.to_bits()).collect()),
            );
        }
        replayed = runner.decoder.ops().graphs_replayed();
        runs.push(rows);
    }
    let same = runs[0] == runs[1];
    Ok(Outcome::verdict(
        same && replayed >= 8,
        format!("12 decode steps, {replayed} of them replayed"),
    ))
}

/// The whole model with K and V in the host's memory: what hand-over needs, and the same bits.
pub fn host_kv<D: Driver>(context: &Context<'_, D>) -> RowResult {
    let mut rng = SmallRng::seed_from_u64(context.seed);
    let mut device = on_gpu(context, options(ROWS_MAX), KvMemory::Device)?;
    let mut host = on_gpu(context, options(ROWS_MAX), KvMemory::Host)?;
    let tokens = prompt(&mut rng, 200, device.vocab());
    let same = bits(&mut device, &tokens, 64, &[])? == bits(&mut host, &tokens, 64, &[])?;
    // What a transfer does: the bytes of the blocks, to other blocks of another worker's arena.
    let mut there = on_gpu(context, options(ROWS_MAX), KvMemory::Host)?;
    let moved = there.start();
    let geometry = host.kv.geometry();
    let mut copied = true;
    for (index, block) in host.tables[0].clone().into_iter().enumerate() {
        let to = 3 * u32::try_from(index).unwrap_or(0) + 1;
        let mut bytes = vec![0; geometry.block_bytes()];
        copied &= host.kv.region().copy_out(geometry.block_range(block).start, &mut bytes);
        copied &= there.kv.region().copy_in(geometry.block_range(to).start, &bytes);
        there.tables[moved].push(to);
    }
    there.lengths[moved] = tokens.len();
    let (ours, theirs) = (host.step(&[(0, &[7])])?, there.step(&[(moved, &[7])])?);
    let continued = ours[0].iter().zip(&theirs[0]).all(|(a, b)| a.to_bits() == b.to_bits());
    let detail =
        format!("same bits as on the device: {same}; blocks moved to another arena continue alike: {continued}");
    Ok(Outcome::verdict(same && copied && continued, detail))
}

/// Loads, runs and drops a model again and again; the memory must come back.
pub fn leak<D: Driver>(context: &Context<'_, D>) -> RowResult {
    /// What a driver may keep for itself.
    const SLACK_BYTES: u64 = 8 << 20;
    let mut free = Vec::new();
    // Held open, so that memory which is not given back stays missing.
    let mut watcher = (context.open)()?;
    for _ in 0..4 {
        let mut runner = on_gpu(context, options(ROWS_MAX), KvMemory::Device)?;
        let seq = runner.start();
        for token in 0..8 {
            runner.step(&[(seq, &[token])])?;
        }
        drop(runner);
        free.push(watcher.free_bytes()?);
    }
    // The first round may warm something up.
    let lost = free[1].saturating_sub(free[3]);
    Ok(Outcome::verdict(
        lost <= SLACK_BYTES,
        format!("{} KiB less after three more loads", lost / 1024),
    ))
}
