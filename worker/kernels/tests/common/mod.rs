//! Shared by the kernel tests: deterministic data, a KV arena with its blocks in shuffled order, instruction sets.
#![allow(dead_code)]

use baton_kernels::{AttentionSpan, Elements, Isa, Kernels, KvArena, KvLayout, StoredType};
use half::{bf16, f16};

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

/// Weights in one stored type.
pub enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Stored {
    pub fn new(kind: StoredType, values: &[f32]) -> Self {
        match kind {
            StoredType::F32 => Stored::F32(values.to_vec()),
            StoredType::Bf16 => Stored::Bf16(values.iter().map(|v| bf16::from_f32(*v)).collect()),
            StoredType::F16 => Stored::F16(values.iter().map(|v| f16::from_f32(*v)).collect()),
            quantised => panic!("{quantised} elements cannot be viewed"),
        }
    }

    pub fn elements(&self) -> Elements<'_> {
        match self {
            Stored::F32(v) => Elements::F32(v),
            Stored::Bf16(v) => Elements::Bf16(v),
            Stored::F16(v) => Elements::F16(v),
        }
    }
}

pub const STORED: [StoredType; 3] = [StoredType::F32, StoredType::Bf16, StoredType::F16];

pub fn isas() -> Vec<Isa> {
    [Isa::Portable, Isa::Avx2]
        .into_iter()
        .filter(|isa| isa.available())
        .collect()
}

/// Sequences with their own shuffled blocks in one arena.
pub struct Paged {
    pub memory: Vec<f32>,
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
        // NaN everywhere: whatever is read without having been written shows.
        Paged {
            memory: vec![f32::NAN; blocks as usize * layout.block()],
            layout,
            tables,
            blocks,
        }
    }

    pub fn arena(&mut self) -> KvArena<'_> {
        // SAFETY: the memory has exactly this many blocks, and the borrow keeps others away.
        unsafe { KvArena::new(self.memory.as_mut_ptr(), self.blocks, self.layout) }
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
    kernels.rope_kv_write(&mut qkv, heads, &cos, &sin, &spans, layer, &arena);
    let mut out = vec![f32::NAN; rows * heads * layout.head_dim];
    let stride = heads * layout.head_dim + 2 * layout.slot();
    kernels.attention(&qkv, stride, heads, &spans, layer, &arena, &mut out);
    out
}

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
