//! Names of a module's scripts and the ways a run can end.

use std::fmt;

/// One run of a module's script.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Script {
    /// Before anything else at start: clears what an earlier run left behind. May be missing.
    Prestart,
    /// Starts the application; traffic comes only after it has succeeded.
    StartBoth,
    /// Stops the application gracefully.
    StopBoth,
    /// Second pass of the same file, with `force` as its first argument: ends what the graceful pass left.
    StopBothForce,
    /// After everything else at stop. May be missing.
    Poststop,
}

impl Script {
    /// All runs there are, in the order of a module's life.
    pub const ALL: [Self; 5] = [
        Self::Prestart,
        Self::StartBoth,
        Self::StopBoth,
        Self::StopBothForce,
        Self::Poststop,
    ];

    /// Name of the file under `bin/`; both passes of `stop_both` are the same file.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::StartBoth => "start_both",
            Self::StopBoth | Self::StopBothForce => "stop_both",
            Self::Poststop => "poststop",
        }
    }

    /// True if a module with `<user>` cannot work without the file.
    pub const fn is_required(self) -> bool {
        match self {
            Self::StartBoth | Self::StopBoth | Self::StopBothForce => true,
            Self::Prestart | Self::Poststop => false,
        }
    }
}

/// The file name, followed by `force` for the second pass of `stop_both`.
impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file_name())?;
        match self {
            Self::StopBothForce => f.write_str(" force"),
            Self::Prestart | Self::StartBoth | Self::StopBoth | Self::Poststop => Ok(()),
        }
    }
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ScriptOutcome {
    /// By itself, with this exit code.
    Exited(i32),
    /// By itself, with this exit code, not 0, and this last line of output.
    ExitedSaying(i32, String),
    /// By a signal that the daemon did not send.
    Signaled(i32),
    /// The daemon ended it with its whole process group: its time ran out or it was no longer wanted.
    TimedOut,
    /// There is no such file.
    Missing,
    /// The file is there and could not be run; the text says why.
    NotStarted(String),
}

/// The end of a sentence that begins with "failed:".
impl fmt::Display for ScriptOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::ExitedSaying(code, line) => write!(f, "exit code {code}: {line}"),
            Self::Signaled(signal) => write!(f, "ended by signal {signal}"),
            Self::TimedOut => f.write_str("did not end in time and was ended with its processes"),
            Self::Missing => f.write_str("there is no such file in bin"),
            Self::NotStarted(why) => write!(f, "could not be run: {why}"),
        }
    }
}
