//! What cannot work is refused in one sentence that names the cause and the way out, with a failing exit code and
//! nothing left running.

use super::support::cluster::{Cluster, baton};
use super::support::{eventually, signal};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

fn run(args: &[&str]) -> Output {
    baton().args(args).output().expect("the binary runs")
}

/// The one sentence that a failing command printed, which must contain `parts`.
fn sentence(args: &[&str], parts: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| line.starts_with("baton: ")).collect();
    let [line] = lines[..] else {
        panic!("{args:?} printed not one sentence: {stderr}")
    };
    assert!(stderr.trim_end().ends_with(line), "the sentence comes last: {stderr}");
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in: {line}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    line.to_owned()
}

fn up<'a>(data: &'a Path, args: &[&'a str]) -> Vec<&'a str> {
    [
        &["up", "--port", "0", "--data-dir", data.to_str().expect("UTF-8")],
        args,
    ]
    .concat()
}

#[test]
fn a_taken_port() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let port = holder.local_addr().expect("it is bound").port().to_string();
    let data = directory.path().join("data");
    sentence(
        &["up", "--data-dir", data.to_str().expect("UTF-8"), "--port", &port],
        &[&port, "taken", "--port"],
    );
}

#[test]
fn models_that_cannot_be_served() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data = directory.path().join("data");
    sentence(&up(&data, &["--model", "/no/such/model"]), &["/no/such/model"]);

    let strange = directory.path().join("strange");
    std::fs::create_dir(&strange).expect("writable");
    let path = strange.to_str().expect("UTF-8");
    sentence(&up(&data, &["--model", path]), &["config.json"]);
    std::fs::write(
        strange.join("config.json"),
        r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}"#,
    )
    .expect("writable");
    sentence(
        &up(&data, &["--model", path]),
        &["MambaForCausalLM", "LlamaForCausalLM"],
    );
    std::fs::write(strange.join("config.json"), "{ not json").expect("writable");
    sentence(&up(&data, &["--model", path]), &["config.json"]);

    sentence(
        &up(&data, &["--kv-mem", "500TiB"]),
        &["does not fit", "--kv-mem", "available"],
    );
    sentence(&up(&data, &["--kv-mem", "1KiB"]), &["--kv-mem", "too little"]);
}

#[test]
fn flags_that_cannot_work() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data = directory.path().join("data");
    sentence(&up(&data, &["--coordinators", "2"]), &["--coordinators 2", "3 survive"]);
    sentence(&up(&data, &["--host", "0.0.0.0"]), &["--api-key"]);
    let file = directory.path().join("file");
    std::fs::write(&file, "").expect("writable");
    sentence(
        &["up", "--port", "0", "--data-dir", file.to_str().expect("UTF-8")],
        &["--data-dir"],
    );
}

#[test]
fn broken_and_hostile_configurations() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("config.toml");
    let name = path.to_str().expect("UTF-8");
    for command in ["worker", "coordinator"] {
        sentence(
            &[command, "--config", "/no/such/file.toml"],
            &["/no/such/file.toml", "--config"],
        );
        sentence(&[command, "--config", "/dev/zero"], &["not a regular file"]);
        for text in [
            &b""[..],
            b"= = =",
            b"unknown_setting = 1",
            b"\xff\xfe\x00",
            &b"[".repeat(100_000),
            b"worker_id = 7\nhttp_addr = \"x\"",
            b"data_dir = \"d\"\nhttp_addr = \"127.0.0.1:99999\"",
        ] {
            std::fs::write(&path, text).expect("writable");
            sentence(&[command, "--config", name], &["config.toml"]);
        }
    }
}

/// The environment wins over the file: a good file with a bad variable is refused, and the variable is named.
#[test]
fn the_environment_overrides_the_configuration() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("config.toml");
    let text = "worker_id = \"w\"\nmodel_path = \"/no/model\"\nmodel_name = \"m\"\nidentity_dir = \"/no/identity\"\n\
                coordinator_addrs = [\"127.0.0.1:1\"]\n";
    std::fs::write(&path, text).expect("writable");
    let stderr = |name: &str, value: &str| {
        let output = baton()
            .arg("worker")
            .arg("--config")
            .arg(&path)
            .env(name, value)
            .output()
            .expect("the binary runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    assert!(
        stderr("BATON_WORKER_ROLE", "prefill").contains("/no/model"),
        "taken, and then the model is missed"
    );
    assert!(stderr("BATON_WORKER_ROLE", "oracle").contains("oracle"));
    assert!(stderr("BATON_WORKER_MODEL_PATH", "/other/model").contains("/other/model"));
    assert!(stderr("BATON_WORKER_NO_SUCH", "1").contains("no_such"));
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_while_starting() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data = directory.path().join("data");
    let mut child = baton()
        .args(up(&data, &[]))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs");
    eventually("the first worker is being started", Duration::from_secs(60), || async {
        data.join("logs/prefill-0.log").exists().then_some(())
    })
    .await;
    signal(child.id(), rustix::process::Signal::INT);
    let status = eventually("up ends", Duration::from_secs(40), || {
        let status = child.try_wait().expect("it is our child");
        async move { status }
    })
    .await;
    assert!(
        matches!(status.code(), Some(0 | 130)),
        "{status:?}: stopped before or just after it served"
    );
    eventually("no process is left", Duration::from_secs(10), || async {
        commands_naming(&data).is_empty().then_some(())
    })
    .await;
}

/// Command lines of running processes that name a path.
fn commands_naming(path: &Path) -> Vec<String> {
    let path = path.to_str().expect("UTF-8");
    let processes = std::fs::read_dir("/proc").expect("this is Linux").flatten();
    let commands = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    commands
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(path))
        .collect()
}

#[test]
fn nothing_listening() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let url = format!("http://{}", listener.local_addr().expect("it is bound"));
    drop(listener);
    sentence(&["status", "--url", &url], &[&url, "baton up", "--url"]);
    sentence(&["status", "--url", "https://x"], &["https"]);
    sentence(&["bench", "--url", &url, "--quiet"], &[&url]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_on_the_same_directory() {
    let cluster = Cluster::start(&["--prefill", "0"]).await;
    let pid = cluster.up.id().to_string();
    let data = cluster.data();
    tokio::task::spawn_blocking(move || sentence(&up(&data, &[]), &[&pid, "--data-dir"]))
        .await
        .expect("it says so");
    assert!(cluster.stop().await.success());
}
