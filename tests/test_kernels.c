// The conformance test of the kernels: every prototype of section 2.1 against plain loops in double, written here from
// the formulas. A port to other hardware is done when this passes on it.
//
// The kernels get memory from memory_take alone, filled and read by memory_copy_in and memory_copy_out. An array of a
// test exists twice: `device` is what kernels work on, `host` the same numbers in double, on which the test does the
// same by its own loops. expect() compares the two. Whatever a kernel adds to starts from random numbers, and whatever
// it overwrites starts from NaN, so that neither can be taken for the other. What is not compared must not have
// changed, nor the bytes around each array. Everything runs three times, with 1, 2 and 3 threads, and must give
// the same bits.

// ---- Arrays in both places ---------------------------------------------------------------------------------------

// Bytes before and behind each array that must stay as they are; none under a sanitizer, which sees more without them.
#if defined __has_feature
#if __has_feature(address_sanitizer)
#define TEST_SANITIZED
#endif
#endif
#if defined TEST_SANITIZED || defined __SANITIZE_ADDRESS__
enum { GUARD = 0, SANITIZED = 1 };
#else
enum { GUARD = 64, SANITIZED = 0 };
#endif

typedef struct {
    size_t n;
    Dtype dtype;
    void *device;           // where the n numbers begin, for kernels
    double *host;           // the same numbers, or what they should be after the kernel
    char *block, *start;    // what was taken from the device: the array and its guards; what was put there
    double least;           // errors are relative to the largest number wanted, and at least to this
    bool spent;             // it was compared, or its content is nobody's business
} TestArray;

static TestArray test_arrays[32];
static size_t n_test_arrays;
static int test_pass;       // 0: compared with the loops in double; later ones: with the bits of pass 0

// Half formats, slowly and exactly: mantissa bits, least exponent of a normal number, exponent field of infinity.
typedef struct { int mantissa, least, top; } HalfFormat;
static const HalfFormat half_format = { 10, -14, 31 }, bf16_format = { 7, -126, 255 };

static HalfFormat half_format_of(Dtype dtype) { return dtype == F16 ? half_format : bf16_format; }

static double naive_decode(uint16_t bits, HalfFormat f) {
    int exponent = (bits & 0x7FFF) >> f.mantissa, one = 1 << f.mantissa, fraction = bits & (one - 1);
    double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == f.top) return fraction ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, f.least - f.mantissa);
    return sign * ldexp(one + fraction, f.least - f.mantissa + exponent - 1);
}

// Rounds a number of mantissa bits to an integer, ties to even. That it can carry into the exponent is as it should be.
static uint16_t naive_encode(double x, HalfFormat f) {
    int64_t sign = signbit(x) ? 0x8000 : 0, infinity = (int64_t)f.top << f.mantissa;
    if (isnan(x)) return (uint16_t)(sign | infinity | 1);
    if (isinf(x)) return (uint16_t)(sign | infinity);
    int exponent = x == 0 || ilogb(x) < f.least ? f.least : ilogb(x);
    int64_t steps = (int64_t)rint(ldexp(fabs(x), f.mantissa - exponent));
    int64_t bits = (int64_t)(exponent - f.least) * (1 << f.mantissa) + steps;
    return (uint16_t)(sign | (bits < infinity ? bits : infinity));
}

static size_t test_size(Dtype dtype) {
    return dtype == F64 || dtype == I64 ? 8 : dtype == F32 || dtype == I32 ? 4 : 2;
}

static void test_encode(void *to, Dtype dtype, const double *from, size_t n) {
    for (size_t i = 0; i < n; i++)
        switch (dtype) {
            case F64: ((double *)to)[i] = from[i]; break;
            case F32: ((float *)to)[i] = (float)from[i]; break;
            case I64: ((int64_t *)to)[i] = (int64_t)from[i]; break;
            case I32: ((int32_t *)to)[i] = (int32_t)from[i]; break;
            case F16: case BF16: case OTHER_DTYPE: default:
                ((uint16_t *)to)[i] = naive_encode(from[i], half_format_of(dtype));
        }
}

static TestArray *put_array(Dtype dtype, double *host, size_t n) {
    // the array on both sides; takes over `host`
    if (n_test_arrays == COUNT(test_arrays)) fail("tests: more than %zu arrays at once", n_test_arrays);
    TestArray *a = &test_arrays[n_test_arrays++];
    size_t bytes = 2*GUARD + n * test_size(dtype);
    *a = (TestArray){ .n = n, .dtype = dtype, .host = host, .least = TINY };
    a->block = memory_take(bytes);
    a->start = alloc(bytes, 1);
    if (!a->block) fail("tests: memory_take(%zu) gave nothing", bytes);
    memset(a->start, 0xFF, bytes);
    test_encode(a->start + GUARD, dtype, host, n);
    memory_copy_in(a->block, a->start, bytes);
    a->device = a->block + GUARD;
    return a;
}

static uint64_t test_drawn;         // how many random numbers were drawn in this pass

static double test_random(void) { return (double)rng_bits(2024, test_drawn++) * 0x1p-63 - 1; }     // on [-1,1)

static bool drawn_in_bf16;          // that bf16 holds exactly: then a port that rounds operands to it changes nothing

// Numbers on [-spread, spread) that the dtype and `real` both hold exactly.
static TestArray *random_of(Dtype dtype, size_t n, double spread) {
    double *host = alloc(n, sizeof *host);
    for (size_t i = 0; i < n; i++) {
        volatile real rounded = (real)(spread * test_random());     // gcc 12 -O3 with AVX-512 loses a rounding it vectorizes
        host[i] = (double)rounded;
        if (dtype == F32) host[i] = (double)(float)host[i];
        if (drawn_in_bf16) host[i] = naive_decode(naive_encode(host[i], bf16_format), bf16_format);
        if (dtype == F16 || dtype == BF16)
            host[i] = naive_decode(naive_encode(host[i], half_format_of(dtype)), half_format_of(dtype));
    }
    TestArray *a = put_array(dtype, host, n);
    a->least = fmax(spread / 10, TINY);     // what is added to such numbers cannot be exact to less
    return a;
}

static TestArray *random_array(size_t n, double spread) { return random_of(REAL, n, spread); }

// An array that a kernel is to fill.
static TestArray *unset_array(size_t n) {
    double *host = alloc(n, sizeof *host);
    for (size_t i = 0; i < n; i++) host[i] = (double)NAN;
    return put_array(REAL, host, n);
}

// Given numbers, rounded to `real` when they are reals.
static TestArray *array_from(Dtype dtype, const double *from, size_t n) {
    double *host = alloc(n, sizeof *host);
    for (size_t i = 0; i < n; i++) host[i] = dtype == REAL ? (double)(real)from[i] : from[i];
    return put_array(dtype, host, n);
}

// Whole numbers on [0, end), the last and the first coming first.
static TestArray *random_ids(size_t n, size_t end) {
    double *host = alloc(n, sizeof *host);
    for (size_t i = 0; i < n; i++) host[i] = floor((test_random() + 1) / 2 * (double)end);
    if (n > 0) host[0] = (double)(end - 1);
    if (n > 1) host[1] = 0;
    return put_array(I32, host, n);
}

// An output that starts from something: by `mode` from nothing, from itself, or from another array, which *from is.
// Numbers of its host are those that it starts from.
static TestArray *output_from(size_t n, int mode, TestArray **from) {
    TestArray *a = mode == 1 ? random_array(n, 1) : unset_array(n);
    *from = mode == 0 ? NULL : mode == 1 ? a : random_array(n, 1);
    for (size_t i = 0; i < n && mode != 1; i++) a->host[i] = *from ? (*from)->host[i] : 0;
    a->least = 0.1;
    return a;
}

static const real *device_of(const TestArray *a) { return a ? a->device : NULL; }

static const char *const from_names[] = { "from nothing", "added to", "from another" };

// ---- Comparing, and the same bits at every pass ------------------------------------------------------------------

static struct { void *bytes; size_t n; } *test_record;
static size_t n_record, record_capacity, record_at;

// Remembers a result in the first pass, compares with what was remembered in the others. Takes over `bytes`.
static void same_at_every_pass(const char *what, void *bytes, size_t n, size_t size) {
    if (test_pass == 0) {
        test_record = grow(test_record, &record_capacity, n_record + 1, sizeof *test_record);
        test_record[n_record].bytes = bytes;
        test_record[n_record++].n = n * size;
        return;
    }
    bool known = record_at < n_record && test_record[record_at].n == n * size;
    if (!known) check_true(label("%s: pass %d of the test has another order", what, test_pass), false);
    else check_equal_bits(label("%s, pass %d", what, test_pass), bytes, test_record[record_at].bytes, n, size);
    record_at++;
    free(bytes);
}

static void expect_number(const char *what, double got, double want, double tolerance) {
    double *kept = alloc(1, sizeof *kept);
    *kept = got;
    if (test_pass == 0) check_number(what, got, want, tolerance);
    same_at_every_pass(what, kept, 1, sizeof *kept);
}

// The device's array must be what `host` has become.
__attribute__((format(printf, 3, 4))) static void expect(TestArray *a, double tolerance, const char *format, ...) {
    char what[200];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    real *got = alloc(a->n, sizeof *got);
    memory_copy_out(got, a->device, a->n * sizeof *got);
    if (test_pass == 0) check_arrays(what, got, sizeof *got, a->host, a->n, false, a->least, tolerance);
    same_at_every_pass(what, got, a->n, sizeof *got);
    a->spent = true;
}

// Ends a test: gives all arrays back, after a look at what had to stay as it was.
static void finish_arrays(const char *test) {
    for (size_t i = 0; i < n_test_arrays; i++) {
        TestArray *a = &test_arrays[i];
        size_t bytes = a->n * test_size(a->dtype);
        char *now = alloc(2*GUARD + bytes, 1);
        memory_copy_out(now, a->block, 2*GUARD + bytes);
        if (memcmp(now, a->start, GUARD) || memcmp(now + GUARD + bytes, a->start + GUARD + bytes, GUARD))
            check_true(label("%s: array %zu of the test was written past its ends", test, i), false);
        if (!a->spent && memcmp(now, a->start, 2*GUARD + bytes))
            check_true(label("%s: array %zu of the test, an input, was changed", test, i), false);
        free(now);
        memory_give(a->block);
        free(a->start);
        free(a->host);
    }
    n_test_arrays = 0;
}

// ---- The formulas, as plain loops in double ----------------------------------------------------------------------
// Backward functions add to their gradients, as the kernels do.

// y = s x w^T, and, for the gradient dy, dx and dw: all three products are sums over one set of triples
static void naive_linear(double *y, double *dx, double *dw, const double *dy, const double *x, const double *w,
                         double s, size_t T, size_t n_out, size_t n_in) {
    for (size_t t = 0; t < T; t++)
        for (size_t j = 0; j < n_out; j++)
            for (size_t k = 0; k < n_in; k++) {
                y[t*n_out + j] += s * x[t*n_in + k] * w[j*n_in + k];
                dx[t*n_in + k] += s * dy[t*n_out + j] * w[j*n_in + k];
                dw[j*n_in + k] += s * dy[t*n_out + j] * x[t*n_in + k];
            }
}

static void naive_rmsnorm(double *y, double *r, const double *x, const double *gain, double eps, size_t T, size_t H) {
    for (size_t t = 0; t < T; t++) {
        double squares = 0;
        for (size_t i = 0; i < H; i++) squares += x[t*H + i] * x[t*H + i];
        r[t] = 1 / sqrt(squares / (double)H + eps);
        for (size_t i = 0; i < H; i++) y[t*H + i] = gain[i] * (x[t*H + i] * r[t]);
    }
}

// With n = x r: dgain = sum dy n, and of dn = dy gain the part along n is lost: dx = r (dn - n mean(dn n))
static void naive_rmsnorm_backward(double *dx, double *dgain, const double *dy, const double *x, const double *gain,
                                   const double *r, size_t T, size_t H) {
    for (size_t t = 0; t < T; t++) {
        double mean = 0;
        for (size_t i = 0; i < H; i++) mean += dy[t*H + i] * gain[i] * x[t*H + i] * r[t] / (double)H;
        for (size_t i = 0; i < H; i++) {
            double n = x[t*H + i] * r[t];
            dgain[i] += dy[t*H + i] * n;
            dx[t*H + i] += r[t] * (dy[t*H + i] * gain[i] - n * mean);
        }
    }
}

// Turns pairs as the complex numbers they are, by the table's angles or (conjugate) back.
static void naive_rope(double *x, const double *positions, const double *table, bool back, size_t T, size_t n_heads,
                       size_t head_dim, size_t n_rotated) {
    for (size_t row = 0; row < T * n_heads; row++)
        for (size_t j = 0; j < n_rotated / 2; j++) {
            const double *turn = table + (size_t)positions[row / n_heads] * n_rotated + 2*j;
            double *pair = x + row*head_dim + 2*j, re = pair[0], im = pair[1], s = back ? -turn[1] : turn[1];
            pair[0] = re * turn[0] - im * s;
            pair[1] = re * s + im * turn[0];
        }
}

// One attention call in plain terms: row t of q belongs to sequence b and sees n_keys keys, of which key j lies at
// naive_key: in the prefix or in the sequence's own rows.
typedef struct {
    size_t n_sequences, n_heads, n_kv_heads, head_dim, n_prefix;
    size_t lengths[6], past[6];             // queries, and keys before them, of each sequence
} AttentionCase;

typedef struct { const double *q, *k, *v, *prefix_k, *prefix_v; } AttentionInputs;
typedef struct { double *q, *k, *v, *prefix_k, *prefix_v; } AttentionGradients;

static double *naive_key(const AttentionCase *c, double *prefix, double *own, size_t first, size_t j, size_t h) {
    size_t g = h * c->n_kv_heads / c->n_heads, width = c->n_kv_heads * c->head_dim;
    return (j < c->n_prefix ? prefix + j*width : own + (first + j - c->n_prefix)*width) + g*c->head_dim;
}

static double naive_dot(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// One query: its probabilities over n_keys keys (own rows from `first`); returns log sum exp of the scores.
static double naive_softmax(double *p, const AttentionCase *c, AttentionInputs in, const double *q, size_t first,
                            size_t n_keys, size_t h) {
    double largest = -(double)INFINITY, sum = 0;
    for (size_t j = 0; j < n_keys; j++) {
        double *key = naive_key(c, (double *)in.prefix_k, (double *)in.k, first, j, h);
        p[j] = naive_dot(q, key, c->head_dim) / sqrt((double)c->head_dim);
        largest = fmax(largest, p[j]);
    }
    for (size_t j = 0; j < n_keys; j++) sum += exp(p[j] - largest);
    for (size_t j = 0; j < n_keys; j++) p[j] = exp(p[j] - largest) / sum;
    return largest + log(sum);
}

// One query's gradients from its probabilities: dp_j = dout . v_j, and through the softmax ds_j = p_j (dp_j - sum p dp)
static void naive_attend_backward(AttentionGradients d, const double *dout, const double *p, const AttentionCase *c,
                                  AttentionInputs in, size_t th, size_t first, size_t n_keys, size_t h) {
    size_t n = c->head_dim;
    double mean = 0, *dp = alloc(n_keys, sizeof *dp);
    for (size_t j = 0; j < n_keys; j++) {
        dp[j] = naive_dot(dout, naive_key(c, (double *)in.prefix_v, (double *)in.v, first, j, h), n);
        mean += p[j] * dp[j];
    }
    for (size_t j = 0; j < n_keys; j++) {
        double ds = p[j] * (dp[j] - mean) / sqrt((double)n);
        const double *key = naive_key(c, (double *)in.prefix_k, (double *)in.k, first, j, h);
        double *dk = naive_key(c, d.prefix_k, d.k, first, j, h), *dv = naive_key(c, d.prefix_v, d.v, first, j, h);
        for (size_t i = 0; i < n; i++) {
            d.q[th*n + i] += ds * key[i];
            dk[i] += ds * in.q[th*n + i];
            dv[i] += p[j] * dout[i];
        }
    }
    free(dp);
}

// The forward when d is NULL, else the backward for the gradient `dout` of out.
static void naive_attention(double *out, double *lse, const AttentionGradients *d, const double *dout,
                            const AttentionCase *c, AttentionInputs in) {
    double *p = alloc(4096, sizeof *p);
    for (size_t b = 0, t = 0, first = 0; b < c->n_sequences; first += c->past[b] + c->lengths[b], b++)
        for (size_t i = 0; i < c->lengths[b]; i++, t++)
            for (size_t h = 0; h < c->n_heads; h++) {
                size_t n_keys = c->n_prefix + c->past[b] + i + 1, th = t*c->n_heads + h, n = c->head_dim;
                double sum = naive_softmax(p, c, in, in.q + th*n, first, n_keys, h);
                if (d) naive_attend_backward(*d, dout + th*n, p, c, in, th, first, n_keys, h);
                if (d) continue;
                lse[th] = sum;
                for (size_t x = 0; x < n; x++) out[th*n + x] = 0;
                for (size_t j = 0; j < n_keys; j++)
                    for (size_t x = 0; x < n; x++)
                        out[th*n + x] += p[j] * naive_key(c, (double *)in.prefix_v, (double *)in.v, first, j, h)[x];
            }
    free(p);
}

static double naive_sigmoid(double x) { return 1 / (1 + exp(-x)); }

static void naive_swiglu(double *h, const double *gate_up, size_t T, size_t F) {
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < F; i++) {
            double g = gate_up[t*2*F + i], u = gate_up[t*2*F + F + i];
            h[t*F + i] = g * naive_sigmoid(g) * u;
        }
}

// silu' = z + g z (1 - z)
static void naive_swiglu_backward(double *dgate_up, const double *dh, const double *gate_up, size_t T, size_t F) {
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < F; i++) {
            double g = gate_up[t*2*F + i], u = gate_up[t*2*F + F + i], z = naive_sigmoid(g);
            dgate_up[t*2*F + i] += dh[t*F + i] * u * (z + g * z * (1 - z));
            dgate_up[t*2*F + F + i] += dh[t*F + i] * g * z;
        }
}

// loss = - sum_v q_v log p_v with the smoothed target q, dlogits = scale (p - q)
static void naive_cross_entropy(double *loss, double *dlogits, const double *logits, const double *targets, double e,
                                double scale, size_t R, size_t V) {
    for (size_t r = 0; r < R; r++) {
        double largest = -(double)INFINITY;
        long double sum = 0, nll = 0;       // over so many numbers a double would err more than the kernel may
        for (size_t v = 0; v < V; v++) largest = fmax(largest, logits[r*V + v]);
        for (size_t v = 0; v < V; v++) sum += expl(logits[r*V + v] - largest);
        for (size_t v = 0; v < V; v++) {
            long double log_p = logits[r*V + v] - largest - logl(sum);
            double q = e / (double)V + ((double)v == targets[r] ? 1 - e : 0);
            nll -= q * log_p;
            dlogits[r*V + v] = scale * (double)(expl(log_p) - q);
        }
        loss[r] = (double)nll;
    }
}

// ---- The backwards in double, against differences of their forwards ----------------------------------------------

// slope[i] = d sum(out * dout) / d x[i] by central differences; `forward` is the call that computes out from x
#define DIFFERENCES(slope, x, n, out, dout, n_out, forward)                                                            \
    for (size_t i = 0; i < (n); i++) {                                                                                 \
        double kept = (x)[i], step = 1e-5, side[2];                                                                    \
        for (int s = 0; s < 2; s++) {                                                                                  \
            (x)[i] = s ? kept - step : kept + step;                                                                    \
            forward;                                                                                                   \
            side[s] = naive_dot(out, dout, n_out);                                                                     \
        }                                                                                                              \
        (x)[i] = kept;                                                                                                 \
        (slope)[i] = (side[0] - side[1]) / (2 * step);                                                                 \
    }

static void check_slopes(const char *what, const double *gradient, const double *slope, size_t n) {
    check_arrays(what, gradient, sizeof *gradient, slope, n, false, TINY, 5e-10);
}

static void fill_random(double *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = test_random();
}

static void test_naive_linear(void) {
    enum { T = 3, OUT = 4, IN = 5 };
    double x[T*IN], w[OUT*IN], y[T*OUT], dy[T*OUT], dx[T*IN] = {0}, dw[OUT*IN] = {0}, slope[32], none[32];
    fill_random(x, T*IN), fill_random(w, OUT*IN), fill_random(dy, T*OUT);
    naive_linear(y, dx, dw, dy, x, w, 0.7, T, OUT, IN);
    #define FORWARD (memset(y, 0, sizeof y), naive_linear(y, none, none, dy, x, w, 0.7, T, OUT, IN))
    DIFFERENCES(slope, x, T*IN, y, dy, T*OUT, FORWARD)
    check_slopes("naive linear dx", dx, slope, T*IN);
    DIFFERENCES(slope, w, OUT*IN, y, dy, T*OUT, FORWARD)
    check_slopes("naive linear dw", dw, slope, OUT*IN);
    #undef FORWARD
}

static void test_naive_rmsnorm(void) {
    enum { T = 3, H = 5 };
    double x[T*H], gain[H], y[T*H], r[T], dy[T*H], dx[T*H] = {0}, dgain[H] = {0}, slope[T*H];
    fill_random(x, T*H), fill_random(gain, H), fill_random(dy, T*H);
    naive_rmsnorm(y, r, x, gain, 1e-2, T, H);
    naive_rmsnorm_backward(dx, dgain, dy, x, gain, r, T, H);
    DIFFERENCES(slope, x, T*H, y, dy, T*H, naive_rmsnorm(y, r, x, gain, 1e-2, T, H))
    check_slopes("naive rmsnorm dx", dx, slope, T*H);
    DIFFERENCES(slope, gain, H, y, dy, T*H, naive_rmsnorm(y, r, x, gain, 1e-2, T, H))
    check_slopes("naive rmsnorm dgain", dgain, slope, H);
}

static void test_naive_attention(void) {
    AttentionCase c = { 3, 4, 2, 3, 2, { 3, 0, 2 }, { 0, 0, 0 } };
    enum { ROWS = 5, Q = ROWS*4*3, K = ROWS*2*3, PREFIX = 2*2*3 };
    double q[Q], k[K], v[K], pk[PREFIX], pv[PREFIX], out[Q], dout[Q], lse[ROWS*4], slope[Q];
    double dq[Q] = {0}, dk[K] = {0}, dv[K] = {0}, dpk[PREFIX] = {0}, dpv[PREFIX] = {0};
    AttentionInputs in = { q, k, v, pk, pv };
    AttentionGradients d = { dq, dk, dv, dpk, dpv };
    struct { const char *what; double *x, *gradient; size_t n; } inputs[] = {
        { "naive attention dq", q, dq, Q }, { "naive attention dk", k, dk, K }, { "naive attention dv", v, dv, K },
        { "naive attention dprefix_k", pk, dpk, PREFIX }, { "naive attention dprefix_v", pv, dpv, PREFIX },
    };
    for (size_t a = 0; a < COUNT(inputs); a++) fill_random(inputs[a].x, inputs[a].n);
    fill_random(dout, Q);
    naive_attention(out, lse, &d, dout, &c, in);
    for (size_t a = 0; a < COUNT(inputs); a++) {
        DIFFERENCES(slope, inputs[a].x, inputs[a].n, out, dout, Q, naive_attention(out, lse, NULL, NULL, &c, in))
        check_slopes(inputs[a].what, inputs[a].gradient, slope, inputs[a].n);
    }
}

static void test_naive_elements(void) {
    enum { T = 2, F = 3, V = 6 };
    double x[T*V], h[T*V], dh[T*V], dx[T*V] = {0}, slope[T*V], loss[T], ones[T] = { 1, 1 }, targets[T] = { 4, 0 };
    fill_random(x, T*V), fill_random(dh, T*V);
    naive_swiglu_backward(dx, dh, x, T, F);
    DIFFERENCES(slope, x, T*2*F, h, dh, T*F, naive_swiglu(h, x, T, F))
    check_slopes("naive swiglu dgate_up", dx, slope, T*2*F);
    double unused[T*V];
    naive_cross_entropy(loss, dx, x, targets, 0.1, 1, T, V);
    DIFFERENCES(slope, x, T*V, loss, ones, T, naive_cross_entropy(loss, unused, x, targets, 0.1, 1, T, V))
    check_slopes("naive cross_entropy dlogits", dx, slope, T*V);
}

// ---- 2.13 Memory and types ---------------------------------------------------------------------------------------

static void test_memory(void) {
    TestArray *a = random_array(1000, 1), *b = random_array(7, 1);
    zero((real *)a->device + 3, 990);
    zero(b->device, 0);
    for (size_t i = 3; i < 993; i++) a->host[i] = 0;
    expect(a, 0, "zero");
    expect(b, 0, "zero of nothing");

    static const uint16_t mapped[4] = { 0x3F80, 0xC000, 0x0001, 0x8000 };     // as if in a file: bf16 1, -2, tiny, -0
    TestArray *wide = unset_array(4);
    const void *there = memory_mapped(mapped, sizeof mapped);
    widen(wide->device, there, BF16, 4);
    for (size_t i = 0; i < 4; i++) wide->host[i] = naive_decode(mapped[i], bf16_format);
    expect(wide, 0, "widen of memory_mapped");
    check_true("memory_mapped gives the same twice", memory_mapped(mapped, sizeof mapped) == there);
    memory_unmap(there), memory_unmap(there);
    check_true("memory is left", memory_left() > 0);
    finish_kernels();

    volatile size_t too_much = (size_t)1 << 60;
    if (!SANITIZED) check_true("memory_take(2^60) gives NULL", memory_take(too_much) == NULL);     // ASan would stop
    memory_give(NULL);
    finish_arrays("memory");
}

// All patterns of a half type, in their order, so that host holds what each is worth.
static TestArray *all_patterns(Dtype dtype) {
    TestArray *a = random_of(dtype, 65536, 1);
    uint16_t *bits = (uint16_t *)(void *)(a->start + GUARD);
    for (size_t i = 0; i < 65536; i++) {
        bits[i] = (uint16_t)i;
        a->host[i] = naive_decode(bits[i], half_format_of(dtype));
    }
    memory_copy_in(a->device, bits, 65536 * sizeof *bits);
    return a;
}

static void test_widen_half(Dtype dtype) {
    TestArray *in = all_patterns(dtype), *out = unset_array(65536);
    real *got = alloc(65536, sizeof *got);
    widen(out->device, in->device, dtype, 65536);
    memory_copy_out(got, out->device, 65536 * sizeof *got);
    size_t wrong = 0;
    for (size_t i = 0; i < 65536; i++) {
        double x = (double)got[i], want = in->host[i];
        bool good = isnan(want) ? isnan(x) : x == want && !signbit(x) == !signbit(want);
        wrong += !good;
    }
    check_equal(label("widen: wrong ones of all 65536 patterns of dtype %d", dtype), wrong, 0);
    same_at_every_pass("widen", got, 65536, sizeof *got);
    out->spent = true;
    finish_arrays("widen");
}

static void test_widen_wide(Dtype dtype) {
    double values[] = { 0, -0.0, 1, -1.1, 3e38, -1e-38, 1e-45, 1 / 3.0, (double)INFINITY, -(double)INFINITY };
    for (size_t i = 0; i < COUNT(values); i++) if (dtype == F32) values[i] = (double)(float)values[i];
    TestArray *in = put_array(dtype, memcpy(alloc(COUNT(values), sizeof *values), values, sizeof values), COUNT(values));
    TestArray *out = unset_array(COUNT(values));
    widen(out->device, in->device, dtype, in->n);
    real want[COUNT(values)], got[COUNT(values)];
    for (size_t i = 0; i < in->n; i++) want[i] = (real)in->host[i];
    memory_copy_out(got, out->device, sizeof got);
    check_equal_bits(label("widen of dtype %d", dtype), got, want, in->n, sizeof *got);
    out->spent = true;
    finish_arrays("widen");
}

// Every number of a half type, the middle between it and the next, and what lies closest to that middle on both sides.
static TestArray *rounding_cases(HalfFormat f) {
    enum { PER_PATTERN = 4, PATTERNS = 65536 };
    double *host = alloc(PER_PATTERN * PATTERNS, sizeof *host);
    for (size_t i = 0; i < PATTERNS; i++) {
        double x = naive_decode((uint16_t)i, f), next = naive_decode((uint16_t)((i & 0x8000) | ((i + 1) & 0x7FFF)), f);
        if (isinf(next)) next = 2*x - naive_decode((uint16_t)(i - 1), f);       // where it would be if there were one
        double middle = isfinite(x) ? (double)(real)((x + next) / 2) : x;
#ifdef GLMTUNE_DOUBLE
        double around[PER_PATTERN] = { x, nextafter(middle, x), middle, nextafter(middle, next) };
#else
        double around[PER_PATTERN] = { x, (double)nextafterf((float)middle, (float)x), middle,
                                       (double)nextafterf((float)middle, (float)next) };
#endif
        memcpy(host + PER_PATTERN * i, around, sizeof around);
    }
    return put_array(REAL, host, PER_PATTERN * PATTERNS);
}

static void test_narrow_half(Dtype dtype) {
    HalfFormat f = half_format_of(dtype);
    TestArray *in = rounding_cases(f);
    void *device = memory_take(in->n * sizeof(uint16_t));
    uint16_t *got = alloc(in->n, sizeof *got);
    narrow(device, dtype, in->device, in->n);
    memory_copy_out(got, device, in->n * sizeof *got);
    size_t wrong = 0, first = 0;
    for (size_t i = in->n; i-- > 0; ) {
        bool good = isnan(in->host[i]) ? isnan(naive_decode(got[i], f)) : got[i] == naive_encode(in->host[i], f);
        if (!good) wrong++, first = i;
    }
    const char *what = label("narrow to dtype %d: %zu of %zu wrong; %a became %04x, want %04x", dtype, wrong, in->n,
                             in->host[first], got[first], naive_encode(in->host[first], f));
    if (test_pass == 0) check_true(what, wrong == 0);
    memory_give(device);
    same_at_every_pass("narrow", got, in->n, sizeof *got);
    finish_arrays("narrow");
}

// A NaN whose mark lies in the bits that are cut off must not turn into infinity.
static void test_narrow_nan(Dtype dtype) {
    TestArray *in = random_array(1, 1);
    real marked;
#ifdef GLMTUNE_DOUBLE
    memcpy(&marked, &(uint64_t){ 0x7FF0000000000001u }, sizeof marked);
#else
    memcpy(&marked, &(uint32_t){ 0x7F800001u }, sizeof marked);
#endif
    uint16_t got;
    void *device = memory_take(sizeof got);
    memory_copy_in(in->device, &marked, sizeof marked);
    narrow(device, dtype, in->device, 1);
    memory_copy_out(&got, device, sizeof got);
    check_true(label("narrow of NaN to dtype %d is NaN", dtype), isnan(naive_decode(got, half_format_of(dtype))));
    memory_give(device);
    in->spent = true;
    finish_arrays("narrow");
}

static void test_narrow_wide(Dtype dtype) {
    double values[] = { 0, -0.0, 1, -1.1, 3e38, -1e-38, 1e-45, 1 / 3.0, (double)INFINITY, -(double)INFINITY, 0.1 };
    TestArray *in = array_from(REAL, values, COUNT(values)), *out = random_of(dtype, COUNT(values), 1);
    char want[sizeof values], got[sizeof values];
    narrow(out->device, dtype, in->device, in->n);
    memory_copy_out(got, out->device, in->n * test_size(dtype));
    test_encode(want, dtype, in->host, in->n);
    check_equal_bits(label("narrow to dtype %d", dtype), got, want, in->n, test_size(dtype));
    out->spent = true;
    finish_arrays("narrow");
}

// Element i depends on (key, i) alone; 0 and 1 as center and spread show the numbers as they are.
static void test_fill_uniform(void) {
    check_true("rng_bits(0, 0) is the first number of splitmix64", rng_bits(0, 0) == 0xE220A8397B1DCDAFu);
    static const struct { uint64_t key; double center, spread; size_t n; double tolerance; } cases[] = {
        { 1, 0, 1, 100003, 0 }, { 1, 0, 1, 11, 0 }, { 77, 0.5, 0.125, 1000, 1e-7 }, { 1, 1.1, 0.3, 1000, 1e-7 },
        { 5, 0, 1, 0, 0 },
    };
    for (size_t k = 0; k < COUNT(cases); k++) {
        size_t n = cases[k].n;
        TestArray *a = unset_array(n);
        double sum = 0;
        fill_uniform(a->device, cases[k].key, (float)cases[k].center, (float)cases[k].spread, n);
        for (size_t i = 0; i < n; i++) {
            double unit = floor((double)rng_bits(cases[k].key, i) * 0x1p-40) * 0x1p-23 - 1;        // 24 bits on [-1,1)
            a->host[i] = (double)(float)cases[k].center + (double)(float)cases[k].spread * unit;
            sum += unit;
        }
        expect(a, cases[k].tolerance, "fill_uniform key %d n=%zu", (int)cases[k].key, n);
        // the mean of n uniform numbers has the deviation 1/sqrt(3n)
        if (n > 1000) check_true("fill_uniform has mean 0", fabs(sum / (double)n) < 4 / sqrt(3 * (double)n));
        finish_arrays("fill_uniform");
    }
}

// The same with Box and Muller's normal numbers, from bits 2i and 2i + 1.
static void test_fill_normal(void) {
    static const struct { uint64_t key; double center, spread; size_t n; } cases[] = {
        { 1, 0, 1, 100003 }, { 77, 0.5, 0.125, 1000 }, { 5, 0, 1, 0 } };
    for (size_t k = 0; k < COUNT(cases); k++) {
        size_t n = cases[k].n;
        TestArray *a = unset_array(n);
        double sum = 0, squares = 0;
        fill_normal(a->device, cases[k].key, (float)cases[k].center, (float)cases[k].spread, n);
        for (size_t i = 0; i < n; i++) {
            double u = (floor((double)(rng_bits(cases[k].key, 2*i) >> 11)) + 1) * 0x1p-53;
            double angle = 2 * acos(-1.0) * (double)(rng_bits(cases[k].key, 2*i + 1) >> 11) * 0x1p-53;
            double x = sqrt(-2 * log(u)) * cos(angle);
            a->host[i] = cases[k].center + cases[k].spread * x;
            sum += x, squares += x * x;
        }
        expect(a, 1e-7, "fill_normal key %d n=%zu", (int)cases[k].key, n);
        if (n > 1000) check_true("fill_normal has mean 0", fabs(sum / (double)n) < 4 / sqrt((double)n));
        if (n > 1000) check_true("fill_normal has deviation 1", fabs(squares / (double)n - 1) < 4 * sqrt(2 / (double)n));
        finish_arrays("fill_normal");
    }
}

// ---- 2.2 Matrix product ------------------------------------------------------------------------------------------

// Tensor cores cut off what they shift out when they add: up to 2^-23 of a sum for each 16 terms, where the CPU rounds
// to nearest. Should a GPU exceed this bar in bf16, 5e-6 may take its place there if the error is below 1e-5 and grows
// with n_in; any other error is a mistake of the kernel. The same holds for lse in test_attention_forward.
static const double linear_tolerance = TOLERANCE(3e-6, 6e-15);

// The weight is all rows but the first and last of a larger matrix, as q, k and v are views of a fused one.
static void test_linear_shape(Dtype dtype, size_t T, size_t n_out, size_t n_in, double scale, int mode,
                              double tolerance) {
    TestArray *x = random_array(T*n_in, 1), *dy = random_array(T*n_out, 1), *w = random_of(dtype, (n_out + 2)*n_in, 1);
    TestArray *y_from, *dx_from, *y = output_from(T*n_out, mode, &y_from), *dx = output_from(T*n_in, mode, &dx_from);
    TestArray *dw = random_array((n_out + 2)*n_in, 1);
    Weight view = { w->device, dtype, n_in, NULL };
    real s = (real)scale;
    linear_forward(y->device, device_of(y_from), x->device, view, s, T, n_out, n_in);
    linear_backward_input(dx->device, device_of(dx_from), dy->device, view, s, T, n_out, n_in);
    linear_backward_weight((real *)dw->device + n_in, dy->device, x->device, s, T, n_out, n_in);
    if (test_pass == 0)
        naive_linear(y->host, dx->host, dw->host + n_in, dy->host, x->host, w->host + n_in, (double)s, T, n_out, n_in);
    const char *shape = label("%s, dtype %d T=%zu out=%zu in=%zu", from_names[mode], dtype, T, n_out, n_in);
    expect(y, tolerance, "linear_forward y, %s", shape);
    expect(dx, tolerance, "linear_backward_input dx, %s", shape);
    expect(dw, tolerance, "linear_backward_weight dw, %s", shape);
    finish_arrays("linear");
}

// A weight whose rows give three outputs: as many calls of its parts, in their order, to the bit.
static void test_linear_parts(Dtype dtype, size_t T, int mode, double tolerance) {
    enum { PARTS_OF_W = 3, IN = 70 };
    static const size_t n_out[PARTS_OF_W] = { 64, 5, 17 };
    TestArray *x = random_array(T*IN, 1), *w = random_of(dtype, (64 + 5 + 17 + 1)*IN, 1), *dx_from;
    TestArray *dx = output_from(T*IN, mode, &dx_from), *dx2 = unset_array(T*IN), *y[PARTS_OF_W], *dy[PARTS_OF_W];
    real *y_at[PARTS_OF_W], *from_at[PARTS_OF_W], *dy_at[PARTS_OF_W];
    for (size_t p = 0; p < PARTS_OF_W; p++) {
        TestArray *from;
        y[p] = output_from(T*n_out[p], mode, &from), dy[p] = random_array(T*n_out[p], 1);
        y_at[p] = y[p]->device, from_at[p] = from ? from->device : NULL, dy_at[p] = dy[p]->device;
    }
    real s = (real)0.7;
    Weight view = { w->device, dtype, IN, NULL };
    const real *from = device_of(dx_from);
    for (size_t p = 0; p < PARTS_OF_W; p++) {
        linear_backward_input(dx2->device, from, dy_at[p], view, s, T, n_out[p], IN);
        view.first += n_out[p]*IN, from = dx2->device;
        if (mode == 1) from_at[p] = y_at[p];
    }
    view.first = IN;
    linear_parts_forward(y_at, mode ? from_at : NULL, x->device, view, s, T, n_out, PARTS_OF_W, IN);
    linear_parts_backward_input(dx->device, device_of(dx_from), dy_at, view, s, T, n_out, PARTS_OF_W, IN);
    double *unused = alloc(64*IN, sizeof *unused), *host = w->host + IN;
    for (size_t p = 0; p < PARTS_OF_W; host += n_out[p++]*IN)
        naive_linear(y[p]->host, dx->host, unused, dy[p]->host, x->host, host, (double)s, T, n_out[p], IN);
    free(unused);
    memcpy(dx2->host, dx->host, T*IN * sizeof *dx->host);
    real *bits = alloc(T*IN, sizeof *bits), *bits2 = alloc(T*IN, sizeof *bits2);
    memory_copy_out(bits, dx->device, T*IN * sizeof *bits), memory_copy_out(bits2, dx2->device, T*IN * sizeof *bits2);
    const char *shape = label("%s, dtype %d T=%zu", from_names[mode], dtype, T);
    check_equal_bits(label("linear_parts_backward_input is as many calls, %s", shape), bits, bits2, T*IN, sizeof *bits);
    free(bits), free(bits2);
    for (size_t p = 0; p < PARTS_OF_W; p++) expect(y[p], tolerance, "linear_parts_forward y[%zu], %s", p, shape);
    expect(dx, tolerance, "linear_parts_backward_input dx, %s", shape);
    expect(dx2, tolerance, "linear_backward_input part by part, %s", shape);
    finish_arrays("linear_parts");
}

// The CPU's instructions on pairs of bf16 take subnormal numbers as 0. Should a GPU fail test_linear_exact in numbers
// below 2^-126 alone, it does the same and belongs here; nothing else may differ.
static bool drops_subnormals(void) {
#if FAST
    return packing.pair == 2;
#else
    return false;
#endif
}

// ---- Codes

static const char *const code_names[] = { [Q8] = "Q8", [Q4] = "Q4", [NF4] = "NF4", [FP4] = "FP4" };
static const double nf4_values[] = {
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1 };
static const double fp4_twelfths[] = { 0, 0.0625, 8, 12, 4, 6, 2, 3 };     // then the same below zero

static double naive_code(const uint8_t *codes, Dtype dtype, size_t i) {
    if (dtype == Q8) return codes[i] < 128 ? codes[i] : codes[i] - 256.0;
    int nibble = i % 2 ? codes[i / 2] % 16 : codes[i / 2] / 16;
    if (dtype == Q4) return nibble < 8 ? nibble : nibble - 16;
    if (dtype == NF4) return nf4_values[nibble];
    return (nibble < 8 ? 1 : -1) * (double)(float)(fp4_twelfths[nibble % 8] / 12);
}

static void *bytes_on_device(const void *host, size_t bytes) {
    void *device = memory_take(bytes);
    memory_copy_in(device, host, bytes);
    return device;
}

// A matrix of random codes, of which all rows but the first and last are the weight; per: numbers of a scale.
static void test_linear_codes(Dtype dtype, bool nested, size_t T, size_t n_out, size_t n_in, size_t per) {
    size_t n = (n_out + 2) * n_in, blocks = (n + per - 1) / per, groups = (blocks + 255) / 256;
    uint8_t *codes = alloc(n, 1), *of_scales = alloc(blocks, 1);
    float *each = alloc(blocks, sizeof *each), *of_groups = alloc(groups, sizeof *each), map[256];
    double *full = alloc(n, sizeof *full);
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)(128 + 127 * test_random());
    for (size_t i = 0; i < 256; i++) map[i] = (float)test_random();
    for (size_t i = 0; i < groups; i++) of_groups[i] = (float)(0.01 * test_random());
    Scales s = { .per = per, .offset = (float)test_random() };
    for (size_t i = 0; i < blocks; i++) {
        volatile float product = map[of_scales[i] = (uint8_t)(128 + 127 * test_random())] * of_groups[i / 256];
        each[i] = nested ? product + s.offset : (float)test_random();
        if (dtype == Q8) each[i] /= 64;
    }
    if (nested && dtype == Q8) fail("tests: scales of whole bytes are floats");
    for (size_t i = 0; i < n; i++) full[i] = (double)(float)(naive_code(codes, dtype, i) * (double)each[i / per]);
    void *on_device[] = { bytes_on_device(codes, n), bytes_on_device(each, blocks * sizeof *each),
                          bytes_on_device(of_scales, blocks), bytes_on_device(map, sizeof map),
                          bytes_on_device(of_groups, groups * sizeof *each) };
    if (nested) s.code = on_device[2], s.map = on_device[3], s.nested = on_device[4];
    else s.each = on_device[1];
    Weight w = { on_device[0], dtype, n_in, &s };
    TestArray *x = random_array(T*n_in, 1), *dy = random_array(T*n_out, 1), *y = unset_array(T*n_out);
    TestArray *dx = unset_array(T*n_in), *numbers = random_array(1 + n_out*n_in, 1);        // the first stays
    linear_forward(y->device, NULL, x->device, w, 1, T, n_out, n_in);
    linear_backward_input(dx->device, NULL, dy->device, w, 1, T, n_out, n_in);
    widen_weight((real *)numbers->device + 1, w, n_out*n_in);
    memset(y->host, 0, T*n_out * sizeof *y->host), memset(dx->host, 0, T*n_in * sizeof *dx->host);
    double *unused = alloc(n_out*n_in, sizeof *unused);
    naive_linear(y->host, dx->host, unused, dy->host, x->host, full + n_in, 1, T, n_out, n_in);
    memcpy(numbers->host + 1, full + n_in, n_out*n_in * sizeof *full);
    const char *shape = label("%s%s T=%zu out=%zu in=%zu per=%zu", code_names[dtype], nested ? " nested" : "", T, n_out,
                              n_in, per);
    expect(y, PRODUCTS(3e-6, 6e-15, 1e-2), "linear_forward of codes, %s", shape);
    expect(dx, PRODUCTS(3e-6, 6e-15, 1e-2), "linear_backward_input of codes, %s", shape);
    expect(numbers, 0, "widen_weight, %s", shape);
    for (size_t i = 0; i < COUNT(on_device); i++) memory_give(on_device[i]);
    free(codes), free(of_scales), free(each), free(of_groups), free(full), free(unused);
    finish_arrays("linear of codes");
}

static void test_codes(void) {
    static const struct { size_t T, n_out, n_in, per; bool nested; } shapes[] = {       // per 0: a row
        { 1, 5, 7, 0, false }, { 1, 33, 128, 64, false }, { 1, 19, 192, 64, true }, { 1, 9, 100, 64, true },
        { 3, 4, 9, 64, false }, { 7, 35, 52, 64, true }, { 13, 32, 128, 128, false }, { 50, 70, 600, 64, true },
        { 6, 300, 64, 0, false }, { 13, 32, 75, 64, true }, { 6, 40, 75, 0, false }, { 5, 17, 3, 0, false },
        { 1, 11, 2, 0, false },
    };
    for (size_t k = 0; k < COUNT(shapes); k++)
        for (Dtype dtype = Q8; dtype <= FP4; dtype++)
            if (dtype != Q8 || !shapes[k].nested)
                test_linear_codes(dtype, shapes[k].nested, shapes[k].T, shapes[k].n_out, shapes[k].n_in,
                                  shapes[k].per ? shapes[k].per : shapes[k].n_in);
}

// A weight of every finite pattern, times ones and zeros: each must come out exactly as it went in, subnormals too.
static void test_linear_exact(Dtype dtype) {
    enum { IN = 32, WIDE = 64 };
    size_t finite = (size_t)half_format_of(dtype).top << half_format_of(dtype).mantissa, n_out = finite / IN;
    size_t n_wide = finite / WIDE;
    TestArray *w = all_patterns(dtype);
    double *eye = alloc(WIDE*WIDE, sizeof *eye);
    for (size_t i = 0; i < IN; i++) eye[i*IN + i] = 1;
    TestArray *rows = array_from(REAL, eye, IN*IN), *y = unset_array(finite), *y1 = unset_array(finite);
    TestArray *dx = unset_array(finite);
    Weight weight = { w->device, dtype, 0, NULL };
    memset(eye, 0, WIDE*WIDE * sizeof *eye);
    for (size_t i = 0; i < WIDE; i++) eye[i*WIDE + i] = 1;
    TestArray *ones = array_from(REAL, eye, WIDE*WIDE);
    linear_forward(y->device, NULL, rows->device, weight, 1, IN, n_out, IN);
    for (size_t i = 0; i < WIDE; i++)
        linear_forward((real *)y1->device + i*n_wide, NULL, (const real *)ones->device + i*WIDE, weight, 1, 1, n_wide,
                       WIDE);
    linear_backward_input(dx->device, NULL, rows->device, weight, 1, IN, IN, n_out);
    for (size_t i = 0; i < finite; i++) {
        bool dropped = drops_subnormals() && fabs(w->host[i]) < 0x1p-126;
        y->host[i % IN * n_out + i / IN] = dx->host[i] = dropped ? 0 : w->host[i];
        y1->host[i % WIDE * n_wide + i / WIDE] = w->host[i];
    }
    double tolerance = dtype == BF16 ? 0 : PRODUCTS(0, 0, 4e-3);
    expect(y, tolerance, "linear_forward of every pattern of dtype %d", dtype);
    expect(y1, tolerance, "linear_forward, one row, of every pattern of dtype %d", dtype);
    expect(dx, tolerance, "linear_backward_input of every pattern of dtype %d", dtype);
    free(eye);
    finish_arrays("linear");
}

#if FAST
// In bf16 a number half way between two is rounded to the one whose last bit is 0.
static void test_linear_halves(void) {
    enum { N = 32 };
    static const real halves[] = { 1 + 0x1p-8f, 1 + 3 * 0x1p-8f }, rounded[] = { 1, 1 + 4 * 0x1p-8f };
    real x[N*N], w[N*N], y[N*N];
    for (size_t i = 0; i < N*N; i++) x[i] = halves[i % 2], w[i] = i / N == i % N;
    for (int swapped = 0; swapped < 2 && in_bf16(); swapped++) {
        size_t wrong = 0;
        linear_forward(y, NULL, swapped ? w : x, (Weight){ swapped ? x : w, REAL, 0, NULL }, 1, N, N, N);
        for (size_t i = 0; i < N*N; i++) wrong += y[i] != rounded[(swapped ? i / N : i) % 2];
        check_equal(label("halves are rounded to even, as %s", swapped ? "weights" : "inputs"), wrong, 0);
    }
}
#endif

// An infinity among the weights reaches the output, by way of the panels and by way of one row.
static void test_linear_infinite(Dtype dtype, uint16_t infinity) {
    enum { N = 64, T = 8 };
    uint16_t weights[N*N] = { [3*N + 5] = infinity };
    real host[T*N], *x = device_take(T*N, sizeof *x, "x"), *y = device_take(T*N, sizeof *y, "y");
    void *w = device_take(N*N, sizeof *weights, "w");
    memory_copy_in(w, weights, sizeof weights);
    fill_uniform(x, 1, 1, 0, T*N);
    for (size_t rows = 1; rows <= T; rows += T - 1) {
        linear_forward(y, NULL, x, (Weight){ w, dtype, 0, NULL }, 1, rows, N, N);
        memory_copy_out(host, y, sizeof host);
        check_true(label("dtype %d, %zu rows: an infinite weight stays infinite, and alone", dtype, rows),
                   isinf(host[3]) && host[3] > 0 && host[2] == 0 && host[4] == 0);
    }
    memory_give(x), memory_give(y), memory_give(w);
}

static void test_linear(void) {
    static const struct { size_t T, n_out, n_in; double scale; } shapes[] = {
        { 0, 5, 3, 1 }, { 1, 1, 1, 1 }, { 1, 7, 1, 1 }, { 1, 1, 1031, 1 }, { 1, 263, 515, -0.37 }, { 7, 1, 13, 1 },
        { 7, 13, 1, 1 }, { 2, 3, 5, 0.5 }, { 6, 16, 256, 1 }, { 12, 32, 16, 1 }, { 7, 17, 257, -3 }, { 31, 33, 8, 1 },
        { 241, 5, 3, 1 }, { 3, 263, 8, 1 }, { 263, 263, 515, 1 },   // the last: past one block in every direction
    };
    for (int rounds = 0; rounds <= in_bf16(); rounds++)
        for (Dtype dtype = F64; dtype <= BF16; dtype++)
            for (size_t k = 0; k < COUNT(shapes); k++) {
                drawn_in_bf16 = in_bf16() && !rounds;
                test_linear_shape(dtype, shapes[k].T, shapes[k].n_out, shapes[k].n_in, shapes[k].scale,
                                  (int)((dtype + k) % 3), rounds ? 1e-2 : linear_tolerance);
            }
    drawn_in_bf16 = in_bf16();
    for (Dtype dtype = F64; dtype <= BF16; dtype++)
        for (int mode = 0; mode < 3; mode++)
            for (size_t T = 0; T < 20; T += T ? 12 : 1) test_linear_parts(dtype, T, mode, linear_tolerance);
    drawn_in_bf16 = false;
    test_linear_exact(F16);
    test_linear_exact(BF16);
    test_linear_infinite(F16, 0x7C00), test_linear_infinite(BF16, 0x7F80);
#if FAST
    test_linear_halves();
#endif
}

// ---- 2.3 Rows ----------------------------------------------------------------------------------------------------

static const double one_tolerance = TOLERANCE(1.2e-7, 3e-16);   // one operation for each number
static const double row_tolerance = TOLERANCE(1e-6, 2e-15);     // sums of up to 263 rows

static void test_embedding(Dtype dtype, size_t T, size_t V, size_t H) {
    TestArray *ids = random_ids(T, V), *table = random_of(dtype, V*H, 1), *x = unset_array(T*H);
    TestArray *dx = random_array(T*H, 1), *dtable = random_array(V*H, 1);
    embedding_forward(x->device, ids->device, (Weight){ table->device, dtype, 0, NULL }, T, H);
    embedding_backward(dtable->device, dx->device, ids->device, T, H);
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < H; i++) {
            x->host[t*H + i] = table->host[(size_t)ids->host[t]*H + i];
            dtable->host[(size_t)ids->host[t]*H + i] += dx->host[t*H + i];
        }
    expect(x, 0, "embedding_forward x, dtype %d T=%zu V=%zu H=%zu", dtype, T, V, H);
    expect(dtable, row_tolerance, "embedding_backward dtable, T=%zu V=%zu H=%zu", T, V, H);
    finish_arrays("embedding");
}

static void test_gather(size_t R, size_t T, size_t H) {
    TestArray *rows = random_ids(R, T), *x = random_array(T*H, 1), *out = unset_array(R*H);
    TestArray *dout = random_array(R*H, 1), *dx = random_array(T*H, 1);
    gather_forward(out->device, x->device, rows->device, R, H);
    gather_backward(dx->device, dout->device, rows->device, R, H);
    for (size_t r = 0; r < R; r++)
        for (size_t i = 0; i < H; i++) {
            out->host[r*H + i] = x->host[(size_t)rows->host[r]*H + i];
            dx->host[(size_t)rows->host[r]*H + i] += dout->host[r*H + i];
        }
    expect(out, 0, "gather_forward out, R=%zu H=%zu", R, H);
    expect(dx, row_tolerance, "gather_backward dx, R=%zu H=%zu", R, H);
    finish_arrays("gather");
}

static void test_bias(size_t T, size_t n) {
    TestArray *y = random_array(T*n, 1), *bias = random_array(n, 1);
    TestArray *dbias = random_array(n, 1), *dy = random_array(T*n, 1);
    bias_forward(y->device, bias->device, T, n);
    bias_backward(dbias->device, dy->device, T, n);
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < n; i++) {
            y->host[t*n + i] += bias->host[i];
            dbias->host[i] += dy->host[t*n + i];
        }
    expect(y, one_tolerance, "bias_forward y, T=%zu n=%zu", T, n);
    expect(dbias, row_tolerance, "bias_backward dbias, T=%zu n=%zu", T, n);
    finish_arrays("bias");
}

// The output may be either input.
static void test_add(size_t n) {
    TestArray *a = random_array(n, 1), *b = random_array(n, 1), *out = unset_array(n), *c = random_array(n, 1);
    TestArray *onto_a = random_array(n, 1), *onto_b = random_array(n, 1), *scaled = random_array(n, 1);
    add(out->device, a->device, b->device, n);
    add(onto_a->device, onto_a->device, c->device, n);
    add(onto_b->device, c->device, onto_b->device, n);
    scale_by(scaled->device, (real)-1.7, n);
    for (size_t i = 0; i < n; i++) {
        out->host[i] = a->host[i] + b->host[i];
        onto_a->host[i] += c->host[i];
        onto_b->host[i] += c->host[i];
        scaled->host[i] *= (double)(real)-1.7;
    }
    expect(out, one_tolerance, "add n=%zu", n);
    expect(onto_a, one_tolerance, "add onto a, n=%zu", n);
    expect(onto_b, one_tolerance, "add onto b, n=%zu", n);
    expect(scaled, one_tolerance, "scale_by n=%zu", n);
    finish_arrays("add");
}

static void test_rows(void) {
    static const struct { size_t T, V, H; } shapes[] = {
        { 0, 3, 5 }, { 1, 1, 1 }, { 7, 3, 63 }, { 5, 100, 64 }, { 263, 7, 131 }, { 3, 2, 515 },
    };
    for (size_t k = 0; k < COUNT(shapes); k++) {
        size_t T = shapes[k].T, V = shapes[k].V, H = shapes[k].H;
        for (Dtype dtype = F64; dtype <= BF16; dtype++) test_embedding(dtype, T, V, H);
        test_gather(T, V, H);
        test_bias(T, H);
        test_add(T*H);
    }
}

// ---- 2.5 RMSNorm -------------------------------------------------------------------------------------------------

static void test_rmsnorm_shape(size_t T, size_t H, double spread, bool frozen, int mode) {
    double eps = (double)(real)1e-5;
    TestArray *x = random_array(T*H, spread), *gain = random_array(H, 2), *dy = random_array(T*H, 1);
    TestArray *y = unset_array(T*H), *rms = unset_array(T), *dgain = random_array(H, 1), *from;
    TestArray *dx = output_from(T*H, mode, &from);
    rmsnorm_forward(y->device, rms->device, x->device, gain->device, (real)eps, T, H);
    naive_rmsnorm(y->host, rms->host, x->host, gain->host, eps, T, H);
    TestArray *kept = array_from(REAL, rms->host, T);       // the backward is judged by itself
    rmsnorm_backward(dx->device, device_of(from), frozen ? NULL : dgain->device, dy->device, x->device, gain->device,
                     kept->device, T, H);
    double *unused = alloc(H, sizeof *unused);
    naive_rmsnorm_backward(dx->host, frozen ? unused : dgain->host, dy->host, x->host, gain->host, kept->host, T, H);
    free(unused);
    double tolerance = TOLERANCE(6e-7, 2e-15), summed = TOLERANCE(4e-6, 6e-15);
    expect(y, tolerance, "rmsnorm_forward y, T=%zu H=%zu x to %g", T, H, spread);
    expect(rms, tolerance, "rmsnorm_forward rms, T=%zu H=%zu x to %g", T, H, spread);
    expect(dx, summed, "rmsnorm_backward dx, %s, T=%zu H=%zu x to %g", from_names[mode], T, H, spread);
    expect(dgain, summed, "rmsnorm_backward dgain%s, T=%zu H=%zu", frozen ? " (frozen)" : "", T, H);
    finish_arrays("rmsnorm");
}

static void test_rmsnorm(void) {
    static const size_t T[] = { 0, 1, 7, 263 }, H[] = { 1, 13, 64, 131 };
    for (size_t a = 0; a < COUNT(T); a++)
        for (size_t b = 0; b < COUNT(H); b++) test_rmsnorm_shape(T[a], H[b], 1, b == 1, (int)((a + b) % 3));
    test_rmsnorm_shape(3, 515, 100, false, 0);
    test_rmsnorm_shape(3, 67, 1e-3, false, 1);     // eps outweighs the mean square
    test_rmsnorm_shape(3, 67, 0, false, 1);        // rows of zeros
}

// ---- 2.6 Rotary positions ----------------------------------------------------------------------------------------

// The angle in the build's own rounding: in float at each step where Hugging Face rounds, else not at all.
static long double naive_angle(double theta, size_t pair, size_t n_rotated, size_t position) {
#ifdef GLMTUNE_DOUBLE
    return (long double)position * powl(theta, -2.0L * (long double)pair / (long double)n_rotated);
#else
    float exponent = (float)(2 * pair) / (float)n_rotated, power = (float)pow(theta, (double)exponent);
    float inv_freq = 1.0f / power, angle = (float)position * inv_freq;
    return (long double)angle;
#endif
}

static void test_rope_table(double theta, size_t n_rotated, size_t n_positions) {
    TestArray *table = unset_array(n_positions * n_rotated);
    rope_table(table->device, theta, n_rotated, n_positions);
    for (size_t p = 0; p < n_positions; p++)
        for (size_t j = 0; j < n_rotated / 2; j++) {
            long double angle = naive_angle(theta, j, n_rotated, p);
            table->host[p*n_rotated + 2*j] = (double)cosl(angle);
            table->host[p*n_rotated + 2*j + 1] = (double)sinl(angle);
        }
    // in double the rounding of an angle of up to 8192 radians is what is left
    expect(table, TOLERANCE(1e-7, 2.5e-12), "rope_table theta %g, %zu rotated, %zu positions", theta, n_rotated,
           n_positions);
    finish_arrays("rope_table");
}

static void test_rope_shape(size_t T, size_t n_heads, size_t head_dim, size_t n_rotated) {
    enum { POSITIONS = 50 };
    TestArray *positions = random_ids(T, POSITIONS), *table = random_array(POSITIONS * n_rotated, 1);
    TestArray *x = random_array(T*n_heads*head_dim, 1), *dx = random_array(T*n_heads*head_dim, 1);
    rope_forward(x->device, positions->device, table->device, T, n_heads, head_dim, n_rotated);
    rope_backward(dx->device, positions->device, table->device, T, n_heads, head_dim, n_rotated);
    naive_rope(x->host, positions->host, table->host, false, T, n_heads, head_dim, n_rotated);
    naive_rope(dx->host, positions->host, table->host, true, T, n_heads, head_dim, n_rotated);
    double tolerance = TOLERANCE(2e-7, 5e-16);
    expect(x, tolerance, "rope_forward x, T=%zu heads=%zu of %zu, %zu rotated", T, n_heads, head_dim, n_rotated);
    expect(dx, tolerance, "rope_backward dx, T=%zu heads=%zu of %zu, %zu rotated", T, n_heads, head_dim, n_rotated);
    finish_arrays("rope");
}

static void test_rope(void) {
    test_rope_table(10000, 64, 8192);
    test_rope_table(10000 * 50, 10, 513);
    test_rope_table(1e4, 2, 1);
    test_rope_shape(0, 2, 4, 2);
    test_rope_shape(1, 1, 2, 2);
    test_rope_shape(7, 3, 13, 6);
    test_rope_shape(241, 2, 128, 64);
    test_rope_shape(5, 4, 64, 64);
}

// ---- 2.7 Attention -----------------------------------------------------------------------------------------------

// Where the sequences begin: the running sum of the lengths, and of the past when `keys`; [n_sequences+1].
static TestArray *starts_of(const AttentionCase *c, bool keys) {
    double starts[COUNT(c->lengths) + 1] = {0};
    for (size_t b = 0; b < c->n_sequences; b++)
        starts[b+1] = starts[b] + (double)c->lengths[b] + (keys ? (double)c->past[b] : 0);
    return array_from(I64, starts, c->n_sequences + 1);
}

static size_t rows_of(const TestArray *starts) { return (size_t)starts->host[starts->n - 1]; }

// Everything one case works on. A prefix of no rows is given as NULL.
typedef struct {
    AttentionShape shape;
    TestArray *q, *k, *v, *prefix_k, *prefix_v;
    void *device_prefix_k, *device_prefix_v;
} AttentionArrays;

static AttentionArrays attention_arrays(const AttentionCase *c, double spread) {
    TestArray *starts = starts_of(c, false), *kv_starts = starts_of(c, true);
    size_t width = c->n_kv_heads * c->head_dim, prefix = c->n_prefix * width;
    size_t longest = 0;
    bool one_array = spread == 1;       // may be, where there are no earlier keys: with spread 1 it is
    for (size_t b = 0; b < c->n_sequences; b++)
        longest = max_size(longest, c->lengths[b]), one_array = one_array && !c->past[b];
    AttentionArrays a = { .shape = { c->n_sequences, c->n_heads, c->n_kv_heads, c->head_dim, c->n_prefix,
                                     rows_of(starts), longest, starts->device, one_array ? starts->device : kv_starts->device },
                          .q = random_array(rows_of(starts) * c->n_heads * c->head_dim, spread),
                          .k = random_array(rows_of(kv_starts) * width, 1),
                          .v = random_array(rows_of(kv_starts) * width, 1),
                          .prefix_k = random_array(prefix, 1), .prefix_v = random_array(prefix, 1) };
    a.device_prefix_k = prefix ? a.prefix_k->device : NULL;
    a.device_prefix_v = prefix ? a.prefix_v->device : NULL;
    return a;
}

static const char *attention_label(const AttentionCase *c, double spread) {
    return label("heads %zu/%zu of %zu, prefix %zu, lengths %zu,%zu,%zu, past %zu, q to %g", c->n_heads, c->n_kv_heads,
                 c->head_dim, c->n_prefix, c->lengths[0], c->lengths[1], c->lengths[2], c->past[0], spread);
}

static void test_attention_forward(const AttentionCase *c, double spread, double tolerance) {
    AttentionArrays a = attention_arrays(c, spread);
    AttentionInputs in = { a.q->host, a.k->host, a.v->host, a.prefix_k->host, a.prefix_v->host };
    TestArray *out = unset_array(a.q->n), *lse = unset_array(a.q->n / c->head_dim);
    attention_forward(out->device, lse->device, a.q->device, a.k->device, a.v->device, a.device_prefix_k,
                      a.device_prefix_v, a.shape);
    if (test_pass == 0) naive_attention(out->host, lse->host, NULL, NULL, c, in);
    expect(out, tolerance, "attention_forward out, %s", attention_label(c, spread));
    // scores of some hundreds carry an error of their own size into lse
    expect(lse, spread > 1 ? TOLERANCE(2e-6, 6e-15) : TOLERANCE(6e-7, 3e-15), "attention_forward lse, %s",
           attention_label(c, spread));
    finish_arrays("attention_forward");
}

// What is asked for: all gradients, all but the prefix's, or all but those of keys and of the prefix's values.
enum { ALL_GRADIENTS, PREFIX_FROZEN, NO_KEYS };

static void test_attention_backward(const AttentionCase *c, double spread, double tolerance, int asked) {
    AttentionArrays a = attention_arrays(c, spread);
    AttentionInputs in = { a.q->host, a.k->host, a.v->host, a.prefix_k->host, a.prefix_v->host };
    double *out_host = alloc(a.q->n, sizeof *out_host), *lse_host = alloc(a.q->n, sizeof *lse_host);
    naive_attention(out_host, lse_host, NULL, NULL, c, in);
    TestArray *out = array_from(REAL, out_host, a.q->n), *lse = array_from(REAL, lse_host, a.q->n / c->head_dim);
    TestArray *dout = random_array(a.q->n, 1), *d[5];
    size_t sizes[] = { a.q->n, a.k->n, a.v->n, a.prefix_k->n, a.prefix_v->n };
    bool given[] = { true, asked != NO_KEYS, true, c->n_prefix && asked != PREFIX_FROZEN,
                     c->n_prefix && asked == ALL_GRADIENTS };
    double *host[5];
    for (size_t i = 0; i < 5; i++) {
        d[i] = unset_array(sizes[i]), host[i] = alloc(sizes[i], sizeof **host);
        d[i]->least = 1;        // where p is nearly 0 or 1, little is left of large terms
    }
    #define GIVEN_ARRAY(i) (given[i] ? d[i]->device : NULL)
    size_t n_scratch = 2 * (a.q->n + c->n_prefix * c->n_heads * c->head_dim);
    real *scratch = memory_take(n_scratch * sizeof *scratch);
    fill_uniform(scratch, 1, 0, 1, n_scratch);              // what lies there before does not matter
    attention_backward(d[0]->device, GIVEN_ARRAY(1), GIVEN_ARRAY(2), GIVEN_ARRAY(3), GIVEN_ARRAY(4), scratch,
                       dout->device, out->device, lse->device, a.q->device, a.k->device, a.v->device, a.device_prefix_k,
                       a.device_prefix_v, a.shape);
    AttentionGradients sums = { host[0], host[1], host[2], host[3], host[4] };
    if (test_pass == 0) naive_attention(NULL, NULL, &sums, dout->host, c, in);
    static const char *const names[] = { "dq", "dk", "dv", "dprefix_k", "dprefix_v" };
    static const char *const without[] = { "", " (prefix frozen)", " (no dk, no dprefix_v)" };
    for (size_t i = 0; i < 5; i++) {        // what is not given must stay as it was: finish_arrays looks
        if (given[i]) memcpy(d[i]->host, host[i], sizes[i] * sizeof **host);
        if (given[i])
            expect(d[i], tolerance, "attention_backward %s%s, %s", names[i], without[asked],
                   attention_label(c, spread));
        free(host[i]);
    }
    free(out_host), free(lse_host);
    memory_give(scratch);
    finish_arrays("attention_backward");
}

static void test_attention(void) {
    static const AttentionCase cases[] = {
        // sequences, heads, kv heads, head_dim, prefix, lengths, keys before the queries (forward only)
        { 1, 1, 1, 1, 0, { 1 }, {0} },
        { 1, 2, 1, 7, 0, { 7 }, {0} },
        { 1, 4, 2, 64, 5, { 0 }, {0} },
        { 0, 4, 2, 8, 5, { 0 }, {0} },
        { 3, 4, 1, 16, 1, { 1, 1, 1 }, {0} },
        { 4, 16, 1, 31, 5, { 5, 0, 3, 67 }, {0} },
        { 5, 6, 3, 33, 70, { 0, 1, 66, 0, 2 }, {0} },
        { 2, 32, 2, 8, 1, { 129, 31 }, {0} },
        { 3, 2, 2, 128, 5, { 13, 1, 64 }, {0} },
        { 1, 8, 2, 257, 0, { 65 }, {0} },
        { 3, 4, 2, 16, 0, { 1, 1, 1 }, { 130, 0, 3 } },
        { 4, 16, 1, 33, 5, { 30, 0, 1, 47 }, { 1, 9, 64, 63 } },
        { 2, 2, 1, 31, 70, { 5, 2 }, { 1, 200 } },
    };
    drawn_in_bf16 = in_bf16();
    for (size_t k = 0; k < COUNT(cases); k++) {
        // q to 200 gives scores of some hundreds: exp() of one overflows, and nearly every p is 0 or 1
        test_attention_forward(&cases[k], 1, PRODUCTS(1e-6, 3e-15, 5e-3));
        test_attention_forward(&cases[k], 200, PRODUCTS(5e-5, 2e-13, 5e-3));
        bool cache = false;
        for (size_t b = 0; b < cases[k].n_sequences; b++) cache = cache || cases[k].past[b];
        if (cache) continue;
        test_attention_backward(&cases[k], 1, PRODUCTS(7e-6, 1.5e-14, 5e-3), ALL_GRADIENTS);
        test_attention_backward(&cases[k], 1, PRODUCTS(7e-6, 1.5e-14, 5e-3), PREFIX_FROZEN);
        test_attention_backward(&cases[k], 1, PRODUCTS(7e-6, 1.5e-14, 5e-3), NO_KEYS);
        test_attention_backward(&cases[k], 200, PRODUCTS(5e-5, 5e-13, 5e-3), ALL_GRADIENTS);
    }
    drawn_in_bf16 = false;
}

// ---- 2.8 SwiGLU --------------------------------------------------------------------------------------------------

static void test_swiglu(void) {
    static const struct { size_t T, F; double spread; } shapes[] = {
        { 0, 3, 1 }, { 1, 1, 1 }, { 7, 13, 4 }, { 263, 131, 4 }, { 3, 515, 1 },
        { 2, 300, 200 },    // exp(-g) overflows
    };
    for (size_t k = 0; k < COUNT(shapes); k++) {
        size_t T = shapes[k].T, F = shapes[k].F;
        TestArray *gate_up = random_array(T*2*F, shapes[k].spread), *h = unset_array(T*F), *dh = random_array(T*F, 1);
        TestArray *dgate_up = unset_array(T*2*F);
        swiglu_forward(h->device, gate_up->device, T, F);
        swiglu_backward(dgate_up->device, dh->device, gate_up->device, T, F);
        naive_swiglu(h->host, gate_up->host, T, F);
        memset(dgate_up->host, 0, T*2*F * sizeof *dgate_up->host), dgate_up->least = 0.1;
        naive_swiglu_backward(dgate_up->host, dh->host, gate_up->host, T, F);
        expect(h, TOLERANCE(6e-7, 6e-16), "swiglu_forward h, T=%zu F=%zu to %g", T, F, shapes[k].spread);
        expect(dgate_up, TOLERANCE(1.2e-6, 6e-16), "swiglu_backward dgate_up, T=%zu F=%zu to %g", T, F,
               shapes[k].spread);
        finish_arrays("swiglu");
    }
}

// ---- 2.9 Activations and gains -----------------------------------------------------------------------------------

static double naive_activation(Activation f, double x, bool slope) {
    double z = 1 / (1 + exp(-x)), rest = 1 / (1 + exp(x));      // 1 - z, without the digits that it would lose
    if (f == RELU) return x > 0 ? slope ? 1 : x : 0;
    if (f == TANH) return slope ? 1 - tanh(x) * tanh(x) : tanh(x);
    return slope ? z + x * z * rest : x * z;
}

static void test_activation(Activation f, size_t n, double spread) {
    TestArray *x = random_array(n, spread), *y = unset_array(n), *dy = random_array(n, 1), *dx = unset_array(n);
    TestArray *same = random_array(n, spread), *same_dy = random_array(n, 1);
    dx->least = same_dy->least = 1;     // a slope's own size
    activation_forward(y->device, x->device, f, n);
    activation_backward(dx->device, dy->device, x->device, f, n);
    activation_backward(same_dy->device, same_dy->device, x->device, f, n);
    activation_forward(same->device, same->device, f, n);
    for (size_t i = 0; i < n; i++) {
        y->host[i] = naive_activation(f, x->host[i], false);
        dx->host[i] = dy->host[i] * naive_activation(f, x->host[i], true);
        same_dy->host[i] *= naive_activation(f, x->host[i], true);
        same->host[i] = naive_activation(f, same->host[i], false);
    }
    expect(y, TOLERANCE(6e-7, 6e-16), "activation_forward %d, n=%zu to %g", f, n, spread);
    expect(dx, TOLERANCE(6e-7, 6e-16), "activation_backward %d, n=%zu to %g", f, n, spread);
    expect(same_dy, TOLERANCE(6e-7, 6e-16), "activation_backward %d in place, n=%zu to %g", f, n, spread);
    expect(same, TOLERANCE(6e-7, 6e-16), "activation_forward %d in place, n=%zu to %g", f, n, spread);
    finish_arrays("activation");
}

static void test_gain(size_t T, size_t n) {
    TestArray *x = random_array(T*n, 1), *gain = random_array(n, 1), *y = unset_array(T*n), *same = random_array(T*n, 1);
    TestArray *dy = random_array(T*n, 1), *dgain = random_array(n, 1);
    gain_forward(y->device, x->device, gain->device, T, n);
    gain_forward(same->device, same->device, gain->device, T, n);
    gain_backward(dgain->device, dy->device, x->device, T, n);
    for (size_t i = 0; i < T*n; i++) {
        y->host[i] = x->host[i] * gain->host[i % n];
        same->host[i] *= gain->host[i % n];
        dgain->host[i % n] += dy->host[i] * x->host[i];
    }
    expect(y, TOLERANCE(1e-7, 3e-16), "gain_forward, T=%zu n=%zu", T, n);
    expect(same, TOLERANCE(1e-7, 3e-16), "gain_forward in place, T=%zu n=%zu", T, n);
    expect(dgain, TOLERANCE(2e-6, 4e-15), "gain_backward, T=%zu n=%zu", T, n);
    finish_arrays("gain");
}

static void test_method_pieces(void) {
    static const struct { size_t T, n; } shapes[] = { { 0, 5 }, { 1, 1 }, { 7, 13 }, { 241, 515 } };
    for (Activation f = RELU; f <= SWISH; f++) {
        for (size_t k = 0; k < COUNT(shapes); k++) test_activation(f, shapes[k].T * shapes[k].n, k & 1 ? 1 : 4);
        test_activation(f, 300, 200);       // exp(-x) overflows
    }
    for (size_t k = 0; k < COUNT(shapes); k++) test_gain(shapes[k].T, shapes[k].n);
    real nan = (real)NAN, *x = memory_take(sizeof *x);
    for (Activation f = RELU; f <= SWISH; f++) {
        memory_copy_in(x, &nan, sizeof nan);
        activation_forward(x, x, f, 1);
        real got;
        memory_copy_out(&got, x, sizeof got);
        check_true(label("activation %d of NaN is NaN", f), isnan(got));
    }
    memory_give(x);
}

// ---- 2.10 Dropout ------------------------------------------------------------------------------------------------

// The mask is part of the contract: rng_uniform of (key of token and site, feature), so that every port draws the same.
static void test_dropout_shape(const double *keys, double p, uint64_t site, size_t T, size_t n) {
    TestArray *token_keys = array_from(I64, keys, T), *x = random_array(T*n, 1), *y = unset_array(T*n);
    TestArray *dy = random_array(T*n, 1), *dx = random_array(T*n, 1);
    dropout_forward(y->device, x->device, token_keys->device, site, (real)p, T, n);
    dropout_backward(dx->device, dy->device, token_keys->device, site, (real)p, T, n);
    size_t kept = 0;
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < n; i++) {
            bool keep = rng_uniform(rng_key((uint64_t)keys[t], site), i) >= (float)p;
            y->host[t*n + i] = keep ? x->host[t*n + i] / (1 - (double)(real)p) : 0;
            dx->host[t*n + i] += keep ? dy->host[t*n + i] / (1 - (double)(real)p) : 0;
            kept += keep;
        }
    double share = (double)kept / (double)(T*n), deviation = sqrt(p * (1 - p) / (double)(T*n));
    if (T*n > 10000) check_true(label("dropout %g keeps %g", p, share), fabs(share - (1 - p)) <= 4 * deviation);
    expect(y, TOLERANCE(3e-7, 6e-16), "dropout_forward y, p=%g T=%zu n=%zu", p, T, n);
    expect(dx, TOLERANCE(3e-7, 6e-16), "dropout_backward dx, p=%g T=%zu n=%zu", p, T, n);
    finish_arrays("dropout");
}

// Bit i of the result: feature i of a token with this key was kept, seen by dropping ones.
static uint64_t dropout_mask(double key, uint64_t site, size_t T, size_t at) {
    enum { N = 64 };
    double *keys = alloc(T, sizeof *keys), *ones = alloc(T*N, sizeof *ones);
    for (size_t t = 0; t < T; t++) keys[t] = t == at ? key : 1000 + (double)t;
    for (size_t i = 0; i < T*N; i++) ones[i] = 1;
    TestArray *token_keys = array_from(I64, keys, T), *x = array_from(REAL, ones, T*N), *y = unset_array(T*N);
    real got[N];
    dropout_forward(y->device, x->device, token_keys->device, site, (real)0.5, T, N);
    memory_copy_out(got, (real *)y->device + at*N, sizeof got);
    uint64_t mask = 0;
    for (size_t i = 0; i < N; i++) mask |= (uint64_t)(got[i] != 0) << i;
    y->spent = true;
    free(keys), free(ones);
    finish_arrays("dropout");
    return mask;
}

static void test_dropout(void) {
    enum { MOST = 241 };
    double keys[MOST];
    for (size_t t = 0; t < MOST; t++) keys[t] = floor((test_random() + 1) * 0x1p52);    // all of it fits in a double
    keys[5] = keys[2];
    static const struct { size_t T, n; double p; } shapes[] = {
        { 0, 5, 0.5 }, { 1, 1, 0.5 }, { 7, 13, 0 }, { 7, 13, 0.9 }, { 241, 515, 0.1 }, { 100, 257, 0.5 },
    };
    for (size_t k = 0; k < COUNT(shapes); k++) test_dropout_shape(keys, shapes[k].p, 17 + k, shapes[k].T, shapes[k].n);
    uint64_t mask = dropout_mask(7, 3, 1, 0);
    check_true("a mask does not depend on the number of tokens or the token's place", mask == dropout_mask(7, 3, 9, 6));
    check_true("a mask depends on the token's key", mask != dropout_mask(8, 3, 1, 0));
    check_true("a mask depends on the site", mask != dropout_mask(7, 4, 1, 0));
}

// ---- 2.11 Cross-entropy ------------------------------------------------------------------------------------------

static void test_cross_entropy_shape(size_t R, size_t V, double spread, double smoothing, double scale) {
    TestArray *logits = random_array(R*V, spread), *targets = random_ids(R, V), *loss = unset_array(R);
    double *dlogits = alloc(R*V, sizeof *dlogits), e = (double)(real)smoothing;
    if (spread == 80) for (size_t i = 0; i < R*V; i++) logits->host[i] = logits->host[i] < 0 ? -80 : 80;
    test_encode(logits->start + GUARD, REAL, logits->host, R*V);
    memory_copy_in(logits->device, logits->start + GUARD, R*V * sizeof(real));
    cross_entropy(loss->device, logits->device, targets->device, (real)smoothing, (real)scale, R, V);
    naive_cross_entropy(loss->host, dlogits, logits->host, targets->host, e, (double)(real)scale, R, V);
    const char *shape = label("R=%zu V=%zu to %g smoothing %g scale %g", R, V, spread, smoothing, scale);
    expect(loss, TOLERANCE(5e-7, 4e-15), "cross_entropy loss, %s", shape);
    memcpy(logits->host, dlogits, R*V * sizeof *dlogits);
    logits->least = scale * 0.1;    // p - q, where both are about 1, is not small by its own measure
    if (scale != 0) expect(logits, TOLERANCE(5e-7, 4e-15), "cross_entropy dlogits, %s", shape);
    logits->spent = true;           // with scale 0 their content is not defined
    free(dlogits);
    finish_arrays("cross_entropy");
}

// A logit that is NaN must reach the loss of its row, wherever it stands, and no other row's.
static void test_cross_entropy_nan(size_t at) {
    double logits[6] = { 1, 2, 3, 4, 5, 6 };
    logits[at] = (double)NAN;
    TestArray *z = array_from(REAL, logits, 6), *targets = array_from(I32, (double[]){ 1, 1 }, 2);
    TestArray *loss = unset_array(2);
    real got[2];
    cross_entropy(loss->device, z->device, targets->device, 0, 1, 2, 3);
    memory_copy_out(got, loss->device, sizeof got);
    check_true(label("cross_entropy: NaN at %zu is seen in its row alone", at), isnan(got[0]) && isfinite(got[1]));
    z->spent = loss->spent = true;
    finish_arrays("cross_entropy");
}

static void test_cross_entropy(void) {
    static const struct { size_t R, V; } shapes[] = { { 0, 5 }, { 1, 1 }, { 3, 1 }, { 7, 13 }, { 131, 1000 },
                                                      { 2, 65024 } };
    static const double spreads[] = { 5, 80 }, smoothings[] = { 0, 0.1 }, scales[] = { 1, 0.0037, 0 };
    for (size_t k = 0; k < COUNT(shapes); k++)
        for (size_t a = 0; a < COUNT(spreads); a++)
            for (size_t b = 0; b < COUNT(smoothings); b++)
                for (size_t c = 0; c < COUNT(scales); c++)
                    test_cross_entropy_shape(shapes[k].R, shapes[k].V, spreads[a], smoothings[b], scales[c]);
    for (size_t at = 0; at < 3; at++) test_cross_entropy_nan(at);
}

// Whatever is computed from NaN is NaN, with any payload: a polynomial that takes its bits apart must not lose it.
static void test_cross_entropy_payloads(void) {
    enum { V = 5 };
    const int32_t target = 1;
    for (uint32_t payload = 1; payload < 1 << 22; payload *= 2) {
        uint32_t bits = 0x7FC00000u | payload;
        float nan;
        memcpy(&nan, &bits, sizeof nan);
        real logits[V] = { 0, 1, 2, 3, (real)nan }, loss = 0;
        real *device = memory_take(sizeof logits + sizeof loss);
        int32_t *targets = memory_take(sizeof target);
        memory_copy_in(device, logits, sizeof logits);
        memory_copy_in(targets, &target, sizeof target);
        cross_entropy(device + V, device, targets, 0, 1, 1, V);
        memory_copy_out(&loss, device + V, sizeof loss);
        check_true(label("cross_entropy: NaN with payload %x gives a loss of %g", payload, (double)loss), isnan(loss));
        memory_give(device), memory_give(targets);
    }
}

// ---- 2.12 Optimizer steps ----------------------------------------------------------------------------------------

static void test_adamw(size_t n, double weight_decay) {
    double lr = 0.01, b1 = 0.9, b2 = 0.999, eps = 1e-8, decay = 1 - lr * weight_decay;
    TestArray *w = random_array(n, 1), *m = random_array(n, 0), *v = random_array(n, 0);
    m->least = 0.1;         // gradients of both signs may leave little of m
    for (int t = 1; t <= 5; t++) {
        TestArray *g = random_array(n, t == 3 ? 1e-6 : 1);
        double c1 = 1 - pow(b1, t), c2 = 1 - pow(b2, t);
        adamw_step(w->device, g->device, m->device, v->device, lr, decay, b1, b2, eps, c1, c2, n);
        for (size_t i = 0; i < n; i++) {
            m->host[i] = b1 * m->host[i] + (1 - b1) * g->host[i];
            v->host[i] = b2 * v->host[i] + (1 - b2) * g->host[i] * g->host[i];
            w->host[i] = w->host[i] * decay - lr * (m->host[i] / c1) / (sqrt(v->host[i] / c2) + eps);
        }
        expect(w, TOLERANCE(6e-7, 8e-16), "adamw_step %d w, n=%zu decay %g", t, n, weight_decay);
        expect(m, TOLERANCE(6e-7, 8e-16), "adamw_step %d m, n=%zu", t, n);
        expect(v, TOLERANCE(6e-7, 8e-16), "adamw_step %d v, n=%zu", t, n);
    }
    finish_arrays("adamw_step");
}

static void test_sgd(size_t n, double weight_decay) {
    double lr = 0.01, momentum = 0.9;
    TestArray *w = random_array(n, 1), *b = random_array(n, 0);
    b->least = 0.1;
    for (int t = 1; t <= 5; t++) {
        TestArray *g = random_array(n, t == 3 ? 1e-6 : 1);
        sgd_step(w->device, g->device, b->device, lr, weight_decay, momentum, n);
        for (size_t i = 0; i < n; i++) {
            b->host[i] = momentum * b->host[i] + g->host[i] + weight_decay * w->host[i];
            w->host[i] -= lr * b->host[i];
        }
        expect(w, TOLERANCE(6e-7, 8e-16), "sgd_step %d w, n=%zu decay %g", t, n, weight_decay);
        expect(b, TOLERANCE(6e-7, 8e-16), "sgd_step %d buffer, n=%zu", t, n);
    }
    finish_arrays("sgd_step");
}

// The gradient of the first number is 0 throughout, and it must stay where it is but for the decay.
static void test_lion(size_t n, double weight_decay) {
    double lr = 0.01, b1 = 0.9, b2 = 0.99, decay = 1 - lr * weight_decay;
    TestArray *w = random_array(n, 1), *m = random_array(n, 0);
    m->least = 0.1;
    for (int t = 1; t <= 5; t++) {
        TestArray *g = random_array(n, 1);
        if (n) zero(g->device, 1), g->host[0] = 0, memset(g->start + GUARD, 0, sizeof(real));
        lion_step(w->device, g->device, m->device, lr, decay, b1, b2, n);
        for (size_t i = 0; i < n; i++) {
            double direction = b1 * m->host[i] + (1 - b1) * g->host[i];
            w->host[i] = w->host[i] * decay - (direction > 0 ? lr : direction < 0 ? -lr : 0);
            m->host[i] = b2 * m->host[i] + (1 - b2) * g->host[i];
        }
        expect(w, TOLERANCE(6e-7, 8e-16), "lion_step %d w, n=%zu decay %g", t, n, weight_decay);
        expect(m, TOLERANCE(6e-7, 8e-16), "lion_step %d m, n=%zu", t, n);
    }
    finish_arrays("lion_step");
}

// Of one array, and of three in one call, the middle one empty. A device without double adds up in float, in parts.
static void test_sum_of_squares(size_t n) {
    TestArray *x = random_array(n, 1), *y = random_array(1000, 3);
    const real *arrays[] = { x->device, y->device, y->device };
    size_t sizes[] = { n, 0, y->n };
    long double sum = 0, more = 0;
    for (size_t i = 0; i < n; i++) sum += (long double)x->host[i] * x->host[i];
    for (size_t i = 0; i < y->n; i++) more += (long double)y->host[i] * y->host[i];
    expect_number(label("sum_of_squares n=%zu", n), sum_of_squares(arrays, sizes, 1), (double)sum, 1e-6);
    expect_number(label("sum_of_squares of %zu, 0 and 1000", n), sum_of_squares(arrays, sizes, 3), (double)(sum + more),
                  1e-6);
    expect_number("sum_of_squares of nothing", sum_of_squares(NULL, NULL, 0), 0, 0);
    finish_arrays("sum_of_squares");
}

static size_t first_with(TestArray *x, size_t i, double bad, size_t j, double worse) {
    // x with two other elements for once
    real *values = alloc(x->n, sizeof *values);
    memcpy(values, x->start + GUARD, x->n * sizeof *values);
    values[j] = (real)worse;
    values[i] = (real)bad;
    memory_copy_in(x->device, values, x->n * sizeof *values);
    size_t first = first_not_finite(x->device, x->n);
    memory_copy_in(x->device, x->start + GUARD, x->n * sizeof *values);
    free(values);
    return first;
}

static void test_first_not_finite(size_t n) {
    TestArray *x = random_array(n, 1);
    double inf = (double)INFINITY;
    check_equal(label("first_not_finite, all good, n=%zu", n), first_not_finite(x->device, n), n);
    size_t places[] = { 0, n / 2, n - 1 };
    for (size_t k = 0; n && k < COUNT(places); k++) {
        size_t i = places[k];
        check_equal(label("first_not_finite, NaN, n=%zu", n), first_with(x, i, (double)NAN, n - 1, (double)NAN), i);
        check_equal(label("first_not_finite, inf, n=%zu", n), first_with(x, i, inf, i, inf), i);
        check_equal(label("first_not_finite, -inf, n=%zu", n), first_with(x, i, -inf, n - 1, (double)NAN), i);
    }
    finish_arrays("first_not_finite");
}

static void test_optimizer(void) {
    static const size_t n[] = { 0, 1, 255, 256, 100003 };
    for (size_t k = 0; k < COUNT(n); k++) {
        test_adamw(n[k], k % 2 ? 0.1 : 0);
        test_sgd(n[k], k % 2 ? 0.1 : 0);
        test_lion(n[k], k % 2 ? 0.1 : 0);
        test_sum_of_squares(n[k]);
        test_first_not_finite(n[k]);
    }
}

// ---- All of them -------------------------------------------------------------------------------------------------

static void test_narrow(void) {
    test_narrow_half(F16), test_narrow_half(BF16), test_narrow_nan(F16), test_narrow_nan(BF16);
    test_narrow_wide(F32), test_narrow_wide(F64);
}

static void test_widen(void) {
    test_widen_half(F16), test_widen_half(BF16), test_widen_wide(F32), test_widen_wide(F64);
}

// Each begins its random numbers anew, so that what one draws does not change what the next is tested with.
static void test_all_kernels(void) {
    static void (*const tests[])(void) = {
        test_memory, test_widen, test_narrow, test_fill_uniform, test_fill_normal, test_linear, test_codes, test_rows,
        test_rmsnorm, test_rope, test_attention, test_swiglu, test_method_pieces, test_dropout, test_cross_entropy,
        test_optimizer };
    for (size_t i = 0; i < COUNT(tests); i++) test_drawn = 0, tests[i]();
    if (test_pass == 0) test_cross_entropy_payloads();
}

static void test_kernels(void) {
    test_naive_linear(), test_naive_rmsnorm(), test_naive_attention(), test_naive_elements();
#ifdef _OPENMP
    int threads = omp_get_max_threads();
#endif
    for (test_pass = 0; test_pass < 3; test_pass++) {
#ifdef _OPENMP
        omp_set_num_threads(test_pass + 1);
#endif
        record_at = 0;
        test_all_kernels();
    }
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    for (size_t i = 0; i < n_record; i++) free(test_record[i].bytes);
    free(test_record);
}
