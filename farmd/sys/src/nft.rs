//! Keeps the kernel's own stack from taking frames for a VIP off the wire, with an nf_tables chain at ingress.
//!
//! Owns tables of family `netdev` by name. Where the VIP's frames carry the host's own MAC, Linux would accept them on any
//! interface; here they are dropped on the service interface, after packet sockets have seen them and before the stack.
//! Frames that the data plane writes to its TAP device come in elsewhere and do not meet the drop, and what the kernel's program has
//! accepted where it came in carries a mark that is let by. In the same table [`divert_resets`] can have a second chain, at egress. Speaks netlink itself: no `nft`
//! program is needed. It never touches tables that others made.

mod resets;

use std::io;
use std::net::IpAddr;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::bpf::ACCEPTED_MARK;
use crate::netlink_message::{
    Batch, Channel, Dump, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, array, attribute,
    attributes,
};
use crate::sockopt;

pub use resets::{PASS_MARK, divert_resets, diverts_resets, dropped_resets, leave_resets};

/// Name of the chain in each table that keeps frames from the stack.
const CHAIN: &str = "ingress";

/// Ahead of connection tracking at the same place (-200) and of the usual filters (0).
const PRIORITY: i32 = -450;

/// The longest name that nf_tables takes for a table, without its end mark.
const MAX_TABLE_NAME: usize = 255;

/// A dump that the kernel keeps interrupting is taken as it is after this many tries.
const TRIES: u32 = 5;

/// Room for some thousand rules in one transaction.
const BATCH_BUFFER: libc::c_int = 4 << 20;

// linux/netfilter/nfnetlink.h
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;

// linux/netfilter/nf_tables.h: messages
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DEL_RULE: u16 = 8;

// linux/netfilter/nf_tables.h: attributes
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const HOOK_DEVICE: u16 = 3;
const HOOK_DEVICES: u16 = 4;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const META_TARGET: u16 = 1;
const META_KEY: u16 = 2;
const META_SOURCE: u16 = 3;
const PAYLOAD_TARGET: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const BITWISE_SOURCE: u16 = 1;
const BITWISE_TARGET: u16 = 2;
const BITWISE_LENGTH: u16 = 3;
const BITWISE_MASK: u16 = 4;
const BITWISE_XOR: u16 = 5;
const COMPARE_SOURCE: u16 = 1;
const COMPARE_OPERATION: u16 = 2;
const COMPARE_DATA: u16 = 3;
const IMMEDIATE_TARGET: u16 = 1;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

// linux/netfilter/nf_tables.h and netfilter.h: values
const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
const KEY_PROTOCOL: u32 = 1;
const KEY_MARK: u32 = 3;
const NETWORK_HEADER: u32 = 1;
const EQUAL: u32 = 0;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
const HOOK_INGRESS: u32 = 0;

/// Ethernet types of VLAN tags (IEEE 802.1Q, 802.1ad), and the identifier in the two bytes behind the type.
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const VLAN_ID: u16 = 0x0fff;

/// Makes, or makes anew, the table `table`: on interface `device` it drops IPv4 and IPv6 packets to one of `vips`, counted, but for those
/// with the mark [`ACCEPTED_MARK`], which is taken off. Also behind a second VLAN tag that names only a priority: the kernel takes off one tag ahead of the chain, and
/// as many such as there are behind it. What has a third one behind these is dropped whatever its address.
///
/// With `drop_arp` it also drops ARP requests and replies whose target address, and neighbour solicitations whose target, is one
/// of `vips`, so that the kernel neither answers for a VIP nor learns from questions about it. One transaction, and a chain that stands is
/// kept: there is no moment without the rules of before or of after, and none with two chains; an error changes nothing.
///
/// # Errors
/// `InvalidInput` for an impossible name, `NotFound` if there is no such interface, `PermissionDenied` without CAP_NET_ADMIN;
/// what the kernel reports if it lacks nf_tables or its netdev family.
pub fn install(table: &str, device: &str, vips: &[IpAddr], drop_arp: bool) -> io::Result<()> {
    check_table_name(table)?;
    crate::interface::index(device)?;
    let hooked = is_hooked(table, CHAIN, device)?;
    let mut transaction = Transaction::begin()?;
    if hooked {
        // A chain in the place of the old one would for a moment stand beside it, and drop what the old one has let by and taken the mark off.
        transaction.empty(table, CHAIN);
    } else {
        transaction.make_anew(table, device);
    }
    transaction.add_rule(table, CHAIN, let_accepted_by);
    for rule in drops(vips, drop_arp) {
        transaction.add_rule(table, CHAIN, |list| rule.emit(list));
    }
    transaction
        .commit()
        .map_err(|error| sockopt::context(&error, format_args!("nf_tables table {table} on {device}")))
}

/// Removes the table `table` with its rules; `false` if there was none.
pub fn remove(table: &str) -> io::Result<bool> {
    check_table_name(table)?;
    let mut transaction = Transaction::begin()?;
    transaction.change(DEL_TABLE, 0, |body| {
        body.attribute_text(TABLE_NAME, table);
    });
    match transaction.commit() {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(sockopt::context(&error, format_args!("nf_tables table {table}"))),
    }
}

/// Names of the `netdev` tables that begin with `prefix`, in alphabetical order: what an earlier run may have left.
pub fn tables(prefix: &str) -> io::Result<Vec<String>> {
    let tables = dump(GET_TABLE, |_| {}).map_err(|error| sockopt::context(&error, "list of nf_tables tables"))?;
    let names = tables
        .iter()
        .filter_map(|table| attribute(table, TABLE_NAME).and_then(text));
    let mut found: Vec<String> = names
        .filter(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Whether what [`install`] has made with the same arguments still stands: the table, its chain on `device`, all its rules.
///
/// The chain leaves with its device; everything else only goes if another program removes it, as a reload of the firewall does.
pub fn is_installed(table: &str, device: &str, vips: &[IpAddr], drop_arp: bool) -> io::Result<bool> {
    check_table_name(table)?;
    if !is_hooked(table, CHAIN, device)? {
        return Ok(false);
    }
    let drops = drops(vips, drop_arp).len();
    // And the one that lets by.
    let rules =
        rules_of(table, CHAIN).map_err(|error| sockopt::context(&error, format_args!("nf_tables table {table}")))?;
    Ok(rules.len() == 1 + drops)
}

/// Whether `chain` of `table` stands at `device`.
fn is_hooked(table: &str, wanted: &str, device: &str) -> io::Result<bool> {
    let chains =
        dump(GET_CHAIN, |_| {}).map_err(|error| sockopt::context(&error, format_args!("nf_tables table {table}")))?;
    let named = |entry: &[u8], kind, name| attribute(entry, kind).and_then(text) == Some(name);
    Ok(chains.iter().any(|chain| {
        let hook = attribute(chain, CHAIN_HOOK).unwrap_or_default();
        // Depending on the kernel the only device is told by itself or as a list of one.
        let listed = attribute(hook, HOOK_DEVICES).unwrap_or_default();
        named(chain, CHAIN_TABLE, table)
            && named(chain, CHAIN_NAME, wanted)
            && (named(hook, HOOK_DEVICE, device) || attributes(listed).any(|(_, name)| text(name) == Some(device)))
    }))
}

/// Frames that the rules of `table` have dropped since [`install`]; 0 if there is no such table.
pub fn dropped(table: &str) -> io::Result<u64> {
    check_table_name(table)?;
    let rules =
        rules_of(table, CHAIN).map_err(|error| sockopt::context(&error, format_args!("nf_tables table {table}")))?;
    Ok(rules.iter().map(|rule| packets(rule)).fold(0, u64::saturating_add))
}

/// The attributes of each rule in `chain` of `table`; none if there is no such table.
fn rules_of(table: &str, chain: &str) -> io::Result<Vec<Vec<u8>>> {
    let mut rules = dump(GET_RULE, |body| {
        body.attribute_text(RULE_TABLE, table);
    })?;
    // Old kernels ignore the table in the request.
    let is_in = |rule: &[u8], kind, name| attribute(rule, kind).and_then(text) == Some(name);
    rules.retain(|rule| is_in(rule, RULE_TABLE, table) && is_in(rule, RULE_CHAIN, chain));
    Ok(rules)
}

/// What the counters of one rule have counted.
fn packets(rule: &[u8]) -> u64 {
    let list = attribute(rule, RULE_EXPRESSIONS).unwrap_or_default();
    let counters = attributes(list)
        .filter(|(_, expression)| attribute(expression, EXPRESSION_NAME).and_then(text) == Some("counter"))
        .filter_map(|(_, expression)| attribute(expression, EXPRESSION_DATA));
    counters
        .filter_map(|data| array(attribute(data, COUNTER_PACKETS)?, 0).map(u64::from_be_bytes))
        .fold(0, u64::saturating_add)
}

/// Conditions of one rule, all of which a frame must meet to be counted and dropped.
struct Rule {
    /// Ethernet type.
    protocol: u16,
    /// So many VLAN tags come first, that of this type among them, and must name no VLAN (IEEE 802.1Q: identifier 0).
    tags: u32,
    /// (offset from the network header, bytes that stand there), each at most 16 bytes long.
    fields: Vec<(u32, Vec<u8>)>,
}

fn rules_for(vip: IpAddr, drop_arp: bool) -> Vec<Rule> {
    let (packets, questions) = match vip {
        IpAddr::V4(vip) => {
            let vip = vip.octets().to_vec();
            // Ethernet and IPv4 addresses first: only then the target address is at 24.
            let arp = Rule {
                protocol: 0x0806,
                tags: 0,
                fields: vec![(0, vec![0, 1, 8, 0, 6, 4]), (24, vip.clone())],
            };
            (
                Rule {
                    protocol: 0x0800,
                    tags: 0,
                    fields: vec![(16, vip)],
                },
                arp,
            )
        }
        IpAddr::V6(vip) => {
            let vip = vip.octets().to_vec();
            // Next header ICMPv6, type 135; solicitations carry no extension headers (RFC 4861, 7.1.1 asks for hop limit 255).
            let solicitation = vec![(6, vec![58]), (40, vec![135]), (48, vip.clone())];
            (
                Rule {
                    protocol: 0x86dd,
                    tags: 0,
                    fields: vec![(24, vip)],
                },
                Rule {
                    protocol: 0x86dd,
                    tags: 0,
                    fields: solicitation,
                },
            )
        }
    };
    std::iter::once(packets).chain(drop_arp.then_some(questions)).collect()
}

/// All rules that drop: first those for frames as they usually are.
fn drops(vips: &[IpAddr], drop_arp: bool) -> Vec<Rule> {
    let plain: Vec<Rule> = vips.iter().flat_map(|&vip| rules_for(vip, drop_arp)).collect();
    let tags = TAGS
        .iter()
        .flat_map(|&outer| TAGS.map(|inner| Rule::behind(outer, inner, &[])));
    let more = tags.filter(|_| !plain.is_empty());
    let second = plain
        .iter()
        .flat_map(|rule| TAGS.map(|tag| Rule::behind(tag, rule.protocol, &rule.fields)));
    let behind: Vec<Rule> = second.chain(more).collect();
    plain.into_iter().chain(behind).collect()
}

impl Rule {
    /// What has a tag of type `tag` that names a priority, and behind it a packet, or a tag of the same kind, of type `protocol` with these fields.
    fn behind(tag: u16, protocol: u16, fields: &[(u32, Vec<u8>)]) -> Self {
        let inner = protocol.to_be_bytes().to_vec();
        let further = fields.iter().map(|(offset, value)| (offset + 4, value.clone()));
        Self {
            protocol: tag,
            tags: 1 + u32::from(TAGS.contains(&protocol)),
            fields: std::iter::once((2, inner)).chain(further).collect(),
        }
    }

    fn emit(&self, list: &mut Batch) {
        meta(list, KEY_PROTOCOL);
        if self.tags > 0 {
            // Compared as it is, nft(8) 1.0.6 takes what follows for fields of the tag, and aborts when it lists the rule. The types next to those of tags are nobody's.
            mask(list, &[0xff, 0xfe]);
        }
        compare(list, &self.protocol.to_be_bytes());
        for tag in 0..self.tags {
            payload(list, NETWORK_HEADER, 4 * tag, 2);
            mask(list, &VLAN_ID.to_be_bytes());
            compare(list, &[0; 2]);
        }
        for (offset, value) in &self.fields {
            payload(list, NETWORK_HEADER, *offset, value.len() as u32);
            compare(list, value);
        }
        count(list);
        verdict(list, DROP);
    }
}

/// What gets here is counted.
fn count(list: &mut Batch) {
    expression(list, "counter", |data| {
        data.attribute(COUNTER_BYTES, &[0; 8])
            .attribute(COUNTER_PACKETS, &[0; 8]);
    });
}

/// `meta mark ACCEPTED_MARK meta mark set 0 accept`: later chains and the stack see the frame as it came.
fn let_accepted_by(list: &mut Batch) {
    meta(list, KEY_MARK);
    compare(list, &ACCEPTED_MARK.to_ne_bytes());
    expression(list, "immediate", |data| {
        data.attribute_be32(IMMEDIATE_TARGET, REGISTER);
        data.nested(IMMEDIATE_DATA, |data| {
            data.attribute(DATA_VALUE, &[0; 4]);
        });
    });
    expression(list, "meta", |data| {
        data.attribute_be32(META_KEY, KEY_MARK)
            .attribute_be32(META_SOURCE, REGISTER);
    });
    verdict(list, ACCEPT);
}

/// Loads what the kernel knows of the frame.
fn meta(list: &mut Batch, key: u32) {
    expression(list, "meta", |data| {
        data.attribute_be32(META_TARGET, REGISTER).attribute_be32(META_KEY, key);
    });
}

/// Loads some bytes of the frame.
fn payload(list: &mut Batch, base: u32, offset: u32, length: u32) {
    expression(list, "payload", |data| {
        data.attribute_be32(PAYLOAD_TARGET, REGISTER)
            .attribute_be32(PAYLOAD_BASE, base);
        data.attribute_be32(PAYLOAD_OFFSET, offset)
            .attribute_be32(PAYLOAD_LENGTH, length);
    });
}

/// Keeps these bits of what was loaded.
fn mask(list: &mut Batch, bits: &[u8]) {
    expression(list, "bitwise", |data| {
        data.attribute_be32(BITWISE_SOURCE, REGISTER)
            .attribute_be32(BITWISE_TARGET, REGISTER)
            .attribute_be32(BITWISE_LENGTH, bits.len() as u32);
        data.nested(BITWISE_MASK, |data| {
            data.attribute(DATA_VALUE, bits);
        });
        data.nested(BITWISE_XOR, |data| {
            data.attribute(DATA_VALUE, &vec![0; bits.len()]);
        });
    });
}

/// Ends the rule.
fn verdict(list: &mut Batch, code: u32) {
    expression(list, "immediate", |data| {
        data.attribute_be32(IMMEDIATE_TARGET, VERDICT_REGISTER);
        data.nested(IMMEDIATE_DATA, |data| {
            data.nested(DATA_VERDICT, |verdict| {
                verdict.attribute_be32(VERDICT_CODE, code);
            });
        });
    });
}

fn compare(list: &mut Batch, value: &[u8]) {
    expression(list, "cmp", |data| {
        data.attribute_be32(COMPARE_SOURCE, REGISTER)
            .attribute_be32(COMPARE_OPERATION, EQUAL);
        data.nested(COMPARE_DATA, |data| {
            data.attribute(DATA_VALUE, value);
        });
    });
}

fn expression(list: &mut Batch, name: &str, fill: impl FnOnce(&mut Batch)) {
    list.nested(LIST_ELEMENT, |element| {
        element
            .attribute_text(EXPRESSION_NAME, name)
            .nested(EXPRESSION_DATA, fill);
    });
}

/// Changes that the kernel makes all at once or not at all.
struct Transaction {
    channel: Channel,
    batch: Batch,
    last: u32,
}

impl Transaction {
    fn begin() -> io::Result<Self> {
        let mut channel = Channel::open(NETLINK_NETFILTER).map_err(|error| sockopt::context(&error, "nf_tables"))?;
        channel.set_buffers(BATCH_BUFFER)?;
        let sequence = channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(BATCH_BEGIN, NLM_F_REQUEST, sequence, |body| family(body, 0, SUBSYSTEM));
        Ok(Self {
            channel,
            batch,
            last: sequence,
        })
    }

    fn change(&mut self, message: u16, flags: u16, fill: impl FnOnce(&mut Batch)) {
        self.last = self.channel.next_sequence();
        // Each change is acknowledged, so that the last one is, whichever it will be.
        self.batch.message(
            SUBSYSTEM << 8 | message,
            NLM_F_REQUEST | NLM_F_ACK | flags,
            self.last,
            |body| {
                family(body, libc::NFPROTO_NETDEV as u8, 0);
                fill(body);
            },
        );
    }

    /// The table `table` with its chain at `device`, and nothing of what it was before.
    fn make_anew(&mut self, table: &str, device: &str) {
        // Creating it first makes the deletion succeed on the first run too.
        for (message, flags) in [(NEW_TABLE, NLM_F_CREATE), (DEL_TABLE, 0), (NEW_TABLE, NLM_F_CREATE)] {
            self.change(message, flags, |body| {
                body.attribute_text(TABLE_NAME, table);
            });
        }
        self.add_chain(table, CHAIN, HOOK_INGRESS, device);
    }

    /// All rules of `chain` go.
    fn empty(&mut self, table: &str, chain: &str) {
        self.change(DEL_RULE, 0, |body| {
            body.attribute_text(RULE_TABLE, table).attribute_text(RULE_CHAIN, chain);
        });
    }

    fn add_chain(&mut self, table: &str, chain: &str, hook_number: u32, device: &str) {
        self.change(NEW_CHAIN, NLM_F_CREATE, |body| {
            body.attribute_text(CHAIN_TABLE, table)
                .attribute_text(CHAIN_NAME, chain);
            body.nested(CHAIN_HOOK, |hook| {
                hook.attribute_be32(HOOK_NUMBER, hook_number)
                    .attribute_be32(HOOK_PRIORITY, PRIORITY as u32);
                hook.attribute_text(HOOK_DEVICE, device);
            });
            body.attribute_be32(CHAIN_POLICY, ACCEPT)
                .attribute_text(CHAIN_TYPE, "filter");
        });
    }

    fn add_rule(&mut self, table: &str, chain: &str, emit: impl FnOnce(&mut Batch)) {
        self.change(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, |body| {
            body.attribute_text(RULE_TABLE, table).attribute_text(RULE_CHAIN, chain);
            body.nested(RULE_EXPRESSIONS, emit);
        });
    }

    fn commit(mut self) -> io::Result<()> {
        let sequence = self.channel.next_sequence();
        self.batch
            .message(BATCH_END, NLM_F_REQUEST, sequence, |body| family(body, 0, SUBSYSTEM));
        self.channel.acknowledged(&self.batch, self.last)
    }
}

/// The attributes of each entry of a `netdev` dump. Rules that change meanwhile start it anew, a few times.
fn dump(message: u16, fill: impl Fn(&mut Batch)) -> io::Result<Vec<Vec<u8>>> {
    let mut channel = Channel::open(NETLINK_NETFILTER)?;
    let mut entries = Vec::new();
    for _ in 0..TRIES {
        entries.clear();
        let sequence = channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(SUBSYSTEM << 8 | message, NLM_F_REQUEST | NLM_F_DUMP, sequence, |body| {
            family(body, libc::NFPROTO_NETDEV as u8, 0);
            fill(body);
        });
        let end = channel.dump(&batch, sequence, |entry| {
            entries.push(entry.get(4..).unwrap_or_default().to_vec())
        })?;
        if end == Dump::Complete {
            break;
        }
    }
    Ok(entries)
}

/// ```text
/// nfgenmsg:  family 1 | version 1 | resource 2 (big endian)
/// ```
fn family(body: &mut Batch, family: u8, resource: u16) {
    body.put(&[family, 0]).put(&resource.to_be_bytes());
}

fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
}

fn check_table_name(table: &str) -> io::Result<()> {
    if table.is_empty() || table.len() > MAX_TABLE_NAME || table.contains('\0') {
        let text = format!("nf_tables table name {table:?}: expected 1 to {MAX_TABLE_NAME} bytes, none of them 0");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(())
}
