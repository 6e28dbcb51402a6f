#!/usr/bin/env bash
# One program against another, which computes elsewhere: the bundled model tuned by each method gives the same losses,
# two runs the same bits, a checkpoint of either goes on in the other, both evaluate it alike, and the other's gradients
# are those of the glmtune64 beside PROGRAM.
#
#     tests/cuda/compare.sh PROGRAM OTHER [METHOD ...]      ./glmtune ./glmtune-cuda; all methods unless named
#
# An emulated OTHER runs its threads in two orders. Closes with the numbers of checks that passed and failed.
set -u
export LC_ALL=C
here=$(cd "$(dirname "$0")/.." && pwd)
program=$(realpath "$1") other=$(realpath "$2")
shift 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2
passed=0 failed=0
fp32=3e-6 bf16=1e-2         # how far a loss may lie from the CPU's, relative

judge() {                   # WHAT STATUS [MEASURED]
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    if [ "$2" -ne 0 ] || [ -n "${GLM_VERBOSE:-}" ]; then
        if [ "$2" -eq 0 ]; then echo "ok      $1${3:+: $3}"; else echo "FAILED  $1${3:+: $3}"; fi
    fi
}

# With AdamW's usual epsilon of 1e-8 the first steps are the sign of each gradient: where that is rounding noise, two
# correct programs part (in freeze by 1e-5 after 4 steps; the float build from the double one by 1e-6).
train() {                   # PROGRAM FOLDER METHOD [OPTIONS]
    local what=$1 out=$2 method=$3
    shift 3
    "$what" train "$here/data/identity.jsonl" "$here/tiny" --output_dir "$out" --method "$method" --max_steps 4 \
        --gradient_accumulation_steps 2 --per_device_train_batch_size 2 --logging_steps 1 --val_size 0 \
        --learning_rate 2e-3 --adam_epsilon 1e-4 --warmup_ratio 0 --overlong drop "$@" >"$out.said" 2>&1
    judge "train $method, $out" $? "$(tail -n 1 "$out.said")"
}

numbers() { sed -n "s/.*\"$2\": \([-0-9.e+]*\).*/\1/p" "$1/log.jsonl"; }

close() {                   # WHAT TOLERANCE FILE FILE: numbers, one a line, as many as there, within it
    local worst
    worst=$(paste "$3" "$4" | awk -v most="$2" 'function abs(x) { return x < 0 ? -x : x }
        NF != 2 { bad = 1 } { d = abs($1 - $2) / (abs($1) + 1e-30); if (!(d <= worst)) worst = d }
        END { print worst + 0; exit !(NR && !bad && worst <= most) }')
    judge "$1 within $2" $? "$worst"
}

close_runs() {              # WHAT TOLERANCE FOLDER FOLDER
    numbers "$3" loss >one
    numbers "$4" loss >two
    close "$1: losses" "$2" one two
}

same_bits() {               # WHAT FOLDER FOLDER STEP
    local file
    for file in adapter_model.safetensors optimizer.safetensors; do
        cmp -s "$2/checkpoint-$4/$file" "$3/checkpoint-$4/$file"
        judge "$1: the same $file" $?
    done
}

eval_loss() {               # PROGRAM CHECKPOINT [OPTIONS]
    local what=$1 checkpoint=$2
    shift 2
    "$what" eval facts.jsonl "$checkpoint" --max_new_tokens 3 "$@" 2>"eval.said" |
        sed -n 's/^loss *\([0-9.]*\).*/\1/p'
}

for method in ${*:-lora full freeze ptuning adapter}; do
    rm -rf ./*
    head -n 10 "$here/data/facts.jsonl" >facts.jsonl
    train "$program" cpu "$method"
    train "$other" there "$method"
    CUDA_ORDER=reverse train "$other" again "$method"
    close_runs "$method, fp32" $fp32 cpu there
    same_bits "$method, two runs" there again 4
    train "$other" rounded "$method" --precision bf16
    CUDA_ORDER=shuffle train "$other" rounded-again "$method" --precision bf16
    close_runs "$method, bf16" $bf16 cpu rounded
    same_bits "$method, two runs in bf16" rounded rounded-again 4
    train "$program" here-there "$method" --stop_at_step 2
    train "$other" here-there "$method" --resume_from_checkpoint yes
    close_runs "$method, from the CPU on" $fp32 cpu here-there
    train "$other" there-here "$method" --stop_at_step 2
    train "$program" there-here "$method" --resume_from_checkpoint yes
    close_runs "$method, back to the CPU" $fp32 cpu there-here
    eval_loss "$program" cpu/checkpoint-4 >one
    eval_loss "$other" cpu/checkpoint-4 >two
    eval_loss "$other" cpu/checkpoint-4 --precision bf16 >three
    close "$method: loss in evaluation" $fp32 one two
    close "$method: loss in evaluation, bf16" $bf16 one three
    "${program}64" gradcheck --method "$method" --force --out gradients >/dev/null
    "$other" gradcheck --method "$method" --truth gradients >checked
    judge "$method: gradients of glmtune64" $? "$(grep WRONG checked || tail -n 1 checked)"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
