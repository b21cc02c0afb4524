"""Likeness of pictures to other pictures and to their prompts, measured by torchmetrics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgate_processors.errors import MissingPackageError


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of pictures `(count, 3, height, width)` in 0..1 -> `(count,)`.

    Raises:
        MissingPackageError: `torchmetrics` is not installed.
    """
    measured: Tensor = _functional().peak_signal_noise_ratio(
        pictures, others, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return measured


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity, at most 1, of pictures `(count, 3, height, width)` in 0..1 -> `(count,)`.

    Raises:
        MissingPackageError: `torchmetrics` is not installed.
    """
    measured: Tensor = _functional().structural_similarity_index_measure(
        pictures, others, data_range=1.0, reduction="none"
    )
    return measured


class ClipScore:
    """CLIP score of pictures. Its model is loaded once.

    Args:
        model: Folder of a CLIP model, or its name on the hub.

    Raises:
        MissingPackageError: `torchmetrics` is not installed.
        OSError: There is no such model.
    """

    def __init__(self, model: str) -> None:
        _functional()
        from torchmetrics.multimodal import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        class Clip(CLIPModel):  # type: ignore[misc]  # an untyped base
            """CLIP model that returns features, as torchmetrics 1.9 expects; transformers 5 returns an output."""

            def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
                output = super().get_image_features(*args, **kwargs)
                return getattr(output, "pooler_output", output)

            def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
                output = super().get_text_features(*args, **kwargs)
                return getattr(output, "pooler_output", output)

        # a function and no name: torchmetrics knows only a few names, and for one of them runs code that comes with it
        self._metric = CLIPScore(
            lambda: (Clip.from_pretrained(model, use_safetensors=True), CLIPProcessor.from_pretrained(model))
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score, 0 to 100, of pictures `(count, 3, height, width)` in 0..1 -> `(count,)`.

        Args:
            pictures: Pictures to score.
            prompts: Prompt of each picture.
        """
        pairs = zip((pictures * 255).round().to(torch.uint8), prompts, strict=True)
        return torch.stack([self._metric(picture, prompt) for picture, prompt in pairs])


class FrechetDistance:
    """Fréchet distance between the features of drawn pictures and of real ones.

    Args:
        real: Real pictures, `(count, 3, height, width)` in 0..1, more of them than features.
        features: Module that maps such pictures to `(count, features)`. Its `num_features` is the number of features.

    Raises:
        MissingPackageError: `torchmetrics` is not installed.
    """

    def __init__(self, real: Tensor, features: torch.nn.Module) -> None:
        _functional()
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._metric = FrechetInceptionDistance(feature=features, normalize=True, reset_real_features=False)
        self._metric.update(real, real=True)

    def __call__(self, pictures: Tensor) -> float:
        """Return the distance of pictures, in the same form, to the real ones."""
        self._metric.reset()
        self._metric.update(pictures, real=False)
        return float(self._metric.compute())


def _functional() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise MissingPackageError(
            "`torchmetrics` must be installed to measure quality. Run `pip install 'tgate-processors[quality]'`."
        ) from error
    return image
