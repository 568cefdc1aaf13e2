//! An entry of the history in words: one line that tells what, why and how long, and lines with the rest of what is known.
//!
//! Pure: text out of values. The command line lays it out; a console may show the same words.

use std::collections::BTreeMap;
use std::fmt;

use super::history::{Departure, DepartureCause, Happening, HistoryEntry, MapCause, Move, Owned};

/// Most nodes that the reason of a change names; of more it tells the number, and the details name them.
const NODES_NAMED: usize = 4;
/// Most groups whose buckets are told one by one; the details have them all.
const GROUPS_NAMED: usize = 2;
/// Most nodes that go out at once and have all that is known of them in the summary; of more the details tell.
const OUT_EXPLAINED: usize = 2;

/// How much an entry wants to be seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weight {
    /// Somebody did something.
    Notice,
    /// All is well, or well again.
    Good,
    /// Something changed.
    Change,
    /// Something is wrong.
    Bad,
}

impl HistoryEntry {
    /// A word of at most six letters for the kind of entry, and how much it wants to be seen.
    pub fn tag(&self) -> (&'static str, Weight) {
        match &self.what {
            Happening::Started { .. } => ("START", Weight::Notice),
            Happening::Stopped { .. } => ("END", Weight::Notice),
            Happening::NodeAlive { .. } => ("ALIVE", Weight::Good),
            Happening::NodeDown(out) if out.cause == DepartureCause::Left => ("LEFT", Weight::Change),
            Happening::NodeDown(_) => ("DOWN", Weight::Bad),
            Happening::ViewChanged { .. } => ("VIEW", Weight::Change),
            Happening::MapChanged { .. } => ("MAP", Weight::Change),
            Happening::MapLearned { .. } => ("LEARN", Weight::Change),
            Happening::Closed { .. } => ("CLOSED", Weight::Bad),
            Happening::Fenced { .. } => ("FENCED", Weight::Bad),
            Happening::Unfenced { .. } => ("BACK", Weight::Good),
            Happening::KeptOut { .. } => ("OUT", Weight::Bad),
            Happening::Readmitted => ("IN", Weight::Good),
            Happening::Paused { .. } => ("PAUSE", Weight::Bad),
            Happening::Asked { .. } => ("ASKED", Weight::Notice),
            Happening::Policy { serves: true, .. } => ("POLICY", Weight::Change),
            Happening::Policy { serves: false, .. } => ("POLICY", Weight::Bad),
            Happening::Unknown => ("?", Weight::Change),
        }
    }

    /// What happened, why, and how long it took, in one sentence.
    pub fn summary(&self) -> String {
        let module = self.module.as_deref().unwrap_or("?");
        match &self.what {
            Happening::Started {
                version,
                reloaded_by: Some(by),
                ..
            } => format!("farmd {version} restarted in place (reload by {by})"),
            Happening::Started {
                version,
                last_ended_in_order,
                ..
            } => {
                let last = match last_ended_in_order {
                    Some(false) => "; the run before was killed or crashed",
                    Some(true) | None => "",
                };
                format!("farmd {version} started{last}")
            }
            Happening::Stopped { by, reload: true } => {
                format!("farmd ends in order, to be restarted in place (reload by {by})")
            }
            Happening::Stopped { by, .. } => format!("farmd ends in order, asked by {by}"),
            Happening::NodeAlive { node, restarted } => {
                format!("{node} is alive{}", if *restarted { ", restarted" } else { "" })
            }
            Happening::NodeDown(out) => departure(out),
            Happening::ViewChanged {
                before,
                after,
                stood_ms,
                out,
            } => view(before, after, *stood_ms, out),
            Happening::MapChanged {
                group,
                causes,
                moved,
                counts,
                took_us,
                unserved_ms,
                ..
            } => {
                let what = if moved.is_empty() {
                    format!("now {}", shares(counts))
                } else {
                    moves(moved)
                };
                let time = match unserved_ms {
                    Some(ms) => format!("at most {ms} ms unserved"),
                    None => format!("took {}", millis(*took_us)),
                };
                let crowd = are_crowd(causes);
                let causes: Vec<String> = causes.iter().map(|c| cause(c, crowd)).collect();
                format!("{module}/{group}: {what}; {}; {time}", causes.join(", "))
            }
            Happening::MapLearned {
                group,
                causes,
                moved,
                counts,
                gave_up,
                unserved_ms,
                ..
            } => {
                let what = if moved.is_empty() { shares(counts) } else { moves(moved) };
                let what = format!("the others agreed on {what}");
                let crowd = are_crowd(causes);
                let causes: Vec<String> = causes.iter().map(|c| cause(c, crowd)).collect();
                let causes = (!causes.is_empty()).then(|| causes.join(", "));
                let gave_up = (*gave_up > 0).then(|| format!("this node yields {gave_up}"));
                let time = unserved_ms.map(|ms| format!("at most {ms} ms unserved"));
                let parts: Vec<String> = [Some(what), causes, gave_up, time].into_iter().flatten().collect();
                format!("{module}/{group}: {}", parts.join("; "))
            }
            Happening::Closed { group, buckets, why } => {
                format!(
                    "{module}/{group}: all {buckets} of this node closed at once{}",
                    because(why)
                )
            }
            Happening::Fenced { why, .. } => format!("this node has stepped out: {why}"),
            Happening::Unfenced { after_ms } => {
                let after = after_ms.map_or_else(String::new, |ms| format!(" after {}", seconds(ms)));
                format!("this node is heard again and joins{after}")
            }
            Happening::KeptOut { why } => format!("{module} is kept out: {why}"),
            Happening::Readmitted => format!("{module} is no longer kept out"),
            Happening::Paused { for_ms } => {
                format!(
                    "this node did not run for {}; it closed all and joins anew",
                    seconds(*for_ms)
                )
            }
            Happening::Asked { by, what } => match &self.module {
                Some(module) => format!("{by}: {what} {module}"),
                None => format!("{by}: {what}"),
            },
            Happening::Policy { policy, serves, why } => {
                let serves = if *serves {
                    "this side serves"
                } else {
                    "this side does not serve"
                };
                format!("{module}: policy {policy}: {serves}{}", because(why))
            }
            Happening::Unknown => "written by a newer farmd".to_owned(),
        }
    }

    /// What else is known, one fact a line.
    pub fn details(&self) -> Vec<String> {
        match &self.what {
            Happening::Started { incarnation, .. } => vec![format!("start number {incarnation}")],
            Happening::NodeDown(out) => witnesses(out),
            Happening::ViewChanged {
                before,
                after,
                stood_ms,
                out,
            } => {
                let stood = stood_ms.map_or_else(String::new, |ms| format!(", for {}", seconds(ms)));
                let mut lines = vec![
                    format!("before: {}{stood}", list(before)),
                    format!("after:  {}", list(after)),
                ];
                for out in out {
                    lines.push(departure(out));
                    lines.extend(witnesses(out));
                }
                lines
            }
            Happening::MapChanged {
                map,
                proposer,
                view,
                counts,
                took_us,
                causes,
                ..
            } => {
                let mut lines = vec![
                    format!(
                        "map {map}, proposed by {proposer} to {}, committed after {}",
                        list(view),
                        millis(*took_us)
                    ),
                    format!("now {}", shares(counts)),
                ];
                lines.extend(in_full(causes));
                lines
            }
            Happening::MapLearned {
                map,
                proposer,
                causes,
                moved,
                counts,
                after_ms,
                ..
            } => {
                let by = proposer
                    .as_ref()
                    .map_or_else(String::new, |by| format!(", proposed by {by}"));
                let after = match after_ms {
                    None => String::new(),
                    Some(ms) if causes.contains(&MapCause::Returned) => {
                        format!("; it was without one for {}", seconds(*ms))
                    }
                    Some(ms) => format!("; it had the one before for {}", seconds(*ms)),
                };
                let mut lines = vec![format!("map {map}{by}, agreed without this node{after}")];
                if !moved.is_empty() {
                    lines.push(format!("now {}", shares(counts)));
                }
                lines.extend(in_full(causes));
                lines
            }
            Happening::Fenced { observers, .. } => vec![format!("not heard by: {}", list(observers))],
            Happening::Stopped { .. }
            | Happening::NodeAlive { .. }
            | Happening::Closed { .. }
            | Happening::Unfenced { .. }
            | Happening::KeptOut { .. }
            | Happening::Readmitted
            | Happening::Paused { .. }
            | Happening::Asked { .. }
            | Happening::Policy { .. }
            | Happening::Unknown => Vec::new(),
        }
    }
}

fn departure(out: &Departure) -> String {
    let Departure {
        node,
        cause,
        observers,
        talk_with_it,
        silent_ms,
        owned,
        ..
    } = out;
    let by = match (observers.is_empty(), talk_with_it.is_empty()) {
        (true, _) => String::new(),
        (false, true) => format!(" by {}", list(observers)),
        (false, false) => format!(" by {}; still heard by {}", list(observers), list(talk_with_it)),
    };
    let what = match (cause, silent_ms) {
        (DepartureCause::Silent, Some(ms)) => format!("{node} not heard for {ms} ms{by}"),
        (DepartureCause::Silent, None) => format!("{node} not heard{by}"),
        (DepartureCause::Left, _) => format!("{node} left in order"),
        (DepartureCause::OtherCluster, _) => format!("{node} has another cluster.xml"),
        (DepartureCause::CutOff, _) => format!("{node} is cut off: nothing at all comes in there"),
        (DepartureCause::Deaf, _) if observers.is_empty() => format!("{node} is heard, and hears nobody"),
        (DepartureCause::Deaf, _) => format!("{node} is heard, and does not hear {}", list(observers)),
        (DepartureCause::LeftOut, _) => format!("{node} is left out: no link both ways with {}", list(observers)),
        (DepartureCause::Unknown, _) => format!("{node} is out"),
    };
    match buckets(owned, GROUPS_NAMED) {
        Some(buckets) => format!("{what}; owns {buckets}"),
        None => what,
    }
}

/// `1365 buckets of web/http, 1365 of web/https, 4096 of other groups`: at most `most` groups by name. `None` if there are none.
fn buckets(owned: &[Owned], most: usize) -> Option<String> {
    let (named, others) = owned.split_at(owned.len().min(most));
    let mut parts = Vec::new();
    for Owned { module, group, buckets } in named {
        let unit = if parts.is_empty() { " buckets" } else { "" };
        parts.push(format!("{buckets}{unit} of {module}/{group}"));
    }
    if !others.is_empty() {
        let rest: u64 = others.iter().map(|o| u64::from(o.buckets)).sum();
        parts.push(format!("{rest} of other groups"));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Why a node is out, who says so and for how long, with at most `most` nodes by name: `silent for 251 ms, seen by s1 s2`.
fn reason(cause: DepartureCause, silent_ms: Option<u64>, observers: &[String], most: usize) -> String {
    let by = match observers.len() {
        0 => None,
        number if number > most => Some(format!("{number} nodes")),
        _ => Some(list(observers)),
    };
    match (cause, by) {
        (DepartureCause::Silent, by) => {
            let time = silent_ms.map_or_else(String::new, |ms| format!(" for {ms} ms"));
            let by = by.map_or_else(String::new, |by| format!(", seen by {by}"));
            format!("{}{time}{by}", cause_word(cause))
        }
        (DepartureCause::Deaf, Some(by)) => format!("does not hear {by}"),
        (DepartureCause::LeftOut, Some(by)) => format!("no link both ways with {by}"),
        (cause, _) => cause_word(cause).to_owned(),
    }
}

fn witnesses(out: &Departure) -> Vec<String> {
    let mut lines = Vec::new();
    if out.cause != DepartureCause::Left {
        lines.push(format!(
            "no link both ways with {}: {}; still one: {}",
            out.node,
            list(&out.observers),
            list(&out.talk_with_it)
        ));
    }
    if !out.silent_ms_by_lan.is_empty() {
        let lans = out.silent_ms_by_lan.iter().map(|(lan, ms)| format!("{lan} {ms} ms"));
        lines.push(format!("last heard: {} ago", lans.collect::<Vec<_>>().join(", ")));
    }
    if out.owned.len() > GROUPS_NAMED
        && let Some(buckets) = buckets(&out.owned, usize::MAX)
    {
        lines.push(format!("of {}: {buckets}", out.node));
    }
    lines
}

fn view(before: &[String], after: &[String], stood_ms: Option<u64>, out: &[Departure]) -> String {
    let stood = stood_ms.map_or_else(String::new, |ms| format!(" after {}", seconds(ms)));
    if after.is_empty() {
        let owned = out.first().and_then(|out| buckets(&out.owned, GROUPS_NAMED));
        let owned = owned.map_or_else(String::new, |buckets| format!("; it had {buckets}"));
        return format!("{} -> none{stood}: this node is out{owned}", list(before));
    }
    let gone: Vec<String> = out.iter().map(|one| gone(one, out.len() > OUT_EXPLAINED)).collect();
    let come: Vec<&str> = after
        .iter()
        .filter(|n| !before.contains(n))
        .map(String::as_str)
        .collect();
    let mut parts = gone;
    if !come.is_empty() && !before.is_empty() {
        parts.push(format!("{} in", come.join(" ")));
    }
    let parts = if parts.is_empty() {
        String::new()
    } else {
        format!(": {}", parts.join(", "))
    };
    format!("{} -> {}{stood}{parts}", list(before), list(after))
}

/// One that is out of the view; in a `crowd` in a word.
fn gone(out: &Departure, crowd: bool) -> String {
    let node = &out.node;
    if crowd {
        return format!("{node} out ({})", cause_word(out.cause));
    }
    let why = reason(out.cause, out.silent_ms, &out.observers, NODES_NAMED);
    match buckets(&out.owned, GROUPS_NAMED) {
        Some(buckets) => format!("{node} out ({why}; owns {buckets})"),
        None => format!("{node} out ({why})"),
    }
}

/// So many nodes are out at once that one line cannot tell all of each.
fn are_crowd(causes: &[MapCause]) -> bool {
    let out = causes.iter().filter(|c| matches!(c, MapCause::NodeOut { .. }));
    out.count() > OUT_EXPLAINED
}

fn cause_word(cause: DepartureCause) -> &'static str {
    match cause {
        DepartureCause::Silent => "silent",
        DepartureCause::Left => "left in order",
        DepartureCause::OtherCluster => "other cluster.xml",
        DepartureCause::Deaf => "deaf",
        DepartureCause::CutOff => "nothing at all comes in there",
        DepartureCause::LeftOut => "others do not hear it",
        DepartureCause::Unknown => "unknown cause",
    }
}

impl fmt::Display for MapCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&cause(self, false))
    }
}

/// Why a map is another one; if a `crowd` is out, of each only a word.
fn cause(cause: &MapCause, crowd: bool) -> String {
    match cause {
        MapCause::First => "first map".to_owned(),
        MapCause::Returned => "this node is back".to_owned(),
        MapCause::NodeOut { node, why, .. } if crowd => format!("{node} out ({})", cause_word(*why)),
        MapCause::NodeOut {
            node,
            why,
            observers,
            silent_ms,
        } => format!("{node} out ({})", reason(*why, *silent_ms, observers, NODES_NAMED)),
        MapCause::NodeIn { node } => format!("{node} in"),
        MapCause::Weight { node, from: 0, .. } => format!("{node} ready"),
        MapCause::Weight { node, to: 0, why, .. } => {
            // The part that says who wanted it; the rest is in the details.
            let why = why.split(": ").next().unwrap_or_default();
            format!(
                "{node} leaves{}",
                if why.is_empty() {
                    String::new()
                } else {
                    format!(" ({why})")
                }
            )
        }
        MapCause::Weight { node, from, to, .. } => format!("weight of {node} {from} -> {to}"),
        MapCause::Merge { yields } => {
            let yields = yields.iter().map(|(node, buckets)| format!("{node} yields {buckets}"));
            format!("both sides served: {}", yields.collect::<Vec<_>>().join(", "))
        }
        MapCause::Evened => "shares evened out".to_owned(),
        MapCause::Unknown => "unknown cause".to_owned(),
    }
}

/// What the summary does not tell of `causes`.
fn in_full(causes: &[MapCause]) -> Vec<String> {
    let crowd = are_crowd(causes);
    let lines = causes.iter().filter_map(|cause| match cause {
        MapCause::Weight { node, from, to, why } => {
            Some(format!("weight of {node}: {from} before, {to} now{}", because(why)))
        }
        MapCause::NodeOut {
            node,
            why,
            observers,
            silent_ms,
        } if crowd || observers.len() > NODES_NAMED => Some(format!(
            "{node} out: {}",
            reason(*why, *silent_ms, observers, usize::MAX)
        )),
        _ => None,
    });
    lines.collect()
}

/// `s3 -> s1 683, s2 682`: each giver once.
fn moves(moved: &[Move]) -> String {
    let mut givers: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for Move { from, to, buckets } in moved {
        let taker = format!("{} {buckets}", to.as_deref().unwrap_or("nobody"));
        givers
            .entry(from.as_deref().unwrap_or("nobody"))
            .or_default()
            .push(taker);
    }
    let parts = givers.iter().map(|(from, to)| format!("{from} -> {}", to.join(", ")));
    parts.collect::<Vec<_>>().join("; ")
}

fn shares(counts: &BTreeMap<String, u32>) -> String {
    let parts: Vec<String> = counts.iter().map(|(node, count)| format!("{node} {count}")).collect();
    if parts.is_empty() {
        "nobody has any".to_owned()
    } else {
        parts.join(", ")
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(" ")
    }
}

fn because(why: &str) -> String {
    if why.is_empty() {
        String::new()
    } else {
        format!(": {why}")
    }
}

/// `4.2 ms`, `269 ms`, `2.3 s`.
fn millis(us: u64) -> String {
    match us {
        0..=9_999 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        10_000..=999_999 => format!("{} ms", us / 1000),
        _ => seconds(us / 1000),
    }
}

/// `480 ms`, `2.3 s`, `5 min 10 s`, `2 h 5 min`, `31 d 4 h`.
fn seconds(ms: u64) -> String {
    match ms {
        0..=999 => format!("{ms} ms"),
        1_000..=59_999 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..=3_599_999 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..=86_399_999 => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{} d {} h", ms / 86_400_000, ms % 86_400_000 / 3_600_000),
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
