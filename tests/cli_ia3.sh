# README's "Add your own method": what stands there compiles, and the method that it adds is right. Sourced by
# test_cli.sh. Makes one program from glmtune.c, the block and the row (in double: gradcheck wants it).

top=$(dirname "$tests")
fenced() { awk -v n="$1" '/^```c$/ { k++; on = 1; next } /^```$/ { on = 0 } on && k == n' "$top/README.md"; }
mkdir ia3
fenced 1 >ia3/block
fenced 2 >ia3/row
check 'README has the block and the row of IA3' grep -q 'ia3_setup' ia3/block ia3/row
check 'the example has fewer than 60 lines' [ "$(cat ia3/block ia3/row | wc -l)" -lt 60 ]
check 'none of them longer than 120' [ "$(cat ia3/block ia3/row | wc -L)" -le 120 ]
awk 'FNR == 1 { file++ } file == 1 { block = block $0 "\n"; next } file == 2 { row = row $0 "\n"; next }
     /^\/\/ ---- 5.7 The table/ { print block }
     /^static const Method methods/ { table = 1 }
     table && /^};/ { printf "%s", row; table = 0 }
     { print }' ia3/block ia3/row "$top/glmtune.c" >ia3/glmtune.c
if [ -n "$sanitized" ]; then
    skip 'IA3 from README: the program that is made here has no sanitizers, and the run without them makes the same'
elif command -v "${CC:-cc}" >/dev/null; then
    check 'it compiles without a warning' "${CC:-cc}" -std=gnu11 -O1 -march=native -ffp-contract=fast -Wall -Wextra \
        -Wshadow -Wconversion -Werror -Wno-unused-function -Wno-unknown-pragmas -DGLMTUNE_DOUBLE \
        -DGLMTUNE="\"$work/ia3/glmtune.c\"" "$tests/ia3.c" -o ia3/ia3 -lm
    cp "$beside/tokenizer.bin" ia3/
    usual=$program program=$work/ia3/ia3

    works 'chatglm, method ia3|glm4, method ia3|all gradients agree' gradcheck --method ia3
    check 'gradcheck: every vector of three models of two layers' [ "$(grep -c 'ia3_l.* ok$' stdout)" = 16 ]
    works 'method ia3 trains 80 of' info "$tests/golden/saved_ia3"
    for golden in "$tests/golden/saved_ia3" "$tests/golden/saved_ia3_fused"; do
        works '13 tokens, loss' dump "$golden" "$golden/batch.jsonl" ia3/dump --force
        check 'logits, loss and gradients are those of PEFT' "$program" golden ia3/dump "$golden/golden.safetensors"
    done

    batch=$tests/golden/saved_ia3/batch.jsonl
    works 'done' train "$batch" "$tests/golden/saved_hf" --method ia3 --output_dir ia3/start --max_steps 1 \
        --learning_rate 0 --val_size 0
    works '13 tokens, loss' dump "$tests/golden/saved_hf" "$batch" ia3/base
    sed 's/.*, loss \([^,]*\),.*/\1/' stdout >ia3/loss
    works 'changes nothing|13 tokens, loss' dump ia3/start/checkpoint-1 "$batch" ia3/dump --force
    check 'it starts from the base exactly' cmp ia3/loss <(sed 's/.*, loss \([^,]*\),.*/\1/' stdout)

    head -n 3 "$tests/data/facts.jsonl" >ia3/three.jsonl        # plain loops in double, hardly optimised
    works 'done' train ia3/three.jsonl "$tests/tiny" --method ia3 --output_dir ia3/run --max_steps 12 \
        --per_device_train_batch_size 3 --gradient_accumulation_steps 1 --logging_steps 1 --val_size 0 --learning_rate 0.05
    check 'the run learns' awk -F'"loss": ' '{ split($2, a, ","); if (NR == 1) first = a[1]; last = a[1] }
        END { exit !(last < 0.8 * first) }' ia3/run/log.jsonl
    check 'its folder says what PEFT asks for' grep -q '"target_modules": \["query_key_value", "k_proj", "v_proj", "dense_4h_to_h", "down_proj"\]' \
        ia3/run/checkpoint-12/adapter_config.json
    works '' chat ia3/run/checkpoint-12 --prompt 你是谁？ --max_new_tokens 4
    refuse 'cannot be merged: this example leaves it out' merge ia3/run/checkpoint-12 out
    program=$usual
else
    skip 'IA3 from README: there is no C compiler'
fi
rm -rf ia3
