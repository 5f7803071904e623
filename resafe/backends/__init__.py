"""Back-ends: what answers conversations. A local model, vLLM offline, or an OpenAI-compatible endpoint.

All take `Request`s and give `Answer`s as they finish, so that whoever asks can keep what is there when it is stopped.
"""

from resafe.backends._base import GREEDY, Backend, Request, Sampling
from resafe.backends._load import check_spec, open_backend

__all__ = ["GREEDY", "Backend", "Request", "Sampling", "check_spec", "open_backend"]
