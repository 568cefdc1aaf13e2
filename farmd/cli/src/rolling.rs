//! `farm rolling-restart`: every node in turn gives its share away, restarts its modules, or farmd itself, and takes the share back.
//!
//! Owns the order and the rule that never two nodes are out at once; each step is an ordinary command to the node
//! concerned. It stops at the first thing that fails, and says what is as it was, what is new and what is out.

use std::time::{Duration, Instant};

use farm_core::api::{
    CommandRequest, DrainRequest, FarmStatus, ModuleState, NodeModuleStatus, Quality, Reply, ShareScope,
    UndrainRequest, exit,
};
use farm_core::id::ModuleName;
use serde::Serialize;
use serde_json::json;

use crate::args::RollingArgs;
use crate::client::Client;
use crate::command::{Steps, known};
use crate::failure::Failure;
use crate::folders::Context;
use crate::status::{is_drained, is_given_away, is_ready};
use crate::terminal::{show, show_json};

/// How long a restarted node may take until it is seen with its share, and the others to be ready before the next one.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A node that is left out, and why.
type Skipped = (String, String);

/// One node and the modules to restart on it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Turn {
    node: String,
    modules: Vec<String>,
    /// An administrator had drained it before, or given it the weight 0.
    drained: bool,
}

/// Runs `rolling-restart`.
pub fn run(context: &Context, args: &RollingArgs) -> Result<u8, Failure> {
    let module = context.module_if_any(args.module.as_deref())?;
    let steps = Steps::new(context);
    let here = Client::new(context)?;
    let (turns, skipped) = plan(&here.status()?, module.as_ref())?;
    for (node, why) in &skipped {
        steps.add(&format!("{node}: left out, {why}"));
    }
    let names: Vec<&str> = turns.iter().map(|turn| turn.node.as_str()).collect();
    for (i, turn) in turns.iter().enumerate() {
        steps.add(&format!("{}: {} of {}", turn.node, i + 1, turns.len()));
        let rolling = Rolling {
            context,
            here: &here,
            steps: &steps,
            timeout: args.timeout,
            daemon: args.daemon,
        };
        if let Err(failure) = rolling.take(turn, &turns) {
            let text = format!(
                "stopped at {}: {}; restarted: {}; not touched: {}",
                turn.node,
                failure.text,
                listed(&names[..i]),
                listed(&names[i + 1..])
            );
            return Err(Failure::new(failure.code, text)
                .with("verb", "rolling-restart")
                .with("node", turn.node.as_str())
                .with("restarted", names[..i].to_vec())
                .with("steps", steps.into_texts()?));
        }
    }
    let steps = steps.into_texts()?;
    if context.json {
        show_json(&json!({ "verb": "rolling-restart", "restarted": names, "steps": steps }))?;
    } else {
        show(&format!("restarted: {}\n", listed(&names)))?;
    }
    Ok(exit::OK)
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Who is restarted in which order, and who is left out and why. The node that answers comes last.
///
/// # Errors
/// If a node is on its way or kept out, or fewer than two serve: then a restart would interrupt the service.
fn plan(status: &FarmStatus, module: Option<&ModuleName>) -> Result<(Vec<Turn>, Vec<Skipped>), Failure> {
    let meant = status
        .modules
        .iter()
        .filter(|m| module.is_none_or(|name| m.name == name.as_str()));
    let modules: Vec<_> = meant.collect();
    if modules.is_empty() {
        let what = module.map_or_else(
            || "no node has a module".to_owned(),
            |name| format!("no node has a module `{name}`"),
        );
        return Err(Failure::new(exit::NOT_FOUND, what));
    }
    let mut turns: Vec<Turn> = Vec::new();
    let mut skipped = Vec::new();
    for module in &modules {
        let mut serving = 0;
        for row in &module.nodes {
            match (row.state, row.quality) {
                (Some(ModuleState::Up), Some(Quality::Ready)) => {
                    serving += usize::from(row.shares.iter().any(|share| share.buckets > 0));
                    match turns.iter_mut().find(|turn| turn.node == row.node) {
                        Some(turn) => turn.modules.push(module.name.clone()),
                        None => turns.push(Turn {
                            node: row.node.clone(),
                            modules: vec![module.name.clone()],
                            drained: is_given_away(&row.why),
                        }),
                    }
                }
                (Some(ModuleState::Stop), _) => {
                    skipped.push((row.node.clone(), format!("{} is stopped there", module.name)));
                }
                (None, _) => skipped.push((row.node.clone(), format!("{}: {}", module.name, row.why))),
                (Some(state), _) => {
                    let text = format!("{} is {state} and not ready on {}: {}", module.name, row.node, row.why);
                    return Err(Failure::new(exit::REFUSED, text));
                }
            }
        }
        if serving < 2 {
            let text = format!("{serving} nodes serve {}: a restart would interrupt it", module.name);
            return Err(Failure::new(exit::REFUSED, text));
        }
    }
    turns.sort_by_key(|turn| turn.node == status.node);
    Ok((turns, skipped))
}

/// What keeps the next node from being taken out: another one that does not serve, and its module. One that was drained
/// before is as it is meant to be; one that has been drained since is being restarted by somebody else.
fn not_ready<'a>(status: &'a FarmStatus, turns: &[Turn], except: &str) -> Option<(&'a NodeModuleStatus, &'a str)> {
    for module in &status.modules {
        for row in module.nodes.iter().filter(|row| row.node != except) {
            let turn = turns
                .iter()
                .find(|t| t.node == row.node && t.modules.contains(&module.name));
            let drained = row.quality == Some(Quality::Ready) && is_given_away(&row.why);
            if turn.is_some_and(|turn| !(is_ready(row) || turn.drained && drained)) {
                return Some((row, &module.name));
            }
        }
    }
    None
}

/// A rolling restart under way.
struct Rolling<'a> {
    context: &'a Context,
    here: &'a Client,
    steps: &'a Steps,
    timeout: Duration,
    /// farmd in place, and no application.
    daemon: bool,
}

impl Rolling<'_> {
    /// Restarts one node.
    fn take(&self, turn: &Turn, turns: &[Turn]) -> Result<(), Failure> {
        self.wait_for(|| {
            let status = self.here.status()?;
            Ok(not_ready(&status, turns, &turn.node)
                .map(|(row, module)| format!("{module} is not ready on {}: {}", row.node, row.why)))
        })?;
        let there = Client::new(&self.context.on(&turn.node))?;
        if self.daemon {
            let text = crate::reload::restart(&there, self.steps)?;
            self.steps.add(&format!("{}: {text}", turn.node));
            return Ok(());
        }
        let scopes = undrained(&there.status()?, turn);
        if scopes.is_empty() {
            self.steps
                .add(&format!("{}: was drained before, and stays so", turn.node));
        }
        let drained = |failure: Failure| {
            let hint = format!(
                "it may be drained, then undrain it once it is mended: farm undrain {}",
                turn.node
            );
            Failure::new(failure.code, format!("{}; {hint}", failure.text))
        };
        for scope in &scopes {
            let request = DrainRequest {
                scope: scope.clone(),
                timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
                force: false,
                wait: true,
            };
            self.step(&there, &turn.node, "drain", "/v1/drain", &request)
                .map_err(drained)?;
        }
        let request = CommandRequest {
            wait: true,
            ..CommandRequest::default()
        };
        for module in &turn.modules {
            let path = format!("/v1/modules/{module}/stopstart");
            self.step(&there, &turn.node, &format!("stopstart {module}"), &path, &request)
                .map_err(drained)?;
        }
        for scope in scopes {
            let request = UndrainRequest { scope };
            self.step(&there, &turn.node, "undrain", "/v1/undrain", &request)
                .map_err(drained)?;
        }
        self.wait_for(|| {
            let status = there.status()?;
            let rows = status.modules.iter().filter(|m| turn.modules.contains(&m.name));
            let mut rows = rows.flat_map(|m| {
                m.nodes
                    .iter()
                    .filter(|row| row.node == turn.node)
                    .map(|row| (row, &m.name))
            });
            Ok(rows
                .find(|(row, _)| !is_ready(row) && !is_drained(row))
                .map(|(row, module)| format!("{module} is not ready: {}", row.why)))
        })
        .map_err(drained)
    }

    /// One command, with what it tells on the way.
    fn step(&self, there: &Client, node: &str, what: &str, path: &str, body: &impl Serialize) -> Result<(), Failure> {
        let reply = there.post(path, body, |text| self.steps.add(&format!("{node}: {text}")))?;
        match reply {
            Reply::Failed { error, code } => Err(Failure::new(known(code), format!("{what}: {error}"))),
            Reply::Done { text } | Reply::Progress { text } => {
                self.steps.add(&format!("{node}: {what}: {text}"));
                Ok(())
            }
        }
    }

    /// Waits until `missing` finds nothing more.
    fn wait_for(&self, mut missing: impl FnMut() -> Result<Option<String>, Failure>) -> Result<(), Failure> {
        let since = Instant::now();
        while let Some(what) = missing()? {
            if since.elapsed() >= READY_LIMIT {
                return Err(Failure::new(
                    exit::FAILED,
                    format!("{what}, after {} s", READY_LIMIT.as_secs()),
                ));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

/// What of the node is to be drained and undrained: groups that an administrator has drained stay as they are.
fn undrained(status: &FarmStatus, turn: &Turn) -> Vec<ShareScope> {
    let modules = status.modules.iter().filter(|m| turn.modules.contains(&m.name));
    let mut scopes = Vec::new();
    for module in modules {
        let shares = || {
            module
                .nodes
                .iter()
                .filter(|row| row.node == turn.node)
                .flat_map(|row| &row.shares)
        };
        let scope = |group: Option<String>| ShareScope {
            module: Some(module.name.clone()),
            group,
        };
        if shares().count() > 0 && shares().all(|share| share.setting.drained.is_none()) {
            scopes.push(scope(None));
        } else {
            let free = shares().filter(|share| share.setting.drained.is_none());
            scopes.extend(free.map(|share| scope(Some(share.group.clone()))));
        }
    }
    scopes
}

#[cfg(test)]
mod tests;
