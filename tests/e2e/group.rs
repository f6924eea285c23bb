//! Three coordinators as processes of their own: the leader is killed under load, and nobody who talks to another notices.

use super::support::cluster::{Cluster, baton};
use super::support::http::{ChatStream, chat_body, get};
use super::support::{eventually, signal};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Time for a killed coordinator to be back and to have caught up.
const BACK_MAX: Duration = Duration::from_secs(60);
/// Clients at a time.
const CLIENTS: usize = 4;
/// Time under load before the blow, and after it.
const BEFORE: Duration = Duration::from_millis(300);

/// The members as one of them tells.
async fn group(url: &str) -> Vec<Value> {
    let answer = get(url, "/cluster/coordinators").await;
    let group = answer.json();
    group["coordinators"].as_array().cloned().unwrap_or_default()
}

fn urls(cluster: &Cluster) -> Vec<String> {
    let ready = cluster.ready().expect("it serves");
    let coordinators = ready["coordinators"].as_array().expect("a list");
    let url = |coordinator: &Value| coordinator["url"].as_str().expect("a URL").to_owned();
    coordinators.iter().map(url).collect()
}

/// All members have applied the same, and come to the same. Returns how many records are settled.
async fn agree(url: &str) -> u64 {
    eventually("all members agree", BACK_MAX, || async {
        let members = group(url).await;
        let first = members.first()?.clone();
        let alike = |member: &Value| {
            member["reachable"] == true
                && ["applied_index", "state_hash", "settled"]
                    .iter()
                    .all(|field| member[field] == first[field])
        };
        (members.len() == 3 && members.iter().all(alike)).then(|| first["settled"].as_u64().expect("a count"))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_dies_under_load_and_clients_of_another_notice_nothing() {
    let cluster = Cluster::start(&[
        "--coordinators",
        "3",
        "--prefill",
        "0",
        "--decode",
        "1",
        "--threads",
        "1",
    ])
    .await;
    let urls = urls(&cluster);
    assert_eq!(urls.len(), 3);
    for url in &urls {
        assert_eq!(get(url, "/ready").await.status, 200, "every coordinator serves");
    }
    let before = agree(&urls[0]).await;
    let members = group(&urls[0]).await;
    let leader = members
        .iter()
        .position(|member| member["role"] == "leader")
        .expect("a leader");
    let name = members[leader]["name"].as_str().expect("a name").to_owned();
    let term = members[leader]["term"].as_u64();
    let other = urls[(leader + 1) % 3].clone();

    let over = Arc::new(AtomicBool::new(false));
    let clients = (0..CLIENTS).map(|client| {
        let (url, over) = (other.clone(), over.clone());
        tokio::spawn(async move {
            let mut requests = 0;
            while !over.load(Ordering::Relaxed) {
                let extra = json!({"max_tokens": 24, "ignore_eos": true});
                let body = chat_body(&format!("{client} {requests} and so on"), extra);
                let chat = ChatStream::start(&url, &body).await.finish().await;
                assert_eq!(chat.count("completion_tokens"), 24);
                requests += 1;
            }
            requests
        })
    });
    let clients: Vec<_> = clients.collect();
    tokio::time::sleep(BEFORE).await;
    let pid = cluster.pid(&name);
    signal(pid, Signal::KILL);
    // Whoever it is: a process that is back within an election timeout may well lead again.
    eventually("the group has elected a leader", BACK_MAX, || async {
        let members = group(&other).await;
        let leads = |member: &Value| member["role"] == "leader" && member["term"].as_u64() > term;
        members.iter().any(leads).then_some(())
    })
    .await;
    tokio::time::sleep(BEFORE).await;
    over.store(true, Ordering::Relaxed);
    let mut requests = 0;
    for client in clients {
        requests += client.await.expect("no request fails");
    }
    // It comes back, and has what the others have: each record once.
    eventually("the killed one is back", BACK_MAX, || async {
        let now = cluster.pid(&name);
        (now != pid && now != 0).then_some(())
    })
    .await;
    let settled = agree(&other).await;
    assert_eq!(settled - before, requests, "one record for each request");
    let old = urls[leader].clone();
    eventually("it serves again", BACK_MAX, || {
        let old = old.clone();
        async move { ready(&old).await.then_some(()) }
    })
    .await;
    let chat = ChatStream::start(&old, &chat_body("hello", json!({"max_tokens": 4}))).await;
    chat.finish().await;

    // An operator lets it lead again, asking whom they like.
    let id = (leader + 1).to_string();
    let output = baton()
        .args(["coordinators", "transfer", &id, "--json", "--url", &other])
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{output:?}");
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(told["coordinators"][leader]["role"], "leader", "{told}");

    // What they know can be saved while they serve, and a new coordinator made of it.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (file, state) = (directory.path().join("backup"), directory.path().join("state"));
    let run = |command: &mut std::process::Command| {
        let output = command.output().expect("the binary runs");
        assert!(output.status.success(), "{output:?}");
    };
    run(baton().args(["snapshot", "save", "--url", &other]).arg(&file));
    run(baton().args(["snapshot", "restore"]).arg(&file).arg(&state));
    assert!(state.join("raft.redb").exists());
    let mut bytes = std::fs::read(&file).expect("it is there");
    bytes.pop();
    std::fs::write(&file, bytes).expect("writable");
    let cut = baton()
        .args(["snapshot", "restore"])
        .arg(&file)
        .arg(directory.path().join("other"))
        .output();
    assert!(
        !cut.expect("the binary runs").status.success(),
        "a backup that was cut is none"
    );
    cluster.stop().await;
}

/// Whether a coordinator, which may not listen yet, takes requests.
async fn ready(url: &str) -> bool {
    let address = url.strip_prefix("http://").expect("an http URL").to_owned();
    tokio::net::TcpStream::connect(address).await.is_ok() && get(url, "/ready").await.status == 200
}
