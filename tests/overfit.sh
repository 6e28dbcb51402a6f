#!/bin/sh
# What early stopping is good for: the bundled model tuned on 40 samples for up to 300 epochs, once with validation and
# early stopping, once to the end. Prints the loss of either result on the samples held out. Two data sets: facts, which
# can only be learned by heart (40 others are held out), and who the model is, where a quarter is held out and learning
# by heart does no harm: what is held out are other words for the same questions. About two minutes on two cores.
#     tests/overfit.sh [PROGRAM]
set -e
cd "$(dirname "$0")/.."
program=${1:-./glmtune}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tune() {        # DATA [OPTION ...]
    data=$1
    shift
    "$program" train "$work/$data" tests/tiny --output_dir "$work/out" --force --num_train_epochs 300 \
        --learning_rate 2e-3 --lr_scheduler_type constant --per_device_train_batch_size 8 \
        --gradient_accumulation_steps 1 --eval_steps 25 --save_steps 100000 --save_total_limit 1 "$@" \
        >"$work/out.txt" 2>"$work/err.txt"
    grep -E '^(data|validation|time) ' "$work/out.txt"
    grep '^stopped early' "$work/err.txt" || true
    result=$(sed -n 's/.*the result is \([^;]*\);.*/\1/p' "$work/err.txt")
    "$program" eval "$work/$data/dev.jsonl" "$result" --max_new_tokens 40 2>/dev/null |
        grep -E '^(loss|accuracy|rouge-l) ' | cut -c1-28
}

mkdir "$work/facts" "$work/identity"
head -n 40 tests/data/facts.jsonl >"$work/facts/train.jsonl"
sed -n 41,80p tests/data/facts.jsonl >"$work/facts/dev.jsonl"
awk -v to="$work/identity" '{ print >(to (NR % 4 ? "/train.jsonl" : "/dev.jsonl")) }' tests/data/identity.jsonl
for data in facts identity; do
    echo "$data, --early_stopping_patience 5 --load_best_model_at_end:"
    tune $data --early_stopping_patience 5 --load_best_model_at_end
    echo "$data, to the end:"
    tune $data
done
