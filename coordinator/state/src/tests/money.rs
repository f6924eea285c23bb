//! Prices, budgets, slices and what is posted to them.

use super::invariants::check;
use super::{Bench, START, budget, cost, lease, posting, price, record, settle};
use crate::calendar::DAY_MS;
use crate::{Applied, Refused, SLICE_GRACE_MS, SLICE_LEASE_MS_MAX, Window, period_start, view};
use baton_proto::state::{Charge, Period, Price, PutPrice, ReturnSlice, UsageRecord, UsageStatus, command::Kind};

fn give_back(slice_id: &str) -> Kind {
    Kind::ReturnSlice(ReturnSlice {
        budget_id: "b".into(),
        slice_id: slice_id.into(),
    })
}

fn window(bench: &Bench, period: Period) -> Window {
    let start = period_start(period, bench.now_ms);
    view::window(&bench.tables, "b", start).unwrap().unwrap_or_default()
}

fn leased(bench: &mut Bench, slice: &str, want: u64, ms: u64) -> u64 {
    let expires = bench.now_ms + ms;
    match bench.run(lease("b", slice, want, expires)) {
        Ok(Applied::Leased { open_nano, .. }) => open_nano,
        other => panic!("{other:?}"),
    }
}

fn charge(bench: &Bench, request: &str) -> Charge {
    let row = view::usage_row(&bench.tables, request).unwrap().unwrap();
    row.charge.unwrap()
}

#[test]
fn the_later_start_wins_then_the_later_entry() {
    let mut bench = Bench::new();
    let find = |bench: &Bench, model: &str, tier: &str, at: u64| {
        let price = view::price_at(&bench.tables, model, tier, at).unwrap();
        price.map(|price| price.input_nano_per_mtok / 1_000_000_000)
    };
    assert_eq!(find(&bench, "other", "", START), None);
    bench.run(price("*", "default", 7, 0)).unwrap();
    bench.run(price("m", "batch", 12, 50)).unwrap();
    bench.run(price("m", "default", 30, 100)).unwrap();
    bench.run(price("m", "default", 31, 100)).unwrap();
    let Kind::PutPrice(PutPrice { price: Some(short) }) = price("m", "default", 40, 200) else {
        panic!()
    };
    let short = Price {
        effective_to_unix_ms: 210,
        ..short
    };
    bench
        .run(Kind::PutPrice(PutPrice {
            price: Some(short.clone()),
        }))
        .unwrap();
    for (model, tier, at, expected) in [
        ("m", "default", 99, 20),
        ("m", "", 100, 31),
        ("m", "priority", 199, 31),
        ("m", "default", 200, 40),
        ("m", "default", 209, 40),
        ("m", "default", 210, 31),
        // Half, until somebody says otherwise.
        ("m", "batch", 49, 10),
        ("m", "batch", 200, 12),
        ("other", "batch", 200, 3),
        // A model whose name begins with another's has its own prices.
        ("mm", "default", 200, 7),
    ] {
        assert_eq!(find(&bench, model, tier, at), Some(expected), "{model} {tier} {at}");
    }
    // The same price again is the same price.
    let before = bench.contents();
    assert_eq!(
        bench.run(price("m", "default", 31, 100)),
        bench.run(price("m", "default", 31, 100))
    );
    assert_eq!(bench.contents(), before);
    for bad in [
        Price {
            currency: "usd".into(),
            ..short.clone()
        },
        Price {
            service_tier: "flex".into(),
            ..short.clone()
        },
        Price {
            effective_to_unix_ms: 200,
            ..short.clone()
        },
        Price {
            id: "mine".into(),
            ..short.clone()
        },
        Price {
            output_nano_per_mtok: u64::MAX,
            ..short
        },
    ] {
        assert!(matches!(
            bench.refuses(Kind::PutPrice(PutPrice { price: Some(bad) })),
            Refused::Invalid(_)
        ));
    }
}

#[test]
fn a_pinned_price_stands() {
    let mut bench = Bench::new();
    let pinned = view::price_at(&bench.tables, "m", "", START).unwrap().unwrap().id;
    bench.run(price("m", "default", 50, START - 5)).unwrap();
    bench.run(settle(record("new", 1))).unwrap();
    let mut old = record("old", 1);
    old.price_id.clone_from(&pinned);
    bench.run(settle(old.clone())).unwrap();
    assert_eq!(charge(&bench, "old").price_id, pinned);
    assert_eq!(charge(&bench, "old").output_nano, 80_000);
    assert_eq!(charge(&bench, "new").output_nano, 200_000);
    old.request_id = "other".into();
    old.model = "another".into();
    assert!(matches!(bench.refuses(settle(old.clone())), Refused::WrongPrice { .. }));
    old.price_id.clear();
    bench.run(settle(old)).unwrap();
    assert_eq!(charge(&bench, "other"), Charge::default());
    check(&bench.tables);
}

#[test]
fn a_hard_budget_is_never_overrun() {
    let mut bench = Bench::new();
    bench.run(budget("b", 1_000_000, true, Period::Total)).unwrap();
    assert_eq!(leased(&mut bench, "s1", 600_000, 1000), 600_000);
    // Less is given where less is there.
    assert_eq!(leased(&mut bench, "s2", 600_000, 1000), 400_000);
    let refused = bench.refuses(lease("b", "s3", 1, START + 1000));
    assert!(matches!(refused, Refused::BudgetExhausted { .. }));
    // Prolonging needs nothing free.
    assert_eq!(leased(&mut bench, "s1", 600_000, 2000), 600_000);
    let with = |id: &str, tokens, slice: &str, reserved| UsageRecord {
        postings: vec![posting("b", slice, reserved)],
        ..record(id, tokens)
    };
    bench.run(settle(with("a", 2, "s1", 500_000))).unwrap();
    let now = window(&bench, Period::Total);
    assert_eq!(
        (now.posted_nano, now.open_nano),
        (cost(2).into(), u128::from(1_000_000 - cost(2)))
    );
    // More than reserved, or than the slice has, is the gateway's mistake.
    for wrong in [with("x", 2, "s1", cost(2) - 1), with("x", 3, "s1", 900_000)] {
        assert!(matches!(
            bench.refuses(settle(wrong)),
            Refused::BeyondReservation { .. }
        ));
    }
    assert_eq!(bench.run(give_back("s2")), Ok(Applied::Returned { nano: 400_000 }));
    assert_eq!(bench.run(give_back("s2")), Ok(Applied::Returned { nano: 0 }));
    // The slice is over: its money may be someone else's, so the record is free.
    bench.run(settle(with("late", 1, "s2", 400_000))).unwrap();
    let late = view::usage(&bench.tables, "late").unwrap().unwrap().record;
    assert_eq!((late.status(), late.completion_tokens), (UsageStatus::Expired, 1));
    assert_eq!(charge(&bench, "late").output_nano, 0);
    // The same record again is the same record, though it is kept with another status.
    assert_eq!(
        bench.run(settle(with("late", 1, "s2", 400_000))),
        Ok(Applied::Settled { sequence: 2 })
    );
    let refused = bench.refuses(budget("b", 500_000, true, Period::Total));
    assert!(matches!(
        refused,
        Refused::LimitBelowSpent {
            least_nano: 600_000,
            ..
        }
    ));
    bench.run(budget("b", 600_000, true, Period::Total)).unwrap();
    bench.refuses(lease("b", "s3", 1, START + 1000));
    check(&bench.tables);
}

#[test]
fn a_slice_expires_after_its_grace() {
    let mut bench = Bench::new();
    bench.run(budget("b", 1_000_000, true, Period::Total)).unwrap();
    leased(&mut bench, "s", 900_000, 1000);
    bench.tick(1000 + SLICE_GRACE_MS - 1);
    let mut used = record("in-grace", 1);
    used.postings = vec![posting("b", "s", 900_000)];
    bench.run(settle(used.clone())).unwrap();
    assert_eq!(window(&bench, Period::Total).posted_nano, cost(1).into());
    bench.tick(1);
    let now = window(&bench, Period::Total);
    assert_eq!((now.open_nano, now.expired_nano), (0, u128::from(900_000 - cost(1))));
    assert_eq!(now.reserved_nano, now.posted_nano + now.expired_nano);
    used.request_id = "late".into();
    bench.run(settle(used)).unwrap();
    assert_eq!(
        view::usage(&bench.tables, "late").unwrap().unwrap().record.status(),
        UsageStatus::Expired
    );
    assert_eq!(leased(&mut bench, "s", 900_000, 1000), 1_000_000 - cost(1));
    check(&bench.tables);
}

#[test]
fn periods_have_their_own_money() {
    let mut bench = Bench::new();
    bench.run(budget("b", 1_000_000, true, Period::Day)).unwrap();
    bench.tick(DAY_MS - 1000);
    leased(&mut bench, "s", 1_000_000, 60_000);
    bench.tick(1000);
    assert!(matches!(
        bench.refuses(lease("b", "s", 1, bench.now_ms + 1)),
        Refused::PeriodOver { .. }
    ));
    assert_eq!(leased(&mut bench, "t", 1_000_000, 60_000), 1_000_000);
    // What was reserved yesterday is posted to yesterday.
    let mut used = record("r", 1);
    used.postings = vec![posting("b", "s", 900_000)];
    bench.run(settle(used)).unwrap();
    assert_eq!(window(&bench, Period::Day).posted_nano, 0);
    let yesterday = view::window(&bench.tables, "b", START).unwrap().unwrap();
    assert_eq!(yesterday.posted_nano, cost(1).into());
    check(&bench.tables);
}

#[test]
fn a_soft_budget_counts_and_never_refuses() {
    let mut bench = Bench::new();
    bench.run(budget("b", 100, false, Period::Month)).unwrap();
    assert_eq!(leased(&mut bench, "s", 1_000, 1000), 1_000);
    let mut used = record("r", 1);
    used.postings = vec![posting("b", "s", 1_000)];
    bench.run(settle(used.clone())).unwrap();
    bench.run(give_back("s")).unwrap();
    used.request_id = "late".into();
    bench.run(settle(used)).unwrap();
    let now = window(&bench, Period::Month);
    assert_eq!(
        (now.posted_nano, now.reserved_nano, now.open_nano),
        ((2 * cost(1)).into(), (2 * cost(1)).into(), 0)
    );
    assert_eq!(
        view::usage(&bench.tables, "late").unwrap().unwrap().record.status(),
        UsageStatus::Completed
    );
    // It cannot become hard below what is spent.
    assert!(matches!(
        bench.refuses(budget("b", 100, true, Period::Month)),
        Refused::LimitBelowSpent { .. }
    ));
    bench.run(budget("b", 2 * cost(1), true, Period::Month)).unwrap();
    check(&bench.tables);
}

#[test]
fn leases_are_bounded() {
    let mut bench = Bench::new();
    bench.run(budget("b", 1_000_000, true, Period::Total)).unwrap();
    assert!(matches!(bench.refuses(lease("b", "s", 1, START)), Refused::Invalid(_)));
    assert!(matches!(
        bench.refuses(lease("b", "s", 0, START + 1)),
        Refused::Invalid(_)
    ));
    assert!(matches!(
        bench.refuses(lease("none", "s", 1, START + 1)),
        Refused::Unknown { .. }
    ));
    let forever = bench.run(lease("b", "s", 1, u64::MAX));
    assert!(
        matches!(forever, Ok(Applied::Leased { expires_unix_ms, .. }) if expires_unix_ms == START + SLICE_LEASE_MS_MAX)
    );
    let Kind::LeaseSlice(mut other) = lease("b", "s", 1, START + 1) else {
        panic!()
    };
    other.member_id = 2;
    assert!(matches!(
        bench.refuses(Kind::LeaseSlice(other)),
        Refused::SliceOfOther { member_id: 1, .. }
    ));
    for i in 1..64 {
        leased(&mut bench, &format!("s{i}"), 1, 1000);
    }
    assert!(matches!(
        bench.refuses(lease("b", "more", 1, START + 1)),
        Refused::TooMany { max: 64, .. }
    ));
    assert_eq!(view::slices_after(&bench.tables, "b", "", 1000).unwrap().len(), 64);
    // They are cleared away a few at a time, by whatever comes.
    bench.tick(SLICE_LEASE_MS_MAX + SLICE_GRACE_MS);
    for _ in 0..16 {
        bench.tick(1);
    }
    assert!(view::slices_after(&bench.tables, "b", "", 1000).unwrap().is_empty());
    check(&bench.tables);
    for i in 0..7 {
        bench.run(budget(&format!("b{i}"), 1, true, Period::Total)).unwrap();
    }
    assert!(matches!(
        bench.refuses(budget("b9", 1, true, Period::Total)),
        Refused::TooMany { max: 8, .. }
    ));
    assert_eq!(view::budgets_of(&bench.tables, "p", "").unwrap().len(), 8);
    assert!(view::budgets_of(&bench.tables, "p", "k").unwrap().is_empty());
    assert!(matches!(
        bench.refuses(budget("b", 1_000_000, true, Period::Day)),
        Refused::Fixed {
            field: "the period",
            ..
        }
    ));
}

/// What is over does not depend on how far the clearing is.
#[test]
fn a_slice_that_waits_to_be_cleared_is_over() {
    let mut bench = Bench::new();
    bench.run(budget("b", 6_000_000, true, Period::Total)).unwrap();
    for i in 0..6 {
        leased(&mut bench, &format!("s{i}"), 1_000_000, 1000);
    }
    bench.now_ms += 1000 + SLICE_GRACE_MS;
    let mut used = record("r", 1);
    used.postings = vec![posting("b", "s5", 900_000)];
    bench.run(settle(used)).unwrap();
    assert!(view::slice(&bench.tables, "b", "s5").unwrap().is_some());
    assert_eq!(
        view::usage(&bench.tables, "r").unwrap().unwrap().record.status(),
        UsageStatus::Expired
    );
    check(&bench.tables);
}
