//! Links on which the receiver fetches the bytes of a push itself: the frames, what may be sent when, and the landing.
//!
//! ```text
//! sender                                          receiver
//! REGION id, how to reach its memory    ──►       maps it, or learns its address; once for the link's life
//! OPEN push, window, region             ──►       claims the window
//! PULL [(local, remote, len), …]        ──►       copies into its region, under the window's fence
//!                                       ◄──       LANDED bytes
//! FINISH total, payload                 ──►       completes the window
//!                                       ◄──       DONE
//! ```
//!
//! A push on a link ([`flow`]) is *pulling*, then *finishing*; at the receiver ([`landing`]) it is *landing*, then over.
//! What bytes come from is a [`source::Source`], what frames travel on a [`Socket`].
//!
//! # The invariants
//!
//! 1. **Receiver's fence.** The receiver itself copies, under its window's lock, and stops soon after somebody waits for it.
//! 2. **Sender's fence.** FINISH leaves only after every byte was acknowledged as landed and while the push is alive, so
//!    a byte that is read after a push was given up can only land in a window that then fails.
//! 3. **Bounded.** A push asks for [`flow::PULLS_AHEAD`] batches at once; regions, pushes and frames are limited.
//!
//! Deliberately not here: how links are made and with whom ([`crate::shared_memory`], [`crate::nixl`]).

pub(crate) mod copiers;
pub(crate) mod flow;
pub(crate) mod frames;
pub(crate) mod landing;
pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod socket;
pub(crate) mod source;

pub(crate) use copiers::Copiers;
pub(crate) use receive::Receiving;
pub(crate) use send::{Carried, Link};
pub(crate) use socket::Socket;

use tokio::sync::watch;

/// Resolves when `stop` is set or its sender is gone.
pub(crate) async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is as good.
    let _ = stop.wait_for(|stop| *stop).await;
}
