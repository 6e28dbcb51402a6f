"""Golden scores of answers: tests/golden/metrics.jsonl, from rouge-chinese and NLTK, on text cut into characters.

    python3 -m venv build/metrics && build/metrics/bin/pip install -r tests/requirements.txt
    build/metrics/bin/python tests/reference_metrics.py

1,000 pairs of an answer and a reference, none empty: templates of our own in Chinese and English, damaged at random.
Each line: answer, reference, rouge-1, rouge-2, rouge-l (F1), bleu-4, from 0 to 1. ROUGE gets the characters that are no
blanks, as rouge_chinese sees them; BLEU all characters.
"""
import json, os, random
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

HERE = os.path.dirname(os.path.abspath(__file__))
CHINESE = ["新款裤子来了：蓝色、简约风。快来看看！", "差评", "我叫小田。", "里明城。", "今天是星期三，明天呢？是星期四。",
           "这件衣服很好，很好，很好，非常好……", "答：一共有 12 个苹果，3 个梨。", "“好的”，他说。", "𠮷野家\n在街角。"]
ENGLISH = ["Niniville.", "New scarf in the shop: brown, dotted pattern, for winter. Come and see!", "Good",
           "the cat sat on the mat, the cat sat on the mat", "12 + 30 = 42", "naïve café\tmenu"]


def damage(rng, text):
    """Drops, doubles, swaps or replaces a few characters, cuts, repeats or extends."""
    s = list(text)
    for _ in range(rng.choice([0, 0, 1, 2, 5, 12])):
        i = rng.randrange(len(s)) if s else 0
        what = rng.randrange(5)
        if what == 0 and len(s) > 1: del s[i]
        elif what == 1: s.insert(i, s[i])
        elif what == 2 and i + 1 < len(s): s[i], s[i + 1] = s[i + 1], s[i]
        elif what == 3: s[i] = rng.choice("的是a e了。，1")
        elif what == 4: s = s[:i + 1]
    text = "".join(s)
    return text * rng.choice([1, 1, 1, 1, 1, 1, 2, 5])


def pairs(n):
    rng = random.Random(6)
    found = []
    while len(found) < n:
        pool = rng.choice([CHINESE, ENGLISH, CHINESE + ENGLISH])
        reference = "".join(rng.choice(pool) for _ in range(rng.choice([1, 1, 2])))
        other = "".join(rng.choice(pool) for _ in range(rng.choice([1, 1, 3])))
        answer = damage(rng, reference if rng.random() < 0.8 else other)
        if answer.strip() and reference.strip():
            found.append((answer.strip(), reference.strip()))
    return found


def score(answer, reference):
    def dense(text):
        return " ".join(c for c in text if not c.isspace())
    rouge = Rouge().get_scores(dense(answer), dense(reference))[0]
    bleu = sentence_bleu([list(reference)], list(answer), smoothing_function=SmoothingFunction().method3)
    return [rouge["rouge-1"]["f"], rouge["rouge-2"]["f"], rouge["rouge-l"]["f"], bleu]


def main():
    with open(os.path.join(HERE, "golden", "metrics.jsonl"), "w", encoding="utf-8") as f:
        for answer, reference in pairs(1000):
            f.write(json.dumps({"answer": answer, "reference": reference,
                                "scores": [round(x, 9) for x in score(answer, reference)]}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
