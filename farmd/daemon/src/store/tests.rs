//! Module folders on a real file system.

use super::*;
use crate::scratch::Scratch;

const CONFIG: &str = r#"<!DOCTYPE safe>
<safe>
  <macro name="VIP" value="198.18.0.100"/>
  <service mode="farm">
    <farm><lan name="default"/></farm>
    <vip>
      <interface_list><interface><virtual_interface type="vmac_directed">
        <virtual_addr addr="%VIP%" where="alias"/>
      </virtual_interface></interface></interface_list>
      <loadbalancing_list><group name="web"><rule port="80" proto="tcp" filter="on_addr"/></group></loadbalancing_list>
    </vip>
    <user/>
  </service>
</safe>
"#;

struct Lab {
    scratch: Scratch,
}

impl Lab {
    fn new() -> Self {
        let lab = Self {
            scratch: Scratch::new("store"),
        };
        lab.install("conf/userconfig.xml", CONFIG, 0o644);
        lab.install("bin/start_both", "#!/bin/sh\n", 0o755);
        lab.install("bin/stop_both", "#!/bin/sh\n", 0o755);
        lab
    }

    fn etc(&self) -> PathBuf {
        self.scratch.path().join("etc")
    }

    fn var(&self) -> PathBuf {
        self.scratch.path().join("var")
    }

    fn source(&self, name: &str) -> PathBuf {
        self.etc().join("modules/web").join(name)
    }

    fn active(&self, name: &str) -> PathBuf {
        active_dir(&self.var(), &module()).join(name)
    }

    fn install(&self, name: &str, text: &str, mode: u32) {
        let path = self.source(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }

    fn apply(&self) -> Result<ModuleConfig, ApplyError> {
        apply(&self.etc(), &self.var(), &module(), None, &[]).map(|(config, _)| config)
    }

    fn refusal(&self) -> String {
        self.apply().unwrap_err().to_string()
    }

    fn load(&self) -> Option<ModuleConfig> {
        load_active(&self.var(), &module(), None).unwrap()
    }

    fn copies(&self) -> usize {
        let names = fs::read_dir(module_dir(&self.var(), &module())).unwrap();
        names
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with("config_"))
            .count()
    }
}

fn module() -> ModuleName {
    "web".parse().unwrap()
}

#[test]
fn an_accepted_module_becomes_the_active_copy_and_is_loaded_as_it_was() {
    let lab = Lab::new();
    lab.install("bin/lib/common.sh", "x=1\n", 0o644);
    assert_eq!(lab.load(), None);
    let config = lab.apply().unwrap();
    assert_eq!(lab.load(), Some(config));
    assert!(
        fs::read_to_string(lab.active("conf/safeconf.xml"))
            .unwrap()
            .contains("addr=\"198.18.0.100\"")
    );
    assert_eq!(fs::read_to_string(lab.active("conf/userconfig.xml")).unwrap(), CONFIG);
    assert_eq!(
        fs::metadata(lab.active("bin/start_both")).unwrap().mode() & 0o777,
        0o755
    );
    assert_eq!(fs::metadata(lab.active("bin/lib/common.sh")).unwrap().mode() & 0o111, 0);
}

#[test]
fn edits_are_inert_until_they_are_applied() {
    let lab = Lab::new();
    lab.apply().unwrap();
    lab.install("bin/start_both", "#!/bin/sh\necho new\n", 0o755);
    assert!(
        !fs::read_to_string(lab.active("bin/start_both"))
            .unwrap()
            .contains("new")
    );
    lab.apply().unwrap();
    assert!(
        fs::read_to_string(lab.active("bin/start_both"))
            .unwrap()
            .contains("new")
    );
}

#[test]
fn a_refused_module_leaves_the_active_copy_and_says_where() {
    let lab = Lab::new();
    let config = lab.apply().unwrap();
    lab.install("conf/userconfig.xml", &CONFIG.replace("on_addr", "on_adr"), 0o644);
    let why = lab.refusal();
    assert!(
        why.contains("conf/userconfig.xml:10:") && why.contains("on_adr"),
        "{why}"
    );
    assert_eq!(lab.load(), Some(config));
    assert_eq!(lab.copies(), 1, "nothing half-made stays");
}

#[test]
fn scripts_are_looked_at_before_anything_is_copied() {
    let lab = Lab::new();
    fs::remove_file(lab.source("bin/stop_both")).unwrap();
    assert!(
        lab.refusal().contains("stop_both: the script is missing"),
        "{}",
        lab.refusal()
    );
    lab.install("bin/stop_both", "#!/bin/sh\n", 0o644);
    assert!(
        lab.refusal().contains("stop_both: it is not executable"),
        "{}",
        lab.refusal()
    );
    lab.install("bin/stop_both", "#!/bin/sh\n", 0o755);
    symlink("/etc/passwd", lab.source("bin/secrets")).unwrap();
    assert!(
        lab.refusal()
            .contains("secrets: a regular file or a folder is expected"),
        "{}",
        lab.refusal()
    );
    assert_eq!((lab.load(), lab.copies()), (None, 0));
}

#[test]
fn root_takes_over_no_file_that_others_can_write() {
    if farm_sys::process::effective_uid() != 0 {
        return;
    }
    let lab = Lab::new();
    lab.install("bin/start_both", "#!/bin/sh\n", 0o777);
    assert!(
        lab.refusal().contains("start_both: every user may write to it"),
        "{}",
        lab.refusal()
    );
    lab.install("bin/start_both", "#!/bin/sh\n", 0o755);
    std::os::unix::fs::chown(lab.source("bin/start_both"), Some(4242), None).unwrap();
    assert!(
        lab.refusal().contains("start_both: it belongs to user 4242"),
        "{}",
        lab.refusal()
    );
}

#[test]
fn a_module_that_is_not_there_says_what_was_looked_for() {
    let lab = Lab::new();
    let error = apply(&lab.etc(), &lab.var(), &"none".parse().unwrap(), None, &[]).unwrap_err();
    assert!(matches!(error, ApplyError::NotInstalled { .. }));
    assert_eq!(error.code(), farm_core::api::exit::NOT_FOUND);
    assert!(
        error
            .to_string()
            .contains("modules/none/conf/userconfig.xml does not exist"),
        "{error}"
    );
}

#[test]
fn the_active_copy_and_three_older_ones_are_kept() {
    let lab = Lab::new();
    for number in 0..KEPT_COPIES + 4 {
        lab.install("bin/version", &number.to_string(), 0o644);
        lab.apply().unwrap();
    }
    assert_eq!(lab.copies(), KEPT_COPIES + 1);
    assert_eq!(
        fs::read_to_string(lab.active("bin/version")).unwrap(),
        (KEPT_COPIES + 3).to_string()
    );
}

#[test]
fn a_configuration_can_be_taken_out_of_force() {
    let lab = Lab::new();
    lab.apply().unwrap();
    set_started(&lab.var(), &module(), true).unwrap();
    assert!(deconfig(&lab.var(), &module()).unwrap());
    assert_eq!(lab.load(), None);
    assert!(!was_started(&lab.var(), &module()));
    assert!(!deconfig(&lab.var(), &module()).unwrap(), "twice is no error");
}

#[test]
fn installed_and_configured_modules_are_listed_by_name() {
    let lab = Lab::new();
    lab.apply().unwrap();
    fs::rename(lab.source(""), lab.etc().join("modules/abc")).unwrap();
    fs::create_dir(lab.etc().join("modules/no config")).unwrap();
    fs::create_dir(lab.etc().join("modules/empty")).unwrap();
    let shown: Vec<(String, bool, bool)> = list(&lab.etc(), &lab.var())
        .unwrap()
        .into_iter()
        .map(|m| (m.name.to_string(), m.installed, m.configured))
        .collect();
    assert_eq!(
        shown,
        [("abc".to_owned(), true, false), ("web".to_owned(), false, true)]
    );
    assert_eq!(list(Path::new("/no/such"), Path::new("/no/such")).unwrap(), []);
}

#[test]
fn the_wish_to_run_is_remembered() {
    let lab = Lab::new();
    assert!(!was_started(&lab.var(), &module()));
    set_started(&lab.var(), &module(), true).unwrap();
    assert!(was_started(&lab.var(), &module()));
    set_started(&lab.var(), &module(), false).unwrap();
    set_started(&lab.var(), &module(), false).unwrap();
    assert!(!was_started(&lab.var(), &module()));
}

#[test]
fn only_variables_that_the_file_names_are_stored() {
    let env = [("HOST", "a"), ("TOKEN", "secret")].map(|(n, v)| (n.into(), v.into()));
    let used = used_environment("<macro name=\"x\" value=\"%HOST%\"/>", env);
    assert_eq!(used, BTreeMap::from([("HOST".to_owned(), "a".to_owned())]));
}
