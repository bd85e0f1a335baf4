"""Samples between processes: any tree that pickles, its tensors as flat bytes.

torch's own pickling of a tensor writes an archive: a tenth of a millisecond each, and not for fractions of one image.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.layout is torch.strided and value.device.type == "cpu":
            try:
                return torch.from_numpy, (np.ascontiguousarray(value.numpy()).reshape(value.shape),)
            except (TypeError, RuntimeError):  # a type that numpy does not know, such as bfloat16
                pass
        return NotImplemented


def dumps(sample: Any) -> bytes:
    """A sample as bytes; raises what pickling raises for an object that cannot leave its process."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(sample)
    return file.getvalue()


def loads(data: Any) -> Any:
    """The sample, in memory of its own. Only for what :func:`dumps` made in this same run."""
    return pickle.loads(data)  # noqa: S301 - made by our own actors
