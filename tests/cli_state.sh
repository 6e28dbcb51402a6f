# Going on from checkpoints, signals, write failures, fingerprints, merge's verification; test_cli.sh reads this file.

values() { sed -E 's/, "[a-z_]*_per_s[a-z_]*": [^,}]*//g' "$1"; }

same_run() {                    # WHAT ONE OTHER STEP: the same adapter, moments and log values
    told=$1
    local file
    for file in adapter_model.safetensors optimizer.safetensors; do
        cmp -s "$2/checkpoint-$4/$file" "$3/checkpoint-$4/$file" || want "the same $file"
    done
    values "$2/log.jsonl" >one.values
    values "$3/log.jsonl" | cmp -s - one.values || want 'the same log'
    judge
}

sed 's/"num_hidden_layers": 1/"num_hidden_layers": 3/' glm.json >deep.json
works 'parameters' init deep.json deep --layout glm4-chat --dtype f32
state='train data.jsonl deep --max_steps 6 --logging_steps 1 --gradient_accumulation_steps 3 --learning_rate 0.01 --weight_decay 0.1'

# ---- Every method and optimizer goes on to the same bits ---------------------------------------------------------

methods_of_help=$("$program" train --help | sed -n 's/^  --method .*: \([a-z,]*\) \[.*/\1/p' | tr , ' ')
check 'the methods can be read from --help' test -n "$methods_of_help"
for how in $(for m in $methods_of_help; do for o in adamw sgd lion; do echo $m-$o; done; done) lora-adamw; do
    rm -rf whole parts
    options="--method ${how%-*} --optim ${how#*-}"
    works 'done' $state --output_dir whole $options --label_smoothing_factor 0.1
    works 'stopped after step 3 of 6|--resume_from_checkpoint yes' $state --output_dir parts $options \
        --label_smoothing_factor 0.1 --stop_at_step 3
    works 'goes on from parts/checkpoint-3|read back: parts/checkpoint-6|done' $state --output_dir parts $options --label_smoothing_factor 0.1 \
        --resume_from_checkpoint yes
    same_run "$how: three steps and three more are six" whole parts 6
done

# ---- Which checkpoint, and what must be as it was ----------------------------------------------------------------

works 'goes on from whole/checkpoint-6' train data.jsonl deep --output_dir elsewhere ${state#train data.jsonl deep} \
    --label_smoothing_factor 0.1 --resume_from_checkpoint whole/checkpoint-6
same_run 'a run that is complete has nothing more to do' whole parts 6
works 'holds no checkpoint: training begins|done' $state --output_dir fresh --resume_from_checkpoint yes
rm -rf elsewhere whole fresh
smooth="$state --label_smoothing_factor 0.1 --output_dir parts --save_total_limit 0"
refuse 'checkpoints past step 3|--force' $smooth --resume_from_checkpoint 3
refuse 'parts/checkpoint-5: there is no such checkpoint' $smooth --resume_from_checkpoint 5
refuse 'nowhere: there is no such checkpoint' $smooth --resume_from_checkpoint nowhere
refuse 'holds the checkpoints of another run' $smooth --resume_from_checkpoint no
refuse 'learning_rate was 0.01, now it is 0.02' ${smooth/0.01/0.02} --resume_from_checkpoint yes
refuse 'max_steps was 6, now it is 7' ${smooth/max_steps 6/max_steps 7} --resume_from_checkpoint yes
refuse 'method was lora, now it is full' $smooth --method full --resume_from_checkpoint yes
refuse 'optim was adamw, now it is lion' $smooth --optim lion --resume_from_checkpoint yes
sed 's/"hidden_size": 16/"hidden_size": 32/' glm.json >wider.json
works 'parameters' init wider.json wider --layout glm4-chat
refuse 'parts/checkpoint-6 was trained with another base model|fingerprint|wider' train data.jsonl wider ${smooth#train data.jsonl deep} --resume_from_checkpoint yes
head -n 7 data.jsonl >seven.jsonl
refuse 'hash of the training data' train seven.jsonl ${smooth#train data.jsonl} --resume_from_checkpoint yes
works 'warning: max_steps was 6, now it is 7|done' ${smooth/max_steps 6/max_steps 7} --resume_from_checkpoint 6 --force
check 'nothing was lost meanwhile' test -f parts/checkpoint-3/optimizer.safetensors -a -f parts/checkpoint-7/optimizer.safetensors
rm parts/checkpoint-7/optimizer.safetensors             # no longer whole: nothing is removed that "yes" may have meant
refuse 'parts/checkpoint-7|it has no optimizer.safetensors' $smooth --resume_from_checkpoint yes --force
check 'its adapter is still there' test -f parts/checkpoint-7/adapter_model.safetensors
mkdir parts/checkpoint-9.glmtune.tmp
works 'goes on from parts/checkpoint-6' $smooth --resume_from_checkpoint 6 --force
check 'what a killed run left is removed' test ! -e parts/checkpoint-9.glmtune.tmp
rm -rf parts

# ---- Signals -----------------------------------------------------------------------------------------------------

endless="train data.jsonl deep --max_steps 1000000 --save_steps 1000000 --logging_steps 1 --output_dir endless"
for signal in INT:130 TERM:143; do
    "$program" $endless >stdout 2>stderr &
    await test -s endless/log.jsonl
    kill -${signal%:*} $!
    wait $!
    status=$?
    told="SIG${signal%:*}: finishes the step, saves, says how to go on"
    [ $status = ${signal#*:} ] || want "exit status ${signal#*:}"
    want_words stderr 'stopped after step|--resume_from_checkpoint yes'
    step=$(sed -n 's/^stopped after step \([0-9]*\) .*/\1/p' stderr)
    [ -f "endless/checkpoint-$step/optimizer.safetensors" ] || want 'a checkpoint of that step'
    judge
    works 'goes on from|stopped after' $endless --resume_from_checkpoint yes --stop_at_step $((step + 2))
    rm -rf endless
done

# ---- Write failures: one line, and the last checkpoint stays good ------------------------------------------------

works 'stopped' $state --output_dir frail --method full --stop_at_step 2
cp -R frail frail_before
failures=0
for size in 1 2 8 60 120 400 700; do    # a checkpoint's files are some 360 and 710 KB; log.jsonl is below 1
    rm -rf frail
    cp -R frail_before frail
    (ulimit -f $size; exec "$program" $state --output_dir frail --method full --resume_from_checkpoint yes) 2>&1 >stdout |
        cat >stderr
    status=${PIPESTATUS[0]}
    told="ulimit -f $size"
    if [ "$status" = 0 ]; then continue; fi
    failures=$((failures + 1))
    [ "$status" = 1 ] || want 'exit status 1'
    [ "$(grep -c '^glmtune: ' stderr)" = 1 ] || want 'one line of error'
    want_words stderr 'writing failed'
    [ -z "$(find frail -name '*.tmp*')" ] || want 'nothing half-written'
    for file in adapter_model.safetensors optimizer.safetensors trainer_state.json; do
        cmp -s frail/checkpoint-2/$file frail_before/checkpoint-2/$file || want "$file as it was"
    done
    judge
done
check 'writing did fail' test $failures -ge 5
check 'the adapter of the last save stays, where it fits' test -f frail/checkpoint-6/adapter_model.safetensors
works 'done' $state --output_dir frail --method full --resume_from_checkpoint 2 --force
rm -rf frail frail_before
"$program" ${endless/--save_steps 1000000/--save_steps 20} >stdout 2>stderr &
await test -d endless/checkpoint-20
mv endless gone
wait $!
status=$?
told='a folder that vanishes'
[ $status = 1 ] || want 'exit status 1'
[ "$(grep -c '^glmtune: ' stderr)" = 1 ] || want 'one line of error'
want_words stderr 'endless'
[ ! -e endless ] || want 'no new folder'
judge
find gone -name '*.tmp' -prune -exec rm -rf {} +
works '' chat gone/checkpoint-20 --prompt hi --max_new_tokens 2
rm -rf gone
if [ "$(id -u)" != 0 ]; then
    works 'stopped' $state --output_dir closed --stop_at_step 2
    chmod a-w closed
    run $state --output_dir closed --resume_from_checkpoint yes
    told='a folder that became read-only'
    [ "$status" = 1 ] && want_words stderr 'closed' || want 'exit status 1'
    judge
    chmod u+w closed
    rm -rf closed
fi

# ---- Fingerprints, and a merge that is laid out like its base and verified ---------------------------------------

works 'done' $state --output_dir marked --max_steps 2
marked=marked/checkpoint-2
header_of $marked/adapter_model.safetensors >header
check 'the adapter carries a fingerprint' grep -qE '"glmtune.fingerprint":"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}"' header
works 'parameters' init deep.json other --layout glm4-chat --dtype f32 --seed 3
for command in "chat $marked --prompt hi --max_new_tokens 1" "eval data.jsonl $marked --max_new_tokens 1" \
    "merge $marked out" "dump $marked ready.jsonl out" "train data.jsonl $marked --output_dir out --max_steps 1"; do
    refuse "$marked was trained with another base model|fingerprint|that of other is|--force" $command --base other
done
works 'warning: ' chat $marked --prompt hi --max_new_tokens 1 --base other --force
refuse 'another chat layout' chat $marked --prompt hi --layout 0414
cp -R $marked plain
edit_header plain/adapter_model.safetensors 's/,"glmtune.fingerprint":"[^"]*"//'
works '' chat plain --prompt hi --max_new_tokens 1 --base other
works 'parameters' init deep.json sharded --layout glm4-chat --dtype bf16 --max_shard_size 0.00004
cp -R sharded oddly
first=$(sed -n 's/.*"model.embed_tokens.weight": "\([^"]*\)".*/\1/p' oddly/model.safetensors.index.json)
mv "oddly/$first" oddly/model.safetensors
sed -i "s/\"$first\"/\"model.safetensors\"/g" oddly/model.safetensors.index.json
works 'done' train data.jsonl oddly --output_dir odd --max_steps 1
works 'read back' merge odd/checkpoint-1 odd/whole
check 'an index that begins with model.safetensors is an index' test -s odd/whole/model.safetensors.index.json
rm -rf oddly odd
works 'done' train data.jsonl sharded --output_dir of_shards --max_steps 2
works 'read back: logits change|bound' merge of_shards/checkpoint-2 as_base
told='a merged model lies in the files of its base'
(cd sharded && find . -name '*.safetensors*' | sort) >list.base
(cd as_base && find . -name '*.safetensors*' | sort) | cmp -s - list.base || want 'the same files'
[ "$(wc -l <list.base)" -ge 4 ] || want 'several files'
cmp -s sharded/model.safetensors.index.json as_base/model.safetensors.index.json || want 'the same index'
judge
rm -rf marked plain other sharded of_shards as_base

# ---- Divergence --------------------------------------------------------------------------------------------------

run train data.jsonl deep --method full --optim sgd --learning_rate 3 --warmup_ratio 0 --max_grad_norm 0 --max_steps 200 \
    --lr_scheduler_type constant --save_steps 1 --val_size 0 --output_dir diverged
told='a run that diverges'
[ "$status" = 1 ] || want 'exit status 1'
tail -n 1 stderr >last
want_words last 'glmtune: |not finite'
judge
good=$(find diverged -name 'checkpoint-*' | sed 's/.*-//' | sort -n | tail -n 1)
check 'it leaves a checkpoint' test -n "$good"
works '20 tokens, loss' dump "diverged/checkpoint-$good" ready.jsonl dumped
rm -rf diverged dumped

check 'killed at random moments, a run ends with the same bytes' bash "$tests/kill_resume.sh" 4 "$program"
