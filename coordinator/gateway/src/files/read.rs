//! Reading a file: as a response, and line by line. One chunk is in memory at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::Path;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use baton_proto::state::{File, FileChunk};
use baton_state::view;
use bytes::{Buf, Bytes, BytesMut};

use super::chunks::{ChunkError, ChunkHash};
use super::{Calls, Files, Shared};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;

/// A file's chunks, one after the other.
pub(super) struct Chunks {
    files: Arc<Files>,
    left: VecDeque<FileChunk>,
}

impl Chunks {
    pub async fn of(files: Arc<Files>, file: &File) -> Result<Self, ApiError> {
        let (id, count) = (file.id.clone(), file.chunks as usize);
        let named = files.state(move |tables| {
            let mut named = VecDeque::new();
            while named.len() < count {
                let page = view::chunks_after(&*tables, &id, named.len() as u64, view::PAGE_RECORDS_MAX);
                let page = page.map_err(StoreError::from)?;
                if page.is_empty() {
                    // Deleted meanwhile.
                    return Err(ApiError::no_such("File object", &id));
                }
                named.extend(page);
            }
            Ok(named)
        });
        let left = named.await?;
        Ok(Self { files, left })
    }

    pub async fn next(&mut self) -> Option<Result<Bytes, ChunkError>> {
        let chunk = self.left.pop_front()?;
        let hash: Result<ChunkHash, _> = chunk.hash.as_ref().try_into();
        Some(match hash {
            Ok(hash) => self.files.chunks.get(hash).await,
            Err(_) => Err(ChunkError::Missing),
        })
    }
}

/// `GET /v1/files/{id}/content`. Ends early, with a broken connection, if a part cannot be had.
pub(super) async fn content(
    Extension(files): Shared,
    Extension(caller): Calls,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = files.file(&caller, &id).await?;
    let mut chunks = Chunks::of(files, &file).await?;
    // The first one here, so that a file that is not there is an error and not an empty answer.
    let first = match chunks.next().await {
        None => Bytes::new(),
        Some(Ok(first)) => first,
        Some(Err(error)) => {
            return Err(ApiError::unavailable(format!(
                "The file cannot be read: {error}; retry."
            )));
        }
    };
    let rest = futures_util::stream::unfold(chunks, |mut chunks| async {
        let next = chunks.next().await?;
        Some((next, chunks))
    });
    let body = futures_util::stream::StreamExt::chain(futures_util::stream::iter([Ok(first)]), rest);
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        ),
        (header::CONTENT_LENGTH, HeaderValue::from(file.bytes)),
        // Never shown by a browser as a page of this host.
        (header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment")),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// A file line by line; empty lines are left out, and lines end with LF or CR LF.
pub(crate) struct Lines {
    chunks: Chunks,
    buffer: BytesMut,
    /// Of the buffer, looked through without finding an end.
    seen: usize,
    number: u32,
    line_bytes_max: usize,
    ended: bool,
}

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// From 1, empty ones counted.
    pub number: u32,
    /// `None` if it is longer than may be.
    pub text: Option<Bytes>,
}

impl Lines {
    pub async fn of(files: Arc<Files>, file: &File, line_bytes_max: usize) -> Result<Self, ApiError> {
        Ok(Self {
            chunks: Chunks::of(files, file).await?,
            buffer: BytesMut::new(),
            seen: 0,
            number: 0,
            line_bytes_max,
            ended: false,
        })
    }

    /// The next line that is not empty.
    pub async fn next(&mut self) -> Result<Option<Line>, ChunkError> {
        let mut too_long = false;
        loop {
            if let Some(at) = self.buffer[self.seen..].iter().position(|byte| *byte == b'\n') {
                let mut text = self.buffer.split_to(self.seen + at).freeze();
                self.buffer.advance(1);
                self.seen = 0;
                self.number = self.number.saturating_add(1);
                if text.last() == Some(&b'\r') {
                    text.truncate(text.len() - 1);
                }
                if let Some(line) = self.line(text, too_long) {
                    return Ok(Some(line));
                }
                too_long = false;
                continue;
            }
            self.seen = self.buffer.len();
            if self.seen > self.line_bytes_max {
                too_long = true;
                self.buffer.clear();
                self.seen = 0;
            }
            if self.ended {
                let text = self.buffer.split().freeze();
                self.seen = 0;
                self.number = self.number.saturating_add(1);
                return Ok(self.line(text, too_long));
            }
            match self.chunks.next().await {
                None => self.ended = true,
                Some(chunk) => self.buffer.extend_from_slice(&chunk?),
            }
        }
    }

    fn line(&self, text: Bytes, too_long: bool) -> Option<Line> {
        let number = self.number;
        if too_long || text.len() > self.line_bytes_max {
            return Some(Line { number, text: None });
        }
        (!text.trim_ascii().is_empty()).then_some(Line {
            number,
            text: Some(text),
        })
    }
}
