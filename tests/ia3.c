// glmtune with the method of README's "Add your own method", as cli_ia3.sh puts it together, and one word more:
//
//     ia3 golden DUMP GOLDEN      what `dump` wrote beside golden numbers: PEFT's in float (hf.*), and those of a plain
//                                 model in double (f64.*)
//
// In double. GLMTUNE is the file to include; the tolerances are those of the methods that glmtune.c has.
#define main glmtune_main
#include GLMTUNE
#undef main
#include "check.h"

static const struct { const char *prefix; double logits, loss, gradient; } truths[] = {
    { "hf.", 5e-6, 1e-6, 1e-5 }, { "f64.", 1e-11, 1e-11, 1e-11 } };

static double *numbers(const StoredTensor *s) {
    double *out = alloc(s->n, sizeof *out);
    widen(out, s->data, s->dtype, s->n);
    return out;
}

static void check_dump(const TensorSet *dump, const TensorSet *golden, size_t k) {
    size_t n_gradients = 0, n_dumped = 0, prefix = strlen(truths[k].prefix);
    for (size_t i = 0; i < dump->n; i++) n_dumped += !strncmp(dump->tensors[i].name, "grad.", 5);
    for (size_t i = 0; i < golden->n; i++) {
        const StoredTensor *want = &golden->tensors[i];
        if (strncmp(want->name, truths[k].prefix, prefix)) continue;
        const StoredTensor *got = find_tensor(dump, want->name + prefix);
        bool gradient = !strncmp(want->name + prefix, "grad.", 5), loss = !strcmp(want->name + prefix, "loss");
        if (!check_true(label("%s is there, as large", want->name), got && got->n == want->n)) continue;
        check_arrays(want->name, numbers(got), sizeof(double), numbers(want), want->n, gradient, TINY,
                     gradient ? truths[k].gradient : loss ? truths[k].loss : truths[k].logits);
        n_gradients += gradient;
    }
    check_true(label("%s: a gradient for each", truths[k].prefix), n_gradients > 0 && n_gradients == n_dumped);
}

int main(int argc, char **argv) {
    if (argc != 4 || strcmp(argv[1], "golden")) return glmtune_main(argc, argv);
    TensorSet dump = {0}, golden = {0};
    read_tensor_file(&dump, argv[2]), read_tensor_file(&golden, argv[3]);
    for (size_t k = 0; k < COUNT(truths); k++) check_dump(&dump, &golden, k);
    return check_summary();
}
