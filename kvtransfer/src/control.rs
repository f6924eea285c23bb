//! What agents tell each other besides bytes: messages in the FINISH of a push to the control window, sans-IO.
//! Integers are little-endian. Every transport that carries pushes carries these, and their retries and
//! acknowledgements are a push's.
//!
//! ```text
//! 1 NOTIFY   payload
//! 2 READ     export u64, window u64, port and address, notify flag u8, its length u32, its bytes,
//!            count u32, count × (owner's offset u64, reader's offset u64, len u64)
//! 3 BEAT     export u64, window u64 (0: none)
//! 4 RELEASE  export u64
//! ```

use crate::Refusal;
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::ranges::Descriptor;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::net::SocketAddr;

const NOTIFY: u8 = 1;
const READ: u8 = 2;
const BEAT: u8 = 3;
const RELEASE: u8 = 4;

/// Longest address as text: an IPv6 one with scope and port.
const ADDRESS_BYTES_MAX: usize = 80;

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Control {
    /// For the peer's application.
    Notify(Bytes),
    /// Push pieces of an export into my window.
    Read(ReadRequest),
    /// I still want the export, and wait for the read into this window.
    Beat { export: u64, window: Option<u64> },
    /// I do not want the export any more.
    Release { export: u64 },
}

/// What a reader asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReadRequest {
    pub(crate) export: u64,
    pub(crate) window: u64,
    /// Where the reader's agent is reached.
    pub(crate) reader: SocketAddr,
    /// What the owner is told once the read is done.
    pub(crate) notification: Option<Bytes>,
    /// From the owner's memory (`local`) to the reader's (`remote`).
    pub(crate) pieces: Vec<Descriptor>,
}

impl Control {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        match self {
            Self::Notify(payload) => {
                out.put_u8(NOTIFY);
                out.put_slice(payload);
            }
            Self::Read(read) => {
                out.put_u8(READ);
                out.put_u64_le(read.export);
                out.put_u64_le(read.window);
                let address = read.reader.to_string();
                out.put_u8(address.len() as u8);
                out.put_slice(address.as_bytes());
                let notification = read.notification.as_deref().unwrap_or_default();
                out.put_u8(u8::from(read.notification.is_some()));
                out.put_u32_le(notification.len() as u32);
                out.put_slice(notification);
                out.put_u32_le(read.pieces.len() as u32);
                for piece in &read.pieces {
                    out.put_u64_le(piece.local as u64);
                    out.put_u64_le(piece.remote as u64);
                    out.put_u64_le(piece.len as u64);
                }
            }
            Self::Beat { export, window } => {
                out.put_u8(BEAT);
                out.put_u64_le(*export);
                out.put_u64_le(window.unwrap_or(0));
            }
            Self::Release { export } => {
                out.put_u8(RELEASE);
                out.put_u64_le(*export);
            }
        }
        out.freeze()
    }

    /// Reads a message; `pieces_max` bounds a read's descriptors.
    pub(crate) fn decode(message: Bytes, pieces_max: usize) -> Result<Self, Refusal> {
        Self::parse(message, pieces_max).ok_or(Refusal::BadControl)
    }

    fn parse(mut from: Bytes, pieces_max: usize) -> Option<Self> {
        let control = match from.try_get_u8().ok()? {
            NOTIFY if from.len() <= PAYLOAD_BYTES_MAX => return Some(Self::Notify(from)),
            READ => {
                let (export, window) = (from.try_get_u64_le().ok()?, from.try_get_u64_le().ok()?);
                let len = usize::from(from.try_get_u8().ok()?);
                let address = split(&mut from, len, ADDRESS_BYTES_MAX)?;
                let reader = std::str::from_utf8(&address).ok()?.parse().ok()?;
                let wanted = from.try_get_u8().ok()? != 0;
                let len = from.try_get_u32_le().ok()? as usize;
                let notification = split(&mut from, len, PAYLOAD_BYTES_MAX)?;
                let count = from.try_get_u32_le().ok()? as usize;
                if count > pieces_max || from.len() != count * 24 {
                    return None;
                }
                let mut pieces = Vec::with_capacity(count);
                while from.has_remaining() {
                    let mut number = || usize::try_from(from.try_get_u64_le().ok()?).ok();
                    pieces.push(Descriptor {
                        local: number()?,
                        remote: number()?,
                        len: number()?,
                    });
                }
                Self::Read(ReadRequest {
                    export,
                    window,
                    reader,
                    notification: wanted.then_some(notification),
                    pieces,
                })
            }
            BEAT => Self::Beat {
                export: from.try_get_u64_le().ok()?,
                window: Some(from.try_get_u64_le().ok()?).filter(|&window| window != 0),
            },
            RELEASE => Self::Release {
                export: from.try_get_u64_le().ok()?,
            },
            _ => return None,
        };
        from.is_empty().then_some(control)
    }
}

fn split(from: &mut Bytes, len: usize, len_max: usize) -> Option<Bytes> {
    (len <= len_max && len <= from.len()).then(|| from.split_to(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn control() -> impl Strategy<Value = Control> {
        let payload = || prop::collection::vec(any::<u8>(), 0..50).prop_map(Bytes::from);
        let piece = (any::<usize>(), any::<usize>(), any::<usize>()).prop_map(|(local, remote, len)| Descriptor {
            local,
            remote,
            len,
        });
        let pieces = prop::collection::vec(piece, 0..20);
        prop_oneof![
            payload().prop_map(Control::Notify),
            (
                any::<u64>(),
                any::<u64>(),
                any::<[u8; 16]>(),
                any::<u16>(),
                prop::option::of(payload()),
                pieces
            )
                .prop_map(
                    |(export, window, ip, port, notification, pieces)| Control::Read(ReadRequest {
                        export,
                        window,
                        reader: SocketAddr::from((ip, port)),
                        notification,
                        pieces,
                    })
                ),
            (any::<u64>(), prop::option::of(1..u64::MAX)).prop_map(|(export, window)| Control::Beat { export, window }),
            any::<u64>().prop_map(|export| Control::Release { export }),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(control in control()) {
            prop_assert_eq!(Control::decode(control.encode(), 20), Ok(control));
        }

        #[test]
        fn damaged_messages_are_refused_or_something_else_but_never_panic(
            control in control(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in 0usize..40,
            noise in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut wire = control.encode().to_vec();
            let at = at.index(wire.len());
            wire[at] = byte;
            wire.truncate(wire.len().saturating_sub(cut));
            let _ = Control::decode(wire.into(), 20);
            let _ = Control::decode(noise.into(), 20);
        }
    }

    #[test]
    fn counts_are_bounded() {
        let read = Control::Read(ReadRequest {
            export: 1,
            window: 2,
            reader: "127.0.0.1:7".parse().unwrap(),
            notification: None,
            pieces: vec![
                Descriptor {
                    local: 0,
                    remote: 0,
                    len: 8
                };
                3
            ],
        });
        assert_eq!(Control::decode(read.encode(), 2), Err(Refusal::BadControl));
        assert_eq!(Control::decode(Bytes::new(), 2), Err(Refusal::BadControl));
        assert_eq!(
            Control::decode(Bytes::from(vec![NOTIFY; PAYLOAD_BYTES_MAX + 2]), 2),
            Err(Refusal::BadControl)
        );
    }
}
