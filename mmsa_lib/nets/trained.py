"""What of a model is frozen, what trains, how it is saved and counted: one meaning.

A part is *frozen* when `freeze` has marked it: no gradients, and eval mode whatever
mode the model around it is in. What is *trained* are the parameters that require a
gradient and the persistent buffers outside frozen parts; that, and nothing else, is
what the loop keeps, what `save` writes and what `count_parameters` counts first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MethodType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmsa_lib.errors import ConfigError
from mmsa_lib.files import replacing


def freeze(module: nn.Module, evaluating: bool = True) -> nn.Module:
    """Stop gradients and keep `module` in eval mode through training; returns it.

    A module attached inside it later (an adapter) is not frozen by this call.
    evaluating=False leaves the mode alone: layers that recompute their activations do
    so in training mode only.
    """
    module.requires_grad_(False)
    for part in module.modules():
        part._mmsa_frozen = True
        if evaluating:
            part.training = False
            part.train = MethodType(_train_the_rest, part)
    return module


def _train_the_rest(part: nn.Module, mode: bool = True) -> nn.Module:
    """What ``train()`` means for a frozen module: for what was attached inside it."""
    for child in part.children():
        child.train(mode)
    return part


def thaw(module: nn.Module) -> nn.Module:
    """Undo `freeze` for a part (or all) of a model: it trains; returns it."""
    module.requires_grad_(True)
    for part in module.modules():
        part._mmsa_frozen = False
        part.__dict__.pop("train", None)
    return module


def is_frozen(part: nn.Module) -> bool:
    """Was this very module marked by `freeze`?"""
    return getattr(part, "_mmsa_frozen", False)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: what a checkpoint, the best epoch and a file keep.

    Named as in the module's state dict, not copied.
    """
    state = {k: p.detach() for k, p in trained_parameters(module).items()}
    for prefix, part in module.named_modules(remove_duplicate=False):
        if is_frozen(part):
            continue
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in memory of their own on the CPU."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def load_trained(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a `trained_state` back into a model built the same way.

    Raises `ConfigError` naming what is missing, left over or of another shape; the
    model is then as it was.
    """
    wanted = trained_state(module)
    faults = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [
            f"{k} is {tuple(v.shape)}, expected {tuple(wanted[k].shape)}"
            for k, v in state.items()
            if k in wanted and v.shape != wanted[k].shape
        ],
    }
    found = "; ".join(f"{k} {_shorten(v)}" for k, v in faults.items() if v)
    if found:
        raise ConfigError(
            f"these are not the trained weights of this model: {found}. Build it as it "
            "was trained, the same parts frozen."
        )
    module.load_state_dict(state, strict=False)  # what is frozen stays as it is


def _shorten(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def save(module: nn.Module, path: str | Path) -> Path:
    """Write only what was trained, as safetensors, whole or not at all."""
    with replacing(path) as part:
        save_file(copied(trained_state(module)), part)
    return Path(path)


def load(module: nn.Module, path: str | Path) -> nn.Module:
    """Read what `save` wrote into a model built the same way; returns it.

    Raises `ConfigError` for a file that is none, or does not fit (`load_trained`).
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors: {error}. Give the file that save "
            "wrote."
        ) from error
    try:
        load_trained(module, state)
    except ConfigError as error:
        raise ConfigError(f"{Path(path).name}: {error}") from error
    return module


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters; a shared one counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def weights_sha256(module: nn.Module) -> str:
    """Content hash of every parameter and buffer of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
