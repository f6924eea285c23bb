//! `POST /v1/files`: multipart, in any order of its parts. The content goes to the chunk store as it comes; one chunk of it
//! is in memory. The file is there when the group has committed its name.

use std::time::Duration;

use axum::extract::Multipart;
use axum::extract::multipart::{Field, MultipartError, MultipartRejection};
use axum::{Extension, Json};
use baton_proto::state::{File, FileChunk, PutFile, command::Kind};
use baton_state::bounds::CHUNK_BYTES_MAX;
use bytes::{Bytes, BytesMut};
use serde_json::Value;

use super::{Calls, Files, Shared, new_id, shown};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::clock::unix_ms;

/// The one purpose that something here can be done with.
const PURPOSE: &str = "batch";
/// OpenAI's bounds of a file's life in seconds; and how long one for a batch lives by itself.
pub(crate) const EXPIRES_AFTER_S: std::ops::RangeInclusive<u64> = 3_600..=2_592_000;
/// Bytes of a part other than the file.
const TEXT_BYTES_MAX: usize = 1024;
/// Characters of a file's name that are kept.
const NAME_CHARS_MAX: usize = 120;
/// A client that sends nothing for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// The handler.
pub(super) async fn upload(
    Extension(files): Shared,
    Extension(caller): Calls,
    multipart: Result<Multipart, MultipartRejection>,
) -> Result<Json<Value>, ApiError> {
    let multipart = multipart.map_err(|_| ApiError {
        message: "The body must be multipart/form-data with the parts `file` and `purpose`.".into(),
        ..ApiError::media_type()
    })?;
    let _turn = files.uploads.try_acquire().map_err(|_| {
        let max = files.config.uploads_max;
        ApiError::overloaded(
            "queue_full",
            format!("{max} files are being uploaded already; retry."),
            1,
        )
    })?;
    let limit = Duration::from_millis(files.config.upload_timeout_ms);
    let read = tokio::time::timeout(limit, read(&files, multipart)).await;
    let parts = read.map_err(|_| ApiError::body_timeout())??;
    let file = commit(&files, &caller, parts).await?;
    Ok(Json(shown(&file)))
}

/// What came.
#[derive(Default)]
struct Parts {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    content: Option<Content>,
}

struct Content {
    filename: String,
    bytes: u64,
    chunks: Vec<FileChunk>,
}

async fn read(files: &Files, mut multipart: Multipart) -> Result<Parts, ApiError> {
    let mut parts = Parts::default();
    while let Some(field) = in_time(multipart.next_field()).await? {
        let name = field.name().unwrap_or_default().to_owned();
        let slot = match name.as_str() {
            "file" if parts.content.is_some() => return Err(ApiError::field("file", "`file` is there twice.")),
            "file" => {
                parts.content = Some(content(files, field).await?);
                continue;
            }
            "purpose" => &mut parts.purpose,
            "expires_after[anchor]" => &mut parts.anchor,
            "expires_after[seconds]" => &mut parts.seconds,
            _ => {
                let shown: String = name.chars().take(64).collect();
                return Err(ApiError::unsupported(&shown, format!("Unknown part `{shown}`.")));
            }
        };
        let text = text(field, &name).await?;
        if name == "purpose" && text != PURPOSE {
            // Before its content is read.
            return Err(wrong_purpose(&text));
        }
        if slot.replace(text).is_some() {
            return Err(ApiError::field(name.clone(), format!("`{name}` is there twice.")));
        }
    }
    Ok(parts)
}

fn wrong_purpose(purpose: &str) -> ApiError {
    let shown: String = purpose.chars().take(64).collect();
    let message = format!("`{shown}` is not a purpose that this server has a use for; it takes `{PURPOSE}`.");
    ApiError::field("purpose", message)
}

async fn in_time<T>(read: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
    match tokio::time::timeout(SILENCE_MAX, read).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(_)) => Err(ApiError::bad_request(
            "The multipart body broke off, or is not well formed.",
        )),
        Err(_) => Err(ApiError::body_timeout()),
    }
}

async fn text(mut field: Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(more) = in_time(field.chunk()).await? {
        if bytes.len() + more.len() > TEXT_BYTES_MAX {
            return Err(ApiError::field(
                name,
                format!("`{name}` is longer than {TEXT_BYTES_MAX} bytes."),
            ));
        }
        bytes.extend_from_slice(&more);
    }
    String::from_utf8(bytes).map_err(|_| ApiError::field(name, format!("`{name}` is not UTF-8.")))
}

async fn content(files: &Files, mut field: Field<'_>) -> Result<Content, ApiError> {
    let bytes_max = files.config.file_bytes_max;
    let mut content = Content {
        filename: clean(field.file_name().unwrap_or_default()),
        bytes: 0,
        chunks: Vec::new(),
    };
    let chunk_bytes = usize::try_from(CHUNK_BYTES_MAX).unwrap_or(usize::MAX);
    let mut buffer = BytesMut::new();
    while let Some(mut more) = in_time(field.chunk()).await? {
        content.bytes += more.len() as u64;
        if content.bytes > bytes_max {
            return Err(ApiError {
                param: Some("file".into()),
                message: format!("The file is larger than {bytes_max} bytes."),
                ..ApiError::body_too_large(0)
            });
        }
        while !more.is_empty() {
            let taken = more.split_to(more.len().min(chunk_bytes - buffer.len()));
            buffer.extend_from_slice(&taken);
            if buffer.len() == chunk_bytes {
                content.chunks.push(keep(files, buffer.split().freeze()).await?);
            }
        }
    }
    if !buffer.is_empty() {
        content.chunks.push(keep(files, buffer.freeze()).await?);
    }
    Ok(content)
}

async fn keep(files: &Files, data: Bytes) -> Result<FileChunk, ApiError> {
    let bytes = data.len() as u64;
    let kept = files.chunks.put(data).await;
    let hash = kept.map_err(|error| {
        tracing::warn!(%error, "a part of an upload could not be kept");
        ApiError::unavailable("The file could not be kept on enough disks; retry.")
    })?;
    Ok(FileChunk {
        hash: hash.to_vec().into(),
        bytes,
    })
}

async fn commit(files: &Files, caller: &Caller, parts: Parts) -> Result<File, ApiError> {
    let missing = |name: &str| ApiError::field(name, format!("`{name}` is missing."));
    let purpose = parts.purpose.ok_or_else(|| missing("purpose"))?;
    let content = parts.content.ok_or_else(|| missing("file"))?;
    let seconds = expires_after(parts.anchor.as_deref(), parts.seconds.as_deref())?;
    let now = unix_ms();
    let file = File {
        id: new_id(),
        owner: caller.owner(),
        filename: content.filename,
        purpose,
        bytes: content.bytes,
        created_unix_ms: now,
        expires_unix_ms: now + seconds * 1000,
        chunks: u32::try_from(content.chunks.len()).unwrap_or(u32::MAX),
    };
    let kind = Kind::PutFile(PutFile {
        file: Some(file.clone()),
        chunks: content.chunks,
        owner_files_max: files.config.project_files_max,
        owner_bytes_max: files.config.project_bytes_max,
        bytes_max: files.config.bytes_max,
    });
    files.change(caller.actor(), kind).await?;
    Ok(file)
}

/// Seconds that a file lives: what the client says, or OpenAI's month.
fn expires_after(anchor: Option<&str>, seconds: Option<&str>) -> Result<u64, ApiError> {
    let wrong = |name: &'static str, must: String| Err(ApiError::field(name, format!("`{name}` must be {must}.")));
    match (anchor, seconds) {
        (None, None) => Ok(*EXPIRES_AFTER_S.end()),
        (Some("created_at"), Some(seconds)) => match seconds.parse() {
            Ok(seconds) if EXPIRES_AFTER_S.contains(&seconds) => Ok(seconds),
            _ => {
                let (least, most) = EXPIRES_AFTER_S.into_inner();
                wrong("expires_after[seconds]", format!("from {least} to {most}"))
            }
        },
        (Some("created_at"), None) => wrong("expires_after[seconds]", "there too".into()),
        _ => wrong("expires_after[anchor]", "`created_at`".into()),
    }
}

/// A name to show: never a path, and without what a terminal or header could take for more than text.
fn clean(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let shown = last.chars().filter(|c| !c.is_control()).take(NAME_CHARS_MAX);
    let shown: String = shown.collect();
    if shown.trim().is_empty() {
        "upload".into()
    } else {
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_only_shown() {
        for (given, kept) in [
            ("requests.jsonl", "requests.jsonl"),
            ("../../etc/passwd", "passwd"),
            ("C:\\x\\y.jsonl", "y.jsonl"),
            ("a\r\nb\0\u{1b}[31m", "ab[31m"),
            ("dir/", "upload"),
            ("", "upload"),
        ] {
            assert_eq!(clean(given), kept, "{given:?}");
        }
        assert_eq!(clean(&"é".repeat(1000)).len(), 2 * NAME_CHARS_MAX);
    }

    #[test]
    fn lives_are_within_bounds() {
        assert_eq!(expires_after(None, None).unwrap(), 2_592_000);
        assert_eq!(expires_after(Some("created_at"), Some("3600")).unwrap(), 3_600);
        for (anchor, seconds) in [
            (None, Some("3600")),
            (Some("created_at"), None),
            (Some("last_active_at"), Some("3600")),
            (Some("created_at"), Some("3599")),
            (Some("created_at"), Some("-1")),
            (Some("created_at"), Some("18446744073709551616")),
        ] {
            assert!(expires_after(anchor, seconds).is_err(), "{anchor:?} {seconds:?}");
        }
    }
}
