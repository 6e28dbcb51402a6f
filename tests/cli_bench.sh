# ---- bench: its figures are there; whether the machine was quiet, which decides its status, is not ours to test ---

if [ -n "$sanitized" ]; then
    skip 'bench: the program that is made here has no sanitizers, and the run without them makes the same'
else
    "${CC:-cc}" -std=gnu11 -O2 -march=native -Wno-unused-function -Wno-unknown-pragmas "$tests/bench.c" -o bench -lm
    cp "$beside/tokenizer.bin" .
    usual=$program program=$work/bench
    bench_prints() {                # WORDS OPTION...
        local words=$1
        shift
        run "$@"
        [ "$status" -le 1 ] && [ "$(grep -c '^glmtune: ' stderr)" = 0 ] || want "exit status 0, or 1 on a busy machine"
        want_words stdout "$words"
        ! grep -qi nan stdout || want "numbers"
        judge
    }
    bench_prints 'peak|GFLOP/s|dX    32 rows|attention, 32 tokens|decoding, a token|forward|optimizer|tokens/s|afterwards' \
        "$tests/tiny" --tokens 32
    bench_prints 'training step: full, 2 x 16 tokens, 16 targets' "$tests/tiny" --tokens 16 --target_share 0.5 --method full \
        --per_device_train_batch_size 2
    misuse 'nothing to learn' "$tests/tiny" --target_share 0
    program=$usual
fi
