//! Everything that can go wrong between two agents: each ends in a typed error on both sides, in bounded time, and no
//! byte lands behind a fence.

#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_identity::Role;
use baton_kvtransfer::{
    AbortReason, Agent, PushError, Refusal, Region, SetupError, TransferLimits, Window, WindowError, WindowOptions,
};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, limits, within};
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 1 << 20;

fn window(agent: &Agent) -> (Arc<Region>, Window) {
    let region = Region::new(LEN).unwrap();
    let window = agent.open_window(&region, vec![0..LEN]).unwrap();
    (region, window)
}

/// What a finished push to window `id` at `to` ends with.
async fn push_error(from: &Agent, to: &Agent, id: u64) -> PushError {
    let push = from.push(to.local_addr(), id, filled(64, 1));
    // A failure may already show here.
    let _ = push.writer().write(0..64, 0);
    within(push.finish(Bytes::new())).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_a_window_fences_and_tells_the_sender() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let region = Region::new(LEN).unwrap();
    // A fast transport would come to the usual bound before the window is closed.
    let options = WindowOptions {
        bytes_max: Some(u64::MAX),
        lifetime: None,
    };
    let window = to.open_window_with(&region, vec![0..LEN], options).unwrap();
    let push = from.push(to.local_addr(), window.id(), filled(LEN, 5));
    let writer = push.writer();
    // A writer that never stops, as a prefill that has not heard yet.
    let endless = std::thread::spawn(move || {
        loop {
            for start in (0..LEN).step_by(4096) {
                if let Err(error) = writer.write(start..start + 4096, start) {
                    return error;
                }
            }
            std::thread::yield_now();
        }
    });
    eventually("bytes land", || window.landed() > 0).await;
    window.close();
    let fenced = image(&region);
    let refused = PushError::Refused(Refusal::WindowClosed);
    assert_eq!(within(push.failed()).await, refused);
    let seen_by_writer = endless.join().unwrap();
    // A queue that filled up before the news came is as good an end for the writer.
    assert!(seen_by_writer == refused || matches!(seen_by_writer, PushError::QueueFull { .. }));
    assert_eq!(within(push.finish(Bytes::new())).await.unwrap_err(), refused);
    assert_eq!(within(window.wait()).await, Err(WindowError::Closed));
    assert!(image(&region) == fenced, "a byte landed after close");
    drop(window);
    // The blocks are free again: a new window over them, filled by a new push, is untouched by the old one.
    let reopened = to.open_window(&region, vec![0..LEN]).unwrap();
    let source = filled(LEN, 6);
    let push = from.push(to.local_addr(), reopened.id(), source.clone());
    push.writer().write(0..LEN, 0).unwrap();
    within(push.finish(Bytes::new())).await.unwrap();
    assert!(image(&region) == image(&source));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_gives_up_fails_the_window_at_once() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    for (reason, expected) in [
        (None, AbortReason::Dropped),
        (Some(AbortReason::ComputeFailed), AbortReason::ComputeFailed),
    ] {
        let (_region, window) = window(&to);
        let push = from.push(to.local_addr(), window.id(), filled(LEN, 5));
        let writer = push.writer();
        writer.write(0..LEN / 2, 0).unwrap();
        eventually("bytes land", || window.landed() > 0).await;
        match reason {
            None => drop(push),
            Some(reason) => push.abort(reason),
        }
        assert_eq!(writer.write(0..64, 0), Err(PushError::Aborted(expected)));
        assert_eq!(within(window.wait()).await, Err(WindowError::Aborted(expected)));
    }
    // A second push into a window in use is refused and does the first no harm.
    let (_region, window) = window(&to);
    let push = from.push(to.local_addr(), window.id(), filled(LEN, 5));
    let second = from.push(to.local_addr(), window.id(), filled(LEN, 5));
    push.writer().write(0..64, 0).unwrap();
    eventually("bytes land", || window.landed() > 0).await;
    assert_eq!(
        within(second.finish(Bytes::new())).await,
        Err(PushError::Refused(Refusal::WindowTaken))
    );
    drop(push);
    assert!(within(window.wait()).await.is_err());
    eventually("nothing is left in flight", || from.stats().pushes_open == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_breakers_are_refused_with_the_reason() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    assert_eq!(
        push_error(&from, &to, 12345).await,
        PushError::Refused(Refusal::UnknownWindow)
    );
    let region = Region::new(LEN).unwrap();
    let narrow = to.open_window(&region, vec![4096..8192]).unwrap();
    let refusal = Refusal::OutOfRange { offset: 0, len: 64 };
    assert_eq!(push_error(&from, &to, narrow.id()).await, PushError::Refused(refusal));
    assert_eq!(within(narrow.wait()).await, Err(WindowError::Refused(refusal)));
    let options = WindowOptions {
        bytes_max: Some(32),
        lifetime: None,
    };
    let small = to.open_window_with(&region, vec![0..64], options).unwrap();
    assert_eq!(
        push_error(&from, &to, small.id()).await,
        PushError::Refused(Refusal::TooManyBytes { max: 32 })
    );
    assert!(image(&region).iter().all(|&byte| byte == 0));
    assert_eq!(to.stats().refusals, 3);
    assert_eq!(
        push_error(&from, &to, small.id()).await,
        PushError::Refused(Refusal::WindowTaken),
        "a failed window takes no second push"
    );
}

#[tokio::test]
async fn an_unfilled_window_expires() {
    let cluster = Cluster::new();
    let to = cluster.agent("decode-0");
    let region = Region::new(LEN).unwrap();
    let lifetime = Duration::from_millis(20);
    let options = WindowOptions {
        bytes_max: None,
        lifetime: Some(lifetime),
    };
    let window = to.open_window_with(&region, vec![0..64], options).unwrap();
    assert_eq!(within(window.wait()).await, Err(WindowError::Expired { lifetime }));
    assert_eq!(
        push_error(&cluster.agent("late"), &to, window.id()).await,
        PushError::Refused(Refusal::WindowTaken)
    );
}

#[tokio::test]
async fn different_digests_are_refused_with_both_values() {
    let cluster = Cluster::new();
    let from = cluster.agent_with("prefill-0", Role::Worker, [0xab; 32], limits());
    let to = cluster.agent_with("decode-0", Role::Worker, [0xcd; 32], limits());
    let (_region, window) = window(&to);
    let error = push_error(&from, &to, window.id()).await;
    let PushError::Incompatible { peer, mismatch } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(*peer, to.local_addr());
    for part in ["prefill-0", "abababab", "decode-0", "cdcdcdcd"] {
        assert!(mismatch.contains(part), "{mismatch}");
    }
    assert_eq!(to.stats().connections_in, 0);
}

#[tokio::test]
async fn another_clusters_agent_and_another_role_are_refused() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let to = ours.agent("decode-0");
    let (_region, open) = window(&to);
    let stranger = theirs.agent("stranger");
    let error = push_error(&stranger, &to, open.id()).await;
    assert!(matches!(error, PushError::Identity { .. }), "{error:?}");
    let error = push_error(&to, &stranger, 1).await;
    assert!(matches!(error, PushError::Identity { .. }), "{error:?}");
    for role in [Role::Coordinator, Role::Admin] {
        let other = ours.agent_with("not-a-worker", role, [7; 32], limits());
        let error = push_error(&other, &to, open.id()).await;
        assert!(
            matches!(error, PushError::Identity { .. }),
            "{role:?} as a client: {error:?}"
        );
        let error = push_error(&to, &other, 1).await;
        assert!(
            matches!(error, PushError::Identity { .. }),
            "{role:?} as a server: {error:?}"
        );
    }
    assert_eq!(open.landed(), 0);
    // And nothing of this has hurt the agent.
    let friend = ours.agent("prefill-0");
    let push = friend.push(to.local_addr(), open.id(), filled(64, 1));
    push.writer().write(0..64, 0).unwrap();
    within(push.finish(Bytes::new())).await.unwrap();
}

#[tokio::test]
async fn nobody_at_the_address_is_an_error_for_all_pushes_at_once() {
    let cluster = Cluster::new();
    let from = cluster.agent("prefill-0");
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let peer = silent.local_addr().unwrap();
    let pushes: Vec<_> = (0..50)
        .map(|_| from.push(peer, 1, filled(64, 1)).finish(Bytes::new()))
        .collect();
    let outcome = async {
        for push in pushes {
            assert!(matches!(push.await, Err(PushError::Unreachable { .. })));
        }
    };
    within(outcome).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_an_agent_ends_everything_on_both_sides() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let (_region, receiving) = window(&to);
    let (_other, waiting) = window(&to);
    let push = from.push(to.local_addr(), receiving.id(), filled(LEN, 5));
    push.writer().write(0..64, 0).unwrap();
    eventually("bytes land", || receiving.landed() > 0).await;
    within(to.close()).await;
    assert_eq!(within(receiving.wait()).await, Err(WindowError::AgentClosed));
    assert_eq!(within(waiting.wait()).await, Err(WindowError::AgentClosed));
    assert!(matches!(
        within(push.failed()).await,
        PushError::PeerLost { .. } | PushError::Refused(_)
    ));
    let region = Region::new(64).unwrap();
    assert!(matches!(
        to.open_window(&region, vec![0..64]),
        Err(SetupError::AgentClosed)
    ));

    // The other way round: the sender's agent goes.
    let to = cluster.agent("decode-1");
    let (_region, receiving) = window(&to);
    let push = from.push(to.local_addr(), receiving.id(), filled(LEN, 5));
    push.writer().write(0..64, 0).unwrap();
    eventually("bytes land", || receiving.landed() > 0).await;
    drop(from);
    assert!(
        matches!(within(receiving.wait()).await, Err(WindowError::PeerLost { peer, .. }) if peer.contains("prefill-0"))
    );
    assert_eq!(within(push.failed()).await, PushError::AgentClosed);
}

/// A process that dies says nothing. Its runtime is stopped here, so its sockets fall silent without a goodbye.
#[test]
fn a_silent_death_is_found_on_both_sides() {
    let cluster = Cluster::new();
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    for sender_dies in [true, false] {
        let (sending, receiving) = (runtime(), runtime());
        let from = sending.block_on(async { cluster.agent("prefill-0") });
        let to = receiving.block_on(async { cluster.agent("decode-0") });
        let (_region, window) = window(&to);
        let push = from.push(to.local_addr(), window.id(), filled(LEN, 5));
        push.writer().write(0..64, 0).unwrap();
        receiving.block_on(eventually("bytes land", || window.landed() > 0));
        if sender_dies {
            sending.shutdown_background();
            let error = receiving.block_on(within(window.wait())).unwrap_err();
            assert!(matches!(error, WindowError::PeerLost { .. }), "{error:?}");
            // A push handed to a dead runtime fails instead of hanging.
            let late = from.push(to.local_addr(), 1, filled(64, 1));
            assert_eq!(late.error(), Some(PushError::AgentClosed));
        } else {
            receiving.shutdown_background();
            let error = sending.block_on(within(push.failed()));
            assert!(matches!(error, PushError::PeerLost { .. }), "{error:?}");
        }
    }
}

#[tokio::test]
async fn limits_hold() {
    let cluster = Cluster::new();
    let limits = TransferLimits {
        windows_max: 1,
        pushes_max: 1,
        ..limits()
    };
    let agent = cluster.agent_with("small", Role::Worker, [7; 32], limits);
    let (region, _open) = window(&agent);
    let other = Region::new(64).unwrap();
    assert!(matches!(
        agent.open_window(&other, vec![0..64]),
        Err(SetupError::Windows { max: 1 })
    ));
    let peer = cluster.agent("peer");
    let first = agent.push(peer.local_addr(), 1, region.clone());
    let second = agent.push(peer.local_addr(), 1, region.clone());
    assert_eq!(second.error(), Some(PushError::TooManyPushes { max: 1 }));
    drop(first);
    assert!(
        Agent::bind(baton_kvtransfer::AgentConfig {
            name: "x".repeat(65),
            bind: "127.0.0.1:0".parse().unwrap(),
            identity: &cluster.identity(Role::Worker),
            digest: [7; 32],
            limits: TransferLimits::default(),
        })
        .is_err()
    );
    let taken = Agent::bind(baton_kvtransfer::AgentConfig {
        name: "x".into(),
        bind: agent.local_addr(),
        identity: &cluster.identity(Role::Worker),
        digest: [7; 32],
        limits: TransferLimits::default(),
    });
    assert!(matches!(taken, Err(SetupError::Bind { .. })));
}
