//! NIXL's C interface, found at run time: `libnixl_capi.so`, as NVIDIA's packages and the PyPI wheel ship it. Nothing of it is
//! needed to build or to run baton.
//!
//! Only the calls that [`super::agent`] uses are looked up. Their signatures are those of NIXL 1.x; a library that lacks
//! one of them is refused by name. One struct is handed over by layout, [`AgentConfig`], because only there can an idle
//! agent be told not to keep a core busy; its fields are those of every release that has the call.

use super::NixlError;
use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// What every call answers: 0 is success, 1 in progress, less is an error.
pub(super) type Status = c_int;
pub(super) const SUCCESS: Status = 0;
pub(super) const IN_PROGRESS: Status = 1;
/// Host memory, in calls that take a memory type.
pub(super) const MEMORY_HOST: c_int = 0;
/// The operation that copies from the peer to here.
pub(super) const OPERATION_READ: c_int = 0;

/// An object of the library: agent, backend, list or request.
pub(super) type Handle = *mut c_void;

/// What an agent is made with (`nixl_capi_agent_config_t`).
#[repr(C)]
pub(super) struct AgentConfig {
    /// A thread of the library's that moves on what peers ask for.
    pub(super) progress_thread: bool,
    pub(super) listen_thread: bool,
    pub(super) listen_port: c_int,
    /// 0: whoever calls sees to it that calls do not overlap.
    pub(super) thread_sync: c_int,
    pub(super) workers: c_uint,
    /// Longest that the progress thread sleeps, in µs; 0 is not at all.
    pub(super) progress_delay_us: u64,
    pub(super) listen_delay_us: u64,
    pub(super) telemetry: bool,
}

/// Where the library is: a path, for those who have it outside the loader's search path.
const PATH_VARIABLE: &str = "BATON_NIXL_LIBRARY";
const NAME: &str = "libnixl_capi.so";

macro_rules! calls {
    ($($name:ident = $symbol:literal : fn($($arg:ty),*);)*) => {
        /// The loaded library and its entry points.
        pub(super) struct Calls {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> Status,)*
            /// Keeps the entry points valid. Never unloaded: its threads outlive the last call.
            _library: std::mem::ManuallyDrop<Library>,
        }

        impl Calls {
            fn look_up(library: Library) -> Result<Self, NixlError> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the type is that of the symbol of this name in NIXL 1.x's C header.
                        let symbol = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> Status>($symbol) };
                        *symbol.map_err(|error| NixlError::Library(error.to_string()))?
                    },)*
                    _library: std::mem::ManuallyDrop::new(library),
                })
            }
        }
    };
}

calls! {
    create_agent = b"nixl_capi_create_configured_agent\0": fn(*const c_char, *const AgentConfig, *mut Handle);
    destroy_agent = b"nixl_capi_destroy_agent\0": fn(Handle);
    get_plugin_params = b"nixl_capi_get_plugin_params\0": fn(Handle, *const c_char, *mut Handle, *mut Handle);
    destroy_mem_list = b"nixl_capi_destroy_mem_list\0": fn(Handle);
    params_add = b"nixl_capi_params_add\0": fn(Handle, *const c_char, *const c_char);
    destroy_params = b"nixl_capi_destroy_params\0": fn(Handle);
    create_backend = b"nixl_capi_create_backend\0": fn(Handle, *const c_char, Handle, *mut Handle);
    get_local_md = b"nixl_capi_get_local_md\0": fn(Handle, *mut *mut c_void, *mut usize);
    load_remote_md = b"nixl_capi_load_remote_md\0": fn(Handle, *const c_void, usize, *mut *mut c_char);
    invalidate_remote_md = b"nixl_capi_invalidate_remote_md\0": fn(Handle, *const c_char);
    create_reg_dlist = b"nixl_capi_create_reg_dlist\0": fn(c_int, *mut Handle);
    destroy_reg_dlist = b"nixl_capi_destroy_reg_dlist\0": fn(Handle);
    reg_dlist_add_desc = b"nixl_capi_reg_dlist_add_desc\0": fn(Handle, usize, usize, u64, *const c_void, usize);
    register_mem = b"nixl_capi_register_mem\0": fn(Handle, Handle, Handle);
    deregister_mem = b"nixl_capi_deregister_mem\0": fn(Handle, Handle, Handle);
    create_xfer_dlist = b"nixl_capi_create_xfer_dlist\0": fn(c_int, *mut Handle);
    destroy_xfer_dlist = b"nixl_capi_destroy_xfer_dlist\0": fn(Handle);
    xfer_dlist_add_desc = b"nixl_capi_xfer_dlist_add_desc\0": fn(Handle, usize, usize, u64);
    create_xfer_req = b"nixl_capi_create_xfer_req\0":
        fn(Handle, c_int, Handle, Handle, *const c_char, *mut Handle, Handle);
    post_xfer_req = b"nixl_capi_post_xfer_req\0": fn(Handle, Handle, Handle);
    get_xfer_status = b"nixl_capi_get_xfer_status\0": fn(Handle, Handle);
    release_xfer_req = b"nixl_capi_release_xfer_req\0": fn(Handle, Handle);
    destroy_xfer_req = b"nixl_capi_destroy_xfer_req\0": fn(Handle);
}

impl Calls {
    /// Loads the library named by `BATON_NIXL_LIBRARY`, or the one the loader finds.
    ///
    /// # Errors
    /// [`NixlError::Library`] where there is none, or where it lacks a call.
    pub(super) fn load() -> Result<Self, NixlError> {
        let name = std::env::var_os(PATH_VARIABLE).unwrap_or_else(|| NAME.into());
        // SAFETY: loading runs the library's initialisers; the operator put it on the search path or named it.
        let library = unsafe { Library::new(&name) }
            .map_err(|error| NixlError::Library(format!("{error}; set {PATH_VARIABLE} to the path of {NAME}")))?;
        Self::look_up(library)
    }
}
