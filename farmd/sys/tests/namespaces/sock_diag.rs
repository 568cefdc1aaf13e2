use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use farm_sys::sock_diag::{SockDiag, TcpSocket, state};

use crate::lab::{self, ADDR_A, ADDR_B, LIMIT, Lab};

/// A connection from `b` to a listener in `a`: (client's end, server's end).
fn connect(lab: &Lab, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let port = listener.local_addr().unwrap().port();
    let client = lab.b.run(|| TcpStream::connect((ADDR_A, port)).unwrap());
    client.set_read_timeout(Some(LIMIT)).unwrap();
    (client, listener.accept().unwrap().0)
}

fn is_between(socket: &TcpSocket, client: &TcpStream) -> bool {
    socket.remote == client.local_addr().unwrap() && socket.local == client.peer_addr().unwrap()
}

fn destroys_on(bind: IpAddr) {
    let lab = Lab::new();
    let (listener, mut diag) = lab
        .a
        .run(|| (TcpListener::bind((bind, 8080)).unwrap(), SockDiag::open().unwrap()));
    let (mut client, mut server) = connect(&lab, &listener);
    let (mut spared, _server) = connect(&lab, &listener);

    let found = diag.tcp_sockets(&[ADDR_A.into()]).unwrap();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found
            .iter()
            .all(|socket| socket.state == state::ESTABLISHED && socket.inode != 0),
        "{found:?}"
    );
    let target = found.iter().find(|socket| is_between(socket, &client)).unwrap();
    let mut has = |ends: (SocketAddr, SocketAddr)| diag.has_tcp(ends.0, ends.1).unwrap();
    let ends = |client: &TcpStream| (client.peer_addr().unwrap(), client.local_addr().unwrap());
    assert!(has(ends(&client)) && has(ends(&spared)));
    let (vip, mut nobody) = ends(&client);
    nobody.set_port(1);
    assert!(!has((vip, nobody)), "the listener is no connection");
    nobody.set_ip(Ipv6Addr::LOCALHOST.into());
    assert!(!has(("[::1]:8080".parse().unwrap(), nobody)));
    diag.destroy(target).unwrap();
    assert!(!diag.has_tcp(target.local, target.remote).unwrap());

    assert_eq!(
        client.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::ConnectionReset,
        "the client is told at once"
    );
    assert_eq!(
        server.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::ConnectionAborted
    );
    diag.destroy(target).expect("a connection that is gone is no error");
    let left = diag.tcp_sockets(&[ADDR_A.into()]).unwrap();
    assert!(left.len() == 1 && is_between(&left[0], &spared), "{left:?}");
    spared.write_all(b"still there").unwrap();
}

#[test]
fn a_destroyed_connection_is_reset_and_the_others_live() {
    if lab::privileged() {
        destroys_on(ADDR_A.into());
    }
}

#[test]
fn an_ipv4_connection_of_an_ipv6_socket_is_listed_and_destroyed_as_ipv4() {
    if lab::privileged() {
        destroys_on(Ipv6Addr::UNSPECIFIED.into());
    }
}

#[test]
fn only_asked_addresses_and_states_are_listed() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (listener, mut diag) = lab
        .a
        .run(|| (TcpListener::bind((ADDR_A, 8080)).unwrap(), SockDiag::open().unwrap()));
    let (client, server) = connect(&lab, &listener);
    assert_eq!(diag.tcp_sockets(&[]).unwrap(), []);
    assert_eq!(
        diag.tcp_sockets(&[ADDR_B.into()]).unwrap(),
        [],
        "the client's end is in another namespace"
    );
    // The side that closes first waits; the kernel puts something smaller in the place of its socket meanwhile.
    drop(server);
    let begin = Instant::now();
    loop {
        let closed = diag.tcp_sockets(&[ADDR_A.into()]).unwrap();
        let states: Vec<u8> = closed.iter().map(|socket| socket.state).collect();
        if states == [state::FIN_WAIT1] || states == [state::FIN_WAIT2] {
            break;
        }
        assert!(begin.elapsed() < LIMIT, "{closed:?}");
    }
    drop(client);
    let begin = Instant::now();
    while !diag.tcp_sockets(&[ADDR_A.into()]).unwrap().is_empty() {
        assert!(begin.elapsed() < LIMIT);
    }
    let waiting = diag.tcp_sockets_with_time_wait(&[ADDR_A.into()]).unwrap();
    assert!(
        matches!(
            waiting[..],
            [TcpSocket {
                state: state::TIME_WAIT,
                ..
            }]
        ),
        "{waiting:?}"
    );
    diag.destroy(&waiting[0]).unwrap();
    assert_eq!(diag.tcp_sockets_with_time_wait(&[ADDR_A.into()]).unwrap(), []);
}

#[test]
fn ten_thousand_connections_are_listed_in_a_moment() {
    if !lab::privileged() {
        return;
    }
    // Each takes a descriptor at the client's end; the server's end is closed and lives on in the kernel.
    const COUNT: usize = 10_000;
    let lab = Lab::new();
    let (listener, mut diag) = lab
        .a
        .run(|| (TcpListener::bind((ADDR_A, 8080)).unwrap(), SockDiag::open().unwrap()));
    let clients: Vec<TcpStream> = lab.b.run(|| {
        let pairs = (0..COUNT).map(|_| (TcpStream::connect((ADDR_A, 8080)).unwrap(), listener.accept().unwrap()));
        pairs.map(|(client, _)| client).collect()
    });
    let begin = Instant::now();
    let found = diag.tcp_sockets(&[ADDR_A.into()]).unwrap();
    let elapsed = begin.elapsed();
    println!("{COUNT} connections in {elapsed:?}");
    assert_eq!(found.len(), clients.len());
    // Measured: about 25 ms in a debug build. The bound leaves room for a busy machine and none for a dump that grows with the square.
    assert!(elapsed < Duration::from_millis(500), "{elapsed:?} for {COUNT}");
}
