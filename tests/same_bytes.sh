#!/usr/bin/env bash
# tests/same_bytes.sh OLD NEW: proves that a change of glmtune.c changed no behaviour. Runs two builds of glmtune over
# every method, dump, a resume of the old one's checkpoint by the new one, tokenizers, chat, eval and merge, and
# compares every byte that they write, times and speeds left out. Closes with N passed, N failed.
# HEADERS=may-differ counts tensor files as equal when their numbers are: a setting came or went.
#     git stash; make; cp glmtune /tmp/old; git stash pop; make; tests/same_bytes.sh /tmp/old ./glmtune
set -u
[ $# -eq 2 ] || { echo "usage: $0 OLD NEW" >&2; exit 2; }
old=$(realpath "$1") new=$(realpath "$2") here=$(realpath "$(dirname "$0")")
export OMP_WAIT_POLICY=passive LC_ALL=C
top=$(mktemp -d)
trap 'rm -rf "$top"' EXIT
passed=0 failed=0 headers=''

numbers() {     # FILE: what stands behind the header of a tensor file
    tail -c +$((9 + $(od -An -tu8 -N8 "$1"))) "$1"
}

run() {     # NAME COMMAND...: by both, in a folder of the same name, so that paths are the same; what they print is kept
    local name=$1
    shift
    printf '%s\n' "$*" >>"$top/commands"
    (cd "$top/run" && "$glmtune" "$@" >"$name.stdout" 2>"$name.stderr" </dev/null; echo $? >"$name.status")
}

# What differs from run to run: times and speeds.
normalize() {
    find "$1" -name '*.std???' -exec sed -i -E 's/^(done in|time|memory      ).*//; s/[0-9.]+ tokens\/s.*//; s/disk: .*//' {} +
    find "$1" \( -name '*.jsonl' -o -name 'trainer_state.json' \) -exec sed -i -E 's/, "tokens_per_s": [-0-9.e+]+//' {} +
    rm -f "$1/compare.stdout"      # a table of times
}

models() {  # a small model of each layout, and the bundled one
    for kind in chatglm glm4 glm_bias glm_edge; do
        sed 's/"\(vocab_size\|padded_vocab_size\)": [0-9]*/"\1": 2712/' "$here/golden/$kind/config.json" >"$top/run/$kind.json"
        run "init-$kind" init "$kind.json" "$kind" --layout glm4-chat --dtype bf16
    done
    cp -r "$here/tiny" "$top/run/tiny"
    cp "$here/data/identity.jsonl" "$top/run/data.jsonl"
    cp "$top/bin/tokenizer.bin" "$top/run/"
    echo '{"input_ids": [1,5,9,200,31,7,88,2,40], "labels": [-100,-100,9,200,31,7,-100,2,40]}' >"$top/run/batch.json"
}

train() {   # NAME MODEL OPTION...: a run of four steps, one stopped in the middle and gone on with, and what comes after
    local name=$1 model=$2
    shift 2
    local common="--max_steps 4 --logging_steps 1 --save_steps 2 --save_total_limit 0 --per_device_train_batch_size 2"
    run "$name" train data.jsonl "$model" --output_dir "$name" $common "$@"
    run "$name-chat" chat "$name/checkpoint-4" --prompt '你是谁？' --max_new_tokens 8
    run "$name-dump" dump "$name/checkpoint-4" batch.json "$name.dump"
    run "$name-merge" merge "$name/checkpoint-4" "$name-merged"
    [ -e "$top/stopped/$name" ] || cp -r "$top/run/$name" "$top/stopped/$name"     # the old one's, for both
    rm -rf "$top/run/$name-on"
    mkdir "$top/run/$name-on" && cp -r "$top/stopped/$name/checkpoint-2" "$top/run/$name-on"
    run "$name-on" train data.jsonl "$model" --output_dir "$name-on" $common "$@" --resume_from_checkpoint yes
}

everything() {
    models
    for model in tiny chatglm glm4 glm_bias glm_edge; do
        train "lora-$model" $model
        train "full-$model" $model --method full --optim lion
        train "ptuning-$model" $model --method ptuning --num_virtual_tokens 5
        train "freeze-$model" $model --method freeze --trainable_layers 1 --gradient_checkpointing true
        train "adapter-$model" $model --method adapter --optim sgd
        run "dump-$model" dump $model batch.json "$model.dump"
        run "info-$model" info $model
        run "check-$model" check data.jsonl $model
    done
    train projection-glm4 glm4 --method ptuning --num_virtual_tokens 3 --prefix_projection true
    train projection-chatglm chatglm --method ptuning --num_virtual_tokens 3 --prefix_projection true
    train pfeiffer tiny --method adapter --adapter_type pfeiffer --reduction_factor 8
    train narrow tiny --target_modules q_proj --use_rslora true --label_smoothing_factor 0.1
    train replay tiny --replay data.jsonl:1 --probe data.jsonl
    run eval eval data.jsonl tiny --max_new_tokens 12 --out answers.jsonl
    run compare compare lora-tiny full-tiny --out compare.svg
    for tokenizer in ${GLM_REAL:+"$GLM_REAL"/tokenizers/*/}; do
        name=tokens-$(basename "$tokenizer")
        (cd "$top/run" && "$glmtune" tokenize "$tokenizer" --out "$name.bin" <"$here/../README.md" >"$name.ids" 2>&1)
    done
    for folder in "$here"/golden/tokenizer_json; do
        (cd "$top/run" && "$glmtune" tokenize "$folder" <"$here/../README.md" >tokens-json.ids 2>&1)
    done
    (cd "$top/run" && "$glmtune" tokenize tokenizer.bin <"$here/../README.md" >tokens.ids 2>&1)
    (cd "$top/run" && "$glmtune" tokenize tokenizer.bin --decode <tokens.ids >tokens.text 2>&1)
    (cd "$top/run" && "$glmtune" help train >help-train; "$glmtune" train --help >>help-train) 2>&1
}

export GLM_REAL=${GLM_REAL:+$(realpath "$GLM_REAL")}
mkdir "$top/stopped" "$top/bin"
cp "$(dirname "$here")/tokenizer.bin" "$top/bin"
glmtune=$top/bin/glmtune        # the same name for both, since messages show it
for which in old new; do
    cp "${!which}" "$glmtune"
    mkdir "$top/run"
    everything
    normalize "$top/run"
    mv "$top/run" "$top/$which"
done
cd "$top" || exit 1
while read -r file; do
    if cmp -s "old/$file" "new/$file"; then passed=$((passed + 1)); continue; fi
    if [[ "${HEADERS:-}" = may-differ && $file = *.safetensors ]] && cmp -s <(numbers "old/$file") <(numbers "new/$file"); then
        passed=$((passed + 1)) headers="$headers $file"
        continue
    fi
    failed=$((failed + 1))
    echo "FAILED: $file differs"
    cmp "old/$file" "new/$file" 2>&1 | head -n 1
done < <( (cd old && find . -type f; cd ../new && find . -type f) | sort -u)
[ -z "$headers" ] || echo "note: only the header differs (settings and the like):$headers" | cut -c1-400
grep -L '^0$' old/*.status | sed 's/^/note: fails in the old one too: /'
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
