//! Checkpoints: what a coordinator signs when it closes a period.
//!
//! ```text
//! signed bytes = "baton.ledger.checkpoint\n" ‖ version ‖ first sequence ‖ last sequence ‖ Merkle root ‖ hash of the last row
//!                ‖ time ‖ public key ‖ hash of the checkpoint before
//! hash         = BLAKE3(signed bytes)
//! ```
//!
//! The signature is Ed25519 over the signed bytes; it is not part of the hash, so that the chain does not depend on who
//! signed twice. The first checkpoint follows [`GENESIS`]. The time is that of the proposer's command, which it knows when
//! it signs.
//!
//! A valid signature says that the holder of the key stated this; whether the key may be believed is for the verifier, who
//! gives the keys.

use crate::encoding::Encoder;
use crate::{GENESIS, Hash};
use baton_proto::state::Checkpoint;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

/// Version of the signed bytes.
const VERSION: u8 = 1;
/// Bytes of a public key.
pub const PUBLIC_KEY_BYTES: usize = 32;

/// Why a checkpoint cannot be made or believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The bytes are no Ed25519 key in PKCS#8.
    #[error("this is not an Ed25519 key in PKCS#8; make a new one and register its public half")]
    BadKey,
    /// No key could be made.
    #[error("the operating system gives no randomness")]
    NoRandomness,
    /// A field is not 32 bytes (64 for the signature).
    #[error("{0} has the wrong length")]
    BadLength(&'static str),
    /// The period is empty or does not follow the one before.
    #[error("the period {first}..={last} does not follow row {before}")]
    NotContiguous {
        /// First row of the period.
        first: u64,
        /// Its last row.
        last: u64,
        /// Last row of the period before; 0 if there is none.
        before: u64,
    },
    /// It names another checkpoint before it.
    #[error("the checkpoint of rows {first}..={last} does not name the one before by its hash")]
    BrokenChain {
        /// First row of the period.
        first: u64,
        /// Its last row.
        last: u64,
    },
    /// The signature is not this key's over these bytes.
    #[error("the signature of the checkpoint of rows {first}..={last} is wrong")]
    BadSignature {
        /// First row of the period.
        first: u64,
        /// Its last row.
        last: u64,
    },
}

/// The key a coordinator signs with.
pub struct SigningKey(Ed25519KeyPair);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SigningKey")
            .field(&crate::hex(&self.public_key()))
            .finish()
    }
}

impl SigningKey {
    /// Makes a new key: the PKCS#8 document to keep secret. [`Self::from_pkcs8`] reads it.
    ///
    /// # Errors
    /// [`CheckpointError::NoRandomness`].
    pub fn generate_pkcs8() -> Result<Vec<u8>, CheckpointError> {
        let document =
            Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| CheckpointError::NoRandomness)?;
        Ok(document.as_ref().to_vec())
    }

    /// Reads a key in PKCS#8 (DER), with or without its public half.
    ///
    /// # Errors
    /// [`CheckpointError::BadKey`].
    pub fn from_pkcs8(document: &[u8]) -> Result<Self, CheckpointError> {
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(document)
            .map(Self)
            .map_err(|_| CheckpointError::BadKey)
    }

    /// The key of 32 secret bytes. Deterministic, for simulations and tests.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(Ed25519KeyPair::from_seed_unchecked(seed).expect("every 32 bytes are an Ed25519 seed"))
    }

    /// Its public half.
    pub fn public_key(&self) -> [u8; PUBLIC_KEY_BYTES] {
        self.0
            .public_key()
            .as_ref()
            .try_into()
            .expect("an Ed25519 public key has 32 bytes")
    }

    /// Sets the public key and the signature of `checkpoint`, whose other fields are final.
    pub fn sign(&self, checkpoint: &mut Checkpoint) {
        checkpoint.public_key = self.public_key().to_vec().into();
        checkpoint.signature = self.0.sign(&signed_bytes(checkpoint)).as_ref().to_vec().into();
    }
}

/// The bytes that are signed.
pub fn signed_bytes(checkpoint: &Checkpoint) -> Vec<u8> {
    encode(checkpoint).finish()
}

/// The hash the next checkpoint names this one by.
pub fn hash(checkpoint: &Checkpoint) -> Hash {
    encode(checkpoint).hash()
}

fn encode(checkpoint: &Checkpoint) -> Encoder {
    let mut out = Encoder::new("baton.ledger.checkpoint");
    out.u8(VERSION)
        .u64(checkpoint.first_sequence)
        .u64(checkpoint.last_sequence)
        .bytes(&checkpoint.merkle_root)
        .bytes(&checkpoint.last_hash)
        .u64(checkpoint.at_unix_ms)
        .bytes(&checkpoint.public_key)
        .bytes(&checkpoint.previous_hash);
    out
}

/// Checks lengths, the place in the chain after `before` (`None`: it is the first), and the signature. Whether root and
/// last hash are those of the rows is for who has the rows.
///
/// # Errors
/// What [`CheckpointError`] says, the first that is found.
pub fn verify_after(checkpoint: &Checkpoint, before: Option<&Checkpoint>) -> Result<(), CheckpointError> {
    let (first, last) = (checkpoint.first_sequence, checkpoint.last_sequence);
    let last_before = before.map_or(0, |before| before.last_sequence);
    if last_before.checked_add(1) != Some(first) || last < first {
        return Err(CheckpointError::NotContiguous {
            first,
            last,
            before: last_before,
        });
    }
    verify_signature(checkpoint)?;
    let previous = before.map_or(GENESIS, hash);
    if checkpoint.previous_hash.as_ref() != previous {
        return Err(CheckpointError::BrokenChain { first, last });
    }
    Ok(())
}

/// Checks the lengths and the signature by the key that the checkpoint names.
///
/// # Errors
/// [`CheckpointError::BadLength`] and [`CheckpointError::BadSignature`].
pub fn verify_signature(checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
    for (name, bytes) in [
        ("the Merkle root", &checkpoint.merkle_root),
        ("the last row's hash", &checkpoint.last_hash),
        ("the public key", &checkpoint.public_key),
        ("the hash of the checkpoint before", &checkpoint.previous_hash),
    ] {
        if bytes.len() != 32 {
            return Err(CheckpointError::BadLength(name));
        }
    }
    let (first, last) = (checkpoint.first_sequence, checkpoint.last_sequence);
    let key = UnparsedPublicKey::new(&ED25519, &checkpoint.public_key);
    key.verify(&signed_bytes(checkpoint), &checkpoint.signature)
        .map_err(|_| CheckpointError::BadSignature { first, last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hex;

    fn checkpoint() -> Checkpoint {
        let mut checkpoint = Checkpoint {
            first_sequence: 1,
            last_sequence: 3,
            merkle_root: vec![1; 32].into(),
            last_hash: vec![2; 32].into(),
            at_unix_ms: 1_764_000_000_000,
            previous_hash: GENESIS.to_vec().into(),
            ..Checkpoint::default()
        };
        SigningKey::from_seed(&[7; 32]).sign(&mut checkpoint);
        checkpoint
    }

    #[test]
    fn vectors() {
        let checkpoint = checkpoint();
        assert_eq!(
            hex(&hash(&checkpoint)),
            "768d4e2c116ac2e8b4c2b6d19cb77e2b6d5f604a118468d01f20fedb994f1a5c"
        );
        assert_eq!(
            hex(&checkpoint.public_key),
            "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c"
        );
        assert_eq!(
            hex(&checkpoint.signature),
            "a3b002180bff96a837164369649796132563d81756248018e8709c760b1cfb2d25d944c45100a5a04f5b45d3642fb64c436724979a70d5234893445cbdd00706"
        );
    }

    #[test]
    fn a_chain_holds() {
        let first = checkpoint();
        assert_eq!(verify_after(&first, None), Ok(()));
        let mut second = Checkpoint {
            first_sequence: 4,
            last_sequence: 4,
            previous_hash: hash(&first).to_vec().into(),
            ..first.clone()
        };
        // Another member of the group signs: keys may change along the chain.
        SigningKey::from_seed(&[8; 32]).sign(&mut second);
        assert_eq!(verify_after(&second, Some(&first)), Ok(()));
        assert_eq!(
            verify_after(&second, None),
            Err(CheckpointError::NotContiguous {
                first: 4,
                last: 4,
                before: 0
            })
        );
        let mut other = first.clone();
        other.at_unix_ms += 1;
        assert_eq!(
            verify_after(&second, Some(&other)),
            Err(CheckpointError::BrokenChain { first: 4, last: 4 })
        );
    }

    #[test]
    fn every_field_is_signed() {
        let changes: [fn(&mut Checkpoint); 8] = [
            |c| c.first_sequence += 1,
            |c| c.last_sequence += 1,
            |c| c.merkle_root = vec![9; 32].into(),
            |c| c.last_hash = vec![9; 32].into(),
            |c| c.at_unix_ms += 1,
            |c| c.previous_hash = vec![9; 32].into(),
            |c| c.public_key = SigningKey::from_seed(&[8; 32]).public_key().to_vec().into(),
            |c| c.signature = vec![0; 64].into(),
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut checkpoint = checkpoint();
            change(&mut checkpoint);
            let result = verify_signature(&checkpoint);
            assert!(
                matches!(result, Err(CheckpointError::BadSignature { .. })),
                "change {n}: {result:?}"
            );
        }
        let mut short = checkpoint();
        short.merkle_root = vec![1; 31].into();
        assert_eq!(
            verify_signature(&short),
            Err(CheckpointError::BadLength("the Merkle root"))
        );
    }

    #[test]
    fn keys_are_kept_as_pkcs8() {
        let document = SigningKey::generate_pkcs8().expect("randomness");
        let key = SigningKey::from_pkcs8(&document).expect("its own");
        let mut checkpoint = checkpoint();
        key.sign(&mut checkpoint);
        assert_eq!(verify_signature(&checkpoint), Ok(()));
        assert_eq!(
            SigningKey::from_pkcs8(&document[1..]).err(),
            Some(CheckpointError::BadKey)
        );
        // A secret never shows.
        assert_eq!(format!("{key:?}"), format!("SigningKey({:?})", hex(&key.public_key())));
    }
}
