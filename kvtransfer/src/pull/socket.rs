//! What a link's frames travel on: a Unix stream socket, which also carries a descriptor now and then, or a stream of an
//! authenticated QUIC connection. Sending never waits: what is not taken at once is queued, within a bound, and sent by
//! [`Socket::flush`].

use crate::window_table::lock;
use bytes::{Buf, Bytes};
use quinn::{RecvStream, SendStream};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::sync::Mutex;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Notify;

/// Most bytes queued. Frames in flight are limited far below; this is for a peer that sends and does not read.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// Most descriptors received that no frame has claimed. Each comes with the first byte of its frame.
const UNCLAIMED_MAX: usize = 4;

/// Bytes read at once: frames are small.
pub(crate) const READ_BYTES: usize = 64 << 10;

/// One end of a link.
pub(crate) struct Socket {
    wire: Wire,
    queue: Mutex<Queue>,
    queued: Notify,
}

enum Wire {
    Unix(UnixStream),
    /// Each half is used by one task: [`Socket::flush`] and [`Socket::receive`].
    Quic(tokio::sync::Mutex<SendStream>, tokio::sync::Mutex<RecvStream>),
}

#[derive(Default)]
struct Queue {
    items: VecDeque<(Bytes, Option<OwnedFd>)>,
    bytes: usize,
    /// Set once nothing can be sent any more.
    broken: Option<io::Error>,
}

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self::over(Wire::Unix(stream))
    }

    /// Over a QUIC stream. Descriptors given to it are dropped.
    pub(crate) fn quic(send: SendStream, recv: RecvStream) -> Self {
        Self::over(Wire::Quic(send.into(), recv.into()))
    }

    fn over(wire: Wire) -> Self {
        Self {
            wire,
            queue: Mutex::default(),
            queued: Notify::new(),
        }
    }

    /// Sends `bytes`, in order with everything else. A failure ends [`Socket::flush`].
    pub(crate) fn send(&self, bytes: impl Into<Bytes>) {
        self.send_with(bytes.into(), None);
    }

    /// Sends `bytes` and a descriptor that arrives with the first of them.
    pub(crate) fn send_with(&self, bytes: Bytes, descriptor: Option<OwnedFd>) {
        let mut queue = lock(&self.queue);
        if queue.broken.is_some() {
            return;
        }
        queue.bytes += bytes.len();
        queue.items.push_back((bytes, descriptor));
        if queue.items.len() == 1 {
            self.drain(&mut queue);
        }
        if queue.bytes > QUEUE_BYTES_MAX {
            queue.broken = Some(io::Error::other("it does not read what it is sent"));
        }
        if !queue.items.is_empty() || queue.broken.is_some() {
            self.queued.notify_one();
        }
    }

    /// Sends what is queued whenever there is room; runs until that fails.
    pub(crate) async fn flush(&self) -> io::Error {
        loop {
            self.queued.notified().await;
            loop {
                let empty = {
                    let mut queue = lock(&self.queue);
                    self.drain(&mut queue);
                    if let Some(error) = queue.broken.take() {
                        queue.broken = Some(error.kind().into());
                        return error;
                    }
                    queue.items.is_empty()
                };
                if empty {
                    break;
                }
                let sent = match &self.wire {
                    Wire::Unix(stream) => stream.writable().await,
                    Wire::Quic(send, _) => self.send_first(send).await,
                };
                if let Err(error) = sent {
                    return error;
                }
            }
        }
    }

    async fn send_first(&self, send: &tokio::sync::Mutex<SendStream>) -> io::Result<()> {
        let first = lock(&self.queue).items.front().map(|(bytes, _)| bytes.clone());
        let Some(bytes) = first else { return Ok(()) };
        let len = bytes.len();
        send.lock().await.write_chunk(bytes).await?;
        let mut queue = lock(&self.queue);
        queue.items.pop_front();
        queue.bytes -= len;
        Ok(())
    }

    fn drain(&self, queue: &mut Queue) {
        let Wire::Unix(stream) = &self.wire else { return };
        while queue.broken.is_none()
            && let Some((bytes, descriptor)) = queue.items.front_mut()
        {
            match stream.try_io(Interest::WRITABLE, || send(stream, bytes, descriptor.as_ref())) {
                Ok(sent) => {
                    // It has gone with the first byte.
                    *descriptor = None;
                    bytes.advance(sent);
                    let done = bytes.is_empty();
                    queue.bytes -= sent;
                    if done {
                        queue.items.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => queue.broken = Some(error),
            }
        }
    }

    /// Waits for bytes and descriptors. No bytes: the peer has closed its end.
    pub(crate) async fn receive(&self, buffer: &mut [u8], descriptors: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
        let stream = match &self.wire {
            Wire::Unix(stream) => stream,
            Wire::Quic(_, recv) => return Ok(recv.lock().await.read(buffer).await?.unwrap_or(0)),
        };
        loop {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || receive(stream, buffer, descriptors)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(_) if descriptors.len() > UNCLAIMED_MAX => {
                    return Err(io::Error::other("it sends descriptors that nobody asked for"));
                }
                other => return other,
            }
        }
    }
}

fn send(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    Ok(sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

fn receive(stream: &UnixStream, buffer: &mut [u8], descriptors: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        stream,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "descriptors were lost: it sends too many, or this process may not open more",
        ));
    }
    Ok(message.bytes)
}
