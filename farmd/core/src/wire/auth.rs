//! The cluster key: authenticates heartbeats and seeds the flow hash.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::balance::hash::Seed;

/// Bytes of the tag at the end of each datagram: HMAC-SHA-256 (RFC 2104) cut to its first 16 bytes, as RFC 2104 section 5 allows.
pub const TAG_LEN: usize = 16;

/// The secret all nodes of a cluster share, 32 bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; 32]);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

/// Why a text is no cluster key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidKey;

impl std::fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("64 hexadecimal digits are expected, as `farm cluster genkey` makes them")
    }
}

impl std::error::Error for InvalidKey {}

impl ClusterKey {
    /// The key of these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads 64 hexadecimal digits; white space around them is ignored.
    pub fn from_hex(text: &str) -> Result<Self, InvalidKey> {
        let text = text.trim();
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(InvalidKey);
        }
        let mut key = [0; 32];
        for (byte, i) in key.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[i..i + 2], 16).map_err(|_| InvalidKey)?;
        }
        Ok(Self(key))
    }

    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        // RFC 2104: a key shorter than the hash's block is filled up with zeros.
        let mut block = [0; 64];
        block[..32].copy_from_slice(&self.0);
        let mut mac = Hmac::<Sha256>::new(&block.into());
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// A key for one purpose only: HMAC of these parts, which must be of fixed length or the last.
    pub fn derive(&self, parts: &[&[u8]]) -> Self {
        Self(self.mac(parts))
    }

    /// The tag of these parts one after the other, which must be of fixed length or the last.
    pub fn tag(&self, parts: &[&[u8]]) -> [u8; TAG_LEN] {
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(&self.mac(parts)[..TAG_LEN]);
        tag
    }

    /// Appends the tag of `datagram` to it.
    pub fn seal(&self, datagram: &mut Vec<u8>) {
        let tag = self.mac(&[b"farm datagram 1", datagram]);
        datagram.extend_from_slice(&tag[..TAG_LEN]);
    }

    /// The datagram without its tag if the tag is right. Takes the same time for every wrong tag.
    pub fn open<'a>(&self, sealed: &'a [u8]) -> Option<&'a [u8]> {
        let (datagram, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG_LEN)?)?;
        let right = self.mac(&[b"farm datagram 1", datagram]);
        let differing = right.iter().zip(tag).fold(0, |acc, (a, b)| acc | (a ^ b));
        (differing == 0).then_some(datagram)
    }

    /// The seed of the flow hash: the first 8 bytes of HMAC(key, "farm flow hash seed 1"), big endian.
    pub fn hash_seed(&self) -> Seed {
        let [a, b, c, d, e, f, g, h, ..] = self.mac(&[b"farm flow hash seed 1"]);
        Seed {
            s0: u32::from_be_bytes([a, b, c, d]),
            s1: u32::from_be_bytes([e, f, g, h]),
        }
    }

    /// A short public mark of the key, for comparing two nodes' keys without showing them.
    pub fn fingerprint(&self) -> u32 {
        let [a, b, c, d, ..] = self.mac(&[b"farm key fingerprint 1"]);
        u32::from_be_bytes([a, b, c, d])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_bit_is_refused() {
        let key = ClusterKey::from_bytes([7; 32]);
        let mut datagram = b"hello".to_vec();
        key.seal(&mut datagram);
        assert_eq!(key.open(&datagram), Some(&b"hello"[..]));
        for i in 0..datagram.len() {
            let mut bad = datagram.clone();
            bad[i] ^= 1;
            assert_eq!(key.open(&bad), None, "byte {i}");
        }
        assert_eq!(ClusterKey::from_bytes([8; 32]).open(&datagram), None);
        assert_eq!(key.open(&[1, 2, 3]), None);
    }

    #[test]
    fn a_key_is_64_hexadecimal_digits() {
        assert!(ClusterKey::from_hex(&format!("{}\n", "0a".repeat(32))).is_ok());
        assert_eq!(ClusterKey::from_hex("0a"), Err(InvalidKey));
        assert_eq!(ClusterKey::from_hex(&"é".repeat(32)), Err(InvalidKey));
    }
}
