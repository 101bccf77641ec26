"""ReflowPipeline: sample images or points from a rectified flow in a few steps.

Unlike the stock pipelines, it requests the uniform grid by explicit sigmas, independent of the
scheduler's default (`shift` of the scheduler moves them), keeps the state in float32 with a
half-precision network, passes class labels by number or by name, guides without a second model, decodes
latents with a VAE, and samples points and signals as well as images.

This file imports torch and diffusers only, because it is copied next to exported weights.
"""

import inspect
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

ID2LABEL: dict[int, str] = {}  # names of the classes, which an export writes here


class ReflowPipeline(DiffusionPipeline):
    """Sample from a network that predicts noise - data at timestep = 1000 sigma.

    Args:
        unet: A network in eval mode: UNet2DModel or DiTTransformer2DModel for images, or one without
            `sample_size` in its config, such as VelocityMLP, for points of in_channels dimensions. A
            sample_size that is a list has the sides of other samples: [T] for signals [C, T]. The null
            class, for guidance and for samples without a label, is the last of num_class_embeds, or the
            row after the num_embeds_ada_norm classes of a DiT.
        scheduler: RectifiedFlowScheduler, FlowMatchEulerDiscreteScheduler, or another that accepts
            sigmas. Also one that spaces its steps uniformly by itself, like
            DPMSolverMultistepScheduler with use_flow_sigmas; it begins at sigma = 0.999, and pixels
            differ by about 1% of their range.
        vae: The VAE that the samples are latents of; it decodes them into images.
        vqvae: The same, by the name that LDMPipeline has for it.
        id2label: Names of the classes, by their numbers.
        latent: Whether samples are latents, which no image is made of without a VAE.
        latents_scale: A number, or one for each channel: the VAE decodes x / latents_scale +
            latents_shift (default: the VAE's scaling_factor).
        latents_shift: Likewise (default: the VAE's shift_factor).
    """

    if __name__.startswith("flowmatch."):  # remote code has no such package
        __module__ = "flowmatch"  # written to model_index.json, and imported when it is loaded

    model_cpu_offload_seq = "unet->vae->vqvae"  # type: ignore[assignment]
    _optional_components = ["vae", "vqvae"]  # noqa: RUF012
    unet: Any
    scheduler: Any

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        vae: Any = None,
        vqvae: Any = None,
        id2label: dict[int, str] | None = None,
        latent: bool = False,
        latents_scale: float | list[float] | None = None,
        latents_shift: float | list[float] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, vqvae=vqvae)
        self.id2label = {int(k): name for k, name in (id2label or ID2LABEL).items()}
        self.latent = latent
        given: dict[str, Any] = {"latents_scale": latents_scale, "latents_shift": latents_shift}
        given |= {"id2label": id2label, "latent": latent or None}
        self.register_to_config(**{key: v for key, v in given.items() if v is not None})

    @property
    def autoencoder(self) -> Any:
        """The VAE, or None."""
        return self.vae if self.vqvae is None else self.vqvae

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 4,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate samples.

        Args:
            batch_size: Number of samples.
            num_inference_steps: Steps of the scheduler's solver.
            class_labels: One label for all samples, or one for each: a number below the number of
                classes, or a name of id2label. None means the null class for a class-conditional
                network.
            guidance_scale: w in v = v_null + w (v_cond - v_null) (arXiv 2207.12598). 1 disables
                guidance; any other value evaluates the network for both.
            generator: One generator, or one per sample, which makes a sample independent of its
                batch. A seed gives the same noise as in DDPMPipeline.
            latents: Noise to start from, [batch_size, ...].
            output_type: "pil", "np" ([B, H, W, C]) or "pt" ([B, C, H, W]) in [0, 1]; "latent":
                unscaled, not decoded by a VAE. Samples that are no images are returned unscaled, as
                "np" or "pt". Default: "pil" for images, "latent" for latents without a VAE, else "np".
            return_dict: Whether to return an ImagePipelineOutput instead of a tuple.

        Returns:
            ImagePipelineOutput with `images`, or a tuple with the images.

        Raises:
            ValueError: For arguments that do not fit the network, and for a scheduler that cannot
                take these steps.
        """
        shape = (batch_size, *self._sample_shape())
        output_type = output_type or self._usual_output(shape)
        self._check(batch_size, num_inference_steps, generator, output_type, shape)
        device = self._execution_device
        labels = self._labels(class_labels, guidance_scale, batch_size, device)

        if latents is None:
            noise_device = None if device.type == "mps" else device  # mps is not reproducible
            latents = randn_tensor(
                shape, generator=generator, device=noise_device, dtype=self.unet.dtype
            )
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}: expected {list(shape)}")
        x = latents.to(device, torch.float32)

        self._set_steps(num_inference_steps, device)
        extra = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            extra["generator"] = generator
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self._predict(x, t, labels, guidance_scale)
            x = self.scheduler.step(output, t, x, return_dict=False, **extra)[0]

        samples: Any = x
        images = len(shape) == 4 and not (self.latent and self.autoencoder is None)
        if images and output_type != "latent":
            samples = (self.decode(x) / 2 + 0.5).clamp(0, 1)
        if output_type not in ("pt", "latent"):
            samples = samples.cpu().numpy()
            if len(shape) == 4:
                samples = samples.transpose(0, 2, 3, 1)
            if output_type == "pil":
                samples = self.numpy_to_pil(samples)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents with the VAE; return anything else as it is.

        Args:
            x: Samples, [B, ...].

        Returns:
            Images [B, C, H, W], in about [-1, 1].
        """
        vae = self.autoencoder
        if vae is None:
            return x
        scale = self.config.get("latents_scale") or vae.config.get("scaling_factor") or 1.0
        shift = self.config.get("latents_shift") or vae.config.get("shift_factor") or 0.0
        each = [-1, *([1] * (x.ndim - 2))]  # along the channels
        z = x / x.new_tensor(scale).reshape(each) + x.new_tensor(shift).reshape(each)
        return vae.decode(z.to(vae.dtype)).sample.float()

    def _usual_output(self, shape: tuple[int, ...]) -> str:
        if self.latent and self.autoencoder is None:
            return "latent"
        return "pil" if len(shape) == 4 else "np"

    def _numbers(self, labels: Any) -> Any:
        """Replace names of classes by their numbers."""
        if isinstance(labels, str):
            return self._numbers([labels])[0]
        if not isinstance(labels, (list, tuple)) or not any(isinstance(n, str) for n in labels):
            return labels
        known = {name: k for k, name in self.id2label.items()}
        if unknown := [n for n in labels if isinstance(n, str) and n not in known]:
            raise ValueError(
                f"class_labels={unknown}: expected {'names of ' if known else 'numbers; '}"
                f"{', '.join(known) or 'the classes have no names here'}"
            )
        return [known[n] if isinstance(n, str) else n for n in labels]

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Predict noise - data in float32, with guidance. labels: [B], or [2B], null class first."""
        inputs = torch.cat([x] if guidance == 1 else [x, x]).to(self.unet.dtype)
        # always a float tensor: UNet2DModel truncates a Python number to an integer
        times = t.to(x.device, torch.float32).expand(len(inputs))
        given = {} if labels is None else {"class_labels": labels}
        output = self.unet(inputs, times, **given, return_dict=False)[0].float()
        if output.shape != inputs.shape:
            raise ValueError(
                f"the network returns shape {list(output.shape)} for input {list(inputs.shape)}; "
                "expected the same shape: out_channels = in_channels, and a size divisible by its "
                "patch size"
            )
        if guidance == 1:
            return output
        null, cond = output.chunk(2)
        return null + guidance * (cond - null)

    def _set_steps(self, steps: int, device: torch.device) -> None:
        """Set sigma = 1 - i/N and a final 0, shifted by `shift`, and check the scheduler's grid."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if scheduler.config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(
                f"{name} has prediction_type={scheduler.config.prediction_type!r}: expected "
                "'flow_prediction', or pass scheduler=FlowMatchEulerDiscreteScheduler()"
            )
        even = torch.tensor([*(1 - i / steps for i in range(steps)), 0.0])
        shift = scheduler.config.get("shift", 1.0)
        wanted = shift * even / (1 + (shift - 1) * even)
        slack = 1e-6
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=even[:-1].tolist(), device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
            slack = 2e-3  # stock flow grids begin at 0.999 and round timesteps to integers
        order = scheduler.order
        sigmas = getattr(scheduler, "sigmas", even[:0])[::order].float().cpu()
        times = scheduler.timesteps[::order].float().cpu()
        if (
            sigmas.shape != wanted.shape
            or not (sigmas - wanted).abs().max() <= slack
            or not (times / 1000 - wanted[:-1]).abs().max() <= slack
        ):
            raise ValueError(
                f"{name} makes sigmas {sigmas.tolist()} and timesteps {times.tolist()} for {steps} "
                f"steps: expected {wanted.tolist()}, and 1000 times that. Its config changes the grid "
                "(flow_shift, shift_terminal, use_*_sigmas); pass "
                "scheduler=FlowMatchEulerDiscreteScheduler() or a RectifiedFlowScheduler"
            )

    def _sample_shape(self) -> tuple[int, ...]:
        """Read the shape of one sample, [C, *sample_size] or [D], from the network's config."""
        config = self.unet.config
        if "sample_size" not in config:
            return (config.in_channels,)
        size = config.sample_size
        if size is None:
            raise ValueError(
                f"{type(self.unet).__name__} has sample_size=None in its config; set it to the size "
                "of the images"
            )
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _labels(
        self, labels: Any, guidance: float, batch_size: int, device: torch.device
    ) -> Tensor | None:
        """Check labels, and arrange them for `_predict`: None, [B], or [2B], null class first."""
        config = self.unet.config
        if config.get("class_embed_type") is not None:
            raise ValueError(
                f"class_embed_type={config.class_embed_type!r} is not supported; expected a network "
                "with num_class_embeds, or one without labels"
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
            raise ValueError(
                f"guidance_scale={guidance} needs class_labels; pass them, or leave it out"
            )
        nulls = torch.full((batch_size,), null, dtype=torch.long, device=device)
        if labels is None:
            return nulls
        given = torch.as_tensor(self._numbers(labels), device=device)
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
        """Raise ValueError for arguments that do not fit, before any work."""
        for name, value in {"batch_size": batch_size, "num_inference_steps": steps}.items():
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}={value}: expected an integer of at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}: expected one, or batch_size={batch_size}"
            )
        bare = self.latent and self.autoencoder is None
        kinds: tuple[str, ...] = ("pil", "np", "pt", "latent") if len(shape) == 4 else ("np", "pt")
        kinds = ("np", "pt", "latent") if bare else kinds
        if output_type not in kinds:
            raise ValueError(
                f"output_type={output_type!r}: expected one of {', '.join(kinds)} for samples of "
                f"shape {list(shape[1:])}"
            )
        if output_type == "pil" and self.autoencoder is None and shape[1] not in (1, 3):
            raise ValueError(
                f"output_type='pil': cannot make pictures of {shape[1]} channels; expected 'latent', "
                "'np' or 'pt'"
            )
        if self.unet.training:
            raise ValueError(
                "unet is in training mode, with dropout active; call unet.eval() first"
            )
