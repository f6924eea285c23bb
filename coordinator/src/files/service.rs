//! The gRPC service `Files`: what other members ask for and hand over. Only a coordinator's certificate gets in.

use std::sync::Arc;

use baton_identity::{Role, require_role};
use baton_proto::files::files_server::Files;
use baton_proto::files::{Chunk, ChunkName, PutReply};
use tonic::{Request, Response, Status};

use super::{CHUNK_BYTES_MAX, Disk};

/// A chunk, with room for framing.
pub(crate) const MESSAGE_BYTES_MAX: usize = CHUNK_BYTES_MAX + 1024;

pub(crate) struct FilesService(pub(crate) Arc<Disk>);

impl FilesService {
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Disk) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Status> {
        let disk = self.0.clone();
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
