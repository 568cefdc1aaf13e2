//! `farm status`: the whole farm as one node sees it, and the waiting verbs that watch the same answer.
//!
//! Asks, judges the exit code, and repeats with `--watch`; how it looks is in [`view`].

pub mod view;

use std::time::{Duration, Instant};

use farm_core::api::{FarmStatus, ModuleState, ModuleStatus, NodeModuleStatus, Quality, Share, exit};
use farm_core::id::ModuleName;

use crate::args::{StatusArgs, WaitArgs, WaitStateArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Paint, Style, show, show_json, wrap};

/// Time between two looks of a waiting verb.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Runs `farm status` and `safekit state`.
pub fn run(context: &Context, args: &StatusArgs) -> Result<u8, Failure> {
    let module = context.module_if_any(args.module.as_deref())?;
    let client = Client::new(context)?;
    if args.watch {
        return watch(context, args, &client, module.as_ref());
    }
    let status = narrowed(client.status()?, module.as_ref())?;
    if context.json {
        show_json(&status)?;
    } else {
        show(&view::farm(&status, Style::of_stdout(), args.verbose))?;
    }
    Ok(exit_code(&status.modules))
}

/// Shows the status again and again, until interrupted. A daemon that goes away meanwhile is waited for.
fn watch(context: &Context, args: &StatusArgs, client: &Client, module: Option<&ModuleName>) -> Result<u8, Failure> {
    let style = Style::of_stdout();
    let interval = Duration::try_from_secs_f64(args.interval)
        .unwrap_or_default()
        .max(Duration::from_millis(50));
    let mut first = true;
    loop {
        let status = match client.status() {
            Ok(status) => Ok(narrowed(status, module)?),
            Err(error) if first => return Err(error.into()),
            Err(error) => Err(Failure::from(error)),
        };
        match (&status, context.json) {
            (Ok(status), true) => show_json(status)?,
            (Err(failure), true) => show_json(&failure.to_json())?,
            (status, false) => {
                let text = match status {
                    Ok(status) => view::farm(status, style, args.verbose),
                    Err(failure) => wrapped(&failure.text, style),
                };
                // A picture that stands still must not be taken for one that is fresh.
                let clock = chrono::Local::now().format("%Y-%m-%d %H:%M:%S").to_string();
                let text = format!("{}\n{text}", style.paint(Paint::Dim, &clock));
                show(&frame(&text, style, first))?;
            }
        }
        first = false;
        std::thread::sleep(interval);
    }
}

/// `text` in lines that fit the terminal.
fn wrapped(text: &str, style: Style) -> String {
    let lines = style
        .width
        .map_or_else(|| vec![text.to_owned()], |width| wrap(text, width));
    lines.join("\n") + "\n"
}

/// One picture of `--watch`: drawn over the last one on a terminal, after an empty line elsewhere.
fn frame(text: &str, style: Style, first: bool) -> String {
    if !style.screen {
        return if first { text.to_owned() } else { format!("\n{text}") };
    }
    let clear = if first { "\x1b[2J" } else { "" };
    // Lines are cleared one by one so that the picture does not flicker.
    format!("{clear}\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
}

/// `status` with only `module` in it, if one is named.
fn narrowed(mut status: FarmStatus, module: Option<&ModuleName>) -> Result<FarmStatus, Failure> {
    if let Some(module) = module {
        status.modules.retain(|m| m.name == module.as_str());
        if status.modules.is_empty() {
            return Err(no_such_module(module));
        }
    }
    Ok(status)
}

fn no_such_module(module: &ModuleName) -> Failure {
    Failure::new(
        exit::NOT_FOUND,
        format!("no node has a module `{module}`; `farm module list` shows what is installed here"),
    )
}

/// It serves its share, and nothing is to be said.
pub fn is_ready(node: &NodeModuleStatus) -> bool {
    node.state == Some(ModuleState::Up) && node.quality == Some(Quality::Ready) && node.why.is_empty()
}

/// It serves no share because an administrator has drained it, or given it the weight 0. Of the node that answers.
pub fn is_drained(node: &NodeModuleStatus) -> bool {
    let ready = node.state == Some(ModuleState::Up) && node.quality == Some(Quality::Ready);
    let given_away = |share: &Share| share.setting.drained.is_some() || share.setting.weight == Some(0);
    ready && is_given_away(&node.why) && node.shares.iter().any(given_away)
}

/// Whether the reason of a node says that an administrator gave its share away.
pub fn is_given_away(why: &str) -> bool {
    why.starts_with("drained") || why.starts_with("weight 0")
}

/// 0 if every node of every module is UP Ready and takes part, 3 if no module runs anywhere, else 2.
fn exit_code(modules: &[ModuleStatus]) -> u8 {
    let mut nodes = modules.iter().flat_map(|module| &module.nodes);
    if nodes.clone().all(is_ready) {
        exit::OK
    } else if nodes.all(|node| matches!(node.state, None | Some(ModuleState::Stop))) {
        exit::STOPPED
    } else {
        exit::DEGRADED
    }
}

/// Runs `waitstart`: until the module is UP Ready on this node.
pub fn wait_start(context: &Context, args: &WaitArgs) -> Result<u8, Failure> {
    wait_until(context, args, Goal::Started)
}

/// Runs `waitstop`: until the module is stopped on this node.
pub fn wait_stop(context: &Context, args: &WaitArgs) -> Result<u8, Failure> {
    wait_until(context, args, Goal::Stable(ModuleState::Stop))
}

/// Runs `waitstate STATE [AM]`, in any order: until the module is in that state, and stays there.
pub fn wait_state(context: &Context, args: &WaitStateArgs) -> Result<u8, Failure> {
    let (state, module) = state_and_module(&args.words)?;
    wait_until(
        context,
        &WaitArgs {
            module,
            timeout: args.timeout,
        },
        Goal::Stable(state),
    )
}

/// The first of `words` that is a state, and the other one.
fn state_and_module(words: &[String]) -> Result<(ModuleState, Option<String>), Failure> {
    let state = |word: &String| match word.to_ascii_uppercase().as_str() {
        "STOP" => Some(ModuleState::Stop),
        "WAIT" => Some(ModuleState::Wait),
        "UP" => Some(ModuleState::Up),
        _ => None,
    };
    let found = words.iter().enumerate().find_map(|(at, word)| Some((at, state(word)?)));
    let Some((at, state)) = found else {
        let what = match words {
            [one] => format!("`{one}` is no state"),
            _ => format!("neither `{}` is a state", words.join("` nor `")),
        };
        return Err(Failure::usage(format!(
            "{what} of a farm module: STOP, WAIT or UP is expected"
        )));
    };
    let module = words.iter().enumerate().find(|(other, _)| *other != at);
    Ok((state, module.map(|(_, word)| word.clone())))
}

/// What a waiting verb waits for.
#[derive(Clone, Copy)]
enum Goal {
    /// UP Ready; a module that was on its way and is stopped again will not get there.
    Started,
    /// This state and no change under way.
    Stable(ModuleState),
}

fn wait_until(context: &Context, args: &WaitArgs, goal: Goal) -> Result<u8, Failure> {
    let module = context.module(args.module.as_deref())?;
    let client = Client::new(context)?;
    let since = Instant::now();
    let mut was_moving = false;
    loop {
        let status = client.status()?;
        let here = here(&status, &module).ok_or_else(|| no_such_module(&module))?;
        let (state, quality) = (here.state, here.quality);
        let reached = match goal {
            Goal::Started => is_ready(here) || is_drained(here),
            Goal::Stable(goal) => state == Some(goal) && quality != Some(Quality::Transient),
        };
        let shown = match (state, quality) {
            (Some(state), Some(quality)) => format!("{state} {quality}"),
            _ => "not configured".to_owned(),
        };
        if reached {
            if context.json {
                show_json(&serde_json::json!({ "module": module.as_str(), "state": state, "quality": quality }))?;
            }
            return Ok(exit::OK);
        }
        let gave_up = matches!(goal, Goal::Started) && was_moving && state == Some(ModuleState::Stop);
        if gave_up || since.elapsed().as_secs() >= args.timeout {
            let why = if here.why.is_empty() {
                String::new()
            } else {
                format!(" ({})", here.why)
            };
            let waited = if gave_up {
                String::new()
            } else {
                format!(" after {} s", args.timeout)
            };
            return Err(Failure::new(exit::FAILED, format!("{module} is {shown}{why}{waited}")));
        }
        was_moving |= matches!(state, Some(ModuleState::Wait | ModuleState::Up));
        std::thread::sleep(LOOK_EVERY);
    }
}

/// `module` on the node that answers.
pub fn here<'a>(status: &'a FarmStatus, module: &ModuleName) -> Option<&'a NodeModuleStatus> {
    let module = status.modules.iter().find(|m| m.name == module.as_str())?;
    module.nodes.iter().find(|node| node.node == status.node)
}

/// Runs `get -r RES`: the value of one resource on this node.
pub fn get(context: &Context, resource: &str) -> Result<u8, Failure> {
    let module = context.module(None)?;
    let status = Client::new(context)?.status()?;
    let found = status
        .modules
        .iter()
        .find(|m| m.name == module.as_str())
        .ok_or_else(|| no_such_module(&module))?;
    let value = found.resources.get(resource).ok_or_else(|| {
        let known = found
            .resources
            .keys()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        let known = if known.is_empty() { "none".to_owned() } else { known };
        Failure::new(
            exit::NOT_FOUND,
            format!("{module} has no resource `{resource}`; it has: {known}"),
        )
    })?;
    if context.json {
        show_json(&serde_json::json!({ "module": module.as_str(), "resource": resource, "value": value }))?;
    } else {
        show(&format!("{value}\n"))?;
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests;
