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


def gemma(width: int = 16):
    """Gemma's decoder with its head, as Lumina has it."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**decoder_sizes(width)))


def qwen3(width: int = 16, head: bool = False):
    """Qwen 3's decoder, with a head or without."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    return (Qwen3ForCausalLM if head else Qwen3Model)(Qwen3Config(**decoder_sizes(width)))


def smol(width: int = 16):
    """SmolLM 3 with its head; Bria FIBO writes token 128000 for an empty prompt."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    return SmolLM3ForCausalLM(SmolLM3Config(**decoder_sizes(width) | {"vocab_size": 128_256}))


def llama(width: int = 16, layers: int = 3, head: bool = False):
    """Llama's decoder; three layers, as HunyuanVideo leaves out the last two."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(**decoder_sizes(width, layers))
    return (LlamaForCausalLM if head else LlamaModel)(config)


def glm(width: int = 16):
    """GLM's decoder without a head."""
    from transformers import GlmConfig, GlmModel

    return GlmModel(GlmConfig(**decoder_sizes(width)))


def vision_sizes(width: int) -> dict:
    return {
        "depth": 1,
        "hidden_size": width,
        "intermediate_size": width,
        "num_heads": 2,
        "out_hidden_size": width,
    }


def multimodal_sizes(width: int, layers: int) -> dict:
    """decoder_sizes with positions of three axes: time, height and width of half a head."""
    sections = [width // 16, width // 16, width // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return decoder_sizes(width, layers) | {"rope_parameters": rope}


def qwen25_vl(width: int = 16, layers: int = 2):
    """Qwen 2.5 VL with its head and its eyes, which a text-to-image pipeline never uses."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = multimodal_sizes(width, layers)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision_sizes(width))
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen25_text(width: int = 16, layers: int = 3):
    """The decoder of Qwen 2.5 VL alone; three layers, as HunyuanVideo 1.5 leaves out the last two."""
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**multimodal_sizes(width, layers)))


def qwen3_vl(width: int = 16, layers: int = 2, head: bool = False):
    """Qwen 3 VL, with a head or without."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    text = multimodal_sizes(width, layers)
    vision = vision_sizes(width) | {"deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    return (Qwen3VLForConditionalGeneration if head else Qwen3VLModel)(config)


def bert(width: int = 16):
    """BERT, as HunyuanDiT has it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return BertModel(config)


def t5_gemma(width: int = 16):
    """The encoder of T5Gemma, as PRX has it."""
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig, T5GemmaModuleConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    sizes = decoder_sizes(width)
    encoder = T5GemmaModuleConfig(**sizes, dropout_rate=0.0)
    return T5GemmaEncoder(T5GemmaConfig(encoder=encoder, is_encoder_decoder=False, **sizes).encoder)
