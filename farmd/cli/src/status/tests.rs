use std::collections::BTreeMap;

use farm_core::api::{API_VERSION, ClusterStatus, HeartbeatStatus, LinkStatus, PeerStatus, Share};

use super::*;

fn share(group: &str, buckets: u32, draining: u32) -> Share {
    Share {
        group: group.into(),
        buckets,
        of: 4096,
        draining,
        setting: farm_core::api::ShareSetting::default(),
        clients: Vec::new(),
    }
}

fn node(
    name: &str,
    state: Option<(ModuleState, Quality)>,
    shares: Vec<Share>,
    why: &str,
    age_ms: u64,
) -> NodeModuleStatus {
    NodeModuleStatus {
        node: name.into(),
        state: state.map(|(state, _)| state),
        quality: state.map(|(_, quality)| quality),
        shares,
        why: why.into(),
        age_ms,
    }
}

const READY: Option<(ModuleState, Quality)> = Some((ModuleState::Up, Quality::Ready));
const STARTING: Option<(ModuleState, Quality)> = Some((ModuleState::Wait, Quality::Transient));
const STOPPED: Option<(ModuleState, Quality)> = Some((ModuleState::Stop, Quality::NotReady));

fn farm(nodes: Vec<NodeModuleStatus>) -> FarmStatus {
    FarmStatus {
        version: API_VERSION,
        node: "s1".into(),
        modules: vec![ModuleStatus {
            name: "web".into(),
            vips: vec!["198.18.0.100".into()],
            dataplane: "raw".into(),
            dataplane_why: String::new(),
            nodes,
            resources: BTreeMap::from([("tcp.http".into(), "up".into())]),
            configured: true,
        }],
        cluster: ClusterStatus {
            node: "s1".into(),
            digest: "0123456789abcdef".into(),
            view: vec!["s1".into(), "s2".into()],
            coordinator: Some("s1".into()),
            nodes: vec![
                PeerStatus {
                    name: "s1".into(),
                    addrs: vec!["default=198.18.0.11".into()],
                    state: "this".into(),
                    since_ms: 61_000,
                    heard_ms: None,
                    why: String::new(),
                    incarnation: 5,
                    uptime_ms: Some(61_000),
                    links: Vec::new(),
                },
                PeerStatus {
                    name: "s3".into(),
                    addrs: vec!["default=198.18.0.13".into()],
                    state: "down".into(),
                    since_ms: 2_500,
                    heard_ms: Some(2_750),
                    why: "5 heartbeats missed".into(),
                    incarnation: 6,
                    uptime_ms: None,
                    links: vec![LinkStatus {
                        lan: "default".into(),
                        addr: "198.18.0.13".into(),
                        received: 2431,
                        lost: 12,
                        loss_permille: Some(63),
                        rtt_us: Some(210),
                        rtt_min_us: Some(110),
                        rtt_avg_us: None,
                        heard_ms: Some(2_750),
                    }],
                },
            ],
            plan_version: 17,
            incarnation: 1,
            heartbeat: HeartbeatStatus {
                interval_us: 50_000,
                detection_ms: 250,
                bytes: 412,
                bytes_per_s: 16_480,
                realtime: true,
                late: 3,
                late_most_us: 27_000,
                turn_longest_us: 410,
            },
        },
        warnings: vec!["real-time priority refused".into()],
    }
}

fn sample() -> FarmStatus {
    farm(vec![
        node("s1", READY, vec![share("http", 2048, 0), share("dns", 4096, 0)], "", 0),
        node("s2", STARTING, vec![share("http", 2048, 12)], "prestart runs", 40),
        node("s3", None, vec![], "down", 2_750),
    ])
}

#[test]
fn a_farm_is_a_table_of_nodes() {
    let expected = "\
web  vip 198.18.0.100  plane raw
  NODE  STATE  QUALITY    GROUP  SHARE                        DRAINING  AGE   WHY
  *s1   UP     Ready      http   ########........  2048/4096
                          dns    ################  4096/4096
   s2   WAIT   Transient  http   ########+.......  2048/4096  12        40ms  prestart runs
   s3   -      -                                                        2.7s  down
warning: real-time priority refused
";
    assert_eq!(view::farm(&sample(), Style::PLAIN, false), expected);
}

#[test]
fn verbose_adds_resources_and_the_cluster() {
    let text = view::farm(&sample(), Style::PLAIN, true);
    let expected = "
cluster seen by s1
  NODE  STATE  SINCE  UPTIME  HEARD     ADDRESSES            WHY
  *s1   this   1m01s  1m01s             default=198.18.0.11
   s3   down   2.5s           2.7s ago  default=198.18.0.13  5 heartbeats missed
  LINK  LAN      HEARD     RECEIVED  LOST  LOSS  RTT     MIN     AVG
   s3   default  2.7s ago  2431      12    6.3%  0.21ms  0.11ms  -
  view s1 s2; coordinator s1
  plan 17; cluster.xml 0123456789abcdef
  heartbeat every 50ms, down after 250 ms; 412 bytes, 16.4 kB/s sent; real-time priority: yes; 3 late, by 27ms at most; longest turn 0.41ms
";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("  RESOURCE  VALUE\n  tcp.http  up\n"), "{text}");
}

#[test]
fn only_a_node_that_serves_is_green() {
    let text = view::farm(&sample(), Style::RICH, false);
    assert_eq!(text.matches("\x1b[32m").count(), 2, "{text}");
    assert!(
        text.contains("\x1b[32mUP\x1b[0m") && text.contains("\x1b[35mWAIT\x1b[0m") && text.contains("\x1b[31m-\x1b[0m")
    );
    assert!(text.contains("████████▒░░░░░░░"), "{text}");
    let up_but_starting = farm(vec![node(
        "s1",
        Some((ModuleState::Up, Quality::Transient)),
        vec![],
        "",
        0,
    )]);
    assert!(!view::farm(&up_but_starting, Style::RICH, false).contains("\x1b[32m"));
}

#[test]
fn the_exit_code_tells_all_some_and_none() {
    let code = |states: &[Option<(ModuleState, Quality)>]| {
        exit_code(&farm(states.iter().map(|s| node("s", *s, vec![], "", 0)).collect()).modules)
    };
    assert_eq!(code(&[READY, READY]), exit::OK);
    assert_eq!(code(&[READY, None]), exit::DEGRADED);
    assert_eq!(code(&[READY, STOPPED]), exit::DEGRADED);
    assert_eq!(code(&[STARTING, STOPPED]), exit::DEGRADED);
    assert_eq!(code(&[STOPPED, None]), exit::STOPPED);
    assert_eq!(code(&[]), exit::OK);
}

#[test]
fn an_unknown_module_is_not_found() {
    let failure = narrowed(sample(), Some(&"other".parse().unwrap())).unwrap_err();
    assert_eq!(failure.code, exit::NOT_FOUND);
    assert_eq!(
        narrowed(sample(), Some(&"web".parse().unwrap())).unwrap().modules.len(),
        1
    );
}

#[test]
fn watching_draws_over_the_last_picture_only_on_a_terminal() {
    let colour = Style::RICH;
    assert_eq!(frame("a\nb\n", Style::PLAIN, true), "a\nb\n");
    assert_eq!(frame("a\n", Style::PLAIN, false), "\na\n");
    assert_eq!(frame("a\nb\n", colour, false), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
}

#[test]
fn at_eighty_columns_no_line_is_longer_and_no_word_is_broken() {
    let long = "no heartbeat for 2500 ms; it does not hear this node; is the heartbeats' UDP port blocked there?";
    let mut status = sample();
    status.modules[0].nodes[2].why = long.into();
    status.cluster.nodes[1].why = long.into();
    status.warnings = vec![format!("no real-time priority for heartbeats: {long}")];
    let style = Style {
        width: Some(80),
        ..Style::PLAIN
    };
    let text = view::farm(&status, style, true);
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    assert_eq!(words(&text).matches(long).count(), 3, "{text}");
}

#[test]
fn a_state_and_a_module_come_in_any_order() {
    let parse = |line: &str| {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        state_and_module(&words)
    };
    let web = || Some("web".to_owned());
    assert_eq!(parse("up web").unwrap(), (ModuleState::Up, web()));
    assert_eq!(parse("web STOP").unwrap(), (ModuleState::Stop, web()));
    assert_eq!(parse("WAIT").unwrap(), (ModuleState::Wait, None));
    assert_eq!(parse("web down").unwrap_err().code, exit::USAGE);
}

#[test]
fn what_was_set_is_told_of_all_nodes_and_until_when_a_drain_waits() {
    let set = |setting| Share {
        setting,
        ..share("http", 0, 0)
    };
    let zero = farm_core::api::ShareSetting {
        weight: Some(0),
        ..Default::default()
    };
    let drained = farm_core::api::ShareSetting {
        drained: Some(farm_core::api::Drained {
            by: "root".into(),
            since: 1_795_000_000,
            until: Some(1_795_000_600),
        }),
        ..Default::default()
    };
    let why = "drained by root; less than a minute ago, no connection left";
    let mut own = node("s1", READY, vec![set(drained)], why, 0);
    let shown = view::farm(
        &farm(vec![
            own.clone(),
            node("s2", READY, vec![set(zero.clone())], "weight 0, set by root on s1", 40),
        ]),
        Style::PLAIN,
        true,
    );
    assert!(shown.contains("s2, group http: weight 0, set at run time\n"), "{shown}");
    let until = chrono::DateTime::from_timestamp(1_795_000_600, 0).unwrap();
    let until = until.with_timezone(&chrono::Local).format("%Y-%m-%d %H:%M:%S");
    let line = format!("s1, group http: drained; connections left at {until} are reset\n");
    assert!(shown.contains(&line), "{shown}");
    // Neither counts as ready, and both are as an administrator wants them.
    assert!(is_drained(&own) && !is_ready(&own));
    own.shares = vec![set(zero)];
    "weight 0, set by root".clone_into(&mut own.why);
    assert!(is_drained(&own) && !is_ready(&own));
    "kept out: another configuration".clone_into(&mut own.why);
    assert!(!is_drained(&own));
}
