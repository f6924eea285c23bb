//! Carries out the core's actions on a tokio runtime: the disk's on its blocking threads, the store's as tasks. The core hands
//! over as many as its bounds allow, because it is asked only between two engine steps, which may be half a second
//! apart; here they wait for their turn, so that few run at once.

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::core::{Action, Done, Read};
use crate::disk::DiskTier;
use crate::memory::{Block, Pool};
use crate::object::ObjectTier;

/// At once: reads of the disk keep it busy, and writes leave compute its cores; the store's wait for the network.
const DISK_READS: usize = 4;
const DISK_WRITES: usize = 2;
const OBJECT_GETS: usize = 16;
const OBJECT_PUTS: usize = 4;
/// At once, for hints: most of the turns, so that a load that waits for such a read is not much worse off, and not all, so
/// that one that reads for itself need not wait for hints.
const DISK_READS_AHEAD: usize = 3;
const OBJECT_GETS_AHEAD: usize = 12;

#[derive(Debug)]
struct Turns {
    disk_reads: Semaphore,
    disk_writes: Semaphore,
    gets: Semaphore,
    puts: Semaphore,
    disk_reads_ahead: Semaphore,
    gets_ahead: Semaphore,
}

/// See the module.
#[derive(Debug)]
pub struct TierIo {
    pool: Pool,
    disk: Option<Arc<DiskTier>>,
    object: Option<Arc<ObjectTier>>,
    runtime: Handle,
    turns: Arc<Turns>,
}

impl TierIo {
    /// Runs on `runtime`; reads go into buffers of `pool`.
    pub fn new(pool: Pool, disk: Option<DiskTier>, object: Option<ObjectTier>, runtime: Handle) -> Self {
        TierIo {
            pool,
            disk: disk.map(Arc::new),
            object: object.map(Arc::new),
            runtime,
            turns: Arc::new(Turns {
                disk_reads: Semaphore::new(DISK_READS),
                disk_writes: Semaphore::new(DISK_WRITES),
                gets: Semaphore::new(OBJECT_GETS),
                puts: Semaphore::new(OBJECT_PUTS),
                disk_reads_ahead: Semaphore::new(DISK_READS_AHEAD),
                gets_ahead: Semaphore::new(OBJECT_GETS_AHEAD),
            }),
        }
    }

    /// Begins an action; what came of it goes to `deliver`, whatever happens.
    pub fn run<F>(&self, action: Action<Block>, deliver: impl FnOnce(Done<Block>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let (disk, object, pool) = (self.disk.clone(), self.object.clone(), self.pool.clone());
        let turns = self.turns.clone();
        self.runtime.spawn(async move {
            let turn = match &action {
                Action::WriteDisk { .. } => &turns.disk_writes,
                Action::ReadDisk { .. } => &turns.disk_reads,
                Action::PutObject { .. } => &turns.puts,
                Action::GetObject { .. } => &turns.gets,
            };
            let for_hints = match &action {
                Action::ReadDisk { ahead: true, .. } => Some(&turns.disk_reads_ahead),
                Action::GetObject { ahead: true, .. } => Some(&turns.gets_ahead),
                _ => None,
            };
            // Never closed, so always a permit.
            let hint = match for_hints {
                Some(hints) => Some(hints.acquire().await),
                None => None,
            };
            let turn = turn.acquire().await;
            let done = match action {
                Action::WriteDisk {
                    slot,
                    generation,
                    name,
                    parent,
                    block,
                } => {
                    let write = move || disk.is_some_and(|disk| disk.write(slot, name, parent, block.as_ref()));
                    Done::WroteDisk {
                        slot,
                        generation,
                        written: tokio::task::spawn_blocking(write).await.unwrap_or(false),
                    }
                }
                Action::ReadDisk {
                    slot, generation, name, ..
                } => {
                    let read = move || disk.map_or(Read::Missing, |disk| disk.read(slot, &name, &pool));
                    Done::ReadDisk {
                        slot,
                        generation,
                        name,
                        read: tokio::task::spawn_blocking(read).await.unwrap_or(Read::Failed),
                    }
                }
                Action::PutObject { name, parent, block } => Done::PutObject {
                    name,
                    written: match object {
                        Some(object) => object.put(name, parent, block).await,
                        None => false,
                    },
                },
                Action::GetObject { name, .. } => Done::GotObject {
                    name,
                    read: match object {
                        Some(object) => object.get(name, &pool).await,
                        None => Read::Missing,
                    },
                },
            };
            drop((turn, hint));
            deliver(done).await;
        });
    }
}
