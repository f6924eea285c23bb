//! A Unix stream socket that carries frames and, now and then, a descriptor. Sending never waits: what the socket does
//! not take at once is queued, within a bound, and sent by [`Socket::flush`].

use crate::window_table::lock;
use bytes::{Buf, Bytes};
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
pub(super) const READ_BYTES: usize = 64 << 10;

/// One end of a link.
pub(super) struct Socket {
    stream: UnixStream,
    queue: Mutex<Queue>,
    queued: Notify,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<(Bytes, Option<OwnedFd>)>,
    bytes: usize,
    /// Set once nothing can be sent any more.
    broken: Option<io::Error>,
}

impl Socket {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            queue: Mutex::default(),
            queued: Notify::new(),
        }
    }

    /// Sends `bytes`, in order with everything else. A failure ends [`Socket::flush`].
    pub(super) fn send(&self, bytes: impl Into<Bytes>) {
        self.send_with(bytes.into(), None);
    }

    /// Sends `bytes` and a descriptor that arrives with the first of them.
    pub(super) fn send_with(&self, bytes: Bytes, descriptor: Option<OwnedFd>) {
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
    pub(super) async fn flush(&self) -> io::Error {
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
                if let Err(error) = self.stream.writable().await {
                    return error;
                }
            }
        }
    }

    fn drain(&self, queue: &mut Queue) {
        while queue.broken.is_none()
            && let Some((bytes, descriptor)) = queue.items.front_mut()
        {
            match self
                .stream
                .try_io(Interest::WRITABLE, || send(&self.stream, bytes, descriptor.as_ref()))
            {
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
    pub(super) async fn receive(&self, buffer: &mut [u8], descriptors: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
        loop {
            self.stream.readable().await?;
            match self
                .stream
                .try_io(Interest::READABLE, || receive(&self.stream, buffer, descriptors))
            {
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
