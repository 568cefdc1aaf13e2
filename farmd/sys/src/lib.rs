//! The operating system as farmd needs it: one file per Linux facility, safe and typed on the outside.
//!
//! The only crate of the workspace with unsafe code. No raw pointer, no raw descriptor number and no libc type leaves it;
//! descriptors are owned and closed on drop. It holds no policy: what to open, when, and what to do about an error is the
//! daemon's business. It knows nothing of our other crates.

pub mod bpf;
pub mod caps;
pub mod change_socket;
pub mod clock;
pub mod conntrack;
pub mod event_fd;
pub mod icmp;
pub mod interface;
pub mod neighbour_socket;
pub mod netlink;
mod netlink_message;
pub mod netns;
pub mod nft;
pub mod nic;
pub mod packet_burst;
pub mod packet_socket;
pub mod poll;
pub mod process;
pub mod sched;
pub mod signal_fd;
pub mod sock_diag;
mod sockopt;
pub mod sysctl;
pub mod tap;
mod tc;
pub mod udp;
