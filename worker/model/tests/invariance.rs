//! Promise P1 at the decoder: logits and KV bytes are bit-identical however a sequence is batched, cut and threaded.

mod common;

use baton_model::{ForwardBatch, KvHalf, LoadOptions, Quantization, SeqSpan};
use common::{BLOCK, Runner, Spec, argmax, bits, prompt};
use safetensors::tensor::Dtype;

const STEPS: usize = 6;

/// Logits bits after the prompt and after each greedy token; the prompt in chunks of `chunk`; with `mates` other
/// sequences in every batch.
fn generate(runner: &mut Runner, prompt_tokens: &[u32], chunk: usize, mates: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let seq = runner.start();
    let mates: Vec<(usize, &[u32])> = mates.iter().map(|m| (runner.start(), &m[..])).collect();
    let mut row = Vec::new();
    for (index, part) in prompt_tokens.chunks(chunk).enumerate() {
        let mut parts = vec![(seq, part)];
        // The mates arrive in the first batch and decode in the others.
        parts.extend(
            mates
                .iter()
                .map(|(id, tokens)| (*id, if index == 0 { *tokens } else { &tokens[..1] })),
        );
        parts.rotate_left(index % (mates.len() + 1));
        let at = parts.iter().position(|(id, _)| *id == seq).unwrap();
        row = runner.step(&parts).swap_remove(at);
    }
    let mut rows = vec![bits(&row)];
    for _ in 0..STEPS {
        let token = [argmax(&row)];
        let mut parts: Vec<(usize, &[u32])> = mates.iter().map(|(id, tokens)| (*id, &tokens[..1])).collect();
        parts.push((seq, &token));
        row = runner.step(&parts).pop().unwrap();
        rows.push(bits(&row));
    }
    rows
}

fn has_the_same_bits_alone_batched_chunked_and_on_any_threads(ranks: usize, all_threads: &[usize]) {
    let formats = [
        (Dtype::F32, Quantization::None),
        (Dtype::BF16, Quantization::None),
        (Dtype::F16, Quantization::None),
        (Dtype::BF16, Quantization::Int8),
        (Dtype::BF16, Quantization::Int4),
    ];
    for (dtype, quantization) in formats {
        let spec = Spec { dtype, ..Spec::qwen2() };
        let dir = tempfile::tempdir().unwrap();
        spec.write(dir.path(), 21);
        let tokens = prompt(53, spec.vocab, 4);
        let mates: Vec<Vec<u32>> = (0..9).map(|i| prompt(1 + 7 * i, spec.vocab, 50 + i as u64)).collect();
        let runner = |threads: usize, blocks: u32| {
            let options = LoadOptions {
                quantization,
                tensor_parallel: ranks,
                ..LoadOptions::threads(threads)
            };
            Runner::with_options(dir.path(), blocks, &options)
        };
        let alone = generate(&mut runner(ranks, 64), &tokens, usize::MAX, &[]);
        for threads in all_threads {
            let mut runner = runner(*threads, 512);
            assert_eq!(runner.model.ranks(), ranks);
            for chunk in [1, 5, 16, 53] {
                assert_eq!(
                    generate(&mut runner, &tokens, chunk, &[]),
                    alone,
                    "{dtype:?} as {quantization}, chunks of {chunk}"
                );
            }
            assert_eq!(
                generate(&mut runner, &tokens, 16, &mates),
                alone,
                "{dtype:?} as {quantization}, in a batch, chunks of 16"
            );
            assert_eq!(
                generate(&mut runner, &tokens, 53, &mates),
                alone,
                "{dtype:?} as {quantization}, in a batch"
            );
        }
    }
}

#[test]
fn a_request_has_the_same_bits_alone_batched_chunked_and_on_any_threads() {
    has_the_same_bits_alone_batched_chunked_and_on_any_threads(1, &[1, 2, 3]);
}

#[test]
fn so_it_has_on_two_ranks() {
    has_the_same_bits_alone_batched_chunked_and_on_any_threads(2, &[2, 3, 4]);
}

#[test]
fn blocks_computed_elsewhere_continue_with_the_same_bits() {
    // What a transfer does: prefill in one cache, copy the bytes of the blocks to other blocks of another cache.
    let spec = Spec::llama();
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 22);
    let tokens = prompt(37, spec.vocab, 5);
    let mut here = Runner::open(dir.path(), 2, 16);
    let mut there = Runner::open(dir.path(), 1, 32);
    let seq = here.start();
    let first = here.step(&[(seq, &tokens)]).remove(0);
    let moved = there.start();
    let geometry = here.kv.geometry();
    for (index, block) in here.tables[seq].clone().into_iter().enumerate() {
        let to = 3 * index as u32 + 1;
        let mut bytes = vec![0; geometry.block_bytes()];
        assert!(here.kv.region().copy_out(geometry.block_range(block).start, &mut bytes));
        assert!(there.kv.region().copy_in(geometry.block_range(to).start, &bytes));
        there.tables[moved].push(to);
    }
    there.lengths[moved] = tokens.len();
    let token = [argmax(&first)];
    assert_eq!(
        bits(&there.step(&[(moved, &token)])[0]),
        bits(&here.step(&[(seq, &token)])[0])
    );
}

#[test]
fn layer_done_comes_in_order_and_finds_the_layer_complete() {
    let spec = Spec::llama();
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 23);
    // Two ranks: a layer is done when both have written their heads.
    let options = LoadOptions {
        tensor_parallel: 2,
        ..LoadOptions::threads(2)
    };
    let mut runner = Runner::with_options(dir.path(), 8, &options);
    let (kv, geometry) = (runner.kv.clone(), runner.kv.geometry());
    for logits in [true, false] {
        let seqs = vec![SeqSpan {
            start_pos: 0,
            len: 20,
            blocks: vec![5, 2],
            logits,
        }];
        let batch = ForwardBatch {
            tokens: prompt(20, spec.vocab, 6),
            seqs,
        };
        let mut seen = Vec::new();
        let read = |layer: usize| {
            let mut bytes = Vec::new();
            for (block, slots) in [(5, 0..BLOCK), (2, 0..20 - BLOCK)] {
                for head in 0..geometry.kv_heads {
                    for half in [KvHalf::K, KvHalf::V] {
                        let range = geometry.range(block, layer, head, half, slots.clone());
                        let mut part = vec![0; range.len()];
                        assert!(kv.region().copy_out(range.start, &mut part));
                        bytes.extend(part);
                    }
                }
            }
            bytes
        };
        let rows = runner
            .model
            .forward(&batch, &kv, &mut |layer| seen.push((layer, read(layer))))
            .unwrap()
            .rows();
        assert_eq!(rows, usize::from(logits));
        assert_eq!(seen.len(), spec.layers);
        for (index, (layer, bytes)) in seen.into_iter().enumerate() {
            assert_eq!(layer, index);
            // Of every head: the second rank's too.
            let head_bytes = bytes.len() / geometry.kv_heads / 2;
            assert!(bytes.chunks(head_bytes / 2).all(|head| head.iter().any(|b| *b != 0)));
            assert_eq!(bytes, read(layer), "layer {layer} changed after it was said to be done");
        }
        // Zeroed again for the second round.
        for block in [5, 2] {
            let range = geometry.block_range(block);
            assert!(kv.region().copy_in(range.start, &vec![0; range.len()]));
        }
    }
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let spec = Spec::llama();
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 24);
    let mut runner = Runner::open(dir.path(), 1, 4);
    let kv = runner.kv.clone();
    let span = |start_pos, len, blocks: &[u32]| SeqSpan {
        start_pos,
        len,
        blocks: blocks.to_vec(),
        logits: true,
    };
    let cases: [(Vec<u32>, Vec<SeqSpan>, &str); 8] = [
        (vec![1, 2], vec![span(0, 1, &[0])], "spans of 1 tokens for 2"),
        (vec![199], vec![span(0, 1, &[0])], "outside a vocabulary"),
        (vec![1], vec![span(16, 1, &[0])], "cannot hold"),
        (vec![1], vec![span(0, 1, &[4])], "outside a cache of 4"),
        (vec![], vec![span(0, 0, &[0])], "empty"),
        (vec![1], vec![span(512, 1, &[0; 40])], "exceeds the context of 512"),
        (vec![1], vec![span(usize::MAX, 1, &[0])], "exceeds the context"),
        (vec![1, 2], vec![span(0, 1, &[3]), span(0, 1, &[3])], "written twice"),
    ];
    for (tokens, seqs, wanted) in cases {
        let error = runner
            .model
            .forward(&ForwardBatch { tokens, seqs }, &kv, &mut |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let rows = runner
        .model
        .forward(&ForwardBatch::default(), &kv, &mut |_| {})
        .unwrap()
        .rows();
    assert_eq!(rows, 0);
}
