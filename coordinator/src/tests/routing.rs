//! Requests go where their prefix is: by what workers tell, and by what was placed a moment ago.

use super::fake_worker::FakeWorker;
use super::{Coordinator, MODEL_DIGEST, job, read, until};
use baton_gateway::Backend;
use baton_proto::block_hash::{cache_root, chain, short};
use baton_proto::cluster::{BlockEvents, BlockRun, Role};
use std::sync::atomic::Ordering;

/// Some turns of a conversation: `turns` blocks of 16 tokens and one token more.
pub(super) fn prompt(session: u32, turns: u32) -> Vec<u32> {
    (0..turns * 16 + 1).map(|i| session * 1000 + i).collect()
}

pub(super) fn names(prompt: &[u32]) -> Vec<u64> {
    let full = &prompt[..prompt.len() - 1];
    let chain = chain(&cache_root(&MODEL_DIGEST, b"salt"), full, 16);
    chain.iter().map(short).collect()
}

pub(super) fn stored(number: u64, reset: bool, names: Vec<u64>) -> BlockEvents {
    BlockEvents {
        number,
        reset,
        stored: vec![BlockRun { parent: 0, names }],
        ..BlockEvents::default()
    }
}

impl Coordinator {
    pub(super) async fn combined(&self, id: &str) -> FakeWorker {
        let identity = self.worker_identity(id);
        let worker = FakeWorker::start(id, Role::Combined, self.cluster_addr, identity);
        self.wait_ready(id).await;
        worker
    }

    /// Runs a request to its end; answers with the worker that streamed it.
    pub(super) async fn ask(&self, prompt: &[u32]) -> String {
        let mut generation = self.backend.generate(job(prompt, 2)).await.unwrap();
        read(&mut generation, usize::MAX).await;
        generation.placement().decode_worker_id.clone()
    }

    pub(super) fn known(&self) -> u64 {
        self.cluster.routing().stats().index.pairs
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_stays_where_it_began_before_any_event() {
    let coordinator = Coordinator::start().await;
    let _workers = [coordinator.combined("a").await, coordinator.combined("b").await];
    // Ties go to "a"; keep it busy so that the first turn goes to "b".
    let busy = coordinator.backend.generate(job(&prompt(9, 20), 400)).await.unwrap();
    assert_eq!(busy.placement().decode_worker_id, "a");
    let first = coordinator.backend.generate(job(&prompt(1, 8), 400)).await.unwrap();
    assert_eq!(first.placement().decode_worker_id, "b");
    drop((busy, first));
    until("both are idle", || {
        coordinator
            .cluster
            .registry()
            .workers(0)
            .all(|(worker, _)| worker.assigned == 0)
    })
    .await;
    for turns in 8..12 {
        assert_eq!(coordinator.ask(&prompt(1, turns)).await, "b", "{turns} turns");
    }
    assert_eq!(coordinator.ask(&prompt(2, 8)).await, "a", "another conversation");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_where_their_blocks_are_until_events_are_lost() {
    let coordinator = Coordinator::start().await;
    let (_a, b) = (coordinator.combined("a").await, coordinator.combined("b").await);
    assert_eq!(coordinator.ask(&prompt(1, 8)).await, "a");
    let tell = |events| b.controls.events.lock().unwrap().push_back(events);

    tell(stored(1, true, names(&prompt(2, 8))));
    until("b told", || coordinator.known() == 8).await;
    assert_eq!(coordinator.ask(&prompt(2, 8)).await, "b");
    // Another tenant's cache is another's.
    let mut other = job(&prompt(2, 8), 1);
    other.cache_salt = b"other".to_vec();
    let generation = coordinator.backend.generate(other).await.unwrap();
    assert_eq!(generation.placement().decode_worker_id, "a");

    // Message 2 is lost: nothing of b is believed until it has told everything.
    tell(stored(3, false, names(&prompt(3, 8))));
    until("a resync", || b.controls.resyncs.load(Ordering::SeqCst) == 1).await;
    assert_eq!(coordinator.known(), 0);
    assert_eq!(coordinator.ask(&prompt(3, 8)).await, "a");
    tell(stored(4, true, [names(&prompt(4, 8)), names(&prompt(5, 8))].concat()));
    until("b told anew", || coordinator.known() == 16).await;
    assert_eq!(coordinator.ask(&prompt(5, 8)).await, "b");

    // Evicted blocks are not looked for there.
    tell(BlockEvents {
        number: 5,
        evicted: names(&prompt(4, 8)),
        ..BlockEvents::default()
    });
    until("evicted", || coordinator.known() == 8).await;
    assert_eq!(coordinator.ask(&prompt(4, 8)).await, "a");
    assert_eq!(b.controls.resyncs.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_worker_is_cold() {
    let coordinator = Coordinator::start().await;
    let (_a, b) = (coordinator.combined("a").await, coordinator.combined("b").await);
    b.controls
        .events
        .lock()
        .unwrap()
        .push_back(stored(1, true, names(&prompt(1, 8))));
    until("b told", || coordinator.known() == 8).await;
    assert_eq!(coordinator.ask(&prompt(1, 7)).await, "b");
    b.kill();
    coordinator.wait_lost("b").await;
    assert_eq!(coordinator.known(), 0);
    let again = coordinator.combined("b").await;
    let stats = coordinator.cluster.routing().stats();
    assert_eq!((stats.workers, stats.cold), (2, 2));
    assert_eq!(coordinator.ask(&prompt(1, 8)).await, "a");
    // An event that does not begin a telling says nothing.
    again
        .controls
        .events
        .lock()
        .unwrap()
        .push_back(stored(1, false, names(&prompt(2, 8))));
    until("a resync", || again.controls.resyncs.load(Ordering::SeqCst) == 1).await;
    assert_eq!(coordinator.known(), 0);

    let mut registry = prometheus_client::registry::Registry::default();
    coordinator.backend.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "baton:router_resyncs_total 1",
        "baton:router_cold_workers 2",
        "baton:router_index_pairs 0",
        "baton:router_decision_seconds_count 2",
        "baton:router_ttft_error_seconds_count 2",
        // 7 blocks on b; the fake worker says that it found 3 tokens, and the same for what was cold.
        "baton:router_predicted_cached_tokens_total 112",
        "baton:router_measured_cached_tokens_total 6",
        "baton:router_missed_cached_tokens_total 109",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}
