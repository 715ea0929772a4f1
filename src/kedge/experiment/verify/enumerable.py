"""Language models so small that every response can be listed, with exact answers to every question about them.

A `Space` fixes the tokens (padding, BOS, EOS, one marker a prompt, a few letters), the prompts and the token budget.
A `TableModel` is a causal language model over it whose logits are a table with one row a prefix; it follows the
transformers call convention, cache included, so that production code can drive it. Everything exact is a sum over
`space.sequences`. What is held against these answers must not have made them, so nothing here imports the rest of the
package; an import rule holds that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PAD, BOS, EOS, FIRST_MARKER = 0, 1, 2, 3


@dataclass(frozen=True)
class Space:
    """Prompts, letters and a budget of tokens. An *action* is EOS (0) or a letter (1 ... letters).

    Prompt i is i + 1 BOS tokens and its marker, so that prompts differ in length and batches need padding.
    """

    letters: int = 3
    budget: int = 3
    prompts: int = 1

    @property
    def actions(self) -> int:
        return self.letters + 1

    @property
    def vocab_size(self) -> int:
        return FIRST_MARKER + self.prompts + self.letters

    @cached_property
    def tokens(self) -> Tensor:
        """[actions] the token id of each action."""
        first_letter = FIRST_MARKER + self.prompts
        return torch.tensor([EOS, *range(first_letter, first_letter + self.letters)])

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Letters (as actions) already written wherever the model still chooses; row numbers of the table."""
        letters = range(1, self.actions)
        return [p for length in range(self.budget) for p in itertools.product(letters, repeat=length)]

    @cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """Every complete response as actions: closed by EOS, or cut by the budget."""
        ended = [(*prefix, 0) for prefix in self.prefixes]
        return ended + list(itertools.product(range(1, self.actions), repeat=self.budget))

    @cached_property
    def ended(self) -> Tensor:
        """[N] bool: the sequence closes with EOS."""
        return torch.tensor([sequence[-1] == 0 for sequence in self.sequences])

    @cached_property
    def lengths(self) -> Tensor:
        """[N] tokens of each sequence, EOS included."""
        return torch.tensor([len(sequence) for sequence in self.sequences])

    @cached_property
    def mask(self) -> Tensor:
        """[N, budget] bool: the sequence has a token here."""
        return torch.arange(self.budget) < self.lengths[:, None]

    @cached_property
    def path(self) -> tuple[Tensor, Tensor]:
        """[N, budget] table row before each token and action taken there; zeros on padding."""
        rows = {prefix: row for row, prefix in enumerate(self.prefixes)}
        states, actions = torch.zeros(2, len(self.sequences), self.budget, dtype=torch.long)
        for n, sequence in enumerate(self.sequences):
            for t, action in enumerate(sequence):
                states[n, t], actions[n, t] = rows[sequence[:t]], action
        return states, actions

    @cached_property
    def transition(self) -> Tensor:
        """[states, vocabulary] next state: 0 before the marker, then every prompt's prefixes, at last the end."""
        count = len(self.prefixes)
        over = 1 + self.prompts * count
        table = torch.full((over + 1, self.vocab_size), over)
        table[0, BOS] = 0
        rows = {prefix: row for row, prefix in enumerate(self.prefixes)}
        for prompt in range(self.prompts):
            first = 1 + prompt * count
            table[0, FIRST_MARKER + prompt] = first
            for prefix, row in rows.items():
                for action in range(1, self.actions):
                    following = rows.get((*prefix, action))
                    table[first + row, self.tokens[action]] = over if following is None else first + following
        return table

    def prompt_ids(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """[B, P] token ids and mask of the prompts numbered [B], padded on the left."""
        width = self.prompts + 1
        ids = torch.full((self.prompts, width), PAD)
        for i in range(self.prompts):
            ids[i, width - i - 2 : -1], ids[i, -1] = BOS, FIRST_MARKER + i
        return ids[prompt], ids[prompt] != PAD

    def response_ids(self, sequence: Tensor) -> Tensor:
        """[B, budget] token ids of the sequences numbered [B], padded on the right."""
        return self.tokens[self.path[1][sequence]].masked_fill(~self.mask[sequence], PAD)

    def index_of(self, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """[B] the sequence number of each response in a batch without holes."""
        base = self.actions + 1
        powers = base ** torch.arange(self.budget)
        action_of = torch.full((self.vocab_size,), -1)
        action_of[self.tokens] = torch.arange(self.actions)
        codes = torch.full((base**self.budget,), -1)
        codes[((self.path[1] + 1) * self.mask * powers).sum(dim=1)] = torch.arange(len(self.sequences))
        digits = (action_of[response_ids] + 1) * response_mask
        index = codes[(digits * powers[: response_ids.shape[1]]).sum(dim=1)]
        assert (index >= 0).all(), "a response outside the space"
        return index

    def sequence_logprobs(self, table: Tensor) -> Tensor:
        """[prompts, N] log-probability of each sequence under logits [prompts, prefixes, actions]."""
        return self.token_logprobs(table).sum(dim=-1)

    def token_logprobs(self, table: Tensor) -> Tensor:
        """[prompts, N, budget] log-probability of each token, zero on padding."""
        states, actions = self.path
        return table.log_softmax(dim=-1)[:, states, actions].masked_fill(~self.mask, 0)


class Cache:
    """The state of every row: all that a prefix leaves behind."""

    def __init__(self, state: Tensor) -> None:
        self.state = state

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = self.state[indices]


class Walker(nn.Module):
    """A table with one row a state, read along token sequences."""

    transition: Tensor

    def __init__(self, space: Space, table: Tensor) -> None:
        super().__init__()
        self.space = space
        self.table = nn.Parameter(table.clone())
        self.register_buffer("transition", space.transition)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None, state: Tensor | None) -> Tensor:
        """[B, S] state after each token; masked tokens leave it as it was."""
        batch, width = input_ids.shape
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -width:]
        state = torch.zeros(batch, dtype=torch.long) if state is None else state
        after = []
        for t in range(width):
            state = torch.where(seen[:, t].bool(), self.transition[state, input_ids[:, t]], state)
            after.append(state)
        return torch.stack(after, dim=1)

    def rows(self, states: Tensor) -> Tensor:
        """[B, S, K] table rows; zeros before the marker and after the end."""
        flat = self.table.flatten(0, 1)
        outside = flat.new_zeros(1, flat.shape[1])
        return torch.cat([outside, flat, outside])[states]


class TableModel(Walker):
    """A causal language model with logits [prompts, prefixes, actions] as its parameters."""

    def __init__(self, space: Space, table: Tensor, forbidden: float = -1e4) -> None:
        super().__init__(space, table)
        self.forbidden = forbidden  # logit of padding, BOS and markers, which are never written
        self.config = SimpleNamespace(
            vocab_size=space.vocab_size,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            max_position_embeddings=space.prompts + 1 + space.budget,
            use_cache=True,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> SimpleNamespace:
        states = self.states(input_ids, attention_mask, None if past_key_values is None else past_key_values.state)
        rows = self.rows(states[:, -logits_to_keep:])
        logits = rows.new_full((*rows.shape[:-1], self.space.vocab_size), self.forbidden)
        logits = logits.index_copy(-1, self.space.tokens, rows)
        return SimpleNamespace(logits=logits, past_key_values=Cache(states[:, -1]) if use_cache else None)


class TableCritic(Walker):
    """A critic with values [prompts, prefixes, heads] as its parameters, called as the package calls critics."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        return self.rows(self.states(input_ids, attention_mask, None))


def random_table(space: Space, seed: int, scale: float = 0.7, width: int | None = None) -> Tensor:
    """[prompts, prefixes, width] float64 normal numbers; `width` defaults to the number of actions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (space.prompts, len(space.prefixes), width or space.actions)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Task:
    """A reward and a leash: J(pi) = mean over prompts of E_pi[r] - beta KL(pi || reference)."""

    space: Space
    reference: Tensor  # [prompts, prefixes, actions] logits
    reward: Tensor  # [prompts, N]
    beta: float

    @cached_property
    def reference_logprobs(self) -> Tensor:
        return self.space.sequence_logprobs(self.reference)

    @cached_property
    def log_z(self) -> Tensor:
        """[prompts] log of Z = E_reference[exp(r / beta)]."""
        return (self.reference_logprobs + self.reward / self.beta).logsumexp(dim=-1)

    @cached_property
    def optimum(self) -> Tensor:
        """[prompts, N] log-probabilities of pi* = reference * exp(r / beta) / Z."""
        return self.reference_logprobs + self.reward / self.beta - self.log_z[:, None]

    def kl(self, logprobs: Tensor) -> Tensor:
        """[prompts] KL(policy || reference) in nats per sequence, from sequence log-probabilities [prompts, N]."""
        return (logprobs.exp() * (logprobs - self.reference_logprobs)).sum(dim=-1)

    def objective(self, logprobs: Tensor) -> Tensor:
        """J, from sequence log-probabilities [prompts, N]."""
        return ((logprobs.exp() * self.reward).sum(dim=-1) - self.beta * self.kl(logprobs)).mean()

    def distance(self, table: Tensor) -> float:
        """Total variation between the policy with logits `table` and pi*, the largest over prompts."""
        gap = self.space.sequence_logprobs(table.detach().double()).exp() - self.optimum.exp()
        return float(gap.abs().sum(dim=-1).max() / 2)

    def soft_bellman(self) -> Tensor:
        """[prompts, prefixes, actions] optimal log-probabilities by backward recursion over prefixes.

        V(s) = beta log sum_a reference(a|s) exp(V(s a) / beta), with V of a complete response its reward.
        """
        space, log_reference = self.space, self.reference.log_softmax(dim=-1)
        complete = {sequence: n for n, sequence in enumerate(space.sequences)}
        policy = torch.zeros_like(self.reference)
        for prompt in range(space.prompts):
            value = {sequence: float(self.reward[prompt, n]) for sequence, n in complete.items()}
            for row in reversed(range(len(space.prefixes))):
                prefix = space.prefixes[row]
                after = torch.tensor([value[(*prefix, a)] for a in range(space.actions)], dtype=torch.float64)
                scores = log_reference[prompt, row] + after / self.beta
                value[prefix] = float(self.beta * scores.logsumexp(dim=0))
                policy[prompt, row] = scores - value[prefix] / self.beta
        return policy


def random_task(space: Space, seed: int = 0, beta: float = 0.5, spread: float = 0.5) -> Task:
    """Normal rewards with standard deviation `spread` and a random reference."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (space.prompts, len(space.sequences))
    reward = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Task(space, random_table(space, seed), reward, beta)
