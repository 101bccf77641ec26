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
