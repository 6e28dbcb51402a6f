// Tests of the emulator itself: that kernels compute what they should, and that what it is there to catch is caught.
#include <cuda_runtime.h>
#include <sys/wait.h>

static size_t passed, failed;

static void check(const char *what, bool good) {
    (good ? passed : failed)++;
    if (!good) printf("FAILED %s\n", what);
    fflush(stdout);
}

// Runs `action` in a child, which must end saying `message`; with no message, end well.
template <class F>
static void check_ends(const char *what, const char *message, F action, const char *order = "forward") {
    int ends[2], status = 0;
    char said[2000] = "";
    size_t n = 0;
    if (pipe(ends)) abort();
    pid_t child = fork();
    if (!child) {
        dup2(ends[1], 2);
        setenv("CUDA_ORDER", order, 1);
        action();
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; (got = read(ends[0], said + n, sizeof said - 1 - n)) > 0; ) n += (size_t)got;
    close(ends[0]);
    waitpid(child, &status, 0);
    bool good = message ? !WIFEXITED(status) && strstr(said, message) : WIFEXITED(status) && !WEXITSTATUS(status);
    check(what, good);
    if (!good) printf("       status %d: %s\n", status, said);
}

template <class T> static T *device(size_t n) {
    T *p;
    return cudaMalloc(&p, n * sizeof *p) ? nullptr : p;
}

template <class T> static std::vector<T> host(const T *p, size_t n) {
    std::vector<T> x(n);
    cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
    return x;
}

// ---- Kernels, right and wrong ------------------------------------------------------------------------------------

// out[block] = sum of 256 numbers that are their own index: shuffles within warps, shared memory between them
__global__ static void sum_kernel(float *out, const float *in) {
    __shared__ float part[8];
    float x = in[blockIdx.x * 256 + threadIdx.x];
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 8; i++) x += part[i];
    out[blockIdx.x] = x;
}

__global__ static void count_kernel(float *out) { out[blockIdx.x * blockDim.x + threadIdx.x] = (float)threadIdx.x; }

template <int N> __global__ static void reverse_kernel(float *x, bool careful) {    // without the barrier, a race
    DYNAMIC_SHARED(float, kept);
    kept[threadIdx.x] = x[threadIdx.x];
    if (careful) __syncthreads();
    x[threadIdx.x] = kept[N - 1 - threadIdx.x];
}

template <int N> __global__ static void unwritten_kernel(float *x, int fills) {     // reads more than it wrote
    __shared__ float part[N];
    if (threadIdx.x < (unsigned)fills) part[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = part[threadIdx.x];
}

__global__ static void order_kernel(int *last) { *last = (int)(blockIdx.x * blockDim.x + threadIdx.x); }
__global__ static void write_kernel(float *x, long at) { x[at] = 1; }
__global__ static void missing_kernel(float *x) { if (threadIdx.x != 40) __syncthreads(); x[threadIdx.x] = 0; }
__global__ static void divided_kernel(float *x) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
    x[threadIdx.x] = 0;
}
__global__ static void lonely_kernel(float *x) {
    if (threadIdx.x % 32) x[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

// c [16,8] = 1 + a b, a [16,16], b [16,8], by one warp; operands go by way of shared memory, or, `far`, a does not
__global__ static void tile_kernel(float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b, unsigned shift, bool far) {
    DYNAMIC_SHARED(__nv_bfloat16, kept);
    unsigned i = threadIdx.x, left[4], right[4];
    float sum[4] = { 1, 1, 1, 1 };
    for (unsigned j = i; j < 256; j += 32) kept[j] = a[j];
    for (unsigned j = i; j < 128; j += 32) kept[256 + j] = b[j];
    __syncwarp();
    load_matrices(left, (far ? a : kept) + i % 16 * 16 + i / 16 * 8 + shift);
    load_transposed(right, kept + 256 + i % 16 * 8);        // lanes 16 and on name both matrices again
    multiply_add(sum[0], sum[1], sum[2], sum[3], left, right[0], right[1]);
    for (unsigned j = 0; j < 4; j++) c[(i / 4 + j / 2 * 8) * 8 + i % 4 * 2 + j % 2] = sum[j];
}

__global__ static void copy_kernel(float *out, const float *in, bool commits, bool waits) {
    __shared__ float4 part4[32];
    float *part = (float *)part4;
    unsigned i = threadIdx.x;
    __pipeline_memcpy_async(part + 4*i, in + 4*i, 16, i == 31 ? 16 : 0);        // the last gets zeros
    if (commits) __pipeline_commit();
    float early = part[4*i];
    if (waits) __pipeline_wait_prior(0);
    out[i] = part[4*i + 1], out[32 + i] = early;
}

// ---- What they give ----------------------------------------------------------------------------------------------

static void test_sum() {
    enum { BLOCKS = 5 };
    float *in = device<float>(BLOCKS * 256), *out = device<float>(BLOCKS);
    LAUNCH(count_kernel, BLOCKS, 256, 0, in);
    LAUNCH(sum_kernel, BLOCKS, 256, 0, out, in);
    for (float x : host(out, BLOCKS)) check("a sum over a block", x == 255 * 128);
    cudaFree(in), cudaFree(out);
}

static void test_tile() {
    __nv_bfloat16 a[256], b[128], *da = device<__nv_bfloat16>(256), *db = device<__nv_bfloat16>(128);
    float *dc = device<float>(128);
    for (int i = 0; i < 256; i++) a[i] = __float2bfloat16_rn((float)(i % 13) - 6);
    for (int i = 0; i < 128; i++) b[i] = __float2bfloat16_rn((float)(i % 7) / 4);
    cudaMemcpy(da, a, sizeof a, cudaMemcpyHostToDevice);
    cudaMemcpy(db, b, sizeof b, cudaMemcpyHostToDevice);
    LAUNCH(tile_kernel, 1, 32, 768, dc, da, db, 0u, false);
    std::vector<float> c = host(dc, 128);
    size_t wrong = 0;
    for (int i = 0; i < 128; i++) {
        float sum = 1;
        for (int k = 0; k < 16; k++) sum += __bfloat162float(a[i / 8 * 16 + k]) * __bfloat162float(b[k * 8 + i % 8]);
        wrong += c[(size_t)i] != sum;
    }
    check("a product of tiles", wrong == 0);
    check_ends("a row of a matrix that is not aligned", "not aligned", [=] {
        LAUNCH(tile_kernel, 1, 32, 768, dc, da, db, 1u, false); });
    check_ends("a row of a matrix that is not in shared memory", "not in shared", [=] {
        LAUNCH(tile_kernel, 1, 32, 768, dc, da, db, 0u, true); });
}

// Every pattern survives the way to float and back; a middle goes to the even neighbour.
static void test_halves() {
    size_t wrong = 0;
    for (unsigned i = 0; i < 65536; i++) {
        __half h = { (uint16_t)i };
        __nv_bfloat16 b = { (uint16_t)i };
        float f = __half2float(h), g = __bfloat162float(b);
        wrong += f == f && __float2half_rn(f).bits != i;
        wrong += g == g && __float2bfloat16_rn(g).bits != i;
    }
    check("two bytes to float and back", wrong == 0);
    check("half: ties to even", __float2half_rn(1 + 0x1p-11f).bits == 0x3C00 &&
                                __float2half_rn(1 + 0x3p-11f).bits == 0x3C02);
    check("half: overflow", __float2half_rn(65519).bits == 0x7BFF && __float2half_rn(65520).bits == 0x7C00);
    check("bfloat16: ties to even", __float2bfloat16_rn(1 + 0x1p-8f).bits == 0x3F80 &&
                                    __float2bfloat16_rn(1 + 0x3p-8f).bits == 0x3F82);
}

static bool reversed(bool careful) {
    float *x = device<float>(64);
    LAUNCH(count_kernel, 1, 64, 0, x);
    LAUNCH(reverse_kernel<64>, 1, 64, 64 * sizeof(float), x, careful);
    std::vector<float> y = host(x, 64);
    for (size_t i = 0; i < 64; i++) if (y[i] != (float)(63 - i)) return false;
    return true;
}

static void test_orders() {
    for (const char *order : { "forward", "reverse", "shuffle" }) {
        check_ends("a kernel with its barrier", nullptr, [] { if (!reversed(true)) abort(); }, order);
        check_ends("a race is seen", "a race", [] { if (!reversed(false)) emulator::stop("a race"); }, order);
    }
    for (const char *order : { "forward", "reverse" })
        check_ends("blocks and threads run in the order asked for", nullptr, [=] {
            int *last = device<int>(1);
            LAUNCH(order_kernel, 3, 70, 0, last);
            if (host(last, 1)[0] != (*order == 'f' ? 209 : 0)) abort();
        }, order);
}

static void test_memory() {
    float *x = device<float>(64), *given = device<float>(64);
    cudaMemsetAsync(given, 0, 256);
    check("memory holds NaN at first", std::isnan(host(x, 64)[63]) && host(given, 64)[0] == 0);
    check("too much memory is not to be had", device<char>((size_t)1 << 60) == nullptr);
    LAUNCH(unwritten_kernel<64>, 1, 64, 0, x, 64);
    LAUNCH(unwritten_kernel<64>, 1, 64, 0, x, 63);
    check("shared memory holds NaN at first", host(x, 64)[62] == 1 && std::isnan(host(x, 64)[63]));
    cudaFree(given);
    check_ends("the host reads the device", "the host touches", [=] { if (x[0] == 0) abort(); });
    check_ends("a kernel gets a pointer of the host", "pointer of the host", [] {
        float y;
        LAUNCH(count_kernel, 1, 1, 0, &y);
    });
    check_ends("a write far behind the end", "access 256 bytes", [=] { LAUNCH(write_kernel, 1, 1, 0, x, 64l); });
    check_ends("a write far before the beginning", "from the start", [=] { LAUNCH(write_kernel, 1, 1, 0, x, -1024l); });
    check_ends("a write just behind the end", "past its ends", [] {
        float *y = device<float>(3);
        LAUNCH(write_kernel, 1, 1, 0, y, 3l);
        cudaFree(y);
    });
    check_ends("memory that was freed", "pointer of the host", [=] { LAUNCH(write_kernel, 1, 1, 0, given, 0l); });
    check_ends("a copy the wrong way", "wrong side", [=] { float y; cudaMemcpy(&y, x, 4, cudaMemcpyHostToDevice); });
}

static void test_copies() {
    float *in = device<float>(256), *out = device<float>(64);
    LAUNCH(count_kernel, 1, 256, 0, in);
    LAUNCH(copy_kernel, 1, 32, 0, out, in, true, true);
    std::vector<float> got = host(out, 64);
    check("an asynchronous copy, and zeros", got[0] == 1 && got[30] == 121 && got[31] == 0);
    check("it is not there before it is waited for", std::isnan(got[32]) && std::isnan(got[63]));
    check_ends("a copy that is not aligned", "not aligned", [=] {
        LAUNCH(copy_kernel, 1, 32, 0, out, in + 1, true, true); });
    check_ends("a copy that nobody waits for", "before its asynchronous", [=] {
        LAUNCH(copy_kernel, 1, 32, 0, out, in, true, false); });
    check_ends("a copy that nobody commits", "before its asynchronous", [=] {
        LAUNCH(copy_kernel, 1, 32, 0, out, in, false, true); });
}

static void test_barriers() {
    float *x = device<float>(64);
    check_ends("a thread that misses a barrier", "has ended while", [=] { LAUNCH(missing_kernel, 1, 64, 0, x); });
    check_ends("two barriers at once", "different barriers", [=] { LAUNCH(divided_kernel, 1, 64, 0, x); });
    check_ends("a lane that misses a shuffle", "has ended", [=] { LAUNCH(lonely_kernel, 1, 64, 0, x); });
}

// D = 2 op(A) op(B) + D for all transpositions, column-major with room between the columns.
static void test_product(bool ta, bool tb) {
    enum { M = 3, N = 4, K = 5, LD = 7 };
    float a[LD * LD], b[LD * LD], d[LD * LD], alpha = 2, beta = 1;
    float *da = device<float>(LD * LD), *db = device<float>(LD * LD), *dd = device<float>(LD * LD);
    for (int i = 0; i < LD * LD; i++) a[i] = (float)(i % 11), b[i] = (float)(i % 5) - 2, d[i] = (float)i;
    cudaMemcpy(da, a, sizeof a, cudaMemcpyHostToDevice), cudaMemcpy(db, b, sizeof b, cudaMemcpyHostToDevice);
    cudaMemcpy(dd, d, sizeof d, cudaMemcpyHostToDevice);
    cublasLtHandle_t lt;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, lc;
    int32_t op[2] = { ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N };
    cublasLtCreate(&lt);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op[0], sizeof op[0]);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &op[1], sizeof op[1]);
    cublasLtMatrixLayoutCreate(&la, CUDA_R_32F, ta ? K : M, ta ? M : K, LD);
    cublasLtMatrixLayoutCreate(&lb, CUDA_R_32F, tb ? N : K, tb ? K : N, LD);
    cublasLtMatrixLayoutCreate(&lc, CUDA_R_32F, M, N, LD);
    check("cublasLtMatmul takes it", !cublasLtMatmul(lt, desc, &alpha, da, la, db, lb, &beta, dd, lc, dd, lc, nullptr,
                                                     nullptr, 0, nullptr));
    std::vector<float> got = host(dd, LD * LD);
    size_t wrong = 0;
    for (int j = 0; j < LD; j++)
        for (int i = 0; i < LD; i++) {
            float want = d[i + j * LD];
            for (int k = 0; k < K && i < M && j < N; k++)
                want += 2 * a[ta ? k + i * LD : i + k * LD] * b[tb ? j + k * LD : k + j * LD];
            wrong += got[(size_t)(i + j * LD)] != want;
        }
    check("a product of cublasLtMatmul", wrong == 0);
}

__global__ static void half_kernel(float *x, const float *y) {
    size_t i = blockIdx.x * 256 + threadIdx.x;
    x[i] = y[i] + (i < 4096 ? x[i + 4096] : 0);
}

// Writes 8 pages, of which it reads 4, and reads 8 others; the program itself, called anew, counts.
static void test_count(const char *program) {
    char command[300], line[300];
    bool found = false;
    snprintf(command, sizeof command, "CUDA_COUNT=yes %s count 2>&1", program);
    FILE *f = popen(command, "r");
    while (f && fgets(line, sizeof line, f))
        found |= !strcmp(line, "count        2 launches      0.094 MiB read      0.062 MiB written      "
                               "0.000 MiB copied  half_kernel\n");
    check("what is counted", found && pclose(f) == 0);
}

static void run_counted() {
    float *x = device<float>(8192), *y = device<float>(8192);
    cudaMemsetAsync(x, 0, 8192 * sizeof *x), cudaMemsetAsync(y, 0, 8192 * sizeof *y);
    for (int i = 0; i < 2; i++) LAUNCH(half_kernel, 32, 256, 0, x, y);
}

int main(int argc, char **argv) {
    if (argc > 1) return run_counted(), 0;
    test_sum(), test_tile(), test_halves(), test_orders(), test_memory(), test_copies(), test_barriers();
    for (int i = 0; i < 4; i++) test_product(i & 1, i & 2);
    test_count(argv[0]);
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed ? 1 : 0;
}
