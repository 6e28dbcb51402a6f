// encode_all: for tests/compare_tokenizers.py. Reads texts from stdin, each behind its length in bytes (uint32), and
// writes for each the number of its ids and the ids (int32).
//
//     encode_all TOKENIZER <texts >ids
#define GLMTUNE_NO_MAIN
#include "../glmtune.c"

int main(int argc, char **argv) {
    if (argc != 2) fail_usage("encode_all TOKENIZER <texts >ids");
    Tokenizer *t = load_tokenizer_file(argv[1]);
    size_t n;
    char *texts = read_stream(stdin, "standard input", &n);
    Ids ids = {0};
    for (size_t at = 0; at + 4 <= n; ) {
        uint32_t length;
        memcpy(&length, texts + at, 4);
        if (length > n - at - 4) fail("standard input: a text is cut off");
        ids.n = 0;
        encode(t, texts + at + 4, length, &ids);
        int32_t count = (int32_t)ids.n;
        fwrite(&count, sizeof count, 1, stdout);
        fwrite(ids.ids, sizeof *ids.ids, ids.n, stdout);
        at += 4 + length;
    }
    return 0;
}
