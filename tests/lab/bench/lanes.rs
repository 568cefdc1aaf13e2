//! Lanes: for each filter a receiver of its own at the end of a veth pair, and one sender that throws frames at them.
//!
//! Owns the namespaces and the filters. Over a veth pair the receiver's whole path (driver, filter, stack) runs on the sender's processor
//! before the next frame goes, so the time of a frame is that of sending and receiving it, on one processor that nothing else shares. No farmd
//! runs: the tables of the kernel program are written here. Never judges.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farm_core::balance::plan::{BucketState, Plan};
use farm_core::config::Protocol;
use farm_core::id::MacAddr;
use farm_sys::bpf::Filter;
use farm_sys::bpf::nothing::Nothing;
use farm_sys::packet_burst::{MAX_BURST, PacketBurst};
use farm_sys::tap::Tap;
use farm_sys::{interface, sched};
use farmd::dataplane::kernel::Kernel;

use super::frames::{self, Segment, Way};
use super::rivals::cluster_rules;
use crate::config::VIP;
use crate::node::NODE_LINK;
use crate::process::{run_limited, wait_until};
use crate::space::{Space, connect};

/// UDP ports: of datagrams that belong to the receiver, and to another server.
const OWNED_PORT: u16 = 53;
const FOREIGN_PORT: u16 = 54;
/// TCP port of segments that belong to another server.
const WEB_PORT: u16 = 80;
const CLIENT_PORT: u16 = 4000;

/// What filters at a receiver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filtering {
    /// Nothing.
    None,
    /// A program at tc ingress that drops everything at once.
    Nothing,
    /// The farm's program at tc ingress.
    Farm,
    /// The same, with the one at XDP ahead of it.
    FarmEarly,
    /// An iptables rule in the `raw` table that drops everything for the address.
    IptablesRaw,
    /// iptables' `cluster` match.
    Cluster,
}

impl Filtering {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::None,
        Self::Nothing,
        Self::Farm,
        Self::FarmEarly,
        Self::IptablesRaw,
        Self::Cluster,
    ];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "nothing attached",
            Self::Nothing => "tc, drops all at once",
            Self::Farm => "farm, bpf at tc",
            Self::FarmEarly => "farm, bpf with XDP",
            Self::IptablesRaw => "iptables, raw table",
            Self::Cluster => "xt_cluster",
        }
    }
}

/// What keeps a filter where it is.
#[derive(Debug)]
enum Kept {
    Rules,
    Nothing { _program: Nothing },
    Farm { _kernel: Box<Kernel>, _tap: Tap },
}

/// A receiver and the sender's way to it.
#[derive(Debug)]
pub struct Lane {
    /// What filters there.
    pub filtering: Filtering,
    burst: PacketBurst,
    _kept: Kept,
    /// Never read: what is accepted ends in their full queues.
    _sockets: Vec<UdpSocket>,
    // Goes last.
    receiver: Space,
}

/// The sender and all lanes.
#[derive(Debug)]
pub struct Lanes {
    /// In the order of their making.
    pub lanes: Vec<Lane>,
    _sender: Space,
}

impl Lanes {
    /// Builds one lane for each of `kinds`. The receivers have the virtual address if `serving`; otherwise they have nothing to accept.
    /// Those that this machine cannot have come back with the reason.
    ///
    /// # Errors
    /// Namespaces or links cannot be made.
    pub fn new(kinds: &[Filtering], serving: bool) -> Result<(Self, Vec<(Filtering, String)>)> {
        let sender = Space::create("sender")?;
        for scope in ["all", "default"] {
            sender.sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "1")?;
        }
        let (mut lanes, mut missing) = (Vec::new(), Vec::new());
        for (number, kind) in kinds.iter().enumerate() {
            match Lane::new(*kind, &sender, &format!("lane{number}"), serving) {
                Ok(lane) => lanes.push(lane),
                Err(error) => missing.push((*kind, format!("{error:#}"))),
            }
        }
        Ok((Self { lanes, _sender: sender }, missing))
    }
}

impl Lane {
    fn new(filtering: Filtering, sender: &Space, link: &str, serving: bool) -> Result<Self> {
        let receiver = Space::create(filtering.name())?;
        for scope in ["all", "default"] {
            receiver.sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "1")?;
            receiver.sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "0")?;
        }
        connect(sender, link, &receiver, NODE_LINK)?;
        receiver.ip(&[format!("address add 198.18.0.11/16 dev {NODE_LINK}")])?;
        let kept = match filtering {
            Filtering::None => Kept::Rules,
            Filtering::Nothing => receiver.run(|| -> Result<Kept> {
                let mut program = Nothing::load()?;
                program.attach(NODE_LINK)?;
                Ok(Kept::Nothing { _program: program })
            })?,
            Filtering::Farm => farm(&receiver, false)?,
            Filtering::FarmEarly => farm(&receiver, true)?,
            Filtering::IptablesRaw => {
                let rule = format!("*raw\n-A PREROUTING -i {NODE_LINK} -d {VIP}/32 -j DROP\nCOMMIT\n");
                receiver.iptables(&rule)?;
                Kept::Rules
            }
            Filtering::Cluster => {
                receiver.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")?;
                receiver.iptables(&cluster_rules(VIP, 1))?;
                Kept::Rules
            }
        };
        if serving {
            // The farm's addresses are on the TAP.
            let device = match filtering {
                Filtering::Farm | Filtering::FarmEarly => TAP,
                _ => "lo",
            };
            receiver.ip(&[format!("address add {VIP}/32 dev {device}")])?;
        }
        let ports = [OWNED_PORT, FOREIGN_PORT];
        let sockets = receiver.run(|| ports.map(|port| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))));
        let burst = sender.run(|| PacketBurst::open(interface::index(link)?))?;
        Ok(Self {
            filtering,
            burst,
            _kept: kept,
            _sockets: sockets.into_iter().collect::<Result<_, _>>()?,
            receiver,
        })
    }

    /// A TCP segment of a connection that another server has.
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn foreign_segment() -> Result<Vec<u8>> {
        way(1, WEB_PORT).tcp(Segment::Ack)
    }

    /// A datagram that the filter accepts, and one that it drops as another server's. The `cluster` match deals by client, in its own way:
    /// clients are tried.
    ///
    /// # Errors
    /// No client of many is the receiver's, or all are.
    pub fn datagrams(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        if self.filtering != Filtering::Cluster {
            return Ok((way(1, OWNED_PORT).udp()?, way(1, FOREIGN_PORT).udp()?));
        }
        let (mut owned, mut foreign) = (None, None);
        for client in 1..=64 {
            let frame = way(client, OWNED_PORT).udp()?;
            let before = self.kept_by_cluster()?;
            self.throw(&[&frame], 1)?;
            let kept = self.kept_by_cluster()? > before;
            *(if kept { &mut owned } else { &mut foreign }) = Some(frame);
            if let (Some(owned), Some(foreign)) = (&owned, &foreign) {
                return Ok((owned.clone(), foreign.clone()));
            }
        }
        bail!("of 64 clients the cluster match does not keep some and drop others")
    }

    /// Packets that the first rule has accepted.
    fn kept_by_cluster(&self) -> Result<u64> {
        let mut command = self.receiver.command("iptables");
        command.args(["-t", "mangle", "-nvxL", "PREROUTING"]);
        let finished = run_limited(command, Duration::from_secs(5))?;
        let rule = finished.stdout.lines().find(|line| line.contains("cluster"));
        let packets = rule.and_then(|line| line.split_whitespace().next()?.parse().ok());
        packets.with_context(|| {
            format!(
                "no counter of the cluster match in: {}{}",
                finished.stdout, finished.stderr
            )
        })
    }

    /// Throws `count` frames, those of `pattern` again and again; nanoseconds for each. All of them must have come in.
    ///
    /// # Errors
    /// Sending fails, or frames were lost on the way.
    pub fn throw(&self, pattern: &[&[u8]], count: usize) -> Result<f64> {
        // As much as one call takes, in whole patterns, so that a call costs the same whatever the pattern.
        let times = (MAX_BURST / pattern.len().max(1)).max(1);
        let batch: Vec<&[u8]> = pattern.iter().copied().cycle().take(times * pattern.len()).collect();
        if batch.is_empty() {
            bail!("nothing to throw");
        }
        let before = self.received()?;
        let thrown = std::thread::scope(|scope| scope.spawn(|| self.timed(&batch, count)).join());
        let took = thrown.map_err(|_| anyhow::anyhow!("the thread that sends has panicked"))??;
        wait_until(Duration::from_secs(2), "all frames to come in", || {
            (self.received().ok()? >= before + count as u64).then_some(())
        })
        .with_context(|| format!("{}: frames are lost on the way", self.filtering.name()))?;
        Ok(took.as_nanos() as f64 / count as f64)
    }

    fn timed(&self, batch: &[&[u8]], count: usize) -> Result<Duration> {
        // Not the first one, where a small machine's interrupts are.
        let last = std::thread::available_parallelism()?.get() - 1;
        sched::stay_on(last)?;
        let begun = Instant::now();
        let mut sent = 0;
        while sent < count {
            let at = sent % batch.len();
            let end = batch.len().min(at + count - sent);
            match self.burst.send(&batch[at..end])? {
                // They wait on this very processor, which goes on with them.
                0 => std::thread::yield_now(),
                more => sent += more,
            }
        }
        Ok(begun.elapsed())
    }

    /// Frames that the receiver's interface has seen.
    fn received(&self) -> Result<u64> {
        let text = self
            .receiver
            .run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))?;
        let head = format!("{NODE_LINK}:");
        let row = text.lines().find_map(|line| line.trim_start().strip_prefix(&head));
        let packets = row.and_then(|row| row.split_whitespace().nth(1)?.parse().ok());
        packets.with_context(|| format!("{NODE_LINK} is not in /proc/net/dev: {text}"))
    }
}

/// Frames that a processor had no room for, since the machine runs.
///
/// # Errors
/// /proc cannot be read.
pub fn backlog_drops() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/softnet_stat")?;
    let drops = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    Ok(drops.filter_map(|hex| u64::from_str_radix(hex, 16).ok()).sum())
}

/// Carries the address, as a farmd's does. What the farm's program accepts goes up the stack where it came in.
const TAP: &str = "farm0";

fn farm(receiver: &Space, early: bool) -> Result<Kept> {
    let tap = receiver.run(|| Tap::create(TAP))?;
    receiver.sysctl(&format!("net.ipv4.conf.{TAP}.rp_filter"), "0")?;
    receiver.ip(&[format!("link set {TAP} arp off up")])?;
    let mac = mac(&receiver.mac(TAP)?)?;
    receiver.run(|| -> Result<Kept> {
        let link = interface::index(NODE_LINK)?;
        let plan = plan(link)?;
        let mut kernel = Kernel::new(Filter::load()?, &plan);
        kernel.set_tap(Some((tap.ifindex(), mac)));
        kernel.set_tracked(false);
        kernel.attach(link, NODE_LINK)?;
        if early {
            kernel.attach_early(link, NODE_LINK, false)?;
        }
        kernel.lease().renew(u64::MAX);
        kernel.install(&plan, &[]);
        if !kernel.takes(IpAddr::V4(VIP)) {
            bail!("the kernel program does not take the plan");
        }
        Ok(Kept::Farm {
            _kernel: Box::new(kernel),
            _tap: tap,
        })
    })
}

fn plan(link: u32) -> Result<Plan> {
    let rules = [
        frames::rule(Protocol::Udp, OWNED_PORT, 0),
        frames::rule(Protocol::Udp, FOREIGN_PORT, 1),
        frames::rule(Protocol::Tcp, WEB_PORT, 1),
    ];
    let groups = vec![frames::group(BucketState::Own)?, frames::group(BucketState::Foreign)?];
    Ok(frames::plan(link, &[VIP.into()], &rules, groups))
}

fn mac(text: &str) -> Result<MacAddr> {
    let bytes: Vec<u8> = text
        .split(':')
        .filter_map(|hex| u8::from_str_radix(hex, 16).ok())
        .collect();
    let bytes = bytes.try_into().ok();
    Ok(MacAddr(
        bytes.with_context(|| format!("{text} is no Ethernet address"))?,
    ))
}

fn way(client: u8, port: u16) -> Way {
    Way {
        from: (Ipv4Addr::new(198, 18, 1, client).into(), CLIENT_PORT),
        to: (VIP.into(), port),
    }
}
