// bench: the kernels over tables of shapes, as shares of this machine's own peak. `glmtune bench` measures a whole
// training step and decoding; tests/bench_torch.py compares that step with PyTorch.
//     bench [THREADS]
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"

int main(int argc, char **argv) {
    // the maps of GLM-4-9B [n_out,n_in], fused as in the remote layout: q, k and v; o; gate and up; down
    static const size_t maps[][2] = { { 4608, 4096 }, { 4096, 4096 }, { 27392, 4096 }, { 4096, 13696 } };
    static const size_t rows[] = { 1, 16, 64, 128, 512, 1024 };
    static const size_t tokens[] = { 256, 512, 2048 };
    use_threads(argc > 1 ? atoll(argv[1]) : 0);
    double peak = begin_bench();
    for (size_t i = 0; i < COUNT(maps); i++) {
        void *w = random_bf16(maps[i][0] * maps[i][1], i, 0.02);
        for (size_t k = 0; k < COUNT(rows); k++) bench_products(w, rows[k], maps[i][1], maps[i][0], peak);
        memory_give(w);
    }
    for (size_t k = 0; k < COUNT(tokens); k++) bench_attention(tokens[k], 32, 2, 128, peak);
    return end_bench(peak);
}
