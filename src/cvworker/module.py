"""The class that every model extends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:  # torch takes seconds to import, and only the model's own processes need it
    import torch

EXAMPLE_HEIGHT, EXAMPLE_WIDTH = 480, 640


class Module(ABC):
    """A computer-vision model, as the worker runs it: extend it and write ``preprocess`` and ``process``.

    An instance of its own lives in the model process (with ``setup``) and in each DataLoader process (without), so
    ``__init__`` should be cheap and ``setup`` should load the network. A module that keeps its network in
    ``self.model`` can also be compiled, exported and profiled by the tools.
    """

    name: ClassVar[str] = ""
    """What requests call it in ``task``; the class's name in lower case where the class gives none."""

    image_type: ClassVar[Literal["tensor", "pil"]] = "tensor"
    """What ``preprocess`` gets: a ``uint8 [3, H, W]`` RGB tensor, or a ``PIL.Image`` in mode RGB."""

    min_side: int | None = None
    """The smallest side, in pixels, that ``preprocess`` needs: decoders may scale larger images down to no less.

    ``None`` gives every image at its original size.
    """

    decode_on_device: ClassVar[bool] = False
    """Whether baseline JPEGs go to a CUDA device as bytes and are decoded there, a batch at a time, by nvJPEG.

    ``preprocess`` then runs in the model process for those, with an image on the device and at its original size
    (``min_side`` does nothing); all other pictures are decoded on the CPU as ever, so it has to work with an image on
    either and needs nothing that ``setup`` made. ``collate`` gets samples that are on the device. Nothing changes where
    ``device`` is the CPU. Needs the ``image_type`` ``"tensor"``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            cls.name = cls.__name__.lower()

    def __init__(self, weights: Path | None = None) -> None:
        self.weights = weights

    def setup(self, device: torch.device) -> None:  # noqa: B027 - a hook that does nothing unless a module needs it
        """Load the model onto ``device``: called once, in the process that runs ``process``."""

    @abstractmethod
    def preprocess(self, image: Any) -> Any:
        """Turn one upright RGB image into one sample, on the CPU, in a DataLoader process (see ``decode_on_device``).

        The sample is a tensor, or a tree (dict, list, tuple) of tensors and numbers. Whatever is raised here is
        answered as ``preprocess_failed`` for this image only.
        """

    @abstractmethod
    def process(self, batch: Any) -> Sequence[Mapping[str, Any]]:
        """Run one collated batch, already on the device, and return one JSON-able result per sample, in order.

        Runs inside ``torch.inference_mode`` (and ``autocast`` for bf16 and fp16). If it raises, the samples are
        tried one by one, and only those that raise again are answered as ``process_failed``.
        """

    def collate(self, samples: Sequence[Any]) -> Any:
        """Join samples into a batch, on the CPU; by default :func:`torch.utils.data.default_collate`."""
        from torch.utils.data import default_collate

        return default_collate(list(samples))

    def example(self) -> Any:
        """An image for warm-up and checks, of this module's ``image_type``; by default 480x640 grey noise."""
        import torch

        generator = torch.Generator().manual_seed(0)
        size = (1, EXAMPLE_HEIGHT, EXAMPLE_WIDTH)
        noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).expand(3, -1, -1).contiguous()
        if self.image_type == "tensor":
            return noise
        from PIL import Image

        return Image.fromarray(noise.permute(1, 2, 0).numpy())
