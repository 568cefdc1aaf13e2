//! The words that only modules' scripts use, and those of SafeKit's command that have no meaning here.

use std::ffi::OsString;

use farm_core::api::{PrintRequest, ResourceRequest};

use crate::args::{PrintArgs, SetArgs};
use crate::client::Client;
use crate::command::finish;
use crate::failure::Failure;
use crate::folders::Context;

/// Runs `printi` and `printe`.
pub fn print(context: &Context, level: char, args: &PrintArgs) -> Result<u8, Failure> {
    let module = context.module(None)?;
    let request = PrintRequest {
        level,
        text: args.text.join(" "),
        origin: args.identity.clone(),
    };
    let reply = Client::new(context)?.command(&module, "print", &request, |_| {})?;
    finish(context, &module, "print", Vec::new(), reply, false)
}

/// Runs `set`.
pub fn set(context: &Context, args: &SetArgs) -> Result<u8, Failure> {
    let module = context.module(None)?;
    let request = ResourceRequest {
        resource: args.resource.clone(),
        value: args.value.clone(),
        identity: args.identity.clone(),
    };
    let reply = Client::new(context)?.command(&module, "resource", &request, |_| {})?;
    finish(context, &module, "set", Vec::new(), reply, false)
}

/// Words of SafeKit's command that a module or an administrator may bring along, and what to use instead.
const NOT_HERE: [(&str, &str); 25] = [
    (
        "-E",
        "copy the folder of the module to each node and run `farm config AM` there",
    ),
    ("-G", "copy cluster.xml and cluster.key to each node"),
    ("-p", "the folders are --etc, --var and --run"),
    ("-r", "SafeKit's special commands have no counterpart"),
    (
        "boot",
        "the `boot` attribute of <service> says what starts with the daemon",
    ),
    ("checker", "checkers cannot be switched off by hand"),
    (
        "checkloop",
        "`farm get -r` and the log show restarts; maxloop is kept by the daemon",
    ),
    ("clean", "`farm cleanup` undoes what a killed daemon left"),
    ("cmdlog", "the audit of commands is VAR/audit.log"),
    ("confinfo", "`farm status -v` shows what is active"),
    ("dump", "use `farm snapshot FILE.zip`"),
    ("errd", "processes are not watched"),
    ("failover", "failover rules cannot be switched off by hand"),
    ("incloop", "the daemon counts every command given with -i"),
    ("kill", "the daemon ends a script with its whole process group"),
    ("level", "use `farm --version`"),
    ("logsave", "use `farm log AM -n N > FILE`"),
    ("logview", "use `farm log AM -f`"),
    ("notification", "follow `farm log AM -f --json`"),
    ("prim", "a farm has no primary; this is for mirror modules"),
    ("primforce", "a farm has no primary; this is for mirror modules"),
    ("resetloop", "any command given without -i resets the count"),
    ("second", "a farm has no secondary; this is for mirror modules"),
    ("swap", "a farm has no primary; this is for mirror modules"),
    ("update", "use `farm config AM`"),
];

/// A clearer text than "unknown word" if the first word after the program is one of SafeKit's.
pub fn explain(words: &[OsString]) -> Option<String> {
    let word = words.get(1)?.to_str()?;
    let (_, instead) = NOT_HERE.iter().find(|(name, _)| *name == word)?;
    Some(format!("`{word}` is not known here: {instead}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_word_says_what_to_do_instead() {
        let explained = |line: &str| explain(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(explained("safekit swap -m a").unwrap().contains("mirror"));
        assert_eq!(explained("safekit strat"), None);
        assert_eq!(explained("safekit"), None);
    }
}
