//! Records, budgets, time and seals over the real store.

use super::fake_worker::CACHED;
use super::{Coordinator, MODEL, job, read, until};
use crate::accounts::Sealer;
use baton_gateway::{AccountStore, Backend, StoreError, command};
use baton_ledger::checkpoint;
use baton_proto::cluster::Role;
use baton_proto::state::command::Kind;
use baton_proto::state::{
    ApiKey, Budget, LeaseSlice, Member, Period, Posting, Price, Project, PutBudget, PutKey, PutPrice, PutProject,
    RevokeKey, Scope, UsageRecord, UsageStatus, ledger_row::Body,
};
use baton_state::Applied;
use baton_state::view::{self, Access};

async fn put(coordinator: &Coordinator, kind: Kind) -> Applied {
    coordinator.accounts.propose(command("test", kind)).await.unwrap()
}

async fn price(coordinator: &Coordinator) -> String {
    let price = Price {
        model: MODEL.into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        input_nano_per_mtok: 20_000_000_000,
        cached_input_nano_per_mtok: 2_000_000_000,
        output_nano_per_mtok: 80_000_000_000,
        ..Price::default()
    };
    match put(coordinator, Kind::PutPrice(PutPrice { price: Some(price) })).await {
        Applied::Priced { id } => id,
        other => panic!("{other:?}"),
    }
}

fn record(id: &str, price_id: String) -> UsageRecord {
    UsageRecord {
        request_id: id.into(),
        model: MODEL.into(),
        status: UsageStatus::Completed.into(),
        prompt_tokens: 100,
        completion_tokens: 10,
        sampled_tokens: 10,
        project_id: "p".into(),
        started_unix_ms: 1000,
        service_tier: "default".into(),
        price_id,
        ..UsageRecord::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_moved_names_its_workers_and_is_counted_once() {
    let coordinator = Coordinator::start().await;
    let first = coordinator.stalling("a", Role::Combined, 7);
    coordinator.wait_ready("a").await;
    let prompt = vec![3; 12];
    let mut generation = coordinator.backend.generate(job(&prompt, 20)).await.unwrap();
    let track = generation.track();
    read(&mut generation, 7).await;
    let second = coordinator.worker("b", Role::Combined);
    coordinator.wait_ready("b").await;
    let (lives_a, _) = (first.controls.epoch.load(std::sync::atomic::Ordering::SeqCst), ());
    first.kill();
    let (rest, finish) = read(&mut generation, usize::MAX).await;
    assert_eq!(rest.len(), 13);
    let finish = finish.unwrap();

    let (attempts, sampled) = track.attempts();
    let told: Vec<_> = attempts
        .iter()
        .map(|attempt| (attempt.decode_worker_id.as_str(), attempt.decode_epoch, attempt.tokens))
        .collect();
    let lives_b = second.controls.epoch.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(told, [("a", lives_a, 7), ("b", lives_b, 13)]);
    assert_eq!((sampled, finish.completion_tokens), (20, 20));
    // The prompt is the client's, and what was cached is what the first attempt found: the replay is none of its business.
    assert_eq!((finish.prompt_tokens, finish.cached_tokens), (12, CACHED.min(12)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sampler_that_miscounts_is_noticed_and_bills_nothing_more() {
    let coordinator = Coordinator::start().await;
    let worker = coordinator.worker("w", Role::Combined);
    coordinator.wait_ready("w").await;
    for (lies, noticed) in [(false, 0), (true, 1)] {
        worker
            .controls
            .miscounts
            .store(lies, std::sync::atomic::Ordering::SeqCst);
        let mut generation = coordinator.backend.generate(job(&[1, 2, 3], 5)).await.unwrap();
        let (tokens, finish) = read(&mut generation, usize::MAX).await;
        assert_eq!((tokens.len(), finish.unwrap().completion_tokens), (5, 5));
        assert_eq!(generation.track().attempts().1, 5);
        assert_eq!(coordinator.cluster.metrics.miscounts.get(), noticed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_a_budget_refuses_is_settled_without_charge() {
    let coordinator = Coordinator::start().await;
    let price_id = price(&coordinator).await;
    let project = Project {
        id: "p".into(),
        ..Project::default()
    };
    put(&coordinator, Kind::PutProject(PutProject { project: Some(project) })).await;
    let budget = Budget {
        id: "b".into(),
        project_id: "p".into(),
        currency: "USD".into(),
        limit_nano: 1_000_000_000,
        period: Period::Total.into(),
        hard: true,
        ..Budget::default()
    };
    put(&coordinator, Kind::PutBudget(PutBudget { budget: Some(budget) })).await;
    let slice = LeaseSlice {
        budget_id: "b".into(),
        slice_id: "s".into(),
        member_id: 1,
        want_nano: 5_000_000,
        expires_unix_ms: command("", Kind::Tick(Default::default())).at_unix_ms + 60_000,
    };
    let leased = put(&coordinator, Kind::LeaseSlice(slice.clone())).await;
    assert!(matches!(
        leased,
        Applied::Leased {
            granted_nano: 5_000_000,
            open_nano: 5_000_000,
            ..
        }
    ));

    let posting = |reserved_nano| Posting {
        budget_id: "b".into(),
        slice_id: "s".into(),
        reserved_nano,
    };
    let mut good = record("good", price_id.clone());
    good.postings = vec![posting(2_800_000)];
    coordinator.backend.settle(good).await.unwrap();
    // Enlarged again, the sum tells all of it.
    let leased = put(&coordinator, Kind::LeaseSlice(slice)).await;
    assert!(
        matches!(
            leased,
            Applied::Leased {
                granted_nano: 7_800_000,
                open_nano: 5_000_000,
                ..
            }
        ),
        "{leased:?}"
    );

    let mut beyond = record("beyond", price_id.clone());
    beyond.postings = vec![posting(1)];
    coordinator.backend.settle(beyond).await.unwrap();
    coordinator
        .backend
        .settle(record("wrong-price", "nonsense".into()))
        .await
        .unwrap();
    let mut stolen = record("two", price_id.clone());
    (stolen.idempotency_key_sha256, stolen.request_sha256) = (vec![1; 32].into(), vec![2; 32].into());
    coordinator.backend.settle(stolen.clone()).await.unwrap();
    // Another body under its key, which ran on another member at the same time: billed by itself.
    (stolen.request_id, stolen.request_sha256) = ("three".into(), vec![3; 32].into());
    coordinator.backend.settle(stolen.clone()).await.unwrap();
    // The same body: the same row.
    (stolen.request_id, stolen.request_sha256) = ("four".into(), vec![2; 32].into());
    coordinator.backend.settle(stolen).await.unwrap();

    let tables = coordinator.accounts.tables().unwrap();
    let rows = view::rows_after(&*tables, 0, 10).unwrap();
    let told: Vec<_> = rows
        .into_iter()
        .map(|row| {
            let charge = row.charge.unwrap();
            let Some(Body::Usage(record)) = row.body else {
                panic!("usage")
            };
            (
                record.request_id.clone(),
                record.status(),
                baton_ledger::charge::total(&charge),
            )
        })
        .collect();
    let expected = [
        ("good", UsageStatus::Completed, 2_800_000),
        ("beyond", UsageStatus::Expired, 0),
        ("wrong-price", UsageStatus::Expired, 0),
        ("two", UsageStatus::Completed, 2_800_000),
        ("three", UsageStatus::Completed, 2_800_000),
    ];
    assert_eq!(told, expected.map(|(id, status, nano)| (id.to_owned(), status, nano)));
    // What contradicts itself is a bug, and stays refused.
    let impossible = UsageRecord {
        sampled_tokens: 9,
        ..record("impossible", price_id)
    };
    assert!(coordinator.backend.settle(impossible).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn periods_are_signed_with_a_key_that_stays() {
    let coordinator = Coordinator::start().await;
    let seal = || coordinator.accounts.seal("operator");
    assert_eq!(seal().await.unwrap(), None);
    for id in ["r1", "r2"] {
        coordinator.backend.settle(record(id, String::new())).await.unwrap();
    }
    let first = seal().await.unwrap().expect("a checkpoint");
    assert_eq!((first.first_sequence, first.last_sequence), (1, 2));
    assert_eq!(seal().await.unwrap(), None);
    coordinator.backend.settle(record("r3", String::new())).await.unwrap();
    let second = seal().await.unwrap().expect("a checkpoint");
    checkpoint::verify_after(&first, None).unwrap();
    checkpoint::verify_after(&second, Some(&first)).unwrap();
    let tables = coordinator.accounts.tables().unwrap();
    let stored = view::checkpoints_after(&*tables, 0, 10).unwrap();
    assert_eq!(stored, [first.clone(), second]);
    let member = view::member(&*tables, 1).unwrap().expect("registered");
    assert_eq!(member.ledger_public_key, first.public_key);

    // The key is on disk, for its owner only, and read again.
    let data = coordinator.cluster.config.data_dir.clone();
    let again = Sealer::open(&data, Member::default()).unwrap();
    drop(again);
    let file = std::fs::metadata(data.join("ledger-key.p8")).unwrap();
    #[cfg(unix)]
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&file.permissions()) & 0o077, 0);
    std::fs::write(data.join("ledger-key.p8"), b"no key").unwrap();
    assert!(Sealer::open(&data, Member::default()).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_store_is_an_error_and_not_a_hang() {
    let coordinator = Coordinator::start().await;
    let accounts = coordinator.accounts.clone();
    let store = coordinator.cluster.store.clone();
    tokio::task::spawn_blocking(move || store.close()).await.unwrap();
    assert!(matches!(accounts.tables(), Err(StoreError::Unavailable(_))));
    let settled = coordinator.backend.settle(record("r", String::new())).await;
    assert!(settled.unwrap_err().to_string().contains("could not be committed"));
    until("nothing", || true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_member_administers_and_all_abide() {
    let group = Coordinator::start_group(|_| {}).await;
    let leads = super::group::leader(&group).await;
    let (second, third) = (&group[(leads + 1) % 3], &group[(leads + 2) % 3]);

    // A key made through a follower is known to all, and refused by all once another member has revoked it.
    let project = Project {
        id: "p".into(),
        ..Project::default()
    };
    put(second, Kind::PutProject(PutProject { project: Some(project) })).await;
    let key = ApiKey {
        id: "k".into(),
        sha256: vec![7; 32].into(),
        project_id: "p".into(),
        scopes: vec![Scope::Inference.into()],
        ..ApiKey::default()
    };
    put(second, Kind::PutKey(PutKey { key: Some(key) })).await;
    let access = |member: &Coordinator| view::access(&*member.accounts.tables().unwrap(), &[7; 32], 0).unwrap();
    for member in &group {
        until("the key is known", || matches!(access(member), Access::Granted { .. })).await;
    }
    put(third, Kind::RevokeKey(RevokeKey { id: "k".into() })).await;
    assert_eq!(access(third), Access::Revoked, "at once where it was revoked");
    for member in &group {
        until("the key is revoked", || access(member) == Access::Revoked).await;
    }

    // Members that ask at once for more of a hard budget than there is get what there is, together.
    let budget = Budget {
        id: "b".into(),
        project_id: "p".into(),
        currency: "USD".into(),
        limit_nano: 1000,
        period: Period::Total.into(),
        hard: true,
        ..Budget::default()
    };
    put(second, Kind::PutBudget(PutBudget { budget: Some(budget) })).await;
    let ask = |member: &Coordinator, id: u64| {
        let slice = LeaseSlice {
            budget_id: "b".into(),
            slice_id: format!("s{id}"),
            member_id: id,
            want_nano: 400,
            expires_unix_ms: command("", Kind::Tick(Default::default())).at_unix_ms + 60_000,
        };
        let accounts = member.accounts.clone();
        async move { accounts.propose(command("", Kind::LeaseSlice(slice))).await }
    };
    let (a, b, c) = tokio::join!(ask(&group[0], 1), ask(&group[1], 2), ask(&group[2], 3));
    let granted = [a, b, c].map(|leased| match leased.unwrap() {
        Applied::Leased { granted_nano, .. } => granted_nano,
        other => panic!("{other:?}"),
    });
    assert_eq!(granted.iter().sum::<u64>(), 1000, "{granted:?}");

    // Two that seal at once leave one chain over all rows.
    for (at, member) in group.iter().enumerate() {
        member
            .backend
            .settle(record(&format!("r{at}"), String::new()))
            .await
            .unwrap();
    }
    let (a, b) = tokio::join!(second.accounts.seal("a"), third.accounts.seal("b"));
    assert!(a.unwrap().is_some() | b.unwrap().is_some());
    second.accounts.seal("a").await.unwrap();
    let tables = second.accounts.tables().unwrap();
    let checkpoints = view::checkpoints_after(&*tables, 0, 10).unwrap();
    let mut before = None;
    for checkpoint in &checkpoints {
        checkpoint::verify_after(checkpoint, before).unwrap();
        before = Some(checkpoint);
    }
    assert_eq!(before.map(|last| last.last_sequence), Some(3));
}
