"""Writes tests/golden/quant_NAME/: small models quantised by bitsandbytes and saved by transformers, or quantised as
ChatGLM's releases are, each with LoRA and the numbers of transformers, PEFT and bitsandbytes for it.

    VENV/bin/python tests/reference_quantised.py

    base/                           config.json and weights of codes
    adapter_config.json, adapter_model.safetensors      LoRA on base
    golden.safetensors              ids, labels, starts as in reference.py; hf.* by bitsandbytes in float32 with
                                    training on; f64.* by the plain float64 model with the dequantised weights;
                                    full.NAME: these weights, for some maps

quant_plain/ is the model that nf4, fp4, double and int8 are made of; `glmtune quantize` must make the same codes of it.
hf.* of the releases' kind come from transformers in float32 with the dequantised weights: nothing else reads them.
"""
import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes.functional as F
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GlmConfig

import reference as R

SEED = 81
# L, H, heads, kv, d, F, V: rows of 52, 36 and 76 numbers, so blocks of 64 run across them, and the last one is cut off.
# (With rows of a multiple of 16 that is none of 64, bitsandbytes 0.50.2 gives numbers of one block another's scale when
# it dequantises on a CPU with AVX-512; its codes and its GPU code have none of that.)
SIZES = (2, 52, 3, 1, 12, 76, 67)
TARGETS = ("q_proj", "v_proj", "gate_up_proj", "down_proj")


def four_bits(kind="nf4", double=False):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                              bnb_4bit_compute_dtype=torch.float32)


KINDS = {
    "nf4": (four_bits(), torch.float32),
    "fp4": (four_bits("fp4"), torch.float32),
    "double": (four_bits(double=True), torch.float32),
    "half": (four_bits(double=True), torch.bfloat16),       # a folder that says bfloat16
    "int8": (BitsAndBytesConfig(load_in_8bit=True), torch.float32),
}


def quantise_folder(case, folder, config, dtype):
    """The random model of a case, quantised as it is loaded, and saved."""
    plain = folder / "plain"
    model = R.new_hf_model(case)
    weights = R.draw_all(case.seed, R.base_shapes(case), dtype)
    model.to(dtype).load_state_dict(weights)
    model.save_pretrained(plain)
    loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=copy.deepcopy(config), dtype=dtype)
    loaded.save_pretrained(folder / "base")
    if dtype == torch.float32 and case.name == "quant_nf4":
        kept = R.clean(R.GOLDEN / "quant_plain")
        for file in ("config.json", "model.safetensors"):
            R.shutil.copy(plain / file, kept / file)
    R.shutil.rmtree(plain)
    (folder / "base" / "generation_config.json").unlink(missing_ok=True)


def dequantised(folder):
    """All weights of a saved folder as float32, those of codes as bitsandbytes' training computes them."""
    stored, weights = load_file(folder / "base" / "model.safetensors"), {}
    for name, tensor in stored.items():
        parts = {key[len(name) + 1:]: value for key, value in stored.items() if key.startswith(name + ".")}
        state = [key for key in parts if key.startswith("quant_state")]
        path = name.removesuffix(".weight")
        if state:
            quant = F.QuantState.from_dict(parts, device="cpu")
            quant.dtype = torch.float32             # what is computed with, whatever the folder says
            weights[name] = F.dequantize_4bit(tensor, quant)
        elif path + ".SCB" in stored:
            weights[name] = tensor.float() * (stored[path + ".SCB"] * torch.tensor(1 / 127))[:, None]
        elif name.endswith((".weight", ".bias")):
            weights[name] = tensor.float()
    return weights


def release_folder(case, folder, bits):
    """A folder as ChatGLM2-6B-int4 and its like are: torch's file, int8 with scales of fp16 beside it."""
    base, weights = folder / "base", {}
    base.mkdir()
    R.write_json(base / "config.json", R.remote_json(SIZES, 1, 1e-5, "float16") | {"quantization_bit": bits})
    stored = {}
    for name, tensor in R.draw_all(case.seed, R.remote_shapes(case.config), torch.float16).items():
        matrix = tensor.ndim == 2 and "layers." in name
        if not matrix:
            stored[name], weights[name] = tensor, tensor.float()
            continue
        top = 2 ** (bits - 1) - 1
        scale = (tensor.float().abs().amax(1) / top).half()
        codes = torch.round(tensor.float() / scale.float()[:, None]).clamp(-top, top).to(torch.int8)
        weights[name] = codes.float() * scale.float()[:, None]
        if bits == 4:
            codes = ((codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)).to(torch.int8)
        stored[name], stored[name + "_scale"] = codes, scale
    torch.save(stored, base / "pytorch_model.bin")
    return weights


def trained_of(case):
    return {name: R.draw(case.seed + 1, name, shape) for name, shape in R.lora_shapes(case).items()}


def with_gradients(model, trained, rows):
    for tensor in trained.values():
        tensor.requires_grad_(True)
    logits, loss = R.run_rows(model, trained, rows, R.count_targets(rows))
    return ({"logits": logits, "loss": torch.tensor([loss], dtype=torch.float64)} |
            {"grad." + name: tensor.grad for name, tensor in trained.items()})


class Quantised:
    """reference.py's interface over a folder as transformers, bitsandbytes and PEFT load it."""

    def __init__(self, case, folder, dtype):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
        for parameter in base.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        self.case = case
        self.model = get_peft_model(base, copy.deepcopy(case.lora)).train()
        self.model.requires_grad_(False)
        self.parameters = dict(self.model.named_parameters())

    def forward(self, trained, ids, labels, targets):
        for name, tensor in trained.items():
            self.parameters[R.parameter_name(name)].data = tensor.data
            self.parameters[R.parameter_name(name)].requires_grad_(True)
        output = self.model(input_ids=ids[None], labels=labels[None], num_items_in_batch=targets, use_cache=False)
        for name, tensor in trained.items():
            parameter = self.parameters[R.parameter_name(name)]
            gradient = torch.autograd.grad(output.loss, parameter, retain_graph=True)[0]
            tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        return output.logits[0].detach(), output.loss.detach().requires_grad_()


def write(name):
    folder = R.clean(R.GOLDEN / f"quant_{name}")
    config = R.new_config(GlmConfig, SIZES, 10000.0, 0.5, True, 1e-5)
    base_case = R.Case(f"quant_{name}", SEED, config, rows=(7, 4))
    case = R.lora_case(base_case.name, base_case, 2, 8, TARGETS, rows=(7, 4))
    release = name.startswith("release")
    if release:
        remote = release_folder(base_case, folder, int(name[-1]))
        weights = {k: v for key, t in remote.items() for k, v in R.hf_parts(key, t, config).items()}
        case.lora_targets = ("query_key_value",)
        case.lora.target_modules = ["q_proj", "k_proj", "v_proj"]
    else:
        quantise_folder(base_case, folder, *KINDS[name])
        weights = dequantised(folder)
    R.write_adapter_config(folder, case.lora, case.lora_targets, "base")
    rows = R.make_rows(SEED, case.name, case.rows, config.vocab_size)
    if release:
        case.remote, base_case.remote = True, True
    trained = trained_of(case)
    save_file({k: v.detach().clone() for k, v in trained.items()}, folder / "adapter_model.safetensors")
    copies = lambda dtype: {k: v.detach().clone().to(dtype) for k, v in trained.items()}
    frozen = remote if release else weights
    plain = R.PlainModel(case, {k: v.double() for k, v in frozen.items()})
    truth = with_gradients(plain, copies(torch.float64), rows)
    # a folder that says bfloat16: bitsandbytes rounds weights in its backward, so gradients are those of a float model
    single = with_gradients(R.HuggingFace(case, frozen, torch.float32), copies(torch.float32), rows)
    if not release:
        quantised = with_gradients(Quantised(case, folder, torch.float32), copies(torch.float32), rows)
        single = quantised if name != "half" else single | {"logits": quantised["logits"]}
    some = {k: v for k, v in (remote if release else weights).items() if v.ndim == 2 and ".layers." in k}
    R.write_golden(folder, R.packed(rows) | R.with_prefix("hf", single) | R.with_prefix("f64", truth) |
                   {f"full.{k}": v for k, v in some.items()})
    print(R.compare(case.name, single, truth))


if __name__ == "__main__":
    for kind in [*KINDS, "release8", "release4"]:
        write(kind)
