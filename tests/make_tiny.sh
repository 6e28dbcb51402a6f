#!/bin/sh
# Makes tokenizer.bin and tests/tiny from nothing: text from our own templates, a vocabulary learned from it, a GLM trained
# on it from random weights. The same build on the same type of machine gives the same bytes.
set -e
cd "$(dirname "$0")/.."
work=build/tiny
rm -rf "$work"
mkdir -p "$work"
cc -std=gnu11 -O2 tests/make_corpus.c -o "$work/make_corpus"
cc -std=gnu11 -O2 -Wno-unused-function tests/make_tokenizer.c -o "$work/make_tokenizer" -lm

"$work/make_corpus" base 450000 1 > "$work/base.jsonl"
"$work/make_tokenizer" "$work/base.jsonl" tokenizer.bin
./glmtune init tests/tiny.json "$work/start" --layout glm4-chat
./glmtune train "$work/base.jsonl" "$work/start" --method full --num_train_epochs 1 --val_size 0.001 \
    --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --learning_rate 4e-3 --warmup_steps 100 \
    --adam_beta2 0.98 --weight_decay 0.05 --logging_steps 100 --eval_steps 2000 --output_dir "$work/run"
rm -rf tests/tiny
./glmtune merge "$(ls -d "$work"/run/checkpoint-* | sort -t- -k2 -n | tail -n 1)" tests/tiny
cp "$work/run/log.jsonl" "$work/run/loss.svg" tests/tiny/
cc -std=gnu11 -O2 -march=native -Wno-unused-function tests/probe.c -o "$work/probe" -lm
cp tokenizer.bin "$work/"
"$work/make_corpus" heldout all 100 7 > "$work/heldout.jsonl"
"$work/probe" tests/tiny "$work/heldout.jsonl" | tee tests/tiny/accuracy.txt
