"""A base whose linear layers are packed while they are read: each 16-bit weight goes as soon as its codes are made.

transformers reads a checkpoint tensor by tensor, renames and fuses what its architecture asks for, and hands each finished
weight to a *quantizer*. This is one for `QuantisedLinear`. Embeddings, norms, the output head, what a family keeps in
float32 and linear layers with a forward of their own stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from twofold.base.fingerprint import Sampled, sampled
from twofold.errors import BaseError
from twofold.layers.quantised import QuantisedLinear, frozen_of
from twofold.machine import page_out
from twofold.quant import Scheme

METHOD = "twofold"
Take: TypeAlias = Callable[[str, QuantisedLinear, Tensor], Tensor]
"""From a module's name, the module and its weight (out, in) to the parameter that it gets."""


def _codes(_: str, module: QuantisedLinear, weight: Tensor) -> Tensor:
    return module.pack(weight)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` is given: how to pack, where, and what to make of each 16-bit weight (out, in) but its codes."""

    def __init__(self, scheme: Scheme, device: torch.device, take: Take | None = None) -> None:
        self.quant_method = METHOD
        self.scheme, self.device, self.take = scheme, device, take or _codes


@register_quantizer(METHOD)
class Packer(HfQuantizer):  # type: ignore[misc]
    """transformers' hooks into its reading of a checkpoint.

    Attributes:
        seen: of each packed weight, by its name in the 16-bit model, what a fingerprint needs.
    """

    requires_calibration = False

    def __init__(self, quantization_config: PackedConfig, pre_quantized: bool) -> None:
        super().__init__(quantization_config, pre_quantized=False)
        self.seen: dict[str, Sampled] = {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        keep = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        chosen = [(n, m) for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
        for name, module in chosen:
            if should_convert_module(name, keep):
                model.set_submodule(name, _unpacked(module, self.quantization_config.scheme))

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether this parameter is a weight to be packed."""
        place, dot, last = param_name.rpartition(".")
        return dot + last == ".weight" and isinstance(model.get_submodule(place), QuantisedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _unpacked(module: Any, scheme: Scheme) -> QuantisedLinear:
    """A module that waits for its weight."""
    if isinstance(module, Conv1D):
        return _PackedConv1D(module.nx, module.nf, module.bias, scheme)
    return QuantisedLinear(module.in_features, module.out_features, module.bias, scheme)


class _PackedConv1D(QuantisedLinear):
    """Of a Conv1D, whose weight lies in the checkpoint as (in, out)."""


class _Pack(ConversionOps):  # type: ignore[misc]
    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def convert(self, input_dict: Mapping[str, Any], model: nn.Module, **_: Any) -> dict[str, Tensor]:
        """From the weights that go by these names to their codes."""
        return {name: self._packed(name, value, model) for name, value in input_dict.items()}

    def _packed(self, name: str, value: Any, model: nn.Module) -> Tensor:
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, QuantisedLinear):
            raise TypeError(f"{name} is not to be packed")
        weight: Tensor = value[0] if isinstance(value, list) else value
        self.packer.seen[name] = sampled(weight)
        matrix = weight.T if isinstance(module, _PackedConv1D) else weight
        if tuple(matrix.shape) != (module.out_features, module.in_features):
            raise BaseError(f"{name} is of shape {tuple(weight.shape)}, which its config does not describe")
        settings = self.packer.quantization_config
        codes: Tensor = settings.take(name.rpartition(".")[0], module, matrix.to(settings.device))
        page_out(weight)  # or the whole 16-bit file is in memory in the end, mapped
        return codes


def read_packed(cls: Any, source: str, dtype: torch.dtype, scheme: Scheme, device: torch.device) -> tuple[Any, Any]:
    """`cls.from_pretrained` with packed linear layers: the model and what transformers says of its reading.

    Returns:
        the model on `device`, and the loading information with `packed`: what a fingerprint needs of each packed weight.
    """
    model, told = cls.from_pretrained(
        source, dtype=dtype, quantization_config=PackedConfig(scheme, device), output_loading_info=True
    )
    packer: Packer = model.hf_quantizer
    packer.remove_quantization_config(model)
    _own(model)
    return model.to(device), {**told, "packed": packer.seen}


def read_again(model: Any, source: str, scheme: Scheme, look: Callable[[str, Tensor], None]) -> None:
    """Show `look` the 16-bit weight (out, in) of each packed module of a model, one after the other; none is kept."""

    def take(name: str, _: QuantisedLinear, weight: Tensor) -> Tensor:
        look(name, weight)
        return nn.Parameter(weight.new_empty(0), requires_grad=False)

    settings = PackedConfig(scheme, model.device, take)
    type(model).from_pretrained(source, dtype=model.dtype, quantization_config=settings)


def adopt(model: Any) -> dict[str, Sampled]:
    """Put modules of ours in place of bitsandbytes' own, over the same codes, in a model that was stored packed.

    Returns:
        what a fingerprint needs of the weights, unpacked, by the names they have in a 16-bit model.
    """
    found: dict[str, Sampled] = {}
    for name, module in list(model.named_modules()):
        weight = None if isinstance(module, QuantisedLinear) else frozen_of(module)
        if weight is not None:
            model.set_submodule(name, QuantisedLinear.holding(weight, module.bias))
            found[f"{name}.weight"] = sampled(weight.dequantised())
    return found


def _own(model: nn.Module) -> None:
    """Copy what was not packed out of the file that it is mapped from, which then leaves memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
