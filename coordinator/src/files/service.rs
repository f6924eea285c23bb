//! The gRPC service `Files`: what other members ask for and hand over. Only a coordinator's certificate gets in.

use std::sync::Arc;

use baton_identity::{Role, require_role};
use baton_proto::files::files_server::Files;
use baton_proto::files::{Chunk, ChunkName, PutReply};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{CHUNK_BYTES_MAX, Disk};

/// A chunk, with room for framing.
pub(crate) const MESSAGE_BYTES_MAX: usize = CHUNK_BYTES_MAX + 1024;

pub(crate) struct FilesService {
    pub(crate) disk: Arc<Disk>,
    /// Connections outlive the listener by a moment: from then on nothing is acknowledged, whose word nobody could ask for again.
    pub(crate) shutdown: CancellationToken,
}

impl FilesService {
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Disk) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        if self.shutdown.is_cancelled() {
            return Err(Status::unavailable("this coordinator is stopping"));
        }
        let disk = self.disk.clone();
        let done = tokio::task::spawn_blocking(move || work(&disk)).await;
        done.map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::unavailable(format!("the disk of this coordinator: {error}")))
    }
}

#[tonic::async_trait]
impl Files for FilesService {
    async fn put(&self, request: Request<Chunk>) -> Result<Response<PutReply>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        let data = request.into_inner().data;
        self.on_disk(move |disk| disk.put(&data)).await?;
        Ok(Response::new(PutReply {}))
    }

    async fn get(&self, request: Request<ChunkName>) -> Result<Response<Chunk>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        let hash = request.into_inner().hash;
        let hash = hash.as_ref().try_into();
        let hash = hash.map_err(|_| Status::invalid_argument("a chunk's name has 32 bytes"))?;
        let data = self.on_disk(move |disk| disk.get(&hash)).await?;
        let data = data.ok_or_else(|| Status::not_found("it is not here"))?;
        Ok(Response::new(Chunk { data }))
    }
}
