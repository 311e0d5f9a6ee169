/* The merge step of float32 images on a CPU: the module `vtoken_kernels.native`.

   What `vtoken.ops` writes as some forty operators of torch, each of which finds the caches full of weights, is here
   four functions over plain memory. The plans are those of vtoken/ops/merging/matching.py, which is the reference, and
   the rows are the bits of vtoken/ops/merging/plan.py. vtoken/ops/merging/native.py calls this, and checks before. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Rows whose products are made at once, and the most floats of a vector. */
enum { TOGETHER = 6, WIDEST = 16 };

/* n rows: those numbered `number`, or first, first + step, ... */
struct rows {
    int64_t n;
    const int32_t *number;
    int64_t first, step;
};

static inline int64_t row_of(struct rows at, int64_t i) { return at.number ? at.number[i] : at.first + i * at.step; }

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* What lanes.h holds, in one instruction set. */
struct arithmetic {
    void (*unit_rows)(const float *, int64_t, int64_t, int64_t, float *);
    void (*panels)(const float *, int64_t, struct rows, float *);
    void (*energies)(const float *, int64_t, int64_t, float, float, const float *, float *, float *);
    void (*nearest)(const float *, int64_t, struct rows, const float *, int64_t, float *, float *, int32_t *);
};

#if defined(__x86_64__)
#define LANES 8
#define NAMED(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "lanes.h"

#define LANES 16
#define NAMED(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "lanes.h"
#endif

/* Chosen once, when the module is imported; none where torch's own products are faster than these would be. */
static const struct arithmetic *arithmetic;

static const char *choose_arithmetic(const char *most) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !strcmp(most, "none")) return "";
    if (strcmp(most, "avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        arithmetic = &arithmetic_avx512;
        return "avx512";
    }
    arithmetic = &arithmetic_avx2;
    return "avx2";
#else
    return "";
#endif
}

/* Memory for one image of n rows [d], carved up. */
struct work {
    float *unit, *panels, *similar, *value;
    uint32_t *key;
    int32_t *best, *order, *other, *src, *dest;
};

static int take_memory(struct work *w, int64_t n, int64_t d) {
    int64_t width = round_up(n, WIDEST);
    float *at = malloc(sizeof(float) * (n * d + width * d + TOGETHER * width + 7 * n));
    if (!at) return 0;
    w->unit = at;
    w->panels = w->unit + n * d;
    w->similar = w->panels + width * d;
    w->value = w->similar + TOGETHER * width;
    w->key = (uint32_t *)(w->value + n);
    w->best = (int32_t *)(w->key + n);
    w->order = w->best + n;
    w->other = w->order + n;
    w->src = w->other + n;
    w->dest = w->src + n;
    return 1;
}

/* w->order: the numbers of n values, the largest first, equals by number; a radix sort of their bits. None is NaN:
   `energies` takes that for the highest similarity, `nearest` for none. */
static void sort_by_value(struct work *w, int64_t n) {
    uint32_t count[4][256] = {{0}};
    for (int64_t i = 0; i < n; i++) {
        float value = w->value[i] + 0.0f; /* -0 is 0 */
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
        w->key[i] = bits;
        for (int digit = 0; digit < 4; digit++) count[digit][bits >> 8 * digit & 255]++;
    }
    for (int64_t i = 0; i < n; i++) w->order[i] = (int32_t)i;
    for (int digit = 0; digit < 4; digit++) {
        uint32_t place = 0;
        for (int i = 0; i < 256; i++) {
            uint32_t many = count[digit][i];
            count[digit][i] = place;
            place += many;
        }
        for (int64_t i = 0; i < n; i++) {
            int32_t row = w->order[i];
            w->other[count[digit][w->key[row] >> 8 * digit & 255]++] = row;
        }
        int32_t *swap = w->order;
        w->order = w->other;
        w->other = swap;
    }
}

/* A plan of one image: rows [T] are the prefix, the kept ones in order, the destinations and the sources, and slot [r]
   is the output row of every source. All else below counts the n = T - P rows behind the prefix. */
struct plan {
    int64_t num_tokens, num_prefix, r;
    int64_t *rows, *slot;
};

/* Lay a plan out; the rows marked in `left_out` [n] are not among the kept ones, `partner` counts in `dest`. */
static void lay_out(struct plan p, int64_t n, const uint32_t *left_out, const int32_t *src, const int32_t *partner,
                    struct rows dest) {
    int64_t *to = p.rows, num_out = p.num_tokens - p.r;
    for (int64_t i = 0; i < p.num_prefix; i++) *to++ = i;
    for (int64_t i = 0; i < n; i++)
        if (!left_out[i]) *to++ = p.num_prefix + i;
    for (int64_t i = 0; i < dest.n; i++) *to++ = p.num_prefix + row_of(dest, i);
    for (int64_t i = 0; i < p.r; i++) {
        *to++ = p.num_prefix + src[i];
        p.slot[i] = num_out - dest.n + partner[i];
    }
}

/* The r of the rows `from` whose nearest of the rows `into` is nearest merge with it; w->unit holds the n rows. */
static void best_pairs(struct work *w, struct plan p, int64_t n, int64_t d, struct rows from, struct rows into) {
    arithmetic->panels(w->unit, d, into, w->panels);
    arithmetic->nearest(w->unit, d, from, w->panels, into.n, w->similar, w->value, w->best);
    sort_by_value(w, from.n);
    uint32_t *left_out = w->key;
    int32_t *src = (int32_t *)w->value, *partner = w->other;
    for (int64_t i = 0; i < p.r; i++) {
        src[i] = (int32_t)row_of(from, w->order[i]);
        partner[i] = w->best[w->order[i]];
    }
    memset(left_out, 0, n * sizeof *left_out);
    for (int64_t i = 0; i < p.r; i++) left_out[src[i]] = 1;
    for (int64_t i = 0; i < into.n; i++) left_out[row_of(into, i)] = 1;
    lay_out(p, n, left_out, src, partner, into);
}

static void tome(struct work *w, struct plan p, const float *metric, int64_t d, int64_t step) {
    int64_t n = p.num_tokens - p.num_prefix, odd = p.num_prefix % 2;
    arithmetic->unit_rows(metric + p.num_prefix * step, n, d, step, w->unit);
    /* even and odd by their numbers in the image, so by the prefix, too */
    struct rows even = {(n + 1 - odd) / 2, NULL, odd, 2}, others = {(n + odd) / 2, NULL, 1 - odd, 2};
    best_pairs(w, p, n, d, even, others);
}

static void pitome(struct work *w, struct plan p, const float *metric, int64_t d, int64_t step, float margin,
                   float alpha, int pairs) {
    int64_t n = p.num_tokens - p.num_prefix;
    struct rows everything = {n, NULL, 0, 1};
    arithmetic->unit_rows(metric + p.num_prefix * step, n, d, step, w->unit);
    arithmetic->panels(w->unit, d, everything, w->panels);
    arithmetic->energies(w->unit, n, d, margin, alpha * 1.44269504f, w->panels, w->similar, w->value);
    sort_by_value(w, n);
    struct rows from = {pairs ? (n + 1) / 2 : p.r, w->src, 0, 0}, into = {pairs ? n / 2 : p.r, w->dest, 0, 0};
    for (int64_t i = 0; i < from.n; i++) w->src[i] = w->order[2 * i];
    for (int64_t i = 0; i < into.n; i++) w->dest[i] = w->order[2 * i + 1];
    if (pairs) {
        best_pairs(w, p, n, d, from, into);
        return;
    }
    arithmetic->panels(w->unit, d, into, w->panels);
    arithmetic->nearest(w->unit, d, from, w->panels, into.n, w->similar, w->value, w->best);
    memset(w->key, 0, n * sizeof *w->key);
    for (int64_t i = 0; i < p.r; i++) w->key[w->src[i]] = w->key[w->dest[i]] = 1;
    lay_out(p, n, w->key, w->src, w->best, into);
}

#if defined(__clang__)
#define UNFUSED
#define FUSE_NOTHING _Pragma("STDC FP_CONTRACT OFF")
#elif defined(__GNUC__)
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#define FUSE_NOTHING
#else
#define UNFUSED
#define FUSE_NOTHING
#endif

static int fits(struct plan p) {
    for (int64_t i = 0; i < p.num_tokens; i++)
        if (p.rows[i] < 0 || p.rows[i] >= p.num_tokens) return 0;
    for (int64_t i = 0; i < p.r; i++)
        if (p.slot[i] < 0 || p.slot[i] >= p.num_tokens - p.r) return 0;
    return 1;
}

/* Rows x [T, width], `step` floats apart, and sizes [T] (or none) by a plan: out [T - r, width] and new_size [T - r].
   As torch adds: an addition fused with its product, which compilers like where a processor has that, would round once
   less. */
static UNFUSED void merge(struct plan p, const float *x, int64_t width, int64_t step, const float *size, float *out,
                  float *new_size) {
    FUSE_NOTHING
    int64_t num_out = p.num_tokens - p.r;
    const int64_t *src = p.rows + num_out;
    for (int64_t i = 0; i < num_out; i++) {
        memcpy(out + i * width, x + p.rows[i] * step, width * sizeof *out);
        new_size[i] = size ? size[p.rows[i]] : 1;
    }
    for (int64_t i = 0; i < p.r; i++) new_size[p.slot[i]] += size ? size[src[i]] : 1;
    for (int64_t i = 0; i < p.r; i++) {
        float share = (size ? size[src[i]] : 1) / new_size[p.slot[i]];
        const float *from = x + src[i] * step, *into = x + p.rows[p.slot[i]] * step;
        float *to = out + p.slot[i] * width;
        for (int64_t k = 0; k < width; k++) {
            float change = (from[k] - into[k]) * share;
            to[k] += change;
        }
    }
}

/* Keys [H, T, width] added over H: out [T, width]. */
static void sum_heads(const float *keys, int64_t num_heads, int64_t num_tokens, int64_t width, int64_t head_step,
                      int64_t step, float *out) {
    for (int64_t i = 0; i < num_tokens; i++, out += width) {
        memcpy(out, keys + i * step, width * sizeof *out);
        for (int64_t h = 1; h < num_heads; h++)
            for (int64_t k = 0; k < width; k++) out[k] += keys[h * head_step + i * step + k];
    }
}

/* From here on Python: addresses and numbers as ints, images one after the other. */

static int take(PyObject *const *from, Py_ssize_t given, Py_ssize_t expected, int64_t *into) {
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "takes %zd numbers, got %zd", expected, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < given; i++) into[i] = PyLong_AsLongLong(from[i]);
    return !PyErr_Occurred();
}

#define AT(type, number) ((type *)(intptr_t)(number))

static PyObject *call_sum_heads(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t a[9];
    if (!take(args, given, 9, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t b = 0; b < a[1]; b++)
        sum_heads(AT(const float, a[0]) + b * a[5], a[2], a[3], a[4], a[6], a[7], AT(float, a[8]) + b * a[3] * a[4]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Plans of all images: from their addresses and numbers as in the list of functions below. */
static PyObject *match(const int64_t *a, int by_energy, float margin, float alpha, int pairs) {
    int64_t images = a[1], d = a[3], image_step = a[4], step = a[5];
    struct plan p = {a[2], a[6], a[7], AT(int64_t, a[8]), AT(int64_t, a[9])};
    struct work w;
    if (!arithmetic) return PyErr_Format(PyExc_RuntimeError, "this processor has no instructions for it");
    if (p.num_prefix < 0 || p.num_prefix > p.num_tokens || p.r < 0 || p.r > (p.num_tokens - p.num_prefix) / 2)
        return PyErr_Format(PyExc_ValueError, "more rows to merge than half of those behind the prefix");
    if (!take_memory(&w, p.num_tokens, d)) return PyErr_NoMemory();
    void *memory = w.unit;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t b = 0; b < images; b++, p.rows += p.num_tokens, p.slot += p.r) {
        const float *metric = AT(const float, a[0]) + b * image_step;
        if (by_energy) pitome(&w, p, metric, d, step, margin, alpha, pairs);
        else tome(&w, p, metric, d, step);
    }
    Py_END_ALLOW_THREADS
    free(memory);
    Py_RETURN_NONE;
}

static PyObject *call_tome(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t a[10];
    return take(args, given, 10, a) ? match(a, 0, 0, 0, 0) : NULL;
}

static PyObject *call_pitome(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t a[11];
    if (given != 13) return PyErr_Format(PyExc_TypeError, "takes 13 numbers, got %zd", given);
    if (!take(args, 11, 11, a)) return NULL;
    double margin = PyFloat_AsDouble(args[11]), alpha = PyFloat_AsDouble(args[12]);
    if (PyErr_Occurred()) return NULL;
    return match(a, 1, (float)margin, (float)alpha, (int)a[10]);
}

static PyObject *call_merge(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int64_t a[12];
    if (!take(args, given, 12, a)) return NULL;
    int64_t images = a[1], width = a[3], image_step = a[4], step = a[5];
    struct plan p = {a[2], 0, a[6], AT(int64_t, a[7]), AT(int64_t, a[8])};
    int64_t num_out = p.num_tokens - p.r;
    int good = 1;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t b = 0; good && b < images; b++, p.rows += p.num_tokens, p.slot += p.r) {
        const float *size = a[9] ? AT(const float, a[9]) + b * p.num_tokens : NULL;
        good = fits(p);
        if (good)
            merge(p, AT(const float, a[0]) + b * image_step, width, step, size, AT(float, a[10]) + b * num_out * width,
                  AT(float, a[11]) + b * num_out);
    }
    Py_END_ALLOW_THREADS
    if (!good) return PyErr_Format(PyExc_IndexError, "the plan names rows that are not there");
    Py_RETURN_NONE;
}

#define FUNCTION(name, arguments) {#name, (PyCFunction)(void (*)(void))call_##name, METH_FASTCALL, arguments}

/* Addresses are of float32, those of rows and slot of int64; a step is how many floats lie between two starts. */
static PyMethodDef functions[] = {
    FUNCTION(sum_heads, "keys, B, H, T, D, image step, head step, step, out [B, T, D]"),
    FUNCTION(tome, "metric, B, T, d, image step, step, P, r, rows [B, T], slot [B, r]"),
    FUNCTION(pitome, "as tome, then whether pairs, margin, alpha"),
    FUNCTION(merge, "x, B, T, C, image step, step, r, rows, slot, size [B, T] or 0, out [B, T - r, C], new size"),
    {NULL, NULL, 0, NULL},
};

static int start(PyObject *module) {
    const char *most = getenv("VTOKEN_TEST_NATIVE"); /* for tests: at most these instructions */
    return PyModule_AddStringConstant(module, "INSTRUCTIONS", choose_arithmetic(most ? most : ""));
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "native", "The merge step of float32 images on a CPU.", 0,
                                    functions, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_native(void) { return PyModuleDef_Init(&module); }
