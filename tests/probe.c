// probe: what a model answers, kind by kind, greedily.
//     probe MODEL SAMPLES.jsonl...       samples as tests/make_corpus.c writes them: "messages" and "kind"
// The last message is the reference, what stands before it the prompt. An answer is right when it ended and is the
// reference to the letter, or contains "want" where the reference has that. Of kind "turns" the model answers every
// turn itself, hearing its own answers; such a conversation is right when every answer that has a "want" is, and each
// of these turns has a row of its own.
// Prints a row for each kind: right, asked, share, share that ended in a stop token, share that ended in a loop, mean
// ROUGE-L; then the last four over all answers, and the mean share over kinds. With GLM_VERBOSE the wrong answers on
// stderr.
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"

enum { LONGEST_ANSWER = 64, LONGEST_CONVERSATION = 1024 };

// answers: those that were judged for ending and loops; of a conversation, all
typedef struct { const char *kind; size_t right, asked, answers, stopped, looping; double rouge; } Score;
typedef struct { Score rows[64]; size_t n; } Tally;
typedef struct { const DataReader *data; Chat chat; Tally *tally; } Probe;

static Score *score_of(Tally *s, const char *kind) {
    size_t i = 0;
    while (i < s->n && strcmp(s->rows[i].kind, kind)) i++;
    if (i == COUNT(s->rows)) fail("more than %zu kinds", COUNT(s->rows));
    if (i == s->n) s->rows[s->n++] = (Score){ .kind = strf("%s", kind) };
    return &s->rows[i];
}

// One answer to what has been said; counts it and says whether it is what the message wants.
static bool answer_is_right(Probe *p, Score *score, const Json *message, Ids *answer) {
    const Json *reference = want(p->data->json, message, "content", JSON_STRING, "a string"), *part;
    Chat *c = &p->chat;
    feed_turns(c);
    bool stopped = generate(&c->g, c->format, c->o, LONGEST_ANSWER, answer, NULL);
    for (size_t i = 0; i < answer->n; i++) ids_add(&c->fed, answer->ids[i]);
    Text text = readable(c->format->tokenizer, answer->ids, answer->n);
    Characters given = characters_of(text, false), wanted;
    wanted = characters_of((Text){ .s = (char *)reference->text, .n = strlen(reference->text) }, false);
    part = json_get(message, "want");
    bool right = stopped && (part ? strstr(text.s, part->text) != NULL : !strcmp(text.s, reference->text));
    score->answers++, score->stopped += stopped, score->looping += loops(given);
    score->rouge += rouge_l(given, wanted);
    if (!right && getenv("GLM_VERBOSE"))
        fprintf(stderr, "%s: wanted '%s', got '%s'%s\n", score->kind, reference->text, text.s, stopped ? "" : " ...");
    free(text.s), free(given.at), free(wanted.at);
    return right;
}

static void ask(Probe *p, const Json *sample) {
    const Json *m = want(p->data->json, sample, "messages", JSON_ARRAY, "an array")->first;
    const Json *kind = json_get(sample, "kind");
    Score *score = score_of(p->tally, json_is(kind, JSON_STRING) ? kind->text : "all");
    bool converses = !strcmp(score->kind, "turns"), right = true;
    size_t turn = 0;
    Chat *c = &p->chat;
    drop_turns(&c->turns, 0);
    for (; m; m = m->next) {
        Ids answer = {0};
        bool answers = !strcmp(want(p->data->json, m, "role", JSON_STRING, "a string")->text, "assistant")
            && (converses || !m->next);
        if (!answers) read_message(p->data, m, NULL, &c->turns);
        else {
            bool good = answer_is_right(p, score, m, &answer), counts = !converses || json_get(m, "want");
            Score *of_turn = converses && counts ? score_of(p->tally, strf("turn_%zu", turn + 1)) : NULL;
            if (of_turn) of_turn->asked++, of_turn->right += good;
            right = right && (good || !counts);
            turn++;
            add_turn(&c->turns, answer_turn(c->format, &answer));
        }
        free(answer.ids);
    }
    score->asked++, score->right += right;
}

static void ask_all(Probe *p, const char *path, const ChatFormat *f, const Options *o) {
    size_t n;
    char *source = read_file(path, &n);
    JsonReader r = json_open(path, source, n), tools = {0};
    Dataset notes = {0};
    DataReader d = { .json = &r, .tools = &tools, .format = f, .o = o, .set = &notes };
    p->data = &d;
    for (const Json *j; (j = json_next(&r)); ) ask(p, j);
}

static void print_row(const Score *s) {
    double n = (double)max_size(s->answers, 1);
    printf("%-10s %5zu of %5zu  %.4f   stopped %.4f   loops %.4f   rouge-l %.4f   of %zu\n", s->kind, s->right, s->asked,
           (double)s->right / (double)s->asked, (double)s->stopped / n, (double)s->looping / n, s->rouge / n,
           s->answers);
}

int main(int argc, char **argv) {
    if (argc < 3) fail_usage("usage: probe MODEL SAMPLES.jsonl...");
    Options o = default_options();
    Opened m = open_model(argv[1], &o);
    start_method(&m, 0, false);
    ChatFormat f = choose_format(&o, &m.model->config, m.folder);
    if (!f.tokenizer || !f.layout) fail("%s", f.why);
    Tally t = {0};
    Score all = { .kind = "all" };
    Probe p = { .tally = &t, .chat = { .format = &f, .o = &o } };
    double mean = 0;
    p.chat.g = make_generator(m.model, m.method, min_size(LONGEST_CONVERSATION, positions_left(m.model)), 1);
    for (int i = 2; i < argc; i++) ask_all(&p, argv[i], &f, &o);
    for (size_t i = 0; i < t.n; i++) {
        const Score *s = &t.rows[i];
        print_row(s);
        all.right += s->right, all.asked += s->asked, all.answers += s->answers;
        all.stopped += s->stopped, all.looping += s->looping, all.rouge += s->rouge;
        mean += (double)s->right / (double)s->asked / (double)t.n;
    }
    print_row(&all);
    printf("mean over kinds         %.4f\n", mean);
    return 0;
}
