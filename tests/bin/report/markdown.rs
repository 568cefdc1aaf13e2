//! From a record to the tables of a Markdown file.
//!
//! Owns what stands between `<!-- WHAT:NAME -->` and `<!-- /WHAT:NAME -->`, where WHAT is `chaos` or `bench` and NAME a matrix or part, `machine` or `summary`; the
//! rest of the file is somebody's prose and stays as it is. So no number in it is typed by hand.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use farm_lab::outcome::{Outcome, Table};

use super::record::{Kind, Record};

/// Fills the markers of `file`.
pub fn fill(record: &Record, file: &Path, kind: Kind) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mark = kind.name();
    let mut filled = replace(&text, mark, "machine", &format!("{}.\n", record.machine))?;
    filled = replace(&filled, mark, "summary", &summary(record, kind))?;
    for outcome in &record.outcomes {
        filled = replace(&filled, mark, &outcome.matrix, &section(outcome, kind))?;
    }
    fs::write(file, filled).with_context(|| format!("cannot write {}", file.display()))
}

/// `text` with `new` between the markers called `name`.
fn replace(text: &str, mark: &str, name: &str, new: &str) -> Result<String> {
    let (open, close) = (format!("<!-- {mark}:{name} -->\n"), format!("<!-- /{mark}:{name} -->"));
    let Some((before, rest)) = text.split_once(&open) else {
        bail!("the file has no line `{}`", open.trim_end());
    };
    let Some((_, after)) = rest.split_once(&close) else {
        bail!("the file has no `{close}` after `{}`", open.trim_end());
    };
    Ok(format!("{before}{open}{new}{close}{after}"))
}

fn section(outcome: &Outcome, kind: Kind) -> String {
    let mut text: String = outcome.tables.iter().map(table).collect();
    for note in &outcome.notes {
        text.push_str(&format!("{note}\n\n"));
    }
    let seed = match kind {
        Kind::Chaos => format!("seed {}, ", outcome.seed),
        Kind::Bench => String::new(),
    };
    text.push_str(&format!("({seed}{})\n", outcome.circumstances()));
    text
}

fn table(table: &Table) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule = vec!["---".to_owned(); table.columns.len()];
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    format!("{}:\n\n{}{}{rows}\n", table.title, line(&table.columns), line(&rule))
}

fn summary(record: &Record, kind: Kind) -> String {
    let mut text = String::from(match kind {
        Kind::Chaos => "| matrix | promises | goals |\n| --- | --- | --- |\n",
        Kind::Bench => "| part | goals |\n| --- | --- |\n",
    });
    for outcome in &record.outcomes {
        let list = |all: &[String], none: &str| match all {
            [] => none.to_owned(),
            few if few.len() <= CELL => few.join("; "),
            [first @ .., _] => {
                let first = &first[..CELL.min(first.len())];
                format!("{}; and {} more", first.join("; "), all.len() - first.len())
            }
        };
        let promises = match kind {
            Kind::Chaos => format!(" {} |", list(&outcome.violations, "kept")),
            Kind::Bench => String::new(),
        };
        let goals = list(&outcome.missed, "met");
        text.push_str(&format!("| {} |{promises} {goals} |\n", outcome.matrix));
    }
    text
}

/// What a cell has of a list; the JSON file has all.
const CELL: usize = 4;

#[cfg(test)]
mod tests {
    use farm_lab::outcome::Plane;

    use super::*;

    #[test]
    fn only_what_stands_between_the_markers_changes_and_twice_is_as_once() {
        let text = "a\n<!-- chaos:x -->\nold\n<!-- /chaos:x -->\nb\n";
        let once = replace(text, "chaos", "x", "new\n").unwrap();
        assert_eq!(once, "a\n<!-- chaos:x -->\nnew\n<!-- /chaos:x -->\nb\n");
        assert_eq!(replace(&once, "chaos", "x", "new\n").unwrap(), once);
        assert!(
            replace(text, "chaos", "y", "")
                .unwrap_err()
                .to_string()
                .contains("chaos:y")
        );
        assert!(replace(text, "bench", "x", "").is_err());
    }

    #[test]
    fn a_section_ends_with_its_seed_its_time_and_its_data_plane() {
        let mut outcome = Outcome::new("x", 3);
        outcome.seconds = 34.0;
        assert_eq!(section(&outcome, Kind::Chaos), "(seed 3, 34 s)\n");
        outcome.served_by(Plane {
            asked: "auto".to_owned(),
            used: "raw".to_owned(),
            why: String::new(),
        });
        assert_eq!(
            section(&outcome, Kind::Chaos),
            "(seed 3, 34 s, data plane raw (asked for: auto))\n"
        );
    }

    #[test]
    fn a_table_has_a_rule_under_its_head() {
        let mut one = Table::new("T", &["a", "b"]);
        one.row(["1".to_owned(), "2".to_owned()]);
        assert_eq!(table(&one), "T:\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n");
    }
}
