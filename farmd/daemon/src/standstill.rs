//! What a thread of this process that does not get on is doing, as the kernel tells: the cause for the log when farmd ends because of one, or a
//! heartbeat goes late.
//!
//! Reads `/proc/self/task` (proc(5), and Documentation/scheduler/sched-stats of Linux for `schedstat`); changes nothing. Called by [`crate::node`].

use std::fs;
use std::path::Path;

/// One line on each thread called one of `names`: its state, the system call it is in, and for how long it ran and waited for a processor in its life.
/// What the kernel does not tell is left out; empty if there is no such thread.
pub fn describe(names: &[&str]) -> String {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return String::new();
    };
    let told = tasks.flatten().filter_map(|task| {
        let name = read(&task.path(), "comm")?;
        names.contains(&name.as_str()).then(|| tell(&name, &task.path()))
    });
    let mut told: Vec<String> = told.collect();
    told.sort_unstable();
    told.join("; ")
}

fn read(task: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(task.join(file)).ok()?;
    Some(text.trim().to_owned())
}

fn tell(name: &str, task: &Path) -> String {
    let mut told = format!("thread {name}:");
    // After the name in parentheses, which may have spaces in it.
    let state = read(task, "stat").and_then(|stat| stat.rsplit(") ").next()?.chars().next());
    told.push_str(match state {
        Some('R') => " runs or waits for a processor",
        Some('S') => " sleeps",
        Some('D') => " waits in the kernel",
        Some('T' | 't') => " is stopped",
        _ => " is in an unknown state",
    });
    if let Some(call) = read(task, "syscall")
        && let Some(number) = call.split(' ').next().filter(|number| number.parse::<u32>().is_ok())
    {
        told.push_str(&format!(", in system call {number}"));
    }
    if let Some(times) = read(task, "schedstat") {
        let mut nanos = times.split(' ').filter_map(|n| n.parse::<u64>().ok());
        if let (Some(ran), Some(waited)) = (nanos.next(), nanos.next()) {
            let (ran, waited) = (ran / 1_000_000, waited / 1_000_000);
            told.push_str(&format!(
                ", ran {ran} ms and waited {waited} ms for a processor in its life"
            ));
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_is_told_and_others_are_not() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let named = |name: &str| std::thread::Builder::new().name(name.into());
        let thread = named("stands still").spawn(move || wait.recv().is_ok()).unwrap();
        while !describe(&["stands still"]).starts_with("thread stands still: sleeps, in system call") {
            std::thread::yield_now();
        }
        assert_eq!(describe(&["no such thread"]), "");
        drop(go);
        assert!(!thread.join().unwrap());
    }
}
