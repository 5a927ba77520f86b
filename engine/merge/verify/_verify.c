/* The verifier's inner loops, apart from the merge's: engine/merge/verify/quick.py calls them by ctypes and holds the
 * same in numpy, which is what they are tested against. They only say which elements equal our own float32
 * result, and gather sums; what is unequal is judged in float64, in Python. bfloat16 alone: other dtypes take numpy.
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
#define CHUNK 512
#define MOST 8 /* entries of an election */

static inline float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t narrow(float value) { /* to nearest, ties to even; callers have no NaN to keep */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* Our value lies at least two units (2^-24 of it each) inside the bound e on either side, see quick.py: an element
 * that is a rounding of a value so near is right, too. */
static inline uint8_t differs_from(uint16_t found, float value, uint16_t expected) {
    float step = value * 0x1p-23f;
    return (found != expected) & (found != narrow(value - step)) & (found != narrow(value + step));
}

EXPORT int32_t medverify_version(void) { return 1; }

EXPORT EVERY_PROCESSOR void medverify_widen(const uint16_t *bits, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = widen(bits[i]);
}

/* out = x - w */
EXPORT EVERY_PROCESSOR void medverify_difference(const uint16_t *x, const float *w, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = widen(x[i]) - w[i];
}

/* counts: unequal elements, merged == base, expected == base. error = (y - w) - less w - delta; the value is
 * w + less w + delta. */
EXPORT EVERY_PROCESSOR void medverify_linear(const uint16_t *base, const uint16_t *merged, const float *delta,
                                             float less, int64_t n, float *error, uint8_t *differs,
                                             int64_t *counts) {
    int32_t unequal = 0, same = 0, ideal = 0;
    for (int64_t i = 0; i < n; i++) {
        float w = widen(base[i]), y = widen(merged[i]);
        float more = less * w + delta[i];
        uint16_t expected = narrow(w + more);
        uint8_t other = differs_from(merged[i], w + more, expected);
        error[i] = (y - w) - more;
        differs[i] = other;
        unequal += other;
        same += base[i] == merged[i];
        ideal += base[i] == expected;
    }
    counts[0] = unequal, counts[1] = same, counts[2] = ideal;
}

/* The same for a value computed elsewhere: error = y - value. */
EXPORT EVERY_PROCESSOR void medverify_compare(const uint16_t *base, const uint16_t *merged, const float *value,
                                              int64_t n, float *error, uint8_t *differs, int64_t *counts) {
    int32_t unequal = 0, same = 0, ideal = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t expected = narrow(value[i]);
        uint8_t other = differs_from(merged[i], value[i], expected);
        error[i] = widen(merged[i]) - value[i];
        differs[i] = other;
        unequal += other;
        same += base[i] == merged[i];
        ideal += base[i] == expected;
    }
    counts[0] = unequal, counts[1] = same, counts[2] = ideal;
}

/* out = share w + sum of a[k] d_k, of those elements that `kept` (one mask for each, or null) says. */
EXPORT EVERY_PROCESSOR void medverify_combine(const float *w, float share, const float *const *d, const float *a,
                                              const uint8_t *const *kept, int64_t entries, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = share * w[i];
    for (int64_t k = 0; k < entries; k++) {
        const float *x = d[k];
        float by = a[k];
        if (kept) {
            const uint8_t *mask = kept[k];
            for (int64_t i = 0; i < n; i++) out[i] += mask[i] ? by * x[i] : 0;
        } else {
            for (int64_t i = 0; i < n; i++) out[i] += by * x[i];
        }
    }
}

/* Sign election: out = w + lam * sum of agreeing weights[k] d_k (divided by the sum of their own[k]).
 * d_k counts where |d_k| >= limits[k], and where kept (entries * n, or null) says so. */
EXPORT EVERY_PROCESSOR void medverify_elect(const float *const *d, int64_t entries, int64_t n, const float *base,
                                            const float *weights, const float *own, const float *limits,
                                            const uint8_t *const *kept, int32_t normalize, float lam, float *out) {
    float part[MOST][CHUNK], sum[CHUNK], total[CHUNK], divisor[CHUNK];
    for (int64_t first = 0; first < n; first += CHUNK) {
        int64_t count = n - first < CHUNK ? n - first : CHUNK;
        for (int64_t i = 0; i < count; i++) sum[i] = total[i] = divisor[i] = 0;
        for (int64_t k = 0; k < entries; k++) {
            const float *x = d[k] + first;
            float weight = weights[k], limit = limits[k];
            for (int64_t i = 0; i < count; i++) {
                float size = x[i] < 0 ? -x[i] : x[i];
                part[k][i] = size >= limit ? weight * x[i] : 0;
            }
            if (kept) {
                const uint8_t *mask = kept[k] + first;
                for (int64_t i = 0; i < count; i++) part[k][i] = mask[i] ? part[k][i] : 0;
            }
            for (int64_t i = 0; i < count; i++) sum[i] += part[k][i];
        }
        for (int64_t k = 0; k < entries; k++) {
            float weight = own[k];
            for (int64_t i = 0; i < count; i++) {
                float signed_part = sum[i] >= 0 ? part[k][i] : -part[k][i];
                total[i] += signed_part > 0 ? part[k][i] : 0;
                divisor[i] += signed_part > 0 ? weight : 0;
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float size = divisor[i] < 0 ? -divisor[i] : divisor[i];
            float by = normalize && !(size < 1e-8f) ? divisor[i] : 1;
            out[first + i] = base[first + i] + lam * (total[i] / by);
        }
    }
}

/* counts (32768): how many |d| have each value of the upper 16 bits. Four tables, so that equal neighbours do not
 * wait for each other. */
EXPORT void medverify_sizes(const float *d, int64_t n, int64_t *counts, uint32_t *scratch) {
    const uint32_t *bits = (const uint32_t *)d;
    int64_t i = 0;
    memset(scratch, 0, 4 * 32768 * sizeof(uint32_t));
    for (; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; k++) scratch[k * 32768 + ((bits[i + k] & 0x7FFFFFFF) >> 16)]++;
    for (; i < n; i++) scratch[(bits[i] & 0x7FFFFFFF) >> 16]++;
    for (int k = 0; k < 4; k++)
        for (int j = 0; j < 32768; j++) counts[j] += scratch[k * 32768 + j];
}

/* counts (65536): the lower 16 bits of those |d| whose upper 16 are `upper`. */
EXPORT void medverify_sizes_within(const float *d, int64_t n, uint32_t upper, int64_t *counts) {
    const uint32_t *bits = (const uint32_t *)d;
    for (int64_t i = 0; i < n; i++) {
        uint32_t size = bits[i] & 0x7FFFFFFF;
        if (size >> 16 == upper) counts[size & 0xFFFF]++;
    }
}

/* P.Q, P.P and Q.Q of P = w + a x and Q = w + b z, float64. */
EXPORT EVERY_PROCESSOR void medverify_dots(const float *w, const float *x, const float *z, float a, float b,
                                           int64_t n, double *sums) {
    double pq[8] = {0}, pp[8] = {0}, qq[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++) {
            float p = w[i + k] + a * x[i + k], q = w[i + k] + b * z[i + k];
            pq[k] += (double)p * q, pp[k] += (double)p * p, qq[k] += (double)q * q;
        }
    for (; i < n; i++) {
        float p = w[i] + a * x[i], q = w[i] + b * z[i];
        pq[0] += (double)p * q, pp[0] += (double)p * p, qq[0] += (double)q * q;
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
