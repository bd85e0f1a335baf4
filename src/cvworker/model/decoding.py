"""Decoding on the device, for modules that ask for it: JPEG bytes in host memory to samples in the device's memory.

The DataLoader processes say which pictures the device may decode (:mod:`cvworker.baseline`) and decode the others, as
ever; of the former only the place of their bytes in shared memory travels. Written for CUDA and tested with a stand-in
for the decoder; not measured on a GPU yet.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import simplejpeg
import structlog
import torch

from cvworker.errors import JobError
from cvworker.images import turned
from cvworker.model.batcher import Sample
from cvworker.model.preprocess import Encoded, describe, guarded
from cvworker.module import Module

PIXELS_TOGETHER = 64_000_000
"""Decoded at once at most, a single larger picture apart: 192 MB on the device, and enough pictures to keep it busy."""
PROBE_SIDE = 64
PROBE_LEVELS = 8
"""By which a smooth picture may differ from what the CPU decodes: devices round, and spread chroma, in other ways."""

Decode = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Whole JPEG files, ``uint8 [N]`` in host memory, to ``uint8 [3, H, W]`` RGB on the device, complete when it returns.

EXIF is not applied. Raises for a picture that it cannot decode, and then gives none at all.
"""

log = structlog.get_logger(__name__)


def decoder_for(device: torch.device) -> Decode | None:
    """What decodes on ``device``, tried on two small pictures; None on the CPU, and where nothing does (it is logged).

    TorchCodec before torchvision, whose decoders are deprecated and which lets nvJPEG decode only one batch at a time.
    """
    if device.type != "cuda":
        return None
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    problems = {}
    for name, make in (("torchcodec", _torchcodec), ("torchvision", _torchvision)):
        try:
            decode = make(device)
            probe(decode, device)
        except Exception as error:  # not installed, built without nvJPEG, no such library, ...
            problems[name] = describe(error)
        else:
            log.info("baseline JPEGs are decoded on the device", decoder=name, device=str(device))
            return decode
    log.warning(
        "decode_on_device: nothing decodes JPEGs on this device, so all are decoded on the CPU; "
        "pip install 'cvworker[gpu]' brings TorchCodec",
        device=str(device),
        **problems,
    )
    return None


def probe(decode: Decode, device: torch.device) -> None:
    """Have a grey and a coloured picture decoded, and raise ValueError where they differ from the CPU's."""
    across = torch.linspace(16, 240, PROBE_SIDE).to(torch.uint8).expand(PROBE_SIDE, PROBE_SIDE)
    grey, coloured = across[..., None].contiguous(), torch.stack([across, across.T, 255 - across], 2)
    files = [
        simplejpeg.encode_jpeg(grey.numpy(), 95, "GRAY", "Gray"),
        simplejpeg.encode_jpeg(coloured.numpy(), 95, colorsubsampling="420"),
    ]
    images = decode([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])
    for file, image in zip(files, images, strict=True):
        expected = torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1)
        if image.device != device or image.dtype != torch.uint8 or image.shape != expected.shape:
            raise ValueError(f"it gives {image.dtype} {list(image.shape)} on {image.device}")
        off = (image.cpu().int() - expected.int()).abs().max().item()
        if off > PROBE_LEVELS:
            raise ValueError(f"its pixels are {off} levels off")


def takes_device_images(module: Module, device: torch.device) -> bool:
    """Whether the module's ``preprocess`` works for its example on ``device``; a line in the log where it does not.

    Some operations are there for bytes on the CPU only, such as torch's ``interpolate`` with antialias.
    """
    try:
        with torch.no_grad():
            module.preprocess(module.example().to(device))
    except Exception as error:
        log.warning(
            "decode_on_device: preprocess does not work with an image on the device, so all are decoded on the CPU",
            device=str(device),
            error=describe(error),
        )
        return False
    return True


class DeviceDecoder:
    """Makes samples of what the DataLoader left encoded.

    Each picture is told of by its number: to ``refused`` where the device does not decode it and the CPU is to try,
    else to ``done``, and to ``failed`` as well where the module's ``preprocess`` raised. ``busy`` is told which ones
    are at the device's decoder, and of none when it has finished: should they end the process, they are the suspects.
    """

    def __init__(
        self,
        module: Module,
        device: torch.device,
        decode: Decode,
        arena: mmap.mmap,
        stream: torch.cuda.Stream | None,
        *,
        done: Callable[[int], None],
        refused: Callable[[int], None],
        failed: Callable[[int, JobError], None],
        busy: Callable[[list[int]], None],
    ) -> None:
        self._module = module
        self._device = device
        self._decode = decode
        self._arena = memoryview(arena)
        self._stream = stream
        self._done = done
        self._refused = refused
        self._failed = failed
        self._busy = busy

    def prepare(self, samples: list[Sample]) -> list[Sample]:
        """The samples that can go on, in order, all of them preprocessed."""
        encoded = [sample for sample in samples if isinstance(sample.value, Encoded)]
        if not encoded:
            return samples
        self._busy([sample.number for sample in encoded])
        lost: set[int] = set()
        with self._on_stream(), torch.no_grad():
            for group in _groups(encoded):
                began = time.perf_counter()
                lost |= self._prepare(group)
                each_ms = (time.perf_counter() - began) * 1000 / len(group)
                for sample in group:
                    sample.preprocess_ms += each_ms
        self._busy([])
        return [sample for sample in samples if sample.number not in lost]

    def _prepare(self, group: list[Sample]) -> set[int]:
        """Decode and ``preprocess`` a group; the numbers of those that cannot go on from here."""
        self._synchronize()
        outcomes = [self._outcome(sample, image) for sample, image in zip(group, self._decoded(group), strict=True)]
        self._synchronize()  # if the device is lost by now, none of this is to be told: the process ends here
        lost = set()
        for sample, outcome in zip(group, outcomes, strict=True):
            if outcome is None:
                self._refused(sample.number)
                lost.add(sample.number)
                continue
            self._done(sample.number)
            sample.value, error = outcome
            if error is not None:
                self._failed(sample.number, error)
                lost.add(sample.number)
        return lost

    def _outcome(self, sample: Sample, image: torch.Tensor | None) -> tuple[Any, JobError | None] | None:
        """The sample, or what the module's ``preprocess`` raised; None where the CPU is to try."""
        if image is None:
            return None
        try:
            return guarded(partial(self._sample, image, sample.value), job=sample.number)
        except torch.OutOfMemoryError:
            return None

    def _sample(self, image: torch.Tensor, encoded: Encoded) -> Any:
        return self._module.preprocess(turned(image, encoded.jpeg.orientation))

    def _decoded(self, group: list[Sample]) -> list[torch.Tensor | None]:
        """The pictures as they are stored; None for those that are refused, found by trying one by one."""
        try:
            images = self._decode([self._file(sample.value) for sample in group])
            for sample, image in zip(group, images, strict=True):
                jpeg = sample.value.jpeg
                if image.shape != (3, jpeg.height, jpeg.width):
                    raise ValueError(f"{jpeg.width}x{jpeg.height} pixels became {list(image.shape)}")
            return list(images)
        except Exception as error:
            text = describe(error)
        self._synchronize()  # raises again, and so ends this process, if the device is lost for it
        if len(group) == 1:
            log.info("the device does not decode a picture; the CPU does", job=group[0].number, error=text)
            return [None]
        return [image for sample in group for image in self._decoded([sample])]

    def _file(self, encoded: Encoded) -> torch.Tensor:
        """The file's bytes, without the name of the EXIF block: some decoders would turn the picture by it."""
        data = bytearray(self._arena[encoded.offset : encoded.offset + encoded.jpeg.length])
        if encoded.jpeg.exif is not None:
            data[encoded.jpeg.exif] = 0
        return torch.frombuffer(data, dtype=torch.uint8)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _synchronize(self) -> None:
        """Wait for the stream, and raise if the device is lost.

        Before decoding, because decoders have streams of their own, which know nothing of memory in use on this one.
        """
        if self._stream is not None:
            self._stream.synchronize()


def _groups(samples: list[Sample]) -> Iterator[list[Sample]]:
    """In order, each of no more than :data:`PIXELS_TOGETHER`."""
    group: list[Sample] = []
    pixels = 0
    for sample in samples:
        size = sample.value.jpeg.width * sample.value.jpeg.height
        if group and pixels + size > PIXELS_TOGETHER:
            yield group
            group, pixels = [], 0
        group.append(sample)
        pixels += size
    yield group


def _torchcodec(device: torch.device) -> Decode:
    from torchcodec.decoders import decode_jpeg

    return lambda files: list(decode_jpeg(files, mode="RGB", device=device))


def _torchvision(device: torch.device) -> Decode:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda files: list(decode_jpeg(files, ImageReadMode.RGB, device))
