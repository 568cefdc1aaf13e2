//! What of a world counts for its fingerprint, in the terms of [`crate::fingerprint`].

use std::hash::{Hash, Hasher};

use crate::fingerprint::{Scale, Token, hasher};
use crate::node::{Datagram, Fixed, Input};
use crate::world::{Work, World};

impl World {
    fn tokens(&self) -> impl Iterator<Item = Token> {
        let pairs = self.parted.iter().map(|at| Token::Time(at.unwrap_or_default()));
        let last = self
            .last
            .map_or(0, |(id, by_clock)| 2 + 2 * id.index() + usize::from(by_clock));
        let own = [
            Token::Time(self.calm_since),
            Token::Same(last as u64),
            Token::Same(self.lan_down.map_or(0, |lan| 1 + lan as u64)),
            Token::Same(self.deaf.bits()),
            Token::Same(self.dead.bits()),
            Token::Same(self.breach.as_ref().map_or(0, |b| 1 + b.promise as u64)),
        ];
        let cut = self.cut.iter().map(|to| Token::Same(to.bits()));
        let hidden = self.hidden.iter().map(|at| at.map_or(Token::Same(0), Token::Time));
        let told = self.told.iter().map(|at| at.map_or(Token::Same(0), Token::Time));
        let spoken = self.spoken.iter().map(|at| Token::Time(*at));
        let nodes = self.nodes.iter().flat_map(|n| {
            n.tokens()
                .chain(self.numbers(n.seen.iter().flat_map(|lan| lan.iter().copied().enumerate())))
        });
        let inboxes = self
            .nodes
            .iter()
            .flat_map(|n| n.inbox.iter().map(move |input| (n, input)));
        let inboxes = inboxes.flat_map(|(node, input)| match input {
            Input::Datagram(datagram) => self.datagram_tokens(datagram),
            Input::Applied(version, held) => {
                let mut digest = hasher();
                held.hash(&mut digest);
                vec![node.behind(*version), Token::Same(digest.finish())]
            }
            Input::Module => vec![Token::Same(1)],
            Input::Timeout => vec![Token::Same(2)],
            Input::Told => vec![Token::Same(3)],
        });
        let queue = self.queue.iter().flat_map(|item| {
            let mut tokens = vec![Token::Time(item.due), Token::Same(item.late.into())];
            match &item.work {
                Work::Datagram(to, datagram) => {
                    tokens.push(Token::Same(to.index() as u64));
                    tokens.extend(self.datagram_tokens(datagram));
                }
                Work::Plan(of) => tokens.push(Token::Same(100 + of.index() as u64)),
                Work::Ready(of) => tokens.push(Token::Same(200 + of.index() as u64)),
                Work::Back(of) => tokens.push(Token::Same(300 + of.index() as u64)),
                Work::Told(to) => tokens.push(Token::Same(400 + to.index() as u64)),
                Work::Recording(to, datagram) => {
                    tokens.push(Token::Same(500 + to.index() as u64));
                    tokens.extend(self.datagram_tokens(datagram));
                }
            }
            tokens
        });
        own.into_iter()
            .chain(cut)
            .chain(hidden)
            .chain(told)
            .chain(spoken)
            .chain(pairs)
            .chain(nodes)
            .chain(inboxes)
            .chain(queue)
    }

    fn datagram_tokens(&self, datagram: &Datagram) -> Vec<Token> {
        let mut tokens = datagram.tokens.clone();
        tokens.push(Token::Same(datagram.lan as u64));
        tokens.extend(self.numbers(std::iter::once((
            datagram.from.index(),
            (datagram.incarnation, datagram.seq),
        ))));
        tokens.extend(self.numbers(datagram.acks.iter().map(|(n, number)| (n.index(), *number))));
        tokens
    }

    /// What sequence numbers, each with its sender's place and incarnation, mean.
    fn numbers(&self, numbers: impl Iterator<Item = (usize, (u64, u64))>) -> impl Iterator<Item = Token> {
        numbers.flat_map(|(sender, (incarnation, seq))| {
            let sender = &self.nodes[sender];
            let known = if incarnation == sender.incarnation { seq } else { 0 };
            let [at, later] = sender.seqs.mean(known);
            [Token::Same(incarnation), at, later]
        })
    }

    /// Equal in states that are one.
    pub fn fingerprint(&self, fixed: &Fixed) -> u64 {
        let tokens: Vec<Token> = self.tokens().collect();
        let epochs = tokens.iter().filter_map(|token| match token {
            Token::Epoch(epoch) if *epoch > 0 => Some(epoch >> 8),
            _ => None,
        });
        let scale = Scale {
            now: self.now,
            memory: fixed.memory(),
            epoch: epochs.min().unwrap_or(0),
        };
        let mut digest = hasher();
        self.budget.hash(&mut digest);
        for node in &self.nodes {
            node.plane.flows.hash(&mut digest);
        }
        tokens.iter().for_each(|token| scale.add(*token, &mut digest));
        digest.finish()
    }
}
