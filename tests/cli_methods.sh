# Tuning methods: what they train, their files, what is refused.

# ---- Trainable counts of the released shapes ---------------------------------------------------------------------

released 'method ptuning trains 1835008 of' info chatglm3-6b --method ptuning
works 'method ptuning trains 1310720 of' info glm-4-9b-chat --method ptuning --num_virtual_tokens 64
released 'method adapter trains' info chatglm3-6b --method adapter
released 'method freeze trains 407925760' info chatglm3-6b --method freeze --trainable_layers 2

# ---- Each method: tune, chat, go on, look ------------------------------------------------------------------------

short='--max_steps 2 --val_size 0 --logging_steps 1'
for method in 'ptuning --num_virtual_tokens 4' 'ptuning --num_virtual_tokens 4 --prefix_projection true' \
    'adapter' 'adapter --adapter_type pfeiffer' 'freeze --trainable_layers 1' 'freeze --trainable_layers 0 --trainable_head'; do
    for base in f remote; do
        rm -rf tuned on
        format=''; [ $base = f ] || format='--layout glm4-chat'
        works 'done' train data.jsonl $base --output_dir tuned $short $format --method $method
        works '' chat tuned/checkpoint-2 --prompt hi --max_new_tokens 3 $format
        works 'done' train data.jsonl tuned/checkpoint-2 --output_dir on $short $format
        works "method ${method%% *} trains" info tuned/checkpoint-2 $format
    done
done
rm -rf merged tuned on
works 'done' train data.jsonl f --output_dir tuned $short --method freeze --trainable_layers 1
works 'tensors' merge tuned/checkpoint-2 merged
works '' chat merged --prompt hi --max_new_tokens 3

# ---- Files that are not as they should be ------------------------------------------------------------------------

rm -rf prefix bottleneck
works 'done' train data.jsonl f --output_dir prefix $short --method ptuning --num_virtual_tokens 4
works 'done' train data.jsonl f --output_dir bottleneck $short --method adapter --reduction_factor 16
refuse 'prefix|cannot be merged|a prefix is keys and values' merge prefix/checkpoint-2 out
refuse 'bottleneck|cannot be merged|network of its own' merge bottleneck/checkpoint-2 out

broken prefix/checkpoint-2
sed -i 's/"num_virtual_tokens": 4/"num_virtual_tokens": 5/' bad/adapter_config.json
refuse "adapter_model.safetensors|'prompt_embeddings'|[4, 16]|[5, 16]" chat bad --prompt hi
broken prefix/checkpoint-2
sed -i 's/"num_virtual_tokens": 4/"num_virtual_tokens": 0/' bad/adapter_config.json
refuse 'adapter_config.json|"num_virtual_tokens"' chat bad --prompt hi
broken prefix/checkpoint-2
sed -i 's/"PREFIX_TUNING"/"PROMPT_TUNING"/' bad/adapter_config.json
refuse "adapter_config.json|'PROMPT_TUNING'|PREFIX_TUNING|LORA" chat bad --prompt hi
broken prefix/checkpoint-2; edit_header bad/adapter_model.safetensors 's/prompt_embeddings/prompt_embedding_/'
refuse "'prompt_embeddings' is missing" chat bad --prompt hi
broken prefix/checkpoint-2; add_tensor bad/adapter_model.safetensors extra
refuse "adapter_model.safetensors|'extra'" chat bad --prompt hi
refuse 'num_virtual_tokens 4|leave the option out' train data.jsonl prefix/checkpoint-2 --num_virtual_tokens 9 --output_dir out
sed 's/"head_dim": 4/"head_dim": 8/' glm.json >broad.json
works 'parameters' init broad.json broad --layout glm4-chat
refuse "'prompt_embeddings'" chat prefix/checkpoint-2 --prompt hi --base broad --force
broken bottleneck/checkpoint-2
sed -i 's/"houlsby"/"parallel"/' bad/adapter_config.json
refuse 'adapter_config.json|"adapter_type"' chat bad --prompt hi
broken bottleneck/checkpoint-2
sed -i 's/"reduction_factor": 16/"reduction_factor": 4/' bad/adapter_config.json
refuse "adapter_model.safetensors|adapter_down|[1, 16]|[4, 16]" chat bad --prompt hi
refuse '--trainable_layers 7|the model has 1' train data.jsonl f --method freeze --trainable_layers 7 --output_dir out
refuse "target module 'qproj'|q_proj" train data.jsonl f --method freeze --trainable_layers 1 --trainable_modules qproj --output_dir out
refuse 'nothing would train' train data.jsonl f --method freeze --trainable_layers 0 --output_dir out

rm -rf idle
works 'done' train data.jsonl f --output_dir idle --max_steps 1 --val_size 0 --learning_rate 0
works 'warning: idle/checkpoint-1: changes nothing' chat idle/checkpoint-1 --prompt hi --max_new_tokens 2
rm -rf idle
works 'done' train data.jsonl f --output_dir idle --max_steps 1 --val_size 0 --learning_rate 0 --method adapter
works 'warning: idle/checkpoint-1: changes nothing' chat idle/checkpoint-1 --prompt hi --max_new_tokens 2

# ---- ChatGLM's own prefix encoder, and other names ---------------------------------------------------------------

rm -rf tuned official peft back split fused
works 'done' train data.jsonl remote --output_dir tuned $short --layout glm4-chat --method ptuning --num_virtual_tokens 4 --prefix_projection true
mkdir official
cp tuned/checkpoint-2/adapter_model.safetensors official/pytorch_model.safetensors
sed 's/^{/{"pre_seq_len": 4, "prefix_projection": true, "_name_or_path": "..\/remote",/' remote/config.json >official/config.json
works '' chat official --prompt hi --max_new_tokens 8 --layout glm4-chat
cp stdout answer
works '' chat tuned/checkpoint-2 --prompt hi --max_new_tokens 8 --layout glm4-chat
check 'the official folder answers as the checkpoint does' cmp stdout answer
works 'trains' info official
sed -i 's/"pre_seq_len": 4/"pre_seq_len": 6/' official/config.json
refuse 'config.json|"pre_seq_len" is 6|a prefix of 4' chat official --prompt hi

# ---- LoRA beside three maps is not LoRA beside the fused one -----------------------------------------------------

echo '{"model_type": "glm", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "vocab_size": 151552,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": true,
    "max_position_embeddings": 131072}' >glm-4-9b-chat-hf.json
released 'trains 5406720 of' info glm-4-9b-chat-hf.json --method lora --r 8 --target_modules q_proj,k_proj,v_proj --layout glm4-chat
released 'method ptuning trains 2621440 of' info glm-4-9b-chat-hf.json --method ptuning --layout glm4-chat

# ---- What tests/report found to go wrong -------------------------------------------------------------------------

still='moves by about learning rate x steps' replayed='nothing old was replayed'
works "$still|done" train data.jsonl m --method ptuning --learning_rate 5e-5 --max_steps 2 --output_dir warned
check 'the last lines say that nothing old was replayed' [ "$(grep -c "$replayed" printed)" = 1 ]
works "$replayed|done" train data.jsonl m --method ptuning --learning_rate 0.5 --max_steps 20 --output_dir warned --force
check 'nor is a prefix that can move' [ "$(grep -c "$still" printed)" = 0 ]
works 'done' train data.jsonl m --max_steps 20 --output_dir warned --force --replay data.jsonl:0.5
check 'with old samples nothing is said of them' [ "$(grep -c "$replayed" printed)" = 0 ]
rm -rf warned

# ---- Linear maps by name: those of the other layout, and of PEFT --------------------------------------------------

# BASE GIVEN WANTED: the names that an adapter then has
names_become() {
    works 'done' train data.jsonl $1 --layout glm4-chat --output_dir named --max_steps 1 --val_size 0 --target_modules "$2"
    check "$1: '$2' is $3" grep -qF "\"target_modules\": [\"${3//,/\", \"}\"]" named/checkpoint-1/adapter_config.json
    rm -rf named
}
names_become remote q_proj,k_proj,v_proj query_key_value
names_become remote 'q_proj, k_proj, v_proj, o_proj' query_key_value,dense
names_become remote all-linear query_key_value,dense,dense_h_to_4h,dense_4h_to_h
names_become f query_key_value q_proj,k_proj,v_proj
names_become f 'q_proj, dense_4h_to_h' q_proj,down_proj
names_become f all-linear q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj
works 'one map here, query_key_value, which is taken whole' info remote --target_modules q_proj,v_proj
run info remote --target_modules q_proj,k_proj,v_proj
! grep -q 'taken whole' stderr || want 'no note where all three are named'
judge
works 'method freeze trains 544 of' info remote --method freeze --trainable_layers 1 --trainable_modules q_proj,k_proj,v_proj
refuse "'gate_proj' is not in this model|query_key_value,dense" train data.jsonl remote --layout glm4-chat --output_dir out \
    --target_modules q_proj,gate_proj
refuse 'names no linear map' train data.jsonl f --output_dir out --target_modules ' '
misuse '--replay must be one line' train data.jsonl f --output_dir out --replay $'old\nnew.jsonl:1'
refuse '--trainable_modules names no linear map' train data.jsonl f --output_dir out --method freeze --trainable_layers 1 --trainable_modules ''
works 'saved' train data.jsonl remote --layout glm4-chat --output_dir named --max_steps 2 --val_size 0 --stop_at_step 1 \
    --target_modules 'q_proj, k_proj, v_proj'
works 'done' train data.jsonl remote --layout glm4-chat --output_dir named --resume_from_checkpoint yes
rm -rf named
