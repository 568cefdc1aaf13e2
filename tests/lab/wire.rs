//! The wire watcher: what every node really sent, seen at its switch port.
//!
//! Owns one packet ring per switch port, with a kernel filter, and the evidence that two nodes acted for one client. The owner of a frame
//! is the port it came in by, not what the frame claims. Never sends and never changes a frame.

mod capture;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use etherparse::{ArpOperation, Icmpv4Type, Icmpv6Type, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use farm_core::id::MacAddr;
use farm_core::wire::nd::{Message, Nd};
use farm_sys::interface;
use farm_sys::packet_socket::{PacketRing, VNET_HEADER};
use farm_sys::poll::wait_readable;

use crate::{CLIENT_PORT, Lab, ROUTER_PORT, client_port};

/// Slots of 2 KiB per port: a burst of a few thousand frames while the watcher waits for the processor.
const SLOTS: u32 = 4096;

/// One TCP connection attempt: the client's and the VIP's end, and the client's first sequence number, which tells two connections of the same ports apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Attempt {
    /// Client address and port.
    pub client: SocketAddr,
    /// Virtual address and port.
    pub vip: SocketAddr,
    /// The client's initial sequence number.
    pub sequence: u32,
}

/// When each port sent something.
pub type Times = BTreeMap<String, Vec<Instant>>;

/// One reset of a connection of a VIP.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reset {
    /// Where it came out: the switch port.
    pub port: String,
    /// When.
    pub at: Instant,
    /// Virtual address and port.
    pub vip: SocketAddr,
    /// Client address and port.
    pub client: SocketAddr,
}

/// Who answered the ARP requests, or the neighbour solicitations, of one requester for one VIP.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ArpSeen {
    /// Requests heard from it.
    pub requests: usize,
    /// Replies and announcements to it, by the node's port.
    pub replies: BTreeMap<String, usize>,
    /// MACs it was told.
    pub macs: BTreeSet<MacAddr>,
}

/// What was on the wire.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Connection requests for a VIP as they came from the clients: when each was sent.
    pub syns: BTreeMap<Attempt, Vec<Instant>>,
    /// To which Ethernet address each of them went.
    pub entries: BTreeMap<Attempt, Vec<MacAddr>>,
    /// SYN-ACKs of the VIPs: which ports sent one, and when.
    pub syn_acks: BTreeMap<Attempt, Times>,
    /// Resets sent by a VIP.
    pub resets: Vec<Reset>,
    /// Resets sent to a VIP, as they came from the clients.
    pub client_resets: Vec<Reset>,
    /// Echo replies of a VIP by (client, identifier, sequence number): which ports sent one, how often.
    pub echo_replies: BTreeMap<(IpAddr, u16, u16), BTreeMap<String, usize>>,
    /// ARP and neighbour discovery by (requester, VIP); probes of who has no address yet under the unspecified one.
    pub arp: BTreeMap<(IpAddr, IpAddr), ArpSeen>,
    /// What claims a VIP and is sent to all, by port; answers to probes are not among them.
    pub announcements: BTreeMap<String, usize>,
    /// Frames whose source was a virtual MAC, by port. There must be none.
    pub vmac_sources: BTreeMap<String, usize>,
    /// Frames the watcher itself missed; anything but 0 makes the rest incomplete.
    pub missed: u64,
}

impl Evidence {
    /// Attempts that two nodes answered.
    pub fn two_owners(&self) -> Vec<(&Attempt, &Times)> {
        self.syn_acks.iter().filter(|(_, ports)| ports.len() > 1).collect()
    }

    /// How often this client's end asked for a connection: more than once if its kernel had no answer for a second.
    pub fn requests_of(&self, client: SocketAddr) -> usize {
        let own = self.syns.iter().filter(|(attempt, _)| attempt.client == client);
        own.map(|(_, times)| times.len()).max().unwrap_or(0)
    }

    /// Echo requests that were answered more than once.
    pub fn double_echoes(&self) -> usize {
        self.echo_replies
            .values()
            .filter(|ports| ports.values().sum::<usize>() > 1)
            .count()
    }

    /// An error unless the wire was watched without a miss and shows one owner for everything, no reset, and no virtual MAC as source.
    pub fn check_single_owner(&self) -> Result<()> {
        let mut wrong = Vec::new();
        if self.missed > 0 {
            wrong.push(format!("the watcher missed {} frames", self.missed));
        }
        if let Some((attempt, ports)) = self.two_owners().first() {
            wrong.push(format!(
                "{} connections had two SYN-ACKs, e.g. {attempt:?} by {ports:?}",
                self.two_owners().len()
            ));
        }
        if let Some(Reset { port, vip, client, .. }) = self.resets.first() {
            wrong.push(format!("{} resets, e.g. {port}: {vip} to {client}", self.resets.len()));
        }
        if self.double_echoes() > 0 {
            wrong.push(format!("{} echo requests answered twice", self.double_echoes()));
        }
        if !self.vmac_sources.is_empty() {
            wrong.push(format!(
                "frames with the virtual MAC as source: {:?}",
                self.vmac_sources
            ));
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            bail!("on the wire: {}", wrong.join("; "))
        }
    }
}

/// A watcher at work.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Evidence>>,
}

impl Watcher {
    /// Watches all switch ports of `lab`; returns when it hears them.
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut ports: Vec<String> = (1..=lab.nodes.len()).map(|i| format!("p{i}")).collect();
        ports.push(CLIENT_PORT.to_owned());
        if lab.router.is_some() {
            ports.push(ROUTER_PORT.to_owned());
        }
        let vips: Vec<IpAddr> = lab.config().vips.iter().map(|vip| vip.addr).collect();
        let vmacs: Vec<MacAddr> = lab.config().vips.iter().map(|vip| vip.vmac()).collect();
        let switch = Arc::clone(&lab.switch);
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, hears) = mpsc::channel();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("lab-watcher".into()).spawn(move || {
            switch.run(|| {
                // Clients that were added to the lab.
                ports.extend((1..).map(client_port).take_while(|port| interface::index(port).is_ok()));
                let opened = open_rings(&ports, &vmacs);
                let _ = ready.send(opened.as_ref().map(|_| ()).map_err(|error| format!("{error:#}")));
                watch(&ports, opened?, &Judge { vips, vmacs }, &stopped)
            })
        })?;
        match hears.recv() {
            Ok(Ok(())) => Ok(Self { stop, thread }),
            Ok(Err(error)) => bail!("cannot watch the wire: {error}"),
            Err(_) => bail!("cannot watch the wire: the watcher's thread ended"),
        }
    }

    /// Ends the watch after what is still in the rings.
    pub fn stop(self) -> Result<Evidence> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(evidence) => evidence,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn open_rings(ports: &[String], vmacs: &[MacAddr]) -> Result<Vec<PacketRing>> {
    let filter = capture::filter(vmacs);
    let open = |port: &String| PacketRing::open(interface::index(port)?, SLOTS, &filter);
    ports
        .iter()
        .map(|port| open(port).with_context(|| format!("switch port {port}")))
        .collect()
}

fn watch(ports: &[String], mut rings: Vec<PacketRing>, judge: &Judge, stop: &AtomicBool) -> Result<Evidence> {
    let mut evidence = Evidence::default();
    loop {
        // Read before the rings, so that all that came before the stop is in them for the last pass.
        let last = stop.load(Ordering::Relaxed);
        if !last {
            let fds: Vec<BorrowedFd<'_>> = rings.iter().map(AsFd::as_fd).collect();
            wait_readable(&fds, Some(Duration::from_millis(50)))?;
        }
        for (port, ring) in ports.iter().zip(&mut rings) {
            loop {
                let read = ring.recv_timed(256, |arrived, bytes| {
                    judge.see(port, moment(arrived), &bytes[VNET_HEADER..], &mut evidence);
                });
                match read {
                    Ok(0) => break,
                    Ok(_) => {}
                    // A port that goes down is part of many tests; capture goes on when it comes up.
                    Err(error) if error.kind() == std::io::ErrorKind::NetworkDown => break,
                    Err(error) => return Err(error).with_context(|| format!("switch port {port}")),
                }
            }
        }
        if last {
            for ring in &rings {
                evidence.missed += u64::from(ring.stats()?.1) + ring.truncated();
            }
            return Ok(evidence);
        }
    }
}

/// A moment of the system's clock on the clock that only goes forward.
fn moment(arrived: SystemTime) -> Instant {
    let now = Instant::now();
    now.checked_sub(arrived.elapsed().unwrap_or_default()).unwrap_or(now)
}

/// What the watcher looks for.
struct Judge {
    vips: Vec<IpAddr>,
    vmacs: Vec<MacAddr>,
}

impl Judge {
    fn see(&self, port: &str, at: Instant, frame: &[u8], evidence: &mut Evidence) {
        let Some(source) = frame.get(6..12).and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) else {
            return;
        };
        if self.vmacs.contains(&MacAddr(source)) {
            count(&mut evidence.vmac_sources, port);
        }
        let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else {
            return;
        };
        match packet.net {
            Some(LaxNetSlice::Arp(arp)) => {
                if let Ok(arp) = arp.to_packet().try_eth_ipv4() {
                    self.see_arp(port, &arp, frame[0] & 1 != 0, evidence);
                }
            }
            Some(LaxNetSlice::Ipv4(ip)) => {
                let ends = (ip.header().source_addr().into(), ip.header().destination_addr().into());
                self.see_ip((port, at, frame), ends, packet.transport, evidence);
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                let ends = (ip.header().source_addr().into(), ip.header().destination_addr().into());
                match Nd::parse(frame) {
                    Some(nd) => self.see_nd(port, &nd, evidence),
                    None => self.see_ip((port, at, frame), ends, packet.transport, evidence),
                }
            }
            None => {}
        }
    }

    fn see_ip(
        &self,
        (port, at, frame): (&str, Instant, &[u8]),
        (from, to): (IpAddr, IpAddr),
        transport: Option<TransportSlice<'_>>,
        evidence: &mut Evidence,
    ) {
        let echo_reply = match &transport {
            Some(TransportSlice::Icmpv4(icmp)) => match icmp.icmp_type() {
                Icmpv4Type::EchoReply(echo) => Some(echo),
                _ => None,
            },
            Some(TransportSlice::Icmpv6(icmp)) => match icmp.icmp_type() {
                Icmpv6Type::EchoReply(echo) => Some(echo),
                _ => None,
            },
            _ => None,
        };
        match (transport, echo_reply) {
            (_, Some(echo)) if self.vips.contains(&from) => {
                count(evidence.echo_replies.entry((to, echo.id, echo.seq)).or_default(), port);
            }
            (Some(TransportSlice::Tcp(tcp)), _) if self.vips.contains(&from) => {
                let vip = SocketAddr::new(from, tcp.source_port());
                let client = SocketAddr::new(to, tcp.destination_port());
                if tcp.rst() {
                    let port = port.to_owned();
                    evidence.resets.push(Reset { port, at, vip, client });
                } else if tcp.syn() && tcp.ack() {
                    let sequence = tcp.acknowledgment_number().wrapping_sub(1);
                    let attempt = Attempt { client, vip, sequence };
                    let ports = evidence.syn_acks.entry(attempt).or_default();
                    ports.entry(port.to_owned()).or_default().push(at);
                }
            }
            // What an entry node sends on is the same request once more.
            (Some(TransportSlice::Tcp(tcp)), _)
                if self.vips.contains(&to) && (matches!(port, CLIENT_PORT | ROUTER_PORT) || port.starts_with('c')) =>
            {
                let client = SocketAddr::new(from, tcp.source_port());
                let vip = SocketAddr::new(to, tcp.destination_port());
                if tcp.rst() {
                    let port = port.to_owned();
                    evidence.client_resets.push(Reset { port, at, vip, client });
                } else if tcp.syn() && !tcp.ack() {
                    let sequence = tcp.sequence_number();
                    let attempt = Attempt { client, vip, sequence };
                    evidence.syns.entry(attempt).or_default().push(at);
                    let entry = frame.first_chunk().copied().map(MacAddr);
                    evidence.entries.entry(attempt).or_default().extend(entry);
                }
            }
            _ => {}
        }
    }

    fn see_arp(&self, port: &str, arp: &etherparse::ArpEthIpv4Packet, to_group: bool, evidence: &mut Evidence) {
        let (sender, target) = (IpAddr::from(arp.sender_ipv4), IpAddr::from(arp.target_ipv4));
        if self.vips.contains(&sender) {
            if to_group {
                count(&mut evidence.announcements, port);
            } else if arp.operation == ArpOperation::REPLY {
                let seen = evidence.arp.entry((target, sender)).or_default();
                count(&mut seen.replies, port);
                seen.macs.insert(MacAddr(arp.sender_mac));
            }
        } else if arp.operation == ArpOperation::REQUEST && self.vips.contains(&target) {
            evidence.arp.entry((sender, target)).or_default().requests += 1;
        }
    }

    fn see_nd(&self, port: &str, nd: &Nd, evidence: &mut Evidence) {
        let target = IpAddr::from(nd.target);
        if !self.vips.contains(&target) {
            return;
        }
        match nd.message {
            Message::Solicitation => {
                evidence.arp.entry((nd.source.into(), target)).or_default().requests += 1;
            }
            Message::Advertisement { overrides: true, .. } if nd.destination.is_multicast() => {
                count(&mut evidence.announcements, port);
            }
            Message::Advertisement { .. } => {
                let to = if nd.destination.is_multicast() {
                    Ipv6Addr::UNSPECIFIED
                } else {
                    nd.destination
                };
                let seen = evidence.arp.entry((to.into(), target)).or_default();
                count(&mut seen.replies, port);
                seen.macs.extend(nd.link_layer);
            }
        }
    }
}

fn count(counts: &mut BTreeMap<String, usize>, port: &str) {
    *counts.entry(port.to_owned()).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use etherparse::PacketBuilder;
    use farm_sys::packet_socket::BpfInsn;

    const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 20);
    const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x20);
    const CLIENT: [u8; 4] = [198, 18, 0, 100];
    const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x100);

    fn judge() -> Judge {
        Judge {
            vips: vec![VIP.into(), VIP6.into()],
            vmacs: vec![MacAddr([0x5a, 0xfe, 198, 18, 0, 20])],
        }
    }

    fn see(port: &str, frame: &[u8], evidence: &mut Evidence) {
        judge().see(port, Instant::now(), frame, evidence);
    }

    /// A TCP frame of the VIP from a source MAC that ends in `from`.
    fn tcp(from: [u8; 6], flags: &str, ack: u32) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(from, [2; 6])
            .ipv4(VIP.octets(), CLIENT, 64)
            .tcp(80, 4000, 7, 1000);
        let builder = match flags {
            "syn" => builder.syn(),
            "synack" => builder.syn().ack(ack),
            "rst" => builder.rst(),
            _ => builder.ack(ack),
        };
        let mut frame = Vec::new();
        builder.write(&mut frame, &[]).unwrap();
        frame
    }

    fn echo_reply() -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([4; 6], [2; 6])
            .ipv4(VIP.octets(), CLIENT, 64)
            .icmpv4_echo_reply(9, 1)
            .write(&mut frame, &[0; 8])
            .unwrap();
        frame
    }

    /// Runs the program as the kernel would; true if the frame is captured.
    fn captured(program: &[BpfInsn], frame: &[u8]) -> bool {
        let byte = |at: u32| frame.get(at as usize).copied().map(u32::from);
        let half = |at: u32| Some(byte(at)? << 8 | byte(at + 1)?);
        let word = |at: u32| Some(half(at)? << 16 | half(at + 2)?);
        let (mut a, mut x, mut at) = (0, 0, 0);
        loop {
            let insn = &program[at];
            at += 1;
            let loaded = match insn.code {
                0x28 => half(insn.k),
                0x30 => byte(insn.k),
                0x20 => word(insn.k),
                0x50 => byte(x + insn.k),
                0xb1 => {
                    x = (frame[insn.k as usize] as u32 & 0xf) * 4;
                    Some(a)
                }
                0x15 | 0x45 => {
                    let yes = if insn.code == 0x15 {
                        a == insn.k
                    } else {
                        a & insn.k != 0
                    };
                    at += usize::from(if yes { insn.jt } else { insn.jf });
                    Some(a)
                }
                _ => return insn.k != 0,
            };
            match loaded {
                Some(value) => a = value,
                None => return false,
            }
        }
    }

    #[test]
    fn the_filter_takes_handshakes_resets_icmp_arp_and_virtual_sources_only() {
        let vmacs = judge().vmacs;
        let program = capture::filter(&vmacs);
        let data = tcp([4; 6], "ack", 1);
        assert!(!captured(&program, &data));
        assert!(captured(&program, &tcp([4; 6], "synack", 1)) && captured(&program, &tcp([4; 6], "rst", 0)));
        assert!(
            captured(&program, &tcp(vmacs[0].0, "ack", 1)),
            "data from the virtual MAC"
        );
        assert!(captured(&program, &echo_reply()));
        let mut arp = data;
        arp[12..14].copy_from_slice(&[8, 6]);
        assert!(captured(&program, &arp));
    }

    #[test]
    fn ipv6_is_seen_as_ipv4_is() {
        let vmacs = judge().vmacs;
        let program = capture::filter(&vmacs);
        let builder = || PacketBuilder::ethernet2([4; 6], [2; 6]).ipv6(VIP6.octets(), CLIENT6.octets(), 64);
        let tcp = || builder().tcp(80, 4000, 7, 1000);
        let (mut data, mut syn_ack, mut echo) = (Vec::new(), Vec::new(), Vec::new());
        tcp().ack(1).write(&mut data, &[0; 20]).unwrap();
        tcp().syn().ack(501).write(&mut syn_ack, &[]).unwrap();
        builder().icmpv6_echo_reply(9, 1).write(&mut echo, &[0; 8]).unwrap();
        assert!(!captured(&program, &data));
        let mac = |i| MacAddr([2, 0, 0, 0, 0, i]);
        let question = Nd {
            destination_mac: mac(1),
            source_mac: mac(9),
            source: CLIENT6,
            destination: VIP6,
            message: Message::Solicitation,
            target: VIP6,
            link_layer: None,
        };
        let answer = question.answer(mac(1), mac(1)).emit();
        let news = Nd::announce(VIP6, mac(1), mac(1), None).emit();
        let mut evidence = Evidence::default();
        for frame in [&syn_ack, &echo, &question.emit(), &answer, &news] {
            assert!(captured(&program, frame));
            see("p1", frame, &mut evidence);
        }
        assert_eq!((evidence.syn_acks.len(), evidence.echo_replies.len()), (1, 1));
        let asked = &evidence.arp[&(CLIENT6.into(), VIP6.into())];
        assert_eq!((asked.requests, asked.replies["p1"]), (1, 1));
        assert_eq!(asked.macs, BTreeSet::from([mac(1)]));
        assert_eq!(evidence.announcements["p1"], 1);
        see("p2", &echo, &mut evidence);
        assert_eq!(evidence.double_echoes(), 1);
    }

    #[test]
    fn a_second_syn_ack_from_another_port_is_two_owners_and_a_repeated_one_is_not() {
        let mut evidence = Evidence::default();
        for port in ["p1", "p1"] {
            see(port, &tcp([4; 6], "synack", 501), &mut evidence);
        }
        see("p2", &tcp([5; 6], "synack", 900), &mut evidence);
        assert!(
            evidence.check_single_owner().is_ok(),
            "another sequence number is another connection"
        );
        see("p2", &tcp([5; 6], "synack", 501), &mut evidence);
        let (attempt, ports) = evidence.two_owners()[0];
        assert_eq!((attempt.sequence, ports["p1"].len(), ports["p2"].len()), (500, 2, 1));
        assert!(evidence.check_single_owner().is_err());
    }

    #[test]
    fn a_request_that_is_sent_again_is_counted_at_its_client_only() {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4(CLIENT, VIP.octets(), 64)
            .tcp(4000, 80, 7, 1000)
            .syn()
            .write(&mut frame, &[])
            .unwrap();
        let mut evidence = Evidence::default();
        for port in [CLIENT_PORT, "p1", "c1"] {
            see(port, &frame, &mut evidence);
        }
        let client = |port| SocketAddr::new(CLIENT.into(), port);
        assert_eq!(
            (evidence.requests_of(client(4000)), evidence.requests_of(client(4001))),
            (2, 0)
        );
    }

    #[test]
    fn resets_double_echoes_and_the_virtual_mac_as_source_are_seen() {
        let mut evidence = Evidence::default();
        see("p1", &tcp([0x5a, 0xfe, 198, 18, 0, 20], "rst", 0), &mut evidence);
        see("p1", &echo_reply(), &mut evidence);
        see("p3", &echo_reply(), &mut evidence);
        assert_eq!(
            (
                evidence.resets.len(),
                evidence.double_echoes(),
                evidence.vmac_sources["p1"]
            ),
            (1, 1, 1)
        );
        let text = evidence.check_single_owner().unwrap_err().to_string();
        assert!(
            text.contains("resets") && text.contains("answered twice") && text.contains("source"),
            "{text}"
        );
    }
}
