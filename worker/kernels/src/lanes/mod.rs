//! Vectors of f32 and i32 lanes behind one trait, so that each kernel is written once and instantiated per instruction
//! set, and the macro that does so.
//!
//! No kernel's result may depend on [`Lanes::N`] except through [`Lanes::sum`], whose order is fixed per
//! instruction set: in matrix products a lane is an output column, so every output is its own sequential chain.
//!
//! Closures are not used in code over this trait: a closure is not compiled for the instruction set unless it is inlined.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

/// A set of vector types and their operations.
///
/// # Safety
/// Methods of an implementation for an instruction set may only run on a CPU that has it. They are meant to be
/// inlined into a function compiled for that set (see [`dispatch!`]). Pointers need no alignment.
pub(crate) unsafe trait Lanes: Copy {
    /// Lanes per vector; divides 16.
    const N: usize;
    /// Whether [`Lanes::dot_bf16`] exists.
    const BF16: bool = false;
    /// Whether there are 32 registers: decides the shape of register tiles.
    const WIDE: bool = false;
    /// `N` f32 lanes.
    type F: Copy;
    /// `N` i32 lanes.
    type I: Copy;

    /// All lanes equal `x`.
    unsafe fn splat(x: f32) -> Self::F;
    /// `N` floats.
    unsafe fn load(p: *const f32) -> Self::F;
    /// Writes `N` floats.
    unsafe fn store(v: Self::F, p: *mut f32);
    /// `N` bf16, widened.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    /// `N` f16, widened.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Lane-wise sum.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise difference.
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise product.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise quotient.
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise maximum (no NaN handling promised).
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise minimum (no NaN handling promised).
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// Lane-wise magnitude.
    unsafe fn abs(a: Self::F) -> Self::F;
    /// `a * b + c`, fused where the instruction set can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum of the lanes, in an order fixed per instruction set.
    unsafe fn sum(v: Self::F) -> f32;
    /// Largest lane.
    unsafe fn largest(v: Self::F) -> f32;

    /// All lanes equal `x`.
    unsafe fn splat_i(x: i32) -> Self::I;
    /// `N` words.
    unsafe fn load_i(p: *const i32) -> Self::I;
    /// Writes `N` words.
    unsafe fn store_i(v: Self::I, p: *mut i32);
    /// Lane-wise wrapping sum.
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise and.
    unsafe fn and_i(a: Self::I, b: Self::I) -> Self::I;
    /// Logical shift right by four bits of each 32-bit lane.
    unsafe fn shift_right_4(a: Self::I) -> Self::I;
    /// Shift left by 16 bits, read as floats: the even bf16 of pairs.
    unsafe fn even_bf16(a: Self::I) -> Self::F;
    /// The high halves, read as floats: the odd bf16 of pairs.
    unsafe fn odd_bf16(a: Self::I) -> Self::F;
    /// The low halves as f16, widened.
    unsafe fn even_f16(a: Self::I) -> Self::F;
    /// The high halves as f16, widened.
    unsafe fn odd_f16(a: Self::I) -> Self::F;
    /// Transposes the words of the first `N` vectors.
    unsafe fn transpose(v: &mut [Self::I; 16]);
    /// To the nearest f32.
    unsafe fn to_f(a: Self::I) -> Self::F;
    /// To the nearest integer, ties to even; |x| < 2^31.
    unsafe fn round(a: Self::F) -> Self::I;
    /// `2^x` for integral lanes in `-126..=127`.
    unsafe fn exp2_integral(a: Self::I) -> Self::F;
    /// Adds to each lane the dot product of its four unsigned bytes of `w` with its four signed bytes of `x`. Exact.
    unsafe fn dot_u8_s8(acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Writes the low byte of each lane.
    unsafe fn store_bytes(v: Self::I, p: *mut i8);
    /// Halves of `N` words: the low ones from `low`, the high ones from `high`. Only where [`Lanes::BF16`].
    unsafe fn pairs(low: *const u16, high: *const u16) -> Self::I;
    /// Adds to each lane the dot product of its two bf16 of `w` and of `x`. Only where [`Lanes::BF16`].
    unsafe fn dot_bf16(acc: Self::F, w: Self::I, x: Self::I) -> Self::F;

    /// `e^x`: relative error below 3e-7; clamps to the range of normal floats, so no infinities appear.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // SAFETY: the caller runs on a CPU that has the instruction set.
        unsafe {
            let x = Self::max(Self::min(x, Self::splat(88.0)), Self::splat(-87.0));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            let nf = Self::to_f(n);
            // ln 2 in two parts: the first has few enough bits that n * LN2_HIGH is exact.
            let r = Self::fma(nf, Self::splat(-0.693_359_4), x);
            let r = Self::fma(nf, Self::splat(2.121_944_4e-4), r);
            // Polynomial of (e^r - 1 - r) / r^2 on |r| <= ln2 / 2 (the coefficients of Cephes' expf).
            let p = Self::splat(1.987_569_1e-4);
            let p = Self::fma(p, r, Self::splat(1.398_199_9e-3));
            let p = Self::fma(p, r, Self::splat(8.333_452e-3));
            let p = Self::fma(p, r, Self::splat(4.166_579_6e-2));
            let p = Self::fma(p, r, Self::splat(1.666_666_5e-1));
            let p = Self::fma(p, r, Self::splat(0.5));
            let p = Self::add(Self::fma(p, Self::mul(r, r), r), Self::splat(1.0));
            Self::mul(p, Self::exp2_integral(n))
        }
    }

    /// The first `n < N` floats, the rest zero.
    #[inline(always)]
    unsafe fn load_head(p: *const f32, n: usize) -> Self::F {
        let mut lanes = [0f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller promises `n` readable floats.
            *lane = unsafe { *p.add(i) };
        }
        // SAFETY: `lanes` holds at least N floats.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    /// Writes the first `n < N` lanes.
    #[inline(always)]
    unsafe fn store_head(v: Self::F, p: *mut f32, n: usize) {
        let mut lanes = [0f32; 16];
        // SAFETY: `lanes` holds at least N floats; the caller promises `n` writable ones.
        unsafe {
            Self::store(v, lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate().take(n) {
                *p.add(i) = *lane;
            }
        }
    }
}

/// Asks the memory for the cache line at `p`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Defines `unsafe fn name(isa, args)` that runs the generic `body::<L, ..>(args)` compiled for `isa`.
///
/// The generated function is unsafe: the caller promises that `isa` is available on this CPU (which [`crate::Kernels`]
/// checks once) and whatever the body asks for.
macro_rules! dispatch {
    ($name:ident = $body:ident ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as the outer function.
                unsafe { $body::<$crate::lanes::avx2::Avx2>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as the outer function.
                unsafe { $body::<$crate::lanes::avx512::Avx512<false>>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512_bf16($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as the outer function.
                unsafe { $body::<$crate::lanes::avx512::Avx512<true>>($($arg),*) }
            }
            // SAFETY: the caller keeps the body's contract and promises that the CPU has the features.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::isa::Isa::Avx2 => avx2($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::isa::Isa::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::isa::Isa::Avx512Bf16 | $crate::isa::Isa::Amx => avx512_bf16($($arg),*),
                    _ => $body::<$crate::lanes::portable::Portable>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use dispatch;
