//! Ends TCP connections of this host with a reset, so that their clients know at once.
//!
//! Owns the choice of sockets and nothing else; it asks the kernel each time. The executor calls it when a VIP leaves
//! and when the time of a drain is over. Sockets of services in other network namespaces are out of its reach.

use std::io;
use std::net::IpAddr;

use farm_core::balance::plan::{BucketState, Plan};
use farm_sys::sock_diag::{SockDiag, TcpSocket};

use crate::dataplane::connections::{Connection, place};

/// Resets the connections to `vips`; how many there were.
///
/// # Errors
/// The last one, after all were tried.
pub fn all(vips: &[IpAddr]) -> io::Result<u32> {
    reset(vips, |_| true)
}

/// Resets the connections of `groups` (positions in `plan`) in buckets that this host does not own; how many there were.
///
/// # Errors
/// The last one, after all were tried.
pub fn held(plan: &Plan, groups: &[usize]) -> io::Result<u32> {
    let vips: Vec<IpAddr> = plan.vips.iter().map(|vip| vip.addr).collect();
    reset(&vips, |socket| is_held(plan, groups, socket.local, socket.remote))
}

fn is_held(plan: &Plan, groups: &[usize], vip: std::net::SocketAddr, client: std::net::SocketAddr) -> bool {
    let Some((group, bucket, _)) = place(plan, Connection { vip, client }) else {
        return false;
    };
    groups.contains(&group)
        && match plan.groups[group].states[bucket.index()] {
            BucketState::Draining | BucketState::Foreign => true,
            BucketState::Own | BucketState::Guarded => false,
        }
}

fn reset(vips: &[IpAddr], chosen: impl Fn(&TcpSocket) -> bool) -> io::Result<u32> {
    let mut diag = SockDiag::open()?;
    let mut failed = None;
    let mut count = 0;
    for socket in diag.tcp_sockets(vips)?.iter().filter(|socket| chosen(socket)) {
        match diag.destroy(socket) {
            Ok(()) => count += 1,
            // It has ended by itself meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(count), Err)
}
