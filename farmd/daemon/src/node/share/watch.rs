//! Commands about shares under way: how far they are, and when they are over.
//!
//! Part of the owner loop, called at the end of each turn. It looks at the hand-over and at what the data plane has
//! counted, tells those who wait, and asks for resets when a drain's deadline has passed.

use std::time::Duration;

use farm_core::api::{ClientConnections, MAX_CLIENTS, ModuleState, Reply, exit};
use farm_core::handover::Handover;
use farm_core::id::ModuleName;

use super::{Goal, Job, MOVE_LIMIT, Reset, Target, text};
use crate::effect::Effect;
use crate::node::Node;
use crate::node::module::Waiting;

/// How long past its deadline a drain waits for the hand-over before it resets what is left.
const HANDOVER_GRACE: Duration = Duration::from_secs(2);
/// How long it then waits until the connections are seen to be gone; they are counted every second, or less often if
/// there are so many that counting takes its time.
const RESET_GRACE: Duration = Duration::from_secs(10);
/// Shortest time between two lines about a drain under way.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// How a job ends.
type End = Result<String, (u8, String)>;

/// Who waits for the share that follows a start.
#[derive(Debug)]
pub(in crate::node) struct ShareWaiting {
    waiting: Waiting,
    /// What was reached so far.
    reached: String,
    limit: Duration,
}

impl Job {
    fn tell(&mut self, now: Duration, text: String) {
        if text == self.told {
            return;
        }
        if let Some(replies) = &self.replies {
            // Whoever asked may have gone; the job goes on.
            let _ = replies.send(Reply::Progress { text: text.clone() });
        }
        self.told = text;
        self.told_at = now;
    }
}

impl Node {
    /// The settings of a command are on the disk, or cannot be put there.
    pub(in crate::node) fn handle_shares_kept(&mut self, id: u64, result: Result<(), String>) {
        let now = self.now();
        if let Err(error) = &result {
            tracing::error!(%error, "what was set for the shares will not outlast a restart");
        }
        let Some(job) = self.desk.jobs.iter_mut().find(|job| job.id == id) else {
            return;
        };
        job.kept = true;
        if let Err(error) = result {
            job.tell(now, format!("in force, but it will not outlast a restart: {error}"));
        }
    }

    /// What a drain's deadline has ended.
    pub(in crate::node) fn handle_held_reset(&mut self, id: u64, result: Result<u32, String>) {
        let at = self.now();
        let Some(job) = self.desk.jobs.iter_mut().find(|job| job.id == id) else {
            return;
        };
        let text = match &result {
            Ok(count) => format!("the time is over: {count} connections were reset"),
            Err(error) => format!("the time is over, and not all connections could be reset: {error}"),
        };
        for target in &job.targets {
            self.journal
                .write(&target.module, "farm", 'E', &format!("{}: {text}", job.what));
        }
        job.tell(at, text);
        if let Goal::Drained { reset, .. } = &mut job.goal {
            *reset = Reset::Done { at, result };
        }
    }

    /// When something here is due although nothing happens.
    pub(in crate::node) fn share_timeout(&self) -> Option<Duration> {
        let stops = self
            .modules
            .values()
            .filter_map(|m| m.stop_drain.as_ref())
            .map(|s| s.until);
        let starts = self.modules.values().flat_map(|m| &m.share_waiting).map(|w| w.limit);
        let jobs = self.desk.jobs.iter().map(|job| match &job.goal {
            Goal::Drained {
                deadline,
                reset: Reset::NotYet,
            } => *deadline,
            Goal::Drained {
                reset: Reset::AskedAt(at) | Reset::Done { at, .. },
                ..
            } => *at + RESET_GRACE,
            Goal::Moved { limit } => *limit,
        });
        let given = self.desk.jobs.iter().filter_map(|job| job.provisional.as_ref());
        let given = given.map(|provisional| provisional.until);
        // What is overdue waits for something else, and is looked at with every heartbeat.
        let now = self.now();
        stops
            .chain(starts)
            .chain(jobs)
            .chain(given)
            .filter(|at| *at > now)
            .min()
    }

    /// Draws the conclusions of a turn.
    pub(in crate::node) fn watch_shares(&mut self) {
        let now = self.now();
        let waits = self
            .modules
            .values()
            .any(|m| m.stop_drain.is_some() || !m.share_waiting.is_empty());
        if !waits && self.desk.jobs.is_empty() {
            return;
        }
        // The farm must have heard of what was set before it can have happened.
        self.report_modules(now);
        self.watch_stop_drains(now);
        self.watch_starts(now);
        let mut jobs = std::mem::take(&mut self.desk.jobs);
        let mut served_again = Vec::new();
        jobs.retain_mut(|job| {
            let taken_back = self.take_back(now, job);
            if let (Some((_, why)), Some(provisional)) = (&taken_back, &job.provisional) {
                let targets = provisional.before.iter().map(|(target, _)| target.clone());
                served_again.push((targets.collect::<Vec<_>>(), why.clone()));
            }
            match taken_back.map(Err).or_else(|| self.advance_job(now, job)) {
                None => true,
                Some(end) => {
                    self.end_job(job, &end);
                    false
                }
            }
        });
        // Nothing above has added one.
        self.desk.jobs = jobs;
        for (mut targets, why) in served_again {
            // What an earlier command has drained goes on.
            targets.retain(|t| self.desk.setting(&t.module, &t.group).drained.is_none());
            self.end_drains(&targets, &why);
        }
    }

    /// Ends drains of these groups: they are to be served again.
    pub(super) fn end_drains(&mut self, targets: &[Target], why: &str) {
        let jobs = std::mem::take(&mut self.desk.jobs);
        let (ended, going): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| {
            matches!(job.goal, Goal::Drained { .. }) && job.targets.iter().any(|target| targets.contains(target))
        });
        self.desk.jobs = going;
        for job in &ended {
            self.end_job(job, &Err((exit::REFUSED, why.to_owned())));
        }
    }

    /// Whoever does not wait for the end hears that it has begun.
    fn accept(&self, job: &mut Job) {
        if !job.wait
            && job.provisional.is_none()
            && let Some(replies) = job.replies.take()
        {
            let text = format!("{} accepted", job.what);
            self.journal.audit(&job.by, &job.what, Ok("accepted"));
            let _ = replies.send(Reply::Done { text });
        }
    }

    fn end_job(&self, job: &Job, end: &End) {
        // One that nobody waits for has been told of.
        if job.wait || job.replies.is_some() {
            let result = end.as_ref().map(String::as_str).map_err(|(_, error)| error.as_str());
            self.journal.audit(&job.by, &job.what, result);
        }
        if let Some(replies) = &job.replies {
            let _ = replies.send(match end.clone() {
                Ok(text) => Reply::Done { text },
                Err((code, error)) => Reply::Failed { error, code },
            });
        }
    }

    fn advance_job(&self, now: Duration, job: &mut Job) -> Option<End> {
        if !job.kept {
            return None;
        }
        self.accept(job);
        match job.goal {
            Goal::Drained { deadline, .. } => self.advance_drain(now, deadline, job),
            Goal::Moved { limit } => {
                // Nothing moves while nobody takes it.
                let given =
                    |t: &Target| job.provisional.is_none() || self.farm.is_group_handed_over(&t.module, t.index);
                let moved =
                    |t: &Target| !self.runs(&t.module) || (self.farm.is_settled(&t.module, t.index) && given(t));
                if job.targets.iter().all(moved) {
                    return Some(Ok(self.shares_text(&job.targets)));
                }
                (now >= limit).then(|| {
                    let why = job
                        .targets
                        .iter()
                        .map(|t| self.why_no_share(&t.module))
                        .find(|why| !why.is_empty());
                    let why = why.unwrap_or_else(|| "the hand-over is still under way".to_owned());
                    Err((exit::FAILED, format!("set, but the buckets have not moved yet: {why}")))
                })
            }
        }
    }

    fn advance_drain(&self, now: Duration, deadline: Duration, job: &mut Job) -> Option<End> {
        let targets = || job.targets.iter().filter(|t| self.runs(&t.module));
        let open: usize = targets()
            .map(|t| self.farm.group(&t.module, t.index).map_or(0, |g| g.open_count()))
            .sum();
        let handed = targets().all(|t| self.farm.is_group_handed_over(&t.module, t.index));
        let connections: u32 = targets()
            .map(|t| self.farm.group(&t.module, t.index).map_or(0, |g| g.held_connections()))
            .sum();
        let clients = self.clients_of(targets());
        let Goal::Drained { reset, .. } = &job.goal else {
            return None;
        };
        let counted = targets().all(|t| self.farm.group(&t.module, t.index).is_none_or(Handover::is_at_work));
        if handed && counted && connections == 0 {
            return Some(Ok(match reset {
                Reset::Done { result: Ok(count), .. } if *count > 0 => {
                    format!("drained; {count} connections were reset at the end of the time")
                }
                _ => "drained; no connection left".to_owned(),
            }));
        }
        let overdue = now >= deadline && (handed || now >= deadline + HANDOVER_GRACE);
        match reset {
            Reset::NotYet if overdue => {
                let (plan, groups) = self.published.newest();
                let meant =
                    |(module, index): &(ModuleName, usize)| targets().any(|t| (&t.module, &t.index) == (module, index));
                let groups = (0..groups.len())
                    .filter(|i| groups.get(*i).is_some_and(meant))
                    .collect();
                let effect = Effect::ResetHeld {
                    job: job.id,
                    plan,
                    groups,
                };
                job.goal = Goal::Drained {
                    deadline,
                    reset: Reset::AskedAt(now),
                };
                self.queue(effect);
            }
            Reset::AskedAt(at) | Reset::Done { at, .. } if now >= *at + RESET_GRACE => {
                let what = if handed {
                    "could not be reset"
                } else {
                    "are still here: no other node takes over"
                };
                let from = text::from_whom(&clients, connections);
                return Some(Err((
                    exit::FAILED,
                    format!("{} that {what}{from}", text::left(connections)),
                )));
            }
            Reset::NotYet | Reset::AskedAt(_) | Reset::Done { .. } => {}
        }
        let text = match (handed && counted, open) {
            (true, _) => format!("{}{}", text::left(connections), text::from_whom(&clients, connections)),
            (false, 0) => "the buckets are with the others; the connections left are being counted".to_owned(),
            (false, open) => format!("{open} buckets are being handed over"),
        };
        // Who is left is told as soon as it is known, and then in steps.
        let of_connections = handed && counted && !clients.is_empty();
        if now >= job.told_at + TELL_INTERVAL || job.told.is_empty() || (of_connections && !job.told_of_connections) {
            job.told_of_connections = of_connections;
            job.tell(now, text);
        }
        None
    }

    /// The clients with the most connections in these groups.
    fn clients_of<'a>(&self, targets: impl Iterator<Item = &'a Target>) -> Vec<ClientConnections> {
        let mut sums: Vec<ClientConnections> = Vec::new();
        for client in targets.flat_map(|t| self.desk.clients(&t.module, t.index)) {
            match sums.iter_mut().find(|c| c.addr == client.addr) {
                Some(sum) => sum.connections += client.connections,
                None => sums.push(client),
            }
        }
        sums.sort_by_key(|c| std::cmp::Reverse(c.connections));
        sums.truncate(MAX_CLIENTS);
        sums
    }

    fn runs(&self, module: &ModuleName) -> bool {
        self.modules
            .get(module)
            .is_some_and(|m| m.machine.state() != ModuleState::Stop)
    }

    /// `web: 1365/4096`, for each group.
    fn shares_text(&self, targets: &[Target]) -> String {
        let share = |t: &Target| {
            let open = self.farm.group(&t.module, t.index).map_or(0, |g| g.open_count());
            if self.runs(&t.module) {
                format!("{}/{}: {open}/{}", t.module, t.group, farm_core::id::BUCKETS)
            } else {
                format!("{}/{}: set, the module is in STOP", t.module, t.group)
            }
        };
        targets.iter().map(share).collect::<Vec<_>>().join(", ")
    }

    /// Whoever started the module hears of it when its share is there too.
    pub(in crate::node) fn wait_for_share(&mut self, name: &ModuleName, waiting: Waiting, reached: String) {
        let limit = self.now() + MOVE_LIMIT;
        if let Some(module) = self.modules.get_mut(name) {
            module.share_waiting.push(ShareWaiting {
                waiting,
                reached,
                limit,
            });
        }
    }

    fn watch_starts(&mut self, now: Duration) {
        let names: Vec<ModuleName> = self.modules.keys().cloned().collect();
        for name in names {
            let Some(module) = self.modules.get(&name).filter(|m| !m.share_waiting.is_empty()) else {
                continue;
            };
            let groups = module.config.vip.as_ref().map_or(0, |v| v.groups.len());
            let why = self.why_no_share(&name);
            let left = !module.machine.ready();
            let there = (0..groups).all(|i| self.farm.is_settled(&name, i));
            // That is told at once, it may last. Who has stepped out may be back at once, as after a link has come up.
            let hopeless = self.farm.kept_out(&name).is_some() || self.farm.withheld(&name).is_some();
            let Some(module) = self.modules.get_mut(&name) else {
                continue;
            };
            let over = |w: &mut ShareWaiting| left || there || hopeless || now >= w.limit;
            let ended: Vec<ShareWaiting> = module.share_waiting.extract_if(.., over).collect();
            for ShareWaiting { waiting, reached, .. } in ended {
                let result = if left {
                    Err(format!("it was {reached}, and then left it: {why}"))
                } else if why.is_empty() {
                    Ok(reached)
                } else if text::is_given_away(&why) {
                    Ok(format!("{reached}, {why}"))
                } else {
                    Err(format!("it is {reached} and has no share: {why}"))
                };
                self.answer(&name, &waiting, result);
            }
        }
    }
}
