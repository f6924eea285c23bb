//! Generates `docs/cli.md` from the definition of the command line and compares it with the file in the repository.

use super::Cli;
use clap::{Command, CommandFactory};
use std::path::Path;

/// Set to anything to write the file instead of comparing.
const UPDATE_VARIABLE: &str = "BATON_UPDATE_DOCS";
/// Width of the help texts in the document.
const WIDTH: usize = 100;

fn document() -> String {
    let mut root = Cli::command().term_width(WIDTH);
    root.build();
    let mut out = format!(
        "# Command line\n\nGenerated from the program's own help by `{UPDATE_VARIABLE}=1 cargo test --bin baton docs`; the test run \
         compares it. Do not edit.\n"
    );
    section(&mut out, &mut root, "baton");
    out
}

fn section(out: &mut String, command: &mut Command, path: &str) {
    let help = command.render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    *out += &format!("\n## `{path}`\n\n```text\n{}\n```\n", help.join("\n").trim_end());
    for child in command.get_subcommands_mut().filter(|child| !child.is_hide_set()) {
        let path = format!("{path} {}", child.get_name());
        section(out, child, &path);
    }
}

#[test]
fn cli_reference_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    let expected = document();
    if std::env::var_os(UPDATE_VARIABLE).is_some() {
        std::fs::write(&path, &expected).expect("docs/ is writable");
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/cli.md is not what --help says; run: {UPDATE_VARIABLE}=1 cargo test --bin baton docs"
    );
}
