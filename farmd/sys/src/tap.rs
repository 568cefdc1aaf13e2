//! A TAP device: an Ethernet interface of the host whose wire is this process.
//!
//! Owns the device, which lives as long as its handles, or on if [`TapHandle::set_persistent`] says so. The raw data plane writes accepted frames to it, and so gives them to
//! the host's own stack; what is sent on it can be read, or thrown away. It never sets addresses or flags: that is
//! [`crate::netlink`]'s.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::interface;
use crate::packet_socket::VNET_HEADER;

/// A TAP device made by this process. It disappears when its last handle is dropped, unless it is persistent.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    ifindex: u32,
}

impl Tap {
    /// Makes a TAP device called `name`, down and without an address, whose frames carry a 10-byte `virtio_net_hdr`; or takes over, as it is, one
    /// that a process has left behind ([`TapHandle::set_persistent`]).
    ///
    /// # Errors
    /// `InvalidInput` for a name that no interface may have; `NotFound` if the kernel has no TAP support or `/dev/net/tun` is not
    /// there (as in many containers); `PermissionDenied` without CAP_NET_ADMIN or without access to the device file;
    /// `ResourceBusy` or `InvalidInput` if an interface of that name exists that is another process's, or no TAP device.
    pub fn create(name: &str) -> io::Result<Self> {
        let mut request = interface::request(name)?;
        let path = "/dev/net/tun";
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let file = file.map_err(|error| {
            // The device file without its driver.
            let absent = matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO));
            let kind = if absent { io::ErrorKind::NotFound } else { error.kind() };
            io::Error::new(kind, format!("cannot open {path}: {error}"))
        })?;
        let context = |what: &str| {
            let error = io::Error::last_os_error();
            io::Error::new(error.kind(), format!("TAP device {name}: {what}: {error}"))
        };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is, with a terminated name.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if result < 0 {
            return Err(context("cannot make it"));
        }
        let header = VNET_HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
        if result < 0 {
            return Err(context("cannot set the length of the vnet header"));
        }
        let ifindex = interface::index(name)?;
        Ok(Self {
            file,
            name: name.to_owned(),
            ifindex,
        })
    }

    /// Another handle of the device: it lives until the last one is dropped.
    ///
    /// # Errors
    /// What the kernel says if there are no more descriptors.
    pub fn handle(&self) -> io::Result<TapHandle> {
        let file = self.file.try_clone()?;
        Ok(TapHandle { file })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's number.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Gives one frame to the host's stack: a 10-byte `virtio_net_hdr`, then the Ethernet frame, as
    /// [`PacketRing::recv`](crate::packet_socket::PacketRing::recv) hands them out.
    ///
    /// # Errors
    /// `InvalidInput` for a frame shorter than its headers or with a header that contradicts it; the raw error `EIO` while the
    /// device is down.
    pub fn write(&self, vnet_and_frame: &[u8]) -> io::Result<()> {
        // A TAP device takes a frame whole or not at all.
        (&self.file).write(vnet_and_frame).map(drop)
    }

    /// Hands frames that were sent on the device to `f`, at most `budget`: a 10-byte `virtio_net_hdr`, then the Ethernet frame. `buffer` is
    /// room for one. Returns how many there were. Never blocks.
    pub fn recv(&self, budget: usize, buffer: &mut [u8], mut f: impl FnMut(&mut [u8])) -> io::Result<usize> {
        let mut frames = 0;
        while frames < budget {
            match (&self.file).read(buffer) {
                Ok(0) => break,
                Ok(length) => {
                    frames += 1;
                    f(&mut buffer[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(frames)
    }

    /// Reads and throws away what the stack has sent on the device, and returns the number of frames. Never blocks.
    pub fn drain(&self) -> io::Result<usize> {
        let mut frames = 0;
        // Only the first bytes of each frame are copied: the kernel drops the rest of it.
        let mut head = [0u8; 64];
        loop {
            match (&self.file).read(&mut head) {
                Ok(0) => return Ok(frames),
                Ok(_) => frames += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(frames),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Keeps a [`Tap`]'s device, and can make it outlive this process.
#[derive(Debug)]
pub struct TapHandle {
    file: File,
}

impl TapHandle {
    /// Whether the device stays, with its addresses, when its last handle is dropped; [`Tap::create`] takes it over then.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_persistent(&self, persistent: bool) -> io::Result<()> {
        let wanted = libc::c_ulong::from(persistent);
        // SAFETY: TUNSETPERSIST takes a number and touches no memory of this process.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETPERSIST, wanted) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
