//! The processes that are read from, and the reads: several are under way at once, and each is waited for, within a bound.
//!
//! A peer is known to the library by its name, so two links from one process share a [`NixlPeer`], and it is forgotten
//! when the last is gone. The library frees what it knows of a peer's memory when it forgets the peer, also under reads
//! that use it; so reads hold a shared lock, and whoever changes what is known holds it alone.

use super::NixlError;
use super::agent::{NixlAgent, NixlPiece, NixlRead};
use crate::window_table::lock;
use crate::{Refusal, Region};
use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

/// Longest that a read of at most half a MiB, with those before it, may take; a window's lock is held meanwhile. Some sixty
/// times what [`READS_AHEAD`] of them take at 1 Gbit/s.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads of one call that may be under way: enough that the peer always has the next one. Giving up waits for them.
const READS_AHEAD: usize = 4;

/// How long a read is polled without a pause. Then it is a slow one, and others can use the core.
const SPIN: Duration = Duration::from_micros(500);
const PAUSE: Duration = Duration::from_micros(50);

/// The peers of one agent, by their name.
pub(super) struct Peers {
    agent: Arc<NixlAgent>,
    known: Mutex<HashMap<CString, Weak<NixlPeer>>>,
}

impl Peers {
    pub(super) fn new(agent: Arc<NixlAgent>) -> Arc<Self> {
        Arc::new(Self {
            agent,
            known: Mutex::default(),
        })
    }

    /// See [`super::Nixl::peer`].
    pub(super) fn learn(
        self: &Arc<Self>,
        metadata: &[u8],
        known: Option<Arc<NixlPeer>>,
    ) -> Result<Arc<NixlPeer>, NixlError> {
        if let Some(peer) = known {
            peer.learn(metadata)?;
            return Ok(peer);
        }
        let mut known = lock(&self.known);
        let name = self.agent.add_peer(metadata)?;
        let found = known.get(&name).and_then(Weak::upgrade);
        if let Some(peer) = &found
            && peer.usable()
        {
            return Ok(peer.clone());
        }
        let peer = Arc::new(NixlPeer {
            name: name.clone(),
            peers: self.clone(),
            usable: RwLock::new(true),
        });
        known.insert(name, Arc::downgrade(&peer));
        // If the one given up ends here, it takes the lock.
        drop(known);
        drop(found);
        Ok(peer)
    }
}

/// A process whose memory can be read.
pub(crate) struct NixlPeer {
    name: CString,
    peers: Arc<Peers>,
    /// False once it is given up. Read-locked during reads.
    usable: RwLock<bool>,
}

impl NixlPeer {
    /// Whether reads can be tried.
    pub(crate) fn usable(&self) -> bool {
        // Locked by whoever gives up or learns: the next look tells.
        self.usable.try_read().map_or(true, |usable| *usable)
    }

    /// Registers memory that is to be read into.
    pub(crate) fn prepare(&self, target: &Arc<Region>) -> Result<(), Refusal> {
        self.peers.agent.register(target).map_err(|error| {
            tracing::warn!(%error, "a region cannot be registered with NIXL; QUIC carries its pushes");
            Refusal::Unreadable
        })
    }

    /// Reads `pieces` into `target`, as many as fit at a time in reads of `read_bytes`, and returns when they are there, or
    /// none will be any more. How many, from the first: all, or at least those of one read if `wanted` says that somebody
    /// waits.
    pub(crate) fn read(
        &self,
        target: &Arc<Region>,
        pieces: &[NixlPiece],
        read_bytes: usize,
        wanted: &dyn Fn() -> bool,
    ) -> Result<usize, Refusal> {
        let result = {
            let usable = self.usable.read().unwrap_or_else(PoisonError::into_inner);
            if !*usable {
                return Err(Refusal::Unreadable);
            }
            self.read_all(target, pieces, read_bytes, wanted)
        };
        let why = match result {
            Ok(read) => return Ok(read),
            Err(why) => why,
        };
        tracing::warn!(peer = ?self.name, why, "a read through NIXL failed; QUIC carries on");
        let mut usable = self.usable.write().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *usable, false) {
            // With its connections; what a cancelled read might still have brought is lost with them.
            self.peers.agent.forget_peer(&self.name);
        }
        Err(Refusal::Unreadable)
    }

    /// See [`NixlPeer::read`]. On an error the reads under way are cancelled.
    fn read_all(
        &self,
        target: &Arc<Region>,
        pieces: &[NixlPiece],
        read_bytes: usize,
        wanted: &dyn Fn() -> bool,
    ) -> Result<usize, String> {
        let mut ahead: VecDeque<(NixlRead, Instant)> = VecDeque::new();
        let mut posted = 0;
        loop {
            while ahead.len() < READS_AHEAD && posted < pieces.len() && (posted == 0 || !wanted()) {
                let mut bytes = 0;
                let fitting = pieces[posted..].iter().take_while(|piece| {
                    bytes += piece.len;
                    bytes <= read_bytes
                });
                let next = &pieces[posted..posted + fitting.count().max(1)];
                let read = self.peers.agent.read(&self.name, target, next);
                ahead.push_back((read.map_err(|error| error.to_string())?, Instant::now()));
                posted += next.len();
            }
            // They end in about the order in which they began, and polling one moves all on.
            let Some((read, begin)) = ahead.pop_front() else {
                return Ok(posted);
            };
            wait(&read, begin)?;
        }
    }

    /// More memory of the same process, or other memory where some was.
    fn learn(&self, metadata: &[u8]) -> Result<(), NixlError> {
        let mut usable = self.usable.write().unwrap_or_else(PoisonError::into_inner);
        if !*usable {
            return Err(NixlError::GivenUp);
        }
        let agent = &self.peers.agent;
        // The library takes what is new; what contradicts what it knows, it refuses.
        let learnt = agent.add_peer(metadata).or_else(|_| {
            agent.forget_peer(&self.name);
            agent.add_peer(metadata)
        });
        match learnt {
            Ok(name) if name == self.name => Ok(()),
            other => {
                *usable = false;
                agent.forget_peer(&self.name);
                other.and(Err(NixlError::OtherPeer))
            }
        }
    }
}

/// Returns when `read`, which began at `begin`, is done.
fn wait(read: &NixlRead, begin: Instant) -> Result<(), String> {
    let waiting = Instant::now();
    while !read.poll().map_err(|error| error.to_string())? {
        if begin.elapsed() >= READ_TIMEOUT {
            return Err(format!("not done within {READ_TIMEOUT:?}"));
        }
        if waiting.elapsed() >= SPIN {
            std::thread::sleep(PAUSE);
        } else {
            std::thread::yield_now();
        }
    }
    Ok(())
}

impl Drop for NixlPeer {
    fn drop(&mut self) {
        let mut known = lock(&self.peers.known);
        // Another may have taken its place already.
        let mine = known
            .get(&self.name)
            .is_some_and(|peer| std::ptr::eq(peer.as_ptr(), self));
        if mine {
            known.remove(&self.name);
            self.peers.agent.forget_peer(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nixl::NixlError;

    const LEN: usize = 1 << 16;

    /// A peer that says wrong things of its memory is given up, and found again by another link; where the library can be
    /// found.
    #[test]
    fn a_failed_read_gives_the_peer_up() {
        let reader = match NixlAgent::open("peer-reader") {
            Ok(agent) => agent,
            Err(error @ NixlError::Library(_)) => return eprintln!("skipped: {error}"),
            Err(error) => panic!("{error}"),
        };
        let owner = NixlAgent::open("peer-owner").unwrap();
        let peers = Peers::new(reader);
        let source = Region::new(LEN).unwrap();
        let target = Region::new(LEN).unwrap();
        assert!(source.copy_in(0, &[7; LEN]));
        owner.register(&source).unwrap();
        let metadata = owner.metadata().unwrap();
        let peer = peers.learn(&metadata, None).unwrap();
        let second = peers.learn(&metadata, None).unwrap();
        assert!(Arc::ptr_eq(&peer, &second), "one process, two links");
        peer.prepare(&target).unwrap();
        let piece = |remote: usize| NixlPiece {
            local: 0,
            remote,
            len: LEN,
        };
        peer.read(&target, &[piece(source.address())], LEN, &|| false).unwrap();
        let mut got = vec![0; LEN];
        assert!(target.copy_out(0, &mut got) && got == [7; LEN]);
        // Memory that was never registered.
        assert_eq!(
            peer.read(&target, &[piece(64)], LEN, &|| false),
            Err(Refusal::Unreadable)
        );
        assert!(!peer.usable());
        assert_eq!(
            peer.read(&target, &[piece(source.address())], LEN, &|| false),
            Err(Refusal::Unreadable)
        );
        assert_eq!(
            peers.learn(&metadata, Some(peer.clone())).err(),
            Some(NixlError::GivenUp)
        );
        // Another connection starts afresh, and outlives those before it.
        let again = peers.learn(&metadata, None).unwrap();
        drop((peer, second));
        again.read(&target, &[piece(source.address())], LEN, &|| false).unwrap();
        assert!(peers.learn(b"not metadata", Some(again.clone())).is_err());
        assert!(!again.usable());
        drop(again);
        assert!(lock(&peers.known).is_empty());
    }
}
