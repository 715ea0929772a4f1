"""Models to a folder and back, and what is refused on the way."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from kedge.data.tokenise import train_tokenizer
from kedge.errors import InputError
from kedge.models.load import (
    disable_dropout,
    load_classifier,
    load_policy,
    reward_model_from,
    save_model,
    scratch_policy,
)

SIZES = {"hidden": 32, "layers": 2, "heads": 4, "context": 48}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the desk is open until six"] * 5, vocab=280)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request, tokenizer):
    return scratch_policy(tokenizer, family=request.param, seed=1, **SIZES)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A folder with a policy, to be copied and damaged."""
    path = tmp_path_factory.mktemp("models") / "policy"
    save_model(scratch_policy(tokenizer, family="llama", seed=1, **SIZES), tokenizer, path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def tokens(model, seed=0):
    return torch.randint(7, model.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(seed))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(load, path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert problem.remedy and "\n" not in str(problem)
    return str(problem)


def test_scratch_policies_have_the_asked_shape(policy, tokenizer):
    config = policy.config
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert policy.get_input_embeddings().weight is policy.get_output_embeddings().weight
    assert not policy.training and policy.dtype == torch.float32
    if isinstance(config, LlamaConfig):
        assert (config.hidden_size, config.intermediate_size, config.max_position_embeddings) == (32, 96, 48)
    else:
        assert isinstance(config, GPT2Config) and (config.n_embd, config.n_inner, config.n_positions) == (32, 128, 48)


def test_the_seed_fixes_the_weights_and_leaves_the_callers_randomness_alone(policy, tokenizer):
    family = policy.config.model_type
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, other = (scratch_policy(tokenizer, family=family, seed=seed, **SIZES) for seed in (1, 2))
    reward_model_from(again, seed=3)
    assert torch.equal(torch.rand(3), expected)
    ids = tokens(policy)
    assert torch.equal(again(ids).logits, policy(ids).logits)
    assert not torch.equal(other(ids).logits, policy(ids).logits)


def test_sizes_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"model\.hidden: 12 is not an even multiple of model.heads = 4"):
        scratch_policy(tokenizer, family="llama", hidden=12, layers=1, heads=4, context=8, seed=0)
    with pytest.raises(InputError, match=r"model\.hidden: 10 is not a multiple of model.heads = 4"):
        scratch_policy(tokenizer, family="gpt2", hidden=10, layers=1, heads=4, context=8, seed=0)
    with pytest.raises(InputError, match=r"model\.family: 'bert' is not known"):
        scratch_policy(tokenizer, family="bert", hidden=8, layers=1, heads=4, context=8, seed=0)


def test_a_saved_policy_comes_back_bit_for_bit(policy, tokenizer, tmp_path, capfd):
    save_model(policy, tokenizer, tmp_path / "deep" / "policy")
    model, again = load_policy(tmp_path / "deep" / "policy")
    for seed in range(20):  # a difference in memory alignment would show in some of them
        ids = tokens(policy, seed)
        assert torch.equal(model(ids).logits, policy(ids).logits)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not model.training
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    output = capfd.readouterr()
    assert output.out == output.err == ""
    names = {file.suffix for file in (tmp_path / "deep" / "policy").iterdir()}
    assert ".safetensors" in names and ".bin" not in names


def test_a_reward_model_starts_from_the_policys_trunk_and_comes_back_bit_for_bit(policy, tokenizer, tmp_path):
    model = reward_model_from(policy, seed=3)
    ids = tokens(policy)
    assert torch.equal(model.base_model(ids).last_hidden_state, policy.base_model(ids).last_hidden_state)
    assert model.score.weight.shape == (1, 32) and not model.training
    assert torch.equal(model.score.weight, reward_model_from(policy, seed=3).score.weight)
    save_model(model, tokenizer, tmp_path / "reward")
    again = load_classifier(tmp_path / "reward")
    for seed in range(20):
        ids = tokens(policy, seed)
        assert torch.equal(again(ids).logits, model(ids).logits) and again(ids).logits.shape == (3, 1)
    with torch.no_grad():
        next(iter(model.base_model.parameters())).add_(1)
    assert torch.equal(reward_model_from(policy, seed=3)(ids).logits, again(ids).logits), "the trunk is a copy"


def test_the_score_head_has_the_published_spread(policy):
    weights = torch.cat([reward_model_from(policy, seed).score.weight.detach() for seed in range(40)])
    assert float(weights.std()) * 33**0.5 == pytest.approx(1, abs=0.08)
    assert abs(float(weights.mean())) * 33**0.5 < 0.12


def test_saving_replaces_a_folder_whole_and_leaves_no_trace(policy, tokenizer, folder):
    (folder / "leftover.txt").write_text("old")
    save_model(policy, tokenizer, folder)
    assert not (folder / "leftover.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]
    load_policy(folder)


def test_a_save_that_fails_leaves_the_old_folder_alone(policy, tokenizer, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    assert "No space left on device" in refused(lambda path: save_model(policy, tokenizer, path), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


def test_a_folder_that_cannot_be_replaced_is_put_back(policy, tokenizer, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = Path.replace

    def fail_on_the_new_one(self, target):
        if ".partial-" in self.name:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_the_new_one)
    assert "Permission denied" in refused(lambda path: save_model(policy, tokenizer, path), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


def test_a_place_that_cannot_be_written_is_refused(policy, tokenizer, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "policy"):
        assert "cannot be written" in refused(lambda place: save_model(policy, tokenizer, place), path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("load", [load_policy, load_classifier])
def test_folders_that_are_none(load, tmp_path):
    assert "there is no such folder" in refused(load, tmp_path / "nothing")
    assert "there is no such folder" in refused(load, "models/that/is/not/there")
    assert "no config.json" in refused(load, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not readable" in refused(load, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "the model family None is unknown" in refused(load, tmp_path)
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(load, tmp_path / "file")


def test_a_folder_without_tokenizer_is_refused(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    assert "no tokenizer in it" in refused(load_policy, folder)


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be loaded" in refused(load_policy, folder)


def test_unknown_families_and_their_code_are_refused(folder, tmp_path):
    edit(folder / "config.json", model_type="mystery")
    assert "the model family 'mystery' is unknown" in refused(load_policy, folder)
    proof = tmp_path / "proof"
    (folder / "mystery.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass C: pass\n")
    edit(folder / "config.json", auto_map={"AutoConfig": "mystery.C", "AutoModelForCausalLM": "mystery.C"})
    message = refused(load_policy, folder)
    assert "it runs Python code of its own" in message and "model.trust_remote_code=true" in message
    assert not proof.exists()


def test_code_is_run_only_when_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "mystery.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'mystery'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    edit(
        folder / "config.json",
        model_type="mystery",
        auto_map={"AutoConfig": "mystery.C", "AutoModelForCausalLM": "mystery.M"},
    )
    assert "code of its own" in refused(load_policy, folder)
    model, _ = load_policy(folder, trust_remote_code=True)
    assert type(model).__name__ == "M"


class Payload:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unopened(folder, tmp_path, name):
    proof = tmp_path / "proof"
    (folder / "model.safetensors").unlink()
    assert "no weights in it" in refused(load_policy, folder)
    (folder / name).write_bytes(pickle.dumps(Payload(proof)))
    for load in (load_policy, load_classifier):
        assert f"its weights are pickles ({name})" in refused(load, folder)
    (folder / "other.safetensors").write_bytes(b"")  # a decoy does not make transformers fall back on the pickle
    assert "cannot be loaded" in refused(load_policy, folder)
    assert not proof.exists()
    pickle.loads((folder / name).read_bytes())  # noqa: S301 - the payload is the test's own
    assert proof.exists(), "the payload would have shown"


def test_torn_incomplete_and_non_finite_weights_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "the model cannot be loaded" in refused(load_policy, folder)
    file.write_bytes(whole)
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    assert f"the weights lack {name}" in refused(load_policy, folder)
    weights[name][3, 2] = torch.nan
    save_file(weights, file, {"format": "pt"})
    assert f"{name} has values that are not finite" in refused(load_policy, folder)
    edit(folder / "config.json", hidden_size=64)
    refused(load_policy, folder)


def test_a_policy_is_no_reward_model_nor_the_other_way_round(folder, tokenizer, tmp_path):
    assert "the weights lack score.weight" in refused(load_classifier, folder)
    save_model(reward_model_from(load_policy(folder)[0], seed=1), tokenizer, tmp_path / "reward")
    assert "a classifier (score.weight), not a language model" in refused(load_policy, tmp_path / "reward")


def test_a_classifier_of_two_classes_is_no_reward_model(folder, tokenizer, tmp_path):
    from transformers import LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(folder, num_labels=2)
    save_model(LlamaForSequenceClassification(config), tokenizer, tmp_path / "two")
    assert "the model cannot be loaded" in refused(load_classifier, tmp_path / "two")


def test_tokenizers_that_do_not_belong_to_the_model_are_refused(folder):
    train_tokenizer(["more words than the model has embeddings"] * 5, vocab=290).save_pretrained(folder)
    assert "its tokenizer has ids up to 289, the model only 280 embeddings" in refused(load_policy, folder)


def test_a_tokenizer_without_end_is_refused_and_one_without_padding_is_given_some(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    edit(folder / "config.json", pad_token_id=None)
    model, tokenizer = load_policy(folder)
    assert tokenizer.pad_token == "<bos>" and model.config.pad_token_id == tokenizer.pad_token_id
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    assert "no end-of-sequence token" in refused(load_policy, folder)


def test_local_folders_cause_no_network_call(folder, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a network call")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_policy(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(InputError):
        load_policy(folder)


def test_a_hub_name_that_fails_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be loaded" in refused(load_policy, "nobody/nothing")
    assert "cannot be loaded" in refused(load_classifier, "nobody/nothing")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_dropout_training_mode_changes_nothing(family, tokenizer):
    sizes = {"vocab_size": len(tokenizer)}
    if family == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
        config = LlamaConfig(hidden_size=32, intermediate_size=64, attention_dropout=0.5, **heads, **sizes)
    else:
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    ids = tokens(model)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert not disable_dropout(model).training
    expected = model(ids).logits
    model.train()
    assert torch.equal(model(ids).logits, expected)
    assert not any(value for name, value in vars(model.config).items() if "drop" in name)
