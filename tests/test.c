// The tests of glmtune, in one program: glmtune.c without its main, and below it what is checked.
//
//     ./test [GROUP ...]      all groups, or those named; from the project's top folder
//     GLM_VERBOSE=1 ./test    the measured error beside each tolerance
//     GLM_PRECISION=bf16 ./test-cuda-float    operands of products in bf16
//     GLM_REAL=DIR ./test     also against the released tokenizers and golden numbers in DIR, which are no part of the
//                             project (their licences are the models')
//
// Golden numbers come from tests/reference.py: the float build is compared with Hugging Face in float (hf.*), the
// double build with a plain model in double (f64.*). Groups stand in the table at the end.
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"
#include <sys/wait.h>
#include "check.h"
#include "test_kernels.c"

// ---- Places ------------------------------------------------------------------------------------------------------

static const char *scratch_folder;
static pid_t scratch_owner;

static const char *scratch(const char *file) { return strf("%s/%s", scratch_folder, file); }

static void remove_scratch(void) {
    if (getpid() != scratch_owner) return;      // a forked test that ends must leave it to us
    DIR *d = opendir(scratch_folder);
    for (struct dirent *e; d && (e = readdir(d)); )
        if (e->d_name[0] != '.') remove_tree(scratch(e->d_name));
    if (d) closedir(d);
    rmdir(scratch_folder);
}

static void make_scratch(void) {
    const char *parent = getenv("TMPDIR");
    char *form = strf("%s/glmtune-test-XXXXXX", parent ? parent : "/tmp");
    if (!mkdtemp(form)) fail("tests: %s: %s", form, strerror(errno));
    scratch_folder = form;
    scratch_owner = getpid();
    atexit(remove_scratch);
}

// Where a file of the released models lies; NULL when they are not here.
static const char *real_file(const char *file) {
    const char *folder = getenv("GLM_REAL");
    return folder ? strf("%s/%s", folder, file) : NULL;
}

// Some of what is tested prints to stdout; it is of interest only to who asked for more.
static int silence(void) {
    fflush(stdout);
    int kept = dup(1), nothing = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (!check_verbose()) dup2(nothing, 1);
    close(nothing);
    return kept;
}

static void unsilence(int kept) {
    fflush(stdout);
    dup2(kept, 1);
    close(kept);
}

// Runs an action that must end the program: with status 1, saying `message`. It does so in a child.
static void check_fails(const char *what, void (*action)(const void *), const void *context, const char *message) {
    char said[4096] = "";
    size_t n = 0, left = sizeof said - 1;
    int ends[2], status = 0;
    fflush(stdout);
    if (pipe(ends)) fail("tests: pipe: %s", strerror(errno));
    pid_t child = fork();
    if (!child) {
        dup2(ends[1], 2);
        action(context);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; (got = read(ends[0], said + n, left - n)) > 0; ) n += (size_t)got;
    close(ends[0]);
    waitpid(child, &status, 0);
    bool ended = WIFEXITED(status) && WEXITSTATUS(status) == 1;
    check_true(label("%s: must end with 1 and \"%s\"; status %d and \"%.120s\"", what, message, status, said),
               ended && strstr(said, message));
}

static uint64_t n_picked;

static size_t pick(size_t n) { return (size_t)(rng_bits(77, n_picked++) % n); }     // random below n

// ---- Golden files ------------------------------------------------------------------------------------------------

static double stored_number(const StoredTensor *s, size_t i) {
    switch (s->dtype) {
        case F64: return ((const double *)s->data)[i];
        case F32: return (double)((const float *)s->data)[i];
        case I64: return (double)((const int64_t *)s->data)[i];
        case I32: return ((const int32_t *)s->data)[i];
        case F16: case BF16: case OTHER_DTYPE: default:
            return naive_decode(((const uint16_t *)s->data)[i], half_format_of(s->dtype));
    }
}

static TensorSet open_golden(const char *folder) {
    TensorSet set = {0};
    read_tensor_file(&set, strf("%s/golden.safetensors", folder));
    return set;
}

// All numbers of a golden tensor, *n of them.
static double *golden_all(const TensorSet *g, const char *tensor, size_t *n) {
    const StoredTensor *s = find_tensor(g, tensor);
    if (!s) fail("tests: there is no golden '%s'", tensor);
    double *numbers = alloc(s->n, sizeof *numbers);
    for (size_t i = 0; i < s->n; i++) numbers[i] = stored_number(s, i);
    *n = s->n;
    return numbers;
}

static double *golden(const TensorSet *g, const char *tensor, size_t want_n) {
    size_t n;
    double *numbers = golden_all(g, tensor, &n);
    if (n != want_n) fail("tests: golden '%s' has %zu numbers, not %zu", tensor, n, want_n);
    return numbers;
}

#define TRUTH_NAME TOLERANCE("hf.", "f64.")

// The numbers that this build is compared with.
static double *truth(const TensorSet *g, const char *what, size_t n) {
    return golden(g, strf("%s%s", TRUTH_NAME, what), n);
}

static int32_t *golden_ids(const TensorSet *g, const char *tensor, size_t *n) {
    double *numbers = golden_all(g, tensor, n);
    int32_t *ids = alloc(*n, sizeof *ids);
    for (size_t i = 0; i < *n; i++) ids[i] = (int32_t)numbers[i];
    free(numbers);
    return ids;
}

static uint64_t golden_seed(const TensorSet *g) { return (uint64_t)*golden(g, "seed", 1); }

// The rows of a golden file as samples.
static Dataset golden_samples(const TensorSet *g, const char *prefix) {
    Dataset set = {0};
    size_t n, n_starts;
    int32_t *ids = golden_ids(g, strf("%sids", prefix), &n), *labels = golden_ids(g, strf("%slabels", prefix), &n);
    int32_t *starts = golden_ids(g, strf("%sstarts", prefix), &n_starts);
    for (size_t i = 0; i + 1 < n_starts; i++) {
        Sample s = { .ids = ids + starts[i], .labels = labels + starts[i], .number = i + 1,
                     .n = (size_t)(starts[i+1] - starts[i]) };
        for (size_t t = 1; t < s.n; t++) s.n_targets += s.labels[t] != NO_TARGET;
        dataset_add(&set, s);
    }
    free(starts);
    return set;
}

static size_t *count_up(size_t n) {     // 0, 1, 2, ...
    size_t *numbers = alloc(n, sizeof *numbers);
    for (size_t i = 0; i < n; i++) numbers[i] = i;
    return numbers;
}

static Batch whole_batch(const Dataset *set) {
    size_t *all = count_up(set->n);
    Batch b = make_batch(set, all, set->n, 0, 0);
    free(all);
    return b;
}

// ---- Models ------------------------------------------------------------------------------------------------------

// A model under test, and what one forward and backward of a batch left in it.
typedef struct {
    const char *name;
    Model *model;
    const Method *method;
    Options options;
    Dataset data;
    Run run;
    double loss;
    real *logits;           // [T,V], on the host
    TensorSet hidden;       // the residual stream that enters each layer and leaves the last, [T,H] each; on the host
} Subject;

// As reference.py draws them.
static void generate_numbers(real *out, const Tensor *t, uint64_t seed) {
    fill_uniform(out, rng_key(seed, hash_name(t->name)), strstr(t->name, "norm") ? 1 : 0, 0.25f, t->n);
}

static void bind_generated(Model *m, uint64_t seed) {
    for (size_t i = 0; i < m->n_tensors; i++) {
        real *numbers = device_take(m->tensors[i]->n, sizeof *numbers, m->tensors[i]->name);
        generate_numbers(numbers, m->tensors[i], seed);
        bind_tensor(m->tensors[i], numbers, REAL);
    }
}

// Sets up the method of s->options; tensors that it adds are drawn as well, so that none of them is zero.
static void begin_tuning(Subject *s, uint64_t seed) {
    Model *m = s->model;
    s->method = find_method(s->options.method);
    s->method->setup(m, &s->options);
    start_trainables(m, seed, true);
    for (size_t i = 0; i < m->n_trained; i++)
        if (!m->trained[i]->of_base) generate_numbers(m->trained[i]->value, m->trained[i], seed);
}

// The names of all linear maps, as target_modules takes them.
static const char *all_maps(const Model *m) {
    Text t = {0};
    for (size_t i = 0; i < m->layers[0].n_maps; i++)
        text_print(&t, "%s%s", i ? "," : "", m->layers[0].maps[i].short_name);
    return t.s;
}

// A model with generated weights and a method on it; LoRA goes beside all its linear maps.
static Subject make_subject(const char *what, Model *m, const char *method, uint64_t seed) {
    Subject s = { .name = what, .model = m, .options = default_options() };
    s.options.method = method;
    s.options.target_modules = all_maps(m);
    bind_generated(m, seed);
    begin_tuning(&s, seed);
    return s;
}

static Model *golden_model(const char *folder) { return describe_model(read_config(strf("%s/config.json", folder))); }

static real *host_copy(const real *device, size_t n) {
    real *host = alloc(n, sizeof *host);
    memory_copy_out(host, device, n * sizeof *host);
    return host;
}

// The device's memory with these numbers in it.
static real *device_copy(const real *host, size_t n) {
    real *device = device_take(n, sizeof *device, "a test");
    memory_copy_in(device, host, n * sizeof *host);
    return device;
}

// Forward and backward of all samples as one batch; dropout is off.
static void compute(Subject *s) {
    Batch b = whole_batch(&s->data);
    TensorSet l = {0};
    if (!s->run.max_T) {
        s->run = describe_run(s->model, s->method, KEEPS_ALL, b.T, b.T);
        take_run(&s->run);
    }
    list_add_activations(&l, &s->run, &b);
    s->hidden = l;
    s->logits = (real *)l.tensors[l.n - 1].data;
    zero_gradients(s->model);
    s->loss = forward_backward(&s->run, &b, s->data.n_targets, 0, false) / (double)s->data.n_targets;
    free_batch(&b);
}

static size_t n_logits(const Subject *s) { return s->data.n_tokens * s->model->config.vocab_size; }

// Samples of random ids; about one label in four is no target.
static Dataset random_samples(size_t n, size_t shortest, size_t longest, size_t vocabulary) {
    Dataset set = {0};
    for (size_t i = 0; i < n; i++) {
        Sample s = { .n = shortest + pick(longest - shortest + 1), .number = i + 1 };
        s.ids = alloc(s.n, sizeof *s.ids), s.labels = alloc(s.n, sizeof *s.labels);
        for (size_t t = 0; t < s.n; t++) {
            s.ids[t] = (int32_t)pick(vocabulary);
            s.labels[t] = pick(4) ? s.ids[t] : NO_TARGET;
            s.n_targets += t > 0 && s.labels[t] != NO_TARGET;
        }
        dataset_add(&set, s);
    }
    return set;
}

#include "test_model.c"
#include "test_data.c"
#include "test_chat.c"
#include "test_eval.c"
#include "test_svg.c"
#include "test_tokenizers.c"
#include "test_yaml.c"
#include "test_methods.c"
#include "test_state.c"
#include "test_defaults.c"

// ---- All of them -------------------------------------------------------------------------------------------------

static const struct { const char *name; void (*run)(void); } groups[] = {
    { "kernels", test_kernels }, { "golden", test_golden }, { "training", test_training }, { "saved", test_saved },
    { "targets", test_targets }, { "adapters", test_adapters }, { "merge", test_merge },
    { "accumulation", test_accumulation },
    { "dropout", test_dropout_masks }, { "recomputing", test_recomputing },
    { "threads", test_threads }, { "slopes", test_slopes }, { "frozen", test_frozen }, { "schedules", test_schedules },
    { "generation", test_generation }, { "released", test_released }, { "quantised", test_quantised },
    { "json", test_json }, { "tensorfiles", test_tensor_files }, { "init", test_init },
    { "chunks", test_chunks }, { "tokenizers", test_tokenizers }, { "vectors", test_vectors },
    { "masks", test_masks }, { "data", test_data_sets }, { "configs", test_configs },
    { "layouts", test_layouts }, { "chat", test_chat },
    { "scores", test_scores }, { "answers", test_answers }, { "replay", test_replay },
    { "svg", test_svg },
    { "tokenizer_json", test_json_tokenizers },
    { "yaml", test_yaml },
    { "methods", test_methods },
    { "state", test_state },
    { "defaults", test_defaults },
};

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    make_scratch();
    choose_precision();
    for (int a = 1; a < argc; a++) {
        size_t i = 0;
        while (i < COUNT(groups) && strcmp(groups[i].name, argv[a])) i++;
        if (i == COUNT(groups)) fail_usage("tests: there is no group '%s'", argv[a]);
    }
    for (size_t i = 0; i < COUNT(groups); i++) {
        bool wanted = argc == 1;
        for (int a = 1; a < argc; a++) wanted |= !strcmp(groups[i].name, argv[a]);
        if (!wanted) continue;
        double began = seconds();
        groups[i].run();
        if (check_verbose()) printf("%-6s %s: %.2f s\n", "time", groups[i].name, seconds() - began);
    }
    return check_summary();
}
