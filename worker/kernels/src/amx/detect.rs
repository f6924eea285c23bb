//! Whether this process may use AMX: the CPU has it, the kernel saves its state, and the kernel has granted it.
//!
//! Sources: Intel SDM volume 1, chapter 18 ("Programming with Intel AMX"); Linux `Documentation/arch/x86/xstate.rst`.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __get_cpuid_max, _xgetbv};
use std::sync::OnceLock;

/// CPUID.1:ECX: the operating system has turned XSAVE on, so that XCR0 may be read.
const OSXSAVE: u32 = 1 << 27;

/// CPUID.(7,0):EDX: AMX-BF16, AMX-TILE, AMX-INT8.
const AMX_BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;

/// XCR0: the tile configuration and the tile data are saved and restored.
const XCR0_TILES: u64 = 1 << 17 | 1 << 18;

/// The CPUID leaf that describes the tile palettes.
const TILE_PALETTES: u32 = 0x1D;

/// Whether the tile kernels can run here. The first call asks the kernel for the permission that Linux (5.16 and later)
/// wants before a process's first use of tile data; it holds for all threads, and later calls read a cached answer.
///
/// The permission makes signal frames grow by 8 KiB, and Linux refuses it while a thread has an alternate signal stack
/// too small for that. Rust's threads have stacks as large as the kernel says they need, so this matters only beside
/// threads of other makers; a refusal means `false`.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cpu_has_tiles() && kernel_saves_tiles() && request_permission())
}

/// The instructions exist, and palette 1 is the one that [`super::tiles`] is written for.
fn cpu_has_tiles() -> bool {
    if __get_cpuid_max(0).0 < TILE_PALETTES || __cpuid_count(7, 0).edx & AMX_BF16_TILE_INT8 != AMX_BF16_TILE_INT8 {
        return false;
    }
    let palettes = __cpuid_count(TILE_PALETTES, 0).eax;
    let one = __cpuid_count(TILE_PALETTES, 1);
    let (tile_bytes, row_bytes, tiles, rows) = (one.eax >> 16, one.ebx & 0xFFFF, one.ebx >> 16, one.ecx & 0xFFFF);
    palettes >= 1 && tile_bytes == 1024 && row_bytes == 64 && tiles == 8 && rows == 16
}

fn kernel_saves_tiles() -> bool {
    // SAFETY: OSXSAVE, checked first, is what makes XGETBV legal.
    __cpuid(1).ecx & OSXSAVE != 0 && unsafe { xcr0() } & XCR0_TILES == XCR0_TILES
}

/// # Safety
/// CPUID must report OSXSAVE.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller checked.
    unsafe { _xgetbv(0) }
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`.
fn request_permission() -> bool {
    const SYS_ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the system call reads and writes no memory of ours; RCX and R11 are all that SYSCALL itself overwrites.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}
