"""cvworker: a queue-driven batch worker for computer vision.

Extend :class:`Module`, write ``preprocess`` and ``process``, and ``cvworker run`` is everything else.
"""

from cvworker.errors import CvworkerError, JobError, StartupError
from cvworker.module import Module

__all__ = ["CvworkerError", "JobError", "Module", "StartupError", "__version__"]

__version__ = "0.1.0"
