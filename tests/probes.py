"""Probe adapters: the greedy answer of each is written in tokens that no other adapter and not the base can say.

One number of the residual stream is steady: every embedding begins with it, and no layer, adapted or not, writes to it. A probe's
change to the head reads that number and lifts four tokens of the vocabulary, its faces, far above all others. Two probes have no
face in common, so an answer of even one token names its adapter, whatever the prompt and whoever shares the batch. Which of its
four faces comes next follows from all that the layers have computed: a wrong key or value, or another adapter in a layer, shows
in that order.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_base import llama, tokenizer, write_base
from torch import Tensor
from torch.func import functional_call

from twofold.adapter.attach import attach, detach
from twofold.adapter.config import LoraConfig
from twofold.adapter.files import Provenance, save_adapter
from twofold.base.load import load_base

FACES, RANK, SCALE = 4, 4, 2.0
STEADY, LIFT = 2.0, 1000.0
LOUD = {"self_attn": 0.4, "mlp": 0.1, "lm_head": 0.5}
"""Of the factors, by where they are: attention so loud that an answer hangs on all of what was said before."""
HEAD = 16
"""Numbers of an attention head: our own kernels take multiples of that."""
CLOSE = 1e-2
"""Logits nearer than that may change places with the order of additions."""
FACE = re.compile(r"<p(\d+)\.(\d+)\.(\d+)>")
TENSORS = "adapter_model.safetensors"


def write_probed_base(folder: Path, clients: int, contents: int) -> Path:
    """A tiny Llama whose vocabulary has the faces of so many probes, of several contents each; it says none of them itself."""
    tokens = tokenizer()
    plain = len(tokens)
    tokens.add_tokens([_face(i, c, k) for i in range(clients) for c in range(contents) for k in range(FACES)])
    model = llama(len(tokens), head_dim=HEAD)
    with torch.no_grad():
        model.lm_head.weight[plain:] = 0
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 0] = STEADY
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    return write_base(folder, model, tokens)


def _face(client: int, content: int, face: int) -> str:
    return f"<p{client}.{content}.{face}>"


def _loudness(key: str) -> float:
    return next(loud for place, loud in LOUD.items() if place in key)


def said(text: str) -> list[tuple[int, int]]:
    """Which probes speak in an answer, token by token: client and content."""
    return [(int(i), int(c)) for i, c, _ in FACE.findall(text)]


class Probes:
    """Writes probes for one base, and judges answers by transformers' own forward pass with the probe merged by hand."""

    def __init__(self, base: Path, work: Path) -> None:
        loaded = load_base(str(base), "float32", "cpu")
        self.base = base
        self.tokenizer, self.model, self._renderer = loaded.tokenizer, loaded.model, loaded.renderer
        self._bare = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._like = work / "like"
        names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        attach(self.model, LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=[*names, "lm_head"]))
        provenance = Provenance(base=loaded.fingerprint.as_json())
        save_adapter(self.model, self._like, "default", provenance=provenance, base_name="probed")
        detach(self.model)
        self._shapes = {key: t.shape for key, t in load_file(self._like / TENSORS).items()}

    def tensors(self, client: int, content: int) -> dict[str, Tensor]:
        """The factors of one probe, loud in every layer."""
        dice = torch.Generator().manual_seed(10 * client + content)
        made = {key: torch.randn(shape, generator=dice) * _loudness(key) for key, shape in sorted(self._shapes.items())}
        for key, tensor in made.items():
            if key.endswith(("o_proj.lora_B.weight", "down_proj.lora_B.weight")):
                tensor[0] = 0
            if key.endswith("lm_head.lora_A.weight"):
                tensor[0] = torch.eye(tensor.shape[1])[0]
            if key.endswith("lm_head.lora_B.weight"):
                faces = self.tokenizer.convert_tokens_to_ids([_face(client, content, k) for k in range(FACES)])
                lifted = torch.cat([torch.full((FACES, 1), LIFT), tensor[faces, 1:]], dim=1)
                tensor.zero_()
                tensor[faces] = lifted
        return made

    def write(self, folder: Path, client: int, content: int) -> Path:
        """The folder of one probe."""
        shutil.copytree(self._like, folder)
        save_file(self.tensors(client, content), folder / TENSORS, metadata={"format": "pt"})
        return folder

    @torch.no_grad()
    def would_say(self, client: int, content: int, question: str, answer: str) -> bool:
        """Whether this is the greedy answer of a probe: each token the likeliest one behind those before it."""
        prompt = self._renderer.chat_prompt([{"role": "user", "content": question}])
        spoken = self.tokenizer.convert_tokens_to_ids([m.group() for m in FACE.finditer(answer)])
        logits = self._logits(client, content, [*prompt, *spoken])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(spoken)[:, None])[:, 0]
        return bool((chosen > logits.amax(dim=1) - CLOSE).all())

    def _logits(self, client: int, content: int, ids: Sequence[int]) -> Tensor:
        made: dict[str, Any] = self.tensors(client, content)
        merged = dict(self._bare)
        for key, A in made.items():
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
                merged[name] = merged[name] + SCALE * made[key.replace("lora_A", "lora_B")] @ A
        found: Tensor = functional_call(self.model, merged, (torch.tensor([list(ids)]),)).logits[0]
        return found
