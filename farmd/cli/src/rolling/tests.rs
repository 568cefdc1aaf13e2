use std::collections::BTreeMap;

use farm_core::api::{API_VERSION, ClusterStatus, Drained, ModuleStatus, Share, ShareSetting};

use super::*;

const READY: (ModuleState, Quality) = (ModuleState::Up, Quality::Ready);
const STOPPED: (ModuleState, Quality) = (ModuleState::Stop, Quality::NotReady);
const STARTING: (ModuleState, Quality) = (ModuleState::Wait, Quality::Transient);

fn row(node: &str, (state, quality): (ModuleState, Quality), buckets: u32, why: &str) -> NodeModuleStatus {
    NodeModuleStatus {
        node: node.into(),
        state: Some(state),
        quality: Some(quality),
        shares: vec![Share {
            group: "web".into(),
            buckets,
            of: 4096,
            draining: 0,
            setting: ShareSetting::default(),
            clients: Vec::new(),
        }],
        why: why.into(),
        age_ms: 0,
    }
}

fn farm(rows: Vec<NodeModuleStatus>) -> FarmStatus {
    FarmStatus {
        version: API_VERSION,
        node: "s1".into(),
        modules: vec![ModuleStatus {
            name: "web".into(),
            vips: Vec::new(),
            dataplane: String::new(),
            dataplane_why: String::new(),
            nodes: rows,
            resources: BTreeMap::new(),
            configured: true,
        }],
        cluster: ClusterStatus {
            node: "s1".into(),
            digest: String::new(),
            view: Vec::new(),
            coordinator: None,
            nodes: Vec::new(),
            plan_version: 0,
            incarnation: 1,
            heartbeat: farm_core::api::HeartbeatStatus::default(),
        },
        warnings: Vec::new(),
    }
}

fn nodes(turns: &[Turn]) -> Vec<&str> {
    turns.iter().map(|turn| turn.node.as_str()).collect()
}

#[test]
fn the_node_that_answers_comes_last_and_stopped_ones_are_left_out() {
    let status = farm(vec![
        row("s1", READY, 2048, ""),
        row("s2", READY, 2048, ""),
        row("s3", STOPPED, 0, "stopped by root"),
        row("s4", READY, 0, "drained by root; 2 min ago, no connection left"),
    ]);
    let (turns, skipped) = plan(&status, None).unwrap();
    assert_eq!(nodes(&turns), ["s2", "s4", "s1"]);
    assert_eq!(
        turns.iter().map(|turn| turn.drained).collect::<Vec<_>>(),
        [false, true, false]
    );
    assert_eq!(skipped, [("s3".to_owned(), "web is stopped there".to_owned())]);
    assert!(
        not_ready(&status, &turns, "s1").is_none(),
        "a node drained before is no obstacle"
    );
}

#[test]
fn it_does_not_begin_where_it_would_interrupt_the_service() {
    let refused = |rows| plan(&farm(rows), None).unwrap_err();
    let alone = refused(vec![
        row("s1", READY, 4096, ""),
        row("s2", STOPPED, 0, "stopped by root"),
    ]);
    assert!(alone.text.contains("1 nodes serve web"), "{}", alone.text);
    let moving = refused(vec![
        row("s1", READY, 4096, ""),
        row("s2", STARTING, 0, "prestart runs"),
    ]);
    assert!(
        moving.text.contains("s2") && moving.text.contains("prestart runs"),
        "{}",
        moving.text
    );
    assert_eq!((alone.code, moving.code), (exit::REFUSED, exit::REFUSED));
    let other = plan(&farm(Vec::new()), Some(&"mail".parse().unwrap())).unwrap_err();
    assert_eq!(other.code, exit::NOT_FOUND);
}

#[test]
fn no_node_is_taken_out_while_another_is_not_there() {
    let all = vec![row("s1", READY, 2048, ""), row("s2", READY, 2048, "")];
    let (turns, _) = plan(&farm(all), None).unwrap();
    for why in [
        "drained by root; less than a minute ago, no connection left",
        "no share yet: the hand-over is under way",
    ] {
        let now = farm(vec![row("s1", READY, 4096, ""), row("s2", READY, 0, why)]);
        assert_eq!(not_ready(&now, &turns, "s1").unwrap().0.node, "s2", "{why}");
        assert!(not_ready(&now, &turns, "s2").is_none(), "{why}");
    }
}

#[test]
fn what_was_drained_before_is_neither_drained_nor_undrained() {
    let drained = |mut row: NodeModuleStatus, groups: &[bool]| {
        let share = row.shares[0].clone();
        let named = |(i, drained): (usize, &bool)| Share {
            group: format!("g{i}"),
            setting: ShareSetting {
                weight: None,
                weight_by: None,
                drained: drained.then(|| Drained {
                    by: "root".into(),
                    since: 0,
                    until: None,
                }),
            },
            ..share.clone()
        };
        row.shares = groups.iter().enumerate().map(named).collect();
        row
    };
    let turn = Turn {
        node: "s1".into(),
        modules: vec!["web".into()],
        drained: false,
    };
    let scopes = |groups: &[bool]| -> Vec<Option<String>> {
        let status = farm(vec![drained(row("s1", READY, 1, ""), groups)]);
        undrained(&status, &turn).into_iter().map(|scope| scope.group).collect()
    };
    assert_eq!(scopes(&[false, false]), [None]);
    assert_eq!(scopes(&[true, false]), [Some("g1".to_owned())]);
    assert_eq!(scopes(&[true, true]), Vec::<Option<String>>::new());
}
