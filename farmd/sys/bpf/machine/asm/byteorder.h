/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-or-later */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#include <linux/byteorder/big_endian.h>
#else
#include <linux/byteorder/little_endian.h>
#endif
