// make_tokenizer: learns the vocabulary of the bundled tiny model, a tokenizer.bin, from a chat corpus.
//
//     make_tokenizer CORPUS.jsonl OUT.bin [PIECES]     at most PIECES pieces; the special tokens follow them
//
// Byte-level BPE as tiktoken has it: piece b < 256 is the byte b, every later piece joins two earlier ones, and the
// lower id is merged first. What may become a piece is kept narrow, so that a very small model can learn from few
// samples:
//     * a character outside ASCII that the corpus has a few times is one piece, and is never joined to another: a
//       Chinese text has as many tokens as characters, whatever its words are;
//     * ASCII letters, with a blank in front or without, are joined by the usual rule, the most frequent pair first;
//     * digits and punctuation stay single bytes: sums are learned digit by digit.
// The same corpus gives the same file. What it was worth is printed on stderr.
//
// cc -O2 tests/make_tokenizer.c -o make_tokenizer -lm

#define GLMTUNE_NO_MAIN
#include "../glmtune.c"

enum {
    DEFAULT_PIECES = 2700,
    MOST_PIECES = 8192,             // the table of pairs is as large as this number's square
    LEAST_CHARACTER = 3,            // a character that the corpus has less often stays bytes
    SAMPLES_PER_MERGE = 6000        // a pair that is rarer than once in so many samples is not worth a piece
};

typedef struct { char *text; uint32_t n, count; Ids ids; } Word;        // ids: what it is encoded as so far
typedef struct { uint32_t code, count; } Character;

typedef struct {
    Tokenizer *t;
    size_t limit;                   // pieces that t has room for
    uint32_t *characters;           // how often the corpus has each code point outside ASCII
    Word *words; size_t n_words, words_capacity;
    uint32_t *slots, slot_mask;     // hash table: word + 1
    uint32_t *pairs;                // [limit, limit]: how often the words have the two pieces side by side
} Learner;

// ---- 1. Pieces ---------------------------------------------------------------------------------------------------

static void add_piece(Tokenizer *t, const char *text, size_t n) {
    uint32_t id = t->n_pieces++;
    t->pieces[id] = (Piece){ text, (uint32_t)n, id };
    *find_slot(t, text, n) = hash_bytes(text, n) >> 32 << 32 | (id + 1);
}

// A tokenizer of the bytes alone, with room for the pieces to come.
static Tokenizer *byte_tokenizer(size_t limit) {
    static char bytes[256];
    Piece pieces[256];
    for (uint32_t b = 0; b < 256; b++) {
        bytes[b] = (char)b;
        pieces[b] = (Piece){ bytes + b, 1, b };
    }
    Tokenizer of_bytes = { .kind = BYTE_BPE, .flags = WHOLE_CHUNKS, .pieces = pieces, .n_pieces = COUNT(pieces) };
    Text image = tokenizer_image(&of_bytes);
    Tokenizer *t = parse_tokenizer("the bytes", image.s, image.n);
    t->pieces = checked(realloc(t->pieces, times(limit, sizeof *t->pieces)), times(limit, sizeof *t->pieces));
    while (t->slot_mask < 2 * limit) t->slot_mask = 2 * t->slot_mask + 1;
    free(t->slots);
    t->slots = alloc((size_t)t->slot_mask + 1, sizeof *t->slots);
    t->n_pieces = 0;
    for (size_t b = 0; b < 256; b++) add_piece(t, bytes + b, 1);
    return t;
}

// ---- 2. The corpus -----------------------------------------------------------------------------------------------

typedef void Visit(void *state, const char *text, size_t n, bool answer);

// Shows every content of the corpus; returns the number of samples.
static size_t each_content(const char *file, Visit *visit, void *state) {
    size_t n, samples = 0;
    char *source = read_file(file, &n);
    JsonReader r = json_open(file, source, n);
    for (Json *sample; (sample = json_next(&r)); samples++) {
        const Json *messages = json_get(sample, "messages");
        if (!json_is(messages, JSON_ARRAY)) fail("%s: has no \"messages\"", json_where(&r, sample->at));
        for (const Json *m = messages->first; m; m = m->next) {
            const Json *content = json_get(m, "content"), *role = json_get(m, "role");
            if (!json_is(content, JSON_STRING)) fail("%s: has no \"content\"", json_where(&r, m->at));
            visit(state, content->text, content->count, json_is(role, JSON_STRING) && !strcmp(role->text, "assistant"));
        }
    }
    json_close(&r);
    free(source);
    return samples;
}

static bool is_ascii_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }

static void place_word(Learner *l, uint32_t word) {
    uint32_t slot = (uint32_t)hash_bytes(l->words[word].text, l->words[word].n) & l->slot_mask;
    while (l->slots[slot]) slot = (slot + 1) & l->slot_mask;
    l->slots[slot] = word + 1;
}

static void count_word(Learner *l, const char *s, size_t n) {
    uint32_t slot = (uint32_t)hash_bytes(s, n) & l->slot_mask;
    for (; l->slots[slot]; slot = (slot + 1) & l->slot_mask) {
        Word *w = &l->words[l->slots[slot] - 1];
        if (w->n == n && !memcmp(w->text, s, n)) { w->count++; return; }
    }
    l->words = grow(l->words, &l->words_capacity, l->n_words + 1, sizeof *l->words);
    l->words[l->n_words++] = (Word){ .text = checked(strndup(s, n), n), .n = (uint32_t)n, .count = 1 };
    if (2 * l->n_words <= l->slot_mask) {
        place_word(l, (uint32_t)l->n_words - 1);
        return;
    }
    free(l->slots);
    l->slot_mask = 2 * l->slot_mask + 1;
    l->slots = alloc((size_t)l->slot_mask + 1, sizeof *l->slots);
    for (uint32_t i = 0; i < l->n_words; i++) place_word(l, i);
}

// Counts the characters and words of one content. Merges never leave a chunk, so no word does: it is a run of ASCII
// letters, with the blank in front if the chunk has it.
static void count_content(void *state, const char *s, size_t n, bool answer) {
    Learner *l = state;
    (void)answer;
    for (size_t at = 0, length; at < n; at += length) {
        length = next_chunk(l->t, s + at, n - at);
        const char *chunk = s + at;
        for (size_t i = 0, end; i < length; i = end) {
            size_t bytes;
            for (end = i + (chunk[i] == ' '); end < length && is_ascii_letter(chunk[end]); ) end++;
            if (end > i + 1) count_word(l, chunk + i, end - i);
            if (end > i) continue;
            uint32_t c = utf8_get(chunk + i, length - i, &bytes);
            end += bytes;
            if (c != INVALID && c >= 0x80) l->characters[c]++;
        }
    }
}

// ---- 3. Characters -----------------------------------------------------------------------------------------------

static int by_count(const void *a, const void *b) {     // the most frequent first
    const Character *x = a, *y = b;
    if (x->count != y->count) return x->count > y->count ? -1 : 1;
    return (x->code > y->code) - (x->code < y->code);
}

static Character *sorted_characters(const Learner *l, size_t *n) {
    Character *found = alloc(0x110000, sizeof *found);
    *n = 0;
    for (uint32_t c = 0; c < 0x110000; c++)
        if (l->characters[c]) found[(*n)++] = (Character){ c, l->characters[c] };
    qsort(found, *n, sizeof *found, by_count);
    return found;
}

// A character of three bytes needs a piece for its first two on the way, shared by all 64 characters that begin so.
// Every piece outside ASCII thus starts with the first byte of a character and ends within it. A first byte stands
// nowhere else in a character, so the encoder cannot join the end of one to the beginning of the next, and within one
// it has no choice: whatever the ranks, a character with a piece comes out as that piece.
static void learn_characters(Learner *l, const Character *found, size_t n) {
    char s[4];
    for (size_t i = 0; i < n && found[i].count >= LEAST_CHARACTER; i++) {
        size_t length = utf8_put(s, found[i].code);
        if (l->t->n_pieces + length - 1 > l->limit) return;
        for (size_t part = 2; part <= length; part++)
            if (find_piece(l->t, s, part) < 0) add_piece(l->t, checked(strndup(s, part), part), part);
    }
}

// ---- 4. Words ----------------------------------------------------------------------------------------------------

static uint32_t *pair_at(const Learner *l, int32_t a, int32_t b) { return &l->pairs[(size_t)a * l->limit + (size_t)b]; }

// Encodes a word with the pieces there are now, and counts its pairs instead of those it had before.
static void encode_word(Learner *l, Word *w) {
    for (size_t i = 1; i < w->ids.n; i++) *pair_at(l, w->ids.ids[i-1], w->ids.ids[i]) -= w->count;
    w->ids.n = 0;
    encode_chunk(l->t, w->text, w->n, &w->ids);
    for (size_t i = 1; i < w->ids.n; i++) *pair_at(l, w->ids.ids[i-1], w->ids.ids[i]) += w->count;
}

// The most frequent pair of the given pieces, of equals the one with the lowest ids; returns its count.
static uint32_t best_pair(const Learner *l, const int32_t *ids, size_t n, int32_t *a, int32_t *b) {
    uint32_t best = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            uint32_t count = *pair_at(l, ids[i], ids[j]);
            if (count > best) best = count, *a = ids[i], *b = ids[j];
        }
    return best;
}

// Joins the most frequent pair until none is frequent enough or the room is used. Words are encoded anew by the encoder
// itself, so the counts are those of the pieces that it will really give.
static void learn_words(Learner *l, size_t least) {
    int32_t *ids = alloc(l->limit, sizeof *ids), a = 0, b = 0;   // what words are made of, ids ascending
    size_t n = 0;
    l->pairs = alloc(times(l->limit, l->limit), sizeof *l->pairs);
    for (int32_t c = 0; c < 128; c++) if (c == ' ' || is_ascii_letter((char)c)) ids[n++] = c;
    for (size_t i = 0; i < l->n_words; i++) encode_word(l, &l->words[i]);
    while (l->t->n_pieces < l->limit) {
        if (best_pair(l, ids, n, &a, &b) < least) break;
        Piece left = l->t->pieces[a], right = l->t->pieces[b];
        Text joined = {0};
        text_add(&joined, left.text, left.n);
        text_add(&joined, right.text, right.n);
        ids[n++] = (int32_t)l->t->n_pieces;
        add_piece(l->t, joined.s, joined.n);
        for (size_t i = 0; i < l->n_words; i++)
            if (memmem(l->words[i].text, l->words[i].n, joined.s, joined.n)) encode_word(l, &l->words[i]);
    }
    free(ids);
}

// ---- 5. What it is worth -----------------------------------------------------------------------------------------

typedef struct {
    Tokenizer *t;
    Ids ids;
    size_t tokens, answer_tokens;
    size_t *used;                   // how often each piece stands in an answer
} Measure;

static void measure_content(void *state, const char *s, size_t n, bool answer) {
    Measure *m = state;
    m->ids.n = 0;
    encode(m->t, s, n, &m->ids);
    Text back = decode(m->t, m->ids.ids, m->ids.n);
    if (back.n != n || memcmp(back.s, s, n)) fail("internal error: '%s' comes back as '%s'", s, back.s);
    free(back.s);
    m->tokens += m->ids.n;
    if (!answer) return;
    m->answer_tokens += m->ids.n;
    for (size_t i = 0; i < m->ids.n; i++) m->used[m->ids.ids[i]]++;
}

static void print_characters(Tokenizer *t, const Character *found, size_t n) {
    size_t covered = 0, all = 0, seen = 0;
    Ids ids = {0};
    char s[4];
    for (size_t i = 0; i < n; i++) {
        ids.n = 0;
        encode(t, s, utf8_put(s, found[i].code), &ids);
        all += found[i].count;
        if (ids.n == 1) covered++, seen += found[i].count;
    }
    free(ids.ids);
    fprintf(stderr, "characters    %zu of the %zu outside ASCII are one piece, %.4f%% of what is written\n", covered, n,
            all ? 100.0 * (double)seen / (double)all : 100.0);
}

// Pieces that no answer has: a model whose head is frozen can hardly be taught to say them.
static void print_unused(const Tokenizer *t, const size_t *used) {
    size_t bytes = 0, beginnings = 0, words = 0, pieces[3] = { 256, 0, 0 };
    Text list = {0};
    text_add(&list, "", 0);
    for (uint32_t i = 0; i < t->n_pieces; i++) {
        const Piece *p = &t->pieces[i];
        bool word = (unsigned char)p->text[0] < 0x80;
        if (i >= 256) pieces[word ? 2 : 1]++;
        if (used[i]) continue;
        if (i < 256) bytes++;
        else if (!word) beginnings++;
        else if (words++ < 30) text_print(&list, " '%.*s'", (int)p->n, p->text);
    }
    fprintf(stderr, "pieces        %u: %zu bytes, %zu characters and their beginnings, %zu parts of words\n",
            t->n_pieces, pieces[0], pieces[1], pieces[2]);
    fprintf(stderr, "in no answer  %zu: %zu bytes, %zu characters or beginnings, %zu parts of words%s%s%s\n",
            bytes + beginnings + words, bytes, beginnings, words, words ? ":" : "", list.s, words > 30 ? " ..." : "");
    free(list.s);
}

// ---- 6. The program ----------------------------------------------------------------------------------------------

static Text finished_image(const Tokenizer *t) {
    static const char *const names[] = { "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
                                         "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>" };
    Special specials[COUNT(names)];
    for (size_t i = 0; i < COUNT(names); i++) specials[i] = (Special){ names[i], (int32_t)(t->n_pieces + i) };
    Tokenizer whole = *t;
    whole.specials = specials;
    whole.n_specials = COUNT(names);
    return tokenizer_image(&whole);
}

int main(int argc, char **argv) {
    static Learner l;               // static, as all that it holds lives as long as the program
    static Measure m;
    size_t n_characters;
    char *end = "";
    long limit = argc > 3 ? strtol(argv[3], &end, 10) : DEFAULT_PIECES;
    if (argc < 3 || argc > 4 || *end || limit < 256 || limit > MOST_PIECES)
        fail_usage("make_tokenizer CORPUS.jsonl OUT.bin [PIECES], with 256 to %d pieces", MOST_PIECES);
    l = (Learner){ .limit = (size_t)limit, .t = byte_tokenizer((size_t)limit), .slot_mask = 1023,
                   .slots = alloc(1024, sizeof *l.slots), .characters = alloc(0x110000, sizeof *l.characters) };
    size_t samples = each_content(argv[1], count_content, &l);
    if (!samples) fail("%s: has no samples", argv[1]);
    Character *found = sorted_characters(&l, &n_characters);
    learn_characters(&l, found, n_characters);
    learn_words(&l, max_size(samples / SAMPLES_PER_MERGE, 2));

    Text image = finished_image(l.t);
    m.t = parse_tokenizer(argv[2], image.s, image.n);
    m.used = alloc(m.t->n_pieces, sizeof *m.used);
    each_content(argv[1], measure_content, &m);
    write_file(argv[2], image.s, image.n);

    fprintf(stderr, "samples       %zu, with %.2f tokens each, %.2f of them in answers (role tokens not counted)\n",
            samples, (double)m.tokens / (double)samples, (double)m.answer_tokens / (double)samples);
    print_characters(m.t, found, n_characters);
    print_unused(m.t, m.used);
    free(found);
    return 0;
}
