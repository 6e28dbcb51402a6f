#!/bin/sh
# Runs each command given, adds up the closing lines "N passed, N failed[, N skipped]", and closes with one of its own.
# A command that dies without such a line counts as a failure.
passed=0 failed=0 skipped=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT
for command in "$@"; do
    echo "== $command"
    $command >"$output" 2>&1
    status=$?
    cat "$output"
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$output" | tail -n 1)
    set_failed=0
    if [ -n "$line" ]; then
        passed=$((passed + $(echo "$line" | sed 's/ passed.*//')))
        set_failed=$(echo "$line" | sed 's/.*passed, \([0-9]*\) failed.*/\1/')
        case $line in *skipped*) skipped=$((skipped + $(echo "$line" | sed 's/.*failed, \([0-9]*\) skipped.*/\1/'))) ;; esac
    fi
    if [ "$status" -ne 0 ] && [ "$set_failed" -eq 0 ]; then
        echo "FAILED: $command ended with status $status"
        set_failed=1
    fi
    failed=$((failed + set_failed))
done
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
