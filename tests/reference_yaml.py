"""Writes tests/golden/yaml/documents.txt: YAML documents and what PyYAML reads in them, for tests/test_yaml.c.

    VENV/bin/pip install pyyaml && VENV/bin/python tests/reference_yaml.py

The structure is PyYAML's. Types are those of YAML 1.2's core schema, which the official scripts read by (ruamel.yaml):
in PyYAML's own YAML 1.1, 5e-4 would be a string, `no` false and 010 eight. Each entry of the file is a line `= N M`, N
bytes of YAML, a line break, M bytes of what it holds in the form of test_data.c's render_json, a line break. The
documents hold what glmtune reads: those listed below and random ones from a fixed seed. What it refuses stands in
tests/test_yaml.c.
"""
import json
import random
import re
from pathlib import Path

import yaml

GOLDEN = Path(__file__).resolve().parent / "golden" / "yaml"
NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"


class Loader(yaml.SafeLoader):
    """PyYAML with the types of YAML 1.2."""
    yaml_implicit_resolvers = {}


for tag, form in ("null", r"~|null|Null|NULL|"), ("bool", r"true|True|TRUE|false|False|FALSE"), ("float", NUMBER):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{form})$"), None)
Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))

WRITTEN = [
    "a: 1", "a:\n  b: c\n", "a:\n- 1\n- 2\nb: 3\n", "a:\n  - 1\n  -   x y\n  - 'p'\n  -\nb: \n", "a:\n-\n- b\n",
    "a: [1, two, 'three', \"fo\\nur\"]\n", "a: []\nb: [ ]\nc: {}\nd: { } # none\n",
    "a: {b: 1, c: x, \"d\": 2, 'e': ~}\n", "a: [\n  1,\n  2,\n]\nb: {\n  c: 3,\n}\n",
    "a: [x,y,]\nb: [-1, -x, 'a, b']\n",
    "# first\n\na: 1 # after\n#b: 2\n   # indented\nc: '#' # '\nd: 3 #\n",
    "a: 'it is: # fine'\nb: \"q \\\" \\\\ \\u4f60\"\nc: 'two  words'\nd: it's\n",
    "---\na: 1\n", "--- # begins\na: 1\n", "# c\n---\n\n  a: 1\n  b: 2\n",
    "a:\nb: ~\nc: null\nd: 'null'\ne: \"\"\nf: ''\ng: # none\nh:   \n",
    "a: true\nb: True\nc: FALSE\nd: yes\ne: no\nf: off\ng: 'true'\nh: tRue\n",
    "a: 5e-5\nb: 5e-4\nc: 3.0e-4\nd: .5\ne: 5.\nf: +7\ng: -0\nh: 1_000\ni: 1:30\nj: 010\nk: 12e03\nm: 1E5\nl: 1.2.3\n",
    "a: http://x.y/z:8\nb: a:b\nc: -x\nd: --x\ne: x:-y\nf: a - b\ng: a # b\nh: e-5\ni: -\u4f60\nj: ...\n",
    "'quoted key': 1\n\"an\\tother\": 2\n12: 3\ntrue: 4\ntwo words: 5\n-x: 6\n",
    "\u952e: \u503c\n\"\u4f60\u597d\": [\u4e16, \u754c]\n", "a: 1\r\nb:\r\n  - c\r\n  - d # e\r\n\r\nf: 'g'\r\n",
    "a:   spaced   \nb :  before the colon\n", "a:\n\n\n  b: 1\n\n  c: 2\n\nd: 3\n\n",
    "a:\n    b:\n            c: 1\n    d: 2\n", "a: -1\n", "  a: 1\n  b: 2\n", "a: '|'\n", "a: 'x' # c\nb: [1] # d\n",
]
WORDS = ["a", "lr", "5e-4", "12", "-3.5", "true", "False", "no", "~", "null", "two words", "x:y", "q#r", "it's", "",
         "-dash", "\u4f60\u597d", "http://a.b", "1e5", "0x10", ": tricky", "# hash", "- item", "[x", "{y", "&z", "*w",
         "!v", "a: b", "end ", '"', "\\"]
PLAIN = re.compile(r"[\w.+~\u4e00-\u9fff](?:[\w .+'/~-]|:(?=\S))*(?<! )")


def scalar(rng, word):
    """The word as a scalar: plain where it can be, else in either kind of quotes."""
    if PLAIN.fullmatch(word) and rng.random() < 0.7:
        return word
    if "'" not in word and rng.random() < 0.5:
        return "'" + word + "'"
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def in_brackets(rng):
    gap = rng.choice(["", " ", "\n      "])
    items = [scalar(rng, rng.choice(WORDS)) for _ in range(rng.randrange(4))]
    if rng.random() < 0.7:
        return "[" + gap + ("," + gap).join(items) + gap + "]"
    return "{" + gap + (", " + gap).join(f"{scalar(rng, f'k{i}')}: {item}" for i, item in enumerate(items)) + gap + "}"


def noise(rng):
    return rng.choice([""] * 6 + ["\n", "# note: [\n", "    # 'x\n"])


def block(rng, indent, depth):
    """The lines of a mapping that begins in column `indent`."""
    out = ""
    for i in range(rng.randrange(1, 4)):
        out += noise(rng) + " " * indent + scalar(rng, f"key {i}") + ":"
        kind, after = rng.random(), rng.choice(["", " ", "  # note"]) + "\n"
        if kind < 0.1:
            out += "\n"
        elif kind < 0.4 or depth == 0:
            out += " " * rng.randrange(1, 4) + scalar(rng, rng.choice(WORDS)) + after
        elif kind < 0.6:
            out += " " + in_brackets(rng) + after
        elif kind < 0.75:
            pad = " " * (indent + rng.randrange(3)) + "-" + " " * rng.randrange(1, 3)
            out += after + "".join(noise(rng) + pad + scalar(rng, rng.choice(WORDS)) + "\n" for _ in range(3))
        else:
            out += after + block(rng, indent + rng.randrange(1, 5), depth - 1)
    return out


def render(value):
    """As render_json of test_data.c."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.17g}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{len(value)}|" + ",".join(map(render, value)) + "]"
    return f"{{{len(value)}|" + ",".join(f"{render(k)}:{render(v)}" for k, v in value.items()) + "}"


class Words(Loader):
    """Names are what is written, whatever type they would be as values."""
    def construct_mapping(self, node, deep=False):
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def read(document):
    return yaml.load(document, Words)


def main():
    rng = random.Random(6)
    documents = list(WRITTEN)
    while len(documents) < len(WRITTEN) + 200:
        document = block(rng, 0, 3)
        if rng.random() < 0.2:
            document = document.replace("\n", "\r\n")
        if len(document) > 900:
            continue
        documents.append(document)
    GOLDEN.mkdir(exist_ok=True)
    with open(GOLDEN / "documents.txt", "wb") as f:
        for document in documents:
            source, held = document.encode(), render(read(document)).encode()
            f.write(b"= %d %d\n%s\n%s\n" % (len(source), len(held), source, held))
    print(f"{len(documents)} documents, {(GOLDEN / 'documents.txt').stat().st_size} bytes")


if __name__ == "__main__":
    main()
