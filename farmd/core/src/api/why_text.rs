//! A verdict in words: what happens to a frame on this node, and why.
//!
//! Pure: text out of the core's decision. Every data plane's verdict is one of these.

use super::why::WhyVerdict;
use crate::balance::decide::{Decision, Reason, Verdict};
use crate::config::Affinity;
use crate::id::{NodeId, NodeSet};

/// What a frame is to the decision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// It starts something: a SYN, or a datagram.
    Opening,
    /// It belongs to a TCP connection, which this host has, or not.
    Belonging {
        /// It has it.
        here: bool,
    },
}

/// What is known around a decision.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// Names of the nodes.
    pub name: &'a dyn Fn(NodeId) -> String,
    /// Other nodes that have connections in the bucket.
    pub holders: NodeSet,
}

impl Scene<'_> {
    /// `decision` on `subject`, for an answer.
    pub fn verdict(&self, subject: Subject, decision: &Decision) -> WhyVerdict {
        let verdict = match decision.verdict {
            Verdict::Accept => "accept",
            Verdict::Drop => "drop",
            Verdict::Hold => "hold",
            Verdict::Pass => "pass",
        };
        WhyVerdict {
            verdict: verdict.to_owned(),
            reason: decision.reason.name().to_owned(),
            sent_on: decision.forward.iter().map(self.name).collect(),
            text: self.text(subject, decision),
        }
    }

    fn text(&self, subject: Subject, decision: &Decision) -> String {
        let mut text = self.reason(subject, decision);
        let also = match decision.verdict {
            Verdict::Accept => "a copy goes to",
            Verdict::Hold | Verdict::Pass => "the frame is sent on to",
            // That is all that happens to it, and no addition.
            Verdict::Drop => return text,
        };
        if !decision.forward.is_empty() {
            text.push_str(&format!("; {also} {}", self.list(decision.forward)));
        }
        text
    }

    fn reason(&self, subject: Subject, decision: &Decision) -> String {
        let owner = || decision.owner.map_or_else(|| "nobody".to_owned(), self.name);
        let holders = || match self.holders.is_empty() {
            true => "another node".to_owned(),
            false => self.list(self.holders),
        };
        match decision.reason {
            Reason::NotVip => "this host does not carry the address now".to_owned(),
            Reason::OtherMac => "the frame is not sent to the VIP's Ethernet address".to_owned(),
            Reason::NoRule => "no rule covers this protocol and port".to_owned(),
            Reason::Malformed => "its lengths lie".to_owned(),
            Reason::UnknownFragment => "a later fragment whose first one was not seen".to_owned(),
            Reason::Own => match subject {
                Subject::Opening | Subject::Belonging { here: true } => "the bucket is this node's alone".to_owned(),
                Subject::Belonging { here: false } => {
                    "the bucket is this node's alone; this host's stack resets what it does not know".to_owned()
                }
            },
            Reason::GuardedNew => format!(
                "the bucket is this node's; what is new is taken although {} still has connections in it",
                holders()
            ),
            Reason::GuardedKnown => "the bucket is this node's, and this host has the connection".to_owned(),
            Reason::GuardedUnknown => format!(
                "the bucket is this node's, but this host does not have the connection: it may be {}'s, so this host keeps silent (after the death of a node only until all say that it is nobody's)",
                holders()
            ),
            Reason::DrainingKnown => format!(
                "the bucket is {}'s by now, but this host has the connection and keeps it until it ends",
                owner()
            ),
            Reason::DrainingOther => match subject {
                Subject::Opening => format!(
                    "the bucket is {}'s by now; only connections that are here go on",
                    owner()
                ),
                Subject::Belonging { .. } => format!(
                    "the bucket is {}'s by now, and this host does not have the connection",
                    owner()
                ),
            },
            Reason::Foreign => format!("the bucket is {}'s", owner()),
            Reason::NoOwner => "the bucket is nobody's: no node is ready to serve it".to_owned(),
            Reason::Opening => {
                "the bucket is just changing hands: kept until it is open, for a second at most".to_owned()
            }
            Reason::HandedOver => format!("the bucket was this node's until just now, and is {}'s", owner()),
        }
    }

    fn list(&self, set: NodeSet) -> String {
        set.iter().map(self.name).collect::<Vec<_>>().join(" and ")
    }
}

/// The word of `userconfig.xml` for an affinity.
pub const fn filter_word(affinity: Affinity) -> &'static str {
    match affinity {
        Affinity::ClientIp => "on_addr",
        Affinity::ClientPort => "on_port",
        Affinity::ClientNet => "on_net",
        Affinity::IpId => "on_ipid",
    }
}

/// What a filter deals by, in words.
pub fn dealt_by(filter: &str) -> &'static str {
    match filter {
        "on_addr" => "by the client's address",
        "on_port" => "by the client's address and port",
        "on_net" => "by the client's network",
        "on_ipid" => "by each packet's IP identification",
        _ => "in a way that a newer farmd knows",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::explain::Inquiry;
    use crate::balance::plan::BucketState;
    use crate::balance::test_frames::{client, group, id, plan, rule, vip, vip_plan};
    use crate::config::{L2Mode, Protocol};

    /// Verdict, counter and words for each state, as one node of three sees it.
    #[test]
    fn each_verdict_says_what_happens_and_why() {
        let name = |node: NodeId| format!("s{}", node.index() + 1);
        let scene = Scene {
            name: &name,
            holders: [id(2)].into_iter().collect(),
        };
        let told = |state, owner, here| {
            let rules = vec![rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, 0)];
            let mut plan = plan(vip_plan(vip(), L2Mode::Directed, rules), vec![group(state, owner)]);
            plan.groups[0].holders = (0..4096).map(|i| (i, scene.holders)).collect();
            let inquiry = Inquiry {
                protocol: Protocol::Tcp,
                client: client(1),
                client_port: Some(4000),
                vip: vip(),
                vip_port: 80,
            };
            let judged = inquiry.judge(&plan, here);
            let opening = scene.verdict(Subject::Opening, &judged.opening);
            let belonging = scene.verdict(Subject::Belonging { here }, &judged.belonging.unwrap());
            (opening, belonging)
        };
        let (opening, belonging) = told(BucketState::Own, Some(0), false);
        assert_eq!((opening.verdict.as_str(), opening.reason.as_str()), ("accept", "own"));
        assert!(belonging.text.contains("resets what it does not know"), "{belonging:?}");
        assert_eq!(belonging.sent_on, ["s3"]);
        let (opening, belonging) = told(BucketState::Guarded, Some(0), false);
        assert!(opening.text.contains("although s3 still has"), "{opening:?}");
        assert_eq!(
            (belonging.verdict.as_str(), belonging.reason.as_str()),
            ("drop", "guarded_unknown")
        );
        let (opening, belonging) = told(BucketState::Draining, Some(1), true);
        assert!(opening.text.starts_with("the bucket is s2's by now") && !opening.text.contains("sent on"));
        assert_eq!(
            (opening.verdict.as_str(), &opening.sent_on[..]),
            ("drop", &["s2".to_owned()][..])
        );
        assert_eq!(belonging.verdict, "accept");
        let (opening, _) = told(BucketState::Foreign, None, false);
        assert_eq!((opening.verdict.as_str(), opening.sent_on.len()), ("drop", 0));
        assert!(opening.text.contains("nobody's"), "{opening:?}");
    }

    #[test]
    fn every_reason_has_words_of_its_own() {
        let name = |_: NodeId| "s1".to_owned();
        let scene = Scene {
            name: &name,
            holders: NodeSet::EMPTY,
        };
        let told = |reason| {
            let decision = Decision {
                verdict: Verdict::Drop,
                reason,
                forward: NodeSet::EMPTY,
                owner: None,
                place: None,
                opens: None,
            };
            scene.text(Subject::Opening, &decision)
        };
        let mut texts: Vec<String> = Reason::ALL.into_iter().map(told).collect();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), Reason::ALL.len());
    }

    #[test]
    fn every_filter_word_is_explained() {
        for affinity in [
            Affinity::ClientIp,
            Affinity::ClientPort,
            Affinity::ClientNet,
            Affinity::IpId,
        ] {
            assert!(!dealt_by(filter_word(affinity)).contains("newer"));
        }
    }
}
