//! Each facility against the real kernel, in network namespaces that the tests make themselves.
//!
//! They need root. Without it they pass with a note, unless `CI` is set: then they fail. Nothing outside of the tests' own
//! namespaces is touched.

// Clippy spares test functions, and the functions they share are no less tests.
#![allow(clippy::unwrap_used)]

mod lab;

mod attach;
mod change_socket;
mod conntrack;
mod icmp;
mod interface;
mod neighbour_socket;
mod netlink;
mod netns;
mod nft;
mod packet_ring;
mod sock_diag;
mod tap;
mod vip;
mod xdp;
