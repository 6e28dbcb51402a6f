// tokenizer.json, and what the encoder does with bytes that are no text. The golden vectors are `tokenizers`' own, for a
// small vocabulary whose merges are shuffled: tests/compare_tokenizers.py --golden writes them.

// ---- tokenizer.json ----------------------------------------------------------------------------------------------

#define GOLDEN_JSON "tests/golden/tokenizer_json"

static const char *replaced(const char *source, const char *from, const char *to) {
    const char *at = strstr(source, from);
    if (!at) fail("tests: '%s' is not there to be replaced", from);
    return strf("%.*s%s%s", (int)(at - source), source, to, at + strlen(from));
}

static Tokenizer *tokenizer_of(const char *source, const char *file) {
    write_file(scratch(file), source, strlen(source));
    return load_tokenizer_file(scratch(file));
}

// The vectors' ids under `key`, from the tokenizer, and from the tokenizer.bin that it becomes.
static void check_golden_ids(Tokenizer *t, const char *key) {
    size_t n, wrong = 0, n_vectors = 0;
    write_file(scratch("copy.bin"), t->image, t->image_bytes);
    Tokenizer *copy = load_tokenizer_file(scratch("copy.bin"));
    char *source = read_file(GOLDEN_JSON "/vectors.jsonl", &n);
    JsonReader r = json_open("vectors.jsonl", source, n);
    for (const Json *v; (v = json_next(&r)); n_vectors++) {
        const Json *text = json_get(v, "text");
        Ids want = json_ids(json_get(v, key)), got = encoded(t, text->text, text->count);
        Ids again = encoded(copy, text->text, text->count);
        if (!same_ids(got, want.ids, want.n) && !wrong++)
            check_ids(label("%s of '%.40s'", key, text->text), got, want.ids, want.n);
        check_true(label("%s: tokenizer.bin gives the same ids", key), same_ids(again, got.ids, got.n));
        Text back = decode(t, got.ids, got.n);
        check_true("the text comes back", back.n == text->count && !memcmp(back.s, text->text, back.n));
        free(want.ids), free(got.ids), free(again.ids), free(back.s);
    }
    json_close(&r);
    free(source);
    check_equal(label("%s: texts with other ids than tokenizers'", key), wrong, 0);
    check_true(label("%s: %zu vectors", key, n_vectors), n_vectors > 100);
}

// One mistake in the golden file; the message names where it stands.
static const struct { const char *from, *to, *message; } json_mistakes[] = {
    { "{\"version\"", "{\"version\": }, {", "mistake.json:1:13: this is no JSON" },
    { "\"model\"", "\"modal\"", "mistake.json:1:1: \"model\" must be" },
    { "\"vocab\": {", "\"vocab\": {\"x\": 1.5,", "\"x\" must be a token id" },
    { "\"vocab\": {", "\"vocab\": {\"x\": 99999999,", "\"x\" must be a token id" },
    { "\"vocab\": {", "\"vocab\": {\"xy\": 64,", "stands twice" },
    { "\"vocab\": {\"!\"", "\"vocab\": {\"!!\"", "no piece for the byte 33" },
    { "\"merges\": [", "\"merges\": [7,", "a merge must be" },
    { "\"merges\": [", "\"merges\": [\"ab\",", "a merge must be" },
    { "\"merges\": [", "\"merges\": [[\"a\",\"z\",\"c\"],", "a merge must be" },
    { "\"merges\": [", "\"merges\": [[\"a\",null],", "a merge must be" },
    { "\"merges\": [", "\"merges\": [\"~ ~\",", "a merge must be" },
    { "\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "\"normalizer\" is 'NFC'" },
    { "\"type\": \"BPE\"", "\"type\": \"Unigram\"", "\"type\" is 'Unigram'" },
    { "\"byte_fallback\": false", "\"byte_fallback\": true", "\"byte_fallback\" is 'set'" },
    { "\"invert\": false", "\"invert\": true", "\"invert\" is 'set'" },
    { "\"behavior\": \"Isolated\"", "\"behavior\": \"Removed\"", "\"behavior\" is 'Removed'" },
    { "\"use_regex\": false", "\"use_regex\": true", "\"use_regex\" is 'set'" },
    { "\"add_prefix_space\": false", "\"add_prefix_space\": true", "\"add_prefix_space\" is 'set'" },
    { "{1,3}", "", "text is split by '(?i:'s|" },
    { "\"content\": \"<|user|>\"", "\"content\": 5", "\"content\" must be the token's text" },
    { "\"added_tokens\": [", "\"added_tokens\": [8,", "\"content\" must be" },
};

static void test_tokenizer_json(void) {
    size_t n;
    const char *source = read_file(GOLDEN_JSON "/tokenizer.json", &n);
    Tokenizer *t = tokenizer_of(source, "golden.json");
    check_golden_ids(t, "ids");
    check_golden_ids(tokenizer_of(replaced(source, "\"ignore_merges\": false", "\"ignore_merges\": true"), "whole.json"),
                     "whole");
    check_true("added tokens are special", is_special(t, special_id(t, "<|user|>")) && special_id(t, "[gMASK]") > 0);
    check_equal("the largest id is an added token's", (size_t)largest_id(t), (size_t)special_id(t, "<|user|>"));
    check_equal("an id that is nobody's has no text", decode(t, (const int32_t[]){ 303 }, 1).n, 0);
    // a special token that is also a piece is never made of text
    Ids ids = encoded(t, " the", 4);
    check_true("' the' is special here, and no text becomes it", ids.n > 1 && special_id(t, " the") > 0);
    for (size_t i = 0; i < COUNT(json_mistakes); i++) {
        const char *bad = replaced(source, json_mistakes[i].from, json_mistakes[i].to);
        write_file(scratch("mistake.json"), bad, strlen(bad));
        check_fails(json_mistakes[i].to, load_bad_tokenizer, scratch("mistake.json"), json_mistakes[i].message);
    }
    write_file(scratch("cut.bin"), t->image, t->image_bytes - 8);
    check_fails("listed merges that are cut off", load_bad_tokenizer, scratch("cut.bin"), "its header says");
}

// ---- Bytes that are no text --------------------------------------------------------------------------------------

static void check_bytes(Tokenizer *t, const char *what, const char *s, size_t n, const int32_t *want, size_t n_want) {
    Ids got = encoded(t, s, n);
    check_ids(what, got, want, n_want);
    free(got.ids);
}

#define CHECK_BYTES(t, s, ...) check_bytes(t, "bytes " #s, s, sizeof(s) - 1, (const int32_t[]){ __VA_ARGS__ }, \
                                           COUNT(((const int32_t[]){ __VA_ARGS__ })))

// A byte that is no UTF-8, a surrogate half or an over-long form are each their own bytes, in a chunk of the class
// "other"; so is NUL.
static void test_no_text(void) {
    size_t n;
    Tokenizer *t = tokenizer_of(read_file(GOLDEN_JSON "/tokenizer.json", &n), "golden.json");
    const int32_t nul = t->byte_ids[0], a = t->byte_ids['a'], ff = t->byte_ids[0xFF], c0 = t->byte_ids[0xC0];
    CHECK_BYTES(t, "\0", nul);
    CHECK_BYTES(t, "\xFF" "\0\xFF", ff, nul, ff);
    CHECK_BYTES(t, "\xC0\x80", c0, t->byte_ids[0x80]);
    CHECK_BYTES(t, "\xED\xA0\x80", t->byte_ids[0xED], t->byte_ids[0xA0], t->byte_ids[0x80]);
    CHECK_BYTES(t, "\xFF" "a", ff, a);
    check_equal("an invalid byte goes with the letters after it", next_chunk(t, "\xFFz z", 4), 2);
    check_equal("invalid bytes are one chunk", next_chunk(t, "\xFF\xFE\x80z", 4), 3);
    check_equal("a cut character is as many bytes", next_chunk(t, "\xE4\xBD z", 4), 2);
    Tokenizer *sp = load_tokenizer_file(small_sentencepiece());
    Ids ids = encoded(sp, "\xE4\xBD\0", 3);
    check_true("SentencePiece falls back to byte pieces", ids.n >= 3 && ids.ids[ids.n-1] == sp->byte_ids[0] &&
               ids.ids[ids.n-2] == sp->byte_ids[0xBD] && ids.ids[ids.n-3] == sp->byte_ids[0xE4]);
}

// ---- Whole texts against the definition --------------------------------------------------------------------------

// SentencePiece merges over a whole text, and glmtune word by word; long runs are where its shortcuts could go wrong.
static void check_whole_texts(const char *path) {
    Tokenizer *t = load_tokenizer_file(path);
    size_t wrong = 0;
    for (size_t i = 0; i < 1500; i++) {
        Text text = random_text(t), escaped = {0};
        if (i % 100 == 0)
            for (size_t n = 400 + pick(400), c = pick(3); n--; ) text_add(&text, &"a \n"[c], 1);
        text_add(&escaped, BLANK, text.n ? 3 : 0);
        for (size_t k = 0; k < text.n; k++) {
            bool blank = text.s[k] == ' ';
            text_add(&escaped, blank ? BLANK : text.s + k, blank ? 3 : 1);
        }
        Ids fast = encoded(t, text.s, text.n), slow = {0};
        slow_merge(t, escaped.s, escaped.n, &slow);
        wrong += !same_ids(fast, slow.ids, slow.n);
        free(fast.ids), free(slow.ids), free(text.s), free(escaped.s);
    }
    check_equal(label("%s: whole texts with other ids than the definition's", path), wrong, 0);
}

// One line of 10 MB, of words and of one letter: seconds at most, and it comes back.
static void test_long_line(void) {
    enum { N = SANITIZED ? 1000000 : 10000000 };
    char *text = alloc(N, 1);
    for (int run = 0; run < 2; run++) {
        for (size_t i = 0; i < N; i++) text[i] = run || i % 7 ? 'a' : ' ';
        double began = seconds();
        check_true("a line of 10 MB comes back", comes_back(load_tokenizer_file("tokenizer.bin"), text, N));
        check_true(label("a line of 10 MB takes %.1f s", seconds() - began), seconds() - began < 20);
    }
    free(text);
}

static void test_json_tokenizers(void) {
    check_whole_texts(small_sentencepiece());
    if (real_file("")) check_whole_texts(real_file("tokenizers/chatglm3-6b/tokenizer.model"));
    test_long_line();
    test_tokenizer_json();
    test_no_text();
}
