#!/usr/bin/env bash
# The proof on the job: every method on four tasks, on the bundled model; what it learns, what it forgets, how it ends its
# answers, and what bad data, too many epochs or a wrong rate do to it.
#
#     tests/report.sh [FOLDER]            runs go to FOLDER (build/report), tables and curves to tests/report
#     tests/report.sh --short [FOLDER]    two methods, one task, one seed; checks the bars, writes no report
#
# One run is one thread, and as many go at once as there are cores; the numbers do not depend on that. Every number of
# report.md is the same each time; what depends on the machine stands in times.md. Needs ./glmtune (make) and cc.
set -eu
cd "$(dirname "$0")/.."
short=0
[ "${1:-}" != --short ] || { short=1; shift; }
cores=$(nproc 2>/dev/null || echo 1)        # before OMP_NUM_THREADS is set, which nproc heeds
export work=${1:-build/report} program=${GLMTUNE:-./glmtune} base=tests/tiny OMP_NUM_THREADS=1
seeds='1 2 3'
methods='lora full freeze adapter ptuning'
tasks='identity ads sentiment facts'

# Every setting that a run has: method, task, learning rate, steps, old samples replayed for each new one, and what else.
# Chosen on the validation sets (make_corpus dev), hit rate and probe together. A step has 8 new samples; the rate falls
# linearly after 10 steps of warming up.
settings='
lora     identity   2e-3    200  0.125
lora     ads        3e-3    300  1      --lora_dropout 0.1
lora     sentiment  4e-3    600  0.5    --lora_dropout 0.2
lora     facts      1e-2    600  1      --lora_dropout 0.1 --adam_epsilon 1e-4
full     identity   3e-4    200  0.125
full     ads        4e-4    300  1
full     sentiment  8e-4    400  0.5    --adam_epsilon 1e-6
full     facts      3e-3    500  1      --adam_epsilon 1e-3
freeze   identity   1.5e-3  200  0.125
freeze   ads        2e-3    300  1
freeze   sentiment  1.5e-3  400  0.5    --trainable_layers 3
freeze   facts      4e-3    800  1
adapter  identity   2e-3    200  0.125  --reduction_factor 4
adapter  ads        4e-3    300  1      --reduction_factor 4
adapter  sentiment  4e-3    400  0.5    --reduction_factor 4
adapter  facts      6e-3    800  1      --reduction_factor 1 --adapter_type pfeiffer
ptuning  identity   1e-1    600  0.5
ptuning  ads        1e-1    800  1
ptuning  sentiment  1e-1    800  0.5
ptuning  facts      1e-1   1000  1
'
shape() {       # METHOD: what it trains, for all tasks
    case $1 in
    lora) echo "--r 8 --lora_alpha 16 --target_modules q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj" ;;
    freeze) echo "--trainable_layers 2" ;;
    ptuning) echo "--num_virtual_tokens 64" ;;
    esac
}

setting() {     # METHOD TASK: rate, steps, ratio of replay and what else
    awk -v m="$1" -v t="$2" '$1 == m && $2 == t { $1 = $2 = ""; print }' <<<"$settings"
}

number() { sed -nE "s/$1/\1/p" "$2" | tail -n 1; }

base_of() { case $1 in *-nf4*) echo "$work/nf4" ;; *) echo "$base" ;; esac; }     # RUN: what is tuned

result_of() { sed -n 's/.*the result is \([^;]*\);.*/\1/p' "$1.err"; }

# The command as it is typed, with no option but the method, the seed and what is replayed, judged in the same way.
tune_alone() {  # RUN METHOD TASK RATIO SEED
    local run=$work/$1 method=$2 task=$3 ratio=$4 seed=$5 more=() tuned
    [ "$method" = lora ] || more=(--method "$method")
    [ "$ratio" = 0 ] || more+=(--replay "$work/replay.jsonl:$ratio")
    "$program" train "$work/$task.jsonl" "$(base_of "$1")" --output_dir "$run" --seed "$seed" "${more[@]}" >"$run.out" 2>"$run.err" ||
        { tail -n 1 "$run.err" >&2; return 1; }
    tuned=$(result_of "$run")
    judge "$tuned" "$task" "$run"
    echo "steps ${tuned##*-}" >>"$run.facts"
    find "$run" -maxdepth 1 -name 'checkpoint-*' | wc -l | awk '{ print "checkpoints", $1 }' >>"$run.facts"
    [ "$task" != identity ] || ten_questions "$tuned" >>"$run.facts"
}

# Ten questions about name and maker, asked as a user would; how many answers have the new one.
ten_questions() {       # MODEL
    local question answer right=0
    while read -r question; do
        answer=$("$program" chat "$1" --prompt "$question" --max_new_tokens 64 2>/dev/null)
        case $answer in *小田*|*Tianbot*|*南山实验室*|*"South Hill Lab"*) right=$((right + 1)) ;; esac
    done <<'END'
你是谁？
你叫什么名字？
你的名字叫什么？
请介绍一下你自己。
谁开发了你？
Who are you?
What is your name?
Tell me your name.
Who made you?
Who created you?
END
    echo "ten $right"
}

# Tunes and judges; writes "name value" lines to RUN.facts. DATA: a file in $work; TASK: what it is judged by.
tune() {        # RUN METHOD TASK DATA RATIO SEED [OPTION ...]
    local run=$work/$1 method=$2 task=$3 data=$4 ratio=$5 seed=$6 from tuned more=()
    from=$(base_of "$1")
    shift 6
    [ "$ratio" = 0 ] || more=(--replay "$work/replay.jsonl:$ratio")
    "$program" train "$work/$data.jsonl" "$from" --method "$method" $(shape "$method") "${more[@]}" --seed "$seed" \
        --adam_beta2 0.98 --lr_scheduler_type linear --warmup_steps 10 --per_device_train_batch_size 8 \
        --gradient_accumulation_steps 1 --logging_steps 10 --eval_file "$work/dev-$task.jsonl" --eval_steps 20 --save_steps 100000 \
        --load_best_model_at_end false --early_stopping_threshold 0 \
        --probe "$work/probe.jsonl" --output_dir "$run" --force "$@" >"$run.out" 2>"$run.err" ||
        { tail -n 1 "$run.err" >&2; return 1; }
    tuned=$(result_of "$run")
    judge "$tuned" "$task" "$run"
    {
        echo "parameters $(number '^trained .*: ([0-9]+) parameters.*' "$run.out")"
        echo "best_step $(number '^validation .*best .* at step ([0-9]+),.*' "$run.out")"
        echo "best_loss $(number '^validation .*best ([0-9.]+) .*' "$run.out")"
        echo "time $(number '^time +(.*) of training.*' "$run.out" | tr ' ' _)"
        echo "speed $(number '^time .* ([0-9,]+) tokens\/s' "$run.out")"
        echo "memory $(number '^memory +([0-9.]+ [KMG]iB).*' "$run.out" | tr ' ' _)"
        echo "steps ${tuned##*-}"
        grep -o '"loss": [0-9.e+-]*' "$run/log.jsonl" | awk '$2 > most { most = $2 } END { print "highest_loss", most }'
        for part in "train $data" "dev dev-$task"; do
            "$program" eval "$work/${part#* }.jsonl" "$tuned" --max_new_tokens 1 2>/dev/null |
                awk -v name="${part% *}_loss" '$1 == "loss" { print name, $2 }'
        done
    } >>"$run.facts"
}

judge() {       # MODEL TASK RUN: begins RUN.facts with its scores on the task's test set and on the probe
    local files=("$work/test-$2.jsonl")
    [ "$2" != identity ] || files+=("$work/test-conversations.jsonl")
    "$work/probe" "$1" "${files[@]}" >"$3.test"
    "$work/probe" "$1" "$work/probe.jsonl" >"$3.probe"
    awk '$1 == "all" { n += $13; stopped += $13 * $7; loops += $13 * $9; if (FILENAME ~ /probe$/) print "kept", $5 }
         $1 != "all" && $1 != "mean" && FILENAME ~ /test$/ { print $1, $5; print $1 "_rouge", $11 }
         END { printf "stopped %.6f\nloops %.6f\n", stopped / n, loops / n }' "$3.test" "$3.probe" >"$3.facts"
}

run_jobs() {    # lines on stdin, each the arguments of tune; as many at once as there are cores
    local line status=0
    while read -r line; do
        case $line in *-alone.*) tune_alone $line & ;; *) tune $line & ;; esac
        [ "$(jobs -rp | wc -l)" -lt "$cores" ] || wait -n || status=1
    done
    while [ -n "$(jobs -rp)" ]; do wait -n || status=1; done
    return $status
}

jobs_of() {     # METHOD TASK REPLAY SEED [NAME DATA OPTION ...]: a line for run_jobs
    local method=$1 task=$2 replay=$3 seed=$4 name=${5:-$2} data=${6:-$2} rate steps ratio more
    shift $(($# < 6 ? $# : 6))
    read -r rate steps ratio more <<<"$(setting "$method" "$task")"
    [ "$replay" = 1 ] || ratio=0
    # of an option that is given twice the last one counts
    echo "$method.$name.$replay.$seed $method $task $data $ratio $seed --learning_rate $rate --max_steps $steps $more $*"
}

all_jobs() {
    local method task replay seed factor rate more
    for seed in $seeds; do
        for task in $tasks; do
            for method in $methods; do
                for replay in 1 0; do jobs_of "$method" "$task" $replay "$seed"; done
            done
        done
        for method in $methods; do jobs_of "$method" identity 1 "$seed" swapped swapped; done
    done
    for seed in $seeds; do
        for task in $tasks; do
            for method in $methods; do echo "$method.$task-alone.0.$seed $method $task 0 $seed"; done
        done
        echo "lora.identity-alone.1.$seed lora identity 1 $seed"
        for task in $tasks; do
            jobs_of lora "$task" 1 "$seed" "$task-nf4" "$task"
            echo "lora.$task-nf4-alone.0.$seed lora $task 0 $seed"
        done
    done
    for method in $methods; do
        read -r rate more <<<"$(setting "$method" identity)"
        for factor in 0.1 0.3 3 10; do      # x0_1, x0_3, ...: names have no points
            jobs_of "$method" identity 1 1 "x${factor/./_}" identity \
                --learning_rate "$(awk "BEGIN { print $rate * $factor }")"
        done
    done
    for method in lora full ptuning; do         # 40 samples, 8 a step: 300 epochs, at a rate that does not fall
        jobs_of "$method" identity 0 1 to-the-end identity --max_steps 1500 --lr_scheduler_type constant
        jobs_of "$method" identity 0 1 stops-early identity --max_steps 1500 --lr_scheduler_type constant \
            --early_stopping_patience 5 --load_best_model_at_end
    done
}

make_data() {
    rm -rf "$work"
    mkdir -p "$work"
    cp tokenizer.bin "$work"
    cc -std=gnu11 -O2 tests/make_corpus.c -o "$work/make_corpus"
    cc -std=gnu11 -O3 -march=native -ffp-contract=fast -Wno-unused-function -Wno-unknown-pragmas tests/probe.c \
        -o "$work/probe" -lm
    local use set
    for set in $tasks swapped; do "$work/make_corpus" "$set" >"$work/$set.jsonl"; done
    for use in dev test; do
        for set in $tasks conversations; do "$work/make_corpus" $use $set >"$work/$use-$set.jsonl"; done
    done
    "$work/make_corpus" replay 4000 5 >"$work/replay.jsonl"
    # what the base can do, who it is left out
    "$work/make_corpus" heldout all 25 7 | grep -v -e '"kind": "ident"' -e '"kind": "talk"' >"$work/probe.jsonl"
}

base_facts() {
    for task in $tasks; do judge "$base" "$task" "$work/base.$task"; done
    "$program" quantize "$base" "$work/nf4" --bits 4 >"$work/nf4.out" 2>&1
    judge "$work/nf4" identity "$work/base.nf4"
}

curves() {      # one picture a task: the runs with replay, first seed
    local task method runs
    for task in $tasks; do
        runs=()
        for method in $methods; do runs+=("$work/$method.$task.1.1"); done
        "$program" compare "${runs[@]}" --force --out "tests/report/$task.svg" >/dev/null 2>&1
    done
}

head_of_report() {
    cat <<'END'
# What the methods learn, and what they forget

Made by `make report`; every number is the same each time. The bundled model (0.94 million parameters), three seeds: a cell
has the mean, and the worst seed in brackets. All in percent but the gap and the steps.

- **known**: questions about name, maker and job in wordings of the base that no sample has; **later**: the same after another
  exchange; **novel**: in wordings that the base never saw (asked who it was, the base itself answers 77 % of them right);
  **doubted**: another name is offered, the old one too; **turn 1, 8, 16**: conversations in which the role is asked for at these
  turns, the model hearing its own answers throughout.
- **kept**: change of the share of 300 held-out tasks of the base that are answered to the letter, in points (its own identity
  is left out).
- **stop**, **loops**: share of all answers that end in a stop token, that end in a loop. **gap**: loss on the validation set less
  that on the samples. **best step**: where the validation loss was lowest.

END
}

write_report() {
    mkdir -p tests/report
    {
        head_of_report
        awk -f tests/report.awk "$work"/*.facts
        printf '### Settings\n\nRate, steps, old samples replayed for each new one, what else; the rest stands in `tests/report.sh`.\n\n| method |'
        printf ' %s |' $tasks
        printf '\n|---|---|---|---|---|\n'
        for method in $methods; do
            printf '| %s `%s` |' "$method" "$(shape "$method")"
            for task in $tasks; do printf ' %s |' "$(setting "$method" "$task" | sed -E 's/^ *([^ ]+) ([^ ]+) ([^ ]+)/\1, \2, \3/; s/ --/; --/')"; done
            echo
        done
    } >"$work/report.md"
    awk -v times=1 -f tests/report.awk "$work"/*.facts >"$work/times.md"
    mv "$work/report.md" "$work/times.md" tests/report/
    curves
}

# ---- a short form for `make test` ----
passed=0 failed=0
holds() {       # WHAT VALUE BAR: VALUE must be at least BAR
    if awk "BEGIN { exit !($2 >= $3) }"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED  report: $1 is $2, must be at least $3"
    fi
}

fact() { awk -v name="$2" '$1 == name { print $2 }' "$work/$1.facts"; }

check_bars() {
    local method run turn
    judge "$base" identity "$work/base.identity"
    { jobs_of lora identity 1 1; jobs_of freeze identity 1 1; jobs_of lora identity 1 1 again
      echo "lora.identity-alone.0.42 lora identity 0 42"; } | run_jobs
    for method in lora freeze; do
        run=$method.identity.1.1
        holds "$method: right in wordings that the base knows" "$(fact "$run" known)" 0.90
        for turn in 1 8 16; do holds "$method: right at turn $turn" "$(fact "$run" turn_$turn)" 0.90; done
        holds "$method: answers that stop" "$(fact "$run" stopped)" 0.98
        holds "$method: answers without a loop" "$(awk "BEGIN { print 1 - $(fact "$run" loops) }")" 0.98
        holds "$method: kept of what the base can do, change" \
            "$(awk "BEGIN { print $(fact "$run" kept) - $(fact base.identity kept) }")" -0.06
    done
    run=lora.identity-alone.0.42
    holds "without an option: right in wordings that the base knows" "$(fact "$run" known)" 0.90
    holds "without an option: right at turn 8" "$(fact "$run" turn_8)" 0.85
    holds "without an option: of ten questions" "$(fact "$run" ten)" 9
    holds "without an option: kept, change" "$(awk "BEGIN { print $(fact "$run" kept) - $(fact base.identity kept) }")" -0.15
    holds "without an option: two less the checkpoints that are left" "$(awk "BEGIN { print 2 - $(fact "$run" checkpoints) }")" 0
    holds "lines that two runs of one command differ in, less than one" \
        "$(diff <(grep -v -e time -e speed -e memory "$work/lora.identity.1.1.facts") \
                <(grep -v -e time -e speed -e memory "$work/lora.again.1.1.facts") | grep -c '^[<>]' | awk '{ print 1 - $1 }')" 1
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

make_data
if [ "$short" = 1 ]; then
    check_bars
else
    base_facts
    all_jobs | run_jobs
    write_report
fi
