"""Torchvision's box detectors as networks that can be exported: one batch in, boxes, scores and labels out.

Torchvision goes over a batch picture by picture, with as many boxes for each as there happen to be, which no exporter
can follow. Here a whole batch is kept together: candidates are the best few of each class or level, as torchvision has
them, what scores too little stays with the score 0, and one call of :func:`torchvision.ops.nms` serves all pictures.
The parts of the network, and the arithmetic of its boxes, are torchvision's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image, nms, roi_align

Found = tuple[Tensor, Tensor, Tensor]
"""Boxes ``float32 [N, K, 4]``, scores ``[N, K]`` and labels ``int64 [N, K]``."""

SMALLEST = 1e-2
"""Pixels: Faster R-CNN drops boxes with a smaller side, as torchvision's does."""


def exportable(detector: nn.Module, side: int) -> nn.Module:
    """``detector`` as a network from ``float32 [N, 3, side, side]``, normalised, to :data:`Found`.

    Its score threshold and the most objects of a picture, K, are the detector's own; places without an object have the
    score 0.

    Raises:
        TypeError: it is none of torchvision's SSD, Faster R-CNN, RetinaNet and FCOS.
    """
    for kind, cls in {SSD: _Ssd, FasterRCNN: _FasterRcnn, RetinaNet: _Dense, FCOS: _Dense}.items():
        if isinstance(detector, kind):
            made: nn.Module = cls(detector, side).eval()
            return made
    raise TypeError(f"{type(detector).__name__} is none of torchvision's SSD, Faster R-CNN, RetinaNet and FCOS")


def best(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, overlap: float, count: int
) -> tuple[Tensor, Tensor]:
    """Scores and places ``[N, K]`` of the ``count`` best of the candidates ``[N, M]``, after suppression in each group.

    Candidates of one picture and one group (a class or a level) that share more than ``overlap`` of their union with a
    better one are dropped, and so are those whose score is not over ``threshold``: their scores become 0.

    Every picture gets a column of its own and every group a row, so that boxes of different ones never meet. Side by
    side in both directions the coordinates stay small enough for float32: 64 pictures of 640 pixels and 90 classes
    still leave steps of 0.004 pixels.
    """
    rows, places = (scores > threshold).nonzero(as_tuple=True)
    chosen, weights, group = boxes[rows, places], scores[rows, places], groups[rows, places]
    apart = chosen + torch.stack([rows, group, rows, group], 1) * (boxes.max() + 1)
    # torch.export takes it that nms keeps two boxes at least: two that touch no other come first
    apart = torch.cat([boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]]), apart])
    kept = nms(apart, torch.cat([weights.new_zeros(2), weights]), overlap)
    is_kept = weights.new_zeros(apart.shape[0]).index_fill(0, kept, 1)[2:]
    survived = torch.zeros_like(scores).index_put((rows, places), weights * is_kept)
    top = survived.topk(min(count, scores.shape[1]), 1)
    return top.values, top.indices


class _Detector(nn.Module):
    """What all have in common: ``detector`` is torchvision's, ``side`` that of the square it takes, in pixels."""

    anchors: Tensor

    def __init__(self, detector: Any, side: int) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self._side = side
        self._padding = -side % detector.transform.size_divisible

    def _features(self, batch: Tensor) -> dict[str, Tensor]:
        features = self.backbone(functional.pad(batch, (0, self._padding, 0, self._padding)))
        return {"0": features} if isinstance(features, Tensor) else features

    def _anchors(self, generator: nn.Module, maps: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """The boxes that the network starts from, ``[A, 4]``, and the size of each feature map in cells."""
        weight = next(self.backbone.parameters())
        picture = weight.new_zeros(1, 3, self._side, self._side)
        with torch.no_grad():
            features = list(self._features(picture).values())
            features = features if maps is None else [features[index] for index in maps]
            padded = functional.pad(picture, (0, self._padding, 0, self._padding))
            anchors = generator(ImageList(padded, [(self._side, self._side)]), features)[0]
        return anchors, [each.shape[-2] * each.shape[-1] for each in features]

    def _inside(self, boxes: Tensor) -> Tensor:
        clipped: Tensor = clip_boxes_to_image(boxes, (self._side, self._side))
        return clipped


def _decoded(coder: Any, codes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes from what the network says relative to ``anchors``: both are ``[N, M, 4]``, and so is the result."""
    decoded: Tensor = coder.decode_single(codes.flatten(0, 1), anchors.flatten(0, 1))
    return decoded.view(codes.shape)


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """The boxes ``[N, K, 4]`` at ``places [N, K]`` of ``values [N, M, 4]``."""
    return values.gather(1, places[..., None].expand(-1, -1, 4))


class _Ssd(_Detector):
    """SSD and SSDLite: the best candidates of each class."""

    def __init__(self, detector: Any, side: int) -> None:
        super().__init__(detector, side)
        self.head, self._coder = detector.head, detector.box_coder
        self._threshold, self._overlap = detector.score_thresh, detector.nms_thresh
        self._candidates, self._count = detector.topk_candidates, detector.detections_per_img
        self.register_buffer("anchors", self._anchors(detector.anchor_generator)[0], persistent=False)

    def forward(self, batch: Tensor) -> Found:
        outputs = self.head(list(self._features(batch).values()))
        anchors = self.anchors.expand(batch.shape[0], -1, -1)
        boxes = self._inside(_decoded(self._coder, outputs["bbox_regression"], anchors))
        scores = outputs["cls_logits"].softmax(-1)[..., 1:].transpose(1, 2)
        top = scores.topk(min(self._candidates, scores.shape[2]), 2)
        labels = torch.arange(1, scores.shape[1] + 1, device=batch.device)[:, None].expand_as(top.indices).flatten(1)
        candidates = _picked(boxes, top.indices.flatten(1))
        kept, places = best(candidates, top.values.flatten(1), labels, self._threshold, self._overlap, self._count)
        return _picked(candidates, places), kept, labels.gather(1, places)


class _Dense(_Detector):
    """RetinaNet and FCOS: the best candidates of each feature map."""

    def __init__(self, detector: Any, side: int) -> None:
        super().__init__(detector, side)
        self.head, self._coder = detector.head, detector.box_coder
        self._threshold, self._overlap = detector.score_thresh, detector.nms_thresh
        self._candidates, self._count = detector.topk_candidates, detector.detections_per_img
        generator = detector.anchor_generator
        anchors, cells = self._anchors(generator)
        self.register_buffer("anchors", anchors, persistent=False)
        self._sizes = [n * each for n, each in zip(cells, generator.num_anchors_per_location(), strict=True)]

    def forward(self, batch: Tensor) -> Found:
        outputs = self.head(list(self._features(batch).values()))
        scores = outputs["cls_logits"].sigmoid()
        if "bbox_ctrness" in outputs:
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        classes = scores.shape[2]
        parts: list[Found] = []
        starts = [sum(self._sizes[:index]) for index in range(len(self._sizes) + 1)]
        for start, end in pairwise(starts):
            level = scores[:, start:end].flatten(1)
            top = level.topk(min(self._candidates, level.shape[1]), 1)
            place = top.indices // classes + start
            codes = _picked(outputs["bbox_regression"], place)
            parts.append((self._boxes(codes, place), top.values, top.indices % classes))
        boxes, values, labels = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        kept, places = best(boxes, values, labels, self._threshold, self._overlap, self._count)
        return _picked(boxes, places), kept, labels.gather(1, places)

    def _boxes(self, codes: Tensor, place: Tensor) -> Tensor:
        anchors = self.anchors[place]
        if hasattr(self._coder, "decode_single"):
            return self._inside(_decoded(self._coder, codes, anchors))
        return self._inside(self._coder.decode(codes, anchors))


class _FasterRcnn(_Detector):
    """Faster R-CNN: the best proposals of each feature map, and the classes of what they show."""

    def __init__(self, detector: Any, side: int) -> None:
        super().__init__(detector, side)
        self.rpn_head, self.roi = detector.rpn.head, detector.roi_heads
        self._rpn_coder, self._rpn_overlap = detector.rpn.box_coder, detector.rpn.nms_thresh
        self._candidates, self._proposals = detector.rpn.pre_nms_top_n(), detector.rpn.post_nms_top_n()
        self._rpn_threshold, self._smallest = detector.rpn.score_thresh, detector.rpn.min_size
        generator = detector.rpn.anchor_generator
        anchors, cells = self._anchors(generator)
        self.register_buffer("anchors", anchors, persistent=False)
        self._sizes = [n * each for n, each in zip(cells, generator.num_anchors_per_location(), strict=True)]
        self._know_scales()

    def _know_scales(self) -> None:
        """The pool finds out at its first call which feature map is how much smaller than the picture."""
        weight = next(self.backbone.parameters())
        with torch.no_grad():
            features = self._features(weight.new_zeros(1, 3, self._side, self._side))
            self.roi.box_roi_pool(features, [weight.new_tensor([[0.0, 0.0, 8.0, 8.0]])], [(self._side, self._side)])

    def forward(self, batch: Tensor) -> Found:
        features = self._features(batch)
        proposals, promise = self._propose(list(features.values()))
        count, per_picture = proposals.shape[:2]
        pooled = self._pooled(features, proposals)
        logits, codes = self.roi.box_predictor(self.roi.box_head(pooled))
        scores = logits.softmax(-1).view(count, per_picture, -1)[..., 1:]
        classes = scores.shape[2]
        boxes = self.roi.box_coder.decode_single(codes, proposals.flatten(0, 1))
        boxes = self._inside(boxes.view(count, per_picture, classes + 1, 4)[:, :, 1:].flatten(1, 2))
        scores = (scores * (promise > 0)[..., None]).flatten(1) * _large(boxes, SMALLEST)
        labels = torch.arange(1, classes + 1, device=batch.device).expand(count, per_picture, -1).flatten(1)
        kept, places = best(
            boxes, scores, labels, self.roi.score_thresh, self.roi.nms_thresh, self.roi.detections_per_img
        )
        return _picked(boxes, places), kept, labels.gather(1, places)

    def _propose(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, P, 4]`` where an object may be, and how likely each is; 0 where there is no box."""
        objectness, codes = concat_box_prediction_layers(*self.rpn_head(features))
        objectness = objectness.view(features[0].shape[0], -1)
        codes = codes.view(features[0].shape[0], -1, 4)
        places, levels = [], []
        starts = [sum(self._sizes[:index]) for index in range(len(self._sizes) + 1)]
        for number, (start, end) in enumerate(pairwise(starts)):
            top = objectness[:, start:end].topk(min(self._candidates, end - start), 1)
            places.append(top.indices + start)
            levels.append(torch.full_like(top.indices, number))
        place = torch.cat(places, 1)
        boxes = self._inside(_decoded(self._rpn_coder, _picked(codes, place), self.anchors[place]))
        scores = objectness.gather(1, place).sigmoid() * _large(boxes, self._smallest)
        kept, at = best(boxes, scores, torch.cat(levels, 1), self._rpn_threshold, self._rpn_overlap, self._proposals)
        return _picked(boxes, at), kept

    def _pooled(self, features: dict[str, Tensor], proposals: Tensor) -> Tensor:
        """What each proposal shows, ``[N * P, C, H, W]``, from the feature map that suits its size."""
        pool = self.roi.box_roi_pool
        maps = [each for name, each in features.items() if name in pool.featmap_names]
        boxes = proposals.flatten(0, 1)
        picture = torch.arange(proposals.shape[0], device=boxes.device)[:, None].expand(-1, proposals.shape[1])
        rois = torch.cat([picture.reshape(-1, 1).to(boxes.dtype), boxes], 1)
        levels = pool.map_levels([boxes])
        pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *pool.output_size)
        for number, (each, scale) in enumerate(zip(maps, pool.scales, strict=True)):
            (here,) = (levels == number).nonzero(as_tuple=True)
            part = roi_align(each, rois[here], pool.output_size, scale, pool.sampling_ratio)
            pooled = pooled.index_put((here,), part.to(pooled.dtype))
        return pooled


def _large(boxes: Tensor, side: float) -> Tensor:
    """1 where both sides of a box are ``side`` pixels or more, else 0; ``[N, M]``."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides >= side).all(-1).to(boxes.dtype)
