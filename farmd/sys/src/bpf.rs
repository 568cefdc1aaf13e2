//! The kernel program of the service interfaces: loading, attaching, its tables, its lease and its counters.
//!
//! Owns what `bpf/farm.bpf.c` has in the kernel, which goes away with it. It writes what it is given: which frames are whose is the daemon's
//! business. Built in if there was a clang; [`Filter::load`] says what is missing otherwise.

mod attach;
mod layout;
mod link;
pub mod nothing;
pub mod trace;
mod xdp;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult};
use aya::{Ebpf, EbpfLoader};

pub use attach::{Attachment, Predecessor, remove_left_filters};
pub use layout::{
    ACCEPTED_MARK, BUCKETS, COUNTS, Control, Count, Datagram, FirstFragment, HOLDER_SETS, Holders, MAX_GROUPS,
    MAX_PAGES, MAX_VIPS, NEAR, Page, Peers, SLOTS, Vip, bucket, rule,
};

#[cfg(farm_bpf)]
static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/farm.bpf.o")));
#[cfg(not(farm_bpf))]
static OBJECT: Option<&[u8]> = None;

/// Name of the program for tc.
const PROGRAM: &str = "farm_ingress";

/// Why the kernel program cannot do something, as a sentence.
#[derive(Debug)]
pub struct BpfError {
    text: String,
    kind: Option<io::ErrorKind>,
}

impl BpfError {
    /// Says `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            kind: None,
        }
    }

    fn missing() -> Self {
        Self {
            kind: Some(io::ErrorKind::NotFound),
            ..Self::new("this farmd was built without clang, so it has no kernel program")
        }
    }

    /// True if the program is not built in.
    pub fn is_missing(&self) -> bool {
        self.kind == Some(io::ErrorKind::NotFound)
    }

    /// True if this process may not do it.
    pub fn is_denied(&self) -> bool {
        self.kind == Some(io::ErrorKind::PermissionDenied)
    }
}

impl fmt::Display for BpfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for BpfError {}

/// `what` with the whole chain of causes: aya's errors say little by themselves.
fn failed(what: &str, error: &dyn std::error::Error) -> BpfError {
    let mut failed = BpfError::new(format!("{what}: {error}"));
    let mut cause = error.source();
    while let Some(error) = cause {
        failed.text.push_str(&format!(": {error}"));
        failed.kind = error.downcast_ref::<io::Error>().map(io::Error::kind).or(failed.kind);
        cause = error.source();
    }
    failed
}

/// Until when the program accepts, in nanoseconds of [`BootInstant`](crate::clock::BootInstant). Any thread may renew it, with one store to memory.
#[derive(Clone, Debug)]
pub struct KernelLease(Arc<Shared>);

impl KernelLease {
    /// Accepts until `nanos`.
    pub fn renew(&self, nanos: u64) {
        self.0.at(layout::LEASE_AT).store(nanos, Ordering::Release);
    }
}

/// The program's counters. Any thread may read them.
#[derive(Clone)]
pub struct KernelCounters(Arc<PerCpuArray<MapData, u64>>);

impl fmt::Debug for KernelCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KernelCounters(..)")
    }
}

impl KernelCounters {
    /// All of them, summed over the processors; the first stand for the reasons of the core's decision, in its order, then come those of
    /// [`Count`], each in its place.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self) -> Result<[u64; COUNTS], BpfError> {
        let mut all = [0; COUNTS];
        for (index, sum) in (0..).zip(&mut all) {
            let each = self.0.get(&index, 0);
            let each = each.map_err(|e| failed("the counters cannot be read", &e))?;
            *sum = each.iter().sum();
        }
        Ok(all)
    }
}

/// The program's control block, shared with the kernel.
#[derive(Debug)]
struct Shared {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is valid wherever it is used from until it is dropped, and what lies in it is only accessed by atomic operations.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn map(data: &MapData) -> io::Result<Self> {
        // The kernel rounds up to a page.
        let length = layout::CONTROL_LEN;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = data.fd().as_fd().as_raw_fd();
        // SAFETY: a new mapping of a descriptor that is open; nothing that exists is overwritten.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { base, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The word at `offset`, one of those of the layout.
    fn at(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= layout::CONTROL_LEN,
            "a word of the control block"
        );
        // SAFETY: in bounds and aligned, as just checked (the mapping begins at a page); the kernel and this process only read and write
        // whole words of it.
        unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU64>() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the very mapping that was made; nobody borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Outcome of one frame in a dry run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DryRun {
    /// What the program returned, as `linux/pkt_cls.h` numbers it.
    pub code: i32,
    /// The frame as it left.
    pub frame: Vec<u8>,
    /// Time for one frame, in nanoseconds.
    pub nanos: u64,
}

/// The program in the kernel.
pub struct Filter {
    ebpf: Ebpf,
    shared: Arc<Shared>,
    /// Held open, as all tables are: programs that are loaded later refer to its descriptor.
    _control: Map,
    early: BTreeMap<u32, xdp::Early>,
    attachment: Attachment,
    places: BTreeMap<u32, attach::Place>,
    numbers: HashMap<MapData, [u8; layout::KEY_LEN], u32>,
    near: Array<MapData, [u8; layout::NEAR_LEN]>,
    vips: Array<MapData, [u8; layout::VIP_LEN]>,
    peers: Array<MapData, [u64; layout::PEERS_LEN]>,
    directories: Array<MapData, Page>,
    pages: Array<MapData, Page>,
    buckets: Array<MapData, [u16; BUCKETS]>,
    holders: Array<MapData, [u8; layout::HOLDERS_LEN]>,
    fragments: HashMap<MapData, [u8; layout::FRAGMENT_KEY_LEN], [u8; layout::FRAGMENT_LEN]>,
    counters: KernelCounters,
    /// The ring of [`trace`].
    events: OwnedFd,
    /// Name of the program that is attached.
    chosen: &'static str,
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filter")
            .field("places", &self.places)
            .finish_non_exhaustive()
    }
}

impl Filter {
    /// Loads the program; it judges nothing yet and is attached nowhere.
    ///
    /// # Errors
    /// That it is not built in, that the kernel has no BPF or too old a one, or that the process may not load it (CAP_BPF and
    /// CAP_NET_ADMIN).
    pub fn load() -> Result<Self, BpfError> {
        let object = OBJECT.ok_or_else(BpfError::missing)?;
        let mut ebpf = EbpfLoader::new()
            .load(object)
            .map_err(|e| failed("the kernel does not take the program's tables", &e))?;
        for name in [PROGRAM, trace::TELLING] {
            let program: &mut SchedClassifier = ebpf
                .program_mut(name)
                .and_then(|program| program.try_into().ok())
                .ok_or_else(|| BpfError::new(format!("there is no {name} in the object")))?;
            program
                .load()
                .map_err(|e| failed(&format!("the kernel does not take the program {name}"), &e))?;
        }
        let control = take(&mut ebpf, "CONTROL")?;
        let Map::Array(data) = &control else {
            return Err(BpfError::new("CONTROL is no array"));
        };
        let events = take(&mut ebpf, "EVENTS")?;
        let Map::RingBuf(events) = events else {
            return Err(BpfError::new("EVENTS is no ring"));
        };
        let events = events.fd().as_fd().try_clone_to_owned();
        let events = events.map_err(|e| failed("the ring of events", &e))?;
        let shared = Shared::map(data).map_err(|e| failed("the control block cannot be mapped", &e))?;
        Ok(Self {
            shared: Arc::new(shared),
            _control: control,
            early: BTreeMap::new(),
            attachment: Attachment::Tcx,
            places: BTreeMap::new(),
            numbers: typed(&mut ebpf, "VIP_NUMBERS")?,
            near: typed(&mut ebpf, "NEAR_VIPS")?,
            vips: typed(&mut ebpf, "VIPS")?,
            peers: typed(&mut ebpf, "PEERS")?,
            directories: typed(&mut ebpf, "DIRECTORIES")?,
            pages: typed(&mut ebpf, "PAGES")?,
            buckets: typed(&mut ebpf, "BUCKET_TABLES")?,
            holders: typed(&mut ebpf, "HOLDERS")?,
            fragments: typed(&mut ebpf, "FRAGMENTS")?,
            counters: KernelCounters(Arc::new(typed(&mut ebpf, "COUNTERS")?)),
            events,
            chosen: PROGRAM,
            ebpf,
        })
    }

    /// The chosen program.
    fn program(&mut self) -> Result<&mut SchedClassifier, BpfError> {
        let chosen = self.chosen;
        self.ebpf
            .program_mut(chosen)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| BpfError::new(format!("{chosen} is gone")))
    }

    /// The lease, for whoever renews it. It has ended until then.
    pub fn lease(&self) -> KernelLease {
        KernelLease(Arc::clone(&self.shared))
    }

    /// Puts plan number `epoch` in force: all of its slot must have been written. With 0 nothing is judged, and the program lets everything by.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.shared.at(layout::EPOCH_AT).store(epoch, Ordering::Release);
    }

    /// Seed of the flow hash, the TAP's interface and Ethernet address, which way accepted frames go, and whether connections may end in containers.
    pub fn set_control(&mut self, control: &Control) {
        for (offset, word) in control.words() {
            self.shared.at(offset).store(word, Ordering::Release);
        }
    }

    /// Frames for `addr` on this interface are judged as those of VIP `number`, or, with `None`, no longer.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_vip_number(&mut self, ifindex: u32, addr: IpAddr, number: Option<u32>) -> Result<(), BpfError> {
        let key = layout::vip_key(ifindex, addr);
        let result = match number {
            Some(number) => self.numbers.insert(key, number, 0),
            None => self.numbers.remove(&key),
        };
        result.map_err(|e| failed("a virtual address cannot be noted", &e))
    }

    /// Writes which of the virtual addresses in `slot`, with interface and number, are found without a hash: at most [`NEAR`]. With `is_whole` there are no
    /// others.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_near(&mut self, slot: u32, vips: &[(u32, IpAddr, u32)], is_whole: bool) -> Result<(), BpfError> {
        self.near
            .set(slot, layout::near(vips, is_whole), 0)
            .map_err(|e| failed("the virtual addresses cannot be written", &e))
    }

    /// Writes VIP `number` of plan number `epoch`, in that plan's slot.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_vip(&mut self, epoch: u64, number: u32, vip: &Vip) -> Result<(), BpfError> {
        let index = slot_of(epoch) * MAX_VIPS + number;
        self.vips
            .set(index, vip.to_bytes(epoch), 0)
            .map_err(|e| failed("a virtual address cannot be written", &e))
    }

    /// Writes the other members on the interface of VIP `number`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_peers(&mut self, slot: u32, number: u32, peers: &Peers) -> Result<(), BpfError> {
        self.peers
            .set(slot * MAX_VIPS + number, peers.to_words(), 0)
            .map_err(|e| failed("the other members cannot be written", &e))
    }

    /// Writes which page has the rules of each 256 ports, for TCP and for UDP.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_directories(&mut self, slot: u32, number: u32, tcp: &Page, udp: &Page) -> Result<(), BpfError> {
        let index = (slot * MAX_VIPS + number) * 2;
        self.directories
            .set(index, tcp, 0)
            .and_then(|()| self.directories.set(index + 1, udp, 0))
            .map_err(|e| failed("the port rules cannot be written", &e))
    }

    /// Writes one page of rules.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_page(&mut self, slot: u32, number: u32, page: &Page) -> Result<(), BpfError> {
        self.pages
            .set(slot * MAX_PAGES + number, page, 0)
            .map_err(|e| failed("the port rules cannot be written", &e))
    }

    /// Writes the buckets of one group.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_buckets(&mut self, slot: u32, group: u32, buckets: &[u16; BUCKETS]) -> Result<(), BpfError> {
        self.buckets
            .set(slot * MAX_GROUPS + group, buckets, 0)
            .map_err(|e| failed("the buckets cannot be written", &e))
    }

    /// Writes who else has connections in the buckets of one group.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_holders(&mut self, slot: u32, group: u32, holders: &Holders) -> Result<(), BpfError> {
        self.holders
            .set(slot * MAX_GROUPS + group, *holders.to_bytes(), 0)
            .map_err(|e| failed("who has connections cannot be written", &e))
    }

    /// What the first fragment of a datagram carried, if the program has seen it.
    pub fn first_fragment(&self, datagram: Datagram) -> Option<FirstFragment> {
        let first = self.fragments.get(&layout::fragment_key(datagram), 0).ok()?;
        Some(FirstFragment::from_bytes(&first))
    }

    /// The counters, for whoever reads them.
    pub fn counters(&self) -> KernelCounters {
        self.counters.clone()
    }

    /// What the program does with `frame`, come in on the loopback interface of this network namespace, without it going anywhere; `repeat` times, to
    /// measure. What would be cloned to a peer is sent on that interface.
    ///
    /// # Errors
    /// What the kernel says, also to a frame of fewer than 14 bytes.
    pub fn dry_run(&mut self, frame: &[u8], repeat: u32) -> Result<DryRun, BpfError> {
        dry_run(self.program()?, frame, repeat)
    }
}

/// [`Filter::dry_run`] of any program.
fn dry_run<P>(program: &P, frame: &[u8], repeat: u32) -> Result<DryRun, BpfError>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len().max(64) + 256];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    options.repeat = repeat;
    let result = program.test_run(options).map_err(|e| failed("a dry run", &e))?;
    out.truncate(result.data_size_out as usize);
    Ok(DryRun {
        code: result.return_value.cast_signed(),
        frame: out,
        nanos: u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX),
    })
}

/// Where plan number `epoch` lies.
pub fn slot_of(epoch: u64) -> u32 {
    (epoch % u64::from(SLOTS)) as u32
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, BpfError> {
    ebpf.take_map(name)
        .ok_or_else(|| BpfError::new(format!("there is no table {name} in the object")))
}

fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(ebpf: &mut Ebpf, name: &str) -> Result<T, BpfError> {
    T::try_from(take(ebpf, name)?).map_err(|e| failed(&format!("table {name}"), &e))
}
