//! A TCP connection under TLS, from the handshake over the hellos to frames. One task owns it and does both directions;
//! nothing here waits except where the name says so.

use super::frame::{self, Frame, FrameReader};
use super::tls::{Standing, Tls};
use crate::TransferLimits;
use crate::hello::{HELLO_HEADER_BYTES, Hello, TAIL_BYTES_MAX};
use crate::limits::NAME_BYTES_MAX;
use rustix::net::sockopt;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// How long to wait for the peer to take the last words and close. The two travel in one round trip.
pub(super) const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a connection is of no more use.
#[derive(Debug)]
pub(super) enum Broken {
    /// The socket failed, or the peer closed it.
    Lost(String),
    /// TLS failed.
    Tls(rustls::Error),
    /// The peer does not speak the protocol.
    Foreign(String),
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lost(detail) | Self::Foreign(detail) => f.write_str(detail),
            Self::Tls(error) => write!(f, "TLS failed: {error}"),
        }
    }
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<rustls::Error> for Broken {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

/// A connection.
pub(super) struct Channel {
    socket: TcpStream,
    tls: Tls,
    reader: FrameReader,
    /// When the peer last sent something.
    pub(super) heard: Instant,
    /// When something was last sealed for the peer.
    pub(super) said: Instant,
    /// When the socket last took bytes, or had none to take.
    pub(super) progressed: Instant,
}

/// Sets what every socket of this transport needs. Best effort: a kernel without an option still transfers.
fn prepare(socket: &TcpStream, limits: &TransferLimits) {
    // Replies and last frames are small and waited for.
    let _ = socket.set_nodelay(true);
    // A peer whose host is gone is found by the kernel even if no task looks: unacknowledged bytes, and idle
    // connections. Buffers are left to the kernel's own tuning, which measured best.
    #[cfg(target_os = "linux")]
    let _ = sockopt::set_tcp_user_timeout(
        socket,
        u32::try_from(limits.idle_timeout.as_millis()).unwrap_or(u32::MAX),
    );
    let whole_seconds = |time: Duration| Duration::from_secs(time.as_secs().max(1));
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, whole_seconds(limits.idle_timeout));
    let _ = sockopt::set_tcp_keepintvl(socket, whole_seconds(limits.keep_alive));
}

impl Channel {
    pub(super) fn new(socket: TcpStream, tls: Tls, limits: &TransferLimits) -> Self {
        prepare(&socket, limits);
        let now = Instant::now();
        Self {
            socket,
            tls,
            reader: FrameReader::default(),
            heard: now,
            said: now,
            progressed: now,
        }
    }

    /// Waits for the end of the TLS handshake and exchanges hellos; the side that dialled speaks first. On failure the
    /// peer has been told as far as TLS can tell it. The caller bounds the time.
    pub(super) async fn introduce(&mut self, ours: &Hello, dialled: bool) -> Result<Hello, Broken> {
        let result = self.greet(ours, dialled).await;
        if let Err(Broken::Tls(_)) = result {
            // The alert; if it cannot be sent, the peer sees the connection close.
            let _ = self.flush().await;
            self.farewell().await;
        }
        result
    }

    async fn greet(&mut self, ours: &Hello, dialled: bool) -> Result<Hello, Broken> {
        let mut plain = Vec::new();
        let mut spoken = false;
        loop {
            let standing = self.tls.open(|bytes| {
                // No honest peer sends more before it has an answer; the check below tells.
                let room = (HELLO_HEADER_BYTES + NAME_BYTES_MAX + TAIL_BYTES_MAX + 1).saturating_sub(plain.len());
                plain.extend_from_slice(&bytes[..bytes.len().min(room)]);
            })?;
            let theirs = parse(&plain)?;
            if standing == Standing::Ready && !spoken && (dialled || theirs.is_some()) {
                self.tls.seal(&ours.encode())?;
                spoken = true;
            }
            self.flush().await?;
            match theirs {
                Some(theirs) if spoken => return Ok(theirs),
                _ if standing == Standing::PeerClosed => return Err(closed()),
                _ => {}
            }
            self.socket.readable().await?;
            self.fill()?;
        }
    }

    /// Takes what the socket has and hands the frames to `take` until that returns false; what follows is dropped.
    /// Nothing there is no error.
    ///
    /// # Errors
    /// The connection is of no more use. Frames that came before have been handed out.
    pub(super) fn receive(&mut self, mut take: impl FnMut(Frame<'_>) -> bool) -> Result<(), Broken> {
        // What is left from the handshake, or from a read that `fill` could not finish, comes first.
        let filled = self.fill();
        let (reader, mut foreign, mut more) = (&mut self.reader, None, true);
        let opened = self.tls.open(|mut bytes| {
            while more {
                match reader.next(&mut bytes) {
                    Ok(Some(frame)) => more = take(frame),
                    Ok(None) => return,
                    Err(error) => {
                        foreign = Some(error);
                        more = false;
                    }
                }
            }
        });
        match (foreign, opened, filled) {
            (Some(error), ..) => Err(Broken::Foreign(error.into())),
            (_, Err(error), _) => Err(error.into()),
            (_, Ok(Standing::PeerClosed), _) => Err(closed()),
            (_, _, filled) => filled,
        }
    }

    /// Seals a DATA frame with the next bytes of the lane's stream.
    pub(super) fn say(&mut self, data: &[u8]) -> Result<(), Broken> {
        self.seal(&frame::data(data.len()))?;
        self.seal(data)
    }

    /// Seals a PING frame.
    pub(super) fn ping(&mut self) -> Result<(), Broken> {
        self.seal(&frame::ping())
    }

    /// Seals an END frame.
    pub(super) fn end(&mut self) -> Result<(), Broken> {
        self.seal(&frame::end())
    }

    /// Tells the peer that the lane is given up, in bounded time.
    pub(super) async fn abort(mut self, code: u32) {
        let told = async {
            self.seal(&frame::abort(code)).ok()?;
            self.flush().await.ok()
        };
        // Too late to tell after that; closing the connection tells the rest.
        if let Ok(Some(())) = tokio::time::timeout(FAREWELL_TIMEOUT, told).await {
            self.farewell().await;
        }
    }

    fn seal(&mut self, plaintext: &[u8]) -> Result<(), Broken> {
        if plaintext.is_empty() {
            return Ok(());
        }
        self.said = Instant::now();
        if self.flushed() {
            self.progressed = self.said;
        }
        Ok(self.tls.seal(plaintext)?)
    }

    /// Everything sealed is with the kernel.
    pub(super) fn flushed(&self) -> bool {
        self.tls.pending().is_empty()
    }

    /// Hands the kernel what it takes.
    pub(super) fn try_flush(&mut self) -> Result<(), Broken> {
        while !self.flushed() {
            match self.socket.try_write(self.tls.pending()) {
                Ok(count) => {
                    self.tls.sent(count);
                    self.progressed = Instant::now();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits until everything sealed is with the kernel.
    pub(super) async fn flush(&mut self) -> Result<(), Broken> {
        loop {
            self.try_flush()?;
            if self.flushed() {
                return Ok(());
            }
            self.socket.writable().await?;
        }
    }

    /// Waits until [`Channel::receive`] has something, or, if there is something to flush, until that goes on.
    pub(super) async fn ready(&self) -> Result<(), Broken> {
        let interest = if self.flushed() {
            tokio::io::Interest::READABLE
        } else {
            tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE
        };
        self.socket.ready(interest).await?;
        Ok(())
    }

    /// No more from this side. Waits, in bounded time, until the peer closes: closing first, with unread bytes here,
    /// would make the kernel throw away the last words on their way.
    pub(super) async fn farewell(&mut self) {
        let gone = async {
            self.socket.shutdown().await?;
            let room = &mut [0; 16 << 10];
            loop {
                self.socket.readable().await?;
                match self.socket.try_read(room) {
                    Ok(0) => return Ok::<_, io::Error>(()),
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                    _ => {}
                }
            }
        };
        let _ = tokio::time::timeout(FAREWELL_TIMEOUT, gone).await;
    }

    /// One read of the socket.
    fn fill(&mut self) -> Result<(), Broken> {
        let room = self.tls.room();
        if room.is_empty() {
            return Ok(());
        }
        match self.socket.try_read(room) {
            Ok(0) => Err(closed()),
            Ok(count) => {
                self.tls.received(count);
                self.heard = Instant::now();
                Ok(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn closed() -> Broken {
    Broken::Lost("it closed the connection".into())
}

/// The hello in `plain`, once it is whole.
fn parse(plain: &[u8]) -> Result<Option<Hello>, Broken> {
    match Hello::take(plain).map_err(Broken::Foreign)? {
        Some((_, len)) if len < plain.len() => Err(Broken::Foreign("it talks before it is answered".into())),
        hello => Ok(hello.map(|(hello, _)| hello)),
    }
}
