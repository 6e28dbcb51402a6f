// probe: how many questions of each kind a model answers to the letter, greedily.
//     probe MODEL SAMPLES.jsonl       samples as tests/make_corpus.c writes them: "messages" and "kind"
// The last message is the reference; what stands before it is the prompt. Prints a row for each kind: right, asked,
// share; then the share of answers that ended in a stop token, and the mean over kinds. With GLM_VERBOSE the wrong
// answers on stderr.
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"

typedef struct { const char *kind; size_t right, asked; } Score;
typedef struct { Score rows[64]; size_t n, stopped, asked; } Tally;

static Score *score_of(Tally *s, const char *kind) {
    size_t i = 0;
    while (i < s->n && strcmp(s->rows[i].kind, kind)) i++;
    if (i == COUNT(s->rows)) fail("more than %zu kinds", COUNT(s->rows));
    if (i == s->n) s->rows[s->n++] = (Score){ .kind = name("%s", kind) };
    return &s->rows[i];
}

// The prompt up to and with the last assistant's role token; returns the reference.
static const Json *build_prompt(const DataReader *d, const Json *messages, Row *row) {
    const Json *m = messages->first;
    Conversation c = {0};
    for (; m->next; m = m->next) read_message(d, m, NULL, &c);
    *row = encode_turns(d->format, c.turns, c.n, SIZE_MAX, true);
    return want(d, m, "content", JSON_STRING, "a string");
}

static void ask(Tally *s, Generator *g, const DataReader *d, const Json *sample) {
    const Json *messages = want(d, sample, "messages", JSON_ARRAY, "an array"), *kind = json_get(sample, "kind");
    Row row = {0};
    Ids answer = {0};
    const Json *reference = build_prompt(d, messages, &row);
    g->run.caches->n = 0;
    feed(g, row.ids.ids, row.ids.n);
    bool stopped = generate(g, d->format, d->options, 96, &answer, NULL);
    Text text = decode(d->format->tokenizer, answer.ids, answer.n);
    const char *given = text.s;
    while (isspace((unsigned char)*given)) given++;
    bool right = stopped && !strcmp(given, reference->text);
    Score *score = score_of(s, json_is(kind, JSON_STRING) ? kind->text : "all");
    score->asked++, score->right += right;
    s->asked++, s->stopped += stopped;
    if (!right && getenv("GLM_VERBOSE"))
        fprintf(stderr, "%s: wanted '%s', got '%s'%s\n", score->kind, reference->text, given, stopped ? "" : " ...");
    free(row.ids.ids), free(row.teaches.ids), free(answer.ids), free(text.s);
}

int main(int argc, char **argv) {
    if (argc != 3) fail_usage("usage: probe MODEL SAMPLES.jsonl");
    Options o = default_options();
    size_t n;
    Opened m = open_model(argv[1], &o);
    start_method(&m, 0, false);
    ChatFormat f = choose_format(&o, &m.model->config, m.folder);
    Generator g = make_generator(m.model, m.method, 512, 1);
    char *source = read_file(argv[2], &n);
    JsonReader r = json_open(argv[2], source, n);
    Dataset notes = {0};
    DataReader d = { &r, &f, &o, m.model->config.vocab_size, &notes };
    Tally s = {0};
    double mean = 0;
    if (!f.tokenizer || !f.layout) fail("%s", f.why);
    for (const Json *j; (j = json_next(&r)); ) ask(&s, &g, &d, j);
    for (size_t i = 0; i < s.n; i++) {
        double share = (double)s.rows[i].right / (double)s.rows[i].asked;
        printf("%-10s %5zu of %5zu  %.3f\n", s.rows[i].kind, s.rows[i].right, s.rows[i].asked, share);
        mean += share / (double)s.n;
    }
    printf("stopped    %5zu of %5zu  %.3f\n", s.stopped, s.asked, (double)s.stopped / (double)s.asked);
    printf("mean over kinds         %.3f\n", mean);
    return 0;
}
