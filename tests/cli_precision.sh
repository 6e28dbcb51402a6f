# --precision bf16: products of rounded numbers; test_cli.sh reads this file.

quick='--max_steps 12 --val_size 0 --logging_steps 1 --save_steps 6 --learning_rate 0.001'
if [ -z "$float" ]; then
    misuse '--precision bf16|plain loops' train data.jsonl m --output_dir out --precision bf16
else
    works 'done' train data.jsonl m --output_dir bf16/wide $quick
    works 'precision=bf16|done' train data.jsonl m --output_dir bf16/narrow $quick --precision bf16 --threads 1
    works 'done' train data.jsonl m --output_dir bf16/again $quick --precision bf16 --threads 3
    model=checkpoint-12/adapter_model.safetensors
    check 'bf16 gives other bits than fp32' test -n "$(cmp bf16/wide/$model bf16/narrow/$model)"
    check 'bf16 gives the same bits on one thread and on three' cmp bf16/narrow/$model bf16/again/$model
    losses() { sed 's/.*"loss": \([^,]*\).*/\1/' "bf16/$1/log.jsonl"; }
    paste <(losses wide) <(losses narrow) >loss.pairs
    check 'losses in bf16 are those in fp32, within 1 % or 0.01' awk '
        function abs(x) { return x < 0 ? -x : x }
        !(abs($1 - $2) <= ($1 > 1 ? 0.01 * $1 : 0.01)) { print "step " NR ": fp32 " $1 ", bf16 " $2; bad = 1 }
        END { exit bad || NR != 12 }' loss.pairs
    works '' train data.jsonl m --output_dir bf16/resumed $quick --precision bf16 --stop_at_step 6
    works 'done' train data.jsonl m --output_dir bf16/resumed $quick --resume_from_checkpoint yes
    check 'a run goes on in its precision' cmp bf16/narrow/$model bf16/resumed/$model
    works '' train data.jsonl m --output_dir bf16/changed $quick --precision bf16 --stop_at_step 6
    works 'precision was bf16, now it is fp32|done' train data.jsonl m --output_dir bf16/changed $quick --precision fp32 \
        --resume_from_checkpoint yes
    works 'loss' eval data.jsonl bf16/narrow/checkpoint-12 --precision bf16
    works '' chat bf16/narrow/checkpoint-12 --precision bf16 --prompt hi --max_new_tokens 4
    misuse '--precision|fp32|bf16' eval data.jsonl m --precision fp16
    for method in lora full freeze ptuning adapter; do
        [ -e gradients.$method ] || continue        # of glmtune64
        works "all gradients agree with gradients.$method" gradcheck --method $method --truth gradients.$method \
            --precision bf16
    done
    rm -rf bf16
fi
