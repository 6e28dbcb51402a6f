// Tests of the YAML reader: against PyYAML (tests/reference_yaml.py), what is refused and where, and damaged text.

static const Json *read_yaml(const char *source, size_t n, JsonReader *r) {
    *r = json_open("file.yaml", source, n);
    return yaml_only(r);
}

// What is no YAML or not read, and line and column of the place that says so.
static const struct { const char *source, *place, *words; } yaml_errors[] = {
    { "", "1:1", "name: value" }, { "# nothing\n", "2:1", "name: value" }, { "---\n", "2:1", "name: value" },
    { "just text", "1:10", "name: value" }, { "\"text\"\n# end", "1:7", "name: value" },
    { "--- a: 1", "1:5", "alone" }, { "----", "1:4", "alone" },
    { "a: &x 1", "1:4", "no anchor" }, { "a: *x", "1:4", "no anchor" }, { "a: !!int 1", "1:4", "anchor, tag" },
    { "a: |\n  text\n", "1:4", "text in quotes" }, { "a: >\n  text\n", "1:4", "text in quotes" },
    { "<<: *x", "1:5", "no anchor" }, { "%YAML 1.2\n---\na: 1", "1:1", "text in quotes" },
    { "a: @x", "1:4", "text in quotes" }, { "? a\n: b", "1:1", "text in quotes" },
    { "a:\n\tb: 1", "2:1", "a tab" }, { "a:\tb", "1:3", "a tab" }, { "a: b\tc", "1:5", "a tab" },
    { "a: 1\na: 2", "2:1", "twice" }, { "a: {b: 1, b: 2}", "1:11", "twice" },
    { "b:\n  a: 1\n  'a': 2", "3:3", "twice" },
    { "a: b: c", "1:5", "quotes" }, { "a: 'b' c", "1:8", "quotes" }, { "a: [1] 2", "1:8", "quotes" },
    { "a: 'it''s'", "1:8", "quotes" }, { "a: b, c", "1:5", "quotes" }, { "a: b#c", "1:5", "quotes" },
    { "a: x[1]", "1:5", "quotes" }, { "a: 'b", "1:6", "inside quotes" }, { "a: 'b\n  c'", "1:6", "inside quotes" },
    { "a: \"b\n  c\"", "1:6", "line break" },
    { "a: \"\\x41\"", "1:6", "backslash" }, { "a: \"b", "1:6", "ends inside a string" },
    { "a: 1\n b: 2", "2:2", "indentation" }, { "a:\n    b: 1\n  c: 2", "3:3", "indentation" },
    { "  a: 1\nb: 2", "2:1", "indentation" }, { "a:\n  b\n  c", "2:4", "name: value" },
    { "- a\nb: 1", "2:1", "indentation" }, { "a:\n  - b\n    - c", "3:5", "indentation" },
    { "a:\n  - b\n - c", "3:2", "indentation" }, { "a:\n  - b\nc", "3:2", "name: value" },
    { "a: b\n  c", "2:3", "indentation" }, { "a: 1\nb", "2:2", "name: value" },
    { "a: 1\n- b", "2:1", "belongs to nothing" }, { "a:\n- b: 1", "2:4", "quotes" },
    { "a:\n- - b", "2:3", "text in quotes" },
    { "a:\n- [b]", "2:3", "text in quotes" }, { "a:\n-\n  b: 1", "3:3", "indentation" },
    { "a: - b", "1:4", "text in quotes" }, { "a: [1 2", "1:8", "comma or ]" },
    { "a: [1, 2", "1:9", "comma or ]" }, { "a: [1,", "1:7", "comma or ]" },
    { "a: [1,,2]", "1:7", "text in quotes" }, { "a: {b}", "1:6", "name: value" }, { "a: {b:1}", "1:8", "name: value" },
    { "a: [1}", "1:6", "comma or ]" }, { "a: [\n, 2]", "2:1", "text in quotes" },
    { "a: {b: 1]", "1:9", "comma or }" }, { "a: [b: 1]", "1:6", "comma or ]" },
    { "a: [[1]]", "1:5", "text in quotes" }, { "a: {b: {c: 1}}", "1:8", "text in quotes" },
    { "a: [1, # one\n, 2]", "1:8", "text in quotes" }, { "[1, 2]", "1:1", "text in quotes" },
    { "{a: 1}", "1:1", "text in quotes" }, { "a: [b\nc]", "2:1", "comma or ]" },
    { "a: [1,\n2] b: 2", "2:4", "belongs to nothing" }, { "a: 1\n---\nb: 2", "2:4", "name: value" },
    { "a: 1\n...\n", "2:4", "name: value" }, { "a: \xFF", "1:4", "UTF-8" }, { "a: \x01", "1:4", "control" },
    { "a: 1\rb: 2", "1:5", "control" }, { "[a]: b\n", "1:1", "text in quotes" },
    { "a:1", "1:4", "name: value" }, { "a 1", "1:4", "name: value" }, { ": 1", "1:1", "text in quotes" },
    { "\xEF\xBB\xBF" "a: *x", "1:4", "no anchor" }, { "\xE9\x94\xAE: *x", "1:4", "no anchor" },
    { "a: 1\r\nb: *x", "2:4", "no anchor" },
};

static void read_bad_yaml(const void *source) {
    JsonReader r;
    read_yaml(source, strlen(source), &r);
}

// So many names, each a column further in than the one before.
static const char *nested_yaml(size_t depth) {
    Text t = {0};
    for (size_t i = 0; i < depth; i++) text_print(&t, "%*sa:\n", (int)i, "");
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
    JsonReader r;
    const char *deep = nested_yaml(350);
    check_true("what 64 KiB can nest is read", read_yaml(deep, strlen(deep), &r)->count == 1);
    check_fails("more is refused", read_bad_yaml, nested_yaml(3000), "file.yaml:1:1: ");
    check_fails("more is refused", read_bad_yaml, nested_yaml(3000), "longer than 64 KiB");
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
