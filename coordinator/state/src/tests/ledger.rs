//! Rows: witnesses, repeats, idempotency keys, corrections, periods.

use super::invariants::check;
use super::{Bench, cost, record, settle};
use crate::{Applied, Fault, IDEMPOTENCY_MS, Refused, view};
use baton_ledger::checkpoint::SigningKey;
use baton_proto::state::{
    Attempt, ClosePeriod, CorrectUsage, Correction, Member, PutMember, SealPeriod, UsageRecord, UsageStatus,
    command::Kind,
};

fn correct(id: &str, completion_tokens: i64, output_nano: i64) -> Correction {
    Correction {
        request_id: "r".into(),
        sequence: 1,
        completion_tokens,
        output_nano,
        reason: "counted twice".into(),
        correction_id: id.into(),
        ..Correction::default()
    }
}

fn correction(correction: Correction) -> Kind {
    Kind::CorrectUsage(CorrectUsage {
        correction: Some(correction),
    })
}

fn close(after_sequence: u64) -> Kind {
    Kind::ClosePeriod(ClosePeriod { after_sequence })
}

/// What a member proposes: it reads the closed period, sets the time of its command, signs.
pub(crate) fn seal(bench: &Bench, key: &SigningKey) -> Kind {
    let mut period = view::closed_period(&bench.tables).unwrap().unwrap_or_default();
    period.at_unix_ms = bench.now_ms;
    key.sign(&mut period);
    Kind::SealPeriod(SealPeriod {
        last_sequence: period.last_sequence,
        public_key: period.public_key,
        signature: period.signature,
    })
}

pub(crate) fn member(id: u64, key: &SigningKey) -> Kind {
    let member = Member {
        id,
        ledger_public_key: key.public_key().to_vec().into(),
        ..Member::default()
    };
    Kind::PutMember(PutMember { member: Some(member) })
}

#[test]
fn one_row_per_request() {
    let mut bench = Bench::new();
    for id in ["r", "s", "t"] {
        bench.run(settle(record(id, 3))).unwrap();
    }
    let before = bench.contents();
    assert_eq!(bench.run(settle(record("s", 3))), Ok(Applied::Settled { sequence: 2 }));
    assert_eq!(bench.contents(), before);
    let refused = bench.refuses(settle(record("s", 4)));
    assert!(matches!(refused, Refused::UsageConflict { sequence: 2, .. }));
    let feed = view::rows_after(&bench.tables, 1, 10).unwrap();
    assert_eq!(feed.iter().map(|row| row.sequence).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(feed[0].charge.as_ref().unwrap().output_nano + 200_000, cost(3));
    assert_eq!(
        view::usage_after(&bench.tables, 2, 10).unwrap()[0].record.request_id,
        "t"
    );
    check(&bench.tables);
}

#[test]
fn keys_keep_the_order_of_numbers() {
    let mut bench = Bench::new();
    for i in 0..300 {
        bench.run(settle(record(&format!("r{i}"), 1))).unwrap();
    }
    assert_eq!(view::settled(&bench.tables).unwrap(), 300);
    let page = view::rows_after(&bench.tables, 254, 3).unwrap();
    assert_eq!(page.iter().map(|row| row.sequence).collect::<Vec<_>>(), [255, 256, 257]);
    check(&bench.tables);
}

#[test]
fn witnesses_must_agree() {
    let mut bench = Bench::new();
    let good = UsageRecord {
        cached_tokens: 10,
        completion_tokens: 5,
        sampled_tokens: 6,
        reasoning_tokens: 5,
        accepted_prediction_tokens: 5,
        rejected_prediction_tokens: 50,
        attempts: 2,
        attempt_list: vec![
            Attempt {
                tokens: 3,
                ..Attempt::default()
            };
            2
        ],
        ..record("r", 5)
    };
    type Change = fn(&mut UsageRecord);
    let wrong: [(Change, Fault); 7] = [
        (
            |r| r.completion_tokens = 7,
            Fault::DeliveredBeyondSampled {
                delivered: 7,
                sampled: 6,
            },
        ),
        (
            |r| r.cached_tokens = 11,
            Fault::CachedBeyondPrompt { cached: 11, prompt: 10 },
        ),
        (
            |r| r.reasoning_tokens = 6,
            Fault::PartBeyondCompletion {
                what: "reasoning",
                part: 6,
                completion: 5,
            },
        ),
        (
            |r| r.accepted_prediction_tokens = 6,
            Fault::PartBeyondCompletion {
                what: "accepted prediction",
                part: 6,
                completion: 5,
            },
        ),
        (
            |r| r.attempt_list[0].tokens = 4,
            Fault::AttemptsBeyondSampled {
                attempts: 7,
                sampled: 6,
            },
        ),
        (|r| r.attempts = 1, Fault::AttemptsBeyondCount { listed: 2, counted: 1 }),
        (|r| r.status = 6, Fault::UnknownStatus(6)),
    ];
    for (change, fault) in wrong {
        let mut record = good.clone();
        change(&mut record);
        let request_id = "r".to_owned();
        assert_eq!(bench.refuses(settle(record)), Refused::Impossible { request_id, fault });
    }
    let unknown = UsageRecord {
        status: UsageStatus::Unspecified.into(),
        ..good.clone()
    };
    assert!(matches!(bench.refuses(settle(unknown)), Refused::Impossible { .. }));
    bench.run(settle(good)).unwrap();
    check(&bench.tables);
}

#[test]
fn an_idempotency_key_is_one_request_for_a_day() {
    let mut bench = Bench::new();
    let with = |id: &str, key: &str, body: u8| UsageRecord {
        key_id: key.into(),
        idempotency_key_sha256: vec![9; 32].into(),
        request_sha256: vec![body; 32].into(),
        ..record(id, 1)
    };
    assert_eq!(
        bench.run(settle(with("r", "k", 1))),
        Ok(Applied::Settled { sequence: 1 })
    );
    // The client asked again elsewhere: it pays once.
    assert_eq!(
        bench.run(settle(with("s", "k", 1))),
        Ok(Applied::Settled { sequence: 1 })
    );
    assert!(view::usage(&bench.tables, "s").unwrap().is_none());
    let refused = bench.refuses(settle(with("t", "k", 2)));
    assert_eq!(refused, Refused::IdempotencyConflict { request_id: "r".into() });
    // Another client's key is another key.
    assert_eq!(
        bench.run(settle(with("u", "k2", 2))),
        Ok(Applied::Settled { sequence: 2 })
    );
    bench.tick(IDEMPOTENCY_MS - 1);
    assert_eq!(
        view::idempotency(&bench.tables, "k", &[9; 32])
            .unwrap()
            .unwrap()
            .request_id,
        "r"
    );
    bench.tick(1);
    assert_eq!(view::idempotency(&bench.tables, "k", &[9; 32]).unwrap(), None);
    assert_eq!(
        bench.run(settle(with("t", "k", 2))),
        Ok(Applied::Settled { sequence: 3 })
    );
    let short = UsageRecord {
        request_sha256: vec![1; 31].into(),
        ..with("v", "k", 1)
    };
    assert!(matches!(bench.refuses(settle(short)), Refused::Invalid(_)));
    check(&bench.tables);
}

#[test]
fn corrections_are_rows_and_never_go_below_zero() {
    let mut bench = Bench::new();
    bench.run(settle(record("r", 5))).unwrap();
    assert_eq!(
        bench.run(correction(correct("c", -2, -160_000))),
        Ok(Applied::Corrected { sequence: 2 })
    );
    let before = bench.contents();
    assert_eq!(
        bench.run(correction(correct("c", -2, -160_000))),
        Ok(Applied::Corrected { sequence: 2 })
    );
    assert_eq!(bench.contents(), before);
    assert!(matches!(
        bench.refuses(correction(correct("c", -1, 0))),
        Refused::CorrectionConflict { sequence: 2, .. }
    ));
    for (tokens, nano, what) in [
        (-4, 0, "completion tokens"),
        (0, -240_001, "output"),
        (i64::MIN, 0, "a difference"),
    ] {
        let refused = bench.refuses(correction(correct("d", tokens, nano)));
        assert_eq!(
            refused,
            Refused::BelowZero {
                request_id: "r".into(),
                what
            }
        );
    }
    let cached = Correction {
        cached_tokens: 11,
        ..correct("d", 0, 0)
    };
    assert!(matches!(
        bench.refuses(correction(cached)),
        Refused::BelowZero {
            what: "cached tokens",
            ..
        }
    ));
    assert!(matches!(
        bench.refuses(correction(correct("d", 0, 0))),
        Refused::Invalid(_)
    ));
    let elsewhere = Correction {
        sequence: 2,
        ..correct("d", 1, 0)
    };
    assert!(matches!(bench.refuses(correction(elsewhere)), Refused::Invalid(_)));
    let nobody = Correction {
        request_id: "x".into(),
        ..correct("d", 1, 0)
    };
    assert!(matches!(bench.refuses(correction(nobody)), Refused::Unknown { .. }));
    assert_eq!(
        bench.run(correction(correct("d", -3, -240_000))),
        Ok(Applied::Corrected { sequence: 3 })
    );
    assert_eq!(view::corrected(&bench.tables, "r").unwrap().completion_tokens, -5);
    // A row without a price has no currency to correct in.
    bench
        .run(settle(UsageRecord {
            model: "free".into(),
            ..record("f", 5)
        }))
        .unwrap();
    let priceless = Correction {
        request_id: "f".into(),
        sequence: 4,
        ..correct("e", 0, 1)
    };
    assert!(matches!(bench.refuses(correction(priceless)), Refused::Invalid(_)));
    check(&bench.tables);
}

#[test]
fn periods_are_closed_then_signed() {
    let mut bench = Bench::new();
    let (key, stranger) = (SigningKey::from_seed(&[1; 32]), SigningKey::from_seed(&[2; 32]));
    bench.run(member(1, &key)).unwrap();
    assert_eq!(bench.refuses(close(0)), Refused::NothingToClose);
    assert!(matches!(
        bench.refuses(seal(&bench.clone(), &key)),
        Refused::NotNext { .. }
    ));
    for id in ["r", "s", "t"] {
        bench.run(settle(record(id, 1))).unwrap();
    }
    for _ in 0..2 {
        assert_eq!(bench.run(close(0)), Ok(Applied::Closed { last_sequence: 3 }));
        // Rows go on.
        bench.run(settle(record("u", 1))).unwrap();
    }
    assert!(matches!(
        bench.refuses(close(3)),
        Refused::NotNext { last_sequence: 3, .. }
    ));
    check(&bench.tables);
    // Signed by someone else, over another time, or not at all.
    let wrong = seal(&bench, &stranger);
    assert!(matches!(bench.refuses(wrong), Refused::BadSignature(_)));
    let right = seal(&bench, &key);
    bench.now_ms += 1;
    assert!(matches!(bench.refuses(right.clone()), Refused::BadSignature(_)));
    let Kind::SealPeriod(mut unsigned) = right else {
        panic!()
    };
    unsigned.public_key.clear();
    assert!(matches!(
        bench.refuses(Kind::SealPeriod(unsigned)),
        Refused::BadSignature(_)
    ));
    assert!(view::checkpoint_over(&bench.tables, 2).unwrap().is_none());
    let right = seal(&bench, &key);
    for _ in 0..2 {
        assert_eq!(bench.run(right.clone()), Ok(Applied::Sealed { last_sequence: 3 }));
        check(&bench.tables);
    }
    assert_eq!(bench.run(close(0)), Ok(Applied::Closed { last_sequence: 3 }));
    assert_eq!(bench.run(close(3)), Ok(Applied::Closed { last_sequence: 4 }));
    bench.run(seal(&bench.clone(), &key)).unwrap();
    assert!(matches!(
        bench.refuses(close(0)),
        Refused::NotNext { last_sequence: 4, .. }
    ));
    let over = |sequence| {
        view::checkpoint_over(&bench.tables, sequence)
            .unwrap()
            .map(|found| found.last_sequence)
    };
    assert_eq!((over(1), over(3), over(4), over(5)), (Some(3), Some(3), Some(4), None));
    check(&bench.tables);
}
