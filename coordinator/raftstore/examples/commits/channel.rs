//! Members of one process that reach each other through their queues; snapshots go by a thread each.

use baton_raftstore::{Message, OutgoingSnapshot, Peers, RaftStore};
use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// Who can be reached, by id. Taking a member out cuts it off, in both directions.
#[derive(Clone, Default)]
pub struct Channels(Arc<RwLock<BTreeMap<u64, RaftStore>>>);

impl Channels {
    pub fn connect(&self, id: u64, store: &RaftStore) {
        self.0.write().unwrap().insert(id, store.clone());
    }

    #[allow(dead_code, reason = "the benchmark cuts nobody off")]
    pub fn cut(&self, id: u64) {
        let cut = self.0.write().unwrap().remove(&id);
        drop(cut);
    }

    /// The sending side of member `from`.
    pub fn peers(&self, from: u64) -> ChannelPeers {
        ChannelPeers {
            from,
            channels: self.clone(),
        }
    }

    fn get(&self, from: u64, to: u64) -> Option<RaftStore> {
        let members = self.0.read().unwrap();
        members.contains_key(&from).then(|| members.get(&to).cloned())?
    }

    /// Closes all members.
    pub fn close(&self) {
        let members = std::mem::take(&mut *self.0.write().unwrap());
        for store in members.values() {
            store.close();
        }
    }
}

pub struct ChannelPeers {
    from: u64,
    channels: Channels,
}

impl Peers for ChannelPeers {
    fn send(&mut self, message: Message) {
        if let Some(store) = self.channels.get(self.from, message.to) {
            store.receive(message);
        }
    }

    fn send_snapshot(&mut self, mut snapshot: OutgoingSnapshot) {
        let Some(store) = self.channels.get(self.from, snapshot.to()) else {
            return;
        };
        std::thread::spawn(move || {
            let mut send = || {
                let mut sink = store.receive_snapshot(snapshot.message().clone())?;
                while let Some(chunk) = snapshot.next_chunk()? {
                    sink.chunk(&chunk)?;
                }
                sink.finish()
            };
            if send().is_ok() {
                snapshot.delivered();
            }
        });
    }
}
