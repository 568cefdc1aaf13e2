/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/* Reading a frame: what farm_core::wire::packet reads of it. Neither program's own, and it counts nothing. */
#ifndef FRAME_H
#define FRAME_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "farm.h"
#include "helpers.h"

/* A frame as it came in: the part that can be read, and how long all of it is. */
struct frame {
    void *data, *end;
    __u32 length;
    __u32 ifindex;
};

/* What a packet is to the state table. */
enum kind { UNKNOWN_KIND, OPENING_TCP, BELONGING, LOOSE };

struct packet {
    struct vip_key key; /* its addr is the destination */
    __u32 source[4];
    __u64 from_mac, to_mac;
    __u32 length; /* from the start of the frame to the end of the packet, as its own header says */
    __u32 identification;
    __u16 source_port, destination_port;
    __u8 v6;
    __u8 protocol;
    __u8 is_echo;
    __u8 is_odd;      /* a fragment, or with extension headers: the ports are not where they are looked for */
    __u8 is_quoted;   /* an ICMP error: what else is said here is of the packet that it quotes */
    __u8 is_portless; /* a later fragment of a datagram of which nothing is known */
    __u8 part;
    enum kind kind;
    __u16 network_at, transport_at;
};

/* What of a datagram the packet is. */
enum part { WHOLE, FIRST, LATER };

/* What has become of a frame so far. */
enum fate {
    LET_BY, /* nothing of a VIP's */
    REFUSED, /* to be dropped, and counted */
    LEFT, /* farmd's to judge */
    GOES_ON,
};

INLINE __u64 mac_at(const __u8 *bytes)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    /* At even places of a frame, so that any processor may read two bytes at once. */
    const __u16 *pairs = (const void *)bytes;

    return (__u64)pairs[0] | (__u64)pairs[1] << 16 | (__u64)pairs[2] << 32;
#else
    return (__u64)bytes[0] | (__u64)bytes[1] << 8 | (__u64)bytes[2] << 16 | (__u64)bytes[3] << 24 | (__u64)bytes[4] << 32 |
           (__u64)bytes[5] << 40;
#endif
}

/* The twelve bytes of a frame that goes from one Ethernet address to another. */
INLINE void put_macs(__u8 *both, __u64 to, __u64 from)
{
#pragma unroll
    for (int i = 0; i < ETH_ALEN; i++) {
        both[i] = to >> 8 * i;
        both[ETH_ALEN + i] = from >> 8 * i;
    }
}

/* Reads the addresses. */
INLINE enum fate read_network(const struct frame *frame, struct packet *packet)
{
    struct ethhdr *ethernet = frame->data;

    if ((void *)(ethernet + 1) > frame->end)
        return LET_BY;
    packet->to_mac = mac_at(ethernet->h_dest);
    packet->from_mac = mac_at(ethernet->h_source);
    packet->network_at = sizeof(*ethernet);
    packet->key.ifindex = frame->ifindex;
    if (ethernet->h_proto == be16(ETH_P_IP)) {
        struct iphdr *ip = frame->data + sizeof(*ethernet);

        if ((void *)(ip + 1) > frame->end || ip->version != 4 || ip->ihl < 5)
            return LET_BY;
        packet->key.addr[2] = be32(0xffff);
        packet->key.addr[3] = ip->daddr;
        packet->source[3] = ip->saddr;
        packet->protocol = ip->protocol;
        packet->identification = be16(ip->id);
        packet->transport_at = sizeof(*ethernet) + ip->ihl * 4;
        /* A merged packet of more than 64 kB says 0. */
        packet->length = ip->tot_len ? sizeof(*ethernet) + be16(ip->tot_len) : frame->length;
        if (ip->frag_off & be16(0x3fff)) {
            packet->is_odd = 1;
            packet->part = ip->frag_off & be16(0x1fff) ? LATER : FIRST;
        }
        return GOES_ON;
    }
    if (ethernet->h_proto == be16(ETH_P_IPV6)) {
        struct ipv6hdr *ip = frame->data + sizeof(*ethernet);

        if ((void *)(ip + 1) > frame->end || ip->version != 6)
            return LET_BY;
        __builtin_memcpy(packet->key.addr, &ip->daddr, 16);
        __builtin_memcpy(packet->source, &ip->saddr, 16);
        packet->v6 = 1;
        packet->protocol = ip->nexthdr;
        packet->transport_at = sizeof(*ethernet) + sizeof(*ip);
        packet->length = ip->payload_len ? sizeof(*ethernet) + sizeof(*ip) + be16(ip->payload_len) : frame->length;
        packet->is_odd =
            packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP && packet->protocol != IPPROTO_ICMPV6;
        return GOES_ON;
    }
    return LET_BY;
}

/* Reads ports and kind of a packet that is not odd; `why` if it is refused. */
INLINE enum fate read_transport(const struct frame *frame, struct packet *packet, __u32 *why)
{
    __u32 at = packet->transport_at & 0x7f, length = packet->length;

    *why = MALFORMED;
    if (length > frame->length || length < packet->transport_at)
        return REFUSED;
    if (packet->protocol == IPPROTO_TCP) {
        struct tcphdr *tcp = frame->data + at;

        if ((void *)(tcp + 1) > frame->end || length < at + sizeof(*tcp) || tcp->doff < 5 || length < at + tcp->doff * 4)
            return REFUSED;
        packet->source_port = be16(tcp->source);
        packet->destination_port = be16(tcp->dest);
        packet->kind = tcp->syn && !tcp->ack && !tcp->rst && !tcp->fin ? OPENING_TCP : BELONGING;
        return GOES_ON;
    }
    if (packet->protocol == IPPROTO_UDP) {
        struct udphdr *udp = frame->data + at;

        if ((void *)(udp + 1) > frame->end || length < at + sizeof(*udp))
            return REFUSED;
        packet->source_port = be16(udp->source);
        packet->destination_port = be16(udp->dest);
        packet->kind = LOOSE;
        return GOES_ON;
    }
    if (packet->protocol == (packet->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
        __u8 *icmp = frame->data + at, type;

        if ((void *)(icmp + 8) > frame->end || length < at + 8)
            return REFUSED;
        type = *icmp;
        if (type == (packet->v6 ? 128 : 8)) {
            packet->is_echo = 1;
            packet->kind = LOOSE;
            return GOES_ON;
        }
        /* An error goes where the packet went that it quotes. */
        if (packet->v6 ? type >= 1 && type <= 4 : type == 3 || type == 5 || type == 11 || type == 12)
            return LEFT;
    }
    *why = NO_RULE;
    return REFUSED;
}

#endif
