//! Signed periods: rows are closed and signed by a member, each full hour by the leader, and whenever an operator asks. And
//! time: while slices of budgets are open and nothing else tells the time, the leader does, so that they expire.
//!
//! ```text
//!  rows since the last checkpoint ─ ClosePeriod ─▶ closed ─ sign, SealPeriod ─▶ checkpoint
//! ```
//!
//! Two members that seal at once do no harm: a repeated command changes nothing, and of two signatures the first stands.
//! The key is made at the first start and kept beside the store, readable by its owner; its public half is registered with
//! the member, because only a member's key is believed.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_gateway::{AccountStore, StoreError, command};
use baton_ledger::checkpoint::SigningKey;
use baton_proto::state::command::Kind;
use baton_proto::state::{Checkpoint, ClosePeriod, Member, PutMember, SealPeriod, Tick};
use baton_raftstore::RaftStore;
use baton_state::{Refused, view};
use tokio_util::sync::CancellationToken;

use super::Accounts;
use crate::CoordinatorError;

/// The key's file in the data directory: PKCS#8.
const KEY_FILE: &str = "ledger-key.p8";
/// How often the housekeeping looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Replicated time may lag this much while slices are open.
const TIME_LAG_MS_MAX: u64 = 10_000;
const HOUR_MS: u64 = 3_600_000;

/// Signs periods of the ledger.
pub(crate) struct Sealer {
    key: SigningKey,
    /// This member as it is to be registered.
    me: Member,
}

impl Sealer {
    /// Reads the key in `data_dir`, or makes one. Blocks on the disk.
    pub(crate) fn open(data_dir: &Path, me: Member) -> Result<Self, CoordinatorError> {
        let path = data_dir.join(KEY_FILE);
        let wrong = |error: String| CoordinatorError::Config(format!("the ledger's key {}: {error}", path.display()));
        let document = match std::fs::read(&path) {
            Ok(document) => document,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let document = SigningKey::generate_pkcs8().map_err(|error| wrong(error.to_string()))?;
                write_secret(&path, &document).map_err(|error| wrong(error.to_string()))?;
                document
            }
            Err(error) => return Err(wrong(error.to_string())),
        };
        let key = SigningKey::from_pkcs8(&document).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { key, me })
    }

    /// Registers the key with its member, if it is not.
    async fn register(&self, accounts: &Accounts, actor: &str) -> Result<(), StoreError> {
        let public_key = self.key.public_key();
        let known = view::member(&*accounts.tables()?, self.me.id)?;
        if known
            .as_ref()
            .is_some_and(|member| member.ledger_public_key == public_key[..])
        {
            return Ok(());
        }
        let member = Member {
            ledger_public_key: public_key.to_vec().into(),
            ..known.unwrap_or_else(|| self.me.clone())
        };
        let kind = Kind::PutMember(PutMember { member: Some(member) });
        accounts.propose(command(actor, kind)).await.map(|_| ())
    }

    /// Closes the rows since the last checkpoint and signs them; also what was closed before and not signed. The last
    /// checkpoint made, if any.
    pub(crate) async fn seal(&self, accounts: &Accounts, actor: &str) -> Result<Option<Checkpoint>, StoreError> {
        self.register(accounts, actor).await?;
        let before = view::closed_period(&*accounts.tables()?)?;
        let leftover = match before {
            Some(_) => self.sign(accounts, actor).await?,
            None => None,
        };
        let last = view::last_checkpoint(&*accounts.tables()?)?;
        let after_sequence = last.map_or(0, |last| last.last_sequence);
        let kind = Kind::ClosePeriod(ClosePeriod { after_sequence });
        match accounts.propose(command(actor, kind)).await {
            Ok(_) => Ok(self.sign(accounts, actor).await?.or(leftover)),
            // Another member was quicker.
            Err(StoreError::Refused(Refused::NothingToClose | Refused::NotNext { .. })) => Ok(leftover),
            Err(error) => Err(error),
        }
    }

    /// Signs the closed period, if there is one.
    async fn sign(&self, accounts: &Accounts, actor: &str) -> Result<Option<Checkpoint>, StoreError> {
        let Some(mut period) = view::closed_period(&*accounts.tables()?)? else {
            return Ok(None);
        };
        let mut command = command(actor, Kind::Tick(Tick {}));
        period.at_unix_ms = command.at_unix_ms;
        self.key.sign(&mut period);
        command.kind = Some(Kind::SealPeriod(SealPeriod {
            last_sequence: period.last_sequence,
            public_key: period.public_key.clone(),
            signature: period.signature.clone(),
        }));
        match accounts.propose(command).await {
            Ok(_) => Ok(Some(period)),
            Err(StoreError::Refused(Refused::NotNext { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Creates a file that only its owner reads, whole or not at all.
fn write_secret(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(new, path)
}

/// The leader's housekeeping, until `over`: seals each hour, and tells the time while slices are open.
pub(crate) async fn keep(accounts: Arc<Accounts>, store: RaftStore, over: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = over.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if !store.status().leads {
            continue;
        }
        if let Err(error) = look(&accounts).await {
            tracing::warn!(%error, "the ledger's housekeeping waits");
        }
    }
}

async fn look(accounts: &Accounts) -> Result<(), StoreError> {
    let now = command("", Kind::Tick(Tick {}));
    let now_ms = now.at_unix_ms;
    let (time_ms, slices, unsealed) = {
        let tables = accounts.tables()?;
        (
            view::time(&*tables)?,
            view::has_slices(&*tables)?,
            first_unsealed_ms(&*tables)?,
        )
    };
    if slices && time_ms.saturating_add(TIME_LAG_MS_MAX) < now_ms {
        accounts.propose(now).await?;
    }
    // Rows of an hour that is over.
    if unsealed.is_some_and(|first_ms| first_ms / HOUR_MS < now_ms / HOUR_MS) {
        accounts.sealer.seal(accounts, "").await?;
    }
    Ok(())
}

/// Time of the first row that no checkpoint covers.
fn first_unsealed_ms(tables: &dyn baton_state::Tables) -> Result<Option<u64>, StoreError> {
    let sealed = view::last_checkpoint(tables)?.map_or(0, |last| last.last_sequence);
    let first = view::rows_after(tables, sealed, 1)?.pop();
    Ok(first.map(|row| row.at_unix_ms))
}
