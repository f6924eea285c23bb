//! `GET /cluster/snapshot`: a backup of the coordinators' whole state, as of one moment, as a stream of bytes. What is in it is
//! the backend's affair; it ends with a hash of itself, so a stream that was cut is no backup.

use std::io::{self, Write};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::{Semaphore, mpsc};

use crate::api_error::ApiError;
use crate::backend::Backend;
use crate::gateway::Gateway;

/// Bytes that are sent together.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces that wait for a slow reader; the backup's thread waits after that.
const PIECES_MAX: usize = 4;
/// Backups at once: each keeps a version of the state from being tidied away.
static ONE_AT_A_TIME: Semaphore = Semaphore::const_new(1);

/// The handler.
pub(crate) async fn save<B: Backend>(State(gateway): State<Arc<Gateway<B>>>) -> Result<Response, ApiError> {
    let permit = ONE_AT_A_TIME
        .try_acquire()
        .map_err(|_| ApiError::unavailable("A backup is being taken already; try again when it is through."))?;
    let (pieces, received) = mpsc::channel(PIECES_MAX);
    let backend = gateway.ledger.backend.clone();
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let mut out = Pieces {
            pieces: pieces.clone(),
            buffer: Vec::with_capacity(PIECE_BYTES),
        };
        if let Err(error) = backend.save_snapshot(&mut out) {
            tracing::warn!(%error, "a backup was not finished");
            // The body ends as a broken one.
            let _ = pieces.blocking_send(Err(io::Error::other(error.to_string())));
        }
    });
    let body = stream::unfold(received, |mut received| async move {
        let piece = received.recv().await?;
        Some((piece, received))
    });
    let kind = HeaderValue::from_static("application/octet-stream");
    Ok(([(header::CONTENT_TYPE, kind)], Body::from_stream(body)).into_response())
}

/// Where the backup is written to. Blocks while the reader is slow; an error once it is gone.
struct Pieces {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE_BYTES));
        let sent = self.pieces.blocking_send(Ok(piece.into()));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads the backup any more"))
    }
}
