# What the command does with no option, and whether a run tells the truth about itself. Sourced by test_cli.sh; uses the
# small model f and data.jsonl that are there.

# ---- No option but a bar that is met soon ------------------------------------------------------------------------

alone="train $tests/data/identity.jsonl $tiny --output_dir alone"
works 'data: 35 samples to learn, 5 to validate|540 steps of 4 samples (2 at once) = 60 epochs|stops after 10 validations|time: at most|a checkpoint takes|the newest and the best are kept|are free|; the best so far|stopped early: learned|nothing old was replayed|--replay|the result is alone/checkpoint-' \
    $alone --early_stopping_loss 5
check 'five lines stand before step 0' test "$(sed '/^step 0/,$d' stderr | wc -l)" = 5
check 'settings that nobody chose are not told' test "$(grep -c '^settings' stderr)" = 0
check 'at most two checkpoints stay' test "$(find alone -name 'checkpoint-*' | wc -l)" -le 2
check 'a step line has no stale validation loss' test "$(grep -c 'loss.*eval loss' stderr)" = 0
check 'the log calls the best one so' test "$(grep -c '"best": true' alone/log.jsonl)" -ge 2
check 'the loss at its end is of the steps since the last line' awk '/"loss"/ { gsub(/[^0-9.]*"loss": |,.*/, ""); last = $0 }
    FNR == 1 && FILENAME == "stdout" { text = 1 } text && /at its end/ { exit !($5 < last) }' alone/log.jsonl stdout
rm -rf alone
works "try: $program chat 'al one/checkpoint-1'" train data.jsonl f --output_dir 'al one' --max_steps 1
rm -rf 'al one'

# ---- What is given wins, and nothing contradicts an adapter ------------------------------------------------------

works 'settings: r=4, lora_alpha=8, lora_dropout=0, max_steps=1' train data.jsonl f --output_dir r4 --r 4 --lora_alpha 8 \
    --lora_dropout 0 --max_steps 1
works 'done' train data.jsonl f --output_dir whole_model --method full --max_steps 1
for option in '--r 8' '--lora_alpha 32' '--use_rslora true' '--target_modules q_proj' '--method full'; do
    refuse 'leave the option out' train data.jsonl r4/checkpoint-1 --output_dir out --max_steps 1 $option
done
refuse 'leave the option out' train data.jsonl whole_model/checkpoint-1 --output_dir out --max_steps 1 --method lora
printf 'training_args: {output_dir: out, max_steps: 1}\npeft_config: {peft_type: LORA, r: 8}\n' >r8.yaml
refuse 'the adapter has r 4' train data.jsonl r4/checkpoint-1 r8.yaml
works 'r=4, lora_alpha=8, lora_dropout=0,|done' train data.jsonl r4/checkpoint-1 --output_dir on --max_steps 1 --r 4
check 'what it keeps is what it did' grep -q '"lora_dropout": 0,' on/checkpoint-1/adapter_config.json
rm -rf r4 whole_model on r8.yaml out

# ---- A run goes on with the settings that it began with ----------------------------------------------------------

begun='train data.jsonl f --max_steps 6 --learning_rate 0.01 --gradient_accumulation_steps 3 --weight_decay 0.1 --seed 7'
works 'done' $begun --output_dir whole
works 'stopped after step 3' $begun --output_dir parts --stop_at_step 3
works 'goes on from parts/checkpoint-3|done' train data.jsonl f --output_dir parts --resume_from_checkpoint yes
check 'with none of them named again, to the same bits' cmp whole/checkpoint-6/adapter_model.safetensors \
    parts/checkpoint-6/adapter_model.safetensors
check 'and to the same log' test "$(grep -o '"loss": [0-9.]*' whole/log.jsonl)" = "$(grep -o '"loss": [0-9.]*' parts/log.jsonl)"
# a rate that is no short number comes back to the bit
works 'done' train data.jsonl f --output_dir chosen --max_steps 4
works 'stopped after step 2' train data.jsonl f --output_dir chosen_parts --max_steps 4 --stop_at_step 2
works 'done' train data.jsonl f --output_dir chosen_parts --resume_from_checkpoint yes
check 'chosen rates too' cmp chosen/checkpoint-4/adapter_model.safetensors chosen_parts/checkpoint-4/adapter_model.safetensors
rm -rf chosen chosen_parts
refuse 'seed was 7, now it is 8' train data.jsonl f --output_dir parts --resume_from_checkpoint 6 --seed 8

# ---- The loss of a line is the mean since the one before ---------------------------------------------------------

works 'done' $begun --output_dir each --logging_steps 1
works 'done' $begun --output_dir every_third --logging_steps 3
losses() { sed -nE 's/.*"loss": ([0-9.e+-]+),.*/\1/p' "$1/log.jsonl" | tr '\n' ' '; }
told='every third line has the mean of three'
echo "$(losses each)$(losses every_third)" | awk 'function near(a, b) { return a - b < 1e-7 * a && b - a < 1e-7 * a }
    { exit !(NF == 8 && near(($1 + $2 + $3) / 3, $7) && near(($4 + $5 + $6) / 3, $8)) }' || want 'a mean'
judge
rm -rf whole parts each every_third

# ---- The disk ----------------------------------------------------------------------------------------------------

mkdir small_disk
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=200k none small_disk 2>/dev/null; then
    refuse 'not enough disk|side by side|are free|--save_total_limit' train data.jsonl f --output_dir small_disk/run --max_steps 2
    check 'before the first step' test "$(grep -c '^step' stderr)" = 0
    umount small_disk
else
    skip 'a small disk: needs root, and a mount'
fi
# A disk that fills while the model trains: the adapter is saved all the same, and the run says what is missing.
if [ "$(id -u)" = 0 ] && mkdir -p small_disk && mount -t tmpfs -o size=2500k none small_disk 2>/dev/null; then
    "$program" train data.jsonl f --method full --output_dir small_disk/run --max_steps 1000000 --save_steps 1000000 \
        --val_size 0 --threads 1 >stdout 2>stderr &
    await grep -q '^step 10/' stderr
    dd if=/dev/zero of=small_disk/other bs=1k count=1600 2>/dev/null
    kill -INT $!
    wait $!
    check 'a full disk keeps the adapter' test -s "$(find small_disk/run -name adapter_model.safetensors)" -a \
        -z "$(find small_disk/run -name 'optimizer*')"
    check 'and says so' grep -q 'the adapter is saved without the optimizer' stderr
    umount small_disk
fi
rm -rf small_disk

# ---- The terminal, help, version ---------------------------------------------------------------------------------

if command -v script >/dev/null 2>&1; then
    script -qec "stty cols 60; $program $begun --output_dir seen --logging_steps 100 --val_size 0" typescript </dev/null >/dev/null 2>&1
    tr '\r' '\n' <typescript | sed 's/\x1b\[K//g' | grep '^step [0-9]*/6  loss' >seen_lines
    check 'each step is seen on a terminal' test "$(wc -l <seen_lines)" = 6
    check 'a line that passes is cut to the width' test "$(head -n 5 seen_lines | awk 'length > 59' | wc -l)" = 0
    rm -rf seen typescript seen_lines
else
    skip 'a terminal: needs the program script'
fi
works 'glmtune 1.0' --version
works 'glmtune train DATA MODEL' -h
works 'glmtune train DATA MODEL|--learning_rate|by the number of samples' --help train
check 'help fits 100 columns' test "$(awk 'length > 100' stdout | wc -l)" = 0
told='no suggestion has nothing in common with the word'
run train data.jsonl f --cutoff_len 3
! grep -q nearest stderr || want 'none'
judge
