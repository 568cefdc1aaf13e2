use std::sync::atomic::AtomicUsize;

use farm_core::balance::decide::Reason;

use super::*;

fn frame<'a>(bytes: &'a [u8], outcome: Outcome) -> Frame<'a> {
    Frame {
        unix_us: 1,
        interface: 3,
        by_kernel: false,
        length: bytes.len() as u32,
        bytes,
        outcome,
        cause: Cause::Judged(Reason::Own),
        sent_on: NodeSet::EMPTY,
        place: Some((0, 17)),
        owner: None,
    }
}

fn syn() -> Vec<u8> {
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4([198, 18, 0, 2], [198, 18, 0, 20], 64)
        .tcp(4000, 80, 1, 1024)
        .syn()
        .write(&mut frame, &[7; 40])
        .unwrap();
    frame
}

#[test]
fn each_trace_is_shown_what_it_wants_and_counts_what_it_sees() {
    let tracer = Tracer::default();
    tracer.set_interfaces([(3, "lan0".to_owned())].into());
    let mut all = tracer.start(Filter::default(), 64).unwrap();
    let mut dropped = tracer.start("dropped".parse().unwrap(), 2048).unwrap();
    assert_eq!(tracer.snap(), Some(2048));
    let syn = syn();
    tracer.offer(&frame(&syn, Outcome::Accepted));
    tracer.offer(&frame(&syn, Outcome::Dropped));
    tracer.offer(&frame(&[0; 10], Outcome::Dropped));
    let first = all.records.try_recv().unwrap();
    assert_eq!((first.bytes.len(), first.length), (syn.len().min(64), syn.len() as u32));
    assert_eq!(
        (first.interface.as_str(), first.place),
        ("lan0", Some(("?".to_owned(), 17)))
    );
    assert!(all.records.try_recv().is_ok() && all.records.try_recv().is_err());
    let shown = dropped.records.try_recv().unwrap();
    assert_eq!((shown.subject.outcome, shown.bytes), (Outcome::Dropped, syn));
    assert!(dropped.records.try_recv().is_err());
    assert_eq!((dropped.tally.seen(), dropped.tally.lost()), (2, 0));
}

#[test]
fn a_slow_reader_loses_frames_and_stops_nobody() {
    let counters = Arc::new(Counters::default());
    let tracer = Tracer::new(Arc::clone(&counters), Box::new(|_| {}));
    let slow = tracer.start(Filter::default(), 64).unwrap();
    let syn = syn();
    for _ in 0..QUEUE + 10 {
        tracer.offer(&frame(&syn, Outcome::Accepted));
    }
    tracer.lost_in_kernel(5);
    assert_eq!((slow.tally.seen(), slow.tally.lost()), (QUEUE as u64 + 15, 15));
    assert_eq!(counters.read()["dataplane_trace_lost"], 15);
}

#[test]
fn the_data_plane_is_told_with_each_beginning_and_end() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let switch = move |begun: Option<Begun>| {
        counted.fetch_add(1, Ordering::Relaxed);
        if let Some(begun) = begun {
            let _ = begun.send(None);
        }
    };
    let tracer = Tracer::new(Arc::default(), Box::new(switch));
    let mut running: Vec<Running> = (0..MAX_TRACES)
        .map(|_| tracer.start(Filter::default(), 64).unwrap())
        .collect();
    assert_eq!(tracer.start(Filter::default(), 64).unwrap_err(), TooMany);
    assert_eq!(running[0].begun.try_recv(), Ok(None));
    let id = running[1].id;
    assert!(tracer.stop(id) && !tracer.stop(id), "once");
    assert_eq!(
        running[1].records.try_recv(),
        Err(mpsc::error::TryRecvError::Disconnected)
    );
    drop(running);
    assert_eq!(tracer.snap(), None);
    assert_eq!(calls.load(Ordering::Relaxed), 2 * MAX_TRACES);
}
