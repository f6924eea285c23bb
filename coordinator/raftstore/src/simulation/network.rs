//! What goes from member to member: messages that get lost, doubled, late or out of order, and snapshots, a chunk at a time.

use super::disk::Loss;
use super::member::Sent;
use super::oracle::Checked;
use super::power::Point;
use super::world::{Event, World};
use crate::RaftStoreError;
use crate::runner::{Input, contained};
use crate::snapshot::{OutgoingSnapshot, SnapshotChunk, SnapshotSink};
use raft::eraftpb::Message;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

/// How bad a seed's network is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Network {
    pub(super) loss_percent: u64,
    pub(super) twice_percent: u64,
    pub(super) late_percent: u64,
    pub(super) delay_ms: u64,
}

/// A snapshot on its way.
pub(super) struct Stream {
    pub(super) to: u64,
    pub(super) from_life: u64,
    pub(super) to_life: u64,
    pub(super) from: u64,
    pub(super) message: Message,
    pub(super) outgoing: Option<OutgoingSnapshot>,
    pub(super) sink: Option<SnapshotSink>,
    /// The chunk that was sent before, to be sent again.
    pub(super) before: Option<SnapshotChunk>,
    pub(super) installing: Option<Receiver<Result<(), RaftStoreError>>>,
}

impl World {
    pub(super) fn send(&mut self, from: u64, sent: Sent) {
        match sent {
            Sent::Message(message) => {
                let to = message.to;
                if let Some(member) = self.members.get_mut(&from) {
                    member.note_promise(&message);
                }
                if self.cut.contains(&(from, to)) || self.random.chance(self.network.loss_percent) {
                    return;
                }
                let times = 1 + u64::from(self.random.chance(self.network.twice_percent));
                for _ in 0..times {
                    let mut delay = self.random.range(1, self.network.delay_ms + 2);
                    if self.random.chance(self.network.late_percent) {
                        delay += self.random.range(0, 400);
                    }
                    self.later(delay, Event::Deliver(Box::new(message.clone())));
                }
            }
            Sent::Snapshot(outgoing) => {
                let to = outgoing.to();
                let Some(to_life) = self.members.get(&to).map(|receiver| receiver.lives) else {
                    return;
                };
                let message = outgoing.message().clone();
                self.log(|| format!("member {from} sends a snapshot to {to}"));
                self.streams.push(Stream {
                    from,
                    to,
                    from_life: self.members[&from].lives,
                    to_life,
                    message,
                    outgoing: Some(outgoing),
                    sink: None,
                    before: None,
                    installing: None,
                });
            }
        }
    }

    /// A stream moves by one chunk. Dropped, it fails.
    pub(super) fn move_stream(&mut self, mut stream: Stream) -> Checked {
        let (from, to) = (stream.from, stream.to);
        let lost = self.cut.contains(&(from, to)) || self.random.chance(self.network.loss_percent / 3);
        let twice = self.random.chance(self.network.twice_percent / 3);
        let skip = self.random.chance(self.network.late_percent / 3);
        let alive = |id: u64, life: u64| {
            self.members
                .get(&id)
                .is_some_and(|member| member.up() && member.lives == life)
        };
        if lost || !alive(from, stream.from_life) || !alive(to, stream.to_life) {
            return Ok(());
        }
        if self.members[&from].paused_until_ms > self.now_ms || self.members[&to].paused_until_ms > self.now_ms {
            self.streams.push(stream);
            return Ok(());
        }
        if let Some(installing) = &stream.installing {
            match installing.try_recv() {
                Ok(Ok(())) => {
                    self.installed += 1;
                    self.log(|| format!("member {to} has the snapshot of {from}"));
                    if let Some(outgoing) = stream.outgoing.take() {
                        outgoing.delivered();
                    }
                    // A moment of which much depends.
                    if self.random.chance(30) && !self.calm {
                        let points = self.random.range(0, 12);
                        self.members[&to].power.fail_after(points);
                    }
                }
                Ok(Err(_)) | Err(TryRecvError::Disconnected) => {}
                Err(TryRecvError::Empty) => self.streams.push(stream),
            }
            return Ok(());
        }
        let Some(member) = self.members.get_mut(&to) else {
            return Ok(());
        };
        let Some(life) = &member.life else { return Ok(()) };
        if stream.sink.is_none() {
            let status = *life.board.status.borrow();
            let begun = contained(|| {
                crate::store::wanted(&stream.message, to, &status)?;
                SnapshotSink::begin(&life.staging, stream.message.clone(), Box::new(|_, _| Ok(())))
            });
            match begun {
                Ok(sink) => stream.sink = Some(sink),
                Err(_) => return self.after_chunk(to),
            }
        }
        let Some(outgoing) = &mut stream.outgoing else {
            return Ok(());
        };
        let again = if twice { stream.before.take() } else { None };
        let mut next = match again {
            Some(chunk) => Ok(Some(chunk)),
            None => outgoing.next_chunk(),
        };
        if skip && !twice {
            // One is lost on the way.
            next = outgoing.next_chunk();
        }
        let chunk = match next {
            Ok(chunk) => chunk,
            Err(_) => return Ok(()),
        };
        let Some(sink) = stream.sink.as_mut() else {
            return Ok(());
        };
        let Some(chunk) = chunk else {
            let Some(sink) = stream.sink.take() else { return Ok(()) };
            if !sink.whole() {
                return Ok(());
            }
            if let Ok((message, staged)) = sink.into_staged() {
                let (sender, installing) = sync_channel(1);
                member.inbox.push(Input::Snapshot(Box::new(message), staged, sender));
                stream.installing = Some(installing);
                self.streams.push(stream);
                self.wake(to);
            }
            return Ok(());
        };
        if member.power.point(Point::Chunk) && contained(|| sink.chunk(&chunk)).is_ok() {
            stream.before = Some(chunk);
            self.streams.push(stream);
        }
        self.after_chunk(to)
    }

    fn after_chunk(&mut self, id: u64) -> Checked {
        if self.members[&id].power.off() {
            self.crash(id, Loss::Some);
        }
        Ok(())
    }
}
