//! `userconfig.xml`: one module.
//!
//! Called by the daemon when a configuration is applied and by the command line when one is checked. Owns the order
//! of the work (text, tree, macros, typed parts) and the elements `<safe>`, `<service>`, `<farm>` and `<user>`;
//! what `<vip>` and `<check>` hold is next door in `vip.rs`, `rule.rs` and `check.rs`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use super::check;
use super::decode::{Children, Node};
use super::diag::{Diagnostic, nearest};
use super::digest::digest;
use super::inert;
use super::macros;
use super::report::{Report, Source, Span, Wrong, one_of, quote};
use super::value::{self, Unit};
use super::vip;
use super::xml::{self, Element};
use super::{Boot, ClusterConfig, ModuleConfig, PartitionPolicy, ServiceConfig, UserConfig};

/// Default of the time limits of scripts.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(300);
/// Default of `loop_interval`.
const LOOP_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// `mode` of a `<service>`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Farm,
    Light,
    /// Understood, but refused.
    Mirror,
}

/// Reads the text of a `userconfig.xml`. `file_name` is what findings call it, `env` the environment variables that
/// `%NAME%` may name, `cluster` what names of nodes and lans are checked against; without it they are taken as they are.
///
/// # Errors
/// Everything that is wrong with it, warnings included, by place; at least one is an error. The warnings beside
/// a configuration are in the same order.
pub fn parse(
    file_name: &str,
    text: &str,
    env: &BTreeMap<String, String>,
    cluster: Option<&ClusterConfig>,
) -> Result<(ModuleConfig, Vec<Diagnostic>), Vec<Diagnostic>> {
    let source = Source::new(file_name, text);
    let mut report = Report::new(&source);
    let config = xml::parse(&mut report, "safe").and_then(|mut root| {
        let macros = macros::expand(&mut report, &mut root, env);
        module(&mut report, &root, macros, cluster)
    });
    report.result(config)
}

/// The text with every `%NAME%` replaced and all else, comments included, as it was: what scripts find as `safeconf.xml`.
/// The result is for reading; `%%` has become `%`, so expanding it once more may differ.
///
/// # Errors
/// What is wrong with the XML or with macros; the meaning of the rest is not looked at.
pub fn expand(file_name: &str, text: &str, env: &BTreeMap<String, String>) -> Result<String, Vec<Diagnostic>> {
    let source = Source::new(file_name, text);
    let mut report = Report::new(&source);
    let expanded = xml::parse(&mut report, "safe").map(|mut root| {
        macros::expand(&mut report, &mut root, env);
        macros::rewrite(source.text, &root)
    });
    report.result(expanded).map(|(expanded, _)| expanded)
}

fn module(
    report: &mut Report<'_>,
    root: &Element,
    macros: BTreeMap<String, String>,
    cluster: Option<&ClusterConfig>,
) -> Option<ModuleConfig> {
    let root = Node::open(report, root, "safe".to_owned(), &[]);
    let children = root.children(report, &["macro", "service"]);
    for child in children.all("macro") {
        let node = child.open(report, &["name", "value"]);
        node.need(report, "name", Ok);
        node.need(report, "value", Ok);
        node.children(report, &[]);
    }
    children.need(report, "service");
    let service = children.one(report, "service")?;
    let node = service.open(
        report,
        &[
            "mode",
            "boot",
            "boot_delay",
            "maxloop",
            "loop_interval",
            "automatic_reboot",
            "failover",
            "defaultprim",
        ],
    );
    let mode = mode(report, &node);
    let service = service_attributes(report, &node, mode);
    let parts = node.children(
        report,
        &[
            "farm", "vip", "user", "vhost", "errd", "check", "failover", "heart", "rfs",
        ],
    );
    let farm = farm(report, &node, &parts, mode, cluster);
    let vip = match parts.one(report, "vip") {
        Some(child) => {
            let vip = vip::decode(report, child, cluster);
            if mode == Some(Mode::Light) {
                let wrong = Wrong::new("a light module has no virtual IP");
                report.error(
                    child.element().span,
                    child.path(),
                    wrong.hint("remove `<vip>`, or write mode=\"farm\""),
                );
            }
            vip
        }
        None => None,
    };
    let user = parts.one(report, "user").map(|child| {
        let node = child.open(
            report,
            &[
                "starttimeout",
                "nicestoptimeout",
                "forcestoptimeout",
                "logging",
                "userlogsize",
            ],
        );
        user(report, &node)
    });
    let tcp_checkers = match parts.one(report, "check") {
        Some(child) => check::decode(report, child),
        None => Vec::new(),
    };
    elsewhere(report, &parts, mode);

    let mut config = ModuleConfig {
        macros,
        service,
        lans: farm.lans,
        partition: farm.partition,
        witness: farm.witness,
        vip,
        user,
        tcp_checkers,
        digest: 0,
    };
    config.digest = digest(&canonical(&config, mode));
    Some(config)
}

fn mode(report: &mut Report<'_>, node: &Node<'_>) -> Option<Mode> {
    const MODES: [(&str, Mode); 2] = [("farm", Mode::Farm), ("light", Mode::Light)];
    let mode = node.need(report, "mode", |text| match text {
        "mirror" => Ok(Mode::Mirror),
        _ => value::word(&MODES)(text),
    })?;
    if mode == Mode::Mirror {
        let wrong = Wrong::new("modules of mode `mirror` are not supported here");
        node.error(report, "mode", wrong.hint("`farm` or `light` is expected"));
    }
    Some(mode)
}

fn service_attributes(report: &mut Report<'_>, node: &Node<'_>, mode: Option<Mode>) -> ServiceConfig {
    const BOOT: [(&str, Boot); 4] = [
        ("on", Boot::On),
        ("off", Boot::Off),
        ("auto", Boot::Auto),
        ("ignore", Boot::Off),
    ];
    if node.read(report, "automatic_reboot", value::flag) == Some(true) {
        node.inert(report, "automatic_reboot");
    }
    // Of a mirror module the mode is the one thing to say.
    if mode != Some(Mode::Mirror) {
        for name in ["failover", "defaultprim"] {
            if node.has(name) {
                let wrong = Wrong::new(format!(
                    "`{name}` has no effect, it belongs to modules of mode `mirror`"
                ));
                node.warning(report, name, wrong);
            }
        }
    }
    ServiceConfig {
        boot: node.read(report, "boot", value::word(&BOOT)).unwrap_or(Boot::Off),
        boot_delay: node
            .duration(report, "boot_delay", Unit::Second, 0..=86_400)
            .unwrap_or(Duration::ZERO),
        maxloop: node.read(report, "maxloop", value::number(1..=10_000)).unwrap_or(3),
        loop_interval: node
            .duration(report, "loop_interval", Unit::Hour, 0..=8760)
            .unwrap_or(LOOP_INTERVAL),
    }
}

/// What `<farm>` says.
#[derive(Default)]
struct Farm {
    lans: Vec<String>,
    partition: PartitionPolicy,
    witness: Option<IpAddr>,
}

fn farm(
    report: &mut Report<'_>,
    service: &Node<'_>,
    parts: &Children<'_>,
    mode: Option<Mode>,
    cluster: Option<&ClusterConfig>,
) -> Farm {
    let Some(child) = parts.one(report, "farm") else {
        if mode == Some(Mode::Farm) {
            let wrong = Wrong::new("a farm module has no `<farm>`");
            service.element_error(
                report,
                wrong.hint("`<farm><lan name=\"default\"/></farm>` is expected in it"),
            );
        }
        return Farm::default();
    };
    let node = child.open(report, &["port", "pulse", "mlost_count", "slost_count", "partition"]);
    let fits = [
        node.read(report, "port", value::port).is_some(),
        node.duration(report, "pulse", Unit::Milli, 1..=60_000).is_some(),
        node.read(report, "mlost_count", value::number(1..=10_000_u32))
            .is_some(),
        node.read(report, "slost_count", value::number(1..=10_000_u32))
            .is_some(),
    ];
    for (name, fits) in ["port", "pulse", "mlost_count", "slost_count"].into_iter().zip(fits) {
        if fits {
            let wrong = Wrong::new(format!(
                "`{name}` has no effect: all modules share the heartbeats of the cluster"
            ));
            node.warning(report, name, wrong.hint("it is set in cluster.xml"));
        }
    }
    let children = node.children(report, &["lan", "witness"]);
    let (partition, witness) = partition(report, &node, &children);
    children.need(report, "lan");
    let mut lans: Vec<(String, Span)> = Vec::new();
    for child in children.all("lan") {
        let node = child.open(report, &["name"]);
        if child.element().children.iter().any(|inner| inner.name == "node") {
            let wrong = Wrong::new("nodes are not listed here");
            node.element_error(
                report,
                wrong.hint("`<node>` belongs into cluster.xml; here `<lan name=\"…\"/>` is expected"),
            );
        } else {
            node.children(report, &[]);
        }
        let Some(name) = node.need(report, "name", value::name) else {
            continue;
        };
        if let Some((_, first)) = lans.iter().find(|(known, _)| known == name) {
            let wrong = Wrong::new(format!("the lan {} is given twice", quote(name)));
            let hint = format!("the first one is at line {}", report.line(*first));
            node.error(report, "name", wrong.hint(hint));
            continue;
        }
        if let Some(cluster) = cluster {
            known_name(
                report,
                &node,
                name,
                "lan",
                cluster.lans.iter().map(|lan| lan.name.as_str()),
            );
        }
        lans.push((name.to_owned(), node.span("name")));
    }
    if mode == Some(Mode::Light) {
        node.element_warning(report, Wrong::new("`<farm>` has no effect in a light module"));
        return Farm::default();
    }
    Farm {
        lans: lans.into_iter().map(|(name, _)| name).collect(),
        partition,
        witness,
    }
}

/// Which part of a divided farm serves, and who is asked.
fn partition(report: &mut Report<'_>, node: &Node<'_>, children: &Children<'_>) -> (PartitionPolicy, Option<IpAddr>) {
    const POLICIES: [(&str, PartitionPolicy); 3] = [
        ("serve", PartitionPolicy::Serve),
        ("majority", PartitionPolicy::Majority),
        ("witness", PartitionPolicy::Witness),
    ];
    let policy = node
        .read(report, "partition", value::word(&POLICIES))
        .unwrap_or_default();
    let child = children.one(report, "witness");
    let Some(child) = child else {
        if policy == PartitionPolicy::Witness {
            let wrong = Wrong::new("`partition=\"witness\"` names no witness");
            node.error(
                report,
                "partition",
                wrong.hint("`<witness addr=\"…\"/>` is expected in `<farm>`: an address outside the farm that answers ping, such as the gateway"),
            );
        }
        return (policy, None);
    };
    let witness = child.open(report, &["addr"]);
    witness.children(report, &[]);
    let addr = witness.need(report, "addr", value::host_addr);
    if policy != PartitionPolicy::Witness {
        let wrong = Wrong::new("`<witness>` has no effect");
        witness.element_warning(report, wrong.hint("it is asked with `partition=\"witness\"` only"));
        return (policy, None);
    }
    (policy, addr)
}

/// Reports the name of a node or lan that `cluster.xml` does not have.
pub(super) fn known_name<'c>(
    report: &mut Report<'_>,
    node: &Node<'_>,
    name: &str,
    what: &str,
    known: impl Iterator<Item = &'c str> + Clone,
) {
    if known.clone().any(|other| other == name) {
        return;
    }
    let wrong = Wrong::new(format!("cluster.xml has no {what} {}", quote(name)));
    let hint = match nearest(name, known.clone()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("{} is expected", one_of(known)),
    };
    node.error(report, "name", wrong.hint(hint));
}

fn user(report: &mut Report<'_>, node: &Node<'_>) -> UserConfig {
    let mut timeout = |name| {
        let written = node.duration(report, name, Unit::Second, 1..=86_400);
        written.unwrap_or(SCRIPT_TIMEOUT)
    };
    let (start_timeout, nice_stop_timeout, force_stop_timeout) = (
        timeout("starttimeout"),
        timeout("nicestoptimeout"),
        timeout("forcestoptimeout"),
    );
    let logging = node.read(report, "logging", value::word(&[("userlog", true), ("none", false)]));
    let log_size_kb = node.read(report, "userlogsize", value::number(1..=1_048_576));
    let mut vars = BTreeMap::new();
    let mut lines: BTreeMap<&str, Span> = BTreeMap::new();
    for child in node.children(report, &["var"]).all("var") {
        let node = child.open(report, &["name", "value"]);
        node.children(report, &[]);
        let name = node.need(report, "name", value::variable);
        let value = node.need(report, "value", Ok);
        let Some(name) = name else { continue };
        if let Some(first) = lines.get(name) {
            let wrong = Wrong::new(format!("the variable {} is given twice", quote(name)));
            let hint = format!("the first one is at line {}", report.line(*first));
            node.error(report, "name", wrong.hint(hint));
            continue;
        }
        lines.insert(name, node.span("name"));
        vars.extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }
    UserConfig {
        start_timeout,
        nice_stop_timeout,
        force_stop_timeout,
        logging: logging.unwrap_or(true),
        log_size_kb: log_size_kb.unwrap_or(2048),
        vars,
    }
}

/// Parts that are understood and have no effect, and parts of mirror modules.
fn elsewhere(report: &mut Report<'_>, parts: &Children<'_>, mode: Option<Mode>) {
    for shape in [&inert::ERRD, &inert::VHOST, &inert::FAILOVER] {
        if let Some(child) = parts.one(report, shape.name) {
            inert::check(report, child, shape);
        }
    }
    if parts.all("errd").next().is_some() && parts.all("user").next().is_none() {
        for child in parts.all("errd") {
            let wrong = Wrong::new("`<errd>` needs a `<user>` beside it");
            report.error(
                child.element().span,
                child.path(),
                wrong.hint("`<user/>` is expected, so that scripts run"),
            );
        }
    }
    for child in ["heart", "rfs"].into_iter().flat_map(|name| parts.all(name)) {
        if mode != Some(Mode::Mirror) {
            let wrong = Wrong::new(format!(
                "`<{}>` belongs to modules of mode `mirror`",
                child.element().name
            ));
            report.error(child.element().span, child.path(), wrong.hint("remove it"));
        }
    }
}

/// The meaning all nodes must share, one fact per line.
fn canonical(config: &ModuleConfig, mode: Option<Mode>) -> String {
    let mut out = String::from("module 1\n");
    // Writing to a String cannot fail.
    let _ = writeln!(out, "mode {mode:?}");
    for lan in &config.lans {
        let _ = writeln!(out, "lan {lan:?}");
    }
    if config.partition != PartitionPolicy::Serve {
        let _ = writeln!(out, "partition {:?}", config.partition);
    }
    if let Some(vip) = &config.vip {
        vip::canonical(vip, &mut out);
    }
    out
}
