//! One ICMP echo, RFC 792 and RFC 4443 section 4.1: whether an address answers.
//!
//! Blocks its caller for the time limit at most; owns nothing between calls.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::{poll, sockopt};

/// Type of an echo request, and of the reply to it.
const TYPES: [(u8, u8); 2] = [(8, 0), (128, 129)];
/// Enough for an IPv4 header with all options and our echo.
const LONGEST: usize = 128;

/// Sends an echo request to `to` and waits for the reply; the time it took.
///
/// `token` tells this request from others that are under way.
///
/// # Errors
/// `TimedOut` if nobody answers within `limit`; any other error of the socket calls, "permission denied" without `CAP_NET_RAW` for instance.
pub fn ping(to: IpAddr, token: u32, limit: Duration) -> io::Result<Duration> {
    let context = |error: io::Error| sockopt::context(&error, format_args!("ping {to}"));
    let socket = connect(to).map_err(context)?;
    let (request, reply) = TYPES[usize::from(to.is_ipv6())];
    let mut echo = [0; 8];
    echo[0] = request;
    echo[4..].copy_from_slice(&token.to_be_bytes());
    // The kernel fills in the checksum of ICMPv6 by itself.
    if to.is_ipv4() {
        let sum = checksum(&echo);
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    let start = Instant::now();
    socket.send(&echo).map_err(context)?;
    loop {
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(context(io::ErrorKind::TimedOut.into()));
        }
        poll::wait_readable(&[socket.as_fd()], Some(left)).map_err(context)?;
        let mut buffer = [0; LONGEST];
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            Err(error) => return Err(context(error)),
        };
        let packet = &buffer[..length];
        // A raw IPv4 socket delivers the IP header too.
        let header = if to.is_ipv4() {
            packet.first().map_or(0, |b| usize::from(b & 0xf) * 4)
        } else {
            0
        };
        let Some(answer) = packet.get(header..header + 8) else {
            continue;
        };
        if answer[0] == reply && answer[4..] == token.to_be_bytes() {
            return Ok(start.elapsed());
        }
    }
}

/// Internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// A raw ICMP socket that talks with `to` only. What the standard library calls a UDP socket is any that takes datagrams.
fn connect(to: IpAddr) -> io::Result<UdpSocket> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
    };
    let socket = UdpSocket::from(sockopt::socket(family, libc::SOCK_RAW, protocol)?);
    socket.connect((to, 0))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0xff]), 0x00ff);
    }
}
