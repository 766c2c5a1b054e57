"""The files of an adapter folder; nothing else is imported, so that other engines' processes can ask."""

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "twofold.json"
