//! Tickets: what binds a Unix socket to an authenticated QUIC connection. Issued inside the hello, redeemed once, void
//! when the connection ends.

use crate::hello::Offer;
use crate::window_table::lock;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// The tickets that have been issued and not redeemed. As many as there are connections from peers, at most.
#[derive(Default)]
pub(super) struct Tickets {
    waiting: Mutex<HashMap<[u8; 16], Ticket>>,
}

/// One offer, from the owner's side.
pub(super) struct Ticket {
    asker_secret: [u8; 32],
    pub(super) owner_secret: [u8; 32],
    /// For logs and errors: who was given the offer.
    pub(super) peer: Arc<str>,
    life: watch::Receiver<()>,
}

/// The other end of a ticket, kept with the connection it was handed out on. Dropping it voids the ticket and ends the
/// link.
pub(crate) struct Invitation {
    tickets: Arc<Tickets>,
    ticket: [u8; 16],
    _life: watch::Sender<()>,
}

impl Tickets {
    pub(super) fn issue(self: &Arc<Self>, offer: &Offer, peer: &str) -> Invitation {
        let (life, alive) = watch::channel(());
        let ticket = Ticket {
            asker_secret: offer.asker_secret,
            owner_secret: offer.owner_secret,
            peer: peer.into(),
            life: alive,
        };
        lock(&self.waiting).insert(offer.ticket, ticket);
        Invitation {
            tickets: self.clone(),
            ticket: offer.ticket,
            _life: life,
        }
    }

    /// The ticket, if it is there and the secret is right; it is then redeemed. A wrong secret leaves it as it is.
    pub(super) fn redeem(&self, ticket: &[u8; 16], secret: &[u8; 32]) -> Option<Ticket> {
        let mut waiting = lock(&self.waiting);
        let right = waiting
            .get(ticket)
            .is_some_and(|found| same(&found.asker_secret, secret));
        right.then(|| waiting.remove(ticket)).flatten()
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        lock(&self.waiting).len()
    }
}

impl Ticket {
    /// Resolves once the connection it was handed out on has ended.
    pub(super) async fn void(&mut self) {
        while self.life.changed().await.is_ok() {}
    }
}

impl Drop for Invitation {
    fn drop(&mut self) {
        lock(&self.tickets.waiting).remove(&self.ticket);
    }
}

/// Compares secrets in a time that does not depend on where they differ.
pub(super) fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(difference) == 0
}
