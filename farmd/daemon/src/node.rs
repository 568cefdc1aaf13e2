//! The owner loop: the one thread that has the farm's state.
//!
//! It polls the heartbeat sockets, the event queue and the signals, feeds [`Farm`] and the module machines, and turns what
//! they want into datagrams, plans and [`Effect`]s. It never waits for the host, a script or a disk, and runs
//! at real-time priority where that is allowed, so that heartbeats leave on time whatever else the machine
//! does. Nothing else changes the farm's state.

mod command;
mod deaf;
mod departure;
mod heartbeats;
mod history;
mod inlet;
mod module;
mod origin;
mod orphans;
mod pace;
mod publish;
mod rate;
mod reload;
mod resets;
mod rules;
mod share;
mod sight;
mod status;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use farm_core::api::ModuleState;
use farm_core::api::history::Happening;
use farm_core::config::{ClusterConfig, ModuleConfig};
use farm_core::farm::Farm;
use farm_core::id::{Incarnation, ModuleName, NodeId};
use farm_core::module::state::ModuleEvent;
use farm_core::wire::auth::ClusterKey;
use farm_core::wire::heartbeat::BucketSet;
use farm_sys::clock::BootInstant;
use farm_sys::event_fd::EventFd;
use farm_sys::process::Signal;
use farm_sys::signal_fd::SignalFd;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{info, warn};

use crate::dataplane::{Counters, DataPlane, Lease};
use crate::effect::Effect;
use crate::event::{Event, HeldGroup, Query};
use crate::heartbeat_io::HeartbeatIo;
use crate::history::History;
use crate::host::HostVip;
use crate::journal::Journal;
use crate::shares::Shares;
use history::Chronicle;
use module::LocalModule;
use publish::Published;
use rate::Rate;
use reload::Reloading;
use share::ShareDesk;

/// Priority of the owner loop among real-time threads: above ordinary ones, below the kernel's own.
const REALTIME_PRIORITY: u8 = 20;
/// Events taken before everything else has its turn.
const EVENT_BUDGET: usize = 1024;
/// Bits of what there is to do: another thread has sent an event, or a signal has come.
const WOKEN: u64 = 1;
const SIGNALLED: u64 = 2;
/// Largest datagram: 32 modules with full maps fit in the largest UDP payload.
const DATAGRAM_MAX: usize = 65_535;
/// How long the data plane may take for a plan. It takes milliseconds, or a second where far more wants to run than the processors can; one that hangs would hold up
/// every hand-over of the farm.
const PLANE_LIMIT: Duration = Duration::from_secs(5);

/// What the loop is made of.
pub struct Parts {
    /// When the time of the loop and of its plans began.
    pub start: BootInstant,
    /// The cluster.
    pub cluster: ClusterConfig,
    /// Its key.
    pub key: ClusterKey,
    /// This node.
    pub this: NodeId,
    /// Start number.
    pub incarnation: Incarnation,
    /// Where heartbeats leave and come in.
    pub heartbeats: HeartbeatIo,
    /// Events from the edges.
    pub events: mpsc::Receiver<Event>,
    /// Rings when there are some.
    pub wake: Arc<EventFd>,
    /// What asks farmd to end.
    pub signals: SignalFd,
    /// To the executor.
    pub effects: UnboundedSender<Effect>,
    /// The packet path.
    pub plane: Arc<dyn DataPlane>,
    /// Renewed by this loop.
    pub lease: Arc<Lease>,
    /// The packet path's counters.
    pub counters: Arc<Counters>,
    /// Counters of commands of other nodes.
    pub command_counters: Arc<crate::remote::Counters>,
    /// Module logs.
    pub journal: Journal,
    /// What has happened.
    pub history: History,
    /// Modules with an active copy.
    pub modules: Vec<(ModuleName, ModuleConfig, bool)>,
    /// Modules whose application runs since before farmd was restarted in place.
    pub resumed: Vec<Resumed>,
    /// farmd has been restarted in place: no module starts by itself.
    pub reloaded: bool,
    /// Why modules were in STOP before that.
    pub rested: BTreeMap<ModuleName, String>,
    /// What was set for this node's shares.
    pub shares: Shares,
    /// Things the administrator should know.
    pub warnings: Vec<String>,
}

/// A module that goes on where the farmd before has left it.
#[derive(Debug)]
pub struct Resumed {
    /// Which.
    pub name: ModuleName,
    /// Where its VIPs are, or why not.
    pub vips: Result<Vec<HostVip>, String>,
    /// Its resources.
    pub resources: BTreeMap<String, String>,
}

/// What went wrong with datagrams from one address.
#[derive(Clone, Debug)]
struct Stranger {
    count: u64,
    last: Duration,
    logged: Option<Duration>,
    what: String,
}

/// See the module doc.
pub struct Node {
    start: BootInstant,
    cluster: ClusterConfig,
    this: NodeId,
    incarnation: Incarnation,
    farm: Farm,
    modules: BTreeMap<ModuleName, LocalModule>,
    heartbeats: HeartbeatIo,
    events: mpsc::Receiver<Event>,
    wake: Arc<EventFd>,
    signals: SignalFd,
    effects: UnboundedSender<Effect>,
    plane: Arc<dyn DataPlane>,
    lease: Arc<Lease>,
    /// How long a plan may be worked with after the last turn of this loop.
    lease_time: Duration,
    counters: Arc<Counters>,
    command_counters: Arc<crate::remote::Counters>,
    journal: Journal,
    chronicle: Chronicle,
    warnings: Vec<String>,
    realtime: bool,
    deaf: deaf::Deaf,
    orphans: orphans::Orphans,
    resets: resets::Resets,
    inlet: inlet::Inlet,
    published: Published,
    desk: ShareDesk,
    refused: BTreeMap<&'static str, u64>,
    strangers: BTreeMap<IpAddr, Stranger>,
    sent: u64,
    sent_bytes: u64,
    sent_rate: Rate,
    heartbeat_bytes: u64,
    send_failed: u64,
    received: u64,
    pauses: u64,
    pace: pace::Pace,
    last_turn: Duration,
    /// Turns of the farm that this node has drawn its own conclusions from.
    turns: u64,
    /// All nodes are together, as the executor knows it.
    whole: bool,
    /// Since when the data plane has not confirmed the newest plan.
    unconfirmed_since: Option<Duration>,
    ending: bool,
    /// Who asked for the end.
    ended_by: String,
    /// farmd is being restarted in place.
    reloading: Option<Reloading>,
    left: Option<Duration>,
}

impl Node {
    /// A node that starts now.
    pub fn new(parts: Parts) -> Self {
        let now = parts.start.elapsed();
        let farm = Farm::new(&parts.cluster, parts.key.clone(), parts.this, parts.incarnation, now);
        let lease_time = parts.cluster.detection_time() - parts.cluster.heartbeat_interval;
        let pace = pace::Pace::new(parts.cluster.heartbeat_interval);
        let mut node = Self {
            start: parts.start,
            published: Published::new(parts.this, parts.key.hash_seed()),
            cluster: parts.cluster,
            this: parts.this,
            incarnation: parts.incarnation,
            farm,
            modules: BTreeMap::new(),
            heartbeats: parts.heartbeats,
            events: parts.events,
            wake: parts.wake,
            signals: parts.signals,
            effects: parts.effects,
            plane: parts.plane,
            lease: parts.lease,
            lease_time,
            counters: parts.counters,
            command_counters: parts.command_counters,
            journal: parts.journal,
            chronicle: Chronicle::new(parts.history, now),
            warnings: parts.warnings,
            desk: ShareDesk::new(parts.shares),
            realtime: false,
            deaf: deaf::Deaf::default(),
            orphans: orphans::Orphans::default(),
            resets: resets::Resets::default(),
            inlet: inlet::Inlet::default(),
            refused: BTreeMap::new(),
            strangers: BTreeMap::new(),
            sent: 0,
            sent_bytes: 0,
            sent_rate: Rate::default(),
            heartbeat_bytes: 0,
            send_failed: 0,
            received: 0,
            pauses: 0,
            pace,
            last_turn: now,
            turns: 0,
            whole: false,
            unconfirmed_since: None,
            ending: false,
            ended_by: String::new(),
            reloading: None,
            left: None,
        };
        node.record_start(parts.reloaded);
        for (name, config, start) in parts.modules {
            node.adopt(name.clone(), config);
            if start
                && !parts.reloaded
                && let Some(module) = node.modules.get_mut(&name)
            {
                module.boot_at = Some(now + module.config.service.boot_delay);
            }
        }
        node.go_on(parts.resumed, parts.rested);
        node.resume_drains();
        node
    }

    /// Runs until the daemon is told to end and all modules have stopped.
    pub fn run(mut self) {
        match farm_sys::sched::set_realtime(REALTIME_PRIORITY) {
            Ok(()) => self.realtime = true,
            Err(error) => {
                let text = format!(
                    "no real-time priority for heartbeats ({error}): under heavy load this node may be taken for dead; grant CAP_SYS_NICE or LimitRTPRIO={REALTIME_PRIORITY}"
                );
                warn!("{text}");
                self.warnings.push(text);
            }
        }
        let mut buffer = vec![0; DATAGRAM_MAX];
        self.finish_turn();
        while self.left.is_none() {
            let (deadline, ready) = self.wait();
            self.notice_pause();
            self.pace.wake(self.last_turn, deadline);
            if ready & !(WOKEN | SIGNALLED) != 0 {
                self.receive(&mut buffer);
            }
            let woken = ready & WOKEN != 0 && self.wake.drain();
            if woken {
                self.receive_events();
            }
            let signalled = ready & SIGNALLED != 0 && self.receive_signals();
            let due = deadline.is_none_or(|at| at <= self.now());
            if woken || signalled || due || self.farm.turns() != self.turns {
                self.handle_timeouts();
                self.finish_turn();
            } else {
                // Heartbeats without news, as nearly all are.
                self.speak();
            }
        }
        self.close_history();
        let _ = match self.legacy() {
            Some(legacy) => {
                self.leave_plane();
                self.effects.send(Effect::LeaveTo(legacy))
            }
            None => {
                self.plane.apply(Arc::new(self.published.empty_plan()));
                self.effects.send(Effect::Exit)
            }
        };
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits for something to do; until when at most, if there is a limit. Also tells what there is to do, as bits: [`WOKEN`], [`SIGNALLED`], the others for heartbeats.
    fn wait(&mut self) -> (Option<Duration>, u64) {
        let mut fds = vec![self.wake.as_fd(), self.signals.as_fd()];
        fds.extend(self.heartbeats.fds());
        let machines = self
            .modules
            .values()
            .flat_map(|m| [m.machine.poll_timeout(), m.boot_at]);
        let deadline = machines
            .flatten()
            .chain(self.share_timeout())
            .chain(self.reload_timeout())
            .chain([self.farm.poll_timeout()])
            .chain(self.inlet_timeout())
            .min();
        let now = self.now();
        self.pace.sleep(now);
        let timeout = deadline.map(|at| at.saturating_sub(now));
        let ready = farm_sys::poll::wait_readable(&fds, timeout).unwrap_or_else(|error| {
            warn!(%error, "poll failed");
            std::thread::sleep(Duration::from_millis(1));
            u64::MAX
        });
        (deadline, ready)
    }

    /// After a pause longer than the lease others may own what this node had: it starts over with nothing
    /// open.
    fn notice_pause(&mut self) {
        let now = self.now();
        let gap = now.saturating_sub(self.last_turn);
        self.last_turn = now;
        if gap < self.lease_time {
            return;
        }
        self.pauses += 1;
        self.pace.excuse();
        // The data plane did not run either, and has its time anew.
        self.unconfirmed_since = self.unconfirmed_since.map(|_| now);
        let text = format!(
            "This node did not run for {} ms; it has closed everything and joins again",
            gap.as_millis()
        );
        warn!("{text}");
        self.log_to_active('E', "membership", &text);
        let for_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
        self.record(None, Happening::Paused { for_ms });
        // What waits in the sockets tells how the others were, not how they are.
        self.heartbeats.discard();
        self.farm.handle_pause(now);
        self.publish();
    }

    fn receive_events(&mut self) {
        for _ in 0..EVENT_BUDGET {
            let Ok(event) = self.events.try_recv() else { return };
            self.handle_event(event);
        }
        // There may be more; heartbeats have their turn first.
        self.wake.notify();
    }

    /// True if there were some. After the decision to leave nobody reads them any more: what comes then waits for the farmd that takes this one's place.
    fn receive_signals(&mut self) -> bool {
        let mut some = false;
        loop {
            let by = match self.signals.take() {
                Ok(Some(Signal::Int)) => "SIGINT",
                Ok(Some(_)) => "SIGTERM",
                Ok(None) => return some,
                Err(error) => {
                    warn!(%error, "signals cannot be read");
                    return some;
                }
            };
            some = true;
            self.shut_down(by);
        }
    }

    fn handle_event(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Command(command) => self.handle_command(command),
            Event::Query(query) => self.handle_query(query),
            Event::ScriptExited {
                module,
                script,
                outcome,
            } => {
                self.tell(&module, ModuleEvent::ScriptExited { script, outcome });
            }
            Event::Checked {
                module,
                resource,
                up,
                detail,
            } => {
                self.tell(&module, ModuleEvent::Checked { resource, up, detail });
            }
            Event::VipReady { module, result } => self.handle_vip_ready(&module, result),
            Event::Link { module, problem } => self.handle_link(&module, problem),
            Event::VipGone { module, problems } => {
                if let Some(local) = self.modules.get_mut(&module) {
                    local.vips.clear();
                    local.link_problem = None;
                }
                self.published.touch();
                self.tell(&module, ModuleEvent::VipGone(problems));
            }
            Event::PlanApplied { version, held } => self.handle_applied(now, version, held),
            Event::Witness {
                module,
                answers,
                detail,
            } => self.handle_witness(&module, answers, &detail),
            Event::Requester(requester) => self.farm.learn_requester(requester),
            Event::Configured {
                module,
                by,
                result,
                replies,
            } => self.handle_configured(module, &by, result, &replies),
            Event::Deconfigured {
                module,
                by,
                result,
                replies,
            } => self.handle_deconfigured(&module, &by, result, &replies),
            Event::Share(command) => self.handle_share(command),
            Event::SharesKept { job, result } => self.handle_shares_kept(job, result),
            Event::HeldReset { job, result } => self.handle_held_reset(job, result),
            Event::Reload { by, replies } => self.queue(Effect::CheckReload { by, replies }),
            Event::ReloadChecked { by, replies, result } => self.reload(by, replies, result),
            Event::Shutdown { by } => self.shut_down(&by),
            Event::ToldDeaf { by } => self.handle_told_deaf(&by),
            Event::Unknown(flows) => self.handle_unknown(flows),
            Event::PeersTold { asked, nodes, theirs } => self.handle_peers_told(asked, nodes, theirs),
        }
    }

    fn handle_applied(&mut self, now: Duration, version: u64, held: Vec<HeldGroup>) {
        // Any progress counts: under churn a newer plan is always under way.
        self.unconfirmed_since = (version < self.published.version()).then_some(now);
        let Some((farm_version, groups)) = self.published.applied(version) else {
            return;
        };
        let mut clients = BTreeMap::new();
        let held = groups.into_iter().zip(held).map(|(key, held)| {
            let buckets: BucketSet = held.buckets.iter().map(|b| usize::from(*b)).collect();
            clients.insert(key.clone(), held.clients);
            (key, (buckets, held.connections))
        });
        let held = held.collect();
        self.desk.counted(clients);
        self.farm.handle_applied(now, farm_version, held);
    }

    fn handle_query(&mut self, query: Query) {
        // Whoever asked may have gone; then nobody misses the answer.
        match query {
            Query::Status(answer) => drop(answer.send(self.status())),
            Query::Cluster(answer) => drop(answer.send(self.cluster_status())),
            Query::Metrics(answer) => drop(answer.send(self.metrics())),
            Query::History(filter, answer) => {
                let node = self.cluster.name(self.this);
                drop(answer.send(self.chronicle.history().select(node, &filter)));
            }
            Query::Sight(inquiry, answer) => drop(answer.send(self.sight(inquiry.as_ref()))),
            Query::Tracer(answer) => drop(answer.send(self.plane.tracer())),
            Query::Plan(answer) => drop(answer.send(self.published.describe())),
        }
    }

    fn handle_timeouts(&mut self) {
        let now = self.now();
        self.watch_inlet(now);
        if self.farm.poll_timeout() <= now {
            self.farm.handle_timeout(now);
        }
        if self.unconfirmed_since.is_some_and(|since| now >= since + PLANE_LIMIT) {
            // Ended, this node is taken over within the detection time; alive, it would block the others.
            let text = format!(
                "The data plane has not taken a plan for {} s; farmd ends so that the others take over ({})",
                PLANE_LIMIT.as_secs(),
                crate::standstill::describe(&["dataplane", "connections"])
            );
            tracing::error!("{text}");
            self.log_to_active('C', "farmd", &text);
            self.close_history();
            self.journal.flush(Duration::from_millis(200));
            crate::logwriter::flush(Duration::from_millis(200));
            std::process::exit(crate::start::Exit::Failed as i32);
        }
        let names: Vec<ModuleName> = self.modules.keys().cloned().collect();
        for name in names {
            let Some(module) = self.modules.get_mut(&name) else {
                continue;
            };
            if module.boot_at.is_some_and(|at| at <= now) {
                module.boot_at = None;
                self.tell(
                    &name,
                    ModuleEvent::Start {
                        by: "boot".to_owned(),
                        identity: None,
                    },
                );
            }
            let Some(module) = self.modules.get_mut(&name) else {
                continue;
            };
            if module.machine.poll_timeout().is_some_and(|at| at <= now) {
                let actions = module.machine.handle_timeout(now);
                self.carry_out(&name, actions);
            }
        }
    }

    /// Everything that follows from what the turn has changed.
    fn finish_turn(&mut self) {
        let now = self.now();
        self.watch_shares();
        self.notice_handed_over();
        self.report_modules(now);
        // First, so that none leaves by the next plan.
        self.watch_resets(now);
        let (before, _) = self.published.newest();
        self.publish();
        self.log_farm_events();
        self.settle_history();
        self.tell_the_deaf(now);
        self.watch_orphans(now, before);
        let whole = self.farm.membership().view().len() == self.cluster.nodes.len();
        if whole != self.whole {
            self.whole = whole;
            self.queue(Effect::Whole(whole));
        }
        if self.ending && self.modules.values().all(|m| m.machine.state() == ModuleState::Stop) && self.left.is_none() {
            let by = self.ended_by.clone();
            self.record(None, Happening::Stopped { by, reload: false });
            info!("all modules have stopped; leaving the farm");
            self.say_goodbye(now, false);
        }
        self.watch_reload(now);
        self.turns = self.farm.turns();
        self.speak();
    }

    fn shut_down(&mut self, by: &str) {
        let names: Vec<ModuleName> = self.modules.keys().cloned().collect();
        if self.ending {
            // Asked twice: connections get no more time.
            names.iter().for_each(|name| self.cut_stop_drain_short(name));
            return;
        }
        info!(by, "shutting down");
        self.ended_by = by.to_owned();
        self.ending = true;
        for name in names {
            if let Some(module) = self.modules.get_mut(&name) {
                module.boot_at = None;
            }
            self.stop_module(&name, by.to_owned(), None);
        }
    }
}
