//! The kernels against the CPU engine: whole models, computed by the kernels' own source compiled for the host. What is
//! shown here is everything but the GPU itself: arithmetic, indices, barriers, and the host's logic.

mod common;

use baton_cuda::KvMemory;
use baton_model::Quantization;
use common::emulated::{EmulatedDriver, compiler};
use common::{Shape, bits, cpu, cuda, error, options, prompt};
use safetensors::tensor::Dtype;

/// Prompts of several lengths in ragged steps, then some tokens each; logits of every step.
fn both(shape: Shape, quantization: Quantization, tolerance: f32) {
    if compiler().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path(), 7);
    let mut wanted = cpu(dir.path(), quantization, 64);
    let (mut found, _) = cuda(
        dir.path(),
        options(quantization),
        64,
        KvMemory::Device,
        EmulatedDriver::new(),
    );
    let prompts: Vec<Vec<u32>> = [40, 1, 20, 264]
        .iter()
        .map(|len| prompt(*len, shape.vocab, *len as u64))
        .collect();
    let seqs: Vec<usize> = prompts.iter().map(|_| wanted.start()).collect();
    for _ in &seqs {
        found.start();
    }
    let mut steps: Vec<Vec<(usize, &[u32])>> = vec![
        vec![(0, &prompts[0][..]), (3, &prompts[3][..170])],
        vec![(1, &prompts[1][..]), (3, &prompts[3][170..]), (2, &prompts[2][..12])],
        vec![(2, &prompts[2][12..]), (0, &prompts[0][..1])],
    ];
    for _ in 0..2 {
        steps.push(seqs.iter().map(|seq| (*seq, &prompts[0][*seq..*seq + 1])).collect());
    }
    for (index, step) in steps.iter().enumerate() {
        for (row, (found, wanted)) in found.step(step).iter().zip(wanted.step(step)).enumerate() {
            let error = error(found, &wanted);
            eprintln!("step {index}, row {row}: {error:.1e}");
            assert!(error < tolerance, "step {index}, row {row}: {error} of {tolerance}");
        }
    }
}

#[test]
fn a_model_of_f32_has_the_cpu_s_logits_up_to_rounding() {
    both(Shape::small(Dtype::F32), Quantization::None, 1e-5);
}

#[test]
fn a_model_of_bf16_has_the_cpu_s_logits_up_to_rounding() {
    both(Shape::small(Dtype::BF16), Quantization::None, 2e-2);
}

#[test]
fn a_model_of_f16_has_the_cpu_s_logits_up_to_rounding() {
    both(Shape::small(Dtype::F16), Quantization::None, 4e-3);
}

#[test]
fn quantised_models_have_the_cpu_s_logits_up_to_the_rounding_of_its_activations() {
    both(Shape::small(Dtype::BF16), Quantization::Int8, 4e-2);
    both(Shape::small(Dtype::BF16), Quantization::Int4, 4e-2);
}

/// Promise P1: alone or in a batch, in chunks of any length, K and V on the device or the host.
#[test]
fn a_request_has_the_same_bits_alone_batched_and_chunked() {
    if compiler().is_none() {
        return;
    }
    // One way, with chunks and mates, is enough where only the matrix kernels differ.
    for (dtype, quantization, ways) in [
        (Dtype::BF16, Quantization::None, 0..5),
        (Dtype::BF16, Quantization::Int4, 3..4),
    ] {
        let shape = Shape {
            layers: 1,
            ..Shape::small(dtype)
        };
        let dir = tempfile::tempdir().unwrap();
        shape.write(dir.path(), 8);
        let tokens = prompt(280, shape.vocab, 1);
        let mates: Vec<Vec<u32>> = (0..3).map(|i| prompt(1 + 9 * i, shape.vocab, 20 + i as u64)).collect();
        // The logits after the prompt's last token.
        let run = |chunks: &[usize], mates: &[Vec<u32>], memory: KvMemory| {
            let fresh = EmulatedDriver::new();
            let (mut runner, _) = cuda(dir.path(), options(quantization), 128, memory, fresh);
            let seq = runner.start();
            let ids: Vec<usize> = mates.iter().map(|_| runner.start()).collect();
            let mut rest = &tokens[..];
            let mut row = Vec::new();
            for (index, chunk) in chunks.iter().enumerate() {
                let (part, after) = rest.split_at(*chunk);
                rest = after;
                let mut parts: Vec<(usize, &[u32])> = vec![(seq, part)];
                for (id, mate) in ids.iter().zip(mates) {
                    parts.push((*id, if index == 0 { mate } else { &mate[..1] }));
                }
                let turn = index % parts.len();
                parts.rotate_left(turn);
                let at = parts.iter().position(|(id, _)| *id == seq).unwrap();
                row = bits(&runner.step(&parts)[at]);
            }
            assert!(rest.is_empty());
            row
        };
        let alone = run(&[280], &[], KvMemory::Device);
        let all = [
            (&[1, 279][..], &[][..], KvMemory::Device),
            (&[279, 1], &[], KvMemory::Device),
            (&[17, 240, 22, 1], &[], KvMemory::Host),
            (&[100, 179, 1], &mates[..], KvMemory::Device),
            (&[280], &mates[..], KvMemory::Device),
        ];
        for (chunks, mates, memory) in all[ways].iter().copied() {
            let found = run(chunks, mates, memory);
            assert!(
                found == alone,
                "{dtype:?} as {quantization}, chunks {chunks:?}, {} mates",
                mates.len()
            );
        }
    }
}

#[test]
fn replayed_decode_steps_have_the_same_bits() {
    if compiler().is_none() {
        return;
    }
    let shape = Shape {
        layers: 1,
        ..Shape::small(Dtype::BF16)
    };
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path(), 9);
    let run = |graphs: bool| {
        let options = baton_cuda::OpsOptions {
            graphs,
            ..options(Quantization::None)
        };
        let (mut runner, _) = cuda(dir.path(), options, 64, KvMemory::Device, EmulatedDriver::new());
        let (one, other, long) = (runner.start(), runner.start(), runner.start());
        runner.step(&[
            (one, &prompt(20, shape.vocab, 1)),
            (other, &prompt(5, shape.vocab, 2)),
            (long, &prompt(270, shape.vocab, 3)),
        ]);
        let mut rows = Vec::new();
        for token in 0..5u32 {
            rows.extend(runner.step(&[(other, &[token]), (one, &[token + 7]), (long, &[token])]));
        }
        let rows: Vec<Vec<u32>> = rows.iter().map(|row| bits(row)).collect();
        (rows, runner.decoder.ops_mut().graphs_replayed())
    };
    let (plain, none) = run(false);
    let (replayed, some) = run(true);
    assert!(plain == replayed);
    assert_eq!((none, some), (0, 4));
}
