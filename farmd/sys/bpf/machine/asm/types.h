/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
/* The BPF machine, whatever the host: the kernel's generic headers. */
#include <asm-generic/types.h>
