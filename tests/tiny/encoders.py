"""Text encoders of a few thousand weights, in the classes that released checkpoints name."""

VOCAB = 2048  # more than any tokenizer here has


def clip(width: int = 16, projection: int = 0, layers: int = 2, length: int = 32):
    """CLIP's text model, with a projection where `projection` is its size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=length,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_sizes(width: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 1,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def t5(width: int = 16):
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**t5_sizes(width)))


def umt5(width: int = 16):
    """UMT5's encoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**t5_sizes(width)))


def decoder_sizes(width: int, layers: int = 2) -> dict:
    """Sizes that the configs of causal language models share."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": width // 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def gemma2(width: int = 16):
    """Gemma 2's decoder without a head."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**decoder_sizes(width)))
