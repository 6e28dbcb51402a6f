"""Compares glmtune's token ids with those of the libraries that the released models use, on text of every kind.

    GLM_REAL=DIR python tests/compare_tokenizers.py [--mb 20] [--only NAME] [FILE ...]       FILE: more text to compare on
    python tests/compare_tokenizers.py --golden      writes tests/golden/tokenizer_json again

    sentencepiece   DIR/tokenizers/chatglm3-6b/tokenizer.model
    tiktoken        DIR/tokenizers/glm-4-9b-chat/tokenizer.model, GLM-4's pattern
    tokenizers      a tokenizer.json made of the same ranks, ignore_merges true and false

Text is what this machine has: documentation, manual pages, Python sources (English, code; Chinese if manpages-zh or FILE
has it), and what is made here: every assigned code point, random strings, long runs. Ends with 1 if an id differs.
Needs ./glmtune, and what tests/requirements.txt names. One process of glmtune encodes each block of text.
"""
import argparse
import array
import base64
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BLOCK = 250_000         # characters that are encoded as one text


# ---- Text --------------------------------------------------------------------------------------------------------

def read(path):
    data = open(path, "rb").read(4_000_000)
    if path.endswith(".gz"):
        data = gzip.decompress(open(path, "rb").read())[:4_000_000]
    return "" if b"\0" in data[:1000] else data.decode("utf-8", "replace")


def walk(roots, endings, limit):
    """About `limit` bytes of the files below `roots` whose names end so."""
    texts, size = [], 0
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders.sort()
            for file in sorted(files):
                path = os.path.join(folder, file)
                if not file.endswith(endings) or os.path.islink(path):
                    continue
                try:
                    texts.append(read(path))
                except (OSError, EOFError, gzip.BadGzipFile):
                    continue
                size += len(texts[-1].encode())
                if size >= limit:
                    return "".join(texts)
    return "".join(texts)


def assigned():
    """Every code point that the Unicode of this Python assigns, private use left out: newer versions assign no fewer."""
    return [chr(c) for c in range(1, 0xF0000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]


def assigned_text(points):
    """Each code point alone, and between others."""
    return "".join(form.replace("%s", c) for form in ("%s", "a%s", "%sa", " %s ", "1%s1", "%s%s\n", "'%s", "\n%s")
                   for c in points)


def random_strings(n, rng, points):
    sets = ["abcdefghij \n\t'", "'sStTrReEvVmMlLdD\u017f ", "0123456789 .,", " \n\r\t\u3000\xa0\x0b\x85\u2028",
            "\u4f60\u597d\uff0c\u4e16\u754c \u3002\n", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd",
            "\U0001f680\U0001f468\u200d\U0001f469\ufe0f\u0301e\u0308n\u0303 ", "\u0660\u0661\u2160\xb2\xbd\u3007a1 ",
            "<|user|>[gMASK]<sop></s>", "\u2581 a\u2581"]
    for i in range(n):
        if i % 4 == 0:
            text = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40))).decode("utf-8", "replace")
            yield "".join("\ufffd" if unicodedata.category(c) == "Cn" else c for c in text)
        elif i % 4 == 1:
            yield "".join(rng.choice(points[:rng.choice((0x250, len(points)))]) for _ in range(rng.randrange(1, 30)))
        else:
            letters = "".join(rng.sample(sets, 1 + i % 3))
            yield "".join(rng.choice(letters) for _ in range(rng.randrange(1, 60)))


def languages(n, rng):
    """Random words of right-to-left scripts, Indic scripts with their marks, emoji sequences, digits."""
    ranges = [(0x5D0, 0x5EB), (0x620, 0x65F), (0x710, 0x74B), (0x905, 0x94E), (0xE01, 0xE3B), (0xAC00, 0xD7A4),
              (0x1F300, 0x1F650), (0x300, 0x34F), (0x30, 0x3A), (0x4E00, 0x9FA6), (0x3041, 0x30FF), (0x410, 0x450)]
    out = []
    while n > 0:
        a, b = rng.choice(ranges)
        word = "".join(chr(rng.randrange(a, b)) for _ in range(rng.randrange(1, 9)))
        word += rng.choice((" ", " ", ", ", "\n", "", "\u200d", "\ufe0f", "\u0301"))
        out.append(word)
        n -= len(word.encode())
    return "".join(out)


def texts(megabytes, files):
    """(name, list of texts) of each kind; a list's texts are encoded each for itself."""
    rng, size, points = random.Random(7), megabytes * 1_000_000, assigned()
    blocks = lambda s: [s[i:i + BLOCK] for i in range(0, len(s), BLOCK)]
    yield "English", blocks(walk(["/usr/share/doc", "/usr/share/man"], (".txt", ".gz", ".md", "README", "copyright"), size))
    yield "code", blocks(walk(["/usr/lib/python3", "/usr/lib/python3.11", sys.prefix, "/usr/include"],
                              (".py", ".c", ".h", ".js"), size))
    chinese = walk(["/usr/share/man/zh_CN", "/usr/share/man/zh_TW", *(f for f in files if os.path.isdir(f))],
                   (".gz", ".txt"), size) + "".join(read(f) for f in files if os.path.isfile(f))
    lines = [line for line in chinese.split("\n") if line]
    while lines and len(chinese.encode()) < size:       # the same lines, in other orders and joined otherwise
        rng.shuffle(lines)
        chinese += rng.choice(("\n", "", " ", "\u3002")).join(lines)
    yield "Chinese", blocks(chinese)
    yield "scripts, emoji, digits", blocks(languages(size, rng))
    yield "assigned code points", blocks(assigned_text(points))
    yield "random strings", list(random_strings(100_000, rng, points))
    yield "runs", [c * n for c in "a \n1'\u4f60\u2581\t\u0301\U0001f680" for n in (1, 2, 3, 7, 100, 1000, 9999, 10_000)]


# ---- Tokenizers --------------------------------------------------------------------------------------------------

def glmtune_ids(path, blocks):
    """The ids of each text, by tests/compare_tokenizers.c in one process: lengths and texts in, counts and ids out."""
    data = b"".join(len(b).to_bytes(4, "little") + b for b in (t.encode() for t in blocks))
    out = subprocess.run([os.path.join(TOP, "build", "encode_all"), path], input=data, stdout=subprocess.PIPE, check=True)
    numbers = array.array("i")
    numbers.frombytes(out.stdout)
    ids, at = [], 0
    for _ in blocks:
        ids.append(numbers[at + 1:at + 1 + numbers[at]].tolist())
        at += 1 + numbers[at]
    return ids


def build_encoder():
    os.makedirs(os.path.join(TOP, "build"), exist_ok=True)
    subprocess.run(["cc", "-std=gnu11", "-O2", "-march=native", "-Wno-unused-function",
                    os.path.join(TOP, "tests", "encode_all.c"), "-o", os.path.join(TOP, "build", "encode_all"), "-lm"],
                   check=True)


def tiktoken_ranks(path):
    return {base64.b64decode(a): int(b) for a, b in (line.split() for line in open(path, "rb"))}


def alphabet():
    """Byte -> character, as byte-level BPE writes its texts."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in seen}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(seen))
    return table


def as_tokenizer_json(ranks, specials, ignore_merges, pairs=False, merges=None):
    """The tokenizer.json of a tiktoken vocabulary: every split of a piece into two pieces is a merge, in its rank's place."""
    letter = alphabet()
    written = lambda piece: "".join(letter[b] for b in piece)
    if merges is None:
        merges = []
        for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
            splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ranks and piece[i:] in ranks]
            merges += sorted(splits, key=lambda s: (ranks[s[0]], ranks[s[1]]))
    merges = [[written(a), written(b)] for a, b in merges]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for s, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                            "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
                  "vocab": {written(p): i for p, i in ranks.items()},
                  "merges": merges if pairs else [" ".join(m) for m in merges]}}


def shuffled_merges(ranks, rng):
    """Three quarters of all merges in any order, some of them twice: here a rank is the pair's alone, not its piece's."""
    merges = [(p[:i], p[i:]) for p in ranks for i in range(1, len(p)) if p[:i] in ranks and p[i:] in ranks]
    merges = [m for m in merges if rng.random() < 0.75 or len(m[0] + m[1]) == 2]
    merges += rng.sample(merges, len(merges) // 20)
    rng.shuffle(merges)
    return merges


def references(real, scratch):
    """(name, file for glmtune, function from text to ids) of each library."""
    import sentencepiece
    import tiktoken
    import tokenizers
    sp_path = os.path.join(real, "tokenizers/chatglm3-6b/tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(sp_path)
    yield "sentencepiece", sp_path, lambda text: sp.encode(text) if text else []
    path = os.path.join(real, "tokenizers/glm-4-9b-chat/tokenizer.model")
    ranks = tiktoken_ranks(path)
    encoding = tiktoken.Encoding("glm4", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    yield "tiktoken", path, encoding.encode_ordinary
    for ignore_merges in (True, False):
        model = as_tokenizer_json(ranks, {"<|user|>": 151336}, ignore_merges, pairs=ignore_merges)
        file = os.path.join(scratch, f"ignore_merges_{ignore_merges}.json")
        json.dump(model, open(file, "w"), ensure_ascii=ignore_merges)
        hf = tokenizers.Tokenizer.from_file(file)
        hf.encode_special_tokens = True         # text never becomes a special token here
        yield f"tokenizers, ignore_merges {ignore_merges}", file, lambda t, hf=hf: hf.encode(t, add_special_tokens=False).ids
    model = as_tokenizer_json(ranks, {"<|user|>": 151336}, False, merges=shuffled_merges(ranks, random.Random(3)))
    file = os.path.join(scratch, "shuffled.json")
    json.dump(model, open(file, "w"))
    hf = tokenizers.Tokenizer.from_file(file)
    hf.encode_special_tokens = True
    yield "tokenizers, shuffled merges", file, lambda t: hf.encode(t, add_special_tokens=False).ids


# ---- Golden vectors ----------------------------------------------------------------------------------------------

def write_golden(folder):
    """A small tokenizer.json, learned by `tokenizers` from our own corpus, and what it makes of texts."""
    import tokenizers
    corpus = os.path.join(TOP, "build", "make_corpus")
    os.makedirs(os.path.dirname(corpus), exist_ok=True)
    subprocess.run(["cc", "-O2", os.path.join(TOP, "tests", "make_corpus.c"), "-o", corpus], check=True)
    lines = subprocess.run([corpus, "base", "3000", "1"], stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()
    contents = [m["content"] for line in lines for m in json.loads(line)["messages"]]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    learner.train_from_iterator(contents, tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    byte = {c: b for b, c in alphabet().items()}
    ranks = {bytes(byte[c] for c in piece): i if i < 300 else i + 7        # seven ids that are nobody's
             for piece, i in sorted(learner.get_vocab().items(), key=lambda item: item[1])}
    specials = {"<|user|>": max(ranks.values()) + 3, "[gMASK]": max(ranks.values()) + 1, " the": ranks[b" the"]}
    rng = random.Random(5)
    model = as_tokenizer_json(ranks, specials, False, merges=shuffled_merges(ranks, rng))
    model["model"]["vocab"]["<|user|>"] = specials["<|user|>"]
    model["model"]["vocab"]["[\u4f60]"] = max(ranks.values()) + 2             # not in the alphabet of bytes
    text = json.dumps(model, ensure_ascii=False, indent=0).replace(",\n", ",").replace("\n", "")
    open(os.path.join(folder, "tokenizer.json"), "w").write(text + "\n")
    samples = ["", " ", "\0", "a\0b", "It'S we'LL 'ſ I'm", "12345 678\r\n\r\n  x", "<|user|>[gMASK]"]
    samples += rng.sample(contents, 60) + list(random_strings(50, rng, assigned())) + ["a" * 300, " " * 99, "ab" * 50]
    words = [p.decode() for p in ranks if len(p) > 2 and p.isascii()]
    samples += ["".join(rng.choices(words, k=rng.randrange(1, 5))) for _ in range(150)]
    samples = [s for s in samples if " the" not in s]               # Hugging Face's would split the text there
    vectors = [{"text": s} for s in samples]
    for key, whole in (("ids", False), ("whole", True)):
        model["model"]["ignore_merges"] = whole
        hf = tokenizers.Tokenizer.from_str(json.dumps(model))
        hf.encode_special_tokens = True
        for vector in vectors:
            vector[key] = hf.encode(vector["text"], add_special_tokens=False).ids
    lines = [json.dumps(v, separators=(",", ":")) for v in vectors]
    open(os.path.join(folder, "vectors.jsonl"), "w").write("\n".join(lines) + "\n")
    print(f"{len(vectors)} vectors, of which {sum(v['ids'] != v['whole'] for v in vectors)} depend on ignore_merges")


# ---- The comparison ----------------------------------------------------------------------------------------------

def compare(real, megabytes, files, only):
    bad = 0
    build_encoder()
    kinds = list(texts(megabytes, files))
    with tempfile.TemporaryDirectory() as scratch:
        for what, path, encode in references(real, scratch):
            if only not in what:
                continue
            for kind, blocks in kinds:
                # SentencePiece itself needs minutes for a long text without blanks
                if what == "sentencepiece":
                    blocks = [b for block in blocks for b in (block.splitlines(keepends=True) if len(block) > 20_000 else [block])]
                ours = glmtune_ids(path, blocks)
                different = [(t, o) for t, o in zip(blocks, ours) if encode(t) != o]
                size = sum(len(t.encode()) for t in blocks) / 1e6
                print(f"{what:32} {kind:24} {size:7.2f} MB  {len(different)} of {len(blocks)} texts differ", flush=True)
                bad += len(different)
                for text, got in different[:3]:
                    show_difference(text, got, encode(text))
    return bad


def show_difference(text, got, want):
    i = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
    print(f"    at id {i}: {got[max(0, i-3):i+6]}, want {want[max(0, i-3):i+6]}; text {text[:60]!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--only", default="", help="part of a library's name")
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_args()
    if arguments.golden:
        golden_folder = os.path.join(TOP, "tests", "golden", "tokenizer_json")
        os.makedirs(golden_folder, exist_ok=True)
        sys.exit(write_golden(golden_folder))
    if "GLM_REAL" not in os.environ:
        sys.exit("set GLM_REAL to the folder with tokenizers/")
    sys.exit(1 if compare(os.environ["GLM_REAL"], arguments.mb, arguments.files, arguments.only) else 0)
