"""Writes the golden numbers in tests/golden/: logits, losses, gradients and training runs of small GLM models.

Every number is computed twice: by Hugging Face transformers (and PEFT) in float32, stored as `hf.*`, and by the plain
float64 model below, stored as `f64.*`, which rounds nothing on the way. The table printed at the end says how far
apart the two are. Weights are not stored: they come from a counter-based generator that the C tests have as well.

    python -m venv VENV && VENV/bin/pip install -r tests/requirements.txt && VENV/bin/python tests/reference.py

A second run on the same machine gives the same bytes; another processor may change last bits of `hf.*`.

Each case is a folder with config.json, adapter_config.json if it has LoRA, and golden.safetensors:
    seed [1]                        of all weights, those of the LoRA tensors too
    ids, labels [T], starts [B+1]   rows one after another; row b is starts[b] .. starts[b+1]-1
    hf.logits, f64.logits [T,V]     hf.loss, f64.loss [1]     hf.grad.NAME, f64.grad.NAME   NAME as in the model's file
Labels are aligned as Hugging Face aligns them: label i is compared with the logits at i-1 of the same row, and -100 is
no target. The loss is the sum of -log p over all targets / their number. Training cases hold instead of ids and logits
    sample_ids, sample_labels, sample_starts, order [steps, micro-batches, batch]   which samples a micro-batch takes
    hyper [7]                       lr, warmup_steps, weight_decay, beta1, beta2, eps, max_grad_norm
    linear [1], learning_rates      the schedule: 1 linear, 0 cosine
    optimizer [1]                   where it is not AdamW: 1 SGD (its momentum stands as beta1), 2 Lion
    losses, grad_norms [steps]      before clipping; and final.NAME, the last value of two tensors (hf. and f64. each)

Sections: 1 generator, 2 configs and cases, 3 names, 4 the plain model, 5 Hugging Face, 6 model and LoRA cases,
7 training, 8 saved folders, 9 main.
"""
import copy
import json
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Glm4Config, GlmConfig

GOLDEN = Path(__file__).resolve().parent / "golden"
SIZE_LIMIT = 8_000_000          # bytes in tests/golden/
IGNORE = -100                   # the label of a token that is no target

# ---- 1. Generator ------------------------------------------------------------------------------
# Random numbers are a function of (seed, tensor name, index), in 64-bit arithmetic that wraps around.

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix64(x):
    """Scrambles 64-bit numbers (array or scalar); the finalizer of SplitMix64."""
    x = np.asarray(x, np.uint64).copy()
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fnv1a64(text):
    """The 64-bit FNV-1a hash of a string."""
    value = 14695981039346656037
    for byte in text.encode():
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def rng_key(key, value):
    """A new key from a key and a number."""
    return mix64(np.asarray([key], np.uint64) ^ mix64(np.asarray([value], np.uint64) + GAMMA))


def random_bits(seed, name, count):
    """`count` 64-bit numbers for the tensor `name`."""
    return mix64(rng_key(seed, fnv1a64(name)) + GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def random_units(seed, name, count):
    """`count` numbers in [-1, 1), multiples of 2^-23, exact in float32."""
    return ((random_bits(seed, name, count) >> np.uint64(40)).astype(np.int64) - 2**23) * 2.0**-23


def draw(seed, name, shape):
    """The float32 weights of tensor `name`: 1/4 of the unit numbers, around 1 for norms and 0 for all others."""
    center = 1.0 if "norm" in name else 0.0
    weights = center + 0.25 * random_units(seed, name, math.prod(shape))
    return torch.from_numpy(weights.astype(np.float32)).reshape(shape)


def draw_all(seed, shapes, dtype):
    """Weights for a table {name: shape}, as tensors of `dtype`."""
    return {name: draw(seed, name, shape).to(dtype) for name, shape in shapes.items()}


# ---- 2. Configs and cases ----------------------------------------------------------------------


@dataclass
class Case:
    """A model, its seed and the rows of its batch. `config` is Hugging Face's; `json` is config.json where it is not
    the one that the installed transformers writes."""
    name: str
    seed: int
    config: object
    rows: tuple                     # tokens in each row
    silent: tuple = ()              # rows without any target
    json: dict | None = None
    remote: bool = False            # weights under the names of the remote ("chatglm") layout
    lora: LoraConfig | None = None
    lora_targets: tuple = ()        # target_modules as written in adapter_config.json

    @property
    def scale(self):
        """The factor of the LoRA branch."""
        if self.lora is None:
            return 0.0
        return self.lora.lora_alpha / (math.sqrt(self.lora.r) if self.lora.use_rslora else self.lora.r)


def new_config(config_class, sizes, theta, rotary, bias, eps, tied=False):
    """A config in today's form: theta and rotary share inside `rope_parameters`. sizes = L, H, heads, kv, d, F, V.
    pad_token_id stays empty: its embedding row would get no gradient from Hugging Face."""
    layers, hidden, heads, kv, head_dim, ffn, vocab = sizes
    config = config_class(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=head_dim, intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=512, rms_norm_eps=eps,
        attention_bias=bias, tie_word_embeddings=tied, pad_token_id=None, eos_token_id=[1, 2, 3],
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary})
    config.architectures = [config_class.__name__.replace("Config", "ForCausalLM")]
    return config


def old_json(model_type, sizes, theta, rotary, bias, eps, tied=False):
    """config.json as transformers 4 wrote it: `rope_theta` at the top level, `partial_rotary_factor` beside it or left
    out (which means 0.5)."""
    layers, hidden, heads, kv, head_dim, ffn, vocab = sizes
    config = {
        "architectures": [model_type.capitalize() + "ForCausalLM"], "attention_bias": bias, "attention_dropout": 0.0,
        "eos_token_id": [1, 2, 3], "head_dim": head_dim, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": ffn, "max_position_embeddings": 512, "model_type": model_type,
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv, "pad_token_id": None,
        "rms_norm_eps": eps, "rope_theta": theta, "tie_word_embeddings": tied, "torch_dtype": "float32",
        "transformers_version": "4.51.3", "use_cache": True, "vocab_size": vocab}
    if rotary is not None:
        config["partial_rotary_factor"] = rotary
    return dict(sorted(config.items()))


def silent_json(model_type, **given):
    """config.json that leaves all else to the defaults of its class in transformers."""
    return {"model_type": model_type, "vocab_size": 41, "num_hidden_layers": 2, "pad_token_id": None} | given


def silent_cases():
    """Models whose config.json is silent about all sizes but the smallest ones. Their gradients would be large."""
    sparse = silent_json("glm", hidden_size=4, intermediate_size=6, num_attention_heads=4)
    sparser = silent_json("glm4", hidden_size=2, num_attention_heads=2)
    return [Case("silent_glm", 61, GlmConfig.from_dict(copy.deepcopy(sparse)), rows=(9, 3), json=sparse),
            Case("silent_glm4", 62, Glm4Config.from_dict(copy.deepcopy(sparser)), rows=(5, 7), json=sparser)]


def remote_json(sizes, rope_ratio, eps, dtype="float32"):
    """config.json with the keys of ChatGLM3's. The head is d wide; half of it rotates, always."""
    layers, hidden, heads, kv, head_dim, ffn, vocab = sizes
    return {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
        "ffn_hidden_size": ffn, "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": hidden,
        "kv_channels": head_dim, "layernorm_epsilon": eps, "multi_query_attention": True,
        "multi_query_group_num": kv, "num_attention_heads": heads, "num_layers": layers, "original_rope": True,
        "padded_vocab_size": vocab, "post_layer_norm": True, "rmsnorm": True, "rope_ratio": rope_ratio,
        "seq_length": 512, "use_cache": True, "torch_dtype": dtype, "transformers_version": "4.27.1",
        "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0}


def config_from_old(config_class, json_config):
    """The installed transformers' reading of an old config.json."""
    config = config_class.from_dict(copy.deepcopy(json_config))
    assert config.rope_parameters["rope_theta"] == json_config["rope_theta"]
    assert config.rope_parameters["partial_rotary_factor"] == json_config.get("partial_rotary_factor", 0.5)
    return config


def config_from_remote(c):
    """Hugging Face's config for a remote one."""
    sizes = (c["num_layers"], c["hidden_size"], c["num_attention_heads"], c["multi_query_group_num"],
             c["kv_channels"], c["ffn_hidden_size"], c["padded_vocab_size"])
    return new_config(GlmConfig, sizes, 10000.0 * c["rope_ratio"], 0.5, c["add_qkv_bias"], c["layernorm_epsilon"])


def model_cases():
    """The base models by name."""
    edge = old_json("glm", (2, 40, 4, 1, 12, 56, 83), 10000.0, 1.0, False, 1e-5, tied=True)
    plain = old_json("glm4", (3, 48, 3, 3, 16, 33, 71), 10000.0, None, False, 1e-5)
    remote = remote_json((2, 24, 4, 2, 8, 32, 53), 50, 1e-5)
    cases = [
        Case("glm_bias", 11, new_config(GlmConfig, (2, 32, 4, 2, 8, 48, 67), 10000.0, 0.5, True, 1.5625e-07),
             rows=(7, 1, 13, 2, 5), silent=(4,)),
        Case("glm_edge", 12, config_from_old(GlmConfig, edge), rows=(9, 2, 3, 11), silent=(2,), json=edge),
        Case("glm4", 13, new_config(Glm4Config, (2, 36, 6, 2, 8, 40, 61), 5000000.0, 0.5, True, 1e-5),
             rows=(1, 8, 6, 3, 7), silent=(3,)),
        Case("glm4_plain", 14, config_from_old(Glm4Config, plain), rows=(3, 10, 2, 6), silent=(0,), json=plain),
        Case("glm_long", 15, new_config(GlmConfig, (1, 16, 4, 2, 16, 24, 37), 10000.0, 0.5, True, 1.5625e-07),
             rows=(211, 67)),
        Case("chatglm", 16, config_from_remote(remote), rows=(5, 12, 1, 2, 9), silent=(0,), json=remote, remote=True),
    ]
    return {case.name: case for case in cases}


def lora_case(name, base, r, alpha, targets, rslora=False, rows=(6, 2, 1, 10), silent=()):
    """A case with LoRA on a base model. PEFT cannot run the remote layout: there q, k and v stand for the fused map."""
    modules = ["q_proj", "k_proj", "v_proj"] if base.remote else list(targets)
    lora = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=0.0, use_rslora=rslora,
                      target_modules=modules)
    return Case(name, base.seed, base.config, rows, silent, base.json, base.remote, lora, tuple(targets))


def lora_cases(models):
    """The LoRA cases by name."""
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    cases = [
        lora_case("lora_qkv", models["glm_bias"], 4, 16, ("q_proj", "k_proj", "v_proj")),
        lora_case("lora_all", models["glm4"], 3, 6, everything, rslora=True, rows=(5, 9, 2, 4), silent=(3,)),
        lora_case("lora_tied", models["glm_edge"], 2, 4, ("q_proj", "v_proj"), rows=(4, 8, 3)),
        lora_case("lora_fused", models["chatglm"], 4, 8, ("query_key_value",), rows=(7, 1, 2, 6)),
    ]
    return {case.name: case for case in cases}


def make_rows(seed, name, lengths, vocab, silent=()):
    """Rows of (ids, labels). About 3 of 10 labels are masked; the label of a first token is there but never used."""
    rows = []
    for r, length in enumerate(lengths):
        ids = (random_bits(seed, f"{name}.ids.{r}", length) % np.uint64(vocab)).astype(np.int64)
        kept = random_units(seed, f"{name}.kept.{r}", length) > -0.4
        kept[0] = kept[-1] = True
        labels = np.where(kept & (r not in silent), ids, IGNORE)
        rows.append((torch.from_numpy(ids), torch.from_numpy(labels)))
    return rows


def count_targets(rows):
    """How many tokens of these rows are compared with a prediction."""
    return sum(int((labels[1:] != IGNORE).sum()) for _, labels in rows)


def packed(rows, prefix=""):
    """Rows as stored: ids and labels one after another, and where each row starts."""
    starts = np.cumsum([0] + [len(ids) for ids, _ in rows])
    return {prefix + "ids": torch.cat([ids for ids, _ in rows]).int(),
            prefix + "labels": torch.cat([labels for _, labels in rows]).int(),
            prefix + "starts": torch.from_numpy(starts).int()}


# ---- 3. Names ----------------------------------------------------------------------------------
# Tensors are drawn and stored under the names in the file. Both models want Hugging Face's names.

REMOTE_NAMES = (
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.output_layer.", "lm_head."),
    ("transformer.encoder.layers.", "model.layers."),
    (".self_attention.dense.", ".self_attn.o_proj."),
    (".mlp.dense_h_to_4h.", ".mlp.gate_up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
)
FUSED = ".self_attention.query_key_value."


def hf_parts(name, tensor, config):
    """One remote tensor as {Hugging Face name: tensor}. The rows of a fused map are those of q, then k, then v; its
    LoRA matrix A serves all three."""
    for remote, native in REMOTE_NAMES:
        name = name.replace(remote, native)
    if FUSED not in name:
        return {name: tensor}
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    parts = [tensor] * 3 if name.endswith("lora_A.weight") else tensor.split([q, kv, kv])
    return {name.replace(FUSED, f".self_attn.{p}_proj."): part for p, part in zip("qkv", parts)}


def to_hf(case, tensors):
    """All tensors under Hugging Face's names; gradients flow back through it."""
    if not case.remote:
        return tensors
    return {k: v for name, tensor in tensors.items() for k, v in hf_parts(name, tensor, case.config).items()}


def remote_shapes(config):
    """{name: shape} of a model in the remote layout."""
    hidden, ffn, vocab, d = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    heads, fused = config.num_attention_heads, (config.num_attention_heads + 2 * config.num_key_value_heads) * d
    shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes |= {prefix + "input_layernorm.weight": (hidden,),
                   prefix + "self_attention.query_key_value.weight": (fused, hidden),
                   prefix + "self_attention.query_key_value.bias": (fused,),
                   prefix + "self_attention.dense.weight": (hidden, heads * d),
                   prefix + "post_attention_layernorm.weight": (hidden,),
                   prefix + "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
                   prefix + "mlp.dense_4h_to_h.weight": (hidden, ffn)}
    return shapes | {"transformer.encoder.final_layernorm.weight": (hidden,),
                     "transformer.output_layer.weight": (vocab, hidden)}


def base_shapes(case):
    """{name: shape} of the base model's tensors, as in its file (a tied head is not there)."""
    if case.remote:
        return remote_shapes(case.config)
    return {name: tuple(p.shape) for name, p in new_hf_model(case).named_parameters()}


def lora_shapes(case):
    """{name: shape} of the LoRA tensors, as in adapter_model.safetensors."""
    if not case.remote:
        model = get_peft_model(new_hf_model(case), copy.deepcopy(case.lora))
        return {file_name(name): tuple(p.shape) for name, p in model.named_parameters() if ".lora_" in name}
    shapes = {}
    for name, (rows, columns) in ((k, v) for k, v in remote_shapes(case.config).items() if len(v) == 2):
        if FUSED in name:
            module = "base_model.model." + name.removesuffix("weight")
            shapes |= {module + "lora_A.weight": (case.lora.r, columns), module + "lora_B.weight": (rows, case.lora.r)}
    return shapes


def file_name(parameter):
    """The name in a PEFT file of a PEFT model's parameter: without the adapter's name."""
    return parameter.replace(".default.", ".")


def parameter_name(name):
    """The other way."""
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


# ---- 4. The plain model ------------------------------------------------------------------------
# GLM and GLM-4-0414 in the precision of the weights it is given, nothing rounded in between.


def rms_norm(x, gain, eps):
    """x scaled to unit root mean square, times the gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotary_angles(config, tokens, dtype):
    """Cosines and sines [tokens, pairs] of the rotation of each adjacent pair of dimensions."""
    rope = config.rope_parameters
    width = int(config.head_dim * rope["partial_rotary_factor"])
    frequencies = torch.tensor([rope["rope_theta"] ** (-2 * j / width) for j in range(width // 2)], dtype=dtype)
    angles = torch.arange(tokens, dtype=dtype)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x [heads, tokens, d]: turns the pairs (2j, 2j+1); dimensions beyond the last pair stay."""
    width = 2 * cos.shape[-1]
    a, b = x[..., 0:width:2], x[..., 1:width:2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., width:]), -1)


class PlainModel:
    """The model from formulas alone. Holds the tensors that are not trained."""

    def __init__(self, case, frozen):
        self.case, self.config, self.frozen = case, case.config, to_hf(case, frozen)

    def linear(self, p, name, x):
        """x W^T + bias, plus the LoRA branch where there is one."""
        y = x @ p[name + ".weight"].T + p.get(name + ".bias", 0)
        a = p.get(f"base_model.model.{name}.lora_A.weight")
        if a is None:
            return y
        return y + self.case.scale * (x @ a.T) @ p[f"base_model.model.{name}.lora_B.weight"].T

    def attention(self, p, name, x, angles):
        """Causal attention with shared key and value heads; x [tokens, hidden]."""
        c, tokens = self.config, len(x)
        q, k, v = (self.linear(p, f"{name}.{part}_proj", x).view(tokens, -1, c.head_dim).transpose(0, 1)
                   for part in "qkv")
        group = c.num_attention_heads // c.num_key_value_heads
        q, k = rotate(q, *angles), rotate(k, *angles).repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(c.head_dim)
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        context = weights @ v.repeat_interleave(group, 0)
        return self.linear(p, name + ".o_proj", context.transpose(0, 1).reshape(tokens, -1))

    def mlp(self, p, name, x):
        """down(silu(gate) * up)."""
        gate, up = self.linear(p, name + ".gate_up_proj", x).chunk(2, -1)
        return self.linear(p, name + ".down_proj", gate * torch.sigmoid(gate) * up)

    def logits(self, p, ids):
        """[tokens, vocabulary]. GLM-4-0414 norms the output of both sub-layers before it is added."""
        c = self.config
        sandwich = c.model_type == "glm4"

        def norm(name, x):
            return rms_norm(x, p[name + ".weight"], c.rms_norm_eps)

        x = p["model.embed_tokens.weight"][ids]
        angles = rotary_angles(c, len(ids), x.dtype)
        for layer in range(c.num_hidden_layers):
            at = f"model.layers.{layer}."
            y = self.attention(p, at + "self_attn", norm(at + "input_layernorm", x), angles)
            x = x + (norm(at + "post_self_attn_layernorm", y) if sandwich else y)
            y = self.mlp(p, at + "mlp", norm(at + "post_attention_layernorm", x))
            x = x + (norm(at + "post_mlp_layernorm", y) if sandwich else y)
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        return norm("model.norm", x) @ p[head].T

    def forward(self, trained, ids, labels, targets):
        """Logits and loss (sum over this row / `targets`) of one row: logits i-1 against label i."""
        logits = self.logits(self.frozen | to_hf(self.case, trained), ids)
        kept = labels[1:] != IGNORE
        scores = logits[:-1][kept]
        nll = torch.logsumexp(scores, -1) - scores.gather(1, labels[1:][kept][:, None])[:, 0]
        return logits, nll.sum() / targets


# ---- 5. Hugging Face ---------------------------------------------------------------------------


def new_hf_model(case):
    """An untrained Hugging Face model of the case's config, with the eager attention."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(case.config), attn_implementation="eager")


class HuggingFace:
    """The same interface over transformers and PEFT; trained tensors are put in place at every call."""

    def __init__(self, case, frozen, dtype):
        self.case = case
        self.model = new_hf_model(case)
        if frozen:                                      # a base that does not train, with LoRA on it
            self.model.load_state_dict(to_hf(case, frozen), strict=not case.config.tie_word_embeddings)
            self.model = get_peft_model(self.model, copy.deepcopy(case.lora))
            self.model.requires_grad_(False)
        self.model = self.model.to(dtype).eval()

    def forward(self, trained, ids, labels, targets):
        """Logits and loss of one row, the loss by Hugging Face's own function."""
        parameters = {parameter_name(name): tensor for name, tensor in to_hf(self.case, trained).items()}
        inputs = {"input_ids": ids[None], "labels": labels[None], "num_items_in_batch": targets, "use_cache": False}
        output = functional_call(self.model, parameters, kwargs=inputs)
        return output.logits[0], output.loss


# ---- 6. Model and LoRA cases -------------------------------------------------------------------


def start(case, dtype, plain):
    """A model and its trained tensors, {file name: tensor}."""
    base = draw_all(case.seed, base_shapes(case), dtype)
    trained = draw_all(case.seed, lora_shapes(case), dtype) if case.lora else base
    frozen = base if case.lora else {}
    for tensor in trained.values():
        tensor.requires_grad_(True)
    return (PlainModel(case, frozen) if plain else HuggingFace(case, frozen, dtype)), trained


def run_rows(model, trained, rows, targets):
    """Forward and backward, row by row; gradients add up in `trained`. Returns logits [T,V] and loss."""
    logits, total = [], 0.0
    for ids, labels in rows:
        row_logits, loss = model.forward(trained, ids, labels, targets)
        loss.backward()
        logits.append(row_logits.detach())
        total += loss.item()
    return torch.cat(logits), total


def evaluate(case, rows, dtype, plain):
    """Logits, loss and gradients of a case: {"logits", "loss", "grad.NAME"}."""
    model, trained = start(case, dtype, plain)
    logits, loss = run_rows(model, trained, rows, count_targets(rows))
    result = {"logits": logits, "loss": torch.tensor([loss], dtype=torch.float64)}
    return result | {"grad." + name: tensor.grad for name, tensor in trained.items()}


def distance(a, b):
    """Length of the difference over the length of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def compare(name, result, truth):
    """One line of the table: how far a result is from the float64 one."""
    logits = float((result["logits"].double() - truth["logits"]).abs().max() / truth["logits"].abs().max())
    loss = float((result["loss"] - truth["loss"]).abs() / truth["loss"])
    grads = {key[5:]: distance(result[key], truth[key]) for key in truth if key.startswith("grad.")}
    line = f"{name:<22}{logits:12.2e}{loss:12.2e}"
    if not grads:
        return line
    worst = max(grads, key=grads.get)
    return f"{line}{grads[worst]:12.2e}  {worst}"


def clean(folder):
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_json(path, value):
    """JSON with a fixed order of keys, so that a second run gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_adapter_config(folder, lora, targets, base):
    """adapter_config.json as PEFT writes it, but with the target modules (a set there) in a fixed order."""
    lora = copy.deepcopy(lora)
    lora.inference_mode, lora.base_model_name_or_path = True, base
    lora.save_pretrained(folder)
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"target_modules": list(targets)})


def write_configs(case, folder):
    """config.json, and adapter_config.json where there is LoRA (the base's config then lies in the same folder)."""
    if case.json:
        write_json(folder / "config.json", case.json)
    else:
        case.config.save_pretrained(folder)
    if case.lora:
        write_adapter_config(folder, case.lora, case.lora_targets, ".")


def write_golden(folder, tensors):
    """golden.safetensors. The seed is a tensor: a second entry of the metadata would have no fixed place."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "golden.safetensors", metadata={"format": "pt"})


def seed_tensor(seed):
    """The seed as stored."""
    return {"seed": torch.tensor([seed], dtype=torch.int64)}


def with_prefix(prefix, result):
    """The same table with a word before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in result.items()}


def write_case(case, gradients=True):
    """One model or LoRA case; returns its lines of the table."""
    folder = clean(GOLDEN / case.name)
    write_configs(case, folder)
    rows = make_rows(case.seed, case.name, case.rows, case.config.vocab_size, case.silent)
    single = evaluate(case, rows, torch.float32, plain=False)
    truth = evaluate(case, rows, torch.float64, plain=True)
    if not gradients:
        single, truth = ({key: result[key] for key in ("logits", "loss")} for result in (single, truth))
    write_golden(folder, seed_tensor(case.seed) | packed(rows) | with_prefix("hf", single) | with_prefix("f64", truth))
    double = evaluate(case, rows, torch.float64, plain=False)
    return [compare(case.name, single, truth), compare(case.name + " .double()", double, truth)]


# ---- 7. Training -------------------------------------------------------------------------------

STEPS, MICRO, BATCH, SAMPLES = 20, 2, 2, 24
OPTIMIZERS = ("adamw", "sgd", "lion")


@dataclass
class Recipe:
    """Hyper-parameters of a training case."""
    lr: float
    warmup: int
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    max_norm: float
    linear: bool
    final: tuple                    # names of the tensors whose last value is stored
    optimizer: str = "adamw"

    def rate(self, step):
        """The learning rate of a step, counted from 0."""
        left = max(1, STEPS - self.warmup)
        if step < self.warmup:
            return self.lr * step / max(1, self.warmup)
        if self.linear:
            return self.lr * max(0.0, (STEPS - step) / left)
        return self.lr * (1 + math.cos(math.pi * (step - self.warmup) / left)) / 2


def sample_order(seed):
    """[steps, micro-batches, batch]: every epoch takes all samples in a new order."""
    epochs = -(-STEPS * MICRO * BATCH // SAMPLES)
    shuffled = [np.argsort(random_bits(seed, f"order.{e}", SAMPLES), kind="stable") for e in range(epochs)]
    return torch.from_numpy(np.concatenate(shuffled)[:STEPS * MICRO * BATCH]).int().reshape(STEPS, MICRO, BATCH)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (arXiv:2302.06675), algorithm 2, with decoupled decay."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                direction = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                p.copy_((1 - group["lr"] * group["weight_decay"]) * p - group["lr"] * direction)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


def make_optimizer(trained, recipe):
    """Only matrices that are no norms decay. SGD's momentum stands in the recipe's beta1."""
    decays = [t for name, t in trained.items() if t.ndim > 1 and "norm" not in name]
    others = [t for name, t in trained.items() if t.ndim <= 1 or "norm" in name]
    groups = [{"params": decays, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups, betas = [g for g in groups if g["params"]], (recipe.beta1, recipe.beta2)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.beta1, foreach=False)
    if recipe.optimizer == "lion":
        return Lion(groups, recipe.lr, betas)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, foreach=False)


def clip(trained, max_norm):
    """Scales all gradients so that their common norm is at most max_norm; returns the norm before."""
    norm = math.sqrt(sum(float(t.grad.double().square().sum()) for t in trained.values()))
    for tensor in trained.values():
        tensor.grad *= min(1.0, max_norm / (norm + 1e-6))
    return norm


def train(case, samples, order, recipe, dtype, plain):
    """The whole run: {"losses", "grad_norms", "final.NAME"}. A step's loss is over the targets of all its rows."""
    model, trained = start(case, dtype, plain)
    optimizer = make_optimizer(trained, recipe)
    losses, norms = [], []
    for step in range(STEPS):
        micro = [[samples[i] for i in batch] for batch in order[step].tolist()]
        targets = sum(count_targets(rows) for rows in micro)
        optimizer.zero_grad()
        losses.append(sum(run_rows(model, trained, rows, targets)[1] for rows in micro))
        norms.append(clip(trained, recipe.max_norm))
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
    result = {"losses": torch.tensor(losses, dtype=torch.float64),
              "grad_norms": torch.tensor(norms, dtype=torch.float64)}
    return result | {"final." + name: trained[name].detach() for name in recipe.final}


def compare_runs(name, single, truth, recipe):
    """A line on how far two training runs are apart, and where the gradient was clipped."""
    worst = lambda key: float(((single[key] - truth[key]).abs() / truth[key]).max())
    finals = max(distance(single[key], truth[key]) for key in truth if key.startswith("final."))
    clipped = int((truth["grad_norms"] > recipe.max_norm).sum())
    return (f"{name:<22}{worst('losses'):12.2e}{worst('grad_norms'):12.2e}{finals:12.2e}  loss {truth['losses'][0]:.3f}"
            f" to {truth['losses'][-1]:.3f}, {clipped} of {STEPS} steps clipped")


def write_training(name, case, recipe):
    """One training case; returns its line of the table."""
    folder = clean(GOLDEN / name)
    write_configs(case, folder)
    lengths = [2 + int(bits % np.uint64(7)) for bits in random_bits(case.seed, name + ".lengths", SAMPLES)]
    samples, order = make_rows(case.seed, name, lengths, case.config.vocab_size), sample_order(case.seed)
    single = train(case, samples, order, recipe, torch.float32, plain=False)
    truth = train(case, samples, order, recipe, torch.float64, plain=True)
    hyper = [recipe.lr, recipe.warmup, recipe.weight_decay, recipe.beta1, recipe.beta2, recipe.eps, recipe.max_norm]
    rates = [recipe.rate(step) for step in range(STEPS)]
    write_golden(folder, seed_tensor(case.seed) | packed(samples, "sample_")
                 | {"order": order, "hyper": torch.tensor(hyper, dtype=torch.float64),
                    "linear": torch.tensor([int(recipe.linear)], dtype=torch.int32),
                    "learning_rates": torch.tensor(rates, dtype=torch.float64)}
                 | ({"optimizer": torch.tensor([OPTIMIZERS.index(recipe.optimizer)], dtype=torch.int32)}
                    if recipe.optimizer != "adamw" else {})
                 | with_prefix("hf", single) | with_prefix("f64", truth))
    return compare_runs(name, single, truth, recipe)


# ---- 8. Saved folders --------------------------------------------------------------------------
# The same small model as released folders hold it: sharded bfloat16, in the remote layout, and an adapter by PEFT.

SAVED_SIZES = (2, 16, 2, 1, 8, 24, 40)
SAVED_SEED = 21


def saved_case():
    """The model of the saved folders. Its weights are drawn under the remote names."""
    config = new_config(GlmConfig, SAVED_SIZES, 10000.0, 0.5, True, 1e-5)
    return Case("saved_hf", SAVED_SEED, config, rows=(7, 1, 9, 6), silent=(3,))


def write_saved_hf(case, weights):
    """saved_hf/: by transformers, bfloat16, in several shards with an index. `weights` are under remote names."""
    folder = clean(GOLDEN / "saved_hf")
    model = new_hf_model(case).to(torch.bfloat16)
    model.load_state_dict({k: v for name, t in weights.items() for k, v in hf_parts(name, t, case.config).items()})
    model.save_pretrained(folder, max_shard_size=3000)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def write_saved_remote(case, weights):
    """saved_remote/: the same weights in the remote layout, with the buffer of frequencies that releases contain."""
    folder = clean(GOLDEN / "saved_remote")
    write_json(folder / "config.json", remote_json(SAVED_SIZES, 1, 1e-5, "bfloat16"))
    width = case.config.head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    tensors = weights | {"transformer.rotary_pos_emb.inv_freq": frequencies.to(torch.bfloat16)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def write_saved_peft(case):
    """saved_peft/: an adapter on saved_hf, as PEFT saves it."""
    folder = clean(GOLDEN / "saved_peft")
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "saved_hf", dtype=torch.bfloat16)
    model = get_peft_model(base, copy.deepcopy(case.lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(draw(case.seed, file_name(name), tuple(parameter.shape)))
    model.save_pretrained(folder, save_embedding_layers=False)
    write_adapter_config(folder, case.lora, case.lora_targets, "../saved_hf")
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def read_weights(folder):
    """All weights of a saved folder, widened to float64."""
    files = sorted(path for path in folder.glob("*model*.safetensors"))
    return {name: tensor.double() for path in files for name, tensor in load_file(path).items()}


@torch.no_grad()
def saved_forwards(case, base, adapter):
    """Logits and loss of what the folders hold, by Hugging Face in float32 and by the plain model: (hf, f64)."""
    rows = make_rows(case.seed, case.name, case.rows, case.config.vocab_size, case.silent)
    results = []
    for plain in (False, True):
        cast = lambda tensors: {k: v if plain else v.float() for k, v in tensors.items()}
        trained, frozen = (cast(adapter), cast(base)) if adapter else (cast(base), {})
        model = PlainModel(case, frozen) if plain else HuggingFace(case, frozen, torch.float32)
        pairs = [model.forward(trained, ids, labels, count_targets(rows)) for ids, labels in rows]
        loss = torch.tensor([sum(loss.item() for _, loss in pairs)], dtype=torch.float64)
        results.append({"logits": torch.cat([logits for logits, _ in pairs]), "loss": loss})
    return rows, *results


def write_saved():
    """The three saved folders; returns their lines of the table."""
    case, lines = saved_case(), []
    weights = draw_all(case.seed, remote_shapes(case.config), torch.bfloat16)
    write_saved_hf(case, weights)
    write_saved_remote(case, weights)
    tuned = lora_case("saved_peft", case, 2, 8, ("q_proj", "v_proj", "o_proj", "down_proj"), rows=(5, 8))
    write_saved_peft(tuned)
    base, adapter = read_weights(GOLDEN / "saved_hf"), read_weights(GOLDEN / "saved_peft")
    for case, tensors in ((case, {}), (tuned, adapter)):
        rows, single, truth = saved_forwards(case, base, tensors)
        write_golden(GOLDEN / case.name, packed(rows) | with_prefix("hf", single) | with_prefix("f64", truth))
        lines.append(compare(case.name, single, truth))
    return lines


# Adapters on saved_hf whose config chooses the same maps in every way that tools write: target_modules, and what else
# stands in adapter_config.json.
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "list": (["q_proj", "v_proj"], {}),
    "one": (["down_proj"], {}),
    "llama": (LLAMA, {}),
    "regex": (r"model\.layers\.\d+\.(self_attn\.[qo]|mlp\.gate_up)_proj", {}),
    "all_linear": ("all-linear", {"use_rslora": True}),
    "exclude": (LLAMA, {"exclude_modules": ["k_proj", "mlp.down_proj"]}),
    "paths": (["layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "mlp.down_proj"], {}),
    "layers": (["v_proj", "Wqkv", "lm_heads"], {"layers_to_transform": [0, 1], "layers_pattern": "layers"}),
    "default": (["q_proj", "gate_up_proj"], {}),
}


def write_target(name, number):
    """targets_NAME/: such an adapter, and what PEFT computes with the folder that it saved."""
    case, (targets, more) = saved_case(), TARGETS[name]
    folder = clean(GOLDEN / f"targets_{name}")
    load = lambda: AutoModelForCausalLM.from_pretrained(GOLDEN / "saved_hf", dtype=torch.float32,
                                                        attn_implementation="eager")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=targets, **more)
    model = get_peft_model(load(), copy.deepcopy(lora))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.copy_(draw(SAVED_SEED + number, file_name(key), tuple(parameter.shape)))
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": targets, "exclude_modules": more.get("exclude_modules"),
               "base_model_name_or_path": "../saved_hf"}
    write_json(folder / "adapter_config.json", config)
    judge = PeftModel.from_pretrained(load(), folder).eval()
    adapter, base = read_weights(folder), read_weights(GOLDEN / "saved_hf")
    case = Case(case.name, case.seed, case.config, (4, 3), (), lora=lora)
    rows, pairs = make_rows(SAVED_SEED + number, "targets", case.rows, case.config.vocab_size), [[], []]
    for ids, labels in rows:
        with torch.no_grad():
            output = judge(input_ids=ids[None], labels=labels[None], num_items_in_batch=count_targets(rows))
        pairs[0].append((output.logits[0], output.loss))
        pairs[1].append(PlainModel(case, base).forward(adapter, ids, labels, count_targets(rows)))
    single, truth = ({"logits": torch.cat([logits for logits, _ in some]),
                      "loss": torch.tensor([sum(float(loss) for _, loss in some)], dtype=torch.float64)}
                     for some in pairs)
    if name == "default":       # as a state holds them that was saved without PEFT
        tensors = {parameter_name(key): t for key, t in load_file(folder / "adapter_model.safetensors").items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_golden(folder, packed(rows) | with_prefix("hf", single) | with_prefix("f64", truth))
    return compare(folder.name, single, truth)


# ---- 9. Main -----------------------------------------------------------------------------------

FULL = Recipe(lr=2e-3, warmup=3, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, max_norm=4.0, linear=False,
              final=("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"))
LORA = Recipe(lr=5e-3, warmup=2, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, max_norm=3.0, linear=True,
              final=("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                     "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"))
SGD = Recipe(lr=2e-2, warmup=3, weight_decay=0.1, beta1=0.9, beta2=0, eps=0, max_norm=4.0, linear=False,
             final=("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
             optimizer="sgd")
LION = Recipe(lr=1e-3, warmup=2, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=0, max_norm=3.0, linear=True,
              final=LORA.final, optimizer="lion")


def golden_files():
    """All files in tests/golden/, readable by everybody (the safetensors library makes them private)."""
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    return files


def main():
    """Writes all folders and prints the table of differences."""
    torch.set_num_threads(1)                            # one thread: one order of every sum
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = model_cases()
    loras = lora_cases(models)
    lines = [line for case in (models | loras).values() for line in write_case(case)] + write_saved()
    lines += [line for case in silent_cases() for line in write_case(case, gradients=False)]
    lines += [write_target(name, number) for number, name in enumerate(TARGETS)]
    runs = [write_training("train_full", models["glm_bias"], FULL),
            write_training("train_lora", loras["lora_qkv"], LORA),
            write_training("train_sgd", models["glm_bias"], SGD),
            write_training("train_lion", loras["lora_qkv"], LION)]
    print("Hugging Face against the plain float64 model: logits relative to the largest, loss relative,\n"
          "worst tensor's gradient (length of the difference over the length)\n")
    print("\n".join([f"{'case':<22}{'logits':>12}{'loss':>12}{'gradient':>12}  worst tensor"] + lines))
    print("\n".join([f"\n{'20 steps':<22}{'losses':>12}{'norms':>12}{'weights':>12}"] + runs))
    size = sum(path.stat().st_size for path in golden_files())
    print(f"\n{size:,} bytes in tests/golden/")
    if size > SIZE_LIMIT:
        raise SystemExit(f"tests/golden/ is larger than {SIZE_LIMIT:,} bytes: make the cases smaller")


if __name__ == "__main__":
    main()
