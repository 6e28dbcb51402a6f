#!/bin/sh
# What early stopping is good for: the bundled model, 40 samples about who it is, up to 300 epochs, a quarter held out.
# One run stops by itself and keeps its best step; the other has the same samples and settings and no such limit. Prints
# the loss of each result on the samples held out. About two minutes on two cores.
#     tests/overfit.sh [PROGRAM]
set -e
cd "$(dirname "$0")/.."
program=${1:-./glmtune}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk -v work="$work" '{ print >(work (NR % 4 ? "/train.jsonl" : "/dev.jsonl")) }' tests/data/identity.jsonl

tune() {        # FOLDER [OPTION ...]
    folder=$1
    shift
    "$program" train "$work" tests/tiny --output_dir "$work/$folder" --num_train_epochs 300 --learning_rate 2e-3 \
        --lr_scheduler_type constant --save_steps 100000 "$@" >"$work/$folder.out" 2>"$work/$folder.err"
    grep -E '^(data|validation|time) ' "$work/$folder.out"
    grep '^stopped early' "$work/$folder.err" || true
    result=$(sed -n 's/.*the result is \([^;]*\);.*/\1/p' "$work/$folder.err")
    "$program" eval "$work/dev.jsonl" "$result" --max_new_tokens 40 | grep -E '^(loss|accuracy|rouge-l|repetition_rate) '
}

echo 'with --early_stopping_patience 5 --load_best_model_at_end:'
tune early --early_stopping_patience 5 --load_best_model_at_end --save_total_limit 1
echo 'without:'
tune late --save_total_limit 1
