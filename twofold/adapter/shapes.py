"""Modules as targets see them: kinds, sizes and ties of every named module, on a live model or one without weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from twofold.adapter.parameters import ParameterShape, own_parameters, ties_of
from twofold.layers.protocol import AdapterLayer, bare_modules
from twofold.layers.quantised import frozen_of, unpacked

Kind = Literal["linear", "conv1d", "embedding", "convolution", "attention", "other"]
"""`conv1d` is Hugging Face's transposed linear map, `convolution` one of torch's over one to three dimensions,
`attention` torch's MultiheadAttention."""


@dataclass(frozen=True)
class ModuleShape:
    """A module as targets see it: its weight maps `in_features` to `out_features`, if it has one; its bias is as wide as that.

    A convolution maps the window that its kernel sees: input channels times the kernel's positions. An attention module's are of
    its input projection.
    """

    kind: Kind
    in_features: int = 0
    out_features: int = 0
    bias: bool = False
    parameters: int = 0
    head: bool = False
    foreign_class: str | None = None
    """Name of the class, where it is a kind of Linear, Embedding or convolution that computes something of its own."""
    groups: int = 1
    """Of a convolution: each group of outputs takes its own part of the rank."""
    second: int = 0
    """In and out together of a second map inside, adapted with the first: an attention module's output projection."""
    own: tuple[ParameterShape, ...] = ()
    """Its parameters of two or three dimensions, those of modules inside it aside."""
    tied_to: str | None = None
    """The first module of the model that has the same weight, if that is another one."""
    input_embedding: bool = False

    @property
    def adaptable(self) -> bool:
        return self.kind != "other"

    @property
    def parameters_per_rank(self) -> int:
        """Values of A and B per unit of rank: in + out for a linear map."""
        return self.in_features + self.out_features // self.groups + self.second


def module_shapes(model: nn.Module) -> dict[str, ModuleShape]:
    """Every named module of a model (on the meta device too); adapted layers count as the base they wrap."""
    heads = _heads(model)
    counted: dict[nn.Module, dict[int, int]] = {}
    bare = {n: m.base if isinstance(m, AdapterLayer) else m for n, m in bare_modules(model) if n}
    ties = ties_of(bare)
    found = {}
    for name, module in bare.items():
        shape = partial(ModuleShape, head=id(module) in heads, own=own_parameters(module), tied_to=ties.get(name))
        found[name] = _shape(module, shape, sum(_sizes(module, counted).values()))
    return _with_input_embedding(model, bare, found)


def _with_input_embedding(
    model: nn.Module, modules: Mapping[str, nn.Module], shapes: dict[str, ModuleShape]
) -> dict[str, ModuleShape]:
    """The shapes with the mark on the input embedding: the one that the model names, else its only one."""
    try:
        asked = cast(Any, model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        asked = None
    asked = asked.base if isinstance(asked, AdapterLayer) else asked
    names = [n for n, m in modules.items() if m is asked]
    names = names or [n for n, s in shapes.items() if s.kind == "embedding"]
    if len(names) == 1:
        shapes[names[0]] = replace(shapes[names[0]], input_embedding=True)
    return shapes


def _sizes(module: nn.Module, counted: dict[nn.Module, dict[int, int]]) -> dict[int, int]:
    """The number of values of each of its parameters as it was before adapters came, by id; `counted` is what is known."""
    if module not in counted:
        bare = module.base if isinstance(module, AdapterLayer) else module
        found = {id(p): p.numel() for p in bare._parameters.values() if p is not None}
        for child in bare._modules.values():
            found |= _sizes(child, counted) if child is not None else {}
        counted[module] = found
    return counted[module]


def _heads(model: nn.Module) -> set[int]:
    """What `all-linear` leaves out: the output head, and the classifier of an encoder."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    found = [head] if head is not None else []
    found += [m for n, m in model.named_children() if n in ("score", "classifier")]
    return {id(m.base if isinstance(m, AdapterLayer) else m) for m in found}


def _shape(module: nn.Module, shape: Callable[..., ModuleShape], count: int) -> ModuleShape:
    """Its shape as it was before adapters came, when it had `count` values in its parameters; `shape` knows the rest."""
    leaf = all(child is None for child in module._modules.values())
    bias = leaf and module._parameters.get("bias") is not None
    if (packed := frozen_of(module)) is not None:
        return shape("linear", packed.shape[1], packed.shape[0], bias, count + unpacked(module))
    if isinstance(module, PRODUCTS) and not _computes_as_known(module):
        return shape("other", bias=bias, parameters=count, foreign_class=type(module).__name__)
    if isinstance(module, nn.Linear):
        return shape("linear", module.in_features, module.out_features, bias, count)
    if isinstance(module, Conv1D):
        return shape("conv1d", module.nx, module.nf, bias, count)
    if isinstance(module, nn.Embedding):
        return shape("embedding", module.num_embeddings, module.embedding_dim, bias, count)
    if isinstance(module, _ConvNd):
        window = module.in_channels * math.prod(module.kernel_size)
        return shape("convolution", window, module.out_channels, bias, count, groups=module.groups)
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward or not module._qkv_same_embed_dim:
            return shape("other", parameters=count, foreign_class=f"{type(module).__name__} with kdim or vdim")
        d = module.embed_dim
        return shape("attention", d, 3 * d, parameters=count, second=2 * d)
    width = cast(nn.Parameter, module.bias).numel() if bias else 0
    return shape("other", 0, width, bias, count)


PRODUCTS = (nn.Linear, nn.Embedding, Conv1D, _ConvNd)
FORWARDS = {c.forward for c in (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _computes_as_known(module: nn.Module) -> bool:
    """Whether its forward is the linear map, look-up or convolution that our layers put factors beside.

    OPT's positions are an embedding that is called with an attention mask, a router may be a linear layer that returns the best
    few: factors beside those would do something else than a changed weight does.
    """
    cls = type(module)
    if cls.forward in FORWARDS:
        return not isinstance(module, NonDynamicallyQuantizableLinear)  # of nn.MultiheadAttention, which never calls it
    weight_alone = [n for n, _ in module.named_parameters(recurse=False)] == ["weight"]
    scaled = cls.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale") and weight_alone
    return scaled or cls.__name__ == "FalconLinear"
