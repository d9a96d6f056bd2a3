"""Where a run computes."""

import torch

__all__ = ["resolved_device"]


def resolved_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ValueError: a device that this machine or this build of torch does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not to be had here; give auto, cpu, cuda, cuda:1 or mps") from error
    return chosen
