//! Backups, taken a chunk at a time while their member goes on, streams snapshots, is cut off or dies; and what is restored from
//! them: a group of one that holds the state at the backup's index to the byte, durably, and goes on from there.

use super::digest::digest;
use super::disk::{Disk, Loss};
use super::oracle::{Checked, Violation, violation};
use super::power::{Power, Random};
use super::world::{Event, World};
use crate::database::Store;
use crate::node::Node;
use crate::planted;
use crate::runner::contained;
use crate::snapshot::{Saving, read_into};
use crate::tables::StateView;
use crate::{RaftStoreConfig, RaftStoreError, queries};
use baton_proto::state::{Command, Tick, command::Kind};
use prost::Message as _;

/// So that a backup takes a while.
const CHUNK_BYTES: usize = 1200;
/// The only member of a restored group.
const RESTORED: u64 = 9;

/// A backup that is being taken.
pub(super) struct Backup {
    pub(super) member: u64,
    life: u64,
    saving: Saving<Vec<u8>>,
}

impl World {
    /// Somebody asks a member for a backup, and later for another.
    pub(super) fn begin_backup(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        let ms = self.random.range(5000, 12_000);
        self.later(ms, Event::Backup);
        let up = self.up_members();
        let Some(member) = self.random.pick(&up) else {
            return Ok(());
        };
        self.begin_backup_of(member)
    }

    fn begin_backup_of(&mut self, member: u64) -> Checked {
        let known = &self.members[&member];
        let life = known.lives;
        let Some(running) = known.life.as_ref().filter(|life| life.runner.node.applied() > 0) else {
            return Ok(());
        };
        let saving = contained(|| Saving::begin(&running.store, Vec::new()));
        let mut saving = saving.map_err(|error| Violation(format!("member {member} gives no backup: {error}")))?;
        saving.set_chunk_bytes(CHUNK_BYTES);
        self.log(|| format!("member {member} begins a backup"));
        self.backups.push(Backup { member, life, saving });
        Ok(())
    }

    /// All backups go on by a chunk.
    pub(super) fn move_backups(&mut self) -> Checked {
        for mut backup in std::mem::take(&mut self.backups) {
            let member = &self.members[&backup.member];
            if !member.up() || member.lives != backup.life {
                continue;
            }
            if member.paused_until_ms > self.now_ms {
                self.backups.push(backup);
                continue;
            }
            let failed = |error| Violation(format!("a backup failed: {error}"));
            if contained(|| backup.saving.step()).map_err(failed)? {
                self.backups.push(backup);
                continue;
            }
            let (info, file) = backup.saving.finish().map_err(failed)?;
            let at = self.oracle.at(info.applied_index).map(|at| at.hash);
            if at != Some(info.state_hash) {
                return violation(format!("a backup at {} has another hash", info.applied_index));
            }
            self.log(|| format!("member {} gave a backup at {}", backup.member, info.applied_index));
            self.restore(&file, info.applied_index)?;
        }
        Ok(())
    }

    /// A last backup now and then, of a member that is up and at peace.
    pub(super) fn back_up_at_last(&mut self) -> Checked {
        let up = self.up_members();
        if self.random.chance(25)
            && let Some(member) = self.random.pick(&up)
        {
            self.begin_backup_of(member)?;
        }
        while !self.backups.is_empty() {
            self.move_backups()?;
        }
        Ok(())
    }

    fn restore(&mut self, file: &[u8], index: u64) -> Checked {
        if self.random.chance(10) {
            self.restore_damaged(file)?;
        }
        let failed = |error| Violation(format!("the backup at {index} cannot be restored: {error}"));
        let power = Power::default();
        if self.random.chance(25) {
            power.fail_after(self.random.range(0, 200));
        }
        let mut disk = Disk::with(Default::default(), power.clone());
        let mut restored = restore_to(&disk, file);
        if restored.is_err() && power.off() {
            // What was restored so far is thrown away, as a file of another name is.
            disk = Disk::with(Default::default(), Power::default());
            restored = restore_to(&disk, file);
        }
        restored.map_err(failed)?;
        // What was restored is durable.
        let image = disk.image_after(Loss::All, &mut Random::new(0));
        let opened = contained(|| self.go_on(Disk::with(image, Power::default()), index));
        planted::take_witnessed();
        if let Some(wrong) = opened.map_err(failed)? {
            return violation(format!("restored from the backup at {index}, {wrong}"));
        }
        self.restored += 1;
        Ok(())
    }

    fn restore_damaged(&mut self, file: &[u8]) -> Checked {
        let mut file = file.to_vec();
        let at = self.random.range(0, file.len() as u64) as usize;
        if self.random.chance(50) {
            file[at] ^= 1 << self.random.range(0, 8);
        } else {
            file.truncate(at);
        }
        match restore_to(&Disk::with(Default::default(), Power::default()), &file) {
            Err(RaftStoreError::Snapshot(_)) => Ok(()),
            other => violation(format!("a backup damaged at {at} was restored: {other:?}")),
        }
    }

    /// Opens what was restored, and lets it apply a command. Says what is wrong.
    fn go_on(&self, disk: Disk, index: u64) -> Result<Option<String>, RaftStoreError> {
        let store = Store::on(disk)?;
        let config = RaftStoreConfig::member(RESTORED, vec![RESTORED]);
        let mut node = Node::open(store.clone(), &config, 1, 0)?;
        let position = queries::position(&store)?;
        let Some(expected) = self.oracle.at(index) else {
            return Ok(Some("it is of an entry that nobody applied".to_owned()));
        };
        if (position.applied_index, position.hash) != (index, expected.hash) {
            return Ok(Some(format!("it is at {} with another hash", position.applied_index)));
        }
        if digest(&StateView::open(&store)?) != Some(expected.digest) {
            return Ok(Some("it has other tables".to_owned()));
        }
        node.campaign_if_alone()?;
        node.process(&mut |_| {})?;
        let tick = Command {
            at_unix_ms: self.unix_ms(),
            actor: "restored".into(),
            kind: Some(Kind::Tick(Tick {})),
        };
        node.propose(tick.encode_to_vec())?;
        let progress = node.process(&mut |_| {})?;
        if node.applied() <= index || !matches!(progress.answers.as_slice(), [(_, Ok(_))]) {
            return Ok(Some(format!("it does not go on: {:?}", progress.answers)));
        }
        Ok(None)
    }
}

fn restore_to(disk: &Disk, file: &[u8]) -> Result<(), RaftStoreError> {
    contained(|| {
        let store = Store::on(disk.clone())?;
        read_into(&mut &file[..], &store, RESTORED, &[]).map(drop)
    })
}
