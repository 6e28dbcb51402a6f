// Tests of what a run leaves behind: fingerprints, signals, the parts of a checkpoint. Whole runs: tests/cli_state.sh.

// The fingerprint of a model sees the name, type, shape and the numbers at both ends and the middle of every tensor.
static void test_fingerprints(void) {
    Model *m = load_model("tests/tiny");
    const char *was = fingerprint_of(m, NULL);
    check_true("a fingerprint without a tokenizer says so", strstr(was, "-0000000000000000-0000000000000000"));
    check_true("a fingerprint is the same twice", !strcmp(was, fingerprint_of(m, NULL)));
    ChatFormat f = { .layout = &layouts[0] };
    check_true("the layout is in the fingerprint, and nowhere else",
               strncmp(was, fingerprint_of(m, &f), 34) == 0 && strcmp(was, fingerprint_of(m, &f)));
    for (size_t i = 0; i < m->n_tensors; i++) {
        Tensor *t = m->tensors[i], kept = *t;
        size_t n = t->n * dtype_size(t->file_dtype), places[] = { 0, n / 2, n - 1 };
        for (size_t k = 0; k < COUNT(places); k++) {
            char *copy = alloc(n, 1);
            memcpy(copy, kept.file_data, n);
            copy[places[k]] ^= 1;
            t->file_data = copy;
            check_true(label("byte %zu of %s is in the fingerprint", places[k], t->name),
                       strcmp(was, fingerprint_of(m, NULL)));
            free(copy);
        }
        *t = kept, t->name = "another";
        check_true(label("the name %s is in the fingerprint", kept.name), strcmp(was, fingerprint_of(m, NULL)));
        *t = kept, t->shape[0]++;
        check_true(label("the shape of %s is in the fingerprint", kept.name), strcmp(was, fingerprint_of(m, NULL)));
        *t = kept;
    }
}

// Sends itself the signal `times` times, the last while a file is being written if `writing`; returns how it ended.
static int signalled(int times, bool writing, const char *path) {
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        real *numbers = device_take(100, sizeof *numbers, "a test");
        Tensor t = { .name = "t", .n_dims = 1, .shape = { 100 }, .n = 100, .value = numbers }, *list[] = { &t };
        watch_signals();
        under_way = true;
        dup2(open("/dev/null", O_WRONLY | O_CLOEXEC), 2);
        if (writing) begin_folder(path);
        for (int i = 0; i < times; i++) {
            kill(getpid(), SIGTERM);
            for (int wait = 0; wait < 5000 && (i || !stop_signal); wait++) usleep(1000);
        }
        if (writing) write_trained(strf("%s.glmtune.tmp/t", path), &(Model){0}, list, 1);
        _exit(7);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_signals(void) {
    const char *path = scratch("signalled");
    check_equal("one signal lets a run end by itself", (size_t)signalled(1, false, path), 7);
    check_equal("two signals end it", (size_t)signalled(2, false, path), 128 + SIGTERM);
    check_equal("one signal lets a file be written", (size_t)signalled(1, true, path), 7);
    remove_tree(strf("%s.glmtune.tmp", path));
    check_equal("two signals end the writing", (size_t)signalled(2, true, path), 128 + SIGTERM);
    check_true("and nothing half-written stays", !exists(strf("%s.glmtune.tmp", path)));
}

static void test_state(void) {
    static const char lines[] = "step=3\nlr=0.1\nempty=\nstep2=4\n";
    check_true("line_value finds a line", !strcmp(line_value(lines, "lr"), "0.1"));
    check_true("line_value takes no beginning for a name", !strcmp(line_value(lines, "step2"), "4"));
    check_true("line_value: an empty value", !strcmp(line_value(lines, "empty"), ""));
    check_true("line_value: none", !line_value(lines, "ste") && !line_value(NULL, "step") && !line_value("", "step"));
    test_fingerprints();
    test_signals();
}
