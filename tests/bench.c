// bench: how fast this build of glmtune is on this machine, against the machine's own limits.
//     bench [CONFIG.json|-] [TOKENS] [SAMPLES] [SHARE] [--method lora|full] [--gradient_checkpointing] ...
// A training step of SAMPLES samples of TOKENS tokens each, of which the last SHARE (0 to 1) are targets, on a random
// model; the products and attention at its sizes; decoding. Options are those of `glmtune train`.
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"
#include <sched.h>

static int64_t tokens_of_sample = 512, n_samples = 1;
static double target_share = 1;

// ---- 1. What the machine can do ----------------------------------------------------------------------------------
// The two limits that the rest holds everything else against. They see the same threads, vectors and compiler.

enum { CHAINS = 12, READ_BLOCK = 1 << 16 };

// Multiply-adds alone, `steps` (even) of them in each of CHAINS chains on every thread; returns the operations. One
// takes 4 cycles and two begin in each, so 8 independent chains keep a core busy; 12 and 4 operands fit 16 registers.
// x -> a x + b -> -(a x + b)/a + d goes round through four numbers, so nothing grows or settles, and all mantissas are
// random: with operands like 1.0 few bits flip, the core draws less power, clocks higher, and the peak is none.
static double multiply_adds(real *result, size_t steps) {
    size_t n_threads = 0;
    real sum = 0;
    #pragma omp parallel reduction(+ : sum, n_threads)
    {
        real start[(CHAINS + 4) * LANES];
        for (size_t i = 0; i < COUNT(start); i++) start[i] = (real)(1 + rng_uniform(7, i));
        for (size_t i = 0; i < LANES; i++) start[2*LANES + i] = -1 / start[i];
        const vec *from = (const vec *)start;
        vec a = from[0], b = from[1], c = from[2], d = from[3], x[CHAINS];
        #pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) x[i] = from[4 + i];
        for (size_t k = 0; k < steps; k += 2) {
            #pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) x[i] = x[i] * a + b;
            #pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) x[i] = x[i] * c + d;
        }
        #pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sum += sum_of_lanes(x[i]);
        n_threads++;
    }
    *result = sum;                      // whoever computes nothing has nothing to put here
    return 2.0 * LANES * CHAINS * (double)steps * (double)n_threads;
}

// Reads x [n], n a multiple of READ_BLOCK, once; the sum is of no use but to have been computed.
static real read_through(const real *x, size_t n) {
    real sum = 0;
    #pragma omp parallel for reduction(+ : sum)
    for (size_t i = 0; i < n; i += READ_BLOCK) {
        vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        for (const real *p = x + i, *end = p + READ_BLOCK; p < end; p += 4 * LANES) {
            s0 += *(const vec *)p, s1 += *(const vec *)(p + LANES);
            s2 += *(const vec *)(p + 2*LANES), s3 += *(const vec *)(p + 3*LANES);
        }
        sum += sum_of_lanes((s0 + s1) + (s2 + s3));
    }
    return sum;
}

// ---- 2. The table -----------------------------------------------------------------------------------------------
// How fast this build is on this machine, as a share of what the machine can do. Only operations that are needed count
// (a multiply-add is two), whatever the code may do besides, such as computing layers twice or masked scores:
//     a map of n_in x n_out   2 n_in n_out rows forward; as many for dX where a gradient flows on below it (not for the
//                             lowest map that trains); as many for dW where its weight trains
//     rows                    T; behind the last layer's attention and in the head R, the rows that have a target
//     attention               2 products forward, 5 backward, of 2 n_heads head_dim T(T+1)/2 each: the causal half
//     lora                    its A and B are maps of n_in x r and r x n_out that train
// Norms, softmax, SwiGLU, dropout, loss and the optimizer count nothing and so show as lost percent.

enum { BENCH_RUNS = 7, CHAIN_STEPS = 1 << 24, READ_BYTES = 1 << 30 };

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, size_t n) { return qsort(x, n, sizeof *x, by_value), x[n/2]; }

// The median time of some work, after one run that brings memory and caches in.
static double time_of(void (*work)(const void *), const void *context) {
    double t[BENCH_RUNS];
    work(context);
    for (size_t i = 0; i < BENCH_RUNS; i++) {
        double began = seconds();
        work(context);
        t[i] = seconds() - began;
    }
    return median(t, BENCH_RUNS);
}

static void print_speed(const char *what, double time, double flops, double peak) {
    printf("  %-38s %10.2f ms %9.1f GFLOP/s %6.1f %% of peak\n", what, time * 1e3, flops / time * 1e-9,
           flops / time / peak * 100);
    fflush(stdout);
}

// One thread stays on one core, so that two never share one. Only here: two programs that did this would.
static void bind_threads(void) {
#if defined _OPENMP && defined __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    #pragma omp parallel
    {
        cpu_set_t one;
        size_t cpu = 0;
        CPU_ZERO(&one);
        for (int left = omp_get_thread_num() % CPU_COUNT(&allowed); !CPU_ISSET(cpu, &allowed) || left-- > 0; ) cpu++;
        CPU_SET(cpu, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
#endif
}

static double peak_rate(void) {         // operations a second
    double rate[BENCH_RUNS];
    real result;
    for (size_t i = 0; i < BENCH_RUNS; i++) {
        double began = seconds(), n = multiply_adds(&result, CHAIN_STEPS);
        rate[i] = isfinite(result) ? n / (seconds() - began) : 0;
    }
    return median(rate, BENCH_RUNS);
}

// At the end: where the peak is another than before, something else ran or the clock changed. 0: all was well.
static int print_peak_again(double peak) {
    double again = peak_rate() / peak - 1;
    bool same = fabs(again) <= 0.05;
    printf("peak afterwards %+.1f %%%s\n", again * 100, same ? "" : ": not the same machine, DISCARD these figures");
    return !same;
}

static real *random_reals(size_t n, uint64_t key) {
    real *x = device_take(n, sizeof *x, "bench");
    fill_uniform(x, key, 0, 1, n);
    return x;
}

static void read_once(const void *array) {
    if (isnan(read_through(array, READ_BYTES / sizeof(real)))) fail("bench: uniform numbers add up to NaN");
}

static double read_rate(void) {         // bytes a second
    real *array = random_reals(READ_BYTES / sizeof *array, 1);
    double time = time_of(read_once, array);
    memory_give(array);
    return READ_BYTES / time;
}

// n weights with the standard deviation of a fresh model, in the type of most released ones.
static void *random_bf16(size_t n, uint64_t key, double std) {
    enum { CHUNK = 1 << 20 };
    char *w = device_take(n, dtype_size(BF16), "bench");
    real *numbers = device_take(CHUNK, sizeof *numbers, "bench");
    for (size_t i = 0; i < n; i += CHUNK) {
        fill_uniform(numbers, rng_key(key, i), 0, (float)(std * 1.7320508075688772), min_size(CHUNK, n - i));
        narrow(w + i * dtype_size(BF16), BF16, numbers, min_size(CHUNK, n - i));
    }
    memory_give(numbers);
    return w;
}

typedef struct { const char *kind; real *out; const real *x, *dy; const void *w; size_t rows, n_in, n_out; } Product;

static void one_product(const void *p) {
    const Product *s = p;
    if (s->kind[0] == 'Y') linear_forward(s->out, s->x, s->w, BF16, 1, s->rows, s->n_out, s->n_in);
    else if (s->kind[1] == 'X') linear_backward_input(s->out, s->dy, s->w, BF16, 1, s->rows, s->n_out, s->n_in);
    else linear_backward_weight(s->out, s->dy, s->x, 1, s->rows, s->n_out, s->n_in);
}

// The three products of a map with bf16 weights w [n_out,n_in].
static void bench_products(const void *w, size_t rows, size_t n_in, size_t n_out, double peak) {
    real *x = random_reals(rows * n_in, 1), *dy = random_reals(rows * n_out, 2);
    real *out = random_reals(max_size(max_size(rows * n_in, rows * n_out), n_in * n_out), 3);
    static const char *const kinds[] = { "Y", "dX", "dW" };
    for (size_t i = 0; i < COUNT(kinds); i++) {
        Product p = { kinds[i], out, x, dy, w, rows, n_in, n_out };
        char *what = name("%-2s %5zu rows, %5zu x %5zu", kinds[i], rows, n_in, n_out);
        print_speed(what, time_of(one_product, &p), 2.0 * (double)rows * (double)n_in * (double)n_out, peak);
        free(what);
    }
    memory_give(x), memory_give(dy), memory_give(out);
}

typedef struct { bool back; real *out, *q, *dout, *dq, *scratch, *k, *v, *dk, *dv, *lse; AttentionShape s; } Attention;

static void one_attention(const void *p) {
    const Attention *a = p;
    if (!a->back) attention_forward(a->out, a->lse, a->q, a->k, a->v, NULL, NULL, a->s);
    else attention_backward(a->dq, a->dk, a->dv, NULL, NULL, a->scratch, a->dout, a->out, a->lse, a->q, a->k, a->v,
                            NULL, NULL, a->s);
}

static void bench_attention(size_t T, size_t heads, size_t groups, size_t d, double peak) {
    size_t ends[] = { 0, T }, *starts = device_take(COUNT(ends), sizeof *starts, "bench");
    memory_copy_in(starts, ends, sizeof ends);
    Attention a = { .s = { 1, heads, groups, d, 0, starts, starts } };
    real **arrays[] = { &a.out, &a.q, &a.dout, &a.dq, &a.k, &a.v, &a.dk, &a.dv, &a.lse, &a.scratch };
    for (size_t i = 0; i < COUNT(arrays); i++)
        *arrays[i] = random_reals(T * (i < 4 ? heads * d : i < 8 ? groups * d : i < 9 ? heads : 2 * heads * d), i);
    double product = (double)heads * (double)d * (double)T * (double)(T + 1);       // the causal half
    double there = time_of(one_attention, &a);
    a.back = true;
    double back = time_of(one_attention, &a);
    char *what = name("attention, %zu tokens, %zu heads of %zu", T, heads, d);
    print_speed(what, there + back, 7 * product, peak);
    print_speed("    forward", there, 2 * product, peak), print_speed("    backward", back, 5 * product, peak);
    for (size_t i = 0; i < COUNT(arrays); i++) memory_give(*arrays[i]);
    memory_give(starts), free(what);
}

// Of a training step: making the batch, the layers, head and loss both ways, the layers back, clipping and AdamW.
enum { PHASE_DATA, PHASE_FORWARD, PHASE_HEAD, PHASE_BACKWARD, PHASE_OPTIMIZER, PHASE_ALL, PHASES };
static const char *const phase_names[] = { "data", "forward", "head and loss, both ways", "backward", "optimizer",
                                           "step" };

static void count_map(double *flops, size_t rows, size_t n_in, size_t n_out, bool dx, bool dw) {
    double once = 2.0 * (double)rows * (double)n_in * (double)n_out;
    flops[PHASE_FORWARD] += once;
    flops[PHASE_BACKWARD] += once * (dx + dw);
}

// The operations of a step on the batch that the run holds, by the formula above.
static void count_step(const Run *r, const Batch *b, double *flops) {
    const Model *m = r->model;
    const Config *c = &m->config;
    double head = 2.0 * (double)r->R * (double)m->head->n, product = 0;
    for (size_t s = 0; s < b->n; s++) {
        double n = (double)(b->starts[s+1] - b->starts[s]);
        product += 2.0 * (double)c->n_heads * (double)c->head_dim * n * (n + 1) / 2;
    }
    memset(flops, 0, PHASES * sizeof *flops);
    for (size_t l = 0; l < c->n_layers; l++) {
        const Layer *L = &m->layers[l];
        for (size_t i = 0; i < L->n_maps; i++) {
            const Map *w = &L->maps[i];
            size_t rows = is_last(r, l) && i >= L->n_qkv ? r->R : r->T, rank = lora_rank(w);
            bool below = m->lowest < w->depth;
            count_map(flops, rows, w->n_in, w->n_out, below, w->weight->trained);
            if (rank) count_map(flops, rows, w->n_in, rank, below, true), count_map(flops, rows, rank, w->n_out, 1, 1);
        }
        flops[PHASE_FORWARD] += 2 * product;
        if (flows_below(r, l, AT_O)) flops[PHASE_BACKWARD] += 5 * product;
    }
    flops[PHASE_HEAD] = head * (1 + (m->lowest < depth_of(c->n_layers, 1)) + m->head->trained);
    for (size_t p = 0; p < PHASE_ALL; p++) flops[PHASE_ALL] += flops[p];
}

// One optimizer step on all samples as one batch: took [PHASES] in seconds, flops [PHASES].
static void bench_one_step(Run *r, const Dataset *set, const Options *o, double lr, int64_t step, double *took,
                           double *flops) {
    double at[PHASES] = { seconds() };
    size_t *all = take(set->n, sizeof *all);
    for (size_t i = 0; i < set->n; i++) all[i] = i;
    Batch b = make_batch(set, all, set->n, key_of_step(o, step), 0);
    at[1] = seconds(), forward(r, &b, true);
    at[2] = seconds(), head_loss(r, 0, 1 / (real)set->n_targets);
    at[3] = seconds(), backward(r);
    at[4] = seconds(), clip_gradients(r->model, o->max_grad_norm);
    optimizer_step(r->model, o, lr, step + 1), zero_gradients(r->model);
    at[5] = seconds();
    for (size_t p = 0; p < PHASE_ALL; p++) took[p] = at[p+1] - at[p];
    took[PHASE_ALL] = at[PHASE_ALL] - at[0];
    count_step(r, &b, flops);
    free_batch(&b), free(all);
}

static Dataset bench_data(size_t V, const Options *o) {
    Dataset set = {0};
    size_t n = (size_t)tokens_of_sample, first = n - (size_t)round((double)n * target_share);
    for (size_t s = 0; s < (size_t)n_samples; s++) {
        Sample sample = { .ids = take(n, sizeof *sample.ids), .labels = take(n, sizeof *sample.labels), .n = n };
        for (size_t t = 0; t < n; t++) {
            sample.ids[t] = (int32_t)(rng_bits((uint64_t)o->seed + s, t) % V);
            sample.labels[t] = t >= first ? sample.ids[t] : NO_TARGET;
            sample.n_targets += t && t >= first;
        }
        dataset_add(&set, sample);
    }
    return set;
}

static void bench_step(Model *m, const Options *o, double peak) {
    const Method *method = find_method(o->method);
    Dataset set = bench_data(m->config.vocab_size, o);
    size_t T = set.n_tokens;
    double took[PHASES], times_of[PHASES][BENCH_RUNS], flops[PHASES], time = 0;
    method->setup(m, o);
    Run r = describe_run(m, method, plan_memory(m, method, o->gradient_checkpointing, T), T, T);
    start_trainables(m, (uint64_t)o->seed, true);
    take_run(&r);
    for (int64_t i = -1; i < BENCH_RUNS; i++) {         // the first brings memory and caches in
        bench_one_step(&r, &set, o, method->learning_rate, i + 1, took, flops);
        for (size_t p = 0; p < PHASES && i >= 0; p++) times_of[p][i] = took[p];
    }
    printf("training step: %s, %zu x %lld tokens, %zu targets\n", method->name, set.n, (long long)tokens_of_sample,
           set.n_targets);
    for (size_t p = 0; p < PHASES; p++) {
        time = median(times_of[p], BENCH_RUNS);
        if (flops[p] > 0) print_speed(phase_names[p], time, flops[p], peak);
        else printf("  %-38s %10.2f ms\n", phase_names[p], time * 1e3);
    }
    printf("  %-38s %10.1f tokens/s\n", "", (double)T / time);
    give_run(&r);
}

// Decoding reads every weight but the embedding's once for each token, so memory is what limits it.
static void bench_decoding(Model *m) {
    enum { PROMPT = 32, TOKENS = 15 };
    int32_t prompt[PROMPT] = {0};
    double t[TOKENS], bytes = (double)(m->head->n * dtype_size(m->head->dtype));
    for (size_t l = 0; l < m->config.n_layers; l++)
        for (size_t i = 0; i < m->layers[l].n_maps; i++) {
            const Tensor *w = m->layers[l].maps[i].weight;
            bytes += (double)(w->n * dtype_size(w->dtype));
        }
    Generator g = make_generator(m, NULL, PROMPT + TOKENS, 1);
    feed(&g, prompt, PROMPT);
    for (size_t i = 0; i < TOKENS; i++) {
        double began = seconds();
        feed(&g, prompt, 1);
        t[i] = seconds() - began;
    }
    double time = median(t, TOKENS), bandwidth = read_rate();
    printf("decoding\n  %-38s %10.2f ms %9.1f tokens/s %6.1f %% of reading %.1f GB/s\n", "a token", time * 1e3,
           1 / time, bytes / time / bandwidth * 100, bandwidth * 1e-9);
    give_run(&g.run), free(g.logits);
}

static Model *random_model(const char *path, const Options *o) {
    static const char usual[] =
        "{\"model_type\": \"glm\", \"vocab_size\": 59264, \"hidden_size\": 2048, \"num_hidden_layers\": 4,"
        " \"num_attention_heads\": 16, \"num_key_value_heads\": 2, \"head_dim\": 128, \"intermediate_size\": 6144,"
        " \"attention_bias\": false, \"tie_word_embeddings\": true, \"max_position_embeddings\": 8192}";
    Model *m = describe_model(path ? read_config(path) : parse_config("the model of bench", usual));
    for (size_t i = 0; i < m->n_tensors; i++) {
        Tensor *t = m->tensors[i];
        real *vector = t->vector ? device_take(t->n, sizeof *vector, t->name) : NULL;
        if (vector) random_tensor(vector, t, (uint64_t)o->seed, o->std, false), bind_tensor(t, vector, REAL);
        else bind_tensor(t, random_bf16(t->n, rng_key((uint64_t)o->seed, hash_name(t->name)), o->std), BF16);
    }
    const Config *c = &m->config;
    printf("model: %zu layers, hidden %zu, %zu heads of %zu on %zu, ffn %zu, vocabulary %zu; %zu parameters, bf16\n",
           c->n_layers, c->hidden_size, c->n_heads, c->head_dim, c->n_kv_heads, c->ffn_dim, c->vocab_size,
           count_parameters(m->tensors, m->n_tensors));
    return m;
}

// The kernels at the sizes of the model's first layer and of a batch; tests/bench.c has tables of sizes.
static void bench_kernels(const Model *m, size_t T, double peak) {
    const Config *c = &m->config;
    printf("kernels\n");
    for (size_t i = 0; i < m->layers[0].n_maps; i++) {
        const Map *w = &m->layers[0].maps[i];
        bench_products(w->weight->data, T, w->n_in, w->n_out, peak);
    }
    bench_attention(T, c->n_heads, c->n_kv_heads, c->head_dim, peak);
}

static int bench(const char *config, const Options *o) {
    if ((double)tokens_of_sample * target_share < 1.5)
        fail_usage("%lld tokens of which %g are targets leave nothing to learn", (long long)tokens_of_sample,
                   target_share);
    bind_threads();
    double peak = peak_rate();
    printf("peak %.1f GFLOP/s: multiply-adds in registers, vectors of %d bytes\n", peak * 1e-9, VECTOR_BYTES);
    Model *m = random_model(config, o);
    bench_kernels(m, (size_t)(tokens_of_sample * n_samples), peak);
    bench_decoding(m);
    bench_step(m, o, peak);
    printf("counted: 2 n_in n_out rows for each map forward, as many for dX where a gradient flows on, as many for dW\n"
           "where it trains; attention 2 products forward and 5 backward, their causal half\n");
    return print_peak_again(peak);
}

int main(int argc, char **argv) {
    Options o = default_options();
    const char *words[4] = { NULL };
    size_t n = 0;
    for (size_t i = 1; i < (size_t)argc; ) {
        if (!strncmp(argv[i], "--", 2)) i += parse_option(&o, 0, argv + i, (size_t)argc - i);
        else if (n < COUNT(words)) words[n++] = argv[i++];
        else fail_usage("usage: bench [CONFIG.json|-] [TOKENS] [SAMPLES] [SHARE] [--option value ...]");
    }
    if (words[1]) tokens_of_sample = atoll(words[1]);
    if (words[2]) n_samples = atoll(words[2]);
    if (words[3]) target_share = atof(words[3]);
    o.std = 0.02;
    use_threads(o.threads);
    return bench(words[0] && strcmp(words[0], "-") ? words[0] : NULL, &o);
}
