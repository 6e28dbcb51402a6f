"""Writes the Unicode classes that pre-tokenization needs as run lengths, a C fragment on stdout.

    python3 tests/make_unicode.py > unicode_table.h

letter_runs, number_runs, space_runs: what \\p{L}, \\p{N}, \\s mean in tiktoken of tests/requirements.txt, which is asked for
every code point: it gives no token for a text that its pattern passes over. The numbers are alternately how many code
points lie outside, inside, outside, ... the class, from U+0000 on; the last one is a run inside.
"""
import sys

import tiktoken

COLUMNS = 120
BYTES = {bytes([i]): i for i in range(256)}


def members(pattern):
    found = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=BYTES, special_tokens={})
    return [not 0xD800 <= code < 0xE000 and bool(found.encode(chr(code))) for code in range(sys.maxunicode + 1)]


classes = {name: members(pattern).__getitem__ for name, pattern in
           {"letter_runs": r"\p{L}", "number_runs": r"\p{N}", "space_runs": r"\s"}.items()}


def encode(belongs):
    runs, inside = [0], False
    for code in range(sys.maxunicode + 1):
        if belongs(code) != inside:
            inside = not inside
            runs.append(0)
        runs[-1] += 1
    return runs if inside else runs[:-1]        # the tail outside the class needs no number


def check(runs, belongs):
    code, inside = 0, False
    for run in runs:
        assert run > 0 or code == 0, "an empty run"
        assert all(belongs(c) == inside for c in range(code, code + run)), f"wrong near U+{code:04X}"
        code, inside = code + run, not inside
    assert inside is False and not any(belongs(c) for c in range(code, sys.maxunicode + 1)), "the tail is wrong"


def lines(runs):
    line = "   "
    for i, run in enumerate(runs):
        item = f"{run}," if i + 1 < len(runs) else f"{run}"
        if len(line) + len(item) > COLUMNS:
            yield line
            line = "   "
        line += " " + item if line == "   " else item
    yield line


print(f"// As tiktoken {tiktoken.__version__} has them: run lengths outside, inside, outside, ... each class, from U+0000 on")
for name, belongs in classes.items():
    runs = encode(belongs)
    check(runs, belongs)
    print(f"static const uint32_t {name}[] = {{", *lines(runs), "};", sep="\n")
