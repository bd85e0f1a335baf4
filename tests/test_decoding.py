"""Decoding on the device, with a stand-in for the device's decoder: what goes there, what comes back, what fails."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
import torch
from PIL import Image
from structlog.testing import capture_logs

from cvworker import Module, images
from cvworker.baseline import baseline
from cvworker.clock import Clock
from cvworker.embedded import pictures
from cvworker.errors import JobError, StartupError
from cvworker.loading import load
from cvworker.model import decoding
from cvworker.model.batcher import Sample
from cvworker.model.decoding import DeviceDecoder
from cvworker.model.precision import difference
from cvworker.model.preprocess import Encoded
from cvworker.modules.threat import Threat
from fakes import a_job
from hostile_images import EXIF, encode, exif, photo
from modules import on_device
from test_inference import Line, a_config

ON_DEVICE = f"{Path(__file__).parent / 'modules' / 'on_device.py'}:OnDevice"
CPU = torch.device("cpu")
LIMIT = 10_000_000
RED, GREEN, BLUE, GREY = (254, 0, 0), (0, 254, 0), (0, 0, 254), (90, 100, 110)


def plain(colour: tuple[int, int, int] = GREY, kind: str = "JPEG", **options: Any) -> bytes:
    return encode(Image.new("RGB", (48, 32), colour), kind, **options)


class Bench:
    """A decoder with its arena, and what it was told."""

    def __init__(self, *files: bytes, module: Module | None = None, decode: Any = on_device.decode) -> None:
        self.arena = mmap.mmap(-1, sum(map(len, files)))
        self.samples: list[Sample] = []
        for number, data in enumerate(files, 1):
            jpeg = baseline(memoryview(data), LIMIT)
            assert jpeg is not None
            self.samples.append(Sample(number, Encoded(self.arena.tell(), jpeg), 1.0))
            self.arena.write(data)
        self.calls: list[int] = []
        self.done: list[int] = []
        self.refused: list[int] = []
        self.failed: dict[int, JobError] = {}
        self.busy: list[list[int]] = []
        self._decode = decode
        self.decoder = DeviceDecoder(
            module or Upright(),
            CPU,
            self._counted,
            self.arena,
            None,
            done=self.done.append,
            refused=self.refused.append,
            failed=self.failed.__setitem__,
            busy=self.busy.append,
        )

    def _counted(self, files: list[torch.Tensor]) -> list[torch.Tensor]:
        self.calls.append(len(files))
        return list(self._decode(files))

    def prepare(self) -> list[Sample]:
        return self.decoder.prepare(self.samples)


class Upright(Module):
    """The picture as it is; greens are refused."""

    def preprocess(self, image: Any) -> Any:
        if int(image[1, 0, 0]) > 200 and int(image[0, 0, 0]) < 50:
            raise ValueError("this picture is too green")
        return image

    def process(self, batch: Any) -> Any:
        return [{}] * len(batch)


# --- What becomes of a batch


def test_a_batch_is_decoded_at_once_and_comes_out_in_order() -> None:
    shades = [(n, 100, 100) for n in (60, 90, 120)]
    bench = Bench(*map(plain, shades))
    ready = bench.prepare()
    assert bench.calls == [3]
    assert [int(sample.value[0, 0, 0]) for sample in ready] == pytest.approx([60, 90, 120], abs=2)
    assert bench.done == [1, 2, 3]
    assert not bench.refused
    assert not bench.failed
    assert all(sample.preprocess_ms > 1 for sample in ready)


def test_samples_that_the_cpu_has_prepared_pass_by() -> None:
    bench = Bench(plain())
    mixed = [Sample(8, torch.ones(2), 1.0), *bench.samples, Sample(9, torch.ones(2), 1.0)]
    assert [sample.number for sample in bench.decoder.prepare(mixed)] == [8, 1, 9]
    assert bench.decoder.prepare(mixed[:1]) == mixed[:1]
    assert bench.calls == [1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_exif_says_once_whatever_the_decoder_does_with_exif(orientation: int) -> None:
    # given a decoder that would turn it, too
    data = encode(photo(60, 40), "JPEG", exif=EXIF + exif(orientation), subsampling=0)

    def turns(files: list[torch.Tensor]) -> list[torch.Tensor]:
        assert b"Exif" not in bytes(files[0].numpy())
        return on_device.decode(files)

    # then it comes out as from the CPU
    (sample,) = Bench(data, decode=turns).prepare()
    expected = images.decode(data)
    assert isinstance(expected, torch.Tensor)
    assert sample.value.shape == expected.shape
    assert (sample.value.int() - expected.int()).abs().float().mean() < 3


def test_what_the_device_refuses_is_found_one_by_one_and_left_to_the_cpu() -> None:
    bench = Bench(plain(), plain(RED), plain())
    assert [sample.number for sample in bench.prepare()] == [1, 3]
    assert bench.calls == [3, 1, 1, 1]
    assert bench.refused == [2]
    assert bench.done == [1, 3]
    assert not bench.failed


def test_a_picture_of_another_size_than_its_header_says_is_left_to_the_cpu() -> None:
    bench = Bench(plain(), decode=lambda files: [torch.zeros(3, 32, 40, dtype=torch.uint8) for _ in files])
    assert bench.prepare() == []
    assert bench.refused == [1]


def test_a_preprocess_that_raises_fails_its_own_picture_only() -> None:
    bench = Bench(plain(), plain(GREEN))
    assert [sample.number for sample in bench.prepare()] == [1]
    assert bench.failed[2].code == "preprocess_failed"
    assert bench.done == [1, 2]
    assert not bench.refused


def test_where_the_device_has_no_memory_for_a_picture_the_cpu_tries() -> None:
    class Large(Upright):
        def preprocess(self, image: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench = Bench(plain(), module=Large())
    assert bench.prepare() == []
    assert bench.refused == [1]
    assert not bench.failed


def test_only_so_many_pixels_are_on_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIXELS_TOGETHER", 2 * 48 * 32)
    bench = Bench(*[plain()] * 3, encode(photo(200, 100), "JPEG"), plain())
    assert len(bench.prepare()) == 5
    assert bench.calls == [2, 1, 1, 1]


def test_it_is_told_which_pictures_are_at_the_decoder() -> None:
    seen: list[list[int]] = []

    def looks(files: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(bench.busy[-1])
        return on_device.decode(files)

    bench = Bench(plain(), plain(), decode=looks)
    bench.prepare()
    assert seen == [[1, 2]]
    assert bench.busy == [[1, 2], []]


# --- Whether it is used


def test_a_decoder_is_tried_before_it_is_used() -> None:
    decoding.probe(on_device.decode, CPU)
    for wrong in (
        lambda files: [255 - image for image in on_device.decode(files)],
        lambda files: [image[:1] for image in on_device.decode(files)],
        lambda files: on_device.decode(files)[:1],
    ):
        with pytest.raises(ValueError, match=r"levels off|gives|shorter"):
            decoding.probe(wrong, CPU)


def test_the_cpu_is_no_device_to_decode_on() -> None:
    assert decoding.decoder_for(CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_where_nothing_decodes_on_the_device_one_line_says_so() -> None:
    with capture_logs() as lines:
        assert decoding.decoder_for(torch.device("cuda:0")) is None
    assert [line["log_level"] for line in lines] == ["warning"]
    assert "decoded on the CPU" in lines[0]["event"]
    assert "cvworker[gpu]" in lines[0]["event"]
    assert lines[0]["torchvision"]


def test_a_preprocess_that_cannot_work_there_keeps_decoding_on_the_cpu() -> None:
    class Picky(Upright):
        def preprocess(self, image: Any) -> Any:
            raise RuntimeError("not implemented for 'Byte'")

    assert decoding.takes_device_images(Upright(), CPU)
    with capture_logs() as lines:
        assert not decoding.takes_device_images(Picky(), CPU)
    assert "decoded on the CPU" in lines[0]["event"]
    assert lines[0]["error"] == "RuntimeError: not implemented for 'Byte'"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_decodes_as_the_cpu_does() -> None:
    device = torch.device("cuda:0")
    decode = decoding.decoder_for(device)
    assert decode is not None
    files = [encode(photo(640, 427, seed), "JPEG", quality=90) for seed in range(9)]
    found = decode([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])
    for file, image in zip(files, found, strict=True):
        expected = images.decode(file)
        assert isinstance(expected, torch.Tensor)
        assert (image.cpu().int() - expected.int()).abs().float().mean() < 2


def test_a_module_that_takes_pil_images_cannot_ask_for_it(tmp_path: Path) -> None:
    file = tmp_path / "pil_on_device.py"
    file.write_text(
        "from cvworker import Module\nclass M(Module):\n    image_type = 'pil'\n    decode_on_device = True\n"
        "    def preprocess(self, image): ...\n    def process(self, batch): ...\n"
    )
    with pytest.raises(StartupError, match="needs the image_type 'tensor'"):
        load(f"{file}:M")


def test_a_networks_answers_agree_with_those_from_the_cpu() -> None:
    # given a trained network, and pictures with sharp colours, compressed as cameras do
    module = Threat(Threat.demo_weights)
    module.setup(CPU)
    files = [encode(pictures.draw(7_000_000 + n, (640, 480)).image, "JPEG", quality=85) for n in range(16)]
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]

    def answers(decoded: list[Any]) -> Any:
        with torch.inference_mode():
            done = module.process(module.collate([module.preprocess(image) for image in decoded]))
        return json.loads(json.dumps([answer["scores"] for answer in done]))

    # then they are what `precision: auto` takes for the same, too
    expected = answers([images.decode(file) for file in files])
    assert difference(expected, answers(on_device.decode(tensors))) is None
    assert simplejpeg.is_jpeg(files[0])


# --- Through real processes


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    config = a_config(ON_DEVICE, batch_size=4)
    running = Line(config, Clock())
    running.step.start()
    yield running
    running.inbox.close()
    running.step.stop(10)


def through(line: Line, *files: bytes) -> list[Any]:
    jobs = [a_job() for _ in files]
    for job, data in zip(jobs, files, strict=True):
        line.put(job, image=data)
    return line.wait(*jobs)


def test_plain_jpegs_are_prepared_where_process_runs_and_the_others_where_they_always_are(line: Line) -> None:
    jpeg, progressive, png = plain(), plain(progressive=True), plain(kind="PNG")
    found = through(line, jpeg, png, jpeg, progressive, jpeg)
    assert [each["on_device"] for each in found] == [True, False, True, False, True]
    for each in found:
        assert each["mean"] == pytest.approx(GREY, abs=2)


def test_what_the_device_refuses_gets_the_usual_answer(line: Line) -> None:
    red, other, damaged = through(line, plain(RED), plain(), plain(RED)[:300])
    assert red["on_device"] is False
    assert red["mean"] == pytest.approx(RED, abs=2)
    assert other["on_device"] is True
    assert damaged.code == "image_invalid"


def test_too_many_pixels_are_refused_before_they_are_anywhere_near_the_device(line: Line) -> None:
    (found,) = through(line, encode(Image.new("RGB", (4000, 2600)), "JPEG"))
    assert found.code == "image_too_large"


def test_a_picture_that_the_module_dislikes_fails_alone(line: Line) -> None:
    green, other = through(line, plain((0, 255, 0), quality=100), plain())
    assert green.code == "preprocess_failed"
    assert other["on_device"] is True


def test_a_picture_that_ends_the_process_in_the_decoder_is_answered_from_the_cpu(line: Line) -> None:
    # when the stand-in aborts on one of these
    blue, other = through(line, plain(BLUE), plain())
    # then that one was decoded apart, in a new process, and nobody failed
    assert blue["on_device"] is False
    assert blue["mean"] == pytest.approx(BLUE, abs=2)
    assert other["mean"] == pytest.approx(GREY, abs=2)
    assert line.step.restarts == 1
    assert line.step.failure is None


def test_a_stop_waits_for_what_the_device_has_refused() -> None:
    # given pictures that all come back from the device, handed over together
    line = Line(a_config(ON_DEVICE, batch_size=4), Clock())
    jobs = [job for _ in range(6) for job in line.put(a_job(), image=plain(RED))]
    line.step.start()
    line.wait(jobs[0])
    # when no more will come
    line.inbox.close()
    line.step.stop(30)
    # then all are answered, from the CPU
    assert [line.ended[job.number]["on_device"] for job in jobs] == [False] * 6
    assert not line.step.held()
