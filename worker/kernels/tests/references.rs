//! Every kernel against a scalar f64 reference over random shapes, tails included, on every instruction set here.

mod common;

use baton_kernels::{Isa, Kernels, KvDtype, KvLayout, WeightFormat};
use common::{Data, KV_DTYPES, Paged, assert_close, attend, bits, isas, pack};
use proptest::prelude::*;

fn format() -> impl Strategy<Value = WeightFormat> {
    prop::sample::select(WeightFormat::ALL.to_vec())
}

/// A row as the format multiplies it.
fn activations(format: WeightFormat, isa: Isa, row: &[f32]) -> Vec<f64> {
    let quantised = |row: &[f32]| -> Vec<f64> {
        let largest = row.iter().fold(0f32, |a, v| a.max(v.abs()));
        let (scale, inverse) = (largest / 127.0, if largest > 0.0 { 127.0 / largest } else { 0.0 });
        row.iter()
            .map(|v| f64::from((v * inverse).round_ties_even()) * f64::from(scale))
            .collect()
    };
    match format {
        WeightFormat::F32 | WeightFormat::F16 => row.iter().map(|v| f64::from(*v)).collect(),
        WeightFormat::Bf16 if isa < Isa::Avx512Bf16 => row.iter().map(|v| f64::from(*v)).collect(),
        WeightFormat::Bf16 => row.iter().map(|v| half::bf16::from_f32(*v).to_f64()).collect(),
        WeightFormat::Int8 => quantised(row),
        _ => row.chunks(32).flat_map(quantised).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Against the packed weights' own dequantised values, with activations rounded as the format says.
    #[test]
    fn linear_matches_a_scalar_sum_of_its_dequantised_weights(
        rows in 1usize..40, k in 1usize..200, columns in 1usize..150, bias in any::<bool>(), format in format(),
        threads in 1usize..4, seed in any::<u64>(),
    ) {
        let mut data = Data::new(seed);
        let (x, w, b) = (data.floats(rows * k), data.floats(columns * k), data.floats(columns));
        for isa in isas() {
            let kernels = Kernels::with_isa(threads, isa);
            let packed = pack(&kernels, format, &w, k, bias.then_some(&b[..]));
            let dequantised: Vec<Vec<f32>> = (0..columns).map(|n| packed.dequantized_row(n)).collect();
            let mut want = Vec::new();
            for row in x.chunks(k) {
                let row = activations(format, isa, row);
                for (n, w) in dequantised.iter().enumerate() {
                    let dot: f64 = row.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum();
                    want.push(dot + if bias { f64::from(b[n]) } else { 0.0 });
                }
            }
            let mut out = vec![f32::NAN; want.len()];
            kernels.linear(&x, rows, &packed, &mut out);
            // bf16 dot products may flush tiny terms and round in pairs.
            assert_close(&out, &want, if format == WeightFormat::Bf16 { 1e-4 } else { 3e-5 });
        }
    }

    #[test]
    fn packed_weights_are_as_near_as_the_format_says(k in 1usize..200, columns in 1usize..80, format in format(), seed in any::<u64>()) {
        let w: Vec<f32> = Data::new(seed).floats(columns * k);
        let kernels = Kernels::new(1);
        let packed = pack(&kernels, format, &w, k, None);
        for (n, row) in w.chunks(k).enumerate() {
            let largest = row.iter().fold(0f32, |a, v| a.max(v.abs()));
            let allowed = match format {
                WeightFormat::F32 => 0.0,
                WeightFormat::F16 => largest / 2048.0,
                WeightFormat::Bf16 => largest / 256.0,
                // Half a step, and the f16 rounding of scales.
                WeightFormat::Int8 | WeightFormat::Group8 => largest / 127.0 * 0.57,
                WeightFormat::Group4 => largest / 8.0 * 1.01,
                WeightFormat::Group4Min => 2.0 * largest / 15.0 * 0.52 + largest / 1000.0,
            };
            for (got, want) in packed.dequantized_row(n).iter().zip(row) {
                prop_assert!((got - want).abs() <= allowed, "{got} for {want}, allowed {allowed}");
            }
        }
    }

    /// A dequantised GGUF tensor of the same kind packs back to itself, bit for bit.
    #[test]
    fn packing_dequantised_q8_0_and_q4_0_is_exact(k in 1usize..5, columns in 1usize..70, seed in any::<u64>()) {
        let k = k * 32;
        let w: Vec<f32> = Data::new(seed).floats(columns * k);
        let kernels = Kernels::new(1);
        for format in [WeightFormat::Group8, WeightFormat::Group4] {
            let once = pack(&kernels, format, &w, k, None);
            let dequantised: Vec<f32> = (0..columns).flat_map(|n| once.dequantized_row(n)).collect();
            let twice = pack(&kernels, format, &dequantised, k, None);
            for n in 0..columns {
                prop_assert_eq!(bits(&once.dequantized_row(n)), bits(&twice.dequantized_row(n)));
            }
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
        half_dim in 1usize..40, block_size in prop::sample::select(vec![1usize, 4, 8, 16, 24]),
        dtype in prop::sample::select(KV_DTYPES.to_vec()), seed in any::<u64>(),
    ) {
        let (heads, dim) = (group * kv_heads, 2 * half_dim);
        let layout = KvLayout { layers: 2, kv_heads, head_dim: dim, block_size, dtype };
        let mut data = Data::new(seed);
        let width = (heads + 2 * kv_heads) * dim;
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
                            q.iter().zip(&k).map(|(a, b)| a * stored(dtype, *b)).sum::<f64>() / (dim as f64).sqrt()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    for i in 0..dim {
                        let from = (heads + kv_heads + kv_head) * dim + i;
                        let dot = |(key, s): (usize, &f64)| (s - max).exp() * stored(dtype, f64::from(qkv(seq, key)[from]));
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
            // A key near the middle of two 16-bit floats may be rounded the other way: it is rotated in f32 there.
            assert_close(&out, &want, if dtype == KvDtype::F32 { 2e-5 } else { 4e-3 });
        }
    }
}

/// What the arena keeps of a value.
fn stored(dtype: KvDtype, value: f64) -> f64 {
    match dtype {
        KvDtype::F32 => value,
        KvDtype::F16 => half::f16::from_f64(value).to_f64(),
        KvDtype::Bf16 => half::bf16::from_f64(value).to_f64(),
    }
}

#[test]
fn long_reductions_and_many_panels() {
    let (rows, k, n) = (37, 2500, 200);
    let mut data = Data::new(5);
    let (x, w) = (data.floats(rows * k), data.floats(n * k));
    for format in WeightFormat::ALL {
        for isa in isas() {
            let kernels = Kernels::with_isa(2, isa);
            let packed = pack(&kernels, format, &w, k, None);
            let dequantised: Vec<Vec<f32>> = (0..n).map(|n| packed.dequantized_row(n)).collect();
            let mut want = Vec::new();
            for row in x.chunks(k) {
                let row = activations(format, isa, row);
                want.extend(
                    dequantised
                        .iter()
                        .map(|w| row.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum::<f64>()),
                );
            }
            let mut out = vec![0.0; rows * n];
            kernels.linear(&x, rows, &packed, &mut out);
            assert_close(&out, &want, if format == WeightFormat::Bf16 { 5e-4 } else { 1e-4 });
        }
    }
}
