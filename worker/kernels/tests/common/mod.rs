//! Shared by the kernel tests: deterministic data, a KV arena with its blocks in shuffled order, instruction sets.
#![allow(dead_code)]

use baton_kernels::{AttentionSpan, Isa, Kernels, KvArena, KvDtype, KvLayout, PackedMatrix, WeightFormat};

/// Small deterministic generator (xorshift), so that failures reproduce from the numbers alone.
pub struct Data(u64);

impl Data {
    pub fn new(seed: u64) -> Self {
        Data(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in -1..1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Packs `values`, `[columns, k]`.
pub fn pack(kernels: &Kernels, format: WeightFormat, values: &[f32], k: usize, bias: Option<&[f32]>) -> PackedMatrix {
    let row = |n: usize, out: &mut [f32]| out.copy_from_slice(&values[n * k..(n + 1) * k]);
    kernels
        .pack(format, values.len() / k, k, bias.map(<[f32]>::to_vec), &row)
        .expect("memory")
}

pub fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

/// Sequences with their own shuffled blocks in one arena.
pub struct Paged {
    /// Words, so that it is aligned.
    pub memory: Vec<u32>,
    pub layout: KvLayout,
    pub tables: Vec<Vec<u32>>,
    pub blocks: u32,
}

impl Paged {
    /// Room for sequences of these lengths.
    pub fn new(layout: KvLayout, lengths: &[usize], data: &mut Data) -> Self {
        let needs: Vec<usize> = lengths.iter().map(|l| l.div_ceil(layout.block_size)).collect();
        let blocks = needs.iter().sum::<usize>() as u32 + 1;
        let mut ids: Vec<u32> = (0..blocks).collect();
        for i in (1..ids.len()).rev() {
            ids.swap(i, data.next() as usize % (i + 1));
        }
        let mut ids = ids.into_iter();
        let tables = needs.iter().map(|n| ids.by_ref().take(*n).collect()).collect();
        // NaN everywhere, in every type: whatever is read without having been written shows.
        Paged {
            memory: vec![u32::MAX; (blocks as usize * layout.block_bytes()).div_ceil(4)],
            layout,
            tables,
            blocks,
        }
    }

    pub fn arena(&mut self) -> KvArena<'_> {
        // SAFETY: the memory has exactly this many blocks, and the borrow keeps others away.
        unsafe { KvArena::new(self.memory.as_mut_ptr().cast(), self.blocks, self.layout) }
    }
}

/// Runs rope, KV write and attention of `lens[i]` tokens from `starts[i]` on, for sequences `which`.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    kernels: &Kernels,
    paged: &mut Paged,
    heads: usize,
    layer: usize,
    chunk: &[(usize, usize, usize)],
    qkv_of: &dyn Fn(usize, usize) -> Vec<f32>,
    angles: &dyn Fn(usize) -> (Vec<f32>, Vec<f32>),
) -> Vec<f32> {
    let tables = paged.tables.clone();
    let layout = paged.layout;
    let (mut qkv, mut cos, mut sin, mut spans, mut rows) = (vec![], vec![], vec![], vec![], 0);
    for &(seq, start, len) in chunk {
        spans.push(AttentionSpan {
            first_row: rows,
            rows: len,
            start_position: start,
            blocks: &tables[seq],
        });
        rows += len;
        for position in start..start + len {
            qkv.extend(qkv_of(seq, position));
            let (c, s) = angles(position);
            cos.extend(c);
            sin.extend(s);
        }
    }
    let arena = paged.arena();
    let kv_heads = 0..layout.kv_heads;
    kernels.rope_kv_write(&mut qkv, heads, kv_heads.clone(), &cos, &sin, &spans, layer, &arena);
    let mut out = vec![f32::NAN; rows * heads * layout.head_dim];
    let stride = (heads + 2 * layout.kv_heads) * layout.head_dim;
    kernels.attention(&qkv, stride, heads, kv_heads, &spans, layer, &arena, &mut out);
    out
}

/// All KV types.
pub const KV_DTYPES: [KvDtype; 3] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16];

/// Bits of floats, to compare exactly.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Panics unless all pairs are within `tolerance`, relative to the larger of 1 and the reference.
pub fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs() / w.abs().max(1.0);
        assert!(error <= tolerance, "element {i}: got {g}, want {w}, error {error:e}");
    }
}
