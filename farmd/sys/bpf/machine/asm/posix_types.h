/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
#include <asm-generic/posix_types.h>
