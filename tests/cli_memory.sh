# ---- Memory: what a run takes is what its plan said --------------------------------------------------------------

# The most anonymous memory, in KiB, that a command ever has while it runs; its stderr goes to the file `stderr`.
peak_own() {
    local kib most=0
    "$@" >stdout 2>stderr &
    while [ -r /proc/$!/status ] && kib=$(sed -n 's/^RssAnon:[^0-9]*\([0-9]*\).*/\1/p' /proc/$!/status 2>/dev/null); do
        [ -n "$kib" ] || break
        [ "$kib" -le "$most" ] || most=$kib
        sleep 0.02
    done
    wait $!
    status=$?
    echo "$most" >most
}

own_memory_is_planned() {       # OPTION...: a run's own memory is within 10 % of the plan
    local planned
    told="own memory of train $*"
    peak_own "$program" train long.jsonl memory_model --output_dir memory_run --max_input_length 4096 --max_steps 2 \
        --val_size 0 --gradient_accumulation_steps 1 --threads 1 --force "$@"
    [ "$status" = 0 ] || want "exit status 0"
    planned=$(awk '/^memory:/ { for (i = 2; i <= NF; i++) if ($i == "own:") {
        print $(i-2) * ($(i-1) == "GiB" ? 1048576 : $(i-1) == "MiB" ? 1024 : 1) } }' stderr)
    awk -v planned="${planned:-0}" -v most="$(cat most)" 'BEGIN { exit !(most >= 0.9 * planned && most <= 1.1 * planned) }' ||
        want "within 10 % of the planned $planned KiB, and there were $(cat most)"
    judge
}

if [ -r /proc/self/status ] && [ -z "$sanitized" ]; then
    echo '{"model_type": "glm", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768, "max_position_embeddings": 8192}' >memory.json
    works parameters init memory.json memory_model
    awk 'BEGIN { for (i = 0; i < 4096; i++) ids = ids (i ? ", " : "") i * 37 % 4096
                 print "{\"input_ids\": [" ids "], \"labels\": [" ids "]}" }' >long.jsonl
    own_memory_is_planned
    own_memory_is_planned --gradient_checkpointing
    own_memory_is_planned --method full
    own_memory_is_planned --method full --optim sgd
    rm -rf memory_model memory_run memory.json long.jsonl most
else
    skip "own memory against the plan: needs /proc, and no sanitizer"
fi
