# compare, and the picture that train draws. Sourced by test_cli.sh.

here=$tests/tiny
short="--max_steps 12 --logging_steps 1 --eval_steps 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 1"
works 'done' train "$tests/data/facts.jsonl" "$here" $short --method lora --output_dir run-lora
works 'done' train "$tests/data/facts.jsonl" "$here" $short --method full --output_dir run-full --learning_rate 3e-4
check 'train draws loss.svg' grep -q '</svg>' run-lora/loss.svg
check 'train writes run.json' grep -q '"method": "lora", "trainable": ' run-lora/run.json

works 'run-lora|run-full|curves: both.svg' compare run-lora run-full --out both.svg
check 'compare: a head and a row for each run' [ "$(wc -l <stdout)" = 3 ]
check 'compare: the columns' \
    grep -qE '^ *method +trainable +memory +steps +tokens/s +loss +best step +eval_loss +rouge-l +accuracy +run$' stdout
check 'compare: rows as wide as the head' [ "$(awk '{ print index($0, $NF) }' stdout | sort -u | wc -l)" = 1 ]
check 'compare: full trains all' grep -qE '^ *full +938880 +[0-9.]+ MiB +12 .* run-full$' stdout
best=$(sed -nE 's/.*"eval_loss": ([0-9.]+).*/\1/p' run-full/log.jsonl | sort -n | head -n 1)
check "compare: the lowest evaluation loss, $best" \
    awk -v best="$best" '$NF == "run-full" { d = $9 - best; found = d < best * 1e-3 && -d < best * 1e-3 } END { exit !found }' stdout
check 'compare: a curve for each loss of each run' [ "$(grep -c '<polyline class="c[01]"' both.svg)" = 6 ]

refuse 'nowhere|no log.jsonl|--output_dir' compare run-lora nowhere --out c.svg
mkdir void
: >void/log.jsonl
refuse 'void/log.jsonl|is empty' compare void run-lora --out out.svg
cp -R run-lora damaged
sed -i '3s/"loss": /"loss: /' damaged/log.jsonl
refuse 'damaged/log.jsonl:3:' compare damaged
sed -i '3s/.*/{"los": 1}/' damaged/log.jsonl
refuse 'damaged/log.jsonl:3:1: no line of a log' compare damaged
refuse 'no-such-folder/c.svg' compare run-lora --out no-such-folder/c.svg
misuse 'usage: glmtune compare' compare
rm -rf run-lora run-full damaged void both.svg
