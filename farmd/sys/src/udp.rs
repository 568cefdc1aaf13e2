//! Opens the UDP sockets that heartbeats travel on.
//!
//! Owns no state; it only puts the options in one place. The membership edge calls it once per lan.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use crate::sockopt;

/// Enough for a second of heartbeats from 63 peers while this process is stopped.
const RECEIVE_BUFFER: libc::c_int = 1 << 20;

/// The highest priority that needs no privilege: the first band of the standard queue.
const PRIORITY: libc::c_int = 6;

/// Class selector 6 (RFC 2474), which networks reserve for their own control: heartbeats overtake bulk data in a switch.
const CS6: libc::c_int = 0xc0;

/// Binds a non-blocking UDP socket whose datagrams go out ahead of ordinary traffic.
///
/// The port is not shared: a second daemon on the same address must fail rather than take half of the heartbeats.
///
/// # Errors
/// `AddrInUse` or `AddrNotAvailable` with the address in the text; any other error of the socket calls.
pub fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let context = |error: io::Error| sockopt::context(&error, format_args!("UDP {addr}"));
    // `UdpSocket::bind` leaves SO_REUSEADDR off.
    let socket = UdpSocket::bind(addr).map_err(context)?;
    socket.set_nonblocking(true).map_err(context)?;
    sockopt::set_receive_buffer(&socket, RECEIVE_BUFFER).map_err(context)?;
    let (level, option) = match addr {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    };
    sockopt::set(&socket, level, option, &CS6).map_err(context)?;
    // IP_TOS resets the priority to what the class maps to, so it is set last as well.
    sockopt::set(&socket, libc::SOL_SOCKET, libc::SO_PRIORITY, &PRIORITY).map_err(context)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_and_keeps_its_kind() {
        let first = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = first.local_addr().unwrap();
        let error = bind(addr).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains(&addr.to_string()), "{error}");
    }

    #[test]
    fn a_bound_socket_never_blocks_and_delivers() {
        let receiver = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(
            receiver.recv(&mut buffer).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let sender = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        sender.send_to(b"pulse", receiver.local_addr().unwrap()).unwrap();
        assert_eq!(receiver.recv(&mut buffer).unwrap(), 5);
    }
}
