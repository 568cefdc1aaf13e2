//! Sends many frames with one system call, as fast as a processor can: the load of measurements.
//!
//! Owns an `AF_PACKET` socket that hears nothing. Frames go straight to the interface, past its queueing discipline, and over a veth pair
//! the other end's whole receive path runs before the call returns, on the same processor: what a frame costs there is the time that the
//! call takes longer. farmd itself never uses it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::{packet_socket, sockopt};

/// Most frames of one call.
pub const MAX_BURST: usize = 128;

/// Memory for frames on their way (the kernel doubles it): some 80 short ones, fewer than the queues they may have to wait in have room for.
const ON_THEIR_WAY: libc::c_int = 32 << 10;

/// The socket.
#[derive(Debug)]
pub struct PacketBurst {
    socket: OwnedFd,
}

impl PacketBurst {
    /// Opens it on interface number `ifindex` of the caller's network namespace, where it stays.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_NET_RAW; otherwise the failing step by name.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        // Protocol 0: nothing that comes in is captured.
        let socket = sockopt::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
            .map_err(|error| sockopt::context(&error, "cannot open a packet socket"))?;
        sockopt::set(&socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &1)
            .map_err(|error| sockopt::context(&error, "packet socket past the queueing discipline"))?;
        sockopt::set(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &ON_THEIR_WAY)
            .map_err(|error| sockopt::context(&error, "packet socket's send buffer"))?;
        packet_socket::bind(&socket, ifindex, 0)
            .map_err(|error| sockopt::context(&error, format_args!("interface number {ifindex}")))?;
        Ok(Self { socket })
    }

    /// Sends the first of `frames`, at most [`MAX_BURST`] of them, in order, and returns how many were sent: 0 while too many of those
    /// sent before are still on their way.
    ///
    /// # Errors
    /// What the kernel says to the first one, for instance `NetworkDown`.
    pub fn send(&self, frames: &[&[u8]]) -> io::Result<usize> {
        let mut parts = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; MAX_BURST];
        let count = frames.len().min(MAX_BURST);
        for (part, frame) in parts.iter_mut().zip(frames) {
            part.iov_base = frame.as_ptr().cast_mut().cast();
            part.iov_len = frame.len();
        }
        // SAFETY: all bytes zero is a message without name, data and control data: null pointers with lengths of 0.
        let mut messages: [libc::mmsghdr; MAX_BURST] = unsafe { std::mem::zeroed() };
        for (message, part) in messages.iter_mut().zip(&mut parts) {
            message.msg_hdr.msg_iov = std::ptr::from_mut(part);
            message.msg_hdr.msg_iovlen = 1;
        }
        let fd = self.socket.as_raw_fd();
        // SAFETY: the first `count` messages lead to one part each, and that to a frame that outlives the call and that sending only reads;
        // the kernel writes nothing but the messages' lengths.
        let sent = unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), count as libc::c_uint, libc::MSG_DONTWAIT) };
        match usize::try_from(sent) {
            Ok(sent) => Ok(sent),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(0),
                error => Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        match PacketBurst::open(u32::MAX >> 1) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => assert!(other.unwrap_err().to_string().contains("interface number"), "no error"),
        }
    }
}
