"""Runs the same training step in PyTorch + transformers + PEFT and in glmtune, by turns, and prints the ratios.

    VENV/bin/python tests/bench_torch.py                                # LoRA, 1 x 512 tokens, every one a target
    VENV/bin/python tests/bench_torch.py --targets 0.4                  # the last 40 % are targets
    VENV/bin/python tests/bench_torch.py --method full
    VENV/bin/python tests/bench_torch.py --small                        # hidden 512, 8 layers, 4 x 256 tokens
    VENV/bin/python tests/bench_torch.py --precision bf16               # products of bf16 on both sides
    VENV/bin/python tests/bench_torch.py --bits 4                       # a base in nf4, PEFT with bitsandbytes
    VENV/bin/python tests/bench_torch.py --tune                         # PyTorch alone, under each of SETTINGS
    VENV/bin/python tests/bench_torch.py --device cuda --precision bf16 # glmtune-cuda and PyTorch on the same GPU

`glmtune init` makes a model folder (bf16). glmtune trains on it as it does on any folder, from ready ids; PyTorch loads
it as float32 (sdpa attention, fused AdamW, all cores). Both take the same ids, targets and LoRA dropout, so the losses
of the first step must agree, and that is checked. A round is one process of each; the first step of a process is left
out, the others give the median. Tokens/s are those of a whole step: data, forward, backward, clipping, optimizer. Peak
memory: of glmtune the process's largest resident size, mapped weights included; of PyTorch that of the steps alone
(VmHWM, set back after loading), with the size of the libraries it was before loading beside it.
In `bf16` PyTorch has the frozen weights in bf16 and autocast, LoRA's numbers stay float32, and the first losses must
agree to 1e-2. On a GPU `fp32` is without TF32 on both sides. Peak memory is then PyTorch's own count of the GPU's;
glmtune prints its in its plan.
Needs tests/requirements.txt, and nothing else running.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
LARGE = dict(hidden=2048, layers=4, heads=16, groups=2, head_dim=128, ffn=6144, vocab=59264, tokens=512, samples=1)
SMALL = dict(hidden=512, layers=8, heads=4, groups=2, head_dim=128, ffn=1408, vocab=8192, tokens=256, samples=4)

# Environments that were tried; what wins on a machine is passed with --setting. OMP_PROC_BIND and KMP_BLOCKTIME concern
# the OpenMP runtime, hugetlb and the two limits glibc's malloc (large tensors otherwise return to the system and are
# faulted in again at every step), the last ones MKL.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
                            "glibc.malloc.trim_threshold=4294967296"}
SETTINGS = {
    "plain": {},
    "bound": {"OMP_PROC_BIND": "true"},
    "active": {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "active"},
    "malloc": MALLOC,
    "malloc+bound": {**MALLOC, "OMP_PROC_BIND": "true"},
    "mkl-avx512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--glmtune", help="the program; default: glmtune, or glmtune-cuda, of this folder")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of products")
    p.add_argument("--bits", type=int, choices=[4, 8, 16], default=16, help="of the base; below 16 by glmtune quantize")
    p.add_argument("--small", action="store_true", help="the small shape as default instead of the large one")
    for key, value in LARGE.items():
        p.add_argument(f"--{key}", type=int, help=f"{value}, small {SMALL[key]}")
    p.add_argument("--targets", type=float, default=1.0, help="share of a sample's tokens, its last ones")
    p.add_argument("--method", choices=["lora", "full"], default="lora")
    p.add_argument("--r", type=int, default=8)
    p.add_argument("--lora_alpha", type=float, default=32)
    p.add_argument("--lora_dropout", type=float, default=0.1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3, help="processes of each, by turns")
    p.add_argument("--steps", type=int, default=5, help="steps of a process, the first of which does not count")
    p.add_argument("--setting", choices=SETTINGS, default="malloc+bound", help="PyTorch's environment")
    p.add_argument("--tune", action="store_true", help="PyTorch alone, under every setting")
    p.add_argument("--work", help="folder for model and data; default: a temporary one")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.glmtune = a.glmtune or str(HERE.parent.parent / ("glmtune" if a.device == "cpu" else "glmtune-cuda"))
    for key, value in (SMALL if a.small else LARGE).items():
        if getattr(a, key) is None:
            setattr(a, key, value)
    return a


def prepare(a, folder):
    """Model folder and data: ready ids, of which the last share are targets."""
    config = {"architectures": ["GlmForCausalLM"], "model_type": "glm", "vocab_size": a.vocab, "hidden_size": a.hidden,
              "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.groups,
              "head_dim": a.head_dim, "intermediate_size": a.ffn, "max_position_embeddings": 8192,
              "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "attention_bias": False,
              "attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": True, "eos_token_id": [2],
              "pad_token_id": 0, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    if not (folder / "model").exists():
        subprocess.run([a.glmtune, "init", folder / "config.json", folder / "model"], check=True,
                       stdout=subprocess.DEVNULL)
    if a.bits < 16 and not (folder / "quantised").exists():
        subprocess.run([a.glmtune, "quantize", folder / "model", folder / "quantised", "--bits", str(a.bits)],
                       check=True, stdout=subprocess.DEVNULL)
    draw = random.Random(1)
    with open(folder / "data.jsonl", "w") as f:
        for _ in range(a.samples):
            ids = [draw.randrange(a.vocab) for _ in range(a.tokens)]
            first = a.tokens - round(a.tokens * a.targets)
            f.write(json.dumps({"input_ids": ids, "labels": [-100] * first + ids[first:]}) + "\n")


def run_child(command, environment):
    """Runs a program; returns its output and its largest resident size in bytes."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0), err.seek(0)
        if status:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{err.read()[-3000:]}")
        return out.read(), usage.ru_maxrss * 1024


def base_of(a, folder):
    return folder / ("model" if a.bits == 16 else "quantised")


def run_glmtune(a, folder):
    out = folder / "run"
    command = [a.glmtune, "train", folder / "data.jsonl", base_of(a, folder), "--method", a.method, "--max_steps",
               a.steps, "--per_device_train_batch_size", a.samples, "--gradient_accumulation_steps", 1, "--val_size", 0,
               "--logging_steps", 1, "--save_steps", a.steps, "--max_input_length", a.tokens, "--output_dir", out,
               "--force", "--threads", a.threads, "--lora_dropout", a.lora_dropout, "--r", a.r, "--lora_alpha",
               a.lora_alpha, "--target_modules", "q_proj,k_proj,v_proj", "--precision", a.precision]
    _, peak = run_child([str(word) for word in command], os.environ)
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    return {"speed": [line["tokens_per_s"] for line in log], "loss": [line["loss"] for line in log], "peak": peak}


def run_torch(a, folder, setting):
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "MKL_NUM_THREADS": str(a.threads),
                   **SETTINGS[setting]}
    out, whole = run_child([sys.executable, str(HERE), "--child", str(folder), *sys.argv[1:]], environment)
    return {**json.loads(out.splitlines()[-1]), "whole": whole}


def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(a):
    """In a process of its own: the steps in PyTorch; prints one line of JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import peft
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(a.threads)
    libraries = high_water()
    folder = Path(a.child)
    rounds = a.precision == "bf16"
    dtype = torch.bfloat16 if rounds and a.method == "lora" else torch.float32      # what trains stays float32
    model = transformers.AutoModelForCausalLM.from_pretrained(base_of(a, folder), dtype=dtype,
                                                              attn_implementation="sdpa").to(a.device)
    for p in model.parameters():        # transformers leaves what is not quantised in the file's type
        if a.bits < 16 and p.is_floating_point():
            p.data = p.data.to(dtype)
    if a.method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=a.r, lora_alpha=a.lora_alpha, lora_dropout=a.lora_dropout, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4 if a.method == "lora" else 5e-5, weight_decay=0.0, fused=True)
    rows = [json.loads(line) for line in open(folder / "data.jsonl")]
    try:
        Path("/proc/self/clear_refs").write_text("5")       # VmHWM starts again from what is resident now
    except OSError:
        pass

    def now():
        if a.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    result = {"speed": [], "loss": [], "phases": [], "libraries": libraries}
    for _ in range(a.steps):
        t = [now()]
        ids = torch.tensor([row["input_ids"] for row in rows], device=a.device)
        labels = torch.tensor([row["labels"] for row in rows], device=a.device)
        with torch.autocast(a.device, dtype=torch.bfloat16, enabled=rounds):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        t.append(now())
        loss.backward()
        t.append(now())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result["loss"].append(loss.item())
        t.append(now())
        result["speed"].append(a.tokens * a.samples / (t[-1] - t[0]))
        result["phases"].append([after - before for before, after in zip(t, t[1:])])
    result["peak"] = high_water() if a.device == "cpu" else torch.cuda.max_memory_allocated()
    print(json.dumps(result))


def middle(runs, key="speed"):
    return statistics.median(value for run in runs for value in run[key][1:])


def compare(a, folder):
    ours, theirs = [], []
    for _ in range(a.rounds):
        theirs.append(run_torch(a, folder, a.setting))
        ours.append(run_glmtune(a, folder))
        first = ours[-1]["loss"][0], theirs[-1]["loss"][0]
        if not abs(first[0] - first[1]) <= (1e-2 if a.precision == "bf16" else 1e-5) * abs(first[1]):
            sys.exit(f"the losses of the first step differ: glmtune {first[0]}, PyTorch {first[1]}: not the same step")
    speed = middle(ours), middle(theirs)
    peak = max(run["peak"] for run in ours), max(run["peak"] for run in theirs)
    phases = [statistics.median(p[i] for run in theirs for p in run["phases"][1:]) * 1e3 for i in range(3)]
    print(f"  tokens/s      glmtune {speed[0]:8.1f}   PyTorch {speed[1]:8.1f}   ratio {speed[0] / speed[1]:.2f}")
    if a.device == "cuda":
        print(f"  peak memory   PyTorch, on the GPU {peak[1] / 2**20:.0f} MiB")
    else:
        print(f"  peak memory   glmtune {peak[0] / 2**20:6.0f} MiB PyTorch {peak[1] / 2**20:6.0f} MiB ratio "
              f"{peak[0] / peak[1]:.2f}   (PyTorch's libraries {theirs[0]['libraries'] / 2**20:.0f} MiB, whole process "
              f"{theirs[0]['whole'] / 2**20:.0f} MiB)")
    print(f"  PyTorch       forward {phases[0]:.0f} ms, backward {phases[1]:.0f} ms, clipping and AdamW "
          f"{phases[2]:.0f} ms; first loss {theirs[0]['loss'][0]:.6f}, glmtune {ours[0]['loss'][0]:.6f}")


def main():
    a = parse_arguments()
    if a.child:
        return child(a)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(a.work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(a, folder)
        print(f"{a.method}: hidden {a.hidden}, {a.layers} layers, {a.heads} heads of {a.head_dim} on {a.groups}, ffn "
              f"{a.ffn}, vocabulary {a.vocab}; {a.samples} x {a.tokens} tokens, last {a.targets:.0%} targets; "
              f"{a.device}, {a.precision}, {a.threads} threads, PyTorch's setting {a.setting}", flush=True)
        if not a.tune:
            return compare(a, folder)
        for setting in SETTINGS:
            runs = [run_torch(a, folder, setting) for _ in range(a.rounds)]
            print(f"  {setting:14} {middle(runs):8.1f} tokens/s   {max(r['peak'] for r in runs) / 2**20:6.0f} MiB",
                  flush=True)


if __name__ == "__main__":
    main()
