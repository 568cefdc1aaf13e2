//! Resets that this host's stack sends for a virtual address, to be looked at before they leave.
//!
//! The stack answers a segment of a connection that it does not know with a reset without ACK (RFC 9293, section 3.10.7.1); an application that
//! breaks a connection off sends one with ACK. Only the first kind is diverted.

use std::io;
use std::net::IpAddr;

use super::{
    ACCEPT, CHAIN_NAME, CHAIN_TABLE, DATA_VALUE, DROP, IMMEDIATE_DATA, IMMEDIATE_TARGET, KEY_MARK, KEY_PROTOCOL,
    NETWORK_HEADER, REGISTER, Transaction, check_table_name, compare, count, expression, is_hooked, meta, packets,
    payload, rules_of, verdict,
};
use crate::netlink_message::Batch;
use crate::sockopt;

/// Stands in the mark of each frame that a packet socket of [`crate::packet_socket`] sends: what was diverted once is let by.
pub const PASS_MARK: u32 = 0x4641_5250;

const CHAIN: &str = "resets";

// linux/netfilter/nf_tables.h and linux/netfilter.h
const DEL_CHAIN: u16 = 5;
const KEY_L4_PROTOCOL: u32 = 16;
const TRANSPORT_HEADER: u32 = 2;
const BITWISE_SOURCE: u16 = 1;
const BITWISE_TARGET: u16 = 2;
const BITWISE_LENGTH: u16 = 3;
const BITWISE_MASK: u16 = 4;
const BITWISE_XOR: u16 = 5;
const FORWARD_DEVICE: u16 = 1;
const HOOK_EGRESS: u32 = 1;
const LIMIT_RATE: u16 = 1;
const LIMIT_UNIT: u16 = 2;
const LIMIT_BURST: u16 = 3;
const LIMIT_TYPE: u16 = 4;
const LIMIT_PACKETS: u32 = 0;

/// Most resets that are diverted: so many a second, and so many at once. More are dropped and counted by their rule, so that they do not crowd out what else goes through
/// the device; whose segment it was repeats it.
const RATE: u64 = 20_000;
const BURST: u32 = 1024;

/// Offset of the flags in a TCP header, RST, and RST with ACK (RFC 9293, section 3.1).
const FLAGS: u32 = 13;
const RST: u8 = 0x04;
const RST_ACK: u8 = 0x14;

/// Has the resets without ACK that leave by `device` from one of `vips` sent to the interface with index `to` instead, in the table that
/// [`super::install`] has made. What was diverted before, and is not to be any more, is let go.
///
/// # Errors
/// `NotFound` if there is no such table or interface, `Unsupported` on kernels without nf_tables at egress (before 5.16); what else the kernel reports.
pub fn divert_resets(table: &str, device: &str, vips: &[IpAddr], to: u32) -> io::Result<()> {
    check_table_name(table)?;
    crate::interface::index(device)?;
    let hooked = is_hooked(table, CHAIN, device)?;
    let mut transaction = Transaction::begin()?;
    if hooked {
        transaction.empty(table, CHAIN);
    } else {
        transaction.add_chain(table, CHAIN, HOOK_EGRESS, device);
    }
    transaction.add_rule(table, CHAIN, |list| {
        meta(list, KEY_MARK);
        compare(list, &PASS_MARK.to_ne_bytes());
        verdict(list, ACCEPT);
    });
    for &vip in vips {
        transaction.add_rule(table, CHAIN, |list| {
            matches(list, vip);
            limit(list);
            divert(list, to);
        });
        transaction.add_rule(table, CHAIN, |list| {
            matches(list, vip);
            count(list);
            verdict(list, DROP);
        });
    }
    transaction.commit().map_err(|error| {
        sockopt::context(
            &error,
            format_args!("nf_tables table {table}: resets that leave by {device}"),
        )
    })
}

/// Undoes [`divert_resets`]; false if there was nothing to undo.
pub fn leave_resets(table: &str) -> io::Result<bool> {
    check_table_name(table)?;
    let mut transaction = Transaction::begin()?;
    transaction.empty(table, CHAIN);
    transaction.change(DEL_CHAIN, 0, |body| {
        body.attribute_text(CHAIN_TABLE, table)
            .attribute_text(CHAIN_NAME, CHAIN);
    });
    match transaction.commit() {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(sockopt::context(
            &error,
            format_args!("nf_tables table {table}: resets"),
        )),
    }
}

/// Whether what [`divert_resets`] has made for so many addresses still stands.
pub fn diverts_resets(table: &str, device: &str, vips: &[IpAddr]) -> io::Result<bool> {
    check_table_name(table)?;
    if !is_hooked(table, CHAIN, device)? {
        return Ok(false);
    }
    let rules =
        rules_of(table, CHAIN).map_err(|error| sockopt::context(&error, format_args!("nf_tables table {table}")))?;
    Ok(rules.len() == 1 + 2 * vips.len())
}

/// Resets that were dropped since [`divert_resets`], because there were too many; 0 if there is no such table.
pub fn dropped_resets(table: &str) -> io::Result<u64> {
    check_table_name(table)?;
    let rules =
        rules_of(table, CHAIN).map_err(|error| sockopt::context(&error, format_args!("nf_tables table {table}")))?;
    Ok(rules.iter().map(|rule| packets(rule)).fold(0, u64::saturating_add))
}

/// The rest of the rule is for resets without ACK from `vip`.
fn matches(list: &mut Batch, vip: IpAddr) {
    // Ethernet type, and where the source address stands.
    let (protocol, offset, addr) = match vip {
        IpAddr::V4(vip) => (0x0800u16, 12, vip.octets().to_vec()),
        IpAddr::V6(vip) => (0x86dd, 8, vip.octets().to_vec()),
    };
    meta(list, KEY_PROTOCOL);
    compare(list, &protocol.to_be_bytes());
    payload(list, NETWORK_HEADER, offset, addr.len() as u32);
    compare(list, &addr);
    meta(list, KEY_L4_PROTOCOL);
    compare(list, &[libc::IPPROTO_TCP as u8]);
    payload(list, TRANSPORT_HEADER, FLAGS, 1);
    expression(list, "bitwise", |data| {
        data.attribute_be32(BITWISE_SOURCE, REGISTER)
            .attribute_be32(BITWISE_TARGET, REGISTER)
            .attribute_be32(BITWISE_LENGTH, 1);
        for (kind, value) in [(BITWISE_MASK, RST_ACK), (BITWISE_XOR, 0)] {
            data.nested(kind, |data| {
                data.attribute(DATA_VALUE, &[value]);
            });
        }
    });
    compare(list, &[RST]);
}

/// Not more than [`RATE`] and [`BURST`].
fn limit(list: &mut Batch) {
    expression(list, "limit", |data| {
        data.attribute(LIMIT_RATE, &RATE.to_be_bytes())
            .attribute(LIMIT_UNIT, &1u64.to_be_bytes());
        data.attribute_be32(LIMIT_BURST, BURST)
            .attribute_be32(LIMIT_TYPE, LIMIT_PACKETS);
    });
}

fn divert(list: &mut Batch, to: u32) {
    expression(list, "immediate", |data| {
        data.attribute_be32(IMMEDIATE_TARGET, REGISTER);
        data.nested(IMMEDIATE_DATA, |data| {
            data.attribute(DATA_VALUE, &to.to_ne_bytes());
        });
    });
    expression(list, "fwd", |data| {
        data.attribute_be32(FORWARD_DEVICE, REGISTER);
    });
}
