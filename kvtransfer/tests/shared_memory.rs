//! Everything again over shared memory, and what only shared memory can get wrong: who is let in is tested inside the
//! crate, beside the socket; here it is the memory.
#![cfg(target_os = "linux")]
#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant
#![allow(clippy::duplicate_mod)] // the files that are included are tests of their own, too

#[path = "failure.rs"]
mod failure;
#[path = "killed.rs"]
mod killed;
#[path = "transfer.rs"]
mod transfer;

mod common;

use baton_kvtransfer::{AbortReason, Region, TransportKind, TransportOptions, WindowError, WindowOptions};
use bytes::Bytes;
use common::{Cluster, eventually, filled, image, within};
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 8 << 20;

/// What the sender writes over its blocks after it has given a push up is read by a late copy at worst into a window
/// that fails; and what a finished push has delivered is what was there before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reused_blocks_never_reach_a_completed_window() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let source = Region::new(LEN).unwrap();
    let target = Region::new(LEN).unwrap();
    let mut completed = 0;
    // A push that is given up before it has named its window leaves it to expire: not what is tested, so the link is made.
    let window = to.open_window(&target, vec![0..LEN]).unwrap();
    let push = from.push(to.local_addr(), window.id(), source.clone());
    push.writer().write(0..8, 0).unwrap();
    within(push.finish(Bytes::new())).await.unwrap();
    drop(window);
    for round in 3..120u64 {
        let fill = vec![round as u8 + 1; LEN];
        assert!(source.copy_in(0, &fill));
        // A push that ends before it has named its window leaves the window waiting.
        let lifetime = Some(Duration::from_millis(200));
        let options = WindowOptions {
            bytes_max: None,
            lifetime,
        };
        let window = to.open_window_with(&target, vec![0..LEN], options).unwrap();
        let push = from.push(to.local_addr(), window.id(), source.clone());
        // Pieces that do not merge, so that there is something to interrupt.
        for start in (0..LEN).step_by(32 << 10).rev() {
            push.writer().write(start..start + (32 << 10), start).unwrap();
        }
        // Given up at some moment: before, within or after the copying, FINISH under way or not.
        let patience = Duration::from_micros(round * 40);
        let outcome = tokio::time::timeout(patience, push.finish(Bytes::new())).await;
        // The push is gone; the blocks are somebody else's.
        assert!(source.copy_in(0, &vec![0xff; LEN]));
        let received = within(window.wait()).await;
        if outcome.is_ok_and(|report| report.is_ok()) {
            assert!(received.is_ok());
        }
        match received {
            Ok(_) => {
                completed += 1;
                assert!(
                    image(&target) == fill,
                    "round {round}: a block was read after it was given back"
                );
            }
            Err(WindowError::Aborted(AbortReason::Dropped) | WindowError::Expired { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(completed > 0, "no push was given the time it takes");
    eventually("nothing is left in flight", || from.stats().pushes_open == 0).await;
}

/// Bytes are counted for the transport that moved them, and either side can decline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_side_can_decline() {
    let cluster = Cluster::new();
    for (sender, receiver) in [(true, true), (false, true), (true, false)] {
        let over = |shared_memory| TransportOptions {
            shared_memory,
            tcp: false,
            nixl: false,
        };
        let from = cluster.agent_over("prefill-0", over(sender));
        let to = cluster.agent_over("decode-0", over(receiver));
        let (source, target) = (filled(LEN, 9), Region::new(LEN).unwrap());
        let window = to.open_window(&target, vec![0..LEN]).unwrap();
        let push = from.push(to.local_addr(), window.id(), source.clone());
        push.writer().write(0..LEN, 0).unwrap();
        let report = within(push.finish(Bytes::new())).await.unwrap();
        let shared = sender && receiver;
        let (kind, bytes) = if shared {
            (TransportKind::SharedMemory, LEN as u64)
        } else {
            (TransportKind::Quic, 0)
        };
        assert_eq!(report.transport, kind);
        assert_eq!(
            (from.stats().bytes_out, from.stats().shared_memory_bytes_out),
            (LEN as u64, bytes)
        );
        assert_eq!(
            (to.stats().bytes_in, to.stats().shared_memory_bytes_in),
            (LEN as u64, bytes)
        );
        assert!(image(&target) == image(&source));
    }
}

/// A peer does not keep a region that its owner has freed: the memory file is unmapped on both sides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_freed_region_is_forgotten() {
    // Told apart from those of other tests by its size.
    const ODD: usize = (1 << 20) + (17 << 12);
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let size = |line: &str| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            Some(usize::from_str_radix(end, 16).ok()? - usize::from_str_radix(start, 16).ok()?)
        };
        maps.lines()
            .filter(|line| line.contains("memfd:baton-kv") && size(line) == Some(ODD))
            .count()
    };
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let target = Region::new(LEN).unwrap();
    // More than a link takes at once.
    for _ in 0..80 {
        let source: Arc<Region> = Region::new(ODD).unwrap();
        let window = to.open_window(&target, vec![0..64]).unwrap();
        let push = from.push(to.local_addr(), window.id(), source.clone());
        push.writer().write(0..64, 0).unwrap();
        let report = within(push.finish(Bytes::new())).await.unwrap();
        assert_eq!(report.transport, TransportKind::SharedMemory);
        assert_eq!(mapped(), 2, "once by its owner, once by the peer");
        drop(source);
        eventually("the region is unmapped", || mapped() == 0).await;
    }
}
