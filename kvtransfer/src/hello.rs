//! The handshake: what two agents tell each other on the first stream of a connection, sans-IO.
//!
//! Both send a [`Hello`] and both compare. Its layout never changes between protocol versions, so that agents of
//! different versions can still say what is wrong. A mismatch ends the connection with a sentence that carries both
//! sides' values; nobody retries it silently. Who the peer *is* was settled by TLS before; the name is for logs.

use crate::limits::NAME_BYTES_MAX;
use bytes::{BufMut, BytesMut};

/// First bytes of every hello.
const MAGIC: [u8; 4] = *b"BTKV";
/// Magic, version, digest, length of the name.
pub(crate) const HELLO_HEADER_BYTES: usize = 4 + 4 + 32 + 1;

/// One side's introduction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    /// Compatibility digest: model, geometry, dtype. Opaque here.
    pub(crate) digest: [u8; 32],
    pub(crate) name: String,
}

impl Hello {
    pub(crate) fn encode(&self) -> BytesMut {
        let mut out = BytesMut::with_capacity(HELLO_HEADER_BYTES + self.name.len());
        out.put_slice(&MAGIC);
        out.put_u32_le(self.version);
        out.put_slice(&self.digest);
        // The length was checked when the agent was bound.
        out.put_u8(self.name.len() as u8);
        out.put_slice(self.name.as_bytes());
        out
    }

    /// Bytes of the name that follow this header, if it is one.
    pub(crate) fn name_bytes(header: &[u8; HELLO_HEADER_BYTES]) -> Result<usize, String> {
        if !header.starts_with(&MAGIC) {
            return Err("it does not speak baton's KV transfer protocol".into());
        }
        let len = usize::from(header[HELLO_HEADER_BYTES - 1]);
        if len == 0 || len > NAME_BYTES_MAX {
            return Err(format!(
                "its name has {len} bytes; agents are named with 1 to {NAME_BYTES_MAX}"
            ));
        }
        Ok(len)
    }

    /// Puts a header and its name together. Bytes that are not text are shown as such: the name is for logs only.
    pub(crate) fn decode(header: &[u8; HELLO_HEADER_BYTES], name: &[u8]) -> Self {
        let [_, _, _, _, v0, v1, v2, v3, rest @ ..] = *header;
        let [digest @ .., _] = rest;
        Self {
            version: u32::from_le_bytes([v0, v1, v2, v3]),
            digest,
            name: String::from_utf8_lossy(name)
                .chars()
                .filter(|c| !c.is_control())
                .collect(),
        }
    }

    /// Why the two cannot work together, as a sentence with both sides' values.
    pub(crate) fn mismatch(&self, peer: &Self) -> Option<String> {
        if self.version != peer.version {
            return Some(format!(
                "{} speaks protocol version {}, {} speaks {}; run the same baton release on both",
                self.name, self.version, peer.name, peer.version
            ));
        }
        if self.digest != peer.digest {
            return Some(format!(
                "{} has compatibility digest {}, {} has {}; both must serve the same model with the same KV dtype and \
                 block geometry",
                self.name,
                hex(&self.digest),
                peer.name,
                hex(&peer.digest)
            ));
        }
        None
    }
}

/// The first eight bytes in hex: enough to tell digests apart.
fn hex(digest: &[u8; 32]) -> String {
    digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>()
        + "…"
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(version: u32, digest: u8, name: &str) -> Hello {
        Hello {
            version,
            digest: [digest; 32],
            name: name.into(),
        }
    }

    proptest! {
        #[test]
        fn round_trip(version in any::<u32>(), digest in any::<[u8; 32]>(), name in "[a-z0-9-]{1,64}") {
            let sent = Hello { version, digest, name };
            let wire = sent.encode();
            let (header, name) = wire.split_at(HELLO_HEADER_BYTES);
            let header: [u8; HELLO_HEADER_BYTES] = header.try_into().unwrap();
            prop_assert_eq!(Hello::name_bytes(&header), Ok(name.len()));
            prop_assert_eq!(Hello::decode(&header, name), sent);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            header in prop::array::uniform32(any::<u8>()),
            tail in prop::array::uniform9(any::<u8>()),
            name in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut all = [0; HELLO_HEADER_BYTES];
            all[..32].copy_from_slice(&header);
            all[32..].copy_from_slice(&tail);
            let _ = Hello::name_bytes(&all);
            let _ = Hello::decode(&all, &name);
        }
    }

    #[test]
    fn a_mismatch_names_both_sides_values() {
        let ours = hello(1, 0xab, "prefill-0");
        assert_eq!(ours.mismatch(&hello(1, 0xab, "decode-0")), None);
        let version = ours.mismatch(&hello(2, 0xab, "decode-0")).unwrap();
        assert!(
            version.contains("prefill-0 speaks protocol version 1, decode-0 speaks 2"),
            "{version}"
        );
        let digest = ours.mismatch(&hello(1, 0xcd, "decode-0")).unwrap();
        assert!(digest.contains("abababab") && digest.contains("cdcdcdcd"), "{digest}");
    }
}
