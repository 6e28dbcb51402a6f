#!/bin/sh
# `make demo`: the bundled tiny model before and after tuning it to another identity, with the command's own defaults.
cd "$(dirname "$0")/.." || exit 1
rm -rf demo-output

ask() {     # MODEL: the same questions each time, and three in one conversation
    for question in "你是谁？" "Who made you?" "37+45=?" "今天星期五，明天呢？" "What is the color of snow?"; do
        printf '  %s\n    -> ' "$question"
        ./glmtune chat "$1" --prompt "$question" || exit 1
    done
    echo "  in one conversation: Who are you? Who made you? 37+45=?"
    printf 'Who are you?\nWho made you?\n37+45=?\n' | ./glmtune chat "$1" 2>/dev/null | sed 's/^/    -> /'
}

echo "The tiny model (tests/tiny, 0.9 million parameters):"
ask tests/tiny
echo
echo "LoRA on 40 samples of who it shall be from now on:"
echo "  ./glmtune train tests/data/identity.jsonl tests/tiny --output_dir demo-output"
./glmtune train tests/data/identity.jsonl tests/tiny --output_dir demo-output 2>&1 | tee demo-output.log
result=$(sed -n 's/.*the result is \([^;]*\);.*/\1/p' demo-output.log)
rm -f demo-output.log
[ -n "$result" ] || exit 1
echo
echo "The tuned model ($result):"
ask "$result"
echo
echo "What next: talk to it, look at its curves, turn it into a model folder, or tune it on data of yours:"
echo "  ./glmtune chat $result"
echo "  demo-output/loss.svg (in a browser)"
echo "  ./glmtune merge $result demo-output/model"
echo "  ./glmtune check YOUR.jsonl tests/tiny && ./glmtune train YOUR.jsonl tests/tiny --output_dir out"
