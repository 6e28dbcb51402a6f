# Files that are not what their name says, wherever one is read; test_cli.sh reads this file.

disguises() {                   # FILE WORDS...: each disguise in the place of FILE, and the command that reads it
    local file=$1 kept=kept_file
    shift
    cp "$file" $kept
    printf 'version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 1784064512\n' 0 >"$file"
    refuse "$file: is a Git LFS pointer|git lfs pull" "$@"
    printf '\037\213\010\000\000\000\000\000\000\003abcdefgh' >"$file"
    refuse "$file: is compressed|gunzip" "$@"
    printf 'PK\003\004abcdefghijkl' >"$file"
    refuse "$file: is a zip archive" "$@"
    printf '\377\376{\000}\000abcdef' >"$file"
    refuse "$file: is UTF-16 text|iconv" "$@"
    printf '\376\377\000{\000}abcdef' >"$file"
    refuse "$file: is UTF-16 text|iconv" "$@"
    printf '<!DOCTYPE html>\n<html><body>404</body></html>\n' >"$file"
    refuse "$file: is a web page|download" "$@"
    : >"$file"
    refuse "$file" "$@"
    mv $kept "$file"
}

cp -R m hidden
cp "$bin" hidden/tokenizer.bin
disguises data.jsonl train data.jsonl m --output_dir out
disguises hidden/config.json chat hidden --prompt hi
disguises hidden/model.safetensors chat hidden --prompt hi
disguises hidden/tokenizer.bin chat hidden --prompt hi
cp "$tests/golden/tokenizer_json/tokenizer.json" hidden/tokenizer.json
rm hidden/tokenizer.bin
disguises hidden/tokenizer.json tokenize hidden
printf 'training_args:\n  max_steps: 1\n' >hidden.yaml
disguises hidden.yaml train data.jsonl m hidden.yaml --output_dir out
rm -rf hidden hidden.yaml

# The length of a header may begin as a compressed file does: 0x8b1f.
header='{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
tensor_file lucky.safetensors "$header$(printf '%*s' $((0x8b1f - ${#header})) '')" 4
refuse 'not F64' gradcheck --truth lucky.safetensors
rm -f lucky.safetensors
