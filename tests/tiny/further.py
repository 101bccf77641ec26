"""Further pipelines of pictures whose network predicts a velocity."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register
from tests.tiny.flow import CALL, DYNAMIC, QUARTER, euler

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)


@tiny("BriaPipeline", latents=(16, 16), call=CALL | {"max_sequence_length": 16})
def bria() -> dict:
    from diffusers import BriaTransformer2DModel

    return {
        "transformer": BriaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=None,
            axes_dims_rope=[0, 4, 4],
        ),
        "vae": vaes.kl(),
        "scheduler": euler(shift=3.0),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
        "image_encoder": None,
        "feature_extractor": None,
    }


@tiny(
    "PRXPipeline",
    latents=(4, 8, 8),
    call=CALL | {"use_resolution_binning": False, "guidance_scale": 1.0},
    note="diffusers reads the whole T5GemmaConfig from the folder, and saves the encoder's part of it",
)
def prx() -> dict:
    """With guidance the pipeline takes one prompt a call: it repeats the time twice, not 2 B times."""
    from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

    return {
        "transformer": PRXTransformer2DModel(
            patch_size=2,
            in_channels=4,
            context_in_dim=16,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            axes_dim=[4, 4],
        ),
        "vae": vaes.kl_shifted(),
        "scheduler": euler(shift=3.0),
        "text_encoder": encoders.t5_gemma(),
        "tokenizer": tokenizers.gemma(32),
    }


@tiny("OvisImagePipeline", latents=(16, 16), call=CALL | {"max_sequence_length": 32})
def ovis_image() -> dict:
    from diffusers import OvisImageTransformer2DModel

    return {
        "transformer": OvisImageTransformer2DModel(
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
        "vae": vaes.kl_shifted(),
        "scheduler": euler(**DYNAMIC),
        "text_encoder": encoders.qwen3(),
        "tokenizer": tokenizers.qwen(),
    }


@tiny("HunyuanImagePipeline", latents=(4, 8, 8), call=QUARTER | {"height": 16, "width": 16})
def hunyuan_image() -> dict:
    from diffusers import HunyuanImageTransformer2DModel
    from diffusers.guiders import ClassifierFreeGuidance

    return {
        "transformer": HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            guidance_embeds=False,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(4, 4),
        ),
        "vae": vaes.hunyuan_image(),
        "scheduler": euler(shift=5.0),
        "text_encoder": encoders.qwen25_vl(layers=3),
        "tokenizer": tokenizers.qwen(2048),
        "text_encoder_2": encoders.t5(),
        "tokenizer_2": tokenizers.byt5(),
        "guider": ClassifierFreeGuidance(guidance_scale=3.5),
        "ocr_guider": ClassifierFreeGuidance(guidance_scale=3.5),
    }


@tiny("Krea2Pipeline", latents=(16, 16), call=QUARTER | {"max_sequence_length": 48})
def krea2() -> dict:
    from diffusers import Krea2Transformer2DModel

    return {
        "transformer": Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        "vae": vaes.qwen(),
        "scheduler": euler(base_shift=0.5, max_shift=1.15, **DYNAMIC),
        "text_encoder": encoders.qwen3_vl(),
        "tokenizer": tokenizers.qwen(),
        "text_encoder_select_layers": (0, 1, 2),
    }


@tiny("NucleusMoEImagePipeline", latents=(16, 16), call=QUARTER | {"max_sequence_length": 128})
def nucleus_moe() -> dict:
    from diffusers import NucleusMoEImageTransformer2DModel

    return {
        "transformer": NucleusMoEImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
            moe_enabled=False,
            capacity_factors=[8.0],
        ),
        "vae": vaes.qwen(),
        "scheduler": euler(**DYNAMIC),
        "text_encoder": encoders.qwen3_vl(layers=8, head=True),
        "processor": tokenizers.qwen(),
    }


@tiny(
    "StableDiffusion3Pipeline",
    "StableDiffusion3Pipeline, no T5",
    latents=(4, 8, 8),
    call=CALL | {"max_sequence_length": 16},
    note="a part that is None must be passed again: text_encoder_3=None, tokenizer_3=None",
)
def stable_diffusion_3_without_t5() -> dict:
    from tests.tiny.flow import stable_diffusion_3

    return stable_diffusion_3() | {"text_encoder_3": None, "tokenizer_3": None}
