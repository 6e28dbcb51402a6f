#!/bin/sh
# Fuzzes each target, or those named, for so many seconds with libFuzzer under the address and undefined-behaviour
# sanitizers:
#     tests/fuzz/run.sh SECONDS [TARGET ...]
# Grows build/fuzz/TARGET from tests/fuzz/seeds/TARGET; an input that crashes, hangs or takes too much memory is kept in
# tests/fuzz/crashes/TARGET, where `make test` reads it from then on. Ends with 1 when there is a new one.
set -u
cd "$(dirname "$0")/../.."
seconds=$1 bad=0
shift
[ $# -gt 0 ] || set -- json tokenizer tokenizer_json safetensors torch data yaml adapter quantised
for target in "$@"; do
    mkdir -p "build/fuzz/$target" "tests/fuzz/crashes/$target"
    clang -std=gnu11 -O1 -g -DTARGET="\"$target\"" -Wno-unused-function -fsanitize=fuzzer,address,undefined \
        -fno-sanitize-recover=all tests/fuzz/fuzz.c -o "build/fuzz/fuzz-$target" -lm || exit 2
    dictionary=
    [ -f "tests/fuzz/$target.dict" ] && dictionary="-dict=tests/fuzz/$target.dict"
    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 "build/fuzz/fuzz-$target" "build/fuzz/$target" \
        "tests/fuzz/seeds/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=3000 -max_len=8192 $dictionary \
        -close_fd_mask=1 -print_final_stats=1 -artifact_prefix="tests/fuzz/crashes/$target/" \
        >"build/fuzz/$target.log" 2>&1 || bad=1
    printf '%s: ' "$target"
    grep -aE 'number_of_executed_units|ERROR|SUMMARY' "build/fuzz/$target.log" | tr '\n' ' '
    echo
    rmdir "tests/fuzz/crashes/$target" 2>/dev/null
done
rmdir tests/fuzz/crashes 2>/dev/null
exit $bad
