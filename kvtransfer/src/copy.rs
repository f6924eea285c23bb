//! Copying bytes that somebody else may be writing: fast, and defined whatever the other side does.
//!
//! A plain `memcpy` of memory that another thread or process changes is undefined in Rust, and loops over relaxed
//! atomics are defined but are not vectorised. What is here copies with instructions of its own (inline assembly, whose
//! reads and writes are as good as relaxed atomic ones of single bytes), so a race can tear data and nothing else.
//!
//! Two ways, because the target is used differently afterwards:
//!
//! * [`cached`] leaves the target in the cache: for bytes that are read again at once, as by encryption.
//! * [`streaming`] writes past the cache where that pays: for KV that lands in a region and is read much later. A
//!   written line need not be fetched first, which makes a copy between cold buffers about a fifth faster than libc's.
//!
//! Deliberately not here: bounds and ownership. [`crate::Region`] and the mapping of a peer's region check those.

/// Below this many bytes the set-up of streaming costs more than it saves.
#[cfg(target_arch = "x86_64")]
const STREAMING_BYTES_MIN: usize = 4096;

/// Copies `len` bytes and leaves the target in the cache.
///
/// # Safety
/// `source` must be readable and `target` writable for `len` bytes, for the whole call. Others may read and write both
/// meanwhile, by other than plain references; then what arrives is some mixture of bytes.
pub(crate) unsafe fn cached(target: *mut u8, source: *const u8, len: usize) {
    // SAFETY: the caller's promise is the same.
    unsafe { arch::cached(target, source, len) }
}

/// Copies `len` bytes past the cache, if they are many.
///
/// # Safety
/// As for [`cached`].
pub(crate) unsafe fn streaming(target: *mut u8, source: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len >= STREAMING_BYTES_MIN && std::is_x86_feature_detected!("avx") {
        let head = target.align_offset(arch::VECTOR_BYTES).min(len);
        let body = (len - head) / arch::STRIDE_BYTES * arch::STRIDE_BYTES;
        let done = head + body;
        // SAFETY: three parts of the caller's ranges; the middle one starts at a multiple of VECTOR_BYTES in the target,
        // is a multiple of STRIDE_BYTES long and not empty, and the processor has AVX.
        unsafe {
            arch::cached(target, source, head);
            arch::streaming(target.add(head), source.add(head), body);
            arch::cached(target.add(done), source.add(done), len - done);
        }
        return;
    }
    // SAFETY: the caller's promise is the same.
    unsafe { arch::cached(target, source, len) }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::asm;

    /// Alignment of the target.
    pub(super) const VECTOR_BYTES: usize = 32;
    /// Bytes of one turn of the loop.
    pub(super) const STRIDE_BYTES: usize = 128;

    /// The processor's own copy: whole words, then the rest.
    pub(super) unsafe fn cached(target: *mut u8, source: *const u8, len: usize) {
        // SAFETY: reads `len` bytes at `source` and writes as many at `target`, as the caller allows; the direction
        // flag is clear on entry, which the asm contract guarantees.
        unsafe {
            asm!(
                "rep movsq",
                "mov rcx, {rest}",
                "rep movsb",
                rest = in(reg) len % 8,
                inout("rcx") len / 8 => _,
                inout("rdi") target => _,
                inout("rsi") source => _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Non-temporal stores, two cache lines a turn, reading a KiB ahead: measured fastest of the widths and distances
    /// tried (docs/kv-transfer.md, "Shared memory"). Prefetching never faults, so running past the end is harmless.
    pub(super) unsafe fn streaming(target: *mut u8, source: *const u8, len: usize) {
        debug_assert!(len > 0 && len.is_multiple_of(STRIDE_BYTES) && (target as usize).is_multiple_of(VECTOR_BYTES));
        // SAFETY: reads and writes `len` bytes as the caller allows, in steps that divide it; the caller has checked
        // for AVX and aligned the target. The fence orders the stores before everything that follows, as Rust's memory
        // model expects of any store. `vzeroupper` changes the upper halves of all vector registers: all are declared.
        unsafe {
            asm!(
                "2:",
                "prefetchnta [{source} + 1024]",
                "prefetchnta [{source} + 1088]",
                "vmovdqu ymm0, [{source}]",
                "vmovdqu ymm1, [{source} + 32]",
                "vmovdqu ymm2, [{source} + 64]",
                "vmovdqu ymm3, [{source} + 96]",
                "vmovntdq [{target}], ymm0",
                "vmovntdq [{target} + 32], ymm1",
                "vmovntdq [{target} + 64], ymm2",
                "vmovntdq [{target} + 96], ymm3",
                "add {source}, 128",
                "add {target}, 128",
                "sub {len}, 128",
                "jnz 2b",
                "sfence",
                "vzeroupper",
                source = inout(reg) source => _,
                target = inout(reg) target => _,
                len = inout(reg) len => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nostack)
            );
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::asm;

    /// Pairs of vector registers, then single bytes.
    pub(super) unsafe fn cached(target: *mut u8, source: *const u8, len: usize) {
        // SAFETY: reads `len` bytes at `source` and writes as many at `target`, as the caller allows: as many turns of
        // 32 bytes as fit, then the rest one by one. Unaligned accesses to ordinary memory are allowed.
        unsafe {
            asm!(
                "cbz {turns}, 3f",
                "2:",
                "ldp q0, q1, [{source}], #32",
                "stp q0, q1, [{target}], #32",
                "sub {turns}, {turns}, #1",
                "cbnz {turns}, 2b",
                "3:",
                "cbz {rest}, 5f",
                "4:",
                "ldrb {byte:w}, [{source}], #1",
                "strb {byte:w}, [{target}], #1",
                "sub {rest}, {rest}, #1",
                "cbnz {rest}, 4b",
                "5:",
                turns = inout(reg) len / 32 => _,
                rest = inout(reg) len % 32 => _,
                source = inout(reg) source => _,
                target = inout(reg) target => _,
                byte = out(reg) _,
                out("v0") _, out("v1") _,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// Relaxed atomic words where both ends are aligned alike, as they are between regions; bytes otherwise.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod arch {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

    pub(super) unsafe fn cached(target: *mut u8, source: *const u8, len: usize) {
        let alike = (target as usize).wrapping_sub(source as usize) % 8 == 0;
        let head = if alike { target.align_offset(8).min(len) } else { len };
        let words = (len - head) / 8;
        let byte = |at: usize| {
            // SAFETY: `at` is less than `len`, and both ranges are the caller's; atomics allow for others there.
            let (from, to) = unsafe { (&*source.add(at).cast::<AtomicU8>(), &*target.add(at).cast::<AtomicU8>()) };
            to.store(from.load(Relaxed), Relaxed);
        };
        (0..head).for_each(byte);
        for at in (head..head + words * 8).step_by(8) {
            // SAFETY: as above for eight bytes; both are aligned, the target by `head`, the source because it is alike.
            let (from, to) = unsafe {
                (
                    &*source.add(at).cast::<AtomicU64>(),
                    &*target.add(at).cast::<AtomicU64>(),
                )
            };
            to.store(from.load(Relaxed), Relaxed);
        }
        (head + words * 8..len).for_each(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every alignment of both ends around the sizes at which the ways change.
    #[test]
    fn copies_are_exact_at_every_alignment() {
        let source: Vec<u8> = (0..20_000usize).map(|at| (at * 31 + at / 256) as u8).collect();
        for len in [0, 1, 7, 8, 31, 32, 33, 127, 4095, 4096, 4097, 4096 + 127, 10_007] {
            for (from, to) in [(0, 0), (1, 0), (0, 1), (3, 5), (31, 33), (64, 8), (9, 63)] {
                for way in [cached, streaming] {
                    let mut target = vec![0xa5u8; 20_000];
                    // SAFETY: both vectors are longer than offset and length together.
                    unsafe { way(target.as_mut_ptr().add(to), source.as_ptr().add(from), len) };
                    assert_eq!(
                        target[to..to + len],
                        source[from..from + len],
                        "{len} bytes from {from} to {to}"
                    );
                    let around = target[..to].iter().chain(&target[to + len..]);
                    assert!(
                        around.copied().all(|byte| byte == 0xa5),
                        "{len} bytes from {from} to {to} spilled"
                    );
                }
            }
        }
    }
}
