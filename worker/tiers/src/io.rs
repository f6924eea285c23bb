//! Carries out the core's actions on a tokio runtime: the disk's on its blocking threads, the store's as tasks. How many are
//! under way at once is the core's bound; nothing here queues.

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::Handle;

use crate::core::{Action, Done, Read};
use crate::disk::DiskTier;
use crate::memory::{Block, Pool};
use crate::object::ObjectTier;

/// See the module.
#[derive(Debug)]
pub struct TierIo {
    pool: Pool,
    disk: Option<Arc<DiskTier>>,
    object: Option<Arc<ObjectTier>>,
    runtime: Handle,
}

impl TierIo {
    /// Runs on `runtime`; reads go into buffers of `pool`.
    pub fn new(pool: Pool, disk: Option<DiskTier>, object: Option<ObjectTier>, runtime: Handle) -> Self {
        TierIo {
            pool,
            disk: disk.map(Arc::new),
            object: object.map(Arc::new),
            runtime,
        }
    }

    /// Begins an action; what came of it goes to `deliver`, whatever happens.
    pub fn run<F>(&self, action: Action<Block>, deliver: impl FnOnce(Done<Block>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let (disk, object, pool) = (self.disk.clone(), self.object.clone(), self.pool.clone());
        self.runtime.spawn(async move {
            let done = match action {
                Action::WriteDisk {
                    slot,
                    generation,
                    name,
                    block,
                } => {
                    let write = move || disk.is_some_and(|disk| disk.write(slot, name, block.as_ref()));
                    Done::WroteDisk {
                        slot,
                        generation,
                        written: tokio::task::spawn_blocking(write).await.unwrap_or(false),
                    }
                }
                Action::ReadDisk { slot, generation, name } => {
                    let read = move || disk.map_or(Read::Missing, |disk| disk.read(slot, &name, &pool));
                    Done::ReadDisk {
                        slot,
                        generation,
                        name,
                        read: tokio::task::spawn_blocking(read).await.unwrap_or(Read::Failed),
                    }
                }
                Action::PutObject { name, block } => Done::PutObject {
                    name,
                    written: match object {
                        Some(object) => object.put(name, block).await,
                        None => false,
                    },
                },
                Action::GetObject { name } => Done::GotObject {
                    name,
                    read: match object {
                        Some(object) => object.get(name, &pool).await,
                        None => Read::Missing,
                    },
                },
            };
            deliver(done).await;
        });
    }
}
