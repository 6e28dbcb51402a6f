// bench: how fast this build is on this machine, as a share of what the machine can do: its own rate of multiply-adds
// and of reading memory, measured first, and the former again at the end. What is counted stands before count_step;
// all else that is done shows as lost percent. tests/bench_torch.py compares a step with PyTorch.
//     bench [MODEL|CONFIG] [--tokens 512] [--target_share 1] [--option value ...]    products, attention, a step, decoding
//     bench --tables [--threads N]                     products and attention of GLM-4-9B's shapes, over numbers of rows
// Options are those of `glmtune train`. Exit status 1: the peak has changed, so the figures are void.
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"
#include <sched.h>

enum { BENCH_RUNS = 7 };

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, size_t n) { return qsort(x, n, sizeof *x, by_value), x[n/2]; }

// The median time of some work, after one run that brings memory and caches in.
static double time_of(void (*work)(const void *), const void *context) {
    double t[BENCH_RUNS];
    work(context);
    for (size_t i = 0; i < BENCH_RUNS; i++) t[i] = -seconds_when_done(), work(context), t[i] += seconds_when_done();
    return median(t, BENCH_RUNS);
}

static void print_speed(const char *what, double time, double flops, double peak) {
    printf("  %-38s %10.2f ms", what, time * 1e3);
    if (flops > 0) printf(" %9.1f GFLOP/s %6.1f %% of peak", flops / time * 1e-9, flops / time / peak * 100);
    printf("\n"), fflush(stdout);
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

static real *random_reals(size_t n, uint64_t key) {
    real *x = device_take(n, sizeof *x, "bench");
    fill_uniform(x, key, 0, 1, n);
    return x;
}

// ---- What the machine can do -------------------------------------------------------------------------------------

#ifdef GLMTUNE_CUDA
// On a GPU: a large product that overwrites, in the precision that was chosen, and the sum of two arrays. In bf16 the
// product's rows are rounded first, by bytes about 1 % of it. An idle GPU takes a while to raise its clock: the first
// time is taken again until it is warm. At the end of a run it is hot, and its power is capped: hence the wider bar.
enum { PEAK_ROWS = 4096, PEAK_IN = 8192, PEAK_OUT = 65536, PEAK_RUNS = 25, READ_NUMBERS = 1 << 28 };
static const double warm_up = 0.3, same_peak = 0.10;

static double peak_rate(void) {         // operations a second
    real *x = random_reals((size_t)PEAK_ROWS * PEAK_IN, 7), *y = random_reals((size_t)PEAK_ROWS * PEAK_OUT, 1);
    uint16_t *w = device_take((size_t)PEAK_OUT * PEAK_IN, sizeof *w, "bench");
    for (size_t row = 0; row < PEAK_OUT; row += PEAK_ROWS)
        narrow(w + row * PEAK_IN, BF16, x, (size_t)PEAK_ROWS * PEAK_IN);
    double took[PEAK_RUNS], start = seconds_when_done();
    for (int i = 0; i < PEAK_RUNS; i += seconds() > start + warm_up) {
        double began = seconds();
        linear_forward(y, NULL, x, (Weight){ w, BF16, 0, NULL }, 1, PEAK_ROWS, PEAK_OUT, PEAK_IN);
        took[i] = seconds_when_done() - began;
    }
    memory_give(x), memory_give(y), memory_give(w);
    return 2.0 * PEAK_ROWS * PEAK_IN * PEAK_OUT / median(took, PEAK_RUNS);
}

static void add_once(const void *array) {
    real *x = *(real *const *)array;
    add(x, x, x + READ_NUMBERS, READ_NUMBERS);
}

static double bandwidth(void) {         // bytes a second
    real *x = random_reals(2 * (size_t)READ_NUMBERS, 1);
    double time = time_of(add_once, &x);
    memory_give(x);
    return 3.0 * READ_NUMBERS * sizeof *x / time;
}
#else
enum { CHAINS = 12, CHAIN_STEPS = 1 << 24, READ_BLOCK = 1 << 16, READ_NUMBERS = 1 << 26 };
static const double same_peak = 0.05;

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


// The same for --precision bf16: dot products of pairs, of alternating sign so that sums do not grow.
static double dot_products(real *result, size_t steps) {
    size_t n_threads = 0;
    real sum = 0;
    #pragma omp parallel reduction(+ : sum, n_threads)
    {
        uint32_t pairs[2 * LANES];
        for (size_t i = 0; i < COUNT(pairs); i++)
            pairs[i] = (uint32_t)float_to_bf16((float)(1 + rng_uniform(7, i))) * 0x10001u + (uint32_t)(i << 16);
        bit_vec b = *(const bit_vec *)pairs;
        vec x[CHAINS] = {{0}};
        for (size_t k = 0; k < steps; k += 2) {
            #pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) x[i] = dot_pairs(x[i], pairs[LANES], b);
            #pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) x[i] = dot_pairs(x[i], pairs[LANES] ^ 0x80008000, b);
        }
        for (int i = 0; i < CHAINS; i++) sum += sum_of_lanes(x[i]);
        n_threads++;
    }
    *result = sum;
    return 4.0 * LANES * CHAINS * (double)steps * (double)n_threads;
}

// And by tiles in registers, which hold what `square` leaves in them.
static double dot_squares(real *result, size_t steps) {
    size_t n_threads = 0;
#ifdef AMX
    enum { PANEL = SQUARE * BLOCK_K };
    #pragma omp parallel reduction(+ : n_threads)
    {
        real numbers[PANEL], panel[PANEL], c[SQUARE * SQUARE];
        for (size_t i = 0; i < PANEL; i++) numbers[i] = (real)(rng_uniform(7, i) - 0.5);
        round_run(panel, numbers, PANEL);
        begin_squares();
        square(c, NULL, SQUARE, panel, panel, 16);
        for (size_t k = 0; k < steps; k++) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        n_threads++;
    }
#endif
    *result = 0;
    return 2.0 * SQUARE * SQUARE * 32 * (double)steps * (double)n_threads;
}

static double peak_rate(void) {         // operations a second
    double rate[BENCH_RUNS];
    real result;
    for (size_t i = 0; i < BENCH_RUNS; i++) {
        double began = seconds();
        double n = packing.rows != TILE_M ? dot_squares(&result, CHAIN_STEPS / 16) :
                   packing.pair == 2 ? dot_products(&result, CHAIN_STEPS) : multiply_adds(&result, CHAIN_STEPS);
        rate[i] = isfinite(result) ? n / (seconds() - began) : 0;
    }
    return median(rate, BENCH_RUNS);
}

static void read_once(const void *array) {
    if (isnan(read_through(array, READ_NUMBERS))) fail("bench: uniform numbers add up to NaN");
}

static double bandwidth(void) {         // bytes a second
    real *x = random_reals(READ_NUMBERS, 1);
    double time = time_of(read_once, x);
    memory_give(x);
    return (double)READ_NUMBERS * sizeof *x / time;
}
#endif

static double begin_bench(void) {
    bind_threads();
    double peak = peak_rate();
    printf("peak %.1f GFLOP/s: %s\n", peak * 1e-9,
           memory_left() < SIZE_MAX ? "a large product" : "multiply-adds in registers, in the precision of products");
    return peak;
}

// 1 where the peak is another than before: something else ran or the clock changed, so the figures are void.
static int end_bench(double peak) {
    double change = peak_rate() / peak - 1;
    bool same = fabs(change) <= same_peak;
    printf("peak afterwards %+.1f %%%s\n", change * 100, same ? "" : ": not the same machine, DISCARD these figures");
    return !same;
}

// ---- Kernels -----------------------------------------------------------------------------------------------------

typedef struct { char kind; real *out, *x, *dy; Weight w; size_t rows, n_in, n_out; } Product;

static void one_product(const void *product) {
    const Product *p = product;
    if (p->kind == 'Y') linear_forward(p->out, NULL, p->x, p->w, 1, p->rows, p->n_out, p->n_in);
    if (p->kind == 'X') linear_backward_input(p->out, NULL, p->dy, p->w, 1, p->rows, p->n_out, p->n_in);
    if (p->kind == 'W') linear_backward_weight(p->out, p->dy, p->x, 1, p->rows, p->n_out, p->n_in);
}

// The products Y, dX and dW of a map with weights w [n_out,n_in].
static void bench_products(Weight w, size_t rows, size_t n_in, size_t n_out, double peak) {
    real *out = random_reals(max_size(max_size(rows * n_in, rows * n_out), n_in * n_out), 3);
    Product p = { 0, out, random_reals(rows * n_in, 1), random_reals(rows * n_out, 2), w, rows, n_in, n_out };
    for (const char *kind = "YXW"; *kind; kind++) {
        p.kind = *kind;
        const char *what = strf("%s%c %5zu rows, %5zu x %5zu", *kind == 'Y' ? "" : "d", *kind, rows, n_in, n_out);
        print_speed(what, time_of(one_product, &p), 2.0 * (double)rows * (double)n_in * (double)n_out, peak);
    }
    memory_give(p.x), memory_give(p.dy), memory_give(out);
}

typedef struct { bool back; real *out, *q, *dout, *dq, *scratch, *k, *v, *dk, *dv, *lse; AttentionShape s; } Attention;

static void one_attention(const void *attention) {
    const Attention *a = attention;
    if (!a->back) attention_forward(a->out, a->lse, a->q, a->k, a->v, NULL, NULL, a->s);
    else attention_backward(a->dq, a->dk, a->dv, NULL, NULL, a->scratch, a->dout, a->out, a->lse, a->q, a->k, a->v,
                            NULL, NULL, a->s);
}

static void bench_attention(size_t T, size_t heads, size_t groups, size_t d, double peak) {
    size_t ends[] = { 0, T }, *starts = device_take(COUNT(ends), sizeof *starts, "bench");
    memory_copy_in(starts, ends, sizeof ends);
    Attention a = { .s = { 1, heads, groups, d, 0, T, T, starts, starts } };
    real **arrays[] = { &a.out, &a.q, &a.dout, &a.dq, &a.k, &a.v, &a.dk, &a.dv, &a.lse, &a.scratch };
    for (size_t i = 0; i < COUNT(arrays); i++)
        *arrays[i] = random_reals(T * (i < 4 ? heads * d : i < 8 ? groups * d : i < 9 ? heads : 2 * heads * d), i);
    double product = (double)heads * (double)d * (double)T * (double)(T + 1);       // the causal half
    double there = time_of(one_attention, &a), back = (a.back = true, time_of(one_attention, &a));
    print_speed(strf("attention, %zu tokens, %zu heads of %zu", T, heads, d), there + back, 7 * product, peak);
    print_speed("    forward", there, 2 * product, peak), print_speed("    backward", back, 5 * product, peak);
    for (size_t i = 0; i < COUNT(arrays); i++) memory_give(*arrays[i]);
    memory_give(starts);
}

// n weights with the standard deviation of a fresh model, in the type of most released ones.
static void *random_bf16(size_t n, uint64_t key, double std) {
    void *w = device_take(n, dtype_size(BF16), "bench");
    real *numbers = device_take(n, sizeof *numbers, "bench");
    fill_uniform(numbers, key, 0, (float)(std * 1.7320508075688772), n);
    narrow(w, BF16, numbers, n);
    memory_give(numbers);
    return w;
}

// The maps of GLM-4-9B [n_out,n_in], fused as in the remote layout: q, k and v; o; gate and up; down.
static void bench_tables(double peak) {
    static const size_t maps[][2] = { { 4608, 4096 }, { 4096, 4096 }, { 27392, 4096 }, { 4096, 13696 } };
    static const size_t rows[] = { 1, 16, 64, 128, 512, 1024 };
    static const size_t tokens[] = { 256, 512, 2048 };
    for (size_t i = 0; i < COUNT(maps); i++) {
        void *w = random_bf16(maps[i][0] * maps[i][1], i, 0.02);
        for (size_t k = 0; k < COUNT(rows); k++)
            bench_products((Weight){ w, BF16, 0, NULL }, rows[k], maps[i][1], maps[i][0], peak);
        memory_give(w);
    }
    for (size_t k = 0; k < COUNT(tokens); k++) bench_attention(tokens[k], 32, 2, 128, peak);
}

// ---- A model -----------------------------------------------------------------------------------------------------

// Only operations that are needed count (a multiply-add is two), whatever the code does besides, such as computing a
// layer twice or scores that are masked:
//     a map of n_in x n_out   2 n_in n_out rows forward; as many for dX where a gradient flows on below it (not for the
//                             lowest map that trains); as many for dW where its weight trains
//     rows                    T; behind the last layer's attention and in the head R, the rows that have a target
//     attention               2 products forward, 5 backward, of 2 n_heads head_dim T(T+1)/2 each: the causal half
//     lora                    its A and B are maps of n_in x r and r x n_out that train
// All else counts nothing and so shows as lost percent.

typedef struct { double forward, head, head_back, back; } Operations;

// The operations of a step on the batch that the run holds, by the formula above; the head's stand apart.
static Operations count_step(const Run *r, const Batch *b) {
    const Model *m = r->model;
    const Config *c = &m->config;
    Operations sum = { .head = 2 * (double)r->R * (double)m->head->n };
    double product = 0;
    for (size_t s = 0; s < b->n; s++) {
        double n = (double)(b->starts[s+1] - b->starts[s]);
        product += (double)c->n_heads * (double)c->head_dim * n * (n + 1);
    }
    for (size_t l = 0; l < c->n_layers; l++) {
        sum.forward += 2 * product;
        sum.back += flows_below(r, l, AT_O) ? 5 * product : 0;
        for (size_t i = 0; i < m->layers[l].n_maps; i++) {
            const Linear *w = &m->layers[l].maps[i];
            double rows = (double)(is_last(r, l) && i >= m->layers[l].n_qkv ? r->R : r->T);
            double below = m->lowest < w->depth, rank = 2 * rows * (double)lora_rank(w);
            double base = 2 * rows * (double)w->weight->n, A = rank * (double)w->n_in, B = rank * (double)w->n_out;
            sum.forward += base + A + B;
            sum.back += base * (below + w->weight->trained) + A * (below + 1) + B * 2;
        }
    }
    sum.head_back = sum.head * ((m->lowest < depth_of(c->n_layers, 1)) + m->head->trained);
    return sum;
}

// Samples of n random tokens each, of which the last `share` are targets.
static Dataset random_data(size_t V, size_t n_samples, size_t n, double share, uint64_t seed) {
    Dataset set = {0};
    size_t first = n - (size_t)round((double)n * share);
    for (size_t s = 0; s < n_samples; s++) {
        Sample sample = { .ids = alloc(n, sizeof *sample.ids), .labels = alloc(n, sizeof *sample.labels), .n = n };
        for (size_t t = 0; t < n; t++) {
            sample.ids[t] = (int32_t)(rng_bits(seed + s, t) % V);
            sample.labels[t] = t >= first ? sample.ids[t] : NO_TARGET;
            sample.n_targets += t && t >= first;
        }
        dataset_add(&set, sample);
    }
    return set;
}

enum { PHASE_DATA, PHASE_FORWARD, PHASE_HEAD, PHASE_BACKWARD, PHASE_OPTIMIZER, PHASE_ALL, PHASES };
static const char *const phase_names[] = { "data", "forward", "head and loss, both ways", "backward",
                                           "clipping and optimizer", "step" };

// One optimizer step on all samples as one batch: took [PHASES] in seconds, flops [PHASES].
static void timed_step(Run *r, const Dataset *set, const Options *o, double lr, int64_t step, double *took,
                       double *flops) {
    double at[PHASES] = { seconds() };
    Batch b = make_batch(set, NULL, set->n, rng_key((uint64_t)o->seed, (uint64_t)step), 0);
    at[1] = seconds(), forward(r, &b, true);
    at[2] = seconds_when_done(), head_loss(r, 0, 1 / (real)set->n_targets);
    at[3] = seconds_when_done(), backward(r);
    at[4] = seconds_when_done(), clip_gradients(r->model, o->max_grad_norm);
    optimizer_step(r->model, o, lr, step + 1), zero_gradients(r->model);
    at[5] = seconds_when_done();
    for (size_t p = 0; p < PHASE_ALL; p++) took[p] = at[p+1] - at[p];
    took[PHASE_ALL] = at[PHASE_ALL] - at[0];
    Operations n = count_step(r, &b);
    memcpy(flops, (double[PHASES]){ 0, n.forward, n.head + n.head_back, n.back, 0,
                                    n.forward + n.head + n.head_back + n.back }, PHASES * sizeof *flops);
    free_batch(&b);
}

static void bench_step(Model *m, const Options *o, size_t tokens, double share, double peak) {
    const Method *method = find_method(o->method);
    Dataset set = random_data(m->config.vocab_size, (size_t)o->per_device_train_batch_size, tokens, share,
                              (uint64_t)o->seed);
    double took[PHASES], times_of[PHASES][BENCH_RUNS], flops[PHASES];
    method->setup(m, o);
    m->n_moments = find_optimizer(o->optim)->n_moments;
    size_t T = set.n_tokens;
    Run r = describe_run(m, method, plan_memory(m, method, o->gradient_checkpointing, T), T, T);
    start_trainables(m, (uint64_t)o->seed, true);
    take_run(&r);
    for (int64_t i = -1; i < BENCH_RUNS; i++) {         // the first brings memory and caches in
        timed_step(&r, &set, o, method->learning_rate, i + 1, took, flops);
        for (size_t p = 0; p < PHASES && i >= 0; p++) times_of[p][i] = took[p];
    }
    printf("training step: %s, %zu x %zu tokens, %zu targets\n", method->name, set.n, tokens, set.n_targets);
    for (size_t p = 0; p < PHASES; p++) print_speed(phase_names[p], median(times_of[p], BENCH_RUNS), flops[p], peak);
    printf("  %-38s %10.1f tokens/s\n", "", (double)set.n_tokens / median(times_of[PHASE_ALL], BENCH_RUNS));
    give_run(&r);
}

static void feed_one(const void *generator) {
    Generator g = *(const Generator *)generator;
    feed(&g, &(int32_t){0}, 1);
}

// Decoding reads every weight but the embedding's once for each token, so memory is what limits it.
static void bench_decoding(Model *m) {
    double bytes = (double)stored_bytes(m->head);
    for (size_t l = 0; l < m->config.n_layers; l++)
        for (const Linear *w = m->layers[l].maps; w < m->layers[l].maps + m->layers[l].n_maps; w++)
            bytes += (double)stored_bytes(w->weight);
    Generator g = make_generator(m, NULL, 64, 1);
    double time = time_of(feed_one, &g), reading = bandwidth();
    printf("  %-38s %10.2f ms %9.1f tokens/s %6.1f %% of reading %.1f GB/s\n", "decoding, a token", time * 1e3,
           1 / time, bytes / time / reading * 100, reading * 1e-9);
    give_generator(&g);
}

// A model of this shape with random bf16 weights.
static Model *random_model(Config c, uint64_t seed, double std) {
    Model *m = describe_model(c);
    for (size_t i = 0; i < m->n_tensors; i++) {
        Tensor *t = m->tensors[i];
        real *vector = t->vector ? device_take(t->n, sizeof *vector, t->name) : NULL;
        if (vector) random_tensor(vector, t, seed, std, false), bind_tensor(t, vector, REAL);
        else bind_tensor(t, random_bf16(t->n, rng_key(seed, hash_name(t->name)), std), BF16);
    }
    return m;
}

// A model folder, or random weights in the shape of a config.json or of four layers of a small GLM.
static Model *bench_model(const char *path, const Options *o) {
    static const char usual[] =
        "{\"model_type\": \"glm\", \"vocab_size\": 59264, \"hidden_size\": 2048, \"num_hidden_layers\": 4,"
        " \"num_attention_heads\": 16, \"num_key_value_heads\": 2, \"head_dim\": 128, \"intermediate_size\": 6144,"
        " \"attention_bias\": false, \"tie_word_embeddings\": true, \"max_position_embeddings\": 8192}";
    if (path && is_folder(path)) return load_model(path);
    return random_model(path ? read_config(path) : parse_config("the model of bench", usual), (uint64_t)o->seed, 0.02);
}

static void bench_all(const char *model, const Options *o, size_t tokens, double share, double peak) {
    Model *m = bench_model(model, o);
    const Config *c = &m->config;
    printf("model: %zu layers, hidden %zu, %zu heads of %zu on %zu, ffn %zu, vocabulary %zu; %zu parameters\n",
           c->n_layers, c->hidden_size, c->n_heads, c->head_dim, c->n_kv_heads, c->ffn_dim, c->vocab_size,
           count_parameters(m->tensors, m->n_tensors));
    bench_products(weight_of(m->layers[0].gate_up->weight), tokens * (size_t)o->per_device_train_batch_size,
                   c->hidden_size, 2 * c->ffn_dim, peak);
    bench_attention(tokens, c->n_heads, c->n_kv_heads, c->head_dim, peak);
    bench_decoding(m);
    bench_step(m, o, tokens, share, peak);
}

int main(int argc, char **argv) {
    static const Command train = { "bench", TRAIN, 0, 1, NULL, "[MODEL|CONFIG]", "" };
    Options o = default_options();
    const char *model = NULL;
    size_t n = (size_t)argc, tokens = 512;
    double share = 1;
    bool tables = false;
    for (size_t i = 1; i < n; ) {
        bool more = i + 1 < n;
        if (!strcmp(argv[i], "--tables")) tables = true, i++;
        else if (!strcmp(argv[i], "--tokens") && more) tokens = strtoul(argv[i+1], NULL, 10), i += 2;
        else if (!strcmp(argv[i], "--target_share") && more) share = strtod(argv[i+1], NULL), i += 2;
        else if (!strncmp(argv[i], "--", 2)) i += parse_option(&o, &train, argv + i, n - i);
        else model = argv[i++];
    }
    if ((double)tokens * share < 1.5)
        fail_usage("--tokens %zu with --target_share %g leaves nothing to learn", tokens, share);
    use_threads(o.threads);
    set_precision(o.precision && !strcmp(o.precision, "bf16"));
    double peak = begin_bench();
    if (tables) bench_tables(peak);
    else bench_all(model, &o, tokens, share, peak);
    return end_bench(peak);
}
