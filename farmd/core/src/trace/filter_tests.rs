use proptest::prelude::*;

use super::*;
use crate::balance::decide::Reason;
use crate::balance::test_frames::*;

fn subject(frame: &[u8]) -> Subject {
    Subject {
        view: View::of(frame).unwrap(),
        outcome: Outcome::Accepted,
        sent_on: false,
        cause: Cause::Judged(Reason::Own),
    }
}

fn read(text: &str) -> Filter {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

#[test]
fn each_condition_looks_at_its_part_of_the_frame() {
    let way = Way::new(client(1), vip(), VIRTUAL_MAC);
    let (tcp, echo) = (subject(&way.tcp(4000, 80, Flags::Syn)), subject(&way.echo()));
    let held = Subject {
        outcome: Outcome::Held,
        cause: Cause::Judged(Reason::Opening),
        ..tcp
    };
    let copied = Subject { sent_on: true, ..tcp };
    let (client, vip, other) = (client(1), vip(), client(9));
    for (text, yes, no) in [
        (String::new(), vec![tcp, echo, held], vec![]),
        (format!("host {client}"), vec![tcp, echo], vec![]),
        (format!("host {vip}"), vec![tcp], vec![]),
        (format!("host {other}"), vec![], vec![tcp, echo]),
        (format!("vip {vip}"), vec![tcp], vec![]),
        (format!("vip {client}"), vec![], vec![tcp]),
        ("port 80".to_owned(), vec![tcp], vec![echo]),
        ("port 4000".to_owned(), vec![tcp], vec![echo]),
        ("port 53".to_owned(), vec![], vec![tcp, echo]),
        ("tcp".to_owned(), vec![tcp], vec![echo]),
        ("udp".to_owned(), vec![], vec![tcp, echo]),
        ("icmp".to_owned(), vec![echo], vec![tcp]),
        ("accepted".to_owned(), vec![tcp, copied], vec![held]),
        ("forwarded".to_owned(), vec![copied], vec![tcp, held]),
        ("held".to_owned(), vec![held], vec![tcp]),
        ("reason opening".to_owned(), vec![held], vec![tcp]),
        ("tcp port 80".to_owned(), vec![tcp], vec![echo]),
        (format!("TCP AND host {client} && held"), vec![held], vec![tcp]),
    ] {
        let filter = read(&text);
        for subject in yes {
            assert!(filter.matches(&subject), "{text}: {subject:?}");
        }
        for subject in no {
            assert!(!filter.matches(&subject), "{text}: {subject:?}");
        }
    }
}

#[test]
fn networks_are_compared_by_their_first_bits() {
    let seen = |from: &str, to: &str| {
        let way = Way::new(from.parse().unwrap(), to.parse().unwrap(), VIRTUAL_MAC);
        subject(&way.tcp(1, 2, Flags::Ack))
    };
    let v4 = seen("198.18.16.1", "198.18.0.20");
    for (text, matches) in [
        ("net 198.18.0.0/15", true),
        ("net 198.18.16.0/24", true),
        ("net 198.18.17.0/24", false),
        ("net 198.18.16.1/32", true),
        ("net 0.0.0.0/0", true),
        ("net ::/0", false),
    ] {
        assert_eq!(read(text).matches(&v4), matches, "{text}");
    }
    let v6 = seen("2001:db8:1::2", "2001:db8::20");
    for (text, matches) in [
        ("net 2001:db8::/32", true),
        ("net 2001:db8:1::/48", true),
        ("net 2001:db8:2::/48", false),
        ("net ::/0", true),
        ("net 0.0.0.0/0", false),
        ("host 2001:db8:1::2", true),
    ] {
        assert_eq!(read(text).matches(&v6), matches, "{text}");
    }
}

#[test]
fn a_mistake_is_named_with_its_place_and_what_was_expected() {
    for (text, at, words) in [
        ("prot 80", 1, "`prot` is not known: host, net,"),
        ("host", 5, "the filter ends here: an address is expected"),
        ("host me", 6, "`me`: an address is expected"),
        (
            "host 198.18.0.2 and port 8O",
            26,
            "`8O`: a port, 0 to 65535, is expected",
        ),
        ("port 70000", 6, "a port, 0 to 65535,"),
        ("tcp host 198.18.0.2", 5, "`host`: `and` is expected"),
        ("tcp or udp", 5, "`or` is not known here"),
        ("tcp and", 8, "the filter ends here: host, net,"),
        ("and tcp", 1, "`and` stands alone"),
        ("tcp and and udp", 9, "`and` stands alone"),
        ("net 198.18.0.1/15", 5, "`net 198.18.0.0/15` is meant?"),
        ("net 198.18.0.0/33", 5, "has fewer than 33 bits"),
        ("net 198.18.0.0", 5, "a network, such as"),
        ("reason bored", 8, "`bored` is no reason; expected is one of other_mac,"),
        ("dröpped", 1, "`dröpped` is not known"),
        ("tcp and dröpped", 9, "is not known"),
    ] {
        let error = text.parse::<Filter>().unwrap_err();
        let told = error.to_string();
        assert!(
            told.starts_with(&format!("filter, character {at}: ")) && told.contains(words),
            "{text}: {told}"
        );
        let marked = error.marked();
        let (line, signs) = marked.split_once('\n').unwrap();
        assert_eq!(line, text);
        assert_eq!(signs.chars().take_while(|c| *c == ' ').count(), at - 1, "{marked}");
    }
    let error = "host 198.18.0.2 and port 8O".parse::<Filter>().unwrap_err();
    assert_eq!(
        error.marked(),
        "host 198.18.0.2 and port 8O\n                         ^^"
    );
}

fn conditions() -> impl Strategy<Value = Condition> {
    let addr = || {
        prop_oneof![
            any::<[u8; 4]>().prop_map(IpAddr::from),
            any::<[u8; 16]>().prop_map(IpAddr::from)
        ]
        .prop_map(|a: IpAddr| a.to_canonical())
    };
    let causes: Vec<Cause> = Cause::all().collect();
    prop_oneof![
        addr().prop_map(Condition::Host),
        addr().prop_map(Condition::Vip),
        (addr(), 0u8..=32)
            .prop_map(|(addr, length)| Condition::Net(network(addr, length).unwrap().to_canonical(), length)),
        any::<u16>().prop_map(Condition::Port),
        proptest::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Icmp]).prop_map(Condition::Protocol),
        proptest::sample::select(Outcome::ALL.to_vec()).prop_map(Condition::Outcome),
        proptest::sample::select(causes).prop_map(Condition::Cause),
    ]
}

proptest! {
    #[test]
    fn what_a_filter_says_of_itself_reads_as_the_same(conditions in proptest::collection::vec(conditions(), 0..6)) {
        let filter = Filter { conditions };
        prop_assert_eq!(filter.to_string().parse::<Filter>(), Ok(filter));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,40}", words in proptest::collection::vec("(host|net|port|and|reason|tcp|1|::|/|ö)", 0..8)) {
        for text in [text, words.join(" ")] {
            if let Err(error) = text.parse::<Filter>() {
                error.marked();
                error.to_string();
            }
        }
    }
}
