"""What a conversation becomes, by GLM_SPEC sections 6 and 7 stated again in Python: the rows and labels of every chat
layout, with our loss mask and with the official scripts'.

    python tests/reference_labels.py                    writes tests/golden/labels.jsonl
    python tests/reference_labels.py DIR [PROGRAM]      compares PROGRAM (./glmtune) with the rules on 1,000 generated
                                                        conversations and as many in other data sets' forms, with the released tokenizers in DIR
                                                        (needs sentencepiece and tiktoken)

In folders of Hugging Face's own classes (joined) all between two role tokens is one text; in those with ChatGLM's own
code the line break ends a text of its own.

A row is a list of segments [text, kind, target]: kind 1 is a special token by its name, 0 a text that is encoded by
itself. All ids of a segment share one target flag. So the golden file holds no ids and fits any tokenizer.
"""
import ast
import base64
import json
import os
import random
import subprocess
import sys
import tempfile

ROLES = ["system", "user", "assistant", "observation"]
ABOUT = ("你是一个名为 ChatGLM 的人工智能助手。你是基于%s训练的语言模型 GLM-4 模型开发的，"
         "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n")
MAKERS = {"glm4-chat": "智谱AI", "z1": "智谱 AI 公司"}         # layouts whose tools begin with ABOUT
HEADING, CALLING = "# 可用工具", "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
GLM3_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"


def dump(value):
    return json.dumps(value, indent=4, ensure_ascii=False)


def functions(tools):
    text = HEADING
    for tool in tools:
        function = json.loads(json.dumps(tool["function"]))
        properties = function.get("parameters", {}).get("properties")
        if properties:
            function["parameters"]["properties"] = {k: v for k, v in properties.items() if v is not None}
        text += "\n\n## " + function["name"] + "\n\n" + dump(function) + CALLING
    return text


# ---- From the sample to messages ---------------------------------------------------------------------------------

def messages_of(sample):
    """Messages, their tools with the message that brings them."""
    if "prompt" in sample:
        pairs = sample.get("history", []) + [[sample["prompt"], sample["response"]]]
        return [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages = [dict(m) for m in sample.get("messages") or sample["conversations"]]
    if sample.get("tools"):
        carrier = next((m for m in messages if m["role"] == "system"), None)
        if carrier is None:
            carrier = {"role": "system", "content": ""}
            messages.insert(0, carrier)
            carrier["made"] = True
        carrier["tools"] = sample["tools"]
    return messages


def spread_tools(layout, messages):
    """Tools become text: after the system message's own (ChatGLM3), or as a system message before it."""
    out = []
    for m in messages:
        tools = m.get("tools")
        if tools and layout == "chatglm3":
            content = GLM3_SYSTEM if m.get("made") else m["content"]
            out.append({"role": "system", "content": content + "\n" + dump(tools)})
            continue
        if tools:
            out.append({"role": "system", "content": (ABOUT % MAKERS[layout] if layout in MAKERS else "") + functions(tools)})
        if not tools or m["content"]:
            out.append(m)
    return out


# ---- Rows --------------------------------------------------------------------------------------------------------

def learns(layout, message, official):
    if official:
        return message["role"] == "assistant" or (layout == "chatglm3" and message["role"] == "observation")
    return message["role"] == "assistant" and message.get("loss", True)


def row_of(layout, sample, official=False, combine=False, joined=False):
    """Segments, and how many of them stand before the last answer."""
    messages = spread_tools(layout, messages_of(sample))
    if joined and layout == "glm4-chat":        # its template passes over messages without text; an empty last answer is learned
        messages = [m for m in messages if m["content"] or (m is messages[-1] and m["role"] == "assistant")]
    if layout == "chatglm2":
        text = ""
        for i, m in enumerate(messages[:-1]):
            text += "[Round %d]\n\n问：%s\n\n答：" % (i // 2 + 1, m["content"]) if i % 2 == 0 else m["content"] + "\n\n"
        answer = messages[-1]
        target = int(learns(layout, answer, official))
        return [["[gMASK]", 1, 0], ["sop", 1, 0], [text, 0, 0], [answer["content"], 0, target], ["</s>", 1, target]], 3
    row = [] if layout == "edge" else [["[gMASK]", 1, 0], ["sop" if layout == "chatglm3" else "<sop>", 1, 0]]
    if layout in ("0414", "z1"):
        messages = ([m for m in messages if m["role"] == "system"] + [m for m in messages if m["role"] != "system"])
    before, prompt = False, 0       # before: the message before this one is learned, and so is the token that ends it
    for i, m in enumerate(messages):
        content, opening = m["content"], ""
        if layout == "z1" and m["role"] != "system" and (m["role"] != "assistant" or m is not messages[-1]):
            content = content.split("</think>")[-1].strip()
        elif layout == "z1" and m["role"] == "assistant" and content.startswith("<think>"):
            content, opening = content[len("<think>"):], "<think>"
        target = int(learns(layout, m, official))
        row.append(["<|%s|>" % m["role"], 1, int(before)])
        if m["role"] == "assistant":
            prompt = len(row) + bool(opening)
        texts = [(m.get("metadata") or "") + "\n" + opening, content]
        for text in texts if opening or not joined else ["".join(texts)]:
            row.append([text, 0, target])
        before = target
    row.append(["</s>" if layout == "chatglm3" else "<|user|>", 1, int(before)])
    if official and (layout == "edge" or (combine and layout in ("glm4-chat", "0414", "z1"))):
        last = max(i for i, s in enumerate(row) if s[:2] == ["<|assistant|>", 1])
        for i, segment in enumerate(row):
            segment[2] = int(i > last + 1)
        # the line break (or metadata) after the role token: its first id is no target, any further ones are
        row[last + 1][2] = 2
    return row, prompt


# ---- Conversations -----------------------------------------------------------------------------------------------

TEXTS = ["你好", "类型#裙*风格#简约", "这是一款简约的连衣裙。", "How warm is it in Beijing?", "21 degrees.",
         "def f(x):\n    return x\n",
         "don't STOP'LL", "  two  spaces ", "a\tb\r\nc", "🚀 １２３", "\n", "\n\n x", "", "<|user|> and <|assistant|>", "été é ﷺ",
         "{\"city\": \"北京\", \"n\": 1.50}", "问：谁？\n\n答：我", "[gMASK]<sop>", "Ω" * 30, "0123456789 3.14159",
         "\\ \" / \u0000 \u0007 \u007f", "\u3000 a \xa0\n", "\x1c\t b \u2028\x1f"]
CALLS = ["get_weather", "查询天气", "calc"]
SCHEMAS = [
    {"name": "get_weather", "description": "天气 \"now\"\n", "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "enum": ["北京", "Paris"]}, "unit": None, "days": {"type": "integer", "default": 3}},
        "required": ["city"]}},
    {"name": "计算", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}},
    {"name": "no_parameters", "strict": True, "limit": 1.5, "nothing": None, "list": [[], {}, [1, 2]]},
]


def tools_of(draw, layout):
    chosen = draw.sample(SCHEMAS, draw.randint(1, 3))
    return chosen if layout == "chatglm3" else [{"type": "function", "function": f} for f in chosen]


def conversation(draw, layout):
    text = lambda: draw.choice(TEXTS) if draw.random() < 0.7 else "".join(draw.choice(TEXTS) for _ in range(3))
    if layout == "chatglm2" or draw.random() < 0.1:
        pairs = [[text(), text()] for _ in range(draw.randint(0, 4))]
        if layout != "chatglm2" or draw.random() < 0.7:
            return {"prompt": text(), "response": text(), **({"history": pairs} if pairs else {})}
        pairs.append([text(), text()])
        return {"messages": [m for q, a in pairs for m in
                             ({"role": "user", "content": q}, {"role": "assistant", "content": a})]}
    messages, with_tools = [], layout != "edge" and draw.random() < 0.4
    sample = {draw.choice(["messages", "conversations"]): messages}
    if draw.random() < 0.5 or with_tools:
        messages.append({"role": "system", "content": text()})
    if with_tools:
        place = draw.choice(["sample", "message", "alone"])
        if place == "alone":
            messages.pop()
        (messages[0] if place == "message" else sample)["tools"] = tools_of(draw, layout)
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        if draw.random() < 0.3:
            messages.append({"role": "assistant", "metadata": draw.choice(CALLS), "content": "{\"x\": 1}"})
            messages.append({"role": "observation", "content": text()})
        answer = {"role": "assistant", "content": text()}
        if layout == "z1" and draw.random() < 0.7:
            answer["content"] = "<think>" + text() + "</think>" + text()
        if draw.random() < 0.2:
            answer["loss"] = draw.random() < 0.5
        if draw.random() < 0.2:
            answer["metadata"] = None
        messages.append(answer)
        if draw.random() < 0.1:
            messages.append({"role": "system", "content": text()})
    messages.append({"role": "user", "content": text()})
    messages.append({"role": "assistant", "content": text()})
    return sample


# ---- The same conversations as other data sets have them ---------------------------------------------------------

PARAMETERS = [{"city": "Ulm"}, {"city": "北京", "days": 3}, {"a": True, "b": None, "c": False, "d": 1.5, "e": -2},
              {"text": "it's \"so\"\n", "path": "C:\\x\t"}, {"q": "don't"}, {"list": [1, "二", {"k": None}], "o": {}}, {}]
OBSERVATIONS = ["12", {"温度": 21, "ok": True, "no": None}, [1.5, "a\"b"], None, ""]


def official_call(parameters):
    """The Python that ChatGLM3's older script (finetune_chatmodel_demo/preprocess_utils.py) writes for a tool turn."""
    keywords = [ast.keyword(arg=k, value=ast.Constant(v)) for k, v in parameters.items()]
    return "```python\n" + ast.unparse(ast.Call(func=ast.Name(id="tool_call"), args=[], keywords=keywords)) + "\n```"


def tool_turns(draw, sample, parameters=None):
    """Two samples: the plain one gets a call and its result, the other the tool turn that means the same."""
    plain, other = json.loads(json.dumps(sample)), json.loads(json.dumps(sample))
    name, result = draw.choice(CALLS), draw.choice(OBSERVATIONS)
    parameters = draw.choice(PARAMETERS) if parameters is None else parameters
    turn = {"role": "tool", "name": name, "parameters": parameters, "observation": result}
    if draw.random() < 0.4:
        turn["loss"] = draw.random() < 0.5
    messages = [plain.get("messages") or plain["conversations"], other.get("messages") or other["conversations"]]
    messages[0][-1:-1] = [
        {"role": "assistant", "metadata": name, "content": official_call(parameters), "loss": turn.get("loss", True)},
        {"role": "observation", "content": result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)}]
    messages[1].insert(-1, turn)
    return plain, other


def dressed(draw, sample):
    """The sample as Alpaca, ms-swift, ShareGPT or OpenAI would write it."""
    sample = json.loads(json.dumps(sample))
    if "prompt" in sample:
        question, answer = sample.pop("prompt"), sample.pop("response")
        if draw.random() < 0.3:
            return {**sample, "query": question, "response": answer}
        above, _, below = question.partition("\n")
        if above and below:
            return {**sample, "instruction": above, "input": below, "output": answer}
        return {**sample, **draw.choice([{"instruction": question}, {"instruction": question, "input": ""},
                                         {"instruction": "", "input": question}]), "output": answer}
    key = "messages" if "messages" in sample else "conversations"
    messages = sample[key]
    systems = [m for m in messages if m["role"] == "system"]
    if len(systems) == 1 and messages[0] is systems[0] and systems[0]["content"] and "tools" not in systems[0]:
        sample["system"] = messages.pop(0)["content"]
    for holder in [sample] + messages:
        if "tools" in holder:
            tools = holder.pop("tools")
            holder[draw.choice(["tools", "functions"])] = draw.choice([tools, json.dumps(tools, ensure_ascii=False)])
    names = {"user": "human", "assistant": "gpt", "observation": draw.choice(["tool", "observation"]), "system": "system"}
    shared = draw.random() < 0.5
    for m in messages:
        if "loss" in m:
            wanted = m.pop("loss")
            m.update(draw.choice([{"loss": wanted}, {"weight": int(wanted)}, {"train": wanted}]))
        if shared:
            m["from"], m["value"] = names[m.pop("role")], m.pop("content")
    if shared and key == "messages":
        sample["conversations"] = sample.pop("messages")
    return sample


def in_other_forms(draw, layout, sample):
    """A plain sample and one that shall be read as it is."""
    if layout == "chatglm3" and "prompt" not in sample and draw.random() < 0.5:
        return tool_turns(draw, sample)
    return sample, dressed(draw, sample)


# Layouts of folders of Hugging Face's own classes: joined
JOINED = ["glm4-chat", "0414", "z1", "edge"]
RULES = {"chatglm2": [(0, 0), (1, 0)], "chatglm3": [(0, 0), (1, 0)], "glm4-chat": [(0, 0), (1, 0), (1, 1)],
         "0414": [(0, 0)], "z1": [(0, 0)], "edge": [(0, 0), (1, 0)]}


def write_golden(path):
    draw = random.Random(20260)
    samples = [(layout, s, s) for layout in RULES for s in [conversation(draw, layout) for _ in range(14 if layout in ("z1", "glm4-chat") else 8)]]
    samples += [(layout, *in_other_forms(draw, layout, conversation(draw, layout)))
                for layout in ("chatglm2", "chatglm3", "glm4-chat") for _ in range(8)]
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    samples += [("chatglm3", *tool_turns(draw, talk, parameters)) for parameters in PARAMETERS]
    with open(path, "w", encoding="utf-8") as f:
        for joined in (False, True):
            for layout, sample, written in samples:
                if joined and (layout not in JOINED or written is not sample):
                    continue
                for official, combine in RULES[layout] if written is sample or layout == "chatglm3" else [(0, 0)]:
                    row, prompt = row_of(layout, sample, official, combine, joined)
                    f.write(json.dumps({"layout": layout, "official": bool(official), "combine": bool(combine),
                                        "joined": joined, "sample": written, "row": row, "prompt": prompt},
                                       ensure_ascii=False) + "\n")


# ---- Against the program, with the released tokenizers -----------------------------------------------------------

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def sentencepiece_encoder(path):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"] + ["<|%s|>" % r for r in ROLES]
    special = {"</s>": 2, **{n: model.get_piece_size() + i for i, n in enumerate(names)}}
    return model.encode, special


def tiktoken_encoder(path):
    import tiktoken
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in open(path) if line.strip()}
    model = tiktoken.Encoding("glm4", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    names = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"] + ["<|%s|>" % r for r in ROLES]
    return model.encode_ordinary, {n: len(ranks) + i for i, n in enumerate(names)}


def ids_of(row, encode, special):
    ids, labels = [], []
    for text, kind, target in row:
        these = [special[text]] if kind else encode(text)
        ids += these
        labels += [i if target and (target == 1 or k) else -100 for k, i in enumerate(these)]
    return ids, labels


def config(vocabulary, joined):
    if joined:
        return {"model_type": "glm", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 8,
                "num_key_value_heads": 1, "intermediate_size": 6, "max_position_embeddings": 64,
                "vocab_size": vocabulary}
    return {"model_type": "chatglm", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "kv_channels": 8,
            "multi_query_attention": True, "multi_query_group_num": 1, "ffn_hidden_size": 6, "seq_length": 64,
            "padded_vocab_size": vocabulary}


def compare(real, program, count=1000):
    kinds = {layout: "chatglm3-6b" if layout.startswith("chatglm") else "glm-4-9b-chat" for layout in RULES}
    encoders = {"chatglm3-6b": sentencepiece_encoder, "glm-4-9b-chat": tiktoken_encoder}
    loaded = {k: f(os.path.join(real, "tokenizers", k, "tokenizer.model")) for k, f in encoders.items()}
    wrong = 0
    for layout, joined in [(k, False) for k in RULES] + [(k, True) for k in JOINED]:
        rules = RULES[layout]
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(os.path.abspath(os.path.join(real, "tokenizers", kinds[layout], "tokenizer.model")),
                       os.path.join(folder, "tokenizer.model"))
            with open(os.path.join(folder, "config.json"), "w") as f:
                json.dump(config(65024 if kinds[layout] == "chatglm3-6b" else 151552, joined), f)
            draw = random.Random(layout)
            plain = [conversation(draw, layout) for _ in range(count)]
            other = [in_other_forms(draw, layout, s) for s in plain]
            samples, written = plain + [s for s, _ in other], plain + [s for _, s in other]
            data = os.path.join(folder, "data.jsonl")
            with open(data, "w", encoding="utf-8") as f:
                f.writelines(json.dumps(s, ensure_ascii=False) + "\n" for s in written)
            for official, combine in rules:
                expected = [ids_of(row_of(layout, s, official, combine, joined)[0], *loaded[kinds[layout]]) for s in samples]
                kept = [i for i, e in enumerate(expected) if any(x != -100 for x in e[1][1:])]
                with open(data, "w", encoding="utf-8") as f:
                    f.writelines(json.dumps(written[i], ensure_ascii=False) + "\n" for i in kept)
                said = subprocess.run([program, "check", data, folder, "--layout", layout, "--ids", "--official_mask",
                                       "true" if official else "false", "--combine", "true" if combine else "false",
                                       "--max_input_length", "100000"], capture_output=True, text=True)
                if said.returncode:
                    sys.exit(said.stderr)
                lines = said.stdout.splitlines()
                bad = [i for i, line in zip(kept, lines) if (lambda j: [j["input_ids"], j["labels"]])(json.loads(line))
                       != list(expected[i])]
                wrong += len(bad) + abs(len(lines) - len(kept))
                print("%-10s joined %d, official %d, combine %d: %d conversations, %d differ" %
                      (layout, joined, official, combine, len(lines), len(bad)))
                for i in bad[:1]:
                    print("  ", json.dumps(written[i], ensure_ascii=False))
    print("%d passed, %d failed" % (sum(len(RULES[k]) for k in list(RULES) + JOINED) * 2 * count - wrong, wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(compare(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "./glmtune"))
    write_golden(os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "labels.jsonl"))
