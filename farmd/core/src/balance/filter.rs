//! The socket filter of the raw data plane, as classic BPF.
//!
//! It runs in the kernel on every frame of the service interface and passes only what user space must see: frames to
//! the Ethernet address of a VIP whose destination is that VIP. Where all rules of a `vmac_invisible` VIP share one group and one
//! affinity (client address, or address and port), the filter also computes the flow hash and drops what lies in a foreign bucket, so that the
//! flooded traffic of the other servers costs this host no wake-up. It may pass too much, never too little: the decision is
//! [`crate::balance::decide::decide`]'s.
//!
//! A program has one part for each family that has VIPs. IPv6 headers have a fixed length, and a classic program cannot walk a chain of
//! extension headers: a frame with any of them is hashed by nobody here and passes. Neighbour solicitations for a VIP do not: a socket of their own hears them.

use std::net::IpAddr;

use crate::balance::hash::{self, FMIX_MUL_1, FMIX_MUL_2, Seed};
use crate::balance::plan::{BucketState, GroupPlan, Plan, VipPlan};
use crate::config::{Affinity, L2Mode};
use crate::id::{BUCKETS, MacAddr};

/// One instruction of classic BPF (`struct sock_filter`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Insn {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if true.
    pub jt: u8,
    /// Instructions to skip if false.
    pub jf: u8,
    /// Constant.
    pub k: u32,
}

/// Longest program the kernel takes (BPF_MAXINSNS).
const MAX_LEN: usize = 4096;

const LD_W_ABS: u16 = 0x20;
const LD_H_ABS: u16 = 0x28;
const LD_B_ABS: u16 = 0x30;
const LD_H_IND: u16 = 0x48;
const LD_B_IND: u16 = 0x50;
const LD_IMM: u16 = 0x00;
const LD_MEM: u16 = 0x60;
const LDX_MSH: u16 = 0xb1;
const ST: u16 = 0x02;
const MUL_K: u16 = 0x24;
const AND_K: u16 = 0x54;
const RSH_K: u16 = 0x74;
const RSH_X: u16 = 0x7c;
const XOR_K: u16 = 0xa4;
const XOR_X: u16 = 0xac;
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGE_K: u16 = 0x35;
const JSET_K: u16 = 0x45;
const RET_K: u16 = 0x06;
const TAX: u16 = 0x07;

/// Where a program reads the VLAN tag that the kernel has taken off the frame, 0 if there was none (SKF_AD_OFF + SKF_AD_VLAN_TAG).
const VLAN_TAG: u32 = 0xffff_f02c;
/// The VLAN identifier in it; 0 is no VLAN but a priority.
const VLAN_ID: u32 = 0x0fff;

/// Offsets in an Ethernet frame without VLAN tag (the kernel strips it before packet sockets see the frame).
const ETHERTYPE_AT: u32 = 12;
const IP_AT: u32 = 14;
/// Of a tag that is still in the frame.
const TAG_AT: u32 = 14;
const PROTOCOL_AT: u32 = 23;
const FRAGMENT_AT: u32 = 20;
const SOURCE_AT: u32 = 26;
const DESTINATION_AT: u32 = 30;
/// The same in IPv6, where what follows the fixed header begins at 54.
const NEXT_HEADER6_AT: u32 = 20;
const SOURCE6_AT: u32 = 22;
const DESTINATION6_AT: u32 = 38;
const PAYLOAD6_AT: u32 = 54;
/// Flags of a TCP segment from its beginning.
const TCP_FLAGS: u32 = 13;
/// FIN, SYN, RST and ACK, of which a connection request has SYN only.
const REQUEST_FLAGS: u32 = 0x17;
const SYN_FLAG: u32 = 0x02;

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;
const ETHERTYPE_TAG: u32 = 0x8100;
const ETHERTYPE_SERVICE_TAG: u32 = 0x88a8;
const ICMP: u32 = 1;
const TCP: u32 = 6;
const UDP: u32 = 17;
const ICMPV6: u32 = 58;
const NEIGHBOUR_SOLICITATION: u32 = 135;
/// Extension headers that may stand before a whole TCP segment: hop-by-hop, routing, authentication, destination options.
const EXTENSIONS: [u32; 4] = [0, 43, 51, 60];

/// Two conditions on IPv6 addresses, more than any VIP costs beside its body.
const MOST_PER_VIP: usize = 30;

/// All of the frame.
const ALL: u32 = 0x0004_0000;

const fn insn(code: u16, k: u32) -> Insn {
    Insn { code, jt: 0, jf: 0, k }
}

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Insn {
    Insn { code, jt, jf, k }
}

/// A filter that passes nothing.
pub fn closed() -> Vec<Insn> {
    vec![insn(RET_K, 0)]
}

/// A filter that passes everything.
pub fn open() -> Vec<Insn> {
    vec![insn(RET_K, ALL)]
}

/// How far a filter looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detail {
    /// To the Ethernet address and the VIP.
    Vips,
    /// To the bucket, where it can.
    Buckets,
}

/// The filter for the VIPs of `plan` on `interface`.
pub fn build(plan: &Plan, interface: u32, detail: Detail) -> Vec<Insn> {
    let solicitations = [
        insn(LD_B_ABS, NEXT_HEADER6_AT),
        jump(JEQ_K, ICMPV6, 0, 3),
        insn(LD_B_ABS, PAYLOAD6_AT),
        jump(JEQ_K, NEIGHBOUR_SOLICITATION, 0, 1),
        insn(RET_K, 0),
    ];
    by_family(plan, interface, true, [&[], &solicitations], &mut |vip, length| {
        let body = match detail {
            Detail::Buckets => body(plan, vip),
            Detail::Vips => vec![insn(RET_K, ALL)],
        };
        let body = if length + body.len() + MOST_PER_VIP * plan.vips.len() > MAX_LEN {
            vec![insn(RET_K, ALL)]
        } else {
            body
        };
        let mut part = block(vip.addr, Some(vip.service_mac()), &body);
        if vip.mode != L2Mode::Directed {
            // What another member has kept for this node comes to its own address.
            part.extend(block(vip.addr, Some(vip.own_mac), &[insn(RET_K, ALL)]));
        }
        part
    })
}

/// The filter for TCP connection requests (SYN without ACK) to the VIPs of `plan` on `interface`, whoever owns their buckets.
///
/// In `vmac_invisible` only those to the virtual MAC. In `vmac_directed` those to any Ethernet address: what was sent to a member that is
/// gone is seen too where the switch floods it. Over IPv6 also what has extension headers other than a fragment's.
pub fn requests(plan: &Plan, interface: u32) -> Vec<Insn> {
    let ipv4 = [
        insn(LD_B_ABS, PROTOCOL_AT),
        jump(JEQ_K, TCP, 0, 6),
        insn(LD_H_ABS, FRAGMENT_AT),
        jump(JSET_K, 0x3fff, 4, 0),
        insn(LDX_MSH, IP_AT),
        insn(LD_B_IND, IP_AT + TCP_FLAGS),
        insn(AND_K, REQUEST_FLAGS),
        jump(JEQ_K, SYN_FLAG, 1, 0),
        insn(RET_K, 0),
    ];
    let [hop_by_hop, routing, authentication, options] = EXTENSIONS;
    let ipv6 = [
        insn(LD_B_ABS, NEXT_HEADER6_AT),
        jump(JEQ_K, hop_by_hop, 8, 0),
        jump(JEQ_K, routing, 7, 0),
        jump(JEQ_K, authentication, 6, 0),
        jump(JEQ_K, options, 5, 0),
        jump(JEQ_K, TCP, 0, 3),
        insn(LD_B_ABS, PAYLOAD6_AT + TCP_FLAGS),
        insn(AND_K, REQUEST_FLAGS),
        jump(JEQ_K, SYN_FLAG, 1, 0),
        insn(RET_K, 0),
    ];
    by_family(plan, interface, false, [&ipv4, &ipv6], &mut |vip, _| {
        let mac = match vip.mode {
            L2Mode::Directed => None,
            L2Mode::Invisible(mac) => Some(mac),
        };
        block(vip.addr, mac, &[insn(RET_K, ALL)])
    })
}

/// A part for each family: what all its packets must pass (IPv4, IPv6), then what `of_vip` makes of each VIP, given the program's length so far.
/// VIPs too many for a program are not told apart. What is behind a second tag is not told apart either, if it is wanted (`tagged`), and does not pass otherwise.
fn by_family(
    plan: &Plan,
    interface: u32,
    tagged: bool,
    [ipv4, ipv6]: [&[Insn]; 2],
    of_vip: &mut dyn FnMut(&VipPlan, usize) -> Vec<Insn>,
) -> Vec<Insn> {
    // A frame of another VLAN is not of this interface.
    let mut program = vec![
        insn(LD_W_ABS, VLAN_TAG),
        insn(AND_K, VLAN_ID),
        jump(JEQ_K, 0, 1, 0),
        insn(RET_K, 0),
        insn(LD_H_ABS, ETHERTYPE_AT),
    ];
    if tagged && plan.vips.iter().any(|vip| vip.interface == interface) {
        // The kernel has taken off one tag; others may name a priority too (IEEE 802.1Q: VLAN identifier 0).
        program.extend([
            jump(JEQ_K, ETHERTYPE_TAG, 1, 0),
            jump(JEQ_K, ETHERTYPE_SERVICE_TAG, 0, 4),
            insn(LD_H_ABS, TAG_AT),
            jump(JSET_K, VLAN_ID, 0, 1),
            insn(RET_K, 0),
            insn(RET_K, ALL),
        ]);
    }
    for (ethertype, guard, is_ipv4) in [(ETHERTYPE_IPV4, ipv4, true), (ETHERTYPE_IPV6, ipv6, false)] {
        let here = |vip: &&VipPlan| vip.interface == interface && vip.addr.is_ipv4() == is_ipv4;
        let mut vips = plan.vips.iter().filter(here).peekable();
        if vips.peek().is_none() {
            continue;
        }
        let mut part = guard.to_vec();
        for vip in vips {
            let length = program.len() + part.len();
            if length + 2 * MOST_PER_VIP > MAX_LEN {
                part.push(insn(RET_K, ALL));
                break;
            }
            part.extend(of_vip(vip, length));
        }
        part.push(insn(RET_K, 0));
        // The accumulator still holds the type where the part is passed over.
        program.extend([jump(JEQ_K, ethertype, 1, 0), insn(JA, part.len() as u32)]);
        program.extend(part);
    }
    program.push(insn(RET_K, 0));
    program
}

/// `if destination and, if given, Ethernet destination fit { body }`, falling through to what follows if not.
fn block(addr: IpAddr, mac: Option<MacAddr>, body: &[Insn]) -> Vec<Insn> {
    let mut conditions = match addr {
        IpAddr::V4(v4) => vec![(LD_W_ABS, DESTINATION_AT, v4.to_bits())],
        IpAddr::V6(_) => {
            let words = hash::words(addr).zip([0, 4, 8, 12]);
            let mut words: Vec<_> = words.map(|(word, at)| (LD_W_ABS, DESTINATION6_AT + at, word)).collect();
            // Addresses of one network differ in the last word.
            words.reverse();
            words
        }
    };
    if let Some(MacAddr([a, b, c, d, e, f])) = mac {
        conditions.push((LD_W_ABS, 0, u32::from_be_bytes([a, b, c, d])));
        conditions.push((LD_H_ABS, 4, u32::from(u16::from_be_bytes([e, f]))));
    }
    let mut block = Vec::with_capacity(2 * conditions.len() + 2 + body.len());
    // The last condition jumps over what the others jump to.
    for (left, (load, at, wanted)) in (0u8..conditions.len() as u8).rev().zip(&conditions) {
        let (jt, jf) = if left == 0 { (1, 0) } else { (0, 2 * left) };
        block.extend([insn(*load, *at), jump(JEQ_K, *wanted, jt, jf)]);
    }
    block.push(insn(JA, body.len() as u32));
    block.extend_from_slice(body);
    block
}

/// What to do with a frame of this VIP; always ends in a return.
fn body(plan: &Plan, vip: &VipPlan) -> Vec<Insn> {
    let all = vec![insn(RET_K, ALL)];
    let Some(first) = vip.rules.first() else { return all };
    let uniform = vip
        .rules
        .iter()
        .all(|r| r.group == first.group && r.affinity == first.affinity);
    if vip.mode == L2Mode::Directed || !uniform {
        return all;
    }
    let Some(group) = plan.groups.get(first.group) else {
        return all;
    };
    let with_port = match first.affinity {
        Affinity::ClientIp => false,
        Affinity::ClientPort => true,
        Affinity::ClientNet | Affinity::IpId => return all,
    };
    let mut body = match vip.addr {
        IpAddr::V4(_) => hash_ipv4(plan.seed, with_port),
        IpAddr::V6(_) => hash_ipv6(plan.seed, with_port),
    };
    body.push(insn(XOR_K, plan.seed.s1));
    fmix(&mut body);
    // A = bucket, kept in M[1]; then A = number of its 32-bit word.
    body.extend([insn(RSH_K, 20), insn(ST, 1), insn(RSH_K, 5)]);
    let words = wanted(group);
    let mut tree = tree(&words, 0);
    // Leaves leave their word in A and jump here: each `JA` still holds the distance to its own end of the tree.
    let end = tree.len();
    for (at, i) in tree.iter_mut().enumerate() {
        if i.code == JA && i.k == LEAF {
            i.k = (end - at - 1) as u32;
        }
    }
    body.extend(tree);
    body.extend([
        insn(ST, 2),
        insn(LD_MEM, 1),
        insn(AND_K, 31),
        insn(TAX, 0),
        insn(LD_MEM, 2),
        insn(RSH_X, 0),
        jump(JSET_K, 1, 0, 1),
        insn(RET_K, ALL),
        insn(RET_K, 0),
    ]);
    body
}

/// Marks the jump at the end of a leaf until the tree's length is known.
const LEAF: u32 = u32::MAX;

/// Leaves the hash of the client, before the second half of the seed, in A; passes what has another key.
fn hash_ipv4(seed: Seed, with_port: bool) -> Vec<Insn> {
    // ICMP is judged by another key: an echo by the entry group, an error by the packet it quotes.
    let mut program = vec![insn(LD_B_ABS, PROTOCOL_AT), jump(JEQ_K, ICMP, 0, 1), insn(RET_K, ALL)];
    if with_port {
        // Any fragment, and what has no ports, is for user space.
        program.extend([
            jump(JEQ_K, TCP, 2, 0),
            jump(JEQ_K, UDP, 1, 0),
            insn(RET_K, ALL),
            insn(LD_H_ABS, FRAGMENT_AT),
            jump(JSET_K, 0x3fff, 0, 1),
            insn(RET_K, ALL),
        ]);
    }
    program.extend([insn(LD_W_ABS, SOURCE_AT), insn(XOR_K, seed.s0)]);
    fmix(&mut program);
    if with_port {
        program.extend([insn(ST, 0), insn(LDX_MSH, IP_AT), insn(LD_H_IND, IP_AT)]);
        mix_in(&mut program);
    }
    program
}

/// As [`hash_ipv4`]; only what has TCP or UDP right after the fixed header has its key at a place that is known here.
fn hash_ipv6(seed: Seed, with_port: bool) -> Vec<Insn> {
    let mut program = vec![
        insn(LD_B_ABS, NEXT_HEADER6_AT),
        jump(JEQ_K, TCP, 2, 0),
        jump(JEQ_K, UDP, 1, 0),
        insn(RET_K, ALL),
        insn(LD_W_ABS, SOURCE6_AT),
        insn(XOR_K, seed.s0),
    ];
    fmix(&mut program);
    for at in [4, 8, 12] {
        program.extend([insn(ST, 0), insn(LD_W_ABS, SOURCE6_AT + at)]);
        mix_in(&mut program);
    }
    if with_port {
        program.extend([insn(ST, 0), insn(LD_H_ABS, PAYLOAD6_AT)]);
        mix_in(&mut program);
    }
    program
}

/// `A = fmix32(M[0] ^ A)`.
fn mix_in(program: &mut Vec<Insn>) {
    program.extend([insn(TAX, 0), insn(LD_MEM, 0), insn(XOR_X, 0)]);
    fmix(program);
}

/// `A = fmix32(A)`.
fn fmix(program: &mut Vec<Insn>) {
    let fold = |shift| [insn(TAX, 0), insn(RSH_K, shift), insn(XOR_X, 0)];
    program.extend(fold(16));
    program.push(insn(MUL_K, FMIX_MUL_1));
    program.extend(fold(13));
    program.push(insn(MUL_K, FMIX_MUL_2));
    program.extend(fold(16));
}

/// One bit per bucket of which something may be accepted, kept or sent on.
fn wanted(group: &GroupPlan) -> Vec<u32> {
    let mut words = vec![0u32; BUCKETS / 32];
    for (i, state) in group.states.iter().enumerate() {
        match state {
            BucketState::Own | BucketState::Guarded | BucketState::Draining => words[i / 32] |= 1 << (i % 32),
            BucketState::Foreign if group.leaving.contains(i) => words[i / 32] |= 1 << (i % 32),
            BucketState::Foreign => {}
        }
    }
    words
}

/// Binary search for the word whose number is in A; leaves load it. `base` is the number of the first word.
fn tree(words: &[u32], base: u32) -> Vec<Insn> {
    if words.iter().all(|w| *w == words[0]) {
        return vec![insn(LD_IMM, words[0]), insn(JA, LEAF)];
    }
    let middle = words.len() / 2;
    let (left, right) = words.split_at(middle);
    let split = base + middle as u32;
    let left = tree(left, base);
    let right = tree(right, split);
    let mut tree = match u8::try_from(left.len()) {
        Ok(distance) => vec![jump(JGE_K, split, distance, 0)],
        Err(_) => vec![jump(JGE_K, split, 0, 1), insn(JA, left.len() as u32)],
    };
    tree.extend(left);
    tree.extend(right);
    tree
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
