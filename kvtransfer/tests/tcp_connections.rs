//! What only the TCP transport has: a pool of connections, reasons that must not be lost with them, and silence.

#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_identity::Role;
use baton_kvtransfer::{AbortReason, Agent, Network, PushError, Region, TransferLimits, WindowError};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, limits, within};
use std::io::{Read, Write};
use std::time::Duration;

const LEN: usize = 1 << 20;

fn over_tcp() -> TransferLimits {
    TransferLimits {
        network: Network::Tcp,
        ..limits()
    }
}

fn agent(cluster: &Cluster, name: &str) -> Agent {
    cluster.agent_with(name, Role::Worker, [7; 32], over_tcp())
}

async fn push_whole(from: &Agent, to: &Agent, seed: u64) {
    let (source, target) = (filled(LEN, seed), Region::new(LEN).unwrap());
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(to.local_addr(), window.id(), source.clone());
    push.writer().write(0..LEN, 0).unwrap();
    within(push.finish(Bytes::new())).await.unwrap();
    within(window.wait()).await.unwrap();
    assert!(image(&target) == image(&source));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_one_after_another_share_a_connection_and_failed_ones_end_it() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    for seed in 0..5 {
        push_whole(&from, &to, seed).await;
        assert_eq!(to.stats().connections_in, 1);
    }
    // A pause longer than a ping's and shorter than a death's.
    tokio::time::sleep(Duration::from_millis(700)).await;
    push_whole(&from, &to, 5).await;
    assert_eq!(to.stats().connections_in, 1);
    let target = Region::new(LEN).unwrap();
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(to.local_addr(), window.id(), filled(LEN, 9));
    push.writer().write(0..64, 0).unwrap();
    eventually("bytes land", || window.landed() > 0).await;
    push.abort(AbortReason::Cancelled);
    assert_eq!(
        within(window.wait()).await,
        Err(WindowError::Aborted(AbortReason::Cancelled))
    );
    eventually("the connection ends", || to.stats().connections_in == 0).await;
    push_whole(&from, &to, 6).await;
}

/// The receiver's process goes and comes back on its address: the next push makes a new connection by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_receiver_is_reached_again() {
    let cluster = Cluster::new();
    let from = agent(&cluster, "prefill-0");
    let to = agent(&cluster, "decode-0");
    let addr = to.local_addr();
    push_whole(&from, &to, 1).await;
    within(to.close()).await;
    drop(to);
    let identity = cluster.identity(Role::Worker);
    let mut again = None;
    eventually("the address is free", || {
        again = Agent::bind(baton_kvtransfer::AgentConfig {
            name: "decode-0".into(),
            bind: addr,
            identity: &identity,
            digest: [7; 32],
            limits: over_tcp(),
        })
        .ok();
        again.is_some()
    })
    .await;
    push_whole(&from, &again.unwrap(), 2).await;
}

/// More pushes than connections may exist: the rest wait for one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_waited_for() {
    let cluster = Cluster::new();
    let few = TransferLimits {
        connections_max: 2,
        ..over_tcp()
    };
    let from = cluster.agent_with("prefill-0", Role::Worker, [7; 32], few);
    let receivers = [
        agent(&cluster, "decode-0"),
        agent(&cluster, "decode-1"),
        agent(&cluster, "decode-2"),
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 0..12 {
        let (from, to) = (from.clone(), receivers[seed as usize % 3].clone());
        tasks.spawn(async move { push_whole(&from, &to, seed).await });
    }
    within(async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    })
    .await;
    let open: u64 = receivers.iter().map(|agent| agent.stats().connections_in).sum();
    assert!(
        open <= 3,
        "{open} connections; one may not have been noticed to be closed yet"
    );
}

/// Computing takes longer than a peer may be silent: pings keep the push alive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_computation_is_not_silence() {
    let cluster = Cluster::new();
    let quick = TransferLimits {
        keep_alive: Duration::from_millis(50),
        idle_timeout: Duration::from_millis(400),
        ..over_tcp()
    };
    let from = cluster.agent_with("prefill-0", Role::Worker, [7; 32], quick.clone());
    let to = cluster.agent_with("decode-0", Role::Worker, [7; 32], quick);
    let target = Region::new(LEN).unwrap();
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(to.local_addr(), window.id(), filled(LEN, 3));
    push.writer().write(0..64, 0).unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    push.writer().write(64..128, 64).unwrap();
    within(push.finish(Bytes::from_static(b"late"))).await.unwrap();
    assert_eq!(within(window.wait()).await.unwrap(), "late");
}

/// A peer whose host is cut off, or whose process is stopped, says nothing and closes nothing. Here the connection runs
/// through a relay that stops relaying.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_ends_a_push_on_both_sides() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    let relay = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (addr, target_addr) = (relay.local_addr().unwrap(), to.local_addr());
    let (cut, mut is_cut) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        let (mut near, _) = relay.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(target_addr).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = is_cut.changed() => {}
        }
        // Both stay open and unread.
        tokio::time::sleep(common::HANG).await;
        drop((near, far));
    });
    let target = Region::new(LEN).unwrap();
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(addr, window.id(), filled(LEN, 3));
    push.writer().write(0..64, 0).unwrap();
    eventually("bytes land", || window.landed() > 0).await;
    cut.send(true).unwrap();
    let (sender, receiver) = within(async { tokio::join!(push.failed(), window.wait()) }).await;
    assert!(matches!(sender, PushError::PeerLost { .. }), "{sender:?}");
    assert!(matches!(receiver, Err(WindowError::PeerLost { .. })), "{receiver:?}");
}

/// Strangers on the port get nothing and cost nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn noise_on_the_port_does_no_harm() {
    let cluster = Cluster::new();
    let to = agent(&cluster, "decode-0");
    let addr = to.local_addr();
    let noise = tokio::task::spawn_blocking(move || {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0x16, 3, 1, 0xff, 0xff, 0, 0],
            &[0; 5000],
            &[],
        ] {
            let mut socket = std::net::TcpStream::connect(addr).unwrap();
            // It may be closed already.
            let _ = socket.write_all(bytes);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = socket.read_to_end(&mut answer);
            assert!(answer.len() < 100, "at most an alert comes back");
        }
    });
    within(noise).await.unwrap();
    assert_eq!(to.stats().connections_in, 0);
    push_whole(&agent(&cluster, "prefill-0"), &to, 1).await;
}
