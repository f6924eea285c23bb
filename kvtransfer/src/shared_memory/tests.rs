//! Who is let in, and what a peer that breaks the rules gets: over real sockets, one end of them written by hand.

use super::*;
use crate::memory::Region;
use crate::pull::frames::{Body, Frame, FrameDecoder, Open, put_finish, put_open, put_pull, put_region};
use crate::pull::socket::READ_BYTES;
use crate::ranges::{Descriptor, RangeSet};
use crate::stats::Counters;
use crate::window_state::{Finish, Phase};
use crate::window_table::WindowCell;
use crate::wire::{LaneKey, Reply};
use crate::{AbortReason, Refusal, WindowError};
use bytes::BytesMut;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::collections::VecDeque;

const LEN: usize = 1 << 20;

struct Owner {
    shared: Arc<SharedMemory>,
    table: Arc<WindowTable>,
    region: Arc<Region>,
}

impl Owner {
    fn new() -> Self {
        let limits = TransferLimits {
            pushes_per_connection_max: 4,
            handshake_timeout: Duration::from_millis(300),
            ..TransferLimits::default()
        };
        let table = Arc::new(WindowTable::new(
            &TransferLimits {
                windows_max: 16,
                ..TransferLimits::default()
            },
            Arc::new(Counters::default()),
        ));
        let shared = SharedMemory::bind(table.clone(), Arc::new(limits), Handle::current());
        Self {
            shared: shared.expect("linux has what shared memory takes"),
            table,
            region: Region::new(LEN).unwrap(),
        }
    }

    fn offer(&self) -> (Offer, Invitation) {
        let peer = Hello {
            version: 1,
            digest: [0; 32],
            name: "peer".into(),
            host: Some(self.shared.host()),
            offer: None,
            tcp: false,
            nixl: None,
        };
        self.shared.offer(&peer, "peer").unwrap()
    }

    #[allow(clippy::single_range_in_vec_init)] // a window over one range is what is meant
    fn window(&self, id: u64) -> Arc<WindowCell> {
        let at = id as usize * 4096;
        let ranges = RangeSet::new(vec![at..at + 4096], LEN, 8).unwrap();
        self.table
            .open(&(&self.region).into(), ranges, 1 << 20, || Ok(id))
            .unwrap()
    }

    fn image(&self) -> Vec<u8> {
        let mut all = vec![0; LEN];
        assert!(self.region.copy_out(0, &mut all));
        all
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("the test hangs")
}

/// A peer written by hand, let in with a ticket.
struct Peer {
    socket: Socket,
    decoder: FrameDecoder,
    _invitation: Invitation,
}

impl Peer {
    async fn new(owner: &Owner) -> Self {
        let (offer, invitation) = owner.offer();
        let (stream, pushes_max) = within(ask(&offer)).await.unwrap();
        assert_eq!(pushes_max, 4);
        Self {
            socket: Socket::new(stream),
            decoder: FrameDecoder::default(),
            _invitation: invitation,
        }
    }

    fn say(&self, put: impl FnOnce(&mut BytesMut), file: Option<OwnedFd>) {
        let mut out = BytesMut::new();
        put(&mut out);
        self.socket.send_with(out.freeze(), file);
    }

    fn region(&self, id: u32, len: u64, file: OwnedFd) {
        self.say(|out| put_region(out, id, len), Some(file));
    }

    fn pull(&self, id: u32, local: u64, remote: u64, len: usize) {
        let piece = Descriptor {
            local: local as usize,
            remote: remote as usize,
            len,
        };
        self.say(|out| put_pull(out, id, &[piece]), None);
    }

    /// The next frame; `None` once the owner has closed the link.
    async fn hear(&mut self) -> Option<Frame> {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            if let Some(frame) = self.decoder.next().unwrap() {
                return Some(frame);
            }
            match within(self.socket.receive(&mut buffer, &mut VecDeque::new())).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.decoder.feed(&buffer[..count]),
            }
        }
    }

    async fn reply(&mut self) -> Reply {
        match self.hear().await {
            Some(Frame {
                body: Body::Reply(reply),
                ..
            }) => reply,
            other => panic!("{other:?}"),
        }
    }
}

/// The first lane of a push that is called like its window.
fn open(window: u64, region: u32) -> Open {
    Open {
        window,
        push: window,
        lane: LaneKey { slot: 0, generation: 0 },
        region,
    }
}

fn finish(total: u64, payload: &'static [u8]) -> Finish {
    Finish {
        total,
        payload: payload.into(),
        notify: false,
    }
}

fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

#[tokio::test]
async fn only_the_holder_of_a_ticket_is_let_in_and_once() {
    let owner = Owner::new();
    // Nothing, noise, a wrong ticket, a wrong secret: no answer, and the real holder is not harmed.
    let (offer, _invitation) = owner.offer();
    let wrong_ticket = Offer {
        ticket: [1; 16],
        ..offer
    };
    let wrong_secret = Offer {
        asker_secret: [1; 32],
        ..offer
    };
    for wrong in [wrong_ticket, wrong_secret] {
        assert!(within(ask(&wrong)).await.is_err());
    }
    let address = unix::SocketAddr::from_abstract_name(socket_name(&offer.socket)).unwrap();
    let connect = || {
        let stream = unix::UnixStream::connect_addr(&address).unwrap();
        stream.set_nonblocking(true).unwrap();
        UnixStream::from_std(stream).unwrap()
    };
    let mut noise = connect();
    noise.write_all(&[7; ASK_BYTES]).await.unwrap();
    let mut silent = connect();
    for stranger in [&mut noise, &mut silent] {
        // An end or a reset, in bounded time.
        assert!(matches!(within(stranger.read(&mut [0; 8])).await, Ok(0) | Err(_)));
    }
    within(ask(&offer)).await.unwrap();
    assert!(within(ask(&offer)).await.is_err(), "a ticket was taken twice");
    // Void when the connection it was handed out on has ended.
    let (offer, invitation) = owner.offer();
    drop(invitation);
    assert!(within(ask(&offer)).await.is_err());
    assert_eq!(owner.shared.tickets.waiting(), 0);
    // A hello from another host gets no offer at all.
    let elsewhere = Hello {
        version: 1,
        digest: [0; 32],
        name: "peer".into(),
        host: Some([1; 16]),
        offer: None,
        tcp: false,
        nixl: None,
    };
    assert!(owner.shared.offer(&elsewhere, "peer").is_none());
}

/// The one who asks is as careful: whoever answers must know the owner's secret.
#[tokio::test]
async fn an_impostor_at_the_socket_gets_no_region() {
    let offer = Offer {
        socket: random().unwrap(),
        ticket: [1; 16],
        asker_secret: [2; 32],
        owner_secret: [3; 32],
    };
    let listener = listen(&offer.socket).unwrap();
    let impostor = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_exact(&mut [0; ASK_BYTES]).await.unwrap();
        stream.write_all(&[4; ANSWER_BYTES]).await.unwrap();
        // It hears nothing more.
        stream.read(&mut [0; 8]).await
    };
    let (asked, heard) = within(async { tokio::join!(ask(&offer), impostor) }).await;
    assert!(asked.unwrap_err().to_string().contains("does not own"));
    assert!(matches!(heard, Ok(0) | Err(_)));
}

/// Needs the right to become another user, as in CI's containers; elsewhere there is nothing to test it with.
#[tokio::test]
async fn another_user_is_refused_even_with_a_ticket() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let owner = Owner::new();
    let (offer, _invitation) = owner.offer();
    // Users belong to threads on Linux; this one ends as nobody.
    let answered = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let nobody = rustix::process::Uid::from_raw(65_534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let address = unix::SocketAddr::from_abstract_name(socket_name(&offer.socket)).unwrap();
        let mut stream = unix::UnixStream::connect_addr(&address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut question = MAGIC.to_vec();
        question.extend_from_slice(&offer.ticket);
        question.extend_from_slice(&offer.asker_secret);
        // It may be shut out before it has said anything.
        let _ = stream.write_all(&question);
        stream.read(&mut [0; 8]).is_ok_and(|count| count > 0)
    });
    let answered = tokio::task::spawn_blocking(move || answered.join().unwrap());
    assert!(!within(answered).await.unwrap(), "another user was answered");
    assert_eq!(owner.shared.tickets.waiting(), 1, "another user has used the ticket up");
}

#[tokio::test]
async fn a_whole_push_by_hand() {
    let owner = Owner::new();
    let mut peer = Peer::new(&owner).await;
    let source = Region::new(8192).unwrap();
    assert!(source.copy_in(0, &[5; 8192]));
    peer.region(1, 8192, source.file().unwrap().try_clone_to_owned().unwrap());
    assert_eq!(peer.hear().await.map(|frame| frame.body), Some(Body::RegionTaken));
    let window = owner.window(3);
    peer.say(|out| put_open(out, 9, open(3, 1)), None);
    peer.pull(9, 4096, 3 * 4096, 4096);
    assert_eq!(peer.reply().await, Reply::Landed(4096));
    peer.say(|out| put_finish(out, 9, &finish(4096, b"token")), None);
    assert_eq!(peer.reply().await, Reply::Done(4096));
    assert_eq!(window.phase(), Phase::Completed(bytes::Bytes::from_static(b"token")));
    let image = owner.image();
    assert!(image[3 * 4096..4 * 4096].iter().all(|&byte| byte == 5));
    assert!(image.iter().filter(|&&byte| byte != 0).count() == 4096);
}

#[tokio::test]
async fn regions_that_could_fault_are_refused_and_the_link_stands() {
    let owner = Owner::new();
    let mut peer = Peer::new(&owner).await;
    peer.region(1, 8192, memory(4096, SealFlags::SHRINK));
    peer.region(2, 4096, memory(4096, SealFlags::GROW));
    for id in [1, 2] {
        let frame = peer.hear().await.unwrap();
        assert!(
            frame.id == id && matches!(frame.body, Body::RegionRefused { .. }),
            "{frame:?}"
        );
    }
    peer.region(3, 4096, memory(4096, SealFlags::SHRINK));
    assert_eq!(peer.hear().await.map(|frame| frame.body), Some(Body::RegionTaken));
}

#[tokio::test]
async fn each_breach_has_its_end() {
    let owner = Owner::new();
    let mut peer = Peer::new(&owner).await;
    peer.region(1, 8192, memory(8192, SealFlags::SHRINK));
    assert_eq!(peer.hear().await.map(|frame| frame.body), Some(Body::RegionTaken));
    // Refusals that leave the link standing.
    let refused =
        |window: Arc<WindowCell>, refusal| assert_eq!(window.phase(), Phase::Failed(WindowError::Refused(refusal)));
    let window = owner.window(1);
    peer.say(|out| put_open(out, 1, open(1, 1)), None);
    peer.pull(1, 0, 0, 64);
    let refusal = Refusal::OutOfRange { offset: 0, len: 64 };
    assert_eq!(peer.reply().await, Reply::Refused(refusal));
    refused(window, refusal);
    let window = owner.window(2);
    peer.say(|out| put_open(out, 2, open(2, 1)), None);
    peer.pull(2, 8192 - 32, 2 * 4096, 64);
    let refusal = Refusal::OutOfRange {
        offset: 8192 - 32,
        len: 64,
    };
    assert_eq!(peer.reply().await, Reply::Refused(refusal));
    refused(window, refusal);
    let window = owner.window(3);
    peer.say(|out| put_open(out, 3, open(3, 1)), None);
    peer.pull(3, 0, 3 * 4096, 64);
    assert_eq!(peer.reply().await, Reply::Landed(64));
    peer.say(|out| put_finish(out, 3, &finish(8, b"")), None);
    let refusal = Refusal::WrongTotal { claimed: 8, landed: 64 };
    assert_eq!(peer.reply().await, Reply::Refused(refusal));
    refused(window, refusal);
    peer.say(|out| put_open(out, 4, open(77, 1)), None);
    assert_eq!(peer.reply().await, Reply::Refused(Refusal::UnknownWindow));
    // The owner closes a window: the peer hears of it without having asked, and nothing lands any more.
    let window = owner.window(4);
    peer.say(|out| put_open(out, 5, open(4, 1)), None);
    peer.pull(5, 0, 4 * 4096, 64);
    assert_eq!(peer.reply().await, Reply::Landed(64));
    owner.table.close(&window);
    assert_eq!(peer.reply().await, Reply::Refused(Refusal::WindowClosed));
    // An abort is known at once.
    let window = owner.window(5);
    peer.say(|out| put_open(out, 6, open(5, 1)), None);
    peer.say(
        |out| crate::pull::frames::put_abort(out, 6, AbortReason::Cancelled.code()),
        None,
    );
    let ended = within(window.until(|phase| (!matches!(phase, Phase::Open | Phase::Receiving)).then(|| phase.clone())));
    assert_eq!(ended.await, Phase::Failed(WindowError::Aborted(AbortReason::Cancelled)));
    // And a breach ends the link with everything on it.
    let window = owner.window(6);
    peer.say(|out| put_open(out, 7, open(6, 1)), None);
    peer.pull(7, 0, 6 * 4096, 64);
    assert_eq!(peer.reply().await, Reply::Landed(64));
    peer.say(|out| put_open(out, 8, open(5, 99)), None);
    assert_eq!(peer.hear().await, None);
    let ended = within(window.until(|phase| (*phase != Phase::Receiving).then(|| phase.clone())));
    assert!(matches!(ended.await, Phase::Failed(WindowError::PeerLost { peer, .. }) if peer == "peer"));
}

#[tokio::test]
async fn floods_are_breaches() {
    let owner = Owner::new();
    // More pushes than allowed.
    let mut peer = Peer::new(&owner).await;
    peer.region(1, 8192, memory(8192, SealFlags::SHRINK));
    assert_eq!(peer.hear().await.map(|frame| frame.body), Some(Body::RegionTaken));
    let windows: Vec<_> = (1..6).map(|id| owner.window(id)).collect();
    for id in 1..6 {
        peer.say(|out| put_open(out, id, open(id.into(), 1)), None);
    }
    assert_eq!(peer.hear().await, None);
    for window in windows {
        owner.table.close(&window);
    }
    // Descriptors that belong to nothing.
    let mut peer = Peer::new(&owner).await;
    for _ in 0..10 {
        peer.say(
            |out| crate::pull::frames::put_forget(out, 1),
            Some(memory(4096, SealFlags::SHRINK)),
        );
    }
    assert_eq!(peer.hear().await, None);
}
