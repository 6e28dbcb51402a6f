// The harness of all tests: a few checks that count, say what is wrong, and fail on NaN.
//
// A check that holds prints nothing; with GLM_VERBOSE in the environment it prints the error it measured beside its
// tolerance, so that a tolerance can be judged: it should be a few times the error, no more. A check that fails prints
// the tensor, the worst index, both numbers, the error and the tolerance. check_summary prints the closing line.
#ifndef CHECK_H
#define CHECK_H

// Every group of tests gives one tolerance for the float build and one for the double build.
#ifdef GLMTUNE_DOUBLE
#define TOLERANCE(in_float, in_double) (in_double)
#else
#define TOLERANCE(in_float, in_double) (in_float)
#endif

// GLM_PRECISION=bf16 asks for operands of products that are rounded, and what products bear on has then a tolerance of
// its own; GLM_PRECISION=pairs for the same by the instruction on pairs, where there is a faster one.
static bool in_bf16(void) {
#if defined GLMTUNE_CUDA || FAST
    const char *precision = getenv("GLM_PRECISION");
    return precision && strcmp(precision, "fp32");
#else
    return false;
#endif
}

static void choose_precision(void) {
    set_precision(in_bf16());
#if FAST
    if (in_bf16() && !strcmp(getenv("GLM_PRECISION"), "pairs")) packing = in_vectors;
#endif
}
#define PRODUCTS(in_float, in_double, bf16) (in_bf16() ? (bf16) : TOLERANCE(in_float, in_double))

#define TINY 1e-300     // what an error is divided by when all that is wanted is 0

static size_t checks_passed, checks_failed, checks_skipped;

// A formatted name for a check; valid until a few more have been made.
__attribute__((format(printf, 1, 2))) static const char *label(const char *format, ...) {
    static char text[8][256];
    static size_t next;
    char *into = text[next++ % COUNT(text)];
    va_list args;
    va_start(args, format);
    vsnprintf(into, sizeof text[0], format, args);
    va_end(args);
    return into;
}

static bool check_verbose(void) {
    static int verbose = -1;
    if (verbose < 0) verbose = getenv("GLM_VERBOSE") != NULL;
    return verbose;
}

static bool check_true(const char *what, bool condition) {
    if (condition) checks_passed++;
    else checks_failed++;
    if (!condition || check_verbose()) printf("%-6s %s\n", condition ? "ok" : "FAILED", what);
    fflush(stdout);         // what comes next may crash
    return condition;
}

static void check_skipped(const char *what, const char *why) {
    checks_skipped++;
    printf("%-6s %s: %s\n", "skip", what, why);
}

// For counts, indices and ids.
static bool check_equal(const char *what, size_t got, size_t want) {
    return check_true(label("%s: got %zu, want %zu", what, got, want), got == want);
}

// Number i of an array of double, float or 16-bit patterns.
static double check_value(const void *array, size_t size, size_t i) {
    if (size == sizeof(double)) return ((const double *)array)[i];
    return size == sizeof(float) ? (double)((const float *)array)[i] : (double)((const uint16_t *)array)[i];
}

static bool check_error(const char *what, const char *measure, size_t at, double got, double want, double error,
                        double tolerance) {
    bool good = error <= tolerance;         // not "fails if greater": NaN is no number that passes
    if (good) checks_passed++;
    else checks_failed++;
    if (!good || check_verbose())
        printf("%-6s %s: %s error %.3g, tolerance %.3g, worst at [%zu]: got %.17g, want %.17g\n",
               good ? "ok" : "FAILED", what, measure, error, tolerance, at, got, want);
    fflush(stdout);
    return good;
}

// Error of the whole: max |got - want| / max |want|, or, with `l2`, |got - want| / |want| as vectors. What it is
// divided by is at least `least`. Index of the worst element, or of the first whose difference is NaN, in *at.
static double check_measure(const void *got, size_t size, const double *want, size_t n, bool l2, double least,
                            size_t *at) {
    double worst = 0, largest = least, squares = 0, want_squares = 0;
    *at = 0;
    for (size_t i = 0; i < n; i++) {
        double diff = fabs(check_value(got, size, i) - want[i]);
        if (!(diff <= worst) && worst == worst) worst = diff, *at = i;
        largest = fmax(largest, fabs(want[i]));
        squares += diff * diff;
        want_squares += want[i] * want[i];
    }
    return l2 ? sqrt(squares) / fmax(sqrt(want_squares), least) : worst / largest;
}

static bool check_arrays(const char *what, const void *got, size_t size, const double *want, size_t n, bool l2,
                         double least, double tolerance) {
    size_t at;
    double error = check_measure(got, size, want, n, l2, least, &at);
    return check_error(what, l2 ? "L2" : "largest", at, n ? check_value(got, size, at) : 0, n ? want[at] : 0, error,
                       tolerance);
}

// The largest difference, relative to the largest number of the array.
static bool check_close(const char *what, const real *got, const double *want, size_t n, double tolerance) {
    return check_arrays(what, got, sizeof *got, want, n, false, TINY, tolerance);
}

// The length of the difference, relative to the length of the whole.
static bool check_close_l2(const char *what, const real *got, const double *want, size_t n, double tolerance) {
    return check_arrays(what, got, sizeof *got, want, n, true, TINY, tolerance);
}

static bool check_number(const char *what, double got, double want, double tolerance) {
    return check_arrays(what, &got, sizeof got, &want, 1, false, TINY, tolerance);
}

// Arrays of n numbers of `size` bytes (as check_value takes them), which must be the same bits: -0 is not 0, and NaN
// is itself.
static bool check_equal_bits(const char *what, const void *got, const void *want, size_t n, size_t size) {
    size_t i = 0;
    while (i < n && !memcmp((const char *)got + i*size, (const char *)want + i*size, size)) i++;
    if (i == n) return check_true(what, true);
    return check_true(label("%s: bits differ first at [%zu] of %zu: got %.17g, want %.17g", what, i, n,
                            check_value(got, size, i), check_value(want, size, i)), false);
}

// Prints the closing line; returns what main is to return.
static int check_summary(void) {
    printf("%zu passed, %zu failed", checks_passed, checks_failed);
    if (checks_skipped) printf(", %zu skipped", checks_skipped);
    printf("\n");
    return checks_failed ? 1 : 0;
}

#endif // CHECK_H
