# Adapters as tools write them, lists of maps, prefixes that lie with their model, runs in the place of checkpoints;
# test_cli.sh reads this file.

quick='--max_steps 1 --val_size 0 --learning_rate 0.01'
sed 's/"num_hidden_layers": 1/"num_hidden_layers": 2/' glm.json >two.json
works 'parameters' init two.json two --layout glm4-chat
works 'done' train data.jsonl two --output_dir lists/all $quick

# ---- Lists of maps -----------------------------------------------------------------------------------------------

maps_of() { sed -n 's/.*"target_modules": //p' "$1/checkpoint-1/adapter_config.json"; }
same_maps() { check "$1: the maps of $2" test "$(maps_of lists/"$1")" = "$2"; }

works 'done' train data.jsonl two --output_dir lists/blanks $quick --target_modules ' q_proj, v_proj ,,'
same_maps blanks '["q_proj", "v_proj"]'
check 'blanks are not kept' grep -q '"target_modules":"q_proj,v_proj"' lists/blanks/checkpoint-1/optimizer.safetensors
works 'done' train data.jsonl two --output_dir lists/linear $quick --target_modules All-Linear
check 'all-linear is what no list means' test "$(maps_of lists/linear)" = "$(maps_of lists/all)"
works 'done' train data.jsonl remote --output_dir lists/remote $quick --layout glm4-chat --target_modules all-linear
same_maps remote '["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]'
works 'done' train data.jsonl two --output_dir lists/freeze $quick --method freeze --trainable_modules 'o_proj, q_proj'
works 'goes on|done' train data.jsonl two --output_dir lists/blanks $quick --max_steps 2 --resume_from_checkpoint yes \
    --target_modules 'q_proj,  v_proj' --force
works 'done' train data.jsonl lists/blanks/checkpoint-1 --output_dir lists/on $quick --target_modules 'v_proj, q_proj'
same_maps on '["q_proj", "v_proj"]'
yaml_maps() { printf 'training_args: {max_steps: 1}\npeft_config:\n  peft_type: LORA\n  target_modules: %s\n' "$1"; }
mkdir lists/data
cp data.jsonl lists/data/train.jsonl
for form in '"q_proj, v_proj"' '[q_proj, " v_proj"]' 'all-linear'; do
    yaml_maps "$form" >maps.yaml
    works 'done' train lists/data/train.jsonl two maps.yaml --output_dir lists/yaml --force
    [ "$form" = all-linear ] || same_maps yaml '["q_proj", "v_proj"]'
done
check 'all-linear in a yaml' test "$(maps_of lists/yaml)" = "$(maps_of lists/all)"
{ yaml_maps q_proj; echo '  exclude_modules: [v_proj]'; } >maps.yaml
refuse "maps.yaml|exclude_modules|not supported" train lists/data/train.jsonl two maps.yaml --output_dir out
{ yaml_maps '[q_proj]'; echo '  layers_to_transform: 0'; } >maps.yaml
refuse "maps.yaml|layers_to_transform|not supported" train lists/data/train.jsonl two maps.yaml --output_dir out
refuse "LoRA on lm_head is not supported" train data.jsonl two --target_modules 'q_proj, lm_head' --output_dir out

# ---- Adapters ----------------------------------------------------------------------------------------------------

lora=lists/all/checkpoint-1 tensors=bad/adapter_model.safetensors config=bad/adapter_config.json
works '' chat $lora --prompt hi --max_new_tokens 8
cp stdout answer
as_before() {                   # WHAT: bad answers as the adapter that it was
    works '' chat bad --prompt hi --max_new_tokens 8
    check "$1" cmp stdout answer
}
for list in '["gate_proj", "up_proj", "q_proj"]' '".*layers.*_proj"' '"all-linear"' '["layers.0.mlp.down_proj"]' null 7; do
    broken $lora; sed -i "s/\"target_modules\": .*/\"exclude_modules\": [\"x\"], \"target_modules\": $list/" $config
    as_before "the tensors say where LoRA is, not $list"
done
broken $lora; sed -i 's/"r": 8/"layers_to_transform": [0, 1], "r": 8/' $config
as_before 'layers_to_transform may name all layers'
broken $lora; edit_header $tensors 's/(lora_[AB])\.weight/\1.default.weight/g'
as_before "an adapter's name in its tensors' names"
works 'done' train data.jsonl bad --output_dir lists/named $quick
check 'the names that are saved have none' [ "$(header_of lists/named/checkpoint-1/adapter_model.safetensors |
    grep -c 'lora_A.weight')" = 1 ]

# SED WORDS: an adapter whose tensors are named so is refused everywhere, with the words
bad_names() {
    broken $lora; edit_header $tensors "$1"
    for command in 'chat bad --prompt hi' 'merge bad out' 'dump bad ready.jsonl out' 'train data.jsonl bad --output_dir out'; do
        refuse "$2" $command
    done
}
bad_names 's/model\.layers\.0\.mlp\.down_proj\.lora/lm_head.lora/g' 'LoRA on lm_head is not supported'
bad_names 's/model\.layers\.0\.mlp\.down_proj\.lora_(.)\.weight/model.embed_tokens.lora_embedding_\1/g' 'LoRA on embed_tokens is not supported'
bad_names 's/layers\.1\.(self_attn\.q_proj)/layers.8.\1/g' 'bad: acts on some layers only|model.layers.1.self_attn.q_proj'
bad_names 's/layers\.0/layers.8/g' 'bad: acts on some layers only|model.layers.0.self_attn.q_proj'
bad_names 's/(layers\.0\.self_attn\.q_proj\.lora_)A/\1C/g' "bad: 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' is missing"
bad_names 's/(layers\.0\.self_attn\.q_proj\.lora_)B/\1C/g' "bad: 'base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight' is missing"
bad_names 's/mlp\.down_proj/mlp.gate_proj/g' "target module 'gate_proj' is not in this model; it has q_proj"
works 'done' train data.jsonl m --output_dir lists/one $quick
refuse 'acts on some layers only|model.layers.1.' chat lists/one/checkpoint-1 --base two --force --prompt hi
refuse "'base_model.model.model.layers.1.|has no place" chat $lora --base m --force --prompt hi
for key in '"use_dora": true' '"rank_pattern": {"q_proj": 2}' '"alpha_pattern": {"q_proj": 2}' '"lora_bias": true' \
    '"modules_to_save": ["lm_head"]' '"fan_in_fan_out": true' '"init_lora_weights": "pissa"' '"bias": "all"'; do
    broken $lora; sed -E "s/\"(bias|fan_in_fan_out|init_lora_weights)\": [^,]*,/$key,/" -i $config
    sed -i "s/\"r\": 8/$key, \"r\": 8/" $config
    refuse "adapter_config.json|$(echo "$key" | cut -d: -f1)|not supported" chat bad --prompt hi
done
broken $lora; rm $tensors; printf 'PK\003\004' >bad/adapter_model.bin
for command in 'chat bad --prompt hi' 'info bad' 'merge bad out' 'train data.jsonl bad --output_dir out'; do
    refuse 'bad/adapter_model.bin: is a zip archive|download it again' $command
done

# ---- ChatGLM3's P-tuning v2: the whole model, with the prefix among its tensors ----------------------------------

join_tensors() {                # FILE FILE OUT: the tensors of both in one file
    local size=$(($(wc -c <"$1") - 8 - $(header_length "$1"))) header
    header=$(header_of "$1" | sed 's/} *$//'),$(header_of "$2" | sed -E 's/^\{("__metadata__":\{[^}]*\},)?//' |
        awk -v by=$size '{ while (match($0, /"data_offsets":\[[0-9]+, *[0-9]+\]/)) {
            split(substr($0, RSTART + 16), n, /[],]/)
            printf "%s\"data_offsets\":[%d,%d]", substr($0, 1, RSTART - 1), n[1] + by, n[2] + by
            $0 = substr($0, RSTART + RLENGTH) } print }')
    { le8 ${#header}; printf %s "$header"; for i in "$1" "$2"; do tail -c +$((9 + $(header_length "$i"))) "$i"; done; } >"$3"
}
for projection in false true; do
    rm -rf whole whole.shards apart prefixed lists/prefix
    works 'done' train data.jsonl remote --output_dir lists/prefix --layout glm4-chat $quick --method ptuning \
        --num_virtual_tokens 4 --prefix_projection $projection
    mkdir apart; cp -R remote whole
    cp lists/prefix/checkpoint-1/adapter_model.safetensors apart/model.safetensors
    join_tensors remote/model.safetensors apart/model.safetensors whole/model.safetensors
    sed 's/^{/{"pre_seq_len": 4, "_name_or_path": "..\/remote",/' remote/config.json >apart/config.json
    sed 's/"..\/remote"/"THUDM\/chatglm3-6b"/' apart/config.json >whole/config.json
    cp -R whole whole.shards
    cp remote/model.safetensors whole.shards/one.safetensors
    cp apart/model.safetensors whole.shards/two.safetensors; rm whole.shards/model.safetensors
    { header_of remote/model.safetensors | grep -o '"transformer[^"]*"' | sed 's/$/: "one.safetensors",/'
      header_of apart/model.safetensors | grep -o '"transformer[^"]*"' | sed 's/$/: "two.safetensors",/'; } |
        sed '1s/^/{"weight_map": {/; $s/,$/}}/' >whole.shards/model.safetensors.index.json
    works 'tokens, loss' dump apart ready.jsonl prefixed
    works '' chat apart --prompt hi --max_new_tokens 8 --layout glm4-chat
    cp stdout answer
    for folder in whole whole.shards; do
        works 'tokens, loss' dump $folder ready.jsonl dumped --force
        check "$folder: logits and gradients are those of the prefix beside its base" cmp dumped prefixed
        works '' chat $folder --prompt hi --max_new_tokens 8 --layout glm4-chat
        check "$folder: so are answers" cmp stdout answer
        works 'method ptuning trains' info $folder --layout glm4-chat
        works '0 tensors hold' info $folder --layout glm4-chat --check
        works 'loss' eval data.jsonl $folder --layout glm4-chat --max_new_tokens 2
        works 'samples' check data.jsonl $folder --layout glm4-chat
        refuse "$folder|cannot be merged" merge $folder out
        works 'method ptuning|done' train data.jsonl $folder --output_dir lists/more $quick --layout glm4-chat --force
        works '' chat lists/more/checkpoint-1 --prompt hi --max_new_tokens 3 --layout glm4-chat
    done
    works 'goes on|done' train data.jsonl whole --output_dir lists/more $quick --layout glm4-chat --max_steps 2 \
        --resume_from_checkpoint lists/more/checkpoint-1 --force
done
refuse 'the adapter has method ptuning' train data.jsonl whole --method lora --output_dir out
refuse 'the adapter has num_virtual_tokens 4' train data.jsonl whole --num_virtual_tokens 9 --output_dir out
sed -i '/pre_seq_len/s/4/5/' whole/config.json
refuse 'whole/config.json|"pre_seq_len" is 5|a prefix of 4' chat whole --prompt hi
cp remote/config.json whole
refuse 'whole/config.json|"pre_seq_len" is 0|a prefix of 4' chat whole --prompt hi
refuse 'whole|has a prefix with its weights' chat lists/remote/checkpoint-1 --base whole --force --prompt hi
edit_header whole/model.safetensors 's/prefix_encoder.embedding.weight/prefix_encoder.embedding.wheight/'
refuse "whole|'transformer.prefix_encoder.embedding.weight' is missing" chat whole --prompt hi

# ---- A run in the place of a checkpoint --------------------------------------------------------------------------

mkdir -p lists/all/checkpoint-x lists/bare
echo '{}' >lists/bare/run.json
for command in 'chat lists/all --prompt hi' 'eval data.jsonl lists/all' 'merge lists/all/ out' 'info lists/all' \
    'check data.jsonl lists/all' 'dump lists/all ready.jsonl out' 'train data.jsonl lists/all --output_dir out' \
    'train data.jsonl m --output_dir out --resume_from_checkpoint lists/all'; do
    refuse 'lists/all|is a run; name lists/all/checkpoint-1' $command
done
works 'done' train data.jsonl two --output_dir lists/all $quick --max_steps 12 --save_steps 1 --force
refuse 'is a run; name lists/all/checkpoint-12' chat lists/all --prompt hi
refuse 'lists/bare: is a run that has no checkpoint yet' chat lists/bare --prompt hi
rm -rf lists whole whole.shards apart prefixed dumped two maps.yaml
