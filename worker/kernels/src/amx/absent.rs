//! What stands in for the tiles where there are none to be had: a session that cannot exist.

/// Never: this is not x86-64 Linux.
pub(crate) fn available() -> bool {
    false
}

/// A session cannot be begun here, so its functions are never called.
pub(crate) enum TileSession {}

#[allow(clippy::missing_safety_doc)] // as in `tiles.rs`, and unreachable
impl TileSession {
    /// `None`.
    pub(crate) fn begin() -> Option<Self> {
        None
    }

    pub(crate) unsafe fn tile_i8(&mut self, _: *const i8, _: usize, _: usize, _: *const u8, _: usize, _: *mut i32) {
        match *self {}
    }

    pub(crate) unsafe fn tile_i8_group(&mut self, _: *const i8, _: usize, _: usize, _: *const u8, _: *mut i32) {
        match *self {}
    }

    pub(crate) unsafe fn tile_bf16(&mut self, _: *const u16, _: usize, _: usize, _: *const u16, _: usize, _: *mut f32) {
        match *self {}
    }
}
