//! Sixteen lanes in plain Rust; the compiler vectorises for the target's baseline (NEON on aarch64, SSE2 on x86-64).

use super::Lanes;
use half::{bf16, f16};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const N: usize = 16;

#[inline(always)]
fn map2(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for i in 0..N {
        out[i] = f(a[i], b[i]);
    }
    out
}

#[inline(always)]
fn map2_i(a: [i32; N], b: [i32; N], f: impl Fn(i32, i32) -> i32) -> [i32; N] {
    let mut out = [0; N];
    for i in 0..N {
        out[i] = f(a[i], b[i]);
    }
    out
}

// SAFETY: plain Rust runs everywhere; the caller promises that pointers are valid for what the trait says.
#[allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
unsafe impl Lanes for Portable {
    const N: usize = N;
    type F = [f32; N];
    type I = [i32; N];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; N] {
        p.cast::<[f32; N]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(v: [f32; N], p: *mut f32) {
        p.cast::<[f32; N]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; N] {
        p.cast::<[u16; N]>()
            .read_unaligned()
            .map(|h| bf16::from_bits(h).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; N] {
        p.cast::<[u16; N]>()
            .read_unaligned()
            .map(|h| f16::from_bits(h).to_f32_const())
    }
    #[inline(always)]
    unsafe fn add(a: [f32; N], b: [f32; N]) -> [f32; N] {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; N], b: [f32; N]) -> [f32; N] {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; N], b: [f32; N]) -> [f32; N] {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: [f32; N], b: [f32; N]) -> [f32; N] {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: [f32; N], b: [f32; N]) -> [f32; N] {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; N], b: [f32; N]) -> [f32; N] {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: [f32; N]) -> [f32; N] {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        let mut out = [0.0; N];
        for i in 0..N {
            // aarch64 has a fused multiply-add in its baseline; elsewhere `mul_add` would be a library call.
            out[i] = if cfg!(target_arch = "aarch64") {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            };
        }
        out
    }
    #[inline(always)]
    unsafe fn sum(v: [f32; N]) -> f32 {
        let mut v = v;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
    #[inline(always)]
    unsafe fn largest(v: [f32; N]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> [i32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> [i32; N] {
        p.cast::<[i32; N]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store_i(v: [i32; N], p: *mut i32) {
        p.cast::<[i32; N]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn add_i(a: [i32; N], b: [i32; N]) -> [i32; N] {
        map2_i(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn and_i(a: [i32; N], b: [i32; N]) -> [i32; N] {
        map2_i(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn shift_right_4(a: [i32; N]) -> [i32; N] {
        a.map(|v| ((v as u32) >> 4) as i32)
    }
    #[inline(always)]
    unsafe fn even_bf16(a: [i32; N]) -> [f32; N] {
        a.map(|v| f32::from_bits((v as u32) << 16))
    }
    #[inline(always)]
    unsafe fn odd_bf16(a: [i32; N]) -> [f32; N] {
        a.map(|v| f32::from_bits(v as u32 & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn even_f16(a: [i32; N]) -> [f32; N] {
        a.map(|v| f16::from_bits(v as u16).to_f32_const())
    }
    #[inline(always)]
    unsafe fn odd_f16(a: [i32; N]) -> [f32; N] {
        a.map(|v| f16::from_bits((v >> 16) as u16).to_f32_const())
    }
    #[inline(always)]
    unsafe fn transpose(v: &mut [[i32; N]; 16]) {
        let from = *v;
        for (i, row) in v.iter_mut().enumerate() {
            for (j, word) in row.iter_mut().enumerate() {
                *word = from[j][i];
            }
        }
    }
    #[inline(always)]
    unsafe fn to_f(a: [i32; N]) -> [f32; N] {
        a.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn round(a: [f32; N]) -> [i32; N] {
        // Adding and taking away 1.5 * 2^23 rounds to even for |x| < 2^22, which covers every use here, and vectorises;
        // `round_ties_even` is a library call on some targets.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|v| ((v + MAGIC) - MAGIC) as i32)
    }
    #[inline(always)]
    unsafe fn exp2_integral(a: [i32; N]) -> [f32; N] {
        a.map(|v| f32::from_bits(((v + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn dot_u8_s8(acc: [i32; N], w: [i32; N], x: [i32; N]) -> [i32; N] {
        let mut out = acc;
        for i in 0..N {
            let (w, x) = (w[i].to_le_bytes(), x[i].to_le_bytes());
            for j in 0..4 {
                out[i] += i32::from(w[j]) * i32::from(x[j] as i8);
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn store_bytes(v: [i32; N], p: *mut i8) {
        p.cast::<[i8; N]>().write_unaligned(v.map(|v| v as i8))
    }
    #[inline(always)]
    unsafe fn pairs(_: *const u16, _: *const u16) -> [i32; N] {
        unreachable!("guarded by Lanes::BF16")
    }
    #[inline(always)]
    unsafe fn dot_bf16(_: [f32; N], _: [i32; N], _: [i32; N]) -> [f32; N] {
        unreachable!("guarded by Lanes::BF16")
    }
}
