//! Chunks of uploaded files between members, over real mTLS: what was acknowledged survives a member, and a member that was
//! away comes to have everything.

use super::fake_worker::channel;
use super::group::leader;
use super::{Coordinator, PATIENCE, until};
use baton_gateway::{Backend, ChunkError, ChunkStore};
use baton_identity::Role as CertificateRole;
use baton_proto::files::files_client::FilesClient;
use baton_proto::files::{Chunk, ChunkName};
use baton_proto::state::{File, FileChunk, PutFile, command::Kind};
use std::sync::Arc;

fn chunks(member: &Coordinator) -> Arc<dyn ChunkStore> {
    member.backend.chunks().expect("it has a place for them")
}

/// Names a chunk in the state, so that every member wants it.
async fn name(member: &Coordinator, id: &str, hash: [u8; 32], bytes: u64) {
    let file = File {
        id: id.into(),
        owner: "o".into(),
        purpose: "batch".into(),
        bytes,
        chunks: 1,
        ..File::default()
    };
    let hash = hash.to_vec().into();
    let kind = Kind::PutFile(PutFile {
        file: Some(file),
        chunks: vec![FileChunk { hash, bytes }],
        owner_files_max: 9,
        owner_bytes_max: 1 << 30,
        bytes_max: 1 << 30,
    });
    let store = member.backend.accounts().expect("a store");
    store
        .propose(baton_gateway::command("", kind))
        .await
        .expect("committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_survives_a_member() {
    let group = Coordinator::start_group(|_| {}).await;
    let first = leader(&group).await;
    let (other, third) = ((first + 1) % 3, (first + 2) % 3);
    let data = vec![7u8; 4 << 20];
    let hash = chunks(&group[first]).put(data.clone().into()).await.expect("kept");
    // Two have it. Whoever dies, it can be read at each of the others.
    group[first].kill();
    for member in [other, third] {
        assert_eq!(chunks(&group[member]).get(hash).await.expect("still there"), data);
    }
    // Of two members both must have a chunk, and of one alone none can be acknowledged.
    leader(&group).await;
    let small = chunks(&group[other]).put("small".into()).await.expect("kept by two");
    name(&group[other], "file-1", small, 5).await;
    group[third].kill();
    let alone = chunks(&group[other]);
    let refused = tokio::time::timeout(PATIENCE * 2, alone.put("x".into()));
    let refused = refused.await.expect("an answer");
    assert!(matches!(refused, Err(ChunkError::Unavailable(_))), "{refused:?}");
    assert!(chunks(&group[other]).get(small).await.is_ok(), "reading needs nobody");
    assert_eq!(chunks(&group[other]).get([9; 32]).await, Err(ChunkError::Missing));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_fetches_what_it_lacks() {
    let group = Coordinator::start_group(|_| {}).await;
    let first = leader(&group).await;
    let hash = chunks(&group[first]).put("everybody's".into()).await.expect("kept");
    let file = |member: &Coordinator| {
        let name: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let files = member.cluster.config.data_dir.join("files");
        files.join(&name[..2]).join(name)
    };
    until("all have it", || group.iter().all(|member| file(member).exists())).await;
    // A disk that loses or damages it gets it again when it is read.
    std::fs::remove_file(file(&group[first])).expect("it was there");
    assert_eq!(
        chunks(&group[first]).get(hash).await.expect("from another"),
        "everybody's"
    );
    std::fs::write(file(&group[first]), "damaged").expect("written");
    assert_eq!(
        chunks(&group[first]).get(hash).await.expect("from another"),
        "everybody's"
    );
    assert_eq!(std::fs::read(file(&group[first])).expect("mended"), b"everybody's");
    // And what the state names is fetched without being read.
    name(&group[first], "file-1", hash, 11).await;
    let newcomer = group[first].newcomer(4).await;
    let change = baton_gateway::GroupChange::Add(baton_gateway::NewCoordinator {
        id: 4,
        name: "coordinator-3".into(),
        cluster_addr: newcomer.cluster_addr.to_string(),
        api_url: String::new(),
    });
    group[first].backend.change_group(change).await.expect("taken in");
    until("the newcomer has it", || file(&newcomer).exists()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_coordinators_are_served() {
    let member = Coordinator::start().await;
    let hash = chunks(&member).put("secret".into()).await.expect("kept");
    let name = || ChunkName {
        hash: hash.to_vec().into(),
    };
    let worker = member.worker_identity("w");
    let connected = channel(member.cluster_addr, &worker).await.unwrap();
    let mut client = FilesClient::new(connected);
    let code = |status: tonic::Status| status.code();
    let refused = tonic::Code::PermissionDenied;
    assert_eq!(client.get(name()).await.map_err(code).unwrap_err(), refused);
    let chunk = Chunk { data: "x".into() };
    assert_eq!(client.put(chunk).await.map_err(code).unwrap_err(), refused);
    let peer = member
        .authority
        .issue(CertificateRole::Coordinator, "coordinator-9")
        .unwrap();
    let connected = channel(member.cluster_addr, &peer).await.unwrap();
    let mut client = FilesClient::new(connected);
    assert_eq!(client.get(name()).await.unwrap().into_inner().data, "secret");
    let bad = ChunkName { hash: "short".into() };
    assert_eq!(
        client.get(bad).await.map_err(code).unwrap_err(),
        tonic::Code::InvalidArgument
    );
}
