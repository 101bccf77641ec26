"""Pipelines that are no teachers; `note` is the reason, `call` runs those that run without more."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register
from tests.tiny.diffusion import BETAS, CALL, ddim, stable_diffusion, unet
from tests.tiny.flow import CALL as FLOW_CALL
from tests.tiny.flow import flux, stable_diffusion_3
from tests.tiny.video import TINY as FILMS
from tests.tiny.video import unipc, wan

REFUSED: dict[str, Tiny] = {}
tiny = functools.partial(register, REFUSED)


@tiny(
    "LatentConsistencyModelPipeline",
    latents=(4, 8, 8),
    call=CALL | {"original_inference_steps": 50},
    note="noise",
)
def latent_consistency() -> dict:
    """LCMScheduler adds noise between steps."""
    from diffusers import LCMScheduler

    return stable_diffusion() | {
        "unet": unet(time_cond_proj_dim=8),
        "scheduler": LCMScheduler(**BETAS, clip_sample=False),
    }


@tiny(
    "StableDiffusionPipeline",
    "StableDiffusionPipeline, DDPM",
    latents=(4, 8, 8),
    call=CALL,
    note="noise",
)
def ddpm() -> dict:
    """DDPMScheduler adds noise after each step but the last."""
    from diffusers import DDPMScheduler

    return stable_diffusion() | {"scheduler": DDPMScheduler(**BETAS, clip_sample=False)}


@tiny(
    "StableDiffusionPipeline",
    "StableDiffusionPipeline, ancestral",
    latents=(4, 8, 8),
    call=CALL,
    note="noise",
)
def ancestral() -> dict:
    """EulerAncestralDiscreteScheduler adds noise after each step but the last."""
    from diffusers import EulerAncestralDiscreteScheduler

    return stable_diffusion() | {"scheduler": EulerAncestralDiscreteScheduler(**BETAS)}


@tiny(
    "WanPipeline",
    "WanPipeline, 2.2",
    latents=(4, 2, 4, 4),
    call=FILMS["WanPipeline"].call,
    note="two networks in turn",
)
def wan_22() -> dict:
    """Two networks in turn: one above the boundary, one below."""
    return wan() | {
        "transformer_2": wan()["transformer"],
        "scheduler": unipc(3.0),
        "boundary_ratio": 0.875,
    }


@tiny(
    "PRXPixelPipeline",
    latents=(3, 8, 8),
    call=CALL | {"height": 8, "width": 8, "use_resolution_binning": False, "guidance_scale": 1.0},
    note="the pipeline prepares the network's answer",
)
def prx_pixel() -> dict:
    """The network answers data, and the pipeline itself makes a velocity of it."""
    from diffusers import PRXTransformer2DModel

    from tests.tiny.further import prx

    network = PRXTransformer2DModel(
        patch_size=2,
        in_channels=3,
        context_in_dim=16,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    parts = prx() | {"transformer": network}
    del parts["vae"]
    return parts


@tiny(
    "StableDiffusionImg2ImgPipeline",
    latents=(4, 8, 8),
    call={"num_inference_steps": 3},
    note="wants an image",
)
def image_to_image() -> dict:
    """It wants an image, and takes no latents."""
    return stable_diffusion()


@tiny("StableDiffusion3Img2ImgPipeline", latents=(4, 8, 8), call=FLOW_CALL, note="wants an image")
def image_to_image_3() -> dict:
    """It wants an image, and takes latents."""
    return stable_diffusion_3()


@tiny("FluxFillPipeline", latents=(16, 16), call=FLOW_CALL, note="wants an image and a mask")
def inpaint() -> dict:
    """It wants an image and a mask, and its network sees more channels than it answers."""
    return flux()


@tiny(
    "KandinskyV22Pipeline",
    latents=(4, 8, 8),
    call=CALL | {"height": 64, "width": 64},
    note="wants an image's embedding, takes no prompt",
)
def kandinsky_decoder() -> dict:
    """It wants the image's embedding, and takes no prompt."""
    return {
        "unet": unet(
            in_channels=4,
            out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            addition_embed_type="image",
            encoder_hid_dim=16,
            encoder_hid_dim_type="image_proj",
            resnet_time_scale_shift="scale_shift",
            class_embed_type=None,
        ),
        "scheduler": ddim(steps_offset=1),
        "movq": vaes.movq(),
    }


@tiny("DDPMPipeline", latents=(3, 8, 8), call={"num_inference_steps": 3}, note="takes no prompt")
def pixels() -> dict:
    """It takes neither prompt nor latents: a teacher without text."""
    from diffusers import DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return {"unet": network, "scheduler": DDPMScheduler(**BETAS)}


@tiny(
    "IFPipeline",
    latents=(3, 8, 8),
    call={"num_inference_steps": 3, "height": 8, "width": 8},
    note="takes no latents",
)
def deepfloyd_if() -> dict:
    """Pixels, and no `latents`; the scheduler reads the variances that the network learnt."""
    from diffusers import DDPMScheduler

    network = unet(
        32,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=16,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    return {
        "unet": network,
        "scheduler": DDPMScheduler(**BETAS, variance_type="learned_range"),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(77),
        "watermarker": None,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
