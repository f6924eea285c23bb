//! A safe face on a NIXL agent: register regions, learn of peers, read from them.
//!
//! One lock around all calls: NIXL's agents are not thread-safe by default, and no call here waits for data. Every object
//! that the library hands out is destroyed once, whichever way a function is left.

use super::NixlError;
use super::library::{AgentConfig, Calls, Handle, IN_PROGRESS, MEMORY_HOST, OPERATION_READ, SUCCESS, Status};
use crate::Region;
use crate::window_table::lock;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::{Arc, Mutex};

/// What moves the bytes. UCX picks the fabric by itself (InfiniBand, RoCE, TCP, shared memory).
const BACKEND: &CStr = c"UCX";

/// Settings of UCX, each only where the environment does not say otherwise (`UCX_TCP_TX_SEG_SIZE` and so on). Over
/// sockets the peer answers a read in messages of its send segment; the 8 KiB that UCX has by itself cost two thirds of the
/// bandwidth. Other fabrics ignore them.
const UCX_SETTINGS: &CStr = c"TCP_TX_SEG_SIZE=1m,TCP_RX_SEG_SIZE=1m,TCP_SNDBUF=4m,TCP_RCVBUF=4m";

/// Longest sleep of the library's thread that answers peers. News wakes it; this is for news that UCX misses. With the
/// library's default, no sleep, an idle agent keeps a core busy, and reads on two cores wait for it.
const PROGRESS_DELAY_US: u64 = 1000;

/// A run of bytes to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NixlPiece {
    /// Offset in the local region.
    pub(crate) local: usize,
    /// Address in the peer's process, inside memory that it registered.
    pub(crate) remote: usize,
    /// Bytes.
    pub(crate) len: usize,
}

/// See the module.
pub(crate) struct NixlAgent {
    calls: Calls,
    agent: Mutex<Agent>,
}

struct Agent {
    handle: Handle,
    /// Registered memory and its descriptor list; the mapping must outlive the registration.
    registered: Vec<(Arc<Region>, Handle)>,
}

// SAFETY: handles are plain pointers into the library's heap, used only under the lock that owns them.
unsafe impl Send for Agent {}

/// A read under way, or over. Dropping it gives up; see [`NixlAgent::poll`].
pub(crate) struct NixlRead {
    owner: Arc<NixlAgent>,
    request: Handle,
    /// Written by the read.
    _target: Arc<Region>,
}

// SAFETY: as for Agent.
unsafe impl Send for NixlRead {}

impl NixlAgent {
    /// An agent of that name, unique among those that talk to each other.
    ///
    /// # Errors
    /// [`NixlError`]: no library, or it has no UCX.
    pub(crate) fn open(name: &str) -> Result<Arc<Self>, NixlError> {
        let calls = Calls::load()?;
        let name = CString::new(name).map_err(|_| NixlError::Name(name.to_owned()))?;
        let config = AgentConfig {
            progress_thread: true,
            listen_thread: false,
            listen_port: 0,
            // The lock of this value.
            thread_sync: 0,
            workers: 1,
            progress_delay_us: PROGRESS_DELAY_US,
            listen_delay_us: 0,
            telemetry: false,
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the name is a C string, the configuration has the layout the call expects, and the place for the handle
        // is valid.
        check("create_configured_agent", unsafe {
            (calls.create_agent)(name.as_ptr(), &raw const config, &raw mut handle)
        })?;
        let agent = Self {
            calls,
            agent: Mutex::new(Agent {
                handle,
                registered: Vec::new(),
            }),
        };
        agent.start_backend(handle)?;
        Ok(Arc::new(agent))
    }

    fn start_backend(&self, agent: Handle) -> Result<(), NixlError> {
        let (mut memories, mut params, mut backend) =
            (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a live agent, a C string, valid places; the two lists are destroyed below, once. The backend belongs
        // to the agent.
        unsafe {
            let got = (self.calls.get_plugin_params)(agent, BACKEND.as_ptr(), &raw mut memories, &raw mut params);
            check("get_plugin_params", got)?;
            let set = (self.calls.params_add)(params, c"engine_config".as_ptr(), UCX_SETTINGS.as_ptr());
            if set != SUCCESS {
                tracing::debug!(status = set, "UCX keeps its own settings");
            }
            let created = (self.calls.create_backend)(agent, BACKEND.as_ptr(), params, &raw mut backend);
            (self.calls.destroy_mem_list)(memories);
            (self.calls.destroy_params)(params);
            check("create_backend", created)
        }
    }

    /// Makes a region's memory known. Peers may read it once they have this agent's [metadata](Self::metadata), and
    /// this agent may read into it. Registering a region again does nothing. The registration keeps the region; once nobody
    /// else does, the next call of this function takes it back and frees the memory.
    ///
    /// # Errors
    /// [`NixlError::Call`], where memory cannot be pinned for instance.
    pub(crate) fn register(&self, region: &Arc<Region>) -> Result<(), NixlError> {
        let mut agent = lock(&self.agent);
        // Regions that only this registration keeps.
        let unused = |(known, _): &mut (Arc<Region>, Handle)| Arc::strong_count(known) == 1;
        let unused: Vec<_> = agent.registered.extract_if(.., unused).collect();
        for registration in unused {
            self.take_back(agent.handle, registration);
        }
        if agent.registered.iter().any(|(known, _)| Arc::ptr_eq(known, region)) {
            return Ok(());
        }
        let mut list = std::ptr::null_mut();
        // SAFETY: valid places and handles; the memory outlives its registration, because `registered` keeps the region
        // until it is taken back. The list is destroyed here on failure and in Drop otherwise.
        unsafe {
            check(
                "create_reg_dlist",
                (self.calls.create_reg_dlist)(MEMORY_HOST, &raw mut list),
            )?;
            let added = (self.calls.reg_dlist_add_desc)(list, region.address(), region.len(), 0, std::ptr::null(), 0);
            let registered = check("reg_dlist_add_desc", added).and_then(|()| {
                check(
                    "register_mem",
                    (self.calls.register_mem)(agent.handle, list, std::ptr::null_mut()),
                )
            });
            if registered.is_err() {
                (self.calls.destroy_reg_dlist)(list);
                return registered;
            }
        }
        agent.registered.push((region.clone(), list));
        Ok(())
    }

    fn take_back(&self, agent: Handle, (region, list): (Arc<Region>, Handle)) {
        // SAFETY: registered with this list, and taken back once, because the list leaves `registered` before; the region
        // is alive until the next line.
        unsafe {
            (self.calls.deregister_mem)(agent, list, std::ptr::null_mut());
            (self.calls.destroy_reg_dlist)(list);
        }
        drop(region);
    }

    /// What a peer must know to read from here: connection data and registered memory. Opaque bytes.
    ///
    /// # Errors
    /// [`NixlError::Call`].
    pub(crate) fn metadata(&self) -> Result<Vec<u8>, NixlError> {
        let agent = lock(&self.agent);
        let (mut data, mut len) = (std::ptr::null_mut::<c_void>(), 0usize);
        // SAFETY: valid places; on success the library hands over `len` bytes from malloc.
        unsafe {
            check(
                "get_local_md",
                (self.calls.get_local_md)(agent.handle, &raw mut data, &raw mut len),
            )?;
            let bytes = std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec();
            libc::free(data);
            Ok(bytes)
        }
    }

    /// Learns of a peer by its metadata; its name there, for [`read`](Self::read).
    ///
    /// # Errors
    /// [`NixlError::Call`] for metadata that this library cannot read. It parses them itself: take them only from
    /// authenticated peers.
    pub(crate) fn add_peer(&self, metadata: &[u8]) -> Result<CString, NixlError> {
        let agent = lock(&self.agent);
        let mut name = std::ptr::null_mut::<c_char>();
        // SAFETY: the bytes live during the call; on success the library hands over a C string from malloc.
        unsafe {
            let loaded =
                (self.calls.load_remote_md)(agent.handle, metadata.as_ptr().cast(), metadata.len(), &raw mut name);
            check("load_remote_md", loaded)?;
            let owned = CStr::from_ptr(name).to_owned();
            libc::free(name.cast());
            Ok(owned)
        }
    }

    /// Forgets a peer that is gone.
    pub(crate) fn forget_peer(&self, peer: &CStr) {
        let agent = lock(&self.agent);
        // SAFETY: a live agent and a C string. A peer it does not know is no harm.
        let _ = unsafe { (self.calls.invalidate_remote_md)(agent.handle, peer.as_ptr()) };
    }

    /// Starts a read of `pieces` from the peer into `target`, which must be registered.
    ///
    /// # Errors
    /// [`NixlError::Call`].
    pub(crate) fn read(
        self: &Arc<Self>,
        peer: &CStr,
        target: &Arc<Region>,
        pieces: &[NixlPiece],
    ) -> Result<NixlRead, NixlError> {
        let agent = lock(&self.agent);
        let mut request = std::ptr::null_mut();
        let (mut local, mut remote) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: valid places and handles. Local addresses are inside `target` (asserted), which the returned value keeps
        // alive; remote ones are checked by the library against what the peer registered. The lists are copied by
        // create_xfer_req and destroyed here, once; destroying null is refused without harm.
        unsafe {
            let built = (|| {
                check(
                    "create_xfer_dlist",
                    (self.calls.create_xfer_dlist)(MEMORY_HOST, &raw mut local),
                )?;
                check(
                    "create_xfer_dlist",
                    (self.calls.create_xfer_dlist)(MEMORY_HOST, &raw mut remote),
                )?;
                for piece in pieces {
                    assert!(
                        target.contains(&(piece.local..piece.local + piece.len)),
                        "a piece outside its region"
                    );
                    let here = target.address() + piece.local;
                    check(
                        "xfer_dlist_add_desc",
                        (self.calls.xfer_dlist_add_desc)(local, here, piece.len, 0),
                    )?;
                    check(
                        "xfer_dlist_add_desc",
                        (self.calls.xfer_dlist_add_desc)(remote, piece.remote, piece.len, 0),
                    )?;
                }
                let created = (self.calls.create_xfer_req)(
                    agent.handle,
                    OPERATION_READ,
                    local,
                    remote,
                    peer.as_ptr(),
                    &raw mut request,
                    std::ptr::null_mut(),
                );
                check("create_xfer_req", created)
            })();
            for list in [local, remote] {
                if !list.is_null() {
                    (self.calls.destroy_xfer_dlist)(list);
                }
            }
            built?;
            let posted = (self.calls.post_xfer_req)(agent.handle, request, std::ptr::null_mut());
            let read = NixlRead {
                owner: self.clone(),
                request,
                _target: target.clone(),
            };
            if posted != SUCCESS && posted != IN_PROGRESS {
                drop(agent);
                drop(read);
                return Err(NixlError::Call {
                    call: "post_xfer_req",
                    status: posted,
                });
            }
            Ok(read)
        }
    }
}

impl NixlRead {
    /// Whether every byte is here.
    ///
    /// # Errors
    /// [`NixlError::Call`]: the peer is gone, or refused. The read is then over.
    pub(crate) fn poll(&self) -> Result<bool, NixlError> {
        let agent = lock(&self.owner.agent);
        // SAFETY: a live agent and a request of it.
        match unsafe { (self.owner.calls.get_xfer_status)(agent.handle, self.request) } {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            status => Err(NixlError::Call {
                call: "get_xfer_status",
                status,
            }),
        }
    }
}

impl Drop for NixlRead {
    fn drop(&mut self) {
        let agent = lock(&self.owner.agent);
        // SAFETY: the request is live until here and not used again. Releasing one under way cancels it first.
        unsafe {
            (self.owner.calls.release_xfer_req)(agent.handle, self.request);
            (self.owner.calls.destroy_xfer_req)(self.request);
        }
    }
}

impl Drop for NixlAgent {
    fn drop(&mut self) {
        let mut agent = lock(&self.agent);
        for registration in std::mem::take(&mut agent.registered) {
            self.take_back(agent.handle, registration);
        }
        // SAFETY: made by create_agent and destroyed nowhere else; reads hold the agent alive by their Arc.
        unsafe { (self.calls.destroy_agent)(agent.handle) };
    }
}

fn check(call: &'static str, status: Status) -> Result<(), NixlError> {
    if status == SUCCESS {
        Ok(())
    } else {
        Err(NixlError::Call { call, status })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// Two agents in one process, where the library can be found.
    #[test]
    fn reads_from_a_peer() {
        let owner = match NixlAgent::open("owner") {
            Ok(agent) => agent,
            Err(error @ NixlError::Library(_)) => return eprintln!("skipped: {error}"),
            Err(error) => panic!("{error}"),
        };
        let reader = NixlAgent::open("reader").unwrap();
        const LEN: usize = 8 << 20;
        let (source, target) = (Region::new(LEN).unwrap(), Region::new(LEN).unwrap());
        let pattern: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
        assert!(source.copy_in(0, &pattern));
        owner.register(&source).unwrap();
        owner.register(&source).unwrap();
        reader.register(&target).unwrap();
        let peer = reader.add_peer(&owner.metadata().unwrap()).unwrap();
        assert_eq!(peer.as_c_str(), c"owner");
        assert!(reader.add_peer(b"not metadata").is_err());
        // Halves change places.
        let half = LEN / 2;
        let pieces = [(0, half), (half, 0)].map(|(local, remote)| NixlPiece {
            local,
            remote: source.address() + remote,
            len: half,
        });
        let read = reader.read(&peer, &target, &pieces).unwrap();
        let begin = Instant::now();
        while !read.poll().unwrap() {
            assert!(begin.elapsed() < Duration::from_secs(20), "the read does not end");
            std::thread::yield_now();
        }
        drop(read);
        let mut got = vec![0; LEN];
        assert!(target.copy_out(0, &mut got));
        assert!(got[..half] == pattern[half..] && got[half..] == pattern[..half]);
        // Outside what the peer registered.
        let outside = NixlPiece {
            local: 0,
            remote: source.address() + LEN,
            len: 4096,
        };
        assert!(reader.read(&peer, &target, &[outside]).is_err());
        // Given up while under way, at once.
        drop(reader.read(&peer, &target, &pieces).unwrap());
        reader.forget_peer(&peer);
        assert!(reader.read(&peer, &target, &pieces).is_err());
    }
}
