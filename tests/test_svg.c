// Pictures and what they are drawn from: axes, well-formed XML, thinning, logs with one line or none.

static void check_axis(const char *what, Axis a, double least, double most, double step) {
    check_number(label("axis %s: its least", what), a.first * a.step, least, 1e-12);
    check_number(label("axis %s: its most", what), a.last * a.step, most, 1e-12);
    check_number(label("axis %s: its step", what), a.step, step, 1e-12);
    double values[] = { a.log ? pow(10, least) : least, a.log ? pow(10, (least + most) / 2) : (least + most) / 2,
                        a.log ? pow(10, most) : most }, part[] = { 0, 0.5, 1 };
    for (size_t i = 0; i < COUNT(part); i++)
        check_number(label("axis %s: place of part %g", what, part[i]), 300 + place(&a, values[i]),
                     300 + part[i] * a.length, 1e-12);
}

static void test_axes(void) {
    check_axis("0.31 to 2.27", make_axis(0.31, 2.27, false, -240), 0, 2.5, 0.5);
    check_axis("-3 to 4", make_axis(-3, 4, false, -240), -4, 4, 2);
    check_axis("on ticks", make_axis(0.3, 0.9, false, -240), 0.2, 1, 0.2);
    check_axis("all the same", make_axis(5e-4, 5e-4, false, -240), 4e-4, 1e-3, 2e-4);
    check_axis("all zero", make_axis(0, 0, false, -240), 0, 1, 0.5);
    check_axis("0.02 to 3, log", make_axis(0.02, 3, true, -240), -2, 1, 1);
    check_axis("3e-5 to 7, log", make_axis(3e-5, 7, true, -240), -6, 2, 2);
    check_axis("1e-30 to 1e30, log", make_axis(1e-30, 1e30, true, -120), -50, 50, 50);
    check_axis("two extremes", make_axis(-1e30, 1e30, false, -240), -1e30, 1e30, 5e29);
    check_axis("a close pair", make_axis(1e30, 1e30 * (1 + 1e-15), false, -240), 1e30, 2e30, 5e29);
    check_axis("a close pair below zero", make_axis(-1e30, -1e30 * (1 - 1e-15), false, -240), -1e30, 0, 5e29);
    check_axis("no step", make_axis(0, 0, false, 700), 0, 1, 1);
    check_axis("step 1", make_axis(0, 1, false, 700), 0, 1, 1);
    check_axis("600 steps", make_axis(0, 600, false, 700), 0, 600, 50);
    check_axis("14049 steps", make_axis(0, 14049, false, 416), 0, 14049, 2000);
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
        size_t length;
        if (utf8_get(p, strlen(p), &length) == INVALID) faults++;
        if (*p == '&') faults += !is_reference(p);
        p += length - 1;
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
    check_true(label("%s: nothing lies outside: %g", what, largest), largest <= 1000);
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
    check_equal("one line: it is seen as a line that ends where it begins", occurrences(picture, "820.0,-40.0 820.0,-40.0 "), 1);
    // steps 0 1, thrice; loss 2 3 4 5; learning rate 0 0.5 1; gradient norm 1 1.5 2
    check_equal("one line: grid lines", occurrences(picture, "<path"), 3 * 2 + 4 + 3 + 3);
    check_true("one line: no tick below the first", !strstr(picture, ">-"));
    picture = drawn(folder, "{\"step\": 1, \"loss\": NaN}\n{\"step\": 2, \"loss\": 1e999}\n"
                            "{\"step\": 3, \"loss\": 1e300}\n{\"step\": 4, \"loss\": 1e-300}\n"
                            "{\"step\": 5, \"loss\": 1e30}\n{\"step\": 6, \"eval_loss\": -1}\n");
    check_picture("strange numbers", picture);
    check_true("strange numbers: the last that can be drawn", strstr(picture, ">1e+30<") != NULL);
    check_equal("strange numbers: the best evaluation has a ring", occurrences(picture, "<circle class=\"r c1\""), 1);
    check_true("strange numbers: the best evaluation in brackets", strstr(picture, ">-1 (-1)<") != NULL);
    Text log = {0};
    for (size_t i = 1; i <= 20000; i++)
        text_print(&log, "{\"step\": %zu, \"loss\": %.9g, \"learning_rate\": 1e-05}\n", i,
                   i > 10000 ? 9.0 : 1 + (double)(i % 7) / 7);
    picture = drawn(folder, log.s);
    check_picture("20000 lines", picture);
    check_true(label("20000 lines: %zu bytes, at most 20000", strlen(picture)), strlen(picture) <= 20000);
    // the mean of 1, 8/7, .. 13/7 is 10/7, and the axis runs from 0 to 10 over 240 pixels
    check_true("20000 lines: the mean of the noise", strstr(picture, ",-34.") != NULL);
    check_true("20000 lines: their end", strstr(picture, "820.0,-216.0 \"/>") != NULL && strstr(picture, ">9<") != NULL);
    check_true("20000 lines: where all are the same, they stand on a tick", strstr(picture, ">1e-05<") != NULL);
    Text title = {0};
    svg_text(&title, 1, 2, "s", "中文中文中文中文中文中文中文中文中文中文中文中文中文/of many bytes.");
    check_true(label("of a long text the end stands: %s", title.s),
               strstr(title.s, ">…文中文") && strstr(title.s, "/of many bytes.<"));
    check_equal("a long text is cut between characters", occurrences(title.s, "?"), 0);
    title.n = 0;
    svg_text(&title, 1, 2, "s", "中文/of a few");
    check_true(label("a text that fits stays: %s", title.s), strstr(title.s, ">中文/of a few<") != NULL);
}

static void check_cell(const Json *object, const char *key, const char *want) {
    check_true(label("%s is %s, wanted %s", key, cell(object, key), want), !strcmp(cell(object, key), want));
}

static void test_log(void) {
    const char *folder = scratch("log");
    make_folders(folder);
    static const char log[] =
        "{\"step\": 2, \"loss\": 3, \"tokens\": 70, \"tokens_per_s\": 100}\n"
        "{\"step\": 2, \"eval_loss\": 2, \"eval_rouge-l\": 0.25}\n"
        "{\"step\": 4, \"loss\": 2, \"tokens\": 90, \"tokens_per_s\": 900}\n"
        "{\"step\": 4, \"eval_loss\": 1.5, \"eval_rouge-l\": 0.123456%s}\n"
        "{\"step\": 6, \"loss\": 1, \"tokens\": 99, \"tokens_per_s\": 200}\n"
        "{\"step\": 6, \"eval_loss\": %s, \"eval_rouge-l\": 0.75, \"name\": \"n\", \"all\": 9399951360}\n";
    const char *text = strf(log, "", "1.75");
    write_file(strf("%s/log.jsonl", folder), text, strlen(text));
    RunLog run = read_log(folder, "tokens");
    const Point *best = &run.curves[EVAL_LOSS].points[BEST];
    check_number("steps of a log", run.steps, 6, 0);
    check_number("the last loss", run.curves[LOSS].points[LAST].y, 1, 0);
    check_number("the mean speed", run.curves[SPEED].points[0].y, 400, 1e-12);
    check_number("an evaluation stands where the line before does", best->x, 90, 0);
    check_number("the lowest evaluation", best->y, 1.5, 0);
    const Json *line = json_next(&run.lines);
    check_cell(line, "step", "4");
    check_cell(line, "eval_rouge-l", "0.1235");
    check_cell(line, "speed", "-");
    line = json_next(&run.lines);
    check_cell(line, "tokens", "99");
    line = json_next(&run.lines);
    check_cell(line, "name", "n");
    check_cell(line, "all", "9399951360");
    json_close(&run.lines);
    text = strf(log, ", \"best\": true", "1.25, \"best\": false");
    write_file(strf("%s/log.jsonl", folder), text, strlen(text));
    run = read_log(folder, "step");
    check_number("the best is what the run calls so", run.curves[EVAL_LOSS].points[BEST].y, 1.5, 0);
    json_close(&run.lines);
}

static void test_svg(void) {
    test_axes();
    test_pictures();
    test_log();
}
