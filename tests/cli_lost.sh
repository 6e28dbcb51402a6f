# Nothing is lost: two runs in one folder, signals, closed descriptors, outputs over inputs, a base that is cut off;
# test_cli.sh reads this file.

small='train data.jsonl m --max_steps 4 --logging_steps 1 --save_steps 2 --val_size 0'
long='train data.jsonl m --max_steps 1000000 --save_steps 1000000 --logging_steps 1 --val_size 0'

begin() {                       # FOLDER WORDS...: an endless run in the background; waits for its first step
    local folder=$1
    shift
    "$program" $long --output_dir "$folder" "$@" >stdout 2>stderr &
    await test -s "$folder/log.jsonl"
}

# ---- One run, one folder -----------------------------------------------------------------------------------------

begin held
running=$!
told='a second run in the folder of one that is under way'
"$program" $small --output_dir held >other.stdout 2>other.stderr
[ $? = 1 ] || want 'exit status 1'
want_words other.stderr "held: process $running is training there|--output_dir"
"$program" $small --output_dir held --resume_from_checkpoint yes --force >other.stdout 2>other.stderr
[ $? = 1 ] || want 'exit status 1 of a resume'
want_words other.stderr "process $running"
kill -KILL $running
{ wait $running; } 2>stdout
judge other.stdout other.stderr
works 'done' $small --output_dir held --force
check 'the lock goes with its run' test ! -e held/run.lock
rm -rf held

for i in $(seq "${GLM_PAIRS:-10}"); do
    rm -rf pair
    for k in 1 2; do { "$program" $small --output_dir pair --max_steps 2 >stdout.$k 2>stderr.$k; echo $? >status.$k; } & done
    wait
    told="two runs at once, time $i"
    # Whoever comes when the first has ended is refused for the checkpoints that it finds.
    [ "$(cat status.1 status.2 | sort | tr -d '\n')" = 01 ] || want 'one that ends well and one that is refused'
    cat stderr.1 stderr.2 >stderr
    grep -qE 'is training there|holds the checkpoints of another run' stderr || want 'the reason'
    [ "$(grep -c '"loss"' pair/log.jsonl)" = 2 ] || want 'the log of one run'
    judge
done
rm -rf pair

# ---- What is no folder for a run ---------------------------------------------------------------------------------

cp -R m model_copy
mkdir data_copy user
cp data.jsonl data_copy/train.jsonl
for folder in model_copy data_copy; do
    for force in '' --force; do
        told="--output_dir $folder $force"
        run $small --output_dir $folder $force
        [ "$status" = 1 ] || want 'exit status 1'
        want_words stderr "$folder: holds|and is no run|--output_dir"
        judge
    done
done
check 'nothing came into them' test "$(ls -A model_copy data_copy | sort | tr '\n' ' ')" = \
    "$({ printf 'data_copy:\nmodel_copy:\n\n'; ls -A m; echo train.jsonl; } | sort | tr '\n' ' ')"
echo 'what I wrote myself' >user/log.jsonl
echo notes >user/notes.txt
works 'user/log.jsonl: was there before, and is now user/log.jsonl.1|done' $small --output_dir user
check 'a log that is no run'\''s stays' grep -q 'what I wrote myself' user/log.jsonl.1
check 'the run has its own' grep -q '"loss"' user/log.jsonl
rm -rf model_copy data_copy user

refuse 'there is no such file' train nowhere.jsonl m --output_dir new/er/est
check 'no new folder stays when nothing begins' test ! -e new
mkdir new
refuse 'there is no such file' train nowhere.jsonl m --output_dir new/er/est
check 'but one that was there' test -d new -a ! -e new/er
rmdir new

# ---- Signals and descriptors -------------------------------------------------------------------------------------

begin hung
ignored=$(sh -c 'kill -HUP $$; echo ignored')      # by whoever started these tests, as nohup does; then for good
[ -z "$ignored" ] && kill -HUP $! || { skip 'SIGHUP, which is ignored here'; kill -TERM $!; }
wait $!
status=$?
told='SIGHUP: finishes the step, saves, says how to go on'
[ "$status" = "${ignored:+143}" ] || [ $status = 129 ] || want 'exit status 129'
want_words stderr 'stopped after step|--resume_from_checkpoint yes'
[ -n "$(find hung -name optimizer.safetensors)" ] || want 'a checkpoint'
judge
rm -rf hung
(trap '' HUP; exec "$program" $long --output_dir hung >stdout 2>stderr) &
await test -s hung/log.jsonl
kill -HUP $!
lines=$(wc -l <hung/log.jsonl)
await has_lines hung/log.jsonl $((lines + 3))
check 'under nohup SIGHUP is nothing' kill -0 $!
kill -TERM $!
wait $!
rm -rf hung
for closed in '2>&-' '>&-' '<&-' '<&- >&- 2>&-'; do
    told="a run with $closed"
    eval '"$program" $small --output_dir closed >closed.out '"$([ "${closed#*2>}" != "$closed" ] || echo '2>stderr')"' '"$closed"
    [ $? = 0 ] || want 'exit status 0'
    [ "$(grep -vc '^{"step"' closed/log.jsonl)" = 0 ] || want 'nothing in the log but its lines'
    [ -f closed/checkpoint-4/optimizer.safetensors ] || want 'a checkpoint'
    judge
    rm -rf closed
done

"$program" $long --output_dir closed >stdout 2>&- &
await test -s closed/log.jsonl
check 'what is opened first does not become standard error' test -e closed/run.lock -a ! -s closed/run.lock
kill -TERM $!
wait $!
rm -rf closed

cat >large.json <<'END'
{"model_type": "glm", "vocab_size": 2710, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
 "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 4096, "max_position_embeddings": 512}
END
works 'parameters' init large.json large --layout glm4-chat --dtype bf16
one='--val_size 0 --per_device_train_batch_size 1 --gradient_accumulation_steps 1'   # a step is one sample of five tokens
works 'done' train ready.jsonl large --output_dir of_large --max_steps 1 $one
interrupt() {                   # SIGNAL COMMAND...: the signal as soon as something is half written; nothing may stay
    local signal=$1
    shift
    told="SIG$signal in: glmtune $*"
    "$program" "$@" >stdout 2>stderr &
    for i in $(seq 4000); do [ -z "$(find . -name '*.glmtune.tmp')" ] || break; sleep 0.01; done
    kill -$signal $!
    wait $!
    status=$?
    [ $status = $((128 + $(kill -l $signal))) ] || want "exit status of SIG$signal"
    [ -z "$(find . -name '*.tmp')" ] || want 'nothing half-written'
    [ ! -e out ] || want 'no output'
    judge
    rm -rf out
    find . -name '*.tmp' -prune -exec rm -rf {} +
}
for signal in INT TERM HUP; do
    interrupt $signal merge of_large/checkpoint-1 out
    interrupt $signal init large.json out --dtype f32
done
interrupt INT eval data.jsonl large --out out --max_new_tokens 500

cp -R large cut
"$program" train ready.jsonl cut --max_steps 1000000 --logging_steps 1 $one --output_dir out >stdout 2>stderr &
await test -s out/log.jsonl
: >cut/model.safetensors
wait $!
status=$?
told='a base that is cut off while it is used'
[ $status = 1 ] || want 'exit status 1'
want_words stderr 'glmtune: cut/model.safetensors: was cut off'
judge
rm -rf cut out large of_large

# A step that is several times slower than those before it.
begin paused
await has_lines paused/log.jsonl 30
for pause in 1 2; do
    kill -STOP $!
    sleep 3
    kill -CONT $!
    await grep -q 'times as long as those before' stderr
    lines=$(wc -l <paused/log.jsonl)
    await has_lines paused/log.jsonl $((lines + 30))
done
kill -TERM $!
wait $!
told='a step that took long is told once'
[ "$(grep -c 'times as long as those before' stderr)" = 1 ] || want 'one line'
judge
rm -rf paused

# ---- Outputs never destroy ---------------------------------------------------------------------------------------

works 'done' $small --output_dir ran
cp data.jsonl saved.jsonl
echo mine >mine
for force in '' --force; do
    refuse 'data.jsonl: is read by this command' eval data.jsonl m --out data.jsonl --max_new_tokens 1 $force
    refuse 'm/model.safetensors: is read by this command' eval data.jsonl m --out m/model.safetensors --max_new_tokens 1 $force
    refuse 'ran/log.jsonl: is read' compare ran --out ran/log.jsonl $force
    refuse 'ready.jsonl: is read' dump m ready.jsonl ready.jsonl $force
done
for command in 'eval data.jsonl m --max_new_tokens 1 --out' 'compare ran --out' 'tokenize m --out' 'dump m ready.jsonl'; do
    refuse 'mine: exists already|--force' $command mine
    check "$command leaves it" grep -q '^mine$' mine
    works '' $command mine --force
    check "$command replaces it when forced" test -s mine -a "$(head -n 1 mine | tr -d "\0")" != mine
    echo mine >mine
done
ln -s data.jsonl link.jsonl
refuse 'is read by this command' eval data.jsonl m --out link.jsonl --max_new_tokens 1 --force
works 'curves: compare.svg' compare ran
works 'curves: compare.svg' compare ran
check 'the data are what they were' cmp data.jsonl saved.jsonl
rm -f saved.jsonl mine link.jsonl compare.svg

rm ran/checkpoint-4/optimizer.safetensors
for force in '' --force; do
    told="a checkpoint without its optimizer $force"
    run $small --output_dir ran --resume_from_checkpoint yes $force
    [ "$status" = 1 ] || want 'exit status 1'
    want_words stderr 'ran/checkpoint-4|it has no optimizer.safetensors'
    [ -f ran/checkpoint-4/adapter_model.safetensors ] || want 'the adapter, still there'
    judge
done
works 'goes on from ran/checkpoint-2|done' $small --output_dir ran --resume_from_checkpoint 2 --force
rm -rf ran

sed 's/"num_hidden_layers": 1/"num_hidden_layers": 3/' glm.json >three.json
works 'parameters' init three.json three --layout glm4-chat --dtype f32
(ulimit -f 400; exec "$program" train data.jsonl three --method full --max_steps 2 --val_size 0 --output_dir filled) >stdout 2>stderr
status=$?
told='a disk that fills up in the last save'
[ $status = 1 ] || want 'exit status 1'
want_words stderr 'writing failed|the adapter is saved all the same|filled/checkpoint-2'
[ ! -e filled/checkpoint-2/optimizer.safetensors ] || want 'no optimizer'
judge
works '' chat filled/checkpoint-2 --prompt hi --max_new_tokens 2
rm -rf filled three

# ---- Validation on what is trained, and the bundled model's tokenizer --------------------------------------------

works 'warning: 8 of the 8 validation samples are training samples' train data.jsonl m --max_steps 1 --eval_file data.jsonl --output_dir same
rm -rf same
works 'done' train "$tests/data/identity.jsonl" "$tests/tiny" --max_steps 1 --output_dir of_tiny
works '' merge of_tiny/checkpoint-1 alone
check 'a merged bundled model has its tokenizer' test -s alone/tokenizer.bin
mkdir elsewhere
cp "$program" elsewhere/glmtune
told='a program of its own talks to it'
elsewhere/glmtune chat alone --prompt hi --max_new_tokens 2 >stdout 2>stderr || want 'exit status 0'
judge
rm -rf of_tiny alone elsewhere
