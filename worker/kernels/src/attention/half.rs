//! Attention over bf16 K and V on CPUs that multiply bf16: two elements of a key, or two keys' values, per step and lane.
//! Queries and weights are rounded to bf16, sums stay in f32.
//!
//! A row that sees an odd number of keys gives the next one the weight zero, which adds zero to finite sums whether that
//! position is computed yet or not.

use super::wide::load_words;
use super::{Arithmetic, CHUNK, Scratch, Work};
use crate::lanes::Lanes;
use crate::rows::bf16_bits;
use std::marker::PhantomData;

/// Longest head; beyond the largest in use.
pub(super) const DIM_MAX: usize = 1024;

/// Stands in for the value of a position that does not exist.
static ZEROS: [u16; DIM_MAX] = [0; DIM_MAX];

/// See the module. In words: queries are `[rows][dim / 2]` pairs of elements, keys `[dim / 2][CHUNK]` the same, values
/// `[CHUNK / 2][dim padded]` pairs of positions, weights the same at the start of their row of scores.
pub(super) struct Half<L>(PhantomData<L>);

/// Two floats as bf16, the first in the low half.
#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    u32::from(bf16_bits(low)) | u32::from(bf16_bits(high)) << 16
}

impl<L: Lanes> Arithmetic<L> for Half<L> {
    #[inline(always)]
    unsafe fn keep_query(s: &Scratch, row: usize, from: *const f32, scale: f32) {
        let to = s.q.cast::<u32>();
        for i in 0..s.dim / 2 {
            // SAFETY: the caller's; the scratch has a row.
            unsafe { *to.add(row * s.dim / 2 + i) = pair(*from.add(2 * i) * scale, *from.add(2 * i + 1) * scale) };
        }
    }

    #[inline(always)]
    unsafe fn load_chunk(w: &Work<'_>, s: &Scratch, base: usize, count: usize) {
        let (dim, half_bytes) = (s.dim, w.kv.layout().half_bytes());
        let words = dim / 2;
        // SAFETY: keys and values of `count` positions exist; reads past a row's end go through a copy.
        unsafe {
            let mut rows = [std::ptr::null::<u8>(); CHUNK];
            for (i, row) in rows.iter_mut().enumerate().take(count) {
                *row = w.key(base + i);
            }
            for group in (0..CHUNK).step_by(L::N) {
                for word in (0..words).step_by(L::N) {
                    let mut block = [L::splat_i(0); 16];
                    for (lane, to) in block.iter_mut().enumerate().take(L::N) {
                        let row = rows[group + lane];
                        if !row.is_null() {
                            *to = load_words::<L>(row.add(word * 4), words - word);
                        }
                    }
                    L::transpose(&mut block);
                    for (i, lane) in block.iter().enumerate().take(L::N.min(words - word)) {
                        L::store_i(*lane, s.keys.add((word + i) * CHUNK + group).cast());
                    }
                }
            }
            let whole = dim / L::N * L::N;
            for (i, two) in rows.chunks_exact(2).enumerate().take(count.div_ceil(2)) {
                let value = |row: *const u8| match row.is_null() {
                    true => ZEROS.as_ptr(),
                    false => row.add(half_bytes).cast::<u16>(),
                };
                let (low, high) = (value(two[0]), value(two[1]));
                let to = s.values.add(i * s.padded).cast::<i32>();
                for at in (0..whole).step_by(L::N) {
                    L::store_i(L::pairs(low.add(at), high.add(at)), to.add(at));
                }
                if whole < s.padded {
                    let (mut tail_low, mut tail_high) = ([0u16; 16], [0u16; 16]);
                    std::ptr::copy_nonoverlapping(low.add(whole), tail_low.as_mut_ptr(), dim - whole);
                    std::ptr::copy_nonoverlapping(high.add(whole), tail_high.as_mut_ptr(), dim - whole);
                    L::store_i(L::pairs(tail_low.as_ptr(), tail_high.as_ptr()), to.add(whole));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn score<const M: usize, const V: usize>(s: &Scratch, row: usize) -> usize {
        let words = s.dim / 2;
        for key in (0..CHUNK).step_by(V * L::N) {
            // SAFETY: the caller's.
            unsafe {
                let mut acc = [[L::splat(0.0); V]; M];
                let q = s.q.cast::<i32>().add(row * words);
                for i in 0..words {
                    let mut keys = [L::splat_i(0); V];
                    for (v, keys) in keys.iter_mut().enumerate() {
                        *keys = L::load_i(s.keys.add(i * CHUNK + key + v * L::N).cast());
                    }
                    for (m, row) in acc.iter_mut().enumerate() {
                        let q = L::splat_i(*q.add(m * words + i));
                        for (acc, keys) in row.iter_mut().zip(keys) {
                            *acc = L::dot_bf16(*acc, keys, q);
                        }
                    }
                }
                for (m, lanes) in acc.iter().enumerate() {
                    for (v, lanes) in lanes.iter().enumerate() {
                        L::store(*lanes, s.scores.add((row + m) * CHUNK + key + v * L::N));
                    }
                }
            }
        }
        M
    }

    #[inline(always)]
    unsafe fn keep_weights(s: &Scratch, row: usize) {
        // SAFETY: the row has CHUNK scores; they are read before the pairs take their place.
        unsafe {
            let scores = s.scores.add(row * CHUNK);
            let weights = scores.cast::<[f32; CHUNK]>().read();
            let mut pairs = [0u32; CHUNK / 2];
            for (i, to) in pairs.iter_mut().enumerate() {
                *to = pair(weights[2 * i], weights[2 * i + 1]);
            }
            scores.cast::<[u32; CHUNK / 2]>().write(pairs);
        }
    }

    #[inline(always)]
    unsafe fn weigh<const M: usize, const V: usize>(s: &Scratch, row: usize, count: usize, at: usize) {
        // SAFETY: the caller's.
        unsafe {
            let mut acc = [[L::splat(0.0); V]; M];
            for (m, lanes) in acc.iter_mut().enumerate() {
                let decay = L::splat(*s.decay.add(row + m));
                for (v, lanes) in lanes.iter_mut().enumerate() {
                    *lanes = L::mul(decay, L::load(s.out.add((row + m) * s.padded + at + v * L::N)));
                }
            }
            for two in 0..count.div_ceil(2) {
                let mut values = [L::splat_i(0); V];
                for (v, values) in values.iter_mut().enumerate() {
                    *values = L::load_i(s.values.add(two * s.padded + at + v * L::N).cast());
                }
                for (m, lanes) in acc.iter_mut().enumerate() {
                    let weight = L::splat_i(*s.scores.add((row + m) * CHUNK + two).cast::<i32>());
                    for (acc, values) in lanes.iter_mut().zip(values) {
                        *acc = L::dot_bf16(*acc, values, weight);
                    }
                }
            }
            for (m, lanes) in acc.iter().enumerate() {
                for (v, lanes) in lanes.iter().enumerate() {
                    L::store(*lanes, s.out.add((row + m) * s.padded + at + v * L::N));
                }
            }
        }
    }
}
