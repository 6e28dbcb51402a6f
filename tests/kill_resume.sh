#!/usr/bin/env bash
# Kills a training run with SIGKILL at random moments, each time goes on with --resume_from_checkpoint yes, and demands
# the bytes of a run that nothing disturbed: adapter, moments, and the values of the log. All methods take turns.
#
#     tests/kill_resume.sh [TIMES [PROGRAM]]     100 times and ./glmtune unless told; KILL_SEED: another set of moments
set -u
times=${1:-100} program=$(realpath "${2:-./glmtune}")
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2
RANDOM=${KILL_SEED:-7}
export OMP_NUM_THREADS=1

cat >config.json <<'END'
{"model_type": "glm", "vocab_size": 2710, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
 "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 512}
END
for i in 1 2 3 4 5 6 7 8 9; do echo "{\"input_ids\": [1, $i, 6, 8, 1$i, 10], \"labels\": [-100, -100, 6, 8, 1$i, 10]}"; done >data.jsonl
"$program" init config.json base --dtype f32 >said 2>&1 || { cat said; exit 1; }
tune=("$program" train data.jsonl base --max_steps 12 --save_steps 1 --logging_steps 1 --gradient_accumulation_steps 2
      --learning_rate 0.01 --save_total_limit 3)
values() { sed -E 's/, "[a-z_]*_per_s[a-z_]*": [^,}]*//g' "$1/log.jsonl"; }

methods=(lora full ptuning adapter freeze)
for method in "${methods[@]}"; do
    began=$(date +%s%N)
    "${tune[@]}" --method $method --output_dir whole.$method >said 2>&1 || { cat said; exit 1; }
    took=$((($(date +%s%N) - began) / 1000000))
    values whole.$method >$method.values
done
passed=0 failed=0 begun=0
for i in $(seq "$times"); do
    method=${methods[i % ${#methods[@]}]} whole=whole.${methods[i % ${#methods[@]}]}
    rm -rf run
    "${tune[@]}" --method $method --output_dir run >said 2>&1 &
    moment=$(((RANDOM * 32768 + RANDOM) % (took * 1000)))
    sleep "$(printf '%d.%06d' $((moment / 1000000)) $((moment % 1000000)))"
    { kill -KILL $! && wait $!; } 2>killed
    [ -z "$(find run -maxdepth 1 -name 'checkpoint-*' 2>killed)" ] || begun=$((begun + 1))
    wrong=''
    "${tune[@]}" --method $method --output_dir run --resume_from_checkpoint yes >said 2>&1 || wrong='an error'
    for file in adapter_model.safetensors optimizer.safetensors; do
        cmp -s $whole/checkpoint-12/$file run/checkpoint-12/$file || wrong="$wrong $file"
    done
    values run | cmp -s - $method.values || wrong="$wrong log.jsonl"
    [ -z "$(find run -name '*.tmp')" ] || wrong="$wrong leftovers"
    if [ -z "$wrong" ]; then passed=$((passed + 1)); continue; fi
    failed=$((failed + 1))
    echo "FAILED  $method, killed after $moment of ${took}000 us: $wrong"
    tail -n 3 said
done
[ -z "${GLM_VERBOSE:-}" ] || echo "$begun of $times killed when there were checkpoints"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
