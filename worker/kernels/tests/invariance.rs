//! Promise P1 at the kernels: a row's bits do not depend on the other rows, the chunking, or the number of threads.

mod common;

use baton_kernels::{Kernels, KvLayout, WeightFormat};
use common::{Data, KV_DTYPES, Paged, attend, bits, isas, pack};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn linear_rows_alone_and_in_any_batch_have_the_same_bits(
        rows in 1usize..80, k in prop::sample::select(vec![1usize, 7, 8, 33, 128, 1030, 2051]), n in 1usize..150,
        format in prop::sample::select(WeightFormat::ALL.to_vec()), cut in 0usize..80, seed in any::<u64>(),
    ) {
        let mut data = Data::new(seed);
        let (x, w, bias) = (data.floats(rows * k), data.floats(n * k), data.floats(n));
        for isa in isas() {
            let (one, three) = (Kernels::with_isa(1, isa), Kernels::with_isa(3, isa));
            let packed = pack(&three, format, &w, k, Some(&bias));
            let run = |kernels: &Kernels, from: usize, to: usize| {
                let mut out = vec![f32::NAN; (to - from) * n];
                kernels.linear(&x[from * k..to * k], to - from, &packed, &mut out);
                bits(&out)
            };
            let whole = run(&one, 0, rows);
            prop_assert_eq!(&whole, &run(&three, 0, rows));
            let cut = cut % (rows + 1);
            prop_assert_eq!(&whole, &[run(&three, 0, cut), run(&three, cut, rows)].concat());
            let alone: Vec<u32> = (0..rows).flat_map(|r| run(&one, r, r + 1)).collect();
            prop_assert_eq!(&whole, &alone);
        }
    }

    #[test]
    fn attention_in_chunks_batches_and_threads_has_the_same_bits(
        lengths in prop::collection::vec(1usize..150, 1..4), group in 1usize..4, kv_heads in 1usize..3,
        half_dim in prop::sample::select(vec![3usize, 8, 20, 32, 48]), chunk in 1usize..40, dtype in prop::sample::select(KV_DTYPES.to_vec()), seed in any::<u64>(),
    ) {
        let (heads, dim) = (group * kv_heads, 2 * half_dim);
        let layout = KvLayout { layers: 1, kv_heads, head_dim: dim, block_size: 16, dtype };
        let mut data = Data::new(seed);
        let width = (heads + 2 * kv_heads) * dim;
        let inputs: Vec<Vec<f32>> = lengths.iter().map(|l| data.floats(l * width)).collect();
        let qkv = |seq: usize, at: usize| inputs[seq][at * width..(at + 1) * width].to_vec();
        let angles = |at: usize| {
            let angle = |i: usize| at as f32 * 0.3 / (i + 1) as f32;
            ((0..half_dim).map(|i| angle(i).cos()).collect(), (0..half_dim).map(|i| angle(i).sin()).collect())
        };
        for isa in isas() {
            let (one, two) = (Kernels::with_isa(1, isa), Kernels::with_isa(2, isa));
            // All sequences at once, whole.
            let mut paged = Paged::new(layout, &lengths, &mut data);
            let all: Vec<_> = lengths.iter().enumerate().map(|(seq, len)| (seq, 0, *len)).collect();
            let whole = bits(&attend(&two, &mut paged, heads, 0, &all, &qkv, &angles));
            // Each alone, chunk by chunk, then token by token, on one thread.
            for step in [chunk, 1] {
                let mut apart = Vec::new();
                for (seq, length) in lengths.iter().enumerate() {
                    let mut paged = Paged::new(layout, &lengths, &mut data);
                    for start in (0..*length).step_by(step) {
                        let part = [(seq, start, step.min(length - start))];
                        apart.extend(bits(&attend(&one, &mut paged, heads, 0, &part, &qkv, &angles)));
                    }
                }
                prop_assert_eq!(&whole, &apart);
            }
        }
    }

    #[test]
    fn row_wise_kernels_do_not_see_their_neighbours(rows in 2usize..40, width in 1usize..70, seed in any::<u64>()) {
        let mut data = Data::new(seed);
        let (x, weight) = (data.floats(rows * 2 * width), data.floats(2 * width));
        for isa in isas() {
            let (one, three) = (Kernels::with_isa(1, isa), Kernels::with_isa(3, isa));
            let norm = |kernels: &Kernels, x: &[f32]| {
                let (mut x, mut out) = (x.to_vec(), vec![f32::NAN; x.len()]);
                kernels.rms_norm(&mut x, None, &weight, 1e-6, &mut out);
                bits(&out)
            };
            let silu = |kernels: &Kernels, x: &[f32]| {
                let mut out = vec![f32::NAN; x.len() / 2];
                kernels.silu_mul(x, width, &mut out);
                bits(&out)
            };
            prop_assert_eq!(norm(&three, &x), x.chunks(2 * width).flat_map(|r| norm(&one, r)).collect::<Vec<_>>());
            prop_assert_eq!(silu(&three, &x), x.chunks(2 * width).flat_map(|r| silu(&one, r)).collect::<Vec<_>>());
        }
    }
}
