//! Pushes over NIXL's library, where `BATON_NIXL_LIBRARY` names it; skipped, with a word, elsewhere. All on one host, over
//! whatever UCX chooses there (`UCX_TLS=tcp` makes it sockets). The other files of tests run over NIXL with
//! `BATON_KV_TEST_TRANSPORT=nixl`.
#![cfg(target_os = "linux")]
#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_kvtransfer::{
    AbortReason, Agent, FileMemory, Memory, PushError, Refusal, Region, TransportKind, TransportOptions, WindowError,
};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, within};
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 16 << 20;

const NIXL: TransportOptions = TransportOptions {
    shared_memory: false,
    tcp: false,
    nixl: true,
};

/// Two agents that have NIXL, if this machine does.
fn agents() -> Option<(Cluster, Agent, Agent)> {
    if std::env::var_os("BATON_NIXL_LIBRARY").is_none() {
        eprintln!("skipped: BATON_NIXL_LIBRARY does not name libnixl_capi.so");
        return None;
    }
    let cluster = Cluster::new();
    let (from, to) = (
        cluster.agent_over("prefill-0", NIXL),
        cluster.agent_over("decode-0", NIXL),
    );
    Some((cluster, from, to))
}

/// Pushes all of `source`, from the end, in pieces that do not merge.
async fn push(from: &Agent, to: &Agent, source: &Arc<Region>, target: impl Into<Memory>) -> TransportKind {
    let window = to.open_window(target, vec![0..source.len()]).unwrap();
    let push = from.push(to.local_addr(), window.id(), source.clone());
    for start in (0..source.len()).step_by(48 << 10).rev() {
        let end = (start + (48 << 10)).min(source.len());
        push.writer().write(start..end, start).unwrap();
    }
    let report = within(push.finish(Bytes::from_static(b"token"))).await.unwrap();
    assert_eq!(&within(window.wait()).await.unwrap()[..], b"token");
    report.transport
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_arrives() {
    let Some((cluster, from, to)) = agents() else { return };
    let mut total = 0;
    // Regions come and go, so what the peers know of each other's memory changes.
    for (round, len) in [LEN, 8, 4096, LEN + 8, (1 << 20) + 64, LEN].into_iter().enumerate() {
        let (source, target) = (filled(len, round as u64), Region::new(len).unwrap());
        assert_eq!(push(&from, &to, &source, &target).await, TransportKind::Nixl);
        assert!(image(&target) == image(&source), "round {round}");
        total += len as u64;
    }
    assert_eq!((from.stats().nixl_bytes_out, to.stats().nixl_bytes_in), (total, total));
    // Both ways, and into a file.
    let dir = tempfile::tempdir().unwrap();
    let file: Memory = FileMemory::open(&dir.path().join("blocks"), 1 << 20).unwrap().into();
    let source = filled(1 << 20, 77);
    assert_eq!(push(&to, &from, &source, file.clone()).await, TransportKind::Nixl);
    let mut got = vec![0; 1 << 20];
    assert!(file.copy_out(0, &mut got));
    assert!(got == image(&source));
    // A peer without it is reached as before; shared memory comes first where both have it.
    for (options, kind) in [
        (TransportOptions { nixl: false, ..NIXL }, TransportKind::Quic),
        (
            TransportOptions {
                shared_memory: true,
                ..NIXL
            },
            TransportKind::Nixl,
        ),
    ] {
        let other = cluster.agent_over("decode-1", options);
        let target = Region::new(source.len()).unwrap();
        assert_eq!(push(&from, &other, &source, &target).await, kind);
        assert!(image(&target) == image(&source));
    }
    let both = TransportOptions {
        shared_memory: true,
        ..NIXL
    };
    let (one, two) = (cluster.agent_over("a", both.clone()), cluster.agent_over("b", both));
    let target = Region::new(source.len()).unwrap();
    assert_eq!(push(&one, &two, &source, &target).await, TransportKind::SharedMemory);
}

/// Blocks are overwritten as soon as a push is given up, and read back as soon as a window is closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_fences_hold() {
    let Some((_cluster, from, to)) = agents() else { return };
    let (source, target) = (Region::new(LEN).unwrap(), Region::new(LEN).unwrap());
    assert_eq!(push(&from, &to, &source, &target).await, TransportKind::Nixl);
    let (mut completed, mut closed) = (0, 0);
    for round in 0..60u64 {
        let fill = vec![round as u8 + 1; LEN];
        assert!(source.copy_in(0, &fill) && target.copy_in(0, &vec![0; LEN]));
        let window = to.open_window(&target, vec![0..LEN]).unwrap();
        let push = from.push(to.local_addr(), window.id(), source.clone());
        for start in (0..LEN).step_by(32 << 10).rev() {
            push.writer().write(start..start + (32 << 10), start).unwrap();
        }
        let patience = Duration::from_millis(round);
        if round % 2 == 0 {
            // The receiver closes at some moment.
            let finishing = tokio::spawn(push.finish(Bytes::new()));
            tokio::time::sleep(patience).await;
            window.close();
            let fenced = image(&target);
            match within(finishing).await.unwrap() {
                Ok(_) => assert!(fenced == fill),
                Err(PushError::Refused(Refusal::WindowClosed | Refusal::UnknownWindow)) => closed += 1,
                Err(error) => panic!("{error}"),
            }
            assert!(image(&target) == fenced, "a byte landed after close");
        } else {
            // The sender gives up, after its window is claimed.
            let mut finishing = Box::pin(push.finish(Bytes::new()));
            let begun = tokio::time::timeout(Duration::from_millis(1) + patience, &mut finishing).await;
            drop(finishing);
            assert!(source.copy_in(0, &vec![0xff; LEN]));
            let received = tokio::time::timeout(Duration::from_secs(1), window.wait()).await;
            match received {
                Ok(Ok(_)) => {
                    completed += 1;
                    assert!(image(&target) == fill, "a block was read after it was given back");
                }
                Ok(Err(WindowError::Aborted(AbortReason::Dropped))) => {}
                Ok(Err(error)) => panic!("{error}"),
                // Given up before it had named the window.
                Err(_) => assert!(begun.is_err()),
            }
        }
    }
    eprintln!("{completed} completed, {closed} were closed in time");
    assert!(completed > 0 && closed > 0);
    eventually("nothing is left in flight", || from.stats().pushes_open == 0).await;
    // And the link still works.
    assert_eq!(push(&from, &to, &source, &target).await, TransportKind::Nixl);
}
