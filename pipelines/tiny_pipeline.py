"""A tiny text-to-image pipeline of a stock class, made on the spot: nothing is downloaded.

Tokenizer and VAE are trained on pictures with captions, in seconds; the text encoder is random and stays
so; the network is untrained, for `train_flow` with `start`. It stands in for a released checkpoint where
there is none: in the experiment digits_text, and in tests.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowmatch.config import UserError, option, require, required, together
from flowmatch.data.config import DataConfig
from flowmatch.models.config import NetConfig
from flowmatch.runs import command, folder, process
from flowmatch.runs.config import StageConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowmatch.data.dataset import Data

FACTOR = 2  # pixels of a latent, in each direction
CHANNELS = 4  # of the latents


class TinyConfig(StageConfig):
    """Config of the tiny pipeline."""

    stage: ClassVar[str] = "tiny_pipeline"

    data: DataConfig = required(
        "pictures with captions, on which the VAE and the tokenizer are trained"
    )
    net: NetConfig = required(
        "the network: UNet2DConditionModel, for a StableDiffusionPipeline, or SD3Transformer2DModel, "
        "for a StableDiffusion3Pipeline"
    )
    predicts: Literal["flow", "noise"] = option(
        "flow",
        "what the network predicts: the velocity of a flow, or the noise of Stable Diffusion's schedule "
        "(StableDiffusionPipeline alone)",
    )
    width: int = option(64, "width of the text encoder", ge=8, multiple_of=8)
    vae_channels: list[int] = option(
        [16, 32], "widths of the two levels of the VAE, multiples of 4"
    )
    vae_steps: int = option(500, "updates of the VAE", ge=1)
    vae_batch: int = option(64, "pictures in an update of the VAE", ge=1)
    vae_lr: float = option(4e-3, "peak learning rate of the VAE", gt=0)


@dataclass
class Plan(folder.Plan):
    """Opened pictures, and a pipeline that is not trained."""

    data: "Data"
    pipe: Any


def plan(config: TinyConfig) -> Plan:
    """Check the config, open the pictures, and make the pipeline of untrained parts."""
    from flowmatch.data import captions, dataset
    from flowmatch.models import precision
    from flowmatch.models.watch import quiet

    def check_device() -> None:
        require("transformers", "text", "tiny_pipeline")
        if config.device not in ("auto", "cpu"):
            raise UserError(
                f"device={config.device}: the VAE is trained on the CPU, where it depends on data "
                "and seed alone; leave device out"
            )

    def check_net() -> None:
        if config.net.name not in CLASSES:
            raise UserError(f"net.name={config.net.name}: expected {' or '.join(CLASSES)}")
        if config.predicts == "noise" and config.net.name != "UNet2DConditionModel":
            raise UserError(
                f"predicts=noise: {config.net.name} predicts a flow; leave predicts out"
            )

    def open_data() -> "tuple[Data, list[str], str]":
        data = dataset.load(config.data)
        if not data.images or data.shape[1] % FACTOR or data.shape[2] % FACTOR:
            raise UserError(f"data: samples are {list(data.shape)}; expected images of even sides")
        return captions.read(data, config.data)

    _, _, (data, texts, digest) = together(check_device, check_net, open_data)
    with precision.seeded(config.seed), quiet():
        pipe = CLASSES[config.net.name](config, make_vae(config, data.shape), texts)
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    lines = [
        f"{len(data)} samples of {list(data.shape)}, {len(texts):,} captions",
        f"{type(pipe).__name__}, its network of {net.num_parameters():,} parameters",
        f"{config.vae_steps} steps of {config.vae_batch} for the VAE, on cpu",
    ]
    return Plan(config, {"data": data.digest, "captions": digest}, lines, data, pipe)


def run(plan: Plan) -> None:
    """Make the pipeline, and seal the folder; rank 0 alone."""
    if not process.leads():
        return
    from tqdm import tqdm

    from flowmatch.models import precision
    from flowmatch.models.watch import quiet

    config, pipe = plan.config, plan.pipe
    with folder.RunFolder("tiny_pipeline", config, plan.inputs) as opened:
        with (
            tqdm(total=config.vae_steps, unit="step", **process.bar_options()) as bar,
            precision.seeded(config.seed),
            quiet(),
        ):
            train_vae(pipe.vae, plan.data, config, bar.update)
            built = opened.scratch.build("pipeline")
            pipe.save_pretrained(built)
        for path in sorted(built.iterdir()):
            opened.scratch.place(path, opened.folder / path.name)
        parts = [name for name in pipe.components if (opened.folder / name).is_dir()]
        files = [
            f"{part}/{path.name}" for part in parts for path in (opened.folder / part).iterdir()
        ]
        rms = error(pipe.vae, plan.data)
        opened.seal(["model_index.json", *files], rms=rms)
        process.say(f"tiny_pipeline: rms of the VAE's pictures {rms:.3f}")


def stable_diffusion(config: TinyConfig, vae: Any, texts: list[str]) -> Any:
    """Make a StableDiffusionPipeline, with a stock scheduler of flows, or its released one's DDIM."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    from flowmatch.models import tokenizers

    tokenizer = tokenizers.clip(texts)
    scheduler: Any = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", steps_offset=1
    )
    if config.predicts == "noise":
        levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = DDIMScheduler(
            **levels, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_encoder(config.width, tokenizer),
        tokenizer=tokenizer,
        unet=make_network(config, vae, cross_attention_dim=config.width),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3(config: TinyConfig, vae: Any, texts: list[str]) -> Any:
    """Make a StableDiffusion3Pipeline, with two encoders of CLIP and one of T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    from flowmatch.models import tokenizers

    pair, width = [tokenizers.clip(texts) for _ in range(2)], config.width
    third = tokenizers.sentence_pieces(texts, pair[0].model_max_length)
    sizes = T5Config(
        vocab_size=len(third), d_model=2 * width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4
    )
    whole = {"joint_attention_dim": 2 * width, "pooled_projection_dim": 2 * width}
    whole["pos_embed_max_size"] = vae.config.sample_size // FACTOR
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=make_encoder(width, pair[0], projected=True),
        tokenizer=pair[0],
        text_encoder_2=make_encoder(width, pair[1], projected=True),
        tokenizer_2=pair[1],
        text_encoder_3=T5EncoderModel(sizes).eval(),
        tokenizer_3=third,
        transformer=make_network(config, vae, **whole),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


CLASSES = {
    "UNet2DConditionModel": stable_diffusion,
    "SD3Transformer2DModel": stable_diffusion_3,
}


def make_encoder(width: int, tokenizer: Any, projected: bool = False) -> Any:
    """Make CLIP's text model with random weights. projected: with a projection of the pooled text."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def make_network(config: TinyConfig, vae: Any, **sizes: int) -> Any:
    """Make the untrained network."""
    from flowmatch.models import networks

    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS}
    sizes["sample_size"] = vae.config.sample_size // FACTOR
    given = dict(config.net.model_extra or {})
    if known := sorted(given.keys() & sizes.keys()):
        raise UserError(f"net.{known[0]}: follows from data and width; leave it out")
    return made("net", networks.network_class(config.net.name), **given, **sizes).eval()


def made(key: str, model: Any, **arguments: Any) -> Any:
    """Make a model. Raises UserError for arguments that it refuses, below a key of the config."""
    from flowmatch.models import networks

    try:
        return model(**arguments)
    except Exception as error:  # classes of diffusers raise anything
        told = networks.reason(error)
        raise UserError(f"{key}: {model.__name__} refuses these arguments: {told}") from None


def make_vae(config: TinyConfig, shape: tuple[int, ...]) -> Any:
    """Make an untrained AutoencoderKL for pictures of a shape [C, H, W]."""
    from diffusers import AutoencoderKL

    return made(
        "vae_channels",
        AutoencoderKL,
        in_channels=shape[0],
        out_channels=shape[0],
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=tuple(config.vae_channels),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=shape[1],
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(vae: Any, data: "Data", config: TinyConfig, show: "Callable[[], Any]") -> None:
    """Train a VAE until its latents have mean 0 and deviation 1 in each channel."""
    import numpy as np
    import torch
    from torch.nn import functional

    from flowmatch.flow import noise

    order = noise.Order(len(data), config.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.vae_lr, total_steps=config.vae_steps
    )
    for step in range(config.vae_steps):
        x = data.batch(order(step * config.vae_batch + np.arange(config.vae_batch)))["x1"]
        latents = vae.encode(x).latent_dist
        loss = functional.mse_loss(vae.decode(latents.sample()).sample, x)
        loss = loss + 1e-4 * latents.kl().mean() / latents.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        show()
    vae.eval().requires_grad_(False)
    standardise(vae, data)


def standardise(vae: Any, data: "Data") -> None:
    """Fold mean and deviation of the latents, by channel, into the two 1x1 convolutions around them."""
    import torch

    latents = torch.cat([vae.encode(x).latent_dist.mean for x in some(data)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    wide = torch.cat([deviation, torch.ones(CHANNELS)])
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight.div_(wide[:, None, None, None])
    inner.bias[:CHANNELS].sub_(mean)
    inner.bias.div_(wide)
    inner.bias[CHANNELS:].sub_(2 * deviation.log())
    outer.bias.add_(outer.weight[:, :, 0, 0] @ mean)
    outer.weight.mul_(deviation[None, :, None, None])


def some(data: "Data", count: int = 2048, size: int = 256) -> "list[Any]":
    """Return some pictures, in parts."""
    import numpy as np

    ids = np.linspace(0, len(data) - 1, min(count, len(data))).astype(np.int64)
    return list(data.batch(ids)["x1"].split(size))


def error(vae: Any, data: "Data") -> float:
    """Return the rms of what the VAE makes of pictures."""
    import torch

    parts = [
        (vae.decode(vae.encode(x).latent_dist.mode()).sample - x).flatten() for x in some(data)
    ]
    return float(torch.cat(parts).square().mean().sqrt())


STAGE = command.Stage("tiny_pipeline", TinyConfig, plan, run, __doc__, alone=True)

if __name__ == "__main__":
    command.main(STAGE)
