"""Autoencoders of a few thousand weights; each takes the number of latent channels."""


def kl(channels: int = 4, levels: int = 2, **kwargs):
    """AutoencoderKL with a factor of 2^(levels - 1) between picture and latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4, 8, 8, 8)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
        sample_size=16,
        **kwargs,
    )


def kl_shifted(channels: int = 4, levels: int = 2, **kwargs):
    """AutoencoderKL as flow models have it: a shift, no quantisation layers."""
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06}
    return kl(channels, levels, **plain, **kwargs)


def dc(channels: int = 4):
    """AutoencoderDC (Sana's) with a factor of 4."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def wan(channels: int = 4):
    """AutoencoderKLWan: factors of 8 in space and 4 in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def ltx(channels: int = 4):
    """AutoencoderKLLTXVideo: factors of 8 in space and in time."""
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=channels,
        block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def qwen(channels: int = 4):
    """AutoencoderKLQwenImage with a factor of 4."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def hunyuan_video(channels: int = 4, **kwargs):
    """AutoencoderKLHunyuanVideo: factors of 8 in space and 4 in time."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        **kwargs,
    )


def mochi():
    """AutoencoderKLMochi: factors of 8 in space and 6 in time, 12 channels, groups of 32."""
    from diffusers import AutoencoderKLMochi

    return AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )


def cogvideox(channels: int = 4):
    """AutoencoderKLCogVideoX: factors of 8 in space and 4 in time."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        latent_channels=channels,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def hunyuan_image(channels: int = 4):
    """AutoencoderKLHunyuanImage with a factor of 2."""
    from diffusers import AutoencoderKLHunyuanImage

    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )


def hunyuan_video15(channels: int = 4):
    """AutoencoderKLHunyuanVideo15: factors of 4 in space and 2 in time."""
    from diffusers import AutoencoderKLHunyuanVideo15

    return AutoencoderKLHunyuanVideo15(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )


def allegro(channels: int = 4):
    """AutoencoderKLAllegro: factors of 8 in space and 4 in time; it decodes in tiles only."""
    from diffusers import AutoencoderKLAllegro

    vae = AutoencoderKLAllegro(
        in_channels=3,
        out_channels=3,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    vae.enable_tiling()
    return vae


def movq(channels: int = 4):
    """VQModel, as Kandinsky has it, with a factor of 2."""
    from diffusers import VQModel

    return VQModel(
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def flux2(channels: int = 4):
    """AutoencoderKLFlux2 with a factor of 2, which folds 2 x 2 latents into channels."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        latent_channels=channels,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=16,
    )
