/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/*
 * What became of each frame, told to farmd while somebody listens (farm trace). A program of its own does that, in the place of the ordinary one, which
 * keeps a story that it never tells: the compiler leaves nothing of it.
 */
#ifndef TRACE_H
#define TRACE_H

#include "decision.h"
#include "helpers.h"
#include "tables.h"

struct {
    UINT(type, BPF_MAP_TYPE_RINGBUF);
    UINT(max_entries, 1 << 20);
} EVENTS SEC(".maps");

/* Room for one event on each processor; too much for the stack. */
struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, 1);
    TYPE(key, __u32);
    TYPE(value, struct event);
} DRAFT SEC(".maps");

struct story {
    __u64 sent_to; /* a bit for each node that got a copy */
    __u64 goes_to; /* the same of the node that gets the frame itself */
    __u32 outcome;
    __u32 why; /* the counter that the verdict is counted in */
    __u32 placed;
    __u32 place; /* as an event has it */
    __u32 owner;
    int is_told;
};

INLINE void end_story(struct story *story, enum outcome outcome, __u32 why)
{
    story->outcome = outcome;
    story->why = why;
    story->goes_to = 0;
}

INLINE void place_story(struct story *story, const struct place *place)
{
    story->placed = 1;
    story->place = (place->group - place->slot * MAX_GROUPS) * BUCKETS + place->bucket;
    story->owner = place->entry >> OWNER_SHIFT;
}

/* The frame as it came in, before anything is written to it; 0 if it is not to be told of. */
INLINE int observe(struct __sk_buff *skb, const struct control *control)
{
    __u32 zero = 0, captured = skb->len;
    struct event *event = map_lookup(&DRAFT, &zero);
    __u64 snap = READ_ONCE(control->snap);

    if (!event)
        return 0;
    if (captured > snap)
        captured = snap;
    if (captured > MAX_SNAP)
        captured = MAX_SNAP;
    /* The verifier takes this for the proof that it is not 0; and nothing shorter is a frame. */
    if (captured < ETH_HLEN || skb_load_bytes(skb, 0, event->bytes, captured))
        return 0;
    event->captured = captured;
    event->ifindex = skb->ifindex;
    event->length = skb->len;
    return 1;
}

/* Of the frame that this processor has observed. */
INLINE void tell(struct control *control, const struct story *story)
{
    __u32 zero = 0, captured;
    struct event *event = map_lookup(&DRAFT, &zero);

    if (!event)
        return;
    captured = event->captured;
    event->at = ktime_get_boot_ns();
    event->sent_to = story->sent_to | story->goes_to;
    event->place = story->place;
    event->outcome = story->outcome;
    event->why = story->why;
    event->owner = story->owner;
    event->placed = story->placed;
    if (captured > MAX_SNAP)
        return;
    if (ringbuf_output(&EVENTS, event, __builtin_offsetof(struct event, bytes) + captured, 0))
        __sync_fetch_and_add(&control->untold, 1);
}

#endif
