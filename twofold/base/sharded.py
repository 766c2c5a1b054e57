"""A frozen base spread over all processes of a training, by PyTorch's FSDP2 (`fully_shard`).

Each process holds one part of every weight. A decoder layer is whole only while it runs: its parts are gathered just before
and dropped just after, in the forward and again in the backward pass. The base is frozen, so no gradient of it is ever
formed or sent. Adapters are attached afterwards: FSDP never sees their factors, which every process holds whole, in
float32 over a base of whatever type.

Rank 0 alone reads the weights, into its main memory; the others build the model without any (on the meta device), and
each parameter is dealt out in turn. So no device, and one machine only, must hold the whole base at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from twofold.base.fingerprint import Fingerprint
from twofold.base.load import Base, Precision, load_base, load_renderer
from twofold.errors import BaseError
from twofold.events import Emit, silent, working
from twofold.machine import checked_device
from twofold.world import World


def load_sharded(reference: str, dtype: Precision, device: str, world: World, emit: Emit = silent) -> Base:
    """Load a base of which every process holds a part, on its own device.

    Raises:
        BaseError: nothing is found under that reference, or it cannot be read.
    """
    whole = world.together(lambda: load_base(reference, dtype, "cpu", emit) if world.main else None)
    renderer = world.together(lambda: whole.renderer if whole else load_renderer(reference))
    config, fingerprint, dtypes = world.on_main(lambda: _described(cast(Base, whole)))
    model = world.together(lambda: _without_weights(config, dtypes, reference))
    with working(f"sharding {reference} over {world.size} processes", emit):
        _shard(model, checked_device(device), world)
        _deal(whole.model if whole else None, model, world)
    return Base(reference, model, renderer.tokenizer, renderer, fingerprint)


def _described(whole: Base) -> tuple[Any, Fingerprint, dict[str, torch.dtype]]:
    """What the other processes need to know of a base: its config, its fingerprint, and the type of each parameter."""
    return whole.model.config, whole.fingerprint, {n: p.dtype for n, p in whole.model.named_parameters()}


def _without_weights(config: Any, dtypes: Mapping[str, torch.dtype], reference: str) -> nn.Module:
    """The model as its config describes it, without memory for its parameters, which are of these types."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    if other := dtypes.keys() ^ dict(model.named_parameters()).keys():
        raise BaseError(
            f"{reference} cannot be sharded: its config does not describe its weights ({', '.join(sorted(other)[:4])})"
        )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return model.eval().requires_grad_(False)


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers keeps together on a device: the decoder's layers."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [m for m in model.modules() if type(m).__name__ in names]


def _shard(model: nn.Module, device: torch.device, world: World) -> None:
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )  # which nobody writes into
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _deal(whole: nn.Module | None, model: nn.Module, world: World) -> None:
    """Give every process its parts of rank 0's weights, one parameter at a time, and all of its buffers."""
    source = whole.state_dict() if whole is not None else {}
    dealt: dict[int, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            if id(tensor) not in dealt:  # tied weights stay one
                dealt[id(tensor)] = nn.Parameter(_parts(source.get(name), cast(DTensor, tensor)), requires_grad=False)
            state[name] = dealt[id(tensor)]
    model.load_state_dict(state, strict=False, assign=True)
    _copy_buffers(whole, model, next(iter(dealt.values())).device, world)


def _parts(source: Tensor | None, target: DTensor) -> DTensor:
    mesh = target.device_mesh
    full = torch.empty(target.shape, dtype=target.dtype, device=mesh.device_type) if source is None else source
    return distribute_tensor(full.to(mesh.device_type, target.dtype), mesh, target.placements)


def _copy_buffers(whole: nn.Module | None, model: nn.Module, device: torch.device, world: World) -> None:
    source = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in list(model.named_buffers()):
        value = source[name].to(device) if whole is not None else torch.empty_like(buffer, device=device)
        world.copy_from_main(value)
        place, _, last = name.rpartition(".")
        model.get_submodule(place)._buffers[last] = value


def local_parts(model: nn.Module) -> nn.Module:
    """What this process holds of the model's sharded parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass left gathered
    parts = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    return nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in parts)


def bytes_per_process(model: nn.Module, size: int) -> int:
    """Memory of the weights in one process: its part of all, the parts outside the layers whole, and two layers whole,
    of which one runs while the next is gathered."""
    by_layer = [_bytes(layer) for layer in layers(model)]
    rest = _bytes(model) - sum(by_layer)
    return _bytes(model) // size + rest + 2 * max(by_layer, default=0)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in module.parameters())
