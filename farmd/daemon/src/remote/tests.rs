//! Both ends of a command against each other over loopback, with a fake owner loop behind the server.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use farm_core::config;
use farm_core::wire::command::{Request, Side};
use farm_sys::event_fd::EventFd;
use tokio::net::{TcpListener, TcpSocket};

use super::client::{Relayed, relay};
use super::server::{Server, serve};
use super::*;
use crate::event::{Command, Event, EventSender, Query};

const KEY: u8 = 7;
const SERVER: &str = "127.0.0.2";

fn node(index: usize) -> NodeId {
    NodeId::new(index).unwrap()
}

/// Plays the owner loop: every command tells one step and is done, and the test hears who asked for what.
fn owner(events: mpsc::Receiver<Event>) -> mpsc::Receiver<String> {
    let (told, seen) = mpsc::channel();
    std::thread::spawn(move || {
        for event in events {
            match event {
                Event::Command(Command { verb, replies, .. }) => {
                    let _ = told.send(format!("{verb:?}"));
                    let text = "x".repeat(100_000);
                    let _ = replies.send(farm_core::api::Reply::Progress { text });
                    let text = "UP Ready".to_owned();
                    let _ = replies.send(farm_core::api::Reply::Done { text });
                }
                Event::Query(Query::Metrics(answer)) => {
                    let counters = (0..20_000).map(|i| (format!("counter_{i:05}"), i));
                    let _ = answer.send(counters.collect());
                }
                _ => {}
            }
        }
    });
    seen
}

/// s2 (127.0.0.2), served; s1 (127.0.0.1) and s3 (127.0.0.3) may command it.
struct Served {
    cluster: ClusterConfig,
    counters: Arc<Counters>,
    seen: mpsc::Receiver<String>,
    runtime: tokio::runtime::Runtime,
}

impl Served {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (events, inbox) = EventSender::channel(Arc::new(EventFd::new().unwrap()));
        let counters = Arc::new(Counters::default());
        let cluster = runtime.block_on(async {
            let listener = TcpListener::bind((SERVER, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let nodes: String = (1..=3)
                .map(|i| format!("<node name=\"s{i}\" addr=\"127.0.0.{i}\"/>"))
                .collect();
            let xml = format!("<cluster><lans port=\"{port}\"><lan name=\"default\">{nodes}</lan></lans></cluster>");
            let (cluster, _) = config::cluster::parse("cluster.xml", &xml).unwrap();
            let peers = Peers::new(cluster.clone(), ClusterKey::from_bytes([KEY; 32]), node(1));
            let server = Server::new(Arc::new(peers), events, Arc::clone(&counters));
            tokio::spawn(serve(listener, 0, Arc::new(server)));
            cluster
        });
        Self {
            cluster,
            counters,
            seen: owner(inbox),
            runtime,
        }
    }

    fn peers(&self, this: usize, key: u8) -> Peers {
        Peers::new(self.cluster.clone(), ClusterKey::from_bytes([key; 32]), node(this))
    }

    /// What s2 answers to s1, whole.
    fn ask(&self, key: u8, method: &str, path: &str, body: &str) -> Result<(StatusCode, String), String> {
        let peers = self.peers(0, key);
        self.runtime.block_on(async {
            let relayed = relay(&peers, node(1), request(method, path, body)).await;
            match relayed.map_err(|e| e.to_string())? {
                Relayed::Whole(status, json) => Ok((status, String::from_utf8(json).unwrap())),
                Relayed::Pieces(mut pieces) => {
                    let mut all = Vec::new();
                    while let Some(piece) = pieces.recv().await {
                        all.extend(piece);
                    }
                    Ok((StatusCode::OK, String::from_utf8(all).unwrap()))
                }
            }
        })
    }

    /// A connection to s2 from `from`.
    async fn connect(&self, from: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(from.parse().unwrap(), 0)).unwrap();
        let to = SocketAddr::new(SERVER.parse().unwrap(), self.cluster.port);
        socket.connect(to).await.unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        self.counters.read()[name]
    }

    /// Waits until a counter has reached `n`: the server counts after it has closed.
    async fn counted(&self, name: &str, n: u64) {
        let all = async {
            while self.count(name) < n {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), all).await.expect(name);
    }

    fn nothing_seen(&self) -> bool {
        self.seen.try_recv().is_err()
    }
}

fn request(method: &str, path: &str, body: &str) -> Request {
    Request {
        method: method.into(),
        path: path.into(),
        by: "root".into(),
        body: body.as_bytes().to_vec(),
    }
}

/// Everything until the other side closes.
async fn rest_of(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    // A reset is an end as well.
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest));
    let _ = read.await.expect("the server closes");
    rest
}

#[test]
fn a_command_is_carried_out_with_the_node_and_the_user_who_asked() {
    let served = Served::new();
    let (status, lines) = served
        .ask(KEY, "POST", "/v1/modules/web/start", "{\"wait\":true}")
        .unwrap();
    assert_eq!(status, StatusCode::OK);
    let last = lines.trim_end().lines().last().unwrap();
    assert_eq!(last, r#"{"kind":"done","text":"UP Ready"}"#);
    assert!(lines.len() > 100_000, "a long line comes whole: {}", lines.len());
    assert_eq!(
        served.seen.recv_timeout(Duration::from_secs(5)).unwrap(),
        r#"Start(CommandRequest { by: "root on s1", identity: None, wait: true })"#
    );
    assert_eq!(served.count("commands_accepted"), 1);
}

#[test]
fn an_answer_longer_than_a_frame_comes_whole_and_a_refusal_keeps_its_status() {
    let served = Served::new();
    let (status, json) = served.ask(KEY, "GET", "/v1/metrics", "").unwrap();
    let metrics: BTreeMap<String, u64> = serde_json::from_str(&json).unwrap();
    assert_eq!((status, metrics.len()), (StatusCode::OK, 20_000));
    let (status, json) = served.ask(KEY, "POST", "/v1/modules/web/explode", "{}").unwrap();
    assert_eq!(status, StatusCode::NOT_FOUND, "{json}");
    // Nobody is asked to ask a third one.
    let (status, json) = served.ask(KEY, "GET", "/v1/on/s3/status", "").unwrap();
    assert_eq!(status, StatusCode::NOT_FOUND, "{json}");
}

#[test]
fn another_key_is_refused_and_counted() {
    let served = Served::new();
    let error = served.ask(KEY + 1, "POST", "/v1/modules/web/stop", "{}").unwrap_err();
    assert!(error.contains("node s2") && error.contains("cluster.key"), "{error}");
    served
        .runtime
        .block_on(served.counted("commands_refused_authentication", 1));
    assert!(served.nothing_seen());
}

#[test]
fn an_address_that_is_no_other_nodes_gets_not_a_byte() {
    let served = Served::new();
    served.runtime.block_on(async {
        for (n, from) in [(1, "127.0.0.9"), (2, SERVER)] {
            let mut stream = served.connect(from).await;
            assert_eq!(rest_of(&mut stream).await, b"", "{from}");
            served.counted("commands_refused_address", n).await;
        }
    });
}

#[test]
fn a_recording_and_another_nodes_name_are_refused() {
    let served = Served::new();
    served.runtime.block_on(async {
        let key = ClusterKey::from_bytes([KEY; 32]);
        let own = new_opening(node(0)).unwrap();
        let mut stream = served.connect("127.0.0.1").await;
        let theirs = read_opening(&mut stream).await.unwrap();
        let mut session = Session::new(&key, Side::Client, &theirs, &own);
        let command = Frame::Request(request("POST", "/v1/modules/web/stop", "{}"));
        let recording = [&own.emit()[..], &session.seal(&command).unwrap()].concat();
        stream.write_all(&recording).await.unwrap();
        assert!(!rest_of(&mut stream).await.is_empty());
        assert!(
            served
                .seen
                .recv_timeout(Duration::from_secs(5))
                .unwrap()
                .starts_with("Stop")
        );

        let mut again = served.connect("127.0.0.1").await;
        again.write_all(&recording).await.unwrap();
        assert_eq!(
            rest_of(&mut again).await.len(),
            OPENING_LEN,
            "the opening and nothing else"
        );
        served.counted("commands_refused_authentication", 1).await;

        // s3 has the key, and says that it is s1.
        let mut named = served.connect("127.0.0.3").await;
        named.write_all(&recording).await.unwrap();
        assert_eq!(rest_of(&mut named).await.len(), OPENING_LEN);
        served.counted("commands_refused_authentication", 2).await;
    });
    assert!(served.nothing_seen());
}

#[test]
fn what_is_no_frame_or_too_long_ends_the_connection() {
    let served = Served::new();
    served.runtime.block_on(async {
        let opening = new_opening(node(0)).unwrap().emit();
        let long = [&opening[..], &[0xff; 5]].concat();
        for (n, bytes) in [(1, b"GET / HTTP/1.1\r\nhost: farm\r\n\r\n".to_vec()), (2, long)] {
            let mut stream = served.connect("127.0.0.1").await;
            stream.write_all(&bytes).await.unwrap();
            rest_of(&mut stream).await;
            served.counted("commands_refused_malformed", n).await;
        }
    });
    assert!(served.nothing_seen());
}

#[test]
fn connections_that_say_nothing_are_limited_in_number_and_time() {
    let served = Served::new();
    served.runtime.block_on(async {
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(served.connect("127.0.0.1").await);
        }
        served.counted("commands_refused_busy", 4).await;
        // The first ones have had their time in the end, and others find room.
        served.counted("commands_refused_slow", 16).await;
        drop(silent);
    });
    assert!(served.ask(KEY, "GET", "/v1/metrics", "").is_ok());
}

#[test]
fn a_node_that_is_not_there_is_told_with_its_address() {
    let served = Served::new();
    let peers = served.peers(0, KEY);
    let error = served.runtime.block_on(async {
        let relayed = relay(&peers, node(2), request("GET", "/v1/status", "")).await;
        relayed.err().map(|e| e.to_string()).unwrap()
    });
    assert!(error.contains("node s3") && error.contains("127.0.0.3"), "{error}");
}
