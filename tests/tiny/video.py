"""Pipelines of films, of velocity and of noise."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)
CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "num_frames": 5}


def euler(**kwargs):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**kwargs)


def wan_transformer():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


@tiny("WanPipeline", latents=(4, 2, 4, 4), call=CALL | {"max_sequence_length": 16})
def wan() -> dict:
    return {
        "transformer": wan_transformer(),
        "transformer_2": None,
        "vae": vaes.wan(),
        "scheduler": euler(shift=3.0),
        "text_encoder": encoders.umt5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny(
    "LTXPipeline",
    latents=(2 * 4 * 4, 4),
    call=CALL | {"num_frames": 9, "max_sequence_length": 16},
)
def ltx() -> dict:
    from diffusers import LTXVideoTransformer3DModel

    return {
        "transformer": LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=16,
        ),
        "vae": vaes.ltx(),
        "scheduler": euler(),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


TEMPLATE = {"template": "{}", "crop_start": 0}  # the default's start is counted in Llama's tokens


@tiny(
    "HunyuanVideoPipeline",
    latents=(4, 2, 4, 4),
    call=CALL | {"prompt_template": TEMPLATE, "max_sequence_length": 16},
)
def hunyuan_video() -> dict:
    from diffusers import HunyuanVideoTransformer3DModel

    return {
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(2, 2, 4),
        ),
        "vae": vaes.hunyuan_video(),
        "scheduler": euler(shift=7.0),
        "text_encoder": encoders.llama(),
        "tokenizer": tokenizers.llama3(),
        "text_encoder_2": encoders.clip(length=77),
        "tokenizer_2": tokenizers.clip(),
    }


@tiny(
    "MochiPipeline",
    latents=(12, 2, 4, 4),
    call=CALL | {"num_frames": 7, "max_sequence_length": 16},
)
def mochi(**kwargs) -> dict:
    from diffusers import MochiTransformer3DModel

    return {
        "transformer": MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=16,
        ),
        "vae": vaes.mochi(),
        "scheduler": euler(**{"invert_sigmas": True} | kwargs),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny("CogVideoXPipeline", latents=(2, 4, 4, 4), call=CALL | {"max_sequence_length": 16})
def cogvideox() -> dict:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    return {
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ),
        "vae": vaes.cogvideox(),
        "scheduler": CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }
