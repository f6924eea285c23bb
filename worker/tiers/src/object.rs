//! The object store tier: one object per block, in a directory or an S3 bucket that several workers, even clusters, may share.
//!
//! ```text
//! <prefix>/<KV digest, hex>/<first byte of the name, hex>/<name, hex>      header (record.rs) + block
//! ```
//!
//! The digest keeps models apart, the name contains the tenant's salt. Objects are written once and never change: two workers
//! that put the same name put the same block, so nothing is conditional and the last one wins. What is read is
//! checked like everything else, and deleted where it is broken. There is no budget: a bucket's lifecycle rule, or `find
//! -atime` on a directory, decides how long blocks stay; a block that is gone is a miss.
//!
//! Not here: what to read and write (the core).

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::block_hash::BlockHash;
use bytes::Bytes;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ClientConfigKey, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig};

use crate::core::Read;
use crate::error::TierError;
use crate::memory::{Block, Pool};
use crate::record::{Entry, HEADER_BYTES, Shape};

/// A call that takes longer has failed; loads end sooner by their own deadlines.
const CALL_MAX: Duration = Duration::from_secs(10);
/// Attempts after the first: the core gives up on a store that keeps failing, and a block can be computed.
const RETRIES_MAX: usize = 1;

/// See the module.
#[derive(Debug)]
pub struct ObjectTier {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    shape: Shape,
}

impl ObjectTier {
    /// The store at `url`: `file:///directory`, or `s3://bucket/prefix` with endpoint, region and credentials from
    /// `variables` (`AWS_ENDPOINT`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ALLOW_HTTP`, ...), as a
    /// rule those of the environment. Contacts nobody yet.
    ///
    /// # Errors
    /// If the URL makes no sense or the settings contradict themselves.
    pub fn open(
        url: &str,
        shape: Shape,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, TierError> {
        let wrong = |reason: String| TierError::Object {
            url: url.to_owned(),
            reason,
        };
        let (store, prefix): (Arc<dyn ObjectStore>, Path) = if let Some(dir) = url.strip_prefix("file://") {
            if !dir.starts_with('/') {
                return Err(wrong("the directory must be absolute".into()));
            }
            std::fs::create_dir_all(dir).map_err(|error| wrong(error.to_string()))?;
            let store = LocalFileSystem::new_with_prefix(dir).map_err(|error| wrong(error.to_string()))?;
            (Arc::new(store), Path::default())
        } else if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(wrong("it names no bucket".into()));
            }
            let mut builder = AmazonS3Builder::new().with_bucket_name(bucket).with_retry(RetryConfig {
                max_retries: RETRIES_MAX,
                retry_timeout: CALL_MAX,
                ..RetryConfig::default()
            });
            for (key, value) in [
                (ClientConfigKey::Timeout, "5s"),
                (ClientConfigKey::ConnectTimeout, "2s"),
            ] {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            for (name, value) in variables {
                let key = name.starts_with("AWS_").then(|| name.to_ascii_lowercase().parse().ok());
                if let Some(key) = key.flatten() {
                    builder = builder.with_config(key, value);
                }
            }
            let store = builder.build().map_err(|error| wrong(error.to_string()))?;
            (
                Arc::new(store),
                Path::parse(prefix).map_err(|error| wrong(error.to_string()))?,
            )
        } else {
            return Err(wrong("it is of no known kind".into()));
        };
        Ok(ObjectTier { store, prefix, shape })
    }

    fn path(&self, name: &BlockHash) -> Path {
        let name = hex(name);
        let directory = self.prefix.clone().join(hex(&self.shape.kv_digest));
        directory.join(&name[..2]).join(name.as_str())
    }

    /// Puts a block, with the short name of its parent; false if it is not there now.
    pub async fn put(&self, name: BlockHash, parent: u64, block: Block) -> bool {
        let stamp = 0;
        let header = self.shape.header(Entry { name, parent, stamp }, block.as_ref());
        let parts = [Bytes::copy_from_slice(&header), Bytes::from_owner(block)];
        let path = self.path(&name);
        let put = self.store.put(&path, PutPayload::from_iter(parts));
        match tokio::time::timeout(CALL_MAX, put).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                tracing::warn!(%error, "a KV block could not be put into the object store");
                false
            }
            Err(_) => false,
        }
    }

    /// Gets a block, verified.
    pub async fn get(&self, name: BlockHash, pool: &Pool) -> Read<Block> {
        let read = match tokio::time::timeout(CALL_MAX, self.fetch(name, pool)).await {
            Ok(Ok(read)) => read,
            Ok(Err(object_store::Error::NotFound { .. })) => Read::Missing,
            Ok(Err(error)) => {
                tracing::warn!(%error, "a KV block could not be read from the object store");
                Read::Failed
            }
            Err(_) => Read::Failed,
        };
        if matches!(read, Read::Broken) {
            let path = self.path(&name);
            tracing::warn!(%path, "a KV block in the object store is not what it should be; deleted");
            let _ = tokio::time::timeout(CALL_MAX, self.store.delete(&path)).await;
        }
        read
    }

    async fn fetch(&self, name: BlockHash, pool: &Pool) -> object_store::Result<Read<Block>> {
        let object = self.store.get(&self.path(&name)).await?;
        // Nothing larger than a block is ever read into memory.
        if object.meta.size != (HEADER_BYTES + self.shape.block_bytes) as u64 {
            return Ok(Read::Broken);
        }
        let bytes = object.bytes().await?;
        let Some((header, block)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(Read::Broken);
        };
        if !self.shape.verify(&name, header, block) {
            return Ok(Read::Broken);
        }
        let filled = pool.fill(|to| {
            to.copy_from_slice(block);
            true
        });
        Ok(filled.map_or(Read::Failed, Read::Found))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        kv_digest: [0xab; 32],
        block_bytes: 300,
    };

    fn block(pool: &Pool, value: u8) -> Block {
        let fill = |bytes: &mut [u8]| {
            bytes.fill(value);
            true
        };
        pool.fill(fill).expect("room")
    }

    #[test]
    fn urls_are_judged() {
        let open = |url: &str| ObjectTier::open(url, SHAPE, []).map(|_| ());
        for url in ["", "x", "file://relative", "s3://", "http://host/x", "s3:///prefix"] {
            assert!(matches!(open(url), Err(TierError::Object { .. })), "{url}");
        }
        open("s3://bucket").expect("usable");
        open("s3://bucket/a/b").expect("usable");
    }

    #[tokio::test]
    async fn a_directory_is_a_store() {
        let dir = tempfile::tempdir().expect("a directory");
        let url = format!("file://{}/new", dir.path().display());
        let pool = Pool::new(300, 3);
        let tier = ObjectTier::open(&url, SHAPE, []).expect("opens");
        let name = [0x12; 16];
        assert!(matches!(tier.get(name, &pool).await, Read::Missing));
        assert!(tier.put(name, 5, block(&pool, 7)).await);
        let Read::Found(found) = tier.get(name, &pool).await else {
            panic!("it is there")
        };
        assert_eq!(found.as_ref(), [7; 300]);
        let foreign = Shape {
            kv_digest: [1; 32],
            ..SHAPE
        };
        let other = ObjectTier::open(&url, foreign, []).expect("opens");
        assert!(
            matches!(other.get(name, &pool).await, Read::Missing),
            "models are apart"
        );

        let file = dir
            .path()
            .join("new")
            .join("ab".repeat(32))
            .join("12")
            .join("12".repeat(16));
        let good = std::fs::read(&file).expect("one object per block");
        for cut in [0, 10, 128, 427] {
            std::fs::write(&file, &good[..cut]).expect("writes");
            assert!(matches!(tier.get(name, &pool).await, Read::Broken), "cut to {cut}");
            assert!(!file.exists(), "what is broken is removed");
        }
        let mut flipped = good.clone();
        flipped[200] ^= 1;
        std::fs::write(&file, flipped).expect("writes");
        assert!(matches!(tier.get(name, &pool).await, Read::Broken));
        assert!(matches!(tier.get(name, &pool).await, Read::Missing));
    }
}
