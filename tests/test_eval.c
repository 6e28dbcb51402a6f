// Tests of evaluation: scores of answers, generation in batches, what a run keeps of its best step.

static Text text_of(const char *s) { return (Text){ (char *)s, strlen(s), 0 }; }

static Scores scores_of(const char *answer, const char *reference, bool stopped) {
    Scores s = {0};
    add_scores(&s, text_of(answer), text_of(reference), stopped);
    return s;
}

// Against rouge-chinese and NLTK (tests/reference_metrics.py).
static void test_golden_scores(void) {
    const char *path = "tests/golden/metrics.jsonl";
    size_t n, n_pairs = 0;
    char *source = read_file(path, &n);
    JsonReader r = json_open(path, source, n);
    double worst[4] = {0};
    size_t worst_at[4] = {0};
    for (const Json *j; (j = json_next(&r)); n_pairs++) {
        Scores s = scores_of(json_get(j, "answer")->text, json_get(j, "reference")->text, true);
        size_t k = 0;
        for (const Json *want = json_get(j, "scores")->first; want; want = want->next, k++) {
            double error = fabs(s.sum[k] / 100 - want->number);
            if (!(error <= worst[k])) worst[k] = error, worst_at[k] = n_pairs + 1;
        }
    }
    for (size_t k = 0; k < COUNT(worst); k++)
        check_true(label("%s of %s:%zu: error %.3g, tolerance 1e-6", metrics[k].name, path, worst_at[k], worst[k]),
                   worst[k] <= 1e-6);
    check_equal("pairs of golden scores", n_pairs, 1000);
}

static void check_scores(const char *answer, const char *reference, Metric m, double want) {
    check_number(label("%s of '%s' for '%s'", metrics[m].name, answer, reference),
                 scores_of(answer, reference, false).sum[m] + 1, want + 1, 1e-12);
}

static void test_scores(void) {
    test_golden_scores();
    for (Metric m = ROUGE_1; m <= BLEU_4; m++)
        check_scores("", "里明城。", m, 0), check_scores(" \n", "Good", m, 0), check_scores("", "", m, 0),
        check_scores("Good", "", m, 0);
    check_scores("", "", ACCURACY, 100), check_scores("", "a", ACCURACY, 0);
    check_scores("\n 差评\xE3\x80\x80", "差评", ACCURACY, 100), check_scores("差 评", "差评", ACCURACY, 0);
    check_scores("Good", "Goo", ACCURACY, 0), check_scores("好评", "差评", ACCURACY, 0);
    check_scores("1000000", "", REPETITION_RATE, 0), check_scores("哈哈哈哈", "", REPETITION_RATE, 0);
    check_scores("好的，好的，好的，好的，好的，好的，好的，", "", REPETITION_RATE, 100);
    check_scores("I am I am I am I am I am I a", "", REPETITION_RATE, 100);
    check_scores("abcdefghijklmnopqrstuabcdefghijklmnopqrstuabcdefghijklmnopqrstuabcdefghijklmnopqrstu", "",
                 REPETITION_RATE, 0);
    check_scores("", "", STOP_RATE, 0);
    check_number("stop rate of an answer that stopped", scores_of("", "", true).sum[STOP_RATE], 100, 0);
}
