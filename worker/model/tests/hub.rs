//! Downloads against a little hub of our own on a free port: listing, ranges, commit and etag headers.

mod common;

use baton_model::{Decoder, Hub, LoadOptions, ModelConfig, ModelFiles, Stage};
use common::Spec;
use serde_json::json;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves `files` as `org/name` until dropped; records the paths asked for.
struct FakeHub {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    fn start(files: HashMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &files, &log);
            }
        });
        FakeHub { endpoint, asked }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// One request per connection.
fn answer(stream: TcpStream, files: &HashMap<String, Vec<u8>>, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut request, mut range) = (String::new(), None);
    reader.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            let (from, to) = value.trim().split_once('-').unwrap();
            range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
        }
    }
    let path = request.split(' ').nth(1).unwrap_or("").to_owned();
    log.lock().unwrap().push(path.clone());
    let mut stream = stream;
    let mut send = |status: &str, headers: &str, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)
    };
    if path == "/api/models/org/private/revision/main" {
        return send("401 Unauthorized", "", b"");
    }
    if path == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = files.keys().map(|f| json!({"rfilename": f})).collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return send("200 OK", "Content-Type: application/json\r\n", body.as_bytes());
    }
    let file = path
        .strip_prefix(&format!("/org/name/resolve/{COMMIT}/"))
        .and_then(|f| files.get_key_value(f));
    let Some((name, bytes)) = file else {
        return send("404 Not Found", "", b"");
    };
    let (from, to) = range.unwrap_or((0, None));
    let end = to.map_or(bytes.len(), |t| (t + 1).min(bytes.len()));
    let etag = name.replace('.', "-");
    let headers = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{}\r\n",
        end.saturating_sub(1),
        bytes.len()
    );
    send("206 Partial Content", &headers, &bytes[from..end])
}

fn files_of(dir: &Path) -> HashMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect()
}

fn model_files(spec: &Spec) -> HashMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    spec.write(dir.path(), 1);
    let mut files = files_of(dir.path());
    files.insert("tokenizer.json".into(), b"{}".to_vec());
    files.insert("tokenizer_config.json".into(), b"{\"chat_template\": \"\"}".to_vec());
    files.insert("generation_config.json".into(), b"{\"eos_token_id\": [3, 4]}".to_vec());
    files.insert("README.md".into(), b"not needed".to_vec());
    files.insert("onnx/model.onnx".into(), b"not needed".to_vec());
    files
}

#[test]
fn downloads_what_is_needed_once_and_then_works_without_the_hub() {
    for shards in [1, 3] {
        let files = model_files(&Spec {
            shards,
            ..Spec::llama()
        });
        let hub_server = FakeHub::start(files.clone());
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub::new(&hub_server.endpoint, cache.path());
        let seen = Mutex::new(HashMap::new());
        let progress = |stage: Stage<'_>, done: u64, total: u64| {
            seen.lock().unwrap().insert(stage.to_string(), (done, total));
        };
        let dir = hub.resolve("org/name", &progress).unwrap();
        for (name, bytes) in &files {
            let wanted = !name.contains("README") && !name.contains("onnx");
            assert_eq!(dir.join(name).is_file(), wanted, "{name}");
            if wanted {
                assert_eq!(&std::fs::read(dir.join(name)).unwrap(), bytes);
                let (done, total) = seen.lock().unwrap()[&format!("downloading {name}")];
                assert_eq!((done, total), (bytes.len() as u64, bytes.len() as u64));
            }
        }
        let config = ModelConfig::from_dir(&dir).unwrap();
        assert_eq!(config.eos_token_ids, [3, 4]);
        Decoder::load(&ModelFiles::open(&dir).unwrap(), config, &LoadOptions::threads(1), &()).unwrap();

        // Again: only the listing is asked for.
        hub_server.asked();
        assert_eq!(hub.resolve("org/name@main", &()).unwrap(), dir);
        assert_eq!(hub_server.asked(), ["/api/models/org/name/revision/main"]);

        // Without a connection the earlier download serves; a port that nobody listens on stands for that.
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let offline = Hub::new(format!("http://{closed}"), cache.path());
        assert_eq!(offline.resolve("org/name", &()).unwrap(), dir);
        let text = offline.resolve("org/other", &()).unwrap_err().to_string();
        assert!(
            text.contains("org/other@main") && text.contains("give a directory"),
            "{text}"
        );
    }
}

#[test]
fn a_partial_earlier_download_is_not_used() {
    let hub_server = FakeHub::start(model_files(&Spec {
        shards: 2,
        ..Spec::llama()
    }));
    let cache = tempfile::tempdir().unwrap();
    let dir = Hub::new(&hub_server.endpoint, cache.path())
        .resolve("org/name", &())
        .unwrap();
    std::fs::remove_file(dir.join("model-00002-of-00002.safetensors")).unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(
        Hub::new(format!("http://{closed}"), cache.path())
            .resolve("org/name", &())
            .is_err()
    );
    // The hub fills the gap.
    Hub::new(&hub_server.endpoint, cache.path())
        .resolve("org/name", &())
        .unwrap();
    assert!(dir.join("model-00002-of-00002.safetensors").is_file());
}

#[test]
fn refusals_say_what_to_do() {
    let hub_server = FakeHub::start(model_files(&Spec::llama()));
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(&hub_server.endpoint, cache.path());
    let text = hub.resolve("org/unknown", &()).unwrap_err().to_string();
    assert!(text.contains("no such model or revision"), "{text}");
    let text = hub.resolve("org/private", &()).unwrap_err().to_string();
    assert!(text.contains("HF_TOKEN"), "{text}");
}

#[test]
fn a_model_that_cannot_be_served_is_refused_before_its_weights_are_fetched() {
    let mut files = model_files(&Spec::llama());
    let config = json!({"architectures": ["MixtralForCausalLM"]}).to_string();
    files.insert("config.json".into(), config.into_bytes());
    let hub_server = FakeHub::start(files);
    let cache = tempfile::tempdir().unwrap();
    let text = Hub::new(&hub_server.endpoint, cache.path())
        .resolve("org/name", &())
        .unwrap_err()
        .to_string();
    assert!(text.contains("MixtralForCausalLM"), "{text}");
    assert!(!hub_server.asked().iter().any(|path| path.ends_with(".safetensors")));

    let mut files = model_files(&Spec::llama());
    files.remove("model.safetensors");
    files.insert("model.gguf".into(), b"GGUF".to_vec());
    let (hub_server, cache) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    let text = Hub::new(&hub_server.endpoint, cache.path())
        .resolve("org/name", &())
        .unwrap_err()
        .to_string();
    assert!(text.contains("no safetensors"), "{text}");
}
