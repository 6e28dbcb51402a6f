#!/usr/bin/env bash
# README's "Port it to your hardware": its example of one function compiles, links and passes; with no function of a
# port the plain loops pass; with -DGLMTUNE_CUDA a function that is left out does not link. Closes with N passed, N failed.
set -u
cd "$(dirname "$0")/.." || exit 1
out=$(mktemp -d) passed=0 failed=0
trap 'rm -rf "$out"' EXIT
cp tokenizer.bin "$out"
cc=${CC:-cc} options="-std=gnu11 -O2 -march=native -ffp-contract=fast -Wall -Wextra -Wno-unknown-pragmas"

check() {   # WHAT COMMAND...
    local what=$1
    shift
    if "$@" >"$out/output" 2>&1; then passed=$((passed + 1)); return; fi
    failed=$((failed + 1))
    echo "FAILED  $what"
    tail -n 20 "$out/output"
}

test_with() {   # NAME SWITCH OBJECT...: builds the conformance test
    local name=$1
    shift
    "$cc" $options -Werror -Wno-unused-function "$1" tests/test.c "${@:2}" -o "$out/$name" -lm
}

fails_with() {  # WORD COMMAND...: the command fails, and says this word
    local word=$1
    shift
    ! "$@" >"$out/error" 2>&1 && grep -q "$word" "$out/error"
}

awk '/^   ```c$/ { on = 1; next } /^   ```$/ { on = 0 } on { print substr($0, 4) }' README.md >"$out/one.c"
check "README has the example" grep -q '^void add(' "$out/one.c"
check "it compiles" "$cc" $options -Werror -I. -c "$out/one.c" -o "$out/one.o"
check "the test links with one function of a port" test_with one -DGLMTUNE_PORT "$out/one.o"
check "and passes" "$out/one" kernels
check "the program links with it" "$cc" $options -Werror -DGLMTUNE_PORT glmtune.c "$out/one.o" -o "$out/program" -lm
check "the test links with none" test_with none -DGLMTUNE_PORT
check "and passes" "$out/none" kernels
sed 's/a\[i\] + b\[i\]/a[i] - b[i]/' "$out/one.c" >"$out/wrong.c"
check "a wrong one compiles" "$cc" $options -I. -c "$out/wrong.c" -o "$out/wrong.o"
check "and links" test_with wrong -DGLMTUNE_PORT "$out/wrong.o"
check "it is the one that runs: the test fails" fails_with 'FAILED add' "$out/wrong" kernels
check "-DGLMTUNE_CUDA does not link where functions are left out" fails_with 'rmsnorm_forward' test_with cuda \
    -DGLMTUNE_CUDA "$out/one.o"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
