//! Zeroed memory aligned to cache lines, on huge pages where it is large and the system allows: weights are read from one
//! end to the other at the speed of the memory, and address translation must not be the limit.

use std::alloc::{Layout, alloc_zeroed, dealloc};

/// Cache line, and AVX-512 register.
const LINE: usize = 64;
/// Huge page on x86-64 and aarch64.
const HUGE: usize = 2 << 20;

/// Owned, zeroed bytes.
pub(super) struct Aligned {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: owns plain bytes, handed out only through `&self` and `&mut self`.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    /// `None` if the system refuses.
    pub fn zeroed(len: usize) -> Option<Self> {
        let align = if len >= HUGE { HUGE } else { LINE };
        let layout = Layout::from_size_align(len.max(LINE), align).ok()?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return None;
        }
        #[cfg(target_os = "linux")]
        if len >= HUGE {
            // SAFETY: the range is ours; the advice changes no contents. Refused: small pages do as well, slower.
            let _ = unsafe { rustix::mm::madvise(start.cast(), len, rustix::mm::Advice::LinuxHugepage) };
        }
        Some(Aligned { start, layout })
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this size, initialised by zeroing.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}
