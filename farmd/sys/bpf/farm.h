/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/*
 * What the programs and farmd share: the maps' layout and the numbers in them. The Rust side is src/bpf/layout.rs; a test
 * compares every verdict of the two.
 */
#ifndef FARM_H
#define FARM_H

#include <linux/types.h>

#define BUCKETS 4096
#define BUCKET_SHIFT 20 /* the highest 12 bits of the hash */

/* A plan lies in slot `epoch % SLOTS`; the next one is written while the present one is read. */
#define SLOTS 4
#define MAX_VIPS 64
#define MAX_GROUPS 32
#define MAX_NODES 64
#define MAX_PAGES 1024 /* of port rules, in each slot */
#define HOLDER_SETS 256 /* of nodes that have connections in a bucket, in each group */
#define MAX_FRAGMENTS 8192 /* datagrams of which the first fragment is remembered */

/* A bucket: state, flags, and the owner in the high byte. */
#define STATE_MASK 0x0003
#define STATE_OWN 0
#define STATE_GUARDED 1
#define STATE_DRAINING 2
#define STATE_FOREIGN 3
#define BUCKET_LEAVING 0x0004 /* changes hands: what starts something is for farmd */
#define BUCKET_YOUNG 0x0008   /* has just opened, or is about to close: the same */
#define BUCKET_HELD 0x0010    /* other members have connections in it */
#define BUCKET_ASKS 0x0020    /* what this host does not have may be nobody's: farmd asks */
#define OWNER_SHIFT 8
#define OWNER_NONE 0xff

/* A rule: 0 is none, else 1 + (group << 2 | affinity). */
#define AFFINITY_ADDR 0
#define AFFINITY_PORT 1
#define AFFINITY_NET 2
#define AFFINITY_IPID 3

/* Counters: one for each reason of the core's decision, in its order, and then the program's own. */
enum count {
    NOT_VIP,
    OTHER_MAC,
    NO_RULE,
    MALFORMED,
    UNKNOWN_FRAGMENT,
    OWN,
    GUARDED_NEW,
    GUARDED_KNOWN,
    GUARDED_UNKNOWN,
    DRAINING_KNOWN,
    DRAINING_OTHER,
    FOREIGN,
    NO_OWNER,
    OPENING,
    HANDED_OVER,
    LEASE_ENDED,
    FORWARDED,
    FORWARD_UNKNOWN,
    FORWARD_FAILED,
    PUNTED,
    PLAN_CHANGED,
    BYTES_ACCEPTED,
    TAP_FAILED,
    COUNTS,
};

struct control {
    __u64 epoch;       /* of the plan in force; 0: none yet, nothing is judged */
    __u64 lease_until; /* CLOCK_BOOTTIME, ns: past it nothing is accepted */
    __u32 seed0;
    __u32 seed1;
    __u32 tap;     /* interface through which farmd gets what it judges itself, and the stack what is accepted unless that passes up */
    __u32 tracked; /* connections may end in containers, of which only farmd knows */
    __u8 tap_mac[6];
    __u8 passes_up; /* what is accepted goes on where it came in, not through the TAP */
    __u8 unused;
    __u64 snap;   /* bytes of each frame for whoever listens; 0: nobody does */
    __u64 untold; /* frames that there was no room to tell of */
    __u64 asked;  /* CLOCK_BOOTTIME, ns: when what may be nobody's may next be put to farmd */
};

/* Stands in the mark of what is accepted where it came in; the nf_tables rule there lets it by and takes it off. */
#define ACCEPTED_MARK 0x4641524d

/* What may be nobody's is put to farmd so seldom that others' bulk in the same bucket does not keep it from its work. */
#define ASK_INTERVAL 100000 /* ns, on average */
#define ASK_BURST 256       /* and so many at once */

#define MAX_SNAP 2048

enum outcome { ACCEPTED, DROPPED, SENT_ON, LEFT_TO_FARMD };

/* What became of a frame, for whoever listens; as much of the frame follows as was captured. */
struct event {
    __u64 at;      /* CLOCK_BOOTTIME, ns */
    __u64 sent_to; /* a bit for each node that it was sent on to */
    __u32 ifindex;
    __u32 length; /* of the whole frame */
    __u32 captured;
    __u32 place; /* group * BUCKETS + bucket, if `placed` */
    __u8 outcome;
    __u8 why; /* a counter */
    __u8 owner;
    __u8 placed;
    __u8 pad[4];
    __u8 bytes[MAX_SNAP];
};

struct vip_key {
    __u32 ifindex;
    __u32 addr[4]; /* network byte order; IPv4 in the last word, after 0, 0, 0xffff */
};

#define NEAR 4

/* The first VIPs of a plan and their numbers, so that few of them need no hash. */
struct near {
    __u32 count;
    __u32 is_whole; /* there are no others */
    __u32 numbers[NEAR];
    struct vip_key keys[NEAR];
};

struct vip {
    __u64 service_mac; /* six bytes as a number, the first the lowest, as they lie in memory */
    __u64 own_mac;
    __u64 epoch; /* of the plan it belongs to: any other has no such address */
    __u16 directed;
    __u16 entry_group;
    __u32 this_node;
    __u16 portless[2]; /* of TCP, of UDP: the rule of what has no ports to tell */
    __u32 unused;
};

struct peers {
    __u64 count;
    __u64 list[MAX_NODES];
    __u64 by_node[MAX_NODES]; /* 0: not known */
};

/* Who else has connections in the buckets of a group. */
struct holders {
    __u8 number[BUCKETS];   /* of the set of nodes; 0: not here, farmd knows */
    __u64 sets[HOLDER_SETS]; /* a bit for each node; the first is no set */
};

/* Which datagram a fragment belongs to. */
struct fragment_key {
    __u32 source[4];
    __u32 destination[4];
    __u32 identification;
    __u32 protocol; /* of IPv6 always that of the fragment header */
};

/* What its first fragment carried. */
struct fragment {
    __u64 seen; /* CLOCK_BOOTTIME, ns */
    __u16 source_port, destination_port;
    __u8 protocol;
    __u8 kind;
    __u16 unused;
};

/* src/bpf/layout.rs has these lengths. */
_Static_assert(sizeof(struct control) == 64, "control");
_Static_assert(sizeof(struct vip_key) == 20, "vip_key");
_Static_assert(sizeof(struct near) == 104, "near");
_Static_assert(sizeof(struct vip) == 40, "vip");
_Static_assert(sizeof(struct peers) == 8 + 16 * MAX_NODES, "peers");
_Static_assert(sizeof(struct holders) == BUCKETS + 8 * HOLDER_SETS, "holders");
_Static_assert(sizeof(struct fragment_key) == 40, "fragment_key");
_Static_assert(sizeof(struct fragment) == 16, "fragment");
_Static_assert(sizeof(struct event) == 40 + MAX_SNAP, "event");

#endif
