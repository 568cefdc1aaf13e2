//! The kernel program at an interface: on it once, off it again, and left there for the next farmd.

use std::process::Command;

use farm_sys::bpf::{Attachment, BpfError, Filter, Predecessor, remove_left_filters};
use farm_sys::interface;
use farm_sys::netns::NetNs;

use crate::lab::{self, Lab};

/// The program, attached to `a0` in the way that is asked for.
fn attached(attachment: Attachment, index: u32) -> Result<Filter, BpfError> {
    let mut filter = Filter::load()?;
    filter.set_attachment(attachment);
    filter.attach(index, "a0")?;
    Ok(filter)
}

/// Runs tc(8) in the calling thread's namespace; `a0` is put behind the first two words.
fn tc(args: &[&str]) -> String {
    let mut command = Command::new("tc");
    command.args(&args[..2]).args(["dev", "a0"]).args(&args[2..]);
    NetNs::current().unwrap().command(&mut command);
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

fn filters() -> usize {
    tc(&["filter", "show", "ingress"]).matches("direct-action").count()
}

// In one test, because what is left is left to the whole process.
#[test]
fn what_is_left_to_the_next_farmd_is_found_once_and_everything_else_goes_with_its_owner() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        let index = interface::index("a0").unwrap();
        match Filter::load() {
            Err(error) if error.is_missing() && std::env::var_os("FARM_NEED_BPF").is_none() => {
                eprintln!("skipped: {error}");
                return;
            }
            loaded => drop(loaded.unwrap()),
        }
        let left = || Predecessor::find().unwrap();

        let mut link = attached(Attachment::Tcx, index).unwrap();
        assert!(link.is_in_place(index).unwrap());
        assert_eq!(left().interfaces().count(), 0, "a link of this process itself");
        link.detach(index);
        assert!(!link.is_in_place(index).unwrap());
        link.attach(index, "a0").unwrap();
        link.leave().unwrap();
        drop(link);
        let mut before = left();
        assert_eq!(before.interfaces().collect::<Vec<_>>(), [index]);
        assert_eq!(left().interfaces().count(), 0, "each is found once");
        before.end(index);
        assert_eq!(before.interfaces().count(), 0);

        let mut old = attached(Attachment::Clsact, index).unwrap();
        let new = attached(Attachment::Clsact, index).unwrap();
        assert_eq!(filters(), 2, "one beside the other");
        let shown = tc(&["filter", "show", "ingress"]);
        assert!(
            shown.find("0xfa120012").unwrap() < shown.find("0xfa120011").unwrap(),
            "the newer one is ahead: {shown}"
        );
        old.leave().unwrap();
        drop(old);
        assert!(new.is_in_place(index).unwrap());
        drop(new);
        assert_eq!(filters(), 1, "what was left stays");
        assert_eq!(left().interfaces().collect::<Vec<_>>(), [index]);
        assert_eq!(filters(), 0, "and goes with whom it was left to");
        assert!(!tc(&["qdisc", "show"]).contains("clsact"));

        let mut killed = attached(Attachment::Clsact, index).unwrap();
        killed.leave().unwrap();
        assert_eq!(remove_left_filters().unwrap(), ["a0"]);
        assert!(remove_left_filters().unwrap().is_empty());
        assert!(!tc(&["qdisc", "show"]).contains("clsact"));

        // Somebody else's stays as it is.
        tc(&["qdisc", "add", "clsact"]);
        drop(attached(Attachment::Clsact, index).unwrap());
        assert!(tc(&["qdisc", "show"]).contains("clsact"));
    });
}
