//! Commands to one module: `start`, `stop` and their like, `config`, `deconfig`; and `shutdown`.

use std::cell::RefCell;
use std::io;

use farm_core::api::{CommandRequest, Reply, exit};
use farm_core::id::ModuleName;
use serde_json::json;

use crate::args::{CommandArgs, ModuleArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{show, show_json};

/// Runs `start`, `stop`, `restart`, `stopstart` and `forcestop`.
///
/// A command of a script or checker does not wait: the module may itself be waiting for that script to end.
pub fn run(context: &Context, verb: &str, args: &CommandArgs) -> Result<u8, Failure> {
    let module = context.module(args.module.as_deref())?;
    let by_script = args.identity.is_some() || context.in_script;
    let wait = args.wait || !(args.no_wait || by_script);
    let request = CommandRequest {
        by: String::new(),
        identity: args.identity.clone(),
        wait,
    };
    send(context, &module, verb, &request)
}

/// Runs `config` and `deconfig`.
pub fn configure(context: &Context, verb: &str, args: &ModuleArgs) -> Result<u8, Failure> {
    let module = context.module(args.module.as_deref())?;
    send(
        context,
        &module,
        verb,
        &CommandRequest {
            wait: true,
            ..CommandRequest::default()
        },
    )
}

/// Sends a command, shows what happens on the way, and says how it ended.
pub fn send(context: &Context, module: &ModuleName, verb: &str, request: &CommandRequest) -> Result<u8, Failure> {
    let client = Client::new(context)?;
    let steps = Steps::new(context);
    let reply = client.command(module, verb, request, |text| steps.add(text))?;
    finish(context, module, verb, steps.into_texts()?, reply, true)
}

/// Runs `shutdown`.
pub fn shutdown(context: &Context) -> Result<u8, Failure> {
    let client = Client::new(context)?;
    let steps = Steps::new(context);
    let reply = client.post("/v1/shutdown", &json!({}), |text| steps.add(text))?;
    steps.into_texts()?;
    match reply {
        Reply::Failed { error, code } => Err(Failure::new(known(code), error)),
        Reply::Done { text } | Reply::Progress { text } => {
            if context.json {
                show_json(&json!({ "text": text }))?;
            } else {
                show(&format!("{text}\n"))?;
            }
            Ok(exit::OK)
        }
    }
}

/// What happened on the way: shown at once to a person, kept for `--json`.
pub struct Steps {
    json: bool,
    texts: RefCell<Vec<String>>,
    broken: RefCell<Option<io::Error>>,
}

impl Steps {
    /// None yet.
    pub fn new(context: &Context) -> Self {
        Self {
            json: context.json,
            texts: RefCell::default(),
            broken: RefCell::default(),
        }
    }

    /// One more.
    pub fn add(&self, text: &str) {
        if !self.json
            && let Err(error) = show(&format!("  {text}\n"))
        {
            self.broken.replace(Some(error));
        }
        self.texts.borrow_mut().push(text.to_owned());
    }

    /// The texts, or why one of them could not be shown. The command went on meanwhile.
    pub fn into_texts(self) -> io::Result<Vec<String>> {
        match self.broken.into_inner() {
            Some(error) => Err(error),
            None => Ok(self.texts.into_inner()),
        }
    }
}

/// Says how a command ended. `loud` commands show what was reached; the others are for scripts.
pub fn finish(
    context: &Context,
    module: &ModuleName,
    verb: &str,
    steps: Vec<String>,
    reply: Reply,
    loud: bool,
) -> Result<u8, Failure> {
    match reply {
        Reply::Failed { error, code } => Err(Failure::new(known(code), format!("{verb} {module}: {error}"))
            .with("module", module.as_str())
            .with("verb", verb)
            .with("steps", steps)),
        Reply::Done { text } | Reply::Progress { text } => {
            if context.json {
                show_json(&json!({ "module": module.as_str(), "verb": verb, "text": text, "steps": steps }))?;
            } else if loud {
                show(&format!("{module}: {text}\n"))?;
            }
            Ok(exit::OK)
        }
    }
}

/// `code` if it is a documented one that tells a failure.
pub fn known(code: u8) -> u8 {
    use exit::{DATA, DEGRADED, DENIED, FAILED, IO, NO_DAEMON, NOT_FOUND, REFUSED, STOPPED, USAGE};
    let codes = [
        DATA, DEGRADED, DENIED, FAILED, IO, NO_DAEMON, NOT_FOUND, REFUSED, STOPPED, USAGE,
    ];
    if codes.contains(&code) { code } else { FAILED }
}
