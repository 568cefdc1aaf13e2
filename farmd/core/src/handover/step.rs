//! The state table of a hand-over: which step follows from where this node stands and what its surroundings call for.
//!
//! `farmd/docs/PROTOCOL.md`, "Who owns what", shows this table; a test compares the two.

use std::collections::BTreeMap;
use std::fmt;

use crate::id::NodeId;
use crate::wire::heartbeat::MapReport;

/// Where this node stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Works with the committed map.
    Steady,
    /// Has closed buckets for a map agreed without it; the data plane has not confirmed.
    Yielding,
    /// Follows a proposal; the data plane has not confirmed what that closes, or does not work with the map before.
    Releasing,
    /// Has promised the proposal.
    Promised,
    /// Has closed everything; the data plane has not confirmed.
    Shutting,
    /// Everything is closed.
    Shut,
}

impl Phase {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 6] = [
        Self::Steady,
        Self::Yielding,
        Self::Releasing,
        Self::Promised,
        Self::Shutting,
        Self::Shut,
    ];
}

/// What the surroundings call for; the first in this order that applies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cue {
    /// The data plane works with the plan that was waited for.
    Applied,
    /// Everything must be closed, or the connections in it must now be treated otherwise.
    Close,
    /// A peer works with a newer map that was agreed without this node.
    Newer(MapReport),
    /// Everything must stay closed, and the epoch that was committed before is still told.
    Outdated,
    /// Nothing has to stay closed any more.
    Reopen,
    /// The known map gives nothing that is not open already.
    NothingToOpen,
    /// The proposal followed here is agreed: a peer has committed it, or all have promised it to this node.
    Agreed,
    /// The coordinator proposes a map.
    Proposal(NodeId, MapReport),
    /// This node coordinates, and the shares are not what these weights ask for.
    Unbalanced(BTreeMap<NodeId, u16>),
    /// Nothing.
    Quiet,
}

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Takes the data plane's word: what was closed is closed; a proposal is promised.
    Confirm,
    /// Closes everything and withdraws the promise.
    Shut,
    /// Takes over the newer map and closes what is another's by it.
    Learn,
    /// Tells that nothing is committed.
    Forget,
    /// Takes part again, with nothing committed.
    Reopen,
    /// Counts the known map as committed.
    Adopt,
    /// Commits the proposal: opens what it gives.
    Commit,
    /// Follows the coordinator's proposal: closes what it takes.
    Follow,
    /// Proposes a map, and follows it.
    Propose,
    /// Waits.
    Rest,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rest => f.write_str("–"),
            step => write!(f, "{step:?}"),
        }
    }
}

/// The table.
///
/// What is promised is opened before it is closed again, so [`Cue::Agreed`] comes before the next proposal; while everything is closed only knowledge
/// is taken in; and while the data plane may still have open what is closed here, nothing is promised, opened or forgotten.
pub const fn next(phase: Phase, cue: &Cue) -> Step {
    match (phase, cue) {
        (Phase::Yielding | Phase::Releasing | Phase::Shutting, Cue::Applied) => Step::Confirm,
        (Phase::Steady | Phase::Promised | Phase::Shut, Cue::Applied) => Step::Rest,

        (
            Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised | Phase::Shutting | Phase::Shut,
            Cue::Close,
        ) => Step::Shut,

        (
            Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised | Phase::Shutting | Phase::Shut,
            Cue::Newer(_),
        ) => Step::Learn,

        (Phase::Shut, Cue::Outdated) => Step::Forget,
        (Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised | Phase::Shutting, Cue::Outdated) => {
            Step::Rest
        }

        (Phase::Shut, Cue::Reopen) => Step::Reopen,
        (Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised | Phase::Shutting, Cue::Reopen) => {
            Step::Rest
        }

        (Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised, Cue::NothingToOpen) => Step::Adopt,
        (Phase::Shutting | Phase::Shut, Cue::NothingToOpen) => Step::Rest,

        (Phase::Promised, Cue::Agreed) => Step::Commit,
        (Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Shutting | Phase::Shut, Cue::Agreed) => Step::Rest,

        (Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised, Cue::Proposal(..)) => Step::Follow,
        (Phase::Shutting | Phase::Shut, Cue::Proposal(..)) => Step::Rest,

        (Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised, Cue::Unbalanced(_)) => Step::Propose,
        (Phase::Shutting | Phase::Shut, Cue::Unbalanced(_)) => Step::Rest,

        (
            Phase::Steady | Phase::Yielding | Phase::Releasing | Phase::Promised | Phase::Shutting | Phase::Shut,
            Cue::Quiet,
        ) => Step::Rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as `PROTOCOL.md` shows it.
    fn table() -> String {
        let cues = [
            Cue::Applied,
            Cue::Close,
            Cue::Newer(MapReport::default()),
            Cue::Outdated,
            Cue::Reopen,
            Cue::NothingToOpen,
            Cue::Agreed,
            Cue::Proposal(NodeId::new(0).unwrap(), MapReport::default()),
            Cue::Unbalanced(BTreeMap::new()),
        ];
        let name = |cue: &Cue| format!("{cue:?}").split('(').next().unwrap().to_owned();
        let mut text = format!("| | {} |\n", Phase::ALL.map(|phase| format!("{phase:?}")).join(" | "));
        text += &format!("| --- |{}\n", " --- |".repeat(Phase::ALL.len()));
        for cue in &cues {
            let steps = Phase::ALL.map(|phase| next(phase, cue).to_string());
            text += &format!("| {} | {} |\n", name(cue), steps.join(" | "));
        }
        text
    }

    #[test]
    fn the_document_shows_this_table() {
        let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/PROTOCOL.md");
        let document = std::fs::read_to_string(document).unwrap();
        assert!(
            document.contains(&table()),
            "farmd/docs/PROTOCOL.md should show:\n{}",
            table()
        );
    }

    #[test]
    fn nothing_is_opened_or_told_as_closed_before_the_data_plane_has_confirmed() {
        for phase in [Phase::Yielding, Phase::Releasing, Phase::Shutting] {
            assert_eq!(next(phase, &Cue::Agreed), Step::Rest);
            assert_eq!(next(phase, &Cue::Outdated), Step::Rest);
            assert_eq!(next(phase, &Cue::Reopen), Step::Rest);
        }
    }
}
