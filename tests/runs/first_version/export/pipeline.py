"""ReflowPipeline: sample images or points from a rectified flow in a few steps.

It differs from the stock pipelines in what they cannot do: it asks for the uniform grid by explicit
sigmas whatever the scheduler's default (its `shift` moves them), keeps the state in float32 under a
half-precision network, passes class labels, guides without a second model, and samples points as well
as images.

This file needs torch and diffusers alone, so that it can be copied beside exported weights.
"""

import inspect
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ReflowPipeline(DiffusionPipeline):
    """Sample from a network that predicts noise - data at timestep = 1000 sigma.

    unet: UNet2DModel or DiTTransformer2DModel (images), or a network without `sample_size` in its
    config (points of in_channels dimensions), such as VelocityMLP; in eval mode.
    scheduler: RectifiedFlowScheduler, FlowMatchEulerDiscreteScheduler, or another that accepts
    sigmas; or one that spaces its steps uniformly by itself, as DPMSolverMultistepScheduler does
    with use_flow_sigmas (it begins at sigma = .999: pixels differ by some 1% of their range).

    The null class, for guidance and for samples without a label, is the last of num_class_embeds,
    or the row after the num_embeds_ada_norm classes of a DiT.
    """

    if __name__.startswith("flowmatch."):  # not as remote code, where there is no such package
        __module__ = "flowmatch"  # what model_index.json records and later looks up

    model_cpu_offload_seq = "unet"  # type: ignore[assignment]
    unet: Any
    scheduler: Any

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 4,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw batch_size samples in num_inference_steps steps of the scheduler's solver.

        class_labels: one for all or one a sample, below the number of classes; None on a
        conditional network means the null class. guidance_scale: w in
        v = v_null + w (v_cond - v_null) (arXiv 2207.12598); 1 is none, anything else evaluates the
        network for both. generator: one, or one a sample, which then does not depend on its batch;
        a seed gives the noise that it gives in DDPMPipeline. latents: the noise instead,
        [batch_size, ...]. output_type: "pil", "np" ([B, H, W, C]) or "pt" ([B, C, H, W]) in [0, 1],
        "latent" as they come, for a VAE to decode; points come as they are, [B, D], as "np" or "pt".
        Returns ImagePipelineOutput with `images`, or a tuple of it. Raises ValueError for arguments
        that do not fit, and for a scheduler that cannot take these steps.
        """
        shape = (batch_size, *self._sample_shape())
        self._check(batch_size, num_inference_steps, generator, output_type, shape)
        device = self._execution_device
        labels = self._labels(class_labels, guidance_scale, batch_size, device)

        if latents is None:
            drawn_on = None if device.type == "mps" else device  # not reproducible on mps
            latents = randn_tensor(
                shape, generator=generator, device=drawn_on, dtype=self.unet.dtype
            )
        elif latents.shape != shape:
            raise ValueError(f"latents are {list(latents.shape)}: expected {list(shape)}")
        x = latents.to(device, torch.float32)

        self._set_steps(num_inference_steps, device)
        extra = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            extra["generator"] = generator
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self._predict(x, t, labels, guidance_scale)
            x = self.scheduler.step(output, t, x, return_dict=False, **extra)[0]

        samples: Any = x
        if len(shape) == 4 and output_type != "latent":
            samples = (x / 2 + 0.5).clamp(0, 1)
        if output_type not in ("pt", "latent"):
            samples = samples.cpu().numpy()
            if len(shape) == 4:
                samples = samples.transpose(0, 2, 3, 1)
            if output_type == "pil":
                samples = self.numpy_to_pil(samples)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Evaluate noise - data in float32, guided. labels: [B]; or [2B], null first, to guide."""
        inputs = torch.cat([x] if guidance == 1 else [x, x]).to(self.unet.dtype)
        # always a float tensor: UNet2DModel cuts a Python number down to an integer
        times = t.to(x.device, torch.float32).expand(len(inputs))
        given = {} if labels is None else {"class_labels": labels}
        output = self.unet(inputs, times, **given, return_dict=False)[0].float()
        if output.shape != inputs.shape:
            raise ValueError(
                f"the network turns {list(inputs.shape)} into {list(output.shape)}: expected the "
                "same shape, so out_channels = in_channels and a size that its patch size divides"
            )
        if guidance == 1:
            return output
        null, cond = output.chunk(2)
        return null + guidance * (cond - null)

    def _set_steps(self, steps: int, device: torch.device) -> None:
        """Set sigma = 1 - i/N and then 0, `shift` applied, and see that the scheduler keeps to it."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if scheduler.config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(
                f"{name} has prediction_type={scheduler.config.prediction_type!r}: expected "
                "'flow_prediction'; or pass scheduler=FlowMatchEulerDiscreteScheduler()"
            )
        even = torch.tensor([*(1 - i / steps for i in range(steps)), 0.0])
        shift = scheduler.config.get("shift", 1.0)
        wanted = shift * even / (1 + (shift - 1) * even)
        slack = 1e-6
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=even[:-1].tolist(), device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
            slack = 2e-3  # stock flow grids begin at .999, and round timesteps to integers
        order = scheduler.order
        sigmas = getattr(scheduler, "sigmas", even[:0])[::order].float().cpu()
        times = scheduler.timesteps[::order].float().cpu()
        if (
            sigmas.shape != wanted.shape
            or not (sigmas - wanted).abs().max() <= slack
            or not (times / 1000 - wanted[:-1]).abs().max() <= slack
        ):
            raise ValueError(
                f"{name} makes sigmas {sigmas.tolist()}, timesteps {times.tolist()} of {steps} "
                f"steps: expected {wanted.tolist()}, and 1000 times that; its config spaces "
                "them (flow_shift, shift_terminal, use_*_sigmas); pass "
                "scheduler=FlowMatchEulerDiscreteScheduler() or a RectifiedFlowScheduler"
            )

    def _sample_shape(self) -> tuple[int, ...]:
        """Read the shape of one sample, [C, H, W] or [D], from the network's config."""
        config = self.unet.config
        if "sample_size" not in config:
            return (config.in_channels,)
        size = config.sample_size
        if size is None:
            raise ValueError(
                f"{type(self.unet).__name__} has sample_size=None in its config: expected the size "
                "of the images; write it there"
            )
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _labels(
        self, labels: Any, guidance: float, batch_size: int, device: torch.device
    ) -> Tensor | None:
        """Check labels and lay them out for `_predict`: None, [B], or [2B], null class first."""
        config = self.unet.config
        if config.get("class_embed_type") is not None:
            raise ValueError(
                f"class_embed_type={config.class_embed_type!r}: expected a network with "
                "num_class_embeds or without labels"
            )
        null = config.get("num_embeds_ada_norm")
        if null is None and config.get("num_class_embeds") is not None:
            null = config.num_class_embeds - 1
        if null is None:
            if labels is not None or guidance != 1:
                raise ValueError(
                    f"class_labels={labels}, guidance_scale={guidance}: this network takes no "
                    "labels; leave both out"
                )
            return None
        if labels is None and guidance != 1:
            raise ValueError(f"guidance_scale={guidance} needs class_labels; none are given")
        nulls = torch.full((batch_size,), null, dtype=torch.long, device=device)
        if labels is None:
            return nulls
        given = torch.as_tensor(labels, device=device)
        if given.is_floating_point() or given.ndim > 1 or given.numel() not in (1, batch_size):
            raise ValueError(
                f"class_labels={labels}: expected one integer, or batch_size={batch_size} of them"
            )
        if given.min() < 0 or given.max() > null:
            raise ValueError(
                f"class_labels={labels}: expected 0 to {null - 1}, or {null} for the null class"
            )
        given = given.long().expand(batch_size)
        return given if guidance == 1 else torch.cat([nulls, given])

    def _check(
        self, batch_size: Any, steps: Any, generator: Any, output_type: str, shape: tuple[int, ...]
    ) -> None:
        """Refuse arguments that do not fit, before any work."""
        for name, value in {"batch_size": batch_size, "num_inference_steps": steps}.items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}={value}: expected an integer of at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}: expected one, or batch_size={batch_size}"
            )
        kinds = ("pil", "np", "pt", "latent") if len(shape) == 4 else ("np", "pt")
        if output_type not in kinds:
            raise ValueError(
                f"output_type={output_type!r}: expected one of {', '.join(kinds)} for samples of "
                f"shape {list(shape[1:])}"
            )
        if output_type == "pil" and shape[1] not in (1, 3, 4):
            raise ValueError(
                f"output_type='pil': no picture has {shape[1]} channels; expected 'latent', 'np' or 'pt'"
            )
        if self.unet.training:
            raise ValueError("unet is in training mode, so dropout is on: call unet.eval() first")
