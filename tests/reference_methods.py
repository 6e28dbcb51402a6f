"""Golden numbers of the tuning methods beside LoRA (see reference.py, whose generator, names and files these are).

    python tests/reference_methods.py                   writes tests/golden/prefix_*, adapter_*, saved_prefix,
                                                        saved_ia3*
    python tests/reference_methods.py --check PROGRAM [METHOD...]
                                                        tunes a few steps with glmtune, loads what it saved in PEFT and
                                                        compares logits and loss with `glmtune dump`

A prefix in PEFT's convention: `hf.*` is PEFT's PREFIX_TUNING in float32. In ChatGLM's convention (positions of the text
from 0): `hf.*` is transformers with the prefix as cache and explicit positions. Adapters have no reference program that
runs on a GLM: `hf.*` is the plain model in float32. `f64.*` is always the plain model in float64.
"""
import copy
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import reference as ref
import torch
from peft import IA3Config, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, DynamicCache

TOKENS = 5                              # of each prefix
PEFT = ["prompt_encoder.embedding.weight", "prompt_encoder.transform.0.weight", "prompt_encoder.transform.0.bias",
        "prompt_encoder.transform.2.weight", "prompt_encoder.transform.2.bias"]
CHATGLM = [name.replace("prompt_encoder", "transformer.prefix_encoder").replace("transform.", "trans.", 1)
           if "prompt_encoder.transform" in name else name.replace("prompt_encoder", "transformer.prefix_encoder")
           for name in PEFT]

# case: base, method, variant ("" or a projection's hidden width; an adapter's bottleneck), rows
CASES = {
    "prefix_peft": ("glm_edge", "peft", 0, (7, 1, 12)),
    "prefix_peft_projected": ("glm4", "peft", 6, (5, 9, 2)),
    "prefix_chatglm": ("chatglm", "chatglm", 0, (6, 1, 9)),
    "prefix_chatglm_projected": ("glm_bias", "chatglm", 7, (8, 3)),
    "adapter_houlsby": ("glm_bias", "houlsby", 4, (6, 1, 9)),
    "adapter_houlsby4": ("glm4", "houlsby", 4, (7, 3)),
    "adapter_pfeiffer": ("glm_edge", "pfeiffer", 5, (8, 2)),
    "adapter_pfeiffer4": ("glm4", "pfeiffer", 4, (5, 6, 1)),
}

MLP_LAST = ("down_proj", "dense_4h_to_h")
CHECKED = (["lora", "--target_modules", "q_proj,gate_up_proj"], ["ptuning"],
           ["ptuning", "--prefix_projection", "true", "--encoder_hidden_size", "6"])


def trained_shapes(case, method, width):
    """{name: shape} of what a method adds."""
    c = case.config
    kv = c.num_key_value_heads * c.head_dim
    full = 2 * c.num_hidden_layers * kv
    if method in ("peft", "chatglm"):
        names, table = (PEFT, kv) if method == "peft" else (CHATGLM, full)
        if not width:
            return {"prompt_embeddings" if method == "peft" else names[0]: (TOKENS, full)}
        return dict(zip(names, [(TOKENS, table), (width, table), (width,), (full, width), (full,)]))
    shapes, hidden = {}, c.hidden_size
    for layer in range(c.num_hidden_layers):
        for place in ("attention", "output") if method == "houlsby" else ("output",):
            at = f"model.layers.{layer}.{place}_adapters.adapters.glmtune.adapter_"
            shapes |= {at + "down.0.weight": (width, hidden), at + "down.0.bias": (width,),
                       at + "up.weight": (hidden, width), at + "up.bias": (hidden,)}
    return shapes


def prefix_of(config, p):
    """The prefix [2 layers, tokens, kv heads, d] from its tensors, in either convention."""
    for names in (PEFT, CHATGLM):
        if names[1] in p:
            table, w1, b1, w2, b2 = (p[name] for name in names)
            u = torch.tanh(table @ w1.T + b1) @ w2.T + b2
            break
    else:
        u = p[next(name for name in (CHATGLM[0], "prompt_embeddings") if name in p)]
    return u.view(TOKENS, 2 * config.num_hidden_layers, config.num_key_value_heads, config.head_dim).transpose(0, 1)


class Plain(ref.PlainModel):
    """The plain model with a prefix or adapters."""

    def __init__(self, case, frozen, method):
        super().__init__(case, frozen)
        self.method = method

    def linear(self, p, name, x):
        l = p.get(f"base_model.model.{name}.ia3_l")
        if l is None:
            return super().linear(p, name, x)
        return super().linear(p, name, x * l) if l.shape[0] == 1 else super().linear(p, name, x) * l[:, 0]

    def attention(self, p, name, x, angles):
        if self.method not in ("peft", "chatglm"):
            return super().attention(p, name, x, angles)
        c, tokens, layer = self.config, len(x), int(name.split(".")[2])
        q, k, v = (self.linear(p, f"{name}.{part}_proj", x).view(tokens, -1, c.head_dim).transpose(0, 1)
                   for part in "qkv")
        first = TOKENS if self.method == "peft" else 0
        cos, sin = ref.rotary_angles(c, first + tokens, x.dtype)
        q, k = (ref.rotate(t, cos[first:], sin[first:]) for t in (q, k))
        prefix = prefix_of(c, p).transpose(1, 2)                    # [2 layers, kv heads, tokens, d]
        group = c.num_attention_heads // c.num_key_value_heads
        k = torch.cat((prefix[2 * layer], k), 1).repeat_interleave(group, 0)
        v = torch.cat((prefix[2 * layer + 1], v), 1).repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(c.head_dim)
        future = torch.ones(tokens, TOKENS + tokens, dtype=torch.bool).triu(TOKENS + 1)
        context = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.linear(p, name + ".o_proj", context.transpose(0, 1).reshape(tokens, -1))

    def behind(self, p, layer, place, x, s):
        """x + s and what the adapter behind it adds."""
        at = f"model.layers.{layer}.{place}_adapters.adapters.glmtune.adapter_"
        if at + "up.weight" not in p:
            return x + s
        z = s if self.method == "houlsby" else x + s
        a = z @ p[at + "down.0.weight"].T + p[at + "down.0.bias"]
        a = a * torch.sigmoid(a) if self.method == "houlsby" else a.relu()
        return x + s + a @ p[at + "up.weight"].T + p[at + "up.bias"]

    def logits(self, p, ids):
        c, sandwich = self.config, self.config.model_type == "glm4"
        norm = lambda name, x: ref.rms_norm(x, p[name + ".weight"], c.rms_norm_eps)
        x = p["model.embed_tokens.weight"][ids]
        angles = ref.rotary_angles(c, len(ids), x.dtype)
        for layer in range(c.num_hidden_layers):
            at = f"model.layers.{layer}."
            y = self.attention(p, at + "self_attn", norm(at + "input_layernorm", x), angles)
            x = self.behind(p, layer, "attention", x, norm(at + "post_self_attn_layernorm", y) if sandwich else y)
            y = self.mlp(p, at + "mlp", norm(at + "post_attention_layernorm", x))
            x = self.behind(p, layer, "output", x, norm(at + "post_mlp_layernorm", y) if sandwich else y)
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        return norm("model.norm", x) @ p[head].T


class Released:
    """The same by PEFT, or by transformers with the prefix as cache."""

    def __init__(self, case, frozen, method, width):
        self.case, self.method = case, method
        self.model = ref.new_hf_model(case)
        self.model.load_state_dict(ref.to_hf(case, frozen), strict=not case.config.tie_word_embeddings)
        if method == "peft":
            config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS,
                                        prefix_projection=bool(width), encoder_hidden_size=width or None)
            self.model = get_peft_model(self.model, config)
        self.model.requires_grad_(False).eval()

    def forward(self, trained, ids, labels, targets):
        inputs = {"input_ids": ids[None], "labels": labels[None], "num_items_in_batch": targets}
        if self.method == "peft":
            rename = lambda n: n.replace("prompt_encoder.", "prompt_encoder.default.").replace(
                "prompt_embeddings", "prompt_encoder.default.embedding.weight")
            output = functional_call(self.model, {rename(k): v for k, v in trained.items()}, kwargs=inputs)
            return output.logits[0], output.loss
        cache = DynamicCache()
        prefix = prefix_of(self.case.config, trained).transpose(1, 2)[:, None]
        for layer in range(self.case.config.num_hidden_layers):
            cache.update(prefix[2 * layer], prefix[2 * layer + 1], layer)
        output = self.model(**inputs, past_key_values=cache, position_ids=torch.arange(len(ids))[None])
        return output.logits[0], output.loss


class Tuned:
    """A PEFT model that holds what trains."""

    def __init__(self, model):
        self.model = model.eval()

    def forward(self, trained, ids, labels, targets):
        output = self.model(input_ids=ids[None], labels=labels[None], num_items_in_batch=targets)
        return output.logits[0], output.loss


def evaluate(case, rows, method, width, dtype, plain):
    """Logits, loss and gradients."""
    frozen = ref.draw_all(case.seed, ref.base_shapes(case), dtype)
    trained = ref.draw_all(case.seed, trained_shapes(case, method, width), dtype)
    for tensor in trained.values():
        tensor.requires_grad_(True)
    model = Plain(case, frozen, method) if plain else Released(case, frozen, method, width)
    logits, loss = ref.run_rows(model, trained, rows, ref.count_targets(rows))
    result = {"logits": logits, "loss": torch.tensor([loss], dtype=torch.float64)}
    return result | {"grad." + name: tensor.grad for name, tensor in trained.items()}


def write_case(name, case, method, width, lengths):
    folder = ref.clean(ref.GOLDEN / name)
    ref.write_configs(case, folder)
    rows = ref.make_rows(case.seed, name, lengths, case.config.vocab_size)
    adapters = method in ("houlsby", "pfeiffer")
    single = evaluate(case, rows, method, width, torch.float32, plain=adapters)
    truth = evaluate(case, rows, method, width, torch.float64, plain=True)
    ref.write_golden(folder, ref.seed_tensor(case.seed) | ref.packed(rows) | ref.with_prefix("hf", single)
                     | ref.with_prefix("f64", truth))
    return ref.compare(name, single, truth)


def write_saved_prefix():
    """saved_prefix/: a prefix that PEFT saved, on saved_hf, with what PEFT computes with it."""
    case = ref.saved_case()
    base = AutoModelForCausalLM.from_pretrained(ref.GOLDEN / "saved_hf", dtype=torch.float32)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    with torch.no_grad():
        weight = model.prompt_encoder.default.embedding.weight
        weight.copy_(ref.draw(case.seed, "prompt_embeddings", tuple(weight.shape)))
    folder = ref.clean(ref.GOLDEN / "saved_prefix")
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    ref.write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": "../saved_hf"})
    rows = ref.make_rows(case.seed, "saved_prefix", (5, 8), case.config.vocab_size)
    frozen, trained = ref.read_weights(ref.GOLDEN / "saved_hf"), ref.read_weights(folder)
    results, again = [], PeftModel.from_pretrained(copy.deepcopy(base.eval()), folder).eval()
    for plain in (False, True):
        pairs = []
        for ids, labels in rows:
            if plain:
                pairs.append(Plain(case, frozen, "peft").forward(trained, ids, labels, ref.count_targets(rows)))
            else:
                with torch.no_grad():
                    out = again(input_ids=ids[None], labels=labels[None], num_items_in_batch=ref.count_targets(rows))
                pairs.append((out.logits[0], out.loss))
        loss = torch.tensor([sum(float(loss) for _, loss in pairs)], dtype=torch.float64)
        results.append({"logits": torch.cat([logits.detach() for logits, _ in pairs]), "loss": loss})
    ref.write_golden(folder, ref.packed(rows) | ref.with_prefix("hf", results[0]) | ref.with_prefix("f64", results[1]))
    return ref.compare("saved_prefix", *results)


def fuse(tensors):
    """IA3's vectors under the names of ChatGLM's layout: one for query, key and value."""
    fused = {}
    for name, l in tensors.items():
        name = name.replace("model.model.layers", "model.transformer.encoder.layers")
        name = name.replace("self_attn", "self_attention").replace("down_proj", "dense_4h_to_h")
        name = re.sub("[qkv]_proj", "query_key_value", name)
        fused[name] = torch.cat((fused[name], l)) if name in fused else l
    return fused


def write_saved_ia3(folder, targets, rename, base_name):
    """IA3, the example of README: vectors on saved_hf, saved as PEFT saves them, with what PEFT computes with them."""
    case, folder = ref.saved_case(), ref.clean(ref.GOLDEN / folder)
    base = AutoModelForCausalLM.from_pretrained(ref.GOLDEN / "saved_hf", dtype=torch.float32)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=targets[-1:])
    model = get_peft_model(base, config)
    vectors = {name.removesuffix(".default"): l for name, l in model.named_parameters() if ".ia3_l" in name}
    with torch.no_grad():
        for name, l in vectors.items():
            l.copy_(1 + ref.draw(case.seed, name, tuple(l.shape)))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    truth = {name: l.detach().double().requires_grad_(True) for name, l in vectors.items()}
    ref.save_file(rename({name: l.detach() for name, l in vectors.items()}),
                  folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "../" + base_name}
    modules = list(dict.fromkeys(name.split(".")[-2] for name in rename(vectors)))
    ref.write_json(folder / "adapter_config.json", config | {
        "target_modules": modules, "feedforward_modules": [name for name in modules if name in MLP_LAST]})
    rows = ref.make_rows(case.seed, folder.name, (5, 8), case.config.vocab_size)
    samples = [json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n" for ids, labels in rows]
    (folder / "batch.jsonl").write_text("".join(samples))
    plain, results = Plain(case, ref.read_weights(ref.GOLDEN / "saved_hf"), "ia3"), []
    for run, tensors in ((Tuned(model), vectors), (plain, truth)):
        logits, loss = ref.run_rows(run, tensors, rows, ref.count_targets(rows))
        results.append({"logits": logits, "loss": torch.tensor([loss], dtype=torch.float64)}
                       | {"grad." + name: g for name, g in rename({n: l.grad for n, l in tensors.items()}).items()})
    ref.write_golden(folder, ref.with_prefix("hf", results[0]) | ref.with_prefix("f64", results[1]))
    return ref.compare(folder.name, *results)


def check(program, methods):
    """What glmtune saves loads in PEFT and gives glmtune's logits."""
    base, failed = ref.GOLDEN / "saved_hf", False
    for words in methods or CHECKED:
        with tempfile.TemporaryDirectory() as work:
            data, out = Path(work) / "data.jsonl", Path(work) / "out"
            ids = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]]
            data.write_text("".join(json.dumps({"input_ids": i, "labels": i}) + "\n" for i in ids))
            run = [program, "train", data, base, "--output_dir", out, "--max_steps", "4", "--val_size", "0", "--method"]
            extra = ["--num_virtual_tokens", str(TOKENS)] if words[0] == "ptuning" else []
            subprocess.run([*map(str, run), *words, *extra], check=True, capture_output=True)
            adapter, dumped = out / "checkpoint-4", Path(work) / "dump.safetensors"
            subprocess.run([program, "dump", adapter, data, dumped], check=True, capture_output=True)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
            model = PeftModel.from_pretrained(model, adapter).eval()
            with torch.no_grad():
                logits = torch.cat([model(input_ids=torch.tensor([i])).logits[0] for i in ids])
            error = float((load_file(dumped)["logits"] - logits).abs().max() / logits.abs().max())
            failed |= not error <= 5e-6
            print(f"{' '.join(words):<60}{error:10.2e}")
    raise SystemExit(int(failed))


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    ref.transformers.logging.set_verbosity_error()
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2], [[word] for word in sys.argv[3:]])
    models = ref.model_cases()
    for name, (base, method, width, lengths) in CASES.items():
        print(write_case(name, models[base], method, width, lengths))
    print(write_saved_prefix())
    print(write_saved_ia3("saved_ia3", ["k_proj", "v_proj", "down_proj"], dict, "saved_hf"))
    print(write_saved_ia3("saved_ia3_fused", ["q_proj", "k_proj", "v_proj", "down_proj"], fuse, "saved_remote"))
    ref.golden_files()


if __name__ == "__main__":
    main()
