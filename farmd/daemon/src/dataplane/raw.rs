//! The data plane: AF_PACKET ring in, TAP out, one thread; ahead of it, where the kernel lets farmd, the program of [`super::kernel`], which leaves only to this
//! thread what needs memory or a wait.
//!
//! The kernel's own receive path never sees VIP frames but those that the program has accepted (an nf_tables rule drops the
//! others after the ring has got its copy); what the decision here accepts is written to the TAP that carries the VIP, with its
//! `virtio_net_hdr`, so that unfinished checksums and merged segments stay what they are. Replies leave by
//! the kernel's ordinary route.
//!
//! A new plan takes effect between two frames: the thread judges what has come in by the old one, and goes on by the new. What that one needs to know of this
//! host's connections (its sockets, and tracked connections that stand for sockets in containers) another thread looks up: packets never wait for it, and
//! a plan that only releases buckets is put to work when it is known. What starts something in a bucket that is changing hands is kept and judged again by
//! the next plan; what is another's by then is sent on to it. The connections found are the flow table for
//! guarded and draining buckets; connections opened later in a guarded bucket are added as their first packet
//! is accepted.

mod early;
mod in_kernel;
mod in_place;
mod interface;
mod orphans;
mod plans;
mod recorded;
mod telling;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::wire::heartbeat::{BucketSet, Requester};
use farm_sys::bpf::Predecessor;
use farm_sys::clock::BootInstant;
use farm_sys::event_fd::EventFd;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::arp::Responder;
use super::connections::Connections;
use super::judge::Judge;
use super::known::Known;
use super::lister::{Listed, Lister, Lost};
use super::replay::{Recorder, Timing};
use super::trace::reader::Reader;
use super::trace::{Begun, Tracer};
use super::{Counters, DataPlane, Interface, Lease, LocalDevice, Standing};
use crate::event::{Event, EventSender, HeldGroup};
use interface::{set_filter, widen};

/// Slots of 2 kB in each interface's ring while frames are captured: 4 MB, some 30 ms at 70 000 frames a second.
pub const RING_SLOTS: u32 = 2048;
/// And until some are.
pub const IDLE_RING_SLOTS: u32 = 32;
/// How often connections in buckets that are guarded or held are counted anew.
const RECOUNT: Duration = Duration::from_secs(1);
/// Most connections remembered; past it they are counted anew, which forgets those that have ended.
const MAX_FLOWS: usize = 1 << 20;
/// Time between two log lines about a look-up that fails.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What the farmd before has left in the kernel makes way when this one knows this host's connections, some ten milliseconds after its start; at the latest then.
const FOLLOW_LIMIT: Duration = Duration::from_secs(3);

/// Share of the processors that this thread asks for: some ten times that of an ordinary one.
const NICE: i8 = -10;

enum Command {
    Plan(Arc<Plan>),
    Attach(Box<Interface>),
    Detach(u32),
    Tap(Option<LocalDevice>),
    Learn(Requester),
    AskAround,
    WatchOrphans(BootInstant),
    Flows(Vec<FlowKey>, Option<BTreeSet<FlowKey>>),
    ResetWait(Option<Duration>),
    WithdrawResets(Duration),
    Listed(Listed),
    Trace(Option<Begun>),
    Leave(BootInstant),
    CaughtUp(oneshot::Sender<()>),
    Stop,
}

/// Handle of the thread.
#[derive(Debug)]
pub struct RawPlane {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    standing: Arc<Mutex<Standing>>,
    tracer: Tracer,
    thread: Option<thread::JoinHandle<()>>,
}

impl RawPlane {
    /// Starts the thread in the network namespace of the caller. What `before` has left in the kernel is at work until this knows as much.
    pub fn start(
        plan: Arc<Plan>,
        lease: Arc<Lease>,
        counters: Arc<Counters>,
        events: EventSender,
        timing: Timing,
        before: Predecessor,
    ) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(EventFd::new()?);
        let (answers, woken) = (commands.clone(), Arc::clone(&wake));
        let lister = Lister::start(NICE, move |listed| {
            if answers.send(Command::Listed(listed)).is_ok() {
                woken.notify();
            }
        })?;
        let (listeners, woken) = (commands.clone(), Arc::clone(&wake));
        let switch = move |begun| {
            if listeners.send(Command::Trace(begun)).is_ok() {
                woken.notify();
            }
        };
        let tracer = Tracer::new(Arc::clone(&counters), Box::new(switch));
        let known = Known::new(Connections::open()?, Arc::clone(&counters));
        let (kernel, problem) = match in_place::kernel(&plan, &lease, &counters) {
            Ok(mut kernel) => {
                kernel.follow(before);
                (Some(kernel), None)
            }
            Err(error) => {
                info!(%error, "frames are captured and judged in user space");
                (None, Some(error.to_string()))
            }
        };
        let standing = Arc::new(Mutex::new(Standing {
            problem,
            ..Standing::default()
        }));
        let mut worker = Worker {
            inbox,
            wake: Arc::clone(&wake),
            events,
            lister,
            waiting: None,
            owes_report: false,
            known: true,
            lost: Vec::new(),
            responder: Responder::new(Arc::clone(&counters)),
            recorder: Recorder::new(timing, Arc::clone(&counters)),
            record_at: None,
            judge: Judge::new(plan, lease, counters, known),
            interfaces: Vec::new(),
            recount_at: None,
            found: Vec::new(),
            statistics_at: Instant::now(),
            failure_told: None,
            young: Vec::new(),
            young_until: None,
            look_up_at: None,
            believed_from: None,
            counted: false,
            follows_until: Instant::now() + FOLLOW_LIMIT,
            leaves: false,
            asking: false,
            ask_at: None,
            punts_lost: 0,
            punts_lost_told: None,
            standing: Arc::clone(&standing),
            tracer: tracer.clone(),
            reader: None,
            early: early::Earlies::new(),
            early_at: None,
        };
        worker.judge.kernel = kernel;
        let thread = thread::Builder::new()
            .name("dataplane".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            commands,
            wake,
            standing,
            tracer,
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.wake.notify();
        }
    }
}

impl DataPlane for RawPlane {
    fn apply(&self, plan: Arc<Plan>) {
        self.send(Command::Plan(plan));
    }

    fn attach(&self, interface: Interface) {
        self.send(Command::Attach(Box::new(interface)));
    }

    fn detach(&self, index: u32) {
        self.send(Command::Detach(index));
    }

    fn set_tap(&self, tap: Option<LocalDevice>) {
        self.send(Command::Tap(tap));
    }

    fn learn(&self, requester: Requester) {
        self.send(Command::Learn(requester));
    }

    fn ask_around(&self) {
        self.send(Command::AskAround);
    }

    fn watch_orphans(&self, until: BootInstant) {
        self.send(Command::WatchOrphans(until));
    }

    fn learn_flows(&self, asked: Vec<FlowKey>, theirs: Option<BTreeSet<FlowKey>>) {
        self.send(Command::Flows(asked, theirs));
    }

    fn set_reset_wait(&self, wait: Option<Duration>) {
        self.send(Command::ResetWait(wait));
    }

    fn withdraw_resets(&self, silence: Duration) {
        self.send(Command::WithdrawResets(silence));
    }

    fn leave(&self, until: BootInstant) {
        self.send(Command::Leave(until));
    }

    fn standing(&self) -> Standing {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn caught_up(&self) -> oneshot::Receiver<()> {
        let (done, told) = oneshot::channel();
        self.send(Command::CaughtUp(done));
        told
    }

    fn tracer(&self) -> Tracer {
        self.tracer.clone()
    }

    fn stop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the data-plane thread ended with a panic");
        }
    }
}

impl Drop for RawPlane {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    inbox: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    events: EventSender,
    lister: Lister,
    /// A plan that releases buckets, until this host's connections are known.
    waiting: Option<Arc<Plan>>,
    /// The plan at work is reported when they are known.
    owes_report: bool,
    /// They are: the last look-up did not fail.
    known: bool,
    /// What is half open there is to be forgotten with the next look-up.
    lost: Vec<Lost>,
    responder: Responder,
    judge: Judge,
    recorder: Recorder,
    /// When the rings of connection requests are read next.
    record_at: Option<Instant>,
    interfaces: Vec<Interface>,
    recount_at: Option<Instant>,
    /// What was last found, per group of the plan.
    found: Vec<HeldGroup>,
    statistics_at: Instant,
    /// When a failing look-up was last in the log.
    failure_told: Option<Instant>,
    /// Buckets of each group that have opened lately, and until when that counts.
    young: Vec<BucketSet>,
    young_until: Option<Instant>,
    /// When connections are looked up for the plan that waits.
    look_up_at: Option<Instant>,
    /// Of look-ups that began earlier the answer is not whole.
    believed_from: Option<Instant>,
    /// This host's connections have been looked up for a plan with addresses.
    counted: bool,
    /// How long what the farmd before has left in the kernel may be at work.
    follows_until: Instant,
    /// What is in the kernel is left to the next farmd.
    leaves: bool,
    /// Peers are being asked for connections that this host does not know.
    asking: bool,
    /// When the next question may be put.
    ask_at: Option<Instant>,
    /// Frames that the TAP had no room for, when that was last looked at.
    punts_lost: u64,
    /// When that was last in the log.
    punts_lost_told: Option<Instant>,
    standing: Arc<Mutex<Standing>>,
    tracer: Tracer,
    /// Reads what the program in the kernel tells.
    reader: Option<Reader>,
    /// What has become of XDP on each interface, and when the next step is due.
    early: early::Earlies,
    early_at: Option<Instant>,
}

impl Worker {
    fn run(&mut self) {
        // Hand-overs wait for this thread; a machine full of work must not hold them up.
        if let Err(error) = farm_sys::sched::set_nice(NICE) {
            debug!(%error, "the data-plane thread keeps its ordinary share of the processors");
        }
        loop {
            let mut fds = vec![self.wake.as_fd()];
            fds.extend(self.interfaces.iter().map(|i| i.ring.as_fd()));
            fds.extend(self.interfaces.iter().map(|i| i.neighbours.as_fd()));
            if let Some(tap) = &self.judge.tap {
                fds.push(tap.tap.as_fd());
            }
            let polled = self.interfaces.len();
            let now = Instant::now();
            let wakes = [
                self.recount_at,
                self.record_at,
                self.young_until.filter(|_| self.waiting.is_none()),
                self.look_up_at,
                self.early_at,
                self.ask_at
                    .filter(|_| !self.asking && self.judge.orphans.has_questions()),
                self.responder.next_at(),
                self.judge.next_reset_at(),
                Some(self.statistics_at),
            ];
            let timeout = wakes
                .into_iter()
                .flatten()
                .min()
                .map(|at| at.saturating_duration_since(now));
            let ready = farm_sys::poll::wait_readable(&fds, timeout).unwrap_or_else(|error| {
                warn!(%error, "poll failed");
                thread::sleep(Duration::from_millis(10));
                0
            });
            if ready & 1 != 0 {
                self.wake.drain();
                if !self.handle_commands() {
                    return;
                }
                if self.interfaces.len() != polled {
                    continue;
                }
            }
            for (i, interface) in self.interfaces.iter_mut().enumerate() {
                let responder = &mut self.responder;
                if ready & (1 << (1 + i)) != 0 {
                    self.judge.work(interface);
                }
                if ready & (1 << (1 + polled + i)) == 0 {
                    continue;
                }
                for requester in responder.handle_heard(&self.judge.plan, &self.judge.lease, interface) {
                    self.events.send(Event::Requester(requester));
                }
            }
            self.judge.work_tap(&self.interfaces);
            self.ask_for_unknown();
            self.handle_timers();
        }
    }

    fn handle_commands(&mut self) -> bool {
        let mut plan = None;
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Plan(newer) => {
                    // While a node is newly gone each plan counts: who answers what it left behind is read off the steps between.
                    if let Some(skipped) = plan.replace(newer)
                        && self.recorder.concerns(&skipped)
                    {
                        self.handle_plan(skipped);
                    }
                }
                Command::Attach(mut interface) => {
                    if !self.attach_program(&interface) {
                        widen(&self.judge.plan, &mut interface);
                    }
                    set_filter(&self.judge, &mut interface);
                    self.interfaces.push(*interface);
                    self.tell_interfaces();
                    self.record_at.get_or_insert(Instant::now());
                }
                Command::Detach(index) => {
                    for interface in self.interfaces.iter().filter(|i| i.index == index) {
                        self.judge.read_statistics(interface);
                    }
                    let gone = self
                        .interfaces
                        .iter()
                        .find(|i| i.index == index)
                        .map(|i| i.name.clone());
                    self.interfaces.retain(|i| i.index != index);
                    self.detach_program(index, gone.as_deref());
                }
                Command::Tap(tap) => {
                    if let Some(kernel) = &mut self.judge.kernel {
                        kernel.set_tap(tap.as_ref().map(|tap| (tap.tap.ifindex(), tap.mac)));
                    }
                    self.judge.tap = tap;
                    self.punts_lost = self.punts_lost_by_now();
                }
                Command::Learn(requester) => self.responder.learn(requester),
                Command::AskAround => self.responder.ask_around(&self.judge.plan, &mut self.interfaces),
                Command::WatchOrphans(until) => self.watch_orphans(until),
                Command::Flows(asked, theirs) => {
                    self.asking = false;
                    self.judge.handle_told(&asked, theirs.as_ref());
                }
                Command::ResetWait(wait) => self.judge.resets.set_wait(wait),
                Command::WithdrawResets(silence) => self.judge.withdraw_resets(silence),
                Command::Listed(listed) => self.handle_listed(listed),
                Command::Trace(begun) => self.handle_trace(begun),
                Command::Leave(until) => {
                    self.judge.lease.renew(until);
                    self.leaves = true;
                }
                Command::CaughtUp(done) => _ = done.send(()),
                Command::Stop => {
                    // First, so that what is left tells nobody.
                    self.hush();
                    self.leave_program();
                    return false;
                }
            }
        }
        if let Some(plan) = plan {
            self.handle_plan(plan);
        }
        true
    }

    fn handle_timers(&mut self) {
        let now = Instant::now();
        self.judge.expire_held(now);
        self.judge.send_due_resets(&self.interfaces);
        let due = self.recount_at.is_some_and(|at| at <= now) || self.judge.known.count() > MAX_FLOWS;
        if due && !self.lister.is_busy() {
            self.look_up();
        }
        if self.look_up_at.is_some_and(|at| at <= now) {
            self.look_up_at = None;
            self.look_up();
        }
        if self.early_at.is_some_and(|at| at <= now) {
            let plan = Arc::clone(&self.judge.plan);
            self.steer_early(&plan);
        }
        // While a plan waits openings are watched for it.
        if self.young_until.is_some_and(|at| at <= now) && self.waiting.is_none() {
            self.grow_up();
        }
        if self.statistics_at <= now {
            self.statistics_at = now + RECOUNT;
            for interface in &self.interfaces {
                self.judge.read_statistics(interface);
            }
            self.watch_program();
            self.count_lost_punts();
            self.expire_orphans();
            self.succeed();
        }
        if self.record_at.is_some_and(|at| at <= now) {
            let plan = Arc::clone(&self.judge.plan);
            self.record(&plan);
            // Clients may go on sending to a dead entry node until they have heard of the new one.
            self.replay(&BTreeSet::new());
        }
        self.responder
            .handle_timeout(now, &self.judge.plan, &mut self.interfaces);
    }
}
