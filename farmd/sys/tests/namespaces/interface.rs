use std::net::IpAddr;

use farm_sys::interface;
use farm_sys::netlink::Netlink;

use crate::lab::{self, ADDR_A, ADDR_B, Lab, MAC_A};

#[test]
fn an_interface_is_listed_with_what_it_has_and_found_by_its_subnet() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        let names: Vec<String> = interface::interfaces()
            .into_iter()
            .map(|interface| interface.name)
            .collect();
        assert_eq!(names, ["lo", "a0"], "this namespace's interfaces only");
        let a0 = interface::by_subnet(ADDR_B.into()).unwrap();
        assert_eq!(a0.name, "a0");
        assert_eq!(a0.mac, Some(MAC_A));
        assert_eq!(a0.addrs, [(IpAddr::V4(ADDR_A), 24)]);
        assert_eq!((a0.mtu, a0.up), (1500, true));
        assert_eq!(interface::by_subnet("198.19.0.1".parse().unwrap()), None);
    });
}

#[test]
fn an_interface_without_its_peer_is_not_up() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    // The cable's other end down takes the carrier away.
    lab.b.run(|| {
        lab::block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            let index = Netlink::open().await.unwrap().link_index("b0").await.unwrap();
            handle
                .link()
                .set(rtnetlink::LinkUnspec::new_with_index(index).down().build())
                .execute()
                .await
                .unwrap();
        });
    });
    lab.a.run(|| {
        let begin = std::time::Instant::now();
        // The kernel announces a lost carrier a moment later.
        while interface::by_subnet(ADDR_B.into()).unwrap().up {
            assert!(begin.elapsed() < lab::LIMIT, "still up");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    });
}
