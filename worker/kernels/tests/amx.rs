//! The AMX kernels against scalar references, where the CPU has AMX; elsewhere it says so and skips.

#[path = "../examples/amx_check.rs"]
mod amx_check;

#[test]
fn amx_agrees_with_scalar_references() {
    match amx_check::run(1) {
        None => eprintln!("skipped: no AMX here"),
        Some(failed) => assert_eq!(failed, 0, "failed checks, named above"),
    }
}
