/* The loops the compiler turns into vector instructions; kernel.c includes this once for each set of them. */

static inline TARGET float NAME(from_bf16)(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Exact for every half, subnormal ones too: scaled by 2^112, whose exponent puts them where float32 wants them. */
static inline TARGET float NAME(from_f16)(uint16_t bits) {
    uint32_t wide = (uint32_t)(bits & 0x7FFF) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    memcpy(&value, &wide, 4);
    value *= 5.192296858534828e33f; /* 2^112 */
    memcpy(&wide, &value, 4);
    wide = (bits & 0x7C00) == 0x7C00 ? (wide | 0x7F800000u) : wide;
    wide |= sign;
    memcpy(&value, &wide, 4);
    return value;
}

/* To the nearest, ties to even; finite values only (the caller looks at the largest magnitude). */
static inline TARGET uint16_t NAME(to_bf16)(uint32_t bits) {
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/* To the nearest, ties to even, by adding a number whose last place is the half's (Giesen's method). */
static inline TARGET uint16_t NAME(to_f16)(uint32_t bits) {
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
    float value, magic = 0.5f; /* subnormal halves: 0.5 has the unit in the last place 2^-24 */
    memcpy(&value, &magnitude, 4);
    value += magic;
    uint32_t small, half;
    memcpy(&small, &value, 4);
    memcpy(&half, &magic, 4);
    small -= half;
    uint32_t result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x477FF000u ? 0x7C00u : result; /* 65520 and more round to infinity */
    return (uint16_t)(result | sign);
}

static inline TARGET __attribute__((always_inline)) float NAME(load)(const void *x, int type, int64_t i) {
    return type == BF16  ? NAME(from_bf16)(((const uint16_t *)x)[i])
           : type == F16 ? NAME(from_f16)(((const uint16_t *)x)[i])
                         : ((const float *)x)[i];
}

/* Run a loop with the type known to the compiler, so that it makes one tight loop for each. */
#define FOR_TYPE(type, loop)            \
    if ((type) == BF16) { loop(BF16); } \
    else if ((type) == F16) { loop(F16); } \
    else { loop(F32); }

typedef float NAME(vector) __attribute__((vector_size(32), aligned(4), may_alias));

/* `count` rows (at most 6) of one tile of 16 columns: 12 accumulators stay in registers. */
static inline TARGET __attribute__((always_inline)) void NAME(tile)(const float *left, const float *packed,
                                                                     int64_t ranks, int count, float *out,
                                                                     int64_t stride, int64_t columns) {
    NAME(vector) sums[TILE_ROWS][2];
    memset(sums, 0, sizeof sums);
    for (int64_t r = 0; r < ranks; r++) {
        const NAME(vector) one = *(const NAME(vector) *)(packed + r * TILE_COLUMNS);
        const NAME(vector) two = *(const NAME(vector) *)(packed + r * TILE_COLUMNS + 8);
#pragma GCC unroll 6
        for (int i = 0; i < count; i++) {
            float value = left[i * ranks + r];
            sums[i][0] += value * one;
            sums[i][1] += value * two;
        }
    }
    for (int i = 0; i < count; i++) {
        if (columns >= TILE_COLUMNS)
            memcpy(out + i * stride, sums[i], sizeof sums[i]);
        else
            memcpy(out + i * stride, sums[i], (size_t)columns * sizeof(float));
    }
}

/* out (rows, columns) with `stride` floats from row to row; `packed` begins at the first of these columns. */
static inline TARGET void NAME(panel)(const float *left, const float *packed, int64_t ranks, int64_t rows,
                                      int64_t columns, float *out, int64_t stride) {
    for (int64_t row = 0; row < rows; row += TILE_ROWS)
        for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
            const float *l = left + row * ranks, *p = packed + column * ranks;
            float *o = out + row * stride + column;
            int64_t left_over = columns - column;
            if (rows - row >= TILE_ROWS)
                NAME(tile)(l, p, ranks, TILE_ROWS, o, stride, left_over);
            else
                NAME(tile)(l, p, ranks, (int)(rows - row), o, stride, left_over);
        }
}

/* Panel by panel, so that the right factor's panel stays in the cache for all rows. */
static TARGET void NAME(low_rank)(const float *left, const float *packed, int64_t ranks, int64_t rows,
                                  int64_t columns, float *out) {
    for (int64_t from = 0; from < columns; from += PANEL) {
        int64_t width = columns - from < PANEL ? columns - from : PANEL;
        NAME(panel)(left, packed + from * ranks, ranks, rows, width, out + from, columns);
    }
}

/* values = c * base + values (+ extra), rounded into out; returns the largest magnitude's bits. */
static inline TARGET __attribute__((always_inline)) uint32_t NAME(finish)(const void *base, int base_type, float c,
                                                                           const float *extra, const float *values,
                                                                           int64_t n, void *out, int out_type) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = c * NAME(load)(base, base_type, i);
        if (values) v += values[i];
        if (extra) v += extra[i];
        uint32_t bits;
        memcpy(&bits, &v, 4);
        uint32_t magnitude = bits & 0x7FFFFFFFu;
        most = magnitude > most ? magnitude : most;
        if (out_type == BF16)
            ((uint16_t *)out)[i] = NAME(to_bf16)(bits);
        else if (out_type == F16)
            ((uint16_t *)out)[i] = NAME(to_f16)(bits);
        else
            ((float *)out)[i] = v;
    }
    return most;
}

/* One stretch of a row, with every type and combination made a loop of its own. */
static TARGET uint32_t NAME(stretch)(const void *base, int base_type, float c, const float *extra,
                                     const float *values, int64_t n, void *out, int out_type) {
#define BOTH(b, o)                                                                                     \
    if (base_type == b && out_type == o)                                                               \
        return values && !extra   ? NAME(finish)(base, b, c, NULL, values, n, out, o)                  \
               : extra && !values ? NAME(finish)(base, b, c, extra, NULL, n, out, o)                   \
               : extra            ? NAME(finish)(base, b, c, extra, values, n, out, o)                 \
                                  : NAME(finish)(base, b, c, NULL, NULL, n, out, o);
    BOTH(BF16, BF16) BOTH(BF16, F16) BOTH(BF16, F32)
    BOTH(F16, BF16) BOTH(F16, F16) BOTH(F16, F32)
    BOTH(F32, BF16) BOTH(F32, F16) BOTH(F32, F32)
#undef BOTH
    return 0x7FC00000u; /* no such type */
}

static TARGET uint32_t NAME(linear)(const void *base, int32_t base_type, float c, const float *extra,
                                    const float *left, const float *packed, int64_t ranks, int64_t rows,
                                    int64_t columns, float *scratch, void *out, int32_t out_type) {
    int64_t base_size = base_type == F32 ? 4 : 2, out_size = out_type == F32 ? 4 : 2;
    if (!ranks) return NAME(stretch)(base, base_type, c, extra, NULL, rows * columns, out, out_type);
    uint32_t most = 0;
    for (int64_t from = 0; from < columns; from += PANEL) {
        int64_t width = columns - from < PANEL ? columns - from : PANEL;
        for (int64_t row = 0; row < rows; row += TILE_ROWS) {
            int64_t count = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;
            NAME(panel)(left + row * ranks, packed + from * ranks, ranks, count, width, scratch, PANEL);
            for (int64_t i = 0; i < count; i++) {
                int64_t at = (row + i) * columns + from;
                uint32_t here = NAME(stretch)((const char *)base + at * base_size, base_type, c,
                                              extra ? extra + at : NULL, scratch + i * PANEL, width,
                                              (char *)out + at * out_size, out_type);
                most = here > most ? here : most;
            }
        }
    }
    return most;
}

static TARGET void NAME(scaled)(const void *x, int32_t type, float c, int32_t add, int64_t n, float *sum) {
#define LOOP(T) \
    if (add) for (int64_t i = 0; i < n; i++) sum[i] += c * NAME(load)(x, T, i); \
    else for (int64_t i = 0; i < n; i++) sum[i] = c * NAME(load)(x, T, i);
    FOR_TYPE(type, LOOP)
#undef LOOP
}

static TARGET void NAME(difference)(const void *x, int32_t x_type, const void *w, int32_t w_type, int64_t n,
                                    float *out) {
#define LOOP(T) for (int64_t i = 0; i < n; i++) out[i] = NAME(load)(x, T, i) - out[i];
#define FIRST(T) for (int64_t i = 0; i < n; i++) out[i] = NAME(load)(w, T, i);
    if (x_type == BF16 && w_type == BF16) {
        for (int64_t i = 0; i < n; i++) out[i] = NAME(load)(x, BF16, i) - NAME(load)(w, BF16, i);
        return;
    }
    FOR_TYPE(w_type, FIRST)
    FOR_TYPE(x_type, LOOP)
#undef LOOP
#undef FIRST
}

static TARGET uint32_t NAME(largest)(const void *x, int32_t type, int64_t n) {
    uint32_t most = 0;
    if (type == F32) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude = ((const uint32_t *)x)[i] & 0x7FFFFFFFu;
            most = magnitude > most ? magnitude : most;
        }
        return most;
    }
    uint16_t half = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t magnitude = ((const uint16_t *)x)[i] & 0x7FFFu;
        half = magnitude > half ? magnitude : half;
    }
    float value = type == BF16 ? NAME(from_bf16)(half) : NAME(from_f16)(half);
    memcpy(&most, &value, 4);
    return most;
}

/* Eight float64 sums side by side, added at the end in a fixed order: the same on every machine. */
static TARGET void NAME(dots)(const float *p, const float *q, int64_t n, double *sums) {
    double pp[8] = {0}, qq[8] = {0}, pq[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) {
            double a = p[i + j], b = q[i + j];
            pp[j] += a * a;
            qq[j] += b * b;
            pq[j] += a * b;
        }
    for (int j = 0; i + j < n; j++) {
        double a = p[i + j], b = q[i + j];
        pp[j] += a * a;
        qq[j] += b * b;
        pq[j] += a * b;
    }
    for (int j = 0; j < 8; j++) {
        sums[0] += pp[j];
        sums[1] += qq[j];
        sums[2] += pq[j];
    }
}

static TARGET void NAME(trim)(float *d, int64_t n, float threshold) {
    for (int64_t i = 0; i < n; i++) {
        float size = d[i] < 0 ? -d[i] : d[i];
        d[i] = size >= threshold ? d[i] : 0.0f;
    }
}

static TARGET void NAME(keep)(float *d, const uint32_t *draws, int64_t n, uint64_t keep_below, float scale) {
    if (keep_below > 0xFFFFFFFFull) { /* density 1 keeps all */
        for (int64_t i = 0; i < n; i++) d[i] *= scale;
        return;
    }
    uint32_t below = (uint32_t)keep_below;
    for (int64_t i = 0; i < n; i++) d[i] = draws[i] < below ? d[i] * scale : 0.0f;
}

static TARGET void NAME(elect)(const float *d, const float *weights, int64_t entries, int64_t n, int32_t normalize,
                               float lambda, float *out) {
    enum { CHUNK = 1024 };
    float sign[CHUNK], sum[CHUNK], divisor[CHUNK];
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t count = n - at < CHUNK ? n - at : CHUNK;
        memset(sign, 0, sizeof sign);
        memset(sum, 0, sizeof sum);
        memset(divisor, 0, sizeof divisor);
        for (int64_t k = 0; k < entries; k++) {
            const float w = weights[k], *x = d + k * n + at;
            for (int64_t i = 0; i < count; i++) sign[i] += w * x[i];
        }
        for (int64_t i = 0; i < count; i++) sign[i] = sign[i] >= 0 ? 1.0f : -1.0f;
        for (int64_t k = 0; k < entries; k++) {
            const float w = weights[k], *x = d + k * n + at;
            for (int64_t i = 0; i < count; i++) {
                float v = w * x[i] * sign[i]; /* positive where it agrees */
                float agrees = v > 0 ? 1.0f : 0.0f;
                sum[i] += agrees * v;
                divisor[i] += agrees * w;
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float size = divisor[i] < 0 ? -divisor[i] : divisor[i];
            float by = normalize && size >= 1e-8f ? divisor[i] : 1.0f;
            out[at + i] = lambda * (sign[i] * sum[i] / by);
        }
    }
}
