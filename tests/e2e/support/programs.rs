//! Programs that a machine may lack: whether one is there, and scripts with official clients run by it. What is missing is skipped
//! with a message that says how to get it.

use std::path::Path;
use std::process::{Command, Stdio};

/// Whether the program runs, with these arguments, to a good end.
pub fn have(program: &str, args: &[&str]) -> bool {
    let status = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// Runs a script of this repository against `url`; it must succeed.
pub fn run_script(program: &str, script: &str, url: &str) {
    let output = Command::new(program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script))
        .arg(url)
        .output()
        .expect("it runs");
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs a script that needs the openai package for Python, or says that it is skipped.
pub fn run_openai_script(script: &str, url: &str) {
    if have("python3", &["-c", "import openai, pydantic"]) {
        run_script("python3", script, url);
    } else {
        eprintln!(
            "skipped: {script}: python3 with the openai package is not installed (python3 -m pip install openai)"
        );
    }
}
