//! Decoding of ggml's quantised blocks, the weight formats of GGUF files.
//!
//! The layouts and formulas are those of ggml (`ggml/src/ggml-common.h`: `block_q4_0` … `block_q6_K`; the reference
//! decoders in `ggml/src/ggml-quants.c`): a block holds a fixed number of consecutive elements of one row, all fields
//! little-endian and unpadded. "Low nibbles first" below means that the low four bits of the bytes hold the first half
//! of the elements, the high four bits the second half.
//!
//! Does not multiply and does not quantise: kernels that compute on blocks directly repack the same layouts.

use crate::weights::StoredType;
use half::{bf16, f16};

/// Elements of a block of the simple formats (`QK4_0`, …, `QK8_0`).
pub(crate) const SIMPLE_ELEMENTS: usize = 32;
/// Elements of a super-block of the K formats (`QK_K`).
pub(crate) const SUPER_ELEMENTS: usize = 256;

/// Decodes whole blocks of `kind` to f32: `bytes` is any number of consecutive blocks, `out` takes all their elements.
/// The float types are decoded too, as blocks of one element. `bytes` needs no alignment. The multiplications and
/// additions are those of ggml's reference decoder, in its order, so the values are the same to the bit.
///
/// # Panics
/// If `out` does not hold exactly the elements of `bytes`, or `bytes` is not whole blocks.
pub fn dequantize(kind: StoredType, bytes: &[u8], out: &mut [f32]) {
    assert!(
        kind.bytes_for(out.len()) == Some(bytes.len()),
        "{} bytes of {kind} are not {} elements",
        bytes.len(),
        out.len()
    );
    match kind {
        StoredType::F32 => each::<4, 1>(bytes, out, |b, o| o[0] = f32::from_le_bytes(*b)),
        StoredType::Bf16 => each::<2, 1>(bytes, out, |b, o| o[0] = bf16::from_le_bytes(*b).to_f32()),
        StoredType::F16 => each::<2, 1>(bytes, out, |b, o| o[0] = f16::from_le_bytes(*b).to_f32()),
        StoredType::Q4_0 => each(bytes, out, q4_0),
        StoredType::Q4_1 => each(bytes, out, q4_1),
        StoredType::Q5_0 => each(bytes, out, q5_0),
        StoredType::Q5_1 => each(bytes, out, q5_1),
        StoredType::Q8_0 => each(bytes, out, q8_0),
        StoredType::Q2K => each(bytes, out, q2_k),
        StoredType::Q3K => each(bytes, out, q3_k),
        StoredType::Q4K => each(bytes, out, q4_k),
        StoredType::Q5K => each(bytes, out, q5_k),
        StoredType::Q6K => each(bytes, out, q6_k),
    }
}

/// Runs `decode` on each block of `BYTES` bytes and `ELEMENTS` elements.
fn each<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (blocks, outs) = (bytes.as_chunks::<BYTES>().0, out.as_chunks_mut::<ELEMENTS>().0);
    blocks.iter().zip(outs).for_each(|(block, out)| decode(block, out));
}

/// The f16 at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16, qs: [u8; 16]`, low nibbles first; `x = d (q - 8)`.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((q, l), h) in block[2..].iter().zip(low).zip(high) {
        *l = (i32::from(q & 15) - 8) as f32 * d;
        *h = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

/// `d: f16, m: f16, qs: [u8; 16]`, low nibbles first; `x = d q + m`.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((q, l), h) in block[4..].iter().zip(low).zip(high) {
        *l = f32::from(q & 15) * d + m;
        *h = f32::from(q >> 4) * d + m;
    }
}

/// `d: f16, qh: u32, qs: [u8; 16]`, low nibbles first; bit `i` of `qh` is the fifth bit of element `i`;
/// `x = d (q - 16)`.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let quants = fifth_bits(&block[2..6], &block[6..]);
    for (q, o) in quants.into_iter().zip(out) {
        *o = (i32::from(q) - 16) as f32 * d;
    }
}

/// `d: f16, m: f16, qh: u32, qs: [u8; 16]`, as Q5_0; `x = d q + m`.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let quants = fifth_bits(&block[4..8], &block[8..]);
    for (q, o) in quants.into_iter().zip(out) {
        *o = f32::from(q) * d + m;
    }
}

/// Joins 32 nibbles (low ones first) with their fifth bits.
fn fifth_bits(high: &[u8], nibbles: &[u8]) -> [u8; 32] {
    let bit = |i: usize| ((high[i / 8] >> (i % 8)) & 1) << 4;
    let mut quants = [0; 32];
    for (i, q) in nibbles.iter().enumerate() {
        quants[i] = (q & 15) | bit(i);
        quants[i + 16] = (q >> 4) | bit(i + 16);
    }
    quants
}

/// `d: f16, qs: [i8; 32]`; `x = d q`.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (q, o) in block[2..].iter().zip(out) {
        *o = f32::from(*q as i8) * d;
    }
}

/// `scales: [u8; 16], qs: [u8; 64], d: f16, dmin: f16`: 16 groups of 16 elements, each with a scale (low nibble) and a
/// minimum (high nibble). 32 bytes of `qs` hold 128 elements: bits 0..2 the first 32, bits 2..4 the next, and so on.
/// `x = d scale q - dmin minimum`.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[group] & 15);
        let minimum = dmin * f32::from(block[group] >> 4);
        let (first, shift) = two_bits(group);
        for (q, o) in block[16 + first..][..16].iter().zip(out) {
            *o = scale * f32::from((q >> shift) & 3) - minimum;
        }
    }
}

/// First byte in `qs`, and shift, of the 2-bit quants of a group of 16 elements (Q2_K and Q3_K).
fn two_bits(group: usize) -> (usize, usize) {
    (group / 8 * 32 + group % 2 * 16, group % 8 / 2 * 2)
}

/// `hmask: [u8; 32], qs: [u8; 64], scales: [u8; 12], d: f16`: 16 groups of 16 elements; `qs` as in Q2_K; bit `e / 32` of
/// `hmask[e % 32]` is set if element `e` is not lowered by 4. The 6-bit scales, offset by 32: low nibbles of groups
/// 0..8 in the low, of groups 8..16 in the high nibbles of bytes 0..8; upper two bits of group `g` in byte
/// `8 + g % 4` from bit `2 (g / 4)` on. `x = d (scale - 32) (q - 4)`.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = half_at(block, 108);
    let packed = &block[96..108];
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = (packed[group % 8] >> (group / 8 * 4)) & 15;
        let high = (packed[8 + group % 4] >> (group / 4 * 2)) & 3;
        let scale = d * (i32::from(low | (high << 4)) - 32) as f32;
        let (first, shift) = two_bits(group);
        let (quants, masks) = (&block[32 + first..][..16], &block[group % 2 * 16..][..16]);
        for ((q, mask), o) in quants.iter().zip(masks).zip(out) {
            let kept = (mask >> (group / 2)) & 1;
            *o = scale * (i32::from((q >> shift) & 3) - 4 * i32::from(1 - kept)) as f32;
        }
    }
}

/// `d: f16, dmin: f16, scales: [u8; 12], qs: [u8; 128]`: 8 groups of 32 elements; 32 bytes of `qs` hold a group in the
/// low nibbles and the next one in the high ones. `x = d scale q - dmin minimum`.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = six_bits(&block[4..16], group);
        let (scale, minimum) = (d * f32::from(scale), dmin * f32::from(minimum));
        let shift = group % 2 * 4;
        for (q, o) in block[16 + group / 2 * 32..][..32].iter().zip(out) {
            *o = scale * f32::from((q >> shift) & 15) - minimum;
        }
    }
}

/// Scale and minimum, 6 bits each, of one of the 8 groups of a Q4_K or Q5_K block (ggml's `get_scale_min_k4`): groups
/// 0..4 in the low six bits of bytes 0..4 (scales) and 4..8 (minima); of groups 4..8 the low nibbles in bytes 8..12
/// and the upper two bits on top of the former.
fn six_bits(packed: &[u8], group: usize) -> (u8, u8) {
    match group.checked_sub(4) {
        None => (packed[group] & 63, packed[group + 4] & 63),
        Some(i) => (
            (packed[group + 4] & 15) | (packed[i] >> 6 << 4),
            (packed[group + 4] >> 4) | (packed[group] >> 6 << 4),
        ),
    }
}

/// `d: f16, dmin: f16, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128]`: as Q4_K, with bit `g` of `qh[i]` the fifth bit of
/// element `i` of group `g`.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = six_bits(&block[4..16], group);
        let (scale, minimum) = (d * f32::from(scale), dmin * f32::from(minimum));
        let shift = group % 2 * 4;
        let quants = &block[48 + group / 2 * 32..][..32];
        for ((q, high), o) in quants.iter().zip(&block[16..48]).zip(out) {
            let q = ((q >> shift) & 15) | (((high >> group) & 1) << 4);
            *o = scale * f32::from(q) - minimum;
        }
    }
}

/// `ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: f16`: 16 groups of 16 elements. Each half of a block is 64 bytes
/// of `ql` and 32 of `qh`: elements 0..64 of the half in the low nibbles of `ql`, 64..128 in the high ones; the upper
/// two bits of element `e` of the half in `qh[e % 32]` from bit `2 (e / 32)` on. `x = d scale (q - 32)`.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[192 + group] as i8);
        let (half, first) = (group / 8, group % 8 * 16);
        let low = &block[half * 64 + first % 64..][..16];
        let high = &block[128 + half * 32 + first % 32..][..16];
        let (low_shift, high_shift) = (first / 64 * 4, first / 32 * 2);
        for ((l, h), o) in low.iter().zip(high).zip(out) {
            let q = ((l >> low_shift) & 15) | (((h >> high_shift) & 3) << 4);
            *o = scale * (i32::from(q) - 32) as f32;
        }
    }
}
