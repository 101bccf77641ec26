"""Pipelines of pictures whose network predicts a velocity."""

import functools

from tests.tiny import encoders, tokenizers, vaes
from tests.tiny.build import Tiny, register

TINY: dict[str, Tiny] = {}
tiny = functools.partial(register, TINY)
CALL = {"num_inference_steps": 3, "height": 16, "width": 16}  # latents of 8 x 8
QUARTER = CALL | {"height": 32, "width": 32}  # the same through a factor of 4
EIGHTH = CALL | {"height": 64, "width": 64}  # and of 8


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
    call=QUARTER | {"use_resolution_binning": False, "max_sequence_length": 16},
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


@tiny("Lumina2Pipeline", latents=(4, 8, 8), call=EIGHTH | {"max_sequence_length": 64})
def lumina2() -> dict:
    from diffusers import Lumina2Transformer2DModel

    return {
        "transformer": Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 16, 16),
            cap_feat_dim=16,
        ),
        "vae": vaes.kl_shifted(levels=4),
        "scheduler": euler(shift=3.0),
        "text_encoder": encoders.gemma2(),
        "tokenizer": tokenizers.gemma(),
    }


@tiny(
    "LuminaPipeline",
    latents=(4, 8, 8),
    call=EIGHTH | {"clean_caption": False, "max_sequence_length": 16},
)
def lumina() -> dict:
    from diffusers import LuminaNextDiT2DModel

    return {
        "transformer": LuminaNextDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            learn_sigma=True,
            qk_norm=True,
            cross_attention_dim=16,
        ),
        "vae": vaes.kl(levels=4),
        "scheduler": euler(),
        "text_encoder": encoders.gemma(),
        "tokenizer": tokenizers.gemma(),
    }


@tiny("ZImagePipeline", latents=(4, 8, 8), call=CALL | {"max_sequence_length": 64})
def z_image() -> dict:
    from diffusers import ZImageTransformer2DModel

    return {
        "transformer": ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=16,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 2, 2],
            axes_lens=[128, 16, 16],
        ),
        "vae": vaes.kl_shifted(),
        "scheduler": euler(shift=3.0),
        "text_encoder": encoders.qwen3(),
        "tokenizer": tokenizers.qwen(),
    }


@tiny("QwenImagePipeline", latents=(16, 16), call=QUARTER | {"max_sequence_length": 64})
def qwen_image() -> dict:
    from diffusers import QwenImageTransformer2DModel

    return {
        "transformer": QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
        "vae": vaes.qwen(),
        "scheduler": euler(**DYNAMIC, shift_terminal=0.02, time_shift_type="exponential"),
        "text_encoder": encoders.qwen25_vl(),
        "tokenizer": tokenizers.qwen(),
    }


@tiny("ChromaPipeline", latents=(16, 16), call=CALL | {"max_sequence_length": 16})
def chroma() -> dict:
    from diffusers import ChromaTransformer2DModel

    return {
        "transformer": ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            approximator_hidden_dim=16,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
        "scheduler": euler(**DYNAMIC),
        "vae": vaes.kl_shifted(),
        "text_encoder": encoders.t5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny("AuraFlowPipeline", latents=(4, 8, 8), call=CALL | {"max_sequence_length": 16})
def aura_flow() -> dict:
    from diffusers import AuraFlowTransformer2DModel

    return {
        "transformer": AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            pos_embed_max_size=16,
        ),
        "scheduler": euler(shift=1.73),
        "vae": vaes.kl(),
        "text_encoder": encoders.umt5(),
        "tokenizer": tokenizers.t5(),
    }


@tiny("CogView4Pipeline", latents=(4, 8, 8), call=CALL | {"max_sequence_length": 64})
def cogview4() -> dict:
    from diffusers import CogView4Transformer2DModel

    return {
        "transformer": CogView4Transformer2DModel(
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
        "scheduler": euler(base_shift=0.25, max_shift=0.75, time_shift_type="linear", **DYNAMIC),
        "text_encoder": encoders.glm(),
        "tokenizer": tokenizers.glm(),
    }


@tiny("HiDreamImagePipeline", latents=(1, 128, 128), call={"num_inference_steps": 3})
def hidream() -> dict:
    """The pipeline scales each size to an area of 128 x 128 latents, so the patches are large."""
    from diffusers import HiDreamImageTransformer2DModel

    return {
        "transformer": HiDreamImageTransformer2DModel(
            patch_size=32,
            in_channels=1,
            out_channels=1,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=32,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(128, 128),
            llama_layers=(0, 1),
        ),
        "scheduler": euler(shift=3.0),
        "vae": vaes.kl_shifted(1, levels=1, mid_block_add_attention=False),
        "text_encoder": encoders.clip(projection=16, length=128),
        "tokenizer": tokenizers.clip(),
        "text_encoder_2": encoders.clip(projection=16, length=128),
        "tokenizer_2": tokenizers.clip(),
        "text_encoder_3": encoders.t5(),
        "tokenizer_3": tokenizers.t5(),
        "text_encoder_4": encoders.llama(layers=2, head=True),
        "tokenizer_4": tokenizers.llama3(),
    }
