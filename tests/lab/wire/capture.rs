//! What the watcher's packet rings take: the frames that can show two owners.

use farm_core::id::MacAddr;
use farm_sys::packet_socket::BpfInsn;

/// Classic BPF: ARP; IPv4 with ICMP, or with a first fragment of TCP that has SYN or RST; the same of IPv6 without extension headers; any frame from a
/// virtual MAC.
pub(super) fn filter(vmacs: &[MacAddr]) -> Vec<BpfInsn> {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_WORD: u16 = 0x20;
    const LOAD_IP_HEADER_LENGTH: u16 = 0xb1;
    const LOAD_BYTE_AT_X: u16 = 0x50;
    const IF_EQUAL: u16 = 0x15;
    const IF_ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const WHOLE: u32 = 0x4_0000;
    let insn = |code, jt, jf, k| BpfInsn { code, jt, jf, k };
    let mut program = vec![
        insn(LOAD_HALF, 0, 0, 12),
        insn(IF_EQUAL, 15, 0, 0x0806),
        insn(IF_EQUAL, 6, 0, 0x0800),
        insn(IF_EQUAL, 0, 14, 0x86dd),
        insn(LOAD_BYTE, 0, 0, 20),
        insn(IF_EQUAL, 11, 0, 58),
        insn(IF_EQUAL, 0, 11, 6),
        insn(LOAD_BYTE, 0, 0, 67),
        insn(IF_ANY_BIT, 8, 9, 0x06),
        insn(LOAD_BYTE, 0, 0, 23),
        insn(IF_EQUAL, 6, 0, 1),
        insn(IF_EQUAL, 0, 6, 6),
        insn(LOAD_HALF, 0, 0, 20),
        insn(IF_ANY_BIT, 4, 0, 0x1fff),
        insn(LOAD_IP_HEADER_LENGTH, 0, 0, 14),
        insn(LOAD_BYTE_AT_X, 0, 0, 27),
        insn(IF_ANY_BIT, 0, 1, 0x06),
        insn(RETURN, 0, 0, WHOLE),
    ];
    for MacAddr([a, b, c, d, e, f]) in vmacs {
        program.extend([
            insn(LOAD_WORD, 0, 0, u32::from_be_bytes([*a, *b, *c, *d])),
            insn(IF_EQUAL, 0, 3, u32::from_be_bytes([*a, *b, *c, *d])),
            insn(LOAD_HALF, 0, 0, 10),
            insn(IF_EQUAL, 0, 1, u32::from(u16::from_be_bytes([*e, *f]))),
            insn(RETURN, 0, 0, WHOLE),
        ]);
        let load = program.len() - 5;
        program[load].k = 6;
    }
    program.push(insn(RETURN, 0, 0, 0));
    program
}
