//! Filters at the clsact queueing discipline of an interface, by rtnetlink: how a program gets to tc ingress where the kernel has no tcx links.
//!
//! Owns nothing: a filter stays when the process that has added it ends, so whoever adds one knows it again by its handle and name. Filters of others are
//! never touched, nor is a clsact that has any. Used by [`crate::bpf`].

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink_message::{Batch, Channel, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, array, attribute};

const NETLINK_ROUTE: isize = 0;
const NLM_F_EXCL: u16 = 0x200;
/// `linux/rtnetlink.h`
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// `linux/pkt_cls.h`
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
/// What the program returns is the verdict.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// `linux/pkt_sched.h`: where clsact is, its own handle, and its two sides.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
/// All protocols, as it stands on the wire.
const ETH_P_ALL: u32 = (0x0003u16).to_be() as u32;
/// Ahead of all others. Filters of one priority are asked the newest first.
const PRIORITY: u32 = 1;
/// Length of `struct tcmsg`.
const TCMSG: usize = 20;

/// Why a filter cannot be added, removed or looked for; the source says it.
#[derive(Debug)]
pub struct TcError {
    what: &'static str,
    source: io::Error,
}

impl fmt::Display for TcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.what)
    }
}

impl std::error::Error for TcError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A program at ingress.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Program {
    /// What its owner knows it by.
    pub handle: u32,
    /// The name it was added under.
    pub name: String,
    /// The kernel's number of the program.
    pub id: u32,
}

/// A connection to the kernel's traffic control, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Tc(Channel);

impl Tc {
    /// Opens it.
    ///
    /// # Errors
    /// No descriptor left, or forbidden by a sandbox.
    pub fn open() -> Result<Self, TcError> {
        let source = |source| TcError {
            what: "open netlink",
            source,
        };
        Channel::open(NETLINK_ROUTE).map(Self).map_err(source)
    }

    /// Gives the interface its clsact; false if something is in that place already.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_clsact(&mut self, ifindex: u32) -> Result<bool, TcError> {
        let result = self.request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, |body| {
            body.put(&header(ifindex, CLSACT_HANDLE, CLSACT, 0))
                .attribute_text(TCA_KIND, "clsact");
        });
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            result => told("add clsact", result.map(|()| true)),
        }
    }

    /// Removes the interface's clsact unless it has filters; true if so.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_clsact(&mut self, ifindex: u32) -> Result<bool, TcError> {
        for side in [INGRESS, EGRESS] {
            let mut filters = 0;
            self.dump(ifindex, side, |_, _| filters += 1)?;
            if filters > 0 {
                return Ok(false);
            }
        }
        let result = self.request(RTM_DELQDISC, 0, |body| {
            body.put(&header(ifindex, CLSACT_HANDLE, CLSACT, 0))
                .attribute_text(TCA_KIND, "clsact");
        });
        match result {
            Err(error) if is_absent(&error) => Ok(false),
            result => told("remove clsact", result.map(|()| true)),
        }
    }

    /// Puts a program at the ingress of an interface that has a clsact, ahead of all that are there.
    ///
    /// # Errors
    /// What the kernel says; `AlreadyExists` if the handle is taken.
    pub fn add(&mut self, ifindex: u32, handle: u32, name: &str, program: BorrowedFd<'_>) -> Result<(), TcError> {
        let result = self.put(NLM_F_EXCL, ifindex, handle, name, program);
        told("add a filter", result)
    }

    /// Puts a program in the place of the one with that handle.
    ///
    /// # Errors
    /// What the kernel says; the one that is there stays then.
    pub fn replace(&mut self, ifindex: u32, handle: u32, name: &str, program: BorrowedFd<'_>) -> Result<(), TcError> {
        let result = self.put(0, ifindex, handle, name, program);
        told("replace a filter", result)
    }

    fn put(&mut self, flags: u16, ifindex: u32, handle: u32, name: &str, program: BorrowedFd<'_>) -> io::Result<()> {
        let fd = program.as_raw_fd().cast_unsigned();
        self.request(RTM_NEWTFILTER, NLM_F_CREATE | flags, |body| {
            body.put(&header(ifindex, handle, INGRESS, PRIORITY << 16 | ETH_P_ALL))
                .attribute_text(TCA_KIND, "bpf")
                .nested(TCA_OPTIONS, |options| {
                    options
                        .attribute(TCA_BPF_FD, &fd.to_ne_bytes())
                        .attribute_text(TCA_BPF_NAME, name)
                        .attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
                });
        })
    }

    /// Takes a program off; true if it was there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&mut self, ifindex: u32, handle: u32) -> Result<bool, TcError> {
        let result = self.request(RTM_DELTFILTER, 0, |body| {
            body.put(&header(ifindex, handle, INGRESS, PRIORITY << 16 | ETH_P_ALL))
                .attribute_text(TCA_KIND, "bpf");
        });
        match result {
            Err(error) if is_absent(&error) => Ok(false),
            result => told("remove a filter", result.map(|()| true)),
        }
    }

    /// The programs at the ingress of an interface; none where it has no clsact.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn programs(&mut self, ifindex: u32) -> Result<Vec<Program>, TcError> {
        let mut found = Vec::new();
        self.dump(ifindex, INGRESS, |handle, attributes| {
            let Some(options) = attribute(attributes, TCA_OPTIONS) else {
                return;
            };
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
            let id = attribute(options, TCA_BPF_ID).and_then(|value| array(value, 0));
            if let (Some(name), Some(id)) = (attribute(options, TCA_BPF_NAME), id) {
                found.push(Program {
                    handle,
                    name: text(name),
                    id: u32::from_ne_bytes(id),
                });
            }
        })?;
        Ok(found)
    }

    /// Every filter of one side with its handle and attributes; also the heads of their lists, which have handle 0.
    fn dump(&mut self, ifindex: u32, side: u32, mut f: impl FnMut(u32, &[u8])) -> Result<(), TcError> {
        let sequence = self.0.next_sequence();
        let mut batch = Batch::default();
        batch.message(RTM_GETTFILTER, NLM_F_REQUEST | NLM_F_DUMP, sequence, |body| {
            body.put(&header(ifindex, 0, side, 0));
        });
        let result = self.0.dump(&batch, sequence, |body| {
            let handle = array(body, 8).map(u32::from_ne_bytes);
            if let (Some(handle), Some(attributes)) = (handle, body.get(TCMSG..)) {
                f(handle, attributes);
            }
        });
        match result {
            // Changed meanwhile: whoever looks again soon sees it.
            Ok(_) => Ok(()),
            Err(error) if is_absent(&error) => Ok(()),
            Err(error) => told("list filters", Err(error)),
        }
    }

    fn request(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Batch)) -> io::Result<()> {
        let sequence = self.0.next_sequence();
        let mut batch = Batch::default();
        batch.message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, sequence, fill);
        self.0.acknowledged(&batch, sequence)
    }
}

fn told<T>(what: &'static str, result: io::Result<T>) -> Result<T, TcError> {
    result.map_err(|source| TcError { what, source })
}

/// No such filter, no clsact (`EINVAL`), or no such interface.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV))
}

/// `struct tcmsg` of `linux/rtnetlink.h`.
fn header(ifindex: u32, handle: u32, parent: u32, info: u32) -> [u8; TCMSG] {
    let mut bytes = [0; TCMSG];
    for (at, word) in [(4, ifindex), (8, handle), (12, parent), (16, info)] {
        bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}
