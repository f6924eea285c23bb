//! Attention in f32: K and V of any type are widened once per chunk, K transposed so that a lane is a key.

use super::{Arithmetic, CHUNK, Scratch, Work};
use crate::kv::KvDtype;
use crate::lanes::Lanes;
use std::marker::PhantomData;

/// See the module. Queries are `[rows][dim]`, keys `[dim][CHUNK]`, values `[CHUNK][dim padded]`.
pub(super) struct Wide<L>(PhantomData<L>);

impl<L: Lanes> Arithmetic<L> for Wide<L> {
    #[inline(always)]
    unsafe fn keep_query(s: &Scratch, row: usize, from: *const f32, scale: f32) {
        for i in 0..s.dim {
            // SAFETY: the caller's; the scratch has a row.
            unsafe { *s.q.add(row * s.dim + i) = *from.add(i) * scale };
        }
    }

    #[inline(always)]
    unsafe fn load_chunk(w: &Work<'_>, s: &Scratch, base: usize, count: usize) {
        match w.kv.layout().dtype {
            // SAFETY: the caller's contract is passed on.
            KvDtype::F32 => unsafe { load_typed::<L, 0>(w, s, base, count) },
            // SAFETY: as above.
            KvDtype::F16 => unsafe { load_typed::<L, 1>(w, s, base, count) },
            // SAFETY: as above.
            KvDtype::Bf16 => unsafe { load_typed::<L, 2>(w, s, base, count) },
        }
    }

    #[inline(always)]
    unsafe fn score<const M: usize, const V: usize>(s: &Scratch, row: usize) -> usize {
        let dim = s.dim;
        for key in (0..CHUNK).step_by(V * L::N) {
            // SAFETY: the caller's.
            unsafe {
                let mut acc = [[L::splat(0.0); V]; M];
                let q = s.q.add(row * dim);
                for i in 0..dim {
                    let mut keys = [L::splat(0.0); V];
                    for (v, keys) in keys.iter_mut().enumerate() {
                        *keys = L::load(s.keys.add(i * CHUNK + key + v * L::N));
                    }
                    for (m, row) in acc.iter_mut().enumerate() {
                        let q = L::splat(*q.add(m * dim + i));
                        for (acc, keys) in row.iter_mut().zip(keys) {
                            *acc = L::fma(q, keys, *acc);
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
    unsafe fn keep_weights(_: &Scratch, _: usize) {}

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
            for key in 0..count {
                let mut values = [L::splat(0.0); V];
                for (v, values) in values.iter_mut().enumerate() {
                    *values = L::load(s.values.add(key * s.padded + at + v * L::N));
                }
                for (m, lanes) in acc.iter_mut().enumerate() {
                    let weight = L::splat(*s.scores.add((row + m) * CHUNK + key));
                    for (acc, values) in lanes.iter_mut().zip(values) {
                        *acc = L::fma(weight, values, *acc);
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

/// `T`: 0 f32, 1 f16, 2 bf16.
#[inline(always)]
unsafe fn load_typed<L: Lanes, const T: usize>(w: &Work<'_>, s: &Scratch, base: usize, count: usize) {
    let layout = w.kv.layout();
    let dim = layout.head_dim;
    let element = layout.dtype.bytes();
    let words = layout.row_bytes() / 4;
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
                    let at = word + i;
                    match T {
                        0 => L::store_i(*lane, s.keys.add(at * CHUNK + group).cast()),
                        _ => {
                            let (even, odd) = if T == 1 {
                                (L::even_f16(*lane), L::odd_f16(*lane))
                            } else {
                                (L::even_bf16(*lane), L::odd_bf16(*lane))
                            };
                            L::store(even, s.keys.add(2 * at * CHUNK + group));
                            L::store(odd, s.keys.add((2 * at + 1) * CHUNK + group));
                        }
                    }
                }
            }
        }
        let whole = dim / L::N * L::N;
        for (i, row) in rows.iter().enumerate().take(count) {
            let from = row.add(layout.half_bytes());
            let to = s.values.add(i * s.padded);
            for at in (0..whole).step_by(L::N) {
                L::store(widen::<L, T>(from.add(at * element)), to.add(at));
            }
            if whole < dim {
                let mut tail = [0u32; 16];
                std::ptr::copy_nonoverlapping(
                    from.add(whole * element),
                    tail.as_mut_ptr().cast(),
                    (dim - whole) * element,
                );
                L::store(widen::<L, T>(tail.as_ptr().cast()), to.add(whole));
            }
            std::ptr::write_bytes(
                to.add(dim.next_multiple_of(L::N)),
                0,
                s.padded - dim.next_multiple_of(L::N),
            );
        }
    }
}

#[inline(always)]
unsafe fn widen<L: Lanes, const T: usize>(p: *const u8) -> L::F {
    // SAFETY: the caller's.
    unsafe {
        match T {
            0 => L::load(p.cast()),
            1 => L::load_f16(p.cast()),
            _ => L::load_bf16(p.cast()),
        }
    }
}

/// A vector of words from `p`, of which `left` exist.
#[inline(always)]
pub(super) unsafe fn load_words<L: Lanes>(p: *const u8, left: usize) -> L::I {
    // SAFETY: the caller's.
    unsafe {
        if left >= L::N {
            return L::load_i(p.cast());
        }
        let mut words = [0i32; 16];
        std::ptr::copy_nonoverlapping(p, words.as_mut_ptr().cast(), left * 4);
        L::load_i(words.as_ptr())
    }
}
