/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/*
 * The programs at XDP of a service interface, ahead of the socket buffer: drop what the program at tc would drop without asking
 * anybody, and send on what goes on to another member alone. Everything else they pass up, uncounted, to the program at tc, which
 * judges it by the same tables; without that one they are not attached.
 *
 * XDP is ahead of packet sockets too. So connection requests are passed up whosoever they are, for the recorder that answers them should
 * their node be gone, and so is what belongs to neighbour discovery.
 */
#ifndef XDP_H
#define XDP_H

#include "decision.h"

/* Frames up to this length are sent on, if they lie in one piece. */
#define MAX_SENT 0x3fff

/* A packet socket waits for it, although the decision has no use for it. */
INLINE int is_heard(const struct frame *frame, struct packet *packet, __u32 why)
{
    __u32 flaw;

    if (why == MALFORMED)
        return 0;
    if (why == OTHER_MAC) {
        /* Nothing but its addresses has been looked at so far. */
        if (packet->is_odd)
            return packet->v6;
        if (read_transport(frame, packet, &flaw) == REFUSED && flaw == MALFORMED)
            return 0;
        if (packet->kind == OPENING_TCP)
            return 1;
    }
    return packet->v6 && packet->protocol == IPPROTO_ICMPV6 && !packet->is_echo;
}

/* `cause` is what the verdict is counted as. */
INLINE int judge_early(struct xdp_md *ctx, const struct control *control, __u64 epoch, int sends, __u32 *cause)
{
    struct frame frame = {
        .data = (void *)(long)ctx->data,
        .end = (void *)(long)ctx->data_end,
        .length = xdp_get_buff_len(ctx),
        .ifindex = ctx->ingress_ifindex,
    };
    struct packet packet = {};
    struct place place = {};
    struct decision decision;

    switch (find_place(&frame, control, epoch, &packet, &place, cause)) {
    case REFUSED:
        return is_heard(&frame, &packet, *cause) ? XDP_PASS : XDP_DROP;
    case GOES_ON:
        break;
    default:
        return XDP_PASS;
    }
    if (packet.kind == OPENING_TCP || is_left(&packet, &place) || needs_socket(&packet, &place))
        return XDP_PASS;
    decision = decide(&packet, &place, 0);
    *cause = decision.why;
    if (decision.accepted)
        return XDP_PASS;
    if (decision.onward && decision.to) {
        if (!sends || frame.length > MAX_SENT || frame.length < ETH_HLEN)
            return XDP_PASS;
        if (frame.data + (frame.length & MAX_SENT) > frame.end || frame.data + ETH_HLEN > frame.end)
            return XDP_PASS;
        put_macs(frame.data, decision.to, place.vip->own_mac);
        return XDP_TX;
    }
    if (decision.onward)
        count(FORWARD_UNKNOWN);
    return XDP_DROP;
}

INLINE int early(struct xdp_md *ctx, int sends)
{
    __u32 zero = 0;
    struct control *control = map_lookup(&CONTROL, &zero);
    __u32 cause = 0;
    __u64 epoch;
    int verdict;

    if (!control)
        return XDP_PASS;
    epoch = READ_ONCE(control->epoch);
    if (!epoch)
        return XDP_PASS;
    /* Somebody listens: the program at tc does it all, and tells. */
    if (READ_ONCE(control->snap))
        return XDP_PASS;
    verdict = judge_early(ctx, control, epoch, sends, &cause);
    if (verdict == XDP_PASS)
        return XDP_PASS;
    if (READ_ONCE(control->epoch) - epoch >= SLOTS - 1) {
        verdict = XDP_DROP;
        cause = PLAN_CHANGED;
    } else if (verdict == XDP_TX && ktime_get_boot_ns() >= READ_ONCE(control->lease_until)) {
        verdict = XDP_DROP;
        cause = LEASE_ENDED;
    }
    count(cause);
    if (verdict == XDP_TX)
        count(FORWARDED);
    return verdict;
}

/* Where the driver can send what has come in, with everything in the frame that belongs to it. */
SEC("xdp.frags")
int farm_early(struct xdp_md *ctx)
{
    return early(ctx, 1);
}

/* Where it cannot: what goes on is passed up. */
SEC("xdp.frags")
int farm_early_drop(struct xdp_md *ctx)
{
    return early(ctx, 0);
}

#endif
