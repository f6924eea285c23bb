//! The rows of `baton gpu-check` that compare, on the kernels compiled for the host: so that the first run on a GPU tests the
//! GPU and not the check, and so that every reference there has agreed with the kernels once.

mod common;

use baton_cuda::check::{self, Context};
use common::Shape;
use common::emulated::{EmulatedDriver, compiler};
use safetensors::tensor::Dtype;

fn passes(name: &str) {
    if compiler().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape {
        layers: 1,
        ..Shape::small(Dtype::BF16)
    };
    shape.write(dir.path(), 5);
    let open = || Ok(EmulatedDriver::new().0);
    let context = Context {
        open: &open,
        seed: 11,
        model: dir.path().to_owned(),
        scratch: dir.path().to_owned(),
        layers: 1,
        greedy_tokens: 8,
    };
    let outcome = check::run(name, &context).unwrap();
    eprintln!("{name}: {}", outcome.detail);
    assert_eq!(outcome.passed, Some(true), "{}", outcome.detail);
}

#[test]
fn single_ops() {
    for (name, _) in check::names()
        .into_iter()
        .take_while(|(name, _)| *name != "model logits")
    {
        passes(name);
    }
}

#[test]
fn whole_models() {
    for name in ["model logits", "greedy tokens", "P1 graph", "kv in host memory", "leak"] {
        passes(name);
    }
}

#[test]
fn a_row_that_does_not_exist_says_so() {
    let open = || Ok(EmulatedDriver::recording().0);
    let context = Context {
        open: &open,
        seed: 0,
        model: "m".into(),
        scratch: "s".into(),
        layers: 1,
        greedy_tokens: 1,
    };
    assert!(
        check::run("no such row", &context)
            .unwrap_err()
            .to_string()
            .contains("no such row")
    );
}
