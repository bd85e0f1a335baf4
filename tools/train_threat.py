"""Trains the threat classifier that cvworker ships, on pictures that it draws.

    python tools/train_threat.py --output src/cvworker/modules/weights/threat.safetensors

Everything follows from ``--seed``: the same command on the same machine gives the same weights. Pictures to train on,
to choose the thresholds on and to test on are drawn from seeds of their own, and the demo and the tests use others.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import io
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.models
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from cvworker.embedded import pictures
from cvworker.modules.threat import Threat

ARCHITECTURE = "shufflenet_v2_x0_5"  # the smallest in torchvision: 1.4 MB, and an hour's training is not needed
INPUT_SIZE, SMALL_SIZE = 128, 96  # pixels a side; the smaller one is for most of the training only
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which everyone's weights use
TRAIN, VALIDATE, TEST = 1_000_000, 2_000_000, 3_000_000  # first seeds; the demo counts from 0
OBJECTS = (*pictures.THREATS, *pictures.HARMLESS)  # harmless ones are learned too: telling them apart is the task
OPTIONS = ("seed", "pictures", "epochs", "batch_size", "lr", "threads")  # what the weights follow from
RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.LANCZOS)


def sample(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture as a client's might arrive: ``uint8 [S, S, 3]``, and which of ``OBJECTS`` it shows, ``uint8 [8]``.

    Sizes, JPEG qualities, scaled decoding and the method of resizing all vary, so that none of them matters later.
    """
    rng = np.random.default_rng([seed, 1])
    width, height = pictures.SIZES[rng.integers(len(pictures.SIZES))]
    divisor = rng.choice([1, 2, 3], p=[0.1, 0.6, 0.3])  # small ones are drawn several times as fast
    drawn = pictures.draw(seed, (max(INPUT_SIZE, width // divisor), max(INPUT_SIZE, height // divisor)))
    image = drawn.image
    if rng.random() < 0.8:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=int(rng.integers(35, 96)), subsampling=int(rng.integers(3)))
        image = Image.open(data)
        if rng.random() < 0.5:
            image.draft("RGB", (INPUT_SIZE, INPUT_SIZE))
    image = image.convert("RGB").resize((INPUT_SIZE, INPUT_SIZE), RESAMPLING[rng.integers(len(RESAMPLING))])
    shown = {item.label for item in drawn.objects}
    return np.asarray(image), np.array([label in shown for label in OBJECTS], dtype=np.uint8)


def dataset(first: int, count: int) -> tuple[Tensor, Tensor]:
    """``uint8 [count, 3, S, S]`` and ``float32 [count, 8]``, from a cache where this code drew them before."""
    code = Path(pictures.__file__).read_text() + inspect.getsource(sample)
    name = f"{first}-{count}-{hashlib.sha256(code.encode()).hexdigest()[:12]}.npz"
    cache = Path(tempfile.gettempdir()) / "cvworker-train" / name
    if not cache.exists():
        begun = time.monotonic()
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(sample, range(first, first + count), chunksize=100))
        images, labels = (np.stack(parts) for parts in zip(*drawn, strict=True))
        cache.parent.mkdir(exist_ok=True)
        np.savez(cache, images=images, labels=labels)
        print(f"drew {count} pictures from seed {first} in {time.monotonic() - begun:.0f} s", flush=True)
    stored = np.load(cache)
    return torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        stored["labels"]
    ).float()


def augment(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Mirror half; move, scale and recolour all a little: ``uint8 [N, 3, S, S]`` to ``float32 [N, 3, side, side]``."""
    count = len(images)

    def around(middle: float, by: float, *shape: int) -> Tensor:
        return middle + by * (2 * torch.rand(count, *shape, generator=generator) - 1)

    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = around(1, 0.1) * around(0, 1).sign()
    matrix[:, 1, 1] = around(1, 0.1)
    matrix[:, :, 2] = around(0, 0.1, 2)
    grid = functional.affine_grid(matrix, [count, 3, side, side], align_corners=False)
    moved = functional.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    middle = moved.mean(dim=(1, 2, 3), keepdim=True)
    return ((moved - middle) * around(1, 0.25, 1, 1, 1) + middle).mul(around(1, 0.15, 3, 1, 1)).clamp(0, 1)


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def train(images: Tensor, labels: Tensor, args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    network: nn.Module = torchvision.models.get_model(ARCHITECTURE, weights=None, num_classes=len(OBJECTS))
    network = network.to(device).to(memory_format=torch.channels_last)
    steps = len(images) // args.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, epochs=args.epochs, steps_per_epoch=steps)
    begun = time.process_time()
    for epoch in range(args.epochs):
        network.train()
        total = 0.0
        # most of the way on smaller pictures, at half the cost; the layers work at any size
        side = SMALL_SIZE if epoch < args.epochs * 0.6 else INPUT_SIZE
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = normalise(augment(images[chosen], side, generator).to(device))
            output = network(batch.contiguous(memory_format=torch.channels_last))
            loss = functional.binary_cross_entropy_with_logits(output, labels[chosen].to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2}: loss {total / steps:.4f}, {time.process_time() - begun:.0f} s", flush=True)
    return network.eval()


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """The scores of the threats, ``float32 [N, 4]``."""
    chunks = torch.split(images, 256)
    scores = [network(normalise(chunk.to(device).float() / 255)).sigmoid().cpu() for chunk in chunks]
    return torch.cat(scores)[:, : len(pictures.THREATS)]


def choose_thresholds(scores: Tensor, shown: Tensor) -> dict[str, float]:
    """For each threat the threshold nearest to 0.5 that makes about the fewest mistakes.

    Up to one more per thousand pictures is allowed: the very best one would fit these pictures' few hard cases.
    """
    candidates = sorted((number / 100 for number in range(5, 96)), key=lambda number: abs(number - 0.5))
    thresholds = {}
    for index, label in enumerate(pictures.THREATS):
        mistakes = [int(((scores[:, index] >= number) != shown[:, index]).sum()) for number in candidates]
        allowed = min(mistakes) + len(scores) // 1000
        thresholds[label] = next(n for n, count in zip(candidates, mistakes, strict=True) if count <= allowed)
    return thresholds


def evaluate(weights: Path, first: int, count: int) -> dict[str, float]:
    """What the module itself answers on pictures at full size, as a worker would run it."""
    module = Threat(weights)
    module.setup(torch.device("cpu"))
    exact = verdicts = 0
    for start in range(first, first + count, 50):
        drawn = [pictures.draw(seed) for seed in range(start, min(start + 50, first + count))]
        tensors = [torch.from_numpy(np.asarray(one.image).copy()).permute(2, 0, 1) for one in drawn]
        with torch.inference_mode():
            results = module.process(module.collate([module.preprocess(tensor) for tensor in tensors]))
        for one, result in zip(drawn, results, strict=True):
            exact += {found["label"] for found in result["labels"]} == one.labels
            verdicts += (result["verdict"] == "threat") == bool(one.labels)
    return {"label_sets": round(exact / count, 4), "verdicts": round(verdicts / count, 4), "pictures": count}


def save(network: nn.Module, path: Path, thresholds: dict[str, float], notes: dict[str, str]) -> None:
    """Write the network as one for the threats alone: the last layer's rows for harmless objects are left out."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = tensors[name][: len(pictures.THREATS)].clone()
    metadata = {
        "architecture": ARCHITECTURE,
        "classes": json.dumps(pictures.THREATS),
        "input_size": json.dumps(INPUT_SIZE),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "thresholds": json.dumps(thresholds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata | notes)
    path.chmod(0o644)  # safetensors makes files that only their owner can read, and containers run as someone else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=20_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="fixed, since sums depend on how they are split")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    # it costs a tenth of the time, and nothing here reads such memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    finish(train(*dataset(TRAIN, args.pictures), args, device), args, device)


def finish(network: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Choose the thresholds, write the file, measure it and write that into it too."""
    images, labels = dataset(VALIDATE, 2000)
    scores, shown = predict(network, images, device), labels[:, : len(pictures.THREATS)].bool()
    thresholds = choose_thresholds(scores, shown)
    right = ((scores >= torch.tensor(list(thresholds.values()))) == shown).all(dim=1).float().mean()
    print(f"validation: {right:.4f} of label sets right, thresholds {thresholds}", flush=True)

    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in OPTIONS)
    notes = {"seed": str(args.seed), "command": f"python tools/train_threat.py {options}"}
    save(network, args.output, thresholds, notes)
    accuracy = evaluate(args.output, TEST, 1000)
    save(network, args.output, thresholds, notes | {"accuracy": json.dumps(accuracy)})
    print(f"test: {accuracy}; {args.output} has {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic sums need on a GPU
    main()
