//! Loops of one arithmetic instruction on registers, with enough independent chains to hide its latency.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::hint::black_box;

/// Independent chains: more than latency times issue width of any CPU in use, few enough for the 32 registers of
/// AVX-512.
const CHAINS: usize = 24;
/// AVX2 has 16 registers; two hold the operands.
#[cfg(target_arch = "x86_64")]
const CHAINS_AVX2: usize = 12;
/// Floats in one chain of the portable loop: the compiler makes vectors of them.
const PORTABLE_LANES: usize = 4;

/// A kind of arithmetic with a peak of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    /// f32 multiply-add in the widest vectors of the CPU (`vfmadd`, or what the compiler makes of plain Rust).
    F32Fma,
    /// `vdpbf16ps`: bf16 pairs into f32.
    Bf16Dot,
    /// `vpdpbusd`: u8 times s8, quadruples into i32.
    Int8Dot,
}

impl Arithmetic {
    /// All kinds.
    pub const ALL: [Arithmetic; 3] = [Arithmetic::F32Fma, Arithmetic::Bf16Dot, Arithmetic::Int8Dot];

    /// Whether this CPU has it.
    pub fn available(self) -> bool {
        match self {
            Arithmetic::F32Fma => true,
            #[cfg(target_arch = "x86_64")]
            Arithmetic::Bf16Dot => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Arithmetic::Int8Dot => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Operations of one turn of [`Arithmetic::run`]; a multiplication and an addition are two.
    pub(super) fn operations_per_iteration(self) -> u64 {
        let multiply_adds = match self {
            Arithmetic::F32Fma => match fma() {
                Fma::Avx512 => CHAINS * 16,
                #[cfg(target_arch = "x86_64")]
                Fma::Avx2 => CHAINS_AVX2 * 8,
                Fma::Portable => CHAINS * PORTABLE_LANES,
            },
            Arithmetic::Bf16Dot => CHAINS * 32,
            Arithmetic::Int8Dot => CHAINS * 64,
        };
        2 * multiply_adds as u64
    }

    /// Runs that many turns.
    ///
    /// # Panics
    /// If this CPU has no such arithmetic.
    pub(super) fn run(self, iterations: u64) {
        assert!(self.available(), "this CPU has no {self}");
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: checked above.
            Arithmetic::Bf16Dot => unsafe { x86::bf16_dot(iterations) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: checked above.
            Arithmetic::Int8Dot => unsafe { x86::int8_dot(iterations) },
            _ => match fma() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `fma` has asked the CPU.
                Fma::Avx512 => unsafe { x86::fma_avx512(iterations) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `fma` has asked the CPU.
                Fma::Avx2 => unsafe { x86::fma_avx2(iterations) },
                _ => portable(iterations),
            },
        }
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Arithmetic::F32Fma => "f32 multiply-add",
            Arithmetic::Bf16Dot => "bf16 dot (vdpbf16ps)",
            Arithmetic::Int8Dot => "int8 dot (vpdpbusd)",
        })
    }
}

enum Fma {
    Avx512,
    Avx2,
    Portable,
}

fn fma() -> Fma {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return Fma::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Fma::Avx2;
        }
    }
    Fma::Portable
}

fn portable(iterations: u64) {
    let (x, y) = (black_box([0.5f32; PORTABLE_LANES]), black_box([1.0f32; PORTABLE_LANES]));
    let mut chains = [[0.0f32; PORTABLE_LANES]; CHAINS];
    for _ in 0..iterations {
        for chain in &mut chains {
            for lane in 0..PORTABLE_LANES {
                chain[lane] = chain[lane] * x[lane] + y[lane];
            }
        }
    }
    black_box(chains);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, CHAINS_AVX2};
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn fma_avx512(iterations: u64) {
        // chain * x + y tends to 2: no denormals, no infinities.
        let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
        let mut chains = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..iterations {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, x, y);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn fma_avx2(iterations: u64) {
        let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
        let mut chains = [_mm256_setzero_ps(); CHAINS_AVX2];
        for _ in 0..iterations {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, x, y);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16_dot(iterations: u64) {
        // Pairs of +1 and -1 times 1: the sums stay 0.
        let ones = _mm512_set1_ps(black_box(1.0));
        let x = _mm512_cvtne2ps_pbh(ones, ones);
        let y = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(-1.0)), ones);
        let mut chains = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..iterations {
            for chain in &mut chains {
                *chain = _mm512_dpbf16_ps(*chain, x, y);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8_dot(iterations: u64) {
        let (x, y) = (_mm512_set1_epi8(black_box(1)), _mm512_set1_epi8(black_box(-1)));
        let mut chains = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..iterations {
            for chain in &mut chains {
                *chain = _mm512_dpbusd_epi32(*chain, x, y);
            }
        }
        black_box(chains);
    }
}
