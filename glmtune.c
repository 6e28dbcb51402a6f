// glmtune: fine-tunes the GLM family (ChatGLM2, ChatGLM3, GLM-4, GLM-4-0414, GLM-Edge) on a CPU.
//
// What it is: the whole program in one file. Weight files and tokenizers as released, the transformer forward and
// backward, LoRA, P-tuning v2, bottleneck adapters, freezing and full tuning, AdamW, evaluation, chat. It needs libc
// and libm; OpenMP if there is one. What it is not: an inference server, or a framework for other models.
//
// How to read it: from the top, as a book in three parts: the mathematics and one step of training; a training run from
// its data to its adapter; what makes it fast and lets it read the world's files. Stop after the part that you came
// for: what a part or section needs of a later one is declared where it opens, with a line that says what it gives.
// Each section opens with what it does and why, and otherwise uses only what stands above it.
// Shapes stand in a function's first comment, outputs before inputs. T counts the tokens of a batch, R the rows chosen
// from them, P the tokens of a prefix; H is the hidden size, F the MLP's, V the vocabulary, L the layers, d alone the
// width of a head; d before a name marks a gradient; x_t is row t of x.
// Arithmetic is in `real`: float, or double in `make glmtune64`, which the float build is measured against.
//
//   Part One: the model
//      1  What C leaves out      errors, memory, hashes
//      2  Kernels                forward/backward pairs on raw arrays, random numbers; what a port replaces
//      3  Model                  config and weights by name, both released layouts; where a method may act
//      4  Forward and backward   the transformer layer by layer, and the memory it needs
//      5  Tuning methods         LoRA, full, P-tuning v2, adapters, freezing: what trains, and where it acts
//      6  Optimizers, one step   gradients of a step, schedules, clipping; AdamW, SGD, Lion
//   Part Two: the work
//      7  Text                   encoding and decoding, chat layouts, from a conversation to ids and labels
//      8  Data                   samples, splits, batches
//      9  Generation and scores  key/value cache, sampling, several answers together; ROUGE, BLEU
//     10  Training               the loop, evaluation, checkpoints, resume
//     11  Adapters               as PEFT and ChatGLM write them, fingerprints, merging; a base of 4 or 8 bits
//   Part Three: the machine room
//     12  Fast CPU kernels       the matrix product on vectors, attention in blocks, one row of decoding
//     13  Files                  JSON, YAML, safetensors, torch's .bin, config.json, quantised weights
//     14  Tokenizer files        tokenizer.bin, SentencePiece BPE, tiktoken ranks, tokenizer.json, Unicode
//     15  Instruments            memory, time and disk, dump, gradient check, curves, comparison, cost of a step
//     16  Commands               one table of commands, one of options, the official yaml files, main
#ifndef GLMTUNE_C
#define GLMTUNE_C

#if !defined(__cplusplus) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE         // vasprintf, strndup, memmem, strcasestr, O_CLOEXEC
#endif
#include <stddef.h>
#include <stdint.h>

#ifdef GLMTUNE_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// The types of numbers a weight file may hold. REAL is whichever of the first two `real` is. The last four are codes,
// which have scales: integers of 8 and 4 bits, and bitsandbytes' two kinds of 4-bit numbers.
typedef enum { F64, F32, F16, BF16, I64, I32, OTHER_DTYPE, Q8, Q4, NF4, FP4,
               REAL = sizeof(real) == 8 ? F64 : F32 } Dtype;

#ifndef GLMTUNE_KERNELS_ONLY    // closed before section 2: a port sees the types above and 2.1

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#define st_mtim st_mtimespec        // its name there
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // without OpenMP the omp lines are ignored
static int omp_get_max_threads(void) { return 1; }
static void omp_set_num_threads(int n) { (void)n; }
#endif

// ================================================================================================================
// PART ONE: THE MODEL
// ================================================================================================================
// All of the mathematics, from the loops that a product is made of to one step of an optimizer; weights and text are in
// memory already. The whole: x = embedding[ids], the residual stream; in each layer x += Wo attention(norm(x)), then
// x += W_down swiglu(W_gate_up norm(x)); logits = W_head norm(x); loss = cross-entropy with the next token.

// ==== 1  What C leaves out =======================================================================================
// Errors that say what to do, memory that is checked, and a hash. Files and progress stand in Part Three.

#define GLMTUNE_VERSION "1.0"
static const char *program_name = "glmtune";    // as it was called, for commands that messages suggest
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

// ---- 1.1 Errors --------------------------------------------------------------------------------------------------
// Every error is one line: what failed, where, and what to do about it. Bad input ends the program with 1, bad usage
// with 2. Whatever was being written at that moment is removed (13.1), so that nothing half-written stays.

static void discard_unfinished(void);       // removes files that are not complete (13.1)
static void end_passing_line(void);         // clears a line of progress from the terminal (13.2)

// The first thread to end the program does so alone, another waits here (13.2: ctrl-C while the main thread writes).
static void end_alone(void) {
    static bool ending;
    static __thread bool ends;
    while (!ends && __atomic_test_and_set(&ending, __ATOMIC_SEQ_CST)) pause();
    ends = true;
}

#define fail(...) stop_with(1, __VA_ARGS__)
#define fail_usage(...) stop_with(2, __VA_ARGS__)

__attribute__((noreturn, format(printf, 2, 3))) static void stop_with(int status, const char *format, ...) {
    va_list args;
    char *message;
    end_alone();
    fflush(stdout);
    va_start(args, format);
    if (vasprintf(&message, format, args) < 0) message = NULL;
    for (char *p = message; p && *p; p++) if ((unsigned char)*p < ' ') *p = ' ';    // users' words may hold line breaks
    end_passing_line();
    fprintf(stderr, "glmtune: %s\n", message ? message : format);
    discard_unfinished();
    exit(status);
}

// ---- 1.2 Memory and text -----------------------------------------------------------------------------------------

static size_t times(size_t a, size_t b) {
    size_t product;
    if (__builtin_mul_overflow(a, b, &product)) fail("a size of %zu x %zu passes what this machine can count", a, b);
    return product;
}

static void *checked(void *p, size_t bytes) {
    if (!p) fail("out of memory: %.3f GiB more were needed", (double)bytes / (1 << 30));
    return p;
}

// n elements, all zero; never NULL.
static void *alloc(size_t n, size_t size) { return checked(calloc(n ? n : 1, size), times(n, size)); }

// Makes room for `want` elements in an array that grows.
static void *grow(void *array, size_t *capacity, size_t want, size_t size) {
    if (want <= *capacity) return array;
    *capacity = max_size(want, *capacity + *capacity / 2 + 16);
    return checked(realloc(array, times(*capacity, size)), times(*capacity, size));
}

// A text that grows; always ends in a NUL that `n` does not count, and may hold others.
typedef struct { char *s; size_t n, capacity; } Text;

static void text_add(Text *t, const char *s, size_t n) {
    if (n >= PTRDIFF_MAX - t->n) fail("a text of %zu bytes is too long", n);
    t->s = grow(t->s, &t->capacity, t->n + n + 1, 1);
    if (n) memcpy(t->s + t->n, s, n);
    t->n += n;
    t->s[t->n] = 0;
}

__attribute__((format(printf, 2, 3))) static void text_print(Text *t, const char *format, ...) {
    va_list args;
    char *s;
    va_start(args, format);
    int n = vasprintf(&s, format, args);
    if (n < 0) fail("out of memory for a text");
    va_end(args);
    text_add(t, s, (size_t)n);
    free(s);
}

// A formatted string of its own, for names and paths; most live as long as the program.
__attribute__((format(printf, 1, 2))) static char *strf(const char *format, ...) {
    va_list args;
    char *s;
    va_start(args, format);
    if (vasprintf(&s, format, args) < 0) fail("out of memory for a name");
    va_end(args);
    return s;
}

// A number with as many digits as it takes to read the same one back.
static char *number_text(double x) {
    char digits[32];
    for (int n = 6; n <= 17; n++) {
        snprintf(digits, sizeof digits, "%.*g", n, x);
        if (strtod(digits, NULL) == x) break;
    }
    return strf("%s", digits);
}

// Whether `list` ("q_proj,v_proj") holds this name.
static bool list_has(const char *list, const char *wanted) {
    size_t n = strlen(wanted);
    for (const char *p = list; p; p = strchr(p, ','), p = p ? p + 1 : NULL)
        if (!strncmp(p, wanted, n) && (!p[n] || p[n] == ',')) return true;
    return false;
}

// Whether `list` holds each name of `names`.
static bool names_in(const char *list, const char *names) {
    bool all = true;
    for (char *rest = strf("%s", names), *one; (one = strsep(&rest, ",")); ) all &= list_has(list, one);
    return all;
}

// An arena is one block that holds the arrays of one role (activations, scratch, trainables), in order. The code that
// lays them out runs twice: first without a block, only to count bytes (15.1 prints them), then to place the arrays.
typedef struct { char *block; size_t used, size; } Arena;

static void *arena_take(Arena *a, size_t n, size_t size) {
    size_t bytes = times(n, size), at = a->used;
    if (max_size(at, bytes) > SIZE_MAX / 8) fail("%zu and %zu bytes pass what this machine can count", at, bytes);
    a->used = (at + bytes + 63) & ~(size_t)63;
    if (a->block && a->used > a->size) fail("internal error: an arena of %zu bytes is too small", a->size);
    return a->block ? a->block + at : (void *)(uintptr_t)(64 + at);     // counting: a place that is never looked at
}

// ---- 1.3 Hashes --------------------------------------------------------------------------------------------------

// FNV-1a: turns a name or a sample into a number.
static uint64_t hash_bytes(const void *bytes, size_t n) {
    uint64_t h = 14695981039346656037u;
    for (const uint8_t *p = bytes, *end = p + n; p < end; p++) h = (h ^ *p) * 1099511628211u;
    return h;
}

static uint64_t hash_name(const char *s) { return hash_bytes(s, strlen(s)); }

#endif  // GLMTUNE_KERNELS_ONLY

// ==== 2  Kernels =================================================================================================
// Everything that is computed on model memory, as free functions over arrays: outputs first, then inputs, then sizes.
// X_backward stands under X_forward and takes only what the forward saved. A kernel never prints, never allocates, and
// knows no model. Model memory is what memory_take and memory_mapped give; only kernels read or write it.
//
// 2.1 is the seam: each function with its contract, which a port (kernels for other hardware, as glmtune.cu) keeps too.
// Then each stands once in plain loops, without blocking or vectors: the definition, and what glmtune64 runs. (Products
// and attention have fast bodies in section 12.) Each number is computed by one thread, in an order that depends on
// shapes alone: results are the same bits with 1 thread or 64.

// ---- 2.1 The seam ------------------------------------------------------------------------------------------------
// Clean C and C++: include this file with GLMTUNE_KERNELS_ONLY defined and you get just this. What holds for all:
//     Arrays    lie in model memory, row by row, without gaps. A pointer may point to any element in it: rely on no
//               more alignment. Arrays of a call do not overlap unless it says "may be".
//     Lists     of pointers and of their sizes (y, from, dy, n_out of linear_parts; x, n of sum_of_squares) lie on the
//               host, and may change once the function returns.
//     Sizes     that count tokens, rows, sequences, arrays or elements (T, R, n_sequences, n_prefix, count; n where
//               there is no T), and n_rotated, may be 0: what has that size is empty, a sum over it 0. Others: above 0.
//     Gradients of weights (dw, dbias, dgain, dtable) are added to. For others it says "=" where they are overwritten
//               and "+=" where they are added to. `from` says where a sum starts: NULL, at nothing; the output itself,
//               which is then added to; or another array of its shape, such as a residual.
//     Sums      have one order, given by shapes: two runs give the same bits. In float, sum more than a few thousand
//               terms in parts (the plain products are simpler: one sum).
//     NaN       in an input reaches an output (of lion_step: m; of dropout: if the number is kept; not ReLU's slope).
//     Indices   (ids, rows, targets, positions) are valid: a kernel need not look.
//     Calls     come from one thread, and take effect in their order. A kernel may return before it has ended.

#ifdef __cplusplus
extern "C" {
#endif

// Stands before functions that kernels call; a port to a GPU defines it, as __host__ __device__ say.
#ifndef GLMTUNE_DEVICE
#define GLMTUNE_DEVICE
#endif

// A random number is a function of what it is for: (seed, step, sample, token, site, feature) for dropout (2.10),
// (seed, tensor, element) for a first weight, (seed, epoch, place) for shuffling, (seed, answer, token) for sampling.
// Nothing is stored, and neither threads nor accumulation can change it. Keys are folded one by one, then a counter is
// hashed, by the finalizer of splitmix64 (Steele, Lea, Flood 2014), whose increment is 2^64 / golden ratio.
#define GOLDEN 0x9E3779B97F4A7C15u

GLMTUNE_DEVICE static inline uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

GLMTUNE_DEVICE static inline uint64_t rng_key(uint64_t key, uint64_t v) { return mix64(key ^ mix64(v + GOLDEN)); }
GLMTUNE_DEVICE static inline uint64_t rng_bits(uint64_t key, uint64_t i) { return mix64(key + GOLDEN * (i + 1)); }

// Uniform on [0,1) with 24 bits, so that it is exact in float.
GLMTUNE_DEVICE static inline float rng_uniform(uint64_t key, uint64_t i) {
    return (float)(rng_bits(key, i) >> 40) / 16777216.0f;
}

// Ends the program with this line, and exit status 1. For ports to call, not theirs to write.
__attribute__((noreturn)) void kernel_failed(const char *what);

// -- Memory. `device` is where kernels compute; on the CPU it is the same memory as the host's.

// Bytes on the device, all zero, on a boundary of 64; NULL: out of memory. 0 bytes give a pointer too, not NULL.
void *memory_take(size_t bytes);
// Gives back what memory_take gave; NULL is nothing to do.
void memory_give(void *p);
// Copies to the device. The host's bytes may be changed or freed when it returns. 0 bytes: the pointers are not read.
void memory_copy_in(void *device, const void *host, size_t bytes);
// Copies to the host, when all kernels called so far have ended.
void memory_copy_out(void *host, const void *device, size_t bytes);
// Bytes of a mapped file, where kernels can read them: on a GPU a copy. Those bytes stay where they are, unchanged,
// until memory_unmap was called as often as memory_mapped was for them. The same address and size give the same
// pointer. Never NULL: a failure ends in kernel_failed.
const void *memory_mapped(const void *host, size_t bytes);
void memory_unmap(const void *mapped);
// Bytes that memory_take can still give; SIZE_MAX: the device's memory is the machine's (15.1 then asks the system).
size_t memory_left(void);
// Returns when all kernels called so far have ended, so that time can be measured.
void finish_kernels(void);
// 1: products and attention may round operands to bf16, sums stay `real`; 0, at the start: no. A port may ignore it.
void set_precision(int bf16);

// -- Weights

// What codes are multiplied with: number i of a matrix is code i times scale k = i / per, rounded to float. A scale is
// each[k] or, where each is NULL, a code too: map[code[k]] * nested[k / 256] + offset, rounded to float twice. `per` is
// a row, or a block that may run across rows. The arrays lie in model memory.
typedef struct {
    size_t per;
    const float *each, *map, *nested;
    const uint8_t *code;
    float offset;
} Scales;

// A matrix [n_out,n_in] of type F64, F32, F16 or BF16, or of codes, as it lies in a file. Two codes of 4 bits share a
// byte, the first one in its high half.
typedef struct {
    const void *data;       // numbers of `dtype`
    Dtype dtype;
    size_t first;           // index in data of its first element: q, k, v are parts of a fused one
    const Scales *scales;   // on the host; NULL: not quantised
} Weight;

// What codes of 4 bits stand for, from Q4 on: integers, the quantiles of a normal distribution (Dettmers et al. 2023,
// arXiv:2305.14314, appendix E), and floats of 4 bits as bitsandbytes has them, divided by 12.
#define CODE_VALUES { \
    { 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1 }, \
    { -1, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, \
      -0.18477343022823334f, -0.09105003625154495f, 0, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1 }, \
    { 0, 0.0625f / 12, 8.0f / 12, 1, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, \
      -0.0f, -0.0625f / 12, -8.0f / 12, -1, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12 } }

// -- Arrays of one type

// x [n] = 0
void zero(real *x, size_t n);
// out [n] = in [n] of a type F64, F32, F16 or BF16, exactly; in a float build F64 is rounded once. With REAL: a copy.
void widen(real *out, const void *in, Dtype dtype, size_t n);
// out [n] of such a type = in [n], rounded once to nearest, ties to even, also where `real` is double; too large: inf.
void narrow(void *out, Dtype dtype, const real *in, size_t n);
// out [n] = the first n numbers of a matrix of any type, of codes too, exactly
void widen_weight(real *out, Weight w, size_t n);
// out [n] uniform on [center - spread, center + spread). In float:
//     out_i = center + spread u,  u = ((int32_t)(rng_bits(key, i) >> 40) - 2^23) / 2^23
void fill_uniform(real *out, uint64_t key, float center, float spread, size_t n);
// out [n] normal around center with deviation spread (Box and Muller 1958). z in double or float, the rest in float:
//     out_i = center + spread z,  z = sqrt(-2 ln u) cos(2 pi t)
//     u = ((rng_bits(key, 2i) >> 11) + 1) / 2^53,  t = (rng_bits(key, 2i + 1) >> 11) / 2^53
void fill_normal(real *out, uint64_t key, float center, float spread, size_t n);

// -- Matrix products

// y [T,n_out] = from + scale x w^T, x [T,n_in]
void linear_forward(real *y, const real *from, const real *x, Weight w, real scale, size_t T, size_t n_out,
                    size_t n_in);
// dx [T,n_in] = from + scale dy w, dy [T,n_out]
void linear_backward_input(real *dx, const real *from, const real *dy, Weight w, real scale, size_t T, size_t n_out,
                           size_t n_in);
// dw [n_out,n_in] += scale dy^T x, dy [T,n_out], x [T,n_in]
void linear_backward_weight(real *dw, const real *dy, const real *x, real scale, size_t T, size_t n_out, size_t n_in);

// The same for a w whose rows are up to three outputs (q, k, v): y[p] [T,n_out[p]] = from[p] + ...; from or from[p]
// NULL: at nothing. dx is the sum over the parts in their order: the same bits as one call of the above for each part.
void linear_parts_forward(real *const *y, real *const *from, const real *x, Weight w, real scale, size_t T,
                          const size_t *n_out, size_t n_parts, size_t n_in);
void linear_parts_backward_input(real *dx, const real *from, real *const *dy, Weight w, real scale, size_t T,
                                 const size_t *n_out, size_t n_parts, size_t n_in);

// -- Rows

// x [T,H] = the rows ids [T] of table [V,H]
void embedding_forward(real *x, const int32_t *ids, Weight table, size_t T, size_t H);
// dtable [V,H] += dx [T,H] at rows ids [T]; a row that occurs twice is added to twice, the earlier first
void embedding_backward(real *dtable, const real *dx, const int32_t *ids, size_t T, size_t H);
// out [R,H] = the rows `rows` [R] of x
void gather_forward(real *out, const real *x, const int32_t *rows, size_t R, size_t H);
// dx [any,H] += dout [R,H] at rows `rows` [R], the earlier first; dout may be other rows of dx
void gather_backward(real *dx, const real *dout, const int32_t *rows, size_t R, size_t H);
// y [T,n] += bias [n] in each row
void bias_forward(real *y, const real *bias, size_t T, size_t n);
// dbias [n] += the sum of the rows of dy [T,n]
void bias_backward(real *dbias, const real *dy, size_t T, size_t n);
// out [n] = a + b; out may be either
void add(real *out, const real *a, const real *b, size_t n);

// -- Pieces of the transformer

// y [T,H] = x r gain, x [T,H], gain [H]; inv_rms [T] = the factors r, for the backward (formula in 2.5)
void rmsnorm_forward(real *y, real *inv_rms, const real *x, const real *gain, real eps, size_t T, size_t H);
// dx [T,H] = from + ..., dgain [H] += ..., NULL: it is frozen; dy [T,H], and x, gain, inv_rms as the forward had them
void rmsnorm_backward(real *dx, const real *from, real *dgain, const real *dy, const real *x, const real *gain,
                      const real *inv_rms, size_t T, size_t H);

// table [n_positions,n_rotated] = cos, sin of the angle of pair 0, cos, sin of pair 1, ... n_rotated is even. Each of
// these, and the power, is rounded to `real` once; power, cosine and sine are exact before (in double, or as good):
//     exponent = 2j / n_rotated      inv_freq = 1 / (real)(theta^exponent)      angle = p inv_freq
void rope_table(real *table, double theta, size_t n_rotated, size_t n_positions);
// x [T,n_heads,head_dim] turned in place: of each head the pairs (2j, 2j+1) below n_rotated, by their positions [T]
void rope_forward(real *x, const int32_t *positions, const real *table, size_t T, size_t n_heads, size_t head_dim,
                  size_t n_rotated);
// dx turned back, in place
void rope_backward(real *dx, const int32_t *positions, const real *table, size_t T, size_t n_heads, size_t head_dim,
                   size_t n_rotated);

// Query head h reads key/value head h / (n_heads / n_kv_heads). Sequence b has the rows starts[b] .. starts[b+1] of q,
// and of k and v the rows kv_starts[b] .. kv_starts[b+1]. It may have no queries, or more keys than queries: the
// queries then belong to its last keys. Each query sees the prefix, the earlier keys of its sequence and its own.
typedef struct {
    size_t n_sequences, n_heads, n_kv_heads, head_dim, n_prefix;
    size_t T, most_queries;             // rows of q; the most queries of one sequence
    const size_t *starts, *kv_starts;   // [n_sequences+1], in model memory; one array: no keys are earlier
} AttentionShape;

// out [T,n_heads,head_dim] (formula in 2.7), lse [T,n_heads] = ln sum_j exp(q . k_j / sqrt(head_dim)) over the keys
// that a query sees, for the backward; q as out, k and v [kv rows,n_kv_heads,head_dim], prefix_k and prefix_v
// [n_prefix,n_kv_heads,head_dim], not rotated, the same for every sequence; both NULL when n_prefix is 0
void attention_forward(real *out, real *lse, const real *q, const real *k, const real *v, const real *prefix_k,
                       const real *prefix_v, AttentionShape s);
// dq, dk, dv, dprefix_k, dprefix_v = ..., shaped as their arrays; each of the last four may be NULL: not asked for.
// dout as out; out and lse from the forward (formulas in 2.7). All keys belong to queries of this call: kv_starts
// equals starts. scratch [2,T + n_prefix,n_heads,head_dim] is free to use.
void attention_backward(real *dq, real *dk, real *dv, real *dprefix_k, real *dprefix_v, real *scratch,
                        const real *dout, const real *out, const real *lse, const real *q, const real *k, const real *v,
                        const real *prefix_k, const real *prefix_v, AttentionShape s);

// h [T,F] = silu(g) u, gate_up [T,2F] being rows of g [F], u [F]; silu(x) = x / (1 + exp(-x)), which is SWISH too (2.8)
void swiglu_forward(real *h, const real *gate_up, size_t T, size_t F);
// dgate_up [T,2F] = ..., dh [T,F]
void swiglu_backward(real *dgate_up, const real *dh, const real *gate_up, size_t T, size_t F);

// -- Pieces of tuning methods

typedef enum { RELU, TANH, SWISH } Activation;
// y [n] = f(x); y may be x. ReLU of NaN is NaN.
void activation_forward(real *y, const real *x, Activation f, size_t n);
// dx [n] = dy f'(x), x as before f; dx may be dy. ReLU's slope is 0 at 0, and at NaN.
void activation_backward(real *dx, const real *dy, const real *x, Activation f, size_t n);
// y [T,n] = x gain, gain [n]; y may be x. For dx, call it with dy. (For methods such as README's IA3.)
void gain_forward(real *y, const real *x, const real *gain, size_t T, size_t n);
// dgain [n] += the sum over the rows of dy x, both [T,n]
void gain_backward(real *dgain, const real *dy, const real *x, size_t T, size_t n);
// y [T,n] = f x, f = 0 where rng_uniform(rng_key(token_keys[t], site), i) < (float)p, else 1 / (1-p); 0 <= p < 1
void dropout_forward(real *y, const real *x, const uint64_t *token_keys, uint64_t site, real p, size_t T, size_t n);
// dx [T,n] += f dy
void dropout_backward(real *dx, const real *dy, const uint64_t *token_keys, uint64_t site, real p, size_t T, size_t n);

// -- Loss and optimizers

// loss [R] of logits [R,V] and targets [R] (formulas in 2.11); logits = scale times their gradient, void if scale is 0
void cross_entropy(real *loss, real *logits, const int32_t *targets, real smoothing, real scale, size_t R, size_t V);

// One step of n numbers (formulas in 2.12): w and the moments change, g stays; keep = 1 - lr weight_decay. The scalars
// come in double, because 1 - b2 does not survive in float: taken from a rounded 0.999 it is 1.3e-5 off (relative), and
// the first steps by half of that. What is computed of them alone is rounded once.
void adamw_step(real *w, const real *g, real *m, real *v, double lr, double keep, double beta1, double beta2,
                double eps, double correction1, double correction2, size_t n);
void sgd_step(real *w, const real *g, real *buffer, double lr, double weight_decay, double momentum, size_t n);
void lion_step(real *w, const real *g, real *m, double lr, double keep, double beta1, double beta2, size_t n);
// x [n] *= factor
void scale_by(real *x, real factor, size_t n);
// The sum of squares of all numbers of `count` arrays x[a] [n[a]], to a relative 1e-6; returns to the host.
double sum_of_squares(const real *const *x, const size_t *n, size_t count);
// The place of the first number of x [n] that is NaN or infinite; n: all are finite. Returns to the host.
size_t first_not_finite(const real *x, size_t n);

#ifdef __cplusplus
}
#endif

#ifndef GLMTUNE_KERNELS_ONLY    // the end of the file closes this

void kernel_failed(const char *what) { fail("%s", what); }

// FAST: products and attention come from section 12. A build in double, or with -DGLMTUNE_PLAIN, runs the plain loops.
// With -DGLMTUNE_PORT they are weak symbols, so that a port in another file can replace one function at a time. With
// -DGLMTUNE_CUDA, for memory that the host cannot read, none is compiled: what glmtune.cu lacks does not link.
#if defined GLMTUNE_DOUBLE || defined GLMTUNE_PLAIN || defined GLMTUNE_PORT || defined GLMTUNE_CUDA
#define FAST 0
#else
#define FAST 1
#endif
// KERNEL stands before the plain body of each function of the seam.
#ifdef GLMTUNE_PORT
#define KERNEL __attribute__((weak))
#else
#define KERNEL
#endif

// In bytes; 0: half of one.
static size_t dtype_size(Dtype d) { return (const size_t[]){ 8, 4, 2, 2, 8, 4, 1, 1, 0, 0, 0 }[d]; }
static size_t dtype_bytes(Dtype d, size_t n) { return dtype_size(d) ? dtype_size(d) * n : (n + 1) / 2; }

// Folded into keys, these keep the random numbers of one use apart from those of another.
enum { KEY_SHUFFLE = 1, KEY_ANSWER = 2, KEY_STEP = 3, KEY_PREFIX = 4, KEY_REPLAY = 5 };

static const float code_values[][16] = CODE_VALUES;     // from Q4 on

#ifndef GLMTUNE_CUDA            // the end of section 2 closes this

// ---- 2.2 Matrix product ------------------------------------------------------------------------------------------
// A linear map and its two gradients (12.2 has the fast bodies):
//     y_tj = sum_k x_tk w_jk          dx_tk = sum_j dy_tj w_jk          dw_jk = sum_t dy_tj x_tk

enum { WORTH_THREADS = 1 << 15 };       // less work than this stays on one thread: waking others costs as much

static inline float bits_to_float(uint32_t bits) { union { uint32_t u; float f; } x = { bits }; return x.f; }
static inline uint32_t float_to_bits(float f) { union { float f; uint32_t u; } x = { f }; return x.u; }

static inline float f16_to_float(uint16_t h) {
    // The exponent's bias is 15 in h, 127 in a float: the shifted bits mean h 2^-112. The product is exact.
    uint32_t magnitude = h & 0x7FFFu, sign = (uint32_t)(h & 0x8000u) << 16;
    float f = bits_to_float(magnitude << 13) * 0x1p112f;
    return bits_to_float((magnitude >= 0x7C00u ? 0x7F800000u | magnitude << 13 : float_to_bits(f)) | sign);
}

static inline void axpy(real *y, real a, const real *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] += a * x[i];
}

static inline float scale_of(const Scales *s, size_t k) {
    if (s->each) return s->each[k];
    volatile float product = s->map[s->code[k]] * s->nested[k / 256];       // volatile: never fused with the sum
    return product + s->offset;
}

static inline float code_at(const void *data, Dtype dtype, size_t i) {
    if (dtype == Q8) return ((const int8_t *)data)[i];
    uint8_t byte = ((const uint8_t *)data)[i / 2];
    return code_values[dtype - Q4][i % 2 ? byte & 15 : byte >> 4];
}

// Number i of a matrix, as `real`.
static inline real weight_at(Weight w, size_t i) {
    i += w.first;
    if (w.scales) return (real)(code_at(w.data, w.dtype, i) * scale_of(w.scales, i / w.scales->per));
    switch (w.dtype) {
        case F64: return (real)((const double *)w.data)[i];
        case F32: return (real)((const float *)w.data)[i];
        case F16: return (real)f16_to_float(((const uint16_t *)w.data)[i]);
        default: return (real)bits_to_float((uint32_t)((const uint16_t *)w.data)[i] << 16);
    }
}

#if !FAST
KERNEL void linear_forward(real *y, const real *from, const real *x, Weight w, real scale, size_t T, size_t n_out,
                           size_t n_in) {
    #pragma omp parallel for if (T * n_out * n_in > WORTH_THREADS)
    for (size_t j = 0; j < n_out; j++)
        for (size_t t = 0; t < T; t++) {
            real sum = 0;
            for (size_t k = 0; k < n_in; k++) sum += x[t*n_in + k] * weight_at(w, j*n_in + k);
            y[t*n_out + j] = (from ? from[t*n_out + j] : 0) + scale * sum;
        }
}

KERNEL void linear_backward_input(real *dx, const real *from, const real *dy, Weight w, real scale, size_t T,
                                  size_t n_out, size_t n_in) {
    #pragma omp parallel for if (T * n_out * n_in > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        for (size_t k = 0; k < n_in; k++) dx[t*n_in + k] = from ? from[t*n_in + k] : 0;
        for (size_t j = 0; j < n_out; j++)
            for (size_t k = 0; k < n_in; k++) dx[t*n_in + k] += scale * dy[t*n_out + j] * weight_at(w, j*n_in + k);
    }
}

KERNEL void linear_backward_weight(real *dw, const real *dy, const real *x, real scale, size_t T, size_t n_out,
                                   size_t n_in) {
    #pragma omp parallel for if (T * n_out * n_in > WORTH_THREADS)
    for (size_t j = 0; j < n_out; j++)
        for (size_t t = 0; t < T; t++) axpy(dw + j*n_in, scale * dy[t*n_out + j], x + t*n_in, n_in);
}
#endif

KERNEL void linear_parts_forward(real *const *y, real *const *from, const real *x, Weight w, real scale, size_t T,
                                 const size_t *n_out, size_t n_parts, size_t n_in) {
    for (size_t p = 0; p < n_parts; w.first += n_out[p++] * n_in)
        linear_forward(y[p], from ? from[p] : NULL, x, w, scale, T, n_out[p], n_in);
}

KERNEL void linear_parts_backward_input(real *dx, const real *from, real *const *dy, Weight w, real scale, size_t T,
                                        const size_t *n_out, size_t n_parts, size_t n_in) {
    for (size_t p = 0; p < n_parts; w.first += n_out[p++] * n_in, from = dx)
        linear_backward_input(dx, from, dy[p], w, scale, T, n_out[p], n_in);
}

// ---- 2.3 Rows: embedding, gather, bias, sums ---------------------------------------------------------------------

enum { FEATURES = 64 };     // features that one thread owns when rows are added up: every sum then has one order

KERNEL void embedding_forward(real *x, const int32_t *ids, Weight table, size_t T, size_t H) {
    #pragma omp parallel for if (T * H > WORTH_THREADS)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < H; i++) x[t*H + i] = weight_at(table, (size_t)ids[t]*H + i);
}

KERNEL void embedding_backward(real *dtable, const real *dx, const int32_t *ids, size_t T, size_t H) {
    #pragma omp parallel for if (T * H > WORTH_THREADS)
    for (size_t i = 0; i < H; i += FEATURES)
        for (size_t t = 0; t < T; t++)
            axpy(dtable + (size_t)ids[t]*H + i, 1, dx + t*H + i, min_size(FEATURES, H - i));
}

KERNEL void gather_forward(real *out, const real *x, const int32_t *rows, size_t R, size_t H) {
    for (size_t r = 0; r < R; r++) memcpy(out + r*H, x + (size_t)rows[r]*H, H * sizeof *x);
}

KERNEL void gather_backward(real *dx, const real *dout, const int32_t *rows, size_t R, size_t H) {
    embedding_backward(dx, dout, rows, R, H);
}

KERNEL void bias_forward(real *y, const real *bias, size_t T, size_t n) {
    #pragma omp parallel for if (T * n > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) axpy(y + t*n, 1, bias, n);
}

KERNEL void bias_backward(real *dbias, const real *dy, size_t T, size_t n) {
    #pragma omp parallel for if (T * n > WORTH_THREADS)
    for (size_t i = 0; i < n; i += FEATURES)
        for (size_t t = 0; t < T; t++) axpy(dbias + i, 1, dy + t*n + i, min_size(FEATURES, n - i));
}

KERNEL void add(real *out, const real *a, const real *b, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

// ---- 2.4 Sums over a row, and the exponential --------------------------------------------------------------------
// A sum over a row is taken in PARTS running sums, joined at the end: fewer digits are lost, and they run side by side.

enum { PARTS = 16 };

#ifdef GLMTUNE_DOUBLE
#define real_exp exp
#define real_log log
#define real_sqrt sqrt
#define real_tanh tanh
#else
#define real_log logf
#define real_sqrt sqrtf
#define real_tanh tanhf

// exp(x) = 2^n exp(r), n the nearest whole number to x / ln 2, so |r| <= 0.35: its Taylor series up to r^7, and n added
// to the exponent's bits. Within 1.1 units of the last place; 0 below -87.3, infinite above 88.3, NaN stays NaN. Unlike
// libm's it is plain arithmetic, so a loop around it is vectorized.
static inline float real_exp(float x) {
    float shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;       // 1.5 2^23 makes it a whole number
    float r = x - n * 0x1.62e3p-1f - n * 9.05800061e-6f;                        // ln 2 in two parts
    float p = ((((1.0f / 5040 * r + 1.0f / 720) * r + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f;
    p = p * r * r + r + 1;
    float result = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
    return x != x ? x : x < -87.3f ? 0 : x > 88.3f ? (float)INFINITY : result;
}
#endif

static inline real join_parts(real *part, size_t n) {       // n: a power of 2
    for (size_t half = n / 2; half; half /= 2)
        for (size_t p = 0; p < half; p++) part[p] += part[p + half];
    return part[0];
}

// sum_i a_i b_i over n
static inline real dot(const real *a, const real *b, size_t n) {
    real part[PARTS] = {0};
    size_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (size_t p = 0; p < PARTS; p++) part[p] += a[i + p] * b[i + p];
    for (size_t p = 0; i < n; i++, p++) part[p] += a[i] * b[i];
    return join_parts(part, PARTS);
}

// sum_i a_i b_i c_i over n
static inline real dot3(const real *a, const real *b, const real *c, size_t n) {
    real part[PARTS] = {0};
    size_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (size_t p = 0; p < PARTS; p++) part[p] += a[i + p] * b[i + p] * c[i + p];
    for (size_t p = 0; i < n; i++, p++) part[p] += a[i] * b[i] * c[i];
    return join_parts(part, PARTS);
}

// The sum of x [n], in double: over a vocabulary of 151,552 a float would lose the last digits.
static inline double sum_of(const real *x, size_t n) {
    double part[PARTS] = {0}, sum = 0;
    size_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (size_t p = 0; p < PARTS; p++) part[p] += (double)x[i + p];
    for (size_t p = 0; i < n; i++, p++) part[p] += (double)x[i];
    for (size_t p = 0; p < PARTS; p++) sum += part[p];
    return sum;
}

// The largest of `least` and x [n]; a NaN is passed over.
static inline real largest_of(real least, const real *x, size_t n) {
    real top[PARTS];
    size_t i = 0;
    for (size_t p = 0; p < PARTS; p++) top[p] = least;
    for (; i + PARTS <= n; i += PARTS)
        for (size_t p = 0; p < PARTS; p++) top[p] = x[i + p] > top[p] ? x[i + p] : top[p];
    for (size_t p = 0; i < n; i++, p++) top[p] = x[i] > top[p] ? x[i] : top[p];
    for (size_t p = 0; p < PARTS; p++) least = top[p] > least ? top[p] : least;
    return least;
}

// ---- 2.5 RMSNorm -------------------------------------------------------------------------------------------------
// Scales each token to unit root mean square, then by a learned gain (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4):
//     r_t = 1 / sqrt(mean_i x_ti^2 + eps)        y_ti = x_ti r_t g_i
// GLM uses it before attention, before the MLP and at the end; GLM-4-0414 also after each of the two.

KERNEL void rmsnorm_forward(real *y, real *inv_rms, const real *x, const real *gain, real eps, size_t T, size_t H) {
    #pragma omp parallel for if (T * H > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        const real *x_t = x + t*H;
        real *y_t = y + t*H, r = 1 / real_sqrt(dot(x_t, x_t, H) / (real)H + eps);
        inv_rms[t] = r;
        for (size_t i = 0; i < H; i++) y_t[i] = x_t[i] * r * gain[i];
    }
}

//     y_ti = x_ti r_t g_i,  d r_t / d x_ti = -r_t^3 x_ti / H
//     dx_ti = r_t ( g_i dy_ti  -  x_ti r_t^2 / H  sum_j g_j dy_tj x_tj )          dg_i = sum_t dy_ti x_ti r_t
KERNEL void rmsnorm_backward(real *dx, const real *from, real *dgain, const real *dy, const real *x, const real *gain,
                             const real *inv_rms, size_t T, size_t H) {
    #pragma omp parallel for if (T * H > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        const real *x_t = x + t*H, *dy_t = dy + t*H, *from_t = from ? from + t*H : NULL;
        real *dx_t = dx + t*H, r = inv_rms[t], factor = r * r / (real)H * dot3(gain, dy_t, x_t, H);
        for (size_t i = 0; i < H; i++) dx_t[i] = (from_t ? from_t[i] : 0) + r * (gain[i] * dy_t[i] - x_t[i] * factor);
    }
    if (!dgain) return;
    #pragma omp parallel for if (T * H > WORTH_THREADS)
    for (size_t block0 = 0; block0 < H; block0 += FEATURES)
        for (size_t t = 0; t < T; t++)
            for (size_t i = block0; i < H && i < block0 + FEATURES; i++)
                dgain[i] += dy[t*H + i] * x[t*H + i] * inv_rms[t];
}

// ---- 2.6 Rotary positions ----------------------------------------------------------------------------------------
// The first n_rotated features of a head are pairs (2j, 2j+1), each turned by an angle that grows with the position
// (Su et al. 2021, arXiv:2104.09864):
//     angle = position theta^(-2j/n_rotated)      (a, b) -> (a cos - b sin, b cos + a sin)
// q . k then depends only on the difference of positions. The rest of the head passes through. In float the angle is
// rounded where Hugging Face rounds it (2.1): exact cosines would differ from its own by up to 6e-4 below 8192.

KERNEL void rope_table(real *table, double theta, size_t n_rotated, size_t n_positions) {
    for (size_t j = 0; j < n_rotated / 2; j++) {
        real exponent = (real)(2 * j) / (real)n_rotated, inv_freq = 1 / (real)pow(theta, (double)exponent);
        for (size_t p = 0; p < n_positions; p++) {
            real angle = (real)p * inv_freq;
            table[p*n_rotated + 2*j] = (real)cos((double)angle);
            table[p*n_rotated + 2*j + 1] = (real)sin((double)angle);
        }
    }
}

static void rotate(real *x, const int32_t *positions, const real *table, real sign, size_t T, size_t n_heads,
                   size_t head_dim, size_t n_rotated) {
    #pragma omp parallel for if (T * n_heads * head_dim > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        const real *table_t = table + (size_t)positions[t] * n_rotated;
        for (real *x_th = x + t*n_heads*head_dim, *end = x_th + n_heads*head_dim; x_th < end; x_th += head_dim)
            for (size_t j = 0; j < n_rotated; j += 2) {
                real a = x_th[j], b = x_th[j+1], c = table_t[j], s = sign * table_t[j+1];
                x_th[j] = a*c - b*s;
                x_th[j+1] = b*c + a*s;
            }
    }
}

KERNEL void rope_forward(real *x, const int32_t *positions, const real *table, size_t T, size_t n_heads,
                         size_t head_dim, size_t n_rotated) {
    rotate(x, positions, table, 1, T, n_heads, head_dim, n_rotated);
}

KERNEL void rope_backward(real *dx, const int32_t *positions, const real *table, size_t T, size_t n_heads,
                          size_t head_dim, size_t n_rotated) {
    rotate(dx, positions, table, -1, T, n_heads, head_dim, n_rotated);
}

// ---- 2.7 Attention -----------------------------------------------------------------------------------------------
// Causal attention with grouped heads. The keys j that query i sees (AttentionShape): the prefix, then its sequence's.
//     s_ij = q_i . k_j / sqrt(d)    lse_i = ln sum_j exp(s_ij)    p_ij = exp(s_ij - lse_i)    out_i = sum_j p_ij v_j

#if !FAST
// How many keys query i of sequence b sees: the prefix, those before the queries, and those up to its own.
static size_t keys_seen_by(AttentionShape s, size_t b, size_t i) {
    size_t queries = s.starts[b+1] - s.starts[b], keys = s.kv_starts[b+1] - s.kv_starts[b];
    return s.n_prefix + keys - queries + i + 1;
}

// Key j of those (or its value) for head h: [head_dim], in the prefix or in the sequence's own rows.
static real *key_at(const real *own, const real *prefix, AttentionShape s, size_t b, size_t j, size_t h) {
    bool in_prefix = j < s.n_prefix;
    size_t row = in_prefix ? j : s.kv_starts[b] + j - s.n_prefix, group = h / (s.n_heads / s.n_kv_heads);
    return (real *)(in_prefix ? prefix : own) + (row * s.n_kv_heads + group) * s.head_dim;
}

KERNEL void attention_forward(real *out, real *lse, const real *q, const real *k, const real *v, const real *prefix_k,
                              const real *prefix_v, AttentionShape s) {
    size_t d = s.head_dim;
    real scale = 1 / real_sqrt((real)d);
    #pragma omp parallel for if (s.T * s.n_heads * d > WORTH_THREADS)
    for (size_t h = 0; h < s.n_heads; h++)
        for (size_t b = 0; b < s.n_sequences; b++)
            for (size_t i = 0; i < s.starts[b+1] - s.starts[b]; i++) {
                size_t th = (s.starts[b] + i) * s.n_heads + h, n = keys_seen_by(s, b, i);
                const real *q_th = q + th*d;
                real *out_th = out + th*d, largest = -(real)INFINITY, sum = 0;
                for (size_t j = 0; j < n; j++) {
                    real score = scale * dot(q_th, key_at(k, prefix_k, s, b, j, h), d);
                    if (score > largest) largest = score;
                }
                memset(out_th, 0, d * sizeof *out);
                for (size_t j = 0; j < n; j++) {
                    real p = real_exp(scale * dot(q_th, key_at(k, prefix_k, s, b, j, h), d) - largest);
                    sum += p;
                    axpy(out_th, p, key_at(v, prefix_v, s, b, j, h), d);
                }
                for (size_t c = 0; c < d; c++) out_th[c] /= sum;
                lse[th] = largest + real_log(sum);
            }
}

// The softmax's derivative is ds_ij = p_ij (dout_i . v_j - D_i), D_i = sum_j p_ij dout_i . v_j = out_i . dout_i, so
//     dq_i = sum_j ds_ij k_j / sqrt(d)      dk_j = sum_i ds_ij q_i / sqrt(d)      dv_j = sum_i p_ij dout_i
// One thread has a key/value head, and all query heads of its group.
KERNEL void attention_backward(real *dq, real *dk, real *dv, real *dprefix_k, real *dprefix_v, real *scratch,
                               const real *dout, const real *out, const real *lse, const real *q, const real *k,
                               const real *v, const real *prefix_k, const real *prefix_v, AttentionShape s) {
    size_t d = s.head_dim, group = s.n_heads / s.n_kv_heads;
    real scale = 1 / real_sqrt((real)d);
    (void)scratch;
    zero(dq, s.T * s.n_heads * d);
    if (dk) zero(dk, s.T * s.n_kv_heads * d);
    if (dv) zero(dv, s.T * s.n_kv_heads * d);
    if (dprefix_k) zero(dprefix_k, s.n_prefix * s.n_kv_heads * d);
    if (dprefix_v) zero(dprefix_v, s.n_prefix * s.n_kv_heads * d);
    #pragma omp parallel for if (s.T * s.n_heads * d > WORTH_THREADS)
    for (size_t g = 0; g < s.n_kv_heads; g++)
        for (size_t b = 0; b < s.n_sequences; b++)
            for (size_t i = 0; i < s.starts[b+1] - s.starts[b]; i++)
                for (size_t h = g * group; h < (g + 1) * group; h++) {
                    size_t th = (s.starts[b] + i) * s.n_heads + h, n = keys_seen_by(s, b, i);
                    const real *q_th = q + th*d, *dout_th = dout + th*d;
                    real D = dot(dout_th, out + th*d, d);
                    for (size_t j = 0; j < n; j++) {
                        const real *k_j = key_at(k, prefix_k, s, b, j, h), *v_j = key_at(v, prefix_v, s, b, j, h);
                        real p = real_exp(scale * dot(q_th, k_j, d) - lse[th]), ds = p * (dot(dout_th, v_j, d) - D);
                        axpy(dq + th*d, scale * ds, k_j, d);
                        if (j < s.n_prefix ? !!dprefix_k : !!dk)
                            axpy(key_at(dk, dprefix_k, s, b, j, h), scale * ds, q_th, d);
                        if (j < s.n_prefix ? !!dprefix_v : !!dv)
                            axpy(key_at(dv, dprefix_v, s, b, j, h), p, dout_th, d);
                    }
                }
}
#endif

// ---- 2.8 SwiGLU --------------------------------------------------------------------------------------------------
// The MLP's middle: h = silu(g) u (Shazeer 2020, arXiv:2002.05202). Gate g and value u come from one map, g first.

static real sigmoid(real x) { return 1 / (1 + real_exp(-x)); }
static real swish(real x) { return x / (1 + real_exp(-x)); }        // silu's other name

KERNEL void swiglu_forward(real *h, const real *gate_up, size_t T, size_t F) {
    #pragma omp parallel for if (T * F > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        const real *g = gate_up + t*2*F, *u = g + F;
        for (size_t i = 0; i < F; i++) h[t*F + i] = swish(g[i]) * u[i];
    }
}

// With z = sigmoid(g):  dg = dh u z (1 + g (1 - z)),  du = dh g z
KERNEL void swiglu_backward(real *dgate_up, const real *dh, const real *gate_up, size_t T, size_t F) {
    #pragma omp parallel for if (T * F > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        const real *g = gate_up + t*2*F, *u = g + F, *dh_t = dh + t*F;
        real *dg = dgate_up + t*2*F, *du = dg + F;
        for (size_t i = 0; i < F; i++) {
            real z = sigmoid(g[i]);
            dg[i] = dh_t[i] * u[i] * z * (1 + g[i] * (1 - z));
            du[i] = dh_t[i] * g[i] * z;
        }
    }
}

// ---- 2.9 What tuning methods are made of -------------------------------------------------------------------------
// Activations, for adapters and projections of a prefix (section 5), and a gain for each feature.

static real relu(real x) { return x < 0 ? 0 : x; }      // NaN stays NaN
static real relu_slope(real x) { return x > 0; }
static real tanh_slope(real x) { real y = real_tanh(x); return 1 - y*y; }
static real swish_slope(real x) { return sigmoid(x) * (1 + x * sigmoid(-x)); }

static const struct { real (*value)(real), (*slope)(real); } activations[] = {
    [RELU] = { relu, relu_slope }, [TANH] = { real_tanh, tanh_slope }, [SWISH] = { swish, swish_slope } };

KERNEL void activation_forward(real *y, const real *x, Activation f, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) y[i] = activations[f].value(x[i]);
}

KERNEL void activation_backward(real *dx, const real *dy, const real *x, Activation f, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * activations[f].slope(x[i]);
}

KERNEL void gain_forward(real *y, const real *x, const real *gain, size_t T, size_t n) {
    #pragma omp parallel for if (T * n > WORTH_THREADS)
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < n; i++) y[t*n + i] = x[t*n + i] * gain[i];
}

KERNEL void gain_backward(real *dgain, const real *dy, const real *x, size_t T, size_t n) {
    #pragma omp parallel for if (T * n > WORTH_THREADS)
    for (size_t i0 = 0; i0 < n; i0 += FEATURES)
        for (size_t t = 0; t < T; t++)
            for (size_t i = i0; i < n && i < i0 + FEATURES; i++) dgain[i] += dy[t*n + i] * x[t*n + i];
}

// ---- 2.10 Dropout ------------------------------------------------------------------------------------------------
// Sets each number to zero with probability p and scales the others by 1/(1-p) (Srivastava et al. 2014). The mask is a
// function of the token's key, the site (which tensor of which layer) and the feature: the backward asks for it again.

static real dropout_factor(uint64_t key, size_t i, real p) {
    return rng_uniform(key, i) >= (float)p ? 1 / (1 - p) : 0;
}

KERNEL void dropout_forward(real *y, const real *x, const uint64_t *token_keys, uint64_t site, real p, size_t T,
                            size_t n) {
    #pragma omp parallel for if (T * n > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        uint64_t key = rng_key(token_keys[t], site);
        for (size_t i = 0; i < n; i++) y[t*n + i] = dropout_factor(key, i, p) * x[t*n + i];
    }
}

KERNEL void dropout_backward(real *dx, const real *dy, const uint64_t *token_keys, uint64_t site, real p, size_t T,
                             size_t n) {
    #pragma omp parallel for if (T * n > WORTH_THREADS)
    for (size_t t = 0; t < T; t++) {
        uint64_t key = rng_key(token_keys[t], site);
        for (size_t i = 0; i < n; i++) dx[t*n + i] += dropout_factor(key, i, p) * dy[t*n + i];
    }
}

// ---- 2.11 Cross-entropy ------------------------------------------------------------------------------------------
// loss_r = (1-e) (-log p_r,target) + e mean_v (-log p_rv), p = softmax(logits), e the label smoothing (Szegedy et al.
// 2016). Forward and backward in one pass, because the logits of a row are needed for both and never again:
//     dlogits_rv = scale (p_rv - (1-e) [v = target] - e/V)

KERNEL void cross_entropy(real *loss, real *logits, const int32_t *targets, real smoothing, real scale, size_t R,
                          size_t V) {
    #pragma omp parallel for if (R * V > WORTH_THREADS)
    for (size_t r = 0; r < R; r++) {
        real *z = logits + r*V, largest = largest_of(z[0], z, V), at_target = z[targets[r]];
        double total = smoothing > 0 ? sum_of(z, V) : 0;
        for (size_t v = 0; v < V; v++) z[v] = real_exp(z[v] - largest);
        double sum = sum_of(z, V), lse = (double)largest + log(sum), mean = total / (double)V, e = (double)smoothing;
        loss[r] = (real)((1 - e) * (lse - (double)at_target) + (e > 0 ? e * (lse - mean) : 0));
        real factor = scale / (real)sum, spread = scale * smoothing / (real)V;
        for (size_t v = 0; v < V; v++) z[v] = z[v] * factor - spread;
        z[targets[r]] -= scale * (1 - smoothing);
    }
}

// ---- 2.12 Optimizer steps ----------------------------------------------------------------------------------------

// AdamW as PyTorch computes it (Loshchilov & Hutter 2019, arXiv:1711.05101), one pass over memory:
//     w *= keep      m = b1 m + (1-b1) g      v = b2 v + (1-b2) g^2      w -= lr/c1 m / (sqrt(v)/sqrt(c2) + eps)
// c1 = correction1 = 1 - b1^t, c2 = correction2 = 1 - b2^t at step t = 1, 2, ...
KERNEL void adamw_step(real *w, const real *g, real *m, real *v, double lr, double keep, double beta1, double beta2,
                       double eps, double correction1, double correction2, size_t n) {
    real step = (real)(lr / correction1), root = (real)sqrt(correction2), rest = (real)keep, tiny = (real)eps;
    real new1 = (real)(1 - beta1), old2 = (real)beta2, new2 = (real)(1 - beta2);
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) {
        m[i] += new1 * (g[i] - m[i]);
        v[i] = old2 * v[i] + new2 * g[i] * g[i];
        w[i] = rest * w[i] - step * m[i] / (real_sqrt(v[i]) / root + tiny);
    }
}

// SGD with momentum as PyTorch computes it: the decay goes into the gradient, and so into the buffer:
//     buffer = momentum buffer + g + weight_decay w      w -= lr buffer
KERNEL void sgd_step(real *w, const real *g, real *buffer, double lr, double weight_decay, double momentum, size_t n) {
    real step = (real)lr, pull = (real)weight_decay, old = (real)momentum;
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) {
        buffer[i] = old * buffer[i] + (g[i] + pull * w[i]);
        w[i] -= step * buffer[i];
    }
}

// Lion (Chen et al. 2023, arXiv:2302.06675): after the decay each number moves by lr, or by 0 where the sign is 0:
//     w = keep w - lr sign(b1 m + (1-b1) g)      m = b2 m + (1-b2) g
KERNEL void lion_step(real *w, const real *g, real *m, double lr, double keep, double beta1, double beta2, size_t n) {
    real step = (real)lr, rest = (real)keep, old1 = (real)beta1, old2 = (real)beta2;
    real new1 = (real)(1 - beta1), new2 = (real)(1 - beta2);
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) {
        real direction = old1 * m[i] + new1 * g[i];
        w[i] = rest * w[i] - (direction > 0 ? step : direction < 0 ? -step : 0);
        m[i] = old2 * m[i] + new2 * g[i];
    }
}

KERNEL void scale_by(real *x, real factor, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

// In double, each array over a fixed number of shares, so that the order does not depend on the threads.
KERNEL double sum_of_squares(const real *const *x, const size_t *n, size_t count) {
    enum { SHARES = 256 };
    double sum = 0;
    for (size_t a = 0; a < count; a++) {
        double share[SHARES] = {0};
        #pragma omp parallel for if (n[a] > WORTH_THREADS)
        for (size_t s = 0; s < SHARES; s++)
            for (size_t i = n[a] * s / SHARES; i < n[a] * (s + 1) / SHARES; i++)
                share[s] += (double)x[a][i] * (double)x[a][i];
        for (size_t s = 0; s < SHARES; s++) sum += share[s];
    }
    return sum;
}

KERNEL size_t first_not_finite(const real *x, size_t n) {
    size_t i = 0;
    while (i < n && isfinite(x[i])) i++;
    return i;
}

// ---- 2.13 Memory and types ---------------------------------------------------------------------------------------

KERNEL void *memory_take(size_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };       // read bandwidth in these: 16.4 against 13.4 GB/s on one core
    void *p = NULL;
    bytes = bytes ? bytes : 1;
    if (posix_memalign(&p, bytes < HUGE_PAGE ? 64 : HUGE_PAGE, bytes)) return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return memset(p, 0, bytes);
}

KERNEL void memory_give(void *p) { free(p); }
KERNEL void memory_copy_in(void *device, const void *host, size_t bytes) { if (bytes) memcpy(device, host, bytes); }
KERNEL void memory_copy_out(void *host, const void *device, size_t bytes) { if (bytes) memcpy(host, device, bytes); }
KERNEL const void *memory_mapped(const void *host, size_t bytes) { (void)bytes; return host; }
KERNEL void memory_unmap(const void *mapped) { (void)mapped; }
KERNEL size_t memory_left(void) { return SIZE_MAX; }
KERNEL void finish_kernels(void) {}
#if !FAST
KERNEL void set_precision(int bf16) { (void)bf16; }
#endif

KERNEL void zero(real *x, size_t n) {
    enum { PART = 1 << 15 };        // on all cores
    #pragma omp parallel for if (n > 4 * PART)
    for (size_t i = 0; i < n; i += PART) memset(x + i, 0, min_size(PART, n - i) * sizeof *x);
}

static uint16_t float_to_f16(float f) {        // to nearest, ties to even
    uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);            // 65520 and more round to infinity
    if (magnitude < 0x38800000u)                                                // subnormal: let an addition round
        return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u));
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13));
}

static uint16_t float_to_bf16(float f) {        // to nearest, ties to even
    uint32_t bits = float_to_bits(f);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// A double between two floats becomes the odd one: rounding that once more, to fewer bits, is then rounding once.
static float round_to_odd(double d) {
    float f = (float)d;
    if ((double)f == d || d != d) return f;
    uint32_t bits = float_to_bits(f);
    return bits_to_float((fabs((double)f) > fabs(d) ? bits - 1 : bits) | 1);
}

// One loop per type, so that each is a simple one; `out` and `in` hold n numbers.
#define WIDEN(function, type, expression) static void function(real *out, const void *in, size_t n) { \
        const type *p = in; for (size_t i = 0; i < n; i++) out[i] = (real)(expression); }
#define NARROW(function, type, expression) static void function(void *out, const real *p, size_t n) { \
        type *to = out; for (size_t i = 0; i < n; i++) to[i] = expression; }
WIDEN(widen_f64, double, p[i])
WIDEN(widen_f32, float, p[i])
WIDEN(widen_f16, uint16_t, f16_to_float(p[i]))
WIDEN(widen_bf16, uint16_t, bits_to_float((uint32_t)p[i] << 16))
NARROW(narrow_f64, double, (double)p[i])
NARROW(narrow_f32, float, (float)p[i])
NARROW(narrow_f16, uint16_t, float_to_f16(round_to_odd((double)p[i])))
NARROW(narrow_bf16, uint16_t, float_to_bf16(round_to_odd((double)p[i])))

static void (*const wideners[])(real *, const void *, size_t) = { widen_f64, widen_f32, widen_f16, widen_bf16 };
static void (*const narrowers[])(void *, const real *, size_t) = { narrow_f64, narrow_f32, narrow_f16, narrow_bf16 };

KERNEL void widen(real *out, const void *in, Dtype dtype, size_t n) { wideners[dtype](out, in, n); }

KERNEL void widen_weight(real *out, Weight w, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) out[i] = weight_at(w, i);
}

KERNEL void narrow(void *out, Dtype dtype, const real *in, size_t n) { narrowers[dtype](out, in, n); }

KERNEL void fill_uniform(real *out, uint64_t key, float center, float spread, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) {
        float unit = (float)((int32_t)(rng_bits(key, i) >> 40) - (1 << 23)) * 0x1p-23f;
        out[i] = (real)(center + spread * unit);
    }
}

KERNEL void fill_normal(real *out, uint64_t key, float center, float spread, size_t n) {
    #pragma omp parallel for if (n > WORTH_THREADS)
    for (size_t i = 0; i < n; i++) {
        double u = (double)((rng_bits(key, 2*i) >> 11) + 1) * 0x1p-53;      // on (0,1]
        double turn = (double)(rng_bits(key, 2*i + 1) >> 11) * 0x1p-53 * 6.283185307179586;
        out[i] = (real)(center + spread * (float)(sqrt(-2 * log(u)) * cos(turn)));
    }
}

#endif  // GLMTUNE_CUDA

// ==== 3  Model ===================================================================================================
// Sizes come from config.json. The models were released under two sets of names: "remote" (model_type chatglm:
// ChatGLM2/3 and GLM-4-9B, queries, keys and values fused in one map) and Hugging Face's own (glm, glm4: three maps;
// glm4 has two more norms a layer). The computation sees only maps with parts: both give the same bits. The names in
// files, the defaults of LoRA and P-tuning and the choice of a chat layout differ.

// ---- 3.1 Config --------------------------------------------------------------------------------------------------

typedef struct {
    size_t vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, max_positions;
    size_t n_rotated;               // features of a head that turn with the position; the others stay
    double rope_theta, rms_norm_eps;
    bool remote;                    // the layout of ChatGLM's own code (trust_remote_code); else Hugging Face's
    bool post_norms, qkv_bias, tied;        // two more norms a layer; biases on q, k, v; the head is the embedding
    bool quantised;                 // it says so in one way or another
    size_t quantization_bit;        // ChatGLM's way: the weights are codes; 0: they are not
    const char *file, *source;      // the path of config.json, for messages, and its text
    const char *model_type, *layout, *name_or_path, *torch_dtype;   // as config.json has them; NULL: it has none
} Config;

static size_t q_width(const Config *c) { return c->n_heads * c->head_dim; }
static size_t kv_width(const Config *c) { return c->n_kv_heads * c->head_dim; }

// ---- 3.2 Tensors, maps, layers -----------------------------------------------------------------------------------

// How far up the model something acts, its depth: 0 is the embedding; then come the stages of each layer in their
// order; the last norm and the head count as stages of a layer n_layers.
enum { AT_INPUT_NORM, AT_QKV, AT_O, AT_ATTENTION_POST_NORM, AT_ATTENTION_BRANCH, AT_MLP_NORM, AT_GATE_UP, AT_DOWN,
       AT_MLP_POST_NORM, AT_MLP_BRANCH, STAGES, AT_FINAL_NORM = 0, AT_HEAD = 1 };

static size_t depth_of(size_t layer, size_t stage) { return 1 + layer * STAGES + stage; }   // layer n_layers: the end

// How the numbers of an added tensor begin: around the center, uniform on +-spread or normal with that deviation.
typedef struct { float center, spread; bool normal; } Start;

// A tensor of the model, or one that a method adds. Frozen matrices stay as they lie in the file; all else is `real`.
typedef struct {
    const char *name, *other_name;  // other_name: a second one, in adapter files; NULL: none
    size_t n_dims, shape[2], n, depth;      // n numbers in all
    bool vector, of_base, trained;  // vector: a gain or bias; of_base: in the model's files, else a method added it
    Start start;                    // of a tensor that a method adds
    const void *data;               // what kernels read, numbers of `dtype`
    Dtype dtype, file_dtype;
    const Scales *scales;           // of a quantised matrix, else NULL
    const void *file_data;          // in the mapped file; NULL where there is none
    const void *file_scales;        // the same of what its scales are read from, scale_bytes
    size_t scale_bytes;
    const char *file;               // the name of that file in its folder
    real *value, *grad, *moments[2];    // NULL unless it trains (4.2); data is value then
} Tensor;

// What a method adds to a map, to a half of a layer, or as a prefix: its tensors (NULL: none) and numbers.
enum { MAX_ADDED = 5 };
typedef struct { Tensor *t[MAX_ADDED]; real scale, dropout; bool houlsby; } Added;     // else pfeiffer (5.5)

// A linear map, in one to three parts that give separate outputs: query_key_value gives q, k, v.
enum { MAX_PARTS = 3, MAX_MAPS = 6 };
typedef struct {
    const char *path, *short_name;  // model.layers.3.self_attn.q_proj, q_proj
    Tensor *weight, *bias;          // [n_out,n_in], [n_out]; bias NULL: none
    size_t n_out, n_in, n_parts, part_rows[MAX_PARTS];      // the rows of the parts add up to n_out
    size_t depth, index;            // index: in the layer's maps
    uint64_t site;                  // for dropout: one number per map of the model
    Added added;                    // section 5
} Linear;

enum { ATTENTION, MLP, HALVES };    // the two halves of a layer

typedef struct {
    Tensor *input_norm, *mlp_norm, *post_norm[HALVES];      // post norms: glm4 only, else NULL
    Linear maps[MAX_MAPS];          // one map of q, k and v, or one for each (n_qkv of them), then o, gate_up, down
    size_t n_maps, n_qkv;
    Linear *o, *gate_up, *down;     // where they stand in maps
    Added branch[HALVES];           // section 5: after attention, after the MLP
} Layer;

typedef struct {
    Config config;
    Tensor *embedding, *final_norm, *head;          // head is embedding when tied
    Layer *layers;
    Tensor **tensors; size_t n_tensors, capacity;   // of the files, in the order of the model
    Tensor **trained; size_t n_trained, trained_capacity;   // some of these, and what a method adds
    size_t lowest;                                  // depth of the lowest trained tensor; SIZE_MAX: nothing trains
    size_t n_moments;                               // that the optimizer keeps of each trained number
    const char *fingerprint;                        // of base, tokenizer and layout (11.2); NULL: not asked for
    Added added;                                    // section 5: the prefix
    size_t n_prefix, first_position;                // keys that every token sees; position of a text's first token
    bool prefix_in_files;                           // ChatGLM's, beside its weights (11.3)
    Arena trainables;
} Model;

enum { NAME_EMBEDDING, NAME_FINAL_NORM, NAME_HEAD, NAME_INPUT_NORM, NAME_MLP_NORM, NAME_ATTENTION_POST_NORM,
       NAME_MLP_POST_NORM, NAME_QKV, NAME_Q, NAME_K, NAME_V, NAME_O, NAME_GATE_UP, NAME_DOWN };
static const struct { const char *remote, *hf; } tensor_names[] = {
    [NAME_EMBEDDING] = { "transformer.embedding.word_embeddings", "model.embed_tokens" },
    [NAME_FINAL_NORM] = { "transformer.encoder.final_layernorm", "model.norm" },
    [NAME_HEAD] = { "transformer.output_layer", "lm_head" },
    // those of a layer, after transformer.encoder.layers.N. or model.layers.N.
    [NAME_INPUT_NORM] = { "input_layernorm", "input_layernorm" },
    [NAME_MLP_NORM] = { "post_attention_layernorm", "post_attention_layernorm" },
    [NAME_ATTENTION_POST_NORM] = { "post_self_attn_layernorm", "post_self_attn_layernorm" },
    [NAME_MLP_POST_NORM] = { "post_mlp_layernorm", "post_mlp_layernorm" },
    [NAME_QKV] = { "self_attention.query_key_value", NULL }, [NAME_Q] = { NULL, "self_attn.q_proj" },
    [NAME_K] = { NULL, "self_attn.k_proj" }, [NAME_V] = { NULL, "self_attn.v_proj" },
    [NAME_O] = { "self_attention.dense", "self_attn.o_proj" },
    [NAME_GATE_UP] = { "mlp.dense_h_to_4h", "mlp.gate_up_proj" },
    [NAME_DOWN] = { "mlp.dense_4h_to_h", "mlp.down_proj" },
};

static const char *path_of(const Model *m, int which, size_t layer) {
    bool remote = m->config.remote;
    const char *last = remote ? tensor_names[which].remote : tensor_names[which].hf;
    if (which < NAME_INPUT_NORM) return last;
    return strf("%s.layers.%zu.%s", remote ? "transformer.encoder" : "model", layer, last);
}

// A tensor [rows,columns], or a vector [rows] when columns is 0.
static Tensor *describe_tensor(const char *tensor_name, size_t rows, size_t columns, size_t depth) {
    Tensor *t = alloc(1, sizeof *t);
    *t = (Tensor){ .name = tensor_name, .n_dims = columns ? 2 : 1, .shape = { rows, columns }, .depth = depth,
                   .vector = !columns, .n = times(rows, columns ? columns : 1) };
    return t;
}

// The same for a tensor of the base, in the order of the model: PATH.weight or PATH.bias.
static Tensor *describe_base(Model *m, const char *path, const char *last, size_t rows, size_t columns, size_t depth) {
    m->tensors = grow(m->tensors, &m->capacity, m->n_tensors + 1, sizeof *m->tensors);
    Tensor *t = m->tensors[m->n_tensors++] = describe_tensor(strf("%s.%s", path, last), rows, columns, depth);
    t->of_base = true;
    return t;
}

static Tensor *describe_norm(Model *m, int which, size_t layer, size_t stage) {
    return describe_base(m, path_of(m, which, layer), "weight", m->config.hidden_size, 0, depth_of(layer, stage));
}

static Linear *describe_map(Model *m, size_t layer, int which, const size_t *rows, size_t n_parts, size_t n_in,
                            size_t stage, bool bias) {
    Layer *l = &m->layers[layer];
    size_t index = l->n_maps++;
    Linear *map = &l->maps[index];
    *map = (Linear){ .path = path_of(m, which, layer), .n_in = n_in, .n_parts = n_parts,
                     .depth = depth_of(layer, stage), .index = index, .site = layer * MAX_MAPS + index };
    for (size_t i = 0; i < n_parts; i++) map->n_out += map->part_rows[i] = rows[i];
    map->short_name = strrchr(map->path, '.') + 1;
    map->weight = describe_base(m, map->path, "weight", map->n_out, n_in, map->depth);
    if (bias) map->bias = describe_base(m, map->path, "bias", map->n_out, 0, map->depth);
    return map;
}

static void describe_layer(Model *m, size_t i) {
    const Config *c = &m->config;
    Layer *l = &m->layers[i];
    size_t H = c->hidden_size, qkv[] = { q_width(c), kv_width(c), kv_width(c) }, two_ffn = 2 * c->ffn_dim;
    l->input_norm = describe_norm(m, NAME_INPUT_NORM, i, AT_INPUT_NORM);
    if (c->remote) describe_map(m, i, NAME_QKV, qkv, 3, H, AT_QKV, c->qkv_bias);
    else for (int p = 0; p < 3; p++) describe_map(m, i, NAME_Q + p, qkv + p, 1, H, AT_QKV, c->qkv_bias);
    l->n_qkv = l->n_maps;
    l->o = describe_map(m, i, NAME_O, &H, 1, q_width(c), AT_O, false);
    if (c->post_norms) l->post_norm[ATTENTION] = describe_norm(m, NAME_ATTENTION_POST_NORM, i, AT_ATTENTION_POST_NORM);
    l->mlp_norm = describe_norm(m, NAME_MLP_NORM, i, AT_MLP_NORM);
    l->gate_up = describe_map(m, i, NAME_GATE_UP, &two_ffn, 1, H, AT_GATE_UP, false);
    l->down = describe_map(m, i, NAME_DOWN, &H, 1, c->ffn_dim, AT_DOWN, false);
    if (c->post_norms) l->post_norm[MLP] = describe_norm(m, NAME_MLP_POST_NORM, i, AT_MLP_POST_NORM);
}

// The model that a config describes: every tensor by name and shape, no numbers yet.
static Model *describe_model(Config c) {
    Model *m = alloc(1, sizeof *m);
    *m = (Model){ .config = c, .lowest = SIZE_MAX, .n_moments = 2 };
    m->layers = alloc(c.n_layers, sizeof *m->layers);
    m->embedding = describe_base(m, path_of(m, NAME_EMBEDDING, 0), "weight", c.vocab_size, c.hidden_size, 0);
    for (size_t i = 0; i < c.n_layers; i++) describe_layer(m, i);
    m->final_norm = describe_norm(m, NAME_FINAL_NORM, c.n_layers, AT_FINAL_NORM);
    m->head = c.tied ? m->embedding : describe_base(m, path_of(m, NAME_HEAD, 0), "weight", c.vocab_size, c.hidden_size,
                                                    depth_of(c.n_layers, AT_HEAD));
    return m;
}

// Positions that a prefix leaves to a text: at least two, one to read and one to write.
static size_t positions_left(const Model *m) {
    return max_size(m->config.max_positions, m->first_position + 2) - m->first_position;
}

static size_t count_parameters(Tensor *const *t, size_t n) {
    size_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += t[i]->n;
    return sum;
}

static void *device_take(size_t n, size_t size, const char *what) {
    void *p = memory_take(times(n, size));
    if (!p) fail("out of memory: %.3f GiB for %s cannot be taken", (double)times(n, size) / (1 << 30), what);
    return p;
}

// ---- 3.3 What the user may set -----------------------------------------------------------------------------------
// The table in 16.4 says what each means, its default and its limits. Names are Hugging Face's where it has one.

typedef struct Options {
    const struct Options *defaults; // what each was before the command line
    const char *settings;           // "name=value" lines of what bears on the result, as a checkpoint keeps them
    // methods
    const char *method, *target_modules, *ptuning_positions, *adapter_type, *trainable_modules;
    bool use_rslora, prefix_projection, trainable_embedding, trainable_head;
    int64_t r, num_virtual_tokens, encoder_hidden_size, reduction_factor, trainable_layers;
    double lora_alpha, lora_dropout, prefix_dropout;
    // optimization
    const char *optim, *lr_scheduler_type;
    int64_t max_steps, warmup_steps;
    double learning_rate, num_train_epochs, warmup_ratio, weight_decay, adam_beta1, adam_beta2, adam_epsilon, momentum;
    double max_grad_norm, label_smoothing_factor, early_stopping_threshold, early_stopping_loss;
    // data and batches
    const char *layout, *overlong, *prompt_column, *response_column, *history_column, *eval_file, *replay, *probe;
    bool official_mask, combine, gradient_checkpointing;
    int64_t per_device_train_batch_size, per_device_eval_batch_size, gradient_accumulation_steps, max_input_length;
    int64_t max_output_length;
    double val_size;
    // the run
    const char *output_dir, *base, *resume_from_checkpoint, *precision;
    bool force, predict_with_generate, load_best_model_at_end;
    int64_t seed, threads, logging_steps, save_steps, save_total_limit, eval_steps, early_stopping_patience;
    int64_t stop_at_step;
    // answers
    const char *prompt, *system;
    int64_t max_new_tokens, max_context;
    double temperature, top_p;
    // other commands
    const char *out, *dtype, *truth;
    bool ids, decode, check, double_quant;
    int64_t samples, sample, elements, bits;
    double std, max_shard_size;
    bool yaml;                      // a yaml file was read: what it leaves out is as the official scripts have it
    bool given[1024];               // by offset of the field: the user set it, on the command line or in a yaml
} Options;
_Static_assert(offsetof(Options, given) <= 1024, "each field has its place in `given`");

#define GIVEN(options, field) ((options)->given[offsetof(Options, field)])

// ---- 3.4 What a method may hook into -----------------------------------------------------------------------------

// What a method sees of the pass that is under way.
typedef struct {
    size_t T;                       // tokens; for a prefix those of the prefix
    const uint64_t *token_keys;     // [T] for dropout; NULL: dropout is off
    real *scratch;                  // [T, the widest input of a map] for one call to use as it likes
    real *beside_scratch;           // the same, [T, the most that map_keeps or branch_keeps give]
    const int32_t *prefix_rows;     // see prefix_forward
} Pass;

// A key of adapter_config.json that a method has, in its order (11.2, 11.3). Its value is that of the option of its
// name; a key that only PEFT wants has a fixed `text` or a number of the model.
typedef enum { NUMBER_OR_FLAG, WORD, NAMES } KeyForm;
typedef struct {
    const char *key, *usual;        // usual: the value where a file lacks it; NULL: a file must have it; "": none
    KeyForm form;
    const char *needs;              // read only where this flag of the file is true
    bool free, own;                 // free: the user may set another; own: only where PEFT does not read (own_type)
    const char *text;
    size_t (*of_model)(const Config *);
} ConfigKey;

// A function that a method does not need is NULL. A forward writes to `kept` what its backward will read; X_keeps says
// how many numbers that is, for each token (for a prefix: in all). input_ and map_ functions share the `kept` of a map.
// Gradients of weights, and dx beside a map, are added to; dx NULL: nothing below trains.
typedef struct {
    const char *name, *peft_type;   // peft_type: in adapter_config.json
    const char *own_type;           // there instead, where PEFT would compute something else (is_pefts); NULL: never
    double learning_rate;           // the default at hidden 4096; the reason stands in the method's comment
    double width_power;             // times (4096 / hidden) to this; 0: 1/2; few samples take less (section 10)
    const char *help;               // what trains, and what it costs
    const char *no_merge;           // why it cannot be merged; NULL: it can
    void (*setup)(Model *, const Options *);
    // gives what the map and map_forward read instead of x [T,in]; the backward changes dx in place, after the map's
    // own. Backwards are given the old x, so a map whose input this changes must be frozen
    const real *(*input_forward)(const Linear *, const real *x, real *kept, Pass);
    void (*input_backward)(const Linear *, real *dx, const real *x, const real *kept, Pass);
    // beside a map: y[part] [T,rows of the part] are there; the backward comes before the map's own and may change
    // dy, except at o and down: there dy may be the gradient of the residual stream itself
    size_t (*map_keeps)(const Linear *);
    void (*map_forward)(const Linear *, real *const *y, const real *x, real *kept, Pass);
    void (*map_backward)(const Linear *, real *dx, real *const *dy, const real *x, const real *kept, Pass);
    // after a half of a layer: x [T,H] = residual stream + s is changed; s [T,H] is what the half gave. The backward
    // turns dx into the gradient of the residual stream and returns that of s: dx itself, or ds filled; with `below`
    // false nobody reads either, for nothing below trains
    size_t (*branch_keeps)(const Added *, size_t H);
    void (*branch_forward)(const Added *, real *x, const real *s, real *kept, size_t H, Pass);
    real *(*branch_backward)(const Added *, real *dx, real *ds, const real *kept, size_t H, bool below, Pass);
    // kv [2L,n_prefix,kv_heads d]: keys of layer 0, values of layer 0, keys of layer 1, ... Row i of it is row
    // prefix_rows[i] of the same numbers as [n_prefix,2L,kv_heads d]
    size_t (*prefix_keeps)(const Model *);
    void (*prefix_forward)(const Model *, real *kv, real *kept, Pass);
    void (*prefix_backward)(const Model *, const real *dkv, real *kept, Pass);
    const ConfigKey *keys;          // its own, up to one without a name
    void (*settle)(const Model *, Options *);   // sets the options that were left open as setup decided them
    bool (*is_pefts)(const Model *);            // false: own_type
    // what PEFT wants in its file in the place of what trains, the caller's to give back; NULL: what trains
    Tensor *(*projected)(const Model *);
    void (*merge)(real *weight, const Linear *);   // adds what the method does to W [out,in]
} Method;

// ==== 4  Forward and backward ====================================================================================
// A batch is ragged: sequences one after another, without padding. The forward goes through a layer in nine numbered
// steps and keeps what the backward needs; the backward undoes them, from 9 to 1. Gradients flow only as far down as
// something trains; head and loss are computed only at positions that have a target; frozen weights get no gradient.
// At first reading go on to 4.3 and 4.4, and come back to the structs here, and to their memory, for a new name.

// The most rows of a block of logits. Each reads the head's weights, which costs a GPU more than the block's memory.
#ifdef GLMTUNE_CUDA
enum { HEAD_ROWS = 512 };
#else
enum { HEAD_ROWS = 256 };
#endif
enum { NO_TARGET = -100 };          // the label of a token that is no target

typedef struct {                    // on the host; who makes one gives it back
    int32_t *ids, *labels;          // [T]; labels as Hugging Face aligns them: label i belongs to the logits at i - 1
    bool every_row;                 // without labels: logits at every row; false: at the last of each sequence
    uint64_t *token_keys, step_key; // [T] for dropout; and for a prefix, which all samples of a step share
    size_t *starts, n, T;           // [n+1] the rows at which its n sequences begin, and T
} Batch;

// What a layer computes, in the order in which it comes about. n rows: T, or R in the last layer (see Run); kv rows: of
// the whole cache. inv_rms1, inv_rms2, half_inv_rms, lse: of the norms and the softmax; only their backward reads them.
typedef struct {
    real *x, *inv_rms1, *a;                     // [T,H] its input, [T], [T,H] the norm of it
    real *q, *k, *v;                            // [T,heads,d], [kv rows,kv_heads,d] twice
    real *att, *lse;                            // [T,heads,d] what attention gives, [T,heads]
    real *mid, *inv_rms2, *m;                   // [n,H] the stream between the two halves, [n], [n,H] the norm of it
    real *gate_up, *h;                          // [n,2F], [n,F]
    real *half[HALVES], *half_inv_rms[HALVES];  // [n,H] Wo att and W h, [n] of their post norms
    real *beside[MAX_MAPS], *branch[HALVES];    // [n,map_keeps], [n,branch_keeps] what the method keeps
} LayerState;

// FORWARD_ONLY: layers share all but keys and values, the cache. KEEPS_ALL: each keeps what its backward needs.
// RECOMPUTES: each keeps its input alone; before its backward it is computed once more, to the same bits, in arrays
// that all layers share (Chen et al. 2016, arXiv:1604.06174).
typedef enum { FORWARD_ONLY, KEEPS_ALL, RECOMPUTES } RunKind;

// What a sequence has in the cache of keys and values: n rows from `first` on.
typedef struct { size_t first, n; } Cache;

// A model, the memory to run it in, and the batch that is in it. Arrays are in model memory, in the two arenas.
typedef struct {
    Model *model;
    const Method *method;           // of the base alone: one without functions
    RunKind kind;
    size_t max_T, max_kv;           // tokens of a batch; rows of keys and values (a cache holds more than a batch)
    Arena kept_arena, scratch_arena;
    // the batch under way
    size_t T, R;                    // tokens; rows whose logits are wanted
    size_t n_rows;                  // that a layer works on: T, and after the last layer's attention R
    Cache *caches;                  // [sequences], the caller's: what earlier batches left; NULL: nothing is kept
    size_t new_keys;                // row at which the keys and values of the batch are computed
    int32_t *key_rows;              // [T] where they belong in the caches of several sequences
    bool spread_keys, dropout;      // spread_keys: whether they must be moved there
    size_t *starts, *kv_starts, n_sequences, most_queries;       // as attention wants them
    int32_t *ids, *positions;                       // [T]
    int32_t *rows, *targets;                        // [R] rows whose logits are wanted, and their targets
    uint64_t *token_keys, *row_keys, *prefix_keys;  // [T], [R], [P] for dropout; P tokens of a prefix
    int32_t *prefix_rows;                           // [2L P] see Method
    // activations
    LayerState *layers, shared;                     // [n_layers]; shared: what several layers use in turn
    real *rope, *prefix, *prefix_kept;      // [positions,rotated]; [2L,P,kv_heads,d]; kept for the method's backward
    real *x_rows, *att_rows;                        // [R,H], [R,heads,d] the last layer's x and att at those R rows
    real *x_final, *final_inv_rms, *final;          // [R,H] what leaves the last layer, [R], [R,H] the last norm
    // scratch
    real *normed, *logits, *loss;                   // [n_rows,H] a half of a layer, normed; [HEAD_ROWS,V], [R]
    real *scratch, *beside_scratch;                 // see Pass
    real *dx, *dx_rows, *dx_all;                    // of the residual stream: dx is dx_rows [R,H], then dx_all [T,H]
    real *dhalf, *ds, *dnorm;                       // [n_rows,H] of Wo att or W h, of the s of Method, of a or m
    real *dgate_up, *dh, *datt_rows, *datt, *dq, *dk, *dv, *dfinal, *dprefix;       // shaped like their arrays
    real *dkv_heads;                                // [2,P + T,heads,d] dk and dv of each query head
} Run;

// ---- 4.1 The memory of a run -------------------------------------------------------------------------------------

// How many numbers the method keeps for each token beside a map, or after a half of a layer.
static size_t map_keeps(const Run *r, const Linear *w) { return r->method->map_keeps ? r->method->map_keeps(w) : 0; }

static size_t branch_keeps(const Run *r, const Added *a) {
    return r->method->branch_keeps ? r->method->branch_keeps(a, r->model->config.hidden_size) : 0;
}

static real *reals(Arena *a, size_t rows, size_t columns) { return arena_take(a, times(rows, columns), sizeof(real)); }

// Whether the map, or what stands beside it, trains: then its backward needs its input.
static bool needs_input(const Linear *w) { return w->weight->trained || w->added.t[0]; }

// An array of the layer's own where its backward needs it, else one that layers use in turn (the first call takes it).
static real *own_or_shared(Arena *a, bool own, real **shared, size_t rows, size_t columns) {
    if (!own && *shared) return *shared;
    real *array = reals(a, rows, columns);
    if (!own) *shared = array;
    return array;
}

static void lay_out_layer(Run *r, size_t l, Arena *a) {
    const Config *c = &r->model->config;
    const Layer *L = &r->model->layers[l];
    size_t T = r->max_T, H = c->hidden_size, F = c->ffn_dim;
    LayerState *k = &r->layers[l], *s = &r->shared;
    bool own = r->kind == KEEPS_ALL, qkv = false;
    for (size_t i = 0; i < L->n_qkv; i++) qkv = qkv || needs_input(&L->maps[i]);
    k->x = own_or_shared(a, r->kind != FORWARD_ONLY, &s->x, T, H);
    k->inv_rms1 = own_or_shared(a, own, &s->inv_rms1, T, 1), k->a = own_or_shared(a, own && qkv, &s->a, T, H);
    k->q = own_or_shared(a, own, &s->q, T, q_width(c)), k->att = own_or_shared(a, own, &s->att, T, q_width(c));
    k->k = own_or_shared(a, r->kind != RECOMPUTES, &s->k, r->max_kv, kv_width(c));
    k->v = own_or_shared(a, r->kind != RECOMPUTES, &s->v, r->max_kv, kv_width(c));
    k->lse = own_or_shared(a, own, &s->lse, T, c->n_heads);
    k->mid = own_or_shared(a, own, &s->mid, T, H), k->inv_rms2 = own_or_shared(a, own, &s->inv_rms2, T, 1);
    k->m = own_or_shared(a, own && needs_input(L->gate_up), &s->m, T, H);
    k->gate_up = own_or_shared(a, own, &s->gate_up, T, 2 * F);
    k->h = own_or_shared(a, own && needs_input(L->down), &s->h, T, F);
    for (size_t i = 0; i < L->n_maps; i++)
        k->beside[i] = own_or_shared(a, own, &s->beside[i], T, map_keeps(r, &L->maps[i]));
    for (size_t i = 0; i < HALVES; i++) {
        k->half[i] = own_or_shared(a, own && L->post_norm[i], &s->half[i], T, H);
        k->half_inv_rms[i] = own_or_shared(a, own, &s->half_inv_rms[i], T, 1);
        k->branch[i] = own_or_shared(a, own, &s->branch[i], T, branch_keeps(r, &L->branch[i]));
    }
}

static void lay_out_run(Run *r, Arena *kept, Arena *scratch) {
    const Config *c = &r->model->config;
    const Layer *L = r->model->layers;      // what a method keeps is as much in all layers (section 5)
    size_t T = r->max_T, P = r->model->n_prefix, beside = 0;
    size_t H = c->hidden_size, F = c->ffn_dim, qd = q_width(c), kvd = kv_width(c);
    r->shared = (LayerState){0};
    for (size_t l = 0; l < c->n_layers; l++) lay_out_layer(r, l, kept);
    for (size_t i = 0; i < L->n_maps; i++) beside = max_size(beside, map_keeps(r, &L->maps[i]));
    for (size_t i = 0; i < HALVES; i++) beside = max_size(beside, branch_keeps(r, &L->branch[i]));
    r->x_rows = reals(kept, T, H), r->att_rows = reals(kept, T, qd);
    r->x_final = reals(kept, T, H), r->final_inv_rms = reals(kept, T, 1), r->final = reals(kept, T, H);
    r->rope = reals(kept, r->max_kv + r->model->first_position, c->n_rotated);
    r->prefix = reals(kept, 2 * c->n_layers * P, kvd);
    r->prefix_kept = reals(kept, P ? r->method->prefix_keeps(r->model) : 0, 1);
    r->prefix_rows = arena_take(scratch, 2 * c->n_layers * P, sizeof *r->prefix_rows);
    r->prefix_keys = arena_take(scratch, P, sizeof *r->prefix_keys);
    r->ids = arena_take(scratch, T, sizeof *r->ids), r->positions = arena_take(scratch, T, sizeof *r->positions);
    r->rows = arena_take(scratch, T, sizeof *r->rows), r->targets = arena_take(scratch, T, sizeof *r->targets);
    r->token_keys = arena_take(scratch, T, sizeof *r->token_keys);
    r->row_keys = arena_take(scratch, T, sizeof *r->row_keys);
    r->starts = arena_take(scratch, 2 * T + 1, sizeof *r->starts);
    r->kv_starts = arena_take(scratch, 2 * T + 1, sizeof *r->kv_starts);
    r->key_rows = arena_take(scratch, T, sizeof *r->key_rows);
    r->normed = reals(scratch, T, H);
    r->logits = reals(scratch, min_size(HEAD_ROWS, T), c->vocab_size), r->loss = reals(scratch, T, 1);
    r->scratch = reals(scratch, T, max_size(max_size(H, F), qd)), r->beside_scratch = reals(scratch, T, beside);
    if (r->kind == FORWARD_ONLY) return;
    r->dx_rows = reals(scratch, T, H), r->dx_all = reals(scratch, T, H);
    r->dhalf = reals(scratch, T, H), r->dnorm = reals(scratch, T, H);
    r->ds = reals(scratch, branch_keeps(r, &L->branch[MLP]) ? T : 0, H);
    r->dgate_up = reals(scratch, T, 2 * F), r->dh = reals(scratch, T, F), r->dfinal = reals(scratch, T, H);
    r->datt_rows = reals(scratch, T, qd), r->datt = reals(scratch, T, qd), r->dq = reals(scratch, T, qd);
    r->dk = reals(scratch, T, kvd), r->dv = reals(scratch, T, kvd), r->dkv_heads = reals(scratch, 2 * (P + T), qd);
    r->dprefix = reals(scratch, 2 * c->n_layers * P, kvd);
}

// A run that is described but not yet taken: its arenas only count. method NULL: the base alone.
static Run describe_run(Model *m, const Method *method, RunKind kind, size_t max_T, size_t max_kv) {
    static const Method none;
    Run r = { .model = m, .method = method ? method : &none, .kind = kind, .max_T = max_T, .max_kv = max_kv };
    r.layers = alloc(m->config.n_layers, sizeof *r.layers);
    lay_out_run(&r, &r.kept_arena, &r.scratch_arena);
    return r;
}

// Copies to model memory what was made on the host, and gives that back.
static void move_in(void *device, void *host, size_t bytes) {
    memory_copy_in(device, host, bytes);
    free(host);
}

static void take_run(Run *r) {
    const char *what = "activations (lower the number or the length of the samples in a batch)";
    Arena *arenas[] = { &r->kept_arena, &r->scratch_arena };
    for (size_t i = 0; i < COUNT(arenas); i++)
        *arenas[i] = (Arena){ .block = device_take(arenas[i]->used, 1, what), .size = arenas[i]->used };
    lay_out_run(r, &r->kept_arena, &r->scratch_arena);      // now that they have blocks, in them
    rope_table(r->rope, r->model->config.rope_theta, r->model->config.n_rotated, r->max_kv + r->model->first_position);
    size_t P = r->model->n_prefix, n = 2 * r->model->config.n_layers;
    int32_t *rows = alloc(n * P, sizeof *rows);
    for (size_t i = 0; i < n * P; i++) rows[i] = (int32_t)(i % P * n + i / P);     // [n,P] as rows of [P,n]
    move_in(r->prefix_rows, rows, n * P * sizeof *rows);
}

static void give_run(Run *r) {
    memory_give(r->kept_arena.block);
    memory_give(r->scratch_arena.block);
    free(r->layers);
}

// Whether the logits of row t of a sequence that ends before row `end` are wanted: it has a target, label t + 1.
static bool has_logits(const Batch *b, size_t t, size_t end) {
    if (b->labels) return t + 1 < end && b->labels[t+1] != NO_TARGET;
    return b->every_row || t + 1 == end;
}

// Says where attention finds the keys of each sequence. Without caches they lie as the rows of the batch do. A cache
// has free rows after its keys, but where one sequence ends the next begins: so an empty sequence, without queries,
// owns those rows (caches come in ascending order). New keys of several sequences go to the last rows, then are moved.
static void place_keys(Run *r, const Batch *b) {
    const Cache *c = r->caches;
    size_t n = c ? 2 * b->n - 1 : b->n, each = c ? 2 : 1, most = 0;
    size_t *starts = alloc(n + 1, sizeof *starts), *kv_starts = alloc(n + 1, sizeof *kv_starts);
    int32_t *rows = alloc(b->T, sizeof *rows);
    for (size_t s = 0, t = 0, i = 0; s < b->n; s++, i += each) {
        most = max_size(most, b->starts[s+1] - b->starts[s]);
        starts[i] = b->starts[s], starts[i+1] = b->starts[s+1];
        kv_starts[i] = c ? c[s].first : starts[i];
        size_t next = kv_starts[i] + (c ? c[s].n : 0);      // row of the first new key
        while (t < b->starts[s+1]) rows[t++] = (int32_t)next++;
        kv_starts[i+1] = next;
    }
    r->n_sequences = n, r->most_queries = most;
    r->spread_keys = c && b->n > 1;
    r->new_keys = r->spread_keys ? r->max_kv - r->max_T : c ? c->first + c->n : 0;
    if (b->T > r->max_T || r->new_keys + b->T > r->max_kv)
        fail("internal error: a batch of %zu tokens is too large", b->T);
    move_in(r->starts, starts, (n + 1) * sizeof *starts);
    move_in(r->kv_starts, kv_starts, (n + 1) * sizeof *kv_starts);
    move_in(r->key_rows, rows, b->T * sizeof *rows);
}

static void load_batch(Run *r, const Batch *b, bool dropout) {
    int32_t *positions = alloc(b->T, sizeof *positions), *rows = alloc(b->T, sizeof *rows);
    int32_t *targets = alloc(b->T, sizeof *targets);
    uint64_t *row_keys = alloc(b->T, sizeof *row_keys);
    place_keys(r, b);
    r->T = b->T, r->R = 0, r->dropout = dropout;
    for (size_t s = 0; s < b->n; s++)
        for (size_t t = b->starts[s]; t < b->starts[s+1]; t++) {
            positions[t] = (int32_t)(r->model->first_position + (r->caches ? r->caches[s].n : 0) + t - b->starts[s]);
            if (!has_logits(b, t, b->starts[s+1])) continue;
            rows[r->R] = (int32_t)t;
            targets[r->R] = b->labels ? b->labels[t+1] : 0;
            row_keys[r->R++] = dropout ? b->token_keys[t] : 0;
        }
    memory_copy_in(r->ids, b->ids, b->T * sizeof *b->ids);
    move_in(r->positions, positions, b->T * sizeof *positions);
    move_in(r->rows, rows, r->R * sizeof *rows);
    move_in(r->targets, targets, r->R * sizeof *targets);
    move_in(r->row_keys, row_keys, r->R * sizeof *row_keys);
    if (dropout) memory_copy_in(r->token_keys, b->token_keys, b->T * sizeof *b->token_keys);
    for (size_t i = 0; dropout && i < r->model->n_prefix; i++) {
        uint64_t key = rng_key(rng_key(b->step_key, KEY_PREFIX), i);
        memory_copy_in(r->prefix_keys + i, &key, sizeof key);
    }
}

static size_t bytes_of(const Run *r) { return r->kept_arena.used + r->scratch_arena.used; }

// ---- 4.2 Memory of what trains -----------------------------------------------------------------------------------

// What trains has up to four arrays: its numbers and, unless it is only loaded, its gradient and moments.
static size_t arrays_of(const Model *m, bool trains) { return trains ? 2 + m->n_moments : 1; }

static size_t trainable_bytes(const Model *m, bool trains) {
    Arena count = {0};
    for (size_t i = 0; i < m->n_trained; i++)
        for (size_t k = 0; k < arrays_of(m, trains); k++) arena_take(&count, m->trained[i]->n, sizeof(real));
    return count.used;
}

// Takes the memory and sets the first values: those of the file for a base tensor, random ones for a new tensor.
static void start_trainables(Model *m, uint64_t seed, bool trains) {
    m->trainables.size = trainable_bytes(m, trains);
    m->trainables.block = device_take(m->trainables.size, 1, "what trains (weights, gradients, moments)");
    for (size_t i = 0; i < m->n_trained; i++) {
        Tensor *t = m->trained[i];
        real **places[] = { &t->value, &t->grad, &t->moments[0], &t->moments[1] };
        for (size_t k = 0; k < arrays_of(m, trains); k++) *places[k] = arena_take(&m->trainables, t->n, sizeof(real));
        if (t->data) widen(t->value, t->data, t->dtype, t->n);
        else (t->start.normal ? fill_normal : fill_uniform)(t->value, rng_key(seed, hash_name(t->name)),
                                                            t->start.center, t->start.spread, t->n);
        t->data = t->value;
        t->dtype = REAL;
    }
}

// ---- 4.3 A linear map with what stands beside it -----------------------------------------------------------------

static Pass pass_of(const Run *r) {
    return (Pass){ .T = r->n_rows, .scratch = r->scratch, .beside_scratch = r->beside_scratch,
                   .token_keys = !r->dropout ? NULL : r->n_rows == r->T ? r->token_keys : r->row_keys };
}

static Pass prefix_pass(const Run *r) {
    return (Pass){ .T = r->model->n_prefix, .token_keys = r->dropout ? r->prefix_keys : NULL,
                   .prefix_rows = r->prefix_rows };
}

static Weight weight_of(const Tensor *t) { return (Weight){ t->data, t->dtype, 0, t->scales }; }

// y[part] [n,rows of the part] = from[part] + W x + b, and what the method adds; from NULL: 0; k: of the map's layer
static void map_forward(const Run *r, const LayerState *k, const Linear *w, real *const *y, real *const *from,
                        const real *x) {
    real *kept = k->beside[w->index];
    if (r->method->input_forward) x = r->method->input_forward(w, x, kept, pass_of(r));
    linear_parts_forward(y, from, x, weight_of(w->weight), 1, r->n_rows, w->part_rows, w->n_parts, w->n_in);
    for (size_t i = 0, row = 0; w->bias && i < w->n_parts; row += w->part_rows[i++])
        bias_forward(y[i], (const real *)w->bias->data + row, r->n_rows, w->part_rows[i]);
    if (r->method->map_forward) r->method->map_forward(w, y, x, kept, pass_of(r));
}

// dx [n,in] is overwritten by the first map and added to by the others; NULL: nothing below trains. The method adds to
// dx before the map's own product does: if it acts on the first map, dx is zeroed first.
static void map_backward(const Run *r, const LayerState *k, const Linear *w, real *dx, bool first, real *const *dy,
                         const real *x) {
    const real *kept = k->beside[w->index];
    size_t n = r->n_rows;
    if (dx && first && w->added.t[0]) zero(dx, n * w->n_in), first = false;
    if (r->method->map_backward) r->method->map_backward(w, dx, dy, x, kept, pass_of(r));
    for (size_t i = 0, row = 0; i < w->n_parts; row += w->part_rows[i++]) {
        size_t n_out = w->part_rows[i];
        if (w->bias && w->bias->grad) bias_backward(w->bias->grad + row, dy[i], n, n_out);
        if (w->weight->grad) linear_backward_weight(w->weight->grad + row * w->n_in, dy[i], x, 1, n, n_out, w->n_in);
    }
    if (dx)
        linear_parts_backward_input(dx, first ? NULL : dx, dy, weight_of(w->weight), 1, n, w->part_rows, w->n_parts,
                                    w->n_in);
    if (r->method->input_backward) r->method->input_backward(w, dx, x, kept, pass_of(r));
}

static void norm_forward(const Run *r, real *y, real *inv_rms, const real *x, const Tensor *gain) {
    rmsnorm_forward(y, inv_rms, x, gain->data, (real)r->model->config.rms_norm_eps, r->n_rows, gain->n);
}

// dx [n,H] = from + the norm's gradient; that of its gain is added to
static void norm_backward(const Run *r, real *dx, const real *from, const real *dy, const real *x, const Tensor *gain,
                          const real *inv_rms) {
    rmsnorm_backward(dx, from, gain->grad, dy, x, gain->data, inv_rms, r->n_rows, gain->n);
}

// ---- 4.4 A layer -------------------------------------------------------------------------------------------------

static AttentionShape attention_shape(const Run *r) {
    const Config *c = &r->model->config;
    return (AttentionShape){ r->n_sequences, c->n_heads, c->n_kv_heads, c->head_dim, r->model->n_prefix, r->T,
                             r->most_queries, r->starts, r->caches ? r->kv_starts : r->starts };
}

// The keys (kv 0) or values (1) of the prefix in a layer, or their gradient; NULL without one.
static real *prefix_at(const Run *r, real *prefix, size_t l, size_t kv) {
    return r->model->n_prefix ? prefix + (2*l + kv) * r->model->n_prefix * kv_width(&r->model->config) : NULL;
}

static const Linear *map_at_end(const Layer *L, size_t half) { return half == MLP ? L->down : L->o; }

// Whether nothing stands beside the map that ends a half of a layer, or after the half: nobody needs W y alone.
static bool ends_plainly(const Run *r, const Layer *L, size_t half) {
    return !L->post_norm[half] && !map_at_end(L, half)->added.t[0] && !r->method->branch_forward;
}

// Ends a half of layer l: out [n,H] = x + s; s = W y, normalized if there is a post norm; then what the method does. If
// it ends plainly, the product starts from x.
static void half_forward(const Run *r, size_t l, size_t half, real *out, real *x, const real *y) {
    const Layer *L = &r->model->layers[l];
    const LayerState *k = &r->layers[l];
    size_t H = r->model->config.hidden_size;
    bool plain = ends_plainly(r, L, half);
    map_forward(r, k, map_at_end(L, half), plain ? &out : &k->half[half], plain ? &x : NULL, y);
    if (plain) return;
    const real *s = L->post_norm[half] ? r->normed : k->half[half];
    if (L->post_norm[half]) norm_forward(r, r->normed, k->half_inv_rms[half], k->half[half], L->post_norm[half]);
    add(out, x, s, r->n_rows * H);
    if (r->method->branch_forward) r->method->branch_forward(&L->branch[half], out, s, k->branch[half], H, pass_of(r));
}

static bool is_last(const Run *r, size_t l) { return l + 1 == r->model->config.n_layers; }

static void self_attention_forward(Run *r, size_t l) {
    const Layer *L = &r->model->layers[l];
    const Config *c = &r->model->config;
    LayerState *k = &r->layers[l];
    size_t kvd = kv_width(c);
    real *k_new = k->k + r->new_keys * kvd, *v_new = k->v + r->new_keys * kvd, *qkv[] = { k->q, k_new, v_new };
    real *x = k->x, *att = k->att;
    // 1. a = norm(x)
    norm_forward(r, k->a, k->inv_rms1, k->x, L->input_norm);
    // 2. q, k, v = W a + b: three maps, or one with three parts
    for (size_t i = 0; i < L->n_qkv; i++) map_forward(r, k, &L->maps[i], qkv + i, NULL, k->a);
    // 3. q, k turned by their positions
    rope_forward(k->q, r->positions, r->rope, r->T, c->n_heads, c->head_dim, c->n_rotated);
    rope_forward(k_new, r->positions, r->rope, r->T, c->n_kv_heads, c->head_dim, c->n_rotated);
    if (r->spread_keys) {           // adds to rows that section 9 has zeroed
        gather_backward(k->k, k_new, r->key_rows, r->T, kvd);
        gather_backward(k->v, v_new, r->key_rows, r->T, kvd);
    }
    // 4. att = attention(q, k, v); in the last layer only the rows whose logits are wanted go on
    attention_forward(k->att, k->lse, k->q, k->k, k->v, prefix_at(r, r->prefix, l, 0), prefix_at(r, r->prefix, l, 1),
                      attention_shape(r));
    if (is_last(r, l)) {
        gather_forward(r->x_rows, x, r->rows, r->R, c->hidden_size);
        gather_forward(r->att_rows, att, r->rows, r->R, q_width(c));
        x = r->x_rows, att = r->att_rows, r->n_rows = r->R;
    }
    // 5. mid = x + [norm] (Wo att)
    half_forward(r, l, ATTENTION, k->mid, x, att);
}

// To the end, or without its last step.
static void mlp_forward(const Run *r, size_t l, bool to_end) {
    const Layer *L = &r->model->layers[l];
    LayerState *k = &r->layers[l];
    // 6. m = norm(mid)
    norm_forward(r, k->m, k->inv_rms2, k->mid, L->mlp_norm);
    // 7. gate, up = W m
    map_forward(r, k, L->gate_up, &k->gate_up, NULL, k->m);
    // 8. h = silu(gate) up
    swiglu_forward(k->h, k->gate_up, r->n_rows, r->model->config.ffn_dim);
    // 9. out = mid + [norm] (W h)
    if (to_end) half_forward(r, l, MLP, is_last(r, l) ? r->x_final : r->layers[l+1].x, k->mid, k->h);
}

// Computes layer l once more, so that the shared arrays hold its values. A plain end of the MLP is left out, for no
// backward reads it; another writes the next layer's input as it is. The values of the last layer are there still.
static void recompute_layer(Run *r, size_t l) {
    if (is_last(r, l)) return;
    self_attention_forward(r, l);
    mlp_forward(r, l, !ends_plainly(r, &r->model->layers[l], MLP));
}

// Whether anything trains below a stage of a layer, so that gradients must go on.
static bool flows_below(const Run *r, size_t l, size_t stage) { return r->model->lowest < depth_of(l, stage); }

// The array for a gradient that goes on below a stage of a layer; NULL: nothing there trains.
static real *if_flows(const Run *r, real *array, size_t l, size_t stage) {
    return flows_below(r, l, stage) ? array : NULL;
}

// r->dx is the gradient of half_forward's out. Returns that of W y, maybe r->dx itself; NULL: nothing there trains.
static real *half_backward(const Run *r, size_t l, size_t half) {
    const Layer *L = &r->model->layers[l];
    const LayerState *k = &r->layers[l];
    size_t post_norm = half == MLP ? AT_MLP_POST_NORM : AT_ATTENTION_POST_NORM, branch = post_norm + 1;     // stages
    real *ds = r->dx;
    if (r->method->branch_backward)
        ds = r->method->branch_backward(&L->branch[half], r->dx, r->ds, k->branch[half], r->model->config.hidden_size,
                                        flows_below(r, l, branch), pass_of(r));
    if (!flows_below(r, l, branch)) return NULL;
    if (L->post_norm[half]) {
        norm_backward(r, r->dhalf, NULL, ds, k->half[half], L->post_norm[half], k->half_inv_rms[half]);
        ds = r->dhalf;
    }
    return flows_below(r, l, post_norm) ? ds : NULL;
}

static bool mlp_backward(const Run *r, size_t l) {
    // r->dx holds the gradient of the layer's output and becomes that of mid; false: nothing further down trains
    const Layer *L = &r->model->layers[l];
    LayerState *k = &r->layers[l];
    // 9. out = mid + [norm] (W h)
    real *dhalf = half_backward(r, l, MLP);
    if (!dhalf) return false;
    real *dh = if_flows(r, r->dh, l, AT_DOWN);
    map_backward(r, k, L->down, dh, true, &dhalf, k->h);
    if (!dh) return false;
    // 8. h = silu(gate) up
    swiglu_backward(r->dgate_up, dh, k->gate_up, r->n_rows, r->model->config.ffn_dim);
    // 7. gate, up = W m
    real *dm = if_flows(r, r->dnorm, l, AT_GATE_UP), *dgate_up = r->dgate_up;
    map_backward(r, k, L->gate_up, dm, true, &dgate_up, k->m);
    if (!dm) return false;
    // 6. m = norm(mid)
    norm_backward(r, r->dx, r->dx, dm, k->mid, L->mlp_norm, k->inv_rms2);
    return flows_below(r, l, AT_MLP_NORM);
}

static bool self_attention_backward(Run *r, size_t l) {
    // r->dx holds the gradient of mid and becomes that of the layer's input
    const Layer *L = &r->model->layers[l];
    const Config *c = &r->model->config;
    const LayerState *k = &r->layers[l];
    size_t T = r->T, H = c->hidden_size, qd = q_width(c);
    // 5. mid = x + [norm] (Wo att)
    real *dhalf = half_backward(r, l, ATTENTION);
    if (!dhalf) return false;
    real *datt = if_flows(r, is_last(r, l) ? r->datt_rows : r->datt, l, AT_O);
    map_backward(r, k, L->o, datt, true, &dhalf, is_last(r, l) ? r->att_rows : k->att);
    if (!datt) return false;
    if (is_last(r, l)) {            // only R rows went on: back to T rows; the gradients of the others are zero
        zero(r->dx_all, T * H), zero(r->datt, T * qd);
        gather_backward(r->dx_all, r->dx_rows, r->rows, r->R, H);
        gather_backward(r->datt, r->datt_rows, r->rows, r->R, qd);
        r->dx = r->dx_all, r->n_rows = T;
    }
    // 4. att = attention(q, k, v)
    attention_backward(r->dq, r->dk, r->dv, prefix_at(r, r->dprefix, l, 0), prefix_at(r, r->dprefix, l, 1),
                       r->dkv_heads, r->datt, k->att, k->lse, k->q, k->k, k->v, prefix_at(r, r->prefix, l, 0),
                       prefix_at(r, r->prefix, l, 1), attention_shape(r));
    // 3. q, k turned by their positions
    rope_backward(r->dq, r->positions, r->rope, T, c->n_heads, c->head_dim, c->n_rotated);
    rope_backward(r->dk, r->positions, r->rope, T, c->n_kv_heads, c->head_dim, c->n_rotated);
    // 2. q, k, v = W a + b
    real *da = if_flows(r, r->dnorm, l, AT_QKV), *dqkv[] = { r->dq, r->dk, r->dv };
    for (size_t i = 0; i < L->n_qkv; i++) map_backward(r, k, &L->maps[i], da, !i, dqkv + i, k->a);
    if (!da) return false;
    // 1. a = norm(x)
    norm_backward(r, r->dx, r->dx, da, k->x, L->input_norm, k->inv_rms1);
    return flows_below(r, l, AT_INPUT_NORM);
}

// ---- 4.5 Head and loss -------------------------------------------------------------------------------------------

static void head_forward(const Run *r, const real *final, size_t n) {       // r->logits [n,V], n <= HEAD_ROWS
    const Tensor *head = r->model->head;
    linear_forward(r->logits, NULL, final, weight_of(head), 1, n, head->shape[0], head->shape[1]);
}

// The sum of the losses at all targets. With scale > 0 also the gradients of scale times that sum: added to those of
// head and last norm, and r->dx becomes that of x_final.
static double head_loss(Run *r, real smoothing, real scale) {
    const Tensor *head = r->model->head;
    size_t H = head->shape[1], V = head->shape[0];
    bool flows = scale > 0 && flows_below(r, r->model->config.n_layers, AT_HEAD);
    r->dx = r->dx_rows;
    for (size_t row = 0; row < r->R; row += HEAD_ROWS) {
        size_t n = min_size(HEAD_ROWS, r->R - row);
        const real *final = r->final + row*H;
        head_forward(r, final, n);
        cross_entropy(r->loss + row, r->logits, r->targets + row, smoothing, scale, n, V);
        const real *dlogits = r->logits;        // written over them
        if (flows) linear_backward_input(r->dfinal + row*H, NULL, dlogits, weight_of(head), 1, n, V, H);
        if (scale > 0 && head->grad) linear_backward_weight(head->grad, dlogits, final, 1, n, V, H);
    }
    if (flows) norm_backward(r, r->dx, NULL, r->dfinal, r->x_final, r->model->final_norm, r->final_inv_rms);
    real *loss = alloc(r->R, sizeof *loss);
    double sum = 0;
    memory_copy_out(loss, r->loss, r->R * sizeof *loss);
    for (size_t i = 0; i < r->R; i++) sum += (double)loss[i];
    free(loss);
    return sum;
}

// ---- 4.6 The whole model -----------------------------------------------------------------------------------------

// Whether the keys and values of a prefix are still to be computed: where a cache has tokens, they are there.
static bool needs_prefix(const Run *r, const Batch *b) {
    bool begins = !r->caches;
    for (size_t i = 0; !begins && i < b->n; i++) begins = !r->caches[i].n;
    return begins && r->model->n_prefix;
}

// Everything up to the last norm: r->final [R,H], at the rows whose logits are wanted.
static void forward(Run *r, const Batch *b, bool dropout) {
    const Tensor *e = r->model->embedding;
    load_batch(r, b, dropout);
    embedding_forward(r->layers[0].x, r->ids, weight_of(e), r->T, e->shape[1]);
    if (needs_prefix(r, b)) r->method->prefix_forward(r->model, r->prefix, r->prefix_kept, prefix_pass(r));
    r->n_rows = r->T;
    for (size_t l = 0; l < r->model->config.n_layers; l++) self_attention_forward(r, l), mlp_forward(r, l, true);
    norm_forward(r, r->final, r->final_inv_rms, r->x_final, r->model->final_norm);
}

// The logits at every position of a batch, not only at targets: [T,V], on the host.
static real *all_logits(Run *r, const Batch *b) {
    size_t H = r->model->config.hidden_size, V = r->model->config.vocab_size;
    real *logits = alloc(times(b->T, V), sizeof *logits);
    Batch every = *b;
    every.labels = NULL, every.every_row = true;
    forward(r, &every, false);
    for (size_t t = 0; t < b->T; t += HEAD_ROWS) {
        size_t n = min_size(HEAD_ROWS, b->T - t);
        head_forward(r, r->final + t*H, n);
        memory_copy_out(logits + t*V, r->logits, n * V * sizeof *logits);
    }
    return logits;
}

static double forward_loss(Run *r, const Batch *b) {
    forward(r, b, false);
    return head_loss(r, 0, 0);
}

// Undoes the layers, from r->dx, the gradient of x_final, down to the embedding.
static void backward(Run *r) {
    size_t l = r->model->config.n_layers, P = r->model->n_prefix;
    bool more = flows_below(r, l, AT_FINAL_NORM);
    while (more && l-- > 0) {
        if (r->kind == RECOMPUTES) recompute_layer(r, l);
        more = mlp_backward(r, l) && self_attention_backward(r, l);
    }
    if (P) r->method->prefix_backward(r->model, r->dprefix, r->prefix_kept, prefix_pass(r));
    const Tensor *e = r->model->embedding;
    if (more && e->grad) embedding_backward(e->grad, r->dx, r->ids, r->T, e->shape[1]);
}

// The sum of the losses at the targets of a batch; gradients of (that sum / n_targets) are added to what trains.
// n_targets are those of the whole optimizer step, so that micro-batches add up to one batch.
static double forward_backward(Run *r, const Batch *b, size_t n_targets, double smoothing, bool dropout) {
    forward(r, b, dropout);
    double sum = head_loss(r, (real)smoothing, 1 / (real)n_targets);
    backward(r);
    return sum;
}

// ==== 5  Tuning methods ==========================================================================================
// A method says which tensors of the base train, which new ones there are and how they start (`setup`), what it does
// in a layer, and how it stands in adapter_config.json. There are four places to act: on what a linear map reads (as
// README's IA3), beside the map, after each half of a layer, and in a prefix of keys and values that every token sees.
// To add one, write a block as those below (math, setup, forward, backward, keys, merging) and a row of the table in
// 5.7. Two rules: X_keeps is equal in all layers; what acts after a half of a layer acts after the MLP, too. (Only
// dump, yaml files and ChatGLM's own prefix folders know some of the methods by name.)

// ---- 5.1 Helpers of methods --------------------------------------------------------------------------------------

// Marks a tensor as trained; its memory is taken when all are known.
static void train_tensor(Model *m, Tensor *t) {
    if (t->scales)
        fail("'%s' is quantised, and codes cannot be trained: take --method lora, ptuning or adapter, or the base in "
             "fp16 or bf16", t->name);
    t->trained = true;
    m->lowest = min_size(m->lowest, t->depth);
    m->trained = grow(m->trained, &m->trained_capacity, m->n_trained + 1, sizeof *m->trained);
    m->trained[m->n_trained++] = t;
}

// A tensor that a method adds and trains; columns 0: a vector.
static Tensor *add_tensor(Model *m, const char *tensor_name, size_t rows, size_t columns, size_t depth, Start start) {
    Tensor *t = describe_tensor(tensor_name, rows, columns, depth);
    t->start = start;
    train_tensor(m, t);
    return t;
}

// x [T,n], with some of it dropped in `out`; x itself where nothing is.
static const real *with_dropout(real *out, const real *x, uint64_t site, real dropout, size_t n, Pass p) {
    if (!p.token_keys || !(dropout > 0)) return x;
    dropout_forward(out, x, p.token_keys, site, dropout, p.T, n);
    return out;
}

// y [T,out] = from + W x + b, of tensors that a method added
static void affine_forward(real *y, const real *from, const real *x, const Tensor *w, const Tensor *b, size_t T) {
    linear_forward(y, from, x, weight_of(w), 1, T, w->shape[0], w->shape[1]);
    bias_forward(y, b->data, T, w->shape[0]);
}

// dx [T,in] = from + W^T dy; NULL: nobody asks for it
static void affine_backward(real *dx, const real *from, const real *dy, const real *x, const Tensor *w,
                            const Tensor *b, size_t T) {
    bias_backward(b->grad, dy, T, w->shape[0]);
    linear_backward_weight(w->grad, dy, x, 1, T, w->shape[0], w->shape[1]);
    if (dx) linear_backward_input(dx, from, dy, weight_of(w), 1, T, w->shape[0], w->shape[1]);
}

// A list of linear maps in the names of this layout; NULL, all of them: there is no list, or PEFT's word for it. With
// `translated` the names may be the other layout's: a fused map stands for its three parts, each of these for it.
static const char *modules_here(const Model *m, const char *list, bool translated) {
    static const char *const names[][2] = {
        { "q_proj,k_proj,v_proj", "query_key_value" }, { "o_proj", "dense" }, { "gate_up_proj", "dense_h_to_4h" },
        { "down_proj", "dense_4h_to_h" } };
    bool remote = m->config.remote;
    const Layer *l = &m->layers[0];
    Text here = {0}, known = {0};
    if (!list || !strcasecmp(list, "all-linear")) return NULL;
    for (size_t i = 0; i < l->n_maps; i++) text_print(&known, "%s%s", i ? "," : "", l->maps[i].short_name);
    for (char *rest = strf("%s", list), *one; (one = strtok_r(rest, ",", &rest)); ) {
        const char *is = one;
        for (size_t i = 0; translated && i < COUNT(names); i++)
            if (list_has(names[i][!remote], one)) is = names[i][remote];
        if (!names_in(known.s, is)) fail("target module '%s' is not in this model; it has %s", one, known.s);
        if (!names_in(here.s, is)) text_print(&here, "%s%s", here.n ? "," : "", is);
    }
    if (list_has(here.s, names[0][1]) && !list_has(list, names[0][1]) && !names_in(list, names[0][0]))
        fprintf(stderr, "note: q_proj, k_proj and v_proj are one map here, query_key_value, which is taken whole\n");
    return here.s ? here.s : "";
}

// ---- 5.2 LoRA ----------------------------------------------------------------------------------------------------
// Leaves a linear map W [out,in] as it is and learns a low-rank change beside it (Hu et al. 2021, arXiv:2106.09685):
//     y = W x + s B A dropout(x)    A [r,in] ~ U(+-1/sqrt(in)), B [out,r] = 0, s = alpha / r (rsLoRA: alpha / sqrt(r))
// B starts at zero, so training starts from the base model exactly. Cost: r (in + out) parameters a map. A fused
// query_key_value has one A and one B, whose rows serve the three parts; the gradient of A is the sum of the three.
// Learning rate 5e-4: GLM-4's official one, ten times that of full tuning, because B has to grow from zero.

enum { LORA_A, LORA_B };

// The maps that LoRA stands beside; NULL: all. Without a list a yaml has PEFT's; an adapter's is of this layout.
static const char *lora_targets(const Model *m, const Options *o) {
    static const char *const ends[] = { "lm_head", "output_layer", "embed_tokens", "word_embeddings" };
    for (size_t i = 0; i < COUNT(ends); i++)
        if (list_has(o->target_modules, ends[i])) fail("LoRA on %s is not supported, only on a layer's maps", ends[i]);
    if (o->yaml && !o->target_modules) return m->config.remote ? "query_key_value" : "q_proj,k_proj,v_proj";
    return modules_here(m, o->target_modules, GIVEN(o, target_modules));
}

static void lora_setup(Model *m, const Options *o) {
    const char *targets = lora_targets(m, o);
    double scale = o->lora_alpha / (o->use_rslora ? sqrt((double)o->r) : (double)o->r);
    for (size_t i = 0; i < m->config.n_layers; i++)
        for (Linear *w = m->layers[i].maps, *end = w + m->layers[i].n_maps; w < end; w++) {
            if (targets && !list_has(targets, w->short_name)) continue;
            Start uniform = { .spread = (float)(1 / sqrt((double)w->n_in)) }, zeros = {0};
            const char *a = strf("base_model.model.%s.lora_A.weight", w->path);
            const char *b = strf("base_model.model.%s.lora_B.weight", w->path);
            w->added = (Added){ .scale = (real)scale, .dropout = (real)o->lora_dropout };
            w->added.t[LORA_A] = add_tensor(m, a, (size_t)o->r, w->n_in, w->depth, uniform);
            w->added.t[LORA_B] = add_tensor(m, b, w->n_out, (size_t)o->r, w->depth, zeros);
        }
    if (!m->n_trained) fail("--target_modules '%s' names no linear map", targets ? targets : "");
}

static size_t lora_rank(const Linear *w) { return w->added.t[LORA_A] ? w->added.t[LORA_A]->shape[0] : 0; }

// y[part] [T,rows of the part] are added to, x [T,in]; keeps z = A dropout(x) [T,r]
static void lora_forward(const Linear *w, real *const *y, const real *x, real *z, Pass p) {
    size_t r = lora_rank(w);
    if (!r) return;
    x = with_dropout(p.scratch, x, w->site, w->added.dropout, w->n_in, p);
    linear_forward(z, NULL, x, weight_of(w->added.t[LORA_A]), 1, p.T, r, w->n_in);
    linear_parts_forward(y, y, z, weight_of(w->added.t[LORA_B]), w->added.scale, p.T, w->part_rows, w->n_parts, r);
}

// dx [T,in] is added to, NULL: nothing below trains; dy[part] [T,rows of the part]
//     dz = s B^T dy,  dB += s dy z^T,  dA += dz dropout(x)^T,  dx += dropout'(A^T dz)
static void lora_backward(const Linear *w, real *dx, real *const *dy, const real *x, const real *z, Pass p) {
    size_t r = lora_rank(w), at = 0;
    if (!r) return;
    const Tensor *a = w->added.t[LORA_A], *b = w->added.t[LORA_B];
    real *dz = p.beside_scratch;
    linear_parts_backward_input(dz, NULL, dy, weight_of(b), w->added.scale, p.T, w->part_rows, w->n_parts, r);
    for (size_t i = 0; i < w->n_parts; at += w->part_rows[i++] * r)
        linear_backward_weight(b->grad + at, dy[i], z, w->added.scale, p.T, w->part_rows[i], r);
    const real *dropped = with_dropout(p.scratch, x, w->site, w->added.dropout, w->n_in, p);
    linear_backward_weight(a->grad, dz, dropped, 1, p.T, r, w->n_in);
    if (!dx) return;
    real *ddropped = dropped == x ? dx : p.scratch;         // overwrites dropout(x), which is needed no more
    linear_backward_input(ddropped, dropped == x ? dx : NULL, dz, weight_of(a), 1, p.T, r, w->n_in);
    if (ddropped != dx) dropout_backward(dx, ddropped, p.token_keys, w->site, w->added.dropout, p.T, w->n_in);
}

static void lora_settle(const Model *m, Options *o) {
    Text list = {0};
    for (const Linear *w = m->layers[0].maps, *end = w + m->layers[0].n_maps; w < end; w++)
        if (lora_rank(w)) text_print(&list, "%s%s", list.n ? "," : "", w->short_name);
    o->target_modules = list.s;
}

static const ConfigKey lora_keys[] = {
    { "r", .usual = "8" }, { "lora_alpha", .usual = "8" }, { "lora_dropout", .usual = "0", .free = true },
    { "use_rslora", .usual = "false" },
    { "bias", .text = "\"none\"" }, { "fan_in_fan_out", .text = "false" }, { "init_lora_weights", .text = "true" },
    { "target_modules", .form = NAMES }, { 0 } };

// weight [out,in] += s B [out,r] A [r,in]: as dx += s dy W, with B as dy and A as W
static void lora_merge(real *weight, const Linear *w) {
    if (lora_rank(w))
        linear_backward_input(weight, weight, w->added.t[LORA_B]->value, weight_of(w->added.t[LORA_A]), w->added.scale,
                              w->n_out, lora_rank(w), w->n_in);
}

// ---- 5.3 Full tuning ---------------------------------------------------------------------------------------------
// Every tensor of the base trains. Cost: 16 bytes a parameter (weight, gradient, two moments). Learning rate 5e-5, that
// of the official `sft` recipes: every weight moves, so each must move little.

static void full_setup(Model *m, const Options *o) {
    (void)o;
    for (size_t i = 0; i < m->n_tensors; i++) train_tensor(m, m->tensors[i]);
}

// ---- 5.4 P-tuning v2 ---------------------------------------------------------------------------------------------
// Leaves the model as it is and learns the keys and values of P tokens that are not there: in every layer every token
// of every sequence sees them before its own (Li & Liang 2021, arXiv:2101.00190; Liu et al. 2022, arXiv:2110.07602).
//     u [P,2Lgd] = E,  or, with a projection,  W2 tanh(W1 E + b1) + b2        column ((2 layer + kv) g + head) d + c
// for L layers of g key/value heads of d features; kv is 0 for a key, 1 for a value.
// These keys are not rotated. Two conventions: `chatglm`, of ChatGLM2/3's own code, counts the text's positions from 0,
// drops out 0.1 of u, and its E is as wide as u even where it is projected; `peft` counts them from P, and a projected
// E is g d wide. A prefix of zeros is not the base: exp(q 0) = 1, so P keys take their share of every softmax.
// E starts N(0,1), the rest uniform on +-1/sqrt(in), as torch does. Cost: 2 L g d P parameters, and P keys more for
// every token. What it learns: a manner, a role, samples by heart; of new facts asked in other words one in ten
// (README, What the methods learn), because queries that do not train look them up.
// Learning rate 2e-2, ChatGLM2's official one (with a projection, which multiplies every step, give a quarter): AdamW
// moves a number by about the rate in a step (3.2 times it at most), and u must move by about its own width, 1, so few
// steps at a low rate do nothing (10.4 warns). All samples of an optimizer step see one prefix and one dropout mask, of
// (seed, step, prefix token, feature), however they are cut into batches.

enum { PREFIX_TABLE, PREFIX_W1, PREFIX_B1, PREFIX_W2, PREFIX_B2 };     // E, W1, b1, W2, b2; in PEFT's files, ChatGLM's:
static const char *const prefix_names[][5] = {
    { "prompt_encoder.embedding.weight", "prompt_encoder.transform.0.weight", "prompt_encoder.transform.0.bias",
      "prompt_encoder.transform.2.weight", "prompt_encoder.transform.2.bias" },
    { "transformer.prefix_encoder.embedding.weight", "transformer.prefix_encoder.trans.0.weight",
      "transformer.prefix_encoder.trans.0.bias", "transformer.prefix_encoder.trans.2.weight",
      "transformer.prefix_encoder.trans.2.bias" },
};
static bool is_official_prefix(const char *tensor) { return !strncmp(tensor, "transformer.prefix_encoder.", 27); }

static size_t prefix_width(const Model *m) { return 2 * m->config.n_layers * kv_width(&m->config); }
static double prefix_dropout(bool chatglm) { return chatglm ? 0.1 : 0; }    // the default

static void ptuning_setup(Model *m, const Options *o) {
    const Config *c = &m->config;
    bool chatglm = o->ptuning_positions ? !strcmp(o->ptuning_positions, "chatglm") : c->remote;
    bool projects = o->prefix_projection;
    size_t P = (size_t)o->num_virtual_tokens, W = prefix_width(m), depth = depth_of(0, AT_QKV);
    size_t in = projects && !chatglm ? kv_width(c) : W, hidden = chatglm ? c->hidden_size : kv_width(c);
    const char *const *names = prefix_names[chatglm];
    Tensor **t = m->added.t;
    if (o->encoder_hidden_size) hidden = (size_t)o->encoder_hidden_size;
    m->n_prefix = P, m->first_position = chatglm ? 0 : P;
    m->added.dropout = (real)(o->prefix_dropout >= 0 ? o->prefix_dropout : prefix_dropout(chatglm));
    t[PREFIX_TABLE] = add_tensor(m, chatglm || projects ? names[PREFIX_TABLE] : "prompt_embeddings", P, in, depth,
                                 (Start){ .spread = 1, .normal = true });
    if (!projects) t[PREFIX_TABLE]->other_name = "prompt_embeddings";       // ChatGLM3's scripts by way of PEFT
    for (int i = PREFIX_W1; projects && i <= PREFIX_B2; i++) {
        size_t n_in = i < PREFIX_W2 ? in : hidden, n_out = i < PREFIX_W2 ? hidden : W;
        bool bias = i == PREFIX_B1 || i == PREFIX_B2;
        t[i] = add_tensor(m, names[i], n_out, bias ? 0 : n_in, depth, (Start){ .spread = 1 / sqrtf((float)n_in) });
    }
}

static size_t prefix_hidden(const Model *m) { return m->added.t[PREFIX_W1] ? m->added.t[PREFIX_W1]->shape[0] : 0; }

// In `kept`: u, and u after dropout [P,2Lgd]; a = W1 E + b1, h = tanh(a), the gradient dh [P,hidden]. The backward does
// not read u or `dropped`: it puts their gradients there.
typedef struct { real *u, *dropped, *a, *h, *dh; } PrefixParts;

static PrefixParts prefix_parts(const Model *m, real *kept) {
    size_t n = m->n_prefix * prefix_width(m), inner = m->n_prefix * prefix_hidden(m);
    return (PrefixParts){ kept, kept + n, kept + 2*n, kept + 2*n + inner, kept + 2*n + 2*inner };
}

static size_t ptuning_keeps(const Model *m) { return m->n_prefix * (2 * prefix_width(m) + 3 * prefix_hidden(m)); }

static const real *prefix_table(const Model *m, real *kept) {       // u before dropout
    Tensor *const *t = m->added.t;
    PrefixParts k = prefix_parts(m, kept);
    if (!t[PREFIX_W1]) return t[PREFIX_TABLE]->data;
    affine_forward(k.a, NULL, t[PREFIX_TABLE]->data, t[PREFIX_W1], t[PREFIX_B1], m->n_prefix);
    activation_forward(k.h, k.a, TANH, m->n_prefix * prefix_hidden(m));
    affine_forward(k.u, NULL, k.h, t[PREFIX_W2], t[PREFIX_B2], m->n_prefix);
    return k.u;
}

static void ptuning_forward(const Model *m, real *kv, real *kept, Pass p) {
    real *dropped = prefix_parts(m, kept).dropped;
    const real *u = with_dropout(dropped, prefix_table(m, kept), KEY_PREFIX, m->added.dropout, prefix_width(m), p);
    gather_forward(kv, u, p.prefix_rows, p.T * 2 * m->config.n_layers, kv_width(&m->config));
}

static void ptuning_backward(const Model *m, const real *dkv, real *kept, Pass p) {
    Tensor *const *t = m->added.t;
    size_t W = prefix_width(m), inner = p.T * prefix_hidden(m);
    PrefixParts k = prefix_parts(m, kept);
    real *ddropped = k.dropped, *da = k.h;
    zero(ddropped, p.T * W);
    gather_backward(ddropped, dkv, p.prefix_rows, p.T * 2 * m->config.n_layers, kv_width(&m->config));
    const real *du = with_dropout(k.u, ddropped, KEY_PREFIX, m->added.dropout, W, p);      // as u was
    if (!t[PREFIX_W1]) {
        add(t[PREFIX_TABLE]->grad, t[PREFIX_TABLE]->grad, du, p.T * W);
        return;
    }
    affine_backward(k.dh, NULL, du, k.h, t[PREFIX_W2], t[PREFIX_B2], p.T);
    activation_backward(da, k.dh, k.a, TANH, inner);            // overwrites h, which is needed no more
    affine_backward(t[PREFIX_TABLE]->grad, t[PREFIX_TABLE]->grad, da, t[PREFIX_TABLE]->data, t[PREFIX_W1], t[PREFIX_B1],
                    p.T);
}

// PEFT computes the same if positions begin at P and the layout is Hugging Face's.
static bool ptuning_is_pefts(const Model *m) { return m->first_position && !m->config.remote; }

// PEFT's files hold u itself, and lose the projection.
static Tensor *ptuning_projected(const Model *m) {
    if (!m->added.t[PREFIX_W1] || !m->first_position) return NULL;
    real *kept = device_take(ptuning_keeps(m), sizeof *kept, "a prefix");
    Tensor *t = describe_tensor("prompt_embeddings", m->n_prefix, prefix_width(m), 0);
    prefix_table(m, kept);
    t->value = prefix_parts(m, kept).u;         // u stands first: memory_give(value) gives all of it back
    return t;
}

static void ptuning_settle(const Model *m, Options *o) {
    bool peft = m->first_position, projects = m->added.t[PREFIX_W1];
    o->ptuning_positions = peft ? "peft" : "chatglm";
    o->encoder_hidden_size = (int64_t)(projects ? prefix_hidden(m) : kv_width(&m->config));
    if (!(o->prefix_dropout >= 0)) o->prefix_dropout = prefix_dropout(!peft);
}

static size_t count_kv_heads(const Config *c) { return c->n_kv_heads; }
static size_t count_layers(const Config *c) { return c->n_layers; }

static const ConfigKey ptuning_keys[] = {
    { .key = "num_virtual_tokens" }, { "token_dim", .of_model = kv_width },
    { "num_transformer_submodules", .text = "1" },
    { "num_attention_heads", .of_model = count_kv_heads }, { "num_layers", .of_model = count_layers },
    { "encoder_hidden_size", .needs = "prefix_projection" }, { "prefix_projection", .usual = "false" },
    { "ptuning_positions", .usual = "", .form = WORD, .own = true },
    { "prefix_dropout", .usual = "", .free = true, .own = true }, { 0 } };

// ---- 5.5 Bottleneck adapters -------------------------------------------------------------------------------------
// Puts a small network A after a half of a layer; s is what the half adds to the stream x (after a post norm, if any):
//     A(z) = W_up f(W_down z + b_down) + b_up        W_down [B,H], B = H / reduction_factor
//     houlsby    out = x + s + A(s) after both halves, f swish          (Houlsby et al. 2019, arXiv:1902.00751)
//     pfeiffer   out = x + s + A(x + s) after the MLP alone, f ReLU     (Pfeiffer et al. 2021, arXiv:2005.00247)
// The default factor is 16, or less, so that B is at least 128 where H is. Places and names are those of the `adapters`
// library for its Llama. W_down starts N(0,0.02), all else at zero: the library draws W_up too, but with zero the first
// step sees the base exactly, as with LoRA. Cost: 2 H B + B + H numbers a place, and two small products that no merge
// removes. Learning rate 7e-4: W_up has to grow from zero.

enum { ADAPTER_DOWN, ADAPTER_DOWN_BIAS, ADAPTER_UP, ADAPTER_UP_BIAS };

static void adapter_add(Model *m, size_t l, size_t half, const Options *o) {
    static const char *const parts[] = { "down.0.weight", "down.0.bias", "up.weight", "up.bias" };
    size_t H = m->config.hidden_size, r = (size_t)o->reduction_factor;
    if (!r) r = H / max_size(H / 16, min_size(H, 128));
    size_t B = max_size(1, H / r), rows[] = { B, B, H, H }, columns[] = { H, 0, B, 0 };
    size_t depth = depth_of(l, half == MLP ? AT_MLP_BRANCH : AT_ATTENTION_BRANCH);
    const char *path = m->layers[l].o->path, *place = half == MLP ? "output" : "attention";
    int n = (int)(strstr(path, ".self_att") - path);            // as far as the layer's number
    Added *a = &m->layers[l].branch[half];
    a->houlsby = !strcmp(o->adapter_type, "houlsby");
    for (size_t i = 0; i < COUNT(parts); i++)
        a->t[i] = add_tensor(m, strf("%.*s.%s_adapters.adapters.glmtune.adapter_%s", n, path, place, parts[i]), rows[i],
                             columns[i], depth, (Start){ .spread = i == ADAPTER_DOWN ? 0.02f : 0, .normal = true });
}

static void adapter_setup(Model *m, const Options *o) {
    for (size_t l = 0; l < m->config.n_layers; l++) {
        if (!strcmp(o->adapter_type, "houlsby")) adapter_add(m, l, ATTENTION, o);
        adapter_add(m, l, MLP, o);
    }
}

static size_t adapter_width(const Added *a) { return a->t[ADAPTER_DOWN] ? a->t[ADAPTER_DOWN]->shape[0] : 0; }

// z [T,H], then W_down z + b_down and f of it [T,B]
static size_t adapter_keeps(const Added *a, size_t H) { return adapter_width(a) ? H + 2 * adapter_width(a) : 0; }

static void adapter_forward(const Added *a, real *x, const real *s, real *z, size_t H, Pass p) {
    size_t B = adapter_width(a);
    if (!B) return;
    real *down = z + p.T * H, *active = down + p.T * B;
    widen(z, a->houlsby ? s : x, REAL, p.T * H);        // a copy
    affine_forward(down, NULL, z, a->t[ADAPTER_DOWN], a->t[ADAPTER_DOWN_BIAS], p.T);
    activation_forward(active, down, a->houlsby ? SWISH : RELU, p.T * B);
    affine_forward(x, x, active, a->t[ADAPTER_UP], a->t[ADAPTER_UP_BIAS], p.T);
}

// dx is the gradient of out, and so of x and of s. That of z is added to it: for s alone in houlsby, both in pfeiffer.
static real *adapter_backward(const Added *a, real *dx, real *ds, const real *z, size_t H, bool below, Pass p) {
    size_t B = adapter_width(a);
    if (!B) return dx;
    const real *down = z + p.T * H, *active = down + p.T * B;
    real *dactive = p.beside_scratch, *ddown = dactive + p.T * B, *dz = a->houlsby ? ds : dx;
    affine_backward(dactive, NULL, dx, active, a->t[ADAPTER_UP], a->t[ADAPTER_UP_BIAS], p.T);
    activation_backward(ddown, dactive, down, a->houlsby ? SWISH : RELU, p.T * B);
    affine_backward(below ? dz : NULL, dx, ddown, z, a->t[ADAPTER_DOWN], a->t[ADAPTER_DOWN_BIAS], p.T);
    return dz;
}

static void adapter_settle(const Model *m, Options *o) {
    if (!o->reduction_factor)
        o->reduction_factor = (int64_t)(m->config.hidden_size / adapter_width(&m->layers[0].branch[MLP]));
}

static const ConfigKey adapter_keys[] = { { "adapter_type", .form = WORD }, { .key = "reduction_factor" }, { 0 } };

// ---- 5.6 Freezing ------------------------------------------------------------------------------------------------
// The last layers of the base train, with the last norm, or only the named maps in them; embedding and head on request.
// The backward ends below them. Cost: 16 bytes for each number that trains. Learning rate 2e-4: above full tuning's,
// because few weights move (1e-3 did best on the bundled model, whose weights are larger).

static bool freeze_trains(const Model *m, const Tensor *t, const char *modules, const Options *o) {
    size_t layers = (size_t)o->trainable_layers;
    if (t == m->embedding) return o->trainable_embedding || (m->config.tied && o->trainable_head);
    if (t == m->head) return o->trainable_head;
    if (!layers || t->depth < depth_of(m->config.n_layers - layers, 0)) return false;
    const char *dot = strrchr(t->name, '.'), *owner = dot;      // of PATH.q_proj.weight: q_proj
    while (owner > t->name && owner[-1] != '.') owner--;
    return !modules || list_has(modules, strf("%.*s", (int)(dot - owner), owner));
}

static void freeze_setup(Model *m, const Options *o) {
    if ((size_t)o->trainable_layers > m->config.n_layers)
        fail("--trainable_layers %lld: the model has %zu", (long long)o->trainable_layers, m->config.n_layers);
    const char *modules = modules_here(m, o->trainable_modules, true);
    if (modules && !*modules) fail("--trainable_modules names no linear map; --trainable_layers 0 trains none");
    for (size_t i = 0; i < m->n_tensors; i++)
        if (freeze_trains(m, m->tensors[i], modules, o)) train_tensor(m, m->tensors[i]);
    if (!m->n_trained) fail("nothing would train: set --trainable_layers, --trainable_embedding or --trainable_head");
}

static const ConfigKey freeze_keys[] = {
    { .key = "trainable_layers" }, { "trainable_embedding", .usual = "false" },
    { "trainable_head", .usual = "false" }, { "trainable_modules", .usual = "", .form = WORD }, { 0 } };

// ---- 5.7 The table -----------------------------------------------------------------------------------------------

static const Method methods[] = {
    { .name = "lora", .peft_type = "LORA", .learning_rate = 5e-4, .width_power = 0.45, .setup = lora_setup,
      .map_keeps = lora_rank, .map_forward = lora_forward, .map_backward = lora_backward, .keys = lora_keys,
      .settle = lora_settle, .merge = lora_merge,
      .help = "a change of low rank beside some linear maps; r (in + out) numbers each, nothing once merged" },
    { .name = "full", .peft_type = "GLMTUNE_FULL", .learning_rate = 5e-5, .width_power = 0.75, .setup = full_setup,
      .help = "every weight of the model; 16 bytes for each: weight, gradient, two moments" },
    { .name = "ptuning", .peft_type = "PREFIX_TUNING", .own_type = "GLMTUNE_PREFIX_TUNING", .learning_rate = 2e-2,
      .setup = ptuning_setup, .prefix_keeps = ptuning_keeps, .prefix_forward = ptuning_forward,
      .prefix_backward = ptuning_backward, .keys = ptuning_keys, .settle = ptuning_settle,
      .is_pefts = ptuning_is_pefts, .projected = ptuning_projected,
      .help = "keys and values of tokens that are not there; 2 x layers x kv_heads x head_dim numbers each",
      .no_merge = "a prefix is keys and values, no change of a weight" },
    { .name = "adapter", .peft_type = "GLMTUNE_ADAPTER", .learning_rate = 7e-4, .setup = adapter_setup,
      .branch_keeps = adapter_keeps, .branch_forward = adapter_forward, .branch_backward = adapter_backward,
      .keys = adapter_keys, .settle = adapter_settle,
      .help = "small networks after the halves of layers; 2 hidden^2 / reduction_factor numbers each, and their time",
      .no_merge = "an adapter is a network of its own after the layers, no change of a weight" },
    { .name = "freeze", .peft_type = "GLMTUNE_FREEZE", .learning_rate = 2e-4, .width_power = 0.66,
      .setup = freeze_setup, .keys = freeze_keys,
      .help = "the last layers; 16 bytes for each number that trains; the backward ends below them" },
};

static const char *method_names(void) {
    static Text names;
    if (names.n) return names.s;
    for (size_t i = 0; i < COUNT(methods); i++) text_print(&names, "%s%s", i ? "," : "", methods[i].name);
    return names.s;
}

static const Method *find_method(const char *wanted) {
    for (size_t i = 0; i < COUNT(methods); i++) if (!strcmp(methods[i].name, wanted)) return &methods[i];
    fail_usage("--method is one of %s, not '%s'", method_names(), wanted);
}

// ==== 6  Optimizers, and one step ================================================================================
// A step of training: the gradients of its batches, clipped, and an optimizer that turns them into new weights.
// Schedules are Hugging Face's, AdamW, SGD and clipping PyTorch's, Lion its paper's.

// ---- 6.1 The gradients of a step ---------------------------------------------------------------------------------

static void zero_gradients(Model *m) {
    for (size_t i = 0; i < m->n_trained; i++) zero(m->trained[i]->grad, m->trained[i]->n);
}

// Adds up the gradients of the batches of a step, which has n_targets in all; returns the mean loss over these.
static double accumulate(Run *r, const Batch *batches, size_t n, size_t n_targets, double smoothing) {
    double sum = 0;
    zero_gradients(r->model);
    for (size_t i = 0; i < n; i++) sum += forward_backward(r, &batches[i], n_targets, smoothing, true);
    return sum / (double)n_targets;
}

// ---- 6.2 Schedules, clipping, optimizers -------------------------------------------------------------------------

// The learning rate of step s = 0 .. total-1: w of warm-up (the first at rate 0), then n = max(1, total-w) more.
//     s < w: lr s/w    cosine: lr (1 + cos(pi (s-w)/n)) / 2    linear: lr (total-s)/n    constant: lr
static double scheduled_rate(const char *schedule, double lr, int64_t s, int64_t w, int64_t total) {
    double n = (double)(total - w > 1 ? total - w : 1);
    if (s < w) return lr * (double)s / (double)w;
    if (!strcmp(schedule, "cosine")) return lr * (1 + cos(acos(-1.0) * (double)(s - w) / n)) / 2;
    if (!strcmp(schedule, "linear")) return lr * fmax(0, (double)(total - s) / n);
    return lr;
}

static int64_t warmup_of(const Options *o, int64_t total_steps) {
    return o->warmup_steps > 0 ? o->warmup_steps : (int64_t)ceil((double)total_steps * o->warmup_ratio);
}

// Returns the norm of all gradients; if it is finite and max_norm above 0, they become g min(1, max_norm/(norm+1e-6)).
static double clip_gradients(Model *m, double max_norm) {
    const real **gradients = alloc(m->n_trained, sizeof *gradients);
    size_t *sizes = alloc(m->n_trained, sizeof *sizes);
    for (size_t i = 0; i < m->n_trained; i++) gradients[i] = m->trained[i]->grad, sizes[i] = m->trained[i]->n;
    double norm = sqrt(sum_of_squares(gradients, sizes, m->n_trained)), factor = max_norm / (norm + 1e-6);
    free(gradients), free(sizes);
    if (isfinite(norm) && max_norm > 0 && factor < 1)
        for (size_t i = 0; i < m->n_trained; i++) scale_by(m->trained[i]->grad, (real)factor, m->trained[i]->n);
    return norm;
}

// An optimizer: how many moments it keeps of each number, its betas unless the user set them (`o` has them then), and
// its step t = 1, 2, ... of one tensor. The formulas stand in 2.12.
typedef struct {
    const char *name;
    size_t n_moments;
    double beta1, beta2;
    void (*step)(Tensor *, const Options *o, double lr, double weight_decay, int64_t t);
} Optimizer;

static void step_adamw(Tensor *w, const Options *o, double lr, double weight_decay, int64_t t) {
    double correction1 = 1 - pow(o->adam_beta1, (double)t), correction2 = 1 - pow(o->adam_beta2, (double)t);
    adamw_step(w->value, w->grad, w->moments[0], w->moments[1], lr, 1 - lr * weight_decay, o->adam_beta1, o->adam_beta2,
               o->adam_epsilon, correction1, correction2, w->n);
}

static void step_sgd(Tensor *w, const Options *o, double lr, double weight_decay, int64_t t) {
    (void)t;
    sgd_step(w->value, w->grad, w->moments[0], lr, weight_decay, o->momentum, w->n);
}

static void step_lion(Tensor *w, const Options *o, double lr, double weight_decay, int64_t t) {
    (void)t;
    lion_step(w->value, w->grad, w->moments[0], lr, 1 - lr * weight_decay, o->adam_beta1, o->adam_beta2, w->n);
}

static const Optimizer optimizers[] = {
    { "adamw", 2, 0.9, 0.999, step_adamw }, { "sgd", 1, 0, 0, step_sgd }, { "lion", 1, 0.9, 0.99, step_lion } };

static const Optimizer *find_optimizer(const char *wanted) {
    size_t i = 0;
    while (wanted && strcmp(optimizers[i].name, wanted)) i++;   // NULL: the first; options let no other word pass
    return &optimizers[i];
}

// Step t = 1, 2, ... over everything that trains. Gains and biases do not decay.
static void optimizer_step(Model *m, const Options *o, double lr, int64_t t) {
    const Optimizer *optimizer = find_optimizer(o->optim);
    Options set = *o;
    if (isnan(o->adam_beta1)) set.adam_beta1 = optimizer->beta1;
    if (isnan(o->adam_beta2)) set.adam_beta2 = optimizer->beta2;
    for (size_t i = 0; i < m->n_trained; i++)
        optimizer->step(m->trained[i], &set, lr, m->trained[i]->vector ? 0 : o->weight_decay, t);
}

// ================================================================================================================
// PART TWO: THE WORK
// ================================================================================================================
// A training run from its data to its adapter: text becomes ids, conversations become samples, samples become steps,
// and what was learned is written, read and merged. What this part takes from Part Three stands here, a line each.

// files (13.1)
#define TEMPORARY ".glmtune.tmp"    // how a temporary name ends (begin_output)

static void write_file(const char *path, const char *bytes, size_t n);      // whole, or not at all
static char *read_file(const char *path, size_t *n);        // all of it, and a NUL after it
static bool exists(const char *path) { return access(path, F_OK) == 0; }    // a file or a folder
static bool is_folder(const char *path);                    // false: a file, or nothing
static bool ends_in(const char *file, const char *ending);  // and has a letter before it
static void remove_tree(const char *path);                  // a file, or a folder with all that is in it
static void remove_inside(const char *folder, const char *ending);          // the files whose names end so
static const char *begin_output(const char *path);          // the temporary name under which a path is to be written
static const char *begin_folder(const char *path);          // the same, and makes a folder of that name
static void finish_output(const char *temporary);           // gives what was written there its own name
static void close_written(FILE *f, const char *path);       // ends the program where not all is on the disk
__attribute__((noreturn)) static void fail_writing(const char *path);       // as when the disk is full
static void want_new_folder(const char *path);              // removes an empty one; ends where it holds something
static void lock_folder(const char *folder);                // makes it, and keeps other runs out until this one ends
static void unlock_folder(void);

// clock, progress (13.2) and characters (14.1)
static double seconds(void);                                // on a clock that only runs forward
static void share_cores(double tokens);                     // fewer threads while other programs want the cores
// a line on stderr; without `keep` for a terminal alone, to be replaced by the next
__attribute__((format(printf, 2, 3))) static void progress(bool keep, const char *format, ...);
static bool is_space_character(uint32_t c);                 // of Unicode's class

// JSON (13.3): a reader gives one value of a file after another
typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    size_t at;                  // where it begins in the source
    const char *key;            // its name, when it stands in an object
    bool read;                  // of a sample: somebody has asked for it (8.1)
    double number;              // JSON_NUMBER; JSON_BOOL: 0 or 1
    const char *text;           // JSON_STRING: unescaped, followed by a NUL that `count` does not count
    size_t count;               // bytes of a string, members of an array or object
    struct Json *first, *next;         // members
} Json;

typedef struct JsonBlock { struct JsonBlock *next; size_t used; Json nodes[512]; } JsonBlock;

typedef struct JsonReader {
    const char *file, *language, *source;       // the first two for messages
    const struct JsonReader *outer;             // where the source is a text in another file: that one's reader,
    const Json *text;                           // and the text there
    size_t n, at, began;        // began: where the present value begins
    bool started, in_array;     // in_array: the file is one array, whose members are given one by one
    char *strings;              // unescaped strings of the present value; never longer than the source
    size_t strings_used;
    JsonBlock *blocks, *block;  // nodes of the present value
    char *own;                  // the source, where json_open_file has read it
} JsonReader;

static JsonReader json_open_file(const char *path);          // reads it
static JsonReader json_open(const char *file, const char *source, size_t n);    // of a text in memory
static Json *json_next(JsonReader *r);                      // NULL: the end
static Json *json_only(JsonReader *r);                      // where a file is one value
static const char *json_where(const JsonReader *r, size_t at);                  // "file:line:column"
static void json_close(JsonReader *r);                      // its values go with it
static Json *json_get(const Json *object, const char *key); // the member of an object; NULL: none
static const char *json_key(const Json *object, const char *key, const char *other);    // other if that alone is there
static bool json_is(const Json *j, JsonType type) { return j && j->type == type; }
// adds a string in quotes: as Python's json writes it, or as its repr, but for rare characters that cannot be printed
static void text_string(Text *t, const char *s, size_t n, bool repr);
static void text_json(Text *t, const char *s, size_t n) { text_string(t, s, n, false); }

// tensor files (13.5 to 13.7)
enum { MAX_DIMS = 4 };

typedef struct {
    char *name;
    const char *dtype_name, *file;
    Dtype dtype;
    size_t n_dims, shape[MAX_DIMS], n, begin, bytes;    // n elements; begin, bytes: in the file, behind the header
    const void *data;
} StoredTensor;

typedef struct { StoredTensor *tensors; size_t n, capacity; Text metadata; } TensorSet;     // metadata: "key=value\n"

typedef struct { FILE *f; const char *path, *temporary; size_t expected, written; } TensorWriter;

static const char *dtype_name(Dtype d);                     // "BF16"
static void read_tensor_file(TensorSet *set, const char *path);                 // adds the tensors of one file
static const char *weights_of(const char *folder);          // the one file of its weights, or their index; NULL: none
static TensorSet read_model_tensors(const char *folder);    // of all its files
static const StoredTensor *find_tensor(const TensorSet *s, const char *wanted); // NULL: none
static const char *shape_text(const size_t *shape, size_t n_dims);              // "[4, 16]"
static const char *line_value(const char *lines, const char *key);              // in "key=value" lines; NULL: none
static void widen_stored(real *out, const StoredTensor *s); // copies numbers that are not to be read again
static bool has_shape(const StoredTensor *s, const Tensor *t);                  // the one that the model wants
// the header of n tensors, then their bytes in that order, then the file gets its name; metadata: ,"key":"value" ...
static TensorWriter begin_tensor_file(const char *path, const StoredTensor *t, size_t n, const char *metadata);
static void write_tensor_bytes(TensorWriter *w, const void *bytes, size_t n);
static void finish_tensor_file(TensorWriter *w);

// models (13.10)
// a number, a flag of a config.json; a missing key gives `missing`
static double config_number(const char *path, const Json *root, const char *key, double least, double most,
                            double missing);
static bool config_flag(const Json *root, const char *key, bool missing);
static Model *load_model(const char *folder);               // its config.json read, its tensors bound

// plans and curves (15)
static const char *size_text(size_t bytes);                 // "1.5 GiB"
static void need_memory(size_t bytes, const char *lower);   // ends the program where there is not so much
static RunKind plan_memory(Model *m, const Method *method, bool recompute, size_t T);   // prints what a run will take

// ==== 7  Text ====================================================================================================
// Text becomes token ids and ids text; a conversation becomes one row of ids in the layout that the model was trained
// on, with labels that say which ids it shall learn. Training, evaluation and chat all use this one encoder.

// ---- 7.1 Characters ----------------------------------------------------------------------------------------------

// Writes code point c at s as UTF-8; returns the number of bytes.
static size_t utf8_put(char *s, uint32_t c) {
    if (c < 0x80) return s[0] = (char)c, 1;
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) s[i] = (char)(0x80 | (c & 0x3F));
    s[0] = (char)((0xF00 >> n) | c);        // n ones and a zero, then the highest bits
    return n;
}

#define INVALID UINT32_MAX      // what stands for a byte that is no UTF-8

// The first character of the n > 0 bytes at s, and its length. A byte that begins no valid UTF-8 is INVALID.
static uint32_t utf8_get(const char *s, size_t n, size_t *length) {
    const unsigned char *u = (const unsigned char *)s;
    size_t bytes = u[0] < 0x80 ? 1 : u[0] < 0xC2 ? 0 : u[0] < 0xE0 ? 2 : u[0] < 0xF0 ? 3 : u[0] < 0xF5 ? 4 : 0;
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    *length = 1;
    if (!bytes || bytes > n) return INVALID;
    uint32_t c = bytes == 1 ? u[0] : u[0] & (0x7Fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        if ((u[i] & 0xC0) != 0x80) return INVALID;
        c = c << 6 | (u[i] & 0x3F);
    }
    if (c < least[bytes] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return INVALID;
    *length = bytes;
    return c;
}

// A text in quotes, for messages: 40 characters at most, to the end of its line or to a byte that is no UTF-8.
static const char *excerpt(const char *s, size_t n) {
    size_t at = 0, count = 0;
    for (size_t length; at < n && count < 40; at += length, count++) {
        uint32_t c = utf8_get(s + at, n - at, &length);
        if (c == INVALID || c < ' ') break;
    }
    return strf("'%.*s%s'", (int)at, s, at < n && count == 40 ? "..." : "");
}

// ---- 7.2 Tokens --------------------------------------------------------------------------------------------------
// Two kinds of byte pair encoding. ChatGLM2/3 (SentencePiece): the text is one sequence of characters, blanks become
// U+2581 and one is put in front, and the neighbours whose joined piece has the best score are merged until none is in
// the vocabulary; characters without a piece fall back to their bytes. GLM-4 and later (tiktoken): the text is split
// into chunks by a pattern, and in each chunk bytes are merged, lowest rank first. Either way the priority of a merge
// is a property of the piece that it makes (its rank), so one routine does both, with a heap: O(n log n). Hugging
// Face's tokenizer.json lists the merges instead: a piece is made only from listed pairs of parts, each with its own
// rank; the pairs of a piece differ by the length of the left part.
// Role tokens such as <|user|> have ids and names, but text never becomes one: typing "<|user|>" must open no turn.

enum { TOKENIZER_VERSION = 1 };
enum { BYTE_BPE = 1, SENTENCEPIECE = 2 };       // kinds
enum { WHOLE_CHUNKS = 1,                        // flags: a chunk that is a piece is taken whole, without merging
       LISTED_MERGES = 2 };                     // only listed pairs merge, by their own ranks
enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE };

#define BLANK "\xE2\x96\x81"           // U+2581, which SentencePiece writes for a blank
#define RANK_NEVER UINT32_MAX           // a control piece such as </s>: text never becomes it
#define RANK_BYTE (UINT32_MAX - 1)      // SentencePiece's <0x0A>: the byte itself, for what has no piece

typedef struct { const char *text; uint32_t n, rank; } Piece;
typedef struct { const char *name; int32_t id; } Special;
// A run of bytes up to `next`, which is `piece`, or none (-1). Merged with the symbol at next it is `made`, by `rank`.
typedef struct { uint32_t previous, next, rank; int32_t piece, made; } Symbol;
// A pair that makes a piece: bytes of its left part, and 1 + the place of the one before it that makes the same piece.
typedef struct { uint32_t left_n, before; } ListedMerge;

typedef struct {
    const char *file;                   // where it came from
    char *image;                        // the bytes of tokenizer.bin
    size_t image_bytes;
    uint32_t kind, flags, n_pieces, n_specials;
    Piece *pieces;
    Special *specials;
    uint64_t *slots; uint32_t slot_mask;    // hash table: upper half of the hash, piece + 1
    bool alone[256];                    // SentencePiece: this byte is ASCII, and part of no longer piece
    bool inner_blank;                   // SentencePiece: some piece has U+2581 after another character
    ListedMerge *listed;                // in the order of their ranks
    uint32_t *last_listed;              // of each piece: 1 + the place of the last that makes it
    int32_t byte_ids[256];
    uint8_t *class_of;                  // of every code point
    Symbol *symbols; size_t symbols_capacity;
    uint64_t *heap; size_t heap_n, heap_capacity;       // what may be merged: rank, place of the left symbol
} Tokenizer;

typedef struct { int32_t *ids; size_t n, capacity; } Ids;

static void ids_add(Ids *v, int32_t id) {
    v->ids = grow(v->ids, &v->capacity, v->n + 1, sizeof *v->ids);
    v->ids[v->n++] = id;
}

static Tokenizer *load_tokenizer(const char *folder, size_t room, const char **why);     // of a model folder: 14.6

static int class_at(const Tokenizer *t, const char *s, size_t n, size_t *length) {
    uint32_t c = utf8_get(s, n, length);
    return c == INVALID ? CLASS_OTHER : t->class_of[c];
}

static bool at_blank(const char *s, size_t n) { return n >= 3 && !memcmp(s, BLANK, 3); }

// The slot of the piece of exactly these bytes, or the free one where it would stand.
static uint64_t *find_slot(const Tokenizer *t, const char *s, size_t n) {
    uint64_t h = hash_bytes(s, n), *slot;
    for (uint32_t i = (uint32_t)h; *(slot = &t->slots[i & t->slot_mask]); i++) {
        if ((*slot ^ h) >> 32) continue;
        const Piece *p = &t->pieces[(uint32_t)*slot - 1];
        if (p->n == n && !memcmp(p->text, s, n)) break;
    }
    return slot;
}

// The piece of exactly these bytes, or -1.
static int64_t find_piece(const Tokenizer *t, const char *s, size_t n) { return (uint32_t)*find_slot(t, s, n) - 1LL; }

static int32_t special_id(const Tokenizer *t, const char *wanted) {     // -1: there is none of that name
    for (uint32_t i = 0; i < t->n_specials; i++) if (!strcmp(t->specials[i].name, wanted)) return t->specials[i].id;
    return -1;
}

static int32_t largest_id(const Tokenizer *t) {
    int32_t largest = (int32_t)t->n_pieces - 1;
    for (uint32_t i = 0; i < t->n_specials; i++) if (t->specials[i].id > largest) largest = t->specials[i].id;
    return largest;
}

// ---- 7.3 Encoding and decoding -----------------------------------------------------------------------------------
// MB/s of English, code, Chinese (tests/bench_tokenizers.c, Sapphire Rapids): GLM-4 93, 85, 16; ChatGLM3 19, 15, 36.

static uint64_t heap_pop(Tokenizer *t) {
    uint64_t top = t->heap[0], last = t->heap[--t->heap_n];
    size_t i = 0;
    for (size_t child; (child = 2*i + 1) < t->heap_n; i = child) {
        if (child + 1 < t->heap_n && t->heap[child+1] < t->heap[child]) child++;
        if (t->heap[child] >= last) break;
        t->heap[i] = t->heap[child];
    }
    if (t->heap_n) t->heap[i] = last;
    return top;
}

// The rank of the merge of a piece's first left_n bytes with the rest. If a pair is listed twice, the last counts.
static uint32_t pair_rank(const Tokenizer *t, int64_t piece, uint32_t left_n) {
    if (!(t->flags & LISTED_MERGES)) return t->pieces[piece].rank;
    uint32_t i = t->last_listed[piece];
    while (i && t->listed[i-1].left_n != left_n) i = t->listed[i-1].before;
    return i - 1;           // RANK_NEVER: it is not listed
}

// Notes what the symbol at `left` and the one after it would make, and the rank; RANK_NEVER: no piece.
static void propose(Tokenizer *t, const char *s, uint32_t left, uint32_t end) {
    Symbol *l = &t->symbols[left];
    l->rank = RANK_NEVER;
    if (l->next >= end) return;
    int64_t piece = find_piece(t, s + left, t->symbols[l->next].next - left);
    l->made = (int32_t)piece;
    if (piece >= 0) l->rank = pair_rank(t, piece, l->next - left);
}

// Puts the merge at a symbol on the heap if it comes before those at both neighbours; else it has to wait for theirs,
// which may undo it. So the first of all is on the heap, few others are, and a run of one letter takes linear time.
static void enqueue(Tokenizer *t, uint32_t at) {
    const Symbol *s = t->symbols, *l = s + at;
    if (l->rank == RANK_NEVER || s[l->previous].rank <= l->rank || s[l->next].rank < l->rank) return;
    uint64_t merge = (uint64_t)l->rank << 32 | at;
    t->heap = grow(t->heap, &t->heap_capacity, t->heap_n + 1, sizeof *t->heap);
    size_t i = t->heap_n++;
    for (; i > 0 && merge < t->heap[(i-1)/2]; i = (i-1)/2) t->heap[i] = t->heap[(i-1)/2];
    t->heap[i] = merge;
}

// Merges the n bytes at s and adds the ids. A symbol stands at the place of its first byte.
static void encode_chunk(Tokenizer *t, const char *s, size_t n, Ids *out) {
    if (n >= UINT32_MAX) fail("a text of %zu bytes is too long for one piece of work", n);
    uint32_t end = (uint32_t)n;
    t->symbols = grow(t->symbols, &t->symbols_capacity, n + 1, sizeof *t->symbols);
    t->symbols[end] = (Symbol){ end, end, RANK_NEVER, -1, -1 };     // the neighbour of those that have none
    t->heap_n = 0;
    for (size_t at = 0, previous = end, length = 1; at < end; previous = at, at += length) {
        if (t->kind != BYTE_BPE) utf8_get(s + at, n - at, &length);
        int64_t piece = t->kind == BYTE_BPE ? t->byte_ids[(unsigned char)s[at]] : find_piece(t, s + at, length);
        t->symbols[at] = (Symbol){ (uint32_t)previous, (uint32_t)(at + length), RANK_NEVER, (int32_t)piece, -1 };
    }
    for (uint32_t at = 0; at < end; at = t->symbols[at].next) propose(t, s, at, end);
    for (uint32_t at = 0; at < end; at = t->symbols[at].next) enqueue(t, at);
    while (t->heap_n) {
        uint64_t merge = heap_pop(t);
        uint32_t at = (uint32_t)merge;
        Symbol *left = &t->symbols[at];
        if (left->rank != merge >> 32) continue;        // out of date: one of the two has been merged since
        Symbol *right = &t->symbols[left->next];
        left->piece = left->made;
        left->next = right->next;
        right->rank = RANK_NEVER;
        if (left->next < end) t->symbols[left->next].previous = at;
        propose(t, s, at, end);
        propose(t, s, left->previous, end);
        enqueue(t, t->symbols[left->previous].previous);
        enqueue(t, left->previous);
        enqueue(t, at);
        enqueue(t, left->next);
    }
    for (uint32_t at = 0, next; at < end; at = next) {
        next = t->symbols[at].next;
        if (t->symbols[at].piece >= 0) ids_add(out, t->symbols[at].piece);
        else for (uint32_t i = at; i < next; i++) ids_add(out, t->byte_ids[(unsigned char)s[i]]);
    }
}

// The bytes of the run of at most `at_most` characters of one class that begins at s.
static size_t class_run(const Tokenizer *t, const char *s, size_t n, int class, size_t at_most) {
    size_t at = 0, length;
    while (at < n && at_most-- && class_at(t, s + at, n - at, &length) == class) at += length;
    return at;
}

static bool is_newline(char c) { return c == '\r' || c == '\n'; }

// 's 't 're 've 'm 'll 'd in either case. U+017F, the long s, is another case of s.
static size_t contraction(const char *s, size_t n) {
    static const char *const suffixes[] = { "s", "t", "re", "ve", "m", "ll", "d", "\xC5\xBF" };
    for (size_t i = 0; *s == '\'' && i < COUNT(suffixes); i++) {
        size_t length = strlen(suffixes[i]);
        if (length < n && !strncasecmp(s + 1, suffixes[i], length)) return 1 + length;
    }
    return 0;
}

// The length of the first chunk of the n > 0 bytes at s. GLM-4's split pattern, whose alternatives are tried in order:
//     (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N}{1,3} |  ?[^\s\p{L}\p{N}]+[\r\n]* |
//     \s*[\r\n]+ | \s+(?!\S) | \s+
static size_t next_chunk(const Tokenizer *t, const char *s, size_t n) {
    size_t first, run = contraction(s, n), blank = *s == ' ';
    if (run) return run;
    int class = class_at(t, s, n, &first);
    if (class == CLASS_LETTER) return class_run(t, s, n, CLASS_LETTER, n);
    if (class == CLASS_NUMBER) return class_run(t, s, n, CLASS_NUMBER, 3);
    if (!is_newline(*s) && (run = class_run(t, s + first, n - first, CLASS_LETTER, n))) return first + run;
    if ((run = class_run(t, s + blank, n - blank, CLASS_OTHER, n))) {
        for (run += blank; run < n && is_newline(s[run]); ) run++;
        return run;
    }
    run = class_run(t, s, n, CLASS_SPACE, n);
    for (size_t i = run; i > 0; i--) if (is_newline(s[i-1])) return i;
    if (run == n || run == first) return run;
    do run--; while (((unsigned char)s[run] & 0xC0) == 0x80);       // leave the last space to what follows
    return run;
}

// The first part of SentencePiece's text s whose border no merge crosses: before a blank that no piece has inside,
// before and after a character that is in no longer piece, such as a line break. (30 times as fast on English.)
static size_t next_word(const Tokenizer *t, const char *s, size_t n) {
    size_t at = 0;
    if (t->alone[(unsigned char)*s]) return 1;
    while (at_blank(s + at, n - at)) at += 3;
    while (at < n && !t->alone[(unsigned char)s[at]] && (t->inner_blank || !at_blank(s + at, n - at))) at++;
    return at;
}

// Adds the ids of a text. No special token is added and no text becomes one; SentencePiece's own blank goes in front.
static void encode(Tokenizer *t, const char *s, size_t n, Ids *out) {
    bool words = t->kind == SENTENCEPIECE;
    Text escaped = {0};
    if (words && n) {
        text_add(&escaped, BLANK, 3);
        for (size_t i = 0; i < n; i++) text_add(&escaped, s[i] == ' ' ? BLANK : s + i, s[i] == ' ' ? 3 : 1);
        s = escaped.s, n = escaped.n;
    }
    for (size_t at = 0, length; at < n; at += length) {
        length = words ? next_word(t, s + at, n - at) : next_chunk(t, s + at, n - at);
        int64_t whole = t->flags & WHOLE_CHUNKS ? find_piece(t, s + at, length) : -1;
        if (whole >= 0) ids_add(out, (int32_t)whole);
        else encode_chunk(t, s + at, length, out);
    }
    free(escaped.s);
}

// Adds the text of one id; a special token gives its name. Returns whether it is one.
static bool decode_one(const Tokenizer *t, int32_t id, Text *out) {
    for (uint32_t i = 0; i < t->n_specials; i++)
        if (t->specials[i].id == id) return text_print(out, "%s", t->specials[i].name), true;
    if (id < 0 || (uint32_t)id >= t->n_pieces) return false;
    const Piece *p = &t->pieces[id];
    bool in_words = t->kind == SENTENCEPIECE && p->rank < RANK_BYTE;
    for (uint32_t i = 0; i < p->n; i++) {
        bool blank = in_words && at_blank(p->text + i, p->n - i);
        text_add(out, blank ? " " : p->text + i, 1);
        if (blank) i += 2;
    }
    return false;
}

// The text of n ids. The blank that SentencePiece put before each text is taken off, also after a special token.
static Text decode(const Tokenizer *t, const int32_t *ids, size_t n) {
    Text out = {0};
    bool begins = true;
    text_add(&out, "", 0);
    for (size_t i = 0, at = 0; i < n; i++, at = out.n) {
        bool special = decode_one(t, ids[i], &out);
        if (t->kind == SENTENCEPIECE && begins && out.n > at && out.s[at] == ' ') {
            memmove(out.s + at, out.s + at + 1, out.n - at);        // the NUL moves too
            out.n--;
        }
        begins = special;
    }
    return out;
}

// ---- 7.4 Chat layouts --------------------------------------------------------------------------------------------

enum { SYSTEM, USER, ASSISTANT, OBSERVATION, ROLES };
static const char *const role_names[ROLES] = { "system", "user", "assistant", "observation" };
static const char *const role_tokens[ROLES] = { "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>" };

// A row is the prefix, then each turn (role token, metadata, line break, text), then `end`; exceptions are named below.
// In folders of Hugging Face's own classes (glm, glm4) all between two role tokens is encoded as one text, as their
// chat templates are; in those with ChatGLM's own code (chatglm) the line break ends one text, the message is another.
// What the official scripts learn matters for --official_mask alone.
typedef struct {
    const char *name, *sop, *end, *stops[3];        // sop: behind [gMASK] at the beginning; NULL: neither
    const char *tools;              // how a text of tools begins; "": it follows the system message's; NULL: no tools
    bool rounds;                    // no role tokens: all but the last answer is one text of numbered rounds
    bool system_first;              // system messages stand before all others
    bool thinks;                    // an answer opens with <think>; but for system messages, a prompt has only what
                                    // follows </think>, without blanks around it
    bool drops_empty;               // Hugging Face's template leaves out a message without text (the last answer stays)
    bool observations;              // the official script learns observations too
    enum { EVERY_ANSWER, COMBINES, LAST_ANSWER } official;      // COMBINES: every answer, or the last by `combine`
} Layout;

#define STOPS .end = "<|user|>", .stops = { "<|endoftext|>", "<|user|>", "<|observation|>" }
#define GLM4_TOOLS "# 可用工具"     // "available tools"; the other: "give the arguments of a call to it as JSON"
#define GLM4_TOOL_END "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
#define GLM4_SELF(maker) "你是一个名为 ChatGLM 的人工智能助手。" \
                         "你是基于" maker "训练的语言模型 GLM-4 模型开发的，" \
                         "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n"
#define GLM3_TOOLS "Answer the following questions as best as you can. You have access to the following tools:"

static const Layout layouts[] = {
    { "chatglm2", "sop", "</s>", { "</s>" }, .rounds = true },
    { "chatglm3", "sop", "</s>", { "</s>", "<|user|>", "<|observation|>" }, .tools = "", .observations = true },
    { "glm4-chat", "<sop>", STOPS, .tools = GLM4_SELF("智谱AI") GLM4_TOOLS, .official = COMBINES,
      .drops_empty = true },
    { "0414", "<sop>", STOPS, .tools = GLM4_TOOLS, .system_first = true, .official = COMBINES },
    { "z1", "<sop>", STOPS, .tools = GLM4_SELF("智谱 AI 公司") GLM4_TOOLS, .system_first = true, .thinks = true,
      .official = COMBINES },
    { "edge", NULL, STOPS, .official = LAST_ANSWER },
};

// A layout with a tokenizer: all that encoding a conversation needs.
typedef struct {
    const Layout *layout;
    Tokenizer *tokenizer;
    const Config *config;           // of the model that reads the ids
    const char *why;                // when layout or tokenizer is missing: why text cannot be used
    bool joined;                    // line break and text are encoded as one, as Hugging Face's templates are
    int32_t prefix[2], roles[ROLES], end, stops[3];     // -1: the layout has none
} ChatFormat;

static bool file_contains(const char *path, const char *wanted) {
    size_t n = 0;
    char *text = exists(path) ? read_file(path, &n) : NULL;
    bool found = text && memmem(text, n, wanted, strlen(wanted));
    free(text);
    return found;
}

// The name of the layout, by the first rule that fits; NULL: none does.
static const char *layout_name(const Options *o, const Config *c, const char *folder) {
    if (o->layout) return o->layout;
    if (c->layout) return c->layout;
    bool thinks = file_contains(strf("%s/tokenizer_config.json", folder), "<think>") ||
                  file_contains(strf("%s/chat_template.jinja", folder), "<think>");
    if (!strcmp(c->model_type, "glm4")) return thinks ? "z1" : "0414";
    if (c->vocab_size == 59264) return "edge";
    if (!c->remote || c->vocab_size == 151552) return "glm4-chat";
    if (c->vocab_size != 65024) return NULL;
    static const char *const files[] = { "tokenizer_config.json", "added_tokens.json", "tokenization_chatglm.py" };
    for (size_t i = 0; i < COUNT(files); i++)
        if (file_contains(strf("%s/%s", folder, files[i]), role_tokens[ASSISTANT])) return "chatglm3";
    if (c->name_or_path && strstr(c->name_or_path, "chatglm3")) return "chatglm3";
    return c->name_or_path && strstr(c->name_or_path, "chatglm2") ? "chatglm2" : NULL;
}

static int32_t need_special(const ChatFormat *f, const char *token) {
    int32_t id = token ? special_id(f->tokenizer, token) : -1;
    if (token && id < 0)
        fail("the tokenizer has no token %s, which layout %s needs; set another with --layout", token, f->layout->name);
    return id;
}

// The bundled vocabulary is for models of our own: the smallest release has 59,264 ids and its own tokenizer.
static Tokenizer *model_tokenizer(const Config *c, const char *folder, const char **why) {
    return load_tokenizer(folder, c->layout || c->vocab_size < 59264 ? c->vocab_size : 0, why);
}

static ChatFormat choose_format(const Options *o, const Config *c, const char *folder) {
    ChatFormat f = { .config = c };
    const char *wanted = layout_name(o, c, folder);
    f.tokenizer = model_tokenizer(c, folder, &f.why);
    for (size_t i = 0; wanted && i < COUNT(layouts); i++) if (!strcmp(layouts[i].name, wanted)) f.layout = &layouts[i];
    if (!wanted) f.why = strf("%s: its chat layout cannot be told from its files; set --layout", folder);
    else if (!f.layout) f.why = strf("chat layout '%s' is none of those that --layout knows", wanted);
    if (f.tokenizer && largest_id(f.tokenizer) >= (int64_t)c->vocab_size)
        fail("%s: ids of the tokenizer go to %d, the model has %zu", folder, largest_id(f.tokenizer), c->vocab_size);
    if (!f.tokenizer || !f.layout) return f;
    f.joined = !c->remote && f.tokenizer->kind == BYTE_BPE;
    f.prefix[0] = need_special(&f, f.layout->sop ? "[gMASK]" : NULL);
    f.prefix[1] = need_special(&f, f.layout->sop);
    for (int i = 0; i < ROLES; i++) f.roles[i] = need_special(&f, f.layout->rounds ? NULL : role_tokens[i]);
    for (int i = 0; i < 3; i++) f.stops[i] = need_special(&f, f.layout->stops[i]);
    f.end = need_special(&f, f.layout->end);
    return f;
}

static bool is_stop(const ChatFormat *f, int32_t id) {
    for (size_t i = 0; i < COUNT(f->stops); i++) if (f->stops[i] == id) return true;
    return false;
}

// ---- 7.5 From a conversation to ids and labels -------------------------------------------------------------------
// Each token has a flag, `teaches`: the token after it shall be learned. All of an assistant's turn have it, from the
// role token on. So its text and the token after that (a role token or the layout's end) are learned: it can stop.

// A message as it is encoded. fixed: it holds tools and is never shortened; own: its text, if the turn must free it.
typedef struct { int role; const char *metadata, *text; size_t metadata_n, n; bool learns, fixed; char *own; } Turn;
typedef struct { Turn *turns; size_t n, capacity; } Conversation;

// teaches: that of the last token; prompt_n: ids before the last answer
typedef struct { Ids ids, labels; bool teaches; size_t prompt_n; } Row;

static void add_turn(Conversation *c, Turn t) {
    c->turns = grow(c->turns, &c->capacity, c->n + 1, sizeof *c->turns);
    c->turns[c->n++] = t;
}

// Forgets all turns but the first `keep`.
static void drop_turns(Conversation *c, size_t keep) { while (c->n > keep) free(c->turns[--c->n].own); }

static void free_row(Row *row) { free(row->ids.ids), free(row->labels.ids); }

static void row_add(Row *row, int32_t id, bool teaches) {
    ids_add(&row->ids, id);
    ids_add(&row->labels, row->teaches ? id : NO_TARGET);
    row->teaches = teaches;
}

static void row_add_text(Row *row, Tokenizer *t, const char *s, size_t n, bool teaches) {
    encode(t, s, n, &row->ids);
    for (; row->labels.n < row->ids.n; row->teaches = teaches)
        ids_add(&row->labels, row->teaches ? row->ids.ids[row->labels.n] : NO_TARGET);
}

// The bytes of a turn's text when none may have more than `most`; no character is cut in two.
static size_t shortened(const Turn *t, size_t most) {
    size_t n = t->fixed ? t->n : min_size(t->n, most);
    while (n > 0 && n < t->n && ((unsigned char)t->text[n] & 0xC0) == 0x80) n--;
    return n;
}

// What follows the last </think>, without the white space around it: Python's strip, so Unicode's and U+001C to U+001F.
static Turn without_thoughts(Turn t) {
    static const char mark[] = "</think>";
    for (const char *p; (p = memmem(t.text, t.n, mark, strlen(mark))); )
        t.n -= (size_t)(p - t.text) + strlen(mark), t.text = p + strlen(mark);
    size_t begin = t.n, end = t.n;
    for (size_t at = 0, length; at < t.n; at += length) {
        uint32_t c = utf8_get(t.text + at, t.n - at, &length);
        if (is_space_character(c) || (c >= 0x1C && c <= 0x1F)) continue;
        begin = min_size(begin, at);
        end = at + length;
    }
    t.text += begin;
    t.n = end - begin;
    return t;
}

// past: a turn follows or is asked for. The <think> of an answer is encoded with the line break before, as in prompts.
static void row_add_turn(Row *row, const ChatFormat *f, Turn t, size_t most, bool past) {
    Text text = {0};
    bool answers = t.role == ASSISTANT, last = answers && !past, thinks = f->layout->thinks;
    if (f->joined && f->layout->drops_empty && !t.n && !last) return;
    if (thinks && t.role != SYSTEM && !last) t = without_thoughts(t);
    size_t n = shortened(&t, most), opening = thinks && last && n >= 7 && !memcmp(t.text, "<think>", 7) ? 7 : 0;
    size_t first = f->joined && !opening ? n : opening;         // bytes that are encoded with what stands before them
    text_add(&text, t.metadata, t.metadata_n);
    text_add(&text, "\n", 1);
    text_add(&text, t.text, first);
    row_add(row, f->roles[t.role], t.learns);
    if (answers) row->prompt_n = row->ids.n;
    row_add_text(row, f->tokenizer, text.s, text.n, t.learns);
    if (opening) row->prompt_n = row->ids.n;
    row_add_text(row, f->tokenizer, t.text + first, n - first, t.learns);
    free(text.s);
}

// ChatGLM2: questions and answers take turns, and all but the last answer is one text, encoded at once.
static void row_add_rounds(Row *row, const ChatFormat *f, const Turn *turns, size_t n, size_t most) {
    Text prompt = {0};
    const Turn *answer = n && turns[n-1].role == ASSISTANT ? &turns[n-1] : NULL;
    for (size_t i = 0; i < n - (answer != NULL); i++) {
        if (i % 2 == 0) text_print(&prompt, "[Round %zu]\n\n问：", i / 2 + 1);
        text_add(&prompt, turns[i].text, shortened(&turns[i], most));
        text_print(&prompt, "%s", i % 2 == 0 ? "\n\n答：" : "\n\n");
    }
    row_add_text(row, f->tokenizer, prompt.s, prompt.n, false);
    free(prompt.s);
    row->prompt_n = row->ids.n;
    if (!answer) return;
    row->teaches = answer->learns;
    row_add_text(row, f->tokenizer, answer->text, shortened(answer, most), answer->learns);
}

// The row of a conversation, no text longer than `most` bytes. `asks`: it is a prompt, and ends where an answer begins.
static Row encode_turns(const ChatFormat *f, const Turn *turns, size_t n, size_t most, bool asks) {
    const Layout *l = f->layout;
    Row row = {0};
    for (int i = 0; i < 2; i++) if (f->prefix[i] >= 0) row_add(&row, f->prefix[i], false);
    if (l->rounds) row_add_rounds(&row, f, turns, n, most);
    for (int pass = !l->system_first; !l->rounds && pass < 2; pass++)       // system_first: pass 0 is for those alone
        for (size_t i = 0; i < n; i++)
            if (!l->system_first || (turns[i].role != SYSTEM) == pass)
                row_add_turn(&row, f, turns[i], most, asks || i + 1 < n);
    if (!asks) return row_add(&row, f->end, false), row;
    if (!l->rounds) row_add(&row, f->roles[ASSISTANT], true);
    if (l->thinks) row_add_text(&row, f->tokenizer, "\n<think>", 8, true);
    row.prompt_n = row.ids.n;
    return row;
}

// ==== 8  Data ====================================================================================================
// A data file is read sample by sample, in any of its forms; what looks wrong is counted, and reported with its first
// place. A hash chooses the samples to hold out, and each epoch has its own order.

// ---- 8.1 Samples -------------------------------------------------------------------------------------------------

// number: in its file from 1; prompt_n: ids before the last answer's text, or 0; stops: its last target is a stop token
typedef struct { int32_t *ids, *labels; size_t n, n_targets, number, prompt_n; bool stops; } Sample;

// What is noted while data are read: how often, and the first place. What is `wrong` keeps the data from being used.
enum { TOO_LONG, LEFT_NAME, LEFT_BRACES, TYPED_ROLE, EMPTY_TEXT, LOST_TEXT, RETURNS, NO_THOUGHTS, FINDINGS };
static const struct { bool wrong; const char *what; } finding_kinds[FINDINGS] = {
    [TOO_LONG] = { true, "over max_input_length + max_output_length + 1; raise one, or --overlong drop or truncate" },
    [LEFT_NAME] = { true, "a placeholder that nobody replaced; put the real text in its place" },
    [LEFT_BRACES] = { false, "looks like a placeholder that nobody replaced" },
    [TYPED_ROLE] = { false, "a role token typed as text; here it stays text and opens no turn" },
    [EMPTY_TEXT] = { false, "a message without text" },
    [LOST_TEXT] = { false, "has characters that were lost when it was converted; write them again" },
    [RETURNS] = { false, "has a carriage return, as Windows ends lines; it would be learned" },
    [NO_THOUGHTS] = { false, "an answer that does not open with <think>, as this layout's prompts make the model do" },
};

typedef struct {
    Sample *samples;
    size_t n, capacity, n_tokens, n_targets, n_stops, n_dropped, n_cut, n_turns, n_answers, longest, n_unread;
    struct { size_t n; const char *first; } findings[FINDINGS];
    struct { char *key; size_t n, last; } unread[32];   // keys that nothing reads: in how many samples, in which last
} Dataset;

// tools: reads tools that are given as a text; asks: a sample may end in a question, which the model shall answer
typedef struct {
    JsonReader *json, *tools;
    const ChatFormat *format;
    const Options *o;
    Dataset *set;
    bool asks;
} DataReader;

// A member of an object, unless it is null. Members that are not asked for here or in `want` are named as not read.
static const Json *given(const Json *object, const char *key) {
    Json *j = json_get(object, key);
    if (j) j->read = true;
    return j && j->type != JSON_NULL ? j : NULL;
}

static const char *where(const JsonReader *r, const Json *j) { return json_where(r, j->at); }

// A value, for messages.
static const char *quoted(const JsonReader *r, const Json *j) {
    const char *source = r->source + j->at;
    if (j->type == JSON_STRING) return excerpt(j->text, j->count);
    return excerpt(source, j->type < JSON_ARRAY ? strcspn(source, ",]} \t\r\n") : r->n - j->at);
}

static void note(const DataReader *d, int kind, const Json *at, const char *text) {
    if (!d->set->findings[kind].n++) d->set->findings[kind].first = strf("%s: %s", where(d->json, at), text);
}

static const Json *typed(const JsonReader *r, const Json *j, JsonType type, const char *what) {
    if (j && j->type != type) fail("%s: \"%s\" must be %s, not %s", where(r, j), j->key, what, quoted(r, j));
    return j;
}

static const Json *want(const JsonReader *r, const Json *object, const char *key, JsonType type, const char *what) {
    Json *j = json_get(object, key);
    if (j) j->read = true;
    else fail("%s: \"%s\" must be %s; it is missing in %s", where(r, object), key, what, quoted(r, object));
    return typed(r, j, type, what);
}

// {{...}} and [[...]] in one line of at most 40 bytes. {{NAME}}, in capitals, is never meant; nor is what stands in the
// two identity files that many start from: {{name}} and {{author}} (LLaMA-Factory), <NAME> and <AUTHOR>.
static void note_placeholders(const DataReader *d, const Json *text) {
    for (const char *p = text->text, *end = p + text->count; p + 4 < end; p++) {
        if (!strncmp(p, "<NAME>", 6) || !strncmp(p, "<AUTHOR>", 8))
            note(d, LEFT_NAME, text, p[1] == 'N' ? "<NAME>" : "<AUTHOR>");
        if ((*p != '{' && *p != '[') || p[1] != *p) continue;
        const char *inner = p + 2, *closer = *p == '{' ? "}}" : "]]";
        const char *closing = memmem(inner, min_size((size_t)(end - inner), 38), closer, 2);
        size_t n = closing ? (size_t)(closing - inner) : 0;
        if (!n || memchr(inner, '\n', n)) continue;
        for (; n && *inner == ' '; inner++) n--;
        while (n && inner[n-1] == ' ') n--;
        bool is_name = strspn(inner, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789") == n ||
                       (n == 4 && !strncasecmp(inner, "name", 4)) || (n == 6 && !strncasecmp(inner, "author", 6));
        note(d, *p == '{' && n && is_name ? LEFT_NAME : LEFT_BRACES, text, excerpt(p, (size_t)(closing + 2 - p)));
        p = closing + 1;
    }
}

static void note_text(const DataReader *d, int role, const Json *text) {
    if (!text->count) note(d, EMPTY_TEXT, text, role_names[role]);
    note_placeholders(d, text);
    for (const char *const *t = role_tokens; t < role_tokens + ROLES; t++)
        if (memmem(text->text, text->count, *t, strlen(*t))) note(d, TYPED_ROLE, text, *t);
    // U+FFFD, and what two of them become when read as GBK
    if (strstr(text->text, "\xEF\xBF\xBD") || strstr(text->text, "\xE9\x94\x9F\xE6\x96\xA4\xE6\x8B\xB7"))
        note(d, LOST_TEXT, text, quoted(d->json, text));
    if (strchr(text->text, '\r')) note(d, RETURNS, text, quoted(d->json, text));
}

// A list of tools that stood in a text has no key, and its own reader.
static const JsonReader *tools_reader(const DataReader *d, const Json *list) { return list->key ? d->json : d->tools; }

// The list of tools that a message or sample brings along, or the text of such a list; an empty one is none.
static const Json *given_tools(const DataReader *d, const Json *object) {
    const Json *list = given(object, json_key(object, "tools", "functions"));
    if (json_is(list, JSON_STRING) && list->count) {
        JsonReader r = json_open(NULL, list->text, list->count);
        r.outer = d->json, r.text = list;
        list = json_only(&r);
        if (!list->count) return json_close(&r), NULL;      // the sample's own list is still to be read
        json_close(d->tools), *d->tools = r;
    }
    if (!list || (list->type > JSON_NUMBER && !list->count)) return NULL;
    const JsonReader *r = tools_reader(d, list);
    if (list->type != JSON_ARRAY) fail("%s: tools must be an array, not %s", where(r, list), quoted(r, list));
    return list;
}

enum { IN_ONE_LINE = -1, AS_REPR = -2 };

// As Python's json.dumps(ensure_ascii=False), with indent=4 from a level on or in one line, or as its repr; but numbers
// are those of the file, and `sparse` has no null members.
static void text_python(Text *out, const JsonReader *r, const Json *j, const Json *sparse, int level) {
    static const char *const constants[][2] = { [JSON_NULL] = { "None", "None" }, [JSON_BOOL] = { "False", "True" } };
    const char *source = r->source + j->at;
    bool empty = true, repr = level == AS_REPR;
    if (j->type == JSON_STRING) return text_string(out, j->text, j->count, repr);
    if (j->type < JSON_NUMBER && repr) return text_print(out, "%s", constants[j->type][j->number > 0]);
    if (j->type < JSON_ARRAY) return text_add(out, source, strcspn(source, ",]} \t\r\n"));
    text_print(out, "%c", *source);
    for (const Json *m = j->first; m; m = m->next) {
        if (j == sparse && m->type == JSON_NULL) continue;
        if (!empty) text_print(out, level < 0 ? ", " : ",");
        if (level >= 0) text_print(out, "\n%*s", 4 * level + 4, "");
        if (j->type == JSON_OBJECT) text_string(out, m->key, strlen(m->key), repr), text_print(out, ": ");
        text_python(out, r, m, sparse, level < 0 ? level : level + 1);
        empty = false;
    }
    if (!empty && level >= 0) text_print(out, "\n%*s", 4 * level, "");
    text_print(out, "%c", j->type == JSON_OBJECT ? '}' : ']');
}

static void text_function(Text *out, const JsonReader *r, const Json *tool) {
    const Json *type = given(tool, "type"), *function = given(tool, "function");
    if (type && !(type->type == JSON_STRING && !strcmp(type->text, "function")))
        fail("%s: tools of type %s are not supported, only \"function\"", where(r, type), quoted(r, type));
    if (!function) function = tool;
    text_print(out, "\n\n## %s\n\n", want(r, function, "name", JSON_STRING, "a string")->text);
    text_python(out, r, function, json_get(json_get(function, "parameters"), "properties"), 0);
    text_print(out, "%s", GLM4_TOOL_END);
}

static void add_text_turn(const DataReader *d, Conversation *c, int role, const Json *metadata, const Json *text,
                          bool wanted) {
    const Layout *l = d->format->layout;
    bool official = d->o->official_mask, observes = official && l->observations;
    if (l->rounds && role != (c->n % 2 ? ASSISTANT : USER))
        fail("%s: no '%s' here: in %s user and assistant take turns", where(d->json, text), role_names[role], l->name);
    note_text(d, role, text);
    add_turn(c, (Turn){ .role = role, .text = text->text, .n = text->count,
                        .learns = (role == ASSISTANT && (wanted || official)) || (role == OBSERVATION && observes),
                        .metadata = metadata ? metadata->text : "", .metadata_n = metadata ? metadata->count : 0 });
}

// A turn whose text was put together here, from what stands at a place; it is freed with the turn.
static void add_own_turn(const DataReader *d, Conversation *c, int role, const Json *metadata, size_t at, Text t,
                         bool wanted) {
    add_text_turn(d, c, role, metadata, &(Json){ .at = at, .text = t.s, .count = t.n }, wanted);
    c->turns[c->n-1].own = t.s;
}

// A system message, tools or both: one of the two may be NULL. ChatGLM3 has both in one message, later models in two.
static void add_system(const DataReader *d, Conversation *c, const Json *metadata, const Json *content,
                       const Json *tools) {
    const char *opening = d->format->layout->tools;
    Text t = {0};
    if (!tools) return add_text_turn(d, c, SYSTEM, metadata, content, false);
    const JsonReader *r = tools_reader(d, tools);
    if (!opening) fail("%s: the chat layout %s has no words for tools", where(r, tools), d->format->layout->name);
    if (*opening) {
        text_print(&t, "%s", opening);
        for (const Json *tool = tools->first; tool; tool = tool->next) text_function(&t, r, tool);
    } else {
        if (content) text_add(&t, content->text, content->count);
        else text_print(&t, "%s", GLM3_TOOLS);
        text_print(&t, "\n");
        text_python(&t, r, tools, NULL, 0);
    }
    add_turn(c, (Turn){ .role = SYSTEM, .text = t.s, .n = t.n, .fixed = true, .own = t.s });
    if (metadata && !*opening)      // where content and tools are two messages, it goes with the content
        c->turns[c->n-1].metadata = metadata->text, c->turns[c->n-1].metadata_n = metadata->count;
    if (!content || !content->count) return;
    if (*opening) add_text_turn(d, c, SYSTEM, metadata, content, false);
    else note_text(d, SYSTEM, content);
}

#define CALLS "a call is an assistant message with its name as \"metadata\" and its arguments as \"content\"; its " \
              "result is an observation"

// ChatGLM3's older form of a call and what came of it, as its own script read it (finetune_chatmodel_demo/
// preprocess_utils.py, until December 2023): an answer with Python in it, and an observation.
static void add_call(const DataReader *d, Conversation *c, const Json *message, bool wanted) {
    const Layout *l = d->format->layout;
    const Json *name = want(d->json, message, "name", JSON_STRING, "a string");
    const Json *parameters = want(d->json, message, "parameters", JSON_OBJECT, "an object");
    const Json *observation = given(message, "observation");
    Text call = {0}, result = {0};
    if (!l->tools || *l->tools) fail("%s: only ChatGLM3 has this form; " CALLS, where(d->json, name));
    text_print(&call, "```python\ntool_call(");
    for (const Json *p = parameters->first; p; p = p->next) {
        text_print(&call, "%s%s=", p == parameters->first ? "" : ", ", p->key);
        text_python(&call, d->json, p, NULL, AS_REPR);
    }
    text_print(&call, ")\n```");
    if (json_is(observation, JSON_STRING)) text_add(&result, observation->text, observation->count);
    else if (observation) text_python(&result, d->json, observation, NULL, IN_ONE_LINE);
    else text_print(&result, "null");
    add_own_turn(d, c, ASSISTANT, name, parameters->at, call, wanted);
    add_own_turn(d, c, OBSERVATION, NULL, message->at, result, false);
}

// Keys that carry content or change what is learned, and that nothing here reads. A value says nothing where it is
// empty or 0; a flag's, where it is 1 or a list of ones.
static const struct { bool flags; const char *keys, *remedy; } refused[] = {
    { false, "tool_calls,function_call", CALLS },
    { false, "reasoning_content,reasoning,thinking", "write <think>thoughts</think> into \"content\"" },
    { false, "image,images,video,videos,audio,audios", "text alone is read" },
    { false, "history", "write the earlier turns into the messages" },
    { false, "chosen,rejected,rejected_response", "write the wanted answer as the last message" },
    { true, "attention_mask,loss_mask,loss_weights", "leave padding out; the label of what is not learned is -100" },
    { true, "weight,train,loss,label,kto_tag,loss_scale,sample_weight,mask",
      "write \"loss\" into the messages that it is meant for, or leave the sample out" },
};

static bool says_nothing(const Json *j, bool flags) {
    const Json *m = j->type == JSON_ARRAY ? j->first : NULL;
    if (j->type < JSON_STRING) return j->number == flags;
    if (!flags) return !j->count;
    while (m && m->number == 1) m = m->next;
    return !m;
}

// Counts the members of an object that nothing has asked for, each once in a sample, and refuses those above.
static void count_unread(const DataReader *d, const Json *object) {
    Dataset *set = d->set;
    size_t number = set->n + set->n_dropped + 1, most = COUNT(set->unread) - 1;
    for (const Json *m = object->first; m; m = m->next) {
        size_t k = 0;
        if (m->read || m->type == JSON_NULL) continue;
        for (size_t i = 0; i < COUNT(refused); i++)
            if (list_has(refused[i].keys, m->key) && !says_nothing(m, refused[i].flags))
                fail("%s: \"%s\" is not read, and would change what is learned; %s", where(d->json, m), m->key,
                     refused[i].remedy);
        while (k < set->n_unread && k < most && strcmp(set->unread[k].key, m->key)) k++;
        if (k == set->n_unread) set->unread[set->n_unread++].key = strf("%s", k == most ? "other keys" : m->key);
        if (set->unread[k].last != number) set->unread[k].n++;
        set->unread[k].last = number;
    }
}

// Whether an answer shall be learned: "loss", as ChatGLM3's data have it, or other data's "train" or "weight".
static bool is_wanted(const JsonReader *r, const Json *message) {
    const Json *loss = typed(r, given(message, "loss"), JSON_BOOL, "true or false");
    const Json *train = typed(r, given(message, "train"), JSON_BOOL, "true or false");
    const Json *weight = typed(r, given(message, "weight"), JSON_NUMBER, "0 or 1");
    if (weight && weight->number != 0 && weight->number != 1) fail("%s: \"weight\" must be 0 or 1", where(r, weight));
    return (!loss || loss->number > 0) && (!train || train->number > 0) && (!weight || weight->number > 0);
}

// The role of a message, in our words, ShareGPT's or OpenAI's, in small letters or large.
static int role_of(const JsonReader *r, const Json *role) {
    static const char *const others[] = { [USER] = "human", [ASSISTANT] = "gpt", [OBSERVATION] = "tool" };
    for (int k = 0; k < ROLES && strlen(role->text) == role->count; k++)
        if (!strcasecmp(role->text, role_names[k]) || (others[k] && !strcasecmp(role->text, others[k]))) return k;
    fail("%s: role %s is not one of system, user, assistant, observation; " CALLS, where(r, role), quoted(r, role));
}

// tools: those of the sample, if this is the message that brings them
static void read_message(const DataReader *d, const Json *message, const Json *tools, Conversation *c) {
    const JsonReader *r = d->json;
    if (message->type != JSON_OBJECT)
        fail("%s: a message must be an object, not %s", where(r, message), quoted(r, message));
    int role = role_of(r, want(r, message, json_key(message, "role", "from"), JSON_STRING, "a string"));
    bool wanted = is_wanted(r, message);
    if (role == OBSERVATION && json_get(message, "parameters")) return add_call(d, c, message, wanted);
    const Json *metadata = typed(r, given(message, "metadata"), JSON_STRING, "a string");
    const Json *own = given_tools(d, message);
    const char *key = json_key(message, "content", "value");
    if (!json_is(given(message, key), JSON_STRING)) count_unread(d, message);      // it may have tool_calls instead
    const Json *content = want(r, message, key, JSON_STRING, "a string");
    if (own && role != SYSTEM) fail("%s: \"tools\" belong to a system message", where(tools_reader(d, own), own));
    if (own && tools) fail("%s: \"tools\" stand here and beside the messages; give them once", where(r, message));
    if (role == SYSTEM) add_system(d, c, metadata, content, own ? own : tools);
    else add_text_turn(d, c, role, metadata, content, wanted);
}

// A system message and tools that stand beside messages or columns. carrier: the system message among those, if there
// is one; it is to bring the tools, which are returned.
static const Json *read_beside(const DataReader *d, const Json *root, const Json *carrier, Conversation *c) {
    const Json *tools = given_tools(d, root), *system = typed(d->json, given(root, "system"), JSON_STRING, "a string");
    if (system && !system->count) system = NULL;
    if (system && carrier) fail("%s: \"system\" is here and among the messages; give one", where(d->json, system));
    if (!carrier && (system || tools)) add_system(d, c, NULL, system, tools);
    return tools;
}

static void read_messages(const DataReader *d, const Json *root, const Json *messages, Conversation *c) {
    const Json *carrier = NULL;
    if (!typed(d->json, messages, JSON_ARRAY, "an array of messages")->count)
        fail("%s: \"%s\" is empty: there is nothing to learn", where(d->json, root), messages->key);
    for (const Json *m = messages->first; m && !carrier; m = m->next) {
        const Json *role = json_get(m, json_key(m, "role", "from"));
        if (json_is(role, JSON_STRING) && !strcasecmp(role->text, role_names[SYSTEM])) carrier = m;
    }
    const Json *tools = read_beside(d, root, carrier, c);
    for (const Json *m = messages->first; m; m = m->next) {
        read_message(d, m, m == carrier ? tools : NULL, c);
        count_unread(d, m);
    }
}

// The names of question, what is put under it, and answer in samples of columns: those of the options, Alpaca's,
// ms-swift's. The first that a sample has both of, or else has one of; question NULL: none.
typedef struct { const char *question, *more, *answer; } Columns;

static Columns columns_of(const Options *o, const Json *root) {
    bool alpaca = !strcmp(o->prompt_column, "instruction");
    const Columns known[] = { { o->prompt_column, alpaca ? "input" : NULL, o->response_column },
                              { "instruction", "input", "output" }, { "query", NULL, "response" } };
    for (int wanted = 2; wanted > 0; wanted--)
        for (const Columns *c = known; c < known + COUNT(known); c++)
            if ((json_get(root, c->question) != NULL) + (json_get(root, c->answer) != NULL) >= wanted) return *c;
    return (Columns){0};
}

// A question and its answer in columns, and those before them: history: [[question, answer], ...].
static void read_columns(const DataReader *d, const Json *root, Conversation *c) {
    Columns names = columns_of(d->o, root);
    const Json *history = typed(d->json, given(root, d->o->history_column), JSON_ARRAY, "an array of pairs");
    const Json *question = want(d->json, root, names.question, JSON_STRING, "a string");
    const Json *more = names.more ? typed(d->json, given(root, names.more), JSON_STRING, "a string") : NULL;
    Text whole = {0};
    read_beside(d, root, NULL, c);
    for (const Json *pair = history ? history->first : NULL; pair; pair = pair->next) {
        const Json *asked = pair->type == JSON_ARRAY && pair->count == 2 ? pair->first : NULL;
        if (!json_is(asked, JSON_STRING) || !json_is(asked->next, JSON_STRING))
            fail("%s: \"%s\" must hold pairs of a question and its answer, not %s", where(d->json, pair), history->key,
                 quoted(d->json, pair));
        add_text_turn(d, c, USER, NULL, asked, true);
        add_text_turn(d, c, ASSISTANT, NULL, asked->next, true);
    }
    text_add(&whole, question->text, question->count);
    if (question->count && more && more->count) text_add(&whole, "\n", 1);
    if (more) text_add(&whole, more->text, more->count);
    add_own_turn(d, c, USER, NULL, question->at, whole, true);
    if (!d->asks || given(root, names.answer))
        add_text_turn(d, c, ASSISTANT, NULL, want(d->json, root, names.answer, JSON_STRING, "a string"), true);
}

static size_t most_ids(const Options *o) { return (size_t)(o->max_input_length + o->max_output_length + 1); }

// --overlong truncate: the longest texts lose their ends. All are cut to one length: the largest at which the sample
// fits, found by halving. Role tokens, metadata, tools and the token that ends the answer stay, and with it a target.
static Row encode_sample(const DataReader *d, const Conversation *c, bool asks) {
    size_t longest = 0, low = 0;
    bool cuts = !strcmp(d->o->overlong, "truncate");
    for (size_t i = 0; i < c->n; i++) longest = max_size(longest, c->turns[i].n);
    for (size_t high = longest, length = longest; ; length = high - (high - low) / 2) {
        Row row = encode_turns(d->format, c->turns, c->n, length, asks);
        bool fits = row.ids.n <= most_ids(d->o) || !cuts || !length;
        d->set->n_cut += fits && length == high && length < longest;
        if (fits && length == high) return row;
        free_row(&row);
        if (fits) low = length;
        else high = length - 1;
    }
}

// GLM-4's official script with `combine: true` learns the last assistant turn alone, without the line break before it.
static void keep_last_turn(const ChatFormat *f, Row *row) {
    size_t last = row->ids.n;
    for (size_t i = 0; i < row->ids.n; i++) if (row->ids.ids[i] == f->roles[ASSISTANT]) last = i;
    for (size_t i = 0; i < row->ids.n; i++) row->labels.ids[i] = i > last + 1 ? row->ids.ids[i] : NO_TARGET;
}

static bool learns_last(const Options *o, const Layout *l) {
    return l->official == LAST_ANSWER || (l->official == COMBINES && o->combine);
}

// messages: NULL where the sample has columns
static Sample read_conversation(const DataReader *d, const Json *root, const Json *messages) {
    Conversation c = {0};
    const Layout *l = d->format->layout;
    if (!d->format->tokenizer || !l)
        fail("%s: text needs a tokenizer and a chat layout: %s", where(d->json, root), d->format->why);
    if (messages) read_messages(d, root, messages, &c);
    else read_columns(d, root, &c);
    d->set->n_turns += c.n;
    for (size_t i = 0; i < c.n; i++) d->set->n_answers += c.turns[i].role == ASSISTANT;
    const Turn *last = &c.turns[c.n - 1];
    if (l->thinks && last->role == ASSISTANT && strncmp(last->text, "<think>", 7))
        note(d, NO_THOUGHTS, root, excerpt(last->text, last->n));
    Row row = encode_sample(d, &c, d->asks && last->role != ASSISTANT);
    if (d->o->official_mask && learns_last(d->o, l)) keep_last_turn(d->format, &row);
    drop_turns(&c, 0);
    free(c.turns);
    return (Sample){ .ids = row.ids.ids, .labels = row.labels.ids, .n = row.ids.n, .prompt_n = row.prompt_n };
}

static int32_t *read_ids(const DataReader *d, const Json *array, bool labels) {
    int32_t *ids = alloc(array->count, sizeof *ids), *out = ids;
    for (const Json *j = array->first; j; j = j->next) {
        bool whole = j->type == JSON_NUMBER && j->number >= -1e9 && j->number <= 1e9 && floor(j->number) == j->number;
        bool inside = whole && j->number >= 0 && j->number < (double)d->format->config->vocab_size;
        if (!inside && !(whole && labels && (int32_t)j->number == NO_TARGET))
            fail("%s: %s is no token id of this model, which has 0 to %zu%s", where(d->json, j), quoted(d->json, j),
                 d->format->config->vocab_size - 1, labels ? "; -100 marks a token that is no target" : "");
        *out++ = (int32_t)j->number;
    }
    return ids;
}

// Ready ids that are too long lose those before the last, which ends the answer.
static Sample read_ready(const DataReader *d, const Json *root) {
    const Json *ids = want(d->json, root, "input_ids", JSON_ARRAY, "an array of token ids");
    const Json *labels = want(d->json, root, "labels", JSON_ARRAY, "an array of token ids and -100");
    if (labels->count != ids->count)
        fail("%s: %zu labels for %zu input_ids; give as many", where(d->json, labels), labels->count, ids->count);
    Sample s = { .ids = read_ids(d, ids, false), .labels = read_ids(d, labels, true), .n = ids->count };
    size_t most = most_ids(d->o), end;
    if (s.n > most && !strcmp(d->o->overlong, "truncate")) {
        s.ids[most-1] = s.ids[s.n-1], s.labels[most-1] = s.labels[s.n-1];
        s.n = most;
        d->set->n_cut++;
    }
    for (end = s.n; end > 0 && s.labels[end-1] == NO_TARGET; ) end--;       // the last answer: the last run of targets
    for (s.prompt_n = end; s.prompt_n > 0 && s.labels[s.prompt_n - 1] != NO_TARGET; ) s.prompt_n--;
    return s;
}

static Sample read_sample(const DataReader *d, const Json *root) {
    const Options *o = d->o;
    const Json *messages = given(root, "messages"), *conversations = given(root, "conversations");
    const Json *second = messages && conversations ? conversations : json_get(root, "input_ids");
    if (!messages) messages = conversations;        // the same under another name
    if (second && messages)
        fail("%s: \"%s\" beside \"%s\"; give one of them", where(d->json, second), second->key, messages->key);
    if (second) return read_ready(d, root);
    if (messages || columns_of(o, root).question) return read_conversation(d, root, messages);
    fail("%s: a sample must be an object and must have \"messages\", \"input_ids\" and \"labels\", \"instruction\" and "
         "\"output\", or what --prompt_column and --response_column name, \"%s\" and \"%s\"; here stands %s",
         where(d->json, root), o->prompt_column, o->response_column, quoted(d->json, root));
}

static void dataset_add(Dataset *set, Sample s) {
    set->samples = grow(set->samples, &set->capacity, set->n + 1, sizeof *set->samples);
    set->samples[set->n++] = s;
    set->n_tokens += s.n;
    set->n_targets += s.n_targets;
    set->n_stops += s.stops;
    set->longest = max_size(set->longest, s.n);
}

// Reads a data file and notes what it finds. What cannot be read, or has no target where it must, is named and ends it.
static Dataset scan_data_file(const char *path, const ChatFormat *f, const Options *o, bool need_targets) {
    JsonReader r = json_open_file(path), tools = {0};
    Dataset set = {0};
    DataReader d = { &r, &tools, f, o, &set, !need_targets };
    for (const Json *root; (root = json_next(&r)); ) {
        Sample s = read_sample(&d, root);
        count_unread(&d, root);
        s.number = set.n + set.n_dropped + 1;
        if (!s.n) fail("%s: the sample has no tokens", where(&r, root));
        for (size_t i = 1; i < s.n; i++)
            if (s.labels[i] != NO_TARGET) s.n_targets++, s.stops = is_stop(f, s.labels[i]);
        if (!s.n_targets && (need_targets || (f->layout && !s.prompt_n)))
            fail("%s: the sample has nothing to learn: no assistant's turn, or no label but -100; here stands %s",
                 where(&r, root), quoted(&r, root));
        bool fits = s.n <= most_ids(o), drops = !fits && !strcmp(o->overlong, "drop");
        if (!fits && !drops) note(&d, TOO_LONG, root, strf("%zu tokens", s.n));
        if (!drops) { dataset_add(&set, s); continue; }
        free(s.ids), free(s.labels);
        set.n_dropped++;
    }
    if (!set.n) fail("%s: holds no sample%s", path, set.n_dropped ? " that is short enough" : "");
    for (size_t i = 0; i < set.n_unread; i++)
        fprintf(stderr, "%s%.*s (%zu of %zu samples)%s", i ? ", " : "warning: not read: ",
                (int)strcspn(set.unread[i].key, "\n\r\t\x1B"), set.unread[i].key, set.unread[i].n,
                set.n + set.n_dropped, i + 1 == set.n_unread ? "\n" : "");
    json_close(&r), json_close(&tools);
    return set;
}

// The file of a data folder that has one of these names, as in "dev.json,dev.jsonl". NULL: there is none.
static const char *data_file(const char *data, const char *names) {
    const char *found = NULL, *name;
    for (char *rest = strf("%s", names); (name = strsep(&rest, ",")); ) {
        const char *path = strf("%s/%s", data, name);
        if (found && exists(path)) fail("%s: is there beside %s; name the one that you mean", path, found);
        if (exists(path)) found = path;
    }
    return found;
}

static const char train_files[] = "train.json,train.jsonl", dev_files[] = "dev.json,dev.jsonl,val.json,val.jsonl";

// ---- 8.2 What was read -------------------------------------------------------------------------------------------

// Which labels the official script sets, in words; NULL: the mask is ours.
static const char *mask_words(const Options *o, const ChatFormat *f) {
    const Layout *l = f->layout;
    if (o->combine && !(o->official_mask && l && l->official != EVERY_ANSWER))
        fail("--combine belongs to --official_mask and a layout of GLM-4 (glm4-chat, 0414, z1, edge)");
    if (!o->official_mask) return NULL;
    if (l && learns_last(o, l)) return "the last answer alone, without the line break before it";
    return strf("every answer%s, whatever its \"loss\" says", l && l->observations ? " and observation" : "");
}

static int by_size_down(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x < y) - (x > y);
}

// A hash of each sample's ids, sorted.
static size_t *sample_hashes(const Dataset *set) {
    size_t *hashes = alloc(set->n, sizeof *hashes);
    for (size_t i = 0; i < set->n; i++)
        hashes[i] = hash_bytes(set->samples[i].ids, set->samples[i].n * sizeof *set->samples[i].ids);
    qsort(hashes, set->n, sizeof *hashes, by_size_down);
    return hashes;
}

// Samples whose ids another one before them has.
static size_t count_duplicates(const Dataset *set) {
    size_t *hashes = sample_hashes(set), n = 0;
    for (size_t i = 1; i < set->n; i++) n += hashes[i] == hashes[i-1];
    free(hashes);
    return n;
}

// Samples of a set whose ids one of another set has.
static size_t count_shared(const Dataset *set, const Dataset *other) {
    size_t *hashes = sample_hashes(set), *others = sample_hashes(other), n = 0;
    for (size_t i = 0; i < set->n; i++)
        n += bsearch(&hashes[i], others, other->n, sizeof *others, by_size_down) != NULL;
    free(hashes), free(others);
    return n;
}

static void print_findings(FILE *f, const Dataset *set) {
    for (int k = 0; k < FINDINGS; k++)
        if (set->findings[k].n)
            fprintf(f, "%s: %s: %s (%zu in all)\n", finding_kinds[k].wrong ? "wrong" : "warning",
                    set->findings[k].first, finding_kinds[k].what, set->findings[k].n);
}

static void refuse_findings(const Dataset *set) {
    for (int k = 0; k < FINDINGS; k++)
        if (finding_kinds[k].wrong && set->findings[k].n)
            fail("%s: %s (%zu in all)", set->findings[k].first, finding_kinds[k].what, set->findings[k].n);
}

// A data file whose every sample fits and can be used.
static Dataset read_data_file(const char *path, const ChatFormat *f, const Options *o, bool need_targets) {
    Dataset set = scan_data_file(path, f, o, need_targets);
    refuse_findings(&set);
    print_findings(stderr, &set);
    if (set.n_cut + set.n_dropped)
        fprintf(stderr, "%s: %zu samples cut, %zu dropped (--overlong)\n", path, set.n_cut, set.n_dropped);
    if (set.longest > f->config->max_positions)
        fprintf(stderr, "warning: %s: its longest sample has %zu tokens, and the model is made for %zu\n", path,
                set.longest, f->config->max_positions);
    return set;
}

// The short form, which every run prints; `check` has the long one. held_out: samples that validate.
static void print_summary(const Dataset *set, size_t held_out, const ChatFormat *f) {
    bool knows_stops = f->layout && f->tokenizer;
    const char *stops = strf("; samples ending in a stop token: %zu of %zu", set->n_stops, set->n);
    fprintf(stderr, "data: %zu samples to learn, %zu to validate; longest %zu tokens; target tokens: %zu of %zu%s\n",
            set->n, held_out, set->longest, set->n_targets, set->n_tokens, knows_stops ? stops : "");
}

// ---- 8.3 Splits and batches --------------------------------------------------------------------------------------

// A number of something. Sorted from the largest down, of equals the first.
typedef struct { real value; int32_t id; } Valued;

static int by_value_down(const void *a, const void *b) {
    const Valued *x = a, *y = b;
    if (x->value != y->value) return x->value < y->value ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

// In [0,1), the same for samples with the same ids, whatever their labels.
static real split_place(const Sample *s, uint64_t seed) {
    return (real)rng_uniform(rng_key(seed, hash_bytes(s->ids, s->n * sizeof *s->ids)), 0);
}

// The share that moves n samples of a set, and their copies: those with the lowest places.
static double share_of(const Dataset *set, size_t n, uint64_t seed) {
    Valued *places = alloc(set->n + 1, sizeof *places);
    size_t distinct = 0;
    for (size_t i = 0; i < set->n; i++) places[i].value = split_place(&set->samples[i], seed);
    qsort(places, set->n, sizeof *places, by_value_down);
    for (size_t i = 0; i < set->n; i++)
        if (!distinct || places[i].value != places[distinct-1].value) places[distinct++] = places[i];
    const Valued *nth = places + distinct - min_size(n, distinct);
    double share = n && n < distinct ? ((double)nth[0].value + (double)nth[-1].value) / 2 : 0;
    free(places);
    return share;
}

// Moves a share of the samples to a validation set, equal ones together; at least one, unless none would stay.
static Dataset split_off(Dataset *set, double share, uint64_t seed) {
    Dataset validation = {0};
    double lowest = 1, highest = 0;
    for (size_t i = 0; i < set->n; i++) {
        double place = (double)split_place(&set->samples[i], seed);
        lowest = fmin(lowest, place), highest = fmax(highest, place);
    }
    if (!(share > 0) || lowest == highest) return validation;
    double limit = fmin(fmax(share, nextafter(lowest, 1)), highest);
    size_t n = set->n;
    set->n = set->n_tokens = set->n_targets = set->n_stops = set->longest = 0;      // what stays is added anew
    for (size_t i = 0; i < n; i++)
        dataset_add((double)split_place(&set->samples[i], seed) < limit ? &validation : set, set->samples[i]);
    return validation;
}

// The order of the samples in one epoch (Fisher-Yates).
static size_t *epoch_order(size_t n, uint64_t seed, uint64_t epoch) {
    size_t *order = alloc(n, sizeof *order);
    uint64_t key = rng_key(rng_key(seed, KEY_SHUFFLE), epoch);
    for (size_t i = 0; i < n; i++) {
        size_t j = (size_t)(rng_bits(key, i) % (i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    return order;
}

// A batch of n samples: i is chosen[i] or, if that is NULL, first + i of the set; for dropout first + i of its step.
static Batch make_batch(const Dataset *set, const size_t *chosen, size_t n, uint64_t step_key, size_t first) {
    Batch b = { .n = n, .step_key = step_key, .starts = alloc(n + 1, sizeof *b.starts) };
    for (size_t i = 0; i < n; i++) b.starts[i+1] = b.T += set->samples[chosen ? chosen[i] : first + i].n;
    b.ids = alloc(b.T, sizeof *b.ids), b.labels = alloc(b.T, sizeof *b.labels),
    b.token_keys = alloc(b.T, sizeof *b.token_keys);
    for (size_t i = 0; i < n; i++) {
        const Sample *s = &set->samples[chosen ? chosen[i] : first + i];
        memcpy(b.ids + b.starts[i], s->ids, s->n * sizeof *s->ids);
        memcpy(b.labels + b.starts[i], s->labels, s->n * sizeof *s->labels);
        uint64_t key = rng_key(step_key, first + i);
        for (size_t t = 0; t < s->n; t++) b.token_keys[b.starts[i] + t] = rng_key(key, t);
    }
    return b;
}

// Fixed random ids, each a target, to compare models on.
enum { FIXED_TOKENS = 96 };
static Batch fixed_batch(const Model *m, size_t n) {
    Sample s = { .ids = alloc(n, sizeof *s.ids), .n = n };
    for (size_t i = 0; i < n; i++) s.ids[i] = (int32_t)(rng_bits(FIXED_TOKENS, i) % m->config.vocab_size);
    s.labels = s.ids;
    Batch b = make_batch(&(Dataset){ .samples = &s, .n = 1 }, NULL, 1, 0, 0);
    free(s.ids);
    return b;
}

static void free_batch(Batch *b) { free(b->ids), free(b->labels), free(b->token_keys), free(b->starts); }

// The tokens of the largest batch of different samples: the longest together.
static size_t most_tokens(const Dataset *set, size_t batch_size) {
    size_t *lengths = alloc(set->n, sizeof *lengths), sum = 0;
    for (size_t i = 0; i < set->n; i++) lengths[i] = set->samples[i].n;
    qsort(lengths, set->n, sizeof *lengths, by_size_down);
    for (size_t i = 0; i < min_size(batch_size, set->n); i++) sum += lengths[i];
    free(lengths);
    return sum;
}

// ==== 9  Generation and scores ===================================================================================
// A token at a time: the keys and values of all tokens so far are kept, so each new one costs one row of every product.
// The run of section 4 does it, with keys and values for whole conversations and activations for a few tokens.

// ---- 9.1 Answers -------------------------------------------------------------------------------------------------

enum { PREFILL = 256 };             // tokens of a prompt that go through the model at once

typedef struct { Run run; real *logits; size_t n_sequences, longest, n_answers; } Generator;  // logits [n_sequences,V]

// What generates answers: for up to n sequences at once, of at most `longest` tokens each.
static Generator make_generator(Model *m, const Method *method, size_t longest, size_t n) {
    size_t T = max_size(min_size(PREFILL, longest), n), rows = times(n, longest) + (n > 1 ? T : 0);
    Generator g = { .run = describe_run(m, method, FORWARD_ONLY, T, rows), .n_sequences = n, .longest = longest };
    need_memory(bytes_of(&g.run), "--max_context (chat), --per_device_eval_batch_size or --max_new_tokens");
    take_run(&g.run);
    g.run.caches = alloc(n, sizeof *g.run.caches);
    g.logits = alloc(times(n, m->config.vocab_size), sizeof *g.logits);
    return g;
}

static void give_generator(Generator *g) {
    give_run(&g->run);
    free(g->run.caches), free(g->logits);
}

// Runs tokens through the model, each sequence behind its cache. logits [n,V]: of the token after each; may be NULL.
static void feed_batch(Generator *g, const Batch *b, real *logits) {
    forward(&g->run, b, false);
    for (size_t s = 0; s < b->n; s++) g->run.caches[s].n += b->starts[s+1] - b->starts[s];
    if (!logits) return;
    head_forward(&g->run, g->run.final, b->n);
    memory_copy_out(logits, g->run.logits, b->n * g->run.model->config.vocab_size * sizeof *logits);
}

// The same for one sequence of any length; afterwards g->logits are those of the next token.
static void feed(Generator *g, const int32_t *ids, size_t n) {
    for (size_t at = 0, part; at < n; at += part) {
        part = min_size(g->run.max_T, n - at);
        Batch b = { .ids = (int32_t *)ids + at, .starts = (size_t[]){ 0, part }, .n = 1, .T = part };
        feed_batch(g, &b, at + part < n ? NULL : g->logits);
    }
}

// Draws from softmax(logits / temperature), cut to the likeliest tokens that together have probability top_p
// (Holtzman et al. 2019, arXiv:1904.09751). Temperature 0: the likeliest, the first of equals.
static int32_t draw_token(const real *logits, size_t V, double temperature, double top_p, float uniform) {
    size_t best = 0;
    for (size_t v = 1; v < V; v++) if (logits[v] > logits[best] || isnan(logits[v])) best = v;
    if (!isfinite(logits[best])) fail("the model gives numbers that are not finite; its weights are damaged");
    if (!(temperature > 0)) return (int32_t)best;
    Valued *c = alloc(V, sizeof *c);
    double sum = 0, kept = 0, passed = 0;
    for (size_t v = 0; v < V; v++) {
        c[v] = (Valued){ (real)exp((double)(logits[v] - logits[best]) / temperature), (int32_t)v };
        sum += (double)c[v].value;
    }
    qsort(c, V, sizeof *c, by_value_down);
    size_t n = 0, chosen = 0;
    while (n < V && (!n || kept < top_p * sum)) kept += (double)c[n++].value;
    for (; chosen + 1 < n; chosen++) if ((passed += (double)c[chosen].value) > (double)uniform * kept) break;
    int32_t id = c[chosen].id;
    free(c);
    return id;
}

// Token number i of answer number n, which has random numbers of its own, from the logits of a sequence.
static int32_t draw_answer(const Generator *g, const Options *o, size_t sequence, size_t n, size_t i) {
    size_t V = g->run.model->config.vocab_size;
    uint64_t key = rng_key(rng_key((uint64_t)o->seed, KEY_ANSWER), n);
    return draw_token(g->logits + sequence*V, V, o->temperature, o->top_p, rng_uniform(key, i));
}

// Where the text before `n` can be cut without splitting a character that may still be completed.
static size_t whole_characters(const char *s, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        unsigned char c = (unsigned char)s[n - back];
        if (c >= 0xC0) return back < (c < 0xE0 ? 2u : c < 0xF0 ? 3u : 4u) ? n - back : n;
        if (c < 0x80) break;
    }
    return n;
}

// Generates up to a stop token or `most` tokens, adding them to `answer`, and writes the text to the stream, if any, as
// it comes. Blanks and the line break that begin an answer are the layout's and not shown. Returns whether it stopped.
static bool generate(Generator *g, const ChatFormat *f, const Options *o, size_t most, Ids *answer, FILE *stream) {
    size_t shown = 0, skipped = 0, number = g->n_answers++;
    for (size_t i = 0; i < most && g->run.caches->n < g->longest; i++) {
        int32_t id = draw_answer(g, o, 0, number, i);
        if (is_stop(f, id)) return true;
        ids_add(answer, id);
        feed(g, &id, 1);
        if (!stream) continue;
        Text text = decode(f->tokenizer, answer->ids, answer->n);
        size_t end = whole_characters(text.s, text.n);
        if (shown == skipped) while (skipped < end && isspace((unsigned char)text.s[skipped])) shown = ++skipped;
        if (end > shown) fwrite(text.s + shown, 1, end - shown, stream), fflush(stream), shown = end;
        free(text.s);
    }
    return false;
}

// The prompt of a sample and what the model answers to it.
typedef struct { const Sample *sample; size_t number; Ids answer; bool stopped; } Question;

// Answers up to n_sequences questions together: their prompts one by one, then a token of each at a time. A question
// that is answered leaves the batch. One at a time gives other last bits: a product of one row sums in another order.
static void answer_together(Generator *g, const ChatFormat *f, const Options *o, Question *questions, size_t n) {
    const Config *config = &g->run.model->config;
    size_t size = g->run.max_kv * config->n_kv_heads * config->head_dim, *starts = alloc(n + 1, sizeof *starts);
    Question **asked = alloc(n, sizeof *asked);
    Cache *caches = g->run.caches;
    int32_t *ids = alloc(n, sizeof *ids);
    for (LayerState *l = g->run.layers, *end = l + config->n_layers; l < end; l++) zero(l->k, size), zero(l->v, size);
    for (size_t i = 0; i < n; i++) {
        asked[i] = &questions[i];
        asked[i]->number = g->n_answers++;
        caches[i] = (Cache){ i * g->longest, 0 };
        g->run.caches = caches + i;
        feed(g, asked[i]->sample->ids, asked[i]->sample->prompt_n);
        ids[i] = draw_answer(g, o, 0, asked[i]->number, 0);
        starts[i+1] = i + 1;
    }
    g->run.caches = caches;
    for (size_t live = n, kept; live; live = kept) {
        kept = 0;
        for (size_t i = 0; i < live; i++) {
            Question *q = asked[i];
            if ((q->stopped = is_stop(f, ids[i]))) continue;
            ids_add(&q->answer, ids[i]);
            if (q->answer.n == (size_t)o->max_new_tokens || caches[i].n == g->longest) continue;
            asked[kept] = q, caches[kept] = caches[i], ids[kept++] = ids[i];
        }
        if (kept) feed_batch(g, &(Batch){ .ids = ids, .starts = starts, .n = kept, .T = kept }, g->logits);
        for (size_t i = 0; i < kept; i++) ids[i] = draw_answer(g, o, i, asked[i]->number, asked[i]->answer.n);
    }
    free(starts), free(asked), free(ids);
}

// ---- 9.2 Scores of answers ---------------------------------------------------------------------------------------
// All are means over the answers, from 0 to 100, on characters (no words are cut), without blanks at both ends.
// ROUGE (Lin 2004) as the Python package rouge_chinese has it: over distinct characters or pairs, without any blanks.
// BLEU (Papineni et al. 2002) as NLTK's sentence_bleu with smoothing method 3, with inner blanks. No answer: both 0.

typedef enum { ROUGE_1, ROUGE_2, ROUGE_L, BLEU_4, ACCURACY, STOP_RATE, REPETITION_RATE, METRICS } Metric;
static const struct { const char *name, *meaning; } metrics[METRICS] = {
    { "rouge-1", "F1 of the distinct characters that answer and reference share" },
    { "rouge-2", "the same of pairs of characters" },
    { "rouge-l", "F1 of their longest common subsequence of characters" },
    { "bleu-4", "runs of 1 to 4 characters that the reference has too, times a penalty for short answers" },
    { "accuracy", "% of answers that are the reference to the letter, but for blanks around them" },
    { "stop_rate", "% of answers that ended in a stop token, not at max_new_tokens" },
    { "repetition_rate", "% of answers that end in a loop: up to 20 characters, 4 times or more, 20 or more in all" },
};
typedef struct { double sum[METRICS]; size_t n; } Scores;

typedef struct { uint32_t *at; size_t n; } Characters;
typedef struct { uint32_t c[4]; } Gram;         // a run of 1 to 4 characters, zeros behind

// The characters of a text without the blanks at its ends, or without any.
static Characters characters_of(Text text, bool any_blanks) {
    Characters t = { alloc(text.n, sizeof *t.at), 0 };
    for (size_t at = 0, end = 0, length; at < text.n; at += length) {
        uint32_t c = utf8_get(text.s + at, text.n - at, &length);
        if (!is_space_character(c)) t.at[end] = c, t.n = ++end;
        else if (any_blanks && end) t.at[end++] = c;
    }
    return t;
}

static int by_gram(const void *a, const void *b) { return memcmp(a, b, sizeof(Gram)); }

static Gram *sorted_grams(Characters t, size_t order, size_t *n) {
    *n = t.n < order ? 0 : t.n - order + 1;
    Gram *grams = alloc(*n, sizeof *grams);
    for (size_t i = 0; i < *n; i++) memcpy(grams[i].c, t.at + i, order * sizeof *t.at);
    qsort(grams, *n, sizeof *grams, by_gram);
    return grams;
}

// Of runs of `order` characters: how many a has, those with a partner in b, distinct ones in a, in b, in both.
typedef struct { size_t n, matched, in_a, in_b, in_both; } Overlap;

static Overlap overlap(Characters a, Characters b, size_t order) {
    size_t n_a, n_b;
    Gram *in_a = sorted_grams(a, order, &n_a), *in_b = sorted_grams(b, order, &n_b);
    Overlap o = { .n = n_a };
    for (size_t i = 0, j = 0; i < n_a || j < n_b; ) {
        const Gram *least = i == n_a || (j < n_b && by_gram(in_b + j, in_a + i) < 0) ? in_b + j : in_a + i;
        size_t of_a = 0, of_b = 0;
        while (i < n_a && !by_gram(in_a + i, least)) i++, of_a++;
        while (j < n_b && !by_gram(in_b + j, least)) j++, of_b++;
        o.in_a += of_a > 0, o.in_b += of_b > 0, o.in_both += of_a && of_b;
        o.matched += min_size(of_a, of_b);
    }
    free(in_a), free(in_b);
    return o;
}

static double f1(Overlap o) {
    double both = (double)o.in_both, p = both / (double)max_size(o.in_a, 1), r = both / (double)max_size(o.in_b, 1);
    return 2 * p * r / (p + r + 1e-8);          // of precision and recall
}

static double rouge_l(Characters a, Characters b) {
    size_t *row = alloc(b.n + 1, sizeof *row);   // row[j]: of the first i characters of a and the first j of b
    for (size_t i = 0; i < a.n; i++)
        for (size_t j = 0, diagonal = 0; j < b.n; j++) {
            size_t above = row[j+1];
            row[j+1] = a.at[i] == b.at[j] ? diagonal + 1 : max_size(above, row[j]);
            diagonal = above;
        }
    size_t longest = row[b.n];
    free(row);
    return f1((Overlap){ .in_a = a.n, .in_b = b.n, .in_both = longest });
}

static double bleu_4(Characters answer, Characters reference) {
    double sum = 0, halved = 1;
    for (size_t order = 1; order <= 4; order++) {
        Overlap o = overlap(answer, reference, order);
        if (!o.matched && order == 1) return 0;
        if (!o.matched) halved /= 2;
        sum += log((o.matched ? (double)o.matched : halved) / (double)max_size(o.n, 1)) / 4;
    }
    return exp(sum + (answer.n > reference.n ? 0 : 1 - (double)reference.n / (double)answer.n));
}

static bool loops(Characters t) {
    for (size_t period = 1; period <= 20 && period < t.n; period++) {
        size_t n = period;
        while (n < t.n && t.at[t.n-1-n] == t.at[t.n-1-n+period]) n++;
        if (n >= 4 * period && n >= 20) return true;
    }
    return false;
}

static void add_scores(Scores *s, Text answer, Text reference, bool stopped) {
    Characters a = characters_of(answer, true), a_dense = characters_of(answer, false);
    Characters r = characters_of(reference, true), r_dense = characters_of(reference, false);
    double of_this[METRICS] = {
        f1(overlap(a_dense, r_dense, 1)), f1(overlap(a_dense, r_dense, 2)), rouge_l(a_dense, r_dense), bleu_4(a, r),
        a.n == r.n && !memcmp(a.at, r.at, a.n * sizeof *a.at), stopped, loops(a) };
    for (size_t i = 0; i < METRICS; i++) s->sum[i] += 100 * of_this[i];
    s->n++;
    free(a.at), free(r.at), free(a_dense.at), free(r_dense.at);
}

// ---- 9.3 Answers to a data set -----------------------------------------------------------------------------------

// Text of n ids for people and JSON, without the layout's blanks in front; bytes that are no UTF-8 become U+FFFD.
static Text readable(const Tokenizer *t, const int32_t *ids, size_t n) {
    Text text = decode(t, ids, n), out = {0};
    text_add(&out, "", 0);
    for (size_t at = 0, length; at < text.n; at += length) {
        uint32_t c = utf8_get(text.s + at, text.n - at, &length);
        if (c == INVALID) text_print(&out, "\xEF\xBF\xBD");
        else if (out.n || !is_space_character(c)) text_add(&out, text.s + at, length);
    }
    free(text.s);
    return out;
}

// Scores one answer if there is one to compare it with; writes it to `out`, and the first one of all to *example.
static void score_answer(Scores *scores, const Question *q, const ChatFormat *f, FILE *out, const char **example) {
    const Sample *s = q->sample;
    size_t end = s->prompt_n;
    while (end < s->n && !is_stop(f, s->ids[end])) end++;       // of the answer that is known
    Text texts[] = { readable(f->tokenizer, s->ids, s->prompt_n),
                     readable(f->tokenizer, s->ids + s->prompt_n, end - s->prompt_n),
                     readable(f->tokenizer, q->answer.ids, q->answer.n) };
    static const char *const names[] = { "prompt", "reference", "answer" };
    Text line = {0}, shown = {0};
    bool known = s->prompt_n < s->n;
    if (known) add_scores(scores, texts[2], texts[1], q->stopped);
    text_print(&line, "{\"sample\": %zu", s->number);
    for (size_t i = 0; i < COUNT(texts); i++) {
        text_print(&line, ", \"%s\": ", names[i]);
        if (known || i != 1) text_json(&line, texts[i].s, texts[i].n);
        else text_print(&line, "null");
        if (!*example && (known || i != 1)) text_print(&shown, "%s%-10s %s", i ? "\n" : "", names[i], texts[i].s);
        free(texts[i].s);
    }
    text_print(&line, ", \"stopped\": %s}\n", q->stopped ? "true" : "false");
    if (out) fwrite(line.s, 1, line.n, out);
    if (!*example) *example = shown.s;
    free(line.s);
}

// A generator for the answers to a data set.
static Generator make_answerer(Model *m, const Method *method, const Dataset *set, const Options *o) {
    size_t prompt = 0, n = min_size((size_t)o->per_device_eval_batch_size, set->n);
    for (size_t i = 0; i < set->n; i++) prompt = max_size(prompt, set->samples[i].prompt_n);
    size_t longest = max_size(prompt + 1, min_size(prompt + (size_t)o->max_new_tokens, positions_left(m)));
    Generator g = make_generator(m, method, longest, n);
    fprintf(stderr, "memory: %s to generate %zu answers together\n", size_text(bytes_of(&g.run)), n);
    return g;
}

// Answers every sample that has a prompt, which never holds the answer, and scores what comes.
static Scores score_answers(Generator *g, const ChatFormat *f, const Options *o, const Dataset *set, FILE *out,
                            const char **example) {
    Scores scores = {0};
    Question *q = alloc(g->n_sequences, sizeof *q);
    g->n_answers = 0;
    for (size_t i = 0, n; i < set->n; ) {
        for (n = 0; i < set->n && n < g->n_sequences; i++)
            if (set->samples[i].prompt_n) q[n++] = (Question){ .sample = &set->samples[i] };
        answer_together(g, f, o, q, n);
        for (size_t k = 0; k < n; k++) score_answer(&scores, &q[k], f, out, example), free(q[k].answer.ids);
        progress(false, "answers to %zu of %zu samples", i, set->n);
    }
    free(q);
    return scores;
}

static double mean_score(const Scores *s, Metric m) { return s->n ? s->sum[m] / (double)s->n : 0; }

static void print_scores(FILE *out, const Scores *s) {
    for (Metric k = 0; k < METRICS; k++)
        fprintf(out, "%-16s %10.4f  %s\n", metrics[k].name, mean_score(s, k), metrics[k].meaning);
}

static char *score_line(const Scores *s) {
    Text t = {0};
    for (Metric k = 0; k < METRICS; k++) text_print(&t, "%s%s %.2f", k ? ", " : "", metrics[k].name, mean_score(s, k));
    return t.s;
}

// ==== 10  Training ===============================================================================================
// The loop: draw samples, sum their gradients, clip, step, log; a number that is not finite ends the run. A step takes
// up to per_device_train_batch_size x gradient_accumulation_steps samples in the epoch's order, and the old ones that
// --replay adds; its loss is the mean over all its targets, however it is cut into batches.

// What this section takes of later ones: adapters (11), curves (15), settings (16).

// A model as the command line names it: a model folder, or an adapter folder with its base.
typedef struct { Model *model; const Method *method; const char *folder, *adapter; } Opened;    // folder: the base's

static Opened open_model(const char *path, Options *o);                     // by its path
static void start_method(const Opened *m, uint64_t seed, bool trains);      // gives what trains its memory
static void read_adapter_tensors(const char *folder, Model *m, const Method *method);   // into what trains
static void check_fingerprint(const Opened *m, const ChatFormat *f, const Options *o);  // fails on another base
static const char *fingerprint_of(const Model *m, const ChatFormat *f);     // of base, tokenizer and layout
static StoredTensor stored_as(const Tensor *t, Dtype dtype, const void *data);      // how a tensor lies in a file
static void write_reals(const char *path, const StoredTensor *s, size_t n, const char *metadata);   // a tensor file
static void save_adapter(const char *folder, const Model *m, const Method *method, const Options *o, const char *base);
static void draw_losses(const char *folder);                                // loss.svg, of the log there
static const char *settings_of(const Options *o);                           // all of a run as "name=value" lines
static void name_idle_options(const Options *o, const Method *method);      // those that were set, but are another's
static void restore_settings(Options *o, const char *lines, const char *folder);        // those that were not given
static void use_precision(const Options *o);                                // of products, for all that follows
#define NOT_SET "(none)"                                                    // the value of an option that has none
static const char *option_text(const Options *o, const char *option);       // its value, as it can be given
// sets it unless the user gave another value (with `free` that stays); returns what is wrong, or NULL
static const char *fix_option(Options *o, const char *option, const char *value, bool free);

// A run that is under way ends when its step is done once it was asked to (13.2).
static volatile sig_atomic_t under_way, stop_signal;
static const char *worth_keeping;   // what is unfinished (13.1), but whole enough to get its name should the run fail

// ---- 10.1 One step -----------------------------------------------------------------------------------------------

// The gradients of a step on the chosen samples, in batches of batch_size; returns the mean loss over their targets.
static double accumulate_samples(Run *r, const Dataset *set, const size_t *chosen, size_t n, size_t batch_size,
                                 const Options *o, int64_t step) {
    size_t targets = 0, n_batches = 0;
    uint64_t key = rng_key(rng_key((uint64_t)o->seed, KEY_STEP), (uint64_t)step);
    Batch *batches = alloc(n, sizeof *batches);
    for (size_t i = 0; i < n; i++) targets += set->samples[chosen[i]].n_targets;
    for (size_t i = 0; i < n; i += batch_size)
        batches[n_batches++] = make_batch(set, chosen + i, min_size(batch_size, n - i), key, i);
    double loss = accumulate(r, batches, n_batches, targets, o->label_smoothing_factor);
    for (size_t i = 0; i < n_batches; i++) free_batch(&batches[i]);
    free(batches);
    return loss;
}

// The place of the first number of a tensor, or of it in its file, that is not finite; t->n when all are finite.
static size_t bad_number(const Tensor *t, bool in_file) {
    enum { CHUNK = 1 << 16 };
    Dtype dtype = in_file ? t->file_dtype : t->dtype;
    const char *data = in_file ? memory_mapped(t->file_data, dtype_bytes(dtype, t->n)) : t->data;
    real *numbers = device_take(CHUNK, sizeof *numbers, "a check");
    size_t at = 0;
    while (at < t->n) {
        size_t n = min_size(CHUNK, t->n - at), good;
        widen_weight(numbers, (Weight){ data, dtype, at, t->scales }, n);
        at += good = first_not_finite(numbers, n);
        if (good < n) break;
    }
    memory_give(numbers);
    return at;
}

static void refuse_bad(const Tensor *t, bool in_file, const char *head, const char *why) {
    size_t bad = bad_number(t, in_file);
    if (bad < t->n) fail("%s: '%s' has a number that is not finite, at %zu: %s", head, t->name, bad, why);
}

// Ends the run with the reason, after so many steps: a weight of the base, a trained one, a gradient, or divergence.
__attribute__((noreturn)) static void stop_not_finite(const Model *m, const char *head, int64_t steps) {
    for (size_t i = 0; i < m->n_tensors; i++) refuse_bad(m->tensors[i], true, head, "damaged file, download it again");
    const char *why = steps ? "training diverged, lower --learning_rate" : "the adapter's file is damaged";
    for (size_t i = 0; i < m->n_trained; i++) refuse_bad(m->trained[i], false, head, why);
    for (Tensor **t = m->trained, **end = t + m->n_trained; t < end; t++)
        if (first_not_finite((*t)->grad, (*t)->n) < (*t)->n)
            fail("%s: the gradient of '%s' is the first that is not finite; lower --learning_rate", head, (*t)->name);
    fail("%s: the loss is not finite; lower --learning_rate", head);
}

// The mean loss over the targets of a data set, without dropout or smoothing.
static double evaluate(Run *r, const Dataset *set, size_t batch_size) {
    double sum = 0;
    for (size_t i = 0; i < set->n; i += batch_size) {
        Batch b = make_batch(set, NULL, min_size(batch_size, set->n - i), 0, i);
        sum += forward_loss(r, &b);
        free_batch(&b);
    }
    return sum / (double)set->n_targets;
}

// ---- 10.2 State, data and log of a run ---------------------------------------------------------------------------

// What a run must remember besides weights and moments; a checkpoint holds each under its name. All are double (exact
// for whole numbers to 2^53), so one loop does them all. Losses of validation: best_metric, at best_step (0: before
// training), base_loss before training, lowest of all, eval_loss the last; worse_since: how many in a row were no
// better. Losses of training: first_loss, of a few samples before it; last_loss, the mean in the last line of the log;
// train_loss, that at the last validation; line_sum and eval_sum: of the steps since these two.
#define STATE(EACH) EACH(step) EACH(tokens) EACH(best_step) EACH(best_metric) EACH(worse_since) EACH(first_loss) \
    EACH(eval_loss) EACH(last_loss) EACH(base_loss) EACH(saved_step) EACH(line_sum) EACH(line_steps) EACH(eval_sum) \
    EACH(eval_steps) EACH(train_loss) EACH(lowest)
#define STATE_NAME(name) #name,
#define STATE_NUMBER(name) double name;
static const char *const state_names[] = { STATE(STATE_NAME) };
typedef union { struct { STATE(STATE_NUMBER) }; double numbers[COUNT(state_names)]; } RunState;

typedef struct { size_t *places; uint64_t epoch; } Order;

typedef struct {
    Opened base;
    const Options *o;
    const char *from;                   // the checkpoint that it goes on from; NULL: it begins
    TensorSet stored;                   // that one's optimizer.safetensors
    bool saved_whole;                   // the last one written holds the optimizer's state
    Dataset train, validation, probe;   // train: n_new samples, and behind them those to replay
    Dataset asked;                      // the validation samples that are answered, as many as the official script asks
    Order order, old_order;             // of the new ones and of those to replay
    Run run;
    RunState state;
    ChatFormat format;
    Generator answers;                  // with predict_with_generate
    Scores scores;                      // of the last validation
    double pace_sum, pace_steps;        // of the seconds that a token took in each step
    double mean_norm, first_tokens;     // running mean of the gradient norm; tokens seen before this run went on
    FILE *log;
    const char *log_path;
    Text history;                   // lines of log.jsonl up to the checkpoint that the run goes on from
    int64_t steps, steps_per_epoch, first_step, saves_after;        // saves_after: by worth_steps
    size_t batch_size, samples_per_step, n_new;
    double replay_ratio, tokens_logged, began, logged_at, draw_at, took, validating;
} Trainer;

// Time and disk that a run will take (15.2), in words.
static const char *time_text(double s);                     // "2:05:00"
static char *time_plan(Trainer *t);                         // how long it will run, by a measurement
static char *disk_plan(const Trainer *t);                   // what checkpoints will take; ends the program without room
static size_t disk_left(const char *folder);                // bytes free where it lies; SIZE_MAX: nobody knows

// The order of n samples in an epoch, which is kept until another epoch is asked for.
static const size_t *order_of(Order *o, size_t n, uint64_t seed, uint64_t epoch) {
    if (!o->places || o->epoch != epoch) free(o->places), *o = (Order){ epoch_order(n, seed, epoch), epoch };
    return o->places;
}

// Puts the samples of --replay FILE:RATIO behind the new ones.
static void read_replay(Trainer *t, const char *replay) {
    const char *colon = strrchr(replay, ':');
    char *end = NULL;
    t->replay_ratio = colon ? strtod(colon + 1, &end) : 0;
    if (!(t->replay_ratio > 0 && t->replay_ratio <= 1000) || *end)
        fail_usage("--replay wants FILE:RATIO with a ratio above 0, up to 1000, not '%s'", replay);
    Dataset old = read_data_file(strf("%.*s", (int)(colon - replay), replay), &t->format, t->o, true);
    for (size_t i = 0; i < old.n; i++) dataset_add(&t->train, old.samples[i]);
    fprintf(stderr, "replay: %zu samples, %g for each new one\n", old.n, t->replay_ratio);
    free(old.samples);
}

// The samples of a step: the next of the epoch's order, and the old ones whose turn it is. Old sample number j of the
// whole run is the one that epoch j / n of their own order has at place j % n: no step need remember earlier ones.
static size_t choose_samples(Trainer *t, int64_t step, size_t *chosen) {
    uint64_t seed = (uint64_t)t->o->seed, epoch = (uint64_t)(step / t->steps_per_epoch);
    size_t at = (size_t)(step % t->steps_per_epoch) * t->samples_per_step;
    size_t n = min_size(t->samples_per_step, t->n_new - at);
    size_t seen = (size_t)epoch * t->n_new + at, n_old = t->train.n - t->n_new;
    memcpy(chosen, order_of(&t->order, t->n_new, seed, epoch) + at, n * sizeof *chosen);
    size_t first = (size_t)(t->replay_ratio * (double)seen), end = (size_t)(t->replay_ratio * (double)(seen + n));
    for (size_t j = first; j < end; j++)
        chosen[n++] = t->n_new + order_of(&t->old_order, n_old, rng_key(seed, KEY_REPLAY), j / n_old)[j % n_old];
    return n;
}

// The file of training samples that DATA is, or holds.
static const char *training_file(const char *data) {
    const char *file = is_folder(data) ? data_file(data, train_files) : data;
    if (!file) fail("%s: holds neither train.json nor train.jsonl; name the file to learn", data);
    if (!exists(file)) fail("%s: there is no such file", file);
    return file;
}

// The file of validation samples; NULL: there is none.
static const char *validation_file(const char *data, const Options *o) {
    return o->eval_file || !is_folder(data) ? o->eval_file : data_file(data, dev_files);
}

// The default of val_size (a yaml has its own): none or a fifth of few samples, a twentieth of many; copies count once.
static void choose_split(Options *o, const Dataset *set) {
    size_t n = set->n - count_duplicates(set);
    size_t held_out = n < 12 ? 0 : min_size(max_size(n / 20, min_size(5, n / 5)), 500);
    if (!o->yaml && !GIVEN(o, val_size)) o->val_size = share_of(set, held_out, (uint64_t)o->seed);
}

// The rate of a method for n samples. It falls with the width (the published rates are for 4096). It is lower for few
// samples, which are learned soon, but not for a prefix, which must move by its own width.
static double default_rate(const Method *m, size_t hidden, size_t n) {
    double few = m->prefix_forward ? 1 : fmin(1, fmax(35, (double)n) / 100);
    return m->learning_rate * pow(4096 / (double)hidden, m->width_power > 0 ? m->width_power : 0.5) * few;
}

enum { BATCH_TOKENS = 1024 };       // about where products reach their full speed

// A step has STEP_SAMPLES samples, in batches of at most BATCH_TOKENS. Few samples get more epochs, until there are
// enough_steps or most_epochs; these end once validation is good enough or gets no better (README, "What a run gets").
static void choose_defaults(Options *o, const Method *method, const Config *c, const Dataset *train, bool validates) {
    enum { STEP_SAMPLES = 4 };
    const double enough_steps = 1400, least_epochs = 3, most_epochs = 60;
    if (!(o->learning_rate >= 0)) o->learning_rate = default_rate(method, c->hidden_size, train->n);
    if (o->yaml) return;
    int64_t *batch = &o->per_device_train_batch_size, *batches = &o->gradient_accumulation_steps;
    if (!GIVEN(o, per_device_train_batch_size) && !GIVEN(o, gradient_accumulation_steps))
        while (*batch < STEP_SAMPLES && 2 * (size_t)*batch * train->longest <= BATCH_TOKENS) *batch *= 2;
    if (!GIVEN(o, gradient_accumulation_steps)) *batches = *batch < STEP_SAMPLES ? STEP_SAMPLES / *batch : 1;
    double steps_per_epoch = ceil((double)train->n / (double)(*batch * *batches));
    double epochs = fmin(fmax(ceil(enough_steps / steps_per_epoch), least_epochs), most_epochs);
    bool undecided = !GIVEN(o, num_train_epochs) && o->max_steps <= 0;
    if (undecided) o->num_train_epochs = epochs;
    bool stops = undecided && validates && epochs > least_epochs && !GIVEN(o, early_stopping_patience);
    if (stops) o->early_stopping_patience = (int64_t)ceil(fmax(3, epochs / 6));
    if (stops && !o->replay && !GIVEN(o, early_stopping_loss)) o->early_stopping_loss = 0.03;
    if (!GIVEN(o, early_stopping_threshold)) o->early_stopping_threshold = 0.01;
    if (!GIVEN(o, load_best_model_at_end)) o->load_best_model_at_end = validates;
    if (!GIVEN(o, save_total_limit)) o->save_total_limit = 2;
}

static uint64_t hash_data(const Dataset *d) {
    uint64_t h = 0;
    for (const Sample *s = d->samples, *end = d->n ? s + d->n : s; s < end; s++)
        h = rng_key(rng_key(h, hash_bytes(s->ids, s->n * sizeof *s->ids)),
                    hash_bytes(s->labels, s->n * sizeof *s->labels));
    return h;
}

static void read_data(Trainer *t, const char *data, Options *o) {
    const ChatFormat *f = &t->format;
    const char *dev = validation_file(data, o);
    t->train = read_data_file(training_file(data), f, o, true);
    size_t copies = count_duplicates(&t->train);
    if (copies) fprintf(stderr, "note: %zu of %zu samples are copies of others\n", copies, t->train.n);
    if (dev) t->validation = read_data_file(dev, f, o, true);
    else choose_split(o, &t->train), t->validation = split_off(&t->train, o->val_size, (uint64_t)o->seed);
    if (dev && !t->from && GIVEN(o, val_size) && o->val_size > 0)
        fprintf(stderr, "note: --val_size holds nothing out, for %s validates\n", dev);
    choose_defaults(o, t->base.method, f->config, &t->train, t->validation.n > 0);
    print_summary(&t->train, t->validation.n, f);
    size_t known = count_shared(&t->validation, &t->train);
    if (known)
        fprintf(stderr, "warning: %zu of the %zu validation samples are training samples, too, so validation tells "
                "%s of others\n", known, t->validation.n, known < t->validation.n ? "less" : "nothing");
    if (o->probe) t->probe = read_data_file(o->probe, f, o, true);
    t->n_new = t->train.n;
    if (o->replay) read_replay(t, o->replay);
}

// Bytes of a checkpoint: what trains and its moments, and a little text.
static size_t checkpoint_bytes(const Model *m) {
    return times(count_parameters(m->trained, m->n_trained), sizeof(real) * (1 + m->n_moments)) + (1 << 18);
}

// Steps that take ten times as long as writing a checkpoint, by model and data alone: two cores compute some 500
// operations while a disk writes a byte, and a step has 4 for each weight and token (forward, and backward for x).
static int64_t worth_steps(const Trainer *t) {
    const Model *m = t->base.model;
    double tokens = (double)t->train.n_tokens / (double)t->train.n * (double)t->samples_per_step;
    double operations = 4 * tokens * (double)count_parameters(m->tensors, m->n_tensors);
    return (int64_t)ceil(10 * 500 * (double)checkpoint_bytes(m) / operations);
}

static void plan_steps(Trainer *t, Options *o) {
    t->batch_size = (size_t)o->per_device_train_batch_size;
    t->samples_per_step = min_size(t->batch_size * (size_t)o->gradient_accumulation_steps, t->n_new);
    t->steps_per_epoch = (int64_t)((t->n_new + t->samples_per_step - 1) / t->samples_per_step);
    t->steps = o->max_steps > 0 ? o->max_steps : (int64_t)ceil(o->num_train_epochs * (double)t->steps_per_epoch);
    if (t->steps < 1) t->steps = 1;
    t->saves_after = worth_steps(t);
    if (!o->logging_steps) o->logging_steps = t->steps_per_epoch;
    if (!o->yaml && !GIVEN(o, save_steps))
        o->save_steps = t->saves_after > t->steps / 10 ? t->saves_after : (t->steps + 9) / 10;
    if (!o->save_steps) o->save_steps = t->steps_per_epoch;
    if (warmup_of(o, t->steps) >= t->steps)
        fprintf(stderr, "warning: all %lld steps are warm-up, and the first has rate 0\n", (long long)t->steps);
}

static int64_t eval_every(const Trainer *t) { return t->o->eval_steps > 0 ? t->o->eval_steps : t->steps_per_epoch; }

// The loss that is shown and logged is the mean over the steps since the last line.
static void log_step(Trainer *t, int64_t step, double loss, double lr, double norm) {
    RunState *s = &t->state;
    double now = seconds(), speed = (s->tokens - t->tokens_logged) / fmax(now - t->logged_at, 1e-9);
    bool due = (step + 1) % t->o->logging_steps == 0 || step + 1 == t->steps;
    s->eval_sum += loss, s->eval_steps++, s->line_sum += loss, s->line_steps++;
    double mean = s->line_sum / s->line_steps;
    progress(due, "step %lld/%lld  loss %.4f  lr %.2g  norm %.2g  %.0f tokens/s  %s left", (long long)step + 1,
             (long long)t->steps, mean, lr, norm, speed,
             time_text((now - t->began) / (double)(step + 1 - t->first_step) * (double)(t->steps - step - 1)));
    if (!due) return;
    fprintf(t->log, "{\"step\": %lld, \"loss\": %.9g, \"learning_rate\": %.9g, \"grad_norm\": %.9g, \"tokens\": %.0f, "
            "\"tokens_per_s\": %.9g}\n", (long long)step + 1, mean, lr, norm, s->tokens, speed);
    if (fflush(t->log)) fail_writing(t->log_path);
    s->last_loss = mean, s->line_sum = s->line_steps = 0;
    t->tokens_logged = s->tokens;
    t->logged_at = now;
}

// At step 0, so that a broken start shows at once: the loss of pure guessing, and that of the model on a few samples.
static void print_start(Trainer *t) {
    Dataset few = { .samples = t->train.samples, .n = min_size(t->n_new, t->samples_per_step) };
    for (size_t i = 0; i < few.n; i++) few.n_targets += few.samples[i].n_targets;
    t->state.first_loss = evaluate(&t->run, &few, t->batch_size);
    fprintf(stderr, "step 0: ln(vocabulary) %.4f; the model before training has loss %.4f on the first %zu training "
            "samples\n", log((double)t->base.model->config.vocab_size), t->state.first_loss, few.n);
}

// Whether validation has been no better for as long as --early_stopping_patience waits.
static bool waited_enough(const Trainer *t) {
    return t->o->early_stopping_patience && t->state.worse_since >= (double)t->o->early_stopping_patience;
}

// That, or whether validation is as good as it need be, and training too (few samples may be right by chance).
static bool is_enough(const Trainer *t) {
    const RunState *s = &t->state;
    bool learned = s->best_step > 0 && fmax(s->best_metric, s->train_loss) <= t->o->early_stopping_loss;
    return learned || waited_enough(t);
}

// Whether a validation is the best so far, and what to say of it. Lower is better; for patience, lower by more than
// --early_stopping_threshold. With --early_stopping_loss a later one is better too if it is below that, or above the
// lowest by no more than a standard error (Breiman et al. 1984), taken to be that of n losses that spread as wide as
// their mean. The first candidate is the base, before step 1. A later one counts only if it may be saved, so that the
// best is always on the disk: as the first one, where the run saves anyway, or not too soon after the last; one that is
// clearly lower may take as much time to write as was trained since.
static bool judge_evaluation(Trainer *t, int64_t step, double loss, const char **words) {
    RunState *s = &t->state;
    double enough = t->o->early_stopping_loss, near = fmax(enough, s->lowest * (1 + 1 / sqrt((double)t->validation.n)));
    bool first = !step || !(s->lowest > 0), lower = first || loss < s->lowest - t->o->early_stopping_threshold;
    bool candidate = first || loss < s->best_metric || (enough > 0 && loss <= near && loss < s->base_loss);
    s->worse_since = lower || loss <= enough ? 0 : s->worse_since + 1;
    bool is_lowest = first || loss <= s->lowest;
    bool soon = (double)step - s->saved_step < (double)t->saves_after * (lower ? 0.1 : 1);
    bool anyway = step % t->o->save_steps == 0 || step == t->steps || waited_enough(t);
    bool due = !(s->best_step > 0) || anyway || !soon;
    *words = !step ? ""
           : !candidate ? (s->base_loss > 0 && loss >= s->base_loss ? "; no better than before training" : "")
           : !due ? strf("; %snot saved: the last save is too near", is_lowest ? "the lowest so far, " : "")
           : is_lowest ? "; the best so far" : strf("; the best that is saved (the lowest was %.4f)", s->lowest);
    if (candidate && due) s->best_step = (double)step, s->best_metric = loss;
    if (!step) s->base_loss = loss;
    s->lowest = first ? loss : fmin(s->lowest, loss);
    return candidate && due;
}

// Before training: one answer, and by its pace the time of a validation's. pace: seconds for a token among many.
static void answer_first(Trainer *t, double pace) {
    double start = seconds(), n = (double)t->answers.n_sequences, rounds = ceil((double)t->asked.n / n);
    Question q = { .sample = t->asked.samples };
    const char *example = NULL;
    if (!q.sample->prompt_n) return;
    answer_together(&t->answers, &t->format, t->o, &q, 1);
    double token = fmax(0, seconds() - start - pace * (double)q.sample->prompt_n) / (double)max_size(1, q.answer.n);
    double prompts = pace * (double)(t->asked.n * t->asked.longest);
    double answers = rounds * (double)t->o->max_new_tokens * (token + pace * (n - 1));
    score_answer(&(Scores){0}, &q, &t->format, NULL, &example);
    progress(true, "step 0/%lld  each validation will answer %zu samples, in up to about %s; the first:\n%s",
             (long long)t->steps, t->asked.n, time_text(prompts + answers), example);
    free(q.answer.ids);
}

// Validates, logs, and returns whether a checkpoint is to be written because this is the best step so far.
static bool log_evaluation(Trainer *t, int64_t step) {
    RunState *s = &t->state;
    double start = seconds(), loss = s->eval_loss = evaluate(&t->run, &t->validation, t->batch_size);
    const char *example = NULL, *words;
    if (!isfinite(loss) && !step) return false;         // step 1 will say why
    if (!isfinite(loss))
        stop_not_finite(t->base.model, strf("step %lld: loss %g in validation", (long long)step, loss), step);
    bool best = judge_evaluation(t, step, loss, &words);
    if (s->eval_steps > 0) s->train_loss = s->eval_sum / s->eval_steps;
    progress(true, "step %lld/%lld  validation loss %.4f%s%s", (long long)step, (long long)t->steps, loss,
             s->eval_steps > 0 ? strf(", training %.4f", s->train_loss) : "", words);
    fprintf(t->log, "{\"step\": %lld, \"eval_loss\": %.9g, \"eval_perplexity\": %.9g, \"tokens\": %.0f, \"best\": %s",
            (long long)step, loss, fmin(exp(loss), 1e300),      // JSON has no infinity
            s->tokens, best ? "true" : "false");
    if (t->answers.n_sequences && !step) answer_first(t, (seconds() - start) / (double)t->validation.n_tokens);
    if (t->answers.n_sequences && step) {
        bool first = !t->scores.n;
        t->scores = score_answers(&t->answers, &t->format, t->o, &t->asked, NULL, &example);
        for (Metric k = 0; k < METRICS; k++)
            fprintf(t->log, ", \"eval_%s\": %.9g", metrics[k].name, mean_score(&t->scores, k));
        if (first) print_scores(stderr, &t->scores);        // with what each means
        progress(true, "step %lld/%lld  %s; of %zu answers, the first:\n%s", (long long)step, (long long)t->steps,
                 score_line(&t->scores), t->scores.n, example ? example : "none");
    }
    fprintf(t->log, "}\n");
    if (fflush(t->log)) fail_writing(t->log_path);
    s->eval_sum = s->eval_steps = 0;
    double took = seconds() - start;
    t->logged_at += took, t->validating += took;        // the speed in a line is that of training alone
    return best && step;
}

// Draws loss.svg, at most every second, and so seldom that it takes no more than a fiftieth of the time.
static void draw_progress(Trainer *t) {
    double start = seconds();
    if (start < t->draw_at) return;
    draw_losses(t->o->output_dir);
    t->draw_at = seconds() + fmax(1, 50 * (seconds() - start));
}

// The steps of the checkpoints in a folder, the newest first.
static size_t list_checkpoints(const char *folder, size_t **steps) {
    size_t n = 0, capacity = 0;
    DIR *d = opendir(folder);
    *steps = NULL;
    for (struct dirent *e; d && (e = readdir(d)); ) {
        int end = 0;
        sscanf(e->d_name, "checkpoint-%*[0-9]%n", &end);
        if (!end || e->d_name[end]) continue;
        *steps = grow(*steps, &capacity, n + 1, sizeof **steps);
        (*steps)[n++] = strtoull(strchr(e->d_name, '-') + 1, NULL, 10);
    }
    if (d) closedir(d);
    if (n) qsort(*steps, n, sizeof **steps, by_size_down);
    return n;
}

// Ends the program where a run's folder is named instead of a checkpoint in it.
static void refuse_run(const char *folder) {
    size_t *steps;
    if (exists(strf("%s/config.json", folder)) || exists(strf("%s/adapter_config.json", folder))) return;
    if (list_checkpoints(folder, &steps))
        fail("%s: is a run; name %s%scheckpoint-%zu", folder, folder, ends_in(folder, "/") ? "" : "/", *steps);
    if (exists(strf("%s/run.json", folder))) fail("%s: is a run that has no checkpoint yet", folder);
}

static const char *checkpoint_folder(const Options *o, double step) {
    return strf("%s/checkpoint-%.0f", o->output_dir, step);
}

// It loses its name first, so that no checkpoint is ever seen half removed.
static void remove_checkpoint(const Options *o, size_t step) {
    const char *path = checkpoint_folder(o, (double)step), *gone = strf("%s" TEMPORARY, path);
    if (!rename(path, gone)) remove_tree(gone);
}

// Keeps the newest checkpoint of a run, the best, and the next newest until there are `keep`; removes the others.
static void remove_checkpoints(const Trainer *t, size_t keep) {
    size_t *steps, n = list_checkpoints(t->o->output_dir, &steps), others = 0;
    bool best = n && (double)*steps != t->state.best_step && exists(checkpoint_folder(t->o, t->state.best_step));
    for (size_t i = 1; i < n; i++)
        if ((double)steps[i] != t->state.best_step && ++others + 1 + best > keep) remove_checkpoint(t->o, steps[i]);
    free(steps);
}

// ---- 10.3 Checkpoints --------------------------------------------------------------------------------------------
// checkpoint-N is an adapter folder with all that a run needs to go on: optimizer.safetensors holds the moments and, as
// metadata, the state and the settings; trainer_state.json is Hugging Face's, with the log. The order of the data,
// dropout and the rate are functions of seed and step, so the run goes on with the same bits.

// The settings that may differ when a run goes on.
static const char may_change[] = "logging_steps,save_steps,save_total_limit,gradient_checkpointing,max_new_tokens,"
    "eval_file,probe,predict_with_generate,early_stopping_patience,early_stopping_threshold,early_stopping_loss,"
    "load_best_model_at_end,temperature,top_p,per_device_eval_batch_size";

// What a run is set to, trains and reads, as "key=value" lines; the same when it goes on, but for may_change.
static Text run_settings(const Trainer *t) {
    Text lines = {0};
    text_print(&lines, "%s", t->o->settings ? t->o->settings : "");
    text_print(&lines, "trained parameters=%zu\n", count_parameters(t->base.model->trained, t->base.model->n_trained));
    text_print(&lines, "hash of the training data=%016llx\n", (unsigned long long)hash_data(&t->train));
    text_print(&lines, "hash of the validation data=%016llx\n", (unsigned long long)hash_data(&t->validation));
    return lines;
}

// The moments by tensor name, s [n_moments x n_trained].
static StoredTensor *list_moments(const Model *m) {
    StoredTensor *s = alloc(times(m->n_moments, m->n_trained), sizeof *s);
    for (size_t i = 0; i < m->n_moments * m->n_trained; i++) {
        const Tensor *t = m->trained[i % m->n_trained];
        s[i] = stored_as(t, REAL, t->moments[i / m->n_trained]);
        s[i].name = strf("moment%zu.%s", i / m->n_trained + 1, t->name);
    }
    return s;
}

static void write_optimizer(const Trainer *t, const char *path) {
    const Model *m = t->base.model;
    Text metadata = {0}, lines = run_settings(t);
    StoredTensor *s = list_moments(m);
    for (size_t i = 0; i < COUNT(state_names); i++)
        text_print(&lines, "state.%s=%.17g\n", state_names[i], t->state.numbers[i]);
    for (char *rest = lines.s, *key; (key = strsep(&rest, "=")) && rest; ) {
        const char *value = strsep(&rest, "\n");
        text_print(&metadata, ",\"%s\":", key);
        text_json(&metadata, value, strlen(value));
    }
    write_reals(path, s, m->n_moments * m->n_trained, metadata.s);
    free(s), free(metadata.s), free(lines.s);
}

static void write_trainer_state(const Trainer *t, const char *path) {
    size_t n;
    const RunState *s = &t->state;
    const Options *o = t->o;
    char *log = read_file(t->log_path, &n);
    const char *folder = checkpoint_folder(o, s->best_step);
    Text out = {0}, best = {0};
    text_json(&best, folder, strlen(folder));
    text_print(&out, "{\n  \"best_metric\": %s,\n  \"best_model_checkpoint\": %s,\n  \"epoch\": %.9g,\n"
               "  \"eval_steps\": %lld,\n  \"global_step\": %.0f,\n  \"is_hyper_param_search\": false,\n"
               "  \"is_local_process_zero\": true,\n  \"is_world_process_zero\": true,\n  \"log_history\": [",
               s->best_step > 0 ? strf("%.9g", s->best_metric) : "null", s->best_step > 0 ? best.s : "null",
               s->step / (double)t->steps_per_epoch, (long long)eval_every(t), s->step);
    for (const char *p = log, *end; p && (end = strchr(p, '\n')); p = end + 1)
        text_print(&out, "%s\n    %.*s", p > log ? "," : "", (int)(end - p), p);
    text_print(&out, "\n  ],\n  \"logging_steps\": %lld,\n  \"max_steps\": %lld,\n  \"num_train_epochs\": %.0f,\n"
               "  \"save_steps\": %lld,\n  \"total_flos\": 0,\n  \"trial_name\": null,\n  \"trial_params\": null\n}\n",
               (long long)o->logging_steps, (long long)t->steps, ceil((double)t->steps / (double)t->steps_per_epoch),
               (long long)o->save_steps);
    write_file(path, out.s, out.n);
    free(out.s), free(best.s), free(log);
}

// Where the disk has no room for the whole, a last one holds the adapter alone; another is left out, with a warning.
static void save_checkpoint(Trainer *t, bool last) {
    const Options *o = t->o;
    size_t left = disk_left(o->output_dir), needed = checkpoint_bytes(t->base.model);
    bool whole = t->saved_whole = left > needed;
    const char *lost = last ? "the adapter is saved without the optimizer's state, so nothing can go on from it"
                            : "no checkpoint is saved";
    if (!whole)
        progress(true, "warning: step %.0f: %s, for %s are free in %s and a checkpoint takes %s", t->state.step, lost,
                 size_text(left), o->output_dir, size_text(needed));
    if (!whole && !last) return;
    const char *temporary = begin_output(checkpoint_folder(o, t->state.step));
    remove_tree(temporary);
    if (mkdir(temporary, 0777))     // not begin_folder: a new output_dir would lack the run's log
        fail("%s: %s", o->output_dir, errno == ENOENT ? "the folder has vanished, and the run in it" : strerror(errno));
    t->state.saved_step = t->state.step;
    save_adapter(temporary, t->base.model, t->base.method, o, t->base.folder);
    write_trainer_state(t, strf("%s/trainer_state.json", temporary));
    if (last) worth_keeping = temporary;        // should the disk fill up now
    if (whole) write_optimizer(t, strf("%s/optimizer.safetensors", temporary));
    finish_output(temporary);
    worth_keeping = NULL;
    if (o->save_total_limit > 0) remove_checkpoints(t, (size_t)o->save_total_limit);
}

// The checkpoint to go on from, as --resume_from_checkpoint names it; NULL: begin.
static const char *choose_checkpoint(const Options *o) {
    static const char *const parts[] = { "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors",
                                         "trainer_state.json" };
    const char *wanted = o->resume_from_checkpoint, *folder = wanted;
    if (!wanted || !strcasecmp(wanted, "no") || !strcasecmp(wanted, "false")) return NULL;
    bool newest = !strcasecmp(wanted, "yes") || !strcasecmp(wanted, "true");
    size_t *steps, n = newest ? list_checkpoints(o->output_dir, &steps) : 0;
    if (newest && !n) fprintf(stderr, "%s: holds no checkpoint: training begins at step 1\n", o->output_dir);
    if (newest && !n) return NULL;
    if (newest) folder = checkpoint_folder(o, (double)steps[0]);
    else if (!wanted[strspn(wanted, "0123456789")]) folder = strf("%s/checkpoint-%s", o->output_dir, wanted);
    refuse_run(folder);
    if (!is_folder(folder)) fail("%s: there is no such checkpoint; \"yes\" names the newest in --output_dir", folder);
    for (size_t k = 0; k < COUNT(parts); k++)
        if (!exists(strf("%s/%s", folder, parts[k])))
            fail("%s: no run can go on from it: it has no %s%s", folder, parts[k], !newest ? "" :
                 "; name another (--resume_from_checkpoint STEP), or another --output_dir to begin in");
    return folder;
}

static void compare_settings(const Trainer *t) {
    Text lines = run_settings(t);
    for (char *rest = lines.s, *key; (key = strsep(&rest, "=")) && rest; ) {
        const char *value = strsep(&rest, "\n"), *was = line_value(t->stored.metadata.s, key);
        if (list_has(may_change, key) || !was || !strcmp(was, value)) continue;
        const char *differs = strf("%s was %s, now it is %s", key, was, value);
        if (!t->o->force && strcmp(key, "precision"))       // which is named, no more
            fail("%s: %s; a run goes on as it began, --force overrides", t->from, differs);
        fprintf(stderr, "warning: %s\n", differs);
    }
    free(lines.s);
}

static Text read_history(const char *path) {
    Text lines = {0};
    JsonReader r = json_open_file(path);
    const Json *log = json_get(json_only(&r), "log_history");
    for (const Json *j = json_is(log, JSON_ARRAY) ? log->first : NULL; j; j = j->next)
        text_print(&lines, "%.*s}\n", (int)strcspn(r.source + j->at, "}"), r.source + j->at);
    json_close(&r);
    return lines;
}

static void resume(Trainer *t) {
    Model *m = t->base.model;
    compare_settings(t);
    read_adapter_tensors(t->from, m, t->base.method);
    StoredTensor *wanted = list_moments(m);
    for (size_t i = 0; i < m->n_moments * m->n_trained; i++) {
        const StoredTensor *s = find_tensor(&t->stored, wanted[i].name);
        if (!s || s->dtype > BF16 || s->n != wanted[i].n)
            fail("%s: its optimizer.safetensors has no '%s' of %zu numbers", t->from, wanted[i].name, wanted[i].n);
        widen_stored(m->trained[i % m->n_trained]->moments[i / m->n_trained], s);
    }
    for (size_t i = 0; i < COUNT(state_names); i++) {
        const char *value = line_value(t->stored.metadata.s, strf("state.%s", state_names[i]));
        if (value) t->state.numbers[i] = strtod(value, NULL);
    }
    t->history = read_history(strf("%s/trainer_state.json", t->from));
    free(wanted);
}

// A step that is several times slower than those before, token for token, gets a line, once.
static void tell_if_slow(Trainer *t, int64_t step, double took, double tokens) {
    double usual = t->pace_steps < 5 ? INFINITY : t->pace_sum / t->pace_steps, pace = took / tokens;
    t->pace_sum += pace, t->pace_steps++;
    if (took < 0.1 || !(pace > 4 * usual)) return;
    progress(true, "step %lld took %s, %.0f times as long as those before: other programs use this machine, or memory "
             "is short", (long long)step + 1, time_text(took), pace / usual);
    t->pace_sum = INFINITY;         // never again
}

// What a step came to, in words, with the numbers of its samples in their file.
static const char *step_text(const Trainer *t, const size_t *chosen, size_t n, int64_t step, double loss, double norm) {
    Text text = {0};
    text_print(&text, "step %lld: loss %g, gradient norm %g, with samples", (long long)step + 1, loss, norm);
    for (size_t i = 0; i < n; i++) text_print(&text, "%s %zu", i ? "," : "", t->train.samples[chosen[i]].number);
    return text.s;
}

static void train_step(Trainer *t, int64_t step, const size_t *chosen, size_t n) {
    const Options *o = t->o;
    Model *m = t->base.model;
    double began = seconds(), tokens = t->state.tokens;
    double lr = scheduled_rate(o->lr_scheduler_type, o->learning_rate, step, warmup_of(o, t->steps), t->steps);
    double loss = accumulate_samples(&t->run, &t->train, chosen, n, t->batch_size, o, step);
    double norm = clip_gradients(m, o->max_grad_norm);
    if (!isfinite(loss) || !isfinite(norm))
        stop_not_finite(m, step_text(t, chosen, n, step, loss, norm), step);
    if (t->mean_norm > 0 && norm > 10 * t->mean_norm)
        progress(true, "step %lld: the gradient norm %.3g is %.0f times its mean%s", (long long)step + 1, norm,
                 norm / t->mean_norm, o->max_grad_norm > 0 ? "; it was cut to --max_grad_norm" : "");
    t->mean_norm = t->mean_norm > 0 ? 0.9 * t->mean_norm + 0.1 * norm : norm;
    optimizer_step(m, o, lr, step + 1);
    for (size_t i = 0; i < n; i++) t->state.tokens += (double)t->train.samples[chosen[i]].n;
    tell_if_slow(t, step, seconds() - began, t->state.tokens - tokens);
    log_step(t, step, loss, lr, norm);
}

// Weights that give no finite loss are not worth a checkpoint: what was saved before them stays the last.
static void check_weights(Trainer *t, const size_t *chosen, size_t n) {
    Batch b = make_batch(&t->train, chosen, n, 0, 0);
    double loss = forward_loss(&t->run, &b);
    const char *head = strf("step %.0f: loss %g after it", t->state.step, loss);
    if (!isfinite(loss)) stop_not_finite(t->base.model, head, (int64_t)t->state.step);
    free_batch(&b);
}

static void train_loop(Trainer *t) {
    const Options *o = t->o;
    size_t *chosen = alloc((size_t)((1 + t->replay_ratio) * (double)t->samples_per_step) + 2, sizeof *chosen);
    bool enough = is_enough(t);
    if (!(t->state.step > 0)) print_start(t);
    if (!(t->state.step > 0) && t->validation.n) log_evaluation(t, 0);
    t->took = t->validating;        // of step 0, before it began
    share_cores(t->state.tokens);
    t->began = t->logged_at = seconds(), t->first_tokens = t->tokens_logged = t->state.tokens;
    for (int64_t step = t->first_step = (int64_t)t->state.step; step < t->steps && !enough; step++) {
        size_t n = choose_samples(t, step, chosen);
        train_step(t, step, chosen, n);
        t->state.step = (double)(step + 1);
        share_cores(t->state.tokens);
        bool last = step + 1 == t->steps, stops = stop_signal || step + 1 == o->stop_at_step;
        bool validates = t->validation.n && ((step + 1) % eval_every(t) == 0 || last);
        bool best = validates && log_evaluation(t, step + 1);
        enough = is_enough(t);
        if ((step + 1) % o->save_steps == 0 || last || stops || best || enough) {
            check_weights(t, chosen, min_size(t->batch_size, n));
            save_checkpoint(t, last || stops || enough);
        }
        draw_progress(t);
        if (stops) break;
    }
    RunState *s = &t->state;
    if (s->line_steps > 0) s->last_loss = s->line_sum / s->line_steps;      // it ends between two lines of the log
    t->took += seconds() - t->began;
    free(chosen);
}

// ---- 10.4 From beginning to end ----------------------------------------------------------------------------------

// What is being tuned must not lie where --force removes checkpoints.
static const char *outside_of(const char *path, const char *output_dir) {
    const char *real_path = realpath(path, NULL), *output = realpath(output_dir, NULL);
    if (!real_path || !output) fail("%s: %s", real_path ? output_dir : path, strerror(errno));
    size_t n = strlen(output);
    if (!strncmp(real_path, output, n) && !strncmp(real_path + n, "/checkpoint-", 12))
        fail("%s: lies in --output_dir, whose checkpoints --force removes; choose another --output_dir", path);
    return real_path;
}

// A folder of a model or of data is none for a run; what --force removes there would not be its own.
static void check_output_dir(const char *folder) {
    static const char *const endings[] = { ".safetensors", ".bin", ".json", ".jsonl" };
    DIR *d = exists(strf("%s/run.json", folder)) ? NULL : opendir(folder);
    for (struct dirent *e; d && (e = readdir(d)); )
        for (size_t i = 0; i < COUNT(endings); i++)
            if (ends_in(e->d_name, endings[i]) && strcmp(e->d_name, "log.jsonl"))
                fail("%s: holds %s and is no run; choose another --output_dir", folder, e->d_name);
    if (d) closedir(d);
}

// The log's place; one that is there and no run's is the user's, and gets another name.
static const char *place_log(const char *folder) {
    const char *log = strf("%s/log.jsonl", folder), *other = log;
    if (exists(strf("%s/run.json", folder)) || !exists(log)) return log;
    for (int n = 1; exists(other); n++) other = strf("%s.%d", log, n);
    if (rename(log, other)) fail("%s: cannot be given another name: %s", log, strerror(errno));
    fprintf(stderr, "%s: was there before, and is now %s\n", log, other);
    return log;
}

// Opens the log, with the lines up to the checkpoint that the run goes on from. What a run that was killed left
// half-written is removed, and with --force the checkpoints of later steps, or all when it begins.
static void open_log(Trainer *t) {
    const char *folder = t->o->output_dir;
    remove_inside(folder, TEMPORARY);
    const char *resumed = t->from ? realpath(t->from, NULL) : NULL;
    const char *inside = realpath(checkpoint_folder(t->o, t->state.step), NULL);
    bool goes_on = resumed && inside && !strcmp(resumed, inside);
    size_t *steps, n = list_checkpoints(folder, &steps), later = 0;     // they are the first
    while (later < n && (!goes_on || (double)steps[later] > t->state.step)) later++;
    if (later && !t->o->force)
        fail("%s: holds %s; choose another --output_dir, %sor --force to remove them", folder,
             goes_on ? strf("checkpoints past step %.0f", t->state.step) : "the checkpoints of another run",
             goes_on || t->from ? "" : "--resume_from_checkpoint yes to go on with it, ");
    t->base.folder = outside_of(t->base.folder, folder);
    if (t->base.adapter) outside_of(t->base.adapter, folder);
    for (size_t i = 0; i < later; i++) remove_checkpoint(t->o, steps[i]);
    if (list_checkpoints(folder, &steps) > n - later)
        fail("%s: its checkpoints cannot be removed; choose another --output_dir", folder);
    t->log_path = place_log(folder);
    write_file(t->log_path, t->history.s, t->history.n);
    t->log = fopen(t->log_path, "ae");
    if (!t->log) fail("%s: cannot be written: %s", t->log_path, strerror(errno));
}

// A checkpoint, opened with default settings, as a user will.
static Opened open_saved(const Trainer *t, const char *folder) {
    Options fresh = *t->o->defaults;
    fresh.defaults = t->o->defaults, fresh.base = t->base.folder;
    Opened saved = open_model(folder, &fresh);
    start_method(&saved, 0, false);
    return saved;
}

// The logits of T fixed random ids, [T,V]; *loss (may be NULL): the mean loss of each from those before it.
static real *fixed_logits(const Opened *o, RunKind kind, size_t T, double *loss) {
    Batch b = fixed_batch(o->model, T);
    Run r = describe_run(o->model, o->method, kind, T, T);
    take_run(&r);
    real *logits = all_logits(&r, &b);
    if (loss) *loss = forward_loss(&r, &b) / (double)(T - 1);
    give_run(&r), free_batch(&b);
    return logits;
}

// What was saved last is read back, and must give the logits of the model in memory, whose place it takes.
static void verify_saved(Trainer *t) {
    const char *folder = checkpoint_folder(t->o, t->state.step);
    Batch b = fixed_batch(t->base.model, min_size(FIXED_TOKENS, t->run.max_T));
    real *want = all_logits(&t->run, &b);
    give_run(&t->run), memory_give(t->base.model->trainables.block);
    if (t->answers.n_sequences) give_generator(&t->answers);
    Opened again = open_saved(t, folder);
    real *got = fixed_logits(&again, t->run.kind, b.T, NULL);
    if (memcmp(got, want, b.T * again.model->config.vocab_size * sizeof *got))
        fail("%s: read back, it gives other logits than the model that was saved: the disk is broken", folder);
    progress(true, "read back: %s gives the logits of the model in memory, bit for bit", folder);
    memory_give(again.model->trainables.block);
    free_batch(&b), free(want), free(got);
}

static double loss_on(const Opened *m, const Dataset *set, size_t batch_size) {
    size_t T = most_tokens(set, batch_size);
    Run r = describe_run(m->model, m->method, FORWARD_ONLY, T, T);
    take_run(&r);
    double loss = evaluate(&r, set, batch_size);
    give_run(&r);
    return loss;
}

// What the model forgot: its loss on the probe and its answers to it, of the base, read once more, and of the result.
static void print_probe(const Trainer *t, const char *result) {
    Opened both[] = { { .model = load_model(t->base.folder) }, open_saved(t, result) };
    double before = loss_on(&both[0], &t->probe, 1), after = loss_on(&both[1], &t->probe, 1);
    printf("probe       %s: loss %.4f before, %.4f after\n", t->o->probe, before, after);
    for (int late = 0; t->answers.n_sequences && late < 2; late++) {
        const char *example = "";
        Generator g = make_answerer(both[late].model, both[late].method, &t->probe, t->o);
        Scores s = score_answers(&g, &t->format, t->o, &t->probe, NULL, &example);
        printf("            answers %s: %s\n", late ? "after" : "before", score_line(&s));
        give_generator(&g);
    }
}

static void print_result(const Trainer *t) {
    const Model *m = t->base.model;
    const RunState *s = &t->state;
    double spent = t->took - t->validating;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("trained     %s: %zu parameters; the base has %zu\n", t->base.method->name,
           count_parameters(m->trained, m->n_trained), count_parameters(m->tensors, m->n_tensors));
    printf("data        %zu samples%s, %.0f steps = %.3g epochs, %.0f tokens\n", t->n_new,
           t->n_new < t->train.n ? strf(" and %zu to replay", t->train.n - t->n_new) : "", s->step,
           s->step / (double)t->steps_per_epoch, s->tokens);
    printf("loss        %.4f before training, %.4f at its end\n", s->first_loss, s->last_loss);
    if (t->validation.n)
        printf("validation  best %.4f at step %.0f, last %.4f, before training %s, on %zu samples\n", s->best_metric,
               s->best_step, s->eval_loss, s->base_loss > 0 ? strf("%.4f", s->base_loss) : "unknown", t->validation.n);
    if (t->scores.n) printf("answers     %s, in the last validation\n", score_line(&t->scores));
    printf("memory      %s at most, with what was read of the base\n", size_text((size_t)used.ru_maxrss * 1024));
    printf("time        %s of training, %.0f tokens/s; %s of validation\n", time_text(spent),
           (s->tokens - t->first_tokens) / fmax(spent, 1e-9), time_text(t->validating));
}

// What to do next: says when a run did no good, and what a run without replay may have cost.
static void print_advice(const Trainer *t, const char *result) {
    const RunState *s = &t->state;
    double rate = t->o->learning_rate;
    bool learned = s->last_loss < 0.9 * s->first_loss || s->first_loss < 0.1;
    bool worse = s->last_loss > 1.15 * s->first_loss;   // a little may come from other samples
    bool vain = s->base_loss > 0 && !(s->best_step > 0);
    if (vain) progress(true, "the result is NO BETTER than before training: validation never fell below %.4f",
                       s->base_loss);
    if (worse) progress(true, "training made the loss higher: leave --learning_rate out, or take less than %.3g", rate);
    else if (!learned) progress(true, "little was learned: %stake --learning_rate %.3g, or more epochs",
                                GIVEN(t->o, learning_rate) ? "leave --learning_rate out, or " : "", 3 * rate);
    else if (vain) progress(true, "learned by heart: take --learning_rate %.3g, or more varied samples", rate / 3);
    if (t->n_new == t->train.n)
        progress(true, "nothing old was replayed, so the model may have forgotten what it knew; --replay FILE:1 keeps "
                 "most of it (README, Replay)");
    const char *quote = strpbrk(result, " '\"$&();*?") ? "'" : "";
    progress(true, "done in %s; the result is %s; try: %s chat %s%s%s", time_text(seconds() - t->began), result,
             program_name, quote, result, quote);
}

// The settings that differ from the defaults, without those that other lines of a run's start show (`told`).
static void print_settings(const Options *o) {
    static const char told[] = "method,learning_rate,num_train_epochs,per_device_train_batch_size,"
                               "gradient_accumulation_steps,val_size,early_stopping_patience,load_best_model_at_end,"
                               "save_total_limit,save_steps,early_stopping_threshold,early_stopping_loss";
    const char *usual = settings_of(o->defaults);
    Text line = {0};
    for (char *rest = strf("%s", o->settings), *key; (key = strsep(&rest, "=")) && rest; ) {
        const char *value = strsep(&rest, "\n"), *was = line_value(usual, key);
        if (!list_has(told, key) && was && strcmp(was, value))
            text_print(&line, "%s%s=%s", line.n ? ", " : "settings: ", key, value);
    }
    if (line.n) fprintf(stderr, "%s\n", line.s);
    free(line.s);
}

// Chooses model, data and steps, and tells the user of them, before any memory is taken.
static void prepare(Trainer *t, const char *data, Options *o) {
    Model *m = t->base.model;
    const ChatFormat *f = &t->format;
    t->format = choose_format(o, &m->config, t->base.folder);
    check_fingerprint(&t->base, f, o);
    m->fingerprint = fingerprint_of(m, f);
    if (!t->base.method) t->base.method = find_method(o->method), t->base.method->setup(m, o);
    const char *official = mask_words(o, f);
    if (official) fprintf(stderr, "labels as the official script sets them: %s\n", official);
    fprintf(stderr, "model: %s, %zu parameters; method %s trains %zu; chat layout %s, %s\n", t->base.folder,
            count_parameters(m->tensors, m->n_tensors), t->base.method->name,
            count_parameters(m->trained, m->n_trained), f->layout ? f->layout->name : "none",
            f->tokenizer ? f->tokenizer->file : "no tokenizer");
    read_data(t, data, o);
    if ((o->early_stopping_patience || o->load_best_model_at_end || o->predict_with_generate) && !t->validation.n)
        fprintf(stderr, "warning: no samples are held out (--val_size), so no early stop, no best step, no answers\n");
    if (o->predict_with_generate && !(f->tokenizer && f->layout))
        fprintf(stderr, "warning: no answers are generated: %s\n", f->why);
    m->n_moments = find_optimizer(o->optim)->n_moments;
    plan_steps(t, o);
    o->settings = settings_of(o);
    print_settings(o);
    name_idle_options(o, t->base.method);
    bool may_stop = o->early_stopping_patience && t->validation.n;
    fprintf(stderr, "training: %lld steps of %zu samples (%lld at once) = %.3g epochs, learning rate %.3g%s\n",
            (long long)t->steps, t->samples_per_step, (long long)o->per_device_train_batch_size,
            (double)t->steps / (double)t->steps_per_epoch, o->learning_rate, !may_stop ? "" :
            strf("; stops after %lld validations that are no better", (long long)o->early_stopping_patience));
    double reach = o->learning_rate * (double)t->steps, needed = o->prefix_projection ? 0.5 : 5;
    if (m->n_prefix && strcmp(o->optim, "sgd") && reach < needed)       // what costs most by tests/report (5.4)
        fprintf(stderr, "warning: a prefix moves by about learning rate x steps = %.3g, and must by %g or so: raise "
                "--learning_rate (1e-2 to 1e-1, with --prefix_projection 1e-3 to 1e-2)\n", reach, needed);
}

// Memory, the checkpoint that the run goes on from, and its files.
static void begin_run(Trainer *t) {
    const Options *o = t->o;
    Model *m = t->base.model;
    bool replays = t->n_new < t->train.n;       // then a batch may hold a sample twice
    size_t T = max_size(replays ? times(t->batch_size, t->train.longest) : most_tokens(&t->train, t->batch_size),
                        t->validation.n ? most_tokens(&t->validation, t->batch_size) : 0);
    RunKind kind = plan_memory(m, t->base.method, o->gradient_checkpointing, T);
    start_method(&t->base, (uint64_t)o->seed, true);
    t->run = describe_run(m, t->base.method, kind, T, T);
    take_run(&t->run);
    t->asked = t->validation, t->asked.n = min_size(t->validation.n, 50);
    if (o->predict_with_generate && t->validation.n && t->format.tokenizer && t->format.layout)
        t->answers = make_answerer(m, t->base.method, &t->asked, o);
    const char *from = t->from;
    if (from) check_fingerprint(&(Opened){ .model = m, .folder = t->base.folder, .adapter = from }, &t->format, o);
    if (from) resume(t);
    open_log(t);
    if (from) fprintf(stderr, "goes on from %s, after step %.0f of %lld\n", from, t->state.step, (long long)t->steps);
    const char *disk = disk_plan(t);        // before any time is spent
    fprintf(stderr, "%sdisk: %s\n", from ? "" : strf("time: %s; ", time_plan(t)), disk);
    size_t trained = count_parameters(m->trained, m->n_trained), own = trainable_bytes(m, true) + bytes_of(&t->run);
    char *facts = strf("{\"method\": \"%s\", \"trainable\": %zu, \"memory\": \"%s\"}\n", t->base.method->name, trained,
                       size_text(own));
    write_file(strf("%s/run.json", o->output_dir), facts, strlen(facts));       // what `compare` shows beside the log
}

static void end_run(const Trainer *t) {
    const Options *o = t->o;
    const RunState *s = &t->state;
    bool early = (int64_t)s->step < t->steps;
    if (early && !is_enough(t))
        return progress(true, "stopped after step %.0f of %lld, which is saved%s", s->step, (long long)t->steps,
                        t->saved_whole ? "; to go on: the same command with --resume_from_checkpoint yes" : "");
    const char *result = checkpoint_folder(o, s->step), *best = checkpoint_folder(o, s->best_step);
    if (o->load_best_model_at_end && s->best_step > 0 && exists(best)) result = best;
    else if (o->load_best_model_at_end && s->best_step > 0)
        progress(true, "warning: the best step, %.0f, is not here: it lies where the run went on from, or the disk was "
                 "full", s->best_step);
    if (early && waited_enough(t))
        progress(true, "stopped early: %.0f validations in a row were not lower by more than %g; the lowest has %.4f, "
                 "the best saved %.4f, at step %.0f (--early_stopping_patience, --early_stopping_threshold)",
                 s->worse_since, o->early_stopping_threshold, s->lowest, s->best_metric, s->best_step);
    else if (early)
        progress(true, "stopped early: learned, the losses of validation, %.4f, and training, %.4f, are below %g "
                 "(--early_stopping_loss)", s->best_metric, s->train_loss, o->early_stopping_loss);
    print_result(t);
    if (o->probe) print_probe(t, result);
    print_advice(t, result);
}

// Returns the status to exit with: that of the signal which ended the run early, else 0.
static int train(const char *data, const char *model, Options *o) {
    check_output_dir(o->output_dir);
    lock_folder(o->output_dir);
    Trainer t = { .o = o, .from = choose_checkpoint(o) };
    if (t.from) read_tensor_file(&t.stored, strf("%s/optimizer.safetensors", t.from));
    if (t.from) restore_settings(o, t.stored.metadata.s, t.from);
    use_precision(o);
    t.base = open_model(model, o);
    prepare(&t, data, o);
    begin_run(&t);
    under_way = true;
    train_loop(&t);
    close_written(t.log, t.log_path);
    draw_losses(o->output_dir);
    if ((int64_t)t.state.step > t.first_step) verify_saved(&t);
    end_run(&t);
    unlock_folder();
    return stop_signal && (int64_t)t.state.step < t.steps ? 128 + stop_signal : 0;
}

// ==== 11  Adapters ===============================================================================================
// An adapter folder holds only what was trained, as adapter_model.safetensors and adapter_config.json: Hugging Face's
// PEFT and glmtune read each other's. What PEFT lacks or computes otherwise (full, freeze, adapter, a prefix of
// ChatGLM's kind) has a type "GLMTUNE_...". ChatGLM's own prefix folders are read too. `merge` joins base and adapter.

// ---- 11.1 Model folders ------------------------------------------------------------------------------------------

// give: the numbers of one tensor, out [t->n]
typedef struct { void (*give)(real *out, const Tensor *t, const void *context); const void *context; } TensorSource;

// Writes n numbers of a tensor, rounded to a type. One that is not finite, or too large for the type, ends the program.
static void write_numbers(TensorWriter *w, const char *tensor_name, const real *numbers, size_t n, Dtype dtype) {
    enum { CHUNK = 1 << 18 };
    size_t bytes = CHUNK * dtype_size(dtype);
    void *narrowed = device_take(bytes, 1, "writing"), *host = alloc(bytes, 1);
    real *back = device_take(CHUNK, sizeof *back, "writing");
    for (size_t i = 0; i < n; i += CHUNK) {
        size_t part = min_size(CHUNK, n - i), good;
        narrow(narrowed, dtype, numbers + i, part);
        widen(back, narrowed, dtype, part);
        if ((good = first_not_finite(back, part)) < part)
            fail("%s: '%s' would hold a number that is not finite in %s, at %zu; nothing is written", w->path,
                 tensor_name, dtype_name(dtype), i + good);
        memory_copy_out(host, narrowed, part * dtype_size(dtype));
        write_tensor_bytes(w, host, part * dtype_size(dtype));
    }
    memory_give(narrowed), memory_give(back);
    free(host);
}

static StoredTensor stored_as(const Tensor *t, Dtype dtype, const void *data) {
    StoredTensor s = { .name = (char *)t->name, .dtype = dtype, .n_dims = t->n_dims, .n = t->n, .data = data };
    memcpy(s.shape, t->shape, sizeof t->shape);
    return s;
}

// How a folder is quantised (11.5); bits 0: it is not.
typedef struct { int bits; bool twice; } Coding;
enum { MAX_CODE_PARTS = 6 };
static bool is_coded(const Model *m, const Tensor *t, Coding c);
static size_t code_parts(StoredTensor *parts, const Tensor *t, Coding c);       // how the codes of one are stored
static void write_codes(TensorWriter *w, const Tensor *t, real *numbers, Coding c);

// What a tensor of the model is in its file: itself, or codes and what stands beside them.
static size_t stored_parts(StoredTensor *parts, const Model *m, const Tensor *t, Coding c) {
    if (is_coded(m, t, c)) return code_parts(parts, t, c);
    *parts = stored_as(t, t->file_dtype, NULL);
    return 1;
}

// Writes the tensors of a model that belong into one file.
static void write_shard(const char *folder, const Model *m, const char *file, TensorSource source, Coding coding) {
    StoredTensor *s = alloc(MAX_CODE_PARTS * m->n_tensors, sizeof *s);
    size_t n = 0;
    for (size_t i = 0; i < m->n_tensors; i++)
        if (!strcmp(m->tensors[i]->file, file)) n += stored_parts(s + n, m, m->tensors[i], coding);
    TensorWriter w = begin_tensor_file(strf("%s/%s", folder, file), s, n, "");
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        if (strcmp(t->file, file)) continue;
        real *numbers = device_take(t->n, sizeof *numbers, t->name);
        source.give(numbers, t, source.context);
        if (is_coded(m, t, coding)) write_codes(&w, t, numbers, coding);
        else write_numbers(&w, t->name, numbers, t->n, t->file_dtype);
        memory_give(numbers);
        if (coding.bits) progress(false, "%s: %zu of %zu tensors", folder, i + 1, m->n_tensors);
    }
    finish_tensor_file(&w);
    free(s);
}

static size_t bytes_to_write(const Model *m, const Tensor *t, Coding c) {
    StoredTensor parts[MAX_CODE_PARTS];
    size_t bytes = 0;
    for (size_t n = stored_parts(parts, m, t, c), p = 0; p < n; p++) bytes += parts[p].n * dtype_size(parts[p].dtype);
    return bytes;
}

// Gives each tensor its file: model.safetensors, or shards of at most max_shard bytes.
static void choose_files(Model *m, double max_shard, Coding coding) {
    size_t *shard = alloc(m->n_tensors, sizeof *shard), n_shards = 1, bytes = 0;
    for (size_t i = 0; i < m->n_tensors; shard[i++] = n_shards) {
        size_t more = bytes_to_write(m, m->tensors[i], coding);
        if (bytes && (double)(bytes + more) > max_shard) n_shards++, bytes = 0;
        bytes += more;
    }
    for (size_t i = 0; i < m->n_tensors; i++)
        m->tensors[i]->file = n_shards == 1 ? "model.safetensors"
                                            : strf("model-%05zu-of-%05zu.safetensors", shard[i], n_shards);
    free(shard);
}

// Writes the weights of a model, each in its file and file_dtype, and the index of more than one file.
static void write_weights(const char *folder, const Model *m, TensorSource source, Coding coding) {
    StoredTensor parts[MAX_CODE_PARTS];
    size_t total = 0, n_files = 0;
    Text index = {0}, map = {0};
    text_add(&map, "", 0);      // so that it is a text, whatever follows
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        size_t k = 0;
        while (strcmp(m->tensors[k]->file, t->file)) k++;
        if (k == i) write_shard(folder, m, t->file, source, coding), n_files++;
        total += bytes_to_write(m, t, coding);
        for (size_t n = stored_parts(parts, m, t, coding), p = 0; p < n; p++)
            text_print(&map, "%s\n\"%s\": \"%s\"", map.n ? "," : "", parts[p].name, t->file);
    }
    text_print(&index, "{\"metadata\": {\"total_size\": %zu}, \"weight_map\": {%s}}\n", total, map.s);
    if (n_files > 1 || strcmp(m->tensors[0]->file, "model.safetensors"))
        write_file(strf("%s/model.safetensors.index.json", folder), index.s, index.n);
    free(index.s), free(map.s);
}

static void copy_if_there(const char *from, const char *to, const char *file) {
    size_t n = 0;
    const char *path = strf("%s/%s", from, file);
    char *bytes = exists(path) ? read_file(path, &n) : NULL;
    if (bytes) write_file(strf("%s/%s", to, file), bytes, n);
    free(bytes);
}

// ---- 11.2 Writing an adapter -------------------------------------------------------------------------------------

// What a key holds, as it stands in the file; NULL: it is left out.
static const char *key_text(const ConfigKey *k, const Config *c, const Options *o) {
    if (k->text) return k->text;
    if (k->of_model) return strf("%zu", k->of_model(c));
    const char *value = option_text(o, k->key);
    if (!strcmp(value, NOT_SET)) return NULL;
    if (k->form == NUMBER_OR_FLAG) return value;
    Text list = {0};
    for (const char *p = value; *p; p++)
        if (*p == ',' && k->form == NAMES) text_print(&list, "\", \"");
        else text_add(&list, p, 1);
    return strf(k->form == NAMES ? "[\"%s\"]" : "\"%s\"", list.s);
}

static Text adapter_config(const Model *m, const Method *method, const Options *options, const char *base) {
    bool own = method->is_pefts && !method->is_pefts(m);
    Options o = *options;
    Text t = {0};
    if (method->settle) method->settle(m, &o);
    text_print(&t, "{\n  \"peft_type\": \"%s\",\n  \"base_model_name_or_path\": ",
               own ? method->own_type : method->peft_type);
    text_json(&t, base, strlen(base));
    text_print(&t, ",\n  \"task_type\": \"CAUSAL_LM\",\n  \"inference_mode\": true");
    for (const ConfigKey *k = method->keys; k && k->key; k++) {
        const char *text = k->own && !own ? NULL : key_text(k, &m->config, &o);
        if (text) text_print(&t, ",\n  \"%s\": %s", k->key, text);
    }
    text_print(&t, "\n}\n");
    return t;
}

// A file of arrays in model memory, as REAL: s [n] say how they are called and shaped, data where they lie.
static void write_reals(const char *path, const StoredTensor *s, size_t n, const char *metadata) {
    TensorWriter w = begin_tensor_file(path, s, n, metadata);
    for (size_t i = 0; i < n; i++) write_numbers(&w, s[i].name, s[i].data, s[i].n, REAL);
    finish_tensor_file(&w);
}

static void write_trained(const char *path, const Model *m, Tensor *const *t, size_t n) {
    StoredTensor *s = alloc(n, sizeof *s);
    for (size_t i = 0; i < n; i++) s[i] = stored_as(t[i], REAL, t[i]->value);
    write_reals(path, s, n, m->fingerprint ? strf(",\"glmtune.fingerprint\":\"%s\"", m->fingerprint) : "");
    free(s);
}

// Writes the files of an adapter into a folder that exists. Where PEFT wants something else than what trains
// (`projected`), what trains goes into a file of its own, so that training can go on.
static void save_adapter(const char *folder, const Model *m, const Method *method, const Options *o, const char *base) {
    const char *file = strf("%s/adapter_model.safetensors", folder);
    Tensor *projected = method->projected ? method->projected(m) : NULL;
    if (projected) write_trained(file, m, &projected, 1), memory_give(projected->value);
    write_trained(projected ? strf("%s/prefix_projection.safetensors", folder) : file, m, m->trained, m->n_trained);
    Text config = adapter_config(m, method, o, base);
    write_file(strf("%s/adapter_config.json", folder), config.s, config.n);
    free(config.s);
}

// Of n bytes 4 KiB from start, middle and end.
static uint64_t hash_parts(uint64_t key, const char *bytes, size_t n) {
    size_t part = min_size(n, 4096), at[] = { 0, (n - part) / 2, n - part };
    for (size_t k = 0; k < COUNT(at); k++) key = rng_key(key, hash_bytes(bytes + at[k], part));
    return key;
}

// The fingerprint of what an adapter is trained on: three hashes, so that a message can say which part differs. The
// base's is over name, type, shape and parts of the bytes of every tensor and its scales; 0 is what is not known.
static const char *fingerprint_of(const Model *m, const ChatFormat *f) {
    unsigned long long base = 0, tokenizer = 0, layout = f && f->layout ? hash_name(f->layout->name) : 0;
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        base = rng_key(rng_key(base, hash_name(t->name)), t->file_dtype);
        for (size_t k = 0; k < t->n_dims; k++) base = rng_key(base, t->shape[k]);
        base = hash_parts(base, t->file_data, dtype_bytes(t->file_dtype, t->n));
        if (t->scales) base = hash_parts(base, t->file_scales, t->scale_bytes);
    }
    if (f && f->tokenizer) tokenizer = hash_bytes(f->tokenizer->image, f->tokenizer->image_bytes);
    return strf("%016llx-%016llx-%016llx", base, tokenizer, layout);
}

// ---- 11.3 Reading one --------------------------------------------------------------------------------------------

// What a folder holds of ChatGLM's own prefix encoder; n 0: nothing.
static TensorSet official_prefix(const char *folder) {
    TensorSet set = {0};
    const char *path = weights_of(folder);
    if (!path || (ends_in(path, ".index.json") && !file_contains(path, prefix_names[1][PREFIX_TABLE]))) return set;
    set = read_model_tensors(folder);
    size_t n = set.n;
    set.n = 0;
    for (const StoredTensor *s = set.tensors; s < set.tensors + n; s++)
        if (is_official_prefix(s->name)) set.tensors[set.n++] = *s;
    return set;
}

static bool is_adapter(const char *folder) {
    refuse_run(folder);
    return exists(strf("%s/adapter_config.json", folder)) || (is_folder(folder) && official_prefix(folder).n);
}

static const char *adapter_file(const char *folder) {
    const char *file = strf("%s/adapter_model.safetensors", folder), *bin = strf("%s/adapter_model.bin", folder);
    return !exists(file) && exists(bin) ? bin : file;
}

// The base folder that an adapter names, as it stands or seen from the adapter's folder; NULL: none.
static const char *named_base(const char *folder, const Json *named) {
    if (!json_is(named, JSON_STRING) || !*named->text) return NULL;
    const char *beside = strf("%s/%s", folder, named->text);
    return named->text[0] != '/' && is_folder(beside) ? beside : strf("%s", named->text);
}

static const char *find_base(const char *path, const char *folder, const Json *named, const Options *o) {
    const char *base = o->base ? o->base : named_base(folder, named);
    if (!base || !is_folder(base))
        fail("%s: its base model '%s' is no folder here; name it with --base DIR", path, base ? base : "");
    return base;
}

// Reads such a folder. The prefix lies alone there, as ChatGLM2's script saves it, or with the `whole` model, as
// ChatGLM3's does. config.json is that of the base, with the length of the prefix and maybe the base's path.
static const Method *read_official_config(const char *folder, Options *o, const char **base) {
    const char *path = strf("%s/config.json", folder), *problem = NULL;
    TensorSet set = official_prefix(folder);
    bool whole = set.n < read_model_tensors(folder).n;
    const StoredTensor *table = find_tensor(&set, prefix_names[1][PREFIX_TABLE]);
    const StoredTensor *w1 = find_tensor(&set, prefix_names[1][PREFIX_W1]);
    if (!table) fail("%s: '%s' is missing", folder, prefix_names[1][PREFIX_TABLE]);
    JsonReader r = exists(path) ? json_open_file(path) : json_open(path, "{}", 2);
    const Json *root = json_only(&r);
    double length = config_number(path, root, "pre_seq_len", 1, 1e6, whole ? 0 : (double)table->shape[0]);
    if (length != (double)table->shape[0])
        fail("%s: \"pre_seq_len\" is %g, and %s has a prefix of %zu", path, length, table->file, table->shape[0]);
    const char *const has[][2] = {
        { "method", "ptuning" }, { "ptuning_positions", "chatglm" }, { "prefix_projection", w1 ? "true" : "false" },
        { "num_virtual_tokens", strf("%.0f", length) }, { "encoder_hidden_size", strf("%zu", w1 ? w1->shape[0] : 0) } };
    for (size_t i = 0; i < COUNT(has) && !problem; i++) problem = fix_option(o, has[i][0], has[i][1], false);
    if (problem) fail("%s: %s", path, problem);
    *base = whole && !o->base ? folder : find_base(path, folder, json_get(root, "_name_or_path"), o);
    json_close(&r);
    return find_method(o->method);
}

// A JSON value as text for an option. A list of names: joined by commas; NULL: neither.
static const char *json_words(const Json *j) {
    Text names = {0};
    if (j->type == JSON_BOOL) return j->number != 0 ? "true" : "false";
    if (j->type == JSON_NUMBER) return number_text(j->number);
    if (j->type == JSON_STRING) return strf("%s", j->text);
    for (const Json *k = j->type == JSON_ARRAY ? j->first : NULL; k; k = k->next) {
        if (k->type != JSON_STRING) return NULL;
        text_print(&names, "%s%s", names.n ? "," : "", k->text);
    }
    return names.s;
}

// Refuses what PEFT can do to LoRA and glmtune cannot. Allowed: absent, null, false, empty, or a word that changes
// nothing once training is over (pissa would: it changes the base too). also: more keys; NULL for an adapter, where any
// choice of maps is fine, because its tensors show it.
static void check_peft_config(const char *path, const Json *root, const char *also) {
    static const char unwanted[] = "bias,init_lora_weights,use_dora,fan_in_fan_out,lora_bias,use_qalora,"
        "modules_to_save,rank_pattern,alpha_pattern,layer_replication,target_parameters,trainable_token_indices,"
        "alora_invocation_tokens,arrow_config,kasa_config,use_bdlora,velora_config,monteclora_config";
    for (const Json *j = json_is(root, JSON_OBJECT) ? root->first : NULL; j; j = j->next) {
        bool fine = j->type == JSON_NULL || (j->type >= JSON_ARRAY && !j->count) ||
                    (j->type == JSON_BOOL && (j->number == 0 || !strcmp(j->key, "init_lora_weights"))) ||
                    (j->type == JSON_STRING && list_has("none,gaussian,eva,orthogonal", j->text));
        if (!fine && (list_has(unwanted, j->key) || list_has(also, j->key)))
            fail("%s: \"%s\" is '%s', which is not supported", path, j->key, json_words(j) ? json_words(j) : "set");
    }
}

// The maps with LoRA, by the names of its tensors; NULL: none. target_modules may be a regular expression, a word, or
// another model's list, of which PEFT takes what is there.
static const char *lora_maps(const char *folder) {
    const char *file = adapter_file(folder);
    TensorSet set = {0};
    Text modules = {0};
    if (!exists(file)) return NULL;
    read_tensor_file(&set, file);
    for (const StoredTensor *s = set.tensors; s < set.tensors + set.n; s++) {
        const char *lora = strstr(s->name, ".lora_");
        if (!lora || !strncmp(lora, ".lora_A", 7)) continue;        // each map has a B too
        const char *map = strrchr(strf(".%.*s", (int)(lora - s->name), s->name), '.') + 1;
        if (!list_has(modules.s, map)) text_print(&modules, "%s%s", modules.n ? "," : "", map);
    }
    return modules.s;
}

static void read_key(const char *path, const Json *root, const ConfigKey *k, const char *modules, Options *o) {
    const Json *j = given(root, k->key);
    if (k->text || k->of_model || (k->needs && !config_flag(root, k->needs, false))) return;
    const char *value = k->form == NAMES && modules ? modules : j ? json_words(j) : k->usual;
    if (!value) fail("%s: \"%s\" %s", path, k->key, j ? "must be a value or a list of names" : "is missing");
    const char *problem = *value ? fix_option(o, k->key, value, k->free) : NULL;
    if (problem) fail("%s: %s", path, problem);
}

// Reads adapter_config.json into the options; returns its method, and the base folder that it names in *base.
static const Method *read_adapter_config(const char *folder, Options *o, const char **base) {
    const char *path = strf("%s/adapter_config.json", folder);
    if (!exists(path)) return read_official_config(folder, o, base);
    size_t k = 0;
    JsonReader r = json_open_file(path);
    const Json *root = json_only(&r), *type = json_get(root, "peft_type");
    if (!json_is(type, JSON_STRING)) fail("%s: has no \"peft_type\"; is it an adapter's?", path);
    Text known = {0};
    for (; k < COUNT(methods) && strcmp(type->text, methods[k].peft_type); k++) {
        if (methods[k].own_type && !strcmp(type->text, methods[k].own_type)) break;
        text_print(&known, "%s%s", k ? ", " : "", methods[k].peft_type);
    }
    if (k == COUNT(methods)) fail("%s: peft_type '%s' is not supported; there are %s", path, type->text, known.s);
    if (GIVEN(o, method) && strcmp(o->method, methods[k].name))
        fail("%s: the adapter was made by --method %s; leave the option out", path, methods[k].name);
    o->method = methods[k].name;
    check_peft_config(path, root, NULL);
    const char *modules = lora_maps(folder);
    Json *projects = json_get(root, "prefix_projection");       // PEFT's files hold the prefix itself, and lose that
    if (projects && !json_get(root, "ptuning_positions") &&
        !exists(strf("%s/prefix_projection.safetensors", folder))) projects->number = 0;
    for (const ConfigKey *key = methods[k].keys; key && key->key; key++) read_key(path, root, key, modules, o);
    *base = find_base(path, folder, json_get(root, "base_model_name_or_path"), o);
    json_close(&r);
    return &methods[k];
}

// Whether a tensor that the method added still has its first values; random ones count as such, a constant is compared.
static bool is_as_started(const Tensor *t) {
    real *numbers = alloc(t->n, sizeof *numbers);
    size_t i = 0;
    memory_copy_out(numbers, t->value, t->n * sizeof *numbers);
    while (i < t->n && (t->start.spread != 0 || numbers[i] == (real)t->start.center)) i++;
    free(numbers);
    return i == t->n && !t->of_base;
}

// The tensors of an adapter: what trains, where PEFT's file holds something else (save_adapter). A state that was saved
// without PEFT's own function has the adapter's name in their names, lora_A.default.weight: it is left out.
static TensorSet read_adapter_file(const char *folder, const Method *method) {
    TensorSet set = {0};
    const char *own = strf("%s/prefix_projection.safetensors", folder);
    if (!exists(strf("%s/adapter_config.json", folder))) return official_prefix(folder);
    read_tensor_file(&set, method->projected && exists(own) ? own : adapter_file(folder));
    for (size_t i = 0; i < set.n; i++) {
        char *lora = strstr(set.tensors[i].name, ".lora_"), *name = lora ? strchr(lora + 1, '.') : NULL;
        const char *last = name ? strchr(name + 1, '.') : NULL;
        if (last) memmove(name, last, strlen(last) + 1);
    }
    return set;
}

__attribute__((noreturn)) static void refuse_missing(const char *folder, const TensorSet *set, const char *wanted) {
    const char *lora = strstr(wanted, ".lora_A."), *map = strf("%.*s", lora ? (int)(lora - wanted) : 0, wanted);
    if (lora && lora_maps(folder) && !find_tensor(set, strf("%s.lora_B.weight", map)))
        fail("%s: acts on some layers only: there is no LoRA on %s; that is not supported", folder, map);
    fail("%s: '%s' is missing", folder, wanted);
}

static const StoredTensor *find_trained(const TensorSet *set, const Tensor *t) {
    const StoredTensor *s = find_tensor(set, t->name);
    return s || !t->other_name ? s : find_tensor(set, t->other_name);
}

// What is trained starts from the files of an adapter.
static void read_adapter_tensors(const char *folder, Model *m, const Method *method) {
    TensorSet set = read_adapter_file(folder, method);
    size_t n_constant = 0, n_as_started = 0;
    for (size_t i = 0; i < m->n_trained; i++) {
        Tensor *t = m->trained[i];
        const StoredTensor *s = find_trained(&set, t);
        if (!s) refuse_missing(folder, &set, t->name);
        if (!has_shape(s, t))
            fail("%s: '%s' is %s; its config and the base want %s", s->file, s->name,
                 shape_text(s->shape, s->n_dims), shape_text(t->shape, t->n_dims));
        if (s->dtype > BF16) fail("%s: '%s' is %s, and must be F64, F32, F16 or BF16", s->file, s->name, s->dtype_name);
        widen_stored(t->value, s);
        n_constant += t->start.spread == 0 && !t->of_base, n_as_started += is_as_started(t);
    }
    for (size_t i = 0; i < set.n; i++) {
        size_t k = 0;
        while (k < m->n_trained && find_trained(&set, m->trained[k]) != &set.tensors[i]) k++;
        if (k == m->n_trained) fail("%s: '%s' has no place in its base", set.tensors[i].file, set.tensors[i].name);
    }
    if (n_constant && n_as_started == m->n_trained)
        fprintf(stderr, "warning: %s: changes nothing, its numbers are those that training starts from\n", folder);
}

static Opened open_model(const char *path, Options *o) {
    Opened m = { .folder = path };
    if (!is_folder(path))
        fail("%s: is no folder; MODEL must be one with config.json and weights, or an adapter's", path);
    if (is_adapter(path)) m.adapter = path, m.method = read_adapter_config(path, o, &m.folder);
    m.model = load_model(m.folder);
    if (m.method) m.method->setup(m.model, o);
    if (m.model->prefix_in_files && !m.model->n_prefix)
        fail("%s: has a prefix with its weights (P-tuning v2), and %s is made for a model without", m.folder, path);
    return m;
}

static void start_method(const Opened *m, uint64_t seed, bool trains) {
    start_trainables(m->model, seed, trains);
    if (m->adapter) read_adapter_tensors(m->adapter, m->model, m->method);
}

// An adapter that carries a fingerprint (PEFT's and the official ones do not) goes onto what it was trained on, unless
// --force says otherwise. f: the format that text is to be encoded in; NULL: no text will be, the weights alone count.
static void check_fingerprint(const Opened *m, const ChatFormat *f, const Options *o) {
    enum { DIGITS = 16 };
    static const char *const parts[] = { "base model", "tokenizer", "chat layout" }, unknown[] = "0000000000000000";
    TensorSet set = {0};
    if (m->adapter && exists(adapter_file(m->adapter))) read_tensor_file(&set, adapter_file(m->adapter));
    const char *was = line_value(set.metadata.s, "glmtune.fingerprint"), *is = was ? fingerprint_of(m->model, f) : "";
    free(set.tensors);
    if (!was || strlen(was) != strlen(is)) return;
    for (size_t k = 0; k < COUNT(parts); k++, was += DIGITS + 1, is += DIGITS + 1) {
        if (!strncmp(was, is, DIGITS) || !strncmp(was, unknown, DIGITS) || !strncmp(is, unknown, DIGITS)) continue;
        const char *differs = strf("%s was trained with another %s: its fingerprint is %.16s, that of %s is %.16s",
                                   m->adapter, parts[k], was, m->folder, is);
        if (!o->force) fail("%s; name the right one, or --force", differs);
        fprintf(stderr, "warning: %s\n", differs);
    }
}

// ---- 11.4 Merging ------------------------------------------------------------------------------------------------

// The numbers of a base tensor with what was tuned, if anything was: its own when it trained, W + s B A beside LoRA.
static void merged_tensor(real *out, const Tensor *t, const void *context) {
    const Opened *o = context;
    widen_weight(out, weight_of(t), t->n);
    for (size_t l = 0; o->method && o->method->merge && l < o->model->config.n_layers; l++)
        for (const Linear *w = o->model->layers[l].maps, *end = w + o->model->layers[l].n_maps; w < end; w++)
            if (w->weight == t) o->method->merge(out, w);
}

// How the logits of two models differ on random tokens: by the most, beside the largest; by their size, sqrt(sum of
// squares); how many are not finite; the two losses.
typedef struct { double most, largest, moved, loss[2]; size_t bad; } Difference;

static Difference compare_logits(const Opened *a, const Opened *b) {
    Difference d = {0};
    double changed = 0, size = 0;
    real *want = fixed_logits(a, FORWARD_ONLY, FIXED_TOKENS, &d.loss[0]);
    real *got = fixed_logits(b, FORWARD_ONLY, FIXED_TOKENS, &d.loss[1]);
    for (size_t i = 0; i < FIXED_TOKENS * a->model->config.vocab_size; i++) {
        double x = (double)want[i], change = (double)got[i] - x;
        d.most = fmax(d.most, fabs(change)), d.largest = fmax(d.largest, fabs(x));
        changed += change * change, size += x * x, d.bad += isfinite(change) ? 0 : 1;
    }
    d.moved = sqrt(changed / size);
    free(want), free(got);
    return d;
}

// Base with adapter and the merged folder, read back, must agree on a probe. Rounding to the base's type changes each
// weight by up to u = 2^-8 (bf16), 2^-11 (fp16), 2^-24 (fp32) of itself, and another order of sums adds some 2^-24.
// Measured on eight layers of random weights: logits change by 0.7 to 2 u of the largest (fp32: 15 u). A wrong merge is
// off by far more than 16 u; so can a right one be whose run diverged.
static void verify_merge(const Opened *o, const Opened *merged, bool force) {
    static const double units[] = { [F64] = 0, [F32] = 0x1p-24, [F16] = 0x1p-11, [BF16] = 0x1p-8 };
    const Model *m = o->model;
    Difference d = compare_logits(o, merged);
    double bound = 16 * 0x1p-24 * 4;
    for (size_t i = 0; i < m->n_tensors; i++) bound = fmax(bound, 16 * units[m->tensors[i]->file_dtype]);
    if (d.bad) fail("%s: gives %zu logits that are not finite; nothing is written", o->adapter, d.bad);
    if (!(d.most <= bound * d.largest) && !force)
        fail("%s: the merged model gives other logits: they change by up to %.3g, and rounding may by %.3g; nothing is "
             "written (--force writes it all the same)", o->adapter, d.most, bound * d.largest);
    fprintf(stderr, "read back: logits change by up to %.3g (%.2g of the largest; bound %.2g), the loss from %.6f to "
            "%.6f\n", d.most, d.most / d.largest, bound, d.loss[0], d.loss[1]);
}

// config.json of a model whose weights are stored another way: `more` instead of what it says of type and quantisation.
static void write_config(const char *folder, const Config *c, const char *more) {
    Text text = {0};
    JsonReader r = json_open(c->file, c->source, strlen(c->source));
    for (const Json *j = json_only(&r)->first; j; j = j->next) {
        if (list_has("quantization_config,quantization_bit,torch_dtype,dtype", j->key)) continue;
        text_print(&text, "%s\n  ", text.n ? "," : "{");
        text_json(&text, j->key, strlen(j->key));
        text_print(&text, ": ");
        text_python(&text, &r, j, NULL, IN_ONE_LINE);
    }
    text_print(&text, "%s\n}\n", more);
    write_file(strf("%s/config.json", folder), text.s, text.n);
    json_close(&r);
    free(text.s);
}

// What a model folder holds beside its weights and config.json goes with it, and its tokenizer from wherever it is.
static void copy_beside(const Model *m, const char *from, const char *to) {
    static const char *const others[] = {
        "generation_config.json", "tokenizer.bin", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "configuration_chatglm.py",
        "modeling_chatglm.py", "tokenization_chatglm.py", "quantization.py" };
    for (size_t i = 0; i < COUNT(others); i++) copy_if_there(from, to, others[i]);
    const char *none;
    Tokenizer *t = model_tokenizer(&m->config, from, &none);
    const char *inside = strf("%s/", from);
    if (t && strncmp(t->file, inside, strlen(inside)))      // the one beside the program
        write_file(strf("%s/tokenizer.bin", to), t->image, t->image_bytes);
}

static const char *first_other_code(const Model *coded, const Model *m);     // 11.5

static bool is_quantised(const Model *m) {
    for (size_t i = 0; i < m->n_tensors; i++) if (m->tensors[i]->scales) return true;
    return false;
}

// The first tensor of m that another model has not, by name and shape; NULL: they have the same.
static const char *first_other_tensor(const Model *m, const Model *other) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i], *o = i < other->n_tensors ? other->tensors[i] : NULL;
        if (!o || strcmp(t->name, o->name) || memcmp(t->shape, o->shape, sizeof t->shape)) return t->name;
    }
    return NULL;
}

// Was the adapter trained on a quantised base, and is m, named by --base, the model that it was made from? That is
// known if m, quantised, gives its codes; --force goes on without. Then opens that base too and returns true.
static bool open_coded_base(Opened *coded, const Opened *m, const Options *o) {
    JsonReader r = json_open_file(strf("%s/adapter_config.json", m->adapter));
    Options own = *o;
    own.base = named_base(m->adapter, json_get(json_only(&r), "base_model_name_or_path"));
    json_close(&r);
    if (!o->base || is_quantised(m->model) || !own.base || !is_folder(own.base)) return false;
    *coded = open_model(m->adapter, &own);
    if (!is_quantised(coded->model)) return false;
    check_fingerprint(coded, NULL, o);
    const char *foreign = first_other_tensor(m->model, coded->model);
    if (!foreign) foreign = first_other_tensor(coded->model, m->model);
    if (foreign)
        fail("%s: is not what %s was made from: they differ in '%s'; name the right one, or leave out --base",
             m->folder, coded->folder, foreign);
    const char *other = first_other_code(coded->model, m->model);
    if (other && !o->force)
        fail("%s: is not known to be what %s was made from: '%s', quantised by glmtune, does not give its codes; name "
             "the right one, leave out --base, or --force", m->folder, coded->folder, other);
    if (other) fprintf(stderr, "warning: %s: '%s' does not give the codes of %s\n", m->folder, other, coded->folder);
    return true;
}

// Writes base and adapter as one model folder, each tensor in the base's type, bf16 where that is codes; a folder that
// exists is refused.
static void merge(const char *adapter, const char *out, Options *o) {
    if (!is_adapter(adapter)) fail("%s: is no adapter or checkpoint folder", adapter);
    want_new_folder(out);
    Opened m = open_model(adapter, o), coded;
    const char *why = m.method->no_merge;
    if (why) fail("%s: cannot be merged: %s; it works as it is: name it wherever a model is asked for", adapter, why);
    set_precision(false);       // a merged number is rounded once, as it is written
    bool onto_source = open_coded_base(&coded, &m, o);
    if (!onto_source) check_fingerprint(&m, NULL, o);
    start_method(&m, 0, false);
    const char *temporary = begin_folder(out);
    for (size_t i = 0; i < m.model->n_tensors; i++)
        if (m.model->tensors[i]->scales) m.model->tensors[i]->file_dtype = BF16;
    if (GIVEN(o, max_shard_size) || is_quantised(m.model) || ends_in(m.model->tensors[0]->file, ".bin"))
        choose_files(m.model, o->max_shard_size * 1e9, (Coding){0});
    write_weights(temporary, m.model, (TensorSource){ merged_tensor, &m }, (Coding){0});
    if (is_quantised(m.model)) write_config(temporary, &m.model->config, ",\n  \"dtype\": \"bfloat16\"");
    else copy_if_there(m.folder, temporary, "config.json");
    copy_beside(m.model, m.folder, temporary);
    Opened merged = { .model = load_model(temporary) };
    verify_merge(&m, &merged, o->force);
    finish_output(temporary);
    printf("%s: %zu tensors of %s with %s\n", out, m.model->n_tensors, m.folder, adapter);
    if (!onto_source) return;
    start_method(&coded, 0, false);
    Difference d = compare_logits(&coded, &merged);
    printf("it was trained on the codes of %s: from there logits of random tokens move by %.2g of their size, the loss "
           "from %.4f to %.4f\n", coded.folder, d.moved, d.loss[0], d.loss[1]);
}

// ---- 11.5 Quantising ---------------------------------------------------------------------------------------------
// The same model with the matrices of its layers as codes, in a folder that transformers and bitsandbytes read too: a
// third or half of the size. One matrix is in memory at a time. With x the numbers of a block, or of a row:
//     4 bits (nf4)  scale = max |x| of 64 numbers; the code whose value is nearest to x / scale, the lower of two
//     twice         and then the scales, less their mean, in the same way: 256 at a time, by an 8-bit table
//     8 bits        x is rounded to fp16 first; SCB = max |x| of a row, code = x (127 / SCB), rounded to even
// (Dettmers et al. 2023, arXiv:2305.14314; 2022, arXiv:2208.07339.) Codes and scales are those that bitsandbytes 0.50.2
// makes, to the bit, but for two things of twice quantised ones: the order of sums of the mean is not defined, and on a
// CPU it looks codes up in a table of 65536 steps, so one in 600 is its neighbour.

enum { BLOCK = 64, GROUP = 256, STATE_BYTES = 256 };

// The name of what stands beside X.weight, by its end: behind that name (".absmax", "_scale") or behind X. ("SCB").
static const char *name_beside(const Tensor *t, const char *end) {
    size_t kept = strlen(t->name) - (strcmp(end, "SCB") ? 0 : strlen("weight"));
    return strf("%.*s%s", (int)kept, t->name, end);
}

static bool is_coded(const Model *m, const Tensor *t, Coding c) {
    return c.bits && t->n_dims == 2 && t->depth > 0 && t->depth < depth_of(m->config.n_layers, 0);
}

// A tensor beside t, of bytes that the file calls `type`, or of floats (NULL). rows, columns: 0 leaves one out.
static StoredTensor code_part(const Tensor *t, const char *end, const char *type, size_t rows, size_t columns) {
    return (StoredTensor){ .name = (char *)name_beside(t, end), .dtype = type ? OTHER_DTYPE : F32,
                           .dtype_name = type, .shape = { rows, columns }, .n_dims = !!rows + (size_t)!!columns,
                           .n = max_size(rows, 1) * max_size(columns, 1) };
}

// What stands in the file for t, in the order in which write_4bit and write_8bit write it.
static size_t code_parts(StoredTensor *parts, const Tensor *t, Coding c) {
    size_t blocks = (t->n + BLOCK - 1) / BLOCK, n = 0;
    if (c.bits == 8) {
        parts[n++] = code_part(t, "SCB", NULL, t->shape[0], 0);
        parts[n++] = code_part(t, "", "I8", t->shape[0], t->shape[1]);
        parts[n++] = code_part(t, "_format", "U8", 0, 0);
        return n;
    }
    if (c.twice) parts[n++] = code_part(t, ".nested_absmax", NULL, (blocks + GROUP - 1) / GROUP, 0);
    if (c.twice) parts[n++] = code_part(t, ".nested_quant_map", NULL, 256, 0);
    parts[n++] = code_part(t, ".quant_map", NULL, 16, 0);
    parts[n++] = code_part(t, ".absmax", c.twice ? "U8" : NULL, blocks, 0);
    parts[n++] = code_part(t, "", "U8", (t->n + 1) / 2, 1);
    parts[n++] = code_part(t, ".quant_state.bitsandbytes__nf4", "U8", STATE_BYTES, 0);
    return n;
}

// map [256]: bitsandbytes' dynamic 8-bit numbers, in ascending order. For each power of ten from 1e-6 to 1 the middles
// of 1, 2, 4, ... 64 intervals of [0.1, 1], times it, with both signs; and 0 and 1.
static void dynamic_map(float *map) {
    static const float powers[] = { 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1 };
    size_t n = 0;
    for (size_t p = 0; p < COUNT(powers); p++) {
        size_t items = (size_t)1 << p;
        float step = (1.0f - 0.1f) / (float)items, ends[65];
        for (size_t i = 0; i <= items; i++)         // from both ends, as torch.linspace does
            ends[i] = i < (items + 1) / 2 ? (float)((double)0.1f + (double)step * (double)i)
                                          : (float)(1 - (double)step * (double)(items - i));
        for (size_t i = 0; i < items; i++, n++) {
            map[128 + n] = powers[p] * ((ends[i] + ends[i+1]) / 2);
            map[126 - n] = -map[128 + n];
        }
    }
    map[127] = 0, map[255] = 1;
}

static float largest_magnitude(const float *x, size_t n) {
    float largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
}

// Of sorted values [n] the lowest that is as near to x as any.
static uint8_t nearest_code(const float *values, size_t n, float x) {
    size_t low = 0, high = n - 1;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (x <= (values[middle] + values[middle + 1]) / 2) high = middle;
        else low = middle + 1;
    }
    return (uint8_t)low;
}

// codes [n], a byte each, and a scale for each `per` of x [n]. As bitsandbytes does, whole blocks are multiplied by one
// over the scale, and a last, shorter one is divided by it.
static void code_blocks(uint8_t *codes, float *scales, const float *x, size_t n, size_t per, const float *values,
                        size_t n_values) {
    #pragma omp parallel for
    for (size_t b = 0; b < (n + per - 1) / per; b++) {
        size_t first = b * per, size = min_size(per, n - first);
        float divisor = fmaxf(scales[b] = largest_magnitude(x + first, size), 1e-38f);
        for (size_t i = first; i < first + size; i++) {
            float part = size == per ? x[i] * (1 / divisor) : x[i] / divisor;
            codes[i] = nearest_code(values, n_values, fminf(fmaxf(part, -1), 1));
        }
    }
}

// codes [(n+1)/2], two in a byte, and a scale for each `per` of x [n]
static void code_4bit(uint8_t *codes, float *scales, const float *x, size_t n, size_t per) {
    uint8_t *bytes = alloc(n + 1, 1);
    code_blocks(bytes, scales, x, n, per, code_values[NF4 - Q4], 16);
    bytes[n] = 7;           // 0, where the last byte has one code
    for (size_t i = 0; i < (n + 1) / 2; i++) codes[i] = (uint8_t)(bytes[2*i] << 4 | bytes[2*i + 1]);
    free(bytes);
}

// codes [rows,columns], scb [rows] of x [rows,columns]
static void code_8bit(uint8_t *codes, float *scb, const float *x, size_t rows, size_t columns) {
    #pragma omp parallel for
    for (size_t row = 0; row < rows; row++) {
        const float *x_row = x + row * columns;
        float factor = (scb[row] = largest_magnitude(x_row, columns)) > 0 ? 1 / scb[row] * 127 : 0;
        for (size_t i = 0; i < columns; i++) codes[row * columns + i] = (uint8_t)(int8_t)rintf(x_row[i] * factor);
    }
}

static void write_4bit(TensorWriter *w, const Tensor *t, const float *x, bool twice) {
    const float *nf4 = code_values[NF4 - Q4];
    size_t blocks = (t->n + BLOCK - 1) / BLOCK, groups = (blocks + GROUP - 1) / GROUP;
    uint8_t *codes = alloc((t->n + 1) / 2, 1), *scale_codes = alloc(blocks, 1);
    float *scales = alloc(blocks, sizeof *scales), *nested = alloc(groups, sizeof *nested), map[256];
    double mean = 0;
    Text state = {0};
    code_4bit(codes, scales, x, t->n, BLOCK);
    text_print(&state, "{\"quant_type\": \"nf4\", \"blocksize\": %d, \"dtype\": \"float32\", \"shape\": [%zu, %zu]",
               BLOCK, t->shape[0], t->shape[1]);
    if (twice) {
        for (size_t i = 0; i < blocks; i++) mean += (double)scales[i] / (double)blocks;
        for (size_t i = 0; i < blocks; i++) scales[i] -= (float)mean;
        dynamic_map(map);
        code_blocks(scale_codes, nested, scales, blocks, GROUP, map, 256);
        text_print(&state, ", \"nested_blocksize\": %d, \"nested_dtype\": \"float32\", \"nested_offset\": %.17g", GROUP,
                   (double)(float)mean);
        write_tensor_bytes(w, nested, groups * sizeof *nested);
        write_tensor_bytes(w, map, sizeof map);
    }
    text_print(&state, "}%*s", STATE_BYTES - 1 - (int)state.n, "");     // always as long, for the header comes first
    write_tensor_bytes(w, nf4, 16 * sizeof *nf4);
    if (twice) write_tensor_bytes(w, scale_codes, blocks);
    else write_tensor_bytes(w, scales, blocks * sizeof *scales);
    write_tensor_bytes(w, codes, (t->n + 1) / 2);
    write_tensor_bytes(w, state.s, STATE_BYTES);
    free(codes), free(scale_codes), free(scales), free(nested), free(state.s);
}

static void write_8bit(TensorWriter *w, const Tensor *t, const float *x) {
    uint8_t *codes = alloc(t->n, 1);
    float *scb = alloc(t->shape[0], sizeof *scb);
    code_8bit(codes, scb, x, t->shape[0], t->shape[1]);
    write_tensor_bytes(w, scb, t->shape[0] * sizeof *scb);
    write_tensor_bytes(w, codes, t->n);
    write_tensor_bytes(w, "", 1);           // weight_format 0: by row
    free(codes), free(scb);
}

// A matrix in model memory as it is quantised: floats on the host. For 8 bits it is rounded to fp16, `numbers` too.
static float *floats_to_code(const Tensor *t, real *numbers, int bits) {
    float *floats = device_take(t->n, sizeof *floats, t->name), *x = alloc(t->n, sizeof *x);
    if (bits == 8) narrow(floats, F16, numbers, t->n), widen(numbers, floats, F16, t->n);
    narrow(floats, F32, numbers, t->n);
    memory_copy_out(x, floats, t->n * sizeof *x);
    memory_give(floats);
    return x;
}

static void write_codes(TensorWriter *w, const Tensor *t, real *numbers, Coding c) {
    float *x = floats_to_code(t, numbers, c.bits);
    size_t bad = first_not_finite(numbers, t->n);
    if (bad < t->n)
        fail("%s: '%s' has a number that is not finite%s, at %zu; nothing is written", w->path, t->name,
             c.bits == 8 ? " in fp16" : "", bad);
    if (c.bits == 8) write_8bit(w, t, x);
    else write_4bit(w, t, x, c.twice);
    free(x);
}

// Whether a matrix, quantised as it is written here, gives these codes: nf4 or bitsandbytes' 8 bits; else it does not.
static bool gives_codes(const Tensor *t, const Tensor *coded) {
    bool is_nf4 = coded->dtype == NF4;
    real *numbers = device_take(t->n, sizeof *numbers, t->name);
    widen_weight(numbers, weight_of(t), t->n);
    float *x = floats_to_code(t, numbers, is_nf4 ? 4 : 8), *scales = alloc(t->n, sizeof *scales);
    uint8_t *codes = alloc(t->n, 1);
    bool same = first_not_finite(numbers, t->n) == t->n && (is_nf4 || coded->dtype == Q8);
    if (same && is_nf4) code_4bit(codes, scales, x, t->n, coded->scales->per);
    else if (same) code_8bit(codes, scales, x, t->shape[0], t->shape[1]);
    same = same && !memcmp(codes, coded->file_data, dtype_bytes(coded->dtype, t->n));
    memory_give(numbers), free(x), free(scales), free(codes);
    return same;
}

// The first tensor of a quantised model whose codes m, of the same tensors, does not give again; NULL: it gives all.
static const char *first_other_code(const Model *coded, const Model *m) {
    for (size_t i = 0; i < coded->n_tensors; i++) {
        const Tensor *t = coded->tensors[i], *from = m->tensors[i];
        if (t->scales) progress(false, "quantised again: %zu of %zu tensors", i + 1, coded->n_tensors);
        if (t->scales && !gives_codes(from, t)) return t->name;
    }
    return NULL;
}

static void quantise(const char *folder, const char *out, const Options *o) {
    static const char *const words[] = { "false", "true" };
    Coding coding = { (int)o->bits, o->double_quant };
    if (coding.bits != 4 && coding.bits != 8) fail_usage("--bits is 4 or 8");
    if (coding.bits == 8 && coding.twice) fail_usage("--double_quant true is for --bits 4");
    if (is_adapter(folder)) fail("%s: is an adapter; merge it first, or quantise its base", folder);
    want_new_folder(out);
    Opened m = { .folder = folder, .model = load_model(folder) };
    if (is_quantised(m.model)) fail("%s: is quantised already", folder);
    if (m.model->prefix_in_files) fail("%s: holds a prefix with the model; quantise the model alone", folder);
    const char *temporary = begin_folder(out);
    choose_files(m.model, o->max_shard_size * 1e9, coding);
    write_weights(temporary, m.model, (TensorSource){ merged_tensor, &m }, coding);
    write_config(temporary, &m.model->config, strf(
        ",\n  \"dtype\": \"float32\",\n  \"quantization_config\": {\"quant_method\": \"bitsandbytes\", "
        "\"load_in_4bit\": %s, \"load_in_8bit\": %s, \"bnb_4bit_quant_type\": \"nf4\", "
        "\"bnb_4bit_use_double_quant\": %s, \"bnb_4bit_compute_dtype\": \"float32\", "
        "\"bnb_4bit_quant_storage\": \"uint8\", \"llm_int8_threshold\": 6.0, \"llm_int8_skip_modules\": null}",
        words[coding.bits == 4], words[coding.bits == 8], words[coding.twice]));
    copy_beside(m.model, folder, temporary);
    Difference d = compare_logits(&m, &(Opened){ .model = load_model(temporary) });
    if (d.bad) fail("%s: gives %zu logits that are not finite, or its codes do; nothing is written", folder, d.bad);
    finish_output(temporary);
    printf("%s: %d bits; read back: logits of random tokens move by %.2g of their size, the loss from %.4f to %.4f\n",
           out, coding.bits, d.moved, d.loss[0], d.loss[1]);
}

// ================================================================================================================
// PART THREE: THE MACHINE ROOM
// ================================================================================================================
// What lets all of this read the world's files, and the program around it: files, tokenizers, instruments, commands.

// ==== 12  Fast CPU kernels =======================================================================================
// Section 2 once more, in float and on vectors: products, attention and decoding's product of one row, which take nine
// tenths of a run's time and more. As there, the results depend on shapes alone; but sums have another order.

#if FAST

// ---- 12.1 Vectors ------------------------------------------------------------------------------------------------
// GCC's and Clang's vector types, as wide as the machine that is compiled for. To SHUFFLE two: LOW_LANES takes the
// lanes of their lower halves in turn, HIGH_LANES those of the upper.
#if defined __AVX512F__
#include <immintrin.h>      // for two places: AMX's tiles, and codes (lanes_of_bytes and values_of)
#define VECTOR_BYTES 64
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined __AVX__
#define VECTOR_BYTES 32
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define VECTOR_BYTES 16
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#endif

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef uint32_t bit_vec __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));    // or pairs of 16 bits
typedef uint16_t half_vec __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint8_t byte_vec __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));
typedef int32_t int_vec __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t bit_pair __attribute__((may_alias));       // two numbers of bf16
enum { LANES = VECTOR_BYTES / sizeof(real) };

#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else       // gcc 11
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int_vec){ __VA_ARGS__ })
#endif

static inline real sum_of_lanes(vec sums) { return join_parts((real *)&sums, LANES); }

// ---- 12.2 Matrix product -----------------------------------------------------------------------------------------
// One routine for the three products of training, C [M,N] = from + scale A B:
//     forward  Y = X W^T          backward  dX = dY W          dW = dY^T X
// A and B are views: element (line, k) lies at data[line*line_stride + k*k_stride]; a line is a row of A or a column of
// B, one stride is 1. How it gets fast (Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication"):
//   1. A tile of C, TILE_M rows by two vectors, stays in registers while k runs: each number that is loaded from A
//      meets two vectors of B, each vector of B meets TILE_M numbers of A.
//   2. For that, A and B are first copied into panels, widened to `real` on the way from whatever type the file has: B
//      row by row as the tile reads it, TILE_N numbers each; A in lines of BLOCK_K, TILE_M of them side by side.
//   3. A panel of B (BLOCK_K x TILE_N) stays in the first-level cache while the panels of A go by; a block of B
//      (BLOCK_K x BLOCK_N) and what of A meets it stay in the second.
//   4. A is packed once, for all; each task then packs its own columns of B and goes over all rows, or over TASK_ROWS
//      of them where there are too few columns for many cores.
// With --precision bf16 the numbers of A and B are rounded to bf16, to nearest even, as they are packed; sums stay
// float. How they are multiplied depends on the machine that is compiled for:
//   - AVX512_BF16: a lane holds a pair, the numbers of k and k + 1, and one instruction takes all pairs of a vector;
//   - AMX: the same pairs, in registers of 16 rows;
//   - neither: rounded numbers go through the tile of fp32, no faster.

// A tile takes 15 of 16 vector registers: 12 sums, 2 of B, 1 of A. Where there are 32 (AVX-512), tiles of 8x2, 12x2,
// 9x3 and 6x4 were no faster. Blocks 128 wide make a step with AVX2 3 % faster than 64 wide, 256 wide 1 % more. With
// MOST_K four times as large the packed A falls out of the third-level cache: dX of 512 rows at 2048 x 12288 then
// reaches 67 % of the peak instead of 85.
enum { TILE_M = 6, TILE_N = 2 * LANES, BLOCK_K = 256, BLOCK_N = 128, TASK_ROWS = 16 * TILE_M,
       SQUARE = 32,      // rows of a tile in AMX
       MOST_M = 128 * TILE_M, MOST_K = 8 * BLOCK_K };   // of A that is packed at once

// What the precision changes of that: rows of A in a panel and columns of B in a block, numbers of k in a lane, and
// lanes that a tile takes at once (a panel's last ones are filled with zeros). A line of a panel has BLOCK_K lanes.
typedef struct { bool rounded; size_t rows, columns, pair, step; } Packing;
static const Packing unrounded = { false, TILE_M, BLOCK_N, 1, 1 };
static Packing packing = { false, TILE_M, BLOCK_N, 1, 1 };

static size_t block_depth(void) { return packing.pair * BLOCK_K; }    // numbers of k

static size_t lanes_of(size_t n_k) {
    size_t at_once = packing.pair * packing.step;
    return (n_k + at_once - 1) / at_once * packing.step;
}

#ifdef __AVX512BF16__
static const Packing in_vectors = { true, TILE_M, BLOCK_N, 2, 1 };

// sum + high(a) high(b) + low(a) low(b) in each lane, of pairs of bf16. Each product is added with one rounding to
// nearest even, the high one first; denormal numbers count as 0 (Intel's manual of instructions, VDPBF16PS). Written
// by name, since clang 16 crashes on its intrinsic.
static inline vec dot_pairs(vec sum, uint32_t a, bit_vec b) {
    bit_vec everywhere = (bit_vec){0} + a;
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(everywhere), "v"(b));
    return sum;
}
#else
static const Packing in_vectors = { true, TILE_M, BLOCK_N, 1, 1 };
static inline vec dot_pairs(vec sum, uint32_t a, bit_vec b) { (void)a, (void)b; return sum; }       // never called
#endif

typedef struct { Weight w; size_t line_stride, k_stride; } View;

static size_t view_index(View v, size_t line, size_t k) { return v.w.first + line * v.line_stride + k * v.k_stride; }

static const void *view_at(View v, size_t line, size_t k) {
    return (const char *)v.w.data + dtype_bytes(v.w.dtype, view_index(v, line, k));
}

// Views of numbers in memory, whose lines are the rows or the columns of a matrix.
static View by_rows(const real *x, size_t stride) { return (View){ { x, REAL, 0, NULL }, stride, 1 }; }
static View by_columns(const real *x, size_t stride) { return (View){ { x, REAL, 0, NULL }, 1, stride }; }

// Interleaves halves of the rows log2(LANES) times, which transposes them: rows i and i + LANES/2 become 2i and 2i + 1.
static inline void transpose(vec *rows) {
    vec next[LANES];
    #pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        #pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2*i] = SHUFFLE(rows[i], rows[i + LANES/2], LOW_LANES);
            next[2*i + 1] = SHUFFLE(rows[i], rows[i + LANES/2], HIGH_LANES);
        }
        #pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

static void transpose_block(real *out, size_t out_stride, const real *in, size_t in_stride, size_t M, size_t N) {
    // out [N,M], in [M,N]
    size_t i = 0;
    for (; i + LANES <= M; i += LANES) {
        size_t j = 0;
        for (; j + LANES <= N; j += LANES) {
            vec rows[LANES];
            for (size_t k = 0; k < LANES; k++) rows[k] = *(const vec *)(in + (i + k)*in_stride + j);
            transpose(rows);
            for (size_t k = 0; k < LANES; k++) *(vec *)(out + (j + k)*out_stride + i) = rows[k];
        }
        for (; j < N; j++)
            for (size_t k = i; k < i + LANES; k++) out[j*out_stride + k] = in[k*in_stride + j];
    }
    for (; i < M; i++)
        for (size_t j = 0; j < N; j++) out[j*out_stride + i] = in[i*in_stride + j];
}

// The bits of numbers rounded to bf16, in the upper half of each lane. (A NaN that the hardware makes stays one.)
static inline bit_vec round_lanes(vec x) {
    bit_vec bits = (bit_vec)x;
    return (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
}

// out: n numbers [n] rounded to bf16, as pairs or still `real`
static void round_run(real *out, const real *in, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        bit_vec bits = round_lanes(*(const vec *)(in + i));
        if (packing.pair == 2) *(half_vec *)((uint16_t *)out + i) = __builtin_convertvector(bits >> 16, half_vec);
        else *(vec *)(out + i) = (vec)bits;
    }
    for (; i < n; i++) {
        uint32_t bits = round_lanes((vec){ in[i] })[0];
        uint16_t half = (uint16_t)(bits >> 16);
        if (packing.pair == 2) memcpy((uint16_t *)out + i, &half, sizeof half);
        else memcpy(out + i, &bits, sizeof bits);
    }
}

static void pack_a(real *panel, View a, size_t line0, size_t n_lines, size_t k0, size_t n_k) {
    // panel [n_lines, BLOCK_K], of which lanes_of(n_k) are used; A is always `real`
    const real *from = view_at(a, line0, k0);
    size_t stride = a.line_stride, used = n_k / packing.pair, lanes = lanes_of(n_k);
    real turned[SQUARE * 2 * BLOCK_K];
    if (a.k_stride != 1) {
        stride = block_depth();
        transpose_block(packing.rounded ? turned : panel, stride, from, a.k_stride, n_k, n_lines);
        if (!packing.rounded) return;
        from = turned;
    }
    for (size_t i = 0; i < n_lines; i++, panel += BLOCK_K, from += stride) {
        memset(panel + used, 0, (lanes - used) * sizeof *panel);
        if (packing.rounded) round_run(panel, from, n_k);
        else memcpy(panel, from, n_k * sizeof *panel);
    }
}

// Numbers of two bytes, one in the low half of each lane; the same arithmetic as f16_to_float and bf16's shift.
static inline vec widen_lanes(bit_vec x, Dtype dtype) {
    if (dtype == BF16) return (vec)(x << 16);
    bit_vec magnitude = x & 0x7FFF, infinite = (bit_vec)(magnitude >= 0x7C00) & 0x7F800000;
    return (vec)((bit_vec)((vec)(magnitude << 13) * 0x1p112f) | infinite | (x & 0x8000) << 16);
}

// 2 LANES numbers of two bytes, a pair in each lane: the first of each pair, and the second.
static inline void widen_pairs(vec *even, vec *odd, bit_vec pairs, Dtype dtype) {
    *even = widen_lanes(pairs & 0xFFFF, dtype);
    *odd = widen_lanes(pairs >> 16, dtype);
}

// panel of whole vectors of two-byte numbers: [n_k,TILE_N], widened on the way, or `paired`, [n_k/2,TILE_N] pairs of
// bf16 as they lie. Where lines run along k, two neighbours travel through the transposition as one lane, which halves
// its work, and are a pair already; else two rows are interleaved. With this and the prefetch below, Y and dX of 64
// rows at 4096 x 4608 reach 71 and 72 % of the peak of one core, against 62 and 56 (clang: 74 and 76, 68 and 50).
static inline void pack_two_bytes(real *panel, View b, size_t line0, size_t k0, size_t n_k, bool paired) {
    vec rows[LANES];
    size_t step = paired ? 2 : 1;       // numbers of k in a row of the panel
    for (size_t k = 0; b.k_stride != 1 && k < n_k; k += step, panel += TILE_N) {
        const half_vec *low = view_at(b, line0, k0 + k), *high = view_at(b, line0, k0 + k + step - 1);
        for (size_t j = 0; j < TILE_N / LANES; j++) {
            bit_vec bits = __builtin_convertvector(low[j], bit_vec);
            if (paired) bits |= __builtin_convertvector(high[j], bit_vec) << 16;
            *(vec *)(panel + j*LANES) = paired ? (vec)bits : widen_lanes(bits, b.w.dtype);
        }
    }
    for (size_t k = 0; b.k_stride == 1 && k < n_k; k += 2 * LANES, panel += 2 * LANES / step * TILE_N)
        for (size_t j = 0; j < TILE_N; j += LANES) {
            for (size_t i = 0; i < LANES; i++) rows[i] = (vec)*(const bit_vec *)view_at(b, line0 + j + i, k0 + k);
            transpose(rows);
            for (size_t i = 0; i < LANES; i++) {
                real *out = panel + 2*i / step * TILE_N + j;
                if (paired) *(vec *)out = rows[i];
                else widen_pairs((vec *)out, (vec *)(out + TILE_N), (bit_vec)rows[i], b.w.dtype);
            }
        }
}

// LANES bytes, one in each lane; and the value of each lane's code, 0 to 15. A table has no portable vector form, and
// gcc 12 widens bytes one by one: without these two instructions decoding is half as fast.
#ifdef __AVX512F__
static inline bit_vec lanes_of_bytes(const void *bytes) {
    return (bit_vec)_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
}

static inline vec values_of(bit_vec codes, const float *values) {
    return (vec)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(values));
}
#else
static inline bit_vec lanes_of_bytes(const void *bytes) {
    return __builtin_convertvector(*(const byte_vec *)bytes, bit_vec);
}

static inline vec values_of(bit_vec codes, const float *values) {
    vec out;
    for (size_t i = 0; i < LANES; i++) out[i] = values[codes[i]];
    return out;
}
#endif

// 2 LANES codes, times their scale: of 8 bits the first LANES and the next, of 4 those of high halves and of low ones.
static inline void widen_codes(vec *first, vec *second, const uint8_t *codes, Dtype dtype, float scale) {
    bit_vec bytes = lanes_of_bytes(codes);
    if (dtype == Q8) {              // shifted up and down, for the sign
        *first = __builtin_convertvector((int_vec)(bytes << 24) >> 24, vec) * scale;
        *second = __builtin_convertvector((int_vec)(lanes_of_bytes(codes + LANES) << 24) >> 24, vec) * scale;
        return;
    }
    *first = values_of(bytes >> 4, code_values[dtype - Q4]) * scale;
    *second = values_of(bytes & 15, code_values[dtype - Q4]) * scale;
}

// out: n codes from index i on, which have one scale
static void widen_block(real *out, const void *data, Dtype dtype, float scale, size_t i, size_t n) {
    size_t k = 0;
    vec first, second;
    if (dtype != Q8 && i % 2 && n) out[k++] = code_at(data, dtype, i) * scale;
    for (; k + 2*LANES <= n; k += 2*LANES) {
        widen_codes(&first, &second, (const uint8_t *)data + dtype_bytes(dtype, i + k), dtype, scale);
        vec low = SHUFFLE(first, second, LOW_LANES);
        vec high = SHUFFLE(first, second, HIGH_LANES);
        *(vec *)(out + k) = dtype == Q8 ? first : low;
        *(vec *)(out + k + LANES) = dtype == Q8 ? second : high;
    }
    for (; k < n; k++) out[k] = code_at(data, dtype, i + k) * scale;
}

// out: n numbers of a matrix, from index i of its data on
static void load_run(real *out, Weight w, size_t i, size_t n) {
    if (!w.scales) return wideners[w.dtype](out, (const char *)w.data + i * dtype_size(w.dtype), n);
    size_t per = w.scales->per, block = i / per, part = min_size(n, (block + 1) * per - i);
    for (; n; i += part, out += part, n -= part, part = min_size(n, per))
        widen_block(out, w.data, w.dtype, scale_of(w.scales, block++), i, part);
}

static void pack_b(real *panel, View b, size_t line0, size_t n_lines, size_t k0, size_t n_k) {
    // panel [n_k, TILE_N]; columns past n_lines become zero
    real lines[TILE_N * 2 * BLOCK_K];
    if (dtype_size(b.w.dtype) == 2 && n_lines == TILE_N && n_k % (2 * LANES) == 0)
        return pack_two_bytes(panel, b, line0, k0, n_k, false);
    if (n_lines < TILE_N) memset(panel, 0, n_k * TILE_N * sizeof *panel);
    if (b.k_stride != 1) {
        for (size_t k = 0; k < n_k; k++) load_run(panel + k*TILE_N, b.w, view_index(b, line0, k0 + k), n_lines);
    } else if (b.w.dtype == REAL) {
        transpose_block(panel, TILE_N, view_at(b, line0, k0), b.line_stride, n_lines, n_k);
    } else {
        for (size_t j = 0; j < n_lines; j++) load_run(lines + j*block_depth(), b.w, view_index(b, line0 + j, k0), n_k);
        transpose_block(panel, TILE_N, lines, block_depth(), n_lines, n_k);
    }
}

// The same in bf16, panel [lanes_of(n_k),TILE_N].
static void pack_b_rounded(real *panel, View b, size_t line0, size_t n_lines, size_t k0, size_t n_k) {
    real numbers[2 * BLOCK_K * TILE_N] __attribute__((aligned(64)));
    if (packing.pair == 2 && b.w.dtype == BF16 && n_lines == TILE_N && n_k % (2 * LANES) == 0)
        return pack_two_bytes(panel, b, line0, k0, n_k, true);
    size_t lanes = lanes_of(n_k);
    pack_b(numbers, b, line0, n_lines, k0, n_k);
    memset(numbers + n_k*TILE_N, 0, (lanes * packing.pair - n_k) * TILE_N * sizeof *numbers);
    for (size_t i = 0; i < lanes * TILE_N; i += LANES) {
        const real *low = numbers + i + i / TILE_N * (packing.pair - 1) * TILE_N;       // row i / TILE_N * pair
        bit_vec bits = round_lanes(*(const vec *)low);
        if (packing.pair == 2) bits = bits >> 16 | round_lanes(*(const vec *)(low + TILE_N));
        *(bit_vec *)(panel + i) = bits;
    }
}

// c [m,n] = from (NULL: 0) + scale sum; rows of c and from are c_stride apart, of sum TILE_N
static void add_edge(real *c, const real *from, size_t c_stride, const real *sum, real scale, size_t m, size_t n) {
    for (size_t i = 0; i < m; i++, sum += TILE_N)
        for (size_t j = 0; j < n; j++) c[i*c_stride + j] = (from ? from[i*c_stride + j] : 0) + scale * sum[j];
}

// c [m,n] = from (NULL: 0) + scale a b, panels a [TILE_M,BLOCK_K], b [depth,TILE_N]; rows of c and from c_stride apart
static void tile(real *c, const real *from, size_t c_stride, const real *a, const real *b, real scale, size_t m,
                 size_t n, size_t depth) {
    vec sum[TILE_M][2] = {{{0}}};
    const bit_pair *pairs = (const void *)a;
    for (size_t i = 0; from && i < m; i++)      // C is long out of the caches; by the end of the sums it is back
        __builtin_prefetch(from + i*c_stride), __builtin_prefetch(from + i*c_stride + LANES);
    for (size_t k = 0; k < depth && packing.pair == 1; k++, a++, b += TILE_N) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
        #pragma GCC unroll 6
        for (int i = 0; i < TILE_M; i++) {
            sum[i][0] += a[i*BLOCK_K] * b0;
            sum[i][1] += a[i*BLOCK_K] * b1;
        }
    }
    for (size_t k = 0; k < depth && packing.pair == 2; k++, pairs++, b += TILE_N) {
        bit_vec b0 = *(const bit_vec *)b, b1 = *(const bit_vec *)(b + LANES);
        #pragma GCC unroll 6
        for (int i = 0; i < TILE_M; i++) {
            sum[i][0] = dot_pairs(sum[i][0], pairs[i*BLOCK_K], b0);
            sum[i][1] = dot_pairs(sum[i][1], pairs[i*BLOCK_K], b1);
        }
    }
    if (m < TILE_M || n < TILE_N) return add_edge(c, from, c_stride, (const real *)sum, scale, m, n);
    #pragma GCC unroll 6
    for (int i = 0; i < TILE_M; i++, c += c_stride, from = from ? from + c_stride : NULL) {
        *(vec *)c = (from ? *(const vec *)from : (vec){0}) + scale * sum[i][0];
        *(vec *)(c + LANES) = (from ? *(const vec *)(from + LANES) : (vec){0}) + scale * sum[i][1];
    }
}

#if (defined __AMX_BF16__ || defined __AMXBF16__) && defined __AVX512BF16__ && defined __linux__     // gcc, old clang
#define AMX
#include <sys/syscall.h>
// Tile registers 0 to 3 hold C, 2 x 2 tiles of 16 rows of 64 bytes; 4 and 5 rows of A, 6 and 7 of B. B is read as it is
// packed for AVX512_BF16. One core of a Sapphire Rapids Xeon does 640 GFLOP/s so, of 140 in fp32.
static const Packing in_squares = { true, SQUARE, 2 * BLOCK_N, 2, 16 };

// Linux grants the registers on request: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
static bool may_use_squares(void) { return !syscall(SYS_arch_prctl, 0x1023, 18); }

static void begin_squares(void) {
    static const struct { uint8_t palette, first_row, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles =
        { 1, 0, {0}, { 64, 64, 64, 64, 64, 64, 64, 64 }, { 16, 16, 16, 16, 16, 16, 16, 16 } };
    _tile_loadconfig(&tiles);
}

// c [SQUARE,SQUARE] = from (NULL: 0) + a b, panels a [SQUARE,BLOCK_K], b [depth,TILE_N]. An instruction takes 16 pairs,
// sums their low products and their high ones apart, and adds the sum of both to C (Intel's manual, TDPBF16PS).
static void square(real *c, const real *from, size_t stride, const real *a, const real *b, size_t depth) {
    size_t row = stride * sizeof *c, a_row = BLOCK_K * sizeof *a, b_row = TILE_N * sizeof *b;
    if (from) {
        _tile_loadd(0, from, row);
        _tile_loadd(1, from + 16, row);
        _tile_loadd(2, from + 16*stride, row);
        _tile_loadd(3, from + 16*stride + 16, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t k = 0; k < depth; k += 16) {
        _tile_loadd(4, a + k, a_row);
        _tile_loadd(6, b + k*TILE_N, b_row);
        _tile_loadd(5, a + 16*BLOCK_K + k, a_row);
        _tile_loadd(7, b + k*TILE_N + 16, b_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + 16, row);
    _tile_stored(2, c + 16*stride, row);
    _tile_stored(3, c + 16*stride + 16, row);
}

// The same as `tile` with panels a [SQUARE,BLOCK_K].
static void square_tile(real *c, const real *from, size_t c_stride, const real *a, const real *b, real scale, size_t m,
                        size_t n, size_t depth) {
    real sum[SQUARE * TILE_N] __attribute__((aligned(64)));
    if (m == SQUARE && n == TILE_N && scale == 1) return square(c, from, c_stride, a, b, depth);
    square(sum, NULL, TILE_N, a, b, depth);
    add_edge(c, from, c_stride, sum, scale, m, n);
}
#else
static const Packing in_squares = { 0 };
static bool may_use_squares(void) { return false; }
static void begin_squares(void) {}
#define square_tile tile        // never called
#endif

void set_precision(int bf16) {
    packing = !bf16 ? unrounded : may_use_squares() ? in_squares : in_vectors;
}

// Panels of A for `rows` lines: first those of the first BLOCK_K, then of the next.
static real *panel_of_a(real *packed, size_t rows, size_t i, size_t k) {
    size_t panels = (rows + packing.rows - 1) / packing.rows;
    return packed + (k / block_depth() * panels + i / packing.rows) * packing.rows * BLOCK_K;
}

// Part of a product: rows i0 .. i0 + M, k from k0 to k0 + K, A in `packed`. At k = 0 a sum starts from `from`, then C.
typedef struct { real *c, *packed; const real *from; size_t stride; View a, b; real scale; size_t i0, M, k0, K; } Block;

// Fetches part number `part` of the block of B that is packed next. The machine's own prefetching does not foresee it,
// for it lies in many short pieces: n_lines of n_k numbers, or the other way round.
static void prefetch(View b, size_t line0, size_t n_lines, size_t k0, size_t n_k, size_t part, size_t parts) {
    bool along = b.k_stride == 1;       // lines run along k
    size_t pieces = along ? n_lines : n_k, bytes = dtype_bytes(b.w.dtype, along ? n_k : n_lines);
    for (size_t i = pieces * part / parts; i < pieces * (part + 1) / parts; i++) {
        const char *piece = view_at(b, line0 + (along ? i : 0), k0 + (along ? 0 : i));
        for (size_t at = 0; at < bytes; at += 64)
            if (along) __builtin_prefetch(piece + at, 0, 3);        // the transposition wants it in the first level
            else __builtin_prefetch(piece + at, 0, 2);
    }
}

// Rows row0 .. row0 + rows of the block, columns j0 .. j0 + columns of C. Tiles go down the columns, so that a panel of
// B stays; squares along the rows, where the machine foresees which lines of C come next (642 GFLOP/s against 534).
static void block_columns(Block p, size_t row0, size_t rows, size_t j0, size_t columns) {
    real packed_b[2 * BLOCK_N * BLOCK_K] __attribute__((aligned(64)));
    bool along = packing.rows == in_squares.rows;
    size_t down = (rows + packing.rows - 1) / packing.rows, across = (columns + TILE_N - 1) / TILE_N;
    if (along) begin_squares();
    for (size_t k = 0; k < p.K; k += block_depth()) {
        size_t n_k = min_size(block_depth(), p.K - k), next = min_size(block_depth(), p.K - k - n_k);
        size_t depth = lanes_of(n_k);
        const real *from = p.k0 + k ? p.c : p.from;
        for (size_t j = 0; j < columns; j += TILE_N)
            (packing.rounded ? pack_b_rounded : pack_b)(packed_b + j*depth, p.b, j0 + j, min_size(TILE_N, columns - j),
                                                     p.k0 + k, n_k);
        for (size_t t = 0; t < down * across; t++) {
            size_t i = row0 + (along ? t / across : t % down) * packing.rows;
            size_t j = (along ? t % across : t / down) * TILE_N;
            size_t m = min_size(packing.rows, p.M - i), n = min_size(TILE_N, columns - j);
            size_t at = (p.i0 + i) * p.stride + j0 + j;
            (along ? square_tile : tile)(p.c + at, from ? from + at : NULL, p.stride, panel_of_a(p.packed, p.M, i, k),
                                         packed_b + j*depth, p.scale, m, n, depth);
            if (!along) prefetch(p.b, j0 + j, n, p.k0 + k + n_k, next, t % down, down);
        }
    }
}

static void product_block(Block p, size_t N) {
    size_t rows = N < 8 * BLOCK_N ? TASK_ROWS : p.M;
    #pragma omp parallel if (p.M * N * p.K > WORTH_THREADS)
    {
        #pragma omp for collapse(2) schedule(static)
        for (size_t k = 0; k < p.K; k += block_depth())
            for (size_t i = 0; i < p.M; i += packing.rows)
                pack_a(panel_of_a(p.packed, p.M, i, k), p.a, p.i0 + i, min_size(packing.rows, p.M - i), p.k0 + k,
                       min_size(block_depth(), p.K - k));
        #pragma omp for collapse(2) schedule(dynamic)
        for (size_t i = 0; i < p.M; i += rows)
            for (size_t j = 0; j < N; j += packing.columns)
                block_columns(p, i, min_size(rows, p.M - i), j, min_size(packing.columns, N - j));
    }
}

static void product(real *c, const real *from, View a, View b, real scale, size_t M, size_t N, size_t K) {
    // Static, because kernels do not allocate; so one product runs at a time. Only what a shape needs is ever touched.
    static real packed[MOST_M * MOST_K] __attribute__((aligned(64)));
    for (size_t k = 0; k < K; k += MOST_K)
        for (size_t i = 0; i < M; i += MOST_M)
            product_block((Block){ c, packed, from, N, a, b, scale, i, min_size(MOST_M, M - i), k,
                                   min_size(MOST_K, K - k) }, N);
}

// The same by the calling thread alone, for attention's blocks: the rows of c [M,N] are c_stride apart, M <= SMALL_M.
enum { SMALL_M = 16 * TILE_M };     // attention of 2048 tokens: 60 % of the peak, with 64 rows 58

static void small_product(real *c, const real *from, size_t c_stride, View a, View b, real scale, size_t M, size_t N,
                          size_t K) {
    real packed[(SMALL_M + SQUARE) * BLOCK_K] __attribute__((aligned(64)));     // a tile reads whole panels
    for (size_t k = 0; k < K; k += block_depth()) {
        Block p = { c, packed, from, c_stride, a, b, scale, 0, M, k, min_size(block_depth(), K - k) };
        for (size_t i = 0; i < M; i += packing.rows)
            pack_a(panel_of_a(packed, M, i, 0), a, i, min_size(packing.rows, M - i), k, p.K);
        for (size_t j = 0; j < N; j += packing.columns) block_columns(p, 0, M, j, min_size(packing.columns, N - j));
    }
}

// Codes of w, n of them from index i on, times x [n]. x_laid: x in the order of widen_codes, where scales change only
// between whole 2 LANES; else NULL.
static real dot_codes(Weight w, size_t i, const real *x, const real *x_laid, size_t n) {
    real run[512], sum;
    size_t per = w.scales->per, block = i / per, k = 0;
    vec sums[2] = {{0}}, first, second;
    for (size_t end = min_size(n, (block + 1) * per - i); x_laid && k < n; end = min_size(n, end + per)) {
        float scale = scale_of(w.scales, block++);
        for (; k < end; k += 2*LANES) {
            const uint8_t *codes = (const uint8_t *)w.data + dtype_bytes(w.dtype, i + k);
            __builtin_prefetch(codes + 2048);
            widen_codes(&first, &second, codes, w.dtype, scale);
            sums[0] += first * *(const vec *)(x_laid + k);
            sums[1] += second * *(const vec *)(x_laid + k + LANES);
        }
    }
    sum = sum_of_lanes(sums[0] + sums[1]);
    for (size_t part; k < n; k += part) {
        part = min_size(COUNT(run), n - k);
        load_run(run, w, i + k, part);
        sum += dot(run, x + k, part);
    }
    return sum;
}

// w [n] of any dtype times x [n]. x_pairs (two-byte weights, else NULL): x with the even ones of each 2 LANES first.
static real dot_row(const void *w, Dtype dtype, const real *x, const real *x_pairs, size_t n) {
    real run[512], sum;
    size_t size = dtype_size(dtype), k = 0;
    vec sums[4] = {{0}}, even, odd;
    for (; x_pairs && k + 4*LANES <= n; k += 4*LANES) {
        #pragma GCC unroll 2
        for (size_t i = 0; i < 2; i++) {
            const uint16_t *w_k = (const uint16_t *)w + k + 2*i*LANES;
            __builtin_prefetch(w_k + 2048);
            widen_pairs(&even, &odd, *(const bit_vec *)w_k, dtype);
            sums[2*i] += even * *(const vec *)(x_pairs + k + 2*i*LANES);
            sums[2*i + 1] += odd * *(const vec *)(x_pairs + k + (2*i + 1) * LANES);
        }
    }
    sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (size_t m; k < n; k += m) {
        m = min_size(COUNT(run), n - k);
        wideners[dtype](run, (const char *)w + k * size, m);
        sum += dot(run, x + k, m);
    }
    return sum;
}

// y [n_out] = from + scale W x. Decoding is bound by memory, so W [n_out,n_in] is read once, as it lies. Two-byte
// weights are widened in pairs, and x is laid out to match. On one core this reads 34 GB/s, with a prefetch 4 KiB ahead
// 38 of the 40 that there are; by way of a widened copy 24, and with four rows at once 24.
static void one_row(real *y, const real *from, const real *x, Weight w, real scale, size_t n_out, size_t n_in) {
    static real x_pairs[1 << 16] __attribute__((aligned(64)));
    size_t size = dtype_size(w.dtype);
    bool whole = w.scales && w.scales->per % (2*LANES) == 0 && w.first % (2*LANES) == 0 && n_in % (2*LANES) == 0;
    bool pairs = (size == 2 || (whole && !size)) && n_in <= COUNT(x_pairs);
    for (size_t k = 0; pairs && k + 2*LANES <= n_in; k += 2*LANES)
        for (size_t lane = 0; lane < LANES; lane++)
            x_pairs[k + lane] = x[k + 2*lane], x_pairs[k + LANES + lane] = x[k + 2*lane + 1];
    #pragma omp parallel for if (n_out * n_in > WORTH_THREADS)
    for (size_t j = 0; j < n_out; j++) {
        const real *laid = pairs ? x_pairs : whole && w.dtype == Q8 ? x : NULL;
        const char *w_j = (const char *)w.data + (w.first + j * n_in) * size;
        real sum = w.scales ? dot_codes(w, w.first + j * n_in, x, laid, n_in)
                            : dot_row(w_j, w.dtype, x, laid, n_in);
        y[j] = (from ? from[j] : 0) + scale * sum;
    }
}

void linear_forward(real *y, const real *from, const real *x, Weight w, real scale, size_t T, size_t n_out,
                    size_t n_in) {
    if (T == 1) one_row(y, from, x, w, scale, n_out, n_in);
    else product(y, from, by_rows(x, n_in), (View){ w, n_in, 1 }, scale, T, n_out, n_in);
}

void linear_backward_input(real *dx, const real *from, const real *dy, Weight w, real scale, size_t T, size_t n_out,
                           size_t n_in) {
    product(dx, from, by_rows(dy, n_out), (View){ w, 1, n_in }, scale, T, n_in, n_out);
}

void linear_backward_weight(real *dw, const real *dy, const real *x, real scale, size_t T, size_t n_out, size_t n_in) {
    product(dw, dw, by_columns(dy, n_out), by_columns(x, n_in), scale, n_out, n_in, T);
}

// ---- 12.3 Attention ----------------------------------------------------------------------------------------------
// The formulas of 2.7. No T x T array is kept: queries and keys are taken in blocks, whose scores are small matrix
// products, with a running maximum and sum for each query (Milakov & Gimelshein 2018, arXiv:1805.02867); the backward
// computes the probabilities again from lse (Dao et al. 2022, arXiv:2205.14135). Keys that no query sees are left out.

enum { BLOCK_QUERIES = SMALL_M, BLOCK_KEYS = SMALL_M };

// A block of n queries of one head; query i sees the first n_visible + i keys of its sequence. Strides are of rows.
typedef struct { size_t n, n_visible, q_stride, kv_stride, d; real scale; } QueryBlock;

// The n keys and values that a block meets in one place: in the prefix, where it sees all, or in its sequence, where
// what it sees is causal. dk and dv (NULL: frozen, or forward) are this head's own, their rows q_stride apart.
typedef struct { const real *k, *v; real *dk, *dv; size_t n; bool causal; } KeyPart;

static size_t keys_seen(QueryBlock b, KeyPart part, size_t i) {
    return part.causal ? min_size(part.n, b.n_visible + i) : part.n;
}

// Keys j0 .. j0 + n of the part: updates out [b.n,d] (not yet divided by sum), largest [b.n], sum [b.n].
static void attend_block(real *out, real *largest, real *sum, const real *q, QueryBlock b, KeyPart part, size_t j0,
                         size_t n) {
    real score[BLOCK_QUERIES * BLOCK_KEYS];
    View k = by_rows(part.k + j0*b.kv_stride, b.kv_stride), v = by_columns(part.v + j0*b.kv_stride, b.kv_stride);
    small_product(score, NULL, BLOCK_KEYS, by_rows(q, b.q_stride), k, b.scale, b.n, n, b.d);
    for (size_t i = 0; i < b.n; i++) {
        real *score_i = score + i*BLOCK_KEYS, before = largest[i], *out_i = out + i*b.q_stride;
        size_t seen = min_size(n, max_size(keys_seen(b, part, i), j0) - j0);
        for (size_t j = seen; j < n; j++) score_i[j] = 0;
        if (!seen) continue;
        real top = largest_of(before, score_i, seen), shrink = real_exp(before - top);
        for (size_t j = 0; j < seen; j++) score_i[j] = real_exp(score_i[j] - top);
        sum[i] = shrink * sum[i] + (real)sum_of(score_i, seen);
        for (size_t c = 0; c < b.d; c++) out_i[c] *= shrink;
        largest[i] = top;
    }
    small_product(out, out, b.q_stride, by_rows(score, BLOCK_KEYS), v, 1, b.n, b.d, n);
}

static void attend(real *out, real *lse, size_t lse_stride, const real *q, QueryBlock b, const KeyPart *parts) {
    real largest[BLOCK_QUERIES], sum[BLOCK_QUERIES];
    for (size_t i = 0; i < b.n; i++) {
        largest[i] = -(real)INFINITY, sum[i] = 0;
        memset(out + i*b.q_stride, 0, b.d * sizeof *out);
    }
    for (const KeyPart *part = parts; part < parts + 2; part++)
        for (size_t j = 0, n = keys_seen(b, *part, b.n - 1); j < n; j += BLOCK_KEYS)
            attend_block(out, largest, sum, q, b, *part, j, min_size(BLOCK_KEYS, n - j));
    for (size_t i = 0; i < b.n; i++) {
        for (size_t c = 0; c < b.d; c++) out[i*b.q_stride + c] /= sum[i];
        lse[i*lse_stride] = largest[i] + real_log(sum[i]);
    }
}

// The block of queries that begins at query i of sequence b.
static QueryBlock query_block(AttentionShape s, size_t b, size_t i) {
    size_t n = s.starts[b+1] - s.starts[b], past = s.kv_starts[b+1] - s.kv_starts[b] - n, d = s.head_dim;
    return (QueryBlock){ min_size(BLOCK_QUERIES, n - i), past + i + 1, s.n_heads*d, s.n_kv_heads*d, d,
                         1 / real_sqrt((real)d) };
}

void attention_forward(real *out, real *lse, const real *q, const real *k, const real *v, const real *prefix_k,
                       const real *prefix_v, AttentionShape s) {
    size_t d = s.head_dim, stride = s.n_kv_heads * d, blocks = (s.most_queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
    #pragma omp parallel for collapse(3) schedule(dynamic) if (s.T * s.n_heads * d > WORTH_THREADS)
    for (size_t b = 0; b < s.n_sequences; b++)
        for (size_t block = 0; block < blocks; block++)
            for (size_t h = 0; h < s.n_heads; h++) {
                size_t at = h / (s.n_heads / s.n_kv_heads) * d, i = block * BLOCK_QUERIES;  // at: place in a row
                if (i >= s.starts[b+1] - s.starts[b]) continue;
                size_t row = s.kv_starts[b]*stride + at, th = (s.starts[b] + i)*s.n_heads + h;
                KeyPart parts[] = { { .n = s.n_prefix },
                                    { k + row, v + row, NULL, NULL, s.kv_starts[b + 1] - s.kv_starts[b], true } };
                if (s.n_prefix) parts[0].k = prefix_k + at, parts[0].v = prefix_v + at;
                attend(out + th*d, lse + th, s.n_heads, q + th*d, query_block(s, b, i), parts);
            }
}

// The rows of a block of queries in the backward: q, dout and dq, lse with its own stride, and D_i = out_i . dout_i.
typedef struct { const real *q, *dout, *lse, *D; real *dq; size_t lse_stride; } QueryRows;

// One block of queries against keys j0 .. j0 + n of the part: adds what they give to dq, dk and dv (2.7).
static void attend_block_backward(QueryRows r, QueryBlock b, KeyPart part, size_t j0, size_t n) {
    real p[BLOCK_QUERIES * BLOCK_KEYS], ds[BLOCK_QUERIES * BLOCK_KEYS];
    const real *k = part.k + j0*b.kv_stride, *v = part.v + j0*b.kv_stride;
    small_product(p, NULL, BLOCK_KEYS, by_rows(r.q, b.q_stride), by_rows(k, b.kv_stride), b.scale, b.n, n, b.d);
    small_product(ds, NULL, BLOCK_KEYS, by_rows(r.dout, b.q_stride), by_rows(v, b.kv_stride), 1, b.n, n, b.d);
    for (size_t i = 0; i < b.n; i++) {
        real *p_i = p + i*BLOCK_KEYS, *ds_i = ds + i*BLOCK_KEYS, lse = r.lse[i*r.lse_stride];
        size_t seen = min_size(n, max_size(keys_seen(b, part, i), j0) - j0);
        for (size_t j = 0; j < seen; j++) {
            p_i[j] = real_exp(p_i[j] - lse);
            ds_i[j] = p_i[j] * (ds_i[j] - r.D[i]);
        }
        for (size_t j = seen; j < n; j++) p_i[j] = ds_i[j] = 0;
    }
    small_product(r.dq, r.dq, b.q_stride, by_rows(ds, BLOCK_KEYS), by_columns(k, b.kv_stride), b.scale, b.n, b.d, n);
    if (!part.dk) return;
    real *dk = part.dk + j0 * b.q_stride, *dv = part.dv + j0 * b.q_stride;
    small_product(dk, dk, b.q_stride, by_columns(ds, BLOCK_KEYS), by_columns(r.q, b.q_stride), b.scale, n, b.d, b.n);
    small_product(dv, dv, b.q_stride, by_columns(p, BLOCK_KEYS), by_columns(r.dout, b.q_stride), 1, n, b.d, b.n);
}

static void attend_backward(QueryRows r, const real *out, QueryBlock b, const KeyPart *parts) {
    real D[BLOCK_QUERIES];
    for (size_t i = 0; i < b.n; i++) D[i] = dot(r.dout + i*b.q_stride, out + i*b.q_stride, b.d);
    r.D = D;
    for (const KeyPart *part = parts; part < parts + 2; part++)
        for (size_t j = 0, n = keys_seen(b, *part, b.n - 1); j < n; j += BLOCK_KEYS)
            attend_block_backward(r, b, *part, j, min_size(BLOCK_KEYS, n - j));
}

// dkv [rows,n_kv_heads,d] = the sum of by_head [rows,n_heads,d] over the heads of a group, in order; NULL: not wanted
static void add_heads(real *dkv, const real *by_head, size_t rows, AttentionShape s) {
    size_t group = s.n_heads / s.n_kv_heads, d = s.head_dim;
    #pragma omp parallel for if (rows * s.n_heads * d > WORTH_THREADS)
    for (size_t row = 0; row < (dkv ? rows : 0); row++)
        for (size_t h = 0; h < s.n_heads; h++) {
            const real *head = by_head + (row * s.n_heads + h) * d;
            real *sum = dkv + (row * s.n_kv_heads + h / group) * d;
            if (h % group) axpy(sum, 1, head, d);
            else memcpy(sum, head, d * sizeof *sum);
        }
}

// dk and dv of each query head are computed in scratch, so that a head is one thread's work, and then added up.
void attention_backward(real *dq, real *dk, real *dv, real *dprefix_k, real *dprefix_v, real *scratch,
                        const real *dout, const real *out, const real *lse, const real *q, const real *k, const real *v,
                        const real *prefix_k, const real *prefix_v, AttentionShape s) {
    size_t d = s.head_dim, stride = s.n_kv_heads * d, n_all = (s.T + s.n_prefix) * s.n_heads * d;
    real *dk_heads = scratch, *dv_heads = scratch + n_all, *prefix_heads = scratch + s.T * s.n_heads * d;
    bool prefix_trains = dprefix_k || dprefix_v;
    // Sequences share the prefix, so where it trains one thread must take them all.
    size_t together = prefix_trains && s.n_sequences ? s.n_sequences : 1;
    zero(scratch, 2 * n_all), zero(dq, s.T * s.n_heads * d);
    #pragma omp parallel for collapse(2) schedule(dynamic) if (s.T * s.n_heads * d > WORTH_THREADS)
    for (size_t b0 = 0; b0 < s.n_sequences; b0 += together)
        for (size_t h = 0; h < s.n_heads; h++)
            for (size_t b = b0; b < b0 + together; b++) {
                size_t at = h / (s.n_heads / s.n_kv_heads) * d, row = s.starts[b], n = s.starts[b+1] - row;
                size_t own = row*stride + at, own_head = (row*s.n_heads + h)*d;
                KeyPart parts[] = { { .n = s.n_prefix },
                                    { k + own, v + own, dk_heads + own_head, dv_heads + own_head, n, true } };
                if (s.n_prefix) parts[0].k = prefix_k + at, parts[0].v = prefix_v + at;
                if (prefix_trains) parts[0].dk = prefix_heads + h*d, parts[0].dv = prefix_heads + n_all + h*d;
                for (size_t i = 0; i < n; i += BLOCK_QUERIES) {
                    size_t th = (row + i)*s.n_heads + h;
                    QueryRows r = { q + th*d, dout + th*d, lse + th, NULL, dq + th*d, s.n_heads };
                    attend_backward(r, out + th*d, query_block(s, b, i), parts);
                }
            }
    add_heads(dk, dk_heads, s.T, s), add_heads(dv, dv_heads, s.T, s);
    add_heads(dprefix_k, prefix_heads, s.n_prefix, s), add_heads(dprefix_v, prefix_heads + n_all, s.n_prefix, s);
}
#endif  // FAST

// ==== 13  Files ==================================================================================================
// Everything that is read or written: what is written is whole or not there, what is read is checked before it is used.

// ---- 13.1 Whole or not there -------------------------------------------------------------------------------------
// A file or folder is written under another name beside its own, synced, and renamed when it is complete. What was
// begun and not finished is known here, and removed when the program stops with an error.

static char *unfinished[4];

static void remove_tree(const char *path) {
    struct stat s;
    if (!lstat(path, &s) && S_ISDIR(s.st_mode)) remove_inside(path, "");
    remove(path);
}

static bool ends_in(const char *file, const char *ending) {
    size_t n = strlen(file), tail = strlen(ending);
    return n > tail && !strcmp(file + n - tail, ending);
}

static void remove_inside(const char *folder, const char *ending) {     // "": all; TEMPORARY: what a killed run left
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d)); ) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") || !ends_in(e->d_name, ending)) continue;
        char *path = strf("%s/%s", folder, e->d_name);
        remove_tree(path);
        free(path);
    }
    if (d) closedir(d);
}

static void discard_unfinished(void) {      // newest first, for a file may lie in an unfinished folder
    const char *kept = worth_keeping;
    worth_keeping = NULL;
    for (size_t i = COUNT(unfinished); i-- > 0; ) {
        if (!unfinished[i]) continue;
        if (unfinished[i] != kept) { remove_tree(unfinished[i]); continue; }
        finish_output(kept);
        fprintf(stderr, "the adapter is saved all the same, without the optimizer's state: %.*s\n",
                (int)(strlen(kept) - strlen(TEMPORARY)), kept);
    }
    unlock_folder();
}

static const char *begin_output(const char *path) {
    size_t n = strlen(path), i = 0;
    if (!n) fail("the name of a file or folder to write is empty");
    while (n > 1 && path[n-1] == '/') n--;
    while (i < COUNT(unfinished) && unfinished[i]) i++;
    if (i == COUNT(unfinished)) fail("internal error: more than %zu files are being written at once", i);
    return unfinished[i] = strf("%.*s" TEMPORARY, (int)n, path);
}

static void sync_path(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

static void finish_output(const char *temporary) {
    char *final = strf("%.*s", (int)(strlen(temporary) - strlen(TEMPORARY)), temporary), *slash = strrchr(final, '/');
    sync_path(temporary);
    if (rename(temporary, final)) fail("%s: cannot be given its name: %s", final, strerror(errno));
    if (slash) *slash = 0;
    sync_path(slash ? final : ".");
    free(final);
    size_t i = 0;
    while (unfinished[i] != temporary) i++;
    unfinished[i] = NULL;       // and not freed: the thread of 13.2 may look at it
}

__attribute__((noreturn)) static void fail_writing(const char *path) {
    fail("%s: writing failed: %s; free some space or choose another folder", path, strerror(errno));
}

static FILE *open_to_write(const char *temporary) {
    FILE *f = fopen(temporary, "wbe");
    if (!f) fail("%s: cannot be written: %s", temporary, strerror(errno));
    return f;
}

static void close_written(FILE *f, const char *path) {
    bool bad = ferror(f) || fflush(f) || fsync(fileno(f));
    if (fclose(f) || bad) fail_writing(path);
}

static void write_file(const char *path, const char *bytes, size_t n) {
    const char *temporary = begin_output(path);
    FILE *f = open_to_write(temporary);
    if (n) fwrite(bytes, 1, n, f);
    close_written(f, path);
    finish_output(temporary);
}

static bool is_folder(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

static void make_folders(const char *path) {
    if (!*path) fail("the name of a folder to write to is empty");
    for (size_t n = 0; path[n]; ) {
        n += 1 + strcspn(path + n + 1, "/");
        char *upper = strf("%.*s", (int)n, path);
        if (mkdir(upper, 0777) && errno != EEXIST) fail("%s: the folder cannot be made: %s", upper, strerror(errno));
        free(upper);
    }
    if (!is_folder(path)) fail("%s: is a file, and a folder is needed", path);
}

// An output never replaces what its command reads, and another file only with --force.
static void check_out(const char *out, const char *const *inputs, size_t n, bool force) {
    const char *path = out ? realpath(out, NULL) : NULL;
    for (size_t i = 0; path && i < n; i++) {
        const char *input = inputs[i] ? realpath(inputs[i], NULL) : NULL;
        if (input && !strncmp(path, input, strlen(input)) && strchr("/", path[strlen(input)]))      // it, or in it
            fail("%s: is read by this command, or lies in a folder that is; name another file to write", out);
    }
    if (path && !force) fail("%s: exists already; name another file, or --force", out);
    const char *slash = out ? strrchr(out, '/') : NULL, *folder = slash ? strf("%.*s/", (int)(slash - out), out) : ".";
    if (out && access(folder, W_OK)) fail("%s: cannot be written: %s", out, strerror(errno));
}

static void want_new_folder(const char *path) {
    if (exists(path) && rmdir(path)) fail("%s: exists already; name a new folder", path);
}

// The folder of a run is one run's at a time: a lock on a file in it lasts until the process ends, however that is.
static char *locked, *new_folder;       // that file; the folder, where it was not there
static size_t new_n;                    // letters of the shortest part of its path that was not there either

static void lock_folder(const char *folder) {
    struct stat ours, there;
    if (*folder && !exists(folder)) new_folder = strf("%s", folder);
    // another run may make all of them at this moment
    while (new_folder && folder[new_n] && (!new_n || exists(strf("%.*s", (int)new_n, folder))))
        new_n += 1 + strcspn(folder + new_n + 1, "/");
    make_folders(folder);
    for (char *path = strf("%s/run.lock", folder); !locked; ) {
        struct flock lock = { .l_type = F_WRLCK };
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0) fail("%s: cannot be written: %s", path, strerror(errno));
        bool held = fcntl(fd, F_SETLK, &lock) && (errno == EACCES || errno == EAGAIN);
        if (held && !fcntl(fd, F_GETLK, &lock) && lock.l_type != F_UNLCK)
            fail("%s: process %d is training there; wait for its end, or choose another --output_dir", folder,
                 (int)lock.l_pid);
        if (!held && !fstat(fd, &ours) && !stat(path, &there) && ours.st_ino == there.st_ino) locked = path;
        else close(fd);     // whoever ended in between has taken the file away
    }
}

static void unlock_folder(void) {       // and new folders go in which nothing came to stand
    if (locked) unlink(locked);
    for (char *p = new_folder, *slash; p && strlen(p) >= new_n && !rmdir(p) && (slash = strrchr(p, '/')); ) *slash = 0;
}

static const char *begin_folder(const char *path) {
    const char *temporary = begin_output(path);
    remove_tree(temporary);
    make_folders(temporary);
    return temporary;
}

// The whole of an open file; a NUL follows the last byte.
static char *read_stream(FILE *f, const char *path, size_t *n) {
    Text t = {0};
    char block[1 << 16];
    text_add(&t, "", 0);
    for (size_t got; (got = fread(block, 1, sizeof block, f)) > 0; ) text_add(&t, block, got);
    if (ferror(f)) fail("%s: cannot be read: %s", path, strerror(errno));
    *n = t.n;
    return t.s;
}

static char *read_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rbe");
    if (!f) fail("%s: cannot be opened: %s", path, strerror(errno));
    char *bytes = read_stream(f, path, n);
    fclose(f);
    return bytes;
}

// Ends the program where a file is not what its name says.
static void refuse_disguise(const char *path, const char *bytes, size_t n) {
    static const struct { const char *begins; size_t n; const char *is; } kinds[] = {
        { "version https://git-lfs", 23, "a Git LFS pointer, not the file itself; run git lfs pull in its folder, or "
                                         "download the file" },
        { "\x1F\x8B", 2, "compressed; unpack it first (gunzip)" },
        { "BZh", 3, "compressed; unpack it first (bunzip2)" },
        { "\xFD" "7zXZ", 5, "compressed; unpack it first (unxz)" },
        { "\x28\xB5\x2F\xFD", 4, "compressed; unpack it first (unzstd)" },
        { "PK\3\4", 4, "a zip archive; unpack it first (a workbook: save it as JSON)" },
        { "PAR1", 4, "Parquet; turn it into JSON (pandas: read_parquet(IN).to_json(OUT, orient='records'))" },
        { "\xFF\xFE\0\0", 4, "UTF-32 text; convert it (iconv -f utf-32 -t utf-8)" },
        { "{\0", 2, "UTF-16 text; convert it (iconv -f utf-16le -t utf-8)" },
        { "[\0", 2, "UTF-16 text; convert it (iconv -f utf-16le -t utf-8)" },
        { "\0{", 2, "UTF-16 text; convert it (iconv -f utf-16be -t utf-8)" },
        { "\0[", 2, "UTF-16 text; convert it (iconv -f utf-16be -t utf-8)" },
        { "\xFF\xFE", 2, "UTF-16 text; convert it (iconv -f utf-16 -t utf-8)" },
        { "\xFE\xFF", 2, "UTF-16 text; convert it (iconv -f utf-16 -t utf-8)" },
        { "<!", 2, "a web page, not the file itself; download it again" },
        { "<html", 5, "a web page, not the file itself; download it again" },
    };
    for (size_t i = 0; i < COUNT(kinds); i++)
        if (n >= kinds[i].n && !memcmp(bytes, kinds[i].begins, kinds[i].n)) fail("%s: is %s", path, kinds[i].is);
}

// ---- 13.2 Signals, clock and progress ----------------------------------------------------------------------------

// SIGINT, SIGTERM and SIGHUP (as when a terminal closes) come to a thread of their own, which may do what a handler may
// not. They end the program at once; while it trains, the first one asks it to end when its step is done.
static void *wait_for_signals(void *signals) {
    for (int n; !sigwait(signals, &n); ) {
        if (under_way && !stop_signal) { stop_signal = n; continue; }
        end_alone();
        discard_unfinished();
        _exit(128 + n);
    }
    return NULL;
}

static void watch_signals(void) {
    static sigset_t signals;
    pthread_t thread;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    if (signal(SIGHUP, SIG_IGN) != SIG_IGN) sigaddset(&signals, SIGHUP);    // under nohup it stays ignored
    signal(SIGHUP, sigismember(&signals, SIGHUP) ? SIG_DFL : SIG_IGN);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);         // for the threads that come later, too
    if (pthread_create(&thread, NULL, wait_for_signals, &signals)) pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Seconds that all threads of this process together have waited for a core (Linux; elsewhere 0).
static double waited_for_cores(void) {
    double sum = 0;
    DIR *threads = opendir("/proc/self/task");
    for (struct dirent *e; threads && (e = readdir(threads)); ) {
        unsigned long long waited = 0;      // the second number, in ns
        char *path = strf("/proc/self/task/%s/schedstat", e->d_name);
        FILE *f = fopen(path, "re");
        if (f && fscanf(f, "%*u %llu", &waited) == 1) sum += (double)waited * 1e-9;
        if (f) fclose(f);
        free(path);
    }
    if (threads) closedir(threads);
    return sum;
}

// Where other programs want the cores as well, every step waits for the thread that shares one, and a thread less is
// faster. A span of 0.3 s or more in which threads waited for a quarter of it leads to a trial of one with a thread
// less; unless that is clearly slower, it stays so for 10 s. The bits do not depend on it. tokens: computed so far.
static void share_cores(double tokens) {
    static double span_began, waited_then, tokens_then, speed_before_trial, next_trial;
    static int all;
    double now = seconds(), span = now - span_began;
    int n = omp_get_max_threads();
    if (span < 0.3) return;
    double waited = waited_for_cores(), speed = (tokens - tokens_then) / span;
    bool crowded = waited - waited_then > 0.25 * span, trial = speed_before_trial > 0, rests = now <= next_trial;
    bool slower = trial && speed < 0.85 * speed_before_trial;
    if (!all) all = n;
    if (trial) next_trial = now + 10;
    speed_before_trial = 0;
    if (slower || (n < all && !trial && !rests)) omp_set_num_threads(all);
    else if (crowded && !rests && n > (all + 1) / 2) omp_set_num_threads(n - 1), speed_before_trial = speed;
    span_began = now, waited_then = waited, tokens_then = tokens;
}

// The width of the terminal that a descriptor is, in columns; 0: it is none.
static size_t terminal_columns(int fd) {
    struct winsize size;
    if (!isatty(fd)) return 0;
    return !ioctl(fd, TIOCGWINSZ, &size) && size.ws_col ? size.ws_col : 80;
}

static bool passing_line;       // a line that is to be rewritten stands on the terminal

static void end_passing_line(void) {
    if (passing_line) fputs("\r\033[K", stderr);
    passing_line = false;
}

// Lines without `keep` are cut to the terminal's width, so that none wraps.
__attribute__((format(printf, 2, 3))) static void progress(bool keep, const char *format, ...) {
    size_t columns = terminal_columns(2);
    if (!columns && !keep) return;
    va_list args;
    char *line = NULL;
    va_start(args, format);
    if (vasprintf(&line, format, args) < 0) fail("out of memory for a line");
    va_end(args);
    end_passing_line();
    if (keep) fprintf(stderr, "%s\n", line);
    else fprintf(stderr, "%.*s", (int)columns - 1, line), passing_line = true;
    fflush(stderr);
    free(line);
}

// ---- 13.3 JSON ---------------------------------------------------------------------------------------------------
// Configs, safetensors headers and data sets are JSON (RFC 8259). JSON lines and one big array are read alike: a value
// is a tree of nodes that live until the next is asked for. A node knows where it began, so errors name the place.

#define BYTE_ORDER_MARK "\xEF\xBB\xBF"         // as Windows editors leave it
enum { JSON_DEPTH = 100 };      // levels of nesting; real files have five, and the parser's stack must have an end

static JsonReader json_open(const char *file, const char *source, size_t n) {
    JsonReader r = { .file = file, .language = "JSON", .source = source, .n = n };
    if (n >= 3 && !memcmp(source, BYTE_ORDER_MARK, 3)) r.at = 3;
    r.strings = alloc(n + 1, 1);
    r.blocks = r.block = alloc(1, sizeof(JsonBlock));
    return r;
}

static JsonReader json_open_file(const char *path) {
    size_t n;
    char *own = read_file(path, &n);
    refuse_disguise(path, own, n);
    JsonReader r = json_open(path, own, n);
    r.own = own;
    return r;
}

static void json_close(JsonReader *r) {
    for (JsonBlock *b = r->blocks, *next; b; b = next) next = b->next, free(b);
    free(r->strings), free(r->own);
}

static const char *json_where(const JsonReader *r, size_t at) {
    size_t line = 1, column = 1;        // in characters, not bytes
    for (size_t i = 0; i < at && i < r->n; i++) {
        if (r->source[i] == '\n') line++, column = 1;
        else if (((unsigned char)r->source[i] & 0xC0) != 0x80) column++;
    }
    if (!r->outer) return strf("%s:%zu:%zu", r->file, line, column);
    return strf("%s, in \"%s\":%zu:%zu", where(r->outer, r->text), r->text->key, line, column);
}

// Of a text that is not UTF-8 here: all of it is in another encoding, or, where Chinese text has been read, a part.
static const char *encoding_problem(const JsonReader *r) {
    for (size_t i = 3; i < r->at; i++)      // 3: behind a byte order mark
        if ((unsigned char)r->source[i] >= 0xE0)
            return "the text is UTF-8 before this place and not here: this part alone is in another encoding";
    return "the text is not UTF-8; convert it (iconv -f gb18030 -t utf-8; traditional characters: -f big5)";
}

// Ends the program. A character that no keyboard for English has is named, for it may look like the one expected.
__attribute__((noreturn)) static void json_fail(const JsonReader *r, const char *problem) {
    size_t lines = 0, at = min_size(r->at, r->n), near = at, length;
    uint32_t here = at < r->n ? utf8_get(r->source + at, r->n - at, &length) : 0;
    if (here == INVALID && (r->started || !*problem)) problem = encoding_problem(r);
    else if (here >= 0x80 && here != INVALID)
        problem = strf("%s, not '%.*s' (U+%04X)", problem, (int)length, r->source + at, here);
    for (size_t i = r->began; i < at; i++) lines += r->source[i] == '\n';
    while (near > r->began && at - near < 20 && (unsigned char)r->source[near-1] >= ' ') near--;
    while (near < at && ((unsigned char)r->source[near] & 0xC0) == 0x80) near++;    // begin with a whole character
    fail("%s: this is no %s: %s; near %s%s%s", json_where(r, r->at), r->language, problem,
         excerpt(r->source + near, r->n - near), lines ? "; the value began at " : "",
         lines ? json_where(r, r->began) : "");
}

static Json *json_node(JsonReader *r, JsonType type) {
    if (r->block->used == COUNT(r->block->nodes)) {
        if (!r->block->next) r->block->next = alloc(1, sizeof(JsonBlock));
        r->block = r->block->next;
        r->block->used = 0;
    }
    Json *j = &r->block->nodes[r->block->used++];
    *j = (Json){ .type = type, .at = r->at };
    return j;
}

// The byte that is `ahead` bytes from here; behind the end of the file, a line break.
static char json_peek(const JsonReader *r, size_t ahead) {
    return r->at + ahead < r->n ? r->source[r->at + ahead] : '\n';
}

static char json_skip_space(JsonReader *r) {
    while (r->at < r->n && r->source[r->at] && strchr(" \t\r\n", r->source[r->at])) r->at++;
    return json_peek(r, 0);
}

static bool json_accept(JsonReader *r, char c) {
    bool there = json_skip_space(r) == c;
    r->at += there;
    return there;
}

static uint32_t json_hex4(JsonReader *r) {
    uint32_t c = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        int digit = tolower((unsigned char)json_peek(r, 0));
        if (!isxdigit(digit)) json_fail(r, "\\u wants four hexadecimal digits");
        c = c * 16 + (uint32_t)(isdigit(digit) ? digit - '0' : digit - 'a' + 10);
    }
    return c;
}

// The character after a backslash; a pair of surrogates is one character, half a pair becomes U+FFFD.
static size_t json_escape(JsonReader *r, char *out) {
    const char *from = "\"\\/bfnrt", *to = "\"\\/\b\f\n\r\t", *f;
    char c = r->at < r->n ? r->source[r->at++] : 0;
    if (c && (f = strchr(from, c))) return *out = to[f - from], 1;
    if (c != 'u') r->at--, json_fail(r, "a backslash must be followed by one of \" \\ / b f n r t u");
    uint32_t high = json_hex4(r);
    if (high >= 0xD800 && high < 0xDC00 && r->at + 6 <= r->n && !memcmp(r->source + r->at, "\\u", 2)) {
        size_t back = r->at;
        r->at += 2;
        uint32_t low = json_hex4(r);
        if (low >= 0xDC00 && low < 0xE000) return utf8_put(out, 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00));
        r->at = back;
    }
    return utf8_put(out, high >= 0xD800 && high < 0xE000 ? 0xFFFD : high);
}

// Reads a string from behind its opening quote on.
static const char *json_string(JsonReader *r, size_t *count) {
    char *start = r->strings + r->strings_used, *out = start;
    for (;;) {
        if (r->at >= r->n) json_fail(r, "the file ends inside a string");
        unsigned char c = (unsigned char)r->source[r->at];
        if (c < 0x20) json_fail(r, "a line break or control character inside a string; write it as \\n or \\u00XX");
        size_t n;
        uint32_t character = utf8_get(r->source + r->at, r->n - r->at, &n);
        if (character == INVALID) json_fail(r, "");
        if (c != '"' && c != '\\') memcpy(out, r->source + r->at, n), out += n;
        r->at += n;
        if (c == '"') break;
        if (c == '\\') out += json_escape(r, out);
    }
    *out = 0;
    *count = (size_t)(out - start);
    r->strings_used += *count + 1;
    return start;
}

// Digits begin n bytes ahead, or json_fail; returns how far ahead they end.
static size_t json_digits(const JsonReader *r, size_t n, const char *problem) {
    if (!isdigit((unsigned char)json_peek(r, n))) json_fail(r, problem);
    while (isdigit((unsigned char)json_peek(r, n))) n++;
    return n;
}

static Json *json_number(JsonReader *r) {
    Json *j = json_node(r, JSON_NUMBER);
    bool in_front = r->started && r->at == r->began;
    const char *wrong = !in_front ? "a value was expected here" : "a sample in braces was expected here (pandas makes "
                        "such of a table: read_csv(IN).to_json(OUT, orient='records', lines=True))";
    size_t whole = json_peek(r, 0) == '-', n = json_digits(r, whole, wrong);
    if (json_peek(r, whole) == '0' && n > whole + 1) json_fail(r, wrong);
    if (json_peek(r, n) == '.') n = json_digits(r, n + 1, "digits must follow the decimal point");
    if ((json_peek(r, n) | 32) == 'e') {
        char sign = json_peek(r, ++n);
        n = json_digits(r, n + (sign == '+' || sign == '-'), "digits must follow the exponent's e");
    }
    char *copy = strndup(r->source + r->at, n);
    j->number = strtod(checked(copy, n), NULL);
    free(copy);
    r->at += n;
    return j;
}

static Json *json_value(JsonReader *r, int depth);

static Json *json_members(JsonReader *r, JsonType type, int depth) {
    Json *j = json_node(r, type), **end = &j->first;
    char closing = type == JSON_OBJECT ? '}' : ']';
    r->at++;
    if (depth == JSON_DEPTH) json_fail(r, strf("nested deeper than %d levels", JSON_DEPTH));
    if (json_accept(r, closing)) return j;
    do {
        const char *key = NULL;
        size_t key_length;
        if (type == JSON_OBJECT) {
            if (!json_accept(r, '"')) json_fail(r, "a name in double quotes was expected here");
            key = json_string(r, &key_length);
            if (!json_accept(r, ':')) json_fail(r, "a colon was expected here");
        }
        *end = json_value(r, depth + 1);
        (*end)->key = key;
        end = &(*end)->next;
        j->count++;
    } while (json_accept(r, ','));
    if (!json_accept(r, closing)) json_fail(r, strf("a comma or %c was expected here", closing));
    return j;
}

static Json *json_value(JsonReader *r, int depth) {
    // the last three words are no JSON, but Python's json writes them
    static const struct { const char *word; JsonType type; double number; } words[] = {
        { "null", JSON_NULL, 0 }, { "true", JSON_BOOL, 1 }, { "false", JSON_BOOL, 0 },
        { "NaN", JSON_NUMBER, NAN }, { "Infinity", JSON_NUMBER, INFINITY }, { "-Infinity", JSON_NUMBER, -INFINITY } };
    char c = json_skip_space(r);
    if (c == '{') return json_members(r, JSON_OBJECT, depth);
    if (c == '[') return json_members(r, JSON_ARRAY, depth);
    if (c == '"') {
        Json *j = json_node(r, JSON_STRING);
        r->at++;
        j->text = json_string(r, &j->count);
        return j;
    }
    for (size_t i = 0; i < COUNT(words); i++) {
        size_t n = strlen(words[i].word);
        if (r->n - r->at < n || memcmp(r->source + r->at, words[i].word, n)) continue;
        Json *j = json_node(r, words[i].type);
        j->number = words[i].number;
        r->at += n;
        return j;
    }
    if (r->at >= r->n) json_fail(r, "the file ends where a value was expected");
    return json_number(r);
}

static Json *json_next(JsonReader *r) {
    r->block = r->blocks;
    r->block->used = r->strings_used = 0;
    if (!r->started) {
        r->started = true;
        r->in_array = json_accept(r, '[') && !json_accept(r, ']');
    } else if (r->in_array && !json_accept(r, ',')) {
        if (!json_accept(r, ']')) json_fail(r, "a comma or ] was expected here");
        json_skip_space(r);
        if (r->at < r->n) json_fail(r, "something follows the end of the array");
        r->in_array = false;
    }
    json_skip_space(r);
    if (r->n - r->at >= 3 && !memcmp(r->source + r->at, BYTE_ORDER_MARK, 3)) r->at += 3;    // where files were joined
    json_skip_space(r);
    r->began = r->at;
    if (r->at < r->n) return json_value(r, 0);
    if (r->in_array) json_fail(r, "the file ends inside an array");
    return NULL;
}

static Json *json_only(JsonReader *r) {
    json_skip_space(r);
    if (r->at >= r->n) json_fail(r, "it is empty");
    Json *j = json_value(r, 0);
    json_skip_space(r);
    if (r->at < r->n) json_fail(r, "something follows the end of the value");
    return j;
}

static Json *json_get(const Json *object, const char *key) {
    Json *found = NULL;
    if (object && object->type == JSON_OBJECT)
        for (Json *j = object->first; j; j = j->next) if (!strcmp(j->key, key)) found = j;     // the last one counts
    return found;
}

static const char *json_key(const Json *object, const char *key, const char *other) {
    return json_get(object, other) && !json_get(object, key) ? other : key;
}

static void text_string(Text *t, const char *s, size_t n, bool repr) {
    const char *from = repr ? "\\\n\r\t" : "\\\n\r\t\b\f", *to = "\\nrtbf";
    char quote = repr && (!memchr(s, '\'', n) || memchr(s, '"', n)) ? '\'' : '"';
    text_add(t, &quote, 1);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        const char *escaped = c ? strchr(from, c) : NULL;
        if (escaped || s[i] == quote) text_print(t, "\\%c", escaped ? to[escaped - from] : quote);
        else if (c < ' ' || (repr && c == 127)) text_print(t, repr ? "\\x%02x" : "\\u%04x", c);
        else text_add(t, s + i, 1);
    }
    text_add(t, &quote, 1);
}

// ---- 13.4 YAML ---------------------------------------------------------------------------------------------------
// Of YAML what the official configs hold: "name: value" lines, nested by indentation; a value is a scalar, scalars in
// brackets or braces, or lines below it ("name: value", "- scalar"). All else is refused. Types are those of YAML 1.2,
// as the official scripts read them: 5e-4 is a number, `no` a word. The tree is JSON's; every scalar keeps its `text`.

// Moves over spaces and a comment; returns what comes then, a line break at the end of the line.
static char yaml_skip(JsonReader *r) {
    while (json_peek(r, 0) == ' ' || json_peek(r, 0) == '\r') r->at++;
    bool comment = json_peek(r, 0) == '#' && (r->at == r->began || r->source[r->at-1] == ' ');
    while (comment && json_peek(r, 0) != '\n') r->at++;
    return json_peek(r, 0);
}

// Moves to the next line that says something; returns its indentation, -1 at the end of the file.
static long yaml_next_line(JsonReader *r) {
    while (yaml_skip(r) == '\n' && r->at < r->n) r->began = ++r->at;
    return r->at < r->n ? (long)(r->at - r->began) : -1;
}

// Whether the dash or colon c is here and has a blank behind it; without one it is a letter of a word.
static bool yaml_is(const JsonReader *r, char c) { return json_peek(r, 0) == c && strchr(" \r\n,]}", json_peek(r, 1)); }

// A scalar, which ends on this line; where there is none, null.
static Json *yaml_scalar(JsonReader *r) {
    Json *j = json_node(r, JSON_STRING);
    bool quoted = json_peek(r, 0) == '\'';
    if (json_peek(r, 0) == '"') return r->at++, j->text = json_string(r, &j->count), j;
    if (strchr("&*!|>%@`?:#,[]{}", json_peek(r, 0)) || yaml_is(r, '-'))
        json_fail(r, "a word, a number or text in quotes was expected here; no anchor, tag or nested list is read");
    size_t from = r->at += quoted;
    while (!strchr(quoted ? "'\n" : "#,[]{}\r\n", json_peek(r, 0)) && (quoted || !yaml_is(r, ':'))) r->at++;
    if (quoted && json_peek(r, 0) == '\n') json_fail(r, "the line ends inside quotes; close them on this line");
    for (j->count = r->at - from; !quoted && j->count && r->source[from + j->count - 1] == ' '; ) j->count--;
    j->text = checked(strndup(r->source + from, j->count), j->count);
    if (quoted) return r->at++, j;
    char *end;
    double number = strtod(j->text, &end);
    if (!*end && strspn(j->text, "0123456789+-.eE") == j->count) j->type = JSON_NUMBER, j->number = number;
    if (list_has("true,True,TRUE,false,False,FALSE", j->text)) j->type = JSON_BOOL, j->number = (*j->text | 32) == 't';
    if (!j->count || list_has("~,null,Null,NULL", j->text)) j->type = JSON_NULL;
    return j;
}

// A mapping or list: in brackets, up to `closing`, or where that is 0 in lines that begin in column `indent`. A member
// is `marked` by a colon or a dash (not in [a, b]), and `nests` where its value may be more than a scalar.
static Json *yaml_members(JsonReader *r, long indent, char closing) {
    bool list = closing ? closing == ']' : yaml_is(r, '-'), marked = !list || !closing, nests = !list && !closing;
    Json *j = json_node(r, list ? JSON_ARRAY : JSON_OBJECT), **end = &j->first;
    r->at += closing != 0;                  // over the opening bracket
    do {
        if (closing && json_skip_space(r) == closing) break;
        const Json *name = list ? NULL : yaml_scalar(r);
        if (name && (yaml_skip(r), !yaml_is(r, ':'))) json_fail(r, "\"name: value\" was expected here");
        if (name && json_get(j, name->text)) r->at = name->at, json_fail(r, "this name stands here twice");
        r->at += marked;                    // over the colon or the dash
        char c = marked ? yaml_skip(r) : json_peek(r, 0);
        *end = nests && strchr("[{", c) ? yaml_members(r, indent, c == '[' ? ']' : '}') : yaml_scalar(r);
        long below = nests && c == '\n' ? yaml_next_line(r) : -1;
        if (below + yaml_is(r, '-') > indent) *end = yaml_members(r, below, 0);   // dashes may stand under a name
        if (name) (*end)->key = name->text;
        end = &(*end)->next;
        j->count++;
    } while (closing ? json_accept(r, ',') : yaml_next_line(r) == indent && yaml_is(r, '-') == list);
    if (closing && !json_accept(r, closing)) json_fail(r, strf("a comma or %c was expected here", closing));
    return j;
}

static Json *yaml_only(JsonReader *r) {
    r->language = "YAML that glmtune reads";
    r->source += r->at, r->n -= r->at;      // a byte order mark is no column
    if (r->n > 1 << 16) json_fail(r, "longer than 64 KiB");     // so time and depth have an end
    for (size_t n = r->at = 0; r->at < r->n; r->began = r->at += n) {
        uint32_t c = utf8_get(r->source + r->at, r->n - r->at, &n);
        if (c == INVALID) json_fail(r, "");
        if (c < ' ' && c != '\n' && !(c == '\r' && json_peek(r, 1) == '\n'))
            json_fail(r, "a tab or control character; write spaces");
    }
    r->at = r->began = 0;
    bool begins = yaml_next_line(r) == 0 && r->n - r->at >= 3 && !memcmp(r->source + r->at, "---", 3);
    if (begins && (r->at += 3, yaml_skip(r)) != '\n') json_fail(r, "--- must stand alone on its line");
    Json *j = yaml_members(r, yaml_next_line(r), 0);
    if (r->at < r->n) json_fail(r, "this belongs to nothing above it; mind the indentation, or put the text in quotes");
    return j;
}

// ---- 13.5 Tensor files -------------------------------------------------------------------------------------------
// safetensors: eight bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, then the
// numbers, little endian, without gaps. A model is one such file, or several with an index that says which tensor lies
// where. Files are mapped: the system reads pages when they are used, and may drop and fetch them as it likes.

// First those of Dtype, then OTHER_DTYPE's; `storage`: torch's name of numbers like these.
static const struct { const char *name; size_t size; const char *storage; } dtypes[] = {
    [F64] = { "F64", 8, "torch.DoubleStorage" }, [F32] = { "F32", 4, "torch.FloatStorage" },
    [F16] = { "F16", 2, "torch.HalfStorage" }, [BF16] = { "BF16", 2, "torch.BFloat16Storage" },
    [I64] = { "I64", 8, "torch.LongStorage" }, [I32] = { "I32", 4, "torch.IntStorage" },
    { "I16", 2, "torch.ShortStorage" }, { "I8", 1, "torch.CharStorage" }, { "U8", 1, "torch.ByteStorage" },
    { "BOOL", 1, "torch.BoolStorage" }, { "F8_E4M3", 1, "" }, { "F8_E5M2", 1, "" } };

static const char *dtype_name(Dtype d) { return dtypes[d].name; }

#define MAX_HEADER ((size_t)100 << 20)      // in bytes, as the safetensors library limits it
enum { MAX_TENSORS = 20000 };               // the largest GLM has 613, and an optimizer two for each
#define DAMAGED "the header is damaged, download the file again"

static const char *shape_text(const size_t *shape, size_t n_dims) {
    Text t = {0};
    text_print(&t, "[");
    for (size_t i = 0; i < n_dims; i++) text_print(&t, "%s%zu", i ? ", " : "", shape[i]);
    text_print(&t, "]");
    return t.s;
}

static const StoredTensor *find_tensor(const TensorSet *s, const char *wanted) {
    for (size_t i = 0; i < s->n; i++) if (!strcmp(s->tensors[i].name, wanted)) return &s->tensors[i];
    return NULL;
}

static const char *line_value(const char *lines, const char *key) {
    size_t n = strlen(key);
    for (const char *p = lines; p && *p; p = strchr(p, '\n'), p += p ? 1 : 0)
        if (!strncmp(p, key, n) && p[n] == '=') return strf("%.*s", (int)strcspn(p + n + 1, "\n"), p + n + 1);
    return NULL;
}

// A JSON number that counts something.
static bool json_size(const Json *j, size_t *out) {
    if (!json_is(j, JSON_NUMBER) || !(j->number >= 0 && j->number <= 0x1p53)) return false;
    *out = (size_t)j->number;
    return (double)*out == j->number;
}

static StoredTensor read_tensor_entry(const char *file, const Json *j) {
    StoredTensor t = { .file = file, .name = strf("%s", j->key), .n = 1 };
    const Json *dtype = json_get(j, "dtype"), *shape = json_get(j, "shape"), *range = json_get(j, "data_offsets");
    size_t end = 0, known = 0;
    if (!json_is(dtype, JSON_STRING) || !json_is(shape, JSON_ARRAY) || !json_is(range, JSON_ARRAY) || range->count != 2)
        fail("%s: '%s' lacks dtype, shape or data_offsets: " DAMAGED, file, t.name);
    while (known < COUNT(dtypes) && strcmp(dtypes[known].name, dtype->text)) known++;
    if (known == COUNT(dtypes)) fail("%s: '%s' has the unknown dtype '%s'", file, t.name, dtype->text);
    t.dtype = known < OTHER_DTYPE ? (Dtype)known : OTHER_DTYPE;
    t.dtype_name = dtypes[known].name;
    if (shape->count > MAX_DIMS) fail("%s: '%s' has %zu dimensions, at most %d", file, t.name, shape->count, MAX_DIMS);
    bool sound = true;
    for (const Json *d = shape->first; d; d = d->next) {
        size_t *size = &t.shape[t.n_dims++];
        sound &= json_size(d, size) && !__builtin_mul_overflow(t.n, *size, &t.n);
    }
    if (!sound || __builtin_mul_overflow(t.n, dtypes[known].size, &t.bytes))
        fail("%s: '%s' has a shape that no tensor can have: the header is damaged", file, t.name);
    if (!json_size(range->first, &t.begin) || !json_size(range->first->next, &end) || end < t.begin ||
        end - t.begin != t.bytes)
        fail("%s: '%s' is %s of %s, but its data_offsets say otherwise: download the file again", file, t.name,
             shape_text(t.shape, t.n_dims), t.dtype_name);
    return t;
}

static int by_begin(const void *a, const void *b) {
    const StoredTensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

// The tensors t [n] of one file must fill its data_bytes without gap or overlap. Sorts them by place.
static void check_layout(const char *file, StoredTensor *t, size_t n, size_t data_bytes) {
    size_t at = 0;
    if (n) qsort(t, n, sizeof *t, by_begin);
    for (size_t i = 0; i < n; i++) {
        if (t[i].begin < at) fail("%s: '%s' and '%s' overlap: " DAMAGED, file, t[i-1].name, t[i].name);
        if (t[i].begin > at) fail("%s: there is a hole before '%s': " DAMAGED, file, t[i].name);
        at += t[i].bytes;
        if (at > data_bytes)
            fail("%s: is cut off: '%s' lacks %zu bytes; download it again", file, t[i].name, at - data_bytes);
    }
    if (at < data_bytes) fail("%s: %zu bytes follow the last tensor: the header is damaged", file, data_bytes - at);
}

typedef struct { const char *path; const uint8_t *begin; size_t n; struct stat file; } MappedFile;
static MappedFile mapped_files[1024];       // until the program ends
static size_t n_mapped;

// A file that becomes shorter while it is mapped: its pages are gone. No lock is held where its numbers are read.
static void on_bus_error(int signal_number, siginfo_t *info, void *context) {
    const uint8_t *at = info->si_addr;
    (void)context;
    for (size_t i = 0; i < n_mapped; i++)
        if (at >= mapped_files[i].begin && at < mapped_files[i].begin + mapped_files[i].n)
            fail("%s: was cut off or lost while it was being read; start again once it is whole", mapped_files[i].path);
    signal(signal_number, SIG_DFL);
}

// Whether nothing was written since: the same file, of the same size and time.
static bool is_same_file(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

// A file that is mapped already is not mapped again: its pages would count, and be looked up, twice.
static const uint8_t *map_file(const char *path, size_t *n) {
    struct stat s;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &s)) fail("%s: cannot be opened: %s", path, strerror(errno));
    if (S_ISDIR(s.st_mode)) fail("%s: is a folder, a file was expected", path);
    *n = (size_t)s.st_size;
    for (size_t i = 0; i < n_mapped; i++)
        if (*n && is_same_file(&mapped_files[i].file, &s)) return close(fd), mapped_files[i].begin;
    void *p = *n ? mmap(NULL, *n, PROT_READ, MAP_SHARED, fd, 0) : NULL;
    if (p == MAP_FAILED) fail("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    if (n_mapped < COUNT(mapped_files)) mapped_files[n_mapped++] = (MappedFile){ strf("%s", path), p, *n, s };
    return p;
}

// Adds the tensors of one file of safetensors.
static void read_safetensors(TensorSet *set, const char *file, const uint8_t *bytes, size_t n) {
    size_t first = set->n, header = 0;
    for (int i = 7; i >= 0 && n >= 8; i--) header = header << 8 | bytes[i];
    bool whole = n >= 8 && header <= n - 8 && header <= MAX_HEADER;
    if (!whole) refuse_disguise(file, (const char *)bytes, n);
    if (!whole)
        fail("%s: is no whole safetensors file (header %zu bytes, file %zu): download it again", file, header, n);
    JsonReader r = json_open(file, (const char *)bytes + 8, header);
    const Json *root = json_only(&r);
    if (root->type != JSON_OBJECT || root->count > MAX_TENSORS)
        fail("%s: the header is no JSON object of %d tensors at most", file, MAX_TENSORS);
    set->tensors = grow(set->tensors, &set->capacity, set->n + root->count + 1, sizeof *set->tensors);
    for (const Json *j = root->first; j; j = j->next) {
        if (strcmp(j->key, "__metadata__")) set->tensors[set->n++] = read_tensor_entry(file, j);
        else for (const Json *m = j->first; m; m = m->next)
            if (m->key && m->type == JSON_STRING) text_print(&set->metadata, "%s=%s\n", m->key, m->text);
    }
    json_close(&r);
    check_layout(file, set->tensors + first, set->n - first, n - 8 - header);
    for (size_t i = first; i < set->n; i++) set->tensors[i].data = bytes + 8 + header + set->tensors[i].begin;
}

// ---- 13.6 torch's files ------------------------------------------------------------------------------------------
// What torch.save writes since torch 1.6: a zip archive, whose end lists the files in it. NAME/data/0 and the like hold
// the numbers of one tensor or several; NAME/data.pkl says which tensors there are. It is a program for Python's pickle
// machine, which can call anything by its name. The machine here calls nothing: all it can make is a dict of tensors.
// (Sources: PKWARE's APPNOTE on zip; CPython's pickletools.py on the opcodes; torch/_utils.py on what a tensor is.)

typedef struct { const char *file; const uint8_t *bytes; size_t n; } Bytes;      // of a file, all or a part
#define CUT_OFF "%s: is a zip archive, but cut off or damaged; download it again"
#define NO_DICT "%s: holds no dict of tensors, or is damaged; save model.state_dict(), or download it again"

static Bytes part_of(Bytes whole, size_t at, size_t n) {
    if (at > whole.n || whole.n - at < n) fail(CUT_OFF, whole.file);
    return (Bytes){ whole.file, whole.bytes + at, n };
}

// A number, lowest byte first, in zip and pickle alike. One of more than 8 bytes fits nothing here.
static size_t number_at(Bytes whole, size_t at, size_t size) {
    size_t value = 0;
    for (size_t i = size; i-- > 0; ) value = value << 8 | part_of(whole, at, size).bytes[i];
    return size > sizeof value ? SIZE_MAX : value;
}

// What a record of the archive's list says where to find.
static Bytes zip_entry(Bytes zip, size_t record) {
    size_t extra = record + 46 + number_at(zip, record + 28, 2);
    // length, length as packed, place; what does not fit into 32 bits stands in the extra field
    size_t wide[] = { number_at(zip, record + 24, 4), number_at(zip, record + 20, 4), number_at(zip, record + 42, 4) };
    for (size_t i = 0, next = extra + 4; i < COUNT(wide); i++) {
        if (wide[i] < UINT32_MAX) continue;
        wide[i] = number_at(zip, next, 8);
        next += 8;
    }
    if (number_at(zip, record + 10, 2) || wide[0] != wide[1])
        fail("%s: is a compressed, encrypted or split zip; torch.save writes none, so save it again", zip.file);
    Bytes header = part_of(zip, wide[2], 30);           // followed by a name and padding, then the bytes
    if (number_at(header, 0, 4) != 0x04034B50) fail(CUT_OFF, zip.file);
    return part_of(zip, wide[2] + 30 + number_at(header, 26, 2) + number_at(header, 28, 2), wide[0]);
}

// The file in the archive whose name ends so; n 0: none.
static Bytes find_entry(Bytes zip, const char *ending) {
    size_t n = strlen(ending), end = zip.n - 22, record = number_at(zip, end + 16, 4), next;
    if (number_at(zip, end, 4) != 0x06054B50) fail(CUT_OFF, zip.file);
    if (record == UINT32_MAX) record = number_at(zip, number_at(zip, end - 12, 8) + 48, 8);     // of a large archive
    for (size_t i = 0; i < MAX_TENSORS && number_at(zip, record, 4) == 0x02014B50; i++, record = next) {
        Bytes name = part_of(zip, record + 46, number_at(zip, record + 28, 2));
        next = record + 46 + name.n + number_at(zip, record + 30, 2) + number_at(zip, record + 32, 2);
        if (name.n > n && !memcmp(name.bytes + name.n - n, ending, n)) return zip_entry(zip, record);
    }
    return part_of(zip, 0, 0);
}

// NUMBER: n; TEXT: n bytes of the program from `at` on; TYPE: dtypes[n]; FUNCTION: the kind of what it would make of a
// tuple; TUPLE, TENSOR, PARAMETER: n values of `tuples` from `at` on; OTHER: lists and what else nobody looks into.
typedef enum { P_OTHER, P_NUMBER, P_TEXT, P_TYPE, P_FUNCTION, P_TUPLE, P_TENSOR, P_PARAMETER, P_DICT } Kind;
typedef struct { Kind kind; size_t n, at; } Pickled;
typedef struct { Pickled *values; size_t n, capacity; } Pile;

// at: the next opcode; marks: how high the stack was (n); memo: values that are used again
typedef struct { TensorSet *set; Bytes zip, code; size_t at; Pile stack, marks, memo, tuples; } Pickle;

static const struct { const char *name; Kind kind; } functions[] = {
    { "collections.OrderedDict", P_DICT }, { "torch._utils._rebuild_tensor_v2", P_TENSOR },
    { "torch._utils._rebuild_parameter", P_PARAMETER } };

static size_t take_number(Pickle *p, size_t size) {
    p->at += size;
    return number_at(p->code, p->at - size, size);
}

static void add_value(Pile *pile, Pickled value) {
    pile->values = grow(pile->values, &pile->capacity, pile->n + 1, sizeof value);
    pile->values[pile->n++] = value;
}

static void push(Pickle *p, Kind kind, size_t n, size_t at) { add_value(&p->stack, (Pickled){ kind, n, at }); }

// Takes off the n upmost values. The dict is there before all others.
static const Pickled *pop(Pickle *p, size_t n) {
    if (!p->stack.n || p->stack.n < n) fail(NO_DICT, p->zip.file);
    p->stack.n -= n;
    return p->stack.values + p->stack.n;
}

// Takes off the last mark; returns how many values stand above it.
static size_t pop_mark(Pickle *p) {
    if (!p->marks.n || p->marks.values[p->marks.n - 1].n > p->stack.n) fail(NO_DICT, p->zip.file);
    return p->stack.n - p->marks.values[--p->marks.n].n;
}

static void push_tuple(Pickle *p, size_t n) {
    const Pickled *v = pop(p, n);
    for (size_t i = 0; i < n; i++) add_value(&p->tuples, v[i]);
    push(p, P_TUPLE, n, p->tuples.n - n);
}

// The value at a place of a tuple, which must be of that kind.
static Pickled item(const Pickle *p, Pickled tuple, size_t i, Kind kind) {
    if (i >= tuple.n || p->tuples.values[tuple.at + i].kind != kind) fail(NO_DICT, p->zip.file);
    return p->tuples.values[tuple.at + i];
}

static void push_text(Pickle *p, size_t n) {
    push(p, P_TEXT, part_of(p->code, p->at, n).n, p->at);
    p->at += n;
}

static void push_line(Pickle *p) {
    size_t n = 0;
    while (number_at(p->code, p->at + n, 1) != '\n') n++;
    push_text(p, n);
    p->at++;
}

static char *pickled_text(const Pickle *p, Pickled v) {
    if (v.kind != P_TEXT) fail(NO_DICT, p->zip.file);
    return strf("%.*s", (int)min_size(v.n, 1000), (const char *)p->code.bytes + v.at);
}

// The upmost texts are a module and a name in it.
static void push_name(Pickle *p) {
    const Pickled *v = pop(p, 2);
    const char *name = strf("%s.%s", pickled_text(p, v[0]), pickled_text(p, v[1]));
    for (size_t i = 0; i < COUNT(functions); i++)
        if (!strcmp(name, functions[i].name)) return push(p, P_FUNCTION, functions[i].kind, 0);
    for (size_t i = 0; i < COUNT(dtypes); i++) if (!strcmp(name, dtypes[i].storage)) return push(p, P_TYPE, i, 0);
    fail("%s: asks for %s, which no dict of tensors needs; nothing is called", p->zip.file, name);
}

// Nothing is called: a tensor is the tuple that it would be made of.
static void call(Pickle *p) {
    const Pickled *v = pop(p, 2);
    if (v[0].kind != P_FUNCTION || v[1].kind != P_TUPLE || (v[0].n == P_DICT && v[1].n)) fail(NO_DICT, p->zip.file);
    push(p, (Kind)v[0].n, v[1].n, v[1].at);
}

// PARAMETER: (tensor, ...). TENSOR: (storage, first number, shape, strides, ...). Storage: ('storage', type, key, ...).
static void add_member(Pickle *p, char *name, Pickled v) {
    const char *file = p->zip.file;
    if (v.kind == P_PARAMETER) v = item(p, v, 0, P_TENSOR);
    if (v.kind != P_TENSOR) fail("%s: '%s' is no tensor; a file of weights has nothing else", file, name);
    Pickled storage = item(p, v, 0, P_TUPLE), shape = item(p, v, 2, P_TUPLE), strides = item(p, v, 3, P_TUPLE);
    size_t type = item(p, storage, 1, P_TYPE).n;
    StoredTensor t = { .name = name, .dtype_name = dtypes[type].name, .file = file, .n_dims = shape.n, .n = 1 };
    t.dtype = type < OTHER_DTYPE ? (Dtype)type : OTHER_DTYPE;
    if (shape.n > MAX_DIMS) fail("%s: '%s' has %zu dimensions, at most %d", file, name, shape.n, MAX_DIMS);
    bool in_rows = true;
    for (size_t i = shape.n; i-- > 0; ) {
        t.shape[i] = item(p, shape, i, P_NUMBER).n;
        in_rows &= t.shape[i] < 2 || item(p, strides, i, P_NUMBER).n == t.n;
        if (__builtin_mul_overflow(t.n, t.shape[i], &t.n)) t.n = SIZE_MAX;
    }
    if (!in_rows && t.n)
        fail("%s: '%s' is a tensor that lies transposed or in parts; save it again after .contiguous()", file, name);
    const char *key = strf("/data/%s", pickled_text(p, item(p, storage, 2, P_TEXT)));
    Bytes numbers = find_entry(p->zip, key);
    size_t size = dtypes[type].size, first = item(p, v, 1, P_NUMBER).n, held = numbers.n / size;
    if (first > held || held - first < t.n)
        fail("%s: the numbers of '%s', %s, are not all there: download the file again", file, name, key + 1);
    if (p->set->n >= MAX_TENSORS) fail("%s: has more than %d tensors", file, MAX_TENSORS);
    t.data = numbers.bytes + first * size;
    t.bytes = t.n * size;
    p->set->tensors = grow(p->set->tensors, &p->set->capacity, p->set->n + 1, sizeof t);
    p->set->tensors[p->set->n++] = t;
}

// Name, value, name, value, ... for the dict below them. The one at the bottom is the file's; others describe tensors.
static void set_items(Pickle *p, size_t n) {
    const Pickled *v = pop(p, n);
    if (n % 2 || !p->stack.n || v[-1].kind != P_DICT) fail(NO_DICT, p->zip.file);
    for (size_t i = 0; i < n && p->stack.n == 1; i += 2) add_member(p, pickled_text(p, v[i]), v[i + 1]);
}

// Programs count the values that they keep.
static void keep(Pickle *p, size_t number) {
    if (number != p->memo.n) fail(NO_DICT, p->zip.file);
    add_value(&p->memo, *pop(p, 1));
    p->stack.n++;
}

static void run_program(Pickle *p) {
    for (size_t code, n; (code = take_number(p, 1)) != '.'; ) switch (code) {   // STOP
    case 0x80: case 0x95: take_number(p, code == 0x80 ? 1 : 8); break;          // PROTO, FRAME
    case '}': push(p, P_DICT, 0, 0); break;                                     // EMPTY_DICT
    case 'N': case 0x88: case 0x89: case ']': push(p, P_OTHER, 0, 0); break;    // NONE, NEWTRUE, NEWFALSE, EMPTY_LIST
    case 'G': push(p, P_OTHER, take_number(p, 8), 0); break;                    // BINFLOAT
    case 'J': push(p, P_NUMBER, (size_t)(int32_t)take_number(p, 4), 0); break;  // BININT
    case 'K': case 'M': push(p, P_NUMBER, take_number(p, code == 'K' ? 1 : 2), 0); break;   // BININT1, BININT2
    case 0x8A: push(p, P_NUMBER, take_number(p, take_number(p, 1)), 0); break;  // LONG1
    case 'X': case 0x8C: push_text(p, take_number(p, code == 'X' ? 4 : 1)); break;    // BINUNICODE, SHORT_BINUNICODE
    case '(': add_value(&p->marks, (Pickled){ .n = p->stack.n }); break;        // MARK
    case ')': push_tuple(p, 0); break;                                          // EMPTY_TUPLE
    case 't': push_tuple(p, pop_mark(p)); break;                                // TUPLE
    case 0x85: case 0x86: case 0x87: push_tuple(p, code - 0x84); break;         // TUPLE1, TUPLE2, TUPLE3
    case 'c':                                                                   // GLOBAL
        push_line(p);
        push_line(p);
        // fall through
    case 0x93: push_name(p); break;                                             // STACK_GLOBAL
    case 'R': call(p); break;                                                   // REDUCE
    case 'Q': break;                                                            // BINPERSID: a storage is its tuple
    case 'b': case 'a': pop(p, 1); break;                                       // BUILD, APPEND
    case 'e': pop(p, pop_mark(p)); break;                                       // APPENDS
    case 's': set_items(p, 2); break;                                           // SETITEM
    case 'u': set_items(p, pop_mark(p)); break;                                 // SETITEMS
    case 'q': case 'r': keep(p, take_number(p, code == 'q' ? 1 : 4)); break;    // BINPUT, LONG_BINPUT
    case 0x94: keep(p, p->memo.n); break;                                       // MEMOIZE
    case 'h': case 'j':                                                         // BINGET, LONG_BINGET
        if ((n = take_number(p, code == 'h' ? 1 : 4)) >= p->memo.n) fail(NO_DICT, p->zip.file);
        add_value(&p->stack, p->memo.values[n]);
        break;
    default: fail("%s: data.pkl has opcode 0x%02zx, which no dict of tensors has", p->zip.file, code);
    }
    if (p->stack.n != 1 || p->stack.values[0].kind != P_DICT) fail(NO_DICT, p->zip.file);
}

// Adds the tensors of one file of torch.
static void read_torch_file(TensorSet *set, const char *file, const uint8_t *bytes, size_t n) {
    Bytes zip = { file, bytes, n }, code = find_entry(zip, "/data.pkl"), order = find_entry(zip, "/byteorder");
    if (!code.n || code.n > MAX_HEADER) fail("%s: is a zip archive without data.pkl, so no file of torch.save", file);
    if (order.n && *order.bytes == 'b') fail("%s: is big endian; save it again on a machine of today", file);
    Pickle p = { .set = set, .zip = zip, .code = code };
    set->tensors = grow(set->tensors, &set->capacity, set->n + 1, sizeof *set->tensors);    // a dict may be empty
    run_program(&p);
    free(p.stack.values);
    free(p.marks.values);
    free(p.memo.values);
    free(p.tuples.values);
}

static void read_tensor_file(TensorSet *set, const char *path) {
    size_t n, first = set->n, copied = 0;
    const char *file = strf("%s", path);
    const uint8_t *bytes = map_file(path, &n);
    if (n >= 14 && !memcmp(bytes, "\x80\2\x8A\x0Al\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19", 14))
        fail("%s: is of torch before 1.6; let Python save it again: torch.save(torch.load(FILE, 'cpu'), FILE)", file);
    if (n >= 4 && !memcmp(bytes, "PK\3\4", 4)) read_torch_file(set, file, bytes, n);
    else read_safetensors(set, file, bytes, n);
    for (StoredTensor *t = set->tensors + first; t < set->tensors + set->n; t++) {
        if (!t->n || (uintptr_t)t->data % (t->bytes / t->n) == 0) continue;
        if ((copied += t->bytes) > n) fail(CUT_OFF, file);
        t->data = memcpy(alloc(t->bytes, 1), t->data, t->bytes);        // old libraries did not align the numbers
    }
}

static void read_shards(TensorSet *set, const char *folder, const char *index) {
    JsonReader r = json_open_file(index);
    const Json *map = json_get(json_only(&r), "weight_map");
    if (!json_is(map, JSON_OBJECT)) fail("%s: has no \"weight_map\"", index);
    for (const Json *j = map->first; j; j = j->next) {
        bool seen = false;
        if (j->type != JSON_STRING || strchr(j->text, '/')) fail("%s: '%s' names no file here", index, j->key);
        char *path = strf("%s/%s", folder, j->text);
        for (size_t i = 0; i < set->n && !seen; i++) seen = !strcmp(set->tensors[i].file, path);
        if (!seen && !exists(path)) fail("%s: is missing, %s names it: download it again", path, index);
        if (!seen) read_tensor_file(set, path);
        if (!find_tensor(set, j->key)) fail("%s: '%s' is in none of its files", index, j->key);
        free(path);
    }
    json_close(&r);
}

static const char *weights_of(const char *folder) {
    static const char *const names[] = { "model.safetensors.index.json", "model.safetensors",
        "pytorch_model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin" };
    for (size_t i = 0; i < COUNT(names); i++)
        if (exists(strf("%s/%s", folder, names[i]))) return strf("%s/%s", folder, names[i]);
    return NULL;
}

static TensorSet read_model_tensors(const char *folder) {
    TensorSet set = {0};
    const char *path = weights_of(folder);
    if (!path) fail("%s: has neither model.safetensors nor pytorch_model.bin, nor the index of several", folder);
    if (ends_in(path, ".json")) read_shards(&set, folder, path);
    else read_tensor_file(&set, path);
    for (const StoredTensor *s = set.tensors; s < set.tensors + set.n; s++) {
        const StoredTensor *first = find_tensor(&set, s->name);
        if (first != s) fail("'%s' stands twice, in %s and in %s", s->name, first->file, s->file);
    }
    return set;
}

// ---- 13.7 Tensor files, written ----------------------------------------------------------------------------------
// Tensor by tensor, so that a file may be larger than memory. `metadata`: the inside of a JSON object.
static TensorWriter begin_tensor_file(const char *path, const StoredTensor *t, size_t n, const char *metadata) {
    Text h = {0};
    TensorWriter w = { .path = path, .temporary = begin_output(path) };
    text_print(&h, "{\"__metadata__\":{\"format\":\"pt\"%s}", metadata);
    for (size_t i = 0; i < n; i++) {
        size_t bytes = times(t[i].n, dtype_size(t[i].dtype));      // OTHER_DTYPE: of a byte each, and a name of its own
        text_print(&h, ",");
        text_json(&h, t[i].name, strlen(t[i].name));
        text_print(&h, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                   t[i].dtype == OTHER_DTYPE ? t[i].dtype_name : dtype_name(t[i].dtype),
                   shape_text(t[i].shape, t[i].n_dims), w.expected, w.expected + bytes);
        w.expected += bytes;
    }
    text_print(&h, "}");
    while (h.n % 8) text_add(&h, " ", 1);
    w.f = open_to_write(w.temporary);
    for (int i = 0; i < 8; i++) fputc((int)(h.n >> (8 * i) & 255), w.f);
    fwrite(h.s, 1, h.n, w.f);
    free(h.s);
    return w;
}

static void write_tensor_bytes(TensorWriter *w, const void *bytes, size_t n) {
    if (fwrite(bytes, 1, n, w->f) != n) fail_writing(w->path);
    w->written += n;
}

static void finish_tensor_file(TensorWriter *w) {
    if (w->written != w->expected) fail("internal error: %s: %zu bytes of %zu", w->path, w->written, w->expected);
    close_written(w->f, w->path);
    finish_output(w->temporary);
}

// ---- 13.8 config.json --------------------------------------------------------------------------------------------

// The sizes and their names, [0] in Hugging Face's configs, [1] in "remote" ones (ChatGLM's own code). Both are read,
// first that of its kind; without both its class's default counts (GlmConfig and Glm4Config; configuration_chatglm.py).
enum { REQUIRED = 0 };
static const struct { const char *names[2]; size_t offset, most, missing[2]; } config_sizes[] = {
    { { "vocab_size", "padded_vocab_size" }, offsetof(Config, vocab_size), 1 << 24, { 151552, 65024 } },
    { { "hidden_size", "hidden_size" }, offsetof(Config, hidden_size), 1 << 17, { REQUIRED, REQUIRED } },
    { { "num_hidden_layers", "num_layers" }, offsetof(Config, n_layers), 1 << 12, { 40, REQUIRED } },
    { { "num_attention_heads", "num_attention_heads" }, offsetof(Config, n_heads), 1 << 12, { 32, REQUIRED } },
    { { "num_key_value_heads", "multi_query_group_num" }, offsetof(Config, n_kv_heads), 1 << 12, { 2, 1 } },
    { { "head_dim", "kv_channels" }, offsetof(Config, head_dim), 512, { 128, 128 } },
    { { "intermediate_size", "ffn_hidden_size" }, offsetof(Config, ffn_dim), 1 << 20, { 13696, REQUIRED } },
    { { "max_position_embeddings", "seq_length" }, offsetof(Config, max_positions), 1 << 28, { 131072, 2048 } },
};

static double config_number(const char *path, const Json *root, const char *key, double least, double most,
                            double missing) {
    const Json *j = json_get(root, key);
    if (!j || j->type == JSON_NULL) return missing;
    if (j->type != JSON_NUMBER || !(j->number >= least && j->number <= most))
        fail("%s: \"%s\" must be a number from %g to %g", path, key, least, most);
    return j->number;
}

static bool config_flag(const Json *root, const char *key, bool missing) {
    const Json *j = json_get(root, key);
    return !j || j->type == JSON_NULL ? missing : j->type == JSON_BOOL && j->number != 0;
}

static const char *config_text(const Json *root, const char *key) {
    const Json *j = json_get(root, key);
    return json_is(j, JSON_STRING) ? strf("%s", j->text) : NULL;
}

static void read_sizes(Config *c, const Json *root) {
    for (size_t i = 0; i < COUNT(config_sizes); i++) {
        const char *const *names = config_sizes[i].names, *key = json_key(root, names[c->remote], names[!c->remote]);
        const Json *j = json_get(root, key);
        size_t value = config_sizes[i].missing[c->remote];
        if (!j && value == REQUIRED) fail("%s: \"%s\" is missing; is this the config.json of a GLM?", c->file, key);
        if (j && (!json_size(j, &value) || !value || value > config_sizes[i].most))
            fail("%s: \"%s\" must be a whole number from 1 to %zu", c->file, key, config_sizes[i].most);
        memcpy((char *)c + config_sizes[i].offset, &value, sizeof value);
    }
}

// Refuses a model of another architecture, by what only its config.json has.
static void check_kind(const Config *c, const Json *root) {
    static const struct { const char *keys, *what; } others[] = {
        { "inner_hidden_size,position_encoding_2d", "the first ChatGLM-6B; take ChatGLM2-6B or later" },
        { "block_position_encoding,max_sequence_length", "GLM-10B or its like; take GLM-4 or GLM-Edge" },
        { "vision_config", "one with a vision part, which glmtune does not read; take a model of text alone" } };
    const char *type = c->model_type ? c->model_type : "";
    const char *what = strstr(type, "moe") ? ", a mixture of experts"
                     : strstr(type, "4v") || strstr(type, "6v") || strstr(type, "ocr") ? ", with a vision part" : "";
    if (!list_has("chatglm,glm,glm4", type))
        fail("%s: model_type is '%s'%s; glmtune tunes chatglm, glm and glm4", c->file, type, what);
    for (size_t i = 0; i < COUNT(others); i++)
        for (const Json *j = root->first; j; j = j->next)
            if (list_has(others[i].keys, j->key) && j->type != JSON_NULL)
                fail("%s: \"%s\": this is another architecture, %s", c->file, j->key, others[i].what);
}

// Refuses settings of a remote config that no release has: they would be computed wrongly.
static void check_remote_flags(const Config *c, const Json *root) {
    static const struct { const char *key; bool missing, wanted; } flags[] = {
        { "multi_query_attention", false, true }, { "rmsnorm", true, true }, { "post_layer_norm", true, true },
        { "add_bias_linear", false, false }, { "apply_residual_connection_post_layernorm", false, false },
        { "original_rope", true, true } };
    for (size_t i = 0; i < COUNT(flags); i++)
        if (config_flag(root, flags[i].key, flags[i].missing) != flags[i].wanted)
            fail("%s: \"%s\" is %s, which no released GLM has and glmtune does not compute", c->file, flags[i].key,
                 flags[i].wanted ? "false" : "true");
}

// Rotary positions may be described in either of two objects, with their type under either of two names. Of scaled ones
// yarn and dynamic are for texts that are longer than those the model was trained on.
static void check_rotary(const Config *c, const Json *root, const char *key) {
    const Json *rope = json_get(root, key), *type = json_get(rope, json_key(rope, "rope_type", "type"));
    const char *name = json_is(type, JSON_STRING) ? type->text : "of an unknown type";
    const char *plain = !strcmp(key, "rope_scaling") ? "remove the key" : "set rope_type to \"default\" there";
    double n = config_number(c->file, rope, "original_max_position_embeddings", 1, 1e9, (double)c->max_positions);
    if (type && strcmp(name, "default"))
        fail("%s: scaled rotary positions (rope_scaling, %s) are not supported%s", c->file, name,
             !list_has("yarn,dynamic", name) ? ""
             : strf("; for texts of up to %.0f tokens plain ones are right: %s", n, plain));
}

// Whether positions are divided by rope_ratio, as ChatGLM2-6B-32k has it, where all others multiply the base: the
// model's own code says so, else its name, in _name_or_path or auto_map.
static bool divides_positions(const Config *c) {
    const char *slash = strrchr(c->file, '/');
    const char *code = strf("%.*smodeling_chatglm.py", slash ? (int)(slash + 1 - c->file) : 0, c->file);
    if (!file_contains(code, "rope_ratio")) return strcasestr(c->source, "chatglm2-6b-32k");
    return file_contains(code, "/ self.rope_ratio") || file_contains(code, "/ rope_ratio");
}

// Refuses what is not read or computed. Of ways to quantise those of bitsandbytes and ChatGLM are (13.9).
static void check_supported(const Config *c, const Json *root) {
    const Json *config = json_get(root, "quantization_config"), *method = json_get(config, "quant_method");
    const Json *act = json_get(root, "hidden_act");
    const char *by = json_is(method, JSON_STRING) ? method->text : "a method that is not named";
    if (json_is(config, JSON_OBJECT) && strcmp(by, "bitsandbytes"))
        fail("%s: these weights are quantised by %s, which is not read; take the release in fp16 or bf16 (and, to save "
             "memory, glmtune quantize)", c->file, by);
    if (c->quantization_bit && c->quantization_bit != 4 && c->quantization_bit != 8)
        fail("%s: \"quantization_bit\" is %zu, ChatGLM has 4 and 8; take it out if the weights are no codes", c->file,
             c->quantization_bit);
    check_rotary(c, root, "rope_scaling"), check_rotary(c, root, "rope_parameters");
    if (c->remote && config_number(c->file, root, "rope_ratio", 1e-3, 1e8, 1) != 1 && divides_positions(c))
        fail("%s: divides positions by rope_ratio, as ChatGLM2-6B-32k does; take ChatGLM3-6B-32k", c->file);
    if (json_is(act, JSON_STRING) && strcmp(act->text, "silu"))
        fail("%s: \"hidden_act\" is '%s', a GLM has silu", c->file, act->text);
    if (c->n_heads % c->n_kv_heads)
        fail("%s: %zu attention heads cannot share %zu key/value heads evenly", c->file, c->n_heads, c->n_kv_heads);
    if (c->n_rotated % 2 || c->n_rotated > c->head_dim)
        fail("%s: %zu rotary features do not fit a head of %zu in pairs", c->file, c->n_rotated, c->head_dim);
}

// Reads the text of a config.json; `path` is for messages.
static Config parse_config(const char *path, const char *source) {
    JsonReader r = json_open(path, source, strlen(source));
    const Json *root = json_only(&r), *rope = json_get(root, "rope_parameters");
    Config c = { .file = strf("%s", path), .source = source, .model_type = config_text(root, "model_type") };
    check_kind(&c, root);
    c.remote = !strcmp(c.model_type, "chatglm");
    c.post_norms = !strcmp(c.model_type, "glm4");
    if (c.remote) check_remote_flags(&c, root);
    read_sizes(&c, root);
    double theta = config_number(path, root, "rope_theta", 1, 1e12, 10000);
    double partial = config_number(path, root, "partial_rotary_factor", 0, 1, 0.5);
    theta = config_number(path, rope, "rope_theta", 1, 1e12, theta);        // the newer place, which counts
    partial = config_number(path, rope, "partial_rotary_factor", 0, 1, partial);
    c.rope_theta = c.remote ? 10000 * config_number(path, root, "rope_ratio", 1e-3, 1e8, 1) : theta;
    c.n_rotated = c.remote ? c.head_dim / 2 : (size_t)((double)c.head_dim * partial);
    c.rms_norm_eps = config_number(path, root, c.remote ? "layernorm_epsilon" : "rms_norm_eps", 0, 1,
                                   c.remote ? 1e-5 : 1.5625e-7);
    c.qkv_bias = config_flag(root, c.remote ? "add_qkv_bias" : "attention_bias", !c.remote);
    c.tied = config_flag(root, "tie_word_embeddings", false);
    c.quantization_bit = (size_t)config_number(path, root, "quantization_bit", 0, 8, 0);
    c.quantised = c.quantization_bit || json_is(json_get(root, "quantization_config"), JSON_OBJECT);
    c.layout = config_text(root, "glmtune.layout");
    c.name_or_path = config_text(root, "_name_or_path");
    c.torch_dtype = config_text(root, json_key(root, "torch_dtype", "dtype"));
    check_supported(&c, root);
    json_close(&r);
    return c;
}

static Config read_config(const char *path) {
    size_t n;
    if (!exists(path)) fail("%s: is missing; a model folder has config.json, weights and a tokenizer", path);
    const char *source = read_file(path, &n);
    refuse_disguise(path, source, n);
    return parse_config(path, source);
}

// ---- 13.9 Quantised weights --------------------------------------------------------------------------------------
// Matrices of codes, with scales in tensors beside them. Which ones are is told by the tensors, whatever config.json
// says. Codes and scales are used as they lie, and never rounded further. Three kinds are read, for a map X:
//     bitsandbytes, 4 bit   X.weight, two codes in a byte; X.weight.absmax, a scale for 64 or 128 numbers; .quant_map;
//                           .quant_state.bitsandbytes__nf4 (or __fp4), a JSON text. Double quantised: absmax of U8,
//                           .nested_absmax and .nested_quant_map, and an offset in the text
//     bitsandbytes, 8 bit   X.weight [n_out,n_in], X.SCB [n_out], 127 times the scales; X.weight_format: 0
//     ChatGLM's own         X.weight [n_out,n_in], or [n_out,n_in/2] of 4 bits; X.weight_scale [n_out]

static const StoredTensor *beside(const TensorSet *set, const Tensor *t, const char *end) {
    return find_tensor(set, name_beside(t, end));       // NULL: none
}

static void need_scales(bool right, const Tensor *t, const StoredTensor *s, const char *why) {
    if (!right)
        fail("%s: '%s' is quantised, but %s: download the folder again, or take the base and glmtune quantize", s->file,
             t->name, why);
}

// n numbers as floats in model memory, times a factor: where they lie if they can be read there.
static const float *floats_of(const Tensor *t, const StoredTensor *weight, const StoredTensor *s, size_t n,
                              float factor, const char *what) {
    bool lies_right = s && s->dtype == F32 && factor == 1 && (uintptr_t)s->data % sizeof(float) == 0;
    need_scales(s, t, weight, strf("'%s' is missing", what));
    need_scales(s->dtype <= BF16 && s->n == n, t, weight,
                strf("'%s' is %s of %s, not %zu floats", what, shape_text(s->shape, s->n_dims), s->dtype_name, n));
    if (lies_right) return memory_mapped(s->data, s->bytes);
    real *numbers = device_take(n, sizeof *numbers, s->name);
    float *floats = device_take(n, sizeof *floats, s->name);
    widen_stored(numbers, s);
    scale_by(numbers, factor, n);
    narrow(floats, F32, numbers, n);
    memory_give(numbers);
    return floats;
}

// bitsandbytes' table of what codes stand for must be the one that is computed with.
static bool is_own_map(const StoredTensor *map, Dtype dtype) {
    float values[16];
    if (!map || map->dtype != F32 || map->n != COUNT(values)) return false;
    memcpy(values, map->data, sizeof values);
    for (size_t i = 0; i < COUNT(values); i++) if (!(values[i] == code_values[dtype - Q4][i])) return false;
    return true;
}

static void read_4bit_scales(Scales *scales, const Tensor *t, const TensorSet *set, const StoredTensor *s,
                             const StoredTensor *state) {
    const char *where = strf("%s: '%s'", state->file, state->name);
    JsonReader r = json_open(where, state->data, state->bytes);
    const Json *root = json_only(&r), *shape = json_get(root, "shape");
    const Json *rows = json_is(shape, JSON_ARRAY) ? shape->first : NULL;
    const StoredTensor *absmax = beside(set, t, ".absmax");
    size_t sizes[2] = {0}, block = 0;
    bool counted = json_size(json_get(root, "blocksize"), &block);
    need_scales(counted && (block == 64 || block == 128), t, s, "\"blocksize\" in its state is not 64 or 128");
    need_scales(rows && shape->count == 2 && json_size(rows, sizes) && json_size(rows->next, sizes + 1) &&
                sizes[0] == t->shape[0] && sizes[1] == t->shape[1], t, s, "of another shape than config.json wants");
    size_t blocks = (t->n + block - 1) / block, groups = (blocks + 255) / 256;
    scales->per = block;
    if (!absmax || strcmp(absmax->dtype_name, "U8")) {
        scales->each = floats_of(t, s, absmax, blocks, 1, "absmax");
    } else {
        double offset = config_number(where, root, "nested_offset", -1e30, 1e30, NAN);
        need_scales(absmax->n == blocks, t, s, strf("'absmax' is %zu codes, not %zu", absmax->n, blocks));
        need_scales(config_number(where, root, "nested_blocksize", 1, 1e9, 0) == 256 && isfinite(offset), t, s,
                    "its scales are not in blocks of 256, with an offset");
        scales->code = memory_mapped(absmax->data, absmax->bytes);
        scales->nested = floats_of(t, s, beside(set, t, ".nested_absmax"), groups, 1, "nested_absmax");
        scales->map = floats_of(t, s, beside(set, t, ".nested_quant_map"), 256, 1, "nested_quant_map");
        scales->offset = (float)offset;
    }
    json_close(&r);
}

// Scales and type of a matrix, s, by what stands beside it; returns the tensor of its scales, NULL: it is no codes.
static const StoredTensor *read_scales(Scales *scales, Dtype *dtype, const Tensor *t, const TensorSet *set,
                                       const StoredTensor *s) {
    const StoredTensor *nf4 = beside(set, t, ".quant_state.bitsandbytes__nf4");
    const StoredTensor *fp4 = beside(set, t, ".quant_state.bitsandbytes__fp4"), *scb = beside(set, t, "SCB");
    const StoredTensor *format = beside(set, t, "_format"), *scale = beside(set, t, "_scale");
    *scales = (Scales){ .per = t->shape[1] };
    need_scales(!!nf4 + !!fp4 + !!scb + !!scale < 2, t, s, "scales of two kinds stand beside it");
    if (nf4 || fp4) {
        *dtype = nf4 ? NF4 : FP4;
        need_scales(is_own_map(beside(set, t, ".quant_map"), *dtype), t, s, "its 'quant_map' is not bitsandbytes' own");
        read_4bit_scales(scales, t, set, s, nf4 ? nf4 : fp4);
        return beside(set, t, ".absmax");
    }
    *dtype = !scb && scale && s->n_dims == 2 && s->shape[1] * 2 == t->shape[1] ? Q4 : Q8;
    bool by_row = !scb || !format || (format->bytes == 1 && !*(const char *)format->data);
    need_scales(by_row, t, s, "its numbers are in another order");
    if (scb) scales->each = floats_of(t, s, scb, t->shape[0], 1 / 127.0f, "SCB");
    else if (scale) scales->each = floats_of(t, s, scale, t->shape[0], 1, "weight_scale");
    return scb ? scb : scale;
}

// Binds a matrix of codes, s; false: it is none. bits: "quantization_bit" of config.json, 0 without one.
static bool bind_quantised(Tensor *t, const TensorSet *set, const StoredTensor *s, size_t bits) {
    Scales *scales = alloc(1, sizeof *scales);
    Dtype dtype;
    const StoredTensor *from = t->n_dims == 2 ? read_scales(scales, &dtype, t, set, s) : NULL;
    if (!from) return free(scales), false;
    // bitsandbytes' 4 bits are one column, of any type
    bool by_rows = s->n_dims == 2 && s->shape[0] == t->shape[0] && !strcmp(s->dtype_name, "I8");
    need_scales(s->bytes == dtype_bytes(dtype, t->n) && (by_rows || dtype >= NF4), t, s,
                strf("it is %s of %s, not %s of %d-bit codes%s", shape_text(s->shape, s->n_dims), s->dtype_name,
                     shape_text(t->shape, 2), dtype == Q8 ? 8 : 4, dtype >= NF4 ? "" : " in I8"));
    need_scales(!bits || (dtype == Q8) == (bits == 8), t, s,
                strf("its codes are not of %zu bits, as \"quantization_bit\" says", bits));
    need_scales(t->depth > 0, t, s, "embeddings of codes are not read");
    t->scales = scales;
    t->file_scales = from->data, t->scale_bytes = from->bytes;
    t->data = memory_mapped(s->data, s->bytes);
    t->dtype = t->file_dtype = dtype;
    return true;
}

// ---- 13.10 From files to the model -------------------------------------------------------------------------------

// Points a tensor at its numbers, in model memory; a vector's are widened, into memory of their own.
static void bind_tensor(Tensor *t, const void *data, Dtype dtype) {
    t->data = data;
    t->file_dtype = t->dtype = dtype;
    if (!t->vector || dtype == REAL) return;
    real *copy = device_take(t->n, sizeof *copy, t->name);
    widen(copy, t->data, dtype, t->n);
    t->data = copy;
    t->dtype = REAL;
}

static void widen_stored(real *out, const StoredTensor *s) {
    const void *mapped = memory_mapped(s->data, s->bytes);
    widen(out, mapped, s->dtype, s->n);
    memory_unmap(mapped);
}

static bool has_shape(const StoredTensor *s, const Tensor *t) {
    return s->n_dims == t->n_dims && !memcmp(s->shape, t->shape, t->n_dims * sizeof *t->shape);
}

// Whether a tensor of a file has a place: it is the model's own, stands beside a quantised one, or holds nothing new,
// as the table of rotary frequencies in some releases, or the head of a tied model once more.
static bool has_place(const Model *m, const char *name) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        size_t path = strlen(t->name) - strlen("weight");
        if (!strcmp(name, t->name)) return true;
        if (!t->scales || strncmp(name, t->name, path)) continue;
        if (!strcmp(name + path, "SCB") || !strncmp(name + path, "weight", strlen("weight"))) return true;
    }
    if (ends_in(name, "inv_freq")) return true;
    return m->config.tied && !strcmp(name, strf("%s.weight", path_of(m, NAME_HEAD, 0)));
}

static void bind_files(Model *m, const char *folder) {
    TensorSet set = read_model_tensors(folder);
    size_t bits = m->config.quantization_bit;
    for (size_t i = 0; i < m->n_tensors; i++) {
        Tensor *t = m->tensors[i];
        const StoredTensor *s = find_tensor(&set, t->name);
        if (!s) fail("%s: '%s' is in none of its files; a file is missing or of another model", folder, t->name);
        t->file_data = s->data;
        t->file = strrchr(s->file, '/') + 1;
        if (bind_quantised(t, &set, s, bits)) continue;
        if (s->dtype > BF16)
            fail("%s: '%s' is %s without scales, so quantised in a way that is not read; download the release in fp16 "
                 "or bf16", s->file, t->name, s->dtype_name);
        if (!has_shape(s, t))
            fail("%s: '%s' is %s, config.json wants %s: they are from different models, download both again", s->file,
                 t->name, shape_text(s->shape, s->n_dims), shape_text(t->shape, t->n_dims));
        bind_tensor(t, memory_mapped(s->data, s->bytes), s->dtype);
    }
    if (bits && !is_quantised(m))
        fail("%s: \"quantization_bit\": %zu, but the weights are not: it means when they are loaded. Take it out, or: "
             "glmtune quantize %s OUT --bits %zu, once it is", m->config.file, bits, folder, bits);
    for (const StoredTensor *s = set.tensors; s < set.tensors + set.n; s++) {
        if (is_official_prefix(s->name)) m->prefix_in_files = true;
        else if (!has_place(m, s->name))
            fail("%s: '%s' has no place in the model that config.json describes", s->file, s->name);
    }
    free(set.tensors);
}

static Model *load_model(const char *folder) {
    Model *m = describe_model(read_config(strf("%s/config.json", folder)));
    bind_files(m, folder);
    return m;
}

// First numbers of a model trained from scratch: matrices are uniform with this standard deviation, gains 1, biases 0.
// With `rough`, for gradient checks, gains, biases and what a method adds are random too, around where they start.
static void random_tensor(real *out, const Tensor *t, uint64_t seed, double std, bool rough) {
    float spread = (float)(std * 1.7320508075688772);       // sqrt(3): uniform numbers have std spread / sqrt(3)
    float center = t->vector && strstr(t->name, "norm") ? 1 : t->start.center;
    fill_uniform(out, rng_key(seed, hash_name(t->name)), center, t->vector && !rough ? 0 : spread, t->n);
}

static void bind_random(Model *m, uint64_t seed, double std) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        Tensor *t = m->tensors[i];
        real *numbers = device_take(t->n, sizeof *numbers, t->name);
        random_tensor(numbers, t, seed, std, true);
        bind_tensor(t, numbers, REAL);
    }
}

// ==== 14  Tokenizer files ========================================================================================
// Each importer turns a released file into the bytes of a tokenizer.bin, and only those are parsed further:
//     "GLMTOKEN", then as uint32: version, kind, flags, pieces, specials, bytes of text, lengths of the three class
//     tables; length of each piece; rank of each piece; ids of specials; lengths of specials; the class tables (run
//     lengths of 14.1); the text of all pieces and specials; with LISTED_MERGES: their number, and in the order of
//     their ranks the piece that each makes and how many bytes of it are the left part's.

// ---- 14.1 Unicode ------------------------------------------------------------------------------------------------
// What \p{L}, \p{N} and \s mean, from tests/make_unicode.py. A tokenizer.bin carries the tables it was made with.
// As tiktoken 0.14.0 has them: run lengths outside, inside, outside, ... each class, from U+0000 on
static const uint32_t letter_runs[] = {
    65,26,6,26,47,1,10,1,4,1,5,23,1,31,1,458,4,12,14,5,7,1,1,1,129,5,1,2,2,4,1,1,6,1,1,3,1,1,1,20,1,83,1,139,8,166,1,38,
    2,1,6,41,71,27,4,4,45,43,35,2,1,99,1,1,15,2,7,2,10,3,2,1,16,1,1,30,29,89,11,1,24,33,9,2,4,1,5,22,4,1,9,1,3,1,23,25,
    7,11,5,24,1,6,17,42,58,54,3,1,18,1,7,10,15,16,4,8,2,2,2,22,1,7,1,1,3,4,3,1,16,1,13,2,1,3,14,2,10,1,8,6,4,2,2,22,1,7,
    1,2,1,2,1,2,31,4,1,1,19,3,16,9,1,3,1,22,1,7,1,2,1,5,3,1,18,1,15,2,23,1,11,8,2,2,2,22,1,7,1,2,1,5,3,1,30,2,1,3,15,1,
    17,1,1,6,3,3,1,4,3,2,1,1,1,2,3,2,3,3,3,12,22,1,52,8,1,3,1,23,1,16,3,1,26,3,2,1,2,2,30,1,4,8,1,3,1,23,1,10,1,5,3,1,
    31,2,1,2,15,2,17,9,1,3,1,41,2,1,16,1,5,3,8,3,24,6,5,18,3,24,1,9,1,1,2,7,58,48,1,2,12,7,58,2,1,1,1,5,1,24,1,1,1,10,1,
    2,9,1,2,5,1,1,21,4,32,1,63,8,1,36,27,5,115,43,20,1,16,6,4,4,3,1,3,2,7,3,4,13,12,1,17,38,1,1,5,1,2,43,1,333,1,4,2,7,
    1,1,1,4,2,41,1,4,2,33,1,4,2,7,1,1,1,4,2,15,1,57,1,4,2,67,37,16,16,86,2,6,3,620,2,17,1,26,5,75,6,8,7,18,13,19,14,18,
    14,13,1,3,15,52,35,1,4,1,67,89,7,5,2,34,1,1,5,70,10,31,49,30,2,5,11,44,4,26,54,23,9,53,82,1,93,47,17,8,54,30,13,2,
    10,44,26,36,41,3,10,36,2,11,5,43,2,3,41,4,1,6,1,2,3,1,5,192,64,278,2,6,2,38,2,6,2,8,1,1,1,1,1,1,1,31,2,53,1,7,1,1,3,
    3,1,7,3,4,2,6,4,13,5,3,1,7,116,1,13,1,16,13,101,1,4,1,2,10,1,1,3,5,6,1,1,1,1,1,1,4,1,11,2,4,5,5,4,1,52,2,2683,229,6,
    4,3,2,12,38,1,1,5,1,2,56,7,1,16,23,9,7,1,7,1,7,1,7,1,7,1,7,1,7,1,7,80,1,469,2,42,5,5,2,4,86,6,3,1,90,1,4,5,43,1,94,
    17,32,48,16,512,6592,64,22157,67,46,2,269,3,16,10,2,20,47,16,31,2,70,49,9,2,103,2,67,2,2,1,1,1,8,21,16,1,3,1,4,1,23,
    29,52,14,50,62,6,3,1,1,2,11,28,10,23,25,29,7,47,28,1,16,5,1,10,10,5,1,41,23,3,1,8,20,23,3,1,3,50,1,1,3,2,2,5,2,1,1,
    1,24,3,2,11,7,3,12,6,2,6,2,6,9,7,1,7,1,43,1,14,6,115,29,11172,12,23,4,49,8452,366,2,106,38,7,12,5,5,1,1,10,1,13,1,5,
    1,1,1,2,1,2,1,108,33,363,18,64,2,54,40,12,116,5,1,135,36,26,6,26,11,89,3,6,2,6,2,6,2,3,35,12,1,26,1,19,1,2,1,15,2,
    14,34,123,389,29,3,49,47,32,13,20,1,8,6,38,10,30,2,36,4,8,48,158,18,36,4,36,4,40,8,52,12,11,1,15,1,7,1,2,1,11,1,15,
    1,7,1,2,3,52,12,311,9,22,10,8,24,6,1,42,1,9,69,6,2,1,1,44,1,2,3,1,2,23,10,23,9,31,65,19,1,2,10,22,10,26,70,56,6,2,
    64,1,15,4,1,3,1,29,42,29,3,29,35,8,1,28,27,54,10,22,10,19,13,18,110,73,55,51,13,51,13,36,38,28,9,23,250,42,6,2,16,3,
    59,29,10,1,8,22,42,18,46,21,27,23,12,53,57,2,2,1,13,45,32,25,26,36,29,1,2,1,8,35,3,1,12,48,14,4,21,1,1,1,35,18,1,25,
    19,2,63,7,1,1,1,4,1,15,1,10,7,47,38,8,2,2,2,22,1,7,1,2,1,5,3,1,18,1,12,5,30,10,1,1,2,1,1,38,1,1,25,1,1,1,44,53,18,4,
    20,3,30,48,20,2,1,1,184,47,41,4,36,48,20,1,59,43,13,1,71,27,37,7,185,44,116,64,31,8,2,1,2,8,1,2,1,24,15,1,1,1,94,8,
    2,39,16,1,1,1,28,1,10,40,7,1,21,1,11,46,19,1,18,73,199,33,31,9,1,37,17,1,49,30,112,7,1,2,1,38,21,1,25,6,1,2,1,32,14,
    1,327,19,15,1,1,13,1,34,124,1,79,922,230,196,2636,97,15,1072,17,6,25,3995,5,583,6841,30,1762,569,7,31,17,79,17,30,
    18,48,16,4,31,21,5,19,432,45,211,64,128,75,5,1,66,13,64,2,1,1,28,6136,8,1238,41,10,8935,4,1,7,1,2,1,291,15,1,29,3,2,
    1,14,4,8,396,2308,107,5,13,3,9,7,10,5990,85,1,71,1,2,2,1,2,2,2,4,1,12,1,1,1,7,1,65,1,4,2,8,1,7,1,28,1,4,1,5,1,1,3,7,
    1,340,2,25,1,25,1,31,1,25,1,31,1,25,1,31,1,25,1,31,1,25,1,8,1844,31,6,6,261,62,146,45,10,7,16,1,321,30,18,44,484,28,
    228,30,2,1,495,7,1,4,1,2,1,15,1,197,59,68,7,1,1204,4,1,27,1,2,1,1,2,1,1,10,1,4,1,1,1,1,6,1,4,1,1,1,1,1,1,3,1,2,1,1,
    2,1,1,1,1,1,1,1,1,1,1,2,1,1,2,4,1,7,1,4,1,4,1,1,1,10,1,17,5,3,1,5,1,17,4420,42720,32,4154,6,222,2,5762,14,7473,15,
    622,2466,542,1506,4939,5,4192
};
static const uint32_t number_runs[] = {
    48,10,120,2,5,1,2,3,1441,10,134,10,198,10,412,10,118,10,4,6,108,10,118,10,118,10,2,6,110,13,115,10,8,7,103,10,104,7,
    7,19,109,10,96,10,118,10,70,20,268,10,70,10,719,20,881,3,239,10,6,10,22,10,300,10,128,11,165,10,6,10,182,10,86,10,
    134,10,6,10,1046,1,3,6,6,10,198,51,2,5,726,60,78,22,630,30,1385,1,777,1,25,9,14,3,343,4,138,10,30,8,1,15,32,10,39,
    15,29536,10,188,10,320,6,154,10,38,10,198,10,22,10,86,10,406,10,21270,10,493,45,12,57,17,2,341,27,36,4,29,1,8,1,134,
    5,202,10,942,8,25,7,39,9,75,5,22,6,160,2,2,16,2,46,64,9,52,2,30,3,75,5,104,8,24,8,41,7,330,6,48,10,6,10,278,31,158,
    10,42,4,112,7,134,30,128,10,60,10,144,10,7,20,251,10,342,10,118,10,374,10,102,10,6,20,76,12,420,19,93,10,662,10,86,
    29,227,10,70,10,422,10,102,21,1067,111,15553,10,2342,10,86,10,134,10,1,7,526,10,262,23,24153,10,1478,20,12,20,108,
    25,1109,50,2368,10,422,10,502,10,247,10,716,9,128,10,791,59,1,3,1,4,76,45,1,15,962,13,2787,10
};
static const uint32_t space_runs[] = {
    9,5,18,1,100,1,26,1,5599,1,2431,11,29,2,5,1,47,1,4000,1
};

static bool is_space_character(uint32_t c) {
    uint32_t end = 0;
    for (size_t i = 0; i < COUNT(space_runs); i++) if (c < (end += space_runs[i])) return i % 2;
    return false;
}

// ---- 14.2 tokenizer.bin ------------------------------------------------------------------------------------------

enum { MOST_IDS = 1 << 22 };        // released vocabularies have about 2^17

static void image_add(Text *t, uint32_t v) { text_add(t, (const char *)&v, 4); }    // little endian, as this machine is

// The bytes of a tokenizer.bin: kind, flags, pieces (id = place) and special tokens are those of t.
static Text tokenizer_image(const Tokenizer *t) {
    Text image = {0}, text = {0};
    for (size_t i = 0; i < t->n_pieces; i++) text_add(&text, t->pieces[i].text, t->pieces[i].n);
    for (size_t i = 0; i < t->n_specials; i++) text_add(&text, t->specials[i].name, strlen(t->specials[i].name));
    if (text.n > INT32_MAX) fail("a tokenizer with %zu bytes of text is too large", text.n);
    const uint32_t header[] = { TOKENIZER_VERSION, t->kind, t->flags, t->n_pieces, t->n_specials, (uint32_t)text.n,
                                COUNT(letter_runs), COUNT(number_runs), COUNT(space_runs) };
    text_add(&image, "GLMTOKEN", 8);
    text_add(&image, (const char *)header, sizeof header);
    for (size_t i = 0; i < t->n_pieces; i++) image_add(&image, t->pieces[i].n);
    for (size_t i = 0; i < t->n_pieces; i++) image_add(&image, t->pieces[i].rank);
    for (size_t i = 0; i < t->n_specials; i++) image_add(&image, (uint32_t)t->specials[i].id);
    for (size_t i = 0; i < t->n_specials; i++) image_add(&image, (uint32_t)strlen(t->specials[i].name));
    text_add(&image, (const char *)letter_runs, sizeof letter_runs);
    text_add(&image, (const char *)number_runs, sizeof number_runs);
    text_add(&image, (const char *)space_runs, sizeof space_runs);
    text_add(&image, text.s, text.n);
    free(text.s);
    return image;
}

// The listed merges. They follow the text, so they are not aligned.
typedef struct __attribute__((packed)) { uint32_t piece, left_n; } StoredMerge;
typedef struct __attribute__((packed)) { uint32_t n; StoredMerge at[]; } StoredMerges;

static void index_pieces(Tokenizer *t, const char *file) {
    uint32_t size = 16;
    while (size < 2 * t->n_pieces) size *= 2;
    t->slots = alloc(size, sizeof *t->slots);
    t->slot_mask = size - 1;
    for (int b = 0; b < 256; b++) t->byte_ids[b] = -1;
    memset(t->alone, 1, 128);
    for (uint32_t i = 0; i < t->n_pieces; i++) {
        const Piece *p = &t->pieces[i];
        bool is_byte = p->n == 1 && (t->kind == BYTE_BPE ? p->rank < RANK_BYTE : p->rank == RANK_BYTE);
        if (is_byte) t->byte_ids[(unsigned char)p->text[0]] = (int32_t)i;
        if (p->rank >= RANK_BYTE) continue;
        uint64_t *slot = find_slot(t, p->text, p->n);
        if (!p->n || *slot) fail("%s: piece %u is empty or stands twice", file, i);
        *slot = hash_bytes(p->text, p->n) >> 32 << 32 | (i + 1);
        for (uint32_t k = 0; k < p->n && p->n > 1; k++) {
            t->alone[(unsigned char)p->text[k]] = false;
            t->inner_blank |= k >= 3 && at_blank(p->text + k, p->n - k) && !at_blank(p->text + k - 3, 3);
        }
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_ids[b] < 0) fail("%s: has no piece for the byte %d, so it cannot encode every text", file, b);
}

static void read_merges(Tokenizer *t, const char *file, const StoredMerges *m) {
    t->listed = alloc(m->n, sizeof *t->listed);
    t->last_listed = alloc(t->n_pieces, sizeof *t->last_listed);
    for (uint32_t i = 0; i < m->n; i++) {
        uint32_t piece = m->at[i].piece;
        if (piece >= t->n_pieces) fail("%s: merge %u is damaged", file, i);
        t->listed[i] = (ListedMerge){ m->at[i].left_n, t->last_listed[piece] };
        t->last_listed[piece] = i + 1;
    }
}

// Makes a tokenizer of the bytes of a tokenizer.bin, and keeps them. They come from the heap, so numbers are aligned.
static Tokenizer *parse_tokenizer(const char *file, char *image, size_t bytes) {
    enum { VERSION, KIND, FLAGS, PIECES, SPECIALS, TEXT_BYTES, LETTERS, NUMBERS, SPACES, FIELDS };  // in class order
    if (bytes < 8 + 4*FIELDS || memcmp(image, "GLMTOKEN", 8)) fail("%s: is no tokenizer.bin of glmtune", file);
    const uint32_t *h = (const uint32_t *)(image + 8), *lengths = h + FIELDS;
    if (h[VERSION] != TOKENIZER_VERSION || (h[KIND] != BYTE_BPE && h[KIND] != SENTENCEPIECE))
        fail("%s: has version %u and kind %u, which this program does not read", file, h[VERSION], h[KIND]);
    uint64_t want = 8 + 4*FIELDS + 8 * ((uint64_t)h[PIECES] + h[SPECIALS]) +
                    4 * ((uint64_t)h[LETTERS] + h[NUMBERS] + h[SPACES]) + h[TEXT_BYTES];
    bool listed = h[FLAGS] & LISTED_MERGES, counted = listed && want + sizeof(StoredMerges) <= bytes;
    const StoredMerges *merges = counted ? (const StoredMerges *)(image + want) : NULL;
    if (listed) want += sizeof *merges + (merges ? merges->n * sizeof *merges->at : 0);
    if (want != bytes) fail("%s: is %zu bytes long, its header says %llu", file, bytes, (unsigned long long)want);
    if (h[PIECES] > MOST_IDS || h[SPECIALS] > MOST_IDS)
        fail("%s: has %u pieces and %u special tokens, at most %d", file, h[PIECES], h[SPECIALS], MOST_IDS);
    Tokenizer *t = alloc(1, sizeof *t);
    *t = (Tokenizer){ .file = strf("%s", file), .image = image, .image_bytes = bytes, .kind = h[KIND],
                      .flags = h[FLAGS], .n_pieces = h[PIECES], .n_specials = h[SPECIALS],
                      .pieces = alloc(h[PIECES], sizeof *t->pieces), .class_of = alloc(0x110000, 1),
                      .specials = alloc(h[SPECIALS], sizeof *t->specials) };
    const uint32_t *ranks = lengths + t->n_pieces, *ids = ranks + t->n_pieces;
    const uint32_t *special_lengths = ids + t->n_specials, *runs = special_lengths + t->n_specials;
    for (int class = CLASS_LETTER; class <= CLASS_SPACE; class++)
        for (uint32_t i = 0, c = 0; i < h[TEXT_BYTES + class]; i++, c += *runs++) {
            if (*runs > 0x110000 - c) fail("%s: a table of Unicode classes is damaged", file);
            if (i % 2) memset(t->class_of + c, class, *runs);
        }
    for (const char *s = " \r\n"; *s; s++)      // the split pattern relies on it
        if (t->class_of[(int)*s] != CLASS_SPACE) fail("%s: a table of Unicode classes is damaged", file);
    const char *text = (const char *)runs;
    uint64_t sum = 0;
    for (size_t i = 0; i < t->n_pieces; i++) sum += lengths[i];
    for (size_t i = 0; i < t->n_specials; i++) sum += special_lengths[i];
    if (sum > h[TEXT_BYTES]) fail("%s: its pieces are longer than its text", file);
    for (size_t i = 0; i < t->n_pieces; text += lengths[i++]) t->pieces[i] = (Piece){ text, lengths[i], ranks[i] };
    for (size_t i = 0; i < t->n_specials; text += special_lengths[i++])
        t->specials[i] = (Special){ checked(strndup(text, special_lengths[i]), 1), (int32_t)ids[i] };
    index_pieces(t, file);
    if (merges) read_merges(t, file, merges);
    return t;
}

// ---- 14.3 Import: SentencePiece ----------------------------------------------------------------------------------
// tokenizer.model of ChatGLM2/3 is a protocol buffer (sentencepiece_model.proto): fields as (number << 3 | wire type),
// type 0 a varint, 2 bytes with their length, 5 four bytes. Needed are the pieces (1: text 1, score 2, type 3), the
// model type (2.3, where 2 is BPE) and the normalizer (3: 2 charsmap, 3 dummy prefix, 4 extra blanks).

typedef struct { const char *file; const unsigned char *p, *end; } Wire;
typedef struct { uint64_t number, type, value; Wire inside; } Field;    // value: of a varint, else the bytes inside

static uint64_t wire_varint(Wire *w) {
    uint64_t v = 0;
    for (int shift = 0; shift < 64 && w->p < w->end; shift += 7) {
        v |= (uint64_t)(*w->p & 127) << shift;
        if (*w->p++ < 128) return v;
    }
    fail("%s: is cut off or no SentencePiece model", w->file);
}

static bool wire_next(Wire *w, Field *f) {
    if (w->p >= w->end) return false;
    uint64_t tag = wire_varint(w), type = tag & 7;
    uint64_t value = type == 0 || type == 2 ? wire_varint(w) : type == 1 ? 8 : 4, n = type ? value : 0;
    if ((type > 2 && type != 5) || n > (uint64_t)(w->end - w->p))
        fail("%s: is cut off or no SentencePiece model", w->file);
    *f = (Field){ tag >> 3, type, value, { w->file, w->p, w->p + n } };
    w->p += n;
    return true;
}

enum { SP_NORMAL = 1, SP_UNKNOWN, SP_CONTROL, SP_USER, SP_UNUSED, SP_BYTE };

// Of the message in field `outer`: the last number in its field `inner`, or what that is by default.
static uint64_t wire_setting(Wire w, uint64_t outer, uint64_t inner, uint64_t value) {
    for (Field f, g; wire_next(&w, &f); )
        while (f.type == 2 && f.number == outer && wire_next(&f.inside, &g)) if (g.number == inner) value = g.value;
    return value;
}

static Text import_sentencepiece(const char *file, const char *bytes, size_t n) {
    static const char *const added[] = { "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>",
                                         "<|assistant|>", "<|observation|>" };      // as the models' tokenizer does
    Wire w = { file, (const unsigned char *)bytes, (const unsigned char *)bytes + n };
    if (wire_setting(w, 2, 3, 1) != 2 || wire_setting(w, 3, 2, 0) || !wire_setting(w, 3, 3, 1) ||
        wire_setting(w, 3, 4, 1))
        fail("%s: is no tokenizer of ChatGLM2 or ChatGLM3 (BPE, dummy prefix, text left as it is)", file);
    Tokenizer t = { .kind = SENTENCEPIECE, .pieces = alloc(n / 2 + 1, sizeof *t.pieces) };  // of two bytes or more each
    Valued *scored = alloc(n / 2 + 1, sizeof *scored);
    for (Field f, g; wire_next(&w, &f); ) {
        if (f.number != 1 || f.type != 2) continue;
        Piece p = { "", 0, SP_NORMAL };         // the type stands for the rank, until all scores are known
        float score = 0;
        while (wire_next(&f.inside, &g)) {
            if (g.number == 1 && g.type == 2) p = (Piece){ (const char *)g.inside.p, (uint32_t)g.value, p.rank };
            if (g.number == 2 && g.type == 5) memcpy(&score, g.inside.p, sizeof score);
            if (g.number == 3) p.rank = (uint32_t)g.value;
        }
        if (!isfinite(score)) fail("%s: piece %u has a score that is not finite", file, t.n_pieces);
        scored[t.n_pieces] = (Valued){ (real)score, (int32_t)t.n_pieces };
        t.pieces[t.n_pieces++] = p;
    }
    t.specials = alloc(t.n_pieces + COUNT(added), sizeof *t.specials);
    qsort(scored, t.n_pieces, sizeof *scored, by_value_down);
    for (uint32_t rank = 0; rank < t.n_pieces; rank++) {
        Piece *p = &t.pieces[scored[rank].id];
        uint32_t type = p->rank, byte;
        p->rank = type == SP_NORMAL ? rank : RANK_NEVER;
        if (type == SP_UNKNOWN || type == SP_CONTROL)
            t.specials[t.n_specials++] = (Special){ checked(strndup(p->text, p->n), 1), scored[rank].id };
        if (type == SP_BYTE && p->n == 6 && sscanf(p->text, "<0x%2X>", &byte) == 1)
            *p = (Piece){ strf("%c", (int)byte), 1, RANK_BYTE };
    }
    for (size_t i = 0; i < COUNT(added); i++)
        t.specials[t.n_specials++] = (Special){ added[i], (int32_t)(t.n_pieces + i) };
    Text image = tokenizer_image(&t);
    free(scored), free(t.pieces), free(t.specials);
    return image;
}

// ---- 14.4 Import: tiktoken ---------------------------------------------------------------------------------------
// tokenizer.model of GLM-4: lines "base64 rank", the ranks in order; the special tokens follow the last.

// Decodes in place; returns the number of bytes, 0 if it is no base64.
static uint32_t base64_decode(char *s, const char *end) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0, n = 0, held = 0;
    for (const char *p = s, *d; p < end && *p != '='; p++) {
        if (!*p || !(d = strchr(digits, *p))) return 0;
        bits = bits << 6 | (uint32_t)(d - digits);
        held += 6;
        if (held >= 8) s[n++] = (char)(bits >> (held -= 8));
    }
    return n;
}

static Text import_tiktoken(const char *file, char *bytes, size_t n) {
    static const char *const added[] = {
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>" };
    Special specials[COUNT(added)];
    Tokenizer t = { .kind = BYTE_BPE, .flags = WHOLE_CHUNKS, .specials = specials, .n_specials = COUNT(added) };
    t.pieces = alloc(n / 4 + 1, sizeof *t.pieces);      // a line has four bytes or more
    for (char *p = bytes, *line, *end = bytes + n; p < end; p = line + 1) {
        line = memchr(p, '\n', (size_t)(end - p));
        if (!line) line = end;
        char *blank = memchr(p, ' ', (size_t)(line - p));
        uint32_t length = blank ? base64_decode(p, blank) : 0;
        if (!length || strtoull(blank + 1, NULL, 10) != t.n_pieces)
            fail("%s:%u: is no line of a tiktoken vocabulary (base64, blank, rank in order)", file, t.n_pieces + 1);
        t.pieces[t.n_pieces] = (Piece){ p, length, t.n_pieces };
        t.n_pieces++;
    }
    for (size_t i = 0; i < COUNT(added); i++) specials[i] = (Special){ added[i], (int32_t)(t.n_pieces + i) };
    Text image = tokenizer_image(&t);
    free(t.pieces);
    return image;
}

// ---- 14.5 Import: tokenizer.json ---------------------------------------------------------------------------------
// Hugging Face's file of a byte-level BPE, as GLM-4's "hf" releases, GLM-4-0414 and GLM-Edge have it. Its texts are
// written in an alphabet of 256 visible characters, one for each byte. What glmtune does not do, it refuses here.
// Added tokens are never found in text, whatever the file says: see 7.2.

// That text is split and merged as 7.3 does it. Null, false, 0, "" and nothing are the same; an object is its "type".
static void check_tokenizer_json(const JsonReader *r, const Json *root, const Json *model) {
    const Json *before = want(r, root, "pre_tokenizer", JSON_OBJECT, "a Sequence of Split and ByteLevel");
    const Json *parts = want(r, before, "pretokenizers", JSON_ARRAY, "an array of Split and ByteLevel");
    if (parts->count != 2) fail("%s: \"pretokenizers\" must be Split and ByteLevel", where(r, parts));
    const Json *split = parts->first, *bytes = split->next;
    const struct { const Json *in; const char *key, *known; } settings[] = {
        { root, "normalizer", "" }, { model, "type", "BPE" }, { model, "dropout", "" }, { model, "unk_token", "" },
        { model, "continuing_subword_prefix", "" }, { model, "end_of_word_suffix", "" }, { model, "byte_fallback", "" },
        { split, "type", "Split" }, { split, "behavior", "Isolated" }, { split, "invert", "" },
        { bytes, "type", "ByteLevel" }, { bytes, "add_prefix_space", "" }, { bytes, "use_regex", "" } };
    for (size_t i = 0; i < COUNT(settings); i++) {
        const Json *j = json_get(settings[i].in, settings[i].key);
        const Json *of = json_is(j, JSON_OBJECT) ? json_get(j, "type") : j;
        const char *is = json_is(of, JSON_STRING) ? of->text :
                         j && (j->type > JSON_NUMBER || j->number != 0) ? "set" : "";
        if (strcmp(is, settings[i].known))
            fail("%s: \"%s\" is '%s', but glmtune reads only byte-level BPE that has '%s' there",
                 where(r, j ? j : settings[i].in), settings[i].key, is, settings[i].known);
    }
    static const char *const contractions[] = { "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)" };
    static const char others[] = "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
                                 "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    want(r, bytes, "use_regex", JSON_BOOL, "false");
    const Json *pattern = want(r, split, "pattern", JSON_OBJECT, "an object with a \"Regex\"");
    pattern = want(r, pattern, "Regex", JSON_STRING, "a regular expression");
    for (int i = 0; i < 2; i++) if (!strcmp(pattern->text, strf("%s%s", contractions[i], others))) return;
    fail("%s: text is split by '%s', and glmtune knows only GLM-4's pattern", where(r, pattern), pattern->text);
}

// Writes the bytes that a text stands for; returns their number, 0 if a character is not in the alphabet (an added
// token's). Visible Latin-1 stands for itself, U+0100 and on for the other bytes in order: 0 to 32, 127 to 160, 173.
static uint32_t alphabet_decode(const char *s, size_t n, char *out) {
    uint32_t c, written = 0;
    for (size_t at = 0, length; at < n; at += length, out[written++] = (char)c) {
        c = utf8_get(s + at, n - at, &length);
        if (c <= 32 || (c >= 127 && c <= 160) || c == 173 || c > 256 + 67) return 0;
        if (c >= 256) c = c < 256 + 33 ? c - 256 : c < 256 + 67 ? c - (256 + 33) + 127 : 173;
    }
    return written;
}

static uint32_t json_id(const JsonReader *r, const Json *j) {
    size_t id;
    if (!json_size(j, &id) || id >= MOST_IDS)
        fail("%s: \"%s\" must be a token id, 0 to %d", where(r, j), j->key, MOST_IDS - 1);
    return (uint32_t)id;
}

// The pieces of "vocab", with the hash table that finds them. An id without a piece gets an empty one, never used.
static Tokenizer json_vocabulary(const JsonReader *r, const Json *vocab, char *text) {
    Tokenizer t = { .kind = BYTE_BPE };
    for (const Json *j = vocab->first; j; j = j->next) t.n_pieces = (uint32_t)max_size(t.n_pieces, json_id(r, j) + 1);
    t.pieces = alloc(t.n_pieces, sizeof *t.pieces);
    for (uint32_t i = 0; i < t.n_pieces; i++) t.pieces[i] = (Piece){ "", 0, RANK_NEVER };
    for (const Json *j = vocab->first; j; j = j->next) {
        Piece *p = &t.pieces[json_id(r, j)];
        if (p->n) fail("%s: the id of '%s' stands twice", where(r, j), j->key);
        *p = (Piece){ text, alphabet_decode(j->key, strlen(j->key), text), 0 };
        if (!p->n) *p = (Piece){ j->key, (uint32_t)strlen(j->key), RANK_NEVER };
        else text += p->n;
    }
    index_pieces(&t, r->file);
    return t;
}

// Adds the piece that a merge makes and the bytes of its left part: "a b" or ["a", "b"]. s: room for both.
static void json_merge(const JsonReader *r, const Json *j, const Tokenizer *t, char *s, Text *image) {
    bool pair = j->type == JSON_ARRAY && j->count == 2;
    const char *a = pair ? j->first->text : j->text, *blank = a && !pair ? strchr(a, ' ') : NULL;
    const char *b = pair ? j->first->next->text : blank ? blank + 1 : NULL;
    uint32_t left_n = a && b ? alphabet_decode(a, blank ? (size_t)(blank - a) : strlen(a), s) : 0;
    uint32_t right_n = b ? alphabet_decode(b, strlen(b), s + left_n) : 0;
    int64_t made = find_piece(t, s, left_n + right_n);
    if (made < 0 || find_piece(t, s, left_n) < 0 || find_piece(t, s + left_n, right_n) < 0)     // no piece is empty
        fail("%s: a merge must be \"a b\" or [\"a\", \"b\"], with a, b and ab in \"vocab\"", where(r, j));
    image_add(image, (uint32_t)made), image_add(image, left_n);
}

static Text import_tokenizer_json(const char *file, const char *bytes, size_t n) {
    JsonReader r = json_open(file, bytes, n);
    const Json *root = json_only(&r), *model = want(&r, root, "model", JSON_OBJECT, "an object");
    const Json *merges = want(&r, model, "merges", JSON_ARRAY, "an array of merges");
    const Json *added = want(&r, root, "added_tokens", JSON_ARRAY, "an array of tokens");
    check_tokenizer_json(&r, root, model);
    char *text = alloc(3*n, 1);          // of the pieces, and behind it of one merge
    Tokenizer t = json_vocabulary(&r, want(&r, model, "vocab", JSON_OBJECT, "an object of pieces and ids"), text);
    t.flags = LISTED_MERGES | (config_flag(model, "ignore_merges", false) ? WHOLE_CHUNKS : 0);
    t.specials = alloc(added->count, sizeof *t.specials);
    for (const Json *j = added->first; j; j = j->next) {
        const Json *content = want(&r, j, "content", JSON_STRING, "the token's text");
        uint32_t id = json_id(&r, want(&r, j, "id", JSON_NUMBER, "a token id"));
        t.specials[t.n_specials++] = (Special){ content->text, (int32_t)id };
        if (id < t.n_pieces) t.pieces[id].rank = RANK_NEVER;
    }
    Text image = tokenizer_image(&t);
    image_add(&image, (uint32_t)merges->count);
    for (const Json *j = merges->first; j; j = j->next) json_merge(&r, j, &t, text + n, &image);
    json_close(&r);
    free(t.pieces), free(t.slots), free(t.specials), free(text);
    return image;
}

// ---- 14.6 Finding the tokenizer of a model -----------------------------------------------------------------------

static const char *program_path(void) {         // NULL: it cannot be told
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    return n > 0 ? strf("%.*s", (int)n, path) : NULL;
}

// A tokenizer from its file, whichever of the known kinds it is.
static Tokenizer *load_tokenizer_file(const char *path) {
    size_t n;
    char *bytes = read_file(path, &n);
    if (n >= 8 && !memcmp(bytes, "GLMTOKEN", 8)) return parse_tokenizer(path, bytes, n);
    if (!n) fail("%s: the file is empty", path);
    refuse_disguise(path, bytes, n);
    // a SentencePiece model begins with the tag of its first field (1, bytes), which is a line break
    Text image = bytes[0] == '{' || ends_in(path, ".json") ? import_tokenizer_json(path, bytes, n) :
                 bytes[0] == '\n' ? import_sentencepiece(path, bytes, n) : import_tiktoken(path, bytes, n);
    free(bytes);
    return parse_tokenizer(path, image.s, image.n);
}

// The tokenizer of a folder, else the one beside the program if its ids are below `room`; NULL: none, `why` says so.
static Tokenizer *load_tokenizer(const char *folder, size_t room, const char **why) {
    static const char *const files[] = { "tokenizer.bin", "tokenizer.model", "tokenizer.json" };
    for (size_t i = 0; i < COUNT(files); i++) {
        const char *path = strf("%s/%s", folder, files[i]);
        if (exists(path)) return load_tokenizer_file(path);
    }
    const char *program = program_path(), *slash = program ? strrchr(program, '/') : NULL;
    const char *own = slash ? strf("%.*s/%s", (int)(slash - program), program, files[0]) : files[0];
    Tokenizer *t = exists(own) ? load_tokenizer_file(own) : NULL;
    *why = strf("%s: has no tokenizer (tokenizer.bin, tokenizer.model or tokenizer.json), and %s %s", folder, own,
                t ? "is not for this model" : "is missing");
    return t && (size_t)largest_id(t) < room ? t : NULL;
}

// ==== 15  Instruments ============================================================================================
// They look at a model or a run from outside: memory, time and disk, numbers and gradients, curves.

// ---- 15.1 The memory plan ----------------------------------------------------------------------------------------

static const char *size_text(size_t bytes) {
    static const char *const units[] = { "bytes", "KiB", "MiB", "GiB", "TiB" };
    double n = (double)bytes;
    size_t unit = 0;
    for (; n >= 1000 && unit + 1 < COUNT(units); unit++) n /= 1024;
    return strf("%.3g %s", n, units[unit]);
}

// The sum of the numbers in a file's lines "word number" with these words; words NULL: of the numbers that begin
// its lines. Where there is none, or no file: `unknown`.
static size_t number_in(const char *path, const char *words, size_t unknown) {
    char line[256], key[64];
    size_t n, found = 0, sum = unknown;
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
        if (words ? sscanf(line, "%63s %zu", key, &n) == 2 && list_has(words, key) : sscanf(line, "%zu", &n) == 1)
            sum = n + (found++ ? sum : 0);
    if (f) fclose(f);
    return sum;
}

// Bytes that may still be taken: of the device, else of this system, its container (cgroup) and `ulimit -v` the least.
static size_t available_bytes(void) {
    if (memory_left() < SIZE_MAX) return memory_left();
    size_t page = (size_t)sysconf(_SC_PAGESIZE), all = (size_t)sysconf(_SC_PHYS_PAGES) * page;
    size_t available = 1024 * number_in("/proc/meminfo", "MemAvailable:", all / 1024);
    size_t most = number_in("/sys/fs/cgroup/memory.max", NULL, SIZE_MAX);
    size_t used = number_in("/sys/fs/cgroup/memory.current", NULL, 0);
    used -= min_size(used, number_in("/sys/fs/cgroup/memory.stat", "active_file,inactive_file", 0));   // they give way
    available = min_size(available, most - min_size(used, most));
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit)) return available;
    used = number_in("/proc/self/statm", NULL, 0) * page;
    return min_size(available, (size_t)limit.rlim_cur - min_size(used, (size_t)limit.rlim_cur));
}

static void need_memory(size_t bytes, const char *lower) {
    size_t available = available_bytes();
    if (bytes > available)
        fail("not enough memory: %s are needed, %s are free; lower %s", size_text(bytes), size_text(available), lower);
}

static size_t run_bytes(Model *m, const Method *method, RunKind kind, size_t T) {
    Run r = describe_run(m, method, kind, T, T);
    free(r.layers);
    return bytes_of(&r);
}

// Bytes of a tensor in its file, with its scales.
static size_t stored_bytes(const Tensor *t) { return dtype_bytes(t->file_dtype, t->n) + t->scale_bytes; }

static void print_plan(FILE *out, Model *m, const Method *method, RunKind kind, size_t T) {
    Run r = describe_run(m, method, kind, T, T);
    size_t mapped = 0, trainables = trainable_bytes(m, true);
    for (size_t i = 0; i < m->n_tensors; i++) mapped += stored_bytes(m->tensors[i]);
    fprintf(out, "memory: %s %s (base), %s own: %s for what trains, %s activations and %s scratch for %zu tokens%s\n",
            size_text(mapped), memory_left() < SIZE_MAX ? "uploaded" : "mapped",
            size_text(trainables + bytes_of(&r)), size_text(trainables),
            size_text(r.kept_arena.used), size_text(r.scratch_arena.used), T,
            kind == RECOMPUTES ? "; every layer is computed twice" : "");
    free(r.layers);
}

// Bytes of the base's file that every step reads: where they do not stay in memory, it waits for the disk.
static size_t bytes_read(const Model *m) {
    size_t bytes = 0;
    for (size_t i = 0; i < m->n_tensors && memory_left() == SIZE_MAX; i++) {
        const Tensor *t = m->tensors[i];
        bool of_few_rows = t == m->embedding && t != m->head;
        bytes += t->trained || of_few_rows ? 0 : stored_bytes(t);
    }
    return bytes;
}

// Prints what batches of T tokens take, and returns how the run shall work: it recomputes where that was asked for or
// where memory is short. Where even this is too much, the error names a size of batch that fits.
static RunKind plan_memory(Model *m, const Method *method, bool recompute, size_t T) {
    size_t trainables = trainable_bytes(m, true), available = available_bytes(), fits = T;
    size_t keeps = run_bytes(m, method, KEEPS_ALL, T), recomputes = run_bytes(m, method, RECOMPUTES, T);
    bool is_short = trainables + keeps + bytes_read(m) > available;
    RunKind kind = recompute || (is_short && recomputes < keeps) ? RECOMPUTES : KEEPS_ALL;
    size_t own = trainables + (kind == RECOMPUTES ? recomputes : keeps);
    print_plan(stderr, m, method, kind, T);
    if (own <= available) return kind;
    while (fits && trainables + run_bytes(m, method, kind, fits) > available) fits = fits * 7 / 8;
    if (!fits)
        fail("not enough memory: %s are needed, %s for what trains alone, %s are free; train less: --method lora, a "
             "lower --r, fewer --target_modules", size_text(own), size_text(trainables), size_text(available));
    fail("not enough memory: %s are needed for batches of %zu tokens, %s are free; batches of %zu tokens fit: lower "
         "--per_device_train_batch_size, or --max_input_length with --overlong truncate", size_text(own), T,
         size_text(available), fits);
}

// ---- 15.2 Time and disk ------------------------------------------------------------------------------------------

static double seconds_when_done(void) { return finish_kernels(), seconds(); }

static const char *time_text(double s) {
    long long n = (long long)s;
    if (s < 1) return strf("%.0f ms", s * 1e3);
    return n < 60 ? strf("%.*f s", s < 10, s) : strf("%lld:%02lld:%02lld", n / 3600, n / 60 % 60, n % 60);
}

// Seconds: of forward and backward, and of forward alone, for a token; of the optimizer for a step.
typedef struct { double both, forward, optimizer; } Pace;

// Computes batches of the data for half a second, each of about BATCH_TOKENS or one sample. The first one also fills
// memory and caches: it counts only if it takes longer than that. Steps of the optimizer have rate 0 and gradients of
// zero, so they leave weights and fresh moments as they are.
static Pace measure_pace(Run *r, const Dataset *set, size_t batch_size, const Options *o) {
    Model *m = r->model;
    Pace p = {0};
    size_t n = min_size(min_size(batch_size, set->n), max_size(1, BATCH_TOKENS / set->longest));
    size_t *order = epoch_order(set->n, 0, 0), *chosen = alloc(n, sizeof *chosen);
    double tokens = 0, spent = 0, began, halfway;
    for (size_t i = 0; !i || (spent < 0.5 && i < 100); i++) {
        if (i == 1 && spent < 0.5) p = (Pace){0}, tokens = 0;
        for (size_t k = 0; k < n; k++) chosen[k] = order[(i * n + k) % set->n];
        Batch b = make_batch(set, chosen, n, i, 0);
        began = seconds_when_done(), forward_loss(r, &b);
        halfway = seconds_when_done(), forward_backward(r, &b, b.T, o->label_smoothing_factor, true);
        p.forward += halfway - began, p.both += seconds_when_done() - halfway;
        tokens += (double)b.T, spent += seconds() - began;
        free_batch(&b);
    }
    for (size_t i = 0; !i || (i < 3 && p.optimizer < 0.5); i++) {
        zero_gradients(m);
        began = seconds_when_done(), clip_gradients(m, o->max_grad_norm), optimizer_step(m, o, 0, 1), zero_gradients(m);
        p.optimizer = seconds_when_done() - began;
    }
    free(order), free(chosen);
    return (Pace){ p.both / tokens, p.forward / tokens, p.optimizer };
}

// How long the run will take, in words. Two guesses: every second validation that may save a checkpoint is a new best,
// and a checkpoint takes 50 ms and 5 ns a byte.
static char *time_plan(Trainer *t) {
    Pace p = measure_pace(&t->run, &t->train, t->batch_size, t->o);
    double epochs = (double)t->steps / (double)t->steps_per_epoch, n_old = (double)(t->train.n - t->n_new), tokens = 0;
    for (size_t i = 0; i < t->train.n; i++)
        tokens += (double)t->train.samples[i].n * (i < t->n_new ? 1 : t->replay_ratio * (double)t->n_new / n_old);
    double evaluation = p.forward * (double)t->validation.n_tokens, saves = (double)t->steps / (double)t->o->save_steps;
    double training = tokens * p.both * epochs + p.optimizer * (double)t->steps;
    if (t->validation.n) saves += (double)t->steps / fmax((double)eval_every(t), (double)t->saves_after) / 2;
    double all = training + evaluation * (double)(1 + t->steps / eval_every(t)) +
                 saves * (0.05 + 5e-9 * (double)checkpoint_bytes(t->run.model));
    bool may_stop = t->o->early_stopping_patience && t->validation.n;
    return strf("%s %s (a step %s, a validation %s)", may_stop ? "at most" : "about", time_text(all),
                time_text(training / (double)t->steps), time_text(evaluation));
}

// Free bytes of the disk that a folder lies on; SIZE_MAX: unknown.
static size_t disk_left(const char *folder) {
    struct statvfs disk;
    size_t bytes;
    return statvfs(folder, &disk) || __builtin_mul_overflow(disk.f_bavail, disk.f_frsize, &bytes) ? SIZE_MAX : bytes;
}

// What checkpoints take, in words; an error where the disk cannot hold `most` side by side (one is being written).
static char *disk_plan(const Trainer *t) {
    const char *folder = t->o->output_dir;
    size_t limit = (size_t)t->o->save_total_limit, all = (size_t)((t->steps + t->o->save_steps - 1) / t->o->save_steps);
    bool validates = t->validation.n > 0;
    size_t most = limit ? min_size(validates ? SIZE_MAX : all, max_size(limit, validates ? 2 : 1) + 1) : all;
    size_t *steps, there = list_checkpoints(folder, &steps), left = disk_left(folder);
    size_t one = checkpoint_bytes(t->base.model), more = times(most - min_size(there, most), one);
    free(steps);
    if (more > left)
        fail("%s: not enough disk: %s are needed for %zu checkpoints side by side, %s are free; choose another "
             "disk, or keep fewer: --save_total_limit 1, --val_size 0", folder, size_text(more), most, size_text(left));
    return strf("a checkpoint takes %s, %s; %s are free", size_text(one),
                limit ? "the newest and the best are kept" : "all are kept", size_text(left));
}

// The same kind of model, small enough to measure in a second: one layer, at most 2048 wide, a small vocabulary.
static Config shrunk(Config c) {
    size_t by = 1;
    while (c.hidden_size / by > 2048 && c.n_heads % (2 * by) == 0) by *= 2;
    c.n_layers = 1, c.vocab_size = min_size(c.vocab_size, 8192);
    c.hidden_size /= by, c.ffn_dim = max_size(1, c.ffn_dim / by), c.n_heads /= by;
    c.n_kv_heads = min_size(c.n_kv_heads, c.n_heads);
    while (c.n_heads % c.n_kv_heads) c.n_kv_heads--;
    return c;
}

// Multiply-adds of the matrices for a token (attention has few): forward, or backward as far down as gradients flow.
static double work_of(const Model *m, bool back) {
    size_t L = m->config.n_layers;
    double sum = (double)m->head->n * (back ? (m->lowest < depth_of(L, 1)) + m->head->trained : 1);
    for (size_t l = 0; l < L; l++)
        for (const Linear *w = m->layers[l].maps; w < m->layers[l].maps + m->layers[l].n_maps; w++)
            sum += (double)w->weight->n * (back ? (m->lowest < w->depth) + w->weight->trained : 1);
    return sum;
}

// What tuning costs on this machine, from a config alone: measures a small model, and scales its pace by the work and
// by the numbers that train. Says nothing of time where even the small model takes much memory.
static void print_speed_here(Model *whole, const Method *method, const Options *options) {
    enum { T = 256 };
    Options o = *options;
    Model *m = describe_model(shrunk(whole->config));
    printf("disk: a checkpoint takes %s; a run keeps the newest and the best\n", size_text(checkpoint_bytes(whole)));
    o.trainable_layers = o.trainable_layers > 0;
    method->setup(m, &o);
    m->n_moments = whole->n_moments;
    Run r = describe_run(m, method, o.gradient_checkpointing ? RECOMPUTES : KEEPS_ALL, T, T);
    size_t bytes = count_parameters(m->tensors, m->n_tensors) * sizeof(real) + trainable_bytes(m, true) + bytes_of(&r);
    if (bytes > min_size(available_bytes() / 2, (size_t)4 << 30)) return;
    bind_random(m, (uint64_t)o.seed, 0.02);
    start_trainables(m, (uint64_t)o.seed, true);
    take_run(&r);
    Batch b = fixed_batch(m, T);
    Dataset set = {0};
    dataset_add(&set, (Sample){ .ids = b.ids, .labels = b.labels, .n = T });
    Pace p = measure_pace(&r, &set, 1, &o);
    double forward = p.forward * work_of(whole, false) / work_of(m, false);
    double both = forward + (p.both - p.forward) * work_of(whole, true) / work_of(m, true);
    double step = 1024 * both + p.optimizer * (double)count_parameters(whole->trained, whole->n_trained) /
                                (double)count_parameters(m->trained, m->n_trained);
    printf("time on this machine: a step of 1024 tokens %s (%.3g tokens/s), validating as many %s; 400 samples of 256 "
           "tokens, an epoch: %s\n", time_text(step), 1 / both, time_text(1024 * forward), time_text(100 * step));
    free_batch(&b), give_run(&r);
}

// ---- 15.3 Dump: hidden states, logits and every gradient of one batch --------------------------------------------

// All samples of a file as one batch, in order.
static Batch read_batch(const char *path, const Config *c, size_t *n_targets) {
    Options o = { .max_input_length = INT32_MAX, .max_output_length = INT32_MAX, .overlong = "error",
                  .prompt_column = "prompt", .response_column = "response", .history_column = "history" };
    ChatFormat none = { .why = "a batch must hold ready \"input_ids\" and \"labels\"", .config = c };
    Dataset set = read_data_file(path, &none, &o, false);
    if (!set.n_targets) fail("%s: has no target in any sample, so no loss", path);
    *n_targets = set.n_targets;
    return make_batch(&set, NULL, set.n, 0, 0);
}

// Adds a tensor [rows,columns], or [rows] where columns is 0, whose data lie on the host.
static void list_add(TensorSet *l, const char *key, Dtype dtype, size_t rows, size_t columns, const void *data) {
    l->tensors = grow(l->tensors, &l->capacity, l->n + 1, sizeof *l->tensors);
    l->tensors[l->n++] = (StoredTensor){ .name = (char *)key, .dtype = dtype, .data = data, .n_dims = columns ? 2 : 1,
                                         .shape = { rows, columns }, .n = rows * max_size(columns, 1) };
}

static void list_add_reals(TensorSet *l, const char *key, size_t rows, size_t columns, const real *device) {
    size_t n = rows * max_size(columns, 1);
    real *host = alloc(n, sizeof *host);
    memory_copy_out(host, device, n * sizeof *host);
    list_add(l, key, REAL, rows, columns, host);
}

static void list_add_activations(TensorSet *l, Run *r, const Batch *b) {
    size_t T = b->T, H = r->model->config.hidden_size, V = r->model->config.vocab_size, L = r->model->config.n_layers;
    real *logits = all_logits(r, b);
    for (size_t i = 0; i <= L; i++) list_add_reals(l, strf("hidden.%zu", i), T, H, i < L ? r->layers[i].x : r->x_final);
    list_add_reals(l, "final_norm", T, H, r->final);
    list_add(l, "logits", REAL, T, V, logits);
}

// The first n_host lie on the host, the others, of REAL numbers, in model memory.
static void write_list(const char *path, const TensorSet *l, size_t n_host) {
    TensorWriter w = begin_tensor_file(path, l->tensors, l->n, "");
    for (size_t i = 0; i < l->n; i++) {
        const StoredTensor *s = &l->tensors[i];
        if (i < n_host) write_tensor_bytes(&w, s->data, s->n * dtype_size(s->dtype));
        else write_numbers(&w, s->name, s->data, s->n, REAL);
    }
    finish_tensor_file(&w);
}

static void dump(const char *model, const char *batch, const char *out, Options *o) {
    Opened opened = open_model(model, o);
    Model *m = opened.model;
    check_out(out, &opened.folder, 1, o->force);
    check_fingerprint(&opened, NULL, o);
    for (size_t i = 0; !opened.method && i < m->n_tensors; i++)        // codes have no gradient
        if (!m->tensors[i]->scales) train_tensor(m, m->tensors[i]);
    if (!opened.method) opened.method = find_method("full");
    size_t n_targets;
    Batch b = read_batch(batch, &m->config, &n_targets);
    m->n_moments = 0;
    Run r = describe_run(m, opened.method, plan_memory(m, opened.method, false, b.T), b.T, b.T);
    start_method(&opened, 0, true);
    take_run(&r);
    double loss = forward_backward(&r, &b, n_targets, 0, false) / (double)n_targets;
    TensorSet l = {0};
    if (!isfinite(loss)) fail("%s: the loss of this batch is not finite; the weights are damaged", model);
    list_add(&l, "ids", I32, b.T, 0, b.ids);
    list_add(&l, "labels", I32, b.T, 0, b.labels);
    list_add(&l, "loss", REAL, 1, 0, &(real){ (real)loss });
    list_add_activations(&l, &r, &b);
    size_t n_host = l.n;                // gradients may be as large as the model: they are written from where they lie
    for (size_t i = 0; i < m->n_trained; i++) {
        const Tensor *t = m->trained[i];
        list_add(&l, strf("grad.%s", t->name), REAL, t->shape[0], t->shape[1], t->grad);
    }
    write_list(out, &l, n_host);
    printf("%s: %zu tokens, loss %.9g, %zu tensors\n", out, b.T, loss, l.n);
}

// ---- 15.4 Gradient check -----------------------------------------------------------------------------------------
// Compares gradients g with the slope fd of the loss, by five-point central differences (in double, h = 1e-3):
//     f'(x) = (f(x-2h) - 8 f(x-h) + 8 f(x+h) - f(x+2h)) / 12h
// error = |fd - g| / max(|fd|, |g|, 0.01 max|g| of the tensor), which must be at most 1e-6. Where all gradients of a
// tensor are below 1e-12 (a key bias that moves all scores alike), the slope itself must be below 1e-10.
// Numbers whose differences meet a kink of a ReLU are skipped and counted.
//
// In single precision, so on a GPU too, a slope is too coarse. There all gradients are compared with the truth, which
// glmtune64 has checked and written: |g - truth| / max(|truth|, 0.001 of the largest |truth|) must be at most 1e-4,
// with 2-norms of a tensor. (The largest, for a bias of one number may be a sum of which next to nothing is left, and a
// key's bias is nothing but that.) With --precision bf16 the floor is 0.05 and the bar 3e-2; measured 1.4e-2.

// Small models of each kind: grouped heads, tied, post norms, odd sizes.
static const char *const gradcheck_configs[] = {
    ("{\"model_type\": \"chatglm\", \"padded_vocab_size\": 31, \"hidden_size\": 12, \"num_layers\": 2,"
     " \"kv_channels\": 8, \"num_attention_heads\": 4, \"multi_query_attention\": true, \"multi_query_group_num\": 2,"
     " \"ffn_hidden_size\": 10, \"add_qkv_bias\": true, \"rope_ratio\": 50}"),
    ("{\"model_type\": \"glm\", \"vocab_size\": 29, \"hidden_size\": 14, \"num_hidden_layers\": 2, \"head_dim\": 6,"
     " \"num_attention_heads\": 3, \"num_key_value_heads\": 1, \"intermediate_size\": 9, \"attention_bias\": false,"
     " \"partial_rotary_factor\": 1.0, \"tie_word_embeddings\": true, \"max_position_embeddings\": 64}"),
    ("{\"model_type\": \"glm4\", \"vocab_size\": 23, \"hidden_size\": 26, \"num_hidden_layers\": 2, \"head_dim\": 12,"
     " \"num_attention_heads\": 2, \"num_key_value_heads\": 2, \"intermediate_size\": 35, \"attention_bias\": true,"
     " \"max_position_embeddings\": 64}"),
};

static Batch random_batch(size_t V, uint64_t seed, size_t *n_targets) {
    static const size_t starts[] = { 0, 7, 8, 19, 21 };
    enum { N = COUNT(starts) - 1, T = 21 };
    Batch b = { .n = N, .T = T, .step_key = seed, .starts = alloc(N + 1, sizeof *b.starts),
                .ids = alloc(T, sizeof *b.ids), .labels = alloc(T, sizeof *b.labels),
                .token_keys = alloc(T, sizeof *b.token_keys) };
    memcpy(b.starts, starts, sizeof starts);
    *n_targets = 0;
    for (size_t s = 0, t = 0; s < N; s++)
        for (; t < starts[s+1]; t++) {
            b.ids[t] = (int32_t)(rng_bits(seed, t) % V);
            b.labels[t] = rng_bits(seed, T + t) % 4 ? b.ids[t] : NO_TARGET;
            b.token_keys[t] = rng_bits(seed, 2*T + t);
            *n_targets += t > starts[s] && b.labels[t] != NO_TARGET;
        }
    return b;
}

typedef struct { Run *run; const Batch *batch; size_t n_targets; double smoothing; } Slope;     // what the loss is of

// gradients: all that were checked, for --out; truth: what --truth holds, largest: the largest 2-norm of its tensors
typedef struct { const Options *o; TensorSet gradients, truth; double largest; } Gradcheck;

static double finite_difference(const Slope *s, const Tensor *t, size_t i, real h) {
    static const double factor[] = { 1, -8, 8, -1 }, place[] = { -2, -1, 1, 2 };
    real x;
    double slope = 0;
    memory_copy_out(&x, t->value + i, sizeof x);
    for (size_t k = 0; k < COUNT(place); k++) {
        memory_copy_in(t->value + i, &(real){ x + (real)place[k] * h }, sizeof x);
        forward(s->run, s->batch, true);
        slope += factor[k] * (head_loss(s->run, (real)s->smoothing, 0) / (double)s->n_targets);
    }
    memory_copy_in(t->value + i, &x, sizeof x);
    return slope / (12 * (double)h);
}

static bool print_check(const Tensor *t, double error, bool passed, const char *note) {
    printf("%-75s %8zu %10.2e  %s%s\n", t->name, t->n, error, passed ? "ok" : "WRONG", note);
    return passed;
}

// Checks up to `elements` numbers of a tensor's gradient g, spread over it, and prints its row; true: they are right.
static bool check_tensor(const Slope *s, const Tensor *t, const real *g, size_t elements) {
    double largest = 0, worst = 0;
    size_t kinks = 0, n = min_size(elements, t->n);
    for (size_t i = 0; i < t->n; i++) largest = fmax(largest, fabs((double)g[i]));
    for (size_t k = 0; k < n; k++) {
        size_t i = t->n * k / n;
        double fd = finite_difference(s, t, i, (real)1e-3);
        double scale = fmax(fmax(fabs(fd), fabs((double)g[i])), 0.01 * largest);
        double error = largest < 1e-12 && fabs(fd) < 1e-10 ? 0 : fabs(fd - (double)g[i]) / scale;
        // two widths that disagree have a kink between them; a wrong gradient disagrees with both
        bool kink = error > 1e-6 && fabs(finite_difference(s, t, i, (real)1.25e-4) - fd) > 1e-6 * scale;
        kinks += kink;
        if (!kink && !isnan(worst) && !(error <= worst)) worst = error;
    }
    return print_check(t, worst, worst <= 1e-6 && 2 * kinks <= n,
                       kinks ? strf(", %zu of %zu at a kink of a ReLU and skipped", kinks, n) : "");
}

// The 2-norm of s - g, where s holds doubles; g NULL: of s.
static double distance(const StoredTensor *s, const real *g) {
    const double *truth = s->data;
    double squares = 0;
    for (size_t i = 0; i < s->n; i++) squares += pow(truth[i] - (g ? (double)g[i] : 0), 2);
    return sqrt(squares);
}

// The same in single precision, by the tensor of the truth that is `listed` under this name.
static bool compare_tensor(const Gradcheck *check, const char *listed, const Tensor *t, const real *g) {
    const StoredTensor *s = find_tensor(&check->truth, listed);
    if (!s || !has_shape(s, t))
        fail("%s: has no gradient '%s' of shape %s; write it with the same options: glmtune64 gradcheck --out FILE",
             check->o->truth, listed, shape_text(t->shape, t->n_dims));
    bool bf16 = !strcmp(check->o->precision, "bf16");
    double error = distance(s, g) / fmax(distance(s, NULL), (bf16 ? 0.05 : 1e-3) * check->largest);
    return print_check(t, error, error <= (bf16 ? 3e-2 : 1e-4), "");
}

// Checks a method on a model, after what the method adds was made random too; returns how many tensors failed.
static size_t gradcheck_method(Gradcheck *check, Model *m, const Method *method) {
    const Options *o = check->o;
    uint64_t seed = (uint64_t)o->seed;
    size_t n_targets, failed = 0;
    Batch b = random_batch(m->config.vocab_size, seed, &n_targets);
    method->setup(m, o);
    start_trainables(m, seed, true);
    for (size_t i = 0; i < m->n_trained; i++)
        if (!m->trained[i]->of_base) random_tensor(m->trained[i]->value, m->trained[i], seed, o->std, true);
    Run r = describe_run(m, method, KEEPS_ALL, b.T, b.T);
    Slope slope = { &r, &b, n_targets, o->label_smoothing_factor };
    take_run(&r);
    zero_gradients(m);
    forward_backward(&r, &b, n_targets, o->label_smoothing_factor, true);
    for (size_t i = 0; i < m->n_trained; i++) {
        const Tensor *t = m->trained[i];
        const char *listed = strf("%s: %s", m->config.model_type, t->name);
        list_add_reals(&check->gradients, listed, t->shape[0], t->shape[1], t->grad);
        const real *g = check->gradients.tensors[check->gradients.n - 1].data;
        failed += !(sizeof(real) < 8 ? compare_tensor(check, listed, t, g)
                                     : check_tensor(&slope, t, g, (size_t)o->elements));
    }
    give_run(&r);
    free_batch(&b);
    return failed;
}

static int gradcheck(const char *folder, const Options *o) {
    Gradcheck check = { .o = o };
    size_t failed = 0;
    const Method *method = find_method(o->method);
    if ((sizeof(real) < 8) != (o->truth != NULL) || (o->out && o->truth))
        fail("gradcheck takes slopes in double: glmtune64 gradcheck [--out FILE] (make glmtune64); in single precision "
             "it compares with what that wrote: --truth FILE");
    if (o->truth) read_tensor_file(&check.truth, o->truth);
    for (size_t i = 0; i < check.truth.n; i++) {
        const StoredTensor *s = &check.truth.tensors[i];
        if (s->dtype != F64) fail("%s: '%s' is %s, not F64: write it by glmtune64", s->file, s->name, s->dtype_name);
        check.largest = fmax(check.largest, distance(s, NULL));
    }
    if (folder) failed = gradcheck_method(&check, load_model(folder), method);
    for (size_t i = 0; !folder && i < COUNT(gradcheck_configs); i++) {
        Model *m = describe_model(parse_config(strf("small model %zu", i + 1), gradcheck_configs[i]));
        printf("%s, method %s\n", m->config.model_type, method->name);
        bind_random(m, (uint64_t)o->seed, o->std);
        failed += gradcheck_method(&check, m, method);
    }
    if (o->out && !failed) write_list(o->out, &check.gradients, check.gradients.n);
    if (failed) printf("the gradients are WRONG\n");
    else printf("all gradients agree with %s\n", o->truth ? o->truth : "finite differences");
    return failed > 0;
}

// ---- 15.5 Curves -------------------------------------------------------------------------------------------------
// loss.svg, and the picture that `compare` makes, drawn from log.jsonl alone: so a resumed run has the same curves. A
// log is cut into PLACES parts of equal bytes, and each gives one point, the mean of its n values (0: no point): so a
// picture stays small however long a log is. Behind them stand the last value itself and the best one.
enum { PLACES = 240, LAST = PLACES, BEST, POINTS };
typedef struct { double x, y, n; } Point;
typedef struct { Point points[POINTS]; double label_at; } Curve;    // label_at: the height of its last value's text
typedef struct { const char *title; Curve *curves; size_t n; double left, top, w, h; bool linear; } Panel;  // in pixels

// Adds a value to point i, unless it is not finite or further out than a picture can show.
static void curve_add(Curve *c, size_t i, double x, double y) {
    if (!(fabs(x) <= 1e15) || !(fabs(y) <= 1e30)) return;
    Point *p = &c->points[i];
    *p = (Point){ p->x + (x - p->x) / (p->n + 1), p->y + (y - p->y) / (p->n + 1), p->n + 1 };
    c->points[LAST] = (Point){ x, y, 1 };
}

// An axis begins in the lower left corner of its panel and goes `length` pixels to the right or, negative, upwards. Its
// ticks stand at i * step for i from `first` to `last`, in a log scale at 10^(i * step).
typedef struct { double first, last, step, length; bool log; } Axis;

static double place(const Axis *a, double v) {
    return a->length * ((a->log ? log10(v) : v) / a->step - a->first) / (a->last - a->first);
}

// An axis of values (upwards) ends on a tick; one of steps or tokens (to the right) ends where they end.
static Axis make_axis(double least, double most, bool log, double length) {
    if (log) least = log10(least), most = log10(most);
    if (!(most - least > 1e-6 * fmax(fabs(least), fabs(most)))) most = least + (fabs(least) > 0 ? fabs(least) : 1);
    double wanted = (most - least) / floor(fabs(length) / 50) * (1 - 1e-9), step = pow(10, floor(log10(wanted)));
    step *= wanted <= step ? 1 : wanted <= 2 * step ? 2 : wanted <= 5 * step ? 5 : 10;
    if (log || length > 0) step = fmax(step, 1);
    return (Axis){ floor(least / step + 1e-9), length > 0 ? most / step : ceil(most / step - 1e-9), step, length, log };
}

static void draw_axis(Text *t, const Axis *a, double across) {      // grid lines with their numbers
    for (double i = a->first; i <= a->last + 1e-9; i++) {
        double v = a->log ? pow(10, i * a->step) : i * a->step, at = place(a, v);
        text_print(t, a->length > 0 ? "<path d=\"M%.1f 0v%.1f\"/><text class=\"m\" y=\"17\" x=\"%.1f\">%.6g</text>\n"
                   : "<path d=\"M0 %.1fh%.1f\"/><text class=\"e\" x=\"-8\" dy=\"4\" y=\"%.1f\">%.6g</text>\n",
                   at, across, at, v);
    }
}

// Curves differ by colours, on white as on black (the reader's choice), and by dashes for who does not see colours.
enum { CURVE_STYLES = 6 };
static const char svg_style[] =
    "svg{color:#24292f;font:11px sans-serif}.h{font:600 12px sans-serif}.t{font-size:15px}.m{text-anchor:middle}"
    ".e{text-anchor:end}text{fill:currentColor}path{stroke:currentColor;opacity:.14}.b{fill:#fff}\n"
    "polyline,.r{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linecap:round}.c0{color:#17d}"
    ".c1{color:#d45;stroke-dasharray:6 4}.c2{color:#196;stroke-dasharray:1 4}.c3{color:#86d;stroke-dasharray:8 4 1 4}\n"
    ".c4{color:#b70;stroke-dasharray:13 5}.c5{color:#678;stroke-dasharray:3 4}.r{stroke-dasharray:none}"
    "@media(prefers-color-scheme:dark){svg{color:#d8dee4}.b{fill:#15181c}}";

// Draws curve k, a ring at its best, and at the right its last value (and the best), moved off those of other curves.
static void draw_curve(Text *t, Curve *curves, size_t k, const Axis *x, const Axis *y) {
    const Point *p = curves[k].points, *last = p + LAST, *best = p + BEST;
    if (!(last->n > 0)) return;
    text_print(t, "<polyline class=\"c%zu\" points=\"", k % CURVE_STYLES);
    for (; p <= last; p++) if (p->n > 0) text_print(t, "%.1f,%.1f ", place(x, p->x), place(y, p->y));
    double at = place(y, last->y), by = at > y->length / 2 ? -12 : 12;
    for (size_t i = 0; i < k; i++) if (fabs(curves[i].label_at - at) < 11.9) at += by, i = SIZE_MAX;
    curves[k].label_at = at;
    text_print(t, "\"/>\n<text class=\"c%zu\" x=\"%.1f\" y=\"%.1f\">%.3g%s</text>\n", k % CURVE_STYLES, x->length + 10,
               at + 4, last->y, best->n > 0 ? strf(" (%.3g)", best->y) : "");
    if (best->n > 0) text_print(t, "<circle class=\"r c%zu\" r=\"6\" cx=\"%.1f\" cy=\"%.1f\"/>\n", k % CURVE_STYLES,
                                place(x, best->x), place(y, best->y));
}

// Values that spread over more than a factor of 50 have a log scale, unless `linear`; the title says so.
static void draw_panel(Text *t, const Panel *p) {
    double least = INFINITY, most = -INFINITY, last = 0;
    for (size_t i = 0; i < p->n * POINTS; i++) {
        const Point *q = &p->curves[i / POINTS].points[i % POINTS];
        least = fmin(least, q->n > 0 ? q->y : least);
        most = fmax(most, q->n > 0 ? q->y : most);
        last = fmax(last, q->x);
    }
    bool empty = !(least <= most), log = !p->linear && least > 0 && most > 50 * least;
    Axis x = make_axis(0, last, false, p->w), y = make_axis(empty ? 0 : least, empty ? 1 : most, log, -p->h);
    text_print(t, "<g transform=\"translate(%g %g)\">\n<text class=\"h\" y=\"%g\">%s%s</text>\n", p->left,
               p->top + p->h, -p->h - 10, p->title, empty ? ": no values yet" : log ? ", log scale" : "");
    draw_axis(t, &x, -p->h);
    draw_axis(t, &y, p->w);
    for (size_t k = 0; k < p->n; k++) draw_curve(t, p->curves, k, &x, &y);
    text_print(t, "</g>\n");
}

// A text at (x, y), cut to its last 80 bytes, for the ends of paths differ.
static void svg_text(Text *t, double x, double y, const char *class, const char *s) {
    const char *end = s + strlen(s), *from = end - s > 80 ? end - 80 : s;
    while (from > s && (*from & 0xC0) == 0x80) from++;      // whole characters
    text_print(t, "<text class=\"%s\" x=\"%g\" y=\"%g\">%s", class, x, y, from > s ? "…" : "");
    for (size_t n; from < end; from += n) {
        uint32_t c = utf8_get(from, (size_t)(end - from), &n);
        if (c == INVALID || c < ' ') text_add(t, "?", 1);
        else if (c == '<' || c == '&') text_print(t, "&#%u;", c);
        else text_add(t, from, n);
    }
    text_print(t, "</text>\n");
}

// Writes panels under a title and a legend; `names` are those of the first panel's curves.
static void draw_picture(const char *path, const char *title, const char *const *names, const Panel *panels, size_t n) {
    double h = panels[n-1].top + panels[n-1].h + 30;
    Text t = {0};
    text_print(&t, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 1000 %g\">\n<style>\n%s\n</style>\n"
               "<rect class=\"b\" width=\"1000\" height=\"%g\"/>\n", h, svg_style, h);
    svg_text(&t, 20, 28, "h t", title);
    for (size_t k = 0; k < panels->n; k++) {
        double y = 50 + 18 * (double)k;
        text_print(&t, "<polyline class=\"c%zu\" points=\"20,%g 48,%g\"/>\n", k % CURVE_STYLES, y - 4, y - 4);
        svg_text(&t, 56, y, "", names[k]);
    }
    for (size_t i = 0; i < n; i++) draw_panel(&t, &panels[i]);
    text_print(&t, "</svg>\n");
    write_file(path, t.s, t.n);
    free(t.s);
}

enum { LOSS, EVAL_LOSS, RATE, NORM, SPEED, N_LOGGED };
static const char *const logged[] = { "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s" };
typedef struct { Curve curves[N_LOGGED]; JsonReader lines; double steps; } RunLog;

// Reads a log into curves over `across`: "step" or "tokens"; a line without it stands where the one before does. The
// best evaluation is the last that says "best", else the one with the lowest loss; json_next then gives its line.
static RunLog read_log(const char *folder, const char *across) {
    const char *path = strf("%s/log.jsonl", folder);
    if (!exists(path)) fail("%s: no run: it holds no log.jsonl; name the --output_dir of a training", folder);
    RunLog log = { .lines = json_open_file(path) };
    size_t best_at = log.lines.n;
    double x = 0, best = INFINITY;
    for (const Json *line, *j; (line = json_next(&log.lines)); ) {
        const Json *step = json_get(line, "step"), *says = json_get(line, "best"), *loss = json_get(line, "eval_loss");
        if (!json_is(step, JSON_NUMBER)) fail("%s: no line of a log: it has no step", json_where(&log.lines, line->at));
        log.steps = step->number;
        if (json_is(j = json_get(line, across), JSON_NUMBER)) x = j->number;
        for (size_t i = 0; i < N_LOGGED; i++)       // of the speed, the mean is wanted
            if (json_is(j = json_get(line, logged[i]), JSON_NUMBER))
                curve_add(&log.curves[i], i == SPEED ? 0 : line->at * PLACES / log.lines.n, x, j->number);
        bool called = says && says->number != 0;
        if (!json_is(loss, JSON_NUMBER) || (!called && !(loss->number < best))) continue;
        best = called ? -INFINITY : loss->number;
        best_at = line->at;
        log.curves[EVAL_LOSS].points[BEST].n = 0;
        curve_add(&log.curves[EVAL_LOSS], BEST, x, loss->number);
    }
    log.lines.at = best_at;
    return log;
}

static void draw_losses(const char *folder) {       // loss.svg of a run folder
    static const char *const names[] = { "training", "evaluation; ring, in brackets: the best" };
    RunLog log = read_log(folder, "step");
    const Panel panels[] = { { "loss over steps", &log.curves[LOSS], 2, 64, 104, 820, 240, false },
                             { "learning rate", &log.curves[RATE], 1, 64, 400, 320, 140, true },
                             { "gradient norm", &log.curves[NORM], 1, 564, 400, 320, 140, false } };
    draw_picture(strf("%s/loss.svg", folder), folder, names, panels, COUNT(panels));
    json_close(&log.lines);
}

// ---- 15.6 Comparing runs -----------------------------------------------------------------------------------------

static const char *cell(const Json *object, const char *key) {
    const Json *j = json_get(object, key);
    if (json_is(j, JSON_STRING)) return j->text;
    return json_is(j, JSON_NUMBER) ? strf(j->number >= 1000 ? "%.0f" : "%.4g", j->number) : "-";
}

static void compare(const char *const *folders, size_t n, const char *out) {
    static const char row[] = "%8s  %10s  %9s  %7s  %8s  %9s  %9s  %9s  %7s  %8s  %s\n";
    Curve *curves = alloc(2 * n, sizeof *curves);           // training, then evaluation
    Text table = {0};
    text_print(&table, row, "method", "trainable", "memory", "steps", "tokens/s", "loss", "best step", "eval_loss",
               "rouge-l", "accuracy", "run");
    for (size_t i = 0; i < n; i++) {
        RunLog log = read_log(folders[i], "tokens");
        if (!log.lines.n) fail("%s/log.jsonl: is empty: no step has been logged yet", folders[i]);
        const char *path = strf("%s/run.json", folders[i]);
        JsonReader r = exists(path) ? json_open_file(path) : json_open(path, "{}", 2);
        const Json *run = json_only(&r), *best = json_next(&log.lines);
        const Point *loss = &log.curves[LOSS].points[LAST], *speed = &log.curves[SPEED].points[0];
        text_print(&table, row, cell(run, "method"), cell(run, "trainable"), cell(run, "memory"),
                   strf("%.0f", log.steps), speed->n > 0 ? strf("%.0f", speed->y) : "-",
                   loss->n > 0 ? strf("%.4g", loss->y) : "-", cell(best, "step"), cell(best, "eval_loss"),
                   cell(best, "eval_rouge-l"), cell(best, "eval_accuracy"), folders[i]);
        curves[i] = log.curves[LOSS];
        curves[n + i] = log.curves[EVAL_LOSS];
    }
    double top = 86 + 18 * (double)n;
    const Panel panels[] = { { "training loss over tokens", curves, n, 64, top, 320, 310, false },
                             { "evaluation loss over tokens", curves + n, n, 564, top, 320, 310, false } };
    if (!out) out = "compare.svg";
    draw_picture(out, "runs side by side; ring, in brackets: the best", folders, panels, COUNT(panels));
    printf("%s", table.s);
    fprintf(stderr, "curves: %s\n", out);
}

// ==== 16  Commands ===============================================================================================
// The smaller commands, chat and check; then the tables that help, parsing and checks come from.

// ---- 16.1 The smaller commands -----------------------------------------------------------------------------------

static void print_loss(const Opened *m, const Dataset *set, const char *model, size_t batch) {
    size_t T = most_tokens(set, batch);
    need_memory(run_bytes(m->model, m->method, FORWARD_ONLY, T), "--per_device_eval_batch_size");
    double loss = loss_on(m, set, batch);
    if (!isfinite(loss)) fail("%s: the loss is not finite; the weights are damaged (glmtune info --check)", model);
    printf("%-16s %10.4f  mean over the %zu target tokens of %zu samples; ln(vocabulary) is %.4f\n", "loss", loss,
           set->n_targets, set->n, log((double)m->model->config.vocab_size));
    printf("%-16s %10.4f  exp(loss)\n", "perplexity", exp(loss));
}

static void eval(const char *data, const char *model, Options *o) {
    Opened m = open_model(model, o);
    ChatFormat f = choose_format(o, &m.model->config, m.folder);
    check_out(o->out, &m.folder, 1, o->force);
    check_fingerprint(&m, &f, o);
    const char *file = is_folder(data) ? data_file(data, dev_files) : data, *example = NULL;
    if (!file) fail("%s: holds no dev.json[l] or val.json[l]; name the file to evaluate on", data);
    Dataset set = read_data_file(file, &f, o, false);
    start_method(&m, 0, false);
    if (set.n_targets) print_loss(&m, &set, model, (size_t)o->per_device_eval_batch_size);
    else if (!f.layout) fail("%s: there is no label but -100, and without a chat layout no question to answer", file);
    if (!f.tokenizer || !f.layout) { fprintf(stderr, "no answers are generated: %s\n", f.why); return; }
    Generator g = make_answerer(m.model, m.method, &set, o);
    const char *temporary = o->out ? begin_output(o->out) : NULL;
    FILE *out = temporary ? open_to_write(temporary) : NULL;
    Scores s = score_answers(&g, &f, o, &set, out, &example);
    if (out) close_written(out, o->out), finish_output(temporary);
    if (s.n) print_scores(stdout, &s);
    else printf("no sample has an answer to compare with; --out FILE keeps the model's\n");
    if (example) printf("of %zu answers, the first:\n%s\n", g.n_answers, example);
    give_generator(&g);
}

// A command line that was read: its options, and its n other words; behind them stands NULL.
typedef struct { Options *o; size_t n; const char **words; } Call;

static int train_command(const Call *c) { return train(c->words[0], c->words[1], c->o); }
static int eval_command(const Call *c) { return eval(c->words[0], c->words[1], c->o), 0; }
static int dump_command(const Call *c) { return dump(c->words[0], c->words[1], c->words[2], c->o), 0; }
static int quantise_command(const Call *c) { return quantise(c->words[0], c->words[1], c->o), 0; }
static int merge_command(const Call *c) { return merge(c->words[0], c->words[1], c->o), 0; }
static int compare_command(const Call *c) { return compare(c->words, c->n, c->o->out), 0; }
static int gradcheck_command(const Call *c) { return gradcheck(c->words[0], c->o); }

// The names of a type, in --dtype and in PyTorch.
static const char *const dtype_words[][2] = { [F64] = { "f64", "float64" }, [F32] = { "f32", "float32" },
                                              [F16] = { "f16", "float16" }, [BF16] = { "bf16", "bfloat16" } };

// Gives all tensors the type that --dtype asks for, else that of config.json, else bf16.
static Dtype set_dtype(Model *m, const Options *o) {
    const char *wanted = o->dtype ? o->dtype : m->config.torch_dtype;
    Dtype dtype = wanted ? F64 : BF16;
    while (dtype < BF16 && strcmp(wanted, dtype_words[dtype][o->dtype ? 0 : 1])) dtype++;
    for (size_t i = 0; i < m->n_tensors; i++) m->tensors[i]->file_dtype = dtype;
    return dtype;
}

static void initial_tensor(real *out, const Tensor *t, const void *options) {
    const Options *o = options;
    random_tensor(out, t, (uint64_t)o->seed, o->std, false);
}

static int init_command(const Call *c) {
    const char *out = c->words[1];
    Model *m = describe_model(read_config(c->words[0]));
    want_new_folder(out);
    Dtype dtype = set_dtype(m, c->o);
    const char *layout = c->o->layout ? strf(",\n  \"glmtune.layout\": \"%s\"", c->o->layout) : "";
    const char *temporary = begin_folder(out);
    choose_files(m, c->o->max_shard_size * 1e9, (Coding){0});
    write_weights(temporary, m, (TensorSource){ initial_tensor, c->o }, (Coding){0});
    write_config(temporary, &m->config, strf(",\n  \"torch_dtype\": \"%s\"%s", dtype_words[dtype][1], layout));
    finish_output(temporary);
    printf("%s: %zu parameters\n", out, count_parameters(m->tensors, m->n_tensors));
    return 0;
}

// Looks at every number of a model, or of an adapter and its base; returns 1 if one is not finite.
static int check_numbers(const char *path, Options *o) {
    Opened m = open_model(path, o);
    size_t damaged = 0;
    start_method(&m, 0, false);
    for (size_t i = 0; i < m.model->n_tensors + m.model->n_trained; i++) {
        bool base = i < m.model->n_tensors;
        const Tensor *t = base ? m.model->tensors[i] : m.model->trained[i - m.model->n_tensors];
        size_t bad = bad_number(t, base);
        if (bad < t->n) printf("%s: '%s' has a number that is not finite, at %zu\n", path, t->name, bad), damaged++;
    }
    printf("%zu tensors hold numbers that are not finite\n", damaged);
    return damaged > 0;
}

// ", 4-bit codes (nf4) in 160 of them"
static const char *codes_text(const Model *m) {
    static const char *const kinds[] = { [Q8] = "8-bit codes", [Q4] = "4-bit codes", [NF4] = "4-bit codes (nf4)",
                                         [FP4] = "4-bit codes (fp4)" };
    size_t n = 0, last = 0;
    for (size_t i = 0; i < m->n_tensors; i++) if (m->tensors[i]->scales) n++, last = i;
    return n ? strf(", %s in %zu of them", kinds[m->tensors[last]->dtype], n) : "";
}

static int info_command(const Call *c) {
    const char *path = c->words[0], *base = path;
    Options *o = c->o, fresh = *o;
    const Method *method = is_adapter(path) ? read_adapter_config(path, o, &base) : find_method(o->method);
    Config config = read_config(is_folder(base) ? strf("%s/config.json", base) : base);
    bool coded = config.quantised && is_folder(base);       // then its files say which tensors are codes
    Model *m = coded ? load_model(base) : describe_model(config);
    const char *slash = strrchr(base, '/'), *beside = slash ? strf("%.*s", (int)(slash - base), base) : ".";
    const char *layout = layout_name(o, &config, is_folder(base) ? base : beside);
    if (!coded) set_dtype(m, o);
    method->setup(m, o);
    m->n_moments = find_optimizer(o->optim)->n_moments;
    printf("config: %s, %zu layers, hidden %zu, %zu heads of %zu on %zu, ffn %zu, vocabulary %zu%s\n",
           config.model_type, config.n_layers, config.hidden_size, config.n_heads, config.head_dim, config.n_kv_heads,
           config.ffn_dim, config.vocab_size, config.tied ? ", tied" : "");
    printf("rotary: %zu of %zu features, theta %g; norm eps %g; %zu positions; qkv bias: %s; post norms: %s\n",
           config.n_rotated, config.head_dim, config.rope_theta, config.rms_norm_eps, config.max_positions,
           config.qkv_bias ? "yes" : "no", config.post_norms ? "yes" : "no");
    printf("chat layout: %s\n", layout ? layout : "cannot be told; set --layout");
    size_t all = count_parameters(m->tensors, m->n_tensors);
    printf("parameters: %zu in %zu tensors%s\n", all, m->n_tensors, coded ? codes_text(m) : "");
    for (size_t i = 0; i < m->n_trained; i++) all += m->trained[i]->of_base ? 0 : m->trained[i]->n;
    printf("method %s trains %zu of %zu\n", method->name, count_parameters(m->trained, m->n_trained), all);
    print_plan(stdout, m, method, o->gradient_checkpointing ? RECOMPUTES : KEEPS_ALL,
               (size_t)(o->per_device_train_batch_size * (o->max_input_length + o->max_output_length + 1)));
    print_speed_here(m, method, o);
    return o->check ? check_numbers(path, &fresh) : 0;
}

static int tokenize_command(const Call *c) {
    const char *path = c->words[0], *why = NULL;
    Tokenizer *t = is_folder(path) ? load_tokenizer(path, SIZE_MAX, &why) : load_tokenizer_file(path);
    if (!t) fail("%s", why);
    check_out(c->o->out, &t->file, 1, c->o->force);
    if (c->o->out) return write_file(c->o->out, t->image, t->image_bytes), 0;
    size_t n;
    char *text = read_stream(stdin, "standard input", &n), *at = text, *end = text;
    Ids ids = {0};
    if (!c->o->decode) {
        encode(t, text, n, &ids);
        for (size_t i = 0; i < ids.n; i++) printf("%s%d", i ? " " : "", ids.ids[i]);
        putchar('\n');
        return 0;
    }
    for (long id; id = strtol(at, &end, 10), end > at; at = end) {
        if (id < 0 || id > largest_id(t))
            fail("standard input: %ld is no id of this tokenizer, which has 0 to %d", id, largest_id(t));
        ids_add(&ids, (int32_t)id);
    }
    while (isspace((unsigned char)*end)) end++;
    if (end < text + n) fail("standard input: '%.*s' is no token id", (int)strcspn(end, " \t\r\n"), end);
    Text decoded = decode(t, ids.ids, ids.n);
    fwrite(decoded.s, 1, decoded.n, stdout);
    return 0;
}

// ---- 16.2 Chat ---------------------------------------------------------------------------------------------------

// A conversation under way. fed: the ids that the model has seen, whose keys and values are in its cache.
typedef struct { Generator g; const ChatFormat *format; const Options *o; Conversation turns; Ids fed; } Chat;

// The answer as a turn: its first line is the metadata, as the layout writes it.
static Turn answer_turn(const ChatFormat *f, const Ids *ids) {
    Text text = decode(f->tokenizer, ids->ids, ids->n), whole = {0};
    if (f->layout->thinks) text_add(&whole, "<think>", 7);
    text_add(&whole, text.s, text.n);
    free(text.s);
    Turn t = { .role = ASSISTANT, .metadata = "", .text = whole.s, .n = whole.n, .own = whole.s };
    const char *line = f->layout->rounds || f->layout->thinks ? NULL : memchr(t.text, '\n', t.n);
    if (!line) return t;
    t.metadata = t.text, t.metadata_n = (size_t)(line - t.text);
    t.text = line + 1, t.n -= t.metadata_n + 1;
    if (f->tokenizer->kind == SENTENCEPIECE && t.n && *t.text == ' ') t.text++, t.n--;  // its blank before a text
    return t;
}

// Says why a text gets no answer; where it is all that was asked, this ends the program.
static bool no_answer(const Chat *c, const char *why) {
    if (c->o->prompt) fail("%s", why);
    fprintf(stderr, "(%s)\n", why);
    return false;
}

// Feeds the conversation as training encodes it, from the first id on that the model has not seen; false: too long.
static bool feed_turns(Chat *c) {
    size_t room = c->g.longest, opening = c->o->system != NULL, same = 0;
    const char *limit = room < (size_t)c->o->max_context ? "this model, whose limit is" : "--max_context";
    Row row = encode_turns(c->format, c->turns.turns, c->turns.n, SIZE_MAX, true);
    if (row.ids.n >= room) {
        Turn asked = c->turns.turns[--c->turns.n];
        bool alone = c->turns.n <= opening;
        size_t n = row.ids.n;
        free_row(&row), drop_turns(&c->turns, opening);
        if (alone) free(asked.own);
        if (alone) return no_answer(c, strf("the text has %zu tokens, too many for %s %zu", n, limit, room));
        fprintf(stderr, "(the conversation is too long for %s %zu: it begins anew)\n", limit, room);
        add_turn(&c->turns, asked);
        return feed_turns(c);
    }
    while (same < c->fed.n && same + 1 < row.ids.n && c->fed.ids[same] == row.ids.ids[same]) same++;
    c->g.run.caches->n = same;
    feed(&c->g, row.ids.ids + same, row.ids.n - same);
    c->fed.n = 0;
    for (size_t i = 0; i < row.ids.n; i++) ids_add(&c->fed, row.ids.ids[i]);
    free_row(&row);
    return true;
}

static bool is_utf8(const char *s, size_t n) {
    for (size_t at = 0, length; at < n; at += length) if (utf8_get(s + at, n - at, &length) == INVALID) return false;
    return true;
}

// One turn: the user's text goes in, the answer comes out on stdout as it is made.
static void chat_turn(Chat *c, const char *text, size_t n) {
    Ids answer = {0};
    if (!is_utf8(text, n)) return (void)no_answer(c, "the text is not UTF-8, so it is left out");
    char *own = memcpy(alloc(n + 1, 1), text, n);
    add_turn(&c->turns, (Turn){ .role = USER, .metadata = "", .text = own, .n = n, .own = own });
    if (!feed_turns(c)) return;
    bool stopped = generate(&c->g, c->format, c->o, (size_t)c->o->max_new_tokens, &answer, stdout);
    putchar('\n');
    if (!stopped) fprintf(stderr, "(cut off after %zu tokens: see --%s)\n", answer.n,
                          c->g.run.caches->n == c->g.longest ? "max_context" : "max_new_tokens");
    for (size_t i = 0; i < answer.n; i++) ids_add(&c->fed, answer.ids[i]);
    add_turn(&c->turns, answer_turn(c->format, &answer));
    free(answer.ids);
}

static int chat_command(const Call *c) {
    Options *o = c->o;
    Opened m = open_model(c->words[0], o);
    ChatFormat f = choose_format(o, &m.model->config, m.folder);
    check_fingerprint(&m, &f, o);
    start_method(&m, 0, false);
    if (!f.tokenizer || !f.layout) fail("chat needs a tokenizer and a chat layout: %s", f.why);
    if (o->system && !is_utf8(o->system, strlen(o->system))) fail("--system: the text is not UTF-8");
    if (o->system && f.layout->rounds) fail("the chat layout %s has no system message", f.layout->name);
    Chat chat = { .format = &f, .o = o };
    chat.g = make_generator(m.model, m.method, min_size((size_t)o->max_context, positions_left(m.model)), 1);
    if (o->system)
        add_turn(&chat.turns, (Turn){ .role = SYSTEM, .metadata = "", .text = o->system, .n = strlen(o->system) });
    if (o->prompt) return chat_turn(&chat, o->prompt, strlen(o->prompt)), 0;
    char *line = NULL;
    size_t capacity = 0;
    fprintf(stderr, "chat layout %s; an empty line or ctrl-D ends\n", f.layout->name);
    for (;;) {
        if (isatty(0)) fputs("> ", stderr);
        int more = 0;       // bytes that wait behind an empty line: it stands in a text that was pasted, and is no end
        ssize_t n = getline(&line, &capacity, stdin);
        bool empty = n > 0 && strspn(line, "\r\n") == (size_t)n;
        if (empty && isatty(0) && !ioctl(0, FIONREAD, &more) && more) continue;
        while (n > 0 && (line[n-1] == '\n' || line[n-1] == '\r')) n--;
        if (n <= 0) break;
        chat_turn(&chat, line, (size_t)n);
        fflush(stdout);
    }
    free(line);
    return 0;
}

// ---- 16.3 Check --------------------------------------------------------------------------------------------------

// Whether a terminal gives a character two columns: Chinese, Japanese and Korean script, full-width forms, emoji.
static bool is_wide(uint32_t c) {
    static const uint32_t from_to[][2] = { { 0x1100, 0x115F }, { 0x2E80, 0xA4CF }, { 0xAC00, 0xD7A3 },
        { 0xF900, 0xFAFF }, { 0xFE30, 0xFE6F }, { 0xFF00, 0xFF60 }, { 0xFFE0, 0xFFE6 }, { 0x1F300, 0x1FAFF },
        { 0x20000, 0x3FFFD } };
    for (size_t i = 0; i < COUNT(from_to); i++) if (c >= from_to[i][0] && c <= from_to[i][1]) return true;
    return false;
}

// Prints a token on one line, filled up to `columns` columns; wide characters take two.
static void print_token(const Tokenizer *t, int32_t id, int columns) {
    Text text = {0};
    if (t) decode_one(t, id, &text);
    printf("  ");
    for (size_t at = 0, length; at < text.n; at += length) {
        uint32_t c = utf8_get(text.s + at, text.n - at, &length);
        bool plain = c != INVALID && c >= ' ' && c != 127;
        if (plain) printf("%.*s", (int)length, text.s + at);
        if (plain) columns -= is_wide(c) ? 2 : 1;
        else columns -= c == '\n' ? printf("\\n") : printf("\\x%02x", (unsigned char)text.s[at]);
    }
    printf("%*s", columns > 0 ? columns : 0, "");
    free(text.s);
}

static void print_sample(const Sample *s, const ChatFormat *f) {
    printf("sample %zu: %zu tokens, %zu targets\n", s->number, s->n, s->n_targets);
    printf("  %-24s%8s%8s\n", "token", "id", "target");
    for (size_t i = 0; i < s->n; i++) {
        print_token(f->tokenizer, s->ids[i], 24);
        if (i && s->labels[i] != NO_TARGET) printf("%8d%8d\n", s->ids[i], s->labels[i]);
        else printf("%8d%8s\n", s->ids[i], "-");
    }
}

static void print_ids(const char *before, const int32_t *ids, size_t n, const char *behind) {
    printf("%s[", before);
    for (size_t i = 0; i < n; i++) printf("%s%d", i ? ", " : "", ids[i]);
    printf("]%s", behind);
}

// How many samples have each length, in at most BINS bins whose width is 1, 2 or 5 times a power of ten.
static void print_lengths(const Dataset *set) {
    enum { BINS = 10 };
    size_t counts[BINS] = {0}, width = 1, most = 1, shortest = SIZE_MAX;
    for (size_t i = 0; width * BINS < set->longest; i++) width = i % 3 == 1 ? width / 2 * 5 : width * 2;
    for (size_t i = 0; i < set->n; i++) {
        most = max_size(most, ++counts[(set->samples[i].n - 1) / width]);
        shortest = min_size(shortest, set->samples[i].n);
    }
    printf("lengths   %zu to %zu tokens, mean %.1f\n", shortest, set->longest, (double)set->n_tokens / (double)set->n);
    for (size_t i = (shortest - 1) / width; i * width < set->longest; i++)
        printf("%8zu - %-6zu %8zu  %.*s\n", i * width + 1, (i + 1) * width, counts[i],
               (int)((counts[i] * 40 + most - 1) / most), "########################################");
}

// Returns how many samples it has printed as tables.
static size_t check_file(const char *path, const ChatFormat *f, const Options *o) {
    Dataset set = scan_data_file(path, f, o, true);
    size_t printed = 0;
    if (o->ids) {
        for (const Sample *s = set.samples; s < set.samples + set.n; s++)
            print_ids("{\"input_ids\": ", s->ids, s->n, ", "), print_ids("\"labels\": ", s->labels, s->n, "}\n");
        print_findings(stderr, &set);
        return refuse_findings(&set), 0;
    }
    printf("data      %s\nsamples   %zu read, %zu kept, %zu cut, %zu dropped, %zu duplicates\n", path,
           set.n + set.n_dropped, set.n, set.n_cut, set.n_dropped, count_duplicates(&set));
    if (set.n_turns) printf("turns     %zu, %zu of them the assistant's\n", set.n_turns, set.n_answers);
    printf("tokens    %zu, target tokens: %zu of %zu (%.1f %%)\n", set.n_tokens, set.n_targets, set.n_tokens,
           100 * (double)set.n_targets / (double)set.n_tokens);
    print_lengths(&set);
    if (f->layout && f->tokenizer) printf("samples ending in a stop token: %zu of %zu\n", set.n_stops, set.n);
    print_findings(stdout, &set);
    for (const Sample *s = set.samples; s < set.samples + set.n; s++) {
        bool wanted = o->sample ? s->number == (size_t)o->sample : printed < (size_t)o->samples;
        if (wanted) print_sample(s, f), printed++;
    }
    refuse_findings(&set);
    return printed;
}

static int check_command(const Call *c) {
    Options *o = c->o;
    const char *base = c->words[1], *dev = validation_file(c->words[0], o);
    if (is_adapter(base)) read_adapter_config(base, o, &base);
    Config config = read_config(strf("%s/config.json", base));
    ChatFormat f = choose_format(o, &config, base);
    const char *official = mask_words(o, &f), *train_file = training_file(c->words[0]);
    if (!o->ids) printf("layout    %s, %s\n", f.layout ? f.layout->name : "none: ready ids only",
                        f.tokenizer ? f.tokenizer->file : "no tokenizer");
    if (!o->ids && official) printf("labels    as the official script sets them: %s\n", official);
    size_t printed = check_file(train_file, &f, o);
    if (dev) printed += check_file(dev, &f, o);
    if (o->sample && !o->ids && !printed)
        fail("%s: has no sample %lld, or it was dropped", train_file, (long long)o->sample);
    return 0;
}

// ---- 16.4 The tables ---------------------------------------------------------------------------------------------

enum { TRAIN = 1, CHAT = 2, MERGE = 4, TOKENIZE = 8, DUMP = 16, GRADCHECK = 32, INFO = 64, INIT = 128, EVAL = 256,
       CHECK = 512, COMPARE = 1024, QUANTISE = 2048, ALL = 4095,
       LEARNS = TRAIN | GRADCHECK, TUNES = LEARNS | INFO, READS = TRAIN | EVAL | CHECK, ANSWERS = TRAIN | EVAL | CHAT };

typedef struct {
    const char *name; int bit; size_t least, most; int (*run)(const Call *); const char *words, *help;
} Command;
static const Command commands[] = {
    { "train", TRAIN, 2, 4, train_command, "DATA MODEL [CONFIG.yaml [yes|no|STEP]]",
      "tune a model (or go on with an adapter) on a file of conversations" },
    { "eval", EVAL, 2, 2, eval_command, "DATA MODEL", "loss on a file of conversations, and scores of the answers" },
    { "chat", CHAT, 1, 1, chat_command, "MODEL", "talk to a model or an adapter" },
    { "check", CHECK, 2, 2, check_command, "DATA MODEL", "show what would be learned, token by token, and oddities" },
    { "merge", MERGE, 2, 2, merge_command, "ADAPTER OUT", "base and adapter as one model, in the base's type" },
    { "quantize", QUANTISE, 2, 2, quantise_command, "MODEL OUT", "a model with its layers' matrices in 4 or 8 bits" },
    { "tokenize", TOKENIZE, 1, 1, tokenize_command, "MODEL|FILE", "text on stdin to token ids, or back with --decode" },
    { "dump", DUMP, 3, 3, dump_command, "MODEL BATCH OUT", "logits, loss, hidden states and gradients of one batch" },
    { "gradcheck", GRADCHECK, 0, 1, gradcheck_command, "[MODEL]", "gradients against finite differences (or --truth)" },
    { "info", INFO, 1, 1, info_command, "PATH", "sizes, memory and speed of a config.json, model or adapter" },
    { "init", INIT, 2, 2, init_command, "CONFIG OUT", "write a randomly initialised model folder" },
    { "compare", COMPARE, 1, 1000, compare_command, "RUN [RUN ...]", "runs side by side: a table, and their curves" },
};

// LIST: a list with commas; METHOD: a choice among 5.7
typedef enum { INTEGER, REAL_NUMBER, FLAG, STRING, LIST, CHOICE, METHOD } OptionType;
#define FIELD(field) .name = #field, .offset = offsetof(Options, field)

// commands: bits of those that have it; text: its default, NULL: not set; rule: how the program chooses a value where
// nobody sets one (for the help), NULL: it takes the default; least, most: limits of a number.
typedef struct {
    const char *name; size_t offset; OptionType type; int commands;
    const char *text, *help; double least, most; const char *choices, *rule;
} Option;
static const Option options[] = {
    { FIELD(method), METHOD, TUNES, "lora", "what trains" },
    { FIELD(r), INTEGER, TUNES, "8", "lora: rank of the change; parameters and memory grow with it", 1, 65536 },
    { FIELD(lora_alpha), REAL_NUMBER, LEARNS, "32", "lora: the change is scaled by lora_alpha / r", 0, 1e6 },
    { FIELD(lora_dropout), REAL_NUMBER, LEARNS, "0.1", "lora: share of its input dropped in training", 0, 0.99 },
    { FIELD(use_rslora), FLAG, LEARNS, "false", "lora: scale by lora_alpha / sqrt(r) instead" },
    { FIELD(target_modules), LIST, TUNES, NULL, "lora: linear maps by name, comma between", .rule = "all-linear" },
    { FIELD(num_virtual_tokens), INTEGER, TUNES, "128", "ptuning: tokens of the prefix; memory grows with it", 1, 1e6 },
    { FIELD(ptuning_positions), CHOICE, TUNES, NULL, "ptuning: a text's positions begin at 0, or behind the prefix",
      .choices = "chatglm,peft", .rule = "chatglm in the remote layout" },
    { FIELD(prefix_dropout), REAL_NUMBER, LEARNS, NULL, "ptuning: share of the prefix dropped in training",
      0, 0.99, .rule = "0.1 in chatglm, 0 in peft" },
    { FIELD(prefix_projection), FLAG, TUNES, "false", "ptuning: a small network makes the prefix; easier to train" },
    { FIELD(encoder_hidden_size), INTEGER, TUNES, "0",
      "ptuning: width of that network; 0: hidden_size in chatglm, kv_heads x head_dim in peft", 0, 1e6 },
    { FIELD(trainable_layers), INTEGER, TUNES, "2", "freeze: how many of the last layers train", 0, 1e6 },
    { FIELD(trainable_modules), LIST, TUNES, NULL, "freeze: linear maps of these, comma between", .rule = "all" },
    { FIELD(trainable_embedding), FLAG, TUNES, "false", "freeze: the embedding trains too" },
    { FIELD(trainable_head), FLAG, TUNES, "false", "freeze: the head trains too" },
    { FIELD(adapter_type), CHOICE, TUNES, "houlsby",
      "adapter: swish behind both halves of a layer, or ReLU behind the MLP", .choices = "houlsby,pfeiffer" },
    { FIELD(reduction_factor), INTEGER, TUNES, "0", "adapter: its inside is hidden_size / reduction_factor wide", 0,
      1e6, .rule = "16, less where the inside would be below 128" },
    { FIELD(learning_rate), REAL_NUMBER, TRAIN, NULL, "highest step size", 0, 1e3, .rule = "see --help METHOD" },
    { FIELD(lr_scheduler_type), CHOICE, TRAIN, "cosine", "how the rate falls", .choices = "cosine,linear,constant" },
    { FIELD(warmup_ratio), REAL_NUMBER, TRAIN, "0.03", "share of the steps in which the rate rises from 0", 0, 1 },
    { FIELD(warmup_steps), INTEGER, TRAIN, "0", "steps of that rise; above 0 it counts, not warmup_ratio", 0, 1e9 },
    { FIELD(num_train_epochs), REAL_NUMBER, TRAIN, "3", "how often each sample is seen", 1e-6, 1e6,
      .rule = "by the number of samples: 3, and up to 60 that make 1400 steps" },
    { FIELD(max_steps), INTEGER, TRAIN, "0", "optimizer steps; above 0 it counts instead of epochs", -1, 1e9 },
    { FIELD(weight_decay), REAL_NUMBER, TRAIN, "0", "pull of matrices (alone) towards 0, times the rate", 0, 1e3 },
    { FIELD(optim), CHOICE, TRAIN | INFO, "adamw", "optimizer; adamw takes most memory", .choices = "adamw,sgd,lion" },
    { FIELD(momentum), REAL_NUMBER, TRAIN, "0.9", "sgd: share of the last step added to the next", 0, 0.999999 },
    { FIELD(adam_beta1), REAL_NUMBER, TRAIN, NULL, "weight of past gradients in a step", 0, 0.999999, .rule = "0.9" },
    { FIELD(adam_beta2), REAL_NUMBER, TRAIN, NULL, "adamw: memory of the mean square; lion: of the mean that it keeps",
      0, 0.999999, .rule = "0.999; lion: 0.99" },
    { FIELD(adam_epsilon), REAL_NUMBER, TRAIN, "1e-8", "adamw: keeps it from dividing by 0", 1e-30, 1 },
    { FIELD(max_grad_norm), REAL_NUMBER, TRAIN, "1", "gradients are scaled down to this norm; 0: never", 0, 1e9 },
    { FIELD(label_smoothing_factor), REAL_NUMBER, LEARNS, "0", "share of a target spread over all tokens", 0, 0.99 },
    { FIELD(per_device_train_batch_size), INTEGER, TRAIN | INFO, "1", "samples at once; activations grow with it",
      1, 1e6, .rule = "by their length: up to 4 that are 1024 tokens at most" },
    { FIELD(gradient_checkpointing), FLAG, TRAIN | INFO, "false", "layers are computed twice: more time, less memory" },
    { FIELD(gradient_accumulation_steps), INTEGER, TRAIN, "8", "batches that make one step; costs no memory",
      1, 1e6, .rule = "as many as make a step of 4 samples" },
    { FIELD(max_input_length), INTEGER, READS | INFO, "512",
      "a sample may have max_input_length + max_output_length + 1 tokens", 1, 1e7 },
    { FIELD(max_output_length), INTEGER, READS | INFO, "512", "see max_input_length", 1, 1e7 },
    { FIELD(overlong), CHOICE, READS, "error",
      "for longer samples; truncate cuts their longest texts, never role tokens", .choices = "error,drop,truncate" },
    { FIELD(prompt_column), STRING, READS, "prompt", "name of the question in samples of columns" },
    { FIELD(response_column), STRING, READS, "response", "name of the answer in samples of columns" },
    { FIELD(history_column), STRING, READS, "history", "name of the earlier pairs [question, answer] in them" },
    { FIELD(official_mask), FLAG, TRAIN | CHECK, "false", "labels exactly as the layout's official script sets them" },
    { FIELD(combine), FLAG, TRAIN | CHECK, "false", "with official_mask: GLM-4's combine, the last answer alone" },
    { FIELD(samples), INTEGER, CHECK, "1", "how many samples to print as a table of tokens, ids and targets", 0, 1e9 },
    { FIELD(sample), INTEGER, CHECK, "0", "print only this one, by its number in the file; 0: see samples", 0, 1e9 },
    { FIELD(ids), FLAG, CHECK, "false", "print all samples as ready input_ids and labels, and nothing else" },
    { FIELD(eval_file), STRING, TRAIN | CHECK, NULL, "FILE to validate on", .rule = "dev.json[l] or val.json[l]" },
    { FIELD(val_size), REAL_NUMBER, TRAIN, "0.05", "share of the samples that validates instead of training", 0,
      0.9, .rule = "by the number of samples: none of less than 12, 5 of a few dozen, a twentieth, 500 at most" },
    { FIELD(eval_steps), INTEGER, TRAIN, "0", "steps between validations; 0: once an epoch", 0, 1e9 },
    { FIELD(predict_with_generate), FLAG, TRAIN, "false", "at each validation score answers, to 50 prompts at most" },
    { FIELD(early_stopping_patience), INTEGER, TRAIN, "0", "stop after so many validations in a row without a new best",
      0, 1e9, .rule = "by the number of samples: a sixth of more than 3 epochs, else 0, which is never" },
    { FIELD(early_stopping_threshold), REAL_NUMBER, TRAIN, "0",
      "for patience a loss is better when it is lower by more than this", 0, 1e3, .rule = "0.01" },
    { FIELD(early_stopping_loss), REAL_NUMBER, TRAIN, "0", "stop when validation and training loss are as low as this",
      0, 1e3, .rule = "0.03 where the number of samples lets a run stop early and nothing is replayed" },
    { FIELD(load_best_model_at_end), FLAG, TRAIN, "false",
      "the result is the checkpoint with the best validation loss, not the last", .rule = "true" },
    { FIELD(probe), STRING, TRAIN, NULL, "FILE of samples that should stay known: loss and drift from the base" },
    { FIELD(replay), STRING, TRAIN, NULL, "FILE:RATIO: old samples against forgetting, RATIO for each new one" },
    { FIELD(output_dir), STRING, TRAIN, "output", "folder of the log and the checkpoints" },
    { FIELD(logging_steps), INTEGER, TRAIN, "10", "steps between lines of log.jsonl; 0: once an epoch", 0, 1e9 },
    { FIELD(save_steps), INTEGER, TRAIN, "500", "steps between checkpoints; 0: once an epoch; the last is always saved",
      0, 1e9, .rule = "a tenth of the run, less often where a checkpoint is large" },
    { FIELD(save_total_limit), INTEGER, TRAIN, "0", "checkpoints to keep, the newest and the best always; 0: all", 0,
      1e6, .rule = "2" },
    { FIELD(resume_from_checkpoint), STRING, TRAIN, NULL,
      "go on from a checkpoint, to the same bits: yes (the newest in output_dir), no, its step, or its folder" },
    { FIELD(stop_at_step), INTEGER, TRAIN, "0", "save and end after this step, to go on later; 0: never", 0, 1e9 },
    { FIELD(force), FLAG, ANSWERS | MERGE | DUMP | TOKENIZE | COMPARE | GRADCHECK, "false",
      "allow an adapter on another base, a merge past its bound, an output over another file; train: overwrite a run, "
      "resume with other options" },
    { FIELD(layout), CHOICE, READS | CHAT | INIT | INFO, NULL, "chat layout, how turns become tokens",
      .choices = "chatglm2,chatglm3,glm4-chat,0414,z1,edge", .rule = "told from the model" },
    { FIELD(base), STRING, READS | CHAT | MERGE | DUMP | INFO, NULL, "an adapter's base", .rule = "as it names it" },
    { FIELD(prompt), STRING, CHAT, NULL, "answer this one text and end" },
    { FIELD(system), STRING, CHAT, NULL, "system message that opens the conversation" },
    { FIELD(temperature), REAL_NUMBER, ANSWERS, "0", "0: the likeliest; 1: as the model has it; more: wilder", 0, 100 },
    { FIELD(top_p), REAL_NUMBER, ANSWERS, "1", "draw only from the likeliest tokens that add up to this", 0, 1 },
    { FIELD(max_new_tokens), INTEGER, ANSWERS, "512", "tokens of an answer at most", 1, 1e9 },
    { FIELD(max_context), INTEGER, CHAT, "4096", "tokens of a conversation at most; the cache grows with it", 2, 1e9 },
    { FIELD(decode), FLAG, TOKENIZE, "false", "read ids on stdin and print their text" },
    { FIELD(out), STRING, TOKENIZE | EVAL | COMPARE | GRADCHECK, NULL,
      "file to write: tokenizer.bin, answers (eval), curves (compare) [compare.svg], gradients (glmtune64 gradcheck)" },
    { FIELD(truth), STRING, GRADCHECK, NULL, "gradients that glmtune64 wrote (--out) with the same options" },
    { FIELD(per_device_eval_batch_size), INTEGER, TRAIN | EVAL, "8", "samples at once in evaluation", 1, HEAD_ROWS },
    { FIELD(check), FLAG, INFO, "false", "look at every number in the files: exit 1 when one is not finite" },
    { FIELD(dtype), CHOICE, INIT | INFO, NULL, "type of the weights", .choices = "f64,f32,f16,bf16",
      .rule = "as config.json says, else bf16" },
    { FIELD(std), REAL_NUMBER, INIT | GRADCHECK, NULL, "std of random weights", 0, 10, .rule = "0.02, gradcheck: 0.1" },
    { FIELD(bits), INTEGER, QUANTISE, "4", "of a number, 4 (nf4) or 8", 4, 8 },
    { FIELD(double_quant), FLAG, QUANTISE, "false", "4 bits: scales in 8 bits too" },
    { FIELD(max_shard_size), REAL_NUMBER, INIT | MERGE | QUANTISE, "5", "largest file of weights in GB", 1e-6, 1e6 },
    { FIELD(elements), INTEGER, GRADCHECK, "200", "numbers to check in each tensor", 1, 1e9 },
    { FIELD(seed), INTEGER, ANSWERS | INIT | GRADCHECK, "42", "decides every random number", 0, 9e15 },
    { FIELD(threads), INTEGER, ALL, "0", "cores to use; 0: all. The result is the same bits", 0, 4096 },
    { FIELD(precision), CHOICE, ALL, "fp32", "of factors in products; bf16: they are rounded", .choices = "fp32,bf16" },
};

// The defaults under a yaml that are not ours: the Trainer's and, with a peft_config, PEFT's.
static const struct { const char *section, *option, *value; } yaml_defaults[] = {
    { NULL, "learning_rate", "5e-5" }, { NULL, "lr_scheduler_type", "linear" }, { NULL, "warmup_ratio", "0" },
    { NULL, "per_device_train_batch_size", "8" }, { NULL, "gradient_accumulation_steps", "1" },
    { NULL, "logging_steps", "500" }, { NULL, "val_size", "0" }, { NULL, "official_mask", "true" },
    { NULL, "method", "full" }, { "peft_config", "lora_alpha", "8" }, { "peft_config", "lora_dropout", "0" } };

// ---- 16.5 Parsing ------------------------------------------------------------------------------------------------

// How many letters to insert, delete or change to turn a into b (Levenshtein).
static size_t edit_distance(const char *a, const char *b) {
    size_t n = min_size(strlen(b), 63), row[64];
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 1; j <= n; j++) {
            size_t substitute = diagonal + (a[i] != b[j-1]);
            diagonal = row[j];
            row[j] = min_size(substitute, 1 + min_size(row[j], row[j-1]));
        }
    }
    return row[n];
}

static const char *choices_of(const Option *x) { return x->type == METHOD ? method_names() : x->choices; }

// A list as it is kept: without blanks and empty places.
static const char *list_text(const char *list) {
    Text names = {0};
    for (char *rest = strf("%s", list), *one; (one = strsep(&rest, ", \t\r\n")); )
        if (*one) text_print(&names, "%s%s", names.n ? "," : "", one);
    return names.s ? names.s : "";
}

// Sets an option from its text. Returns NULL, or what is wrong with the value.
static const char *set_option(Options *o, const Option *x, const char *value) {
    void *field = (char *)o + x->offset;
    const char *choices = choices_of(x);
    char *end;
    if (x->type == FLAG && strcmp(value, "true") && strcmp(value, "false"))
        return strf("is true or false, not '%s'", value);
    if (choices && (strchr(value, ',') || !list_has(choices, value)))
        return strf("is one of %s, not '%s'", choices, value);
    if (x->type >= STRING && x->commands & TRAIN && strchr(value, '\n')) return "must be one line";
    o->given[x->offset] = true;
    if (x->type == FLAG) return *(bool *)field = value[0] == 't', NULL;
    if (x->type >= STRING) return *(const char **)field = x->type == LIST ? list_text(value) : value, NULL;
    double number = strtod(value, &end);
    bool decimal = end > value && !*end && !isspace((unsigned char)*value) && !strpbrk(value, "xXnN");  // no 0x10, nan
    if (!decimal || (x->type == INTEGER && floor(number) != number))
        return strf("wants a %s, not '%s'", x->type == INTEGER ? "whole number" : "number", value);
    if (!(number >= x->least && number <= x->most))
        return strf("must be from %g to %g, not %s", x->least, x->most, value);
    if (x->type == INTEGER) *(int64_t *)field = (int64_t)number;
    else *(double *)field = number;
    return NULL;
}

static void want_option(Options *o, const Option *x, const char *value) {
    const char *problem = set_option(o, x, value);
    if (problem) fail_usage("--%s %s", x->name, problem);
}

// The option of this name that one of these commands has; NULL: there is none.
static const Option *find_option(const char *wanted, int commands_of) {
    for (size_t i = 0; i < COUNT(options); i++)
        if (!strcmp(options[i].name, wanted) && options[i].commands & commands_of) return &options[i];
    return NULL;
}

// The names of the options that one of these commands has, a comma behind each.
static const char *option_names(int commands_of) {
    Text list = {0};
    for (size_t i = 0; i < COUNT(options); i++)
        if (options[i].commands & commands_of) text_print(&list, "%s,", options[i].name);
    return list.s;
}

// Options that may differ when a run goes on, so its settings do not hold them.
static const char not_kept[] = "output_dir,stop_at_step,resume_from_checkpoint,force,threads,base";

static const char *value_text(const Options *o, const Option *x) {
    const void *field = (const char *)o + x->offset;
    if (x->type == INTEGER) return strf("%lld", (long long)*(const int64_t *)field);
    if (x->type == REAL_NUMBER) return number_text(*(const double *)field);     // to the bit
    if (x->type == FLAG) return *(const bool *)field ? "true" : "false";
    const char *const *words = field;
    return *words ? *words : NOT_SET;
}

static const char *option_text(const Options *o, const char *option) { return value_text(o, find_option(option, ALL)); }

static const char *fix_option(Options *o, const char *option, const char *value, bool free) {
    const Option *x = find_option(option, ALL);
    bool given = o->given[x->offset];
    if (given && free) return NULL;
    const char *was = value_text(o, x), *problem = set_option(o, x, value), *is = value_text(o, x);
    o->given[x->offset] = given;
    if (problem) return strf("\"%s\" %s", option, problem);
    if (!given || (names_in(was, is) && names_in(is, was))) return NULL;
    return strf("the adapter has %s %s; leave the option out", option, is);
}

// Names options that were set and do nothing, for they are another method's, as their help says.
static void name_idle_options(const Options *o, const Method *method) {
    for (const Option *x = options; x < options + COUNT(options); x++) {
        const char *whose = strf("%.*s", (int)strcspn(x->help, ":"), x->help);
        bool set = o->given[x->offset] && strcmp(value_text(o, x), value_text(o->defaults, x));
        if (set && strcmp(whose, method->name) && list_has(method_names(), whose))
            fprintf(stderr, "warning: --%s is for --method %s; here %s trains\n", x->name, whose, method->name);
    }
}

static const char *settings_of(const Options *o) {
    Text t = {0};
    for (const Option *x = options; x < options + COUNT(options); x++)
        if (x->commands & TRAIN && !list_has(not_kept, x->name)) text_print(&t, "%s=%s\n", x->name, value_text(o, x));
    return t.s;
}

// Settings that are not given now are those that the run began with. Settings that it did not keep (it is an older one)
// have the table's defaults, for nothing was then chosen by the number of samples.
static void restore_settings(Options *o, const char *lines, const char *folder) {
    for (const Option *x = options; x < options + COUNT(options); x++) {
        if (!(x->commands & TRAIN) || o->given[x->offset] || list_has(not_kept, x->name)) continue;
        const char *value = line_value(lines, x->name);
        const char *problem = value && strcmp(value, NOT_SET) && strcmp(value, "nan") ? set_option(o, x, value) : NULL;
        if (problem) fail("%s: its settings are damaged: %s %s", folder, x->name, problem);
        o->given[x->offset] = true;
    }
}

static void use_precision(const Options *o) {
    bool bf16 = !strcmp(o->precision, "bf16");
#if FAST
    static bool told;
    if (bf16 && in_vectors.pair == 1 && !told)
        fprintf(stderr, "note: built for a machine without products of bf16: --precision bf16 rounds, no more\n");
    told = true;
#elif !defined GLMTUNE_CUDA && !defined GLMTUNE_PORT
    if (bf16) fail_usage("this program computes with plain loops, which round nothing; --precision bf16 is glmtune's");
#endif
    set_precision(bf16);
}

static Options default_options(void) {
    static Options defaults;
    Options o = { .learning_rate = NAN, .std = NAN, .prefix_dropout = NAN, .adam_beta1 = NAN, .adam_beta2 = NAN };
    for (size_t i = 0; i < COUNT(options); i++) if (options[i].text) want_option(&o, &options[i], options[i].text);
    memset(o.given, 0, sizeof o.given);
    defaults = o;
    o.defaults = &defaults;
    return o;
}

// For messages: "; nearest: --NAME", the name of a list ("q_proj,v_proj") that is like the one given; "": none is.
static const char *nearest(const char *given, const char *dashes, const char *list) {
    const char *best = NULL, *one;
    for (char *rest = strf("%s", list); (one = strsep(&rest, ",")); )
        if (*one && (!best || edit_distance(given, one) < edit_distance(given, best))) best = one;
    bool near = best && 2 * edit_distance(given, best) <= max_size(strlen(given), strlen(best));
    return near ? strf("; nearest: %s%s", dashes, best) : "";
}

// What other programs call options of ours.
static const char *const other_names[][2] = {
    { "lr", "learning_rate" }, { "lora_r", "r" }, { "lora_rank", "r" }, { "rank", "r" },
    { "lora_target", "target_modules" }, { "pre_seq_len", "num_virtual_tokens" }, { "finetuning_type", "method" },
    { "batch_size", "per_device_train_batch_size" }, { "epochs", "num_train_epochs" }, { "val_ratio", "val_size" },
    { "cutoff_len", "max_input_length" }, { "max_length", "max_input_length" }, { "bf16", "precision" },
    { "max_seq_length", "max_input_length" }, { "overwrite_output_dir", "force" }, { "template", "layout" },
};

__attribute__((noreturn)) static void unknown_option(const char *given, const Command *c) {
    const Option *elsewhere = find_option(given, ALL);
    if (list_has("train_file,dataset,data,model,model_path,model_name_or_path,config", given))
        fail_usage("--%s: what a command works on stands in front, without a name: glmtune %s %s", given, c->name,
                   c->words);
    for (size_t i = 0; i < COUNT(other_names); i++)
        if (!strcmp(other_names[i][0], given) && find_option(other_names[i][1], c->bit))
            fail_usage("--%s is no option of '%s'; here it is called --%s", given, c->name, other_names[i][1]);
    if (!strncmp(given, "quantization_", 13) || !strncmp(given, "load_in_", 8))
        fail_usage("--%s: a base is quantised once, into a folder of its own: glmtune quantize MODEL OUT --bits 4; "
                   "then name OUT", given);
    for (size_t k = 0; elsewhere && k < COUNT(commands); k++)
        if (elsewhere->commands & commands[k].bit)
            fail_usage("--%s is no option of '%s', it is one of '%s'", given, c->name, commands[k].name);
    fail_usage("--%s is no option of '%s'%s (see glmtune %s --help)", given, c->name,
               nearest(given, "--", option_names(c->bit)), c->name);
}

static void option_help(const Option *x) {
    static const char *const types[] = { "a whole number", "a number", "true or false", "a text", "names" };
    const char *choices = choices_of(x);
    printf("--%s: %s\n    %s%s", x->name, x->help, choices ? "one of " : types[x->type], choices ? choices : "");
    if (x->least < x->most) printf(" from %g to %g", x->least, x->most);
    printf("; %s%s", x->text || x->rule ? "default " : "no default", x->rule ? x->rule : x->text ? x->text : "");
    for (size_t k = 0; k < COUNT(yaml_defaults); k++)
        if (!strcmp(yaml_defaults[k].option, x->name)) printf(", under a yaml %s", yaml_defaults[k].value);
    printf("\n    of:");
    for (size_t k = 0; k < COUNT(commands); k++) if (x->commands & commands[k].bit) printf(" %s", commands[k].name);
    putchar('\n');
}

static void method_help(const Method *m) {
    const char *few = m->prefix_forward ? "" : ", times n / 100 for n = 35 to 100 samples";
    printf("--method %s: %s\n    learning rate %g at hidden size 4096, times (4096 / hidden)^%g%s, unless "
           "--learning_rate says otherwise; \"peft_type\" %s\n", m->name, m->help, m->learning_rate,
           m->width_power > 0 ? m->width_power : 0.5, few, m->peft_type);
}

// A heading, then a text from column `indent` on, in lines that fit the terminal (100 columns where there is none).
static void print_wrapped(size_t indent, const char *heading, const char *text) {
    size_t columns = terminal_columns(1) ? max_size(terminal_columns(1), indent + 24) : 100;
    size_t at = (size_t)printf("%-*s", (int)indent, heading);
    for (const char *p = text; *p; p += strspn(p, " ")) {
        size_t n = strcspn(p, " "), blank = p > text;
        if (at > indent && at + blank + n > columns) printf("\n%*s", (int)indent, ""), at = indent;
        at += (size_t)printf("%*s%.*s", at > indent && blank, "", (int)n, p);
        p += n;
    }
    putchar('\n');
}

static void command_help(const Command *c) {
    printf("glmtune %s %s [--option value ...]\n", c->name, c->words);
    print_wrapped(4, "", c->help);
    for (const Option *x = options; x < options + COUNT(options); x++) {
        const char *choices = choices_of(x), *usual = x->rule ? x->rule : x->text;
        if (!(x->commands & c->bit)) continue;
        print_wrapped(20, strf("  --%s  ", x->name), strf("%s%s%s", x->help, choices ? strf(": %s", choices) : "",
                                                          usual ? strf(" [%s]", usual) : ""));
    }
}

static void general_help(void) {
    printf("glmtune fine-tunes the GLM family of language models.\n\n");
    for (const Command *c = commands; c < commands + COUNT(commands); c++)
        print_wrapped(38, strf("  glmtune %s %s  ", c->name, c->words), c->help);
    putchar('\n');
    print_wrapped(0, "", "glmtune COMMAND --help: its options. glmtune --help OPTION|METHOD: what one does. MODEL is a "
                  "model folder (config.json, safetensors, tokenizer) or an adapter's.");
}

static void print_version(void) {
    printf("glmtune " GLMTUNE_VERSION " (%s", sizeof(real) == sizeof(double) ? "double" : "float");
#ifdef GLMTUNE_CUDA
    printf(", on a GPU");
#endif
#ifdef _OPENMP
    printf(", OpenMP");
#endif
    printf(")\n");
}

static void word_help(const char *given, int commands_of) {
    given += strspn(given, "-");
    const Option *x = find_option(given, commands_of);
    for (const Command *c = commands; c < commands + COUNT(commands) && (!x || commands_of == ALL); c++)
        if (!strcmp(given, c->name)) return command_help(c);
    if (x) return option_help(x);
    for (size_t i = 0; i < COUNT(methods); i++)
        if (!strcmp(given, methods[i].name)) return method_help(&methods[i]);
    const char *known = strf("%s,%s", method_names(), option_names(commands_of));
    fail_usage("--help %s: there is no such command, option or method%s", given, nearest(given, "", known));
}

// "true" or "false" where a flag is given as one of the words that people write for them, else the value itself.
static const char *plain_value(const Option *x, const char *value) {
    if (x->type != FLAG) return value;
    return list_has("True,yes,on,1", value) ? "true" : list_has("False,no,off,0", value) ? "false" : value;
}

// Reads "--name value", "--name=value" or, for a flag, "--name" at words[0]; returns how many words it took.
static size_t parse_option(Options *o, const Command *c, char **words, size_t left) {
    const char *given = words[0] + 2, *wanted = strf("%.*s", (int)strcspn(given, "="), given);
    const Option *x = find_option(wanted, c->bit);
    if (!x) unknown_option(wanted, c);
    const char *behind = given[strlen(wanted)] ? given + strlen(wanted) + 1 : NULL;         // "=value" follows
    if (behind) return want_option(o, x, plain_value(x, behind)), 1;
    const char *value = left > 1 && strncmp(words[1], "--", 2) ? plain_value(x, words[1]) : NULL;
    if (x->type == FLAG && !(value && list_has("true,false", value))) return want_option(o, x, "true"), 1;
    if (!value) fail_usage("--%s wants a value; one that begins with -- stands behind =", x->name);
    return want_option(o, x, value), 2;
}

// Options go into call->o, the other words into call->words.
static void parse_words(Call *call, const Command *c, size_t n, char **argv) {
    call->n = 0;
    for (size_t i = 2; i < n; ) {
        bool helps = list_has("--help,-h", argv[i]);
        if (helps && i + 1 < n) word_help(argv[i+1], c->bit), exit(0);
        if (helps) command_help(c), exit(0);
        if (!strncmp(argv[i], "--", 2)) i += parse_option(call->o, c, argv + i, n - i);
        else if (*argv[i] == '-' || !strncmp(argv[i], "\xE2\x80", 2))       // or a dash as texts have it
            fail_usage("'%s': an option begins with two hyphens, --", argv[i]);
        else call->words[call->n++] = argv[i++];
    }
}

// ---- 16.6 The official yaml files --------------------------------------------------------------------------------
// `glmtune train DATA MODEL CONFIG.yaml [yes|no|STEP]` is the command line of the official scripts. A key of the yaml
// is an option of `train`, of the same name or as the first table says, or it has no meaning here and is named once.

// Values of a key that have another name here; option NULL: no meaning. These keys are read after all others.
static const struct { const char *key, *value, *option, *to; } yaml_words[] = {
    { "peft_type", "LORA", "method", "lora" }, { "peft_type", "PREFIX_TUNING", "method", "ptuning" },
    { "optim", "adamw_torch", "optim", "adamw" }, { "optim", "adamw_torch_fused", "optim", "adamw" },
    { "optim", "adamw_hf", "optim", "adamw" }, { "optim", "lion_32bit", "optim", "lion" },
    { "lr_scheduler_type", "constant_with_warmup", "lr_scheduler_type", "constant" },
    { "save_strategy", "steps", NULL, NULL },
    { "save_strategy", "no", "save_steps", "1e9" }, { "save_strategy", "epoch", "save_steps", "0" },
    { "logging_strategy", "steps", NULL, NULL }, { "logging_strategy", "no", "logging_steps", "1e9" },
    { "logging_strategy", "epoch", "logging_steps", "0" }, { "eval_strategy", "steps", NULL, NULL },
    { "eval_strategy", "no", NULL, NULL }, { "eval_strategy", "epoch", "eval_steps", "0" },
    { "metric_for_best_model", "eval_loss", NULL, NULL }, { "metric_for_best_model", "loss", NULL, NULL },
    { "greater_is_better", "false", NULL, NULL }, { "train_sampling_strategy", "random", NULL, NULL },
};

static const char yaml_sections[] = "data_config,training_args,peft_config,training_args.generation_config";
// Read elsewhere (file names below, peft_config's in check_peft_config), or written by PEFT into every config.
static const char yaml_silent[] =
    "data_config.train_file,data_config.val_file,task_type,inference_mode,bias,fan_in_fan_out,init_lora_weights,"
    "modules_to_save,rank_pattern,alpha_pattern,layers_to_transform,layers_pattern,exclude_modules,use_dora,lora_bias";
// These change what is learned: refused, unless the value is off (null, false, 0 or empty).
static const char yaml_refused[] = "neftune_noise_alpha,group_by_length,dataloader_drop_last,optim_args,label_names,"
    "optim_target_modules,lr_scheduler_kwargs,adafactor,quantization_config,quantization_bit,quantization_method,"
    "load_in_4bit,load_in_8bit";
static const char yaml_ignored[] =
    "data_config.test_file,num_proc,freezeV,swanlab,deepspeed,fsdp,fsdp_config,accelerator_config,fp16,bf16,tf32,"
    "fp16_opt_level,fp16_full_eval,bf16_full_eval,half_precision_backend,use_cpu,no_cuda,local_rank,ddp_backend,"
    "ddp_timeout,ddp_find_unused_parameters,dataloader_num_workers,dataloader_pin_memory,dataloader_prefetch_factor,"
    "dataloader_persistent_workers,remove_unused_columns,log_level,log_level_replica,log_on_each_node,logging_dir,"
    "logging_first_step,logging_nan_inf_filter,eval_delay,eval_accumulation_steps,eval_on_start,prediction_loss_only,"
    "generation_max_length,generation_num_beams,do_train,do_eval,do_predict,debug,disable_tqdm,report_to,run_name,"
    "push_to_hub,hub_model_id,hub_strategy,hub_token,save_safetensors,save_only_model,save_on_each_node,"
    "overwrite_output_dir,torch_compile,full_determinism,data_seed,gradient_checkpointing_kwargs,skip_memory_metrics,"
    "sortish_sampler,auto_find_batch_size,use_liger_kernel,include_num_input_tokens_seen,include_tokens_per_second,"
    "average_tokens_across_devices,torch_compile_backend,torch_compile_mode,torch_empty_cache_steps,use_mps_device,"
    "eval_do_concat_batches,batch_eval_metrics,include_for_metrics,include_inputs_for_metrics,hub_private_repo,"
    "ignore_data_skip,num_attention_heads,token_dim,num_layers,num_transformer_submodules,do_sample,num_beams,top_k,"
    "max_length,use_cache,repetition_penalty,no_repeat_ngram_size,eos_token_id,pad_token_id,bos_token_id";

typedef struct { JsonReader *reader; Options *o; bool words; Text ignored; } YamlRun;    // words: now yaml_words' keys

__attribute__((noreturn)) static void unknown_key(const YamlRun *y, const Json *j) {
    Text known = {0};
    for (size_t i = 0; i < COUNT(yaml_words); i++) text_print(&known, "%s,", yaml_words[i].key);
    text_print(&known, "%s,%s,%s,%s,%s", yaml_sections, yaml_silent, yaml_refused, yaml_ignored, option_names(TRAIN));
    for (char *p = known.s; *p; p++) if (*p == '.') *p = ',';      // the last part of a path counts
    fail("%s: there is no key '%s' here%s", json_where(y->reader, j->at), j->key, nearest(j->key, "", known.s));
}

// Sets an option, with commas between the names of a list. Returns NULL, or what is wrong with the value.
static const char *yaml_option(Options *o, const Option *x, const Json *j) {
    if ((x->type == INTEGER || x->type == REAL_NUMBER) && j->type != JSON_NUMBER) return "must be a number";
    if (x->type == FLAG && j->type == JSON_BOOL) return set_option(o, x, j->number != 0 ? "true" : "false");
    if (j->type < JSON_ARRAY) return set_option(o, x, j->text);
    const char *list = x->type == LIST ? json_words(j) : NULL;
    return list ? set_option(o, x, list) : "must be a single value";
}

// Takes one key, in the pass that it belongs to. Returns NULL, or what is wrong with its value.
static const char *yaml_set(YamlRun *y, const Json *j, const char *path) {
    const char *option = j->key, *to = NULL;
    Text words = {0};
    for (size_t k = 0; k < COUNT(yaml_words); k++) {
        if (strcmp(yaml_words[k].key, j->key)) continue;
        text_print(&words, "%s%s", words.n ? ", " : "", yaml_words[k].value);
        if (j->type < JSON_ARRAY && !strcmp(j->text, yaml_words[k].value))
            option = yaml_words[k].option, to = yaml_words[k].to;
    }
    if (y->words != (words.n > 0) || !option) return NULL;
    const Option *x = find_option(option, TRAIN);
    if (j->type == JSON_NULL && (x || words.n)) return NULL;
    if (x) return to ? set_option(y->o, x, to) : yaml_option(y->o, x, j);
    if (words.n) return strf("is one of %s", words.s);
    if (list_has(yaml_silent, path) || list_has(yaml_silent, j->key)) return NULL;
    bool off = (j->type <= JSON_NUMBER && !(j->number != 0)) || (j->type >= JSON_ARRAY && !j->count);
    if (list_has(yaml_refused, j->key))
        return off ? NULL : strstr(j->key, "quantization_") || strstr(j->key, "load_in_")
             ? "asks for a base that is quantised as it is loaded; glmtune quantize MODEL OUT does that once: name OUT "
               "as the model, and take this out"
             : "would change what is learned, and glmtune does not have it; take it out";
    if (!list_has(yaml_ignored, path) && !list_has(yaml_ignored, j->key)) unknown_key(y, j);
    text_print(&y->ignored, "%s%s", y->ignored.n ? ", " : "", j->key);
    return NULL;
}

static void yaml_section(YamlRun *y, Json *map, const char *section) {
    if (map->type == JSON_NULL) return;
    if (map->type != JSON_OBJECT) fail("%s: \"name: value\" lines were expected here", json_where(y->reader, map->at));
    for (Json *j = map->first; j; j = j->next) {
        if (!strcmp(j->key, "evaluation_strategy")) j->key = "eval_strategy";       // its name today
        const char *path = *section ? strf("%s.%s", section, j->key) : j->key, *problem = NULL;
        if (list_has(yaml_sections, path)) yaml_section(y, j, path);
        else problem = yaml_set(y, j, path);
        if (problem) fail("%s: %s %s", json_where(y->reader, j->at), j->key, problem);
    }
}

// The file that data_config names under this key, in the folder DATA; NULL: none.
static const char *yaml_data_file(const YamlRun *y, const Json *root, const char *key, const char *data) {
    const Json *file = json_get(json_get(root, "data_config"), key);
    if (!file || file->type == JSON_NULL) return NULL;
    if (file->type != JSON_STRING) fail("%s: %s must be the name of a file", json_where(y->reader, file->at), key);
    if (!is_folder(data)) fail("%s: must be the folder that holds '%s'", data, file->text);
    return strf("%s/%s", data, file->text);
}

// Sets the options as a yaml says; DATA becomes the file of training samples that it names.
static void read_yaml_config(const char *path, Options *o, const char **data) {
    JsonReader r = json_open_file(path);
    YamlRun y = { .reader = &r, .o = o };
    Json *root = yaml_only(&r), *args = json_get(root, "training_args");
    const Json *peft = given(root, "peft_config");
    for (size_t i = 0; i < COUNT(yaml_defaults); i++)
        if (!yaml_defaults[i].section || given(root, yaml_defaults[i].section))
            want_option(o, find_option(yaml_defaults[i].option, TRAIN), yaml_defaults[i].value);
    memset(o->given, 0, sizeof o->given);
    o->yaml = GIVEN(o, method) = true;      // without peft_config: full tuning
    yaml_section(&y, root, "");
    const Json *strategy = json_get(args, "eval_strategy");
    const char *when = json_is(strategy, JSON_STRING) ? strategy->text : "no";
    if (!json_is(json_get(args, "eval_steps"), JSON_NUMBER) && !strcmp(when, "steps")) o->eval_steps = o->logging_steps;
    y.words = true;
    yaml_section(&y, root, "");
    if (peft && !json_is(json_get(peft, "peft_type"), JSON_STRING))
        fail("%s: peft_type is missing", json_where(&r, peft->at));
    if (!strcmp(o->method, "lora")) check_peft_config(path, peft, "layers_to_transform,exclude_modules");
    const char *train_file = yaml_data_file(&y, root, "train_file", *data);
    const char *val_file = yaml_data_file(&y, root, "val_file", *data);
    if (train_file) *data = train_file;
    if (val_file && strcmp(when, "no")) o->eval_file = val_file;
    else if (val_file) text_print(&y.ignored, "%sval_file (eval_strategy is no)", y.ignored.n ? ", " : "");
    if (y.ignored.n) fprintf(stderr, "%s: without meaning here and ignored: %s\n", path, y.ignored.s);
}

#ifdef __SANITIZE_ADDRESS__
const char *__asan_default_options(void) { return "detect_leaks=0"; }   // names and a model are never given back
#endif

// Threads of OpenMP that wait for each other spin, gcc's 300,000 times (3 to 15 ms), clang's 200 ms. On a machine that
// is not idle they take that time from the thread that they wait for; 100 us lose nothing where it is (README, Speed).
// Their stacks hold section 12's blocks, 0.7 MB, and musl gives a thread 128 KB. OpenMP reads its environment before
// main, so this sets it and starts the program once more.
static void set_up_openmp(__attribute__((unused)) char **argv) {
#ifdef _OPENMP
    const char *path = program_path();
    double turns = 20000;
    bool waits = getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME");     // or below
    if (waits && getenv("OMP_STACKSIZE")) return;
    setenv("OMP_STACKSIZE", "4M", 0);
#ifdef __x86_64__
    double began = seconds();
    for (int i = 0; i < 1000; i++) __builtin_ia32_pause();      // a turn: 10 to 50 ns
    turns = 100e-6 / fmax((seconds() - began) / 1000, 1e-9);
#endif
    if (!waits) setenv("GOMP_SPINCOUNT", strf("%.0f", turns), 1);
    if (!waits) setenv("KMP_BLOCKTIME", "1", 1);
    if (path) execv(path, argv);
#endif
}

static void use_threads(int64_t n) {
    if (n > 0) omp_set_num_threads((int)n);
    if (n > omp_get_max_threads())      // without OpenMP this is 1 for ever
        fprintf(stderr, "note: --threads %lld: built without OpenMP, so it runs on one core\n", (long long)n);
}

#ifndef GLMTUNE_NO_MAIN
int main(int argc, char **argv) {
    Options o = default_options();
    struct sigaction on_bus = { .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO };
    for (int fd = 0; fd <= 2; fd++)     // what is closed would else be the number of the first file that is opened
        if (fcntl(fd, F_GETFD) < 0) (void)!open("/dev/null", O_RDWR);
    set_up_openmp(argv);
    program_name = argv[0];
    watch_signals();
    sigaction(SIGBUS, &on_bus, NULL);
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 20);     // large blocks go back to the system when they are given back: see the plan
#endif
    signal(SIGXFSZ, SIG_IGN);       // so that a file past `ulimit -f` is an error that can be told, as a full disk is
    Call call = { .o = &o, .words = alloc((size_t)argc, sizeof *call.words) };
    Text known = {0};
    size_t n = (size_t)argc;
    const Command *c = commands, *end = commands + COUNT(commands);
    bool helps = n < 2 || list_has("--help,-h,help", argv[1]);
    if (helps && n > 2) return word_help(argv[2], ALL), 0;
    if (helps) return general_help(), n < 2 ? 2 : 0;
    if (list_has("--version,-V,version", argv[1])) return print_version(), 0;
    for (; c < end && strcmp(c->name, argv[1]); c++) text_print(&known, "%s,", c->name);
    if (c == end) fail_usage("there is no command '%s'%s (see glmtune --help)", argv[1], nearest(argv[1], "", known.s));
    parse_words(&call, c, n, argv);
    bool yaml = c->bit == TRAIN && call.n > 2;
    const char *odd = call.n > c->most ? call.words[c->most] : NULL;
    if (yaml && !ends_in(call.words[2], ".yaml") && !ends_in(call.words[2], ".yml")) odd = call.words[2];
    if (odd || call.n < c->least)
        fail_usage("%susage: glmtune %s %s [--option value ...]",
                   odd ? strf("'%s' has no place here; ", odd) : "", c->name, c->words);
    if (yaml) {     // what the command line says overrides
        const char *data = call.words[0];
        o = default_options();
        read_yaml_config(call.words[2], &o, &data);
        if (call.n > 3) want_option(&o, find_option("resume_from_checkpoint", TRAIN), call.words[3]);
        parse_words(&call, c, n, argv);
        call.words[0] = data;
    }
    if (isnan(o.std)) o.std = c->bit == GRADCHECK ? 0.1 : 0.02;
    check_out(c->bit == DUMP ? call.words[2] : o.out, call.words, c->bit == DUMP ? 2 : call.n, o.force);
    check_out(o.out, &o.truth, 1, o.force);
    use_threads(o.threads);
    use_precision(&o);
    int status = c->run(&call);
    if (fflush(stdout) || ferror(stdout)) fail("standard output: writing failed: %s", strerror(errno));
    return status;
}
#endif

#endif // GLMTUNE_KERNELS_ONLY
#endif // GLMTUNE_C
