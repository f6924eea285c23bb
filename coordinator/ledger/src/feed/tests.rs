//! Pages of any size give an export that verifies; a page that lies is refused.

use super::*;
use crate::export::Format;
use crate::tests::{Ledger, ledger};

/// What a coordinator with this ledger answers to the reader.
fn answer(ledger: &Ledger, reader: &Reader, limit: u32) -> Page {
    let query = Query {
        after: reader.after,
        checkpoints_after: Some(reader.checkpoints_after),
        limit: Some(limit),
    };
    let rows = ledger.rows.iter().filter(|row| row.sequence > query.after).cloned();
    let price = |id: &str| ledger.prices.iter().find(|price| price.id == id).cloned();
    let page = page(
        &query,
        rows,
        price,
        ledger.checkpoints.clone(),
        ledger.rows.len() as u64,
    );
    let text = serde_json::to_string(&page).expect("plain data");
    serde_json::from_str(&text).expect("its own")
}

#[test]
fn pages_of_any_size_give_an_export_that_verifies() {
    let whole = ledger(20);
    for limit in [1, 2, 3, 7, 500] {
        // The ledger grows while it is read, and periods are sealed after their rows were.
        let mut reader = Reader::new(0, None);
        let mut out = Vec::new();
        let mut export = Format::Jsonl.writer(&mut out).expect("memory is writable");
        for length in [5, 13, 20] {
            let mut ledger = ledger(length);
            ledger
                .checkpoints
                .retain(|c| c.last_sequence + 4 <= length || length == 20);
            loop {
                let page = answer(&ledger, &reader, limit);
                let more = page.has_more;
                for item in reader.take(page).expect("honest") {
                    match item {
                        Item::Price(price) => export.price(&price),
                        Item::Row(row) => export.row(&row),
                        Item::Checkpoint(checkpoint) => export.checkpoint(&checkpoint),
                    }
                    .expect("memory is writable");
                }
                if !more {
                    break;
                }
            }
        }
        export.finish().expect("memory is writable");
        let report = crate::verify::verify(out.as_slice(), vec![whole.key]).expect("honest");
        assert_eq!(
            (report.last, report.checkpoints, report.signed_through),
            (20, 6, 18),
            "pages of {limit}"
        );
    }
}

#[test]
fn a_dishonest_page_is_refused_and_the_right_one_taken_afterwards() {
    let ledger = ledger(6);
    let mut reader = Reader::new(0, None);
    let right = answer(&ledger, &reader, 6);
    let refuse = |reader: &mut Reader, change: &dyn Fn(&mut Page)| {
        let mut page = right.clone();
        change(&mut page);
        let error = reader.take(page).expect_err("dishonest");
        assert_eq!(reader.after(), 0);
        error
    };
    let gap = |error| {
        matches!(
            error,
            FeedError::Row {
                problem: Problem::Gap { .. },
                ..
            }
        )
    };
    assert!(gap(refuse(&mut reader, &|page| drop(page.rows.remove(2)))));
    assert!(gap(refuse(&mut reader, &|page| page.rows.swap(0, 1))));
    let error = refuse(&mut reader, &|page| page.prices.clear());
    assert!(matches!(
        error,
        FeedError::Row {
            sequence: 1,
            problem: Problem::NoPrice(_)
        }
    ));
    let error = refuse(&mut reader, &|page| page.prices[0].0.output_nano_per_mtok += 1);
    assert!(matches!(
        error,
        FeedError::Row {
            problem: Problem::PriceId { .. },
            ..
        }
    ));
    let error = refuse(&mut reader, &|page| {
        let mut row = LedgerRow::from(page.rows[3].clone());
        row.at_unix_ms += 1;
        page.rows[3] = row.into();
    });
    assert!(matches!(
        error,
        FeedError::Row {
            sequence: 4,
            problem: Problem::Hash { .. }
        }
    ));
    let error = refuse(&mut reader, &|page| page.checkpoints.swap(0, 1));
    assert!(matches!(error, FeedError::Checkpoint(_)));
    assert!(matches!(
        refuse(&mut reader, &|page| page.object.clear()),
        FeedError::NotAPage
    ));
    assert_eq!(reader.take(right.clone()).expect("honest").len(), 1 + 6 + 2);
    // Again the same page, or a ledger that lost rows.
    assert!(reader.take(right).is_err());
    let shorter = Page {
        last_sequence: 5,
        rows: vec![],
        ..answer(&ledger, &reader, 1)
    };
    assert!(matches!(
        reader.take(shorter),
        Err(FeedError::Shorter { last: 5, after: 6 })
    ));
}

#[test]
fn a_page_holds_what_was_asked_for() {
    let ledger = ledger(9);
    let query: Query = serde_json::from_str(r#"{"after":4,"limit":3}"#).expect("a query");
    let rows = ledger.rows[4..].iter().cloned();
    let page = page(&query, rows, |_| None, ledger.checkpoints.clone(), 9);
    assert_eq!(page.rows.iter().map(RowJson::sequence).collect::<Vec<_>>(), [5, 6, 7]);
    assert_eq!(
        page.checkpoints.iter().map(|c| c.0.last_sequence).collect::<Vec<_>>(),
        [6]
    );
    assert!(page.has_more);
    assert_eq!(
        Query {
            limit: Some(0),
            ..query
        }
        .limit(),
        1
    );
    assert_eq!(
        Query {
            limit: Some(u32::MAX),
            ..query
        }
        .limit(),
        LIMIT_MAX
    );
    assert_eq!(Query { limit: None, ..query }.limit(), LIMIT_DEFAULT);
}
