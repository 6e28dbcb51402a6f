// Fuzz targets: whatever bytes a file holds, glmtune reads it or ends with one line; it never crashes, hangs or runs
// past a buffer.
//
//     tests/fuzz/run.sh SECONDS [TARGET ...]      with libFuzzer (clang)
//     test-fuzz FOLDER                            reads every file of FOLDER/TARGET/ once: seeds and past crashes
//
// Each input gets what the program has: glmtune.c as it is. Ending the program becomes a jump back to the target, and
// what a run took from the heap is given back after it, so that millions of runs fit into one process.
#define _GNU_SOURCE
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// ---- The heap and the end of a run -------------------------------------------------------------------------------

typedef struct Taken { struct Taken *next, **link; } Taken;     // 16 bytes in front of what a run takes
static Taken *taken;
static jmp_buf fuzz_ending;

static void *fuzz_link(Taken *b) {
    if (!b) return NULL;
    *b = (Taken){ taken, &taken };
    if (taken) taken->link = &b->next;
    taken = b;
    return b + 1;
}

static void fuzz_unlink(Taken *b) {
    *b->link = b->next;
    if (b->next) b->next->link = b->link;
}

static void *fuzz_calloc(size_t n, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > (size_t)1 << 40) return NULL;
    return fuzz_link(calloc(1, sizeof(Taken) + bytes));
}

static void fuzz_free(void *p) {
    if (!p) return;
    fuzz_unlink((Taken *)p - 1);
    free((Taken *)p - 1);
}

static void *fuzz_realloc(void *p, size_t n) {
    if (!p) return fuzz_calloc(1, n);
    fuzz_unlink((Taken *)p - 1);
    return fuzz_link(realloc((Taken *)p - 1, sizeof(Taken) + n));
}

static int fuzz_memalign(void **p, size_t n) { return !(*p = fuzz_calloc(1, n)); }     // 16 bytes are aligned enough

static char *fuzz_strndup(const char *s, size_t n) {
    char *copy = fuzz_calloc(1, strnlen(s, n) + 1);
    return copy ? memcpy(copy, s, strnlen(s, n)) : NULL;
}

static int fuzz_vasprintf(char **s, const char *format, va_list args) {
    va_list again;
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, again);
    va_end(again);
    *s = fuzz_calloc(1, (size_t)n + 1);
    return vsnprintf(*s, (size_t)n + 1, format, args);
}

// A file that is mapped is copied instead: a map ends with a page, a copy where the file does.
static void *fuzz_mmap(size_t n, int fd) {
    void *p = fuzz_calloc(1, n);
    return p && pread(fd, p, n, 0) == (ssize_t)n ? p : MAP_FAILED;
}

static size_t n_mapped;         // glmtune.c's own list, of files that it need not map again

static void end_input(void) {
    n_mapped = 0;
    while (taken) fuzz_free(taken + 1);
}

#define calloc(n, size) fuzz_calloc(n, size)
#define malloc(n) fuzz_calloc(1, n)
#define realloc(p, n) fuzz_realloc(p, n)
#define free(p) fuzz_free(p)
#define posix_memalign(p, alignment, n) fuzz_memalign(p, n)
#define strndup(s, n) fuzz_strndup(s, n)
#define strdup(s) fuzz_strndup(s, strlen(s))
#define vasprintf(s, format, args) fuzz_vasprintf(s, format, args)
#define mmap(at, n, protection, flags, fd, offset) fuzz_mmap(n, fd)
#define exit(status) longjmp(fuzz_ending, 1 + (status))
#define GLMTUNE_NO_MAIN
#include "../../glmtune.c"
#undef exit

// ---- Targets -----------------------------------------------------------------------------------------------------

static const char *memory_file;         // the input as a file: a name under /proc/self/fd

static void fuzz_json(const char *bytes, size_t n) {
    JsonReader r = json_open("fuzz.json", bytes, n);
    for (const Json *j; (j = json_next(&r)); ) (void)json_where(&r, j->at);
    r.at = 0;
    r.block = r.blocks;
    r.block->used = r.strings_used = 0;
    (void)json_only(&r);
}

// A vocabulary that is accepted must encode every text.
static void use_tokenizer(Tokenizer *t, const char *bytes, size_t n) {
    static const char text[] = "It's 12345  tokens,\r\n \xE4\xBD\xA0\xE5\xA5\xBD\xEF\xBC\x81 <|user|>\t\xF0\x9F\x9A\x80  ";
    Ids ids = {0};
    encode(t, text, sizeof text - 1, &ids);
    encode(t, bytes, min_size(n, 4096), &ids);
    (void)decode(t, ids.ids, ids.n);
}

static void fuzz_tokenizer(const char *bytes, size_t n) { use_tokenizer(load_tokenizer_file(memory_file), bytes, n); }

static void fuzz_safetensors(const char *bytes, size_t n) {
    TensorSet set = {0};
    (void)bytes, (void)n;
    read_tensor_file(&set, memory_file);
    for (size_t i = 0; i < set.n; i++)      // every number that the header promises must be there
        for (size_t b = 0; b < set.tensors[i].bytes; b += 512) (void)((const volatile char *)set.tensors[i].data)[b];
}

static void fuzz_data(const char *bytes, size_t n) {
    static ChatFormat format;
    static Options o;
    static Tokenizer loaded;
    (void)bytes, (void)n;
    if (!format.layout) {
        static const Config c = { .vocab_size = 1 << 20, .model_type = "" };
        o = default_options();
        o.layout = "glm4-chat";
        format = choose_format(&o, &c, ".");
        loaded = *format.tokenizer;
        taken = NULL;                       // these stay
    }
    *format.tokenizer = loaded;             // without what the run before took for its work
    o.official_mask = n % 2;
    format.layout = &layouts[n % COUNT(layouts)];       // each with the same tokens
    o.overlong = (const char *[]){ "error", "drop", "truncate" }[n / 2 % 3];
    o.max_input_length = n % 7 ? 512 : 8;
    format.joined = n / 3 % 2;
    (void)read_data_file(memory_file, &format, &o, n % 5 > 0);
}

static void to_file(int fd, const char *bytes, size_t n) {
    if (ftruncate(fd, 0) || pwrite(fd, bytes, n, 0) != (ssize_t)n) abort();
}

static char fuzz_folder[] = "/tmp/glmtune-fuzz-XXXXXX";
static void remove_folder(void) { remove_tree(fuzz_folder); }

// The file of that place in the folder, which lies in memory; the first call makes the folder.
static int file_in_folder(size_t i) {
    static const char *const names[] = { "adapter_config.json", "adapter_model.safetensors", "model.safetensors" };
    static int files[COUNT(names)];
    for (size_t k = 0; k < COUNT(names) && !files[COUNT(names) - 1]; k++) {
        char from[32], to[64];
        if (k == 0 && (!mkdtemp(fuzz_folder) || atexit(remove_folder))) abort();
        files[k] = memfd_create(names[k], MFD_CLOEXEC);
        snprintf(from, sizeof from, "/proc/self/fd/%d", files[k]);
        snprintf(to, sizeof to, "%s/%s", fuzz_folder, names[k]);
        if (symlink(from, to)) abort();
    }
    return files[i];
}

// An adapter's folder on a small base: its adapter_config.json, a NUL, its file of tensors.
static void fuzz_adapter(const char *bytes, size_t n) {
    size_t config = strnlen(bytes, n), rest = min_size(config + 1, n);
    Options o = default_options();
    o.base = "tests/golden/saved_hf";
    to_file(file_in_folder(0), bytes, config);
    to_file(file_in_folder(1), bytes + rest, n - rest);
    Opened m = open_model(fuzz_folder, &o);
    if (count_parameters(m.model->trained, m.model->n_trained) > 1 << 20) return;
    check_fingerprint(&m, NULL, &o);
    start_method(&m, 0, false);
}

enum { MOST_BYTES = 1 << 16 };      // of the numbers of a file: no fuzzer shall wait for more

// Adds a tensor to a header, behind the others.
static void add_entry(Text *header, const char *name, const char *type, const size_t *shape, size_t n_dims,
                      size_t *end) {
    size_t begin = *end, bytes = 1;
    for (size_t i = 0; i < COUNT(dtypes); i++) if (!strcmp(dtypes[i].name, type)) bytes = dtypes[i].size;
    for (size_t i = 0; i < n_dims; i++) bytes = min_size(bytes, MOST_BYTES + 1) * min_size(shape[i], MOST_BYTES + 1);
    *end += bytes;
    text_print(header, "%s", header->n ? "," : "{");
    text_json(header, name, strlen(name));
    text_print(header, ":{\"dtype\":");
    text_json(header, type, strlen(type));
    text_print(header, ",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", shape_text(shape, n_dims), begin, *end);
}

// A base with quantised matrices. The input: lines "TENSOR TYPE SIZES...", an empty one, then the bytes of the tensors
// one after another, and blanks where they end. The header is made of the lines, so that what follows a size that
// changes still has its place. Tensors of the model that no line names come first.
static void fuzz_quantised(const char *bytes, size_t n) {
    static const char config[] = "{\"model_type\": \"glm\", \"vocab_size\": 3, \"hidden_size\": 16, "
        "\"num_hidden_layers\": 1, \"num_attention_heads\": 1, \"num_key_value_heads\": 1, \"head_dim\": 8, "
        "\"intermediate_size\": 6, \"attention_bias\": false}";
    Model *m = describe_model(parse_config("config.json", config));
    const char *gap = memmem(bytes, n, "\n\n", 2), *data = gap ? gap + 2 : bytes + n;
    Text lines = {0}, header = {0}, file = {0};
    size_t end = 0;
    text_print(&lines, "%.*s", (int)(gap ? gap - bytes : (ptrdiff_t)n), bytes);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        if (!strstr(lines.s, strf("%s ", t->name))) add_entry(&header, t->name, "F32", t->shape, t->n_dims, &end);
    }
    size_t first = end;
    for (char *line = lines.s; *line; line += strcspn(line, "\n"), line += *line == '\n') {
        char name[100], type[16];
        size_t shape[6], n_dims = 0;
        int at = 0;
        if (sscanf(line, "%99[^ \n] %15[^ \n]%n", name, type, &at) != 2) continue;
        for (char *p = line + at; n_dims < COUNT(shape) && *p == ' ' && isdigit((unsigned char)p[1]); )
            shape[n_dims++] = strtoull(p, &p, 10);
        add_entry(&header, name, type, shape, n_dims, &end);
        if (end > MOST_BYTES) return;
    }
    text_print(&header, "}");
    uint64_t length = header.n;
    text_add(&file, (const char *)&length, sizeof length);
    text_add(&file, header.s, header.n);
    text_print(&file, "%*s", (int)first, "");
    text_add(&file, data, min_size((size_t)(bytes + n - data), end - first));
    text_print(&file, "%*s", (int)(sizeof length + header.n + end - file.n), "");
    to_file(file_in_folder(2), file.s, file.n);
    bind_files(m, fuzz_folder);
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Tensor *t = m->tensors[i];
        if (!t->scales) continue;
        real *numbers = alloc(t->n, sizeof *numbers), *x = alloc(2 * t->shape[1], sizeof *x);
        real *y = alloc(2 * t->shape[0], sizeof *y);
        widen_weight(numbers, weight_of(t), t->n);
        widen_weight(numbers, (Weight){ t->data, t->dtype, t->n - 3, t->scales }, 3);
        for (size_t T = 1; T <= 2; T++)
            linear_forward(y, NULL, x, weight_of(t), 1, T, t->shape[0], t->shape[1]);
    }
}

// The reader, and what a config does to the options.
static void fuzz_yaml(const char *bytes, size_t n) {
    JsonReader r = json_open("fuzz.yaml", bytes, n);
    Options o = default_options();
    const char *data = "/";
    (void)yaml_only(&r);
    read_yaml_config(memory_file, &o, &data);
}

static const struct { const char *name; void (*run)(const char *, size_t); } targets[] = {
    { "json", fuzz_json }, { "tokenizer", fuzz_tokenizer }, { "tokenizer_json", fuzz_tokenizer },
    { "safetensors", fuzz_safetensors }, { "torch", fuzz_safetensors }, { "data", fuzz_data }, { "yaml", fuzz_yaml },
    { "adapter", fuzz_adapter }, { "quantised", fuzz_quantised },
};

static void run_target(size_t target, const char *bytes, size_t n) {
    static int fd = -1;
    if (fd < 0) {
        static char path[32];
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        memory_file = path;
        method_names();         // makes its text once, which stays
        taken = NULL;
    }
    to_file(fd, bytes, n);
    if (!setjmp(fuzz_ending)) targets[target].run(bytes, n);
    end_input();
}

static size_t find_target(const char *wanted) {
    size_t i = 0;
    while (i < COUNT(targets) && strcmp(targets[i].name, wanted)) i++;
    if (i == COUNT(targets)) abort();
    return i;
}

#ifdef TARGET
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    // a copy of exactly n bytes, so that the sanitizer sees a read past them
    char *copy = (malloc)(n ? n : 1);
    if (n) memcpy(copy, bytes, n);
    run_target(find_target(TARGET), copy, n);
    (free)(copy);
    return 0;
}
#else
// Reads FOLDER/TARGET/*; a crash names its file on stdout before it happens.
int main(int argc, char **argv) {
    size_t n_read = 0;
    if (argc < 2 || !freopen("/dev/null", "w", stderr)) return 2;
    for (int a = 1; a < argc; a++)
        for (size_t i = 0; i < COUNT(targets); i++) {
            char folder[4096], path[8192];
            snprintf(folder, sizeof folder, "%s/%s", argv[a], targets[i].name);
            DIR *d = opendir(folder);
            for (struct dirent *e; d && (e = readdir(d)); ) {
                if (e->d_name[0] == '.') continue;
                snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
                FILE *f = fopen(path, "rb");
                char *bytes = (malloc)(1 << 20);
                size_t n = f ? fread(bytes, 1, 1 << 20, f) : 0;
                if (f) fclose(f);
                bytes = (realloc)(bytes, n ? n : 1);
                printf("%s\n", path);
                fflush(stdout);
                run_target(i, bytes, n);
                (free)(bytes);
                n_read++;
            }
            if (d) closedir(d);
        }
    printf("%zu passed, %d failed\n", n_read, n_read ? 0 : 1);
    return !n_read;
}
#endif
