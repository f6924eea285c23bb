//! Every kernel compiles with NVRTC for the architectures that are supported. Needs NVRTC alone, no driver and no GPU:
//! `pip install nvidia-cuda-nvrtc`, and `BATON_NVRTC` set to the wheel's `libnvrtc.so.*`. Says so and passes without.

use baton_cuda::cache;
use baton_cuda::nvrtc::Nvrtc;
use baton_cuda::source::Program;
use baton_model::KvDtype;

/// Ampere, Hopper and Blackwell.
const CAPABILITIES: [(u32, u32); 3] = [(8, 0), (9, 0), (10, 0)];

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    eprintln!("{} {:?}", nvrtc.name(), nvrtc.version().unwrap());
    let folder = tempfile::tempdir().unwrap();
    // The usual type for all architectures; of the others, which share the source, one each.
    let shapes = [
        (128, KvDtype::Bf16, &CAPABILITIES[..]),
        (64, KvDtype::F16, &CAPABILITIES[1..2]),
        (32, KvDtype::F32, &CAPABILITIES[..]),
    ];
    for (head_dim, dtype, capabilities) in shapes {
        let program = Program::new(head_dim, dtype).unwrap();
        for &capability in capabilities {
            let image = cache::compiled(&program, capability, Some(folder.path())).unwrap();
            assert!(image.starts_with(b"\x7fELF"), "a cubin");
            for name in program.kernels() {
                // Names of entry points stand in the file's string table.
                let found = image.windows(name.len()).any(|w| w == name.as_bytes());
                assert!(found, "{name} for {capability:?}");
            }
            assert_eq!(
                cache::compiled(&program, capability, Some(folder.path())).unwrap(),
                image,
                "from the cache"
            );
        }
    }
    let kept = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(kept, 7, "a file per program and architecture");
}

#[test]
fn shapes_that_the_kernels_do_not_compute_are_refused_in_words() {
    assert!(Program::new(80, KvDtype::Bf16).unwrap_err().contains("80"));
    assert!(Program::new(80, KvDtype::F32).is_ok());
    assert!(Program::new(0, KvDtype::F16).is_err());
}
