#!/usr/bin/env bash
# The first ten minutes on a GPU, in stages: each proves what stands above it, takes at most the seconds it is given,
# and goes on to the next also when it fails. All output is kept in $OUT/first_run.log; the screen gets its last lines.
#
#     make first-run          or      OUT=FOLDER bash tests/cuda/first_run.sh [FIRST [LAST]]      stages FIRST to LAST
#
# The machine needs cc and cuBLASLt, and either nvcc or a glmtune-cuda.o that was carried there. PyTorch (the last
# stage), ncu and compute-sanitizer are used where they are. Nothing is downloaded.
set -u
cd "$(dirname "$0")/../.." || exit 2
export OUT=${OUT:-build/first-run} PATH=$PATH:/usr/local/cuda/bin
mkdir -p build "$OUT"
log=$OUT/first_run.log first=${1:-0} last=${2:-99} began=$SECONDS
: >"$log"

stage() {       # NUMBER SECONDS LINES NAME COMMAND: LINES of its output on the screen, and whatever went wrong
    [ "$1" -ge "$first" ] && [ "$1" -le "$last" ] || return 0
    echo "== $((SECONDS - began)) s: $1 $4" | tee -a "$log"
    timeout "$2" bash -c "$5" >"$OUT/stage" 2>&1
    local status=$?
    cat "$OUT/stage" >>"$log"
    grep -E 'FAILED|rror|DISCARD|differ' "$OUT/stage" | head -n 8
    tail -n "$3" "$OUT/stage"
    echo "   status $status$([ $status -ne 124 ] || echo ': out of time')" | tee -a "$log"
}

# Libraries of the toolkit, or of PyTorch's packages, which lack the names that -l looks for. An object that was carried
# here is of CUDA 13.
version=13 libraries=/usr/local/cuda/lib64
! command -v nvcc >/dev/null 2>&1 || version=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
[ -e "$libraries/libcublasLt.so.$version" ] ||
    libraries=$(python3 -c 'import nvidia.cu13 as n; print(list(n.__path__)[0] + "/lib")' 2>/dev/null)
export LIBS="-L$libraries -Wl,-rpath,$libraries -l:libcublasLt.so.$version -l:libcudart.so.$version -lstdc++ -lm"
export CC="${CC:-cc} -std=gnu11 -O3 -march=native -ffp-contract=fast -fopenmp -Wno-unused-function"

# GLM-4-9B with its fused maps, as released: all 40 layers, and four for a look at each kernel.
config() {
    echo '{"model_type": "chatglm", "padded_vocab_size": 151552, "hidden_size": 4096, "num_layers": '"$1"',
        "num_attention_heads": 32, "multi_query_attention": true, "multi_query_group_num": 2, "kv_channels": 128,
        "ffn_hidden_size": 13696, "add_qkv_bias": true, "layernorm_epsilon": 1e-5, "seq_length": 8192}'
}
config 40 >"$OUT/glm-4-9b.json"
config 4 >"$OUT/four-layers.json"
export BENCH="build/bench-cuda $OUT/glm-4-9b.json --precision bf16"

# Which card, driver and clocks every later number belongs to.
stage 0 15 14 machine 'nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
    nvcc --version | tail -n 2; nproc'

# The object is built where nvcc is, and links; the C is built for this CPU.
stage 1 200 5 build 'if command -v nvcc; then
        nvcc -std=c++17 -O3 -arch=native -lineinfo -c glmtune.cu -o glmtune-cuda.o || exit 1
    fi
    $CC glmtune.c -o glmtune -lm & $CC -DGLMTUNE_DOUBLE glmtune.c -o glmtune64 -lm &
    $CC -DGLMTUNE_CUDA glmtune.c glmtune-cuda.o -o glmtune-cuda $LIBS &
    $CC -DGLMTUNE_CUDA tests/test.c glmtune-cuda.o -o test-cuda-float $LIBS &
    $CC -DGLMTUNE_CUDA tests/bench.c glmtune-cuda.o -o build/bench-cuda $LIBS & wait
    ls -l glmtune glmtune64 glmtune-cuda test-cuda-float build/bench-cuda'

# Every kernel is right in float, touches nothing beside its arrays, and gives the same bits three times. A name that
# fails is the kernel. "illegal memory access": run it again with CUDA_LAUNCH_BLOCKING=1, then stage 9.
stage 2 40 4 kernels-fp32 './test-cuda-float kernels'

# The tensor cores' part: rounding, fragments, shared memory. tests/test_kernels.c says beside its bars which small
# errors a GPU may show. Large ones in attention alone: run it under compute-sanitizer --tool racecheck.
stage 3 40 4 kernels-bf16 'GLM_PRECISION=bf16 ./test-cuda-float kernels'

# Whole models against Hugging Face's numbers, all methods, checkpoints to the bit, in both precisions. "bits differ"
# means a race, or products whose algorithm depends on more than their shape.
export MODELS="golden quantised training saved adapters merge accumulation dropout recomputing frozen methods init \
    generation answers"
stage 4 90 8 models '(GLM_PRECISION=bf16 ./test-cuda-float $MODELS 2>&1 | sed "s/^/bf16 /") &
    ./test-cuda-float $MODELS; wait'

# The speed: products, attention, decoding and a LoRA step of GLM-4-9B, as shares of the card's own rate of products.
stage 5 60 22 bench-1x2048 '$BENCH --tokens 2048'
stage 6 60 10 bench-8x512 '$BENCH --tokens 512 --per_device_train_batch_size 8'

# The memory of a step with recomputing, the most that nvidia-smi has seen.
stage 7 60 3 memory '$BENCH --tokens 1024 --gradient_checkpointing true >/dev/null & bench=$!
    while kill -0 $bench 2>/dev/null; do
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits
        sleep 0.3
    done | sort -n | tail -n 1 | sed "s/\$/ MiB at most/"'

# Where the time goes, by kernel, over about two of the eight steps. Names of products tell whether they are the card's
# own (nvjet, sm90) or old ones (sm80: the slow way); plain_product_kernel: cuBLASLt had none.
stage 8 60 25 times 'ncu --clock-control none --metrics gpu__time_duration.sum --csv \
        --launch-skip 3000 --launch-count 1000 \
        build/bench-cuda $OUT/four-layers.json --precision bf16 --tokens 2048 >"$OUT/times.csv" &&
    python3 tests/cuda/times.py "$OUT/times.csv"'

# No access out of bounds, in kernels that passed: too slow for whole models.
stage 9 75 4 memcheck 'GLM_PRECISION=bf16 compute-sanitizer --error-exitcode 9 ./test-cuda-float kernels'

# Whole runs: losses of the CPU, resuming either way, two runs to the same bits, gradients of glmtune64.
stage 10 60 4 whole-runs 'bash tests/cuda/compare.sh ./glmtune ./glmtune-cuda lora'

# The same step by PyTorch and PEFT, whose first loss must agree.
stage 11 120 6 torch 'python3 tests/bench_torch.py --device cuda --precision bf16 --hidden 4096 --layers 4 --heads 32 \
        --ffn 13696 --vocab 151552 --tokens 2048 --rounds 1 --steps 8'
