// bench_tokenizers: the speed of encode() on a file, for tests/bench_tokenizers.py.
//
//     bench_tokenizers TOKENIZER FILE ...      prints for each file: bytes, ids, seconds of processor time (the best of three)
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"

int main(int argc, char **argv) {
    if (argc < 3) fail_usage("bench_tokenizers TOKENIZER FILE ...");
    for (int a = 2; a < argc; a++) {
        size_t n;
        char *text = read_file(argv[a], &n);
        Ids ids = {0};
        double best = INFINITY;
        for (int run = 0; run < 3; run++) {
            Tokenizer *t = load_tokenizer_file(argv[1]);        // anew: nothing is remembered from the run before
            clock_t began = clock();
            ids.n = 0;
            encode(t, text, n, &ids);
            best = fmin(best, (double)(clock() - began) / CLOCKS_PER_SEC);
        }
        printf("%zu %zu %.6f\n", n, ids.n, best);
        free(text), free(ids.ids);
    }
    return 0;
}
