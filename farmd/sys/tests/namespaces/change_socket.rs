use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use farm_sys::change_socket::ChangeSocket;
use farm_sys::netlink::Netlink;
use farm_sys::netns::NetNs;
use farm_sys::{interface, nft};

use crate::lab::{self, LIMIT, Lab, SILENCE};

#[test]
fn it_tells_of_changes_of_its_own_kind_and_namespace() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (links, tables) = lab.a.run(|| {
        let _entered = runtime.enter();
        (ChangeSocket::links().unwrap(), ChangeSocket::tables().unwrap())
    });
    let told = |socket: &ChangeSocket, within: Duration| {
        runtime.block_on(async { tokio::time::timeout(within, socket.changed()).await.is_ok() })
    };
    // What the cable's set-up has left.
    told(&links, SILENCE);
    assert!(!told(&links, SILENCE) && !told(&tables, SILENCE), "nothing changes");

    let set_mac = |ns: &NetNs, name: &str, mac| {
        ns.run(|| {
            let index = interface::index(name).unwrap();
            runtime.block_on(async { Netlink::open().await.unwrap().set_mac(index, mac).await.unwrap() });
        });
    };
    set_mac(&lab.a, "a0", [2, 0, 0, 0, 0, 8]);
    assert!(told(&links, LIMIT), "another address");
    assert!(!told(&links, SILENCE), "and no more than that");
    set_mac(&lab.b, "b0", [2, 0, 0, 0, 0, 9]);
    assert!(!told(&links, SILENCE), "of another host");
    assert!(!told(&tables, SILENCE), "of another kind");

    lab.a.run(|| nft::install("farm_a0", "a0", &[], false).unwrap());
    assert!(told(&tables, LIMIT), "a new table");
    lab.a.run(|| nft::remove("farm_a0").unwrap());
    assert!(told(&tables, LIMIT), "none any more");
    assert!(!told(&links, SILENCE));

    // More at once than the socket has room for, as of a large firewall that is loaded anew.
    let many: Vec<IpAddr> = (0..=255).map(|last| Ipv4Addr::new(198, 19, 0, last).into()).collect();
    for _ in 0..8 {
        lab.a.run(|| nft::install("farm_a0", "a0", &many, true).unwrap());
    }
    while told(&tables, SILENCE) {}
    lab.a.run(|| nft::remove("farm_a0").unwrap());
    assert!(told(&tables, LIMIT), "it still hears");
}
