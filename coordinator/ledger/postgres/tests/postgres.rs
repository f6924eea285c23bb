//! Against a real PostgreSQL: an exporter that is killed again and again, and a server that is, leave every row there once,
//! and sums that are equal to the nano-unit. Skipped with a message where PostgreSQL's programs are not found.

mod support;

use baton_ledger::feed::{Position, Reader};
use baton_ledger::money::Nano;
use baton_ledger::totals::Totals;
use baton_ledger_postgres::{Sink, SinkError, connect};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::ledger::Ledger;
use support::server::Server;

/// Rows of the ledger that is exported.
const ROWS: u64 = 3_000;
/// Rows of a batch: many transactions, so that there is much to interrupt.
const BATCH: u32 = 25;
/// Set for the process that exports, to the address of the database.
const CHILD: &str = "BATON_TEST_EXPORT_TO";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Exports `ledger` to the address until all is there.
async fn export(ledger: &Ledger, address: &str) -> Result<(), SinkError> {
    let mut sink = Sink::open(connect(address, None).await?).await?;
    let mut position = sink.position().await?;
    let mut reader = Reader::resume(position);
    loop {
        let page = ledger.page(position.after, position.checkpoints_after, BATCH);
        let more = page.has_more;
        let items = reader.take(page).expect("an honest feed");
        let to = reader.position().expect("it knows the hash");
        if !items.is_empty() {
            sink.write(&position, &to, &items).await?;
        }
        position = to;
        if !more {
            return Ok(());
        }
    }
}

/// The exporter of [`killed_anywhere_it_goes_on`], when that test runs this program again; otherwise nothing.
#[test]
fn exporter() {
    if let Some(address) = std::env::var_os(CHILD) {
        let address = address.to_str().expect("text").to_owned();
        runtime()
            .block_on(export(&Ledger::new(ROWS), &address))
            .expect("the export goes through");
    }
}

async fn position(address: &str) -> Position {
    let sink = Sink::open(connect(address, None).await.expect("a server"))
        .await
        .expect("tables");
    sink.position().await.expect("a cursor")
}

/// Compares the tables with the ledger, to the nano-unit.
async fn assert_equal(ledger: &Ledger, address: &str) {
    let client = connect(address, None).await.expect("a server");
    let one = client
        .query_one(
            "SELECT count(*), min(sequence), max(sequence), count(DISTINCT request_id) FILTER (WHERE kind = 'usage'),
                    sum(prompt_tokens)::bigint, sum(completion_tokens)::bigint, sum(total_cost)::text, sum(input_cost)::text,
                    sum(cached_input_cost)::text, sum(output_cost)::text
             FROM baton_ledger_rows",
            &[],
        )
        .await
        .expect("sums");
    let mut totals = Totals::default();
    ledger.rows.iter().for_each(|row| totals.add(row));
    let rows = i64::try_from(ledger.rows.len()).expect("few");
    let number = |index: usize| one.get::<_, i64>(index);
    assert_eq!([number(0), number(1), number(2)], [rows, 1, rows], "every row, once");
    assert_eq!(number(3), i64::try_from(totals.requests).expect("few"));
    assert_eq!([number(4), number(5)], [totals.prompt_tokens, totals.completion_tokens]);
    let amounts = &totals.currencies["USD"];
    // PostgreSQL prints nine places; so do we, for the comparison.
    let places = |nano: i128| {
        format!(
            "{}{}.{:09}",
            if nano < 0 { "-" } else { "" },
            nano.abs() / 1_000_000_000,
            nano.abs() % 1_000_000_000
        )
    };
    let Nano(total) = amounts.total();
    let expected = [
        total,
        amounts.input_nano,
        amounts.cached_input_nano,
        amounts.output_nano,
    ]
    .map(places);
    assert_eq!([6, 7, 8, 9].map(|index| one.get::<_, String>(index)), expected);
    let checkpoints = client
        .query_one("SELECT count(*), max(last_sequence) FROM baton_ledger_checkpoints", &[])
        .await
        .expect("checkpoints");
    let last = ledger.checkpoints.last().expect("some");
    assert_eq!(
        checkpoints.get::<_, i64>(0),
        i64::try_from(ledger.checkpoints.len()).expect("few")
    );
    assert_eq!(
        checkpoints.get::<_, i64>(1),
        i64::try_from(last.last_sequence).expect("few")
    );
    // The chain is whole in SQL too.
    let broken = client
        .query_one(
            "SELECT count(*) FROM (SELECT previous_hash, lag(hash) OVER (ORDER BY sequence) AS before FROM baton_ledger_rows) AS rows
             WHERE before IS NOT NULL AND before <> previous_hash",
            &[],
        )
        .await
        .expect("the chain");
    assert_eq!(broken.get::<_, i64>(0), 0);
}

/// The exporter is killed with SIGKILL at ever later points, the server is once stopped as by a crash; then all is there, once.
#[test]
fn killed_anywhere_it_goes_on() {
    let Some(mut server) = Server::start() else { return };
    let (ledger, address) = (Ledger::new(ROWS), server.address());
    let runtime = runtime();
    let mut kills = 0;
    let deadline = Instant::now() + Duration::from_secs(100);
    loop {
        assert!(Instant::now() < deadline, "the export does not come to its end");
        let start = runtime.block_on(position(&address)).after;
        if start == ROWS {
            break;
        }
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "exporter", "--nocapture"])
            .env(CHILD, &address)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this program runs");
        // Once it has come on a little: at another point of a transaction each time.
        while child.try_wait().expect("a child").is_none() && runtime.block_on(position(&address)).after < start + 100 {
        }
        std::thread::sleep(Duration::from_micros(kills % 7 * 300));
        let ended = child.try_wait().expect("a child").is_some();
        child.kill().expect("killed or gone");
        child.wait().expect("a child");
        kills += u64::from(!ended);
        if kills == 4 {
            server.crash();
            server.run();
        }
    }
    assert!(kills >= 5, "{kills} kills are too few to show anything");
    runtime.block_on(async {
        assert_equal(&ledger, &address).await;
        // And once more changes nothing.
        export(&ledger, &address).await.expect("nothing to do");
        assert_equal(&ledger, &address).await;
    });
    println!("{kills} kills");
}

#[test]
fn the_cursor_keeps_others_out_and_a_broken_server_is_a_passing_trouble() {
    let Some(mut server) = Server::start() else { return };
    let (ledger, address) = (Ledger::new(60), server.address());
    runtime().block_on(async {
        let mut one = Sink::open(connect(&address, None).await.expect("a server"))
            .await
            .expect("tables");
        let mut other = Sink::open(connect(&address, None).await.expect("a server"))
            .await
            .expect("tables");
        let mut reader = Reader::new(0, None);
        let items = reader.take(ledger.page(0, 0, 25)).expect("honest");
        let to = reader.position().expect("known");
        one.write(&Position::START, &to, &items).await.expect("the first");
        let error = other
            .write(&Position::START, &to, &items)
            .await
            .expect_err("the same again");
        assert!(matches!(error, SinkError::Moved { expected: 0, found: 25 }), "{error}");
        assert!(!error.is_passing());
        // It was rolled back as a whole, and the connection still serves.
        assert_eq!(other.position().await.expect("a cursor"), to);

        let next = reader.take(ledger.page(25, to.checkpoints_after, 25)).expect("honest");
        let end = reader.position().expect("known");
        server.crash();
        let error = one.write(&to, &end, &next).await.expect_err("no server");
        assert!(error.is_passing(), "{error}");
        let refused = connect(&address, None).await.expect_err("no server");
        assert!(refused.is_passing(), "{refused}");
        server.run();
        let again = Sink::open(connect(&address, None).await.expect("a server"))
            .await
            .expect("tables");
        assert_eq!(again.position().await.expect("a cursor"), to);
        drop(again);
        export(&ledger, &address).await.expect("goes on");
        assert_equal(&ledger, &address).await;
    });
}

#[test]
fn addresses_that_are_none_are_refused() {
    runtime().block_on(async {
        let error = connect("postgres://host:port/x", None).await.expect_err("no address");
        assert!(matches!(error, SinkError::Address(_)) && !error.is_passing());
        let missing = std::path::Path::new("/nonexistent/ca.pem");
        let error = connect("postgres://localhost/x", Some(missing))
            .await
            .expect_err("no file");
        assert!(matches!(error, SinkError::Certificates(_)), "{error}");
    });
}
