//! Elements to typed parts: which attributes and children an element has, and where a wrong one stands.
//!
//! Owns the rules every element shares: what is unknown is reported with the nearest valid word and then read as
//! that word, so that one slip of the pen hides no other; what is missing, repeated or out of place is reported;
//! a value that was already reported is passed over in silence. It knows elements by name only to say where one that
//! stands in the wrong place belongs.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::diag::nearest;
use super::report::{Report, Span, Wrong, one_of, quote};
use super::value::{self, Unit};
use super::xml::{Attr, Element, Origin, child_paths};

/// An element whose attributes are known to be its own.
pub(super) struct Node<'d> {
    pub element: &'d Element,
    pub path: String,
    /// Attributes by the name they are read as.
    attrs: Vec<(&'static str, &'d Attr)>,
}

impl<'d> Node<'d> {
    /// Takes `element`, which may have the attributes `known` and no text.
    pub fn open(report: &mut Report<'_>, element: &'d Element, path: String, known: &[&'static str]) -> Self {
        if let Some(span) = element.text.or(element.cdata) {
            let wrong = Wrong::new(format!("text is not expected in `<{}>`", element.name));
            report.error(
                span,
                &path,
                wrong.hint("only attributes and elements are; is a `<` missing?"),
            );
        }
        Self::open_with_text(report, element, path, known)
    }

    /// As [`Node::open`], where text is welcome.
    pub fn open_with_text(report: &mut Report<'_>, element: &'d Element, path: String, known: &[&'static str]) -> Self {
        let mut attrs: Vec<(&'static str, &'d Attr)> = Vec::new();
        let mut unknown = Vec::new();
        for attr in &element.attrs {
            match known.iter().find(|name| **name == attr.name) {
                Some(name) => attrs.push((name, attr)),
                None => unknown.push(attr),
            }
        }
        for attr in unknown {
            let free = known
                .iter()
                .copied()
                .filter(|name| !attrs.iter().any(|(taken, _)| taken == name));
            let meant = nearest(&attr.name, free);
            let wrong = Wrong::new(format!(
                "unknown attribute {} of `<{}>`",
                quote(&attr.name),
                element.name
            ));
            let wrong = match meant {
                Some(name) => wrong.hint(format!("did you mean `{name}`?")),
                None if known.is_empty() => wrong.hint("no attribute is expected"),
                None => wrong.hint(format!("{} is expected", one_of(known.iter().copied()))),
            };
            report.error(attr.name_span, &format!("{path}/@{}", attr.name), wrong);
            let meant = meant.and_then(|name| known.iter().find(|known| **known == name));
            attrs.extend(meant.map(|name| (*name, attr)));
        }
        Self { element, path, attrs }
    }

    fn attr(&self, name: &str) -> Option<&'d Attr> {
        self.attrs
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, attr)| *attr)
    }

    /// True if the attribute `name` is written, whatever its value.
    pub fn has(&self, name: &str) -> bool {
        self.attr(name).is_some()
    }

    /// Place of the value of `name`, or of the element if that is not written.
    pub fn span(&self, name: &str) -> Span {
        self.attr(name).map_or(self.element.span, |attr| attr.value_span)
    }

    /// Reports `wrong` at the value of `name`, with the macros the value was made of.
    pub fn error(&self, report: &mut Report<'_>, name: &str, mut wrong: Wrong) {
        if let Some(attr) = self.attr(name) {
            for origin in &attr.origins {
                let origin = match origin {
                    Origin::Macro(name, line) => {
                        format!(" (in macro {} defined at line {line}, used here)", quote(name))
                    }
                    Origin::Environment(name) => format!(" (in environment variable {}, used here)", quote(name)),
                };
                wrong.message.push_str(&origin);
            }
        }
        report.error(self.span(name), &format!("{}/@{name}", self.path), wrong);
    }

    /// Warns at the value of `name`.
    pub fn warning(&self, report: &mut Report<'_>, name: &str, wrong: Wrong) {
        report.warning(self.span(name), &format!("{}/@{name}", self.path), wrong);
    }

    /// Warns at the value of `name`, if that is written, that it has no effect.
    pub fn inert(&self, report: &mut Report<'_>, name: &str) {
        if self.has(name) {
            self.warning(report, name, Wrong::new(format!("`{name}` has no effect")));
        }
    }

    /// Reports `wrong` at the element itself.
    pub fn element_error(&self, report: &mut Report<'_>, wrong: Wrong) {
        report.error(self.element.span, &self.path, wrong);
    }

    /// Warns at the element itself.
    pub fn element_warning(&self, report: &mut Report<'_>, wrong: Wrong) {
        report.warning(self.element.span, &self.path, wrong);
    }

    /// The value of `name` as `parse` reads it; `None` if it is not written or, then reported, wrong.
    pub fn read<T>(
        &self,
        report: &mut Report<'_>,
        name: &str,
        parse: impl FnOnce(&'d str) -> Result<T, Wrong>,
    ) -> Option<T> {
        let attr = self.attr(name).filter(|attr| !attr.reported)?;
        match parse(&attr.value) {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.error(report, name, wrong);
                None
            }
        }
    }

    /// As [`Node::read`], for an attribute that must be written.
    pub fn need<T>(
        &self,
        report: &mut Report<'_>,
        name: &str,
        parse: impl FnOnce(&'d str) -> Result<T, Wrong>,
    ) -> Option<T> {
        if !self.has(name) && !self.element.damaged {
            let wrong = Wrong::new(format!("`<{}>` has no attribute `{name}`", self.element.name));
            self.element_error(report, wrong.hint(format!("`{name}=\"…\"` is expected")));
        }
        self.read(report, name, parse)
    }

    /// A duration of whole `unit`s, `range` of them; warns if it had to be rounded.
    pub fn duration(
        &self,
        report: &mut Report<'_>,
        name: &str,
        unit: Unit,
        range: RangeInclusive<u64>,
    ) -> Option<Duration> {
        let (duration, rounded) = self.read(report, name, |text| value::duration(text, unit, range))?;
        if rounded {
            let shown = match unit {
                Unit::Milli => format!("{}ms", duration.as_millis()),
                Unit::Second => format!("{}s", duration.as_secs()),
                Unit::Hour => format!("{}h", duration.as_secs() / 3600),
            };
            let wrong = Wrong::new(format!(
                "`{name}` is counted in whole {} and was rounded to {shown}",
                unit.words()
            ));
            self.warning(report, name, wrong);
        }
        Some(duration)
    }

    /// The children, which may be called `known`.
    pub fn children(&self, report: &mut Report<'_>, known: &[&'static str]) -> Children<'d> {
        let mut found = Vec::new();
        let paths = child_paths(&self.path, &self.element.children);
        for (child, path) in self.element.children.iter().zip(paths) {
            let name = match known.iter().find(|name| **name == child.name) {
                Some(name) => Some(*name),
                None => {
                    let wrong = Wrong::new(format!(
                        "unknown element `<{}>` in `<{}>`",
                        child.name, self.element.name
                    ));
                    let meant = nearest(&child.name, known.iter().copied());
                    let wrong = match meant {
                        Some(name) => wrong.hint(format!("did you mean `<{name}>`?")),
                        None => wrong.hint(where_else(&child.name, known)),
                    };
                    report.error(child.span, &path, wrong);
                    meant.and_then(|name| known.iter().copied().find(|known| *known == name))
                }
            };
            found.extend(name.map(|name| Child {
                name,
                element: child,
                path,
            }));
        }
        Children {
            parent: self.element,
            path: self.path.clone(),
            found,
        }
    }
}

/// One child of an element, by the name it is read as.
pub(super) struct Child<'d> {
    name: &'static str,
    element: &'d Element,
    path: String,
}

impl<'d> Child<'d> {
    /// Takes it with its attributes; see [`Node::open`].
    pub fn open(&self, report: &mut Report<'_>, known: &[&'static str]) -> Node<'d> {
        Node::open(report, self.element, self.path.clone(), known)
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    pub fn element(&self) -> &'d Element {
        self.element
    }

    pub fn path(&self) -> &str {
        &self.path
    }
}

/// The children of one element.
pub(super) struct Children<'d> {
    parent: &'d Element,
    path: String,
    found: Vec<Child<'d>>,
}

impl<'d> Children<'d> {
    /// All children, in file order.
    pub fn iter(&self) -> impl Iterator<Item = &Child<'d>> {
        self.found.iter()
    }

    /// All children called `name`, in file order.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &Child<'d>> {
        self.found.iter().filter(move |child| child.name == name)
    }

    /// The child called `name`; a second one is reported.
    pub fn one(&self, report: &mut Report<'_>, name: &str) -> Option<&Child<'d>> {
        let mut all = self.all(name);
        let first = all.next()?;
        for more in all {
            let wrong = Wrong::new(format!("a second `<{name}>` in `<{}>`", self.parent.name));
            let line = report.line(first.element.span);
            report.error(
                more.element.span,
                &more.path,
                wrong.hint(format!("the first one is at line {line}")),
            );
        }
        Some(first)
    }

    /// Reports the lack of any child called `name`.
    pub fn need(&self, report: &mut Report<'_>, name: &str) {
        if self.all(name).next().is_none() {
            let wrong = Wrong::new(format!("`<{}>` has no `<{name}>`", self.parent.name));
            report.error(
                self.parent.span,
                &self.path,
                wrong.hint(format!("`<{name} …/>` is expected in it")),
            );
        }
    }
}

/// Elements of `userconfig.xml` that are easily put one level too high or too low, and their parents.
const HOMES: [(&str, &str); 15] = [
    ("macro", "safe"),
    ("service", "safe"),
    ("farm", "service"),
    ("vip", "service"),
    ("user", "service"),
    ("check", "service"),
    ("lan", "farm"),
    ("interface", "interface_list"),
    ("virtual_interface", "interface"),
    ("virtual_addr", "virtual_interface"),
    ("group", "loadbalancing_list"),
    ("host", "cluster"),
    ("rule", "group"),
    ("tcp", "check"),
    ("var", "user"),
];

/// What to do about the element `name`, where only `known` may stand.
fn where_else(name: &str, known: &[&str]) -> String {
    if let Some((_, home)) = HOMES.iter().find(|(element, _)| *element == name) {
        return format!("`<{name}>` belongs into `<{home}>`");
    }
    if known.is_empty() {
        return "no element is expected".to_owned();
    }
    // Parts of mirror modules are known only to be refused.
    let expected = known.iter().filter(|name| !matches!(**name, "heart" | "rfs"));
    let tags: Vec<String> = expected.map(|name| format!("<{name}>")).collect();
    format!("{} is expected", one_of(tags.iter().map(String::as_str)))
}
