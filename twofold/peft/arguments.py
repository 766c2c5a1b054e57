"""Arguments of PEFT's functions that would do something which is not done here: each is accepted where it changes nothing."""

from __future__ import annotations

from typing import Any

from twofold.errors import ConfigError

CHANGES_NOTHING: dict[str, tuple[tuple[Any, ...], str]] = {
    "mixed": ((False,), "adapters other than LoRA are not done here"),
    "autocast_adapter_dtype": ((True,), "factors are always held in float32 or wider"),
    "ephemeral_gpu_offload": ((False,), "layers are not moved between devices for single products"),
    "key_mapping": ((None,), "rename the tensors in the file instead"),
    "config": ((None,), "the adapter's own config says what its tensors are; edit adapter_config.json instead"),
    "safe_serialization": ((True,), "adapters are written as safetensors, for a pickle can run code when it is read"),
    "save_embedding_layers": (
        ("auto", False),
        "adapted embeddings need no copy of the base's; train new tokens by trainable_token_indices or modules_to_save",
    ),
    "svd_clamp": ((None,), "clamped factors would be another update"),
    "majority_sign_method": (("total",), "signs are elected by the weighted sum, as in the paper"),
    "ignore_mismatched_sizes": ((False,), "a tensor of another shape is an error"),
    "state_dict": ((None,), "the config says which modules are adapted"),
    "push_to_hub": ((False,), "upload the folder with huggingface_hub"),
}
"""By argument: the values that change nothing, and why the others are refused."""


def check_inert(**given: object) -> None:
    """Refuse values of PEFT's arguments that would do something which is not done here.

    Raises:
        ConfigError: names the argument, and says why.
    """
    for name, value in given.items():
        accepted, reason = CHANGES_NOTHING[name]
        if not any(value is one or value == one for one in accepted):
            raise ConfigError(f"{name}={value!r} is not done here: {reason}")
