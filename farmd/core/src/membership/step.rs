//! The two state tables of the membership: what follows from how a peer sounds, and from what the surroundings call for.
//!
//! `farmd/docs/PROTOCOL.md`, "Who is alive", shows these tables; a test compares them.

use std::fmt;

use crate::id::NodeSet;
use crate::membership::{Cause, PeerState};

/// What was told of a peer last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// That it is down, or nothing yet.
    Down,
    /// That it is alive.
    Alive,
}

impl Standing {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 2] = [Self::Down, Self::Alive];
}

/// How a peer sounds; the first in this order that applies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sign {
    /// A heartbeat of a newer incarnation has come in; whether that one hears this node is judged next.
    Restarted,
    /// What it said last was of another `cluster.xml`.
    OtherFile,
    /// What it said last was a goodbye.
    Left,
    /// Nothing of it came in within the detection time, or ever.
    Silent,
    /// It is heard, and does not hear this node.
    Unheard,
    /// Both hear each other, and half the detection time has passed since its last word.
    Late,
    /// Both hear each other.
    Talks,
}

impl Sign {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 7] = [
        Self::Restarted,
        Self::OtherFile,
        Self::Left,
        Self::Silent,
        Self::Unheard,
        Self::Late,
        Self::Talks,
    ];

    /// The last column of the table.
    pub const fn state(self) -> PeerState {
        match self {
            Self::OtherFile | Self::Left | Self::Silent => PeerState::Down,
            Self::Restarted | Self::Unheard | Self::Late => PeerState::Suspect,
            Self::Talks => PeerState::Alive,
        }
    }
}

/// What is done about a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// Tells that it is alive.
    TellAlive,
    /// Tells that it is down, and why.
    TellDown,
    /// It stands as down, and nothing is told: the next judgement tells of its new incarnation.
    Forget,
    /// Nothing.
    Rest,
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rest => f.write_str("–"),
            judgement => write!(f, "{judgement:?}"),
        }
    }
}

/// The table of a peer.
pub const fn judge(standing: Standing, sign: Sign) -> Judgement {
    match (standing, sign) {
        (Standing::Down, Sign::Restarted) => Judgement::Rest,
        (Standing::Alive, Sign::Restarted) => Judgement::Forget,

        (Standing::Down, Sign::OtherFile | Sign::Left | Sign::Silent | Sign::Unheard) => Judgement::Rest,
        (Standing::Alive, Sign::OtherFile | Sign::Left | Sign::Silent | Sign::Unheard) => Judgement::TellDown,

        (Standing::Down, Sign::Late | Sign::Talks) => Judgement::TellAlive,
        (Standing::Alive, Sign::Late | Sign::Talks) => Judgement::Rest,
    }
}

/// Where this node stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Has just started, or was paused.
    Joining,
    /// The same, and has stepped out.
    JoiningOut,
    /// Has joined.
    Member,
    /// Has joined, and has stepped out.
    Out,
}

impl Phase {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Joining, Self::JoiningOut, Self::Member, Self::Out];
}

/// What the surroundings call for. The first two are seen to when they come; of the others one always applies, the first in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cue {
    /// This node was not run for so long that others may have gone on without it.
    Paused,
    /// The time of joining is over.
    TimeUp,
    /// It was told lately that others hear it, and it hears nobody.
    Deaf,
    /// It hears nobody, and nothing at all comes in.
    CutOff,
    /// So many settled nodes have another `cluster.xml`, and theirs counts.
    OtherFile(usize),
    /// The agreement leaves this node out; so many of the nodes it hears do not hear it. Does not come to a joining node, see [`next`].
    LeftOut(usize),
    /// The agreement gives this view.
    Agreed(NodeSet),
}

impl Cue {
    /// Why this node has to be out; `None` if it need not be.
    pub fn why_out(self) -> Option<String> {
        match self {
            Self::Deaf => Some(
                "the other nodes hear it and it hears none of them: their heartbeats (UDP) do not come in".to_owned(),
            ),
            Self::CutOff => Some("nothing at all comes in: no heartbeat, and no frame of anybody".to_owned()),
            Self::OtherFile(theirs) => Some(format!(
                "cluster.xml differs from that of {theirs} other nodes; make the files equal, then farm reload"
            )),
            Self::LeftOut(0) => Some("it cannot agree with the nodes that go on".to_owned()),
            Self::LeftOut(unheard) => Some(format!("{unheard} of the nodes it hears do not hear it")),
            Self::Paused | Self::TimeUp | Self::Agreed(_) => None,
        }
    }

    /// What is wrong with this node, in the words of [`Cause`]; `None` if nothing is.
    pub const fn cause(self) -> Option<Cause> {
        match self {
            Self::Deaf => Some(Cause::Deaf),
            Self::CutOff => Some(Cause::CutOff),
            Self::OtherFile(_) => Some(Cause::OtherCluster),
            Self::LeftOut(_) => Some(Cause::LeftOut),
            Self::Paused | Self::TimeUp | Self::Agreed(_) => None,
        }
    }

    /// True if others may hear this node, which hears nobody.
    pub const fn is_cut_off(self) -> bool {
        match self {
            Self::Deaf | Self::CutOff => true,
            Self::Paused | Self::TimeUp | Self::OtherFile(_) | Self::LeftOut(_) | Self::Agreed(_) => false,
        }
    }
}

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Forgets whom it has heard, and is joining from now on.
    JoinAnew,
    /// Has joined, and tells so.
    Finish,
    /// Leaves the view and tells why.
    StepOut,
    /// Stays out, for the reason there is by now.
    StayOut,
    /// Takes the view.
    GoOn,
    /// Takes the view and tells that it is back.
    Return,
    /// Nothing.
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

/// The table of this node.
///
/// Joining and being out do not exclude each other: neither the end of joining nor a pause brings a node back in, and who is joining steps
/// out too when it is deaf, cut off or has the wrong file. It serves nothing, so that it need not step out for nodes it cannot agree with:
/// [`super::view::agree`] gives it a view of its own, which is [`Cue::Agreed`].
pub const fn next(phase: Phase, cue: Cue) -> Step {
    match (phase, cue) {
        (Phase::Joining | Phase::JoiningOut | Phase::Member | Phase::Out, Cue::Paused) => Step::JoinAnew,

        (Phase::Joining | Phase::JoiningOut, Cue::TimeUp) => Step::Finish,
        (Phase::Member | Phase::Out, Cue::TimeUp) => Step::Rest,

        (Phase::Joining | Phase::Member, Cue::Deaf | Cue::CutOff | Cue::OtherFile(_)) => Step::StepOut,
        (Phase::JoiningOut | Phase::Out, Cue::Deaf | Cue::CutOff | Cue::OtherFile(_)) => Step::StayOut,

        (Phase::Joining | Phase::JoiningOut, Cue::LeftOut(_)) => Step::Rest,
        (Phase::Member, Cue::LeftOut(_)) => Step::StepOut,
        (Phase::Out, Cue::LeftOut(_)) => Step::StayOut,

        (Phase::Joining | Phase::Member, Cue::Agreed(_)) => Step::GoOn,
        (Phase::JoiningOut | Phase::Out, Cue::Agreed(_)) => Step::Return,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUES: [Cue; 7] = [
        Cue::Paused,
        Cue::TimeUp,
        Cue::Deaf,
        Cue::CutOff,
        Cue::OtherFile(1),
        Cue::LeftOut(1),
        Cue::Agreed(NodeSet::EMPTY),
    ];

    /// A table as `PROTOCOL.md` shows it.
    fn table<const COLUMNS: usize>(head: [String; COLUMNS], lines: &[(String, [String; COLUMNS])]) -> String {
        let mut text = format!("| | {} |\n", head.join(" | "));
        text += &format!("| --- |{}\n", " --- |".repeat(COLUMNS));
        for (name, cells) in lines {
            text += &format!("| {name} | {} |\n", cells.join(" | "));
        }
        text
    }

    fn table_of_a_peer() -> String {
        let [down, alive] = Standing::ALL;
        let lines = Sign::ALL.map(|sign| {
            let cells = [
                judge(down, sign).to_string(),
                judge(alive, sign).to_string(),
                format!("{:?}", sign.state()),
            ];
            (format!("{sign:?}"), cells)
        });
        table([format!("{down:?}"), format!("{alive:?}"), "state".to_owned()], &lines)
    }

    fn table_of_this_node() -> String {
        let name = |cue: Cue| format!("{cue:?}").split('(').next().unwrap().to_owned();
        let lines = CUES.map(|cue| (name(cue), Phase::ALL.map(|phase| next(phase, cue).to_string())));
        table(Phase::ALL.map(|phase| format!("{phase:?}")), &lines)
    }

    #[test]
    fn the_document_shows_these_tables() {
        let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/PROTOCOL.md");
        let document = std::fs::read_to_string(document).unwrap();
        for table in [table_of_a_peer(), table_of_this_node()] {
            assert!(
                document.contains(&table),
                "farmd/docs/PROTOCOL.md should show:\n{table}"
            );
        }
    }

    #[test]
    fn who_is_told_to_be_alive_is_heard_and_no_sign_is_told_twice() {
        for sign in Sign::ALL {
            let (down, alive) = (judge(Standing::Down, sign), judge(Standing::Alive, sign));
            assert_eq!(down == Judgement::TellAlive, alive == Judgement::Rest, "{sign:?}");
            assert!(down == Judgement::Rest || sign.state() != PeerState::Down, "{sign:?}");
        }
    }

    #[test]
    fn who_is_out_has_a_reason_and_nobody_steps_out_or_comes_back_twice() {
        for phase in Phase::ALL {
            let out = matches!(phase, Phase::JoiningOut | Phase::Out);
            for cue in CUES {
                match next(phase, cue) {
                    Step::StepOut => assert!(!out && cue.why_out().is_some(), "{phase:?}, {cue:?}"),
                    Step::StayOut => assert!(out && cue.why_out().is_some(), "{phase:?}, {cue:?}"),
                    Step::GoOn => assert!(!out && cue.why_out().is_none(), "{phase:?}, {cue:?}"),
                    Step::Return => assert!(out && cue.why_out().is_none(), "{phase:?}, {cue:?}"),
                    Step::JoinAnew | Step::Finish | Step::Rest => {}
                }
            }
        }
    }
}
