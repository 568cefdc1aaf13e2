use std::net::IpAddr;

use farm_sys::interface::{self, Interface};
use farm_sys::netlink::{LinkAddr, Netlink, NetlinkError};

use crate::lab::{self, ADDR_A, Lab, MAC_A};

fn a0() -> Interface {
    interface::interfaces()
        .into_iter()
        .find(|interface| interface.name == "a0")
        .unwrap()
}

#[test]
fn links_are_changed_one_property_at_a_time() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            let index = netlink.link_index("a0").await.unwrap();
            assert_eq!(index, a0().index);

            netlink.set_mac(index, [2, 0, 0, 0, 0, 0x77]).await.unwrap();
            assert_eq!(a0().mac, Some([2, 0, 0, 0, 0, 0x77]));
            netlink.set_mac(index, MAC_A).await.unwrap();
            netlink.set_mtu(index, 9000).await.unwrap();
            assert_eq!(a0().mtu, 9000);

            netlink.set_arp(index, false).await.unwrap();
            netlink.set_multicast(index, false).await.unwrap();
            let off = lab::link_line("a0");
            assert!(
                off.contains("NOARP") && !off.contains("MULTICAST") && off.contains(",UP"),
                "{off}"
            );
            netlink.set_arp(index, true).await.unwrap();
            netlink.set_multicast(index, true).await.unwrap();
            let on = lab::link_line("a0");
            assert!(
                !on.contains("NOARP") && on.contains("MULTICAST") && on.contains(",UP"),
                "{on}"
            );
        });
    });
}

#[test]
fn addresses_may_be_added_and_removed_twice() {
    if !lab::privileged() {
        return;
    }
    Lab::new().a.run(|| {
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            let index = netlink.link_index("a0").await.unwrap();
            let v4: IpAddr = "198.18.0.99".parse().unwrap();
            netlink.addr_add(index, v4, 32).await.unwrap();
            netlink.addr_add(index, v4, 32).await.unwrap();
            let listed = netlink.addrs().await.unwrap();
            assert!(
                listed.contains(&LinkAddr {
                    index,
                    addr: v4,
                    prefix: 32
                }),
                "{listed:?}"
            );
            assert!(
                listed.contains(&LinkAddr {
                    index,
                    addr: ADDR_A.into(),
                    prefix: 24
                }),
                "{listed:?}"
            );
            netlink.addr_del(index, v4, 32).await.unwrap();
            netlink.addr_del(index, v4, 32).await.unwrap();
            assert!(netlink.addrs().await.unwrap().iter().all(|entry| entry.addr != v4));
            netlink.addr_del(9999, v4, 32).await.expect("no link, no address");

            let lo = netlink.link_index("lo").await.unwrap();
            let v6: IpAddr = "fd00:198:18::99".parse().unwrap();
            netlink.addr_add(lo, v6, 128).await.unwrap();
            netlink.addr_add(lo, v6, 128).await.unwrap();
            assert!(netlink.addrs().await.unwrap().contains(&LinkAddr {
                index: lo,
                addr: v6,
                prefix: 128
            }));
            std::net::UdpSocket::bind((v6, 0)).expect("usable at once");
            netlink.addr_del(lo, v6, 128).await.unwrap();
        });
    });
}

#[test]
fn errors_name_the_link_or_the_address() {
    if !lab::privileged() {
        return;
    }
    Lab::new().a.run(|| {
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            let error = netlink.link_index("a1").await.unwrap_err();
            assert!(
                matches!(&error, NetlinkError::NoLink { name } if name == "a1"),
                "{error}"
            );
            let error = netlink
                .addr_add(9999, "198.18.0.99".parse().unwrap(), 32)
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains("198.18.0.99/32") && error.contains("9999"), "{error}");
            let error = netlink
                .addr_add(1, "198.18.0.99".parse().unwrap(), 33)
                .await
                .unwrap_err();
            assert!(matches!(error, NetlinkError::Prefix { prefix: 33, .. }), "{error}");
            let error = netlink.set_mtu(9999, 1500).await.unwrap_err().to_string();
            assert!(error.contains("9999"), "{error}");
            netlink.link_del("a1").await.expect("absent");
            netlink.link_del("a0").await.unwrap();
            assert!(netlink.link_index("a0").await.is_err());
        });
    });
}
