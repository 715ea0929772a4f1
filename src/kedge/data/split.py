"""Which prompts are held out, decided by the prompt alone."""

from __future__ import annotations

import hashlib

from kedge.data.records import Prompt, prompt_text

SALT = b"kedge held-out prompts\n"


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether the prompt belongs to the held-out `share` in [0, 1].

    Decided by a salted SHA-256 of its text: the same prompt is on the same side in every file, order and run, and a
    prompt held out at one share is held out at every larger one.
    """
    digest = hashlib.sha256(SALT + prompt_text(prompt).encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
