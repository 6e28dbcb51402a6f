# Data as other tools write them: what is read, what is named as not read, and what is refused at its place.

form() { printf '%s\n' "$2" >"forms_$1.jsonl"; }
ask='{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"'

# ---- Named ---------------------------------------------------------------------------------------------------------

printf '%s\n' '{"prompt": "a", "response": "b", "input": "c", "id": 7}' '{"prompt": "a", "response": "c", "id": null}' \
    '{"messages": ['"$ask"', "name": "x", "id": 1}, {"role": "user", "content": "c", "name": "y"}]}' >forms_named.jsonl
works 'warning: not read: input (1 of 3 samples), id (2 of 3 samples), name (1 of 3 samples)|3 read' \
    check forms_named.jsonl "$tiny" --samples 0
works 'warning: not read: input (1 of 3 samples), id' train forms_named.jsonl "$tiny" --output_dir named --max_steps 1 --val_size 0
rm -rf named
seq 1 50 | awk '{ printf "{\"prompt\": \"a\", \"response\": \"b\", \"key %d\": 1}\n", $1 }' >forms_many.jsonl
works 'key 31 (1 of 50 samples), other keys (19 of 50 samples)' check forms_many.jsonl "$tiny" --samples 0
form quiet '{"messages": ['"$ask"', "tool_calls": [], "reasoning_content": "", "metadata": null, "weight": 1}], "label": true,
 "images": [], "system": "", "tools": "", "weight": 1.0}'
works 'not read: tool_calls' check forms_quiet.jsonl "$tiny" --samples 0
form plain_ids '{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1], "token_type_ids": [0, 0]}'
works 'not read: attention_mask (1 of 1 samples), token_type_ids' check forms_plain_ids.jsonl "$tiny" --samples 0

# ---- Refused ---------------------------------------------------------------------------------------------------------

while IFS=' ' read -r words line; do            # @ marks the place
    before=${line%%@*}
    form refused "$before${line#*@}"
    refuse "forms_refused.jsonl:1:$((${#before} + 1))|$words" train forms_refused.jsonl "$tiny" --output_dir out
done <<END
"tool_calls"|metadata {"messages": [$ask, "tool_calls": @[{"function": {"name": "f"}}]}]}
"function_call" {"messages": [{"role": "assistant", "function_call": @{"name": "f"}, "content": null}]}
"weight" {"messages": [$ask, "weight": @0.5}]}
"weight" {"messages": [$ask, "weight": @false}]}
"train" {"messages": [$ask, "train": @"no"}]}
"reasoning_content"|<think> {"messages": [$ask, "reasoning_content": @"hm"}]}
"images" {"messages": [$ask}], "images": @["a.png"]}
"label" {"messages": [$ask}], "label": @false}
"kto_tag" {"messages": [$ask}], "kto_tag": @false}
"mask" {"messages": [$ask, "mask": @0}]}
"loss_weights" {"input_ids": [0, 1], "labels": [0, 1], "loss_weights": @[1, 0.5]}
{{ {"prompt": "a", "response": @"I am {{ Name }}."}
"label" {"prompt": "a", "response": "b", "label": @0}
"train" {"messages": [$ask}], "train": @false}
"weight" {"messages": [$ask}], "weight": @0}
"conversations" {"messages": [$ask}], "conversations": @[$ask}]}
"input_ids" {"messages": [$ask}], "input_ids": @[1], "labels": [1]}
"attention_mask"|padding {"input_ids": [0, 1], "labels": [-100, 1], "attention_mask": @[0, 1]}
"rejected" {"conversations": [$ask}], "rejected": @{"from": "gpt", "value": "c"}}
"system" {"messages": [{"role": "system", "content": "s"}, $ask}], "system": @"t"}
"history" {"messages": [$ask}], "history": @[["c", "d"]]}
tools|array|not|5 {"messages": [$ask}], "tools": @5}
tools|array|in {"messages": [$ask}], "tools": @"{\"a\": 1}"}
expected|in {"messages": [$ask}], "tools": @"[1"}
function|metadata {"messages": [{"role": @"function", "content": "a"}]}
metadata|observation {"messages": [{"role": "tool", "name": @"f", "parameters": {}, "observation": 1}, $ask}]}
parameters {"messages": [{"role": "tool", "name": "f", "parameters": @3, "observation": 1}, $ask}]}
"content" {"messages": [@{"role": "tool", "name": "f", "observation": 1}, $ask}]}
<NAME>|(3 {"prompt": "a", "response": @"I am <NAME>, made by <AUTHOR>; <NAME>."}
{{name}} {"instruction": "a", "output": @"I am {{name}}."}
{{|author {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": @"By {{ author }}."}]}
END

# An empty list in a message, as a text, does not take the sample's own away.
tools='[{\"type\": \"function\", \"function\": {\"name\": \"f\", \"description\": \"g\", \"parameters\": {}}}]'
form plain '{"tools": "'"$tools"'", "messages": [{"role": "system", "content": "s"}, '"$ask"'}]}'
form empty '{"tools": "'"$tools"'", "messages": [{"role": "system", "content": "s", "tools": "[]"}, '"$ask"'}]}'
works '' check forms_plain.jsonl "$tiny" --ids
cp stdout plain.ids
works '' check forms_empty.jsonl "$tiny" --ids
check 'tools as a text, beside an empty list' cmp stdout plain.ids
sed 's/"system"/"System"/; s/"user"/"User"/; s/"assistant"/"ASSISTANT"/' forms_plain.jsonl >forms_large.jsonl
works '' check forms_large.jsonl "$tiny" --ids
check 'roles in large letters' cmp stdout plain.ids
rm plain.ids
# Characters that look like those of JSON, files that were joined, text that a conversion has broken.
form colon '{"prompt"："a"}'
refuse "forms_colon.jsonl:1:10: |a colon was expected here, not '：' (U+FF1A)" train forms_colon.jsonl "$tiny" --output_dir out
printf '\357\273\277{"prompt": "a", "response": "b"}\r\n%.0s' 1 2 3 >forms_joined.jsonl
works '3 read, 3 kept' check forms_joined.jsonl "$tiny" --samples 0
printf '{"prompt": "你", "response": "\304\343"}\n' >forms_mixed.jsonl
refuse 'forms_mixed.jsonl:1:30: |UTF-8 before this place and not here' train forms_mixed.jsonl "$tiny" --output_dir out
printf '{"prompt": "\304\343\272\303", "response": "\304\343"}\n' >forms_mixed.jsonl
refuse 'forms_mixed.jsonl:1:13: |the text is not UTF-8; convert it (iconv -f gb18030 -t utf-8' train forms_mixed.jsonl "$tiny" --output_dir out
form lost '{"prompt": "a", "response": "锟斤拷"} {"prompt": "\ud83d", "response": "c\r\nd"}'
works "lost.jsonl:1:29: '锟斤拷': has characters that were lost|(2 in all)|lost.jsonl:1:69: 'c': has a carriage return" \
    check forms_lost.jsonl "$tiny" --samples 0
# What looks like a table.
for text in 'question,answer' 'PAR1....'; do
    form table "$text"
    refuse 'forms_table.jsonl|pandas' train forms_table.jsonl "$tiny" --output_dir out
done
for text in '{\0"\0' '\0{\0"' '\377\376{\0' '\377\376\0\0{\0\0\0'; do
    printf "$text" >forms_wide.jsonl
    refuse 'forms_wide.jsonl: is UTF-|iconv -f utf-' train forms_wide.jsonl "$tiny" --output_dir out
done

# ---- Tests without answers -------------------------------------------------------------------------------------------

printf '%s\n' '{"messages": [{"role": "user", "content": "你叫什么？"}]}' '{"instruction": "Who are", "input": "you?"}' \
    '{"messages": ['"$ask"'}, {"role": "user", "content": "c"}]}' >forms_ask.jsonl
works 'loss|of 3 samples|no sample has an answer|of 3 answers, the first|prompt' eval forms_ask.jsonl "$tiny" --max_new_tokens 5 \
    --out answers.jsonl
check 'a question without an answer is answered' test "$(grep -c '"reference": null, "answer": "' answers.jsonl)" = 3
head -n 2 forms_ask.jsonl >forms_only.jsonl
run eval forms_only.jsonl "$tiny" --max_new_tokens 5
[ "$status" = 0 ] && ! grep -q loss stdout || want 'answers and no loss'
judge
form scored '{"prompt": "a", "response": "b"}'
cat forms_ask.jsonl >>forms_scored.jsonl
works 'rouge-1|of 4 answers' eval forms_scored.jsonl "$tiny" --max_new_tokens 5
refuse 'forms_ask.jsonl:1:1: the sample has nothing to learn' train forms_ask.jsonl "$tiny" --output_dir out
form blank '{"input_ids": [1, 2], "labels": [-100, -100]}'
refuse 'forms_blank.jsonl:1:1: the sample has nothing to learn' eval forms_blank.jsonl m
form long '{"prompt": "a b c d e f g h i j k l m n o p q r s t u v w x y z", "response": "b"}'
form short '{"prompt": "a", "response": "b"}'
cat forms_long.jsonl >>forms_short.jsonl
works 'forms_short.jsonl: 0 samples cut, 1 dropped|loss' eval forms_short.jsonl "$tiny" --overlong drop --max_input_length 9 \
    --max_output_length 9 --max_new_tokens 1
sed 's/"max_position_embeddings": 512/"max_position_embeddings": 8/' glm.json >forms_few.json
works '' init forms_few.json few --layout glm4-chat
cp tokenizer.bin few 2>/dev/null || cp "$bin" few
works 'forms_long.jsonl: its longest sample has|made for 8' train forms_long.jsonl few --output_dir few_run --max_steps 1
rm -rf few few_run forms_few.json
set +f
rm -f forms_*.jsonl answers.jsonl
set -f
