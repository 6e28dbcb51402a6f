// Tests of chat layouts, loss masks, cut samples, and of what a conversation leaves in the cache.

// ---- Rows and labels by the rules, as reference_labels.py states them --------------------------------------------

typedef struct { Ids ids, labels; size_t prompt_n; } Expected;

// A segment is [text, 1 for a special token, target: 0 none, 1 all its ids, 2 all but the first].
static Expected expected_row(const Json *row, size_t prompt, Tokenizer *t) {
    Expected e = {0};
    size_t at = 0;
    for (const Json *s = row->first; s; s = s->next, at++) {
        const Json *text = s->first, *special = text->next, *target = special->next;
        if (at == prompt) e.prompt_n = e.ids.n;
        if (special->number > 0) ids_add(&e.ids, special_id(t, text->text));
        else encode(t, text->text, text->count, &e.ids);
        for (size_t first = e.labels.n, i = first; i < e.ids.n; i++)
            ids_add(&e.labels, target->number > 1.5 ? (i > first ? e.ids.ids[i] : NO_TARGET)
                                                    : target->number > 0 ? e.ids.ids[i] : NO_TARGET);
    }
    return e;
}

static void test_golden_labels(void) {
    static const char *const names[] = { "chatglm2", "chatglm3", "glm4-chat", "0414", "z1", "edge" };
    ChatFormat formats[COUNT(names)], joined[COUNT(names)];     // the latter's vocabulary has pieces across line breaks
    size_t n, n_rows = 0, wrong_prompts = 0;
    for (size_t i = 0; i < COUNT(names); i++) formats[i] = format_of(names[i], i < 2 ? scratch("sentencepiece") : ".");
    small_tiktoken();
    for (size_t i = 0; i < COUNT(names); i++) joined[i] = i < 2 ? formats[i] : format_of(names[i], scratch("tiktoken"));
    char *source = read_file("tests/golden/labels.jsonl", &n);
    JsonReader r = json_open("labels.jsonl", source, n);
    for (const Json *line; (line = json_next(&r)); n_rows++) {
        const char *layout = json_get(line, "layout")->text, *sample = source + json_get(line, "sample")->at;
        size_t k = 0;
        Options o = default_options();
        while (strcmp(names[k], layout)) k++;
        o.official_mask = json_get(line, "official")->number > 0, o.combine = json_get(line, "combine")->number > 0;
        o.max_input_length = 100000;
        const ChatFormat *f = json_get(line, "joined")->number > 0 ? &joined[k] : &formats[k];
        formats[k].joined = false;
        Expected e = expected_row(json_get(line, "row"), (size_t)json_get(line, "prompt")->number, f->tokenizer);
        Dataset set = read_text(strf("%.*s", (int)(strstr(sample, ", \"row\": ") - sample), sample), f, &o);
        check_sample(label("row %zu, %s, official %d, combine %d, joined %d", n_rows + 1, layout, o.official_mask,
                           o.combine, f->joined), &set, 0, e.ids.ids, e.labels.ids, e.ids.n);
        wrong_prompts += set.samples[0].prompt_n != e.prompt_n;
        free(e.ids.ids), free(e.labels.ids);
    }
    check_equal("rows of the golden table", n_rows, 238);
    check_equal("prompts that end elsewhere", wrong_prompts, 0);
}

// ---- Samples that are cut ----------------------------------------------------------------------------------------

static Ids tokens_of_roles(const ChatFormat *f, const int32_t *ids, size_t n) {
    Ids roles = {0};
    for (size_t i = 0; i < n; i++) if (is_special(f->tokenizer, ids[i])) ids_add(&roles, ids[i]);
    return roles;
}

static const char cut_conversation[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \"Be brief.\"},"
    " {\"role\": \"user\", \"content\": \"A long question, \xE4\xBD\xA0\xE5\xA5\xBD\xE4\xBD\xA0\xE5\xA5\xBD, longer"
    " than what stands around it, which has to lose its end first, before others do\"},"
    " {\"role\": \"assistant\", \"content\": \"An answer of \xE6\x97\xA5\xE6\x9C\xAC some length, too.\"},"
    " {\"role\": \"user\", \"content\": \"And?\"}, {\"role\": \"assistant\", \"content\": \"Done.\"}]}";

// The turns of that conversation.
static Conversation cut_turns(void) {
    static const char *const texts[] = {
        "Be brief.", ("A long question, \xE4\xBD\xA0\xE5\xA5\xBD\xE4\xBD\xA0\xE5\xA5\xBD, longer than what stands around"
                      " it, which has to lose its end first, before others do"),
        "An answer of \xE6\x97\xA5\xE6\x9C\xAC some length, too.",
        "And?", "Done." };
    static const int roles[] = { SYSTEM, USER, ASSISTANT, USER, ASSISTANT };
    Conversation c = {0};
    for (size_t i = 0; i < COUNT(texts); i++)
        add_turn(&c, (Turn){ .role = roles[i], .metadata = "", .text = texts[i], .n = strlen(texts[i]) });
    return c;
}

// Tries every length: the row is that of some length, below which each one fits too, and no longer text was needed.
static bool cut_by_the_rule(const ChatFormat *f, const Sample *s, size_t most) {
    static Conversation c;
    size_t longest = 0, misfit = SIZE_MAX;
    bool found = false;
    if (!c.n) c = cut_turns();
    for (size_t i = 0; i < c.n; i++) longest = max_size(longest, c.turns[i].n);
    for (size_t length = 0; length <= longest; length++) {
        Row row = encode_turns(f, c.turns, c.n, length, false);
        if (row.ids.n > most) misfit = min_size(misfit, length);
        found |= same_ids(row.ids, s->ids, s->n) && (misfit == SIZE_MAX || length + 1 >= misfit);
        if (misfit == SIZE_MAX && !same_ids(row.ids, s->ids, s->n)) found = false;
        free_row(&row);
    }
    return found;
}

static void test_cutting(void) {
    static const char *const names[] = { "glm4-chat", "0414", "edge" };
    for (size_t k = 0; k < COUNT(names); k++) {
        ChatFormat f = format_of(names[k], ".");
        Options whole = default_options(), o = whole;
        Dataset all = read_text(cut_conversation, &f, &whole);
        Ids roles = tokens_of_roles(&f, all.samples[0].ids, all.samples[0].n);
        o.overlong = "truncate";
        for (size_t most = all.longest; most >= 20; most -= 7) {
            const char *what = strf("%s, %zu of %zu ids", names[k], most, all.longest);
            o.max_input_length = (int64_t)most - 2, o.max_output_length = 1;
            Dataset set = read_text(cut_conversation, &f, &o);
            const Sample *s = &set.samples[0];
            Ids kept = tokens_of_roles(&f, s->ids, s->n);
            Text text = decode(f.tokenizer, s->ids, s->n);
            size_t invalid = 0;
            for (size_t at = 0, length; at < text.n; at += length)
                invalid += utf8_get(text.s + at, text.n - at, &length) == INVALID;
            check_true(label("%s: all texts are cut to one length, as little as halving finds", what),
                       cut_by_the_rule(&f, s, most));
            check_ids(label("%s: role tokens stay", what), kept, roles.ids, roles.n);
            check_true(label("%s: ends with a stop token that is learned", what), is_stop(&f, s->labels[s->n - 1]));
            check_true(label("%s: fits with %zu, has %zu targets", what, s->n, s->n_targets),
                       s->n <= most && s->n_targets >= 4);
            check_equal(label("%s: counted as cut", what), set.n_cut, most < all.longest);
            check_equal(label("%s: characters cut in two", what), invalid, 0);
            free(kept.ids), free(text.s);
        }
    }
    static const char with_tools[] =
        "{\"tools\": [{\"function\": {\"name\": \"weather\", \"description\": \"How warm it is, and whether it rains\"}}],"
        " \"messages\": [{\"role\": \"user\", \"content\": \"Is it cold where you are?\"},"
        " {\"role\": \"assistant\", \"content\": \"It is rather cold here.\"}]}";
    ChatFormat f = format_of("glm4-chat", ".");
    Options o = default_options();
    size_t whole_n = read_text(with_tools, &f, &o).longest;
    o.overlong = "truncate", o.max_input_length = (int64_t)whole_n - 14;
    o.max_output_length = 1;
    Dataset tools = read_text(with_tools, &f, &o);
    Text text = decode(f.tokenizer, tools.samples[0].ids, tools.longest);
    check_true("tools stay whole where texts are cut", strstr(text.s, "## weather\n\n{\n    \"name\": \"weather\",") &&
               strstr(text.s, "\"How warm it is, and whether it rains\"\n}" GLM4_TOOL_END) && tools.longest < whole_n);
    o.overlong = "truncate", o.max_input_length = 2, o.max_output_length = 1;
    Dataset ready = read_text("{\"input_ids\": [1, 2, 3, 4, 5, 6], \"labels\": [-100, -100, -100, 4, 5, 6]}", &f, &o);
    check_sample("ready ids keep their last", &ready, 0, (const int32_t[]){ 1, 2, 3, 6 },
                 (const int32_t[]){ -100, -100, -100, 6 }, 4);
}

// ---- Chat: what was said before is what training encodes ---------------------------------------------------------

// After each turn: the ids that the model has seen are the conversation's, and so are the logits.
static void check_history(const char *layout, const char *tokenizer, const char *system) {
    Options o = default_options();
    Opened m = open_model("tests/tiny", &o);
    start_method(&m, 0, false);
    ChatFormat f = format_of(layout, tokenizer);
    Chat chat = { .format = &f, .o = &o };
    static const char *const questions[] = {
        "ab ab", "\xE4\xBD\xA0\xE5\x8F\xAB\xE4\xBB\x80\xE4\xB9\x88\xEF\xBC\x9F", "b" };
    size_t V = m.model->config.vocab_size;
    o.max_new_tokens = 6, o.system = system;
    chat.g = make_generator(m.model, m.method, 512, 1);
    if (system) add_turn(&chat.turns, (Turn){ .role = SYSTEM, .metadata = "", .text = system, .n = strlen(system) });
    for (size_t i = 0; i < COUNT(questions); i++) {
        int kept = silence(), kept_stderr = dup(2);
        dup2(1, 2);
        chat_turn(&chat, questions[i], strlen(questions[i]));
        dup2(kept_stderr, 2), close(kept_stderr);
        unsilence(kept);
        add_turn(&chat.turns, (Turn){ .role = USER, .metadata = "", .text = "b a", .n = 3 });
        Row row = encode_turns(&f, chat.turns.turns, chat.turns.n, SIZE_MAX, true);
        feed_turns(&chat);      // over what the cache holds
        check_ids(label("%s, turn %zu: ids", layout, i + 1), chat.fed, row.ids.ids, row.ids.n);
        check_equal(label("%s, turn %zu: rows of the cache", layout, i + 1), chat.g.run.caches->n, row.ids.n);
        Generator fresh = make_generator(m.model, m.method, 512, 1);
        feed(&fresh, row.ids.ids, row.ids.n);
        double *want_logits = alloc(V, sizeof *want_logits);
        for (size_t v = 0; v < V; v++) want_logits[v] = (double)fresh.logits[v];
        check_close(label("%s, turn %zu: logits as from a fresh cache", layout, i + 1), chat.g.logits, want_logits, V,
                    TOLERANCE(4e-6, 4e-15));
        free(want_logits), free_row(&row);
        chat.turns.n--;
    }
}

// An answer as ids, read back as a turn and encoded again.
static void test_turns_back(void) {
    static const struct { const char *layout, *folder, *metadata, *text; } cases[] = {
        { "glm4-chat", ".", "", "yes" }, { "glm4-chat", ".", "get_weather", "{\"at\": 1}" }, { "edge", ".", "", "" },
        { "chatglm3", "sentencepiece", "", " ab" }, { "chatglm3", "sentencepiece", "ab", "a\nb" },
        { "chatglm2", "sentencepiece", "", "ab\nab" }, { "z1", ".", "", "<think>\nwell</think>\n\nyes" } };
    for (size_t i = 0; i < COUNT(cases); i++) {
        ChatFormat f = format_of(cases[i].layout, i < 3 || i == 6 ? "." : scratch(cases[i].folder));
        Turn turns[] = { { .role = USER, .metadata = "", .text = "ab", .n = 2 },
                         { .role = ASSISTANT, .metadata = cases[i].metadata, .metadata_n = strlen(cases[i].metadata),
                           .text = cases[i].text, .n = strlen(cases[i].text) } };
        Row row = encode_turns(&f, turns, 2, SIZE_MAX, false), asked = encode_turns(&f, turns, 1, SIZE_MAX, true);
        check_ids(label("answer %zu: the prompt is the beginning", i), (Ids){ row.ids.ids, row.prompt_n, 0 },
                  asked.ids.ids, asked.ids.n);
        Ids answer = { row.ids.ids + row.prompt_n, row.ids.n - 1 - row.prompt_n, 0 };
        Turn t = answer_turn(&f, &answer);
        check_true(label("answer %zu: metadata '%.*s'", i, (int)t.metadata_n, t.metadata),
                   t.metadata_n == turns[1].metadata_n && !memcmp(t.metadata, turns[1].metadata, t.metadata_n));
        check_true(label("answer %zu: text '%s'", i, t.text), t.n == turns[1].n && !memcmp(t.text, turns[1].text, t.n));
    }
}

// Columns of a terminal: Chinese and full-width signs take two, quotation marks and dashes one.
static void test_widths(void) {
    static const uint32_t wide[] = { 0x4F60, 0x3002, 0xFF1A, 0xAC00, 0x1F600, 0x20000 };
    static const uint32_t narrow[] = { 'a', 0xE9, 0x2014, 0x201C, 0x2026, 0x2460, 0xFF61 };
    for (size_t i = 0; i < COUNT(wide); i++) check_true(label("U+%04X is wide", wide[i]), is_wide(wide[i]));
    for (size_t i = 0; i < COUNT(narrow); i++) check_true(label("U+%04X is not", narrow[i]), !is_wide(narrow[i]));
}

static void test_chat(void) {
    test_widths();
    Model few = { .config.max_positions = 1, .first_position = 128 };
    check_equal("positions behind a prefix: two at least", positions_left(&few), 2);
    few.config.max_positions = 1000;
    check_equal("the others", positions_left(&few), 872);
    small_sentencepiece();
    test_golden_labels();
    test_cutting();
    test_turns_back();
    check_history("glm4-chat", ".", "Be brief.");
    check_history("z1", ".", "Be brief.");
    check_history("chatglm2", scratch("sentencepiece"), NULL);
    check_history("chatglm3", scratch("sentencepiece"), "ab");
}
