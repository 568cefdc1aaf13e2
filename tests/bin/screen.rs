//! What a person sees: headings, bars and a small picture, 80 columns wide, plain when not on a terminal.
//!
//! Owns the wording's shape, not its content. Never measures anything but the terminal.

use std::io::{IsTerminal, Write};
use std::process::{Command, Stdio};

use farm_lab::{Lab, VIP};

/// Columns of a full bar.
const BAR: usize = 40;

/// Columns before each line of a step.
const INDENT: usize = 5;
/// Columns before the rest of a line that is folded.
const HANG: usize = 8;

/// Where the show is printed.
pub struct Screen {
    tty: bool,
    colour: bool,
    steps: usize,
    step: usize,
}

impl Screen {
    /// Standard output, for a show of `steps` steps.
    pub fn new(steps: usize) -> Self {
        let tty = std::io::stdout().is_terminal();
        Self {
            tty,
            colour: tty && std::env::var_os("NO_COLOR").is_none(),
            steps,
            step: 0,
        }
    }

    /// True if a person watches.
    pub const fn is_terminal(&self) -> bool {
        self.tty
    }

    /// Begins the next step.
    pub fn step(&mut self, what: &str) {
        self.step += 1;
        println!(
            "\n{}",
            self.paint("1", &format!("{}/{}  {what}", self.step, self.steps))
        );
        let _ = std::io::stdout().flush();
    }

    /// One line of the present step.
    pub fn line(&self, text: &str) {
        println!("     {text}");
        let _ = std::io::stdout().flush();
    }

    /// A good end of something.
    pub fn good(&self, text: &str) {
        self.line(&self.paint("32", text));
    }

    /// A bad one.
    pub fn bad(&self, text: &str) {
        self.line(&self.paint("31", text));
    }

    /// Something of lesser weight.
    pub fn dim(&self, text: &str) {
        self.line(&self.paint("2", text));
    }

    /// Output of a program, indented as it is.
    pub fn quote(&self, text: &str) {
        for line in text.trim_end().lines() {
            self.line(line);
        }
    }

    /// `text` in lines that fit the terminal, so that [`Self::rewind`] meets each of them.
    pub fn folded(&self, text: &str) -> String {
        match self.tty.then(columns).flatten() {
            Some(columns) => fold(text, columns.saturating_sub(INDENT)),
            None => text.to_owned(),
        }
    }

    /// `label  ████████  count  share`.
    pub fn bar(&self, label: &str, count: usize, total: usize) {
        self.line(&self.bar_text(label, count, total));
    }

    /// The text of [`Self::bar`].
    pub fn bar_text(&self, label: &str, count: usize, total: usize) -> String {
        let share = if total == 0 { 0.0 } else { count as f64 / total as f64 };
        let full = ((share * BAR as f64).round() as usize).min(BAR);
        let (on, off) = if self.tty { ("█", "░") } else { ("#", ".") };
        let bar = format!(
            "{}{}",
            self.paint("36", &on.repeat(full)),
            self.paint("2", &off.repeat(BAR - full))
        );
        format!("{label:<8} {bar} {count:>6}  {:>3.0} %", share * 100.0)
    }

    /// Paints over the `lines` lines printed last, if this is a terminal.
    pub fn rewind(&self, lines: usize) {
        if self.tty && lines > 0 {
            print!("\x1b[{lines}A\x1b[J");
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Columns of the terminal; `None` if it does not tell. Asked anew each time: a window changes its size.
fn columns() -> Option<usize> {
    let mut stty = Command::new("stty");
    let told = stty
        .arg("size")
        .stdin(Stdio::inherit())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let told = String::from_utf8(told.stdout).ok()?;
    let columns = told.split_whitespace().nth(1)?.parse().ok()?;
    (columns > 2 * HANG + INDENT).then_some(columns)
}

/// Breaks lines longer than `width` at words. Lines with colours are taken to fit: they are bars.
fn fold(text: &str, width: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let mut rest: Vec<char> = line.trim_end().chars().collect();
        let mut first = true;
        while rest.len() > width && !rest.contains(&'\x1b') {
            // Not inside what begins the line: its columns are filled with blanks.
            let least = if first { width / 2 } else { HANG + 1 };
            let at = (least..=width).rev().find(|at| rest[*at] == ' ').unwrap_or(width);
            let tail: Vec<char> = rest.split_off(at).into_iter().skip_while(|c| *c == ' ').collect();
            lines.push(rest.iter().collect::<String>().trim_end().to_owned());
            rest = [vec![' '; HANG], tail].concat();
            first = false;
        }
        lines.push(rest.iter().collect());
    }
    lines.join("\n")
}

/// The farm of `lab` as a picture.
pub fn picture_of(lab: &Lab) -> String {
    let nodes: Vec<(String, String)> = lab
        .nodes
        .iter()
        .map(|n| (n.name().to_owned(), n.addr().to_string()))
        .collect();
    picture(&nodes, &format!("http://{VIP}/"))
}

fn picture(nodes: &[(String, String)], vip: &str) -> String {
    let mut text = String::new();
    let middle = nodes.len() / 2;
    for (index, (name, addr)) in nodes.iter().enumerate() {
        let corner = match (index, nodes.len() - 1 - index) {
            (0, 0) => "──",
            (0, _) => "┌─",
            (_, 0) => "└─",
            _ if index == middle => "┼─",
            _ => "├─",
        };
        let left = if index == middle {
            "clients ──── switch ──"
        } else {
            "                      "
        };
        text.push_str(&format!("{left}{corner} {name:<7} {addr:<13} farmd + web server\n"));
    }
    text.push_str(&format!(
        "\nOne address for all of them: {vip}\nNo load balancer in between: each server takes its share of the clients."
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_picture_fit_a_terminal_of_80_columns() {
        let screen = Screen {
            tty: true,
            colour: false,
            steps: 1,
            step: 0,
        };
        assert!(screen.bar_text("node16", 123_456, 200_000).chars().count() + 5 <= 80);
        let nodes: Vec<(String, String)> = (1..=16)
            .map(|i| (format!("node{i}"), format!("198.18.0.{i}")))
            .collect();
        assert!(
            picture(&nodes, "http://198.18.0.20/")
                .lines()
                .all(|line| line.chars().count() + 5 <= 80)
        );
    }

    #[test]
    fn long_lines_are_folded_at_words_and_nothing_is_lost() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let long = format!("  *node1  UP  Ready  web  why {}", "a reason that is long ".repeat(9));
        let text = format!("short\n{long}\n{}", "x".repeat(100));
        for width in [40, 75, 95] {
            let folded = fold(&text, width);
            assert!(folded.lines().all(|line| line.chars().count() <= width), "{folded}");
            assert_eq!(words(&folded)[..words(&long).len()], words(&text)[..words(&long).len()]);
            assert_eq!(folded.matches('x').count(), 100);
        }
        let bar = format!("\x1b[36m{}\x1b[0m", "█".repeat(60));
        assert_eq!(fold(&bar, 40), bar);
    }

    #[test]
    fn a_bar_shows_its_share() {
        let screen = Screen {
            tty: false,
            colour: false,
            steps: 1,
            step: 0,
        };
        let text = screen.bar_text("node1", 50, 200);
        assert_eq!((text.matches('#').count(), text.matches('.').count()), (10, 30));
        assert!(text.contains("25 %"));
    }
}
