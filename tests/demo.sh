#!/bin/sh
# `make demo`: the bundled tiny model before and after tuning it to another identity.
cd "$(dirname "$0")/.." || exit 1
rm -rf demo-output

ask() {     # MODEL: the same questions each time
    for question in "你是谁？" "Who made you?" "37+45=?" "今天星期五，明天呢？" "What is the color of snow?"; do
        printf '  %s\n    -> ' "$question"
        ./glmtune chat "$1" --prompt "$question" || exit 1
    done
}

echo "The tiny model (tests/tiny, 0.9 million parameters):"
ask tests/tiny
echo
echo "LoRA on 40 samples of who it shall be from now on (tests/data/identity.jsonl):"
./glmtune train tests/data/identity.jsonl tests/tiny --method lora --target_modules \
    q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj --learning_rate 2e-3 --num_train_epochs 20 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --eval_steps 50 --output_dir demo-output || exit 1
echo
echo "The tuned model:"
ask "$(ls -d demo-output/checkpoint-* | tail -n 1)"
