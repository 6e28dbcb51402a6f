// Tests of the YAML reader: against PyYAML (tests/reference_yaml.py), what is refused and where, and damaged text.

static const Json *read_yaml(const char *source, size_t n, JsonReader *r) {
    *r = json_open("file.yaml", source, n);
    return yaml_only(r);
}

// What is no YAML or not read, and line and column of the place that says so.
static const struct { const char *source, *place, *words; } yaml_errors[] = {
    { "", "1:1", "empty" }, { "# nothing\n", "2:1", "empty" }, { "---\n", "2:1", "empty" },
    { "a: &x 1", "1:4", "anchors" }, { "a: *x", "1:4", "anchors" }, { "a: !!int 1", "1:4", "tags" },
    { "a: |\n  text\n", "1:4", "on one line" }, { "a: >\n  text\n", "1:4", "on one line" },
    { "%YAML 1.2\n---\na: 1", "1:1", "" }, { "a: @x", "1:4", "" }, { "? a\n: b", "1:1", "value" },
    { "a:\n\tb: 1", "2:1", "a tab" }, { "a:\tb", "1:3", "a tab" }, { "a: b\tc", "1:5", "a tab" },
    { "a: 1\na: 2", "2:1", "twice" }, { "a: {b: 1, b: 2}", "1:11", "twice" },
    { "b:\n  a: 1\n  'a': 2", "3:3", "twice" },
    { "a: b: c", "1:5", "quotes" }, { "a: 'b' c", "1:8", "end here" }, { "a: [1] 2", "1:8", "end here" },
    { "a: 'b", "1:6", "inside quotes" }, { "a: 'b\n  c'", "1:6", "inside quotes" },
    { "a: \"b\n  c\"", "1:6", "line break" },
    { "a: \"\\x41\"", "1:6", "backslash" }, { "a: \"b", "1:6", "ends inside a string" },
    { "a: 1\n b: 2", "2:2", "indented further" }, { "a:\n    b: 1\n  c: 2", "3:3", "indented further" },
    { "  a: 1\nb: 2", "2:1", "indentation" }, { "a:\n  b\n  c", "3:3", "indented further" },
    { "- a\nb: 1", "2:1", "indentation" },
    { "a: b\n  c", "2:3", "indented further" }, { "a: 1\nb", "2:2", "name: value" },
    { "a: 1\n- b", "2:1", "value was expected" },
    { "a: - b", "1:4", "value was expected" }, { "a: [1 2", "1:8", "comma or ]" },
    { "a: [1, 2", "1:9", "comma or ]" }, { "a: [1,", "1:7", "value was expected" },
    { "a: [1,,2]", "1:7", "value was expected" }, { "a: {b}", "1:6", "colon" }, { "a: {b:1}", "1:8", "colon" },
    { "a: [1}", "1:6", "comma or ]" }, { "a: 1\n---\nb: 2", "2:4", "name: value" },
    { "a: 1\n...\n", "2:4", "name: value" },
    { "--- a", "1:5", "end here" }, { "a: \xFF", "1:4", "UTF-8" }, { "a: \x01", "1:4", "control" },
    { "[a]: b\n", "1:4", "name: value" },
    { "\xEF\xBB\xBF" "a: *x", "1:4", "anchors" }, { "\xE9\x94\xAE: *x", "1:4", "anchors" },
    { "a: 1\r\nb: *x", "2:4", "anchors" },
};

static void read_bad_yaml(const void *source) {
    JsonReader r;
    read_yaml(source, strlen(source), &r);
}

static const char *nested_yaml(const char *opening, size_t depth) {
    Text t = {0};
    for (size_t i = 0; i < depth; i++) text_print(&t, "%s", opening);
    text_print(&t, "x");
    for (size_t i = 0; i < depth && *opening == '['; i++) text_print(&t, "]");
    return t.s;
}

// Every document of the golden file, which stands in memory as long as the test runs; returns their number.
static size_t compare_yaml(const char *p, const char *end) {
    size_t n = 0, source_n, held_n;
    int line;
    for (; p < end && sscanf(p, "= %zu %zu%n", &source_n, &held_n, &line) == 2; n++) {
        const char *source = p + line + 1, *held = source + source_n + 1;
        JsonReader r;
        Text t = {0};
        render_json(&t, read_yaml(source, source_n, &r));
        check_true(label("yaml document %zu holds %.*s, got %s", n, (int)min_size(held_n, 60), held, t.s),
                   t.n == held_n && !memcmp(t.s, held, held_n));
        p = held + held_n + 1;
        json_close(&r);
        free(t.s);
    }
    check_true("the golden documents were read to their end", p == end);
    return n;
}

// Golden documents with some bytes changed, cut out or doubled: any of them must be read or refused, not more.
static void read_damaged(const void *whole) {
    static const char odd[] = "-:#[]{},'\"\\ \n\t\r&*!|>%@`?~.0e\xFF\xE4";
    const Text *t = whole;
    for (size_t i = 0; i < 400; i++) {
        size_t from = pick(t->n), n = 1 + pick(min_size(300, t->n - from));
        char *copy = checked(malloc(n), n);         // its own block, so that the sanitizers see a step too far
        memcpy(copy, t->s + from, n);
        for (size_t k = pick(4); k-- > 0; ) copy[pick(n)] = odd[pick(sizeof odd - 1)];
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            JsonReader r;
            close(2);
            read_yaml(copy, n, &r);
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        bool good = WIFEXITED(status) && WEXITSTATUS(status) <= 1;
        if (!good) check_true(label("damaged yaml %zu ends with status %d: %.*s", i, status, (int)n, copy), false);
        free(copy);
    }
    check_true("damaged yaml is read or refused", true);
}

static void test_yaml(void) {
    Text golden_text = {0};
    golden_text.s = read_file("tests/golden/yaml/documents.txt", &golden_text.n);
    check_true("there are golden documents", compare_yaml(golden_text.s, golden_text.s + golden_text.n) > 200);
    for (size_t i = 0; i < COUNT(yaml_errors); i++) {
        check_fails(label("yaml error %zu", i), read_bad_yaml, yaml_errors[i].source,
                    strf("file.yaml:%s: ", yaml_errors[i].place));
        check_fails(label("yaml error %zu", i), read_bad_yaml, yaml_errors[i].source, yaml_errors[i].words);
    }
    static const char *const openings[] = { "[", "- ", "-\n ", "[{a: " };
    for (size_t i = 0; i < 2; i++) {
        JsonReader r;
        const char *deepest = nested_yaml(openings[i], JSON_DEPTH - i);    // a block counts what stands in it
        check_true("collections may be nested a hundred deep", read_yaml(deepest, strlen(deepest), &r)->count == 1);
    }
    for (size_t i = 0; i < COUNT(openings); i++)
        check_fails("very deep nesting is refused", read_bad_yaml, nested_yaml(openings[i], 100000),
                    i == 2 ? "indented" : "nested deeper");
    JsonReader r;
    const Json *numbers = read_yaml("a: 5e-4\nb: no\nc: ~", 18, &r);
    check_true("a scalar keeps its words", !strcmp(json_get(numbers, "a")->text, "5e-4") &&
               !strcmp(json_get(numbers, "b")->text, "no") && !strcmp(json_get(numbers, "c")->text, "~"));
    for (size_t i = 0; i < COUNT(yaml_defaults); i++)
        check_true(yaml_defaults[i].option, find_option(yaml_defaults[i].option, TRAIN) != NULL);
    for (size_t i = 0; i < COUNT(yaml_words); i++)
        if (yaml_words[i].option) {
            Options o = default_options();
            const Option *x = find_option(yaml_words[i].option, TRAIN);
            if (check_true(yaml_words[i].option, x != NULL))
                check_true(yaml_words[i].to, !set_option(&o, x, yaml_words[i].to));
        }
    read_damaged(&golden_text);
}
