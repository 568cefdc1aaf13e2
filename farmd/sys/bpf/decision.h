/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/*
 * The decision of farm_core::balance::decide, for both programs: finds the bucket of a packet and says what becomes of it. It touches no
 * frame, sends nothing and counts nothing, so that each program can carry it out, or leave it to the other, by its own means.
 */
#ifndef DECISION_H
#define DECISION_H

#include "frame.h"
#include "tables.h"

/* Where a packet belongs. */
struct place {
    const struct vip *vip;
    const struct peers *peers;
    int from_member;
    __u32 slot;
    __u32 number; /* of the VIP, in its slot */
    __u32 group;  /* in its slot */
    __u32 bucket;
    __u32 entry; /* of the table of buckets */
};

/* What this host has of the connection of a packet. */
enum has { HAS_NOT, HAS, ASK };

struct decision {
    int accepted;
    __u32 why;
    int onward;   /* goes on to its owner */
    __u64 to;     /* whose Ethernet address this is; 0 if it is not known */
    __u64 others; /* who else gets it */
};

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
        h = fmix32(h ^ (packet->identification & 0xffff));
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

INLINE int is_same(const struct vip_key *a, const struct vip_key *b)
{
    return a->addr[3] == b->addr[3] && a->ifindex == b->ifindex && a->addr[2] == b->addr[2] &&
           a->addr[1] == b->addr[1] && a->addr[0] == b->addr[0];
}

#define NO_NUMBER 0xffffffff

/* Number of the VIP that the packet goes to. */
INLINE __u32 find_number(const struct packet *packet, __u32 slot)
{
    const struct near *near = map_lookup(&NEAR_VIPS, &slot);
    const __u32 *found;

    if (!near)
        return NO_NUMBER;
    for (__u32 i = 0; i < NEAR && i < near->count; i++)
        if (is_same(&near->keys[i], &packet->key))
            return near->numbers[i];
    if (near->is_whole)
        return NO_NUMBER;
    found = map_lookup(&VIP_NUMBERS, &packet->key);
    return found ? *found : NO_NUMBER;
}

/* Reads the addresses and finds the VIP in plan number `epoch`; `why` if it is refused. */
INLINE enum fate find_vip(const struct frame *frame, __u64 epoch, struct packet *packet, struct place *place, __u32 *why)
{
    enum fate fate = read_network(frame, packet);
    __u32 number;

    if (fate != GOES_ON)
        return fate;
    place->slot = epoch % SLOTS;
    number = find_number(packet, place->slot);
    if (number == NO_NUMBER)
        return LET_BY;
    place->number = place->slot * MAX_VIPS + (number & (MAX_VIPS - 1));
    place->vip = map_lookup(&VIPS, &place->number);
    place->peers = map_lookup(&PEERS, &place->number);
    /* Not this plan's: the raw data plane sees it too. */
    if (!place->vip || !place->peers || place->vip->epoch != epoch)
        return LET_BY;
    *why = OTHER_MAC;
    if (packet->to_mac != place->vip->service_mac) {
        if (packet->to_mac != place->vip->own_mac || !is_member(place->peers, packet->from_mac))
            return REFUSED;
        place->from_member = 1;
    }
    return GOES_ON;
}

/* The rule for its port, 0 if there is none. */
INLINE __u32 find_rule(const struct packet *packet, const struct place *place)
{
    __u32 at = place->number * 2 + (packet->protocol == IPPROTO_UDP);
    const __u16 *table = map_lookup(&DIRECTORIES, &at);

    if (!table)
        return 0;
    at = place->slot * MAX_PAGES + (table[packet->destination_port >> 8] & (MAX_PAGES - 1));
    table = map_lookup(&PAGES, &at);
    return table ? table[packet->destination_port & 0xff] : 0;
}

/* Finds the bucket of a packet that has been read; `why` if it is refused. */
INLINE enum fate find_bucket(const struct control *control, const struct packet *packet, struct place *place, __u32 *why)
{
    __u32 rule, group, affinity;
    const __u16 *table;

    *why = NO_RULE;
    if (packet->is_echo) {
        group = place->vip->entry_group;
        affinity = AFFINITY_ADDR;
    } else {
        if (packet->is_portless) {
            *why = UNKNOWN_FRAGMENT;
            if (packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP)
                return REFUSED;
            rule = place->vip->portless[packet->protocol == IPPROTO_UDP];
        } else {
            rule = find_rule(packet, place);
        }
        if (!rule)
            return REFUSED;
        group = (rule - 1) >> 2;
        affinity = (rule - 1) & 3;
    }
    if (group >= MAX_GROUPS)
        return REFUSED;
    place->group = group + place->slot * MAX_GROUPS;
    table = map_lookup(&BUCKET_TABLES, &place->group);
    if (!table)
        return REFUSED;
    place->bucket = bucket_of(control, packet, affinity) & (BUCKETS - 1);
    place->entry = table[place->bucket];
    if (place->vip->directed)
        place->from_member = is_member(place->peers, packet->from_mac);
    return GOES_ON;
}

/* All of it for a packet whose ports are where they are looked for; any other is left. */
INLINE enum fate find_place(const struct frame *frame, const struct control *control, __u64 epoch, struct packet *packet,
                            struct place *place, __u32 *why)
{
    enum fate fate = find_vip(frame, epoch, packet, place, why);

    if (fate == GOES_ON)
        fate = packet->is_odd ? LEFT : read_transport(frame, packet, why);
    return fate == GOES_ON ? find_bucket(control, packet, place, why) : fate;
}

/* Comes from outside to the entry node, which sends it on to whom it belongs. */
INLINE int is_entering(const struct place *place)
{
    return place->vip->directed && !place->from_member;
}

/* Needs a wait, or to be known again, which is farmd's. */
INLINE int is_waiting(const struct packet *packet, const struct place *place)
{
    __u32 state = place->entry & STATE_MASK;
    int handed_on = place->from_member && packet->to_mac == place->vip->own_mac;

    if (packet->kind == BELONGING)
        return 0;
    if (place->entry & (BUCKET_LEAVING | BUCKET_YOUNG))
        return 1;
    return handed_on && (!place->vip->directed || state == STATE_DRAINING || state == STATE_FOREIGN);
}

/* Others may have its connection. */
INLINE int is_shared(const struct packet *packet, const struct place *place)
{
    return packet->kind == BELONGING && (place->entry & BUCKET_HELD) && is_entering(place);
}

/* Not to be decided at once, and for one receiver. */
INLINE int is_left(const struct packet *packet, const struct place *place)
{
    return is_waiting(packet, place) || is_shared(packet, place);
}

/* Who has connections in its bucket, a bit for each; 0 if that is not in the tables. */
INLINE __u64 find_holders(const struct place *place)
{
    struct holders *holders = map_lookup(&HOLDERS, &place->group);
    __u32 number;

    if (!holders)
        return 0;
    number = holders->number[place->bucket & (BUCKETS - 1)];
    return number ? holders->sets[number & (HOLDER_SETS - 1)] : 0;
}

/* Whether the decision depends on this host's having the connection. */
INLINE int needs_socket(const struct packet *packet, const struct place *place)
{
    __u32 state = place->entry & STATE_MASK;

    return packet->kind == BELONGING && (state == STATE_GUARDED || state == STATE_DRAINING);
}

/* What becomes of a packet that is not left to farmd; this host `has` its connection, where that matters. */
INLINE struct decision decide(const struct packet *packet, const struct place *place, int has)
{
    __u32 owner = place->entry >> OWNER_SHIFT;
    int starts = packet->kind != BELONGING;
    struct decision decision = {};

    switch (place->entry & STATE_MASK) {
    case STATE_OWN:
        decision.why = OWN;
        decision.accepted = 1;
        break;
    case STATE_GUARDED:
        decision.why = starts ? GUARDED_NEW : has ? GUARDED_KNOWN : GUARDED_UNKNOWN;
        decision.accepted = starts || has;
        break;
    case STATE_DRAINING:
        decision.accepted = !starts && has;
        decision.why = decision.accepted ? DRAINING_KNOWN : DRAINING_OTHER;
        break;
    default:
        decision.why = owner == OWNER_NONE ? NO_OWNER : FOREIGN;
        break;
    }
    if (owner != OWNER_NONE && owner != place->vip->this_node && is_entering(place)) {
        decision.onward = 1;
        decision.to = place->peers->by_node[owner & (MAX_NODES - 1)];
    }
    return decision;
}

#endif
