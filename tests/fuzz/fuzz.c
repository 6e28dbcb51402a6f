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
static struct { void *at; size_t n; } maps[64];
static size_t n_maps;
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

static void *fuzz_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    void *p = mmap(at, n, protection, flags, fd, offset);
    if (p != MAP_FAILED) maps[n_maps].at = p, maps[n_maps++].n = n;
    return p;
}

static size_t n_mapped;         // glmtune.c's own list, of files that it need not map again

static void end_input(void) {
    n_mapped = 0;
    while (taken) fuzz_free(taken + 1);
    while (n_maps) n_maps--, munmap(maps[n_maps].at, maps[n_maps].n);
}

#define calloc(n, size) fuzz_calloc(n, size)
#define malloc(n) fuzz_calloc(1, n)
#define realloc(p, n) fuzz_realloc(p, n)
#define free(p) fuzz_free(p)
#define strndup(s, n) fuzz_strndup(s, n)
#define strdup(s) fuzz_strndup(s, strlen(s))
#define vasprintf(s, format, args) fuzz_vasprintf(s, format, args)
#define mmap(at, n, protection, flags, fd, offset) fuzz_mmap(at, n, protection, flags, fd, offset)
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
        Config c = { .vocab_size = 1 << 20, .model_type = "" };
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
    (void)read_data_file(memory_file, &format, &o, 1 << 20, n % 5 > 0);
}

static void to_file(int fd, const char *bytes, size_t n) {
    if (ftruncate(fd, 0) || pwrite(fd, bytes, n, 0) != (ssize_t)n) abort();
}

static char adapter_folder[] = "/tmp/glmtune-fuzz-XXXXXX";
static void remove_adapter(void) { remove_tree(adapter_folder); }

// An adapter's folder on a small base: its adapter_config.json, a NUL, its file of tensors.
static void fuzz_adapter(const char *bytes, size_t n) {
    static const char *const names[] = { "adapter_config.json", "adapter_model.safetensors" };
    static int files[COUNT(names)];
    for (size_t i = 0; i < COUNT(names) && !files[COUNT(names) - 1]; i++) {
        char from[32], to[64];
        if (i == 0 && (!mkdtemp(adapter_folder) || atexit(remove_adapter))) abort();
        files[i] = memfd_create(names[i], MFD_CLOEXEC);
        snprintf(from, sizeof from, "/proc/self/fd/%d", files[i]);
        snprintf(to, sizeof to, "%s/%s", adapter_folder, names[i]);
        if (symlink(from, to)) abort();
    }
    size_t config = strnlen(bytes, n), rest = min_size(config + 1, n);
    Options o = default_options();
    o.base = "tests/golden/saved_hf";
    to_file(files[0], bytes, config);
    to_file(files[1], bytes + rest, n - rest);
    Opened m = open_model(adapter_folder, &o);
    if (count_parameters(m.model->trained, m.model->n_trained) > 1 << 20) return;
    check_fingerprint(&m, NULL, &o);
    start_method(&m, 0, false);
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
    { "adapter", fuzz_adapter },
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
