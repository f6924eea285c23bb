//! Loops that read memory and do nothing with it.

use memmap2::MmapMut;
use std::hint::black_box;

/// Bytes that a turn of the loops reads: eight cache lines, one accumulator each.
const TURN: usize = 512;
/// Parts of a buffer begin on a page.
const PAGE: usize = 4096;

/// Memory that threads read, each its own part.
pub(super) struct Buffer {
    bytes: MmapMut,
    part: usize,
}

impl Buffer {
    /// At most `bytes` bytes in `parts` equal parts, every page touched.
    pub fn new(bytes: usize, parts: usize, huge_pages: bool) -> std::io::Result<Self> {
        let part = (bytes / parts).next_multiple_of(PAGE);
        let mut bytes = MmapMut::map_anon(part * parts)?;
        #[cfg(target_os = "linux")]
        {
            let advice = match huge_pages {
                true => memmap2::Advice::HugePage,
                false => memmap2::Advice::NoHugePage,
            };
            // A kernel without huge pages refuses; the figure is then one of small pages, which is what there is.
            let _ = bytes.advise(advice);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = huge_pages;
        // A page that was never written may be the one page of zeros, which is always cached.
        bytes.chunks_mut(PAGE).for_each(|page| page[0] = 1);
        Ok(Buffer { bytes, part })
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn part(&self, index: usize) -> &[u8] {
        &self.bytes[index * self.part..(index + 1) * self.part]
    }
}

/// Reads all of `bytes` (a multiple of a page), prefetching that many bytes ahead.
pub(super) fn read(bytes: &[u8], prefetch_bytes: Option<usize>) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has AVX-512 F.
            black_box(unsafe { x86::read_avx512(bytes, prefetch_bytes) });
            return;
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            black_box(unsafe { x86::read_avx2(bytes, prefetch_bytes) });
            return;
        }
    }
    // No prefetch instruction in portable Rust.
    let _ = prefetch_bytes;
    let mut sums = [0u64; TURN / 8];
    for turn in bytes.chunks_exact(TURN) {
        for (sum, word) in sums.iter_mut().zip(turn.as_chunks::<8>().0) {
            *sum |= u64::from_ne_bytes(*word);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::TURN;
    use std::arch::x86_64::*;

    /// Asks for the cache lines of one turn, `distance` bytes after `at`.
    #[inline(always)]
    fn prefetch(at: *const u8, distance: usize) {
        for line in 0..TURN / 64 {
            // SAFETY: a prefetch is a hint; it faults nowhere, also past the end of the buffer.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(distance + 64 * line).cast()) };
        }
    }

    #[target_feature(enable = "avx512f")]
    pub fn read_avx512(bytes: &[u8], prefetch_bytes: Option<usize>) -> i64 {
        let mut sums = [_mm512_setzero_si512(); TURN / 64];
        let turns = bytes.chunks_exact(TURN);
        match prefetch_bytes {
            None => turns.for_each(|turn| or_avx512(&mut sums, turn)),
            Some(distance) => turns.for_each(|turn| {
                prefetch(turn.as_ptr(), distance);
                or_avx512(&mut sums, turn);
            }),
        }
        sums.into_iter().map(|sum| _mm512_reduce_or_epi64(sum)).sum()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn or_avx512(sums: &mut [__m512i; TURN / 64], turn: &[u8]) {
        for (sum, line) in sums.iter_mut().zip(turn.as_chunks::<64>().0) {
            // SAFETY: `line` is 64 readable bytes; unaligned loads take any address.
            *sum = _mm512_or_si512(*sum, unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
        }
    }

    #[target_feature(enable = "avx2")]
    pub fn read_avx2(bytes: &[u8], prefetch_bytes: Option<usize>) -> i64 {
        let mut sums = [_mm256_setzero_si256(); 8];
        let turns = bytes.chunks_exact(TURN);
        match prefetch_bytes {
            None => turns.for_each(|turn| or_avx2(&mut sums, turn)),
            Some(distance) => turns.for_each(|turn| {
                prefetch(turn.as_ptr(), distance);
                or_avx2(&mut sums, turn);
            }),
        }
        sums.into_iter().map(|sum| _mm256_extract_epi64::<0>(sum)).sum()
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn or_avx2(sums: &mut [__m256i; 8], turn: &[u8]) {
        for (index, half) in turn.as_chunks::<32>().0.iter().enumerate() {
            let sum = &mut sums[index % 8];
            // SAFETY: `half` is 32 readable bytes; unaligned loads take any address.
            *sum = _mm256_or_si256(*sum, unsafe { _mm256_loadu_si256(half.as_ptr().cast()) });
        }
    }
}
