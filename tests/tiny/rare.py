"""Rare pipelines, each odd in its own way: see their docstrings."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register
from tests.tiny.diffusion import CALL as NOISE_CALL
from tests.tiny.diffusion import ddim, unet
from tests.tiny.flow import CALL, DYNAMIC, euler
from tests.tiny.video import CALL as FILM
from tests.tiny.video import WAN_SIZES

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)
KLEIN = {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2)}


@tiny("BriaFiboPipeline", latents=(16, 4), call=CALL | {"height": 64, "width": 64})
def bria_fibo() -> dict:
    """All layers of its text encoder enter; its attention mask hides in joint_attention_kwargs."""
    from diffusers import BriaFiboTransformer2DModel

    return {
        "transformer": BriaFiboTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            text_encoder_dim=16,
            pooled_projection_dim=None,
            axes_dims_rope=[0, 4, 4],
        ),
        "vae": vaes.wan(),
        "scheduler": euler(**DYNAMIC),
        "text_encoder": encoders.smol(),
        "tokenizer": tokenizers.llama3(),
    }


@tiny("Flux2KleinPipeline", latents=(16, 4, 4), call=CALL | KLEIN)
def flux2_klein() -> dict:
    """`latents` are [B, C, h, w], the state is packed into tokens, the samples are unpacked."""
    from diffusers import Flux2Transformer2DModel

    return {
        "transformer": Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_guidance_channels=16,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ),
        "vae": vaes.flux2(),
        "scheduler": euler(**DYNAMIC),
        "text_encoder": encoders.qwen3(head=True),
        "tokenizer": tokenizers.qwen(),
    }


@tiny("LongCatImagePipeline", latents=(16, 16), call=CALL | {"enable_prompt_rewrite": False})
def longcat_image() -> dict:
    """Its text is a fixed 512 tokens; guidance is renormalised."""
    from diffusers import LongCatImageTransformer2DModel

    return {
        "transformer": LongCatImageTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        ),
        "vae": vaes.kl_shifted(),
        "scheduler": euler(**DYNAMIC),
        "text_encoder": encoders.qwen25_vl(),
        "tokenizer": tokenizers.qwen(2048),
        "text_processor": tokenizers.qwen(2048),
    }


@tiny(
    "SanaVideoPipeline",
    latents=(4, 2, 4, 4),
    call={"num_inference_steps": 3, "height": 32, "width": 32, "frames": 5}
    | {"use_resolution_binning": False, "max_sequence_length": 16},
)
def sana_video() -> dict:
    """A flow whose stock scheduler is DPM++ of second order."""
    from diffusers import DPMSolverMultistepScheduler, SanaVideoTransformer3DModel

    kinds = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
    return {
        "transformer": SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=4,
            patch_size=(1, 2, 2),
            rope_max_seq_len=32,
        ),
        "vae": vaes.wan(),
        "scheduler": DPMSolverMultistepScheduler(**kinds),
        "text_encoder": encoders.gemma2(),
        "tokenizer": tokenizers.gemma(),
    }


@tiny("AnyFlowPipeline", latents=(4, 2, 4, 4), call=FILM | {"max_sequence_length": 16})
def anyflow() -> dict:
    """A flow map of two times; the state is [B, F, C, h, w], `latents` and samples [B, C, F, h, w]."""
    from diffusers import AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    return {
        "transformer": AnyFlowTransformer3DModel(**WAN_SIZES, gate_value=0.25, deltatime_type="r"),
        "vae": vaes.wan(),
        "scheduler": FlowMapEulerDiscreteScheduler(shift=5.0),
        "text_encoder": encoders.umt5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny(
    "LDMTextToImagePipeline",
    latents=(4, 8, 8),
    call=NOISE_CALL | {"height": 64, "width": 64},
)
def latent_diffusion() -> dict:
    """Its text encoder is called bert, and it always decodes."""
    return {
        "unet": unet(),
        "scheduler": ddim(steps_offset=1),
        "vqvae": vaes.kl(),
        "bert": encoders.clip(length=77),
        "tokenizer": tokenizers.clip(),
    }


@tiny("StableDiffusionPAGPipeline", latents=(4, 8, 8), call=NOISE_CALL | {"pag_scale": 3.0})
def stable_diffusion_pag() -> dict:
    """Three calls in one batch: without prompt, with it, with a perturbed attention."""
    from tests.tiny.diffusion import stable_diffusion

    return stable_diffusion()


@tiny("Kandinsky3Pipeline", latents=(4, 8, 8), call=NOISE_CALL | {"height": 64, "width": 64})
def kandinsky3() -> dict:
    """Its own DDPMScheduler adds noise: this one has DDIM's."""
    from diffusers import Kandinsky3UNet

    return {
        "unet": Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(8, 16),
            cross_attention_dim=8,
            encoder_hid_dim=16,
        ),
        "scheduler": ddim(steps_offset=1),
        "movq": vaes.movq(),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(128),
    }
