"""The usages in PEFT's guides for LoRA, each a script that runs on PEFT, and here once its imports say `twofold.peft`.

A script leaves what it found in `found`: numbers, texts and tensors, which must be the same in both.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from families import BERT, build_model, inputs, logits, randomise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import twofold.peft as face
from twofold.errors import AdapterFileError, ConfigError
from twofold.peft.auto import AUTO, LOADERS, auto_name
from twofold.peft.helpers import hotswap_adapter, rescale_adapter_scale
from twofold.peft.missing import NOT_HERE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
USAGES = {
    "quicktour: train, save, load by the adapter alone, generate": """
        from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model
        from transformers import AutoModelForCausalLM

        config = LoraConfig(target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        train(model)
        trained = logits(model.eval())
        model.save_pretrained(output)
        again = AutoPeftModelForCausalLM.from_pretrained(output).eval()
        ids = torch.tensor([[5, 6, 7]])
        texts = again.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        found = [trained, logits(again), texts, any(p.requires_grad for p in again.parameters())]
    """,
    "a class for what has none of its own": """
        from peft import AutoPeftModel

        model = AutoPeftModel.from_pretrained(untold).eval()
        found = [logits(model), type(model.get_base_model()).__name__.removeprefix("Peft")]
    """,
    "several adapters: load, set, disable, unload": """
        from peft import PeftModel

        model = PeftModel.from_pretrained(build_model("llama"), first, adapter_name="sft").eval()
        found = [logits(model)]
        model.load_adapter(second, adapter_name="dpo")
        model.set_adapter("dpo")
        found += [logits(model), model.active_adapters]
        with model.disable_adapter():
            found.append(logits(model))
        model.disable_adapter_layers()
        found.append(logits(model))
        model.enable_adapter_layers()
        found.append(logits(model))
        model.delete_adapter("sft")
        found += [sorted(model.peft_config), logits(model), logits(model.unload())]
    """,
    "merging: in place and for good": """
        from peft import PeftModel

        model = PeftModel.from_pretrained(build_model("llama"), first).eval()
        model.merge_adapter()
        found = [logits(model)]
        model.unmerge_adapter()
        found.append(logits(model))
        merged = model.merge_and_unload(safe_merge=True, progressbar=False)
        found += [logits(merged), type(merged).__name__]
    """,
    "merging of several into a new one": """
        from peft import PeftModel

        model = PeftModel.from_pretrained(build_model("llama"), first, adapter_name="sft").eval()
        model.load_adapter(second, adapter_name="dpo")
        for kind in ("cat", "svd"):
            model.add_weighted_adapter(["sft", "dpo"], [0.7, 0.3], kind, combination_type=kind, svd_rank=6)
        found = []
        for kind in ("cat", "svd"):
            model.set_adapter(kind)
            found.append(logits(model))
        found.append([model.peft_config[kind].r for kind in ("cat", "svd")])
    """,
    "different adapters in one batch": """
        from peft import PeftModel

        model = PeftModel.from_pretrained(build_model("llama"), first, adapter_name="adapter_fr").eval()
        model.load_adapter(second, adapter_name="adapter_de")
        ids, names = torch.arange(9).view(3, 3) + 4, ["__base__", "adapter_fr", "adapter_de"]
        with torch.no_grad():
            found = [model(input_ids=ids, adapter_names=names).logits]
            found.append(model.generate(input_ids=ids, adapter_names=names, max_new_tokens=4, do_sample=False))
    """,
    "hot-swapping": """
        from peft import PeftModel
        from peft.utils.hotswap import hotswap_adapter

        model = PeftModel.from_pretrained(build_model("llama"), first).eval()
        found = [logits(model)]
        hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
        found += [logits(model), model.active_adapters]
    """,
    "scaling for a while": """
        from peft import PeftModel
        from peft.helpers import check_if_peft_model, rescale_adapter_scale

        model = PeftModel.from_pretrained(build_model("llama"), first).eval()
        with rescale_adapter_scale(model, 0.5):
            found = [logits(model)]
        found += [logits(model), check_if_peft_model(first), check_if_peft_model(base)]
    """,
    "injecting into any module": """
        from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

        class DummyModel(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.embedding = torch.nn.Embedding(10, 10)
                self.linear = torch.nn.Linear(10, 10)
                self.lm_head = torch.nn.Linear(10, 10)

            def forward(self, input_ids):
                return self.lm_head(self.linear(self.embedding(input_ids)))

        config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"])
        model = inject_adapter_in_model(config, DummyModel()).eval()
        train(model)
        state = get_peft_model_state_dict(model)
        other = inject_adapter_in_model(config, DummyModel(), low_cpu_mem_usage=True).eval()
        outcome = set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
        ids = torch.arange(8)[None]
        found = [outcome.unexpected_keys, sorted(state), bool(torch.equal(model(ids), other(ids)))]
    """,
    "tensors as a table": """
        from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
        from peft import set_peft_model_state_dict

        weights = load_peft_weights(first, device="cpu")
        config = PeftConfig.from_pretrained(first)
        config = type(config)(r=config.r, lora_alpha=config.lora_alpha, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(build_model("llama"), config).eval()
        set_peft_model_state_dict(model, weights)
        found = [sorted(weights), sorted(get_peft_model_state_dict(model)), logits(model)]
    """,
    "fine control of rank and alpha": """
        from peft import LoraConfig, get_peft_model

        class Inner(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.foo, self.barfoo = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        class Middle(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.foo, self.foobar, self.module = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), Inner()

        class Outer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.foo, self.module = torch.nn.Linear(8, 8), Middle()

        found = []
        for pattern in ("foo", "^foo", "^module.foo", "module.foo", "^module.module.foo"):
            config = LoraConfig(r=2, target_modules=["foo", "foobar", "barfoo"], rank_pattern={pattern: 5})
            found.append(get_peft_model(Outer(), config).get_nb_trainable_parameters()[0])
    """,
    "new tokens beside": """
        from peft import LoraConfig, get_peft_model

        model = build_model("llama")
        model.resize_token_embeddings(66)
        config = LoraConfig(target_modules="all-linear", trainable_token_indices={"embed_tokens": [64, 65]})
        model = get_peft_model(model, config)
        found = [model.get_nb_trainable_parameters()[0], sorted(model.peft_config)]
    """,
    "4-bit training, made ready": """
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(build_model("llama"))
        before = any(p.requires_grad for p in model.parameters())
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        found = [before, model.get_nb_trainable_parameters()]
    """,
    "parameters instead of modules": """
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(build_model("llama"), LoraConfig(r=4, target_parameters=["mlp.up_proj.weight"], target_modules=[]))
        found = model.get_nb_trainable_parameters()[0]
    """,
    "LoRA+": """
        from peft import PeftModel
        from peft.optimizers import create_loraplus_optimizer

        model = PeftModel.from_pretrained(build_model("llama"), first, is_trainable=True).eval()
        optimizer = create_loraplus_optimizer(model=model, optimizer_cls=torch.optim.SGD, lr=5e-2, loraplus_lr_ratio=16)
        logits(model).square().mean().backward()
        optimizer.step()
        found = logits(model)
    """,
    "the state of a model": """
        from copy import copy
        from peft import PeftModel, get_layer_status, get_model_status

        model = PeftModel.from_pretrained(build_model("llama"), first, adapter_name="one").eval()
        model.load_adapter(second, adapter_name="two")
        model.set_adapter("two")
        found = []
        for change in (lambda: None, model.merge_adapter, model.unmerge_adapter, lambda: model.delete_adapter("one")):
            change()
            status = get_model_status(model)
            found.append([getattr(status, name) for name in STATUS])
            layers = [[copy(getattr(layer, name)) for name in LAYER] for layer in get_layer_status(model)]
            found.append(sorted(layers, key=str))
            found.append([layer.name.split("layers.")[1] for layer in model.get_layer_status()])
        found.append(model.get_model_status().trainable_params)
    """,
    "a config from a table": """
        from peft import PeftType, TaskType, get_peft_config, get_peft_model

        config = get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 2})
        model = get_peft_model(build_model("llama"), config)
        found = [config.peft_type == PeftType.LORA, config.r, config.task_type == TaskType.CAUSAL_LM]
        found.append(model.get_nb_trainable_parameters())
    """,
}
STATUS = [
    "base_model_type",
    "adapter_model_type",
    "peft_types",
    "trainable_params",
    "total_params",
    "num_adapter_layers",
]
STATUS += ["enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices"]
STATUS += ["quantization_backend"]
LAYER = ["enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices"]


def train(model: Any) -> None:
    """Values that do not depend on the start, of which each library draws its own: those of the factors by place."""
    generator = torch.Generator().manual_seed(1)
    learned = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for _, parameter in learned:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, and adapters of it, all written by others; one does not say what it is for."""
    folder = tmp_path_factory.mktemp("usages")
    build_model("llama").save_pretrained(folder / "base")
    for seed, name in enumerate(("first", "second", "untold")):
        task = None if name == "untold" else "CAUSAL_LM"
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type=task)
        model = peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        randomise([(n, p) for n, p in model.named_parameters() if "lora_" in n], seed=seed)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "first", "second", "untold")}


def run(script: str, **names: Any) -> Any:
    known = {
        "torch": torch,
        "logits": logits,
        "build_model": build_model,
        "train": train,
        "STATUS": STATUS,
        "LAYER": LAYER,
    }
    space = {**known, **names}
    exec(compile(textwrap.dedent(script), "script", "exec"), space)
    return space["found"]


@pytest.mark.parametrize("usage", USAGES)
def test_a_script_of_the_guides_runs_with_its_import_changed(
    usage: str, folders: dict[str, str], tmp_path: Path
) -> None:
    script = USAGES[usage]
    here = re.sub(r"from peft\b", "from twofold.peft", script)
    theirs = run(script, **folders, output=str(tmp_path / "theirs"))
    found = run(here, **folders, output=str(tmp_path / "ours"))
    same(found, theirs)


def same(found: Any, expected: Any) -> None:
    """Equal, tensors to rounding."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    else:
        assert found == expected


TINY: Any = hf.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MADE: dict[str, Callable[[], Any]] = {
    "CAUSAL_LM": lambda: build_model("llama"),
    "SEQ_2_SEQ_LM": lambda: build_model("t5"),
    "SEQ_CLS": lambda: build_model("bert-classifier"),
    "TOKEN_CLS": lambda: hf.BertForTokenClassification(TINY),
    "QUESTION_ANS": lambda: hf.BertForQuestionAnswering(TINY),
    "FEATURE_EXTRACTION": lambda: hf.BertModel(TINY),
}


@pytest.mark.parametrize("task", LOADERS)
def test_each_auto_class_loads_what_peft_wrote_for_its_task(task: face.TaskType, tmp_path: Path) -> None:
    MADE[task]().save_pretrained(tmp_path / "base")
    name = auto_name(task)
    base = getattr(hf, LOADERS[task]).from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type=task.value)).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path / "a")
    ours = getattr(face, name).from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs(ours))[0], theirs(**inputs(ours))[0], rtol=1e-4, atol=1e-5)
    assert {n for n, value in vars(peft).items() if n.startswith("AutoPeftModel")} == set(AUTO)
    other = face.AutoPeftModelForCausalLM if task != "CAUSAL_LM" else face.AutoPeftModelForSeq2SeqLM
    with pytest.raises(ConfigError, match=f"is for {task}, not .*; take {name}"):
        other.from_pretrained(tmp_path / "a")


def test_an_adapter_that_does_not_say_enough_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    config = json.loads((Path(folders["untold"]) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    with pytest.raises(
        ConfigError, match="neither its task nor a class of transformers'; take one of AutoPeftModelForCausalLM"
    ):
        face.AutoPeftModel.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base"):
        face.AutoPeftModel.from_pretrained(tmp_path)


def test_the_embedding_grows_to_the_adapters_own_tokenizer(folders: dict[str, str], tmp_path: Path) -> None:
    """PEFT does so too, for tokens that were added before the training."""
    words = {f"w{i}": i for i in range(70)}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    base = hf.AutoModelForCausalLM.from_pretrained(folders["base"])
    base.resize_token_embeddings(70)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path)
    found = face.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert found.get_input_embeddings().weight.shape[0] == 70


def test_hot_swapping_what_does_not_fit_leaves_the_old_one(folders: dict[str, str], tmp_path: Path) -> None:
    other = peft.get_peft_model(build_model("gpt2"), peft.LoraConfig(target_modules=["c_attn"]))
    other.save_pretrained(tmp_path)
    model: Any = face.PeftModel.from_pretrained(build_model("llama"), folders["first"], is_trainable=True).eval()
    before = logits(model)
    with pytest.raises(AdapterFileError):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), before)
    hotswap_adapter(model, folders["second"], "default")
    assert not torch.allclose(logits(model), before)
    assert sum(p.requires_grad for p in model.parameters()) == 8
    swapped = logits(model)
    model.load_adapter(folders["first"], "other")
    hotswap_adapter(model, folders["second"], "other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), swapped)


def test_what_cannot_be_scaled_is_not(folders: dict[str, str]) -> None:
    model: Any = face.get_peft_model(build_model("llama"), face.LoraConfig(use_dora=True))
    with pytest.raises(ConfigError, match="can be neither scaled nor summed"), rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises(ConfigError, match="no adapter is active"), rescale_adapter_scale(build_model("llama"), 2.0):
        pass
    with pytest.raises(ConfigError, match="no adapter is attached"):
        face.get_layer_status(build_model("llama"))
    with pytest.raises(ConfigError, match="'IA3', but adapters other than LoRA are not done here"):
        face.get_peft_config({"peft_type": "IA3"})


@pytest.mark.parametrize("name", NOT_HERE)
def test_names_of_peft_that_are_not_here_say_why(name: str) -> None:
    assert hasattr(peft, name)
    with pytest.raises(ImportError, match=f"twofold.peft has no {name}: ") as caught:
        exec(f"from twofold.peft import {name}")
    assert isinstance(caught.value, ConfigError)
    assert NOT_HERE[name] in str(caught.value)
