//! `<macro>` and `%NAME%`.
//!
//! Replaces `%NAME%` in attribute values by the macro defined before it in the file, or else by the environment
//! variable of that name. `%%` stands for one `%`; a `%` that starts no `%NAME%` stands for itself. Each replaced
//! value remembers its macros, so that an error in it can name them. Called by [`super::module`] on the tree,
//! before anything is decoded.

use std::collections::{BTreeMap, BTreeSet};

use super::diag::nearest;
use super::report::{Report, Span, Wrong, quote};
use super::xml::{Attr, Element, Origin, child_paths};

/// Longest value after expansion, in bytes.
const MAX_VALUE: usize = 16 << 10;
/// Most bytes all expanded values of one file may have together.
const MAX_TOTAL: usize = 4 << 20;

/// A macro that was defined above the present place.
struct Macro {
    value: String,
    line: u32,
    /// Its value is wrong and was reported.
    reported: bool,
}

/// One `<macro>` as written, wherever it is in the file.
struct Written {
    span: Span,
    raw: String,
}

/// Expands all values of the tree under `root` and returns the macros with their values.
pub(super) fn expand(
    report: &mut Report<'_>,
    root: &mut Element,
    env: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut written = BTreeMap::new();
    for element in root.children.iter().filter(|child| child.name == "macro") {
        if let (Some(name), Some(value)) = (attr(element, "name"), attr(element, "value")) {
            let raw = value.value.clone();
            let span = element.span;
            written.entry(name.value.clone()).or_insert(Written { span, raw });
        }
    }
    let mut expander = Expander {
        report,
        env,
        written,
        defined: BTreeMap::new(),
        total: 0,
    };
    let root_path = root.name.clone();
    expander.attributes(&mut root.attrs, &root_path);
    let paths = child_paths(&root_path, &root.children);
    for (child, path) in root.children.iter_mut().zip(paths) {
        if child.name == "macro" {
            expander.define(child, &path);
        } else {
            expander.element(child, &path);
        }
    }
    let values = expander.defined.into_iter();
    values.map(|(name, defined)| (name, defined.value)).collect()
}

struct Expander<'r, 's, 'e> {
    report: &'r mut Report<'s>,
    env: &'e BTreeMap<String, String>,
    written: BTreeMap<String, Written>,
    defined: BTreeMap<String, Macro>,
    total: usize,
}

impl Expander<'_, '_, '_> {
    /// Recursion is as deep as the tree, which [`super::xml`] bounds.
    fn element(&mut self, element: &mut Element, path: &str) {
        self.attributes(&mut element.attrs, path);
        let paths = child_paths(path, &element.children);
        for (child, path) in element.children.iter_mut().zip(paths) {
            self.element(child, &path);
        }
    }

    fn attributes(&mut self, attrs: &mut [Attr], path: &str) {
        for attr in attrs.iter_mut().filter(|attr| attr.value.contains('%')) {
            self.value(attr, path, None);
        }
    }

    fn define(&mut self, element: &mut Element, path: &str) {
        let line = self.report.line(element.span);
        let name = attr(element, "name").map(|name| (name.value.clone(), name.value_span));
        if let Some(value) = element.attrs.iter_mut().find(|attr| attr.name == "value") {
            self.value(value, path, name.as_ref().map(|(name, _)| name.as_str()));
        }
        // What is missing is reported when the element is decoded.
        let (Some((name, span)), Some(value)) = (name, attr(element, "value")) else {
            return;
        };
        let name_path = format!("{path}/@name");
        if !is_name(&name) {
            let wrong = Wrong::new(format!("{} is no name of a macro", quote(&name)));
            let hint = "a letter or `_`, then letters, digits, `_`, `-` or `.` are expected";
            self.report.error(span, &name_path, wrong.hint(hint));
        } else if let Some(first) = self.defined.get(&name) {
            let wrong = Wrong::new(format!("the macro {} is defined twice", quote(&name)));
            let hint = format!("the first one is at line {}", first.line);
            self.report.error(span, &name_path, wrong.hint(hint));
        } else {
            let defined = Macro {
                value: value.value.clone(),
                line,
                reported: value.reported,
            };
            self.defined.insert(name, defined);
        }
    }

    /// Expands one value; `of` is the macro it defines.
    fn value(&mut self, attr: &mut Attr, path: &str, of: Option<&str>) {
        let path = format!("{path}/@{}", attr.name);
        let mut expanded = String::new();
        let mut rest = attr.value.as_str();
        let mut origins = Vec::new();
        let mut reported = attr.reported;
        while let Some(at) = rest.find('%') {
            let (before, from) = rest.split_at(at);
            expanded.push_str(before);
            let (piece, after) = piece(from);
            rest = after;
            match piece {
                Piece::Percent => expanded.push('%'),
                Piece::Name(name) => {
                    if let Some(known) = self.defined.get(name) {
                        reported |= known.reported;
                        expanded.push_str(&known.value);
                        origins.push(Origin::Macro(name.to_owned(), known.line));
                    } else if let Some(value) = self.env.get(name).filter(|_| !self.written.contains_key(name)) {
                        expanded.push_str(value);
                        origins.push(Origin::Environment(name.to_owned()));
                    } else {
                        let wrong = self.unknown(name, of);
                        self.report.error(attr.value_span, &path, wrong);
                        reported = true;
                    }
                }
            }
            if expanded.len() > MAX_VALUE {
                break;
            }
        }
        expanded.push_str(rest);
        self.total = self.total.saturating_add(expanded.len());
        if expanded.len() > MAX_VALUE || self.total > MAX_TOTAL {
            let wrong = Wrong::new("macros make this value, or all values together, too long");
            let hint = format!("at most {MAX_VALUE} bytes in one value and {MAX_TOTAL} in all are expected");
            self.report.error(attr.value_span, &path, wrong.hint(hint));
            expanded.clear();
            reported = true;
        }
        attr.value = expanded;
        attr.origins = origins;
        attr.reported = reported;
    }

    /// Why `%name%` has no value here.
    fn unknown(&self, name: &str, of: Option<&str>) -> Wrong {
        let Some(later) = self.written.get(name) else {
            let wrong = Wrong::new(format!(
                "{} is neither a macro nor an environment variable",
                quote(name)
            ));
            return match nearest(name, self.written.keys().map(String::as_str)) {
                Some(known) => wrong.hint(format!("did you mean `%{known}%`?")),
                None if self.written.is_empty() => {
                    wrong.hint("no macro is defined in this file; `%%` stands for one `%`")
                }
                None => wrong.hint("define it with `<macro name=… value=…/>` above; `%%` stands for one `%`"),
            };
        };
        if let Some(of) = of.filter(|&of| self.leads_to(name, of)) {
            let wrong = Wrong::new(format!("the macro {} refers to itself", quote(of)));
            let hint = format!("through `%{name}%`");
            return if name == of { wrong } else { wrong.hint(hint) };
        }
        let line = self.report.line(later.span);
        Wrong::new(format!("the macro {} is used before its definition", quote(name)))
            .hint(format!("move the definition of line {line} above this one"))
    }

    /// Whether the values of `from`, as written, refer to `to`, directly or through others.
    fn leads_to(&self, from: &str, to: &str) -> bool {
        let mut seen = BTreeSet::new();
        let mut next = vec![from];
        while let Some(name) = next.pop() {
            if name == to {
                return true;
            }
            if let Some(written) = self.written.get(name).filter(|_| seen.insert(name)) {
                next.extend(names(&written.raw));
            }
        }
        false
    }
}

/// The source text of `report` with the values under `root` in place of what was written.
pub(super) fn rewrite(text: &str, root: &Element) -> String {
    fn changed<'t>(element: &'t Element, found: &mut Vec<&'t Attr>) {
        found.extend(element.attrs.iter().filter(|attr| !attr.reported));
        for child in &element.children {
            changed(child, found);
        }
    }
    let mut attrs = Vec::new();
    changed(root, &mut attrs);
    attrs.sort_by_key(|attr| attr.value_span.start);
    let mut out = String::with_capacity(text.len());
    let mut copied = 0;
    for attr in attrs {
        let Span { start, end } = attr.value_span;
        let raw = text.get(start..end).unwrap_or("");
        if raw.contains('%') {
            out.push_str(text.get(copied..start).unwrap_or(""));
            escape_into(&mut out, &attr.value);
            copied = end;
        }
    }
    out.push_str(text.get(copied..).unwrap_or(""));
    out
}

fn escape_into(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\t' | '\n' | '\r' => out.push_str(&format!("&#{};", u32::from(c))),
            c => out.push(c),
        }
    }
}

/// What a `%` starts.
enum Piece<'t> {
    /// A `%` of the text.
    Percent,
    /// `%NAME%`.
    Name(&'t str),
}

/// Takes `%NAME%`, `%%` or a lone `%` from the start of `text`, which starts with `%`.
fn piece(text: &str) -> (Piece<'_>, &str) {
    let inner = text.get(1..).unwrap_or("");
    match inner.find('%') {
        Some(0) => (Piece::Percent, &inner[1..]),
        Some(end) if is_name(&inner[..end]) => (Piece::Name(&inner[..end]), &inner[end + 1..]),
        Some(_) | None => (Piece::Percent, inner),
    }
}

/// The names a text as written refers to.
fn names(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        let (piece, after) = piece(&rest[at..]);
        if let Piece::Name(name) = piece {
            found.push(name);
        }
        rest = after;
    }
    found
}

fn is_name(text: &str) -> bool {
    text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

fn attr<'t>(element: &'t Element, name: &str) -> Option<&'t Attr> {
    element.attrs.iter().find(|attr| attr.name == name)
}
