"""The figure of pairs through a pipeline: stage two's shards beside bare calls of the same pipeline."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowmatch.data.config import PromptsConfig
from flowmatch.models.config import CallConfig
from flowmatch.models.watch import quiet
from pipelines import generate_pairs
from scripts.bench.large import Size, size_for
from scripts.bench.yardsticks import Figure, Load, summary, synchronise
from tests.tiny import TINY

CLASS = "StableDiffusion3Pipeline"
PROMPTS = ["a cat", "a red fox in snow", "two houses", "rain at night"]
STEPS, GUIDANCE, BATCH, BATCHES = 2, 5.0, 4, 4  # a batch of the compute, and batches in a shard


def build(size: Size) -> Any:
    """Build a pipeline whose network alone has the size of a real one."""
    pipe = TINY[CLASS].build()
    net = pipe.transformer
    more: dict[str, Any] = {"sample_size": size.side, "pos_embed_max_size": size.side}
    more |= {"num_layers": size.layers, "attention_head_dim": 64, "num_attention_heads": size.width}
    more |= {"caption_projection_dim": 64 * size.width}
    pipe.register_modules(transformer=type(net).from_config(dict(net.config) | more))
    return pipe


def own_run(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time shards, from the noise to the seal, and as many bare calls, in turn."""
    quick = load.rounds < 5
    size, tiny = size_for(device, quick), TINY[CLASS]
    pipe = build(size)
    pipe.save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    side = size.side * tiny.call["height"] // tiny.latents[-1]
    call = {key: value for key, value in tiny.call.items() if key != "output_type"}
    call |= {
        "height": side,
        "width": side,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
    }
    config = generate_pairs.PairsConfig(
        run_dir=str(folder / "pairs"),
        teacher=str(folder / "pipe"),
        prompts=PromptsConfig(path=str(folder / "prompts.txt")),
        call=CallConfig(**call),
        shards=1,
        shard_size=BATCH * BATCHES,
        compute_batch=BATCH,
        device="cpu" if device == "cpu" else "cuda",
        precision=load.precision,
    )
    plan = generate_pairs.plan(config)
    teacher: Any = plan.teacher
    clock = time.process_time if device == "cpu" else time.perf_counter
    noise = torch.randn(BATCH, *teacher.shape, dtype=teacher.net.dtype, device=teacher.net.device)

    def ours(number: int) -> None:
        place = config.model_copy(update={"run_dir": str(folder / f"pairs{number}")})
        generate_pairs.run(replace(plan, config=place))

    def bare(number: int) -> None:
        for _ in range(BATCHES):
            teacher.pipe(prompt=PROMPTS, latents=noise, output_type="latent", **call)
        synchronise(device)

    seconds: dict[Any, list[float]] = {ours: [], bare: []}
    with quiet():
        for number in range(2 if quick else size.rounds + 1):
            for one, times in seconds.items():
                began = clock()
                one(number)
                times.append(clock() - began)
    ratios = [b / a for a, b in zip(*(times[1:] for times in seconds.values()), strict=True)]
    count = teacher.net.num_parameters()
    return {
        "pairs through a pipeline": summary(ratios)
        | {"target": "at least 0.97"}
        | {"what": f"speed, ours / bare calls of {CLASS}; {count / 1e6:.0f}M parameters"}
    }
