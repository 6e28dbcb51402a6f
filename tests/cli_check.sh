# check, data formats and damaged data. Sourced by test_cli.sh.

told_by() {                     # FILE WORDS...: stdout holds the lines (fixed strings)
    local line
    for line in "${@:2}"; do check "check says: $line" grep -qxF -e "$line" "$1"; done
}

# ---- The bundled data --------------------------------------------------------------------------------------------

tiny=$tests/tiny
works 'glm4-chat|tokenizer.bin' check "$tests/data/identity.jsonl" "$tiny"
told_by stdout 'samples   40 read, 40 kept, 0 cut, 0 dropped, 0 duplicates' "turns     500, 250 of them the assistant's" \
    'tokens    6035, target tokens: 1125 of 6035 (18.6 %)' 'lengths   17 to 428 tokens, mean 150.9' \
    '       1 - 50           20  ########################################' '     401 - 450           2  ####' \
    'samples ending in a stop token: 40 of 40' 'sample 1: 19 tokens, 7 targets' \
    '  <|assistant|>               2708       -' '  \n                            10      10' \
    '  我                           264     264' '  <|user|>                    2707    2707'
check 'a row for each token' [ "$(grep -cE '^  .* +[0-9]+ +(-|[0-9]+)$' stdout)" = 19 ]
for data in ads:200 facts:100 sentiment:200; do
    n=${data#*:}
    works "samples ending in a stop token: $n of $n" check "$tests/data/${data%:*}.jsonl" "$tiny" --samples 0
    check "no warning about $data" [ "$(grep -c -e warning -e wrong printed)" = 0 ]
done
works 'sample 40: ' check "$tests/data/identity.jsonl" "$tiny" --sample 40
check 'that sample alone' [ "$(grep -c '^sample ' stdout)" = 1 ]
works 'sample 3: ' check "$tests/data/identity.jsonl" "$tiny" --samples 3
check 'the first three' [ "$(grep -c '^sample ' stdout)" = 3 ]
run check "$tests/data/identity.jsonl" "$tiny" --sample 41
[ "$status" = 1 ] || want 'exit status 1'
want_words stderr 'identity.jsonl|no sample 41'
judge
works '' check "$tests/data/facts.jsonl" "$tiny" --ids
cp stdout ready_facts.jsonl
check 'ready samples, a line each' \
    [ "$(grep -c '^{"input_ids": \[2702, .*\], "labels": \[-100, .*2707\]}$' stdout)" = 100 ]
works '' check ready_facts.jsonl "$tiny" --ids
check 'ready samples are data, and give themselves' cmp -s stdout ready_facts.jsonl
works 'samples ending in a stop token: 100 of 100|target tokens: 684 of 2690' \
    check ready_facts.jsonl "$tiny" --samples 0
head -n 1 ready_facts.jsonl | sed 's/\], "labels"/, 0, 0&/; s/\]}/, -100, -100]}/' >padded.jsonl
works 'samples ending in a stop token: 1 of 1' check padded.jsonl "$tiny" --samples 0
rm padded.jsonl
works 'samples   40 read|samples   100 read' \
    check "$tests/data/identity.jsonl" "$tiny" --eval_file "$tests/data/facts.jsonl"
works 'the last answer alone, without the line break|target tokens: 584 of 2690' \
    check "$tests/data/facts.jsonl" "$tiny" \
    --official_mask --combine --samples 0
works 'whatever its "loss" says|target tokens: 684 of 2690' \
    check "$tests/data/facts.jsonl" "$tiny" --official_mask --samples 0

# ---- Lengths -----------------------------------------------------------------------------------------------------

check 'more than 21 tokens: 90 samples, the first has 23' \
    [ "$(sed 's/\].*//' ready_facts.jsonl | awk -F, 'NF > 21 && !n++ { first = NR ":" NF } END { print n, first }')" = \
      '90 2:23' ]
short='--max_input_length 10 --max_output_length 10 --samples 0'
run check "$tests/data/facts.jsonl" "$tiny" $short
[ "$status" = 1 ] || want 'exit status 1'
want_words stderr 'facts.jsonl:2:1: 23 tokens|max_input_length + max_output_length + 1|--overlong|(90 in all)'
want_words stdout '100 read, 100 kept, 0 cut, 0 dropped|      21 - 25           43|wrong: '
judge
works '100 read, 10 kept, 0 cut, 90 dropped' check "$tests/data/facts.jsonl" "$tiny" $short --overlong drop
works '100 read, 100 kept, 90 cut, 0 dropped|samples ending in a stop token: 100 of 100|lengths   20 to 21' \
    check "$tests/data/facts.jsonl" "$tiny" $short --overlong truncate
works '90 samples cut, 0 dropped|done' train "$tests/data/facts.jsonl" "$tiny" $(sed 's/--samples 0//' <<<"$short") \
    --overlong truncate --max_steps 1 --output_dir cut_run
rm -rf cut_run
{ printf '{"messages": [{"role": "user", "content": "'; head -c 10000000 /dev/zero | tr '\0' 'x'
  printf '"}, {"role": "assistant", "content": "ok"}]}\n'; } >long.jsonl
refuse 'long.jsonl:1:1: |tokens|--overlong' train long.jsonl "$tiny" --output_dir out
works '1 kept, 1 cut|of them|1025 tokens' check long.jsonl "$tiny" --overlong truncate --samples 0
rm long.jsonl

# ---- Formats -----------------------------------------------------------------------------------------------------

q='{"role": "user", "content": "你叫什么？"}' a='{"role": "assistant", "content": "我叫小田。"}'
echo "{\"messages\": [$q, $a]}" >m.jsonl
echo '{"content": "你叫什么？", "summary": "我叫小田。"}' >columns.jsonl
echo '{"prompt": "B", "response": "b", "history": [["A", "a"]]}' >history.jsonl
echo '{"ask": "B", "say": "b", "before": [["A", "a"]], "prompt": 7}' >renamed.jsonl
echo '{"conversations": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "a"},
  {"role": "user", "content": "B"}, {"role": "assistant", "content": "b"}]}' >turns.json
for data in m columns history renamed; do
    columns='--prompt_column content --response_column summary'
    [ $data != history ] || columns=''
    [ $data != renamed ] || columns='--prompt_column ask --response_column say --history_column before'
    works '' check $data.jsonl "$tiny" --ids $columns
    mv stdout $data.ids
done
works '' check turns.json "$tiny" --ids
check 'columns are a conversation' cmp -s m.ids columns.ids
check 'history is the turns before' cmp -s stdout history.ids
check 'columns have any names' cmp -s history.ids renamed.ids
tool='{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"n": 1.50}, "b": null}}}}'
echo "{\"tools\": [$tool], \"messages\": [$q, $a]}" >one.jsonl
echo "{\"messages\": [{\"role\": \"system\", \"content\": \"\", \"tools\": [$tool]}, $q, $a]}" >two.jsonl
works '' check one.jsonl "$tiny" --ids
mv stdout one.ids
works '' check two.jsonl "$tiny" --ids
check 'tools of the sample are tools of its system message' cmp -s one.ids stdout
"$program" check one.jsonl "$tiny" --ids | sed 's/.*"input_ids": \[//; s/\].*//; s/,//g' \
    | "$program" tokenize "$tiny" --decode >text
check 'numbers keep their spelling, null properties go' grep -qF '"n": 1.50' text
check 'null properties go' [ "$(grep -c null text)" = 0 ]
refuse 'edge|no words for tools' train one.jsonl "$tiny" --layout edge --output_dir out
refuse 'edge|no words for tools' train two.jsonl "$tiny" --layout edge --output_dir out

# ---- What is odd, and what it becomes ----------------------------------------------------------------------------

echo '{"messages": [{"role": "user", "content": "\ud800 \u0000"}, {"role": "assistant", "content": ""}]}' >odd.jsonl
works 'warning: odd.jsonl:1:94: assistant: a message without text|sample 1: 12 tokens, 2 targets' \
    check odd.jsonl "$tiny"
told_by stdout '  \xef                         239       -' \
    '  \xbd                         189       -' '  \x00                           0       -'
works 'done' train odd.jsonl "$tiny" --max_steps 1 --val_size 0 --output_dir odd_run
rm -rf odd_run

# ---- Broken files ------------------------------------------------------------------------------------------------

broken_data() {                 # FILE WORDS
    run check "$tests/data/bad/$1" "$tiny"
    [ "$status" = 1 ] || want 'exit status 1'
    [ "$(grep -c '^glmtune: ' stderr)" = 1 ] || want 'one line of error'
    want_words stderr "bad/$1:$2"
    judge
}

broken_data browser.jsonl "1:68: tools of type 'simple_browser' are not supported, only \"function\""
broken_data columns.jsonl "1:1: |--prompt_column|here stands '{\"content\": \"类型#裙*风格#简约\""
broken_data content.json "3:87: \"content\" must be a string, not '42'"
broken_data cut_off.jsonl \
    "3:1: |a comma or ] was expected here|near '{\"messages\": [{\"role\": |the value began at|cut_off.jsonl:2:1"
broken_data empty_conversation.jsonl '2:1: "messages" is empty: there is nothing to learn'
broken_data gb18030.jsonl '2:44: |the text is UTF-8 before this place and not here'
broken_data history.jsonl "1:84: \"history\" must hold pairs of a question and its answer, not '[\"Really?\"]"
broken_data ids.jsonl "1:28: '99999' is no token id of this model, which has 0 to 2709"
broken_data loss.jsonl "1:98: \"loss\" must be true or false, not 'false'"
broken_data no_answer.jsonl "2:1: the sample has nothing to learn: no assistant's turn"
broken_data nul.jsonl '2:45: |control character inside a string; write it as'
broken_data placeholder.jsonl \
    "2:85: '{{NAME}}': a placeholder that nobody replaced; put the real text in its place (3 in all)"
broken_data role.jsonl "1:24: role 'narrator' is not one of system, user, assistant, observation"
broken_data tools.jsonl '1:57: "tools" belong to a system message'

# Of what is no id, a label may be -100, and nothing beside that.
for value in -99 -101 -100.5 -4294967396 1e300 NaN 2710; do
    printf '{"input_ids": [1, 2, 3], "labels": [-100, 2, %s]}\n' $value >labels.jsonl
    refuse "labels.jsonl:1:46: '$value' is no token id of this model" check labels.jsonl "$tiny" --ids
done
refuse "placeholder.jsonl:2:85: '{{NAME}}'" train "$tests/data/bad/placeholder.jsonl" "$tiny" --output_dir out
works "3 read, 3 kept, 0 cut, 0 dropped, 1 duplicates|3:43: '[[训练时间]]'|(2 in all)|3:114: assistant: a message without" \
    check "$tests/data/bad/doubtful.jsonl" "$tiny" --samples 0
works "warning: |a role token typed as text" train "$tests/data/bad/doubtful.jsonl" "$tiny" --max_steps 1 --val_size 0 \
    --output_dir doubtful_run
rm -rf doubtful_run
refuse 'nowhere.jsonl: there is no such file' check nowhere.jsonl "$tiny"
misuse 'DATA MODEL' check m.jsonl
mkdir halves
head -n 5 "$tests/data/facts.jsonl" >halves/train.jsonl
head -n 2 halves/train.jsonl >halves/val.jsonl
works 'sample 4: ' check halves "$tiny" --sample 4
check 'of a folder, from the file that has it' test "$(grep -c '^sample [0-9]' stdout)" = 1
run check halves "$tiny" --sample 6
[ "$status" = 1 ] || want 'exit status 1'
want_words stderr 'halves/train.jsonl: has no sample 6'
judge
works 'halves/val.jsonl' check halves "$tiny" --samples 0
works '5 samples to learn, 2 to validate|2 of the 2 validation samples are training samples|nothing of others|--val_size holds nothing out' \
    train halves "$tiny" --output_dir halves_run --max_steps 1 --val_size 0.1
tail -n 1 "$tests/data/facts.jsonl" >>halves/val.jsonl
works '2 of the 3 validation samples are training samples, too, so validation tells less' \
    train halves "$tiny" --output_dir halves_run --max_steps 1 --force
cp halves/train.jsonl halves/train.json
refuse 'halves/train.jsonl: is there beside halves/train.json' train halves "$tiny" --output_dir out
refuse 'halves/train.jsonl: is there beside' check halves "$tiny"
rm -rf halves halves_run
sed -n 41,44p "$tests/data/sentiment.jsonl" >four.jsonl
for i in 1 2 3 4 5 6 7 8 9 10; do cat four.jsonl; done >copies.jsonl
works 'note: 36 of 40 samples are copies of others|40 samples to learn, 0 to validate' \
    train copies.jsonl "$tiny" --output_dir copies --max_steps 1
rm -rf copies copies.jsonl four.jsonl
refuse '--combine|--official_mask' check m.jsonl "$tiny" --combine

# ---- Rounds, and chat --------------------------------------------------------------------------------------------

works '' chat "$tiny" --max_new_tokens 8 --layout 0414 <<<"你叫什么？
Who are you?"
check 'an answer for each line' [ "$(grep -c . stdout)" = 2 ]
refuse 'no token sop|chatglm2|--layout' chat "$tiny" --layout chatglm2 --prompt hi

# ---- info --check: every number in the files ---------------------------------------------------------------------

works '0 tensors hold' info m --check
cp -r m damaged
file=$(set +f; ls damaged/*.safetensors | tail -n 1)
printf '\377\177\377\177' | dd of="$file" bs=1 seek=$(($(wc -c <"$file") - 4)) conv=notrunc status=none
run info damaged --check
[ "$status" = 1 ] || want 'exit status 1'
want_words stdout 'is not finite, at|1 tensors hold'
judge
rm -rf damaged
