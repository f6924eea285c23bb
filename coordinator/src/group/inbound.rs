//! The gRPC service `Raft`: what other members send. Only a coordinator's certificate gets in, a stream speaks for the one
//! member whose name the certificate has, and nothing is decoded before that is settled.

use super::Group;
use super::address_book::AddressBook;
use baton_identity::{Role, is_named, require_role};
use baton_proto::raft::raft_server::Raft;
use baton_proto::raft::{
    ChangeReply, ChangeRequest, MemberStatus, MessagesEnd, RaftMessages, SnapshotPiece, SnapshotTaken, StatusRequest,
};
use baton_proto::state::Member;
use baton_raftstore::{Message, RaftStoreError, SnapshotChunk};
use prost::Message as _;
use protobuf::Message as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Time a caller has to say who it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for a whole snapshot to come.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(1800);

pub(crate) struct RaftService {
    pub(super) group: Arc<Group>,
    shutdown: CancellationToken,
    snapshots: Semaphore,
}

impl RaftService {
    pub(crate) fn new(group: Arc<Group>, shutdown: CancellationToken) -> Self {
        Self {
            group,
            shutdown,
            snapshots: Semaphore::new(1),
        }
    }

    fn book(&self) -> &AddressBook {
        &self.group.book
    }
}

/// Checks that the certificate is of the member that the caller says it is.
// tonic's Status is large, and it is what a service returns.
#[allow(clippy::result_large_err)]
fn introduce(book: &AddressBook, is_named: impl FnOnce(&str) -> bool, from: Option<Member>) -> Result<u64, Status> {
    let member = from.ok_or_else(|| Status::invalid_argument("the first message must say who sends it"))?;
    if !is_named(&member.name) {
        return Err(Status::permission_denied(
            "the caller's certificate is not that of the member it says it is",
        ));
    }
    book.greeted(&member)
        .map_err(|stranger| Status::permission_denied(stranger.to_string()))?;
    Ok(member.id)
}

/// A member's message, if it is what it says.
#[allow(clippy::result_large_err)]
fn read(me: u64, from: u64, encoded: &[u8]) -> Result<Message, Status> {
    let message = Message::parse_from_bytes(encoded)
        .map_err(|_| Status::invalid_argument("a message cannot be read; run the same baton release"))?;
    if message.from != from {
        return Err(Status::permission_denied(format!(
            "member {from} sent a message as member {}",
            message.from
        )));
    }
    if message.to != me {
        return Err(Status::invalid_argument(format!(
            "a message for member {}, and this is member {me}",
            message.to
        )));
    }
    Ok(message)
}

/// Work on the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RaftStoreError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Status::internal(error.to_string()))?
        .map_err(|error| Status::failed_precondition(error.to_string()))
}

#[tonic::async_trait]
impl Raft for RaftService {
    async fn messages(&self, request: Request<Streaming<RaftMessages>>) -> Result<Response<MessagesEnd>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        let certificates = request.peer_certs();
        let named = |name: &str| {
            let certificate = certificates.as_ref().and_then(|chain| chain.first());
            certificate.is_some_and(|certificate| is_named(certificate, Role::Coordinator, name))
        };
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(GREETING_TIMEOUT, inbound.message()).await;
        let mut next = first.map_err(|_| Status::deadline_exceeded("no message within 5 s"))??;
        let mut from = None;
        while let Some(batch) = next {
            let id = match from {
                Some(id) => id,
                None => {
                    self.group.is_of(batch.group.as_ref())?;
                    introduce(self.book(), named, batch.from)?
                }
            };
            from = Some(id);
            for encoded in &batch.messages {
                self.group.store.receive(read(self.group.id(), id, encoded)?);
            }
            next = tokio::select! {
                next = inbound.message() => next?,
                () = self.shutdown.cancelled() => return Err(Status::unavailable("this member is shutting down")),
            };
        }
        Ok(Response::new(MessagesEnd {}))
    }

    async fn snapshot(&self, request: Request<Streaming<SnapshotPiece>>) -> Result<Response<SnapshotTaken>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        let certificates = request.peer_certs();
        let named = |name: &str| {
            let certificate = certificates.as_ref().and_then(|chain| chain.first());
            certificate.is_some_and(|certificate| is_named(certificate, Role::Coordinator, name))
        };
        let mut inbound = request.into_inner();
        let _one = self
            .snapshots
            .try_acquire()
            .map_err(|_| Status::resource_exhausted("another snapshot is coming in"))?;
        let taken = async {
            let first = inbound.message().await?;
            let first = first.ok_or_else(|| Status::invalid_argument("an empty snapshot"))?;
            self.group.is_of(first.group.as_ref())?;
            let from = introduce(self.book(), named, first.from)?;
            let message = read(self.group.id(), from, &first.data)?;
            let store = self.group.store.clone();
            let mut sink = blocking(move || store.receive_snapshot(message)).await?;
            while let Some(piece) = inbound.message().await? {
                let chunk = SnapshotChunk::decode(piece.data)
                    .map_err(|_| Status::invalid_argument("a part of the snapshot cannot be read"))?;
                sink = blocking(move || sink.chunk(&chunk).map(|()| sink)).await?;
            }
            blocking(move || sink.finish()).await
        };
        tokio::select! {
            taken = tokio::time::timeout(SNAPSHOT_TIMEOUT, taken) => {
                taken.map_err(|_| Status::deadline_exceeded("the snapshot took too long"))??;
            }
            () = self.shutdown.cancelled() => return Err(Status::unavailable("this member is shutting down")),
        }
        Ok(Response::new(SnapshotTaken {}))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<MemberStatus>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        self.group
            .status()
            .map(Response::new)
            .map_err(|error| Status::unavailable(error.to_string()))
    }

    async fn change(&self, request: Request<ChangeRequest>) -> Result<Response<ChangeReply>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        self.group.passed_on(request.into_inner()).await?;
        Ok(Response::new(ChangeReply {}))
    }
}
