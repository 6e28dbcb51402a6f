# The official fine-tuning configs: files with the keys and values of both repositories, in the official order of
# arguments, on the bundled model. Sourced by test_cli.sh.

tiny=$tests/tiny
mkdir yamldata
head -n 12 "$tests/data/facts.jsonl" >yamldata/train.jsonl
head -n 3 "$tests/data/facts.jsonl" >yamldata/dev.jsonl
cp yamldata/train.jsonl yamldata/train.json; cp yamldata/dev.jsonl yamldata/dev.json

# ENDING LENGTHS RATE BATCH WORKERS SAVE EVAL_BATCH EVAL_NAME: the lines that all official files share
official() {
    cat <<END
data_config:
  train_file: train.$1
  val_file: dev.$1
  test_file: dev.$1
  num_proc: $5
${9:-}max_input_length: ${2% *}
max_output_length: ${2#* }
training_args:
  # see the arguments of Seq2SeqTrainer
  output_dir: ./output
  max_steps: 3000
  # to be fitted to the data
  learning_rate: $3
  # how data is read
  per_device_train_batch_size: $4
  dataloader_num_workers: 16
  remove_unused_columns: false
  # checkpoints
  save_strategy: steps
  save_steps: $6
  # log
  log_level: info
  logging_strategy: steps
  logging_steps: 10
  # evaluation
  per_device_eval_batch_size: $7
  $8: steps
  eval_steps: 500
  # adam_epsilon: 1e-6
  # debug: underflow_overflow
  predict_with_generate: true
  generation_config:
    max_new_tokens: 512
END
}
peft() { printf 'peft_config:\n  peft_type: %s\n  task_type: CAUSAL_LM\n' "$1"; }
lora() { peft LORA; printf '  r: %s\n  lora_alpha: 32\n  lora_dropout: 0.1\n' "$1"; }
prefix() { peft PREFIX_TUNING; echo "  num_virtual_tokens: $1"; }
glm4='
combine: True
freezeV: True
'
official json '256 512' 3e-4 4 16 2000 16 evaluation_strategy >c3_lora.yaml
{ echo '  #deepspeed: zero.json'; echo '  use_cpu: false'; lora 32; } >>c3_lora.yaml
official json '256 512' 3e-4 4 16 500 16 evaluation_strategy >c3_ptuning_v2.yaml
{ echo '  use_cpu: false'; prefix 128; } >>c3_ptuning_v2.yaml
official json '256 512' 3e-4 4 16 500 16 evaluation_strategy >c3_sft.yaml
echo '  deepspeed: zero.json' >>c3_sft.yaml
official jsonl '512 512' 5e-4 1 1 500 4 eval_strategy "$glm4" >g4_lora.yaml
{ echo '  # deepspeed: zero.json'; lora 8; echo '  target_modules: ["q_proj", "k_proj", "v_proj"]'; } >>g4_lora.yaml
official jsonl '512 512' 5e-5 1 1 500 16 eval_strategy "$glm4" >g4_sft.yaml
echo '  deepspeed: configs/zero.json' >>g4_sft.yaml
official jsonl '128 128' 5e-4 4 1 500 16 eval_strategy >g4_ptuning_v2.yaml
{ prefix 512; echo '  num_attention_heads: 2'; echo '  token_dim: 32'; } >>g4_ptuning_v2.yaml

# NAME METHOD RATE SAMPLES_A_STEP: runs unchanged, two of its steps; the rate shows the linear schedule over two steps
yaml_runs() {
    rm -rf output
    works "$1.yaml: without meaning here and ignored: |num_proc|12 samples to learn, 3 to validate|method $2|done" train \
        yamldata "$tiny" "$1.yaml" --max_steps 2 --logging_steps 1
    told="$1.yaml"
    [ "$(grep -c '"loss"' output/log.jsonl)" = 2 ] || want 'two logged steps'
    grep -qE "\"step\": 1, \"loss\".*\"learning_rate\": $3," output/log.jsonl || want "the first step at the rate $3"
    grep -q 'ignored:.*deepspeed' stderr && ! grep -q '^  deepspeed' "$1.yaml" &&
        want 'no word about a key in a comment'
    [ -s output/checkpoint-2/adapter_model.safetensors ] || want 'a checkpoint in the output_dir of the yaml'
    judge
}
yaml_runs c3_lora lora 0.0003
check 'the yaml gives r' grep -q '"r": 32,' output/checkpoint-2/adapter_config.json
check 'and lora_alpha' grep -q '"lora_alpha": 32,' output/checkpoint-2/adapter_config.json
yaml_runs c3_sft full 0.0003
yaml_runs g4_lora lora 0.0005
check 'combine leaves the last answer alone' grep -q 'official script.*the last answer alone' stderr
works 'done' train yamldata remote g4_lora.yaml --layout glm4-chat --max_steps 1 --output_dir out_fused
check 'q_proj, k_proj, v_proj are the fused map where there is one' grep -q '"target_modules": \["query_key_value"\]' \
    out_fused/checkpoint-1/adapter_config.json
for file in c3_lora c3_sft c3_ptuning_v2; do
    works 'done' train yamldata remote $file.yaml --layout glm4-chat --max_steps 1 --output_dir out_$file
done
check "PEFT's default of a fused map" grep -q '"target_modules": \["query_key_value"\]' \
    out_c3_lora/checkpoint-1/adapter_config.json
sed 's/\["q_proj".*/query_key_value/' g4_lora.yaml >fused.yaml
works 'done' train yamldata "$tiny" fused.yaml --max_steps 1 --output_dir out_apart
check 'query_key_value is q_proj, k_proj, v_proj where they are apart' grep -q \
    '"target_modules": \["q_proj", "k_proj", "v_proj"\]' out_apart/checkpoint-1/adapter_config.json
rm -rf out_c3_* out_apart out_fused
yaml_runs g4_sft full 5e-05
if run train --help; grep -q 'ptuning' stdout; then
    yaml_runs c3_ptuning_v2 ptuning 0.0003
    yaml_runs g4_ptuning_v2 ptuning 0.0005
    check 'the yaml gives num_virtual_tokens' grep -q '"num_virtual_tokens": 512' \
        output/checkpoint-2/adapter_config.json
fi
rm -rf output

# What a yaml leaves out: the Trainer's and PEFT's defaults. 12 samples in batches of 8 are 2 steps an epoch.
printf 'data_config: {train_file: train.jsonl}\ntraining_args: {output_dir: out1, logging_steps: 1}\n' >few.yaml
printf 'peft_config: {peft_type: LORA}\n' >>few.yaml
works 'data: 12 samples to learn|step 6/6|done' train yamldata "$tiny" few.yaml
told='the defaults of Trainer and PEFT'
sed -nE 's/.*"step": ([0-9]), "loss".*"learning_rate": ([^,]*),.*/\1 \2/p' out1/log.jsonl >rates
[ "$(cut -d' ' -f2 rates | head -n 3 | tr '\n' ' ')" = '5e-05 4.16666667e-05 3.33333333e-05 ' ] ||
    want 'a linear rate from 5e-5'
grep -q '"r": 8,' out1/checkpoint-6/adapter_config.json || want 'r 8'
grep -q '"lora_alpha": 8,' out1/checkpoint-6/adapter_config.json || want 'lora_alpha 8'
grep -q '"lora_dropout": 0,' out1/checkpoint-6/adapter_config.json || want 'no dropout'
judge
printf 'data_config: {train_file: train.jsonl, val_file: dev.jsonl}\ntraining_args:\n  eval_strategy:\npeft_config: null\n' >none.yaml
works 'method full|0 to validate|val_file (eval_strategy is no)|done' train yamldata "$tiny" none.yaml --max_steps 1 --output_dir none
rm -rf none none.yaml
works 'step 1/1|done' train yamldata "$tiny" few.yaml --max_steps 1 --output_dir out2 --r 2 --learning_rate=0.01
check 'options override the yaml' grep -q '"r": 2,' out2/checkpoint-1/adapter_config.json
check 'wherever they stand' grep -q '"learning_rate": 0.01,' out2/log.jsonl
works 'done' train --r 2 --output_dir out3 yamldata --max_steps 1 "$tiny" few.yaml --learning_rate 0.01
check 'before the yaml too' cmp out2/checkpoint-1/adapter_model.safetensors out3/checkpoint-1/adapter_model.safetensors
sed 's/$/\r/' few.yaml >dos.yaml
works 'done' train yamldata "$tiny" dos.yaml --max_steps 1 --output_dir out4 --r 2 --learning_rate 0.01
check 'line ends of Windows change nothing' \
    cmp out2/checkpoint-1/adapter_model.safetensors out4/checkpoint-1/adapter_model.safetensors

# The fourth word is --resume_from_checkpoint.
works 'stopped after step 4' train yamldata "$tiny" few.yaml --output_dir out1 --stop_at_step 4 --force
works 'done' train yamldata "$tiny" few.yaml yes --output_dir out1
check 'yes goes on from the newest' test "$(grep -c '"loss"' out1/log.jsonl)" = 6 -a -d out1/checkpoint-6
works 'done' train yamldata "$tiny" few.yaml 4 --output_dir out1 --force
check 'a step goes on from that one' test "$(grep -c '"loss"' out1/log.jsonl)" = 6
works 'step 1/' train yamldata "$tiny" few.yaml no --output_dir out1 --force
refuse '7' train yamldata "$tiny" few.yaml 7 --output_dir out

# SED WORDS: the file so edited is refused, with the words.
bad_yaml() {
    sed -E "$1" g4_lora.yaml >bad.yaml
    refuse "$2" train yamldata "$tiny" bad.yaml --output_dir out
}
bad_yaml 's/save_steps/save_step/' "bad.yaml:23:14: |'save_step'|save_steps"
bad_yaml 's/learning_rate/learningrate/' "bad.yaml:16:17: |'learningrate'|learning_rate"
bad_yaml 's/  lora_alpha/  lora_alfa/' "'lora_alfa'|nearest: lora_alpha"
for key in 'quantization_config: {load_in_4bit: true}' 'quantization_bit: 4' 'load_in_8bit: true' \
    'quantization_method: bitsandbytes'; do
    bad_yaml "s/  r: 8/  $key/" "${key%%:*} asks for a base that is quantised|glmtune quantize|take this out"
done
bad_yaml 's/use_cpu|log_level: info/adafactor: true/' 'adafactor would change what is learned'
bad_yaml 's/use_cpu|log_level: info/train_sampling_strategy: group_by_length/' 'train_sampling_strategy is one of random'
bad_yaml 's/use_cpu|log_level: info/greater_is_better: true/' 'greater_is_better is one of false'
bad_yaml 's/data_config/dataconfig/' "'dataconfig'|data_config"
bad_yaml 's/train_file/trainfile/' "bad.yaml:2:14: |'trainfile'|train_file"
bad_yaml 's/5e-4/5x-4/' 'bad.yaml:16:18: learning_rate must be a number'
bad_yaml 's/5e-4/"5e-4"/' 'bad.yaml:16:18: learning_rate must be a number'
bad_yaml 's/5e-4/-1/' 'bad.yaml:16:18: learning_rate must be from'
bad_yaml 's/max_steps: 3000/max_steps: 1.5/' 'bad.yaml:14:14: max_steps wants a whole number'
bad_yaml 's/LORA/IA3/' 'peft_type is one of LORA, PREFIX_TUNING'
bad_yaml 's/peft_type: LORA/# &/' 'peft_type is missing'
bad_yaml 's/peft_type: LORA/peft_type:/' 'peft_type is missing'
bad_yaml 's/save_steps: 500/save_step:/' "'save_step'|save_steps"
bad_yaml 's/eval_strategy: steps/eval_strategy: often/' 'eval_strategy is one of steps, no, epoch'
bad_yaml 's/combine: True/combine: yes/' "combine is true or false, not 'yes'"
bad_yaml 's/  r: 8/  use_dora: true/' 'bad.yaml|use_dora|not supported'
bad_yaml 's/use_cpu|log_level: info/neftune_noise_alpha: 5/' 'neftune_noise_alpha would change what is learned'
bad_yaml 's/"q_proj", "k_proj"/"q_porj"/' "'q_porj'"
bad_yaml 's/\["q_proj".*/\n  - q_porj/' "'q_porj'"
bad_yaml 's/\["q_proj".*/\n  - q_proj: k_proj/' 'bad.yaml:45:11: |belongs to nothing above it'
bad_yaml 's/  r: 8/\tr: 8/' 'bad.yaml:41:1: |a tab'
bad_yaml 's/\[("q.*)\]/*targets/' 'bad.yaml:44:19: |no anchor'
bad_yaml 's/r: 8/r: {a: 1}/' 'r must be a number'
bad_yaml 's/train.jsonl/none.jsonl/' 'yamldata/none.jsonl|no such file'
bad_yaml 's/dev.jsonl/none.jsonl/' 'yamldata/none.jsonl'
echo 'a list' >bad.yaml
refuse 'bad.yaml:1:7: |name: value' train yamldata "$tiny" bad.yaml --output_dir out
refuse 'nowhere.yaml' train yamldata "$tiny" nowhere.yaml --output_dir out
refuse 'yamldata/train.jsonl|folder' train yamldata/train.jsonl "$tiny" few.yaml --output_dir out
misuse 'train|DATA MODEL|CONFIG.yaml' train yamldata "$tiny" few.yaml yes surplus
misuse 'train|DATA MODEL|CONFIG.yaml' train yamldata "$tiny" yes few.yaml
sed 's/\(save\|eval\)_strategy: steps/\1_strategy: no/; s/save_steps: 500/save_steps: 1/' g4_lora.yaml >no.yaml
works 'val_file (eval_strategy is no)|done' train yamldata "$tiny" no.yaml --max_steps 3 \
    --output_dir out5
check 'eval_strategy no validates on nothing' test -z "$(grep -E 'validation loss|"eval_loss' stderr out5/log.jsonl)"
check 'save_strategy no saves the last step alone' test "$(find out5 -name 'checkpoint-*' | wc -l)" = 1
sed 's/eval_strategy: steps/eval_strategy: epoch/; /eval_steps/d' g4_lora.yaml >epoch.yaml
works 'done' train yamldata "$tiny" epoch.yaml --num_train_epochs 2 --max_steps 0 --output_dir out6
check 'eval_strategy epoch evaluates before step 1 and once an epoch' \
    test "$(sed -n 's/.*"step": \([0-9]*\), "eval_loss.*/\1/p' out6/log.jsonl | tr '\n' ' ')" = '0 12 24 '
sed 's/\(save\|logging\)_strategy: steps/\1_strategy: epoch/' g4_lora.yaml >epochs.yaml
works 'done' train yamldata "$tiny" epochs.yaml --max_steps 25 --output_dir out8
check 'save_strategy epoch saves once an epoch, and the end' test -d out8/checkpoint-12 -a -d out8/checkpoint-24 \
    -a -d out8/checkpoint-25 -a "$(find out8 -name 'checkpoint-*' | wc -l)" = 3
check 'logging_strategy epoch writes so often' test "$(grep -c '"loss"' out8/log.jsonl)" = 3
sed '/eval_steps/d' g4_lora.yaml >steps.yaml
works 'done' train yamldata "$tiny" steps.yaml --max_steps 25 --output_dir out7
check 'without eval_steps evaluation is where the log is' grep -q '"step": 10, "eval_loss' out7/log.jsonl
rm -rf out1 out2 out3 out4 out5 out6 out7 out8 yamldata ./*.yaml rates

# ---- --help OPTION, --help METHOD --------------------------------------------------------------------------------

works '--r: |a whole number from 1 to 65536|default 8' train --help r
works '--learning_rate|a number from 0|under a yaml 5e-5' train --help --learning_rate
works 'one of cosine,linear|default cosine, under a yaml linear' --help lr_scheduler_type
works '--method lora: |learning rate 0.0005|LORA' train --help lora
works '--method full: |learning rate 5e-05' --help full
misuse 'learning_rte|nearest: learning_rate' train --help learning_rte
misuse 'prompt' train --help prompt
for option in $all_options; do
    case $option in check) run info --help check ;; *) run --help "$option" ;; esac     # `check` is a command as well
    told="glmtune --help $option"
    [ "$status" = 0 ] && grep -q "^--$option: " stdout || want 'what it is'
    grep -qE '^    .*; (no )?default' stdout && grep -q '^    of: ' stdout || want 'what it takes, and whose it is'
    judge
done

# ---- What glmtune does anyway is taken ---------------------------------------------------------------------------

for key in 'metric_for_best_model: eval_loss' 'metric_for_best_model: loss' 'greater_is_better: false' \
    'metric_for_best_model: null' 'load_best_model_at_end: true' 'load_best_model_at_end: false' 'quantization_bit: null' \
    'quantization_config: null' 'load_in_4bit: false' 'adafactor: false' 'train_sampling_strategy: random' \
    'average_tokens_across_devices: true' 'torch_compile_backend: inductor'; do
    printf 'max_input_length: 512\ntraining_args:\n  max_steps: 1\n  %s\n' "$key" >taken.yaml
    works 'done' train data.jsonl m taken.yaml --output_dir taken
    rm -rf taken
done
printf 'training_args:\n  max_steps: 1\n  metric_for_best_model: rouge-l\n' >taken.yaml
refuse 'metric_for_best_model is one of eval_loss, loss' train data.jsonl m taken.yaml --output_dir out
rm taken.yaml
