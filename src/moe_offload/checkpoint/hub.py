"""A checkpoint of the hub: what is needed of it, in huggingface_hub's own cache.

That library resumes, verifies and honours its cache, tokens and offline mode; here is only which
files are needed, and what its errors mean for a person.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moe_offload.checkpoint.folders import COMPANIONS, require_source
from moe_offload.checkpoint.source_files import read_weight_map
from moe_offload.errors import UserError

_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
_SMALL: Final = (
    *COMPANIONS,
    "hf_quant_config.json",
    f"{_SAFETENSORS}.index.json",
    f"{_BIN}.index.json",
)


def download(name: str, revision: str | None, hugging_face: bool) -> Path:
    """The snapshot folder of `name`, such as "openai/gpt-oss-20b", with the files that are needed.

    Of its weights those in transformers' order, safetensors first, or without `hugging_face`
    Mistral's native ones. UserError where the hub, the network or the disk refuses.
    """
    folder = _snapshot(name, revision, _SMALL)
    require_source(folder, hugging_face)
    exact = folder.name  # the commit: the revision may move while the weights are on their way
    if not hugging_face:
        return _snapshot(name, exact, [*_SMALL, "consolidated*"])
    for whole in (_SAFETENSORS, _BIN):
        index = folder / f"{whole}.index.json"
        files = {*read_weight_map(index).values()} if index.exists() else {whole}
        folder = _snapshot(name, exact, [*_SMALL, *files])
        if any((folder / file).exists() for file in files):
            break
    return folder


def _snapshot(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns]))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on its page of the hub, log in with hf auth login, "
            "and run the same command again"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"found no folder {name}, and on the hub no model of this name that you may read: "
            "check --input-path, or log in with hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision}; check --revision") from error
    except LocalEntryNotFoundError as error:
        why = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "no network"
        raise UserError(
            f"found no folder {name}, and it cannot be downloaded: {why}, and the cache does not "
            "hold it whole; check --input-path, or download it where there is a network"
        ) from error
    except Exception as error:  # the network's libraries raise many kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some space on the disk of {constants.HF_HUB_CACHE}, or set HF_HOME"
        else:
            remedy = "run the same command again to go on"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} is not downloaded: {reason:.200}; {remedy}") from error
