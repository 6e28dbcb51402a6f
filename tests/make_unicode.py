"""Writes the Unicode classes that pre-tokenization needs as run lengths, a C fragment on stdout.

    python3 tests/make_unicode.py > unicode_table.h

letter_runs, number_runs, space_runs: what \\p{L}, \\p{N}, \\s mean in Rust's regex (general categories L* and N*, the
property White_Space). The numbers are alternately how many code points lie outside, inside, outside, ... the class,
from U+0000 on; the last one is a run inside. Uses the package unicodedata2 where it is newer than Python's own tables.
"""
import sys
import unicodedata

try:
    import unicodedata2
except ImportError:
    unicodedata2 = unicodedata

COLUMNS = 120


def version(tables):
    return tuple(int(part) for part in tables.unidata_version.split("."))


newest = max(unicodedata2, unicodedata, key=version)
category = [newest.category(chr(code)) for code in range(sys.maxunicode + 1)]


def is_space(code):
    # White_Space has no category of its own: the separators (Z*) and six controls, tab to carriage return and NEL
    return category[code][0] == "Z" or 0x09 <= code <= 0x0D or code == 0x85


classes = {
    "letter_runs": lambda code: category[code][0] == "L",
    "number_runs": lambda code: category[code][0] == "N",
    "space_runs": is_space,
}


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


print(f"// Unicode {newest.unidata_version}: run lengths outside, inside, outside, ... each class, from U+0000 on")
for name, belongs in classes.items():
    runs = encode(belongs)
    check(runs, belongs)
    print(f"static const uint32_t {name}[] = {{", *lines(runs), "};", sep="\n")
