/* The verifier's inner loops, apart from the merge's: quick.py and comparison.py call them by ctypes and hold the same
 * in numpy, which is what they are tested against. They only say which elements equal our own float32 result,
 * and gather sums; what is unequal is judged in float64, in Python.
 */
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
#define TILE 512 /* elements done at once: what is widened stays in the first cache */
#define LANES 16
#define MOST 8 /* entries of a tensor */

enum { BF16, F16, F32, DELTA, NOTHING }; /* how an entry is given: as stored (its delta is x - w), as delta, or 0 */

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float number_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float widen_f16(uint16_t half) { /* shifted into place, the exponent is 112 too small, also of subnormals */
    uint32_t bits = (uint32_t)(half & 0x7FFF) << 13;
    uint32_t size = bits_of(number_of(bits) * 0x1p112f);
    size = bits >= 0x0F800000u ? bits | 0x7F800000u : size; /* infinite or NaN */
    return number_of(size | (uint32_t)(half & 0x8000) << 16);
}

INLINE void widen(const void *from, const int kind, int64_t start, int64_t n, float *out) {
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++) out[i] = number_of((uint32_t)((const uint16_t *)from)[start + i] << 16);
    else if (kind == F16)
        for (int64_t i = 0; i < n; i++) out[i] = widen_f16(((const uint16_t *)from)[start + i]);
    else
        memcpy(out, (const float *)from + start, (size_t)n * sizeof(float));
}

/* The delta of an entry at some elements: `out`, or where it lies already. */
INLINE const float *delta_of(const void *from, const int kind, int64_t start, int64_t n, const float *w, float *out) {
    if (kind == DELTA) return (const float *)from + start;
    if (kind == NOTHING) {
        memset(out, 0, (size_t)n * sizeof(float));
        return out;
    }
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++)
            out[i] = number_of((uint32_t)((const uint16_t *)from)[start + i] << 16) - w[i];
    else if (kind == F16)
        for (int64_t i = 0; i < n; i++) out[i] = widen_f16(((const uint16_t *)from)[start + i]) - w[i];
    else
        for (int64_t i = 0; i < n; i++) out[i] = ((const float *)from)[start + i] - w[i];
    return out;
}

/* To nearest, ties to even, as float32. */
INLINE float round_to(float value, const int kind) {
    uint32_t bits = bits_of(value);
    if (kind == BF16) return number_of((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u);
    if (kind == F32) return value;
    uint32_t size = bits & 0x7FFFFFFF;
    uint32_t normal = (size + 0xFFF + ((size >> 13) & 1)) & 0xFFFFE000u;
    uint32_t small = bits_of((number_of(size) + 0.75f) - 0.75f); /* 0.75's last place is 2^-24, the least half */
    normal = size - 0x477FF000u < 0x7F800000u - 0x477FF000u ? 0x7F800000u : normal; /* 65520 and more: infinite */
    return number_of((size < 0x38800000u ? small : normal) | (bits & 0x80000000u));
}

/* Our value lies at least two units (2^-24 of it each) inside the bound e on either side, see quick.py: an element
 * that is a rounding of a value so near is right, too. */
INLINE uint32_t differs_from(float found, float value, const int kind) {
    float step = value * 0x1p-23f;
    if (kind == F32) {
        float off = found - value, size = step < 0 ? -step : step;
        return !((off <= size) & (off >= -size));
    }
    return (found != round_to(value, kind)) & (found != round_to(value - step, kind)) &
           (found != round_to(value + step, kind));
}

INLINE double dot(const float *x, const float *y, int64_t n) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += x[i + k] * y[i + k];
    double sum = 0;
    for (; i < n; i++) sum += (double)x[i] * y[i];
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

EXPORT int32_t medverify_version(void) { return 2; }

EXPORT EVERY_PROCESSOR void medverify_widen(const uint16_t *bits, int32_t kind, int64_t n, float *out) {
    if (kind == BF16)
        widen(bits, BF16, 0, n, out);
    else
        widen(bits, F16, 0, n, out);
}

/* A tile of base and merge against more = value - w: error = (y - w) - more, which elements differ, and counts:
 * unequal, merged == base, expected == base. */
INLINE void compare(const float *w, const float *y, const float *more, const int kind, int64_t n, float *error,
                    uint32_t *differs, int64_t *counts) {
    uint32_t unequal = 0, same = 0, ideal = 0;
    for (int64_t i = 0; i < n; i++) {
        float value = w[i] + more[i];
        uint32_t kept = bits_of(round_to(w[i], kind)), other = differs_from(y[i], value, kind);
        error[i] = (y[i] - w[i]) - more[i];
        differs[i] = other;
        unequal += other;
        same += kept == bits_of(y[i]);
        ideal += kept == bits_of(round_to(value, kind));
    }
    counts[0] += unequal, counts[1] += same, counts[2] += ideal;
}

INLINE void compare_as(int kind, const float *w, const float *y, const float *more, int64_t n, float *error,
                       uint32_t *differs, int64_t *counts) {
    if (kind == BF16)
        compare(w, y, more, BF16, n, error, differs, counts);
    else if (kind == F16)
        compare(w, y, more, F16, n, error, differs, counts);
    else
        compare(w, y, more, F32, n, error, differs, counts);
}

/* For measure.py: the value is w + delta; the error and which elements differ are wanted of all of them. */
EXPORT EVERY_PROCESSOR void medverify_linear(const void *base, int32_t base_kind, const void *merged,
                                             int32_t merged_kind, const float *delta, int64_t n, float *error,
                                             uint8_t *differs, int64_t *counts) {
    float w[TILE], y[TILE];
    uint32_t other[TILE];
    for (int64_t first = 0; first < n; first += TILE) {
        int64_t count = n - first < TILE ? n - first : TILE;
        widen(base, base_kind, first, count, w);
        widen(merged, merged_kind, first, count, y);
        compare_as(merged_kind, w, y, delta + first, count, error + first, other, counts);
        for (int64_t i = 0; i < count; i++) differs[first + i] = (uint8_t)other[i];
    }
}

/* more = less w + sum of a[k] d_k, of those elements that `kept` (one mask for each, or null) says. */
INLINE void add_up(const float *w, const float *const *d, const uint8_t *const *kept, int64_t entries, int64_t first,
                   int64_t n, float less, const float *a, float *more) {
    for (int64_t i = 0; i < n; i++) more[i] = less * w[i];
    for (int64_t k = 0; k < entries; k++) {
        const float *x = d[k];
        float by = a[k];
        if (kept) {
            const uint8_t *mask = kept[k] + first;
            for (int64_t i = 0; i < n; i++) more[i] += number_of(bits_of(by * x[i]) & -(uint32_t)mask[i]);
        } else {
            for (int64_t i = 0; i < n; i++) more[i] += by * x[i];
        }
    }
}

/* more = lam * sum of the agreeing a[k] d_k (divided by the sum of their own[k]); d_k counts where
 * |d_k| >= limits[k], and where kept says so. */
INLINE void elect(const float *const *d, const uint8_t *const *kept, int64_t entries, int64_t first, int64_t n,
                  const float *a, const float *own, const float *limits, int normalize, float lam, float *more) {
    float part[MOST][TILE], sum[TILE], total[TILE], divisor[TILE];
    memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < entries; k++) {
        const float *x = d[k];
        float by = a[k], limit = limits[k];
        for (int64_t i = 0; i < n; i++) {
            uint32_t stays = -(uint32_t)(number_of(bits_of(x[i]) & 0x7FFFFFFF) >= limit);
            part[k][i] = number_of(bits_of(by * x[i]) & stays);
        }
        if (kept) {
            const uint8_t *mask = kept[k] + first;
            for (int64_t i = 0; i < n; i++) part[k][i] = number_of(bits_of(part[k][i]) & -(uint32_t)mask[i]);
        }
        for (int64_t i = 0; i < n; i++) sum[i] += part[k][i];
    }
    memset(total, 0, sizeof total);
    memset(divisor, 0, sizeof divisor);
    for (int64_t k = 0; k < entries; k++) {
        const float *x = part[k];
        float weight = own[k];
        for (int64_t i = 0; i < n; i++) {
            uint32_t up = sum[i] >= 0, agrees = -((up & (x[i] > 0)) | (~up & 1 & (x[i] < 0)));
            total[i] += number_of(bits_of(x[i]) & agrees);
            divisor[i] += number_of(bits_of(weight) & agrees);
        }
    }
    if (normalize) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t none = -(uint32_t)(number_of(bits_of(divisor[i]) & 0x7FFFFFFF) < 1e-8f);
            divisor[i] = number_of((bits_of(divisor[i]) & ~none) | (bits_of(1.0f) & none));
        }
        for (int64_t i = 0; i < n; i++) total[i] /= divisor[i];
    }
    for (int64_t i = 0; i < n; i++) more[i] = lam * total[i];
}

/* One block of a tensor against what was asked of it (comparison.py): `limits` null adds up, else elects.
 * Returns how many elements differ; their positions go to `where`, their errors to `errors`.
 * sums: E.E, and where `linear` E.d_k (entries) and d_k.d_m (entries x entries, m <= k). */
EXPORT EVERY_PROCESSOR int64_t medverify_compare(const void *base, int32_t base_kind, const void *merged,
                                                 int32_t merged_kind, const void *const *from, const int32_t *kinds,
                                                 const uint8_t *const *kept, int64_t entries, int64_t n, float less,
                                                 const float *a, const float *own, const float *limits,
                                                 int32_t normalize, float lam, int32_t linear, double *sums,
                                                 int64_t *counts, int32_t *where, float *errors) {
    float w[TILE], y[TILE], room[MOST][TILE], more[TILE], error[TILE];
    uint32_t differs[TILE];
    const float *d[MOST];
    int64_t found = 0;
    for (int64_t first = 0; first < n; first += TILE) {
        int64_t count = n - first < TILE ? n - first : TILE, before = counts[0];
        widen(base, base_kind, first, count, w);
        widen(merged, merged_kind, first, count, y);
        for (int64_t k = 0; k < entries; k++) d[k] = delta_of(from[k], kinds[k], first, count, w, room[k]);
        if (limits)
            elect(d, kept, entries, first, count, a, own, limits, normalize, lam, more);
        else
            add_up(w, d, kept, entries, first, count, less, a, more);
        compare_as(merged_kind, w, y, more, count, error, differs, counts);
        sums[0] += dot(error, error, count);
        for (int64_t k = 0; linear && k < entries; k++) {
            sums[1 + k] += dot(error, d[k], count);
            for (int64_t m = 0; m <= k; m++) sums[1 + entries + k * entries + m] += dot(d[k], d[m], count);
        }
        for (int64_t i = 0; counts[0] > before && i < count; i++)
            if (differs[i]) where[found] = (int32_t)(first + i), errors[found++] = error[i];
    }
    return found;
}

/* counts (entries x 32768): how many |d_k| have each value of their upper 16 bits. Four tables, so that equal
 * neighbours do not wait for each other. */
EXPORT EVERY_PROCESSOR void medverify_sizes(const void *base, int32_t base_kind, const void *const *from,
                                            const int32_t *kinds, int64_t entries, int64_t n, int64_t *counts,
                                            uint32_t *scratch) {
    float w[TILE], room[TILE];
    uint16_t upper[TILE];
    for (int64_t k = 0; k < entries; k++) {
        memset(scratch, 0, 4 * 32768 * sizeof(uint32_t));
        for (int64_t first = 0; first < n; first += TILE) {
            int64_t count = n - first < TILE ? n - first : TILE, i = 0;
            widen(base, base_kind, first, count, w);
            const float *d = delta_of(from[k], kinds[k], first, count, w, room);
            for (int64_t j = 0; j < count; j++) upper[j] = (uint16_t)((bits_of(d[j]) & 0x7FFFFFFF) >> 16);
            for (; i + 4 <= count; i += 4)
                for (int table = 0; table < 4; table++) scratch[table * 32768 + upper[i + table]]++;
            for (; i < count; i++) scratch[upper[i]]++;
        }
        for (int table = 0; table < 4; table++)
            for (int j = 0; j < 32768; j++) counts[k * 32768 + j] += scratch[table * 32768 + j];
    }
}

/* counts (entries x 65536): the lower 16 bits of those |d_k| whose upper 16 are upper[k] (-1: none of them). */
EXPORT EVERY_PROCESSOR void medverify_sizes_within(const void *base, int32_t base_kind, const void *const *from,
                                                   const int32_t *kinds, int64_t entries, int64_t n,
                                                   const int32_t *upper, int64_t *counts) {
    float w[TILE], room[TILE];
    for (int64_t first = 0; first < n; first += TILE) {
        int64_t count = n - first < TILE ? n - first : TILE;
        widen(base, base_kind, first, count, w);
        for (int64_t k = 0; k < entries; k++) {
            if (upper[k] < 0) continue;
            const float *d = delta_of(from[k], kinds[k], first, count, w, room);
            int64_t *own = counts + k * 65536;
            uint32_t wanted = (uint32_t)upper[k];
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) {
                uint32_t any = 0;
                for (int j = 0; j < LANES; j++) any |= (bits_of(d[i + j]) & 0x7FFFFFFF) >> 16 == wanted;
                if (!any) continue;
                for (int j = 0; j < LANES; j++) {
                    uint32_t size = bits_of(d[i + j]) & 0x7FFFFFFF;
                    if (size >> 16 == wanted) own[size & 0xFFFF]++;
                }
            }
            for (; i < count; i++) {
                uint32_t size = bits_of(d[i]) & 0x7FFFFFFF;
                if (size >> 16 == wanted) own[size & 0xFFFF]++;
            }
        }
    }
}

/* P.Q, P.P and Q.Q of P = w + a[0] d_1 and Q = w + a[1] d_2, float64. */
EXPORT EVERY_PROCESSOR void medverify_dots(const void *base, int32_t base_kind, const void *const *from,
                                           const int32_t *kinds, const float *a, int64_t n, double *sums) {
    float w[TILE], p[TILE], q[TILE];
    double pq[8] = {0}, pp[8] = {0}, qq[8] = {0};
    for (int64_t first = 0; first < n; first += TILE) {
        int64_t count = n - first < TILE ? n - first : TILE, i = 0;
        widen(base, base_kind, first, count, w);
        const float *x = delta_of(from[0], kinds[0], first, count, w, p);
        for (int64_t j = 0; j < count; j++) p[j] = w[j] + a[0] * x[j];
        x = delta_of(from[1], kinds[1], first, count, w, q);
        for (int64_t j = 0; j < count; j++) q[j] = w[j] + a[1] * x[j];
        for (; i + 8 <= count; i += 8)
            for (int k = 0; k < 8; k++) {
                double one = p[i + k], two = q[i + k];
                pq[k] += one * two, pp[k] += one * one, qq[k] += two * two;
            }
        for (; i < count; i++)
            pq[0] += (double)p[i] * q[i], pp[0] += (double)p[i] * p[i], qq[0] += (double)q[i] * q[i];
    }
    for (int k = 0; k < 8; k++) sums[0] += pq[k], sums[1] += pp[k], sums[2] += qq[k];
}

/* kept[i] = draw(start + i) < limit, the draws of numpy's Philox4x64-10 as draws.py says; start a multiple of 8. */
EXPORT void medverify_kept(uint64_t key0, uint64_t key1, uint64_t start, int64_t n, uint32_t limit, uint8_t *kept) {
#if defined(__SIZEOF_INT128__)
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t c0 = start / 8 + (uint64_t)i / 8 + 1, c1 = 0, c2 = 0, c3 = 0, k0 = key0, k1 = key1;
        for (int round = 0; round < 10; round++) {
            unsigned __int128 one = (unsigned __int128)0xD2E7470EE14C6C93u * c0;
            unsigned __int128 two = (unsigned __int128)0xCA5A826395121157u * c2;
            uint64_t n0 = (uint64_t)(two >> 64) ^ c1 ^ k0, n2 = (uint64_t)(one >> 64) ^ c3 ^ k1;
            c1 = (uint64_t)two, c3 = (uint64_t)one, c0 = n0, c2 = n2;
            k0 += 0x9E3779B97F4A7C15u, k1 += 0xBB67AE8584CAA73Bu;
        }
        uint64_t words[4] = {c0, c1, c2, c3};
        for (int j = 0; j < 8 && i + j < n; j++)
            kept[i + j] = (uint32_t)(words[j / 2] >> (32 * (j & 1))) < limit;
    }
#else
    (void)key0, (void)key1, (void)start, (void)n, (void)limit, (void)kept;
#endif
}
