//! Module folders for the nodes: copied from the repository with other macro values, or generated.
//!
//! Owns the files under `ETC/modules/AM` and the nginx configuration that the generated module starts. Never runs
//! `farm config`: a test decides when a folder becomes active.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The repository this binary was built from: the nearest folder above the executable, or above the working
/// directory, that has `modules/` and `Cargo.toml`. `FARM_REPO` overrides.
pub fn repository() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FARM_REPO") {
        return Ok(path.into());
    }
    let starts = [std::env::current_exe().ok(), std::env::current_dir().ok()];
    starts
        .iter()
        .flatten()
        .flat_map(|start| start.ancestors())
        .find(|dir| dir.join("modules").is_dir() && dir.join("Cargo.toml").is_file())
        .map(Path::to_path_buf)
        .context("cannot find the repository (a folder with modules/ and Cargo.toml); set FARM_REPO")
}

/// Copies the module folder `from` to `to` and gives the named macros of its `userconfig.xml` new values.
pub fn copy_module(from: &Path, to: &Path, macros: &[(&str, &str)]) -> Result<()> {
    copy_tree(from, to).with_context(|| format!("cannot copy the module {}", from.display()))?;
    let file = to.join("conf/userconfig.xml");
    let mut text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    for (name, value) in macros {
        text = set_macro(&text, name, value).with_context(|| format!("in {}", from.display()))?;
    }
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// `text` with the value of `<macro name="NAME" value="…"/>` replaced; attributes may stand in any order.
pub fn set_macro(text: &str, name: &str, value: &str) -> Result<String> {
    let mut from = 0;
    while let Some(start) = text[from..].find("<macro").map(|at| at + from) {
        let end = text[start..].find('>').map_or(text.len(), |at| at + start);
        let tag = &text[start..end];
        if attribute(tag, "name").is_some_and(|(first, last)| &tag[first..last] == name) {
            let (first, last) = attribute(tag, "value").with_context(|| format!("the macro {name} has no value"))?;
            return Ok(format!(
                "{}{}{}",
                &text[..start + first],
                escape(value),
                &text[start + last..]
            ));
        }
        from = end;
    }
    bail!("there is no macro {name}")
}

/// Where the value of `key` begins and ends within a tag.
fn attribute(tag: &str, key: &str) -> Option<(usize, usize)> {
    let mut from = 0;
    loop {
        let at = tag[from..].find(key)? + from;
        from = at + key.len();
        let rest = tag[from..].trim_start();
        if !tag[..at].ends_with(char::is_whitespace) || !rest.starts_with('=') {
            continue;
        }
        let rest = rest[1..].trim_start();
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let first = tag.len() - rest.len() + 1;
        let last = tag[first..].find(quote)? + first;
        return Some((first, last));
    }
}

fn escape(value: &str) -> String {
    value.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

/// A module written by the lab: its `userconfig.xml` and its scripts.
#[derive(Clone, Debug, Default)]
pub struct ModuleText {
    /// `conf/userconfig.xml`.
    pub userconfig: String,
    /// `(name, text)` of each script in `bin/`.
    pub scripts: Vec<(String, String)>,
}

impl ModuleText {
    /// The same module with the script `name` replaced or added.
    pub fn with_script(mut self, name: &str, text: &str) -> Self {
        self.scripts.retain(|(old, _)| old != name);
        self.scripts.push((name.to_owned(), text.to_owned()));
        self
    }

    /// Writes the module to `folder`; what was there is replaced.
    pub fn write(&self, folder: &Path) -> Result<()> {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot replace {}", folder.display()))?;
        }
        write_file(&folder.join("conf/userconfig.xml"), &self.userconfig, 0o644)?;
        for (name, text) in &self.scripts {
            write_file(&folder.join("bin").join(name), text, 0o755)?;
        }
        Ok(())
    }
}

/// Writes `text` to `path` with `mode`, making the folders on the way.
pub fn write_file(path: &Path, text: &str, mode: u32) -> Result<()> {
    let parent = path.parent().context("a file has a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

/// Scripts that start and stop the nginx whose configuration is in `folder`.
pub fn nginx_scripts(folder: &Path) -> Vec<(String, String)> {
    let folder = folder.display();
    let head = format!(
        "#!/bin/sh\nDIR='{folder}'\nrunning() {{ [ -s \"$DIR/nginx.pid\" ] && kill -0 \"$(cat \"$DIR/nginx.pid\")\" 2>/dev/null; }}\n"
    );
    // A stale file of a run that was killed would make `nginx -s` signal a stranger.
    // TERM and not KILL: the master takes its workers along, which hold the port too.
    let kill = concat!(
        "if running; then kill -TERM \"$(cat \"$DIR/nginx.pid\")\"; fi\n",
        "for _ in 1 2 3 4 5 6 7 8 9 10; do running || break; sleep 0.1; done\nrm -f \"$DIR/nginx.pid\"\nexit 0\n"
    );
    let stop = concat!(
        "if [ \"$1\" = force ]; then\n  if running; then kill -KILL \"$(cat \"$DIR/nginx.pid\")\"; fi\n  rm -f \"$DIR/nginx.pid\"\n  exit 0\nfi\n",
        "running || exit 0\nkill -TERM \"$(cat \"$DIR/nginx.pid\")\"\n",
        "for _ in 1 2 3 4 5 6 7 8 9 10; do running || exit 0; sleep 0.1; done\nexit 1\n"
    );
    vec![
        ("prestart".into(), format!("{head}{kill}")),
        (
            "start_both".into(),
            format!("{head}exec nginx -p \"$DIR\" -c \"$DIR/nginx.conf\" -e \"$DIR/error.log\"\n"),
        ),
        ("stop_both".into(), format!("{head}{stop}")),
    ]
}

/// `nginx.conf` of a node: `/who` tells as JSON which node answers and whom it sees as the client, `/echo/TEXT`
/// answers `NODE /echo/TEXT`.
///
/// One worker: the lab shares two processors among all nodes. Keep-alive connections end neither by count nor by age.
pub fn nginx_conf(folder: &Path, node: &str, listen: &[String]) -> String {
    let folder = folder.display();
    let listen: String = listen
        .iter()
        .map(|at| format!("    listen {at} backlog=4096;\n"))
        .collect();
    format!(
        "worker_processes 1;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log warn;\nworker_rlimit_nofile 65536;\n\
         events {{ worker_connections 16384; }}\nhttp {{\n  access_log off;\n  default_type text/plain;\n\
         \x20 keepalive_timeout 3600s;\n  keepalive_requests 100000000;\n\
         \x20 client_body_temp_path {folder}/body;\n  proxy_temp_path {folder}/proxy;\n  fastcgi_temp_path {folder}/fastcgi;\n\
         \x20 uwsgi_temp_path {folder}/uwsgi;\n  scgi_temp_path {folder}/scgi;\n  server {{\n{listen}\
         \x20   location / {{ return 200 '{{\"node\":\"{node}\",\"client\":\"$remote_addr:$remote_port\"}}\\n'; }}\n\
         \x20   location /echo/ {{ return 200 \"{node} $uri\\n\"; }}\n  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_macro_gets_its_new_value_whatever_the_order_of_its_attributes() {
        let text = "<macro name=\"A\" value=\"1\"/>\n<macro value='2'\n  name='VIRTUAL_IP' />";
        let changed = set_macro(text, "VIRTUAL_IP", "198.18.0.20").unwrap();
        assert_eq!(
            changed,
            "<macro name=\"A\" value=\"1\"/>\n<macro value='198.18.0.20'\n  name='VIRTUAL_IP' />"
        );
        assert_eq!(
            set_macro(&changed, "A", "a&b").unwrap().lines().next().unwrap(),
            "<macro name=\"A\" value=\"a&amp;b\"/>"
        );
    }

    #[test]
    fn a_macro_that_is_not_there_is_an_error() {
        assert!(
            set_macro("<safe><macro name=\"A\" value=\"1\"/></safe>", "B", "x")
                .unwrap_err()
                .to_string()
                .contains("B")
        );
    }

    #[test]
    fn a_written_module_replaces_the_old_one_and_its_scripts_can_run() {
        let folder = std::env::temp_dir().join(format!("farm-module-{}", std::process::id()));
        let module = ModuleText {
            userconfig: "<safe/>".into(),
            ..ModuleText::default()
        }
        .with_script("start_both", "#!/bin/sh\n");
        module.write(&folder).unwrap();
        ModuleText::default().with_script("other", "").write(&folder).unwrap();
        let left = fs::read_dir(folder.join("bin")).unwrap().count();
        let mode = fs::metadata(folder.join("bin/other")).unwrap().permissions().mode();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!((left, mode & 0o777), (1, 0o755));
    }
}
