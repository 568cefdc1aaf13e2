//! Ends TCP connections of this host with a reset, so that their clients know at once.
//!
//! Owns the choice of sockets and nothing else; it asks the kernel each time. The executor calls it when a VIP leaves
//! and when the time of a drain is over, the data plane when buckets are lost without a hand-over. A connection that the host's connection tracking sends on to a container is ended
//! there; one whose container has gone, or that goes on to another machine, is forgotten by connection tracking. It blocks its thread.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use farm_core::balance::plan::{BucketState, Plan};
use farm_core::id::NodeSet;
use farm_sys::conntrack::{Conntrack, CtFlow};
use farm_sys::netns::NetNs;
use farm_sys::sock_diag::{SockDiag, TcpSocket, state};

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

/// Forgets connections that have ended here and are remembered (TIME_WAIT), in buckets in which `dead` nodes had a say by `plan`; how many there were. Their
/// clients may have come again to one of those with the same address and port: the memory would acknowledge their segments where they are to be
/// reset (RFC 9293, section 3.10.7.4).
///
/// # Errors
/// The last one, after all were tried; `Unsupported` on kernels that end no socket in TIME_WAIT.
pub fn forget_ended(plan: &Plan, dead: NodeSet) -> io::Result<u32> {
    let vips: Vec<IpAddr> = plan.vips.iter().map(|vip| vip.addr).collect();
    let mut tally = Tally::default();
    let mut diag = SockDiag::open()?;
    let mut sockets = diag.tcp_sockets_with_time_wait(&vips)?;
    sockets.retain(|socket| socket.state == state::TIME_WAIT && was_served_by(plan, dead, socket.local, socket.remote));
    for socket in &sockets {
        tally.destroy(&mut diag, socket);
    }
    tally.failed.map_or(Ok(tally.count), Err)
}

/// Forgets handshakes of `vips` that are not over, those that are `chosen`; how many there were. Their clients are told nothing: they ask again, or have been
/// answered by another node.
///
/// # Errors
/// The last one, after all were tried.
pub fn forget_half_open(vips: &[IpAddr], chosen: impl Fn(SocketAddr, SocketAddr) -> bool) -> io::Result<u32> {
    let mut tally = Tally::default();
    let mut diag = SockDiag::open()?;
    for socket in diag.half_open_tcp_sockets(vips)? {
        if chosen(socket.local, socket.remote) {
            tally.destroy(&mut diag, &socket);
        }
    }
    if let Err(error) = forget_translated_half_open(vips, chosen, diag, &mut tally) {
        tally.failed = Some(error);
    }
    tally.failed.map_or(Ok(tally.count), Err)
}

/// The same of what this host translates to another address or port. `diag` asks here.
fn forget_translated_half_open(
    vips: &[IpAddr],
    chosen: impl Fn(SocketAddr, SocketAddr) -> bool,
    mut diag: SockDiag,
    tally: &mut Tally,
) -> io::Result<()> {
    let mut conntrack = Conntrack::open()?;
    let (servers, meant) = translated(&mut conntrack, vips, chosen)?;
    if meant.is_empty() {
        return Ok(());
    }
    let mut forget = |diag: &mut SockDiag| -> io::Result<()> {
        for socket in diag.half_open_tcp_sockets(&servers)? {
            // Nobody is told, so what is tracked would stay as it is.
            if let Some(flow) = meant.get(&(socket.local, socket.remote))
                && tally.destroy(diag, &socket)
            {
                conntrack.forget(flow)?;
            }
        }
        Ok(())
    };
    forget(&mut diag)?;
    let (spaces, whole) = NetNs::of_others()?;
    let mut failed = if whole {
        Ok(())
    } else {
        Err(io::Error::other("not every process may be looked at"))
    };
    for space in spaces {
        let looked = space.try_run(SockDiag::open).flatten();
        failed = failed.and(looked.and_then(|mut diag| forget(&mut diag)));
    }
    failed
}

/// By the two ends of the socket that stands for each.
type Flows = BTreeMap<(SocketAddr, SocketAddr), CtFlow>;

/// The tracked connections that this host translates and that are `chosen`, and the addresses that they go to.
fn translated(
    conntrack: &mut Conntrack,
    vips: &[IpAddr],
    chosen: impl Fn(SocketAddr, SocketAddr) -> bool,
) -> io::Result<(Vec<IpAddr>, Flows)> {
    let flows = conntrack.tcp_flows(vips)?.into_iter();
    let flows = flows.filter(|flow| chosen(flow.vip, flow.client));
    let flows: Flows = flows.map(|flow| ((flow.server, flow.peer), flow)).collect();
    let servers: BTreeSet<IpAddr> = flows.keys().map(|(server, _)| server.ip()).collect();
    Ok((servers.into_iter().collect(), flows))
}

fn was_served_by(plan: &Plan, nodes: NodeSet, vip: SocketAddr, client: SocketAddr) -> bool {
    let Some((group, bucket, _)) = place(plan, Connection { vip, client }) else {
        return false;
    };
    let group = &plan.groups[group];
    let is_owner = group
        .owners
        .owner_at(bucket.index())
        .is_some_and(|owner| nodes.contains(owner));
    let holders = group.holders.get(&bucket.index());
    is_owner || holders.is_some_and(|holders| holders.bits() & nodes.bits() != 0)
}

/// `chosen` is asked with the address and port that the client speaks to, and the client's own.
fn reset(vips: &[IpAddr], chosen: impl Fn(SocketAddr, SocketAddr) -> bool) -> io::Result<u32> {
    let mut tally = Tally::default();
    let mut diag = SockDiag::open()?;
    for socket in diag.tcp_sockets(vips)? {
        if chosen(socket.local, socket.remote) {
            tally.destroy(&mut diag, &socket);
        }
    }
    if let Err(error) = reset_translated(vips, chosen, diag, &mut tally) {
        tally.failed = Some(error);
    }
    tally.failed.map_or(Ok(tally.count), Err)
}

/// The same of what this host translates to another address or port. `diag` asks here.
fn reset_translated(
    vips: &[IpAddr],
    chosen: impl Fn(SocketAddr, SocketAddr) -> bool,
    mut diag: SockDiag,
    tally: &mut Tally,
) -> io::Result<()> {
    let mut conntrack = Conntrack::open()?;
    let (servers, mut unanswered) = translated(&mut conntrack, vips, chosen)?;
    if unanswered.is_empty() {
        return Ok(());
    }
    let mut ended = Vec::new();
    let mut end_here = |diag: &mut SockDiag, unanswered: &mut Flows| -> io::Result<()> {
        for socket in diag.tcp_sockets(&servers)? {
            if let Some(flow) = unanswered.remove(&(socket.local, socket.remote))
                && tally.destroy(diag, &socket)
            {
                ended.push(flow);
            }
        }
        Ok(())
    };
    end_here(&mut diag, &mut unanswered)?;
    let mut hidden = None;
    if !unanswered.is_empty() {
        let (spaces, whole) = NetNs::of_others()?;
        hidden = (!whole).then(|| io::Error::other("not every process may be looked at"));
        for space in spaces {
            if unanswered.is_empty() {
                break;
            }
            let looked = space.try_run(SockDiag::open).flatten();
            if let Err(error) = looked.and_then(|mut diag| end_here(&mut diag, &mut unanswered)) {
                hidden = Some(error);
            }
        }
    }
    // A reset ends what is tracked on its way out. What stays has lost the way to the container.
    wait_ended(&mut ended, &mut conntrack)?;
    for flow in ended {
        conntrack.forget(&flow)?;
    }
    match hidden {
        // Who answers for it may be where it could not be looked.
        Some(error) if !unanswered.is_empty() => Err(error),
        // The container has gone, or it is another machine.
        _ => {
            for flow in unanswered.into_values() {
                conntrack.forget(&flow)?;
                tally.count += 1;
            }
            Ok(())
        }
    }
}

/// Leaves those of `flows` that are tracked yet when resets have had the time to pass.
fn wait_ended(flows: &mut Vec<CtFlow>, conntrack: &mut Conntrack) -> io::Result<()> {
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(PAUSE);
        }
        let mut failed = None;
        flows.retain(|flow| {
            conntrack.has_tcp(flow.vip, flow.client).unwrap_or_else(|error| {
                failed = Some(error);
                true
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if flows.is_empty() {
            break;
        }
    }
    Ok(())
}

/// What has come of connections that were to end.
#[derive(Default)]
struct Tally {
    count: u32,
    failed: Option<io::Error>,
}

impl Tally {
    /// False if the socket is still there.
    fn destroy(&mut self, diag: &mut SockDiag, socket: &TcpSocket) -> bool {
        match diag.destroy(socket) {
            Ok(()) => self.count += 1,
            // It has ended by itself meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.failed = Some(error);
                return false;
            }
        }
        true
    }
}
