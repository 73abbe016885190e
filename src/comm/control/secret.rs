//! The secret of a run, and the proofs by which both ends of a connection show that they know it. MPI brings it to all
//! ranks; no connection carries it.
//!
//! Rank 0 sends a challenge, random bytes. The other rank answers with a challenge of its own and HMAC-SHA256 (RFC
//! 2104) of both and its name under the secret; rank 0 proves itself by another HMAC of the same. An old answer does
//! not fit a new challenge, and the two proofs differ by their labels, so that neither can be sent back as the other.

use super::judge::PeerName;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::fmt;

/// Random bytes that a proof has to fit.
pub(super) type Challenge = [u8; 32];
/// HMAC-SHA256.
pub(super) type Proof = [u8; 32];

/// 256 random bits that the ranks of a run share.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Secret([u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Root,
    Other,
}

/// Random bytes of the operating system.
///
/// # Errors
/// It has none.
pub(super) fn random() -> Result<[u8; 32], getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// The challenges of a connection, and the rank that is not 0.
pub(super) struct Handshake<'a> {
    pub of_root: &'a Challenge,
    pub of_other: &'a Challenge,
    pub name: &'a PeerName,
}

impl Secret {
    /// A new secret.
    ///
    /// # Errors
    /// The operating system has no random bytes.
    pub(super) fn new() -> Result<Self, getrandom::Error> {
        random().map(Self)
    }

    fn mac(&self, end: End, handshake: &Handshake) -> Option<Hmac<Sha256>> {
        let label: &[u8] =
            if end == End::Root { b"xorl-dist control root " } else { b"xorl-dist control rank " };
        let PeerName { rank, process, host } = handshake.name;
        let mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        // All parts but the last have a fixed length.
        let mac = mac.chain_update(label).chain_update(handshake.of_root).chain_update(handshake.of_other);
        Some(
            mac.chain_update((*rank as u64).to_le_bytes())
                .chain_update(process.to_le_bytes())
                .chain_update(host),
        )
    }

    /// The proof of `end`.
    pub(super) fn prove(&self, end: End, handshake: &Handshake) -> Proof {
        // HMAC takes keys of any length, so there always is one.
        self.mac(end, handshake).map(|mac| mac.finalize().into_bytes().into()).unwrap_or_default()
    }

    /// True if `proof` is that of `end`. Takes the same time for all that are not.
    pub(super) fn is_proven(&self, end: End, handshake: &Handshake, proof: &Proof) -> bool {
        self.mac(end, handshake).is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(rank: usize) -> PeerName {
        PeerName { rank, process: 0x0102_0304, host: "node7".into() }
    }

    #[test]
    fn a_proof_is_the_published_function() {
        // Python: hmac.new(bytes(range(32)), b"xorl-dist control rank " + b"\1" * 32 + b"\2" * 32
        //         + (3).to_bytes(8, "little") + bytes([4, 3, 2, 1]) + b"node7", "sha256").hexdigest()
        let secret = Secret(std::array::from_fn(|i| i as u8));
        let handshake = Handshake { of_root: &[1; 32], of_other: &[2; 32], name: &name(3) };
        let hex: String =
            secret.prove(End::Other, &handshake).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "db481f5124d9d91f42ff62bcfb46978eb83da3dbc8f3635135048eca66444053");
    }

    #[test]
    fn a_proof_fits_its_secret_challenges_name_and_end_alone() {
        let (secret, other) = (Secret::new().unwrap(), Secret::new().unwrap());
        let (a, b) = (random().unwrap(), random().unwrap());
        let (first, second) = (name(1), name(2));
        let handshake = Handshake { of_root: &a, of_other: &b, name: &first };
        let proof = secret.prove(End::Other, &handshake);
        assert!(secret.is_proven(End::Other, &handshake, &proof));
        assert!(!secret.is_proven(End::Root, &handshake, &proof), "sent back");
        assert!(!other.is_proven(End::Other, &handshake, &proof), "another run's");
        for changed in [
            Handshake { of_root: &b, of_other: &b, name: &first },
            Handshake { of_root: &a, of_other: &a, name: &first },
            Handshake { of_root: &b, of_other: &a, name: &first },
            Handshake { of_root: &a, of_other: &b, name: &second },
        ] {
            assert!(!secret.is_proven(End::Other, &changed, &proof));
        }
        let mut wrong = proof;
        wrong[31] ^= 1;
        assert!(!secret.is_proven(End::Other, &handshake, &wrong));
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", Secret([7; 32])), "Secret");
    }
}
