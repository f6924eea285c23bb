//! What only the TCP transport has: a pool of connections, reasons that must not be lost with them, and silence.

#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_identity::Role;
use baton_kvtransfer::{
    AbortReason, Agent, PushError, Region, TransferLimits, TransportKind, TransportOptions, WindowError,
};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, limits, transports, within};
use std::io::{Read, Write};
use std::time::Duration;
use tokio::net::UdpSocket;

const LEN: usize = 1 << 20;

fn agent(cluster: &Cluster, name: &str) -> Agent {
    cluster.agent(name)
}

/// The QUIC session, which is there beside the TCP connections.
const SESSION: u64 = 1;

async fn push_whole(from: &Agent, to: &Agent, seed: u64) -> TransportKind {
    let (source, target) = (filled(LEN, seed), Region::new(LEN).unwrap());
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(to.local_addr(), window.id(), source.clone());
    push.writer().write(0..LEN, 0).unwrap();
    let report = within(push.finish(Bytes::new())).await.unwrap();
    within(window.wait()).await.unwrap();
    assert!(image(&target) == image(&source));
    report.transport
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_one_after_another_share_a_connection_and_failed_ones_end_it() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    for seed in 0..5 {
        assert_eq!(push_whole(&from, &to, seed).await, TransportKind::Tcp);
        assert_eq!(to.stats().connections_in, SESSION + 1);
    }
    // A pause longer than a ping's and shorter than a death's.
    tokio::time::sleep(Duration::from_millis(700)).await;
    push_whole(&from, &to, 5).await;
    assert_eq!(to.stats().connections_in, SESSION + 1);
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
    eventually("the connection ends", || to.stats().connections_in == SESSION).await;
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
            limits: limits(),
            transports: transports(),
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
        connections_max: 3,
        ..limits()
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
        tasks.spawn(async move { assert_eq!(push_whole(&from, &to, seed).await, TransportKind::Tcp) });
    }
    within(async {
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    })
    .await;
    let open: u64 = receivers.iter().map(|agent| agent.stats().connections_in).sum();
    assert!(
        open <= 3 * SESSION + 4,
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
        ..limits()
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

/// A relay of TCP and UDP on one port, each cut on its own: both ends stay open and hear nothing more.
struct Relay {
    addr: std::net::SocketAddr,
    tcp: tokio::sync::watch::Sender<bool>,
    udp: tokio::sync::watch::Sender<bool>,
}

impl Relay {
    /// Takes TCP only if `takes_tcp`.
    async fn start(to: std::net::SocketAddr, takes_tcp: bool) -> Self {
        let (listener, socket) = loop {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
                break (listener, socket);
            }
        };
        let addr = socket.local_addr().unwrap();
        let (tcp, mut tcp_cut) = tokio::sync::watch::channel(false);
        let (udp, udp_cut) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            if !takes_tcp {
                return;
            }
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                _ = tcp_cut.changed() => {}
            }
            tokio::time::sleep(common::HANG).await;
            drop((near, far, listener));
        });
        tokio::spawn(async move {
            let far = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            far.connect(to).await.unwrap();
            let (mut there, mut back, mut client) = (vec![0; 1 << 16], vec![0; 1 << 16], None);
            loop {
                let cut = || *udp_cut.borrow();
                tokio::select! {
                    got = socket.recv_from(&mut there) => {
                        let (len, from) = got.unwrap();
                        client = Some(from);
                        if !cut() {
                            far.send(&there[..len]).await.unwrap();
                        }
                    }
                    got = far.recv(&mut back) => {
                        let wanted = client.filter(|_| !cut());
                        if let (Ok(len), Some(client)) = (got, wanted) {
                            socket.send_to(&back[..len], client).await.unwrap();
                        }
                    }
                }
            }
        });
        Self { addr, tcp, udp }
    }
}

/// A peer whose host is cut off, or whose process is stopped, says nothing and closes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_ends_a_push_on_both_sides() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    let relay = Relay::start(to.local_addr(), true).await;
    let target = Region::new(LEN).unwrap();
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(relay.addr, window.id(), filled(LEN, 3));
    push.writer().write(0..64, 0).unwrap();
    eventually("bytes land", || window.landed() > 0).await;
    relay.tcp.send(true).unwrap();
    relay.udp.send(true).unwrap();
    let (sender, receiver) = within(async { tokio::join!(push.failed(), window.wait()) }).await;
    assert!(matches!(sender, PushError::PeerLost { .. }), "{sender:?}");
    assert!(matches!(receiver, Err(WindowError::PeerLost { .. })), "{receiver:?}");
}

/// A connection that breaks costs a lane: the push goes on over QUIC and delivers every byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_does_not_break_the_push() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    let relay = Relay::start(to.local_addr(), true).await;
    let (source, target) = (filled(LEN, 4), Region::new(LEN).unwrap());
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(relay.addr, window.id(), source.clone());
    push.writer().write(0..LEN / 2, 0).unwrap();
    eventually("bytes land", || window.landed() > 0).await;
    relay.tcp.send(true).unwrap();
    push.writer().write(LEN / 2..LEN, LEN / 2).unwrap();
    let report = within(push.finish(Bytes::from_static(b"all"))).await.unwrap();
    assert_eq!((report.bytes, report.transport), (LEN as u64, TransportKind::Quic));
    assert_eq!(within(window.wait()).await.unwrap(), "all");
    assert!(image(&target) == image(&source));
    assert_eq!(from.stats().lanes_broken, 1);
}

/// A path that does not let TCP through costs one push some time; every push gets there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_path_for_tcp_pushes_go_over_quic() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    let relay = Relay::start(to.local_addr(), false).await;
    for seed in 0..3 {
        let (source, target) = (filled(LEN, seed), Region::new(LEN).unwrap());
        let window = to.open_window(&target, vec![0..LEN]).unwrap();
        let push = from.push(relay.addr, window.id(), source.clone());
        push.writer().write(0..LEN, 0).unwrap();
        let report = within(push.finish(Bytes::new())).await.unwrap();
        assert_eq!(report.transport, TransportKind::Quic);
        assert!(image(&target) == image(&source));
    }
    assert_eq!(from.stats().lanes_broken, 0);
}

/// Either side can do without TCP, and shared memory goes before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_best_transport_of_both_sides_is_taken() {
    let cluster = Cluster::new();
    let options = |shared_memory, tcp| TransportOptions {
        shared_memory,
        tcp,
        nixl: false,
    };
    for (sender, receiver, kind) in [
        ((false, true), (false, true), TransportKind::Tcp),
        ((false, true), (false, false), TransportKind::Quic),
        ((false, false), (false, true), TransportKind::Quic),
        ((true, true), (false, true), TransportKind::Tcp),
        #[cfg(target_os = "linux")]
        ((true, true), (true, true), TransportKind::SharedMemory),
    ] {
        let from = cluster.agent_over("prefill-0", options(sender.0, sender.1));
        let to = cluster.agent_over("decode-0", options(receiver.0, receiver.1));
        assert_eq!(push_whole(&from, &to, 8).await, kind);
    }
}

/// The next push's first bytes come right behind the end of the last one, often in one read: none may be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_follow_each_other_on_a_connection_without_a_pause() {
    let cluster = Cluster::new();
    let (from, to) = (agent(&cluster, "prefill-0"), agent(&cluster, "decode-0"));
    let (source, target) = (filled(LEN, 2), Region::new(LEN).unwrap());
    const PIECE: usize = 1 << 10;
    let windows: Vec<_> = (0..LEN)
        .step_by(PIECE)
        .map(|start| to.open_window(&target, vec![start..start + PIECE]).unwrap())
        .collect();
    for (at, window) in windows.iter().enumerate() {
        let push = from.push(to.local_addr(), window.id(), source.clone());
        push.writer().write(at * PIECE..(at + 1) * PIECE, at * PIECE).unwrap();
        let report = within(push.finish(Bytes::new())).await.unwrap();
        assert_eq!(report.transport, TransportKind::Tcp);
    }
    assert!(image(&target) == image(&source));
    assert_eq!(from.stats().lanes_broken, 0);
    // A push may start before the last one's connection is back in the pool.
    let connections = to.stats().connections_in;
    assert!(
        (SESSION + 1..SESSION + 4).contains(&connections),
        "{connections} connections"
    );
}

/// Several lanes of one push, each on a connection, which all carry lanes of the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_of_a_push_share_the_work_and_their_connections_are_kept() {
    const MUCH: usize = 16 << 20;
    let cluster = Cluster::new();
    let many = TransferLimits {
        lanes_per_push: 4,
        ..limits()
    };
    let from = cluster.agent_with("prefill-0", Role::Worker, [7; 32], many);
    let to = agent(&cluster, "decode-0");
    for seed in 0..10 {
        let (source, target) = (filled(MUCH, seed), Region::new(MUCH).unwrap());
        let window = to.open_window(&target, vec![0..MUCH]).unwrap();
        let push = from.push(to.local_addr(), window.id(), source.clone());
        for start in (0..MUCH).step_by(64 << 10).rev() {
            push.writer().write(start..start + (64 << 10), start).unwrap();
        }
        let report = within(push.finish(Bytes::new())).await.unwrap();
        assert_eq!((report.bytes, report.transport), (MUCH as u64, TransportKind::Tcp));
        within(window.wait()).await.unwrap();
        assert!(image(&target) == image(&source));
        assert!(to.stats().connections_in <= SESSION + 8);
    }
    assert!(to.stats().connections_in > SESSION + 1, "one lane did it all");
    assert_eq!((from.stats().lanes_broken, to.stats().refusals), (0, 0));
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
