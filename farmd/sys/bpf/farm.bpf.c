// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later
/*
 * The decision of farm_core::balance::decide, in the kernel, at tc ingress of a service interface.
 *
 * Ahead of the nf_tables rule that keeps the host's own stack from the VIPs' frames: what is accepted is redirected to the
 * TAP's receive side and never meets it; without this program it drops everything, as it does for the raw data plane. What needs
 * memory or a wait (a bucket that changes hands, a fragment, an ICMP error, an extension header) is put to farmd, which reads
 * the TAP and judges it by the same plan. It keeps nothing but counters.
 */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "farm.h"
#include "helpers.h"

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(map_flags, BPF_F_MMAPABLE);
    UINT(max_entries, 1);
    TYPE(key, __u32);
    TYPE(value, struct control);
} CONTROL SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_HASH);
    UINT(max_entries, MAX_VIPS);
    TYPE(key, struct vip_key);
    TYPE(value, __u32);
} VIP_NUMBERS SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, SLOTS * MAX_VIPS);
    TYPE(key, __u32);
    TYPE(value, struct vip);
} VIPS SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, SLOTS * MAX_VIPS);
    TYPE(key, __u32);
    TYPE(value, struct peers);
} PEERS SEC(".maps");

/* Page of rules for each 256 ports, for each VIP TCP first and then UDP. */
struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, SLOTS * MAX_VIPS * 2);
    TYPE(key, __u32);
    TYPE(value, __u16[256]);
} DIRECTORIES SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, SLOTS * MAX_PAGES);
    TYPE(key, __u32);
    TYPE(value, __u16[256]);
} PAGES SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, SLOTS * MAX_GROUPS);
    TYPE(key, __u32);
    TYPE(value, __u16[BUCKETS]);
} BUCKET_TABLES SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, COUNTS);
    TYPE(key, __u32);
    TYPE(value, __u64);
} COUNTERS SEC(".maps");

/* What a packet is to the state table. */
enum kind { OPENING_TCP, BELONGING, LOOSE };

struct packet {
    struct vip_key key; /* its addr is the destination */
    __u32 source[4];
    __u64 from_mac, to_mac;
    __u16 source_port, destination_port;
    __u16 identification;
    __u8 v6;
    __u8 protocol;
    __u8 is_echo;
    enum kind kind;
    __u16 network_at, transport_at;
};

enum { UNDECIDED = -100 };

INLINE void add(__u32 what, __u64 n)
{
    __u64 *counter = map_lookup(&COUNTERS, &what);

    if (counter)
        *counter += n;
}

INLINE void count(__u32 what)
{
    add(what, 1);
}

INLINE int drop(__u32 why)
{
    count(why);
    return TC_ACT_SHOT;
}

INLINE __u32 fmix32(__u32 h)
{
    h ^= h >> 16;
    h *= 0x85ebca6b;
    h ^= h >> 13;
    h *= 0xc2b2ae35;
    return h ^ h >> 16;
}

INLINE __u32 bucket_of(const struct control *control, const struct packet *packet, __u32 affinity)
{
    __u32 h = control->seed0;

    if (affinity == AFFINITY_IPID) {
        h = fmix32(h ^ packet->identification);
    } else if (!packet->v6) {
        __u32 word = be32(packet->source[3]);

        h = fmix32(h ^ (affinity == AFFINITY_NET ? word & 0xffffff00 : word));
    } else {
        __u32 host = affinity == AFFINITY_NET ? 0 : 0xffffffff;

        h = fmix32(h ^ be32(packet->source[0]));
        h = fmix32(h ^ be32(packet->source[1]));
        h = fmix32(h ^ (be32(packet->source[2]) & host));
        h = fmix32(h ^ (be32(packet->source[3]) & host));
    }
    if (affinity == AFFINITY_PORT)
        h = fmix32(h ^ packet->source_port);
    return fmix32(h ^ control->seed1) >> BUCKET_SHIFT;
}

INLINE __u64 mac_at(const __u8 *bytes)
{
    return (__u64)bytes[0] | (__u64)bytes[1] << 8 | (__u64)bytes[2] << 16 | (__u64)bytes[3] << 24 | (__u64)bytes[4] << 32 |
           (__u64)bytes[5] << 40;
}

/* To farmd, which reads what the TAP is to send. */
INLINE int punt(const struct control *control)
{
    count(PUNTED);
    return redirect(control->tap, 0);
}

INLINE int accept(struct __sk_buff *skb, const struct control *control, __u32 why)
{
    if (skb_store_bytes(skb, 0, control->tap_mac, ETH_ALEN, 0))
        return drop(TAP_FAILED);
    count(why);
    add(BYTES_ACCEPTED, skb->len);
    return redirect(control->tap, BPF_F_INGRESS);
}

INLINE int is_member(const struct peers *peers, __u64 mac)
{
    for (__u32 i = 0; i < MAX_NODES; i++) {
        if (i >= peers->count)
            return 0;
        if (peers->list[i] == mac)
            return 1;
    }
    return 0;
}

/* Rewrites both Ethernet addresses. */
INLINE long address_frame(struct __sk_buff *skb, __u64 to, __u64 from)
{
    __u8 both[2 * ETH_ALEN];

#pragma unroll
    for (int i = 0; i < ETH_ALEN; i++) {
        both[i] = to >> 8 * i;
        both[ETH_ALEN + i] = from >> 8 * i;
    }
    return skb_store_bytes(skb, 0, both, sizeof(both), 0);
}

enum has { HAS_NOT, HAS, ASK };

/*
 * Whether this host has the connection, or has answered its request with a cookie that the frame brings back. Where connections may end in
 * containers, and of what looks like TIME_WAIT but may be an orphan in FIN_WAIT2, only farmd knows.
 */
INLINE enum has has_socket(struct __sk_buff *skb, const struct control *control, const struct packet *packet)
{
    struct bpf_sock_tuple tuple = {};
    enum has otherwise = control->tracked ? ASK : HAS_NOT, has = otherwise;
    struct bpf_sock *sk;

    if (packet->v6) {
        __builtin_memcpy(tuple.ipv6.saddr, packet->source, 16);
        __builtin_memcpy(tuple.ipv6.daddr, packet->key.addr, 16);
        tuple.ipv6.sport = be16(packet->source_port);
        tuple.ipv6.dport = be16(packet->destination_port);
        sk = skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
    } else {
        tuple.ipv4.saddr = packet->source[3];
        tuple.ipv4.daddr = packet->key.addr[3];
        tuple.ipv4.sport = be16(packet->source_port);
        tuple.ipv4.dport = be16(packet->destination_port);
        sk = skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
    }
    if (!sk)
        return otherwise;
    if (sk->state == BPF_TCP_LISTEN) {
        void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
        __u32 network_at = packet->network_at & 0x1f, transport_at = packet->transport_at & 0x7f;
        struct tcphdr *tcp = data + transport_at;

        if ((void *)(tcp + 1) <= end && tcp->ack && !tcp->syn && !tcp->rst) {
            struct iphdr *ip4 = data + network_at;
            struct ipv6hdr *ip6 = data + network_at;

            if (packet->v6 && (void *)(ip6 + 1) <= end && !tcp_check_syncookie(sk, ip6, sizeof(*ip6), tcp, sizeof(*tcp)))
                has = HAS;
            if (!packet->v6 && (void *)(ip4 + 1) <= end && !tcp_check_syncookie(sk, ip4, sizeof(*ip4), tcp, sizeof(*tcp)))
                has = HAS;
        }
    } else if (sk->state == BPF_TCP_TIME_WAIT) {
        has = ASK;
    } else if (sk->state != BPF_TCP_CLOSE) {
        has = HAS;
    }
    sk_release(sk);
    return has;
}

INLINE int by_state(struct __sk_buff *skb, const struct control *control, const struct packet *packet, const struct vip *vip,
                    const struct peers *peers, __u32 entry)
{
    __u32 state = entry & STATE_MASK, owner = entry >> OWNER_SHIFT, why;
    int starts = packet->kind != BELONGING;
    int member = (vip->directed || packet->to_mac == vip->own_mac) && is_member(peers, packet->from_mac);
    int handed_on = member && packet->to_mac == vip->own_mac;
    int accepted = 0, outside = vip->directed && !member;

    if (starts && (entry & (BUCKET_LEAVING | BUCKET_YOUNG)))
        return punt(control);
    if (starts && handed_on && (!vip->directed || state == STATE_DRAINING || state == STATE_FOREIGN))
        return punt(control);
    if (packet->kind == BELONGING && outside && (entry & BUCKET_HELD))
        return punt(control);
    if (!starts && (state == STATE_GUARDED || state == STATE_DRAINING)) {
        enum has has = has_socket(skb, control, packet);

        if (has == ASK)
            return punt(control);
        accepted = has == HAS;
    }
    switch (state) {
    case STATE_OWN:
        why = OWN;
        accepted = 1;
        break;
    case STATE_GUARDED:
        why = starts ? GUARDED_NEW : accepted ? GUARDED_KNOWN : GUARDED_UNKNOWN;
        accepted |= starts;
        break;
    case STATE_DRAINING:
        why = accepted ? DRAINING_KNOWN : DRAINING_OTHER;
        break;
    default:
        why = owner == OWNER_NONE ? NO_OWNER : FOREIGN;
        break;
    }
    if (outside && owner != OWNER_NONE && owner != vip->this_node) {
        __u64 to = peers->by_node[owner & (MAX_NODES - 1)];

        if (!to) {
            count(FORWARD_UNKNOWN);
        } else if (address_frame(skb, to, vip->own_mac)) {
            count(FORWARD_FAILED);
        } else if (!accepted) {
            count(why);
            count(FORWARDED);
            return redirect(skb->ifindex, 0);
        } else {
            count(clone_redirect(skb, skb->ifindex, 0) ? FORWARD_FAILED : FORWARDED);
            if (address_frame(skb, packet->to_mac, packet->from_mac))
                return drop(FORWARD_FAILED);
        }
    }
    return accepted ? accept(skb, control, why) : drop(why);
}

/* Reads the addresses; `UNDECIDED` if the transport is to be read next. */
INLINE int read_network(struct __sk_buff *skb, struct packet *packet, __u32 *length, __u32 *odd)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct ethhdr *ethernet = data;

    if ((void *)(ethernet + 1) > end)
        return TC_ACT_UNSPEC;
    packet->to_mac = mac_at(ethernet->h_dest);
    packet->from_mac = mac_at(ethernet->h_source);
    packet->network_at = sizeof(*ethernet);
    packet->key.ifindex = skb->ifindex;
    if (ethernet->h_proto == be16(ETH_P_IP)) {
        struct iphdr *ip = data + sizeof(*ethernet);
        __u32 header;

        if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
            return TC_ACT_UNSPEC;
        header = ip->ihl * 4;
        packet->key.addr[2] = be32(0xffff);
        packet->key.addr[3] = ip->daddr;
        packet->source[3] = ip->saddr;
        packet->protocol = ip->protocol;
        packet->identification = be16(ip->id);
        packet->transport_at = sizeof(*ethernet) + header;
        /* A merged packet of more than 64 kB says 0. */
        *length = ip->tot_len ? sizeof(*ethernet) + be16(ip->tot_len) : skb->len;
        *odd = (ip->frag_off & be16(0x3fff)) != 0;
        return UNDECIDED;
    }
    if (ethernet->h_proto == be16(ETH_P_IPV6)) {
        struct ipv6hdr *ip = data + sizeof(*ethernet);

        if ((void *)(ip + 1) > end || ip->version != 6)
            return TC_ACT_UNSPEC;
        __builtin_memcpy(packet->key.addr, &ip->daddr, 16);
        __builtin_memcpy(packet->source, &ip->saddr, 16);
        packet->v6 = 1;
        packet->protocol = ip->nexthdr;
        packet->transport_at = sizeof(*ethernet) + sizeof(*ip);
        *length = ip->payload_len ? sizeof(*ethernet) + sizeof(*ip) + be16(ip->payload_len) : skb->len;
        *odd = packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP && packet->protocol != IPPROTO_ICMPV6;
        return UNDECIDED;
    }
    return TC_ACT_UNSPEC;
}

/* Reads ports and kind; `UNDECIDED` if a rule is to be looked up next. */
INLINE int read_transport(struct __sk_buff *skb, const struct control *control, struct packet *packet, __u32 length)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    __u32 at = packet->transport_at & 0x7f;

    if (length > skb->len || length < packet->transport_at)
        return drop(MALFORMED);
    if (packet->protocol == IPPROTO_TCP) {
        struct tcphdr *tcp = data + at;

        if ((void *)(tcp + 1) > end || length < at + sizeof(*tcp) || tcp->doff < 5 || length < at + tcp->doff * 4)
            return drop(MALFORMED);
        packet->source_port = be16(tcp->source);
        packet->destination_port = be16(tcp->dest);
        packet->kind = tcp->syn && !tcp->ack && !tcp->rst && !tcp->fin ? OPENING_TCP : BELONGING;
        return UNDECIDED;
    }
    if (packet->protocol == IPPROTO_UDP) {
        struct udphdr *udp = data + at;

        if ((void *)(udp + 1) > end || length < at + sizeof(*udp))
            return drop(MALFORMED);
        packet->source_port = be16(udp->source);
        packet->destination_port = be16(udp->dest);
        packet->kind = LOOSE;
        return UNDECIDED;
    }
    if (packet->protocol == (packet->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
        __u8 *icmp = data + at, type;

        if ((void *)(icmp + 8) > end || length < at + 8)
            return drop(MALFORMED);
        type = *icmp;
        if (type == (packet->v6 ? 128 : 8)) {
            packet->is_echo = 1;
            packet->kind = LOOSE;
            return UNDECIDED;
        }
        /* An error goes where the packet went that it quotes. */
        if (packet->v6 ? type >= 1 && type <= 4 : type == 3 || type == 5 || type == 11 || type == 12)
            return punt(control);
    }
    return drop(NO_RULE);
}

INLINE int judge(struct __sk_buff *skb, const struct control *control, __u64 epoch)
{
    struct packet packet = {};
    __u32 slot = epoch % SLOTS, length = 0, odd = 0, number, rule, group, affinity;
    const struct peers *peers;
    const struct vip *vip;
    const __u16 *table;
    __u32 *found;
    int verdict;

    verdict = read_network(skb, &packet, &length, &odd);
    if (verdict != UNDECIDED)
        return verdict;
    found = map_lookup(&VIP_NUMBERS, &packet.key);
    if (!found)
        return TC_ACT_UNSPEC;
    number = slot * MAX_VIPS + (*found & (MAX_VIPS - 1));
    vip = map_lookup(&VIPS, &number);
    peers = map_lookup(&PEERS, &number);
    /* Not this plan's: the raw data plane sees it too. */
    if (!vip || !peers || vip->epoch != epoch)
        return TC_ACT_UNSPEC;
    if (packet.to_mac != vip->service_mac && !(packet.to_mac == vip->own_mac && is_member(peers, packet.from_mac)))
        return drop(OTHER_MAC);
    if (odd)
        return punt(control);
    verdict = read_transport(skb, control, &packet, length);
    if (verdict != UNDECIDED)
        return verdict;
    if (packet.is_echo) {
        group = vip->entry_group;
        affinity = AFFINITY_ADDR;
    } else {
        __u32 at = number * 2 + (packet.protocol == IPPROTO_UDP);

        table = map_lookup(&DIRECTORIES, &at);
        if (!table)
            return drop(NO_RULE);
        at = slot * MAX_PAGES + (table[packet.destination_port >> 8] & (MAX_PAGES - 1));
        table = map_lookup(&PAGES, &at);
        if (!table)
            return drop(NO_RULE);
        rule = table[packet.destination_port & 0xff];
        if (!rule)
            return drop(NO_RULE);
        group = (rule - 1) >> 2;
        affinity = (rule - 1) & 3;
    }
    if (group >= MAX_GROUPS)
        return drop(NO_RULE);
    group += slot * MAX_GROUPS;
    table = map_lookup(&BUCKET_TABLES, &group);
    if (!table)
        return drop(NO_RULE);
    return by_state(skb, control, &packet, vip, peers, table[bucket_of(control, &packet, affinity) & (BUCKETS - 1)]);
}

SEC("classifier")
int farm_ingress(struct __sk_buff *skb)
{
    __u32 zero = 0, want = skb->len < 128 ? skb->len : 128;
    struct control *control = map_lookup(&CONTROL, &zero);
    __u64 epoch;
    int verdict;

    if (!control)
        return TC_ACT_UNSPEC;
    epoch = READ_ONCE(control->epoch);
    /* Of another VLAN, if the tag names one. */
    if (!epoch || (skb->vlan_present && (skb->vlan_tci & 0xfff)))
        return TC_ACT_UNSPEC;
    if ((void *)(long)skb->data + want > (void *)(long)skb->data_end && skb_pull_data(skb, want))
        return TC_ACT_UNSPEC;
    verdict = judge(skb, control, epoch);
    /* So many plans later the slot may have been written while it was read. */
    if (READ_ONCE(control->epoch) - epoch >= SLOTS - 1)
        return drop(PLAN_CHANGED);
    /* At the end: this processor may have stood still since the frame came. */
    if (verdict == TC_ACT_REDIRECT && ktime_get_ns() >= READ_ONCE(control->lease_until))
        return drop(LEASE_ENDED);
    return verdict;
}

char LICENSE[] SEC("license") = "GPL";
