//! How much one client address may have at once: connections, and requests in work. Without it one machine could take every
//! place there is before anybody asks for a key. Addresses that stand for many (a proxy, a load balancer, this machine) are
//! trusted by configuration and only counted in the whole.
//!
//! Headers that name another address (`X-Forwarded-For`) are not read: who can write them is not known here.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

/// A range of addresses, such as `10.0.0.0/8`, `fd00::/8` or `127.0.0.1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ClientRange {
    /// Any address of it, IPv4 as it is.
    addr: IpAddr,
    /// Leading bits that count.
    bits: u32,
}

impl ClientRange {
    /// This machine.
    pub fn loopback() -> Vec<Self> {
        vec![
            Self {
                addr: Ipv4Addr::LOCALHOST.into(),
                bits: 8,
            },
            Self {
                addr: Ipv6Addr::LOCALHOST.into(),
                bits: 128,
            },
        ]
    }

    fn holds(&self, addr: IpAddr) -> bool {
        match (self.addr, addr) {
            (IpAddr::V4(range), IpAddr::V4(addr)) => same(range.to_bits().into(), addr.to_bits().into(), 32, self.bits),
            (IpAddr::V6(range), IpAddr::V6(addr)) => same(range.to_bits(), addr.to_bits(), 128, self.bits),
            _ => false,
        }
    }
}

fn same(a: u128, b: u128, width: u32, bits: u32) -> bool {
    (a ^ b).checked_shr(width - bits).unwrap_or(0) == 0
}

impl FromStr for ClientRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no address range; write one as 10.0.0.0/8 or fd00::/8");
        let (addr, bits) = text
            .split_once('/')
            .map_or((text, None), |(addr, bits)| (addr, Some(bits)));
        let addr: IpAddr = addr.parse().map_err(|_| wrong())?;
        let width = if addr.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => width,
            Some(bits) => bits.parse().ok().filter(|bits| *bits <= width).ok_or_else(wrong)?,
        };
        Ok(Self { addr, bits })
    }
}

impl TryFrom<String> for ClientRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Who counts as one client: an IPv4 address, or the network that one IPv6 customer has at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Client {
    V4(u32),
    Net64(u64),
}

impl Client {
    fn of(addr: IpAddr) -> Self {
        match addr.to_canonical() {
            IpAddr::V4(addr) => Self::V4(addr.to_bits()),
            IpAddr::V6(addr) => Self::Net64((addr.to_bits() >> 64) as u64),
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Counts {
    connections: usize,
    requests: usize,
}

/// The counts of all clients that have a connection.
pub(crate) struct Clients {
    trusted: Vec<ClientRange>,
    connections_max: usize,
    requests_max: usize,
    /// At most one entry per open connection.
    counts: Mutex<HashMap<Client, Counts>>,
}

impl Clients {
    pub fn new(trusted: Vec<ClientRange>, connections_max: usize, requests_max: usize) -> Arc<Self> {
        Arc::new(Self {
            trusted,
            connections_max,
            requests_max,
            counts: Mutex::default(),
        })
    }

    /// A place for one more connection; `None` if this client has as many as it may.
    pub fn connect(self: &Arc<Self>, addr: IpAddr) -> Option<Peer> {
        let addr = addr.to_canonical();
        let client = (!self.trusted.iter().any(|range| range.holds(addr))).then(|| Client::of(addr));
        if let Some(client) = client {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            let known = counts.get(&client).copied().unwrap_or_default();
            if known.connections >= self.connections_max {
                return None;
            }
            counts.entry(client).or_default().connections += 1;
        }
        Some(Peer {
            clients: self.clone(),
            client,
        })
    }

    fn change(&self, client: Option<Client>, change: impl FnOnce(&mut Counts)) {
        let Some(client) = client else { return };
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = counts.entry(client).or_default();
        change(entry);
        if entry.connections == 0 && entry.requests == 0 {
            counts.remove(&client);
        }
    }
}

/// One connection of a client. Dropped, it makes room.
pub(crate) struct Peer {
    clients: Arc<Clients>,
    client: Option<Client>,
}

impl Peer {
    /// A place for one more request; `None` if this client has as many as it may.
    pub fn request(&self) -> Option<PeerRequest> {
        let mut fits = true;
        self.clients.change(self.client, |counts| {
            fits = counts.requests < self.clients.requests_max;
            counts.requests += usize::from(fits);
        });
        fits.then(|| PeerRequest {
            clients: self.clients.clone(),
            client: self.client,
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.clients.change(self.client, |counts| counts.connections -= 1);
    }
}

/// One request of a client in work. Dropped, it makes room.
pub(crate) struct PeerRequest {
    clients: Arc<Clients>,
    client: Option<Client>,
}

impl Drop for PeerRequest {
    fn drop(&mut self) {
        self.clients.change(self.client, |counts| counts.requests -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_they_say() {
        let holds = |range: &str, addr: &str| range.parse::<ClientRange>().unwrap().holds(addr.parse().unwrap());
        for (range, addr) in [
            ("127.0.0.0/8", "127.9.9.9"),
            ("10.1.2.3", "10.1.2.3"),
            ("0.0.0.0/0", "8.8.8.8"),
            ("fd00::/8", "fd12::1"),
            ("::/0", "::1"),
        ] {
            assert!(holds(range, addr), "{range} {addr}");
        }
        for (range, addr) in [
            ("127.0.0.0/8", "128.0.0.1"),
            ("10.1.2.3", "10.1.2.4"),
            ("fd00::/8", "fe80::1"),
            ("0.0.0.0/0", "::1"),
        ] {
            assert!(!holds(range, addr), "{range} {addr}");
        }
        for bad in ["", "x", "10.0.0.0/33", "::/129", "10.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(bad.parse::<ClientRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn one_client_cannot_take_all_and_places_come_back() {
        let clients = Clients::new(ClientRange::loopback(), 2, 1);
        let connect = |addr: &str| clients.connect(addr.parse().unwrap());
        let (a, b) = (connect("10.0.0.1").unwrap(), connect("::ffff:10.0.0.1").unwrap());
        assert!(connect("10.0.0.1").is_none(), "IPv4 in IPv6 is the same client");
        let request = a.request().unwrap();
        assert!(a.request().is_none() && b.request().is_none());
        drop(request);
        assert!(b.request().is_some());
        let other = connect("10.0.0.2").unwrap();
        drop(b);
        assert!(connect("10.0.0.1").is_some());

        let sixes: Vec<_> = (1..4).map(|i| connect(&format!("2001:db8::{i}"))).collect();
        assert!(
            sixes[2].is_none() && connect("2001:db8:0:1::1").is_some(),
            "one network is one client"
        );
        let local: Vec<_> = (0..9).map(|_| connect("127.0.0.1").unwrap()).collect();
        assert!(local.iter().all(|peer| peer.request().is_some()));
        drop((a, other, sixes, local));
        assert!(clients.counts.lock().unwrap().is_empty(), "nothing is left behind");
    }

    /// A request may outlive its connection's count, or the other way round.
    #[test]
    fn the_order_of_ends_does_not_matter() {
        let clients = Clients::new(Vec::new(), 1, 1);
        let peer = clients.connect("10.0.0.1".parse().unwrap()).unwrap();
        let request = peer.request();
        drop(peer);
        let again = clients.connect("10.0.0.1".parse().unwrap()).unwrap();
        assert!(again.request().is_none());
        drop(request);
        assert!(again.request().is_some());
    }
}
