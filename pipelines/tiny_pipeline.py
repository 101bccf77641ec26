"""A tiny text-to-image pipeline of a stock class, made on the spot: nothing is downloaded.

Tokenizer and VAE are trained on pictures with captions, in seconds; the text encoder is random and stays
so; the network is untrained, for `train_flow` with `start`. It stands in for a released checkpoint where
there is none: in the experiment digits_text, and in tests.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

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
SPECIAL, END = ("<|startoftext|>", "<|endoftext|>"), "</w>"


class TinyConfig(StageConfig):
    """Config of the tiny pipeline."""

    stage: ClassVar[str] = "tiny_pipeline"

    data: DataConfig = required(
        "pictures with captions, on which the VAE and the tokenizer are trained"
    )
    net: NetConfig = required("the network: UNet2DConditionModel")
    width: int = option(64, "width of the text encoder", ge=8, multiple_of=8)
    vae_channels: list[int] = option([16, 32], "widths of the two levels of the VAE")
    vae_steps: int = option(500, "updates of the VAE", ge=1)
    vae_batch: int = option(64, "pictures in an update of the VAE", ge=1)
    vae_lr: float = option(4e-3, "peak learning rate of the VAE", gt=0)


@dataclass
class Plan(folder.Plan):
    """Opened pictures and their captions."""

    data: "Data"
    texts: list[str]


def plan(config: TinyConfig) -> Plan:
    """Check the config, and open the pictures."""
    from flowmatch.data import captions, dataset

    def check_device() -> None:
        require("transformers", "text", "tiny_pipeline")
        if config.device == "cuda":
            raise UserError(
                "device=cuda: the VAE is trained on the CPU, where it depends on data and seed alone; "
                "leave device out"
            )

    def check_net() -> None:
        if config.net.name != "UNet2DConditionModel":
            raise UserError(f"net.name={config.net.name}: expected UNet2DConditionModel")

    def open_data() -> "tuple[Data, list[str], str]":
        data = dataset.load(config.data)
        if not data.images or data.shape[1] % FACTOR or data.shape[2] % FACTOR:
            raise UserError(f"data: samples are {list(data.shape)}; expected images of even sides")
        return captions.read(data, config.data)

    _, _, (data, texts, digest) = together(check_device, check_net, open_data)
    lines = [
        f"{len(data)} samples of {list(data.shape)}, {len(texts):,} captions",
        f"{config.vae_steps} steps of {config.vae_batch} for the VAE, on cpu",
    ]
    return Plan(config, {"data": data.digest, "captions": digest}, lines, data, texts)


def run(plan: Plan) -> None:
    """Make the pipeline, and seal the folder; rank 0 alone."""
    if not process.leads():
        return
    from tqdm import tqdm

    from flowmatch.models import precision
    from flowmatch.models.watch import quiet

    config: TinyConfig = plan.config
    with folder.RunFolder("tiny_pipeline", config, plan.inputs) as opened:
        command.exit_on_sigterm()
        with (
            tqdm(total=config.vae_steps, unit="step", **process.bar_options()) as bar,
            precision.seeded(config.seed),
            quiet(),
        ):
            pipe = build(config, plan.data, plan.texts, bar.update)
            pipe.save_pretrained(opened.folder)
        parts = [name for name in pipe.components if (opened.folder / name).is_dir()]
        files = [
            f"{part}/{path.name}" for part in parts for path in (opened.folder / part).iterdir()
        ]
        rms = error(pipe.vae, plan.data)
        opened.seal(["model_index.json", *files], rms=rms)
        process.say(f"tiny_pipeline: rms of the VAE's pictures {rms:.3f}")


def build(config: TinyConfig, data: "Data", texts: list[str], show: "Callable[[], Any]") -> Any:
    """Make the pipeline of its parts. show: called after each update of the VAE."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    tokenizer = make_tokenizer(texts)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", steps_offset=1
    )
    pipe: Any = StableDiffusionPipeline(
        vae=train_vae(config, data, show),
        text_encoder=make_encoder(config.width, len(tokenizer), tokenizer.model_max_length),
        tokenizer=tokenizer,
        unet=make_network(config, data.shape),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tokenizer(texts: list[str]) -> Any:
    """Make CLIP's tokenizer: a word of the captions is one token, others fall into letters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [f"{letter}{END}" for letter in letters]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = CLIPTokenizer(vocab=vocab, merges=[]).backend_tokenizer
    pieces = [
        [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain)]
        for plain in map(backend.normalizer.normalize_str, texts)
    ]
    merges: Any = merges_of({word for words in pieces for word in words})
    vocab |= {f"{a}{b}": len(vocab) + i for i, (a, b) in enumerate(merges)}
    longest = max(len(words) for words in pieces) + len(SPECIAL)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=longest + longest // 2)


def merges_of(words: set[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair of parts again and again, until each word is one part."""
    split = {word: [*word[:-1], f"{word[-1]}{END}"] for word in sorted(words)}
    merges = []
    while counts := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        first = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(first)
        for parts in split.values():
            for i in range(len(parts) - 2, -1, -1):
                if (parts[i], *parts[i + 1 : i + 2]) == first:
                    parts[i : i + 2] = ["".join(first)]
    return merges


def make_encoder(width: int, vocabulary: int, length: int) -> Any:
    """Make CLIP's text model with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def make_network(config: TinyConfig, shape: tuple[int, ...]) -> Any:
    """Make the untrained network. Raises UserError for arguments that it refuses."""
    from flowmatch.models import networks

    sizes = {"in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": shape[1] // FACTOR}
    sizes["cross_attention_dim"] = config.width
    given = dict(config.net.model_extra or {})
    if known := sorted(given.keys() & sizes.keys()):
        raise UserError(f"net.{known[0]}: follows from data and width; leave it out")
    try:
        return networks.network_class(config.net.name)(**given, **sizes).eval()
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"net: {config.net.name} refuses these arguments: {error}") from None


def train_vae(config: TinyConfig, data: "Data", show: "Callable[[], Any]") -> Any:
    """Train an AutoencoderKL whose latents have mean 0 and deviation 1 in each channel."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from torch.nn import functional

    from flowmatch.flow import noise

    vae: Any = AutoencoderKL(
        in_channels=data.shape[0],
        out_channels=data.shape[0],
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=tuple(config.vae_channels),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=data.shape[1],
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
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
    return vae


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
