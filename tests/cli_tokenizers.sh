# tokenizer.json from the command line; sourced by test_cli.sh.

golden=$tests/golden/tokenizer_json
printf %s "$text" >text
works '' tokenize "$golden" <text
cp stdout json_ids
works '' tokenize "$golden/tokenizer.json" --out json.bin
works '' tokenize json.bin <text
check 'a tokenizer.bin made of a tokenizer.json gives the same ids' cmp json_ids stdout
works '' tokenize json.bin --decode <json_ids
check 'and the text back' cmp text stdout
head -c 4000 "$golden/tokenizer.json" >cut.json
refuse 'cut.json:1:|no JSON' tokenize cut.json
printf 'version https://git-lfs.github.com/spec/v1\n' >pointer.json
refuse 'pointer.json: is a Git LFS pointer' tokenize pointer.json
