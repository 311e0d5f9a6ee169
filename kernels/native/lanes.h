/* The arithmetic of the matching, a vector of LANES floats at a time.

   Included once for each instruction set: NAMED(x) names what is in it, TARGET is what its functions may use. Nothing
   depends on where a row stands or on its neighbours: equal rows give equal bits, and so equal energies. */

#define VECTOR NAMED(vector)
#define WHOLE NAMED(whole)
#define HELPER static inline TARGET __attribute__((always_inline))

typedef float VECTOR __attribute__((vector_size(4 * LANES)));
typedef int32_t WHOLE __attribute__((vector_size(4 * LANES)));

HELPER VECTOR NAMED(load)(const float *from) {
    VECTOR x;
    memcpy(&x, from, sizeof x);
    return x;
}

HELPER void NAMED(store)(float *to, VECTOR x) { memcpy(to, &x, sizeof x); }

HELPER VECTOR NAMED(all)(float number) { return (VECTOR){0} + number; }

HELPER VECTOR NAMED(choose)(WHOLE mask, VECTOR yes, VECTOR no) {
    return (VECTOR)((mask & (WHOLE)yes) | (~mask & (WHOLE)no));
}

HELPER VECTOR NAMED(smaller)(VECTOR x, VECTOR y) { return NAMED(choose)(x < y, x, y); }

HELPER VECTOR NAMED(larger)(VECTOR x, VECTOR y) { return NAMED(choose)(x > y, x, y); }

HELPER float NAMED(total)(VECTOR x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* 2^x for -120 < x <= 0: 2^whole times the series of 2^part, |part| <= 1/2, which ends below float's precision. */
HELPER VECTOR NAMED(exp2)(VECTOR x) {
    WHOLE whole = __builtin_convertvector(x - 0.5f, WHOLE);
    VECTOR part = x - __builtin_convertvector(whole, VECTOR);
    VECTOR y = part * 1.5252734e-5f + 1.5403530e-4f;
    y = y * part + 1.3333558e-3f;
    y = y * part + 9.6181291e-3f;
    y = y * part + 5.5504109e-2f;
    y = y * part + 2.4022651e-1f;
    y = y * part + 6.9314718e-1f;
    y = y * part + 1.0f;
    return y * (VECTOR)((whole + 127) << 23);
}

/* Rows x [n, d], `step` floats apart, divided by their lengths: out [n, d]. */
static TARGET void NAMED(unit_rows)(const float *x, int64_t n, int64_t d, int64_t step, float *out) {
    for (int64_t i = 0; i < n; i++, x += step, out += d) {
        VECTOR squares = {0};
        float rest = 0;
        int64_t k = 0;
        for (; k + LANES <= d; k += LANES) squares += NAMED(load)(x + k) * NAMED(load)(x + k);
        for (; k < d; k++) rest += x[k] * x[k];
        float length = sqrtf(NAMED(total)(squares) + rest);
        length = length < 1e-12f ? 1e-12f : length;
        for (k = 0; k < d; k++) out[k] = x[k] / length;
    }
}

/* The rows `at` of x [., d] as columns, for `products`: panels of two vectors, then one of one where that suffices;
   zeros behind the last row. */
static TARGET void NAMED(panels)(const float *x, int64_t d, struct rows at, float *out) {
    int64_t width = round_up(at.n, LANES);
    for (int64_t j = 0; j < width;) {
        int64_t columns = j + 2 * LANES <= width ? 2 * LANES : LANES;
        for (int64_t c = 0; c < columns; c++, j++) {
            const float *row = j < at.n ? x + row_of(at, j) * d : NULL;
            for (int64_t k = 0; k < d; k++) out[k * columns + c] = row ? row[k] : 0;
        }
        out += d * columns;
    }
}

/* TOGETHER rows [d] times the `width` columns in panels: out [TOGETHER, width]. */
HELPER void NAMED(products)(const float *const *row, const float *panels, int64_t d, int64_t width, float *out) {
    int64_t j = 0;
    for (; j + 2 * LANES <= width; j += 2 * LANES, panels += 2 * LANES * d) {
        VECTOR left[TOGETHER] = {{0}}, right[TOGETHER] = {{0}};
        for (int64_t k = 0; k < d; k++) {
            VECTOR p = NAMED(load)(panels + 2 * LANES * k), q = NAMED(load)(panels + 2 * LANES * k + LANES);
            for (int i = 0; i < TOGETHER; i++) {
                left[i] += row[i][k] * p;
                right[i] += row[i][k] * q;
            }
        }
        for (int i = 0; i < TOGETHER; i++) {
            NAMED(store)(out + i * width + j, left[i]);
            NAMED(store)(out + i * width + j + LANES, right[i]);
        }
    }
    if (j < width) {
        VECTOR left[TOGETHER] = {{0}};
        for (int64_t k = 0; k < d; k++)
            for (int i = 0; i < TOGETHER; i++) left[i] += row[i][k] * NAMED(load)(panels + LANES * k);
        for (int i = 0; i < TOGETHER; i++) NAMED(store)(out + i * width + j, left[i]);
    }
}

/* Energies [n] of unit rows x [n, d], as `vtoken.ops.merging.matching._energies` has them: the sum over all rows of
   max(z, 0), and `weight` times that of 2^min(z, 0), with z = log2(e) (cos - margin). */
static TARGET void NAMED(energies)(const float *x, int64_t n, int64_t d, float margin, float weight, const float *panels,
                                   float *similar, float *out) {
    const float log2e = 1.44269504f, top = 1.0f - 8 * 1.1920929e-7f; /* 1 but for rounding */
    const float highest = (top - margin) * log2e;
    const VECTOR most_above = NAMED(all)(highest > 0 ? highest : 0), most_below = NAMED(all)(highest < 0 ? highest : 0);
    int64_t width = round_up(n, LANES);
    WHOLE real; /* lanes of the last vector that are columns */
    for (int lane = 0; lane < LANES; lane++) real[lane] = width - LANES + lane < n ? -1 : 0;
    for (int64_t i = 0; i < n; i += TOGETHER) {
        const float *row[TOGETHER];
        for (int64_t p = 0; p < TOGETHER; p++) row[p] = x + (i + p < n ? i + p : i) * d;
        NAMED(products)(row, panels, d, width, similar);
        for (int64_t p = 0; p < TOGETHER && i + p < n; p++) {
            VECTOR above = {0}, below = {0};
            for (int64_t j = 0; j < width; j += LANES) {
                VECTOR z = (NAMED(load)(similar + p * width + j) - margin) * log2e;
                VECTOR over = NAMED(larger)(NAMED(smaller)(z, most_above), NAMED(all)(0));
                VECTOR under = NAMED(exp2)(NAMED(smaller)(z, most_below));
                if (j + LANES > n) {
                    over = (VECTOR)((WHOLE)over & real);
                    under = (VECTOR)((WHOLE)under & real);
                }
                above += over;
                below += under;
            }
            out[i + p] = NAMED(total)(above) + weight * NAMED(total)(below);
        }
    }
}

/* The most similar of n columns for each of the rows `at` of x [., d]: how similar, and which, the first of equals. */
static TARGET void NAMED(nearest)(const float *x, int64_t d, struct rows at, const float *panels, int64_t n,
                                  float *similar, float *value, int32_t *best) {
    int64_t width = round_up(n, LANES);
    for (int64_t i = 0; i < at.n; i += TOGETHER) {
        const float *row[TOGETHER];
        for (int64_t p = 0; p < TOGETHER; p++) row[p] = x + row_of(at, i + p < at.n ? i + p : i) * d;
        NAMED(products)(row, panels, d, width, similar);
        for (int64_t p = 0; p < TOGETHER && i + p < at.n; p++) {
            float *s = similar + p * width, highest = -2;
            for (int64_t j = n; j < width; j++) s[j] = -2;
            VECTOR high = NAMED(all)(-2);
            for (int64_t j = 0; j < width; j += LANES) high = NAMED(larger)(NAMED(load)(s + j), high);
            for (int lane = 0; lane < LANES; lane++) highest = high[lane] > highest ? high[lane] : highest;
            int32_t j = 0;
            while (j < n - 1 && s[j] != highest) j++;
            value[i + p] = highest;
            best[i + p] = j;
        }
    }
}

static const struct arithmetic NAMED(arithmetic) = {
    NAMED(unit_rows), NAMED(panels), NAMED(energies), NAMED(nearest),
};

#undef HELPER
#undef VECTOR
#undef WHOLE
#undef LANES
#undef NAMED
#undef TARGET
