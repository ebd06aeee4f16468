"""Weights to start from: a state dict in a file, checked against the body that it is for."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.experiments.files import first_line, sha256_of
from cts_fast.models.by_name import Model

UNTRAINED = ("scratch", "none")  # what is meta-tested without meta-training
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms
SHOWN = 5  # names of tensors in a message


@dataclass(frozen=True)
class Weights:
    """A body's start: `state` is all of its state dict, `parameters` what phi holds of it.

    sha256: of the file; left_out: names of its tensors that belong to a head; statistics: whether it holds those of
    batch norms, or these begin anew.
    """

    state: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    sha256: str
    left_out: tuple[str, ...]
    statistics: bool


def untrained_phis(weights: Weights | None) -> dict[str, Mapping[str, Tensor]]:
    """Name to the initialization of what is meta-tested without meta-training; an empty one is a random body."""
    return {"scratch": {}} | ({"none": weights.parameters} if weights else {})


def read_weights(path: Path, model: Model) -> Weights:
    """The weights in a file (.safetensors, or what torch.save wrote) for the body of this model.

    The file is of the body, of a TaskNet (body.*, head.*) or of the whole classifier; only batch-norm statistics may be
    missing. Raises ValueError that names the file and what does not fit.
    """
    given = _read(path)
    with torch.random.fork_rng(devices=[]):
        body = model(1).body
    own = body.state_dict()
    if not given.keys() & own.keys():  # of a whole TaskNet
        given = {name.removeprefix("body."): tensor for name, tensor in given.items()}
    left_out = tuple(name for name in given if name not in own and name.startswith((f"{model.head}.", "head.")))
    statistics = [name for name in own if name.rpartition(".")[2] in STATISTICS]
    has_statistics = any(name in given for name in statistics)
    # older files count no batches, and an initialization holds no statistics at all
    optional = {name for name in statistics if not has_statistics or name.endswith("num_batches_tracked")}
    usable = [name for name, tensor in own.items() if name in given and _convertible(given[name], tensor)]
    faults = {
        "missing": [name for name in own if name not in given and name not in optional],
        "not in the model": [name for name in given if name not in own and name not in left_out],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in given and given[name].shape != tensor.shape
        ],
        "of another kind": [
            f"{name} {given[name].dtype} {given[name].layout}".removesuffix(" torch.strided")
            for name in own
            if name in given and name not in usable
        ],
        "not finite": [name for name in usable if not given[name].to(own[name].dtype).isfinite().all()],
    }
    said = [f"{what}: {_listed(names)}" for what, names in faults.items() if names]
    if said:
        raise ValueError(f"--weights {path} does not fit the body of {model.name}; {'; '.join(said)}")
    state = {name: (given[name] if name in given else tensor).detach().to(tensor.dtype) for name, tensor in own.items()}
    parameters = {name: state[name] for name, _ in body.named_parameters()}
    return Weights(state, parameters, sha256_of(path), left_out, has_statistics or not statistics)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "is a folder: name the file in it" if path.is_dir() else "there is no such file"
        raise ValueError(f"--weights {path}: {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # torch's own text advises to read such a file with code in it
        with_code = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        why = "it may hold more than tensors" if with_code else first_line(error)
        raise ValueError(
            f"--weights {path} cannot be read ({why}): give a state dict that safetensors or torch.save wrote"
        ) from error
    if not isinstance(found, Mapping) or not found or not all(map(_is_entry, found.items())):
        content = _listed(list(map(str, found))) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"--weights {path} holds no state dict but: {content or 'nothing'}; save the state dict alone")
    return dict(found)


def _is_entry(entry: tuple[object, object]) -> bool:
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor) and not value.is_meta


def _convertible(given: Tensor, tensor: Tensor) -> bool:
    """Whether it is dense, of usual numbers, and of the same kind."""
    plain = given.layout == torch.strided and not given.is_quantized and not given.is_complex()
    of_bytes = given.is_floating_point() and given.element_size() < 2
    return plain and not of_bytes and given.is_floating_point() == tensor.is_floating_point()


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
