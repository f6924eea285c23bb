//! Calls to the other members for chunks. A connection is kept as long as it works and the member is where it was.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_gateway::ChunkHash;
use baton_proto::files::files_client::FilesClient;
use baton_proto::files::{Chunk, ChunkName};
use bytes::Bytes;
use tokio::sync::Semaphore;
use tonic::transport::Channel;

use super::service::MESSAGE_BYTES_MAX;
use crate::group::Group;

/// Chunks on their way to or from one member at once, so that 4 MiB each is all they hold: streams of one connection are few.
const AT_ONCE: usize = 4;

pub(super) struct Peers {
    group: Arc<Group>,
    members: Mutex<HashMap<u64, Arc<Peer>>>,
}

struct Peer {
    turns: Semaphore,
    channel: tokio::sync::Mutex<Option<(String, Channel)>>,
}

impl Peers {
    pub fn new(group: Arc<Group>) -> Self {
        Self {
            group,
            members: Mutex::default(),
        }
    }

    /// Has a member keep a chunk; durable there on `Ok`.
    pub async fn put(&self, id: u64, data: Bytes) -> Result<(), String> {
        let peer = self.peer(id);
        let _turn = peer.turns.acquire().await.map_err(|error| error.to_string())?;
        let channel = self.channel(&peer, id).await?;
        let put = client(channel).put(Chunk { data }).await;
        self.judge(&peer, put).await.map(|_| ())
    }

    /// A member's chunk.
    pub async fn get(&self, id: u64, hash: ChunkHash) -> Result<Bytes, String> {
        let peer = self.peer(id);
        let _turn = peer.turns.acquire().await.map_err(|error| error.to_string())?;
        let channel = self.channel(&peer, id).await?;
        let name = ChunkName {
            hash: hash.to_vec().into(),
        };
        let got = client(channel).get(name).await;
        let data = self.judge(&peer, got).await?.data;
        if *blake3::hash(&data).as_bytes() == hash {
            Ok(data)
        } else {
            Err("it gave something else".into())
        }
    }

    /// A connection that failed is made anew next time.
    async fn judge<T>(&self, peer: &Peer, answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T, String> {
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => {
                if status.code() != tonic::Code::NotFound {
                    *peer.channel.lock().await = None;
                }
                Err(status.message().to_owned())
            }
        }
    }

    async fn channel(&self, peer: &Peer, id: u64) -> Result<Channel, String> {
        let member = self.group.member(id).ok_or("it is not known where the member is")?;
        let mut kept = peer.channel.lock().await;
        if let Some((_, channel)) = kept.as_ref().filter(|(addr, _)| *addr == member.cluster_addr) {
            return Ok(channel.clone());
        }
        let channel = self.group.connect(&member).await?;
        *kept = Some((member.cluster_addr, channel.clone()));
        Ok(channel)
    }

    fn peer(&self, id: u64) -> Arc<Peer> {
        let mut members: MutexGuard<'_, _> = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = members.entry(id).or_insert_with(|| {
            Arc::new(Peer {
                turns: Semaphore::new(AT_ONCE),
                channel: tokio::sync::Mutex::default(),
            })
        });
        peer.clone()
    }
}

fn client(channel: Channel) -> FilesClient<Channel> {
    FilesClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}
