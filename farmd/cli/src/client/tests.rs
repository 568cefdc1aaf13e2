use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use farm_core::api::CommandRequest;

use super::*;
use crate::folders::test::{Folder, context};

/// Plays a daemon for one connection: reads the request's head and says `pieces`, one write each. Returns the request.
fn daemon(folder: &Folder, pieces: &[&str]) -> (Context, std::thread::JoinHandle<String>) {
    let context = context(folder);
    std::fs::create_dir_all(&context.run).unwrap();
    let listener = UnixListener::bind(context.socket()).unwrap();
    let pieces: Vec<String> = pieces.iter().map(|piece| (*piece).to_owned()).collect();
    let played = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
        while !request.windows(4).any(|window| window == b"\r\n\r\n") {
            let read = stream.read(&mut buffer).unwrap();
            request.extend_from_slice(&buffer[..read]);
        }
        for piece in pieces {
            stream.write_all(piece.as_bytes()).unwrap();
        }
        String::from_utf8(request).unwrap()
    });
    (context, played)
}

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n";

fn command(context: &Context) -> (Result<Reply, ClientError>, Vec<String>) {
    let mut steps = Vec::new();
    let module = "web".parse().unwrap();
    let request = CommandRequest::default();
    let reply = Client::new(context)
        .unwrap()
        .command(&module, "start", &request, |text| steps.push(text.to_owned()));
    (reply, steps)
}

#[test]
fn nobody_there_is_one_clear_line() {
    let folder = Folder::new("client-nobody");
    let error = Client::new(&context(&folder)).unwrap().status().unwrap_err();
    let socket = context(&folder).socket();
    let failure = Failure::from(error);
    assert_eq!(failure.code, exit::NO_DAEMON);
    assert_eq!(
        failure.text,
        format!(
            "farmd is not running (no answer on {}); start it with: systemctl start farmd",
            socket.display()
        )
    );
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    assert!(
        !Client::new(&context(&folder)).unwrap().answers(),
        "a stale socket is nobody"
    );
}

#[test]
fn replies_are_read_line_by_line_however_they_are_cut() {
    let folder = Folder::new("client-lines");
    let pieces = [
        STREAM,
        "{\"kind\":\"progress\",\"text\":\"pre",
        "start\"}\n{\"kind\":\"progress\",\"text\":\"start_both\"}\n{\"kind\"",
        ":\"done\",\"text\":\"UP Ready\"}\n",
    ];
    let (context, played) = daemon(&folder, &pieces);
    let (reply, steps) = command(&context);
    assert_eq!(
        reply.unwrap(),
        Reply::Done {
            text: "UP Ready".into()
        }
    );
    assert_eq!(steps, ["prestart", "start_both"]);
    assert!(
        played
            .join()
            .unwrap()
            .starts_with("POST /v1/modules/web/start HTTP/1.1\r\n")
    );
}

#[test]
fn a_daemon_that_goes_away_is_no_success() {
    let folder = Folder::new("client-cut");
    let (context, played) = daemon(&folder, &[STREAM, "{\"kind\":\"progress\",\"text\":\"prestart\"}\n"]);
    let (reply, steps) = command(&context);
    let failure = Failure::from(reply.unwrap_err());
    assert_eq!(failure.code, exit::NO_DAEMON);
    assert!(
        failure.text.contains("ended before the command did"),
        "{}",
        failure.text
    );
    assert_eq!(steps, ["prestart"]);
    played.join().unwrap();
}

#[test]
fn a_refusal_keeps_its_text_and_gets_its_exit_code() {
    for (status, code) in [
        ("403 Forbidden", exit::DENIED),
        ("404 Not Found", exit::NOT_FOUND),
        ("400 Bad Request", exit::USAGE),
        ("503 Service Unavailable", exit::NO_DAEMON),
        ("500 Internal Server Error", exit::FAILED),
    ] {
        let folder = Folder::new(&format!("client-{}", &status[..3]));
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: 15\r\n\r\n");
        let (context, played) = daemon(&folder, &[&head, "{\"error\":\"no!\"}"]);
        let failure = Failure::from(command(&context).0.unwrap_err());
        assert_eq!((failure.code, failure.text.as_str()), (code, "no!"), "{status}");
        played.join().unwrap();
    }
}

#[test]
fn an_answer_that_is_not_understood_is_an_error() {
    let folder = Folder::new("client-nonsense");
    let (context, played) = daemon(&folder, &["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", "{}"]);
    let failure = Failure::from(Client::new(&context).unwrap().status().unwrap_err());
    assert_eq!(failure.code, exit::NO_DAEMON);
    assert!(failure.text.contains("is not understood"), "{}", failure.text);
    played.join().unwrap();
}
