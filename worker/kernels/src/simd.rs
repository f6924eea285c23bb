//! Eight f32 lanes behind one trait, so that each kernel is written once and instantiated per instruction set.
//!
//! The trait fixes the order of every reduction: [`Simd::sum`] adds `((l0+l1)+(l2+l3)) + ((l4+l5)+(l6+l7))`, and
//! [`Simd::sum8`] gives the same bits for eight vectors at once.

use half::{bf16, f16};

/// Lanes per vector.
pub(crate) const LANES: usize = 8;

/// Eight f32 lanes.
///
/// # Safety
/// Methods of an implementation for an instruction set may only run on a CPU that has it. They are meant to be
/// inlined into a function compiled for that set (see [`dispatch!`]).
pub(crate) unsafe trait Simd: Copy {
    /// All lanes equal `x`.
    unsafe fn splat(x: f32) -> Self;
    /// Eight floats from `p` (unaligned).
    unsafe fn load(p: *const f32) -> Self;
    /// Eight bf16 from `p`, widened.
    unsafe fn load_bf16(p: *const bf16) -> Self;
    /// Eight f16 from `p`, widened.
    unsafe fn load_f16(p: *const f16) -> Self;
    /// Writes eight floats to `p` (unaligned).
    unsafe fn store(self, p: *mut f32);
    /// Lane-wise sum.
    unsafe fn add(self, o: Self) -> Self;
    /// Lane-wise product.
    unsafe fn mul(self, o: Self) -> Self;
    /// Lane-wise quotient.
    unsafe fn div(self, o: Self) -> Self;
    /// Lane-wise maximum (no NaN handling promised).
    unsafe fn max(self, o: Self) -> Self;
    /// Lane-wise minimum (no NaN handling promised).
    unsafe fn min(self, o: Self) -> Self;
    /// `self * m + a`, fused where the instruction set can.
    unsafe fn mul_add(self, m: Self, a: Self) -> Self;
    /// Nearest integer, ties to even; `|x| < 2^22`.
    unsafe fn round(self) -> Self;
    /// `2^x` for integral `x` in `-126..=127`.
    unsafe fn exp2_integral(self) -> Self;
    /// Sum of the lanes in the order given above.
    unsafe fn sum(self) -> f32;
    /// [`Simd::sum`] of eight vectors, as the lanes of one.
    unsafe fn sum8(v: [Self; 8]) -> Self;

    /// The first `n < 8` floats from `p`, the rest zero.
    #[inline(always)]
    unsafe fn load_head(p: *const f32, n: usize) -> Self {
        let mut lanes = [0f32; LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            // SAFETY: the caller promises `n` readable floats.
            *lane = unsafe { *p.add(i) };
        }
        // SAFETY: `lanes` holds eight floats.
        unsafe { Self::load(lanes.as_ptr()) }
    }

    /// Writes the first `n < 8` lanes to `p`.
    #[inline(always)]
    unsafe fn store_head(self, p: *mut f32, n: usize) {
        let mut lanes = [0f32; LANES];
        // SAFETY: `lanes` holds eight floats; the caller promises `n` writable ones at `p`.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate().take(n) {
                *p.add(i) = *lane;
            }
        }
    }

    /// `e^x`: relative error below 3e-7; clamps to the range of normal floats, so no infinities appear.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller runs on a CPU that has the instruction set.
        unsafe {
            let x = self.min(Self::splat(88.0)).max(Self::splat(-87.0));
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            // ln 2 in two parts: the first has few enough bits that n * LN2_HIGH is exact.
            let r = n.mul_add(Self::splat(-0.693_359_4), x);
            let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
            // Polynomial of (e^r - 1 - r) / r^2 on |r| <= ln2 / 2 (the coefficients of Cephes' expf).
            let p = Self::splat(1.987_569_1e-4);
            let p = p.mul_add(r, Self::splat(1.398_199_9e-3));
            let p = p.mul_add(r, Self::splat(8.333_452e-3));
            let p = p.mul_add(r, Self::splat(4.166_579_6e-2));
            let p = p.mul_add(r, Self::splat(1.666_666_5e-1));
            let p = p.mul_add(r, Self::splat(0.5));
            let p = p.mul_add(r.mul(r), r).add(Self::splat(1.0));
            p.mul(n.exp2_integral())
        }
    }
}

/// A stored element type that widens to f32 exactly.
pub(crate) trait Element: Copy + Sync {
    /// Whether this is already f32.
    const IS_F32: bool = false;
    /// Eight elements from `p`, widened.
    ///
    /// # Safety
    /// As [`Simd`]; `p` must have eight readable elements.
    unsafe fn load8<S: Simd>(p: *const Self) -> S;
    /// One element, widened.
    fn widen(self) -> f32;
}

impl Element for f32 {
    const IS_F32: bool = true;
    #[inline(always)]
    unsafe fn load8<S: Simd>(p: *const Self) -> S {
        // SAFETY: passed on to the caller.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load8<S: Simd>(p: *const Self) -> S {
        // SAFETY: passed on to the caller.
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load8<S: Simd>(p: *const Self) -> S {
        // SAFETY: passed on to the caller.
        unsafe { S::load_f16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32_const()
    }
}

/// The first `n < 8` elements from `p`, widened, the rest zero.
///
/// # Safety
/// As [`Simd`]; `p` must have `n` readable elements.
#[inline(always)]
pub(crate) unsafe fn load_head_element<S: Simd, E: Element>(p: *const E, n: usize) -> S {
    let mut lanes = [0f32; LANES];
    for (i, lane) in lanes.iter_mut().enumerate().take(n) {
        // SAFETY: the caller promises `n` readable elements.
        *lane = unsafe { *p.add(i) }.widen();
    }
    // SAFETY: `lanes` holds eight floats.
    unsafe { S::load(lanes.as_ptr()) }
}

/// Defines `unsafe fn name(isa, args)` that runs the generic `body::<S, ..>(args)` compiled for `isa`.
///
/// The generated function is unsafe: the caller promises that `isa` is available on this CPU (which [`crate::Kernels`]
/// checks once) and whatever the body asks for.
macro_rules! dispatch {
    ($name:ident = $body:ident $(<$gen:ident : $bound:path>)? ($($arg:ident : $ty:ty),* $(,)?)) => {
        #[allow(clippy::too_many_arguments)]
        unsafe fn $name $(<$gen: $bound>)? (isa: $crate::isa::Isa, $($arg: $ty),*) {
            match isa {
                // SAFETY: the caller keeps the body's contract.
                $crate::isa::Isa::Portable => unsafe {
                    $body::<$crate::simd_portable::Portable $(, $gen)?>($($arg),*)
                },
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx2 => {
                    #[target_feature(enable = "avx2,fma,f16c")]
                    #[allow(clippy::too_many_arguments)]
                    unsafe fn compiled $(<$gen: $bound>)? ($($arg: $ty),*) {
                        // SAFETY: as the outer function.
                        unsafe { $body::<$crate::simd_avx2::Avx2 $(, $gen)?>($($arg),*) }
                    }
                    // SAFETY: the caller promises that the CPU has these features.
                    unsafe { compiled $(::<$gen>)? ($($arg),*) }
                }
                #[cfg(not(target_arch = "x86_64"))]
                $crate::isa::Isa::Avx2 => unreachable!("never available on this architecture"),
            }
        }
    };
}
pub(crate) use dispatch;
