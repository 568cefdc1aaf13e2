/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/*
 * Programs that drop every frame at once: what any program costs at the same place, which measurements take off; and one that reads the clock
 * first, as each frame that is accepted makes necessary. farmd never loads them.
 */
#ifndef NOTHING_H
#define NOTHING_H

SEC("classifier")
int farm_nothing(struct __sk_buff *skb)
{
    (void)skb;
    return TC_ACT_SHOT;
}

SEC("classifier")
int farm_clock(struct __sk_buff *skb)
{
    (void)skb;
    return ktime_get_boot_ns() ? TC_ACT_SHOT : TC_ACT_OK;
}

SEC("xdp")
int farm_nothing_early(struct xdp_md *frame)
{
    (void)frame;
    return XDP_DROP;
}

#endif
