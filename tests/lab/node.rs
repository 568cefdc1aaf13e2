//! One farm node: a machine made of namespaces, with its three folders, its farmd and its command line.
//!
//! A node has a network namespace, which lasts as long as the lab, and while it is powered a process namespace
//! whose first process reaps orphans. Killing that first process ends farmd, nginx and all scripts at once, as a power cut
//! does; killing farmd alone leaves the applications running. Never decides what is a failure: tests do.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farm_core::api::FarmStatus;
use farm_sys::netlink::Netlink;

use crate::control;
use crate::module::{ModuleText, copy_module, nginx_conf, repository, write_file};
use crate::process::{
    Finished, children_of, run_limited, signal, spawn_kept, wait_limited, wait_until, with_parent_death,
};
use crate::space::Space;

/// The link that joins a node to the switch, inside the node.
pub const NODE_LINK: &str = "eth0";

/// How long a call of the command line may take before it is ended.
pub const CLI_LIMIT: Duration = Duration::from_secs(60);

/// The three folders of a farmd.
#[derive(Clone, Debug)]
pub struct Dirs {
    /// Everything of this node.
    pub base: PathBuf,
    /// `FARM_ETC`.
    pub etc: PathBuf,
    /// `FARM_VAR`.
    pub var: PathBuf,
    /// `FARM_RUN`.
    pub run: PathBuf,
}

impl Dirs {
    fn create(base: PathBuf) -> Result<Self> {
        let dirs = Self {
            etc: base.join("etc"),
            var: base.join("var"),
            run: base.join("run"),
            base,
        };
        for dir in [&dirs.etc, &dirs.var, &dirs.run] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(dirs)
    }
}

/// The process namespace of a powered node.
#[derive(Debug)]
struct Machine {
    /// unshare(1), which waits outside.
    outer: Child,
    /// First process inside, by its number out here.
    init: u32,
}

#[derive(Debug)]
struct Daemon {
    /// nsenter(1), which waits outside.
    outer: Child,
    /// farmd, by its number out here.
    pid: u32,
}

#[derive(Debug, Default)]
struct Processes {
    machine: Option<Machine>,
    /// A process namespace that was killed and is not yet known to have ended.
    ending: Option<Machine>,
    daemon: Option<Daemon>,
}

/// One farm node.
#[derive(Debug)]
pub struct Node {
    name: String,
    addr: Ipv4Addr,
    port: String,
    space: Space,
    switch: Arc<Space>,
    dirs: Dirs,
    bin: PathBuf,
    attach: &'static str,
    processes: Mutex<Processes>,
}

impl Node {
    pub(crate) fn create(
        name: String,
        addr: Ipv4Addr,
        port: String,
        space: Space,
        switch: Arc<Space>,
        base: &Path,
        (bin, attach): (PathBuf, &'static str),
    ) -> Result<Self> {
        let dirs = Dirs::create(base.join(&name))?;
        let node = Self {
            name,
            addr,
            port,
            space,
            switch,
            dirs,
            bin,
            attach,
            processes: Mutex::default(),
        };
        node.power_on()?;
        Ok(node)
    }

    /// Its name in `cluster.xml`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own address on the LAN.
    pub fn addr(&self) -> Ipv4Addr {
        self.addr
    }

    /// Its network namespace.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Its folders.
    pub fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    /// Hardware address of its link.
    pub fn mac(&self) -> Result<String> {
        self.space.mac(NODE_LINK)
    }

    /// Number of the farmd process, while it runs.
    pub fn farmd_pid(&self) -> Option<u32> {
        let mut processes = self.processes();
        let daemon = processes.daemon.as_mut()?;
        matches!(daemon.outer.try_wait(), Ok(None)).then_some(daemon.pid)
    }

    /// Number of the node's first process, while it has power: `nsenter --target PID --net --pid --mount` leads into the node.
    pub fn init_pid(&self) -> Option<u32> {
        let mut processes = self.processes();
        let machine = processes.machine.as_mut()?;
        matches!(machine.outer.try_wait(), Ok(None)).then_some(machine.init)
    }

    /// Gives the node its process namespace; nothing if it has one. The link comes up too.
    pub fn power_on(&self) -> Result<()> {
        let mut processes = self.processes();
        self.wait_ended(&mut processes)?;
        if processes.machine.is_none() {
            processes.machine = Some(self.machine()?);
        }
        drop(processes);
        self.set_link(true)
    }

    /// Cuts the power: the link drops, then every process of the node ends without a word.
    pub fn power_off(&self) -> Result<()> {
        self.set_link(false)?;
        self.end_processes()
    }

    /// Cuts the power and says since when the node is silent: the link drops, then every process ends without a word.
    ///
    /// Returns before the kernel has taken down what they leave; [`Self::power_on`] waits for that.
    pub fn crash(&self) -> Result<Instant> {
        let at = self.switch.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let netlink = Netlink::open().await?;
                let index = netlink.link_index(&self.port).await?;
                let at = Instant::now();
                netlink.link_down(index).await?;
                Ok::<_, anyhow::Error>(at)
            })
        });
        let at = at.with_context(|| format!("cannot drop the link of {}", self.name))?;
        self.kill_processes()?;
        Ok(at)
    }

    /// The switch port of the node.
    pub fn port(&self) -> &str {
        &self.port
    }

    /// What the daemon answers to `GET path`, without the command line in between.
    pub fn ask<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        control::get(&self.dirs.run, path)
    }

    fn end_processes(&self) -> Result<()> {
        self.kill_processes()?;
        self.wait_ended(&mut self.processes())
    }

    fn kill_processes(&self) -> Result<()> {
        let mut processes = self.processes();
        self.wait_ended(&mut processes)?;
        if let Some(machine) = processes.machine.take() {
            signal(machine.init, "KILL")?;
            processes.ending = Some(machine);
        }
        // The namespace ends only when nsenter has let go of farmd, which it does not while it is stopped.
        if let Some(mut daemon) = processes.daemon.take() {
            let _ = daemon.outer.kill();
            let _ = daemon.outer.wait();
        }
        Ok(())
    }

    fn wait_ended(&self, processes: &mut Processes) -> Result<()> {
        if let Some(mut machine) = processes.ending.take() {
            wait_limited(&mut machine.outer, Duration::from_secs(10))?
                .with_context(|| format!("the processes of {} do not end", self.name))?;
        }
        Ok(())
    }

    fn machine(&self) -> Result<Machine> {
        let mut command = with_parent_death("unshare");
        // The first process reaps what others leave behind, and sysfs must show this network namespace.
        let init = "mount -t sysfs sysfs /sys 2>/dev/null; echo ready; while :; do sleep 3600 & wait $!; done";
        command
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child=KILL",
                "--mount-proc",
                "sh",
                "-c",
                init,
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        self.space.enter(&mut command);
        let mut outer = spawn_kept(command).context("cannot start setpriv and unshare (package util-linux)")?;
        let mut line = String::new();
        if let Some(stdout) = outer.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line.trim() != "ready" {
            let output = outer.wait_with_output()?;
            bail!(
                "cannot make the process namespace of {}: {}",
                self.name,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let init = *children_of(outer.id())
            .first()
            .context("the process namespace ended at once")?;
        Ok(Machine { outer, init })
    }

    /// Starts farmd; its output goes to `farmd.log`. Does not wait until it answers: see [`Self::wait_farmd`].
    pub fn start_farmd(&self) -> Result<()> {
        self.start_farmd_under(&[])
    }

    /// As [`Self::start_farmd`], by the words of `wrapper`: a program that becomes the one named behind it, as setpriv(1) and prlimit(1) do.
    pub fn start_farmd_under(&self, wrapper: &[&str]) -> Result<()> {
        let mut processes = self.processes();
        if let Some(daemon) = processes.daemon.as_mut()
            && daemon.outer.try_wait()?.is_none()
        {
            bail!("farmd of {} runs already", self.name);
        }
        let log = self.log_file()?;
        let farmd = self.bin.join("farmd");
        let mut command = match wrapper {
            [] => self.inside(&processes, &farmd)?,
            [program, words @ ..] => {
                let mut command = self.inside(&processes, Path::new(program))?;
                command.args(words).arg(&farmd);
                command
            }
        };
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        let mut outer = spawn_kept(command).with_context(|| format!("cannot start farmd of {}", self.name))?;
        let nsenter = outer.id();
        // nsenter forks to enter the process namespace: farmd is its only child.
        let pid = wait_until(Duration::from_secs(5), "farmd's process", || match outer.try_wait() {
            Ok(Some(_)) => Some(None),
            _ => children_of(nsenter).first().copied().map(Some),
        })?;
        let Some(pid) = pid else {
            bail!("farmd of {} ended at once:\n{}", self.name, self.log_tail(20));
        };
        processes.daemon = Some(Daemon { outer, pid });
        Ok(())
    }

    /// Waits until farmd answers on its control socket.
    pub fn wait_farmd(&self, limit: Duration) -> Result<()> {
        wait_until(limit, &format!("farmd of {} to answer", self.name), || {
            self.status().ok().map(|_| ())
        })
    }

    /// Sends a signal to farmd alone: `KILL`, `TERM`, `STOP`, `CONT`…
    pub fn signal_farmd(&self, name: &str) -> Result<()> {
        let processes = self.processes();
        let daemon = processes
            .daemon
            .as_ref()
            .with_context(|| format!("farmd of {} was not started", self.name))?;
        signal(daemon.pid, name)?;
        if name == "CONT" || name == "KILL" {
            // nsenter stops itself when its child is stopped, and must run to see its end.
            signal(daemon.outer.id(), name)?;
        }
        Ok(())
    }

    /// Waits until farmd has ended by itself or by a signal; its exit code if it has one.
    pub fn wait_farmd_end(&self, limit: Duration) -> Result<Option<i32>> {
        let mut processes = self.processes();
        let daemon = processes
            .daemon
            .as_mut()
            .with_context(|| format!("farmd of {} was not started", self.name))?;
        let status = wait_limited(&mut daemon.outer, limit)?
            .with_context(|| format!("farmd of {} did not end within {limit:?}", self.name))?;
        processes.daemon = None;
        Ok(status.code())
    }

    /// Ends farmd with SIGTERM and waits for it; its exit code.
    pub fn stop_farmd(&self) -> Result<Option<i32>> {
        self.signal_farmd("TERM")?;
        self.wait_farmd_end(Duration::from_secs(60))
    }

    /// Runs the command line on this node: `node.farm(&["status", "--json"])`. Any exit code is returned, not an error.
    pub fn farm(&self, args: &[&str]) -> Result<Finished> {
        let mut command = self.inside(&self.processes(), &self.bin.join("farm"))?;
        command.args(args);
        run_limited(command, CLI_LIMIT)
    }

    /// Runs the command line and insists on exit code 0; returns its standard output.
    pub fn farm_ok(&self, args: &[&str]) -> Result<String> {
        let finished = self.farm(args)?;
        if !finished.ok() {
            bail!(
                "`farm {}` on {} {}\n{}{}",
                args.join(" "),
                self.name,
                finished
                    .code
                    .map_or("ran into its time limit".to_owned(), |code| format!(
                        "ended with {code}"
                    )),
                finished.stdout,
                finished.stderr
            );
        }
        Ok(finished.stdout)
    }

    /// The whole farm as this node sees it.
    pub fn status(&self) -> Result<FarmStatus> {
        self.ask("/v1/status")
            .with_context(|| format!("the status of {}", self.name))
    }

    /// A command that runs on this node: in its network and process namespaces, with the FARM_* variables set.
    pub fn command(&self, program: &Path) -> Result<Command> {
        self.inside(&self.processes(), program)
    }

    fn inside(&self, processes: &Processes, program: &Path) -> Result<Command> {
        let machine = processes
            .machine
            .as_ref()
            .with_context(|| format!("{} has no power", self.name))?;
        let mut command = self.space.command("nsenter");
        command
            .args(["--target", &machine.init.to_string(), "--pid", "--mount", "--"])
            .arg(program);
        command
            .env("FARM_ETC", &self.dirs.etc)
            .env("FARM_VAR", &self.dirs.var)
            .env("FARM_RUN", &self.dirs.run)
            .env("FARM_NODE", &self.name)
            .env_remove("FARM_MODULE")
            .env_remove("SAFEMODULE");
        if !self.attach.is_empty() {
            command.env("FARM_ATTACH", self.attach);
        }
        Ok(command)
    }

    /// Starts a program on this node and leaves it running; its output goes to the node's `log`. It ends with the node's power.
    pub fn spawn(&self, program: &Path, args: &[&str]) -> Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dirs.base.join("log"))?;
        let mut command = self.command(program)?;
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        spawn_kept(command).with_context(|| format!("cannot start {} on {}", program.display(), self.name))
    }

    /// The environment with which a person can use the command line on this node.
    pub fn environment(&self) -> String {
        format!(
            "FARM_ETC={} FARM_VAR={} FARM_RUN={}",
            self.dirs.etc.display(),
            self.dirs.var.display(),
            self.dirs.run.display()
        )
    }

    /// Puts a generated module into `ETC/modules/NAME`, with the nginx configuration its scripts use.
    pub fn install_text(&self, name: &str, module: &ModuleText, listen: &[String]) -> Result<()> {
        module.write(&self.dirs.etc.join("modules").join(name))?;
        let folder = self.nginx_dir();
        write_file(
            &folder.join("nginx.conf"),
            &nginx_conf(&folder, &self.name, listen),
            0o644,
        )
    }

    /// Puts the repository's module `name` into `ETC/modules/NAME`, with these macro values.
    pub fn install_module(&self, name: &str, macros: &[(&str, &str)]) -> Result<()> {
        let from = repository()?.join("modules").join(name);
        copy_module(&from, &self.dirs.etc.join("modules").join(name), macros)
    }

    /// Where this node's nginx keeps its configuration, log and process number.
    pub fn nginx_dir(&self) -> PathBuf {
        self.dirs.base.join("nginx")
    }

    /// The switch port goes up or down, and with it the node's carrier.
    pub fn set_link(&self, up: bool) -> Result<()> {
        self.switch
            .ip(&[format!("link set {} {}", self.port, if up { "up" } else { "down" })])
    }

    /// The switch drops what this node sends (`outbound`) or what is sent to it, and leaves the carrier up: a one-way cut.
    pub fn cut(&self, outbound: bool) -> Result<()> {
        let (hook, key) = if outbound {
            ("prerouting", "iifname")
        } else {
            ("postrouting", "oifname")
        };
        let table = format!("cut_{}_{}", self.port, if outbound { "out" } else { "in" });
        self.switch.nft(&format!(
            "table bridge {table} {{ chain c {{ type filter hook {hook} priority -300; {key} \"{}\" drop; }}; }}\n",
            self.port
        ))
    }

    /// Ends all cuts of this node.
    pub fn heal(&self) -> Result<()> {
        for side in ["in", "out"] {
            let table = format!("cut_{}_{side}", self.port);
            // Adding first makes deleting one that is not there no error.
            self.switch
                .nft(&format!("add table bridge {table}\ndelete table bridge {table}\n"))?;
        }
        Ok(())
    }

    /// The last `lines` lines of farmd's own output.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..]
            .iter()
            .map(|line| format!("  {line}\n"))
            .collect()
    }

    /// All of farmd's own output so far.
    pub fn log_text(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.dirs.base.join("farmd.log")
    }

    fn log_file(&self) -> Result<File> {
        let path = self.log_path();
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    }

    fn processes(&self) -> MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.end_processes();
    }
}
