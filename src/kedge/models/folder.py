"""Whether a folder is a Hugging Face model that is safe to load, before anything in it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kedge.errors import InputError, Problem

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_local(path: str | Path) -> bool:
    """Whether `path` is a folder; false for what may be a Hub name. Raises `InputError` for a path to nothing."""
    if Path(path).is_dir():
        return True
    if isinstance(path, str) and re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path) and not Path(path).exists():
        return False
    what = "not a folder" if Path(path).exists() else "there is no such folder"
    raise InputError(Problem(str(path), what, "name a Hugging Face model folder, or use model.init = 'scratch'"))


def check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Raise `InputError` unless the folder holds a configuration of a known family and safetensors weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "name the folder that `save_pretrained` wrote"
        raise InputError(Problem(str(folder), "no config.json in it", remedy)) from None
    except (OSError, ValueError) as error:
        raise InputError(Problem(str(folder / "config.json"), f"not readable: {error}", "copy it again")) from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in CONFIG_MAPPING and not trust_remote_code:
        if isinstance(config, dict) and config.get("auto_map"):
            what, remedy = "it runs Python code of its own", "read that code, then --set model.trust_remote_code=true"
        else:
            what, remedy = f"the model family {family!r} is unknown", "use a family that transformers knows"
        raise InputError(Problem(str(folder / "config.json"), what, remedy))
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        what = f"its weights are pickles ({pickles[0]}), which can run code" if pickles else "no weights in it"
        remedy = "convert them to safetensors where you trust them" if pickles else "copy model.safetensors into it"
        raise InputError(Problem(str(folder), what, remedy))


def check_tokenizer_files(folder: Path) -> None:
    """Raise `InputError` unless some tokenizer is in the folder."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(Problem(str(folder), "no tokenizer in it", "add tokenizer.json: tokenizer.save_pretrained"))
