"""Tokenizers made on the spot: the classes that released checkpoints name, over a few hundred pieces.

Words of TEXT are one token each, as most words are in a real vocabulary; other words fall into bytes or
letters. So templates have about their real lengths, and a prompt is never cut away by a pipeline
that drops the template's tokens by number.
"""

import functools
import json
import re
import string

TEXT = """
a red fox in the snow, two blue birds on a green tree, an old white cat asleep near the fire, dog boat
one three four five six seven eight nine zero digit thin thick strokes written large small left right
A painting of a squirrel eating a burger, low quality, bad, ugly, blurry, photo, video
system user assistant Describe the image by detailing the color, shape, size, texture, quantity, text,
spatial relationships of the objects and background: Describe the video by detailing the following
aspects: 1. The main content and theme of the video. 3. Actions, events, behaviors temporal
relationships, physical movement changes of the objects. 4. background environment, light, style and
atmosphere. 5. camera angles, movements, and transitions used in the video: You are an assistant designed
to generate superior images with the superior degree of image-text alignment based on textual prompts or
user prompts. Prompt Start scene elements
"""
WORDS = sorted(set(re.findall(r"\w+", TEXT)))
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
CHATML += ("<|video_pad|>", "<|vision_pad|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@functools.cache
def merges(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn the merges that make each word of TEXT one token: (vocabulary, merges)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    options: dict = {"vocab_size": 10_000, "show_progress": False}
    tokenizer = Tokenizer(models.BPE())
    words = WORDS
    if kind == "clip":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        options |= {"end_of_word_suffix": "</w>", "initial_alphabet": byte_level}
        words = sorted({word.lower() for word in WORDS})
    elif kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options |= {"initial_alphabet": byte_level}
    else:  # sentencepiece's way: a word begins with its space
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        options |= {"initial_alphabet": list(string.printable[:95])}
    lines = [*words, *(f" {word}" for word in words)]  # at the begin of a text, and within one
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(**options))
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    if kind == "clip":
        for letter in byte_level:
            vocab.setdefault(f"{letter}</w>", len(vocab))
    if kind == "spaces":
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = len(vocab)
    return vocab, [tuple(pair) for pair in model["merges"]]


def with_special(kind: str, *special: str) -> dict:
    """Return `vocab` and `merges` of a kind, the special tokens first."""
    vocab, pairs = merges(kind)
    ordered = [*special, *sorted(vocab, key=vocab.__getitem__)]
    return {"vocab": {token: i for i, token in enumerate(ordered)}, "merges": list(pairs)}


def clip(length: int = 32):
    """CLIP's: lower case, begin and end, padded with the end to `length`."""
    from transformers import CLIPTokenizer

    model = with_special("clip", "<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(**model, model_max_length=length)


def t5(length: int = 512):
    """T5's: a unigram model without a begin, with an end; pads on the right."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in string.printable[:94]]
    extra = [f"<extra_id_{i}>" for i in range(4)]
    pieces += [(token, 0.0) for token in extra]
    return T5Tokenizer(vocab=pieces, extra_ids=4, model_max_length=length)


def gemma(length: int = 512):
    """Gemma's: a begin, no end; pads on the left."""
    from transformers import GemmaTokenizer

    model = with_special("spaces", "<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return GemmaTokenizer(**model, add_bos_token=True, model_max_length=length)


def qwen(length: int = 512):
    """Qwen's: bytes, neither begin nor end, chat markers and a chat template."""
    from transformers import Qwen2Tokenizer

    model = with_special("bytes", "<|endoftext|>", *CHATML)
    return Qwen2Tokenizer(
        **model,
        eos_token="<|im_end|>",
        additional_special_tokens=list(CHATML),
        chat_template=CHAT,
        model_max_length=length,
    )


def llama3(length: int = 512):
    """Llama 3's: bytes, a begin, no end, header markers; in transformers' general class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin = "<|begin_of_text|>"
    model = with_special("bytes", begin, "<|end_of_text|>", *LLAMA3)
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        additional_special_tokens=list(LLAMA3),
        model_max_length=length,
    )


def glm(length: int = 512):
    """GLM's: bytes, two markers in front, pads on the left; in transformers' general class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    end, mask, begin = "<|endoftext|>", "[gMASK]", "<sop>"
    backend = Tokenizer(models.BPE(**with_special("bytes", end, mask, begin)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{mask} {begin} $A", special_tokens=[(mask, 1), (begin, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=[mask, begin],
        padding_side="left",
        model_max_length=length,
    )


def bert(length: int = 64):
    """BERT's: words and letters."""
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += [*{word.lower(): None for word in WORDS}, *string.printable[:94]]
    tokens += [f"##{letter}" for letter in string.printable[:94]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocab, model_max_length=length)


def byt5():
    """ByT5's: the bytes themselves, nothing to train."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()
