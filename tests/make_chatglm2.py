"""A folder of ChatGLM2-6B's shape as its release has it: 12.5 GB of float16 in seven .bin shards, random numbers.

    python tests/make_chatglm2.py OUT [safetensors]     with the word, in as many files of safetensors

To measure with: `glmtune info OUT`, a LoRA step's own memory. Every layer has the numbers of the first.
"""
import json
import os
import sys

import torch

LAYERS, HIDDEN, FFN, VOCABULARY, GROUPS, HEAD = 28, 4096, 13696, 65024, 2, 128
CONFIG = {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b", "num_layers": LAYERS, "hidden_size": HIDDEN,
          "ffn_hidden_size": FFN, "padded_vocab_size": VOCABULARY, "num_attention_heads": 32, "kv_channels": HEAD,
          "multi_query_attention": True, "multi_query_group_num": GROUPS, "add_qkv_bias": True, "add_bias_linear": False,
          "layernorm_epsilon": 1e-5, "rmsnorm": True, "post_layer_norm": True, "seq_length": 32768,
          "torch_dtype": "float16"}


def numbers(*shape):
    return (torch.randn(shape) * 0.02).half()


def main(out, safe):
    os.makedirs(out, exist_ok=True)
    torch.manual_seed(1)
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(CONFIG, f, indent=2)
    qkv = HIDDEN + 2 * GROUPS * HEAD
    layer = {"input_layernorm.weight": torch.ones(HIDDEN).half(), "post_attention_layernorm.weight": torch.ones(HIDDEN).half(),
             "self_attention.query_key_value.weight": numbers(qkv, HIDDEN),
             "self_attention.query_key_value.bias": numbers(qkv), "self_attention.dense.weight": numbers(HIDDEN, HIDDEN),
             "mlp.dense_h_to_4h.weight": numbers(2 * FFN, HIDDEN), "mlp.dense_4h_to_h.weight": numbers(HIDDEN, FFN)}
    parts = [{"transformer.embedding.word_embeddings.weight": numbers(VOCABULARY, HIDDEN),
              "transformer.rotary_pos_emb.inv_freq": torch.arange(32).half()}] + [{} for _ in range(6)]
    for i in range(LAYERS):
        parts[i * 7 // LAYERS].update({"transformer.encoder.layers.%d.%s" % (i, k): t for k, t in layer.items()})
    parts[6]["transformer.encoder.final_layernorm.weight"] = torch.ones(HIDDEN).half()
    parts[6]["transformer.output_layer.weight"] = parts[0]["transformer.embedding.word_embeddings.weight"]
    index = {}
    for i, part in enumerate(parts):
        name = "%s-%05d-of-00007.%s" % (("model", i + 1, "safetensors") if safe else ("pytorch_model", i + 1, "bin"))
        part = {k: t.clone() for k, t in part.items()}
        if safe:
            from safetensors.torch import save_file
            save_file(part, os.path.join(out, name), metadata={"format": "pt"})
        else:
            torch.save(part, os.path.join(out, name))
        index.update({k: name for k in part})
    with open(os.path.join(out, "model.safetensors.index.json" if safe else "pytorch_model.bin.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": index}, f)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["safetensors"])
