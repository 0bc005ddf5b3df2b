"""Image local attention: every pixel attends to the patch around it."""

from .functional import local_aggregate, local_attention, local_similarity, merge
from .modules import LocalAttention

__all__ = ["LocalAttention", "local_aggregate", "local_attention", "local_similarity", "merge"]
__version__ = "0.1.0"
