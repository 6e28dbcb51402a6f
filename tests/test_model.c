// Tests of the model and of training: golden numbers, saved folders, adapters, determinism, slopes, generation.

// In bf16 the measured errors are 2.3e-2, 1.1e-3, 6.0e-2 (a key's bias; most are below 3e-2).
#define LOGITS_TOLERANCE PRODUCTS(5e-6, 1e-11, 5e-2)
#define LOSS_TOLERANCE PRODUCTS(1e-6, 1e-11, 5e-3)
#define GRADIENT_TOLERANCE PRODUCTS(1e-5, 1e-11, 0.12)

// A gradient that is zero in truth has no size that an error could be relative to; this stands in for it.
#define LEAST_GRADIENT 1e-3

// ---- Golden cases ------------------------------------------------------------------------------------------------

static void check_outputs(const Subject *s, const TensorSet *g) {
    double *logits = truth(g, "logits", n_logits(s));
    check_close(label("%s: logits", s->name), s->logits, logits, n_logits(s), LOGITS_TOLERANCE);
    check_number(label("%s: loss", s->name), s->loss, *truth(g, "loss", 1), LOSS_TOLERANCE);
    free(logits);
}

static void check_gradients(const Subject *s, const TensorSet *g) {
    size_t n_golden = 0;
    const char *prefix = strf("%sgrad.", TRUTH_NAME);
    for (size_t i = 0; i < g->n; i++) n_golden += !strncmp(g->tensors[i].name, prefix, strlen(prefix));
    check_equal(label("%s: tensors that train", s->name), s->model->n_trained, n_golden);
    for (size_t i = 0; i < s->model->n_trained; i++) {
        const Tensor *t = s->model->trained[i];
        double *want_grad = truth(g, strf("grad.%s", t->name), t->n);
        real *grad = host_copy(t->grad, t->n);
        check_arrays(label("%s: gradient of %s", s->name, t->name), grad, sizeof *grad, want_grad, t->n, true,
                     LEAST_GRADIENT, GRADIENT_TOLERANCE);
        free(want_grad), free(grad);
    }
}

// The model of a golden folder, with LoRA where it has an adapter_config.json, and generated weights.
static Subject golden_subject(const char *case_name, const TensorSet *g) {
    const char *folder = strf("tests/golden/%s", case_name), *base;
    Subject s = { .name = case_name, .model = golden_model(folder), .options = default_options() };
    if (exists(strf("%s/adapter_config.json", folder))) read_adapter_config(folder, &s.options, &base);
    else s.options.method = "full";
    bind_generated(s.model, golden_seed(g));
    begin_tuning(&s, golden_seed(g));
    return s;
}

static void compare_golden(const char *name, bool gradients) {
    TensorSet g = open_golden(strf("tests/golden/%s", name));
    Subject s = golden_subject(name, &g);
    s.data = golden_samples(&g, "");
    compute(&s);
    check_outputs(&s, &g);
    if (gradients) check_gradients(&s, &g);
    give_run(&s.run);
}

static void test_golden(void) {
    static const char *const cases[] = { "glm_bias", "glm_edge", "glm4", "glm4_plain", "glm_long", "chatglm",
                                         "lora_qkv", "lora_all", "lora_tied", "lora_fused" };
    for (size_t i = 0; i < COUNT(cases); i++) compare_golden(cases[i], true);
    // what a config.json does not say is as in transformers' classes; these have no gradients
    compare_golden("silent_glm", false);
    compare_golden("silent_glm4", false);
}

// ---- Golden training ---------------------------------------------------------------------------------------------

enum { GOLDEN_MICRO_BATCH = 2, GOLDEN_STEP = 4 };       // samples in a micro-batch and in a step of reference.py

static void read_hyper(Options *o, const TensorSet *g) {
    const double *h = golden(g, "hyper", 7);
    o->lr_scheduler_type = *golden(g, "linear", 1) != 0 ? "linear" : "cosine";
    o->learning_rate = h[0], o->warmup_steps = (int64_t)h[1], o->weight_decay = h[2];
    const StoredTensor *optimizer = find_tensor(g, "optimizer");
    if (optimizer) o->optim = optimizers[*golden_ids(g, "optimizer", &(size_t){0})].name, o->momentum = h[3];
    o->adam_beta1 = h[3], o->adam_beta2 = h[4], o->adam_epsilon = h[5], o->max_grad_norm = h[6];
}

static void check_steps(Subject *s, const TensorSet *g) {
    size_t n_steps, n_order;
    const Options *o = &s->options;
    double *rates = golden_all(g, "learning_rates", &n_steps);
    double *losses = truth(g, "losses", n_steps), *norms = golden(g, "f64.grad_norms", n_steps);
    int32_t *order = golden_ids(g, "order", &n_order);
    check_equal(label("%s: samples in the order", s->name), n_order, n_steps * GOLDEN_STEP);
    for (size_t step = 0; step < n_steps; step++) {
        size_t chosen[GOLDEN_STEP];
        for (size_t i = 0; i < GOLDEN_STEP; i++) chosen[i] = (size_t)order[step * GOLDEN_STEP + i];
        double lr = scheduled_rate(o->lr_scheduler_type, o->learning_rate, (int64_t)step,
                                   warmup_of(o, (int64_t)n_steps), (int64_t)n_steps);
        double loss = accumulate_samples(&s->run, &s->data, chosen, GOLDEN_STEP, GOLDEN_MICRO_BATCH, o, (int64_t)step);
        double norm = clip_gradients(s->model, o->max_grad_norm);
        optimizer_step(s->model, o, lr, (int64_t)step + 1);
        check_number(label("%s: loss of step %zu", s->name, step + 1), loss, losses[step],
                     PRODUCTS(5e-7, 1e-11, 1e-2));
        // Norms are PyTorch's in double, for its float has moved by up to 7.7e-7, Lion's by 1.4e-6: a step of Lion is as
        // large for a gradient near 0, whose sign rounding may turn. Measured, with AVX-512, SSE and ARM's vectors: 4.5e-7
        // at most, Lion's 1.4e-6.
        check_number(label("%s: gradient norm of step %zu", s->name, step + 1), norm, norms[step],
                     PRODUCTS(strstr(s->name, "lion") ? 3e-6 : 1e-6, 1e-11, 6e-2));
        check_arrays(label("%s: learning rate of step %zu", s->name, step + 1), &lr, sizeof lr, &rates[step], 1, false,
                     1e-6, 1e-12);      // the first rate is 0
    }
}

static void test_training(void) {
    static const char *const cases[] = { "train_full", "train_lora", "train_sgd", "train_lion" };
    for (size_t i = 0; i < COUNT(cases); i++) {
        TensorSet g = open_golden(strf("tests/golden/%s", cases[i]));
        Subject s = golden_subject(cases[i], &g);
        s.data = golden_samples(&g, "sample_");
        read_hyper(&s.options, &g);
        size_t T = most_tokens(&s.data, GOLDEN_MICRO_BATCH), n_final = 0;
        s.run = describe_run(s.model, s.method, true, T, T);
        take_run(&s.run);
        check_steps(&s, &g);
        for (size_t k = 0; k < s.model->n_trained; k++) {
            const Tensor *t = s.model->trained[k];
            if (!find_tensor(&g, strf("%sfinal.%s", TRUTH_NAME, t->name))) continue;
            check_close_l2(label("%s: %s after the last step", s.name, t->name), host_copy(t->value, t->n),
                           truth(&g, strf("final.%s", t->name), t->n), t->n, PRODUCTS(5e-7, 1e-11, 1e-2));
            n_final++;
        }
        check_equal(label("%s: tensors compared after the last step", s.name), n_final, 2);
    }
}

// ---- Saved folders -----------------------------------------------------------------------------------------------

// A folder as a user gives it: an adapter, or a model, which is then tuned by the method of the options.
static Subject open_subject(const char *folder, const Dataset *data, const Options *o) {
    Subject s = { .name = folder, .options = *o, .data = *data };
    if (exists(strf("%s/adapter_config.json", folder))) s.options = default_options();     // the adapter says the rest
    Opened opened = open_model(folder, &s.options);
    s.model = opened.model;
    s.method = opened.method;
    if (s.method) start_method(&opened, 0, true);
    else begin_tuning(&s, 81);
    compute(&s);
    return s;
}

static Options options_of(const char *method) {
    Options o = default_options();
    o.method = method;
    return o;
}

// The same bits in two arrays of the device.
static void check_same(const char *what, const real *got, const real *want_numbers, size_t n) {
    real *a = host_copy(got, n), *b = host_copy(want_numbers, n);
    check_equal_bits(what, a, b, n, sizeof *a);
    free(a), free(b);
}

// The same numbers from both: logits, loss and the residual stream.
static void check_same_forward(const Subject *a, const Subject *b) {
    size_t L = a->model->config.n_layers, n = a->data.n_tokens * a->model->config.hidden_size;
    check_equal_bits(label("logits of %s and %s", a->name, b->name), a->logits, b->logits, n_logits(a), sizeof(real));
    check_equal_bits(label("loss of %s and %s", a->name, b->name), &a->loss, &b->loss, 1, sizeof a->loss);
    for (size_t i = 0; i <= L; i++)
        check_equal_bits(label("hidden.%zu of %s and %s", i, a->name, b->name), a->hidden.tensors[i].data,
                         b->hidden.tensors[i].data, n, sizeof(real));
}

// The gradient of a tensor and of the same tensor in the other layout, where it begins at row `row`.
static void check_same_gradient(const Tensor *hf, const Tensor *remote, size_t row) {
    size_t columns = hf->n / hf->shape[0];
    check_same(label("gradient of %s and %s", hf->name, remote->name), hf->grad, remote->grad + row * columns, hf->n);
}

static void check_same_layer(const Layer *hf, const Layer *remote) {
    check_same_gradient(hf->input_norm, remote->input_norm, 0);
    check_same_gradient(hf->mlp_norm, remote->mlp_norm, 0);
    check_same_gradient(hf->o->weight, remote->o->weight, 0);
    check_same_gradient(hf->gate_up->weight, remote->gate_up->weight, 0);
    check_same_gradient(hf->down->weight, remote->down->weight, 0);
    for (size_t i = 0, row = 0; i < hf->n_qkv; row += hf->maps[i++].n_out) {
        check_same_gradient(hf->maps[i].weight, remote->maps[0].weight, row);
        check_same_gradient(hf->maps[i].bias, remote->maps[0].bias, row);
    }
}

// What `quantize` writes is what bitsandbytes made of the same model: every code and scale. The mean of scales may have
// another last bit, and scales that are codes may follow it.
static void test_quantising(const char *kind, int64_t bits, bool twice) {
    const char *out = scratch(strf("quantised_%s", kind));
    Options o = default_options();
    TensorSet ours = {0}, theirs = {0};
    o.bits = bits, o.double_quant = twice;
    int kept = silence();
    quantise("tests/golden/quant_plain", out, &o);
    unsilence(kept);
    read_tensor_file(&ours, strf("%s/model.safetensors", out));
    read_tensor_file(&theirs, strf("tests/golden/quant_%s/base/model.safetensors", kind));
    check_equal(label("quantize, %s: tensors", kind), ours.n, theirs.n);
    for (size_t i = 0; i < theirs.n; i++) {
        const StoredTensor *b = &theirs.tensors[i], *a = find_tensor(&ours, b->name);
        if (strstr(b->name, "quant_state") || (twice && strstr(b->name, "absmax"))) continue;
        check_true(label("quantize, %s: '%s' is there, as large", kind, b->name), a && a->bytes == b->bytes);
        check_equal_bits(label("quantize, %s: '%s'", kind, b->name), a->data, b->data, b->bytes, 1);
    }
}

// Folders of codes, as bitsandbytes and ChatGLM's releases write them: what codes stand for to the bit, then outputs and
// gradients of LoRA beside them.
static void test_quantised(void) {
    static const char *const kinds[] = { "nf4", "fp4", "double", "half", "int8", "release8", "release4" };
    Options o = options_of("lora");
    for (size_t k = 0; k < COUNT(kinds); k++) {
        const char *folder = strf("tests/golden/quant_%s", kinds[k]);
        TensorSet g = open_golden(folder);
        Dataset data = golden_samples(&g, "");
        Subject s = open_subject(folder, &data, &o);
        check_outputs(&s, &g);
        check_gradients(&s, &g);
        size_t n_full = 0;
        for (size_t i = 0; i < s.model->n_tensors; i++) {
            const Tensor *t = s.model->tensors[i];
            const StoredTensor *full = find_tensor(&g, strf("full.%s", t->name));
            if (!full) continue;
            real *numbers = device_take(t->n, sizeof *numbers, "numbers"), *host;
            widen_weight(numbers, weight_of(t), t->n);
            host = host_copy(numbers, t->n);
            float *floats = alloc(t->n, sizeof *floats);
            for (size_t j = 0; j < t->n; j++) floats[j] = (float)host[j];
            check_true(label("%s: '%s' is quantised", folder, t->name), t->scales);
            check_equal_bits(label("%s: numbers of '%s'", folder, t->name), floats, full->data, t->n, sizeof *floats);
            memory_give(numbers), free(host), free(floats), n_full++;
        }
        check_true(label("%s: matrices that were compared", folder), n_full >= 4);
        give_run(&s.run);
    }
    static const float values[] = { -1, -0.5f, 0.25f, 2 };
    check_equal("half way between two values the lower code counts", nearest_code(values, 4, -0.75f), 0);
    check_equal("and above it the higher", nearest_code(values, 4, nextafterf(-0.75f, 0)), 1);
    // a whole block is multiplied by 1 / scale, the last one divided by it: here they end on two sides of a middle
    float block[BLOCK] = { 0x1.228eaep+0f, -0x1.10aae8p-2f }, scale;
    uint8_t codes[BLOCK];
    code_blocks(codes, &scale, block, 2, BLOCK, code_values[NF4 - Q4], 16);
    check_equal("a block that is cut off is divided by its scale", codes[1], 4);
    code_blocks(codes, &scale, block, BLOCK, BLOCK, code_values[NF4 - Q4], 16);
    check_equal("a whole one multiplied by its inverse", codes[1], 5);
    test_quantising("nf4", 4, false);
    test_quantising("double", 4, true);
    test_quantising("int8", 8, false);
}

static void test_saved(void) {
    TensorSet g = open_golden("tests/golden/saved_hf"), peft_g = open_golden("tests/golden/saved_peft");
    Dataset data = golden_samples(&g, ""), peft_data = golden_samples(&peft_g, "");
    Options o = options_of("full");
    Subject hf = open_subject("tests/golden/saved_hf", &data, &o);
    Subject remote = open_subject("tests/golden/saved_remote", &data, &o);
    Subject peft = open_subject("tests/golden/saved_peft", &peft_data, &o);
    check_outputs(&hf, &g);
    check_outputs(&peft, &peft_g);
    check_same_forward(&hf, &remote);
    check_same_gradient(hf.model->embedding, remote.model->embedding, 0);
    check_same_gradient(hf.model->final_norm, remote.model->final_norm, 0);
    check_same_gradient(hf.model->head, remote.model->head, 0);
    for (size_t l = 0; l < hf.model->config.n_layers; l++)
        check_same_layer(&hf.model->layers[l], &remote.model->layers[l]);
}

// ---- LoRA as tools write it --------------------------------------------------------------------------------------

// Adapters whose target_modules are other models' names, a regular expression, paths and so on (TARGETS in
// reference.py), the maps that they act on, and so the list to save for PEFT.
static const struct { const char *folder, *maps; } targets[] = {
    { "list", "\"q_proj\", \"v_proj\"" }, { "one", "\"down_proj\"" },
    { "llama", "\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"down_proj\"" },
    { "regex", "\"q_proj\", \"o_proj\", \"gate_up_proj\"" },
    { "all_linear", "\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_up_proj\", \"down_proj\"" },
    { "exclude", "\"q_proj\", \"v_proj\", \"o_proj\"" }, { "paths", "\"k_proj\", \"down_proj\"" },
    { "layers", "\"v_proj\"" }, { "default", "\"q_proj\", \"gate_up_proj\"" },
};

static void test_targets(void) {
    for (size_t i = 0; i < COUNT(targets); i++) {
        const char *folder = strf("tests/golden/targets_%s", targets[i].folder);
        const char *list = strf("\"target_modules\": [%s]", targets[i].maps);
        TensorSet g = open_golden(folder);
        Dataset data = golden_samples(&g, "");
        Options o = default_options();
        Subject s = open_subject(folder, &data, &o);
        check_outputs(&s, &g);
        Text config = adapter_config(s.model, s.method, &s.options, "base");
        check_true(label("%s: saved with %s", folder, list), strstr(config.s, list));
        check_true(label("%s: what chose its maps is not saved", folder), !strstr(config.s, "exclude_modules"));
    }
}

// ---- Adapters on disk --------------------------------------------------------------------------------------------

// What is tuned, saved and opened again. Numbers are odd, so that none is a default.
static const struct { const char *name, *folder; Options options; } saved_cases[] = {
    { "of-peft", "tests/golden/saved_peft", { .method = "full" } },
    { "full", "tests/golden/saved_hf", { .method = "full" } },
    { "lora", "tests/golden/saved_hf", { .method = "lora", .r = 3, .lora_alpha = 5.5, .lora_dropout = 0.25,
                                         .target_modules = "k_proj,gate_up_proj", .use_rslora = true } },
    { "fused", "tests/golden/saved_remote", { .method = "lora", .r = 5, .lora_alpha = 7,
                                              .target_modules = "dense,query_key_value" } },
};

// Case k after one step of training, so that nothing is what it was, saved in a folder `out`.
static Subject save_trained(size_t k, const Dataset *data, const char *out) {
    Options o = saved_cases[k].options;
    o.optim = "adamw", o.adam_beta1 = 0.9, o.adam_beta2 = 0.999, o.adam_epsilon = 1e-8;
    Subject s = open_subject(saved_cases[k].folder, data, &o);
    const char *base = k ? saved_cases[k].folder : "tests/golden/saved_hf";
    optimizer_step(s.model, &s.options, 1e-2, 1);
    compute(&s);
    make_folders(out);
    save_adapter(out, s.model, s.method, &s.options, checked(realpath(base, NULL), PATH_MAX));
    return s;
}

static void check_same_options(const char *out, const Options *a, const Options *b) {
    check_equal(label("%s: r", out), (size_t)b->r, (size_t)a->r);
    check_equal_bits(label("%s: lora_alpha", out), &b->lora_alpha, &a->lora_alpha, 1, sizeof a->lora_alpha);
    check_equal_bits(label("%s: lora_dropout", out), &b->lora_dropout, &a->lora_dropout, 1, sizeof a->lora_dropout);
    check_true(label("%s: use_rslora", out), a->use_rslora == b->use_rslora);
}

static void check_reopened(size_t k, const Dataset *data) {
    const char *out = scratch(saved_cases[k].name);
    Options o = default_options();
    Subject s = save_trained(k, data, out), again = open_subject(out, data, &o);
    check_true(label("%s: its method", out), again.method == s.method);
    check_same_forward(&s, &again);
    if (!strcmp(s.method->name, "lora")) check_same_options(out, &s.options, &again.options);
    check_equal(label("%s: trained tensors", out), again.model->n_trained, s.model->n_trained);
    for (size_t i = 0; i < s.model->n_trained; i++) {
        const Tensor *t = s.model->trained[i], *u = again.model->trained[i];
        check_true(label("%s: %s is in its place", out, t->name), !strcmp(t->name, u->name));
        check_same(label("%s: %s", out, t->name), u->value, t->value, t->n);
    }
}

static bool same_shape(const StoredTensor *a, const StoredTensor *b) {
    return a && b && a->n_dims == b->n_dims && !memcmp(a->shape, b->shape, a->n_dims * sizeof *a->shape);
}

// What we write must be named and shaped as what PEFT wrote.
static void check_peft_names(const char *peft, const char *ours) {
    TensorSet a = {0}, b = {0};
    read_tensor_file(&a, strf("%s/adapter_model.safetensors", peft));
    read_tensor_file(&b, strf("%s/adapter_model.safetensors", ours));
    check_equal("tensors of an adapter that PEFT saved and of ours", b.n, a.n);
    for (size_t i = 0; i < a.n; i++)
        check_true(label("%s has %s in PEFT's shape", ours, a.tensors[i].name),
                   same_shape(&a.tensors[i], find_tensor(&b, a.tensors[i].name)));
    check_true("an adapter's metadata holds format=pt, as PEFT's does",
               strstr(b.metadata.s, "format=pt\n") && strstr(a.metadata.s, "format=pt\n"));
}

static void test_adapters(void) {
    TensorSet g = open_golden("tests/golden/saved_peft");
    Dataset data = golden_samples(&g, "");
    for (size_t k = 0; k < COUNT(saved_cases); k++) check_reopened(k, &data);
    check_peft_names("tests/golden/saved_peft", scratch("of-peft"));
}

// ---- Merging -----------------------------------------------------------------------------------------------------

// What a base tensor is after merging, before it is rounded.
static double *merged_exactly(const Subject *s, size_t index) {
    const Tensor *t = s->model->tensors[index];
    double *numbers = alloc(t->n, sizeof *numbers);
    void *host = alloc(t->n, dtype_size(t->dtype));
    StoredTensor now = { .dtype = t->dtype, .data = host };
    memory_copy_out(host, t->data, t->n * dtype_size(t->dtype));
    for (size_t i = 0; i < t->n; i++) numbers[i] = stored_number(&now, i);
    free(host);
    for (size_t l = 0; l < s->model->config.n_layers; l++)
        for (size_t k = 0; k < s->model->layers[l].n_maps; k++) {
            const Linear *w = &s->model->layers[l].maps[k];
            size_t r = w->weight == t && w->added.t[LORA_A] ? (size_t)s->options.r : 0;
            if (!r) continue;
            real *A = host_copy(w->added.t[LORA_A]->value, r * w->n_in);
            real *B = host_copy(w->added.t[LORA_B]->value, t->n / w->n_in * r);
            double root = s->options.use_rslora ? sqrt((double)r) : (double)r;
            double scale = s->options.lora_alpha / root;
            for (size_t i = 0; i < t->n; i++)
                for (size_t j = 0; j < r; j++)
                    numbers[i] += scale * (double)B[i / w->n_in * r + j] * (double)A[j * w->n_in + i % w->n_in];
            free(A), free(B);
        }
    return numbers;
}

// Half a unit in the last place of a bfloat16, the most that one rounding may change x by; with room for the error of
// `real`, which decides where x lies in the middle.
static double half_unit(double x) { return x == 0 ? 0 : ldexp(0.5 + 1e-4, ilogb(x) - bf16_format.mantissa); }

static void check_rounded_once(const char *what, const Tensor *merged, const double *exact) {
    size_t worst = 0;
    double most = 0;
    StoredTensor s = { .dtype = merged->file_dtype, .data = merged->file_data };
    for (size_t i = 0; i < merged->n; i++) {
        double units = fabs(stored_number(&s, i) - exact[i]) / fmax(half_unit(exact[i]), TINY);
        if (!(units <= most)) most = units, worst = i;
    }
    check_error(what, "half units", worst, stored_number(&s, worst), exact[worst], most, 1);
}

static void test_merge(void) {
    TensorSet g = open_golden("tests/golden/saved_peft");
    Dataset data = golden_samples(&g, "");
    for (size_t k = 0; k < COUNT(saved_cases); k++) {
        const char *adapter = scratch(strf("unmerged%zu", k)), *out = scratch(strf("merged%zu", k));
        Subject s = save_trained(k, &data, adapter);
        Options o = default_options();
        o.max_shard_size = 3e-6, GIVEN(&o, max_shard_size) = true;        // in GB: several shards even of this model
        int kept = silence();
        merge(adapter, out, &o);
        choose_precision();
        unsilence(kept);
        check_true(label("%s is in shards", out), exists(strf("%s/model.safetensors.index.json", out)));
        Model *merged = load_model(out);
        for (size_t i = 0; i < merged->n_tensors; i++) {
            check_equal(label("dtype of merged %s", merged->tensors[i]->name), merged->tensors[i]->file_dtype, BF16);
            check_rounded_once(label("merged %s", merged->tensors[i]->name), merged->tensors[i], merged_exactly(&s, i));
        }
    }
}

// ---- Accumulation ------------------------------------------------------------------------------------------------

// All gradients of a step, one after another.
static real *step_gradients(Subject *s, size_t batch_size, int64_t step, double *loss, size_t *n) {
    size_t *all = count_up(s->data.n), at = 0;
    *loss = accumulate_samples(&s->run, &s->data, all, s->data.n, batch_size, &s->options, step);
    *n = count_parameters(s->model->trained, s->model->n_trained);
    real *gradients = alloc(*n, sizeof *gradients);
    for (size_t i = 0; i < s->model->n_trained; at += s->model->trained[i++]->n)
        memory_copy_out(gradients + at, s->model->trained[i]->grad, s->model->trained[i]->n * sizeof *gradients);
    free(all);
    return gradients;
}

static double *as_doubles(const real *x, size_t n) {
    double *y = alloc(n, sizeof *y);
    for (size_t i = 0; i < n; i++) y[i] = (double)x[i];
    return y;
}

// The loss by its definition, from the logits of all samples as one batch: (1-e) nll + e mean_v(-log p_v).
static double smoothed_loss(Subject *s, double e) {
    size_t V = s->model->config.vocab_size, at = 0;
    double sum = 0;
    compute(s);
    for (size_t i = 0; i < s->data.n; at += s->data.samples[i++].n)
        for (size_t t = 1; t < s->data.samples[i].n; t++) {
            const real *logits = s->logits + (at + t - 1)*V;
            int32_t target = s->data.samples[i].labels[t];
            double total = 0, mean = 0;
            if (target == NO_TARGET) continue;
            for (size_t v = 0; v < V; v++) total += exp((double)logits[v]), mean += (double)logits[v] / (double)V;
            sum += log(total) - (1 - e) * (double)logits[target] - e * mean;
        }
    return sum / (double)s->data.n_targets;
}

static void test_accumulation_of(const char *method) {
    enum { SAMPLES = 16 };
    Subject s = make_subject(method, golden_model("tests/golden/glm4"), method, 31);
    double loss, want_loss, other_loss;
    size_t n;
    s.options.label_smoothing_factor = 0.1;
    s.data = random_samples(SAMPLES, 2, 13, s.model->config.vocab_size);
    s.run = describe_run(s.model, s.method, true, s.data.n_tokens, s.data.n_tokens);
    take_run(&s.run);
    real *one_by_one = step_gradients(&s, 1, 5, &want_loss, &n);
    double *gradients = as_doubles(one_by_one, n);
    for (size_t batch = 4; batch <= SAMPLES; batch *= 4) {
        real *got = step_gradients(&s, batch, 5, &loss, &n);
        const char *what = strf("%s: %zu batches of %zu against 16 of 1", method, SAMPLES / batch, batch);
        check_close_l2(label("%s: gradients", what), got, gradients, n, PRODUCTS(5e-6, 1e-12, 3e-3));
        check_number(label("%s: loss", what), loss, want_loss, PRODUCTS(1e-6, 1e-12, 5e-5));
    }
    if (strcmp(method, "lora")) {
        check_number("full: smoothed loss", want_loss, smoothed_loss(&s, 0.1), PRODUCTS(1e-6, 1e-12, 5e-5));
        check_number("full: loss in evaluation", evaluate(&s.run, &s.data, 3), smoothed_loss(&s, 0),
                     PRODUCTS(1e-6, 1e-12, 5e-5));
        return;
    }
    step_gradients(&s, 4, 6, &other_loss, &n);
    check_true("lora: another step drops other features", fabs(other_loss - want_loss) > 1e-4 * want_loss);
    s.options.seed++;
    step_gradients(&s, 4, 5, &other_loss, &n);
    check_true("lora: another seed drops other features", fabs(other_loss - want_loss) > 1e-4 * want_loss);
}

static void test_accumulation(void) {
    test_accumulation_of("lora");
    test_accumulation_of("full");
}

// ---- Recomputing -------------------------------------------------------------------------------------------------

// A run that computes the inside of layers twice gives the bits of one that keeps it, with dropout on.
static void check_recomputing(const char *folder, const char *method) {
    Subject s = make_subject(folder, golden_model(folder), method, 33);
    double loss[2];
    real *gradients[2];
    size_t n = 0;
    s.data = random_samples(9, 1, 17, s.model->config.vocab_size);
    for (int i = 0; i < 2; i++) {
        s.run = describe_run(s.model, s.method, i ? RECOMPUTES : KEEPS_ALL, s.data.n_tokens, s.data.n_tokens);
        take_run(&s.run);
        gradients[i] = step_gradients(&s, 4, 7, &loss[i], &n);
        give_run(&s.run);
    }
    check_equal_bits(label("%s, %s: gradients when recomputed", folder, method), gradients[1], gradients[0], n,
                     sizeof(real));
    check_true(label("%s, %s: loss when recomputed", folder, method), loss[0] == loss[1]);
}

static void test_recomputing(void) {
    static const char *const folders[] = { "tests/golden/chatglm", "tests/golden/glm_edge", "tests/golden/glm4" };
    for (size_t i = 0; i < COUNT(folders); i++)
        for (size_t k = 0; k < COUNT(methods); k++) check_recomputing(folders[i], methods[k].name);
}

// ---- Dropout -----------------------------------------------------------------------------------------------------
// With a unit matrix as A, LoRA keeps its dropped input as it is, so that the mask can be seen.

static Subject unit_lora(void) {
    Subject s = { .name = "unit", .model = golden_model("tests/golden/glm4"), .options = options_of("lora") };
    size_t H = s.model->config.hidden_size;
    s.options.r = (int64_t)H;
    s.options.lora_dropout = 0.25;
    s.options.target_modules = "q_proj,k_proj,gate_up_proj";
    bind_generated(s.model, 91);
    s.method = find_method("lora");
    s.method->setup(s.model, &s.options);
    start_trainables(s.model, 91, true);
    for (size_t i = 0; i < s.model->n_trained; i++)
        if (s.model->trained[i]->shape[1] == H && strstr(s.model->trained[i]->name, "lora_A")) {
            real *unit = alloc(H * H, sizeof *unit);
            for (size_t k = 0; k < H; k++) unit[k*H + k] = 1;
            memory_copy_in(s.model->trained[i]->value, unit, H * H * sizeof *unit);
            free(unit);
        }
    return s;
}

// What map `map` of layer `layer` dropped of each token in a step: true where it did.
static bool *dropped(Subject *s, size_t layer, size_t map, int64_t step) {
    size_t H = s->model->config.hidden_size, n = s->data.n_tokens * H, n_gradients, n_dropped = 0, n_wrong = 0;
    double loss;
    bool *mask = alloc(n, sizeof *mask);
    free(step_gradients(s, s->data.n, step, &loss, &n_gradients));
    const LayerState *k = &s->run.layers[layer];
    real *x = host_copy(map < 3 ? k->a : k->m, n), *z = host_copy(k->beside[map], n);
    for (size_t i = 0; i < n; i++) {
        mask[i] = z[i] == 0;
        n_dropped += mask[i];
        n_wrong += !mask[i] && !(fabs((double)z[i] / (double)x[i] * 0.75 - 1) < (in_bf16() ? 1e-2 : 1e-6));
    }
    free(x), free(z);
    check_equal("kept features that are not scaled by 1/(1-p)", n_wrong, 0);
    check_true(label("share dropped: %g", (double)n_dropped / (double)n),
               fabs((double)n_dropped / (double)n - 0.25) < 5 * sqrt(0.25 * 0.75 / (double)n));
    return mask;
}

// Masks that have nothing to do with each other agree in p^2 + (1-p)^2 of the features.
static void check_independent(const char *what, const bool *a, const bool *b, size_t n) {
    double same = 0, share = 0.25 * 0.25 + 0.75 * 0.75;
    for (size_t i = 0; i < n; i++) same += a[i] == b[i];
    check_true(label("masks of two %s: %g agree", what, same / (double)n),
               fabs(same / (double)n - share) < 6 * sqrt(share * (1 - share) / (double)n));
}

static void test_dropout_masks(void) {
    enum { TOKENS = 40 };
    Subject s = unit_lora();
    size_t H = s.model->config.hidden_size, half = TOKENS * H, n = 2 * half;
    Dataset one = random_samples(1, TOKENS, TOKENS, s.model->config.vocab_size);
    dataset_add(&s.data, one.samples[0]), dataset_add(&s.data, one.samples[0]);     // the same sample twice
    s.run = describe_run(s.model, s.method, true, 2 * TOKENS, 2 * TOKENS);
    take_run(&s.run);
    const bool *q = dropped(&s, 0, 0, 3), *again = dropped(&s, 0, 0, 3);
    check_true("the same step drops the same", !memcmp(q, again, n * sizeof *q));
    check_independent("samples", q, q + half, half);
    check_independent("tokens", q, q + H, half - H);
    check_independent("features", q, q + 1, half - 1);
    check_independent("maps", q, dropped(&s, 0, 1, 3), n);
    check_independent("maps of different inputs", q, dropped(&s, 0, 4, 3), n);
    check_independent("layers", q, dropped(&s, 1, 0, 3), n);
    check_independent("steps", q, dropped(&s, 0, 0, 4), n);
    s.options.seed++;
    check_independent("seeds", q, dropped(&s, 0, 0, 3), n);
}

// ---- The same bits with any number of threads --------------------------------------------------------------------

#if defined _OPENMP && !defined GLMTUNE_CUDA
static const char wide_config[] =       // large enough that every kernel uses its threads
    "{\"model_type\": \"glm4\", \"vocab_size\": 290, \"hidden_size\": 136, \"num_hidden_layers\": 1, \"head_dim\": 36,"
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 4, \"intermediate_size\": 150, \"attention_bias\": true,"
    " \"tie_word_embeddings\": true, \"max_position_embeddings\": 256}";

// Two steps of training; all that may not depend on threads, as bytes: losses, norms, gradients, the adapter's file.
static Text train_with(const char *method, int threads, const Dataset *data, size_t run) {
    Text bytes = {0};
    size_t n;
    omp_set_num_threads(threads);
    Subject s = make_subject(method, describe_model(parse_config("wide model", wide_config)), method, 41);
    s.data = *data;
    s.run = describe_run(s.model, s.method, true, data->n_tokens, data->n_tokens);
    take_run(&s.run);
    for (int64_t step = 0; step < 2; step++) {
        double loss, norm;
        real *gradients = step_gradients(&s, data->n, step, &loss, &n);
        norm = clip_gradients(s.model, 0.5);
        optimizer_step(s.model, &s.options, 1e-3, step + 1);
        text_add(&bytes, (char *)&loss, sizeof loss);
        text_add(&bytes, (char *)&norm, sizeof norm);
        text_add(&bytes, (char *)gradients, n * sizeof *gradients);
        free(gradients);
    }
    const char *folder = scratch(strf("threads-%s-%zu", method, run));
    make_folders(folder);
    save_adapter(folder, s.model, s.method, &s.options, "/");
    char *file = read_file(strf("%s/adapter_model.safetensors", folder), &n);
    text_add(&bytes, file, n);
    give_run(&s.run);
    return bytes;
}

static void test_threads(void) {
    static const int threads[] = { 1, 2, 3, 3 };
    static const char *const tuned[] = { "lora", "full", "ptuning", "adapter" };
    int before = omp_get_max_threads();
    Dataset data = random_samples(5, 70, 75, 290);
    check_true("the threads test is large enough", data.n_tokens > 240 && data.n_tokens * 136 > WORTH_THREADS &&
               HEAD_ROWS * 290 > WORTH_THREADS && 290 * 136 > WORTH_THREADS);
    for (size_t m = 0; m < COUNT(tuned); m++) {
        Text first = train_with(tuned[m], threads[0], &data, 0);
        for (size_t i = 1; i < COUNT(threads); i++) {
            Text again = train_with(tuned[m], threads[i], &data, i);
            check_true(label("%s: %d threads give the bits of one", tuned[m], threads[i]),
                       again.n == first.n && !memcmp(again.s, first.s, first.n));
            free(again.s);
        }
        free(first.s);
    }
    omp_set_num_threads(before);
}
#else
static void test_threads(void) { check_skipped("threads", "no kernels of the CPU that use several"); }
#endif

// ---- Slopes: every gradient against finite differences -----------------------------------------------------------

#ifdef GLMTUNE_DOUBLE
// One number that is none is not forgotten for the right ones behind it.
static void test_slope_of_nan(void) {
    Options o = default_options();
    Model *m = describe_model(parse_config("small model", gradcheck_configs[0]));
    const Method *full = find_method("full");
    size_t n_targets;
    Batch b = random_batch(m->config.vocab_size, 42, &n_targets);
    bind_random(m, 42, 0.1);
    full->setup(m, &o), start_trainables(m, 42, true);
    Run r = describe_run(m, full, KEEPS_ALL, b.T, b.T);
    Slope slope = { &r, &b, n_targets, 0 };
    take_run(&r), zero_gradients(m);
    forward_backward(&r, &b, n_targets, 0, true);
    const Tensor *t = m->trained[m->n_trained - 1];
    real *g = alloc(t->n, sizeof *g);
    memory_copy_out(g, t->grad, t->n * sizeof *g);
    int kept = silence();
    bool right = check_tensor(&slope, t, g, 10);
    g[0] = NAN;
    bool of_nan = check_tensor(&slope, t, g, 10);
    unsilence(kept);
    check_equal("a gradient passes as it is", right, true);
    check_equal("and with one NaN", of_nan, false);
}

static void test_slopes(void) {
    for (size_t i = 0; i < COUNT(gradcheck_configs); i++)
        for (size_t k = 0; k < COUNT(methods); k++) {
            Model *m = describe_model(parse_config("small model", gradcheck_configs[i]));
            Options o = default_options();
            o.std = o.label_smoothing_factor = o.lora_dropout = 0.1;
            o.elements = 20;
            o.target_modules = all_maps(m);
            bind_random(m, (uint64_t)o.seed, o.std);
            int kept = silence();
            size_t failed = gradcheck_method(&(Gradcheck){ .o = &o }, m, &methods[k]);
            unsilence(kept);
            check_equal(label("config %zu, %s: gradients that differences contradict", i, methods[k].name), failed, 0);
        }
    test_slope_of_nan();
}
#else
static void test_slopes(void) { check_skipped("slopes", "finite differences need the double build"); }
#endif

// ---- What is frozen ----------------------------------------------------------------------------------------------

static const real untouched = 7;

static void mark(real *x, size_t n) { fill_uniform(x, 0, (float)untouched, 0, n); }

static bool is_marked(const real *device, size_t n) {
    real *x = host_copy(device, n);
    size_t i = 0;
    while (i < n && x[i] == untouched) i++;
    free(x);
    return i == n;
}

// One tensor trains alone: its gradient is the one it has when all train, and no gradient is computed further down.
static void check_alone(const Subject *all, size_t index, uint64_t seed) {
    Subject s = { .name = "alone", .model = golden_model(all->name), .method = find_method("full"), .data = all->data };
    bind_generated(s.model, seed);
    Tensor *t = s.model->tensors[index];
    const Config *c = &s.model->config;
    size_t T = s.data.n_tokens, last = c->n_layers - 1;
    train_tensor(s.model, t);
    start_trainables(s.model, 0, true);
    s.run = describe_run(s.model, s.method, true, T, T);
    take_run(&s.run);
    mark(s.run.dx_rows, T * c->hidden_size), mark(s.run.dh, T * c->ffn_dim), mark(s.run.dq, T * c->n_heads * c->head_dim);
    compute(&s);
    check_same(label("%s trains alone: its gradient", t->name), t->grad, all->model->tensors[index]->grad, t->n);
    for (size_t i = 0; i < s.model->n_tensors; i++)
        if (i != index) check_true(label("%s trains alone: %s has no gradient", t->name, s.model->tensors[i]->name),
                                   !s.model->tensors[i]->grad);
    check_true(label("%s trains alone: gradients reach the stream below the head when they must", t->name),
               is_marked(s.run.dx_rows, T * c->hidden_size) == (t->depth > depth_of(c->n_layers, 0)));
    check_true(label("%s trains alone: gradients pass the last down map when they must", t->name),
               is_marked(s.run.dh, T * c->ffn_dim) == (t->depth >= depth_of(last, AT_DOWN)));
    check_true(label("%s trains alone: gradients pass the last attention when they must", t->name),
               is_marked(s.run.dq, T * c->n_heads * c->head_dim) == (t->depth >= depth_of(last, AT_O)));
    give_run(&s.run);
}

// LoRA beside one kind of map: as long as every B is zero, its gradient is the one it has beside all maps.
static void check_lora_alone(const Subject *all, const char *target) {
    Subject s = { .name = target, .model = golden_model(all->name), .options = all->options, .data = all->data };
    s.options.target_modules = target;
    s.method = find_method("lora");
    bind_generated(s.model, 51);
    s.method->setup(s.model, &s.options);
    start_trainables(s.model, 51, true);
    compute(&s);
    check_same_forward(&s, all);
    check_equal(label("LoRA beside %s: trained tensors", target), s.model->n_trained, 2 * s.model->config.n_layers);
    for (size_t i = 0; i < s.model->n_trained; i++)
        for (size_t k = 0; k < all->model->n_trained; k++)
            if (!strcmp(s.model->trained[i]->name, all->model->trained[k]->name))
                check_same(label("LoRA beside %s alone: gradient of %s", target, s.model->trained[i]->name),
                           s.model->trained[i]->grad, all->model->trained[k]->grad, s.model->trained[i]->n);
    give_run(&s.run);
}

static void check_frozen_lora(const char *folder, const Dataset *data) {
    Subject s = { .name = folder, .model = golden_model(folder), .options = default_options(), .data = *data };
    Subject base = { .name = "its base", .model = golden_model(folder), .data = *data };
    const Layer *l = &s.model->layers[0];
    s.method = find_method("lora");
    s.options.target_modules = all_maps(s.model);
    bind_generated(s.model, 51), bind_generated(base.model, 51);
    s.method->setup(s.model, &s.options);
    start_trainables(s.model, 51, true);
    compute(&s);
    for (size_t i = 0; i < s.model->n_tensors; i++)
        check_true(label("LoRA: %s is frozen", s.model->tensors[i]->name),
                   !s.model->tensors[i]->grad && !s.model->tensors[i]->value && !s.model->tensors[i]->trained);
    base.model->lowest = SIZE_MAX;
    compute(&base);
    check_same_forward(&s, &base);
    for (size_t i = 0; i < l->n_maps; i++) check_lora_alone(&s, l->maps[i].short_name);
}

// Each map drops features of its own.
static void check_sites(const Model *m) {
    for (size_t i = 0; i < m->config.n_layers * MAX_MAPS; i++) {
        size_t count = 0;
        for (size_t l = 0; l < m->config.n_layers; l++)
            for (size_t k = 0; k < m->layers[l].n_maps; k++) count += m->layers[l].maps[k].site == i;
        check_true(label("site %zu belongs to at most one map", i), count <= 1);
    }
}

// A starts uniform on +-1/sqrt(in), B at zero.
static void check_lora_start(const Model *m) {
    for (size_t i = 0; i < m->n_trained; i++) {
        const Tensor *t = m->trained[i];
        double largest = 0, bound = strstr(t->name, "lora_A") ? 1 / sqrt((double)t->shape[1]) : 0;
        real *value = host_copy(t->value, t->n);
        for (size_t k = 0; k < t->n; k++)       // a NaN stays; not fmax, on which gcc 12 for ARM breaks down
            if (fabs((double)value[k]) > largest || isnan(value[k])) largest = fabs((double)value[k]);
        check_true(label("%s starts within +-%g: %g", t->name, bound, largest),
                   largest <= bound * (1 + 1e-6) && largest >= 0.9 * bound);
        free(value);
    }
}

static void test_frozen(void) {
    static const char *const folders[] = { "tests/golden/glm4", "tests/golden/glm_edge", "tests/golden/chatglm" };
    for (size_t k = 0; k < COUNT(folders); k++) {
        Model *m = golden_model(folders[k]);
        Dataset data = random_samples(4, 2, 9, m->config.vocab_size);
        Subject s = make_subject(folders[k], m, "full", 51);
        s.data = data;
        compute(&s);
        for (size_t i = 0; i < m->n_tensors; i++) check_alone(&s, i, 51);
        check_frozen_lora(folders[k], &data);
        check_sites(m);
    }
    Model *m = golden_model("tests/golden/glm4");
    Options o = default_options();
    o.r = 64;
    bind_generated(m, 1);
    find_method("lora")->setup(m, &o);
    start_trainables(m, 1, false);
    check_lora_start(m);
}

// ---- Schedules and clipping --------------------------------------------------------------------------------------

static void test_schedules(void) {
    static const struct { const char *schedule; int64_t step, warmup, total; double rate; } cases[] = {
        { "constant", 0, 0, 10, 1 }, { "constant", 9, 0, 10, 1 }, { "constant", 0, 4, 10, 0 },
        { "constant", 3, 4, 10, 0.75 },
        { "linear", 0, 0, 10, 1 }, { "linear", 9, 0, 10, 0.1 }, { "linear", 6, 2, 10, 0.5 },
        { "linear", 1, 2, 10, 0.5 },
        { "cosine", 0, 0, 4, 1 }, { "cosine", 1, 0, 4, 0.85355339059327376 }, { "cosine", 2, 0, 4, 0.5 },
        { "cosine", 6, 2, 10, 0.5 }, { "cosine", 0, 1, 1, 0 }, { "linear", 0, 1, 1, 0 }, { "linear", 1, 1, 1, 0 },
    };
    static const struct { double ratio; int64_t steps, total, warmup; } warmups[] = {
        { 0.03, 0, 100, 3 }, { 0.03, 0, 101, 4 }, { 0, 0, 50, 0 }, { 0.5, 7, 100, 7 }, { 1, 0, 9, 9 } };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *schedule = cases[i].schedule;
        double rate = scheduled_rate(schedule, 2, cases[i].step, cases[i].warmup, cases[i].total);
        double twice = 2 * cases[i].rate;
        check_arrays(label("%s at step %d of %d", schedule, (int)cases[i].step, (int)cases[i].total), &rate,
                     sizeof rate, &twice, 1, false, 1, 1e-15);
    }
    for (size_t i = 0; i < COUNT(warmups); i++) {
        Options o = { .warmup_ratio = warmups[i].ratio, .warmup_steps = warmups[i].steps };
        check_equal(label("warm-up %zu", i), (size_t)warmup_of(&o, warmups[i].total), (size_t)warmups[i].warmup);
    }
}

// ---- Generation --------------------------------------------------------------------------------------------------

// The logits after n tokens, fed to a cache in parts of this size.
static real *fed_logits(const Subject *s, const int32_t *ids, size_t n, size_t part) {
    Generator g = make_generator(s->model, s->method, n, 1);
    for (size_t at = 0; at < n; at += part) feed(&g, ids + at, min_size(part, n - at));
    give_run(&g.run);
    return g.logits;
}

// However a text is fed, the logits are those that training computes; they differ by the order of sums alone.
static void check_feeding(const char *folder, const char *method) {
    Subject s = make_subject(folder, golden_model(folder), method, 61);
    size_t V = s.model->config.vocab_size, n = PREFILL + 44, parts[] = { n, 1, 100, PREFILL };
    s.data = random_samples(1, n, n, V);
    compute(&s);
    double *want_logits = as_doubles(s.logits + (n - 1)*V, V);
    for (size_t i = 0; i < COUNT(parts); i++)
        check_close(label("%s, %s: logits after %zu tokens in parts of %zu", folder, method, n, parts[i]),
                    fed_logits(&s, s.data.samples[0].ids, n, parts[i]), want_logits, V,
                    PRODUCTS(8e-6, 2e-14, 8e-2));
    give_run(&s.run);
}

static void test_draw_token(void) {
    // probabilities 1/2, 1/4, 1/8, 1/8 for the ids 2, 0, 1, 3
    const real l = (real)0.69314718055994531, logits[] = { 2*l, l, 3*l, l }, flat[] = { 1, 1, 1 };
    static const struct { double temperature, top_p; float uniform; int32_t id; } cases[] = {
        { 0, 1, 0.99f, 2 }, { 1, 1, 0, 2 }, { 1, 1, 0.49f, 2 }, { 1, 1, 0.51f, 0 }, { 1, 1, 0.74f, 0 },
        { 1, 1, 0.76f, 1 },
        { 1, 1, 0.87f, 1 }, { 1, 1, 0.88f, 3 }, { 1, 1, 0.99999f, 3 },
        { 1, 0.4, 0.99f, 2 }, { 1, 0.6, 0.66f, 2 }, { 1, 0.6, 0.67f, 0 }, { 1, 0.8, 0.85f, 0 }, { 1, 0.8, 0.86f, 1 },
        { 1, 0.8, 0.88f, 1 }, { 1, 0, 0.99f, 2 },
        { 0.5, 1, 0.72f, 2 }, { 0.5, 1, 0.73f, 0 }, { 0.5, 1, 0.90f, 0 }, { 0.5, 1, 0.92f, 1 }, { 1e-3, 1, 0.99f, 2 },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        double temperature = cases[i].temperature, top_p = cases[i].top_p;
        int32_t id = draw_token(logits, 4, temperature, top_p, cases[i].uniform);
        check_equal(label("token drawn at temperature %g, top_p %g, %g", temperature, top_p, (double)cases[i].uniform),
                    (size_t)id, (size_t)cases[i].id);
    }
    check_equal("the first of equals", (size_t)draw_token(flat, 3, 0, 1, 0.5f), 0);
}

static void test_whole_characters(void) {
    static const struct { const char *s; size_t n; } cases[] = {
        { "", 0 }, { "a", 1 }, { "a\xC3", 1 }, { "a\xC3\xA9", 3 }, { "\xE4", 0 }, { "\xE4\xBD", 0 },
        { "\xE4\xBD\xA0", 3 },
        { "x\xF0\x9F\x9A", 1 }, { "x\xF0\x9F\x9A\x80", 5 }, { "\x80\x80\x80\x80", 4 }, { "a\xF0", 1 },
        { "\xE4\xBD\xA0\xE5", 3 },
        { "\xE4" "ab", 3 },
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        check_equal(label("whole characters %zu", i), whole_characters(cases[i].s, strlen(cases[i].s)), cases[i].n);
}

// generate() draws, feeds and stops as the loop written out here does; a stop token ends it and is not in the answer.
static void test_generate(void) {
    Subject s = make_subject("generate", golden_model("tests/golden/glm_bias"), "lora", 71);
    const int32_t prompt[] = { 3, 1, 4, 1, 5 };
    ChatFormat f = { .stops = { -1, -1, -1 } };
    enum { N = 12 };
    Generator g = make_generator(s.model, s.method, 64, 1), h = make_generator(s.model, s.method, 64, 1);
    Ids answer = {0}, stopped = {0};
    int32_t by_hand[N];
    feed(&h, prompt, COUNT(prompt));
    for (size_t i = 0; i < N; i++) {
        by_hand[i] = draw_token(h.logits, s.model->config.vocab_size, 0, 1, 0);
        feed(&h, &by_hand[i], 1);
    }
    feed(&g, prompt, COUNT(prompt));
    check_true("without a stop token generation goes on to the last", !generate(&g, &f, &s.options, N, &answer, NULL));
    check_equal("tokens generated", answer.n, N);
    check_equal_bits("tokens as drawn by hand", answer.ids, by_hand, N / 2, 2 * sizeof *by_hand);
    size_t first = 0;
    while (by_hand[first] != by_hand[N/2]) first++;
    f.stops[1] = by_hand[first];
    g.run.caches->n = 0;
    feed(&g, prompt, COUNT(prompt));
    check_true("a stop token stops", generate(&g, &f, &s.options, N, &stopped, NULL) && is_stop(&f, by_hand[first]));
    check_equal("the answer ends before it", stopped.n, first);
    f.stops[1] = -1;
    g.run.caches->n = 0;
    feed(&g, prompt, COUNT(prompt));
    stopped.n = 0;
    check_true("a full cache ends it too", !generate(&g, &f, &s.options, 1000, &stopped, NULL));
    check_equal("tokens until the cache is full", stopped.n, 64 - COUNT(prompt));
}

static void test_generation(void) {
    static const char *const folders[] = { "tests/golden/glm4", "tests/golden/chatglm", "tests/golden/glm_edge" };
    for (size_t i = 0; i < COUNT(folders); i++) check_feeding(folders[i], "lora");
    check_feeding("tests/golden/glm_bias", "full");
    test_draw_token();
    test_whole_characters();
    test_generate();
}

// ---- Numbers of the released code --------------------------------------------------------------------------------
// Written by the remote modules themselves (chatglm.cpp, tests/data): float numbers one after another, no header.

typedef struct { const char *p, *end; } Numbers;

static const void *next_bytes(Numbers *f, size_t n) {
    if ((size_t)(f->end - f->p) < n) fail("tests: a golden file is too short");
    const void *at = f->p;
    f->p += n;
    return at;
}

static real *next_reals(Numbers *f, size_t n) {
    real *x = device_take(n, sizeof *x, "a golden file");
    widen(x, memory_mapped(next_bytes(f, n * sizeof(float)), n * sizeof(float)), F32, n);
    return x;
}

static double *next_truth(Numbers *f, size_t n) { return as_doubles(host_copy(next_reals(f, n), n), n); }

static Numbers open_numbers(const char *path) {
    size_t n;
    char *bytes = read_file(path, &n);
    return (Numbers){ bytes, bytes + n };
}

static void check_released_parts(void) {
    enum { IN = 64, OUT = 32, TOKENS = 3, ROWS = 2 };
    Numbers f = open_numbers(real_file("golden/rms_norm.data"));
    real *gain = next_reals(&f, IN), *x = next_reals(&f, TOKENS*IN);
    real *rms = device_take(TOKENS, sizeof *rms, "a test"), *y = device_take(TOKENS*IN, sizeof *y, "a test");
    rmsnorm_forward(y, rms, x, gain, (real)1e-5, TOKENS, IN);
    check_close("rms_norm.data", host_copy(y, TOKENS*IN), next_truth(&f, TOKENS*IN), TOKENS*IN, 1e-6);
    f = open_numbers(real_file("golden/linear.data"));
    const real *w = next_reals(&f, OUT*IN), *bias = next_reals(&f, OUT), *in;
    for (size_t rows = ROWS; rows > 0; rows--) {
        real *out = device_take(rows*OUT, sizeof *out, "a test");
        in = next_reals(&f, rows*IN);
        linear_forward(out, NULL, in, (Weight){ w, REAL, 0, NULL }, 1, rows, OUT, IN);
        bias_forward(out, bias, rows, OUT);
        check_close(label("linear.data, %zu rows", rows), host_copy(out, rows*OUT), next_truth(&f, rows*OUT), rows*OUT,
                    1e-6);
    }
    check_true("linear.data is read to its end", f.p == f.end);
}

static const char released_config[] =
    "{\"model_type\": \"chatglm\", \"padded_vocab_size\": 5, \"hidden_size\": 32, \"num_layers\": 1,"
    " \"kv_channels\": 4, \"num_attention_heads\": 8, \"multi_query_attention\": true,"
    " \"multi_query_group_num\": 2, \"ffn_hidden_size\": 48, \"add_qkv_bias\": true, \"layernorm_epsilon\": 1e-5}";

static void check_released_model(void) {
    static const size_t steps[] = { 3, 1, 1 };
    Numbers f = open_numbers(real_file("golden/glm3_model.data"));
    Model *m = describe_model(parse_config("glm3_model.data", released_config));
    size_t H = m->config.hidden_size;
    for (size_t i = 0; i < m->n_tensors; i++) {     // the file has no head
        Tensor *t = m->tensors[i];
        bind_tensor(t, t == m->head ? device_take(t->n, sizeof(real), "a head") : next_reals(&f, t->n), REAL);
    }
    Generator g = make_generator(m, NULL, 16, 1);
    for (size_t i = 0; i < COUNT(steps); i++) {
        size_t starts[] = { 0, steps[i] };
        Batch b = { .ids = (int32_t *)next_bytes(&f, steps[i] * sizeof *b.ids), .starts = starts, .n = 1, .T = steps[i],
                    .every_row = true };
        forward(&g.run, &b, false);
        g.run.caches->n += steps[i];
        check_close(label("glm3_model.data, step %zu", i + 1), host_copy(g.run.final, steps[i]*H),
                    next_truth(&f, steps[i]*H), steps[i]*H, 1e-6);
    }
    check_true("glm3_model.data is read to its end", f.p == f.end);
}

static void test_released(void) {
    if (!real_file("")) { check_skipped("released", "GLM_REAL is not set"); return; }
    check_released_parts();
    check_released_model();
}
