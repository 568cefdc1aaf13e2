//! `farm demo-server`: the small web server of the `demo` module, which shows who answers.
//!
//! `GET /` is a page that asks many times at once and colours each tile by the node that answered it; `GET /who` is
//! `{"node":…,"client":…,"count":…}`. It runs in the foreground until SIGTERM or SIGINT, then lets open requests end.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use farm_core::api::exit;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet};

use crate::args::DemoServerArgs;
use crate::failure::Failure;
use crate::terminal::show;

/// The page; `{node}` and `{client}` are filled in.
const PAGE: &str = include_str!("demo_server/page.html");
/// Time that open requests get at the end.
const GRACE: Duration = Duration::from_secs(5);
/// A client must have sent its request head within this time.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed `accept`, so that a lack of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Runs `farm demo-server`.
pub fn run(args: &DemoServerArgs) -> Result<u8, Failure> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .unwrap_or_default()
            .trim_end()
            .to_owned(),
    };
    let failed = |what: &str, e: std::io::Error| Failure::new(exit::FAILED, format!("{what}: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| failed("cannot wait for events", e))?;
    LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind(args.addr)
            .await
            .map_err(|e| failed(&format!("cannot listen on {}", args.addr), e))?;
        let stop = stop_signal().map_err(|e| failed("cannot wait for signals", e))?;
        let addr = listener.local_addr().unwrap_or(args.addr);
        let _pidfile = args.pidfile.as_deref().map(PidFile::write).transpose()?;
        show(&format!("{name} serves on http://{addr}/\n"))?;
        serve(listener, &name, stop).await;
        Ok(exit::OK)
    })
}

/// Ends when the process is asked to end.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// A file with this process's id, removed at the end.
struct PidFile<'a>(&'a Path);

impl<'a> PidFile<'a> {
    fn write(path: &'a Path) -> Result<Self, Failure> {
        std::fs::write(path, format!("{}\n", std::process::id())).map_err(|e| Failure::file("written", path, &e))?;
        Ok(Self(path))
    }
}

impl Drop for PidFile<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

/// Answers on `listener` until `stop`, then until open requests are answered or [`GRACE`] is over.
async fn serve(listener: TcpListener, name: &str, stop: impl Future<Output = ()>) {
    let name: Rc<str> = name.into();
    let count = Rc::new(Cell::new(0));
    let (ending, _) = watch::channel(());
    let mut open = JoinSet::new();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = open.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => {
                    open.spawn_local(converse(stream, client, Rc::clone(&name), Rc::clone(&count), ending.subscribe()));
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }
    // Closed first: a client that comes now is told at once that nobody listens.
    drop(listener);
    let _ = ending.send(());
    let _ = tokio::time::timeout(GRACE, async { while open.join_next().await.is_some() {} }).await;
}

/// One client from connect to disconnect.
async fn converse(
    stream: TcpStream,
    client: SocketAddr,
    name: Rc<str>,
    count: Rc<Cell<u64>>,
    mut ending: watch::Receiver<()>,
) {
    let service = service_fn(|request| {
        let response = answer(&request, client, &name, &count);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = ending.changed() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

fn answer(request: &Request<Incoming>, client: SocketAddr, name: &str, count: &Cell<u64>) -> Response<Full<Bytes>> {
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    match request.uri().path() {
        "/" | "/who" if !get => {
            let mut response = respond(
                StatusCode::METHOD_NOT_ALLOWED,
                "text/plain",
                "only GET is answered here\n".to_owned(),
            );
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
        "/" => {
            let page = PAGE
                .replace("{node}", &escape(name))
                .replace("{client}", &escape(&client.to_string()));
            respond(StatusCode::OK, "text/html; charset=utf-8", page)
        }
        "/who" => {
            count.set(count.get() + 1);
            let json = serde_json::json!({ "node": name, "client": client.to_string(), "count": count.get() });
            let mut response = respond(StatusCode::OK, "application/json", format!("{json}\n"));
            // A connection per request: each one is a new choice of the farm.
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
            response
        }
        _ => respond(
            StatusCode::NOT_FOUND,
            "text/plain",
            "there is only / and /who here\n".to_owned(),
        ),
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// `text` as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    async fn request(addr: SocketAddr, line: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream
            .write_all(format!("{line} HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn with_server<T>(test: impl AsyncFnOnce(SocketAddr, oneshot::Sender<()>) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        LocalSet::new().block_on(&runtime, async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let (stop, stopped) = oneshot::channel();
            let server = tokio::task::spawn_local(async move {
                serve(listener, "s<1>", async { stopped.await.unwrap_or_default() }).await;
            });
            let result = test(addr, stop).await;
            let ended = tokio::time::timeout(Duration::from_secs(3), server).await;
            ended.expect("the server ends soon after it was asked to").unwrap();
            result
        })
    }

    #[test]
    fn it_tells_who_answers_and_counts() {
        with_server(async |addr, _stop| {
            request(addr, "GET /who").await;
            let answer = request(addr, "GET /who").await;
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(body["node"], "s<1>");
            assert_eq!(body["count"], 2);
            assert!(body["client"].as_str().unwrap().starts_with("127.0.0.1:"));
            let page = request(addr, "GET /").await;
            assert!(
                page.contains("s&lt;1&gt;") && !page.contains("s<1>") && !page.contains("{node}"),
                "{page}"
            );
            assert!(request(addr, "GET /x").await.starts_with("HTTP/1.1 404 "));
            assert!(request(addr, "POST /who").await.starts_with("HTTP/1.1 405 "));
        });
    }

    #[test]
    fn an_idle_connection_does_not_keep_it_from_ending() {
        with_server(async |addr, stop| {
            let mut idle = TcpStream::connect(addr).await.unwrap();
            idle.write_all(b"GET / HTTP/1.1\r\nhost: demo\r\n\r\n").await.unwrap();
            let mut first = [0; 64];
            assert!(idle.read(&mut first).await.unwrap() > 0);
            stop.send(()).unwrap();
            let mut rest = Vec::new();
            let read = tokio::time::timeout(Duration::from_secs(3), idle.read_to_end(&mut rest));
            read.await.expect("an idle connection is closed").unwrap();
        });
    }
}
