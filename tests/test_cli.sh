#!/usr/bin/env bash
# Meets glmtune as its users do, from the command line. What cannot work must end in one line that says what, where and
# what to do, with exit status 1 (bad usage: 2), and leave nothing half-written; what can work must work.
#
#     tests/test_cli.sh [PROGRAM]        PROGRAM is ./glmtune unless named; a tokenizer.bin must lie beside it
#
# Prints the checks that fail, with GLM_VERBOSE=1 the others too, and closes with their numbers. Needs bash, coreutils,
# sed, grep, awk and find; works in a temporary folder and takes it away again.
set -u -f
export LC_ALL=C OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

program=${1:-./glmtune}
[ -x "$program" ] || { echo "$0: $program is no program; build it first (make)" >&2; exit 2; }
tests=$(cd "$(dirname "$0")" && pwd)
beside=$(cd "$(dirname "$program")" && pwd)
program=$beside/$(basename "$program")
[ -f "$beside/tokenizer.bin" ] || { echo "$0: there is no $beside/tokenizer.bin" >&2; exit 2; }

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work" || exit 2
exec </dev/null
passed=0 failed=0 limit='' may_begin='' wanted='' told=''
# Under the sanitizers, where a computation takes ten times as long: what they can add nothing to is left out.
sanitized='' patience=100
! grep -q __asan_init "$program" || sanitized=yes patience=300

# ---- Helpers: running and judging --------------------------------------------------------------------------------

# Runs glmtune under $limit (ulimit's words, or nothing); leaves stdout, stderr and $status.
run() {
    told="glmtune $*"
    if [ -n "$limit" ]; then
        (trap '' XFSZ; ulimit $limit; exec timeout $patience "$program" "$@") >stdout 2>stderr
    else
        timeout $patience "$program" "$@" >stdout 2>stderr
    fi
    status=$?
}

want() { wanted="$wanted${wanted:+; }$1"; }     # notes what the last run should have done and did not

# Counts the last run: passed when nothing is noted. [STDOUT STDERR]: the files to show when it failed.
judge() {
    if [ -z "$wanted" ]; then
        passed=$((passed + 1))
        [ -z "${GLM_VERBOSE:-}" ] || { echo "ok      $told"; sed -n 's/^glmtune: /            /p' "${2:-stderr}"; }
    else
        failed=$((failed + 1))
        printf 'FAILED  %s\n  expected: %s\n  got: exit status %s\n' "$told" "$wanted" "$status"
        sed 's/^/       stdout: /' "${1:-stdout}" | head -n 5 | cut -c1-300
        sed 's/^/       stderr: /' "${2:-stderr}" | head -n 12 | cut -c1-300
        [ "$(wc -l <"${2:-stderr}")" -le 12 ] || echo '       stderr: ... and more'
    fi
    wanted=''
}

want_words() {                  # FILE WORDS: all of them, separated by |, stand in the file
    local list word
    IFS='|' read -r -a list <<<"$2"
    for word in "${list[@]}"; do grep -qF -e "$word" "$1" || want "the words \"$word\""; done
}

want_clean() {                  # no temporary file, and no output but what a run that has begun may leave
    local left
    left=$(find . -name '*.tmp*')
    [ -z "$left" ] || want "nothing left behind, and there is $left"
    if [ -n "$may_begin" ]; then left=$(find out -type f ! -name log.jsonl ! -name loss.svg ! -name run.json 2>stdout.find; find out -name 'checkpoint-*')
    else left=$(find . -path ./out); fi
    [ -z "$left" ] || want "no output, and there is $left"
    rm -rf out stdout.find
    find . -name '*.tmp*' -prune -exec rm -rf {} +
}

# STATUS WORDS COMMAND...: ends with this status and one line of error, which holds the words; lines of progress may
# stand before it.
expect_error() {
    local expected=$1 words=$2
    shift 2
    run "$@"
    tail -n 1 stderr >last
    [ "$status" = "$expected" ] || want "exit status $expected"
    [ "$(grep -c '^glmtune: ' stderr)" = 1 ] && grep -q '^glmtune: ' last || want "one line of error, as the last"
    ! grep -qvE '^(glmtune: |data: |training: |time: |disk: |replay: |settings: |model: |memory: |labels as |warning: |note: |step [0-9]|[a-z0-9]*[.]yaml: )' \
        stderr || want "no other lines"
    [ ! -s stdout ] || want "nothing on stdout"
    want_words last "$words"
    want_clean
    judge
}

refuse() { expect_error 1 "$@"; }                               # bad input
misuse() { expect_error 2 "$@"; }                               # bad usage
stops() { may_begin=yes; expect_error 1 "$@"; may_begin=''; }   # an error after training began: log.jsonl may be there

works() {                       # WORDS COMMAND...: succeeds, and prints the words
    local words=$1
    shift
    run "$@"
    cat stdout stderr >printed
    [ "$status" = 0 ] || want "exit status 0"
    ! grep -q '^glmtune: ' stderr || want "no error"
    want_words printed "$words"
    [ -z "$(find . -name '*.tmp*')" ] || want "no temporary file left"
    judge
}

check() {                       # WHAT COMMAND...: the shell's command succeeds; stdout and stderr of the last run stay
    told=$1
    shift
    "$@" >checked.out 2>checked.err
    status=$?
    [ "$status" = 0 ] || want "success of: $*"
    judge checked.out checked.err
}

await() {                       # COMMAND...: waits until it succeeds; two minutes at most
    local i
    for i in $(seq 1200); do
        ! "$@" || return 0
        sleep 0.1
    done
    return 1
}

has_lines() { [ "$(wc -l <"$1")" -ge "$2" ]; }      # FILE NUMBER: at least so many

skip() { [ -z "${GLM_VERBOSE:-}" ] || echo "skipped $1"; }

# ---- Helpers: making and damaging files --------------------------------------------------------------------------

le8() {                         # NUMBER: as eight bytes, lowest first
    local n=$1 i
    for i in 1 2 3 4 5 6 7 8; do printf "\\$(printf %03o $((n & 255)))"; n=$((n >> 8)); done
}

zeros() { head -c "$1" /dev/zero; }

tensor_file() {                 # FILE HEADER BYTES: a safetensors file with that header and so many zeros
    { le8 ${#2}; printf %s "$2"; zeros "$3"; } >"$1"
}

header_length() { head -c 8 "$1" | od -An -tu8 | tr -d ' '; }
header_of() { tail -c +9 "$1" | head -c "$(header_length "$1")"; }

edit_header() {                 # FILE SED [BYTES]: edits the header; BYTES more (or fewer) at the end
    local header n=${3:-0}
    header=$(header_of "$1" | sed -E "$2")
    tail -c +$((9 + $(header_length "$1"))) "$1" >numbers
    [ "$n" -ge 0 ] && zeros "$n" >>numbers || truncate -s "$n" numbers
    { le8 ${#header}; printf %s "$header"; cat numbers; } >"$1"
    rm numbers
}

numbers_at() {                  # FILE TENSOR: where in the file the tensor's first number lies
    local begin
    begin=$(header_of "$1" | sed -E "s/.*\"$2\":[{][^}]*\"data_offsets\":\[([0-9]+),.*/\1/")
    echo $((8 + $(header_length "$1") + begin))
}

add_tensor() {                  # FILE NAME: one more tensor, a single F32
    local n=$(($(wc -c <"$1") - $(header_length "$1") - 8))
    edit_header "$1" "s/\}\} *$/},\"$2\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[$n,$((n + 4))]}}/" 4
}

put() {                         # FILE PLACE BYTES: writes over what is there; BYTES as printf takes them
    printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}

repeated() { zeros "$2" | tr '\0' @ | sed "s/@/$1/g"; }      # WORD N: the word N times

broken() { rm -rf bad; cp -R "${1:-m}" bad; }       # [FOLDER]: a copy, to be damaged

# WORDS LINE: a data file whose second line is LINE is refused, by file:line:column; @ marks the column and is left out.
bad_line() {
    local before=${2%%@*} column where=bad.jsonl:2
    { head -n 1 data.jsonl; printf '%s\n' "${2/@/}"; head -n 1 data.jsonl; } >bad.jsonl
    column=$(($(printf %s "$before" | tr -d '\200-\277' | wc -c) + 1))
    case $2 in *@*) where=$where:$column: ;; esac
    refuse "$where|$1" train bad.jsonl m --output_dir out
}

# WORDS SED [CONFIG]: a config.json so edited is refused by init and by info, with its name and the words.
bad_config() {
    sed -E "$2" "${3:-glm.json}" >bad.json
    refuse "bad.json|$1" init bad.json out
    refuse "bad.json|$1" info bad.json
}

# WORDS HEADER BYTES: a model whose weights are a file with this header is refused.
bad_header() {
    tensor_file bad_header/model.safetensors "$2" "$3"
    refuse "bad_header/model.safetensors|$1" train data.jsonl bad_header --output_dir out
}

# OPTION VALUE: this is no number, or none that the option takes.
no_number() { misuse "--$1|number, not '$2'" train data.jsonl m --output_dir out "--$1" "$2"; }
no_range() { misuse "--$1|from|to|not $2" train data.jsonl m --output_dir out "--$1" "$2"; }

# ---- Models and data ---------------------------------------------------------------------------------------------

cat >glm.json <<'END'
{
  "model_type": "glm",
  "vocab_size": 2710,
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 512,
  "attention_bias": true,
  "tie_word_embeddings": false
}
END
cat >chatglm.json <<'END'
{
  "model_type": "chatglm",
  "padded_vocab_size": 2710,
  "hidden_size": 16,
  "num_layers": 1,
  "num_attention_heads": 4,
  "multi_query_attention": true,
  "multi_query_group_num": 2,
  "kv_channels": 4,
  "ffn_hidden_size": 24,
  "seq_length": 512,
  "add_qkv_bias": true
}
END
for i in 1 2 3 4 5 6 7 8; do
    echo "{\"messages\": [{\"role\": \"user\", \"content\": \"第$i question?\"}," \
         "{\"role\": \"assistant\", \"content\": \"answer $i 好\"}]}"
done >data.jsonl
for i in 3 5 7 9; do echo "{\"input_ids\": [1, $i, 6, 8, 10], \"labels\": [-100, -100, 6, 8, 10]}"; done >ready.jsonl
text='GLM-4：你好, world! 123456 ½ 🙂  two  blanks
	tab, line break; <|user|> is plain text'

works 'parameters' init glm.json m --layout glm4-chat
works 'parameters' init glm.json f --layout glm4-chat --dtype f32
works 'parameters' init glm.json shards --layout glm4-chat --max_shard_size 0.00001
works 'parameters' init chatglm.json remote
check 'init writes config.json and weights' test -f m/config.json -a -f m/model.safetensors
check 'init writes an index beside shards' test -f shards/model.safetensors.index.json
weights=m/model.safetensors

# ---- Bad usage ---------------------------------------------------------------------------------------------------

run
told='glmtune (no arguments)'
[ "$status" = 2 ] || want 'exit status 2'
cat stdout stderr >printed
want_words printed 'train|chat|merge|init'
judge
misuse 'trian|train' trian data.jsonl m
misuse 'train|DATA MODEL' train
misuse 'train|DATA MODEL' train data.jsonl
misuse 'train|DATA MODEL' train data.jsonl m --max_steps 1 surplus
misuse 'chat|MODEL' chat
misuse 'merge|ADAPTER OUT' merge m
misuse 'init|CONFIG OUT' init glm.json
misuse 'dump|MODEL BATCH OUT' dump m ready.jsonl
misuse 'tokenize' tokenize
misuse 'info|PATH' info
misuse '--leaning_rate|--learning_rate' train data.jsonl m --leaning_rate 1e-4
misuse '--lora-alpha|--lora_alpha' train data.jsonl m --lora-alpha 8
misuse '--maxsteps|--max_steps' train data.jsonl m --maxsteps=8
misuse "--promt|--prompt" chat m --promt hello
misuse "--r |chat" chat m --r 8
misuse '--r wants a value' train data.jsonl m --r
misuse '--r wants a value' train data.jsonl m --r --max_steps 2
misuse '--output_dir wants a value|behind =' train data.jsonl m --output_dir --force
misuse "'-r': an option begins with two hyphens" train data.jsonl m -r 8
misuse "'–r': an option begins with two hyphens" train data.jsonl m –r 8
misuse "'surplus' has no place here|usage: glmtune merge" merge m out surplus
misuse "'v_proj' has no place here" train data.jsonl m --target_modules q_proj v_proj
misuse '--lr is|--learning_rate' train data.jsonl m --lr 1e-3
misuse '--lora_rank is|called --r' train data.jsonl m --lora_rank 4
misuse '--train_file|glmtune train DATA MODEL' train --train_file data.jsonl --model_name_or_path m
for value in True yes 1 on; do
    works 'gradient_checkpointing=true' train data.jsonl m --gradient_checkpointing $value --output_dir flags --max_steps 1 --force
done
works 'done' train data.jsonl m --predict_with_generate no --gradient_checkpointing=False --output_dir flags --max_steps -1 \
    --num_train_epochs 1 --force
check 'neither is set' test "$(grep -cE 'predict_with|gradient_check' stderr)" = 0
works 'warning: --num_virtual_tokens is for --method ptuning; here lora trains' train data.jsonl m --num_virtual_tokens 8 \
    --output_dir flags --max_steps 1 --force
rm -rf flags
misuse '--prompt' chat m --prompt
misuse '--force|maybe' train data.jsonl m --force=maybe
misuse '--method|lora|full|lorra' train data.jsonl m --method lorra
misuse '--lr_scheduler_type|cosine|step' train data.jsonl m --lr_scheduler_type step
misuse '--overlong|error|drop|cut' train data.jsonl m --overlong cut
misuse '--dtype|bf16|int8' init glm.json out --dtype int8
for value in 8x 1e '' 0x10 nan inf ' 8' '8 ' 8.5 8,5 ８; do no_number r "$value"; done
for value in 1e-4x 1e '' 0x10 ' 1' '1 ' 0,1 1e-4.5 1e-4e; do no_number learning_rate "$value"; done
for value in 0 -1 70000 1e400 -1e400; do no_range r "$value"; done
for value in nan inf; do no_number learning_rate "$value"; done
for value in -1 -1e-9 1e400; do no_range learning_rate "$value"; done
for value in 1.5 1e-3 42nd; do no_number seed "$value"; done
for value in -1 1e19; do no_range seed "$value"; done
for value in 0 -5 99999999999999999999; do no_range per_device_train_batch_size "$value"; done
for value in 1 1.5 -0.1; do no_range lora_dropout "$value"; done
misuse '--max_new_tokens|0' chat m --prompt hi --max_new_tokens 0

# ---- Help: what it lists is what the parser takes ----------------------------------------------------------------

works 'MODEL|--help' --help
commands=$(sed -n 's/^  glmtune \([a-z]*\) .*/\1/p' stdout)
for command in train chat merge tokenize dump gradcheck info init; do
    check "--help lists $command" grep -q "^$command$" <<<"$commands"
done
for command in $commands; do
    works "glmtune $command" "$command" --help
    sed -n 's/^  --\([a-z0-9_]*\) .*/\1/p' stdout >"listed.$command"
    told="glmtune $command --help: each option has a text"
    [ -z "$(grep -E '^  --[a-z0-9_]+ *$' stdout)" ] || want 'an explanation of every option'
    judge
done
all_options=$(set +f; sort -u listed.*)
for command in $commands; do
    odd=''
    for option in $all_options; do      # an empty value ends the run before it does anything, with one error or another
        run "$command" "--$option="
        [ "$status" != 0 ] || [ "$command" = gradcheck ] || odd="$odd --$option (ran)"
        takes=yes lists=no
        ! grep -q 'is no option' stderr || takes=no
        ! grep -qx "$option" "listed.$command" || lists=yes
        [ $takes = $lists ] || odd="$odd --$option (help: $lists, parser: $takes)"
    done
    check "glmtune $command takes the options that its help lists and no others" test -z "$odd"
done
for option in method r lora_alpha lora_dropout use_rslora target_modules learning_rate lr_scheduler_type warmup_ratio \
    warmup_steps num_train_epochs max_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed layout \
    base label_smoothing_factor per_device_train_batch_size gradient_accumulation_steps max_input_length \
    max_output_length overlong official_mask combine eval_file val_size eval_steps output_dir logging_steps \
    save_steps save_total_limit force threads; do
    check "train --help lists --$option" grep -qx -e "$option" listed.train
done

# ---- config.json -------------------------------------------------------------------------------------------------

mkdir empty
refuse 'nowhere' train data.jsonl nowhere --output_dir out
refuse 'empty/config.json|missing' train data.jsonl empty --output_dir out
refuse 'empty/config.json|missing' info empty
refuse 'empty/config.json|missing' chat empty --prompt hi
refuse 'nowhere.json|missing' init nowhere.json out
bad_config "model_type|llama|chatglm" 's/"glm"/"llama"/'
bad_config 'model_type' '/model_type/d'
bad_config 'ChatGLM-6B|ChatGLM2-6B' 's/"hidden_size"/"inner_hidden_size": 64, &/' chatglm.json
bad_config 'ChatGLM-6B|ChatGLM2-6B' '/multi|ffn|"kv/d; s/"hidden_size"/"position_encoding_2d": true, &/' chatglm.json
bad_config 'quantised by awq|fp16 or bf16|glmtune quantize' 's/"hidden_size"/"quantization_config": {"quant_method": "awq"}, &/'
bad_config 'quantised by a method|fp16 or bf16' 's/"hidden_size"/"quantization_config": {"bits": 4}, &/'
bad_config 'rope_scaling' 's/"hidden_size"/"rope_scaling": {"type": "yarn", "factor": 4}, &/'
bad_config 'rope_scaling, yarn|up to 32768 tokens|remove the key' \
    's/"hidden_size"/"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}, &/'
bad_config 'rope_scaling, linear' 's/"hidden_size"/"rope_scaling": {"type": "linear", "factor": 4}, &/'
bad_config 'vision part|model of text' 's/"hidden_size"/"vision_config": {"image_size": 672}, &/'
bad_config 'vision part|model of text' 's/"hidden_size"/"vision_config": {"image_size": 1120}, &/' chatglm.json
bad_config "'glm4_moe', a mixture of experts|glmtune tunes" 's/"glm"/"glm4_moe"/'
bad_config "'glm4v', with a vision part|glmtune tunes" 's/"glm"/"glm4v"/'
bad_config 'GLM-10B|take GLM-4' '/num_hidden|kv|key_value|intermediate|max_pos/d; s/"hidden_size"/"max_sequence_length": 1024, &/'
bad_config 'divides positions by rope_ratio|ChatGLM3-6B-32k' \
    's/"hidden_size"/"rope_ratio": 4, "_name_or_path": "THUDM\/chatglm2-6b-32k", &/' chatglm.json
mkdir own_code
sed 's/"hidden_size"/"rope_ratio": 4, &/' chatglm.json >own_code/config.json
echo 'seq_idx = torch.arange(seq_len, dtype=dtype, device=device) / self.rope_ratio' >own_code/modeling_chatglm.py
refuse 'own_code/config.json|divides positions by rope_ratio' info own_code --check
echo 'base = base * self.rope_ratio' >own_code/modeling_chatglm.py
works 'theta 40000' info own_code
rm -rf own_code
bad_config 'hidden_act|gelu' 's/"hidden_size"/"hidden_act": "gelu", &/'
bad_config '"hidden_size"|missing' '/"hidden_size"/d'
for key in vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim \
    intermediate_size; do
    for value in -16 0 1.5 1e15 '"16"' null NaN true; do
        bad_config "\"$key\"|whole number" "s/\"$key\": [0-9]+/\"$key\": $value/"
    done
done
for key in padded_vocab_size num_layers multi_query_group_num kv_channels ffn_hidden_size seq_length; do
    bad_config "\"$key\"|whole number" "s/\"$key\": [0-9]+/\"$key\": -1/" chatglm.json
    bad_config "\"$key\"|whole number" "s/\"$key\": [0-9]+/\"$key\": 1e300/" chatglm.json
done
# of two names that of its own kind counts
bad_config '"vocab_size"|whole number' 's/"vocab_size": /"padded_vocab_size": 2710, "vocab_size": -/'
bad_config '"padded_vocab_size"|whole number' 's/"padded_vocab_size": /"vocab_size": 2710, &-/' chatglm.json
sed 's/"num_hidden_layers": 1/"num_hidden_layers": 2/' glm.json >two.json
works 'parameters' init two.json fewer --layout glm4-chat
cp m/config.json fewer
refuse "'model.layers.1.|has no place in the model that config.json describes" train data.jsonl fewer --output_dir out
rm -rf fewer two.json
bad_config '4 attention heads|3 key/value heads' 's/"num_key_value_heads": 2/"num_key_value_heads": 3/'
bad_config '3 attention heads|2 key/value heads' 's/"num_attention_heads": 4/"num_attention_heads": 3/' chatglm.json
bad_config 'rotary' 's/"head_dim": 4/"head_dim": 5, "partial_rotary_factor": 1.0/'
bad_config 'partial_rotary_factor' 's/"hidden_size"/"partial_rotary_factor": 2, &/'
bad_config 'rms_norm_eps' 's/"hidden_size"/"rms_norm_eps": -1, &/'
sed -E 's/("vocab_size": 2710),/\1/' glm.json >no_comma.json
bad_config 'bad.json:4:3: |JSON' '' no_comma.json
bad_config 'bad.json:2:17: |JSON' 's/"glm"/glm/'
printf '' >bad.json
refuse 'bad.json|empty' info bad.json
repeated '[' 100000 >bad.json
refuse 'bad.json:1:|nested' info bad.json
{ printf '{"model_type": "glm", "x": '; repeated '{"a":' 100000; } >bad.json
refuse 'bad.json:1:|nested' init bad.json out
printf '[1, 2]' >bad.json
refuse 'bad.json' info bad.json
printf 'model_type: glm' >bad.json
refuse 'bad.json:1:1: |JSON' init bad.json out
printf '{"model_type": "glm"} {}' >bad.json
refuse 'bad.json:1:23: |JSON' info bad.json

# ---- Weights -----------------------------------------------------------------------------------------------------

broken; rm bad/model.safetensors
refuse 'bad|model.safetensors' train data.jsonl bad --output_dir out
broken; rm bad/model.safetensors; echo 'weights, some day' >bad/pytorch_model.bin
refuse 'bad/pytorch_model.bin: |safetensors' chat bad --prompt hi

index=model.safetensors.index.json
second=$(sed -n 's/.*"\(model-00002-of-[0-9]*.safetensors\)".*/\1/p' shards/$index | head -n 1)
broken shards; rm "bad/$second"
refuse "bad/$second|missing" train data.jsonl bad --output_dir out
broken shards; truncate -s -2 "bad/$second"
refuse "bad/$second|cut off|download" train data.jsonl bad --output_dir out
broken shards; truncate -s 5 "bad/$second"
refuse "bad/$second|download" train data.jsonl bad --output_dir out
broken shards; : >"bad/$second"
refuse "bad/$second|download" chat bad --prompt hi
broken shards; sed -i.old 's/"weight_map"/"weights"/' bad/$index; rm bad/$index.old
refuse "bad/$index|weight_map" chat bad --prompt hi
broken shards; truncate -s -20 bad/$index
refuse "bad/$index:|JSON" chat bad --prompt hi
broken shards; sed -i.old "s/\"$second\"/\"..\/m\/model.safetensors\"/" bad/$index; rm bad/$index.old
refuse "bad/$index" chat bad --prompt hi
broken shards; sed -i.old 's/"model.norm.weight"/"model.norm.wait"/' bad/$index; rm bad/$index.old
refuse "bad/$index|'model.norm.wait'" chat bad --prompt hi
broken shards; cp $weights bad/copy.safetensors
sed -i.old 's/"model.norm.weight": "[^"]*"/"model.norm.weight": "copy.safetensors"/' bad/$index; rm bad/$index.old
refuse "bad/copy.safetensors|twice|'" chat bad --prompt hi

broken; truncate -s -100 bad/model.safetensors
refuse "bad/model.safetensors|'lm_head.weight'|cut off|100 bytes|download" train data.jsonl bad --output_dir out
broken; zeros 100 >>bad/model.safetensors
refuse 'bad/model.safetensors|100 bytes' train data.jsonl bad --output_dir out

cat >pointer <<'END'
version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 1018370
END
broken; cp pointer bad/model.safetensors                            # what a clone without git-lfs brings
refuse 'bad/model.safetensors|download' chat bad --prompt hi

mkdir bad_header
cp m/config.json bad_header
a='"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
b() { echo "{$a,\"b\":{\"dtype\":\"${2:-F32}\",\"shape\":${3:-[2]},\"data_offsets\":$1}}"; }
bad_header "'a' and 'b' overlap|download" "$(b '[4,12]')" 12
bad_header "'b'|hole|download" "$(b '[12,20]')" 20
bad_header "'b'|cut off|4 bytes|download" "$(b '[8,16]')" 12
bad_header "'b'|download" "$(b '[1099511627776,1099511627784]')" 12
bad_header "'b'|data_offsets|download" "$(b '[8,12]')" 16
bad_header "'b'|data_offsets|download" "$(b '[8,16]' F32 '[3]')" 16
bad_header "'b'|data_offsets|download" "$(b '[16,8]')" 16
bad_header "'b'|data_offsets" "$(b '[-8,0]')" 16
bad_header "'b'|data_offsets" "$(b '[8.5,16.5]')" 16
bad_header "'b'|data_offsets" "$(b '[1e300,1e300]')" 16
bad_header "'b'|data_offsets" "$(b '[8]')" 16
bad_header "'b'|data_offsets" "$(b '"8,16"')" 16
bad_header "'b'|unknown dtype|'F33'" "$(b '[8,16]' F33)" 16
bad_header "'b'|dimensions" "$(b '[8,16]' F32 '[1,1,1,1,2]')" 16
bad_header "'b'|shape" "$(b '[8,16]' F32 '[-2]')" 16
bad_header "'b'|shape" "$(b '[8,16]' F32 '[1.5]')" 16
bad_header "'b'" "$(b '[8,16]' F32 '[4294967296,4294967296,4294967296]')" 16
bad_header "'b'" "$(b '[8,16]' F32 '[9007199254740992,1024]')" 16
bad_header "'b'" "{$a,\"b\":7}" 16
bad_header 'JSON' "{$a" 8
bad_header 'JSON' 'rubbish' 8
bad_header 'JSON' '[]' 0
bad_header 'nested' "{\"a\":$(repeated '[' 100000)" 0
tensor_file bad_header/model.safetensors '{}' 0
refuse "bad_header|'model.embed_tokens.weight'" train data.jsonl bad_header --output_dir out
{ le8 1000; printf '{%s}' "$a"; zeros 8; } >bad_header/model.safetensors
refuse 'bad_header/model.safetensors|header|1000 bytes|download' train data.jsonl bad_header --output_dir out
{ le8 -1; printf '{%s}' "$a"; zeros 8; } >bad_header/model.safetensors
refuse 'bad_header/model.safetensors|header|download' chat bad_header --prompt hi
{ le8 0; zeros 100; } >bad_header/model.safetensors
refuse 'bad_header/model.safetensors' chat bad_header --prompt hi
rm bad_header/model.safetensors; mkdir bad_header/model.safetensors
refuse 'bad_header/model.safetensors|folder' chat bad_header --prompt hi

q=model.layers.0.self_attn.q_proj.weight
broken; edit_header bad/model.safetensors 's/(gate_up_proj.weight":[^]]*\[)48, ?16\]/\116,48]/'
refuse "bad/model.safetensors|gate_up_proj.weight'|[16, 48]|[48, 16]" train data.jsonl bad --output_dir out
broken; edit_header bad/model.safetensors 's/(gate_up_proj.weight":[^]]*\[)48, ?16\]/\1768]/'
refuse "bad/model.safetensors|gate_up_proj.weight'|[768]|[48, 16]" chat bad --prompt hi
broken; edit_header bad/model.safetensors "s/$q/model.layers.0.q_proj.weight/"
refuse "bad|'$q'" train data.jsonl bad --output_dir out
broken; add_tensor bad/model.safetensors extra
refuse "bad/model.safetensors|'extra'" train data.jsonl bad --output_dir out
broken; edit_header bad/model.safetensors 's/v_proj.weight/k_proj.weight/'
refuse "bad/model.safetensors|twice|k_proj.weight'" train data.jsonl bad --output_dir out
# The last tensor, lm_head, as releases in 8 and in 4 bits would hold it.
n=$(($(wc -c <$weights) - $(header_length $weights) - 8)) half=$((2710 * 16))
head='("lm_head.weight":[{]"dtype":")BF16(","shape":)\[2710, ?16\](.*),[0-9]+\]'
broken; edit_header bad/model.safetensors "s/$head/\\1I8\\2[2710,16]\\3,$((n - half))]/" -$half
refuse "bad/model.safetensors|'lm_head.weight'|I8|quantis|download" train data.jsonl bad --output_dir out
broken; edit_header bad/model.safetensors "s/$head/\\1I8\\2[2710,8]\\3,$((n - half * 3 / 2))]/" -$((half * 3 / 2))
refuse "bad/model.safetensors|'lm_head.weight'|I8|quantis|download" train data.jsonl bad --output_dir out
broken remote; sed -i.old 's/"num_layers": 1/"num_layers": 2/' bad/config.json; rm bad/config.json.old
refuse "bad|'transformer.encoder.layers.1" train ready.jsonl bad --output_dir out
broken; sed -i.old 's/"model_type": "glm"/"model_type": "glm4"/' bad/config.json; rm bad/config.json.old
refuse "bad|post_self_attn_layernorm" train data.jsonl bad --output_dir out

broken f; put bad/model.safetensors "$(numbers_at bad/model.safetensors $q)" '\0\0\300\177'             # a NaN
stops "step 1|'$q'|not finite|damaged|download" train data.jsonl bad --output_dir out
stops "step 1|'$q'|not finite|damaged|download" train data.jsonl bad --output_dir out --method full
broken f; put bad/model.safetensors $(($(numbers_at bad/model.safetensors model.norm.weight) + 8)) '\0\0\200\177'
stops "step 1|'model.norm.weight'|not finite" train data.jsonl bad --output_dir out
broken f; head=$(numbers_at bad/model.safetensors lm_head.weight)        # finite weights whose logits overflow
put bad/model.safetensors "$head" "$(repeated '\\346\\261\\141\\177' 16)$(repeated '\\346\\261\\141\\377' 16)"
case $program in
    *64) skip 'logits that overflow: in double precision they do not' ;;
    *) stops 'step 1|loss|not finite' train data.jsonl bad --output_dir out ;;
esac

# ---- Data --------------------------------------------------------------------------------------------------------

refuse 'nowhere.jsonl' train nowhere.jsonl m --output_dir out
refuse 'empty|train.json|train.jsonl' train empty m --output_dir out
refuse 'nowhere.jsonl' train data.jsonl m --eval_file nowhere.jsonl --output_dir out
refuse 'empty' train data.jsonl m --eval_file empty --output_dir out
: >bad.jsonl
refuse 'bad.jsonl|no sample' train bad.jsonl m --output_dir out
printf '\n \n' >bad.jsonl
refuse 'bad.jsonl|no sample' train bad.jsonl m --output_dir out
printf '[]\n' >bad.jsonl
refuse 'bad.jsonl|no sample' train bad.jsonl m --output_dir out
{ printf '['; head -n 1 data.jsonl; printf ','; head -n 1 data.jsonl; } >bad.jsonl
refuse 'bad.jsonl:3:1: |JSON' train bad.jsonl m --output_dir out
{ printf '['; head -n 1 data.jsonl; head -n 1 data.jsonl; printf ']'; } >bad.jsonl
refuse 'bad.jsonl:2:1: |JSON' train bad.jsonl m --output_dir out
{ printf '['; head -n 1 data.jsonl; printf ',]'; } >bad.jsonl
refuse 'bad.jsonl:2:2: |JSON' train bad.jsonl m --output_dir out

user='{"role": "user", "content": "你好"}' answer='{"role": "assistant", "content": "yes"}'
{ head -n 1 data.jsonl; echo "{\"messages\": [$user, $answer"; head -n 1 data.jsonl; } >bad.jsonl
refuse 'bad.jsonl:2:|JSON' train bad.jsonl m --output_dir out    # the line that is cut off, not the one after it
bad_line 'JSON' "{\"messages\": [$user @$answer]}"
bad_line 'JSON' "{\"messages\": [$user, $answer] @\"kind\": 1}"
bad_line 'JSON' "{\"messages\": [$user, @'role']}"
bad_line 'JSON' '{"messages": [{"role": "user", "content": "你@'
bad_line 'JSON' '{"messages": [{"role": "user", "content": "你\@q"}]}'
bad_line 'JSON' '{"messages": [{"role": "user", "content": "\u12@g4"}]}'
bad_line 'JSON' '{"messages": @nothing}'
bad_line 'JSON' '@role: user'
bad_line 'JSON' "{\"messages\": [$user, $answer]} @x"
bad_line 'nested' "{\"messages\": $(repeated '[' 100000)"
bad_line 'nested' "{\"messages\": [$user, $answer], \"x\": $(repeated '{"a":' 100000)"
repeated '[' 100000 >bad.jsonl
refuse 'bad.jsonl:1:|nested' train bad.jsonl m --output_dir out
bad_line 'object' '@[1, 2]'
bad_line 'object' '@"text"'
bad_line 'messages|input_ids' '@{"text": "hello"}'
bad_line 'array' '{"messages": @"hello"}'
bad_line 'object' "{\"messages\": [@\"hello\", $answer]}"
bad_line "role|'wizard'|assistant" "{\"messages\": [{\"role\": @\"wizard\", \"content\": \"你好\"}, $answer]}"
bad_line "role|assistant" "{\"messages\": [{\"role\": @\"us\\ner\", \"content\": \"你好\"}, $answer]}"
bad_line '"role"' "{\"messages\": [$user, @{\"content\": \"yes\"}]}"
bad_line '"content"' "{\"messages\": [$user, @{\"role\": \"assistant\"}]}"
bad_line '"content"' "{\"messages\": [$user, {\"role\": \"assistant\", \"content\": @null}]}"
bad_line '"content"' "{\"messages\": [$user, {\"role\": \"assistant\", \"content\": @[\"yes\"]}]}"
bad_line '"loss"' "{\"messages\": [$user, {\"role\": \"assistant\", \"content\": \"yes\", \"loss\": @1}]}"
bad_line 'nothing to learn' "@{\"messages\": [$user]}"
bad_line 'nothing to learn' '@{"messages": []}'
bad_line 'nothing to learn' "@{\"messages\": [$user, {\"role\": \"assistant\", \"content\": \"yes\", \"loss\": false}]}"
bad_line 'nothing to learn' '@{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}'
bad_line 'nothing to learn' '@{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}'
bad_line '' '@{"input_ids": [], "labels": []}'
bad_line 'token id|2709' '{"input_ids": [1, @2710, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @-1, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @-100, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @2.5, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @1e300, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @4294967298, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @NaN, 3], "labels": [1, 2, 3]}'
bad_line 'token id|2709' '{"input_ids": [1, @"2", 3], "labels": [1, 2, 3]}'
bad_line 'token id|-100' '{"input_ids": [1, 2, 3], "labels": [1, @-99, 3]}'
bad_line 'token id|-100' '{"input_ids": [1, 2, 3], "labels": [1, @2710, 3]}'
bad_line '2 labels|3 input_ids' '{"input_ids": [1, 2, 3], "labels": @[1, 2]}'
bad_line '4 labels|3 input_ids' '{"input_ids": [1, 2, 3], "labels": @[1, 2, 3, 4]}'
bad_line '"labels"' '@{"input_ids": [1, 2, 3]}'
bad_line '"input_ids"' '{"input_ids": @7, "labels": [1]}'
short='--output_dir out --max_input_length 2 --max_output_length 2'
refuse 'data.jsonl:1:1: |tokens|--overlong' train data.jsonl m $short
refuse 'data.jsonl|short enough' train data.jsonl m $short --overlong drop
printf '{"input_ids": [1, 2], "labels": [-100, -100]}\n' >bad.jsonl
refuse 'bad.jsonl|target' dump m bad.jsonl out
refuse 'data.jsonl:1:1: |input_ids' dump m data.jsonl out
refuse "target module 'qproj'|q_proj" train data.jsonl m --target_modules qproj --output_dir out

# ---- Tokenizers and layouts --------------------------------------------------------------------------------------

bin=$beside/tokenizer.bin
broken; head -c 5000 "$bin" >bad/tokenizer.bin
refuse 'bad/tokenizer.bin|5000 bytes' train data.jsonl bad --output_dir out
refuse 'bad/tokenizer.bin|5000 bytes' chat bad --prompt hi
refuse 'bad/tokenizer.bin|5000 bytes' tokenize bad/tokenizer.bin
refuse 'the name|is empty' tokenize m --out ''
head -c 20 "$bin" >bad/tokenizer.bin
refuse 'bad/tokenizer.bin' tokenize bad
cp "$bin" bad/tokenizer.bin; put bad/tokenizer.bin 8 '\2'
refuse 'bad/tokenizer.bin|version 2' train data.jsonl bad --output_dir out
cp "$bin" bad/tokenizer.bin; put bad/tokenizer.bin 12 '\7'
refuse 'bad/tokenizer.bin|kind 7' tokenize bad
cp "$bin" bad/tokenizer.bin; put bad/tokenizer.bin 20 '\377\377\377\377'
refuse 'bad/tokenizer.bin|bytes' tokenize bad
cp "$bin" bad/tokenizer.bin; put bad/tokenizer.bin 20 '\213\12'          # a piece fewer: every length is off by one
refuse 'bad/tokenizer.bin' tokenize bad
cp "$bin" bad/tokenizer.bin; put bad/tokenizer.bin 44 '\377\377\377\177'
refuse 'bad/tokenizer.bin' tokenize bad                                  # a piece longer than the text
cp "$bin" bad/tokenizer.bin; put bad/tokenizer.bin 44 '\0\0\0\0'
refuse 'bad/tokenizer.bin' tokenize bad                                  # an empty piece
: >bad/tokenizer.bin
refuse 'bad/tokenizer.bin' tokenize bad
refuse 'nowhere.bin' tokenize nowhere.bin
broken; head -c 3000 m/model.safetensors | tail -c 1000 >bad/tokenizer.model
refuse 'bad/tokenizer.model' train data.jsonl bad --output_dir out
{ printf '\n'; zeros 1000; } >bad/tokenizer.model
refuse 'bad/tokenizer.model' chat bad --prompt hi
printf '\n\377\377\377\377\377\377\377\377\377\377\377' >bad/tokenizer.model
refuse 'bad/tokenizer.model' tokenize bad
printf 'AA== 0\nAQ== 1\nAg== 7\n' >bad/tokenizer.model
refuse 'bad/tokenizer.model:3' tokenize bad
printf 'AA== 0\nAQ== 1\n' >bad/tokenizer.model
refuse 'bad/tokenizer.model|byte' tokenize bad
cp pointer bad/tokenizer.model
refuse 'bad/tokenizer.model:' tokenize bad
refuse 'standard input|2710' tokenize "$bin" --decode <<<'1 2710'
refuse 'standard input|-1' tokenize "$bin" --decode <<<'-1'
refuse 'standard input|no id|2709' tokenize "$bin" --decode <<<'99999999999999999999'
refuse "standard input|'word'" tokenize "$bin" --decode <<<'1 2 word'
printf '1 2\0 3\n' >nul.ids
refuse 'standard input' tokenize "$bin" --decode <nul.ids
rm nul.ids

sed 's/2710/2000/' glm.json >small.json
works 'parameters' init small.json small --layout glm4-chat
cp "$bin" small
refuse 'small|tokenizer|2709|2000' train data.jsonl small --output_dir out
refuse 'small|tokenizer|2709|2000' chat small --prompt hi

broken; rm -f bad/tokenizer.bin; echo '{}' >bad/tokenizer.json
refuse 'bad/tokenizer.json:1:1: |"model"' train data.jsonl bad --output_dir out
refuse 'bad/tokenizer.json:1:1: |"model"' chat bad --prompt hi

misuse "'glm4chat'|chatglm3|glm4-chat" train data.jsonl m --layout glm4chat --output_dir out
misuse "'glm4chat'|chatglm3|glm4-chat" chat m --layout glm4chat --prompt hi
run init glm.json out --layout 'a"b'
[ "$status" = 1 ] || [ "$status" = 2 ] || want 'exit status 1 or 2: this is no layout'
rm -rf out
judge
refuse 'remote|layout|--layout' chat remote --prompt hi
refuse 'data.jsonl:1:1: |remote|layout|--layout' train data.jsonl remote --output_dir out
refuse 'standard input|no token id' tokenize m --decode <<<'<|user|>'
refuse 'max_context' chat m --prompt 'rather a long prompt' --max_context 4
refuse 'this model, whose limit is 512' chat m --prompt "$(repeated 'word ' 600)"
refuse 'the text is not UTF-8' chat m --prompt $'\xC4\xE3'
refuse '--system: the text is not UTF-8' chat m --prompt hi --system $'\xC4\xE3'
printf '\xC4\xE3\n%s\nhi\n' "$(repeated 'word ' 600)" >asked.txt
works '(the text is not UTF-8|(the text has 60|whose limit is 512)' chat m --max_new_tokens 2 <asked.txt
check 'a question that cannot be answered is passed over' test "$(wc -l <stdout)" = 1
rm asked.txt

# ---- Output, disk and memory -------------------------------------------------------------------------------------

echo kept >file
refuse 'file' train data.jsonl m --output_dir file
refuse 'file/x' train data.jsonl m --output_dir file/x/y
refuse 'file/x' init glm.json file/x
refuse 'file/x' tokenize m --out file/x
refuse 'file/x' dump m ready.jsonl file/x
refuse 'empty' dump m ready.jsonl empty
refuse 'm|exists' init glm.json m
refuse 'file|exists' init glm.json file
check 'a file in the way is left as it was' test "$(cat file)" = kept
if [ -d /proc/self ]; then
    refuse '/proc/glmtune' init glm.json /proc/glmtune
    refuse '/proc/glmtune' train data.jsonl m --output_dir /proc/glmtune/run
fi
limit='-f 8'
refuse 'out|writing failed' init glm.json out
refuse 'out|writing failed' dump m ready.jsonl out
refuse 'out|writing failed' tokenize "$bin" --out out
stops 'adapter_model.safetensors|writing failed' train data.jsonl f --output_dir out --max_steps 1 --r 128
limit=''
if [ -w /dev/full ]; then
    told='glmtune info m >/dev/full'
    "$program" info m >/dev/full 2>stderr; status=$?
    : >stdout
    [ "$status" = 1 ] || want 'exit status 1'
    [ "$(wc -l <stderr)" = 1 ] || want 'one line'
    want_words stderr 'standard output|writing failed'
    judge
fi

# A batch of 100,000 tokens under two limits: one that the memory plan can see is too low, and one that is just above
# what the plan counts, so that taking the memory fails.
sevens=$(repeated '7,' 99999)7
echo "{\"input_ids\": [$sevens], \"labels\": [$sevens]}" >long.jsonl
works 'parameters' init <(sed 's/2710/200000/' glm.json) wide
long='--output_dir out --max_input_length 200000 --val_size 0 --threads 1'
run info m --max_input_length 99000 --max_output_length 999
own=$(sed -nE 's/^memory:.* ([0-9.]+) MiB own.*/\1/p' stdout | cut -d. -f1)
check 'the memory plan says how many MiB are its own' test -n "$own"
limit='-v 400000'
run --help
if [ "$status" != 0 ]; then
    skip 'limits of memory: this program does not run under one'
else
    works 'parameters' init <(sed 's/_embeddings": 512/_embeddings": 99999999/' glm.json) endless_m --layout glm4-chat
    cp "$bin" endless_m
    refuse 'not enough memory|lower --max_context' chat endless_m --prompt hi --max_context 90000000
    rm -rf endless_m
    limit="-v $((${own:-200} * 768))"                       # three quarters
    refuse 'memory|tokens fit|lower' train long.jsonl m $long
    refuse 'memory|tokens fit|lower' train long.jsonl m $long --method full
    limit="-v $(((${own:-200} + 2) * 1024))"
    refuse 'memory|lower' train long.jsonl m $long
    limit='-v 65536'                                        # 64 MiB: too little for what trains alone
    refuse 'memory|--method lora' train ready.jsonl wide --output_dir out --method full --threads 1
    refuse 'memory|--r' train data.jsonl m --output_dir out --r 65536 --threads 1
fi
limit=''

# ---- A run from beginning to end ---------------------------------------------------------------------------------

tune='--max_steps 4 --logging_steps 1 --learning_rate 0.01 --gradient_accumulation_steps 4 --val_size 0'
works 'config: glm|parameters|method lora trains|memory:|glm4-chat|tokens/s' info f
works 'method full trains 88720 of 88720|tokens/s' info f --method full
works 'data: 8 samples to learn|method lora|glm4-chat|time: about|a checkpoint takes|are free|done|run/checkpoint-4' train data.jsonl f --output_dir run $tune
adapter=run/checkpoint-4
check 'the checkpoint holds an adapter' test -s $adapter/adapter_model.safetensors -a -s $adapter/adapter_config.json
check 'it is in PEFT'\''s form' grep -q '"peft_type": "LORA"' $adapter/adapter_config.json
check 'it names its base by an absolute path' grep -qF "\"base_model_name_or_path\": \"/" $adapter/adapter_config.json
check 'log.jsonl has a line for each step' test "$(grep -c '"loss": [0-9]' run/log.jsonl)" = 4
for field in step learning_rate grad_norm tokens tokens_per_s; do
    check "log.jsonl has $field in each line" test "$(grep -cE "\"$field\": [0-9]" run/log.jsonl)" = 4
done
works 'method lora trains' info $adapter
works '' chat $adapter --prompt '第1 question?' --max_new_tokens 20
check 'an answer ends in a line break' test "$(tail -c 1 stdout | od -An -tx1 | tr -d ' ')" = 0a
cp stdout answer
works '' chat $adapter --max_new_tokens 20 <<<'第1 question?'
check 'a prompt from stdin is answered as --prompt is' cmp answer stdout
works '' chat $adapter --max_new_tokens 5 --system 'Be kind.' --temperature 1 --top_p 0.9 --seed 7 <<<"one
two"
works 'method lora|done' train data.jsonl $adapter --output_dir again $tune
check 'going on from an adapter writes one' test -s again/checkpoint-4/adapter_model.safetensors
told='an adapter that went on is another'
! cmp -s $adapter/adapter_model.safetensors again/checkpoint-4/adapter_model.safetensors || want 'another content'
judge
check 'and has the same base' test "$(grep base_model $adapter/adapter_config.json)" = \
    "$(grep base_model again/checkpoint-4/adapter_config.json)"
works 'merged' merge $adapter merged
check 'merge writes a model folder' test -s merged/model.safetensors -a -s merged/config.json
works 'config: glm' info merged
works '' chat merged --prompt '第1 question?' --max_new_tokens 20
check 'the merged model answers as the adapter does' cmp answer stdout
works 'done' train data.jsonl merged --output_dir again_merged $tune --max_steps 1
works 'method full' train data.jsonl m --output_dir full $tune --method full
works '' chat full/checkpoint-4 --prompt hi --max_new_tokens 5
works 'full_merged' merge full/checkpoint-4 full_merged
works '' chat full_merged --prompt hi --max_new_tokens 5
works 'done' train ready.jsonl remote --output_dir run_remote $tune --layout glm4-chat
works '' chat run_remote/checkpoint-4 --layout glm4-chat --prompt hi --max_new_tokens 5

mkdir folder array
cp data.jsonl folder/train.jsonl; head -n 3 data.jsonl >folder/dev.jsonl
works 'data: 8 samples to learn, 3 to validate|validation loss' train folder m --output_dir run_folder $tune
check 'log.jsonl has a validation loss' grep -q '"eval_loss": [0-9]' run_folder/log.jsonl
{ printf '['; sed '$!s/$/,/' data.jsonl; printf ']'; } >array/train.json
{ printf '['; head -n 1 data.jsonl; printf ']'; } >array/dev.json
works 'data: 8 samples to learn, 1 to validate' train array m --output_dir run_array $tune

counts() {                      # DATA: the line of train that counts its samples and tokens
    run train "$1" m --output_dir out --max_steps 1 --val_size 0
    grep '^data: ' stderr
    rm -rf out
}
sed 's/"messages"/"conversations"/' data.jsonl >conversations.jsonl
{ printf '\357\273\277'; sed 's/$/\r/' data.jsonl; } >windows.jsonl
sed 's/, /,\n\t/g' array/train.json >spread.json
all=$(counts data.jsonl)
check 'train counts tokens and targets' grep -qE '^data: 8 samples to learn, .* target tokens: [1-9][0-9]* of [1-9]' <<<"$all"
for form in array/train.json conversations.jsonl windows.jsonl spread.json; do
    check "$form gives the counts of data.jsonl" test "$(counts $form)" = "$all"
done

# The same bits, whatever the number of threads, and again.
for try in 1 2 3 3again; do
    works 'done' train data.jsonl f --output_dir "threads$try" $tune --threads "${try%again}"
    sed 's/, "tokens_per_s": [^}]*//' "threads$try/log.jsonl" >"threads$try/losses"
    for file in checkpoint-4/adapter_model.safetensors losses; do
        check "--threads $try: the same $file" cmp "threads1/$file" "threads$try/$file"
    done
done
check 'the log compared has losses' grep -q '"loss": ' threads1/losses

works 'done' train data.jsonl m --output_dir limited $tune --save_steps 3 --save_total_limit 1
kept=$(find limited -name 'checkpoint-*')
check '--save_total_limit 1 keeps the last checkpoint alone' test "$kept" = limited/checkpoint-4
works 'done' train data.jsonl m --output_dir limited $tune --save_steps 1 --save_total_limit 2 --force
kept=$(find limited -name 'checkpoint-*' | sort | tr '\n' ' ')
check '--save_total_limit 2 keeps two' test "$kept" = 'limited/checkpoint-3 limited/checkpoint-4 '

# ---- Runs that are in the way ------------------------------------------------------------------------------------

cp -R run run_before
refuse 'run|--force' train data.jsonl f --output_dir run $tune
refuse 'bad.jsonl' train bad.jsonl f --output_dir run $tune --force
check 'a refused run leaves the old one as it was' diff -r run run_before
refuse 'm|exists' merge $adapter m
refuse 'file|exists' merge $adapter file
refuse 'file/x' merge $adapter file/x
mkdir notes; echo mine >notes/mine.txt
works 'done' train data.jsonl m --output_dir notes --max_steps 1
works 'done' train data.jsonl m --output_dir notes --max_steps 2 --force --val_size 0
check 'other files of the folder stay' test "$(cat notes/mine.txt)" = mine
check '--force takes away the old checkpoints' test ! -e notes/checkpoint-1 -a -e notes/checkpoint-2

# ---- Adapters ----------------------------------------------------------------------------------------------------

config=bad/adapter_config.json tensors=bad/adapter_model.safetensors
edit_config() { broken $adapter; sed -E "$1" $adapter/adapter_config.json >$config; }
edit_config 's/("base_model_name_or_path": )"[^"]*"/\1"\/nowhere\/base"/'
refuse "adapter_config.json|/nowhere/base|--base" chat bad --prompt hi
refuse "adapter_config.json|/nowhere/base|--base" train data.jsonl bad --output_dir out
refuse "adapter_config.json|/nowhere/base|--base" merge bad out
refuse "adapter_config.json|/nowhere/base|--base" info bad
works '' chat bad --prompt hi --max_new_tokens 5 --base f
refuse 'empty/config.json|missing' chat bad --prompt hi --base empty
edit_config '/base_model_name_or_path/d'
refuse 'adapter_config.json|--base' chat bad --prompt hi
edit_config 's/"LORA"/"IA3"/'
refuse "adapter_config.json|peft_type|'IA3'" chat bad --prompt hi
refuse "adapter_config.json|peft_type|'IA3'" train data.jsonl bad --output_dir out
edit_config 's/"task_type"/"use_dora": true, &/'
refuse 'adapter_config.json|use_dora' chat bad --prompt hi
edit_config 's/"q_proj"/"qq_proj"/'                # the tensors say where LoRA is
works '' chat bad --prompt hi --max_new_tokens 5
edit_config 's/"r": 8/"r": 4/'
refuse 'adapter_model.safetensors|lora_A.weight|[8, 16]|[4, 16]' chat bad --prompt hi
edit_config 's/"r": 8/"r": -8/'
refuse 'adapter_config.json|"r"' chat bad --prompt hi
edit_config 's/"r": 8,/"r": 8/'
refuse 'adapter_config.json:7:3: |JSON' chat bad --prompt hi

path=base_model.model.model.layers.0.self_attn
broken $adapter; rm $tensors
refuse 'adapter_model.safetensors' chat bad --prompt hi
broken $adapter; truncate -s -8 $tensors
refuse 'adapter_model.safetensors|cut off' chat bad --prompt hi
broken $adapter; edit_header $tensors "s/($path.q_proj.lora_A.weight\":[^]]*\[)8, ?16/\116,8/"
refuse "adapter_model.safetensors|$path.q_proj.lora_A.weight'|[16, 8]|[8, 16]" chat bad --prompt hi
refuse "adapter_model.safetensors|$path.q_proj.lora_A.weight'|[16, 8]|[8, 16]" merge bad out
broken $adapter; edit_header $tensors "s/q_proj.lora_A/qq_proj.lora_A/"
refuse "bad|$path.q_proj.lora_A.weight'" train data.jsonl bad --output_dir out
broken $adapter; add_tensor $tensors extra
refuse "adapter_model.safetensors|'extra'" chat bad --prompt hi
broken $adapter; put $tensors "$(numbers_at $tensors $path.q_proj.lora_A.weight)" '\0\0\0\0\0\0\370\177'  # a NaN
stops "step 1|$path.q_proj.lora_A.weight'|not finite" train data.jsonl bad --output_dir out
refuse 'm|adapter' merge m out
refuse 'nowhere' merge nowhere out
refuse "'q_proj'|query_key_value" chat $adapter --prompt hi --base remote --layout glm4-chat

# ---- Tokenizing, dumping, checking -------------------------------------------------------------------------------

printf %s "$text" >text
works '' tokenize m <text
cp stdout ids
check 'ids are numbers on one line' grep -qE '^[0-9]+( [0-9]+)*$' ids
works '' tokenize "$bin" <text
check 'the folder and the file give the same ids' cmp ids stdout
works '' tokenize m --decode <ids
check 'decoding gives the text back' cmp text stdout
works '' tokenize m --out copy.bin
check 'tokenize --out writes the tokenizer that it read' cmp "$bin" copy.bin
for i in $(seq 0 255); do printf "\\$(printf %03o "$i")\\0\\0"; done | base64 -w 4 | sed 's/AA$/==/' |
    awk '{ print $0, NR - 1 }' >bytes.model                 # a tiktoken vocabulary of the 256 bytes
works '' tokenize bytes.model <text
cp stdout byte_ids
od -An -v -tu1 text | tr -s ' \n' ' ' | sed 's/^ //; s/ $//' >byte_values
check 'a vocabulary of bytes gives the bytes' test "$(cat byte_ids)" = "$(cat byte_values)"
works '' tokenize bytes.model --out bytes.bin
works '' tokenize bytes.bin <text
check 'an imported tokenizer gives the same ids' cmp byte_ids stdout
works '' tokenize bytes.bin --decode <byte_ids
check 'and the text back' cmp text stdout
works '' tokenize m </dev/null
check 'no text has no ids' test "$(wc -c <stdout)" = 1

cat >batch.jsonl <<'END'
{"input_ids": [1, 39, 6, 8], "labels": [-100, 39, 6, 8]}
{"input_ids": [5, 7], "labels": [5, 7]}
END
for model in saved_hf saved_remote saved_peft; do
    works "6 tokens, loss" dump "$tests/golden/$model" batch.jsonl $model.safetensors
    sed 's/.*, loss \([^,]*\),.*/\1/' stdout >$model.loss
    for tensor in ids labels logits loss hidden.0 hidden.2 final_norm; do
        check "dump $model has $tensor" grep -qF "\"$tensor\":" <(header_of $model.safetensors)
    done
done
check 'both layouts give the same loss' cmp saved_hf.loss saved_remote.loss
check 'the dump of a model has its gradients' grep -q '"grad.lm_head.weight"' <(header_of saved_hf.safetensors)
check 'the dump of an adapter has its gradients' grep -q '"grad.base_model.model' <(header_of saved_peft.safetensors)

float=$program
case $program in
    *64) skip 'gradcheck in single precision: this program is in double'; float='' ;;
    *) refuse 'gradcheck|glmtune64|--truth' gradcheck; program=$beside/glmtune64 ;;
esac
if [ -x "$program" ]; then
    works 'all gradients agree' gradcheck --elements 5
    works 'all gradients agree' gradcheck f --method full --elements 2
    refuse '--truth' gradcheck --truth gradients.lora
fi
if [ -x "$program" ] && [ -n "$float" ]; then
    for method in lora full freeze ptuning adapter; do
        program=$beside/glmtune64
        works 'all gradients agree with finite differences' gradcheck --method $method --elements 5 --out gradients.$method
        program=$float
        works "all gradients agree with gradients.$method" gradcheck --method $method --truth gradients.$method
    done
    refuse 'm/model.safetensors|BF16|glmtune64' gradcheck --truth m/model.safetensors
    run gradcheck --truth gradients.lora --seed 7
    check 'gradients of another seed are wrong' [ "$status $(tail -n 1 stdout)" = '1 the gradients are WRONG' ]
    for other in 'gradients.full' 'gradients.lora --r 4'; do
        run gradcheck --truth $other
        check "$other has not the gradients" [ "$status $(grep -c 'no gradient.*lora_A.*same options' stderr)" = '1 1' ]
    done
    program=$beside/glmtune64
    # so steep a loss that differences are too coarse
    run gradcheck --std 10 --elements 20 --out gradients.wrong
    check 'gradients that are found wrong are not written' [ "$status" = 1 -a ! -e gradients.wrong ]
    # of one bias of one number next to nothing is left here
    works 'all gradients agree' gradcheck --method adapter --seed 7 --elements 1 --out gradients.bias
    program=$float
    works 'all gradients agree' gradcheck --method adapter --seed 7 --truth gradients.bias
else
    skip 'gradcheck in two precisions: glmtune64 or another program is missing'
fi
program=${float:-$program}

# ---- What must never be lost or silently changed -----------------------------------------------------------------

works 'done' train data.jsonl m --output_dir keep --max_steps 3 --val_size 0
refuse 'keep|--output_dir|checkpoint' train data.jsonl m --output_dir keep
refuse 'keep/checkpoint-3|--output_dir' train data.jsonl keep/checkpoint-3 --output_dir keep --force
check 'a refused run leaves the adapter it was to go on from' test -f keep/checkpoint-3/adapter_model.safetensors
refuse '--method lora|leave' train data.jsonl keep/checkpoint-3 --method full --output_dir out
refuse 'r 8|leave' train data.jsonl keep/checkpoint-3 --r 2 --output_dir out
mkdir precious; echo 1 >precious/file; mkdir linked; ln -s ../precious linked/checkpoint-1
works 'done' train data.jsonl m --output_dir linked --max_steps 3 --val_size 0 --force
check 'a link to a folder is removed, not what it points to' test -f precious/file -a ! -e linked/checkpoint-1
works 'parameters' init glm.json slash/
check 'a slash behind a folder name changes nothing' test -f slash/model.safetensors
rm -rf keep linked precious slash
refuse 'names no linear map' train data.jsonl m --output_dir out --target_modules ''
refuse 'empty' train data.jsonl m --output_dir ''
refuse '--combine|--official_mask' train data.jsonl m --output_dir out --combine true
stops 'step|not finite' train data.jsonl m --output_dir out --val_size 0 --learning_rate 1000 --warmup_ratio 0 \
    --weight_decay 1000 --lora_alpha 1000000 --max_grad_norm 0 --max_steps 40 --logging_steps 1 --lr_scheduler_type constant
works 'parameters' init glm.json half --layout glm4-chat --dtype f16
works 'done' train data.jsonl half --output_dir huge --max_steps 1 --val_size 0 --warmup_ratio 0 --learning_rate 1000 \
    --lora_alpha 1000000
refuse 'q_proj|not finite in F16|nothing is written' merge huge/checkpoint-1 out
rm -rf half huge
printf '{"messages": [{"role": "user", "content": "\304\343"}, {"role": "assistant", "content": "x"}]}\n' >gb.jsonl
refuse 'gb.jsonl:1:|UTF-8' train gb.jsonl m --output_dir out
echo '{"messages": [{"role": "user", "content": "a", "tools": null}, {"role": "assistant", "content": "b", "loss": null}],
    "tools": []}' >nulls.jsonl
works 'done' train nulls.jsonl m --output_dir nulls --max_steps 1 --val_size 0
sed 's/"attention_bias"/"rope_parameters": {"type": "yarn", "factor": 4}, "attention_bias"/' glm.json >yarn.json
refuse 'rotary' init yarn.json out
sed 's/"attention_bias"/"rope_theta": 500, "rope_parameters": {"rope_type": "default"}, "attention_bias"/' glm.json >theta.json
works 'theta 500' info theta.json

# ---- The sizes that the released models are known by -------------------------------------------------------------

# `info` also computes a layer half as wide as theirs: half a minute under the sanitizers, each time the same one. There
# cli_methods.sh asks for one of them, and the small models above for every method.
released() { [ -n "$sanitized" ] || works "$@"; }      # WORDS COMMAND...

big='"hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32, "kv_channels": 128, "add_qkv_bias": true,
     "multi_query_attention": true, "multi_query_group_num": 2, "torch_dtype": "float16"'
mkdir chatglm3-6b glm-4-9b-chat
echo "{\"model_type\": \"chatglm\", \"num_layers\": 28, \"padded_vocab_size\": 65024, \"seq_length\": 8192, $big}" \
    >chatglm3-6b/config.json
echo "{\"model_type\": \"chatglm\", \"num_layers\": 40, \"padded_vocab_size\": 151552, \"seq_length\": 131072," \
     "\"rope_ratio\": 500, $big}" >glm-4-9b-chat/config.json
released 'trains 1949696 of 6245533696' info chatglm3-6b --method lora --r 8 --target_modules query_key_value
run info glm-4-9b-chat --per_device_train_batch_size 1000000 --max_input_length 10000000 --max_output_length 10000000
[ "$status" = 1 ] || want 'exit status 1'
want_words stderr 'pass what this machine can count'
judge
released 'trains 2785280 of 9402736640|glm4-chat|tokens/s' info glm-4-9b-chat --target_modules query_key_value
released 'trains 6243584000 of 6243584000' info chatglm3-6b/config.json --method full

# ---- One file for each further subject; they use what stands above -----------------------------------------------

set +f
parts=("$tests"/cli_*.sh)
set -f
for part in "${parts[@]}"; do [ ! -f "$part" ] || . "$part"; done

# ---- The end -----------------------------------------------------------------------------------------------------

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
