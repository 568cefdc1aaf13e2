//! Ends TCP connections of this host with a reset, so that their clients know at once.
//!
//! Owns the choice of sockets and nothing else; it asks the kernel each time. The executor calls it when a VIP leaves
//! and when the time of a drain is over. A connection that the host's connection tracking sends on to a container is ended
//! there; what no socket answers for any more, as the container has gone, is forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use farm_core::balance::plan::{BucketState, Plan};
use farm_sys::conntrack::{Conntrack, CtFlow};
use farm_sys::netns::NetNs;
use farm_sys::sock_diag::SockDiag;

use crate::dataplane::connections::{Connection, place};

/// How often, and after which pauses, it is looked whether resets have passed connection tracking.
const LOOKS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(5);

/// Resets the connections to `vips`; how many there were.
///
/// # Errors
/// The last one, after all were tried.
pub fn all(vips: &[IpAddr]) -> io::Result<u32> {
    reset(vips, |_, _| true)
}

/// Resets the connections of `groups` (positions in `plan`) in buckets that this host does not own; how many there were.
///
/// # Errors
/// The last one, after all were tried.
pub fn held(plan: &Plan, groups: &[usize]) -> io::Result<u32> {
    let vips: Vec<IpAddr> = plan.vips.iter().map(|vip| vip.addr).collect();
    reset(&vips, |vip, client| is_held(plan, groups, vip, client))
}

fn is_held(plan: &Plan, groups: &[usize], vip: SocketAddr, client: SocketAddr) -> bool {
    let Some((group, bucket, _)) = place(plan, Connection { vip, client }) else {
        return false;
    };
    groups.contains(&group)
        && match plan.groups[group].states[bucket.index()] {
            BucketState::Draining | BucketState::Foreign => true,
            BucketState::Own | BucketState::Guarded => false,
        }
}

/// `chosen` is asked with the address and port that the client speaks to, and the client's own.
fn reset(vips: &[IpAddr], chosen: impl Fn(SocketAddr, SocketAddr) -> bool) -> io::Result<u32> {
    let mut tally = Tally::default();
    let mut diag = SockDiag::open()?;
    for socket in diag.tcp_sockets(vips)? {
        if chosen(socket.local, socket.remote) {
            tally.note(diag.destroy(&socket));
        }
    }
    let mut conntrack = Conntrack::open()?;
    let mut flows = conntrack.tcp_flows(vips)?;
    flows.retain(|flow| chosen(flow.vip, flow.client));
    if !flows.is_empty() {
        end_translated(&flows, &mut conntrack, &mut tally);
    }
    tally.failed.map_or(Ok(tally.count), Err)
}

/// Ends connections at the sockets that answer for them, in whichever network namespace of this host these are.
fn end_translated(flows: &[CtFlow], conntrack: &mut Conntrack, tally: &mut Tally) {
    let servers: BTreeSet<IpAddr> = flows.iter().map(|flow| flow.server.ip()).collect();
    let servers: Vec<IpAddr> = servers.into_iter().collect();
    let mut left: BTreeMap<_, &CtFlow> = flows.iter().map(|flow| ((flow.server, flow.client), flow)).collect();
    let spaces = match NetNs::of_all_processes() {
        Ok(spaces) => spaces,
        Err(error) => return tally.note(Err(error)),
    };
    let mut all_seen = true;
    for space in spaces {
        let sockets = space.try_run(SockDiag::open).flatten().and_then(|mut diag| {
            let sockets = diag.tcp_sockets(&servers)?;
            Ok((diag, sockets))
        });
        match sockets {
            Ok((mut diag, sockets)) => {
                for socket in sockets {
                    if left.remove(&(socket.local, socket.remote)).is_some() {
                        tally.note(diag.destroy(&socket));
                    }
                }
            }
            Err(error) => {
                all_seen = false;
                tally.note(Err(error));
            }
        }
    }
    // A reset on its way out ends what is tracked, too. What stays has lost its container, or the way to it.
    for flow in still_tracked(flows, conntrack) {
        let is_new = left.contains_key(&(flow.server, flow.client));
        if is_new && !all_seen {
            // It may be where it could not be looked, and is left to be told.
            continue;
        }
        let forgotten = conntrack.forget(flow);
        if is_new || forgotten.is_err() {
            tally.note(forgotten);
        }
    }
}

/// Those of `flows` that are tracked yet when resets have had the time to pass.
fn still_tracked<'a>(flows: &'a [CtFlow], conntrack: &mut Conntrack) -> Vec<&'a CtFlow> {
    let vips: BTreeSet<IpAddr> = flows.iter().map(|flow| flow.vip.ip()).collect();
    let vips: Vec<IpAddr> = vips.into_iter().collect();
    let mut tracked: Vec<&CtFlow> = flows.iter().collect();
    for _ in 0..LOOKS {
        let Ok(listed) = conntrack.tcp_flows(&vips) else { break };
        tracked.retain(|flow| listed.binary_search(flow).is_ok());
        if tracked.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    tracked
}

/// What has come of connections that were to end.
#[derive(Default)]
struct Tally {
    count: u32,
    failed: Option<io::Error>,
}

impl Tally {
    fn note(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.count += 1,
            // It has ended by itself meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => self.failed = Some(error),
        }
    }
}
