"""Tokenizers made of the words of some captions, for tiny pipelines."""

from collections import Counter
from itertools import pairwise
from typing import Any

SPECIAL, END = ("<|startoftext|>", "<|endoftext|>"), "</w>"


def clip(texts: list[str]) -> Any:
    """Make CLIP's tokenizer: a word of the captions is one token, others fall into letters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [f"{letter}{END}" for letter in letters]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = CLIPTokenizer(vocab=vocab, merges=[]).backend_tokenizer
    pieces = [
        [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain)]
        for plain in map(backend.normalizer.normalize_str, texts)
    ]
    merges: Any = merges_of({word for words in pieces for word in words})
    vocab |= {f"{a}{b}": len(vocab) + i for i, (a, b) in enumerate(merges)}
    longest = max(len(words) for words in pieces) + len(SPECIAL)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=longest + longest // 2)


def merges_of(words: set[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of parts again and again, until each word is one part."""
    split = {word: [*word[:-1], f"{word[-1]}{END}"] for word in sorted(words)}
    merges = []
    while counts := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        first = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(first)
        for parts in split.values():
            for i in range(len(parts) - 2, -1, -1):
                if (parts[i], *parts[i + 1 : i + 2]) == first:
                    parts[i : i + 2] = ["".join(first)]
    return merges


def sentence_pieces(texts: list[str], longest: int) -> Any:
    """Make T5's tokenizer: its pieces are words and letters. longest: most tokens of a text."""
    from transformers import T5Tokenizer

    words = sorted({word for text in texts for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -4.0) for word in words]
    pieces += [(letter, -8.0) for letter in sorted({letter for word in words for letter in word})]
    made: Any = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=longest)
    return made
