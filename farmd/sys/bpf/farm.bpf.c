// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later
/*
 * The program at tc ingress of a service interface: carries out the whole decision.
 *
 * Ahead of the nf_tables rule that keeps the host's own stack from the VIPs' frames: what is accepted is redirected to the
 * TAP's receive side and never meets it; without this program it drops everything, as it does for the raw data plane. What needs
 * memory or a wait (a bucket that changes hands, a fragment, an ICMP error, an extension header) is put to farmd, which reads
 * the TAP and judges it by the same plan. It keeps nothing but counters. While somebody listens, its twin farm_traced stands in its
 * place, which tells what became of each frame.
 */
#include <linux/pkt_cls.h>

#include "decision.h"
#include "helpers.h"
#include "tables.h"
#include "trace.h"

INLINE int drop(struct story *story, __u32 why)
{
    count(why);
    story->why = why;
    return TC_ACT_SHOT;
}

/* To farmd, which reads what the TAP is to send. */
INLINE int punt(struct story *story, const struct control *control)
{
    count(PUNTED);
    story->why = PUNTED;
    story->punted = 1;
    return redirect(control->tap, 0);
}

INLINE int accept(struct __sk_buff *skb, struct story *story, const struct control *control, __u32 why)
{
    if (skb_store_bytes(skb, 0, control->tap_mac, ETH_ALEN, 0))
        return drop(story, TAP_FAILED);
    count(why);
    story->why = why;
    story->accepted = 1;
    add(BYTES_ACCEPTED, skb->len);
    return redirect(control->tap, BPF_F_INGRESS);
}

/* Rewrites both Ethernet addresses. */
INLINE long address_frame(struct __sk_buff *skb, __u64 to, __u64 from)
{
    __u8 both[2 * ETH_ALEN];

    put_macs(both, to, from);
    return skb_store_bytes(skb, 0, both, sizeof(both), 0);
}

/*
 * Whether this host has the connection, or has answered its request with a cookie that the frame brings back. Where connections may end in
 * containers, and of what looks like TIME_WAIT but may be an orphan in FIN_WAIT2, only farmd knows.
 */
INLINE enum has has_socket(struct __sk_buff *skb, const struct control *control, const struct frame *frame,
                           const struct packet *packet)
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
        struct tcphdr *tcp = frame->data + (packet->transport_at & 0x7f);

        if ((void *)(tcp + 1) <= frame->end && tcp->ack && !tcp->syn && !tcp->rst) {
            struct iphdr *ip4 = frame->data + (packet->network_at & 0x1f);
            struct ipv6hdr *ip6 = (void *)ip4;

            if (packet->v6 && (void *)(ip6 + 1) <= frame->end &&
                !tcp_check_syncookie(sk, ip6, sizeof(*ip6), tcp, sizeof(*tcp)))
                has = HAS;
            if (!packet->v6 && (void *)(ip4 + 1) <= frame->end &&
                !tcp_check_syncookie(sk, ip4, sizeof(*ip4), tcp, sizeof(*tcp)))
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

/* It could not be sent on. */
INLINE void lose(struct story *story, __u32 why)
{
    count(why);
    story->lost = why;
}

INLINE int carry_out(struct __sk_buff *skb, struct story *story, const struct control *control,
                     const struct packet *packet, const struct vip *vip, const struct decision *decision)
{
    if (decision->onward) {
        if (!decision->to) {
            lose(story, FORWARD_UNKNOWN);
        } else if (address_frame(skb, decision->to, vip->own_mac)) {
            lose(story, FORWARD_FAILED);
        } else if (!decision->accepted) {
            count(decision->why);
            count(FORWARDED);
            story->why = decision->why;
            story->sent_on = 1;
            return redirect(skb->ifindex, 0);
        } else {
            story->sent_on = !clone_redirect(skb, skb->ifindex, 0);
            count(story->sent_on ? FORWARDED : FORWARD_FAILED);
            if (address_frame(skb, packet->to_mac, packet->from_mac))
                return drop(story, FORWARD_FAILED);
        }
    }
    return decision->accepted ? accept(skb, story, control, decision->why) : drop(story, decision->why);
}

INLINE int judge(struct __sk_buff *skb, struct story *story, const struct control *control, __u64 epoch)
{
    struct frame frame = {
        .data = (void *)(long)skb->data,
        .end = (void *)(long)skb->data_end,
        .length = skb->len,
        .ifindex = skb->ifindex,
    };
    struct packet packet = {};
    struct place place = {};
    struct decision decision;
    enum has has = HAS_NOT;
    __u32 why = 0;

    switch (find_place(&frame, control, epoch, &packet, &place, &why)) {
    case LET_BY:
        return TC_ACT_UNSPEC;
    case REFUSED:
        return drop(story, why);
    case LEFT:
        return punt(story, control);
    case GOES_ON:
        break;
    }
    story->placed = 1;
    story->place = place;
    if (is_left(&packet, &place))
        return punt(story, control);
    if (needs_socket(&packet, &place))
        has = has_socket(skb, control, &frame, &packet);
    if (has == ASK)
        return punt(story, control);
    decision = decide(&packet, &place, has == HAS);
    return carry_out(skb, story, control, &packet, place.vip, &decision);
}

/* Judges by the plan in force, if that stays in force long enough and the lease holds to the end. */
INLINE int ingress(struct __sk_buff *skb, struct story *story, const struct control *control, __u64 epoch)
{
    __u32 want = skb->len < 128 ? skb->len : 128;
    int verdict;

    if ((void *)(long)skb->data + want > (void *)(long)skb->data_end && skb_pull_data(skb, want))
        return TC_ACT_UNSPEC;
    verdict = judge(skb, story, control, epoch);
    /* So many plans later the slot may have been written while it was read. */
    if (READ_ONCE(control->epoch) - epoch >= SLOTS - 1)
        return drop(story, PLAN_CHANGED);
    /* At the end: this processor may have stood still since the frame came. */
    if (verdict == TC_ACT_REDIRECT && ktime_get_ns() >= READ_ONCE(control->lease_until))
        return drop(story, LEASE_ENDED);
    return verdict;
}

/* Of another VLAN, if the tag names one. */
INLINE int is_elsewhere(const struct __sk_buff *skb)
{
    return skb->vlan_present && (skb->vlan_tci & 0xfff);
}

SEC("classifier")
int farm_ingress(struct __sk_buff *skb)
{
    __u32 zero = 0;
    struct control *control = map_lookup(&CONTROL, &zero);
    struct story untold = {};
    __u64 epoch;

    if (!control)
        return TC_ACT_UNSPEC;
    epoch = READ_ONCE(control->epoch);
    if (!epoch || is_elsewhere(skb))
        return TC_ACT_UNSPEC;
    return ingress(skb, &untold, control, epoch);
}

SEC("classifier")
int farm_traced(struct __sk_buff *skb)
{
    __u32 zero = 0;
    struct control *control = map_lookup(&CONTROL, &zero);
    struct story story = {};
    struct event *event;
    __u64 epoch;
    int verdict;

    if (!control)
        return TC_ACT_UNSPEC;
    epoch = READ_ONCE(control->epoch);
    if (!epoch || is_elsewhere(skb))
        return TC_ACT_UNSPEC;
    event = observe(skb, control);
    verdict = ingress(skb, &story, control, epoch);
    if (event && verdict != TC_ACT_UNSPEC)
        tell(control, event, verdict, &story);
    return verdict;
}

char LICENSE[] SEC("license") = "GPL";
