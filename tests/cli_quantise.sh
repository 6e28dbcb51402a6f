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
check 'whose index tells the bytes of all tensors' \
    grep -q "\"total_size\": $(($(wc -c <coded/4false/model.safetensors) - 8 - $(header_length coded/4false/model.safetensors)))}" coded/shards/model.safetensors.index.json
# The tokenizer beside the program goes along, also where the program's folder begins with the model's name.
mkdir coded/glm-program
cp -R "$tiny" coded/glm; cp "$program" coded/glm-program/program; cp "$bin" coded/glm-program/tokenizer.bin
told='quantize with a tokenizer beside the program'
coded/glm-program/program quantize "$PWD/coded/glm" coded/with --bits 8 >stdout 2>stderr && [ -s coded/with/tokenizer.bin ] ||
    want 'a tokenizer.bin'
judge
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
check 'config.json says so' grep -q '"dtype": "bfloat16"' coded/merged/config.json
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
refuse "coded/stranger: is not known to be what|coded/4true|'model.layers.0.self_attn.q_proj.weight'" merge coded/tuned-4true/checkpoint-4 out --base coded/stranger
works 'warning|does not give the codes of|move by' merge coded/tuned-4true/checkpoint-4 coded/forced --base coded/stranger --force
# One of another vocabulary has other logits, which no --force can compare; and a name that is empty names no base.
sed 's/"vocab_size": [0-9]*/"vocab_size": 300/' coded/config.json >coded/other.json
works 'parameters' init coded/other.json coded/narrow --layout glm4-chat
refuse "coded/narrow: is not what|coded/4true|'model.embed_tokens.weight'" merge coded/tuned-4true/checkpoint-4 out --base coded/narrow --force
cp -R coded/tuned-4true/checkpoint-4 coded/nameless
sed -i 's/"base_model_name_or_path": "[^"]*"/"base_model_name_or_path": ""/' coded/nameless/adapter_config.json
refuse "nameless/adapter_config.json|is no folder here|--base DIR" merge coded/nameless out
works 'loss' eval data.jsonl coded/onto4true
works '0 tensors hold numbers that are not finite' info coded/4true --check
works '4-bit codes (nf4) in 12 of them|mapped' info coded/4false
works '8-bit codes in 12 of them' info coded/tuned-8false/checkpoint-4
echo '{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}' >coded/ids.jsonl
works 'loss' dump coded/4false coded/ids.jsonl coded/dump.safetensors
refuse 'is quantised already' quantize coded/4false out --bits 4
refuse 'is an adapter' quantize coded/tuned-4false/checkpoint-4 out --bits 4
refuse 'exists already' quantize coded/plain coded/4false --bits 4
mkdir coded/fresh
works '' quantize coded/plain coded/fresh --bits 4
check 'a folder that is empty is as good as new' test -e coded/fresh/config.json
rm -rf coded/fresh
misuse '--bits is 4 or 8' quantize coded/plain out --bits 5
misuse '--double_quant|--bits 4' quantize coded/plain out --bits 8 --double_quant true
misuse '--quantization_bit|glmtune quantize' train data.jsonl coded/plain --quantization_bit 4
broken coded/plain; sed -i 's/"hidden_size"/"quantization_bit": 4, &/' bad/config.json
refuse 'quantization_bit|glmtune quantize bad OUT --bits 4' eval data.jsonl bad

# ---- Damaged ------------------------------------------------------------------------------------------------------

file=bad/model.safetensors q=model.layers.0.self_attn.q_proj.weight nf4=quant_state.bitsandbytes__nf4
remedy='download the folder again, or take the base and glmtune quantize'
echo '{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}' >coded/ids.jsonl
refuse_bad() { refuse "$1" eval coded/ids.jsonl bad; }

# WORDS BASE SED: names, types and shapes in the header are changed.
bad_header_of() { broken "$2"; edit_header $file "$3"; refuse_bad "$file|$1"; }
bad_header_of "'$q' is quantised|'absmax' is missing|$remedy" coded/4false "s/($q).absmax/\1.absmix/"
bad_header_of "'$q' is quantised|quant_map|$remedy" coded/4false "s/($q).quant_map/\1.quant_mop/"
bad_header_of "'$q'|U8 without scales|fp16 or bf16" coded/4false "s/($q).quant_state/\1.quent_state/"
bad_header_of "'$q' is quantised|quant_map|$remedy" coded/4false "s/($q).$nf4/\1.${nf4/nf4/fp4}/"
for part in nested_absmax nested_quant_map; do
    bad_header_of "'$q' is quantised|'$part' is missing|$remedy" coded/4true "s/$q.$part/$q.gone/"
done
bad_header_of "'$q'|I8 without scales|fp16 or bf16" coded/8false 's/0.self_attn.q_proj.SCB/0.self_attn.q_proj.SCC/'
bad_header_of "is [24, 16] of I8, not [16, 24] of 8-bit codes in I8|$remedy" coded/8false \
    "s/(\"${q/self_attn.q/mlp.down}\":[{]\"dtype\":\"I8\",\"shape\":\[)([0-9]+), ([0-9]+)/\1\3, \2/"
broken coded/8false; put $file "$(numbers_at $file "${q}_format")" '\1'
refuse_bad "$file|'$q' is quantised|another order|$remedy"
# An embedding as large as another matrix takes its place, codes and all.
sed 's/"vocab_size": [0-9]*/"vocab_size": 192/; s/"intermediate_size": [0-9]*/"intermediate_size": 96/' \
    coded/config.json >coded/even.json
works 'parameters' init coded/even.json coded/even
works '8 bits' quantize coded/even coded/even8 --bits 8
up=model.layers.0.mlp.gate_up_proj embed=model.embed_tokens
swap="s/\"$embed.weight\"/\"x\"/; s/\"$up.weight\"/\"$embed.weight\"/; s/\"x\"/\"$up.weight\"/"
bad_header_of "'$embed.weight' is quantised|embeddings of codes are not read|$remedy" coded/even8 \
    "$swap; s/$up.(SCB|weight_format)/$embed.\1/g"

# TENSOR TYPE [SHAPE] <BYTES: takes the place of a tensor, which gets another name, or stands beside all others.
instead() {
    cat >instead.bytes
    local begin=$(($(wc -c <$file) - $(header_length $file) - 8)) n=$(wc -c <instead.bytes)
    local entry="\"$1\":{\"dtype\":\"$2\",\"shape\":[${3:-$n}],\"data_offsets\":[$begin,$((begin + n))]}"
    edit_header $file "s/\"$1\":/\"$1.before\":/; s/\}\} *$/},$entry}/"
    cat instead.bytes >>$file
    rm instead.bytes
}

# BASE, TENSOR, TYPE, SHAPE, bytes (zeros), and what is said of it. The matrix is [16,16].
while read -r base tensor type shape bytes words <&3; do
    broken coded/$base
    zeros $bytes | instead $tensor $type $shape
    refuse_bad "$file: '$q' is quantised, but |$words|$remedy"
done 3<<END
4false $q.absmax F32 3 12 'absmax' is [3] of F32, not 4 floats
4false $q.absmax F32 5 20 'absmax' is [5] of F32, not 4 floats
4false $q.absmax F32 0 0 'absmax' is [0] of F32, not 4 floats
4false $q.absmax I64 4 32 'absmax' is [4] of I64, not 4 floats
4false $q.absmax BOOL 4 4 'absmax' is [4] of BOOL, not 4 floats
4false $q.absmax F16 8 16 'absmax' is [8] of F16, not 4 floats
4false $q.absmax U8 4 4 its scales are not in blocks of 256, with an offset
4false $q.quant_map F32 16 64 its 'quant_map' is not bitsandbytes' own
4false $q.quant_map F16 16 32 its 'quant_map' is not bitsandbytes' own
4false $q U8 127,1 127 it is [127, 1] of U8, not [16, 16] of 4-bit codes
4false $q U8 129,1 129 it is [129, 1] of U8, not [16, 16] of 4-bit codes
4false $q U8 0,1 0 it is [0, 1] of U8, not [16, 16] of 4-bit codes
4false $q F32 128,1 512 it is [128, 1] of F32, not [16, 16] of 4-bit codes
4false ${q/weight/SCB} F32 16 64 scales of two kinds stand beside it
4false ${q}_scale F32 16 64 scales of two kinds stand beside it
4false $q.${nf4/nf4/fp4} U8 9 9 scales of two kinds stand beside it
4true $q.absmax U8 3 3 'absmax' is 3 codes, not 4
4true $q.absmax U8 0 0 'absmax' is 0 codes, not 4
4true $q.nested_absmax F32 0 0 'nested_absmax' is [0] of F32, not 1 floats
4true $q.nested_absmax I32 1 4 'nested_absmax' is [1] of I32, not 1 floats
4true $q.nested_quant_map F32 255 1020 'nested_quant_map' is [255] of F32, not 256 floats
8false ${q/weight/SCB} F32 15 60 'SCB' is [15] of F32, not 16 floats
8false ${q/weight/SCB} F32 17 68 'SCB' is [17] of F32, not 16 floats
8false ${q/weight/SCB} I32 16 64 'SCB' is [16] of I32, not 16 floats
8false $q I8 16,15 240 it is [16, 15] of I8, not [16, 16] of 8-bit codes in I8
8false $q U8 16,16 256 it is [16, 16] of U8, not [16, 16] of 8-bit codes in I8
8false $q F32 16,4 256 it is [16, 4] of F32, not [16, 16] of 8-bit codes in I8
8false ${q}_format U8 0 0 its numbers are in another order
8false ${q}_format U8 2 2 its numbers are in another order
END

sound='{"blocksize": 64, "shape": [16, 16]'
# BASE~what is said of it~the state of 4-bit codes, as printf takes it.
while IFS='~' read -r base words json <&3; do
    broken coded/$base
    printf "$json" | instead $q.$nf4 U8
    refuse_bad "$file: '$q|$words"
done 3<<END
4false~$nf4':1:1: this is no JSON: it is empty~
4false~$nf4':1:1: this is no JSON: a value was expected~\377\376
4false~$nf4':1:13: this is no JSON: a colon~{"blocksize"
4false~$nf4':1:15: this is no JSON: a value was expected~{"blocksize": xx}
4false~$nf4':1:17: this is no JSON: a comma or }~{"blocksize": 64\0}
4false~this is no JSON: the text is not UTF-8~{"blocksize": 64, "quant_type": "\377"}
4false~this is no JSON: the file ends inside a string~{"blocksize": 64, "shape": [16, 16], "quant_type
4false~this is no JSON: a comma or ]~{"blocksize": 64, "shape": [16  16]}
4false~this is no JSON: nested deeper than 100 levels~$(repeated '[' 10000)
4false~"blocksize" in its state is not 64 or 128|$remedy~[]
4false~"blocksize" in its state is not 64 or 128|$remedy~7
4false~"blocksize" in its state is not 64 or 128|$remedy~null
4false~"blocksize" in its state is not 64 or 128|$remedy~{"shape": [16, 16]}
4false~"blocksize" in its state is not 64 or 128|$remedy~{"blocksize": 0, "shape": [16, 16]}
4false~"blocksize" in its state is not 64 or 128|$remedy~{"blocksize": 32, "shape": [16, 16]}
4false~"blocksize" in its state is not 64 or 128|$remedy~{"blocksize": 64.5, "shape": [16, 16]}
4false~"blocksize" in its state is not 64 or 128|$remedy~{"blocksize": -64, "shape": [16, 16]}
4false~"blocksize" in its state is not 64 or 128|$remedy~{"blocksize": 1e308, "shape": [16, 16]}
4false~"blocksize" in its state is not 64 or 128|$remedy~{"blocksize": "64", "shape": [16, 16]}
4false~'absmax' is [4] of F32, not 2 floats|$remedy~{"blocksize": 128, "shape": [16, 16]}
4false~another shape than config.json wants|$remedy~{"blocksize": 64}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": [16]}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": [16, 16, 1]}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": []}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": [8, 32]}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": [16, 1e300]}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": [-16, 16]}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": "[16, 16]"}
4false~another shape than config.json wants|$remedy~{"blocksize": 64, "shape": {"16": 16}}
4true~not in blocks of 256, with an offset|$remedy~$sound, "nested_blocksize": 128, "nested_offset": 1}
4true~not in blocks of 256, with an offset|$remedy~$sound, "nested_offset": 1}
4true~not in blocks of 256, with an offset|$remedy~$sound, "nested_blocksize": 256}
4true~"nested_offset" must be a number from~$sound, "nested_blocksize": 256, "nested_offset": NaN}
4true~"nested_blocksize" must be a number from~$sound, "nested_blocksize": "256", "nested_offset": 1}
END

for bytes in 0 7 100 -1; do
    broken coded/4true; truncate -s $bytes $file
    refuse_bad "$file: is |download it again"
done

# Scales, and what codes stand for, that are not finite.
broken coded/4false; at=$(numbers_at $file "$q.quant_map")
put $file "$at" '\377\377\377\177'
refuse_bad "$file|'$q' is quantised|quant_map|$remedy"
broken coded/4false         # the right values and one more
{ tail -c +$((at + 1)) $file | head -c 64; zeros 4; } | instead $q.quant_map F32 17
refuse_bad "$file|'$q' is quantised|quant_map|$remedy"
finds() {                       # WHAT TENSOR: the check of a folder finds it
    run info bad --check
    [ "$status" = 1 ] && grep -q "'$2' has a number that is not finite, at 0" stdout || want 'the first bad number'
    told="info --check finds $1"
    judge
}
while read -r base tensor <&3; do
    broken coded/$base; put $file "$(numbers_at $file "$tensor")" '\377\377\377\177'
    finds "$tensor, not finite" $q
done 3<<END
4false $q.absmax
4true $q.nested_absmax
8false ${q/weight/SCB}
END

# ChatGLM's own releases: SED on the bytes of their file, where K and a byte are a size. The matrix is [60,52].
torch=bad/pytorch_model.bin p=transformer.encoder.layers.0.self_attention.query_key_value.weight
while IFS='~' read -r bits words edit <&3; do
    broken "$tests/golden/quant_release$bits/base"; sed -i -E "$edit" $torch
    refuse_bad "$torch: '$p' is |$words"
done 3<<END
8~I8 without scales|fp16 or bf16~s/(0.self_attention.query_key_value.weight_scal)e/\1a/
4~I8 without scales|fp16 or bf16~s/(0.self_attention.query_key_value.weight_scal)e/\1a/
8~quantised, but 'weight_scale' is [59] of F16, not 60 floats|$remedy~s/K<(\x85q"K\x01)/K;\1/
4~quantised, but 'weight_scale' is [59] of F16, not 60 floats|$remedy~s/K<(\x85q"K\x01)/K;\1/
8~quantised, but 'weight_scale' is [60] of I8, not 60 floats|$remedy~s/h\x04(X\x01\x00+3q )/h\x17\1/
8~quantised, but it is [60, 51] of I8, not [60, 52] of 8-bit codes in I8|$remedy~s/K<K4(\x86q\x1a)K4/K<K3\1K3/
4~quantised, but it is [60, 25] of I8, not [60, 52] of 8-bit codes|$remedy~s/K<K\x1A(\x86q\x1A)K\x1A/K<K\x19\1K\x19/
8~quantised, but it is [59, 52] of I8, not [60, 52] of 8-bit codes in I8|$remedy~s/K<(K4\x86q\x1a)/K;\1/
END
for bits in 8 4; do
    broken "$tests/golden/quant_release$bits/base"
    at=$(grep -abo -m 1 'data/3FB' $torch | head -n 1 | cut -d : -f 1)        # numbers follow a field of that length
    put $torch $((at + 10 + $(od -An -tu1 -j $((at + 8)) -N 1 $torch))) '\377\177'
    finds "a scale of $bits bits that is not finite" $p
    broken "$tests/golden/quant_release$bits/base"; truncate -s 20000 $torch
    refuse_bad "$torch: is a zip archive, but cut off or damaged; download it again"
    broken "$tests/golden/quant_release$bits/base"; sed -i 's/\("quantization_bit": \)[48]/\13/' bad/config.json
    refuse_bad 'bad/config.json: "quantization_bit" is 3, ChatGLM has 4 and 8'
    sed -i "s/\(\"quantization_bit\": \)3/\1$((12 - bits))/" bad/config.json
    refuse_bad "'$p' is quantised, but its codes are not of $((12 - bits)) bits, as|quantization_bit"
done
rm -rf coded bad
