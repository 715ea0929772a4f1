"""From text to token ids and back: a tokenizer trained on the spot, chat templates, padding.

Text that users bring never becomes a special token, whatever it spells: "<eos>" typed by a user is five characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from kedge.data.records import Demonstration, Judgment, Loaded, Message, Prompt, graded
from kedge.data.validate import check_rejected
from kedge.errors import InputError, Problem

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ("user", "assistant", "system", "tool")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% elif message['role'] in ['user', 'system', 'tool'] %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% else %}{{ raise_exception('the role ' ~ message['role'] ~ ' is not user, assistant, system or tool') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_special_texts: WeakKeyDictionary[Any, tuple[int, tuple[str, ...]]] = WeakKeyDictionary()


def train_tokenizer(texts: Iterable[str], *, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` tokens, learnt from `texts`; it round-trips any text.

    <pad>, <bos> and <eos> are distinct, so that an ending is never mistaken for padding. Plain text starts with <bos>;
    so does the chat template. Raises `InputError` if `vocab` cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    smallest = 256 + len(special)
    if vocab < smallest:
        what = f"{vocab} tokens cannot hold the 256 bytes and {len(special)} special tokens"
        raise InputError(Problem("model.vocab", what, f"use {smallest} or more"))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the policy to answer.

    Messages go through the tokenizer's chat template with the generation prompt; without a template they are rendered
    as "role: content" lines that end in "assistant:". Plain text stays plain. Raises `InputError` where the chat
    template refuses the messages or nothing is left to condition on.
    """
    if isinstance(prompt, str):
        ids = _plain_ids(tokenizer, prompt)
    elif tokenizer.chat_template:
        ids = _chat_ids(tokenizer, prompt)
    else:
        turns = [f"{message.role}: {message.content}" for message in prompt]
        ids = _plain_ids(tokenizer, "\n".join([*turns, "assistant:"]))
    if not ids:
        raise InputError(Problem("prompt", "no tokens in it", "give the prompt some text"))
    return ids


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a response, closed by exactly one EOS; an EOS spelt out at the end of `text` is that one."""
    return [*_text_ids(tokenizer, text.removesuffix(tokenizer.eos_token)), tokenizer.eos_token_id]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def within_context(
    tokenizer: Any, loaded: Loaded[T], *, context: int, max_rejected: float, max_new_tokens: int = 0
) -> Loaded[T]:
    """The rows that fit into `context` tokens; the others, and those the chat template refuses, join `rejected`.

    A demonstration and each judged response count with prompt, response and EOS, a prompt with the
    `max_new_tokens` that are to follow it. Raises `InputError` if more than the share `max_rejected` of all rows is
    rejected, or every row.
    """
    kept: list[tuple[T, str]] = []
    rejected = list(loaded.rejected)
    for row, where in zip(loaded.rows, loaded.lines, strict=True):
        try:
            length = _length(tokenizer, row, max_new_tokens)
        except InputError as error:
            what, remedy = error.problems[0].what, error.problems[0].remedy
            rejected.append(Problem(where, what, remedy))
            continue
        if length <= context:
            kept.append((row, where))
        else:
            extra = f" with the {max_new_tokens} to come" if max_new_tokens else ""
            what = f"{length} tokens{extra}, the context is {context}"
            rejected.append(Problem(where, what, "shorten or remove the row, or use a model with a longer context"))
    if loaded.lines:
        check_rejected(loaded.lines[0].rpartition(":")[0], rejected, loaded.total, max_rejected)
    rows, lines = zip(*kept, strict=True) if kept else ((), ())
    return Loaded(rows, lines, tuple(rejected), loaded.total)


def _length(tokenizer: Any, row: Any, max_new_tokens: int) -> int:
    """Tokens of the longest sequence that `row` turns into."""
    if isinstance(row, Demonstration):
        responses: Sequence[str] = [row.response]
    elif isinstance(row, Judgment):
        responses = graded(row)[0]
    else:
        return len(encode_prompt(tokenizer, row)) + max_new_tokens
    longest = max(len(encode_response(tokenizer, response)) for response in responses)
    return len(encode_prompt(tokenizer, row.prompt)) + longest


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, P] int64 with padding in front, and the mask [B, P] bool of what is real."""
    return _padded(rows, pad, left=True)


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, T] int64 with padding behind, and the mask [B, T] bool of what is real."""
    return _padded(rows, pad, left=False)


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    import torch

    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        real = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, real] = torch.as_tensor(tokens, dtype=torch.int64)
        mask[row, real] = True
    return ids, mask


def _text_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Ids of text that may spell special tokens without becoming them."""
    options = {"add_special_tokens": False, "split_special_tokens": True, **options}
    ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    return ids


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text with the tokenizer's own opening, but not closed: the policy goes on from here."""
    ids = _text_ids(tokenizer, text, add_special_tokens=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def _chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of the rendered chat.

    Contents that spell a special token are rendered as placeholders and tokenised by themselves. Other contents are
    not, since tokenizers may merge them with the template's text around them.
    """
    contents = [message.content for message in messages]
    if not any(special in content for special in _specials(tokenizer) for content in contents):
        return _text_ids(tokenizer, _render(tokenizer, messages, contents), split_special_tokens=False)
    skeleton = _render(tokenizer, messages, [f"\ue000{number}\ue001" for number in range(len(messages))])
    ids: list[int] = []
    for place, piece in enumerate(re.split("\ue000([0-9]+)\ue001", skeleton)):
        from_user = place % 2 == 1
        text = contents[int(piece)] if from_user else piece
        ids += _text_ids(tokenizer, text, split_special_tokens=from_user)
    return ids


def _render(tokenizer: Any, messages: Sequence[Message], contents: Sequence[str]) -> str:
    from jinja2 import TemplateError

    turns = [{"role": message.role, "content": text} for message, text in zip(messages, contents, strict=True)]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        what = f"the tokenizer's chat template refuses it: {error}"
        raise InputError(Problem("prompt", what, "change the roles, or use plain text prompts")) from None
    return text


def _specials(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the special tokens, kept because asking a tokenizer for them is slow."""
    known = _special_texts.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        known = (len(tokenizer), tuple(sorted(texts | set(tokenizer.all_special_tokens))))
        _special_texts[tokenizer] = known
    return known[1]
