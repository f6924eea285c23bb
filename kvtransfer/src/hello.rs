//! The handshake: what two agents tell each other on the first stream of a connection, sans-IO.
//!
//! Both send a [`Hello`] and both compare. Its layout never changes between protocol versions, so that agents of
//! different versions can still say what is wrong. A mismatch ends the connection with a sentence that carries both
//! sides' values; nobody retries it silently. Who the peer *is* was settled by TLS before; the name is for logs.
//!
//! After the name may follow what else a side can do: a length (u16, little-endian) and as many bytes of items, each a
//! tag (u8), a length (u16) and a body. Unknown items are skipped, and a hello may end before the length, so that
//! agents with and without a feature understand each other.

use crate::limits::NAME_BYTES_MAX;
use bytes::{BufMut, BytesMut};

/// First bytes of every hello.
const MAGIC: [u8; 4] = *b"BTKV";
/// Magic, version, digest, length of the name.
pub(crate) const HELLO_HEADER_BYTES: usize = 4 + 4 + 32 + 1;

/// Most bytes of the items. Those there are take a tenth; the rest is for later versions.
const ITEMS_BYTES_MAX: usize = 1022;
/// Most bytes after the name: the items and their length.
pub(crate) const TAIL_BYTES_MAX: usize = 2 + ITEMS_BYTES_MAX;

/// Item: the host the agent runs on.
const ITEM_HOST: u8 = 1;
/// Item: an offer of shared memory.
const ITEM_OFFER: u8 = 2;
/// Item, without a body: the agent listens on TCP, too, on the same port.
const ITEM_TCP: u8 = 3;
/// Item: the agent has NIXL turned on.
const ITEM_NIXL: u8 = 4;

/// Names a host as long as it runs: equal on both sides if they run on one kernel.
pub(crate) type HostId = [u8; 16];

/// Where and with what secrets the peer that is told this, and only that peer, may ask for shared memory, once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Names the Unix socket.
    pub(crate) socket: [u8; 16],
    /// Names the offer there.
    pub(crate) ticket: [u8; 16],
    /// What the one who asks proves itself with.
    pub(crate) asker_secret: [u8; 32],
    /// What the one who is asked proves itself with.
    pub(crate) owner_secret: [u8; 32],
}

/// Bytes of an [`Offer`] on the wire.
const OFFER_BYTES: usize = 16 + 16 + 32 + 32;

/// Without the secrets: hellos are logged.
impl std::fmt::Debug for Offer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offer").finish_non_exhaustive()
    }
}

/// One side's introduction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    /// Compatibility digest: model, geometry, dtype. Opaque here.
    pub(crate) digest: [u8; 32],
    pub(crate) name: String,
    /// Set if the agent can share memory with others on its host.
    pub(crate) host: Option<HostId>,
    /// Set in an answer to an agent on the same host.
    pub(crate) offer: Option<Offer>,
    /// Whether the agent takes pushes over TCP on the port of its UDP socket.
    pub(crate) tcp: bool,
    /// Set if the agent reads through NIXL and can be read from: how many pushes a link takes at once.
    pub(crate) nixl: Option<u32>,
}

impl Hello {
    pub(crate) fn encode(&self) -> BytesMut {
        let mut items = BytesMut::new();
        if let Some(host) = &self.host {
            put_item(&mut items, ITEM_HOST, &[host]);
        }
        if let Some(offer) = &self.offer {
            let parts: [&[u8]; 4] = [&offer.socket, &offer.ticket, &offer.asker_secret, &offer.owner_secret];
            put_item(&mut items, ITEM_OFFER, &parts);
        }
        if self.tcp {
            put_item(&mut items, ITEM_TCP, &[]);
        }
        if let Some(pushes_max) = self.nixl {
            put_item(&mut items, ITEM_NIXL, &[&pushes_max.to_le_bytes()]);
        }
        let mut out = BytesMut::with_capacity(HELLO_HEADER_BYTES + self.name.len() + 2 + items.len());
        out.put_slice(&MAGIC);
        out.put_u32_le(self.version);
        out.put_slice(&self.digest);
        // The length was checked when the agent was bound.
        out.put_u8(self.name.len() as u8);
        out.put_slice(self.name.as_bytes());
        // A few fixed items: far below TAIL_BYTES_MAX.
        out.put_u16_le(items.len() as u16);
        out.put_slice(&items);
        out
    }

    /// Takes a hello off a stream on which other bytes follow it: `None` until it is whole, else the hello and its length.
    ///
    /// # Errors
    /// What comes is no hello.
    pub(crate) fn take(bytes: &[u8]) -> Result<Option<(Self, usize)>, String> {
        let Some((header, rest)) = bytes.split_first_chunk::<HELLO_HEADER_BYTES>() else {
            return Ok(None);
        };
        let Some((name, tail)) = rest.split_at_checked(Self::name_bytes(header)?) else {
            return Ok(None);
        };
        let Some((len, items)) = tail.split_first_chunk::<2>() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_le_bytes(*len));
        if len > ITEMS_BYTES_MAX {
            return Err(format!(
                "its hello has {len} bytes of items, {ITEMS_BYTES_MAX} at most are taken"
            ));
        }
        if items.len() < len {
            return Ok(None);
        }
        let tail = &tail[..2 + len];
        Ok(Some((
            Self::decode(header, name, tail),
            HELLO_HEADER_BYTES + name.len() + tail.len(),
        )))
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

    /// Puts a header, its name and the bytes after that together. Bytes that are not text are shown as such: the name
    /// is for logs only. Items that do not make sense are as good as none.
    pub(crate) fn decode(header: &[u8; HELLO_HEADER_BYTES], name: &[u8], tail: &[u8]) -> Self {
        let [_, _, _, _, v0, v1, v2, v3, rest @ ..] = *header;
        let [digest @ .., _] = rest;
        let (mut host, mut offer, mut tcp, mut nixl) = (None, None, false, None);
        let mut items = take_sized(tail).map_or(&[][..], |(items, _)| items);
        while let Some((&tag, rest)) = items.split_first() {
            let Some((body, rest)) = take_sized(rest) else { break };
            match tag {
                ITEM_HOST => host = body.try_into().ok(),
                ITEM_OFFER => offer = Offer::decode(body),
                ITEM_TCP => tcp = true,
                ITEM_NIXL => nixl = body.try_into().ok().map(u32::from_le_bytes),
                _ => {}
            }
            items = rest;
        }
        Self {
            host,
            offer,
            tcp,
            nixl,
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

impl Offer {
    fn decode(body: &[u8]) -> Option<Self> {
        let mut body = <[u8; OFFER_BYTES]>::try_from(body).ok()?.into_iter();
        // Evaluated in the order written, which is the order on the wire.
        Some(Self {
            socket: std::array::from_fn(|_| body.next().unwrap_or(0)),
            ticket: std::array::from_fn(|_| body.next().unwrap_or(0)),
            asker_secret: std::array::from_fn(|_| body.next().unwrap_or(0)),
            owner_secret: std::array::from_fn(|_| body.next().unwrap_or(0)),
        })
    }
}

fn put_item(out: &mut BytesMut, tag: u8, parts: &[&[u8]]) {
    out.put_u8(tag);
    // Items are a few dozen bytes.
    out.put_u16_le(parts.iter().map(|part| part.len()).sum::<usize>() as u16);
    parts.iter().for_each(|part| out.put_slice(part));
}

/// A length, as many bytes, and what follows them.
fn take_sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(u16::from_le_bytes(*len).into())
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
            host: None,
            offer: None,
            tcp: false,
            nixl: None,
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            version in any::<u32>(), digest in any::<[u8; 32]>(), name in "[a-z0-9-]{1,64}",
            host in any::<Option<[u8; 16]>>(),
            offer in any::<Option<([u8; 16], [u8; 16], [u8; 32], [u8; 32])>>(),
            tcp in any::<bool>(),
            nixl in any::<Option<u32>>(),
            unknown in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let offer = offer.map(|(socket, ticket, asker_secret, owner_secret)|
                Offer { socket, ticket, asker_secret, owner_secret });
            let sent = Hello { version, digest, name, host, offer, tcp, nixl };
            let wire = sent.encode();
            let (header, rest) = wire.split_at(HELLO_HEADER_BYTES);
            let header: [u8; HELLO_HEADER_BYTES] = header.try_into().unwrap();
            let len = Hello::name_bytes(&header).unwrap();
            let (name, tail) = rest.split_at(len);
            prop_assert!(tail.len() <= TAIL_BYTES_MAX);
            prop_assert_eq!(&Hello::decode(&header, name, tail), &sent);
            // An agent that knows nothing of items ends here.
            let plain = Hello { host: None, offer: None, tcp: false, nixl: None, ..sent.clone() };
            prop_assert_eq!(Hello::decode(&header, name, &[]), plain);
            // And one that knows more has items of its own.
            let mut items = BytesMut::new();
            put_item(&mut items, 200, &[&unknown]);
            items.put_slice(&tail[2..]);
            let mut longer = BytesMut::new();
            longer.put_u16_le(items.len() as u16);
            longer.put_slice(&items);
            prop_assert_eq!(&Hello::decode(&header, name, &longer), &sent);
            // On a stream: nothing before it is whole, and nothing of what follows.
            for part in 0..wire.len() {
                prop_assert_eq!(Hello::take(&wire[..part]), Ok(None));
            }
            let followed = [&wire[..], &unknown].concat();
            prop_assert_eq!(Hello::take(&followed), Ok(Some((sent, wire.len()))));
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            header in prop::array::uniform32(any::<u8>()),
            tail in prop::array::uniform9(any::<u8>()),
            name in prop::collection::vec(any::<u8>(), 0..80),
            items in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut all = [0; HELLO_HEADER_BYTES];
            all[..32].copy_from_slice(&header);
            all[32..].copy_from_slice(&tail);
            let _ = Hello::name_bytes(&all);
            let _ = Hello::decode(&all, &name, &items);
            let _ = Hello::take(&items);
            let _ = Hello::take(&[&all[..], &name, &items].concat());
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
