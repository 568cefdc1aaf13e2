//! What the owner loop wants done, and the one task that does it.
//!
//! The owner loop never blocks on the host: it queues an [`Effect`], and the answer comes back as an
//! [`Event`]. Effects are carried out in the order they were queued, so that connections are reset before
//! their address goes away.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use farm_core::api::Reply;
use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::config::{ClusterConfig, ModuleConfig};
use farm_core::id::{ModuleName, NodeId, NodeSet};
use farm_core::wire::command::Request;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tracing::{debug, error, info, warn};

use crate::admission::Other;
use crate::checker::CheckerSet;
use crate::event::{Event, EventSender};
use crate::host::Host;
use crate::host::changes::Changes;
use crate::journal::Journal;
use crate::reload::Legacy;
use crate::remote::{self, Peers};
use crate::reset;
use crate::script::{Folders, ScriptHandle, ScriptRequest, ScriptRunner};
use crate::shares::Shares;
use crate::store;
use crate::witness::Witness;

/// Enough for a second lan, if the first does not let anything through; less than the data plane waits.
const ASK_LIMIT: Duration = Duration::from_secs(3);

/// Until an answer that was given has left the process.
const ANSWER_TIME: Duration = Duration::from_millis(20);

/// One thing to do.
#[derive(Debug)]
pub enum Effect {
    /// Run a module's script.
    RunScript {
        /// Which run.
        request: ScriptRequest,
        /// The module's configuration.
        config: Arc<ModuleConfig>,
    },
    /// End the module's running script.
    KillScript(ModuleName),
    /// Make the host carry the module's VIPs.
    SetUpVip {
        /// Whose.
        module: ModuleName,
        /// The module's configuration.
        config: Arc<ModuleConfig>,
    },
    /// Undo that.
    TearDownVip(ModuleName),
    /// Begin to probe.
    StartCheckers {
        /// Whose checkers.
        module: ModuleName,
        /// The module's configuration.
        config: Arc<ModuleConfig>,
    },
    /// End all probes of the module.
    StopCheckers(ModuleName),
    /// Ask this witness for the module, or nobody.
    WatchWitness {
        /// Whose.
        module: ModuleName,
        /// Whom.
        addr: Option<IpAddr>,
    },
    /// Whether all nodes are together: witnesses are asked often while they are not.
    Whole(bool),
    /// Whether resets of the stack go to the data plane.
    DivertResets(bool),
    /// Reset the TCP connections whose local address is one of these.
    ResetConnections {
        /// For the log.
        module: ModuleName,
        /// The VIPs.
        vips: Vec<IpAddr>,
    },
    /// Check `ETC/modules/AM` and make it the active copy.
    Configure {
        /// Which.
        module: ModuleName,
        /// What the other modules of this node have.
        others: Vec<Other>,
        /// Who asks.
        by: String,
        /// Who waits.
        replies: UnboundedSender<Reply>,
    },
    /// Remove the active copy.
    Deconfigure {
        /// Which.
        module: ModuleName,
        /// Who asks.
        by: String,
        /// Who waits.
        replies: UnboundedSender<Reply>,
    },
    /// Remember whether the module is meant to run.
    Remember {
        /// Which.
        module: ModuleName,
        /// It is.
        started: bool,
    },
    /// Keep what was set for the shares.
    KeepShares {
        /// The command that waits for it.
        job: u64,
        /// All of it.
        shares: Shares,
    },
    /// Reset the connections in buckets that are not this node's.
    ResetHeld {
        /// The drain that asks.
        job: u64,
        /// By which buckets are judged.
        plan: Arc<Plan>,
        /// Of these groups, by position in the plan.
        groups: Vec<usize>,
    },
    /// Forget connections that have ended, in buckets in which these nodes, which have died, had a say.
    ForgetEnded {
        /// By which plan.
        plan: Arc<Plan>,
        /// Who has died.
        dead: NodeSet,
    },
    /// Find out whether another farmd would start with the files there are now.
    CheckReload {
        /// Who asks.
        by: String,
        /// Who waits.
        replies: UnboundedSender<Reply>,
    },
    /// Tell this node by a command that it is heard.
    TellDeaf(NodeId),
    /// Ask these nodes which of these connections they have.
    AskPeers {
        /// For what.
        flows: Vec<FlowKey>,
        /// Whom.
        nodes: NodeSet,
    },
    /// Leave everything to the farmd that takes this one's place, and end the task.
    LeaveTo(Legacy),
    /// End the task, and with it the daemon.
    Exit,
}

/// How the task has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// With nothing left behind.
    Exit,
    /// Everything is left to the farmd that takes this one's place.
    Reload,
}

/// Carries out effects until [`Effect::Exit`] or [`Effect::LeaveTo`].
pub struct Executor {
    /// The three folders.
    pub folders: Folders,
    /// The node's name, if the command line has it.
    pub named: Option<String>,
    /// The cluster, for checking module files.
    pub cluster: ClusterConfig,
    /// The other nodes, for telling them something.
    pub peers: Arc<Peers>,
    /// Where answers go.
    pub events: EventSender,
    /// Starts scripts.
    pub runner: ScriptRunner,
    /// What is set on the host.
    pub host: Host,
    /// Module logs.
    pub journal: Journal,
}

impl Executor {
    /// See the type.
    pub async fn run(mut self, mut effects: UnboundedReceiver<Effect>) -> End {
        let mut scripts: BTreeMap<ModuleName, ScriptHandle> = BTreeMap::new();
        let mut checkers: BTreeMap<ModuleName, CheckerSet> = BTreeMap::new();
        let mut whole = false;
        let mut witnesses: BTreeMap<ModuleName, Witness> = BTreeMap::new();
        let mut changes = Changes::listen();
        loop {
            let effect = tokio::select! {
                effect = effects.recv() => effect,
                news = changes.next() => {
                    if news.tables {
                        self.host.doubt_tables();
                    }
                    for (module, problem) in self.host.check_links() {
                        self.events.send(Event::Link { module, problem });
                    }
                    continue;
                }
            };
            let Some(effect) = effect else { return End::Exit };
            match effect {
                Effect::RunScript { request, config } => self.run_script(&mut scripts, request, &config),
                Effect::KillScript(module) => {
                    if let Some(script) = scripts.get(&module) {
                        script.kill();
                    }
                }
                Effect::SetUpVip { module, config } => {
                    let result = match &config.vip {
                        Some(vip) => self.host.set_up(&module, vip).await,
                        None => Ok(Vec::new()),
                    };
                    self.events.send(Event::VipReady { module, result });
                }
                Effect::TearDownVip(module) => {
                    let problems = self.host.tear_down(&module).await;
                    self.events.send(Event::VipGone { module, problems });
                }
                Effect::StartCheckers { module, config } => {
                    let runtime = tokio::runtime::Handle::current();
                    let set = CheckerSet::start(&runtime, &module, &config.tcp_checkers, &self.events);
                    checkers.insert(module, set);
                }
                Effect::StopCheckers(module) => drop(checkers.remove(&module)),
                Effect::WatchWitness { module, addr } => {
                    // The one before ends first.
                    witnesses.remove(&module);
                    if let Some(addr) = addr {
                        let runtime = tokio::runtime::Handle::current();
                        let witness = Witness::start(&runtime, module.clone(), addr, self.events.clone());
                        witness.set_whole(whole);
                        witnesses.insert(module, witness);
                    }
                }
                Effect::Whole(now) => {
                    whole = now;
                    witnesses.values().for_each(|witness| witness.set_whole(now));
                }
                Effect::DivertResets(on) => self.host.divert_resets(on),
                Effect::ResetConnections { module, vips } => self.reset_connections(&module, vips).await,
                Effect::Configure {
                    module,
                    others,
                    by,
                    replies,
                } => {
                    let result = store::apply(
                        &self.folders.etc,
                        &self.folders.var,
                        &module,
                        Some(&self.cluster),
                        &others,
                    );
                    let result = result
                        .map(|(c, w)| (Box::new(c), w))
                        .map_err(|e| (e.code(), e.to_string()));
                    self.events.send(Event::Configured {
                        by,
                        module,
                        result,
                        replies,
                    });
                }
                Effect::Deconfigure { module, by, replies } => {
                    let result = store::deconfig(&self.folders.var, &module)
                        .map(drop)
                        .map_err(|e| e.to_string());
                    self.events.send(Event::Deconfigured {
                        by,
                        module,
                        result,
                        replies,
                    });
                }
                Effect::Remember { module, started } => {
                    if let Err(error) = store::set_started(&self.folders.var, &module, started) {
                        self.journal.write(
                            &module,
                            "farmd",
                            'E',
                            &format!("cannot remember for boot=\"auto\": {error}"),
                        );
                    }
                }
                Effect::KeepShares { job, shares } => {
                    let result = shares.save(&self.folders.var).map_err(|e| e.to_string());
                    self.events.send(Event::SharesKept { job, result });
                }
                Effect::ResetHeld { job, plan, groups } => {
                    let result = blocking(move || reset::held(&plan, &groups)).await;
                    let result = result.map_err(|e| e.to_string());
                    self.events.send(Event::HeldReset { job, result });
                }
                Effect::ForgetEnded { plan, dead } => forget_ended(plan, dead),
                Effect::CheckReload { by, replies } => {
                    let result = crate::start::check(&self.folders, self.named.as_deref()).map_err(|e| e.to_string());
                    self.events.send(Event::ReloadChecked { by, replies, result });
                }
                Effect::TellDeaf(node) => self.tell_deaf(node),
                Effect::AskPeers { flows, nodes } => self.ask_peers(flows, nodes),
                Effect::LeaveTo(legacy) => {
                    let left = legacy
                        .store(&self.folders.var)
                        .and_then(|()| self.host.leave_to_successor());
                    if let Err(error) = left {
                        error!("{error}; the next farmd may find modules that it does not know to be running");
                    }
                    // Whoever asked reads that it is on its way.
                    tokio::time::sleep(ANSWER_TIME).await;
                    return End::Reload;
                }
                Effect::Exit => return End::Exit,
            }
        }
    }

    /// Nobody waits for it: it is told again while it lasts.
    fn tell_deaf(&self, node: NodeId) {
        let peers = Arc::clone(&self.peers);
        tokio::spawn(async move {
            let request = Request {
                method: "POST".to_owned(),
                path: "/v1/deaf".to_owned(),
                by: "farmd".to_owned(),
                body: Vec::new(),
            };
            if let Err(error) = remote::client::relay(&peers, node, request).await {
                debug!(%error, "a node that does not hear this one could not be told so");
            }
        });
    }

    fn ask_peers(&self, asked: Vec<FlowKey>, nodes: NodeSet) {
        let (peers, events) = (Arc::clone(&self.peers), self.events.clone());
        tokio::spawn(async move {
            let told = tokio::time::timeout(ASK_LIMIT, remote::client::has(&peers, nodes, &asked)).await;
            let theirs = match told {
                Ok(told) => told.map_err(|error| error.to_string()),
                Err(_) => Err(format!("nothing was said for {} s", ASK_LIMIT.as_secs())),
            };
            events.send(Event::PeersTold { asked, nodes, theirs });
        });
    }

    fn run_script(
        &self,
        scripts: &mut BTreeMap<ModuleName, ScriptHandle>,
        request: ScriptRequest,
        config: &ModuleConfig,
    ) {
        let Some(user) = &config.user else {
            // The machine asks for scripts only if there is <user>; answering keeps it going if that ever
            // changes.
            let outcome = farm_core::module::state::ScriptOutcome::Missing;
            self.events.send(Event::ScriptExited {
                module: request.module,
                script: request.script,
                outcome,
            });
            return;
        };
        let (module, name) = (request.module.clone(), request.script.to_string());
        let handle = self.runner.start(request, user);
        if let Some(output) = handle.output() {
            let file = output.file_name().unwrap_or_default().to_string_lossy();
            self.journal
                .write(&module, "userplug", 'S', &format!("Script {name} > {file}"));
        }
        scripts.insert(module, handle);
    }

    /// Clients of a VIP that goes away learn so at once instead of waiting for an answer.
    async fn reset_connections(&self, module: &ModuleName, vips: Vec<IpAddr>) {
        match blocking(move || reset::all(&vips)).await {
            Ok(0) => {}
            Ok(count) => self
                .journal
                .write(module, "vip", 'I', &format!("tcpreset: {count} connections reset")),
            Err(error) => self.journal.write(
                module,
                "vip",
                'E',
                &format!(
                    "tcpreset: connections could not be reset ({error}); their clients wait for their own time-out"
                ),
            ),
        }
    }
}

/// Nobody waits for it: it has to be done before a client of the dead speaks that has come to this node before, which few have.
fn forget_ended(plan: Arc<Plan>, dead: NodeSet) {
    tokio::spawn(async move {
        match blocking(move || reset::forget_ended(&plan, dead)).await {
            Ok(0) => {}
            Ok(count) => info!(
                count,
                "connections that had ended are forgotten: their clients may be those of a node that has died"
            ),
            Err(error) => warn!(
                %error,
                "connections that have ended cannot be forgotten: a client of a dead node that has the same address and port as one of them learns a minute later that its connection is gone"
            ),
        }
    });
}

/// Runs what takes its time on a thread for such, in whose time checkers and questions go on.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other).flatten()
}
