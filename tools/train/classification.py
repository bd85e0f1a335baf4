"""The classifiers: threats, several labels at once, and scenes, one label each."""

from __future__ import annotations

import argparse
from pathlib import Path

import drawn
import fitting
import numpy as np
import torch
import torchvision.models
from augment import augment
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from cvworker.embedded import pictures, scenes
from cvworker.modules.classifier import Classifier
from cvworker.modules.scene import Scene
from cvworker.modules.threat import Threat

ARCHITECTURE = "shufflenet_v2_x0_5"  # the smallest in torchvision: they travel in the package
INPUT_SIZE, SMALL_SIZE = 128, 96  # pixels a side
OBJECTS = (*pictures.THREATS, *pictures.HARMLESS)  # harmless ones are learned too: telling them apart is the task
DEFAULTS = {
    "threat": {"pictures": 20_000, "epochs": 12, "batch_size": 64, "lr": 3e-3, "threads": 1},
    "scene": {"pictures": 5_000, "epochs": 3, "batch_size": 32, "lr": 2e-3, "threads": 1},
}


def threat_sample(seed: int) -> dict[str, np.ndarray]:
    """A picture, and which of ``OBJECTS`` it shows, ``uint8 [8]``."""
    image, picture = drawn.arrived(pictures, seed, INPUT_SIZE)
    shown = {item.label for item in picture.objects}
    return {"images": image.transpose(2, 0, 1), "labels": np.array([label in shown for label in OBJECTS], np.uint8)}


def scene_sample(seed: int) -> dict[str, np.ndarray]:
    """A scene, and the number of its kind."""
    image, picture = drawn.arrived(scenes, seed, INPUT_SIZE)
    [label] = picture.labels
    return {"images": image.transpose(2, 0, 1), "labels": np.array(scenes.SCENES.index(label))}


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (fitting.MEAN, fitting.STD))
    return (images - mean) / std


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train, write the file, measure it and write that into it too."""
    source, sample = (pictures, threat_sample) if args.module == "threat" else (scenes, scene_sample)
    data = drawn.dataset(source, sample, INPUT_SIZE, drawn.TRAIN, args.pictures)
    network = _train(data["images"], data["labels"], args, device)
    metadata = {
        "architecture": ARCHITECTURE,
        "input_size": INPUT_SIZE,
        "mean": fitting.MEAN,
        "std": fitting.STD,
    }
    if args.module == "threat":
        tensors = _threats_alone(network)
        metadata |= {"classes": pictures.THREATS, "thresholds": choose_thresholds(network, device)}
    else:
        tensors = fitting.halved(network.state_dict())
        metadata |= {"classes": scenes.SCENES}
    notes = fitting.notes(args)
    fitting.save(args.output, tensors, metadata, notes)
    accuracy = evaluate(args.output, 1000, args.module)
    fitting.save(args.output, tensors, metadata | {"accuracy": accuracy}, notes)
    fitting.report(args.output, accuracy)


def _train(images: Tensor, labels: Tensor, args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    several = labels.dim() == 2
    outputs = len(OBJECTS) if several else len(scenes.SCENES)
    network: nn.Module = torchvision.models.get_model(ARCHITECTURE, weights=None, num_classes=outputs)
    if not several:
        begin_with_threat(network)
    network = network.to(device).to(memory_format=torch.channels_last)

    def loss(chosen: Tensor, side: int) -> Tensor:
        batch = normalise(augment(images[chosen], side, generator)[0].to(device))
        output = network(batch.contiguous(memory_format=torch.channels_last))
        wanted = labels[chosen].to(device)
        if several:
            return functional.binary_cross_entropy_with_logits(output, wanted.float())
        return functional.cross_entropy(output, wanted)

    fitting.fit(network, loss, args, generator, (SMALL_SIZE, INPUT_SIZE))
    return network


def begin_with_threat(network: nn.Module) -> None:
    """Give a ShuffleNet without its last layer what the threat classifier has learned; its first layers stay so.

    That takes a fraction of what training from nothing does, and saves the costliest part of each step.
    """
    known = {name: value for name, value in load_file(Threat.demo_weights).items() if not name.startswith("fc.")}
    network.load_state_dict(known, strict=False)
    for name, weight in network.named_parameters():
        weight.requires_grad_(not name.startswith(("conv1.", "stage2.")))


def _threats_alone(network: nn.Module) -> dict[str, Tensor]:
    """The network's tensors as one for the threats: the last layer's rows for harmless objects are left out."""
    rows = {
        name: value[: len(pictures.THREATS)].clone() for name, value in network.state_dict().items() if "fc." in name
    }
    return {**network.state_dict(), **rows}


@torch.inference_mode()
def choose_thresholds(network: nn.Module, device: torch.device) -> dict[str, float]:
    """For each threat the threshold nearest to 0.5 that makes about the fewest mistakes.

    Up to one more per thousand pictures is allowed: the very best one would fit these pictures' few hard cases.
    """
    data = drawn.dataset(pictures, threat_sample, INPUT_SIZE, drawn.VALIDATE, 2000)
    chunks = torch.split(data["images"], 256)
    scores = torch.cat([network(normalise(chunk.to(device).float() / 255)).sigmoid().cpu() for chunk in chunks])
    shown = data["labels"].bool()
    candidates = sorted((number / 100 for number in range(5, 96)), key=lambda number: abs(number - 0.5))
    thresholds = {}
    for index, label in enumerate(pictures.THREATS):
        mistakes = [int(((scores[:, index] >= number) != shown[:, index]).sum()) for number in candidates]
        allowed = min(mistakes) + len(scores) // 1000
        thresholds[label] = next(n for n, count in zip(candidates, mistakes, strict=True) if count <= allowed)
    print(f"validation: thresholds {thresholds}", flush=True)
    return thresholds


def evaluate(weights: Path, count: int, name: str, first: int = drawn.TEST) -> dict[str, float]:
    """What the module itself answers on pictures at full size, as a worker would run it."""
    module: Classifier = Threat(weights) if name == "threat" else Scene(weights)
    module.setup(torch.device("cpu"))
    exact = verdicts = 0
    for start in range(first, first + count, 50):
        shown = [
            (pictures if name == "threat" else scenes).draw(seed)
            for seed in range(start, min(start + 50, first + count))
        ]
        tensors = [torch.from_numpy(np.array(one.image)).permute(2, 0, 1) for one in shown]
        with torch.inference_mode():
            results = module.process(module.collate([module.preprocess(tensor) for tensor in tensors]))
        for one, result in zip(shown, results, strict=True):
            if name == "scene":
                exact += {result["label"]} == one.labels
            else:
                exact += {found["label"] for found in result["labels"]} == one.labels
                verdicts += (result["verdict"] == "threat") == bool(one.labels)
    if name == "scene":
        return {"top_1": round(exact / count, 4), "pictures": count}
    return {"label_sets": round(exact / count, 4), "verdicts": round(verdicts / count, 4), "pictures": count}
