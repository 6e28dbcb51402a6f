"""Compares the program's ids and labels with the chat templates of Hugging Face's folders, as transformers renders them.

    python tests/reference_templates.py DIR [PROGRAM [N]]     N random conversations for each layout, 1,000 unless named

DIR holds templates/{glm4-chat,z1,edge}.jinja and tokenizers/glm-4-9b-chat/tokenizer.model; the tokenizer.json is made of
the latter as transformers' converter makes it. Texts are full of white space of every kind. Labels are judged by the
rule of the loss mask, stated again: all that follows an assistant's role token up to the next special token, and that
one. What was not found as a template is restated from the nearest: 0414 is z1's without thoughts, and edge's end is
that of the others. Of z1 the prompt is compared, that is all but the last answer, which keeps its thoughts.
"""
import json
import os
import random
import subprocess
import sys
import tempfile

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
           "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
           r"\s*[\r\n]+|\s+(?!\S)|\s+")
CONFIG = {"vocab_size": 151552, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
          "num_key_value_heads": 1, "intermediate_size": 6, "max_position_embeddings": 64}
BLANKS = [" ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u1680",
          "\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\u180e"]
WORDS = ["hello", "don't", "你好", "世界。", "x = 1", "12345", "３", "!?", "...", "é", "\u0301", "🚀", "</think>", "<think>", "{}",
         "<b>", "'s", "ſ", "¼", "# 1\n- 2", "\\n"]


def text(draw, empty):
    parts = [draw.choice(BLANKS if draw.random() < 0.6 else WORDS) for _ in range(draw.randint(0 if empty else 1, 7))]
    return "".join(parts)


def conversation(draw, layout):
    messages = [{"role": "system", "content": text(draw, True)}] if draw.random() < 0.4 else []
    for turn in range(draw.randint(1, 4)):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": text(draw, True)})
        if layout in ("z1", "0414") and draw.random() < 0.1:
            messages.append({"role": "system", "content": text(draw, True)})
            messages.append({"role": "user", "content": text(draw, True)})
            messages.append({"role": "assistant", "content": text(draw, True)})
    messages[-1]["content"] = "a" + text(draw, True) if layout != "z1" else text(draw, True) + "a"
    return messages


def expected(tokenizer, layout, messages, end):
    """The ids that the template gives, with the end of the row; z1: up to the last answer's role token."""
    if layout == "z1":
        return tokenizer.apply_chat_template(messages[:-1], return_dict=False) + [tokenizer.vocab["<|assistant|>"]]
    return tokenizer.apply_chat_template(messages, return_dict=False) + [end]


def mask(ids, special, assistant):
    labels, teaches = [], False
    for i in ids:
        labels.append(i if teaches else -100)
        teaches = i == assistant or (teaches and i not in special)
    return labels


def main(real, program, count):
    vocabulary = os.path.join(real, "tokenizers", "glm-4-9b-chat", "tokenizer.model")
    names = TikTokenConverter.__init__.__code__.co_varnames
    key = "extra_special_tokens" if "extra_special_tokens" in names else "additional_special_tokens"
    converted = TikTokenConverter(vocabulary, pattern=PATTERN, **{key: SPECIAL}).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted)
    special = {tokenizer.vocab[name] for name in SPECIAL}
    assistant, end = tokenizer.vocab["<|assistant|>"], tokenizer.vocab["<|user|>"]
    templates = {k: open(os.path.join(real, "templates", k + ".jinja"), encoding="utf-8").read()
                 for k in ("glm4-chat", "z1", "edge")}
    templates["0414"] = templates["z1"].replace("content.split('</think>')[-1].strip()", "content")
    wrong = 0
    for layout, model_type in (("glm4-chat", "glm"), ("z1", "glm4"), ("edge", "glm"), ("0414", "glm4")):
        tokenizer.chat_template = templates[layout]
        draw = random.Random(layout)
        talks = [conversation(draw, layout) for _ in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            with open(os.path.join(folder, "config.json"), "w") as f:
                json.dump({"model_type": model_type, **CONFIG}, f)
            data = os.path.join(folder, "data.jsonl")
            with open(data, "w") as f:
                f.writelines(json.dumps({"messages": m}) + "\n" for m in talks)
            said = subprocess.run([program, "check", data, folder, "--layout", layout, "--ids"], capture_output=True,
                                  text=True)
        if said.returncode:
            sys.exit(said.stderr)
        rows = [json.loads(line) for line in said.stdout.splitlines()]
        of_ids = of_labels = abs(len(rows) - count)
        for messages, row in zip(talks, rows):
            want, got = expected(tokenizer, layout, messages, end), row["input_ids"]
            differs = got[:len(want)] != want if layout == "z1" else got != want
            of_ids += differs
            of_labels += row["labels"] != mask(got, special, assistant)
            if differs and of_ids == 1:
                print(json.dumps(messages), "\n  program  ", got, "\n  template ", want)
        print("%-10s %d conversations: ids of %d differ from the template, labels of %d from the mask" %
              (layout, len(rows), of_ids, of_labels))
        wrong += of_ids + of_labels
    print("%d passed, %d failed" % (8 * count - wrong, wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "./glmtune",
                  int(sys.argv[3]) if len(sys.argv) > 3 else 1000))
