//! The frames of the battery: of every kind, whole, cut short and with lengths that lie; those whose ports are not where they are looked for too (ICMP
//! errors, fragments, IPv6 extension headers), and neighbour discovery.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use farm_core::id::MacAddr;
use farm_core::wire::nd::{Message, Nd, multicast_mac, solicited_node};

use super::test_frames::*;

/// What is left of a frame when its VLAN tags are off.
pub fn without_tags(frame: &[u8]) -> Vec<u8> {
    let mut bare = frame.to_vec();
    while let Some([0x81, 0] | [0x88, 0xa8]) = bare.get(12..14)
        && bare.len() >= 18
    {
        bare.drain(12..16);
    }
    bare
}

/// Clients of the family of `addr`: one, and one that shares no word with it, of which the others differ in a single bit: the last of its network (/24,
/// /64), the first of its host, and the first of all.
pub fn clients(addr: IpAddr) -> [IpAddr; 5] {
    match addr {
        IpAddr::V4(_) => {
            let one = Ipv4Addr::new(203, 0, 113, 77).to_bits();
            let other_than = |bit: u32| IpAddr::V4((one ^ (1 << bit)).into());
            [
                client(1),
                IpAddr::V4(one.into()),
                other_than(8),
                other_than(7),
                other_than(31),
            ]
        }
        IpAddr::V6(_) => {
            let one = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 3, 4, 5, 6).to_bits();
            let other_than = |bit: u32| IpAddr::V6((one ^ (1 << bit)).into());
            [
                client6(1),
                IpAddr::V6(one.into()),
                other_than(64),
                other_than(63),
                other_than(127),
            ]
        }
    }
}

/// As [`frames_from`], from the first of [`clients`].
pub fn frames_for(addr: IpAddr, to_mac: MacAddr, from_mac: MacAddr, id: u16) -> Vec<Vec<u8>> {
    frames_from(clients(addr)[0], addr, to_mac, from_mac, id)
}

/// Frames of every kind for `addr`, from `client` outside; fragments are of datagrams from number `id` on.
pub fn frames_from(client: IpAddr, addr: IpAddr, to_mac: MacAddr, from_mac: MacAddr, id: u16) -> Vec<Vec<u8>> {
    let way = Way {
        from_mac,
        ..Way::new(client, addr, to_mac)
    };
    let mut all = plain_frames(&way);
    all.extend(errors(&way));
    all.extend(fragments(&way, id));
    all.extend(extended(&way));
    all.extend(discovery(&way));
    let syn = way.tcp(4000, 80, Flags::Syn);
    let tags: [&[u32]; 5] = [
        &[0x8100_6000],
        &[0x88a8_0000],
        &[0x88a8_0000, 0x8100_e000],
        &[0x8100_0005],
        &[0x8100_0000, 0x8100_0005],
    ];
    all.extend(tags.map(|tags| tagged(&syn, tags)));
    // A dry run takes no frame without its IP header.
    let least = if addr.is_ipv4() { 34 } else { 54 };
    all.retain(|frame| frame.len() >= least);
    all
}

fn plain_frames(way: &Way) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for flags in [Flags::Syn, Flags::SynAck, Flags::Ack, Flags::Rst] {
        for port in [80, 81, 443, 1023, 8080, 9000] {
            all.push(way.tcp(4000, port, flags));
        }
    }
    all.push(way.udp(4000, 53, b"?"));
    all.push(way.udp(4000, 54, b""));
    all.push(way.echo());
    let whole = way.tcp(4001, 80, Flags::Ack);
    let header = if way.vip.is_ipv4() { 34 } else { 54 };
    for more in [0, 1, 6, 12, 13, 14, 19, 20] {
        all.push(whole[..header + more].to_vec());
    }
    if way.vip.is_ipv4() {
        all.push(with_options(&way.tcp(4002, 80, Flags::Syn), 3));
        all.push(with_options(&way.tcp(4002, 443, Flags::Ack), 10));
        // Lengths that lie, a header shorter than can be, a protocol that is not shared, another version.
        for (at, value) in [(16, 0xff), (17, 10), (14, 0x44), (23, 47), (14, 0x65), (46, 0x40)] {
            let mut frame = way.tcp(4003, 80, Flags::Ack);
            frame[at] = value;
            all.push(frame);
        }
    } else {
        let mut longer = way.tcp(4003, 80, Flags::Ack);
        longer[18] = 0xff;
        all.push(longer);
    }
    all
}

/// ICMP errors from a router on the way: about packets of every kind that the VIP has sent, cut short anywhere, and about none of its.
fn errors(way: &Way) -> Vec<Vec<u8>> {
    let back = way.back();
    let header = if way.vip.is_ipv4() { 34 } else { 54 };
    let tcp = back.tcp(80, 4000, Flags::Ack);
    let mut quoted = vec![
        tcp.clone(),
        back.tcp(443, 4000, Flags::SynAck),
        back.tcp(81, 4000, Flags::Ack),
        back.udp(53, 4000, b"x"),
        back.udp(54, 4000, b"x"),
        back.echo(),
    ];
    quoted.extend([0, 1, 3, 4, 8].map(|more| tcp[..header + more].to_vec()));
    quoted.extend([1, 10, header - 15].map(|length| tcp[..14 + length].to_vec()));
    let strangers = Way {
        client: way.client,
        ..back
    };
    quoted.push(strangers.udp(53, 4000, b"x"));
    let mut other_protocol = tcp.clone();
    other_protocol[if way.vip.is_ipv4() { 23 } else { 20 }] = 47;
    quoted.push(other_protocol);
    let mut other_version = tcp.clone();
    other_version[14] ^= 0x20;
    quoted.push(other_version);
    if way.vip.is_ipv4() {
        quoted.push(with_options(&tcp, 4));
        quoted.push(fragment(&back.udp(53, 4000, &[7; 64]), 7, 0, true, 32));
        quoted.push(fragment(&back.udp(53, 4000, &[7; 64]), 7, 4, true, 32));
        let mut short = tcp.clone();
        short[14] = 0x44;
        quoted.push(short);
    } else {
        quoted.push(with_extensions(&back.udp(53, 4000, &[7; 64]), &[44], 0, true));
        quoted.push(with_extensions(&back.udp(53, 4000, &[7; 64]), &[44], 4, true));
        quoted.push(with_extensions(&tcp, &[0, 43, 60], 0, false));
        quoted.push(with_extensions(&tcp, &[60], 0, false)[..60].to_vec());
    }
    let mut all: Vec<Vec<u8>> = quoted.iter().map(|quoted| way.too_big(quoted)).collect();
    // Every type of message.
    for kind in 0..=20 {
        let mut frame = way.too_big(&tcp);
        frame[header] = kind;
        all.push(frame);
    }
    all
}

/// A fragment of datagram `id` at `offset` (in units of 8 bytes), with `length` bytes of its payload from there on.
pub fn part(frame: &[u8], id: u16, offset: u16, more: bool, length: usize) -> Vec<u8> {
    if frame[12..14] == [0x08, 0x00] {
        return fragment(frame, id, offset, more, length);
    }
    let from = 54 + usize::from(offset) * 8;
    let mut cut = frame[..54].to_vec();
    cut.extend_from_slice(&frame[from..frame.len().min(from + length)]);
    let mut part = with_extensions(&cut, &[60, 44], offset, more);
    part[66..70].copy_from_slice(&u32::from(id).to_be_bytes());
    part
}

/// Parts of datagrams, the first of which has identification `id`: first, middle, last, short and alone.
fn fragments(way: &Way, id: u16) -> Vec<Vec<u8>> {
    let udp = way.udp(4000, 53, &[7; 64]);
    let (syn, ack) = (way.tcp(4000, 80, Flags::Syn), way.tcp(4000, 443, Flags::Ack));
    let mut all = vec![
        part(&udp, id, 4, true, 16),
        part(&udp, id, 0, true, 32),
        part(&udp, id, 4, true, 16),
        part(&udp, id, 6, false, 16),
        part(&way.udp(4000, 54, &[7; 64]), id + 1, 0, true, 32),
        part(&way.udp(4000, 54, &[7; 64]), id + 1, 4, false, 32),
        part(&syn, id + 2, 0, true, 16),
        part(&syn, id + 2, 2, false, 8),
        part(&syn, id + 3, 0, true, 8),
        part(&syn, id + 3, 1, false, 16),
        part(&ack, id + 4, 0, true, 16),
        part(&ack, id + 4, 2, false, 8),
        part(&way.echo(), id + 5, 0, true, 8),
        part(&way.echo(), id + 5, 1, false, 4),
        part(&udp, id + 6, 0, true, 3),
        part(&udp, id + 7, 0, true, 0),
        part(&way.too_big(&way.back().udp(53, 4000, b"x")), id + 8, 0, true, 24),
    ];
    let mut lies = part(&udp, id, 4, true, 16);
    lies[if way.vip.is_ipv4() { 16 } else { 18 }] = 0xff;
    all.push(lies);
    all
}

/// IPv6 packets with extension headers: as they should be, too many, out of place, cut short, too long, and without anything behind them.
fn extended(way: &Way) -> Vec<Vec<u8>> {
    if way.vip.is_ipv4() {
        return Vec::new();
    }
    let packets = [
        way.tcp(4000, 80, Flags::Syn),
        way.tcp(4000, 443, Flags::Ack),
        way.udp(4000, 53, b"?"),
        way.echo(),
        way.too_big(&way.back().tcp(80, 4000, Flags::Ack)),
    ];
    let chains: [&[u8]; 10] = [
        &[0],
        &[60],
        &[0, 43, 60],
        &[44],
        &[0, 60, 44],
        &[51],
        &[60; 8],
        &[60; 9],
        &[60, 0],
        &[44, 44],
    ];
    let mut all: Vec<Vec<u8>> = packets
        .iter()
        .flat_map(|packet| chains.iter().map(|chain| with_extensions(packet, chain, 0, false)))
        .collect();
    let two = with_extensions(&packets[0], &[0, 60], 0, false);
    for (at, value) in [
        (55, 1),
        (55, 200),
        (62, 59),
        (62, 50),
        (63, 2),
        (63, 3),
        (18, 0xff),
        (19, 4),
        (19, 15),
    ] {
        let mut frame = two.clone();
        frame[at] = value;
        all.push(frame);
    }
    all.extend([55, 61, 62, 69, 70, 75, 89].map(|length| two[..length].to_vec()));
    all
}

/// Neighbour discovery, and what routers say: about the address to its group, and to the address itself.
pub fn discovery(way: &Way) -> Vec<Vec<u8>> {
    let (IpAddr::V6(client), IpAddr::V6(vip)) = (way.client, way.vip) else {
        return Vec::new();
    };
    // A neighbour makes sure that it is still there.
    let question = Nd {
        destination_mac: way.to_mac,
        source_mac: way.from_mac,
        source: client,
        destination: vip,
        message: Message::Solicitation,
        target: vip,
        link_layer: Some(way.from_mac),
    };
    let to_all = Nd {
        destination_mac: multicast_mac(solicited_node(vip)),
        destination: solicited_node(vip),
        ..question
    };
    let probe = Nd {
        source: Ipv6Addr::UNSPECIFIED,
        link_layer: None,
        ..to_all
    };
    let answer = Nd {
        message: Message::Advertisement {
            solicited: true,
            overrides: true,
        },
        target: client,
        ..question
    };
    let mut all: Vec<Vec<u8>> = [question, to_all, probe, answer].iter().map(Nd::emit).collect();
    // Of routers, and a redirect.
    for kind in [133, 134, 137] {
        let mut frame = question.emit();
        frame[54] = kind;
        all.push(frame);
    }
    all.push(with_extensions(&question.emit(), &[60], 0, false));
    all
}
