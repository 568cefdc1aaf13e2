//! The host in a network namespace of its own, with a TAP as service interface; no packet is moved.

use std::collections::BTreeSet;
use std::sync::Mutex;

use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::config::{InterfaceConfig, PlaneChoice, VirtualAddr, VirtualInterfaceConfig, XdpChoice};
use farm_core::wire::heartbeat::Requester;
use farm_sys::netns::NetNs;
use farm_sys::process::effective_uid;

use super::*;
use crate::scratch::Scratch;

const SERVICE: &str = "svc0";
const TABLE: &str = "farm_svc0";

/// Holds what it is given, as the kernel's side of it must live.
#[derive(Default)]
struct Shelf {
    interfaces: Mutex<Vec<dataplane::Interface>>,
    standing: Mutex<dataplane::Standing>,
    tap: Mutex<Option<LocalDevice>>,
}

impl Shelf {
    fn indices(&self) -> Vec<u32> {
        self.interfaces.lock().unwrap().iter().map(|i| i.index).collect()
    }
}

impl DataPlane for Shelf {
    fn apply(&self, _: Arc<Plan>) {}
    fn standing(&self) -> dataplane::Standing {
        self.standing.lock().unwrap().clone()
    }

    fn tracer(&self) -> dataplane::trace::Tracer {
        dataplane::trace::Tracer::default()
    }

    fn attach(&self, interface: dataplane::Interface) {
        self.interfaces.lock().unwrap().push(interface);
    }
    fn detach(&self, index: u32) {
        self.interfaces.lock().unwrap().retain(|i| i.index != index);
    }
    fn set_tap(&self, tap: Option<LocalDevice>) {
        *self.tap.lock().unwrap() = tap;
    }
    fn learn(&self, _: Requester) {}
    fn ask_around(&self) {}
    fn watch_orphans(&self, _: farm_sys::clock::BootInstant) {}
    fn learn_flows(&self, _: Vec<FlowKey>, _: Option<BTreeSet<FlowKey>>) {}
    fn set_reset_wait(&self, _: Option<Duration>) {}
    fn withdraw_resets(&self, _: Duration) {}
    fn leave(&self, _: farm_sys::clock::BootInstant) {}
    fn stop(&mut self) {}
}

struct Bench {
    host: Host,
    plane: Arc<Shelf>,
    service: Option<Tap>,
    var: Scratch,
}

/// Runs a test in a namespace with one service interface. Without root it cannot; in CI that is a failure.
fn on_bench(test: impl AsyncFnOnce(&mut Bench) + Send) {
    let root = effective_uid() == 0;
    assert!(root || std::env::var_os("CI").is_none(), "this test needs root");
    if !root {
        eprintln!("skipped: needs root to make a network namespace");
        return;
    }
    NetNs::create().unwrap().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(async {
            let var = Scratch::new("host");
            let plane = Arc::new(Shelf::default());
            let host = Host::new(var.path().to_owned(), Arc::<Shelf>::clone(&plane))
                .await
                .unwrap();
            let service = Some(new_service(&host).await);
            test(&mut Bench {
                host,
                plane,
                service,
                var,
            })
            .await;
        });
    });
}

async fn new_service(host: &Host) -> Tap {
    let tap = Tap::create(SERVICE).unwrap();
    let addr = "198.18.0.1".parse().unwrap();
    host.netlink.addr_add(tap.ifindex(), addr, 24).await.unwrap();
    host.netlink.link_up(tap.ifindex()).await.unwrap();
    while !interface::link(SERVICE).unwrap().up {
        sleep(Duration::from_millis(1)).await;
    }
    tap
}

fn module(name: &str) -> ModuleName {
    name.parse().unwrap()
}

fn config(interfaces: &[&str], vip: &str, check: bool) -> VipConfig {
    let addr = VirtualAddr {
        addr: vip.parse().unwrap(),
        check: true,
    };
    let interface = |name: &&str| InterfaceConfig {
        name: Some((*name).to_owned()),
        check,
        arp_reroute: None,
        virtual_interfaces: vec![VirtualInterfaceConfig {
            mode: L2Mode::Directed,
            addrs: vec![addr],
        }],
    };
    VipConfig {
        tcp_reset: true,
        plane: PlaneChoice::Auto,
        xdp: XdpChoice::Auto,
        drain: std::time::Duration::ZERO,
        interfaces: interfaces.iter().map(interface).collect(),
        groups: Vec::new(),
    }
}

fn arp(key: &str) -> String {
    sysctl::read(&sysctl::interface("ipv4", SERVICE, key)).unwrap()
}

fn vips() -> Vec<IpAddr> {
    vec!["198.18.0.100".parse().unwrap()]
}

#[test]
fn a_module_that_wants_the_kernel_does_not_start_where_that_cannot_be() {
    on_bench(async |bench| {
        let (web, host) = (module("web"), &mut bench.host);
        let wanted = VipConfig {
            plane: PlaneChoice::Bpf,
            ..config(&[SERVICE], "198.18.0.100", true)
        };
        bench.plane.standing.lock().unwrap().problem = Some("no clang".to_owned());
        let refused = host.set_up(&web, &wanted).await.unwrap_err();
        assert!(
            refused.contains("dataplane=\"bpf\"") && refused.contains("no clang"),
            "{refused}"
        );
        bench.plane.standing.lock().unwrap().problem = None;
        assert_eq!(host.set_up(&web, &wanted).await.unwrap().len(), 1);
        assert!(host.tear_down(&web).await.is_empty());
    });
}

#[test]
fn a_flushed_table_is_mended_and_all_is_undone_in_the_end() {
    on_bench(async |bench| {
        let (web, host) = (module("web"), &mut bench.host);
        host.set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        assert_eq!((arp("arp_announce"), arp("arp_ignore")), ("2".into(), "1".into()));
        assert_eq!(host.check_links(), []);

        assert!(nft::remove(TABLE).unwrap());
        assert_eq!(host.check_links(), [], "too early to look again");
        assert_eq!(nft::tables(TABLE_PREFIX).unwrap(), Vec::<String>::new());
        sleep(watch::TABLE_INTERVAL).await;
        assert_eq!(host.check_links(), []);
        assert!(nft::is_installed(TABLE, SERVICE, &vips(), true).unwrap());

        // A chain without its rules is no better.
        nft::install(TABLE, SERVICE, &[], true).unwrap();
        sleep(watch::TABLE_INTERVAL).await;
        assert_eq!(host.check_links(), []);
        assert!(nft::is_installed(TABLE, SERVICE, &vips(), true).unwrap());

        assert_eq!(host.tear_down(&web).await, Vec::<String>::new());
        assert_eq!((arp("arp_announce"), arp("arp_ignore")), ("0".into(), "0".into()));
        assert_eq!(nft::tables(TABLE_PREFIX).unwrap(), Vec::<String>::new());
        assert!(!bench.var.path().join(state::FILE).exists());
    });
}

#[test]
fn resets_are_diverted_while_they_are_to_be_whatever_else_changes() {
    on_bench(async |bench| {
        let (web, more, host) = (module("web"), module("more"), &mut bench.host);
        let both = [vips()[0], "198.18.0.101".parse().unwrap()];
        let diverts = |vips: &[IpAddr]| nft::diverts_resets(TABLE, SERVICE, vips).unwrap();
        host.set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        assert!(diverts(&vips()), "until the owner loop knows better");
        host.divert_resets(false);
        assert!(!diverts(&vips()));
        host.divert_resets(true);
        assert!(diverts(&vips()));
        host.set_up(&more, &config(&[SERVICE], "198.18.0.101", true))
            .await
            .unwrap();
        assert!(diverts(&both));

        // A firewall's reload takes all of it, somebody else this one alone.
        for remove in [nft::remove, nft::leave_resets] {
            assert!(remove(TABLE).unwrap());
            sleep(watch::TABLE_INTERVAL).await;
            assert_eq!(host.check_links(), []);
            assert!(nft::is_installed(TABLE, SERVICE, &both, true).unwrap());
            assert!(diverts(&both));
        }
        assert_eq!(host.tear_down(&more).await, Vec::<String>::new());
        assert!(diverts(&vips()));

        host.divert_resets(false);
        assert!(!diverts(&vips()) && nft::is_installed(TABLE, SERVICE, &vips(), true).unwrap());
        // Set up while they are diverted; gone with the last address.
        host.divert_resets(true);
        assert_eq!(host.tear_down(&web).await, Vec::<String>::new());
        assert_eq!(nft::tables(TABLE_PREFIX).unwrap(), Vec::<String>::new());
        host.set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        assert!(diverts(&vips()));
        assert_eq!(host.tear_down(&web).await, Vec::<String>::new());
    });
}

#[test]
fn arp_ignore_of_the_administrator_stays() {
    on_bench(async |bench| {
        let name = sysctl::interface("ipv4", SERVICE, "arp_ignore");
        sysctl::write(&name, "8").unwrap();
        let (web, host) = (module("web"), &mut bench.host);
        host.set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        assert_eq!(arp("arp_ignore"), "8");
        assert_eq!(host.tear_down(&web).await, Vec::<String>::new());
        assert_eq!(arp("arp_ignore"), "8");
    });
}

/// Addresses that IPv6 has on the device of VIPs, with their flags (RFC 4862's "tentative" is 0x40).
fn ipv6_of_device() -> Vec<(String, u32)> {
    let all = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
    let lines = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines
        .filter(|words| words[5] == DEVICE)
        .map(|words| (words[0].to_owned(), u32::from_str_radix(words[4], 16).unwrap()))
        .collect()
}

#[test]
fn the_device_has_ipv6_only_while_it_carries_an_ipv6_vip_and_sends_nothing() {
    on_bench(async |bench| {
        let host = &mut bench.host;
        let disabled = || sysctl::read(&sysctl::interface("ipv6", DEVICE, "disable_ipv6")).unwrap();
        let (web, mail) = (module("web"), module("mail"));
        host.set_up(&mail, &config(&[SERVICE], "198.18.0.101", true))
            .await
            .unwrap();
        assert_eq!(disabled(), "1");

        host.set_up(&web, &config(&[SERVICE], "2001:db8::20", true))
            .await
            .unwrap();
        let vip = "20010db8000000000000000000000020".to_owned();
        let there = ipv6_of_device();
        assert_eq!(there.iter().map(|(addr, _)| addr).collect::<Vec<_>>(), [&vip]);
        assert_eq!(there[0].1 & 0x40, 0, "it works at once, without a probe");
        assert_eq!(
            there[0].1 & 0x20,
            0x20,
            "the host does not choose it as its own (deprecated)"
        );
        let both = ["198.18.0.101", "2001:db8::20"].map(|addr| addr.parse().unwrap());
        assert!(nft::is_installed(TABLE, SERVICE, &both, true).unwrap());
        // Autoconfiguration and group reports would come within a second.
        sleep(Duration::from_millis(1500)).await;
        let sent = bench
            .plane
            .tap
            .lock()
            .unwrap()
            .as_ref()
            .map(|device| device.tap.drain().unwrap());
        assert_eq!(sent, Some(0), "frames that the device has sent by itself");
        assert_eq!(ipv6_of_device(), there);

        assert_eq!(host.tear_down(&web).await, Vec::<String>::new());
        assert_eq!((disabled(), ipv6_of_device()), ("1".to_owned(), Vec::new()));
        assert_eq!(host.tear_down(&mail).await, Vec::<String>::new());
    });
}

#[test]
fn an_interface_without_ipv6_is_refused_for_an_ipv6_vip() {
    on_bench(async |bench| {
        sysctl::write(&sysctl::interface("ipv6", SERVICE, "disable_ipv6"), "1").unwrap();
        let web = module("web");
        let error = bench.host.set_up(&web, &config(&[SERVICE], "2001:db8::20", true)).await;
        assert!(
            error.as_ref().is_err_and(|e| e.contains("svc0 has no IPv6 address")),
            "{error:?}"
        );
        assert_eq!(
            bench
                .host
                .set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
                .await
                .map(|v| v.len()),
            Ok(1)
        );
        bench.host.tear_down(&web).await;
    });
}

#[test]
fn an_ipv6_vip_that_was_left_by_a_farmd_is_not_touched_by_its_successor() {
    on_bench(async |bench| {
        let config = config(&[SERVICE], "2001:db8::20", true);
        bench.host.set_up(&module("web"), &config).await.unwrap();
        bench.host.leave_to_successor().unwrap();
        bench.plane.set_tap(None);
        bench.host.device = None;
        assert_eq!(device_owner(), DeviceOwner::Left);
        let index = interface::index(DEVICE).unwrap();

        let mut next = Host::new(bench.var.path().to_owned(), Arc::<Shelf>::clone(&bench.plane))
            .await
            .unwrap();
        assert_eq!(next.create_device().await.unwrap(), index);
        assert_eq!(ipv6_of_device().len(), 1, "it is there before it is set anew");
        next.set_up(&module("web"), &config).await.unwrap();
        assert_eq!(ipv6_of_device().len(), 1);
        assert_eq!(next.tear_down(&module("web")).await, Vec::<String>::new());
    });
}

#[test]
fn another_mac_is_told_once_whether_the_interface_is_checked_or_not() {
    on_bench(async |bench| {
        let host = &mut bench.host;
        let (web, mail) = (module("web"), module("mail"));
        host.set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        host.set_up(&mail, &config(&[SERVICE], "198.18.0.101", false))
            .await
            .unwrap();
        assert_eq!(host.check_links(), []);

        let index = interface::index(SERVICE).unwrap();
        host.netlink.set_mac(index, [2, 0, 0, 0, 0, 9]).await.unwrap();
        let told = host.check_links();
        assert_eq!(told.iter().map(|(m, _)| m).collect::<Vec<_>>(), [&mail, &web]);
        for (_, problem) in told {
            assert!(problem.unwrap().starts_with("interface svc0 has changed"));
        }
        assert_eq!(host.check_links(), [], "once");

        host.tear_down(&web).await;
        let vips = host
            .set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        assert_eq!(vips[0].own_mac, MacAddr([2, 0, 0, 0, 0, 9]));
        assert_eq!(host.check_links(), [], "nothing more of web, nothing new of mail");
    });
}

#[test]
fn an_interface_made_anew_is_protected_at_once_and_told_when_it_is_up() {
    on_bench(async |bench| {
        let host = &mut bench.host;
        let (web, mail) = (module("web"), module("mail"));
        let (of_web, of_mail) = (
            config(&[SERVICE], "198.18.0.100", true),
            config(&[SERVICE], "198.18.0.101", false),
        );
        host.set_up(&web, &of_web).await.unwrap();
        host.set_up(&mail, &of_mail).await.unwrap();
        let old = interface::index(SERVICE).unwrap();

        drop(bench.service.take());
        let told = host.check_links();
        assert!(told.len() == 1 && told[0].0 == web, "mail is not checked: {told:?}");
        assert!(told[0].1.as_ref().unwrap().contains("vanished"), "{told:?}");

        let service = new_service(host).await;
        let new = service.ifindex();
        assert_ne!(new, old);
        sleep(watch::TABLE_INTERVAL).await;
        let told = host.check_links();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told.iter()
                .all(|(_, p)| p.as_ref().unwrap().starts_with("interface svc0 has changed"))
        );
        let both = [vips(), vec!["198.18.0.101".parse().unwrap()]].concat();
        assert!(nft::is_installed(TABLE, SERVICE, &both, true).unwrap());

        // One module after the other, as the owner loop does it.
        assert_eq!(host.tear_down(&web).await, Vec::<String>::new());
        assert_eq!(host.set_up(&web, &of_web).await.unwrap()[0].interface, new);
        assert_eq!(bench.plane.indices(), [old, new]);
        assert_eq!((arp("arp_announce"), arp("arp_ignore")), ("2".into(), "1".into()));
        assert_eq!(host.tear_down(&mail).await, Vec::<String>::new());
        assert_eq!(bench.plane.indices(), [new]);
        host.set_up(&mail, &of_mail).await.unwrap();
        assert_eq!(bench.plane.indices(), [new], "both share its sockets");
        assert!(nft::is_installed(TABLE, SERVICE, &both, true).unwrap());
        assert_eq!(host.check_links(), []);

        for module in [&web, &mail] {
            assert_eq!(host.tear_down(module).await, Vec::<String>::new());
        }
        assert_eq!((arp("arp_announce"), arp("arp_ignore")), ("0".into(), "0".into()));
        assert!(!bench.var.path().join(state::FILE).exists());
    });
}

#[test]
fn what_could_not_be_undone_stays_noted() {
    on_bench(async |bench| {
        let left = HostState {
            sysctls: vec![("net/ipv4/conf/other/arp_ignore".into(), "0".into(), "1".into())],
            ..HostState::default()
        };
        left.store(bench.var.path()).unwrap();
        let mut host = Host::new(bench.var.path().to_owned(), Arc::<Shelf>::clone(&bench.plane))
            .await
            .unwrap();
        let web = module("web");
        host.set_up(&web, &config(&[SERVICE], "198.18.0.100", true))
            .await
            .unwrap();
        host.tear_down(&web).await;
        assert_eq!(HostState::load(bench.var.path()).unwrap().sysctls, left.sysctls);
    });
}

#[test]
fn more_interfaces_than_can_be_waited_for_are_refused() {
    on_bench(async |bench| {
        let names: Vec<String> = (0..=MAX_INTERFACES).map(|i| format!("many{i}")).collect();
        let mut taps = Vec::new();
        for name in &names {
            let tap = Tap::create(name).unwrap();
            bench.host.netlink.link_up(tap.ifindex()).await.unwrap();
            while !interface::link(name).unwrap().up {
                sleep(Duration::from_millis(1)).await;
            }
            taps.push(tap);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let web = module("web");
        let place = |names| bench.host.place(&web, &config(names, "198.18.0.100", true));
        assert_eq!(place(&names[1..]).unwrap().len(), MAX_INTERFACES);
        let error = place(&names).unwrap_err();
        assert!(error.contains("31 service interfaces"), "{error}");
    });
}
