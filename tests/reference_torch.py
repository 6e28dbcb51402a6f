"""Files of torch.save for the tests: small models, and files that must be refused.

    python tests/reference_torch.py              writes tests/golden/torch/ and tests/fuzz/seeds/torch/

golden/torch: the same weights as torch saves them and, in expected/, as safetensors. fuzz/seeds/torch: what
tests/cli_torch.sh expects of each stands there; old_* are of torch 1.13.1 and made by `reference_torch.py old`.
"""
import io
import json
import os
import pickle
import struct
import sys
import zipfile
import zlib

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIG = {"model_type": "glm", "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 6, "max_position_embeddings": 64,
          "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "attention_bias": True,
          "tie_word_embeddings": False}
CHATGLM = {"model_type": "chatglm", "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 6, "padded_vocab_size": 40,
           "num_attention_heads": 4, "kv_channels": 4, "multi_query_attention": True, "multi_query_group_num": 2,
           "add_qkv_bias": True, "seq_length": 64, "pre_seq_len": 3, "prefix_projection": False, "torch_dtype": "float32"}
SHAPES = {"model.embed_tokens.weight": (40, 8), "lm_head.weight": (40, 8), "model.norm.weight": (8,),
          "model.layers.0.input_layernorm.weight": (8,), "model.layers.0.post_attention_layernorm.weight": (8,),
          "model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.self_attn.q_proj.bias": (8,),
          "model.layers.0.self_attn.k_proj.weight": (4, 8), "model.layers.0.self_attn.k_proj.bias": (4,),
          "model.layers.0.self_attn.v_proj.weight": (4, 8), "model.layers.0.self_attn.v_proj.bias": (4,),
          "model.layers.0.self_attn.o_proj.weight": (8, 8), "model.layers.0.mlp.gate_up_proj.weight": (12, 8),
          "model.layers.0.mlp.down_proj.weight": (8, 6)}


def weights(dtype):
    torch.manual_seed(7)
    return {name: (torch.randn(shape) / 3).to(dtype) for name, shape in SHAPES.items()}


def write_models(top):
    from safetensors.torch import save_file
    for name, dtype in (("one", torch.float32), ("shards", torch.float16), ("shared", torch.bfloat16)):
        w = weights(dtype)
        folder = os.path.join(top, name)
        for sub in ("", "expected"):
            os.makedirs(os.path.join(folder, sub), exist_ok=True)
            with open(os.path.join(folder, sub, "config.json"), "w") as f:
                json.dump({**CONFIG, "torch_dtype": str(dtype).split(".")[1]}, f)
        save_file(w, os.path.join(folder, "expected", "model.safetensors"), metadata={"format": "pt"})
        if name == "shards":
            names, index = list(w), {}
            for i in range(3):
                shard, part = "pytorch_model-0000%d-of-00003.bin" % (i + 1), names[5 * i:5 * i + 5]
                torch.save({k: w[k] for k in part}, os.path.join(folder, shard))
                index.update({k: shard for k in part})
            with open(os.path.join(folder, "pytorch_model.bin.index.json"), "w") as f:
                json.dump({"metadata": {}, "weight_map": index}, f)
            continue
        if name == "shared":        # one storage, of which each tensor is a part; parameters, protocol 4
            flat, at = torch.cat([torch.zeros(3, dtype=dtype)] + [t.reshape(-1) for t in w.values()]), 3
            for k, t in w.items():
                w[k] = torch.nn.Parameter(flat[at:at + t.numel()].view(t.shape))
                at += t.numel()
        torch.save(w, os.path.join(folder, "pytorch_model.bin"), pickle_protocol=4 if name == "shared" else 2)


def write_adapters(top):
    """An adapter of PEFT's golden ones and a prefix of ChatGLM2's, as they were saved until safetensors came."""
    from safetensors.torch import load_file, save_file
    golden = os.path.join(HERE, "golden", "targets_all_linear")
    folder = os.path.join(top, "adapter")
    os.makedirs(folder, exist_ok=True)
    torch.save(load_file(os.path.join(golden, "adapter_model.safetensors")), os.path.join(folder, "adapter_model.bin"))
    with open(os.path.join(golden, "adapter_config.json")) as f, open(os.path.join(folder, "adapter_config.json"), "w") as g:
        g.write(f.read())
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.randn(3, 2 * 1 * 2 * 4)}
    for sub in ("", "expected"):
        folder = os.path.join(top, "prefix", sub)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(CHATGLM, f)
    torch.save(prefix, os.path.join(top, "prefix", "pytorch_model.bin"))
    save_file(prefix, os.path.join(top, "prefix", "expected", "model.safetensors"), metadata={"format": "pt"})


def saved(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def zipped(entries, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        for name, data in entries.items():
            entry = zipfile.ZipInfo("x/" + name)            # of 1980, so that the same files come out again
            entry.compress_type = method
            z.writestr(entry, data)
    return out.getvalue()


def zip64(entries):
    """As an archive of more than 4 GiB is written: every length and place in 64 bits."""
    full, files, listing = 0xFFFFFFFF, b"", b""
    for name, data in entries.items():
        name = b"x/" + name.encode()
        listing += (struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 45, 45, 0x808, 0, 0, 0, zlib.crc32(data), full, full,
                                len(name), 28, 0, 0, 0, 0, full) + name +
                    struct.pack("<HHQQQ", 1, 24, len(data), len(data), len(files)))
        files += struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0x808, 0, 0, 0, 0, 0, 0, len(name), 0) + name + data
    n, record = len(entries), len(files) + len(listing)
    return (files + listing + struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, n, n, len(listing), len(files)) +
            struct.pack("<IIQI", 0x07064B50, 0, record, 1) +
            struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, full, full, 0))


def program(body):
    return b"\x80\x02" + body + b"."


def tensor(key=b"0", size=8, offset=0, shape=(2, 4), stride=(4, 1), location=b"cpu"):
    """The opcodes that make a tensor, numbers as BININT."""
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s
    number = lambda n: b"J" + struct.pack("<i", n)
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(location) + number(size) + b"tQ"
    sizes = lambda t: b"(" + b"".join(map(number, t)) + b"t"
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes(shape) + sizes(stride) +
            b"\x89ccollections\nOrderedDict\n)RtR")


def state(value, name=b"w"):
    return program(b"}X" + struct.pack("<I", len(name)) + name + value + b"s")


class Calls:
    def __reduce__(self):
        return os.system, ("touch called",)


def write_files(top):
    os.makedirs(top, exist_ok=True)
    two = {"w": torch.arange(8.0).view(2, 4), "b": torch.arange(3, dtype=torch.int64)}
    numbers = struct.pack("<8f", *range(8))
    with_numbers = lambda code, **more: zipped({"data.pkl": code, "data/0": numbers, **more})
    good = saved(two)
    files = {
        "plain": good, "protocol_4": saved(two, pickle_protocol=4),
        "types": saved({str(d).split(".")[1]: torch.zeros(3, dtype=d) for d in (
            torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}),
        "odd_key": zipped({"data.pkl": state(tensor(b"a/../b\nc", location=b"\xe7\x81\xab:0")), "data/a/../b\nc": numbers}),
        "calls": zipped({"data.pkl": pickle.dumps({"w": Calls()}, protocol=2)}),
        "calls_4": zipped({"data.pkl": pickle.dumps({"w": Calls()}, protocol=4)}),
        "float8": saved({"w": torch.zeros(4).to(torch.float8_e4m3fn)}),
        "transposed": saved({"w": torch.arange(8.0).view(2, 4).t()}),
        "old_format": saved(two, _use_new_zipfile_serialization=False),
        "cut": good[:len(good) // 2], "no_end": good[:-30],
        "deflated": zipped({"data.pkl": state(tensor()), "data/0": numbers}, zipfile.ZIP_DEFLATED),
        "no_program": zipped({"data/0": numbers}),
        "short_storage": zipped({"data.pkl": state(tensor()), "data/0": numbers[:-4]}),
        "no_storage": zipped({"data.pkl": state(tensor(b"7"))}),
        "offset": with_numbers(state(tensor(offset=1))), "negative": with_numbers(state(tensor(offset=-1))),
        "huge": with_numbers(state(tensor(shape=(2147483647,) * 3, stride=(1, 1, 1)))),
        "dimensions": with_numbers(state(tensor(shape=(1,) * 5, stride=(1,) * 5))),
        "memo": with_numbers(program(b"}r" + struct.pack("<I", 1000000000))),
        "nested": with_numbers(program(b")" + b"\x85" * 20000)), "marks": with_numbers(program(b"(" * 20000 + b"t" * 20000)),
        "endless": with_numbers(b"\x80\x02}"), "long_text": with_numbers(b"\x80\x02X\xff\xff\xff\xffabc."),
        "opcode": with_numbers(program(b"}\x81")), "no_dict": with_numbers(program(b"K\x07")),
        "empty_stack": with_numbers(program(b"")), "number": saved({"w": two["w"], "epoch": 3}),
        "big_endian": with_numbers(state(tensor()), byteorder=b"big"),
        "empty": saved({}), "empty_shapes": saved({"w": torch.zeros(3, 0, 2), "b": torch.zeros(0)}),
        "zip64": zip64({"data.pkl": state(tensor()), "data/0": numbers}),
        "list": saved([two["w"]]), "itself": with_numbers(program(b"}q\x00X\x01\x00\x00\x00wh\x00s")),
    }
    lying = bytearray(files["odd_key"])             # the second entry's length as packed is not its length
    at = lying.rindex(b"PK\1\2") + 20
    lying[at:at + 4] = struct.pack("<I", 28)
    files["two_lengths"] = bytes(lying)
    for name, data in files.items():
        with open(os.path.join(top, name), "wb") as f:
            f.write(data)


if __name__ == "__main__":
    seeds = os.path.join(HERE, "fuzz", "seeds", "torch")
    if sys.argv[1:] == ["old"]:
        torch.save({"w": torch.arange(8.0).view(2, 4), "b": torch.arange(3)}, os.path.join(seeds, "old_plain"))
        torch.save(torch.nn.Linear(3, 2).half().state_dict(), os.path.join(seeds, "old_linear"))
    else:
        write_models(os.path.join(HERE, "golden", "torch"))
        write_adapters(os.path.join(HERE, "golden", "torch"))
        write_files(seeds)
