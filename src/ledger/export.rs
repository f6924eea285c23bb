//! `baton ledger export`: reads the feed page by page into a file or into PostgreSQL.

use crate::cli::Remote;
use crate::cli::ledger::ExportArgs;
use crate::up::say;
use anyhow::{Context, anyhow, bail};
use baton_ledger::export::{Export, Format};
use baton_ledger::feed::{self, Item, Page, Position, Reader};
use baton_ledger_postgres::{Sink, SinkError};
use baton_loadtest::{Client, FailureKind, Target};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::process::ExitCode;
use std::time::Duration;
use tokio::time::sleep;

/// Longest wait for a page.
const PAGE_MAX: Duration = Duration::from_secs(30);
/// Pause between two looks with `--follow`, once all rows are there.
const LOOK: Duration = Duration::from_secs(1);
/// Longest pause with `--follow` while the cluster or PostgreSQL cannot be reached; it doubles from [`LOOK`].
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// Exports.
pub fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    if args.follow && args.format == Format::Parquet && args.postgres.is_none() {
        bail!(
            "a Parquet file is readable only once it is finished: export it without --follow, from the row after the last file's"
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let feed = Feed::new(&args.remote)?;
        match &args.postgres {
            None => to_file(args, &feed).await,
            Some(address) => to_postgres(args, address, &feed).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Where pages come from.
struct Feed {
    client: Client,
    url: String,
}

impl Feed {
    fn new(remote: &Remote) -> anyhow::Result<Self> {
        let client = Client::new(Target::parse(&remote.url)?, remote.api_key.clone(), PAGE_MAX);
        Ok(Self {
            client,
            url: remote.url.clone(),
        })
    }

    /// The next items, and whether there are more.
    async fn next(&self, reader: &mut Reader) -> Result<(Vec<Item>, bool), Trouble> {
        let url = &self.url;
        let body = self
            .client
            .get(&reader.path(feed::LIMIT_MAX))
            .await
            .map_err(|failure| match failure.kind {
                FailureKind::Status(401 | 403) => Trouble::Lasting(anyhow!(
                    "{url} wants a key that may read the ledger: {}; give it with --api-key or BATON_API_KEY",
                    failure.message
                )),
                FailureKind::Status(404) => Trouble::Lasting(anyhow!(
                    "{url} answers, but serves no ledger; name a coordinator's address with --url"
                )),
                FailureKind::Status(400..=499) => Trouble::Lasting(anyhow!("{url} refuses: {}", failure.message)),
                _ => Trouble::Passing(anyhow!("no rows from {url}: {}", failure.message)),
            })?;
        let page: Page = serde_json::from_slice(&body).map_err(|error| {
            Trouble::Lasting(anyhow!("{url} answers, but not with a page of this version: {error}"))
        })?;
        let more = page.has_more;
        let items = reader.take(page).map_err(|error| Trouble::Lasting(error.into()))?;
        Ok((items, more))
    }
}

/// What went wrong, and whether trying again may help.
enum Trouble {
    Passing(anyhow::Error),
    Lasting(anyhow::Error),
}

impl From<SinkError> for Trouble {
    fn from(error: SinkError) -> Self {
        if error.is_passing() {
            Self::Passing(error.into())
        } else {
            Self::Lasting(error.into())
        }
    }
}

/// Waits before the next try, or gives up.
struct Patience {
    follow: bool,
    pause: Duration,
}

impl Patience {
    fn new(follow: bool) -> Self {
        Self { follow, pause: LOOK }
    }

    fn reset(&mut self) {
        self.pause = LOOK;
    }

    async fn wait(&mut self, trouble: Trouble) -> anyhow::Result<()> {
        match trouble {
            Trouble::Passing(error) if self.follow => {
                say(&format!("baton: {error:#}; trying again in {} s", self.pause.as_secs()));
                sleep(self.pause).await;
                self.pause = (self.pause * 2).min(AGAIN_MAX);
                Ok(())
            }
            Trouble::Passing(error) | Trouble::Lasting(error) => Err(error),
        }
    }
}

async fn to_file(args: &ExportArgs, feed: &Feed) -> anyhow::Result<()> {
    let out: Box<dyn Write + Send> = match &args.output {
        None => Box::new(std::io::stdout()),
        Some(path) => Box::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?),
    };
    let mut export = args.format.writer(BufWriter::with_capacity(1 << 20, out))?;
    let mut reader = Reader::new(args.from - 1, None);
    let mut patience = Patience::new(args.follow);
    let reading = async {
        loop {
            let more = match feed.next(&mut reader).await {
                Ok((items, more)) => {
                    patience.reset();
                    write(export.as_mut(), &items)?;
                    more
                }
                Err(trouble) => {
                    patience.wait(trouble).await?;
                    continue;
                }
            };
            if !more {
                if !args.follow {
                    return anyhow::Ok(());
                }
                export.flush()?;
                sleep(LOOK).await;
            }
        }
    };
    // Only waiting is interrupted: a page is written without a pause.
    tokio::select! {
        result = reading => result?,
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(export.finish()?)
}

fn write(export: &mut (dyn Export + '_), items: &[Item]) -> anyhow::Result<()> {
    for item in items {
        match item {
            Item::Price(price) => export.price(price)?,
            Item::Row(row) => export.row(row)?,
            Item::Checkpoint(checkpoint) => export.checkpoint(checkpoint)?,
        }
    }
    Ok(())
}

async fn to_postgres(args: &ExportArgs, address: &str, feed: &Feed) -> anyhow::Result<()> {
    let mut patience = Patience::new(args.follow);
    let writing = async {
        loop {
            match connected(args, address, feed, &mut patience).await {
                Ok(()) => return Ok(()),
                // What was not committed is read again: a new connection asks the tables how far they go.
                Err(trouble) => patience.wait(trouble).await?,
            }
        }
    };
    tokio::select! {
        result = writing => result,
        // An open transaction is rolled back by PostgreSQL when the connection goes.
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

/// Writes until something breaks, or until all rows are there without `--follow`.
async fn connected(args: &ExportArgs, address: &str, feed: &Feed, patience: &mut Patience) -> Result<(), Trouble> {
    let client = baton_ledger_postgres::connect(address, args.postgres_ca.as_deref()).await?;
    let mut sink = Sink::open(client).await?;
    let mut position = sink.position().await?;
    let mut reader = Reader::resume(position);
    say(&format!("PostgreSQL stands at row {}", position.after));
    loop {
        let (items, more) = feed.next(&mut reader).await?;
        if !items.is_empty() {
            let to: Position = reader
                .position()
                .ok_or_else(|| Trouble::Lasting(anyhow!("the feed has no hash")))?;
            sink.write(&position, &to, &items).await?;
            position = to;
        }
        patience.reset();
        if !more {
            if !args.follow {
                say(&format!("PostgreSQL stands at row {}", position.after));
                return Ok(());
            }
            sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests;
