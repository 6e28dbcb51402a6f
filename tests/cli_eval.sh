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

# ---- Evaluation during training: the best step is kept, a run stops by itself ------------------------------------

mkdir split
head -n 16 "$tests/data/facts.jsonl" | awk '{ print >(NR % 4 ? "split/train.jsonl" : "split/dev.jsonl") }'
short='--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --lr_scheduler_type constant --warmup_ratio 0'
works 'step 0: ln(vocabulary) 7.9047|step 0/3  validation loss|, training |rouge-1|of 4 answers|reference|trained     lora|validation  best|answers     rouge-1' \
    train split "$tiny" --output_dir good --num_train_epochs 1 --predict_with_generate --max_new_tokens 12 $short
check 'the log has the evaluation before step 1, without answers' grep -qE '^[{]"step": 0, "eval_loss": [^,]*, "eval_perplexity": [^,]*, "tokens": 0, "best": true[}]$' good/log.jsonl
check 'and that of the last step, with them' grep -q '^{"step": 3, "eval_loss": .*"eval_perplexity": .*"eval_rouge-1": .*"eval_repetition_rate": ' good/log.jsonl
check 'one answer before training' test "$(grep -c '^answer ' stderr)" = 2
rm -rf good
head -n 60 "$tests/data/ads.jsonl" >split/many.jsonl
works 'each validation will answer 50 samples, in up to about|of 50 answers|on 60 samples' train split/train.jsonl "$tiny" \
    --eval_file split/many.jsonl --output_dir good --max_steps 1 --predict_with_generate --max_new_tokens 2 $short
works 'of 60 answers' eval split/many.jsonl good/checkpoint-1 --max_new_tokens 2
rm -rf good split/many.jsonl
# a rate so high that validation never gets better than before the first step
works 'stopped early: 2 validations in a row were not lower by more than|at step 0 |NO BETTER|less than 0.5|the result is early/checkpoint-2;' train split "$tiny" \
    --output_dir early --num_train_epochs 50 --learning_rate 0.5 --eval_steps 1 --early_stopping_patience 2 \
    --load_best_model_at_end --save_total_limit 1 $short
check 'only the last checkpoint stays' test early/checkpoint-2 = \
    "$(find early -name 'checkpoint-*' | sort | tr '\n' ' ' | sed 's/ $//')"
works 'stopped early' train split "$tiny" --output_dir early --num_train_epochs 50 --learning_rate 0.5 --eval_steps 1 \
    --early_stopping_patience 2 --load_best_model_at_end --save_total_limit 1 --resume_from_checkpoint yes $short
rm -rf early
echo '{"prompt": "你是谁？", "response": "我是小格。"}' >own.jsonl      # what the base answers
works 'NO BETTER than before training|learned by heart: take --learning_rate 0.001, or' train "$tests/data/identity.jsonl" \
    "$tiny" --eval_file own.jsonl --output_dir early --max_steps 60 --learning_rate 0.003
works 'little was learned: leave --learning_rate out, or take --learning_rate 3e-09' train split "$tiny" --output_dir early \
    --max_steps 8 --learning_rate 1e-9 $short --force
rm -rf early own.jsonl
works 'training made the loss higher: leave --learning_rate out' train split "$tiny" --output_dir early --max_steps 8 \
    --learning_rate 3 $short
rm -rf early
works 'warning: no samples are held out|done' train split/train.jsonl "$tiny" --output_dir early --val_size 0 \
    --load_best_model_at_end --max_steps 1
rm -rf early

# ---- Replay ------------------------------------------------------------------------------------------------------

works '12 samples and 4 to replay|6 steps = 2 epochs' train split "$tiny" --output_dir whole --num_train_epochs 2 \
    --replay split/dev.jsonl:0.5 $short
works 'saved' train split "$tiny" --output_dir parts --num_train_epochs 2 --replay split/dev.jsonl:0.5 $short --stop_at_step 2
works 'goes on' train split "$tiny" --output_dir parts --num_train_epochs 2 --replay split/dev.jsonl:0.5 $short \
    --resume_from_checkpoint yes
check 'replay goes on to the same bits' cmp whole/checkpoint-6/adapter_model.safetensors \
    parts/checkpoint-6/adapter_model.safetensors
works 'tokens' train split "$tiny" --output_dir plain --num_train_epochs 2 $short
check 'replay changes what is learned' test "$(cksum <whole/checkpoint-6/adapter_model.safetensors)" != \
    "$(cksum <plain/checkpoint-6/adapter_model.safetensors)"
rm -rf whole parts plain
misuse '--replay|FILE:RATIO' train split "$tiny" --output_dir out --replay split/dev.jsonl
misuse '--replay|above 0' train split "$tiny" --output_dir out --replay split/dev.jsonl:0
refuse 'nowhere.jsonl' train split "$tiny" --output_dir out --replay nowhere.jsonl:1
rm -rf split

# ---- Forgetting --------------------------------------------------------------------------------------------------

head -n 12 "$tests/data/facts.jsonl" >facts12.jsonl
head -n 16 "$tests/data/ads.jsonl" >ads16.jsonl
for method in lora full ptuning; do
    works 'loss|before|after' train ads16.jsonl "$tiny" --output_dir drift --max_steps 2 --learning_rate 1e-3 \
        --method $method --probe facts12.jsonl --force
    said=$(sed -n 's/^probe .*: loss \([0-9.]*\) before, \([0-9.]*\) after.*/\1 \2/p' stdout)
    base=$("$program" eval facts12.jsonl "$tiny" --max_new_tokens 1 2>err.eval | awk '$1 == "loss" { print $2 }')
    tuned=$("$program" eval facts12.jsonl drift/checkpoint-2 --max_new_tokens 1 2>err.eval | awk '$1 == "loss" { print $2 }')
    check "$method: the probe's losses are those that eval finds" test "$said" = "$base $tuned" -a "$base" != "$tuned"
done
works 'answers before: rouge-1|answers after: rouge-1' train ads16.jsonl "$tiny" --output_dir drift \
    --max_steps 1 --probe facts12.jsonl --force --predict_with_generate --max_new_tokens 4
refuse 'nowhere.jsonl' train ads16.jsonl "$tiny" --output_dir out --probe nowhere.jsonl
rm -rf drift facts12.jsonl ads16.jsonl err.eval

# ---- What a reviewer found: samples twice in a batch, numbers that JSON has not, a best step elsewhere -----------

printf '%s\n' '{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}' '{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}' >few.jsonl
echo '{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "labels": [1, 2, 3, 4, 5, 6, 7, 8, 9]}' >old.jsonl
works 'done' train few.jsonl m --replay old.jsonl:4 --per_device_train_batch_size 4 --max_steps 3 --val_size 0 \
    --output_dir twice
run train few.jsonl m --method full --learning_rate 1000 --warmup_ratio 0 --max_grad_norm 0 --eval_steps 1 --max_steps 3 \
    --eval_file old.jsonl --output_dir steep
! grep -q 'this is no JSON' stderr || want 'a log that is JSON'
judge
works 'done' train few.jsonl m --eval_file old.jsonl --learning_rate 0.5 --warmup_ratio 0 --eval_steps 1 --max_steps 4 \
    --output_dir 'a"b'
works 'done|went on from' train few.jsonl m --eval_file old.jsonl --learning_rate 0.5 --warmup_ratio 0 --eval_steps 1 \
    --max_steps 4 --output_dir moved --resume_from_checkpoint 'a"b/checkpoint-4' --load_best_model_at_end
rm -rf twice steep 'a"b' moved few.jsonl old.jsonl
