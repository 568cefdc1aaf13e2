/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/*
 * Packets whose ports are not where they are looked for: fragments, IPv6 with extension headers, ICMP. Few are such, so all of this is out of
 * line, and has the kernel copy what it reads, wherever in the frame that lies. It reads what farm_core::wire::packet reads, in the same order.
 */
#ifndef ODD_H
#define ODD_H

#include "frame.h"
#include "tables.h"

/* As many as the core takes. */
#define MAX_EXTENSIONS 8
/* Most tags in a frame: as many as the core passes over. */
#define MAX_TAGS 2
#define VLAN_ID 0x0fff
/* So long what first fragments carried is remembered, in nanoseconds: the core's LIFETIME. */
#define FRAGMENT_LIFETIME 30000000000ULL

enum extension { HOP_BY_HOP = 0, ROUTING = 43, FRAGMENT = 44, AUTHENTICATION = 51, DESTINATION_OPTIONS = 60 };

/* The packet could be read; anything else is the reason to refuse it. */
enum { READ = -1 };

/* Where extension headers lead. */
struct chain {
    __u32 at;
    __u32 identification;
    __u8 protocol;
    __u8 part;
};

INLINE int is_extension(__u32 next)
{
    return next == HOP_BY_HOP || next == ROUTING || next == FRAGMENT || next == AUTHENTICATION ||
           next == DESTINATION_OPTIONS;
}

/* Walks extension headers, of which the first has number `next`, from `at` on; to what is none, or to the end of what a later fragment has. */
OUTLINE int walk(struct __sk_buff *skb, __u32 at, __u32 end, __u32 next, struct chain *chain)
{
    int fragments = 0;

    for (int place = 0; place <= MAX_EXTENSIONS; place++) {
        __u8 head[8];
        __u32 length;

        if (!is_extension(next)) {
            chain->at = at;
            chain->protocol = next;
            return READ;
        }
        if (place == MAX_EXTENSIONS || (next == HOP_BY_HOP && place > 0))
            return MALFORMED;
        if (at + sizeof(head) > end || skb_load_bytes(skb, at, head, sizeof(head)))
            return MALFORMED;
        length = (head[1] + 1) * 8;
        if (next == AUTHENTICATION)
            length = (head[1] + 2) * 4;
        if (next == FRAGMENT) {
            length = 8;
            if (fragments++)
                return MALFORMED;
            chain->part = head[3] & 1 ? FIRST : WHOLE;
            chain->identification = (__u32)head[4] << 24 | (__u32)head[5] << 16 | (__u32)head[6] << 8 | head[7];
            if (head[2] || head[3] >> 3) {
                chain->part = LATER;
                chain->protocol = head[0];
                return READ;
            }
        }
        next = head[0];
        at += length;
        if (at > end)
            return MALFORMED;
    }
    return MALFORMED;
}

/* The ports of TCP and UDP at `at`, of which there need be no more. */
INLINE int read_ports(struct __sk_buff *skb, __u32 at, __u32 end, __u16 *source, __u16 *destination)
{
    __u16 ports[2];

    if (at + sizeof(ports) > end || skb_load_bytes(skb, at, ports, sizeof(ports)))
        return MALFORMED;
    *source = be16(ports[0]);
    *destination = be16(ports[1]);
    return READ;
}

/* An error is judged as a packet of the flow to which the packet belongs that it quotes, one of ours: its destination is the client. */
OUTLINE int read_quoted(struct __sk_buff *skb, struct packet *packet, __u32 at)
{
    struct chain chain = {};
    __u32 end = packet->length;

    if (packet->v6) {
        struct ipv6hdr ip;

        if (at + sizeof(ip) > end || skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 6)
            return MALFORMED;
        for (int i = 0; i < 4; i++) {
            if (ip.saddr.s6_addr32[i] != packet->key.addr[i])
                return MALFORMED;
            packet->source[i] = ip.daddr.s6_addr32[i];
        }
        if (walk(skb, at + sizeof(ip), end, ip.nexthdr, &chain) != READ || chain.part == LATER)
            return MALFORMED;
    } else {
        struct iphdr ip;

        if (at + sizeof(ip) > end || skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
            return MALFORMED;
        if (ip.saddr != packet->key.addr[3] || ip.frag_off & be16(0x1fff))
            return MALFORMED;
        packet->source[3] = ip.daddr;
        chain.protocol = ip.protocol;
        chain.at = at + ip.ihl * 4;
        if (chain.at > end)
            return MALFORMED;
    }
    packet->is_quoted = 1;
    packet->kind = chain.protocol == IPPROTO_TCP ? BELONGING : LOOSE;
    packet->protocol = chain.protocol;
    if (chain.protocol == IPPROTO_TCP || chain.protocol == IPPROTO_UDP)
        return read_ports(skb, chain.at, end, &packet->destination_port, &packet->source_port);
    packet->is_echo = 1;
    return chain.protocol == (packet->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) ? READ : MALFORMED;
}

INLINE int read_icmp(struct __sk_buff *skb, struct packet *packet, __u32 at, __u32 part)
{
    /* All of the header, or of a first fragment the type. */
    __u32 need = part == WHOLE ? 8 : 1;
    __u8 type;

    if (at + need > packet->length || skb_load_bytes(skb, at, &type, sizeof(type)))
        return MALFORMED;
    if (type == (packet->v6 ? 128 : 8)) {
        packet->is_echo = 1;
        packet->kind = LOOSE;
        return READ;
    }
    if (part == WHOLE && (packet->v6 ? type >= 1 && type <= 4 : type == 3 || type == 5 || type == 11 || type == 12))
        return read_quoted(skb, packet, at + 8);
    return NO_RULE;
}

INLINE int read_tcp(struct __sk_buff *skb, struct packet *packet, __u32 at, __u32 part)
{
    /* Offset of the data, flags. */
    __u8 tail[2];
    __u32 length = packet->length;

    if (at + 14 > length || skb_load_bytes(skb, at + 12, tail, sizeof(tail)))
        return MALFORMED;
    if (part == WHOLE && (at + 20 > length || tail[0] >> 4 < 5 || at + (tail[0] >> 4) * 4 > length))
        return MALFORMED;
    /* Of FIN, SYN, RST and ACK. */
    packet->kind = (tail[1] & 0x17) == 0x02 ? OPENING_TCP : BELONGING;
    return read_ports(skb, at, length, &packet->source_port, &packet->destination_port);
}

INLINE struct fragment_key fragment_key(const struct packet *packet, __u32 protocol)
{
    struct fragment_key key = {
        .identification = packet->identification,
        /* Fragments of IPv6 may name different protocols. */
        .protocol = packet->v6 ? FRAGMENT : protocol,
    };

    __builtin_memcpy(key.source, packet->source, sizeof(key.source));
    __builtin_memcpy(key.destination, packet->key.addr, sizeof(key.destination));
    return key;
}

OUTLINE void remember(const struct packet *packet)
{
    struct fragment_key key = fragment_key(packet, packet->protocol);
    struct fragment first = {
        .seen = ktime_get_boot_ns(),
        .source_port = packet->source_port,
        .destination_port = packet->destination_port,
        .protocol = packet->protocol,
        .kind = packet->kind,
    };

    map_update(&FRAGMENTS, &key, &first, BPF_ANY);
}

/* A later fragment is judged as the first one is, if that was seen. */
OUTLINE void recall(struct packet *packet)
{
    struct fragment_key key = fragment_key(packet, packet->protocol);
    struct fragment *first = map_lookup(&FRAGMENTS, &key);

    if (!first || ktime_get_boot_ns() - first->seen > FRAGMENT_LIFETIME) {
        packet->kind = LOOSE;
        packet->is_portless = 1;
        return;
    }
    packet->source_port = first->source_port;
    packet->destination_port = first->destination_port;
    packet->protocol = first->protocol;
    packet->kind = first->kind;
    packet->is_echo = packet->protocol == IPPROTO_ICMP || packet->protocol == IPPROTO_ICMPV6;
}

/* The tag that the kernel has taken off the frame names another VLAN than the interface's own. */
INLINE int is_of_vlan(const struct __sk_buff *skb)
{
    return skb->vlan_present && (skb->vlan_tci & VLAN_ID);
}

/* Takes off tags that are still in the frame and name no VLAN but a priority; not 0 if one does name another VLAN. */
GLOBAL int untag(struct __sk_buff *skb)
{
    for (int i = 0; i < MAX_TAGS; i++) {
        __u16 tag[2];

        if (skb_load_bytes(skb, 2 * ETH_ALEN, tag, sizeof(tag)))
            return -1;
        if (tag[0] != be16(ETH_P_8021Q) && tag[0] != be16(ETH_P_8021AD))
            return 0;
        if ((tag[1] & be16(VLAN_ID)) || skb_vlan_pop(skb) || is_of_vlan(skb))
            return -1;
    }
    return 0;
}

/* Reads what `read_transport` has left; `READ`, or why it is refused. */
GLOBAL int read_odd(struct __sk_buff *skb, struct packet *packet)
{
    struct chain chain = {};
    int read;

    if (!packet)
        return MALFORMED;
    chain.at = packet->transport_at;
    chain.protocol = packet->protocol;
    chain.identification = packet->identification;
    chain.part = packet->part;
    if (packet->length > skb->len || packet->length < packet->transport_at)
        return MALFORMED;
    if (packet->v6 && walk(skb, packet->transport_at, packet->length, packet->protocol, &chain) != READ)
        return MALFORMED;
    packet->protocol = chain.protocol;
    packet->identification = chain.identification;
    if (chain.part == LATER) {
        recall(packet);
        return READ;
    }
    if (packet->protocol == IPPROTO_TCP) {
        read = read_tcp(skb, packet, chain.at, chain.part);
    } else if (packet->protocol == IPPROTO_UDP) {
        packet->kind = LOOSE;
        read = chain.part == WHOLE && chain.at + 8 > packet->length
                   ? MALFORMED
                   : read_ports(skb, chain.at, packet->length, &packet->source_port, &packet->destination_port);
    } else if (packet->protocol == (packet->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
        read = read_icmp(skb, packet, chain.at, chain.part);
    } else {
        read = NO_RULE;
    }
    if (chain.part == FIRST && read == READ)
        remember(packet);
    return read;
}

#endif
