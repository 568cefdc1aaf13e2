//! From the command line to a running daemon: read, check, lock, bind, then serve.
//!
//! Nothing on the host is touched before every file is read and every socket is bound. Each way to fail has an exit code and one message that says what to do.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use farm_core::balance::plan::Plan;
use farm_core::config::{self, Boot, ClusterConfig};
use farm_core::id::{Incarnation, NodeId};
use farm_core::wire::auth::ClusterKey;
use farm_sys::bpf::Predecessor;
use farm_sys::clock::BootInstant;
use farm_sys::event_fd::EventFd;
use farm_sys::signal_fd::SignalFd;
use farm_sys::{caps, interface, process};
use tracing::{info, warn};

use crate::admission;
use crate::dataplane::raw::RawPlane;
use crate::dataplane::replay::Timing;
use crate::dataplane::{Counters, DataPlane, Lease};
use crate::effect::{End, Executor};
use crate::event::EventSender;
use crate::heartbeat_io::{self, HeartbeatIo};
use crate::history::History;
use crate::host::{self, DeviceOwner, Host};
use crate::journal::Journal;
use crate::node::{Node, Parts, Resumed};
use crate::reload::Legacy;
use crate::remote::server::Server;
use crate::remote::{self, Peers};
use crate::script::{Folders, ScriptRunner, prepare_safe};
use crate::shares::Shares;
use crate::{control, incarnation, store};

/// Exit codes of farmd, after sysexits(3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Ended as asked.
    Ok = 0,
    /// Something else.
    Failed = 1,
    /// Wrong words on the command line.
    Usage = 64,
    /// `cluster.xml` or `cluster.key` is wrong or missing.
    Data = 65,
    /// An address or port is in use, or another farmd runs.
    Unavailable = 69,
    /// A file or folder cannot be used.
    Io = 74,
    /// Not allowed.
    Denied = 77,
}

/// Why the daemon does not start.
#[derive(Debug)]
pub struct StartError {
    /// What the process ends with.
    pub exit: Exit,
    /// What to tell.
    pub text: String,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StartError {}

fn fail(exit: Exit, text: impl Into<String>) -> StartError {
    StartError {
        exit,
        text: text.into(),
    }
}

/// What the command line says.
#[derive(Clone, Debug)]
pub struct Options {
    /// The three folders.
    pub folders: Folders,
    /// `--node`.
    pub node: Option<String>,
}

/// Runs the daemon until it is told to end, by `signals` (SIGTERM, SIGINT) or by a command.
///
/// With [`End::Reload`] another farmd is to take this process's place; a signal that comes past the decision waits for that one.
pub fn run(options: &Options, signals: SignalFd) -> Result<End, StartError> {
    let missing = caps::missing();
    if !missing.is_empty() {
        return Err(fail(
            Exit::Denied,
            format!(
                "farmd lacks {}: run it as root, or grant it in the unit (AmbientCapabilities=)",
                missing.join(" and ")
            ),
        ));
    }
    let cluster = read_cluster(&options.folders.etc)?;
    let this = find_node(&cluster, options.node.as_deref())?;
    let folders = &Folders {
        node: cluster.name(this).to_owned(),
        ..options.folders.clone()
    };
    let key = read_key(&folders.etc)?;
    fs::create_dir_all(&folders.var).map_err(|e| fail(Exit::Io, format!("{}: {e}", folders.var.display())))?;
    let _lock = lock(&folders.run)?;
    let heartbeats = bind(&cluster, this)?;
    let commands = bind_commands(&cluster, this)?;
    let socket_path = folders.run.join("farmd.sock");
    let legacy = take_over(folders)?;
    let left = Predecessor::find().unwrap_or_else(|error| {
        warn!("{error}; frames are lost until this farmd judges them");
        Predecessor::default()
    });
    // Without a legacy nobody may go on by the plan of before, and what was left of it ends here.
    let before = Some(left).filter(|_| legacy.is_some()).unwrap_or_default();
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_micros() as u64);
    let (incarnation, problems) = incarnation::next(&folders.var, clock);
    problems.iter().for_each(|problem| warn!("{problem}"));

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| fail(Exit::Failed, format!("tokio: {e}")))?;
    runtime.block_on(async {
        let control = control::bind(&socket_path)
            .map_err(|e| fail(Exit::Unavailable, format!("{}: {e}", socket_path.display())))?;
        let result = serve(
            folders,
            cluster,
            this,
            key,
            incarnation,
            (options.node.clone(), legacy, before),
            Bound {
                heartbeats,
                commands,
                control,
                signals,
            },
        )
        .await;
        if let Err(error) = fs::remove_file(&socket_path) {
            warn!(%error, "the control socket could not be removed");
        }
        result
    })
}

/// What a daemon listens to. The sockets for commands have their lan's position.
struct Bound {
    heartbeats: HeartbeatIo,
    commands: Vec<(usize, TcpListener)>,
    control: tokio::net::UnixListener,
    signals: SignalFd,
}

async fn serve(
    folders: &Folders,
    cluster: ClusterConfig,
    this: NodeId,
    key: ClusterKey,
    incarnation: Incarnation,
    before: (Option<String>, Option<Legacy>, Predecessor),
    bound: Bound,
) -> Result<End, StartError> {
    let failed = |what: &str, e: &dyn fmt::Display| fail(Exit::Failed, format!("{what}: {e}"));
    let (named, legacy, program) = before;
    let journal = Journal::start(&folders.var).map_err(|e| failed("module logs", &e))?;
    let (history, problems) = History::load(&folders.var, journal.clone());
    problems.iter().for_each(|problem| warn!("history: {problem}"));
    let wake = Arc::new(EventFd::new().map_err(|e| failed("eventfd", &e))?);
    let (events, inbox) = EventSender::channel(Arc::clone(&wake));
    let (lease, counters) = (Arc::new(Lease::new()), Arc::new(Counters::default()));
    let start = BootInstant::now();
    let timing = Timing {
        start,
        pulse: cluster.heartbeat_interval,
        detection: cluster.detection_time(),
    };
    let plan = Plan {
        version: 0,
        this,
        seed: key.hash_seed(),
        vips: Vec::new(),
        groups: Vec::new(),
        gone: std::collections::BTreeMap::new(),
    };
    let plane = RawPlane::start(
        Arc::new(plan),
        Arc::clone(&lease),
        Arc::clone(&counters),
        events.clone(),
        timing,
        program,
    )
    .map_err(|e| failed("data plane", &e))?;
    let plane: Arc<dyn DataPlane> = Arc::new(plane);

    let farm = std::env::current_exe()
        .map_err(|e| failed("own path", &e))?
        .with_file_name("farm");
    let mut warnings = Vec::new();
    if !farm.is_file() {
        warnings.push(format!(
            "{} is not there: module scripts cannot call $SAFE/safekit",
            farm.display()
        ));
    }
    // Where the kernel lets a foreign address be bound (`ip_nonlocal_bind`).
    let here = own_addrs();
    let foreign = heartbeat_io::foreign(&cluster, this, &here);
    warnings.extend(
        foreign.map(|(lan, addr)| format!("{addr} is no address of this host: no heartbeat leaves on lan {lan}")),
    );
    prepare_safe(folders, &farm).map_err(|e| fail(Exit::Io, e.to_string()))?;
    let modules = load_modules(folders, &cluster, &journal, &mut warnings)?;
    warnings.iter().for_each(|warning| warn!("{warning}"));

    let shares = Shares::load(&folders.var).unwrap_or_else(|error| {
        let text = format!("{error}; drained groups and weights set at run time are as configured");
        warn!("{text}");
        warnings.push(text);
        Shares::default()
    });

    let runtime = tokio::runtime::Handle::current();
    let mut host = Host::new(folders.var.clone(), Arc::clone(&plane))
        .await
        .map_err(|e| failed("netlink", &e))?;
    let reloaded = legacy.is_some();
    let rested = legacy.as_ref().map(|l| l.rested.clone()).unwrap_or_default();
    let resumed = resume(legacy, &modules, &mut host).await;
    let (effects, to_do) = tokio::sync::mpsc::unbounded_channel();
    let peers = Arc::new(Peers::new(cluster.clone(), key.clone(), this));
    let executor = Executor {
        folders: folders.clone(),
        named,
        cluster: cluster.clone(),
        peers: Arc::clone(&peers),
        events: events.clone(),
        runner: ScriptRunner::new(runtime, folders.clone(), events.clone()),
        host,
        journal: journal.clone(),
    };
    info!(
        node = cluster.name(this),
        nodes = cluster.nodes.len(),
        port = cluster.port,
        digest = format!("{:016x}", cluster.digest),
        "farmd starts"
    );
    // Reading, checking and loading the kernel program takes memory that nothing needs afterwards.
    farm_sys::sched::trim_heap();
    if let Err(error) = farm_sys::sched::lock_memory() {
        let text = format!(
            "memory may be swapped out ({error}): where it is short this node may be taken for dead; grant CAP_IPC_LOCK or LimitMEMLOCK=infinity"
        );
        warn!("{text}");
        warnings.push(text);
    }
    let command_counters = Arc::new(remote::Counters::default());
    let node = Node::new(Parts {
        start,
        cluster,
        key,
        this,
        incarnation,
        heartbeats: bound.heartbeats,
        events: inbox,
        wake,
        signals: bound.signals,
        effects,
        plane: Arc::clone(&plane),
        lease,
        counters,
        command_counters: Arc::clone(&command_counters),
        journal: journal.clone(),
        history,
        modules,
        resumed,
        reloaded,
        rested,
        shares,
        warnings,
    });
    let owner = std::thread::Builder::new()
        .name("owner".to_owned())
        .spawn(move || node.run())
        .map_err(|e| failed("owner thread", &e))?;

    let mut tasks = vec![tokio::spawn(control::serve(
        bound.control,
        events.clone(),
        Arc::clone(&peers),
    ))];
    let server = Arc::new(Server::new(peers, events.clone(), command_counters));
    for (lan, listener) in bound.commands {
        let listener =
            tokio::net::TcpListener::from_std(listener).map_err(|e| failed("commands of other nodes", &e))?;
        tasks.push(tokio::spawn(remote::server::serve(listener, lan, Arc::clone(&server))));
    }
    let end = executor.run(to_do).await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    if owner.join().is_err() {
        return Err(fail(Exit::Failed, "the owner thread ended with a panic"));
    }
    drop(plane);
    journal.flush(Duration::from_secs(2));
    info!("farmd has ended");
    Ok(end)
}

/// Whether a farmd could start with these files and words as the node of this one, `named` on the command line or not.
///
/// # Errors
/// What it would end with.
pub fn check(folders: &Folders, named: Option<&str>) -> Result<(), StartError> {
    let cluster = read_cluster(&folders.etc)?;
    let this = find_node(&cluster, named)?;
    let name = cluster.name(this);
    if name != folders.node {
        let text = format!(
            "by its addresses in cluster.xml this host would be {name}, and is {}",
            folders.node
        );
        return Err(fail(Exit::Data, text));
    }
    if let Some((lan, addr)) = heartbeat_io::foreign(&cluster, this, &own_addrs()).next() {
        let text = format!("{addr} of node {name} (lan {lan}) is not an address of this host");
        return Err(fail(Exit::Unavailable, text));
    }
    read_key(&folders.etc).map(drop)
}

/// Undoes what an earlier run has left, or takes it over if it was left for this one.
fn take_over(folders: &Folders) -> Result<Option<Legacy>, StartError> {
    let legacy = Legacy::take(&folders.var).unwrap_or_else(|error| {
        warn!("{error}; modules are started as at a boot");
        None
    });
    let configured =
        |name: &farm_core::id::ModuleName| store::load_active(&folders.var, name, None).is_ok_and(|c| c.is_some());
    match host::device_owner() {
        DeviceOwner::InUse => {
            return Err(fail(
                Exit::Unavailable,
                format!(
                    "{} is there: another farmd carries virtual addresses in this network namespace",
                    host::DEVICE
                ),
            ));
        }
        DeviceOwner::Left if legacy.as_ref().is_some_and(|l| l.modules.keys().all(configured)) => return Ok(legacy),
        DeviceOwner::Left => match host::remove_left_device() {
            Ok(()) => info!("left over from an earlier run: {} removed", host::DEVICE),
            Err(error) => warn!(
                "left over from an earlier run and not undone: {}: {error}",
                host::DEVICE
            ),
        },
        DeviceOwner::Absent => {}
    }
    let (done, problems) = host::clean_up(&folders.var);
    done.iter()
        .for_each(|step| info!("left over from an earlier run: {step}"));
    problems
        .iter()
        .for_each(|problem| warn!("left over from an earlier run and not undone: {problem}"));
    Ok(legacy)
}

/// Makes the host carry the VIPs of modules whose application goes on.
async fn resume(
    legacy: Option<Legacy>,
    modules: &[(farm_core::id::ModuleName, config::ModuleConfig, bool)],
    host: &mut Host,
) -> Vec<Resumed> {
    let mut resumed = Vec::new();
    let mut left = legacy.map(|legacy| legacy.modules).unwrap_or_default();
    for (name, config, _) in modules {
        let Some(resources) = left.remove(name) else { continue };
        let vips = match &config.vip {
            Some(vip) => host.set_up(name, vip).await,
            None => Ok(Vec::new()),
        };
        let name = name.clone();
        resumed.push(Resumed { name, vips, resources });
    }
    for name in left.keys() {
        warn!(module = %name, "its application runs since before farmd was restarted, and it is not configured any more");
    }
    resumed
}

/// Takes `RUN/farmd.lock`, which whoever changes the host for these folders holds: one daemon, or one clean-up.
///
/// # Errors
/// [`Exit::Unavailable`] if another process holds it, [`Exit::Io`] if it cannot be made.
pub fn lock(run: &Path) -> Result<File, StartError> {
    fs::create_dir_all(run).map_err(|e| fail(Exit::Io, format!("{}: {e}", run.display())))?;
    let path = run.join("farmd.lock");
    let lock = process::lock_file(&path).map_err(|e| fail(Exit::Io, e.to_string()))?;
    lock.ok_or_else(|| {
        fail(
            Exit::Unavailable,
            format!(
                "a farmd is running with {} (it holds farmd.lock); stop it first",
                run.display()
            ),
        )
    })
}

/// Reads and checks `ETC/cluster.xml`; warnings go to the log.
fn read_cluster(etc: &Path) -> Result<ClusterConfig, StartError> {
    let path = etc.join("cluster.xml");
    let text = fs::read_to_string(&path).map_err(|e| {
        let hint = if e.kind() == io::ErrorKind::NotFound {
            "; it lists the nodes, see cluster.xml(5)"
        } else {
            ""
        };
        fail(Exit::Data, format!("{}: {e}{hint}", path.display()))
    })?;
    match config::cluster::parse(&path.to_string_lossy(), &text) {
        Ok((cluster, warnings)) => {
            warnings.iter().for_each(|w| warn!("{w}"));
            Ok(cluster)
        }
        Err(errors) => {
            let rendered: Vec<String> = errors.iter().map(|d| d.render(&text)).collect();
            Err(fail(Exit::Data, rendered.join("\n")))
        }
    }
}

fn find_node(cluster: &ClusterConfig, name: Option<&str>) -> Result<NodeId, StartError> {
    let known = cluster.nodes.join(", ");
    if let Some(name) = name {
        return cluster.node_by_name(name).ok_or_else(|| {
            fail(
                Exit::Data,
                format!("node {name} is not in cluster.xml, which has {known}"),
            )
        });
    }
    cluster.node_by_addr(&own_addrs()).ok_or_else(|| {
        fail(
            Exit::Data,
            format!("no address of this host is in cluster.xml, which has {known}; or name the node: --node NAME"),
        )
    })
}

/// The addresses of this host.
fn own_addrs() -> Vec<IpAddr> {
    let all = interface::interfaces().into_iter().flat_map(|i| i.addrs);
    all.map(|(addr, _)| addr).collect()
}

fn read_key(etc: &Path) -> Result<ClusterKey, StartError> {
    let path: PathBuf = etc.join("cluster.key");
    let text = fs::read_to_string(&path).map_err(|e| {
        let hint = if e.kind() == io::ErrorKind::NotFound {
            "; make it on one node with `farm cluster genkey` and copy it to the others"
        } else {
            ""
        };
        fail(Exit::Data, format!("{}: {e}{hint}", path.display()))
    })?;
    use std::os::unix::fs::PermissionsExt as _;
    let mode = fs::metadata(&path).map(|m| m.permissions().mode()).unwrap_or(0);
    if mode & 0o077 != 0 {
        warn!(
            "{} is open to others (mode {:o}); make it 600",
            path.display(),
            mode & 0o777
        );
    }
    ClusterKey::from_hex(&text).map_err(|e| fail(Exit::Data, format!("{}: {e}", path.display())))
}

/// The heartbeat sockets.
fn bind(cluster: &ClusterConfig, this: NodeId) -> Result<HeartbeatIo, StartError> {
    HeartbeatIo::open(cluster, this).map_err(|e| not_bound(cluster, this, "UDP", &e.lan, e.addr, &e.error))
}

/// The sockets for commands of other nodes, at the same addresses.
fn bind_commands(cluster: &ClusterConfig, this: NodeId) -> Result<Vec<(usize, TcpListener)>, StartError> {
    let mut listeners = Vec::new();
    for (i, lan) in cluster.lans.iter().enumerate() {
        let Some((_, addr)) = lan.nodes.iter().find(|(node, _)| *node == this) else {
            continue;
        };
        let local = SocketAddr::new(*addr, cluster.port);
        let listener = TcpListener::bind(local).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        listeners.push((
            i,
            listener.map_err(|e| not_bound(cluster, this, "TCP", &lan.name, local, &e))?,
        ));
    }
    Ok(listeners)
}

/// What to say of an address that could not be used.
fn not_bound(
    cluster: &ClusterConfig,
    this: NodeId,
    protocol: &str,
    lan: &str,
    local: SocketAddr,
    error: &io::Error,
) -> StartError {
    let text = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "{protocol} port {local} (lan {lan}) is in use: another farmd, or another program; `ss -tulpn` shows which"
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "{} of node {} (lan {lan}) is not an address of this host",
            local.ip(),
            cluster.name(this),
        ),
        _ => format!("{protocol} port {local} (lan {lan}): {error}"),
    };
    fail(Exit::Unavailable, text)
}

/// Loads the active copies; one that no longer fits is left out with a warning, the others are served.
fn load_modules(
    folders: &Folders,
    cluster: &ClusterConfig,
    journal: &Journal,
    warnings: &mut Vec<String>,
) -> Result<Vec<(farm_core::id::ModuleName, config::ModuleConfig, bool)>, StartError> {
    let entries = store::list(&folders.etc, &folders.var).map_err(|e| fail(Exit::Io, e.to_string()))?;
    let mut modules = Vec::new();
    let mut others = Vec::new();
    for entry in entries.into_iter().filter(|e| e.configured) {
        match store::load_active(&folders.var, &entry.name, Some(cluster)) {
            Ok(Some(config)) => {
                if let Err(why) = admission::admit(&config, &others) {
                    let text = format!("module {} is not loaded: {why}", entry.name);
                    journal.write(&entry.name, "farmd", 'E', &text);
                    warnings.push(text);
                    continue;
                }
                others.push(admission::Other::new(entry.name.clone(), &config));
                let start = match config.service.boot {
                    Boot::On => true,
                    Boot::Off => false,
                    Boot::Auto => store::was_started(&folders.var, &entry.name),
                };
                modules.push((entry.name, config, start));
            }
            Ok(None) => {}
            Err(error) => {
                let text = format!("module {} is not loaded: {error}", entry.name);
                journal.write(&entry.name, "farmd", 'E', &text);
                warnings.push(text);
            }
        }
    }
    Ok(modules)
}
