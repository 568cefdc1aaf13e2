// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later
/*
 * The program at tc ingress of a service interface: carries out the whole decision.
 *
 * Ahead of the nf_tables rule that keeps the host's own stack from the VIPs' frames: what is accepted goes on with a mark that the
 * rule lets by, or is redirected to the TAP's receive side and never meets it; without this program the rule drops everything, as it does
 * for the raw data plane. What needs
 * a wait (it starts something in a bucket that changes hands) is put to farmd, which reads the TAP and judges it by the same plan. It keeps
 * nothing but counters, and what first fragments carried. While somebody listens, its twin farm_traced stands in its place, which tells
 * what became of each frame.
 */
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#include "decision.h"
#include "helpers.h"
#include "odd.h"
#include "tables.h"
#include "trace.h"

/*
 * What becomes of a frame is counted when it is certain, in ingress(). Until then a verdict has the action for tc in its lowest byte, and above it the
 * counter; a story would hold more than the stack does.
 */
#define ACTION(verdict) ((verdict) & 0xff)
#define CAUSE(verdict) ((verdict) >> 8 & 0xff)
#define ALSO_FORWARDED (1 << 16)
#define ALSO_BYTES (1 << 17)

_Static_assert(COUNTS <= 0x100, "a counter has one byte in a verdict");

INLINE int counted_as(__u32 why, long action)
{
    return ACTION(action) | why << 8;
}

INLINE int drop(struct story *story, __u32 why)
{
    end_story(story, DROPPED, why);
    return counted_as(why, TC_ACT_SHOT);
}

/* To farmd, which reads what the TAP is to send. */
INLINE int punt(struct story *story, const struct control *control)
{
    end_story(story, LEFT_TO_FARMD, PUNTED);
    return counted_as(PUNTED, redirect(control->tap, 0));
}

INLINE int accept(struct __sk_buff *skb, struct story *story, const struct control *control, __u32 why)
{
    __u8 passes_up = control->passes_up;

    if (passes_up) {
        /* Its address is not that of the interface, or need not be. */
        if (skb->pkt_type != PACKET_HOST && skb_change_type(skb, PACKET_HOST))
            return drop(story, TAP_FAILED);
        skb->mark = ACCEPTED_MARK;
    } else if (skb_store_bytes(skb, 0, control->tap_mac, ETH_ALEN, 0)) {
        return drop(story, TAP_FAILED);
    }
    end_story(story, ACCEPTED, why);
    return counted_as(why, passes_up ? TC_ACT_OK : redirect(control->tap, BPF_F_INGRESS)) | ALSO_BYTES;
}

/* Rewrites both Ethernet addresses. */
INLINE long address_frame(struct __sk_buff *skb, __u64 to, __u64 from)
{
    __u8 both[2 * ETH_ALEN];

    put_macs(both, to, from);
    return skb_store_bytes(skb, 0, both, sizeof(both), 0);
}

/* What is not known here may be nobody's: farmd asks the others. False if it has been asked too often lately. */
OUTLINE int take_turn(struct control *control)
{
    __u64 now = ktime_get_boot_ns(), next = READ_ONCE(control->asked);

    /* Processors that come here at the same time may count as one. */
    if (next + ASK_BURST * ASK_INTERVAL < now)
        next = now - ASK_BURST * ASK_INTERVAL;
    if (next > now)
        return 0;
    control->asked = next + ASK_INTERVAL;
    return 1;
}

/*
 * Whether this host has the connection, or has answered its request with a cookie that the frame brings back. Where connections may end in
 * containers, and of what looks like TIME_WAIT but may be an orphan in FIN_WAIT2, only farmd knows.
 */
INLINE enum has has_socket(struct __sk_buff *skb, const struct frame *frame, const struct packet *packet,
                           enum has otherwise)
{
    struct bpf_sock_tuple tuple = {};
    enum has has = otherwise;
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
    if (sk->state == BPF_TCP_LISTEN && packet->is_odd) {
        has = packet->is_quoted ? otherwise : ASK;
    } else if (sk->state == BPF_TCP_LISTEN) {
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

/* A copy to each of `nodes`; returns those to whom it went. */
GLOBAL __u64 spread(struct __sk_buff *skb, const struct peers *peers, __u64 from, __u64 nodes)
{
    __u64 sent_to = 0;

    if (!peers)
        return 0;
    for (__u32 node = 0; node < MAX_NODES; node++) {
        __u64 to;

        if (!(nodes >> node & 1))
            continue;
        to = peers->by_node[node];
        if (!to) {
            count(FORWARD_UNKNOWN);
        } else if (address_frame(skb, to, from) || clone_redirect(skb, skb->ifindex, 0)) {
            count(FORWARD_FAILED);
        } else {
            count(FORWARDED);
            sent_to |= 1ULL << node;
        }
    }
    return sent_to;
}

/* The Ethernet address of one of `nodes` is known. */
GLOBAL int is_any_known(const struct peers *peers, __u64 nodes)
{
    if (!peers)
        return 0;
    for (__u32 node = 0; node < MAX_NODES; node++)
        if (nodes >> node & 1 && peers->by_node[node])
            return 1;
    return 0;
}

INLINE int carry_out(struct __sk_buff *skb, struct story *story, const struct control *control,
                     __u64 epoch, const struct packet *packet, const struct place *place,
                     const struct decision *decision, int asked)
{
    __u64 owner = 1ULL << (place->entry >> OWNER_SHIFT & (MAX_NODES - 1));
    /* Why it goes on to nobody, although it should. */
    __u32 lost = 0;
    int verdict;

    /* Copies cannot be taken back. */
    if (decision->others || (decision->onward && decision->accepted)) {
        if (READ_ONCE(control->epoch) - epoch >= SLOTS - 1)
            return drop(story, PLAN_CHANGED);
        if (ktime_get_boot_ns() >= READ_ONCE(control->lease_until))
            return drop(story, LEASE_ENDED);
    }
    if (decision->others) {
        story->sent_to = spread(skb, place->peers, place->vip->own_mac, decision->others);
        if (!story->sent_to && story->is_told)
            lost = is_any_known(place->peers, decision->others) ? FORWARD_FAILED : FORWARD_UNKNOWN;
    }
    if (decision->onward) {
        if (!decision->to) {
            count(FORWARD_UNKNOWN);
            lost = FORWARD_UNKNOWN;
        } else if (address_frame(skb, decision->to, place->vip->own_mac)) {
            count(FORWARD_FAILED);
            lost = FORWARD_FAILED;
        } else if (!decision->accepted) {
            end_story(story, SENT_ON, decision->why);
            story->goes_to = owner;
            return counted_as(decision->why, redirect(packet->key.ifindex, 0)) | ALSO_FORWARDED;
        } else if (clone_redirect(skb, packet->key.ifindex, 0)) {
            count(FORWARD_FAILED);
        } else {
            count(FORWARDED);
            story->sent_to |= owner;
        }
    }
    if (asked) {
        /* By its source farmd knows that all others who may have its connection have got it. */
        if (decision->others && address_frame(skb, packet->to_mac, place->vip->own_mac))
            return drop(story, FORWARD_FAILED);
        return punt(story, control);
    }
    if (!decision->accepted) {
        verdict = drop(story, decision->why);
        if (story->sent_to)
            story->outcome = SENT_ON;
        else if (lost)
            story->why = lost;
        return verdict;
    }
    if ((decision->others || decision->onward) && address_frame(skb, packet->to_mac, packet->from_mac))
        return drop(story, FORWARD_FAILED);
    return accept(skb, story, control, decision->why);
}

INLINE int judge(struct __sk_buff *skb, struct story *story, struct control *control, __u64 epoch)
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
    __u64 holders = 0;
    int asked = 0;
    enum fate fate;
    __u32 why = 0;

    fate = find_vip(&frame, epoch, &packet, &place, &why);
    if (fate == GOES_ON)
        fate = packet.is_odd ? LEFT : read_transport(&frame, &packet, &why);
    if (fate == LEFT) {
        /* A copy, so that the packet itself may be in registers. */
        struct packet odd = packet;
        int read = read_odd(skb, &odd);

        packet = odd;
        packet.is_odd = 1;
        why = read;
        fate = read == READ ? GOES_ON : REFUSED;
    }
    if (fate == GOES_ON)
        fate = find_bucket(control, &packet, &place, &why);
    if (fate == LET_BY)
        return TC_ACT_UNSPEC;
    if (fate == REFUSED)
        return drop(story, why);
    place_story(story, &place);
    if (is_waiting(&packet, &place))
        return punt(story, control);
    if (is_shared(&packet, &place)) {
        holders = find_holders(&place);
        if (!holders)
            return punt(story, control);
    }
    if (needs_socket(&packet, &place)) {
        has = has_socket(skb, &frame, &packet, control->tracked ? ASK : HAS_NOT);
        asked = has == HAS_NOT && place.entry & BUCKET_ASKS && !packet.is_quoted && take_turn(control);
    }
    if (has == ASK)
        return punt(story, control);
    decision = decide(&packet, &place, has == HAS);
    decision.others = holders & ~(1ULL << (place.vip->this_node & (MAX_NODES - 1)));
    if (decision.onward)
        decision.others &= ~(1ULL << (place.entry >> OWNER_SHIFT & (MAX_NODES - 1)));
    return carry_out(skb, story, control, epoch, &packet, &place, &decision, asked);
}

/* Number of the plan to judge the frame by, which has no tags any more; 0 if it is let by. */
INLINE __u64 begin(struct __sk_buff *skb, const struct control *control)
{
    __u64 epoch = READ_ONCE(control->epoch);

    if (!epoch || is_of_vlan(skb))
        return 0;
    if ((skb->protocol == be16(ETH_P_8021Q) || skb->protocol == be16(ETH_P_8021AD)) && untag(skb))
        return 0;
    return epoch;
}

/* Judges by this plan, if that stays in force long enough and the lease holds to the end. */
INLINE int ingress(struct __sk_buff *skb, struct story *story, struct control *control, __u64 epoch)
{
    __u32 want = skb->len < 128 ? skb->len : 128;
    int verdict;

    if ((void *)(long)skb->data + want > (void *)(long)skb->data_end && skb_pull_data(skb, want))
        return TC_ACT_UNSPEC;
    verdict = judge(skb, story, control, epoch);
    /* What was wrongly taken for the host's own meets the nf_tables chain. */
    if (verdict == TC_ACT_UNSPEC)
        return verdict;
    /* So many plans later the slot may have been written while it was read. */
    if (READ_ONCE(control->epoch) - epoch >= SLOTS - 1)
        verdict = drop(story, PLAN_CHANGED);
    /* At the end: this processor may have stood still since the frame came. */
    else if (ACTION(verdict) != TC_ACT_SHOT && ktime_get_boot_ns() >= READ_ONCE(control->lease_until))
        verdict = drop(story, LEASE_ENDED);
    count(CAUSE(verdict));
    if (verdict & ALSO_FORWARDED)
        count(FORWARDED);
    if (verdict & ALSO_BYTES)
        add(BYTES_ACCEPTED, skb->len);
    return ACTION(verdict);
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
    epoch = begin(skb, control);
    return epoch ? ingress(skb, &untold, control, epoch) : TC_ACT_UNSPEC;
}

SEC("classifier")
int farm_traced(struct __sk_buff *skb)
{
    __u32 zero = 0;
    struct control *control = map_lookup(&CONTROL, &zero);
    struct story story = {.is_told = 1};
    int verdict, observed;
    __u64 epoch;

    if (!control)
        return TC_ACT_UNSPEC;
    epoch = begin(skb, control);
    if (!epoch)
        return TC_ACT_UNSPEC;
    observed = observe(skb, control);
    verdict = ingress(skb, &story, control, epoch);
    if (observed && verdict != TC_ACT_UNSPEC)
        tell(control, &story);
    return verdict;
}

#include "nothing.h"
#include "xdp.h"

char LICENSE[] SEC("license") = "GPL";
