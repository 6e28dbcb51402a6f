"""The speed of glmtune's encoder beside tiktoken's and SentencePiece's, in one run, on one core.

    GLM_REAL=DIR python tests/bench_tokenizers.py [--mb 5] [FILE ...]       FILE: Chinese text, or folders of it

English, code and Chinese as tests/compare_tokenizers.py finds them on this machine, each encoded as one text; the
vocabularies are GLM-4's (tiktoken) and ChatGLM3's (SentencePiece). The best of three, in MB (1e6 bytes) a second of processor time; loading
the vocabulary is not counted. SentencePiece is given the text line by line where that is faster for it. The last lines:
one letter, 1 MB and 8 MB of it.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

from compare_tokenizers import PATTERN, TOP, read, tiktoken_ranks, walk


def best_of_three(work):
    seconds = []
    for _ in range(3):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main():
    import sentencepiece
    import tiktoken
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=float, default=5)
    parser.add_argument("files", nargs="*")
    arguments = parser.parse_args()
    size, real = int(arguments.mb * 1e6), os.environ["GLM_REAL"]
    glm4 = os.path.join(real, "tokenizers/glm-4-9b-chat/tokenizer.model")
    glm3 = os.path.join(real, "tokenizers/chatglm3-6b/tokenizer.model")
    program = os.path.join(TOP, "build", "bench_tokenizers")
    os.makedirs(os.path.dirname(program), exist_ok=True)
    subprocess.run(["cc", "-std=gnu11", "-O3", "-march=native", "-Wno-unused-function",
                    os.path.join(TOP, "tests", "bench_tokenizers.c"), "-o", program, "-lm"], check=True)
    chinese = walk(["/usr/share/man/zh_CN", *(f for f in arguments.files if os.path.isdir(f))], (".gz", ".txt"), 100 * size)
    chinese += "".join(read(f) for f in arguments.files if os.path.isfile(f))
    # running text: the lines that are mostly Chinese
    chinese = "\n".join(l for l in chinese.split("\n") if 2 * sum("\u4e00" <= c <= "\u9fff" for c in l) > len(l))
    texts = {"English": walk(["/usr/share/doc"], (".txt", ".gz", ".md", "README", "copyright"), size),
             "code": walk(["/usr/lib/python3", "/usr/lib/python3.11", sys.prefix], (".py",), size),
             "Chinese": chinese}
    encoding = tiktoken.Encoding("glm4", pat_str=PATTERN, mergeable_ranks=tiktoken_ranks(glm4), special_tokens={})
    sp = sentencepiece.SentencePieceProcessor(glm3)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            data = text.encode()[:size]
            text = data.decode("utf-8", "ignore")
            path = os.path.join(folder, "text")
            open(path, "wb").write(text.encode())
            if not text:
                print(f"{name}: no text on this machine; name some")
                continue
            ours = [float(subprocess.run([program, v, path], stdout=subprocess.PIPE, check=True).stdout.split()[2])
                    for v in (glm4, glm3)]
            lines = text.splitlines(keepends=True)
            theirs = (best_of_three(lambda: encoding.encode_ordinary(text)),
                      best_of_three(lambda: [sp.encode(line) for line in lines]))
            mb = len(text.encode()) / 1e6
            for vocabulary, other, a, b in zip(("GLM-4", "ChatGLM3"), ("tiktoken", "sentencepiece"), ours, theirs):
                print(f"{name:8} {mb:5.1f} MB  {vocabulary:9} glmtune {mb / a:7.2f} MB/s   {other:13} {mb / b:7.2f} MB/s")
        for megabytes in (1, 8):
            open(os.path.join(folder, str(megabytes)), "w").write("a" * (megabytes * 1_000_000))
        for vocabulary, file in (("GLM-4", glm4), ("ChatGLM3", glm3)):
            out = subprocess.run([program, file, os.path.join(folder, "1"), os.path.join(folder, "8")],
                                 stdout=subprocess.PIPE, check=True).stdout.split()
            one, eight = float(out[2]), float(out[5])
            print(f"one letter, {vocabulary}: 1 MB {one:.3f} s, 8 MB {eight:.3f} s, {eight / one:.1f} times as long")


if __name__ == "__main__":
    main()
