//! Random commands against a model of the rules that a page holds, with every invariant checked after every step. More
//! cases: `PROPTEST_CASES=10000 cargo test -p baton-state --release model`.

mod rules;
mod steps;

use super::ledger::member;
use super::{Bench, START, invariants};
use crate::view;
use baton_ledger::checkpoint::SigningKey;
use baton_proto::state::{Tick, UsageStatus, command::Kind};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use rules::Model;
use std::collections::BTreeSet;
use steps::{BUDGETS, Step, command, later, step};

/// The name of an answer.
fn name(answer: &impl std::fmt::Debug) -> String {
    let text = format!("{answer:?}");
    text.split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn agree(bench: &Bench, model: &Model) {
    for ((budget, start), window) in &model.windows {
        let found = view::window(&bench.tables, BUDGETS[*budget].0, *start)
            .unwrap()
            .unwrap();
        let amounts = [
            found.posted_nano,
            found.voided_nano,
            found.expired_nano,
            found.open_nano,
        ];
        let open = model.open(*budget, *start);
        assert_eq!(
            amounts,
            [window.posted, window.voided, window.expired, open].map(u128::from)
        );
        assert_eq!((found.limit_nano, found.hard), (window.limit, window.hard));
    }
    assert_eq!(view::settled(&bench.tables).unwrap(), model.rows);
    let votes = view::worker(&bench.tables, "w").unwrap().map(|worker| worker.lost_by);
    assert_eq!(
        votes,
        model.worker.as_ref().map(|votes| votes.iter().copied().collect())
    );
}

/// Plays the steps; tells the names of all answers.
fn play(steps: &[Step], checked: bool) -> (Bench, BTreeSet<String>) {
    let mut met = BTreeSet::new();
    let mut bench = Bench::new();
    bench.run(member(1, &SigningKey::from_seed(&[1; 32]))).unwrap();
    let mut model = Model {
        now: START,
        ..Model::default()
    };
    model.prices[0].push((0, 0, 20));
    let mut last: Option<(Step, Kind)> = None;
    for step in steps {
        if let Step::Tick(at) = step {
            model.now = later(model.now, *at);
            bench.now_ms = model.now;
        }
        let again = matches!(step, Step::Again);
        let (step, kind) = match last.take().filter(|_| again) {
            Some(last) => last,
            None if again => continue,
            None => (step.clone(), command(&bench, &model, step)),
        };
        let mut idle = bench.clone();
        idle.run(Kind::Tick(Tick {})).unwrap();
        let expected = model.apply(&step, &kind);
        let outcome = bench.run(kind.clone());
        met.insert(match &outcome {
            Ok(applied) => name(applied),
            Err(refused) => name(refused),
        });
        match (&outcome, &expected) {
            (Ok(answer), Ok(Some(expected))) => assert_eq!(answer, expected, "{step:?}"),
            (Ok(_), Ok(None)) => {}
            (Err(refused), Err(expected)) => {
                assert_eq!(name(refused), *expected, "{step:?}");
                assert_eq!(
                    bench.contents(),
                    idle.contents(),
                    "{step:?} was refused and changed something"
                );
            }
            _ => panic!("{step:?}: {outcome:?}, expected {expected:?}"),
        }
        // A lease may find more free the second time.
        if again && !matches!(step, Step::Register(0) | Step::Lease { .. } | Step::Release { .. }) {
            assert_eq!(
                bench.contents(),
                idle.contents(),
                "{step:?} was repeated and changed something"
            );
        }
        agree(&bench, &model);
        if checked {
            invariants::check(&bench.tables);
        }
        last = Some((step, kind));
    }
    let rows = view::usage_after(&bench.tables, 0, 1000).unwrap();
    if rows
        .iter()
        .any(|settled| settled.record.status() == UsageStatus::Expired)
    {
        met.insert("Expired".to_owned());
    }
    (bench, met)
}

/// `PROPTEST_CASES` counts only where it is not overruled.
fn config() -> ProptestConfig {
    let config = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() {
        config.cases
    } else {
        96
    };
    ProptestConfig { cases, ..config }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_machine_is_the_model(steps in prop::collection::vec(step(), 1..90)) {
        let (first, _) = play(&steps, true);
        // Two runs are equal to the byte.
        prop_assert_eq!(first.tables, play(&steps, false).0.tables);
    }
}

/// The random commands reach every rule: else the test above shows little.
#[test]
fn every_answer_is_met() {
    let mut runner = TestRunner::deterministic();
    let mut met = BTreeSet::new();
    for _ in 0..400 {
        let steps = prop::collection::vec(step(), 90)
            .new_tree(&mut runner)
            .unwrap()
            .current();
        met.extend(play(&steps, false).1);
    }
    for answer in [
        "Registered",
        "Removed",
        "Settled",
        "Stands",
        "Priced",
        "Leased",
        "Returned",
        "Corrected",
        "Closed",
        "Sealed",
        "Ticked",
        "Claimed",
        "IdempotencyInUse",
        "Invalid",
        "UsageConflict",
        "Impossible",
        "Unknown",
        "Fixed",
        "KeyRevoked",
        "KeyHashTaken",
        "IdempotencyConflict",
        "BudgetExhausted",
        "LimitBelowSpent",
        "SliceOfOther",
        "PeriodOver",
        "BeyondReservation",
        "CorrectionConflict",
        "BelowZero",
        "NothingToClose",
        "NotNext",
        "BadSignature",
        "Expired",
    ] {
        assert!(met.contains(answer), "{answer} was never met, only {met:?}");
    }
}
