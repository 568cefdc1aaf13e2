/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/* Programs that drop every frame at once: what any program costs at the same place, which measurements take off. farmd never loads them. */
#ifndef NOTHING_H
#define NOTHING_H

SEC("classifier")
int farm_nothing(struct __sk_buff *skb)
{
    (void)skb;
    return TC_ACT_SHOT;
}

SEC("xdp")
int farm_nothing_early(struct xdp_md *frame)
{
    (void)frame;
    return XDP_DROP;
}

#endif
