/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/* The maps, which both programs share, and counting in one of them. */
#ifndef TABLES_H
#define TABLES_H

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
    UINT(max_entries, SLOTS);
    TYPE(key, __u32);
    TYPE(value, struct near);
} NEAR_VIPS SEC(".maps");

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
    UINT(type, BPF_MAP_TYPE_ARRAY);
    UINT(max_entries, SLOTS * MAX_GROUPS);
    TYPE(key, __u32);
    TYPE(value, struct holders);
} HOLDERS SEC(".maps");

/* farmd reads it for what is left to it. */
struct {
    UINT(type, BPF_MAP_TYPE_LRU_HASH);
    UINT(max_entries, MAX_FRAGMENTS);
    TYPE(key, struct fragment_key);
    TYPE(value, struct fragment);
} FRAGMENTS SEC(".maps");

struct {
    UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    UINT(max_entries, COUNTS);
    TYPE(key, __u32);
    TYPE(value, __u64);
} COUNTERS SEC(".maps");

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

#endif
