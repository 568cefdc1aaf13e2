//! The flow hash, bit by bit.
//!
//! `H(seed, words)` with a 64-bit seed of two 32-bit halves `(s0, s1)` and a key of 32-bit words:
//!
//! ```text
//! h = s0
//! for each word w of the key, in order:   h = fmix32(h ^ w)
//! H = fmix32(h ^ s1)
//!
//! fmix32(h): h ^= h >> 16;  h *= 0x85ebca6b;  h ^= h >> 13;  h *= 0xc2b2ae35;  h ^= h >> 16
//! ```
//!
//! All arithmetic is modulo 2^32; `fmix32` is the finalizer of MurmurHash3 (public domain), a bijection. The
//! bucket is the highest 12 bits. Only 32-bit products occur, so that the same steps run in a classic
//! socket filter and in eBPF. The seed is secret and the same on all nodes (see
//! [`crate::wire::auth::ClusterKey::hash_seed`]): without it a client cannot choose the server its
//! address leads to. It is a mixer, not a cryptographic function.
//!
//! Keys: an IPv4 address is one word (network byte order as a number), an IPv6 address four; `on_port` adds one word
//! with the client's port; `on_net` clears the host bits (/24, /64); `on_ipid` is one word with the identification.

use std::net::IpAddr;

use crate::id::Bucket;

/// The cluster's secret seed of the flow hash.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Seed {
    /// First half, mixed in before the key.
    pub s0: u32,
    /// Second half, mixed in after the key.
    pub s1: u32,
}

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// First multiplier of [`fmix32`].
pub const FMIX_MUL_1: u32 = 0x85eb_ca6b;
/// Second multiplier of [`fmix32`].
pub const FMIX_MUL_2: u32 = 0xc2b2_ae35;

/// The finalizer of MurmurHash3.
pub const fn fmix32(mut h: u32) -> u32 {
    h ^= h >> 16;
    h = h.wrapping_mul(FMIX_MUL_1);
    h ^= h >> 13;
    h = h.wrapping_mul(FMIX_MUL_2);
    h ^ (h >> 16)
}

/// `H(seed, words)` as the module doc defines it.
pub fn hash(seed: Seed, words: impl IntoIterator<Item = u32>) -> u32 {
    let h = words.into_iter().fold(seed.s0, |h, word| fmix32(h ^ word));
    fmix32(h ^ seed.s1)
}

/// The words of an address: one for IPv4, four for IPv6.
pub fn words(addr: IpAddr) -> impl Iterator<Item = u32> {
    let (words, n) = match addr {
        IpAddr::V4(v4) => ([v4.to_bits(), 0, 0, 0], 1),
        IpAddr::V6(v6) => {
            let b = v6.to_bits();
            ([(b >> 96) as u32, (b >> 64) as u32, (b >> 32) as u32, b as u32], 4)
        }
    };
    words.into_iter().take(n)
}

/// Bucket of a client address (`on_addr`).
pub fn bucket_of_addr(seed: Seed, client: IpAddr) -> Bucket {
    Bucket::of_hash(hash(seed, words(client)))
}

/// Bucket of a client address and port (`on_port`).
pub fn bucket_of_port(seed: Seed, client: IpAddr, port: u16) -> Bucket {
    Bucket::of_hash(hash(seed, words(client).chain([u32::from(port)])))
}

/// Bucket of a client network, /24 or /64 (`on_net`).
pub fn bucket_of_net(seed: Seed, client: IpAddr) -> Bucket {
    let net = match client {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() & 0xffff_ff00).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
    };
    bucket_of_addr(seed, net)
}

/// Bucket of an IPv4 identification (`on_ipid`).
pub fn bucket_of_ipid(seed: Seed, identification: u16) -> Bucket {
    Bucket::of_hash(hash(seed, [u32::from(identification)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: Seed = Seed {
        s0: 0x0123_4567,
        s1: 0x89ab_cdef,
    };

    #[test]
    fn golden_vectors_hold() {
        assert_eq!(fmix32(0), 0);
        assert_eq!(fmix32(1), 0x514e_28b7);
        assert_eq!(fmix32(0xffff_ffff), 0x81f1_6f39);
        let v4: IpAddr = "198.18.0.100".parse().unwrap();
        let v6: IpAddr = "2001:db8::100".parse().unwrap();
        // Written out by hand from the definition, so that a change of the loop shows.
        let one = fmix32(fmix32(SEED.s0 ^ 0xc612_0064) ^ SEED.s1);
        assert_eq!(hash(SEED, words(v4)), one);
        let two = fmix32(fmix32(fmix32(SEED.s0 ^ 0xc612_0064) ^ 40000) ^ SEED.s1);
        assert_eq!(bucket_of_port(SEED, v4, 40000), Bucket::of_hash(two));
        let golden = [
            (bucket_of_addr(SEED, v4).index(), GOLDEN[0]),
            (bucket_of_port(SEED, v4, 40000).index(), GOLDEN[1]),
            (bucket_of_net(SEED, v4).index(), GOLDEN[2]),
            (bucket_of_ipid(SEED, 7).index(), GOLDEN[3]),
            (bucket_of_addr(SEED, v6).index(), GOLDEN[4]),
            (bucket_of_net(SEED, v6).index(), GOLDEN[5]),
        ];
        for (got, want) in golden {
            assert_eq!(got, want, "{golden:?}");
        }
    }

    const GOLDEN: [usize; 6] = [43, 250, 3441, 3762, 372, 2943];

    /// Each bit by itself: those of the network tell clients apart, those of the host do not.
    #[test]
    fn a_network_ends_where_its_mask_does() {
        let parse = |text: &str| text.parse::<IpAddr>().unwrap();
        let other_than = |client: IpAddr, bit: u32| match client {
            IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() ^ (1 << bit)).into()),
            IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() ^ (1 << bit)).into()),
        };
        for (client, net, bits, host_bits) in [
            ("203.0.113.77", "203.0.113.0", 32, 8),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::", 128, 64),
        ] {
            let client = parse(client);
            assert_eq!(bucket_of_net(SEED, client), bucket_of_addr(SEED, parse(net)));
            for bit in 0..bits {
                let other = other_than(client, bit);
                // With this seed none of them meet in a bucket by chance.
                assert_ne!(bucket_of_addr(SEED, client), bucket_of_addr(SEED, other), "{other}");
                let is_same = bucket_of_net(SEED, client) == bucket_of_net(SEED, other);
                assert_eq!(is_same, bit < host_bits, "{other}");
            }
        }
        // The first bit of a host and the last of a network, as they are written.
        let bucket = |client: &str| bucket_of_net(SEED, parse(client));
        for (client, next_host, next_net) in [
            ("203.0.113.77", "203.0.113.205", "203.0.112.77"),
            (
                "2001:db8:1:2:3:4:5:6",
                "2001:db8:1:2:8003:4:5:6",
                "2001:db8:1:3:3:4:5:6",
            ),
        ] {
            assert_eq!(bucket(client), bucket(next_host), "{client}");
            assert_ne!(bucket(client), bucket(next_net), "{client}");
        }
    }

    #[test]
    fn buckets_fill_evenly_for_neighbouring_addresses() {
        let mut count = vec![0u32; crate::id::BUCKETS];
        let n = 64 * crate::id::BUCKETS as u32;
        for i in 0..n {
            let client = IpAddr::V4((0xc612_0000 + i).into());
            count[bucket_of_addr(SEED, client).index()] += 1;
        }
        // Chi-squared of 4095 degrees of freedom: mean 4095, standard deviation 90.5; six of them allow for no bad luck.
        let expected = 64.0;
        let chi2: f64 = count
            .iter()
            .map(|&c| (f64::from(c) - expected).powi(2) / expected)
            .sum();
        assert!((chi2 - 4095.0).abs() < 6.0 * 90.5, "chi-squared {chi2}");
    }
}
