"""Pipelines whose network predicts noise, or v: pictures and films."""

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


@tiny("StableDiffusionPipeline", "StableDiffusionPipeline, v", latents=(4, 8, 8), call=CALL)
def stable_diffusion_v() -> dict:
    """The network answers v, as Stable Diffusion 2's does."""
    return stable_diffusion() | {"scheduler": ddim(steps_offset=1, prediction_type="v_prediction")}


@tiny(
    "HunyuanDiTPipeline",
    latents=(4, 8, 8),
    call=CALL | {"use_resolution_binning": False},
)
def hunyuan_dit() -> dict:
    """Its own DDPMScheduler adds noise: this one has DDIM's."""
    from diffusers import HunyuanDiT2DModel

    return {
        "transformer": HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            hidden_size=16,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=77,
            text_len_t5=256,
        ),
        "vae": vaes.kl(),
        "scheduler": ddim(prediction_type="v_prediction", steps_offset=1),
        "text_encoder": encoders.bert(),
        "tokenizer": tokenizers.bert(77),
        "text_encoder_2": encoders.t5(),
        "tokenizer_2": tokenizers.t5(256),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@tiny("CogView3PlusPipeline", latents=(4, 8, 8), call=CALL | {"max_sequence_length": 16})
def cogview3() -> dict:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel

    return {
        "transformer": CogView3PlusTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        "vae": vaes.kl(),
        "scheduler": CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=4.0,
            timestep_spacing="trailing",
        ),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


FILM = {"num_inference_steps": 3, "height": 32, "width": 32, "num_frames": 5}


@tiny("CogVideoXPipeline", latents=(2, 4, 4, 4), call=FILM | {"max_sequence_length": 16})
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


@tiny(
    "LattePipeline",
    latents=(4, 2, 8, 8),
    call=CALL | {"video_length": 2, "clean_caption": False},
)
def latte() -> dict:
    from diffusers import LatteTransformer3DModel

    return {
        "transformer": LatteTransformer3DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=16,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            num_embeds_ada_norm=1000,
            activation_fn="gelu-approximate",
            video_length=2,
        ),
        "vae": vaes.kl(),
        "scheduler": ddim(),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny(
    "AllegroPipeline",
    latents=(4, 2, 4, 4),
    call=FILM | {"num_frames": 8, "clean_caption": False, "max_sequence_length": 16},
)
def allegro() -> dict:
    from diffusers import AllegroTransformer3DModel

    return {
        "transformer": AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=4,
            sample_height=4,
            sample_frames=2,
            caption_channels=16,
        ),
        "vae": vaes.allegro(),
        "scheduler": ddim(),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny("AnimateDiffPipeline", latents=(4, 2, 8, 8), call=CALL | {"num_frames": 2})
def animatediff() -> dict:
    from diffusers import MotionAdapter

    sizes = {
        "block_out_channels": (4, 8),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 2,
    }
    return {
        "unet": unet(),
        "motion_adapter": MotionAdapter(**sizes),
        "scheduler": ddim(),
        "vae": vaes.kl(),
        "text_encoder": encoders.clip(),
        "tokenizer": tokenizers.clip(),
    }
