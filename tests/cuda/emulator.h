// A CUDA device for tests, on the CPU: what glmtune.cu uses of the toolkit and no more, in C++17. It stands in for the
// headers of the toolkit (cuda_runtime.h and the others beside this file include it), so that glmtune.cu, compiled as
// plain C++, goes through the conformance test index by index where no GPU is to be had. It is slow, and it is strict:
//
//   - Each thread of a block is a coroutine that runs up to the next barrier, shuffle or step of tensor cores. A
//     barrier that some threads of the block do not reach, or reach at another line, ends the program; so does a warp
//     of which some lanes are missing.
//   - Device memory is closed to the host but during a kernel, a copy or a product: host code that looks behind a
//     pointer of the device ends the program, as does a kernel that is given a pointer of the host. Every allocation
//     ends (up to 255 bytes, which are watched) at a closed page, and what was freed stays closed for ever.
//   - Memory holds NaN until it is written; the shared memory of a block does when the block begins.
//   - CUDA_ORDER=reverse runs blocks, warps and lanes last to first, CUDA_ORDER=shuffle in an order that changes from
//     launch to launch: what depends on the order is a race, and gives other bits.
//   - CUDA_REFUSES=N: cuBLASLt has no algorithm for one in N shapes of products.
//   - CUDA_COUNT=yes prints at the end what was launched how often, and the memory that it read and wrote: pages of
//     4096 bytes, each once in a launch, as if the cache were perfect. What is read again and again is so not seen,
//     but in what is copied to shared memory: all bytes of asynchronous copies.
//
// What it cannot see: races between lanes of a warp that run in step, the memory model, how fast anything is, and
// whatever the real compiler and the real cuBLASLt do.
#ifndef EMULATOR_H
#define EMULATOR_H

#include <algorithm>
#include <math.h>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__
#define __shared__ static thread_local      // the only thread-local numbers of the program, so that they can be found

#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
    emulator::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type *name = (type *)emulator::dynamic_shared

struct uint3 { unsigned x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// ---- Errors ------------------------------------------------------------------------------------------------------

static const char *kernel_name;             // of the kernel that runs; NULL: host code

[[noreturn]] __attribute__((format(printf, 1, 2))) static void stop(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "CUDA emulator: ");
    vfprintf(stderr, format, args);
    va_end(args);
    if (kernel_name)
        fprintf(stderr, " (kernel %s, block %u of %u, thread %u of %u)", kernel_name, blockIdx.x, gridDim.x,
                threadIdx.x, blockDim.x);
    fprintf(stderr, "\n");
    abort();
}

// ---- Device memory -----------------------------------------------------------------------------------------------

enum { PAGE = 4096, ALIGNED = 256 };
static const bool counting = getenv("CUDA_COUNT");
static const size_t CHUNK = counting ? PAGE : 1 << 18;     // what is opened at once
static const size_t device_bytes = (size_t)16 << 30;

struct Allocation {
    char *data, *pages;
    size_t bytes, padded, mapped;
    bool freed;
    std::vector<bool> filled;                           // which chunks hold what they should at first
};

static std::map<char *, Allocation> allocations;        // by the end of what is mapped
static std::vector<std::pair<char *, size_t>> opened;
static bool device_open;                                // a kernel, copy or product is at work
static size_t device_used;

// What a kernel, copy or product of this name did so far.
struct Count { size_t launches, read, written, copied; };
static std::map<std::string, Count> counts;
static Count *count;                                    // of what is at work
static char *dynamic_shared;                            // of the block that runs

static void print_counts() {
    Count all = {};
    auto print = [](const char *name, const Count &c) {
        fprintf(stderr, "count %8zu launches %10.3f MiB read %10.3f MiB written %10.3f MiB copied  %s\n", c.launches,
                (double)c.read / (1 << 20), (double)c.written / (1 << 20), (double)c.copied / (1 << 20), name);
    };
    for (const auto &c : counts) {
        print(c.first.c_str(), c.second);
        all.launches += c.second.launches, all.read += c.second.read, all.written += c.second.written;
        all.copied += c.second.copied;
    }
    print("all", all);
}

static Allocation *allocation_of(const void *p) {
    auto at = allocations.upper_bound((char *)p);
    return at != allocations.end() && (char *)p >= at->second.pages - PAGE ? &at->second : nullptr;
}

static bool is_device(const void *p) {
    Allocation *a = allocation_of(p);
    return a && !a->freed && (char *)p >= a->data && (char *)p <= a->data + a->bytes;
}

// The first touch of a chunk while the device is at work opens it; any other touch of closed memory is a mistake. At
// first all bytes are 0xFF, which is NaN in any type.
static void on_fault(int, siginfo_t *info, void *context) {
    char *at = (char *)info->si_addr;
    const bool writes = ((const ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2;
    Allocation *a = allocation_of(at);
    if (!a) {
        signal(SIGSEGV, SIG_DFL);           // not ours: comes again, and ends the program
        return;
    }
    if (a->freed) stop("memory that was freed is used, %zu bytes", a->bytes);
    if (at < a->pages || at >= a->pages + a->mapped)
        stop("access %td bytes from the start of an allocation of %zu", at - a->data, a->bytes);
    if (!device_open) stop("the host touches memory of the device (an allocation of %zu bytes, at %td)", a->bytes,
                           at - a->data);
    size_t chunk = (size_t)(at - a->pages) / CHUNK, size = std::min((size_t)CHUNK, a->mapped - chunk * CHUNK);
    char *start = a->pages + chunk * CHUNK;
    mprotect(start, size, PROT_READ | PROT_WRITE);
    if (!a->filled[chunk]) memset(start, 0xFF, size);
    a->filled[chunk] = true;
    opened.push_back({ start, size });
    if (!counting || !count || a->data == dynamic_shared) return;
    (writes ? count->written : count->read) += size;
    if (!writes) mprotect(start, size, PROT_READ);      // a write to it is another fault
}

static void open_device(const char *name) {
    if (device_open) stop("a kernel is launched within another");
    if (counting) count = &counts[name], count->launches++;
    device_open = true;
    __asm__ volatile("" ::: "memory");      // keeps the compiler from moving an access over this
}

static void close_device() {
    __asm__ volatile("" ::: "memory");
    for (auto chunk : opened) mprotect(chunk.first, chunk.second, PROT_NONE);
    opened.clear();
    device_open = false;
    count = nullptr;
}

static void handle_faults() {
    static char stack[1 << 16];
    stack_t alternate = {};
    alternate.ss_sp = stack, alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    opened.reserve(counting ? 1 << 22 : 1 << 16);       // nothing is allocated in the handler
    if (counting) atexit(print_counts);
}

static char *map_pages(size_t bytes, int protection) {
    void *p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : (char *)p;
}

// Takes memory that ends, but for less than `aligned` bytes, at a closed page.
static Allocation *allocate(size_t bytes, size_t aligned) {
    if (allocations.empty()) handle_faults();
    size_t padded = (bytes + aligned - 1) / aligned * aligned, mapped = (padded + PAGE - 1) / PAGE * PAGE;
    char *all = map_pages(mapped + 2 * PAGE, PROT_NONE);
    if (!all) return nullptr;
    char *pages = all + PAGE;
    Allocation a = { pages + mapped - padded, pages, bytes, padded, mapped, false, {} };
    a.filled.resize(mapped / CHUNK + 1);
    return &(allocations[pages + mapped + PAGE] = a);
}

static void check_ends(const Allocation *a) {
    mprotect(a->pages, a->mapped, PROT_READ | PROT_WRITE);
    for (const char *p = a->pages; p < a->pages + a->mapped; p++) {
        if (p == a->data) p += a->bytes;
        if (p < a->pages + a->mapped && a->filled[(size_t)(p - a->pages) / CHUNK] && *p != (char)0xFF)
            stop("an allocation of %zu bytes was written past its ends, at %td", a->bytes, p - a->data);
    }
}

// ---- Threads as coroutines ---------------------------------------------------------------------------------------

enum { LANES_OF_WARP = 32, MOST_THREADS = 1024, STACK = 1 << 18 };
enum Wait { FRESH, READY, AT_BLOCK, AT_WARP, DONE };

typedef void (*Action)(void *const posts[]);        // what a warp does together, once all its lanes have arrived

struct Thread {
    void *stack_pointer;
    char *stack;
    Wait wait;
    int line;               // where it waits
    Action action;
    void *post;             // what it brings to a warp's action
};

static Thread threads[MOST_THREADS];
static std::vector<char *> free_stacks;
static void *scheduler_stack_pointer;
static unsigned current;
static void (*body)(const void *);
static const void *body_context;

// Saves the registers that a call keeps, leaves the stack pointer in *save and goes on where `restore` was left.
#ifndef __x86_64__
#error "the emulator switches stacks on x86-64 alone"
#endif
__attribute__((naked, noinline)) static void switch_stacks(void **, void *) {
    __asm__("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
            "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
            "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}

struct Copy { void *to; const void *from; size_t bytes, all; bool committed; };
static std::vector<Copy> under_way[MOST_THREADS];

static void wait_for(Wait what) {
    Thread *t = &threads[current];
    t->wait = what;
    switch_stacks(&t->stack_pointer, scheduler_stack_pointer);
}

static void thread_main() {
    body(body_context);
    if (!under_way[current].empty()) stop("a thread ends before its asynchronous copies");
    wait_for(DONE);
    abort();
}

static char *take_stack() {
    if (free_stacks.empty()) {
        char *s = map_pages(STACK, PROT_READ | PROT_WRITE);
        if (!s) stop("no memory for stacks");
        mprotect(s, PAGE, PROT_NONE);
        free_stacks.push_back(s);
    }
    char *s = free_stacks.back();
    free_stacks.pop_back();
    return s;
}

static void resume(unsigned i) {
    Thread *t = &threads[i];
    if (t->wait == FRESH) {
        t->stack = take_stack();
        void **top = (void **)(t->stack + STACK) - 8;       // six registers, where to begin, and where nothing returns
        memset(top, 0, 8 * sizeof *top);
        top[6] = (void *)thread_main;
        t->stack_pointer = top;
    }
    t->wait = READY;
    current = threadIdx.x = i;
    switch_stacks(&scheduler_stack_pointer, t->stack_pointer);
    if (t->wait == DONE) free_stacks.push_back(t->stack);
}

// ---- The order of blocks, warps and lanes ------------------------------------------------------------------------

static uint64_t launches;

// The i-th of n to run: i steps from some start, round and round, the step having no divisor in common with n.
struct Order {
    unsigned n, start, step;

    explicit Order(unsigned n) : n(n), start(0), step(1) {
        const char *name = getenv("CUDA_ORDER");
        if (!name || !strcmp(name, "forward")) return;
        if (strcmp(name, "reverse") && strcmp(name, "shuffle")) stop("CUDA_ORDER=%s: what is that?", name);
        start = n - 1, step = n > 1 ? n - 1 : 1;
        if (!strcmp(name, "reverse")) return;
        uint64_t random = launches * 0x9E3779B97F4A7C15u;
        start = (unsigned)((random >> 20) % n), step = 1 + (unsigned)((random >> 40) % n);
        while (std::gcd(step, n) > 1) step++;
    }
    unsigned operator[](unsigned i) const { return (unsigned)((start + (uint64_t)i * step) % n); }
};

// ---- Running a kernel --------------------------------------------------------------------------------------------

// When all lanes of a warp have come to the same operation, does it and lets them go on.
static bool release_warp(unsigned first) {
    void *posts[LANES_OF_WARP];
    unsigned waiting = 0;
    for (unsigned lane = 0; lane < LANES_OF_WARP; lane++) waiting += threads[first + lane].wait == AT_WARP;
    if (!waiting) return false;
    const Thread *one = &threads[first];
    for (unsigned lane = 0; lane < LANES_OF_WARP; lane++) {
        const Thread *t = &threads[first + lane];
        threadIdx.x = first + lane;
        if (t->wait != AT_WARP)
            stop("a thread %s while others of its warp wait at a shuffle or a step of tensor cores",
                 t->wait == DONE ? "has ended" : "is at a barrier");
        if (t->line != one->line || t->action != one->action)
            stop("lanes of a warp are at different operations: line %d, line %d", one->line, t->line);
        posts[lane] = t->post;
    }
    if (one->action) one->action(posts);
    for (unsigned lane = 0; lane < LANES_OF_WARP; lane++) threads[first + lane].wait = READY;
    return true;
}

// When all threads of the block have come to the same barrier, lets them go on; false when all have ended.
static bool release_block() {
    unsigned n = blockDim.x, done = 0, at = 0;
    for (unsigned i = 0; i < n; i++) done += threads[i].wait == DONE;
    if (done == n) return false;
    while (threads[at].wait == DONE) at++;
    for (unsigned i = 0; i < n; i++) {
        threadIdx.x = i;
        if (threads[i].wait == DONE)
            stop("the thread has ended while others wait at the barrier of line %d", threads[at].line);
        if (threads[i].line != threads[at].line)
            stop("threads of a block are at different barriers: line %d, line %d", threads[at].line, threads[i].line);
    }
    for (unsigned i = 0; i < n; i++) threads[i].wait = READY;
    return true;
}

static void run_warp(unsigned first, const Order &lanes) {
    do
        for (unsigned i = 0; i < lanes.n; i++)
            if (threads[first + lanes[i]].wait <= READY) resume(first + lanes[i]);
    while (lanes.n == LANES_OF_WARP && release_warp(first));
}

static int find_thread_local(dl_phdr_info *info, size_t, void *out) {
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_TLS)
            *(std::pair<void *, size_t> *)out = { info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz };
    return 1;               // the first object is the program itself
}

// All shared arrays of all kernels lie in one place; whatever a block finds there is NaN.
static void poison_shared(size_t dynamic_bytes) {
    static std::pair<void *, size_t> all = { nullptr, 0 };
    static const int found = dl_iterate_phdr(find_thread_local, &all);
    (void)found;
    if (all.first) memset(all.first, 0xFF, all.second);
    if (dynamic_bytes) memset(dynamic_shared, 0xFF, dynamic_bytes);
}

static void run_blocks(size_t shared_bytes) {
    unsigned rest = blockDim.x % LANES_OF_WARP, n_warps = (blockDim.x + LANES_OF_WARP - 1) / LANES_OF_WARP;
    const Order blocks(gridDim.x), warps(n_warps), lanes(LANES_OF_WARP), last_lanes(rest ? rest : 32u);
    for (unsigned b = 0; b < gridDim.x; b++) {
        blockIdx.x = blocks[b];
        poison_shared(shared_bytes);
        for (unsigned i = 0; i < blockDim.x; i++) threads[i].wait = FRESH;
        do
            for (unsigned w = 0; w < n_warps; w++)
                run_warp(warps[w] * LANES_OF_WARP, warps[w] == n_warps - 1 ? last_lanes : lanes);
        while (release_block());
    }
}

// An argument of a kernel holds no pointer of the host. In a struct, a word counts as one when it lies where Linux puts
// programs, heaps and stacks.
template <class T> static void check_argument(const T &argument) {
    if constexpr (std::is_pointer_v<T>) {
        if (argument && !is_device((const void *)argument)) stop("an argument is a pointer of the host");
    } else if constexpr (std::is_class_v<T>) {
        for (size_t at = 0; at + 8 <= sizeof argument; at += 8) {
            uint64_t word;
            memcpy(&word, (const char *)&argument + at, 8);
            bool looks = word >> 40 == 0x55 || word >> 40 == 0x56 || word >> 40 == 0x7E || word >> 40 == 0x7F;
            if (looks && !is_device((void *)word)) stop("byte %zu of an argument is a pointer of the host", at);
        }
    }
}

template <class... P, class... A>
static void launch(const char *name, void (*kernel)(P...), size_t grid, size_t block, size_t shared_bytes,
                   A... arguments) {
    static Allocation *shared;
    if (!grid) return;
    kernel_name = name, blockIdx = threadIdx = { 0, 0, 0 };
    gridDim = { (unsigned)grid, 1, 1 }, blockDim = { (unsigned)block, 1, 1 };
    if (grid > 0x7FFFFFFF) stop("a grid of %zu blocks", grid);
    if (block < 1 || block > MOST_THREADS) stop("a block of %zu threads", block);
    if (shared_bytes > 99 * 1024) stop("%zu bytes of shared memory, an RTX card has 99 KiB", shared_bytes);
    launches++;
    auto call = [&] { kernel((P)arguments...); };
    (check_argument((P)arguments), ...);
    body = [](const void *context) { (*(const decltype(call) *)context)(); };
    body_context = &call;
    if (shared_bytes) shared = allocate(shared_bytes, 128), dynamic_shared = shared->data;
    open_device(name);
    run_blocks(shared_bytes);
    if (shared_bytes) {
        check_ends(shared);
        close_device();
        munmap(shared->pages - PAGE, shared->mapped + 2 * PAGE);
        allocations.erase(shared->pages + shared->mapped + PAGE);
        dynamic_shared = nullptr;
    }
    close_device();
    kernel_name = nullptr;
}

static void together(Action action, void *post, int line) {
    threads[current].action = action, threads[current].post = post, threads[current].line = line;
    wait_for(AT_WARP);
}

template <class T> struct Shuffle { T value; unsigned from; T result; };

template <class T> static T shuffle(T value, unsigned from, unsigned mask, int line) {
    if (mask != 0xFFFFFFFFu) stop("a shuffle with the mask %x", mask);
    Shuffle<T> mine = { value, from, value };
    together([](void *const posts[]) {
        for (unsigned lane = 0; lane < LANES_OF_WARP; lane++) {
            Shuffle<T> *s = (Shuffle<T> *)posts[lane];
            s->result = ((const Shuffle<T> *)posts[s->from])->value;
        }
    }, &mine, line);
    return mine.result;
}

static unsigned lane() { return current % LANES_OF_WARP; }

}   // namespace emulator

static inline void __syncthreads(int line = __builtin_LINE()) {
    emulator::threads[emulator::current].line = line;
    emulator::wait_for(emulator::AT_BLOCK);
}

static inline void __syncwarp(int line = __builtin_LINE()) { emulator::together(nullptr, nullptr, line); }

// Copies to shared memory that are under way until they are waited for: till then NaN lies there.
static inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes, size_t zeros = 0) {
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes)
        emulator::stop("an asynchronous copy of %zu bytes is not aligned to as many", bytes);
    memset(to, 0xFF, bytes);
    if (emulator::count) emulator::count->copied += bytes - zeros;
    emulator::under_way[emulator::current].push_back({ to, from, bytes - zeros, bytes, false });
}

static inline void __pipeline_commit() {
    for (emulator::Copy &c : emulator::under_way[emulator::current]) c.committed = true;
}

// What was not committed stays under way.
static inline void __pipeline_wait_prior(size_t groups) {
    if (groups) emulator::stop("the emulator knows no wait for some of the copies");
    std::vector<emulator::Copy> &copies = emulator::under_way[emulator::current];
    for (const emulator::Copy &c : copies) {
        if (!c.committed) continue;
        memset(c.to, 0, c.all);
        memcpy(c.to, c.from, c.bytes);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), [](const emulator::Copy &c) { return c.committed; }),
                 copies.end());
}

template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int line = __builtin_LINE()) {
    return emulator::shuffle(x, emulator::lane() ^ (unsigned)lanes, mask, line);
}

// ---- Numbers of two bytes ----------------------------------------------------------------------------------------

static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, sizeof f); return f; }

struct alignas(2) __nv_bfloat16 { uint16_t bits; };
struct alignas(2) __half { uint16_t bits; };

static inline __half __ushort_as_half(unsigned short bits) { return { bits }; }

static inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.bits << 16); }

// Rounded, and never fused with what follows.
static inline float __fmul_rn(float a, float b) { volatile float c = a * b; return c; }
static inline float __fadd_rn(float a, float b) { volatile float c = a + b; return c; }

static inline __nv_bfloat16 __float2bfloat16_rn(float f) {      // to nearest, ties to even; any NaN becomes 0x7FFF
    unsigned u;
    memcpy(&u, &f, sizeof u);
    if (f != f) return { 0x7FFF };
    return { (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16) };
}

struct __nv_bfloat162 { __nv_bfloat16 x, y; };

static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
    return { __float2bfloat16_rn(a), __float2bfloat16_rn(b) };
}

static inline float __half2float(__half h) {
    int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    float f = exponent == 31 ? fraction ? NAN : INFINITY
            : exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
    return h.bits & 0x8000 ? -f : f;
}

static inline __half __float2half_rn(float f) {                 // to nearest, ties to even; any NaN becomes 0x7FFF
    uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    if (f != f) return { 0x7FFF };
    if (fabsf(f) >= 65520) return { (uint16_t)(sign | 0x7C00) };
    int exponent = f == 0 || ilogbf(f) < -14 ? -14 : ilogbf(f);
    float steps = rintf(ldexpf(fabsf(f), 10 - exponent));        // 1024 up to 2048 for a normal number
    return { (uint16_t)(sign | ((exponent + 14) * 1024 + (int)steps)) };
}

// ---- Tensor cores ------------------------------------------------------------------------------------------------
// glmtune.cu has three functions for them, by instructions of PTX; these do the same. Numbers lie in registers as PTX
// says: of 8 x 8 numbers a lane has columns 2 (lane % 4) and the next of row lane / 4, the first in the lower half.

namespace emulator {

struct Matrices { const __nv_bfloat16 *row; unsigned *x; };

template <bool transposed> static void take_matrices(void *const posts[]) {
    for (unsigned lane = 0; lane < LANES_OF_WARP; lane++)
        for (unsigned m = 0; m < 4; m++) {
            uint16_t two[2];
            for (unsigned i = 0; i < 2; i++) {
                unsigned row = lane / 4, column = lane % 4 * 2 + i;
                if (transposed) std::swap(row, column);
                two[i] = ((const Matrices *)posts[8*m + row])->row[column].bits;
            }
            ((Matrices *)posts[lane])->x[m] = two[0] | (unsigned)two[1] << 16;
        }
}

static void check_row(const __nv_bfloat16 *row) {
    if ((uintptr_t)row % 16) stop("a row of a matrix is not aligned to 16 bytes");
    if (allocation_of(row) != allocation_of(dynamic_shared)) stop("a row of a matrix is not in shared memory");
}

struct Product { float *c[4]; const unsigned *a; unsigned b[2]; };

static float number_of(unsigned two, unsigned i) { return __uint_as_float((i ? two >> 16 : two & 0xFFFF) << 16); }

// Products of bfloat16 are exact in float; they are added in float.
static void multiply(void *const posts[]) {
    float A[16][16], B[16][8], C[16][8];
    for (unsigned lane = 0; lane < LANES_OF_WARP; lane++) {
        const Product *p = (const Product *)posts[lane];
        const unsigned row = lane / 4;
        for (unsigned i = 0; i < 2; i++) {
            const unsigned column = lane % 4 * 2 + i;
            for (unsigned q = 0; q < 4; q++) A[row + q % 2 * 8][column + q / 2 * 8] = number_of(p->a[q], i);
            for (unsigned h = 0; h < 2; h++) B[column + 8*h][row] = number_of(p->b[h], i);
            for (unsigned h = 0; h < 2; h++) C[row + 8*h][column] = *p->c[2*h + i];
        }
    }
    for (unsigned i = 0; i < 16; i++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (unsigned lane = 0; lane < LANES_OF_WARP; lane++)
        for (unsigned i = 0; i < 4; i++)
            *((Product *)posts[lane])->c[i] = C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}   // namespace emulator

static inline void load_matrices(unsigned (&x)[4], const __nv_bfloat16 *row, int line = __builtin_LINE()) {
    emulator::Matrices mine = { row, x };
    emulator::check_row(row);
    emulator::together(emulator::take_matrices<false>, &mine, line);
}

static inline void load_transposed(unsigned (&x)[4], const __nv_bfloat16 *row, int line = __builtin_LINE()) {
    emulator::Matrices mine = { row, x };
    emulator::check_row(row);
    emulator::together(emulator::take_matrices<true>, &mine, line);
}

static inline void multiply_add(float &c0, float &c1, float &c2, float &c3, const unsigned (&a)[4], unsigned b0,
                                unsigned b1, int line = __builtin_LINE()) {
    emulator::Product mine = { { &c0, &c1, &c2, &c3 }, a, { b0, b1 } };
    emulator::together(emulator::multiply, &mine, line);
}

static inline float power_of_2(float x) { return exp2f(x); }

// ---- Runtime -----------------------------------------------------------------------------------------------------

typedef enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2,
               cudaErrorNoDevice = 100 } cudaError_t;
typedef struct CudaStream *cudaStream_t;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
struct cudaDeviceProp { char name[256]; int multiProcessorCount, major, minor; };

static inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}

static inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// CUDA_VISIBLE_DEVICES set to nothing hides the device, as it does with the real runtime.
static inline cudaError_t cudaGetDeviceCount(int *n) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *n = !visible || *visible;
    return *n ? cudaSuccess : cudaErrorNoDevice;
}

static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = {};
    snprintf(p->name, sizeof p->name, "an emulated GPU");
    p->multiProcessorCount = 4, p->major = 9, p->minor = 0;
    return cudaSuccess;
}

template <class T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    *p = nullptr;
    if (!bytes) return cudaSuccess;
    if (bytes > emulator::device_bytes - emulator::device_used) return cudaErrorMemoryAllocation;
    emulator::Allocation *a = emulator::allocate(bytes, emulator::ALIGNED);
    if (!a) return cudaErrorMemoryAllocation;
    emulator::device_used += a->padded;
    *p = (T *)(void *)a->data;
    return cudaSuccess;
}

static inline cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    emulator::Allocation *a = emulator::allocation_of(p);
    if (!a || a->freed || a->data != p) emulator::stop("cudaFree of what cudaMalloc did not give");
    emulator::check_ends(a);
    mmap(a->pages, a->mapped, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    a->freed = true;
    emulator::device_used -= a->padded;
    return cudaSuccess;
}

static inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = emulator::device_bytes, *free = *total - emulator::device_used;
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    if (!n) return cudaSuccess;
    if (emulator::is_device(to) != (kind == cudaMemcpyHostToDevice) ||
        emulator::is_device(from) != (kind == cudaMemcpyDeviceToHost))
        emulator::stop("a copy of kind %d from or to the wrong side, %zu bytes", kind, n);
    emulator::open_device("cudaMemcpy");
    memmove(to, from, n);
    emulator::close_device();
    return cudaSuccess;
}

static inline cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t = nullptr) {
    if (n && !emulator::is_device(p)) emulator::stop("cudaMemset of memory of the host");
    emulator::open_device("cudaMemsetAsync");
    memset(p, value, n);
    emulator::close_device();
    return cudaSuccess;
}

static inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// ---- cuBLASLt ----------------------------------------------------------------------------------------------------
// D = alpha op(A) op(B) + beta C, all column-major: element (row, column) lies at row + column*ld.

typedef enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7,
               CUBLAS_STATUS_NOT_SUPPORTED = 15 } cublasStatus_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68 } cublasComputeType_t;
typedef enum { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType_t;
typedef enum { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB } cublasLtMatmulDescAttributes_t;
typedef enum { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
} cublasLtMatmulPreferenceAttributes_t;
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

typedef struct CublasLt {} *cublasLtHandle_t;
typedef struct CublasLtDesc { int transposed[2]; } *cublasLtMatmulDesc_t;
typedef struct CublasLtLayout { cudaDataType_t type; uint64_t rows, columns; int64_t ld; } *cublasLtMatrixLayout_t;
typedef struct CublasLtPreference { uint64_t workspace; uint32_t reduction, alignment[4]; } *cublasLtMatmulPreference_t;
// What an algorithm was chosen for. By what it is promised beyond 16 bytes it adds up from the first or from the
// last term: then equal products have other bits where arrays lie elsewhere.
typedef struct { uint32_t alignment[4]; size_t workspace; bool backwards; } cublasLtMatmulAlgo_t;
typedef struct { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state;
} cublasLtMatmulHeuristicResult_t;

static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    *h = new CublasLt;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t,
                                                      cudaDataType_t scale) {
    *d = new CublasLtDesc();
    return scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                            cublasLtMatmulDescAttributes_t which, const void *value,
                                                            size_t bytes) {
    if (bytes != sizeof(int32_t)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&d->transposed[which - CUBLASLT_MATMUL_DESC_TRANSA], value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type, uint64_t rows,
                                                        uint64_t columns, int64_t ld) {
    if (ld < (int64_t)rows || !rows || !columns)
        emulator::stop("a layout of %d x %d with the leading dimension %d", (int)rows, (int)columns, (int)ld);
    *l = new CublasLtLayout{ type, rows, columns, ld };
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = new CublasLtPreference{ 0, 7, { 256, 256, 256, 256 } };
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                                  cublasLtMatmulPreferenceAttributes_t which,
                                                                  const void *value, size_t bytes) {
    bool wide = which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    if (bytes != (wide ? sizeof(uint64_t) : sizeof(uint32_t))) return CUBLAS_STATUS_INVALID_VALUE;
    void *to = wide ? (void *)&p->workspace
             : which == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK ? (void *)&p->reduction
             : (void *)&p->alignment[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES];
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}

namespace emulator {

// op(X) as floats, row after row.
static std::vector<float> operand(const void *x, const CublasLtLayout *l, bool transposed) {
    std::vector<float> out(l->rows * l->columns);
    for (uint64_t j = 0; j < l->columns; j++)
        for (uint64_t i = 0; i < l->rows; i++) {
            uint64_t at = i + j * (uint64_t)l->ld, to = transposed ? j * l->rows + i : i * l->columns + j;
            out[to] = l->type == CUDA_R_32F ? ((const float *)x)[at]
                    : __bfloat162float(((const __nv_bfloat16 *)x)[at]);
        }
    return out;
}

static bool sizes_fit(cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                      cublasLtMatrixLayout_t c) {
    const int *t = d->transposed;
    return (t[0] ? a->columns : a->rows) == c->rows && (t[1] ? b->rows : b->columns) == c->columns &&
           (t[0] ? a->rows : a->columns) == (t[1] ? b->columns : b->rows) && a->type == b->type &&
           c->type == CUDA_R_32F;
}

}   // namespace emulator

static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                                            cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                                            cublasLtMatmulPreference_t p, int wanted,
                                                            cublasLtMatmulHeuristicResult_t *results, int *found) {
    if (wanted < 1 || !emulator::sizes_fit(d, a, b, c)) return CUBLAS_STATUS_INVALID_VALUE;
    results[0] = {};
    const char *refused = getenv("CUDA_REFUSES");           // 1: every product has no algorithm; 3: every third shape
    if (refused && (a->rows + a->columns + c->columns) % strtoul(refused, nullptr, 10) == 0) {
        *found = 0;
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    memcpy(results[0].algo.alignment, p->alignment, sizeof p->alignment);
    for (uint32_t a : p->alignment) results[0].algo.backwards ^= a == 32 || a == 128;
    results[0].workspaceSize = results[0].algo.workspace = p->workspace;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *A,
                                            cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b,
                                            const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
                                            cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t *algo,
                                            void *workspace, size_t workspace_bytes, cudaStream_t) {
    const void *pointers[] = { A, B, C, D };
    if (!emulator::sizes_fit(d, a, b, c) || c->ld != layout_d->ld) return CUBLAS_STATUS_INVALID_VALUE;
    for (int i = 0; i < 4; i++) {
        if (!emulator::is_device(pointers[i])) emulator::stop("operand %d of cublasLtMatmul is of the host", i);
        if (algo && (uintptr_t)pointers[i] % algo->alignment[i])
            emulator::stop("operand %d of cublasLtMatmul is not aligned to the %u bytes promised", i,
                           algo->alignment[i]);
    }
    if (algo && algo->workspace > workspace_bytes) emulator::stop("the workspace of cublasLtMatmul is too small");
    if (workspace_bytes && !emulator::is_device(workspace)) emulator::stop("the workspace is of the host");
    emulator::open_device("cublasLtMatmul");
    const std::vector<float> left = emulator::operand(A, a, d->transposed[0]);
    const std::vector<float> right = emulator::operand(B, b, d->transposed[1]);
    uint64_t m = c->rows, n = c->columns, k = left.size() / m;
    std::vector<float> sums(n);
    float scale = *(const float *)alpha, kept = *(const float *)beta;
    for (uint64_t i = 0; i < m; i++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (uint64_t term = 0; term < k; term++) {
            const uint64_t l = algo && algo->backwards ? k - 1 - term : term;
            for (uint64_t j = 0; j < n; j++) sums[j] += left[i * k + l] * right[l * n + j];
        }
        for (uint64_t j = 0; j < n; j++) {
            const uint64_t at = i + j * (uint64_t)c->ld;
            ((float *)D)[at] = scale * sums[j] + (kept != 0 ? kept * ((const float *)C)[at] : 0);
        }
    }
    emulator::close_device();
    return CUBLAS_STATUS_SUCCESS;
}

#endif // EMULATOR_H
