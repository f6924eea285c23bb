//! `baton doctor` and `baton gpu-check` on a machine that may have no GPU: they say so and end, and so does a worker that
//! asks for one.

use std::process::{Command, Output};

fn baton(args: &[&str]) -> Output {
    let command = &mut Command::new(env!("CARGO_BIN_EXE_baton"));
    // No GPU is shown to it, should there be one: the same answer on every machine.
    command
        .env("CUDA_VISIBLE_DEVICES", "-1")
        .args(args)
        .output()
        .expect("it starts")
}

#[test]
fn without_a_gpu_doctor_and_gpu_check_say_what_is_missing() {
    for args in [&["doctor"][..], &["gpu-check", "--no-speed"]] {
        let output = baton(args);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.contains("No worker can compute on a GPU here"), "{text}");
        assert!(text.contains("driver") && text.contains("!!"), "{text}");
    }
    let output = baton(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let wrong = |finding: &serde_json::Value| finding["level"] == "wrong";
    assert!(
        report["findings"].as_array().expect("a list").iter().any(wrong),
        "{report}"
    );
}

#[test]
fn a_row_without_a_gpu_fails_in_words() {
    let output = baton(&["gpu-check", "--only", "rms_norm"]);
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(outcome["passed"], false, "{outcome}");
    assert!(!outcome["detail"].as_str().expect("text").is_empty());
}

#[test]
fn a_worker_that_asks_for_a_gpu_says_why_it_has_none() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/model");
    let config = format!(
        "worker_id = \"w\"\ndevice = \"cuda\"\nmodel_path = {model:?}\nmodel_name = \"m\"\ncoordinator_addrs = [\"127.0.0.1:1\"]\nidentity_dir = {:?}\n",
        dir.path()
    );
    let path = dir.path().join("worker.toml");
    std::fs::write(&path, config).expect("written");
    let output = baton(&["worker", "--config", path.to_str().expect("text")]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("device = \"cuda:0\""), "{text}");
}
