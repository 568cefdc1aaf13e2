//! Digests over the meaning of a configuration.

use sha2::{Digest, Sha256};

/// First 8 bytes, big endian, of the SHA-256 of `canonical`. The callers write one fact per line in a fixed order,
/// with every name quoted, so that two meanings never give one text.
pub(super) fn digest(canonical: &str) -> u64 {
    let hash = Sha256::digest(canonical.as_bytes());
    hash.iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_digest_is_the_head_of_the_sha_256() {
        assert_eq!(super::digest("abc"), 0xba78_16bf_8f01_cfea);
    }
}
