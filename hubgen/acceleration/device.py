"""What a model runs on: the device that is asked for, or the fastest there is, and the precision that suits it."""

import torch


def fastest_device() -> str:
    """Of this machine."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(device: str | None, dtype: str | None, argument: str = "device") -> tuple[str, str]:
    """The device and precision to use: those asked for, or the fastest device and what suits it.

    Args:
        device: cpu, cuda, cuda:1, mps, or `None`.
        dtype: float32, float16, bfloat16, or `None`.
        argument: What messages call the device.

    Raises:
        ValueError: The device is not to be had.
    """
    device = device or fastest_device()
    try:
        kind = torch.device(device)
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{argument} {device}: not to be had on this machine ({reason}); cpu always is") from error
    if kind.type == "meta":
        raise ValueError(f"{argument} meta: holds no numbers; expected cpu, cuda or mps")
    return device, dtype or ("bfloat16" if kind.type == "cuda" else "float32")
