# ---- Evaluation --------------------------------------------------------------------------------------------------

tiny=$tests/tiny
head -n 12 "$tests/data/ads.jsonl" >ads12.jsonl
works 'loss |perplexity|rouge-1|bleu-4|accuracy|stop_rate|repetition_rate|of 12 answers|prompt|reference|answer' \
    eval ads12.jsonl "$tiny" --out answers.jsonl --max_new_tokens 40
cp stdout eight
check 'a line for each answer' test "$(wc -l <answers.jsonl)" = 12
check 'no prompt holds its reference' awk -F'", "' '{ sub(/.*"prompt": "/, "", $1); sub(/reference": "/, "", $2)
    if (index($1, $2)) exit 1 }' answers.jsonl
mv answers.jsonl answers8.jsonl
works 'of 12 answers' eval ads12.jsonl "$tiny" --out answers.jsonl --max_new_tokens 40 --per_device_eval_batch_size 1
check 'the same answers one by one' cmp answers.jsonl answers8.jsonl
check 'the same scores one by one' cmp stdout eight
echo '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}' >empty.jsonl
works 'of 1 answers|rouge-1' eval empty.jsonl "$tiny" --max_new_tokens 8
works 'of 12 answers|stop_rate            0' eval ads12.jsonl "$tiny" --max_new_tokens 1 --overlong drop
works 'loss' eval data.jsonl m --max_new_tokens 4
refuse 'dev.json' eval "$tiny" "$tiny"
refuse 'is no folder' eval ads12.jsonl ads12.jsonl
misuse 'per_device_eval_batch_size' eval ads12.jsonl "$tiny" --per_device_eval_batch_size 0
check 'an evaluation that failed leaves no file' test ! -e out
rm -f ads12.jsonl answers.jsonl answers8.jsonl empty.jsonl eight
