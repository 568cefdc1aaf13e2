//! The control socket against a fake owner loop, over a real Unix socket.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;

use farm_core::api::{ClusterStatus, HeartbeatStatus, Reply, exit};
use farm_core::config;
use farm_core::id::NodeId;
use farm_core::wire::auth::ClusterKey;
use farm_sys::event_fd::EventFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::event::{Command, Event, Query, Verb};

/// Node s1 of a cluster whose s2 is nowhere.
fn peers() -> Arc<Peers> {
    let xml = r#"<cluster><lans><lan name="default"><node name="s1" addr="127.0.0.1"/><node name="s2" addr="127.0.0.2"/></lan></lans></cluster>"#;
    let (cluster, _) = config::cluster::parse("cluster.xml", xml).unwrap();
    Arc::new(Peers::new(
        cluster,
        ClusterKey::from_bytes([7; 32]),
        NodeId::new(0).unwrap(),
    ))
}

/// A folder of its own that goes away with it.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("farm-control-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("farmd.sock")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Plays the owner loop: answers what it gets and tells the test what it was.
fn owner(events: std_mpsc::Receiver<Event>) -> std_mpsc::Receiver<String> {
    let (seen, told) = std_mpsc::channel();
    std::thread::spawn(move || {
        for event in events {
            let _ = seen.send(format!("{event:?}"));
            match event {
                Event::Command(Command {
                    verb: Verb::Stop(_), ..
                }) => {}
                Event::Command(Command {
                    verb: Verb::Restart(_),
                    replies,
                    ..
                }) => {
                    let _ = replies.send(Reply::Failed {
                        error: "stopped".into(),
                        code: exit::REFUSED,
                    });
                    let _ = replies.send(Reply::Done {
                        text: "never shown".into(),
                    });
                }
                Event::Command(Command { replies, .. }) => {
                    let _ = replies.send(Reply::Progress {
                        text: "prestart".into(),
                    });
                    let _ = replies.send(Reply::Done {
                        text: "UP Ready".into(),
                    });
                }
                Event::Query(Query::Cluster(sender)) => {
                    let answer = ClusterStatus {
                        node: "s1".into(),
                        digest: "00".into(),
                        view: vec!["s1".into()],
                        coordinator: None,
                        nodes: Vec::new(),
                        plan_version: 3,
                        incarnation: 1,
                        heartbeat: HeartbeatStatus::default(),
                    };
                    let _ = sender.send(answer);
                }
                Event::Query(Query::Metrics(sender)) => {
                    let _ = sender.send(BTreeMap::from([("frames".to_owned(), 7)]));
                }
                Event::Query(_) => {}
                _ => {}
            }
        }
    });
    told
}

/// A served socket, the requests the owner loop saw, and one runtime to talk on.
struct Served {
    folder: Folder,
    told: std_mpsc::Receiver<String>,
    runtime: tokio::runtime::Runtime,
}

impl Served {
    fn new(test: &str) -> Self {
        let folder = Folder::new(test);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (sender, receiver) = EventSender::channel(Arc::new(EventFd::new().unwrap()));
        let told = owner(receiver);
        runtime.block_on(async {
            let listener = bind(&folder.socket()).unwrap();
            tokio::spawn(serve(listener, sender, peers()));
        });
        Self { folder, told, runtime }
    }

    /// Sends `request` as it stands and returns everything that comes back until the connection ends.
    fn raw(&self, request: &[u8]) -> String {
        self.runtime.block_on(async {
            let mut stream = UnixStream::connect(self.folder.socket()).await.unwrap();
            stream.write_all(request).await.unwrap();
            let mut answer = Vec::new();
            let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer));
            read.await.expect("no answer in time").unwrap();
            String::from_utf8(answer).unwrap()
        })
    }

    fn request(&self, method: &str, path: &str, body: &str) -> String {
        let length = body.len();
        self.raw(
            format!(
                "{method} {path} HTTP/1.1\r\nhost: farm\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        )
    }

    fn seen(&self) -> String {
        self.told
            .recv_timeout(Duration::from_secs(5))
            .expect("the owner loop saw nothing")
    }

    fn nothing_seen(&self) -> bool {
        self.told.try_recv().is_err()
    }
}

#[test]
fn questions_reach_the_owner_loop_and_its_answers_come_back_as_json() {
    let served = Served::new("questions");
    let answer = served.request("GET", "/v1/metrics", "");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("content-type: application/json"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n{\"frames\":7}"), "{answer}");
    assert!(served.request("GET", "/v1/cluster", "").contains("\"node\":\"s1\""));
}

#[test]
fn the_words_of_a_question_about_the_history_are_checked() {
    let served = Served::new("history");
    for words in ["n=many", "since=-1", "module=../x", "colour=red", "n"] {
        let answer = served.request("GET", &format!("/v1/history?{words}"), "");
        assert!(answer.starts_with("HTTP/1.1 400 "), "{words}: {answer}");
    }
}

#[test]
fn a_question_the_owner_loop_drops_is_answered_with_503() {
    let served = Served::new("dropped");
    assert!(served.request("GET", "/v1/status", "").starts_with("HTTP/1.1 503 "));
}

#[test]
fn a_command_streams_its_replies_and_ends_after_the_last_one() {
    let served = Served::new("command");
    let answer = served.request(
        "POST",
        "/v1/modules/demo/start",
        r#"{"identity":"tcp.http","wait":true}"#,
    );
    assert!(answer.contains("content-type: application/x-ndjson"), "{answer}");
    let progress = answer.find(r#"{"kind":"progress","text":"prestart"}"#).unwrap();
    let done = answer.find(r#"{"kind":"done","text":"UP Ready"}"#).unwrap();
    assert!(progress < done);
    let seen = served.seen();
    assert!(
        seen.contains(r#"Start(CommandRequest { by: "tcp.http", identity: Some("tcp.http"), wait: true })"#),
        "{seen}"
    );

    let answer = served.request("POST", "/v1/modules/demo/restart", "{}");
    assert!(
        answer.contains(r#""kind":"failed""#) && !answer.contains("never shown"),
        "{answer}"
    );
}

#[test]
fn a_command_without_a_body_is_by_the_peers_user() {
    let served = Served::new("by");
    served.request("POST", "/v1/modules/demo/forcestop", "");
    let me = served.runtime.block_on(async { user_name(own_uid().unwrap()) });
    assert!(served.seen().contains(&format!(
        "ForceStop(CommandRequest {{ by: {me:?}, identity: None, wait: false }})"
    )));
}

#[test]
fn only_root_and_the_daemons_own_user_are_heard() {
    assert_eq!(caller(Some(0), Some(4242)).as_deref(), Some("root"));
    assert_eq!(caller(Some(3_999_999), Some(3_999_999)).as_deref(), Some("uid 3999999"));
    assert_eq!(caller(Some(3_999_999), Some(0)), None);
    assert_eq!(caller(Some(3_999_999), None), None);
    assert_eq!(caller(None, None), None);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (sender, events) = EventSender::channel(Arc::new(EventFd::new().unwrap()));
    let answer = runtime.block_on(async {
        let (mut client, server) = UnixStream::pair().unwrap();
        tokio::spawn(converse(server, None, sender, peers()));
        let request = b"POST /v1/modules/demo/stop HTTP/1.1\r\nhost: farm\r\nconnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    });
    assert!(
        answer.starts_with("HTTP/1.1 403 ") && answer.contains("only root"),
        "{answer}"
    );
    assert!(events.try_recv().is_err());
}

#[test]
fn a_command_whose_sender_is_dropped_still_gets_a_last_line() {
    let served = Served::new("last-line");
    let answer = served.request("POST", "/v1/modules/demo/stop", "");
    assert!(
        answer.contains(r#"{"kind":"failed","error":"farmd ended before the command did","code":1}"#),
        "{answer}"
    );
}

#[test]
fn a_printed_line_keeps_its_text_but_not_the_end_of_the_line() {
    let served = Served::new("print");
    served.request(
        "POST",
        "/v1/modules/demo/print",
        r#"{"level":"E","text":"a | b\nc\n","origin":"db"}"#,
    );
    let seen = served.seen();
    assert!(
        seen.contains(r#"Print(PrintRequest { level: 'E', text: "a | b\nc", origin: Some("db") })"#),
        "{seen}"
    );
}

#[test]
fn bad_requests_are_refused_before_the_owner_loop() {
    let served = Served::new("refused");
    let cases: [(&str, &str, &str, &str, &str); 14] = [
        ("GET", "/", "", "404", "there is no `/` here"),
        ("GET", "/v1/statuses", "", "404", "there is no"),
        ("POST", "/v1/modules/demo/explode", "", "404", "there is no"),
        ("POST", "/v1/modules/demo", "", "404", "there is no"),
        ("POST", "/v1/status", "", "405", "takes GET, not POST"),
        ("GET", "/v1/modules/demo/start", "", "405", "takes POST, not GET"),
        ("POST", "/v1/modules/..%2f/start", "", "400", "is no module name"),
        ("POST", "/v1/modules/-x/start", "", "400", "is no module name"),
        ("POST", "/v1/modules/demo/start", "{", "400", "not the JSON"),
        (
            "POST",
            "/v1/modules/demo/start",
            r#"{"user":"x"}"#,
            "400",
            "unknown field",
        ),
        (
            "POST",
            "/v1/modules/demo/start",
            r#"{"by":"a\nb"}"#,
            "400",
            "`by` must be",
        ),
        (
            "POST",
            "/v1/modules/demo/print",
            r#"{"level":"C","text":"x","origin":null}"#,
            "400",
            "`I` or `E`",
        ),
        (
            "POST",
            "/v1/modules/demo/resource",
            r#"{"resource":"x","value":"up","identity":null}"#,
            "400",
            "class.ident",
        ),
        (
            "POST",
            "/v1/modules/demo/resource",
            r#"{"resource":"a.b","value":"","identity":null}"#,
            "400",
            "`value` must",
        ),
    ];
    for (method, path, body, status, text) in cases {
        let answer = served.request(method, path, body);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{method} {path} {body}: {answer}"
        );
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert!(
            json["error"].as_str().unwrap().contains(text),
            "{method} {path} {body}: {json}"
        );
    }
    assert!(served.request("DELETE", "/v1/plan", "").contains("allow: GET"));
    assert!(served.nothing_seen());
}

#[test]
fn a_large_body_is_refused_whether_or_not_its_length_was_told() {
    let served = Served::new("large");
    let told = "POST /v1/modules/demo/start HTTP/1.1\r\nhost: farm\r\ncontent-length: 65537\r\n\r\n";
    assert!(served.raw(told.as_bytes()).starts_with("HTTP/1.1 413 "));

    let mut chunked =
        b"POST /v1/modules/demo/start HTTP/1.1\r\nhost: farm\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    chunked.extend_from_slice(format!("{:x}\r\n", MAX_BODY + 1).as_bytes());
    chunked.resize(chunked.len() + MAX_BODY + 1, b' ');
    chunked.extend_from_slice(b"\r\n0\r\n\r\n");
    assert!(served.raw(&chunked).starts_with("HTTP/1.1 413 "));
    assert!(served.nothing_seen());
}

#[test]
fn shutdown_reaches_the_owner_loop() {
    let served = Served::new("shutdown");
    assert!(served.request("POST", "/v1/shutdown", "").contains(r#""kind":"done""#));
    assert!(served.seen().starts_with("Shutdown"));
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let folder = Folder::new("bind");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();

    drop(bind(&folder.socket()).unwrap());
    assert!(folder.socket().exists(), "a dropped listener leaves its file");
    let listener = bind(&folder.socket()).expect("a stale socket is in nobody's way");
    let mode = std::fs::metadata(folder.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    assert_eq!(bind(&folder.socket()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    drop(listener);

    std::fs::remove_file(folder.socket()).unwrap();
    std::fs::write(folder.socket(), "a file").unwrap();
    let error = bind(&folder.socket()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert!(
        error.to_string().contains("farmd.sock: exists and is no socket"),
        "{error}"
    );
    assert_eq!(std::fs::read(folder.socket()).unwrap(), b"a file");
}

#[test]
fn a_trace_that_cannot_be_is_refused_before_anybody_is_asked() {
    let served = Served::new("trace");
    for (body, words) in [
        (r#"{"filter":"tcp port http"}"#, "filter, character 10"),
        (r#"{"snap":7}"#, "74 to 2048 bytes are expected"),
        (r#"{"colour":"red"}"#, "colour"),
    ] {
        let answer = served.request("POST", "/v1/trace", body);
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains(words),
            "{body}: {answer}"
        );
    }
    assert!(served.request("GET", "/v1/trace", "").starts_with("HTTP/1.1 405 "));
    assert!(served.nothing_seen());
}
