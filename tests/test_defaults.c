// What a run gets where nobody says: rates, epochs, batches, the split; when a validation is the best; what is kept of
// checkpoints; and names that tell runs apart.

static Dataset samples_of(size_t n, size_t length) {
    Dataset set = { .n = n, .capacity = n, .longest = length };
    set.samples = alloc(n, sizeof *set.samples);
    for (size_t i = 0; i < n; i++) {
        Sample *s = &set.samples[i];
        *s = (Sample){ .ids = alloc(length, sizeof *s->ids), .n = length };
        for (size_t k = 0; k < length; k++) s->ids[k] = (int32_t)(i * 7919 + k);
    }
    return set;
}

static void free_samples(Dataset *set) {
    for (size_t i = 0; i < set->n; i++) free(set->samples[i].ids);
    free(set->samples);
}

// n samples of some length get so many to validate, epochs, samples a step and at once, and validations to wait for.
static void check_defaults(size_t n, size_t length, size_t held_out, double epochs, int64_t batch, int64_t batches,
                           int64_t patience) {
    Options o = default_options();
    Config c = { .hidden_size = 1024 };
    Dataset set = samples_of(n, length);
    choose_split(&o, &set);
    Dataset validation = split_off(&set, o.val_size, (uint64_t)o.seed);
    choose_defaults(&o, find_method("adapter"), &c, &set, validation.n > 0);
    const char *what = label("%zu samples of %zu tokens", n, length);
    check_equal(label("%s: held out", what), validation.n, held_out);
    check_number(label("%s: epochs", what), o.num_train_epochs, epochs, 0);
    check_equal(label("%s: samples at once", what), (size_t)o.per_device_train_batch_size, (size_t)batch);
    check_equal(label("%s: batches a step", what), (size_t)o.gradient_accumulation_steps, (size_t)batches);
    check_equal(label("%s: patience", what), (size_t)o.early_stopping_patience, (size_t)patience);
    double few = fmin(1, fmax(35, (double)(n - held_out)) / 100);
    check_number(label("%s: rate, at a quarter of the width twice that at 4096", what), o.learning_rate,
                 2 * find_method("adapter")->learning_rate * few, 1e-12);
    free_samples(&set), free_samples(&validation);
}

// `distinct` samples, each of which stands there `copies` times: so many are held out, with all their copies.
static void check_copies(size_t distinct, size_t copies, size_t held_out) {
    Options o = default_options();
    Dataset set = samples_of(distinct * copies, 10);
    for (size_t i = distinct; i < set.n; i++) memcpy(set.samples[i].ids, set.samples[i % distinct].ids, 10 * sizeof(int32_t));
    choose_split(&o, &set);
    Dataset validation = split_off(&set, o.val_size, (uint64_t)o.seed);
    check_equal(label("%zu samples %zu times: held out", distinct, copies), validation.n, held_out * copies);
    check_equal("none of them is learned", count_shared(&validation, &set), 0);
    free_samples(&set), free_samples(&validation);
}

static void test_choices(void) {
    check_copies(4, 10, 0);
    check_copies(40, 10, 5);
    check_copies(400, 3, 20);
    check_defaults(4, 100, 0, 60, 4, 1, 0);      // none to validate, so nothing to wait for
    check_defaults(40, 100, 5, 60, 4, 1, 10);
    check_defaults(40, 300, 5, 60, 2, 2, 10);
    check_defaults(40, 5000, 5, 60, 1, 4, 10);
    check_defaults(400, 100, 20, 15, 4, 1, 3);
    check_defaults(4000, 100, 200, 3, 4, 1, 0);
    check_defaults(40000, 10, 500, 3, 4, 1, 0);
    Options o = default_options();
    Config c = { .hidden_size = 4096 };
    Dataset set = samples_of(40, 10);
    want_option(&o, find_option("max_steps", TRAIN), "7");
    want_option(&o, find_option("per_device_train_batch_size", TRAIN), "16");
    want_option(&o, find_option("learning_rate", TRAIN), "0.25");
    choose_defaults(&o, find_method("lora"), &c, &set, true);
    check_number("a rate that is given stays", o.learning_rate, 0.25, 0);
    check_equal("a batch that is given is a step of its own", (size_t)o.gradient_accumulation_steps, 1);
    check_equal("steps that are given are not cut short", (size_t)o.early_stopping_patience, 0);
    o = default_options(), o.yaml = true;
    choose_split(&o, &set), choose_defaults(&o, find_method("full"), &c, &set, true);
    check_number("with a yaml: epochs", o.num_train_epochs, 3, 0);
    check_equal("with a yaml: no early stop", (size_t)o.early_stopping_patience, 0);
    check_true("with a yaml: the last step is the result", !o.load_best_model_at_end);
    o = default_options(), set.n = 40;
    free_samples(&set);
    set = samples_of(200, 10);
    choose_defaults(&o, find_method("lora"), &c, &set, true);
    check_number("at hidden 4096 LoRA has the published rate", o.learning_rate, 5e-4, 1e-12);
    o.learning_rate = NAN, choose_defaults(&o, find_method("ptuning"), &c, &set, true);
    check_number("P-tuning v2 too", o.learning_rate, 2e-2, 1e-12);
    o.learning_rate = NAN, choose_defaults(&o, find_method("full"), &c, &set, true);
    check_number("full tuning too", o.learning_rate, 5e-5, 1e-12);
    static const struct { const char *method; double rate; } narrow[] = {      // 2^(5 power) times the published ones
        { "lora", 5e-4 * 4.756828460010884 }, { "full", 5e-5 * 13.454342644059432 },
        { "freeze", 2e-4 * 9.849155306759329 }, { "ptuning", 2e-2 * 5.656854249492381 } };
    for (size_t i = 0; i < COUNT(narrow); i++) {
        c.hidden_size = 128, o.learning_rate = NAN, choose_defaults(&o, find_method(narrow[i].method), &c, &set, true);
        check_number(label("the rate of %s at hidden 128", narrow[i].method), o.learning_rate, narrow[i].rate, 1e-12);
    }
    free_samples(&set);
    for (int replays = 0; replays < 2; replays++) {     // 600 samples are 10 epochs, a sixth of which is less than 3
        o = default_options(), o.replay = replays ? "old.jsonl:1" : NULL, set = samples_of(600, 10);
        choose_defaults(&o, find_method("lora"), &c, &set, true);
        check_equal("the least patience is 3", (size_t)o.early_stopping_patience, 3);
        check_number(replays ? "a run that replays does not stop when it has learned" : "a run stops when it has learned",
                     o.early_stopping_loss, replays ? 0 : 0.03, 0);
        check_equal("the newest and the best are kept", (size_t)o.save_total_limit, 2);
        free_samples(&set);
    }
}

typedef struct { int64_t step; double loss; bool best; const char *words; } Validation;

// Validations of losses in turn: which of them is called the best.
static void check_turns(Trainer *t, const Validation *turns, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const char *words;
        bool best = judge_evaluation(t, turns[i].step, turns[i].loss, &words);
        if (best) t->state.saved_step = (double)turns[i].step;
        check_true(label("step %lld, loss %g, '%s': best %d", (long long)turns[i].step, turns[i].loss, words, best),
                   best == turns[i].best && strstr(words, turns[i].words));
    }
}

static void test_best(void) {
    Options o = default_options();
    Trainer t = { .o = &o, .steps = 100, .saves_after = 30, .validation.n = 25 };
    o.early_stopping_threshold = 0.1, o.save_steps = 55;
    static const Validation strict[] = {
        { 0, 2, true, "" }, { 1, 2.5, false, "no better than before training" }, { 2, 1.5, true, "the best so far" },
        { 3, 1.3, false, "the lowest so far, not saved" }, { 4, 1.29, false, "the lowest so far, not saved" },
        { 6, 1.1, true, "the best so far" }, { 9, 1.12, false, "" }, { 10, 0.9, true, "the best so far" },
        { 12, 0.7, false, "too near" }, { 39, 0.85, false, "; not saved" }, { 40, 0.85, true, "(the lowest was 0.7000)" },
        { 54, 0.8, false, "; not saved" }, { 55, 0.82, true, "that is saved" }, { 100, 0.5, true, "the best so far" } };
    check_turns(&t, strict, COUNT(strict));
    check_number("the best", t.state.best_metric, 0.5, 0);
    check_number("before training", t.state.base_loss, 2, 0);
    check_number("nothing worse in a row", t.state.worse_since, 0, 0);
    // the lowest is 1: with 25 samples up to 1.2 is as good, and so is all below 0.5
    Trainer later = { .o = &o, .steps = 100, .saves_after = 1, .validation.n = 25 };
    o.early_stopping_loss = 0.5;
    static const Validation few[] = { { 0, 2, true, "" }, { 1, 1, true, "the best so far" },
        { 2, 1.19, true, "saved (the lowest was 1.0000)" },
        { 3, 1.21, false, "" }, { 4, 0.3, true, "" }, { 5, 0.45, true, "" }, { 6, 0.55, false, "" } };
    check_turns(&later, few, COUNT(few));
    check_number("as good, and later", later.state.best_metric, 0.45, 0);
    check_number("one worse", later.state.worse_since, 1, 0);
    later.state.train_loss = 0.6;
    check_true("training has not learned yet", !is_enough(&later));
    later.state.train_loss = 0.4;
    check_true("both have", is_enough(&later));
    o.early_stopping_loss = 0, o.early_stopping_patience = 2;
    check_true("one worse is not enough of two", !is_enough(&later));
    later.state.worse_since = 2;
    check_true("two are", is_enough(&later));
    o.early_stopping_patience = 0;
    check_true("without patience never", !is_enough(&later));
}

// What is left of checkpoints 1 to 5 of which the third is the best, when so many are to be kept.
static void test_kept_checkpoints(void) {
    static const char *const left[] = { "5", "5 3", "5 3", "5 4 3", "5 4 3 2" };
    for (size_t keep = 1; keep < COUNT(left); keep++) {
        const char *folder = scratch(label("kept%zu", keep));
        Options o = { .output_dir = folder };
        Trainer t = { .o = &o, .state = { .best_step = 3 } };
        Text found = {0};
        size_t *steps;
        for (int i = 1; i <= 5; i++) make_folders(strf("%s/checkpoint-%d", folder, i));
        remove_checkpoints(&t, keep);
        for (size_t i = 0, n = list_checkpoints(folder, &steps); i < n; i++)
            text_print(&found, "%s%zu", i ? " " : "", steps[i]);
        check_true(label("%zu kept: %s", keep, found.s), !strcmp(found.s, left[keep]));
    }
}

static void test_defaults(void) {
    test_choices();
    test_best();
    test_kept_checkpoints();
}
