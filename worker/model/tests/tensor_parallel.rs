//! A model on several ranks: the same function as on one within the rounding of its format, whatever the division of its
//! heads; every rank's failure ends it at once, with the reason; what cannot be divided is refused.

mod common;

use baton_kernels::Kernels;
use baton_model::{
    CpuOps, Decoder, ForwardBatch, KvCache, LoadOptions, ModelConfig, ModelError, ModelFiles, OpResult, Ops,
    Quantization, SeqSpan, ShardSlices, SharedMemory, StackedPart, Stage, Step, Tensor, TensorParallel, UNIT,
};
use common::{BLOCK, Runner, Spec, argmax, bits, prompt};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

fn options(threads: usize, tensor_parallel: usize, quantization: Quantization) -> LoadOptions {
    LoadOptions {
        quantization,
        tensor_parallel,
        ..LoadOptions::threads(threads)
    }
}

/// Largest difference of a logit from one rank's, relative to the largest of its row. In f32 only sums are rounded in another
/// order. In bf16, K and V (and activations, where the CPU multiplies bf16) are rounded to 8 bits: a last bit of f32 can
/// become one of theirs. With int8, each rank scales its own part of a row of activations and of weights. With int4,
/// scales belong to groups of 32; where a rank's heads are whole groups (as in every published model) they are the same on
/// any number of ranks, else all weights of the output projection are quantised differently.
fn tolerance(dtype: Dtype, quantization: Quantization, whole_groups: bool) -> f32 {
    match (dtype, quantization) {
        (Dtype::F32, Quantization::None) => 5e-6,
        (_, Quantization::None) => 1e-2,
        (_, Quantization::Int8) => 8e-2,
        (_, Quantization::Int4) if whole_groups => 2e-2,
        (_, Quantization::Int4) => 2e-1,
    }
}

/// Prompts prefilled together in chunks, then decoded; both sides are fed the same tokens. The worst difference.
fn difference(dir: &Path, vocab: usize, ranks: usize, quantization: Quantization) -> f32 {
    let mut one = Runner::with_options(dir, 64, &options(2, 1, quantization));
    let mut several = Runner::with_options(dir, 64, &options(ranks, ranks, quantization));
    assert_eq!((one.model.ranks(), several.model.ranks()), (1, ranks));
    let prompts: Vec<Vec<u32>> = [1, 20, 75].iter().map(|n| prompt(*n, vocab, *n as u64)).collect();
    let seqs: Vec<usize> = prompts.iter().map(|_| one.start()).collect();
    for seq in &seqs {
        assert_eq!(several.start(), *seq);
    }
    let mut tokens = prompts;
    let mut worst = 0f32;
    for _ in 0..12 {
        let parts: Vec<(usize, &[u32])> = seqs.iter().copied().zip(tokens.iter().map(|t| &t[..])).collect();
        let (want, got) = (one.step(&parts), several.step(&parts));
        assert_eq!(want.len(), got.len());
        for (want, got) in want.iter().zip(&got) {
            let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let apart = want.iter().zip(got).map(|(w, g)| (w - g).abs()).fold(0f32, f32::max);
            assert!(scale > 0.1 && apart.is_finite());
            worst = worst.max(apart / scale);
        }
        tokens = want.iter().map(|row| vec![argmax(row)]).collect();
    }
    worst
}

#[test]
fn ranks_compute_what_one_computes() {
    let biases = json!({"attention_bias": true, "mlp_bias": true});
    let shapes = [
        // Biases on Q, K and V; a feed-forward width that is no multiple of 32.
        (Spec::qwen2(), vec![2]),
        // Biases on the matrices that are cut along `k`, too: they must be added once.
        (
            Spec {
                extra: biases,
                ..Spec::llama()
            },
            vec![2, 4],
        ),
        // One K/V head for all ranks: the first writes, all read.
        (
            Spec {
                kv_heads: 1,
                ..Spec::llama()
            },
            vec![2, 4],
        ),
        // Heads and feed-forward width as in the demo model.
        (
            Spec {
                inner: 432,
                heads: 4,
                tied: true,
                ..Spec::llama()
            },
            vec![2],
        ),
    ];
    for (index, (shape, degrees)) in shapes.into_iter().enumerate() {
        for (dtype, quantization) in [
            (Dtype::F32, Quantization::None),
            (Dtype::BF16, Quantization::None),
            (Dtype::F32, Quantization::Int8),
            (Dtype::F32, Quantization::Int4),
        ] {
            let spec = Spec { dtype, ..shape.clone() };
            let dir = tempfile::tempdir().unwrap();
            spec.write(dir.path(), 31 + index as u64);
            for &ranks in &degrees {
                let worst = difference(dir.path(), spec.vocab, ranks, quantization);
                let what = format!("shape {index}, {dtype:?} as {quantization}, {ranks} ranks: {worst:e}");
                let whole_groups = (spec.heads * spec.dim() / ranks).is_multiple_of(UNIT);
                assert!(worst <= tolerance(dtype, quantization, whole_groups), "{what}");
            }
        }
    }
}

#[test]
fn a_replicated_head_gives_the_same_bits_every_time() {
    // A rank that read before the other wrote, or a sum in order of arrival, would show sooner or later.
    let spec = Spec {
        kv_heads: 1,
        ..Spec::llama()
    };
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 41);
    let mut runner = Runner::with_options(dir.path(), 1024, &options(3, 2, Quantization::None));
    let tokens = prompt(40, spec.vocab, 3);
    let mut first = None;
    for _ in 0..50 {
        let seq = runner.start();
        let mut row = runner.step(&[(seq, &tokens[..])]).remove(0);
        for _ in 0..3 {
            row = runner.step(&[(seq, &[argmax(&row)])]).remove(0);
        }
        assert_eq!(*first.get_or_insert_with(|| bits(&row)), bits(&row));
    }
}

#[test]
fn ranks_and_threads_that_do_not_divide_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    Spec::llama().write(dir.path(), 42);
    let files = ModelFiles::open(dir.path()).unwrap();
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    for (options, wanted) in [
        (options(1, 2, Quantization::None), "threads"),
        (options(3, 3, Quantization::None), "possible are 1, 2, 4"),
        (options(1, 0, Quantization::None), "0 ranks"),
    ] {
        let error = TensorParallel::load(&files, config.clone(), &options, &())
            .map(drop)
            .unwrap_err();
        assert!(matches!(error, ModelError::TensorParallel(_)), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
    let error = Decoder::load(&files, config, &options(2, 2, Quantization::None), &())
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, ModelError::TensorParallel(_)), "{error}");
}

#[test]
fn loading_tells_its_progress_once_for_all_ranks() {
    let dir = tempfile::tempdir().unwrap();
    Spec::llama().write(dir.path(), 43);
    let files = ModelFiles::open(dir.path()).unwrap();
    let told = Mutex::new(Vec::new());
    let progress = |_: Stage<'_>, done: u64, total: u64| told.lock().unwrap().push((done, total));
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    TensorParallel::load(&files, config, &options(2, 2, Quantization::None), &progress).unwrap();
    let told = told.into_inner().unwrap();
    assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{told:?}");
    assert!(told.iter().all(|(_, total)| *total == files.weight_bytes()));
    assert_eq!(told.last().unwrap().0, files.weight_bytes());
}

/// A device whose attention goes wrong at some call.
struct Failing {
    ops: CpuOps,
    calls_left: usize,
    panics: bool,
}

impl Ops for Failing {
    type Matrix = <CpuOps as Ops>::Matrix;
    type Table = <CpuOps as Ops>::Table;
    type Vector = <CpuOps as Ops>::Vector;
    type Rows = <CpuOps as Ops>::Rows;

    fn slices(&self) -> &ShardSlices {
        self.ops.slices()
    }
    fn matrix(&mut self, parts: Vec<StackedPart>, head: bool) -> OpResult<Self::Matrix> {
        self.ops.matrix(parts, head)
    }
    fn table(&mut self, table: Tensor) -> OpResult<Self::Table> {
        self.ops.table(table)
    }
    fn vector(&mut self, values: Vec<f32>) -> OpResult<Self::Vector> {
        self.ops.vector(values)
    }
    fn rows(&mut self, width: usize) -> OpResult<Self::Rows> {
        self.ops.rows(width)
    }
    fn begin(&mut self, step: &Step<'_>, frequencies: &[f32], scale: f32) -> OpResult {
        self.ops.begin(step, frequencies, scale)
    }
    fn embed(&mut self, step: &Step<'_>, table: &Self::Table, out: &mut Self::Rows) -> OpResult {
        self.ops.embed(step, table, out)
    }
    fn rms_norm(&mut self, x: &mut Self::Rows, weight: &Self::Vector, eps: f32, out: &mut Self::Rows) -> OpResult {
        self.ops.rms_norm(x, weight, eps, out)
    }
    fn add_rms_norm(
        &mut self,
        x: &mut Self::Rows,
        delta: &Self::Rows,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Rows,
    ) -> OpResult {
        self.ops.add_rms_norm(x, delta, weight, eps, out)
    }
    fn linear(&mut self, x: &Self::Rows, weights: &Self::Matrix, out: &mut Self::Rows) -> OpResult {
        self.ops.linear(x, weights, out)
    }
    fn rope_kv_write(&mut self, step: &Step<'_>, layer: usize, qkv: &mut Self::Rows) -> OpResult {
        self.ops.rope_kv_write(step, layer, qkv)
    }
    fn kv_written(&mut self, layer: usize) -> OpResult {
        self.ops.kv_written(layer)
    }
    fn attention(&mut self, step: &Step<'_>, layer: usize, qkv: &Self::Rows, out: &mut Self::Rows) -> OpResult {
        match self.calls_left.checked_sub(1) {
            Some(left) => self.calls_left = left,
            None if self.panics => panic!("a test's panic"),
            None => return Err(ModelError::DoesNotFit("a test's error".into())),
        }
        self.ops.attention(step, layer, qkv, out)
    }
    fn silu_mul(&mut self, gate_up: &Self::Rows, out: &mut Self::Rows) -> OpResult {
        self.ops.silu_mul(gate_up, out)
    }
    fn gather(&mut self, x: &Self::Rows, rows: &[usize], out: &mut Self::Rows) -> OpResult {
        self.ops.gather(x, rows, out)
    }
    fn all_reduce(&mut self, x: &mut Self::Rows) -> OpResult {
        self.ops.all_reduce(x)
    }
    fn logits(&mut self, x: &Self::Rows, head: &Self::Matrix, out: &mut Vec<f32>) -> OpResult {
        self.ops.logits(x, head, out)
    }
    fn abort(&self, reason: &str) {
        self.ops.abort(reason)
    }
}

#[test]
fn a_rank_that_fails_or_panics_ends_the_model_at_once() {
    let spec = Spec::llama();
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 44);
    let files = ModelFiles::open(dir.path()).unwrap();
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    let kv = KvCache::allocate(config.kv_geometry(BLOCK), 4).unwrap();
    for (bad, panics, reason) in [
        (1, false, "a test's error"),
        (1, true, "panicked"),
        (0, false, "a test's error"),
        (2, true, "panicked"),
    ] {
        let slices = ShardSlices::of_shared_arena(&config, 4).unwrap();
        let ranks = slices.into_iter().zip(SharedMemory::group(4, false)).enumerate();
        let decoders = ranks.map(|(rank, (slices, end))| {
            let ops = Failing {
                ops: CpuOps::sharded(Kernels::new(1), slices, Quantization::None, Box::new(end)),
                // Two steps of three layers go well, then the second layer's attention does not.
                calls_left: if rank == bad { 7 } else { usize::MAX },
                panics,
            };
            Decoder::with_ops(ops, &files, config.clone(), &()).unwrap()
        });
        let mut model = TensorParallel::new(decoders.collect()).unwrap();
        let batch = |at: usize| ForwardBatch {
            tokens: vec![1, 2, 3],
            seqs: vec![SeqSpan {
                start_pos: at,
                len: 3,
                blocks: vec![1],
                logits: true,
            }],
        };
        assert_eq!(model.forward(&batch(0), &kv, &mut |_| {}).unwrap().rows(), 1);
        let refused = model.forward(&batch(600), &kv, &mut |_| {}).map(drop);
        assert!(matches!(refused, Err(ModelError::Batch(_))), "a bad batch harms nobody");
        assert_eq!(model.forward(&batch(3), &kv, &mut |_| {}).unwrap().rows(), 1);
        let begin = Instant::now();
        for _ in 0..2 {
            match model.forward(&batch(6), &kv, &mut |_| {}).map(drop) {
                Err(ModelError::Rank { rank, reason: told }) => {
                    assert_eq!(rank, bad);
                    assert!(told.contains(reason), "{told}");
                }
                other => panic!("{other:?}"),
            }
        }
        drop(model);
        // Far below the minute after which a rank that does not come is given up.
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn a_panic_of_the_caller_frees_the_other_ranks() {
    let spec = Spec::llama();
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 45);
    let mut runner = Runner::with_options(dir.path(), 4, &options(2, 2, Quantization::None));
    let batch = ForwardBatch {
        tokens: vec![1],
        seqs: vec![SeqSpan {
            start_pos: 0,
            len: 1,
            blocks: vec![0],
            logits: true,
        }],
    };
    let (model, kv) = (&mut runner.model, &runner.kv);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        model.forward(&batch, kv, &mut |_| panic!("a test's panic")).map(drop)
    }));
    assert!(outcome.is_err());
    let after = model.forward(&batch, kv, &mut |_| {}).map(drop);
    assert!(matches!(after, Err(ModelError::Rank { rank: 0, .. })), "{after:?}");
}
