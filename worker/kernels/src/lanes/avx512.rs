//! Sixteen lanes in AVX-512 registers, with VNNI; `BF16` adds the bf16 dot product.

use super::Lanes;
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ, VL and VNNI; with `BF16` also AVX512_BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>;

// SAFETY: each method uses only instructions of the sets named above; the caller promises that the CPU has them and
// that pointers are valid for what the trait says.
#[allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
unsafe impl<const BF16: bool> Lanes for Avx512<BF16> {
    const N: usize = 16;
    const BF16: bool = BF16;
    const WIDE: bool = true;
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(v: __m512, p: *mut f32) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        let halves = _mm256_loadu_si256(p.cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        _mm512_reduce_add_ps(v)
    }
    #[inline(always)]
    unsafe fn largest(v: __m512) -> f32 {
        _mm512_reduce_max_ps(v)
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store_i(v: __m512i, p: *mut i32) {
        _mm512_storeu_si512(p.cast(), v)
    }
    #[inline(always)]
    unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn and_i(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn shift_right_4(a: __m512i) -> __m512i {
        _mm512_srli_epi32::<4>(a)
    }
    #[inline(always)]
    unsafe fn even_bf16(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a))
    }
    #[inline(always)]
    unsafe fn odd_bf16(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(0xffff_0000u32 as i32)))
    }
    #[inline(always)]
    unsafe fn even_f16(a: __m512i) -> __m512 {
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a))
    }
    #[inline(always)]
    unsafe fn odd_f16(a: __m512i) -> __m512 {
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(a)))
    }
    #[inline(always)]
    unsafe fn transpose(v: &mut [__m512i; 16]) {
        let mut t = *v;
        // Words, then pairs of words, within 128-bit quarters; then the quarters.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..4 {
            u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            let a = _mm512_shuffle_i32x4::<0x88>(u[i], u[4 + i]);
            let b = _mm512_shuffle_i32x4::<0xdd>(u[i], u[4 + i]);
            let c = _mm512_shuffle_i32x4::<0x88>(u[8 + i], u[12 + i]);
            let d = _mm512_shuffle_i32x4::<0xdd>(u[8 + i], u[12 + i]);
            v[i] = _mm512_shuffle_i32x4::<0x88>(a, c);
            v[8 + i] = _mm512_shuffle_i32x4::<0xdd>(a, c);
            v[4 + i] = _mm512_shuffle_i32x4::<0x88>(b, d);
            v[12 + i] = _mm512_shuffle_i32x4::<0xdd>(b, d);
        }
    }
    #[inline(always)]
    unsafe fn to_f(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512i {
        _mm512_cvtps_epi32(a)
    }
    #[inline(always)]
    unsafe fn exp2_integral(a: __m512i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(a, _mm512_set1_epi32(127))))
    }
    #[inline(always)]
    unsafe fn dot_u8_s8(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(acc, w, x)
    }
    #[inline(always)]
    unsafe fn store_bytes(v: __m512i, p: *mut i8) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v))
    }
    #[inline(always)]
    unsafe fn pairs(low: *const u16, high: *const u16) -> __m512i {
        let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low.cast()));
        let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(high.cast()));
        _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        // SAFETY: vectors of the same 512 bits.
        _mm512_dpbf16_ps(
            acc,
            std::mem::transmute::<__m512i, __m512bh>(w),
            std::mem::transmute::<__m512i, __m512bh>(x),
        )
    }
}
