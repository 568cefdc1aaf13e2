//! Node-to-node frames: what goes in comes out, and nothing else is taken.

use proptest::prelude::*;

use super::*;

fn opening(node: usize, nonce: u8) -> Opening {
    Opening {
        node: NodeId::new(node).unwrap(),
        nonce: [nonce; NONCE_LEN],
    }
}

fn key(byte: u8) -> ClusterKey {
    ClusterKey::from_bytes([byte; 32])
}

/// Client and server of one connection.
fn pair(client_key: u8, server_key: u8, nonces: (u8, u8)) -> (Session, Session) {
    let (server, client) = (opening(1, nonces.0), opening(2, nonces.1));
    (
        Session::new(&key(client_key), Side::Client, &server, &client),
        Session::new(&key(server_key), Side::Server, &server, &client),
    )
}

fn request() -> Frame {
    Frame::Request(Request {
        method: "POST".into(),
        path: "/v1/modules/web/start".into(),
        by: "root".into(),
        body: b"{}".to_vec(),
    })
}

/// Takes `bytes` as they came.
fn take(session: &mut Session, bytes: &[u8]) -> Result<Frame, FrameError> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
    let length = Session::rest_len(header)?;
    assert_eq!(rest.len(), length);
    session.open(header, rest)
}

#[test]
fn an_opening_is_read_as_it_was_written_and_nothing_else_is_one() {
    let opening = opening(63, 9);
    let bytes = opening.emit();
    assert_eq!(Opening::parse(&bytes), Ok(opening));
    let changed = |at: usize, to: u8| {
        let mut bytes = bytes;
        bytes[at] = to;
        Opening::parse(&bytes)
    };
    assert_eq!(changed(0, b'X'), Err(FrameError::Magic));
    assert_eq!(changed(4, 2), Err(FrameError::Version(2)));
    assert_eq!(changed(5, 64), Err(FrameError::Malformed("node")));
    assert_eq!(changed(7, 1), Err(FrameError::Malformed("opening")));
    assert_eq!(Opening::parse(b"GET / HTTP/1.1\r\nHost: a\r"), Err(FrameError::Magic));
}

#[test]
fn a_conversation_arrives_in_both_directions() {
    let (mut client, mut server) = pair(7, 7, (1, 2));
    let sealed = client.seal(&request()).unwrap();
    assert_eq!(take(&mut server, &sealed), Ok(request()));
    for frame in [
        Frame::Head(200),
        Frame::Alive,
        Frame::Body(vec![1; MAX_PIECE]),
        Frame::End,
    ] {
        let sealed = server.seal(&frame).unwrap();
        assert_eq!(take(&mut client, &sealed), Ok(frame));
    }
}

#[test]
fn another_key_is_refused_by_either_side() {
    let (mut client, mut server) = pair(7, 8, (1, 2));
    let sealed = client.seal(&request()).unwrap();
    assert_eq!(take(&mut server, &sealed), Err(FrameError::Authentication));
    let sealed = server.seal(&Frame::Head(200)).unwrap();
    assert_eq!(take(&mut client, &sealed), Err(FrameError::Authentication));
}

#[test]
fn a_recording_fits_no_other_place() {
    let (mut client, mut server) = pair(7, 7, (1, 2));
    let first = client.seal(&request()).unwrap();
    assert_eq!(take(&mut server, &first), Ok(request()));
    assert_eq!(
        take(&mut server, &first),
        Err(FrameError::Authentication),
        "a second time"
    );
    // Another challenge, another client nonce, or sent back to its sender.
    for nonces in [(3, 2), (1, 3)] {
        let (_, mut other) = pair(7, 7, nonces);
        assert_eq!(take(&mut other, &first), Err(FrameError::Authentication), "{nonces:?}");
    }
    assert_eq!(take(&mut client, &first), Err(FrameError::Authentication), "reflected");
    // Out of order.
    let (mut client, mut server) = pair(7, 7, (1, 2));
    let (_skipped, second) = (server.seal(&Frame::Head(200)), server.seal(&Frame::End).unwrap());
    assert_eq!(
        take(&mut client, &second),
        Err(FrameError::Authentication),
        "second before first"
    );
}

#[test]
fn a_node_cannot_be_taken_for_another() {
    let (server, client) = (opening(1, 1), opening(2, 2));
    let mut honest = Session::new(&key(7), Side::Client, &server, &client);
    let claimed = Opening {
        node: NodeId::new(3).unwrap(),
        ..client
    };
    let mut deceived = Session::new(&key(7), Side::Server, &server, &claimed);
    let sealed = honest.seal(&request()).unwrap();
    assert_eq!(take(&mut deceived, &sealed), Err(FrameError::Authentication));
}

#[test]
fn what_is_too_long_is_neither_sent_nor_read() {
    let (mut client, mut server) = pair(7, 7, (1, 2));
    let long = Frame::Body(vec![0; MAX_PAYLOAD + 1]);
    assert_eq!(server.seal(&long), Err(FrameError::TooLong(MAX_PAYLOAD + 1)));
    let sealed = server.seal(&Frame::Head(200)).unwrap();
    assert_eq!(take(&mut client, &sealed), Ok(Frame::Head(200)), "nothing was counted");
    let header = [0xff, 0xff, 0xff, 0xff, 3];
    assert_eq!(Session::rest_len(&header), Err(FrameError::TooLong(u32::MAX as usize)));
    let Frame::Request(request) = request() else {
        unreachable!()
    };
    let by = "x".repeat(256);
    let named = Frame::Request(Request { by, ..request });
    assert_eq!(client.seal(&named), Err(FrameError::Malformed("request")));
}

fn frames() -> impl Strategy<Value = Frame> {
    let bytes = proptest::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        ("[A-Z]{0,9}", "[a-zé/]{0,300}", "[a-z é]{0,100}", bytes.clone())
            .prop_map(|(method, path, by, body)| { Frame::Request(Request { method, path, by, body }) }),
        any::<u16>().prop_map(Frame::Head),
        bytes.prop_map(Frame::Body),
        Just(Frame::Alive),
        Just(Frame::End),
    ]
}

proptest! {
    #[test]
    fn every_frame_is_read_as_it_was_written(sent in proptest::collection::vec(frames(), 1..6)) {
        let (mut client, mut server) = pair(7, 7, (1, 2));
        for frame in sent {
            let sealed = client.seal(&frame).unwrap();
            prop_assert_eq!(take(&mut server, &sealed), Ok(frame));
        }
    }

    #[test]
    fn a_changed_bit_is_always_noticed(frame in frames(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let (mut client, mut server) = pair(7, 7, (1, 2));
        let mut sealed = client.seal(&frame).unwrap();
        // A changed length changes how much is read, which is the tag's business only once it has all come.
        let at = 4 + at.index(sealed.len() - 4);
        sealed[at] ^= 1 << bit;
        prop_assert_eq!(take(&mut server, &sealed), Err(FrameError::Authentication));
    }

    #[test]
    fn no_authentic_payload_makes_the_reader_panic(kind in any::<u8>(), payload in proptest::collection::vec(any::<u8>(), 0..64)) {
        let (client, mut server) = pair(7, 7, (1, 2));
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
        header[4] = kind;
        let tag = client.tag(Side::Client, 0, &[&header[..], &payload[..]].concat());
        let opened = server.open(&header, &[&payload[..], &tag[..]].concat());
        prop_assert_ne!(opened, Err(FrameError::Authentication));
    }
}
