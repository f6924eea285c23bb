//! Three coordinators over real mTLS: one leads, any serves, and nobody is believed who is not what it says.

use super::fake_worker::{channel, register};
use super::{Coordinator, until};
use baton_gateway::{Backend, BackendError, CoordinatorRole, GroupChange, NewCoordinator, WorkerState};
use baton_identity::{Identity, Role as CertificateRole};
use baton_proto::cluster::cluster_client::ClusterClient;
use baton_proto::cluster::{
    CoordinatorOrder, Heartbeat, Register, Role, WorkerReport, coordinator_order, worker_report,
};
use baton_proto::raft::RaftMessages;
use baton_proto::raft::raft_client::RaftClient;
use baton_proto::state::{Member, UsageRecord};
use baton_raftstore::Message;
use protobuf::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

pub(super) async fn leader(group: &[Coordinator]) -> usize {
    let leads = || group.iter().position(|member| member.cluster.store.status().leads);
    until("a leader", || leads().is_some()).await;
    let at = leads().unwrap();
    let id = group[at].cluster.group.id();
    until("all follow it", || {
        let alive = group.iter().filter(|member| !member.cluster.shutdown.is_cancelled());
        alive
            .into_iter()
            .all(|member| member.cluster.store.status().leader_id == id)
    })
    .await;
    at
}

fn record(request_id: &str) -> UsageRecord {
    UsageRecord {
        request_id: request_id.into(),
        model: "m".into(),
        prompt_tokens: 3,
        completion_tokens: 4,
        sampled_tokens: 4,
        status: 1,
        ..UsageRecord::default()
    }
}

/// A Join stream by hand.
struct Joined {
    reports: mpsc::Sender<WorkerReport>,
    orders: Streaming<CoordinatorOrder>,
}

impl Joined {
    async fn open(member: &Coordinator, register: Register, identity: &Identity) -> Self {
        let mut client = ClusterClient::new(channel(member.cluster_addr, identity).await.unwrap());
        let (reports, queued) = mpsc::channel(8);
        let kind = Some(worker_report::Kind::Register(register));
        reports.send(WorkerReport { kind }).await.unwrap();
        let orders = client.join(ReceiverStream::new(queued)).await.unwrap().into_inner();
        Self { reports, orders }
    }

    async fn next(&mut self) -> coordinator_order::Kind {
        let order = tokio::time::timeout(super::PATIENCE, self.orders.message());
        order.await.expect("an order").unwrap().unwrap().kind.unwrap()
    }

    async fn epoch(&mut self) -> u64 {
        match self.next().await {
            coordinator_order::Kind::Registered(registered) => registered.epoch,
            other => panic!("{other:?}"),
        }
    }

    async fn beat(&self) {
        self.reports.send(heartbeat()).await.unwrap();
    }
}

fn heartbeat() -> WorkerReport {
    WorkerReport {
        kind: Some(worker_report::Kind::Heartbeat(Heartbeat::default())),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_settled_through_any_member_survive_the_leader_once_each() {
    let group = Coordinator::start_group(|_| {}).await;
    let first = leader(&group).await;
    for (index, member) in group.iter().enumerate() {
        member.backend.settle(record(&format!("before-{index}"))).await.unwrap();
        assert!(member.backend.has_quorum());
    }
    // While the leader dies, others go on settling; each record more than once.
    let others: Vec<&Coordinator> = group
        .iter()
        .enumerate()
        .filter(|(i, _)| *i != first)
        .map(|(_, m)| m)
        .collect();
    let load = |member: &Coordinator, name: &'static str| {
        let store = crate::backend::ClusterBackend(
            member.cluster.clone(),
            member.accounts.clone(),
            member.backend.2.clone(),
        );
        tokio::spawn(async move {
            for n in 0..40 {
                store
                    .settle(record(&format!("{name}-{n}")))
                    .await
                    .expect("an election is no error");
                store
                    .settle(record(&format!("{name}-{n}")))
                    .await
                    .expect("nor is a repetition");
            }
        })
    };
    let running = [load(others[0], "a"), load(others[1], "b")];
    tokio::time::sleep(std::time::Duration::from_millis(30)).await;
    group[first].kill();
    for task in running {
        task.await.unwrap();
    }
    let position = |member: &Coordinator| member.cluster.store.position().unwrap();
    until("both at one index", || {
        position(others[0]).applied_index == position(others[1]).applied_index
    })
    .await;
    assert_eq!(position(others[0]), position(others[1]), "one index, one hash");
    assert_eq!(position(others[0]).settled, 3 + 80);
    let report = others[0].backend.coordinators().await.unwrap();
    let of = |index: usize| &report.coordinators[index];
    assert_eq!(report.coordinators.len(), 3);
    assert!(!of(first).reachable, "{report:?}");
    assert_eq!(
        report
            .coordinators
            .iter()
            .filter(|c| c.role == CoordinatorRole::Leader)
            .count(),
        1
    );
    assert!(
        report
            .coordinators
            .iter()
            .filter(|c| c.reachable)
            .all(|c| c.settled == 83 && c.lag == 0)
    );

    // One alone has no quorum, says so, and gives up in bounded time.
    others[0].kill();
    until("no quorum", || !others[1].backend.has_quorum()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_registers_once_and_is_known_to_all_under_that_epoch() {
    let group = Coordinator::start_group(|_| {}).await;
    leader(&group).await;
    let identity = group[0].worker_identity("w");
    let me = register("w", Role::Decode, "127.0.0.1:9".parse().unwrap());
    let mut first = Joined::open(&group[0], me.clone(), &identity).await;
    let coordinator_order::Kind::Registered(registered) = first.next().await else {
        panic!()
    };
    let addrs: Vec<String> = group.iter().map(|member| member.cluster_addr.to_string()).collect();
    assert_eq!(
        registered.coordinators.unwrap().cluster_addrs,
        addrs,
        "it is told of all members"
    );
    let epoch = registered.epoch;
    let claimed = Register { epoch, ..me.clone() };
    // Kept: a worker whose streams broke at most members is lost to the group.
    let mut kept = Vec::new();
    for member in &group[1..] {
        let mut stream = Joined::open(member, claimed.clone(), &identity).await;
        assert_eq!(stream.epoch().await, epoch);
        stream.beat().await;
        assert_eq!(member.status("w").unwrap().epoch, epoch);
        kept.push(stream);
    }
    for member in &group {
        assert_eq!(member.cluster.store.workers().unwrap().len(), 1, "registered once");
        assert!(
            member.cluster.store.workers().unwrap()[0]
                .worker
                .as_ref()
                .unwrap()
                .epoch
                == 0
        );
    }

    // An epoch that was never given, and one that is over because the same process registered again, are fenced.
    let unknown = Register {
        epoch: epoch + 100,
        ..me.clone()
    };
    let mut stream = Joined::open(&group[1], unknown, &identity).await;
    assert!(matches!(stream.next().await, coordinator_order::Kind::Fenced(_)));
    let mut again = Joined::open(&group[2], me.clone(), &identity).await;
    let newer = again.epoch().await;
    assert!(newer > epoch);
    until("the first member follows", || {
        group[0].status("w").is_some_and(|w| w.epoch == newer)
    })
    .await;
    let mut stream = Joined::open(&group[0], claimed.clone(), &identity).await;
    assert!(matches!(stream.next().await, coordinator_order::Kind::Fenced(_)));

    // Another process under its name is a mistake that one of the two must be told of.
    let other = Register { pid: 43, ..me };
    let mut stream = Joined::open(&group[1], other, &identity).await;
    let newest = stream.epoch().await;
    until("applied", || group[2].status("w").is_some_and(|w| w.epoch == newest)).await;
    let mut stream = Joined::open(
        &group[2],
        Register {
            epoch: newer,
            ..claimed
        },
        &identity,
    )
    .await;
    assert!(matches!(stream.next().await, coordinator_order::Kind::Refused(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_that_loses_a_worker_does_not_take_it_from_the_others() {
    let group = Coordinator::start_group(|config| config.lost_after_ms = 600).await;
    leader(&group).await;
    let identity = group[0].worker_identity("w");
    let me = register("w", Role::Decode, "127.0.0.1:9".parse().unwrap());
    let mut streams = vec![Joined::open(&group[0], me.clone(), &identity).await];
    let epoch = streams[0].epoch().await;
    let claimed = Register { epoch, ..me };
    let mut second = Joined::open(&group[1], claimed.clone(), &identity).await;
    second.epoch().await;
    streams.push(second);
    // The third never hears it.
    let is_lost = |member: &Coordinator| member.status("w").is_some_and(|w| w.state == WorkerState::Lost);
    let beating = async {
        loop {
            for stream in &streams {
                stream.beat().await;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let seen = until("lost where it is not heard", || is_lost(&group[2]));
    tokio::select! {
        () = beating => {}
        () = seen => {}
    }
    assert_eq!(group[2].cluster.store.workers().unwrap().len(), 1, "the group has it");
    assert!(!is_lost(&group[0]) && !is_lost(&group[1]));
    // Heard again under the same epoch, it is back, and the member takes its word back.
    let mut third = Joined::open(&group[2], claimed.clone(), &identity).await;
    assert_eq!(third.epoch().await, epoch);
    streams.push(third);
    let beating = async {
        loop {
            for stream in &streams {
                stream.beat().await;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let believed = || {
        let workers = group[0].cluster.store.workers().unwrap();
        workers[0].lost_by.is_empty() && group[2].status("w").unwrap().state == WorkerState::Joining
    };
    let seen = until("it takes its word back", believed);
    tokio::select! {
        () = beating => {}
        () = seen => {}
    }

    // Two of three lose it: it is over for all, the one that still hears it too.
    streams.truncate(1);
    let beating = async {
        loop {
            let _ = streams[0].reports.try_send(heartbeat());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let seen = until("lost everywhere", || group.iter().all(is_lost));
    tokio::select! {
        () = beating => {}
        () = seen => {}
    }
    assert!(group[0].cluster.store.workers().unwrap().is_empty());
    let mut zombie = Joined::open(&group[0], claimed, &identity).await;
    assert!(matches!(zombie.next().await, coordinator_order::Kind::Fenced(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_joins_takes_over_and_another_leaves() {
    let group = Coordinator::start_group(|_| {}).await;
    let first = leader(&group).await;
    for n in 0..50 {
        group[0].backend.settle(record(&format!("r-{n}"))).await.unwrap();
    }
    // Asked of one that does not lead, it goes to the one that does.
    let follower = &group[(first + 1) % 3].backend;
    let newcomer = group[0].newcomer(4).await;
    let add = NewCoordinator {
        id: 4,
        name: "coordinator-3".into(),
        cluster_addr: newcomer.cluster_addr.to_string(),
        api_url: "http://127.0.0.1:1".into(),
    };
    follower.change_group(GroupChange::Add(add.clone())).await.unwrap();
    until("the newcomer has everything", || {
        newcomer.cluster.store.position().unwrap().settled == 50
    })
    .await;
    newcomer.backend.settle(record("through the newcomer")).await.unwrap();
    let report = newcomer.backend.coordinators().await.unwrap();
    assert_eq!(report.coordinators.len(), 4, "{report:?}");
    assert!(report.coordinators.iter().all(|member| member.reachable));

    follower.change_group(GroupChange::Transfer { to: 4 }).await.unwrap();
    until("it leads", || newcomer.cluster.store.status().leads).await;
    let old = group[first].cluster.group.id();
    follower.change_group(GroupChange::Remove { id: old }).await.unwrap();
    let report = newcomer.backend.coordinators().await.unwrap();
    assert!(report.coordinators.iter().all(|member| member.id != old) && report.coordinators.len() == 3);
    // A leader that is to leave hands over first.
    follower.change_group(GroupChange::Remove { id: 4 }).await.unwrap();
    let rest: Vec<&Coordinator> = group.iter().filter(|member| member.cluster.group.id() != old).collect();
    rest[0].backend.settle(record("by those who are left")).await.unwrap();
    assert_eq!(rest[0].cluster.store.position().unwrap().settled, 52);

    let refused = follower.change_group(GroupChange::Remove { id: 77 }).await;
    assert!(matches!(refused, Err(BackendError::Refused { .. })), "{refused:?}");
    let nameless = NewCoordinator {
        name: "a b".into(),
        ..add
    };
    let refused = follower.change_group(GroupChange::Add(nameless)).await;
    assert!(matches!(refused, Err(BackendError::Refused { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_speaks_for_itself_only() {
    let group = Coordinator::start_group(|_| {}).await;
    leader(&group).await;
    let member = |id: u64| Member {
        id,
        name: format!("coordinator-{}", id - 1),
        cluster_addr: group[id as usize - 1].cluster_addr.to_string(),
        ..Member::default()
    };
    let mut message = Message::default();
    (message.from, message.to, message.term) = (2, 1, 1);
    let encoded = message.write_to_bytes().unwrap();
    let of_another = {
        message.from = 3;
        message.write_to_bytes().unwrap()
    };
    let send = async |role, name: &str, from: Option<Member>, encoded: &[u8]| {
        let identity = group[0].authority.issue(role, name).unwrap();
        let mut client = RaftClient::new(channel(group[0].cluster_addr, &identity).await.unwrap());
        let (batches, sending) = mpsc::channel(1);
        let batch = RaftMessages {
            from,
            messages: vec![encoded.to_vec().into()],
        };
        batches.send(batch).await.unwrap();
        drop(batches);
        client
            .messages(ReceiverStream::new(sending))
            .await
            .map_err(|status| status.code())
    };
    let refused = Err(tonic::Code::PermissionDenied);
    let coordinator = CertificateRole::Coordinator;
    let answer = send(coordinator, "coordinator-1", Some(member(2)), &encoded)
        .await
        .map(drop);
    assert_eq!(answer, Ok(()), "its own message");
    for (role, name, from, encoded, why) in [
        (
            coordinator,
            "coordinator-2",
            member(2),
            &encoded,
            "under another's certificate",
        ),
        (
            coordinator,
            "coordinator-1",
            member(2),
            &of_another,
            "as another member",
        ),
        (
            CertificateRole::Worker,
            "coordinator-1",
            member(2),
            &encoded,
            "a worker",
        ),
        (CertificateRole::Admin, "coordinator-1", member(2), &encoded, "a person"),
        (
            coordinator,
            "coordinator-8",
            Member {
                name: "coordinator-8".into(),
                ..member(2)
            },
            &encoded,
            "a taken id",
        ),
    ] {
        assert_eq!(send(role, name, Some(from), encoded).await.map(drop), refused, "{why}");
    }
    let nobody = send(coordinator, "coordinator-1", None, &encoded).await.map(drop);
    assert_eq!(nobody, Err(tonic::Code::InvalidArgument));
    let garbage = send(coordinator, "coordinator-1", Some(member(2)), b"\xff\xff")
        .await
        .map(drop);
    assert_eq!(garbage, Err(tonic::Code::InvalidArgument));
    // The real members go on.
    group[1].backend.settle(record("after")).await.unwrap();
}
