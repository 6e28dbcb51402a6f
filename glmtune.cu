// glmtune.cu: section 2 of glmtune.c again, for one NVIDIA GPU. `make cuda` builds glmtune-cuda from both.
//
// It is read beside section 2: the same names, the same numbers of subsections, and, but for memory, which comes first
// here, the same order; each contract and formula stands there and is not repeated. Products are cuBLASLt's, part of
// the CUDA toolkit; all else are the short kernels below.
//
// Two precisions, by --precision. `fp32`: everything in float, TF32 off; what is compared with the CPU. `bf16`: the
// operands of products are rounded to bf16 as they enter the tensor cores and their sums are float; activations, norms,
// softmax, loss, what trains and its moments stay float in memory.
//
// Deterministic: no atomics; every sum has one order, given by shapes and by the GPU alone, so two runs give the same
// bits. cuBLASLt's algorithm for a shape is the first that its heuristic names for a fixed workspace and for reduction
// schemes that add up in a separate step; where it names none, a plain kernel adds up in order. Unlike on the CPU, the
// number of rows of a product may so decide in which order a row is added up: a sample can have other last bits in
// another batch.
//
// Everything runs on the default stream, so kernels run one after another, and copies wait for them.
//
// Launch geometry. A block has THREADS threads, and one of these forms:
//     an element each           grid n / THREADS              what has no rows (add, optimizer steps)
//     a part of a row           grid rows x parts, SPAN       kernels over [T,n]: the row's own numbers (its position,
//                               features in a part            its dropout key) are read once for a part, and one row of
//                                                             a long vector still has blocks enough when T is 1
//     a row                     grid rows                     sums along a row (norms, cross-entropy)
//     32 columns                grid columns / 32             sums down the columns
//     twice the cores           grid cores x 2                attention: blocks walk over the work, whose exact
//                                                             size only the device knows: `starts` lie there
// Neighbouring threads touch neighbouring numbers, so a warp's 32 accesses are one of 128 bytes.

#define GLMTUNE_KERNELS_ONLY
#define GLMTUNE_DEVICE __host__ __device__
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include "glmtune.c"

#ifdef GLMTUNE_DOUBLE
#error "glmtune-cuda computes in float; glmtune64 is a program of the CPU"
#endif

// ---- Launching, and what can go wrong ----------------------------------------------------------------------------

static void check(cudaError_t status, const char *what) {
    char line[300];
    if (status == cudaSuccess) return;
    snprintf(line, sizeof line, "%s, or a kernel before it: %s", what, cudaGetErrorString(status));
    kernel_failed(line);
}

static void check_product(cublasStatus_t status, const char *what) {
    char line[300];
    if (status == CUBLAS_STATUS_SUCCESS) return;
    snprintf(line, sizeof line, "cuBLASLt: %s gives status %d", what, (int)status);
    kernel_failed(line);
}

// The only place that launches. A grid of 0 blocks is nothing to do. More than 48 KiB of shared memory, what a kernel
// declares included, are to be asked for. An emulator defines its own.
#ifndef LAUNCH
#define LAUNCH(kernel, grid, block, shared_bytes, ...)                                                                 \
    do {                                                                                                               \
        const unsigned launch_grid = (grid), launch_shared = (shared_bytes);                                           \
        if (launch_shared > 40u << 10)                                                                                 \
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)launch_shared),       \
                  #kernel);                                                                                            \
        if (launch_grid) kernel<<<launch_grid, block, launch_shared>>>(__VA_ARGS__);                                   \
        check(cudaGetLastError(), #kernel);                                                                            \
    } while (0)
#endif

// Shared memory whose size the launch gives.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]
#endif

constexpr unsigned THREADS = 256, WARP = 32, ALL_LANES = 0xFFFFFFFFu, SPAN = 4 * THREADS, PARTS = 1024;

// Each area of the workspace. The gradients of HEAD_ROWS rows of logits fit it in bf16 with GLM-4's vocabulary; else
// they would be cut, and the head's weights read again.
constexpr size_t AREA_BYTES = (size_t)160 << 20, LT_BYTES = (size_t)32 << 20;

// CUDA puts a kernel's code on the GPU when it is first called, cuBLASLt's too: memory that is not given away.
constexpr size_t CODE_BYTES = (size_t)512 << 20;

// The GPU, once something is asked of it. Own memory, taken once: two areas into which the operands of a product are
// rounded or widened, block by block, cuBLASLt's workspace, and PARTS partial sums: 352 MiB, which memory_left no
// longer counts.
static struct {
    bool ready, bf16;
    unsigned cores;
    void *area[2], *lt_space;
    double *partial;
    cublasLtHandle_t lt;
} gpu;

static void *take_workspace(size_t bytes) {
    void *p = NULL;
    cudaError_t status = cudaMalloc(&p, bytes);
    if (status == cudaErrorMemoryAllocation)
        kernel_failed("out of memory: the GPU has no 352 MiB left to work in; end other programs on it, which "
                      "nvidia-smi lists, or choose another GPU by CUDA_VISIBLE_DEVICES");
    check(status, "cudaMalloc of the workspace");
    return p;
}

static void begin() {
    int count = 0;
    char line[300];
    cudaDeviceProp properties;
    if (gpu.ready) return;
    cudaError_t status = cudaGetDeviceCount(&count);
    snprintf(line, sizeof line, "no NVIDIA GPU that CUDA can use (%s); run glmtune, which is for CPUs",
             cudaGetErrorString(status));
    if (status != cudaSuccess || count == 0) kernel_failed(line);
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    if (properties.major < 8) kernel_failed("this GPU is too old: bf16 needs compute capability 8.0 (Ampere) or newer");
    gpu.cores = (unsigned)properties.multiProcessorCount;
    for (int i = 0; i < 2; i++) gpu.area[i] = take_workspace(AREA_BYTES);
    gpu.lt_space = take_workspace(LT_BYTES);
    gpu.partial = (double *)take_workspace(PARTS * sizeof *gpu.partial);
    check_product(cublasLtCreate(&gpu.lt), "cublasLtCreate");
    gpu.ready = true;
}

static __host__ __device__ size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Blocks that n things take, `each` in one.
static unsigned blocks_for(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

// Where there is one thread for each element: which this one's is.
static __device__ size_t element() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

// Where a block has a part of a row [n]: the row, and first, first + THREADS, ... below end, this thread's features.
struct Part { size_t row, first, end; };

static __device__ Part part_of_row(size_t n) {
    unsigned parts = (unsigned)((n + SPAN - 1) / SPAN);
    size_t at = (size_t)(blockIdx.x % parts) * SPAN;
    return { blockIdx.x / parts, at + threadIdx.x, least(at + SPAN, n) };
}

static unsigned parts_of_rows(size_t rows, size_t n) { return (unsigned)rows * blocks_for(n, SPAN); }

// The sum of x over the threads of a block, given to all: by halves in each warp, then warp after warp.
template<class Number> static __device__ Number sum_of_block(Number x) {
    __shared__ Number part[1024 / WARP];
    for (unsigned half = WARP / 2; half; half /= 2) x += __shfl_xor_sync(ALL_LANES, x, half);
    __syncthreads();        // whoever reads the sums of an earlier call is done
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (unsigned i = 0; i < blockDim.x / WARP; i++) x += part[i];
    return x;
}

// The same for the largest; a NaN is passed over.
static __device__ float largest_of_block(float x) {
    __shared__ float part[1024 / WARP];
    for (unsigned half = WARP / 2; half; half /= 2) {
        float other = __shfl_xor_sync(ALL_LANES, x, half);
        x = other > x ? other : x;
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / WARP; i++) x = part[i] > x ? part[i] : x;
    return x;
}

// ---- 2.13 Memory and types ---------------------------------------------------------------------------------------

size_t memory_left(void) {
    size_t left, all;
    begin();
    check(cudaMemGetInfo(&left, &all), "cudaMemGetInfo");
    return left - least(CODE_BYTES, left);
}

void *memory_take(size_t bytes) {
    void *p = NULL;
    bytes = bytes ? bytes : 1;
    if (bytes > memory_left()) return NULL;
    cudaError_t status = cudaMalloc(&p, bytes);
    if (status == cudaErrorMemoryAllocation)        // what is free lies in pieces
        return cudaGetLastError(), (void *)NULL;    // forgets the error, or the next launch would be blamed for it
    check(status, "cudaMalloc");
    check(cudaMemsetAsync(p, 0, bytes), "cudaMemsetAsync of memory_take");
    return p;
}

void memory_give(void *p) {
    if (p) check(cudaFree(p), "memory_give");
}

void memory_copy_in(void *device, const void *host, size_t bytes) {
    if (bytes) check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "memory_copy_in");
}

void memory_copy_out(void *host, const void *device, size_t bytes) {
    if (bytes) check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "memory_copy_out");
}

// What was uploaded from mapped files, and how many hold it. The same bytes at another address, as when a file is
// mapped again to be read back, are not uploaded again. They are compared where they lie, so they must stay there,
// unchanged, until memory_unmap.
static struct Upload { const void *host; size_t bytes, users; void *device; } *uploads;
static size_t n_uploads, uploads_capacity;

static Upload *find_upload(const void *host, size_t bytes) {
    for (Upload *u = uploads; u < uploads + n_uploads; u++)
        if (u->bytes == bytes && (u->host == host || !memcmp(u->host, host, bytes))) return u;
    return NULL;
}

// A copy on the GPU, in the file's own type.
const void *memory_mapped(const void *host, size_t bytes) {
    Upload *u = find_upload(host, bytes);
    if (u) return u->users++, u->device;
    void *device = memory_take(bytes);
    if (!device) kernel_failed("out of memory: the weights do not fit on this GPU; a smaller model may");
    memory_copy_in(device, host, bytes);
    if (n_uploads == uploads_capacity) {
        uploads_capacity = 2 * uploads_capacity + 64;
        uploads = (Upload *)realloc(uploads, uploads_capacity * sizeof *uploads);
        if (!uploads) kernel_failed("out of memory for the list of weights");
    }
    uploads[n_uploads++] = { host, bytes, 1, device };
    return device;
}

void memory_unmap(const void *mapped) {
    for (Upload *u = uploads; u < uploads + n_uploads; u++) {
        if (u->device != mapped) continue;
        if (--u->users) return;
        memory_give(u->device);
        *u = uploads[--n_uploads];
        return;
    }
}

void finish_kernels(void) { check(cudaDeviceSynchronize(), "finish_kernels"); }

void set_precision(int bf16) { gpu.bf16 = bf16 != 0; }

void zero(real *x, size_t n) {
    if (n) check(cudaMemsetAsync(x, 0, n * sizeof *x), "zero");
}

static size_t size_of(Dtype dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

// Number i of an array of any type; exact, but for F64, which is rounded to float.
static __device__ float number_at(const void *in, Dtype dtype, size_t i) {
    if (dtype == F32) return ((const float *)in)[i];
    if (dtype == BF16) return __bfloat162float(((const __nv_bfloat16 *)in)[i]);
    if (dtype == F16) return __half2float(((const __half *)in)[i]);
    return (float)((const double *)in)[i];
}

// out [n] = in [n], rounded once; an element each
static __global__ void convert_kernel(void *out, Dtype to, const void *in, Dtype from, size_t n) {
    size_t i = element();
    if (i >= n) return;
    float x = number_at(in, from, i);
    if (to == F32) ((float *)out)[i] = x;
    else if (to == BF16) ((__nv_bfloat16 *)out)[i] = __float2bfloat16_rn(x);
    else if (to == F16) ((__half *)out)[i] = __float2half_rn(x);
    else ((double *)out)[i] = x;
}

// Numbers of two bytes that are loaded and stored as one.
struct alignas(8) Four { __nv_bfloat16 x, y, z, w; };
template<class Number> struct alignas(16) Eight { Number at[8]; };

static __device__ Four rounded(float4 x) {
    return { __float2bfloat16_rn(x.x), __float2bfloat16_rn(x.y), __float2bfloat16_rn(x.z), __float2bfloat16_rn(x.w) };
}

static __device__ Eight<__nv_bfloat16> rounded(Eight<__half> x) {
    Eight<__nv_bfloat16> y;
    #pragma unroll
    for (unsigned i = 0; i < 8; i++) y.at[i] = __float2bfloat16_rn(__half2float(x.at[i]));
    return y;
}

// The same to bf16 by fours of float or eights of F16, for all activations that enter products go through here, and
// the weights of old releases. 6 or 4 bytes a number.
template<class Out, class In> static __global__ void round_kernel(Out *out, const In *in, size_t n) {
    size_t i = element();
    if (i < n) out[i] = rounded(in[i]);
}

static bool is_aligned(const void *p, size_t bytes) { return (uintptr_t)p % bytes == 0; }

// Whether that could be.
template<class Out, class In> static bool round_at_once(void *out, const void *in, size_t n) {
    constexpr size_t each = sizeof(Out) / sizeof(__nv_bfloat16);
    if (n % each || !is_aligned(out, sizeof(Out)) || !is_aligned(in, sizeof(In))) return false;
    LAUNCH((round_kernel<Out, In>), blocks_for(n / each, THREADS), THREADS, 0, (Out *)out, (const In *)in, n / each);
    return true;
}

static void convert(void *out, Dtype to, const void *in, Dtype from, size_t n) {
    if (to == BF16 && from == F32 && round_at_once<Four, float4>(out, in, n)) return;
    if (to == BF16 && from == F16 && round_at_once<Eight<__nv_bfloat16>, Eight<__half>>(out, in, n)) return;
    LAUNCH(convert_kernel, blocks_for(n, THREADS), THREADS, 0, out, to, in, from, n);
}

void widen(real *out, const void *in, Dtype dtype, size_t n) { convert(out, F32, in, dtype, n); }

static __device__ const float code_values[][16] = CODE_VALUES;

// Scale number k; each rounding as 2.1 says, none fused.
static __device__ float scale_of(const Scales &s, size_t k) {
    return s.each ? s.each[k] : __fadd_rn(__fmul_rn(s.map[s.code[k]], s.nested[k / 256]), s.offset);
}

static __device__ float code_at(const void *codes, Dtype dtype, size_t i) {
    if (dtype == Q8) return ((const int8_t *)codes)[i];
    const unsigned byte = ((const uint8_t *)codes)[i / 2];
    return code_values[dtype - Q4][i % 2 ? byte & 15 : byte >> 4];
}

// to = x, rounded to its type
static __device__ void put(float &to, float x) { to = x; }
static __device__ void put(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }

// Numbers i .. i + n of a matrix of codes, n <= 8, as float or bf16, zeros behind them. One division, which takes as
// long as several of them, and most often one scale serve all.
template<class Out>
static __device__ Eight<Out> eight_numbers(const void *codes, Dtype dtype, const Scales &s, size_t i, unsigned n) {
    size_t k = i / s.per;
    unsigned end = (unsigned)least(8, (k + 1) * s.per - i);         // of those that have scale k
    float scale = scale_of(s, k);
    Eight<Out> x = {};
    #pragma unroll
    for (unsigned j = 0; j < 8; j++) {
        if (j == end && j < n) scale = scale_of(s, ++k), end += (unsigned)least(8, s.per);
        if (j < n) put(x.at[j], __fmul_rn(code_at(codes, dtype, i + j), scale));
    }
    return x;
}

// out [n] = numbers first .. first + n of a matrix of codes; eight elements each
template<class Out> static __global__ void decode_kernel(Out *out, const void *codes, Dtype dtype, Scales s,
                                                         size_t first, size_t n) {
    const size_t i = 8 * element();
    if (i >= n) return;
    const unsigned m = (unsigned)least(8, n - i);
    const Eight<Out> x = eight_numbers<Out>(codes, dtype, s, first + i, m);
    if (m == 8 && (uintptr_t)out % sizeof(uint4) == 0) {
        *(Eight<Out> *)(out + i) = x;
        return;
    }
    #pragma unroll
    for (unsigned j = 0; j < 8; j++) if (j < m) out[i + j] = x.at[j];
}

template<class Out> static void decode(Out *out, Weight w, size_t first, size_t n) {
    LAUNCH(decode_kernel<Out>, blocks_for(n, 8 * THREADS), THREADS, 0, out, w.data, w.dtype, *w.scales, w.first + first,
           n);
}

// out [n] = n numbers of a weight from number `first` on
static void load(void *out, Dtype to, Weight w, size_t first, size_t n) {
    if (!w.scales) return convert(out, to, (const char *)w.data + (w.first + first) * size_of(w.dtype), w.dtype, n);
    to == F32 ? decode((float *)out, w, first, n) : decode((__nv_bfloat16 *)out, w, first, n);
}

void widen_weight(real *out, Weight w, size_t n) { load(out, F32, w, 0, n); }
void narrow(void *out, Dtype dtype, const real *in, size_t n) { convert(out, dtype, in, F32, n); }

// out [n], an element each
static __global__ void fill_uniform_kernel(real *out, uint64_t key, float center, float spread, size_t n) {
    size_t i = element();
    if (i >= n) return;
    float unit = (float)((int32_t)(rng_bits(key, i) >> 40) - (1 << 23)) * 0x1p-23f;
    out[i] = center + spread * unit;
}

void fill_uniform(real *out, uint64_t key, float center, float spread, size_t n) {
    LAUNCH(fill_uniform_kernel, blocks_for(n, THREADS), THREADS, 0, out, key, center, spread, n);
}

// the same for normal numbers
static __global__ void fill_normal_kernel(real *out, uint64_t key, float center, float spread, size_t n) {
    size_t i = element();
    if (i >= n) return;
    double u = (double)((rng_bits(key, 2*i) >> 11) + 1) * 0x1p-53;
    double turn = (double)(rng_bits(key, 2*i + 1) >> 11) * 0x1p-53 * 6.283185307179586;
    out[i] = center + spread * (float)(sqrt(-2 * log(u)) * cos(turn));
}

void fill_normal(real *out, uint64_t key, float center, float spread, size_t n) {
    LAUNCH(fill_normal_kernel, blocks_for(n, THREADS), THREADS, 0, out, key, center, spread, n);
}

// ---- 2.2 Matrix product ------------------------------------------------------------------------------------------
// cuBLASLt counts by columns, so a matrix [rows,columns] of ours is one of [columns,rows] there, and C [M,N] += s A B
// is asked for as C^T += s B^T A^T. Both operands must have one type: float in fp32, where the weights are widened;
// bf16 in bf16, where bf16 weights enter as they lie and all else is rounded. What must be converted goes through an
// area of the workspace, as many rows at a time as fit.

// A matrix as cuBLASLt sees it: columns of ld numbers; op says whether it is transposed.
struct Matrix { const void *data; size_t ld; cublasOperation_t op; };

// All that the choice of an algorithm may depend on; numbers alone, so that two compare by their bytes.
struct ProductShape { size_t m, n, k, ld_a, ld_b, ld_c, op_a, op_b, bf16, aligned_a, aligned_b, aligned_c; };

struct ProductPlan {
    ProductShape shape;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    bool known;                         // cuBLASLt has an algorithm
    cublasLtMatmulAlgo_t algorithm;
};

// The largest power of two, up to 16, on which an address lies. Nothing loads more than 16 bytes at once; an algorithm
// chosen for more would give equal products other bits where arrays lie elsewhere.
static size_t alignment_of(const void *p) {
    uintptr_t at = (uintptr_t)p;
    return at % 16 ? at & (~at + 1) : 16;
}

static cublasLtMatrixLayout_t layout_of(cudaDataType_t type, size_t rows, size_t columns, size_t ld) {
    cublasLtMatrixLayout_t layout;
    check_product(cublasLtMatrixLayoutCreate(&layout, type, rows, columns, (int64_t)ld), "cublasLtMatrixLayoutCreate");
    return layout;
}

static void choose_algorithm(ProductPlan *p) {
    const ProductShape *s = &p->shape;
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t found = {};
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;        // none, or added up in a separate step
    const uint32_t a = (uint32_t)s->aligned_a, b = (uint32_t)s->aligned_b, c = (uint32_t)s->aligned_c;
    const struct { cublasLtMatmulPreferenceAttributes_t what; const void *value; size_t bytes; } wishes[] = {
        { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &LT_BYTES, sizeof LT_BYTES },
        { CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a, sizeof a },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b, sizeof b },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c, sizeof c } };
    int n_found = 0;
    check_product(cublasLtMatmulPreferenceCreate(&wish), "cublasLtMatmulPreferenceCreate");
    for (const auto &w : wishes)
        check_product(cublasLtMatmulPreferenceSetAttribute(wish, w.what, w.value, w.bytes), "a preference");
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(gpu.lt, p->product, p->a, p->b, p->c, p->c, wish, 1, &found,
                                                           &n_found);
    check_product(cublasLtMatmulPreferenceDestroy(wish), "cublasLtMatmulPreferenceDestroy");
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check_product(status, "cublasLtMatmulAlgoGetHeuristic");
    p->known = status == CUBLAS_STATUS_SUCCESS && n_found && found.state == CUBLAS_STATUS_SUCCESS;
    p->algorithm = found.algo;
}

static void make_plan(ProductPlan *p, const ProductShape &s) {
    const cudaDataType_t type = s.bf16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasOperation_t op_a = (cublasOperation_t)s.op_a, op_b = (cublasOperation_t)s.op_b;
    p->shape = s;
    // not _FAST_TF32: a float operand keeps all its bits
    check_product(cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    check_product(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a),
                  "cublasLtMatmulDescSetAttribute");
    check_product(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b),
                  "cublasLtMatmulDescSetAttribute");
    p->a = op_a == CUBLAS_OP_N ? layout_of(type, s.m, s.k, s.ld_a) : layout_of(type, s.k, s.m, s.ld_a);
    p->b = op_b == CUBLAS_OP_N ? layout_of(type, s.k, s.n, s.ld_b) : layout_of(type, s.n, s.k, s.ld_b);
    p->c = layout_of(CUDA_R_32F, s.m, s.n, s.ld_c);
    choose_algorithm(p);
}

static void drop_plan(ProductPlan *p) {
    check_product(cublasLtMatmulDescDestroy(p->product), "cublasLtMatmulDescDestroy");
    check_product(cublasLtMatrixLayoutDestroy(p->a), "cublasLtMatrixLayoutDestroy");
    check_product(cublasLtMatrixLayoutDestroy(p->b), "cublasLtMatrixLayoutDestroy");
    check_product(cublasLtMatrixLayoutDestroy(p->c), "cublasLtMatrixLayoutDestroy");
}

// A plan that was made before, for asking takes longer than a small product; the oldest gives way.
static const ProductPlan *plan_of(const ProductShape &s) {
    static ProductPlan plans[256];
    static size_t n, oldest;
    constexpr size_t most = sizeof plans / sizeof *plans;
    for (size_t i = 0; i < n; i++)
        if (!memcmp(&plans[i].shape, &s, sizeof s)) return &plans[i];
    ProductPlan *p = &plans[n < most ? n : oldest];
    if (n < most) n++;
    else drop_plan(p), oldest = (oldest + 1) % most;
    make_plan(p, s);
    return p;
}

// The product below where cuBLASLt has no algorithm for its shape: slow, but right. A number of c each, k in order.
static __global__ void plain_product_kernel(real *c, const real *from, const void *a, const void *b, ProductShape s,
                                            real scale) {
    const size_t at = element(), i = at % s.m, j = at / s.m, ij = i + j * s.ld_c;
    const Dtype dtype = s.bf16 ? BF16 : F32;
    float sum = 0;
    if (j >= s.n) return;
    for (size_t l = 0; l < s.k; l++)
        sum += number_at(a, dtype, s.op_a == CUBLAS_OP_N ? i + l * s.ld_a : l + i * s.ld_a) *
               number_at(b, dtype, s.op_b == CUBLAS_OP_N ? l + j * s.ld_b : j + l * s.ld_b);
    c[ij] = (from ? from[ij] : 0) + scale * sum;
}

// c [m,n] = from + scale a [m,k] b [k,n], as cuBLASLt counts: c, and from unless it is NULL, have columns of ld_c
// numbers. With beta 0 what cuBLASLt calls C is not read.
static void product(real *c, const real *from, size_t ld_c, Matrix a, Matrix b, size_t m, size_t n, size_t k,
                    real scale) {
    const real beta = from ? 1 : 0;
    const void *start = from ? from : c;
    const ProductPlan *p = plan_of({ m, n, k, a.ld, b.ld, ld_c, (size_t)a.op, (size_t)b.op, gpu.bf16,
                                     alignment_of(a.data), alignment_of(b.data),
                                     least(alignment_of(c), alignment_of(start)) });
    if (!p->known) {
        LAUNCH(plain_product_kernel, blocks_for(m * n, THREADS), THREADS, 0, c, from, a.data, b.data, p->shape,
               scale);
        return;
    }
    check_product(cublasLtMatmul(gpu.lt, p->product, &scale, a.data, p->a, b.data, p->b, &beta, start, p->c, c, p->c,
                                 &p->algorithm, gpu.lt_space, LT_BYTES, 0), "cublasLtMatmul");
}

static Dtype operand_type() { return gpu.bf16 ? BF16 : F32; }

// How many of `rows` rows of a matrix are taken at a time: all, where they enter as they lie; else parts of about one
// size that fit the area, of whole 64 rows, so that no part begins between 16 bytes.
static size_t rows_at_once(Dtype dtype, size_t rows, size_t columns) {
    size_t fit = AREA_BYTES / (columns * size_of(operand_type())) / 64;
    if (dtype == operand_type()) return rows;
    if (fit == 0) kernel_failed("a matrix has rows that do not fit the workspace");
    size_t sixty_fours = blocks_for(rows, 64), parts = blocks_for(sixty_fours, fit);
    return (sixty_fours + parts - 1) / parts * 64;
}

// Rows row .. row + rows of a matrix [any,columns], as operands of a product.
static const char *operand(int area, const void *matrix, Dtype dtype, size_t row, size_t rows, size_t columns) {
    const char *from = (const char *)matrix + row * columns * size_of(dtype);
    if (dtype == operand_type()) return from;
    convert(gpu.area[area], operand_type(), from, dtype, rows * columns);
    return (const char *)gpu.area[area];
}

// The same of a weight, of codes too.
static const char *operand(int area, Weight w, size_t row, size_t rows, size_t columns) {
    const char *lies = (const char *)w.data + (w.first + row * columns) * size_of(w.dtype);
    if (w.dtype == operand_type()) return lies;
    load(gpu.area[area], operand_type(), w, row * columns, rows * columns);
    return (const char *)gpu.area[area];
}

// The sum of eight weights w times x, two-byte weights lying as four pairs, the first in the lower half.
static __device__ float dot_of_eight(uint4 w, const float4 *x, Dtype dtype) {
    const unsigned pairs[4] = { w.x, w.y, w.z, w.w };
    const float4 x0 = x[0], x1 = x[1];
    const float factors[8] = { x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w };
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        unsigned low = pairs[i] & 0xFFFFu, high = pairs[i] >> 16;
        float first = dtype == BF16 ? __uint_as_float(low << 16) : __half2float(__ushort_as_half((unsigned short)low));
        float second = dtype == BF16 ? __uint_as_float(high << 16)
                                     : __half2float(__ushort_as_half((unsigned short)high));
        sum += first * factors[2*i] + second * factors[2*i + 1];
    }
    return sum;
}

// y [n_out] = from + scale W x: a warp for each row of W, read once, as it lies, for decoding is bound by memory;
// `eights`: by 16 bytes a thread. Nothing is rounded, in bf16 neither.
static __global__ void one_row_kernel(real *y, const real *from, const real *x, const void *w, Dtype dtype, real scale,
                                      size_t n_out, size_t n_in, bool eights) {
    size_t j = (size_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum = 0;
    if (j < n_out && eights) {
        const uint4 *w_j = (const uint4 *)w + j * (n_in / 8);
        for (size_t k = lane; k < n_in / 8; k += WARP) sum += dot_of_eight(w_j[k], (const float4 *)x + 2*k, dtype);
    } else if (j < n_out) {
        for (size_t k = lane; k < n_in; k += WARP) sum += number_at(w, dtype, j * n_in + k) * x[k];
    }
    for (unsigned half = WARP / 2; half; half /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, half);
    if (j < n_out && lane == 0) y[j] = (from ? from[j] : 0) + scale * sum;
}

// The same of codes, by eights.
static __global__ void one_row_codes_kernel(real *y, const real *from, const real *x, const void *codes, Dtype dtype,
                                            Scales s, size_t first, real scale, size_t n_out, size_t n_in) {
    size_t j = (size_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum = 0;
    for (size_t k = 8 * lane; j < n_out && k < n_in; k += 8 * WARP) {
        const unsigned n = (unsigned)least(8, n_in - k);
        const Eight<float> w = eight_numbers<float>(codes, dtype, s, first + j * n_in + k, n);
        #pragma unroll
        for (unsigned e = 0; e < 8; e++) if (e < n) sum += w.at[e] * x[k + e];
    }
    for (unsigned half = WARP / 2; half; half /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, half);
    if (j < n_out && lane == 0) y[j] = (from ? from[j] : 0) + scale * sum;
}

// Where the numbers of a weight begin.
static const void *data_of(Weight w) { return (const char *)w.data + w.first * size_of(w.dtype); }

static void one_row(real *y, const real *from, const real *x, Weight w, real scale, size_t n_out, size_t n_in) {
    if (w.scales) {
        LAUNCH(one_row_codes_kernel, blocks_for(n_out, THREADS / WARP), THREADS, 0, y, from, x, w.data, w.dtype,
               *w.scales, w.first, scale, n_out, n_in);
        return;
    }
    const void *data = data_of(w);
    bool eights = size_of(w.dtype) == 2 && n_in % 8 == 0 && is_aligned(data, 16) && is_aligned(x, 16);
    LAUNCH(one_row_kernel, blocks_for(n_out, THREADS / WARP), THREADS, 0, y, from, x, data, w.dtype, scale, n_out, n_in,
           eights);
}

// There Y^T [n_out,T] = W X^T: W [n_out,n_in] is transposed, X^T [n_in,T], which lies ready, is not.
static void forward_rows(real *y, const real *from, const char *x, Weight w, real scale, size_t T, size_t n_out,
                         size_t n_in) {
    size_t j_step = rows_at_once(w.dtype, n_out, n_in);
    for (size_t j = 0; j < n_out; j += j_step) {
        size_t n_j = least(j_step, n_out - j);
        const char *w_j = operand(1, w, j, n_j, n_in);
        product(y + j, from ? from + j : NULL, n_out, { w_j, n_in, CUBLAS_OP_T }, { x, n_in, CUBLAS_OP_N }, n_j, T,
                n_in, scale);
    }
}

// Rows of x are rounded once for all parts.
void linear_parts_forward(real *const *y, real *const *from, const real *x, Weight w, real scale, size_t T,
                          const size_t *n_out, size_t n_parts, size_t n_in) {
    if (!T) return;
    size_t t_step = rows_at_once(F32, T, n_in);
    for (size_t t = 0; t < T; t += t_step) {
        size_t n_t = least(t_step, T - t);
        const char *x_t = T > 1 ? operand(0, x, F32, t, n_t, n_in) : NULL;
        Weight part = w;
        for (size_t p = 0; p < n_parts; part.first += n_out[p++] * n_in) {
            const real *start = from && from[p] ? from[p] + t*n_out[p] : NULL;
            if (T == 1) one_row(y[p], start, x, part, scale, n_out[p], n_in);
            else forward_rows(y[p] + t*n_out[p], start, x_t, part, scale, n_t, n_out[p], n_in);
        }
    }
}

void linear_forward(real *y, const real *from, const real *x, Weight w, real scale, size_t T, size_t n_out,
                    size_t n_in) {
    real *const start = (real *)from;
    linear_parts_forward(&y, &start, x, w, scale, T, &n_out, 1, n_in);
}

// There dX^T [n_in,T] = W^T dY^T, both as they lie.
void linear_backward_input(real *dx, const real *from, const real *dy, Weight w, real scale, size_t T, size_t n_out,
                           size_t n_in) {
    if (!T) return;
    size_t t_step = rows_at_once(F32, T, n_out), j_step = rows_at_once(w.dtype, n_out, n_in);
    for (size_t t = 0; t < T; t += t_step) {
        size_t n_t = least(t_step, T - t);
        const char *dy_t = operand(0, dy, F32, t, n_t, n_out);
        const real *from_t = from ? from + t*n_in : NULL;
        for (size_t j = 0; j < n_out; j += j_step) {
            size_t n_j = least(j_step, n_out - j);
            const char *w_j = operand(1, w, j, n_j, n_in);
            const char *dy_tj = dy_t + j * size_of(operand_type());
            product(dx + t*n_in, j ? dx + t*n_in : from_t, n_in, { w_j, n_in, CUBLAS_OP_N },
                    { dy_tj, n_out, CUBLAS_OP_N }, n_in, n_t, n_j, scale);
        }
    }
}

// There dW^T [n_in,n_out] += X^T dY: X^T as it lies, dY transposed.
void linear_backward_weight(real *dw, const real *dy, const real *x, real scale, size_t T, size_t n_out, size_t n_in) {
    if (!T) return;
    size_t t_step = least(rows_at_once(F32, T, n_out), rows_at_once(F32, T, n_in));
    for (size_t t = 0; t < T; t += t_step) {
        size_t n_t = least(t_step, T - t);
        const char *dy_t = operand(0, dy, F32, t, n_t, n_out), *x_t = operand(1, x, F32, t, n_t, n_in);
        product(dw, dw, n_in, { x_t, n_in, CUBLAS_OP_N }, { dy_t, n_out, CUBLAS_OP_T }, n_in, n_out, n_t, scale);
    }
}

void linear_parts_backward_input(real *dx, const real *from, real *const *dy, Weight w, real scale, size_t T,
                                 const size_t *n_out, size_t n_parts, size_t n_in) {
    for (size_t p = 0; p < n_parts; w.first += n_out[p++] * n_in, from = dx)
        linear_backward_input(dx, from, dy[p], w, scale, T, n_out[p], n_in);
}

// ---- 2.3 Rows: embedding, gather, bias ---------------------------------------------------------------------------

// x [T,H], ids [T], table [V,H]; a part of a row each
static __global__ void embedding_forward_kernel(real *x, const int32_t *ids, const void *table, Dtype dtype, size_t H) {
    Part p = part_of_row(H);
    size_t from = (size_t)ids[p.row] * H;
    for (size_t i = p.first; i < p.end; i += THREADS) x[p.row*H + i] = number_at(table, dtype, from + i);
}

void embedding_forward(real *x, const int32_t *ids, Weight table, size_t T, size_t H) {
    LAUNCH(embedding_forward_kernel, parts_of_rows(T, H), THREADS, 0, x, ids, data_of(table), table.dtype, H);
}

// dtable [V,H], dx [T,H]; a part of a row each: the first row with an id adds up, in order, all that have it, and the
// others do nothing. So a number has one thread, and its sum one order, without atomics.
static __global__ void embedding_backward_kernel(real *dtable, const real *dx, const int32_t *ids, size_t T, size_t H) {
    __shared__ int earlier, later;
    Part p = part_of_row(H);
    const int32_t id = ids[p.row];
    if (threadIdx.x == 0) earlier = later = 0;
    __syncthreads();
    for (size_t t = threadIdx.x; t < T; t += THREADS)
        if (ids[t] == id && t != p.row) *(t < p.row ? &earlier : &later) = 1;
    __syncthreads();
    const size_t end = earlier ? 0 : later ? T : p.row + 1;
    for (size_t t = p.row; t < end; t++)
        if (ids[t] == id)
            for (size_t i = p.first; i < p.end; i += THREADS) dtable[(size_t)id*H + i] += dx[t*H + i];
}

void embedding_backward(real *dtable, const real *dx, const int32_t *ids, size_t T, size_t H) {
    LAUNCH(embedding_backward_kernel, parts_of_rows(T, H), THREADS, 0, dtable, dx, ids, T, H);
}

void gather_forward(real *out, const real *x, const int32_t *rows, size_t R, size_t H) {
    embedding_forward(out, rows, { x, F32, 0, NULL }, R, H);
}

void gather_backward(real *dx, const real *dout, const int32_t *rows, size_t R, size_t H) {
    embedding_backward(dx, dout, rows, R, H);
}

// y [T,n] += bias [n], a part of a row each
static __global__ void bias_forward_kernel(real *y, const real *bias, size_t n) {
    Part p = part_of_row(n);
    for (size_t i = p.first; i < p.end; i += THREADS) y[p.row*n + i] += bias[i];
}

void bias_forward(real *y, const real *bias, size_t T, size_t n) {
    LAUNCH(bias_forward_kernel, parts_of_rows(T, n), THREADS, 0, y, bias, n);
}

// out [n] += sum_t a_ti b_ti r_t; a and b [T,n], r [T], of which b and r may be NULL, for 1. 32 columns each: warp w
// adds up rows w, w + 8, ..., then the first warp the eight sums.
static __global__ void column_sums_kernel(real *out, const real *a, const real *b, const real *r, size_t T, size_t n) {
    constexpr unsigned WARPS = THREADS / WARP;
    __shared__ float part[WARPS][WARP];
    unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    size_t i = (size_t)blockIdx.x * WARP + lane;
    float sum = 0;
    for (size_t t = warp; t < T && i < n; t += WARPS) sum += a[t*n + i] * (b ? b[t*n + i] : 1) * (r ? r[t] : 1);
    part[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || i >= n) return;
    for (unsigned w = 1; w < WARPS; w++) sum += part[w][lane];
    out[i] += sum;
}

static void add_columns(real *out, const real *a, const real *b, const real *r, size_t T, size_t n) {
    LAUNCH(column_sums_kernel, blocks_for(n, WARP), THREADS, 0, out, a, b, r, T, n);
}

void bias_backward(real *dbias, const real *dy, size_t T, size_t n) { add_columns(dbias, dy, NULL, NULL, T, n); }

// out [n] = a + b, out may be either; an element each
static __global__ void add_kernel(real *out, const real *a, const real *b, size_t n) {
    size_t i = element();
    if (i < n) out[i] = a[i] + b[i];
}

void add(real *out, const real *a, const real *b, size_t n) {
    LAUNCH(add_kernel, blocks_for(n, THREADS), THREADS, 0, out, a, b, n);
}

// ---- 2.5 RMSNorm -------------------------------------------------------------------------------------------------

// y [T,H], rms [T], x [T,H], gain [H]; a row each
static __global__ void rmsnorm_forward_kernel(real *y, real *inv_rms, const real *x, const real *gain, real eps,
                                              size_t H) {
    const size_t t = blockIdx.x;
    float squares = 0;
    for (size_t i = threadIdx.x; i < H; i += THREADS) squares += x[t*H + i] * x[t*H + i];
    float r = 1 / sqrtf(sum_of_block(squares) / (real)H + eps);
    if (threadIdx.x == 0) inv_rms[t] = r;
    for (size_t i = threadIdx.x; i < H; i += THREADS) y[t*H + i] = x[t*H + i] * r * gain[i];
}

void rmsnorm_forward(real *y, real *inv_rms, const real *x, const real *gain, real eps, size_t T, size_t H) {
    LAUNCH(rmsnorm_forward_kernel, (unsigned)T, THREADS, 0, y, inv_rms, x, gain, eps, H);
}

// dx [T,H]; a row each
static __global__ void rmsnorm_backward_kernel(real *dx, const real *from, const real *dy, const real *x,
                                               const real *gain, const real *rms, size_t H) {
    const size_t t = blockIdx.x;
    const float r = rms[t];
    float along = 0;
    for (size_t i = threadIdx.x; i < H; i += THREADS) along += gain[i] * dy[t*H + i] * x[t*H + i];
    float factor = r * r / (real)H * sum_of_block(along);
    for (size_t i = threadIdx.x; i < H; i += THREADS)
        dx[t*H + i] = (from ? from[t*H + i] : 0) + r * (gain[i] * dy[t*H + i] - x[t*H + i] * factor);
}

void rmsnorm_backward(real *dx, const real *from, real *dgain, const real *dy, const real *x, const real *gain,
                      const real *rms, size_t T, size_t H) {
    LAUNCH(rmsnorm_backward_kernel, (unsigned)T, THREADS, 0, dx, from, dy, x, gain, rms, H);
    if (dgain) add_columns(dgain, dy, x, rms, T, H);
}

// ---- 2.6 Rotary positions ----------------------------------------------------------------------------------------

// table [n_positions,n_rotated], a pair each; rounded where Hugging Face rounds, as section 2.6 of glmtune.c says
static __global__ void rope_table_kernel(real *table, double theta, size_t n_rotated, size_t n_pairs) {
    size_t i = element();
    if (i >= n_pairs) return;
    size_t p = i / (n_rotated / 2), j = i % (n_rotated / 2);
    real exponent = (real)(2 * j) / (real)n_rotated;
    real inv_freq = 1 / (real)pow(theta, (double)exponent);
    real angle = (real)p * inv_freq;
    table[2*i] = (real)cos((double)angle);
    table[2*i + 1] = (real)sin((double)angle);
}

void rope_table(real *table, double theta, size_t n_rotated, size_t n_positions) {
    size_t n_pairs = n_positions * (n_rotated / 2);
    LAUNCH(rope_table_kernel, blocks_for(n_pairs, THREADS), THREADS, 0, table, theta, n_rotated, n_pairs);
}

// x [T,n_heads,head_dim] in place; a part of the n_heads n_rotated/2 pairs of a row each
static __global__ void rotate_kernel(real *x, const int32_t *positions, const real *table, real sign, size_t n_heads,
                                     size_t head_dim, size_t n_rotated) {
    const unsigned half = (unsigned)n_rotated / 2;
    Part part = part_of_row(n_heads * half);
    const real *table_t = table + (size_t)positions[part.row] * n_rotated;
    for (size_t i = part.first; i < part.end; i += THREADS) {
        unsigned h = (unsigned)i / half, j = (unsigned)i % half;
        real *pair = x + (part.row * n_heads + h) * head_dim + 2*j;
        real a = pair[0], b = pair[1], c = table_t[2*j], s = sign * table_t[2*j + 1];
        pair[0] = a*c - b*s;
        pair[1] = b*c + a*s;
    }
}

static void rotate(real *x, const int32_t *positions, const real *table, real sign, size_t T, size_t n_heads,
                   size_t head_dim, size_t n_rotated) {
    LAUNCH(rotate_kernel, parts_of_rows(T, n_heads * (n_rotated / 2)), THREADS, 0, x, positions, table, sign, n_heads,
           head_dim, n_rotated);
}

void rope_forward(real *x, const int32_t *positions, const real *table, size_t T, size_t n_heads, size_t head_dim,
                  size_t n_rotated) {
    rotate(x, positions, table, 1, T, n_heads, head_dim, n_rotated);
}

void rope_backward(real *dx, const int32_t *positions, const real *table, size_t T, size_t n_heads, size_t head_dim,
                   size_t n_rotated) {
    rotate(dx, positions, table, -1, T, n_heads, head_dim, n_rotated);
}

// ---- 2.7 Attention -----------------------------------------------------------------------------------------------
// As in glmtune.c no T x T array is kept. A block of threads owns ROWS queries, or keys, of one head and goes through
// the rows of the other side that they meet, COLUMNS at a time. It makes two kinds of products of tiles in shared
// memory, which are rounded in bf16:
//     scores    s [ROWS,COLUMNS] = a b^T     of a tile [ROWS,WIDTH] of its own and one [COLUMNS,WIDTH] that it meets
//     sums      c [ROWS,WIDTH] += p x        of probabilities p [ROWS,COLUMNS] and a tile x that it meets
// Both stay in registers. A thread has some columns of two rows, so that a row's sum and its largest take a few
// shuffles, and in bf16 scores are the left operand of the next product where they lie (Dao, FlashAttention-2, 2023).
// There are three passes:
//     forward   out += p v                    over the keys that queries see; a row's largest score grows on the way,
//                                             and its sums so far are scaled to it
//     queries   dq += ds k                    over the same keys
//     keys      dv += p^T dout, dk += ds^T q  over the queries that see them, for one query head. All is transposed: a
//                                             row is a key. Heads of a group are then added up in order (add_heads)
// A head wider than WIDTH features is met in slabs of as many: scores add up over slabs, and each slab of the result is
// another block's work. Bank conflicts: rows of tiles are padded by 16 bytes.

// Tiles: the type of their numbers, of what is loaded into them, their features, whether heads are wider. LANES
// neighbouring threads have the same two rows. BLOCKS: for how many a core has registers, 65,536 in all; KEYS_BLOCKS:
// the same for the kernel of keys.
template<class N, class In, unsigned width, bool in_slabs> struct Tiles {
    typedef N number;
    typedef In input;
    static constexpr bool SLABS = in_slabs, IN_BF16 = sizeof(N) == 2;
    static constexpr unsigned WIDTH = width, LD = WIDTH + 16 / sizeof(N), LANES = IN_BF16 ? 4 : 16;
    static constexpr unsigned ROWS = 2 * THREADS / LANES, COLUMNS = 32, OWN = ROWS * LD, MET = COLUMNS * LD;
    static constexpr unsigned BLOCKS = sizeof(In) > sizeof(N) && WIDTH > 64 ? 1 : 2, KEYS_BLOCKS = IN_BF16 ? 1 : 2;
};

// What a thread has of a matrix [ROWS,width]: of two rows, NEAR columns side by side of every LANES * NEAR. In bf16
// these are the places that mma.sync has for it.
template<class C, unsigned width, unsigned NEAR> struct Spread {
    static constexpr unsigned EACH = width / C::LANES;
    float at[2][EACH];

    static __device__ unsigned row(unsigned y) {
        return (threadIdx.x / WARP * 2 + y) * (WARP / C::LANES) + threadIdx.x % WARP / C::LANES;
    }
    static __device__ unsigned first_column() { return threadIdx.x % C::LANES * NEAR; }
    static __device__ constexpr unsigned step(unsigned e) { return e / NEAR * C::LANES * NEAR + e % NEAR; }
    static __device__ unsigned column(unsigned e) { return first_column() + step(e); }
};
template<class C> using Scores = Spread<C, C::COLUMNS, C::IN_BF16 ? 2 : 1>;
template<class C> using Sums = Spread<C, C::WIDTH, C::IN_BF16 ? 2 : 4>;

// For the numbers of either: row y, column e of it.
#define FOR_EACH_OF(spread, y, e)                                                                                      \
    _Pragma("unroll") for (unsigned y = 0; y < 2; y++)                                                                 \
        _Pragma("unroll") for (unsigned e = 0; e < (spread).EACH; e++)

// n rows of features, `stride` apart.
template<class In> struct Rows { const In *at; unsigned stride, n; };

// tile [height,LD]: WIDTH features from c on of rows of d, zeros where there is none. It is there after
// tiles_are_there. Rows of the tile's own type are copied by 16 bytes while the threads go on, where d is a multiple of
// the numbers in 16 bytes, as it is in bf16 (rounds_first). Unrolled, that loop takes registers that the kernels lack.
template<class C, unsigned height = C::COLUMNS, class N>
static __device__ void load_tile(N *tile, Rows<N> rows, unsigned c, unsigned d) {
    constexpr unsigned EACH = 16 / sizeof(N), ACROSS = C::WIDTH / EACH;
    const bool by_16_bytes = sizeof(N) == 2 || d % EACH == 0;
    #pragma unroll 1
    for (unsigned first = 0; by_16_bytes && first < height; first += THREADS / ACROSS) {
        const unsigned row = first + threadIdx.x / ACROSS, column = threadIdx.x % ACROSS * EACH;
        const bool there = row < rows.n && c + column < d;
        __pipeline_memcpy_async(tile + row * C::LD + column, rows.at + (there ? c + row * rows.stride + column : 0), 16,
                                there ? 0 : 16);
    }
    __pipeline_commit();
    for (unsigned i = threadIdx.x; !by_16_bytes && i < height * C::WIDTH; i += THREADS) {
        const unsigned row = i / C::WIDTH, column = i % C::WIDTH;
        const bool there = row < rows.n && c + column < d;
        tile[row * C::LD + column] = there ? rows.at[c + row * rows.stride + column] : N();
    }
}

// Rows of float are rounded for tiles of bf16. AT_ONCE loads of a thread are under way together: what is not there
// reads the first four, for a branch would make each wait for the one before.
template<class C, unsigned height = C::COLUMNS>
static __device__ void load_tile(__nv_bfloat16 *tile, Rows<float> rows, unsigned c, unsigned d) {
    constexpr unsigned FOURS = C::WIDTH / 4, EACH = height * FOURS / THREADS, AT_ONCE = EACH < 4 ? EACH : 4;
    for (unsigned i = threadIdx.x; d % 4 == 0 && i < height * FOURS; i += AT_ONCE * THREADS) {
        float4 x[AT_ONCE];
        for (unsigned g = 0; g < AT_ONCE; g++) {
            const unsigned row = (i + g * THREADS) / FOURS, column = (i + g * THREADS) % FOURS * 4;
            const bool there = row < rows.n && c + column < d;
            x[g] = *(const float4 *)(rows.at + c + (there ? row * rows.stride + column : 0));
            if (!there) x[g] = { 0, 0, 0, 0 };
        }
        for (unsigned g = 0; g < AT_ONCE; g++)
            *(Four *)(tile + (i + g * THREADS) / FOURS * C::LD + (i + g * THREADS) % FOURS * 4) = rounded(x[g]);
    }
    for (unsigned i = threadIdx.x; d % 4 && i < height * C::WIDTH; i += THREADS) {
        const unsigned row = i / C::WIDTH, column = i % C::WIDTH;
        const bool there = row < rows.n && c + column < d;
        tile[row * C::LD + column] = __float2bfloat16_rn(there ? rows.at[c + row * rows.stride + column] : 0);
    }
}

static __device__ void tiles_are_there() {
    __pipeline_wait_prior(0);
    __syncthreads();
}

static __device__ float dot_of_four(float4 a, float4 b) { return a.x*b.x + a.y*b.y + a.z*b.z + a.w*b.w; }

// s += a b^T in float
template<class C> static __device__ void add_scores(Scores<C> &s, const float *a, const float *b) {
    #pragma unroll 2
    for (unsigned c = 0; c < C::WIDTH; c += 4)
        FOR_EACH_OF(s, y, e)
            s.at[y][e] += dot_of_four(*(const float4 *)(a + s.row(y) * C::LD + c),
                                      *(const float4 *)(b + s.column(e) * C::LD + c));
}

// c += p x in float; probabilities go by way of shared memory, where a warp has its own rows. A barrier stands between
// two calls.
template<class C> static __device__ void add_sums(Sums<C> &c, const Scores<C> &p, const float *x) {
    __shared__ float p_row[C::ROWS][C::COLUMNS + 1];
    FOR_EACH_OF(p, y, e) p_row[p.row(y)][p.column(e)] = p.at[y][e];
    __syncwarp();
    for (unsigned k = 0; k < C::COLUMNS; k++)
        FOR_EACH_OF(c, y, e) c.at[y][e] += p_row[c.row(y)][k] * x[k * C::LD + c.column(e)];
}

// What has no name in C++: the tensor cores, by the instructions of PTX ("Warp-level matrix instructions" in its ISA),
// all lanes of a warp together, and 2^x, which is 0 below 2^-126. An emulator defines its own.
#ifndef EMULATOR_H
// x: of each of four matrices [8,8] a lane gets the two numbers of row lane / 4 from column 2 (lane % 4) on. Lane l
// names row l % 8 of matrix l / 8: 16 bytes of shared memory.
static __device__ void load_matrices(unsigned (&x)[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// The same of the four transposed.
static __device__ void load_transposed(unsigned (&x)[4], const __nv_bfloat16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// c [16,8] += a [16,16] b [16,8]. c0, c1 lie as above in the upper half of c, c2, c3 in the lower; a in its quarters:
// upper left, lower left, upper right, lower right; b^T in its left and its right half.
static __device__ void multiply_add(float &c0, float &c1, float &c2, float &c3, const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// c += a b: of a warp's rows of c the 16 columns that begin with a thread's column e; b^T is four matrices, the upper
// two for the first 8 columns
template<class Part> static __device__ void multiply_onto(Part &c, unsigned e, const unsigned (&a)[4],
                                                          const unsigned (&b)[4]) {
    multiply_add(c.at[0][e], c.at[0][e+1], c.at[1][e], c.at[1][e+1], a, b[0], b[1]);
    multiply_add(c.at[0][e+2], c.at[0][e+3], c.at[1][e+2], c.at[1][e+3], a, b[2], b[3]);
}

// s += a b^T on tensor cores: for a warp's 16 rows of a, 16 of b and 16 features at a time
template<class C> static __device__ void add_scores(Scores<C> &s, const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
    const unsigned lane = threadIdx.x % WARP;
    const __nv_bfloat16 *a_row = a + (threadIdx.x / WARP * 16 + lane % 16) * C::LD + lane / 16 * 8;
    const __nv_bfloat16 *b_row = b + (lane / 16 * 8 + lane % 8) * C::LD + lane / 8 % 2 * 8;
    #pragma unroll 2
    for (unsigned c = 0; c < C::WIDTH; c += 16) {
        unsigned rows[4], columns[4];
        load_matrices(rows, a_row + c);
        #pragma unroll
        for (unsigned j = 0; j < C::COLUMNS; j += 16) {
            load_matrices(columns, b_row + j * C::LD + c);
            multiply_onto(s, j / 4, rows, columns);
        }
    }
}

// Two numbers rounded to bf16, the first in the lower half.
static __device__ unsigned two_rounded(const float *x) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(x[0], x[1]);
    unsigned bits;
    memcpy(&bits, &two, sizeof bits);
    return bits;
}

// c += p x on tensor cores: probabilities are the left operand as they lie, rounded
template<class C> static __device__ void add_sums(Sums<C> &c, const Scores<C> &p, const __nv_bfloat16 *x) {
    const unsigned lane = threadIdx.x % WARP;
    const __nv_bfloat16 *x_row = x + lane % 16 * C::LD + lane / 16 * 8;
    #pragma unroll
    for (unsigned k = 0; k < C::COLUMNS; k += 16) {
        const float *upper = p.at[0] + k / 4, *lower = p.at[1] + k / 4;
        const unsigned rows[4] = { two_rounded(upper), two_rounded(lower), two_rounded(upper + 2),
                                   two_rounded(lower + 2) };
        unsigned columns[4];
        #pragma unroll
        for (unsigned j = 0; j < C::WIDTH; j += 16) {
            load_transposed(columns, x_row + k * C::LD + j);
            multiply_onto(c, j / 4, rows, columns);
        }
    }
}

// a b^T over all d features; the tiles hold those of the rows already, unless the head is wider than a tile.
template<class C>
static __device__ Scores<C> scores(typename C::number *a, Rows<typename C::input> a_rows, typename C::number *b,
                                   Rows<typename C::input> b_rows, unsigned d) {
    Scores<C> s = {};
    if (!C::SLABS) add_scores<C>(s, a, b);
    for (unsigned c = 0; C::SLABS && c < d; c += C::WIDTH) {
        __syncthreads();
        load_tile<C, C::ROWS>(a, a_rows, c, d), load_tile<C>(b, b_rows, c, d);
        tiles_are_there();
        add_scores<C>(s, a, b);
    }
    return s;
}

// The slab from c on, once more after `scores` of a head that is wider than a tile, and a barrier.
template<class C>
static __device__ void load_again(typename C::number *tile, Rows<typename C::input> rows, unsigned c, unsigned d) {
    if (!C::SLABS) return;
    load_tile<C>(tile, rows, c, d);
    tiles_are_there();
}

// Rows `from` .. from + n of to [any,stride] get scale c in their first d numbers, of which c has those from c0 on.
template<class C> static __device__ void put_sums(real *to, size_t from, unsigned n, unsigned stride, const Sums<C> &c,
                                                  unsigned c0, unsigned d, float scale) {
    const unsigned first = c0 + c.first_column(), row[2] = { c.row(0), c.row(1) };
    real *at[2] = { to + (from + row[0]) * stride + first, to + (from + row[1]) * stride + first };
    #pragma unroll
    for (unsigned e = 0; e < c.EACH; e++)
        for (unsigned y = 0; y < 2; y++)
            if (row[y] < n && first + c.step(e) < d) at[y][c.step(e)] = scale * c.at[y][e];
}

// What a kernel of attention is given; a pass has no use for some. D [T,n_heads] as in glmtune.c. Scores are multiplied
// by scale, and by UNIT as well, as in unit_scale, where powers are taken.
struct AttentionArrays {
    real *out, *lse, *dq, *scratch;
    const real *lse_given, *D;
    size_t n_prefix_trained;            // rows of the prefix whose gradients are asked for: all or none
    AttentionShape s;
    float scale, unit_scale;
};
template<class In> struct Attention : AttentionArrays { const In *q, *k, *v, *prefix_k, *prefix_v, *dout; };

// A block's share of the work: n rows from `first` on of a sequence, a head and its head of keys, and the slab from c0
// on. `row` is the first one's number among all rows, keys_row that of the sequence's first key; `before` keys of the
// sequence, those of earlier calls included, stand before the first one's own.
struct Place { unsigned sequence, first, row, n, head, kv_head, c0, keys_row, before; };

static __device__ unsigned parts_of(size_t n, unsigned each) { return (unsigned)((n + each - 1) / each); }

template<class C> static __device__ unsigned slabs_of(const AttentionShape &s) {
    return C::SLABS ? parts_of(s.head_dim, C::WIDTH) : 1;
}

// The share of this block in a round, to and fro, so that who had a long one before has a short one now.
static __device__ unsigned share_of(unsigned round) {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Share number `item`, counted over sequences, blocks of rows, heads and slabs; false behind the last. `late`: the last
// rows first, because they see the most keys and what is long should begin early.
template<class C> static __device__ bool find_place(Place *p, const AttentionShape &s, unsigned item, bool late) {
    const unsigned slabs = slabs_of<C>(s), each = slabs * (unsigned)s.n_heads;
    for (unsigned b = 0; b < s.n_sequences; b++) {
        const unsigned rows = (unsigned)(s.starts[b+1] - s.starts[b]), blocks = parts_of(rows, C::ROWS);
        if (item >= blocks * each) {
            item -= blocks * each;
            continue;
        }
        const unsigned first = (late ? blocks - 1 - item / each : item / each) * C::ROWS;
        const unsigned head = item / slabs % (unsigned)s.n_heads, keys_row = (unsigned)s.kv_starts[b];
        *p = { b, first, (unsigned)s.starts[b] + first, (unsigned)least(C::ROWS, rows - first), head,
               head / (unsigned)(s.n_heads / s.n_kv_heads), item % slabs * C::WIDTH, keys_row,
               (unsigned)s.kv_starts[b+1] - keys_row - rows + first };
        return true;
    }
    return false;
}

// How many blocks of keys the queries of a place see: those of the prefix, then those of the sequence.
template<class C> static __device__ unsigned key_blocks(const AttentionShape &s, const Place &p) {
    return parts_of(s.n_prefix, C::COLUMNS) + parts_of(p.before + p.n, C::COLUMNS);
}

// One of them. Query i of the place sees its first reach + i keys, n at most; none where that is negative.
template<class C> struct KeyBlock { Rows<typename C::input> k, v; int reach; };

// How many that is for row y of scores.
template<class C> static __device__ int keys_seen(const KeyBlock<C> &keys, unsigned y) {
    const int reach = keys.reach + (int)Scores<C>::row(y), n = (int)keys.k.n;
    return reach < n ? reach : n;
}

template<class C> static __device__ KeyBlock<C> key_block(const Attention<typename C::input> &a, const Place &p,
                                                          unsigned block) {
    const unsigned d = (unsigned)a.s.head_dim, stride = (unsigned)a.s.n_kv_heads * d;
    const unsigned prefix_blocks = parts_of(a.s.n_prefix, C::COLUMNS);
    if (block < prefix_blocks) {
        const unsigned j = block * C::COLUMNS, n = (unsigned)least(C::COLUMNS, a.s.n_prefix - j);
        const size_t at = (size_t)j * stride + p.kv_head * d;
        return { { a.prefix_k + at, stride, n }, { a.prefix_v + at, stride, n }, (int)C::COLUMNS };
    }
    const unsigned j = (block - prefix_blocks) * C::COLUMNS, n = (unsigned)least(C::COLUMNS, p.before + p.n - j);
    const size_t at = (size_t)(p.keys_row + j) * stride + p.kv_head * d;
    return { { a.k + at, stride, n }, { a.v + at, stride, n }, (int)least(p.before + 1, j + C::COLUMNS) - (int)j };
}

// The sum, or the largest, over the LANES neighbouring threads that have a row; every one of them gets it.
template<class C> static __device__ float sum_of_row(float x) {
    for (unsigned half = C::LANES / 2; half; half /= 2) x += __shfl_xor_sync(ALL_LANES, x, half);
    return x;
}

template<class C> static __device__ float largest_of_row(float x) {
    for (unsigned half = C::LANES / 2; half; half /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, half));
    return x;
}

// Probabilities are powers of 2 in bf16, one instruction each, else of e; scores and lse are multiplied by UNIT for it.
template<class C> constexpr float UNIT = C::IN_BF16 ? 1.44269504f : 1;

template<class C> static __device__ float power(float x) { return C::IN_BF16 ? power_of_2(x) : expf(x); }

// Row y of scores, of which the first `seen` count, becomes powers of scale (score - *top), *top being the largest
// so far, and *sum grows by this thread's own. Gives what sums over an earlier *top are to be scaled by.
template<class C>
static __device__ float to_powers(Scores<C> &s, unsigned y, int seen, float scale, float *top, float *sum) {
    const float before = *top;
    float more = 0;
    for (unsigned e = 0; e < s.EACH; e++) {
        s.at[y][e] = (int)s.column(e) < seen ? s.at[y][e] : -INFINITY;
        *top = fmaxf(*top, s.at[y][e]);
    }
    *top = largest_of_row<C>(*top);
    for (unsigned e = 0; e < s.EACH; e++) more += s.at[y][e] = power<C>(scale * s.at[y][e] - scale * *top);
    const float kept = power<C>(scale * (before - *top));       // exactly 1 where it stays
    *sum = kept * *sum + more;
    return kept;
}

// out [T,n_heads,d], lse [T,n_heads] as in glmtune.c. Shared: tiles q, k, v. By bytes a block of queries reads q once,
// and once the keys and values that it sees, mostly from the L2 cache; values are on their way while scores are
// computed, the next keys while sums are.
template<class C>
static __global__ void __launch_bounds__(THREADS, C::BLOCKS) attention_forward_kernel(Attention<typename C::input> a) {
    typedef typename C::number number;
    DYNAMIC_SHARED(float, shared);
    number *q = (number *)shared, *k = q + C::OWN, *v = k + C::MET;
    const unsigned d = (unsigned)a.s.head_dim, stride = (unsigned)a.s.n_heads * d;
    Place at;
    for (unsigned round = 0; find_place<C>(&at, a.s, share_of(round), true); round++) {
        const size_t th = (size_t)at.row * a.s.n_heads + at.head;
        const unsigned n = key_blocks<C>(a.s, at);
        const Rows<typename C::input> q_rows = { a.q + th*d, stride, at.n };
        float top[2] = { -INFINITY, -INFINITY }, sum[2] = { 0, 0 };
        Sums<C> out = {};
        load_tile<C, C::ROWS>(q, q_rows, 0, d), load_tile<C>(k, key_block<C>(a, at, 0).k, 0, d);
        for (unsigned block = 0; block < n; block++) {
            const KeyBlock<C> keys = key_block<C>(a, at, block);
            tiles_are_there();
            load_tile<C>(v, keys.v, at.c0, d);
            Scores<C> s = scores<C>(q, q_rows, k, keys.k, d);
            #pragma unroll
            for (unsigned y = 0; y < 2; y++) {
                const float kept = to_powers<C>(s, y, keys_seen(keys, y), a.unit_scale, &top[y], &sum[y]);
                if (kept != 1) for (float &x : out.at[y]) x *= kept;
            }
            tiles_are_there();
            if (block + 1 < n) load_tile<C>(k, key_block<C>(a, at, block + 1).k, 0, d);
            add_sums<C>(out, s, v);
        }
        #pragma unroll
        for (unsigned y = 0; y < 2; y++) {
            sum[y] = sum_of_row<C>(sum[y]);
            const float share = 1 / sum[y];
            for (float &x : out.at[y]) x *= share;
            if (threadIdx.x % C::LANES == 0 && out.row(y) < at.n && at.c0 == 0)
                a.lse[th + out.row(y) * a.s.n_heads] = a.scale * top[y] + logf(sum[y]);
        }
        put_sums<C>(a.out + at.head * d, at.row, at.n, stride, out, at.c0, d, 1);
    }
}

// D [n] = x_i . y_i over d features, a warp each; 8 bytes a feature
static __global__ void row_dots_kernel(float *D, const real *x, const real *y, size_t n, size_t d) {
    const size_t i = (size_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    float sum = 0;
    for (size_t c = threadIdx.x % WARP; i < n && c < d; c += WARP) sum += x[i*d + c] * y[i*d + c];
    for (unsigned half = WARP / 2; half; half /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, half);
    if (i < n && threadIdx.x % WARP == 0) D[i] = sum;
}

// A block of n queries of a head, from query i of sequence b on; th: the first one's row and head.
struct Queries { size_t th; unsigned b, i, n; };

// Their rows of q or of dout.
template<class In> static __device__ Rows<In> rows_of(const In *x, const Queries &queries, const AttentionShape &s) {
    return { x + queries.th * s.head_dim, (unsigned)(s.n_heads * s.head_dim), queries.n };
}

// Loads q [height,LD] of such a block, and lse [height] and D behind it, zeros where there is none.
template<class C, unsigned height = C::COLUMNS>
static __device__ void load_queries(typename C::number *q, float *lse, const Queries &queries,
                                    const Attention<typename C::input> &a) {
    static_assert(height % WARP == 0, "a warp stays together");
    const bool there = threadIdx.x < queries.n;
    const size_t at = queries.th + (there ? threadIdx.x * a.s.n_heads : 0);
    if (threadIdx.x < height) {
        __pipeline_memcpy_async(lse + threadIdx.x, a.lse_given + at, sizeof *lse, there ? 0 : sizeof *lse);
        __pipeline_memcpy_async(lse + height + threadIdx.x, a.D + at, sizeof *lse, there ? 0 : sizeof *lse);
    }
    __pipeline_commit();
    load_tile<C, height>(q, rows_of(a.q, queries, a.s), 0, (unsigned)a.s.head_dim);
}

// dq [T,n_heads,d]. Shared: tiles q, dout, v, and two of k, since it is read last: the next keys are on their way all
// the time, the next values while sums are computed; then lse and D, ROWS each. By bytes a block of queries reads q and
// dout once, and once the keys and values that it sees.
template<class C>
static __global__ void __launch_bounds__(THREADS, C::BLOCKS)
                  attention_backward_queries_kernel(Attention<typename C::input> a) {
    typedef typename C::number number;
    DYNAMIC_SHARED(float, shared);
    number *q = (number *)shared, *dout = q + C::OWN, *v = dout + C::OWN, *k = v + C::MET;
    float *lse = (float *)(k + 2 * C::MET), *D = lse + C::ROWS;
    const unsigned d = (unsigned)a.s.head_dim, stride = (unsigned)a.s.n_heads * d;
    Place at;
    for (unsigned round = 0; find_place<C>(&at, a.s, share_of(round), true); round++) {
        const Queries own = { (size_t)at.row * a.s.n_heads + at.head, at.sequence, at.first, at.n };
        const unsigned n = key_blocks<C>(a.s, at);
        Sums<C> dq = {};
        load_queries<C, C::ROWS>(q, lse, own, a), load_tile<C, C::ROWS>(dout, rows_of(a.dout, own, a.s), 0, d);
        load_tile<C>(k, key_block<C>(a, at, 0).k, 0, d), load_tile<C>(v, key_block<C>(a, at, 0).v, 0, d);
        for (unsigned block = 0; block < n; block++) {
            const KeyBlock<C> keys = key_block<C>(a, at, block);
            number *k_now = k + block % 2 * C::MET, *k_next = k + (block + 1) % 2 * C::MET;
            tiles_are_there();
            if (block + 1 < n) load_tile<C>(k_next, key_block<C>(a, at, block + 1).k, 0, d);
            Scores<C> ds = scores<C>(q, rows_of(a.q, own, a.s), k_now, keys.k, d);
            FOR_EACH_OF(ds, y, e) {
                const float p = power<C>(a.unit_scale * ds.at[y][e] - UNIT<C> * lse[ds.row(y)]);
                ds.at[y][e] = (int)ds.column(e) < keys_seen(keys, y) ? p : 0;
            }
            const Scores<C> dp = scores<C>(dout, rows_of(a.dout, own, a.s), v, keys.v, d);
            FOR_EACH_OF(ds, y, e) ds.at[y][e] *= dp.at[y][e] - D[ds.row(y)];
            __syncthreads();
            if (block + 1 < n) load_tile<C>(v, key_block<C>(a, at, block + 1).v, 0, d);
            load_again<C>(k_now, keys.k, at.c0, d);
            add_sums<C>(dq, ds, k_now);
        }
        __syncthreads();
        put_sums<C>(a.dq + at.head * d, at.row, at.n, stride, dq, at.c0, d, a.scale);
    }
}

// A block of keys of one query head: its rows; where the gradients go, a row of scratch; and who sees them: sequences
// b0 .. b1 from their query i0 on; `causal`: a query sees only the keys up to its own.
template<class C> struct KeyPlace {
    Rows<typename C::input> k, v;
    size_t row;
    unsigned head, c0, first, b0, b1, i0;
    bool causal;
};

// Share number `item`: first the prefix, which all queries see, then the sequences' own keys.
template<class C> static __device__ bool find_key_place(KeyPlace<C> *p, const Attention<typename C::input> &a,
                                                        unsigned item) {
    const AttentionShape &s = a.s;
    const unsigned heads = (unsigned)s.n_heads, slabs = slabs_of<C>(s);
    const unsigned stride = (unsigned)(s.n_kv_heads * s.head_dim);
    const unsigned prefix_items = parts_of(a.n_prefix_trained, C::ROWS) * heads * slabs;
    if (item < prefix_items) {
        const unsigned head = item / slabs % heads, first = item / slabs / heads * C::ROWS;
        const size_t at = (size_t)first*stride + head / (heads / s.n_kv_heads) * s.head_dim;
        const unsigned n = (unsigned)least(C::ROWS, s.n_prefix - first);
        *p = { { a.prefix_k + at, stride, n }, { a.prefix_v + at, stride, n }, s.T + first, head,
               item % slabs * C::WIDTH, first, 0, (unsigned)s.n_sequences, 0, false };
        return true;
    }
    Place own;
    if (!find_place<C>(&own, s, item - prefix_items, false)) return false;
    const size_t at = (size_t)own.row * stride + own.kv_head * s.head_dim;
    *p = { { a.k + at, stride, own.n }, { a.v + at, stride, own.n }, own.row, own.head, own.c0, own.first, own.sequence,
           own.sequence + 1, own.first, true };
    return true;
}

// The first block of queries from query i of sequence b on that see a place's keys; behind the last n is 0.
template<class C>
static __device__ Queries queries_from(const AttentionShape &s, const KeyPlace<C> &p, unsigned b, unsigned i) {
    for (; b < p.b1; b++, i = 0) {
        const unsigned rows = (unsigned)(s.starts[b+1] - s.starts[b]);
        if (i < rows)
            return { (s.starts[b] + i) * s.n_heads + p.head, b, i, (unsigned)least(C::COLUMNS, rows - i) };
    }
    return {};
}

// scratch [2,T + n_prefix,n_heads,d] gets dk and dv of each query head. Scores are transposed: a row of s is a key, a
// column a query. Shared: tiles k, v, dout, two of q, then two of lse and D, COLUMNS each. By bytes a block of keys
// reads k and v once, q and dout of the queries that see it once.
template<class C>
static __global__ void __launch_bounds__(THREADS, C::KEYS_BLOCKS)
                  attention_backward_keys_kernel(Attention<typename C::input> a) {
    typedef typename C::number number;
    DYNAMIC_SHARED(float, shared);
    number *k = (number *)shared, *v = k + C::OWN, *dout = v + C::OWN, *q = dout + C::MET;
    float *lse = (float *)(q + 2 * C::MET);
    const unsigned d = (unsigned)a.s.head_dim, stride = (unsigned)a.s.n_heads * d;
    KeyPlace<C> at;
    for (unsigned round = 0; find_key_place<C>(&at, a, share_of(round)); round++) {
        Queries now = queries_from(a.s, at, at.b0, at.i0), next;
        Sums<C> dk = {}, dv = {};
        load_tile<C, C::ROWS>(k, at.k, 0, d), load_tile<C, C::ROWS>(v, at.v, 0, d);
        if (now.n) load_queries<C>(q, lse, now, a), load_tile<C>(dout, rows_of(a.dout, now, a.s), at.c0, d);
        for (unsigned turn = 0; now.n; turn++, now = next) {
            number *q_now = q + turn % 2 * C::MET, *q_next = q + (turn + 1) % 2 * C::MET;
            const float *lse_now = lse + turn % 2 * 2 * C::COLUMNS, *D_now = lse_now + C::COLUMNS;
            next = queries_from(a.s, at, now.b, now.i + C::COLUMNS);
            tiles_are_there();
            if (next.n) load_queries<C>(q_next, lse + (turn + 1) % 2 * 2 * C::COLUMNS, next, a);
            Scores<C> s = scores<C>(k, at.k, q_now, rows_of(a.q, now, a.s), d);
            FOR_EACH_OF(s, y, e) {
                const float p = power<C>(a.unit_scale * s.at[y][e] - UNIT<C> * lse_now[s.column(e)]);
                s.at[y][e] = !at.causal || at.first + s.row(y) <= now.i + s.column(e) ? p : 0;
            }
            add_sums<C>(dv, s, dout);
            const Scores<C> dp = scores<C>(v, at.v, dout, rows_of(a.dout, now, a.s), d);
            FOR_EACH_OF(s, y, e) s.at[y][e] *= dp.at[y][e] - D_now[s.column(e)];
            __syncthreads();
            if (next.n) load_tile<C>(dout, rows_of(a.dout, next, a.s), at.c0, d);
            load_again<C>(q_now, rows_of(a.q, now, a.s), at.c0, d);
            add_sums<C>(dk, s, q_now);
        }
        tiles_are_there();
        put_sums<C>(a.scratch + at.head * d, at.row, at.k.n, stride, dk, at.c0, d, a.scale);
        put_sums<C>(a.scratch + at.head * d, a.s.T + a.s.n_prefix + at.row, at.v.n, stride, dv, at.c0, d, 1);
    }
}

// dkv [rows,n_kv_heads,d] = the sum of what scratch has of it by heads [any,n_heads,d], those of a group in order; an
// element each
static __global__ void add_heads_kernel(real *dkv, const real *scratch, size_t n, size_t group, size_t d) {
    size_t i = element();
    if (i >= n) return;
    size_t row_and_group = i / d, c = i % d;            // row_and_group x group: the group's first head
    real sum = 0;
    for (size_t h = 0; h < group; h++) sum += scratch[(row_and_group * group + h) * d + c];
    dkv[i] = sum;
}

static void add_heads(real *dkv, const real *scratch, size_t rows, const AttentionShape &s) {
    const size_t n = rows * s.n_kv_heads * s.head_dim;
    if (dkv)
        LAUNCH(add_heads_kernel, blocks_for(n, THREADS), THREADS, 0, dkv, scratch, n, s.n_heads / s.n_kv_heads,
               s.head_dim);
}

// Whether q, k, v and dout are rounded to bf16 once, in the areas, before blocks load them again and again: 6 bytes a
// number for 2 fewer in each load, and threads that need not wait for it. Not for a few queries, nor with keys of
// earlier calls, whose number only the device knows.
static bool rounds_first(const AttentionShape &s, bool own_keys) {
    const size_t rows = s.T * s.n_heads, queries = rows * s.head_dim;
    const size_t keys = (s.T + s.n_prefix) * s.n_kv_heads * s.head_dim;
    return gpu.bf16 && own_keys && s.T >= 64 && s.head_dim % 8 == 0 &&
           (queries + 2 * keys) * sizeof(__nv_bfloat16) <= AREA_BYTES &&
           queries * sizeof(__nv_bfloat16) + (rows + 3) * sizeof(float) <= AREA_BYTES;
}

// Rounds x [n], or nothing from NULL, to *at, which moves behind it.
static const __nv_bfloat16 *round_to(__nv_bfloat16 **at, const real *x, size_t n) {
    const __nv_bfloat16 *here = *at;
    if (!x) return NULL;
    convert(*at, BF16, x, F32, n);
    *at += n;
    return here;
}

// The same with rounded inputs: D and dout in the second area, all others in the first.
static Attention<__nv_bfloat16> rounded(const Attention<real> &a) {
    const AttentionShape &s = a.s;
    const size_t width = s.n_kv_heads * s.head_dim, rows = s.T * s.n_heads;
    __nv_bfloat16 *at = (__nv_bfloat16 *)gpu.area[0];
    __nv_bfloat16 *behind_D = (__nv_bfloat16 *)((float *)gpu.area[1] + (rows + 3) / 4 * 4);
    Attention<__nv_bfloat16> b = { a, round_to(&at, a.q, rows * s.head_dim), round_to(&at, a.k, s.T * width),
                                   round_to(&at, a.v, s.T * width), round_to(&at, a.prefix_k, s.n_prefix * width),
                                   round_to(&at, a.prefix_v, s.n_prefix * width),
                                   round_to(&behind_D, a.dout, rows * s.head_dim) };
    return b;
}

template<class C> static void launch_attention(Attention<typename C::input> a) {
    const unsigned most = 2 * gpu.cores, floats = 2 * sizeof(float);
    const unsigned own = C::OWN * sizeof(typename C::number), met = C::MET * sizeof(typename C::number);
    a.scale = 1 / sqrtf((float)a.s.head_dim), a.unit_scale = UNIT<C> * a.scale;
    if (!a.dout) {
        LAUNCH(attention_forward_kernel<C>, most, THREADS, own + 2*met, a);
        return;
    }
    LAUNCH(attention_backward_queries_kernel<C>, most, THREADS, 2*own + 3*met + C::ROWS * floats, a);
    LAUNCH(attention_backward_keys_kernel<C>, most, THREADS, 2*own + 3*met + 2*C::COLUMNS * floats, a);
}

template<class N, class In> static void launch_by_width(const Attention<In> &a) {
    a.s.head_dim <= 64 ? launch_attention<Tiles<N, In, 64, false>>(a) : launch_attention<Tiles<N, In, 128, false>>(a);
}

static void run_attention(const Attention<real> &a, bool own_keys) {
    const bool slabs = a.s.head_dim > 128;
    if (slabs && gpu.bf16) launch_attention<Tiles<__nv_bfloat16, real, 128, true>>(a);
    else if (slabs) launch_attention<Tiles<real, real, 128, true>>(a);
    else if (rounds_first(a.s, own_keys)) launch_by_width<__nv_bfloat16, __nv_bfloat16>(rounded(a));
    else if (gpu.bf16) launch_by_width<__nv_bfloat16, float>(a);
    else launch_by_width<float, float>(a);
}

void attention_forward(real *out, real *lse, const real *q, const real *k, const real *v, const real *prefix_k,
                       const real *prefix_v, AttentionShape s) {
    run_attention({ { out, lse, NULL, NULL, NULL, NULL, 0, s, 0, 0 }, q, k, v, prefix_k, prefix_v, NULL },
                  s.starts == s.kv_starts);
}

void attention_backward(real *dq, real *dk, real *dv, real *dprefix_k, real *dprefix_v, real *scratch,
                        const real *dout, const real *out, const real *lse, const real *q, const real *k, const real *v,
                        const real *prefix_k, const real *prefix_v, AttentionShape s) {
    const size_t rows = s.T * s.n_heads, row = s.n_heads * s.head_dim;
    float *D = (float *)gpu.area[1];
    if (rows > AREA_BYTES / sizeof *D) kernel_failed("attention of so many tokens does not fit the workspace");
    LAUNCH(row_dots_kernel, blocks_for(rows, THREADS / WARP), THREADS, 0, D, dout, out, rows, s.head_dim);
    const size_t n_trained = dprefix_k || dprefix_v ? s.n_prefix : 0;
    run_attention({ { NULL, NULL, dq, scratch, lse, D, n_trained, s, 0, 0 }, q, k, v, prefix_k, prefix_v, dout }, true);
    const real *dk_heads = scratch, *dv_heads = scratch + (s.T + s.n_prefix) * row;
    add_heads(dk, dk_heads, s.T, s), add_heads(dprefix_k, dk_heads + s.T * row, s.n_prefix, s);
    add_heads(dv, dv_heads, s.T, s), add_heads(dprefix_v, dv_heads + s.T * row, s.n_prefix, s);
}

// ---- 2.8 SwiGLU --------------------------------------------------------------------------------------------------

// h [T,F], gate_up [T,2F]; a part of a row each
static __global__ void swiglu_forward_kernel(real *h, const real *gate_up, size_t F) {
    Part p = part_of_row(F);
    const real *g = gate_up + p.row*2*F, *u = g + F;
    for (size_t i = p.first; i < p.end; i += THREADS) h[p.row*F + i] = g[i] / (1 + expf(-g[i])) * u[i];
}

void swiglu_forward(real *h, const real *gate_up, size_t T, size_t F) {
    LAUNCH(swiglu_forward_kernel, parts_of_rows(T, F), THREADS, 0, h, gate_up, F);
}

// dgate_up [T,2F], dh [T,F]; a part of a row each
static __global__ void swiglu_backward_kernel(real *dgate_up, const real *dh, const real *gate_up, size_t F) {
    Part p = part_of_row(F);
    const real *g = gate_up + p.row*2*F, *u = g + F, *dh_t = dh + p.row*F;
    real *dg = dgate_up + p.row*2*F, *du = dg + F;
    for (size_t i = p.first; i < p.end; i += THREADS) {
        real z = 1 / (1 + expf(-g[i]));
        dg[i] = dh_t[i] * u[i] * z * (1 + g[i] * (1 - z));
        du[i] = dh_t[i] * g[i] * z;
    }
}

void swiglu_backward(real *dgate_up, const real *dh, const real *gate_up, size_t T, size_t F) {
    LAUNCH(swiglu_backward_kernel, parts_of_rows(T, F), THREADS, 0, dgate_up, dh, gate_up, F);
}

// ---- 2.9 What tuning methods are made of -------------------------------------------------------------------------

static __device__ real value_of(Activation f, real x) {
    if (f == RELU) return x < 0 ? 0 : x;
    return f == TANH ? tanhf(x) : x / (1 + expf(-x));
}

static __device__ real slope_of(Activation f, real x) {
    if (f == RELU) return x > 0;
    real y = tanhf(x), z = 1 / (1 + expf(-x)), rest = 1 / (1 + expf(x));
    return f == TANH ? 1 - y*y : z * (1 + x * rest);
}

// y [n] = f(x), y may be x; an element each
static __global__ void activation_forward_kernel(real *y, const real *x, Activation f, size_t n) {
    size_t i = element();
    if (i < n) y[i] = value_of(f, x[i]);
}

void activation_forward(real *y, const real *x, Activation f, size_t n) {
    LAUNCH(activation_forward_kernel, blocks_for(n, THREADS), THREADS, 0, y, x, f, n);
}

// dx [n] = dy f'(x), an element each
static __global__ void activation_backward_kernel(real *dx, const real *dy, const real *x, Activation f, size_t n) {
    size_t i = element();
    if (i < n) dx[i] = dy[i] * slope_of(f, x[i]);
}

void activation_backward(real *dx, const real *dy, const real *x, Activation f, size_t n) {
    LAUNCH(activation_backward_kernel, blocks_for(n, THREADS), THREADS, 0, dx, dy, x, f, n);
}

// y [T,n] = x gain, y may be x; a part of a row each
static __global__ void gain_forward_kernel(real *y, const real *x, const real *gain, size_t n) {
    Part p = part_of_row(n);
    for (size_t i = p.first; i < p.end; i += THREADS) y[p.row*n + i] = x[p.row*n + i] * gain[i];
}

void gain_forward(real *y, const real *x, const real *gain, size_t T, size_t n) {
    LAUNCH(gain_forward_kernel, parts_of_rows(T, n), THREADS, 0, y, x, gain, n);
}

void gain_backward(real *dgain, const real *dy, const real *x, size_t T, size_t n) {
    add_columns(dgain, dy, x, NULL, T, n);
}

// ---- 2.10 Dropout ------------------------------------------------------------------------------------------------

// y [T,n] = x with some of it dropped, or, with `onto`, += ; token_keys [T]; a part of a row each
static __global__ void dropout_kernel(real *y, const real *x, const uint64_t *token_keys, uint64_t site, real p,
                                      size_t n, bool onto) {
    Part part = part_of_row(n);
    const uint64_t key = rng_key(token_keys[part.row], site);
    const real scale = 1 / (1 - p);
    for (size_t i = part.first; i < part.end; i += THREADS) {
        const size_t at = part.row*n + i;
        y[at] = (onto ? y[at] : 0) + (rng_uniform(key, i) >= p ? scale * x[at] : 0);
    }
}

void dropout_forward(real *y, const real *x, const uint64_t *token_keys, uint64_t site, real p, size_t T, size_t n) {
    LAUNCH(dropout_kernel, parts_of_rows(T, n), THREADS, 0, y, x, token_keys, site, p, n, false);
}

void dropout_backward(real *dx, const real *dy, const uint64_t *token_keys, uint64_t site, real p, size_t T, size_t n) {
    LAUNCH(dropout_kernel, parts_of_rows(T, n), THREADS, 0, dx, dy, token_keys, site, p, n, true);
}

// ---- 2.11 Cross-entropy ------------------------------------------------------------------------------------------

// loss [R], logits [R,V], targets [R]; a row each, by 1024 threads, because rows are long and few, and a row's numbers
// stay in the cache between the three times they are read
static __global__ void __launch_bounds__(1024) cross_entropy_kernel(real *loss, real *logits, const int32_t *targets,
                                                                    real smoothing, real scale, size_t V) {
    real *z = logits + blockIdx.x * V;
    const size_t target = (size_t)targets[blockIdx.x];
    const real at_target = z[target];
    float largest = -INFINITY;
    double total = 0, sum = 0;
    for (size_t v = threadIdx.x; v < V; v += blockDim.x) {
        largest = z[v] > largest ? z[v] : largest;
        if (smoothing > 0) total += (double)z[v];
    }
    largest = largest_of_block(largest);        // behind its barriers all have read at_target, which is overwritten
    total = sum_of_block(total);
    for (size_t v = threadIdx.x; v < V; v += blockDim.x) {
        z[v] = expf(z[v] - largest);
        sum += (double)z[v];
    }
    sum = sum_of_block(sum);
    double lse = (double)largest + log(sum), mean = total / (double)V, e = (double)smoothing;
    if (threadIdx.x == 0)
        loss[blockIdx.x] = (real)((1 - e) * (lse - (double)at_target) + (e > 0 ? e * (lse - mean) : 0));
    real factor = scale / (real)sum, spread = scale * smoothing / (real)V;
    for (size_t v = threadIdx.x; v < V; v += blockDim.x)
        z[v] = z[v] * factor - spread - (v == target ? scale * (1 - smoothing) : 0);
}

void cross_entropy(real *loss, real *logits, const int32_t *targets, real smoothing, real scale, size_t R, size_t V) {
    LAUNCH(cross_entropy_kernel, (unsigned)R, 1024, 0, loss, logits, targets, smoothing, scale, V);
}

// ---- 2.12 Optimizer steps ----------------------------------------------------------------------------------------
// An element each; the double scalars become the same floats as on the CPU, before the launch.

static __global__ void adamw_kernel(real *w, const real *grad, real *m, real *v, real step, real root, real keep,
                                    real tiny, real new1, real old2, real new2, size_t n) {
    size_t i = element();
    if (i >= n) return;
    m[i] += new1 * (grad[i] - m[i]);
    v[i] = old2 * v[i] + new2 * grad[i] * grad[i];
    w[i] = keep * w[i] - step * m[i] / (sqrtf(v[i]) / root + tiny);
}

void adamw_step(real *w, const real *grad, real *m, real *v, double lr, double keep, double beta1, double beta2,
                double eps, double correction1, double correction2, size_t n) {
    real step = (real)(lr / correction1), root = (real)sqrt(correction2), rest = (real)keep, tiny = (real)eps;
    real new1 = (real)(1 - beta1), old2 = (real)beta2, new2 = (real)(1 - beta2);
    LAUNCH(adamw_kernel, blocks_for(n, THREADS), THREADS, 0, w, grad, m, v, step, root, rest, tiny, new1, old2, new2,
           n);
}

static __global__ void sgd_kernel(real *w, const real *grad, real *buffer, real step, real pull, real old, size_t n) {
    size_t i = element();
    if (i >= n) return;
    buffer[i] = old * buffer[i] + (grad[i] + pull * w[i]);
    w[i] -= step * buffer[i];
}

void sgd_step(real *w, const real *grad, real *buffer, double lr, double weight_decay, double momentum, size_t n) {
    LAUNCH(sgd_kernel, blocks_for(n, THREADS), THREADS, 0, w, grad, buffer, (real)lr, (real)weight_decay,
           (real)momentum, n);
}

static __global__ void lion_kernel(real *w, const real *grad, real *m, real step, real keep, real old1, real new1,
                                   real old2, real new2, size_t n) {
    size_t i = element();
    if (i >= n) return;
    real direction = old1 * m[i] + new1 * grad[i];
    w[i] = keep * w[i] - (direction > 0 ? step : direction < 0 ? -step : 0);
    m[i] = old2 * m[i] + new2 * grad[i];
}

void lion_step(real *w, const real *grad, real *m, double lr, double keep, double beta1, double beta2, size_t n) {
    LAUNCH(lion_kernel, blocks_for(n, THREADS), THREADS, 0, w, grad, m, (real)lr, (real)keep, (real)beta1,
           (real)(1 - beta1), (real)beta2, (real)(1 - beta2), n);
}

static __global__ void scale_by_kernel(real *x, real factor, size_t n) {
    size_t i = element();
    if (i < n) x[i] *= factor;
}

void scale_by(real *x, real factor, size_t n) {
    LAUNCH(scale_by_kernel, blocks_for(n, THREADS), THREADS, 0, x, factor, n);
}

// partial [PARTS] += : block b adds up the squares of every PARTS-th run of THREADS numbers, in double
static __global__ void squares_kernel(double *partial, const real *x, size_t n) {
    double sum = 0;
    for (size_t i = element(); i < n; i += (size_t)PARTS * THREADS) sum += (double)x[i] * (double)x[i];
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] += sum;
}

// How many of PARTS blocks have one of n things to read.
static unsigned parts_for(size_t n) { return (unsigned)least(PARTS, blocks_for(n, THREADS)); }

// Copies the partial results of so many blocks out, which waits for them.
static void get_partial(double *host, unsigned parts) {
    memory_copy_out(host, gpu.partial, parts * sizeof *host);
}

static double sum_of_parts(unsigned parts) {
    double part[PARTS] = {}, sum = 0;
    get_partial(part, parts);
    for (unsigned i = 0; i < parts; i++) sum += part[i];
    return sum;
}

// The arrays one after another onto the same partial sums, which are copied out once.
double sum_of_squares(const real *const *x, const size_t *n, size_t count) {
    begin();
    check(cudaMemsetAsync(gpu.partial, 0, PARTS * sizeof *gpu.partial), "cudaMemsetAsync of partial sums");
    for (size_t i = 0; i < count; i++)
        LAUNCH(squares_kernel, parts_for(n[i]), THREADS, 0, gpu.partial, x[i], n[i]);
    return sum_of_parts(PARTS);
}

// partial [PARTS]: the place of the first bad number that each block has met, n where none; exact in double
static __global__ void not_finite_kernel(double *partial, const real *x, size_t n) {
    __shared__ size_t first[THREADS];
    size_t i = element();
    while (i < n && fabsf(x[i]) < INFINITY) i += (size_t)PARTS * THREADS;
    first[threadIdx.x] = least(i, n);
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned t = 1; t < THREADS; t++) i = least(i, first[t]);
    partial[blockIdx.x] = (double)least(i, n);
}

size_t first_not_finite(const real *x, size_t n) {
    double part[PARTS];
    size_t first = n;
    begin();
    LAUNCH(not_finite_kernel, parts_for(n), THREADS, 0, gpu.partial, x, n);
    get_partial(part, parts_for(n));
    for (unsigned i = 0; i < parts_for(n); i++) first = least(first, (size_t)part[i]);
    return first;
}
