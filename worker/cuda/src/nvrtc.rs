//! NVRTC, found at run time: CUDA C++ in, a cubin out. Loaded by hand rather than through a binding, because its place may
//! be named (`BATON_NVRTC`), as where it comes from a Python wheel.
#![allow(unsafe_code)]

use crate::driver::DeviceError;
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;

/// Names the library's file.
pub const VARIABLE: &str = "BATON_NVRTC";
/// Tried in this order, newest first; the plain name is a development package's.
const NAMES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_120_0.dll"];
/// Most bytes of a compiler's log that are shown.
const LOG_BYTES_MAX: usize = 2000;
/// Most bytes of a log or a cubin that are believed: ours are below a megabyte.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

type Program = *mut c_void;

/// The loaded library.
pub struct Nvrtc {
    library: Library,
    name: String,
}

impl Nvrtc {
    /// Finds it. `Err` says where it was looked for.
    pub fn find() -> Result<Self, DeviceError> {
        let named = std::env::var_os(VARIABLE).map(PathBuf::from);
        let names: Vec<PathBuf> = match &named {
            Some(path) => vec![path.clone()],
            None => NAMES.iter().map(PathBuf::from).collect(),
        };
        for name in &names {
            // SAFETY: the library is NVIDIA's, named by the operator or found by the system's rules; its initialisers
            // have no conditions.
            if let Ok(library) = unsafe { Library::new(name) } {
                let name = name.display().to_string();
                return Ok(Nvrtc { library, name });
            }
        }
        let looked = match named {
            Some(path) => format!("{VARIABLE} names {}, which cannot be loaded", path.display()),
            None => format!("none of {} is found", NAMES[..3].join(", ")),
        };
        Err(DeviceError::Unavailable(format!(
            "NVRTC, which compiles the kernels, is missing: {looked}; install the CUDA toolkit's NVRTC, or \
             `pip install nvidia-cuda-nvrtc` and set {VARIABLE} to the libnvrtc.so of the wheel"
        )))
    }

    /// What was loaded.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A function of the library.
    fn function<F>(&self, name: &CStr) -> Result<Symbol<'_, F>, DeviceError> {
        // SAFETY: callers name the type that NVRTC's header gives.
        unsafe { self.library.get(name.to_bytes_with_nul()) }
            .map_err(|error| DeviceError::Unavailable(format!("{} is not NVRTC: {error}", self.name)))
    }

    /// Its version.
    pub fn version(&self) -> Result<(i32, i32), DeviceError> {
        let version = self.function::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(c"nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both are written, nothing else.
        let code = unsafe { version(&mut major, &mut minor) };
        self.check(code, "nvrtcVersion")?;
        Ok((major, minor))
    }

    fn check(&self, code: c_int, what: &str) -> Result<(), DeviceError> {
        match code {
            0 => Ok(()),
            _ => Err(DeviceError::Unavailable(format!(
                "{what} of {} failed ({code})",
                self.name
            ))),
        }
    }

    /// Compiles `source` with `options` for `target`.
    ///
    /// # Errors
    /// [`DeviceError::Compile`] with the compiler's log.
    pub fn compile(&self, source: &str, options: &[String], target: &str) -> Result<Vec<u8>, DeviceError> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        let create = self.function::<Create>(c"nvrtcCreateProgram")?;
        let compile = self
            .function::<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int>(c"nvrtcCompileProgram")?;
        let destroy = self.function::<unsafe extern "C" fn(*mut Program) -> c_int>(c"nvrtcDestroyProgram")?;
        let text = |s: &str| CString::new(s).map_err(|_| DeviceError::Unavailable("an option with a zero byte".into()));
        let source = text(source)?;
        let options = options.iter().map(|o| text(o)).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: strings end in zero and outlive the call; no headers.
        let code = unsafe {
            create(
                &mut program,
                source.as_ptr(),
                c"baton.cu".as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        self.check(code, "nvrtcCreateProgram")?;
        // SAFETY: the program was just made; `count` options.
        let code = unsafe { compile(program, count, pointers.as_ptr()) };
        let result = match code {
            0 => self.output(program, c"nvrtcGetCUBINSize", c"nvrtcGetCUBIN"),
            _ => {
                let log = self
                    .output(program, c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog")
                    .unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let log = log.trim_end_matches('\0').trim();
                let end = log.floor_char_boundary(log.len().min(LOG_BYTES_MAX));
                Err(DeviceError::Compile {
                    target: target.into(),
                    log: format!("{} (code {code})", &log[..end]),
                })
            }
        };
        // SAFETY: made above, destroyed once.
        unsafe { destroy(&mut program) };
        result
    }

    fn output(&self, program: Program, size: &CStr, get: &CStr) -> Result<Vec<u8>, DeviceError> {
        let size = self.function::<unsafe extern "C" fn(Program, *mut usize) -> c_int>(size)?;
        let get = self.function::<unsafe extern "C" fn(Program, *mut c_char) -> c_int>(get)?;
        let mut bytes = 0usize;
        // SAFETY: the program is alive; one size is written.
        self.check(unsafe { size(program, &mut bytes) }, "asking for a size")?;
        if bytes > OUTPUT_BYTES_MAX {
            return Err(DeviceError::Unavailable(format!(
                "{} made {bytes} bytes of output",
                self.name
            )));
        }
        let mut output = vec![0u8; bytes];
        // SAFETY: as many bytes as it said it writes.
        self.check(unsafe { get(program, output.as_mut_ptr().cast()) }, "taking the output")?;
        Ok(output)
    }
}
