//! ARP over Ethernet for IPv4 (RFC 826): what a responder reads and writes.

use std::net::Ipv4Addr;

use crate::id::MacAddr;

/// Length of an Ethernet frame with an ARP packet, padded to the least Ethernet length without its check sequence.
pub const FRAME_LEN: usize = 60;

const ETHERTYPE_ARP: u16 = 0x0806;

/// Request or reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Who has the target address.
    Request,
    /// The sender has its address.
    Reply,
}

/// One ARP packet in its frame.
///
/// ```text
/// Ethernet: destination (6), source (6), 0x0806
/// hardware 1, protocol 0x0800, lengths 6 and 4, operation (2)
/// sender hardware (6), sender address (4), target hardware (6), target address (4)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arp {
    /// Where the frame goes.
    pub destination: MacAddr,
    /// Where the frame comes from; never the virtual MAC.
    pub source: MacAddr,
    /// Request or reply.
    pub operation: Operation,
    /// Sender hardware address.
    pub sender_mac: MacAddr,
    /// Sender protocol address.
    pub sender: Ipv4Addr,
    /// Target hardware address.
    pub target_mac: MacAddr,
    /// Target protocol address.
    pub target: Ipv4Addr,
}

impl Arp {
    /// Reads a frame; `None` if it is not ARP for IPv4 over Ethernet.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let (ethernet, arp) = frame.split_first_chunk::<14>()?;
        let arp = arp.first_chunk::<28>()?;
        let u16_at = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let mac = |bytes: &[u8]| -> Option<MacAddr> { bytes.first_chunk().map(|b| MacAddr(*b)) };
        let ip = |bytes: &[u8]| -> Option<Ipv4Addr> { bytes.first_chunk::<4>().map(|b| Ipv4Addr::from(*b)) };
        let fits = u16_at(ethernet, 12) == ETHERTYPE_ARP && arp[..6] == [0, 1, 8, 0, 6, 4];
        let operation = match u16_at(arp, 6) {
            1 => Operation::Request,
            2 => Operation::Reply,
            _ => return None,
        };
        if !fits {
            return None;
        }
        Some(Self {
            destination: mac(&ethernet[..6])?,
            source: mac(&ethernet[6..12])?,
            operation,
            sender_mac: mac(&arp[8..14])?,
            sender: ip(&arp[14..18])?,
            target_mac: mac(&arp[18..24])?,
            target: ip(&arp[24..28])?,
        })
    }

    /// The frame, padded.
    pub fn emit(&self) -> [u8; FRAME_LEN] {
        let mut frame = [0; FRAME_LEN];
        frame[..6].copy_from_slice(&self.destination.0);
        frame[6..12].copy_from_slice(&self.source.0);
        frame[12..20].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4]);
        frame[21] = match self.operation {
            Operation::Request => 1,
            Operation::Reply => 2,
        };
        frame[22..28].copy_from_slice(&self.sender_mac.0);
        frame[28..32].copy_from_slice(&self.sender.octets());
        frame[32..38].copy_from_slice(&self.target_mac.0);
        frame[38..42].copy_from_slice(&self.target.octets());
        frame
    }

    /// The answer to a request: `vip` is at `mac`, said by a host whose own address is `source`.
    pub fn reply_to(&self, source: MacAddr, mac: MacAddr) -> Self {
        Self {
            destination: self.sender_mac,
            source,
            operation: Operation::Reply,
            sender_mac: mac,
            sender: self.target,
            target_mac: self.sender_mac,
            target: self.sender,
        }
    }

    /// Asks the host at `to` whether it has `target`, which it is known to have, without telling an address of one's own: a probe (RFC 5227 section 2.1.1),
    /// which nobody's table takes in. Who is there answers.
    pub fn probe(target: Ipv4Addr, source: MacAddr, to: MacAddr) -> Self {
        Self {
            destination: to,
            source,
            operation: Operation::Request,
            sender_mac: source,
            sender: Ipv4Addr::UNSPECIFIED,
            target_mac: MacAddr::default(),
            target,
        }
    }

    /// Unsolicited news that `vip` is at `mac`, to `to` (one requester, or everybody).
    ///
    /// It is a gratuitous reply (RFC 5944 section 4.6): sender and target are both the VIP with the same hardware address. Linux takes it
    /// over at once, where it ignores an ordinary reply for a second after the last one.
    pub fn announce(vip: Ipv4Addr, source: MacAddr, mac: MacAddr, to: MacAddr) -> Self {
        Self {
            destination: to,
            source,
            operation: Operation::Reply,
            sender_mac: mac,
            sender: vip,
            target_mac: mac,
            target: vip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_and_answered_without_the_virtual_mac_as_source() {
        let own = MacAddr([2, 0, 0, 0, 0, 1]);
        let client = MacAddr([2, 0, 0, 0, 0, 9]);
        let vmac = MacAddr([0x5a, 0xfe, 198, 18, 0, 20]);
        let request = Arp {
            destination: MacAddr::BROADCAST,
            source: client,
            operation: Operation::Request,
            sender_mac: client,
            sender: Ipv4Addr::new(198, 18, 0, 100),
            target_mac: MacAddr::default(),
            target: Ipv4Addr::new(198, 18, 0, 20),
        };
        assert_eq!(Arp::parse(&request.emit()), Some(request));
        let reply = Arp::parse(&request.reply_to(own, vmac).emit()).unwrap();
        assert_eq!((reply.source, reply.sender_mac, reply.destination), (own, vmac, client));
        assert_eq!((reply.sender, reply.target), (request.target, request.sender));
        assert_eq!(Arp::parse(&request.emit()[..41]), None);
    }
}
