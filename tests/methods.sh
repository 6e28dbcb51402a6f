#!/usr/bin/env bash
# Every tuning method on the same small task: the bundled model learns from 40 samples who it shall be from now on.
#
#     tests/methods.sh [FOLDER]       runs, answers and compare.svg go to FOLDER (build/methods)
#
# Prints what `glmtune compare` says, then a Markdown table. Right: of the questions that the samples do not have, how
# many are answered with the new name or maker. Kept: share of the bundled model's own tasks that are still answered to
# the letter. Methods that this build does not have are left out. A few minutes; needs ./glmtune (make) and cc.
set -eu
cd "$(dirname "$0")/.."
work=${1:-build/methods}
rm -rf "$work"
mkdir -p "$work"
cc -std=gnu11 -O2 tests/make_corpus.c -o "$work/make_corpus"
"$work/make_corpus" test identity >"$work/questions.jsonl"
"$work/make_corpus" heldout all 15 7 | grep -v '"kind": "ident"' >"$work/others.jsonl"
"$work/make_corpus" replay 2000 5 >"$work/replay.jsonl"

linears=q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj
methods='
lora     1.5e-3  150  --r 8 --lora_alpha 16 --lora_dropout 0 --target_modules '$linears'
full     3e-4    80
freeze   1e-3    100  --trainable_layers 1
ptuning  5e-3    200  --num_virtual_tokens 16 --prefix_projection true --encoder_hidden_size 128 --prefix_dropout 0
adapter  2e-3    120  --reduction_factor 4
'
options=$(./glmtune train --help)
there_are=,$(sed -nE 's/^ *--method .*: ([a-z,]+) \[.*/\1/p' <<<"$options"),
replay=''
! grep -q -e '--replay ' <<<"$options" || replay="--replay $work/replay.jsonl:1"

answered() {        # MODEL DATA OUT: answers to the prompts of DATA; prints the share that is right to the letter
    ./glmtune eval "$2" "$1" --max_new_tokens 64 --out "$3" 2>/dev/null | awk '$1 == "accuracy" { printf "%.1f\n", $2 }'
}

rows=''
runs=()
while read -r method rate steps more; do
    case $there_are in *,$method,*) ;; *) continue ;; esac
    run=$work/$method
    ./glmtune train tests/data/identity.jsonl tests/tiny --method "$method" --learning_rate "$rate" --max_steps "$steps" \
        $more $replay --lr_scheduler_type linear --warmup_steps 10 --per_device_train_batch_size 8 \
        --gradient_accumulation_steps 1 --logging_steps 1 --eval_steps 10 --eval_file "$work/questions.jsonl" \
        --output_dir "$run" 2>"$run.log" || { tail -n 1 "$run.log" >&2; exit 1; }
    tuned=$run/checkpoint-$steps
    answered "$tuned" "$work/questions.jsonl" "$run.answers.jsonl" >/dev/null
    asked=$(wc -l <"$run.answers.jsonl")
    right=$(sed 's/.*"answer": //' "$run.answers.jsonl" | grep -cE '小田|Tianbot|南山实验室|South Hill Lab' || true)
    runs+=("$run")
    rows+="$run $right/$asked $(answered "$tuned" "$work/others.jsonl" "$run.others.jsonl")"$'\n'
done <<<"${methods:1:-1}"

./glmtune compare "${runs[@]}" --out "$work/compare.svg" | tee "$work/table"
base=$(answered tests/tiny "$work/others.jsonl" "$work/base.others.jsonl")
echo
echo "| method${replay:+, with replay} | trainable | memory | tokens/s | best evaluation loss | right | kept (base: $base %) |"
echo '|---|---|---|---|---|---|---|'
awk 'NR == FNR { right[$1] = $2; kept[$1] = $3; next }
     FNR > 1 { printf "| %s | %s | %s %s | %s | %s | %s | %s %% |\n", $2, $3, $4, $5, $7, $9, right[$1], kept[$1] }' \
    <(printf %s "$rows") "$work/table"
