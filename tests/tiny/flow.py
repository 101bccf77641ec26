"""Pipelines of pictures whose network predicts a velocity."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)
CALL = {"num_inference_steps": 3, "height": 16, "width": 16}  # latents of 8 x 8


def euler(**kwargs):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**kwargs)


@tiny("StableDiffusion3Pipeline", latents=(4, 8, 8), call=CALL | {"max_sequence_length": 16})
def stable_diffusion_3() -> dict:
    from diffusers import SD3Transformer2DModel

    return {
        "transformer": SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,  # both CLIPs, side by side, padded to T5's width
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        "scheduler": euler(shift=3.0),
        "vae": vaes.kl_shifted(),
        "text_encoder": encoders.clip(projection=16),
        "tokenizer": tokenizers.clip(),
        "text_encoder_2": encoders.clip(projection=16),
        "tokenizer_2": tokenizers.clip(),
        "text_encoder_3": encoders.t5(32),
        "tokenizer_3": tokenizers.t5(),
    }


DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}


@tiny("FluxPipeline", latents=(16, 16), call=CALL | {"max_sequence_length": 16})
def flux() -> dict:
    from diffusers import FluxTransformer2DModel

    return {
        "transformer": FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ),
        "scheduler": euler(shift=3.0, **DYNAMIC),
        "vae": vaes.kl_shifted(),
        "text_encoder": encoders.clip(),
        "tokenizer": tokenizers.clip(),
        "text_encoder_2": encoders.t5(),
        "tokenizer_2": tokenizers.t5(),
    }


@tiny(
    "SanaPipeline",
    latents=(4, 8, 8),
    call={"num_inference_steps": 3, "height": 32, "width": 32}
    | {"use_resolution_binning": False, "max_sequence_length": 16},
)
def sana() -> dict:
    from diffusers import SanaTransformer2DModel

    return {
        "transformer": SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        "vae": vaes.dc(),
        "scheduler": euler(shift=3.0),
        "text_encoder": encoders.gemma2(),
        "tokenizer": tokenizers.gemma(),
    }
