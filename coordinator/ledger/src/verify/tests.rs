//! An honest export verifies; every way to change one is found, and named by row.

use super::*;
use crate::checkpoint::SigningKey;
use crate::export::{Format, tests::exported};
use crate::json::{CheckpointJson, PriceJson, RowJson};
use crate::tests::ledger;

fn lines(rows: u64) -> Vec<Line> {
    let bytes = exported(Format::Jsonl, rows);
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines
        .map(|line| serde_json::from_slice(line).expect("its own"))
        .collect()
}

fn bytes(lines: &[Line]) -> Vec<u8> {
    lines
        .iter()
        .flat_map(|line| {
            serde_json::to_string(line)
                .expect("plain data")
                .into_bytes()
                .into_iter()
                .chain([b'\n'])
        })
        .collect()
}

fn check(lines: &[Line]) -> Result<Report, VerifyError> {
    verify(bytes(lines).as_slice(), vec![ledger(1).key])
}

/// Where row `sequence` stands.
fn at(lines: &[Line], sequence: u64) -> usize {
    lines
        .iter()
        .position(|line| line.sequence() == Some(sequence))
        .expect("there")
}

/// Changes a row in place, with the hashes of the content mended: what a clever forger would do.
fn edit(lines: &mut [Line], sequence: u64, change: impl Fn(&mut LedgerRow)) {
    let index = at(lines, sequence);
    let Line::Row(row) = &lines[index] else { panic!("a row") };
    let mut row = LedgerRow::from(*row.clone());
    change(&mut row);
    lines[index] = Line::Row(Box::new(row.into()));
}

fn mend(row: &mut LedgerRow) {
    row.id = row::body_id(row.body.as_ref().expect("a body")).to_vec().into();
    row.hash = row::row_hash(row).to_vec().into();
}

fn usage(row: &mut LedgerRow) -> &mut UsageRecord {
    match &mut row.body {
        Some(Body::Usage(record)) => record,
        _ => panic!("usage"),
    }
}

/// Makes every later row follow the changed ones again.
fn rechain(lines: &mut [Line]) {
    let mut previous = GENESIS;
    for line in lines {
        if let Line::Row(row) = line {
            let mut changed = LedgerRow::from(*row.clone());
            changed.previous_hash = previous.to_vec().into();
            mend(&mut changed);
            previous = changed.hash.as_ref().try_into().expect("32 bytes");
            **row = changed.into();
        }
    }
}

#[test]
fn an_honest_export_verifies() {
    let report = check(&lines(11)).expect("honest");
    assert_eq!(
        (report.first, report.last, report.checkpoints, report.signed_through),
        (1, 11, 3, 9)
    );
    assert!(report.complete && !report.starts_inside_period);
    assert_eq!((report.totals.requests, report.totals.corrections), (9, 2));
    let mut totals = Totals::default();
    ledger(11).rows.iter().for_each(|row| totals.add(row));
    assert_eq!(report.totals, totals);
    assert_eq!(check(&lines(0)).expect("empty").last, 0);
}

#[test]
fn an_export_from_the_middle_verifies() {
    let all = ledger(11);
    for after in 1..11 {
        let mut out = Vec::new();
        let mut writer = Format::Jsonl.writer(&mut out).expect("memory is writable");
        writer.price(&all.prices[0]).expect("memory is writable");
        for row in &all.rows[after..] {
            writer.row(row).expect("memory is writable");
            for checkpoint in all.checkpoints.iter().filter(|c| c.last_sequence == row.sequence) {
                writer.checkpoint(checkpoint).expect("memory is writable");
            }
        }
        writer.finish().expect("memory is writable");
        let report = verify(out.as_slice(), vec![all.key]).expect("honest");
        let after = after as u64;
        assert_eq!((report.first, report.last), (after + 1, 11));
        assert_eq!(
            report.starts_inside_period,
            !after.is_multiple_of(3) && after < 9,
            "after {after}"
        );
        assert_eq!(report.signed_through, if after < 9 { 9 } else { 0 });
    }
}

#[test]
fn every_changed_byte_is_found() {
    // Any digit or letter of any line, changed to another: the first row it is in is named, or the line.
    let honest = bytes(&lines(4));
    let mut changed = 0;
    for index in (0..honest.len()).step_by(3) {
        let mut forged = honest.clone();
        forged[index] = match forged[index] {
            b'0'..=b'8' => forged[index] + 1,
            b'9' => b'0',
            b'a'..=b'y' => forged[index] + 1,
            _ => continue,
        };
        changed += 1;
        let line = 1 + honest[..index].iter().filter(|byte| **byte == b'\n').count() as u64;
        let error = verify(forged.as_slice(), vec![ledger(1).key]).expect_err("changed");
        assert!(error.line >= line, "byte {index} of line {line}: {error}");
    }
    assert!(changed > 500);
}

#[test]
fn forged_rows_are_named() {
    let honest = lines(11);
    let refuse = |sequence: u64, change: &dyn Fn(&mut Vec<Line>)| {
        let mut lines = honest.clone();
        change(&mut lines);
        let error = check(&lines).expect_err("forged");
        assert_eq!(error.sequence, Some(sequence), "{error}");
        assert!(error.to_string().contains(&format!("row {sequence}: ")), "{error}");
        error.problem
    };
    let content = refuse(5, &|lines| edit(lines, 5, |row| usage(row).completion_tokens += 1));
    assert!(matches!(content, Problem::Id { .. }));
    let time = refuse(5, &|lines| edit(lines, 5, |row| row.at_unix_ms += 1));
    assert!(matches!(time, Problem::Hash { .. }));
    // With the row's own hashes mended, the next one does not follow.
    let chain = refuse(6, &|lines| {
        edit(lines, 5, |row| {
            usage(row).user.push('x');
            mend(row);
        });
    });
    assert!(matches!(chain, Problem::Chain { .. }));
    let charge = refuse(6, &|lines| {
        edit(lines, 6, |row| {
            row.charge.as_mut().expect("set").input_nano -= 1;
            mend(row);
        });
    });
    assert!(matches!(charge, Problem::Charge { .. }));
    let other_price = refuse(6, &|lines| {
        edit(lines, 6, |row| {
            usage(row).model = "another".into();
            mend(row);
        });
    });
    assert!(matches!(other_price, Problem::OtherPrice(_)));
    let too_early = refuse(6, &|lines| {
        edit(lines, 6, |row| {
            usage(row).started_unix_ms = 5;
            mend(row);
        });
    });
    assert!(matches!(too_early, Problem::OtherPrice(_)));
    let cached = refuse(6, &|lines| {
        edit(lines, 6, |row| {
            usage(row).cached_tokens = 99;
            mend(row);
        });
    });
    assert!(matches!(cached, Problem::Uncharged(_)));
    let removed = refuse(6, &|lines| drop(lines.remove(at(lines, 5))));
    assert!(matches!(removed, Problem::Gap { before: 4 }));
    let doubled = refuse(5, &|lines| {
        let row = lines[at(lines, 5)].clone();
        lines.insert(at(lines, 5), row);
    });
    assert!(matches!(doubled, Problem::Gap { before: 5 }));
    let backwards = refuse(11, &|lines| {
        edit(lines, 11, |row| {
            row.raft_index = 1;
            mend(row);
        });
    });
    assert!(matches!(backwards, Problem::Backwards));
    let twice = refuse(11, &|lines| {
        edit(lines, 11, |row| {
            usage(row).request_id = "chatcmpl-10".into();
            mend(row);
        });
    });
    assert!(matches!(twice, Problem::Twice(_)));
    let amends = refuse(8, &|lines| {
        edit(lines, 8, |row| {
            if let Some(Body::Correction(correction)) = &mut row.body {
                correction.request_id = "chatcmpl-9".into();
            }
            mend(row);
        });
    });
    assert!(matches!(amends, Problem::Amends(7, _)));
    let correction = refuse(8, &|lines| {
        edit(lines, 8, |row| {
            row.charge.as_mut().expect("set").output_nano = 1;
            mend(row);
        });
    });
    assert!(matches!(correction, Problem::Charge { .. }));
    let no_currency = refuse(8, &|lines| {
        edit(lines, 8, |row| {
            row.charge.as_mut().expect("set").currency.clear();
            mend(row);
        });
    });
    assert!(matches!(no_currency, Problem::NoCurrency));
    let no_price = refuse(1, &|lines| drop(lines.remove(1)));
    assert!(matches!(no_price, Problem::NoPrice(_)));
}

#[test]
fn what_was_signed_cannot_be_forged_with_all_hashes_mended() {
    let problem = |change: &dyn Fn(&mut Vec<Line>)| {
        let mut lines = lines(11);
        change(&mut lines);
        check(&lines).expect_err("forged").problem
    };
    let rewritten = problem(&|lines| {
        edit(lines, 2, |row| usage(row).user.push('x'));
        rechain(lines);
    });
    assert!(matches!(
        rewritten,
        Problem::NotSigned {
            first: 1,
            last: 3,
            what: "last hash",
            ..
        }
    ));
    let change = |lines: &mut Vec<Line>, change: &dyn Fn(&mut Checkpoint)| {
        for line in lines {
            if let Line::Checkpoint(CheckpointJson(checkpoint)) = line {
                change(checkpoint);
                return;
            }
        }
    };
    let by_another = problem(&|lines| change(lines, &|checkpoint| SigningKey::from_seed(&[8; 32]).sign(checkpoint)));
    assert!(matches!(by_another, Problem::UnknownKey(_)));
    let unsigned = problem(&|lines| change(lines, &|checkpoint| checkpoint.at_unix_ms += 1));
    assert!(matches!(
        unsigned,
        Problem::Checkpoint(CheckpointError::BadSignature { .. })
    ));
    let key = SigningKey::from_seed(&[7; 32]);
    let wrong_root = problem(&|lines| {
        change(lines, &|checkpoint| {
            checkpoint.merkle_root = vec![1; 32].into();
            key.sign(checkpoint);
        });
    });
    assert!(matches!(
        wrong_root,
        Problem::NotSigned {
            what: "Merkle root",
            ..
        }
    ));
    let early = problem(&|lines| {
        let index = lines
            .iter()
            .position(|line| matches!(line, Line::Checkpoint(_)))
            .expect("there");
        lines.swap(index, index - 1);
    });
    assert!(matches!(early, Problem::Uncovered { last: 3, .. }));
    let left_out = problem(&|lines| {
        let index = lines
            .iter()
            .position(|line| matches!(line, Line::Checkpoint(_)))
            .expect("there");
        lines.remove(index);
    });
    assert!(matches!(
        left_out,
        Problem::Checkpoint(CheckpointError::NotContiguous { first: 4, .. })
    ));
}

#[test]
fn files_that_are_none_are_refused() {
    let key = vec![ledger(1).key];
    let problem = |text: &[u8]| verify(text, key.clone()).expect_err("none").problem;
    assert!(matches!(problem(b""), Problem::Header(_)));
    assert!(matches!(problem(b"{}\n"), Problem::Syntax(_)));
    assert!(matches!(problem(&bytes(&lines(3)[1..])), Problem::Header(_)));
    let whole = bytes(&lines(3));
    assert!(matches!(problem(&whole[..whole.len() - 1]), Problem::CutOff));
    assert!(matches!(problem(&vec![b' '; 2 << 20]), Problem::LongLine));
    assert!(matches!(
        problem(&[whole.as_slice(), whole.as_slice()].concat()),
        Problem::AfterEnd
    ));
    let mut lines = lines(3);
    lines.pop();
    assert!(!check(&lines).expect("honest so far").complete);
    let Line::Price(PriceJson(price)) = &mut lines[1] else {
        panic!("a price")
    };
    price.output_nano_per_mtok -= 1;
    assert!(matches!(
        check(&lines).expect_err("changed").problem,
        Problem::PriceId { .. }
    ));
    let row: RowJson = ledger(1).rows.remove(0).into();
    let mut value = serde_json::to_value(Line::Row(Box::new(row))).expect("plain data");
    value["row"]["usage"] = serde_json::Value::Null;
    let header = serde_json::to_string(&lines[0]).expect("plain data");
    assert!(matches!(
        problem(format!("{header}\n{value}\n").as_bytes()),
        Problem::Body
    ));
}

#[test]
fn a_checkpoint_may_come_long_after_its_rows() {
    let mut lines = lines(11);
    let checkpoints: Vec<Line> = lines
        .extract_if(.., |line| matches!(line, Line::Checkpoint(_)))
        .collect();
    let end = lines.pop().expect("the end");
    lines.extend(checkpoints);
    lines.push(end);
    assert_eq!(check(&lines).expect("honest").signed_through, 9);
}
