//! Shares set at run time: `drain`, `undrain`, `weight`, and the drain before a stop.
//!
//! Owns the settings in force ([`Shares`]) and the commands that wait for what follows from them. Never moves a bucket:
//! it changes the weight this node tells, and the hand-over does the rest. Connections that are left are counted by the
//! data plane. The owner loop calls it with each command and at the end of each turn.

mod alone;
mod stop;
mod text;
mod watch;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use farm_core::api::history::Happening;
use farm_core::api::{ClientConnections, Drained, Reply, ShareScope, ShareSetting, exit};
use farm_core::config::GroupConfig;
use farm_core::handover::Handover;
use farm_core::id::ModuleName;
use tokio::sync::mpsc::UnboundedSender;

use super::Node;
use super::module::LocalModule;
use crate::effect::Effect;
use crate::event::{ShareCommand, ShareVerb};
use crate::shares::Shares;
use alone::Provisional;

pub(super) use stop::StopDrain;
pub(super) use text::lasting;
pub(super) use watch::ShareWaiting;

/// How long a command waits for buckets to move: a hand-over takes milliseconds, a node that joins some hundred.
const MOVE_LIMIT: Duration = Duration::from_secs(10);

/// One group that a command is about.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Target {
    module: ModuleName,
    index: usize,
    group: String,
}

/// What a command waits for.
#[derive(Debug)]
enum Goal {
    /// Until no connection is left; at the deadline they are reset.
    Drained { deadline: Duration, reset: Reset },
    /// Until the buckets lie as the weights say, at most so long.
    Moved { limit: Duration },
}

/// How far the resets of a drain are.
#[derive(Debug)]
enum Reset {
    NotYet,
    AskedAt(Duration),
    Done { at: Duration, result: Result<u32, String> },
}

/// A command about shares that has not been answered.
#[derive(Debug)]
struct Job {
    id: u64,
    goal: Goal,
    targets: Vec<Target>,
    by: String,
    /// For the audit.
    what: String,
    /// `None` once nobody waits any more.
    replies: Option<UnboundedSender<Reply>>,
    /// It is answered when it is over, not as soon as the settings are kept.
    wait: bool,
    /// The settings are on the disk, or cannot be put there.
    kept: bool,
    told: String,
    told_at: Duration,
    /// What is told to those who wait is about the connections that are left, not about buckets any more.
    told_of_connections: bool,
    /// While it may have to be taken back.
    provisional: Option<Provisional>,
}

/// The settings, and who waits for what.
#[derive(Debug, Default)]
pub(super) struct ShareDesk {
    shares: Shares,
    jobs: Vec<Job>,
    last_job: u64,
    /// Clients with most connections in buckets that are not this node's, by module and group.
    clients: BTreeMap<(ModuleName, usize), Vec<ClientConnections>>,
}

impl ShareDesk {
    pub(super) fn new(shares: Shares) -> Self {
        Self {
            shares,
            ..Self::default()
        }
    }

    pub(super) fn setting(&self, module: &ModuleName, group: &str) -> ShareSetting {
        self.shares.get(module, group)
    }

    pub(super) fn clients(&self, module: &ModuleName, group: usize) -> Vec<ClientConnections> {
        self.clients.get(&(module.clone(), group)).cloned().unwrap_or_default()
    }

    /// What the data plane has counted, whole.
    pub(super) fn counted(&mut self, clients: BTreeMap<(ModuleName, usize), Vec<ClientConnections>>) {
        self.clients = clients;
    }
}

impl Node {
    /// Takes a command about shares. It is answered once what it asks for has happened.
    pub(super) fn handle_share(&mut self, command: ShareCommand) {
        let ShareCommand { verb, by, replies } = command;
        let (scope, words) = match &verb {
            ShareVerb::Drain(r) => (&r.scope, "drain".to_owned()),
            ShareVerb::Undrain(r) => (&r.scope, "undrain".to_owned()),
            ShareVerb::Weight(r) => {
                let weight = r.weight.map_or_else(|| "default".to_owned(), |w| w.to_string());
                (&r.scope, format!("weight {weight}"))
            }
        };
        let what = [Some(&words), scope.module.as_ref(), scope.group.as_ref()];
        let what = what.into_iter().flatten().cloned().collect::<Vec<_>>().join(" ");
        if let Err((code, error)) = self.begin_share(&verb, &by, &words, what.clone(), &replies) {
            self.journal.audit(&by, &what, Err("refused"));
            // Whoever asked may have gone.
            let _ = replies.send(Reply::Failed { error, code });
        }
    }

    fn begin_share(
        &mut self,
        verb: &ShareVerb,
        by: &str,
        words: &str,
        what: String,
        replies: &UnboundedSender<Reply>,
    ) -> Result<(), (u8, String)> {
        if self.ending {
            return Err((exit::REFUSED, "farmd is shutting down".to_owned()));
        }
        let now = self.now();
        let (scope, gives_all, force) = match verb {
            ShareVerb::Drain(r) => (&r.scope, true, r.force),
            ShareVerb::Undrain(r) => (&r.scope, false, false),
            ShareVerb::Weight(r) => (&r.scope, r.weight == Some(0), r.force),
        };
        let targets = self.targets(scope)?;
        let provisional = if gives_all && !force {
            self.give_away(now, &targets).map_err(|Target { module, group, .. }| {
                (
                    exit::REFUSED,
                    format!("no other node serves group {group} of module {module}; with --force nobody does"),
                )
            })?
        } else {
            self.keep_given(&targets);
            None
        };
        let since = seconds_since_1970();
        for target in &targets {
            let mut setting = self.desk.shares.get(&target.module, &target.group);
            match verb {
                ShareVerb::Drain(r) => {
                    let drained = setting.drained.get_or_insert_with(|| Drained {
                        by: by.to_owned(),
                        since,
                        until: None,
                    });
                    drained.until = Some(since.saturating_add(r.timeout_ms.div_ceil(1000)));
                }
                ShareVerb::Undrain(_) => setting.drained = None,
                ShareVerb::Weight(r) => {
                    setting.weight = r.weight;
                    setting.weight_by = r.weight.map(|_| by.to_owned());
                }
            }
            self.desk.shares.set(&target.module, &target.group, setting);
            let text = format!("Action {words} called by {by} (group {})", target.group);
            self.journal.write(&target.module, "farm", 'U', &text);
        }
        let module = targets.first().map(|t| t.module.clone());
        self.record(
            module.as_ref().filter(|_| scope.module.is_some()),
            Happening::Asked {
                by: by.to_owned(),
                what: text::asked(verb, self.cluster.name(self.this)),
            },
        );
        if matches!(verb, ShareVerb::Undrain(_)) {
            self.end_drains(&targets, &format!("undrained by {by}"));
        }
        let goal = match verb {
            ShareVerb::Drain(r) => Goal::Drained {
                deadline: now.saturating_add(Duration::from_millis(r.timeout_ms)),
                reset: Reset::NotYet,
            },
            ShareVerb::Undrain(_) | ShareVerb::Weight(_) => Goal::Moved {
                limit: now + MOVE_LIMIT,
            },
        };
        self.desk.last_job += 1;
        let id = self.desk.last_job;
        self.desk.jobs.push(Job {
            id,
            goal,
            targets,
            by: by.to_owned(),
            what,
            replies: Some(replies.clone()),
            wait: !matches!(verb, ShareVerb::Drain(request) if !request.wait),
            kept: false,
            told: String::new(),
            told_at: now,
            told_of_connections: false,
            provisional,
        });
        self.queue(Effect::KeepShares {
            job: id,
            shares: self.desk.shares.clone(),
        });
        Ok(())
    }

    /// Goes on with the drains that a farmd before this one has begun: what is left at their deadlines is reset.
    pub(super) fn resume_drains(&mut self) {
        let now = self.now();
        let clock = seconds_since_1970();
        for target in self.targets(&ShareScope::default()).unwrap_or_default() {
            let setting = self.desk.shares.get(&target.module, &target.group);
            let Some(Drained {
                by, until: Some(until), ..
            }) = setting.drained
            else {
                continue;
            };
            self.desk.last_job += 1;
            self.desk.jobs.push(Job {
                id: self.desk.last_job,
                goal: Goal::Drained {
                    deadline: now + Duration::from_secs(until.saturating_sub(clock)),
                    reset: Reset::NotYet,
                },
                what: format!("drain {} {}", target.module, target.group),
                targets: vec![target],
                by,
                replies: None,
                wait: false,
                kept: true,
                told: String::new(),
                told_at: now,
                told_of_connections: false,
                provisional: None,
            });
        }
    }

    /// The groups of this node that `scope` means.
    fn targets(&self, scope: &ShareScope) -> Result<Vec<Target>, (u8, String)> {
        let not_found = |text: String| (exit::NOT_FOUND, text);
        if let Some(name) = &scope.module
            && !self.modules.keys().any(|module| module.as_str() == name)
        {
            return Err(not_found(format!("module {name} is not configured on this node")));
        }
        let modules = self.modules.iter();
        let modules = modules.filter(|(name, _)| scope.module.as_ref().is_none_or(|m| m == name.as_str()));
        let all: Vec<Target> = modules
            .flat_map(|(name, module)| {
                let groups = module.config.vip.iter().flat_map(|v| &v.groups);
                groups.enumerate().map(|(index, group)| Target {
                    module: name.clone(),
                    index,
                    group: group.name.clone(),
                })
            })
            .collect();
        let known: Vec<String> = all.iter().map(|t| format!("{} of {}", t.group, t.module)).collect();
        let meant: Vec<Target> = all
            .into_iter()
            .filter(|t| scope.group.as_ref().is_none_or(|g| *g == t.group))
            .collect();
        match (&scope.group, meant.is_empty()) {
            (_, false) => Ok(meant),
            (Some(group), true) => Err(not_found(format!(
                "there is no group {group} on this node; it has {}",
                if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                }
            ))),
            (None, true) => Err(not_found("this node has no module with virtual addresses".to_owned())),
        }
    }

    /// The weight of this node in one group, with what was set and with a stop that lets connections end first.
    pub(super) fn share_weight(&self, name: &ModuleName, module: &LocalModule, group: &GroupConfig) -> u16 {
        if module.stop_drain.is_some() {
            return 0;
        }
        let configured = group.weight(self.cluster.name(self.this));
        self.desk.setting(name, &group.name).effective(configured)
    }

    /// What was set for the shares of a module, if it keeps the node from serving; empty if not.
    pub(super) fn share_why(&self, name: &ModuleName, module: &LocalModule) -> String {
        let groups = || module.config.vip.iter().flat_map(|v| &v.groups).enumerate();
        let held = |index: usize| self.farm.group(name, index).map_or(0, Handover::held_connections);
        if let Some(stop) = &module.stop_drain {
            let seconds = stop.until.saturating_sub(self.now()).as_secs();
            let connections = groups().map(|(i, _)| held(i)).sum();
            // In steps, so that it does not change at every pulse.
            let rest = if seconds >= 60 {
                format!("{} min", seconds / 60)
            } else {
                "a minute".to_owned()
            };
            return format!(
                "stops when its connections have ended, within {rest}; {}",
                text::left(connections)
            );
        }
        // Drained groups, or, if there is none, those that were given the weight 0.
        let all = || groups().map(|(i, g)| (i, g, self.desk.setting(name, &g.name)));
        let is_drained = |(_, _, setting): &(usize, &GroupConfig, ShareSetting)| setting.drained.is_some();
        let mut meant: Vec<_> = all().filter(is_drained).collect();
        if meant.is_empty() {
            meant = all().filter(|(_, _, setting)| setting.weight == Some(0)).collect();
        }
        let Some((_, _, first)) = meant.first() else {
            return String::new();
        };
        let which = if meant.len() == groups().count() {
            String::new()
        } else {
            let names: Vec<&str> = meant.iter().map(|(_, g, _)| g.name.as_str()).collect();
            format!(" (group {})", names.join(", "))
        };
        let connections = meant.iter().map(|(i, ..)| held(*i)).sum();
        text::given_away(first, &which, connections)
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
