# Weights as torch saves them (.bin): read where safetensors are, and refused in one line where they are anything else.
# The files are those of reference_torch.py; test_cli.sh reads this file.

# ---- The same numbers as safetensors -----------------------------------------------------------------------------

printf '{"input_ids": [5, 6, 7, 39, 0], "labels": [5, 6, 7, 39, 0]}\n' >torch_ids.jsonl
for model in one shards shared; do
    works 'loss' dump "$tests/golden/torch/$model" torch_ids.jsonl bin.out
    works 'loss' dump "$tests/golden/torch/$model/expected" torch_ids.jsonl safe.out
    check "a dump of $model is that of its safetensors" cmp bin.out safe.out
    rm -f bin.out safe.out
done
cp -R "$tests/golden/torch/one" both
works '0 tensors hold' info both --check
cp "$tests/golden/torch/one/expected/model.safetensors" both
printf 'no file of torch' >both/pytorch_model.bin    # safetensors first, where both lie there
works 'loss' dump both torch_ids.jsonl both.out
works 'done|checkpoint-2' train torch_ids.jsonl "$tests/golden/torch/shards" --max_steps 2 --val_size 0 --output_dir torch_run
works 'tensors of' merge torch_run/checkpoint-2 torch_merged
check 'merge writes safetensors' test -e torch_merged/model.safetensors
works 'loss' eval torch_ids.jsonl torch_merged
rm -rf both.out torch_run torch_merged

golden=$tests/golden/targets_all_linear         # an adapter of PEFT's, whose logits test-float compares with PEFT's
works 'loss' dump "$golden" torch_ids.jsonl safe.out --base "$tests/golden/saved_hf"
works 'loss' dump "$tests/golden/torch/adapter" torch_ids.jsonl bin.out --base "$tests/golden/saved_hf"
check 'adapter_model.bin is that adapter' cmp bin.out safe.out
rm -f bin.out safe.out
works 'parameters' init "$tests/golden/torch/prefix/config.json" torch_base
works 'loss' dump "$tests/golden/torch/prefix/expected" torch_ids.jsonl safe.out --base torch_base
works 'loss' dump "$tests/golden/torch/prefix" torch_ids.jsonl bin.out --base torch_base
check "ChatGLM2's own prefix is that of safetensors" cmp bin.out safe.out
works 'method ptuning' info "$tests/golden/torch/prefix" --base torch_base
works 'ptuning|done' train torch_ids.jsonl "$tests/golden/torch/prefix" --base torch_base --output_dir torch_run --max_steps 1 --val_size 0
rm -rf bin.out safe.out torch_run torch_base

# ---- Refused -----------------------------------------------------------------------------------------------------

seeds=$tests/fuzz/seeds/torch
rm both/model.safetensors
while read -r file words; do
    cp "$seeds/$file" both/pytorch_model.bin
    refuse "both/pytorch_model.bin: |$words" dump both torch_ids.jsonl out
    refuse "both/pytorch_model.bin: |$words" eval torch_ids.jsonl both
done <<'END'
calls asks for posix.system|nothing is called
calls_4 asks for posix.system
float8 asks for torch._utils._rebuild_tensor_v3
transposed transposed|.contiguous()
old_format torch before 1.6|torch.save
cut cut off or damaged
no_end cut off or damaged
deflated compressed, encrypted or split|save it again
two_lengths compressed, encrypted or split
no_program without data.pkl
short_storage data/0, are not all there
no_storage data/7, are not all there
offset data/0, are not all there
negative data/0, are not all there
huge a tensor
dimensions 5 dimensions
memo no dict of tensors
nested no dict of tensors
marks no dict of tensors
endless cut off
long_text cut off
opcode opcode 0x81
no_dict no dict of tensors
empty_stack no dict of tensors
number 'epoch' is no tensor
big_endian big endian
list no dict of tensors
itself 'w' is no tensor
END
check 'no file called a program' test ! -e called
for file in plain protocol_4 odd_key types old_plain old_linear zip64 empty empty_shapes; do    # sound, but of another model
    cp "$seeds/$file" both/pytorch_model.bin
    refuse "both: 'model.embed_tokens.weight' is in none of its files" eval torch_ids.jsonl both
done
for place in 12 17; do              # flags and method of the first local header are not looked at; sizes are
    head -c "$place" "$tests/golden/torch/one/pytorch_model.bin" >both/pytorch_model.bin
    refuse 'both/pytorch_model.bin: |cut off' eval torch_ids.jsonl both
done
rm both/pytorch_model.bin
refuse 'both: has neither model.safetensors nor pytorch_model.bin' eval torch_ids.jsonl both
cp -R "$tests/golden/torch/shards" short
rm short/pytorch_model-00002-of-00003.bin
refuse 'pytorch_model-00002-of-00003.bin: is missing' eval torch_ids.jsonl short

rm -rf both short torch_ids.jsonl
