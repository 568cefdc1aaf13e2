//! Captures frames of one interface into a ring shared with the kernel, and sends frames on it.
//!
//! Owns an `AF_PACKET` socket with a `TPACKET_V2` ring: one slot per frame, so a frame is readable the moment it arrives
//! (a block-based V3 ring would add its block time-out). Each frame travels with its 10-byte `virtio_net_hdr`, because
//! veth and virtio peers hand over unfinished checksums and merged segments that only make sense with it. It never
//! interprets a frame: what to capture is the filter's business, what to do with it the data plane's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::nft::PASS_MARK;
use crate::sockopt;

/// Length in bytes of the `virtio_net_hdr` in front of every frame, in both directions and in [`crate::tap`] too.
pub const VNET_HEADER: usize = 10;

/// Most slots a ring may have: 128 MiB of locked memory.
pub const MAX_SLOTS: u32 = 65_536;

/// A full-size Ethernet frame (1514 bytes) and the kernel's 76 bytes in front of it fit; two slots fill a page.
const SLOT: usize = 2048;

/// Holds 180 bytes of a frame: every TCP segment without data over IPv4 or plain IPv6 (at most 134).
const SMALL_SLOT: usize = 256;

/// The kernel allocates block by block; slots do not straddle blocks.
const BLOCK: usize = 65_536;

/// Frames too long for a slot wait in the socket's own queue: about a hundred merged segments of 64 KiB.
const OVERSIZE_QUEUE: libc::c_int = 8 << 20;

/// The longest frame a merged segment can become, with its headers.
const OVERSIZE: usize = VNET_HEADER + 65_536 + 256;

/// Linux takes no longer classic BPF program (`BPF_MAXINSNS`).
const MAX_FILTER: usize = 4096;

/// One instruction of a classic BPF program, as in `linux/filter.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpfInsn {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when a condition holds.
    pub jt: u8,
    /// Instructions to skip when a condition does not hold.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// An `AF_PACKET` socket bound to one interface, with its receive ring.
#[derive(Debug)]
pub struct PacketRing {
    socket: OwnedFd,
    ring: Mapping,
    slots: usize,
    /// The slot that the kernel fills next, and so the next to read.
    next: usize,
    ifindex: u32,
    promiscuous: AtomicBool,
    /// Where frames that do not fit a slot are put together.
    oversize: Box<[u8]>,
    truncated: u64,
}

impl PacketRing {
    /// Captures what `filter` accepts on interface number `ifindex` into at least `slots` slots of 2 KiB (rounded up to a
    /// multiple of 32).
    ///
    /// The socket hears the interface only once it is set up completely, so no frame reaches the ring unfiltered. Frames
    /// that this host sends are not captured.
    ///
    /// # Errors
    /// `InvalidInput` for 0 or more than [`MAX_SLOTS`] slots and for an empty or overlong filter, `PermissionDenied` without
    /// CAP_NET_RAW; otherwise the failing step by name.
    pub fn open(ifindex: u32, slots: u32, filter: &[BpfInsn]) -> io::Result<Self> {
        Self::open_with(ifindex, slots, SLOT, filter)
    }

    /// Like [`Self::open`] with slots of 256 bytes (a multiple of 256 of them) for frames of at most 180 bytes: longer ones only
    /// count as [`Self::truncated`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_small(ifindex: u32, slots: u32, filter: &[BpfInsn]) -> io::Result<Self> {
        Self::open_with(ifindex, slots, SMALL_SLOT, filter)
    }

    fn open_with(ifindex: u32, slots: u32, slot: usize, filter: &[BpfInsn]) -> io::Result<Self> {
        if slots == 0 || slots > MAX_SLOTS {
            let text = format!("a packet ring of {slots} slots, expected 1 to {MAX_SLOTS}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let step = |what: &'static str| move |error: io::Error| sockopt::context(&error, what);
        // Protocol 0 keeps the socket deaf until the bind below.
        let socket =
            sockopt::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map_err(step("cannot open a packet socket"))?;
        let version = libc::tpacket_versions::TPACKET_V2 as libc::c_int;
        set_packet(&socket, libc::PACKET_VERSION, &version).map_err(step("packet ring version 2"))?;
        set_packet(&socket, libc::PACKET_VNET_HDR, &1).map_err(step("packet socket with vnet headers"))?;
        ignore_outgoing(&socket)?;
        sockopt::set(&socket, libc::SOL_SOCKET, libc::SO_MARK, &(PASS_MARK as libc::c_int))
            .map_err(step("packet socket with a mark"))?;
        if slot == SLOT {
            // Any value but 0 asks for the whole of a frame that does not fit its slot.
            set_packet(&socket, libc::PACKET_COPY_THRESH, &1).map_err(step("packet copy threshold"))?;
            sockopt::set_receive_buffer(&socket, OVERSIZE_QUEUE).map_err(step("packet socket receive buffer"))?;
        }
        attach_filter(&socket, filter)?;

        let blocks = (slots as usize * slot).div_ceil(BLOCK);
        let slots = blocks * (BLOCK / slot);
        let request = libc::tpacket_req {
            tp_block_size: BLOCK as libc::c_uint,
            tp_block_nr: blocks as libc::c_uint,
            tp_frame_size: slot as libc::c_uint,
            tp_frame_nr: slots as libc::c_uint,
        };
        sockopt::set(&socket, libc::SOL_PACKET, libc::PACKET_RX_RING, &request).map_err(step("packet ring"))?;
        let ring = Mapping::new(&socket, slots, slot).map_err(step("packet ring memory"))?;
        bind(&socket, ifindex, libc::ETH_P_ALL as u16)
            .map_err(|error| sockopt::context(&error, format_args!("interface number {ifindex}")))?;
        Ok(Self {
            socket,
            ring,
            slots,
            next: 0,
            ifindex,
            promiscuous: AtomicBool::new(false),
            oversize: vec![0; if slot == SLOT { OVERSIZE } else { 0 }].into_boxed_slice(),
            truncated: 0,
        })
    }

    /// How many slots the ring has.
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Hands each waiting frame to `f`, at most `budget` of them, and returns how many there were. Never blocks.
    ///
    /// `f` gets one slice: [`VNET_HEADER`] bytes of `virtio_net_hdr`, then the Ethernet frame, up to 64 KiB for merged segments.
    /// It may change the bytes; they are the kernel's again when it returns. An 802.1Q tag is not in the frame (Linux strips it).
    ///
    /// # Errors
    /// `NetworkDown` once each time the interface goes down or away (and once if it was down at the start); capture goes on by
    /// itself when it comes up again.
    pub fn recv(&mut self, budget: usize, mut f: impl FnMut(&mut [u8])) -> io::Result<usize> {
        self.recv_timed(budget, |_, frame| f(frame))
    }

    /// Like [`Self::recv`], with the moment each frame came in, by the system's clock.
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub fn recv_timed(&mut self, budget: usize, mut f: impl FnMut(SystemTime, &mut [u8])) -> io::Result<usize> {
        let mut seen = 0;
        let mut given = 0;
        while seen < budget {
            let Some(slot) = self.ring.ready_slot(self.next) else {
                break;
            };
            // Handled before the slot is given back: a panicking `f` leaves the slot ours.
            if slot.status & libc::TP_STATUS_COPY != 0 {
                match receive_whole(&self.socket, &mut self.oversize) {
                    Ok(Some(frame)) => {
                        f(slot.arrived, frame);
                        given += 1;
                    }
                    Ok(None) => self.truncated += 1,
                    Err(error) => {
                        // The slot's frame is still in the queue, so the slot stays for the next call.
                        return Err(error);
                    }
                }
            } else if let Some(frame) = self.ring.frame(self.next, &slot) {
                f(slot.arrived, frame);
                given += 1;
            } else {
                self.truncated += 1;
            }
            self.ring.give_back(self.next);
            self.next = (self.next + 1) % self.slots;
            seen += 1;
        }
        if seen == 0 {
            // A pending error keeps the descriptor readable until somebody asks for it.
            sockopt::take_error(&self.socket)?;
        }
        Ok(given)
    }

    /// Replaces the filter in one step: every frame is judged by the old program or the new one. Frames captured before stay.
    pub fn set_filter(&self, filter: &[BpfInsn]) -> io::Result<()> {
        attach_filter(&self.socket, filter)
    }

    /// Makes the interface take unicast frames for `mac` besides its own, for as long as this socket lives.
    pub fn add_unicast_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut request = self.membership(libc::PACKET_MR_UNICAST);
        request.mr_alen = 6;
        request.mr_address[..6].copy_from_slice(&mac);
        sockopt::set(&self.socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)
    }

    /// Makes the interface take every frame on the wire, or stops that. It ends with the socket too.
    pub fn set_promiscuous(&self, on: bool) -> io::Result<()> {
        // The kernel counts memberships; one socket holds at most one here.
        if self.promiscuous.swap(on, Ordering::Relaxed) == on {
            return Ok(());
        }
        let option = if on {
            libc::PACKET_ADD_MEMBERSHIP
        } else {
            libc::PACKET_DROP_MEMBERSHIP
        };
        let request = self.membership(libc::PACKET_MR_PROMISC);
        sockopt::set(&self.socket, libc::SOL_PACKET, option, &request).inspect_err(|_| {
            self.promiscuous.store(!on, Ordering::Relaxed);
        })
    }

    /// Sends one frame: [`VNET_HEADER`] bytes of `virtio_net_hdr` (all zero for a plain frame), then the Ethernet frame.
    ///
    /// # Errors
    /// Never blocks: `WouldBlock` when the socket's send buffer is full, the raw error `ENOBUFS` when the interface's queue is;
    /// the frame is not sent then. `InvalidInput` for a frame that is too short, or too long for the interface.
    pub fn send(&self, vnet_and_frame: &[u8]) -> io::Result<()> {
        let fd = self.socket.as_raw_fd();
        let (data, length) = (vnet_and_frame.as_ptr().cast::<libc::c_void>(), vnet_and_frame.len());
        // SAFETY: `data` is valid for `length` bytes, which the kernel only reads.
        let sent = unsafe { libc::send(fd, data, length, libc::MSG_DONTWAIT) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Frames that passed the filter, and how many of them were lost because the ring was full, since the last call.
    pub fn stats(&self) -> io::Result<(u32, u32)> {
        let mut stats = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        let (fd, target) = (self.socket.as_raw_fd(), (&raw mut stats).cast::<libc::c_void>());
        // SAFETY: `target` is valid for writes of `length` bytes, and both outlive the call.
        let result =
            unsafe { libc::getsockopt(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS, target, &raw mut length) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok((stats.tp_packets, stats.tp_drops))
        }
    }

    /// Frames dropped since the ring was opened because they fitted neither a slot nor the queue behind it.
    pub fn truncated(&self) -> u64 {
        self.truncated
    }

    fn membership(&self, kind: libc::c_int) -> libc::packet_mreq {
        libc::packet_mreq {
            // Interface numbers are positive `int`s in the kernel.
            mr_ifindex: self.ifindex as libc::c_int,
            mr_type: kind as libc::c_ushort,
            mr_alen: 0,
            mr_address: [0; 8],
        }
    }
}

impl AsFd for PacketRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What the kernel wrote at the head of a slot that it has handed over.
struct Slot {
    status: u32,
    /// Bytes of the frame in the slot, and of the frame as it arrived.
    captured: usize,
    length: usize,
    /// Where the frame begins in the slot; its vnet header lies right before.
    offset: usize,
    /// When it came in.
    arrived: SystemTime,
}

/// The ring's memory, unmapped on drop.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    length: usize,
    /// Bytes of one slot; a divisor of [`BLOCK`].
    slot: usize,
}

// SAFETY: the mapping belongs to the process and not to a thread, and `Mapping` is its only handle.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(socket: &OwnedFd, slots: usize, slot: usize) -> io::Result<Self> {
        let length = slots * slot;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = socket.as_raw_fd();
        // SAFETY: a null address lets the kernel choose a free range, so no memory in use is replaced.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("memory was mapped at address 0"))?;
        Ok(Self { base, length, slot })
    }

    /// The start of a slot. Panics past the end of the ring, so that every offset below stays inside the mapping.
    fn slot(&self, index: usize) -> NonNull<u8> {
        assert!(index < self.length / self.slot, "slot {index} is past the ring");
        // SAFETY: the offset is below `length` (checked above), which is the size of the mapping at `base`.
        unsafe { self.base.add(index * self.slot) }
    }

    /// The slot's status word, which both sides change.
    fn status(&self, index: usize) -> &AtomicU32 {
        let word = self.slot(index).cast::<u32>();
        // SAFETY: `tp_status` is the first word of the slot; slots are aligned to 256 bytes or more, mapped as long as `self` lives, and the
        // word is only accessed atomically, here and in the kernel.
        unsafe { AtomicU32::from_ptr(word.as_ptr()) }
    }

    /// The head of a slot, if the kernel has handed the slot over.
    fn ready_slot(&self, index: usize) -> Option<Slot> {
        // Acquire: the frame was written before the status was.
        let status = self.status(index).load(Ordering::Acquire);
        if status & libc::TP_STATUS_USER == 0 {
            return None;
        }
        let head = self.slot(index).cast::<libc::tpacket2_hdr>();
        // SAFETY: the slot begins with a `tpacket2_hdr`, is aligned for it, and is ours to read while its status says USER.
        let head = unsafe { head.read() };
        Some(Slot {
            status,
            captured: head.tp_snaplen as usize,
            length: head.tp_len as usize,
            offset: usize::from(head.tp_mac),
            arrived: UNIX_EPOCH + Duration::new(head.tp_sec.into(), head.tp_nsec % 1_000_000_000),
        })
    }

    /// Header and frame of a slot that [`Self::ready_slot`] answered for; `None` if the frame is not there whole.
    fn frame(&mut self, index: usize, slot: &Slot) -> Option<&mut [u8]> {
        let begin = slot.offset.checked_sub(VNET_HEADER)?;
        let head = size_of::<libc::tpacket2_hdr>();
        if slot.captured < slot.length || begin < head || slot.offset + slot.captured > self.slot {
            return None;
        }
        // SAFETY: `begin` is below the slot's length (checked above), so the pointer stays inside this slot.
        let data = unsafe { self.slot(index).add(begin) };
        // SAFETY: the range ends inside the slot (checked above), the kernel leaves the slot alone until `give_back`, and
        // `&mut self` keeps every other view of the ring away while the slice lives.
        Some(unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), VNET_HEADER + slot.captured) })
    }

    fn give_back(&mut self, index: usize) {
        // Release: whatever was done to the frame is done before the kernel reuses the slot.
        self.status(index).store(libc::TP_STATUS_KERNEL, Ordering::Release);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// `setsockopt` of a number at the packet level.
fn set_packet(socket: &OwnedFd, option: libc::c_int, value: &libc::c_int) -> io::Result<()> {
    sockopt::set(socket, libc::SOL_PACKET, option, value)
}

/// Keeps this host's own frames out. Linux knows the option since 4.20, far below what we run on.
pub(crate) fn ignore_outgoing(socket: &OwnedFd) -> io::Result<()> {
    set_packet(socket, libc::PACKET_IGNORE_OUTGOING, &1)
        .map_err(|error| sockopt::context(&error, "packet socket without own frames"))
}

pub(crate) fn attach_filter(socket: &OwnedFd, filter: &[BpfInsn]) -> io::Result<()> {
    if filter.is_empty() || filter.len() > MAX_FILTER {
        let text = format!(
            "a socket filter of {} instructions, expected 1 to {MAX_FILTER}",
            filter.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut program: Vec<libc::sock_filter> = filter
        .iter()
        .map(|&BpfInsn { code, jt, jf, k }| libc::sock_filter { code, jt, jf, k })
        .collect();
    let request = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        filter: program.as_mut_ptr(),
    };
    // `program` lives to the end of this function, past the kernel's copy.
    sockopt::set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &request)
        .map_err(|error| sockopt::context(&error, "socket filter"))
}

/// How many bytes of a frame the kernel lets through a filter, which it runs without an interface and without a VLAN tag beside the frame. For tests: no
/// capture, and no network.
///
/// # Errors
/// `InvalidInput` for a program that the kernel does not take; what it says if there is no room for a socket.
pub fn dry_run(filter: &[BpfInsn], frame: &[u8]) -> io::Result<usize> {
    let (sender, receiver) = UnixDatagram::pair()?;
    let receiver = OwnedFd::from(receiver);
    attach_filter(&receiver, filter)?;
    let receiver = UnixDatagram::from(receiver);
    receiver.set_nonblocking(true)?;
    sender.send(frame)?;
    match receiver.recv(&mut vec![0; frame.len()]) {
        // What a filter lets nothing through of is dropped.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        received => received,
    }
}

/// Ties the socket to one interface; from here on it hears `protocol` (`linux/if_ether.h`; 0 is none) there, ahead of any ingress rule.
pub(crate) fn bind(socket: &OwnedFd, ifindex: u32, protocol: u16) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::c_ushort,
        sll_protocol: protocol.to_be(),
        sll_ifindex: libc::c_int::try_from(ifindex).map_err(|_| io::ErrorKind::InvalidInput)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let (pointer, length) = (
        (&raw const address).cast::<libc::sockaddr>(),
        size_of::<libc::sockaddr_ll>(),
    );
    // SAFETY: `pointer` is valid for `length` bytes of an initialised `sockaddr_ll`, which the kernel only reads.
    let result = unsafe { libc::bind(socket.as_raw_fd(), pointer, length as libc::socklen_t) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Fetches a frame that did not fit its slot from the socket's queue, vnet header first. `None` if it is not whole there.
fn receive_whole<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<Option<&'a mut [u8]>> {
    let (data, room) = (buffer.as_mut_ptr().cast::<libc::c_void>(), buffer.len());
    // SAFETY: `data` is valid for writes of `room` bytes. MSG_TRUNC only changes the returned length.
    let received = unsafe { libc::recv(socket.as_raw_fd(), data, room, libc::MSG_DONTWAIT | libc::MSG_TRUNC) };
    match usize::try_from(received) {
        Ok(length) => Ok(buffer.get_mut(..length)),
        Err(_) => {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock {
                Ok(None)
            } else {
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_moves_between_threads() {
        fn sent<T: Send>() {}
        sent::<PacketRing>();
    }

    #[test]
    fn a_ring_without_slots_or_filter_is_refused_before_any_socket_is_opened() {
        let accept = [BpfInsn {
            code: 6,
            jt: 0,
            jf: 0,
            k: u32::MAX,
        }];
        assert_eq!(
            PacketRing::open(1, 0, &accept).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(
            PacketRing::open(1, MAX_SLOTS + 1, &accept).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
