// Pictures and what they are drawn from: axes, well-formed XML, thinning, logs with one line or none.

static void check_axis(const char *what, Axis a, double least, double most, double step) {
    check_number(label("axis %s: its least", what), a.least, least, 1e-12);
    check_number(label("axis %s: its most", what), a.most, most, 1e-12);
    check_number(label("axis %s: its step", what), a.step, step, 1e-12);
    double values[] = { a.log ? pow(10, least) : least, a.log ? pow(10, (least + most) / 2) : (least + most) / 2,
                        a.log ? pow(10, most) : most }, part[] = { 0, 0.5, 1 };
    for (size_t i = 0; i < COUNT(part); i++)
        check_number(label("axis %s: place of part %g", what, part[i]), place(&a, values[i]),
                     a.from + part[i] * a.length, 1e-12);
}

static void test_axes(void) {
    check_axis("0.31 to 2.27", make_axis(0.31, 2.27, false, 300, -240), 0, 2.5, 0.5);
    check_axis("-3 to 4", make_axis(-3, 4, false, 300, -240), -4, 4, 2);
    check_axis("on ticks", make_axis(0.3, 0.9, false, 300, -240), 0.3, 0.9, 0.1);
    check_axis("all the same", make_axis(5e-4, 5e-4, false, 300, -240), 2e-4, 8e-4, 1e-4);
    check_axis("all zero", make_axis(0, 0, false, 300, -240), 0, 1, 0.2);
    check_axis("0.02 to 3, log", make_axis(0.02, 3, true, 300, -240), -2, 1, 1);
    check_axis("3e-5 to 7, log", make_axis(3e-5, 7, true, 300, -240), -5, 1, 1);
    check_axis("1e-30 to 1e30, log", make_axis(1e-30, 1e30, true, 300, -120), -40, 40, 20);
    check_axis("two extremes", make_axis(-1e30, 1e30, false, 300, -240), -1e30, 1e30, 5e29);
    check_axis("a close pair", make_axis(1e30, 1e30 * (1 + 1e-15), false, 300, -240), 4e29, 1.6e30, 2e29);
    check_axis("no step", make_axis(0, 0, false, 50, 700), 0, 1, 1);
    check_axis("step 1", make_axis(0, 1, false, 50, 700), 0, 1, 1);
    check_axis("600 steps", make_axis(0, 600, false, 50, 700), 0, 600, 100);
    check_axis("14049 steps", make_axis(0, 14049, false, 50, 416), 0, 14049, 5000);
}

static bool is_reference(const char *p) {        // as &#60; is one
    size_t digits = p[1] == '#' ? strspn(p + 2, "0123456789") : 0;
    return digits && p[2 + digits] == ';';
}

// Elements that are begun and not ended, plus what XML or a picture must not hold; *largest coordinate beside it.
static size_t xml_faults(const char *s, double *largest) {
    size_t depth = 0, faults = 0;
    *largest = 0;
    for (const char *p = s; *p; p++) {
        uint32_t c;
        if (utf8_get(p, strlen(p), &c) && c == INVALID) faults++;
        if (*p == '&') faults += !is_reference(p);
        if ((unsigned char)*p >= 0xC0) p += utf8_get(p, strlen(p), &c) - 1;
        if (*p != '<') continue;
        const char *end = strchr(p, '>');
        if (!end) return faults + 1;
        size_t quotes = 0;
        for (const char *q = p + 1; q < end; q++) quotes += *q == '"', faults += *q == '<';
        faults += quotes % 2;
        if (p[1] == '/') faults += depth == 0, depth -= depth > 0;
        else depth += end[-1] != '/';
        for (const char *q = p; q < end; q++)
            if (strchr(" ,\"", *q) && isdigit((unsigned char)q[1])) *largest = fmax(*largest, strtod(q + 1, NULL));
    }
    for (const char *p = s; (p = strstr(p, "points=\"")); p++) faults += p[8 + strspn(p + 8, "0123456789.,- ")] != '"';
    static const char *const none[] = { "=\"nan", "=\"-nan", "=\"inf", "=\"-inf" };
    for (size_t i = 0; i < COUNT(none); i++) faults += strstr(s, none[i]) != NULL;
    return faults + depth;
}

static size_t occurrences(const char *s, const char *part) {
    size_t n = 0;
    for (; (s = strstr(s, part)); s += strlen(part)) n++;
    return n;
}

// Draws the log of a run folder; returns the picture.
static char *drawn(const char *folder, const char *log) {
    size_t n;
    write_file(strf("%s/log.jsonl", folder), log, strlen(log));
    draw_losses(folder);
    return read_file(strf("%s/loss.svg", folder), &n);
}

static void check_picture(const char *what, const char *picture) {
    double largest;
    check_equal(label("%s: faults in the XML", what), xml_faults(picture, &largest), 0);
    check_true(label("%s: nothing lies outside: %g", what, largest), largest <= 800);
    check_equal(label("%s: pictures end", what), occurrences(picture, "</svg>"), 1);
}

static void test_pictures(void) {
    const char *folder = scratch("<svg> & \"\xFF\" 中文");
    make_folders(folder);
    char *picture = drawn(folder, "");
    check_picture("no line", picture);
    check_equal("no line: panels that say so", occurrences(picture, "no values yet"), 3);
    check_true("the title is escaped", strstr(picture, "/&#60;svg> &#38; \"?\" 中文<") != NULL);
    picture = drawn(folder, "{\"step\": 1, \"loss\": 2.5, \"learning_rate\": 0, \"grad_norm\": 1, \"tokens\": 3}\n");
    check_picture("one line", picture);
    check_equal("one line: a dot for each value", occurrences(picture, "<circle"), 3);
    // steps 0 1, thrice; loss 1 1.5 .. 4; learning rate 0 0.5 1; gradient norm 0.5 1 1.5
    check_equal("one line: grid lines", occurrences(picture, "<path"), 3 * 2 + 7 + 3 + 3);
    check_true("one line: no tick below the first", !strstr(picture, ">-"));
    picture = drawn(folder, "{\"step\": 1, \"loss\": NaN}\n{\"step\": 2, \"loss\": 1e999}\n"
                            "{\"step\": 3, \"loss\": 1e300}\n{\"step\": 4, \"loss\": 1e-300}\n"
                            "{\"step\": 5, \"loss\": 1e30}\n{\"step\": 6, \"eval_loss\": -1}\n");
    check_picture("strange numbers", picture);
    check_equal("strange numbers: those that can be drawn", occurrences(picture, "r=\"2.2\""), 3);
    check_equal("strange numbers: the best evaluation has a ring", occurrences(picture, "<circle class=\"r c1\""), 1);
    Text log = {0};
    for (size_t i = 1; i <= 20000; i++)
        text_print(&log, "{\"step\": %zu, \"loss\": %.9g, \"learning_rate\": 1e-05}\n", i,
                   i == 7777 ? 9.0 : 1 + (double)(i % 7) / 7);
    picture = drawn(folder, log.s);
    check_picture("20000 lines", picture);
    check_true(label("20000 lines: %zu bytes, at most 40000", strlen(picture)), strlen(picture) <= 40000);
    // loss runs from 1 to 9 on an axis from 0 to 10 between pixels 336 and 96: the one spike stands at 336 - 216
    check_true("20000 lines: a single spike is seen", strstr(picture, ",120 ") != NULL);
    Text title = {0};
    svg_text(&title, 1, 2, "s", "中文/of many columns", 10);
    check_true(label("a text is cut to ten columns: %s", title.s), strstr(title.s, ">…y columns<") != NULL);
    title.n = 0;
    svg_text(&title, 1, 2, "s", "中文/of a few", 13);
    check_true(label("a text that fits stays: %s", title.s), strstr(title.s, ">中文/of a few<") != NULL);
    check_true("1e-05 is written 1e-5", strstr(picture, ">1e-5<") != NULL && !strstr(picture, "e-05"));
}

static void test_run_facts(void) {
    const char *folder = scratch("facts");
    make_folders(folder);
    const char *log = "{\"step\": 2, \"loss\": 3, \"tokens_per_s\": 100}\n"
                      "{\"step\": 2, \"eval_loss\": 2, \"rouge_l\": 0.25}\n"
                      "{\"step\": 4, \"loss\": 2, \"tokens_per_s\": 900}\n"
                      "{\"step\": 4, \"eval_loss\": 1.5, \"rouge_l\": 0.123456}\n"
                      "{\"step\": 6, \"loss\": 1, \"tokens_per_s\": 120}\n"
                      "{\"step\": 6, \"eval_loss\": 1.75, \"rouge_l\": 0.75}\n";
    const char *facts = "{\"method\": \"lora\", \"trainable\": 9399951360}";
    static const char *const want[][2] = { { "method", "lora" }, { "trainable", "9399951360" }, { "steps", "6" },
        { "tokens/s", "120" }, { "best step", "4" }, { "eval_loss", "1.5" }, { "rouge_l", "0.1235" } };
    write_file(strf("%s/log.jsonl", folder), log, strlen(log));
    write_file(strf("%s/run.json", folder), facts, strlen(facts));
    RunLog run = read_run(folder);
    check_equal("facts of a run", run.n_facts, 1 + COUNT(want));
    for (size_t i = 0; i < COUNT(want); i++)
        check_true(label("%s is %s, wanted %s", want[i][0], fact_of(&run, want[i][0]), want[i][1]),
                   !strcmp(fact_of(&run, want[i][0]), want[i][1]));
    check_true("no such fact", !strcmp(fact_of(&run, "speed"), "-"));
    check_equal("steps with a loss", run.curves[LOSS].n, 3);
    check_equal("columns of a text", text_columns("a中文é"), 6);
    free_run(&run);
}

static void test_svg(void) {
    test_axes();
    test_pictures();
    test_run_facts();
}
