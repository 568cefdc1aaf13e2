//! Texts of attributes to values.
//!
//! One function per kind of value; each says what was expected. Places are added by [`super::decode`].

use std::fmt::Display;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use super::diag::nearest;
use super::report::{Wrong, one_of, quote};

/// Unit of a duration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unit {
    Hour,
    Second,
    Milli,
}

impl Unit {
    fn micros(self) -> u128 {
        match self {
            Self::Hour => 3_600_000_000,
            Self::Second => 1_000_000,
            Self::Milli => 1000,
        }
    }

    /// As it is said.
    pub fn words(self) -> &'static str {
        match self {
            Self::Hour => "hours",
            Self::Second => "seconds",
            Self::Milli => "milliseconds",
        }
    }

    /// As it is written in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Hour => "h",
            Self::Second => "s",
            Self::Milli => "ms",
        }
    }
}

/// All units that may be written, in microseconds.
const UNITS: [(&str, u128); 6] = [
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("m", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1000),
    ("us", 1),
];

/// A duration in whole `unit`s, and whether it had to be rounded to that. `range` counts units.
pub(super) fn duration(text: &str, unit: Unit, range: RangeInclusive<u64>) -> Result<(Duration, bool), Wrong> {
    let (low, high, word) = (*range.start(), *range.end(), unit.word());
    let hint = format!("{low}{word} to {high}{word} is expected; without a unit, {word} is meant");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, written) = text.split_at(digits);
    let odd = written.contains(|c: char| !c.is_ascii_alphabetic());
    let Some(number) = number.parse::<u64>().ok().filter(|_| !odd) else {
        let wrong = Wrong::new(format!("{} is no duration", quote(text)));
        return Err(wrong.hint(hint));
    };
    let factor = match UNITS.iter().find(|(name, _)| *name == written) {
        Some((_, factor)) => *factor,
        None if written.is_empty() => unit.micros(),
        None => {
            let wrong = Wrong::new(format!("{} is no unit of time", quote(written)));
            return Err(wrong.hint(format!("{} is expected", one_of(UNITS.map(|(name, _)| name)))));
        }
    };
    let micros = u128::from(number) * factor;
    let (whole, rest) = (micros / unit.micros(), micros % unit.micros());
    // To the nearest, and a half to the even one: 500ms is no whole second.
    let up = rest * 2 > unit.micros() || (rest * 2 == unit.micros() && whole % 2 == 1);
    let units = u64::try_from(whole + u128::from(up)).unwrap_or(u64::MAX);
    if units == 0 && number != 0 {
        let wrong = Wrong::new(format!("{} is zero in the unit of this attribute, {word}", quote(text)));
        return Err(wrong.hint(hint));
    }
    if !range.contains(&units) {
        let wrong = Wrong::new(format!("{} is out of range", quote(text)));
        return Err(wrong.hint(hint));
    }
    let micros = u64::try_from(u128::from(units) * unit.micros()).unwrap_or(u64::MAX);
    Ok((Duration::from_micros(micros), rest != 0))
}

/// A whole number of `range`.
pub(super) fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, Wrong>
where
    T: FromStr + PartialOrd + Display,
{
    move |text| {
        let hint = || format!("{} to {} is expected", range.start(), range.end());
        let digits = text.strip_prefix('-').unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Wrong::new(format!("{} is no whole number", quote(text))).hint(hint()));
        }
        let value = text.parse().ok().filter(|value| range.contains(value));
        value.ok_or_else(|| Wrong::new(format!("{} is out of range", quote(text))).hint(hint()))
    }
}

/// One of `words`, with what it stands for.
pub(super) fn word<T: Copy>(words: &[(&'static str, T)]) -> impl Fn(&str) -> Result<T, Wrong> {
    move |text| {
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Ok(*value);
        }
        let all = || words.iter().map(|(word, _)| *word);
        let expected = format!("{} is expected", one_of(all()));
        let wrong = Wrong::new(format!("{} is not valid here", quote(text)));
        Err(match nearest(text, all()) {
            Some(near) if words.len() > 2 => wrong.hint(format!("did you mean `{near}`? {expected}")),
            Some(_) | None => wrong.hint(expected),
        })
    }
}

/// `on` or `off`.
pub(super) fn flag(text: &str) -> Result<bool, Wrong> {
    word(&[("on", true), ("off", false)])(text)
}

/// Anything but nothing.
pub(super) fn text(text: &str) -> Result<&str, Wrong> {
    if text.trim().is_empty() {
        Err(Wrong::new("the value is empty"))
    } else {
        Ok(text)
    }
}

/// A name: 1 to 63 letters, digits, `_`, `-` or `.`.
pub(super) fn name(text: &str) -> Result<&str, Wrong> {
    let fits = (1..=63).contains(&text.len())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    if fits {
        Ok(text)
    } else {
        let wrong = Wrong::new(format!("{} is no name", quote(text)));
        Err(wrong.hint("1 to 63 letters, digits, `_`, `-` or `.` are expected"))
    }
}

/// The name of a network interface of Linux.
pub(super) fn interface(text: &str) -> Result<&str, Wrong> {
    let fits = (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && text.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
    if fits {
        Ok(text)
    } else {
        let wrong = Wrong::new(format!("{} is no name of a network interface", quote(text)));
        Err(wrong.hint("1 to 15 characters without blanks, `/` and `:` are expected, such as `eth0`"))
    }
}

/// The name of a variable that scripts get.
pub(super) fn variable(text: &str) -> Result<&str, Wrong> {
    const OURS: [&str; 6] = [
        "SAFE",
        "SAFEVAR",
        "SAFEBIN",
        "SAFEMODULE",
        "SAFEUSERBIN",
        "SAFEUSERCONF",
    ];
    let fits = (1..=128).contains(&text.len())
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !fits {
        let wrong = Wrong::new(format!("{} is no name of a variable", quote(text)));
        return Err(wrong.hint("letters, digits and `_` are expected, not starting with a digit"));
    }
    if OURS.contains(&text) {
        let wrong = Wrong::new(format!("{} is set for every script and cannot be changed", quote(text)));
        return Err(wrong.hint("another name is expected"));
    }
    Ok(text)
}

/// A port of TCP or UDP.
pub(super) fn port(text: &str) -> Result<u16, Wrong> {
    number(1..=u16::MAX)(text)
}

/// `80`, `8000-8010` or `*`: first port and last port.
pub(super) fn ports(text: &str) -> Result<(u16, u16), Wrong> {
    if text == "*" {
        return Ok((0, u16::MAX));
    }
    let hint = "a port such as `80`, a range such as `8000-8010`, or `*` is expected";
    let wrong = || Wrong::new(format!("{} is no port and no range of ports", quote(text)));
    if text.contains([',', ' ', ';']) {
        return Err(wrong().hint(format!("{hint}; write one `<rule>` for each")));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let parse = |part| port(part).map_err(|_| wrong().hint(hint));
    let (first, last) = (parse(first)?, parse(last)?);
    if first > last {
        let wrong = Wrong::new(format!("the range {} ends before it begins", quote(text)));
        return Err(wrong.hint(format!("`{last}-{first}` is expected")));
    }
    Ok((first, last))
}

/// A numeric address; IPv6 with or without brackets.
pub(super) fn addr(text: &str) -> Result<IpAddr, Wrong> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let addr = match bare {
        Some(v6) => v6.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => text.parse::<IpAddr>().ok(),
    };
    addr.ok_or_else(|| {
        let looks_like_name = text.contains(|c: char| c.is_ascii_alphabetic()) && !text.contains([':', '[', '/', ' ']);
        if looks_like_name {
            let wrong = Wrong::new(format!("{} is a name", quote(text)));
            wrong.hint("a numeric address is expected, so that nothing depends on a name server")
        } else if text.contains('/') {
            let wrong = Wrong::new(format!("{} is no address", quote(text)));
            wrong.hint("an address without a prefix length is expected")
        } else {
            let wrong = Wrong::new(format!("{} is no address", quote(text)));
            wrong.hint("an IPv4 address such as `198.18.0.11`, or an IPv6 address in `[ ]`, is expected")
        }
    })
}

/// An address that one host can have.
pub(super) fn host_addr(text: &str) -> Result<IpAddr, Wrong> {
    let addr = addr(text)?;
    let fault = match addr {
        _ if addr.is_unspecified() => "the unspecified address",
        _ if addr.is_multicast() => "a multicast address",
        IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
        IpAddr::V4(v4) if v4.octets()[0] == 0 || v4.octets()[0] >= 240 => "a reserved address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address, which needs an interface",
        IpAddr::V4(_) | IpAddr::V6(_) => return Ok(addr),
    };
    let wrong = Wrong::new(format!("{} is {fault}", quote(text)));
    Err(wrong.hint("an address that one host can have is expected"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_take_the_unit_of_their_attribute() {
        let seconds = |text| duration(text, Unit::Second, 0..=86_400);
        assert_eq!(seconds("10"), Ok((Duration::from_secs(10), false)));
        assert_eq!(seconds("10s"), Ok((Duration::from_secs(10), false)));
        assert_eq!(seconds("2m"), Ok((Duration::from_secs(120), false)));
        assert_eq!(seconds("1d"), Ok((Duration::from_secs(86_400), false)));
        assert_eq!(seconds("2000ms"), Ok((Duration::from_secs(2), false)));
        assert_eq!(seconds("0"), Ok((Duration::ZERO, false)));
        let hours = duration("24", Unit::Hour, 0..=100);
        assert_eq!(hours, Ok((Duration::from_secs(86_400), false)));
        let millis = duration("5000us", Unit::Milli, 5..=5000);
        assert_eq!(millis, Ok((Duration::from_millis(5), false)));
    }

    #[test]
    fn durations_are_rounded_to_the_unit_but_never_to_zero() {
        let seconds = |text| duration(text, Unit::Second, 0..=86_400);
        assert_eq!(seconds("1499ms"), Ok((Duration::from_secs(1), true)));
        assert_eq!(seconds("1501ms"), Ok((Duration::from_secs(2), true)));
        assert_eq!(seconds("1500ms"), Ok((Duration::from_secs(2), true)));
        assert_eq!(seconds("501ms"), Ok((Duration::from_secs(1), true)));
        assert!(seconds("500ms").unwrap_err().message.contains("zero"));
        assert!(seconds("1us").unwrap_err().message.contains("zero"));
    }

    #[test]
    fn texts_that_are_no_duration_are_refused() {
        for text in [
            "",
            "s",
            "-1",
            "1.5s",
            " 10",
            "10 s",
            "10min",
            "10S",
            "99999999999999999999",
            "18446744073709551615d",
            "2d",
        ] {
            assert!(duration(text, Unit::Second, 0..=86_400).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_are_one_a_range_or_all() {
        assert_eq!(ports("80"), Ok((80, 80)));
        assert_eq!(ports("8000-8010"), Ok((8000, 8010)));
        assert_eq!(ports("*"), Ok((0, 65535)));
        for text in [
            "", "0", "65536", "80-", "-80", "90-80", "80,443", "http", "1-2-3", "+80",
        ] {
            assert!(ports(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_are_numeric_and_of_one_host() {
        assert!(host_addr("198.18.0.11").is_ok());
        assert!(host_addr("[2001:db8::1]").is_ok());
        for text in [
            "",
            "s1.example",
            "198.18.0",
            "198.18.0.011",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "[198.18.0.1]",
            "198.18.0.1/24",
            "fe80::1",
            "ff02::1",
            "::",
        ] {
            assert!(host_addr(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_whole_and_in_range() {
        assert_eq!(number(1..=10_u32)("10"), Ok(10));
        assert_eq!(number(-1..=10_i64)("-1"), Ok(-1));
        for text in ["", "-", "0", "11", "+5", "5.0", "99999999999"] {
            assert!(number(1..=10_u32)(text).is_err(), "{text}");
        }
    }
}
