"""What torch sees on this machine, as JSON on stdout: `python -m flashtalk_cli.cli.probe`.

A process of its own, so that a torch that crashes or hangs while it loads is a finding of
`flashtalk doctor` and not its end.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any


def look() -> dict[str, Any]:
    """Version, GPUs with their memory in bytes, and for each attention kernel why it is absent (or null)."""
    import torch

    from flashtalk_cli.models.attention import KERNEL_NAMES, why_absent

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "attention": {name: why_absent(name, device, torch.bfloat16) for name in KERNEL_NAMES},
        "torchvision": importlib.util.find_spec("torchvision") is not None,
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return {
        "name": name,
        "capability": f"{major}.{minor}",
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }


if __name__ == "__main__":
    import sys

    sys.stdout.write(json.dumps(look()))
