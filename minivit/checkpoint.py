"""Files that training can lose power over: whole or absent, never half.

Copy this file: it works alone and needs safetensors beside torch.

A checkpoint holds all that training needs to go on. A file of weights holds a model and
what is known about it. Neither can make the reader's machine run code.
"""

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

__all__ = ["load", "load_weights", "save", "save_weights", "write"]

FORMAT = "minivit checkpoint 1"


class Stateful(Protocol):
    """What a checkpoint keeps: a module, an optimizer, a schedule, a scaler."""

    def state_dict(self) -> Mapping[str, Any]:
        """Give the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take it back."""
        ...


def save(path: str | Path, *, extra: Any = None, **parts: Stateful) -> None:
    """Keep the state of everything that training changes, and of torch's randomness.

    The file is replaced at once when the new one is complete on disk: after a power cut
    there is the old checkpoint or the new one.

    Args:
        path: the file.
        extra: numbers, texts, tensors, and lists and dicts of them: the step, say.
        parts: whatever has a `state_dict`, each under a name of your own.

    Raises:
        OSError: it cannot be written; the file that was there is untouched.
        TypeError: something that `load` would refuse, such as a number of NumPy.

    Example:
        save("a.pt", model=model, optimizer=optimizer, extra={"step": 7})
    """
    state = {
        "format": FORMAT,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "extra": extra,
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:  # what cannot be read again must not replace what can
        torch.load(buffer, map_location="meta", weights_only=True)
    except Exception as error:
        raise TypeError(
            f"{path} was not written, for it could not be read again. A checkpoint "
            f"holds plain numbers, texts, tensors, lists and dicts: {error}"
        ) from error
    write(path, buffer.getbuffer())


def load(path: str | Path, **parts: Stateful) -> Any:
    """Put back what `save` kept, on whatever device the parts are.

    Args:
        path: the file.
        parts: the same names as in `save`; none to read `extra` only.

    Returns:
        What was given as `extra`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, or is no checkpoint, or holds other parts.
        RuntimeError: a model has other parameters than the one that was saved.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # each kind of damage has another type in torch
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is damaged, or no checkpoint of minivit: {reason}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of minivit ({FORMAT!r})")
    if not parts:
        return state["extra"]
    if state["parts"].keys() != parts.keys():
        raise ValueError(
            f"{path} holds {sorted(state['parts'])}, expected {sorted(parts)}"
        )
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["rng"]["cpu"])
    if len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    return state["extra"]


def save_weights(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights as safetensors, with what is known about them inside.

    Args:
        path: the file.
        state_dict: of a module.
        about: what JSON can say: how to build the model, names of classes, …
        dtype: of the numbers in the file; float16 halves it.

    Raises:
        OSError: it cannot be written; the file that was there is untouched.
        ValueError: a weight is not finite, or too large for the dtype.
    """
    tensors = {}
    for name, weight in state_dict.items():
        # A copy of each: safetensors takes no names that share memory, as tied ones do.
        tensors[name] = weight.detach().to("cpu", dtype, copy=True).contiguous()
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds NaN or numbers too large for {dtype}")
    write(path, to_bytes(tensors, metadata={"minivit": json.dumps(about)}))


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Args:
        path: the file.

    Returns:
        state_dict: float32 tensors on the CPU.
        about: what is known about the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, or minivit did not write it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: Windows lets nobody replace a file that a tensor is a view of.
            state_dict = {
                name: file.get_tensor(name).to(torch.float32, copy=True)
                for name in file.keys()  # noqa: SIM118
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or no safetensors file: {error}"
        ) from error
    if "minivit" not in metadata:
        raise ValueError(
            f"{path} does not say which model it belongs to: minivit did not write it"
        )
    return state_dict, json.loads(metadata["minivit"])


def write(path: str | Path, data: bytes | memoryview) -> None:
    """Replace a file at once: readers see the old one or the new one, whole.

    Args:
        path: the file.
        data: its new content.

    Raises:
        OSError: no space, no permission, no folder; the old file is untouched.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before its name is
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror}. "
            "What was there before is untouched",
        ) from error
