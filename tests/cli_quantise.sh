# Bases of codes: quantize, what runs on them, folders that are damaged; test_cli.sh reads this file.

# Rows of a multiple of 64 numbers and of others; with a head of its own.
mkdir coded
sed 's/"num_hidden_layers": 1/"num_hidden_layers": 2/; s/"dtype": "[a-z0-9]*"/"dtype": "bfloat16"/' glm.json >coded/config.json
works 'parameters' init coded/config.json coded/plain --layout glm4-chat
for form in '4 false' '4 true' '8 false'; do
    set -- $form
    works "$1 bits|read back|loss" quantize coded/plain coded/$1$2 --bits $1 --double_quant $2
done
check 'config.json says what transformers reads' grep -q '"quant_method": "bitsandbytes", "load_in_4bit": true' coded/4false/config.json
check 'and that all else is float32' grep -q '"dtype": "float32"' coded/4false/config.json
works 'shard' quantize coded/plain coded/shards --bits 4 --max_shard_size 0.000001
(set +f; touch -d 2020-01-01 coded/shards/*.safetensors)      # some have one size too
check 'in shards' test -f coded/shards/model.safetensors.index.json
quick='--max_steps 4 --val_size 0 --learning_rate 0.01'
for base in coded/4false coded/4true coded/8false coded/shards; do
    works 'done' train data.jsonl $base --output_dir coded/tuned-${base##*/} $quick --threads 2
    works 'loss' eval data.jsonl coded/tuned-${base##*/}/checkpoint-4
    works '' chat coded/tuned-${base##*/}/checkpoint-4 --prompt hi --max_new_tokens 4
done
model=checkpoint-4/adapter_model.safetensors
works 'done' train data.jsonl coded/4false --output_dir coded/again $quick --threads 1
check 'the same bits with one thread' cmp coded/tuned-4false/$model coded/again/$model
check 'shards give the same bits' cmp coded/tuned-4false/$model coded/tuned-shards/$model
for method in ptuning adapter; do
    works 'done' train data.jsonl coded/4true --output_dir coded/$method $quick --method $method
done
cp -R coded/4false coded/other
printf 'x' | dd of=coded/other/model.safetensors bs=1 conv=notrunc 2>dd.log \
    seek="$(numbers_at coded/other/model.safetensors 'model.layers.1.mlp.down_proj.weight.absmax')"
refuse 'another base model|fingerprint' eval data.jsonl coded/tuned-4false/checkpoint-4 --base coded/other
for method in full freeze; do
    refuse 'quantised|cannot be trained|--method lora' train data.jsonl coded/8false --output_dir out --method $method
done
works 'tensors' merge coded/tuned-4false/checkpoint-4 coded/merged
check 'a merged folder is not quantised' test -z "$(grep quantization_config coded/merged/config.json)"
check 'and is in bf16' [ "$(header_of coded/merged/model.safetensors | grep -c 'q_proj.weight":{"dtype":"BF16"')" = 1 ]
works 'loss' eval data.jsonl coded/merged
# Onto the model that the codes were made from, which quantised again gives them; onto another only by --force.
for base in 4true 8false; do
    works "trained on the codes of|coded/$base|move by" merge coded/tuned-$base/checkpoint-4 coded/onto$base --base coded/plain
done
check 'the type is that of the model' [ "$(header_of coded/onto8false/model.safetensors | grep -c 'q_proj.weight":{"dtype":"BF16"')" = 1 ]
check 'and nothing is quantised there' cmp coded/onto8false/config.json coded/plain/config.json
works 'parameters' init coded/config.json coded/stranger --layout glm4-chat --seed 7
refuse "coded/stranger: is not what|coded/4true|'model.layers.0.self_attn.q_proj.weight'" merge coded/tuned-4true/checkpoint-4 out --base coded/stranger
works 'warning|has other codes|move by' merge coded/tuned-4true/checkpoint-4 coded/forced --base coded/stranger --force
works 'loss' eval data.jsonl coded/onto4true
works '0 tensors hold numbers that are not finite' info coded/4true --check
works '4-bit codes (nf4) in 12 of them|mapped' info coded/4false
works '8-bit codes in 12 of them' info coded/tuned-8false/checkpoint-4
echo '{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}' >coded/ids.jsonl
works 'loss' dump coded/4false coded/ids.jsonl coded/dump.safetensors
refuse 'is quantised already' quantize coded/4false out --bits 4
refuse 'is an adapter' quantize coded/tuned-4false/checkpoint-4 out --bits 4
refuse 'exists already' quantize coded/plain coded/4false --bits 4
misuse '--bits is 4 or 8' quantize coded/plain out --bits 5
misuse '--double_quant|--bits 4' quantize coded/plain out --bits 8 --double_quant true
misuse '--quantization_bit|glmtune quantize' train data.jsonl coded/plain --quantization_bit 4
broken coded/plain; sed -i 's/"hidden_size"/"quantization_bit": 4, &/' bad/config.json
refuse 'quantization_bit|glmtune quantize bad OUT --bits 4' eval data.jsonl bad

# ---- Damaged ------------------------------------------------------------------------------------------------------

# WORDS BASE SED: names, types and shapes in the header are changed; or what stands in the file (SED on its bytes).
file=bad/model.safetensors q=model.layers.0.self_attn.q_proj.weight
bad_header_of() { broken "$2"; edit_header $file "$3"; refuse "$file|$1" eval data.jsonl bad; }
bad_bytes_of() { broken "$2"; LC_ALL=C sed -i "$3" $file; refuse "$file|$1" eval data.jsonl bad; }
bad_header_of "'$q' is quantised|absmax" coded/4false "s/($q).absmax/\1.absmix/"
bad_header_of "'$q' is quantised|quant_map" coded/4false "s/($q).quant_map/\1.quant_mop/"
bad_header_of "'$q'|U8 without scales" coded/4false "s/($q).quant_state/\1.quent_state/"
bad_header_of "'$q' is quantised|quant_map" coded/4false "s/($q).quant_state.bitsandbytes__nf4/\1.quant_state.bitsandbytes__fp4/"
bad_header_of "'$q' is quantised|nested_absmax" coded/4true "s/($q).nested_absmax/\1.nested_absmix/"
bad_header_of "'$q' is quantised|nested_quant_map" coded/4true "s/($q).nested_quant_map/\1.nested_quant_mop/"
bad_header_of "without scales" coded/8false 's/q_proj.SCB/q_proj.SCC/'
bad_header_of "does not fit|I8" coded/8false "s/(\"${q/self_attn.q/mlp.down}\":[{]\"dtype\":\"I8\",\"shape\":\[)([0-9]+), ([0-9]+)/\1\3, \2/"
broken coded/8false
printf '\001' | dd of=$file bs=1 seek="$(numbers_at $file "${q}_format")" conv=notrunc 2>dd.log
refuse "$file|'$q' is quantised|another order" eval data.jsonl bad
# An embedding as large as another matrix takes its place, codes and all.
sed 's/"vocab_size": [0-9]*/"vocab_size": 192/; s/"intermediate_size": [0-9]*/"intermediate_size": 96/' coded/config.json >coded/even.json
works 'parameters' init coded/even.json coded/even
works '8 bits' quantize coded/even coded/even8 --bits 8
echo '{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}' >coded/ids.jsonl
up=model.layers.0.mlp.gate_up_proj embed=model.embed_tokens
broken coded/even8
edit_header $file "s/\"$embed.weight\"/\"x\"/; s/\"$up.weight\"/\"$embed.weight\"/; s/\"x\"/\"$up.weight\"/; s/$up.(SCB|weight_format)/$embed.\1/g"
refuse "$file|'$embed.weight' is quantised|embeddings of codes are not read" eval coded/ids.jsonl bad
for edit in 's/"blocksize": 64/"blocksize": 32/|blocks of 32' 's/"blocksize": 64/"blocksize": xx/|' \
    's/"shape": \[/"shape": {/|' 's/"shape": \[[0-9]/"shape": [9/|another shape' 's/"quant_type"/"quant_type/|' \
    's/"shape": \[\([0-9]*\), \([0-9]*\)\]/"shape": [\1  \2]/|'; do
    bad_bytes_of "${edit##*|}" coded/4false "${edit%|*}"
done
for edit in 's/"nested_offset": [0-9.]*/"nested_offset": NaN/|' 's/"nested_blocksize": 256/"nested_blocksize": 128/|blocks of 256' \
    's/"nested_offset"/"nested_offsat"/|offset'; do
    bad_bytes_of "${edit##*|}" coded/4true "${edit%|*}"
done
broken coded/4false
printf '\377\377\377\177' | dd of=$file bs=1 seek="$(numbers_at $file "$q.quant_map")" conv=notrunc 2>dd.log
refuse "$file|quant_map" eval data.jsonl bad
broken coded/4false
printf '\377\377\377\177' | dd of=$file bs=1 seek="$(numbers_at $file "$q.absmax")" conv=notrunc 2>dd.log
run info bad --check
check 'info --check finds a scale that is not finite' [ "$status $(grep -c "'$q' has a number that is not finite, at 0" stdout)" = '1 1' ]
rm -rf coded bad
