// Tests of what is read and written: JSON, tensor files, tokenizers, conversations, data sets.

// ---- JSON --------------------------------------------------------------------------------------------------------

static void render_json(Text *t, const Json *j) {
    if (j->key) text_json(t, j->key, strlen(j->key)), text_print(t, ":");
    switch (j->type) {
        case JSON_NULL: text_print(t, "null"); break;
        case JSON_BOOL: text_print(t, j->number != 0 ? "true" : "false"); break;
        case JSON_NUMBER: text_print(t, "%.17g", j->number); break;
        case JSON_STRING: text_json(t, j->text, j->count); break;
        case JSON_ARRAY: case JSON_OBJECT: default:
            text_print(t, j->type == JSON_ARRAY ? "[%zu|" : "{%zu|", j->count);
            for (const Json *k = j->first; k; k = k->next) render_json(t, k), text_print(t, k->next ? "," : "");
            text_print(t, j->type == JSON_ARRAY ? "]" : "}");
    }
}

// What is read, in one line: members counted, strings unescaped and escaped again, numbers with 17 digits.
static const struct { const char *source, *read; } json_values[] = {
    { " null ", "null" }, { "true", "true" }, { "[false]", "[1|false]" }, { "[]", "[0|]" }, { "{ }", "{0|}" },
    { "0", "0" }, { "-0", "-0" }, { "-12.5e-1", "-1.25" }, { "1E3", "1000" }, { "1e+2", "100" },
    { "9007199254740993", "9007199254740992" },
    { "0.1", "0.10000000000000001" }, { "1e400", "inf" }, { "[NaN, Infinity]", "[2|nan,inf]" },
    { "\"\"", "\"\"" }, { "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\\"\\\\/\\b\\f\\n\\r\\t\"" },
    { "\"\\u0041\\u00e9\\u4F60\"", "\"A\xC3\xA9\xE4\xBD\xA0\"" }, { "\"a\\u0000b\"", "\"a\\u0000b\"" },
    { "\"\\ud83d\\ude80\"", "\"\xF0\x9F\x9A\x80\"" },
    { "\"\\ud83d\"", "\"\xEF\xBF\xBD\"" }, { "\"\\ude80x\"", "\"\xEF\xBF\xBDx\"" },
    { "\"\\ud83d\\u0041\"", "\"\xEF\xBF\xBD" "A\"" }, { "\"\\ud83d\\n\"", "\"\xEF\xBF\xBD\\n\"" },
    { "\"\\ud83d\\ud83d\\ude80\"", "\"\xEF\xBF\xBD\xF0\x9F\x9A\x80\"" },
    { "\"\\uFFFF\\uD7FF\\uE000\"", "\"\xEF\xBF\xBF\xED\x9F\xBF\xEE\x80\x80\"" },
    { "\xEF\xBB\xBF[1]", "[1|1]" }, { "\t[ 1 ,\r\n2 ]", "[2|1,2]" },
    { "{\"a\":{\"b\":[{}]},\"\":1}", "{2|\"a\":{1|\"b\":[1|{0|}]},\"\":1}" },
};

// What is no JSON, and line and column of the place that says so.
static const struct { const char *source, *place; } json_errors[] = {
    { "", "1:1" }, { "[1,]", "1:4" }, { "[1 2]", "1:4" }, { "{\"a\" 1}", "1:6" }, { "{a:1}", "1:2" },
    { "{\"a\":1,}", "1:8" }, { "[1", "1:3" }, { "{\"a\":1", "1:7" }, { "\"ab", "1:4" }, { "\"a\nb\"", "1:3" },
    { "\"\\x\"", "1:3" }, { "\"\\", "1:2" }, { "\"\\u12g4\"", "1:6" }, { "\"\\u12", "1:6" }, { "01", "1:1" },
    { "-", "1:1" }, { "+1", "1:1" }, { "1.", "1:1" }, { ".5", "1:1" }, { "1e", "1:1" }, { "1 2", "1:3" },
    { "nul", "1:1" }, { "[\n\n  \xE4\xBD\xA0]", "3:3" }, { "[\"\xE4\xBD\xA0\", x]", "1:7" },
};

static const Json *read_json(const char *source, JsonReader *r) {
    *r = json_open("file.json", source, strlen(source));
    return json_only(r);
}

static void read_bad_json(const void *source) {
    JsonReader r;
    read_json(source, &r);
}

static const char *nested(size_t depth) {
    Text t = {0};
    for (size_t i = 0; i < depth; i++) text_print(&t, "[");
    for (size_t i = 0; i < depth; i++) text_print(&t, "]");
    return t.s;
}

// Values of a file; each is {"i": its number}. The nodes of one are those of the next again.
static size_t count_values(const char *source) {
    JsonReader r = json_open("file.json", source, strlen(source));
    size_t n = 0, blocks = 0;
    for (const Json *j; (j = json_next(&r)); n++) {
        const Json *i = json_get(j, "i");
        check_true(label("value %zu of %.40s", n, source), json_is(i, JSON_NUMBER) && i->number == (double)n);
    }
    for (const JsonBlock *b = r.blocks; b; b = b->next) blocks++;
    check_true(label("%zu blocks of nodes for %.40s", blocks, source), blocks <= 4);
    json_close(&r);
    return n;
}

static void test_json(void) {
    for (size_t i = 0; i < COUNT(json_values); i++) {
        JsonReader r;
        Text t = {0};
        const char *wanted = json_values[i].read;
        render_json(&t, read_json(json_values[i].source, &r));
        check_true(label("%s is read as %s: %s", json_values[i].source, wanted, t.s), !strcmp(t.s, wanted));
        json_close(&r);
        free(t.s);
    }
    for (size_t i = 0; i < COUNT(json_errors); i++)
        check_fails(label("json error %zu", i), read_bad_json, json_errors[i].source,
                    strf("file.json:%s: ", json_errors[i].place));
    JsonReader r;
    check_true("arrays may be nested a hundred deep", read_json(nested(JSON_DEPTH), &r)->type == JSON_ARRAY);
    check_fails("but not deeper", read_bad_json, nested(JSON_DEPTH + 1), "nested deeper");
    check_fails("nor very deep", read_bad_json, nested(100000), "nested deeper");
    check_equal("JSON lines", count_values("{\"i\":0}\n{\"i\":1}\r\n\n{\"i\":2}"), 3);
    check_equal("one array", count_values(" [ {\"i\":0}, {\"i\":1} ] \n"), 2);
    check_equal("an empty file", count_values("\n"), 0);
    check_equal("an empty array", count_values("[]"), 0);
    const Json *twice = read_json("{\"a\":1,\"a\":2}", &r);
    check_true("of two members of one name the last counts", json_get(twice, "a")->number == 2);
    check_true("no member of another name", !json_get(twice, "b"));
    Text many = {0};        // more nodes than one block holds, so that later blocks are used and used again
    for (size_t i = 0; i < 3; i++) {
        text_print(&many, "{\"i\":%zu,\"x\":[0", i);
        for (size_t k = 0; k < 1500; k++) text_print(&many, ",%zu", k);
        text_print(&many, "]}\n");
    }
    check_equal("large values", count_values(many.s), 3);
}

// ---- Tensor files ------------------------------------------------------------------------------------------------

// Tensors of every type, with random bytes; names that need escapes; one without elements.
static size_t make_tensors(StoredTensor *t) {
    static const struct { const char *name; Dtype dtype; size_t n_dims, shape[MAX_DIMS]; } made[] = {
        { "double", F64, 2, { 3, 5 } }, { "float", F32, 1, { 7 } }, { "half", F16, 3, { 2, 3, 1 } },
        { "bf\"16\\\n", BF16, 1, { 1 } }, { "\xE4\xBD\xA0", I64, 4, { 1, 2, 1, 2 } }, { "i32", I32, 2, { 0, 4 } },
        { "one", I32, 0, { 0 } } };
    for (size_t i = 0; i < COUNT(made); i++) {
        t[i] = (StoredTensor){ .name = strf("%s", made[i].name), .dtype = made[i].dtype, .n = 1 };
        t[i].n_dims = made[i].n_dims;
        memcpy(t[i].shape, made[i].shape, sizeof t[i].shape);
        for (size_t d = 0; d < t[i].n_dims; d++) t[i].n *= t[i].shape[d];
        t[i].bytes = t[i].n * dtype_size(t[i].dtype);
        char *bytes = alloc(t[i].bytes, 1);
        for (size_t b = 0; b < t[i].bytes; b++) bytes[b] = (char)pick(256);
        t[i].data = bytes;
    }
    return COUNT(made);
}

static void test_round_trip(void) {
    StoredTensor made[16];
    size_t n = make_tensors(made);
    const char *path = scratch("round.safetensors");
    TensorWriter w = begin_tensor_file(path, made, n, ",\"note\":\"a\"");
    for (size_t i = 0; i < n; i++) write_tensor_bytes(&w, made[i].data, made[i].bytes);
    check_true("the file does not appear before it is complete", !exists(path));
    finish_tensor_file(&w);
    TensorSet set = {0};
    read_tensor_file(&set, path);
    check_equal("tensors read", set.n, n);
    check_true("metadata read", !strcmp(set.metadata.s, "format=pt\nnote=a\n"));
    for (size_t i = 0; i < n; i++) {
        const StoredTensor *s = find_tensor(&set, made[i].name);
        bool same = same_shape(&made[i], s) && s->dtype == made[i].dtype && s->n == made[i].n;
        if (!check_true(label("tensor %zu is there in its shape", i), same && s->bytes == made[i].bytes)) continue;
        check_true(label("tensor %zu has its bytes", i), !memcmp(s->data, made[i].data, s->bytes));
        check_true(label("tensor %zu lies on its boundary", i), (uintptr_t)s->data % 8 == 0 || s->dtype != F64);
    }
}

// A safetensors file with this header, spelt as it is, and so many bytes 0, 1, 2, ... behind it.
static const char *raw_tensor_file(const char *header, size_t n) {
    Text t = {0};
    const char *path = scratch("raw.safetensors");
    for (int i = 0; i < 8; i++) text_add(&t, (char[]){ (char)(strlen(header) >> (8 * i) & 255) }, 1);
    text_add(&t, header, strlen(header));
    for (size_t i = 0; i < n; i++) text_add(&t, (char[]){ (char)i }, 1);
    write_file(path, t.s, t.n);
    return path;
}

static void read_bad_tensors(const void *path) {
    TensorSet set = {0};
    read_tensor_file(&set, path);
}

static void test_raw_files(void) {
    static const struct { const char *header; size_t bytes; const char *message; } bad[] = {
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 7, "cut off" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 9, "follow the last tensor" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "hole" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "say otherwise" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "say otherwise" },
        { "{\"a\":{\"dtype\":\"F99\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown dtype" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, "'a'" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", 8, "'a'" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "dimensions" },
        { "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "lacks" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
          "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}", 6, "overlap" },
        { "[]", 0, "no JSON object" }, { "{\"a\":", 0, "no JSON" },
    };
    for (size_t i = 0; i < COUNT(bad); i++)
        check_fails(label("damaged tensor file %zu", i), read_bad_tensors,
                    raw_tensor_file(bad[i].header, bad[i].bytes), bad[i].message);
    write_file(scratch("short.safetensors"), "\1\0\0", 3);
    check_fails("a file of three bytes", read_bad_tensors, scratch("short.safetensors"), "no whole safetensors file");
    // numbers that do not lie on their boundary, in an order that is not the header's
    TensorSet set = {0};
    read_tensor_file(&set, raw_tensor_file("{\"b\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[2,6]},"
                                           "\"a\":{\"dtype\":\"F16\",\"shape\":[1],\"data_offsets\":[0,2]}}", 6));
    int32_t b;
    memcpy(&b, find_tensor(&set, "b")->data, sizeof b);
    check_equal("a number at an odd place", (size_t)b, 0x05040302);
    check_true("is moved to its boundary", (uintptr_t)find_tensor(&set, "b")->data % 4 == 0);
}

static void test_tensor_files(void) {
    test_round_trip();
    test_raw_files();
}

// ---- Random models on disk ---------------------------------------------------------------------------------------

// What one rounding to this type may change a number by, relative to it.
static double rounding(Dtype dtype) {
    return dtype == REAL ? 0 : dtype == F32 ? 0x1p-24 : dtype == F16 ? 0x1p-11 : 0x1p-8;
}

// Random numbers written to a folder and mapped again.
static void check_written(const char *folder, Model *m, Model *loaded, Dtype dtype, double max_shard) {
    Options o = default_options();
    o.std = 0.02;
    make_folders(folder);
    for (size_t i = 0; i < m->n_tensors; i++) m->tensors[i]->file_dtype = dtype;
    choose_files(m, max_shard, (Coding){0});
    write_weights(folder, m, (TensorSource){ initial_tensor, &o }, (Coding){0});
    bind_files(loaded, folder);
    check_true(label("%s: shards where they are wanted", folder),
               exists(strf("%s/model.safetensors.index.json", folder)) == (max_shard < 1e6));
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = loaded->tensors[i];
        double worst = 0;
        real *device = device_take(t->n, sizeof *device, t->name);
        StoredTensor s = { .dtype = t->file_dtype, .data = t->file_data };
        initial_tensor(device, m->tensors[i], &o);
        real *numbers = host_copy(device, t->n);
        for (size_t k = 0; k < t->n; k++) {
            double x = (double)numbers[k], error = fabs(stored_number(&s, k) - x) / fmax(fabs(x), 0x1p-14);
            if (!(error <= worst)) worst = error;
        }
        check_true(label("%s: %s has its dtype", folder, t->name), t->file_dtype == dtype);
        check_error(label("%s: %s", folder, t->name), "relative", 0, worst, 0, worst, rounding(dtype));
        memory_give(device), free(numbers);
    }
}

// A model begins with gains 1, biases 0 and matrices uniform with the deviation that was asked for.
static void check_first_numbers(Model *m) {
    Options o = default_options();
    o.std = 0.02;
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        double sum = 0, squares = 0, n = (double)t->n, center = strstr(t->name, "norm") ? 1 : 0;
        double std = t->n_dims == 2 ? o.std : 0;
        real *device = device_take(t->n, sizeof *device, t->name);
        initial_tensor(device, t, &o);
        real *x = host_copy(device, t->n);
        for (size_t k = 0; k < t->n; k++) sum += (double)x[k], squares += pow((double)x[k] - center, 2);
        check_true(label("first numbers of %s: mean %g, deviation %g", t->name, sum / n, sqrt(squares / n)),
                   fabs(sum / n - center) <= 5 * std / sqrt(n) && fabs(sqrt(squares / n) - std) <= std / sqrt(n) * 4);
        memory_give(device), free(x);
    }
}

static const char tall_config[] =       // its embedding is more than is written at once
    "{\"model_type\": \"glm\", \"vocab_size\": 70001, \"hidden_size\": 4, \"num_hidden_layers\": 1, \"head_dim\": 4,"
    " \"num_attention_heads\": 1, \"num_key_value_heads\": 1, \"intermediate_size\": 3,"
    " \"tie_word_embeddings\": true, \"max_position_embeddings\": 8}";

static void test_init(void) {
    static const struct { const char *folder, *config; Dtype dtype; double max_shard; } cases[] = {
        { "init-real", "glm4", REAL, 1e9 }, { "init-f32", "glm4", F32, 10000 }, { "init-f16", "chatglm", F16, 3000 },
        { "init-bf16", "glm_edge", BF16, 1 } };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *config = strf("tests/golden/%s", cases[i].config);
        check_written(scratch(cases[i].folder), golden_model(config), golden_model(config), cases[i].dtype,
                      cases[i].max_shard);
    }
    check_first_numbers(golden_model("tests/golden/glm4"));
    check_first_numbers(golden_model("tests/golden/chatglm"));
    check_written(scratch("init-tall"), describe_model(parse_config("tall model", tall_config)),
                  describe_model(parse_config("tall model", tall_config)), F16, 1e9);
}

// ---- The split pattern -------------------------------------------------------------------------------------------
// GLM-4's pattern, alternative by alternative as it is written, by a matcher that tries every count of every item, most
// first, as regular expressions are defined. Characters and their classes are spelt out here, not looked up.

typedef struct { const char *s; char class; } Letter;       // L letter, N number, S space, O other, B bytes

static const Letter alphabet[] = {
    { "a", 'L' }, { "s", 'L' }, { "S", 'L' }, { "\xC5\xBF", 'L' }, { "t", 'L' }, { "T", 'L' }, { "r", 'L' },
    { "E", 'L' }, { "e", 'L' },
    { "v", 'L' }, { "M", 'L' }, { "l", 'L' }, { "L", 'L' }, { "d", 'L' }, { "\xC3\xA9", 'L' },
    { "\xE4\xBD\xA0", 'L' }, { "\xE2\x84\xAA", 'L' },
    { "1", 'N' }, { "7", 'N' }, { "\xEF\xBC\x92", 'N' }, { "\xE2\x85\xA7", 'N' }, { "\xC2\xBD", 'N' },
    { " ", 'S' }, { " ", 'S' }, { "\t", 'S' }, { "\r", 'S' }, { "\n", 'S' }, { "\xE3\x80\x80", 'S' },
    { "\xC2\xA0", 'S' }, { "\xC2\x85", 'S' },
    { "'", 'O' }, { "'", 'O' }, { ".", 'O' }, { "!", 'O' }, { "\xE3\x80\x82", 'O' }, { "\xF0\x9F\x9A\x80", 'O' },
    { "\xCC\x81", 'O' },
    { "\xE2\x80\x8B", 'O' }, { "<", 'O' }, { "|", 'O' }, { ">", 'O' }, { "\xE2\x80\x99", 'O' }, { "\0", 'O' },
    // no UTF-8, and so several signs of one byte: stray bytes, a surrogate, too long forms, past the last character
    { "\xFF", 'B' }, { "\x80", 'B' }, { "\xED\xA0\x80", 'B' }, { "\xE0\x80\x80", 'B' }, { "\xC1\x81", 'B' },
    { "\xF0\x80\x80\x80", 'B' }, { "\xF4\x90\x80\x80", 'B' }, { "\xF8", 'B' },
};
enum { N_BAD = 8, N_GOOD = COUNT(alphabet) - N_BAD };

static bool is_break(const Letter *c) { return *c->s == '\r' || *c->s == '\n'; }
static bool is_letter(const Letter *c) { return c->class == 'L'; }
static bool is_number(const Letter *c) { return c->class == 'N'; }
static bool is_white(const Letter *c) { return c->class == 'S'; }
static bool is_blank(const Letter *c) { return *c->s == ' '; }
static bool is_opener(const Letter *c) { return !is_break(c) && !is_letter(c) && !is_number(c); }
static bool is_sign(const Letter *c) { return !is_white(c) && !is_letter(c) && !is_number(c); }

#define ANY SIZE_MAX
typedef struct { bool (*fits)(const Letter *); size_t least, most; } Item;
typedef struct { Item items[4]; bool space_follows; } Alternative;
static const Alternative alternatives[] = {
    { { { is_opener, 0, 1 }, { is_letter, 1, ANY } }, false },                              // [^\r\n\p{L}\p{N}]?\p{L}+
    { { { is_number, 1, 3 } }, false },                                                     // \p{N}{1,3}
    { { { is_blank, 0, 1 }, { is_sign, 1, ANY }, { is_break, 0, ANY } }, false },           // ?[^\s\p{L}\p{N}]+[\r\n]*
    { { { is_white, 0, ANY }, { is_break, 1, ANY } }, false },                              // \s*[\r\n]+
    { { { is_white, 1, ANY } }, true },                                                     // \s+(?!\S)
    { { { is_white, 1, ANY } }, false },                                                    // \s+
};

// How many characters match, SIZE_MAX when it cannot be.
static size_t match_items(const Item *item, bool space_follows, const Letter *const *s, size_t n) {
    size_t most = 0;
    if (!item->fits) return space_follows && n && !is_white(s[0]) ? SIZE_MAX : 0;
    while (most < item->most && most < n && item->fits(s[most])) most++;
    for (size_t count = most + 1; count-- > item->least; ) {
        size_t rest = match_items(item + 1, space_follows, s + count, n - count);
        if (rest != SIZE_MAX) return count + rest;
    }
    return SIZE_MAX;
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)
static size_t match_contraction(const Letter *const *s, size_t n) {
    static const char *const endings[] = { "s", "t", "re", "ve", "m", "ll", "d" };
    for (size_t i = 0; n && *s[0]->s == '\'' && i < COUNT(endings); i++) {
        size_t length = strlen(endings[i]), k = 0;
        while (k < length && k + 1 < n && (tolower((unsigned char)*s[k+1]->s) == endings[i][k] ||
               (endings[i][k] == 's' && !strcmp(s[k+1]->s, "\xC5\xBF")))) k++;
        if (k == length) return 1 + length;
    }
    return SIZE_MAX;
}

static size_t match_chunk(const Letter *const *s, size_t n) {
    size_t count = match_contraction(s, n);
    for (size_t i = 0; count == SIZE_MAX && i < COUNT(alternatives); i++)
        count = match_items(alternatives[i].items, alternatives[i].space_follows, s, n);
    return count;
}

static size_t letter_bytes(const Letter *c) { return *c->s ? strlen(c->s) : 1; }

enum { LONGEST_TEXT = 32 };

// A random text of letters of the alphabet; each of its bytes counts as one when it is no UTF-8.
static Text random_letters(size_t n_letters, const Letter **letters, size_t *n) {
    static const Letter bad_byte = { "\xFF", 'O' };
    Text t = {0};
    size_t length = 1 + pick(LONGEST_TEXT / 4);
    text_add(&t, "", 0);
    *n = 0;
    for (size_t i = 0; i < length; i++) {
        const Letter *c = &alphabet[pick(n_letters)];
        for (size_t k = 0; k < (c->class == 'B' ? letter_bytes(c) : 1); k++)
            letters[(*n)++] = c->class == 'B' ? &bad_byte : c;
        text_add(&t, c->s, letter_bytes(c));
    }
    return t;
}

// Whether the first chunks are those of the pattern, to the end of the text.
static bool same_chunks(const Tokenizer *t, Text text, const Letter *const *letters, size_t n) {
    for (size_t at = 0, done = 0; done < n; ) {
        size_t count = match_chunk(letters + done, n - done), bytes = 0;
        if (count == 0 || count == SIZE_MAX) return false;
        for (size_t i = 0; i < count; i++) bytes += letter_bytes(letters[done + i]);
        if (next_chunk(t, text.s + at, text.n - at) != bytes) return false;
        at += bytes, done += count;
    }
    return true;
}

static void test_chunks(void) {
    const Tokenizer *t = load_tokenizer_file("tokenizer.bin");
    const Letter *letters[LONGEST_TEXT];
    size_t n, wrong = 0;
    Text example = {0};
    for (size_t i = 0; i < 100000; i++) {
        Text text = random_letters(COUNT(alphabet), letters, &n);
        if (!same_chunks(t, text, letters, n) && !wrong++)
            for (size_t k = 0; k < text.n; k++) text_print(&example, " %02X", (unsigned char)text.s[k]);
        free(text.s);
    }
    check_equal(label("texts split wrongly, the first:%s", example.s ? example.s : ""), wrong, 0);
}

// ---- Tokenizers --------------------------------------------------------------------------------------------------

typedef struct { const char *name; Tokenizer *t; } Vocabulary;

static void wire_bytes(Text *t, int field, const char *bytes, size_t n) {
    text_add(t, (char[]){ (char)(field << 3 | 2), (char)n }, 2);
    text_add(t, bytes, n);
}

static void wire_number(Text *t, int field, int value) { text_add(t, (char[]){ (char)(field << 3), (char)value }, 2); }

static void wire_piece(Text *model, const char *text, float score, int type) {
    Text t = {0};
    char bytes[4];
    memcpy(bytes, &score, 4);
    wire_bytes(&t, 1, text, strlen(text));
    text_add(&t, (char[]){ 2 << 3 | 5 }, 1);
    text_add(&t, bytes, 4);
    wire_number(&t, 3, type);
    wire_bytes(model, 1, t.s, t.n);
    free(t.s);
}

// A SentencePiece model of a few pieces, as the released ones are built; the better a piece, the greater its score.
static const char *small_sentencepiece(void) {
    static const struct { const char *text; float score; } normal[] = {     // ids from 259 on
        { "\xE2\x96\x81", -7 }, { "a", -8 }, { "b", -9 }, { "ab", -2 }, { "\xE2\x96\x81" "a", -1 },
        { "\xE2\x96\x81" "ab", -3 },
        { "ba", -4 }, { "abab", -5 }, { "\xE4\xB8\xAD", -6 }, { "<", -10 }, { "s", -11 }, { ">", -12 }, { "<s", -13 } };
    Text model = {0}, trainer = {0}, normalizer = {0};
    wire_piece(&model, "<unk>", 0, SP_UNKNOWN);
    wire_piece(&model, "<s>", 0, SP_CONTROL), wire_piece(&model, "</s>", 0, SP_CONTROL);
    for (unsigned b = 0; b < 256; b++) wire_piece(&model, strf("<0x%02X>", b), 0, SP_BYTE);
    for (size_t i = 0; i < COUNT(normal); i++) wire_piece(&model, normal[i].text, normal[i].score, SP_NORMAL);
    wire_number(&trainer, 3, 2);                                            // BPE
    wire_number(&normalizer, 3, 1), wire_number(&normalizer, 4, 0);         // dummy prefix; blanks stay
    wire_bytes(&model, 2, trainer.s, trainer.n), wire_bytes(&model, 3, normalizer.s, normalizer.n);
    make_folders(scratch("sentencepiece"));
    write_file(scratch("sentencepiece/tokenizer.model"), model.s, model.n);
    return scratch("sentencepiece/tokenizer.model");
}

static void text_base64(Text *t, const char *s, size_t n) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        unsigned bits = 0;
        for (size_t k = 0; k < 3; k++) bits = bits << 8 | (i + k < n ? (unsigned char)s[i + k] : 0);
        for (size_t k = 0; k < 4; k++) text_print(t, "%c", i + k <= n ? digits[bits >> (18 - 6*k) & 63] : '=');
    }
}

// A tiktoken vocabulary: the bytes in order, then a few pieces. No merging leads to "xyz".
static const char *small_tiktoken(void) {
    static const char *const pieces[] = { "ab", " a", "bc", "abc", "xyz", "aa", "abca", "\n\n", "\n ", "\r\n" };    // ids from 256 on
    Text t = {0};
    for (size_t i = 0; i < 256 + COUNT(pieces); i++) {
        char byte = (char)i;
        if (i < 256) text_base64(&t, &byte, 1);
        else text_base64(&t, pieces[i - 256], strlen(pieces[i - 256]));
        text_print(&t, " %zu\n", i);
    }
    make_folders(scratch("tiktoken"));
    write_file(scratch("tiktoken/tokenizer.model"), t.s, t.n);
    return scratch("tiktoken/tokenizer.model");
}

static Ids encoded(Tokenizer *t, const char *s, size_t n) {
    Ids ids = {0};
    encode(t, s, n, &ids);
    return ids;
}

static bool same_ids(Ids a, const int32_t *b, size_t n) { return a.n == n && (!n || !memcmp(a.ids, b, n * sizeof *b)); }

static const char *ids_text(const int32_t *ids, size_t n) {
    Text t = {0};
    text_add(&t, "", 0);
    for (size_t i = 0; i < n; i++) text_print(&t, " %d", ids[i]);
    return t.s;
}

static void check_ids(const char *what, Ids got, const int32_t *ids, size_t n) {
    check_true(label("%s: got%s, want%s", what, ids_text(got.ids, got.n), ids_text(ids, n)), same_ids(got, ids, n));
}

// Worked out by hand from the rules.
static void test_small_vocabularies(Tokenizer *sp, Tokenizer *tiktoken) {
    static const struct { bool sentencepiece; const char *text; size_t n; int32_t ids[8]; } cases[] = {
        { true, "", 0, { 0 } }, { true, "ab", 1, { 264 } }, { true, "abab", 2, { 264, 262 } },
        { true, "bab", 3, { 259, 261, 262 } },
        { true, " ab", 2, { 259, 264 } }, { true, "c", 2, { 259, 102 } }, { true, "\n", 2, { 259, 13 } },
        { true, "a\xE4\xB8\xAD", 2, { 263, 267 } },
        { true, "\xF0\x9F\x9A\x80", 5, { 259, 243, 162, 157, 131 } }, { true, "<s>", 3, { 259, 271, 270 } },
        { true, "<0x41>", 7, { 259, 268, 51, 123, 55, 52, 270 } }, { true, "\xFF", 2, { 259, 258 } },
        { true, "\xE4\xB8", 3, { 259, 231, 187 } },
        { false, "", 0, { 0 } }, { false, "ab", 1, { 256 } }, { false, "abc", 1, { 259 } },
        { false, "abcb", 2, { 259, 98 } }, { false, "abca", 1, { 262 } },
        { false, "xyz", 1, { 260 } }, { false, "xyzx", 4, { 120, 121, 122, 120 } }, { false, "aaa", 2, { 261, 97 } },
        { false, "aaaa", 2, { 261, 261 } },
        { false, " ab", 2, { 32, 256 } }, { false, "b a", 2, { 98, 257 } }, { false, "a\nb", 3, { 97, 10, 98 } },
        { false, "\xFF", 1, { 255 } },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *text = cases[i].text;
        Ids ids = encoded(cases[i].sentencepiece ? sp : tiktoken, text, strlen(text));
        check_ids(label("small %s, '%s'", cases[i].sentencepiece ? "SentencePiece" : "tiktoken", text), ids,
                  cases[i].ids, cases[i].n);
    }
    check_equal("SentencePiece: <|user|> follows the pieces", (size_t)special_id(sp, "<|user|>"), 278);
    check_equal("SentencePiece: </s> is the model's", (size_t)special_id(sp, "</s>"), 2);
    check_equal("tiktoken: <|user|> follows the ranks", (size_t)special_id(tiktoken, "<|user|>"), 266 + 7);
}

static bool is_special(const Tokenizer *t, int32_t id) {
    Text name = {0};
    bool special = decode_one(t, id, &name);
    free(name.s);
    return special;
}

// Whether the text comes back from its ids, none of which is special.
static bool comes_back(Tokenizer *t, const char *s, size_t n) {
    Ids ids = encoded(t, s, n);
    Text text = decode(t, ids.ids, ids.n);
    bool good = text.n == n && !memcmp(text.s, s, n);
    for (size_t i = 0; i < ids.n && good; i++) good = !is_special(t, ids.ids[i]);
    free(ids.ids), free(text.s);
    return good;
}

// Random bytes, letters of the alphabet or pieces of the vocabulary. SentencePiece gives back only valid UTF-8.
static Text random_text(const Tokenizer *t) {
    Text text = {0};
    const Letter *letters[LONGEST_TEXT];
    size_t n, kind = pick(3), length = pick(40);
    bool utf8 = t->kind == SENTENCEPIECE;
    if (kind == 0 || utf8) return random_letters(utf8 ? N_GOOD : COUNT(alphabet), letters, &n);
    text_add(&text, "", 0);
    for (size_t i = 0; i < length; i++) {
        const Piece *p = &t->pieces[pick(t->n_pieces)];
        if (kind == 1) text_add(&text, (char[]){ (char)pick(256) }, 1);
        else text_add(&text, p->text, p->n);
    }
    return text;
}

static void check_round_trips(Vocabulary v) {
    static const struct { const char *s; size_t n; } cases[] = { { "", 0 }, { "\0", 1 }, { "a\0b\0", 4 }, { " ", 1 },
        { "   ", 3 }, { " a ", 3 },
        { "\r\n\r\n", 4 }, { "<|user|>", 8 }, { "[gMASK]<sop><|endoftext|>", 25 }, { "</s>", 4 }, { "'ll'S", 5 },
        { "\xE4\xBD\xA0\xE5\xA5\xBD", 6 },
        { "\xF0\x9F\x9A\x80", 4 }, { "\xFF\xFE\x80", 3 }, { "\xE4\xBD", 2 },
        { "\xC0\x80\xED\xA0\x80\xF4\x90\x80\x80", 9 } };
    size_t wrong = 0;
    for (size_t i = 0; i < COUNT(cases); i++)
        check_true(label("%s: special text %zu comes back", v.name, i), comes_back(v.t, cases[i].s, cases[i].n));
    for (size_t i = 0; i < 20000; i++) {
        Text text = random_text(v.t);
        wrong += !comes_back(v.t, text.s, text.n);
        free(text.s);
    }
    check_equal(label("%s: random texts that do not come back", v.name), wrong, 0);
}

// The definition: of all neighbours whose joined piece is in the vocabulary, those with the lowest rank are merged, the
// leftmost of equals, until there are none.
static void slow_merge(const Tokenizer *t, const char *s, size_t n, Ids *out) {
    size_t *starts = alloc(n + 1, sizeof *starts), n_symbols = 0;
    for (size_t at = 0, length = 1; at < n; at += length) {
        if (t->kind != BYTE_BPE) utf8_get(s + at, n - at, &length);
        starts[n_symbols++] = at;
    }
    starts[n_symbols] = n;
    for (;;) {
        size_t best = SIZE_MAX;
        uint32_t lowest = UINT32_MAX;
        for (size_t i = 0; i + 1 < n_symbols; i++) {
            int64_t p = find_piece(t, s + starts[i], starts[i+2] - starts[i]);
            if (p >= 0 && t->pieces[p].rank < lowest) lowest = t->pieces[p].rank, best = i;
        }
        if (best == SIZE_MAX) break;
        memmove(starts + best + 1, starts + best + 2, (n_symbols - best - 1) * sizeof *starts);
        n_symbols--;
    }
    for (size_t i = 0; i < n_symbols; i++) {
        int64_t p = find_piece(t, s + starts[i], starts[i+1] - starts[i]);
        if (p >= 0) ids_add(out, (int32_t)p);
        else for (size_t k = starts[i]; k < starts[i+1]; k++) ids_add(out, t->byte_ids[(unsigned char)s[k]]);
    }
    free(starts);
}

static void check_merging(Vocabulary v) {
    size_t wrong = 0;
    for (size_t i = 0; i < 3000; i++) {
        Ids fast = {0}, slow = {0};
        Text text = {0};
        size_t n_pieces = 1 + pick(12);
        for (size_t k = 0; k < n_pieces; k++) {
            const Piece *p = &v.t->pieces[pick(v.t->n_pieces)];
            text_add(&text, p->text, p->n);
        }
        encode_chunk(v.t, text.s, text.n, &fast);
        slow_merge(v.t, text.s, text.n, &slow);
        wrong += !same_ids(fast, slow.ids, slow.n);
        free(fast.ids), free(slow.ids), free(text.s);
    }
    check_equal(label("%s: texts merged in another order than the rule's", v.name), wrong, 0);
}

static void check_special_names(Vocabulary v) {
    for (size_t i = 0; i < v.t->n_specials; i++) {
        const Special *s = &v.t->specials[i];
        Text text = decode(v.t, &s->id, 1);
        check_equal(label("%s: id of %s", v.name, s->name), (size_t)special_id(v.t, s->name), (size_t)s->id);
        check_true(label("%s: %d is %s", v.name, s->id, s->name), !strcmp(text.s, s->name));
        free(text.s);
    }
    check_true(label("%s: no id for an unknown name", v.name), special_id(v.t, "<|nobody|>") == -1);
    size_t n_ids = v.t->n_pieces + v.t->n_specials - (v.t->kind == BYTE_BPE ? 0 : 3);   // SentencePiece: 3 are pieces
    check_equal(label("%s: the largest id", v.name), (size_t)largest_id(v.t), n_ids - 1);
    for (int32_t id = -1; id <= largest_id(v.t) + 1; id += largest_id(v.t) + 2)
        check_equal(label("%s: no text for %d", v.name, id), decode(v.t, &id, 1).n, 0);
}

// A long run of one letter is where a quadratic encoder stands still.
static void check_speed(Vocabulary v) {
    enum { N = 200000 };
    char *text = alloc(N, 1);
    memset(text, 'a', N);
    double began = seconds();
    check_true(label("%s: %d letters come back", v.name, N), comes_back(v.t, text, N));
    double took = seconds() - began;
    check_true(label("%s: %d letters take %.2f s", v.name, N, took), took < (SANITIZED ? 5 : 1));
    free(text);
}

// The same bytes again as tokenizer.bin, and from them the same ids.
static void check_image(Vocabulary v, const char *path) {
    const char *copy = scratch("copy.bin");
    write_file(copy, v.t->image, v.t->image_bytes);
    Tokenizer *again = load_tokenizer_file(copy);
    check_true(label("%s: image and copy are the same bytes", path),
               again->image_bytes == v.t->image_bytes && !memcmp(again->image, v.t->image, v.t->image_bytes));
    size_t wrong = 0;
    for (size_t i = 0; i < 2000; i++) {
        Text text = random_text(v.t);
        Ids a = encoded(v.t, text.s, text.n), b = encoded(again, text.s, text.n);
        wrong += !same_ids(a, b.ids, b.n);
        free(a.ids), free(b.ids), free(text.s);
    }
    check_equal(label("%s: texts with other ids from the copy", path), wrong, 0);
}

static void load_bad_tokenizer(const void *path) { load_tokenizer_file(path); }

// A tokenizer.bin that is cut off anywhere, or whose header lies, is refused.
static void test_bad_tokenizers(void) {
    size_t n, cuts[] = { 8, 20, 43, 44, 1000, 0 };
    char *bytes = read_file("tokenizer.bin", &n);
    cuts[COUNT(cuts) - 1] = n - 1;
    for (size_t i = 0; i < COUNT(cuts); i++) {
        write_file(scratch("bad.bin"), bytes, cuts[i]);
        check_fails(label("tokenizer.bin of %zu bytes", cuts[i]), load_bad_tokenizer, scratch("bad.bin"), "bad.bin: ");
    }
    for (size_t at = 8; at < 44; at += 4) {
        if (at == 16) continue;         // flags: every value is one
        bytes[at + 3] ^= 0x40;
        write_file(scratch("bad.bin"), bytes, n);
        check_fails(label("tokenizer.bin with another number at %zu", at), load_bad_tokenizer, scratch("bad.bin"),
                    "bad.bin: ");
        bytes[at + 3] ^= 0x40;
    }
}

static void test_tokenizers(void) {
    static const char *const real_ones[] = { "tokenizers/chatglm3-6b/tokenizer.model",
                                             "tokenizers/glm-4-9b-chat/tokenizer.model" };
    const char *paths[5] = { "tokenizer.bin", small_sentencepiece(), small_tiktoken() };
    Vocabulary all[COUNT(paths)];
    size_t n = 3;
    for (size_t i = 0; i < COUNT(real_ones); i++)
        if (real_file("")) paths[n++] = real_file(real_ones[i]);
        else check_skipped(real_ones[i], "GLM_REAL is not set");
    for (size_t i = 0; i < n; i++) {
        all[i] = (Vocabulary){ paths[i], load_tokenizer_file(paths[i]) };
        check_round_trips(all[i]);
        check_merging(all[i]);
        check_special_names(all[i]);
        check_speed(all[i]);
        check_image(all[i], paths[i]);
    }
    test_small_vocabularies(all[1].t, all[2].t);
    test_bad_tokenizers();
}

// ---- Reading data ------------------------------------------------------------------------------------------------

// The format of a layout with the tokenizer of this folder.
static ChatFormat format_of(const char *layout, const char *folder) {
    Options o = default_options();
    static const Config c = { .vocab_size = 1 << 20, .max_positions = 1 << 20, .model_type = "" };
    o.layout = layout;
    return choose_format(&o, &c, folder);
}

static Dataset read_text(const char *jsonl, const ChatFormat *f, const Options *o) {
    write_file(scratch("data.jsonl"), jsonl, strlen(jsonl));
    Dataset set = scan_data_file(scratch("data.jsonl"), f, o, true);
    refuse_findings(&set);      // as read_data_file does, which also tells of what it found
    return set;
}

static void check_sample(const char *what, const Dataset *set, size_t i, const int32_t *ids, const int32_t *labels,
                         size_t n) {
    if (!check_true(label("%s: sample %zu is there", what, i), i < set->n)) return;
    const Sample *s = &set->samples[i];
    check_ids(label("%s: ids of sample %zu", what, i), (Ids){ s->ids, s->n, 0 }, ids, n);
    check_ids(label("%s: labels of sample %zu", what, i), (Ids){ s->labels, s->n, 0 }, labels, n);
}

// ---- Vectors of the released tokenizers --------------------------------------------------------------------------

static Ids json_ids(const Json *array) {
    Ids ids = {0};
    for (const Json *j = array ? array->first : NULL; j; j = j->next) ids_add(&ids, (int32_t)j->number);
    return ids;
}

// [["user", "text"], ...] as one line of a data file.
static const char *as_conversation(const Json *pairs) {
    Text t = {0};
    text_print(&t, "{\"%s\": [", pairs->key);
    for (const Json *m = pairs->first; m; m = m->next) {
        const Json *role = m->first, *content = role->next;
        text_print(&t, "%s{\"role\": \"%s\", \"content\": ", m == pairs->first ? "" : ", ", role->text);
        text_json(&t, content->text, content->count);
        text_print(&t, "}");
    }
    text_print(&t, "]}\n");
    return t.s;
}

static void check_tuning_vector(const char *what, const Json *vector, const ChatFormat *f) {
    const Json *messages = json_get(vector, "messages");
    const Json *prompt = json_get(vector, "prompt"), *response = json_get(vector, "response");
    Ids ids = json_ids(json_get(vector, "input_ids")), labels = json_ids(json_get(vector, "labels"));
    Options o = default_options();
    const char *columns =
        prompt ? strf("{\"prompt\": \"%s\", \"response\": \"%s\"}", prompt->text, response->text) : NULL;
    o.official_mask = o.combine = strstr(what, "combine=true") != NULL;
    for (size_t official = 0; official < 2; official++) {       // here the official mask is also ours
        const char *text =
            prompt ? columns : as_conversation(messages ? messages : json_get(vector, "conversations"));
        Dataset set = read_text(text, f, &o);
        check_sample(what, &set, 0, ids.ids, labels.ids, ids.n);
        o.official_mask = true;
    }
}

// The row of a conversation that waits for its answer.
static void check_chat_vector(const char *what, const Json *vector, const ChatFormat *f) {
    Conversation c = {0};
    Ids ids = json_ids(json_get(vector, "ids"));
    for (const Json *m = json_get(vector, "messages")->first; m; m = m->next)
        add_turn(&c, (Turn){ .role = USER, .text = m->first->next->text, .n = m->first->next->count });
    Row row = encode_turns(f, c.turns, c.n, SIZE_MAX, true);
    check_ids(what, row.ids, ids.ids, ids.n);
}

static void check_text_vector(const char *what, const Json *vector, const ChatFormat *f, bool prefix) {
    const Json *text = json_get(vector, "text");
    Row row = {0};
    Ids ids = json_ids(json_get(vector, "ids"));
    for (int i = 0; prefix && i < 2; i++) if (f->prefix[i] >= 0) row_add(&row, f->prefix[i], false);
    row_add_text(&row, f->tokenizer, text->text, text->count, false);
    check_ids(label("%s '%s'", what, text->text), row.ids, ids.ids, ids.n);
}

static void test_vectors(void) {
    if (!real_file("")) { check_skipped("vectors", "GLM_REAL is not set"); return; }
    ChatFormat chatglm2 = format_of("chatglm2", real_file("tokenizers/chatglm3-6b"));      // the same file
    ChatFormat chatglm3 = format_of("chatglm3", real_file("tokenizers/chatglm3-6b"));
    ChatFormat glm4 = format_of("glm4-chat", real_file("tokenizers/glm-4-9b-chat"));
    size_t n, n_vectors = 0;
    char *source = read_file(real_file("golden/tokenizer_vectors.json"), &n);
    JsonReader r = json_open("tokenizer_vectors.json", source, n);
    for (const Json *v; (v = json_next(&r)); n_vectors++) {
        const char *what = json_get(v, "name")->text;
        const ChatFormat *f = !strncmp(what, "glm4", 4) ? &glm4 : &chatglm3;
        if (strstr(what, "ptuning")) f = &chatglm2;
        if (json_get(v, "input_ids")) check_tuning_vector(what, v, f);
        else if (json_get(v, "messages")) check_chat_vector(what, v, f);
        else check_text_vector(what, v, f, !strstr(what, "sp only") && !strstr(what, "ordinary"));
    }
    check_equal("vectors", n_vectors, 28);
}

// ---- Loss masks --------------------------------------------------------------------------------------------------

static const char conversation[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \"Be brief.\"},"
    " {\"role\": \"user\", \"content\": \"How warm is it? <|assistant|>\"},"
    " {\"role\": \"assistant\", \"metadata\": \"weather\", \"content\": \"{\\\"at\\\": 1}\"},"
    " {\"role\": \"observation\", \"content\": \"21\"},"
    " {\"role\": \"assistant\", \"metadata\": null, \"content\": \"21 degrees.\"},"
    " {\"role\": \"user\", \"content\": \"Thanks\"},"
    " {\"role\": \"assistant\", \"content\": \"Never say this.\", \"loss\": false},"
    " {\"role\": \"user\", \"content\": \"Bye\"},"
    " {\"role\": \"assistant\", \"loss\": true, \"content\": \"Bye!\"}]}\n";

enum { OURS = 1, OFFICIAL_GLM4 = 2, COMBINE = 4, OFFICIAL_GLM3 = 8, OFFICIAL = OFFICIAL_GLM4 | OFFICIAL_GLM3 };

// Its row, piece by piece, and by which rules each piece is a target.
static const struct { const char *text; bool token; int target; } pieces_of_row[] = {
    { "<|system|>", true, 0 }, { "\n", false, 0 }, { "Be brief.", false, 0 },
    { "<|user|>", true, 0 }, { "\n", false, 0 }, { "How warm is it? <|assistant|>", false, 0 },
    { "<|assistant|>", true, 0 }, { "weather\n", false, OURS | OFFICIAL }, { "{\"at\": 1}", false, OURS | OFFICIAL },
    { "<|observation|>", true, OURS | OFFICIAL }, { "\n", false, OFFICIAL_GLM3 }, { "21", false, OFFICIAL_GLM3 },
    { "<|assistant|>", true, OFFICIAL_GLM3 }, { "\n", false, OURS | OFFICIAL },
    { "21 degrees.", false, OURS | OFFICIAL },
    { "<|user|>", true, OURS | OFFICIAL }, { "\n", false, 0 }, { "Thanks", false, 0 },
    { "<|assistant|>", true, 0 }, { "\n", false, OFFICIAL }, { "Never say this.", false, OFFICIAL },
    { "<|user|>", true, OFFICIAL }, { "\n", false, 0 }, { "Bye", false, 0 },
    { "<|assistant|>", true, 0 }, { "\n", false, OURS | OFFICIAL }, { "Bye!", false, OURS | OFFICIAL | COMBINE },
};

static void add_expected(Row *row, Tokenizer *t, const char *text, bool token, bool target) {
    if (token) ids_add(&row->ids, special_id(t, text));
    else encode(t, text, strlen(text), &row->ids);
    while (row->labels.n < row->ids.n) ids_add(&row->labels, target ? row->ids.ids[row->labels.n] : NO_TARGET);
}

static void check_mask(const char *what, const ChatFormat *f, int rule, const char *const *prefix, const char *end) {
    Options o = default_options();
    Row row = {0};
    o.official_mask = rule != OURS, o.combine = rule == COMBINE;
    Dataset set = read_text(conversation, f, &o);
    for (size_t i = 0; i < 2; i++) add_expected(&row, f->tokenizer, prefix[i], true, false);
    for (size_t i = 0; i < COUNT(pieces_of_row); i++)
        add_expected(&row, f->tokenizer, pieces_of_row[i].text, pieces_of_row[i].token, pieces_of_row[i].target & rule);
    add_expected(&row, f->tokenizer, end, true, true);
    check_sample(what, &set, 0, row.ids.ids, row.labels.ids, row.ids.n);
    size_t n_targets = 0;
    for (size_t i = 1; i < row.labels.n; i++) n_targets += row.labels.ids[i] != NO_TARGET;
    check_equal(label("%s: targets", what), set.samples[0].n_targets, n_targets);
}

// The stop tokens of a format are these three and no other special token.
static void check_stops(const ChatFormat *f, const char *const *stops) {
    for (size_t i = 0; i < f->tokenizer->n_specials; i++) {
        Special s = f->tokenizer->specials[i];
        bool stop = !strcmp(s.name, stops[0]) || !strcmp(s.name, stops[1]) || !strcmp(s.name, stops[2]);
        check_true(label("%s: whether %s stops", f->layout->name, s.name), is_stop(f, s.id) == stop);
    }
}

static void test_masks(void) {
    static const char *const glm4_prefix[] = { "[gMASK]", "<sop>" }, *const glm3_prefix[] = { "[gMASK]", "sop" };
    small_sentencepiece();
    ChatFormat glm4 = format_of("glm4-chat", "."), glm3 = format_of("chatglm3", scratch("sentencepiece"));
    check_mask("glm4-chat", &glm4, OURS, glm4_prefix, "<|user|>");
    check_mask("glm4-chat, official", &glm4, OFFICIAL_GLM4, glm4_prefix, "<|user|>");
    check_mask("glm4-chat, official, combine", &glm4, COMBINE, glm4_prefix, "<|user|>");
    check_mask("chatglm3", &glm3, OURS, glm3_prefix, "</s>");
    check_mask("chatglm3, official", &glm3, OFFICIAL_GLM3, glm3_prefix, "</s>");
    const char *const glm4_stops[] = { "<|endoftext|>", "<|user|>", "<|observation|>" };
    const char *const glm3_stops[] = { "</s>", "<|user|>", "<|observation|>" };
    check_stops(&glm4, glm4_stops);
    check_stops(&glm3, glm3_stops);
}

// ---- Data sets ---------------------------------------------------------------------------------------------------

typedef struct { const char *text; const ChatFormat *format; } BadData;

static void read_bad_data(const void *context) {
    const BadData *d = context;
    Options o = default_options();
    read_text(d->text, d->format, &o);
}

static void test_data_errors(const ChatFormat *f) {
    static const struct { const char *text, *message; } cases[] = {
        { "", "holds no sample" }, { "[1]", "a sample must be an object" }, { "{\"x\": 1}", "must have \"messages\"" },
        { "{\"messages\": [{\"role\": \"wizard\", \"content\": \"\"}]}", ":1:24: role 'wizard'" },
        { "{\"messages\": [{\"role\": \"user\"}]}", ":1:15: \"content\"" },
        { "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}", "nothing to learn" },
        { "{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\", \"loss\": false}]}", "nothing to learn" },
        { "{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\", \"loss\": 0}]}", "\"loss\" must be" },
        { "{\"input_ids\": [1, 2], \"labels\": [1]}", "1 labels for 2" },
        { "{\"input_ids\": [1, 2000000], \"labels\": [1, 2]}", "no token id" },
        { "{\"input_ids\": [1, -100], \"labels\": [1, 2]}", "no token id" },
        { "{\"input_ids\": [1, 1.5], \"labels\": [1, 2]}", "no token id" },
        { "{\"input_ids\": [1, 2], \"labels\": [1, -1]}", "no token id" },
        { "{\"input_ids\": [1, 2], \"labels\": [1, -100]}", "nothing to learn" },
        { "{\"input_ids\": [1, 2], \"labels\": [1, 2]}\n{\"input_ids\": [1]}", ":2:1: \"labels\"" },
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        check_fails(label("bad data %zu", i), read_bad_data, &(BadData){ cases[i].text, f }, cases[i].message);
}

static void test_reading(const ChatFormat *f) {
    static const char *const files[] = {
        "{\"input_ids\": [5, 6, 7], \"labels\": [5, -100, 7]}\n{\"labels\": [-100, 9], \"input_ids\": [8, 9]}\n",
        "[{\"input_ids\": [5, 6, 7], \"labels\": [5, -100, 7]},\n {\"labels\": [-100, 9], \"input_ids\": [8, 9]}]" };
    static const int32_t first[] = { 5, 6, 7 }, first_labels[] = { 5, -100, 7 };
    static const int32_t second[] = { 8, 9 }, second_labels[] = { -100, 9 };
    Options o = default_options();
    for (size_t i = 0; i < COUNT(files); i++) {
        Dataset set = read_text(files[i], f, &o);
        check_equal("samples", set.n, 2);
        check_sample("ready ids", &set, 0, first, first_labels, 3);
        check_sample("ready ids", &set, 1, second, second_labels, 2);
        check_equal("tokens", set.n_tokens, 5);
        check_equal("targets: a first token is none", set.n_targets, 2);
        check_equal("the longest", set.longest, 3);
        check_equal("the largest batch of one", most_tokens(&set, 1), 3);
        check_equal("the largest batch of eight", most_tokens(&set, 8), 5);
    }
    o.overlong = "drop", o.max_input_length = o.max_output_length = 1;      // three tokens are the most
    Dataset cut = read_text("{\"input_ids\": [1, 2, 3, 4], \"labels\": [1, 2, 3, 4]}\n"
                            "{\"input_ids\": [5, 6, 7], \"labels\": [5, -100, 7]}", f, &o);
    check_equal("samples that are short enough", cut.n, 1);
    check_equal("samples dropped", cut.n_dropped, 1);
    check_equal("the number of a sample is its place in the file", cut.samples[0].number, 2);
    Options d = default_options();
    const char *renamed = strf("{\"conversations\"%s", conversation + strlen("{\"messages\""));
    Dataset a = read_text(conversation, f, &d), b = read_text(renamed, f, &d);
    check_sample("conversations are messages", &b, 0, a.samples[0].ids, a.samples[0].labels, a.samples[0].n);
}

// n samples of which each stands twice.
static Dataset twins(size_t n) {
    Dataset set = {0};
    for (size_t i = 0; i < n; i++) {
        Sample s = { .n = 3, .n_targets = 1, .number = i + 1 };
        s.ids = alloc(s.n, sizeof *s.ids), s.labels = alloc(s.n, sizeof *s.labels);
        s.ids[0] = s.labels[2] = (int32_t)(i / 2), s.ids[1] = 1;
        dataset_add(&set, s);
    }
    return set;
}

static void check_split(size_t n, double share, uint64_t seed, size_t least, size_t most) {
    bool *held = alloc(n, sizeof *held);     // by sample: it validates
    Dataset set = twins(n), validation = split_off(&set, share, seed);
    const char *what = strf("%zu samples, share %g, seed %zu", n, share, (size_t)seed);
    check_equal(label("%s: no sample is lost", what), set.n + validation.n, n);
    check_equal(label("%s: no token is lost", what), set.n_tokens + validation.n_tokens, 3 * n);
    check_true(label("%s: %zu validate", what, validation.n), validation.n >= least && validation.n <= most);
    for (size_t i = 0; i < validation.n; i++) held[validation.samples[i].number - 1] = true;
    for (size_t i = 0; i < set.n; i++) check_true(what, !held[set.samples[i].number - 1]);
    for (size_t i = 0; i + 1 < n; i += 2)
        check_true(label("%s: equal samples stay together", what), held[i] == held[i + 1]);
}

static void test_splits(void) {
    static const struct { size_t n; double share; uint64_t seed; size_t least, most; } cases[] = {
        { 2000, 0.05, 42, 60, 150 }, { 2000, 0.05, 43, 60, 150 }, { 2000, 0.5, 1, 900, 1100 }, { 40, 1e-12, 42, 2, 2 },
        { 4, 0.9999, 5, 2, 2 }, { 2, 0.5, 6, 0, 0 }, { 100, 0, 7, 0, 0 } };
    for (size_t i = 0; i < COUNT(cases); i++)
        check_split(cases[i].n, cases[i].share, cases[i].seed, cases[i].least, cases[i].most);
    Dataset a = twins(2000), b = twins(2000), c = twins(2000);
    Dataset x = split_off(&a, 0.1, 1), y = split_off(&b, 0.1, 2), z = split_off(&c, 0.1, 1);
    check_true("the seed chooses who validates", x.n != y.n || x.samples[0].number != y.samples[0].number);
    check_true("the same seed the same", x.n == z.n && x.samples[0].number == z.samples[0].number);
    Sample s = c.samples[0], relabelled = s;
    relabelled.labels = (int32_t[]){ 0, NO_TARGET, 1 };
    // other masks of the same file must split it alike
    check_true("other labels leave a sample on its side", !(split_place(&s, 1) < split_place(&relabelled, 1)) &&
               !(split_place(&s, 1) > split_place(&relabelled, 1)));
}

static void test_orders(void) {
    enum { N = 500 };
    size_t *orders[] = { epoch_order(N, 42, 0), epoch_order(N, 42, 1), epoch_order(N, 43, 0) };
    size_t *again = epoch_order(N, 42, 0);
    check_true("the same seed and epoch, the same order", !memcmp(orders[0], again, N * sizeof *again));
    for (size_t k = 0; k < COUNT(orders); k++) {
        bool seen[N] = { false };
        size_t n_seen = 0, at_home = 0, same = 0;
        for (size_t i = 0; i < N; i++) {
            if (orders[k][i] < N && !seen[orders[k][i]]) seen[orders[k][i]] = true, n_seen++;
            at_home += orders[k][i] == i;
            same += k > 0 && orders[k][i] == orders[0][i];
        }
        check_equal(label("order %zu holds each sample once", k), n_seen, N);
        check_true(label("order %zu is shuffled: %zu at home, %zu as in order 0", k, at_home, same),
                   at_home < 10 && same < 10);
    }
    check_true("one sample has one order", epoch_order(1, 42, 7)[0] == 0);
}

static void test_data_sets(void) {
    ChatFormat f = format_of("glm4-chat", ".");
    test_reading(&f);
    test_data_errors(&f);
    test_splits();
    test_orders();
}

// ---- What a config.json says -------------------------------------------------------------------------------------

#define REMOTE_SIZES \
    "\"model_type\": \"chatglm\", \"num_layers\": 1, \"hidden_size\": 8, \"num_attention_heads\": 2," \
    "\"multi_query_attention\": true, \"multi_query_group_num\": 1, \"kv_channels\": 8, \"ffn_hidden_size\": 6"
#define HF_SIZES \
    "\"num_hidden_layers\": 1, \"hidden_size\": 8, \"num_attention_heads\": 2, \"num_key_value_heads\": 1," \
    "\"head_dim\": 8, \"intermediate_size\": 6, \"vocab_size\": 9, \"max_position_embeddings\": 64"
#define GLM "{\"model_type\": \"glm\", " HF_SIZES
#define GLM4 "{\"model_type\": \"glm4\", " HF_SIZES
#define REMOTE "{" REMOTE_SIZES

// Only what differs in meaning: sizes are checked by every golden case.
static const struct {
    const char *json; double eps, theta; size_t rotated; bool bias, tied, post_norms;
} config_cases[] = {
    { GLM "}", 1.5625e-7, 1e4, 4, true, false, false },
    { GLM4 "}", 1.5625e-7, 1e4, 4, true, false, true },
    { GLM ", \"rms_norm_eps\": 1e-3, \"rope_theta\": 5e6, \"partial_rotary_factor\": 1.0, \"attention_bias\": false}",
      1e-3, 5e6, 8, false, false, false },
    { GLM ", \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 70, \"partial_rotary_factor\": 0.25}}",
      1.5625e-7, 70, 2, true, false, false },
    { GLM ", \"rope_theta\": 5, \"rope_parameters\": {\"rope_theta\": 80}, \"partial_rotary_factor\": 1,"
      " \"tie_word_embeddings\": true, \"quantization_config\": null, \"rope_scaling\": null}",
      1.5625e-7, 80, 8, true, true, false },
    { REMOTE "}", 1e-5, 1e4, 4, false, false, false },
    { REMOTE ", \"layernorm_epsilon\": 1e-3, \"rms_norm_eps\": 7, \"rope_ratio\": 500, \"add_qkv_bias\": true,"
      " \"rope_theta\": 3, \"quantization_bit\": 0, \"pre_seq_len\": null}", 1e-3, 5e6, 4, true, false, false },
    { REMOTE ", \"rope_ratio\": 1, \"_name_or_path\": \"THUDM/chatglm2-6b-32k\", \"vision_config\": null}",
      1e-5, 1e4, 4, false, false, false },
};

static const struct { const char *json, *message; } config_errors[] = {
    { "{\"model_type\": \"llama\"}", "model_type is 'llama'" }, { "{}", "model_type is ''" },
    { "{\"model_type\": \"glm\"}", "\"hidden_size\" is missing" },
    { GLM ", \"vocab_size\": 0}", "\"vocab_size\" must be" }, { GLM ", \"num_key_value_heads\": 3}", "evenly" },
    { GLM ", \"head_dim\": 6}", "3 rotary features" }, { GLM ", \"hidden_act\": \"gelu\"}", "silu" },
    { GLM ", \"rope_scaling\": {\"type\": \"yarn\"}}",
      "rope_scaling, yarn) are not supported; for texts of up to 64 tokens" },
    { GLM ", \"rope_parameters\": {\"rope_type\": \"yarn\"}}", "rope_scaling" },
    { GLM ", \"rope_parameters\": {\"rope_type\": \"dynamic\"}}",
      "up to 64 tokens plain ones are right: set rope_type" },
    { GLM4 ", \"rope_scaling\": {\"rope_type\": \"yarn\", \"original_max_position_embeddings\": 32}}",
      "up to 32 tokens plain ones are right: remove the key" },
    { GLM ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}}", "(rope_scaling, linear) are not supported" },
    { GLM ", \"vision_config\": {\"image_size\": 672}}", "vision part" },
    { REMOTE ", \"vision_config\": {\"image_size\": 672}}", "vision part" },
    { "{\"model_type\": \"glm4v\"}", "'glm4v', with a vision part; glmtune tunes chatglm" },
    { "{\"model_type\": \"glm4_moe\"}", "'glm4_moe', a mixture of experts; glmtune tunes chatglm" },
    { "{\"model_type\": \"glm\", \"num_layers\": 48, \"hidden_size\": 4096, \"num_attention_heads\": 64,"
      " \"vocab_size\": 50304, \"max_sequence_length\": 1024}", "GLM-10B" },
    { GLM ", \"block_position_encoding\": true}", "GLM-10B" },
    { REMOTE ", \"inner_hidden_size\": 9}", "first ChatGLM-6B" },
    { REMOTE ", \"rope_ratio\": 4, \"_name_or_path\": \"THUDM/chatglm2-6b-32k\"}", "divides positions" },
    { REMOTE ", \"rope_ratio\": 4, \"auto_map\": {\"AutoModel\": \"THUDM/ChatGLM2-6B-32K--m.C\"}}",
      "divides positions" },
    { GLM ", \"quantization_config\": {\"quant_method\": \"gptq\"}}", "quantised by gptq" },
    { GLM ", \"quantization_config\": {}}", "quantised by a method that is not named" },
    { REMOTE ", \"post_layer_norm\": false}", "post_layer_norm" }, { REMOTE ", \"rmsnorm\": false}", "rmsnorm" },
    { REMOTE ", \"add_bias_linear\": true}", "add_bias_linear" },
    { REMOTE ", \"apply_residual_connection_post_layernorm\": true}", "apply_residual" },
    { REMOTE ", \"multi_query_attention\": false}", "multi_query_attention" },
    { REMOTE ", \"position_encoding_2d\": true}", "first ChatGLM-6B" },
};

static void parse_bad_config(const void *json) { parse_config("config.json", json); }

// Where glm and glm4 say nothing but hidden_size, they have the sizes of GlmConfig() and Glm4Config().
static void check_class_defaults(const char *json) {
    Config c = parse_config("config.json", json);
    const size_t sizes[] = { c.vocab_size, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_dim, c.max_positions,
                             c.n_rotated };
    static const size_t wanted[] = { 151552, 40, 32, 2, 128, 13696, 131072, 64 };
    for (size_t i = 0; i < COUNT(sizes); i++)
        check_equal(label("%s: size %zu of the class", json, i), sizes[i], wanted[i]);
}

// What rope_ratio does is as the model's own code has it, whatever its name.
static void test_rope_ratio(void) {
    static const struct { const char *code, *name; bool divides; } cases[] = {
        { "seq_idx = torch.arange(seq_len, dtype=dtype, device=device) / self.rope_ratio", "x", true },
        { "seq_idx = torch.arange(n) / rope_ratio", "x", true }, { "base = base * self.rope_ratio", "x", false },
        { "base = base * self.rope_ratio", "chatglm2-6b-32k", false }, { "no word of it", "chatglm2-6b-32k", true },
        { "no word of it", "chatglm3-6b-32k", false } };
    const char *code = scratch("modeling_chatglm.py");
    for (size_t i = 0; i < COUNT(cases); i++) {
        Config c = { .file = scratch("config.json"), .source = cases[i].name };
        write_file(code, cases[i].code, strlen(cases[i].code));
        check_equal(label("rope_ratio %zu divides positions", i), divides_positions(&c), cases[i].divides);
    }
    remove(code);
}

static void test_configs(void) {
    check_class_defaults("{\"model_type\": \"glm\", \"hidden_size\": 4096}");
    check_class_defaults("{\"model_type\": \"glm4\", \"hidden_size\": 4096}");
    test_rope_ratio();
    for (size_t i = 0; i < COUNT(config_cases); i++) {
        Config c = parse_config("config.json", config_cases[i].json);
        check_number(label("config %zu: eps", i), c.rms_norm_eps, config_cases[i].eps, 0);
        check_number(label("config %zu: theta", i), c.rope_theta, config_cases[i].theta, 1e-15);
        check_equal(label("config %zu: rotated features", i), c.n_rotated, config_cases[i].rotated);
        check_equal(label("config %zu: biases", i), c.qkv_bias, config_cases[i].bias);
        check_equal(label("config %zu: tied", i), c.tied, config_cases[i].tied);
        check_equal(label("config %zu: post norms", i), c.post_norms, config_cases[i].post_norms);
    }
    for (size_t i = 0; i < COUNT(config_errors); i++)
        check_fails(label("bad config %zu", i), parse_bad_config, config_errors[i].json, config_errors[i].message);
}

// ---- Which layout a model has ------------------------------------------------------------------------------------

static void test_layouts(void) {
    static const struct {
        const char *model_type; size_t vocabulary; const char *own, *path, *option, *layout;
    } cases[] = {
        { "glm4", 151552, NULL, NULL, NULL, "0414" }, { "glm", 59264, NULL, NULL, NULL, "edge" },
        { "glm", 151552, NULL, NULL, NULL, "glm4-chat" },
        { "glm", 1000, NULL, NULL, NULL, "glm4-chat" }, { "chatglm", 151552, NULL, NULL, NULL, "glm4-chat" },
        { "chatglm", 65024, NULL, "THUDM/chatglm3-6b", NULL, "chatglm3" },
        { "chatglm", 65024, NULL, "THUDM/chatglm2-6b", NULL, "chatglm2" },
        { "chatglm", 65024, NULL, NULL, NULL, NULL }, { "chatglm", 53, NULL, NULL, NULL, NULL },
        { "chatglm", 65024, "edge", NULL, NULL, "edge" },
        { "glm4", 151552, "glm4-chat", NULL, "z1", "z1" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        Config c = { .model_type = cases[i].model_type, .vocab_size = cases[i].vocabulary, .layout = cases[i].own,
                     .name_or_path = cases[i].path, .remote = !strcmp(cases[i].model_type, "chatglm") };
        Options o = { .layout = cases[i].option };
        const char *got = layout_name(&o, &c, scratch_folder), *wanted = cases[i].layout;
        check_true(label("layout %zu: %s, want %s", i, got ? got : "none", wanted ? wanted : "none"),
                   got && wanted ? !strcmp(got, wanted) : got == wanted);
    }
    Config glm4 = { .model_type = "glm4" }, chatglm = { .model_type = "chatglm", .vocab_size = 65024, .remote = true };
    Options o = {0};
    make_folders(scratch("z1")), make_folders(scratch("six"));
    write_file(scratch("z1/chat_template.jinja"), "a <think> b", 11);
    write_file(scratch("six/tokenizer_config.json"), "\"<|assistant|>\"", 15);
    check_true("a template that thinks is Z1's", !strcmp(layout_name(&o, &glm4, scratch("z1")), "z1"));
    check_true("role tokens tell ChatGLM3", !strcmp(layout_name(&o, &chatglm, scratch("six")), "chatglm3"));
    static const struct { bool remote, sentencepiece, joined; } folders[] = {
        { false, false, true }, { true, false, false }, { false, true, false }, { true, true, false } };
    small_tiktoken(), small_sentencepiece();
    for (size_t i = 0; i < COUNT(folders); i++) {
        Options chosen = default_options();
        Config c = { .vocab_size = 1 << 20, .model_type = "", .remote = folders[i].remote };
        chosen.layout = folders[i].sentencepiece ? "chatglm3" : "glm4-chat";
        ChatFormat f = choose_format(&chosen, &c, scratch(folders[i].sentencepiece ? "sentencepiece" : "tiktoken"));
        check_true(label("folder %zu: line break and message are one text", i), f.joined == folders[i].joined);
    }
}
