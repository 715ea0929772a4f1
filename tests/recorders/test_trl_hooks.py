"""What the TRL recorders do without TRL: refusals, which tokens a clip holds, answers that disturb nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kedge.errors import InputError
from kedge.recorders.answers import Answers, left_padded, terciles, undisturbed, until_end
from kedge.recorders.trl import recording
from kedge.recorders.trl_groups import active, as_text


def foreign_class(name: str, module: str, **methods: Any) -> type[Any]:
    return type(name, (), {"__module__": module, **methods})


def test_what_is_no_trainer_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GRPOTrainer, RLOOTrainer, PPOTrainer of trl -> write the steps with"):
        recording(foreign_class("GRPOTrainer", "elsewhere.trainer"), tmp_path)


def test_methods_that_changed_are_named_before_training(tmp_path: Path) -> None:
    changed = foreign_class(
        "RLOOTrainer",
        "trl.trainer.rloo_trainer",
        _generate_and_score_completions=lambda self, inputs: None,
        _calculate_rewards=lambda self, inputs, completions: None,
        _compute_loss=lambda self, model, inputs, more: None,
    )
    with pytest.raises(InputError) as raised:
        recording(changed, tmp_path)
    said = str(raised.value).splitlines()
    assert len(said) == 2  # `_compute_loss` may take more than it did
    assert "RLOOTrainer._calculate_rewards: takes (self, inputs, completions)" in said[0]
    assert "_get_per_token_logps_and_entropies: is not called" in said[1] and "trl==1.16.0" in said[1]


def test_a_subclass_of_ones_own_is_recorded_as_what_it_is(tmp_path: Path) -> None:
    known = foreign_class(
        "GRPOTrainer",
        "trl.trainer.grpo_trainer",
        _generate_and_score_completions=lambda self, inputs: None,
        _calculate_rewards=lambda self, inputs, prompts, completions, completion_ids_list: None,
        _get_per_token_logps_and_entropies=lambda self, model, input_ids, attention_mask, logits_to_keep: None,
        _compute_loss=lambda self, model, inputs: None,
    )
    mine = type("Mine", (known,), {"__module__": "mine"})
    made = recording(mine, tmp_path / "run")
    assert issubclass(made, mine) and made.kedge_base is known and not (tmp_path / "run").exists()


def ratios(*values: float) -> torch.Tensor:
    return torch.tensor([values]).log()


def test_the_clip_holds_what_would_go_further() -> None:
    trainer = SimpleNamespace(
        kedge_base=SimpleNamespace(__name__="GRPOTrainer"),
        args=SimpleNamespace(delta=None),
        loss_type="dapo",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.3,
    )
    old, new = ratios(1, 1, 1, 1), ratios(1.25, 1.35, 0.85, 0.7)
    mask = torch.tensor([[True, True, True, True]])
    assert active(trainer, old, new, torch.tensor([1.0]), mask).tolist() == [[True, False, True, True]]
    assert active(trainer, old, new, torch.tensor([-1.0]), mask).tolist() == [[True, True, True, False]]
    trainer.args.delta = 1.3
    assert active(trainer, old, new, torch.tensor([-1.0]), mask).tolist() == [[True, False, True, False]]
    trainer.importance_sampling_level = "sequence"  # the mean of the logs: ratio 1.0003
    assert active(trainer, old, new, torch.tensor([1.0]), mask).all()
    trainer.loss_type = "sapo"
    assert active(trainer, old, new, torch.tensor([1.0]), mask) is None
    trainer.kedge_base.__name__ = "RLOOTrainer"  # the product of the ratios: 1.35 * 1.25 = 1.69
    masked = torch.tensor([[True, True, False, False]])
    assert not active(trainer, old, new, torch.tensor([1.0]), masked).any()
    assert active(trainer, old, new, torch.tensor([-1.0]), masked).tolist() == [[True, True, False, False]]


class FakeSource:
    """A policy that says as many tokens as a generator tells; the reference's logs are lower by 0.5 each."""

    def __init__(self, *, reference: bool) -> None:
        self.has_reference, self.asked = reference, 0

    def generate(self, prompts: Sequence[Sequence[int]], *, reference: bool) -> list[list[int]] | None:
        self.asked += 1
        if reference and not self.has_reference:
            return None
        lengths = torch.randint(1, 9, (len(prompts),)).tolist()
        return [[5] * length + [2] for length in lengths]

    def logprobs(self, prompts: Any, responses: Any, *, reference: bool) -> list[Any] | None:
        if reference and not self.has_reference:
            return None
        return [np.full(len(one), -1.5 if reference else -1.0) for one in responses]

    def scores(self, responses: Sequence[Sequence[int]]) -> Any:
        return np.array([float(len(one)) for one in responses])

    def texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join("x" for token in one if token == 5) for one in responses]

    def tokens(self, response: Sequence[int]) -> list[str]:
        return [str(token) for token in response]


def test_looks_compare_with_the_same_reference_answers_and_disturb_nothing() -> None:
    answers, source = Answers([[1], [1, 1], [3]], ["a", "b", "c"]), FakeSource(reference=True)
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = torch.rand(3).tolist(), random.random(), float(np.random.rand())
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    first = answers.look(source, 0)
    assert (torch.rand(3).tolist(), random.random(), float(np.random.rand())) == expected
    second = answers.look(source, 10)
    assert first.reference_response == second.reference_response and source.asked == 3
    assert second.response == first.response  # the same draws at each look
    assert second.length == [len(tokens) for tokens in second.response_tokens]
    assert second.token_kl[0] == [0.5] * second.length[0]
    assert second.reference_kl == pytest.approx([0.5 * length for length in second.reference_tokens])


def test_without_a_reference_the_first_policy_stands_for_it() -> None:
    answers = Answers([[1], [1, 1]], ["a", "b"])
    record = answers.look(FakeSource(reference=False), 0)
    assert np.isnan(record.token_kl[0]).all() and record.reference_kl == [0.0, 0.0]


def test_small_things() -> None:
    assert terciles(np.array([1, 2, 3, 4, 5, 6])).tolist() == [0, 0, 1, 1, 2, 2]
    assert terciles(np.array([4, 4, 4])).tolist() == [0, 0, 0]
    assert until_end(torch.tensor([[5, 2, 0], [5, 5, 5]]), [2]) == [[5, 2], [5, 5, 5]]
    ids, mask = left_padded([[7], [8, 9]], 0, "cpu")
    assert ids.tolist() == [[0, 7], [8, 9]] and mask.tolist() == [[0, 1], [1, 1]]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]
    assert as_text(turns) == "user: hi\nassistant: ho" and as_text("plain") == "plain"
    with undisturbed(3):
        assert not torch.is_grad_enabled()
