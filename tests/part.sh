#!/usr/bin/env bash
# Meets glmtune as its users do, from the command line. What cannot work must end in one line that says what, where and
# what to do, with exit status 1 (bad usage: 2), and leave nothing half-written; what can work must work.
#
#     tests/test_cli.sh [PROGRAM]        PROGRAM is ./glmtune unless named; a tokenizer.bin must lie beside it
#
# Prints the checks that fail, with GLM_VERBOSE=1 the others too, and closes with their numbers. Needs bash, coreutils,
# sed, grep, awk and find; works in a temporary folder and takes it away again.
set -u -f
export LC_ALL=C OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

program=${1:-./glmtune}
[ -x "$program" ] || { echo "$0: $program is no program; build it first (make)" >&2; exit 2; }
tests=$(cd "$(dirname "$0")" && pwd)
beside=$(cd "$(dirname "$program")" && pwd)
program=$beside/$(basename "$program")
[ -f "$beside/tokenizer.bin" ] || { echo "$0: there is no $beside/tokenizer.bin" >&2; exit 2; }

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work" || exit 2
exec </dev/null
passed=0 failed=0 limit='' may_begin='' wanted='' told=''
# Under the sanitizers, where a computation takes ten times as long: what they can add nothing to is left out.
sanitized='' patience=100
! grep -q __asan_init "$program" || sanitized=yes patience=300

# ---- Helpers: running and judging --------------------------------------------------------------------------------

# Runs glmtune under $limit (ulimit's words, or nothing); leaves stdout, stderr and $status.
run() {
    told="glmtune $*"
    if [ -n "$limit" ]; then
        (trap '' XFSZ; ulimit $limit; exec timeout $patience "$program" "$@") >stdout 2>stderr
    else
        timeout $patience "$program" "$@" >stdout 2>stderr
    fi
    status=$?
}

want() { wanted="$wanted${wanted:+; }$1"; }     # notes what the last run should have done and did not

# Counts the last run: passed when nothing is noted. [STDOUT STDERR]: the files to show when it failed.
judge() {
    if [ -z "$wanted" ]; then
        passed=$((passed + 1))
        [ -z "${GLM_VERBOSE:-}" ] || { echo "ok      $told"; sed -n 's/^glmtune: /            /p' "${2:-stderr}"; }
    else
        failed=$((failed + 1))
        printf 'FAILED  %s\n  expected: %s\n  got: exit status %s\n' "$told" "$wanted" "$status"
        sed 's/^/       stdout: /' "${1:-stdout}" | head -n 5 | cut -c1-300
        sed 's/^/       stderr: /' "${2:-stderr}" | head -n 12 | cut -c1-300
        [ "$(wc -l <"${2:-stderr}")" -le 12 ] || echo '       stderr: ... and more'
    fi
    wanted=''
}

want_words() {                  # FILE WORDS: all of them, separated by |, stand in the file
    local list word
    IFS='|' read -r -a list <<<"$2"
    for word in "${list[@]}"; do grep -qF -e "$word" "$1" || want "the words \"$word\""; done
}

want_clean() {                  # no temporary file, and no output but what a run that has begun may leave
    local left
    left=$(find . -name '*.tmp*')
    [ -z "$left" ] || want "nothing left behind, and there is $left"
    if [ -n "$may_begin" ]; then left=$(find out -type f ! -name log.jsonl ! -name loss.svg ! -name run.json 2>stdout.find; find out -name 'checkpoint-*')
    else left=$(find . -path ./out); fi
    [ -z "$left" ] || want "no output, and there is $left"
    rm -rf out stdout.find
    find . -name '*.tmp*' -prune -exec rm -rf {} +
}

# STATUS WORDS COMMAND...: ends with this status and one line of error, which holds the words; lines of progress may
# stand before it.
expect_error() {
    local expected=$1 words=$2
    shift 2
    run "$@"
    tail -n 1 stderr >last
    [ "$status" = "$expected" ] || want "exit status $expected"
    [ "$(grep -c '^glmtune: ' stderr)" = 1 ] && grep -q '^glmtune: ' last || want "one line of error, as the last"
    ! grep -qvE '^(glmtune: |data: |training: |time: |disk: |replay: |settings: |model: |memory: |labels as |warning: |note: |step [0-9]|[a-z0-9]*[.]yaml: )' \
        stderr || want "no other lines"
    [ ! -s stdout ] || want "nothing on stdout"
    want_words last "$words"
    want_clean
    judge
}

refuse() { expect_error 1 "$@"; }                               # bad input
misuse() { expect_error 2 "$@"; }                               # bad usage
stops() { may_begin=yes; expect_error 1 "$@"; may_begin=''; }   # an error after training began: log.jsonl may be there

works() {                       # WORDS COMMAND...: succeeds, and prints the words
    local words=$1
    shift
    run "$@"
    cat stdout stderr >printed
    [ "$status" = 0 ] || want "exit status 0"
    ! grep -q '^glmtune: ' stderr || want "no error"
    want_words printed "$words"
    [ -z "$(find . -name '*.tmp*')" ] || want "no temporary file left"
    judge
}

check() {                       # WHAT COMMAND...: the shell's command succeeds; stdout and stderr of the last run stay
    told=$1
    shift
    "$@" >checked.out 2>checked.err
    status=$?
    [ "$status" = 0 ] || want "success of: $*"
    judge checked.out checked.err
}

await() {                       # COMMAND...: waits until it succeeds; two minutes at most
    local i
    for i in $(seq 1200); do
        ! "$@" || return 0
        sleep 0.1
    done
    return 1
}

has_lines() { [ "$(wc -l <"$1")" -ge "$2" ]; }      # FILE NUMBER: at least so many

skip() { [ -z "${GLM_VERBOSE:-}" ] || echo "skipped $1"; }

# ---- Helpers: making and damaging files --------------------------------------------------------------------------

le8() {                         # NUMBER: as eight bytes, lowest first
    local n=$1 i
    for i in 1 2 3 4 5 6 7 8; do printf "\\$(printf %03o $((n & 255)))"; n=$((n >> 8)); done
}

zeros() { head -c "$1" /dev/zero; }

tensor_file() {                 # FILE HEADER BYTES: a safetensors file with that header and so many zeros
    { le8 ${#2}; printf %s "$2"; zeros "$3"; } >"$1"
}

header_length() { head -c 8 "$1" | od -An -tu8 | tr -d ' '; }
header_of() { tail -c +9 "$1" | head -c "$(header_length "$1")"; }

edit_header() {                 # FILE SED [BYTES]: edits the header; BYTES more (or fewer) at the end
    local header n=${3:-0}
    header=$(header_of "$1" | sed -E "$2")
    tail -c +$((9 + $(header_length "$1"))) "$1" >numbers
    [ "$n" -ge 0 ] && zeros "$n" >>numbers || truncate -s "$n" numbers
    { le8 ${#header}; printf %s "$header"; cat numbers; } >"$1"
    rm numbers
}

numbers_at() {                  # FILE TENSOR: where in the file the tensor's first number lies
    local begin
    begin=$(header_of "$1" | sed -E "s/.*\"$2\":[{][^}]*\"data_offsets\":\[([0-9]+),.*/\1/")
    echo $((8 + $(header_length "$1") + begin))
}

add_tensor() {                  # FILE NAME: one more tensor, a single F32
    local n=$(($(wc -c <"$1") - $(header_length "$1") - 8))
    edit_header "$1" "s/\}\} *$/},\"$2\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[$n,$((n + 4))]}}/" 4
}

put() {                         # FILE PLACE BYTES: writes over what is there; BYTES as printf takes them
    printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}

repeated() { zeros "$2" | tr '\0' @ | sed "s/@/$1/g"; }      # WORD N: the word N times

broken() { rm -rf bad; cp -R "${1:-m}" bad; }       # [FOLDER]: a copy, to be damaged

# WORDS LINE: a data file whose second line is LINE is refused, by file:line:column; @ marks the column and is left out.
bad_line() {
    local before=${2%%@*} column where=bad.jsonl:2
    { head -n 1 data.jsonl; printf '%s\n' "${2/@/}"; head -n 1 data.jsonl; } >bad.jsonl
    column=$(($(printf %s "$before" | tr -d '\200-\277' | wc -c) + 1))
    case $2 in *@*) where=$where:$column: ;; esac
    refuse "$where|$1" train bad.jsonl m --output_dir out
}

# WORDS SED [CONFIG]: a config.json so edited is refused by init and by info, with its name and the words.
bad_config() {
    sed -E "$2" "${3:-glm.json}" >bad.json
    refuse "bad.json|$1" init bad.json out
    refuse "bad.json|$1" info bad.json
}

# WORDS HEADER BYTES: a model whose weights are a file with this header is refused.
bad_header() {
    tensor_file bad_header/model.safetensors "$2" "$3"
    refuse "bad_header/model.safetensors|$1" train data.jsonl bad_header --output_dir out
}

# OPTION VALUE: this is no number, or none that the option takes.
no_number() { misuse "--$1|number, not '$2'" train data.jsonl m --output_dir out "--$1" "$2"; }
no_range() { misuse "--$1|from|to|not $2" train data.jsonl m --output_dir out "--$1" "$2"; }

# ---- Models and data ---------------------------------------------------------------------------------------------

cat >glm.json <<'END'
{
  "model_type": "glm",
  "vocab_size": 2710,
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 512,
  "attention_bias": true,
  "tie_word_embeddings": false
}
END
cat >chatglm.json <<'END'
{
  "model_type": "chatglm",
  "padded_vocab_size": 2710,
  "hidden_size": 16,
  "num_layers": 1,
  "num_attention_heads": 4,
  "multi_query_attention": true,
  "multi_query_group_num": 2,
  "kv_channels": 4,
  "ffn_hidden_size": 24,
  "seq_length": 512,
  "add_qkv_bias": true
}
END
for i in 1 2 3 4 5 6 7 8; do
    echo "{\"messages\": [{\"role\": \"user\", \"content\": \"第$i question?\"}," \
         "{\"role\": \"assistant\", \"content\": \"answer $i 好\"}]}"
done >data.jsonl
for i in 3 5 7 9; do echo "{\"input_ids\": [1, $i, 6, 8, 10], \"labels\": [-100, -100, 6, 8, 10]}"; done >ready.jsonl
text='GLM-4：你好, world! 123456 ½ 🙂  two  blanks
	tab, line break; <|user|> is plain text'

works 'parameters' init glm.json m --layout glm4-chat
works 'parameters' init glm.json f --layout glm4-chat --dtype f32
works 'parameters' init glm.json shards --layout glm4-chat --max_shard_size 0.00001
works 'parameters' init chatglm.json remote
check 'init writes config.json and weights' test -f m/config.json -a -f m/model.safetensors
check 'init writes an index beside shards' test -f shards/model.safetensors.index.json
weights=m/model.safetensors

bin=$beside/tokenizer.bin
tiny=$tests/tiny
float=''; case $(basename "$program") in *64) ;; *) float=$program ;; esac
for p in $PARTS; do . $tests/$p; done
echo "$passed passed, $failed failed"
