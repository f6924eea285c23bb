//! Limits of files.

use serde::Deserialize;

use crate::error::GatewayError;

/// Largest file that chunks of 4 MiB can be named for in one command.
const FILE_BYTES_MAX: u64 = baton_state::bounds::FILE_CHUNKS_MAX as u64 * baton_state::bounds::CHUNK_BYTES_MAX;
/// Uploads at once hold a chunk each in memory.
const UPLOADS_MAX: usize = 256;

/// `[gateway.files]`. Every field has a default.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FilesConfig {
    /// Largest upload in bytes; 200 MB as OpenAI's for batches. At most 4 GiB.
    pub file_bytes_max: u64,
    /// Files of one project, or of one configured tenant.
    pub project_files_max: u64,
    /// Bytes in files of one project.
    pub project_bytes_max: u64,
    /// Bytes in files of all, which every coordinator has on its disk. What batches write counts, and is never refused.
    pub bytes_max: u64,
    /// Uploads at once, each of which holds up to 8 MiB in memory. One more is answered 429.
    pub uploads_max: usize,
    /// Time for a whole upload, in milliseconds; at most an hour less a minute, after which its first parts may be swept.
    pub upload_timeout_ms: u64,
}

impl Default for FilesConfig {
    fn default() -> Self {
        Self {
            file_bytes_max: 200_000_000,
            project_files_max: 10_000,
            project_bytes_max: 4 << 30,
            bytes_max: 16 << 30,
            uploads_max: 8,
            upload_timeout_ms: 600_000,
        }
    }
}

impl FilesConfig {
    pub(crate) fn validate(&self) -> Result<(), GatewayError> {
        let wrong = |name, problem: String| Err(GatewayError::Setting { name, problem });
        if !(1..=FILE_BYTES_MAX).contains(&self.file_bytes_max) {
            return wrong("files.file_bytes_max", format!("must be from 1 to {FILE_BYTES_MAX}"));
        }
        if !(1..=UPLOADS_MAX).contains(&self.uploads_max) {
            return wrong("files.uploads_max", format!("must be from 1 to {UPLOADS_MAX}"));
        }
        if !(1_000..=3_540_000).contains(&self.upload_timeout_ms) {
            return wrong("files.upload_timeout_ms", "must be from 1000 to 3540000".into());
        }
        Ok(())
    }
}
