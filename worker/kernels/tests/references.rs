//! Every kernel against a scalar f64 reference over random shapes, tails included, on every instruction set here.

mod common;

use baton_kernels::{Kernels, KvLayout, MatrixPart, StoredType};
use common::{Data, Paged, STORED, Stored, assert_close, attend, isas};
use proptest::prelude::*;

fn stored_type() -> impl Strategy<Value = StoredType> {
    prop::sample::select(STORED.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn linear_matches_a_scalar_sum(
        rows in 1usize..70, k in 1usize..150, columns in prop::collection::vec(1usize..60, 1..4),
        bias in any::<bool>(), kind in stored_type(), threads in 1usize..4, seed in any::<u64>(),
    ) {
        let mut data = Data::new(seed);
        let x = data.floats(rows * k);
        let weights: Vec<Stored> = columns.iter().map(|n| Stored::new(kind, &data.floats(n * k))).collect();
        let biases: Vec<Vec<f32>> = columns.iter().map(|n| data.floats(*n)).collect();
        let parts: Vec<MatrixPart<'_>> = (0..columns.len())
            .map(|i| MatrixPart {
                weights: weights[i].elements(), bias: bias.then_some(&biases[i][..]), columns: columns[i],
            })
            .collect();
        let mut want = Vec::new();
        for row in x.chunks(k) {
            for (i, w) in weights.iter().enumerate() {
                for (n, w) in w.elements().to_f32().chunks(k).enumerate() {
                    let dot: f64 = row.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    want.push(dot + if bias { f64::from(biases[i][n]) } else { 0.0 });
                }
            }
        }
        for isa in isas() {
            let mut out = vec![f32::NAN; want.len()];
            Kernels::with_isa(threads, isa).linear(&x, rows, k, &parts, &mut out);
            assert_close(&out, &want, 2e-5);
        }
    }

    #[test]
    fn rms_norm_matches(
        rows in 1usize..20, width in 1usize..90, residual in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut data = Data::new(seed);
        let (x, delta, weight) = (data.floats(rows * width), data.floats(rows * width), data.floats(width));
        let eps = 1e-5f32;
        let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| if residual { a + b } else { *a }).collect();
        let want: Vec<f64> = sum
            .chunks(width)
            .flat_map(|row| {
                let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + f64::from(eps)).sqrt();
                row.iter().zip(&weight).map(move |(v, w)| f64::from(*v) * scale * f64::from(*w)).collect::<Vec<_>>()
            })
            .collect();
        for isa in isas() {
            let (mut x, mut out) = (x.clone(), vec![f32::NAN; rows * width]);
            Kernels::with_isa(2, isa).rms_norm(&mut x, residual.then_some(&delta[..]), &weight, eps, &mut out);
            assert_close(&out, &want, 1e-5);
            assert_eq!(x, sum.clone());
        }
    }

    #[test]
    fn silu_mul_matches(rows in 1usize..9, width in 1usize..40, scale in 1f32..120.0, seed in any::<u64>()) {
        let mut data = Data::new(seed);
        let gate_up: Vec<f32> = data.floats(rows * 2 * width).into_iter().map(|v| v * scale).collect();
        let want: Vec<f64> = gate_up
            .chunks(2 * width)
            .flat_map(|row| {
                let (gate, up) = row.split_at(width);
                let one = |(g, u): (&f32, &f32)| f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u);
                gate.iter().zip(up).map(one).collect::<Vec<_>>()
            })
            .collect();
        for isa in isas() {
            let mut out = vec![f32::NAN; rows * width];
            Kernels::with_isa(2, isa).silu_mul(&gate_up, width, &mut out);
            assert_close(&out, &want, 1e-5);
        }
    }

    #[test]
    fn paged_attention_matches_full_softmax(
        lengths in prop::collection::vec(1usize..75, 1..4), group in 1usize..5, kv_heads in 1usize..4,
        half_dim in 1usize..40, block_size in prop::sample::select(vec![1usize, 4, 8, 16]), seed in any::<u64>(),
    ) {
        let (heads, dim) = (group * kv_heads, 2 * half_dim);
        let layout = KvLayout { layers: 2, kv_heads, head_dim: dim, block_size };
        let mut data = Data::new(seed);
        let width = heads * dim + 2 * layout.slot();
        let inputs: Vec<Vec<f32>> = lengths.iter().map(|l| data.floats(l * width)).collect();
        let qkv = |seq: usize, at: usize| inputs[seq][at * width..(at + 1) * width].to_vec();
        let angle = |at: usize, i: usize| at as f64 * 0.3 / (i + 1) as f64;
        let angles = |at: usize| {
            let of = |f: fn(f64) -> f64| (0..half_dim).map(|i| f(angle(at, i)) as f32).collect::<Vec<_>>();
            (of(f64::cos), of(f64::sin))
        };
        let rotated = |seq: usize, at: usize, from: usize| -> Vec<f64> {
            let x = &qkv(seq, at)[from..from + dim];
            (0..dim)
                .map(|i| {
                    let (sin, cos) = angle(at, i % half_dim).sin_cos();
                    let other = f64::from(x[(i + half_dim) % dim]);
                    f64::from(x[i]) * cos + if i < half_dim { -other * sin } else { other * sin }
                })
                .collect()
        };
        let mut want = Vec::new();
        for (seq, length) in lengths.iter().enumerate() {
            for at in 0..*length {
                for head in 0..heads {
                    let q = rotated(seq, at, head * dim);
                    let kv_head = head / group;
                    let scores: Vec<f64> = (0..=at)
                        .map(|key| {
                            let k = rotated(seq, key, heads * dim + kv_head * dim);
                            q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    for i in 0..dim {
                        let from = heads * dim + layout.slot() + kv_head * dim + i;
                        let dot = |(key, s): (usize, &f64)| (s - max).exp() * f64::from(qkv(seq, key)[from]);
                        want.push(scores.iter().enumerate().map(dot).sum::<f64>() / total);
                    }
                }
            }
        }
        let chunk: Vec<_> = lengths.iter().enumerate().map(|(seq, len)| (seq, 0, *len)).collect();
        for isa in isas() {
            let mut paged = Paged::new(layout, &lengths, &mut data);
            let kernels = Kernels::with_isa(2, isa);
            let out = attend(&kernels, &mut paged, heads, 1, &chunk, &qkv, &angles);
            assert_close(&out, &want, 2e-5);
        }
    }

    #[test]
    fn embed_widens_exactly(kind in stored_type(), width in 1usize..40, seed in any::<u64>()) {
        let mut data = Data::new(seed);
        let table = Stored::new(kind, &data.floats(11 * width));
        let ids: Vec<u32> = (0..7).map(|_| (data.next() % 11) as u32).collect();
        let mut out = vec![f32::NAN; ids.len() * width];
        Kernels::new(1).embed(table.elements(), width, &ids, &mut out);
        let all = table.elements().to_f32();
        let want: Vec<f32> = ids.iter().flat_map(|i| all[*i as usize * width..][..width].to_vec()).collect();
        assert_eq!(out, want);
    }
}

#[test]
fn long_reductions_cross_the_k_blocks() {
    let (rows, k, n) = (37, 2500, 29);
    let mut data = Data::new(5);
    let x = data.floats(rows * k);
    for kind in STORED {
        let w = Stored::new(kind, &data.floats(n * k));
        let wide = w.elements().to_f32();
        let want: Vec<f64> = x
            .chunks(k)
            .flat_map(|r| {
                let dot = |w: &[f32]| r.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                wide.chunks(k).map(dot).collect::<Vec<_>>()
            })
            .collect();
        for isa in isas() {
            let mut out = vec![0.0; rows * n];
            let part = MatrixPart {
                weights: w.elements(),
                bias: None,
                columns: n,
            };
            Kernels::with_isa(2, isa).linear(&x, rows, k, &[part], &mut out);
            assert_close(&out, &want, 5e-5);
        }
    }
}
