"""Pipelines whose network predicts noise."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CALL = {"num_inference_steps": 3, "height": 16, "width": 16}  # latents of 8 x 8


def unet(width: int = 16, **kwargs):
    from diffusers import UNet2DConditionModel

    sizes = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return UNet2DConditionModel(**sizes | kwargs)


def ddim(**kwargs):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**BETAS | {"clip_sample": False, "set_alpha_to_one": False} | kwargs)


@tiny("StableDiffusionPipeline", latents=(4, 8, 8), call=CALL)
def stable_diffusion() -> dict:
    return {
        "unet": unet(),
        "scheduler": ddim(steps_offset=1),
        "vae": vaes.kl(),
        "text_encoder": encoders.clip(),
        "tokenizer": tokenizers.clip(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@tiny("StableDiffusionXLPipeline", latents=(4, 8, 8), call=CALL)
def stable_diffusion_xl() -> dict:
    from diffusers import EulerDiscreteScheduler

    network = unet(
        32,  # both encoders, side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        use_linear_projection=True,
    )
    return {
        "unet": network,
        "scheduler": EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        "vae": vaes.kl(),
        "text_encoder": encoders.clip(),
        "tokenizer": tokenizers.clip(),
        "text_encoder_2": encoders.clip(projection=16),
        "tokenizer_2": tokenizers.clip(),
    }


def pixart() -> dict:
    """Learned variances: the network answers twice the channels."""
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    return {
        "transformer": PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=16,
            cross_attention_dim=16,
            in_channels=4,
            out_channels=8,
        ),
        "vae": vaes.kl(),
        "scheduler": DPMSolverMultistepScheduler(**BETAS),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


PIXART = CALL | {"use_resolution_binning": False, "clean_caption": False}
PIXART |= {"max_sequence_length": 16}
tiny("PixArtAlphaPipeline", latents=(4, 8, 8), call=PIXART)(pixart)
tiny("PixArtSigmaPipeline", latents=(4, 8, 8), call=PIXART)(pixart)
