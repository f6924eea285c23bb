//! Blocks below a worker's pool draw the requests that begin with them, and the worker is told to read them while such a
//! request waits: on a busy worker, or in this coordinator's queue.

use super::routing::{names, prompt, stored};
use super::{Coordinator, MODEL, MODEL_DIGEST, job, read, until};
use baton_gateway::Backend;
use baton_proto::block_hash::{cache_root, chain, root, short};
use baton_proto::cluster::{BlockEvents, KvTiers, Role, Tier, TierUsage};
use baton_proto::worker::ReadAhead;
use std::sync::Arc;

fn at(tier: Tier, events: BlockEvents) -> BlockEvents {
    BlockEvents {
        tier: tier.into(),
        ..events
    }
}

/// The hint for a prompt all of whose blocks but the last, unfinished one are to be read.
fn hint_of(prompt: &[u32]) -> ReadAhead {
    let root_of = cache_root(&MODEL_DIGEST, b"salt");
    ReadAhead {
        parent: short(&root(&root_of)),
        names: chain(&root_of, &prompt[..prompt.len() - 1], 16).concat().into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_on_a_disk_draw_their_prompts_and_are_read_ahead_where_they_wait() {
    let coordinator = Coordinator::start().await;
    let (_a, b) = (coordinator.combined("a").await, coordinator.combined("b").await);
    let tell = |events| b.controls.events.lock().unwrap().push_back(events);
    let hints = || b.controls.hints.lock().unwrap().clone();
    // In the pool, then on disk too, then on disk alone.
    tell(stored(1, true, names(&prompt(1, 8))));
    tell(at(Tier::Disk, stored(2, false, names(&prompt(1, 8)))));
    tell(BlockEvents {
        number: 3,
        evicted: names(&prompt(1, 8)),
        ..BlockEvents::default()
    });
    tell(at(Tier::Disk, stored(4, false, names(&prompt(2, 8)))));
    until("b told", || coordinator.known() == 16).await;
    assert_eq!(coordinator.ask(&prompt(1, 8)).await, "b");
    assert_eq!(hints(), [], "an idle worker reads at once");

    b.controls.allow(0);
    let first = coordinator.backend.generate(job(&prompt(1, 8), 4)).await.unwrap();
    assert_eq!(first.placement().decode_worker_id, "b");
    let second = coordinator.backend.generate(job(&prompt(2, 8), 4)).await.unwrap();
    assert_eq!(second.placement().decode_worker_id, "b");
    // Before the request itself. The first may have been hinted at too, if the end of the one before was not heard of yet.
    let expected = (hint_of(&prompt(2, 8)), 2);
    until("a hint", || hints().last() == Some(&expected)).await;
    b.controls.allow(-1);
    drop((first, second));

    // Message 5 is lost: what is on the disk is no longer believed, and nobody is told to read it.
    tell(at(Tier::Disk, stored(6, false, names(&prompt(3, 8)))));
    until("nothing is believed", || coordinator.known() == 0).await;
    tell(at(Tier::Disk, stored(7, true, names(&prompt(3, 8)))));
    until("b told anew", || coordinator.known() == 8).await;
    assert_eq!(coordinator.ask(&prompt(3, 8)).await, "b");
    // Nor is it after a restart, before the worker has told.
    b.kill();
    coordinator.wait_lost("b").await;
    let again = coordinator.combined("b").await;
    assert_eq!(
        (coordinator.known(), coordinator.ask(&prompt(3, 8)).await),
        (0, "a".to_owned())
    );
    assert_eq!(again.controls.hints.lock().unwrap().len(), 0);
}

/// A coordinator with a worker that has a prompt on disk and takes one request at a time; the first runs, and the second, with
/// that prompt, waits in the queue.
async fn queue(read_ahead: bool) {
    let coordinator = Coordinator::start_with(|config| {
        config.admission.worker_unstarted_max = 1;
        config.read_ahead = read_ahead;
    })
    .await;
    let worker = coordinator.stalling("w", Role::Combined, 0);
    coordinator.wait_ready("w").await;
    let disk = TierUsage {
        blocks: 8,
        blocks_max: 100,
        ..TierUsage::default()
    };
    *worker.controls.kv_tiers.lock().unwrap() = Some(KvTiers {
        disk: Some(disk),
        ..KvTiers::default()
    });
    let told = at(Tier::Disk, stored(1, true, names(&prompt(1, 8))));
    worker.controls.events.lock().unwrap().push_back(told);
    until("it told", || {
        let status = coordinator.status("w").expect("it is there");
        coordinator.known() == 8 && status.kv_tiers.disk.is_some()
    })
    .await;
    let mut first = coordinator.backend.generate(job(&[1, 2, 3], 2)).await.unwrap();
    let coordinator = Arc::new(coordinator);
    let waiting = tokio::spawn({
        let coordinator = coordinator.clone();
        async move { coordinator.ask(&prompt(1, 8)).await }
    });
    until("it waits", || coordinator.cluster.queued(MODEL) == 1).await;
    let hints = || worker.controls.hints.lock().unwrap().clone();
    if read_ahead {
        until("a hint", || !hints().is_empty()).await;
        assert_eq!(worker.controls.generates.lock().unwrap().len(), 1, "it still waits");
    }
    worker.controls.allow(-1);
    read(&mut first, usize::MAX).await;
    assert_eq!(waiting.await.unwrap(), "w");
    let expected: Vec<_> = read_ahead.then(|| (hint_of(&prompt(1, 8)), 1)).into_iter().collect();
    assert_eq!(hints()[..expected.len()], expected);
    assert_eq!(hints().is_empty(), !read_ahead);

    let mut registry = prometheus_client::registry::Registry::default();
    coordinator.backend.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let counted = text.contains("baton:router_read_ahead_blocks_total 0");
    assert_eq!(counted, !read_ahead, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_request_has_its_blocks_read_meanwhile() {
    queue(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_read_ahead_nobody_is_told() {
    queue(false).await;
}
