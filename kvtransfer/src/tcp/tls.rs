//! One end of a TLS connection with its two buffers, sans-IO: ciphertext in and out as byte slices, plaintext in and
//! out through calls.
//!
//! It drives rustls's unbuffered interface: whole socket buffers are read at once and their records are opened where
//! they lie, and a whole hand-over of a push is sealed into one buffer, so that a system call moves a quarter of a
//! megabyte instead of a record. That is what makes TLS over TCP fast; no cryptography is done here.

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus};

/// Ciphertext taken from the socket at once. A few records, so that their bytes are still in the second-level cache
/// when they are copied into place.
pub(super) const INCOMING_BYTES: usize = 256 << 10;

/// What a record may add to its plaintext: header, content type, authentication tag, with room to spare.
const RECORD_OVERHEAD_BYTES: usize = 64;
/// Plaintext of a full record (RFC 8446, 5.1).
const RECORD_BYTES: usize = 16 << 10;

/// Either end.
enum Session {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// How far the session is once it can do no more without input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The handshake goes on.
    Handshaking,
    /// Plaintext may be sealed.
    Ready,
    /// The peer has said that it sends no more.
    PeerClosed,
}

/// One end of a TLS connection.
pub(super) struct Tls {
    session: Session,
    incoming: Vec<u8>,
    /// The ciphertext not yet opened.
    unread: std::ops::Range<usize>,
    outgoing: Outgoing,
    /// Set once TLS failed. rustls must not be given input after that: it may panic.
    failed: Option<rustls::Error>,
}

/// Ciphertext on its way out: `bytes[sent..filled]`.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    filled: usize,
}

impl Tls {
    pub(super) fn client(session: UnbufferedClientConnection) -> Self {
        Self::new(Session::Client(session))
    }

    pub(super) fn server(session: UnbufferedServerConnection) -> Self {
        Self::new(Session::Server(session))
    }

    fn new(session: Session) -> Self {
        Self {
            session,
            incoming: vec![0; INCOMING_BYTES],
            unread: 0..0,
            outgoing: Outgoing::default(),
            failed: None,
        }
    }

    /// Room for ciphertext from the socket; never empty after [`Tls::open`], as a record is far shorter than the
    /// buffer.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.unread.start > 0 {
            // What is left is less than a record.
            self.incoming.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        &mut self.incoming[self.unread.end..]
    }

    /// `count` bytes of [`Tls::room`] were filled.
    pub(super) fn received(&mut self, count: usize) {
        self.unread.end = (self.unread.end + count).min(self.incoming.len());
    }

    /// Opens every whole record there is and hands its plaintext to `take`.
    ///
    /// # Errors
    /// TLS failed; [`Tls::pending`] holds the alert for the peer.
    pub(super) fn open(&mut self, mut take: impl FnMut(&[u8])) -> Result<Standing, rustls::Error> {
        loop {
            match self.advance(&mut take, None) {
                Ok(Some(standing)) => return Ok(standing),
                Ok(None) => {}
                Err(error) => return Err(self.fail(error, &mut take)),
            }
        }
    }

    /// Seals `plaintext` behind what is still pending. To be called when [`Tls::open`] has answered
    /// [`Standing::Ready`], before more is received.
    ///
    /// # Errors
    /// TLS failed, or the order of calls was broken.
    pub(super) fn seal(&mut self, plaintext: &[u8]) -> Result<(), rustls::Error> {
        let mut surprise = false;
        loop {
            match self.advance(&mut |_| surprise = true, Some(plaintext)) {
                Ok(Some(Standing::Ready)) if !surprise => return Ok(()),
                Ok(Some(_)) => return Err(rustls::Error::HandshakeNotComplete),
                Ok(None) => {}
                Err(error) => return Err(self.fail(error, &mut |_| {})),
            }
        }
    }

    /// The end of the session; what is left is the alert, if rustls made one.
    fn fail(&mut self, error: rustls::Error, take: &mut impl FnMut(&[u8])) -> rustls::Error {
        self.unread = 0..0;
        let alert = |session: &Session| match session {
            Session::Client(session) => session.wants_write(),
            Session::Server(session) => session.wants_write(),
        };
        while self.failed.is_none() && alert(&self.session) && self.advance(take, None).is_ok() {}
        self.failed.get_or_insert(error).clone()
    }

    /// Ciphertext for the socket.
    pub(super) fn pending(&self) -> &[u8] {
        &self.outgoing.bytes[self.outgoing.sent..self.outgoing.filled]
    }

    /// `count` bytes of [`Tls::pending`] are with the socket.
    pub(super) fn sent(&mut self, count: usize) {
        let out = &mut self.outgoing;
        out.sent = (out.sent + count).min(out.filled);
        if out.sent == out.filled {
            (out.sent, out.filled) = (0, 0);
        }
    }

    /// One step of rustls's state machine; `None` when there may be another at once.
    fn advance(
        &mut self,
        take: &mut impl FnMut(&[u8]),
        plaintext: Option<&[u8]>,
    ) -> Result<Option<Standing>, rustls::Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let incoming = &mut self.incoming[self.unread.clone()];
        let (discard, result) = match &mut self.session {
            Session::Client(session) => step(
                session.process_tls_records(incoming),
                &mut self.outgoing,
                take,
                plaintext,
            ),
            Session::Server(session) => step(
                session.process_tls_records(incoming),
                &mut self.outgoing,
                take,
                plaintext,
            ),
        };
        self.unread.start = (self.unread.start + discard).min(self.unread.end);
        result
    }
}

fn step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Outgoing,
    take: &mut impl FnMut(&[u8]),
    plaintext: Option<&[u8]>,
) -> (usize, Result<Option<Standing>, rustls::Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let result = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut result = Ok(None);
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        take(record.payload);
                    }
                    Err(error) => result = Err(error),
                }
            }
            result
        }
        Ok(ConnectionState::EncodeTlsData(mut data)) => out
            .append(0, |space| {
                data.encode(space).map_err(|error| match error {
                    EncodeError::InsufficientSize(needed) => Some(needed),
                    EncodeError::AlreadyEncoded => None,
                })
            })
            .map(|()| None),
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // It is in `out`, from where it goes before anything that is sealed later.
            data.done();
            Ok(None)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Some(Standing::Handshaking)),
        Ok(ConnectionState::WriteTraffic(mut traffic)) => match plaintext {
            None => Ok(Some(Standing::Ready)),
            Some(plaintext) => {
                let records = plaintext.len() / RECORD_BYTES + 1;
                out.append(plaintext.len() + records * RECORD_OVERHEAD_BYTES, |space| {
                    traffic.encrypt(plaintext, space).map_err(|error| match error {
                        EncryptError::InsufficientSize(needed) => Some(needed),
                        EncryptError::EncryptExhausted => None,
                    })
                })
                .map(|()| Some(Standing::Ready))
            }
        },
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Some(Standing::PeerClosed)),
        Ok(other) => Err(rustls::Error::General(format!("unexpected TLS state {other:?}"))),
    };
    (discard, result)
}

impl Outgoing {
    /// Lets `write` fill the space behind what is there. It is called again if it asks for more space.
    fn append(
        &mut self,
        expected: usize,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<InsufficientSizeError>>,
    ) -> Result<(), rustls::Error> {
        let mut space = expected;
        loop {
            if self.bytes.len() < self.filled + space {
                self.bytes.resize(self.filled + space, 0);
            }
            match write(&mut self.bytes[self.filled..]) {
                Ok(written) => {
                    self.filled += written;
                    return Ok(());
                }
                Err(Some(needed)) if needed.required_size > space => space = needed.required_size,
                Err(_) => return Err(rustls::Error::EncryptError),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_identity::{Authority, Role};
    use proptest::prelude::*;
    use rustls::pki_types::ServerName;
    use std::sync::Arc;

    fn pair(client_role: Role) -> (Tls, Tls) {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(dir.path()).unwrap();
        let server = authority.issue(Role::Worker, "server").unwrap();
        let client = authority.issue(client_role, "client").unwrap();
        let name = ServerName::try_from(Role::Worker.dns_name()).unwrap();
        let client = UnbufferedClientConnection::new(Arc::new(client.quic_client(b"test").unwrap()), name).unwrap();
        let config = server.quic_server(&[Role::Worker], b"test").unwrap();
        let server = UnbufferedServerConnection::new(Arc::new(config)).unwrap();
        (Tls::client(client), Tls::server(server))
    }

    /// Moves at most `most` bytes of ciphertext.
    fn carry(from: &mut Tls, to: &mut Tls, most: usize) -> usize {
        let room = to.room();
        let count = most.min(from.pending().len()).min(room.len());
        room[..count].copy_from_slice(&from.pending()[..count]);
        from.sent(count);
        to.received(count);
        count
    }

    #[test]
    fn plaintext_goes_both_ways_whatever_the_split() {
        let (mut client, mut server) = pair(Role::Worker);
        let (mut at_server, mut at_client) = (Vec::new(), Vec::new());
        let message: Vec<u8> = (0..300_000u32).map(|at| (at / 3) as u8).collect();
        let mut split = 1;
        let mut sealed = false;
        for _ in 0..100_000 {
            let here = client.open(|bytes| at_client.extend_from_slice(bytes)).unwrap();
            if here == Standing::Ready && !sealed {
                client.seal(&message).unwrap();
                sealed = true;
            }
            let there = server.open(|bytes| at_server.extend_from_slice(bytes)).unwrap();
            if there == Standing::Ready && at_server.len() == message.len() && at_client.is_empty() {
                server.seal(b"thanks").unwrap();
            }
            split = split % 3000 + 7;
            let moved = carry(&mut client, &mut server, split) + carry(&mut server, &mut client, split);
            if moved == 0 && sealed && client.pending().is_empty() && server.pending().is_empty() {
                break;
            }
        }
        client.open(|bytes| at_client.extend_from_slice(bytes)).unwrap();
        assert!(at_server == message);
        assert_eq!(at_client, b"thanks");
    }

    #[test]
    fn a_refused_certificate_leaves_an_alert_for_the_peer() {
        let (mut client, mut server) = pair(Role::Admin);
        let refused = (0..10).find_map(|_| {
            client.open(|_| {}).unwrap();
            carry(&mut client, &mut server, usize::MAX);
            if let Err(error) = server.open(|_| {}) {
                return Some(error);
            }
            carry(&mut server, &mut client, usize::MAX);
            None
        });
        assert!(
            matches!(refused, Some(rustls::Error::InvalidCertificate(_))),
            "{refused:?}"
        );
        assert!(!server.pending().is_empty());
        carry(&mut server, &mut client, usize::MAX);
        let told = client.open(|_| {});
        assert!(matches!(told, Err(rustls::Error::AlertReceived(_))), "{told:?}");
    }

    proptest! {
        /// A peer that is not TLS at all.
        #[test]
        fn arbitrary_bytes_never_panic(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let (mut client, mut server) = pair(Role::Worker);
            for part in parts {
                for end in [&mut client, &mut server] {
                    let room = end.room();
                    room[..part.len()].copy_from_slice(&part);
                    end.received(part.len());
                    let _ = end.open(|_| panic!("bytes came through"));
                    let _ = end.seal(b"?");
                }
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let (mut client, mut server) = pair(Role::Worker);
        for _ in 0..5 {
            client.open(|_| {}).unwrap();
            carry(&mut client, &mut server, usize::MAX);
            server.open(|_| {}).unwrap();
            carry(&mut server, &mut client, usize::MAX);
        }
        client.open(|_| {}).unwrap();
        client.seal(&[7; 1000]).unwrap();
        let count = client.pending().len();
        let room = server.room();
        room[..count].copy_from_slice(client.pending());
        room[count / 2] ^= 1;
        server.received(count);
        for _ in 0..2 {
            assert!(server.open(|_| panic!("forged bytes came through")).is_err());
        }
        assert!(server.seal(b"too late").is_err());
        carry(&mut server, &mut client, usize::MAX);
        let told = client.open(|_| {});
        assert!(matches!(told, Err(rustls::Error::AlertReceived(_))), "{told:?}");
    }
}
