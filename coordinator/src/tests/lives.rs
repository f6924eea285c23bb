//! Workers come, fall silent, claim what they are not, and take each other's place.

use super::fake_worker::{FakeWorker, channel, register};
use super::{Coordinator, until};
use baton_gateway::{Backend, WorkerState};
use baton_identity::Role as CertificateRole;
use baton_proto::cluster::cluster_client::ClusterClient;
use baton_proto::cluster::{Leaving, Register, Role, WorkerReport, coordinator_order, worker_report};
use std::sync::atomic::Ordering;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

fn report(kind: worker_report::Kind) -> WorkerReport {
    WorkerReport { kind: Some(kind) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_worker_is_lost_and_may_come_back_under_a_new_epoch() {
    let coordinator = Coordinator::start_with(|config| config.lost_after_ms = 400).await;
    let worker = FakeWorker::start(
        "w",
        Role::Decode,
        coordinator.cluster_addr,
        coordinator.worker_identity("w"),
    );
    coordinator.wait_ready("w").await;
    let epoch = coordinator.status("w").unwrap().epoch;
    // Its connections stand; only the heartbeats stop.
    worker.controls.mute.store(true, Ordering::SeqCst);
    coordinator.wait_lost("w").await;
    until("removed", || coordinator.cluster.store.workers().unwrap().is_empty()).await;
    assert!(!coordinator.backend.models()[0].served);
    let _again = FakeWorker::start(
        "w",
        Role::Decode,
        coordinator.cluster_addr,
        coordinator.worker_identity("w"),
    );
    coordinator.wait_ready("w").await;
    assert!(coordinator.status("w").unwrap().epoch > epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_with_an_old_epoch_gets_no_work() {
    let coordinator = Coordinator::start().await;
    let first = FakeWorker::start(
        "w",
        Role::Decode,
        coordinator.cluster_addr,
        coordinator.worker_identity("w"),
    );
    coordinator.wait_ready("w").await;
    let old = first.controls.epoch.load(Ordering::SeqCst);
    // Another process takes the id: the first is told to go, and its link is closed.
    let second = FakeWorker::start(
        "w",
        Role::Decode,
        coordinator.cluster_addr,
        coordinator.worker_identity("w"),
    );
    until("the first refused", || first.controls.refused.lock().unwrap().is_some()).await;
    coordinator.wait_ready("w").await;
    assert_eq!(
        coordinator.status("w").unwrap().epoch,
        second.controls.epoch.load(Ordering::SeqCst)
    );

    // One that greets with an old epoch is registered, and never attached.
    let zombie = FakeWorker::start(
        "z",
        Role::Decode,
        coordinator.cluster_addr,
        coordinator.worker_identity("z"),
    );
    zombie.controls.claim_epoch.store(old, Ordering::SeqCst);
    until("attempts at the zombie", || {
        zombie.controls.attaches.load(Ordering::SeqCst) >= 3
    })
    .await;
    assert_eq!(coordinator.status("z").unwrap().state, WorkerState::Joining);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_worker_certificate_may_join() {
    let coordinator = Coordinator::start().await;
    for role in [CertificateRole::Coordinator, CertificateRole::Admin] {
        let identity = coordinator.authority.issue(role, "x").unwrap();
        let mut client = ClusterClient::new(channel(coordinator.cluster_addr, &identity).await.unwrap());
        let (_reports, queued) = mpsc::channel::<WorkerReport>(1);
        let refused = client.join(ReceiverStream::new(queued)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    }
    // Another cluster's worker does not even connect.
    let elsewhere = tempfile::tempdir().unwrap();
    let authority = baton_identity::Authority::load_or_create(elsewhere.path()).unwrap();
    let stranger = authority.issue(CertificateRole::Worker, "w").unwrap();
    assert!(channel(coordinator.cluster_addr, &stranger).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_that_makes_no_sense_is_refused_in_a_sentence() {
    let coordinator = Coordinator::start().await;
    let identity = coordinator.worker_identity("w");
    let good = register("w", Role::Decode, "127.0.0.1:9".parse().unwrap());
    let cases: [(Register, &str); 6] = [
        (
            Register {
                protocol_version: 99,
                ..good.clone()
            },
            "protocol version",
        ),
        (
            Register {
                worker_id: "a/b".into(),
                ..good.clone()
            },
            "worker id",
        ),
        (
            Register {
                model: "other".into(),
                ..good.clone()
            },
            "serves m",
        ),
        (
            Register {
                role: 77,
                ..good.clone()
            },
            "role",
        ),
        (
            Register {
                addr: "0.0.0.0:1".into(),
                ..good.clone()
            },
            "ip:port",
        ),
        (
            Register {
                kv_digest: vec![1].into(),
                ..good.clone()
            },
            "digest",
        ),
    ];
    for (register, part) in cases {
        let mut client = ClusterClient::new(channel(coordinator.cluster_addr, &identity).await.unwrap());
        let (reports, queued) = mpsc::channel(1);
        reports
            .send(report(worker_report::Kind::Register(register)))
            .await
            .unwrap();
        let mut orders = client.join(ReceiverStream::new(queued)).await.unwrap().into_inner();
        match orders.message().await.unwrap().unwrap().kind {
            Some(coordinator_order::Kind::Refused(refused)) => assert!(refused.reason.contains(part), "{refused:?}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(coordinator.cluster.store.workers().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_goodbye_is_taken_at_once_and_the_stream_closed() {
    let coordinator = Coordinator::start().await;
    let identity = coordinator.worker_identity("w");
    let mut client = ClusterClient::new(channel(coordinator.cluster_addr, &identity).await.unwrap());
    let (reports, queued) = mpsc::channel(2);
    let register = register("w", Role::Decode, "127.0.0.1:9".parse().unwrap());
    reports
        .send(report(worker_report::Kind::Register(register)))
        .await
        .unwrap();
    let mut orders = client.join(ReceiverStream::new(queued)).await.unwrap().into_inner();
    let first = orders.message().await.unwrap().unwrap().kind;
    assert!(matches!(first, Some(coordinator_order::Kind::Registered(_))));
    assert_eq!(coordinator.status("w").unwrap().state, WorkerState::Joining);
    let leaving = Leaving { reason: "test".into() };
    reports
        .send(report(worker_report::Kind::Leaving(leaving)))
        .await
        .unwrap();
    assert_eq!(orders.message().await.unwrap(), None);
    coordinator.wait_lost("w").await;
    until("removed", || coordinator.cluster.store.workers().unwrap().is_empty()).await;
}

/// A worker that has another model than the one deployed under its name is told so; one with the right one is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_another_revision_than_the_deployed_is_refused() {
    let coordinator = Coordinator::start().await;
    let deploy = async |revision: String| {
        let deployment = baton_proto::state::Deployment {
            model: super::MODEL.into(),
            revision,
            settings: String::new(),
        };
        let kind = baton_proto::state::command::Kind::PutDeployment(baton_proto::state::PutDeployment {
            deployment: Some(deployment),
        });
        coordinator
            .cluster
            .store
            .propose(crate::cluster::command(kind))
            .await
            .unwrap();
    };
    let identity = coordinator.worker_identity("w");
    let mut client = ClusterClient::new(channel(coordinator.cluster_addr, &identity).await.unwrap());
    let mut ask = async || {
        let (reports, queued) = mpsc::channel(2);
        let worker = register("w", Role::Combined, "127.0.0.1:9".parse().unwrap());
        reports
            .send(report(worker_report::Kind::Register(worker)))
            .await
            .unwrap();
        let mut orders = client.join(ReceiverStream::new(queued)).await.unwrap().into_inner();
        orders.message().await.unwrap().unwrap().kind.unwrap()
    };
    deploy(baton_ledger::hex(&[6; 32])).await;
    match ask().await {
        coordinator_order::Kind::Refused(refused) => {
            let offered = baton_ledger::hex(&super::MODEL_DIGEST);
            assert!(refused.reason.contains(&format!("--revision {offered}")), "{refused:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(coordinator.cluster.store.workers().unwrap().is_empty());
    for taken in [baton_ledger::hex(&super::MODEL_DIGEST), "a name".into()] {
        deploy(taken).await;
        let order = ask().await;
        assert!(matches!(order, coordinator_order::Kind::Registered(_)), "{order:?}");
    }
}
