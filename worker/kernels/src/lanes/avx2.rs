//! Eight lanes in AVX2 registers, with FMA and F16C.

use super::Lanes;
use std::arch::x86_64::*;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

// SAFETY: each method uses only instructions of the sets named above; the caller promises that the CPU has them and
// that pointers are valid for what the trait says.
#[allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
unsafe impl Lanes for Avx2 {
    const N: usize = 8;
    type F = __m256;
    type I = __m256i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        _mm256_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(v: __m256, p: *mut f32) {
        _mm256_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        let halves = _mm_loadu_si128(p.cast());
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        _mm256_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        _mm256_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        _mm256_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        _mm256_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m256) -> __m256 {
        _mm256_andnot_ps(_mm256_set1_ps(-0.0), a)
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
    #[inline(always)]
    unsafe fn largest(v: __m256) -> f32 {
        let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
    #[inline(always)]
    unsafe fn splat_i(x: i32) -> __m256i {
        _mm256_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load_i(p: *const i32) -> __m256i {
        _mm256_loadu_si256(p.cast())
    }
    #[inline(always)]
    unsafe fn store_i(v: __m256i, p: *mut i32) {
        _mm256_storeu_si256(p.cast(), v)
    }
    #[inline(always)]
    unsafe fn add_i(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn and_i(a: __m256i, b: __m256i) -> __m256i {
        _mm256_and_si256(a, b)
    }
    #[inline(always)]
    unsafe fn shift_right_4(a: __m256i) -> __m256i {
        _mm256_srli_epi32::<4>(a)
    }
    #[inline(always)]
    unsafe fn even_bf16(a: __m256i) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a))
    }
    #[inline(always)]
    unsafe fn odd_bf16(a: __m256i) -> __m256 {
        _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xffff_0000u32 as i32)))
    }
    #[inline(always)]
    unsafe fn even_f16(a: __m256i) -> __m256 {
        let low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
        let packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
        _mm256_cvtph_ps(packed)
    }
    #[inline(always)]
    unsafe fn odd_f16(a: __m256i) -> __m256 {
        Self::even_f16(_mm256_srli_epi32::<16>(a))
    }
    #[inline(always)]
    unsafe fn transpose(v: &mut [__m256i; 16]) {
        let mut t = *v;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..2 {
            u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            v[i] = _mm256_permute2x128_si256::<0x20>(u[i], u[4 + i]);
            v[4 + i] = _mm256_permute2x128_si256::<0x31>(u[i], u[4 + i]);
        }
    }
    #[inline(always)]
    unsafe fn to_f(a: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256i {
        _mm256_cvtps_epi32(a)
    }
    #[inline(always)]
    unsafe fn exp2_integral(a: __m256i) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(a, _mm256_set1_epi32(127))))
    }
    #[inline(always)]
    unsafe fn dot_u8_s8(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // Even and odd bytes widened to 16 bits: `maddubs` would saturate.
        let w_even = _mm256_and_si256(w, _mm256_set1_epi16(0x00ff));
        let w_odd = _mm256_srli_epi16::<8>(w);
        let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
        let x_odd = _mm256_srai_epi16::<8>(x);
        let even = _mm256_madd_epi16(w_even, x_even);
        _mm256_add_epi32(acc, _mm256_add_epi32(even, _mm256_madd_epi16(w_odd, x_odd)))
    }
    #[inline(always)]
    unsafe fn store_bytes(v: __m256i, p: *mut i8) {
        let mut words = [0i32; 8];
        _mm256_storeu_si256(words.as_mut_ptr().cast(), v);
        for (i, word) in words.iter().enumerate() {
            *p.add(i) = *word as i8;
        }
    }
    #[inline(always)]
    unsafe fn pairs(_: *const u16, _: *const u16) -> __m256i {
        unreachable!("guarded by Lanes::BF16")
    }
    #[inline(always)]
    unsafe fn dot_bf16(_: __m256, _: __m256i, _: __m256i) -> __m256 {
        unreachable!("guarded by Lanes::BF16")
    }
}
