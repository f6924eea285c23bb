//! Admission before real links: who reaches a worker, in which order, and what the others are told.

use super::{Coordinator, MODEL, job, read, until};
use baton_gateway::{Backend, BackendError, Generation, Job, LatencyTargets, Share};
use baton_proto::cluster::Role;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::JoinHandle;

const PROMPT: [u32; 4] = [1, 2, 3, 4];

fn asks(name: &str, tenant: &str, priority: i32) -> Job {
    Job {
        request_id: name.into(),
        tenant: tenant.into(),
        share: Share::usual(tenant),
        priority,
        ..job(&PROMPT, 2)
    }
}

/// A coordinator with a worker on which one request waits for its first token, which is as many as may.
struct Busy {
    coordinator: Arc<Coordinator>,
    worker: super::fake_worker::FakeWorker,
    first: Generation,
}

impl Busy {
    async fn start(adjust: impl FnOnce(&mut crate::CoordinatorConfig)) -> Self {
        let coordinator = Coordinator::start_with(|config| {
            config.admission.worker_unstarted_max = 1;
            adjust(config);
        })
        .await;
        let worker = coordinator.stalling("w", Role::Combined, 0);
        coordinator.wait_ready("w").await;
        let first = coordinator.backend.generate(asks("first", "x", 0)).await.unwrap();
        Self {
            coordinator: Arc::new(coordinator),
            worker,
            first,
        }
    }

    /// Starts a request that has to wait, and sees it do so. It is read to its end once it is let in.
    async fn queue(&self, job: Job) -> JoinHandle<Result<(), BackendError>> {
        let before = self.coordinator.cluster.queued(MODEL);
        let coordinator = self.coordinator.clone();
        let task = tokio::spawn(async move {
            let mut generation = coordinator.backend.generate(job).await?;
            read(&mut generation, usize::MAX).await;
            Ok(())
        });
        until("it waits", || self.coordinator.cluster.queued(MODEL) > before).await;
        task
    }

    /// Names of the requests that reached the worker, in order.
    fn reached(&self) -> Vec<String> {
        let generates = self.worker.controls.generates.lock().unwrap();
        generates.iter().map(|generate| generate.request_id.clone()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_does_not_delay_another_tenant() {
    let mut busy = Busy::start(|_| {}).await;
    let mut tasks = Vec::new();
    for i in 0..20 {
        tasks.push(busy.queue(asks(&format!("flood-{i}"), "flood", 0)).await);
    }
    for i in 0..3 {
        tasks.push(busy.queue(asks(&format!("meek-{i}"), "meek", 0)).await);
    }
    busy.worker.controls.allow(-1);
    read(&mut busy.first, usize::MAX).await;
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let reached = busy.reached();
    assert_eq!(reached.len(), 24);
    for i in 0..3 {
        let name = format!("meek-{i}");
        let at = reached.iter().position(|n| *n == name).unwrap();
        let floods = reached[..at].iter().filter(|n| n.starts_with("flood")).count();
        assert!(floods <= i + 2, "{floods} of the flood went before {name}: {reached:?}");
    }
    assert_eq!(busy.coordinator.cluster.queued(MODEL), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn those_that_wait_are_served_by_their_weights() {
    let mut busy = Busy::start(|_| {}).await;
    let mut tasks = Vec::new();
    for i in 0..12 {
        for (name, weight) in [("three", 3), ("one", 1)] {
            let share = Share {
                weight,
                ..Share::usual(name)
            };
            let job = Job {
                share,
                // One tenant, as keys of one project are: each has its own share all the same.
                ..asks(&format!("{name}-{i}"), "project", 0)
            };
            tasks.push(busy.queue(job).await);
        }
    }
    busy.worker.controls.allow(-1);
    read(&mut busy.first, usize::MAX).await;
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let reached = busy.reached();
    let threes = reached[1..=12].iter().filter(|name| name.starts_with("three")).count();
    assert!(
        (8..=10).contains(&threes),
        "{threes} of twelve had three quarters: {reached:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn priority_orders_a_tenants_requests_and_goes_on_to_the_worker() {
    let mut busy = Busy::start(|config| config.admission.aging_ms = 60_000).await;
    let mut tasks = Vec::new();
    for (name, priority) in [("low", -5), ("usual", 0), ("high", 5)] {
        tasks.push(busy.queue(asks(name, "x", priority)).await);
    }
    busy.worker.controls.allow(-1);
    read(&mut busy.first, usize::MAX).await;
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(busy.reached(), ["first", "high", "usual", "low"]);
    let generates = busy.worker.controls.generates.lock().unwrap().clone();
    let priorities: Vec<i32> = generates.iter().map(|generate| generate.priority).collect();
    assert_eq!(priorities, [0, 5, 0, -5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_gives_its_place_back() {
    let busy = Busy::start(|config| config.admission.queue_max = 1).await;
    let waits = busy.queue(asks("waits", "x", 0)).await;
    let refused = busy.coordinator.backend.generate(asks("refused", "x", 0)).await;
    assert!(matches!(
        refused,
        Err(BackendError::Overloaded { word: "queue_full", .. })
    ));
    waits.abort();
    until("it has left", || busy.coordinator.cluster.queued(MODEL) == 0).await;
    let next = busy.queue(asks("next", "x", 0)).await;
    // The one on the worker hangs up: its place is the next one's, although the worker computes nothing.
    drop(busy.first);
    until("it is placed", || busy.coordinator.cluster.queued(MODEL) == 0).await;
    busy.worker.controls.allow(-1);
    next.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_lets_wait_for_a_while_and_then_says_so() {
    let busy = Busy::start(|config| {
        config.requests_per_worker_max = 1;
        config.admission.worker_unstarted_max = 9;
        config.admission.wait_ms_max = 200;
    })
    .await;
    let late = busy.coordinator.backend.generate(asks("late", "x", 0)).await;
    assert!(matches!(
        late,
        Err(BackendError::Overloaded {
            word: "wait_timeout",
            ..
        })
    ));
    assert_eq!(busy.coordinator.cluster.queued(MODEL), 0);
    let next = busy.queue(asks("next", "x", 0)).await;
    drop(busy.first);
    busy.worker.controls.allow(-1);
    next.await.unwrap().unwrap();
    let mut registry = prometheus_client::registry::Registry::default();
    busy.coordinator.backend.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "baton:admission_decisions_total{model_name=\"m\",tenant=\"x\",outcome=\"admitted\"} 2",
        "baton:admission_decisions_total{model_name=\"m\",tenant=\"x\",outcome=\"wait_timeout\"} 1",
        "baton:num_requests_queued{model_name=\"m\"} 0",
        "baton:request_queue_time_seconds_count{model_name=\"m\"} 2",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_meet_its_target_is_refused_before_it_reaches_a_worker() {
    let coordinator = Coordinator::start().await;
    let worker = coordinator.stalling("w", Role::Combined, -1);
    worker.controls.prefill_tokens_per_s.store(100, Ordering::SeqCst);
    worker.controls.decode_step_us.store(50_000, Ordering::SeqCst);
    coordinator.wait_ready("w").await;
    until("its speed is known", || {
        let registry = coordinator.cluster.registry();
        registry
            .workers(0)
            .all(|(worker, _)| worker.heartbeat.decode_step_us > 0)
    })
    .await;
    let wants = |ttft_ms: Option<u64>, itl_ms: Option<u64>| Job {
        targets: LatencyTargets {
            ttft: ttft_ms.map(Duration::from_millis),
            itl: itl_ms.map(Duration::from_millis),
        },
        ..job(&[1; 195], 2)
    };
    // 195 tokens at 100 per second and a step: two seconds.
    match coordinator.backend.generate(wants(Some(500), None)).await {
        Err(BackendError::Overloaded { word, retry_after, .. }) => {
            assert_eq!((word, retry_after), ("ttft_target", Duration::from_millis(1500)));
        }
        other => panic!("{:?}", other.err()),
    }
    match coordinator.backend.generate(wants(None, Some(20))).await {
        Err(BackendError::Overloaded { word, .. }) => assert_eq!(word, "itl_target"),
        other => panic!("{:?}", other.err()),
    }
    assert!(worker.controls.generates.lock().unwrap().is_empty());
    let mut met = coordinator.backend.generate(wants(Some(3000), Some(60))).await.unwrap();
    read(&mut met, usize::MAX).await;
}
