//! Checkers against real sockets on loopback.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::*;
use crate::scratch::Background;
use farm_core::config::CheckerAction;
use farm_sys::event_fd::EventFd;

const LIMIT: Duration = Duration::from_secs(10);

fn config(addr: SocketAddr) -> TcpCheckerConfig {
    TcpCheckerConfig {
        ident: "web".into(),
        action: CheckerAction::Restart,
        addr: addr.ip(),
        port: addr.port(),
        interval: Duration::from_millis(50),
        timeout: Duration::from_millis(300),
        rise: 1,
        fall: 2,
    }
}

struct Lab {
    runtime: Background,
    sender: EventSender,
    events: Receiver<Event>,
}

impl Lab {
    fn new() -> Self {
        let runtime = Background::new();
        let (sender, events) = EventSender::channel(Arc::new(EventFd::new().unwrap()));
        Self {
            runtime,
            sender,
            events,
        }
    }

    fn start(&self, config: TcpCheckerConfig) -> CheckerSet {
        let module = "web".parse().unwrap();
        CheckerSet::start(self.runtime.handle(), &module, &[config], &self.sender)
    }

    fn verdict(&self) -> (bool, String) {
        match self.events.recv_timeout(LIMIT).expect("a verdict in time") {
            Event::Checked {
                resource, up, detail, ..
            } => {
                assert_eq!(resource, "tcp.web");
                (up, detail)
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

#[test]
fn a_service_is_up_goes_down_and_comes_back_each_told_once() {
    let lab = Lab::new();
    let (service, addr) = listener();
    let _set = lab.start(config(addr));
    let (up, detail) = lab.verdict();
    assert!(up && detail.contains("accepts connections"), "{detail}");
    assert!(
        lab.events.recv_timeout(Duration::from_millis(300)).is_err(),
        "an unchanged verdict is not repeated"
    );
    drop(service);
    let (up, detail) = lab.verdict();
    assert!(!up && detail.contains("refuses the connection"), "{detail}");
    let _service = TcpListener::bind(addr).unwrap();
    assert!(lab.verdict().0);
}

#[test]
fn a_service_that_starts_late_is_found_quickly_despite_a_long_interval() {
    let lab = Lab::new();
    let (service, addr) = listener();
    drop(service);
    let _set = lab.start(TcpCheckerConfig {
        interval: Duration::from_secs(60),
        timeout: Duration::from_secs(5),
        ..config(addr)
    });
    std::thread::sleep(Duration::from_millis(500));
    let _service = TcpListener::bind(addr).unwrap();
    let begin = Instant::now();
    assert!(lab.verdict().0);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
}

#[test]
fn a_service_that_never_comes_is_down_after_fall_times_timeout() {
    let lab = Lab::new();
    let (service, addr) = listener();
    drop(service);
    let begin = Instant::now();
    let _set = lab.start(config(addr));
    assert!(!lab.verdict().0);
    let took = begin.elapsed();
    assert!(
        (Duration::from_millis(600)..Duration::from_secs(2)).contains(&took),
        "{took:?}"
    );
}

#[test]
fn a_dropped_set_probes_no_more() {
    let lab = Lab::new();
    let (service, addr) = listener();
    let set = lab.start(config(addr));
    assert!(lab.verdict().0);
    drop(set);
    service.set_nonblocking(true).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    while service.accept().is_ok() {}
    std::thread::sleep(Duration::from_millis(300));
    assert!(service.accept().is_err(), "a probe came after the end");
}

#[test]
fn a_connection_to_itself_is_no_service() {
    // Connecting a port of the ephemeral range to itself, until the kernel picks it as the source, needs many tries;
    // a socket bound to the port first does it at once.
    let lab = Lab::new();
    let result = lab.runtime.handle().block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((IpAddr::V4(Ipv4Addr::LOCALHOST), 0).into()).unwrap();
        let addr = socket.local_addr().unwrap();
        let stream = socket.connect(addr).await.unwrap();
        tcp::judge(addr, &stream)
    });
    assert!(result.unwrap_err().to_string().contains("nobody listens"));
}
