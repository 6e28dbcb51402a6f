// Tests of the tuning methods beside LoRA and full tuning: golden numbers (tests/reference_methods.py), files, what
// leaves the base as it is.

// ---- Golden cases ------------------------------------------------------------------------------------------------

enum { GOLDEN_PREFIX = 5 };

static const struct { const char *name; Options options; } method_cases[] = {
    { "prefix_peft", { .method = "ptuning" } },
    { "prefix_peft_projected", { .method = "ptuning", .prefix_projection = true, .encoder_hidden_size = 6 } },
    { "prefix_chatglm", { .method = "ptuning" } },
    { "prefix_chatglm_projected", { .method = "ptuning", .prefix_projection = true, .encoder_hidden_size = 7,
                                    .ptuning_positions = "chatglm" } },
    { "adapter_houlsby", { .method = "adapter", .adapter_type = "houlsby", .reduction_factor = 8 } },
    { "adapter_houlsby4", { .method = "adapter", .adapter_type = "houlsby", .reduction_factor = 9 } },
    { "adapter_pfeiffer", { .method = "adapter", .adapter_type = "pfeiffer", .reduction_factor = 8 } },
    { "adapter_pfeiffer4", { .method = "adapter", .adapter_type = "pfeiffer", .reduction_factor = 9 } },
};

// The defaults, with what a method of the table above has of its own.
static Options method_options(const Options *own) {
    Options o = default_options();
    o.method = own->method;
    o.num_virtual_tokens = GOLDEN_PREFIX;
    o.prefix_projection = own->prefix_projection, o.encoder_hidden_size = own->encoder_hidden_size;
    o.ptuning_positions = own->ptuning_positions;
    if (own->adapter_type) o.adapter_type = own->adapter_type, o.reduction_factor = own->reduction_factor;
    if (own->trainable_layers) o.trainable_layers = own->trainable_layers;
    o.trainable_modules = own->trainable_modules;
    o.trainable_head = own->trainable_head, o.trainable_embedding = own->trainable_embedding;
    return o;
}

static void test_method_golden(void) {
    for (size_t i = 0; i < COUNT(method_cases); i++) {
        const char *folder = strf("tests/golden/%s", method_cases[i].name);
        TensorSet g = open_golden(folder);
        Subject s = { .name = method_cases[i].name, .model = golden_model(folder),
                      .options = method_options(&method_cases[i].options), .data = golden_samples(&g, "") };
        bind_generated(s.model, golden_seed(&g));
        begin_tuning(&s, golden_seed(&g));
        compute(&s);
        check_outputs(&s, &g);
        check_gradients(&s, &g);
        give_run(&s.run);
    }
    TensorSet g = open_golden("tests/golden/saved_prefix");
    Dataset data = golden_samples(&g, "");
    Options o = default_options();
    Subject s = open_subject("tests/golden/saved_prefix", &data, &o);
    check_outputs(&s, &g);
}

// ---- Files -------------------------------------------------------------------------------------------------------

static const struct { const char *name, *folder; Options options; } method_files[] = {
    { "prefix", "tests/golden/saved_hf", { .method = "ptuning" } },
    { "prefix-mlp", "tests/golden/saved_hf", { .method = "ptuning", .prefix_projection = true } },
    { "prefix-official", "tests/golden/saved_remote", { .method = "ptuning" } },
    { "prefix-official-mlp", "tests/golden/saved_remote", { .method = "ptuning", .prefix_projection = true,
                                                            .encoder_hidden_size = 3 } },
    { "prefix-mixed", "tests/golden/saved_hf", { .method = "ptuning", .ptuning_positions = "chatglm" } },
    { "prefix-mixed-2", "tests/golden/saved_remote", { .method = "ptuning", .ptuning_positions = "peft" } },
    { "houlsby", "tests/golden/saved_remote", { .method = "adapter", .adapter_type = "houlsby",
                                                .reduction_factor = 5 } },
    { "pfeiffer", "tests/golden/saved_hf", { .method = "adapter", .adapter_type = "pfeiffer",
                                             .reduction_factor = 3 } },
    { "freeze", "tests/golden/saved_hf", { .method = "freeze", .trainable_layers = 1, .trainable_head = true } },
    { "freeze-some", "tests/golden/saved_remote", { .method = "freeze", .trainable_modules = "dense,dense_h_to_4h",
                                                    .trainable_embedding = true } },
};

// What is tuned, saved and opened again gives the same bits.
static void test_method_files(void) {
    TensorSet g = open_golden("tests/golden/saved_peft");
    Dataset data = golden_samples(&g, "");
    for (size_t k = 0; k < COUNT(method_files); k++) {
        const char *out = scratch(strf("methods-%s", method_files[k].name));
        Options o = method_options(&method_files[k].options), fresh = default_options();
        Subject s = open_subject(method_files[k].folder, &data, &o);
        optimizer_step(s.model, &s.options, 1e-2, 1);
        compute(&s);
        make_folders(out);
        save_adapter(out, s.model, s.method, &s.options, checked(realpath(method_files[k].folder, NULL), PATH_MAX));
        Subject again = open_subject(out, &data, &fresh);
        check_true(label("%s: its method", out), again.method == s.method);
        check_same_forward(&s, &again);
        check_equal(label("%s: trained tensors", out), again.model->n_trained, s.model->n_trained);
        for (size_t i = 0; i < s.model->n_trained; i++)
            check_same(label("%s: %s", out, s.model->trained[i]->name), again.model->trained[i]->value,
                       s.model->trained[i]->value, s.model->trained[i]->n);
        for (size_t i = 0; i < s.model->n_trained; i++)
            check_same(label("%s: gradient of %s", out, s.model->trained[i]->name), again.model->trained[i]->grad,
                       s.model->trained[i]->grad, s.model->trained[i]->n);
    }
}

// ---- What leaves the base as it is -------------------------------------------------------------------------------

// A model whose method has just begun, or with all that it adds at zero, beside the base.
static void check_beginning(const char *folder, const Options *o, bool zeros, bool same) {
    Subject s = { .name = o->method, .model = golden_model(folder), .options = *o };
    Subject base = { .name = "its base", .model = golden_model(folder) };
    s.data = base.data = random_samples(4, 2, 9, s.model->config.vocab_size);
    bind_generated(s.model, 51), bind_generated(base.model, 51);
    s.method = find_method(o->method);
    s.method->setup(s.model, &s.options);
    start_trainables(s.model, 51, true);
    for (size_t i = 0; zeros && i < s.model->n_trained; i++)
        zero(s.model->trained[i]->value, s.model->trained[i]->n);
    base.model->lowest = SIZE_MAX;
    compute(&s), compute(&base);
    if (same) check_same_forward(&s, &base);
    else check_true(label("%s: a prefix of zeros changes the logits, for its keys take their share of every softmax",
                          folder), memcmp(s.logits, base.logits, n_logits(&s) * sizeof *s.logits));
    give_run(&s.run), give_run(&base.run);
}

static void test_beginnings(void) {
    static const char *const folders[] = { "tests/golden/glm4", "tests/golden/glm_edge", "tests/golden/chatglm" };
    for (size_t i = 0; i < COUNT(folders); i++) {
        for (size_t k = 0; k < COUNT(methods); k++) {
            Options o = options_of(methods[k].name);
            if (strcmp(methods[k].name, "ptuning")) check_beginning(folders[i], &o, false, true);
        }
        Options pfeiffer = options_of("adapter"), prefix = options_of("ptuning");
        pfeiffer.adapter_type = "pfeiffer";
        check_beginning(folders[i], &pfeiffer, false, true);
        check_beginning(folders[i], &prefix, true, false);
    }
}

// ---- A prefix's dropout -------------------------------------------------------------------------------------------

static Subject method_subject(const char *folder, const Options *o, uint64_t seed) {
    Subject s = { .name = o->method, .model = golden_model(folder), .options = *o };
    bind_generated(s.model, seed);
    begin_tuning(&s, seed);
    s.data = random_samples(12, 2, 11, s.model->config.vocab_size);
    s.run = describe_run(s.model, s.method, KEEPS_ALL, s.data.n_tokens, s.data.n_tokens);
    take_run(&s.run);
    return s;
}

// However the samples of a step are cut into batches, it is the same step.
static void test_prefix_dropout(void) {
    Options o = options_of("ptuning");
    o.num_virtual_tokens = 6, o.prefix_dropout = 0.3, o.ptuning_positions = "chatglm", o.prefix_projection = true;
    Subject s = method_subject("tests/golden/chatglm", &o, 31);
    double loss, want_loss, other;
    size_t n;
    real *one_by_one = step_gradients(&s, 1, 5, &want_loss, &n);
    double *want = as_doubles(one_by_one, n);
    real *got = step_gradients(&s, 4, 5, &loss, &n);
    check_close_l2("a prefix's dropout, batches of 4 against 1: gradients", got, want, n, PRODUCTS(5e-6, 1e-12, 3e-3));
    check_number("a prefix's dropout, batches of 4 against 1: loss", loss, want_loss, PRODUCTS(1e-6, 1e-12, 5e-5));
    step_gradients(&s, 4, 6, &other, &n);
    check_true("another step drops other features of a prefix", fabs(other - loss) > 1e-4 * loss);
    s.run.model->added.dropout = 0;
    step_gradients(&s, 4, 5, &other, &n);
    check_true("a prefix's dropout changes the loss", fabs(other - loss) > 1e-4 * loss);
}

// ---- Slopes of what the table of methods has no row for ----------------------------------------------------------

static void test_method_slopes(void) {
#ifdef GLMTUNE_DOUBLE
    static const Options variants[] = {
        { .method = "ptuning", .ptuning_positions = "chatglm", .prefix_projection = true },
        { .method = "ptuning", .ptuning_positions = "peft", .prefix_projection = true },
        { .method = "ptuning", .ptuning_positions = "peft" },
        { .method = "adapter", .adapter_type = "pfeiffer", .reduction_factor = 4 },
        { .method = "freeze", .trainable_layers = 1, .trainable_embedding = true },
    };
    for (size_t i = 0; i < COUNT(gradcheck_configs); i++)
        for (size_t k = 0; k < COUNT(variants); k++) {
            Model *m = describe_model(parse_config("small model", gradcheck_configs[i]));
            Options o = method_options(&variants[k]);
            o.std = o.label_smoothing_factor = o.prefix_dropout = 0.1;
            o.elements = 20;
            bind_random(m, (uint64_t)o.seed, o.std);
            int kept = silence();
            size_t failed = gradcheck_method(&(Gradcheck){ .o = &o }, m, find_method(o.method));
            unsilence(kept);
            check_equal(label("config %zu, %s %zu: gradients that differences contradict", i, o.method, k), failed, 0);
        }
#else
    check_skipped("slopes of methods", "finite differences need the double build");
#endif
}

// ---- Numbers of the released code --------------------------------------------------------------------------------

static void test_released_prefix(void) {
    enum { LAYERS2 = 2, GROUPS = 2, P = 5, D = 4, WIDTH = LAYERS2 * GROUPS * D };
    static const size_t steps[] = { 3, 1, 1 };
    if (!real_file("")) { check_skipped("released prefix", "GLM_REAL is not set"); return; }
    Numbers f = open_numbers(real_file("golden/glm3_ptuning_v2_model.data"));
    Model *m = describe_model(parse_config("glm3_ptuning_v2_model.data", released_config));
    enum { N_PAST = LAYERS2 * GROUPS * P * D };
    real table[P * WIDTH], *wide = device_take(N_PAST, sizeof *wide, "a test");
    widen(wide, memory_mapped(next_bytes(&f, N_PAST * sizeof(uint16_t)), N_PAST * sizeof(uint16_t)), F16, N_PAST);
    const real *past = host_copy(wide, N_PAST);
    for (size_t i = 0; i < N_PAST; i++)             // [2 layers,groups,P,D] to [P,2 layers,groups,D]
        table[i / D % P * WIDTH + i / (P*D) * D + i % D] = past[i];
    for (size_t i = 0; i < m->n_tensors; i++) {     // the file has no head
        Tensor *t = m->tensors[i];
        bind_tensor(t, t == m->head ? device_take(t->n, sizeof(real), "a head") : next_reals(&f, t->n), REAL);
    }
    Options o = options_of("ptuning");
    o.num_virtual_tokens = P;
    const Method *method = find_method("ptuning");
    method->setup(m, &o);
    start_trainables(m, 0, false);
    memory_copy_in(m->trained[0]->value, table, sizeof table);
    Generator g = make_generator(m, method, 16, 1);
    for (size_t i = 0; i < COUNT(steps); i++) {
        size_t starts[] = { 0, steps[i] }, H = m->config.hidden_size;
        Batch b = { .ids = (int32_t *)next_bytes(&f, steps[i] * sizeof *b.ids), .starts = starts, .n = 1, .T = steps[i],
                    .every_row = true };
        forward(&g.run, &b, false);
        g.run.caches->n += steps[i];
        check_close(label("glm3_ptuning_v2_model.data, step %zu", i + 1), host_copy(g.run.final, steps[i]*H),
                    next_truth(&f, steps[i]*H), steps[i]*H, 2e-4);
    }
    check_true("glm3_ptuning_v2_model.data is read to its end", f.p == f.end);
}

static void test_methods(void) {
    test_method_golden(), test_method_files(), test_beginnings(), test_prefix_dropout();
    test_method_slopes(), test_released_prefix();
}
