//! Role-bound identities (promise P6): between baton processes there is only mutual TLS, and a certificate says what
//! its holder is, not just that it belongs.
//!
//! A cluster has one private CA ([`Authority`]). Every process gets a certificate with the names `<role>.baton.internal` and
//! `<process>.<role>.baton.internal`; a client names the role it means to talk to, a server lists the roles it serves, and a
//! worker's certificate is never taken for a coordinator's. Where one coordinator must
//! be told from another, the second name counts. Files:
//!
//! ```text
//! <dir>/ca.pem          the CA certificate, needed by everybody
//! <dir>/ca.key          the CA key, needed only where certificates are issued
//! <dir>/<name>.pem      a process's certificate
//! <dir>/<name>.key      its key (mode 0600)
//! ```
//!
//! This crate deliberately does not rotate certificates in a running process and knows no revocation: leaf
//! certificates are short-lived and are issued anew at every `baton up`.
#![forbid(unsafe_code)]

mod authority;
mod error;
mod identity;
mod role;
mod tls;

pub use authority::Authority;
pub use error::IdentityError;
pub use identity::Identity;
pub use role::{Role, is_named, role_of};
pub use tls::{require_name, require_role};
