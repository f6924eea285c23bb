//! How the QUIC transport spreads pushes over connections.

#![allow(clippy::single_range_in_vec_init)] // windows over one range are what is meant

mod common;

use baton_kvtransfer::Region;
use bytes::Bytes;
use common::{Cluster, eventually, filled, within};
use std::time::Duration;

const LEN: usize = 64 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quiet_pair_keeps_one_connection_and_a_busy_one_a_few() {
    let cluster = Cluster::new();
    let (from, to) = (cluster.agent("prefill-0"), cluster.agent("decode-0"));
    let source = filled(LEN, 1);
    let region = Region::new(16 * LEN).unwrap();
    let open = |at: usize| to.open_window(&region, vec![at * LEN..(at + 1) * LEN]).unwrap();
    for at in 0..4 {
        let window = open(at);
        let push = from.push(to.local_addr(), window.id(), source.clone());
        push.writer().write(0..LEN, at * LEN).unwrap();
        within(push.finish(Bytes::new())).await.unwrap();
        assert_eq!(to.stats().connections_in, 1);
        // A push is told of its end a moment before its lane gives the connection up.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Sixteen that are all under way at once.
    let windows: Vec<_> = (0..16).map(open).collect();
    let pushes: Vec<_> = windows
        .iter()
        .map(|window| from.push(to.local_addr(), window.id(), source.clone()))
        .collect();
    for (at, push) in pushes.iter().enumerate() {
        push.writer().write(0..LEN, at * LEN).unwrap();
    }
    let all_landed = || windows.iter().all(|window| window.landed() == LEN as u64);
    eventually("all of them land", all_landed).await;
    assert_eq!(to.stats().connections_in, 4);
    for push in pushes {
        within(push.finish(Bytes::new())).await.unwrap();
    }
}
