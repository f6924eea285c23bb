//! The engine benchmark on an engine that keeps books: it asks for exactly the work that the plan names.

use std::sync::Arc;

use baton_engine::bench::{BenchPlan, Costs, Limits, Workload, measure};
use baton_engine::{Engine, EngineError, MockConfig, MockEngine, StepBatch};
use baton_kernels::limits::{Arithmetic, PeakFigure, ReadFigure};
use baton_kvtransfer::Region;
use baton_model::KvGeometry;

/// (spans, first position, tokens, sampled spans) of each step.
type Asked = Vec<(usize, usize, usize, usize)>;

struct Recording(MockEngine, Asked);

impl Engine for Recording {
    fn geometry(&self) -> KvGeometry {
        self.0.geometry()
    }
    fn region(&self) -> Arc<Region> {
        self.0.region()
    }
    fn total_blocks(&self) -> u32 {
        self.0.total_blocks()
    }
    fn context_length(&self) -> usize {
        self.0.context_length()
    }
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
    fn step(&mut self, batch: &StepBatch, layer_done: &mut dyn FnMut(usize)) -> Result<Vec<Option<u32>>, EngineError> {
        let sampled = batch.seqs.iter().filter(|span| span.sample.is_some()).count();
        self.1
            .push((batch.seqs.len(), batch.seqs[0].start_pos, batch.tokens(), sampled));
        let mut blocks: Vec<_> = batch.seqs.iter().flat_map(|span| &span.blocks).collect();
        let all = blocks.len();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), all, "sequences share no block");
        self.0.step(batch, layer_done)
    }
}

fn engine() -> Recording {
    let config = MockConfig {
        block_size: 4,
        total_blocks: 64,
        context_length: 64,
        ..MockConfig::default()
    };
    Recording(MockEngine::new(config).expect("a mock"), Vec::new())
}

fn plan(workloads: Vec<Workload>) -> BenchPlan {
    BenchPlan {
        workloads,
        decode_tokens: 3,
        chunk_tokens: 8,
        repeats: 2,
        seed: 1,
    }
}

fn costs() -> Costs {
    Costs {
        weight_bytes: 1000,
        kv_bytes_per_token: 10,
        layer_weights: 100,
        head_weights: 50,
        attention_pair: 7,
        arithmetic: vec![Arithmetic::F32Fma],
    }
}

#[test]
fn prefill_goes_in_chunks_and_samples_once() {
    let mut engine = engine();
    let figures = measure(
        &mut engine,
        &costs(),
        None,
        &plan(vec![Workload::Prefill { tokens: 20 }]),
        &mut |_, _, _| {},
    )
    .expect("it runs");
    // Warm-up and two repeats.
    assert_eq!(engine.1, [(1, 0, 8, 0), (1, 8, 8, 0), (1, 16, 4, 1)].repeat(3));
    let figure = &figures[0];
    assert_eq!(figure.samples_tokens_per_s.len(), 2);
    let operations = 2.0 * (20.0 * 100.0 + 50.0 + 210.0 * 7.0);
    assert_eq!(figure.operations_per_token, operations / 20.0);
    assert!((figure.gop_per_s * 1e9 / figure.tokens_per_s - operations / 20.0).abs() < 1e-6);
    assert_eq!((figure.bytes_per_step, figure.arithmetic_fraction), (None, None));
}

#[test]
fn decode_repeats_behind_one_context() {
    let mut engine = engine();
    let workload = Workload::Decode { batch: 2, depth: 10 };
    let (mut last, mut calls) = ((0, 0), 0);
    let limits = Limits {
        threads: 1,
        memory_reads: vec![ReadFigure {
            huge_pages: false,
            prefetch_bytes: None,
            gb_per_s: 2.0,
        }],
        resident_gb_per_s: 5.0,
        l2_gb_per_s: 9.0,
        peaks: vec![PeakFigure {
            arithmetic: Arithmetic::F32Fma,
            gop_per_s: 4.0,
        }],
    };
    let figures = measure(
        &mut engine,
        &costs(),
        Some(&limits),
        &plan(vec![workload]),
        &mut |_, done, total| {
            last = (done, total);
            calls += 1;
        },
    )
    .expect("it runs");
    let fill = [(1, 0, 8, 0), (1, 8, 2, 0)];
    let decode = [(2, 10, 2, 2), (2, 11, 2, 2), (2, 12, 2, 2)];
    let expected = [&fill[..], &fill, &decode, &decode, &decode].concat();
    assert_eq!(engine.1, expected);
    assert_eq!((last, calls), ((expected.len(), expected.len()), expected.len() + 1));
    let figure = &figures[0];
    // 11, 12 and 13 positions, twice.
    assert_eq!(figure.bytes_per_step, Some(1000.0 + 2.0 * 12.0 * 10.0));
    assert_eq!(figure.operations_per_token, 2.0 * (150.0 + 12.0 * 7.0));
    let bandwidth = figure.gb_per_s.expect("decode reads");
    assert_eq!(figure.memory_fraction, Some(bandwidth / 2.0));
    assert_eq!(figure.arithmetic_fraction, Some(figure.gop_per_s / 4.0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |plan: &BenchPlan| {
        let mut engine = engine();
        let outcome = measure(&mut engine, &costs(), None, plan, &mut |_, _, _| {});
        assert!(engine.1.is_empty());
        outcome.expect_err("refused").to_string()
    };
    let long = plan(vec![Workload::Prefill { tokens: 65 }]);
    assert!(refused(&long).contains("context has 64"));
    let wide = plan(vec![Workload::Decode { batch: 5, depth: 50 }]);
    assert!(refused(&wide).contains("needs 70 KV blocks and the engine has 64"));
    let never = BenchPlan {
        repeats: 0,
        ..plan(vec![])
    };
    assert!(refused(&never).contains("repeats is 0"));
}
