//! Parts of `userconfig.xml` that are understood and checked, and have no effect.
//!
//! One table per part, so that a slip of the pen in them is found all the same. Each one in use gets a warning.
//! When a part is built, its table goes away and a decoder takes its place. Called by [`super::module`] and
//! [`super::check`].

use super::decode::{Child, Node};
use super::report::{Report, Wrong};
use super::value::{self, Unit};

/// What an attribute holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Any text but none.
    Text,
    /// Any text.
    Free,
    /// A name.
    Name,
    /// Up to a day, in this unit.
    Duration(Unit),
    /// A whole number of this range.
    Number(i64, i64),
    /// One of these.
    Words(&'static [&'static str]),
    /// A numeric address.
    Addr,
    /// A port.
    Port,
}

/// An element.
pub(super) struct Shape {
    pub name: &'static str,
    attrs: &'static [(&'static str, Kind)],
    /// Attributes that must be written.
    needed: &'static [&'static str],
    children: &'static [Shape],
    /// Text may stand in it.
    text: bool,
}

const WHEN: Kind = Kind::Words(&["pre", "prim", "second", "both"]);
const ON_OFF: Kind = Kind::Words(&["on", "off"]);
const INTERVAL: (&str, Kind) = ("interval", Kind::Duration(Unit::Second));
const TIMEOUT: (&str, Kind) = ("timeout", Kind::Duration(Unit::Second));

const fn element(name: &'static str, attrs: &'static [(&'static str, Kind)], needed: &'static [&'static str]) -> Shape {
    Shape {
        name,
        attrs,
        needed,
        children: &[],
        text: false,
    }
}

const fn with_children(shape: Shape, children: &'static [Shape]) -> Shape {
    Shape { children, ..shape }
}

/// `<errd>`: watching processes.
pub(super) static ERRD: Shape = with_children(
    element("errd", &[("polltimer", Kind::Duration(Unit::Second))], &[]),
    &[element(
        "proc",
        &[
            ("name", Kind::Text),
            ("nameregex", Kind::Text),
            ("argregex", Kind::Text),
            ("service", Kind::Words(&["yes", "no"])),
            ("atleast", Kind::Number(-1, 1_000_000)),
            ("atmax", Kind::Number(-1, 1_000_000)),
            // Besides the usual words, the name of a program.
            ("action", Kind::Text),
            ("restart_services", Kind::Free),
            ("class", Kind::Words(&["prim", "both", "pre", "second", "sec", "other"])),
            ("start_after", Kind::Number(0, 1_000_000)),
        ],
        &[],
    )],
);

/// `<vhost>`: another host name for the application.
pub(super) static VHOST: Shape = with_children(
    element("vhost", &[], &[]),
    &[element(
        "virtualhostname",
        &[
            ("name", Kind::Text),
            ("envfile", Kind::Text),
            ("when", Kind::Words(&["prim", "second", "both"])),
        ],
        &["name"],
    )],
);

/// `<failover>`: rules of one's own.
pub(super) static FAILOVER: Shape = Shape {
    name: "failover",
    attrs: &[
        ("extends", Kind::Words(&["yes", "no"])),
        ("period", Kind::Duration(Unit::Milli)),
        ("handle_time", Kind::Duration(Unit::Milli)),
    ],
    needed: &[],
    children: &[],
    text: true,
};

/// The checkers of `<check>` besides `<tcp>`.
pub(super) static CHECKERS: [Shape; 6] = [
    with_children(
        element(
            "ping",
            &[
                ("ident", Kind::Name),
                ("when", WHEN),
                (
                    "action",
                    Kind::Words(&["wait", "noaction", "stop", "stopstart", "restart"]),
                ),
            ],
            &["ident"],
        ),
        &[element("to", &[("addr", Kind::Text), INTERVAL, TIMEOUT], &["addr"])],
    ),
    with_children(
        element("intf", &[("ident", Kind::Name), ("when", WHEN)], &["ident"]),
        &[element("to", &[("local_addr", Kind::Addr)], &["local_addr"])],
    ),
    with_children(
        element("ip", &[("ident", Kind::Name), ("when", WHEN)], &["ident"]),
        &[element("to", &[("addr", Kind::Addr), INTERVAL], &["addr"])],
    ),
    element(
        "custom",
        &[
            ("ident", Kind::Name),
            ("when", WHEN),
            ("exec", Kind::Text),
            ("arg", Kind::Free),
            (
                "action",
                Kind::Words(&["noaction", "wait", "stop", "stopstart", "restart"]),
            ),
        ],
        &["ident", "exec"],
    ),
    with_children(
        element("module", &[("name", Kind::Name), ("ident", Kind::Name)], &["name"]),
        &[element(
            "to",
            &[
                ("addr", Kind::Text),
                ("port", Kind::Port),
                INTERVAL,
                TIMEOUT,
                ("secure", ON_OFF),
            ],
            &[],
        )],
    ),
    element(
        "splitbrain",
        &[("ident", Kind::Name), ("exec", Kind::Text), ("arg", Kind::Free)],
        &["ident"],
    ),
];

/// Checks `child` against `shape`, and warns that it has no effect: once for each thing it would do, which is each of
/// its children where it is a mere list, else itself.
pub(super) fn check<'d>(report: &mut Report<'_>, child: &Child<'d>, shape: &'static Shape) -> Node<'d> {
    let node = fits(report, child, shape);
    let list = !shape.children.is_empty() && shape.needed.is_empty();
    let inner: Vec<&'static str> = shape.children.iter().map(|shape| shape.name).collect();
    // The children were checked with the shape; only their places are wanted here.
    let places = child
        .element()
        .children
        .iter()
        .zip(super::xml::child_paths(&node.path, &child.element().children));
    let mut warned = false;
    for (element, path) in places.filter(|(element, _)| list && inner.contains(&element.name.as_str())) {
        report.warning(element.span, &path, no_effect(&element.name));
        warned = true;
    }
    if !warned {
        report.warning(child.element().span, &node.path, no_effect(&child.element().name));
    }
    node
}

fn no_effect(name: &str) -> Wrong {
    Wrong::new(format!("`<{name}>` has no effect"))
}

/// Recursion is as deep as the tables are.
fn fits<'d>(report: &mut Report<'_>, child: &Child<'d>, shape: &'static Shape) -> Node<'d> {
    let names: Vec<&'static str> = shape.attrs.iter().map(|(name, _)| *name).collect();
    let node = if shape.text {
        Node::open_with_text(report, child.element(), child.path().to_owned(), &names)
    } else {
        child.open(report, &names)
    };
    for (name, kind) in shape.attrs {
        if shape.needed.contains(name) {
            node.need(report, name, |text| kind.check(text));
        } else {
            node.read(report, name, |text| kind.check(text));
        }
    }
    let names: Vec<&'static str> = shape.children.iter().map(|shape| shape.name).collect();
    let children = node.children(report, &names);
    for child in children.iter() {
        if let Some(shape) = shape.children.iter().find(|shape| shape.name == child.name()) {
            fits(report, child, shape);
        }
    }
    node
}

impl Kind {
    fn check(self, text: &str) -> Result<(), Wrong> {
        match self {
            Self::Text => value::text(text).map(drop),
            Self::Free => Ok(()),
            Self::Name => value::name(text).map(drop),
            Self::Duration(unit) => {
                let day = match unit {
                    Unit::Hour => 24,
                    Unit::Second => 86_400,
                    Unit::Milli => 86_400_000,
                };
                value::duration(text, unit, 1..=day).map(drop)
            }
            Self::Number(low, high) => value::number(low..=high)(text).map(drop),
            Self::Words(words) => {
                let words: Vec<(&'static str, ())> = words.iter().map(|word| (*word, ())).collect();
                value::word(&words)(text)
            }
            Self::Addr => value::addr(text).map(drop),
            Self::Port => value::port(text).map(drop),
        }
    }
}
