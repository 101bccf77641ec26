"""Pipelines of films whose network predicts a velocity."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register
from tests.tiny.flow import euler

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)
CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "num_frames": 5}


WAN_SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


@tiny("WanPipeline", latents=(4, 2, 4, 4), call=CALL | {"max_sequence_length": 16})
def wan() -> dict:
    from diffusers import WanTransformer3DModel

    return {
        "transformer": WanTransformer3DModel(**WAN_SIZES),
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


@tiny("WanPipeline", "WanPipeline, UniPC", latents=(4, 2, 4, 4), call=TINY["WanPipeline"].call)
def wan_unipc() -> dict:
    """The scheduler that Wan 2.1 is released with: whole numbers for times, two steps of memory."""
    return wan() | {"scheduler": unipc(3.0)}


def unipc(shift: float):
    from diffusers import UniPCMultistepScheduler

    kinds = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return UniPCMultistepScheduler(flow_shift=shift, **kinds)


@tiny("SkyReelsV2Pipeline", latents=(4, 2, 4, 4), call=CALL | {"max_sequence_length": 16})
def skyreels_v2() -> dict:
    from diffusers import SkyReelsV2Transformer3DModel

    return {
        "transformer": SkyReelsV2Transformer3DModel(**WAN_SIZES),
        "vae": vaes.wan(),
        "scheduler": unipc(8.0),
        "text_encoder": encoders.umt5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny(
    "MochiPipeline",
    "MochiPipeline, sigmas not inverted",
    latents=(12, 2, 4, 4),
    call=TINY["MochiPipeline"].call,
)
def mochi_plain() -> dict:
    return mochi(invert_sigmas=False)


@tiny(
    "HunyuanVideo15Pipeline",
    latents=(4, 3, 8, 8),
    call=CALL,
)
def hunyuan_video15() -> dict:
    from diffusers import HunyuanVideo15Transformer3DModel
    from diffusers.guiders import ClassifierFreeGuidance

    return {
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=16,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        "vae": vaes.hunyuan_video15(),
        "scheduler": euler(shift=7.0),
        "text_encoder": encoders.qwen25_text(),
        "tokenizer": tokenizers.qwen(2048),
        "text_encoder_2": encoders.t5(),
        "tokenizer_2": tokenizers.byt5(),
        "guider": ClassifierFreeGuidance(guidance_scale=1.0),
    }


@tiny(
    "Kandinsky5T2VPipeline",
    latents=(2, 4, 4, 4),
    call=CALL | {"max_sequence_length": 256},
)
def kandinsky5() -> dict:
    from diffusers import Kandinsky5Transformer3DModel

    return {
        "transformer": Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            out_visual_dim=4,
            patch_size=(1, 2, 2),
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(2, 2, 4),
            visual_cond=False,
            attention_type="regular",
        ),
        "vae": vaes.hunyuan_video(),
        "scheduler": euler(shift=5.0),
        "text_encoder": encoders.qwen25_vl(),
        "tokenizer": tokenizers.qwen(1024),
        "text_encoder_2": encoders.clip(length=77),
        "tokenizer_2": tokenizers.clip(77),
    }
