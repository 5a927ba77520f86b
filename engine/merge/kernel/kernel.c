/* The merge's inner loops, without Python: engine/merge/kernel/compiled.py loads this file's functions by ctypes
 * (which releases the interpreter's lock), plain.py is the same in numpy and what every one of them is tested
 * against. Functions work on one block of rows that fits the second-level cache; nothing here allocates, opens or
 * keeps anything.
 *
 * Types: 0 BF16, 1 F16, 2 F32. Lengths are elements. "Bits" of a magnitude: the float32's bits without the sign, so
 * that comparing them as integers compares the magnitudes, and anything from 0x7F800000 up is infinity or NaN.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdint.h>
#include <string.h>

#define BF16 0
#define F16 1
#define F32 2
#define TILE_COLUMNS 16
#define TILE_ROWS 6
#define PANEL 1024 /* columns of a right factor that stay in the cache together */

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Once for any processor, once for those with AVX2, FMA and F16C; chosen at run time. */
#define NAME(function) function##_any
#define TARGET
#include "body.h"
#undef NAME
#undef TARGET

#if defined(__x86_64__) && defined(__GNUC__)
#define TWO_VERSIONS 1
#define NAME(function) function##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "body.h"
#undef NAME
#undef TARGET
#endif

static int fast(void) {
#ifdef TWO_VERSIONS
    static int known = -1;
    if (known < 0) {
        __builtin_cpu_init();
        known = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    return known;
#else
    return 0;
#endif
}

#ifdef TWO_VERSIONS
#define CHOOSE(function, ...) (fast() ? function##_avx2(__VA_ARGS__) : function##_any(__VA_ARGS__))
#else
#define CHOOSE(function, ...) function##_any(__VA_ARGS__)
#endif

EXPORT int32_t medmerge_kernel_version(void) { return 1; }
EXPORT int32_t medmerge_kernel_fast(void) { return fast(); }

EXPORT int64_t medmerge_packed_length(int64_t ranks, int64_t columns) {
    return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS * ranks;
}

/* right (ranks, columns) -> packed, tiles of 16 columns, each (ranks, 16); columns beyond the last are 0. */
EXPORT void medmerge_pack(const float *right, int64_t ranks, int64_t columns, float *packed) {
    for (int64_t tile = 0; tile * TILE_COLUMNS < columns; tile++)
        for (int64_t r = 0; r < ranks; r++)
            for (int64_t c = 0; c < TILE_COLUMNS; c++) {
                int64_t column = tile * TILE_COLUMNS + c;
                packed[(tile * ranks + r) * TILE_COLUMNS + c] = column < columns ? right[r * columns + column] : 0.0f;
            }
}

/* out (rows, columns) = left (rows, ranks) @ right, from its packed form. */
EXPORT void medmerge_low_rank(const float *left, const float *packed, int64_t ranks, int64_t rows, int64_t columns,
                              float *out) {
    CHOOSE(low_rank, left, packed, ranks, rows, columns, out);
}

/* out = round(c * base + extra + left @ right); `extra` may be NULL, ranks may be 0. `scratch` holds 6 x 1024 floats.
 * Returns the largest magnitude's bits before rounding. */
EXPORT uint32_t medmerge_linear(const void *base, int32_t base_type, float c, const float *extra, const float *left,
                                const float *packed, int64_t ranks, int64_t rows, int64_t columns, float *scratch,
                                void *out, int32_t out_type) {
    return CHOOSE(linear, base, base_type, c, extra, left, packed, ranks, rows, columns, scratch, out, out_type);
}

/* sum = c * x, or sum += c * x. */
EXPORT void medmerge_scaled(const void *x, int32_t type, float c, int32_t add, int64_t n, float *sum) {
    CHOOSE(scaled, x, type, c, add, n, sum);
}

/* out = x - w, in float32. */
EXPORT void medmerge_difference(const void *x, int32_t x_type, const void *w, int32_t w_type, int64_t n, float *out) {
    CHOOSE(difference, x, x_type, w, w_type, n, out);
}

/* The largest magnitude's bits. */
EXPORT uint32_t medmerge_largest(const void *x, int32_t type, int64_t n) { return CHOOSE(largest, x, type, n); }

/* sums += (p.p, q.q, p.q), added in float64. */
EXPORT void medmerge_dots(const float *p, const float *q, int64_t n, double *sums) { CHOOSE(dots, p, q, n, sums); }

/* counts[bits >> 15]++ for every magnitude (65,536 bins). */
EXPORT void medmerge_histogram(const float *d, int64_t n, int64_t *counts) {
    const uint32_t *bits = (const uint32_t *)d;
    for (int64_t i = 0; i < n; i++) counts[(bits[i] & 0x7FFFFFFFu) >> 15]++;
}

/* counts[bits & 0x7FFF]++ for every magnitude in one bin of the histogram above (32,768 bins). */
EXPORT void medmerge_histogram_within(const float *d, int64_t n, uint32_t bin, int64_t *counts) {
    const uint32_t *bits = (const uint32_t *)d;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits[i] & 0x7FFFFFFFu;
        if (magnitude >> 15 == bin) counts[magnitude & 0x7FFFu]++;
    }
}

/* What is smaller than the threshold becomes 0. */
EXPORT void medmerge_trim(float *d, int64_t n, float threshold) { CHOOSE(trim, d, n, threshold); }

/* Sign election over `entries` deltas, one after the other in `d` (entries, n): sum of weight * d over those that
 * agree with the sign of the whole sum, divided by the sum of their weights when `normalize`. `out` may be d's first. */
EXPORT void medmerge_elect(const float *d, const float *weights, int64_t entries, int64_t n, int32_t normalize,
                           float lambda, float *out) {
    CHOOSE(elect, d, weights, entries, n, normalize, lambda, out);
}

/* Philox4x64-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405), as numpy's: element i of the tensor is kept when
 * draw(i) < keep_below, and multiplied by `scale`; else it becomes 0. draw(2j) and draw(2j + 1) are the low and the
 * high 32 bits of raw output j; block b of four outputs has counter b + 1. `first` is i of d[0]. */
#define PHILOX_ROUND(a, b, c, d, k0, k1)                                                \
    {                                                                                   \
        unsigned __int128 one = (unsigned __int128)(a) * 0xD2E7470EE14C6C93ull;         \
        unsigned __int128 two = (unsigned __int128)(c) * 0xCA5A826395121157ull;         \
        (a) = (uint64_t)(two >> 64) ^ (b) ^ (k0), (b) = (uint64_t)two;                  \
        (c) = (uint64_t)(one >> 64) ^ (d) ^ (k1), (d) = (uint64_t)one;                  \
    }

/* The sixteen draws of two counters, interleaved so that the processor multiplies for both at once. */
static void philox_pair(uint64_t counter, uint64_t key0, uint64_t key1, uint32_t draws[16]) {
    uint64_t a = counter, b = 0, c = 0, d = 0, e = counter + 1, f = 0, g = 0, h = 0;
    for (int round = 0; round < 10; round++) {
        PHILOX_ROUND(a, b, c, d, key0, key1)
        PHILOX_ROUND(e, f, g, h, key0, key1)
        key0 += 0x9E3779B97F4A7C15ull;
        key1 += 0xBB67AE8584CAA73Bull;
    }
    uint64_t raw[8] = {a, b, c, d, e, f, g, h};
    for (int j = 0; j < 8; j++) {
        draws[2 * j] = (uint32_t)raw[j];
        draws[2 * j + 1] = (uint32_t)(raw[j] >> 32);
    }
}

EXPORT void medmerge_dare(float *d, int64_t n, int64_t first, uint64_t key0, uint64_t key1, uint64_t keep_below,
                          float scale) {
    enum { BLOCKS = 64 }; /* 512 draws at once */
    uint32_t draws[8 * BLOCKS + 8];
    int64_t at = 0, skip = first % 8;
    while (at < n) {
        uint64_t block = (uint64_t)((first + at) / 8) + 1;
        for (int64_t b = 0; b < BLOCKS; b += 2) philox_pair(block + (uint64_t)b, key0, key1, draws + 8 * b);
        int64_t count = 8 * BLOCKS - skip < n - at ? 8 * BLOCKS - skip : n - at;
        CHOOSE(keep, d + at, draws + skip, count, keep_below, scale);
        at += count;
        skip = 0;
    }
}

/* Ask the kernel to begin writing these bytes to the disk now, without waiting; a hint, so errors do not matter. */
EXPORT void medmerge_start_writing(int32_t descriptor, int64_t offset, int64_t count) {
#if defined(__linux__)
    (void)sync_file_range(descriptor, offset, count, SYNC_FILE_RANGE_WRITE);
#else
    (void)descriptor, (void)offset, (void)count;
#endif
}
